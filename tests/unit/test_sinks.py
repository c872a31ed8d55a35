"""Sinks beside the files: what they get, the same run after a resume, and a run that outlives them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mbrl import sinks
from mbrl.errors import UserError
from mbrl.logger import Logger, read_metrics
from mbrl.run_folder import RunFolder

STORED = {"agent": "dreamer", "config": {"task": "pendulum", "model": {"units": 8}}}


@pytest.fixture
def library(monkeypatch):
    """A stand-in for both libraries: notes what it was asked to do, and breaks where it is told to."""
    calls = []

    def init(**options):
        calls.append(("init", options))

        def log(values, step):
            if step == library.breaks_at:
                raise ConnectionError("the server is gone")
            calls.append(("log", values, step))

        return SimpleNamespace(log=log, finish=lambda: calls.append(("finish",)))

    library = SimpleNamespace(init=init, calls=calls, breaks_at=None)
    for name in sinks.OPENERS:
        monkeypatch.setitem(sys.modules, name, library)
    return library


@pytest.mark.parametrize("name", sinks.OPENERS)
def test_values_of_every_seed_and_their_mean(name, library, tmp_path):
    folder = RunFolder.create(tmp_path / "run", STORED)
    opened = sinks.open_all([name], folder, "title")
    with Logger(folder, [3, 4], tensorboard=False, sinks=opened) as logger:
        logger.log(10, {"loss": np.array([1.0, 3.0]), "bad": np.array([np.nan, 2.0]), "none": np.nan})
    (_, options), logged, finished = library.calls
    assert options["config"]["model.units"] == 8 and options["project"] == "mbrl-jax"
    values = {"seed_3/loss": 1.0, "seed_4/loss": 3.0, "loss": 2.0, "seed_4/bad": 2.0, "bad": 2.0}
    assert logged == ("log", values, 10) and finished == ("finish",)


@pytest.mark.parametrize(("name", "identity"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_in_the_same_one(name, identity, library, tmp_path):
    folder = RunFolder.create(tmp_path / "run", STORED)
    for _ in range(2):
        sinks.open_all([name], folder, "title")
    (_, first), (_, second) = library.calls
    assert first[identity] == second[identity] and json.loads((folder.path / "sinks.json").read_text())["id"]
    assert second["resume"] == "allow"
    other = RunFolder.create(tmp_path / "other" / "run", STORED)  # a folder of the same name
    sinks.open_all([name], other, "title")
    assert library.calls[-1][1][identity] != first[identity]


def test_no_step_is_sent_twice(library, tmp_path):
    """After a resume from a checkpoint that is older than the log."""
    folder = RunFolder.create(tmp_path / "run", STORED)
    for steps, resume in (((10, 20, 30), None), ((20, 30, 40), 10)):
        with Logger(folder, [0], tensorboard=False, sinks=sinks.open_all(["trackio"], folder, "t")) as logger:
            if resume:
                logger.truncate_to(resume)
            for step in steps:
                logger.log(step, {"loss": step})
    assert [call[2] for call in library.calls if call[0] == "log"] == [10, 20, 30, 40]
    assert [row["step"] for row in read_metrics(folder)] == [10, 20, 30, 40]


def test_a_run_outlives_its_sinks(library, tmp_path):
    """One that cannot be opened, and one that fails later, cost one warning each."""
    folder = RunFolder.create(tmp_path / "run", STORED)
    (opened,) = sinks.open_all(["wandb"], folder, "title")
    library.breaks_at = 20
    with Logger(folder, [0], tensorboard=False, sinks=[opened]) as logger:
        logger.log(10, {"loss": 1.0})
        with pytest.warns(RuntimeWarning, match="wandb is left out from now on: the server is gone") as said:
            logger.log(20, {"loss": 2.0})
            logger.log(30, {"loss": 3.0})
    assert len(said) == 1 and [row["loss"] for row in read_metrics(folder)] == [1.0, 2.0, 3.0]
    del library.init
    with pytest.warns(RuntimeWarning, match="trackio is left out"):
        assert sinks.open_all(["trackio"], folder, "title") == []


def test_a_missing_library_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    with pytest.raises(UserError, match=r"--sinks wandb needs .*pip install 'mbrl-jax\[wandb\]'"):
        sinks.check(["wandb"])
    sinks.check([])
