"""What planners reach with the true model of the cartpole swing-up, as a table for docs/planners.md.

python benchmarks/planning.py            # every row
python benchmarks/planning.py random icem  # those whose planner is named
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

import planners
from mbrl import envs
from mbrl.config import config_type, load_factory, override
from mbrl.planning import make_objective, make_planner
from mbrl.true_model import control, simulator_of_env

SEEDS, ENVS, HORIZON = 3, 2, 25


def mppi(iterations: int, samples: int) -> dict[str, int]:
    return dict(iterations=iterations, samples=samples, elites=samples // 8, policy_samples=0)


ROWS = [
    ("mppi", mppi(1, 64), True),
    ("mppi", mppi(3, 64), True),
    ("mppi", mppi(6, 64), True),
    ("mppi", mppi(3, 16), True),
    ("mppi", mppi(3, 256), True),
    ("mppi", mppi(3, 64), False),
    ("random", dict(samples=192), True),
    ("cem", dict(iterations=3, samples=64, elites=8), True),
    ("icem", dict(iterations=3, samples=64, elites=8, decay=1.0), True),
    ("mppi_classic", dict(iterations=3, samples=64, elites=64), True),
    ("gradient", dict(iterations=20, samples=4), True),
]
"""(planner, settings, whether a search begins where the last one ended)"""


def measure(name: str, fields: dict[str, int], warm: bool) -> str:
    env = envs.make_jax("cartpole", action_repeat=4)
    factory = load_factory("planner", name, planners.REGISTRY)
    rule = factory(override(config_type(factory)(), fields | {"horizon": HORIZON}), env.spec.action)
    planner, steps = make_planner(simulator_of_env(env), rule), env.spec.max_steps or 0
    episodes = lambda key: control(env, planner, make_objective(), key, ENVS, steps, warm)[0].sum(0)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    program = jax.jit(lambda keys: jax.lax.map(episodes, keys)).lower(keys).compile()
    began = time.process_time()
    returns = np.asarray(jax.block_until_ready(program(keys)), np.float64)
    cpu = 1e3 * (time.process_time() - began) / (steps * returns.size)
    rounds = sum(stage.iterations for stage in rule.stages)
    count = sum(stage.iterations * stage.samples for stage in rule.stages)
    start = "yes" if warm else "no"
    scores = f"{returns.mean():.0f} | {returns.min():.0f} to {returns.max():.0f}"
    return f"| {name} | {rounds} | {count} | {start} | {scores} | {cpu:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Returns and costs of the planners with the true cartpole.")
    parser.add_argument("planner", nargs="*", help="planners by name; all by default")
    names = parser.parse_args().planner or list(planners.REGISTRY)
    print("| planner | rounds | candidates per plan | warm start | return, mean | range | CPU ms per plan |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        if row[0] in names:
            print(measure(*row), flush=True)


if __name__ == "__main__":
    main()
