"""Model predictive control with the true dynamics: what a planner reaches when its model has no error.

    python experiments/mpc_true_model.py --task cartpole --planner icem --num-seeds 3 --num-envs 4
    python experiments/mpc_true_model.py --task cartpole_swingup --env-backend mjx --planner icem --num-envs 1

Prints one line of JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import jax
import numpy as np

import planners
from mbrl import envs
from mbrl.config import choose, config_type, early_flags, load_factory, override, parse_flags, run_main
from mbrl.drivers import make_source
from mbrl.errors import check_at_least
from mbrl.planning import PlanConfig, RuleConfig, make_planner, plan_objective
from mbrl.seeds import Seeds, use_compilation_cache, use_cpu_devices
from mbrl.true_model import control, simulator_of_env
from mbrl.types import JaxEnv

TASKS = ["cartpole", "pendulum", "pendulum_dense"]
"""Tasks of the backend jax."""
ACTION_REPEAT = 4
"""Simulator frames per agent step: plans of a second in few steps. No policy knows of this choice."""


@dataclass(frozen=True)
class Config:
    """A planner with the true model of an environment written in JAX."""

    search: RuleConfig
    """Settings of the planner."""
    task: str = "cartpole"
    """An environment written in JAX: cartpole, pendulum, pendulum_dense; or a task of dm_control in MJX."""
    env_backend: str = "jax"
    """Whose physics it is: jax, written here, or mjx, MuJoCo's own on the device (slow on a CPU)."""
    planner: str = "icem"
    """Planner by name (mppi, mppi_classic, cem, icem, random, gradient)."""
    seed: int = 0
    """First seed."""
    num_seeds: int = 1
    """Independent runs in one compiled program (S)."""
    num_envs: int = 4
    """Episodes of each seed (E)."""
    steps: int = 0
    """Agent steps of an episode; 0 is the task's own length."""
    discount: float = 1.0
    """Discount per imagined step (gamma)."""
    warm_start: bool = True
    """Begin each search where the last one ended."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """How the planner is used."""


def default_config(planner: str) -> Config:
    """A planner's own settings, with plans of a second and without a policy."""
    search = config_type(find_planner(planner))()
    changes = {"horizon": 25, "policy_samples": 0}
    known = {name: value for name, value in changes.items() if hasattr(search, name)}
    return Config(override(search, known), planner=planner)


def find_planner(name: str):
    """The factory of a search rule that needs no policy."""
    registry = {k: v for k, v in planners.REGISTRY.items() if k not in ("policy", "guided")}
    return load_factory("--planner", name, registry)


def make_env(task: str, backend: str) -> JaxEnv:
    """The environment, which is its own simulator."""
    if choose("--env-backend", backend, ["jax", "mjx"]) == "jax":
        return envs.make_jax(choose("--task", task, TASKS), action_repeat=ACTION_REPEAT)
    env = make_source(task, ACTION_REPEAT, backend=backend).env
    assert env is not None  # MJX runs on the device
    return env


def main(argv: Sequence[str]) -> None:
    early = early_flags(argv, planner="icem", num_seeds=1)
    use_cpu_devices(max(1, early.num_seeds))
    config = parse_flags(argv, default_config(early.planner))
    check_at_least("num_envs", config.num_envs, 1)
    check_at_least("steps", config.steps, 0)
    env = make_env(config.task, config.env_backend)
    steps = config.steps or env.spec.max_steps or 0
    rule = find_planner(config.planner)(config.search, env.spec.action)
    planner = make_planner(simulator_of_env(env), rule, config.plan)
    seeds = Seeds.make(config.seed, config.num_seeds)
    use_compilation_cache()

    def episodes(key):
        objective = plan_objective(config.plan, "eval", config.discount)
        return control(env, planner, objective, key, config.num_envs, steps, config.warm_start)[0].sum(0)

    keys = seeds.keys()
    program = seeds.program(episodes).lower(keys).compile()
    began = time.perf_counter()
    returns = np.asarray(jax.block_until_ready(program(keys)), np.float64)
    seconds = time.perf_counter() - began
    plans = steps * returns.size / config.plan.replan_every / config.plan.action_block
    result = {
        "task": config.task,
        "env_backend": config.env_backend,
        "planner": config.planner,
        "search": asdict(config.search),
        "warm_start": config.warm_start,
        "return": round(returns.mean(), 1),
        "returns": returns.round(1).tolist(),
        "ms_per_plan": round(1e3 * seconds / plans, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
