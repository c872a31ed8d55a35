"""DeepMind Control Suite tasks as HostEnv: real MuJoCo, state observations, exact save and restore.

Importing this module imports neither dm_control nor OpenGL. dm_control decides about rendering when it is
first imported; it is imported here with ``MUJOCO_GL=disable``, so that a run without video needs no GL
library, and ``render()`` picks the backend on its first call instead (see ``_load_renderer``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import math
import os
import sys
import zlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from mbrl.envs import poses
from mbrl.types import ArraySpec, EnvSpec, TimeStep

_OFF = ("off", "disable", "disabled", "false", "0")
# Arrays of a model that describe surfaces: constant, derived at compile time, and up to 34 MB for the dog.
_SURFACES = ("mesh_", "skin_", "flex", "bvh_", "oct_", "tex_")
_ALIASES = {"cup": "ball_in_cup", "pointmass": "point_mass", "cmu": "humanoid_cmu", "lqr": "lqr_lqr"}
_CAMERAS = {"quadruped": 2}  # camera 0 sees nothing of the robot once it has walked away
_PLAIN = {"shadow": False, "reflection": False, "skybox": False}
_UNBOUNDED = 1e9  # dm_control writes +-1e10 for actuators without limits


@functools.cache
def _suite() -> ModuleType:
    """dm_control.suite, imported without OpenGL; the user's MUJOCO_GL is left as it was."""
    wish = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disable"
    try:
        from dm_control import suite
    finally:
        if wish is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = wish
    return suite


@functools.cache
def _table() -> dict[str, tuple[str, str]]:
    """{usual name: (domain, task)} in the suite's order."""
    names = {}
    for domain, task in _suite().ALL_TASKS:
        names[task if domain == "lqr" else f"{domain}_{task}"] = (domain, task)
    return names


def task_names() -> list[str]:
    """The usual names of all tasks of the suite, ``domain_task``."""
    return list(_table())


def canonical(task: str) -> str | None:
    """The usual name of a task given by any accepted spelling, None when there is none.

    Case and ``-`` against ``_`` do not matter; the short domain names ``cup``, ``pointmass`` and ``cmu`` are
    accepted, as is the prefix ``dmc_`` of published tables.
    """
    by_lower = {name.lower(): name for name in _table()}
    by_lower |= {f"lqr_{name}": name for name in _table() if name.startswith("lqr")}
    key = task.lower().replace("-", "_").removeprefix("dmc_")
    if key in by_lower:
        return by_lower[key]
    for short, long in _ALIASES.items():
        if key.startswith(f"{short}_") and (name := by_lower.get(long + key[len(short) :])):
            return name
    return None


def make(task: str, seed: int, action_repeat: int = 2, render_quality: str = "fast") -> DMC:
    """One environment of the suite.

    task: any spelling that ``canonical`` accepts. seed: 0 <= seed < 2**32, the task's own random stream.
    action_repeat: control steps per agent step. render_quality: "fast" renders without shadows,
    reflections, sky and multisampling (``benchmarks/rendering.py``), "dmc" as dm_control does.
    Raises ValueError with one sentence for an unknown task or an impossible argument.
    """
    name = canonical(task)
    if name is None:
        from mbrl import envs

        raise envs.unknown(task)
    if action_repeat < 1:
        raise ValueError(f"action_repeat must be at least 1, found {action_repeat}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed of an environment must lie in [0, 2**32), found {seed}.")
    if render_quality not in ("fast", "dmc"):
        raise ValueError(f"render_quality must be 'fast' or 'dmc', found {render_quality!r}.")
    return DMC(name, int(seed), int(action_repeat), render_quality)


def model(name: str) -> tuple[Any, int]:
    """(MjModel of a task by its usual name, simulation steps of a control step); the model is a copy."""
    env = DMC(name, 0, 1, "fast")
    compiled = copy.copy(env._physics.model.ptr), env._substeps
    env.close()
    return compiled


class DMC:
    """See ``make``. Satisfies ``mbrl.types.HostEnv``.

    The loop over control steps is written out here, as in ``dm_control.rl.control.Environment.step``,
    because observations that an action repeat skips need not be computed (a third of the time of a small
    task). The first reset equals that of ``suite.load(..., task_kwargs={"random": seed})``.
    """

    def __init__(self, name: str, seed: int, action_repeat: int, render_quality: str):
        domain, task = _table()[name]
        with _without_notice():
            env = _suite().load(domain, task, task_kwargs={"random": seed})
        self._env = env
        self._task = env.task
        self._physics = env.physics
        self._physics.__class__ = _without_eager_gl(type(env.physics))
        self._diverged = importlib.import_module("dm_control.rl.control").PhysicsError
        self._limit = env._step_limit
        self._substeps = env._n_sub_steps
        self._count = 0
        self._over = True
        self._pose = poses.DOMAINS.get(domain)
        self._camera = _CAMERAS.get(domain, 0)
        self._render_quality = render_quality

        bounds = env.action_spec()
        low = np.where(np.abs(bounds.minimum) >= _UNBOUNDED, -1.0, bounds.minimum)
        high = np.where(np.abs(bounds.maximum) >= _UNBOUNDED, 1.0, bounds.maximum)
        self._middle, self._half = (low + high) / 2, (high - low) / 2

        shown = env.observation_spec()
        obs = {key: ArraySpec(tuple(shown[key].shape) or (1,)) for key in sorted(shown)}
        frames = None if math.isinf(self._limit) else math.ceil(self._limit)
        self.spec = EnvSpec(
            name=name,
            obs=obs,
            action=ArraySpec(tuple(bounds.shape)),
            action_repeat=action_repeat,
            max_steps=None if frames is None else math.ceil(frames / action_repeat),
        )

    def reset(self) -> TimeStep:
        """Start an episode. obs: {key: float32 [*shape]}, reward 0."""
        self._count, self._over = 0, False
        with self._physics.reset_context():
            self._task.initialize_episode(self._physics)
        return TimeStep(self._observe(), np.float32(0), False, False)

    def step(self, action: np.ndarray) -> TimeStep:
        """action [A] in [-1, 1], clipped. The reward is the sum over the action repeat.

        A simulation that diverges ends the episode (not terminal) with NaN everywhere, which HostPool
        counts as a fault. Raises RuntimeError when the episode is over and ValueError for a wrong shape.
        """
        if self._over:
            raise RuntimeError(f"{self.spec.name}: step after the end of an episode; call reset first.")
        action = np.asarray(action, np.float64)
        if action.shape != self.spec.action.shape:
            raise ValueError(
                f"{self.spec.name}: action {self.spec.action.shape} expected, found {action.shape}."
            )
        control = self._middle + self._half * np.clip(action, -1.0, 1.0)
        task, physics, reward, discount = self._task, self._physics, 0.0, None
        try:
            for _ in range(self.spec.action_repeat):
                task.before_step(control, physics)
                physics.step(self._substeps)
                task.after_step(physics)
                reward += task.get_reward(physics)
                self._count += 1
                # At the time limit dm_control does not ask whether the task has also terminated.
                discount = 1.0 if self._count >= self._limit else task.get_termination(physics)
                if discount is not None:
                    break
            obs = self._observe()
        except self._diverged:
            self._over = True
            nan = {key: np.full(spec.shape, np.nan, np.float32) for key, spec in self.spec.obs.items()}
            return TimeStep(nan, np.float32(np.nan), True, False)
        self._over = discount is not None
        return TimeStep(obs, np.float32(reward), self._over, self._over and discount == 0)

    def _observe(self) -> dict[str, np.ndarray]:
        shown = self._task.get_observation(self._physics)
        return {
            key: np.array(shown[key], np.float32).reshape(spec.shape) for key, spec in self.spec.obs.items()
        }

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that the future depends on, so that a restored environment continues bit for bit.

        physics: MuJoCo's integration state (with the solver's warm start). sensors: readings of the last
        step, some of which cannot be recomputed from the state. model: all real-valued model parameters, as
        tasks move targets, redraw terrain or gains at reset. rng_*: the task's random stream. task/*: numbers
        that the task object keeps. clock: control steps so far, episode over. name: a checksum.
        """
        model, data = self._physics.model.ptr, self._physics.data.ptr
        mujoco, kind = _mujoco()
        physics = np.empty(mujoco.mj_stateSize(model, kind))
        mujoco.mj_getState(model, data, physics, kind)
        _, keys, position, has_gauss, gauss = self._task.random.get_state()
        state = {
            "name": np.array(self._checksum, np.int64),
            "clock": np.array([self._count, self._over], np.int64),
            "physics": physics,
            "sensors": np.array(data.sensordata),
            "model": np.concatenate([np.ravel(part).astype(np.float64) for part in _parameters(model)]),
            "rng_keys": np.array(keys, np.uint32),
            "rng_position": np.array([position, has_gauss], np.int64),
            "rng_gauss": np.array(gauss, np.float64),
        }
        for key, value in vars(self._task).items():
            if _is_number(value):
                state[f"task/{key}"] = np.array(value)
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state`` of any environment of the same task and action repeat.

        Raises ValueError, before anything is changed, when the state is of another task or MuJoCo version.
        """
        model, data = self._physics.model.ptr, self._physics.data.ptr
        mujoco, kind = _mujoco()
        parts = list(_parameters(model))
        sizes = {
            "physics": mujoco.mj_stateSize(model, kind),
            "sensors": model.nsensordata,
            "model": sum(part.size for part in parts),
        }
        missing = {"name", "clock", "rng_keys", "rng_position", "rng_gauss", *sizes} - set(state)
        if missing:
            raise ValueError(f"A state of {self.spec.name} must have the entries {sorted(missing)}.")
        if int(state["name"]) != self._checksum:
            raise ValueError(
                f"The state is not one of {self.spec.name} with action repeat {self.spec.action_repeat}."
            )
        for key, size in sizes.items():
            if np.size(state[key]) != size:
                raise ValueError(
                    f"The state of {self.spec.name} holds {np.size(state[key])} numbers for {key!r} where "
                    f"this MuJoCo needs {size}: it was written by another version."
                )
        values, start = np.asarray(state["model"]), 0
        for part in parts:
            part[...] = values[start : start + part.size].reshape(part.shape)
            start += part.size
        mujoco.mj_resetData(model, data)
        mujoco.mj_setState(model, data, np.asarray(state["physics"], np.float64), kind)
        # dm_control keeps positions and velocities up to date after each step; so does this. Sensors of
        # forces and accelerations stay as the last full step left them, hence the copy.
        mujoco.mj_step1(model, data)
        data.sensordata[:] = state["sensors"]
        self._count, self._over = int(state["clock"][0]), bool(state["clock"][1])
        keys, (position, has_gauss) = np.asarray(state["rng_keys"], np.uint32), state["rng_position"]
        gauss = float(state["rng_gauss"])
        self._task.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
        for key, value in state.items():
            if key.startswith("task/"):
                value = np.asarray(value)
                setattr(self._task, key[len("task/") :], value.copy() if value.ndim else value[()])
        self._free_gl()  # what the renderer has on the card shows the old terrain

    @property
    def _checksum(self) -> int:
        return zlib.crc32(f"{self.spec.name}/{self.spec.action_repeat}".encode())

    def render(self, height: int, width: int) -> np.ndarray:
        """One uint8 RGB frame [height, width, 3] from the task's main camera.

        Raises RuntimeError with one sentence when there is no OpenGL or MUJOCO_GL switches it off.
        """
        backend = _load_renderer()
        screen, quality = self._physics.model.vis.global_, self._physics.model.vis.quality
        if height > screen.offheight or width > screen.offwidth:
            self._free_gl()
            screen.offheight, screen.offwidth = max(height, screen.offheight), max(width, screen.offwidth)
        if self._render_quality == "fast" and not self._physics._contexts:
            quality.shadowsize = quality.offsamples = 0
        self._physics.may_create_gl = True
        try:
            flags = _PLAIN if self._render_quality == "fast" else None
            return self._physics.render(height, width, camera_id=self._camera, render_flag_overrides=flags)
        except ValueError:
            raise
        except Exception as error:
            raise RuntimeError(_no_gl(f"the backend {backend!r} failed ({_one_line(error)})")) from error
        finally:
            self._physics.may_create_gl = False

    @property
    def can_pose(self) -> bool:
        """Whether an observation says where the bodies are, so that `pose` can put them there."""
        return self._pose is not None

    def pose(self, obs: Mapping[str, np.ndarray]) -> None:
        """Move the bodies, and the target of the task, to where ``obs`` {key: [*shape]} says, at rest.

        To draw what was seen, or predicted: an episode that went on is over. Only where `can_pose`.
        """
        assert self._pose is not None
        physics, self._over = self._physics, True
        qpos, target = self._pose({key: np.asarray(x, np.float64) for key, x in obs.items()})
        with physics.reset_context():
            physics.data.qpos[:] = qpos
            if target is not None:
                array, axes, place = target
                getattr(physics.named.model, array)["target", list(axes)] = place

    def _free_gl(self) -> None:
        if self._physics._contexts:
            self._physics._free_rendering_contexts()

    def close(self) -> None:
        """Free the simulator. The environment must not be used afterwards; a second call does nothing."""
        if self._env is not None:
            self._physics.free()
            self._env = None


@functools.cache
def _mujoco() -> tuple[Any, Any]:
    """(mujoco, the kind of state that suffices to continue an integration exactly)."""
    _suite()
    mujoco: Any = importlib.import_module("mujoco")
    return mujoco, mujoco.mjtState.mjSTATE_INTEGRATION


@functools.cache
def _parameter_names(kind: type) -> tuple[str, ...]:
    return tuple(n for n in sorted(dir(kind)) if not n.startswith(("_", *_SURFACES)))


def _parameters(model: Any):
    """Views of all real-valued arrays of a model in a fixed order, surfaces left out."""
    for name in _parameter_names(type(model)):
        value = getattr(model, name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            yield value


def _is_number(value: Any) -> bool:
    """Whether a task attribute is a number or an array of numbers (flags and names never change)."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iuf"
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


@contextlib.contextmanager
def _without_notice():
    """Hide the note on a deprecated attribute in the suite's own files, one line for each environment."""

    def keep(record: logging.LogRecord) -> bool:
        return "is deprecated and will be removed" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@functools.cache
def _without_eager_gl(kind: type) -> type:
    """A Physics class that creates an OpenGL context for ``render`` only.

    ``quadruped_escape`` asks for the context at every reset, to upload its terrain, and so could not run at
    all without OpenGL; it accepts that there is none.
    """

    class Physics(kind):
        may_create_gl = False

        @property
        def contexts(self):
            return super().contexts if self.may_create_gl else self._contexts

    return Physics


def _load_renderer() -> str:
    """Give dm_control its OpenGL backend, and return its name.

    MUJOCO_GL decides when it is set (egl, osmesa, glfw); otherwise the first library found of EGL, OSMesa
    and, with a display, GLFW. One attempt per process, as PyOpenGL cannot change its platform.
    """
    _suite()
    from dm_control import _render

    if _render.BACKEND is not None and _render.BACKEND not in _OFF:
        return _render.BACKEND
    wish = os.environ.get("MUJOCO_GL")
    if wish is not None and wish.lower() in _OFF:
        raise RuntimeError(
            f"Rendering is switched off by MUJOCO_GL={wish}: unset it, or set it to egl, osmesa or glfw."
        )
    backend = (wish or find_backend()).lower()
    backend = "glfw" if backend in ("on", "enable", "enabled", "true", "1") else backend
    try:
        if backend == "egl":
            from dm_control._render.pyopengl.egl_renderer import EGLContext as renderer
        elif backend == "osmesa":
            from dm_control._render.pyopengl.osmesa_renderer import OSMesaContext as renderer
        elif backend == "glfw":
            from dm_control._render.glfw_renderer import GLFWContext as renderer
        else:
            raise RuntimeError(f"MUJOCO_GL must be egl, osmesa, glfw or disable, found {wish!r}.")
    except RuntimeError:
        raise
    except Exception as error:  # ImportError, or whatever a broken driver raises through ctypes
        raise RuntimeError(_no_gl(f"the backend {backend!r} does not load ({_one_line(error)})")) from error
    os.environ["MUJOCO_GL"] = backend  # MuJoCo's C library reads it when it creates its own context
    _render.Renderer, _render.BACKEND = renderer, backend
    return backend


def find_backend() -> str:
    """The first OpenGL backend found of EGL, OSMesa and, with a display, GLFW; else RuntimeError."""
    from ctypes.util import find_library

    if sys.platform != "linux":
        return "glfw"
    for library, backend in (("EGL", "egl"), ("OSMesa", "osmesa")):
        if find_library(library):
            return backend
    if os.environ.get("DISPLAY"):
        return "glfw"
    raise RuntimeError(_no_gl("no EGL or OSMesa library was found"))


def _no_gl(why: str) -> str:
    return (
        f"Rendering needs OpenGL and {why}: install EGL (Debian: libegl1 libgl1-mesa-dri) or OSMesa "
        "(libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa."
    )


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
