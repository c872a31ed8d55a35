"""Pixel observations: what a camera shows instead of, or beside, the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from mbrl.errors import check_between
from mbrl.types import Array, ArraySpec, EnvSpec, HostEnv, JaxEnv, TimeStep

Shown = Literal["state", "pixels", "both"]
KEY = "image"
"""Of the camera's picture among the observations."""


@dataclass(frozen=True)
class CameraConfig:
    """What a task shows, where its observations are not the state alone."""

    size: int = 64
    """Side of the square RGB picture, in pixels."""
    frame_stack: int = 1
    """Latest pictures shown at once, stacked along the channels, the newest last; at an episode's start the
    first one fills all places."""
    quality: Literal["fast", "dmc"] = "fast"
    """How dm_control renders. fast: without shadows, reflections, sky and smoothed edges, far faster where
    there is no GPU. dmc: as published scores have it."""


CAMERA = CameraConfig()


def check(config: CameraConfig) -> None:
    """UserError for impossible values."""
    check_between("camera.size", config.size, 8, 1024)
    check_between("camera.frame_stack", config.frame_stack, 1, 16)


def show(spec: EnvSpec, shown: Shown, camera: CameraConfig) -> EnvSpec:
    """``spec`` with the camera's picture for, or beside, the state. Its name says so, as scores from pixels
    are not comparable with others."""
    image = ArraySpec((camera.size, camera.size, 3 * camera.frame_stack), "uint8")
    obs = {KEY: image} if shown == "pixels" else spec.obs | {KEY: image}
    return dataclasses.replace(spec, name=f"{spec.name}_{shown}", obs=dict(sorted(obs.items())))


class Filmed(NamedTuple):
    """The state of a task, and the latest pictures of it, [h, w, 3 k]."""

    state: Any
    pictures: Array


def of_jax(env: JaxEnv, picture: Callable[[Any, int], Array], shown: Shown, camera: CameraConfig) -> JaxEnv:
    """A JAX environment seen by a camera. picture(state, size) -> uint8 [size, size, 3]."""
    check(camera)
    spec = show(env.spec, shown, camera)

    def look(state, before: Array | None, step: TimeStep) -> tuple[Filmed, TimeStep]:
        now = picture(state, camera.size)
        if before is None:
            pictures = jnp.tile(now, (1, 1, camera.frame_stack))
        else:
            pictures = jnp.concatenate([before[..., 3:], now], -1)
        obs = {key: pictures if key == KEY else step.obs[key] for key in spec.obs}
        # A copy: leaves of a state that share a buffer cannot be donated.
        return Filmed(state, pictures.copy()), step._replace(obs=obs)

    def reset(key):
        state, step = env.reset(key)
        return look(state, None, step)

    def step(filmed: Filmed, action, key):
        state, step = env.step(filmed.state, action, key)
        return look(state, filmed.pictures, step)

    return JaxEnv(spec, reset, step)


class OfHost:
    """A host environment seen by a camera, through its ``render``. See `mbrl.types.HostEnv`."""

    def __init__(self, env: HostEnv, shown: Shown, camera: CameraConfig):
        check(camera)
        self._env, self._camera = env, camera
        self.spec = show(env.spec, shown, camera)
        self._pictures = np.zeros(self.spec.obs[KEY].shape, np.uint8)

    def reset(self) -> TimeStep:
        step = self._env.reset()
        self._pictures = np.tile(self._picture(), (1, 1, self._camera.frame_stack))
        return self._look(step)

    def step(self, action: np.ndarray) -> TimeStep:
        step = self._env.step(action)
        self._pictures = np.concatenate([self._pictures[..., 3:], self._picture()], -1)
        return self._look(step)

    def _picture(self) -> np.ndarray:
        return self._env.render(self._camera.size, self._camera.size)

    def _look(self, step: TimeStep) -> TimeStep:
        obs = {key: self._pictures if key == KEY else step.obs[key] for key in self.spec.obs}
        return step._replace(obs=obs)

    def get_state(self) -> dict[str, np.ndarray]:
        return {f"env/{key}": value for key, value in self._env.get_state().items()} | {
            "pictures": self._pictures
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self._env.set_state({key[4:]: value for key, value in state.items() if key.startswith("env/")})
        self._pictures = np.array(state["pictures"])

    def render(self, height: int, width: int) -> np.ndarray:
        return self._env.render(height, width)

    def close(self) -> None:
        self._env.close()
