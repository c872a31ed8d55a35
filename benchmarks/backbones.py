"""What each world model costs, at equal width, over sequence lengths.

    python benchmarks/backbones.py --lengths 64 256 1024 --repeats 9 --json backbones.json

For each model and length T: time of `observe` forward and backward on a batch of sequences, time of
imagination from every posterior of them, compile times without cache, and memory that the compiled program
asks for. Times are medians; calls of the models alternate, and a ratio is the median of the ratios to rssm in
the same round, so that a busy machine distorts them less. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_step import WALKER, wall_seconds

import world_models
from mbrl.config import config_type, load_factory, override
from mbrl.imagination import rollout
from mbrl.run_folder import machine, versions
from mbrl.types import Trajectory, WorldModel


def fields(name: str, width: int, window: int) -> dict[str, Any]:
    """Config of a model at a width: two layers where it has layers, the same latents and networks for all."""
    shared = dict(stoch=16, classes=16, units=width, hidden=width, prior_layers=1)
    shared |= dict(encoder_layers=1, decoder_layers=1, bins=63)
    stack = dict(width=width, layers=2)
    ssm = stack | dict(ssm_size=width // 2, ssm_blocks=4)
    own = {
        "rssm": dict(deter=width, blocks=1),
        "s4wm": ssm,
        "r2i": ssm | dict(deter=width),
        "transformer": stack | dict(heads=4, window=window),
        "koopman": dict(width=width, modes=width),
    }
    return shared | own[name]


def make_trajectory(length: int, batch: int) -> Trajectory:
    """Random rows; each sequence begins an episode."""
    rng, lead = np.random.default_rng(0), (length, batch)
    obs = {k: rng.normal(size=(*lead, *s.shape)).astype(np.float32) for k, s in WALKER.obs.items()}
    action = rng.uniform(-1, 1, (*lead, WALKER.action.size)).astype(np.float32)
    reward = rng.normal(size=lead).astype(np.float32)
    first, last, terminal = np.zeros((3, *lead), bool)
    first[0] = True
    return jax.tree.map(jnp.asarray, Trajectory(obs, action, reward, first, last, terminal))


def programs(model: WorldModel, batch: int, horizon: int):
    """observe with its gradient, and imagination from what it returns."""

    def loss(params, traj, keys):
        seen = model.observe(params, model.init_state(params, batch), traj, keys)
        return sum(x.mean() for x in seen.losses.values()), seen.starts

    def imagine(params, starts, key):
        policy = lambda features, key, t: jnp.tanh(features[..., : WALKER.action.size]).astype(jnp.float32)
        return rollout(model, params, starts, policy, key, horizon)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(imagine)


def compiled(function, *args) -> tuple[Any, float, float]:
    """The compiled function, seconds it took, and MiB of its temporary and output buffers."""
    lowered, began = function.lower(*args), time.perf_counter()
    made = lowered.compile()
    took, memory = time.perf_counter() - began, made.memory_analysis()
    return made, took, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def prepare(name: str, length: int, args: argparse.Namespace) -> tuple[dict, dict]:
    """Compiles one model at one length: what was measured on the way, and the two calls to time."""
    factory = load_factory("--models", name, world_models.REGISTRY)
    config = override(config_type(factory)(), fields(name, args.width, args.window) | {"dtype": args.dtype})
    if hasattr(config, "scan_impl"):
        config = override(config, {"scan_impl": args.scan_impl})
    model = factory(config, WALKER)
    params = jax.jit(model.init)(jax.random.key(0))
    data = params, make_trajectory(length, args.batch), jax.random.split(jax.random.key(1), length)
    observe, imagine = programs(model, args.batch, args.horizon)
    observe, observe_compile, observe_memory = compiled(observe, *data)
    (_, starts), _ = observe(*data)
    given = params, starts, jax.random.key(2)
    imagine, imagine_compile, imagine_memory = compiled(imagine, *given)
    row = {
        "model": name,
        "T": length,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "observe_compile_seconds": observe_compile,
        "imagine_compile_seconds": imagine_compile,
        "observe_mib": observe_memory,
        "imagine_mib": imagine_memory,
    }
    calls = {
        "observe": lambda: jax.block_until_ready(observe(*data)),
        "imagine": lambda: jax.block_until_ready(imagine(*given)),
    }
    return row, calls


def measure(length: int, args: argparse.Namespace) -> list[dict]:
    """One row per model at one length."""
    cases = [prepare(name, length, args) for name in args.models]
    for what in ("observe", "imagine"):
        for _, calls in cases:
            calls[what]()
        rounds = [[wall_seconds(calls[what]) for _, calls in cases] for _ in range(args.repeats)]
        for i, (row, _) in enumerate(cases):
            row[f"{what}_seconds"] = median(times[i] for times in rounds)
            row[f"{what}_of_rssm"] = median(times[i] / times[0] for times in rounds)
    return [row for row, _ in cases]


HEAD = "| model | T | observe ms | of rssm | imagine ms | of rssm | compile s | observe MiB | imagine MiB |"


def line(row: dict) -> str:
    cells = [row["model"], str(row["T"])]
    for what in ("observe", "imagine"):
        cells += [f"{1e3 * row[f'{what}_seconds']:.1f}", f"{row[f'{what}_of_rssm']:.2f}"]
    cells += [f"{row['observe_compile_seconds']:.1f} + {row['imagine_compile_seconds']:.1f}"]
    cells += [f"{row[f'{what}_mib']:.0f}" for what in ("observe", "imagine")]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["rssm", "s4wm", "r2i", "transformer", "koopman"]
    parser.add_argument("--models", nargs="+", default=names, choices=names, help="besides rssm")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024], metavar="T")
    parser.add_argument("--batch", type=int, default=4, help="sequences (B); imagination starts from T x B")
    parser.add_argument("--width", type=int, default=128, help="width of every model and network")
    parser.add_argument("--window", type=int, default=64, help="steps that the transformer attends to")
    parser.add_argument("--horizon", type=int, default=15, help="imagined steps (H)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; medians are reported")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--scan-impl", default="auto", choices=["auto", "associative", "sequential"])
    parser.add_argument("--machine", help="name of the machine; else its CPU and device as found")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    args.models = ["rssm", *(name for name in args.models if name != "rssm")]
    jax.config.update("jax_enable_compilation_cache", False)
    found = machine()
    name = args.machine or f"{found['cpu']}, {found['cores']} cores, {', '.join(found['devices'])}"
    print(f"{name}; width {args.width}, batch {args.batch}, window {args.window}, {args.dtype}\n", flush=True)
    print(HEAD, "|" + "---|" * HEAD.count(" |"), sep="\n")
    rows = []
    for length in args.lengths:
        rows += measure(length, args)
        print(*(line(row) for row in rows[-len(args.models) :]), sep="\n", flush=True)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        with open(args.json, "w") as file:
            figures = {"machine": found, "versions": versions(), "settings": settings, "rows": rows}
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
