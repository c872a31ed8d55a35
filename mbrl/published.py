"""Published learning curves that come with the package, to compare a run with (``mbrl/data/README.md``)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from mbrl.tasks import task_name

SETTINGS = {"dreamerv3": "size12m, action repeat 2, train ratio 512", "tdmpc2": "5M, action repeat 2"}
METHODS = {"dreamer": "dreamerv3", "tdmpc": "tdmpc2"}
"""Whose published curves an agent is compared with; other agents have none here."""
FILES = "dreamer_dmc_curves.csv", "tdmpc2_dmc_curves.csv"


def method_of(record: Mapping[str, Any]) -> str:
    """Whose published curves a run is compared with, from what its ``config.json`` holds; "" for nobody's."""
    return METHODS.get(record.get("agent", "dreamer"), "")


class PublishedCurve(NamedTuple):
    """One published curve. frames [N] int64, increasing, simulator frames with action repeat included;
    mean, std [N] float64: episode return, over ``num_seeds`` seeds, std NaN where it was not published;
    source: where it was published."""

    frames: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    num_seeds: int
    source: str
    task: str
    method: str

    @property
    def label(self) -> str:
        """What it is, in a legend."""
        spread = " ± std" if np.isfinite(self.std).any() else ""
        return f"{self.method}, published, mean{spread} of {self.num_seeds} seeds"


class PublishedScore(NamedTuple):
    """One point of a published curve: return ``mean`` +- ``std`` over ``num_seeds`` seeds at ``frames``."""

    frames: int
    mean: float
    std: float
    num_seeds: int
    source: str

    def text(self, digits: int = 0) -> str:
        """The mean, and the standard deviation where it is known."""
        spread = f" ± {self.std:.{digits}f}" if np.isfinite(self.std) else ""
        return f"{self.mean:.{digits}f}{spread}"


@cache
def _curves() -> dict[tuple[str, str, str], PublishedCurve]:
    rows: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    # importlib.resources, not __file__: the package may be installed as a wheel or a zip.
    for name in FILES:
        with (files("mbrl") / "data" / name).open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault((row["suite"], row["method"], row["task"]), []).append(row)
    return {key: _curve_of(key, value) for key, value in rows.items()}


def _curve_of(key: tuple[str, str, str], rows: list[dict[str, str]]) -> PublishedCurve:
    rows = sorted(rows, key=lambda row: int(row["frames"]))
    return PublishedCurve(
        frames=np.array([int(row["frames"]) for row in rows]),
        mean=np.array([float(row["mean"]) for row in rows]),
        std=np.array([float(row["std"] or "nan") for row in rows]),
        num_seeds=max(int(row["num_seeds"]) for row in rows),
        source=f"{rows[0]['source']} ({SETTINGS[key[1]]})",
        task=key[2],
        method=key[1],
    )


def tasks(method: str = "dreamerv3", suite: str = "dmc_proprio") -> list[str]:
    """The tasks that have a published curve of ``method`` in ``suite``, sorted; empty when there are none."""
    return sorted(task for s, m, task in _curves() if (s, m) == (suite, method))


def suite_of(task: str) -> str:
    """The suite that a run is comparable with: the name of one that sees pixels alone ends in ``_pixels``."""
    return "dmc_vision" if task.endswith("_pixels") else "dmc_proprio"


def curve(task: str, method: str = "dreamerv3", suite: str | None = None) -> PublishedCurve | None:
    """The published curve of ``task``, or None when there is none.

    task: as users type it (``walker_walk``, ``cup_catch``), or with ``_pixels`` behind it. suite:
    ``dmc_proprio`` (state observations) or ``dmc_vision``, by default that of the name. Values of dreamerv3
    are averages over bins of 25,000 (50,000) frames, placed at the bin's mean frame; those of tdmpc2 are
    evaluations every 100,000 frames.
    """
    suite = suite or suite_of(task)
    return _curves().get((suite, method, task_name(task.removesuffix("_pixels"))))


def score_at(
    task: str, frames: int, method: str = "dreamerv3", suite: str | None = None
) -> PublishedScore | None:
    """The published return of ``task`` after ``frames`` simulator frames, interpolated linearly.

    None when there is no curve, when ``frames`` lies before its first point (15,000 for dreamerv3 in
    ``dmc_proprio``, 100,000 for tdmpc2) or more than one bin after its last one: nothing is extrapolated.
    """
    found = curve(task, method, suite)
    if found is None:
        return None
    bin_width = int(found.frames[1] - found.frames[0])
    if not found.frames[0] <= frames <= found.frames[-1] + bin_width:
        return None
    return PublishedScore(
        frames=int(frames),
        mean=float(np.interp(frames, found.frames, found.mean)),
        std=float(np.interp(frames, found.frames, found.std)),
        num_seeds=found.num_seeds,
        source=found.source,
    )
