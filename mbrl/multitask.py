"""Several tasks as one environment: observations and actions padded to the widest, the task's number beside
them (TD-MPC2, arXiv 2310.16828, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mbrl.config import choose
from mbrl.envs import dmc
from mbrl.errors import UserError
from mbrl.losses import episode_discount
from mbrl.types import ArraySpec, EnvSpec, HostEnv, TimeStep, Trajectory

TASK = "task"
"""Observation that holds the number of the task."""
STATE = "state"
"""Observation that holds all others, one after the other, and zeros."""


def count(spec: EnvSpec) -> int:
    """Number of tasks: 1 for an environment that is not several."""
    return max(1, len(spec.tasks))


def join(name: str, specs: Sequence[EnvSpec], width: int = 0, actions: int = 0) -> EnvSpec:
    """The spec of several tasks. width, actions: the least widths of observation and action.

    UserError for discrete actions, observations that are no vectors of floats, differing action repeats, and
    a task that is named twice.
    """
    for spec in specs:
        if spec.action.classes is not None:
            raise UserError(f"{spec.name} has discrete actions: several tasks must have continuous ones")
        if any(a.classes is not None or a.dtype != "float32" for a in spec.obs.values()):
            raise UserError(f"{spec.name} shows images or categories: several tasks must show float vectors")
        if sum(other.name == spec.name for other in specs) > 1:
            raise UserError(f"{spec.name} is named twice: several tasks must differ")
        if spec.action_repeat != specs[0].action_repeat:
            raise UserError(f"{spec.name} and {specs[0].name} differ in their action repeat")
    width = max(width, *(sum(a.size for a in spec.obs.values()) for spec in specs))
    limits = [spec.max_steps for spec in specs]
    return EnvSpec(
        name,
        {STATE: ArraySpec((width,)), TASK: ArraySpec((), "int32", len(specs))},
        ArraySpec((max(actions, *(spec.action.size for spec in specs)),)),
        specs[0].action_repeat,
        None if None in limits else max(limit for limit in limits if limit is not None),
        tuple(specs),
    )


def action_mask(spec: EnvSpec) -> np.ndarray:
    """float32 [tasks, A]: 1 for the actions that a task has, 0 for padding."""
    entries = np.arange(spec.action.size)
    return np.array([entries < task.action.size for task in spec.tasks], np.float32)


def discounts(spec: EnvSpec, discount: Any) -> list[Any]:
    """A scalar for each task: ``discount``, or where it is 0 the one that suits its episodes."""
    return [episode_discount(task.max_steps, discount) for task in spec.tasks]


def by_task(spec: EnvSpec, returns: Any) -> dict[str, np.ndarray]:
    """Mean return [S] of every task, by its name, from ``returns`` [S, episodes], of which column i is of
    task i modulo their count. Empty where ``spec`` is a single task."""
    returns, step = np.asarray(returns), count(spec)
    return {task.name: returns[:, i::step].mean(1) for i, task in enumerate(spec.tasks)}


def pad_obs(obs: dict, task: int, spec: EnvSpec) -> dict:
    """Observations {key: [..., *shape]} of one task, in the order of its keys, as those of ``spec``."""
    entries = spec.tasks[task].obs
    parts = [np.asarray(obs[k], np.float32) for k in sorted(entries)]
    batch = parts[0].shape[: parts[0].ndim - len(entries[min(entries)].shape)]
    state = np.concatenate([x.reshape(*batch, -1) for x in parts], -1)
    return {STATE: _widened(state, spec.obs[STATE].size), TASK: np.full(batch, task, np.int32)}


def pad_episode(episode: Trajectory, task: int, spec: EnvSpec) -> Trajectory:
    """A recorded episode [T, ...] of one task as one of ``spec``."""
    action = _widened(np.asarray(episode.action, np.float32), spec.action.size)
    return episode._replace(obs=pad_obs(episode.obs, task, spec), action=action)


def _widened(x: np.ndarray, width: int) -> np.ndarray:
    """The rows of ``x`` with zeros behind them."""
    return np.concatenate([x, np.zeros((*x.shape[:-1], width - x.shape[-1]), np.float32)], -1)


def embeddings(before: EnvSpec, spec: EnvSpec, similar: str = "") -> np.ndarray:
    """How the embeddings of the tasks of ``spec`` begin: weights float32 [tasks, tasks before] of those that
    an agent has learned for the tasks of ``before``.

    A task that it knows keeps its own. Another one gets that of the task ``similar``, or the mean of all.
    UserError where it has no embeddings, where its networks are too narrow, and where ``similar`` is none of
    its tasks or no task of ``spec`` is new.
    """
    if not before.tasks or not spec.tasks:
        raise UserError(
            f"--from-run learned {before.name}, the new run has {spec.name}: an agent of several tasks has "
            "embeddings of them, one of a single task has none, so neither can start from the other"
        )
    had, wanted = ((s.obs[STATE].size, s.action.size) for s in (before, spec))
    if wanted[0] > had[0] or wanted[1] > had[1]:
        raise UserError(
            f"{spec.name} has {wanted[0]} observed numbers and {wanted[1]} actions, the networks of "
            f"--from-run, which learned {before.name}, take {had[0]} and {had[1]}: a task as wide must have "
            "been among those"
        )
    known = [task.name for task in before.tasks]
    rows, weights = np.eye(len(known), dtype=np.float32), []
    if not similar:
        other = rows.mean(0)
    elif all(task.name in known for task in spec.tasks):
        raise UserError(f"task_like is {similar!r}, but --from-run learned every task of {spec.name}")
    else:
        name = similar if similar in known else dmc.canonical(similar) or similar
        other = rows[known.index(choose("task_like", name, known))]
    for task in spec.tasks:
        weights.append(rows[known.index(task.name)] if task.name in known else other)
    return np.stack(weights)


class Padded:
    """One of the tasks of ``spec``, a host environment. Satisfies ``mbrl.types.HostEnv``."""

    def __init__(self, env: HostEnv, task: int, spec: EnvSpec):
        self._env, self._task, self.spec = env, task, spec
        # Padding gets no action, so a wrapped environment never sees it.
        self._size = env.spec.action.size

    def reset(self) -> TimeStep:
        return self._shown(self._env.reset())

    def step(self, action: np.ndarray) -> TimeStep:
        return self._shown(self._env.step(action[: self._size]))

    def _shown(self, step: TimeStep) -> TimeStep:
        return step._replace(obs=pad_obs(step.obs, self._task, self.spec))

    def get_state(self) -> dict[str, np.ndarray]:
        return self._env.get_state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self._env.set_state(state)

    def render(self, height: int, width: int) -> np.ndarray:
        return self._env.render(height, width)

    def close(self) -> None:
        self._env.close()
