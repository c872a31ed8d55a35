"""Every world model under Dreamer with its presets, by shapes alone: nothing is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import world_models
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import config_type, load_factory, override
from mbrl.errors import UserError
from mbrl.imagination import rollout
from mbrl.presets import DREAMER
from mbrl.types import ArraySpec, EnvSpec, Trajectory
from world_models import s4wm, transformer
from world_models.s4wm import S4WMConfig
from world_models.transformer import TransformerConfig

SPEC = EnvSpec("task", {"x": ArraySpec((3,))}, ArraySpec((2,)))
T, B = 10, 4  # enough posteriors for the random starts of xs


def make_agent(name: str, preset: str, **agent):
    factory, values = load_factory("world model", name, world_models.LATENT), DREAMER[preset]
    model = override(config_type(factory)(), values["model"] | values.get(name, {}))
    fields = values["agent"] | values.get(f"agent/{name}", {}) | {"optimiser": values["optimiser"]} | agent
    config = override(DreamerConfig(), fields)
    return dreamer.make(config, SPEC, factory(model, SPEC), model.discount, 100)


@pytest.mark.parametrize("preset", ["xs", "size12m"])
@pytest.mark.parametrize("name", world_models.LATENT)
def test_dreamer_trains_on(name, preset):
    """One update keeps every shape and dtype, and so does acting; what replay stores is small."""
    agent = make_agent(name, preset)

    def run(key):
        train, yes = agent.init(key), jnp.ones(B, bool)
        actor = agent.init_actor(train, B)
        _, after, info = agent.act(train, actor, {"x": jnp.zeros((B, 3))}, yes, key, "train")
        row = Trajectory({"x": jnp.zeros((B, 3))}, after.action, jnp.zeros(B), yes, yes, yes, info["latent"])
        traj = jax.tree.map(lambda x: jnp.stack([x] * T), row)
        new, update = agent.update(train, traj, key)
        return (train, new), (actor, after), (traj.latent, update.latent)

    (train, new), (actor, after), (stored, fresh) = jax.eval_shape(run, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(train) == shapes(new)
    assert shapes(actor) == shapes(after)
    assert jax.tree.structure(stored) == jax.tree.structure(fresh)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored)) < 64_000 * T * B


def test_windows_are_not_stored():
    with pytest.raises(UserError, match="replay_context"):
        make_agent("transformer", "xs", replay_context=True)


def test_memory_of_imagination_with_attention():
    """From all 2048 posteriors of a batch, with a window of 256 at width 128: at most 200 MB as XLA plans it, where
    keys and values of its own window for each start would take over 1 GB. Compiled, not run."""
    length, batch, horizon = 512, 4, 15
    sizes = dict(stoch=16, classes=16, units=128, hidden=128, width=128)
    model = transformer.make(TransformerConfig(**sizes, layers=2, heads=4, window=256), SPEC)

    def observe(params, key):
        no, zeros = jnp.zeros((length, batch), bool), jnp.zeros((length, batch))
        traj = Trajectory(
            {"x": jnp.zeros((length, batch, 3))}, jnp.zeros((length, batch, 2)), zeros, no, no, no
        )
        return model.observe(
            params, model.init_state(params, batch), traj, jax.random.split(key, length)
        ).starts

    def imagine(params, starts, key):
        return rollout(model, params, starts, lambda f, k, t: jnp.tanh(f[..., :2]), key, horizon)

    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key)
    starts = jax.eval_shape(observe, params, key)
    memory = jax.jit(imagine).lower(params, starts, key).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 200e6


@pytest.mark.parametrize("name", world_models.LATENT)
def test_small_presets_are_comparable(name):
    """With preset s every world model has about as many parameters as RSSM; those with a posterior from the
    frame alone have a larger latent, Koopman the largest; R2I has a projection, and an actor and a critic that
    read its states."""
    count = lambda name: sum(x.size for x in jax.tree.leaves(shapes(name)))
    shapes = lambda name: jax.eval_shape(make_agent(name, "s").init, jax.random.key(0)).params
    assert 0.75 < count(name) / count("rssm") < {"koopman": 2.2, "r2i": 1.9}.get(name, 1.8)


def test_states_among_the_features_do_not_drown_the_latent():
    """R2I's features: the layers' states shortened to x / sqrt(1 + |x|^2), h, z. Reward, continuation and
    decoder do not read the states."""
    config = S4WMConfig(layers=2, ssm_size=4, ssm_blocks=2, hidden_features=True)
    backbone = s4wm.backbone(config, 2)
    state = backbone.init_state(None, 1)
    ssm = jax.random.normal(jax.random.key(0), state["ssm"].shape)
    for scale in (0.0, 1.0, 1e6):
        features = backbone.features(None, state | {"ssm": scale * ssm})
        x = scale * ssm.ravel()
        expected = x / jnp.sqrt(1 + (x * x).sum())
        assert jnp.allclose(features[0, : x.size], expected, rtol=1e-6)
        assert features.shape == (1, backbone.feature_size) and jnp.linalg.norm(features) <= 1 + 1e-6
    assert backbone.unpredictive == ssm.size
    model = s4wm.make(config, SPEC)
    params = model.init(jax.random.key(0))
    state = model.init_state(params, 1)
    said = [model.predict(params, state | {"ssm": x * ssm}) for x in (0.0, 1.0)]
    assert said[0].reward == said[1].reward and said[0].cont == said[1].cont


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformer.make(TransformerConfig(width=24, heads=8), SPEC),
        lambda: transformer.make(TransformerConfig(window=0), SPEC),
        lambda: s4wm.make(S4WMConfig(ssm_size=20, ssm_blocks=8), SPEC),
        lambda: s4wm.make(S4WMConfig(dt_min=0.0), SPEC),
        lambda: s4wm.make(S4WMConfig(layers=0), SPEC),
    ],
)
def test_impossible_sizes(make):
    with pytest.raises(UserError, match=r"model\.\w+ is "):
        make()
