"""Episodes that others have recorded: local Minari datasets (0.5 and later) and D4RL-style HDF5 files.

Both are read with h5py, the extra [data]. Only arrays of numbers in the file itself are read: nothing that
is found is executed, and no other file is opened.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbrl.errors import UserError
from mbrl.types import ArraySpec, EnvSpec, Trajectory

D4RL_KEYS = ("observations", "actions", "rewards", "terminals")
SLACK = 1e-3  # by which recorded actions may exceed their bounds through rounding; they are clipped


class Found(NamedTuple):
    """The fields of `mbrl.dataset.Dataset`."""

    spec: EnvSpec
    episodes: list[Trajectory]
    source: str


def is_minari(folder: Path) -> bool:
    """Whether it is the folder of a local Minari dataset."""
    return (folder / "data" / "metadata.json").is_file()


def read_minari(folder: Path) -> Found:
    """A local Minari dataset in HDF5, by default under ``~/.minari/datasets``.

    Observations get the keys and actions the range that ``--task gym:NAME`` gives them. Raises UserError for
    spaces that no agent here can use and for a file that contradicts its metadata.
    """
    where = folder / "data" / "metadata.json"
    try:
        about = json.loads(where.read_text(encoding="utf-8"))
        kind = about.get("data_format", "hdf5")
        if kind != "hdf5":
            raise UserError(f"{folder} is stored as {kind}, only Minari datasets in hdf5 can be read")
        entries = dict(sorted(_entries(json.loads(about["observation_space"]), (), where)))
        action, unit = _actions(json.loads(about["action_space"]), where)
        made_for = json.loads(about.get("env_spec") or "{}")
        name = f"gym:{made_for['id']}" if "id" in made_for else str(about["dataset_id"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not that of a Minari dataset of 0.5 or later: {error!r}") from error
    spec = EnvSpec(name, {k: e[1] for k, e in entries.items()}, action, 1, made_for.get("max_episode_steps"))
    episodes, path = [], folder / "data" / "main_data.hdf5"
    with _open(path) as file:
        for number in range(int(about.get("total_episodes", len(file)))):
            group = _member(file, f"episode_{number}", path)
            obs = {}
            for key, (inner, entry, start) in entries.items():
                values = _array(group, "/".join(["observations", *inner]), path)
                _check_shape(f"{path} episode_{number}: observation {key!r}", values, entry.shape)
                obs[key] = (values - start).reshape(len(values), *entry.shape).astype(entry.dtype)
            ended, stopped = (_array(group, key, path) > 0 for key in ("terminations", "truncations"))
            rewards, native = (_array(group, key, path) for key in ("rewards", "actions"))
            place = f"{path} episode_{number}"
            if (ended | stopped)[:-1].any():
                raise UserError(f"{place} goes on after a step that ends it")
            if not len(rewards):
                continue
            episode = _episode(
                obs, unit(native, place), rewards, bool((ended | stopped)[-1]), bool(ended[-1])
            )
            episodes.append(_checked(episode, spec, place))
    return Found(spec, episodes, f"Minari dataset {about.get('dataset_id', folder.name)}")


def read_d4rl(path: Path) -> Found:
    """A flat file of transitions: observations [N, O], actions [N, A], rewards, terminals and, where there
    are any, timeouts [N] and next_observations [N, O].

    Without next_observations the last one of an episode is not known: after a timeout that transition is left
    out, at a terminal step the observation before is repeated. Actions must lie in [-1, 1].
    """
    with _open(path) as file:
        obs, actions, rewards, terminals = (_array(file, key, path) for key in D4RL_KEYS)
        timeouts = _array(file, "timeouts", path) > 0 if "timeouts" in file else np.zeros(len(rewards), bool)
        following = _array(file, "next_observations", path) if "next_observations" in file else None
    terminals = terminals > 0
    for name, array in (("observations", obs), ("actions", actions)):
        if array.ndim != 2:
            raise UserError(f"{path}: {name} has shape {array.shape}, it must be [N, size]")
    lengths = {
        len(x) for x in (obs, actions, rewards, terminals, timeouts, obs if following is None else following)
    }
    if len(lengths) != 1:
        raise UserError(f"{path}: its arrays must have one length, found {sorted(lengths)}")
    starts = [0, *(np.flatnonzero(terminals | timeouts) + 1)]
    longest = max(np.diff([*starts, len(rewards)]), default=0)
    spec = EnvSpec(
        path.stem,
        {"state": ArraySpec((obs.shape[1],))},
        ArraySpec((actions.shape[1],)),
        max_steps=int(longest) if timeouts.any() else None,
    )
    episodes = []
    for begin, end in zip(starts, [*starts[1:], len(rewards)]):
        if begin == end:
            continue
        terminal, ended = bool(terminals[end - 1]), bool((terminals | timeouts)[end - 1])
        rows, last = obs[begin:end], end
        if following is not None:
            rows = np.concatenate([rows, following[end - 1 : end]])
        elif terminal:
            rows = np.concatenate([rows, rows[-1:]])
        else:
            last = end - 1
        place = f"{path} rows {begin} to {end - 1}"
        native = _within(actions[begin:last], place)
        state = {"state": rows.astype(np.float32)}
        episodes.append(_checked(_episode(state, native, rewards[begin:last], ended, terminal), spec, place))
    return Found(spec, episodes, f"D4RL-style file {path.name}")


def _episode(obs: dict[str, Any], action: Any, reward: Any, ended: bool, terminal: bool) -> Trajectory:
    """Rows from ``T + 1`` observations and the ``T`` actions and rewards between them."""
    first: Any = np.arange(len(reward) + 1) == 0
    last = first[::-1] & ended

    def before(x: Any) -> Any:
        return np.concatenate([np.zeros((1, *x.shape[1:])), x]).astype(np.float32)

    return Trajectory(obs, before(action), before(reward), first, last, last & terminal)


def _checked(episode: Trajectory, spec: EnvSpec, place: str) -> Trajectory:
    """The episode, if its arrays have the spec's shapes and finite numbers; else UserError."""
    steps = len(episode.reward)
    parts: list[tuple[str, Any, tuple[int, ...]]] = [
        (f"observation {key!r}", episode.obs[key], entry.shape) for key, entry in spec.obs.items()
    ]
    parts += [("actions", episode.action, spec.action.shape), ("rewards", episode.reward, ())]
    for name, array, shape in parts:
        if array.shape != (steps, *shape):
            raise UserError(f"{place}: {name} has shape {array.shape}, expected {(steps, *shape)}")
        if not np.isfinite(array).all():
            raise UserError(f"{place}: {name} has numbers that are not finite")
    return episode


def _check_shape(what: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """UserError unless the array has this shape, or as many numbers, at every step."""
    if array[:1].size != math.prod(shape) * len(array[:1]):
        raise UserError(f"{what} has shape {array.shape}, expected {(len(array), *shape)}")


def _within(actions: np.ndarray, place: str) -> np.ndarray:
    """Actions in [-1, 1]; UserError where they are not."""
    if np.abs(actions).max(initial=0) > 1 + SLACK:
        low, high = actions.min(), actions.max()
        raise UserError(
            f"{place}: actions lie in [{low:g}, {high:g}], they must lie in [-1, 1]: rescale them"
        )
    return np.clip(actions, -1, 1)


def _open(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} needs h5py, which is not installed: pip install 'mbrl-jax[data]'") from None
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5: {' '.join(str(error).split())}") from error


def _member(group: Any, name: str, path: Path) -> Any:
    """What a group holds under a name, never through a link to elsewhere."""
    import h5py

    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            raise UserError(f"{path} has no {name!r}{_of(group)}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(f"{path}: {name!r} is a link, only data in the file itself is read")
        group = group[part]
    return group


def _of(group: Any) -> str:
    return f", only {', '.join(sorted(group))}" if hasattr(group, "keys") and len(group) < 20 else ""


def _array(group: Any, name: str, path: Path) -> np.ndarray:
    """An array of numbers; UserError for anything else."""
    import h5py

    found = _member(group, name, path)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "fiub" or not found.ndim:
        raise UserError(f"{path}: {name!r} must be an array of numbers, found {found!r}")
    if found.is_virtual or found.external:
        raise UserError(f"{path}: {name!r} lies in other files, only data in the file itself is read")
    return found[()]


def _entries(space: dict[str, Any], inner: tuple[str, ...], where: Path) -> list[tuple[str, Any]]:
    """(key, (path in the file, spec, smallest value)) of every array of an observation space, as
    `mbrl.envs.gym` names and stores them."""
    kind, key = space["type"], "/".join(part.removeprefix("_index_") for part in inner) or "state"
    if kind == "Dict":
        return [e for k, s in space["subspaces"].items() for e in _entries(s, (*inner, k), where)]
    if kind == "Tuple":
        return [
            e for i, s in enumerate(space["subspaces"]) for e in _entries(s, (*inner, f"_index_{i}"), where)
        ]
    if kind == "Box":
        if space["dtype"] == "uint8" and len(space["shape"]) == 3:
            raise UserError(f"{where}: observation {key!r} is an image, only vectors can be read")
        return [(key, (inner, ArraySpec(tuple(space["shape"]) or (1,)), 0))]
    if kind == "MultiBinary":
        return [(key, (inner, ArraySpec(tuple(np.atleast_1d(space["n"]).tolist())), 0))]
    if kind == "Discrete":
        return [(key, (inner, ArraySpec((), "int32", space["n"]), space["start"]))]
    if kind == "MultiDiscrete":
        sizes = np.array(space["nvec"])
        return [(key, (inner, ArraySpec(sizes.shape, "int32", int(sizes.max())), np.array(space["start"])))]
    raise UserError(f"{where}: observation {key!r} is of the space {kind}, which no agent here can use")


def _actions(space: dict[str, Any], where: Path) -> tuple[ArraySpec, Any]:
    """The spec of an action, and what turns recorded ones [T, ...] into ours [T, A]."""
    if space["type"] == "Discrete":
        count, start = space["n"], space["start"]

        def one_hot(native: np.ndarray, place: str) -> np.ndarray:
            index = native.reshape(len(native)).astype(int) - start
            if len(index) and not 0 <= index.min() <= index.max() < count:
                raise UserError(f"{place}: an action is none of the {count} of its space")
            return np.eye(count, dtype=np.float32)[index]

        return ArraySpec((count,), classes=count), one_hot
    if space["type"] != "Box" or not space["dtype"].startswith("float"):
        raise UserError(
            f"{where}: the action space is {space['type']}, it must be Discrete or a Box of floats"
        )
    low, high = (np.array(space[k], np.float64) for k in ("low", "high"))
    low, high = np.where(np.isfinite(low), low, -1.0), np.where(np.isfinite(high), high, 1.0)

    def unit(native: np.ndarray, place: str) -> np.ndarray:
        _check_shape(f"{place}: actions", native, low.shape)
        scaled = (native - (low + high) / 2) / ((high - low) / 2)
        return _within(scaled.reshape(len(native), -1), place)

    return ArraySpec((math.prod(space["shape"]),)), unit
