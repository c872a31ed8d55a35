"""What a run will need on its devices, said and checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from mbrl.errors import UserError
from mbrl.programs import RunState
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


def plan(state: RunState, copies: bool) -> dict[str, int]:
    """Bytes by purpose, over all seeds. An update keeps the old and the new learner until it is accepted,
    and gradients beside them. copies: seeds take turns on a device, which copies what they hold."""
    learner = num_bytes(state.train)
    gradients = num_bytes(getattr(state.train, "params", state.train))
    return {
        "replay": num_bytes(state.replay) * (2 if copies else 1),
        "learner": learner,
        "update (copy and gradients)": learner + gradients,
        "acting": num_bytes((state.actor, state.env)),
    }


def check_memory(run: Run, say: Callable[[str], None]) -> None:
    """Says what a run will take, before anything is allocated; UserError when it cannot fit."""
    seeds = run.seeds
    copies = seeds.loop and len(seeds) > seeds.shards
    devices = [d for d in seeds.mesh.devices.flat if d.process_index == jax.process_index()]
    share = len(devices) / seeds.shards  # of the seeds in this process, on each of the devices they span
    parts = {name: round(share * size) for name, size in plan(run.shapes(), copies).items()}
    available = available_bytes(devices)
    total = sum(parts.values())
    text = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    say(
        f"memory: {_size(total)} before activations ({text})"
        + (f" of {_size(available)}" if available else "")
    )
    if available is not None and total > available:
        name = max(parts, key=lambda k: parts[k])
        raise UserError(
            f"the run needs {_size(total)} of memory but {_size(available)} are free; the largest part is "
            f"{name} with {_size(parts[name])}: lower "
            + ("loop.replay_size or num_seeds" if name == "replay" else "num_seeds or the preset")
        )


def _size(count: int) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
