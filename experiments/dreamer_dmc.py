"""Dreamer on the DeepMind Control Suite, or on an environment written in JAX.

    python experiments/dreamer_dmc.py --task walker_walk --preset size12m --num-seeds 4 --steps 100000

With no flags: cartpole_swingup with the preset that suits this machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import tyro

import world_models
from mbrl import envs
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import (
    check_config,
    choose,
    config_type,
    differences,
    early_flags,
    load_factory,
    override,
    run_main,
)
from mbrl.drivers import Source
from mbrl.errors import UserError, check_at_least
from mbrl.latent_model import LatentConfig
from mbrl.memory import check_memory
from mbrl.presets import DREAMER as PRESETS
from mbrl.programs import LoopConfig, make_clock
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds, use_compilation_cache, use_cpu_devices, use_debugging
from mbrl.train import Run, finish, train


@dataclass(frozen=True)
class Config:
    """Dreamer: a world model, and an actor-critic that learns in its imagination."""

    model: LatentConfig
    """World model."""
    task: str = "cartpole_swingup"
    """A dm_control task by its usual name (walker_walk, cup_catch, ...), or a JAX environment (pendulum)."""
    world_model: str = "rssm"
    """World model by name."""
    preset: str = "s"
    """Named settings that other flags override: xs, s for a CPU; size1m to size400m as published."""
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
    video: bool = False
    """Film one episode of the final policy into videos/ of the run folder (dm_control tasks only)."""
    debug: bool = False
    """Run the same code without compiling, one seed: slow, for breakpoints and prints."""
    agent: DreamerConfig = field(default_factory=DreamerConfig)
    """Behaviour."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Loop."""


def default_config(preset: str, world_model: str) -> Config:
    """The config of a preset, before flags."""
    values = PRESETS[choose("--preset", preset, list(PRESETS))]
    model = config_type(load_factory("--world-model", world_model, world_models.REGISTRY))()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = override(model, {"dtype": dtype} | values["model"] | values.get(world_model, {}))
    agent = values["agent"] | values.get(f"agent/{world_model}", {})
    agent = override(DreamerConfig(), agent | {"optimiser": values["optimiser"]})
    return Config(
        model,
        preset=preset,
        world_model=world_model,
        agent=agent,
        loop=override(LoopConfig(), values["loop"]),
    )


def parse(argv: Sequence[str]) -> Config:
    """Preset, then the stored config of a resumed run, then flags."""
    early = early_flags(argv, preset=None, world_model="rssm", num_seeds=1, run_dir="", resume=False)
    use_cpu_devices(max(1, early.num_seeds))
    if early.resume:
        if not early.run_dir:
            raise UserError("--resume needs --run-dir: the folder of the run to continue")
        return resumed_config(argv, early.run_dir)
    if early.preset is None:
        cpu = jax.default_backend() == "cpu"
        early.preset = "s" if cpu else "size12m"
        device = "this machine has no accelerator" if cpu else f"found {jax.devices()[0].device_kind}"
        print(f"preset {early.preset}: {device}; choose another with --preset {{{','.join(PRESETS)}}}")
    return tyro.cli(Config, args=argv, default=default_config(early.preset, early.world_model))


def resumed_config(argv: Sequence[str], run_dir: str) -> Config:
    """The stored config; flags may repeat it but not change it."""
    stored = RunFolder.config_of(run_dir)["config"]
    use_cpu_devices(stored["num_seeds"])
    config = override(default_config(stored["preset"], stored["world_model"]), stored)
    config = dataclasses.replace(config, run_dir=run_dir, resume=True)
    given = tyro.cli(Config, args=argv, default=dataclasses.replace(config, video=False, debug=False))
    config = dataclasses.replace(config, video=given.video, debug=given.debug)
    if changed := differences(config, given):
        raise UserError(f"--resume continues a run as it was started, but {changed[0]} differs from it")
    return config


def make_source(config: Config) -> Source:
    """The environment of the task, on the device or on the host."""
    repeat = config.loop.action_repeat
    check_at_least("loop.action_repeat", repeat, 1)
    if envs.is_jax(config.task):
        env = envs.make_jax(config.task)
        return Source(env.spec, env)
    try:
        spec = envs.make_host(config.task, 0, repeat).spec
    except ValueError as error:
        raise UserError(f"--task: {error}") from None
    return Source(spec, make_host=lambda seed: envs.make_host(config.task, seed, repeat))


def main(argv: Sequence[str]) -> None:
    config = parse(argv)
    check_config(config)
    if config.debug:
        use_debugging(config.num_seeds)
    make_model = load_factory("--world-model", config.world_model, world_models.REGISTRY)
    source = make_source(config)
    loop = dataclasses.replace(config.loop, action_repeat=source.spec.action_repeat)
    length = config.loop.batch_length + int(config.agent.replay_context)
    clock = make_clock(loop, config.steps, length)
    seeds = Seeds.make(config.seed, config.num_seeds)
    model = make_model(config.model, source.spec)
    agent = dreamer.make(config.agent, source.spec, model, config.model.discount, clock.total_updates)
    run = Run(agent, source, seeds, loop, clock, length)
    check_memory(run, print)
    run_dir = config.run_dir or time.strftime(f"runs/%Y%m%d-%H%M%S-{config.task}-{config.preset}")
    if config.resume:
        folder = RunFolder.open_for_resume(run_dir)
    else:
        folder = RunFolder.create(run_dir, {"config": dataclasses.asdict(config)})
    use_compilation_cache()
    with folder:
        print(f"{config.task}, {config.world_model} {config.preset}, run folder {folder.path}")
        summary = train(run, folder, config.resume, config.video)
        title = f"{config.task}: Dreamer, {config.world_model}, {config.preset}"
        finish(folder, summary, config.task, title)


if __name__ == "__main__":
    run_main(main)
