"""Grid or random search over the settings of an experiment: what changes no shape is one program.

    python experiments/sweep.py experiments/dreamer_dmc.py --num-seeds 3 \\
        --vary agent.entropy=1e-4,3e-4,1e-3 agent.lam=0.9,0.95 -- --task pendulum --steps 40000
    python experiments/sweep.py experiments/tdmpc_dmc.py --search random --trials 8 \\
        --vary agent.optimiser.learning_rate=log:1e-4:1e-3 search.temperature=0.2:1.0 -- --task pendulum

What follows -- are flags of the experiment. Settings that differ only in numbers such as learning rates, loss
weights, the discount or a planner's temperature are trained together, seed by seed, in one program; others
one program after the other. Leaves results.json and results.csv, best setting first, and the run folders.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.config import check_config, early_flags, run_main
from mbrl.drivers import NO_TASK
from mbrl.errors import UserError, check_at_least
from mbrl.experiment import default_folder
from mbrl.population import can_vary, look_up, with_values
from mbrl.run_folder import RunFolder, jsonable, portable, write_json
from mbrl.statistics import bootstrap_interval, iqm

OWN = {"seed": None, "num_seeds": None, "run_dir": None, "resume": False, "distributed": False}
"""Flags of an experiment that a sweep gives itself, and what they are where nobody gives them."""


@dataclass(frozen=True)
class Config:
    """Grid or random search over the settings of an experiment."""

    script: Annotated[Path, tyro.conf.Positional]
    """The experiment, which ends in a call of ``execute``."""
    vary: tuple[str, ...]
    """FIELD=A,B,C lists values; FIELD=LOW:HIGH and FIELD=log:LOW:HIGH are ranges for random search."""
    search: Literal["grid", "random"] = "grid"
    """All combinations of the values, or random ones."""
    trials: int = 16
    """Settings that random search draws."""
    num_seeds: int = 3
    """Seeds of each setting. No two settings share one."""
    seed: int = 0
    """First seed, and that of random search."""
    sweep_dir: str = ""
    """Folder of the sweep; empty makes a new one under runs/. The sweep in an old one goes on."""


def experiment(script: Path, flags: list[str]) -> SimpleNamespace:
    """What the experiment would execute with these flags: config, kind, make_agent, extra_rows, name, run."""
    spec = importlib.util.spec_from_file_location("swept_experiment", script)
    if spec is None or spec.loader is None or not script.is_file():
        raise UserError(f"script is {script}, it must be an experiment such as experiments/dreamer_dmc.py")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    if not hasattr(module, "execute"):
        raise UserError(f"{script} cannot be swept: it does not end in a call of mbrl.experiment.execute")
    found, run = SimpleNamespace(), module.execute

    def keep(config, kind, make_agent, extra_rows, name):
        vars(found).update(config=config, parts=(kind, make_agent, extra_rows, name), run=run)

    module.execute = keep
    module.main(flags)
    return found


@dataclass(frozen=True)
class Axis:
    """What a field may be: one of ``values``, or any number between the two of a range, drawn uniformly or,
    with ``log``, so that its logarithm is."""

    name: str
    values: tuple[Any, ...]
    is_range: bool = False
    log: bool = False

    def draw(self, rng: np.random.Generator) -> Any:
        if not self.is_range:
            return self.values[rng.integers(len(self.values))]
        low, high = np.log(self.values) if self.log else self.values
        number = rng.uniform(low, high)
        return type(self.values[0])(np.exp(number) if self.log else number)


def parse_axis(item: str, base: Any) -> Axis:
    """FIELD=VALUES for a field of ``base``; UserError for what is none."""
    name, equals, text = item.partition("=")
    if not equals:
        raise UserError(f"--vary {item} must be FIELD=VALUES")
    if name in ("seed", "num_seeds"):
        raise UserError(
            f"--vary {name}: every setting has own seeds, as many as --num-seeds says, from --seed on"
        )
    if name in OWN or name == "data_parallel":
        raise UserError(f"--vary {name}: this is the same for the whole sweep")
    kind = type(look_up(base, name))
    if kind not in (int, float, str, bool):
        raise UserError(f"--vary {name} is {kind.__name__}, it must be a number, a text, or true or false")
    if kind not in (int, float) or ":" not in text:
        return Axis(name, tuple(parse_value(name, kind, part) for part in text.split(",")))
    log, *limits = text.split(":") if text.startswith("log:") else ("", *text.split(":"))
    if len(limits) != 2:
        raise UserError(f"--vary {item}: a range is LOW:HIGH or log:LOW:HIGH")
    low, high = (parse_value(name, kind, limit) for limit in limits)
    if not low < high < np.inf or (log and not low > 0):
        above = " and above 0" * bool(log)
        raise UserError(f"--vary {item}: LOW must be below HIGH{above}")
    return Axis(name, (low, high), True, bool(log))


def parse_value(name: str, kind: type, text: str) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"--vary {name} has the value {text!r}, it must be {kind.__name__}") from None


def settings(config: Config, base: Any) -> list[dict[str, Any]]:
    """The settings of the sweep, {dotted field: value} each."""
    axes = [parse_axis(item, base) for item in config.vary]
    names = [axis.name for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--vary names {twice} twice")
    if config.search == "grid":
        if ranges := [axis.name for axis in axes if axis.is_range]:
            raise UserError(f"--vary {ranges[0]} is a range: use --search random, or list its values")
        combined = itertools.product(*(axis.values for axis in axes))
        return [dict(zip(names, values, strict=True)) for values in combined]
    check_at_least("trials", config.trials, 1)
    rng = np.random.default_rng(config.seed)
    return [{axis.name: axis.draw(rng) for axis in axes} for _ in range(config.trials)]


def programs(
    config: Config, flags: list[str], base: SimpleNamespace
) -> list[tuple[SimpleNamespace, list[dict[str, Any]]]]:
    """What is trained together: (the experiment with what its settings share, settings) of each program.

    What a setting changes reaches the experiment as flags, so that presets, and what else follows from a
    flag, apply; but for the numbers in which the members of a program differ.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    # By what says which other fields there are: the preset, the world model, ...
    decided: dict[tuple, SimpleNamespace] = {(): base}
    for setting in settings(config, base.config):
        deciding = tuple((k, v) for k, v in setting.items() if "." not in k)
        if deciding not in decided:
            decided[deciding] = experiment(config.script, flags + as_flags(deciding))
        own = decided[deciding].config
        for name in setting:
            look_up(own, name)
        fixed = tuple((k, v) for k, v in setting.items() if not can_vary(own, k))
        groups.setdefault(fixed, []).append(setting)
    made = [experiment(config.script, flags + as_flags(fixed)) if fixed else base for fixed in groups]
    return list(zip(made, groups.values()))


def as_flags(values: Sequence[tuple[str, Any]]) -> list[str]:
    """Fields by their dotted names as flags of an experiment."""
    flags = []
    for name, value in values:
        path, dot, last = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            flags.append(f"--{path}{dot}{'' if value else 'no-'}{last}")
        else:
            flags.append(f"--{path}{dot}{last}={value}")
    return flags


def train_group(found: SimpleNamespace, base: Any, group: list[dict], seeds: int) -> Any:
    """The summary of a run whose members are ``seeds`` of each setting; from its folder where it is there."""
    fields = [name for name in group[0] if can_vary(base, name)]
    members = [setting for setting in group for _ in range(seeds)]
    vary = {name: [member[name] for member in members] for name in fields} if len(group) > 1 else {}
    config = with_values(base, {k: v for k, v in group[0].items() if k not in vary})
    check_config(config)
    folder = Path(config.run_dir)
    if (folder / "config.json").exists():
        stored, anywhere = RunFolder.config_of(folder), {"run_dir": ""}
        mine = jsonable(portable(dataclasses.asdict(config) | anywhere))
        if stored.get("vary", {}) != jsonable(vary) or stored["config"] | anywhere != mine:
            raise UserError(f"{folder} is of another sweep: give another --sweep-dir")
        if RunFolder.has_checkpoint(folder):
            config = dataclasses.replace(config, resume=True)
        else:
            aside = RunFolder.set_aside(folder)
            print(f"{folder} was stopped before its first checkpoint: it is now {aside}, and starts anew")
    return found.run(config, *found.parts, vary=vary)


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """results.json, results.csv and a table on the screen, best setting first."""
    rows = sorted(rows, key=lambda row: -np.nan_to_num(row["iqm"], nan=-np.inf))
    write_json(folder / "results.json", rows)
    names = list(rows[0]["setting"])
    table = Table(*names, "IQM", "95 % interval", "per seed", title=folder.name)
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "iqm", "low", "high", "run", "seeds", "per_seed"])
        for row in rows:
            values, returns = row["setting"].values(), " ".join(f"{x:.1f}" for x in row["per_seed"])
            seeds = " ".join(map(str, row["seeds"]))
            writer.writerow([*values, row["iqm"], *row["ci"], row["run"], seeds, returns])
            shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
            interval = "one seed" if len(row["seeds"]) == 1 else "{:.1f} to {:.1f}".format(*row["ci"])
            table.add_row(*shown, f"{row['iqm']:.1f}", interval, returns)
    Console().print(table)


def check_flags(flags: Sequence[str]) -> None:
    """UserError for flags of the experiment that the sweep would override."""
    given = early_flags(flags, **OWN)
    if given.distributed:
        raise UserError("--distributed is not for sweeps: a sweep runs in one process")
    for name, unset in OWN.items():
        if getattr(given, name) != unset:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} belongs to the sweep itself: give it before --, or not at all")


def main(argv: Sequence[str]) -> None:
    at = list(argv).index("--") if "--" in argv else len(argv)
    flags = list(argv[at + 1 :])
    config = tyro.cli(Config, args=argv[:at])
    check_at_least("num_seeds", config.num_seeds, 1)
    check_flags(flags)
    folder = Path(config.sweep_dir or default_folder("sweep"))
    # As many seeds as all settings could need: the CPU's virtual devices are counted from it.
    count = config.trials if config.search == "random" else np.prod([1 + v.count(",") for v in config.vary])
    flags += ["--num-seeds", str(count * config.num_seeds)]
    found = experiment(config.script, flags)
    if found.config.task == NO_TASK:
        raise UserError(
            "a sweep compares returns: with --offline, name the environment to evaluate in by --task"
        )
    groups = programs(config, flags, found)
    count = sum(len(group) for _, group in groups)
    print(f"{count} settings with {config.num_seeds} seeds, {len(groups)} program(s)")
    print(f"--sweep-dir {folder} with the same command continues this sweep if it is stopped")
    rows, seed = [], config.seed
    for number, (found, group) in enumerate(groups):
        name, size = f"group{number}", len(group) * config.num_seeds
        place = {"run_dir": str(folder / name), "seed": seed, "num_seeds": size}
        base = dataclasses.replace(found.config, **place)
        summary = train_group(found, base, group, config.num_seeds)
        returns = np.reshape(summary["eval_return"]["per_seed"], (len(group), -1))
        for i, (setting, values) in enumerate(zip(group, returns, strict=True)):
            own = range(seed + i * config.num_seeds, seed + (i + 1) * config.num_seeds)
            result = {"iqm": iqm(values), "ci": bootstrap_interval(values), "per_seed": values.tolist()}
            rows.append({"setting": setting, **result, "run": name, "seeds": list(own)})
        seed += size
        report(rows, folder)
    print(f"results.json, results.csv and the run folders: {folder}")


if __name__ == "__main__":
    run_main(main)
