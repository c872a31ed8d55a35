"""Twenty updates of two small learners, on whatever devices and processes: what
tests/equivalence/test_mesh.py starts.

    python -m tests.mesh FOLDER MEMBERS DATA [MEMBERS DATA ...]

FOLDER: holds start.npz, the leaves of the state of two members. For each pair: as many members (the two,
repeated) learn on a mesh with DATA devices for the batch of each; what they learned goes into
FOLDER/processes-MEMBERS-DATA.npz, or FOLDER/devices-MEMBERS-DATA.npz where there is one process. Several
processes also save a checkpoint in FOLDER/saved; one alone reads it, for two members, and writes what it found
into FOLDER/restored.npz.

    python -m tests.mesh FOLDER train STEPS

trains two members with MuJoCo environments, in the run folder FOLDER, or goes on with what is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbrl import checkpoints, envs, optimisers
from mbrl.config import override
from mbrl.drivers import Source, make_source
from mbrl.experiment import launch
from mbrl.images import is_image
from mbrl.optimisers import OptimiserConfig
from mbrl.processes import join, leads
from mbrl.programs import LoopConfig, RunState, make_clock
from mbrl.seeds import Seeds
from mbrl.train import Run
from mbrl.types import Agent, EnvSpec, UpdateInfo

UPDATES = 20
ENV = envs.make_jax("pendulum", max_steps=6)
SOURCE = Source(ENV.spec, ENV)


class Learner(NamedTuple):
    """Everything that learns."""

    params: Any
    opt: Any
    updates: Any
    hyper: Any = ()


class Acting(NamedTuple):
    """Carried while acting."""

    action: Any


OPTIMISER = OptimiserConfig(learning_rate=1e-2, warmup=4, eps=1e-3)


def regression(spec: EnvSpec, width: int = 8, optimiser: OptimiserConfig = OPTIMISER) -> Agent:
    """Learns to predict rewards, and compiles in a second. It has what a split batch could get wrong: a mean
    over the batch, percentiles of it, noise for each of its rows, and latents that go back into replay."""
    rule = optimisers.make(optimiser, 100)

    def flat(obs):
        images = {name for name, entry in spec.obs.items() if is_image(entry)}
        read = lambda x: x.reshape(*x.shape[:-3], -1) / 255.0
        return jnp.concatenate([read(obs[name]) if name in images else obs[name] for name in sorted(obs)], -1)

    def init(key):
        sizes = sum(entry.size for entry in spec.obs.values())
        params = {"in": 0.5 * jax.random.normal(key, (sizes, width)), "out": jnp.zeros((width,))}
        return Learner(params, rule.init(params), jnp.zeros((), jnp.int32))

    def init_actor(train, batch):
        return Acting(jnp.zeros((batch, 1)))

    def act(train, actor, obs, is_first, key, mode):
        hidden = jnp.tanh(flat(obs) @ train.params["in"])
        action = jnp.tanh(hidden @ train.params["out"])[:, None]
        return action, Acting(action), {"latent": hidden}

    def update(train, traj, key):
        def loss(params):
            hidden = jnp.tanh(flat(traj.obs) @ params["in"])
            noise = jax.random.normal(key, traj.reward.shape)
            low, high = jnp.percentile(traj.reward, jnp.array([5.0, 95.0]))
            target = (traj.reward + 0.1 * noise + traj.latent.mean(-1)) / (1 + high - low)
            return ((hidden @ params["out"] - target) ** 2).mean(), hidden

        (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(train.params)
        step, opt = rule.update(grads, train.opt, train.params)
        new = Learner(optax.apply_updates(train.params, step), opt, train.updates + 1)
        return new, UpdateInfo({"loss": value}, jax.lax.stop_gradient(hidden))

    return Agent(init, init_actor, act, update)


LOOP = LoopConfig(
    num_envs=2,
    action_repeat=1,
    batch_size=4,
    batch_length=4,
    train_ratio=2.0,
    collect_steps=8,
    pretrain=UPDATES,
    log_every=32,
    eval_every=64,
    eval_episodes=2,
    checkpoint_every=64,
)


def make_run(seeds: Seeds, source: Source = SOURCE, steps: int = 800, **loop: Any) -> Run:
    config = override(LOOP, loop)
    return Run(regression(source.spec), source, seeds, config, make_clock(config, steps, 4), 4)


def train(folder: Path, steps: int) -> None:
    run = make_run(Seeds.make(0, 2), make_source("cartpole_swingup", 1), steps)
    launch(
        run,
        {"config": {"task": "cartpole_swingup"}},
        str(folder),
        "regression",
        resume=(folder / "config.json").exists(),
    )


def start_state(run: Run) -> RunState:
    """Parameters and a replay of random numbers: no program has to be compiled for it."""
    rng = np.random.default_rng(0)

    def fill(x):
        if x.dtype == bool:
            return rng.random(x.shape) < 0.1
        return (0.3 * rng.normal(size=x.shape)).astype(x.dtype)

    shapes = run.shapes
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    train = state.train._replace(params=jax.tree.map(fill, shapes.train.params))
    ring = state.replay._replace(data=jax.tree.map(fill, shapes.replay.data))
    return state._replace(train=train, replay=ring._replace(inserted=np.full_like(ring.inserted, 60)))


def learn(run: Run, start: RunState) -> Any:
    """State and metrics after the updates from ``start`` [S, ...] of NumPy arrays."""
    seeds = run.seeds
    here = jax.tree.map(lambda x: np.asarray(x)[seeds.own.start : seeds.own.stop], start)
    if jax.process_count() == 1:
        here = jax.device_put(here, seeds.sharding)
    return jax.block_until_ready(run.programs().pretrain(seeds.put(here), seeds.keys()))


def main(folder: Path, cases: list[tuple[int, int]]) -> None:
    with np.load(folder / "start.npz") as file:
        leaves = [file[name] for name in file.files]
    several = jax.process_count() > 1
    for members, data in cases:
        seeds = Seeds.make(0, members, data)
        run = make_run(seeds)
        repeated = [np.tile(x, (members // 2, *[1] * (x.ndim - 1))) for x in leaves]
        start = jax.tree.unflatten(jax.tree.structure(run.shapes), repeated)
        state, metrics = learn(run, start)
        found = jax.tree.leaves(seeds.fetch((state.train, metrics)))
        if leads():
            np.savez(folder / f"{'processes' if several else 'devices'}-{members}-{data}.npz", *found)
        if several:
            assert checkpoints.save(folder / "saved", UPDATES, state)
        elif members == 2:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            restored = checkpoints.restore(folder / "saved", like).state.train
            np.savez(folder / "restored.npz", *jax.tree.leaves(seeds.fetch(restored)))


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_PROCESS_ID" in os.environ:
        join()
    numbers = [int(x) for x in sys.argv[2:] if x != "train"]
    if "train" in sys.argv:
        train(Path(sys.argv[1]), *numbers)
        raise SystemExit
    main(Path(sys.argv[1]), list(zip(numbers[::2], numbers[1::2], strict=True)))
