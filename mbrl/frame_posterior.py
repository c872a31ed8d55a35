"""What backbones with a posterior from the frame alone share: q(z|x) does not wait for the memory, so all
latents of a sequence are known at once and the memory can run over time in parallel (S4WM, arXiv 2307.02064;
TransDreamer, arXiv 2202.09481)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl.distributions import OneHot, one_hot
from mbrl.errors import check_at_least, check_between
from mbrl.latent_model import LatentConfig, flat
from mbrl.networks import MAX_LAYERS, MLP, Dense, Linear
from mbrl.types import Array


@dataclass(frozen=True)
class FrameConfig(LatentConfig):
    """Fields of every backbone with a posterior from the frame alone."""

    width: int = 512
    """Width of the residual stream (d_model)."""
    hidden: int = 512
    """Width of the hidden layers of prior and posterior."""
    prior_layers: int = 2
    """Hidden layers of the prior p(z|h)."""
    post_layers: int = 1
    """Hidden layers of the posterior q(z|x)."""


def check(config: FrameConfig) -> None:
    """UserError for impossible sizes."""
    for field in ("width", "hidden"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    for field in ("prior_layers", "post_layers"):
        check_between(f"model.{field}", getattr(config, field), 0, MAX_LAYERS)


class FrameLatent(nn.Module):
    """Input of the memory, prior and posterior. z is [..., S, C], one-hot."""

    config: FrameConfig

    def setup(self):
        c = self.config
        self.in_hidden = Dense(c.width)
        self.in_out = Linear(c.width)
        self.prior_net = MLP(c.prior_layers, c.hidden, c.stoch * c.classes)
        self.post_net = MLP(c.post_layers, c.hidden, c.stoch * c.classes)

    def inputs(self, stoch: Array, action: Array) -> Array:
        """[..., width] from the previous latent and the action that followed it, scaled into [-1, 1]."""
        action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
        x = jnp.concatenate([flat(stoch), action.astype(stoch.dtype)], -1)
        return self.in_out(self.in_hidden(x))

    def prior(self, deter: Array) -> OneHot:
        return self._latent(self.prior_net(deter))

    def posterior(self, token: Array) -> OneHot:
        return self._latent(self.post_net(token))

    def _latent(self, logits: Array) -> OneHot:
        c = self.config
        return one_hot(logits.reshape(*logits.shape[:-1], c.stoch, c.classes), c.unimix)


def sample(post: OneHot, keys: Array, dtype) -> Array:
    """One sample per time step [T, ...] with that step's key, as step mode would draw it."""
    return jax.vmap(OneHot.sample)(post, keys).astype(dtype)
