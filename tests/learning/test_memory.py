"""Memory that only some world models have: a cue behind 30 distractors, 600 updates of the world model alone
(docs/memory.md). Parallel backbones recall it on every seed; nothing is asked of an RSSM here."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import world_models
from mbrl import envs, probing
from mbrl.config import config_type, load_factory, override
from mbrl.presets import MEMORY
from mbrl.probing import ProbeConfig
from mbrl.seeds import Seeds

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("name", ["s4wm", "transformer"])
def test_recall(name):
    """At least 95 % in inference on each of two seeds, where chance is about 50 %."""
    env, seeds = envs.make_jax("recall:30"), Seeds.make(0, 2)
    make = load_factory("--world-model", name, world_models.REGISTRY)
    model = make(override(config_type(make)(), MEMORY["model"] | MEMORY[name]), env.spec)
    config = override(ProbeConfig(), MEMORY["probe"] | {"eval_every": 600})
    probe, keys = probing.make(config, env, model), seeds.keys()
    learn = seeds.program(probe.learn, shared=(2,), donate=0)
    state, _ = learn(seeds.program(probe.init)(keys), keys, np.int32(0))
    found = jax.block_until_ready(seeds.program(probe.examine)(state.params, keys))
    assert (np.asarray(found["chance"]) < 0.6).all()
    assert (np.asarray(found["inference"]) >= 0.95).all(), found
