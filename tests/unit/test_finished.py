"""A finished run: the rebuilt agents do what the run's own did."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import mbrl
from benchmarks.doubt import measure
from mbrl import checkpoints, envs, finished, open_loop, prediction
from mbrl.drivers import Source
from mbrl.errors import UserError
from mbrl.programs import RunState
from mbrl.seeds import Seeds
from mbrl.types import Trajectory
from tests.helpers import TINY, assert_same, on_one_device, one_seed, script, stored_run, tiny_tdmpc_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    script("dreamer_dmc")([*TINY, "--run-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def run(run_dir):
    return mbrl.load(run_dir)


@pytest.fixture(scope="module")
def played(run):
    return run.play(3)


def test_evaluation_is_that_of_the_run(run, run_dir):
    """The same start states and policies: the returns at the end of training again, exactly."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert run.frames == summary["env_steps"] and run.seeds.seeds == (5, 6)
    np.testing.assert_array_equal(run.evaluate(), summary["eval_return"]["episodes"])


def test_another_number_of_devices_evaluates_the_same(run, run_dir, monkeypatch):
    """A checkpoint of two devices on one: every return of every seed, but for rounding along the episodes."""
    assert run.seeds.shards == 2
    monkeypatch.setattr(finished.Seeds, "make", lambda first, count: on_one_device(5, 6, loop=True))
    elsewhere = mbrl.load(run_dir)
    assert elsewhere.seeds.shards == 1
    np.testing.assert_allclose(elsewhere.evaluate(), run.evaluate(), rtol=0.02)


def test_a_hundred_episodes_on_another_number_of_devices(run, run_dir, tmp_path, monkeypatch):
    """The command, on one device, from the checkpoint of two; what it writes is what two devices find."""
    monkeypatch.setattr(finished.Seeds, "make", lambda first, count: on_one_device(5, 6, loop=True))
    script("evaluate")([str(run_dir), "--num-episodes", "100", "--json", str(tmp_path / "result.json")])
    monkeypatch.undo()
    result = json.loads((tmp_path / "result.json").read_text())
    found = np.array(result["episodes"])
    assert found.shape == (2, 100)
    np.testing.assert_allclose(found, run.evaluate(100), rtol=0.02)
    np.testing.assert_allclose(result["per_seed"], found.mean(1))


def test_what_is_played_adds_up(run, played):
    returns, trajectory = played
    assert returns.shape == (2, 3) and trajectory.reward.shape == (2, 501, 3)
    np.testing.assert_allclose(trajectory.reward.sum(1), returns, rtol=1e-5, atol=1e-5)
    assert trajectory.is_first[:, 0].all() and not trajectory.is_first[:, 1:].any()
    assert trajectory.is_last[:, -1].all() and not trajectory.is_last[:, :-1].any()
    assert not trajectory.action[:, 0].any()


def test_acting_step_by_step(run, played):
    """In one environment or several, with the memory of what was seen; the same again is the same action."""
    trajectory = jax.tree.map(lambda x: x[1], played[1])
    batch, alone = None, None
    for t in range(4):
        obs = {k: v[t] for k, v in trajectory.obs.items()}
        actions, batch = run.act(obs, batch, seed=6)
        single, alone = run.act({k: v[0] for k, v in obs.items()}, alone, seed=6)
        assert actions.shape == (3, 1) and single.shape == (1,) and np.abs(actions).max() <= 1
        np.testing.assert_array_equal(np.asarray(batch.actor.action), actions)
    assert batch.step == 4
    one, two, forgotten = (
        run.act(obs, batch, is_first=first, seed=6)[0]
        for first in (None, np.zeros(3, bool), np.ones(3, bool))
    )
    np.testing.assert_array_equal(one, two)
    assert (one != forgotten).any()
    explored, _ = run.act(obs, batch, seed=6, mode="train")
    assert (explored != one).all()


def test_policies_of_seeds_differ(run, played):
    obs = {k: v[0, 0, 0] for k, v in played[1].obs.items()}
    assert run.act(obs, seed=5)[0] != run.act(obs, seed=6)[0]
    np.testing.assert_array_equal(run.act(obs)[0], run.act(obs, seed=5)[0])


def test_imagination_has_the_shapes_of_what_really_happened(run, played):
    past = jax.tree.map(lambda x: x[0, :5], played[1])
    future = jax.tree.map(lambda x: x[0, 5:9], played[1])
    imagined = run.imagine(past, future.action)
    assert {k: v.shape for k, v in imagined.obs.items()} == {"orientation": (4, 3, 2), "velocity": (4, 3, 1)}
    assert imagined.reward.shape == imagined.cont.shape == (4, 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(imagined))
    assert (np.asarray(imagined.cont) <= 1).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.act({"velocity": np.zeros(1)}), ["obs['orientation']", "(2,)"]),
        (lambda run: run.act({"orientation": np.zeros(3), "velocity": np.zeros(1)}), ["(2,)", "(3,)"]),
        (lambda run: run.act({"orientation": np.zeros(2), "velocity": np.zeros((2, 1))}), ["batch axis"]),
        (lambda run: run.act({}, mode="best"), ["mode", "best", "eval, train"]),
        (lambda run: run.evaluate(0), ["episodes is 0", "at least 1"]),
        (lambda run: run.learned(7), ["seed is 7", "5, 6"]),
        (lambda run: run.film("never.mp4"), ["pendulum", "render"]),
    ],
)
def test_mistakes_are_sentences(run, call, words):
    with pytest.raises(UserError) as error:
        call(run)
    assert all(word in str(error.value) for word in words), error.value


def test_acting_by_another_planner(run, run_dir):
    """The same parameters, other actions."""
    obs = {key: np.zeros((3, *entry.shape), np.float32) for key, entry in run.spec.obs.items()}
    planned = mbrl.load(run_dir, planner="random", search={"samples": 4, "horizon": 2}, plan={"value": 0.0})
    for ours, theirs in zip(jax.tree.leaves(run.train), jax.tree.leaves(planned.train), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(planned.act(obs)[0] - run.act(obs)[0]).max() > 0.01
    with pytest.raises(UserError, match="'agent', it must be one of: planner, search, plan"):
        mbrl.load(run_dir, agent={})


def test_evaluate_weighs_uncertainties(run_dir):
    """The flag reaches the plan: Dreamer reports none, so the planner that it names refuses the weight."""
    with pytest.raises(UserError, match="weighs 'disagreement', but this model has: none"):
        script("evaluate")([str(run_dir), "--planner", "random", "--uncertainty", "disagreement=-1"])


def test_another_planner_has_its_own_settings():
    stored = {"config": {"planner": "mppi", "search": {"elites": 3}, "plan": {"particles": 2}}}
    same = finished.act_by(stored, {"plan": {"value": 0.0}})["config"]
    assert same["search"] == {"elites": 3} and same["plan"] == {"particles": 2, "value": 0.0}
    other = finished.act_by(stored, {"planner": "icem", "search": {"samples": 8}})["config"]
    assert other["planner"] == "icem" and other["search"] == {"samples": 8}


def test_a_sweep_over_a_planner_can_act_by_another(tmp_path):
    """What was varied of the run's own planner is no setting of the other one, nor is what is given anew."""
    stored = stored_run("tdmpc_dmc", "mppi", {"units": 8}, {"units": 8, "encoder_units": 8, "latent": 8})
    stored |= {"vary": {"search.temperature": [0.3, 0.6], "agent.entropy": [0.1, 0.2]}}
    stored["config"] |= {"num_seeds": 2}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    parts, seeds = finished.rebuild(stored), Seeds.make(0, 2)
    train = seeds.program(parts.agent.init)(seeds.keys())
    assert set(train.hyper) == set(stored["vary"])
    checkpoints.save(tmp_path / "checkpoints", 1, RunState(train, (), (), (), ()))
    small = {"samples": 4, "horizon": 2}
    run = mbrl.load(tmp_path, planner="random", search=small)
    assert run.config["applied"] == ["agent.entropy"]
    assert run.act({"orientation": np.ones(2), "velocity": np.ones(1)})[0].shape == (1,)
    given = {"search": {"temperature": 0.5}}
    assert finished.act_by(stored, given)["applied"] == ["agent.entropy"]


def test_an_agent_without_a_policy_needs_a_planner(tmp_path):
    """Or it would be evaluated acting at random."""
    (tmp_path / "config.json").write_text(json.dumps(stored_run("pets", "random")))
    with pytest.raises(UserError, match="planner is none, but this agent has no policy"):
        mbrl.load(tmp_path, planner="none")


def test_doubt_of_many_weights_is_one_program(tmp_path):
    """What `benchmarks.doubt` measures is what a load with each of the weights measures, a compilation for each."""
    stored = stored_run("pets", "random", model={"units": 8})
    search = stored["config"]["search"] | {"samples": 16, "horizon": 3}
    stored["config"] |= {"task": "pendulum_dense", "num_seeds": 2, "search": search}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    parts, seeds = finished.rebuild(stored), Seeds.make(0, 2)
    train = seeds.program(parts.agent.init)(seeds.keys())
    checkpoints.save(tmp_path / "checkpoints", 1, RunState(train, (), (), (), ()))
    weights = [0.0, -30.0, 30.0]
    found = measure(str(tmp_path), "disagreement", weights, 2)
    for weight, returns in zip(weights, found, strict=True):
        alone = mbrl.load(tmp_path, plan={"uncertainty": f"disagreement={weight}"}).evaluate(2).mean(1)
        np.testing.assert_allclose(returns, alone, rtol=1e-4)
    assert len(np.unique(found)) == found.size


def test_the_discount_of_a_member_is_its_own():
    """Of what its world model expects, in a sweep over the discount."""
    stored = stored_run("tdmpc_dmc", "none", {"units": 8}, {"units": 8, "encoder_units": 8, "latent": 8})
    stored["config"] |= {"num_seeds": 2}
    parts, seeds = finished.rebuild(stored | {"vary": {"model.discount": [0.5, 0.9]}}), Seeds.make(0, 2)
    train = seeds.program(parts.agent.init)(seeds.keys())
    train = train._replace(hyper={"model.discount": np.float32([0.5, 0.9])})
    run = finished.Finished(Path(), stored, 0, parts, seeds, train)
    obs = {key: np.zeros((1, 1, *entry.shape), np.float32) for key, entry in run.spec.obs.items()}
    no = np.zeros((1, 1), bool)
    past = Trajectory(obs, np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.float32), ~no, no, no)
    for seed, discount in enumerate((0.5, 0.9)):
        imagined = run.imagine(past, np.zeros((2, 1, 1), np.float32), seed=seed)
        np.testing.assert_allclose(imagined.cont, discount, rtol=1e-6)


def test_no_run_and_settings_of_another_release(run_dir, tmp_path):
    with pytest.raises(UserError, match="no run"):
        mbrl.load(tmp_path)
    stored = json.loads((run_dir / "config.json").read_text())
    stored["config"]["model"]["deeper"] = 3
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="deeper"):
        mbrl.load(tmp_path)
    stored["config"]["model"].pop("deeper")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="no checkpoint"):
        mbrl.load(tmp_path)


def test_a_new_run_starts_from_what_was_learned(run, run_dir):
    """All but the optimiser: its moments and the count of updates are those of a new run."""
    fresh = run.seeds.program(run.agent.init)(jax.device_put(run.seeds.keys()[::-1], run.seeds.sharding))
    began = finished.start_from(finished.learned_by(run_dir, fresh, 2), fresh)
    for name in fresh._fields:
        expected = fresh if name in ("opt", "updates") else run.train
        assert_same(getattr(began, name), getattr(expected, name))
    assert int(run.train.updates[0]) > 0
    pointers = [s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(began) for s in x.addressable_shards]
    assert len(set(pointers)) == len(pointers)  # all of it is donated to the first update
    with pytest.raises(UserError, match="has 2 seeds, it must have 1 or as many as the new run, 3"):
        finished.learned_by(run_dir, fresh, 3)


def test_one_agent_can_start_many(run, run_dir, tmp_path):
    """Seeds of the new run all begin with the parameters of the only seed of the other."""
    stored = json.loads((run_dir / "config.json").read_text())
    stored["config"]["num_seeds"] = 1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    first = jax.tree.map(lambda x: x[:1], run.train)
    checkpoints.save(tmp_path / "checkpoints", 1, RunState(first, (), (), (), ()))
    began = finished.start_from(finished.learned_by(tmp_path, run.train, 2), run.train)
    for index in range(2):
        assert_same(one_seed(began.params, index), one_seed(run.train.params, 0))


def test_tdmpc_starts_without_its_optimisers(tmp_path):
    """A leaf that is no table (the scale of values) is found too, and both optimisers begin afresh."""
    env = envs.make_jax("pendulum")
    agent = tiny_tdmpc_run(Source(env.spec, env), Seeds.make(0, 1)).agent
    ours, fresh = (jax.vmap(agent.init)(jax.random.split(jax.random.key(i), 1)) for i in (0, 1))
    ours = jax.tree.map(lambda x: x + 1, ours)
    checkpoints.save(tmp_path / "checkpoints", 1, RunState(ours, (), (), (), ()))
    (tmp_path / "config.json").write_text(json.dumps({"agent": "tdmpc", "config": {"num_seeds": 1}}))
    began = finished.start_from(finished.learned_by(tmp_path, fresh, 1), fresh)
    for name in fresh._fields:
        expected = fresh if name in ("opt", "actor_opt", "updates") else ours
        assert_same(getattr(began, name), getattr(expected, name))
    with pytest.raises(UserError, match="is expected"):  # an agent of another kind
        finished.learned_by(tmp_path, fresh._replace(params={"other": fresh.scale}), 1)


def test_measured_prediction(run, played):
    """Numbers for every entry and seed, worse for a horizon than for a step; kept through JSON."""
    found = prediction.measure(run, played[1])
    horizon = found["horizon"]
    assert horizon == prediction.HORIZON and {"orientation", "velocity"} <= set(found["error"])
    for error in found["error"].values():
        assert error.shape == (2, horizon)
    assert np.isfinite(found["error"]["velocity"]).all()
    assert found["unchanged"]["velocity"][:, 0].max() < found["unchanged"]["velocity"].max()
    assert found["example"]["truth"]["orientation"].shape == (horizon, 2)


class Stage:
    """Draws an observation as one number, so that a film says what was drawn."""

    def pose(self, obs):
        assert set(obs) == {"orientation", "velocity"}
        self.brightness = np.uint8(100 + 50 * np.clip(obs["orientation"][0], -1, 1))

    def render(self, height, width):
        return np.full((2, 2, 3), self.brightness)

    def close(self):
        pass


def test_film_of_bodies(run, played, monkeypatch):
    """Above what happened around each point, below what the model expects, which is something else."""
    monkeypatch.setattr(open_loop, "_stage", lambda task: Stage())
    film = open_loop.measure(run, played[1], seed=6)["bodies"]
    assert film.shape == (open_loop.CONTEXT + open_loop.HORIZON, 2, open_loop.BODIES, 2, 2, 3)
    cosine = played[1].obs["orientation"][1, :, 0, 0]
    for n, point in enumerate((4, 229, 455)):
        around = cosine[point - 4 : point + 46]
        np.testing.assert_array_equal(film[:, 0, n, 0, 0, 0], (100 + 50 * around).astype(np.uint8))
    assert (film[:, 1] != film[:, 0]).any()


def test_command(run_dir, tmp_path, capsys):
    """All seeds and episodes, as table and JSON; a video is skipped in a sentence where nothing renders."""
    out = tmp_path / "result.json"
    script("evaluate")([str(run_dir), "--json", str(out), "--video", str(tmp_path / "a.mp4")])
    summary, result = json.loads((run_dir / "summary.json").read_text()), json.loads(out.read_text())
    assert result["episodes"] == summary["eval_return"]["episodes"] and result["seeds"] == [5, 6]
    assert result["iqm"] == pytest.approx(summary["eval_return"]["iqm"])
    printed = capsys.readouterr().out
    assert "seed 6" in printed and "render" in printed and not (tmp_path / "a.mp4").exists()


def test_a_run_of_another_script_is_no_start(tmp_path):
    """Such as one of `experiments/memory.py`, which trained a world model alone."""
    (tmp_path / "config.json").write_text(json.dumps({"config": {"task": "recall", "num_seeds": 1}}))
    flags = ["--task", "pendulum", "--preset", "s", "--run-dir", str(tmp_path / "new")]
    with pytest.raises(UserError, match="holds a run of another script"):
        script("tdmpc_dmc")([*flags, "--from-run", str(tmp_path)])
