"""Checkpoints of one run: whole or absent, verified when read, never cast in silence.

One directory per step, ``checkpoints/000000012000/``: ``state.npz`` (the leaves of the pytree), ``extra.npz``
(states of host environments), and ``manifest.json`` with the schema version, path, shape and dtype of every
leaf and the sha256 of every file. All of it is written in ``checkpoints/.saving``, the manifest last, and
renamed when complete: a directory with a step's name is a finished checkpoint, whatever killed the process.
Rows of replay are in ``checkpoints/rows/``, which all checkpoints of a run share (`mbrl.segments`); stored
latents, which training rewrites everywhere, are in ``state.npz``. Of a run of several processes each writes
its part of all arrays, rows among them, into ``state/`` with orbax, and the first one all else, in a folder
that they share; any number of processes and devices can read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.errors import UserError
from mbrl.processes import all_do, leads
from mbrl.replay import ReplayState
from mbrl.run_folder import jsonable, sync_directory, write_atomic
from mbrl.segments import Segment, extend, fill, remove_others

SCHEMA = 4  # 2: episodes between two rows of metrics; 3: rows of replay in files of their own; 4: state.npz
READABLE = (2, 3, 4)
MANIFEST, ARRAYS, SHARDS = "manifest.json", "state.npz", "state"


class Restored(NamedTuple):
    """step: simulator frames (whatever ``save`` was told). state: pytree like ``like``. extra: host arrays.
    meta: what ``save`` was given, after a round trip through JSON (tuples are lists). segments: for ``save``
    of the run that goes on."""

    step: int
    state: Any
    extra: dict[str, np.ndarray]
    meta: dict[str, Any]
    segments: list[Segment]


class Damaged(Exception):
    """A checkpoint on disk that is incomplete or altered; the message names the file."""


def save(
    folder: str | os.PathLike,
    step: int,
    state: Any,
    extra: dict[str, np.ndarray] | None = None,
    meta: dict[str, Any] | None = None,
    keep: int = 2,
    segments: list[Segment] | None = None,
) -> bool:
    """Write the checkpoint of ``step`` and delete all but the newest ``keep``. True when it was written.

    folder: the directory of all checkpoints (``RunFolder.checkpoints``). state: pytree of jax or numpy arrays
    of any dtype, typed PRNG keys included; it is on disk when this returns, so its buffers may be donated.
    extra: numpy arrays by name, no object arrays. meta: JSON-like. An existing checkpoint of the same step is
    replaced. segments: of this run so far, [] at its start and `Restored.segments` when it is resumed; it is
    brought up to date. Without it all rows of replay are written.

    When the disk is full or another write fails: one warning, False, and the older checkpoints stay as they
    were, so the run can go on. Raises TypeError for a leaf or extra that is not an array, ValueError for
    ``keep < 1``.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}")
    folder = Path(folder).absolute()
    table = [_describe(path, leaf) for path, leaf in _flatten(state)]
    leaves = {f"{i:05d}": _plain(path, leaf) for i, (path, leaf) in enumerate(_flatten(state))}
    rings, inserted, capacity = _rings(state, table)
    extra = {name: _host_array(name, array) for name, array in (extra or {}).items()}
    body = {"schema": SCHEMA, "step": int(step), "meta": jsonable(meta or {}), "leaves": table}
    known, rows = [] if segments is None else segments, {name: leaves.pop(name) for name in rings}
    target, saving = folder / f"{step:012d}", folder / ".saving"

    def prepare() -> None:
        shutil.rmtree(saving, ignore_errors=True)  # left by a process that was killed here
        saving.mkdir(parents=True)

    def complete() -> None:
        found = extend(folder, known, rows, inserted, capacity) if rows else []
        body["rows"] = {"leaves": list(rows), "inserted": inserted, "segments": [s._asdict() for s in found]}
        if (saving / SHARDS).exists():
            # Orbax notes the absolute path in it, and run folders are moved and shared.
            (saving / SHARDS / "commit_success.txt").write_text("")
        with open(saving / "extra.npz", "wb") as file:
            # The underscore keeps names such as "file" apart from savez's own arguments.
            np.savez(file, allow_pickle=False, **{f"_{name}": array for name, array in extra.items()})  # pyright: ignore[reportArgumentType]
        body["files"] = {str(p.relative_to(saving)): _sha256(p, sync=True) for p in _files(saving)}
        write_atomic(saving / MANIFEST, _seal(body))
        if target.exists():
            _remove(target)
        os.rename(saving, target)
        sync_directory(folder)
        known[:] = found

    try:
        all_do(prepare, leader_only=True)
        all_do(lambda: _write_arrays(saving, leaves))
        all_do(complete, leader_only=True)
    except Exception as error:  # orbax reports a full disk in many types
        shutil.rmtree(saving, ignore_errors=True)
        message = f"checkpoint of step {step} was not written, older ones are untouched: {_reason(error)}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    if not leads():
        return True
    # Later steps are damaged ones that a resumed run has not reached again: they do not count as kept.
    for old in [found for found in steps(folder) if found <= step][:-keep]:
        _remove(folder / f"{old:012d}")
    remove_others(folder, (segment for other in steps(folder) for segment in _segments_of(folder, other)))
    return True


def steps(folder: str | os.PathLike) -> list[int]:
    """Steps that have a directory in ``folder``, ascending, not verified; ``.saving`` is not among them."""
    names = (path.name for path in Path(folder).glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def restore(folder: str | os.PathLike, like: Any, part: str = "") -> Restored:
    """Read the newest undamaged checkpoint of ``folder``.

    like: the state that the program would start with, concrete or abstract (``jax.eval_shape``,
    ``jax.ShapeDtypeStruct`` with or without sharding). Restored leaves are new, unshared arrays with its
    structure, placed with the shardings of its leaves; on the default device, uncommitted, where a leaf has
    none or is itself uncommitted. A NumPy array for rows of replay that are in files of their own is filled,
    and is the leaf. part: read only what lies below this path of the saved state (".train"), for which
    ``like`` then stands; the rest, replay above all, is left on disk.

    Files are verified against their sha256. A damaged checkpoint gives one warning that names the file, and
    the next older one is read. Raises UserError when none is left, when it was written by a newer release, or
    when a leaf is missing, unknown, or of another shape or dtype than in ``like``: nothing is ever cast.
    """
    return _read(*_newest(folder, (part,)), like, part)


def read_arrays(folder: str | os.PathLike, *parts: str) -> tuple[int, dict[str, np.ndarray]]:
    """(step, {path: array}) of the leaves below some paths of the newest undamaged checkpoint, whatever
    program wrote it; for arrays of numbers, not for typed keys. Raises UserError as `restore` does.
    """
    directory, body = _newest(folder, parts)
    below = tuple(f"{part}{end}" for part in parts for end in ".[")
    wanted = lambda path: path in parts or path.startswith(below)
    found = {i: leaf for i, leaf in enumerate(body["leaves"]) if wanted(leaf["path"])}
    targets = [jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for leaf in found.values()]
    arrays = _read_leaves(directory, body, dict(zip(found, targets)))
    return body["step"], {leaf["path"]: np.asarray(x) for leaf, x in zip(found.values(), arrays)}


def _newest(folder: str | os.PathLike, parts: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """Directory and manifest of the newest checkpoint of which these parts are undamaged; one warning for
    each damaged one."""
    folder = Path(folder).absolute()
    found = steps(folder)
    for step in reversed(found):
        try:
            return folder / f"{step:012d}", _verified(folder / f"{step:012d}", parts)
        except Damaged as damage:
            warnings.warn(f"checkpoint of step {step} is skipped: {damage}", RuntimeWarning, stacklevel=3)
    what = f"none of its {len(found)} checkpoints is intact" if found else "it holds no checkpoint"
    raise UserError(f"cannot resume from {folder}: {what}")


def _read(directory: Path, body: dict[str, Any], like: Any, part: str) -> Restored:
    wanted = _flatten(like)
    below = (f"{part}.", f"{part}[") if part else ""
    numbers = [
        i for i, leaf in enumerate(body["leaves"]) if leaf["path"].startswith(below) or leaf["path"] == part
    ]
    stored = [body["leaves"][i] for i in numbers]
    _check_same(directory, stored, [_describe(part + path, leaf) for path, leaf in wanted])
    arrays = _read_leaves(directory, body, {i: _target(leaf) for i, (_, leaf) in zip(numbers, wanted)})
    leaves = [_typed(array, leaf) for array, (_, leaf) in zip(arrays, wanted, strict=True)]
    with _opened(directory / "extra.npz") as file:
        extra = {name[1:]: file[name] for name in file.files}
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Restored(body["step"], state, extra, body["meta"], _segments(body))


# Leaves. A typed key travels as the uint32 data inside it; its implementation is part of the dtype's name.


def _flatten(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(path: str, leaf: Any) -> dict[str, Any]:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"state{path} must be an array, found {type(leaf).__name__}")
    return {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _plain(path: str, leaf: Any) -> Any:
    _describe(path, leaf)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """None for a leaf that JAX may move freely. Committing it would clash with leaves on a mesh."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _target(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding(leaf))


def _typed(array: Any, leaf: Any) -> Any:
    if not _is_key(leaf):
        return array
    impl: list[Any] = []  # key_impl takes arrays only, and ``leaf`` may be abstract
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
    key = jax.random.wrap_key_data(array, impl=impl[0])
    return key if _sharding(leaf) is None else jax.device_put(key, _sharding(leaf))


def _check_same(directory: Path, stored: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    def refuse(what: str) -> None:
        raise UserError(f"cannot resume from {directory}: {what}; it was made with other settings or code")

    old, new = ({leaf["path"]: leaf for leaf in table} for table in (stored, wanted))
    for path in new:
        if path not in old:
            refuse(f"state{path} is expected and was not saved")
    for path, leaf in old.items():
        if path not in new:
            refuse(f"state{path} was saved and is not expected")
        for field in ("shape", "dtype"):
            found, expected = leaf[field], new[path][field]
            if found != expected:
                refuse(f"{field} of state{path} is {found} in the checkpoint, expected {expected}")
    if list(old) != list(new):
        refuse("the order of its leaves differs")


# Arrays on disk. Leaves are stored by their number, so their names may hold any character. One process writes
# them with NumPy, since orbax computes much longer, and tensorstore keeps 0.1 MiB of every save for good.
# Several processes need orbax, which writes the part of an array that each of them has; it cannot store an
# array without elements.


def _write_arrays(folder: Path, leaves: dict[str, Any]) -> None:
    if jax.process_count() > 1:
        return _write_shards(folder, leaves)
    with open(folder / ARRAYS, "wb") as file:
        np.savez(file, allow_pickle=False, **{name: _storable(leaf) for name, leaf in leaves.items()})  # pyright: ignore[reportArgumentType]


def _write_shards(folder: Path, leaves: dict[str, Any]) -> None:
    item = {name: leaf for name, leaf in leaves.items() if np.size(leaf)}
    with _checkpointer() as (ocp, checkpointer):
        checkpointer.save(folder / SHARDS, args=ocp.args.PyTreeSave(item))


def _storable(leaf: Any) -> Any:
    """As it is, so that savez fetches one array after the other; the bytes of one whose dtype NumPy does not
    know (bfloat16)."""
    return np.frombuffer(np.asarray(leaf).tobytes(), np.uint8) if leaf.dtype.kind == "V" else leaf


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An npz file; UserError where it holds Python objects."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except ValueError as error:  # its bytes are what the manifest says, so it was written so
        if "allow_pickle" not in str(error):
            raise
        raise UserError(f"{path} holds Python objects, which are never loaded") from None


@contextmanager
def _checkpointer():
    """(the orbax module, a checkpointer that works synchronously), closed at the end."""
    import orbax.checkpoint as ocp  # half a second, only where several processes write

    # On a full disk orbax logs hundreds of lines of tracebacks besides raising, and our warning drowns.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            yield ocp, checkpointer
    finally:
        log.setLevel(level)


def _read_leaves(directory: Path, body: dict[str, Any], targets: dict[int, Any]) -> list[Any]:
    """The leaves with these numbers, all or some of those that were saved, like their targets."""
    rows = body.get("rows", {"leaves": []})
    names = [name for name in rows["leaves"] if int(name) in targets]
    rings = {name: _room(targets[int(name)]) for name in names}
    if rings:
        fill(directory.parent, _segments(body), rings, rows["inserted"], targets[int(names[0])].shape[1])
    rest = {f"{i:05d}": target for i, target in targets.items() if f"{i:05d}" not in rings}
    read = rings | _read_arrays(directory, rest)
    return [_placed(read.pop(f"{i:05d}"), target) for i, target in targets.items()]


def _room(target: Any) -> np.ndarray:
    """Where rows are read to: a NumPy array of ``like`` itself."""
    return target if isinstance(target, np.ndarray) else np.zeros(target.shape, target.dtype)


def _read_arrays(directory: Path, targets: dict[str, Any]) -> dict[str, Any]:
    if not (directory / ARRAYS).exists():
        return _read_shards(directory / SHARDS, targets)
    with _opened(directory / ARRAYS) as file:
        return {name: file[name].view(x.dtype).reshape(x.shape) for name, x in targets.items()}


def _read_shards(path: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """What several processes wrote, or a release before schema 4."""
    item = {name: target for name, target in targets.items() if target.size}
    read = {}
    if item:
        with _checkpointer() as (ocp, checkpointer):
            how = {
                name: ocp.RestoreArgs(restore_type=np.ndarray)
                if getattr(target, "sharding", None) is None
                else ocp.ArrayRestoreArgs(sharding=target.sharding)
                for name, target in item.items()
            }
            what = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            read = checkpointer.restore(path, args=what)
    empty = {name: np.zeros(x.shape, x.dtype) for name, x in targets.items() if not x.size}
    return {**read, **empty}


def _placed(array: Any, target: Any) -> Any:
    if array is target:
        return array
    if isinstance(array, jax.Array):
        return array if target.sharding is None else jax.device_put(array, target.sharding)
    # Copies: on a CPU device_put may keep NumPy's memory, which cannot be donated.
    if getattr(target, "sharding", None) is None:
        return jnp.array(array, copy=True)
    part = lambda index: jnp.array(array[index], copy=True)
    return jax.make_array_from_callback(target.shape, target.sharding, part)


def _host_array(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.hasobject or array.dtype.kind == "V":  # bfloat16 is "V": npz would lose its type
        raise TypeError(f"extra[{name!r}] must be a plain numeric or string array, found dtype {array.dtype}")
    return array


# Rows of replay.


def _rings(state: Any, table: list[dict[str, Any]]) -> tuple[list[str], int, int]:
    """(numbers of the leaves that are rings of rows written once, rows ever written, capacity)."""
    replay = getattr(state, "replay", None)
    if not isinstance(replay, ReplayState) or jax.process_count() > 1:
        return [], 0, 0
    inserted = np.unique(np.asarray(replay.inserted))
    if len(inserted) != 1:
        raise ValueError(f"all seeds must have written equally many rows, found {inserted.tolist()}")
    latents = ".replay.data.latent"
    rings = [
        f"{i:05d}"
        for i, leaf in enumerate(table)
        if leaf["path"].startswith(".replay.data.")
        and not leaf["path"].startswith(latents)
        and np.prod(leaf["shape"])
    ]
    return rings, int(inserted[0]), replay.data.reward.shape[1]


def _segments(body: dict[str, Any]) -> list[Segment]:
    return [Segment(**segment) for segment in body.get("rows", {"segments": []})["segments"]]


def _segments_of(folder: Path, step: int) -> list[Segment]:
    """What a checkpoint needs; nothing where its manifest cannot be read, as nobody can restore it."""
    try:
        return _segments(_manifest(folder / f"{step:012d}"))
    except Damaged:
        return []


# Integrity.


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def _sha256(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:  # the manifest must not reach the disk before what it vouches for
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def _manifest(directory: Path) -> dict[str, Any]:
    """The manifest as it was written; raises Damaged where it was not written so."""
    try:
        body = json.loads((directory / MANIFEST).read_bytes())
        digest = body.pop("sha256")
        intact = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() == digest
    except FileNotFoundError:
        raise Damaged(f"{directory / MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{directory / MANIFEST} cannot be read ({type(error).__name__})") from None
    if not intact:
        raise Damaged(f"{directory / MANIFEST} was altered")
    return body


def _verified(directory: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """The manifest of a checkpoint of which every byte is as written; raises Damaged, or UserError for a
    schema of a newer release. Rows of replay are read only where one of ``parts`` includes them."""
    body = _manifest(directory)
    if body["schema"] not in READABLE:
        raise UserError(
            f"{directory / MANIFEST} has schema {body['schema']}, this release reads schema {SCHEMA}: "
            "resume with the release that wrote it"
        )
    files = {directory / name: digest for name, digest in body["files"].items()}
    if any(".replay".startswith(part) or part.startswith(".replay") for part in parts):
        files |= {directory.parent / segment.file: segment.sha256 for segment in _segments(body)}
    for path, expected in files.items():
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        try:
            found = _sha256(path)
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error.strerror})") from None
        if found != expected:
            raise Damaged(f"{path} was altered or cut short")
    return body


def _reason(error: Exception) -> str:
    """One short line. tensorstore wraps the operating system's sentence in several others."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG), os.strerror(errno.EDQUOT)):
        if known in text:
            return known
    return text[:200]


def _remove(directory: Path) -> None:
    """Delete a checkpoint; its manifest first, so that a kill half-way leaves no seemingly finished one."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
