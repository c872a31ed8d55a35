"""Distributions against scipy, against frequencies, and at the edges of float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl import distributions
from mbrl.distributions import (
    Bernoulli,
    BoundedNormal,
    OneHot,
    SymlogMSE,
    bounded_normal,
    one_hot,
    two_hot,
    twohot_bins,
)

KEY = jax.random.key(0)


# One-hot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_one_hot_frequencies(unimix):
    """Chi-square of 100,000 samples against the mixed probabilities."""
    logits = jnp.array([2.0, -1.0, 0.5, -3.0, 0.0])
    dist = one_hot(logits, unimix)
    probs = (1 - unimix) * scipy.special.softmax(np.asarray(logits, np.float64)) + unimix / 5
    np.testing.assert_allclose(jnp.exp(dist.log_probs), probs, rtol=1e-5)
    big = OneHot(jnp.broadcast_to(dist.log_probs, (100_000, 5)))
    counts = np.asarray(jax.jit(big.sample)(KEY)).sum(0)
    assert scipy.stats.chisquare(counts, probs * counts.sum()).pvalue > 1e-3


def test_one_hot_factors_are_independent():
    """One uniform per factor, not one per distribution: two equal factors must not move together."""
    dist = OneHot(jnp.full((20_000, 2, 2), jnp.log(0.5)))
    first = np.asarray(dist.sample(KEY))[..., 0]
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.04


EXTREME = {
    "certain first": [200.0, 0.0, 0.0, -200.0],
    "certain last": [0.0, 0.0, 0.0, 300.0],
    "huge": [1e30, -1e30, 0.0, 1e30],
    "equal": [0.0, 0.0, 0.0, 0.0],
    "tiny tail": [0.0, -16.0, -17.0, -40.0],
}
NEAR = [0.0, 1e-38, 2**-24, 0.25, 0.5, 1 - 2**-23, 1 - 2**-24]


def assert_one_hot(sample):
    """Exactly one entry is exactly 1, the others exactly 0."""
    sample = np.asarray(sample)
    assert np.isin(sample, (0.0, 1.0)).all(), sample[~np.isin(sample, (0.0, 1.0))][:5]
    assert (sample.sum(-1) == 1).all()


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("uniform", NEAR)
def test_one_hot_is_exact(name, uniform, monkeypatch):
    """A sample is exactly one-hot for any probabilities and any uniform, 0 and the largest below 1 included,
    and never a class of probability 0."""
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, *args: jnp.full(shape, uniform, jnp.float32)
    )
    for unimix in (0.0, 0.01):
        dist = one_hot(jnp.array(EXTREME[name]), unimix)
        sample = dist.sample(KEY)
        assert_one_hot(sample)
        assert jnp.exp(dist.log_probs)[jnp.argmax(sample)] > 0


@pytest.mark.parametrize("classes", [2, 18, 100])
def test_one_hot_is_exact_for_many_classes(classes):
    """Rounding in the cumulative sum must not produce a second 1 (parallel sums are not monotone)."""
    logits = jax.random.normal(KEY, (3000, classes)) * jnp.linspace(0.1, 30, 3000)[:, None]
    for seed in range(3):
        assert_one_hot(jax.jit(lambda x, k: one_hot(x).sample(k))(logits, jax.random.key(seed)))


def test_one_hot_straight_through():
    """The value is the one-hot, the gradient that of the (mixed) probabilities."""
    logits, weight = jax.random.normal(KEY, (3, 4)), jax.random.normal(jax.random.key(1), (3, 4))
    for unimix in (0.0, 0.01):
        through = jax.grad(lambda x: (one_hot(x, unimix).sample(KEY) * weight).sum())(logits)
        probs = jax.grad(lambda x: (jnp.exp(one_hot(x, unimix).log_probs) * weight).sum())(logits)
        assert np.abs(probs).max() > 0.01
        np.testing.assert_allclose(through, probs, atol=1e-7)


def test_one_hot_against_scipy(strict_numerics):
    logits = jax.random.normal(KEY, (2, 4))
    p, q = one_hot(logits), one_hot(logits[::-1], 0.01)
    a, b = np.exp(np.asarray(p.log_probs, np.float64)), np.exp(np.asarray(q.log_probs, np.float64))
    np.testing.assert_allclose(p.entropy(), scipy.stats.entropy(a, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(p.kl(q), scipy.stats.entropy(a, b, axis=-1), rtol=1e-5)
    index = jnp.array([1, 3])
    np.testing.assert_allclose(p.loss(index), -np.log(a[[0, 1], [1, 3]]), rtol=1e-5)
    assert (p.mode().argmax(-1) == logits.argmax(-1)).all()
    assert_one_hot(p.mode())


def test_one_hot_with_extreme_logits_is_finite():
    """Value, entropy, KL and their gradients stay finite where probabilities underflow."""
    logits = jnp.array([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]])
    for unimix in (0.0, 0.01):

        def total(x, unimix=unimix):
            p, q = one_hot(x, unimix), one_hot(x[::-1], unimix)
            return p.entropy().sum() + p.kl(q).sum() + p.loss(jnp.array([2, 2])).sum()

        value, gradient = jax.value_and_grad(total)(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_unimix_bounds_probabilities():
    """The point of the mixture: no probability below unimix / K, so no KL above log(K / unimix)."""
    dist = one_hot(jnp.array([1e3, 0.0, 0.0, -1e3]), 0.01)
    assert jnp.exp(dist.log_probs).min() == pytest.approx(0.01 / 4, rel=1e-5)


# Bounded normal ----------------------------------------------------------------------------------------------


def test_bounded_normal_against_scipy(strict_numerics):
    out = jax.random.normal(KEY, (5, 6)) * 3
    dist = bounded_normal(out)
    mean, std = np.tanh(out[:, :3]), 0.9 * scipy.special.expit(np.asarray(out[:, 3:]) + 2) + 0.1
    np.testing.assert_allclose(dist.mean, mean, atol=1e-6)
    np.testing.assert_allclose(dist.std, std, atol=1e-6)
    value = jax.random.normal(jax.random.key(1), (5, 3))
    exact = scipy.stats.norm(mean, std)
    np.testing.assert_allclose(dist.log_prob(value), exact.logpdf(value).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(dist.entropy(), exact.entropy().sum(-1), rtol=1e-5)
    assert (dist.mode() == dist.mean).all()


def test_bounded_normal_starts_wide_and_stays_bounded():
    assert bounded_normal(jnp.zeros(2)).std[0] == pytest.approx(0.9 * scipy.special.expit(2) + 0.1)
    extreme = bounded_normal(jnp.array([1e6, -1e6, 1e6, -1e6]))
    np.testing.assert_allclose(extreme.mean, [1, -1])
    np.testing.assert_allclose(extreme.std, [1.0, 0.1], rtol=1e-6)


def test_bounded_normal_samples():
    """Kolmogorov-Smirnov of each action, and the reparameterised gradient."""
    dist = BoundedNormal(
        jnp.tile(jnp.array([0.5, -0.9]), (20_000, 1)), jnp.tile(jnp.array([0.1, 0.7]), (20_000, 1))
    )
    sample = np.asarray(dist.sample(KEY))
    for i, (mean, std) in enumerate([(0.5, 0.1), (-0.9, 0.7)]):
        assert scipy.stats.kstest(sample[:, i], scipy.stats.norm(mean, std).cdf).pvalue > 1e-3
    noise = jax.random.normal(KEY, (2,))
    gradient = jax.grad(lambda d: d.sample(KEY).sum())(BoundedNormal(jnp.zeros(2), jnp.ones(2)))
    np.testing.assert_allclose(gradient.mean, 1)
    np.testing.assert_allclose(gradient.std, noise, rtol=1e-6)


# Two-hot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bins", "limit"), [(255, 20.0), (63, 8.0), (3, 1.0)])
def test_twohot_bins(bins, limit):
    values = twohot_bins(bins, limit)
    assert values.shape == (bins,) and values.dtype == np.float32 and values[bins // 2] == 0
    assert (values == -values[::-1]).all() and (np.diff(values) > 0).all()
    assert values[-1] == pytest.approx(np.expm1(limit), rel=1e-5)


def target_logits(target, bins, limit):
    """Log-probabilities of the two-hot of ``target``: minus the gradient of the loss at uniform logits, plus
    the uniform."""
    gradient = jax.grad(lambda x: two_hot(x, limit).loss(jnp.float32(target)))(jnp.zeros(bins))
    return 1 / bins - gradient


SIZES = st.sampled_from([(255, 20.0), (63, 8.0)])


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(-2900, 2900, width=32))
def test_twohot_round_trip(size, target):
    """The two-hot of a target has mass on at most two neighbouring bins and the target as its mean."""
    bins, limit = size
    weights = np.asarray(target_logits(target, bins, limit), np.float64)
    big = np.flatnonzero(weights > 1e-6)
    assert len(big) <= 2 and big.max() - big.min() <= 1
    assert weights[big].sum() == pytest.approx(1, abs=1e-5)
    weights = np.where(weights > 1e-6, weights, 0)
    neighbour = float(np.abs(twohot_bins(bins, limit)[big]).max())
    assert (weights * twohot_bins(bins, limit)).sum() == pytest.approx(target, abs=3e-6 * neighbour + 1e-6)


@pytest.mark.parametrize("target", [0.0, -0.0, 1.0, -1.0, 1e-8, 1e20, -1e20, 3e38, -np.inf, np.inf, 2980.0])
def test_twohot_edges(target):
    """Out of range, huge and infinite targets fall on the outermost bin; exactly on a bin means that bin."""
    bins = twohot_bins(63, 8.0)
    weights = np.asarray(target_logits(target, 63, 8.0))
    assert np.isfinite(weights).all()
    clipped = np.clip(target, bins[0], bins[-1])
    assert (weights * bins).sum() == pytest.approx(clipped, rel=1e-4, abs=1e-3)
    for value in (bins[0], bins[-1], bins[40], 0.0):
        weights = np.asarray(target_logits(value, 63, 8.0))
        assert weights.argmax() == np.argmin(np.abs(bins - value)) and weights.max() == pytest.approx(
            1, abs=1e-5
        )


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_uniform_logits_predict_exactly_zero(scale):
    """Bins of order 1e8 cancel exactly, compiled or not, for any constant logits: the first returns are 0."""
    logits = jnp.full((7, 255), scale)
    for mean in (lambda x: two_hot(x).mean(), jax.jit(lambda x: two_hot(x).mean())):
        assert (np.asarray(mean(logits)) == 0).all()
    np.testing.assert_allclose(two_hot(logits).loss(jnp.full(7, 5.0)), np.log(255), rtol=1e-6)


def test_twohot_minimum_of_the_loss_is_the_target():
    """Cross-entropy against a two-hot is minimised by it, so the mean of a fitted head is the target."""
    targets = jnp.array([-37.0, 0.3, 1500.0])
    logits = jnp.zeros((3, 63))
    step = jax.jit(lambda x: x - 2 * jax.grad(lambda x: two_hot(x, 8.0).loss(targets).sum())(x))
    for _ in range(3000):
        logits = step(logits)
    np.testing.assert_allclose(two_hot(logits, 8.0).mean(), targets, rtol=0.1)


def test_twohot_does_not_differentiate_the_target():
    gradient = jax.grad(lambda t: two_hot(jnp.linspace(0, 1, 63), 8.0).loss(t))(jnp.float32(3))
    assert gradient == 0


# Bernoulli and symlog MSE --------------------------------------------------------------------------------------


def test_bernoulli():
    """Soft labels; extreme logits give large but finite losses and gradients."""
    logit, target = jnp.array([-2.0, 0.0, 3.0]), jnp.array([0.0, 0.997, 1.0])
    p = scipy.special.expit(np.asarray(logit, np.float64))
    expected = -(target * np.log(p) + (1 - target) * np.log1p(-p))
    np.testing.assert_allclose(Bernoulli(logit).loss(target), expected, rtol=1e-5)
    np.testing.assert_allclose(Bernoulli(logit).mean(), p, rtol=1e-6)
    value, gradient = jax.value_and_grad(lambda x: Bernoulli(x).loss(1 - (x > 0).astype(float)).sum())(
        jnp.array([1e4, -1e4])
    )
    assert value == pytest.approx(2e4) and np.isfinite(gradient).all()


def test_symlog_mse():
    """Sums (not means) the squared error of symlog(target); mode is in the target's units."""
    target = jnp.array([[1.0, -10.0], [0.0, 1e6]])
    symlog = np.sign(target) * np.log1p(np.abs(target))
    np.testing.assert_allclose(SymlogMSE(jnp.asarray(symlog)).loss(target), 0, atol=1e-9)
    np.testing.assert_allclose(SymlogMSE(jnp.asarray(symlog) + 2).loss(target), 8, rtol=1e-5)
    np.testing.assert_allclose(SymlogMSE(jnp.asarray(symlog)).mode(), target, rtol=1e-4)


def test_distributions_are_float32():
    """Logits of bfloat16 networks are widened before any probability is computed."""
    logits = jnp.ones((2, 6), jnp.bfloat16)
    assert one_hot(logits, 0.01).log_probs.dtype == jnp.float32
    assert distributions.bounded_normal(logits).mean.dtype == jnp.float32
    assert two_hot(jnp.ones((2, 63), jnp.bfloat16)).logits.dtype == jnp.float32
