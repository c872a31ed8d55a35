"""What a run will need on its devices, said and checked before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from mbrl.errors import UserError
from mbrl.programs import Programs, RunState
from mbrl.seeds import Seeds
from mbrl.train import Run

GIB, MIB = 2**30, 2**20
PROCESS = 20 * MIB
"""What a process on a CPU takes beside arrays once it learns: code of libraries that it had not run before
5 MiB, stacks of threads 4 MiB, objects of Python and of the runtime and holes in heaps 5 to 16 MiB
(docs/performance.md)."""
LIBRARY = 0.09
"""What the matrix library on a CPU holds within its fused products, as a share of a program's temporary
arrays: the compiler does not count it. Measured: 1 to 12 %."""
PLACES = {"host": "in the memory of the host", "disk": "in a file of the run folder"}


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
    return host_bytes()


def host_bytes() -> int | None:
    """Memory of this machine that is free, or None where it is not known."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


class Plan(NamedTuple):
    """Bytes on the devices of this process. replay, learner (networks, optimiser), acting (environments,
    latent states): what stays. working: what a program has beside it while it learns, activations, gradients
    and copies. process: what a CPU's process takes beside all arrays (`process_bytes`)."""

    replay: int
    learner: int
    acting: int
    working: int
    process: int = 0

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
    if run.beside:
        program, arguments = programs.step, run.step_shapes()
    compiled = program.lower(*arguments).compile()
    whole = program_bytes(compiled, run.seeds)
    if whole is None:
        return least
    init = programs.init.lower(run.seeds.keys()).compile()
    working = whole - sum(least) + least.working
    return least._replace(working=working, process=process_bytes(init, compiled, run.seeds))


def program_bytes(compiled: Any, seeds: Seeds) -> int | None:
    """What a compiled program takes on the devices of this process, its arguments and results included; None
    where the compiler does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    beside = found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    return (found.argument_size_in_bytes + beside) * len(own_devices(seeds))


def process_bytes(init: Any, learn: Any, seeds: Seeds) -> int:
    """What the process takes beside the arrays of the compiled program that learns, where its device is a
    CPU: also the temporary arrays of the program that made the state, because freed memory is kept."""
    devices = own_devices(seeds)
    if devices[0].platform != "cpu":
        return 0
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (init, learn)]
    return PROCESS + round(len(devices) * (temporary[0] + LIBRARY * temporary[1]))


def own_devices(seeds: Seeds) -> list[Any]:
    """The devices of the run that belong to this process."""
    return [d for d in seeds.mesh.devices.flat if d.process_index == jax.process_index()]


def image_bytes(run: Run) -> int:
    """Of replay that does not lie on the device."""
    row = len(run.seeds) * run.clock.capacity * run.config.num_envs
    return row * sum(entry.size for entry in run.beside.values())


def place_images(run: Run) -> Run:
    """The run with the images of its replay where ``loop.replay_place`` says: by default on the device where
    the least that the run needs is at most half of what is free there, else with the host where they are,
    else on disk. UserError where they cannot be where they should."""
    asked, elsewhere = run.config.replay_place, dataclasses.replace(run, place="host")
    bound = _why_on_device(elsewhere)
    if asked == "device" or (asked == "auto" and bound):
        return run
    if bound:
        raise UserError(f"loop.replay_place is {asked}, but {bound}: it must be device or auto")
    if asked != "auto":
        return dataclasses.replace(run, place=asked)
    devices = own_devices(run.seeds)
    least, available = plan(run.shapes, len(devices) / run.seeds.shards), available_bytes(devices)
    if available is None or 2 * least.total <= available:
        return run
    free = host_bytes()
    return dataclasses.replace(run, place="host" if free and 2 * image_bytes(elsewhere) <= free else "disk")


def _why_on_device(run: Run) -> str | None:
    """What binds the images of replay to the device, None where nothing does."""
    if not run.beside:
        return f"{run.source.spec.name} shows no images"
    if run.source.env is not None and run.clock.rows:
        return f"{run.source.spec.name} is part of the compiled program, and so is its replay"
    if jax.process_count() > 1:
        return "the run has several processes"
    return f"data_parallel is {run.seeds.data}" if run.seeds.data > 1 else None


def check_memory(run: Run) -> Plan:
    """The least that a run needs; UserError when it cannot fit. Nothing is allocated or compiled."""
    devices = own_devices(run.seeds)
    least = plan(run.shapes, len(devices) / run.seeds.shards)
    _check_fits(least, available_bytes(devices))
    taken = least.total if devices[0].platform == "cpu" else 0  # of the same memory
    images, free = image_bytes(run), host_bytes()
    if run.place == "host" and free is not None and images + taken > free:
        raise UserError(
            f"the images of replay need {_size(images)} of the host's memory, of which {_size(free)} are free"
            f"{f' and the rest of the run needs {_size(taken)}' if taken else ''}: lower loop.replay_size or "
            "num_seeds, or set loop.replay_place to disk"
        )
    return least


def compile_and_check(run: Run, programs: Programs, least: Plan, say: Callable[[str], None]) -> None:
    """Compiles the program that learns and says what the run will take; UserError when it cannot fit. Nothing
    is allocated."""
    if jax.config.values["jax_disable_jit"]:
        return
    available, whole = available_bytes(own_devices(run.seeds)), compiled_plan(run, programs, least)
    if run.beside:
        say(f"memory: {_size(image_bytes(run))} of images in replay, {PLACES[run.place]}")
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
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
