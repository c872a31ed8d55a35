"""Names of tasks: those that users type, and the one under which the results of a task are filed."""

from __future__ import annotations

TASK_SETS = {"mt3": "cartpole_swingup,pendulum_swingup,cup_catch"}
"""Names for several tasks."""

ALIASES = {"cup_catch": "ball_in_cup_catch"}
"""Names that users (and the dreamerv3 repository) type, and what dm_control calls the task."""


def task_name(task: str) -> str:
    """The name under which ``task``, one or several, is filed: ``cup_catch`` and ``dmc_ball-in-cup_catch``
    are one task, ``mt3`` is the three that it stands for."""
    return ",".join(map(_single, TASK_SETS.get(task, task).split(",")))


def _single(task: str) -> str:
    if ":" in task:  # of another library, such as gym:Pendulum-v1
        return task.strip()
    name = task.strip().replace("-", "_").removeprefix("dmc_")
    return ALIASES.get(name, name)
