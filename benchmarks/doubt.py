"""What finished agents reach when their plans weigh an uncertainty otherwise: a table, on request a picture.

    python benchmarks/doubt.py first=runs/first last=runs/last --uncertainty disagreement --weights 0 -1 -3

NAME=RUN_DIR: how a run is called, and its folder. The agents, the episodes and the rest of the planning stay
the same; all weights are measured by one program.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

import mbrl
from mbrl.config import run_main
from mbrl.finished import Finished, rebuild
from mbrl.plots import save_lines
from mbrl.run_folder import RunFolder
from mbrl.seeds import use_compilation_cache, use_cpu_devices

WEIGHTS = "plan.uncertainty"  # read from the train state, as the settings in which members of a sweep differ


def measure(folder: str, name: str, weights: Sequence[float], episodes: int, task: str = "") -> np.ndarray:
    """Mean returns [W, S] of the agents in a run folder, by weight. task: what they play instead of their
    own."""
    run = mbrl.load(folder)
    config = run.config["config"] | ({"task": task} if task else {})
    stored = run.config | {"config": config, "applied": [*run.config.get("vary", ()), WEIGHTS]}
    run = Finished(run.run_dir, stored, run.frames, rebuild(stored), run.seeds, run.train)

    def weighed(weight: float):
        """What was learned, with a weight for every seed where the agent looks for it."""
        weight = run.seeds.put(np.full(len(run.seeds), weight, np.float32))
        return run.train._replace(hyper={**(run.train.hyper or {}), WEIGHTS: {name: weight}})

    with run.evaluator(episodes) as evaluate:
        return np.array([evaluate(weighed(weight)).mean(1) for weight in weights])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="NAME=RUN_DIR")
    add("--uncertainty", default="disagreement", help="its name (default disagreement)")
    add("--weights", nargs="+", type=float, default=[0, -0.3, -1, -3], help="default 0 -0.3 -1 -3")
    add("--episodes", type=int, default=5, help="per seed and weight (default 5)")
    add("--task", default="", help="what the agents play (default: what they learned)")
    add("--title", default="")
    add("--figure", help="also draw a picture into this file")
    args = parser.parse_args(argv)
    named = {name: folder or name for name, _, folder in (text.partition("=") for text in args.runs)}
    seeds = [RunFolder.config_of(folder).get("config", {}).get("num_seeds", 1) for folder in named.values()]
    use_cpu_devices(max(seeds))
    use_compilation_cache()
    words = [f"{weight:g}" for weight in args.weights]
    print(f"| data | {' | '.join(words)} |\n|{'---|' * (len(words) + 1)}", flush=True)
    lines = {}
    for name, folder in named.items():
        found = measure(folder, args.uncertainty, args.weights, args.episodes, args.task)
        lines[name] = words, found
        cells = [f"{', '.join(f'{x:.0f}' for x in row)}: {row.mean():.0f}" for row in found]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.figure:
        label = f"weight of {args.uncertainty} in the plan"
        save_lines(args.figure, lines, label, "episode return", args.title, (0, None))


if __name__ == "__main__":
    run_main(main)
