"""What every agent must do, written once for all, and where Dreamer's gradients may and may not go.

A new agent is one row in CASES. Gradients are read exactly: the optimiser is replaced by plain descent that
keeps the gradient as its state.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import losses, multitask, optimisers
from mbrl.agents import dreamer, pets, tdmpc
from mbrl.agents.dreamer import DreamerConfig
from mbrl.agents.pets import PETSConfig
from mbrl.agents.planning import with_planner
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.distributions import two_hot
from mbrl.errors import UserError
from mbrl.planning import make_objective, make_planner
from mbrl.types import Agent, ArraySpec, EnvSpec, Observed, Prediction, Starts, Trajectory, WorldModel
from planners import cem, mppi
from world_models import ensemble, rssm
from world_models import tdmpc as tdmpc_model
from world_models.ensemble import EnsembleConfig
from world_models.rssm import RSSMConfig
from world_models.tdmpc import TDMPCModelConfig

E, T, B, A = 3, 5, 2, 2
OBS = {"state": ArraySpec((3,))}
SPECS = {
    "continuous": EnvSpec("continuous", OBS, ArraySpec((A,))),
    "discrete": EnvSpec("discrete", OBS, ArraySpec((A,), classes=A)),
}
SPECS["two tasks"] = multitask.join(
    "two tasks",
    [SPECS["continuous"], EnvSpec("narrow", {"state": ArraySpec((2,))}, ArraySpec((1,)), max_steps=20)],
)
MODEL = RSSMConfig(
    stoch=2,
    classes=3,
    units=8,
    deter=8,
    hidden=8,
    blocks=1,
    prior_layers=1,
    encoder_layers=1,
    decoder_layers=1,
    bins=15,
    bin_limit=4.0,
)
BASE = DreamerConfig(units=8, actor_layers=1, critic_layers=1, horizon=3, bins=15, bin_limit=4.0)
TDMPC_MODEL = TDMPCModelConfig(
    latent=8, simnorm=4, encoder_units=8, units=8, bins=15, bin_limit=4.0, episodic=True, discount=0.9
)
TDMPC = TDMPCConfig(units=8, critics=3, bins=15, bin_limit=4.0)
SEARCH = mppi.MPPIConfig(horizon=2, iterations=2, samples=6, elites=3, policy_samples=2)
ENSEMBLE = EnsembleConfig(members=3, elites=2, holdout=0.4, layers=1, units=8, episodic=True, discount=0.9)
CEM = cem.CEMConfig(horizon=2, iterations=2, samples=6, elites=3)
LOCAL = dict(replay_context=False, replay_bootstrap="value")
CASES = {
    "reinforce": ("continuous", dataclasses.replace(BASE)),
    "reinforce discrete": ("discrete", dataclasses.replace(BASE, imag_last=2)),
    "dynamics": ("continuous", dataclasses.replace(BASE, actor_grad="dynamics", actor_average=0.9)),
    "dynamics random starts": (
        "continuous",
        dataclasses.replace(BASE, actor_grad="dynamics", imag_starts=4, **LOCAL),
    ),
    "tdmpc": ("continuous", TDMPC),  # acts by a planner, the next one by its policy
    "tdmpc discrete": ("discrete", TDMPC),
    "tdmpc two tasks": ("two tasks", TDMPC),
    "pets": ("continuous", PETSConfig()),  # acts by a planner, the next one at random
    "pets discrete": ("discrete", PETSConfig()),
}
NO_NOISE = (PETSConfig,)  # learning draws nothing at random but the batch
RATE = 0.01


def recorder(*args) -> optax.GradientTransformation:
    """Gradient descent whose state is the latest gradient."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -RATE * g, grads), grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def make_agent(config, spec: EnvSpec, model: WorldModel | None = None) -> Agent:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimisers, "make", recorder)
        if isinstance(config, PETSConfig):
            model = ensemble.make(ENSEMBLE, spec)
            agent = pets.make(config, spec, model, ENSEMBLE.discount, total_updates=100)
            if spec.action.classes:
                return agent
            simulator = pets.make_simulator(config, spec, model, ENSEMBLE.discount)
            planner = make_planner(simulator, cem.make(CEM, spec.action))
            return with_planner(agent, planner, make_objective(), partial(pets.acting_params, config))
        if isinstance(config, TDMPCConfig):
            # Several tasks have no termination head.
            settings = dataclasses.replace(TDMPC_MODEL, episodic=not spec.tasks, task_size=4)
            model = tdmpc_model.make(settings, spec)
            agent = tdmpc.make(config, spec, model, TDMPC_MODEL.discount, total_updates=100)
            if spec.action.classes:
                return agent
            simulator = tdmpc.make_simulator(config, spec, model, TDMPC_MODEL.discount)
            planner = make_planner(simulator, mppi.make(SEARCH, spec.action))
            return with_planner(agent, planner, make_objective(), partial(tdmpc.acting_params, config))
        model = rssm.make(MODEL, spec) if model is None else model
        return dreamer.make(config, spec, model, MODEL.discount, total_updates=100)


def randomise(train, seed: int = 99):
    """Noise on all parameters, so that heads that start at zero have gradients too."""

    def noisy(tree, seed):
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])

    fields = [name for name in ("params", "actor_average", "slow", "target") if hasattr(train, name)]
    return train._replace(**{name: noisy(getattr(train, name), seed + i) for i, name in enumerate(fields)})


def stores(config) -> bool:
    """Whether replay holds acting latents."""
    return isinstance(config, DreamerConfig) and config.replay_context


def state_of(actor):
    """The world model's part of an acting state."""
    return actor.agent.state if hasattr(actor, "agent") else actor.state


class Case(NamedTuple):
    spec: EnvSpec
    config: DreamerConfig | TDMPCConfig | PETSConfig
    agent: Agent
    train: dreamer.TrainState | tdmpc.TrainState | pets.TrainState
    traj: Trajectory
    act: object
    update: object


def make_case(config, spec: EnvSpec) -> Case:
    agent = make_agent(config, spec)
    train = randomise(jax.jit(agent.init)(jax.random.key(0)))
    act = jax.jit(agent.act, static_argnums=5)
    return Case(
        spec, config, agent, train, make_trajectory(agent, train, config, spec), act, jax.jit(agent.update)
    )


def make_trajectory(agent: Agent, train, config, spec: EnvSpec, seed: int = 0) -> Trajectory:
    """[T + context, B] random rows with an episode boundary, and acting latents where replay has them."""
    rng, rows = np.random.default_rng(seed), T + stores(config)
    action = rng.normal(size=(rows, B, A))
    if spec.action.classes:
        action = np.eye(A)[rng.integers(0, A, (rows, B))]
    first = np.zeros((rows, B), bool)
    first[3, 0] = True
    last = np.roll(first, -1, 0)
    latent = ()
    if stores(config):
        state = agent.init_actor(train, B).state
        latent = jax.tree.map(lambda x: rng.normal(size=(rows, *x.shape)), state)
    traj = Trajectory(
        {"state": rng.normal(size=(rows, B, 3))},
        action,
        rng.normal(size=(rows, B)),
        first,
        last,
        last,
        latent,
    )
    traj = jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), traj)
    return traj._replace(obs=with_task(spec, traj.obs))


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    kind, config = CASES[request.param]
    return make_case(config, SPECS[kind])


@pytest.fixture(scope="module")
def dreamer_case(case) -> Case:
    if not isinstance(case.config, DreamerConfig):
        pytest.skip("a part that only Dreamer has")
    return case


def obs_of(spec: EnvSpec, seed: int):
    return with_task(spec, {"state": jax.random.normal(jax.random.key(seed), (E, 3))})


def with_task(spec: EnvSpec, obs: dict):
    """Observations {"state": [..., batch, 3]}, and the number of the task of each batch entry."""
    if not spec.tasks:
        return obs
    lead = obs["state"].shape[:-1]
    return obs | {"task": jnp.broadcast_to(jnp.arange(lead[-1]) % len(spec.tasks), lead)}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def differ(a, b) -> bool:
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# Acting ----------------------------------------------------------------------------------------------------

NO, YES = jnp.zeros(E, bool), jnp.ones(E, bool)


def test_act_shapes(case):
    """float32 actions [E, A] in both modes: exactly one-hot, or with a mean in [-1, 1]; the actor state keeps
    its shapes, so that a scan can carry it and nothing is compiled twice."""
    actor = case.agent.init_actor(case.train, E)
    for mode in ("train", "eval"):
        action, after, info = case.act(case.train, actor, obs_of(case.spec, 0), YES, jax.random.key(0), mode)
        case.act(case.train, after, obs_of(case.spec, 1), NO, jax.random.key(1), mode)
        assert action.shape == (E, A) and action.dtype == jnp.float32
        if case.spec.action.classes:
            assert np.isin(action, (0.0, 1.0)).all() and (action.sum(-1) == 1).all()
        elif mode == "eval":
            assert (np.abs(action) <= 1).all()
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shapes(after) == shapes(actor)
        same(after.action, action)
        same(info["latent"], after.state if stores(case.config) else ())
    assert case.act._cache_size() == 2


def test_act_modes(case):
    """Evaluation is deterministic given the key, exploration varies with it; states are the same in both, and
    where somebody else will act."""
    actor, key = case.agent.init_actor(case.train, E), jax.random.key(0)
    run = lambda mode, key: case.act(case.train, actor, obs_of(case.spec, 0), YES, key, mode)
    same(run("eval", key), run("eval", key))
    assert len({run("train", jax.random.key(i))[0].tobytes() for i in range(20)}) > 1
    states = [state_of(run(mode, key)[1]) for mode in ("eval", "train", "watch")]
    same(states[0], states[1])
    same(states[0], states[2])


def test_act_evaluation_uses_the_average(dreamer_case):
    """With an averaged policy on, evaluation acts by it and exploration does not."""
    case = dreamer_case
    actor, key = case.agent.init_actor(case.train, E), jax.random.key(0)
    flipped = case.train._replace(actor_average=jax.tree.map(lambda x: -x, case.train.actor_average))
    actions = {
        (mode, name): case.act(train, actor, obs_of(case.spec, 0), YES, key, mode)[0]
        for mode in ("train", "eval")
        for name, train in (("plain", case.train), ("flipped", flipped))
    }
    same(actions["train", "plain"], actions["train", "flipped"])
    on = bool(case.config.actor_average)
    assert differ(actions["eval", "plain"], actions["eval", "flipped"]) == on


def test_is_first_clears_memory(case):
    """After an episode start, not one bit of the history is left, for that environment and no other."""
    used = case.agent.init_actor(case.train, E)
    for i in range(3):
        _, used, _ = case.act(case.train, used, obs_of(case.spec, i), NO, jax.random.key(i), "train")
    fresh, key = case.agent.init_actor(case.train, E), jax.random.key(9)
    middle = jnp.array([False, True, False])
    a = case.act(case.train, used, obs_of(case.spec, 5), middle, key, "eval")[:2]
    b = case.act(case.train, fresh, obs_of(case.spec, 5), middle, key, "eval")[:2]
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    same(at(a, 1), at(b, 1))
    for i in (0, 2):
        assert differ(at(a[1], i), at(b[1], i))


def test_memory_matters(case):
    """Without an episode start, another history gives another state."""
    actors = []
    for first_obs in (0, 1):
        actor = case.agent.init_actor(case.train, E)
        _, actor, _ = case.act(
            case.train, actor, obs_of(case.spec, first_obs), YES, jax.random.key(0), "eval"
        )
        actors.append(case.act(case.train, actor, obs_of(case.spec, 7), NO, jax.random.key(1), "eval")[1])
    assert differ(state_of(actors[0]), state_of(actors[1]))


# Learning --------------------------------------------------------------------------------------------------


def run_update(case: Case, train=None, traj=None, seed=0):
    train, traj = case.train if train is None else train, case.traj if traj is None else traj
    return case.update(train, traj, jax.random.key(seed))


def test_update(case):
    """Finite scalar metrics with the loss among them; every parameter moves; the state keeps its structure,
    shapes and dtypes; nothing is compiled twice."""
    new, info = run_update(case)
    again, _ = run_update(case, new, seed=1)
    assert case.update._cache_size() == 1
    assert {"loss", "grad_norm"} <= set(info.metrics)
    assert all(x.shape == () and np.isfinite(x) for x in info.metrics.values()), info.metrics
    moved = jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), case.train.params, new.params)
    still = [jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(moved) if not m]
    # The last critic layer is all that a head fed by dead units could move; here everything must.
    assert not still
    assert again.updates == case.train.updates + 2
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(new) == shapes(case.train)


def test_update_is_pure(case):
    """The same inputs give the same result, bit by bit; another key another one, where learning has noise."""
    same(run_update(case), run_update(case))
    noisy = not isinstance(case.config, NO_NOISE)
    assert differ(run_update(case)[0].params, run_update(case, seed=1)[0].params) == noisy


def test_moving_averages(dreamer_case):
    """The slow critic and the averaged policy follow the NEW parameters at their rates; percentiles move."""
    case = dreamer_case
    new, _ = run_update(case)
    rate = case.config.slow_rate
    expected = jax.tree.map(lambda s, p: (1 - rate) * s + rate * p, case.train.slow, new.params["critic"])
    close(new.slow, expected)
    if case.config.actor_average:
        decay, old = case.config.actor_average, case.train.actor_average
        close(
            new.actor_average,
            jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, old, new.params["actor"]),
        )
    else:
        assert new.actor_average == ()
    assert new.return_norm.high != 0 and new.return_norm.low <= new.return_norm.high


def test_advantages_are_measured_by_the_spread_of_returns(dreamer_case):
    """The actor's loss is a sum of what is divided by the spread and of what is not, the entropy."""

    def measured(spread):
        norm = losses.ReturnNorm(jnp.float32(0.0), jnp.float32(spread))
        metrics = run_update(dreamer_case, dreamer_case.train._replace(return_norm=norm))[1].metrics
        return float(metrics["actor_loss"]), 1 / float(metrics["return_scale"])

    (a, by_a), (b, by_b), (rest, by_rest) = measured(3.0), measured(6.0), measured(1e6)
    assert by_a == pytest.approx(2 * by_b, rel=0.1)
    assert a != b and (a - rest) / (b - rest) == pytest.approx((by_a - by_rest) / (by_b - by_rest), rel=1e-2)


def test_the_critic_learns_nothing_across_the_end_of_an_episode(dreamer_case):
    """Where every replayed row ends one, its loss on them is 0."""
    ends = dreamer_case.traj._replace(is_last=jnp.ones_like(dreamer_case.traj.is_last))
    loss = lambda traj: float(run_update(dreamer_case, traj=traj)[1].metrics["replay_value_loss"])
    assert loss(ends) == 0 < loss(dreamer_case.traj)


def test_initial_state_shares_no_buffers(case):
    """Leaves of a donated state must be separate arrays; the slow critic starts as a copy of the critic."""
    train = case.agent.init(jax.random.key(0))
    leaves = jax.tree.leaves((train, case.agent.init_actor(train, E)))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
    if "critic" in train.params:
        same(train.slow if hasattr(train, "slow") else train.target, train.params["critic"])


def test_context_row(case):
    """With replay context the first row supplies its latent and nothing else; without, every row is trained."""
    other = make_trajectory(case.agent, case.train, case.config, case.spec, seed=5)
    swap_row = lambda x, y: x.at[0].set(y[0])
    rows = jax.tree.map(swap_row, case.traj._replace(latent=()), other._replace(latent=()))
    base = run_update(case)
    changed = run_update(case, traj=rows._replace(latent=case.traj.latent))
    if not stores(case.config):
        assert differ(base[0].params, changed[0].params)
        assert base[1].latent == ()
        return
    same(base[0], changed[0])
    latent = jax.tree.map(swap_row, case.traj.latent, other.latent)
    assert differ(base[0].params, run_update(case, traj=case.traj._replace(latent=latent))[0].params)
    later = jax.tree.map(lambda x, y: y.at[0].set(x[0]), case.traj.latent, other.latent)
    same(base, run_update(case, traj=case.traj._replace(latent=later)))
    # Fresh posteriors of the trained rows go back, in the shapes and dtypes of the acting state.
    state = case.agent.init_actor(case.train, B).state
    assert jax.tree.map(lambda x: x.shape, base[1].latent) == jax.tree.map(lambda x: (T, *x.shape), state)


@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_extreme_data(case, scale):
    """Observations and rewards of 0 or a million give finite metrics and parameters."""
    traj = case.traj._replace(
        obs=case.traj.obs | {"state": case.traj.obs["state"] * scale},
        reward=case.traj.reward * scale,
        action=case.traj.action * scale,
    )
    new, info = run_update(case, traj=traj)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, info)))


# Gradient routing ------------------------------------------------------------------------------------------

NO_MODEL_LOSSES = dict.fromkeys(
    ("scale_rec", "scale_reward", "scale_cont", "scale_dyn", "scale_rep", "scale_replay_value"), 0.0
)


@pytest.fixture(scope="module", params=["reinforce", "dynamics"])
def pair(request) -> tuple[Case, Case]:
    """An agent, and the same with imagination losses alone."""
    kind, config = CASES[request.param]
    alone = dataclasses.replace(config, **NO_MODEL_LOSSES)
    return make_case(config, SPECS[kind]), make_case(alone, SPECS[kind])


def grads(case: Case, **changes):
    return run_update(case, case.train._replace(**changes))[0].opt


def test_behaviour_does_not_touch_the_model(pair):
    """Actor and critic losses in imagination have exactly no gradient in the world model."""
    _, alone = pair
    g = grads(alone)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(g["model"]))
    assert optax.global_norm(g["actor"]) > 0 and optax.global_norm(g["critic"]) > 0


def test_model_losses_do_not_touch_the_actor(pair):
    """The actor's gradient is the same with and without the losses of the world model and of replay."""
    full, alone = (grads(case) for case in pair)
    close(full["actor"], alone["actor"])
    assert differ(full["critic"], alone["critic"])  # replayed values do train the critic


def test_actor_loss_does_not_touch_the_critic(pair):
    """A return scale of 1e9 switches the policy gradient off: the actor's gradient changes, no other does."""
    for case in pair:
        norm = case.train.return_norm._replace(high=jnp.float32(1e11))
        a, b = grads(case), grads(case, return_norm=norm)
        assert differ(a["actor"], b["actor"])
        close((a["critic"], a["model"]), (b["critic"], b["model"]))


def test_critic_loss_does_not_touch_the_actor(pair):
    """Other targets of the slow critic: the critic's gradient changes, the actor's does not. The world model's
    does only through the replayed values."""
    for case, reaches_model in zip(pair, (True, False)):
        slow = jax.tree.map(lambda x: -x, case.train.slow)
        a, b = grads(case), grads(case, slow=slow)
        assert differ(a["critic"], b["critic"])
        close(a["actor"], b["actor"])
        assert differ(a["model"], b["model"]) == reaches_model


def test_actor_gradient_without_advantage_is_the_entropy(pair):
    """With the policy gradient off, what is left pulls the policy towards more entropy."""
    _, case = pair
    norm = case.train.return_norm._replace(high=jnp.float32(1e15))
    g = grads(case, return_norm=norm)["actor"]
    out = bias_of(g)
    assert (np.asarray(out[A:]) < 0).all()  # descending this gradient raises the standard deviations
    np.testing.assert_allclose(out[:A], 0, atol=1e-9)


# Against exact answers, on a world model that is transparent -----------------------------------------------

CONT = 0.9


def transparent_model() -> WorldModel:
    """State = observation x [2], no randomness: x' = 0.8 x + action, reward = -|x - 0.3|^2, cont = 0.9."""

    def observe(params, state, traj, keys):
        x = traj.obs["x"]
        return Observed(x[-1], Starts((), x), x, {}, {})

    def predict(params, x):
        return Prediction(-jnp.square(x - 0.3).sum(-1), jnp.full(x.shape[:-1], CONT), {})

    return WorldModel(
        init=lambda key: {},
        init_state=lambda params, batch: jnp.zeros((batch, A)),
        observe=observe,
        observe_step=lambda params, state, action, obs, is_first, key: obs["x"],
        imagine_step=lambda params, ctx, x, action, key: 0.8 * x + action,
        predict=predict,
        features=lambda params, x: x,
        decode=lambda params, features: None,
        param_groups=dict,
    )


class Toy(NamedTuple):
    train: dreamer.TrainState
    traj: Trajectory
    update: object


def make_toy(batch: int = B, live: bool = False, **fields) -> Toy:
    """Dreamer on the transparent model. Unless ``live``, the policy's first layer is dead, so that actions do
    not depend on states and no stop-gradient in the policy's input can hide a term."""
    config = dataclasses.replace(BASE, return_rate=0.0, entropy=0.0, **{**LOCAL, **fields})
    spec = EnvSpec("toy", {"x": ArraySpec((A,))}, ArraySpec((A,)))
    agent = make_agent(config, spec, transparent_model())
    train = randomise(agent.init(jax.random.key(0)))
    actor = train.params["actor"]
    hidden = jax.tree.map(jnp.zeros_like, actor["mlp"]["dense0"])
    hidden["linear"]["bias"] = jnp.ones(BASE.units)
    hidden["norm"]["scale"] = jnp.ones(BASE.units)
    params = train.params if live else {**train.params, "actor": {**actor, "mlp": {"dense0": hidden}}}
    rng, flags = np.random.default_rng(1), jnp.zeros((T, batch), bool)
    numbers = [jnp.asarray(rng.normal(size=(T, batch, *s)), jnp.float32) for s in ((A,), (A,), ())]
    traj = Trajectory({"x": numbers[0]}, *numbers[1:], flags, flags, flags)
    return Toy(train._replace(params=params), traj, jax.jit(agent.update))


def bias_of(actor):
    """Biases of the policy's two outputs, mean and std [2A]."""
    return jnp.concatenate([actor["mean"]["bias"], actor["std"]["bias"]])


def set_bias(actor, bias, dead: bool = False):
    """The policy with these biases [2A]; dead: with kernels of zero, so that nothing else matters."""
    heads = zip(("mean", "std"), jnp.split(bias, 2))
    return actor | {
        name: {"kernel": actor[name]["kernel"] * (1 - dead), "bias": value} for name, value in heads
    }


def with_bias(toy: Toy, bias) -> dreamer.TrainState:
    return toy.train._replace(params={**toy.train.params, "actor": set_bias(toy.train.params["actor"], bias)})


def gradients_of_biases(toy: Toy):
    """The agent's own, and by finite differences of the actor's loss."""
    bias, key, step = bias_of(toy.train.params["actor"]), jax.random.key(3), 3e-3
    ours = bias_of(toy.update(toy.train, toy.traj, key)[0].opt["actor"])

    def loss(bias):
        return float(toy.update(with_bias(toy, bias), toy.traj, key)[1].metrics["actor_loss"])

    numeric = [(loss(bias + step * d) - loss(bias - step * d)) / (2 * step) for d in jnp.eye(2 * A)]
    assert np.abs(numeric).min() > 0.01
    return np.asarray(ours), np.asarray(numeric)


def test_dynamics_gradient_equals_finite_differences():
    """Through three imagined steps: samples, dynamics, rewards, lambda-return and the critic's bootstrap."""
    ours, numeric = gradients_of_biases(make_toy(actor_grad="dynamics"))
    np.testing.assert_allclose(ours, numeric, rtol=0.01, atol=2e-3)


def test_dynamics_gradient_is_cut_at_the_policys_input():
    """As published, the policy reads states without a gradient: over one step that changes nothing, over three
    the way through later actions' inputs is missing."""
    ours, numeric = gradients_of_biases(make_toy(live=True, actor_grad="dynamics", horizon=1))
    np.testing.assert_allclose(ours, numeric, rtol=0.01, atol=2e-3)
    ours, numeric = gradients_of_biases(make_toy(live=True, actor_grad="dynamics"))
    assert np.abs(ours - numeric).max() > 0.05 * np.abs(numeric).max()


def test_reinforce_and_dynamics_estimate_the_same_gradient():
    """Over one step and 20,000 samples both are the gradient of the expected return, which is known here: the
    score function has the right sign, scale, baseline and alignment of actions with rewards."""
    gradients, errors = {}, {}
    for name in ("dynamics", "reinforce"):
        toy = make_toy(batch=4000, actor_grad=name, horizon=1)
        runs = [bias_of(toy.update(toy.train, toy.traj, jax.random.key(i))[0].opt["actor"]) for i in range(4)]
        gradients[name], errors[name] = np.mean(runs, 0), np.std(runs, 0) / 2
    # Analytic, for the mean's pre-activation u: d/du E[-(y - 0.3)^2] = -2 (E[y] - 0.3) (1 - tanh^2(u)), plus the
    # bootstrap, which is left out by comparing estimators with each other.
    scale = np.abs(gradients["dynamics"]).max()
    assert scale > 0.05
    np.testing.assert_allclose(gradients["reinforce"], gradients["dynamics"], atol=0.1 * scale)
    np.testing.assert_array_less(errors["reinforce"], 0.1 * scale)


def test_imagined_return_is_the_lambda_return():
    """With a critic of zero and lambda 1, the return is the discounted sum of the rewards that the model
    predicts along its own rollout, counted from the first arrival."""
    toy = make_toy(actor_grad="dynamics", lam=1.0, horizon=3)
    dead = jax.tree.map(jnp.zeros_like, toy.train.params["critic"])
    # A policy of mean tanh(0.2) and the smallest standard deviation.
    bias = jnp.array([0.2, 0.2, -50.0, -50.0])
    train = with_bias(toy, bias)
    actor = set_bias(train.params["actor"], bias, dead=True)
    train = train._replace(params={"model": {}, "critic": dead, "actor": actor})
    metrics = [toy.update(train, toy.traj, jax.random.key(i))[1].metrics for i in range(200)]
    x = np.asarray(toy.traj.obs["x"], np.float64)
    total, discount, rewards, mean, variance = 0.0, 1.0, [], np.tanh(0.2), 0.1**2
    spread = 0.0
    for _ in range(3):
        x, spread = 0.8 * x + mean, 0.64 * spread + variance
        rewards.append((-((x - 0.3) ** 2) - spread).sum(-1))
        total, discount = total + discount * rewards[-1], discount * CONT
    returns = [total]  # of the start; the metric averages over the three first states of each rollout
    for k in (1, 2):
        returns.append(sum(CONT**i * r for i, r in enumerate(rewards[k:])))
    expected = np.mean([r.mean() for r in returns])
    got = np.mean([m["imagined_return"] for m in metrics])
    assert got == pytest.approx(expected, rel=0.01)
    assert np.mean([m["imagined_reward"] for m in metrics]) == pytest.approx(np.mean(rewards), rel=0.01)


def test_replayed_values_bootstrap_from_imagined_returns():
    """The replay loss equals the published formula from the metrics of the same states: each replayed state's
    own imagined return, in the right order, discounted by the agent's discount."""
    config = dict(
        replay_context=False, replay_bootstrap="imagined", horizon=1, lam=1.0, actor_grad="dynamics"
    )
    toy = make_toy(**config)
    # One imagined step with a policy of (nearly) no freedom: R_0 of every state is known but for its noise.
    bias = jnp.array([0.2, 0.2, -50.0, -50.0])
    actor = set_bias(toy.train.params["actor"], bias, dead=True)
    dead = jax.tree.map(jnp.zeros_like, toy.train.params["critic"])
    train = toy.train._replace(params={"model": {}, "critic": dead, "actor": actor}, slow=dead)
    got = float(toy.update(train, toy.traj, jax.random.key(0))[1].metrics["replay_value_loss"])
    # A critic of zeros has the same loss for every target within its bins, so give it a slope.
    sloped = {**dead, "out": {**dead["out"], "bias": jnp.linspace(-1, 1, BASE.bins)}}
    assert got == pytest.approx(2 * np.log(BASE.bins), rel=1e-4)
    train = train._replace(params={**train.params, "critic": sloped})
    values = two_hot(jnp.linspace(-1, 1, BASE.bins), BASE.bin_limit)
    runs = [
        toy.update(train, toy.traj, jax.random.key(i))[1].metrics["replay_value_loss"] for i in range(100)
    ]
    x, reward = np.asarray(toy.traj.obs["x"], np.float64), np.asarray(toy.traj.reward, np.float64)
    arrived = 0.8 * x + np.tanh(0.2)
    boot = (-((arrived - 0.3) ** 2) - 0.01).sum(-1) + CONT * float(values.mean())
    returns = np.zeros((T - 1, B))
    future = boot[-1]
    for t in reversed(range(T - 1)):
        future = reward[t + 1] + MODEL.discount * future
        returns[t] = future
    wanted = values.loss(jnp.asarray(returns, jnp.float32)).mean() + values.loss(jnp.zeros(()))
    assert np.mean(runs) == pytest.approx(float(wanted), rel=0.01)


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("discrete", {"actor_grad": "dynamics"}),
        ("continuous", {"imag_starts": 4}),  # published bootstrap needs all states
        ("continuous", {"bins": 16}),
        ("continuous", {"horizon": 0}),
        ("continuous", {"lam": 1.5}),
    ],
)
def test_impossible_settings_are_refused(kind, fields):
    """One sentence that names the field, before anything is compiled."""
    with pytest.raises(UserError, match=f"agent.({'|'.join([*fields, 'replay_bootstrap'])})"):
        make_agent(dataclasses.replace(BASE, **fields), SPECS[kind])
