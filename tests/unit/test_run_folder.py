"""The run folder: what is written, what is refused, and who holds it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mbrl import run_folder
from mbrl.errors import UserError, exit_with
from mbrl.run_folder import RunFolder, jsonable, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]


def finished_checkpoint(folder):
    (folder / "checkpoints" / "000000000010").mkdir(parents=True)
    (folder / "checkpoints" / "000000000010" / "manifest.json").write_text("{}")


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


def test_create_writes_config_with_versions_and_machine(tmp_path):
    config = {"task": "walker_walk", "lr": np.float32(1e-3), "sizes": (1, 2), "run_dir": tmp_path / "run"}
    with RunFolder.create(tmp_path / "run", config) as folder:
        stored = json.loads((tmp_path / "run" / "config.json").read_text())
        assert folder.config == stored
        assert os.fspath(folder) == str(tmp_path / "run")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            ".lock", "config.json", "checkpoints", "tensorboard", "videos"
        }  # fmt: skip
    assert stored["task"] == "walker_walk" and stored["lr"] == 1e-3 and stored["sizes"] == [1, 2]
    wanted = {"mbrl", "jax", "jaxlib", "flax", "optax", "mujoco", "dm_control", "numpy", "python"}
    assert wanted <= set(stored["versions"])
    assert stored["versions"]["numpy"] == np.__version__
    assert {"cpu", "cores", "memory_gib", "devices"} <= set(stored["machine"])
    assert stored["machine"]["devices"] and stored["machine"]["cores"] >= 1
    assert "commit" in stored


def test_config_holds_no_absolute_path(tmp_path):
    config = {"run_dir": str(tmp_path / "run"), "nested": {"paths": [tmp_path / "data", "relative/x"]}}
    with RunFolder.create(tmp_path / "run", config) as folder:
        stored = folder.config
    assert stored["run_dir"] == "run" and stored["nested"]["paths"] == ["data", "relative/x"]
    assert str(tmp_path) not in json.dumps(stored)


def test_another_run_is_never_overwritten(tmp_path):
    RunFolder.create(tmp_path / "run", {"task": "a"}).close()
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        RunFolder.create(tmp_path / "run", {"task": "b"})
    assert "already holds a run" in one_sentence(error) and "--resume" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("left", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_remains_of_a_run_without_config_are_not_overwritten(tmp_path, left):
    (tmp_path / left).mkdir() if left == "checkpoints" else (tmp_path / left).write_text("x")
    with pytest.raises(UserError, match=left):
        RunFolder.create(tmp_path, {})


def test_a_check_says_what_making_would_say_and_makes_nothing(tmp_path):
    RunFolder.check(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    for path, words in (("file", "is a file"), ("file/run", "Not a directory")):
        with pytest.raises(UserError, match=words):
            RunFolder.check(tmp_path / path)
    with RunFolder.create(tmp_path / "run", {}) as folder:
        with pytest.raises(UserError, match="in use"):
            RunFolder.check(folder)
        with pytest.raises(UserError, match="finished checkpoint"):
            RunFolder.check(folder, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.check(tmp_path / "run")


def test_an_empty_folder_is_free(tmp_path):
    RunFolder.create(tmp_path, {}).close()
    assert (tmp_path / "config.json").exists()


def test_a_refused_folder_is_not_kept_locked(tmp_path):
    RunFolder.create(tmp_path, {}).close()
    finished_checkpoint(tmp_path)
    with pytest.raises(UserError):
        RunFolder.create(tmp_path, {})
    RunFolder.open_for_resume(tmp_path).close()


def test_a_folder_is_set_aside(tmp_path):
    """Whole, under a free name, and not while it is in use."""
    path, (first, second) = tmp_path / "run", (tmp_path / f"run-stopped{i}" for i in (1, 2))
    with RunFolder.create(path, {"task": "first"}), pytest.raises(UserError, match="in use"):
        RunFolder.set_aside(path)
    assert RunFolder.set_aside(path) == first and not path.exists()
    RunFolder.create(path, {"task": "second"}).close()
    assert RunFolder.set_aside(path) == second
    assert [RunFolder.config_of(one)["task"] for one in (first, second)] == ["first", "second"]


def test_resume_without_run_or_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing") as error:
        RunFolder.open_for_resume(tmp_path / "nothing")
    one_sentence(error)
    assert not (tmp_path / "nothing").exists()
    RunFolder.create(tmp_path / "run", {}).close()
    with pytest.raises(UserError, match="no finished checkpoint"):
        RunFolder.open_for_resume(tmp_path / "run")
    finished_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"task": ')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        RunFolder.open_for_resume(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        RunFolder.config_of(tmp_path / "run")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "file", {})
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "below", {})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_place(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        RunFolder.create(tmp_path / "run", {})


def test_a_place_that_refuses_files(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_atomic", refuse)
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            RunFolder.create(tmp_path / "run", {})
    RunFolder.create(tmp_path / "run", {}).close()  # nothing is left of the attempt that is in the way


HOLD = """
import sys
from mbrl.run_folder import RunFolder
folder = RunFolder.create(sys.argv[1], {})
print("held", flush=True)
sys.stdin.read()
"""


def hold(path):
    """A process that holds the run folder until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_stale_lock_recovered(tmp_path):
    path = tmp_path / "run"
    process = hold(path)
    try:
        finished_checkpoint(path)
        with pytest.raises(
            UserError, match=f"in use by another process \\(pid {process.pid} on host"
        ) as error:
            RunFolder.open_for_resume(path)
        one_sentence(error)
        with pytest.raises(UserError, match="in use"):
            RunFolder.create(path, {})
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert f"pid {process.pid}" in (path / ".lock").read_text()  # left behind, and without meaning
    with RunFolder.open_for_resume(path):
        assert f"pid {os.getpid()}" in (path / ".lock").read_text()
        with pytest.raises(UserError, match="in use"):
            RunFolder.open_for_resume(path)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"half")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "run", {}) as folder:
        folder.write_summary({"env_steps": 10, "eval_return": {"per_seed": np.array([1.5, np.nan])}})
        stored = json.loads(folder.summary.read_text())
        assert stored == {"env_steps": 10, "eval_return": {"per_seed": [1.5, None]}}

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_folder, "write_atomic", full)
        with pytest.warns(RuntimeWarning, match=r"summary\.json was not written: No space left"):
            folder.write_summary({"env_steps": 20})
        assert json.loads(folder.summary.read_text()) == stored


def test_jsonable():
    value = {
        "a": np.float32(0.1),
        "b": np.inf,
        3: (np.int8(4), np.bool_(True)),
        "c": np.zeros((1, 2)),
        "d": None,
    }
    assert jsonable(value) == {"a": 0.1, "b": None, "3": [4, True], "c": [[0.0, 0.0]], "d": None}
    import jax.numpy as jnp

    assert jsonable(jnp.float32(0.1)) == 0.1
    assert jsonable(jnp.bfloat16(0.5)) == 0.5
    assert jsonable(Path("x/y")) == "x/y"


def test_exit_with_prints_one_line_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as exit_:
        exit_with(UserError("task 'walk' is unknown:\n did you mean walker_walk?"))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: task 'walk' is unknown: did you mean walker_walk?\n" and captured.out == ""


def test_lists_of_paths_keep_their_names():
    assert run_folder.portable({"offline": "/data/a,/data/b", "task": "a,b"}) == {
        "offline": "a,b",
        "task": "a,b",
    }
