"""Replay whose images lie in the memory of the host, or on disk. The devices hold the rest of every row, and
get the images of one batch while they learn from the one before (two buffers).

Which rows an update learns from is `Replay.draw`, a function of a key and of two counters and of nothing that
is stored. So a thread of the host draws what the devices will draw, gathers the images and sends them, and
a run gives the same bits wherever its images lie.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl.errors import UserError
from mbrl.programs import PRETRAIN, UPDATE, Clock, Programs, RunState, burst_keys
from mbrl.replay import Replay, ReplayState
from mbrl.seeds import Seeds
from mbrl.types import ArraySpec, Transition

Images = dict[str, np.ndarray]


def allocate(images: Mapping[str, ArraySpec], rows: tuple[int, int, int], folder: Path | None) -> Images:
    """{key: uint8 [S, capacity, E, h, w, c]} in memory, or in a file of ``folder`` that has no name and goes
    with the process. rows: (S, capacity, E). UserError where the disk has no room for all of it."""
    # An environment's rows lie one behind the other: a sequence is one piece of the file.
    shapes = {key: (rows[0], rows[2], rows[1], *entry.shape) for key, entry in images.items()}
    if folder is None:
        return {key: np.zeros(shape, np.uint8).swapaxes(1, 2) for key, shape in shapes.items()}
    sizes = {key: int(np.prod(shape)) for key, shape in shapes.items()}
    arrays, first, total = {}, 0, sum(sizes.values())
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, total)  # a disk that is full later would end the process
        except OSError as error:
            raise UserError(
                f"loop.replay_place is disk, but {folder} has no room for {total / 2**30:.1f} GiB of images "
                f"({os.strerror(error.errno or errno.EIO)}): lower loop.replay_size or num_seeds, or take a "
                "run folder on a larger disk"
            ) from error
        for key, shape in shapes.items():
            arrays[key] = np.memmap(file, np.uint8, "r+", first, shape).swapaxes(1, 2)
            first += sizes[key]
    return arrays


class Burst(NamedTuple):
    """Updates that the thread has begun to prepare. name, clock: of their random stream. rows: that are
    added before them, per environment. drawn: served after them, and [S, U, ...] of each update time
    [length, B], env [B] and the data of its key. first: images of the first one, without those added rows."""

    name: int
    clock: int
    rows: int
    drawn: Future
    first: Future


class HostReplay:
    """Images of the rows of all seeds, {key: uint8 [S, capacity, E, h, w, c]}, and the thread that takes them
    to the devices. The thread reads rows while others are written, never those that an update is to see."""

    def __init__(self, images: Images, replay: Replay, seeds: Seeds, clock: Clock):
        self.images, self.replay, self.seeds, self.clock = images, replay, seeds, clock
        self.inserted, self.served = 0, 0  # as in `ReplayState`, the same for all seeds
        self._keys = np.asarray(jax.random.key_data(seeds.keys()))
        self._next: Burst | None = None
        self._thread = ThreadPoolExecutor(1, "replay")
        self._draw_one = jax.jit(jax.vmap(replay.draw))
        self._draw = jax.jit(self._draw_burst, static_argnums=(1, 5))

    # As a part of the state of a run.

    def whole(self, state: RunState) -> RunState:
        """The state with the images, as a checkpoint holds it wherever they lie."""
        return _with_obs(state, {**state.replay.data.obs, **self.images})

    def part(self, state: RunState) -> RunState:
        """What the devices hold of a state that was read from a checkpoint; its images are kept."""
        for key, images in self.images.items():
            if (read := state.replay.data.obs[key]) is not images:
                images[...] = read
        self.inserted, self.served = (int(np.ravel(x)[0]) for x in state.replay[1:])
        self._next = None
        return _with_obs(state, {k: x for k, x in state.replay.data.obs.items() if k not in self.images})

    def beside(self, state: ReplayState, keys: jax.Array) -> Images:
        """The images [S, length, B, ...] that ``sample`` with these keys [S] would give."""
        _, time, env = self._draw_one(state.inserted, state.served, keys)
        return self._gather(np.asarray(time), np.asarray(env))

    # As programs.

    def programs(self, made: Programs) -> Programs:
        """``made`` with images here: what writes into replay, and what learns from it."""
        clock = self.clock

        def store(state: RunState, rows: Transition, latents) -> RunState:
            return made.store(state, self.add(rows), latents)

        def learn(state: RunState, rows: Transition, latents, keys, iteration):
            burst = self._begin(UPDATE, int(iteration), clock.updates, clock.rows)
            state = store(state, rows, latents)
            return self._follow(burst, *self._updates(made, state, burst, clock.updates))

        def update(state: RunState, keys, iteration):
            burst = self._begin(UPDATE, int(iteration), clock.updates, 0)
            return self._follow(burst, *self._updates(made, state, burst, clock.updates))

        def pretrain(state: RunState, keys):
            burst = self._begin(PRETRAIN, 0, clock.pretrain, 0)
            return self._updates(made, state, burst, clock.pretrain)

        def fill(state: RunState, rows: Transition) -> RunState:
            seeds = jax.tree.map(lambda x: np.broadcast_to(x, (len(self.seeds), *x.shape)), rows.obs)
            rest = self.add(rows._replace(obs=seeds)).obs
            return made.fill(state, rows._replace(obs={k: rows.obs[k] for k in rest}))

        return made._replace(store=store, learn=learn, update=update, pretrain=pretrain, fill=fill)

    def add(self, rows: Transition) -> Transition:
        """Keeps the images of rows [S, n, E, ...] and returns the others."""
        count = next(iter(rows.obs.values())).shape[1]
        index = (self.inserted + np.arange(count)) % self.clock.capacity
        for key, images in self.images.items():
            images[:, index] = rows.obs[key]
        self.inserted += count
        return rows._replace(obs={k: x for k, x in rows.obs.items() if k not in self.images})

    def _begin(self, name: int, clock: int, updates: int, rows: int) -> Burst:
        """The burst that is to come, which the thread may be preparing already."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[:3] == (name, clock, rows):
            return ahead
        inserted = self.inserted + rows
        args = self._keys, name, np.int32(clock), np.int32(inserted), np.int32(self.served), updates
        drawn = self._thread.submit(self._drawn, *args)
        return Burst(name, clock, rows, drawn, self._thread.submit(self._first, drawn))

    def _follow(self, burst: Burst, state: RunState, metrics):
        """Lets the thread prepare the burst behind this one."""
        if burst.clock + 1 < self.clock.total:
            self._next = self._begin(UPDATE, burst.clock + 1, self.clock.updates, burst.rows)
        return state, metrics

    def _updates(self, made: Programs, state: RunState, burst: Burst, updates: int):
        """One update after the other -> (state, mean metrics)."""
        total = metrics = None
        batch = self._thread.submit(self._batch, burst, self.inserted, 0, None)
        for number in range(updates):
            images, key = batch.result()
            if number + 1 < updates:  # before the update is called, which on a CPU returns when it is done
                batch = self._thread.submit(self._batch, burst, self.inserted, number + 1, metrics)
            state, metrics = made.step(state, images, key)
            total = metrics if total is None else _sum(total, metrics)
        self.served = burst.drawn.result()[0]
        if total is None or metrics is None:
            raise ValueError("a burst has at least one update")
        counts = {name: metrics[name] for name in ("rejected_updates", "frozen")}
        return state, _mean(total, np.float32(updates)) | counts

    # In the thread.

    def _draw_burst(self, keys, name: int, clock, inserted, served, updates: int):
        """Of every seed: served, time [U, length, B], env [U, B] and data of the keys [U, ...]."""

        def one(data):
            keys = burst_keys(jax.random.wrap_key_data(data), name, clock, updates)

            def body(served, key):
                served, *where = self.replay.draw(inserted, served, jax.random.split(key)[0])
                return served, where

            served_after, (time, env) = jax.lax.scan(body, served, keys)
            return served_after, time, env, jax.random.key_data(keys)

        return jax.vmap(one)(keys)

    def _drawn(self, *args):
        with jax.default_device(_host_device()):  # an accelerator is busy with the burst before
            served, *rest = jax.tree.map(np.asarray, self._draw(*args))
        return int(served[0]), *rest

    def _first(self, drawn: Future) -> Images:
        _, time, env, _ = drawn.result()
        return self._gather(time[:, 0], env[:, 0])

    def _batch(self, burst: Burst, inserted: int, number: int, before: Any):
        """(images [S, length, B, ...], data of keys [S, ...]) of an update on the devices. inserted: rows by
        now. before: metrics of the update two before, whose images are no longer needed when these are known:
        two batches at most are there."""
        jax.block_until_ready(before)
        _, times, envs, keys = burst.drawn.result()
        time, env = times[:, number], envs[:, number]
        if number:
            images = self._gather(time, env)
        else:
            images, added = burst.first.result(), np.arange(inserted - burst.rows, inserted)
            late = np.isin(time, added % self.clock.capacity).any(1)  # [S, B]: sequences with an added row
            seed, column = np.nonzero(late)
            for key, rows in self.images.items():
                images[key][seed, :, column] = rows[seed[:, None], time[seed, :, column], env[late][:, None]]
        return jax.block_until_ready(jax.device_put((images, keys[:, number]), self.seeds.sharding))

    def _gather(self, time: np.ndarray, env: np.ndarray) -> Images:
        """Rows ``time`` [S, length, B] of environments ``env`` [S, B]."""
        seed = np.arange(len(time))[:, None, None]
        return {key: rows[seed, time, env[:, None]] for key, rows in self.images.items()}


_sum = jax.jit(partial(jax.tree.map, lambda a, b: a + b))
_mean = jax.jit(lambda total, count: jax.tree.map(lambda x: x / count, total))


def _with_obs(state: RunState, obs: dict[str, Any]) -> RunState:
    data = state.replay.data._replace(obs=obs)
    return state._replace(replay=state.replay._replace(data=data))


def _host_device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS may leave out the CPU
        return jax.local_devices()[0]
