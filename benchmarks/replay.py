"""What images cost on their way from replay to the device, and from environments to replay.

    python benchmarks/replay.py --preset s_pixels --place host device --workers 0 2
    python benchmarks/replay.py --preset size12m --place host disk --rounds 0   # the first table alone

What preparing a batch costs the thread that does it: CPU time, and the shortest wall time of 49. Then, for
each place of the images, with observations made in advance: the seconds of an update; those for which the
device had no batch to learn from, as a share of both ("waits"); and the bytes of one batch. Between two
updates of a burst it waits from the end of one until the next one's batch is there; before a burst, from the
moment when the rows are collected. Then for each number of workers, with the real environment: the seconds of
an iteration beside those of its parts alone, collecting and updating; "hidden" is how much of the shorter one
the two together save. Cases take turns; medians over rounds.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import override
from mbrl.drivers import HostDriver, Source, make_source, make_workers
from mbrl.envs.pixels import CameraConfig
from mbrl.memory import num_bytes
from mbrl.presets import DREAMER
from mbrl.programs import UPDATE, LoopConfig, make_clock
from mbrl.seeds import Seeds, use_compilation_cache
from mbrl.train import Run
from mbrl.types import TimeStep
from world_models import rssm
from world_models.rssm import RSSMConfig


def make_run(source: Source, preset: str, steps: int, **loop: Any) -> Run:
    """Dreamer with an RSSM, as the preset has it, with as little prefill as there can be."""
    values = DREAMER[preset]
    model = override(RSSMConfig(), values["model"] | values["rssm"])
    config = override(DreamerConfig(), values["agent"] | {"optimiser": values["optimiser"]})
    loop_config = override(LoopConfig(), values["loop"] | {"prefill": 1, "action_repeat": 2} | loop)
    length = loop_config.batch_length + config.replay_context
    clock = make_clock(loop_config, steps, length)
    made = rssm.make(model, source.spec)
    agent = dreamer.make(config, source.spec, made, model.discount, clock.total_updates)
    return Run(agent, source, Seeds.make(0, 1), loop_config, clock, length)


class Canned:
    """Environments that cost nothing: always the same random observations."""

    def __init__(self, spec, size: int):
        rng = np.random.default_rng(0)
        obs = {k: rng.integers(0, 256, (size, *a.shape)).astype(a.dtype) for k, a in spec.obs.items()}
        no = np.zeros(size, bool)
        self.spec, self.size, self.faults = spec, size, np.zeros(size, int)
        self.timestep = TimeStep(obs, np.zeros(size, np.float32), no, no)

    def send(self, actions, reset_mask) -> None: ...

    def receive(self) -> TimeStep:
        return jax.tree.map(np.copy, self.timestep)


class Watch:
    """When a program began and when its result was there, by call; in a thread, so that nothing waits."""

    def __init__(self):
        self.calls: list[list[float]] = []
        self._results: queue.Queue = queue.Queue()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        while True:
            metrics, call = self._results.get()
            jax.block_until_ready(metrics)
            call.append(time.perf_counter())
            self._results.task_done()

    def __call__(self, program):
        def watched(*args):
            call = [time.perf_counter()]
            state, metrics = program(*args)
            self.calls.append(call)
            self._results.put((metrics, call))
            return state, metrics

        return watched

    def take(self) -> list[list[float]]:
        self._results.join()
        calls, self.calls = self.calls, []
        return calls


class Case:
    """A run that goes on iteration by iteration. watch: of single updates, where these are programs."""

    def __init__(self, run: Run, programs, pool, folder: Path):
        self.run, self.made, self.watch, self.began, self.iteration = run, programs, Watch(), 0.0, 0
        images = run.host_replay(folder)
        if images is not None:
            programs = images.programs(programs._replace(step=self.watch(programs.step)))
        else:
            programs = programs._replace(learn=self.watch(programs.learn))
        learn = programs.learn

        def noted(*args):
            self.began = time.perf_counter()  # all rows are collected
            return learn(*args)

        self.driver = HostDriver(
            programs._replace(learn=noted), pool, run.seeds, run.config.num_envs, run.clock.rows
        )
        self.keys = run.seeds.keys()
        self.state = programs.init(self.keys)

    def advance(self) -> float:
        """Seconds of an iteration."""
        began, learning = time.perf_counter(), self.iteration >= self.run.clock.prefill
        self.state, *_ = self.driver.advance(self.state, self.keys, self.iteration, learning)
        jax.block_until_ready(self.state)
        self.iteration += 1
        return time.perf_counter() - began

    def warm_up(self) -> None:
        while self.iteration < self.run.clock.prefill + 2:
            self.advance()
        self.watch.take()

    def updates(self) -> tuple[float, float]:
        """(seconds in which the device learned, seconds in which it waited for data) of one iteration."""
        self.advance()
        free, busy, waited = self.began, 0.0, 0.0
        for called, done in self.watch.take():
            waited += max(0.0, called - free)
            busy, free = busy + done - max(called, free), done
        return busy, waited


def preparing(run: Run, folder: Path) -> tuple[float, float]:
    """(median CPU, shortest wall) seconds of the thread for a batch from a full ring of random bytes."""
    images = run.host_replay(folder)
    assert images is not None
    rng = np.random.default_rng(0)
    for ring in images.images.values():
        for row in range(ring.shape[1]):
            ring[:, row] = rng.integers(0, 256, (1, *ring.shape[2:]), np.uint8)
    images.inserted, images.served = run.clock.capacity, 10**6  # no sequence is fresh
    burst = images._begin(UPDATE, 0, 50, 0)

    def timed(number: int) -> tuple[float, float]:
        cpu, wall = time.thread_time(), time.perf_counter()
        images._batch(burst, images.inserted, number)
        return time.thread_time() - cpu, time.perf_counter() - wall

    cpu, wall = zip(*(images._thread.submit(timed, number).result() for number in range(1, 50)))
    return median(cpu), min(wall)


def collecting(pool, run: Run, rounds: int) -> float:
    """Seconds in which the environments make the rows of an iteration, with nothing beside."""
    rng, seconds = np.random.default_rng(0), []
    last = np.ones(pool.size, bool)
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(run.clock.rows):
            pool.send(rng.uniform(-1, 1, (pool.size, run.source.spec.action.size)).astype(np.float32), last)
            last = pool.receive().is_last
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="s_pixels", choices=list(DREAMER))
    parser.add_argument("--task", default="cartpole_swingup", help="of dm_control")
    parser.add_argument("--size", type=int, default=64, help="side of the picture")
    parser.add_argument("--place", nargs="+", default=["host"], choices=["device", "host", "disk"])
    parser.add_argument("--workers", nargs="*", type=int, default=[], help="processes that render")
    parser.add_argument("--collect-steps", type=int, help="in place of the preset's")
    parser.add_argument("--rounds", type=int, default=10, help="0 only prepares batches")
    options = parser.parse_args()
    use_compilation_cache()
    source = make_source(options.task, 2, "pixels", CameraConfig(options.size))
    loop = {} if options.collect_steps is None else {"collect_steps": options.collect_steps}
    run = make_run(source, options.preset, 100_000, replay_size=20_000, **loop)
    batch = {k: (run.config.batch_size, run.length, *a.shape) for k, a in source.spec.obs.items()}
    frame = sum(a.size for a in source.spec.obs.values())
    sent = sum(int(np.prod(shape)) for shape in batch.values())
    print(
        f"{options.preset}, {source.spec.name}: a batch of {sent / 2**20:.2f} MiB of uint8 for each of "
        f"{run.clock.updates} updates per {run.clock.rows} steps of {run.config.num_envs} environments "
        f"({run.config.num_envs * frame / 2**20:.2f} MiB of pictures a step, for acting)",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        print("| images | preparing a batch, CPU ms | shortest, wall ms |\n|---|---|---|")
        for place in [name for name in options.place if name != "device"]:
            cpu, wall = preparing(replace(run, place=place), Path(folder))
            print(f"| {place} | {1e3 * cpu:.1f} | {1e3 * wall:.1f} |", flush=True)
        if not options.rounds:
            return
        size, canned = run.config.num_envs, {}
        for place in options.place:
            placed = replace(run, place=place)
            canned[place] = Case(placed, placed.programs(), Canned(source.spec, size), Path(folder))
            canned[place].warm_up()
        found: dict[str, list[tuple[float, float]]] = {place: [] for place in canned}
        for _ in range(options.rounds):
            for place, case in canned.items():
                found[place].append(case.updates())
        print("| images | state on the device, MiB | ms per update | waits, ms | share |")
        print("|---|---|---|---|---|")
        for place, times in found.items():
            busy, waited = (median(x) / run.clock.updates * 1e3 for x in zip(*times))
            share = f"{waited:.2f} | {100 * waited / (busy + waited):.1f} %" if place != "device" else " | "
            size_on_device = num_bytes(canned[place].state) / 2**20
            print(f"| {place} | {size_on_device:.0f} | {busy:.1f} | {share} |", flush=True)
        if options.workers:
            overlap(run, canned[options.place[0]], options, Path(folder))


def overlap(run: Run, canned: Case, options, folder: Path) -> None:
    """How much of rendering the updates hide."""
    place = options.place[0]
    pools, cases, alone = {}, {}, {}
    for workers in options.workers:
        config = replace(run.config, env_workers=workers)
        pools[workers] = make_workers(run.source, run.seeds, run.config.num_envs, 0, config)
        alone[workers] = collecting(pools[workers], run, options.rounds)
        placed = replace(run, place=place)
        cases[workers] = Case(placed, canned.made, pools[workers], folder)
        cases[workers].warm_up()
    times: dict[Any, list[float]] = {name: [] for name in ("updates", *cases)}
    for _ in range(options.rounds):
        times["updates"].append(canned.advance())
        for workers, case in cases.items():
            times[workers].append(case.advance())
    updates = median(times["updates"])
    print("| workers | collecting alone, ms | updating alone, ms | both, ms | hidden |")
    print("|---|---|---|---|---|")
    for workers in cases:
        both, collect = median(times[workers]), alone[workers]
        hidden = (collect + updates - both) / min(collect, updates)
        row = f"{1e3 * collect:.0f} | {1e3 * updates:.0f} | {1e3 * both:.0f} | {100 * hidden:.0f} %"
        print(f"| {workers} | {row} |", flush=True)


if __name__ == "__main__":
    main()
