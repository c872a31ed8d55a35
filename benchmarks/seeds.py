"""What more seeds cost in one program, and how time, memory and compilation grow.

    python benchmarks/seeds.py --num-seeds 1 2 4 8 --json seeds.json --markdown seeds.md

Four tables for Dreamer with a preset, on walker_walk's shapes, updates alone:
seeds: time per update of all seeds, its ratio to as many runs one after another, compile time, memory.
growth: one seed with twice and four times the batch, the sequence length, or the horizon.
compile: a program with the updates of one environment step at train ratio 1, and at 64.
Memory is the plan that a run prints, beside what the process took in fact: at its peak while it learned, over
what it had when all was compiled and nothing allocated; and at its peak of all, compiling included, over
what it had before. Each case runs in a process of its own. Times are medians; CPU times, which are means,
change less by other jobs beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from train_step import WALKER, configs, make_agent, wall_seconds

from mbrl import memory
from mbrl.config import override
from mbrl.drivers import Source
from mbrl.presets import DREAMER
from mbrl.programs import make_clock
from mbrl.run_folder import machine, versions
from mbrl.seeds import Seeds, use_cpu_devices
from mbrl.train import Run

UPDATES = 10
"""Updates of a timed call."""
REPLAY = 20_000
"""Rows of replay."""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Taken:
    """What this process takes at its peak from here on, beyond what it has now (Linux)."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what compiling left would be filled first, and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self.before = self._status("VmRSS")

    def mib(self) -> float:
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> float:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1024


def measure(
    preset: str,
    num_seeds: int,
    repeats: int,
    updates: int = UPDATES,
    replay_size: int = REPLAY,
    **changes: int,
) -> dict:
    """Figures of one case. changes: batch_size, batch_length, horizon."""
    use_cpu_devices(num_seeds)
    model, agent_config, loop = configs(preset)
    agent_config = override(agent_config, {k: v for k, v in changes.items() if k == "horizon"})
    loop = override(loop, {k: v for k, v in changes.items() if k != "horizon"} | {"pretrain": updates})
    # One update for an environment's row, so that any batch gives a whole number.
    ratio = loop.batch_size * loop.batch_length / loop.num_envs
    loop = dataclasses.replace(loop, train_ratio=ratio, collect_steps=0, prefill=0, replay_size=replay_size)
    length = loop.batch_length + int(agent_config.replay_context)
    seeds, agent = Seeds.make(0, num_seeds), make_agent(WALKER, model, agent_config)
    run = Run(agent, Source(WALKER), seeds, loop, make_clock(loop, 10**6, length), length)
    programs, keys, least = run.programs(), seeds.keys(), memory.check_memory(run)
    before, began, cpu = peak_mib(), time.perf_counter(), time.process_time()
    step = programs.pretrain.lower(*run.chunk_shapes()[:2]).compile()
    compiling, compiling_cpu = time.perf_counter() - began, time.process_time() - cpu
    planned = memory.program_bytes(step, seeds)
    assert planned is not None, "the compiler does not say what the program takes"
    init, peak = programs.init.lower(keys).compile(), peak_mib()
    planned += memory.process_bytes(init, step, seeds)
    taken = Taken()
    state = jax.block_until_ready(init(keys))
    filled = 0 * state.replay.inserted + run.clock.capacity  # zeros are as good as any data here
    state = state._replace(replay=state.replay._replace(inserted=filled))

    def call():
        nonlocal state
        state, metrics = step(state, keys)
        jax.block_until_ready(metrics)

    def timed() -> float:
        time.sleep(0.01)  # as in a run, the runtime has time to free what the last call had
        return wall_seconds(call)

    call()
    cpu = time.process_time()
    seconds = [timed() for _ in range(repeats)]
    cpu = time.process_time() - cpu
    return {
        "preset": preset,
        "num_seeds": num_seeds,
        "updates": updates,
        **changes,
        "devices": len(memory.own_devices(seeds)),
        "milliseconds_per_update": 1e3 * statistics.median(seconds) / updates,
        "cpu_milliseconds_per_update": 1e3 * cpu / repeats / updates,
        "compile_seconds": compiling,
        "compile_cpu_seconds": compiling_cpu,
        "state_mib": (least.total - least.working) / 2**20,
        "planned_mib": planned / 2**20,
        "taken_mib": taken.mib(),
        "peak_growth_mib": max(peak, taken.before + taken.mib()) - before,
    }


def in_subprocess(**case: Any) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, columns: dict[str, str], rows: list[dict]) -> str:
    """A Markdown table. columns: {heading: format of a row's fields}."""
    lines = [f"{title}\n", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell.format(**row) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


MEASURED = {
    "ms per update": "{milliseconds_per_update:.1f}",
    "CPU ms": "{cpu_milliseconds_per_update:.1f}",
    "compile s": "{compile_seconds:.1f}",
    "state MiB": "{state_mib:.1f}",
    "planned MiB": "{planned_mib:.0f}",
    "taken MiB": "{taken_mib:.0f}",
    "peak of the process MiB": "+{peak_growth_mib:.0f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="s", choices=list(DREAMER))
    parser.add_argument("--num-seeds", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--skip-growth", action="store_true", help="seeds only")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls")
    parser.add_argument("--updates", type=int, default=UPDATES, help="updates of a timed call")
    parser.add_argument("--replay-size", type=int, default=REPLAY, help="rows of replay")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(**json.loads(args.case))))
        return
    common, texts = {"preset": args.preset, "repeats": args.repeats, "replay_size": args.replay_size}, []

    def show(text: str) -> None:
        texts.append(text)
        print(text, flush=True)

    seeds = [in_subprocess(num_seeds=s, updates=args.updates, **common) for s in args.num_seeds]
    one = next((row for row in seeds if row["num_seeds"] == 1), None)
    one = one or in_subprocess(num_seeds=1, updates=args.updates, **common)
    for row in seeds:
        alone = row["num_seeds"] * one["milliseconds_per_update"]
        row["of_runs_alone"] = row["milliseconds_per_update"] / alone
        row["mib_per_seed"] = row["planned_mib"] / row["num_seeds"]
    heads = {"seeds": "{num_seeds}", "devices": "{devices}", "of as many alone": "{of_runs_alone:.2f}"}
    show(table(f"Seeds, {args.preset}", heads | MEASURED | {"MiB per seed": "{mib_per_seed:.0f}"}, seeds))
    growth, compiling = [], []
    if not args.skip_growth:
        _, agent, loop = configs(args.preset)
        base = {"batch_size": loop.batch_size, "batch_length": loop.batch_length, "horizon": agent.horizon}
        for name in base:
            for factor in (1, 2, 4):
                growth.append(in_subprocess(num_seeds=1, **common, **base | {name: factor * base[name]}))
        heads = {"batch": "{batch_size}", "T": "{batch_length}", "H": "{horizon}"}
        show(table(f"Growth, {args.preset}, one seed", heads | MEASURED, growth))
        compiling = [in_subprocess(num_seeds=1, **common, updates=u) for u in (1, 64)]
        heads = {"updates in the program": "{updates}", "compile s": "{compile_seconds:.1f}"}
        heads |= {"compile, CPU s": "{compile_cpu_seconds:.1f}"}
        show(table(f"Compile time, {args.preset}", heads, compiling))
    if args.markdown:
        args.markdown.write_text("\n".join(texts))
    if args.json:
        figures = {"machine": machine(), "versions": versions(), "seeds": seeds, "growth": growth}
        args.json.write_text(json.dumps(figures | {"compile": compiling}, indent=2) + "\n")


if __name__ == "__main__":
    main()
