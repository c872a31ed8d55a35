"""Rows of the results table for finished runs.

python benchmarks/results.py runs/a runs/b
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mbrl import published
from mbrl.config import run_main
from mbrl.results import Result, read


def row(run: Result) -> str:
    """One Markdown row; seconds are those of all seeds together."""
    summary, result = run.summary, run.summary["eval_return"]
    score = published.score_at(run.task, summary["env_steps"], published.method_of(run.record))
    cells = [
        f"`{run.task}`",
        run.config["preset"],
        f"{summary['env_steps']:,}",
        ", ".join(f"{seed}: {value:.0f}" for seed, value in zip(run.seeds, result["per_seed"])),
        f"{result['iqm']:.0f}",
        f"{result['ci'][0]:.0f} to {result['ci'][1]:.0f}" if result["ci"][0] is not None else "one seed",
        f"{summary['train_seconds']:.0f} / {summary['wall_seconds']:.0f}",
        score.text() if score else "none",
        f"{(run.record['commit'] or 'unknown')[:7]}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Rows of the results table for finished runs.")
    parser.add_argument("run_dir", nargs="+", help="folder of a run")
    folders = parser.parse_args(argv).run_dir
    head = "task|preset|frames|return per seed|IQM|95 % interval|training / total s|published there|commit"
    print("| " + head.replace("|", " | ") + " |")
    print("|" + "---|" * 9)
    for folder in folders:
        print(row(read(folder)))


if __name__ == "__main__":
    run_main(main)
