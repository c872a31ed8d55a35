"""What every experiment does around its agent: flags, presets, resume, environments, run folder, loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import tyro

from mbrl.config import check_config, differences, early_flags, override
from mbrl.drivers import make_source
from mbrl.errors import UserError
from mbrl.finished import learned_by
from mbrl.memory import check_memory
from mbrl.programs import LoopConfig, make_clock
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds, use_compilation_cache, use_cpu_devices, use_debugging, use_determinism
from mbrl.train import Run, finish, train
from mbrl.types import Agent, EnvSpec


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Flags that every experiment has; an experiment's config adds its parts."""

    task: str = "cartpole_swingup"
    """A dm_control task by its usual name (walker_walk, cup_catch, ...), a JAX environment (pendulum,
    tmaze:20), gym:NAME of gymnasium, or module:function of your own."""
    preset: str = "s"
    """Named settings that other flags override: those named by letters for a CPU, the others as published."""
    seed: int = 0
    """First seed; members of a run are seed, seed + 1, ..."""
    num_seeds: int = 1
    """Independent runs in one compiled program (S)."""
    steps: int = 80_000
    """Length of the run in simulator frames per seed, action repeat included."""
    run_dir: str = ""
    """Run folder; empty makes a new one under runs/."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint, with the settings stored there."""
    from_run: str = ""
    """Start from what the agents in another run folder have learned; optimiser and replay start afresh."""
    video: bool = False
    """Film one episode of the final policy into videos/ of the run folder (dm_control and gymnasium)."""
    debug: bool = False
    """Run the same code without compiling, one seed: slow, for breakpoints and prints."""
    deterministic: bool = False
    """Equal settings give equal bits on a GPU too, at the cost of speed; on a CPU they do anyway."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Loop."""


C = TypeVar("C", bound=Experiment)


def parse(
    argv: Sequence[str], default: Callable[..., C], presets: Iterable[str], accelerator: str, **parts: str
) -> C:
    """The config: of a preset or of the run to resume, then flags.

    default(preset, **parts) -> config before flags. presets: their names. accelerator: the preset for one.
    parts: flags that decide which fields there are, by their default (world_model="rssm").
    """
    early = early_flags(
        argv, preset=None, num_seeds=1, run_dir="", resume=False, deterministic=False, **parts
    )
    use_cpu_devices(max(1, early.num_seeds))
    if early.deterministic:
        use_determinism()
    if early.resume:
        if not early.run_dir:
            raise UserError("--resume needs --run-dir: the folder of the run to continue")
        return resumed(argv, default, early.run_dir, parts)
    if early.preset is None:
        cpu = jax.default_backend() == "cpu"
        early.preset = "s" if cpu else accelerator
        device = "this machine has no accelerator" if cpu else f"found {jax.devices()[0].device_kind}"
        print(f"preset {early.preset}: {device}; choose another with --preset {{{','.join(presets)}}}")
    config = default(early.preset, **{name: getattr(early, name) for name in parts})
    return tyro.cli(type(config), args=argv, default=config)


def resumed(argv: Sequence[str], default: Callable[..., C], run_dir: str, parts: dict[str, str]) -> C:
    """The stored config; flags may repeat it but not change it."""
    stored = RunFolder.config_of(run_dir).get("config", {})
    if "preset" not in stored:
        raise UserError(
            f"--run-dir {run_dir} holds a run of another script, which cannot be resumed by this one"
        )
    use_cpu_devices(stored["num_seeds"])
    if stored.get("deterministic"):
        use_determinism()
    # A run from before a part could be chosen has the default one.
    named = {name: stored.get(name, value) for name, value in parts.items()}
    config = override(default(stored["preset"], **named), stored)
    config = dataclasses.replace(config, run_dir=run_dir, resume=True)
    free = dataclasses.replace(config, video=False, debug=False, from_run="")  # they may change
    given = tyro.cli(type(config), args=argv, default=free)
    config = dataclasses.replace(config, video=given.video, debug=given.debug, from_run=given.from_run)
    if changed := differences(config, given):
        raise UserError(f"--resume continues a run as it was started, but {changed[0]} differs from it")
    return config


def default_folder(*parts: str) -> str:
    """A new run folder under runs/, named by the time and ``parts``."""
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{'-'.join(parts).translate(str.maketrans(':/', '__'))}"


def execute(
    config: C, kind: str, make_agent: Callable[[C, EnvSpec, int], Agent], extra_rows: int, name: str
) -> dict[str, Any]:
    """Trains and evaluates; returns the summary that the run folder gets.

    kind: of agent, as `mbrl.load` knows it. make_agent(config, spec, total updates).
    extra_rows: rows of a sampled sequence beside the ``loop.batch_length`` that are trained.
    name: of the agent, for titles.
    """
    check_config(config)
    if config.debug:
        use_debugging(config.num_seeds)
    source = make_source(config.task, config.loop.action_repeat)
    loop = dataclasses.replace(config.loop, action_repeat=source.spec.action_repeat)
    if loop.env_workers and source.env is not None:
        raise UserError(
            f"loop.env_workers is {loop.env_workers}, but {config.task} is part of the compiled program: it "
            "must be 0"
        )
    length = loop.batch_length + extra_rows
    clock = make_clock(loop, config.steps, length)
    seeds = Seeds.make(config.seed, config.num_seeds)
    agent = make_agent(config, source.spec, clock.total_updates)
    run = Run(agent, source, seeds, loop, clock, length)
    run_dir = config.run_dir or default_folder(config.task, config.preset)
    stored = {"agent": kind, "config": dataclasses.asdict(config)}
    return launch(
        run, stored, run_dir, f"{name}, {config.preset}", config.resume, config.video, config.from_run
    )


def launch(
    run: Run,
    stored: dict[str, Any],
    run_dir: str,
    name: str,
    resume: bool = False,
    video: bool = False,
    from_run: str = "",
) -> dict[str, Any]:
    """Trains ``run`` in its folder, new or resumed, draws its curve, prints its results, returns its summary.

    stored: what config.json shall hold. name: of agent and settings, for titles.
    """
    check_memory(run, print)
    # Before anything is written: it may be refused.
    learned = learned_by(from_run, run.shapes().train, len(run.seeds)) if from_run and not resume else {}
    if resume:
        folder = RunFolder.open_for_resume(run_dir)
    else:
        folder = RunFolder.create(run_dir, stored)
    use_compilation_cache()
    task = run.source.spec.name
    with folder:
        print(f"{task}: {name}, run folder {folder.path}")
        summary = train(run, folder, resume, video, learned)
        finish(folder, summary, task, f"{task}: {name}")
    return summary
