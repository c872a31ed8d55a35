"""``--offline``: an agent learns from recorded episodes, resumes exactly, and is refused what does not fit."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mbrl
import world_models.tdmpc
from mbrl import checkpoints, dataset, envs, finished
from mbrl.agents import tdmpc
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import override
from mbrl.dataset import Dataset
from mbrl.drivers import make_source
from mbrl.errors import UserError
from mbrl.presets import TDMPC as PRESETS
from mbrl.programs import RunState
from mbrl.types import EnvSpec, Trajectory
from tests.reliability.test_command import TINY, TINY_TDMPC, load
from world_models.tdmpc import TDMPCModelConfig

SPEC = envs.make_jax("pendulum").spec
FEW = "--steps 40 --loop.log-every 20 --loop.checkpoint-every 20 --loop.eval-every 20".split()  # noqa: SIM905


def recorded(spec: EnvSpec = SPEC, lengths=(60, 50, 45)) -> Dataset:
    rng = np.random.default_rng(0)

    def episode(length):
        first = np.arange(length) == 0
        obs = {k: rng.normal(size=(length, *a.shape)).astype(a.dtype) for k, a in spec.obs.items()}
        action = rng.uniform(-1, 1, (length, spec.action.size)).astype(np.float32)
        reward = rng.uniform(size=length).astype(np.float32)
        return Trajectory(obs, action, reward, first, first[::-1], first & False)

    return Dataset(spec, [episode(n) for n in lengths], "made by a test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline") / "data"
    dataset.save(folder, recorded())
    return folder


def test_columns_by_hand():
    """Rows in order, cut into columns; a first row has neither action nor reward, wherever it was cut."""
    found = recorded(lengths=(5, 4, 2))
    found.episodes[1].is_first[0] = False  # replay had overwritten its beginning
    rows = dataset.columns(found, 2, 4)
    every = np.concatenate([e.obs["velocity"] for e in found.episodes])
    np.testing.assert_array_equal(rows.obs["velocity"][:, 0], every[:5])
    np.testing.assert_array_equal(rows.obs["velocity"][:, 1], every[5:10])
    np.testing.assert_array_equal(rows.is_first.T, [[1, 0, 0, 0, 0], [1, 0, 0, 0, 1]])
    assert not rows.action[rows.is_first].any() and not rows.reward[rows.is_first].any()
    np.testing.assert_array_equal(rows.action[1:, 0], found.episodes[0].action[1:])
    with pytest.raises(UserError, match=r"11 rows.*at least 12.*loop.num_envs 2"):
        dataset.columns(found, 2, 6)


@pytest.mark.slow
def test_dreamer_learns_and_loads(tmp_path, data):
    """Without an environment: updates are the clock, nothing is evaluated."""
    learned(load("dreamer_dmc"), [*TINY, *FEW, "--offline", str(data)], tmp_path / "run")


def learned(main, flags, folder):
    """A finished run, whose agents act."""
    main([*flags, "--run-dir", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == summary["env_steps"] == 40 and "eval_return" not in summary
    found = mbrl.load(folder)
    action, _ = found.act({k: np.zeros(a.shape, np.float32) for k, a in SPEC.obs.items()})
    assert action.shape == (1,) and np.isfinite(action).all() and found.spec == SPEC
    with pytest.raises(UserError, match="without an environment"):
        found.evaluate()
    return found


def test_tdmpc_learns_resumes_and_loads(tmp_path, data, monkeypatch):
    """The same, and a run that was stopped ends as the one that was not."""
    from mbrl import train

    whole, part = tmp_path / "whole", tmp_path / "part"
    flags, main = [*TINY_TDMPC, *FEW, "--offline", str(data)], load("tdmpc_dmc")
    found = learned(main, flags, whole)
    with monkeypatch.context() as patched:
        kept = checkpoints.save
        patched.setattr(train.checkpoints, "save", lambda *args, **k: kept(*args, **k) and stop())
        with pytest.raises(KeyboardInterrupt):
            main([*flags, "--run-dir", str(part)])
    with pytest.raises(UserError, match="a run of the agent tdmpc, which this script cannot resume"):
        load("dreamer_dmc")(["--resume", "--run-dir", str(part)])
    main(["--resume", "--run-dir", str(part)])
    jax.tree.map(np.testing.assert_array_equal, found.train, mbrl.load(part).train)


def stop():
    raise KeyboardInterrupt


def test_is_evaluated_where_there_is_an_environment(tmp_path, data):
    """With --task, and the seeds differ by their draws from the same data."""
    flags = [*TINY_TDMPC, *FEW, "--offline", f"{data},{data}", "--task", "pendulum", "--num-seeds", "2"]
    load("tdmpc_dmc")([*flags, "--run-dir", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [e["env_steps"] for e in summary["evaluations"]] == [20, 40]
    assert np.shape(summary["eval_return"]["episodes"]) == (2, 2)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Return against updates" in page and "frames" not in page.split("<h2>")[1]
    found = dataset.from_run(tmp_path / "run")  # of one seed, as the other has the same
    assert sum(len(e.reward) for e in found.episodes) == 2 * (60 + 50 + 45)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task cartpole", ["does not fit cartpole", "obs["]),
        ("--steps 400 --task pendulum --offline nowhere", ["no dataset in nowhere"]),
        ("--task none --offline=", ["--task none", "--offline"]),
        ("--loop.num-envs 80", ["155 rows", "at least 320"]),
        ("--steps 0", ["steps is 0"]),
    ],
)
def test_mistakes_are_sentences(tmp_path, data, flags, words):
    folder = tmp_path / "run"
    with pytest.raises(UserError) as error:
        load("tdmpc_dmc")(
            [*TINY_TDMPC, *FEW, "--offline", str(data), "--run-dir", str(folder), *flags.split()]
        )
    assert all(word in str(error.value) for word in words), error.value
    assert not folder.exists()


def test_action_repeat_must_be_that_of_the_data(tmp_path):
    with pytest.raises(UserError, match=r"action repeat of 3, .* has 2: set loop.action_repeat to 3"):
        dataset.check_fits(
            "data", EnvSpec("x", SPEC.obs, SPEC.action, 3), EnvSpec("x", SPEC.obs, SPEC.action, 2)
        )


TASKS = ("cartpole_swingup", "pendulum_swingup")


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    """A dataset of each of two tasks, and a run of an agent that knows the first and a third one."""
    folder = tmp_path_factory.mktemp("each")
    for task, rows in zip(TASKS, (60, 40)):
        dataset.save(folder / task, recorded(make_source(task, 2).spec, (rows, 50)))
    spec = make_source("cartpole_swingup,cup_catch", 2).spec
    # As TINY_TDMPC has them.
    model = override(
        TDMPCModelConfig(), PRESETS["s"]["model"] | {"latent": 8, "units": 8, "encoder_units": 8}
    )
    agent = override(TDMPCConfig(), PRESETS["s"]["agent"] | {"units": 8})
    agent = tdmpc.make(agent, spec, world_models.tdmpc.make(model, spec), 0.0, 1)
    train = jax.vmap(agent.init)(jax.random.split(jax.random.key(7), 1))
    checkpoints.save(folder / "parent" / "checkpoints", 1, RunState(train, (), (), (), ()))
    config = {"task": "cartpole_swingup,cup_catch", "loop": {"action_repeat": 2}, "num_seeds": 1, "agent": {}}
    (folder / "parent" / "config.json").write_text(json.dumps({"agent": "tdmpc", "config": config}))
    return folder, train


@pytest.mark.slow
def test_several_tasks_from_a_dataset_of_each_and_another_agent(tmp_path, each, monkeypatch):
    """What the agent knew stays, its new task begins like the one that is named; the run is evaluated task by
    task, and is loaded without the other one."""
    (folder, parent), begun = each, []
    start_from = finished.start_from

    def keep(*args):
        begun.append(jax.device_get(start_from(*args).params))  # copied, since it is donated
        return start_from(*args)

    monkeypatch.setattr(finished, "start_from", keep)
    data = ",".join(str(folder / task) for task in reversed(TASKS))
    learner = TINY_TDMPC[: TINY_TDMPC.index("--search.samples")]  # without a planner
    flags = [*learner, "--planner", "none", "--steps", "20", "--loop.log-every", "20"]
    flags += ["--loop.eval-episodes", "1", "--offline", data, "--task", ",".join(TASKS)]
    flags += ["--from-run", str(folder / "parent"), "--task-like", "cup_catch"]
    load("tdmpc_dmc")([*flags, "--run-dir", str(tmp_path / "run")])
    # Its tasks are cartpole_swingup and the one that the new task is like.
    jax.tree.map(np.testing.assert_array_equal, begun[0], jax.device_get(parent.params))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["padding"] == [8, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["eval_return"]["tasks"]) == set(TASKS) and summary["updates"] == 20
    monkeypatch.setattr(finished.RunFolder, "config_of", lambda path: stored)  # the parent is not read
    found = mbrl.load(tmp_path / "run")
    rows = dataset.from_run(tmp_path / "run")
    numbers, counts = np.unique(np.concatenate([e.obs["task"] for e in rows.episodes]), return_counts=True)
    np.testing.assert_array_equal(numbers, [0, 1])
    assert found.spec.obs["state"].shape == (8,) and list(counts) == [110, 90]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--offline {0}/cartpole_swingup", ["no episodes of pendulum_swingup"]),
        ("--offline {0}/cartpole_swingup,{0}/wrong", ["wrong", "pendulum, which is none of the tasks"]),
        (
            "--offline {0}/cartpole_swingup,{0}/pendulum_swingup --task-like cup_catch",
            ["task_like", "--from-run"],
        ),
        (
            "--steps 400 --task walker_walk --from-run {0}/parent",
            ["walker_walk has 24", "6 actions", "take 8 and 2"],
        ),
        (
            "--steps 400 --task pendulum_swingup --from-run {0}/parent --task-like cheetah_run",
            ["task_like", "cup_catch"],
        ),
        ("--steps 400 --task pendulum --from-run {0}/parent", ["on the host"]),
    ],
)
def test_tasks_that_cannot_be_learned_together(tmp_path, each, data, flags, words):
    folder = each[0]
    if not (folder / "wrong").exists():
        (folder / "wrong").symlink_to(data)
    with pytest.raises(UserError) as error:
        both = ["--task", ",".join(TASKS), "--run-dir", str(tmp_path / "run")]
        load("tdmpc_dmc")([*TINY_TDMPC, *FEW, *both, *flags.format(folder).split()])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run").exists()
