"""How far tasks in MJX are from dm_control, from equal states along equal actions.

    python -m tests.mjx_parity [TASK ...]

Prints a row of markdown per task with the largest differences. Compiling takes up to a minute per task.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.envs import checks, dmc, mjx

STARTS, STEPS, REPEAT = 8, 3, 2


class Difference(NamedTuple):
    """Largest differences, relative to 1 + |value|: of positions, of velocities and touch, of rewards."""

    position: float
    velocity: float
    reward: float


@functools.cache
def device(task: str):
    """(environment, its reset and step for a batch), compiled once per process."""
    env = mjx.make(task, REPEAT)
    return env, jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))


def hosts(task: str) -> list[dmc.DMC]:
    """Host environments in the middle of different episodes."""
    made = [dmc.make(task, seed, REPEAT) for seed in range(STARTS)]
    for i, host in enumerate(made):
        host.reset()
        for action in checks.actions(host.spec, 5 * i, i):
            host.step(action)
    return made


def state_of(host: dmc.DMC) -> mjx.State:
    """The state of a host environment, of its simulation and of its task."""
    data, model = host._physics.data, host._physics.model.ptr
    target = np.float32(model.geom("target").pos[:2]) if "reacher" in host.spec.name else ()
    numbers = (np.float32(x) for x in (data.qpos, data.qvel, data.qacc_warmstart))
    return mjx.State(*numbers, target, np.int32(host._count))


def compare(task: str) -> Difference:
    """Plays some steps on both sides from the states of `hosts`."""
    env, _, step = device(task)
    played, rng = hosts(task), np.random.default_rng(0)
    states = jax.tree.map(lambda *xs: jnp.stack(xs), *map(state_of, played))
    keys = jax.random.split(jax.random.key(0), STARTS)
    largest = {"position": 0.0, "velocity": 0.0, "reward": 0.0}

    def note(kind: str, ours, theirs):
        error = np.abs(np.asarray(ours) - theirs) / (1 + np.abs(theirs))
        largest[kind] = max(largest[kind], float(np.nan_to_num(error, nan=np.inf).max()))

    for _ in range(STEPS):
        actions = rng.uniform(-1.2, 1.2, (STARTS, env.spec.action.size)).astype(np.float32)
        states, shown = step(states, jnp.asarray(actions), keys)
        for i, host in enumerate(played):
            expected = host.step(actions[i])
            for key, value in expected.obs.items():
                note("velocity" if key in ("velocity", "touch") else "position", shown.obs[key][i], value)
            note("reward", shown.reward[i], expected.reward)
    return Difference(**largest)


def main(tasks: list[str]) -> None:
    print("| task | positions | velocities, touch | reward |")
    print("|---|---|---|---|")
    for task in tasks or mjx.TASKS:
        errors = " | ".join(f"{x:.0e}" for x in compare(task))
        print(f"| `{task}` | {errors} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
