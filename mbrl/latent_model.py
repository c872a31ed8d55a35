"""What every latent-variable world model shares: encoder, decoder, heads, losses; a backbone adds memory.

A backbone is a NamedTuple of functions; `make` joins one with the shared parts into a `WorldModel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl.distributions import Bernoulli, OneHot, SymlogMSE, check_bins, one_hot, two_hot
from mbrl.errors import check_at_least, check_between
from mbrl.losses import kl_losses
from mbrl.networks import MAX_LAYERS, MLP, Linear, apply, flatten_obs
from mbrl.types import Array, EnvSpec, Observed, Prediction, Starts, Trajectory, WorldModel, whole


@dataclass(frozen=True)
class LatentConfig:
    """Fields that every latent world model has; a backbone's config extends it."""

    stoch: int = 32
    """Number of categorical factors of the latent z (S)."""
    classes: int = 64
    """Classes of each factor (C)."""
    units: int = 1024
    """Width of encoder, decoder and heads."""
    encoder_layers: int = 3
    """Layers of the encoder."""
    decoder_layers: int = 3
    """Layers of the decoder."""
    head_layers: int = 1
    """Layers of the reward and continue heads."""
    unimix: float = 0.01
    """Weight of the uniform mixed into every categorical latent."""
    free_nats: float = 1.0
    """KL below which neither KL loss has a gradient, in nats per time step."""
    bins: int = 255
    """Bins of the two-hot reward, odd."""
    bin_limit: float = 20.0
    """Outermost bin, as symlog of the reward."""
    discount: float = 1 - 1 / 333
    """Discount per agent step (gamma), learned into the continue head as a soft label."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the networks' activations; parameters, losses and optimiser stay float32."""

    VARIES: ClassVar = ("free_nats", "discount")


class Backbone(NamedTuple):
    """The memory of a latent world model. ``token`` [..., E] is an encoded observation, ``z`` a sample.

    init(key) -> params
    init_state(params, batch) -> state [batch]
    observe(params, state [B], token [T, B], action [T, B, A], is_first [T, B], keys [T])
        -> (state [B], Starts with states [T, B], posterior OneHot [T, B, S, C], prior OneHot [T, B, S, C])
    step(params, state [B], token, action, is_first, key) -> state [B]
    starts(params, state [B]) -> Starts
    imagine_init(params, starts, horizon) -> state
    imagine_step(params, ctx, state [...], action, key) -> state [...]
    features(params, state [...]) -> [..., F]
    feature_size: F. param_groups(), emit and storable as in `WorldModel`.
    """

    init: Callable[..., Any]
    init_state: Callable[..., Any]
    observe: Callable[..., tuple[Any, Starts, OneHot, OneHot]]
    step: Callable[..., Any]
    starts: Callable[..., Starts]
    imagine_init: Callable[..., Any]
    imagine_step: Callable[..., Any]
    features: Callable[..., Array]
    feature_size: int
    param_groups: Callable[[], dict[str, dict[str, float]]]
    emit: Callable[[Any], Any] = whole
    storable: bool = True


class Decoder(nn.Module):
    """MLP on the features, then one linear output per observation key."""

    layers: int
    units: int
    sizes: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, features: Array) -> dict[str, Array]:
        x = MLP(self.layers, self.units, name="mlp")(features)
        return {key: Linear(size, name=key)(x) for key, size in self.sizes}


def make(config: LatentConfig, spec: EnvSpec, backbone: Backbone) -> WorldModel:
    """World model of ``backbone`` for the observations of ``spec`` (DreamerV3 section "World model")."""
    for field in ("stoch", "classes", "units"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    for field in ("encoder_layers", "decoder_layers", "head_layers"):
        check_between(f"model.{field}", getattr(config, field), 1, MAX_LAYERS)
    check_between("model.unimix", config.unimix, 0, 1)
    check_between("model.discount", config.discount, 0, 1)
    check_bins("model", config.bins, config.bin_limit)
    dtype = jnp.dtype(config.dtype)
    obs_size = sum(s.size * (s.classes or 1) for s in spec.obs.values())
    sizes = tuple((k, s.size * (s.classes or 1)) for k, s in sorted(spec.obs.items()))
    modules = {
        "encoder": MLP(config.encoder_layers, config.units),
        "decoder": Decoder(config.decoder_layers, config.units, sizes),
        "reward": MLP(config.head_layers, config.units, config.bins, outscale=0.0),
        "cont": MLP(config.head_layers, config.units, 1),
    }

    def call(name, params, x):
        return apply(modules[name], params[name], x.astype(dtype))

    def encode(params, obs):
        return call("encoder", params, flatten_obs(obs, spec.obs, dtype))

    def reward_dist(params, features):
        return two_hot(call("reward", params, features), config.bin_limit)

    def cont_dist(params, features):
        return Bernoulli(call("cont", params, features)[..., 0].astype(jnp.float32))

    def decode(params, features):
        dists = {}
        for key, out in call("decoder", params, features).items():
            entry, out = spec.obs[key], out.astype(jnp.float32)
            if entry.classes is None:
                dists[key] = SymlogMSE(out)
            else:
                dists[key] = one_hot(out.reshape(*out.shape[:-1], *entry.shape, entry.classes))
        return dists

    def reconstruction(dist, target, entry):
        batch = target.shape[: target.ndim - len(entry.shape)]
        if entry.classes is None:
            return dist.loss(target.reshape(*batch, entry.size))
        return dist.loss(target).reshape(*batch, -1).sum(-1)

    def init(key):
        keys = dict(zip([*modules, "backbone"], jax.random.split(key, len(modules) + 1), strict=True))
        features = jnp.zeros((1, backbone.feature_size), dtype)
        params = {
            name: module.init(keys[name], jnp.zeros((1, obs_size), dtype) if name == "encoder" else features)[
                "params"
            ]
            for name, module in modules.items()
        }
        return {**params, "backbone": backbone.init(keys["backbone"])}

    def observe(params, state, traj: Trajectory, keys) -> Observed:
        token = encode(params, traj.obs)
        state, starts, post, prior = backbone.observe(
            params["backbone"], state, token, traj.action, traj.is_first, keys
        )
        features = backbone.features(params["backbone"], starts.states)
        kls, kl = kl_losses(post, prior, config.free_nats)
        target = (1.0 - traj.is_terminal.astype(jnp.float32)) * config.discount
        losses = {
            **kls,
            "reward": reward_dist(params, features).loss(traj.reward),
            "cont": cont_dist(params, features).loss(target),
        }
        for key, dist in decode(params, features).items():
            losses[f"rec_{key}"] = reconstruction(dist, traj.obs[key], spec.obs[key])
        metrics = {
            "kl": kl.mean(),
            "entropy_post": post.entropy().sum(-1).mean(),
            "entropy_prior": prior.entropy().sum(-1).mean(),
        }
        return Observed(state, starts, features, losses, metrics)

    def observe_step(params, state, prev_action, obs, is_first, key):
        return backbone.step(params["backbone"], state, encode(params, obs), prev_action, is_first, key)

    def predict(params, state) -> Prediction:
        features = backbone.features(params["backbone"], state)
        return Prediction(reward_dist(params, features).mean(), cont_dist(params, features).mean(), {})

    def groups():
        return {rf"backbone/{pattern}": group for pattern, group in backbone.param_groups().items()}

    def of_backbone(function):
        return lambda params, *args: function(params["backbone"], *args)

    return WorldModel(
        init=init,
        init_state=of_backbone(backbone.init_state),
        observe=observe,
        observe_step=observe_step,
        starts=of_backbone(backbone.starts),
        imagine_init=of_backbone(backbone.imagine_init),
        imagine_step=of_backbone(backbone.imagine_step),
        predict=predict,
        features=of_backbone(backbone.features),
        decode=decode,
        param_groups=groups,
        emit=backbone.emit,
        storable=backbone.storable,
    )
