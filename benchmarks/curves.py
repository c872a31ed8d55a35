"""Returns of every evaluation of several runs, as a table and, on request, a picture.

    python benchmarks/curves.py TD-MPC2=runs/offline Dreamer=runs/dreamer --figure docs/figures/offline.png

NAME=RUN_DIR: how a run is called, and its folder. Runs of several tasks have a row for each. All must count
the same, frames or updates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mbrl.config import run_main
from mbrl.errors import UserError
from mbrl.plots import save_lines
from mbrl.results import Result, read


def curves_of(name: str, run: Result) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """(label, (clock [K], mean returns [K, S])) of a run, or of each of its tasks."""
    evaluations = run.summary["evaluations"]
    for task in evaluations[-1].get("tasks", {}):
        yield f"{name}: {task}", (run.frames, np.array([e["tasks"][task] for e in evaluations], np.float64))
    if "tasks" not in evaluations[-1]:
        yield name, (run.frames, run.returns)


def row(label: str, frames: np.ndarray, returns: np.ndarray) -> str:
    """One Markdown row: mean over seeds at each evaluation, and the last one seed by seed."""
    means = ", ".join(f"{value:.0f}" for value in returns.mean(1))
    return f"| {label} | {frames[0]:,.0f} to {frames[-1]:,.0f} | {means} | " + (
        ", ".join(f"{value:.0f}" for value in returns[-1]) + " |"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    parser.add_argument("--title", default="")
    parser.add_argument("--figure", help="also draw a picture into this file")
    args = parser.parse_args(argv)
    named = [text.partition("=") for text in args.runs]
    runs = [(name, read(folder or name)) for name, _, folder in named]
    if len(units := {run.unit for _, run in runs}) > 1:
        raise UserError(f"the runs count {' and '.join(sorted(units))}: compare those that count the same")
    lines: dict[str, Any] = {label: line for name, run in runs for label, line in curves_of(name, run)}
    print(f"| run | {units.pop()} | return of each evaluation | the last, per seed |\n|{'---|' * 4}")
    for label, line in lines.items():
        print(row(label, *line))
    if args.figure:
        save_lines(args.figure, lines, runs[0][1].unit, "episode return", args.title, (0, None))


if __name__ == "__main__":
    run_main(main)
