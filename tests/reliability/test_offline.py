"""``--offline``: an agent learns from recorded episodes, resumes exactly, and is refused what does not fit."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mbrl
from mbrl import dataset, envs
from mbrl.dataset import Dataset
from mbrl.errors import UserError
from mbrl.types import EnvSpec, Trajectory
from tests.reliability.test_command import TINY, TINY_TDMPC, load

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
    from mbrl import checkpoints, train

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
    found = dataset.from_run(tmp_path / "run")
    assert sum(len(e.reward) for e in found.episodes) == 2 * 2 * (60 + 50 + 45)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task cartpole", ["does not fit cartpole", "obs["]),
        ("--task pendulum --offline nowhere", ["no dataset in nowhere"]),
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
