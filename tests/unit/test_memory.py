"""The memory plan: what it says is what the run takes, and too much is refused before anything is allocated."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mbrl import experiment, memory
from mbrl.drivers import DeviceDriver, HostDriver, Source, make_pool
from mbrl.envs import make_host
from mbrl.errors import UserError
from mbrl.seeds import Seeds
from mbrl.types import ArraySpec
from tests.helpers import TINY, script
from tests.mesh import ENV, make_run

HOST = Source(ENV.spec, None, lambda seed, index: make_host("gym:Pendulum-v1", seed, 1))


def bytes_since(before: list) -> int:
    """Of the arrays that are alive now and are not among ``before``, which earlier tests left behind."""
    gc.collect()
    known = {id(array) for array in before}
    new = (array for array in jax.live_arrays() if id(array) not in known)
    return sum(shard.data.nbytes for array in new for shard in array.addressable_shards)


def run_on(where: str):
    seeds = Seeds.make(0, 2)
    if where == "device":
        run = make_run(seeds)
        return run, run.programs(), lambda programs: DeviceDriver(programs, 1)
    pytest.importorskip("gymnasium")
    spec = make_host("gym:Pendulum-v1", 0, 1).spec
    source = Source(spec, None, HOST.make_host)
    run = make_run(seeds, source)
    pool = make_pool(source, seeds, run.config.num_envs, 0)
    make = lambda programs: HostDriver(programs, pool, seeds, run.config.num_envs, run.clock.rows)
    return run, run.programs(), make


@pytest.mark.parametrize("where", ["device", "host"])
def test_the_plan_is_what_is_allocated(where, caplog):
    """Within a tenth: the buffers that are alive after an iteration, and what the compiler gives the program
    beside them. The program that was compiled for the plan is the one that runs."""
    run, programs, make_driver = run_on(where)
    least = memory.check_memory(run)
    before, said = jax.live_arrays(), []
    memory.compile_and_check(run, programs, least, said.append)
    plan = memory.compiled_plan(run, programs, least)
    assert said and f"{plan.total / 2**20:.1f} MiB" in said[0]
    arrays = plan.total - plan.process
    keys, driver = run.seeds.keys(), make_driver(programs)
    state = programs.init(keys)
    assert abs(arrays - plan.working - bytes_since(before)) < 0.1 * arrays
    for i in range(run.clock.prefill):
        state, *_ = driver.advance(state, keys, i, learning=False)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, *_ = driver.advance(state, keys, run.clock.prefill, learning=True)
    name = "chunk" if where == "device" else "learn"
    assert getattr(programs, name)._cache_size() == 1
    assert not [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    program = programs.chunk if where == "device" else programs.learn
    shapes = run.chunk_shapes() if where == "device" else run.learn_shapes()
    found = program.lower(*shapes).compile().memory_analysis()
    alive = bytes_since(before)
    assert arrays == pytest.approx(alive + 2 * found.temp_size_in_bytes, rel=0.1)
    assert plan.process >= memory.PROCESS


def test_too_much_is_refused_before_anything_is_allocated():
    """Ten times the memory of this machine, as replay: one sentence, no new buffer, nothing compiled."""
    run = make_run(Seeds.make(0, 2))
    available = memory.available_bytes(memory.own_devices(run.seeds))
    assert available is not None
    row = memory.num_bytes(run.shapes.replay.data) // run.clock.capacity
    clock = run.clock._replace(capacity=10 * available // row)
    before = jax.live_arrays()
    with pytest.raises(UserError, match="the largest part is replay with"):
        memory.check_memory(dataclasses.replace(run, clock=clock))
    assert not bytes_since(before)


def test_what_does_not_fit_leaves_no_folder(tmp_path, monkeypatch):
    """The same where only the compiled program says so."""

    def refuse(*_):
        raise UserError("too much")

    monkeypatch.setattr(experiment, "compile_and_check", refuse)
    with pytest.raises(UserError, match="too much"):
        script("dreamer_dmc")([*TINY, "--run-dir", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


def pictures(seeds: Seeds):
    """A run on the host that sees pictures; their bytes."""
    spec = dataclasses.replace(ENV.spec, obs=ENV.spec.obs | {"image": ArraySpec((16, 16, 3), "uint8")})
    run = make_run(seeds, Source(spec, None, HOST.make_host))
    return run, len(seeds) * run.clock.capacity * run.config.num_envs * 16 * 16 * 3


def test_images_lie_where_there_is_room(monkeypatch):
    """On the device where the whole run takes half of it at most, else with the host likewise, else on disk. The
    plan counts them where they lie."""
    run, size = pictures(Seeds.make(0, 2))
    whole = memory.check_memory(run)

    def place(device: int | None, host: int) -> str:
        monkeypatch.setattr(memory, "available_bytes", lambda devices: device)
        monkeypatch.setattr(memory, "host_bytes", lambda: host)
        return memory.place_images(run).place

    assert place(2 * whole.total, 0) == "device" and place(None, 0) == "device"
    assert place(2 * whole.total - 1, 2 * size) == "host"
    assert place(2 * whole.total - 1, 2 * size - 1) == "disk"
    place(10**9, size)  # less than the host needs for them and, being a CPU, for the rest
    elsewhere = dataclasses.replace(run, place="host")
    with pytest.raises(UserError, match=r"of the host's memory.*set loop.replay_place to disk"):
        memory.check_memory(elsewhere)
    place(10**9, 10**9)
    rest = memory.check_memory(elsewhere)
    assert memory.image_bytes(elsewhere) == size == whole.replay - rest.replay
    assert memory.image_bytes(run) == 0


def test_images_that_cannot_lie_elsewhere(monkeypatch):
    """One sentence each; what the environment is, the bad configurations have."""

    def ask(run, place):
        return memory.place_images(
            dataclasses.replace(run, config=dataclasses.replace(run.config, replay_place=place))
        )

    split, _ = pictures(Seeds.make(0, 1, 2))
    with pytest.raises(UserError, match=r"^loop\.replay_place is host, but data_parallel is 2: it must be"):
        ask(split, "host")
    assert ask(split, "auto").place == "device"
    run, _ = pictures(Seeds.make(0, 1))
    assert [ask(run, place).place for place in ("device", "host", "disk")] == ["device", "host", "disk"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^loop\.replay_place is disk, but the run has several processes"):
        ask(run, "disk")


def test_a_split_batch_needs_the_networks_on_each_device():
    """Two devices for one seed hold it twice."""
    one, two = (memory.check_memory(make_run(Seeds.make(0, 1, data))) for data in (1, 2))
    assert two == tuple(2 * np.array(one))


@pytest.mark.slow
def test_a_process_takes_what_is_planned():
    """Resident memory of a process that updates preset s, within a tenth of the plan; the median of three, as now
    and then one takes its temporary arrays twice (docs/performance.md)."""
    root = Path(__file__).parents[2]
    case = json.dumps({"preset": "s", "num_seeds": 1, "repeats": 1, "replay_size": 200_000})
    command = [sys.executable, root / "benchmarks" / "seeds.py", "--case", case]
    ratios, env = [], {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as runs have
    for _ in range(3):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratios.append(found["taken_mib"] / found["planned_mib"])
    assert statistics.median(ratios) == pytest.approx(1, rel=0.1), ratios


def test_memory_that_programs_free_is_kept():
    """Calls whose temporary array takes 64 MiB come to use pages that the system need not clear first. The first
    calls may each take new ones: small arrays come to lie in what the one before has freed."""
    code = """
import resource, statistics
from mbrl.seeds import use_cpu_devices
use_cpu_devices(1)
import jax
x = jax.numpy.ones((4096, 4096))
call = jax.jit(lambda x: jax.numpy.sin(x) @ x[0])
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(30):
    call(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(b - a for a, b in zip(faults[20:], faults[21:])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2000  # 16384 pages of 4 KiB are 64 MiB
