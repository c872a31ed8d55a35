"""``python -m mbrl report RUN_DIR...`` and ``python -m mbrl compare RUN_DIR...``: what became of runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mbrl.config import run_main
from mbrl.errors import UserError


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m mbrl", description="What became of runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_compare(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _add_report(commands) -> None:
    text = "write report.html into run folders: one file, no network needed to read it"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder of a run, finished or going on")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="from the files alone: leave out how well the world model predicts, or keep what was measured",
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from mbrl import report

    if not arguments.fast:
        from mbrl.seeds import use_compilation_cache

        use_compilation_cache()
    for folder in arguments.run_dir:
        print(report.write(folder, predict=not arguments.fast))


def _add_compare(commands) -> None:
    text = "compare methods: aggregates with intervals, profiles, sample efficiency, time to a threshold"
    parser = commands.add_parser("compare", help=text, description=text)
    add = parser.add_argument
    add("run_dir", nargs="+", help="folder of a run, or NAME=FOLDER; others are grouped by their settings")
    add("--baseline", nargs="+", default=[], metavar="RUN_DIR", help="runs that the others are compared with")
    add("--frames", type=int, help="compare after this many frames; by default where the shortest run ends")
    add("--max-return", type=float, default=1000.0, help="return of score 1 (default 1000, as in dm_control)")
    add("--threshold", type=float, default=0.5, help="score whose first evaluation is timed (default 0.5)")
    add(
        "--out", type=Path, default=Path("comparison"), help="write OUT.html and OUT.png (default comparison)"
    )
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from mbrl import compare
    from mbrl.run_folder import write_atomic

    baseline = compare.methods_of(arguments.baseline, "baseline " * bool(arguments.baseline))
    methods = baseline + compare.methods_of(arguments.run_dir)
    found = compare.compare(methods, None, arguments.frames, arguments.max_return, arguments.threshold)
    Console().print(compare.text(found))
    page, picture = (arguments.out.with_name(arguments.out.name + end) for end in (".html", ".png"))
    try:
        write_atomic(page, compare.html(found).encode())
        compare.save_png(picture, found)
    except OSError as error:
        raise UserError(f"--out: {arguments.out} cannot be written: {error.strerror}") from error
    print(f"written: {page} and {picture}")


if __name__ == "__main__":
    run_main(main)
