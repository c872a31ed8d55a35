"""Tasks of the DeepMind Control Suite on the device: dm_control's own models in MuJoCo MJX.

A model is compiled from dm_control's XML and put on the device as it is, so that bodies, contacts, solver and
integrator are those of the host. What a task adds, which dm_control writes in Python, is written here again
as pure functions: how an episode starts, what is observed, what is paid. ``docs/environments.md`` has the
tasks, the differences that remain and how large they are. An optional dependency: ``pip install
'mbrl-jax[mjx]'``.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.envs import dmc
from mbrl.envs.adapters import contain, in_range
from mbrl.errors import UserError
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, PyTree, TimeStep

FRAMES = 1000
"""Control steps of an episode, in all tasks here."""


class State(NamedTuple):
    """What an episode carries. position: [nq]; velocity: [nv]; acceleration: [nv], where the next solve of
    the constraints starts; target: where the task draws one, else (); frame: int32 [], control steps so far.
    """

    position: Array
    velocity: Array
    acceleration: Array
    target: PyTree
    frame: Array


class Task(NamedTuple):
    """What dm_control writes in Python, for one model.

    start(simulate, key) -> (position [nq], velocity [nv], target); ``simulate`` is a `Simulation`.
    observe(data, target) -> {key: array}; reward(data, target) -> []. costly: starting takes simulation.
    """

    start: Callable[[Any, Array], tuple[Array, Array, PyTree]]
    observe: Callable[[Any, PyTree], dict[str, Array]]
    reward: Callable[[Any, PyTree], Array]
    costly: bool = False


class Simulation(NamedTuple):
    """MJX for one model. data(position, velocity, acceleration, control): unsimulated. step: one time step.
    forward: everything that follows from the state. view: the part of it that tasks look at, after a step.
    """

    data: Callable[..., Any]
    step: Callable[[Any], Any]
    forward: Callable[[Any], Any]
    view: Callable[[Any], Any]


def tolerance(
    x: Array,
    low: float,
    high: float = math.inf,
    margin: float = 0.0,
    at_margin: float = 0.1,
    shape: str = "gaussian",
) -> Array:
    """1 within [low, high], falling to ``at_margin`` at a distance of ``margin``, as dm_control's."""
    inside = (low <= x) & (x <= high)
    if margin == 0:
        return inside.astype(jnp.float32)
    distance = jnp.where(x < low, low - x, x - high) / margin
    if shape == "gaussian":
        value = jnp.exp(jnp.log(at_margin) * distance**2)
    elif shape == "linear":
        value = jnp.maximum(1 - (1 - at_margin) * distance, 0.0)
    else:
        assert shape == "quadratic"
        value = jnp.maximum(1 - (1 - at_margin) * distance**2, 0.0)
    return jnp.where(inside, 1.0, value)


def small_control(data: Any) -> Array:
    """Between 0.8 at full control and 1 at none, per actuator [A]."""
    return (4 + tolerance(data.ctrl, 0.0, 0.0, 1.0, 0.0, "quadratic")) / 5


def joint_ranges(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, whether there is a limit) per joint, for models of hinges and slides only."""
    assert model.nq == model.nv == model.njnt
    limited, hinge = model.jnt_limited == 1, model.jnt_type == 3
    free = np.where(hinge, np.pi, 0.0)
    low, high = (np.where(limited, model.jnt_range[:, i], sign * free) for i, sign in ((0, -1), (1, 1)))
    return low.astype(np.float32), high.astype(np.float32), limited


def uniform_joints(model: Any, only_limited: bool = False) -> Callable[[Array], Array]:
    """Positions uniform within their limits; without a limit, hinges anywhere (or as the model has them)."""
    low, high, limited = joint_ranges(model)
    drawn = limited if only_limited else low < high

    def draw(key: Array) -> Array:
        position = low + (high - low) * jax.random.uniform(key, low.shape)
        return jnp.where(drawn, position, np.float32(model.qpos0))

    return draw


def at_rest(draw: Callable[[Array], Array]) -> Callable[[Any, Array], tuple[Array, Array, PyTree]]:
    """Starts with drawn positions and no velocity."""

    def start(simulation: Simulation, key: Array):
        position = draw(key)
        return position, jnp.zeros_like(position), ()

    return start


def acrobot(model: Any, sparse: bool) -> Task:
    arms = np.array([model.body(name).id for name in ("upper_arm", "lower_arm")])
    tip, target, radius = model.site("tip").id, model.site("target").id, model.site("target").size[0]

    def observe(data, _):
        pose = data.xmat[arms]
        return {"orientations": jnp.concatenate([pose[:, 0, 2], pose[:, 2, 2]]), "velocity": data.qvel}

    def reward(data, _):
        distance = jnp.linalg.norm(data.site_xpos[target] - data.site_xpos[tip])
        return tolerance(distance, 0.0, radius, 0.0 if sparse else 1.0)

    return Task(at_rest(uniform_joints(model)), observe, reward)


def ball_in_cup(model: Any) -> Task:
    x, z = model.joint("ball_x").qposadr[0], model.joint("ball_z").qposadr[0]
    ball, target = model.body("ball").id, model.site("target").id
    room = model.site("target").size[[0, 2]] - model.geom("ball").size[0]

    def start(simulation: Simulation, key: Array):
        """Above the cup, drawn again while it touches something."""

        def draw(carry):
            key, again = jax.random.split(carry[0])
            place = jax.random.uniform(
                again, (2,), minval=jnp.array([-0.2, 0.2]), maxval=jnp.array([0.2, 0.5])
            )
            position = jnp.float32(model.qpos0).at[jnp.array([x, z])].set(place)
            zero = jnp.zeros(model.nv)
            contact = simulation.forward(
                simulation.data(position, zero, zero, jnp.zeros(model.nu))
            )._impl.contact
            return key, position, (contact.dist < contact.includemargin).any()

        first = key, jnp.float32(model.qpos0), jnp.ones((), bool)
        _, position, _ = jax.lax.while_loop(lambda carry: carry[2], draw, first)
        return position, jnp.zeros(model.nv), ()

    def reward(data, _):
        offset = (data.site_xpos[target] - data.xpos[ball])[jnp.array([0, 2])]
        return (jnp.abs(offset) < room).all().astype(jnp.float32)

    return Task(start, positions_and_velocities, reward, costly=True)


def cartpole(model: Any, swing_up: bool, sparse: bool) -> Task:
    cart = model.joint("slider").qposadr[0]

    def start(simulation: Simulation, key: Array):
        place_key, speed_key = jax.random.split(key)
        if swing_up:
            place = 0.01 * jax.random.normal(place_key, (2,)) + jnp.array([0.0, jnp.pi])
        else:
            place = jax.random.uniform(place_key, (2,), minval=-1.0) * jnp.array([0.1, 0.034])
        return place, 0.01 * jax.random.normal(speed_key, (2,)), ()

    def observe(data, _):
        pole = data.xmat[2]
        return {"position": jnp.stack([data.qpos[cart], pole[2, 2], pole[0, 2]]), "velocity": data.qvel}

    def reward(data, _):
        place, cosine = data.qpos[cart], data.xmat[2, 2, 2]
        if sparse:
            return tolerance(place, -0.25, 0.25) * tolerance(cosine, 0.995, 1.0)
        centred = (1 + tolerance(place, 0.0, 0.0, 2.0)) / 2
        slow = (1 + tolerance(data.qvel[1], 0.0, 0.0, 5.0)) / 2
        return (cosine + 1) / 2 * small_control(data)[0] * slow * centred

    return Task(start, observe, reward)


def cheetah(model: Any) -> Task:
    torso, draw = model.body("torso").id, uniform_joints(model, only_limited=True)

    def start(simulation: Simulation, key: Array):
        """Falls for 200 time steps, as in dm_control."""
        zero = jnp.zeros(model.nv)

        def fall(state, _):
            data = simulation.step(simulation.data(*state, jnp.zeros(model.nu)))
            return (data.qpos, data.qvel, data.qacc_warmstart), None

        (position, velocity, _), _ = jax.lax.scan(fall, (draw(key), zero, zero), None, 200)
        return position, velocity, ()

    def observe(data, _):
        return {"position": data.qpos[1:], "velocity": data.qvel}

    def reward(data, _):
        return tolerance(forward_speed(data, torso), 10.0, margin=10.0, at_margin=0.0, shape="linear")

    return Task(start, observe, reward, costly=True)


def hopper(model: Any, hopping: bool) -> Task:
    torso, foot = model.body("torso").id, model.body("foot").id
    touch = np.array([model.sensor(name).adr[0] for name in ("touch_toe", "touch_heel")])

    def observe(data, _):
        touched = jnp.log1p(data.sensordata[touch])
        return {"position": data.qpos[1:], "touch": touched, "velocity": data.qvel}

    def reward(data, _):
        standing = tolerance(data.xipos[torso, 2] - data.xipos[foot, 2], 0.6, 2.0)
        if hopping:
            speed = forward_speed(data, torso)
            return standing * tolerance(speed, 2.0, margin=1.0, at_margin=0.5, shape="linear")
        return standing * small_control(data).mean()

    return Task(at_rest(uniform_joints(model)), observe, reward, costly=True)


def pendulum(model: Any) -> Task:
    pole = model.body("pole").id

    def observe(data, _):
        return {"orientation": data.xmat[pole, jnp.array([2, 0]), 2], "velocity": data.qvel}

    def reward(data, _):
        return tolerance(data.xmat[pole, 2, 2], math.cos(math.radians(8)), 1.0)

    return Task(at_rest(uniform_joints(model)), observe, reward)


def point_mass(model: Any) -> Task:
    mass, target, size = model.geom("pointmass").id, model.geom("target").id, model.geom("target").size[0]

    def reward(data, _):
        distance = jnp.linalg.norm(data.geom_xpos[target] - data.geom_xpos[mass])
        return tolerance(distance, 0.0, size, size) * small_control(data).mean()

    return Task(at_rest(uniform_joints(model)), positions_and_velocities, reward)


def reacher(model: Any, size: float) -> Task:
    """size: radius of the target in m. The target meets nothing, so it is no part of the simulation."""
    finger, draw = model.geom("finger").id, uniform_joints(model)
    reach = size + model.geom("finger").size[0]

    def start(simulation: Simulation, key: Array):
        joint_key, angle_key, radius_key = jax.random.split(key, 3)
        angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi)
        radius = jax.random.uniform(radius_key, minval=0.05, maxval=0.2)
        return draw(joint_key), jnp.zeros(2), radius * jnp.stack([jnp.sin(angle), jnp.cos(angle)])

    def observe(data, target):
        offset = target - data.geom_xpos[finger, :2]
        return {"position": data.qpos, "to_target": offset, "velocity": data.qvel}

    def reward(data, target):
        return tolerance(jnp.linalg.norm(target - data.geom_xpos[finger, :2]), 0.0, reach)

    return Task(start, observe, reward)


def walker(model: Any, speed: float) -> Task:
    """speed: in m/s from which on the reward is full, 0 to stand."""
    torso = model.body("torso").id

    def observe(data, _):
        poses = data.xmat[1:, 0][:, jnp.array([0, 2])]
        return {"height": data.xpos[torso, 2][None], "orientations": poses.ravel(), "velocity": data.qvel}

    def reward(data, _):
        standing = tolerance(data.xpos[torso, 2], 1.2, margin=0.6)
        stand = (3 * standing + (1 + data.xmat[torso, 2, 2]) / 2) / 4
        if speed == 0:
            return stand
        moving = tolerance(forward_speed(data, torso), speed, margin=speed / 2, at_margin=0.5, shape="linear")
        return stand * (5 * moving + 1) / 6

    return Task(at_rest(uniform_joints(model)), observe, reward)


def positions_and_velocities(data: Any, target: PyTree) -> dict[str, Array]:
    return {"position": data.qpos, "velocity": data.qvel}


def forward_speed(data: Any, body: int) -> Array:
    """Speed [] along x of the centre of mass of a body and all that hangs on it, in m/s."""
    return data._impl.subtree_linvel[body, 0]


TASKS: dict[str, Callable[[Any], Task]] = {
    "acrobot_swingup": partial(acrobot, sparse=False),
    "acrobot_swingup_sparse": partial(acrobot, sparse=True),
    "ball_in_cup_catch": ball_in_cup,
    "cartpole_balance": partial(cartpole, swing_up=False, sparse=False),
    "cartpole_balance_sparse": partial(cartpole, swing_up=False, sparse=True),
    "cartpole_swingup": partial(cartpole, swing_up=True, sparse=False),
    "cartpole_swingup_sparse": partial(cartpole, swing_up=True, sparse=True),
    "cheetah_run": cheetah,
    "hopper_hop": partial(hopper, hopping=True),
    "hopper_stand": partial(hopper, hopping=False),
    "pendulum_swingup": pendulum,
    "point_mass_easy": point_mass,
    "reacher_easy": partial(reacher, size=0.05),
    "reacher_hard": partial(reacher, size=0.015),
    "walker_run": partial(walker, speed=8.0),
    "walker_stand": partial(walker, speed=0.0),
    "walker_walk": partial(walker, speed=1.0),
}
"""Tasks by dm_control's usual names, and what makes their `Task` from a compiled model."""


def make(task: str, action_repeat: int = 2) -> JaxEnv:
    """A task of dm_control as an environment written in JAX, with the observations and rewards of the host.

    task: any spelling that ``mbrl.envs.dmc.canonical`` accepts of one of `TASKS`. action_repeat: control
    steps per agent step; it must divide the 1000 of an episode. Episodes end by truncation only.
    Raises ValueError for other tasks and counts, UserError where mujoco-mjx is not installed.
    """
    name = dmc.canonical(task)
    if name not in TASKS:
        raise ValueError(
            f"{task!r} is not among the tasks that run on the device: {', '.join(TASKS)}; "
            "--env-backend host has all of dm_control"
        )
    if action_repeat < 1 or FRAMES % action_repeat:
        raise ValueError(
            f"action_repeat must divide the {FRAMES} control steps of an episode, found {action_repeat}"
        )
    model, substeps = dmc.model(name)
    task_of, simulation = TASKS[name](model), simulate(model)
    low, high = model.actuator_ctrlrange.T.astype(np.float32)

    def reset(key: Array) -> tuple[State, TimeStep]:
        position, velocity, target = task_of.start(simulation, key)
        data = simulation.data(position, velocity, jnp.zeros(model.nv), jnp.zeros(model.nu))
        data = simulation.forward(data) if task_of.costly else simulation.view(data)
        state = State(position, velocity, jnp.zeros(model.nv), target, jnp.zeros((), jnp.int32))
        no = jnp.zeros((), bool)
        return state, TimeStep(observe(data, target), jnp.zeros(()), no, jnp.copy(no))

    def observe(data: Any, target: PyTree) -> dict[str, Array]:
        # Copies, since leaves that share a buffer cannot be donated.
        return {key: jnp.copy(value) for key, value in task_of.observe(data, target).items()}

    def step(state: State, action: Array, key: Array) -> tuple[State, TimeStep]:
        del key  # deterministic
        control = in_range(action, low, high)

        def substep(carry, _):
            data = simulation.step(simulation.data(*carry[:3], control))
            return (data.qpos, data.qvel, data.qacc_warmstart, data.sensordata), None

        def frame(carry, _):
            carry, _ = jax.lax.scan(substep, carry, None, substeps)
            data = simulation.view(simulation.data(*carry[:3], control).replace(sensordata=carry[3]))
            return carry, (observe(data, state.target), task_of.reward(data, state.target))

        carry = state.position, state.velocity, state.acceleration, jnp.zeros(model.nsensordata)
        carry, (seen, rewards) = jax.lax.scan(frame, carry, None, action_repeat)
        after = State(*carry[:3], state.target, state.frame + action_repeat)
        obs = jax.tree.map(lambda x: x[-1], seen)
        ended = TimeStep(obs, rewards.sum(), after.frame >= FRAMES, jnp.zeros((), bool))
        return after, contain(ended)

    shown = jax.eval_shape(reset, jax.random.key(0))[1].obs
    spec = EnvSpec(
        name=name,
        obs={key: ArraySpec(x.shape) for key, x in shown.items()},
        action=ArraySpec((model.nu,)),
        action_repeat=action_repeat,
        max_steps=FRAMES // action_repeat,
    )
    return JaxEnv(spec, reset, step, task_of.costly)


def simulate(model: Any) -> Simulation:
    """MJX for a compiled model, by its implementation in JAX (the one in Warp needs a GPU of NVIDIA)."""
    mjx = _mjx()
    assert model.na == 0, "none of the tasks has actuators with a state"
    # MJX does not compute energies, which nothing here asks for.
    model.opt.enableflags &= ~2
    device_model = mjx.put_model(model, impl="jax")
    blank = mjx.make_data(model, impl="jax")

    def data(position: Array, velocity: Array, acceleration: Array, control: Array) -> Any:
        return blank.replace(qpos=position, qvel=velocity, qacc_warmstart=acceleration, ctrl=control)

    def view(state: Any) -> Any:
        """Positions, orientations and velocities of bodies. dm_control, too, refreshes what depends on
        positions and velocities after its last step, and leaves forces as that step found them."""
        for function in (mjx.kinematics, mjx.com_pos, mjx.com_vel, mjx.subtree_vel):
            state = function(device_model, state)
        return state

    def forward(state: Any) -> Any:
        return mjx.subtree_vel(device_model, mjx.forward(device_model, state))

    return Simulation(data, partial(mjx.step, device_model), forward, view)


def _mjx() -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that Warp is missing, which is not used
            from mujoco import mjx  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            "--env-backend mjx needs mujoco-mjx, which is not installed: pip install 'mbrl-jax[mjx]'"
        ) from None
    return mjx
