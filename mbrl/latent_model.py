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

from mbrl.distributions import Bernoulli, ImageMSE, OneHot, SymlogMSE, check_bins, one_hot, two_hot
from mbrl.errors import check_at_least, check_between
from mbrl.images import (
    FlatDecoder,
    FlatEncoder,
    ImageDecoder,
    ImageEncoder,
    Reading,
    centred,
    check_decoder,
    split_obs,
    stack_images,
    stacked_shape,
    unstack_images,
)
from mbrl.losses import kl_losses
from mbrl.networks import MAX_LAYERS, MLP, Linear, apply, flatten_obs
from mbrl.types import (
    Array,
    EnvSpec,
    Observed,
    Prediction,
    Starts,
    Trajectory,
    WorldModel,
    starts_at,
    states_of,
    whole,
)


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
    image_depth: int = 64
    """Channels of an image's first stage are twice this, of its last four times (depth); an MLP that reads
    images is 16 times as wide."""
    image_reading: Reading = "conv"
    """How images are read and drawn. conv: stages of a 5 x 5 convolution and a 2 x 2 maximum (published).
    mlp: as vectors of all their pixels, which costs a CPU far less and suits small pictures alone."""
    image_blocks: int = 8
    """Blocks of h that each draw their own channels of a decoded image (bspace); must divide h's width."""
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

    VARIES: ClassVar[tuple[str, ...]] = ("free_nats", "discount")


class Backbone(NamedTuple):
    """The memory of a latent world model. ``token`` [..., E] is an encoded observation, ``z`` a sample.

    init(key, token_size) -> params
    init_state(params, batch) -> state [batch]
    observe(params, state [B], token [T, B], action [T, B, A], is_first [T, B], keys [T])
        -> (state [B], Starts with states [T, B], posterior OneHot [T, B, S, C], prior OneHot [T, B, S, C])
    step(params, state [B], token, action, is_first, key) -> state [B]
    starts(params, state [B]) -> Starts
    imagine_init(params, starts, horizon) -> state
    imagine_step(params, ctx, state [...], action, key) -> state [...]
    features(params, state [...]) -> [..., F], of which the last S C are z
    feature_size: F. unpredictive: how many of the first features only actor and critic read, not the heads.
    param_groups(), emit and storable as in `WorldModel`; starts and imagine_init have the same defaults.
    """

    init: Callable[..., Any]
    init_state: Callable[..., Any]
    observe: Callable[..., tuple[Any, Starts, OneHot, OneHot]]
    step: Callable[..., Any]
    imagine_step: Callable[..., Any]
    features: Callable[..., Array]
    feature_size: int
    param_groups: Callable[[], dict[str, dict[str, float]]]
    starts: Callable[..., Starts] = starts_at
    imagine_init: Callable[..., Any] = states_of
    unpredictive: int = 0
    emit: Callable[[Any], Any] = whole
    storable: bool = True


def flat(stoch: Array) -> Array:
    """The factors of z [..., S, C] as one vector [..., S C]."""
    return stoch.reshape(*stoch.shape[:-2], -1)


class Decoder(nn.Module):
    """MLP on the features, then one linear output per vector observation."""

    layers: int
    units: int
    sizes: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, features: Array) -> dict[str, Array]:
        x = MLP(self.layers, self.units, name="mlp")(features)
        return {key: Linear(size, name=key)(x) for key, size in self.sizes}


def make_modules(config: LatentConfig, spec: EnvSpec, feature_size: int) -> dict[str, tuple[nn.Module, list]]:
    """Encoders, decoders and heads by name, each with the shapes of its inputs. Images have modules of their
    own, which read and draw all of them at once."""
    c, (images, vectors) = config, split_obs(spec.obs)
    sizes = {key: entry.size * (entry.classes or 1) for key, entry in vectors.items()}
    stoch, modules = c.stoch * c.classes, {}
    if vectors:
        modules["encoder"] = MLP(c.encoder_layers, c.units), [(sum(sizes.values()),)]
        modules["decoder"] = Decoder(c.decoder_layers, c.units, tuple(sizes.items())), [(feature_size,)]
    modules["reward"] = MLP(c.head_layers, c.units, c.bins, outscale=0.0), [(feature_size,)]
    modules["cont"] = MLP(c.head_layers, c.units, 1), [(feature_size,)]
    if images:
        shape = stacked_shape(images)
        if c.image_reading == "conv":
            check_decoder(shape, c.image_depth, c.image_blocks, feature_size - stoch)
            read = ImageEncoder(c.image_depth)
            draw = ImageDecoder(shape, c.image_depth, c.units, c.image_blocks)
        else:
            width = 16 * c.image_depth
            read = FlatEncoder(c.encoder_layers, width)
            draw = FlatDecoder(shape, c.decoder_layers, width)
        modules["image_encoder"] = read, [shape]
        modules["image_decoder"] = draw, [(feature_size - stoch,), (stoch,)]
    return modules


def make(config: LatentConfig, spec: EnvSpec, backbone: Backbone) -> WorldModel:
    """World model of ``backbone`` for the observations of ``spec`` (DreamerV3 section "World model")."""
    for field in ("stoch", "classes", "units", "image_depth", "image_blocks"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    for field in ("encoder_layers", "decoder_layers", "head_layers"):
        check_between(f"model.{field}", getattr(config, field), 1, MAX_LAYERS)
    check_between("model.unimix", config.unimix, 0, 1)
    check_between("model.discount", config.discount, 0, 1)
    check_bins("model", config.bins, config.bin_limit)
    dtype = jnp.dtype(config.dtype)
    images, vectors = split_obs(spec.obs)
    modules = make_modules(config, spec, backbone.feature_size - backbone.unpredictive)

    def call(name, params, *inputs):
        return apply(modules[name][0], params[name], *(x.astype(dtype) for x in inputs))

    def predictive(features):
        return features[..., backbone.unpredictive :]

    def encode(params, obs):
        parts = []
        if vectors:
            parts.append(call("encoder", params, flatten_obs(obs, vectors, dtype)))
        if images:
            parts.append(call("image_encoder", params, centred(stack_images(obs, images))))
        return jnp.concatenate(parts, -1)

    def reward_dist(params, features):
        return two_hot(call("reward", params, predictive(features)), config.bin_limit)

    def cont_dist(params, features):
        return Bernoulli(call("cont", params, predictive(features))[..., 0].astype(jnp.float32))

    def decode(params, features):
        dists: dict[str, Any] = {}
        features = predictive(features)
        for key, out in call("decoder", params, features).items() if vectors else ():
            entry, out = spec.obs[key], out.astype(jnp.float32)
            if entry.classes is None:
                dists[key] = SymlogMSE(out)
            else:
                dists[key] = one_hot(out.reshape(*out.shape[:-1], *entry.shape, entry.classes))
        if images:
            deter, stoch = jnp.split(features, [features.shape[-1] - config.stoch * config.classes], -1)
            drawn = unstack_images(call("image_decoder", params, deter, stoch), images)
            dists |= {key: ImageMSE(image) for key, image in drawn.items()}
        return dists

    def reconstruction(dist, target, entry):
        batch = target.shape[: target.ndim - len(entry.shape)]
        if isinstance(dist, SymlogMSE):
            return dist.loss(target.reshape(*batch, entry.size))
        return dist.loss(target).reshape(*batch, -1).sum(-1)

    def init(key):
        keys = jax.random.split(key, len(modules) + 1)
        params = {
            name: module.init(k, *(jnp.zeros((1, *shape), dtype) for shape in shapes))["params"]
            for (name, (module, shapes)), k in zip(modules.items(), keys[:-1], strict=True)
        }
        obs = {k: jnp.zeros((1, *entry.shape), entry.dtype) for k, entry in spec.obs.items()}
        token = jax.eval_shape(encode, params, obs)
        return {**params, "backbone": backbone.init(keys[-1], token.shape[-1])}

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
