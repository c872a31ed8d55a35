"""N seeds as one program: functions are written for one seed, this adds the axis and spreads it.

Devices form a mesh ('seed', 'data'): seeds are spread first, then the batch of each seed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mbrl import processes
from mbrl.errors import UserError, check_between


def use_cpu_devices(num_seeds: int, data: int = 1) -> None:
    """One virtual CPU device per core, as many as divide the seeds, so that seeds use all cores; ``data``
    devices for each where its batch is split. Memory that programs free is kept (`keep_freed_memory`).

    Call before the first JAX operation. Accelerators stay as they are. An explicit XLA_FLAGS
    --xla_force_host_platform_device_count wins.
    """
    keep_freed_memory()
    # A program runs in the thread that calls it, whose freed memory is kept. With several devices it runs in
    # threads of the runtime, which otherwise could wait for each other's part of a sum.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data = min(data, 256)  # more is a slip, and refused where devices are counted
    count = data * _divisor(num_seeds, max(1, cores // data))
    if jax.config.values["jax_num_cpu_devices"] != count:  # setting it is refused once a computation was made
        jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next call of a program instead of giving it back to the system.

    XLA allocates a program's temporary arrays anew in every call, and the system clears each of their pages
    when it is first touched: a third of the processor time of a large update (docs/performance.md). Only the
    main thread's heap can grow beyond 64 MiB, so that is where programs must run. Other threads keep heaps of
    their own: compiling leaves that one full of holes, and when all shared it, a third of the time went into
    the search for small arrays. Without effect where there is no glibc.
    """
    if not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1)):
        ctypes.CDLL(None).mallopt(parameter, value)


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
    def make(cls, seed: int, num_seeds: int, data: int = 1) -> Seeds:
        """Members seed, seed + 1, ...; a member's run does not depend on how many run beside it.

        data: devices over which the batch of each seed is split. UserError when there are not as many, or
        when a process of the run would have nothing to do.
        """
        check_between("num_seeds", num_seeds, 1, 10_000)
        check_between("seed", seed, 0, 2**31 - num_seeds)  # keys are made from int32
        mesh = Mesh(_devices(num_seeds, data).reshape(-1, data), ("seed", "data"))
        members = tuple(range(seed, seed + num_seeds))
        return cls(members, mesh, loop=mesh.devices[0, 0].platform == "cpu")

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def shards(self) -> int:
        """Parts into which the seed axis is cut."""
        return self.mesh.shape["seed"]

    @property
    def data(self) -> int:
        """Devices that share the batch of a seed."""
        return self.mesh.shape["data"]

    @property
    def own(self) -> range:
        """Positions of the members that live in this process; all of them where there is one process."""
        local = [i for i, row in enumerate(self.mesh.devices) if _is_own(row)]
        each = len(self) // self.shards
        return range(local[0] * each, (local[-1] + 1) * each)

    @property
    def sharding(self) -> NamedSharding:
        """Of arrays with leading axis S."""
        return NamedSharding(self.mesh, P("seed"))

    def keys(self) -> jax.Array:
        """One typed PRNG key per member [S]."""
        make = jax.jit(jax.vmap(jax.random.key), out_shardings=self.sharding)
        return make(np.array(self.seeds))

    def put(self, tree: Any) -> Any:
        """NumPy arrays of the own members [S here, ...] as arguments of a program [S, ...]."""
        if jax.process_count() == 1:
            return tree
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.sharding, x), tree)

    def fetch_own(self, tree: Any) -> Any:
        """What a program returned [S, ...] as NumPy arrays of the own members [S here, ...]."""

        def fetch(x):
            if jax.process_count() == 1 or not isinstance(x, jax.Array):
                return np.asarray(x)
            parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

        return jax.tree.map(fetch, tree)

    def fetch(self, tree: Any) -> Any:
        """What a program returned, or arrays of the own members, as NumPy arrays of all members [S, ...].

        With several processes all must ask at the same time.
        """
        own = self.fetch_own(tree)
        if jax.process_count() == 1:
            return own
        same = jax.process_count() * len(self.own) // len(self)  # processes that share their members
        return jax.tree.map(lambda x: np.concatenate(processes.gather(x)[::same]), own)

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
            if len(self) == self.shards:
                return one_seed(function, shared)(*args)
            if self.loop:
                seeded = [a for i, a in enumerate(args) if i not in shared]

                def body(own):
                    own = iter(own)
                    return function(*(a if i in shared else next(own) for i, a in enumerate(args)))

                return jax.lax.map(body, seeded)
            axes = tuple(None if i in shared else 0 for i in range(len(args)))
            return jax.vmap(function, in_axes=axes)(*args)

        # What is left out of ``manual``, the compiler spreads: the batch, where `split_batch` asks for it.
        manual = {"seed"} if self.data > 1 else set(self.mesh.axis_names)

        def all_seeds(*args):
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=specs(len(args)),
                out_specs=P("seed"),
                axis_names=manual,
                check_vma=False,
            )(*args)

        return jax.jit(all_seeds, donate_argnums=donate, out_shardings=self.sharding)


def split_batch(tree: Any) -> Any:
    """Inside a program: arrays [T, B, ...] with B spread over the mesh axis ``data``, so that a gradient of
    their mean is one of a mean over devices. Nothing where there is no such axis."""
    if jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(None, "data")), tree)


def _is_own(devices: Iterable[Any]) -> bool:
    return any(device.process_index == jax.process_index() for device in devices)


def _devices(num_seeds: int, data: int) -> np.ndarray:
    """The devices of a run, those of a process side by side, as many of each process; ``data`` for a seed."""
    check_between("data_parallel", data, 1, 10_000)
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    count, each = devices.shape
    if data <= each:
        seeds_each, rest = divmod(num_seeds, count)
        if rest:
            raise UserError(
                f"num_seeds is {num_seeds}, it must be a multiple of {count}, the number of processes, or "
                f"data_parallel must be {each * count}, so that a seed uses the devices of all of them"
            )
        return devices[:, : data * _divisor(seeds_each, each // data)].ravel()
    shards, rest = divmod(devices.size, data)
    if rest or data % each or not shards or num_seeds % shards:
        raise UserError(
            f"data_parallel is {data}, but there are {devices.size} devices ({count} process(es) with "
            f"{each}) for {num_seeds} seed(s): it must divide the number of devices, and what is left "
            f"of them must divide the seeds"
        )
    return devices.ravel()


def one_seed(function: Callable[..., Any], shared: tuple[int, ...]) -> Callable[..., Any]:
    """``function`` of one seed for arguments whose leading seed axis has length 1, without a batch axis: on a
    CPU a batched product of one matrix is a quarter slower, and a debugger sees plain arrays."""

    def call(*args):
        own = [a if i in shared else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(args)]
        return jax.tree.map(lambda x: x[None], function(*own))

    return call
