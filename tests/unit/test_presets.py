"""Presets against the published sizes, and their inner consistency. Nothing is allocated: shapes only."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import world_models
from mbrl import envs
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import config_type, load_factory, override
from mbrl.planning import PlanConfig
from mbrl.presets import ABOUT, DREAMER, MEMORY, PETS, TDMPC
from mbrl.probing import ProbeConfig
from mbrl.programs import LoopConfig, make_clock
from mbrl.types import ArraySpec, EnvSpec
from world_models import rssm
from world_models.ensemble import EnsembleConfig
from world_models.rssm import RSSMConfig

WALKER = EnvSpec(
    "walker_walk",
    {"height": ArraySpec((1,)), "orientations": ArraySpec((14,)), "velocity": ArraySpec((9,))},
    ArraySpec((6,)),
)

# danijar/dreamerv3 on walker observations, without the slow critic and the optimiser's state. The first two
# are exact counts, the others are published to 0.1 million.
PUBLISHED = {
    "size1m": 640_867,
    "size12m": 9_738_019,
    "size25m": 21.8e6,
    "size50m": 38.6e6,
    "size100m": 86.6e6,
    "size200m": 153.8e6,
    "size400m": 345.5e6,
}


def configs(name: str) -> tuple[RSSMConfig, DreamerConfig, LoopConfig]:
    values = DREAMER[name]
    model = override(RSSMConfig(), values["model"] | values["rssm"])
    agent = override(DreamerConfig(), values["agent"] | {"optimiser": values["optimiser"]})
    return model, agent, override(LoopConfig(), values["loop"])


def shapes(name: str):
    """The abstract TrainState of a preset."""
    model, agent, _ = configs(name)
    spec = pictures(DREAMER[name]["camera"]["size"]) if "camera" in DREAMER[name] else WALKER
    made = dreamer.make(agent, spec, rssm.make(model, spec), model.discount, 1000)
    return jax.eval_shape(made.init, jax.random.key(0))


def pictures(size: int) -> EnvSpec:
    return EnvSpec("walker_walk_pixels", {"image": ArraySpec((size, size, 3), "uint8")}, WALKER.action)


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    """A layer, bias or norm too many or too few shows here; everything that learns is float32."""
    train = shapes(name)
    total = count(train.params)
    assert (total if isinstance(PUBLISHED[name], int) else round(total, -5)) == PUBLISHED[name]
    assert count(train.slow) == count(train.params["critic"])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(train.params))


def image_parameters(depth: int, units: int, deter: int, stoch: int) -> tuple[int, int]:
    """Of the published networks for one 64 x 64 RGB image, encoder and decoder, counted by hand: kernels and
    biases of the layers, a scale per channel of each norm."""
    down = [3, 2 * depth, 3 * depth, 4 * depth, 4 * depth]
    up = [4 * depth, 4 * depth, 3 * depth, 2 * depth, 3]
    convs = lambda widths: sum(25 * a * b + b for a, b in itertools.pairwise(widths))
    small = 4 * 4 * 4 * depth
    space = deter * small // 8 + small  # of h, in 8 blocks
    space += stoch * 2 * units + 2 * (2 * units) + 2 * units * small + small  # of z, through twice the units
    return convs(down) + sum(down[1:]), space + 4 * depth + convs(up) + sum(up[1:-1])


@pytest.mark.parametrize("name", ["size12m", "size50m"])
def test_parameter_count_of_pixels(name):
    """The vector networks are gone, the image networks are there, and the posterior reads 256 features a depth."""
    spec = pictures(64)
    model, agent, _ = configs(name)
    made = dreamer.make(agent, spec, rssm.make(model, spec), model.discount, 1000)
    pixels, state = jax.eval_shape(made.init, jax.random.key(0)).params, shapes(name).params
    depth, units = model.image_depth, model.units
    assert depth == {"size12m": 16, "size50m": 32}[name]
    encoder, decoder = image_parameters(depth, units, model.deter, model.stoch * model.classes)
    assert count(pixels["model"]["image_encoder"]) == encoder
    assert count(pixels["model"]["image_decoder"]) == decoder
    tokens = 4 * 4 * 4 * depth - units  # more inputs of the posterior's first layer
    vectors = count(state["model"]["encoder"]) + count(state["model"]["decoder"])
    assert count(pixels) == count(state) - vectors + encoder + decoder + tokens * model.hidden


def test_dynamics_of_size1m():
    """The recurrence alone, by the published formula."""
    assert count(shapes("size1m").params["model"]["backbone"]) == 364_416


def test_small_presets_are_small():
    """xs is for tests and quick looks; s is what a CPU runs by default. Both are far below the smallest
    published size."""
    xs, s = count(shapes("xs").params), count(shapes("s").params)
    assert xs < s and xs < 50_000 and s < PUBLISHED["size1m"] / 2


@pytest.mark.parametrize("name", ["rssm", "s4wm", "r2i", "transformer"])
def test_memory_preset(name):
    """Backbones of one width that differ in little but their memory, small enough for probes on a CPU; an
    agent's batches hold an episode of the tasks that need one."""
    make = load_factory("--world-model", name, world_models.REGISTRY)
    config = override(config_type(make)(), MEMORY["model"] | MEMORY[name])
    assert 64 in (getattr(config, "width", 0), getattr(config, "deter", 0)) and config.units == 64
    model = make(config, envs.make_jax("recall:30").spec)
    assert 50_000 < count(jax.eval_shape(model.init, jax.random.key(0))) < 400_000
    assert override(ProbeConfig(), MEMORY["probe"]).optimiser.learning_rate == 1e-3
    assert override(LoopConfig(), MEMORY["loop"]).batch_length > envs.make_jax("tmaze:30").spec.max_steps


@pytest.mark.parametrize("name", DREAMER)
def test_preset_is_consistent(name):
    """Every field exists (override refuses unknown ones), sizes divide, critic and reward share their bins, the
    train ratio gives whole updates, and random starts do not bootstrap from imagined returns."""
    model, agent, loop = configs(name)
    assert model.deter % model.blocks == 0
    assert model.bins % 2 == agent.bins % 2 == 1
    assert (model.bins, model.bin_limit) == (agent.bins, agent.bin_limit)
    assert not (agent.imag_starts and agent.replay_bootstrap == "imagined")
    assert agent.imag_starts <= loop.batch_size * loop.batch_length
    clock = make_clock(loop, 500_000, loop.batch_length + agent.replay_context)
    per_step = clock.updates / (clock.rows * loop.num_envs)
    assert per_step * loop.batch_size * loop.batch_length == pytest.approx(loop.train_ratio)


@pytest.mark.parametrize("name", PETS)
def test_pets_preset(name):
    """Every elite runs an equal share of the particles; one update per agent step."""
    values = PETS[name]
    model, plan = override(EnsembleConfig(), values["model"]), override(PlanConfig(), values["plan"])
    assert plan.particles % model.elites == 0
    loop = override(LoopConfig(), values["loop"])
    clock = make_clock(loop, 10_000, loop.batch_length + 1)
    assert clock.updates == clock.rows * loop.num_envs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    """What all published sizes share: the defaults of the configs are the paper's numbers."""
    model, agent, loop = configs(name)
    assert (model.stoch, model.blocks, model.unimix, model.free_nats, model.bins) == (32, 8, 0.01, 1.0, 255)
    assert (model.dyn_layers, model.post_layers, model.prior_layers) == (1, 1, 2)
    assert (model.encoder_layers, model.decoder_layers, model.head_layers) == (3, 3, 1)
    assert model.discount == pytest.approx(1 - 1 / 333) and model.deter == 32 * model.classes * 4
    assert model.units == model.hidden == agent.units == 16 * model.classes
    assert (agent.actor_grad, agent.horizon, agent.lam, agent.entropy) == ("reinforce", 15, 0.95, 3e-4)
    assert (agent.imag_last, agent.imag_starts, agent.replay_bootstrap) == (0, 0, "imagined")
    scales = [getattr(agent, f"scale_{k}") for k in ("rec", "reward", "cont", "dyn", "rep", "replay_value")]
    assert scales == [1.0, 1.0, 1.0, 1.0, 0.1, 0.3]
    assert (agent.slow_rate, agent.slow_scale, agent.return_rate) == (0.02, 1.0, 0.01)
    assert agent.replay_context and loop.replay_online
    assert (loop.num_envs, loop.batch_size, loop.batch_length, loop.replay_size) == (16, 16, 64, 5_000_000)
    optimiser = agent.optimiser
    assert (optimiser.name, optimiser.learning_rate, optimiser.warmup) == ("laprop", 4e-5, 1000)
    assert (optimiser.decay, optimiser.agc, optimiser.eps) == ("constant", 0.3, 1e-20)
    assert (optimiser.beta1, optimiser.beta2, optimiser.weight_decay) == (0.9, 0.999, 0.0)


def test_every_preset_is_described():
    """``python -m mbrl presets`` has a line for each, with its true size."""
    assert {name: list(rows) for name, rows in ABOUT.items()} == {
        "DreamerV3": list(DREAMER),
        "TD-MPC2": list(TDMPC),
        "PETS": list(PETS),
    }
    for name, about in ABOUT["DreamerV3"].items():
        number, unit = about.parameters.split()
        assert float(number) * {"k": 1e3, "M": 1e6}[unit] == pytest.approx(
            count(shapes(name).params), rel=0.1
        )
