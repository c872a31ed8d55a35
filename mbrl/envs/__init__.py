"""Environments by name. Nothing heavy is imported before an environment is made."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from mbrl.envs import pixels
from mbrl.envs.pixels import CAMERA, CameraConfig, Shown
from mbrl.types import HostEnv, JaxEnv

REGISTRY: dict[str, str] = {
    "cartpole": "mbrl.envs.cartpole:make",
    "pendulum": "mbrl.envs.pendulum:make",
    "pendulum_dense": "mbrl.envs.pendulum:make_dense",
    "probe_constant": "mbrl.envs.probes:constant",
    "probe_constant_truncated": "mbrl.envs.probes:constant_truncated",
    "probe_observation": "mbrl.envs.probes:observation",
    "probe_delayed": "mbrl.envs.probes:delayed",
    "probe_action": "mbrl.envs.probes:action",
    "probe_action_discrete": "mbrl.envs.probes:action_discrete",
    "probe_memory": "mbrl.envs.probes:memory",
    "probe_memory_discrete": "mbrl.envs.probes:memory_discrete",
    "recall": "mbrl.envs.memory:recall",
    "tmaze": "mbrl.envs.memory:tmaze",
    "hallway": "mbrl.envs.memory:hallway",
    "memory_chain": "mbrl.envs.gymnax_adapter:memory_chain",
}
"""Environments written in JAX: name -> "module:factory", where factory(**options) -> JaxEnv."""

FAMILIES: dict[str, str] = {
    "gymnax": "mbrl.envs.gymnax_adapter:make",
    "brax": "mbrl.envs.brax_adapter:make",
    "playground": "mbrl.envs.brax_adapter:make_playground",
}
"""Libraries of environments written in JAX, named as in ``brax:ant``: name -> "module:factory", where
factory(what follows the colon) -> JaxEnv."""

MEMORY_TASKS = {"recall": "gap", "tmaze": "length", "hallway": "width", "memory_chain": "length"}
"""Tasks with one number in their name, as in ``recall:30``, and the option that it stands for."""

PICTURES = {
    "cartpole": "mbrl.envs.cartpole:picture",
    "pendulum": "mbrl.envs.pendulum:picture",
    "pendulum_dense": "mbrl.envs.pendulum:picture",
}
"""JAX tasks that a camera can see: name -> "module:function" of (state, size) -> uint8 [size, size, 3]."""

GYM = "gym:"


def is_jax(name: str) -> bool:
    """Whether the name, without its number, is that of an environment written in JAX."""
    if _is_own(name):
        return "seed" not in inspect.signature(_own(name)).parameters
    base, colon, _ = name.partition(":")
    return base in REGISTRY or (bool(colon) and base in FAMILIES)


def make_jax(name: str, shown: Shown = "state", camera: CameraConfig = CAMERA, **options: Any) -> JaxEnv:
    """An environment written in JAX; ``options`` go to its factory.

    name: one of `REGISTRY`, with its number where it takes one, ``gymnax:NAME``, ``brax:NAME[:PHYSICS]``,
    ``playground:NAME``, or one of your own as ``module:factory``. shown: the state, what the camera sees, or
    both. Raises ValueError for others, for impossible options and for a task without pictures.
    """
    if shown != "state":
        if name not in PICTURES:
            raise ValueError(
                f"{name!r} has no pictures, of the tasks in JAX these have: {', '.join(PICTURES)}"
            )
        module, _, function = PICTURES[name].partition(":")
        picture = getattr(importlib.import_module(module), function)
        return pixels.of_jax(make_jax(name, **options), picture, shown, camera)
    if _is_own(name) and is_jax(name):
        return _own(name)(**options)
    base, colon, rest = name.partition(":")
    if colon and base in FAMILIES:
        return _factory(FAMILIES[base])(rest, **options)
    if base not in REGISTRY:
        raise unknown(name)
    if colon:
        options = {**options, **_number(name, base, rest)}
    env = _factory(REGISTRY[base])(**options)
    return env._replace(spec=dataclasses.replace(env.spec, name=name)) if colon else env


def _factory(path: str) -> Callable[..., JaxEnv]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _number(name: str, base: str, number: str) -> dict[str, int]:
    """The option in a name such as ``recall:30``."""
    if base not in MEMORY_TASKS:
        raise ValueError(f"{base!r} takes no number, found {name!r}; these do: {', '.join(MEMORY_TASKS)}")
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{name!r} must end in a whole number, its {MEMORY_TASKS[base]}, as in '{base}:30'")
    return {MEMORY_TASKS[base]: int(number)}


def make_host(
    task: str,
    seed: int,
    action_repeat: int = 2,
    shown: Shown = "state",
    camera: CameraConfig = CAMERA,
) -> HostEnv:
    """An environment in Python: a dm_control task by its usual name (see ``mbrl.envs.dmc.make``), one of
    gymnasium's registry as ``gym:HalfCheetah-v5``, or one of your own as ``module:factory``, where
    ``factory(seed, action_repeat)`` returns a `HostEnv`. shown: the state, what the camera sees, or both.
    Raises ValueError for others."""
    if shown != "state":
        quality = {} if task.startswith(GYM) or _is_own(task) else {"render_quality": camera.quality}
        return pixels.OfHost(_make_host(task, seed, action_repeat, **quality), shown, camera)
    return _make_host(task, seed, action_repeat)


def _make_host(task: str, seed: int, action_repeat: int, **options: Any) -> HostEnv:
    if task.startswith(GYM):
        from mbrl.envs import gym

        return gym.make(task.removeprefix(GYM), seed, action_repeat)
    if _is_own(task) and not is_jax(task):
        return _own(task)(seed=seed, action_repeat=action_repeat)
    from mbrl.envs import dmc

    return dmc.make(task, seed, action_repeat, **options)


def check(env: JaxEnv | Callable[[int], Any], random_starts: bool = True) -> bool:
    """Runs the conformance checks on an environment of your own and explains each failure in a sentence; see
    `mbrl.envs.checks.check`."""
    from mbrl.envs import checks

    return checks.check(env, random_starts)


def _is_own(name: str) -> bool:
    """Whether the name has the form MODULE:FACTORY; what follows the colon of a memory task is a number."""
    module, _, factory = name.partition(":")
    return factory.isidentifier() and module not in FAMILIES and not name.startswith(GYM)


def _own(name: str) -> Callable[..., Any]:
    """The factory ``module:factory``, its module found where Python looks or in the current folder. One with
    a parameter ``seed`` makes environments in Python, one without makes an environment written in JAX."""
    module, _, factory = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name!r} is read as MODULE:FACTORY and cannot be imported: {error}; run it from the folder "
            "of the module"
        ) from error


def names() -> list[str]:
    """All environments: those written in JAX, then the tasks of dm_control."""
    from mbrl.envs import dmc

    return [*REGISTRY, *dmc.task_names()]


def unknown(name: str) -> ValueError:
    """The error for a name that the wanted kind of environment does not have, in one sentence."""
    from mbrl.envs import dmc

    listing = 'list all with: python -c "import mbrl.envs; print(*mbrl.envs.names())"'
    if name in REGISTRY:
        return ValueError(f"{name!r} is an environment written in JAX, not a task of dm_control; {listing}")
    if dmc.canonical(name):
        return ValueError(f"{name!r} is a task of dm_control, not an environment written in JAX; {listing}")
    meant = f"gymnasium's is {GYM}{name}" if re.search(r"-v\d+$", name) else ""
    meant = meant or ("your own is MODULE:FACTORY" if "." in name else "")
    if meant:
        return ValueError(f"There is no task or environment {name!r}; {meant}")
    close = difflib.get_close_matches(name.lower().replace("-", "_"), names(), n=4, cutoff=0.5)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    return ValueError(f"There is no task or environment {name!r}{hint}; {listing}")
