"""A run that is stopped at any moment and continued equals one that was not: state, logs, evaluations."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mbrl import checkpoints, diagnose, envs, evaluation
from mbrl.config import run_main
from mbrl.drivers import DeviceDriver, Source
from mbrl.errors import UserError
from mbrl.interruption import Interrupted, Interruption
from mbrl.logger import read_metrics
from mbrl.run_folder import RunFolder
from mbrl.train import Run, train
from tests.helpers import FRAMES, as_numpy, assert_same, on_one_device, tiny_run

ENV = envs.make_jax("pendulum", max_steps=6)
SOURCE = Source(ENV.spec, ENV)
ITERATIONS = 12
SETTINGS = {
    "log_every": 3 * FRAMES,
    "eval_every": 4 * FRAMES,
    "checkpoint_every": 4 * FRAMES,
    "eval_episodes": 2,
}


class OneCompilation(Run):
    """A run whose programs are made once for all tests."""

    made: dict = {}  # noqa: RUF012

    def programs(self):
        return self.made.setdefault("programs", super().programs())


@pytest.fixture(scope="module")
def run():
    seeds = on_one_device(0, 1)
    made = tiny_run(SOURCE, seeds, ITERATIONS, **SETTINGS)
    yield OneCompilation(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})
    OneCompilation.made.clear()


@pytest.fixture(scope="module", autouse=True)
def evaluate(run):
    """The evaluation is compiled once, too."""
    made = evaluation.make_device(run.agent, ENV, run.seeds, run.config.eval_episodes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluation, "make_device", lambda *args: made)
        yield made


def rows(folder):
    """Metrics without wall times."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


def final_state(run, folder):
    found = checkpoints.restore(folder / "checkpoints", run.shapes)
    return as_numpy(found.state)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(state, rows, summary) of the run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    with RunFolder.create(path, {}) as folder:
        summary = train(run, folder)
    return final_state(run, path), rows(path), summary


def at_call(monkeypatch, where, name, number, action):
    """Calls ``action`` just before the call ``number`` (0, 1, ...) of ``where.name``."""
    kept, calls = getattr(where, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) - 1 == number:
            action()
        return kept(*args, **kwargs)

    monkeypatch.setattr(where, name, wrapped)


def assert_whole(run, path, whole, summary):
    state, logged, expected = whole
    assert_same(final_state(run, path), state)
    assert rows(path) == logged
    for name in ("eval_return", "evaluations", "updates", "env_steps"):
        np.testing.assert_equal(summary[name], expected[name])


def advance(call):
    return lambda patched, evaluate, action: at_call(patched, DeviceDriver, "advance", call, action)


def save(patched, evaluate, action):
    at_call(patched, checkpoints, "save", 1, action)


def evaluating(patched, evaluate, action):
    holder = SimpleNamespace(evaluate=evaluate)
    at_call(patched, holder, "evaluate", 1, action)
    patched.setattr(evaluation, "make_device", lambda *args: holder.evaluate)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(advance(0), signal.SIGTERM, id="prefill"),
        pytest.param(advance(6), signal.SIGINT, id="chunk"),
        pytest.param(advance(7), signal.SIGTERM, id="before a scheduled save"),
        pytest.param(save, signal.SIGTERM, id="save"),
        pytest.param(evaluating, signal.SIGTERM, id="evaluation"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_exactly(run, whole, evaluate, tmp_path, moment, number):
    """The run ends with a checkpoint and says how to continue; continued, it is bit-equal and its log is the
    same line by line."""
    path, handler = tmp_path / "run", signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patched:
        moment(patched, evaluate, lambda: os.kill(os.getpid(), number))
        with RunFolder.create(path, {}) as folder, pytest.raises(Interrupted, match="--resume") as stop:
            train(run, folder)
    assert stop.value.exit_code == 128 + number and signal.getsignal(number) is handler
    with RunFolder.open_for_resume(path) as folder:
        summary = train(run, folder, resume=True)
    assert_whole(run, path, whole, summary)


def test_the_command_exits_with_128_plus_the_signal(capsys):
    def main(argv):
        raise Interrupted("stopped at 10 frames; --resume ...", signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 143
    assert capsys.readouterr().err == "stopped at 10 frames; --resume ...\n"


def test_a_second_signal_does_not_wait(capfd):
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
    assert "once more stops at once" in capfd.readouterr().err


class Killed(BaseException):
    """Ends a run as kill -9 would: nothing may catch it and write."""


def kill():
    raise Killed


@pytest.mark.parametrize("call", [5, 8])
def test_a_kill_loses_at_most_one_interval(run, whole, tmp_path, monkeypatch, call):
    """Killed in a chunk, at any distance from a checkpoint: resumed, it is bit-equal to the whole run. The folder
    was moved in between."""
    path = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_call(patched, DeviceDriver, "advance", call, kill)
        with RunFolder.create(path, {}) as folder, pytest.raises(Killed):
            train(run, folder)
    done = checkpoints.steps(path / "checkpoints")
    assert done[-1] == call // 4 * 4 * FRAMES
    moved = path.rename(tmp_path / "moved")
    with RunFolder.open_for_resume(moved) as folder:
        summary = train(run, folder, resume=True)
    assert_whole(run, moved, whole, summary)


def test_a_full_disk_costs_one_checkpoint(run, whole, tmp_path, monkeypatch):
    """The first checkpoint cannot be written: one warning, the run goes on, the next save succeeds, and the
    result is that of the undisturbed run."""
    path = tmp_path / "run"
    kept, calls = checkpoints._write_arrays, []

    def full(*args):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return kept(*args)

    monkeypatch.setattr(checkpoints, "_write_arrays", full)
    with (
        RunFolder.create(path, {}) as folder,
        pytest.warns(RuntimeWarning, match="step 32 was not") as caught,
    ):
        summary = train(run, folder)
    assert len(caught) == 1 and len(calls) == 3
    assert checkpoints.steps(path / "checkpoints") == [64, 96]
    assert_whole(run, path, whole, summary)


@contextmanager
def mounted(path, options):
    """A file system in memory at ``path``; the test is skipped where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only the superuser of Linux may mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(run, whole, tmp_path, monkeypatch):
    """Another program fills the disk of 16 MiB for four iterations: a checkpoint, a summary and rows of the log are
    lost, with one warning each; the run goes on and ends as if nothing had been."""
    with mounted(tmp_path / "disk", "size=16m") as disk:
        path, ballast = disk / "run", disk / "ballast"

        def fill():
            with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))

        at_call(monkeypatch, DeviceDriver, "advance", 5, fill)
        at_call(monkeypatch, DeviceDriver, "advance", 9, ballast.unlink)
        with RunFolder.create(path, {}) as folder, pytest.warns(RuntimeWarning) as caught:
            summary = train(run, folder)
        said = [str(warning.message) for warning in caught]
        assert len(said) == 3 and all("No space left" in text for text in said), said
        assert checkpoints.steps(path / "checkpoints") == [32, 96]
        state, logged, expected = whole
        assert_same(final_state(run, path), state)
        left = rows(path)
        assert len(left) < len(logged) and all(row in logged for row in left)
        assert left[-1] == logged[-1]
        np.testing.assert_equal(summary["evaluations"], expected["evaluations"])


def test_a_read_only_file_system_is_refused(tmp_path):
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(UserError, match="cannot be written: Read-only file system") as error,
    ):
        RunFolder.create(disk / "run", {})
    assert "\n" not in str(error.value)


def test_run_folders_hold_no_absolute_path(run, whole, tmp_path):
    """So that they can be moved and shared. TensorBoard's event files name the host, not the path."""
    path = tmp_path / "run"
    with RunFolder.create(path, {"run_dir": str(path)}) as folder:
        train(run, folder)
    files = [p for p in path.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert [p for p in files if str(tmp_path).encode() in p.read_bytes()] == []


def test_no_seed_left_ends_the_run_with_dumps(run, tmp_path, monkeypatch, capsys):
    """NaN for ever in both seeds: they freeze, each bad update is on disk and can be done again, and the run
    ends in one sentence. Nothing that is not finite was accepted."""
    path, kept = tmp_path / "run", DeviceDriver.advance

    def poisoned(self, state, keys, iteration, learning):
        if iteration >= 5:
            data = state.replay.data
            state = state._replace(
                replay=state.replay._replace(data=data._replace(reward=data.reward * np.nan))
            )
        return kept(self, state, keys, iteration, learning)

    monkeypatch.setattr(DeviceDriver, "advance", poisoned)
    with RunFolder.create(path, {}) as folder, pytest.raises(UserError, match="no seed learns any more"):
        train(run, folder)
    assert "seed 1 learns no more" in capsys.readouterr().out
    for seed in (0, 1):
        where = path / "nan" / f"seed_{seed}"
        dump = diagnose.load(where, run.agent, run.ring(), run.source.spec, run.config.num_envs)
        report = diagnose.replay_update(run.agent, dump)
        assert report["batch"] == [".reward"] and report["train"] == []
        assert "['loss']" in report["metrics"] and report["result"]
        assert int(dump.train.updates) < 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = final_state(run, path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.train))
