"""Memory tasks: what a world model remembers.

    python experiments/memory.py --task recall --gap 30 --world-model s4wm --num-seeds 3

trains the world model alone on random actions and measures how often it knows the last reward of an episode,
which the first observation decides: having seen all of it, and having imagined all but the beginning. An
agent learns such a task with experiments/dreamer_dmc.py --preset memory --task tmaze:20. Ctrl-C ends a probe
after its next examination, and --resume --run-dir DIR goes on from there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

import world_models
from mbrl import checkpoints, envs, plots, probing
from mbrl.config import choose, config_type, early_flags, load_factory, override, parse_flags, run_main
from mbrl.drivers import make_source
from mbrl.experiment import default_folder, record_of, refuse_changes
from mbrl.interruption import Interrupted, Interruption
from mbrl.latent_model import LatentConfig
from mbrl.logger import Logger
from mbrl.presets import MEMORY as PRESET
from mbrl.probing import Probe, ProbeConfig
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds, use_compilation_cache, use_cpu_devices


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
    resume: bool = False
    """Continue the run in run_dir from its newest examination, with the settings stored there."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Training and examination of the world model."""


def default_config(world_model: str) -> Config:
    """The preset with a world model, before flags."""
    factory = load_factory("--world-model", world_model, world_models.LATENT)
    model = override(config_type(factory)(), PRESET["model"] | PRESET.get(world_model, {}))
    return Config(model, world_model=world_model, probe=override(ProbeConfig(), PRESET["probe"]))


def parse(argv: Sequence[str]) -> Config:
    """The world model's preset or the config of the run to resume, then flags."""
    early = early_flags(argv, world_model="s4wm", num_seeds=1, run_dir="", resume=False)
    if not early.resume:
        use_cpu_devices(max(1, early.num_seeds))
        return parse_flags(argv, default_config(early.world_model))
    stored = record_of(early.run_dir, "probe")["config"]
    use_cpu_devices(stored["num_seeds"])
    config = override(default_config(stored["world_model"]), stored)
    config = dataclasses.replace(config, run_dir=early.run_dir, resume=True)
    refuse_changes(config, parse_flags(argv, config))
    return config


def run_probe(config: Config, probe: Probe, seeds: Seeds, folder: RunFolder) -> None:
    """Trains and examines the world model, and leaves metrics, checkpoints, summary and curve in the run
    folder. Raises Interrupted after SIGTERM or Ctrl-C, when the next examination is saved."""
    c, init, examine = config.probe, seeds.program(probe.init), seeds.program(probe.examine)
    learn = seeds.program(probe.learn, shared=(2,), donate=0)
    keys, began = seeds.keys(), time.perf_counter()
    state, rows = init(keys), []
    with Logger(folder, seeds.seeds) as logger, Interruption() as interruption:
        if config.resume:
            restored = checkpoints.restore(folder.checkpoints, state)
            state, rows = restored.state, restored.meta["rows"]
            began -= restored.meta["seconds"]
            logger.truncate_to(restored.step)
        for first in range(len(rows) * c.eval_every, c.updates, c.eval_every):
            state, metrics = learn(state, keys, np.int32(first))
            found = {name: np.asarray(value) for name, value in examine(state.params, keys).items()}
            done = first + c.eval_every
            rows.append({"updates": done, **found})
            logger.log(done, metrics | found)
            logger.flush()
            print(line(rows[-1]), flush=True)
            meta = {"rows": rows, "seconds": time.perf_counter() - began}
            saved = checkpoints.save(folder.checkpoints, done, state, meta=meta)
            if interruption.number and done < c.updates:
                raise Interrupted.at(f"{done} updates", folder.path, saved, interruption.number)
    params = sum(x.size for x in jax.tree.leaves(state.params)) // len(seeds)
    finish(config, folder, rows, seeds, params, time.perf_counter() - began)


def finish(
    config: Config, folder: RunFolder, rows: list[dict], seeds: Seeds, params: int, seconds: float
) -> None:
    """Leaves summary and curve of the examinations ``rows`` in the run folder."""
    task = f"{config.task}:{config.gap}"
    summary = {
        "task": task,
        "world_model": config.world_model,
        "updates": config.probe.updates,
        "seeds": list(seeds.seeds),
        "params": params,
        "wall_seconds": seconds,
        **{name: rows[-1][name] for name in ("inference", "imagination", "chance")},
        "examinations": rows,
    }
    folder.write_summary(summary)
    updates = [row["updates"] for row in rows]
    curves = {name: (updates, [row[name] for row in rows]) for name in ("inference", "imagination")}
    labels = "updates of the world model", "accuracy of the last reward"
    plots.save_lines(folder.curve, curves, *labels, f"{task}, {config.world_model}", (0.4, 1.02))


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
    assert source.env is not None
    probe = probing.make(config.probe, source.env, make_model(config.model, source.spec))
    use_compilation_cache()
    run_dir = config.run_dir or default_folder(source.spec.name, config.world_model)
    stored = {"config": dataclasses.asdict(config)}
    with RunFolder.open_for_resume(run_dir) if config.resume else RunFolder.create(run_dir, stored) as folder:
        print(f"{source.spec.name}, {config.world_model}, run folder {folder.path}")
        run_probe(config, probe, seeds, folder)


if __name__ == "__main__":
    run_main(main)
