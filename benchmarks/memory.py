"""Table and picture of finished memory probes.

    python benchmarks/memory.py runs/recall30-* runs/recall120-* --figure docs/figures/memory.png

RUN_DIR: folders that `experiments/memory.py` left. One row each; in the picture a panel for
each task, with the accuracy in inference of every seed over the updates of the world model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {
    "rssm": "#8a8a8a",
    "s4wm": "#0b6fb8",
    "transformer": "#c8691c",
    "koopman": "#3d8f5a",
    "r2i": "#7a4fb5",
}


def row(summary: dict[str, Any]) -> str:
    percent = lambda name: ", ".join(f"{100 * x:.1f}" for x in summary[name])
    cells = [f"`{summary['task']}`", summary["world_model"], str(summary["updates"])]
    cells += [percent("inference"), percent("imagination"), f"{summary['wall_seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def draw(found: list[dict[str, Any]], path: str) -> None:
    tasks = list(dict.fromkeys(one["task"] for one in found))
    figure = Figure(figsize=(3.2 * len(tasks), 3.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for one in (one for one in found if one["task"] == task):
            updates = [e["updates"] for e in one["examinations"]]
            seeds = zip(*(e["inference"] for e in one["examinations"]), strict=True)
            for i, accuracies in enumerate(seeds):
                name = one["world_model"]
                axes.plot(updates, accuracies, color=COLOURS[name], lw=1.4, label=None if i else name)
        axes.set_title(task, loc="left", fontweight="bold")
        axes.set_xlabel("updates of the world model")
        axes.set_ylim(0.4, 1.02)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy of the last reward")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    names = [name for name in COLOURS if name in lines]
    figure.legend(
        [lines[n] for n in names], names, loc="outside lower center", ncols=len(names), frameon=False
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--figure", help="also draw a picture into this file")
    args = parser.parse_args()
    found = [json.loads((folder / "summary.json").read_text()) for folder in args.folders]
    head = "task|world model|updates|inference per seed, %|imagination per seed, %|seconds, all seeds"
    print(f"| {head.replace('|', ' | ')} |\n|{'---|' * 6}")
    for one in found:
        print(row(one))
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
