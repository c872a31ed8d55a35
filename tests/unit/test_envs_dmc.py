"""The dm_control environment: every task, exactness against dm_control itself, and its sentences."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from mbrl import envs
from mbrl.envs import dmc, poses


def raw(task: str, seed: int):
    """dm_control's own environment."""
    return dmc._suite().load(*dmc._table()[task], task_kwargs={"random": seed})


def actions(env, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *env.spec.action.shape))


def run(env, controls) -> list:
    """Time steps of ``controls``; a reset in place of every tenth."""
    return [env.reset() if i % 10 == 9 else env.step(control) for i, control in enumerate(controls)]


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.reward == b.reward and a.is_last == b.is_last
        for key in a.obs:
            np.testing.assert_array_equal(a.obs[key], b.obs[key])


@pytest.mark.parametrize("task", dmc.task_names())
def test_every_task_runs_and_its_state_restores_exactly(task):
    """Into a fresh environment of another seed, from the middle of an episode and from its first step."""
    env, other = dmc.make(task, 3), dmc.make(task, 77)
    first = env.reset()
    assert {key: value.shape for key, value in first.obs.items()} == {
        key: entry.shape for key, entry in env.spec.obs.items()
    }
    assert env.spec.max_steps == (None if task.startswith("lqr") else 500)
    controls = actions(env, 40)
    for control in controls[:12]:
        env.step(control)
    for _ in range(2):
        state = env.get_state()
        assert all(isinstance(value, np.ndarray) and value.dtype.kind in "iuf" for value in state.values())
        other.set_state(state)
        assert_same(run(env, controls[12:]), run(other, controls[12:]))
        env.reset()
    env.close(), other.close()


@pytest.mark.parametrize(
    "task, entry",
    [
        ("reacher_easy", "model"),  # the target
        ("lqr_2_1", "model"),  # stiffness and damping, drawn when the model is compiled
        ("walker_walk", "physics"),
        ("cartpole_swingup", "rng_keys"),
        ("cartpole_swingup", "clock"),
    ],
)
def test_every_part_of_the_state_matters(task, entry):
    """The control for the test above: with one entry of another environment, the continuation differs."""
    env, other = dmc.make(task, 3, 50), dmc.make(task, 77, 50)
    env.reset(), other.reset()
    controls = actions(env, 21)
    env.step(controls[0])
    other.set_state(env.get_state() | {entry: other.get_state()[entry]})
    with pytest.raises(AssertionError):
        assert_same(*([one.step(c) for c in controls[1:20]] + [one.reset()] for one in (env, other)))


@pytest.mark.parametrize("task", ["cartpole_swingup", "ball_in_cup_catch", "quadruped_walk"])
@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_action_repeat_is_repeated_dm_control_steps(task, repeat):
    """Bit for bit, with the actions scaled to the task's bounds (asymmetric for the quadruped)."""
    env, reference = dmc.make(task, 11, repeat), raw(task, 11)
    bounds = reference.action_spec()
    shown = reference.reset()
    assert_obs(env.reset().obs, shown.observation)
    for action in actions(env, 15):
        ours = env.step(action)
        control = (bounds.minimum + bounds.maximum) / 2 + (bounds.maximum - bounds.minimum) / 2 * action
        reward = 0.0
        for _ in range(repeat):
            shown = reference.step(control)
            reward += shown.reward
        assert ours.reward == np.float32(reward)
        assert_obs(ours.obs, shown.observation)


def assert_obs(ours: dict, theirs: dict) -> None:
    assert list(ours) == sorted(theirs)
    for key, value in ours.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, np.atleast_1d(theirs[key]).astype(np.float32))


@pytest.mark.parametrize("repeat, length", [(2, 500), (3, 334)])
def test_time_limit_truncates(repeat, length):
    env, reference = dmc.make("cartpole_swingup", 0, repeat), raw("cartpole_swingup", 0)
    assert env.spec.max_steps == length
    env.reset()
    ends = [env.step(action) for action in actions(env, length)]
    assert [bool(end.is_last) for end in ends] == [False] * (length - 1) + [True]
    assert not any(end.is_terminal for end in ends)
    reference.reset()
    controls = np.repeat(actions(env, length), repeat, axis=0)[:1000]
    returns = np.sum([reference.step(control).reward for control in controls])
    np.testing.assert_allclose(sum(float(end.reward) for end in ends), returns, rtol=1e-5)
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step(np.zeros(1))


def test_step_before_the_first_reset_is_refused():
    with pytest.raises(RuntimeError, match="call reset first"):
        dmc.make("cartpole_swingup", 0).step(np.zeros(1))


def test_termination_of_the_task_is_terminal():
    """lqr ends with discount 0 when its state is zero; no other task ever terminates."""
    env = dmc.make("lqr_2_1", 0)
    env.reset()
    assert not env.step(np.zeros(1)).is_last
    with env._physics.reset_context():
        env._physics.data.qpos[:] = 0
    end = env.step(np.zeros(1))
    assert end.is_last and end.is_terminal


def test_divergence_ends_the_episode_and_the_next_one_is_sound():
    env = dmc.make("cartpole_swingup", 0)
    env.reset()
    end = env.step(np.array([np.nan]))
    assert end.is_last and not end.is_terminal
    assert np.isnan(end.reward) and all(np.isnan(value).all() for value in end.obs.values())
    assert all(np.isfinite(value).all() for value in env.reset().obs.values())
    assert np.isfinite(env.step(np.zeros(1)).reward)


def test_scalars_have_shape_one():
    assert dmc.make("finger_turn_easy", 0).spec.obs["dist_to_target"].shape == (1,)


def test_names():
    names = dmc.task_names()
    assert len(names) == len(set(names)) == len(dmc._suite().ALL_TASKS) >= 51
    assert {"walker_walk", "humanoid_CMU_run", "lqr_2_1", "point_mass_easy"} <= set(names)
    for spelling, name in {
        "cup_catch": "ball_in_cup_catch",
        "ball_in_cup_catch": "ball_in_cup_catch",
        "dmc_ball_in_cup_catch": "ball_in_cup_catch",
        "pointmass_easy": "point_mass_easy",
        "humanoid_cmu_run": "humanoid_CMU_run",
        "cmu_run": "humanoid_CMU_run",
        "lqr_lqr_6_2": "lqr_6_2",
        "Reacher-Easy": "reacher_easy",
        "walker": None,
    }.items():
        assert dmc.canonical(spelling) == name
    assert dmc.make("cup_catch", 0).spec.name == "ball_in_cup_catch"


@pytest.mark.parametrize(
    "task, close", [("walker_wlk", "walker_walk"), ("cartpole_swing_up", "cartpole_swingup")]
)
def test_unknown_task_is_one_sentence_with_close_matches(task, close):
    with pytest.raises(ValueError) as caught:
        envs.make_host(task, 0)
    message = str(caught.value)
    assert repr(task) in message and repr(close) in message and "envs.names()" in message
    assert "\n" not in message


SEEN = ("position", "orientations", "orientation", "height", "to_target", "target_position", "dist_to_target")
"""Observations that say where something is."""


@pytest.mark.parametrize(
    "task", [task for task in dmc.task_names() if dmc._table()[task][0] in poses.DOMAINS]
)
def test_poses_are_those_that_were_seen(task):
    """An observation, put into another environment, is observed again; and there the joints are as they were,
    but for how far the body has come and whole turns."""
    env, stage = dmc.make(task, 3), dmc.make(task, 77)
    for _ in range(3):
        env.reset(), stage.reset()
        for control in actions(env, 15):
            obs = env.step(control).obs
        stage.pose(obs)
        again = stage._observe()
        shown = [key for key in obs if key in SEEN]
        assert shown
        for key in shown:
            np.testing.assert_allclose(again[key], obs[key], atol=2e-5)
        names = env._physics.named.data.qpos.axes.row.names
        seen = [i for i, name in enumerate(names) if name != "rootx"]
        half = (env._physics.data.qpos - stage._physics.data.qpos)[seen] / 2
        np.testing.assert_allclose(np.sin(half), 0, atol=2e-5)
    with pytest.raises(RuntimeError, match="call reset first"):
        stage.step(actions(env, 1)[0])


def test_what_is_not_seen_is_not_posed():
    for task in ("swimmer_swimmer6", "humanoid_run", "fish_swim"):
        assert not dmc.make(task, 0).can_pose


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"action_repeat": 0}, {"render_quality": "best"}])
def test_impossible_arguments(wrong):
    with pytest.raises(ValueError, match=f"found '?{next(iter(wrong.values()))}"):
        dmc.make("cartpole_swingup", **({"seed": 0} | wrong))


def test_wrong_action_shape():
    env = dmc.make("walker_walk", 0)
    env.reset()
    with pytest.raises(ValueError, match=r"action \(6,\) expected, found \(1,\)"):
        env.step(np.zeros(1))


def test_a_foreign_state_is_refused_and_changes_nothing():
    env = dmc.make("cartpole_swingup", 0)
    env.reset()
    before = env.get_state()
    short = before | {"model": before["model"][1:]}
    for state in (
        dmc.make("cartpole_balance", 0).get_state(),
        dmc.make("cartpole_swingup", 0, 4).get_state(),
    ):
        with pytest.raises(ValueError, match="not one of cartpole_swingup with action repeat 2"):
            env.set_state(state)
    with pytest.raises(ValueError, match="another version"):
        env.set_state(short)
    with pytest.raises(ValueError, match="must have the entries"):
        env.set_state({})
    after = env.get_state()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter with only the given MuJoCo settings."""
    base = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=base | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RENDER = """
from mbrl.envs import dmc
env = dmc.make("quadruped_escape", 0)
env.reset()
try:
    env.render(32, 48)
except RuntimeError as error:
    print(error)
env.reset()
"""


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("disable", "Rendering is switched off by MUJOCO_GL=disable: unset it, or set it to egl, osmesa"),
        ("nonsense", "MUJOCO_GL must be egl, osmesa, glfw or disable, found 'nonsense'."),
    ],
)
def test_rendering_without_gl_is_one_sentence(setting, sentence):
    lines = python(RENDER, MUJOCO_GL=setting).splitlines()
    assert len(lines) == 1 and sentence in lines[0]


def test_rendering_names_the_library_to_install():
    code = "import ctypes.util; ctypes.util.find_library = lambda name: None\n" + RENDER
    lines = python(code, DISPLAY="").splitlines()
    if sys.platform == "linux":
        assert len(lines) == 1 and "install EGL" in lines[0] and "MUJOCO_GL=osmesa" in lines[0]


def test_gl_is_not_imported_and_the_environment_is_left_alone():
    code = """
import os, sys
from mbrl.envs import dmc, pool
assert not any(name.startswith(("dm_control", "mujoco")) for name in sys.modules)
env = dmc.make("quadruped_escape", 0)
env.reset()
assert not any(name.startswith("OpenGL") or name == "glfw" for name in sys.modules)
print("MUJOCO_GL" in os.environ)
"""
    assert python(code).strip() == "False"


def test_rendering_where_there_is_gl():
    code = """
from mbrl.envs import dmc
env = dmc.make("cartpole_swingup", 0)
env.reset()
try:
    frame = env.render(500, 700)
except RuntimeError as error:
    print("none", error)
else:
    print(frame.shape, frame.dtype, frame.std() > 1)
"""
    out = python(code)
    if out.startswith("none"):
        pytest.skip(out)
    assert out.strip() == "(500, 700, 3) uint8 True"
