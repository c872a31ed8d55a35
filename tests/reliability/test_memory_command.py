"""The command `experiments/memory.py`: bad input ends in one sentence, a probe and an agent leave what they
promise."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mbrl import probing
from mbrl.errors import UserError
from mbrl.interruption import Interrupted, Interruption
from mbrl.logger import read_metrics
from mbrl.probing import Probe, ProbeState
from tests.helpers import script

SCRIPT = Path(__file__).parents[2] / "experiments" / "memory.py"
MODEL = """
    --model.stoch 2 --model.classes 3 --model.units 8 --model.bins 5 --model.width 8 --model.hidden 8
    --model.layers 1 --model.ssm-size 4 --model.ssm-blocks 2
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def command():
    """``main(argv)`` of the script, run in this process."""
    spec = importlib.util.spec_from_file_location("memory_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task recal", ["--task", "recal", "recall"]),
        ("--gap 0", ["--task", "gap", "at least 1"]),
        ("--world-model s5", ["--world-model", "s5", "s4wm"]),
        ("--probe.updates 7 --probe.eval-every 3", ["probe.updates", "7", "probe.eval_every"]),
        ("--probe.observed 32", ["probe.observed", "32", "below the 32"]),
        ("--model.dt-min 1", ["model.dt_min", "model.dt_max"]),
        ("--resume", ["there is no run in", "config.json"]),
        ("--num-seeds 0", ["num_seeds", "0"]),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, flags, words):
    folder = tmp_path / "run"
    with pytest.raises(UserError) as error:
        command(["--run-dir", str(folder), *flags.split()])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not folder.exists()


def test_a_probe_leaves_its_accuracies(command, tmp_path, capsys):
    """Per seed, for every examination; metrics, picture and settings as every run has them."""
    folder = tmp_path / "probe"
    flags = "--gap 3 --num-seeds 2 --probe.observed 2 --probe.updates 4 --probe.eval-every 2 --probe.eval-episodes 16"
    command([*MODEL, *flags.split(), "--probe.batch-size", "4", "--run-dir", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["task"], summary["world_model"], summary["updates"]) == ("recall:3", "s4wm", 4)
    assert summary["seeds"] == [0, 1] and summary["params"] > 100
    assert [row["updates"] for row in summary["examinations"]] == [2, 4]
    for name in ("inference", "imagination", "chance"):
        assert summary[name] == summary["examinations"][-1][name] and len(summary[name]) == 2
        assert all(0 <= share <= 1 and (16 * share).is_integer() for share in summary[name])
    rows = read_metrics(folder)
    assert [(row["step"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert all(np.isfinite(row["reward_loss"]) and "inference" in row for row in rows)
    assert (folder / "curve.png").stat().st_size > 5_000
    assert json.loads((folder / "config.json").read_text())["config"]["gap"] == 3
    assert "4 updates: inference" in capsys.readouterr().out


def counting(config, env, model) -> Probe:
    """A probe that compiles at once: its parameter grows by a random number at every stretch of updates."""

    def learn(state, key, first):
        grown = state.params + jax.random.uniform(jax.random.fold_in(key, first))
        return ProbeState(grown, state.opt), {"reward_loss": grown}

    def examine(params, key):
        return {"inference": params, "imagination": params / 2, "chance": params / 3}

    return Probe(lambda key: ProbeState(jax.random.uniform(key), ()), learn, examine)


def test_an_interrupted_probe_goes_on(command, tmp_path, monkeypatch):
    """Ctrl-C ends one after its next examination; resumed, it finds what an undisturbed one finds."""
    monkeypatch.setattr(probing, "make", counting)
    flags = [*MODEL, "--gap", "3", "--probe.updates", "6", "--probe.eval-every", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command([*flags, "--run-dir", str(whole)])

    def interrupting(interruption):
        interruption.number = signal.SIGINT
        return interruption

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(Interruption, "__enter__", interrupting)
        patch.setattr(Interruption, "__exit__", lambda *_: None)
        command([*flags, "--run-dir", str(cut)])
    assert stop.value.exit_code == 130
    assert f"stopped at 2 updates; --resume --run-dir {cut} continues" in str(stop.value)
    with pytest.raises(UserError, match="gap differs"):
        command(["--resume", "--run-dir", str(cut), "--gap", "4"])
    command(["--resume", "--run-dir", str(cut)])
    assert read_metrics(cut) == read_metrics(whole)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    assert results[0]["examinations"] == results[1]["examinations"]


def test_an_agent_runs(tmp_path):
    """Of the preset for memory tasks, on a task that needs an answer; as every run it can be resumed."""
    folder = tmp_path / "agent"
    flags = """
        --preset memory --world-model s4wm --task tmaze:3 --steps 256 --loop.num-envs 2 --loop.prefill 64
        --loop.batch-size 4 --loop.batch-length 8 --loop.train-ratio 8 --loop.collect-steps 8
        --loop.eval-episodes 2 --agent.imag-starts 4 --agent.horizon 3
    """.split()  # noqa: SIM905
    script("dreamer_dmc")([*MODEL, *flags, "--run-dir", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert np.shape(summary["eval_return"]["episodes"]) == (1, 2)
    assert set(np.ravel(summary["eval_return"]["episodes"])) <= {0.0, 1.0}
    assert json.loads((folder / "config.json").read_text())["config"]["agent"]["actor_grad"] == "reinforce"
