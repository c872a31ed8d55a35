"""Rows of the results table for finished runs: python benchmarks/results.py RUN_DIR [RUN_DIR ...]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mbrl import published


def row(folder: Path) -> str:
    """One Markdown row from ``config.json`` and ``summary.json``; seconds are those of all seeds together."""
    record = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    config, result = record["config"], summary["eval_return"]
    score = published.score_at(config["task"], summary["env_steps"])
    cells = [
        f"`{config['task']}`",
        config["preset"],
        f"{summary['env_steps']:,}",
        ", ".join(f"{seed}: {value:.0f}" for seed, value in zip(summary["seeds"], result["per_seed"])),
        f"{result['iqm']:.0f}",
        f"{result['ci'][0]:.0f} to {result['ci'][1]:.0f}" if result["ci"][0] is not None else "one seed",
        f"{summary['train_seconds']:.0f} / {summary['wall_seconds']:.0f}",
        f"{score.mean:.0f} ± {score.std:.0f}" if score else "none",
        f"{(record['commit'] or 'unknown')[:7]}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    head = "task|preset|frames|return per seed|IQM|95 % interval|training / total s|published there|commit"
    print("| " + head.replace("|", " | ") + " |")
    print("|" + "---|" * 9)
    for folder in sys.argv[1:]:
        print(row(Path(folder)))


if __name__ == "__main__":
    main()
