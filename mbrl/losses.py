"""Losses, returns and normalisers as pure functions (DreamerV3; equations of arXiv 2301.04104).

Sequences are time-major: [T, ...] with any batch axes behind. Nothing here knows a network.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mbrl.distributions import OneHot, TwoHot

sg = jax.lax.stop_gradient


def kl_losses(
    posterior: OneHot, prior: OneHot, free_nats: float = 1.0
) -> tuple[dict[str, Array], Float[Array, "*batch"]]:
    """Balanced KL of factorised categoricals [..., S, C] (eq. 5): the prior learns from ``dyn``, the
    posterior from ``rep``. Each is clipped from below at ``free_nats`` nats AFTER summing the S factors.

    Returns ({"dyn", "rep"}, the unclipped KL), each [...], in nats.
    """
    dyn = OneHot(sg(posterior.log_probs)).kl(prior).sum(-1)
    rep = posterior.kl(OneHot(sg(prior.log_probs))).sum(-1)
    return {"dyn": jnp.maximum(dyn, free_nats), "rep": jnp.maximum(rep, free_nats)}, sg(dyn)


def weighted(means: dict[str, Array], scales: dict[str, float]) -> Array:
    """Sum of named losses, each times the scale of its kind: ``rec`` is that of ``rec_height``."""
    return sum((scales[name.split("_")[0]] * mean for name, mean in means.items()), jnp.zeros(()))


def lambda_return(
    reward: Float[Array, "T *batch"],
    cont: Float[Array, "T *batch"],
    bootstrap: Float[Array, "T *batch"],
    lam: float | Float[Array, "T *batch"] = 0.95,
) -> Float[Array, "T-1 *batch"]:
    """TD(lambda) return (eq. 7) of the states 0..T-2; entry t of each input belongs to state t.

    reward: received on ARRIVAL at the state. cont: discount times continue probability of the state, so a
    terminal state has 0. bootstrap: value estimate of the state. lam: mixing weight in [0, 1], or one per
    state (0 cuts the trace there: a truncated step bootstraps fully).

        R_t = r_{t+1} + cont_{t+1} ((1 - lam_{t+1}) v_{t+1} + lam_{t+1} R_{t+1}),   R_{T-1} = v_{T-1}
    """
    lam = jnp.broadcast_to(lam, reward.shape)

    def step(future, inputs):
        r, c, v, mix = inputs
        future = r + c * ((1 - mix) * v + mix * future)
        return future, future

    inputs = jax.tree.map(lambda x: x[1:], (reward, cont, bootstrap, lam))
    return jax.lax.scan(step, bootstrap[-1], inputs, reverse=True)[1]


class ReturnNorm(NamedTuple):
    """Exponential averages of the 5th and 95th percentile of returns (no debias: both start at 0)."""

    low: Float[Array, ""]
    high: Float[Array, ""]

    @property
    def scale(self) -> Array:
        """Divisor of advantages, at least 1 so that small returns are not blown up (eq. 12)."""
        return jnp.maximum(1.0, self.high - self.low)


def update_return_norm(norm: ReturnNorm, returns: Array, rate: float = 0.01) -> ReturnNorm:
    """Moves both percentiles towards those of ``returns`` (any shape) by ``rate``."""
    low, high = jnp.percentile(sg(returns), jnp.array([5.0, 95.0]))
    return ReturnNorm(norm.low + rate * (low - norm.low), norm.high + rate * (high - norm.high))


def trajectory_weight(cont: Float[Array, "T *batch"]) -> Float[Array, "T *batch"]:
    """Discounted probability of being alive at each imagined state, the first one's own included."""
    return sg(jnp.cumprod(cont, 0))


def reinforce_loss(log_prob: Array, advantage: Array, entropy: Array, weight: Array, scale: float) -> Array:
    """Policy gradient with baseline and entropy bonus (eq. 11), elementwise; all inputs have one shape."""
    return sg(weight) * -(log_prob * sg(advantage) + scale * entropy)


def pathwise_loss(normed_return: Array, entropy: Array, weight: Array, scale: float) -> Array:
    """Gradient of the return through the dynamics (Dreamer, arXiv 1912.01603 eq. 7), elementwise."""
    return sg(weight) * -(normed_return + scale * entropy)


def critic_loss(
    value: TwoHot, returns: Array, slow_value: Array, weight: Array, slow_scale: float = 1.0
) -> Array:
    """Two-hot cross-entropy with the return, and with the slow critic's own prediction (eq. 10)."""
    return sg(weight) * (value.loss(returns) + slow_scale * value.loss(slow_value))


def replay_returns(
    reward: Float[Array, "T *batch"],
    is_last: Bool[Array, "T *batch"],
    is_terminal: Bool[Array, "T *batch"],
    bootstrap: Float[Array, "T *batch"],
    discount: float,
    lam: float,
) -> Float[Array, "T-1 *batch"]:
    """lambda-returns of REPLAYED states: real rewards, cut at ``is_last``, value 0 beyond a terminal."""
    cont = discount * (1.0 - is_terminal.astype(jnp.float32))
    return lambda_return(reward, cont, bootstrap, lam * (1.0 - is_last.astype(jnp.float32)))
