"""Several host environments stepped as one, in this process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from mbrl.errors import UserError
from mbrl.types import ArraySpec, EnvSpec, HostEnv, TimeStep

PATIENCE = 10
"""Faults of one environment in a row after which the run ends."""


class HostPool:
    """``N`` host environments with equal specs behind arrays with a leading axis ``N``.

    There is no auto-reset: the collector names in ``reset_mask`` who starts anew (all, at first).
    An environment that raises, or returns a number that is not finite or an array of a wrong shape, is not
    allowed to poison replay: its episode ends there as truncated (``is_last`` and not ``is_terminal``) with
    zeros in place of the observation and the reward, ``faults[i]`` counts it, and it is reset next. One that
    fails ``PATIENCE`` times in a row, resets included, ends the run with a UserError. The first reset of
    each environment is checked strictly instead, as what fails there is a mistake in the program.

    spec: that of every environment. size: N. faults: int64 [N].
    """

    def __init__(self, envs: Sequence[HostEnv]):
        """Raises ValueError when there is no environment or when the specs differ."""
        if not envs:
            raise ValueError("A pool needs at least one environment.")
        self.envs = list(envs)
        self.spec: EnvSpec = self.envs[0].spec
        self.size = len(self.envs)
        self.faults = np.zeros(self.size, np.int64)
        self._in_a_row = np.zeros(self.size, np.int64)
        self._checked = np.zeros(self.size, bool)
        for i, env in enumerate(self.envs):
            for field in ("obs", "action", "action_repeat", "max_steps"):
                ours, theirs = getattr(self.spec, field), getattr(env.spec, field)
                if ours != theirs:
                    raise ValueError(
                        f"Environment {i} differs from environment 0 in {field}: {theirs}, {ours}."
                    )
        self._keys = list(self.spec.obs)
        self._shapes = [self.spec.obs[key].shape for key in self._keys]

    def step(self, actions: np.ndarray, reset_mask: np.ndarray) -> TimeStep:
        """Step or reset every environment.

        actions: float32 [N, A]; the row of an environment that is reset is ignored. reset_mask: bool [N].
        Returns obs {key: [N, *shape]}, reward float32 [N] (0 after a reset), is_last and is_terminal bool
        [N]. The arrays are new at every call, so the caller may keep them. Raises ValueError for arguments
        of a wrong shape and, at the first reset of an environment, for data that contradict its spec.
        """
        actions, reset_mask = np.asarray(actions), np.asarray(reset_mask)
        if actions.shape != (self.size, *self.spec.action.shape):
            expected = (self.size, *self.spec.action.shape)
            raise ValueError(f"The actions must have shape {expected}, found {actions.shape}.")
        if reset_mask.shape != (self.size,) or reset_mask.dtype != bool:
            raise ValueError(
                f"reset_mask must be bool [{self.size}], found {reset_mask.dtype} {reset_mask.shape}."
            )

        obs = {key: np.empty((self.size, *spec.shape), spec.dtype) for key, spec in self.spec.obs.items()}
        reward = np.zeros(self.size, np.float32)
        is_last = np.zeros(self.size, bool)
        is_terminal = np.zeros(self.size, bool)
        faulty = np.zeros(self.size, bool)
        columns = [(key, obs[key], shape) for key, shape in zip(self._keys, self._shapes, strict=True)]

        with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is counted below
            for i in range(self.size):
                shown, value, is_last[i], is_terminal[i] = self._ask(i, bool(reset_mask[i]), actions[i])
                value = 0.0 if reset_mask[i] else value
                if np.shape(value) == ():
                    reward[i] = value
                else:
                    faulty[i] = True
                for key, column, shape in columns:
                    if key in shown and np.shape(shown[key]) == shape:
                        column[i] = shown[key]
                    else:
                        column[i], faulty[i] = 0, True

        faulty |= ~np.isfinite(reward)
        for column in obs.values():
            if column.dtype.kind == "f":
                faulty |= ~np.isfinite(column.reshape(self.size, -1)).all(1)
        self._in_a_row = np.where(faulty, self._in_a_row + 1, 0)
        if faulty.any():
            self.faults += faulty
            if self._in_a_row.max() >= PATIENCE:
                raise UserError(
                    f"environment {self._in_a_row.argmax()} of {self.spec.name} failed {PATIENCE} times in a "
                    "row, resets included: it raised, or gave numbers that are not finite or wrong shapes"
                )
            for column in (*obs.values(), reward):
                column[faulty] = 0
            is_last |= faulty
            is_terminal &= ~faulty
        return TimeStep(obs, reward, is_last, is_terminal)

    def _ask(self, i: int, reset: bool, action: np.ndarray) -> TimeStep:
        """What environment ``i`` answers; nothing where it raises."""
        env = self.envs[i]
        if reset and not self._checked[i]:
            first = env.reset()
            _check(i, first.obs, self.spec.obs)
            self._checked[i] = True
            return first
        try:
            return env.reset() if reset else env.step(action)
        except Exception as error:
            warnings.warn(f"environment {i} raised {error!r}: its episode ends", RuntimeWarning, stacklevel=3)
            return TimeStep({}, 0.0, True, False)

    def reset(self) -> TimeStep:
        """Reset every environment; the first call of a run."""
        shape = (self.size, *self.spec.action.shape)
        return self.step(np.zeros(shape, np.float32), np.ones(self.size, bool))

    def get_state(self) -> dict[str, np.ndarray]:
        """The state of all environments as one flat dict of arrays ("3/physics", ...), fit for np.savez."""
        state = {
            f"{i}/{key}": value for i, env in enumerate(self.envs) for key, value in env.get_state().items()
        }
        return state | {"faults": self.faults.copy()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore ``get_state`` of a pool of the same size; raises ValueError when it is of another."""
        parts: list[dict[str, np.ndarray]] = [{} for _ in self.envs]
        saved = np.size(state["faults"])
        if saved != self.size:
            raise ValueError(f"The state is one of {saved} environments, this pool has {self.size}.")
        for key, value in state.items():
            index, _, name = key.partition("/")
            if name:
                parts[int(index)][name] = np.asarray(value)
        for env, part in zip(self.envs, parts, strict=True):
            env.set_state(part)
        self.faults = np.array(state["faults"], np.int64)

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()


def _check(index: int, shown: dict, specs: dict[str, ArraySpec]) -> None:
    """Raise ValueError naming the first entry of an observation that contradicts its spec."""
    if set(shown) != set(specs):
        raise ValueError(f"Environment {index} shows {sorted(shown)} where its spec says {sorted(specs)}.")
    for key, spec in specs.items():
        value = shown[key]
        found = (tuple(np.shape(value)), str(getattr(value, "dtype", type(value).__name__)))
        if found != (tuple(spec.shape), spec.dtype):
            raise ValueError(
                f"Environment {index}: observation {key!r} is {found[1]} {found[0]} where the spec says "
                f"{spec.dtype} {tuple(spec.shape)}."
            )
