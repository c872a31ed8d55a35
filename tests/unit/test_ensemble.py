"""PETS' ensemble: its likelihood, its bootstrap, who imagines a step, and what it says of its doubt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mbrl.errors import UserError
from mbrl.imagination import rollout
from mbrl.losses import gaussian_nll, soft_bounds
from mbrl.types import ArraySpec, EnvSpec, Starts
from world_models.ensemble import (
    EnsembleConfig,
    bootstrap,
    init_statistics,
    make,
    update_statistics,
)

SPEC = EnvSpec("toy", {"x": ArraySpec((2,)), "y": ArraySpec((1,))}, ArraySpec((1,)))
SMALL = dict(members=3, elites=3, layers=1, head_layers=1, units=4)


def model_of(**fields):
    return make(EnsembleConfig(**(SMALL | fields)), SPEC)


def noisy(params, seed: int = 5):
    """Parameters of which none is zero; statistics with variances that are positive."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([x + jnp.float32(rng.uniform(0.1, 0.5, x.shape)) for x in leaves])


def states(model, params, lead: tuple[int, ...]):
    """Starts of a rollout with the given leading axes, each another observation."""
    start = jax.tree.map(lambda x: x[0], model.init_state(params, 1).now)
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), start)
    return start._replace(obs=jax.random.normal(jax.random.key(3), start.obs.shape))


def roll(model, params, lead: tuple[int, ...], horizon: int = 4):
    def run(params):
        actions = jax.random.uniform(jax.random.key(4), (horizon, *lead, 1), minval=-1.0)
        starts = Starts((), states(model, params, lead))
        follow = lambda features, key, t: actions[t]
        return rollout(model, params, starts, follow, jax.random.key(0), horizon)[0]

    return jax.jit(run)(params)


def init(model):
    return jax.jit(model.init)(jax.random.key(0))


# Likelihood ------------------------------------------------------------------------------------------------


def test_gaussian_nll(strict_numerics):
    mean, log_var, target = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    expected = -stats.norm.logpdf(target, mean, np.exp(log_var / 2))
    np.testing.assert_allclose(gaussian_nll(*map(jnp.asarray, (mean, log_var, target))), expected, rtol=1e-5)


def test_bounds_of_the_log_variance(strict_numerics):
    """Values lie between the bounds and hardly move far from them; beyond one, the gradient is the bound's."""
    low, high = jnp.float32(-3.0), jnp.float32(2.0)
    x = jnp.linspace(-50.0, 50.0, 101)
    bent = np.asarray(jax.vmap(soft_bounds, (0, None, None))(x, low, high))
    assert (np.diff(bent) >= 0).all() and bent.min() >= -3 and bent.max() <= 2 + np.log1p(np.exp(-5))
    gradient = jax.grad(soft_bounds, (0, 1, 2))
    np.testing.assert_allclose(gradient(jnp.float32(60.0), low, high), (0, 0, 1), atol=0.01)
    np.testing.assert_allclose(gradient(jnp.float32(-60.0), low, high), (0, 1, 0), atol=0.01)
    inside = np.array(gradient(jnp.float32(0.0), jnp.float32(-20.0), jnp.float32(20.0)))
    np.testing.assert_allclose(inside, (1, 0, 0), atol=1e-6)
    step = 1e-2
    for i, (by_hand, at) in enumerate(zip(gradient(jnp.float32(1.5), low, high), jnp.eye(3))):
        args = jnp.array([1.5, -3.0, 2.0])
        up, down = (soft_bounds(*(args + sign * step * at)) for sign in (1, -1))
        assert float(by_hand) == pytest.approx(float((up - down) / (2 * step)), abs=1e-3), i


# Bootstrap -------------------------------------------------------------------------------------------------


def test_bootstrap_weights():
    """Poisson of mean 1 for every member, independent of each other and of what is held out."""
    rng = np.random.default_rng(0)
    source, action = (jnp.float32(rng.normal(size=(100, 100, n))) for n in (3, 1))
    weights, held = jax.jit(lambda *rows: bootstrap(*rows, members=3, holdout=0.2))(source, action)
    weights, held = np.asarray(weights), np.asarray(held)
    assert weights.shape == (3, 100, 100) and held.shape == (100, 100)
    assert held.mean() == pytest.approx(0.2, abs=0.02) and (weights[:, held] == 0).all()
    kept = weights[:, ~held]
    for count in range(4):
        np.testing.assert_allclose((kept == count).mean(-1), stats.poisson.pmf(count, 1), atol=0.02)
    np.testing.assert_allclose(kept.mean(-1), 1, atol=0.05)
    np.testing.assert_allclose(np.corrcoef(kept), np.eye(3), atol=0.05)


def test_a_transition_keeps_its_weights():
    """Wherever in a batch it is served; the smallest change of it gives others."""
    rng = np.random.default_rng(1)
    source, action = (jnp.float32(rng.normal(size=(200, n))) for n in (3, 1))
    weights, held = bootstrap(source, action, 4, 0.3)
    order = rng.permutation(200)
    again, held_again = bootstrap(source[order].reshape(20, 10, 3), action[order].reshape(20, 10, 1), 4, 0.3)
    np.testing.assert_array_equal(again.reshape(4, 200), weights[:, order])
    np.testing.assert_array_equal(held_again.ravel(), held[order])
    moved, _ = bootstrap(jnp.nextafter(source, jnp.inf), action, 4, 0.0)
    assert (np.asarray(moved) != np.asarray(bootstrap(source, action, 4, 0.0)[0])).mean() > 0.3


def test_statistics_equal_numpy():
    """Those of all batches together while they are few, without rows of weight 0; errors of held-out rows."""
    rng = np.random.default_rng(2)
    old, seen = init_statistics(3, 2), []
    for i in range(4):
        rows = rng.normal(i, 1 + i, size=(5, 4, 3))
        live = np.ones((5, 4))
        live[0] = 0
        held = np.zeros((5, 4))
        held[3, :2] = 1
        error = rng.random((2, 5, 4))
        arrays = (jnp.float32(x) for x in (rows, live, error, held))
        old = update_statistics(old, *arrays, rate=0.01)
        seen.append((rows[1:].reshape(-1, 3), error[:, 3, :2].mean(-1)))
    data, errors = (np.concatenate([s[i] if i == 0 else s[i][None] for s in seen]) for i in (0, 1))
    np.testing.assert_allclose(old["mean"], data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(old["var"], data.var(0), rtol=1e-5)
    np.testing.assert_allclose(old["error"], errors.mean(0), rtol=1e-5)
    nothing = jnp.zeros((5, 4))
    same = update_statistics(old, jnp.ones((5, 4, 3)), nothing, jnp.ones((2, 5, 4)), nothing, rate=0.01)
    for name in ("mean", "var", "error"):
        np.testing.assert_array_equal(same[name], old[name])


# Who imagines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(2, 6, 2), (40,), (5, 2, 3)], ids=["blocks", "states", "few particles"])
def test_who_imagines_a_rollout(lead):
    """TS-infinity holds a particle's member, TS1 redraws it at every step. Where the particles are a multiple of
    the members, each member has equally many, the same for all candidates."""
    held, redrawn = (
        np.asarray(roll(model, init(model), lead).member[1:])
        for model in (model_of(propagation=name) for name in ("ts_inf", "ts1"))
    )
    assert (held == held[0]).all() and set(held.ravel()) == {0, 1, 2}
    assert (redrawn != redrawn[0]).any() and set(redrawn.ravel()) == {0, 1, 2}
    if lead == (2, 6, 2):
        for member in (held, redrawn):
            np.testing.assert_array_equal(member, np.broadcast_to(member[:, :1, :, :1], member.shape))
            counts = (member[:, 0, :, 0, None] == np.arange(3)).sum(1)
            np.testing.assert_array_equal(counts, 2)


@pytest.mark.parametrize("propagation", ["ts_inf", "ts1"])
def test_blocks_of_particles_equal_one_by_one(propagation):
    """Dealing particles to members in blocks computes what each particle's own member says."""
    lead, key = (2, 6, 2), jax.random.key(7)
    model, alone = model_of(propagation=propagation), model_of()
    params = noisy(init(model))
    start, action = states(model, params, lead), jax.random.normal(key, (*lead, 1))
    dealt = model.imagine_step(params, (), model.imagine_init(params, Starts((), start), 1), action, key)
    flat = lambda x: x.reshape(24, *x.shape[3:])
    given = jax.tree.map(flat, start)._replace(member=flat(dealt.member))
    single = alone.imagine_step(params, (), given, flat(action), key)
    for ours, theirs in zip(dealt, single):
        np.testing.assert_allclose(flat(ours), theirs, rtol=1e-5, atol=1e-6)


def test_expectation_is_the_mean_of_the_members():
    """Without noise: the average of what single-member models expect."""
    mean, single = (
        model_of(propagation="expectation"),
        model_of(propagation="expectation", members=1, elites=1),
    )
    params = noisy(init(mean))
    start, action = states(mean, params, (7,)), jnp.ones((7, 1))
    step = lambda model, params, key: model.imagine_step(params, (), start, action, jax.random.key(key)).obs
    one = lambda i: params | {"members": jax.tree.map(lambda x: x[i : i + 1], params["members"])}
    expected = np.mean([step(single, one(i), 1) for i in range(3)], 0)
    np.testing.assert_allclose(step(mean, params, 0), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(step(mean, params, 0), step(mean, params, 1))


def test_elites_have_the_smallest_errors():
    """Only they imagine: another member may say anything, unless its error becomes the smallest."""
    model = model_of(elites=2, holdout=0.5)
    params = init(model)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), params["members"])
    for error, sound in (([0.2, 0.3, 0.1], True), ([0.2, 0.1, 0.3], False), ([0.3, 0.1, 0.2], False)):
        now = params | {"members": broken, "statistics": params["statistics"] | {"error": jnp.array(error)}}
        rolled = roll(model, now, (20,))
        assert np.isfinite(rolled.obs).all() == sound
        assert np.isfinite(model.predict(now, rolled).uncertainty["disagreement"]).all() == sound


def test_uncertainties_equal_numpy():
    """Disagreement is the spread of the members' means, aleatoric their own standard deviation, both of the
    normalised change and averaged over its entries; each member is a forward pass by hand."""
    model = model_of()
    params = noisy(init(model))
    state = roll(model, params, (5,), horizon=1)
    state = jax.tree.map(lambda x: x[1], state)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    mean, var = (p["statistics"][name][:3] for name in ("mean", "var"))
    x = np.concatenate([(np.asarray(state.source) - mean) / np.sqrt(var), state.action], -1)
    means, stds = [], []
    for i in range(3):
        net = jax.tree.map(lambda x: x[i], p["members"])
        h = x @ net["dense0"]["linear"]["kernel"] + net["dense0"]["linear"]["bias"]
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-4) * net["dense0"]["norm"]["scale"]
        h = h / (1 + np.exp(-h))
        out = h @ net["out"]["kernel"] + net["out"]["bias"]
        low, high = p["bounds"]
        log_var = high - np.log1p(np.exp(high - out[:, 3:]))
        log_var = low + np.log1p(np.exp(log_var - low))
        means.append(out[:, :3])
        stds.append(np.exp(log_var / 2))
    said = model.predict(params, state).uncertainty
    np.testing.assert_allclose(said["disagreement"], np.std(means, 0).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(said["aleatoric"], np.mean(stds, (0, -1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(elites=4), "model.elites is 4, it must lie between 1 and 3"),
        (dict(elites=2), "model.elites is 2 of 3 model.members, and nothing is held out"),
        (dict(holdout=1.0), "model.holdout is 1.0"),
        (dict(layers=0), "model.layers is 0"),
    ],
)
def test_impossible_settings(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        model_of(**fields)
