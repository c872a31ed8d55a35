"""What a run will need on its devices, said and checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from mbrl.errors import UserError
from mbrl.programs import Programs, RunState
from mbrl.seeds import Seeds
from mbrl.train import Run

GIB = 2**30


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays, abstract ones included."""

    def size(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return x.size * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def available_bytes(devices: Iterable[Any]) -> int | None:
    """Memory that the devices offer together, or None where it is not known."""
    stats = [device.memory_stats() for device in devices]
    if all(s and "bytes_limit" in s for s in stats):
        return sum(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


class Plan(NamedTuple):
    """Bytes on the devices of this process. replay, learner (networks, optimiser), acting (environments,
    latent states): what stays. working: what a program has beside it while it learns, activations, gradients
    and copies."""

    replay: int
    learner: int
    acting: int
    working: int

    @property
    def total(self) -> int:
        return sum(self)


def plan(state: RunState, share: float) -> Plan:
    """The least that a run with this state [S, ...] needs; ``share`` of it is in this process. An update
    keeps the old and the new learner until it is accepted, and gradients beside them."""
    learner, gradients = num_bytes(state.train), num_bytes(getattr(state.train, "params", state.train))
    acting = num_bytes((state.actor, state.env, state.health))
    sizes = num_bytes(state.replay), learner, acting, learner + gradients
    return Plan(*(round(share * size) for size in sizes))


def compiled_plan(run: Run, programs: Programs, least: Plan) -> Plan:
    """The plan with what the compiler says that learning takes. What is compiled for it is what the run will
    call, so that it is compiled once."""
    if not run.clock.rows:
        program, arguments = programs.update, run.chunk_shapes()
    elif run.source.env is not None:
        program, arguments = programs.chunk, run.chunk_shapes()
    else:
        program, arguments = programs.learn, run.learn_shapes()
    whole = program_bytes(program.lower(*arguments).compile(), run.seeds)
    return least if whole is None else least._replace(working=whole - sum(least) + least.working)


def program_bytes(compiled: Any, seeds: Seeds) -> int | None:
    """What a compiled program takes on the devices of this process, its arguments and results included; None
    where the compiler does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    beside = found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    return (found.argument_size_in_bytes + beside) * len(own_devices(seeds))


def own_devices(seeds: Seeds) -> list[Any]:
    """The devices of the run that belong to this process."""
    return [d for d in seeds.mesh.devices.flat if d.process_index == jax.process_index()]


def check_memory(run: Run) -> Plan:
    """The least that a run needs; UserError when it cannot fit. Nothing is allocated or compiled."""
    devices = own_devices(run.seeds)
    least = plan(run.shapes, len(devices) / run.seeds.shards)
    _check_fits(least, available_bytes(devices))
    return least


def compile_and_check(run: Run, programs: Programs, least: Plan, say: Callable[[str], None]) -> None:
    """Compiles the program that learns and says what the run will take; UserError when it cannot fit. Nothing
    is allocated."""
    if jax.config.values["jax_disable_jit"]:
        return
    available, whole = available_bytes(own_devices(run.seeds)), compiled_plan(run, programs, least)
    text = ", ".join(f"{name} {_size(size)}" for name, size in whole._asdict().items())
    say(f"memory: {_size(whole.total)} ({text})" + (f" of {_size(available)}" if available else ""))
    _check_fits(whole, available)


def _check_fits(plan: Plan, available: int | None) -> None:
    if available is None or plan.total <= available:
        return
    name, size = max(plan._asdict().items(), key=lambda item: item[1])
    lower = {
        "replay": "loop.replay_size or num_seeds",
        "working": "num_seeds, the preset, loop.batch_size or loop.batch_length",
    }
    raise UserError(
        f"the run needs {_size(plan.total)} of memory but {_size(available)} are free; the largest part is "
        f"{name} with {_size(size)}: lower {lower.get(name, 'num_seeds or the preset')}"
    )


def _size(count: int) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
