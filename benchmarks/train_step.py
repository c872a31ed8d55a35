"""How fast one gradient step is, against what the machine's own matmul allows.

    python benchmarks/train_step.py --presets size1m size12m --num-seeds 1 2 4 --json bench.json

For each preset and number of seeds: train-step time (batch 16 x 64, walker_walk's shapes), its analytic
FLOPs, their ratio to the float32 matmul rate measured in the same process, policy step time, compile time
cold and from the persistent cache, and peak memory; then environment steps per second of the whole loop.
Each case runs in a process of its own, so that compile times and memory do not mix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from mbrl import envs, replay
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import override
from mbrl.drivers import HostDriver, Source, make_pool
from mbrl.presets import DREAMER
from mbrl.programs import LoopConfig, example_row, make_clock, make_programs
from mbrl.run_folder import machine, versions
from mbrl.seeds import Seeds, use_cpu_devices
from mbrl.types import ArraySpec, EnvSpec
from world_models import rssm
from world_models.rssm import RSSMConfig

WALKER = EnvSpec(
    "walker_walk",
    {"height": ArraySpec((1,)), "orientations": ArraySpec((14,)), "velocity": ArraySpec((9,))},
    ArraySpec((6,)),
    action_repeat=2,
)


def configs(preset: str) -> tuple[RSSMConfig, DreamerConfig, LoopConfig]:
    values = DREAMER[preset]
    model = override(RSSMConfig(), values["model"] | values["rssm"])
    agent = override(DreamerConfig(), values["agent"] | {"optimiser": values["optimiser"]})
    return model, agent, override(LoopConfig(), values["loop"])


def wall_seconds(function) -> float:
    """Wall time of ``function``, which must wait for its own result."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def median_seconds(function, repeats: int) -> float:
    """Median wall time of ``function`` after one call to warm up."""
    function()
    return statistics.median(wall_seconds(function) for _ in range(repeats))


def matmul_rate(size: int = 2048, repeats: int = 9) -> float:
    """float32 FLOP/s of one large square matmul on one device (which on a CPU may use every core)."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(lambda a: a @ a)
    return 2 * size**3 / median_seconds(lambda: multiply(x).block_until_ready(), repeats)


def kernels(params) -> int:
    """Entries of all weight matrices: half the FLOPs of a forward pass of one row."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.size for path, x in leaves if path[-1].key == "kernel")


def update_flops(spec: EnvSpec, model: RSSMConfig, agent: DreamerConfig, batch: int, length: int) -> float:
    """FLOPs of the matrix products of one update: twice a kernel's size per row and pass; a backward pass
    costs two more. Elementwise work is not counted."""
    params = jax.eval_shape(make_agent(spec, model, agent).init, jax.random.key(0)).params
    world, actor, critic = params["model"], kernels(params["actor"]), kernels(params["critic"])
    dynamics, posterior = kernels(world["backbone"]), kernels(world["backbone"]["post_net"])
    heads = kernels(world["reward"]) + kernels(world["cont"])
    rows = batch * length
    starts = agent.imag_starts or batch * (agent.imag_last or length)
    backward = 3 if agent.actor_grad == "dynamics" else 1
    observe = 3 * rows * (dynamics + heads + kernels(world["encoder"]) + kernels(world["decoder"]))
    imagine = backward * starts * agent.horizon * (dynamics - posterior + actor)
    # Reward, continue, slow critic forward; policy and critic with gradients. Through the dynamics the
    # heads and one more critic are differentiated for their inputs.
    states = starts * (agent.horizon + 1)
    evaluate = states * ((2 if backward == 3 else 1) * heads + critic + 3 * critic + 3 * actor)
    if backward == 3:
        evaluate += states * 2 * critic
    replayed = batch * (agent.imag_last or length) * 4 * critic
    return 2.0 * (observe + imagine + evaluate + replayed)


def make_agent(spec: EnvSpec, model: RSSMConfig, agent: DreamerConfig):
    return dreamer.make(agent, spec, rssm.make(model, spec), model.discount, 10_000)


def measure_case(preset: str, num_seeds: int, batch: int, length: int, repeats: int) -> dict:
    """All figures of one preset and number of seeds, in this process."""
    use_cpu_devices(num_seeds)
    cache = tempfile.mkdtemp()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rate = matmul_rate()
    model, agent_config, _ = configs(preset)
    agent, seeds = make_agent(WALKER, model, agent_config), Seeds.make(0, num_seeds)
    keys = seeds.keys()
    train = jax.block_until_ready(seeds.program(agent.init)(keys))
    row = example_row(agent, WALKER, batch)
    rng = np.random.default_rng(0)

    def fill(x):
        shape = (num_seeds, length + int(agent_config.replay_context), *x.shape)
        return np.zeros(shape, x.dtype) if x.dtype == bool else rng.normal(size=shape).astype(x.dtype)

    traj = jax.device_put(jax.tree.map(fill, row), seeds.sharding)
    began = time.perf_counter()
    step = seeds.program(agent.update, donate=0).lower(train, traj, keys).compile()
    cold = time.perf_counter() - began
    memory = step.memory_analysis()
    jax.clear_caches()
    began = time.perf_counter()
    step = seeds.program(agent.update, donate=0).lower(train, traj, keys).compile()
    warm = time.perf_counter() - began

    def update():
        nonlocal train
        train, info = step(train, traj, keys)
        jax.block_until_ready(info)

    seconds = median_seconds(update, repeats)
    actor = seeds.program(lambda t: agent.init_actor(t, 16))(train)
    obs = {k: np.zeros((num_seeds, 16, *s.shape), s.dtype) for k, s in WALKER.obs.items()}
    act = seeds.program(lambda t, a, o, f, k: agent.act(t, a, o, f, k, mode="train")[0])
    first = np.zeros((num_seeds, 16), bool)
    act_seconds = median_seconds(lambda: act(train, actor, obs, first, keys).block_until_ready(), 50)
    flops = num_seeds * update_flops(WALKER, model, agent_config, batch, length)
    return {
        "preset": preset,
        "num_seeds": num_seeds,
        "batch": [batch, length],
        "devices": len(seeds.mesh.devices),
        "dtype": model.dtype,
        "params": sum(x.size for x in jax.tree.leaves(train.params)) // num_seeds,
        "train_step_seconds": seconds,
        "gflop_per_step": flops / 1e9,
        "matmul_gflop_per_second": rate / 1e9,
        "fraction_of_matmul_rate": flops / seconds / rate,
        "policy_step_seconds_16_envs": act_seconds,
        "compile_seconds_cold": cold,
        "compile_seconds_cached": warm,
        "step_buffers_mib": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**20,
        "peak_process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_loop(preset: str, num_seeds: int, task: str, iterations: int) -> dict:
    """Frames and updates per second of the whole loop with real environments, all seeds together."""
    use_cpu_devices(num_seeds)
    model, agent_config, loop = configs(preset)

    def make_host(seed, index):
        return envs.make_host(task, seed, loop.action_repeat)

    loop = dataclasses.replace(loop, prefill=max(1, min(loop.prefill, 1024)))
    source = Source(make_host(0, 0).spec, None, make_host)
    length = loop.batch_length + int(agent_config.replay_context)
    clock, seeds = make_clock(loop, 10**6, length), Seeds.make(0, num_seeds)
    agent = make_agent(source.spec, model, agent_config)
    ring = replay.make(20_000, loop.num_envs, loop.batch_size, length, loop.replay_online)
    programs = make_programs(agent, ring, source.spec, None, seeds, loop, clock)
    driver = HostDriver(
        programs, make_pool(source, seeds, loop.num_envs, 0), seeds, loop.num_envs, clock.rows
    )
    keys = seeds.keys()
    state, iteration = programs.init(keys), 0

    def advance():
        nonlocal state, iteration
        state, *_ = driver.advance(state, keys, iteration, iteration >= clock.prefill)
        jax.block_until_ready(state)
        iteration += 1

    while iteration < clock.prefill + 1:
        advance()
    seconds = median_seconds(advance, iterations)
    return {
        "preset": preset,
        "task": task,
        "num_seeds": num_seeds,
        "train_ratio": loop.train_ratio,
        "updates_per_second": num_seeds * clock.updates / seconds,
        "milliseconds_per_update": 1e3 * seconds / clock.updates,
        "frames_per_second": num_seeds * clock.frames / seconds,
    }


def in_subprocess(kind: str, **arguments) -> dict:
    """Runs one case in a fresh process and returns its figures."""
    command = [sys.executable, __file__, "--case", json.dumps({"kind": kind, **arguments})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["size1m", "size12m"], choices=list(DREAMER))
    parser.add_argument("--num-seeds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--loop-presets", nargs="*", default=["s"], help="presets for end-to-end speed")
    parser.add_argument("--task", default="cartpole_swingup", help="environment of the end-to-end runs")
    parser.add_argument("--batch", type=int, nargs=2, default=[16, 64], metavar=("B", "T"))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the median is reported")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case = json.loads(args.case)
        measure = {"step": measure_case, "loop": measure_loop}[case.pop("kind")]
        print(json.dumps(measure(**case)))
        return
    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "train_step": [], "loop": []}
    batch, length = args.batch
    print("preset     seeds  step s  GFLOP  of matmul  policy ms  compile s cold/cached  peak MiB")
    for preset in args.presets:
        for s in args.num_seeds:
            arguments = dict(preset=preset, num_seeds=s, batch=batch, length=length, repeats=args.repeats)
            row = in_subprocess("step", **arguments)
            figures["train_step"].append(row)
            print(
                f"{preset:10} {s:5} {row['train_step_seconds']:7.3f} {row['gflop_per_step']:6.0f} "
                f"{row['fraction_of_matmul_rate']:10.2f} {1e3 * row['policy_step_seconds_16_envs']:10.2f} "
                f"{row['compile_seconds_cold']:13.1f} / {row['compile_seconds_cached']:.1f} "
                f"{row['peak_process_mib']:12.0f}",
                flush=True,
            )
    for preset in args.loop_presets:
        for s in args.num_seeds:
            row = in_subprocess("loop", preset=preset, num_seeds=s, task=args.task, iterations=15)
            figures["loop"].append(row)
            print(
                f"whole loop, {preset}, {args.task}, {s} seeds: {row['milliseconds_per_update']:.1f} ms per "
                f"update of all seeds, {row['frames_per_second']:.0f} frames/s in total",
                flush=True,
            )
    figures["fraction_of_matmul_rate"] = {
        f"{row['preset']}, {row['num_seeds']} seeds": row["fraction_of_matmul_rate"]
        for row in figures["train_step"]
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
