"""Recorded episodes: what replay held is what is read back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mbrl import checkpoints, dataset, envs
from mbrl.__main__ import main
from mbrl.errors import UserError
from mbrl.programs import RunState
from mbrl.replay import ReplayState
from mbrl.types import Transition

SPEC = envs.make_jax("pendulum").spec
CAPACITY, ENVS = 10, 2


def rows(seeds: int, count: int, length: int) -> Transition:
    """Rows [S, count, E] whose reward counts them; episodes of ``length`` rows, terminal ones. Some actions
    lie beyond 1."""
    t = np.broadcast_to(np.arange(count)[None, :, None], (seeds, count, ENVS))
    ids = t + 1000.0 * np.arange(ENVS) + 1e6 * np.arange(seeds)[:, None, None]
    obs = {"orientation": np.stack([ids, -ids], -1), "velocity": ids[..., None]}
    obs = {key: value.astype(np.float32) for key, value in obs.items()}
    first, last = t % length == 0, t % length == length - 1
    action = np.where(first, 0, ids / 1e6)[..., None].astype(np.float32)
    return Transition(obs, action, ids.astype(np.float32), first, last, last)


def write_run(path, written: int, seeds: int = 2, length: int = 4, **more):
    """A run folder whose checkpoint holds a ring into which ``written`` rows went."""
    path.mkdir()
    config = {"task": "pendulum", "loop": {"action_repeat": 2}, **more}
    (path / "config.json").write_text(json.dumps({"config": config}))
    every = rows(seeds, written, length)
    ring = dataset._map(lambda x: np.zeros((seeds, CAPACITY, *x.shape[2:]), x.dtype), every)
    for t in range(written):
        for name in dataset._FIELDS:
            getattr(ring, name)[:, t % CAPACITY] = getattr(every, name)[:, t]
        for key in ring.obs:
            ring.obs[key][:, t % CAPACITY] = every.obs[key][:, t]
    ring = ring._replace(latent={"deter": np.ones((seeds, CAPACITY, ENVS, 3), np.float32)})
    state = ReplayState(ring, np.full(seeds, written, np.int32), np.zeros(seeds, np.int32))
    assert checkpoints.save(path / "checkpoints", written, RunState(np.ones(2), (), state, (), ()))
    return path


def test_recorded_episodes_are_exported_once(tmp_path):
    """Every seed of such a run has them in its replay."""
    run = write_run(tmp_path / "run", 8, offline="data")
    assert sum(len(episode.reward) for episode in dataset.from_run(run).episodes) == 8 * ENVS


@pytest.mark.parametrize("written", [7, 10, 23])
def test_what_replay_held_is_what_is_read_back(tmp_path, written):
    """Oldest row first, whether the ring has wrapped or not; split at the episodes' first rows."""
    run = write_run(tmp_path / "run", written)
    dataset.save(tmp_path / "data", dataset.from_run(run), chunk_rows=5)
    found = dataset.load(tmp_path / "data")
    assert found.spec == SPEC and f"after {written} frames" in found.source
    assert len(list((tmp_path / "data").glob("*.npz"))) > 1
    kept = range(max(0, written - CAPACITY), written)
    expected = [s * 1e6 + e * 1000 + t for s in range(2) for e in range(ENVS) for t in kept]
    np.testing.assert_array_equal(np.concatenate([e.reward for e in found.episodes]), expected)
    for episode in found.episodes:
        assert not episode.is_first[1:].any() and not episode.is_last[:-1].any()
        np.testing.assert_array_equal(episode.obs["velocity"][:, 0], episode.reward)
        executed = np.minimum(episode.reward[1:] / 1e6, 1)  # by the environment, which clips
        np.testing.assert_allclose(episode.action[1:, 0], executed, rtol=1e-6)
        assert episode.obs["orientation"].dtype == np.float32 and episode.is_last.dtype == bool


def test_description_by_hand(tmp_path):
    """Seven rows in episodes of four: one whole and one cut episode for each of four columns."""
    said = dataset.describe(dataset.from_run(write_run(tmp_path / "run", 7)))
    assert (said["episodes"], said["whole episodes"], said["terminal episodes"], said["rows"]) == (
        8,
        4,
        4,
        28,
    )
    assert said["length"] == {"mean": 3.5, "std": 0.5, "min": 3.0, "max": 4.0}
    assert said["return"]["min"] == 0 + 1 + 2 + 3 and said["return"]["max"] == 6 + 4 * 1_001_000
    assert said["entries"]["orientation"]["max"] == 1_001_006 == -said["entries"]["orientation"]["min"]
    assert said["entries"]["reward"]["min"] == 1  # the first rows have none


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run = write_run(tmp_path / "run", 7)
    main(["export", str(run), str(tmp_path / "data")])
    exported = capsys.readouterr().out
    main(["data", str(tmp_path / "data")])
    assert capsys.readouterr().out == exported
    assert "28 rows in 8 episodes, 4 of them whole" in exported and "velocity" in exported


def test_mistakes_are_sentences(tmp_path):
    data = tmp_path / "data"
    found = dataset.from_run(write_run(tmp_path / "run", 7))
    dataset.save(data, found)
    with pytest.raises(UserError, match="not empty"):
        dataset.save(data, found)
    with pytest.raises(UserError, match=r"no dataset.*dataset\.json"):
        dataset.load(tmp_path)
    (chunk,) = data.glob("*.npz")
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(UserError, match=r"chunk-00000\.npz cannot be read"):
        dataset.load(data)
    about = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(about | {"schema": 9}))
    with pytest.raises(UserError, match="schema 9"):
        dataset.load(data)
    with pytest.raises(UserError, match="no episodes"):
        dataset.describe(found._replace(episodes=[]))
