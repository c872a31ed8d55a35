"""``python -m mbrl presets | report | compare | export | data``: before and after a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mbrl.config import run_main
from mbrl.errors import UserError


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m mbrl", description="Before and after a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_presets(commands)
    _add_report(commands)
    _add_compare(commands)
    _add_data(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _add_presets(commands) -> None:
    text = "what each preset costs and what it reached"
    commands.add_parser("presets", help=text, description=text).set_defaults(run=_presets)


def _presets(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from mbrl.presets import ABOUT

    for agent, presets in ABOUT.items():
        table = Table(title=agent, title_justify="left", title_style="bold")
        for name in ("--preset", "parameters", "cost, 2 CPU cores", "return on cartpole_swingup"):
            table.add_column(name)
        for name, about in presets.items():
            table.add_row(name, *about)
        Console().print(table)


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


def _add_data(commands) -> None:
    text = "write the episodes in a run's replay as a dataset of npz files"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("dataset", type=Path, help="new folder of the dataset")
    parser.set_defaults(run=_export)
    text = "describe a dataset: episodes, returns, and the range of every entry"
    parser = commands.add_parser("data", help=text, description=text)
    parser.add_argument("dataset", type=Path, help="what export wrote, a Minari folder or a file *.hdf5")
    parser.set_defaults(run=_data)


def _export(arguments: argparse.Namespace) -> None:
    from mbrl import dataset

    found = dataset.from_run(arguments.run_dir)
    dataset.save(arguments.dataset, found)
    _describe(found)


def _data(arguments: argparse.Namespace) -> None:
    from mbrl import dataset

    _describe(dataset.load(arguments.dataset))


def _describe(found) -> None:
    from rich.console import Console
    from rich.table import Table

    from mbrl import dataset

    said = dataset.describe(found)
    print(
        f"{said['source']}: {said['rows']:,} rows in {said['episodes']:,} episodes, "
        f"{said['whole episodes']:,} of them whole, {said['terminal episodes']:,} terminal"
    )
    table = Table()
    for name in ("", "mean", "std", "min", "max"):
        table.add_column(name, justify="right" if name else "left")
    ranges = {"episode length": said["length"], "return": said["return"], **said["entries"]}
    for name, values in ranges.items():
        if values is not None:
            table.add_row(name, *(f"{value:.4g}" for value in values.values()))
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
