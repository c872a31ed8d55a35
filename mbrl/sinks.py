"""Where metrics go beside ``metrics.jsonl`` and TensorBoard: Weights & Biases and trackio."""

from __future__ import annotations

import importlib
import json
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mbrl.config import flatten
from mbrl.errors import UserError
from mbrl.run_folder import RunFolder, write_json

PROJECT = "mbrl-jax"


class Sink(NamedTuple):
    """log({name: number}, step) and close(). name: as in --sinks."""

    name: str
    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def check(names: Sequence[str]) -> None:
    """UserError where the library of a sink is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"--sinks {name} needs a library ({error}): pip install 'mbrl-jax[{name}]'"
            ) from error


def open_all(names: Sequence[str], folder: RunFolder, title: str) -> list[Sink]:
    """The sinks of a run, by name. A resumed run goes on in the run that it had there: its identity is in
    ``sinks.json`` of the folder. One that cannot be opened gives a warning, and the run goes on without."""
    if not names:
        return []
    path = folder.path / "sinks.json"
    resumed = path.exists()
    identity = json.loads(path.read_text())["id"] if resumed else uuid.uuid4().hex[:8]
    write_json(path, {"id": identity})
    settings = dict(flatten(folder.config["config"]))
    opened = []
    for name in names:
        try:
            opened.append(OPENERS[name](folder, title, identity, resumed, settings))
        except Exception as error:  # of a server, an account, a file: nothing that a run should end for
            warnings.warn(f"{name} is left out: {error}", RuntimeWarning, stacklevel=2)
    return opened


def _wandb(folder: RunFolder, title: str, identity: str, resumed: bool, settings: Mapping[str, Any]) -> Sink:
    run = importlib.import_module("wandb").init(
        project=PROJECT,
        name=folder.path.resolve().name,
        id=identity,
        resume="allow",
        notes=title,
        config=dict(settings),
        dir=str(folder.path),
    )
    return Sink("wandb", lambda values, step: run.log(values, step=step), run.finish)


def _trackio(
    folder: RunFolder, title: str, identity: str, resumed: bool, settings: Mapping[str, Any]
) -> Sink:
    name = f"{folder.path.resolve().name}-{identity}"  # names are what trackio resumes by
    resume = "allow" if resumed else "never"
    run = importlib.import_module("trackio").init(
        project=PROJECT, name=name, config=dict(settings) | {"title": title}, resume=resume
    )
    return Sink("trackio", lambda values, step: run.log(values, step=step), run.finish)


OPENERS: dict[str, Callable[..., Sink]] = {"wandb": _wandb, "trackio": _trackio}
