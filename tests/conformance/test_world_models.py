"""What every world model must do, written once for all. A new world model is one row in TINY.

Nothing here knows a model's state: states are compared through ``features`` and ``predict``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import world_models
from mbrl import open_loop
from mbrl.config import config_type, load_factory, override
from mbrl.imagination import rollout
from mbrl.types import ArraySpec, EnvSpec, Trajectory, WorldModel

# Fields of each model's config that make it tiny. A name may have several rows, "name:variant".
LATENT = dict(stoch=3, classes=4, units=16, hidden=8, encoder_layers=1, decoder_layers=1, bins=15)
# Bins of 1e8 with random weights would cancel to few digits; below the free nats the prior has no gradient.
LATENT |= dict(bin_limit=4.0, free_nats=0.0, image_depth=2, image_blocks=2)
SSM = LATENT | dict(width=8, layers=2, ssm_size=8, ssm_blocks=2)
TINY = {
    "rssm": LATENT | dict(deter=16, blocks=2),
    "rssm:frame": LATENT | dict(deter=16, blocks=2, post_uses_deter=False, image_reading="mlp"),
    "s4wm": SSM,
    "r2i": SSM | dict(deter=12),
    "transformer": LATENT | dict(width=8, layers=2, heads=2, window=3, mlp_factor=2, concat_layers=True),
    "koopman": LATENT | dict(width=8, modes=8),
    "tdmpc": dict(latent=8, simnorm=4, encoder_units=8, units=8, bins=15, bin_limit=4.0, episodic=True)
    | dict(image_channels=4),
    "ensemble": dict(members=3, elites=2, holdout=0.2, layers=1, units=8, episodic=True, discount=0.9),
    "ensemble:ts1": dict(
        members=2, elites=2, layers=1, units=8, episodic=True, discount=0.9, propagation="ts1"
    ),
}

# Names that differ from another one by settings alone.
SAME = {"storm": "transformer", "transdreamer": "transformer"}
MEMORYLESS = {"tdmpc", "ensemble"}  # what they observe now is all they know; they predict from it by actions
FLOAT32 = {"ensemble"}  # their state is the observation itself, so that no activation may round it
STATISTICS = "['statistics']"  # parameters below are learned without gradients: `Observed.statistics`

T, B, A = 8, 3, 2
OBS = {
    "position": ArraySpec((3,)),
    "height": ArraySpec(()),
    "kinds": ArraySpec((2,), "int32", 4),
    "camera": ArraySpec((8, 8, 3), "uint8"),
    "depth": ArraySpec((8, 8, 1), "uint8"),
    "large": ArraySpec((41, 41, 1), "uint8"),
}
# TD-MPC2's convolutions need more pixels; an ensemble predicts the observations themselves.
CAMERAS = {"tdmpc": {"large"}, "ensemble": set()}
ACTIONS = {"continuous": ArraySpec((A,)), "discrete": ArraySpec((A,), classes=A)}
RESETS = np.zeros((T, B), bool)
RESETS[0, 0] = RESETS[3, 1] = RESETS[5, 1] = RESETS[4, 2] = True  # column 0 has none later


def tiny(name: str, row: str, fields: dict | None = None):
    """The factory of a name, and its config with the fields of a row."""
    factory = load_factory("world model", name, world_models.REGISTRY)
    return factory, override(config_type(factory)(), TINY[row] | (fields or {}))


@pytest.mark.parametrize("name", world_models.REGISTRY)
def test_every_world_model_has_a_row(name):
    """Its own, or that of the same file whose fields make it the same model, so that another would add nothing."""
    row = SAME.get(name, name)
    assert row in TINY, f"{name} needs a row in TINY"
    assert dataclasses.asdict(tiny(name, row)[1]) == dataclasses.asdict(tiny(row, row)[1])
    assert world_models.REGISTRY[name].partition(":")[0] == world_models.REGISTRY[row].partition(":")[0]


def make_model(row: str, action: str = "continuous", **fields) -> WorldModel:
    factory, config = tiny(row.partition(":")[0], row, fields)
    return factory(config, EnvSpec("conformance", obs_of(row), ACTIONS[action]))


def obs_of(row: str) -> dict[str, ArraySpec]:
    """Vectors and the images of a row; a trajectory has them all."""
    images = CAMERAS.get(row.partition(":")[0], {"camera", "depth"})
    return {k: v for k, v in OBS.items() if v.dtype != "uint8" or k in images}


def make_trajectory(seed: int, action: str = "continuous", scale: float = 1.0) -> Trajectory:
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(T, B, A)) if action == "continuous" else np.eye(A)[rng.integers(0, A, (T, B))]
    obs = {
        "position": scale * rng.normal(size=(T, B, 3)),
        "height": scale * rng.normal(size=(T, B)),
        "kinds": rng.integers(0, 4, (T, B, 2)).astype(np.int32),
    }
    for key in ("camera", "depth", "large"):
        obs[key] = rng.integers(0, 256, (T, B, *OBS[key].shape)).astype(np.uint8)
    last = np.roll(RESETS, -1, 0)
    last[-1] = False
    traj = Trajectory(obs, actions, rng.normal(size=(T, B)), RESETS, last, last & (rng.random((T, B)) < 0.5))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), traj)


class Case(NamedTuple):
    """A model, parameters that are nowhere zero, data, and its functions compiled once for this file."""

    name: str
    model: WorldModel
    params: dict
    traj: Trajectory
    keys: jax.Array
    init_state: object
    observe: object
    step: object
    imagine: object
    gradient: object


def randomise(params):
    """Adds noise, so that outputs that are initialised at zero say something too."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(99), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module", params=[(n, a) for n in TINY for a in ACTIONS], ids="-".join)
def case(request) -> Case:
    name, action = request.param
    model = make_model(name, action)
    params = randomise(jax.jit(model.init)(jax.random.key(0)))

    def loss(params, obs, state, traj, keys, weight):
        """Everything that a sequence says, as one number: losses and features."""
        seen = model.observe(params, state, traj._replace(obs={**traj.obs, **obs}), keys)
        return sum(x.mean() for x in seen.losses.values()) + (seen.features * weight).sum()

    @jax.jit
    def imagine(params, ctx, states, action, key):
        """One step of [..., B] states with one key for all leading axes, and what is said of the result."""
        step = lambda state: model.imagine_step(params, ctx, state, action, key)
        states = jax.vmap(step)(states)
        return model.features(params, states), model.predict(params, states)

    return Case(
        name,
        model,
        params,
        make_trajectory(0, action),
        jax.random.split(jax.random.key(1), T),
        jax.jit(model.init_state, static_argnums=1),
        jax.jit(model.observe),
        jax.jit(model.observe_step),
        imagine,
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1))),
    )


def observe(case: Case, traj: Trajectory | None = None, keys=None, state=None):
    state = case.init_state(case.params, B) if state is None else state
    return case.observe(
        case.params, state, case.traj if traj is None else traj, case.keys if keys is None else keys
    )


def step_through(case: Case, traj: Trajectory):
    """The acting states after every step of the trajectory."""
    state, states = case.init_state(case.params, B), []
    for t in range(T):
        obs = {k: v[t] for k, v in traj.obs.items()}
        state = case.step(case.params, state, traj.action[t], obs, traj.is_first[t], case.keys[t])
        states.append(state)
    return states


def features_of(case: Case, state):
    return case.model.features(case.params, case.model.starts(case.params, state).states)


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Sequences and steps ---------------------------------------------------------------------------------------


def test_sequence_mode_equals_step_mode(case):
    """``observe`` is ``observe_step`` step by step, samples and resets inside the sequence included."""
    seen = observe(case)
    for t, state in enumerate(step_through(case, case.traj)):
        close(features_of(case, state), seen.features[t])
    close(features_of(case, seen.state), seen.features[-1])
    close(case.model.features(case.params, seen.starts.states), seen.features)


def test_what_it_decodes_is_known_without_an_observation(case):
    """A report asks a model of any kind whether it predicts observations, before anything is played."""
    decodes = case.model.decode(case.params, observe(case).features) is not None
    assert open_loop._decodes(case.model, case.params) == decodes == (case.name != "tdmpc")


def test_steps_compile_once(case):
    """Neither new values nor a carried state trace again: a carry keeps shapes, dtypes and weak types."""
    seen = observe(case)
    observe(case, make_trajectory(5, "continuous"), state=seen.state)
    step_through(case, case.traj)
    assert case.observe._cache_size() == 1
    # A fresh state and a carried one.
    assert case.step._cache_size() == 1


def test_chunks_equal_one_call(case):
    """A sequence in two calls that hand the state on: same features, losses and final state."""
    whole = observe(case)
    half, state, parts = jax.jit(case.model.observe), case.init_state(case.params, B), []
    for part in (slice(0, T // 2), slice(T // 2, T)):
        cut = jax.tree.map(lambda x, part=part: x[part], case.traj)
        parts.append(half(case.params, state, cut, case.keys[part]))
        state = parts[-1].state
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *[(p.features, p.losses) for p in parts])
    close(joined, (whole.features, whole.losses))
    close(features_of(case, state), features_of(case, whole.state))


def test_samples_depend_on_the_keys(case):
    """The keys matter (a model without randomness may ignore them), one key per step: changing the last key
    leaves the steps before exactly as they were."""
    other = jax.random.split(jax.random.key(2), T)
    a, b = observe(case), observe(case, keys=case.keys.at[-1].set(other[-1]))
    same(a.features[:-1], b.features[:-1])
    stochastic = bool((np.asarray(observe(case, keys=other).features) != np.asarray(a.features)).any())
    assert stochastic == bool((np.asarray(a.features[-1]) != np.asarray(b.features[-1])).any())


def test_the_past_is_forgotten_at_is_first(case):
    """Everything before an episode start and the action at it may change: not one bit after it does."""
    first = jnp.zeros((T, B), bool).at[4].set(True)
    traj = case.traj._replace(is_first=first)
    other = make_trajectory(7)._replace(is_first=first)
    mixed = jax.tree.map(lambda a, b: a.at[:4].set(b[:4]), traj, other)
    mixed = mixed._replace(action=mixed.action.at[4].set(3.0))
    a = observe(case, traj)
    b = observe(case, mixed, case.keys.at[:4].set(jax.random.split(jax.random.key(3), 4)), state=a.state)
    assert (np.asarray(a.features[3]) != np.asarray(b.features[3])).any()
    same((a.features[4:], a.state), (b.features[4:], b.state))
    same(*(jax.tree.map(lambda x: x[4:], o.losses) for o in (a, b)))


def test_is_first_equals_a_fresh_state(case):
    """An episode start inside acting is exactly a fresh start, whatever the memory held, even if not finite."""
    obs = {k: v[0] for k, v in case.traj.obs.items()}
    action, yes = case.traj.action[0], jnp.ones(B, bool)
    fresh = case.init_state(case.params, B)
    used = step_through(case, case.traj)[-1]
    broken = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, used
    )
    args = obs, yes, case.keys[0]
    expected = case.step(case.params, fresh, jnp.zeros_like(action), *args)
    same(features_of(case, expected), features_of(case, case.step(case.params, used, action, *args)))
    nan = jnp.full_like(action, jnp.nan)
    same(features_of(case, expected), features_of(case, case.step(case.params, broken, nan, *args)))


def test_the_future_does_not_matter(case):
    """Everything after step 3 may change: not one bit of features and losses up to it does."""
    a, other = observe(case), make_trajectory(8)
    mixed = jax.tree.map(lambda x, y: x.at[4:].set(y[4:]), case.traj, other)
    b = observe(case, mixed, case.keys.at[4:].set(jax.random.split(jax.random.key(3), 4)))
    assert (np.asarray(a.features[4]) != np.asarray(b.features[4])).any()
    same(*(jax.tree.map(lambda x: x[:4], (o.features, o.losses)) for o in (a, b)))


def test_batch_entries_are_independent(case):
    a, other = observe(case), make_trajectory(8)
    mixed = jax.tree.map(lambda x, y: x.at[:, 1].set(y[:, 1]), case.traj, other)
    b = observe(case, mixed)
    assert (np.asarray(a.features[:, 1]) != np.asarray(b.features[:, 1])).any()
    for column in (0, 2):
        close(*(jax.tree.map(lambda x: x[:, column], (o.features, o.losses)) for o in (a, b)))


def gradient(case: Case, traj: Trajectory, weight, state=None):
    obs = {k: v for k, v in traj.obs.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    state = case.init_state(case.params, B) if state is None else state
    return case.gradient(case.params, obs, state, traj, case.keys, weight)


def test_gradients_are_causal(case):
    """Features of step 4 do not differentiate to later observations, nor across an episode start; they do
    to earlier ones of the same episode where the model has memory."""
    size = observe(case).features.shape[-1]
    weight = jnp.zeros((T, B, size)).at[4].set(jax.random.normal(jax.random.key(4), (B, size)))
    # The losses' own gradients are the same in both and cancel.
    with_features, without = (gradient(case, case.traj, w)[1][1] for w in (weight, 0 * weight))
    moved = {k: np.abs(np.asarray(with_features[k] - without[k])).reshape(T, B, -1).max(-1) for k in without}
    total = sum(moved.values())
    assert (total[5:] == 0).all()
    assert (total[4] > 0).all()
    remembers = case.name.partition(":")[0] not in MEMORYLESS
    assert (total[:3, 1] == 0).all() and (
        total[3, 1] > 0
    ) == remembers  # column 1 begins an episode at step 3
    assert (total[:4, 2] == 0).all()  # column 2 at step 4
    assert (total[:4, 0] > 0).any() == remembers  # column 0 only at step 0


# Imagination -----------------------------------------------------------------------------------------------


def test_imagination_from_posteriors_equals_continuing(case):
    """One imagined step from every posterior of a sequence is the step from the acting state at that time."""
    seen, action = observe(case), case.traj.action[0]
    key = jax.random.key(5)
    states = case.model.imagine_init(case.params, seen.starts, 1)
    features, prediction = case.imagine(case.params, seen.starts.ctx, states, action, key)
    assert features.shape[:2] == (T, B)
    for t, state in enumerate(step_through(case, case.traj)):
        start = case.model.starts(case.params, state)
        state = case.model.imagine_init(case.params, start, 1)
        alone = jax.tree.map(lambda x: x[None], state)
        ours, said = case.imagine(case.params, start.ctx, alone, action, key)
        close(
            (ours[0], said.reward[0], said.cont[0]), (features[t], prediction.reward[t], prediction.cont[t])
        )


@pytest.mark.parametrize("name", [name for name in world_models.LATENT if name not in SAME])
def test_imagination_along_the_taken_actions(name):
    """A latent of one class is known without seeing, so that imagining with the actions that were taken is
    observing: from all posteriors at once, from the last ones alone, and from a few in any order."""
    model, horizon = make_model(name, stoch=1, classes=1), 5
    params, traj = randomise(jax.jit(model.init)(jax.random.key(0))), make_trajectory(0)
    traj = traj._replace(is_first=jnp.zeros((T, B), bool).at[2, 1].set(True))
    keys = jax.random.split(jax.random.key(1), T)

    @jax.jit
    def futures(params, traj):
        """Features [H+1, ...] of what follows each start, in the three ways."""
        seen = model.observe(params, model.init_state(params, B), traj, keys)
        actions = jnp.stack([jnp.roll(traj.action, -1 - h, 0) for h in range(horizon)])
        few = jnp.array([13, 2, 22, 13])

        def imagine(select):
            states = jax.tree.map(select, seen.starts.states)
            given = jax.vmap(select)(actions)
            starts = seen.starts._replace(states=states)
            states, _ = rollout(model, params, starts, lambda f, k, t: given[t], jax.random.key(2), horizon)
            return model.features(params, states)

        flat = lambda x: x.reshape(T * B, *x.shape[2:])
        return seen.features, imagine(lambda x: x), imagine(lambda x: x[-3:]), imagine(lambda x: flat(x)[few])

    features, everything, last, few = futures(params, traj)
    for h in range(horizon + 1):
        for t in range(T - h):
            columns = [0, 1, 2] if t >= 2 or t + h < 2 else [0, 2]  # column 1 begins an episode at step 2
            close(everything[h, t, columns], features[t + h, columns])
    close(last, everything[:, -3:])
    close(few, everything.reshape(horizon + 1, T * B, -1)[:, [13, 2, 22, 13]])


def test_imagination_takes_any_leading_axes(case):
    """[T, B] at once equals the same states flattened, and predictions have just those axes."""
    seen = observe(case)
    action = jax.random.normal(jax.random.key(6), (T, B, A))
    flatten = lambda tree: jax.tree.map(lambda x: x.reshape(T * B, *x.shape[2:]), tree)

    def one(starts, action):
        state = case.model.imagine_init(case.params, starts, 3)
        state = case.model.imagine_step(case.params, starts.ctx, state, action, jax.random.key(7))
        return case.model.features(case.params, state), case.model.predict(case.params, state)

    features, said = jax.jit(one)(seen.starts, action)
    flat = jax.jit(one)(seen.starts._replace(states=flatten(seen.starts.states)), flatten(action))
    close(flatten((features, said)), flat)
    assert features.shape == seen.features.shape
    assert said.reward.shape == said.cont.shape == (T, B)
    assert said.reward.dtype == said.cont.dtype == jnp.float32
    assert ((said.cont > 0) & (said.cont < 1)).all()
    assert all(x.shape == (T, B) for x in said.uncertainty.values())


def test_imagination_draws_its_latents(case):
    """Another key, another imagined latent; the same key, the same one."""
    if case.name.partition(":")[0] not in world_models.LATENT:
        pytest.skip("has no latent that is drawn")
    seen, action = observe(case), case.traj.action[0]
    states = case.model.imagine_init(case.params, seen.starts, 1)
    first, again, other = (
        np.asarray(case.imagine(case.params, seen.starts.ctx, states, action, jax.random.key(seed))[0])
        for seed in (5, 5, 6)
    )
    assert (first == again).all() and (first != other).any(-1).mean() > 0.5


def test_actions_steer_imagination(case):
    """Another action, another future; actions beyond 1 are not ignored nor do they explode."""
    seen = observe(case)
    states = case.model.imagine_init(case.params, seen.starts, 1)
    outcomes = [
        case.imagine(case.params, seen.starts.ctx, states, jnp.full((B, A), a), jax.random.key(5))[0]
        for a in (-0.5, 0.5, 1e4)
    ]
    assert all(np.isfinite(x).all() for x in outcomes)
    assert (np.asarray(outcomes[0]) != np.asarray(outcomes[1])).any()


# Outputs ---------------------------------------------------------------------------------------------------


def test_shapes(case):
    """Losses are [T, B] and unscaled, metrics scalar, starts and features [T, B, ...], the carry [B, ...]."""
    seen = observe(case)
    assert seen.losses and all(x.shape == (T, B) and x.dtype == jnp.float32 for x in seen.losses.values())
    assert all(x.shape == () for x in seen.metrics.values())
    assert seen.features.ndim == 3 and seen.features.shape[:2] == (T, B)
    assert all(x.shape[:2] == (T, B) for x in jax.tree.leaves(seen.starts.states))
    assert all(x.shape[:1] == (B,) for x in jax.tree.leaves(seen.state))
    assert jax.tree.map(jnp.shape, seen.state) == jax.tree.map(jnp.shape, case.init_state(case.params, B))


def test_decode(case):
    """One distribution per observation key, for any leading axes; its mode has the key's entries."""
    features = observe(case).features
    decoded, single = case.model.decode(case.params, features), case.model.decode(case.params, features[0, 0])
    if decoded is None:
        pytest.skip("this model does not decode")
    assert set(decoded) == set(obs_of(case.name))
    for key, entry in obs_of(case.name).items():
        size = entry.size * (entry.classes or 1)
        assert decoded[key].mode().reshape(T, B, -1).shape == (T, B, size)
        assert single[key].mode().size == size
        close(single[key].mode().ravel(), decoded[key].mode()[0, 0].ravel(), 1e-4)


def test_losses_belong_to_their_step(case):
    """Another reward on arrival at step 2 of column 1, or a terminal there, changes losses there and nowhere
    else, and never features."""
    a = observe(case)
    for field, value in (("reward", 50.0), ("is_terminal", ~case.traj.is_terminal[2, 1])):
        changed = getattr(case.traj, field).at[2, 1].set(value)
        b = observe(case, case.traj._replace(**{field: changed}))
        same(a.features, b.features)
        differs = sum(np.asarray(a.losses[k]) != np.asarray(b.losses[k]) for k in a.losses) > 0
        assert differs[2, 1] and differs.sum() == 1


def test_continue_head_learns_the_discount(case):
    """The soft label is discount * (1 - terminal), so that ``cont`` needs no further discount."""
    seen = observe(case)
    if "cont" not in seen.losses:
        pytest.skip("this model has no continue head")
    cont = np.asarray(case.model.predict(case.params, seen.starts.states).cont, np.float64)
    target = (1 - 1 / 333) * (1 - np.asarray(case.traj.is_terminal, np.float64))
    np.testing.assert_allclose(
        seen.losses["cont"], -target * np.log(cont) - (1 - target) * np.log1p(-cont), rtol=1e-4
    )


# Robustness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_extreme_inputs(case, scale):
    """Observations of 0 or a million, huge actions and rewards: finite losses and gradients."""
    traj = make_trajectory(3, scale=scale)
    traj = traj._replace(action=traj.action * scale, reward=traj.reward * scale)
    loss, (params, obs) = gradient(case, traj, jnp.zeros_like(observe(case).features))
    assert np.isfinite(loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, obs)))


def test_every_parameter_learns(case):
    """No parameter is without a gradient on random data: an unused layer or a lost connection shows here. Only
    statistics have none; what a model observes moves them instead."""
    seen = observe(case)
    grads = gradient(case, case.traj, jnp.zeros((T, B, seen.features.shape[-1])))[1][0]
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not (np.asarray(g) != 0).any()
    ]
    assert all(name.startswith(STATISTICS) for name in dead), dead
    statistics = case.params.get("statistics", ())
    assert jax.tree.map(jnp.shape, seen.statistics) == jax.tree.map(jnp.shape, statistics)
    moved = jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), seen.statistics, statistics)
    assert len(dead) == len(jax.tree.leaves(moved)) and all(jax.tree.leaves(moved))


def test_init(case):
    """The same key gives the same float32 parameters, another key others; no two leaves share a buffer."""
    init = jax.jit(case.model.init)
    a, b, other = (init(jax.random.key(i)) for i in (0, 0, 1))
    same(a, b)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(a))
    assert jax.tree.structure(a) == jax.tree.structure(case.params)
    assert (ravel_pytree(a)[0] != ravel_pytree(other)[0]).any()
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((a, case.model.init_state(a, B)))]
    assert len(set(pointers)) == len(pointers)


def test_param_groups(case):
    """Every pattern is a regular expression that some parameter's path matches."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(case.params)
    ]
    for pattern, group in case.model.param_groups().items():
        assert any(re.search(pattern, path) for path in paths), pattern
        assert set(group) <= {"lr_scale", "weight_decay"}


def test_vmapped_seeds_equal_a_loop(case):
    """Two sets of parameters and trajectories under vmap: each as if alone."""
    params = jax.tree.map(lambda x: jnp.stack([x, x[::-1] * 0.9]), case.params)
    trajs = jax.tree.map(lambda *xs: jnp.stack(xs), case.traj, make_trajectory(9))
    keys = jnp.stack([case.keys, jax.random.split(jax.random.key(8), T)])
    state = case.init_state(case.params, B)
    together = jax.jit(jax.vmap(case.model.observe, in_axes=(0, None, 0, 0)))(params, state, trajs, keys)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], (params, trajs))
        alone = case.observe(one[0], state, one[1], keys[i])
        close(
            jax.tree.map(lambda x, i=i: x[i], (together.features, together.losses)),
            (alone.features, alone.losses),
        )


@pytest.mark.parametrize("name", [name for name in TINY if name.partition(":")[0] not in FLOAT32])
def test_bfloat16(name):
    """Activations and carried state in bfloat16 throughout (a scan would refuse a drift), losses and gradients
    in float32 and finite, close to those of float32."""
    model, reference = make_model(name, dtype="bfloat16"), make_model(name)
    params, traj = jax.jit(model.init)(jax.random.key(0)), make_trajectory(0)
    keys = jax.random.split(jax.random.key(1), T)

    def loss(model, params):
        seen = model.observe(params, model.init_state(params, B), traj, keys)
        return sum(x.mean() for x in seen.losses.values()), seen

    (value, seen), grads = jax.jit(jax.value_and_grad(lambda p: loss(model, p), has_aux=True))(params)
    assert seen.features.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((seen.losses, grads)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((seen.losses, grads)))
    np.testing.assert_allclose(value, jax.jit(lambda p: loss(reference, p)[0])(params), rtol=0.1)
    said = model.predict(params, model.imagine_init(params, seen.starts, 1))
    assert said.reward.dtype == said.cont.dtype == jnp.float32
