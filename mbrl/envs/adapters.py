"""What adapters of simulators on the device have in common."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import jax
import jax.numpy as jnp

from mbrl.errors import UserError
from mbrl.types import PyTree, TimeStep


def contain(timestep: TimeStep) -> TimeStep:
    """Ends the episode as truncated, with zeros in place of observation and reward, where one of their
    numbers is not finite: what `HostPool` does on the host."""
    numbers = [x for x in jax.tree.leaves((timestep.obs, timestep.reward)) if x.dtype.kind == "f"]
    good = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    obs, reward = jax.tree.map(lambda x: jnp.where(good, x, 0), (timestep.obs, timestep.reward))
    return TimeStep(obs, reward, timestep.is_last | ~good, timestep.is_terminal & good)


def typed(state: PyTree, like: PyTree) -> PyTree:
    """``state`` with the types of ``like``, as a scan needs them, and no two leaves in one buffer, so that it
    can be donated. Libraries return Python numbers, weak types and one zero for many entries."""
    return jax.tree.map(lambda x, shape: jnp.array(x, shape.dtype), state, like)


def in_range(action: jax.Array, low: Any, high: Any) -> jax.Array:
    """An action in [-1, 1], clipped, as one in [low, high]."""
    return low + (high - low) * (jnp.clip(action, -1.0, 1.0) + 1) / 2


def optional(module: str, task: str, extra: str) -> Any:
    """A module of a library that only ``task`` needs; UserError with the extra that brings it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # MJX prints that Warp is missing, which is not used
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--task {task} needs {extra}, which is not installed ({error}): pip install 'mbrl-jax[{extra}]'"
        ) from None
