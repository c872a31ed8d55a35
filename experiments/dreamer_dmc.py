"""Dreamer on the DeepMind Control Suite, or on an environment written in JAX.

    python experiments/dreamer_dmc.py --task walker_walk --preset size12m --num-seeds 4 --steps 100000

With no flags: cartpole_swingup with the preset that suits this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

import world_models
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import choose, config_type, load_factory, override, run_main
from mbrl.experiment import Experiment, execute, parse
from mbrl.latent_model import LatentConfig
from mbrl.presets import DREAMER as PRESETS
from mbrl.programs import LoopConfig
from mbrl.types import Agent, EnvSpec


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """Dreamer: a world model, and an actor-critic that learns in its imagination."""

    model: LatentConfig
    """World model."""
    world_model: str = "rssm"
    """World model by name."""
    agent: DreamerConfig = field(default_factory=DreamerConfig)
    """Behaviour."""


def default_config(preset: str, world_model: str) -> Config:
    """The config of a preset, before flags."""
    values = PRESETS[choose("--preset", preset, list(PRESETS))]
    model = config_type(load_factory("--world-model", world_model, world_models.LATENT))()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = override(model, {"dtype": dtype} | values["model"] | values.get(world_model, {}))
    agent = values["agent"] | values.get(f"agent/{world_model}", {})
    agent = override(DreamerConfig(), agent | {"optimiser": values["optimiser"]})
    loop = override(LoopConfig(), values["loop"])
    return Config(model=model, preset=preset, world_model=world_model, agent=agent, loop=loop)


def make_agent(config: Config, spec: EnvSpec, total_updates: int) -> Agent:
    make_model = load_factory("--world-model", config.world_model, world_models.LATENT)
    model = make_model(config.model, spec)
    return dreamer.make(config.agent, spec, model, config.model.discount, total_updates)


def main(argv: Sequence[str]) -> None:
    config = parse(argv, default_config, list(PRESETS), accelerator="size12m", world_model="rssm")
    # With replay context, one row more: its stored latent is where a sequence begins.
    execute(config, make_agent, int(config.agent.replay_context), f"Dreamer, {config.world_model}")


if __name__ == "__main__":
    run_main(main)
