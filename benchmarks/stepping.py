"""How many agent steps a second environments make, on the device and on the host.

    python benchmarks/stepping.py cartpole_swingup brax:inverted_pendulum:spring gymnax:CartPole-v1

Tasks of dm_control that MuJoCo MJX can simulate are measured on both sides. Random actions and nothing else:
no agent, no replay, and on the device no resets. "compile" is one program of ``STEPS`` steps. Steps are
counted over all environments; times are wall and CPU seconds, as other processes may be running.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np
from rendering import rate

from mbrl.collect import random_action
from mbrl.drivers import Source, make_source
from mbrl.envs import is_jax, mjx
from mbrl.envs.pool import HostPool
from mbrl.types import JaxEnv

STEPS = 100
"""Of every environment in one call."""


def host_rates(source: Source, num_envs: int, seconds: float) -> dict[str, float]:
    """Environments in this process, one after the other, with their resets."""
    pool, rng = HostPool([source.make_host(seed) for seed in range(num_envs)]), np.random.default_rng(0)
    ended = pool.reset().is_last

    def step():
        nonlocal ended
        action = rng.uniform(-1, 1, (num_envs, pool.spec.action.size)).astype(np.float32)
        ended = pool.step(action, ended).is_last

    wall, cpu = rate(step, seconds)
    pool.close()
    return {"wall": wall * num_envs, "cpu": cpu * num_envs}


def device_rates(env: JaxEnv, num_envs: int, seconds: float) -> dict[str, float]:
    """``num_envs`` environments in one batch, and the CPU seconds of compiling it."""
    keys = lambda key: jax.random.split(key, num_envs)
    state = jax.jit(lambda key: jax.vmap(env.reset)(keys(key))[0])(jax.random.key(0))

    def run(state: Any, key):
        def body(state, key):
            action = random_action(key, env.spec, num_envs)
            state, shown = jax.vmap(env.step)(state, action, keys(key))
            return state, shown.reward.sum()

        return jax.lax.scan(body, state, jax.random.split(key, STEPS))

    began = time.process_time()
    program = jax.jit(run).lower(state, jax.random.key(0)).compile()
    compiling = time.process_time() - began

    def call():
        nonlocal state
        state, rewards = program(state, jax.random.key(1))
        rewards.block_until_ready()

    wall, cpu = rate(call, seconds)
    return {"wall": wall * num_envs * STEPS, "cpu": cpu * num_envs * STEPS, "compile": compiling}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", help="names as --task takes them")
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    options = parser.parse_args()
    print("| task | where | environments | steps/s | steps per CPU second | compile, CPU s |")
    print("|---|---|---|---|---|---|")

    def show(task: str, where: str, count: int, rates: dict[str, float]) -> None:
        compiling = f"{rates['compile']:.0f}" if "compile" in rates else ""
        speed = f"{rates['wall']:,.0f} | {rates['cpu']:,.0f}"
        print(f"| `{task}` | {where} | {count} | {speed} | {compiling} |", flush=True)

    for task in options.tasks:
        host = None if is_jax(task) else make_source(task, 2)
        device = make_source(task, 2, backend="mjx" if task in mjx.TASKS else "host").env
        for count in options.num_envs:
            if host is not None:
                show(task, "host", count, host_rates(host, count, options.seconds))
            if device is not None:
                show(task, "device", count, device_rates(device, count, options.seconds))


if __name__ == "__main__":
    main()
