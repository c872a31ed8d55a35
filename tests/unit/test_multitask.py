"""Several tasks in one agent: what is padded counts nowhere."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import world_models.tdmpc
from mbrl import checkpoints, multitask
from mbrl.agents import tdmpc
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.collect import random_action
from mbrl.distributions import symlog_two_hot, tanh_normal
from mbrl.drivers import make_pool, make_source
from mbrl.errors import UserError
from mbrl.finished import learned_by
from mbrl.programs import RunState
from mbrl.seeds import Seeds
from mbrl.types import ArraySpec, EnvSpec, Trajectory
from tests.helpers import TDMPC_MODEL

ONE = EnvSpec("one", {"a": ArraySpec((2,)), "b": ArraySpec((1,))}, ArraySpec((1,)), 2, 500)
TWO = EnvSpec("two", {"x": ArraySpec((5,))}, ArraySpec((3,)), 2, 100)
SPEC = multitask.join("both", [ONE, TWO])
CONFIG = TDMPCConfig(units=8, critics=2, bins=15, bin_limit=4.0, dropout=0.0)
MODEL = dataclasses.replace(TDMPC_MODEL, task_size=4, discount=0.0)


def trajectory(spec: EnvSpec, steps: int = 4, batch: int = 6) -> Trajectory:
    """Random rows; the sequences of several tasks alternate between them."""
    rng = np.random.default_rng(0)
    no = jnp.zeros((steps, batch), bool)
    action = rng.uniform(-1, 1, (steps, batch, spec.action.size))
    if spec.tasks:
        task = np.broadcast_to(np.arange(batch) % len(spec.tasks), (steps, batch))
        obs = {"state": rng.normal(size=(steps, batch, spec.obs["state"].size)), "task": task}
        action = action * multitask.action_mask(spec)[task]
    else:
        obs = {k: rng.normal(size=(steps, batch, *a.shape)) for k, a in spec.obs.items()}
    obs = {k: jnp.asarray(x, spec.obs[k].dtype) for k, x in obs.items()}
    reward = jnp.float32(rng.uniform(size=(steps, batch)))
    return Trajectory(obs, jnp.float32(action), reward, no.at[0].set(True), no, no)


def parts(spec: EnvSpec):
    model = world_models.tdmpc.make(MODEL, spec)
    return model, tdmpc.make(CONFIG, spec, model, 0.0 if spec.tasks else 0.99, 10)


def test_specs_and_tables_by_hand():
    assert SPEC.obs == {"state": ArraySpec((5,)), "task": ArraySpec((), "int32", 2)}
    assert SPEC.action == ArraySpec((3,)) and SPEC.max_steps == 500 and SPEC.tasks == (ONE, TWO)
    np.testing.assert_array_equal(multitask.action_mask(SPEC), [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_allclose(multitask.discounts(SPEC, 0.0), [0.99, 0.95])
    np.testing.assert_allclose(multitask.discounts(SPEC, 0.9), [0.9, 0.9])
    shown = multitask.pad_obs({"b": np.ones((7, 1)), "a": np.full((7, 2), 2.0)}, 0, SPEC)
    np.testing.assert_array_equal(shown["state"], np.tile([2, 2, 1, 0, 0], (7, 1)))
    assert shown["task"].shape == (7,) and not shown["task"].any()
    assert EnvSpec.of_json(dataclasses.asdict(SPEC)) == SPEC
    assert multitask.join("wide", [ONE], 9, 4).obs["state"].shape == (9,)
    each = multitask.by_task(SPEC, [[1, 10, 3, 30], [5, 50, 7, 70]])
    np.testing.assert_array_equal(each["one"], [2, 6])
    np.testing.assert_array_equal(each["two"], [20, 60])
    assert multitask.by_task(ONE, [[1.0]]) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action": ArraySpec((3,), classes=3)}, ["two", "discrete"]),
        ({"obs": {"x": ArraySpec((), "int32", 4)}}, ["two", "categories"]),
        ({"action_repeat": 1}, ["two", "one", "action repeat"]),
        ({"name": "one"}, ["one", "twice"]),
    ],
)
def test_tasks_that_do_not_fit_together(change, words):
    with pytest.raises(UserError) as error:
        multitask.join("both", [ONE, dataclasses.replace(TWO, **change)])
    assert all(word in str(error.value) for word in words)


def test_padding_has_no_noise_no_entropy_and_no_gradient():
    mask = jnp.array([1.0, 0.0, 0.0])
    out, noise = jnp.arange(6.0), jnp.array([0.3, -2.0, 1.0])
    alone = tanh_normal(out[jnp.array([0, 3])])
    np.testing.assert_array_equal(tanh_normal(out, mask).at(noise)[1:], 0)
    np.testing.assert_allclose(tanh_normal(out, mask).at(noise)[:1], alone.at(noise[:1]))
    np.testing.assert_allclose(tanh_normal(out, mask).inner_log_prob(noise), alone.inner_log_prob(noise[:1]))
    said = lambda out: tanh_normal(out, mask).at(noise).sum() + tanh_normal(out, mask).inner_log_prob(noise)
    gradient = np.asarray(jax.grad(said)(out))
    assert gradient[[0, 3]].all() and not gradient[[1, 2, 4, 5]].any()
    drawn = random_action(jax.random.key(0), SPEC, 4)
    np.testing.assert_array_equal(drawn != 0, multitask.action_mask(SPEC)[[0, 1, 0, 1]] != 0)


def test_embeddings_have_norm_one_at_most():
    model, _ = parts(SPEC)
    params = model.init(jax.random.key(0))
    assert np.abs(params["task"]).max() <= 0.02
    large = params | {"task": jnp.stack([jnp.full(4, 3.0), jnp.full(4, 0.1)])}
    for task, norm in ((0, 1.0), (1, 0.2)):
        state = model.init_state(large, 1)
        now = state.now._replace(task=jnp.array([task]))
        features = model.features(large, now)[0, MODEL.latent :]
        np.testing.assert_allclose(np.linalg.norm(features[:4]), norm, rtol=1e-6)
        np.testing.assert_array_equal(features[4:], multitask.action_mask(SPEC)[task])


def test_discounts_of_a_plan_are_those_of_its_task():
    model, _ = parts(SPEC)
    params = model.init(jax.random.key(0))
    now = model.init_state(params, 2).now._replace(task=jnp.array([0, 1]))
    np.testing.assert_allclose(model.predict(params, now).cont, [0.99, 0.95])


def test_targets_and_entropy_are_those_of_each_task():
    """With critics that say the same of everything and a policy of one deviation: the target has the discount
    of its task, the entropy's factor counts its actions."""
    _, agent = parts(SPEC)
    train, traj = agent.init(jax.random.key(0)), trajectory(SPEC, batch=600)
    spread = jax.random.normal(jax.random.key(1), (CONFIG.bins,))
    target = jax.tree.map(lambda x: x, train.target)
    target["out"]["bias"] = jnp.broadcast_to(spread, target["out"]["bias"].shape)
    value = float(symlog_two_hot(spread, CONFIG.bin_limit).mean())
    out = jax.tree.map(jnp.zeros_like, train.params["actor"]["out"])
    train = train._replace(
        target=target, params=train.params | {"actor": train.params["actor"] | {"out": out}}
    )
    metrics = jax.jit(agent.update)(train, traj, jax.random.key(2))[1].metrics
    rewards = np.asarray(traj.reward)[1:]
    own = [rewards[:, task::2].mean() + discount * value for task, discount in ((0, 0.99), (1, 0.95))]
    assert abs(value) > 0.1
    np.testing.assert_allclose(metrics["target_value"], np.mean(own), rtol=1e-4)
    # The log-deviation is -4; A times the negative log-density of A actions, whose squared noise is 1 on average.
    np.testing.assert_allclose(
        metrics["entropy_actor"], (1 + 9) / 2 * (0.5 * np.log(2 * np.pi) + 0.5 - 4), rtol=0.03
    )


@pytest.fixture(scope="module")
def updated():
    """An agent of two tasks before and after an update, and another batch of it."""
    _, agent = parts(SPEC)
    train = agent.init(jax.random.key(0))
    return agent, train, *jax.jit(agent.update)(train, trajectory(SPEC), jax.random.key(1))


def test_an_update_teaches_the_embeddings(updated):
    _, before, after, info = updated
    assert np.isfinite(info.metrics["loss"])
    assert (np.asarray(before.params["model"]["task"]) != np.asarray(after.params["model"]["task"])).all()


def test_actions_of_padding_are_zero(updated):
    agent, _, train, _ = updated
    obs = jax.tree.map(lambda x: x[0], trajectory(SPEC).obs)
    actor = agent.init_actor(train, 6)
    for mode in ("train", "eval"):
        action, _, _ = agent.act(train, actor, obs, jnp.ones(6, bool), jax.random.key(2), mode)
        np.testing.assert_array_equal(action != 0, multitask.action_mask(SPEC)[obs["task"]] != 0)


def test_one_padded_task_equals_the_task_alone():
    """With the weights of the task alone, and whatever weights for padding and embedding that is zero: the
    same latents, losses, actions and values."""
    wide = multitask.join("wide", [ONE], 5, 3)
    (alone, _), (padded, _) = parts(ONE), parts(wide)
    own, traj = alone.init(jax.random.key(0)), trajectory(ONE)
    other = padded.init(jax.random.key(1))
    other["task"] = jnp.zeros_like(other["task"])

    def widened(name: str, first: str, blocks):
        """The parameters of ``own`` with the rows of padding from ``other`` in between: (own rows, others)."""
        kernel, rows, at = own[name][first]["kernel"], [], 0
        foreign = other[name][first]["kernel"]
        begin = 0
        for kept, extra in blocks:
            rows += [kernel[at : at + kept], foreign[begin + kept : begin + kept + extra]]
            at, begin = at + kept, begin + kept + extra
        return own[name] | {first: own[name][first] | {"kernel": jnp.concatenate(rows)}}

    latent = MODEL.latent
    params = {
        "encoder": widened("encoder", "linear0", [(3, 2 + 4)]),
        "dynamics": widened("dynamics", "linear0", [(latent, 4), (1, 2)]),
        "reward": widened("reward", "linear0", [(latent, 4), (1, 2)]),
        "task": other["task"],
    }
    state = jnp.concatenate([traj.obs["a"], traj.obs["b"], jnp.zeros((4, 6, 2))], -1)
    action = jnp.concatenate([traj.action, jnp.zeros((4, 6, 2))], -1)
    same = traj._replace(obs={"state": state, "task": jnp.zeros((4, 6), jnp.int32)}, action=action)
    keys = jax.random.split(jax.random.key(2), 4)
    one = alone.observe(own, alone.init_state(own, 6), traj, keys)
    two = padded.observe(params, padded.init_state(params, 6), same, keys)
    np.testing.assert_allclose(one.features, two.features[..., :latent], atol=1e-6)
    np.testing.assert_allclose(one.predicted, two.predicted[..., :latent], atol=1e-6)
    for name, loss in one.losses.items():
        np.testing.assert_allclose(loss, two.losses[name], atol=1e-5)
    assert not two.features[..., latent : latent + 4].any()


def test_environments_take_turns_and_resume():
    """Number i has task i modulo their count, in training and evaluation; states go on exactly."""
    source = make_source("cartpole_swingup,cup_catch", 2)
    assert source.spec.obs["state"].shape == (8,) and source.spec.action.shape == (2,)
    pool, again = (make_pool(source, Seeds.make(seed, 1), 4, 0) for seed in (0, 1))
    seen = pool.reset()
    np.testing.assert_array_equal(seen.obs["task"], [0, 1, 0, 1])
    assert not seen.obs["state"][::2, 5:].any()
    action = np.tile(np.float32([0.5, 0.0]), (4, 1))
    again.reset()
    again.set_state(pool.get_state())
    no = np.zeros(4, bool)
    jax.tree.map(np.testing.assert_array_equal, pool.step(action, no), again.step(action, no))
    with pytest.raises(UserError, match="on the host"):
        make_source("pendulum,cup_catch", 2)


def test_the_task_of_an_environment_depends_on_no_seed():
    """Those that a restarted worker draws are like any others."""
    make, seeds = make_source("mt3", 2).make_host, (8, 5, 3, 3, 1, 0)
    tasks = [int(make(seed, index).reset().obs["task"]) for index, seed in enumerate(seeds)]
    assert tasks == [0, 1, 2, 0, 1, 2]


THREE = dataclasses.replace(TWO, name="three")


@pytest.mark.parametrize(
    ("tasks", "similar", "weights"),
    [
        ([THREE], "", [[0.5, 0.5]]),
        ([THREE], "two", [[0, 1]]),
        ([TWO, THREE, ONE], "", [[0, 1], [0.5, 0.5], [1, 0]]),
        ([TWO, THREE, ONE], "one", [[0, 1], [1, 0], [1, 0]]),
        ([TWO, ONE], "", [[0, 1], [1, 0]]),
    ],
)
def test_embeddings_of_a_new_agent(tasks, similar, weights):
    """Known tasks keep theirs in whatever order; new ones begin like the named one, or in the middle."""
    found = multitask.embeddings(SPEC, multitask.join("new", tasks, 5, 3), similar)
    np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize(
    ("before", "spec", "similar", "words"),
    [
        (ONE, SPEC, "", ["learned one", "has both", "single task"]),
        (SPEC, ONE, "", ["learned both", "has one", "single task"]),
        (multitask.join("small", [ONE]), SPEC, "", ["both has 5", "3 actions", "take 3 and 1"]),
        (SPEC, multitask.join("new", [THREE], 5, 3), "on", ["task_like is 'on'", "one, two"]),
        (SPEC, multitask.join("old", [ONE], 5, 3), "two", ["task_like is 'two'", "learned every task"]),
    ],
)
def test_agents_that_cannot_start_from_one_another(before, spec, similar, words):
    with pytest.raises(UserError) as error:
        multitask.embeddings(before, spec, similar)
    assert all(word in str(error.value) for word in words), error.value


def test_episodes_are_padded_like_what_is_seen():
    rows = trajectory(ONE, batch=1)
    episode = jax.tree.map(lambda x: np.asarray(x[:, 0]), rows)
    padded = multitask.pad_episode(episode, 0, SPEC)
    state = np.concatenate([episode.obs["a"], episode.obs["b"], np.zeros((4, 2))], -1)
    np.testing.assert_array_equal(padded.obs["state"], np.float32(state))
    np.testing.assert_array_equal(padded.obs["task"], np.zeros(4))
    np.testing.assert_array_equal(padded.action, np.pad(episode.action, ((0, 0), (0, 2))))
    np.testing.assert_array_equal(padded.reward, episode.reward)


def test_a_new_agent_takes_all_but_mixes_embeddings(tmp_path):
    """Two seeds that learned two tasks, and an agent of three."""
    rng = np.random.default_rng(0)
    weights = lambda tasks: {"task": jnp.float32(rng.normal(size=(2, tasks, 4))), "w": jnp.ones((2, 3))}
    state = lambda model: tdmpc.TrainState({"model": model}, {}, (), (), jnp.full(2, 7.0), jnp.zeros(2))
    before, after = state(weights(2)), state(weights(3))
    checkpoints.save(tmp_path / "checkpoints", 1, RunState(before, (), (), (), ()))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"num_seeds": 2}}))
    spec = multitask.join("new", [TWO, THREE, ONE], 5, 3)
    found = learned_by(tmp_path, after, 2, multitask.embeddings(SPEC, spec))
    one, two = np.moveaxis(np.asarray(before.params["model"]["task"]), 1, 0)
    table = np.stack([two, (one + two) / 2, one], 1)
    np.testing.assert_allclose(found["params"]["model"]["task"], table, atol=1e-6)
    np.testing.assert_array_equal(found["params"]["model"]["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(found["scale"], [7, 7])
