"""What every experiment does around its agent: flags, presets, resume, environments, run folder, loop."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from mbrl import dataset, multitask, open_loop, processes, report, sinks
from mbrl.config import check_config, differences, early_flags, override, parse_flags
from mbrl.drivers import NO_TASK, Source, stored_source
from mbrl.envs import pixels
from mbrl.envs.pixels import CAMERA, CameraConfig, Shown
from mbrl.errors import UserError
from mbrl.finished import learned_by, load
from mbrl.images import is_image
from mbrl.memory import check_memory, compile_and_check, place_images
from mbrl.multitask import STATE
from mbrl.population import check_varied, with_hyper
from mbrl.processes import all_do, leads, one_voice
from mbrl.programs import LoopConfig, make_clock, make_offline_clock
from mbrl.run_folder import RunFolder, portable
from mbrl.seeds import Seeds, use_compilation_cache, use_cpu_devices, use_debugging, use_determinism
from mbrl.train import Run, finish, train
from mbrl.types import Agent, EnvSpec, Trajectory


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Flags that every experiment has; an experiment's config adds its parts."""

    task: str = "cartpole_swingup"
    """A dm_control task by its usual name (walker_walk, cup_catch, ...), a JAX environment (pendulum,
    tmaze:20, brax:ant, gymnax:NAME, playground:NAME), gym:NAME, module:function of your own, or for
    TD-MPC2 several on the host (A,B,C or mt3). With --offline that of the evaluations, by default none."""
    env_backend: str = "host"
    """Where dm_control's tasks run: host, or mjx for those that MuJoCo MJX simulates on the device."""
    obs: Shown = "state"
    """What the agent sees: the state of the task, what a camera shows of it, or both."""
    camera: CameraConfig = CAMERA
    """Camera."""
    preset: str = "s"
    """Named settings that other flags override; python -m mbrl presets describes them."""
    seed: int = 0
    """First seed; members of a run are seed, seed + 1, ..."""
    num_seeds: int = 1
    """Independent runs in one compiled program (S)."""
    steps: int = 80_000
    """Length of the run in simulator frames per seed, action repeat included. With --offline in updates, as
    are the intervals of loop."""
    run_dir: str = ""
    """Run folder; empty makes a new one under runs/."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint, with the settings stored there."""
    from_run: str = ""
    """Start from what the agents in another run folder have learned; optimiser and replay start afresh."""
    task_like: str = ""
    """Of the several tasks that --from-run learned, the one whose embedding new tasks begin with; by default
    the mean of all."""
    offline: str = ""
    """Learn from recorded episodes and collect none: a folder that python -m mbrl export wrote, that of a
    Minari dataset, a D4RL-style file *.hdf5, or several, separated by commas."""
    data_parallel: int = 1
    """Devices that share the batch of each seed; the others hold further seeds. May change on resume."""
    distributed: bool = False
    """Run on several processes that see the same run_dir: started by srun, mpirun or on a TPU pod, or named
    by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. May change on resume."""
    video: bool = False
    """Film one episode of the final policy into videos/ of the run folder (dm_control and gymnasium)."""
    sinks: tuple[Literal["wandb", "trackio"], ...] = ()
    """Where metrics go beside metrics.jsonl and TensorBoard: wandb, trackio (extras of these names)."""
    debug: bool = False
    """Run the same code without compiling, one seed: slow, for breakpoints and prints."""
    deterministic: bool = False
    """Equal settings give equal bits on a GPU too, at the cost of speed; on a CPU they do anyway."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Environments, replay, how often to update, log, evaluate and save."""


C = TypeVar("C", bound=Experiment)


def parse(
    argv: Sequence[str], default: Callable[..., C], presets: Iterable[str], accelerator: str, **parts: str
) -> C:
    """The config: of a preset or of the run to resume, then flags.

    default(preset, **parts) -> config before flags. presets: their names. accelerator: the preset for one.
    parts: flags that decide which fields there are, by their default (world_model="rssm").
    """
    defaults = dict(preset=None, num_seeds=1, run_dir="", resume=False, data_parallel=1, distributed=False)
    early = early_flags(argv, **defaults, deterministic=False, obs="state", offline="", **parts)
    if early.deterministic:
        use_determinism()
    if early.distributed:
        processes.join()
    elif not early.resume:
        use_cpu_devices(max(1, early.num_seeds), max(1, early.data_parallel))
    if early.resume:
        return resumed(argv, default, early, parts)
    if early.preset is None:
        cpu = jax.default_backend() == "cpu"
        small = "s" if early.obs == "state" or "s_pixels" not in presets else "s_pixels"
        early.preset = small if cpu else accelerator
        device = "this machine has no accelerator" if cpu else f"found {jax.devices()[0].device_kind}"
        print(f"preset {early.preset}: {device}; choose another with --preset {{{','.join(presets)}}}")
    config = default(early.preset, **{name: getattr(early, name) for name in parts})
    if early.offline:
        config = dataclasses.replace(config, task=NO_TASK)
    return parse_flags(argv, config)


FREE = ("video", "debug", "from_run", "data_parallel", "distributed")
"""What a resumed run may have otherwise than the run that it continues."""


def resumed(
    argv: Sequence[str], default: Callable[..., C], early: argparse.Namespace, parts: dict[str, str]
) -> C:
    """The stored config; flags may repeat it but not change it, but for those that are ``FREE``."""
    run_dir, record = early.run_dir, record_of(early.run_dir, "preset")
    stored = record["config"]
    if stored.get("deterministic"):
        use_determinism()
    if not early.distributed:
        use_cpu_devices(stored["num_seeds"], max(1, early.data_parallel))
    # A run from before a part could be chosen has the default one.
    named = {name: stored.get(name, value) for name, value in parts.items()}
    try:
        config = override(default(stored["preset"], **named), stored)
    except UserError as error:
        agent = record.get("agent", "dreamer")
        raise UserError(
            f"--run-dir {run_dir} holds a run of the agent {agent}, which this script cannot resume: {error}"
        ) from error
    config = dataclasses.replace(config, run_dir=run_dir, resume=True)
    unset = {name: getattr(Experiment, name) for name in FREE}
    given = parse_flags(argv, dataclasses.replace(config, **unset))
    given = dataclasses.replace(given, offline=portable(given.offline))
    config = dataclasses.replace(config, **{name: getattr(given, name) for name in FREE})
    refuse_changes(config, given)
    return config


def record_of(run_dir: str, field: str) -> dict[str, Any]:
    """The ``config.json`` of the run to resume, whose config must have ``field``, as the script's own do."""
    if not run_dir:
        raise UserError("--resume needs --run-dir: the folder of the run to continue")
    record = RunFolder.config_of(run_dir)
    if field not in record.get("config", {}):
        raise UserError(
            f"--run-dir {run_dir} holds a run of another script, which cannot be resumed by this one"
        )
    return record


def refuse_changes(config: Any, given: Any) -> None:
    """UserError where flags ask for another config than that of the run to resume."""
    if changed := differences(config, given):
        raise UserError(f"--resume continues a run as it was started, but {changed[0]} differs from it")


def default_folder(*parts: str) -> str:
    """A new run folder under runs/, named by the time and ``parts``."""
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{'-'.join(parts).translate(str.maketrans(':/', '__'))}"


def execute(
    config: C,
    kind: str,
    make_agent: Callable[[C, EnvSpec, int], Agent],
    extra_rows: int,
    name: str,
    vary: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Trains and evaluates; returns the summary that the run folder gets.

    kind: of agent, as `mbrl.load` knows it. make_agent(config, spec, total updates).
    extra_rows: rows of a sampled sequence beside the ``loop.batch_length`` that are trained.
    name: of the agent, for titles. vary: numbers in which the seeds differ, {dotted field: [S]}; a resumed
    run has those of its folder.
    """
    check_config(config)
    pixels.check(config.camera)
    sinks.check(config.sinks)
    if config.debug:
        use_debugging(config.num_seeds)
    length = config.loop.batch_length + extra_rows
    before = spec_before(config, kind)
    made_of = {"agent": kind, "config": dataclasses.asdict(config), **find_padding(config, before)}
    if config.offline:
        source, recorded, rows = find_data(config, length, made_of)
        # Served in order first, recorded episodes would come one by one.
        loop = dataclasses.replace(config.loop, replay_online=False)
        clock = make_offline_clock(loop, config.steps, rows)
        made_of |= {"spec": dataclasses.asdict(source.spec), "rows": rows}
    else:
        source, recorded = stored_source(made_of), None
        loop = dataclasses.replace(config.loop, action_repeat=source.spec.action_repeat)
        clock = make_clock(loop, config.steps, length)
    check_tasks(config, kind, source.spec)
    if loop.env_workers and source.env is not None:
        raise UserError(
            f"loop.env_workers is {loop.env_workers}, but {config.task} is part of the compiled program: it "
            "must be 0"
        )
    seeds = Seeds.make(config.seed, config.num_seeds, config.data_parallel)
    check_devices(config, seeds, source.env is None and source.playable)
    build = lambda config: make_agent(config, source.spec, clock.total_updates)
    if config.resume:
        vary = RunFolder.config_of(config.run_dir).get("vary", {})
    check_varied(config, vary, build)
    run = Run(with_hyper(build, config, list(vary)), source, seeds, loop, clock, length, recorded)
    run_dir = config.run_dir or default_folder(source.spec.name, config.preset)
    stored = made_of | ({"vary": dict(vary)} if vary else {})
    start = find_start(config, before, run)
    if vary:
        start |= {"hyper": {field: np.array(values, np.float32) for field, values in vary.items()}}
    title = f"{name}, {config.preset}"
    return launch(run, stored, run_dir, title, config.resume, config.video, start, config.sinks)


def spec_before(config: Experiment, kind: str) -> EnvSpec | None:
    """What an agent that a new run starts from has learned, where that can be several tasks: of TD-MPC2."""
    if not config.from_run or config.resume:
        return None
    record = RunFolder.config_of(config.from_run)
    if not isinstance(record.get("config", {}).get("agent"), Mapping):
        raise UserError(f"--from-run {config.from_run} holds a run of another script, which trained no agent")
    return stored_source(record).spec if kind == "tdmpc" else None


def find_start(config: Experiment, before: EnvSpec | None, run: Run) -> dict[str, Any]:
    """Fields of the train state that a new run takes from --from-run. before: what `spec_before` returned."""
    if not config.from_run or config.resume:
        return {}
    spec, mixture = run.source.spec, None
    if before is not None and (before.tasks or spec.tasks):
        mixture = multitask.embeddings(before, spec, config.task_like)
    return learned_by(config.from_run, run.shapes.train, len(run.seeds), mixture)


def check_tasks(config: Experiment, kind: str, spec: EnvSpec) -> None:
    """UserError where an agent does not learn several tasks, and where it would not see as much of each."""
    tasks = len(spec.tasks)
    if config.task_like and not config.resume and not (tasks and config.from_run):
        raise UserError(
            f"task_like is {config.task_like!r}, but only a run that starts from one of several tasks "
            "(--from-run) has embeddings to begin with"
        )
    if tasks and kind != "tdmpc":
        raise UserError(
            f"{spec.name} is {tasks} tasks: only TD-MPC2 (experiments/tdmpc_dmc.py) learns several"
        )
    if tasks and not config.offline and config.loop.num_envs % tasks:
        raise UserError(
            f"loop.num_envs is {config.loop.num_envs}, it must be a multiple of the number of tasks, which "
            f"is {tasks}"
        )


def find_padding(config: Experiment, before: EnvSpec | None) -> dict[str, Any]:
    """What is stored of a run that starts from an agent of several tasks: ``padding``, the widths of
    observation and action that its networks take. before: what --from-run learned, where that can be several
    tasks."""
    if config.resume:
        stored = RunFolder.config_of(config.run_dir)
        return {"padding": stored["padding"]} if "padding" in stored else {}
    if before is None or not before.tasks:
        return {}
    return {"padding": [before.obs[STATE].size, before.action.size]}


def find_data(
    config: Experiment, length: int, stored: Mapping[str, Any]
) -> tuple[Source, Trajectory | None, int]:
    """The environment of a run that learns from recorded episodes; these, as columns of replay; their rows.

    length: rows per sampled sequence. stored: what its ``config.json`` holds so far. A resumed run has the
    episodes in its checkpoint and reads no file.
    """
    if config.resume:
        before = RunFolder.config_of(config.run_dir)
        return stored_source(before), None, before["rows"]
    if config.task == NO_TASK:
        usual = {"obs": "state", "env_backend": "host"}
        for field, value in usual.items():
            if (given := getattr(config, field)) != value:
                raise UserError(f"{field} is {given!r}, but --offline without --task has no environment")
        found = dataset.load_joined(config.offline)
        source = Source(found.spec)
    else:
        source = stored_source(stored)
        found = dataset.load_joined(config.offline, source.spec)
    rows = dataset.columns(found, config.loop.num_envs, length)
    print(f"{rows.reward.size:,} recorded rows: {found.source}")
    return source, rows, len(rows.reward)


def check_devices(config: Experiment, seeds: Seeds, host: bool) -> None:
    """UserError for what the devices and processes of the run cannot do. host: environments live there."""
    if config.loop.batch_size % seeds.data:
        raise UserError(
            f"loop.batch_size is {config.loop.batch_size}, it must be a multiple of data_parallel, "
            f"which is {seeds.data}"
        )
    if jax.process_count() == 1:
        return
    if not config.run_dir:
        raise UserError("--distributed needs --run-dir: a folder that all processes share")
    if config.video:
        raise UserError("--video needs a run of one process; experiments/evaluate.py films a finished run")
    if host and seeds.data > jax.local_device_count():
        raise UserError(
            f"data_parallel is {seeds.data}, but a process has {jax.local_device_count()} device(s): seeds "
            f"whose environments live on the host cannot span processes"
        )


@one_voice()
def launch(
    run: Run,
    stored: dict[str, Any],
    run_dir: str,
    name: str,
    resume: bool = False,
    video: bool = False,
    start: Mapping[str, Any] = MappingProxyType({}),
    sink_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains ``run`` in its folder, new or resumed, draws its curve, prints its results, returns its summary.

    stored: what config.json shall hold. name: of agent and settings, for titles. start: fields of the train
    state that a new run begins with.
    """
    # All that may be refused comes before anything is written.
    run = place_images(run)
    least = check_memory(run)
    all_do(lambda: RunFolder.check(run_dir, resume), leader_only=True)
    use_compilation_cache()
    task = run.source.spec.name
    print(f"{task}: {name}, run folder {run_dir}")
    print("compiling", flush=True)
    programs, began = run.programs(), time.perf_counter()
    compile_and_check(run, programs, least, print)
    made = programs, time.perf_counter() - began
    open_folder = RunFolder.open_for_resume if resume else partial(RunFolder.create, config=stored)
    folder = all_do(lambda: open_folder(run_dir), leader_only=True) or RunFolder.follow(run_dir)
    with folder:
        opened = sinks.open_all(sink_names if leads() else (), folder, f"{task}: {name}")
        summary = train(run, folder, resume, video, start, made, opened)
        if leads():
            finish(folder, summary, task, f"{task}: {name}", run.clock.unit)
        seen = run.source.playable and any(map(is_image, run.source.spec.obs.values()))
        if seen and jax.process_count() == 1:
            film(folder.path)
    return summary


def film(run_dir: Path) -> None:
    """Films what the world model expects to see and puts that into the report; where this fails, for whatever
    reason, one line says so: the results are there already."""
    try:
        open_loop.write(load(run_dir))
        report.write(run_dir)
    except Exception as error:
        kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
        said = (str(error).splitlines() or ["no reason given"])[0]
        print(f"no film of what the world model expects: {kind}{said}")
