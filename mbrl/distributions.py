"""Distributions of heads and latents. Each is a pytree of arrays with pure methods; all maths in float32.

Where a method is missing it has no meaning for that distribution. ``loss(target)`` is what a head is
trained with: the negative log-likelihood, or the squared error where the head is a point estimate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mbrl.errors import UserError, check_above, check_between
from mbrl.networks import symexp, symlog

sg = jax.lax.stop_gradient


class OneHot(NamedTuple):
    """Independent categoricals over the last axis with one-hot samples and straight-through gradients.

    log_probs: normalised log-probabilities [..., C], of a mixture with the uniform where `one_hot` was
    given ``unimix`` > 0. weights: the probabilities themselves where they are known, so that a sample need
    not take a logarithm and its exponential.
    """

    log_probs: Float[Array, "*batch C"]
    weights: Float[Array, "*batch C"] | None = None

    @property
    def probs(self) -> Float[Array, "*batch C"]:
        return jnp.exp(self.log_probs) if self.weights is None else self.weights

    def sample(self, key: Array) -> Float[Array, "*batch C"]:
        """One-hot sample whose gradient is that of the probabilities. Inverse CDF: one uniform per factor,
        cheaper than one Gumbel per class and exact up to float32."""
        probs = self.probs
        cdf = jnp.cumsum(sg(probs), -1)
        uniform = jax.random.uniform(key, (*probs.shape[:-1], 1)) * cdf[..., -1:]
        # The first class whose cumulative probability exceeds the uniform.
        above = (cdf > uniform).astype(probs.dtype)
        onehot = above - jnp.concatenate([jnp.zeros_like(above[..., :1]), above[..., :-1]], -1)
        return onehot + (probs - sg(probs))  # the bracket is exactly 0, so the value is exactly one-hot

    def mode(self) -> Float[Array, "*batch C"]:
        return jax.nn.one_hot(jnp.argmax(self.log_probs, -1), self.log_probs.shape[-1])

    def log_prob(self, onehot: Float[Array, "*batch C"]) -> Float[Array, "*batch"]:
        return (self.log_probs * onehot).sum(-1)

    def loss(self, index: Array) -> Float[Array, "*batch"]:
        return -self.log_prob(jax.nn.one_hot(index, self.log_probs.shape[-1]))

    def entropy(self) -> Float[Array, "*batch"]:
        return -(self.probs * self.log_probs).sum(-1)

    def kl(self, other: OneHot) -> Float[Array, "*batch"]:
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)


def one_hot(logits: Array, unimix: float = 0.0) -> OneHot:
    """Categorical over the last axis of ``logits``; ``unimix`` is the weight of the uniform (paper: 1 %)."""
    logits = logits.astype(jnp.float32)
    if not unimix:
        return OneHot(jax.nn.log_softmax(logits))
    probs = (1 - unimix) * jax.nn.softmax(logits) + unimix / logits.shape[-1]
    return OneHot(jnp.log(probs), probs)


class BoundedNormal(NamedTuple):
    """Normal of independent actions [..., A]; the mean lies in [-1, 1], samples may exceed it (the
    environment clips). Sums over the action axis."""

    mean: Float[Array, "*batch A"]
    std: Float[Array, "*batch A"]

    def sample(self, key: Array) -> Float[Array, "*batch A"]:
        return self.at(jax.random.normal(key, self.mean.shape))

    def at(self, noise: Float[Array, "*batch A"]) -> Float[Array, "*batch A"]:
        """The sample that a standard normal ``noise`` gives; gradients flow to mean and std."""
        return self.mean + self.std * noise

    def mode(self) -> Float[Array, "*batch A"]:
        return self.mean

    def log_prob(self, value: Float[Array, "*batch A"]) -> Float[Array, "*batch"]:
        z = (value - self.mean) / self.std
        return (-0.5 * jnp.square(z) - jnp.log(self.std) - 0.5 * np.log(2 * np.pi)).sum(-1)

    def entropy(self) -> Float[Array, "*batch"]:
        return (jnp.log(self.std) + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)


def bounded_normal(out: Array, min_std: float = 0.1, max_std: float = 1.0) -> BoundedNormal:
    """Splits ``out`` [..., 2A] into mean = tanh(.) and std in (min_std, max_std), about 0.89 at first."""
    mean, std = jnp.split(out.astype(jnp.float32), 2, -1)
    return BoundedNormal(jnp.tanh(mean), (max_std - min_std) * jax.nn.sigmoid(std + 2.0) + min_std)


def twohot_bins(bins: int, limit: float) -> np.ndarray:
    """``bins`` (odd) values symexp(linspace(-limit, limit)), exactly symmetric with an exact zero."""
    half = np.linspace(-limit, 0, bins // 2 + 1, dtype=np.float32)
    half = np.sign(half) * np.expm1(np.abs(half))
    return np.concatenate([half, -half[:-1][::-1]]).astype(np.float32)


def check_bins(part: str, bins: int, limit: float) -> None:
    """UserError unless ``twohot_bins`` can make them: float32 overflows at symexp(88.7)."""
    check_between(f"{part}.bins", bins, 3, 65_535)
    if bins % 2 == 0:
        raise UserError(f"{part}.bins is {bins}, it must be odd: as many bins below zero as above")
    check_above(f"{part}.bin_limit", limit, 0)
    check_between(f"{part}.bin_limit", limit, 0, 80)


class TwoHot(NamedTuple):
    """Scalar as a categorical over fixed bins (symexp two-hot, DreamerV3 section "Critic learning").

    logits: [..., K]; bins: [K], symmetric around 0.
    """

    logits: Float[Array, "*batch K"]
    bins: Float[Array, "K"]

    def mean(self) -> Float[Array, "*batch"]:
        """Expected value. Subtracts the probabilities of mirrored bins before weighing them, so that uniform
        logits give exactly 0 although the outer bins are of order 1e8. (Adding the two products instead is
        off by 0.2, because compilers fuse one of them into the sum without rounding it.)"""
        probs = jax.nn.softmax(self.logits)
        half = self.bins.shape[0] // 2
        odd = probs[..., half + 1 :] - probs[..., :half][..., ::-1]
        return (odd * self.bins[half + 1 :]).sum(-1)

    mode = mean

    def loss(self, target: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Cross-entropy with the two-hot of ``target``, interpolated linearly in raw (not symlog) space."""
        last = self.bins.shape[0] - 1
        target = jnp.clip(sg(target).astype(jnp.float32), self.bins[0], self.bins[-1])
        upper = jnp.clip((self.bins <= target[..., None]).sum(-1), 1, last)
        low, high = self.bins[upper - 1], self.bins[upper]
        weight = (target - low) / (high - low)
        log_probs = jax.nn.log_softmax(self.logits)
        index = jnp.arange(last + 1)
        twohot = (index == upper[..., None] - 1) * (1 - weight)[..., None]
        twohot += (index == upper[..., None]) * weight[..., None]
        return -(twohot * log_probs).sum(-1)


def two_hot(logits: Array, limit: float = 20.0) -> TwoHot:
    """Two-hot distribution with as many bins as logits, spaced as symexp over [-limit, limit]."""
    return TwoHot(logits.astype(jnp.float32), jnp.asarray(twohot_bins(logits.shape[-1], limit)))


class SymlogTwoHot(NamedTuple):
    """Scalar as a categorical over bins that are uniform in symlog space, where it is averaged and
    interpolated too (TD-MPC2's discrete regression; `TwoHot` does both in raw space).

    logits: [..., K], K odd; limit: the outermost bins are symexp(-limit) and symexp(limit).
    """

    logits: Float[Array, "*batch K"]
    limit: float

    def _bins(self) -> Float[Array, "K"]:
        return jnp.linspace(-self.limit, self.limit, self.logits.shape[-1])

    def mean(self) -> Float[Array, "*batch"]:
        """symexp of the expected bin. Mirrored bins are paired, so that uniform logits give exactly 0."""
        probs = jax.nn.softmax(self.logits)
        half = self.logits.shape[-1] // 2
        odd = probs[..., half + 1 :] - probs[..., :half][..., ::-1]
        return symexp((odd * self._bins()[half + 1 :]).sum(-1))

    mode = mean

    def loss(self, target: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Cross-entropy with the two-hot of symlog(target), clipped to the bins."""
        target = jnp.clip(symlog(sg(target).astype(jnp.float32)), -self.limit, self.limit)
        width = 2 * self.limit / (self.logits.shape[-1] - 1)
        twohot = jnp.maximum(0.0, 1 - jnp.abs(target[..., None] - self._bins()) / width)
        return -(twohot * jax.nn.log_softmax(self.logits)).sum(-1)


def symlog_two_hot(logits: Array, limit: float = 10.0) -> SymlogTwoHot:
    """Two-hot distribution with as many bins as logits, uniform in symlog space over [-limit, limit]."""
    return SymlogTwoHot(logits.astype(jnp.float32), limit)


class TanhNormal(NamedTuple):
    """tanh of a normal: actions [..., A] in (-1, 1). mask: 0 for entries that an action does not have, which
    are 0 and count nowhere; 1 for the others, or for all."""

    mean: Float[Array, "*batch A"]
    log_std: Float[Array, "*batch A"]
    mask: Any = 1.0

    def sample(self, key: Array) -> Float[Array, "*batch A"]:
        return self.at(jax.random.normal(key, self.mean.shape))

    def at(self, noise: Float[Array, "*batch A"]) -> Float[Array, "*batch A"]:
        """The sample that a standard normal ``noise`` gives; gradients flow to mean and deviation."""
        return self.mask * jnp.tanh(self.mean + jnp.exp(self.log_std) * noise)

    def mode(self) -> Float[Array, "*batch A"]:
        return self.mask * jnp.tanh(self.mean)

    def inner_log_prob(self, noise: Float[Array, "*batch A"]) -> Float[Array, "*batch"]:
        """Log-density, before the tanh, of the sample that ``noise`` gives."""
        return (self.mask * (-0.5 * jnp.square(noise) - self.log_std - 0.5 * np.log(2 * np.pi))).sum(-1)


def tanh_normal(out: Array, mask: Any = 1.0, low: float = -10.0, high: float = 2.0) -> TanhNormal:
    """Splits ``out`` [..., 2A] into mean and log-deviation, squashed into (low, high) (TD-MPC2)."""
    mean, raw = jnp.split(out.astype(jnp.float32), 2, -1)
    return TanhNormal(mean, low + 0.5 * (high - low) * (jnp.tanh(raw) + 1), mask)


class Bernoulli(NamedTuple):
    """Probability of an event, from its logit [...]."""

    logit: Float[Array, "*batch"]

    def mean(self) -> Float[Array, "*batch"]:
        return jax.nn.sigmoid(self.logit)

    def loss(self, target: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Cross-entropy with a soft label in [0, 1]."""
        target = target.astype(jnp.float32)
        return -target * jax.nn.log_sigmoid(self.logit) - (1 - target) * jax.nn.log_sigmoid(-self.logit)


class SymlogMSE(NamedTuple):
    """Point estimate of symlog(x) for a vector x [..., I]; the loss sums squared errors over I."""

    pred: Float[Array, "*batch I"]

    def mode(self) -> Float[Array, "*batch I"]:
        return symexp(self.pred)

    def loss(self, target: Float[Array, "*batch I"]) -> Float[Array, "*batch"]:
        return jnp.square(self.pred - symlog(sg(target).astype(jnp.float32))).sum(-1)


class ImageMSE(NamedTuple):
    """Point estimate of images [..., h, w, c], as brightness in [0, 1]; the loss sums squared errors over
    pixels and channels."""

    pred: Float[Array, "*batch h w c"]

    def mode(self) -> Float[Array, "*batch h w c"]:
        """In the range of bytes, [0, 255]."""
        return 255 * self.pred

    def loss(self, target: UInt8[Array, "*batch h w c"]) -> Float[Array, "*batch"]:
        return jnp.square(self.pred - target.astype(jnp.float32) / 255).sum((-3, -2, -1))
