"""Evaluates the agents of a run folder: all seeds and episodes at once, deterministic policies.

python experiments/evaluate.py runs/my-run --num-episodes 20 --video my-run.mp4 --json my-run.json
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

import mbrl
from mbrl import multitask, published
from mbrl.config import run_main
from mbrl.errors import UserError
from mbrl.finished import Finished
from mbrl.logger import results_table
from mbrl.results import settings_of
from mbrl.run_folder import RunFolder, write_json
from mbrl.seeds import use_compilation_cache, use_cpu_devices
from mbrl.statistics import over_seeds


@dataclass(frozen=True)
class Config:
    """Evaluate the agents of a finished run, or of one that is still going on."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    num_episodes: int = 0
    """Episodes per seed, and per task where there are several; 0 repeats the run's own evaluation."""
    planner: str | None = None
    """Act by this planner (mppi, icem, ...) instead of the run's own; none acts by the policy alone."""
    value: float | None = None
    """Weight of the terminal value in a planner's score instead of the run's own."""
    uncertainty: str | None = None
    """Weights of named uncertainties in a planner's score instead of the run's own, as in disagreement=-1."""
    video: Path | None = None
    """Film one episode of the first seed into this MP4 file."""
    json: Path | None = None
    """Write the result to this file."""


def result(run: Finished, returns: np.ndarray, seconds: float) -> dict[str, Any]:
    """What is written as JSON: every return, and what ``summary.json`` has over seeds, too."""
    per_seed = returns.mean(1)
    tasks = multitask.by_task(run.spec, returns)
    return ({"tasks": tasks} if tasks else {}) | {
        "run": run.run_dir.name,
        "task": run.spec.name,
        "env_steps": run.frames,
        "seeds": list(run.seeds.seeds),
        "episodes": returns,
        "per_seed": per_seed,
        **over_seeds(per_seed, run.config.get("vary")),
        "seconds": seconds,
    }


def main(argv: Sequence[str]) -> None:
    config = tyro.cli(Config, args=argv)
    stored = RunFolder.config_of(config.run_dir).get("config", {})
    use_cpu_devices(stored.get("num_seeds", 1))
    use_compilation_cache()
    acting: dict[str, Any] = {} if config.planner is None else {"planner": config.planner}
    weights = {name: getattr(config, name) for name in ("value", "uncertainty")}
    weights = {name: given for name, given in weights.items() if given is not None}
    acting |= {"plan": weights} if weights else {}
    run = mbrl.load(config.run_dir, **acting)
    began = time.perf_counter()
    returns = run.evaluate(config.num_episodes or None)
    seconds = time.perf_counter() - began
    method = published.method_of(run.config)
    unit = "updates" if run.config["config"].get("offline") else "frames"
    score = published.score_at(run.spec.name, run.frames, method) if unit == "frames" else None
    tasks, seeds = multitask.by_task(run.spec, returns), list(run.seeds.seeds)
    settings = settings_of(run.config.get("vary", {}))
    table = results_table(run.spec.name, run.frames, returns, seconds, score, seeds, unit, tasks, settings)
    Console().print(table)
    if config.json is not None:
        write_json(config.json, result(run, returns, seconds))
        print(f"result: {config.json}")
    if config.video is not None:
        film(run, config.video)


def film(run: Finished, path: Path) -> None:
    """A video where the machine can render; otherwise the reason why there is none."""
    try:
        value = run.film(path)
    except UserError as error:
        print(error)
    else:
        print(f"video: {path}, seed {run.seeds.seeds[0]}, return {value:.1f}")


if __name__ == "__main__":
    run_main(main)
