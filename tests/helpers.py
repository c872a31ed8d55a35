"""A tiny Dreamer run that several tests share: it compiles in seconds and uses every part of the loop."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.config import override
from mbrl.drivers import Source
from mbrl.optimisers import OptimiserConfig
from mbrl.programs import LoopConfig, make_clock
from mbrl.seeds import Seeds
from mbrl.train import Run
from world_models import rssm
from world_models.rssm import RSSMConfig

MODEL = RSSMConfig(
    stoch=2,
    classes=3,
    units=8,
    deter=8,
    hidden=8,
    blocks=2,
    prior_layers=1,
    encoder_layers=1,
    decoder_layers=1,
    bins=15,
    bin_limit=4.0,
)
AGENT = DreamerConfig(
    units=8,
    actor_layers=1,
    critic_layers=1,
    horizon=3,
    bins=15,
    bin_limit=4.0,
    # A large epsilon: with the published 1e-20 a gradient of rounding errors takes a full step, so that two
    # programs which round differently part ways within a few updates.
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup=4, eps=1e-3),
)
LOOP = LoopConfig(
    num_envs=2,
    action_repeat=1,
    batch_size=2,
    batch_length=4,
    train_ratio=2.0,  # with 4 rows an iteration: 2 updates
    collect_steps=4,
    prefill=16,
    replay_size=200,
    freeze_after=3,
)
FRAMES = 8
"""Frames of one iteration: 4 rows of 2 environments."""


def tiny_run(source: Source, seeds: Seeds, iterations: int = 100, agent: Any = None, **loop: Any) -> Run:
    """Rows of 2 environments, 4 an iteration; 2 iterations of prefill, then 2 updates in each."""
    config = override(AGENT, agent or {})
    loop_config = override(LOOP, loop)
    length = loop_config.batch_length + config.replay_context
    clock = make_clock(loop_config, iterations * FRAMES, length)
    model = rssm.make(MODEL, source.spec)
    made = dreamer.make(config, source.spec, model, MODEL.discount, clock.total_updates)
    return Run(made, source, seeds, loop_config, clock, length)


def on_one_device(*seeds: int, loop: bool = False) -> Seeds:
    """These seeds, all on one device: the seed axis is a vmap (as on an accelerator), or a loop (as on a CPU),
    and nothing else."""
    return Seeds(seeds, Mesh(np.array(jax.devices()[:1]), ("seed",)), loop)


def one_seed(tree: Any, index: int) -> Any:
    """A seed's part of arrays [S, ...]."""
    return jax.tree.map(lambda x: x[index], tree)


def as_numpy(tree: Any) -> Any:
    """A copy on the host, which later donations cannot touch."""
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(a: Any, b: Any) -> None:
    """Equal bit by bit, NaN included."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))
