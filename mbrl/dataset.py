"""Recorded episodes on disk: taken out of a run's replay, read back, described.

A dataset is a folder with ``dataset.json`` (what the arrays are and where they come from) and
``chunk-00000.npz`` and so on: whole episodes one after the other, rows as in `mbrl.types.Transition`, so
``action[t]`` led to ``obs[t]`` and every episode begins with ``is_first``. The arrays are plain NumPy.
`mbrl.hdf5` reads what others have recorded.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbrl import checkpoints, hdf5
from mbrl.drivers import stored_source
from mbrl.errors import UserError
from mbrl.multitask import TASK, pad_episode
from mbrl.run_folder import RunFolder, write_atomic, write_json
from mbrl.types import EnvSpec, Trajectory

SCHEMA = 1
CHUNK_ROWS = 50_000
_FIELDS = ("action", "reward", "is_first", "is_last", "is_terminal")


class Dataset(NamedTuple):
    """spec: of the environment that was recorded. episodes: trajectories [T, ...] of one environment each. A
    column whose last row is not ``is_last`` was cut off. source: free text, where they come from."""

    spec: EnvSpec
    episodes: list[Trajectory]
    source: str


def from_run(run_dir: str | os.PathLike) -> Dataset:
    """The episodes in a run's replay, all seeds and environments, in the order in which they were recorded;
    of a run that learned from recorded episodes, these. Continuous actions are those that environments
    executed, clipped to [-1, 1]: replay holds what was drawn, and Dreamer's noise may exceed that.

    Episodes that were still going on, or whose beginning replay has overwritten, are cut there. Raises
    UserError when there is no run or no checkpoint.
    """
    stored = RunFolder.config_of(run_dir)
    step, arrays = checkpoints.read_arrays(
        Path(run_dir) / "checkpoints",
        *(f".replay.data.{name}" for name in ("obs", *_FIELDS)),
        ".replay.inserted",
    )
    spec = stored_source(stored).spec
    inserted = arrays.pop(".replay.inserted")
    if stored["config"].get("offline"):  # then every seed has the same rows
        inserted = inserted[:1]
    rows: dict[str, Any] = {path.removeprefix(".replay.data."): x for path, x in arrays.items()}
    data = Trajectory(obs={k: rows[f"obs[{k!r}]"] for k in spec.obs}, **{k: rows[k] for k in _FIELDS})
    if spec.action.classes is None:
        data = data._replace(action=np.clip(data.action, -1.0, 1.0))
    episodes = []
    for seed, written in enumerate(inserted):
        columns = _map(lambda x, seed=seed, n=int(written): _unrolled(x[seed], n), data)
        for env in range(columns.reward.shape[1]):
            episodes += split(_map(lambda x, env=env: x[:, env], columns))
    name = Path(run_dir).resolve().name
    return Dataset(spec, episodes, f"replay of {spec.name} run {name} after {step:,} frames")


def split(column: Trajectory) -> list[Trajectory]:
    """Episodes of one environment's rows [T, ...]; each begins where ``is_first`` says so, or with row 0."""
    starts = np.flatnonzero(column.is_first)
    starts = np.unique(np.concatenate([[0], starts]))
    ends = [*starts[1:], len(column.is_first)]
    return [_map(lambda x, a=a, b=b: x[a:b], column) for a, b in zip(starts, ends) if b > a]


def save(folder: str | os.PathLike, dataset: Dataset, chunk_rows: int = CHUNK_ROWS) -> None:
    """Writes a dataset into a new folder, or an empty one. Raises UserError when it is neither, or when it
    cannot be written."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder for the dataset")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for number, chunk in enumerate(_chunks(dataset.episodes, chunk_rows)):
            names.append(f"chunk-{number:05d}.npz")
            _write_chunk(folder / names[-1], chunk)
        about = {
            "schema": SCHEMA,
            "source": dataset.source,
            "spec": dataclasses.asdict(dataset.spec),
            "episodes": len(dataset.episodes),
            "rows": sum(len(e.reward) for e in dataset.episodes),
            "chunks": names,
        }
        write_json(folder / "dataset.json", about)  # last: with it the dataset is whole
    except OSError as error:
        raise UserError(f"dataset {folder} cannot be written: {error.strerror or error}") from error


def load(path: str | os.PathLike) -> Dataset:
    """Reads a dataset: a folder that `save` wrote, the folder of a local Minari dataset, or a file
    ``*.hdf5`` as D4RL has them. Raises UserError when there is none, when it is damaged, of a newer release,
    or holds what no agent here can use."""
    folder = Path(path)
    if hdf5.is_minari(folder):
        return Dataset(*hdf5.read_minari(folder))
    if folder.suffix in (".hdf5", ".h5"):
        return Dataset(*hdf5.read_d4rl(folder))
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no dataset in {folder}: it must be a folder with dataset.json, which python -m mbrl "
            "export writes, the folder of a Minari dataset, or a file *.hdf5"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'dataset.json'} cannot be read: {error}") from error
    if about.get("schema") != SCHEMA:
        raise UserError(f"dataset {folder} has schema {about.get('schema')}, this release reads {SCHEMA}")
    spec = EnvSpec.of_json(about["spec"])
    episodes = []
    for name in about["chunks"]:
        try:
            with np.load(folder / name, allow_pickle=False) as file:
                obs = {key: file[f"obs/{key}"] for key in spec.obs}
                rows = Trajectory(obs=obs, **{field: file[field] for field in _FIELDS})
                ends = np.cumsum(file["lengths"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from error
        starts = [0, *ends[:-1]]
        episodes += [_map(lambda x, a=a, b=b: x[a:b], rows) for a, b in zip(starts, ends)]
    if len(episodes) != about["episodes"]:
        raise UserError(
            f"dataset {folder} has {len(episodes)} episodes where it should have {about['episodes']}"
        )
    return Dataset(spec, episodes, about["source"])


def load_joined(paths: str, task_spec: EnvSpec | None = None) -> Dataset:
    """The episodes of several datasets, whose paths are separated by commas, as one.

    task_spec: of the environment that they are used with; of several tasks, each may have datasets of its
    own. Raises UserError where they do not fit together, and where a task has none.
    """
    named = [(path.strip(), load(path.strip())) for path in paths.split(",")]
    spec = named[0][1].spec if task_spec is None else task_spec
    fitting = [as_task(path, found, spec) for path, found in named]
    episodes = [episode for found in fitting for episode in found.episodes]
    if spec.tasks:
        learned = {int(number) for episode in episodes for number in np.unique(episode.obs[TASK])}
        for number, task in enumerate(spec.tasks):
            if number not in learned:
                raise UserError(f"--offline has no episodes of {task.name}: name a dataset of it too")
    return Dataset(spec, episodes, "; ".join(found.source for found in fitting))


def as_task(path: str, found: Dataset, spec: EnvSpec) -> Dataset:
    """The dataset as one of ``spec``: where that is several tasks, episodes of the one that it names are
    padded. Raises UserError where it does not fit."""
    if not spec.tasks or found.spec.tasks:
        check_fits(path, found.spec, spec)
        return found
    names = [task.name for task in spec.tasks]
    if found.spec.name not in names:
        raise UserError(
            f"{path} has episodes of {found.spec.name}, which is none of the tasks: {', '.join(names)}"
        )
    number = names.index(found.spec.name)
    check_fits(path, found.spec, spec.tasks[number])
    episodes = [pad_episode(episode, number, spec) for episode in found.episodes]
    return Dataset(spec, episodes, found.source)


def check_fits(path: str, found: EnvSpec, wanted: EnvSpec) -> None:
    """UserError unless what was recorded has the observations, actions, action repeat and tasks of
    ``wanted``."""
    for key in sorted({*found.obs, *wanted.obs}):
        ours, theirs = wanted.obs.get(key), found.obs.get(key)
        if ours != theirs:
            raise UserError(f"{path} does not fit {wanted.name}: obs[{key!r}] is {theirs}, expected {ours}")
    if found.action != wanted.action:
        raise UserError(f"{path} does not fit {wanted.name}: action is {found.action}, not {wanted.action}")
    if found.tasks != wanted.tasks:
        raise UserError(f"{path} does not fit {wanted.name}: its tasks are {found.name}")
    if found.action_repeat != wanted.action_repeat:
        raise UserError(
            f"{path} was recorded with an action repeat of {found.action_repeat}, {wanted.name} has "
            f"{wanted.action_repeat}: set loop.action_repeat to {found.action_repeat}"
        )


def columns(dataset: Dataset, count: int, length: int) -> Trajectory:
    """All rows as ``count`` columns of one length [N, count, ...], as replay holds those of environments.

    Episodes follow one another and go on in the next column; fewer than ``count`` rows are left over. An
    episode that was recorded from its middle begins there. Raises UserError where a column would be shorter
    than ``length`` rows.
    """
    total = sum(len(e.reward) for e in dataset.episodes)
    if total // count < length:
        raise UserError(
            f"--offline has {total} rows ({dataset.source}), it must have at least {count * length}: "
            f"loop.num_envs {count} columns of one sequence each"
        )

    def joined(field: Any, kind: str) -> np.ndarray:
        every = np.concatenate([np.asarray(field(e), kind) for e in dataset.episodes])[
            : total // count * count
        ]
        return np.ascontiguousarray(every.reshape(count, total // count, *every.shape[1:]).swapaxes(0, 1))

    kinds = dict(zip(_FIELDS, ("float32", "float32", "bool", "bool", "bool")))
    rows: dict[str, Any] = {k: joined(lambda e, k=k: getattr(e, k), kind) for k, kind in kinds.items()}
    obs: dict[str, Any] = {
        k: joined(lambda e, k=k: e.obs[k], entry.dtype) for k, entry in dataset.spec.obs.items()
    }
    begins = joined(lambda e: np.arange(len(e.reward)) == 0, "bool")
    rows["is_first"] = rows["is_first"] | begins
    rows["action"][rows["is_first"]] = 0
    rows["reward"][rows["is_first"]] = 0
    return Trajectory(obs=obs, **rows)


def describe(dataset: Dataset) -> dict[str, Any]:
    """Counts, returns of whole episodes, and range and spread of every entry, over all rows."""
    episodes = dataset.episodes
    if not episodes:
        raise UserError(f"the dataset has no episodes ({dataset.source})")
    whole = [e for e in episodes if e.is_first[0] and e.is_last[-1]]
    returns = np.array([np.sum(e.reward, dtype=np.float64) for e in whole])
    entries = {name: np.concatenate([e.obs[name] for e in episodes]) for name in dataset.spec.obs}
    # The first row of an episode has neither action nor reward.
    entries |= {k: np.concatenate([getattr(e, k)[1:] for e in episodes]) for k in ("action", "reward")}
    return {
        "source": dataset.source,
        "episodes": len(episodes),
        "whole episodes": len(whole),
        "terminal episodes": int(sum(bool(e.is_terminal[-1]) for e in episodes)),
        "rows": int(sum(len(e.reward) for e in episodes)),
        "length": _range(np.array([len(e.reward) for e in episodes])),
        "return": _range(returns) if whole else None,
        "entries": {name: _range(values) for name, values in entries.items() if values.size},
    }


def _range(values: np.ndarray) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    kinds = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    return {name: float(function(values)) for name, function in kinds.items()}


def _unrolled(ring: np.ndarray, inserted: int) -> np.ndarray:
    """Rows of a ring [capacity, ...] from the oldest to the newest, as many as were written."""
    if inserted <= len(ring):
        return ring[:inserted]
    return np.roll(ring, -(inserted % len(ring)), axis=0)


def _map(function: Any, rows: Trajectory) -> Trajectory:
    fields = {name: function(getattr(rows, name)) for name in _FIELDS}
    return Trajectory(obs={key: function(x) for key, x in rows.obs.items()}, **fields)


def _chunks(episodes: Sequence[Trajectory], rows: int) -> Iterator[list[Trajectory]]:
    chunk, size = [], 0
    for episode in episodes:
        chunk.append(episode)
        size += len(episode.reward)
        if size >= rows:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_chunk(path: Path, episodes: list[Trajectory]) -> None:
    arrays: dict[str, Any] = {k: np.concatenate([getattr(e, k) for e in episodes]) for k in _FIELDS}
    arrays |= {f"obs/{key}": np.concatenate([e.obs[key] for e in episodes]) for key in episodes[0].obs}
    buffer = io.BytesIO()
    lengths = np.array([len(e.reward) for e in episodes])
    np.savez_compressed(buffer, allow_pickle=False, lengths=lengths, **arrays)
    write_atomic(path, buffer.getvalue())
