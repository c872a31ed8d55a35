"""Where images of replay lie changes nothing but that: batches, training, checkpoints to the last bit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import tests.mesh
from mbrl import checkpoints, diagnose
from mbrl.drivers import HostDriver, OfflineDriver, Source
from mbrl.envs.pool import HostPool
from mbrl.errors import UserError
from mbrl.host_replay import HostReplay, allocate
from mbrl.logger import read_metrics
from mbrl.programs import make_offline_clock
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds
from mbrl.train import Run, train
from mbrl.types import ArraySpec, EnvSpec, TimeStep, Trajectory
from tests.helpers import (
    MODEL,
    as_numpy,
    assert_close,
    assert_same,
    on_one_device,
    rng_words,
    set_rng,
    tiny_run,
)
from world_models import rssm

SPEC = EnvSpec(
    "dots",
    {"image": ArraySpec((8, 8, 3), "uint8"), "other": ArraySpec((8, 8, 1), "uint8"), "x": ArraySpec((2,))},
    ArraySpec((1,)),
    max_steps=6,
)
ITERATIONS = 8


class Dots:
    """Random pictures, and a random reward; episodes of six steps."""

    spec = SPEC

    def __init__(self, seed: int):
        self.rng, self.count = np.random.default_rng(seed), 0

    def show(self) -> TimeStep:
        entries = {"image": (8, 8, 3), "other": (8, 8, 1)}
        obs = {key: self.rng.integers(0, 256, shape, np.uint8) for key, shape in entries.items()}
        obs["x"] = self.rng.normal(size=2).astype(np.float32)
        return TimeStep(obs, np.float32(self.rng.normal()), self.count == 6, False)

    def reset(self) -> TimeStep:
        self.count = 0
        return self.show()

    def step(self, action) -> TimeStep:
        self.count += 1
        return self.show()

    def get_state(self):
        return {"count": np.array(self.count), "rng": rng_words(self.rng)}

    def set_state(self, state):
        self.count = int(state["count"])
        set_rng(self.rng, state["rng"])

    def render(self, height, width):
        raise RuntimeError

    def close(self): ...


SOURCE = Source(SPEC, None, lambda seed, index: Dots(seed))
SEEDS = Seeds.make(3, 2)


def make_run(place: str, seeds: Seeds = SEEDS, **loop) -> Run:
    """Iterations of 8 rows and 2 updates, 20 updates before the first; a ring of 20 rows. Latents go back."""
    made = tests.mesh.make_run(seeds, SOURCE, steps=16 * ITERATIONS, replay_size=40, **loop)
    assert (made.clock.capacity, made.clock.total, made.clock.prefill) == (20, ITERATIONS, 2)
    return dataclasses.replace(made, place=place)


def learn(run: Run, folder: Path = Path(), pretrain: bool = True):
    """The whole state, as a checkpoint holds it, and the metrics of each iteration."""
    images, programs, keys = run.host_replay(folder), run.programs(), run.seeds.keys()
    programs = programs if images is None else images.programs(programs)
    pool = HostPool([Dots(i) for i in range(len(run.seeds) * run.config.num_envs)])
    driver, logged = HostDriver(programs, pool, run.seeds, run.config.num_envs, run.clock.rows), []
    state = programs.init(keys)
    for i in range(ITERATIONS):
        if pretrain and i == run.clock.prefill:
            state, _ = programs.pretrain(state, keys)
        state, metrics, _ = driver.advance(state, keys, i, i >= run.clock.prefill)
        logged += [as_numpy(metrics)] if metrics else []
    return as_numpy(state if images is None else images.whole(state)), logged


@pytest.fixture(scope="module")
def on_device():
    return learn(make_run("device"))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_training_is_bit_equal(on_device, tmp_path, place):
    """Two seeds on two devices; a burst of updates, a ring that wraps, latents written back: everything that a
    checkpoint holds."""
    run = make_run(place)
    state, logged = learn(run, tmp_path)
    assert_same(state, on_device[0])
    assert_close(logged, on_device[1])
    assert state.train.updates.tolist() == [20 + 6 * run.clock.updates] * 2
    assert state.replay.inserted.tolist() == [8 * ITERATIONS] * 2
    assert len(np.unique(state.replay.data.obs["image"])) > 200
    assert np.abs(state.replay.data.latent).max() > 0
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_rows_that_come_after_the_first_batch_was_gathered(monkeypatch):
    """The thread is ahead at every burst, whatever the machine does: a sequence gets the images of its added
    rows. Drawn uniformly, some have a few of them; in the order they came, all or none."""
    kept, uniform = HostReplay._begin, {"replay_online": False}

    def begin(*args):
        burst = kept(*args)
        burst.first.result()
        return burst

    monkeypatch.setattr(HostReplay, "_begin", begin)
    found, expected = (learn(make_run(place, **uniform))[0] for place in ("host", "device"))
    assert_same(found, expected)


# Evaluations of host environments are made of other programs; none is needed here.
INTERVALS = {"log_every": 16, "eval_every": 0, "checkpoint_every": 48}


def finish(run: Run, path: Path, resume: bool = False):
    """The log, without times, of a run that is trained in a folder to its end."""
    open_folder = RunFolder.open_for_resume(path) if resume else RunFolder.create(path, {})
    with open_folder as folder:
        train(run, folder, resume)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(path)]


def test_a_run_goes_on_wherever_its_images_lie(tmp_path):
    """A checkpoint is the same for all places: begun in the memory of the host, continued on disk and on the
    device, inside a wrapped ring. State and log end as those of the run that nothing stopped."""

    def placed(place: str) -> Run:
        run = make_run(place)
        return dataclasses.replace(run, config=dataclasses.replace(run.config, **INTERVALS))

    def final(path: Path):
        return as_numpy(checkpoints.restore(path / "checkpoints", placed("device").shapes).state)

    whole = tmp_path / "whole"
    logged = finish(placed("host"), whole)
    expected = final(whole)
    *_, before, last = checkpoints.steps(whole / "checkpoints")
    assert (before, last) == (96, 128)
    for place in ("disk", "device"):
        part = tmp_path / place
        shutil.copytree(whole, part)
        shutil.rmtree(part / "checkpoints" / f"{last:012d}")
        rows = finish(placed(place), part, resume=True)
        assert_same(final(part), expected)
        for row, other in zip(rows, logged, strict=True):
            assert_close(row, other)


def test_images_that_were_read_into_other_arrays_are_kept(on_device):
    """As from a checkpoint of several processes, whose rows are not in files of their own."""
    images = make_run("host").host_replay(Path())
    assert images is not None
    part = images.part(on_device[0])
    assert sorted(part.replay.data.obs) == ["x"]
    assert_same(images.whole(part), on_device[0])


def test_dreamer_is_bit_equal():
    """Twice two updates of Dreamer that draws pictures, latents written back; two seeds that take turns."""
    seeds, model = (
        on_one_device(3, 4, loop=True),
        dataclasses.replace(MODEL, image_reading="mlp", image_depth=1),
    )

    def run(place: str) -> Run:
        made = tiny_run(SOURCE, seeds, ITERATIONS, model=rssm.make(model, SPEC), replay_size=40)
        return dataclasses.replace(made, place=place)

    (state, logged), (expected, rows) = (
        learn(run("host"), pretrain=False),
        learn(run("device"), pretrain=False),
    )
    assert_same(state, expected)
    assert_close(logged, rows)
    assert state.train.updates.tolist() == [2 * (ITERATIONS - 2)] * 2


def test_recorded_images():
    """Fifteen updates from recorded rows, the same for both seeds."""
    rng, run = np.random.default_rng(0), make_run("device")
    entry = lambda a: rng.integers(0, 256, (30, 2, *a.shape)).astype(a.dtype)
    first = np.arange(30)[:, None].repeat(2, 1) % 10 == 0
    obs = {key: entry(a) for key, a in SPEC.obs.items()}
    action, reward = (rng.normal(size=(30, 2, *shape)).astype(np.float32) for shape in ((1,), ()))
    rows = Trajectory(obs, action, reward, first, first[::-1], first & False)
    clock = make_offline_clock(run.config, 15, 30)._replace(updates=5, total=3)

    def ended(place: str):
        placed = dataclasses.replace(run, place=place, clock=clock, recorded=rows)
        images, programs, keys = placed.host_replay(Path()), placed.programs(), SEEDS.keys()
        programs = programs if images is None else images.programs(programs)
        driver, state = OfflineDriver(programs, 2), programs.fill(programs.init(keys), rows)
        for i in range(3):
            state, _, _ = driver.advance(state, keys, i, True)
        return as_numpy(state if images is None else images.whole(state))

    found = ended("host")
    assert_same(found, ended("device"))
    np.testing.assert_array_equal(found.replay.data.obs["image"], np.stack([obs["image"]] * 2))
    assert found.train.updates.tolist() == [15] * 2


def test_a_bad_update_is_dumped_with_its_images(tmp_path, monkeypatch):
    """Rewards that are not finite freeze both seeds; what is dumped does not depend on where images lay."""
    kept = HostDriver.advance

    def poisoned(self, state, keys, iteration, learning):
        data = state.replay.data
        bad = data._replace(reward=data.reward * np.nan)
        return kept(self, state._replace(replay=state.replay._replace(data=bad)), keys, iteration, learning)

    monkeypatch.setattr(HostDriver, "advance", poisoned)
    dumps = []
    for place in ("device", "host"):
        run, path = make_run(place), tmp_path / place
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, freeze_after=3, eval_every=0))
        with pytest.raises(UserError, match="no seed learns any more"):
            finish(run, path)
        where = path / "nan" / "seed_4"
        dumps.append(diagnose.load(where, run.agent, run.ring(), SPEC, run.config.num_envs))
    assert_same(*(as_numpy((dump.train, dump.traj, jax.random.key_data(dump.key))) for dump in dumps))
    assert dumps[0].traj.obs["image"].max() > 0


def test_the_program_that_was_planned_is_the_one_that_runs(monkeypatch):
    """Compiled from shapes for the memory plan, it is not compiled again; two batches at most are there."""
    run, alive = make_run("host"), []
    programs, kept = run.programs(), HostReplay._batch
    programs.step.lower(*run.step_shapes()).compile()

    def batch(*args):
        images, key = kept(*args)
        alive.append(sum(x.shape == images["image"].shape for x in jax.live_arrays()))
        return images, key

    monkeypatch.setattr(HostReplay, "_batch", batch)
    monkeypatch.setattr(Run, "programs", lambda self: programs)
    learn(run)
    assert programs.step._cache_size() == 1
    assert len(alive) == 20 + 6 * run.clock.updates and max(alive) <= 2


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"has no room for 3\.0 GiB of images \(No space left") as error:
        allocate({"image": ArraySpec((32, 32, 1), "uint8")}, (3, 2**10, 2**10), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
