"""metrics.jsonl, TensorBoard events, the progress display and the table of results."""

import errno
import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mbrl import published
from mbrl.logger import Logger, Progress, format_returns, format_seconds, read_metrics, results_table


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """{(tag, step): value} of a TensorBoard folder."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found, purged = {}, []
    for path in sorted(folder.glob("events*"), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            body = data[at + 12 : at + 12 + size]
            assert int.from_bytes(data[at + 12 + size : at + 16 + size], "little") == masked_crc32c(body)
            event = Event.FromString(body)
            if event.session_log.status:
                purged.append(event.step)
            for value in event.summary.value:
                found[(value.tag, event.step)] = value.simple_value
            at += 16 + size
    return found, purged


def test_one_row_per_step_and_seed(tmp_path):
    with Logger(tmp_path, range(2), tensorboard=False) as logger:
        logger.log(10, {"loss": jnp.array([0.5, 0.25]), "updates": 3})
        logger.log(10, {"eval/return": np.array([1.0, 2.0])})
        logger.log(20, {"loss": jnp.float32(0.1)})
    assert lines(tmp_path) == [
        {"step": 10, "seed": 0, "loss": 0.5, "updates": 3, "eval/return": 1.0},
        {"step": 10, "seed": 1, "loss": 0.25, "updates": 3, "eval/return": 2.0},
        {"step": 20, "seed": 0, "loss": 0.1},
        {"step": 20, "seed": 1, "loss": 0.1},
    ]
    assert read_metrics(tmp_path) == lines(tmp_path)


def test_rows_are_on_disk_after_flush_and_when_a_later_step_comes(tmp_path):
    logger = Logger(tmp_path, range(1), tensorboard=False)
    logger.log(1, {"a": 1.0})
    assert lines(tmp_path) == []
    logger.log(2, {"a": 2.0})
    assert [row["step"] for row in lines(tmp_path)] == [1]
    logger.flush()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    logger.log(2, {"b": 3.0})  # after a flush: a row of its own on disk, one row when read
    logger.close()
    logger.close()
    assert len(lines(tmp_path)) == 3
    assert read_metrics(tmp_path)[-1] == {"step": 2, "seed": 0, "a": 2.0, "b": 3.0}


def test_values_that_are_not_finite_become_null(tmp_path):
    with Logger(tmp_path, range(3)) as logger:
        logger.log(5, {"loss": np.array([1.0, np.nan, 3.0]), "all": np.inf})
    assert [row["loss"] for row in lines(tmp_path)] == [1.0, None, 3.0]
    assert [row["all"] for row in lines(tmp_path)] == [None] * 3
    assert events(tmp_path / "tensorboard" / "mean")[0] == {("loss", 5): 2.0}
    assert events(tmp_path / "tensorboard" / "seed_1")[0] == {}


@pytest.mark.parametrize("value", [np.zeros(3), np.zeros((2, 1)), np.zeros(1)])
def test_wrong_shapes_are_named(tmp_path, value):
    with (
        Logger(tmp_path, range(2), tensorboard=False) as logger,
        pytest.raises(ValueError, match=r"loss .*\(2,\)"),
    ):
        logger.log(1, {"loss": value})


def test_misuse_is_named(tmp_path):
    with Logger(tmp_path, range(1), tensorboard=False) as logger:
        logger.log(5, {"a": 1.0})
        with pytest.raises(ValueError, match="must not decrease"):
            logger.log(4, {"a": 1.0})
        with pytest.raises(ValueError, match="'seed' is taken"):
            logger.log(6, {"seed": 1.0})


def test_readable_after_a_kill_at_any_byte(tmp_path):
    with Logger(tmp_path, range(2), tensorboard=False) as logger:
        for step in (10, 20):
            logger.log(step, {"loss": np.array([0.5, step])})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    rows = lines(tmp_path)
    for cut in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        assert read_metrics(tmp_path) == rows[: whole[:cut].count(b"\n")]
        if cut % 7 == 0:
            with Logger(tmp_path, range(2), tensorboard=False) as logger:  # what is torn is not continued
                logger.log(30, {"loss": 1.0})
            assert [row["step"] for row in lines(tmp_path)][-2:] == [30, 30]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seed": 0}\nbroken\n{"step": 2, "seed": 0}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_resume_has_no_step_twice(tmp_path):
    with Logger(tmp_path, range(2)) as logger:
        for step in (10, 20, 30, 40):
            logger.log(step, {"loss": np.full(2, step)})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 50, "se')
    with Logger(tmp_path, range(2)) as logger:
        logger.truncate_to(20)
        for step in (30, 40, 50):
            logger.log(step, {"loss": np.full(2, step + 0.5)})
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]
    assert [row["loss"] for row in rows][4:6] == [30.5, 30.5]
    assert events(tmp_path / "tensorboard" / "seed_0")[1] == [21]  # TensorBoard drops events from 21 on


def test_tensorboard_has_seeds_and_mean(tmp_path):
    with Logger(tmp_path, range(2)) as logger:
        logger.log(10, {"loss": np.array([1.0, 3.0])})
    values = {path.name: events(path)[0][("loss", 10)] for path in (tmp_path / "tensorboard").iterdir()}
    assert values == {"seed_0": 1.0, "seed_1": 3.0, "mean": 2.0}
    with Logger(tmp_path / "alone", range(1)) as logger:
        logger.log(10, {"loss": 1.0})
    assert [path.name for path in (tmp_path / "alone" / "tensorboard").iterdir()] == ["seed_0"]


class FullDisk:
    """A file whose disk fills up: the first half of a row is still written."""

    def __init__(self, file):
        self.file, self.full, self.closed, self.name = file, True, False, file.name

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        if self.full:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def close(self):
        self.file.close()
        self.closed = True


def test_a_full_disk_loses_rows_and_nothing_else(tmp_path):
    logger = Logger(tmp_path, range(1), tensorboard=False)
    logger.log(1, {"a": 1.0})
    logger.flush()
    disk = logger._file = FullDisk(logger._file)
    logger.log(2, {"a": 2.0})
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        logger.log(3, {"a": 3.0})
        logger.log(4, {"a": 4.0})
    assert len(caught) == 1
    disk.full = False
    logger.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 4]


def test_a_full_disk_loses_events_and_nothing_else(tmp_path):
    """With one warning for rows and events; whole events follow when there is space again."""
    with Logger(tmp_path, range(1)) as logger:
        logger.log(1, {"a": 1.0})
        disks = logger._file, logger._events[0] = FullDisk(logger._file), FullDisk(logger._events[0])
        with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
            logger.log(2, {"a": 2.0})
        assert len(caught) == 1
        for disk in disks:
            disk.full = False
        logger.log(3, {"a": 3.0})
    assert events(tmp_path / "tensorboard" / "seed_0")[0] == {("a", 1): 1.0, ("a", 3): 3.0}
    assert [row["step"] for row in lines(tmp_path)] == [2, 3]


def test_a_disk_that_is_full_from_the_start_opens_no_events(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Logger(tmp_path, range(1)) as logger:
        with monkeypatch.context() as patched:
            patched.setattr(Logger, "_open_tensorboard", full)
            with pytest.warns(RuntimeWarning, match="No space left on device"):
                logger.log(1, {"a": 1.0})
        logger.log(2, {"a": 2.0})
    assert events(tmp_path / "tensorboard" / "seed_0")[0] == {("a", 2): 2.0}


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def test_progress_without_a_terminal_prints_plain_lines(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mbrl.logger.time.monotonic", lambda: clock[0])
    console = plain_console()
    with Progress(100_000, every=10.0, console=console) as progress:
        for second in range(26):
            clock[0] = float(second)
            progress.update(second * 100, np.array([123.4, np.nan]), updates=second * 20)
        progress.say("evaluated")
    out = console.file.getvalue().splitlines()
    assert len(out) == 4  # at 10 s, 20 s, the message, the end
    assert out[0] == ("1,000 / 100,000 steps (1 %)  return 123 -  20.0 updates/s  100 steps/s  ETA 16:30")
    assert out[2] == "evaluated"
    assert "\x1b" not in console.file.getvalue()


def test_no_speed_is_shown_before_there_is_one(monkeypatch):
    """Neither while prefilling, which is another speed than learning, nor of the time that compiling took."""
    clock = [0.0]
    monkeypatch.setattr("mbrl.logger.time.monotonic", lambda: clock[0])
    console = plain_console()
    with Progress(1000, every=1.0, console=console) as progress:
        for clock[0], steps, updates in ((1.0, 10, 0), (2.0, 100, 0), (32.0, 110, 5), (33.0, 120, 10)):
            if clock[0] == 32.0:
                progress.compiled()
            progress.update(steps, updates=updates)
    assert [line.split("ETA ")[1] for line in console.file.getvalue().splitlines()] == ["-", "-", "-", "1:28"]


def test_speeds_leave_out_what_is_skipped(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mbrl.logger.time.monotonic", lambda: clock[0])
    console = plain_console()
    with Progress(1000, every=1.0, console=console) as progress:
        for clock[0], steps, updates in ((1.0, 10, 1), (2.0, 20, 2), (63.0, 30, 3)):
            if steps == 30:
                progress.skip(60.0)
            progress.update(steps, updates=updates)
    assert [line.split("  ")[-3:] for line in console.file.getvalue().splitlines()[1:]] == [
        ["1.0 updates/s", "10.0 steps/s", "ETA 1:38"],
        ["1.0 updates/s", "10.0 steps/s", "ETA 1:37"],
    ]


def test_offline_progress_counts_updates_that_are_computed(monkeypatch):
    """A burst of calls, of updates that were only asked for, is no speed."""
    clock = [0.0]
    monkeypatch.setattr("mbrl.logger.time.monotonic", lambda: clock[0])
    console = plain_console()
    with Progress(1000, every=100.0, console=console, unit="updates") as progress:
        for burst in range(10):
            for i in range(50):
                clock[0] = burst + i / 10_000
                progress.update(50 * burst + i + 1, [np.nan], updates=50 * burst + i + 1)
    (line,) = console.file.getvalue().splitlines()
    assert line == "500 / 1,000 updates (50 %)  55.4 updates/s  ETA 9s"


def test_progress_on_a_terminal_is_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(1000, start=500, console=console) as progress:
        progress.update(500)
        progress.update(600, [10.0, 20.0], updates=5)
        progress.say("[evaluated]")
    out = console.file.getvalue()
    assert "600/1,000 steps" in out and "10 20" in out and "[evaluated]" in out and "updates/s" in out


def test_formats():
    assert format_returns(None) == "-"
    assert format_returns([812.4, np.nan]) == "812 -"
    assert format_returns(np.arange(5.0)) == "2 (0 to 4)"
    assert format_returns(np.full(6, np.nan)) == "-"
    assert [format_seconds(s) for s in (5.2, 187, 3723, np.nan)] == ["5s", "3:07", "1:02:03", "-"]


def printed(table):
    console = Console(file=io.StringIO(), width=90)
    console.print(table)
    return console.file.getvalue()


def test_results_table():
    returns = np.array([[100.0, 110.0], [200.0, 210.0], [300.0, 300.0], [900.0, 900.0]])
    score = published.score_at("walker_walk", 100_000)
    out = printed(results_table("walker_walk", 100_000, returns, 187.0, score))
    assert "walker_walk after 100,000 frames" in out
    assert "105.0" in out and "± 5.0" in out
    assert "377.5" in out  # the mean
    assert "252.5" in out  # the IQM
    assert "517.8" in out and "5 seeds" in out and "danijar/dreamerv3@e3f0224" in out
    assert "3:07" in out


def test_results_table_of_several_tasks():
    tasks = {"walker_walk": [1.0, 2.0], "cup_catch": [3.0, 6.0]}
    out = printed(results_table("two", 1000, [[1.0, 3.0], [2.0, 6.0]], 1.0, tasks=tasks))
    assert "walker_walk" in out and "1.5" in out and "cup_catch" in out and "4.5" in out and "3.0" in out


def test_results_table_of_settings_that_differ():
    """Nothing is aggregated over them."""
    out = printed(results_table("task", 1000, [[1.0], [7.0]], 1.0, settings=["lam=0.9", "lam=0.5"]))
    assert "seed 0: lam=0.9" in out and "settings differ" in out
    assert "95 %" not in out and "4.0" not in out


def test_results_table_of_one_seed_and_of_failed_seeds():
    out = printed(results_table("pendulum", 1000, [[5.0]], 1.0))
    assert "5.0" in out and "IQM" not in out and "published" not in out
    out = printed(results_table("pendulum", 1000, [[5.0], [np.nan], [7.0]], 1.0, seeds=[3, 4, 5]))
    assert "failed" in out and "2 of 3 seeds" in out and "seed 5" in out and "6.0" in out
    with pytest.raises(ValueError, match="returns must be"):
        results_table("pendulum", 1000, [5.0], 1.0)
