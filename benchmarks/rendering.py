"""How many pictures a second the tasks give: dm_control's renderer, with and without its costly effects, and
the tasks in JAX that draw themselves.

    python benchmarks/rendering.py --tasks cartpole_swingup walker_walk --seconds 5

Each dm_control case renders one environment in this process, after every agent step; "step" is the step
alone.
Times are wall and CPU seconds, as other processes may be running.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from mbrl import envs
from mbrl.envs.pixels import CameraConfig

JAX_TASKS = "pendulum", "cartpole"


def rate(function, seconds: float) -> tuple[float, float]:
    """Calls of ``function`` per wall second and per CPU second, after one to warm up."""
    function()
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        function()
        count += 1
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def host_rates(task: str, size: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Of one dm_control task: the step alone, and a step with a picture in both qualities."""
    found = {}
    for name, shown, quality in (
        ("step", "state", "fast"),
        ("dmc", "pixels", "dmc"),
        ("fast", "pixels", "fast"),
    ):
        env = envs.make_host(task, 0, 2, shown, CameraConfig(size, quality=quality))
        rng = np.random.default_rng(0)

        def step(env=env, rng=rng):
            if step.over:
                env.reset()
            step.over = env.step(rng.uniform(-1, 1, env.spec.action.shape)).is_last

        step.over = True
        found[name] = rate(step, seconds)
        env.close()
    return found


def jax_rate(task: str, size: int, num_envs: int, seconds: float) -> tuple[float, float]:
    """Environment steps with a picture, ``num_envs`` side by side in a scan of 100."""
    env = envs.make_jax(task, "pixels", CameraConfig(size))

    @jax.jit
    def run(key):
        states, _ = jax.vmap(env.reset)(jax.random.split(key, num_envs))

        def body(carry, key):
            states, total = carry
            keys = jax.random.split(key, num_envs)
            action = jax.random.uniform(key, (num_envs, env.spec.action.size), minval=-1.0)
            states, step = jax.vmap(env.step)(states, action, keys)
            return (states, total + step.obs["image"].astype(float).sum()), ()

        return jax.lax.scan(body, (states, 0.0), jax.random.split(key, 100))[0][1]

    found = rate(lambda: run(jax.random.key(0)).block_until_ready(), seconds)
    return found[0] * 100 * num_envs, found[1] * 100 * num_envs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=["cartpole_swingup", "walker_walk"])
    parser.add_argument("--size", type=int, default=64, help="side of the picture")
    parser.add_argument("--num-envs", type=int, default=16, help="of the JAX tasks")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    options = parser.parse_args()
    print("| task | pictures | per wall second | per CPU second | of dmc, CPU |\n|---|---|---|---|---|")
    for task in options.tasks:
        rates = host_rates(task, options.size, options.seconds)
        for name, (wall, cpu) in rates.items():
            ratio = f"{cpu / rates['dmc'][1]:.1f}" if name != "step" else ""
            print(f"| {task} | {name} | {wall:.0f} | {cpu:.0f} | {ratio} |", flush=True)
    for task in JAX_TASKS:
        wall, cpu = jax_rate(task, options.size, options.num_envs, options.seconds)
        print(f"| {task} (JAX) | drawn | {wall:.0f} | {cpu:.0f} | |", flush=True)


if __name__ == "__main__":
    main()
