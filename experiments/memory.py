"""Memory tasks: what a world model remembers.

    python experiments/memory.py --task recall --gap 30 --world-model s4wm --num-seeds 3

trains the world model alone on random actions and measures how often it knows the last reward of an episode,
which the first observation decides: having seen all of it, and having imagined all but the beginning. An
agent learns such a task with experiments/dreamer_dmc.py --preset memory --task tmaze:20.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

import world_models
from mbrl import envs, plots, probing
from mbrl.config import choose, config_type, early_flags, load_factory, override, parse_flags, run_main
from mbrl.drivers import Source, make_source
from mbrl.experiment import default_folder
from mbrl.latent_model import LatentConfig
from mbrl.logger import Logger
from mbrl.presets import MEMORY as PRESET
from mbrl.probing import ProbeConfig
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds, use_compilation_cache, use_cpu_devices
from mbrl.types import WorldModel


@dataclass(frozen=True)
class Config:
    """A memory task, and what shall remember."""

    model: LatentConfig
    """World model."""
    task: str = "recall"
    """recall, hallway, tmaze or memory_chain."""
    gap: int = 30
    """Size of the task: steps between what is shown and what it is needed for."""
    world_model: str = "s4wm"
    """World model by name."""
    seed: int = 0
    """First seed; members of a run are seed, seed + 1, ..."""
    num_seeds: int = 1
    """Independent runs in one compiled program (S)."""
    run_dir: str = ""
    """Run folder; empty makes a new one under runs/."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Training and examination of the world model."""


def default_config(world_model: str) -> Config:
    """The preset with a world model, before flags."""
    factory = load_factory("--world-model", world_model, world_models.LATENT)
    model = override(config_type(factory)(), PRESET["model"] | PRESET.get(world_model, {}))
    return Config(model, world_model=world_model, probe=override(ProbeConfig(), PRESET["probe"]))


def parse(argv: Sequence[str]) -> Config:
    """The world model's preset, then flags."""
    early = early_flags(argv, world_model="s4wm", num_seeds=1)
    use_cpu_devices(max(1, early.num_seeds))
    return parse_flags(argv, default_config(early.world_model))


def run_probe(config: Config, source: Source, model: WorldModel, seeds: Seeds, run_dir: str) -> None:
    """Trains and examines the world model, and leaves metrics, summary and curve in the run folder."""
    assert source.env is not None
    probe, c = probing.make(config.probe, source.env, model), config.probe
    init, examine = seeds.program(probe.init), seeds.program(probe.examine)
    learn = seeds.program(probe.learn, shared=(2,), donate=0)
    use_compilation_cache()
    folder = RunFolder.create(run_dir, {"config": dataclasses.asdict(config)})
    with folder, Logger(folder, seeds.seeds) as logger:
        print(f"{source.spec.name}, {config.world_model}, run folder {folder.path}")
        keys, began, rows = seeds.keys(), time.perf_counter(), []
        state = init(keys)
        for first in range(0, c.updates, c.eval_every):
            state, metrics = learn(state, keys, np.int32(first))
            found = {name: np.asarray(value) for name, value in examine(state.params, keys).items()}
            rows.append({"updates": first + c.eval_every, **found})
            logger.log(first + c.eval_every, metrics | found)
            print(line(rows[-1]), flush=True)
        summary = {
            "task": source.spec.name,
            "world_model": config.world_model,
            "updates": c.updates,
            "seeds": list(seeds.seeds),
            "params": sum(x.size for x in jax.tree.leaves(state.params)) // len(seeds),
            "wall_seconds": time.perf_counter() - began,
            "inference": rows[-1]["inference"],
            "imagination": rows[-1]["imagination"],
            "chance": rows[-1]["chance"],
            "examinations": rows,
        }
        folder.write_summary(summary)
        updates = [row["updates"] for row in rows]
        curves = {name: (updates, [row[name] for row in rows]) for name in ("inference", "imagination")}
        labels = "updates of the world model", "accuracy of the last reward"
        title = f"{source.spec.name}, {config.world_model}"
        plots.save_lines(folder.curve, curves, *labels, title, (0.4, 1.02))


def line(row) -> str:
    """An examination in words, seed by seed."""
    percent = lambda name: " ".join(f"{100 * x:5.1f}" for x in row[name])
    return (
        f"{row['updates']:6d} updates: inference {percent('inference')} %, imagination "
        f"{percent('imagination')} %, chance {percent('chance')} %"
    )


def main(argv: Sequence[str]) -> None:
    config = parse(argv)
    choose("--task", config.task, list(envs.MEMORY_TASKS))
    make_model = load_factory("--world-model", config.world_model, world_models.LATENT)
    source = make_source(f"{config.task}:{config.gap}", 1)
    seeds = Seeds.make(config.seed, config.num_seeds)
    run_dir = config.run_dir or default_folder(source.spec.name, config.world_model)
    run_probe(config, source, make_model(config.model, source.spec), seeds, run_dir)


if __name__ == "__main__":
    run_main(main)
