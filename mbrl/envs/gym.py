"""Gymnasium environments as HostEnv. Needs the extra [gym]; imported only when one is made.

Observations may be Box, Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple of these, nested or not;
actions Box or Discrete.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mbrl.envs.dmc import find_backend
from mbrl.types import ArraySpec, EnvSpec, TimeStep


def make(env_id: str, seed: int, action_repeat: int = 1, **options: Any) -> Gymnasium:
    """An environment of gymnasium's registry, such as ``HalfCheetah-v5``; ``options`` go to gymnasium.make.

    Raises ValueError in one sentence when there is none, or when what it needs is not installed.
    """
    try:
        import gymnasium
    except ImportError:
        raise ValueError(
            f"{env_id!r} needs gymnasium, which is not installed: pip install 'mbrl-jax[gym]' brings it"
        ) from None
    try:
        kind = gymnasium.spec(env_id)
        options = {"disable_env_checker": True} | options
        if "render_mode" not in options and _can_render(kind):
            options["render_mode"] = "rgb_array"
        with _without_notices():
            env = gymnasium.make(env_id, **options)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"gymnasium cannot make {env_id!r}: {' '.join(str(error).split())}") from error
    if (model := getattr(env.unwrapped, "model", None)) is not None and hasattr(model, "vis"):
        # Without shadows and antialiasing a CPU renders several times as many frames per second.
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
    return Gymnasium(env, seed, action_repeat, f"gym:{env_id}")


@contextlib.contextmanager
def _without_notices():
    """Hide MuJoCo's notes on deprecated attributes in gymnasium's own models: a line for each environment,
    and a file MUJOCO_LOG.TXT in the current folder."""
    mujoco: Any = importlib.import_module("mujoco")  # its type stubs lack these functions
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _can_render(kind: Any) -> bool:
    from gymnasium.envs.registration import load_env_creator

    creator = load_env_creator(kind.entry_point) if isinstance(kind.entry_point, str) else kind.entry_point
    return "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ())


class Entry(NamedTuple):
    """One array of an observation: where it lies in gymnasium's, and how it is stored."""

    path: tuple[Any, ...]
    spec: ArraySpec
    start: Any = 0


class Gymnasium:
    """One gymnasium environment. Satisfies ``mbrl.types.HostEnv``.

    Every episode is reset with a seed of its own, derived from ``seed`` and the episode's number. So the
    whole state is that number and the actions since: ``set_state`` plays them again, whatever the
    simulator. This is exact for environments that draw random numbers from ``np_random`` only, as gymnasium
    asks of them; ``mbrl.envs.check`` finds others.
    """

    def __init__(self, env: Any, seed: int, action_repeat: int = 1, name: str = "gym"):
        """Raises ValueError for a space that no agent here can use."""
        if action_repeat < 1:
            raise ValueError(f"action_repeat must be at least 1, found {action_repeat}.")
        self._env, self._seed = env, int(seed)
        self._episode, self._begun, self._over = 0, False, True
        self._actions: list[np.ndarray] = []
        self._entries = dict(sorted(_entries(env.observation_space, ())))
        action, self._native = _actions(env.action_space)
        limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
        self.spec = EnvSpec(
            name=name,
            obs={key: entry.spec for key, entry in self._entries.items()},
            action=action,
            action_repeat=action_repeat,
            max_steps=None if limit is None else math.ceil(limit / action_repeat),
        )

    def reset(self) -> TimeStep:
        """Start the next episode."""
        self._episode += self._begun
        self._begun = True
        return self._begin()

    def _begin(self) -> TimeStep:
        """Start the episode of the current number."""
        self._actions, self._over = [], False
        seed = np.random.SeedSequence([self._seed, self._episode]).generate_state(1)[0]
        obs, _ = self._env.reset(seed=int(seed))
        return TimeStep(self._observed(obs), np.float32(0), False, False)

    def step(self, action: np.ndarray) -> TimeStep:
        """action [A] in [-1, 1], clipped, or one-hot. The reward is the sum over the action repeat.

        Raises RuntimeError when the episode is over and ValueError for a wrong shape.
        """
        if self._over:
            raise RuntimeError(f"{self.spec.name}: step after the end of an episode; call reset first.")
        action = np.array(action, np.float32)
        if action.shape != self.spec.action.shape:
            raise ValueError(
                f"{self.spec.name}: action {self.spec.action.shape} expected, found {action.shape}."
            )
        self._actions.append(action)
        native, reward, terminated, truncated, obs = self._native(action), 0.0, False, False, None
        for _ in range(self.spec.action_repeat):
            obs, gained, terminated, truncated, _ = self._env.step(native)
            reward += float(gained)
            if terminated or truncated:
                break
        self._over = bool(terminated or truncated)
        return TimeStep(self._observed(obs), np.float32(reward), self._over, bool(terminated))

    def _observed(self, obs: Any) -> dict[str, np.ndarray]:
        arrays = {}
        for key, (path, spec, start) in self._entries.items():
            value = obs
            for part in path:
                value = value[part]
            arrays[key] = np.asarray(np.asarray(value) - start, spec.dtype).reshape(spec.shape)  # a copy
        return arrays

    def get_state(self) -> dict[str, np.ndarray]:
        """seed; clock: number of the episode, whether one has begun; actions [t, A] of it."""
        actions = np.array(self._actions, np.float32).reshape(-1, *self.spec.action.shape)
        return {
            "seed": np.array(self._seed, np.int64),
            "clock": np.array([self._episode, self._begun], np.int64),
            "actions": actions,
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state`` of any environment of the same kind, by playing its actions again."""
        if missing := {"seed", "clock", "actions"} - set(state):
            raise ValueError(f"A state of {self.spec.name} must have the entries {sorted(missing)}.")
        self._seed = int(state["seed"])
        self._episode, self._begun = int(state["clock"][0]), bool(state["clock"][1])
        self._actions, self._over = [], True
        if self._begun:
            self._begin()
            for action in np.asarray(state["actions"]):
                self.step(action)

    def render(self, height: int, width: int) -> np.ndarray:
        """One uint8 RGB frame [height, width, 3]: the environment's own picture, nearest pixels.

        MuJoCo's draw by MUJOCO_GL, as dm_control's do. Raises RuntimeError with one sentence when it has
        none, or when OpenGL is missing.
        """
        if getattr(self._env.unwrapped, "mujoco_renderer", None) is not None:
            os.environ.setdefault("MUJOCO_GL", find_backend())  # gymnasium takes a window system's otherwise
        try:
            frame = self._env.render()
        except Exception as error:  # a missing library shows in as many types as there are renderers
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(f"{self.spec.name} does not render here: {reason}") from error
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise RuntimeError(f"{self.spec.name} has no pictures: make it with render_mode='rgb_array'")
        rows = np.arange(height) * frame.shape[0] // height
        columns = np.arange(width) * frame.shape[1] // width
        return np.ascontiguousarray(frame[rows][:, columns, :3])

    def close(self) -> None:
        self._env.close()


def _entries(space: Any, path: tuple[Any, ...]) -> list[tuple[str, Entry]]:
    """(key, Entry) of every array in a space; keys of nested ones are joined by "/"."""
    from gymnasium import spaces

    key = "/".join(map(str, path)) or "state"
    match space:
        case spaces.Dict():
            return [entry for name in space.spaces for entry in _entries(space[name], (*path, name))]
        case spaces.Tuple():
            return [entry for i, part in enumerate(space.spaces) for entry in _entries(part, (*path, i))]
        case spaces.Box():
            image = space.dtype == np.uint8 and len(space.shape) == 3
            spec = ArraySpec(tuple(space.shape) or (1,), "uint8" if image else "float32")
            return [(key, Entry(path, spec, np.zeros((), spec.dtype)))]
        case spaces.MultiBinary():
            return [(key, Entry(path, ArraySpec(tuple(space.shape))))]
        case spaces.Discrete():
            return [(key, Entry(path, ArraySpec((), "int32", int(space.n)), space.start))]
        case spaces.MultiDiscrete():
            spec = ArraySpec(tuple(space.shape), "int32", int(space.nvec.max()))
            return [(key, Entry(path, spec, space.start))]
    raise ValueError(
        f"observation {key!r} is of the space {type(space).__name__}, it must be Box, Discrete, "
        "MultiDiscrete, MultiBinary, Dict or Tuple"
    )


def _actions(space: Any) -> tuple[ArraySpec, Callable[[np.ndarray], Any]]:
    """The spec of an action, and what turns one into gymnasium's."""
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            count, start = int(space.n), int(space.start)
            return ArraySpec((count,), classes=count), lambda action: start + int(np.argmax(action))
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            # A side without a bound is taken as -1 or 1: an agent must know how far it may go.
            low = np.where(np.isfinite(space.low), space.low, -1.0).astype(np.float64)
            high = np.where(np.isfinite(space.high), space.high, 1.0).astype(np.float64)
            middle, half = (low + high) / 2, (high - low) / 2

            def native(action: np.ndarray) -> np.ndarray:
                unit = np.clip(action, -1.0, 1.0).astype(np.float64).reshape(space.shape)
                return (middle + half * unit).astype(space.dtype)

            return ArraySpec((int(np.prod(space.shape, dtype=int)),)), native
    raise ValueError(
        f"the action space is {type(space).__name__} of {space.dtype}, it must be Discrete or a Box of floats"
    )
