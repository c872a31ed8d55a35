"""TD-MPC2's world model: an encoder into simplices and a latent dynamics model, trained by predicting its own
future encodings and rewards, without a decoder (arXiv 2310.16828, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl import multitask
from mbrl.distributions import Bernoulli, check_bins, symlog_two_hot
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.images import (
    StridedConvs,
    centred,
    conv_size,
    random_shift,
    split_obs,
    stack_images,
    stacked_shape,
)
from mbrl.losses import episode_discount
from mbrl.multitask import TASK
from mbrl.networks import NormedMLP, apply, flatten_obs, simnorm
from mbrl.recurrence import clear, previous
from mbrl.types import Array, EnvSpec, Observed, Prediction, Starts, Trajectory, WorldModel

sg = jax.lax.stop_gradient


@dataclass(frozen=True)
class TDMPCModelConfig:
    """Sizes of TD-MPC2's world model."""

    latent: int = 512
    """Width of the latent z (L), a multiple of simnorm."""
    simnorm: int = 8
    """Features of each simplex of the latent (V)."""
    encoder_layers: int = 1
    """Hidden layers of the encoder h."""
    encoder_units: int = 256
    """Width of the encoder's hidden layers."""
    image_channels: int = 32
    """Channels of each convolution, for image observations. Images alone whose features are as wide as the
    latent (32 channels, 64 x 64 and 512) go straight into the simplices, as published."""
    image_shift: int = 3
    """Largest random shift of images in pixels, along each axis, whenever one is encoded."""
    units: int = 512
    """Width of the hidden layers of dynamics d, reward R and termination."""
    bins: int = 101
    """Bins of the two-hot reward, odd, uniform in symlog space."""
    bin_limit: float = 10.0
    """Outermost bin, as symlog of the reward."""
    episodic: bool = False
    """Learn when episodes terminate; for tasks whose episodes can."""
    discount: float = 0.0
    """Discount per agent step (gamma); 0 takes 1 - 5 / T within [0.95, 0.995] for episodes of T steps."""
    task_size: int = 96
    """Width of the embedding of each of several tasks, whose norm is at most 1."""
    encoder_lr_scale: float = 0.3
    """Learning rate of the encoder as a multiple of the optimiser's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the networks' activations; parameters, losses and optimiser stay float32."""

    VARIES: ClassVar[tuple[str, ...]] = ("discount", "encoder_lr_scale")


class Latent(NamedTuple):
    """A latent [..., L], and the latent and the action [..., A] that led to it: zeros at an episode's start.
    The reward on arrival is a function of those two. task: number [...], where there are several."""

    z: Array
    source: Array
    action: Array
    task: Any = ()


class Memory(NamedTuple):
    """The acting state [B]. predicted: the latent predicted from the first step that was observed, or from
    the episode's start, by actions alone; training only. empty: nothing was observed yet."""

    now: Latent
    predicted: Array
    empty: Array


def make(config: TDMPCModelConfig, spec: EnvSpec) -> WorldModel:
    """TD-MPC2's world model for the observations and actions of ``spec``."""
    check(config)
    c, dtype = config, jnp.dtype(config.dtype)
    if spec.tasks and c.episodic:
        raise UserError("model.episodic must be False for several tasks, whose episodes must not terminate")
    discount = episode_discount(spec.max_steps, c.discount)
    gammas, masks = multitask.discounts(spec, c.discount), multitask.action_mask(spec)
    images, vectors = split_obs({k: v for k, v in spec.obs.items() if not (spec.tasks and k == TASK)})
    task_size = c.task_size if spec.tasks else 0
    obs_size = sum(s.size * (s.classes or 1) for s in vectors.values())
    obs_size += conv_size(stacked_shape(images), c.image_channels) if images else 0
    action_size = spec.action.size
    modules: dict[str, nn.Module] = {
        "encoder": NormedMLP(c.encoder_layers, c.encoder_units, c.latent, simnorm=c.simnorm),
        "dynamics": NormedMLP(2, c.units, c.latent, simnorm=c.simnorm),
        "reward": NormedMLP(2, c.units, c.bins, zero_out=True),
    }
    if c.episodic:
        modules["termination"] = NormedMLP(2, c.units, 1)
    if images:
        modules["image_encoder"] = StridedConvs(c.image_channels)
    if images and not vectors and obs_size == c.latent:
        del modules["encoder"]

    def call(name, params, *parts):
        return apply(modules[name], params[name], jnp.concatenate([x.astype(dtype) for x in parts], -1))

    def about(params, task):
        """The embeddings of tasks [...], a part of every network's input; none where there is one task."""
        if not spec.tasks:
            return []
        embedding = params["task"][task]
        return [embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1.0)]

    def task_of(obs):
        return obs[TASK] if spec.tasks else ()

    def join(params, z, task):
        """What actor and critics read: the latent, and of several tasks the embedding and the action mask."""
        if not spec.tasks:
            return z
        return jnp.concatenate(
            [z, *(x.astype(z.dtype) for x in (*about(params, task), jnp.asarray(masks)[task]))], -1
        )

    def moved(obs, key):
        """The observations [B] with all images of an entry shifted alike."""
        return obs | {k: random_shift(key, obs[k], c.image_shift) for k in images}

    def encode(params, obs):
        parts = []
        if images:
            stacked = centred(stack_images(obs, images))
            batch = stacked.shape[:-3]
            flat = call("image_encoder", params, stacked.reshape(-1, *stacked.shape[-3:]))
            parts.append(flat.reshape(*batch, -1))
        if vectors:
            parts.append(flatten_obs(obs, vectors, dtype, squash=lambda x: x))
        parts += about(params, task_of(obs))
        return call("encoder", params, *parts) if "encoder" in modules else simnorm(parts[0], c.simnorm)

    def dynamics(params, z, task, action):
        return call("dynamics", params, z, *about(params, task), action)

    def reward_dist(params, source, task, action):
        return symlog_two_hot(call("reward", params, source, *about(params, task), action), c.bin_limit)

    def termination_dist(params, z):
        return Bernoulli(call("termination", params, z)[..., 0].astype(jnp.float32))

    def init(key):
        shapes = {"encoder": (obs_size + task_size,), "termination": (c.latent,)}
        shapes |= {"image_encoder": stacked_shape(images)} if images else {}
        keys = jax.random.split(key, len(modules))
        usual = (c.latent + task_size + action_size,)
        params = {
            name: module.init(k, jnp.zeros((1, *shapes.get(name, usual)), dtype))["params"]
            for (name, module), k in zip(modules.items(), keys, strict=True)
        }
        if spec.tasks:
            key, shape = jax.random.fold_in(key, len(modules)), (len(spec.tasks), task_size)
            params["task"] = jax.random.uniform(key, shape, minval=-0.02, maxval=0.02)
        return params

    def init_state(params, batch):
        latent = lambda: jnp.zeros((batch, c.latent), dtype)
        task = jnp.zeros(batch, jnp.int32) if spec.tasks else ()
        now = Latent(latent(), latent(), jnp.zeros((batch, action_size)), task)
        return Memory(now, latent(), jnp.ones(batch, bool))

    def arrive(begins, z, source, action, task):
        """What led to the latents z; nothing where an episode begins."""
        return Latent(z, clear(begins, source), clear(begins, action), task)

    def observe(params, state, traj: Trajectory, keys) -> Observed:
        z = encode(params, jax.vmap(moved)(traj.obs, keys))
        begins = traj.is_first | previous(jnp.zeros_like(traj.is_first), state.empty)
        task = task_of(traj.obs)
        posterior = arrive(begins, z, previous(z, state.now.z), traj.action, task)

        def step(predicted, inputs):
            begin, z, action, task = inputs
            # Masked before and after: what is not finite would else leave a trace in the gradient.
            source = clear(begin, predicted)
            predicted = jnp.where(begin[:, None], z, dynamics(params, source, task, action))
            return predicted, (source, predicted)

        inputs = begins, z, posterior.action, task
        last, (source, predicted) = jax.lax.scan(step, state.predicted, inputs)
        live = 1.0 - begins.astype(jnp.float32)
        losses = {
            "consistency": jnp.square((predicted - sg(z)).astype(jnp.float32)).mean(-1),
            "reward": reward_dist(params, source, task, posterior.action).loss(traj.reward),
        }
        if c.episodic:
            losses["termination"] = termination_dist(params, predicted).loss(
                traj.is_terminal.astype(jnp.float32)
            )
        after = Memory(jax.tree.map(lambda x: x[-1], posterior), last, jnp.zeros_like(state.empty))
        losses = {name: live * loss for name, loss in losses.items()}
        features = join(params, z, task), join(params, predicted, task)
        return Observed(after, Starts((), posterior), features[0], losses, {}, features[1])

    def observe_step(params, state, prev_action, obs, is_first, key):
        z = encode(params, moved(obs, key))
        now = arrive(is_first | state.empty, z, state.now.z, prev_action, task_of(obs))
        return Memory(now, z, jnp.zeros_like(state.empty))

    def imagine_step(params, ctx, state, action, key):
        z = dynamics(params, state.z, state.task, action)
        return Latent(z, state.z, action.astype(jnp.float32), state.task)

    def predict(params, state) -> Prediction:
        reward = reward_dist(params, state.source, state.task, state.action).mean()
        cont = jnp.asarray(gammas)[state.task] if spec.tasks else jnp.full_like(reward, discount)
        if c.episodic:
            cont = discount * (1 - termination_dist(params, state.z).mean())
        return Prediction(reward, cont, {})

    return WorldModel(
        init=init,
        init_state=init_state,
        observe=observe,
        observe_step=observe_step,
        starts=lambda params, state: Starts((), state.now),
        imagine_step=imagine_step,
        predict=predict,
        features=lambda params, state: join(params, state.z, state.task),
        decode=lambda params, features: None,
        param_groups=lambda: {"(image_)?encoder/": {"lr_scale": c.encoder_lr_scale}},
        storable=False,
    )


def check(config: TDMPCModelConfig) -> None:
    """UserError for impossible values."""
    for field in ("latent", "simnorm", "encoder_layers", "encoder_units", "units", "image_channels"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    check_at_least("model.encoder_lr_scale", config.encoder_lr_scale, 0)
    check_between("model.discount", config.discount, 0, 1)
    if config.latent % config.simnorm:
        raise UserError(
            f"model.latent is {config.latent}, it must be a multiple of model.simnorm, {config.simnorm}"
        )
    check_bins("model", config.bins, config.bin_limit)
