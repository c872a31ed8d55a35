"""Losses and returns against brute force, and where their gradients may and may not go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl import losses
from mbrl.distributions import OneHot, one_hot, two_hot
from mbrl.losses import ReturnNorm

KEY = jax.random.key(0)


def brute_force_return(reward, cont, value, lam, t: int) -> float:
    """The lambda-return of state t as the mixture of n-step returns that defines it (not a recursion).

    The trace survives step k with probability lam[k]; where it stops, the value takes over.
    """
    last = len(reward) - 1
    total, alive, rewards, discount = 0.0, 1.0, 0.0, 1.0
    for k in range(t + 1, last + 1):
        rewards += discount * reward[k]
        discount *= cont[k]
        stop = 1.0 if k == last else 1.0 - lam[k]
        total += alive * stop * (rewards + discount * value[k])
        alive *= 1.0 - stop
    return total


@st.composite
def sequences(draw):
    """Rewards, continues with zeros (terminals) and ones, values, and one lambda per step; up to 12 steps."""
    length = draw(st.integers(2, 12))
    number = st.floats(-10, 10, width=32)
    unit = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
    arrays = [
        draw(st.lists(entry, min_size=length, max_size=length)) for entry in (number, unit, number, unit)
    ]
    return [np.array(x, np.float32) for x in arrays]


padded_return = jax.jit(losses.lambda_return)


@settings(max_examples=100, deadline=None)
@given(sequences())
def test_lambda_return_is_the_mixture_of_n_step_returns(sequence):
    """Padded in front to one length, so that one compiled program serves all lengths: the past cannot matter."""
    reward, cont, value, lam = sequence
    pad = 12 - len(reward)
    ours = padded_return(*(np.pad(x, (pad, 0), constant_values=0.7) for x in sequence))
    assert ours.shape == (11,)
    for t in range(len(reward) - 1):
        expected = brute_force_return(*np.asarray(sequence, np.float64), t)
        np.testing.assert_allclose(ours[pad + t], expected, rtol=1e-5, atol=1e-4)


def test_lambda_return_limits(strict_numerics):
    """lambda 0 is one step of bootstrapping, lambda 1 the discounted sum; a terminal (cont 0) hides the rest."""
    reward, cont, value = (
        jnp.array([9.0, 1.0, 2.0, 4.0]),
        jnp.array([9.0, 0.5, 0.5, 0.5]),
        jnp.arange(4.0) + 10,
    )
    np.testing.assert_allclose(losses.lambda_return(reward, cont, value, 0.0), [6.5, 8.0, 10.5])
    np.testing.assert_allclose(losses.lambda_return(reward, cont, value, 1.0), [4.625, 7.25, 10.5])
    ended = losses.lambda_return(reward, cont.at[2].set(0.0), value, 0.7)
    changed = losses.lambda_return(reward.at[3].set(1e6), cont.at[2].set(0.0), value.at[2:].set(1e6), 0.7)
    np.testing.assert_array_equal(ended[:2], changed[:2])
    assert ended[1] == 2.0


def test_lambda_return_any_batch_axes(strict_numerics):
    """[T, B, K] equals column by column, with a scalar and with a full lambda."""
    arrays = [jax.random.uniform(k, (5, 2, 3)) for k in jax.random.split(KEY, 4)]
    full = losses.lambda_return(*arrays)
    columns = [losses.lambda_return(*(x[:, i, j] for x in arrays)) for i in range(2) for j in range(3)]
    np.testing.assert_allclose(full.reshape(4, 6), np.stack(columns, 1), rtol=1e-6)
    scalar = losses.lambda_return(*arrays[:3], 0.9)
    np.testing.assert_allclose(scalar, losses.lambda_return(*arrays[:3], jnp.full((5, 2, 3), 0.9)), rtol=1e-6)


def test_replay_returns_at_episode_ends(strict_numerics):
    """A time limit bootstraps fully from the value of the final observation; a terminal has value 0; rewards of
    the next episode never leak into the one before."""
    reward = jnp.array([5.0, 1.0, 0.0, 3.0])  # row 1 ends an episode, row 2 is the first of the next
    value, none = jnp.array([7.0, 10.0, 20.0, 30.0]), jnp.zeros(4, bool)
    last = none.at[1].set(True)
    truncated = losses.replay_returns(reward, last, none, value, 0.5, 0.9)
    terminal = losses.replay_returns(reward, last, last, value, 0.5, 0.9)
    assert truncated[0] == 1.0 + 0.5 * 10.0
    assert terminal[0] == 1.0
    leaky = losses.replay_returns(reward.at[3].set(1e6), last, last, value.at[2:].set(1e6), 0.5, 0.9)
    assert leaky[0] == terminal[0]
    assert truncated[2] == pytest.approx(3.0 + 0.5 * 30.0)


def kl_case(gap: float):
    post = jax.random.normal(KEY, (4, 3, 5)) * gap
    return post, jax.random.normal(jax.random.key(1), (4, 3, 5)) * gap


def test_kl_gradients_are_split(strict_numerics):
    """``dyn`` moves only the prior, ``rep`` only the posterior; both have the value of the full KL."""
    post, prior = kl_case(2.0)

    def total(name):
        return lambda a, b: losses.kl_losses(one_hot(a, 0.01), one_hot(b, 0.01))[0][name].sum()

    dyn, rep = (jax.grad(total(name), argnums=(0, 1))(post, prior) for name in ("dyn", "rep"))
    full = jax.grad(lambda a, b: one_hot(a, 0.01).kl(one_hot(b, 0.01)).sum(), argnums=(0, 1))(post, prior)
    assert (dyn[0] == 0).all() and (rep[1] == 0).all()
    np.testing.assert_allclose(dyn[1], full[1], atol=1e-6)
    np.testing.assert_allclose(rep[0], full[0], atol=1e-6)
    assert np.abs(full[0]).max() > 0.01 and np.abs(full[1]).max() > 0.01


def test_free_nats_clip_the_sum_of_the_factors(strict_numerics):
    """Three factors of 0.5 nats are 1.5 and keep their gradient: clipping each factor would kill it. Below one
    nat the loss is 1 and the gradient exactly 0; the reported KL is never clipped."""
    certain, even = jnp.array([[0.0, -1e9]] * 3), jnp.zeros((3, 2))
    half = jnp.log(jnp.array([np.exp(-0.5), 1 - np.exp(-0.5)]))  # KL from certain is 0.5
    cases = [(jnp.tile(half, (3, 1)), 1.5), (jnp.array([[0.0, -3.0]] * 3), 3 * np.log1p(np.exp(-3)))]
    for prior, expected in cases:
        clipped, kl = losses.kl_losses(one_hot(certain), one_hot(prior))
        gradient = jax.grad(lambda x: losses.kl_losses(one_hot(certain), one_hot(x))[0]["dyn"])(prior)
        assert kl == pytest.approx(expected, rel=1e-5)
        assert clipped["dyn"] == clipped["rep"] == pytest.approx(max(expected, 1.0), rel=1e-5)
        assert (np.abs(gradient).max() > 0.1) == (expected > 1.0)
        assert expected > 1.0 or (gradient == 0).all()
    assert losses.kl_losses(one_hot(even), one_hot(even), free_nats=0.0)[0]["dyn"] == 0


logits = st.lists(st.floats(-30, 30, width=32), min_size=15, max_size=15)
kl_of = jax.jit(lambda a, b: losses.kl_losses(one_hot(a, 0.01), one_hot(b, 0.01), 0.0)[0])


@settings(max_examples=100, deadline=None)
@given(logits, logits)
def test_kl_is_positive_and_zero_for_equals(a, b):
    """Also where a class is nearly certain; both halves have one value."""
    a, b = (np.array(x, np.float32).reshape(3, 5) for x in (a, b))
    different, same = kl_of(a, b), kl_of(a, a)
    assert different["dyn"] >= -1e-5 and different["dyn"] == pytest.approx(
        float(different["rep"]), rel=1e-5, abs=1e-6
    )
    assert same["dyn"] == same["rep"] == 0


def test_kl_keeps_batch_axes(strict_numerics):
    """One number per time step, clipped per time step, before any mean."""
    post, prior = kl_case(0.8)
    clipped, kl = losses.kl_losses(one_hot(post), one_hot(prior), free_nats=1.0)
    assert kl.shape == clipped["dyn"].shape == (4,)
    assert (kl < 1).any() and (kl > 1).any(), "the case must have both sides"
    np.testing.assert_allclose(clipped["dyn"], np.maximum(kl, 1.0), rtol=1e-6)


def test_return_norm():
    """Percentiles over all axes, no gradient, never a scale below 1."""
    norm = ReturnNorm(jnp.zeros(()), jnp.zeros(()))
    returns = jnp.linspace(-100, 100, 201).reshape(3, 67)
    once = losses.update_return_norm(norm, returns, 0.25)
    assert (once.low, once.high, once.scale) == (-22.5, 22.5, 45.0)
    assert losses.update_return_norm(norm, returns * 1e-3, 0.25).scale == 1
    twice = losses.update_return_norm(once, returns, 0.25)
    assert twice.low == pytest.approx(-22.5 * 0.75 - 22.5)
    gradient = jax.grad(lambda x: losses.update_return_norm(norm, x, 1.0).scale)(returns)
    assert (gradient == 0).all()


def test_trajectory_weight():
    """The first state's own continue probability counts; no gradient."""
    cont = jnp.array([[0.9, 1.0], [0.5, 0.0], [0.5, 1.0]])
    np.testing.assert_allclose(losses.trajectory_weight(cont), [[0.9, 1], [0.45, 0], [0.225, 0]], rtol=1e-6)
    assert (jax.grad(lambda x: losses.trajectory_weight(x).sum())(cont) == 0).all()


def test_reinforce_gradients(strict_numerics):
    """Only log-probability and entropy are differentiated; good actions become likelier."""
    log_prob, advantage, entropy = jnp.array([-1.0, -2.0]), jnp.array([2.0, -3.0]), jnp.array([0.5, 0.7])
    weight = jnp.array([0.5, 1.0])
    value = losses.reinforce_loss(log_prob, advantage, entropy, weight, 0.1)
    np.testing.assert_allclose(value, [-0.5 * (-2.0 + 0.05), -(6.0 + 0.07)], rtol=1e-6)
    total = lambda *args: losses.reinforce_loss(*args, 0.1).sum()
    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(log_prob, advantage, entropy, weight)
    np.testing.assert_allclose(gradients[0], [-1.0, 3.0])
    np.testing.assert_allclose(gradients[2], [-0.05, -0.1], rtol=1e-6)
    assert (gradients[1] == 0).all() and (gradients[3] == 0).all()


def test_pathwise_gradients(strict_numerics):
    """The return is differentiated, the weight is not; descending the loss raises the return."""
    returns, entropy, weight = jnp.array([2.0, -3.0]), jnp.array([0.5, 0.7]), jnp.array([0.5, 1.0])
    total = lambda *args: losses.pathwise_loss(*args, 0.1).sum()
    gradients = jax.grad(total, argnums=(0, 1, 2))(returns, entropy, weight)
    np.testing.assert_allclose(gradients[0], [-0.5, -1.0])
    np.testing.assert_allclose(gradients[1], [-0.05, -0.1], rtol=1e-6)
    assert (gradients[2] == 0).all()


def test_critic_loss():
    """Weighted sum of both cross-entropies; neither target is differentiated."""
    logits = jax.random.normal(KEY, (3, 63))
    returns, slow, weight = (
        jnp.array([1.0, -2.0, 30.0]),
        jnp.array([0.0, 5.0, -1.0]),
        jnp.array([1.0, 0.5, 0.0]),
    )

    def total(logits, returns, slow, scale=2.0):
        return losses.critic_loss(two_hot(logits, 8.0), returns, slow, weight, scale)

    dist = two_hot(logits, 8.0)
    np.testing.assert_allclose(
        total(logits, returns, slow), weight * (dist.loss(returns) + 2 * dist.loss(slow))
    )
    gradients = jax.grad(lambda *args: total(*args).sum(), argnums=(0, 1, 2))(logits, returns, slow)
    assert np.abs(gradients[0][:2]).min(-1).max() > 0 and (gradients[0][2] == 0).all()
    assert (gradients[1] == 0).all() and (gradients[2] == 0).all()


def test_losses_of_a_perfect_posterior_vanish():
    """KL of a distribution with itself is 0, so only the free nats remain."""
    dist = OneHot(jax.nn.log_softmax(jax.random.normal(KEY, (2, 3, 4))))
    clipped, kl = losses.kl_losses(dist, dist, free_nats=1.0)
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    assert (clipped["rep"] == 1).all()


def test_weighted_sum():
    """A scale holds for all losses of its kind."""
    means = {"rec_a": jnp.float32(2.0), "rec_b": jnp.float32(3.0), "dyn": jnp.float32(5.0)}
    assert float(losses.weighted(means, {"rec": 10.0, "dyn": 0.5, "cont": 7.0})) == 52.5
