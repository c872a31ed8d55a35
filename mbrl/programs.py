"""The compiled programs of a run and its clock. The loop that calls them is `mbrl.train`.

    iteration = collect n steps of E environments; add them to replay; U updates

With device environments a whole chunk of iterations is one program; with host environments (MuJoCo) the
policy is one program, and storing and updating another. All get the seed axis from `mbrl.seeds`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import ceil, gcd
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.collect import collect_device, init_device, random_action, renew
from mbrl.errors import UserError, check_above, check_at_least, check_between
from mbrl.replay import Replay, ReplayState
from mbrl.seeds import Seeds, split_batch
from mbrl.types import Agent, Array, EnvSpec, JaxEnv, PyTree, Transition

# Every random stream of a run is fold_in(fold_in(seed key, stream), clock): nothing random needs saving,
# and a new consumer does not shift the others.
INIT, ENVS, ACT, UPDATE, EVALUATE, PRETRAIN = range(6)
DIAGNOSE = 100  # far from the streams of a run

OFFLINE_UPDATES = 20
"""Updates per iteration of a run that learns from recorded episodes."""


@dataclass(frozen=True)
class LoopConfig:
    """The loop: environments, replay, how often to update, log, evaluate and save. Counts are per seed."""

    num_envs: int = 16
    """Environments stepped side by side (E)."""
    env_workers: int = 0
    """Processes that step the environments beside training, where these are Python objects; 0 steps them in
    the process of the run. Results do not depend on it."""
    env_timeout: float = 60.0
    """Seconds after which a worker that does not answer is taken as hanging, and started again."""
    action_repeat: int = 2
    """Simulator frames per agent step in dm_control (published curves count frames); JAX environments have
    their own."""
    batch_size: int = 16
    """Sequences per update (B)."""
    batch_length: int = 64
    """Trained time steps of each sequence (T)."""
    train_ratio: float = 512.0
    """Replayed time steps per agent step, so updates per agent step are train_ratio / (B T)."""
    collect_steps: int = 0
    """Steps of each environment between two bursts of updates; 0 takes the fewest that give whole updates."""
    prefill: int = 0
    """Agent steps collected before the first update; 0 waits for batch_size x batch_length sequences."""
    prefill_random: bool = False
    """Prefill with uniform random actions; otherwise with the untrained policy (published)."""
    pretrain: int = 0
    """Updates on the prefilled replay before the first step that counts for train_ratio."""
    replay_size: int = 5_000_000
    """Agent steps that replay holds; never more than the run collects."""
    replay_online: bool = True
    """Serve every fresh sequence once before uniform ones."""
    replay_place: Literal["auto", "device", "host", "disk"] = "auto"
    """Where images of replay lie while training: on the device; in the memory of the host, from where each
    batch is fetched while the one before is learned from; or likewise in a file of the run folder. auto takes
    the first of these of which replay needs at most half. Results do not depend on it."""
    chunk: int = 1
    """Iterations per compiled call with device environments; results do not depend on it."""
    log_every: int = 2000
    """Frames between two rows of metrics."""
    eval_every: int = 10_000
    """Frames between two evaluations; 0 evaluates at the end only."""
    eval_episodes: int = 10
    """Episodes per seed, and per task where there are several, of each evaluation, with the deterministic
    policy."""
    checkpoint_every: int = 20_000
    """Frames between two checkpoints; 0 saves at the end only."""
    freeze_after: int = 100
    """A seed whose last updates were all rejected as not finite, this many, stops learning."""


class Clock(NamedTuple):
    """Static numbers of a run, in iterations unless said. rows: steps per environment and iteration (n);
    updates: per iteration (U); prefill, total; frames: simulator frames per iteration; capacity: rows;
    pretrain: updates at the end of prefill. unit: what ``frames`` counts, updates where there are none."""

    rows: int
    updates: int
    prefill: int
    total: int
    frames: int
    capacity: int
    pretrain: int = 0
    unit: str = "frames"

    @property
    def total_updates(self) -> int:
        return self.updates_until(self.total)

    def updates_until(self, iteration: int) -> int:
        """Updates before ``iteration``."""
        return self.pretrain + (iteration - self.prefill) * self.updates if iteration > self.prefill else 0

    def every(self, frames: int, chunk: int) -> int:
        """``frames`` as iterations, a whole number of chunks, at least one chunk."""
        return max(1, round(frames / self.frames / chunk)) * chunk


def make_clock(config: LoopConfig, steps: int, length: int) -> Clock:
    """Turns a config into the run's clock; ``steps`` in simulator frames, ``length`` rows per sequence.

    Raises UserError where the train ratio gives no whole number of updates, or prefill cannot fill a
    sequence, or the run ends before it learns.
    """
    _check_loop(config, steps)
    if not config.train_ratio > 0:
        raise UserError(f"loop.train_ratio is {config.train_ratio}, it must be above 0")
    per_update = config.batch_size * config.batch_length
    scale = 1_000_000  # ratios are decimal numbers: compare them as integers
    ratio = round(config.train_ratio * scale) * config.num_envs
    fewest = per_update * scale // gcd(per_update * scale, ratio)
    rows = config.collect_steps or fewest
    if fewest > 100_000:
        raise UserError(
            f"loop.train_ratio {config.train_ratio:g} with loop.batch_size {config.batch_size} and "
            f"loop.batch_length {config.batch_length} needs {fewest} steps of every environment for a whole "
            f"number of updates, at most 100000 are allowed: choose a ratio that is a simple fraction of "
            f"{per_update} / {config.num_envs}"
        )
    if (rows * ratio) % (per_update * scale):
        raise UserError(
            f"loop.train_ratio {config.train_ratio:g} with {config.num_envs} environments, "
            f"loop.collect_steps {rows} and batches of {config.batch_size} x {config.batch_length} gives "
            f"{rows * ratio / scale / per_update:g} updates per iteration, it must be whole: "
            f"use a multiple of {fewest} as loop.collect_steps"
        )
    frames = rows * config.num_envs * config.action_repeat

    def chunks(iterations):
        return ceil(iterations / config.chunk) * config.chunk

    prefill = config.prefill or per_update + config.num_envs * (length - 1)
    prefill = chunks(max(1, ceil(max(prefill / config.num_envs, length) / rows)))
    total = chunks(max(1, ceil(steps / frames)))
    if total <= prefill:
        raise UserError(
            f"steps is {steps} frames, but the first {prefill * frames} only fill replay: "
            f"use more than {prefill * frames}, or a smaller loop.prefill, loop.num_envs, loop.chunk or "
            "loop.action_repeat"
        )
    capacity = min(config.replay_size // config.num_envs, total * rows)
    if config.replay_size // config.num_envs < length + rows:
        raise UserError(
            f"loop.replay_size is {config.replay_size}, it must be at least "
            f"{(length + rows) * config.num_envs} to hold one sequence of each environment"
        )
    updates = round(rows * ratio / scale / per_update)
    return Clock(rows, updates, prefill, total, frames, capacity, config.pretrain)


def make_offline_clock(config: LoopConfig, steps: int, rows: int) -> Clock:
    """The clock of a run that learns from ``rows`` recorded rows of every column and collects nothing: it
    counts updates, ``steps`` of them, and so do the intervals of ``config``."""
    _check_loop(config, steps)
    updates = min(OFFLINE_UPDATES, steps)
    total = ceil(steps / updates)
    return Clock(0, updates, prefill=0, total=total, frames=updates, capacity=rows, unit="updates")


def _check_loop(config: LoopConfig, steps: int) -> None:
    """UserError for numbers that no run could use."""
    check_at_least("steps", steps, 1)
    for field in ("num_envs", "action_repeat", "batch_size", "chunk", "log_every"):
        check_at_least(f"loop.{field}", getattr(config, field), 1)
    check_between("loop.eval_episodes", config.eval_episodes, 1, 10_000)
    check_at_least("loop.batch_length", config.batch_length, 2)
    check_at_least("loop.freeze_after", config.freeze_after, 1)
    for field in ("prefill", "pretrain", "collect_steps", "eval_every", "checkpoint_every", "env_workers"):
        check_at_least(f"loop.{field}", getattr(config, field), 0)
    check_above("loop.env_timeout", config.env_timeout, 0)


class Health(NamedTuple):
    """Updates of one seed that were not finite. rejected: all; consecutive: since the last good one;
    frozen: the seed learns no more."""

    rejected: Array
    consecutive: Array
    frozen: Array


class RunState(NamedTuple):
    """Everything of one seed that a checkpoint holds; with the seed axis [S] in front while running.

    env: `EnvCarry` of JAX environments, () where they live on the host. Images of replay may lie elsewhere
    (`mbrl.host_replay`); a checkpoint holds them all the same.
    """

    train: PyTree
    actor: PyTree
    replay: ReplayState
    health: Health
    env: PyTree


def stream(key: Array, name: int, clock: Array | int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, name), clock)


def burst_keys(key: Array, name: int, clock: Array | int, updates: int) -> Array:
    """The key of each update [U] of a burst."""
    return jax.random.split(stream(key, name, clock), updates)


def all_finite(tree: PyTree) -> Array:
    """Whether every floating-point number of the tree is finite. By a maximum per leaf: XLA repeats a
    reduction of booleans inside every selection that depends on it, which doubles the compile time."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.isfinite(jnp.stack([jnp.abs(x).max() for x in leaves])).all()


def update_loop(
    agent: Agent,
    replay: Replay,
    state: RunState,
    keys: Array,
    freeze_after: int,
    beside: Mapping[str, Array] = MappingProxyType({}),
):
    """Gradient steps of one seed on fresh samples, one for each of ``keys`` [U] -> (state, mean metrics).
    beside: observations of the samples [U, T, B, ...] that replay does not hold on the device.

    An update whose result is not finite is rejected: parameters, optimiser and latents stay as they were.
    """

    def body(carry, drawn):
        train, ring, health = carry
        key, beside = drawn
        sample_key, update_key = jax.random.split(key)
        ring, sampled = replay.sample(ring, sample_key, beside)
        new, info = agent.update(train, split_batch(sampled.traj), update_key)
        good = all_finite((new, info.metrics["loss"]))
        accept = good & ~health.frozen
        train = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, train)
        if jax.tree.leaves(info.latent):
            stored = jax.tree.map(lambda old, new: old[-new.shape[0] :], sampled.traj.latent, info.latent)
            kept = jax.tree.map(lambda new, old: jnp.where(accept, new, old), info.latent, stored)
            ring = replay.write_latent(ring, sampled, kept)
        consecutive = jnp.where(good, 0, health.consecutive + 1)
        frozen = health.frozen | (consecutive >= freeze_after)
        health = Health(health.rejected + (~good).astype(jnp.int32), consecutive, frozen)
        return (train, ring, health), info.metrics

    carry, metrics = jax.lax.scan(body, (state.train, state.replay, state.health), (keys, dict(beside)))
    train, ring, health = carry
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    metrics |= {"rejected_updates": health.rejected, "frozen": health.frozen}
    return state._replace(train=train, replay=ring, health=health), metrics


class Programs(NamedTuple):
    """The compiled programs of a run; all arguments and results carry the seed axis, the clock does not.

    init(keys) -> RunState
    act(train, actor, obs, is_first, keys, step) -> (action, actor, latent): host
    act_random: likewise, for prefill
    store(state, rows, latents) -> state: host prefill
    learn(state, rows, latents, keys, iteration) -> (state, metrics): host
    pretrain(state, keys) -> (state, metrics): the updates between prefill and the first iteration that learns
    fill(state, rows) -> state: recorded rows [N, E, ...], the same for all seeds, into the empty replay
    update(state, keys, iteration) -> (state, metrics): the updates of an iteration that collects nothing
    step(state, beside, key data [S, ...]) -> (state, metrics): one update, by its key and with the
        observations {key: [S, T, B, ...]} that replay does not hold on the device
    prefill(state, keys, iteration) -> (state, Episodes): device
    chunk(state, keys, iteration) -> (state, metrics, Episodes): device
    """

    init: Callable
    act: Callable
    act_random: Callable
    store: Callable
    learn: Callable
    pretrain: Callable
    fill: Callable
    update: Callable
    step: Callable
    prefill: Callable
    chunk: Callable


def make_programs(
    agent: Agent,
    replay: Replay,
    spec: EnvSpec,
    env: JaxEnv | None,
    seeds: Seeds,
    config: LoopConfig,
    clock: Clock,
    beside: Collection[str] = (),
) -> Programs:
    """Programs of one run. env: the JAX environment, or None where environments live on the host. beside:
    observations that replay does not hold on the device."""
    num_envs = config.num_envs

    def init(key) -> RunState:
        train = agent.init(stream(key, INIT, 0))
        actor = agent.init_actor(train, num_envs)
        carry = () if env is None else init_device(env, num_envs, stream(key, ENVS, 0))
        row = example_row(agent, spec, num_envs, beside)
        return RunState(train, actor, replay.init(row), init_health(), carry)

    def act(train, actor, obs, is_first, key, step, random):
        act_key, random_key = jax.random.split(stream(key, ACT, step))
        mode = "watch" if random else "train"
        action, actor, info = agent.act(train, actor, obs, is_first, act_key, mode=mode)
        if random:
            action = random_action(random_key, spec, num_envs)
            actor = actor._replace(action=action)
        return action, actor, info["latent"]

    def store(state: RunState, rows, latents) -> RunState:
        latent = jax.tree.map(lambda *xs: jnp.stack(xs), *latents)
        return state._replace(replay=replay.add(state.replay, rows._replace(latent=latent)))

    def update(state, key, iteration):
        keys = burst_keys(key, UPDATE, iteration, clock.updates)
        return update_loop(agent, replay, state, keys, config.freeze_after)

    def step(state, beside, key_data):
        key, one = jax.random.wrap_key_data(key_data), jax.tree.map(lambda x: x[None], beside)
        return update_loop(agent, replay, state, key[None], config.freeze_after, one)

    def learn(state, rows, latents, key, iteration):
        return update(store(state, rows, latents), key, iteration)

    def pretrain(state, key):
        keys = burst_keys(key, PRETRAIN, 0, clock.pretrain)
        return update_loop(agent, replay, state, keys, config.freeze_after)

    def fill(state: RunState, rows) -> RunState:
        rows = rows._replace(latent=state.replay.data.latent)  # nothing was inferred yet: zeros
        return state._replace(replay=replay.add(state.replay, rows))

    def collect(state: RunState, key, iteration, explore):
        assert env is not None
        # Iteration 0 shares its key with the first reset of all, but renews nothing.
        carry = renew(env, state.env, stream(key, ENVS, iteration), clock.rows, iteration)
        actor, carry, rows, episodes = collect_device(
            env, agent, state.train, state.actor, carry, stream(key, ACT, iteration), clock.rows, explore
        )
        return state._replace(actor=actor, env=carry, replay=replay.add(state.replay, rows)), episodes

    def prefill(state, key, iteration):
        def body(state, i):
            return collect(state, key, iteration + i, config.prefill_random)

        state, episodes = jax.lax.scan(body, state, jnp.arange(config.chunk))
        return state, jax.tree.map(lambda x: x.sum(0), episodes)

    def chunk(state, key, iteration):
        def body(state, i):
            state, episodes = collect(state, key, iteration + i, False)
            state, metrics = update(state, key, iteration + i)
            return state, (metrics, episodes)

        state, (metrics, episodes) = jax.lax.scan(body, state, jnp.arange(config.chunk))
        totals = {name: metrics.pop(name)[-1] for name in ("rejected_updates", "frozen")}
        means = jax.tree.map(lambda x: x.mean(0), metrics)
        return state, means | totals, jax.tree.map(lambda x: x.sum(0), episodes)

    policy = seeds.program(lambda *args: act(*args, random=False), shared=(5,))
    explore = seeds.program(lambda *args: act(*args, random=True), shared=(5,))
    return Programs(
        init=seeds.program(init),
        act=policy,
        act_random=explore if config.prefill_random else policy,
        store=seeds.program(store, donate=0),
        learn=seeds.program(learn, shared=(4,), donate=0),
        pretrain=seeds.program(pretrain, donate=0),
        fill=seeds.program(fill, shared=(1,), donate=0),
        update=seeds.program(update, shared=(2,), donate=0),
        step=seeds.program(step, donate=0),
        prefill=seeds.program(prefill, shared=(2,), donate=0),
        chunk=seeds.program(chunk, shared=(2,), donate=0),
    )


def init_health() -> Health:
    return Health(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def example_row(agent: Agent, spec: EnvSpec, num_envs: int, beside: Collection[str] = ()) -> Transition:
    """Zeros with the shapes and dtypes of one replay row [E, ...], without the observations in ``beside``."""

    def observation(key):
        obs = {k: jnp.zeros((num_envs, *s.shape), s.dtype) for k, s in spec.obs.items()}
        flag, number = jnp.zeros(num_envs, bool), jnp.zeros(num_envs)
        init_key, act_key = jax.random.split(key)
        train = agent.init(init_key)
        actor = agent.init_actor(train, num_envs)
        action, _, info = agent.act(train, actor, obs, flag, act_key, mode="train")
        obs = {k: x for k, x in obs.items() if k not in beside}
        return Transition(obs, action, number, flag, flag, flag, info["latent"])

    shapes = jax.eval_shape(observation, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
