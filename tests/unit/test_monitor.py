"""What a run says beside its rows of metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.collect import Episodes
from mbrl.logger import Logger, Progress
from mbrl.losses import unlearned_terminals
from mbrl.seeds import Seeds
from mbrl.train import Monitor, Timer


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
    assert counts == [0, 0, 1, 1] and said[0].endswith("--model.episodic") and "True" not in said[0]


def test_progress_counts_what_is_computed(tmp_path, monkeypatch):
    """An iteration is shown when the next one is under way, and the last one when it is asked for; a speed
    over iterations that were merely sent off would be hundreds of times too high."""
    shown = []
    with Logger(tmp_path, [0], tensorboard=False) as logger, Progress(30) as progress:
        monkeypatch.setattr(
            progress, "update", lambda frames, returns, updates: shown.append((frames, updates))
        )
        monkeypatch.setattr(progress, "compiled", lambda: shown.append("compiled"))
        monitor = Monitor(Seeds.make(0, 1), logger, progress)
        nothing = Episodes(np.zeros(1, int), np.zeros(1, np.float32))
        for i in (1, 2, 3):
            monitor.add(10 * i, i, {"loss": jnp.zeros(1)}, nothing, np.zeros(1, int))
            if i == 1:
                monitor.show(compiled=True)
        assert shown == ["compiled", (10, 1), (20, 2)]  # each once, or its speed would be 0
        monitor.show()
    assert shown[-1] == (30, 3)


def test_what_is_compiled_meanwhile_counts_as_compiling(monkeypatch):
    timer, clock = Timer(compiling=1.0), [0.0]
    monkeypatch.setattr("mbrl.train.time.perf_counter", lambda: clock[0])
    with timer("evaluate"):
        clock[0] = 10.0
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 4.0)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 2.0)
    assert timer.seconds == {"compile": 5.0, "train": 0.0, "evaluate": 6.0, "save": 0.0}
    assert timer.latest == 10.0


def test_compiling_is_told_by_jax():
    timer = Timer()
    with timer("evaluate"):
        jax.jit(lambda x: x * 3 + len(str(timer)))(1.0).block_until_ready()
    assert timer.seconds["compile"] > 0
