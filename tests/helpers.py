"""Tiny runs of Dreamer and TD-MPC2 that several tests share: they compile in seconds and use every part of
the loop."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import world_models.tdmpc
from mbrl.agents import dreamer, tdmpc
from mbrl.agents.dreamer import DreamerConfig
from mbrl.agents.planning import with_planner
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import override
from mbrl.drivers import Source
from mbrl.optimisers import OptimiserConfig
from mbrl.planning import make_objective, make_planner
from mbrl.programs import LoopConfig, make_clock
from mbrl.seeds import Seeds
from mbrl.train import Run
from mbrl.types import WorldModel
from planners import mppi
from world_models import rssm
from world_models.rssm import RSSMConfig
from world_models.tdmpc import TDMPCModelConfig

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
TDMPC_MODEL = TDMPCModelConfig(
    latent=8, simnorm=4, encoder_units=8, units=8, bins=15, bin_limit=4.0, discount=0.9
)
FRAMES = 8
"""Frames of one iteration: 4 rows of 2 environments."""
TINY = """
    --preset xs --loop.num-envs 2 --loop.prefill 64 --loop.batch-size 4 --loop.batch-length 8
    --loop.train-ratio 8 --loop.collect-steps 8 --loop.eval-episodes 2 --agent.imag-starts 4
    --agent.horizon 3 --task pendulum --num-seeds 2 --seed 5 --steps 600
""".split()  # noqa: SIM905
"""Flags of a whole run of `experiments/dreamer_dmc.py` in seconds."""


def script(name: str) -> Callable[..., None]:
    """``main(argv)`` of an experiment, run in this process."""
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[1] / "experiments" / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module.main


def stored_run(
    name: str, planner: str, agent: dict | None = None, model: dict | None = None
) -> dict[str, Any]:
    """What ``config.json`` holds of the experiment ``name`` on pendulum, preset s, with a few fields changed."""
    config = script(name).__globals__["default_config"]("s", planner=planner)
    config = override(config, {"task": "pendulum", "agent": agent or {}, "model": model or {}})
    return {"agent": name.partition("_")[0], "config": dataclasses.asdict(config)}


def tiny_run(
    source: Source,
    seeds: Seeds,
    iterations: int = 100,
    agent: Any = None,
    model: WorldModel | None = None,
    **loop: Any,
) -> Run:
    """Rows of 2 environments, 4 an iteration; 2 iterations of prefill, then 2 updates in each. An RSSM unless
    ``model`` says otherwise."""
    config = override(AGENT, agent or {})
    loop_config = override(LOOP, loop)
    length = loop_config.batch_length + config.replay_context
    clock = make_clock(loop_config, iterations * FRAMES, length)
    model = rssm.make(MODEL, source.spec) if model is None else model
    made = dreamer.make(config, source.spec, model, MODEL.discount, clock.total_updates)
    return Run(made, source, seeds, loop_config, clock, length)


def tiny_tdmpc_run(source: Source, seeds: Seeds) -> Run:
    """TD-MPC2 that plans: 2 iterations of prefill, a burst of 2 updates, then 2 updates in each iteration."""
    loop_config = override(
        LOOP, {"batch_length": 3, "train_ratio": 1.5, "pretrain": 2, "prefill_random": True}
    )
    length = loop_config.batch_length + 1
    clock = make_clock(loop_config, 100 * FRAMES, length)
    model = world_models.tdmpc.make(TDMPC_MODEL, source.spec)
    optimisers = {name: {"eps": 1e-3} for name in ("optimiser", "actor_optimiser")}
    config = override(TDMPCConfig(units=8, critics=3, bins=15, bin_limit=4.0), optimisers)
    agent = tdmpc.make(config, source.spec, model, 0.9, clock.total_updates)
    search = mppi.MPPIConfig(horizon=2, iterations=2, samples=6, elites=3, policy_samples=2)
    simulator = tdmpc.make_simulator(config, source.spec, model, 0.9)
    planner = make_planner(simulator, mppi.make(search, source.spec.action))
    agent = with_planner(agent, planner, make_objective(), partial(tdmpc.acting_params, config))
    return Run(agent, source, seeds, loop_config, clock, length)


def rng_words(rng: np.random.Generator) -> np.ndarray:
    """The state of a generator of NumPy's default kind, uint64 [4], as an environment's ``get_state`` wants it."""
    state = rng.bit_generator.state["state"]
    return np.array(
        [state[k] >> shift & (2**64 - 1) for k in ("state", "inc") for shift in (0, 64)], np.uint64
    )


def set_rng(rng: np.random.Generator, words: np.ndarray) -> None:
    """The generator goes on where `rng_words` was taken."""
    a, b, c, d = (int(word) for word in words)
    inner = {"state": a | b << 64, "inc": c | d << 64}
    rng.bit_generator.state = rng.bit_generator.state | {"state": inner, "has_uint32": 0}


def on_one_device(*seeds: int, loop: bool = False) -> Seeds:
    """These seeds, all on one device: the seed axis is a vmap (as on an accelerator), or a loop (as on a CPU),
    and nothing else."""
    return Seeds(seeds, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("seed", "data")), loop)


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
