"""World models on linear state-space layers: S4WM (arXiv 2307.02064) and R2I (arXiv 2403.04253), on S5.

The layer is S5 (arXiv 2208.04933): one diagonal complex state per layer, so that a start of imagination is
kilobytes where S4's would be megabytes. Resets inside a sequence are exact. S4WM: pre-norm, an MLP in every
block. R2I: post-norm, an output projection, and features that also hold the layers' states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mbrl import frame_posterior, latent_model
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.frame_posterior import FrameConfig, FrameLatent, sample
from mbrl.latent_model import Backbone, flat
from mbrl.networks import MAX_LAYERS, Linear, RMSNorm, apply
from mbrl.recurrence import ScanImpl, clear, from_planes, linear_recurrence, previous, to_planes
from mbrl.types import Array, EnvSpec, Starts, WorldModel

Rule = Literal["zoh", "bilinear", "unit"]


@dataclass(frozen=True)
class S4WMConfig(FrameConfig):
    """Sizes of the state-space world model."""

    layers: int = 4
    """Layers of the stack."""
    ssm_size: int = 128
    """Complex entries of each layer's state (P), one of each conjugate pair; a multiple of ssm_blocks."""
    ssm_blocks: int = 8
    """Independent HiPPO blocks that the state starts as; one large block would oscillate too fast."""
    discretise: Rule = "zoh"
    """How the continuous dynamics become steps: zero-order hold, the bilinear (Tustin) rule, or unit: the
    decay of zoh, with the gain that gives every state the variance of its input, however slow it is."""
    dt_min: float = 1e-3
    """Smallest initial step size; a state forgets over about 2 / dt steps."""
    dt_max: float = 1e-1
    """Largest initial step size."""
    prenorm: bool = True
    """Norm before each layer and after the last (S4WM), else after each residual sum (R2I)."""
    mlp: bool = True
    """A two-layer MLP after each state-space layer (S4WM)."""
    deter: int = 0
    """Width of an output projection to h, with SiLU (R2I); 0: h is the stack's output."""
    hidden_features: bool = False
    """Whether actor and critic also read the states of all layers (R2I), as real and imaginary parts, shrunk
    to a vector shorter than 1."""
    learned_reset: bool = False
    """Learn the state that an episode begins with, else zeros."""
    scan_impl: ScanImpl = "auto"
    """Recurrence over time: auto is sequential on a CPU, associative elsewhere."""
    ssm_lr_scale: float = 1.0
    """Learning rate of the transition parameters as a multiple of the optimiser's; they never decay."""


@dataclass(frozen=True)
class R2IConfig(S4WMConfig):
    """Recall to Imagine: the same model with the published settings."""

    discretise: Rule = "bilinear"
    prenorm: bool = False
    mlp: bool = False
    deter: int = 2048
    hidden_features: bool = True
    learned_reset: bool = True


@cache
def hippo_blocks(size: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [P] and eigenvectors [blocks, n, P / blocks] of the normal part of HiPPO-LegS.

    Each of the ``blocks`` is a matrix of n = 2 P / blocks rows, of whose conjugate pairs the eigenvalue with
    positive imaginary part is kept (S5 appendix B.1). In float64, once, outside of any compiled program.
    """
    n = 2 * size // blocks
    root = np.sqrt(2 * np.arange(n, dtype=np.float64) + 1)
    half = 0.5 * np.outer(root, root)
    skew = np.triu(half, 1) - np.tril(half, -1)  # the normal part is skew - 1/2
    frequency, vectors = np.linalg.eigh(-1j * skew)
    frequency, vectors = frequency[n // 2 :], vectors[:, n // 2 :]
    return np.tile(-0.5 + 1j * frequency, blocks), np.tile(vectors[None], (blocks, 1, 1))


def discretise(rate: Array, dt: Array, rule: str) -> tuple[Array, Array]:
    """Decay A_bar [P] and input gain g [P], B_bar = g B, of ds/dt = rate s + B u over a step ``dt``.

    expm1 keeps the gain accurate where rate * dt is small. There the gains of zoh and bilinear are about dt:
    a state that remembers for 1000 steps hardly takes in what it shall remember. unit makes the gain
    sqrt(1 - |A_bar|^2) instead (LRU, arXiv 2303.06349 section 3.4).
    """
    if rule == "unit":
        return jnp.exp(rate * dt), jnp.sqrt(-jnp.expm1(2 * rate.real * dt)).astype(rate.dtype)
    if rule == "zoh":
        return jnp.exp(rate * dt), jnp.expm1(rate * dt) / rate
    return (1 + dt * rate / 2) / (1 - dt * rate / 2), dt / (1 - dt * rate / 2)


class S5(nn.Module):
    """s_t = A_bar s_{t-1} + B_bar u_t, y_t = 2 Re(C s_t) + D u_t, all in float32 whatever the dtype of u."""

    config: S4WMConfig

    def setup(self):
        c, size, width = self.config, self.config.ssm_size, self.config.width
        rate, vectors = hippo_blocks(size, c.ssm_blocks)
        n = vectors.shape[1]

        def constant(x):
            return lambda key: jnp.asarray(x, jnp.float32)

        def planes(x):
            return jnp.stack([x.real, x.imag]).astype(np.float32)

        def init_b(key):
            real = jax.random.normal(key, (c.ssm_blocks, n, width)) / np.sqrt(width)
            return jnp.einsum("cgnp,gnd->cgpd", planes(vectors.conj()), real).reshape(2, size, width)

        def init_c(key):
            scale = (2 * size) ** -0.5 if c.discretise == "unit" else 1.0  # outputs as large as inputs
            real = scale * jax.random.normal(key, (c.ssm_blocks, width, n))
            return jnp.einsum("gdn,cgnp->cdgp", real, planes(vectors)).reshape(2, width, size)

        def init_dt(key):
            return jax.random.uniform(key, (size,), minval=np.log(c.dt_min), maxval=np.log(c.dt_max))

        # The real part is -exp(rate_log): decaying whatever is learned.
        self.rate_log = self.param("rate_log", constant(np.log(-np.real(rate))))
        self.rate_imag = self.param("rate_imag", constant(np.imag(rate)))
        self.step_log = self.param("step_log", init_dt)
        self.B = self.param("B", init_b)
        self.C = self.param("C", init_c)
        self.D = self.param("D", nn.initializers.normal(1.0), (width,))
        if c.learned_reset:
            self.reset = self.param("reset", nn.initializers.zeros, (2, size))

    def drive(self, u: Array) -> tuple[Array, Array, Array]:
        """A_bar [P], B_bar u [..., P] and the reset state [P], complex64."""
        rate = jax.lax.complex(-jnp.exp(self.rate_log), self.rate_imag)
        decay, gain = discretise(rate, jnp.exp(self.step_log), self.config.discretise)
        u = u.astype(jnp.float32)
        reset = from_planes(self.reset) if self.config.learned_reset else jnp.zeros_like(decay)
        return decay, gain * jax.lax.complex(u @ self.B[0].T, u @ self.B[1].T), reset

    def read(self, state: Array, u: Array) -> Array:
        """y [..., width] in the dtype of u."""
        y = 2 * (state.real @ self.C[0].T - state.imag @ self.C[1].T) + self.D * u.astype(jnp.float32)
        return y.astype(u.dtype)


class Block(nn.Module):
    """One residual layer: `before` makes the recurrence's inputs, `after` continues from its states."""

    config: S4WMConfig

    def setup(self):
        c = self.config
        self.norm, self.ssm, self.gate = RMSNorm(), S5(c), Linear(2 * c.width)
        if c.mlp:
            self.mlp_norm, self.mlp_hidden, self.mlp_out = RMSNorm(), Linear(4 * c.width), Linear(c.width)

    def before(self, x: Array):
        u = self.norm(x) if self.config.prenorm else x
        return u, self.ssm.drive(u)

    def after(self, x: Array, u: Array, state: Array) -> Array:
        value, gate = jnp.split(self.gate(nn.gelu(self.ssm.read(state, u))), 2, -1)
        x = x + value * jax.nn.sigmoid(gate)
        x = x if self.config.prenorm else self.norm(x)
        if not self.config.mlp:
            return x
        if self.config.prenorm:
            return x + self.mlp_out(nn.gelu(self.mlp_hidden(self.mlp_norm(x))))
        return self.mlp_norm(x + self.mlp_out(nn.gelu(self.mlp_hidden(x))))


class S4WM(nn.Module):
    """The stack. Its state, "ssm" [..., L, 2, P] float32, holds real and imaginary parts as two planes."""

    config: S4WMConfig

    def setup(self):
        c = self.config
        self.latent = FrameLatent(c)
        self.blocks = [Block(c) for _ in range(c.layers)]
        self.out_norm = RMSNorm() if c.prenorm else None
        self.out = Linear(c.deter) if c.deter else None

    def sequence(self, ssm: Array, x: Array, is_first: Array) -> tuple[Array, Array]:
        """h [T, B, D] and all states [T, B, L, 2, P] for inputs x [T, B, width] after the state [B, ...]."""
        states = []
        for i, block in enumerate(self.blocks):
            u, (decay, drive, reset) = block.before(x)
            initial = from_planes(ssm[..., i, :, :])
            state = linear_recurrence(decay, drive, is_first, initial, reset, self.config.scan_impl)
            x = block.after(x, u, state)
            states.append(to_planes(state))
        return self.finish(x), jnp.stack(states, -3)

    def step(self, ssm: Array, x: Array, is_first: Array | None = None) -> tuple[Array, Array]:
        """`sequence` for one step with any leading axes: h [..., D] and the next state [..., L, 2, P]."""
        states = []
        for i, block in enumerate(self.blocks):
            u, (decay, drive, reset) = block.before(x)
            state = from_planes(ssm[..., i, :, :])
            if is_first is not None:
                state = jnp.where(is_first[..., None], reset, state)
            state = decay * state + drive
            x = block.after(x, u, state)
            states.append(to_planes(state))
        return self.finish(x), jnp.stack(states, -3)

    def finish(self, x: Array) -> Array:
        x = self.out_norm(x) if self.out_norm else x
        return nn.silu(self.out(x)) if self.out else x

    def inputs(self, stoch: Array, action: Array) -> Array:
        return self.latent.inputs(stoch, action)

    def prior(self, deter: Array):
        return self.latent.prior(deter)

    def posterior(self, token: Array):
        return self.latent.posterior(token)

    def everything(self, ssm, stoch, action, token):
        """Touches every parameter once, for initialisation."""
        deter, ssm = self.step(ssm, self.inputs(stoch, action), jnp.ones(ssm.shape[:-3], bool))
        return self.prior(deter), self.posterior(token)


def make(config: S4WMConfig, spec: EnvSpec) -> WorldModel:
    """State-space world model for the observations and actions of ``spec``."""
    return latent_model.make(config, spec, backbone(config, spec.action.size))


def make_r2i(config: R2IConfig, spec: EnvSpec) -> WorldModel:
    """The same with R2I's settings as defaults."""
    return make(config, spec)


def check(config: S4WMConfig) -> None:
    """UserError for impossible values."""
    frame_posterior.check(config)
    check_between("model.layers", config.layers, 1, MAX_LAYERS)
    for field in ("ssm_size", "ssm_blocks"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    for field in ("deter", "ssm_lr_scale"):
        check_at_least(f"model.{field}", getattr(config, field), 0)
    if config.ssm_size % config.ssm_blocks:
        raise UserError(
            f"model.ssm_size is {config.ssm_size}, it must be a multiple of model.ssm_blocks, "
            f"which is {config.ssm_blocks}"
        )
    # A block starts as the eigenvectors of a dense matrix.
    check_between("model.ssm_size / model.ssm_blocks", config.ssm_size // config.ssm_blocks, 1, 512)
    check_between("model.ssm_blocks", config.ssm_blocks, 1, 1024)
    if not 0 < config.dt_min <= config.dt_max:
        raise UserError(
            f"model.dt_min is {config.dt_min}, it must be positive and at most model.dt_max, "
            f"which is {config.dt_max}"
        )


def backbone(config: S4WMConfig, action_size: int) -> Backbone:
    """The memory alone, on encoded observations. State: deter [..., D], stoch [..., S, C], ssm."""
    check(config)
    module, dtype = S4WM(config), jnp.dtype(config.dtype)
    deter = config.deter or config.width
    hidden = config.layers * 2 * config.ssm_size if config.hidden_features else 0

    def call(params, method, *args):
        return apply(module, params, *args, method=method)

    def init_state(params, batch):
        return {
            "deter": jnp.zeros((batch, deter), dtype),
            "stoch": jnp.zeros((batch, config.stoch, config.classes), dtype),
            "ssm": jnp.zeros((batch, config.layers, 2, config.ssm_size), jnp.float32),
        }

    def init(key, token_size):
        state = init_state(None, 1)
        action, token = jnp.zeros((1, action_size)), jnp.zeros((1, token_size), dtype)
        return module.init(key, state["ssm"], state["stoch"], action, token, method="everything")["params"]

    def step(params, state, token, action, is_first, key):
        x = call(params, "inputs", clear(is_first, state["stoch"]), clear(is_first, action))
        h, ssm = call(params, "step", state["ssm"], x, is_first)
        stoch = call(params, "posterior", token).sample(key).astype(dtype)
        return {"deter": h, "stoch": stoch, "ssm": ssm}

    def observe(params, state, token, action, is_first, keys):
        post = call(params, "posterior", token)
        stoch = sample(post, keys, dtype)
        before = clear(is_first, previous(stoch, state["stoch"]))
        x = call(params, "inputs", before, clear(is_first, action))
        h, ssm = call(params, "sequence", state["ssm"], x, is_first)
        states = {"deter": h, "stoch": stoch, "ssm": ssm}
        return jax.tree.map(lambda x: x[-1], states), Starts((), states), post, call(params, "prior", h)

    def imagine_step(params, ctx, state, action, key):
        h, ssm = call(params, "step", state["ssm"], call(params, "inputs", state["stoch"], action))
        return {"deter": h, "stoch": call(params, "prior", h).sample(key).astype(dtype), "ssm": ssm}

    def features(params, state):
        parts = [state["deter"], flat(state["stoch"])]
        if hidden:
            # Raw states grow over an episode, until little of what an actor reads is z, what is seen now.
            ssm = state["ssm"].reshape(*state["ssm"].shape[:-3], hidden)
            parts.insert(0, (ssm / jnp.sqrt(1 + jnp.square(ssm).sum(-1, keepdims=True))).astype(dtype))
        return jnp.concatenate(parts, -1)

    return Backbone(
        init=init,
        init_state=init_state,
        observe=observe,
        step=step,
        imagine_step=imagine_step,
        features=features,
        feature_size=hidden + deter + config.stoch * config.classes,
        unpredictive=hidden,
        param_groups=lambda: {
            r".*/ssm/(rate_log|rate_imag|step_log|B|reset)$": {
                "lr_scale": config.ssm_lr_scale,
                "weight_decay": 0.0,
            }
        },
    )
