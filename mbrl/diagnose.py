"""What made a seed diverge: its state, a batch and a key on which the update is not finite, on disk.

A rejected update leaves a seed's learner as it was, so the state when it froze is the one before the first
bad update. A dump is a checkpoint (`mbrl.checkpoints`): verified, and without pickles.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mbrl import checkpoints
from mbrl.host_replay import HostReplay
from mbrl.programs import DIAGNOSE, RunState, all_finite, example_row, stream
from mbrl.replay import Replay
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds
from mbrl.types import Agent, Array, EnvSpec, PyTree, Trajectory

ATTEMPTS = 16
"""Fresh batches that are tried for one on which the update is not finite."""


class Dump(NamedTuple):
    """One update of one seed: learner before it, batch [T, B], key."""

    train: PyTree
    traj: Trajectory
    key: Array


def make_dumper(
    agent: Agent, replay: Replay, seeds: Seeds, images: HostReplay | None = None
) -> Callable[..., str]:
    """``dump(state, keys, seed, folder, frames) -> sentence`` writes ``nan/seed_<n>/`` of the run folder for
    the seed at position ``seed``. Compiled when first called. Of runs of one process. images: of replay,
    where they do not lie on the device."""

    def attempt(state: RunState, sample_key, update_key, beside):
        traj = replay.sample(state.replay, sample_key, beside)[1].traj
        train, info = agent.update(state.train, traj, update_key)
        return traj, update_key, all_finite((train, info.metrics["loss"]))

    program = seeds.program(attempt)
    draw = seeds.program(lambda key, number: jax.random.split(stream(key, DIAGNOSE, number)), shared=(1,))

    def dump(state: RunState, keys, seed: int, folder: RunFolder, frames: int) -> str:
        if jax.process_count() > 1:
            return "its update is not dumped, which only a run of one process does"
        for number in range(ATTEMPTS):
            drawn = draw(keys, np.int32(number))
            sample_keys, update_keys = drawn[:, 0], drawn[:, 1]
            beside = images.beside(state.replay, sample_keys) if images else {}
            traj, key, good = program(state, sample_keys, update_keys, beside)
            if not good[seed]:
                part = jax.tree.map(lambda x: x[seed], Dump(state.train, traj, key))
                where = folder.path / "nan" / f"seed_{seeds.seeds[seed]}"
                written = checkpoints.save(where, frames, part)
                return f"a bad update is in {where}" if written else "its bad update could not be written"
        return f"{ATTEMPTS} fresh batches gave finite updates, so none was written"

    return dump


def load(folder: str | os.PathLike, agent: Agent, replay: Replay, spec: EnvSpec, num_envs: int) -> Dump:
    """The dump in ``nan/seed_<n>/`` of a run that was made of these parts."""

    def like(key):
        ring = replay.init(example_row(agent, spec, num_envs))
        return Dump(agent.init(key), replay.sample(ring, key)[1].traj, key)

    return checkpoints.restore(Path(folder), jax.eval_shape(like, jax.random.key(0))).state


def replay_update(agent: Agent, dump: Dump) -> dict[str, list[str]]:
    """Does the dumped update again and names what is not finite: the ``batch`` and ``train`` before it, the
    ``metrics`` and ``result`` after it."""
    result, info = jax.jit(agent.update)(*dump)
    parts = {"batch": dump.traj, "train": dump.train, "metrics": info.metrics, "result": result}
    return {name: _bad(tree) for name, tree in parts.items()}


def _bad(tree: PyTree) -> list[str]:
    return [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if not np.isfinite(np.asarray(x, np.float32)).all()
    ]
