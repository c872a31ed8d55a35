"""The first and the fifth update of every agent, to five digits, as they were when somebody last looked: a change
of any number that training depends on must be meant.

    python -m tests.unit.test_golden_steps    # writes tests/data/golden_steps.json anew
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import world_models
from mbrl.agents import dreamer, pets, tdmpc
from mbrl.agents.pets import PETSConfig
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import config_type, load_factory, override
from mbrl.types import Agent, ArraySpec, EnvSpec, Trajectory
from tests.helpers import AGENT

FILE = Path(__file__).parents[1] / "data" / "golden_steps.json"
SPEC = EnvSpec("golden", {"x": ArraySpec((3,)), "kind": ArraySpec((), "int32", 4)}, ArraySpec((2,)))
T, B, DISCOUNT = 7, 3, 0.9
LATENT = dict(
    stoch=3, classes=4, units=16, hidden=16, encoder_layers=1, decoder_layers=1, bins=15, bin_limit=4.0
)
SSM = LATENT | dict(width=16, layers=2, ssm_size=8, ssm_blocks=2)
MODELS = {
    "rssm": LATENT | dict(deter=16, blocks=2),
    "s4wm": SSM,
    "r2i": SSM | dict(deter=12),
    "transformer": LATENT | dict(width=16, layers=2, heads=2, window=3),
    "koopman": LATENT | dict(width=16, modes=8),
    "tdmpc": dict(latent=8, simnorm=4, encoder_units=8, units=8, bins=15, bin_limit=4.0, episodic=True),
    "ensemble": dict(members=3, elites=2, holdout=0.2, layers=1, units=8, episodic=True),
}
FAST = {"rssm", "tdmpc"}
# Large, so that no rounding error of a gradient takes a full step.
EPS = {"optimiser": {"eps": 1e-3}, "actor_optimiser": {"eps": 1e-3}}


def make_agent(name: str) -> Agent:
    """TD-MPC2 and PETS on their world models, Dreamer on the others."""
    factory = load_factory("world model", name, world_models.REGISTRY)
    fields = MODELS[name] | {"discount": DISCOUNT}
    model = factory(override(config_type(factory)(), fields), SPEC)
    if name == "tdmpc":
        config = override(TDMPCConfig(units=8, critics=3, bins=15, bin_limit=4.0), EPS)
        return tdmpc.make(config, SPEC, model, DISCOUNT, 100)
    if name == "ensemble":
        config = override(PETSConfig(), {"optimiser": EPS["optimiser"]})
        return pets.make(config, SPEC, model, DISCOUNT, 100)
    return dreamer.make(override(AGENT, {"replay_context": False}), SPEC, model, DISCOUNT, 100)


def batch() -> Trajectory:
    """Random rows with episode ends of both kinds."""
    rng = np.random.default_rng(0)
    first = rng.random((T, B)) < 0.2
    last = np.concatenate([first[1:], np.zeros((1, B), bool)])
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    obs = {"x": normal(T, B, 3), "kind": rng.integers(0, 4, (T, B)).astype(np.int32)}
    rows = Trajectory(obs, normal(T, B, 2), normal(T, B), first, last, last & (rng.random((T, B)) < 0.5))
    return jax.tree.map(jnp.asarray, rows)


def rms(tree) -> float:
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return float(np.sqrt(np.mean(np.concatenate(leaves) ** 2)))


def figures(name: str) -> dict[str, float]:
    """loss, gradient norm, RMS of the parameters' change and of the parameters, of updates 1 and 5."""
    agent, traj, found = make_agent(name), batch(), {}
    update, train = jax.jit(agent.update), jax.jit(agent.init)(jax.random.key(0))
    for i in range(1, 6):
        before = train
        train, info = update(train, traj, jax.random.key(i))
        if i in (1, 5):
            change = jax.tree.map(lambda a, b: a - b, train.params, before.params)
            numbers = (info.metrics["loss"], info.metrics["grad_norm"], rms(change), rms(train.params))
            names = ("loss", "grad_norm", "update_rms", "param_rms")
            found |= {f"{n}_{i}": float(f"{float(x):.6g}") for n, x in zip(names, numbers, strict=True)}
    return found


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_golden_steps(name):
    stored = json.loads(FILE.read_text())[name]
    for key, value in figures(name).items():
        hint = f"{name} {key}: if it is meant, run python -m tests.unit.test_golden_steps"
        assert value == pytest.approx(stored[key], rel=5e-5), hint


def test_every_world_model_has_golden_steps():
    """Its own, or those of the model of which it is a setting."""
    settings = {"storm": "transformer", "transdreamer": "transformer"}
    assert {settings.get(name, name) for name in world_models.REGISTRY} == set(MODELS)
    assert json.loads(FILE.read_text()).keys() == MODELS.keys()


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: figures(name) for name in MODELS}, indent=1) + "\n")
