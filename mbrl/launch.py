"""From a task's name and a prepared run to a finished run folder: what experiments with agents share."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from mbrl import envs
from mbrl.drivers import Source
from mbrl.errors import UserError, check_at_least
from mbrl.memory import check_memory
from mbrl.run_folder import RunFolder
from mbrl.seeds import use_compilation_cache
from mbrl.train import Run, finish, train


def make_source(task: str, action_repeat: int) -> Source:
    """The environment of the task, on the device or on the host. UserError for unknown names."""
    check_at_least("loop.action_repeat", action_repeat, 1)
    try:
        if envs.is_jax(task):
            env = envs.make_jax(task)
            return Source(env.spec, env)
        spec = envs.make_host(task, 0, action_repeat).spec
    except ValueError as error:
        raise UserError(f"--task: {error}") from None
    return Source(spec, make_host=lambda seed: envs.make_host(task, seed, action_repeat))


def default_folder(task: str, *parts: str) -> str:
    """A new run folder under runs/, named by time, task and ``parts``."""
    name = "-".join([time.strftime("%Y%m%d-%H%M%S"), task.replace(":", "_"), *parts])
    return f"runs/{name}"


def launch(
    run: Run, config: Any, run_dir: str, headline: str, title: str, resume: bool = False, video: bool = False
) -> None:
    """Trains ``run`` in its folder, new or resumed, draws its curve and prints its results.

    config: dataclass that config.json shall hold. headline: printed before the folder. title: of the curve.
    """
    check_memory(run, print)
    if resume:
        folder = RunFolder.open_for_resume(run_dir)
    else:
        folder = RunFolder.create(run_dir, {"config": dataclasses.asdict(config)})
    use_compilation_cache()
    with folder:
        print(f"{headline}, run folder {folder.path}")
        summary = train(run, folder, resume, video)
        finish(folder, summary, run.source.spec.name, title)
