"""What a run says beside its rows of metrics."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mbrl.collect import Episodes
from mbrl.logger import Logger, Progress
from mbrl.losses import unlearned_terminals
from mbrl.seeds import Seeds
from mbrl.train import Monitor


def test_terminals_that_nobody_learns_are_said_once(tmp_path, monkeypatch):
    """When the first seed meets one; not for a model with a termination head, which has no such metric."""
    terminal, said, counts = jnp.array([[False, True], [False, False]]), [], []
    assert unlearned_terminals({"reward", "termination"}, terminal) == {}
    (share,) = unlearned_terminals({"reward"}, terminal).values()
    assert share == 0.25
    with Logger(tmp_path, [0, 1], tensorboard=False) as logger, Progress(100) as progress:
        monkeypatch.setattr(progress, "say", said.append)
        monitor = Monitor(Seeds.make(0, 2), logger, progress)
        for i, metrics in enumerate(
            ({}, {"unlearned_terminals": [0, 0]}, *2 * [{"unlearned_terminals": [0, share]}])
        ):
            metrics = {name: jnp.array(value) for name, value in metrics.items()}
            nothing = Episodes(np.zeros(2, int), np.zeros(2, np.float32))
            monitor.add(i, i, metrics, nothing, np.zeros(2, int))
            monitor.request(0.0)
            monitor.flush()
            counts.append(len(said))
    assert counts == [0, 0, 1, 1] and "--model.episodic True" in said[0]
