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
    zeros in place of the observation and the reward, ``faults[i]`` counts it, and it is reset next. What is
    raised gives a warning each time, wrong numbers at the first fault of an environment. One that
    fails ``PATIENCE`` times in a row, resets included, ends the run with a UserError. The first reset of
    each environment is checked strictly instead, as what fails there is a mistake in the program.

    spec: that of every environment. size: N. faults: int64 [N].
    """

    def __init__(self, envs: Sequence[HostEnv], names: Sequence[str] = ()):
        """names: of the environments in messages. Raises ValueError when there is no environment or when the
        specs differ."""
        if not envs:
            raise ValueError("A pool needs at least one environment.")
        self.envs = list(envs)
        self.spec: EnvSpec = self.envs[0].spec
        self.size = len(self.envs)
        self.names = list(names) or [f"environment {i}" for i in range(self.size)]
        self.faults = np.zeros(self.size, np.int64)
        self._sent: tuple[np.ndarray, np.ndarray] | None = None
        self._in_a_row = np.zeros(self.size, np.int64)
        self.checked = np.zeros(self.size, bool)
        for i, env in enumerate(self.envs):
            for field in ("obs", "action", "action_repeat", "max_steps"):
                ours, theirs = getattr(self.spec, field), getattr(env.spec, field)
                if ours != theirs:
                    raise ValueError(
                        f"{self.names[i].capitalize()} differs from {self.names[0]} in {field}: {theirs}, "
                        f"{ours}."
                    )
        self._keys = list(self.spec.obs)
        self._shapes = [self.spec.obs[key].shape for key in self._keys]

    def step(self, actions: np.ndarray, reset_mask: np.ndarray) -> TimeStep:
        """Step or reset every environment: ``send`` and ``receive``."""
        self.send(actions, reset_mask)
        return self.receive()

    def send(self, actions: np.ndarray, reset_mask: np.ndarray) -> None:
        """Says what every environment shall do next; ``receive`` does it.

        actions: float32 [N, A]; the row of an environment that is reset is ignored. reset_mask: bool [N].
        Raises ValueError for arguments of a wrong shape.
        """
        self._sent = check_commands(self.spec, self.size, actions, reset_mask)

    def receive(self) -> TimeStep:
        """The results of what was sent.

        Returns obs {key: [N, *shape]}, reward float32 [N] (0 after a reset), is_last and is_terminal bool
        [N]. The arrays are new at every call, so the caller may keep them. Raises ValueError, at the first
        reset of an environment, for data that contradict its spec.
        """
        assert self._sent is not None, "nothing was sent"
        (actions, reset_mask), self._sent = self._sent, None
        obs = {key: np.empty((self.size, *spec.shape), spec.dtype) for key, spec in self.spec.obs.items()}
        reward = np.zeros(self.size, np.float32)
        is_last = np.zeros(self.size, bool)
        is_terminal = np.zeros(self.size, bool)
        faulty, raised = np.zeros(self.size, bool), np.zeros(self.size, bool)
        columns = [(key, obs[key], shape) for key, shape in zip(self._keys, self._shapes, strict=True)]

        with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is counted below
            for i in range(self.size):
                shown, value, is_last[i], is_terminal[i] = self._ask(i, bool(reset_mask[i]), actions[i])
                raised[i] = not shown
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
            for i in np.flatnonzero(faulty & ~raised & (self.faults == 0)):
                warnings.warn(
                    f"{self.names[i]} returned numbers that are not finite or a wrong shape: its episode "
                    "ends, here and whenever it does so again (env_faults in the metrics counts it)",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.faults += faulty
            if self._in_a_row.max() >= PATIENCE:
                raise UserError(
                    f"{self.names[self._in_a_row.argmax()]} of {self.spec.name} failed {PATIENCE} times in a "
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
        if reset and not self.checked[i]:
            first = env.reset()
            _check(self.names[i].capitalize(), first.obs, self.spec.obs)
            self.checked[i] = True
            return first
        try:
            return env.reset() if reset else env.step(action)
        except Exception as error:
            text = f"{self.names[i]} raised {error!r}: its episode ends (env_faults in the metrics counts it)"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
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
        self.faults[:] = state["faults"]

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()


def check_commands(
    spec: EnvSpec, size: int, actions: np.ndarray, reset_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Copies of the arguments of ``send``; ValueError where they have a wrong shape."""
    actions, reset_mask = np.array(actions), np.array(reset_mask)
    if actions.shape != (size, *spec.action.shape):
        expected = (size, *spec.action.shape)
        raise ValueError(f"The actions must have shape {expected}, found {actions.shape}.")
    if reset_mask.shape != (size,) or reset_mask.dtype != bool:
        raise ValueError(f"reset_mask must be bool [{size}], found {reset_mask.dtype} {reset_mask.shape}.")
    return actions, reset_mask


def _check(name: str, shown: dict, specs: dict[str, ArraySpec]) -> None:
    """Raise ValueError naming the first entry of an observation that contradicts its spec."""
    if set(shown) != set(specs):
        raise ValueError(f"{name} shows {sorted(shown)} where its spec says {sorted(specs)}.")
    for key, spec in specs.items():
        value = shown[key]
        found = (tuple(np.shape(value)), str(getattr(value, "dtype", type(value).__name__)))
        if found != (tuple(spec.shape), spec.dtype):
            raise ValueError(
                f"{name}: observation {key!r} is {found[1]} {found[0]} where the spec says "
                f"{spec.dtype} {tuple(spec.shape)}."
            )
