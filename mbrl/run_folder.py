"""The run folder: stable names, one run per folder, one process at a time, atomic files."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import platform
import socket
import subprocess
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mbrl.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "dm_control", "numpy")
# What shows that a folder already holds a run. An empty directory, or one with other files, is free.
_OWN = ("config.json", "metrics.jsonl", "summary.json", "checkpoints")


class RunFolder:
    """Paths of one run, held by one process until ``close`` (or until the process ends, however it ends).

    Make it with ``RunFolder.create`` or ``RunFolder.open_for_resume``; it is a context manager and an
    ``os.PathLike``. ``config`` is what ``config.json`` holds.
    """

    def __init__(self, path: Path, lock: int | None):
        self.path = self.shared = path
        self._lock, self._hidden = lock, None

    @classmethod
    def check(cls, path: str | os.PathLike, resume: bool = False) -> None:
        """Raises what `create`, or `open_for_resume`, would raise; a new folder is not made yet."""
        root = Path(path)
        if resume:
            cls.open_for_resume(root).close()
        elif root.exists():
            with cls(root, _take(root, create=False)):
                _check_free(root)
        else:
            above = next(folder for folder in root.absolute().parents if folder.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                reason = errno.EACCES if above.is_dir() else errno.ENOTDIR
                raise UserError(_unwritable(root, OSError(reason, os.strerror(reason))))

    @classmethod
    def create(cls, path: str | os.PathLike, config: dict[str, Any]) -> RunFolder:
        """Make the folder of a new run, with its ``config.json``; ``path`` may exist when it holds no run.

        config: the resolved settings, JSON-like (dicts, lists, numbers, strings, tuples, paths). Stored with
        ``versions``, ``machine`` and ``commit``; absolute paths are shortened to their last part, so that the
        folder can be moved and shared. Raises UserError when the folder holds a run, is in use by another
        process, or cannot be written. Nothing existing is overwritten.
        """
        root = Path(path)
        folder = cls(root, _take(root, create=True))
        try:
            _check_free(root)
            record = {**portable(config), "versions": versions(), "machine": machine(), "commit": commit()}
            write_json(folder.config_path, record)  # first: a folder whose making failed here is still free
            for directory in (folder.checkpoints, folder.tensorboard, folder.videos):
                directory.mkdir(exist_ok=True)
        except OSError as error:
            folder.close()
            raise UserError(_unwritable(root, error)) from error
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def open_for_resume(cls, path: str | os.PathLike) -> RunFolder:
        """Take an existing run folder to continue its run.

        Raises UserError when there is no run, no finished checkpoint, an unreadable ``config.json``, when
        another live process holds the folder, or when it cannot be written. A lock left by a process that
        died is taken over.
        """
        root = Path(path)
        cls.config_of(root)
        if not cls.has_checkpoint(root):
            raise UserError(
                f"--resume found no finished checkpoint in {root}: start a new run in another folder"
            )
        folder = cls(root, _take(root, create=False))
        try:
            for directory in (folder.tensorboard, folder.videos):
                directory.mkdir(exist_ok=True)
        except OSError as error:
            folder.close()
            raise UserError(_unwritable(root, error)) from error
        return folder

    @classmethod
    def follow(cls, path: str | os.PathLike) -> RunFolder:
        """The run folder ``path`` for a process that does not lead the run: it shares the checkpoints, and
        whatever else it writes disappears with it."""
        hidden = tempfile.TemporaryDirectory(prefix="mbrl-")
        folder = cls(Path(hidden.name), None)
        folder.shared, folder._hidden = Path(path), hidden  # kept: it is deleted with its last reference
        return folder

    @staticmethod
    def set_aside(path: str | os.PathLike) -> Path:
        """Rename the folder of a run to a free name beside it, which is returned; ``path`` is free then.

        Raises UserError when another live process holds the folder, or when it cannot be renamed.
        """
        root = Path(path)
        names = (root.with_name(f"{root.name}-stopped{i}") for i in itertools.count(1))
        with RunFolder(root, _take(root, create=False)):
            aside = next(name for name in names if not name.exists())
            try:
                return root.rename(aside)
            except OSError as error:
                raise UserError(_unwritable(root, error)) from error

    @staticmethod
    def has_checkpoint(path: str | os.PathLike) -> bool:
        """Whether the run in ``path`` has a finished checkpoint, from which it can be resumed."""
        return any(Path(path).glob("checkpoints/[0-9]*/manifest.json"))

    @staticmethod
    def config_of(path: str | os.PathLike) -> dict[str, Any]:
        """The ``config.json`` of the run in ``path``, without taking the folder.

        Raises UserError when there is no run or when the file cannot be read.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise UserError(f"there is no run in {Path(path)}: config.json is missing")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as JSON: {error}") from error

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def checkpoints(self) -> Path:
        return self.shared / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def videos(self) -> Path:
        return self.path / "videos"

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` as written by ``create``; UserError when it cannot be read."""
        return self.config_of(self.path)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace ``summary.json`` atomically. A full disk gives a warning, not an end of the run."""
        try:
            write_json(self.summary, summary)
        except OSError as error:
            warnings.warn(f"{self.summary} was not written: {error.strerror}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Give the folder back. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either the old or the new content, also after a crash.

    Written to a temporary file beside it, flushed to disk, renamed. Raises OSError; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """``write_atomic`` of ``value`` as indented JSON. NumPy values become numbers, non-finite ones null."""
    text = json.dumps(jsonable(value), indent=2, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def sync_directory(path: str | os.PathLike) -> None:
    """Make renames inside the directory durable; without effect where the file system cannot."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def jsonable(value: Any) -> Any:
    """``value`` in plain JSON types. Non-finite numbers become null, because JSON has no NaN.

    float32 scalars are written with the shortest digits that restore the same float32 (0.1, not
    0.10000000149011612). What JSON has no type for becomes its string.
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if np.isfinite(value) else None
    if hasattr(value, "__array__"):  # numpy scalars and arrays, jax arrays
        array = np.asarray(value)
        if array.ndim:
            return [jsonable(item) for item in array]
        if array.dtype.kind in "biu":
            return array.item()
        number = float(str(array[()])) if array.dtype.kind == "f" else float(array)
        return number if np.isfinite(number) else None
    return str(value)


def portable(value: Any) -> Any:
    """``value`` with every absolute path replaced by its last part, in lists with commas too."""
    if isinstance(value, dict):
        return {str(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, (str, os.PathLike)):
        parts = os.fspath(value).split(",")
        return ",".join(Path(part).name if os.path.isabs(part) else part for part in parts)
    return value


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for a package that is not installed."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    own = {"python": platform.python_version(), "mbrl": version("mbrl-jax")}
    return own | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, operating system, and JAX devices by kind."""
    import jax  # here, because it starts the backends

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        memory = float("nan")
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def commit() -> str | None:
    """Git commit of the checkout that the package runs from, ``-dirty`` appended with local changes.

    None for an installed package: the repository around its environment would be somebody else's.
    """
    checkout = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _check_free(root: Path) -> None:
    """UserError where there is a run."""
    found = next((name for name in _OWN if (root / name).exists()), None)
    if found is not None:
        raise UserError(
            f"run folder {root} already holds a run ({found}): give --resume to continue it, or another "
            "--run-dir"
        )


def _unwritable(root: Path, error: OSError) -> str:
    return f"run folder {root} cannot be written: {error.strerror or error}"


def _take(root: Path, create: bool) -> int:
    """Lock ``root`` for this process and return the lock's file descriptor.

    The kernel holds the lock (flock), so it disappears with its process, also after kill -9, and a left-over
    ``.lock`` file means nothing. Its text, pid and host, is only for the message to a second process.
    """
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"run folder {root} is a file, not a directory")
        if create:
            root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(_unwritable(root, error)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise UserError(f"run folder {root} is in use by another process ({holder})") from None
    except OSError as error:  # a file system without locks
        warnings.warn(f"{root} cannot be locked ({error.strerror}): start no second run in it", stacklevel=3)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        os.close(handle)
        raise UserError(_unwritable(root, error)) from error
    return handle
