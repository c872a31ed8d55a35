"""What planners reach with the true model of the cartpole swing-up, as a table for docs/planners.md.

python benchmarks/planning.py              # every row, about 8 minutes of one core
python benchmarks/planning.py random icem  # those whose planner is named
python benchmarks/planning.py --seeds 2 --envs 2
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import jax
import numpy as np

import planners
from mbrl import envs
from mbrl.config import config_type, load_factory, override
from mbrl.planning import make_objective, make_planner
from mbrl.true_model import control, simulator_of_env

HORIZON = 25
"""Actions in a plan: a second at an action repeat of 4."""


def mppi(iterations: int, samples: int, **more: Any) -> dict[str, Any]:
    return dict(iterations=iterations, samples=samples, elites=samples // 8, policy_samples=0, **more)


NARROW = dict(max_std=0.5)
"""Searches begin where the last one ended, not nearly uniform in the bounds as with the published 2."""
CEM = dict(iterations=3, samples=64, elites=8)
ICEM = CEM | dict(decay=1.0)
CLASSIC = dict(iterations=3, samples=64, elites=64)

ROWS: list[tuple[str, dict[str, Any], bool]] = [
    *(("mppi", mppi(rounds, 64), True) for rounds in (1, 3, 6)),
    *(("mppi", mppi(3, samples), True) for samples in (16, 256)),
    ("random", dict(samples=192), True),
    ("mppi", mppi(3, 64), False),
    *(("mppi", mppi(3, 64, **NARROW), warm) for warm in (True, False)),
    *(("mppi_classic", CLASSIC, warm) for warm in (True, False)),
    *(("cem", CEM, warm) for warm in (True, False)),
    *(("icem", ICEM, warm) for warm in (True, False)),
    ("gradient", dict(iterations=20, samples=4), True),
]
"""(planner, settings, whether a search begins where the last one ended)"""


class Result(NamedTuple):
    """returns: [S, E] of episodes; rounds and candidates: of one plan; cpu: milliseconds of one plan."""

    returns: np.ndarray
    rounds: int
    candidates: int
    cpu: float


def measure(name: str, fields: dict[str, Any], warm: bool, seeds: int, num_envs: int) -> Result:
    """Episodes of a planner, which begin in the same states for all."""
    env = envs.make_jax("cartpole", action_repeat=4)
    factory = load_factory("planner", name, planners.REGISTRY)
    rule = factory(override(config_type(factory)(), fields | {"horizon": HORIZON}), env.spec.action)
    planner, steps = make_planner(simulator_of_env(env), rule), env.spec.max_steps or 0
    episodes = lambda key: control(env, planner, make_objective(), key, num_envs, steps, warm)[0].sum(0)
    keys = jax.random.split(jax.random.key(0), seeds)
    program = jax.jit(lambda keys: jax.lax.map(episodes, keys)).lower(keys).compile()
    began = time.process_time()
    returns = np.asarray(jax.block_until_ready(program(keys)), np.float64)
    cpu = 1e3 * (time.process_time() - began) / (steps * returns.size)
    rounds = sum(stage.iterations for stage in rule.stages)
    return Result(returns, rounds, sum(stage.iterations * stage.samples for stage in rule.stages), cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="Returns and costs of the planners with the true cartpole.")
    parser.add_argument("planner", nargs="*", help="planners by name; all by default")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--envs", type=int, default=4, help="episodes per seed")
    args = parser.parse_args()
    print("| planner | rounds | candidates | warm start | return | standard error | CPU ms per plan |")
    print("|---|---|---|---|---|---|---|")
    for name, fields, warm in ROWS:
        if name in (args.planner or planners.REGISTRY):
            found = measure(name, fields, warm, args.seeds, args.envs)
            error = found.returns.std(ddof=1) / found.returns.size**0.5
            first = f"{name}, `max_std` {fields['max_std']}" if "max_std" in fields else name
            start = "yes" if warm else "no"
            print(
                f"| {first} | {found.rounds} | {found.candidates} | {start} | {found.returns.mean():.0f} "
                f"| {error:.0f} | {found.cpu:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
