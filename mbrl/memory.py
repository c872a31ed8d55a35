"""What a run will need on its devices, said and checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mbrl.errors import UserError
from mbrl.programs import RunState

GIB = 2**30


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays, abstract ones included."""

    def size(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return x.size * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def available_bytes() -> int | None:
    """Memory that the devices of this process offer together, or None where it is not known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(s and "bytes_limit" in s for s in stats):
        return sum(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def plan(state: RunState) -> dict[str, int]:
    """Bytes by purpose, over all seeds. An update keeps the old and the new learner until it is accepted,
    and gradients beside them."""
    learner = num_bytes(state.train)
    gradients = num_bytes(getattr(state.train, "params", state.train))
    return {
        "replay": num_bytes(state.replay),
        "learner": learner,
        "update (copy and gradients)": learner + gradients,
        "acting": num_bytes((state.actor, state.env)),
    }


def check_memory(state: RunState, say: Callable[[str], None]) -> None:
    """Prints the plan of an abstract state with seed axis; UserError when it cannot fit."""
    parts, available = plan(state), available_bytes()
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
            + ("loop.replay_size, num_seeds" if name == "replay" else "num_seeds or the preset")
        )


def _size(count: int) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
