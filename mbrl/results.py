"""What a run folder says about its run, as arrays: the input of reports and comparisons."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbrl.errors import UserError
from mbrl.logger import read_metrics
from mbrl.run_folder import RunFolder
from mbrl.tasks import task_name

FRAMES = "simulator frames"


class Result(NamedTuple):
    """A run. path: its folder. record: ``config.json``, whose entry "config" has the settings. summary:
    ``summary.json``. rows: of ``metrics.jsonl``. seeds: [S]. frames [K], returns [K, S]: mean return of every
    evaluation. episodes [S, N]: returns of the last evaluation.
    """

    path: Path
    record: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    seeds: list[int]
    frames: np.ndarray
    returns: np.ndarray
    episodes: np.ndarray

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def agent(self) -> str:
        return self.record.get("agent", "dreamer")

    @property
    def task(self) -> str:
        """Its usual name, with what the agent sees where that is not the state."""
        shown = self.config.get("obs", "state")
        return task_name(self.config["task"]) + ("" if shown == "state" else f"_{shown}")

    @property
    def vary(self) -> dict[str, list[float]]:
        """The settings in which its seeds differ, {dotted field: [S]}; empty but for programs of a sweep."""
        return self.record.get("vary", {})

    @property
    def setting(self) -> dict[str, float]:
        """Of a result that `by_setting` returned: the values of what its sweep varied; else empty."""
        return self.record.get("setting", {})

    @property
    def offline(self) -> bool:
        """Whether it learned from recorded episodes."""
        return bool(self.config.get("offline"))

    @property
    def unit(self) -> str:
        """What the clock of the run counts."""
        return "updates" if self.offline else FRAMES

    def metric(self, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(frames [N], values [N]) of one logged metric of one seed; values that were not finite are NaN."""
        found = [(row["step"], row[name]) for row in self.rows if row["seed"] == seed and name in row]
        frames, values = zip(*found) if found else ((), ())
        numbers = [np.nan if value is None else value for value in values]
        return np.array(frames, np.float64), np.array(numbers, np.float64)

    def metrics(self) -> list[str]:
        """Names of all logged metrics, sorted."""
        return sorted({name for row in self.rows for name in row} - {"step", "seed"})

    def train_seconds(self) -> np.ndarray:
        """[K] wall seconds of training, all seeds together, when the evaluations were made."""
        frames, seconds = self.metric("time/train", self.seeds[0])
        return np.interp(self.frames, frames, seconds) if frames.size else np.full(len(self.frames), np.nan)

    def at(self, frames: float) -> np.ndarray:
        """[S] returns of the last evaluation that was made within ``frames``; NaN before the first."""
        within = np.flatnonzero(self.frames <= frames)
        return self.returns[within[-1]] if within.size else np.full(len(self.seeds), np.nan)


def read(path: str | os.PathLike) -> Result:
    """The run in a folder, finished or going on. Raises UserError when there is none, or no evaluation."""
    path = Path(path)
    record = RunFolder.config_of(path)
    if "config" not in record:
        raise UserError(f"{path / 'config.json'} has no settings (entry 'config')")
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} has no summary.json yet: its run has not been evaluated") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'summary.json'} cannot be read: {error}") from error
    if "evaluations" not in summary:
        raise UserError(f"{path} holds no evaluations of an agent: nothing was played")
    evaluations = summary["evaluations"]
    as_numbers = lambda values: np.array(values, np.float64)  # null, where a seed failed, is NaN
    return Result(
        path=path,
        record=record,
        summary=summary,
        rows=read_metrics(path),
        seeds=summary["seeds"],
        frames=as_numbers([one["env_steps"] for one in evaluations]),
        returns=as_numbers([one["per_seed"] for one in evaluations]),
        episodes=as_numbers(summary["eval_return"]["episodes"]),
    )


def by_setting(result: Result) -> list[Result]:
    """A run whose seeds differ in settings as one result for each of them, with its values in its config; any
    other run as it is. Of the summary only what `Result` has as arrays is divided."""
    if not result.vary:
        return [result]
    positions: dict[tuple[float, ...], list[int]] = {}
    for i, values in enumerate(zip(*result.vary.values(), strict=True)):
        positions.setdefault(values, []).append(i)
    parts = []
    for values, own in positions.items():
        config, setting = result.config, dict(zip(result.vary, values, strict=True))
        for name, value in setting.items():
            config = _with_field(config, name, value)
        record = result.record | {"config": config, "vary": {}, "setting": setting}
        seeds, returns = [result.seeds[i] for i in own], result.returns[:, own]
        rows = [row for row in result.rows if row["seed"] in seeds]
        parts.append(
            result._replace(
                record=record, rows=rows, seeds=seeds, returns=returns, episodes=result.episodes[own]
            )
        )
    return parts


def _with_field(config: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of a nested config with a field by its dotted name."""
    field, _, rest = name.partition(".")
    return {**config, field: _with_field(config[field], rest, value) if rest else value}


def settings_of(vary: Mapping[str, Sequence[float]]) -> list[str]:
    """The setting of each seed in words, from {dotted field: [S]}; empty where they do not differ."""
    return [describe(dict(zip(vary, values, strict=True))) for values in zip(*vary.values(), strict=True)]


def describe(values: Mapping[str, float]) -> str:
    """A setting of a sweep in words."""
    return ", ".join(f"{name}={value:g}" for name, value in values.items())
