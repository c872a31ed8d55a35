"""Losses, returns and normalisers as pure functions (DreamerV3; equations of arXiv 2301.04104; TD-MPC2's and
PETS' at the end).

Sequences are time-major: [T, ...] with any batch axes behind. Nothing here knows a network.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mbrl.distributions import OneHot, TwoHot
from mbrl.errors import is_known

sg = jax.lax.stop_gradient


def kl_losses(
    posterior: OneHot, prior: OneHot, free_nats: Any = 1.0
) -> tuple[dict[str, Array], Float[Array, "*batch"]]:
    """Balanced KL of factorised categoricals [..., S, C] (eq. 5): the prior learns from ``dyn``, the
    posterior from ``rep``. Each is clipped from below at ``free_nats`` nats AFTER summing the S factors.

    Returns ({"dyn", "rep"}, the unclipped KL), each [...], in nats.
    """
    dyn = OneHot(sg(posterior.log_probs)).kl(prior).sum(-1)
    rep = posterior.kl(OneHot(sg(prior.log_probs))).sum(-1)
    return {"dyn": jnp.maximum(dyn, free_nats), "rep": jnp.maximum(rep, free_nats)}, sg(dyn)


def weighted(means: dict[str, Array], scales: dict[str, Any]) -> Array:
    """Sum of named losses, each times the scale of its kind: ``rec`` is that of ``rec_height``."""
    return sum((scales[name.split("_")[0]] * mean for name, mean in means.items()), jnp.zeros(()))


def lambda_return(
    reward: Float[Array, "T *batch"],
    cont: Float[Array, "T *batch"],
    bootstrap: Float[Array, "T *batch"],
    lam: float | Float[Array, ""] | Float[Array, "T *batch"] = 0.95,
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


def update_return_norm(norm: ReturnNorm, returns: Array, rate: Any = 0.01) -> ReturnNorm:
    """Moves both percentiles towards those of ``returns`` (any shape) by ``rate``."""
    low, high = jnp.percentile(sg(returns), jnp.array([5.0, 95.0]))
    return ReturnNorm(norm.low + rate * (low - norm.low), norm.high + rate * (high - norm.high))


def trajectory_weight(cont: Float[Array, "T *batch"]) -> Float[Array, "T *batch"]:
    """Discounted probability of being alive at each imagined state, the first one's own included."""
    return sg(jnp.cumprod(cont, 0))


def reinforce_loss(log_prob: Array, advantage: Array, entropy: Array, weight: Array, scale: Any) -> Array:
    """Policy gradient with baseline and entropy bonus (eq. 11), elementwise; all inputs have one shape."""
    return sg(weight) * -(log_prob * sg(advantage) + scale * entropy)


def pathwise_loss(normed_return: Array, entropy: Array, weight: Array, scale: Any) -> Array:
    """Gradient of the return through the dynamics (Dreamer, arXiv 1912.01603 eq. 7), elementwise."""
    return sg(weight) * -(normed_return + scale * entropy)


def critic_loss(
    value: TwoHot, returns: Array, slow_value: Array, weight: Array, slow_scale: Any = 1.0
) -> Array:
    """Two-hot cross-entropy with the return, and with the slow critic's own prediction (eq. 10)."""
    return sg(weight) * (value.loss(returns) + slow_scale * value.loss(slow_value))


def replay_returns(
    reward: Float[Array, "T *batch"],
    is_last: Bool[Array, "T *batch"],
    is_terminal: Bool[Array, "T *batch"],
    bootstrap: Float[Array, "T *batch"],
    discount: Any,
    lam: Any,
) -> Float[Array, "T-1 *batch"]:
    """lambda-returns of REPLAYED states: real rewards, cut at ``is_last``, value 0 beyond a terminal."""
    cont = discount * (1.0 - is_terminal.astype(jnp.float32))
    return lambda_return(reward, cont, bootstrap, lam * (1.0 - is_last.astype(jnp.float32)))


# TD-MPC2 (arXiv 2310.16828) ------------------------------------------------------------------------------


def episode_discount(max_steps: int | None, given: Any = 0.0) -> Any:
    """The discount ``given``, or for 0 one that suits episodes of ``max_steps`` agent steps:
    1 - 5 / max_steps within [0.95, 0.995], so that five horizons fit into an episode (TD-MPC2's heuristic).
    Without a time limit: 0.995."""
    suited = 0.995 if max_steps is None else min(max(1 - 5 / max_steps, 0.95), 0.995)
    if is_known(given):
        return suited if given == 0 else given
    return jnp.where(given == 0, suited, given)


def steps_since_start(is_first: Bool[Array, "T *batch"]) -> Int[Array, "T *batch"]:
    """How many steps each row is behind the latest episode start, or behind the first row."""
    time = jnp.arange(is_first.shape[0]).reshape(-1, *[1] * (is_first.ndim - 1))
    return time - jax.lax.cummax(jnp.where(is_first, time, 0))


def transition_weight(age: Int[Array, "T *batch"], rho: Any) -> Float[Array, "T *batch"]:
    """rho^k for the k-th transition, k = 0, 1, ..., of a row's episode, by the age of the row it arrives at;
    0 where no transition arrives (age 0): between the last step of an episode and the first of the next."""
    return jnp.where(age > 0, rho ** jnp.maximum(age - 1.0, 0.0), 0.0)


def td_target(reward: Array, is_terminal: Array, next_value: Array, discount: Any) -> Array:
    """r + gamma (1 - terminal) V(next), elementwise (eq. 4)."""
    return sg(reward + discount * (1.0 - is_terminal.astype(jnp.float32)) * next_value)


def update_scale(scale: Float[Array, ""], values: Array, rate: Any = 0.01) -> Float[Array, ""]:
    """Moves ``scale`` towards the range between the 5th and 95th percentile of ``values``, at least 1, by
    ``rate``: what the policy loss divides values by."""
    low, high = jnp.percentile(sg(values), jnp.array([5.0, 95.0]))
    return scale + rate * (jnp.maximum(high - low, 1.0) - scale)


def unlearned_terminals(learned: Container[str], is_terminal: Bool[Array, "T *batch"]) -> dict[str, Array]:
    """A metric: the share of terminal rows where no loss of a termination head is among the ``learned``."""
    return {} if "termination" in learned else {"unlearned_terminals": is_terminal.mean()}


# PETS (arXiv 1805.12114) ---------------------------------------------------------------------------------


def gaussian_nll(mean: Array, log_var: Array, target: Array) -> Array:
    """Negative log-likelihood of ``target`` under independent normals, elementwise (eq. 1)."""
    return 0.5 * (jnp.square(target - mean) * jnp.exp(-log_var) + log_var + jnp.log(2 * jnp.pi))


def soft_bounds(x: Array, low: Array, high: Array) -> Array:
    """``x`` bent smoothly into (low, high), with a gradient for the bounds too (appendix A.1)."""
    x = high - jax.nn.softplus(high - x)
    return low + jax.nn.softplus(x - low)
