"""Koopman world model: linear latent dynamics with a diagonal complex spectrum inside the unit disc.

After Mondal et al., "Efficient Dynamics Modeling in Interactive Environments with Koopman Theory" (ICLR 2024,
arXiv 2306.11941): s_t = K s_{t-1} + L u_t with diagonal complex K. What is nonlinear, the lift of frame and
action and the readout, stands outside of the dynamics. So memory and rotation of every mode are explicit, no
horizon makes them explode, and they run over a sequence in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mbrl import frame_posterior, latent_model
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.frame_posterior import FrameConfig, FrameLatent, sample
from mbrl.latent_model import Backbone, flat
from mbrl.networks import Linear, RMSNorm, apply
from mbrl.recurrence import ScanImpl, clear, from_planes, linear_recurrence, previous, to_planes
from mbrl.types import Array, EnvSpec, Starts, WorldModel


@dataclass(frozen=True)
class KoopmanConfig(FrameConfig):
    """Sizes and initial spectrum of the linear dynamics."""

    modes: int = 512
    """Complex entries of the linear state (P); each stands for a conjugate pair."""
    memory_min: float = 1.0
    """Shortest initial memory of a mode, in steps until its modulus has fallen by 1/e."""
    memory_max: float = 1000.0
    """Longest initial memory of a mode, in steps; modes are spread between evenly on a log scale."""
    phase_max: float = np.pi / 10
    """Largest initial rotation of a mode, in radians per step."""
    scan_impl: ScanImpl = "auto"
    """Recurrence over time: auto is sequential on a CPU, associative elsewhere."""
    spectrum_lr_scale: float = 1.0
    """Learning rate of the spectrum as a multiple of the optimiser's; it never decays."""


class Koopman(nn.Module):
    """s_t = lambda s_{t-1} + gamma B u_t with u_t an embedding of (z_{t-1}, a_t), and h_t = norm(C s_t).

    lambda = exp(-exp(rate_log) + i phase) has a modulus of at most 1 whatever is learned, and gamma =
    sqrt(1 - |lambda|^2) keeps the variance of s that of its inputs, both as in linear recurrent units (arXiv
    2303.06349). s is complex64 whatever the dtype of u.
    """

    config: KoopmanConfig

    def setup(self):
        c = self.config

        def init_rate(key):
            low, high = -np.log(c.memory_max), -np.log(c.memory_min)
            return jax.random.uniform(key, (c.modes,), minval=low, maxval=high)

        self.latent = FrameLatent(c)
        self.rate_log = self.param("rate_log", init_rate)
        self.phase = self.param("phase", lambda key: jax.random.uniform(key, (c.modes,), maxval=c.phase_max))
        self.lift, self.read, self.norm = Linear(2 * c.modes), Linear(c.width), RMSNorm()

    def spectrum(self) -> tuple[Array, Array]:
        """lambda [P] complex64 and gamma [P]."""
        rate = jnp.exp(self.rate_log)
        return jnp.exp(jax.lax.complex(-rate, self.phase)), jnp.sqrt(-jnp.expm1(-2 * rate))

    def drive(self, stoch: Array, action: Array) -> Array:
        """gamma B u [..., P] complex64, of the previous latent and the action that followed it."""
        lifted = self.lift(self.latent.inputs(stoch, action)).astype(jnp.float32)
        real, imag = jnp.split(lifted, 2, -1)
        return self.spectrum()[1] * jax.lax.complex(real, imag)

    def sequence(self, modes: Array, stoch: Array, action: Array, is_first: Array) -> tuple[Array, Array]:
        """h [T, B, D] and modes [T, B, 2, P] of inputs [T, B, ...] after the state [B, 2, P]."""
        decay = self.spectrum()[0]
        zero = jnp.zeros_like(decay)
        drive, initial = self.drive(stoch, action), from_planes(modes)
        return self.readout(linear_recurrence(decay, drive, is_first, initial, zero, self.config.scan_impl))

    def step(self, modes: Array, stoch: Array, action: Array) -> tuple[Array, Array]:
        """`sequence` for one step with any leading axes."""
        return self.readout(self.spectrum()[0] * from_planes(modes) + self.drive(stoch, action))

    def readout(self, state: Array) -> tuple[Array, Array]:
        """h [..., D] in the dtype of activations, and the state as planes [..., 2, P]."""
        planes = to_planes(state)
        x = planes.reshape(*state.shape[:-1], -1).astype(self.config.dtype)
        return self.norm(self.read(x)), planes

    def prior(self, h: Array):
        return self.latent.prior(h)

    def posterior(self, token: Array):
        return self.latent.posterior(token)

    def everything(self, modes, stoch, action, token):
        """Touches every parameter once, for initialisation."""
        return self.prior(self.step(modes, stoch, action)[0]), self.posterior(token)


def make(config: KoopmanConfig, spec: EnvSpec) -> WorldModel:
    """Koopman world model for the observations and actions of ``spec``."""
    return latent_model.make(config, spec, backbone(config, spec.action.size))


def check(config: KoopmanConfig) -> None:
    """UserError for impossible values."""
    frame_posterior.check(config)
    check_at_least("model.modes", config.modes, 1)
    check_between("model.phase_max", config.phase_max, 0, np.pi)
    check_at_least("model.spectrum_lr_scale", config.spectrum_lr_scale, 0)
    if not 0 < config.memory_min <= config.memory_max:
        raise UserError(
            f"model.memory_min is {config.memory_min}, it must be positive and at most model.memory_max, "
            f"which is {config.memory_max}"
        )


def backbone(config: KoopmanConfig, action_size: int) -> Backbone:
    """The memory alone, on encoded observations. State: deter [..., D], stoch [..., S, C], and modes
    [..., 2, P] float32, the linear state as real and imaginary parts."""
    check(config)
    module, dtype = Koopman(config), jnp.dtype(config.dtype)

    def call(params, method, *args):
        return apply(module, params, *args, method=method)

    def init_state(params, batch):
        return {
            "deter": jnp.zeros((batch, config.width), dtype),
            "stoch": jnp.zeros((batch, config.stoch, config.classes), dtype),
            "modes": jnp.zeros((batch, 2, config.modes), jnp.float32),
        }

    def init(key, token_size):
        state = init_state(None, 1)
        action, token = jnp.zeros((1, action_size)), jnp.zeros((1, token_size), dtype)
        return module.init(key, state["modes"], state["stoch"], action, token, method="everything")["params"]

    def step(params, state, token, action, is_first, key):
        before = (clear(is_first, x) for x in (state["modes"], state["stoch"], action))
        h, modes = call(params, "step", *before)
        stoch = call(params, "posterior", token).sample(key).astype(dtype)
        return {"deter": h, "stoch": stoch, "modes": modes}

    def observe(params, state, token, action, is_first, keys):
        post = call(params, "posterior", token)
        stoch = sample(post, keys, dtype)
        before = clear(is_first, previous(stoch, state["stoch"]))
        h, modes = call(params, "sequence", state["modes"], before, clear(is_first, action), is_first)
        states = {"deter": h, "stoch": stoch, "modes": modes}
        return jax.tree.map(lambda x: x[-1], states), Starts((), states), post, call(params, "prior", h)

    def imagine_step(params, ctx, state, action, key):
        h, modes = call(params, "step", state["modes"], state["stoch"], action)
        return {"deter": h, "stoch": call(params, "prior", h).sample(key).astype(dtype), "modes": modes}

    return Backbone(
        init=init,
        init_state=init_state,
        observe=observe,
        step=step,
        imagine_step=imagine_step,
        features=lambda params, state: jnp.concatenate([state["deter"], flat(state["stoch"])], -1),
        feature_size=config.width + config.stoch * config.classes,
        param_groups=lambda: {
            r"(rate_log|phase)$": {"lr_scale": config.spectrum_lr_scale, "weight_decay": 0.0}
        },
    )
