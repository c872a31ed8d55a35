"""Numbers that differ between the members of a population: a sweep over them is one program.

A config's class names in ``VARIES`` the fields that change no shape and that no Python code branches on.
Their values travel in the train state, as ``hyper`` {dotted name: float32 []}, so that a checkpoint holds
them, and the agent is built from them inside the compiled program.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

import jax.numpy as jnp

from mbrl.config import check_config, choose
from mbrl.errors import UserError
from mbrl.types import Agent, Array

C = TypeVar("C")


def look_up(config: Any, name: str) -> Any:
    """The value of a field by its dotted name. UserError where there is none."""
    for part in name.split("."):
        if not hasattr(config, part):
            fields = [field.name for field in dataclasses.fields(config)] if is_dataclass(config) else []
            choose(f"field {name}", part, fields)
        config = getattr(config, part)
    return config


def can_vary(config: Any, name: str) -> bool:
    """Whether members may differ in a field, by its dotted name."""
    return name in varying(config)


def varying(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields in which members may differ."""
    names = [f"{prefix}{name}" for name in getattr(type(config), "VARIES", ())]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names += varying(value, f"{prefix}{field.name}.")
    return names


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """A copy of ``config`` with fields by their dotted names; arrays too, which its own constructor would
    refuse."""
    for name, value in values.items():
        field, _, rest = name.partition(".")
        config = copy.copy(config)
        new = with_values(getattr(config, field), {rest: value}) if rest else value
        object.__setattr__(config, field, new)  # frozen against change, and this is nobody's yet
    return config


def check_varied(config: C, vary: Mapping[str, Sequence[float]], build: Callable[[C], Agent]) -> None:
    """UserError for a field in which members cannot differ, and for a value that a run alone would refuse."""
    for name, values in vary.items():
        if not can_vary(config, name):
            raise UserError(
                f"{name} decides what is compiled, so the members of a program cannot differ in it; they can "
                f"in {', '.join(varying(config))}"
            )
        for value in values:
            member = with_values(config, {name: value})
            check_config(member)
            build(member)


def with_hyper(build: Callable[[C], Agent], config: C, names: Sequence[str]) -> Agent:
    """The agent of ``build(config)`` with the fields ``names`` read from ``train.hyper``, where they begin as
    ``config`` has them.

    build: pure; called whenever one of the agent's functions is traced. Without names: the agent itself.
    """
    if not names:
        return build(config)

    def agent(train: Any) -> Agent:
        return build(with_values(config, {name: train.hyper[name] for name in names}))

    def init(key: Array) -> Any:
        start = {name: jnp.float32(look_up(config, name)) for name in names}
        return build(config).init(key)._replace(hyper=start)

    def init_actor(train, batch: int):
        return agent(train).init_actor(train, batch)

    def act(train, actor, obs, is_first, key, mode: str):
        return agent(train).act(train, actor, obs, is_first, key, mode)

    def update(train, traj, key):
        new, info = agent(train).update(train, traj, key)
        return new._replace(hyper=train.hyper), info

    return Agent(init, init_actor, act, update)
