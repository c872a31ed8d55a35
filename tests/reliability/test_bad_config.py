"""Wrong configurations, generated from the fields themselves: refused before anything is compiled or written,
in less than two seconds, with the field, the value and what is allowed, exit code 2 and no traceback."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import world_models
from mbrl import experiment
from mbrl.config import check_config, early_flags, override, parse_flags
from mbrl.errors import UserError
from mbrl.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "dreamer_dmc.py"
MODELS = list(world_models.LATENT)
ZERO_IS_FINE = {
    *(
        "seed",
        "loop.collect_steps",
        "loop.prefill",
        "loop.pretrain",
        "loop.eval_every",
        "loop.checkpoint_every",
        "loop.env_workers",
        "plan.value",
    ),
    *("model.unimix", "model.free_nats", "model.discount", "model.dyn_layers", "model.prior_layers"),
    *("model.post_layers", "model.deter of s4wm", "model.deter of r2i", "model.ssm_lr_scale"),
    *("model.phase_max", "model.spectrum_lr_scale", "plan.risk_fraction"),
    *("agent.imag_last", "agent.imag_starts", "agent.lam", "agent.min_std", "agent.noise_correlation"),
    *("agent.entropy", "agent.scale_rec", "agent.scale_reward", "agent.scale_cont", "agent.scale_dyn"),
    *("agent.scale_rep", "agent.scale_replay_value", "agent.slow_rate", "agent.slow_scale"),
    *("agent.return_rate", "agent.actor_average", "agent.actor_lr_scale", "agent.critic_lr_scale"),
    *("agent.optimiser.learning_rate", "agent.optimiser.warmup", "agent.optimiser.final_fraction"),
    *("agent.optimiser.decay_start", "agent.optimiser.agc", "agent.optimiser.clip_norm"),
    *("agent.optimiser.beta1", "agent.optimiser.beta2", "agent.optimiser.weight_decay"),
}
FRACTIONS = {
    "plan.risk_fraction",
    *("model.unimix", "model.discount", "agent.lam", "agent.min_std", "agent.noise_correlation"),
    *("agent.slow_rate", "agent.return_rate", "agent.actor_average", "agent.optimiser.final_fraction"),
    *("agent.optimiser.decay_start", "agent.optimiser.beta1", "agent.optimiser.beta2"),
}
TOO_LARGE = {  # what would trace, allocate or run for ever; everything else is refused beyond 32 bits
    *("num_seeds", "loop.num_envs", "loop.batch_size", "loop.batch_length", "loop.chunk", "loop.prefill"),
    *("loop.eval_episodes", "agent.horizon", "agent.actor_layers", "agent.critic_layers", "agent.bins"),
    *("agent.bin_limit", "model.encoder_layers", "model.decoder_layers", "model.head_layers", "model.bins"),
    *("model.bin_limit", "model.blocks", "model.dyn_layers", "model.prior_layers", "model.post_layers"),
    *("model.layers", "model.ssm_size", "model.ssm_blocks", "model.heads"),
}
TOO_MUCH_MEMORY = {  # the plan names the largest part of the memory instead of the field
    *("model.stoch", "model.classes", "model.units", "model.deter", "model.hidden", "model.width"),
    *("model.window", "model.mlp_factor", "model.modes", "agent.units"),
}
# Combinations and names; the words are those that the message must hold.
OTHERS = [
    (["--model.deter", "33", "--model.blocks", "2"], ["model.deter", "33", "multiple of model.blocks"]),
    (["--agent.bins", "62"], ["agent.bins", "62", "odd"]),
    (["--model.bins", "62"], ["model.bins", "62", "odd"]),
    (["--loop.train-ratio", "0.33333"], ["loop.train_ratio", "0.33333", "simple fraction"]),
    (["--loop.train-ratio", "16", "--loop.collect-steps", "7"], ["loop.collect_steps", "7", "multiple of"]),
    (["--loop.replay-size", "16"], ["loop.replay_size", "16", "at least"]),
    (["--steps", "100"], ["steps", "100", "more than"]),
    (["--agent.imag-last", "1"], ["agent.imag_last", "1", "at least 2"]),
    (["--agent.replay-bootstrap", "imagined"], ["agent.replay_bootstrap", "agent.imag_starts"]),
    (["--seed", "2147483647", "--num-seeds", "2"], ["seed", "2147483647", "between"]),
    (["--task", "pendulun"], ["--task", "pendulun", "did you mean", "pendulum"]),
    (["--task", "cartpole_swingpu"], ["--task", "cartpole_swingpu", "did you mean", "cartpole_swingup"]),
    (["--task", "probe_action_discrete"], ["agent.actor_grad", "dynamics", "use reinforce"]),
    (["--world-model", "rsms"], ["--world-model", "rsms", "did you mean", "rssm"]),
    (["--preset", "size1"], ["--preset", "size1", "did you mean", "size1m"]),
    (["--preset", ""], ["--preset", "must be one of"]),
    (["--world-model", "transformer", "--model.heads", "5"], ["model.width", "multiple of model.heads", "5"]),
    (["--world-model", "transformer", "--agent.replay-context"], ["agent.replay_context", "True", "False"]),
    (["--world-model", "s4wm", "--model.ssm-size", "18"], ["model.ssm_size", "18", "multiple of"]),
    (["--world-model", "s4wm", "--model.dt-min", "1"], ["model.dt_min", "1.0", "at most model.dt_max"]),
    (["--task", "cartpole_swingup", "--loop.action-repeat", "2000001"], ["steps", "loop.action_repeat"]),
    (["--debug", "--num-seeds", "2"], ["--debug", "num_seeds", "2"]),
    (["--loop.replay-place", "host"], ["loop.replay_place is host", "pendulum shows no images"]),
    (
        ["--obs", "pixels", "--loop.replay-place", "disk"],
        ["loop.replay_place is disk", "part of the compiled program"],
    ),
    (["--resume"], ["--resume", "--run-dir"]),
    (["--resume", "--run-dir", "nothing-here"], ["nothing-here", "config.json"]),
]


class Case(NamedTuple):
    """flags: after a sound command. words: all of them must be in the message."""

    flags: list[str]
    words: list[str]


@cache
def module():
    """The script as a module, which the tests run in this process."""
    spec = importlib.util.spec_from_file_location("dreamer_dmc_bad_config", SCRIPT)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # its annotations are looked up there
    spec.loader.exec_module(made)
    return made


def fields(config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, annotated type) of every field that is no table itself."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kinds[field.name]


def of_field(name: str, kind: object, model: str) -> Iterator[Case]:
    """Everything that is wrong for one field."""
    flag = "--" + name.replace("_", "-")
    shown = name.removeprefix("agent.") if name.startswith("agent.optimiser") else name
    # tyro reads "--flag=-1" and "--flag=" as they are meant, whatever the value begins with.
    wrong: list[tuple[str, list[str]]] = []
    if kind is int:
        wrong += [(value, [flag, "whole number"]) for value in ("ten", "1.5", "", "nan", "1e999")]
        wrong += [(value, [f"{name} is {value}", "between 0 and"]) for value in ("-1", str(2**31))]
    elif kind is float:
        wrong += [("much", [flag, "float"])]
        wrong += [
            (value, [f"{name} is ", "between"]) for value in ("-0.5", "nan", "inf", "-inf", "1e39", "1e-40")
        ]
    elif typing.get_origin(kind) is typing.Literal:
        wrong += [(value, [flag, *typing.get_args(kind)]) for value in ("", "neither")]
    if kind in (int, float) and not {name, f"{name} of {model}"} & ZERO_IS_FINE:
        wrong += [("0", [shown, " 0", "it must"])]
    if name in FRACTIONS:
        wrong += [("1.5", [f"{shown} is 1.5", "between 0 and"])]
    if name in TOO_LARGE:
        wrong += [("2000000001", [name, "200000000" if "batch" in name else ""])]
    if name in TOO_MUCH_MEMORY:
        wrong += [("2000000001", ["of memory", "the largest part", "lower"])]
    for value, words in wrong:
        yield Case([f"{flag}={value}"], words)
    if kind is bool and name not in ("resume", "distributed"):  # which ask for a folder and for others first
        words = [f"{flag} is on or off and takes no value", "alone turns it on", "turns it off"]
        yield Case([flag, "maybe"], [*words, "'maybe'"])
        yield Case([f"{flag}=true"], [*words, "'true'"])
    misspelt = flag[:-2] + flag[-1] + flag[-2] if flag[-1] != flag[-2] else flag + "s"
    if kind is not bool and name not in ("task", "seed", "steps"):  # so short that others look as close
        yield Case([misspelt, "1"], [misspelt, flag])


def cases() -> list[Case]:
    """All wrong commands, each as what differs from a sound one."""
    made = [Case(*case) for case in OTHERS]
    seen: set[str] = set()
    for model in MODELS:
        for name, kind in fields(module().default_config("xs", model, "none")):
            if name in seen:
                continue
            seen.add(name)
            extra = ["--world-model", model] if name.startswith("model.") else []
            made += [Case([*extra, *case.flags], case.words) for case in of_field(name, kind, model)]
    return made


SOUND = ["--preset", "xs", "--task", "pendulum", "--steps", "20000"]


class Accepted(Exception):
    """The command would have made its run folder."""


def refuse(flags: list[str], capsys) -> tuple[str, float]:
    """What the command prints when it is refused, on one line, and the seconds of computation."""
    given = [*SOUND, *flags]
    if "--preset" in flags:
        given = given[2:]
    began = time.process_time()
    try:
        module().main(given)
    except UserError as error:
        assert "\n" not in str(error) and error.exit_code == 2
        text = str(error)
    except SystemExit as error:
        assert error.code == 2
        text = capsys.readouterr().err
    seconds = time.process_time() - began
    # Boxes are drawn and lines broken by the parser.
    return " ".join(text.replace("│", " ").split()), seconds


@pytest.fixture
def no_run(monkeypatch):
    """Nothing may reach the run folder, and nothing may be compiled."""
    compiled = []

    def accept(*args):
        raise Accepted

    def listen(event, duration, **kwargs):
        if "backend_compile" in event:
            compiled.append(event)

    kept = RunFolder.create
    monkeypatch.setattr(RunFolder, "create", accept)
    monkeypatch.setattr(experiment, "compile_and_check", accept)
    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setenv("COLUMNS", "400")
    yield kept
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_a_sound_command_is_accepted(no_run, capsys):
    """Else the refusals below would prove nothing. For every world model."""
    for model in MODELS:
        with pytest.raises(Accepted):
            refuse(["--world-model", model], capsys)


def test_whole_numbers_may_have_an_exponent():
    """Of integer fields, behind a blank or an equals sign."""
    read = lambda *flags: parse_flags(flags, module().default_config("xs", "rssm", "none"))
    config = read("--steps", "1e5", "--loop.replay-size=2.5e4", "--agent.lam", "1e-1")
    assert (config.steps, config.loop.replay_size, config.agent.lam) == (100_000, 25_000, 0.1)
    assert read("--seed", "123456789123456789").seed == 123456789123456789
    assert early_flags(["--num-seeds", "1e1", "--preset", "xs"], num_seeds=1, preset="s").num_seeds == 10


def test_wrong_commands_are_refused(no_run, capsys):
    """Every one, by its own message."""
    failures, slowest, made = [], 0.0, cases()
    for case in made:
        try:
            text, seconds = refuse(case.flags, capsys)
        except BaseException as error:  # also Accepted: a wrong command would train
            failures.append(f"{case.flags}: {type(error).__name__} {error}")
            continue
        slowest = max(slowest, seconds)
        missing = [word for word in case.words if word not in text]
        if missing or seconds > 2:
            failures.append(f"{case.flags}: {missing} not in {text!r}, {seconds:.1f} s")
    assert not failures, f"{len(failures)} of {len(made)}:\n" + "\n".join(failures)
    assert len(made) >= 500
    with capsys.disabled():
        print(f"\n{len(made)}/{len(made)} wrong commands refused, the slowest after {slowest:.2f} s")


@pytest.mark.parametrize("wrong", [{"steps": "80000"}, {"loop": 3}, {"num_seeds": 2.0}, {"seed": True}])
def test_a_damaged_config_file_is_refused(wrong):
    """Values of a type that the parser of flags would never have let in (a stored config.json is edited)."""
    config = override(module().default_config("xs", "rssm", "none"), wrong)
    field = next(iter(wrong))
    with pytest.raises(UserError, match=rf"^{field} is .*, it must be "):
        check_config(config)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task pendulun", ["error: --task", "'pendulun'", "did you mean 'pendulum'"]),
        ("--model.unts 3", ["--model.unts", "--model.units"]),
        ("--agent.lam nan", ["error: agent.lam is nan, it must be 0, or a number between"]),
    ],
)
def test_the_process_ends_with_code_2(tmp_path, flags, words):
    """The real command: exit code 2, no traceback, no folder."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SOUND, *flags.split(), "--run-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not folder.exists()
