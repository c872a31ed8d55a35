"""N seeds as one program: functions are written for one seed, this adds the axis and spreads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mbrl.errors import UserError, check_between


def use_cpu_devices(num_seeds: int) -> None:
    """One virtual CPU device per core, as many as divide the seeds, so that seeds use all cores.

    Call before the first JAX operation. Without effect on accelerators. An explicit XLA_FLAGS
    --xla_force_host_platform_device_count wins.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", _divisor(num_seeds, cores))


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk (JAX_COMPILATION_CACHE_DIR, or ~/.cache/mbrl-jax): later runs of the
    same shapes start in seconds."""
    if not jax.config.values.get("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/mbrl-jax/programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def use_determinism() -> None:
    """Has XLA compute on a GPU by algorithms whose results do not depend on the order of threads, or refuse
    to. Without effect on a CPU, which does so anyway. Call before the first JAX operation. The same flag in
    XLA_FLAGS wins."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def use_debugging(num_seeds: int) -> None:
    """Runs every program as plain Python on concrete arrays, so that breakpoints and prints see values."""
    if num_seeds != 1:
        raise UserError(f"--debug runs one seed, but num_seeds is {num_seeds}")
    jax.config.update("jax_disable_jit", True)


def _divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


@dataclass(frozen=True)
class Seeds:
    """The seed axis: ``seeds`` are the members' integers, ``mesh`` the devices that they spread over."""

    seeds: tuple[int, ...]
    mesh: Mesh
    loop: bool = False
    """Seeds that share a device take turns instead of being batched: a CPU core gains nothing from batching
    small networks (docs/performance.md), and a seed's numbers are then bit-equal whatever runs beside it."""

    @classmethod
    def make(cls, seed: int, num_seeds: int) -> Seeds:
        """Members seed, seed + 1, ...; a member's run does not depend on how many run beside it."""
        check_between("num_seeds", num_seeds, 1, 10_000)
        check_between("seed", seed, 0, 2**31 - num_seeds)  # keys are made from int32
        devices = jax.devices()
        devices = devices[: _divisor(num_seeds, len(devices))]
        mesh = Mesh(np.array(devices), ("seed",))
        return cls(tuple(range(seed, seed + num_seeds)), mesh, loop=devices[0].platform == "cpu")

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def sharding(self) -> NamedSharding:
        """Of arrays with leading axis S."""
        return NamedSharding(self.mesh, P("seed"))

    def keys(self) -> jax.Array:
        """One typed PRNG key per member [S]."""
        keys = jax.vmap(jax.random.key)(np.array(self.seeds))
        return jax.device_put(keys, self.sharding)

    def program(self, function: Callable[..., Any], shared: tuple[int, ...] = (), donate=()) -> Any:
        """jit of ``function`` for all members: arguments and results get the leading axis S.

        shared: positions of arguments without that axis (the clock). donate: positions whose buffers the
        result may reuse. No communication between members.
        """

        if jax.config.values["jax_disable_jit"]:
            return one_seed(function, shared)

        def specs(n):
            return tuple(P() if i in shared else P("seed") for i in range(n))

        def local(*args):
            """The seeds of one device."""
            if len(self) == self.mesh.size:
                return one_seed(function, shared)(*args)
            if self.loop:
                seeded = [a for i, a in enumerate(args) if i not in shared]

                def body(own):
                    own = iter(own)
                    return function(*(a if i in shared else next(own) for i, a in enumerate(args)))

                return jax.lax.map(body, seeded)
            axes = tuple(None if i in shared else 0 for i in range(len(args)))
            return jax.vmap(function, in_axes=axes)(*args)

        def all_seeds(*args):
            return jax.shard_map(
                local, mesh=self.mesh, in_specs=specs(len(args)), out_specs=P("seed"), check_vma=False
            )(*args)

        return jax.jit(all_seeds, donate_argnums=donate)


def one_seed(function: Callable[..., Any], shared: tuple[int, ...]) -> Callable[..., Any]:
    """``function`` of one seed for arguments whose leading seed axis has length 1, without a batch axis: on a
    CPU a batched product of one matrix is a quarter slower, and a debugger sees plain arrays."""

    def call(*args):
        own = [a if i in shared else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(args)]
        return jax.tree.map(lambda x: x[None], function(*own))

    return call
