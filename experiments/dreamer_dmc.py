"""Dreamer on the DeepMind Control Suite, or on an environment written in JAX.

    python experiments/dreamer_dmc.py --task walker_walk --preset size12m --num-seeds 4 --steps 100000

With no flags: cartpole_swingup with the preset that suits this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

import planners
import world_models
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.agents.planning import assemble, default_search
from mbrl.config import choose, config_type, load_factory, override, run_main
from mbrl.envs.pixels import CAMERA
from mbrl.experiment import Experiment, execute, parse
from mbrl.latent_model import LatentConfig
from mbrl.planning import PlanConfig, RuleConfig
from mbrl.presets import DREAMER as PRESETS
from mbrl.programs import LoopConfig
from mbrl.types import Agent, EnvSpec


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """Dreamer: a world model, and an actor-critic that learns in its imagination."""

    model: LatentConfig
    """World model."""
    search: RuleConfig
    """Settings of the planner."""
    world_model: str = "rssm"
    """World model by name."""
    planner: str = "none"
    """Planner by name (mppi, icem, ...) that chooses the actions, with proposals of the actor and the critic
    at the horizon; none acts by the actor alone."""
    agent: DreamerConfig = field(default_factory=DreamerConfig)
    """Behaviour."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """How the planner is used."""


def default_config(preset: str, world_model: str, planner: str) -> Config:
    """The config of a preset, before flags."""
    values = PRESETS[choose("--preset", preset, list(PRESETS))]
    model = config_type(load_factory("--world-model", world_model, world_models.LATENT))()
    search = default_search(planner, planners.REGISTRY)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    agent = values["agent"] | values.get(f"agent/{world_model}", {})
    return Config(
        preset=preset,
        world_model=world_model,
        planner=planner,
        model=override(model, {"dtype": dtype} | values["model"] | values.get(world_model, {})),
        search=override(search, values["search"].get(planner, {})),
        agent=override(DreamerConfig(), agent | {"optimiser": values["optimiser"]}),
        loop=override(LoopConfig(), values["loop"]),
        camera=override(CAMERA, values.get("camera", {})),
    )


def make_agent(config: Config, spec: EnvSpec, total_updates: int) -> Agent:
    make_model = load_factory("--world-model", config.world_model, world_models.LATENT)
    model = make_model(config.model, spec)
    return assemble(dreamer, config, spec, model, total_updates, planners.REGISTRY)


def main(argv: Sequence[str]) -> None:
    config = parse(argv, default_config, PRESETS, "size12m", world_model="rssm", planner="none")
    # With replay context, one row more: its stored latent is where a sequence begins.
    extra_rows = int(config.agent.replay_context)
    execute(config, "dreamer", make_agent, extra_rows, f"Dreamer, {config.world_model}")


if __name__ == "__main__":
    run_main(main)
