"""What a run says: rows on disk, TensorBoard events, a progress bar, and the table at the end."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich import progress
from rich.console import Console
from rich.table import Table

from mbrl.published import PublishedScore
from mbrl.run_folder import jsonable, write_atomic
from mbrl.sinks import Sink
from mbrl.statistics import bootstrap_interval, iqm


class Logger:
    """Writes ``metrics.jsonl`` and TensorBoard events of one run.

    ``metrics.jsonl`` has one row per step and seed, ``{"step": frames, "seed": s, name: value, ...}``, in the
    order of the steps. Values that are not finite are written as null. TensorBoard shows each seed as a run
    of its own (``seed_0``, ...) and their mean as the run ``mean``, under the same tags; non-finite values
    are left out there, and out of the mean. What was logged for the same step in several calls becomes one
    row: rows are written when a later step is logged, and by ``flush`` and ``close``. Call ``flush`` before a
    checkpoint is saved.

    folder: the run folder. seeds: the members' integers [S]. tensorboard: False writes no events. sinks: get
    the same numbers as TensorBoard, seeds as ``seed_0/name`` and their mean as ``name``. When the disk is
    full there is one warning and the rows are lost, a sink that fails is left out with one; the run goes on
    and the file stays readable.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        seeds: Sequence[int],
        tensorboard: bool = True,
        sinks: Sequence[Sink] = (),
    ):
        root = Path(folder)
        self._sinks, self._sent = list(sinks), -1  # sinks cannot forget: what they had is not sent again
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / "metrics.jsonl"
        self.seeds, self.num_seeds = list(seeds), len(seeds)
        self._tensorboard = root / "tensorboard" if tensorboard else None
        self._events: list[Any] = []
        self._purge_step: int | None = None
        self._step: int | None = None
        self._rows: list[dict[str, Any]] = []
        self._warned = False
        _drop_torn_line(self.path)
        self._file = _open(self.path)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` at ``step`` (simulator frames; not below an earlier call's).

        values: by name, [S] one number per seed, or a scalar that holds for all seeds. Raises ValueError for
        another shape and for a step that goes backwards.
        """
        step = int(step)
        if self._step is not None and step < self._step:
            raise ValueError(f"step must not decrease, found {step} after {self._step}")
        columns = {name: self._column(name, value) for name, value in values.items()}
        if step != self._step:
            self.flush()
            self._step = step
        if not self._rows:
            self._rows = [{"step": step, "seed": seed} for seed in self.seeds]
        for seed, row in enumerate(self._rows):
            row.update({name: column[seed] for name, column in columns.items()})
        self._log_tensorboard(step, columns)
        self._log_sinks(step, columns)

    def flush(self) -> None:
        """Write the rows that wait for more values of their step, in one call of the operating system."""
        if not self._rows:
            return
        data = "".join(json.dumps(jsonable(row), allow_nan=False) + "\n" for row in self._rows).encode()
        self._rows = []
        self._append(self._file, data)

    def truncate_to(self, step: int) -> None:
        """Forget everything after ``step``: call it once on resume, with the step of the checkpoint.

        Removes later rows and a torn last line from ``metrics.jsonl`` (atomically) and tells TensorBoard to
        drop later events. Sinks get the steps only that they did not have.
        """
        self._rows, self._step, self._purge_step = [], None, int(step) + 1
        self._file.close()
        self._sent = truncate_metrics(self.path, step)
        self._file = _open(self.path)

    def close(self) -> None:
        """Write what is left and close the files. Safe to call twice."""
        if self._file.closed:
            return
        self.flush()
        for file in (self._file, *self._events):
            file.close()
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _column(self, name: str, value: Any) -> np.ndarray:
        if name in ("step", "seed"):
            raise ValueError(f"metric name {name!r} is taken by the row itself: choose another")
        value = np.asarray(value)
        if value.shape not in ((), (self.num_seeds,)):
            raise ValueError(
                f"{name} must be a scalar or have shape ({self.num_seeds},), found {value.shape}"
            )
        return np.broadcast_to(value, (self.num_seeds,))

    def _append(self, file: Any, data: bytes) -> None:
        """Writes all of ``data`` or nothing: half a row would spoil the next one as well."""
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(file.fileno(), end)
            self._warn(file.name, error)

    def _warn(self, path: Any, error: OSError) -> None:
        """Once: the disk stays full for a while."""
        if not self._warned:
            self._warned = True
            message = f"{path} cannot be written ({error.strerror}): rows are lost from step {self._step}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _log_tensorboard(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """One event per seed. Not by tensorboardX's writer: on a full disk its thread dies, and the run would
        wait for it for ever."""
        if self._tensorboard is None:
            return
        # Here, because it loads protobuf, whose classes are made at run time.
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if not self._events:
            try:
                self._open_tensorboard()
            except OSError as error:
                self._warn(self._tensorboard, error)
        members: list[list[Any]] = [[] for _ in self._events]
        for name, column in columns.items():
            numbers = column.astype(np.float64)
            finite = numbers[np.isfinite(numbers)]
            shown = [*numbers, *([finite.mean()] if self.num_seeds > 1 and finite.size else [])]
            for values, number in zip(members, shown, strict=False):
                if np.isfinite(number):
                    values.append(Summary.Value(tag=name, simple_value=number))
        for file, values in zip(self._events, members, strict=True):
            self._append(file, _event(step=step, summary=Summary(value=values)))

    def _open_tensorboard(self) -> None:
        """A new file of events for each seed, and for their mean where there are several."""
        assert self._tensorboard is not None
        names = [f"seed_{seed}" for seed in self.seeds] + ["mean"] * (self.num_seeds > 1)
        begin = _event(file_version="brain.Event:2")
        if self._purge_step is not None:
            begin += _event(step=self._purge_step, session_log={"status": "START"})
        # TensorBoard reads the files of a folder in the order of their names.
        events = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        for name in names:
            (self._tensorboard / name).mkdir(parents=True, exist_ok=True)
        self._events = [_open(self._tensorboard / name / events) for name in names]
        for file in self._events:
            self._append(file, begin)

    def _log_sinks(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        if step <= self._sent:
            return
        values = {}
        for name, column in columns.items():
            numbers = column.astype(np.float64)
            seeds = zip(self.seeds, numbers) if self.num_seeds > 1 else ()
            values |= {f"seed_{seed}/{name}": float(x) for seed, x in seeds if np.isfinite(x)}
            if np.isfinite(numbers).any():
                values[name] = float(numbers[np.isfinite(numbers)].mean())
        for sink in list(self._sinks):
            self._guarded(sink, sink.log, values, step)

    def _guarded(self, sink: Sink, call: Callable[..., Any], *args: Any) -> None:
        """Other people's servers must not end a run."""
        try:
            call(*args)
        except Exception as error:
            self._sinks.remove(sink)
            warnings.warn(f"{sink.name} is left out from now on: {error}", RuntimeWarning, stacklevel=2)


def _open(path: Path) -> Any:
    return open(path, "ab", buffering=0)  # unbuffered: a row is whole or was never written


def _event(**fields: Any) -> bytes:
    """An event of TensorBoard as a record: length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c

    message = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(message))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, message))


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, in order; empty when the file does not exist.

    path: the file, or its run folder. A last line that was cut short by a kill is left out. Rows of the same
    step and seed are merged. Raises ValueError for an unreadable line elsewhere: that is no torn write.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        return []
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    *lines, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.setdefault((row["step"], row["seed"]), {}).update(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not a row of metrics: {error}") from None
    del torn  # what follows the last newline: empty, or half a row
    return list(rows.values())


def truncate_metrics(path: str | os.PathLike, step: int) -> int:
    """Remove the rows after ``step`` and every unreadable line from the file, atomically. Returns the last
    step that it had, -1 for none."""
    path = Path(path)
    if not path.exists():
        return -1

    def step_of(line: bytes) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return np.inf

    lines = path.read_bytes().split(b"\n")[:-1]
    steps = [step_of(line) for line in lines]
    write_atomic(path, b"".join(line + b"\n" for line, at in zip(lines, steps) if at <= step))
    return int(max((at for at in steps if at < np.inf), default=-1))


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline, so that the next row does not continue half a row."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


class Progress:
    """How far a run is: a bar on a terminal, else one plain line every ``every`` seconds.

    total, start: steps in simulator frames, ``start`` above 0 for a resumed run. every: seconds between plain
    lines. console: a rich console, by default one on stdout; its ``is_terminal`` decides. unit: what steps
    are, "updates" where nothing is collected, and then there are neither returns nor another speed. Speeds
    are means over the last 30 seconds or so; steps/s counts simulator frames, like the steps themselves. Use
    it as a context manager.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        every: float = 10.0,
        console: Console | None = None,
        unit: str = "steps",
    ):
        self.console = console or Console(file=sys.stdout, highlight=False)
        self.total, self.start, self.every, self.unit = total, start, every, unit
        self._marks: deque[tuple[float, int, int]] = deque()  # (time, steps, updates)
        self._printed = time.monotonic()  # the first plain line comes after ``every`` seconds
        self._latest = ""
        self._bar = _make_bar(self.console, total, start, unit) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, step: int, returns: Any = None, updates: int | None = None) -> None:
        """Show the state of the run.

        step: simulator frames so far. returns: [S] latest episode return per seed, NaN where a seed has not
        finished one yet; None when there are none. updates: gradient steps so far, per seed.
        """
        now = time.monotonic()
        if len(self._marks) > 1 and now - self._marks[-2][0] < 0.2:
            self._marks.pop()  # calls may follow each other much faster than what they ask for is computed
        self._marks.append((now, int(step), int(updates or 0)))
        while len(self._marks) > 2 and now - self._marks[0][0] > 30.0:
            self._marks.popleft()
        then, first_step, first_updates = self._marks[0]
        seconds = now - then
        per_second = (step - first_step) / seconds if seconds > 0 else float("nan")
        updates_per_second = (self._marks[-1][2] - first_updates) / seconds if seconds > 0 else float("nan")
        known = updates and per_second > 0  # prefilling is another speed
        eta = (self.total - step) / per_second if known else float("nan")
        texts = {
            "returns": f"return {format_returns(returns)}",
            "rates": f"{_rate(updates_per_second)} updates/s  {_rate(per_second)} steps/s",
            "eta": f"ETA {format_seconds(eta)}",
        }
        if self.unit == "updates":
            texts |= {"returns": "", "rates": f"{_rate(updates_per_second)} updates/s"}
        if self._bar is not None:
            _show(self._bar, min(step, self.total), texts)
            return
        percent = f"{100 * step / max(self.total, 1):.0f} %"
        self._latest = f"{step:,} / {self.total:,} {self.unit} ({percent})  "
        self._latest += "  ".join(filter(None, texts.values()))
        if now - self._printed >= self.every:
            self._print_latest(now)

    def compiled(self) -> None:
        """Measure speeds from now on: what came before was compiling."""
        self._marks.clear()

    def skip(self, seconds: float) -> None:
        """Leave the latest seconds, an evaluation, out of the speeds."""
        self._marks = deque((then + seconds, step, updates) for then, step, updates in self._marks)

    def say(self, message: str) -> None:
        """Print a line of its own, above the bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar, or the last plain line, as it is. Safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
        self._print_latest(time.monotonic())

    def _print_latest(self, now: float) -> None:
        if self._latest:
            self.say(self._latest)
            self.console.file.flush()
        self._printed, self._latest = now, ""


def _make_bar(console: Console, total: int, start: int, unit: str) -> progress.Progress:
    bar = progress.Progress(
        # Two lines, so that everything fits a terminal of 80 columns beside the bar.
        progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit + "\n{task.fields[eta]}"),
        progress.BarColumn(bar_width=None),
        progress.TextColumn("[bold]{task.fields[returns]}[/]\n{task.fields[rates]}"),
        console=console,
        refresh_per_second=4,  # it shares the cores with the training
        expand=True,
    )
    bar.add_task("", total=total, completed=start, returns="", rates="", eta="ETA -")
    return bar


def _show(bar: Any, completed: int, texts: dict[str, str]) -> None:
    bar.update(bar.task_ids[0], completed=completed, **texts)


def format_returns(returns: Any) -> str:
    """Up to four seeds one by one (``812 790 - 801``), more as ``mean (min to max)``; ``-`` for none yet."""
    if returns is None:
        return "-"
    returns = np.asarray(returns, dtype=np.float64).ravel()
    if returns.size <= 4:
        return " ".join(f"{value:.0f}" if np.isfinite(value) else "-" for value in returns) or "-"
    finite = returns[np.isfinite(returns)]
    if not finite.size:
        return "-"
    return f"{finite.mean():.0f} ({finite.min():.0f} to {finite.max():.0f})"


def format_seconds(seconds: float) -> str:
    """``42s``, ``3:07``, ``1:02:03``; ``-`` when not finite."""
    if not np.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}" if np.isfinite(value) else "-"


def results_table(
    task: str,
    frames: int,
    returns: Any,
    wall_seconds: float,
    published: PublishedScore | None = None,
    seeds: Sequence[int] | None = None,
    unit: str = "frames",
    tasks: Mapping[str, Any] = MappingProxyType({}),
    settings: Sequence[str] = (),
) -> Table:
    """The table printed at the end of a run (``rich.print(table)``).

    returns: [S, K] final evaluation returns of K episodes of each of S seeds. frames: simulator frames of
    training per seed, or ``unit``. published: ``published.score_at(task, frames)``. seeds: names of the rows,
    0 to S - 1 by default. tasks: mean return [S] of each of several tasks, shown as its mean over seeds.
    settings: of each seed, where they differ; then nothing is aggregated.
    Shows each seed's mean +- standard deviation over episodes, then mean, IQM and the 95 % bootstrap interval
    of the IQM over seeds. Seeds whose return is not finite are shown as failed and left out of the
    aggregates, which then say how many seeds they cover.
    """
    returns = np.asarray(returns, dtype=np.float64)
    if returns.ndim != 2 or returns.size == 0:
        raise ValueError(f"returns must be [seeds, episodes] and not empty, found shape {returns.shape}")
    episodes = returns.shape[1]
    table = Table(
        title=f"{task} after {frames:,} {unit}", title_style="bold", caption_justify="left", min_width=48
    )
    table.add_column("")
    table.add_column("evaluation return", justify="right")
    table.add_column(f"over {episodes} episodes" if episodes > 1 else "over 1 episode", justify="right")
    means = returns.mean(axis=1)
    names = [f"seed {seed}" for seed in seeds or range(len(returns))]
    if settings:
        names = [f"{name}: {setting}" for name, setting in zip(names, settings, strict=True)]
    for name, mean, one in zip(names, means, returns, strict=True):
        ok = np.isfinite(mean)
        table.add_row(name, f"{mean:.1f}" if ok else "failed", f"± {one.std():.1f}" if ok else "")
    table.add_section()
    good = means[np.isfinite(means)]
    over = f"{good.size} seeds" if good.size == means.size else f"{good.size} of {means.size} seeds"
    for name, values in tasks.items() if not settings else ():
        own = np.asarray(values, np.float64)[np.isfinite(means)]
        table.add_row(name, f"{own.mean():.1f}" if own.size else "failed", over)
    if tasks:
        table.add_section()
    if settings:
        table.add_row("settings differ: no mean or IQM over them", "", "")
    elif good.size > 1:
        low, high = bootstrap_interval(good)
        table.add_row("mean", f"{good.mean():.1f}", over)
        table.add_row("IQM", f"{iqm(good):.1f}", over)
        table.add_row("95 % interval", f"{low:.1f} to {high:.1f}", "of the IQM")
    if published is not None:
        spread = f"± {published.std:.1f}, " if np.isfinite(published.std) else ""
        table.add_row("published", f"{published.mean:.1f}", f"{spread}{published.num_seeds} seeds")
        table.caption = f"published: {published.source}"
    table.add_section()
    table.add_row("wall time", format_seconds(wall_seconds), "")
    return table
