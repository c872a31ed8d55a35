"""How fast TD-MPC2 plans and learns, against what the machine's own matmul allows.

    python benchmarks/plan_step.py --presets 1M 5M --num-envs 1 16 --json plan.json

For each preset and number of environments planned as one batch: time per call, its analytic FLOPs, and their
ratio to the float32 matmul rate measured next to it; then the same for a gradient step. The FLOPs of a plan
in which every critic is evaluated, as published, are printed beside. Shapes of walker_walk: 24 observed
numbers, 6 actions.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_step import WALKER, kernels, matmul_rate, wall_seconds

import planners
from mbrl.agents import tdmpc
from mbrl.agents.planning import default_search, find_rule
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import override
from mbrl.planning import make_objective, make_planner
from mbrl.presets import TDMPC
from mbrl.run_folder import machine, versions
from mbrl.seeds import use_cpu_devices
from mbrl.types import Trajectory
from planners.mppi import MPPIConfig
from world_models.tdmpc import TDMPCModelConfig, make

DISCOUNT = 0.99


def plan_flops(params, search: MPPIConfig, critics: int) -> float:
    """FLOPs of the matrix products of one plan: every candidate of every round is rolled out, and valued by
    ``critics`` of the critics at its end; the policy's sequences are rolled out once."""
    model, actor = params["model"], kernels(params["actor"])
    count = len(jax.tree.leaves(params["critic"])[0])
    step = kernels(model["dynamics"]) + kernels(model["reward"])
    tail = actor + critics * kernels(params["critic"]) / count
    candidates = search.iterations * search.samples
    proposals = search.policy_samples * search.horizon * (actor + kernels(model["dynamics"]))
    return 2.0 * (candidates * (search.horizon * step + tail) + proposals + kernels(model["encoder"]))


def update_flops(params, batch: int, horizon: int) -> float:
    """FLOPs of the matrix products of one gradient step; a backward pass costs two forward ones, one where
    only the inputs are differentiated."""
    model, actor, critics = params["model"], kernels(params["actor"]), kernels(params["critic"])
    pair = 2 * critics / len(jax.tree.leaves(params["critic"])[0])
    encoder = (horizon + 1) * 3 * kernels(model["encoder"])
    sequence = (horizon + 1) * 3 * (kernels(model["dynamics"]) + kernels(model["reward"]))
    value = horizon * (3 * critics + actor + pair)
    policy = (horizon + 1) * (3 * actor + 2 * pair)
    return 2.0 * batch * (encoder + sequence + value + policy)


def measure(preset: str, num_envs: list[int], repeats: int) -> list[dict[str, Any]]:
    """Figures of one preset: a row for each batch of environments, and one for the gradient step."""
    values = TDMPC[preset]
    model_config = override(TDMPCModelConfig(), values["model"])
    config = override(TDMPCConfig(), values["agent"])
    search = override(default_search("mppi", planners.REGISTRY), values["search"].get("mppi", {}))
    assert isinstance(search, MPPIConfig)
    model = make(model_config, WALKER)
    agent = tdmpc.make(config, WALKER, model, DISCOUNT, 10_000)
    rule = find_rule("mppi", planners.REGISTRY)(search, WALKER.action)
    planner = make_planner(tdmpc.make_simulator(config, WALKER, model, DISCOUNT), rule)
    key = jax.random.key(0)
    train = jax.jit(agent.init)(key)
    rows = []

    def add(what: str, envs: int, flops: float, published: float, call) -> None:
        """Times ``call`` and the machine's matmul in turn."""
        call()
        times, rates = [], []
        for _ in range(repeats):
            rates.append(matmul_rate(repeats=3))
            times.append(wall_seconds(call))
        seconds, rate = median(times), median(rates)
        fraction = median(flops / t / r for t, r in zip(times, rates, strict=True))
        rows.append(
            {
                "preset": preset,
                "what": what,
                "envs": envs,
                "seconds": seconds,
                "gflop": flops / 1e9,
                "gflop_with_all_critics": published / 1e9,
                "matmul_gflop_per_second": rate / 1e9,
                "fraction_of_matmul_rate": fraction,
            }
        )
        print(line(rows[-1]), flush=True)

    @jax.jit
    def plan(params, warm, state, first):
        return planner.plan(params, make_objective(), warm, state, first, key, "train")[0]

    for envs in num_envs:
        inputs = planner.init(envs), agent.init_actor(train, envs)[0], np.zeros(envs, bool)
        two, every = (envs * plan_flops(train.params, search, n) for n in (2, config.critics))
        add("plan", envs, two, every, lambda inputs=inputs: plan(train.params, *inputs).block_until_ready())

    batch, length = values["loop"]["batch_size"], values["loop"]["batch_length"] + 1
    rng, lead = np.random.default_rng(0), (length, batch)
    obs = {k: rng.normal(size=(*lead, *s.shape)).astype(np.float32) for k, s in WALKER.obs.items()}
    action = rng.uniform(-1, 1, (*lead, WALKER.action.size)).astype(np.float32)
    flags = [np.zeros(lead, bool) for _ in range(3)]
    parts = obs, action, rng.normal(size=lead).astype(np.float32), *flags
    traj = Trajectory(*jax.tree.map(jnp.asarray, parts))
    update = jax.jit(agent.update)
    flops = update_flops(train.params, batch, length - 1)
    add("update", batch, flops, flops, lambda: jax.block_until_ready(update(train, traj, key)))
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table in markdown."""
    return (
        f"| {row['preset']} | {row['what']} | {row['envs']} | {1e3 * row['seconds']:.1f} "
        f"| {row['gflop']:.1f} ({row['gflop_with_all_critics']:.1f}) | {row['matmul_gflop_per_second']:.0f} "
        f"| {row['fraction_of_matmul_rate']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["1M", "5M"], choices=list(TDMPC))
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median is reported")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    use_cpu_devices(1)  # as runs do
    print("| preset | call | batch | ms | GFLOP (all critics) | matmul GFLOP/s | of that rate |")
    print("|---|---|---|---|---|---|---|")
    rows = [row for preset in args.presets for row in measure(preset, args.num_envs, args.repeats)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine(), "versions": versions(), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
