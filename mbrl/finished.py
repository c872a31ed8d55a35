"""Finished runs: ``mbrl.load(run_dir)`` rebuilds the agent of a run folder, to watch, use or study it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import checkpoints, evaluation, multitask, video
from mbrl.agents.planning import assemble, default_search
from mbrl.config import choose, config_type, load_factory, override, resolve
from mbrl.drivers import Source, make_pool, stored_source
from mbrl.errors import UserError, check_at_least
from mbrl.imagination import rollout
from mbrl.planning import PlanConfig
from mbrl.population import with_hyper, with_values
from mbrl.programs import EVALUATE, LoopConfig, stream
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds
from mbrl.types import Agent, Array, PyTree, Starts, Trajectory, WorldModel

# Import paths, not imports: parts of an agent load only when a run names them.
AGENTS = {"dreamer": "mbrl.agents.dreamer", "tdmpc": "mbrl.agents.tdmpc", "pets": "mbrl.agents.pets"}
ONLY_MODEL = {"tdmpc": "tdmpc", "pets": "ensemble"}  # of agents that have but one world model


class Parts(NamedTuple):
    """What a run is made of, rebuilt from its stored config. model: without the numbers in which members of a
    sweep differ; model_of(train): with those of a seed."""

    source: Source
    model: WorldModel
    model_of: Callable[[PyTree], WorldModel]
    agent: Agent
    loop: LoopConfig


def rebuild(stored: Mapping[str, Any]) -> Parts:
    """The parts of a run from what its ``config.json`` holds.

    Raises UserError when the settings are those of another release, or when the task is not installed here.
    """
    rules = resolve("planners:REGISTRY")
    try:
        config = stored["config"]
        if not isinstance(config.get("agent"), Mapping):
            raise UserError("this run trained no agent, so there is none to load")
        kind = choose("agent", stored.get("agent", "dreamer"), list(AGENTS))
        name = ONLY_MODEL.get(kind) or config["world_model"]
        factory = load_factory("world_model", name, resolve("world_models:REGISTRY"))
        agents = importlib.import_module(AGENTS[kind])
        planner = config.get("planner", "none")
        settings = SimpleNamespace(
            model=override(config_type(factory)(), config["model"]),
            agent=override(config_type(agents.make)(), config["agent"]),
            planner=planner,
            search=override(default_search(planner, rules), config.get("search", {})),
            plan=override(PlanConfig(), config.get("plan", {})),
        )
        loop = override(LoopConfig(), config["loop"])
        source = stored_source(stored)
    except KeyError as error:
        raise UserError(f"config.json has no entry {error}, so the run cannot be rebuilt") from error

    def build(settings) -> Agent:
        model = factory(settings.model, source.spec)
        # The length of the run shapes the learning rate only, and a finished run learns no more.
        return assemble(agents, settings, source.spec, model, 1, rules)

    names = stored.get("applied", list(stored.get("vary", ())))

    def model_of(train) -> WorldModel:
        own = with_values(settings, {name: train.hyper[name] for name in names})
        return factory(own.model, source.spec)

    model = factory(settings.model, source.spec)
    return Parts(source, model, model_of, with_hyper(build, settings, names), loop)


def load(run_dir: str | os.PathLike, **acting: Any) -> Finished:
    """The agents of a run, one per seed, from the newest intact checkpoint of its folder.

    acting: settings that replace the run's own and change no parameters: ``planner="none"`` (or another
    planner, with its default settings), ``search={"samples": 64}``, ``plan={"value": 0.0}``.
    The run may still be going on. Replay is not read. Raises UserError when there is no run, no checkpoint,
    or one of other code.
    """
    stored = act_by(RunFolder.config_of(run_dir), acting)
    parts, config = rebuild(stored), stored["config"]
    seeds = Seeds.make(config["seed"], config["num_seeds"])
    shapes = jax.eval_shape(seeds.program(parts.agent.init), seeds.keys())
    if varied := stored.get("vary"):  # saved, whether or not it is applied
        number = jax.ShapeDtypeStruct((len(seeds),), jnp.float32)
        shapes = shapes._replace(hyper=dict.fromkeys(varied, number))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=seeds.sharding), shapes)
    restored = checkpoints.restore(Path(run_dir) / "checkpoints", like, part=".train")
    return Finished(Path(run_dir), stored, restored.step, parts, seeds, restored.state)


def act_by(stored: dict[str, Any], acting: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` would hold if the run acted by other settings; see `load`. Its entry "applied"
    names what a sweep varied and they leave as it was."""
    if not acting:
        return stored
    for name in acting:
        choose("what load() replaces", name, ["planner", "search", "plan"])
    config, varied = stored.get("config", {}), list(stored.get("vary", ()))
    changed = dict(config)
    if acting.get("planner", config.get("planner", "none")) != config.get("planner", "none"):
        changed |= {"planner": acting["planner"], "search": {}}
        varied = [name for name in varied if not name.startswith("search.")]
    for name in ("search", "plan"):
        given = acting.get(name, {})
        changed[name] = {**changed.get(name, {}), **given}
        varied = [one for one in varied if one not in {f"{name}.{field}" for field in given}]
    return stored | {"config": changed, "applied": varied}


def start_from(learned: Mapping[str, PyTree], train: PyTree) -> PyTree:
    """``train`` [S, ...] of a new run with what `learned_by` found of another one: all but the optimisers."""
    # A copy per seed on the devices of the new run: what is trained is donated.
    spread = lambda x, to: jax.device_put(jnp.broadcast_to(x, to.shape).copy(), to.sharding)
    return train._replace(**{k: jax.tree.map(spread, x, getattr(train, k)) for k, x in learned.items()})


def learned_by(
    run_dir: str | os.PathLike, train: PyTree, num_seeds: int, mixture: np.ndarray | None = None
) -> dict[str, PyTree]:
    """The fields of ``train`` that another run has learned, [S, ...] or [1, ...].

    run_dir: a run with as many seeds, or with one, which then all start from. train: of the new run, may be
    abstract. mixture: for several tasks, how their embeddings begin (`mbrl.multitask.embeddings`). Raises
    UserError where there is no such run, and where its networks are of other shapes.
    """
    count = RunFolder.config_of(run_dir).get("config", {}).get("num_seeds")
    if count not in (1, num_seeds):
        raise UserError(
            f"--from-run {run_dir} has {count} seeds, it must have 1 or as many as the new run, {num_seeds}"
        )

    def taken(name: str, own: PyTree) -> PyTree:
        if not jax.tree.leaves(own):
            return own
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), own)
        read = partial(checkpoints.restore, Path(run_dir) / "checkpoints", part=f".train.{name}")
        if mixture is None or name != "params":
            return read(like).state
        table = like["model"]["task"]  # the other run has one embedding for each task of its own
        like["model"]["task"] = table.update(shape=(count, mixture.shape[1], table.shape[-1]))
        params = read(like).state
        params["model"]["task"] = jnp.einsum("ij,sjk->sik", mixture, params["model"]["task"])
        return params

    afresh = ("opt", "actor_opt", "updates", "hyper")
    return {name: taken(name, getattr(train, name)) for name in train._fields if name not in afresh}


class Memory(NamedTuple):
    """What acting carries from one step to the next: the latent state, and a counter that makes its keys."""

    actor: PyTree
    step: int


class Imagined(NamedTuple):
    """What a world model expects of ``H`` actions. obs: {key: [H, ..., size]}, the mode of each entry, flat,
    and empty for a model without a decoder; reward, cont [H, ...]: expected reward on arrival, and discount
    times the probability that the episode goes on."""

    obs: dict[str, Array]
    reward: Array
    cont: Array


class Finished:
    """A finished run. Seeds are named by their integers, as everywhere; the first is meant where none is.

    run_dir: its folder. config: what ``config.json`` holds. frames: simulator frames of training per seed.
    spec: what the environment shows and takes. agent, model: the pure functions of `mbrl.types`. seeds: the
    members. train: everything that was learned, [S, ...].
    """

    def __init__(
        self, run_dir: Path, config: dict[str, Any], frames: int, parts: Parts, seeds: Seeds, train: Any
    ):
        self.run_dir, self.config, self.frames, self.parts = run_dir, config, frames, parts
        self.agent, self.model, self.spec = parts.agent, parts.model, parts.source.spec
        self.seeds, self.train = seeds, train

    def __repr__(self) -> str:
        return f"<{self.spec.name}: {len(self.seeds)} seed(s) after {self.frames:,} frames, {self.run_dir}>"

    def learned(self, seed: int | None = None) -> PyTree:
        """``train`` of one seed, without the seed axis."""
        return jax.tree.map(lambda x: x[self._index(seed)], self.train)

    def act(
        self,
        obs: Mapping[str, Any],
        memory: Memory | None = None,
        is_first: Any = None,
        seed: int | None = None,
        mode: str = "eval",
    ) -> tuple[np.ndarray, Memory]:
        """An action for one observation, and the memory to give back with the next one.

        obs: {key: [*shape]} of one environment, or {key: [E, *shape]} of several. memory: None at the start
        of an episode. is_first: bool [E], where an episode of several starts anew. seed: whose policy. mode:
        "eval" (deterministic) or "train" (explores). Returns float32 [A] or [E, A], in [-1, 1] or one-hot.
        Raises UserError for an observation of another shape than the spec's.
        """
        choose("mode", mode, ["eval", "train"])
        batched = self._is_batch(obs)
        obs = {key: jnp.asarray(obs[key], self.spec.obs[key].dtype) for key in self.spec.obs}
        obs = obs if batched else {key: value[None] for key, value in obs.items()}
        count = next(iter(obs.values())).shape[0]
        train = self._learned_once(self._index(seed))
        if memory is None:
            memory = Memory(self.agent.init_actor(train, count), 0)
            is_first = np.ones(count, bool)
        first = np.zeros(count, bool) if is_first is None else np.asarray(is_first, bool).reshape(count)
        action, actor = self._act(train, memory.actor, obs, first, memory.step, mode)
        action = np.asarray(action)
        if self.spec.action.classes is None:  # noise that explores may lead out of the range
            action = np.clip(action, -1.0, 1.0)
        return action if batched else action[0], Memory(actor, memory.step + 1)

    def evaluate(self, episodes: int | None = None) -> np.ndarray:
        """Returns [S, episodes] of the deterministic policies from fixed start states.

        episodes: per seed; None takes as many as the run's own evaluations, and then the same episodes. Of
        each task where there are several: then column i is an episode of task i modulo their count.
        """
        return self._evaluation(episodes, record=False)

    def play(self, episodes: int = 1) -> tuple[np.ndarray, Trajectory]:
        """Evaluates and keeps what was seen: returns [S, episodes] and a trajectory [S, T, episodes].

        A column is one episode up to its first ``is_last``; ignore what follows there.
        """
        return self._evaluation(episodes, record=True)

    def imagine(self, past: Trajectory, actions: Any, seed: int | None = None) -> Imagined:
        """What the world model of a seed expects after ``past`` if ``actions`` are taken, seeing no more.

        past: [T, E] of one seed, T at least 1, such as ``jax.tree.map(lambda x: x[0, :20], trajectory)`` of
        what ``play`` returned. actions: [H, E, A]. Returns arrays [H, E, ...].
        """
        actions = jnp.asarray(actions)
        if actions.ndim != 3 or actions.shape[1:] != (past.reward.shape[1], self.spec.action.size):
            expected = f"[H, {past.reward.shape[1]}, {self.spec.action.size}]"
            raise UserError(f"actions must have shape {expected}, found {list(actions.shape)}")
        return self._imagine(self._learned_once(self._index(seed)), past, actions)

    def film(self, path: str | os.PathLike, seed: int | None = None) -> float:
        """Films one episode of a seed's deterministic policy as MP4, of the first of several tasks, and
        returns its return.

        Raises UserError where nothing can be rendered, with the reason.
        """
        index, source = self._index(seed), self.parts.source
        if source.env is not None or not source.playable:
            raise UserError(f"{self.spec.name} has no pictures: only environments on the host render")
        member = Seeds.make(self.seeds.seeds[index], 1)
        pool = make_pool(source, member, 1, purpose=1)
        if reason := video.problem(pool.envs[0]):
            raise UserError(reason)
        evaluate = evaluation.make_host(self.agent, pool, member, 1)
        train = jax.tree.map(lambda x: x[index : index + 1], self.train)
        train = jax.device_put(train, member.sharding)
        returns = []
        video.record(
            Path(path), pool.envs[0], lambda watch: returns.append(evaluate(train, member.keys(), watch))
        )
        pool.close()
        return float(returns[0][0, 0])

    @contextlib.contextmanager
    def evaluator(self, episodes: int | None = None, record: bool = False) -> Iterator[Callable[[Any], Any]]:
        """``evaluate(train)``: what `evaluate`, or with ``record`` `play`, returns of other parameters
        [S, ...]. It compiles once."""
        episodes = self.parts.loop.eval_episodes if episodes is None else episodes
        check_at_least("episodes", episodes, 1)
        keys = self.seeds.program(lambda key: stream(key, EVALUATE, 0))(self.seeds.keys())
        source = self.parts.source
        if not source.playable:
            raise UserError(
                f"{self.run_dir} learned from recorded episodes without an environment to play in"
            )
        if source.env is not None:
            run = evaluation.make_device(self.agent, source.env, self.seeds, episodes, record)
            yield lambda train: run(train, keys)
            return
        episodes *= multitask.count(source.spec)
        pool = make_pool(source, self.seeds, episodes, purpose=1)
        try:
            run = evaluation.make_host(self.agent, pool, self.seeds, episodes, record)
            yield lambda train: run(train, keys)
        finally:
            pool.close()

    def _evaluation(self, episodes: int | None, record: bool):
        with self.evaluator(episodes, record) as evaluate:
            return evaluate(self.train)

    def _index(self, seed: int | None) -> int:
        if seed is None:
            return 0
        if seed not in self.seeds.seeds:
            raise UserError(f"seed is {seed}, the run has the seeds {', '.join(map(str, self.seeds.seeds))}")
        return self.seeds.seeds.index(seed)

    @functools.cached_property
    def _learned_once(self):
        """`learned` by index, kept: slicing every leaf at every step would cost more than acting."""
        return functools.cache(lambda index: jax.tree.map(lambda x: jnp.asarray(x[index]), self.train))

    def _is_batch(self, obs: Mapping[str, Any]) -> bool:
        """Whether an observation has a batch axis; UserError where it does not fit the spec."""
        batched = None
        for key, entry in self.spec.obs.items():
            shape = np.shape(obs[key]) if key in obs else None
            extra = None if shape is None else len(shape) - len(entry.shape)
            if shape is None or extra not in (0, 1) or shape[extra:] != entry.shape:
                raise UserError(
                    f"obs[{key!r}] must have shape {entry.shape} or [E, *{entry.shape}], found {shape}"
                )
            if batched not in (None, extra):
                raise UserError(f"obs[{key!r}] has shape {shape}: some entries have a batch axis, others not")
            batched = extra
        return bool(batched)

    @functools.cached_property
    def _act(self):
        def act(train, actor, obs, is_first, step, mode):
            key = jax.random.fold_in(jax.random.key(0), step)
            return self.agent.act(train, actor, obs, is_first, key, mode=mode)[:2]

        return jax.jit(act, static_argnums=5)

    @functools.cached_property
    def _imagine(self):
        def imagine(train, past: Trajectory, actions):
            model, params = self.parts.model_of(train), train.params["model"]
            observe_key, key = jax.random.split(jax.random.key(0))
            steps, batch = past.reward.shape
            keys = jax.random.split(observe_key, steps)
            seen = model.observe(params, model.init_state(params, batch), past, keys)
            starts = model.starts(params, seen.state)
            return expect(model, params, starts, actions, key)

        return jax.jit(imagine)


def expect(model: WorldModel, params: PyTree, starts: Starts, actions: Array, key: Array) -> Imagined:
    """What a model expects of ``actions`` [H, ..., A] from ``starts`` [...], one sample of its future."""
    states, _ = rollout(model, params, starts, lambda features, key, t: actions[t], key, len(actions))
    states = jax.tree.map(lambda x: x[1:], states)
    prediction = model.predict(params, states)
    decoded = model.decode(params, model.features(params, states)) or {}
    obs = {name: dist.mode() for name, dist in decoded.items()}
    return Imagined(obs, prediction.reward, prediction.cont)
