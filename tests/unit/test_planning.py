"""Planners on a linear-quadratic problem, whose optimum is known, and the rules of the driver."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import planners
from mbrl.config import config_type, load_factory, override
from mbrl.errors import UserError
from mbrl.planning import PlanConfig, evaluate, expand, make_objective, make_planner, reduce_risk
from mbrl.types import ArraySpec, Prediction, Simulator, Starts
from planners.icem import colour

E, STEPS = 3, 30
DYNAMICS = np.array([[1.0, 0.1], [0.0, 1.0]])
INPUT = np.array([[0.005], [0.1]])
COST, EFFORT = np.diag([1.0, 0.1]), np.array([[0.1]])
ACTION = ArraySpec((1,))
ZERO = jax.random.key(0)
ONCE = PlanConfig()


def riccati():
    """Cost-to-go matrix P and gain K of u = -K x, where the cost of a step is x'Qx of the next x and u'Ru."""
    p = np.zeros((2, 2))
    for _ in range(2000):
        s = COST + p
        k = np.linalg.solve(EFFORT + INPUT.T @ s @ INPUT, INPUT.T @ s @ DYNAMICS)
        p = k.T @ EFFORT @ k + (DYNAMICS - INPUT @ k).T @ s @ (DYNAMICS - INPUT @ k)
    return p, k


P, K = riccati()


class Point(NamedTuple):
    """x: position and velocity [..., 2]. action: the last one, which the reward on arrival charges."""

    x: jax.Array
    action: jax.Array


def step(params, ctx, state: Point, action, key) -> Point:
    return Point(state.x @ jnp.float32(DYNAMICS.T) + action @ jnp.float32(INPUT.T), action)


def cost(state: Point):
    return (
        jnp.einsum("...i,ij,...j->...", state.x, jnp.float32(COST), state.x) + 0.1 * state.action[..., 0] ** 2
    )


def predict(params, state: Point) -> Prediction:
    reward = -cost(state)
    return Prediction(reward, jnp.ones_like(reward), {})


LQR = Simulator(
    imagine_step=step,
    predict=predict,
    features=lambda params, state: state.x,
    value=lambda params, x, key: -jnp.einsum("...i,ij,...j->...", x, jnp.float32(P), x),
)


def points() -> Point:
    """Starts from where no optimal action leaves [-1, 1]."""
    return Point(jnp.array([[0.15, 0.12], [0.22, -0.1], [-0.1, -0.2]]), jnp.zeros((E, 1)))


def make_rule(name: str, action: ArraySpec = ACTION, **fields):
    factory = load_factory("--planner", name, planners.REGISTRY)
    return factory(override(config_type(factory)(), fields), action)


def closed_loop(planner, state: Point):
    """Costs [STEPS, E] of acting by ``planner``."""
    objective = make_objective()

    def body(carry, inputs):
        state, warm = carry
        first, key = inputs
        action, warm, _ = planner.plan((), objective, warm, state, jnp.full(E, first), key, "eval")
        state = step((), (), state, action, key)
        return (state, warm), cost(state)

    inputs = jnp.arange(STEPS) == 0, jax.random.split(ZERO, STEPS)
    return jax.lax.scan(body, (state, planner.init(E)), inputs)[1]


# Small budgets that suffice for two dimensions. The cost is of order 0.1, which wants a high temperature; but a
# much higher one lets one elite decide, and the spread collapses around the first.
SHORT = dict(horizon=4, samples=64)
RULES = {
    "mppi": SHORT | dict(policy_samples=0, samples=256, elites=16, temperature=50.0, min_std=0.01),
    "mppi_classic": SHORT
    | dict(iterations=4, samples=128, elites=128, temperature=1000.0, min_std=0.2, max_std=0.2),
    "cem": SHORT | dict(elites=8),
    "icem": SHORT | dict(elites=8, iterations=5),
    "random": dict(horizon=2, samples=1000),
    "gradient": dict(horizon=4, samples=2),
    "grad_cem": dict(horizon=4, samples=2, iterations=10, cem_iterations=2),
    "policy": {},
    "guided": dict(horizon=2, policy_samples=16),
}


def test_every_rule_has_a_row():
    assert {rule_name(name) for name in RULES} == set(planners.REGISTRY)


def rule_name(row: str) -> str:
    return {"grad_cem": "gradient"}.get(row, row)


def policy(params, x, key):
    """The optimal gain, with noise unless asked for the mode."""
    action = -x @ jnp.float32(K.T)
    return action if key is None else action + 0.1 * jax.random.normal(key, action.shape)


@pytest.mark.parametrize("name", RULES)
def test_linear_quadratic_optimum(name):
    """The closed loop costs at most 5 % more than the optimum x'Px of the linear-quadratic regulator."""
    simulator = LQR._replace(policy=policy) if name in ("policy", "guided") else LQR
    planner, start = make_planner(simulator, make_rule(rule_name(name), **RULES[name])), points()
    costs = np.asarray(jax.jit(lambda s: closed_loop(planner, s))(start), np.float64)
    optimum = np.einsum("ei,ij,ej->e", start.x, P, start.x)
    print(name, costs.sum(0) / optimum)
    assert 0.9 * optimum.sum() < costs.sum() < 1.05 * optimum.sum()  # not counted is what STEPS leave over


def test_mppi_step_as_in_tdmpc2():
    """Elites, weights, mean and spread of one iteration, computed apart; a score of -inf weighs nothing."""
    rule = make_rule("mppi", samples=12, elites=4, policy_samples=2, horizon=3)
    rng = np.random.default_rng(0)
    candidates, scores = rng.uniform(-1, 1, (12, 3, 1)), rng.normal(size=12) * 3
    scores[[2, 3, 4, 5, 6, 7, 8, 9, 10]] = -np.inf
    for kept in (12, 3):  # with 3, an elite has no finite score
        values = scores if kept == 3 else rng.normal(size=12) * 3
        search = rule.start(rule.init_warm(), jnp.zeros((2, 3, 1)), ZERO)
        search = rule.tell(search, rule.stages[0], jnp.float32(candidates), jnp.float32(values), None)
        order = np.argsort(-values)[:4]
        weight = np.exp(0.5 * (values[order] - values.max()))
        weight /= weight.sum()
        mean = sum(w * candidates[i] for w, i in zip(weight, order))
        variance = sum(w * (candidates[i] - mean) ** 2 for w, i in zip(weight, order))
        np.testing.assert_allclose(search.mean, mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(search.std, np.clip(np.sqrt(variance), 0.05, 2.0), rtol=1e-4)
        np.testing.assert_allclose(search.weights, weight, rtol=1e-4)
    chosen = {float(rule.select(search, key, "eval")[0, 0]) for key in jax.random.split(ZERO, 30)}
    assert chosen <= {float(np.float32(candidates[i, 0, 0])) for i in (0, 1, 11)} and len(chosen) > 1
    assert (
        float(rule.shift(search, 1)[0, 0]) == float(search.mean[1, 0]) and rule.shift(search, 1)[-1, 0] == 0
    )


@pytest.mark.parametrize(("candidates", "std"), [([0.3, 0.3], 0.05), ([-1.0, 1.0], 0.5)])
def test_mppi_spread_has_limits(candidates, std):
    """Elites that agree leave something to search, elites far apart not everything."""
    rule = make_rule("mppi", samples=2, elites=2, policy_samples=0, horizon=2, max_std=0.5)
    search = rule.start(rule.init_warm(), jnp.zeros((0, 2, 1)), ZERO)
    both = jnp.broadcast_to(jnp.array(candidates)[:, None, None], (2, 2, 1))
    np.testing.assert_allclose(rule.tell(search, rule.stages[0], both, jnp.zeros(2), None).std, std)


def test_icem_noise():
    """Coloured noise has unit variance and the spectrum 1 / f^beta; with beta = 0 it is white."""
    np.testing.assert_allclose(colour(12, 0.0), np.eye(12), atol=1e-6)
    matrix = colour(32, 2.0).astype(np.float64)
    covariance = matrix.T @ matrix
    np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-5)
    spectrum = np.abs(np.fft.fft(covariance[0]))  # circulant: the spectrum of its first row
    np.testing.assert_allclose(spectrum[2] / spectrum[8], 16, rtol=1e-3)
    np.testing.assert_allclose(spectrum[0], spectrum[1], rtol=1e-3)


def test_icem_keeps_elites_and_shrinks():
    """Rounds of 20, 16 and 12 candidates, never fewer than twice the elites; the best of an early round wins
    with its stored score, and is among the first candidates of the next search, moved on by a step."""
    rule = make_rule("icem", horizon=4, samples=20, elites=6, iterations=4, keep=0.5)
    assert [(stage.iterations, stage.samples) for stage in rule.stages] == [(1, 20), (1, 16), (2, 12)]
    search, best = rule.start(rule.init_warm(), jnp.zeros((0, 4, 1)), ZERO), None
    for i, stage in enumerate([*rule.stages, rule.stages[-1]]):
        candidates = rule.ask(search, stage, i, jax.random.key(i))
        assert candidates.shape == (stage.samples, 4, 1) and np.abs(candidates).max() <= 1
        scores = -jnp.abs(candidates).sum((1, 2)) - 100.0 * (i > 0)
        best = candidates[scores.argmax()] if i == 0 else best
        if i == 3:
            np.testing.assert_array_equal(candidates[-1], search.mean)
        search = rule.tell(search, stage, candidates, scores, None)
    np.testing.assert_array_equal(rule.select(search, ZERO, "eval"), best)
    again = rule.start(rule.shift(search, 1), jnp.zeros((0, 4, 1)), ZERO)
    first = rule.ask(again, rule.stages[0], 0, ZERO)[0]
    np.testing.assert_array_equal(first, np.concatenate([best[1:], best[-1:]]))


def test_cem_step_as_in_pets():
    """Truncated samples stay within bounds; mean and variance are those of the elites, smoothed."""
    rule = make_rule("cem", horizon=2, samples=50, elites=5)
    search = rule.start(jnp.array([[0.9], [0.0]]), jnp.zeros((0, 2, 1)), ZERO)
    candidates = np.asarray(rule.ask(search, rule.stages[0], 0, ZERO), np.float64)
    assert np.abs(candidates).max() <= 1 and candidates[:, 0].min() > 0.8 - 1e-6
    scores = np.random.default_rng(0).normal(size=50)
    found = rule.tell(search, rule.stages[0], jnp.float32(candidates), jnp.float32(scores), None)
    elites = candidates[np.argsort(-scores)[:5]]
    np.testing.assert_allclose(found.mean, 0.1 * np.array([[0.9], [0]]) + 0.9 * elites.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.variance, 0.1 * 0.25 + 0.9 * elites.var(0), rtol=1e-4)


# The objective and the driver ------------------------------------------------------------------------------

SEARCHES = ["mppi", "mppi_classic", "cem", "icem", "random", "gradient"]
TINY = {
    "mppi": dict(policy_samples=0, samples=32, elites=8, horizon=2),
    "mppi_classic": dict(samples=32, elites=32, horizon=2),
    "cem": dict(samples=32, elites=8, horizon=2, iterations=2),
    "icem": dict(samples=32, elites=8, horizon=2, iterations=2),
    "random": dict(samples=32, horizon=2),
    "gradient": dict(samples=4, horizon=2, iterations=4),
}


class Toy(NamedTuple):
    """What was done and what it was worth, [...] each: a world that forgets at every step."""

    action: jax.Array
    noise: jax.Array


def toy(reward, uncertainty=None, value=None, cont=1.0) -> Simulator:
    """A world of one step memory: reward(action [...], noise [...]) -> [...]."""

    def predict(params, state):
        named = {} if uncertainty is None else {"doubt": uncertainty(state.action)}
        worth = reward(state.action, state.noise)
        return Prediction(worth, jnp.full_like(worth, cont), named)

    def step(params, ctx, state, action, key):
        return Toy(action[..., 0], jax.random.normal(key, action.shape[:-1]))

    return Simulator(
        imagine_step=step,
        predict=predict,
        features=lambda params, state: state.action[..., None],
        value=value,
    )


def first_actions(simulator: Simulator, rule, objective=None, config=ONCE, batch: int = 2, calls: int = 1):
    """Actions [calls, E, A] of several plans in a row, from the start of an episode, and their traces."""
    planner = make_planner(simulator, rule, config)
    plan = jax.jit(lambda warm, first, key: planner.plan((), objective, warm, state, first, key, "eval"))
    objective, state = objective or make_objective(), Toy(jnp.zeros(batch), jnp.zeros(batch))
    warm, found = planner.init(batch), []
    for i in range(calls):
        action, warm, info = plan(warm, jnp.full(batch, i == 0), jax.random.key(i))
        found.append((action, info))
    return np.stack([a for a, _ in found]), [info for _, info in found]


def test_the_score_of_a_rollout():
    """Against a loop over steps: the reward counts on arrival, with the discounts of all states before it;
    uncertainties weigh in with their sign, at the horizon too."""
    h, n = 4, 3
    actions = np.random.default_rng(0).uniform(-1, 1, (h, n, 1, 2, 1)).astype(np.float32)
    world = toy(
        reward=lambda a, noise: a**2 + a,
        uncertainty=lambda a: 2 * a,
        value=lambda params, features, key: (features[..., 0] * 3, {"doubt": features[..., 0]}),
        cont=0.8,
    )
    objective = make_objective(discount=0.9, value=0.5, doubt=-0.7)
    starts = Starts((), Toy(jnp.zeros(2), jnp.zeros(2)))
    ours = evaluate(world, (), objective, starts, jnp.asarray(actions), (ZERO, ZERO))
    expected = np.zeros((n, 1, 2))
    for i, e in np.ndindex(n, 2):
        reach, a = 1.0, actions[:, i, 0, e, 0].astype(np.float64)
        for t in range(h):
            expected[i, 0, e] += reach * (a[t] ** 2 + a[t] - 0.7 * 2 * a[t])
            reach *= 0.9 * 0.8
        expected[i, 0, e] += 0.5 * reach * (3 * a[-1] - 0.7 * a[-1])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_uncertainty_attracts_or_repels():
    """A reward for standing still, a doubt that grows with the action: the sign of its weight decides."""
    world = toy(reward=lambda a, noise: -(a**2), uncertainty=lambda a: a)
    rule = make_rule("cem", **TINY["cem"])
    chosen = [first_actions(world, rule, make_objective(doubt=w))[0].mean() for w in (-2.0, 0.0, 2.0)]
    assert chosen[0] < -0.4 and abs(chosen[1]) < 0.2 and chosen[2] > 0.4
    critic = world._replace(value=lambda params, f, key: (0 * f[..., 0], {"spread": f[..., 0]}))
    one = make_rule("cem", **TINY["cem"] | dict(horizon=1))
    assert first_actions(critic, one, make_objective(spread=-2.0))[0].mean() < -0.4
    with pytest.raises(UserError, match="'dout', but this model has: doubt, spread"):
        first_actions(critic, rule, make_objective(dout=1.0))


@pytest.mark.parametrize("name", SEARCHES)
def test_scores_that_are_not_finite_never_win(name):
    """Rewards of nan and inf above 0.2, best just below it: the action is below. Everywhere nan: still an
    action, and the next search is sound."""
    bad = lambda a, noise: jnp.where(a > 0.6, jnp.inf, jnp.where(a > 0.2, jnp.nan, a))
    actions, traces = first_actions(toy(bad), make_rule(name, **TINY[name]), calls=2)
    assert (actions <= 0.2).all() and np.isfinite(actions).all()
    assert np.isfinite(traces[1]["mean"][0]).all() and (traces[1]["best"] <= 0.4 + 1e-6).all()
    nothing, _ = first_actions(toy(lambda a, noise: a * jnp.nan), make_rule(name, **TINY[name]), calls=2)
    assert np.isfinite(nothing).all() and np.abs(nothing).max() <= 1


def lqr_plan(name: str, config=ONCE):
    planner = make_planner(LQR, make_rule(name, **TINY[name]), config)
    plan = jax.jit(lambda *args: planner.plan((), make_objective(), *args, mode="train"))
    return planner, plan


def test_a_batch_of_environments_and_seeds_equals_a_loop():
    """An environment's plan is that of itself alone, and a seed's too."""
    planner, plan = lqr_plan("mppi")
    state, first = points(), jnp.array([True, False, False])
    warm = jax.tree.map(lambda x: x, planner.init(E))
    warm = warm._replace(warm=warm.warm + jnp.array([0.1, 0.2, 0.3])[:, None, None])
    for e in range(E):
        roll = lambda tree: jax.tree.map(lambda x: jnp.roll(x, -e, 0), tree)
        one = lambda tree: jax.tree.map(lambda x: x[e : e + 1], tree)
        together = plan(roll(warm), roll(state), roll(first), ZERO)[0][0]
        alone = plan(one(warm), one(state), one(first), ZERO)[0][0]
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    keys = jax.random.split(ZERO, 2)
    double = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), state)
    seeds = jax.jit(jax.vmap(plan, (None, 0, None, 0)))(warm, double, first, keys)[0]
    for i in range(2):
        alone = plan(warm, jax.tree.map(lambda x: x[i], double), first, keys[i])[0]
        np.testing.assert_allclose(seeds[i], alone, rtol=1e-5, atol=1e-6)


def test_the_warm_start_is_forgotten_at_is_first():
    """Only in the environment whose episode begins."""
    planner, plan = lqr_plan("cem")
    state, key = points(), jax.random.key(1)
    fresh = planner.init(E)
    _, used, _ = plan(fresh, state, jnp.ones(E, bool), ZERO)
    np.testing.assert_array_equal(used.warm[:, -1], 0)
    mixed, cold, warm = (
        np.asarray(plan(w, state, jnp.array(f), key)[0])
        for w, f in ((used, [False, True, False]), (fresh, [False] * 3), (used, [False] * 3))
    )
    np.testing.assert_array_equal(mixed[1], cold[1])
    np.testing.assert_array_equal(mixed[[0, 2]], warm[[0, 2]])
    assert (warm[1] != cold[1]).all()


def test_blocks_and_replanning():
    """Plans of two actions of two steps each are executed in full, but for an episode that begins inside one;
    no search, no traces."""
    planner, plan = lqr_plan("random", config=PlanConfig(action_block=2, replan_every=2))
    state, warm, actions, searched = points(), planner.init(E), [], []
    for t in range(9):
        first = jnp.array([t == 0, t in (0, 3), t == 0])
        action, warm, info = plan(warm, state, first, jax.random.key(t))
        actions.append(np.asarray(action[:, 0]))
        searched.append(np.isfinite(info["best"][0]))
    searched, actions = np.array(searched), np.array(actions)
    np.testing.assert_array_equal(searched[:, 0], [True, False, False, False] * 2 + [True])
    np.testing.assert_array_equal(searched[:, 1], [t in (0, 3, 7) for t in range(9)])
    assert actions[0, 0] == actions[1, 0] != actions[2, 0] == actions[3, 0] != actions[4, 0] == actions[5, 0]
    assert actions[2, 1] != actions[3, 1] == actions[4, 1] != actions[5, 1] == actions[6, 1]


def test_particles_and_risk():
    """A gamble of high mean and high spread above 0, a small sure gain below: the risk measure decides."""
    gamble = lambda a, noise: jnp.where(a > 0, 1.0 + 4.0 * noise, 0.5)
    rule = make_rule("random", samples=16, horizon=1)
    for risk, risky in (("mean", True), ("worst", False), ("cvar", False)):
        config = PlanConfig(particles=64, risk=risk)
        # The mean of 64 particles is noisy, and the best of many is lucky: count environments.
        actions, _ = first_actions(toy(gamble), rule, config=config, batch=8)
        assert (actions > 0).all() if risky else (actions < 0).all()
    scores = np.random.default_rng(0).normal(size=(5, 8, 2)).astype(np.float32)
    scores[1, 2, 0] = np.nan
    tail = np.sort(scores, 1)[:, :2].mean(1)
    tail[1, 0] = -np.inf
    np.testing.assert_allclose(reduce_risk(jnp.asarray(scores), "cvar", 0.25), tail, rtol=1e-6)
    assert not np.isfinite(reduce_risk(jnp.asarray(scores), "worst", 0.25)[1, 0])
    assert expand(jnp.zeros((3, 2)), (4, 1)).shape == (4, 1, 3, 2)


@pytest.mark.parametrize("name", ["mppi", "cem", "random"])
def test_discrete_actions(name):
    """One-hot actions of which the third pays: it is found, and stays one-hot."""
    action = ArraySpec((4,), classes=4)
    world = toy(lambda a, noise: a)
    pays = world._replace(
        imagine_step=lambda params, ctx, state, action, key: Toy(
            action @ jnp.array([0.1, 0.2, 1.0, 0.3]), jnp.zeros(action.shape[:-1])
        )
    )
    actions, _ = first_actions(pays, make_rule(name, action, **TINY[name]), calls=2)
    np.testing.assert_array_equal(actions, np.broadcast_to(np.eye(4)[2], actions.shape))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_masked_actions_stay_zero(mode):
    """An entry that an environment does not have is 0 in every candidate and in the action, noise included."""
    seen = []

    def step(params, ctx, state, action, key):
        seen.append(action.shape)
        return Toy(jnp.where(action[..., 1] == 0, action[..., 0], jnp.nan), jnp.zeros(action.shape[:-1]))

    world = toy(lambda a, noise: a)._replace(
        imagine_step=step, mask=lambda params, state: jnp.array([[1.0, 0.0], [1.0, 0.0]])
    )
    planner = make_planner(world, make_rule("mppi", ArraySpec((2,)), **TINY["mppi"]))
    state = Toy(jnp.zeros(2), jnp.zeros(2))
    plan = jax.jit(
        lambda: planner.plan((), make_objective(), planner.init(2), state, jnp.ones(2, bool), ZERO, mode)
    )
    action, _, info = plan()
    assert (action[:, 1] == 0).all() and (action[:, 0] > 0.3).all() and np.isfinite(info["mean"]).all()
    assert seen and all(shape[-1] == 2 for shape in seen)


WRONG = [
    ("mppi", dict(samples=32), "search.elites is 64, it must be at most search.samples, which is 32"),
    ("mppi", dict(min_std=3.0), "search.min_std is 3.0"),
    ("cem", dict(smoothing=1.5), "search.smoothing is 1.5"),
    ("icem", dict(decay=0.5), "search.decay is 0.5"),
    ("icem", dict(samples=10, policy_samples=5), "search.samples is 10, it must be at least 15"),
    ("random", dict(iterations=0), "search.iterations is 0"),
    ("gradient", dict(learning_rate=0.0), "search.learning_rate is 0.0, it must be positive"),
    ("guided", dict(policy_samples=0), "search.policy_samples is 0"),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), WRONG)
def test_impossible_settings_of_rules(name, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        make_rule(name, **fields)


@pytest.mark.parametrize("name", ["icem", "gradient"])
def test_rules_for_continuous_actions_refuse_others(name):
    with pytest.raises(UserError, match=f"planner {name} searches continuous actions"):
        make_rule(name, ArraySpec((3,), classes=3))


@pytest.mark.parametrize(
    ("rule", "config", "sentence"),
    [
        ("random", PlanConfig(particles=0), "plan.particles is 0"),
        ("random", PlanConfig(replan_every=3), "plan.replan_every is 3, it must be at most search.horizon"),
        ("random", PlanConfig(risk_fraction=2.0), "plan.risk_fraction is 2.0"),
        ("guided", PlanConfig(), "search.policy_samples is 5, but there is no policy"),
    ],
)
def test_impossible_plans(rule, config, sentence):
    with pytest.raises(UserError, match=sentence):
        make_planner(LQR, make_rule(rule, **TINY.get(rule, {})), config)
