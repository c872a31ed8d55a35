"""Recurrent state-space model: block GRU and categorical latents (DreamerV3, arXiv 2301.04104)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl import latent_model
from mbrl.distributions import OneHot, one_hot
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.latent_model import Backbone, LatentConfig, flat
from mbrl.networks import MAX_LAYERS, MLP, BlockLinear, Dense, RMSNorm, apply
from mbrl.recurrence import clear
from mbrl.types import Array, EnvSpec, Starts, WorldModel


@dataclass(frozen=True)
class RSSMConfig(LatentConfig):
    """Sizes of the recurrent state-space model."""

    deter: int = 8192
    """Width of the deterministic state h (D), a multiple of blocks."""
    hidden: int = 1024
    """Width of the hidden layers of recurrence, prior and posterior."""
    blocks: int = 8
    """Blocks of the block-diagonal GRU (g)."""
    dyn_layers: int = 1
    """Block-linear layers before the GRU gates."""
    prior_layers: int = 2
    """Hidden layers of the prior p(z|h)."""
    post_layers: int = 1
    """Hidden layers of the posterior q(z|h,x)."""
    post_uses_deter: bool = True
    """Whether the posterior sees h (published); False makes it q(z|x), as the parallel backbones have it."""


class RSSM(nn.Module):
    """Parameters and single-step maps; the scans are in `make`. State: deter [..., D], stoch [..., S, C]."""

    config: RSSMConfig

    def setup(self):
        c = self.config
        self.in_deter = Dense(c.hidden)
        self.in_stoch = Dense(c.hidden)
        self.in_action = Dense(c.hidden)
        self.dyn = [BlockLinear(c.deter, c.blocks) for _ in range(c.dyn_layers)]
        self.dyn_norm = [RMSNorm() for _ in range(c.dyn_layers)]
        self.gates = BlockLinear(3 * c.deter, c.blocks)
        self.prior_net = MLP(c.prior_layers, c.hidden, c.stoch * c.classes)
        self.post_net = MLP(c.post_layers, c.hidden, c.stoch * c.classes)

    def embed_action(self, action: Array) -> Array:
        """Embedding of the action, scaled elementwise into [-1, 1] (a policy's sample may exceed it)."""
        action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
        return self.in_action(action.astype(self.config.dtype))

    def core(self, deter: Array, stoch: Array, embedded_action: Array) -> Array:
        """h' = block GRU(h, z, a). Each block sees its own slice of h and all of the three embeddings."""
        x, shared = (
            deter,
            jnp.concatenate([self.in_deter(deter), self.in_stoch(flat(stoch)), embedded_action], -1),
        )
        for linear, norm in zip(self.dyn, self.dyn_norm, strict=True):
            x, shared = nn.silu(norm(linear(x, shared))), None
        reset, cand, update = self.gates.cut(x, shared, 3)
        cand = jnp.tanh(jax.nn.sigmoid(reset) * cand)
        update = jax.nn.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def prior(self, deter: Array) -> OneHot:
        return self._latent(self.prior_net(deter))

    def posterior(self, deter: Array, token: Array) -> OneHot:
        if self.config.post_uses_deter:
            token = jnp.concatenate([deter, token], -1)
        return self._latent(self.post_net(token))

    def _latent(self, logits: Array) -> OneHot:
        c = self.config
        return one_hot(logits.reshape(*logits.shape[:-1], c.stoch, c.classes), c.unimix)

    def everything(self, deter, stoch, action, token):
        """Touches every parameter once, for initialisation."""
        deter = self.core(deter, stoch, self.embed_action(action))
        return self.prior(deter), self.posterior(deter, token)


def make(config: RSSMConfig, spec: EnvSpec) -> WorldModel:
    """RSSM world model for the observations and actions of ``spec``."""
    return latent_model.make(config, spec, backbone(config, spec.action.size))


def backbone(config: RSSMConfig, action_size: int) -> Backbone:
    """The recurrence alone, on encoded observations."""
    for field in ("deter", "hidden", "blocks"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    for field in ("dyn_layers", "prior_layers", "post_layers"):
        check_between(f"model.{field}", getattr(config, field), 0, MAX_LAYERS)
    if config.deter % config.blocks:
        raise UserError(
            f"model.deter is {config.deter}, it must be a multiple of model.blocks, which is {config.blocks}"
        )
    module, dtype = RSSM(config), jnp.dtype(config.dtype)

    def call(params, method, *args):
        return apply(module, params, *args, method=method)

    def init_state(params, batch):
        return {
            "deter": jnp.zeros((batch, config.deter), dtype),
            "stoch": jnp.zeros((batch, config.stoch, config.classes), dtype),
        }

    def init(key, token_size):
        state = init_state(None, 1)
        action, token = jnp.zeros((1, action_size)), jnp.zeros((1, token_size), dtype)
        return module.init(key, state["deter"], state["stoch"], action, token, method="everything")["params"]

    def advance(params, state, embedded, token, is_first, key):
        """One posterior step from an embedded action; ``is_first`` clears the memory."""
        deter, stoch = (clear(is_first, state[name]) for name in ("deter", "stoch"))
        deter = call(params, "core", deter, stoch, embedded)
        post = call(params, "posterior", deter, token)
        return {"deter": deter, "stoch": post.sample(key).astype(dtype)}, post

    def embed(params, action, is_first):
        return call(params, "embed_action", clear(is_first, action))

    def step(params, state, token, action, is_first, key):
        return advance(params, state, embed(params, action, is_first), token, is_first, key)[0]

    def observe(params, state, token, action, is_first, keys):
        embedded = embed(params, action, is_first)

        def body(state, inputs):
            state, post = advance(params, state, *inputs)
            return state, (state, post)

        state, (states, post) = jax.lax.scan(body, state, (embedded, token, is_first, keys))
        return state, Starts((), states), post, call(params, "prior", states["deter"])

    def imagine_step(params, ctx, state, action, key):
        deter = call(params, "core", state["deter"], state["stoch"], call(params, "embed_action", action))
        return {"deter": deter, "stoch": call(params, "prior", deter).sample(key).astype(dtype)}

    return Backbone(
        init=init,
        init_state=init_state,
        observe=observe,
        step=step,
        imagine_step=imagine_step,
        features=lambda params, state: jnp.concatenate([state["deter"], flat(state["stoch"])], -1),
        feature_size=config.deter + config.stoch * config.classes,
        param_groups=dict,
    )
