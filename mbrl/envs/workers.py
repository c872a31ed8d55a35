"""Host environments in processes of their own, so that simulating and rendering run beside training.

Actions and observations travel through shared memory without a name, which the system frees with the last
process that uses it, however that ends. A worker ends itself when the run is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl.envs.pool import HostPool, check_commands
from mbrl.errors import UserError
from mbrl.types import EnvSpec, HostEnv, TimeStep

RESTARTS, WITHIN = 10, 600.0
"""So many restarts of workers within so many seconds end the run."""
START_SECONDS = 120.0
"""What a worker may take, on top of its timeout, to start and to make its environments."""
NOWHERE = -1


class WorkerPool:
    """A `HostPool` whose environments are spread over processes, with the same results to the last bit.

    Each worker is a `HostPool` of its share, so an environment that raises or returns wrong numbers is
    treated as there. A worker that dies, or does not answer for ``timeout`` seconds, is killed and started
    again with one warning that names it and the environment it was in; the episodes of its environments end
    as truncated, with a fault counted for each, while the other workers do not notice. New environments draw
    other random numbers than those that were lost.

    spec: that of every environment. size: N. faults: int64 [N].
    """

    def __init__(
        self,
        spec: EnvSpec,
        make: Callable[[int, int], HostEnv],
        seeds: Sequence[int],
        workers: int,
        timeout: float,
    ):
        """make(seed, index) makes one environment, ``index`` being its number in the pool; it is sent to the
        workers, so it must be a function of a module or a ``functools.partial`` of one. workers: processes,
        at most one per environment is started."""
        self.spec, self.size = spec, len(seeds)
        self._make, self._seeds, self._timeout = make, np.asarray(seeds), timeout
        parts = np.array_split(np.arange(self.size), min(workers, self.size))
        self._shares = [range(part[0], part[-1] + 1) for part in parts]
        self._context = multiprocessing.get_context("spawn")
        layout = _layout(spec, self.size, len(self._shares))
        self._memory = {
            name: self._context.RawArray("b", max(1, size)) for name, (*_, size) in layout.items()
        }
        self._shared = _views(self._memory, layout)
        self.faults = self._shared["faults"]
        self._restarts: deque[float] = deque(maxlen=RESTARTS)
        self._lost = [False] * len(self._shares)  # whose environments did not live through the last command
        self._workers = [self._start(w, self._seeds, strict=True) for w in range(len(self._shares))]
        self._finalizer = weakref.finalize(self, _end, self._workers)

    def _start(self, w: int, seeds: np.ndarray, strict: bool) -> _Worker:
        own = self._shares[w]
        self._shared["busy"][w] = NOWHERE
        numbers = tuple(int(seed) for seed in seeds[own.start : own.stop])
        task = _Task(self._make, numbers, self.spec, w, own, self.size, len(self._shares), strict)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._memory, task), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Worker(process, ours, time.monotonic() + START_SECONDS)

    def step(self, actions: np.ndarray, reset_mask: np.ndarray) -> TimeStep:
        """``send`` and ``receive``."""
        self.send(actions, reset_mask)
        return self.receive()

    def send(self, actions: np.ndarray, reset_mask: np.ndarray) -> None:
        """As `HostPool.send`; the workers begin at once."""
        actions, reset_mask = check_commands(self.spec, self.size, actions, reset_mask)
        self._shared["action"][:], self._shared["reset"][:] = actions, reset_mask
        for w in range(len(self._workers)):
            self._command(w, "step")

    def receive(self) -> TimeStep:
        """As `HostPool.receive`, when all workers are done."""
        for w in range(len(self._workers)):
            self._answer(w)
        shared = self._shared
        for w in np.flatnonzero(self._lost):
            own = slice(self._shares[w].start, self._shares[w].stop)
            for name in (*(f"obs/{key}" for key in self.spec.obs), "reward", "is_terminal"):
                shared[name][own] = 0
            shared["is_last"][own] = True
            self._lost[w] = False
        obs = {key: shared[f"obs/{key}"].copy() for key in self.spec.obs}
        return TimeStep(obs, *(shared[name].copy() for name in ("reward", "is_last", "is_terminal")))

    def reset(self) -> TimeStep:
        """Reset every environment; the first call of a run."""
        shape = (self.size, *self.spec.action.shape)
        return self.step(np.zeros(shape, np.float32), np.ones(self.size, bool))

    def get_state(self) -> dict[str, np.ndarray]:
        """As `HostPool.get_state`, so a run may be resumed with another number of workers."""
        state = {}
        for w, own in enumerate(self._shares):
            for key, value in self._insist(w, "get_state").items():
                index, _, name = key.partition("/")
                if name:
                    state[f"{own.start + int(index)}/{name}"] = value
        return state | {"faults": self.faults.copy()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore ``get_state`` of a pool of the same size; raises ValueError when it is of another."""
        saved = np.size(state["faults"])
        if saved != self.size:
            raise ValueError(f"The state is one of {saved} environments, this pool has {self.size}.")
        for w, own in enumerate(self._shares):
            part = {"faults": np.asarray(state["faults"])[own.start : own.stop]}
            for key, value in state.items():
                index, _, name = key.partition("/")
                if name and int(index) in own:
                    part[f"{int(index) - own.start}/{name}"] = np.asarray(value)
            self._insist(w, "set_state", part)
            self._lost[w] = False

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        self._finalizer()

    def _command(self, w: int, name: str, argument: Any = None) -> None:
        with contextlib.suppress(OSError):  # it is dead, as its answer will show
            self._workers[w].pipe.send((name, argument))

    def _answer(self, w: int) -> Any:
        """What the worker says to the last command; None when it failed, and was started again."""
        worker = self._workers[w]
        left = max(0.0, worker.ready_by - time.monotonic())  # 0 once it has answered
        why = f"did not answer for {self._timeout:g} s"
        try:
            if worker.pipe.poll(self._timeout + left):
                outcome, value, said = worker.pipe.recv()
                worker.ready_by = 0.0
                for text in said:
                    warnings.warn(text, RuntimeWarning, stacklevel=4)
                if outcome == "refused":
                    raise value
                return value
        except (EOFError, OSError):
            worker.process.join(1.0)
            why = f"died with exit code {worker.process.exitcode}"
        self._restart(w, why)
        return None

    def _insist(self, w: int, name: str, argument: Any = None) -> Any:
        """The answer to a command, of a new worker where the old one fails. It may take as long as a start:
        some environments get to a state by playing an episode again."""
        while True:
            worker = self._workers[w]
            worker.ready_by = max(worker.ready_by, time.monotonic() + START_SECONDS)
            self._command(w, name, argument)
            if (value := self._answer(w)) is not None:
                return value

    def _restart(self, w: int, why: str) -> None:
        own, busy = self._shares[w], int(self._shared["busy"][w])
        inside = "between two steps" if busy == NOWHERE else f"in environment {busy}"
        which = f"environments {own[0]} to {own[-1]}" if len(own) > 1 else f"environment {own[0]}"
        _end([self._workers[w]])
        self.faults[own.start : own.stop] += 1
        self._restarts.append(time.monotonic())
        if len(self._restarts) == RESTARTS and self._restarts[-1] - self._restarts[0] < WITHIN:
            raise UserError(
                f"environment workers of {self.spec.name} failed {RESTARTS} times within {WITHIN / 60:g} "
                f"minutes; the last was worker {w}, which {why} {inside}"
            )
        warnings.warn(
            f"worker {w} {why} {inside}: it is started again, the episodes of {which} end here",
            RuntimeWarning,
            stacklevel=5,
        )
        faults = int(self.faults.sum())
        seeds = [np.random.SeedSequence([seed, faults]).generate_state(1)[0] for seed in self._seeds]
        self._workers[w] = self._start(w, np.array(seeds), strict=False)
        self._lost[w] = True


class _Worker:
    """process, its pipe, and the time until which it may still be starting."""

    def __init__(self, process: Any, pipe: Any, ready_by: float):
        self.process, self.pipe, self.ready_by = process, pipe, ready_by


def _end(workers: list[_Worker]) -> None:
    """Kills: a worker holds nothing that must be kept, and one that hangs hears nothing."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.pipe.close()


def _layout(spec: EnvSpec, size: int, workers: int) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """{name: (shape, dtype, bytes)} of what is shared. busy: the environment that a worker is in."""
    arrays = {f"obs/{key}": ((size, *entry.shape), entry.dtype) for key, entry in spec.obs.items()}
    arrays |= {"action": ((size, *spec.action.shape), "float32"), "reward": ((size,), "float32")}
    arrays |= {name: ((size,), "bool") for name in ("reset", "is_last", "is_terminal")}
    arrays |= {"faults": ((size,), "int64"), "busy": ((workers,), "int64")}
    return {
        name: (shape, dtype, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        for name, (shape, dtype) in arrays.items()
    }


def _views(memory: dict[str, Any], layout: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(memory[name], np.uint8)[:count].view(dtype).reshape(shape)
        for name, (shape, dtype, count) in layout.items()
    }


class _Task(NamedTuple):
    """What a worker is told. number: its own, of ``workers``. own: its environments among all ``size``.
    strict: the first reset of each is checked; after a restart, what fails there is a fault."""

    make: Callable[[int, int], HostEnv]
    seeds: tuple[int, ...]
    spec: EnvSpec
    number: int
    own: range
    size: int
    workers: int
    strict: bool


# What runs in a worker.


class _WatchedPool(HostPool):
    """Notes which environment is being asked, for the case that it never answers."""

    busy: np.ndarray
    first: int

    def _ask(self, i: int, reset: bool, action: np.ndarray) -> TimeStep:
        self.busy[...] = self.first + i
        answer = super()._ask(i, reset, action)
        self.busy[...] = NOWHERE
        return answer


def _serve(pipe: connection.Connection, memory: dict[str, Any], task: _Task) -> None:
    """A worker's life: one answer (outcome, value, warnings) to each command, until the run is gone."""
    # Ctrl-C, and a SIGTERM to the whole group, are the run's to handle: it saves first, and needs us for it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the run
    shared = _views(memory, _layout(task.spec, task.size, task.workers))
    pool = None
    while True:
        try:
            name, argument = pipe.recv()
        except EOFError:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                pool = pool or _make_pool(task, shared)
                outcome, value = (
                    "done",
                    _obey(pool, name, argument, shared, slice(task.own.start, task.own.stop)),
                )
            except (UserError, ValueError) as error:
                outcome, value = "refused", error
        pipe.send((outcome, value, [str(w.message) for w in caught if w.category is RuntimeWarning]))


def _make_pool(task: _Task, shared: dict[str, np.ndarray]) -> _WatchedPool:
    names = [f"environment {i} (worker {task.number})" for i in task.own]
    pool = _WatchedPool([task.make(seed, i) for seed, i in zip(task.seeds, task.own, strict=True)], names)
    if pool.spec != task.spec:
        raise ValueError(f"{names[0].capitalize()} has the spec {pool.spec} where {task.spec} is expected.")
    pool.faults = shared["faults"][task.own.start : task.own.stop]
    pool.busy, pool.first = shared["busy"][task.number :][:1], task.own.start
    pool.checked[:] = not task.strict
    return pool


def _obey(pool: HostPool, name: str, argument: Any, shared: dict[str, np.ndarray], share: slice) -> Any:
    if name == "get_state":
        return pool.get_state()
    if name == "set_state":
        pool.set_state(argument)
        return True
    timestep = pool.step(shared["action"][share], shared["reset"][share])
    for key, value in timestep.obs.items():
        shared[f"obs/{key}"][share] = value
    for field in ("reward", "is_last", "is_terminal"):
        shared[field][share] = getattr(timestep, field)
    return True


def _end_with_parent() -> None:
    """Also while an environment hangs, or when the parent is killed and can tell nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
