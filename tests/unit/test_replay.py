"""Replay against a plain Python list: what was written, what may be read, what is served first.

Every row carries its own serial number in ``reward`` (row * E + environment), so that a sample shows exactly
which rows it consists of.
"""

from __future__ import annotations

from collections import deque
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mbrl import memory, replay
from mbrl.host_replay import HostReplay, allocate
from mbrl.programs import Clock
from mbrl.seeds import Seeds
from mbrl.types import ArraySpec, Transition
from tests.helpers import one_seed

CAPACITY, ENVS, BATCH, LENGTH = 11, 2, 3, 4


def make_rows(first: int, n: int, envs: int = ENVS, flags=None) -> Transition:
    """Rows first .. first + n - 1 of all environments, [n, E, ...]; flags [n, E, 2]: is_first, is_last."""
    serial = (np.arange(first, first + n)[:, None] * envs + np.arange(envs)).astype(np.float32)
    flags = np.zeros((n, envs, 2), bool) if flags is None else flags
    return Transition(
        obs={
            "x": np.stack([serial, -serial], -1),
            "kind": serial.astype(np.int32),
            "picture": picture(serial),
        },
        action=serial[..., None] + 0.5,
        reward=serial,
        is_first=flags[..., 0],
        is_last=flags[..., 1],
        is_terminal=flags[..., 1],
        latent={"deter": serial[..., None].astype(jnp.bfloat16)},
    )


def picture(serial) -> np.ndarray:
    """The bytes of a serial number as an image [..., 2, 2, 1]."""
    number = np.asarray(serial).astype(np.int32)
    return number[..., None].view(np.uint8).reshape(*number.shape, 2, 2, 1)


@cache
def programs(place="device", capacity=CAPACITY, envs=ENVS, batch=BATCH, length=LENGTH, online=True):
    """The replay's functions, compiled once per shape for the whole file. place: of the images."""
    ring = replay.make(capacity, envs, batch, length, online)
    add, sample, write = jax.jit(ring.add), jax.jit(ring.sample), jax.jit(ring.write_latent)
    example_row = jax.tree.map(lambda x: jnp.asarray(x[0]), make_rows(0, 1, envs))
    if place == "device":
        return ring.init(example_row), add, sample, write
    example_row.obs.pop("picture")
    clock = Clock(1, 1, 0, 1000, envs, capacity)
    images = allocate({"picture": ArraySpec((2, 2, 1), "uint8")}, (1, capacity, envs), None)
    host = HostReplay(images, ring, Seeds.make(0, 1), clock)

    def host_add(state, rows):
        host.inserted = int(state.inserted)
        return add(state, one_seed(host.add(jax.tree.map(lambda x: x[None], rows)), 0))

    def host_sample(state, key):
        beside = host.beside(jax.tree.map(lambda x: x[None], state), key[None])
        return sample(state, key, one_seed(beside, 0))

    return ring.init(example_row), host_add, host_sample, write


@pytest.fixture(params=["device", "host"])
def place(request):
    """Of images; everything else is on the device."""
    return request.param


class ListReplay:
    """The model: all rows ever written, in a list; a queue of fresh sequences (env, first row)."""

    def __init__(self):
        self.first, self.last = [], []  # flags by row, [E]
        self.queue: deque[tuple[int, int]] = deque()

    def add(self, rows: Transition):
        for i in range(len(rows.reward)):
            self.first.append(rows.is_first[i])
            self.last.append(rows.is_last[i])
            if len(self.first) % LENGTH == 0:
                self.queue.extend((env, len(self.first) - LENGTH) for env in range(ENVS))

    @property
    def oldest(self) -> int:
        return max(0, len(self.first) - CAPACITY)

    def serve(self) -> list[tuple[int, int]]:
        """Up to BATCH fresh sequences, without those that the ring has begun to overwrite."""
        while self.queue and self.queue[0][1] < self.oldest:
            self.queue.popleft()
        return [self.queue.popleft() for _ in range(min(BATCH, len(self.queue)))]

    def check(self, sampled: replay.Sampled) -> list[tuple[int, int]]:
        """Every column is LENGTH consecutive rows of one environment inside the ring; returns (env, first)."""
        traj = jax.tree.map(np.asarray, sampled.traj)
        serial = traj.reward.astype(int)
        assert serial.shape == (LENGTH, BATCH)
        rows, envs = serial // ENVS, serial % ENVS
        starts = []
        for b in range(BATCH):
            start, env = rows[0, b], envs[0, b]
            assert (rows[:, b] == start + np.arange(LENGTH)).all(), "rows are not consecutive"
            assert (envs[:, b] == env).all(), "environments are mixed"
            assert self.oldest <= start and start + LENGTH <= len(self.first), "outside what is stored"
            assert (np.asarray(sampled.time)[:, b] == rows[:, b] % CAPACITY).all()
            assert sampled.env[b] == env
            span = range(start, start + LENGTH)
            first = np.array([self.first[t][env] for t in span])
            last = np.array([self.last[t][env] for t in span])
            assert (traj.is_first[:, b] == first).all()
            assert (traj.is_last[:, b] == (last | np.append(first[1:], False))).all()
            assert (traj.is_terminal[:, b] == last).all(), "an abandoned episode is no terminal"
            starts.append((env, start))
        assert (traj.obs["x"] == np.stack([serial, -serial], -1)).all()
        assert (traj.obs["picture"] == picture(serial)).all()
        assert (traj.obs["kind"] == serial).all() and (traj.action[..., 0] == serial + 0.5).all()
        return starts


OPERATIONS = st.lists(
    st.one_of(st.sampled_from([1, 2, 3, 7, CAPACITY]), st.just("sample")), min_size=1, max_size=25
)


@pytest.mark.parametrize("place", ["device", "host"])
@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 2**31 - 1))
@example(operations=[LENGTH - 1, 1, "sample", "sample"], seed=0)
@example(operations=[CAPACITY, CAPACITY, "sample", "sample", "sample"], seed=1)
@example(operations=[1] * 40 + ["sample"] * 9, seed=2)
@example(operations=[3, "sample"] * 15, seed=3)
def test_replay_against_a_list(place, operations, seed):
    """Adds of any size and samples in any order: never an unwritten row, never across the write head, fresh
    sequences once and in order, is_last where the next row is an episode's first."""
    state, add, sample, _ = programs(place)
    model, rng = ListReplay(), np.random.default_rng(seed)
    for step, operation in enumerate(operations):
        if operation != "sample":
            flags = rng.random((operation, ENVS, 2)) < 0.25
            rows = make_rows(len(model.first), operation, flags=flags)
            state = add(state, rows)
            model.add(rows)
        elif len(model.first) >= LENGTH:
            state, sampled = sample(state, jax.random.key(seed + step))
            starts, fresh = model.check(sampled), model.serve()
            assert starts[: len(fresh)] == fresh
    assert state.inserted == len(model.first)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host"])
@settings(max_examples=1000, deadline=None, database=None)
@given(operations=OPERATIONS, seed=st.integers(0, 2**31 - 1))
def test_replay_against_a_list_a_thousand_times(place, operations, seed):
    test_replay_against_a_list.hypothesis.inner_test(place, operations, seed)


def test_every_fresh_sequence_is_served_exactly_once(place):
    """Over a long run in which sampling keeps up, uniform samples never displace a fresh one."""
    state, add, sample, _ = programs(place)
    served, model = [], ListReplay()
    for i in range(60):
        rows = make_rows(i, 1)
        state = add(state, rows)
        model.add(rows)
        if i + 1 >= LENGTH:
            before = int(state.served)
            state, sampled = sample(state, jax.random.key(i))
            served += model.check(sampled)[: int(state.served) - before]
    assert served == [(env, chunk * LENGTH) for chunk in range(60 // LENGTH) for env in range(ENVS)]


def test_served_does_not_run_ahead(place):
    """A batch larger than the queue must not mark sequences as served that do not exist yet."""
    state, add, sample, _ = programs(place)
    state = add(state, make_rows(0, LENGTH))
    for i in range(3):
        state, _ = sample(state, jax.random.key(i))
    assert state.served == ENVS
    state, sampled = sample(add(state, make_rows(LENGTH, LENGTH)), jax.random.key(9))
    assert (np.asarray(sampled.traj.reward[0, :ENVS]).astype(int) == LENGTH * ENVS + np.arange(ENVS)).all()


@pytest.mark.parametrize("written", [LENGTH, 9, 2 * CAPACITY + 5])
def test_uniform_sampling(place, written):
    """Without the queue, every (environment, start) that is stored is equally likely; partly filled, full and
    wrapped. Chi-square of 30,000 draws."""
    state, add, sample, _ = programs(place, batch=30_000, online=False)
    for start in range(0, written, 1):
        state = add(state, make_rows(start, 1))
    serial = np.asarray(sample(state, jax.random.key(0))[1].traj.reward[0]).astype(int)
    oldest = max(0, written - CAPACITY)
    counts = np.bincount(serial - oldest * ENVS)
    assert len(counts) == (min(written, CAPACITY) - LENGTH + 1) * ENVS
    assert len(counts) == 2 or scipy.stats.chisquare(counts).pvalue > 1e-3


def test_online_leaves_the_rest_of_the_batch_uniform(place):
    """Fresh sequences take the first places only; the others cover all of replay."""
    state, add, sample, _ = programs(place, batch=5000)
    state = add(state, make_rows(0, CAPACITY))
    serial = np.asarray(sample(state, jax.random.key(0))[1].traj.reward[0]).astype(int)
    fresh = CAPACITY // LENGTH * ENVS
    assert serial[:fresh].tolist() == [0, 1, LENGTH * ENVS, LENGTH * ENVS + 1]
    assert scipy.stats.chisquare(np.bincount(serial[fresh:])).pvalue > 1e-3


@pytest.mark.parametrize("trained", [LENGTH, LENGTH - 1])
def test_write_latent(place, trained):
    """Only the trained rows of the sampled sequences change, only their latents; the context row keeps its own.
    Across the end of the ring too."""
    state, add, sample, write = programs(place)
    for start in range(0, 15, 5):
        state = add(state, make_rows(start, 5))
    crossed = False
    for seed in range(12):
        _, sampled = sample(state, jax.random.key(seed))
        fresh = 1000 + sampled.traj.reward[-trained:, :, None]
        after = write(state, sampled, {"deter": fresh})
        expected = np.asarray(state.data.latent["deter"], np.float32)
        time, env = np.asarray(sampled.time[-trained:]), np.asarray(sampled.env)
        for b in range(BATCH):
            expected[time[:, b], env[b], 0] = np.asarray(fresh[:, b, 0].astype(jnp.bfloat16), np.float32)
        crossed |= bool((np.diff(np.asarray(sampled.time), axis=0) < 0).any())
        assert after.data.latent["deter"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(after.data.latent["deter"], np.float32), expected)
        for name in ("obs", "action", "reward", "is_first", "is_last", "is_terminal"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after.data, name), getattr(state.data, name))
    assert crossed, "the case must include a sequence across the end of the ring"


def test_too_long_sequences_are_refused():
    with pytest.raises(ValueError, match="capacity"):
        replay.make(capacity=3, num_envs=1, batch=1, length=4)


def test_dtypes_survive(place):
    """Rows come back in the dtypes in which they were written."""
    state, add, sample, _ = programs(place)
    traj = sample(add(state, make_rows(0, CAPACITY)), jax.random.key(0))[1].traj
    wanted = make_rows(0, 1)
    assert jax.tree.map(lambda x: x.dtype, traj) == jax.tree.map(lambda x: jnp.asarray(x).dtype, wanted)


def test_num_bytes():
    """What the memory plan prints is what is allocated."""
    state, *_ = programs()
    allocated = sum(x.nbytes for x in jax.tree.leaves(state.data))
    assert memory.num_bytes(jax.eval_shape(lambda: state.data)) == allocated
