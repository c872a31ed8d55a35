"""How many iterations one compiled call makes changes nothing but the number of calls."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mbrl import envs
from mbrl.drivers import DeviceDriver, Source
from tests.helpers import as_numpy, assert_close, assert_same, on_one_device, tiny_run
from tests.mesh import make_run as regression_run

ENV = envs.make_jax("pendulum", max_steps=6)
SOURCE = Source(ENV.spec, ENV)
PREFILL, TOTAL = 10, 20  # iterations, multiples of every chunk


class Result:
    """Ten iterations of prefill and ten of learning, ``chunk`` at a time."""

    def __init__(self, chunk: int):
        seeds = on_one_device(0)
        run = tiny_run(SOURCE, seeds, TOTAL, chunk=chunk, prefill=PREFILL * 8)
        assert (run.clock.prefill, run.clock.total) == (PREFILL, TOTAL)
        driver, keys = DeviceDriver(run.programs(), chunk), seeds.keys()
        state, metrics, self.episodes, self.returns = driver.programs.init(keys), [], 0, 0.0
        for i in range(0, TOTAL, chunk):
            state, one, ended = driver.advance(state, keys, i, learning=i >= PREFILL)
            self.episodes += int(ended.count[0])
            self.returns += float(ended.returns[0])
            if one is not None:
                metrics.append(as_numpy(one))
        self.state = as_numpy(state)
        self.metrics = jax.tree.map(lambda *xs: np.mean(xs, 0), *metrics)


@pytest.fixture(scope="module")
def one_by_one() -> Result:
    return Result(1)


@pytest.mark.parametrize("chunk", [5, 10])
def test_chunks_are_bit_equal(one_by_one, chunk):
    """Parameters, optimiser, replay, acting states and environments to the last bit; the mean of the metrics
    over the chunks, and the episodes that ended in them."""
    chunked = Result(chunk)
    assert_same(chunked.state, one_by_one.state)
    assert_close(chunked.metrics, one_by_one.metrics)
    assert chunked.episodes == one_by_one.episodes > 0
    assert chunked.returns == pytest.approx(one_by_one.returns, rel=1e-6)


def test_the_run_did_something(one_by_one):
    """Equality would be easy otherwise."""
    assert one_by_one.state.train.updates.tolist() == [20]
    assert one_by_one.state.replay.inserted.tolist() == [80]
    assert one_by_one.state.health.rejected.tolist() == [0]
    # 80 rows of 7-row episodes in 2 environments: the 11th ends at row 77.
    assert one_by_one.episodes == 2 * (80 // 7)


def test_programs_do_not_grow_with_chunk_and_train_ratio():
    """Updates and iterations are scanned: what is compiled is of one size."""
    sizes = []
    for changes in ({}, {"train_ratio": 64.0}, {"chunk": 8}):
        run = regression_run(on_one_device(0), **changes)
        assert run.clock.updates == (64 if "train_ratio" in changes else 2)
        sizes.append(len(run.programs().chunk.lower(*run.chunk_shapes()).as_text()))
    assert max(sizes) < 1.1 * min(sizes)
