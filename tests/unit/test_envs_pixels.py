"""Pictures of tasks: the rasteriser against geometry, and cameras over environments on either side."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs
from mbrl.drivers import make_source, stored_source
from mbrl.envs import cartpole, dmc, pendulum, pixels, raster
from mbrl.envs.checks import actions
from mbrl.envs.pixels import CameraConfig, OfHost
from mbrl.errors import UserError
from mbrl.types import ArraySpec, EnvSpec, TimeStep


def test_coverage_adds_up_to_areas():
    """Anti-aliasing keeps the area of a shape, wherever it lies between the pixels."""
    points, pixel = raster.pixel_centres(32, 1.0), 2 / 32
    for shift in (0.0, 0.013, 0.03):
        a, b = jnp.array([-0.3 + shift, 0.1]), jnp.array([0.25, -0.2 + shift])
        length = float(jnp.linalg.norm(b - a))
        shapes = {
            np.pi * 0.3**2: raster.capsule(points, a, a, 0.3),
            np.pi * 0.2**2 + 2 * 0.2 * length: raster.capsule(points, a, b, 0.2),
            4 * 0.4 * 0.25: raster.rectangle(points, a, (0.4, 0.25)),
        }
        for area, distance in shapes.items():
            white = raster.paint(jnp.zeros((32, 32, 3)), distance, (255, 255, 255), pixel)
            assert float(white[..., 0].sum()) / 255 * pixel**2 == pytest.approx(area, rel=0.02)


def centre(image: np.ndarray, channel: int) -> np.ndarray:
    """Centre of a colour as (x, y) in [-1, 1], y up, background taken off."""
    weight = np.maximum(np.asarray(image, float)[..., channel] - 40, 0)
    line = (np.arange(len(image)) + 0.5) / len(image) * 2 - 1
    return np.array([(weight * line).sum(), -(weight * line[:, None]).sum()]) / weight.sum()


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.0])
def test_pendulum_picture(angle):
    """The ball hangs where the angle from upright says."""
    image = pendulum.picture(pendulum.State(jnp.float32(angle), jnp.zeros(()), jnp.int32(0)), 32)
    assert image.shape == (32, 32, 3) and image.dtype == jnp.uint8
    yellow = np.asarray(image, float)[..., 0] - np.asarray(image, float)[..., 2]
    x, y = centre(np.repeat(yellow[..., None], 3, -1), 0)
    assert np.arctan2(x, y) == pytest.approx(angle, abs=0.05)


def test_cartpole_picture():
    """The cart is where it is, and the pole leans with the angle."""
    state = cartpole.State(jnp.array([1.0, 0.5]), jnp.zeros(2), jnp.int32(0))
    image = np.asarray(cartpole.picture(state, 64), float)
    orange = image[..., :1] - image[..., 2:]
    x, y = 2.2 * centre(orange, 0)
    assert np.arctan2(x - 1.0, y) == pytest.approx(0.5, abs=0.1)


def test_pictures_of_a_jax_task_follow_its_state():
    """Dynamics and rewards are those of the task itself; stacked pictures are the latest ones, newest last."""
    camera = CameraConfig(size=16, frame_stack=2)
    env, plain = envs.make_jax("pendulum", "both", camera), envs.make_jax("pendulum")
    assert env.spec.name == "pendulum_both" and list(env.spec.obs) == ["image", "orientation", "velocity"]
    assert env.spec.obs["image"] == ArraySpec((16, 16, 6), "uint8")
    key, (step, plain_step) = jax.random.key(0), map(jax.jit, (env.step, plain.step))
    (state, shown), (bare, _) = env.reset(key), plain.reset(key)
    first = np.asarray(pendulum.picture(bare, 16))
    np.testing.assert_array_equal(shown.obs["image"], np.concatenate([first, first], -1))
    before = first
    for action in actions(env.spec, 3):
        state, shown = step(state, jnp.asarray(action), key)
        bare, expected = plain_step(bare, jnp.asarray(action), key)
        now = np.asarray(pendulum.picture(bare, 16))
        np.testing.assert_array_equal(shown.obs["image"], np.concatenate([before, now], -1))
        np.testing.assert_array_equal(shown.obs["velocity"], expected.obs["velocity"])
        assert shown.reward == expected.reward
        before = now
    alone = envs.make_jax("pendulum", "pixels", camera)
    assert alone.spec.name == "pendulum_pixels" and list(alone.spec.obs) == ["image"]


class Counter:
    """A host environment whose picture shows how many steps it has made."""

    spec = EnvSpec("counter", {"x": ArraySpec((1,))}, ArraySpec((1,)))

    def __init__(self):
        self.count = 0

    def reset(self):
        self.count = 0
        return TimeStep({"x": np.zeros(1, np.float32)}, np.float32(0), False, False)

    def step(self, action):
        self.count += 1
        return TimeStep({"x": np.float32(action)}, np.float32(0), False, False)

    def get_state(self):
        return {"count": np.array(self.count)}

    def set_state(self, state):
        self.count = int(state["count"])

    def render(self, height, width):
        return np.full((height, width, 3), self.count, np.uint8)

    def close(self): ...


def test_host_pictures():
    """The stack fills at a reset and moves on; the state brings it back."""
    camera = CameraConfig(size=8, frame_stack=3)
    env = OfHost(Counter(), "both", camera)
    stack = lambda step: step.obs["image"][0, 0, ::3].tolist()
    assert list(env.spec.obs) == ["image", "x"] and stack(env.reset()) == [0, 0, 0]
    action = np.zeros(1, np.float32)
    assert [stack(env.step(action)) for _ in range(3)] == [[0, 0, 1], [0, 1, 2], [1, 2, 3]]
    other = OfHost(Counter(), "both", camera)
    other.reset()
    other.set_state(env.get_state())
    assert stack(other.step(action)) == stack(env.step(action)) == [2, 3, 4]
    assert stack(env.reset()) == [0, 0, 0]


def test_source_of_a_stored_run():
    """Runs of before, without a camera, have the state."""
    config = {"task": "pendulum", "loop": {"action_repeat": 2}}
    assert "image" not in stored_source({"config": config}).spec.obs
    seen = {"obs": "pixels", "camera": dataclasses.asdict(CameraConfig(size=16))}
    assert stored_source({"config": config | seen}).spec.obs["image"].shape == (16, 16, 3)


def test_refusals(monkeypatch):
    with pytest.raises(
        UserError, match="'tmaze:5' has no pictures, of the tasks in JAX these have: cartpole"
    ):
        make_source("tmaze:5", 1, "pixels")
    with pytest.raises(UserError, match=r"camera\.size is 4, it must lie between 8 and 1024"):
        pixels.check(CameraConfig(size=4))

    def no_gl():
        raise RuntimeError("Rendering needs OpenGL.")

    monkeypatch.setattr(dmc, "_load_renderer", no_gl)
    with pytest.raises(UserError, match=r"--obs pixels: Rendering needs OpenGL\."):
        make_source("cartpole_swingup", 2, "pixels")
