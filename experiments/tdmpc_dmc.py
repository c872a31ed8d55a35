"""TD-MPC2 on the DeepMind Control Suite, or on an environment written in JAX.

    python experiments/tdmpc_dmc.py --task walker_walk --preset 5M --num-seeds 4 --steps 100000

With no flags: cartpole_swingup with the preset that suits this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import planners
from mbrl.agents import tdmpc
from mbrl.agents.planning import assemble, default_search
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import choose, override, run_main
from mbrl.envs.pixels import CameraConfig
from mbrl.experiment import Experiment, execute, parse
from mbrl.planning import PlanConfig, RuleConfig
from mbrl.presets import TDMPC as PRESETS
from mbrl.programs import LoopConfig
from mbrl.types import Agent, EnvSpec
from world_models.tdmpc import TDMPCModelConfig, make


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """TD-MPC2: planning in a latent world model with a learned terminal value and policy prior."""

    search: RuleConfig
    """Settings of the planner."""
    planner: str = "mppi"
    """Planner by name (mppi, icem, ...) that chooses the actions; none acts by the policy prior alone."""
    model: TDMPCModelConfig = field(default_factory=TDMPCModelConfig)
    """World model."""
    agent: TDMPCConfig = field(default_factory=TDMPCConfig)
    """Value and policy."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """How the planner is used."""


def default_config(preset: str, planner: str) -> Config:
    """The config of a preset, before flags."""
    values = PRESETS[choose("--preset", preset, list(PRESETS))]
    search = default_search(planner, planners.REGISTRY)
    return Config(
        preset=preset,
        planner=planner,
        search=override(search, values["search"].get(planner, {})),
        model=override(TDMPCModelConfig(), values["model"]),
        agent=override(TDMPCConfig(), values["agent"]),
        loop=override(LoopConfig(), values["loop"]),
        camera=CameraConfig(frame_stack=3),
    )


def make_agent(config: Config, spec: EnvSpec, total_updates: int) -> Agent:
    return assemble(tdmpc, config, spec, make(config.model, spec), total_updates, planners.REGISTRY)


def main(argv: Sequence[str]) -> None:
    config = parse(argv, default_config, PRESETS, "5M", planner="mppi")
    # H transitions have H + 1 rows.
    execute(config, "tdmpc", make_agent, extra_rows=1, name=f"TD-MPC2, planner {config.planner}")


if __name__ == "__main__":
    run_main(main)
