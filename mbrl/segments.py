"""Rows of replay on disk, in files that are written once: a checkpoint writes only what is new.

``checkpoints/rows/000000000000-000000004000-0123456789ab.npz`` holds rows 0 to 3999 of every seed and
environment and is named by the start of its sha256. Several checkpoints refer to the same file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl.run_folder import sync_directory

FOLDER = "rows"
FILE_BYTES = 2**28
"""A file holds at most about this much, so that no copy of a large replay is made in memory."""


class Segment(NamedTuple):
    """Rows ``first`` to ``stop - 1`` since the start of the run. file: below the folder of checkpoints."""

    file: str
    first: int
    stop: int
    sha256: str


def extend(
    folder: Path, known: Sequence[Segment], rings: dict[str, Any], inserted: int, capacity: int
) -> list[Segment]:
    """The segments that hold all of replay: those of ``known`` that still matter, and new ones for the rows
    that came since, which are on disk when this returns.

    rings: arrays [S, capacity, ...] by name, of plain NumPy dtypes. inserted: rows ever written.
    """
    oldest = max(0, inserted - capacity)
    first = max(known[-1].stop if known else 0, oldest)
    row_bytes = sum(x.size // x.shape[1] * x.dtype.itemsize for x in rings.values())
    step = max(1, FILE_BYTES // max(1, row_bytes))
    new = [
        _write(folder, rings, start, min(start + step, inserted), capacity)
        for start in range(first, inserted, step)
    ]
    return [segment for segment in known if segment.stop > oldest] + new


def fill(
    folder: Path, segments: Iterable[Segment], rings: dict[str, np.ndarray], inserted: int, capacity: int
) -> None:
    """Writes the rows of the segments into arrays [S, capacity, ...] by name, each row where it was."""
    for segment in segments:
        rows = np.arange(max(segment.first, inserted - capacity), segment.stop)
        with np.load(folder / segment.file, allow_pickle=False) as file:
            for name, ring in rings.items():
                ring[:, rows % capacity] = file[name][:, rows - segment.first]


def remove_others(folder: Path, wanted: Iterable[Segment]) -> None:
    """Deletes the files that no checkpoint refers to."""
    keep = {segment.file for segment in wanted}
    for path in (folder / FOLDER).glob("*"):
        if f"{FOLDER}/{path.name}" not in keep:
            path.unlink(missing_ok=True)


def _write(folder: Path, rings: dict[str, Any], first: int, stop: int, capacity: int) -> Segment:
    rows = np.arange(first, stop) % capacity
    saving = folder / FOLDER / ".saving"
    saving.parent.mkdir(parents=True, exist_ok=True)
    with open(saving, "w+b") as file:
        np.savez(file, allow_pickle=False, **_take(rings, rows))  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{FOLDER}/{first:012d}-{stop:012d}-{digest[:12]}.npz"
    os.replace(saving, folder / name)
    sync_directory(saving.parent)
    return Segment(name, first, stop, digest)


def _take(rings: dict[str, Any], rows: np.ndarray) -> dict[str, np.ndarray]:
    on_device = {name: x for name, x in rings.items() if isinstance(x, jax.Array)}
    taken = {name: np.asarray(x) for name, x in _gather(on_device, rows).items()}
    return taken | {name: x[:, rows] for name, x in rings.items() if name not in on_device}


@jax.jit
def _gather(rings: dict[str, jax.Array], rows: Any) -> dict[str, jax.Array]:
    return {name: x[:, rows] for name, x in rings.items()}
