"""PETS on the DeepMind Control Suite, or on an environment written in JAX.

    python experiments/pets.py --task cartpole_swingup --planner icem --num-seeds 3 --steps 20000

With no flags: cartpole_swingup with the preset that suits this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import planners
from mbrl.agents import pets
from mbrl.agents.pets import PETSConfig
from mbrl.agents.planning import assemble, default_search
from mbrl.config import choose, override, run_main
from mbrl.experiment import Experiment, execute, parse
from mbrl.planning import PlanConfig, RuleConfig
from mbrl.presets import PETS as PRESETS
from mbrl.programs import LoopConfig
from mbrl.types import Agent, EnvSpec
from world_models.ensemble import EnsembleConfig, make

RULES = {name: path for name, path in planners.REGISTRY.items() if name not in ("policy", "guided")}
"""Search rules that need no policy."""


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """PETS: planning in an ensemble of probabilistic networks."""

    search: RuleConfig
    """Settings of the planner."""
    planner: str = "cem"
    """Planner by name (cem, icem, mppi, random, ...) that chooses the actions."""
    model: EnsembleConfig = field(default_factory=EnsembleConfig)
    """World model."""
    agent: PETSConfig = field(default_factory=PETSConfig)
    """How it learns."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """How the planner is used."""


def default_config(preset: str, planner: str) -> Config:
    """The config of a preset, before flags."""
    values = PRESETS[choose("--preset", preset, list(PRESETS))]
    search = default_search(choose("--planner", planner, list(RULES)), RULES)
    changes = {"policy_samples": 0} | values["search"].get(planner, {})
    known = {name: value for name, value in changes.items() if hasattr(search, name)}
    return Config(
        preset=preset,
        planner=planner,
        search=override(search, known),
        model=override(EnsembleConfig(), values["model"]),
        agent=override(PETSConfig(), values["agent"]),
        plan=override(PlanConfig(), values["plan"]),
        loop=override(LoopConfig(), values["loop"]),
    )


def make_agent(config: Config, spec: EnvSpec, total_updates: int) -> Agent:
    return assemble(pets, config, spec, make(config.model, spec), total_updates, RULES)


def main(argv: Sequence[str]) -> None:
    config = parse(argv, default_config, PRESETS, "paper", planner="cem")
    # T transitions have T + 1 rows.
    execute(config, "pets", make_agent, extra_rows=1, name=f"PETS, planner {config.planner}")


if __name__ == "__main__":
    run_main(main)
