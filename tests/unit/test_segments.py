"""Rows of replay in files that are written once: whatever was saved when, what is read is what replay held."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import checkpoints, segments
from mbrl.errors import UserError
from mbrl.programs import RunState
from mbrl.replay import ReplayState
from mbrl.types import Transition
from tests.helpers import assert_same

SEEDS, CAPACITY, ENVS = 2, 11, 3


def empty() -> RunState:
    shape = (SEEDS, CAPACITY, ENVS)
    flags = [np.zeros(shape, bool) for _ in range(3)]
    obs = {"image": np.zeros((*shape, 2, 2), np.uint8), "x": np.zeros((*shape, 1), np.float32)}
    latent = {"deter": np.zeros((*shape, 2), np.float16)}
    data = Transition(obs, np.zeros((*shape, 1), np.float32), np.zeros(shape, np.float32), *flags, latent)
    count = np.zeros(SEEDS, np.int32)
    return RunState({"params": np.arange(4.0, dtype=np.float32)}, (), ReplayState(data, count, count), (), ())


def add(state: RunState, rng, n: int) -> RunState:
    """``n`` random rows; the latents of all rows change, as they do in training."""
    replay = jax.tree.map(np.array, state.replay)
    rows = (replay.inserted[0] + np.arange(n)) % CAPACITY
    for leaf in jax.tree.leaves(replay.data._replace(latent=())):
        leaf[:, rows] = rng.integers(0, 2 if leaf.dtype == bool else 200, (SEEDS, n, *leaf.shape[2:]))
    replay.data.latent["deter"][...] = rng.normal(size=replay.data.latent["deter"].shape)
    return state._replace(replay=replay._replace(inserted=replay.inserted + np.int32(n)))


def files(folder) -> dict[str, int]:
    """{file: inode} of all rows on disk."""
    return {path.name: path.stat().st_ino for path in (folder / "rows").iterdir()}


@pytest.mark.parametrize("seed", range(4))
def test_against_the_ring_itself(tmp_path, monkeypatch, seed):
    """Rows in any portions, saved at any time, the run resumed now and then: every checkpoint that is kept can
    be restored, no file is written twice, and none is left that nobody needs."""
    monkeypatch.setattr(segments, "FILE_BYTES", [10**9, 200][seed % 2])  # 62 bytes a row
    rng, state, known, step, kept = np.random.default_rng(seed), empty(), [], 0, {}
    for _ in range(25):
        state = add(state, rng, int(rng.integers(1, CAPACITY + 1)))
        if rng.random() < 0.3:
            continue
        step, before = step + 1, files(tmp_path) if known else {}
        assert checkpoints.save(tmp_path, step, state, segments=known)
        kept[step] = state
        now = files(tmp_path)
        assert all(now[name] == before[name] for name in now.keys() & before.keys())
        assert {f"rows/{name}" for name in now} >= {segment.file for segment in known}
        assert not known or min(segment.stop for segment in known) > state.replay.inserted[0] - CAPACITY
        restored = checkpoints.restore(tmp_path, empty())
        assert_same(restored.state, state)
        if rng.random() < 0.3:
            known = restored.segments
    newest, older = sorted(kept, reverse=True)[:2]
    needed = {segment.file for at in (newest, older) for segment in checkpoints._segments_of(tmp_path, at)}
    assert needed == {f"rows/{name}" for name in files(tmp_path)}
    (tmp_path / f"{newest:012d}" / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match=f"step {newest} is skipped"):
        assert_same(checkpoints.restore(tmp_path, empty()).state, kept[older])


def test_only_new_rows_are_written(tmp_path):
    """Without a list of segments all of them are."""
    rng, known = np.random.default_rng(0), []
    state = add(empty(), rng, 6)
    checkpoints.save(tmp_path, 1, state, segments=known)
    checkpoints.save(tmp_path, 2, state, segments=known)
    assert [(s.first, s.stop) for s in known] == [(0, 6)]
    state = add(state, rng, 4)
    checkpoints.save(tmp_path, 3, state, segments=known)
    assert [(s.first, s.stop) for s in known] == [(0, 6), (6, 10)]
    state = add(add(state, rng, 7), rng, 8)  # more than the ring holds, of which the first are gone
    checkpoints.save(tmp_path, 4, state, segments=known)
    assert [(s.first, s.stop) for s in known] == [(14, 25)]
    checkpoints.save(tmp_path, 5, state)
    assert [(s.first, s.stop) for s in checkpoints.restore(tmp_path, empty()).segments] == [(14, 25)]
    manifest = checkpoints._manifest(tmp_path / "000000000004")
    rings = [manifest["leaves"][int(name)]["path"] for name in manifest["rows"]["leaves"]]
    assert rings == [f".replay.data.{name}" for name in (
        "obs['image']", "obs['x']", "action", "reward", "is_first", "is_last", "is_terminal",
    )]  # fmt: skip


def test_arrays_on_devices(tmp_path):
    """As those of NumPy; what is restored may be donated."""
    state = jax.tree.map(jnp.asarray, add(empty(), np.random.default_rng(0), 9))
    checkpoints.save(tmp_path, 1, state)
    restored = checkpoints.restore(tmp_path, jax.eval_shape(lambda: state)).state
    assert_same(restored, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(jax.jit(lambda tree: tree, donate_argnums=0)(restored), state)


@pytest.mark.parametrize("fault", ["truncate", "flip", "delete"])
def test_a_damaged_file_is_named(tmp_path, fault):
    """The checkpoint before is used where it can do without it; what needs no replay reads no row."""
    rng, known = np.random.default_rng(0), []
    first = add(empty(), rng, 6)
    checkpoints.save(tmp_path, 1, first, segments=known)
    checkpoints.save(tmp_path, 2, add(first, rng, 4), segments=known)
    for position in (1, 0):
        path = tmp_path / known[position].file
        data = path.read_bytes()
        path.unlink()
        if fault != "delete":
            path.write_bytes(
                data[: len(data) // 2] + (b"" if fault == "truncate" else b"!" + data[len(data) // 2 + 1 :])
            )
        with pytest.warns(RuntimeWarning) as caught:
            if position == 1:
                restored = checkpoints.restore(tmp_path, empty())
                assert restored.step == 1
                assert_same(restored.state, first)
            else:
                with pytest.raises(UserError, match="none of its 2 checkpoints is intact"):
                    checkpoints.restore(tmp_path, empty())
        assert "step 2 is skipped" in str(caught[0].message) and str(path) in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoints.restore(tmp_path, empty().train, part=".train").step == 2


def test_what_a_kill_left_is_removed(tmp_path, monkeypatch):
    """A file that was being written, and one that no finished checkpoint knows; a failed save changes nothing."""
    rng, known = np.random.default_rng(0), []
    state = add(empty(), rng, 3)
    checkpoints.save(tmp_path, 1, state, segments=known)
    (tmp_path / "rows" / ".saving").write_bytes(b"half")

    def full(*args):
        raise OSError(28, "No space left on device")

    before, more = list(known), add(state, rng, 3)
    with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match="step 2 was not written"):
        patched.setattr(checkpoints, "_write_arrays", full)
        assert not checkpoints.save(tmp_path, 2, more, segments=known)
    assert known == before and len(files(tmp_path)) >= 1
    assert_same(checkpoints.restore(tmp_path, empty()).state, state)
    assert checkpoints.save(tmp_path, 3, add(more, rng, 1), segments=known)
    assert [(s.first, s.stop) for s in known] == [(0, 3), (3, 7)] and len(files(tmp_path)) == 2


def test_seeds_that_wrote_unequally_are_refused(tmp_path):
    state = empty()
    state = state._replace(replay=state.replay._replace(inserted=np.array([1, 2], np.int32)))
    with pytest.raises(ValueError, match=r"equally many rows, found \[1, 2\]"):
        checkpoints.save(tmp_path, 1, state)
