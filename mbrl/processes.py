"""Several processes that run one program: how they meet, and what they tell each other outside of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

import jax
import numpy as np

from mbrl.errors import UserError

T = TypeVar("T")
SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Meets the other processes of the run. Call before the first JAX operation.

    Slurm, Open MPI, Kubernetes and TPU pods say where the others are. Elsewhere environment variables do:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. UserError when
    neither is the case.
    """
    address, *numbers = (os.environ.get(name) for name in SETTINGS)
    try:
        count, number = (int(text) if text else None for text in numbers)
        jax.distributed.initialize(address, count, number)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed found no other processes ({error}): start the run with srun or mpirun, or set "
            f"{', '.join(SETTINGS)}"
        ) from None


def leads() -> bool:
    """Whether this process writes the run folder and speaks: the first one, or the only one."""
    return jax.process_index() == 0


@contextmanager
def one_voice() -> Iterator[None]:
    """Inside, only the first process prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if leads() else nowhere):
        yield


def agree(number: int) -> int:
    """The largest ``number`` of any process; all must ask at the same time."""
    return number if jax.process_count() == 1 else int(gather(np.array(number)).max())


def gather(array: np.ndarray) -> np.ndarray:
    """[P, ...]: equally shaped NumPy arrays of all processes, on each of them; all must ask at the same time.

    Exact for every dtype: what travels is bytes, because JAX would round float64.
    """
    from jax.experimental import multihost_utils

    data = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8), tiled=False)
    return np.asarray(data).reshape(-1).view(array.dtype).reshape(-1, *array.shape)


def gather_bytes(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in their order."""
    length = agree(len(data))
    padded = np.frombuffer(data.ljust(length, b"\0"), np.uint8)
    sizes = gather(np.array(len(data)))
    return [row[:size].tobytes() for row, size in zip(gather(padded), sizes, strict=True)]


def all_do(action: Callable[[], T], leader_only: bool = False) -> T | None:
    """``action()``, in every process or in the first one alone, and its result. None of them goes on before
    all are done; when one fails the others raise as well, instead of waiting for it."""
    failure, result = None, None
    try:
        if leads() or not leader_only:
            result = action()
    except Exception as error:
        failure = error
    if agree(int(failure is not None)):
        raise failure or UserError("another process of this run failed: it says why")
    return result
