"""The contracts between environments, replay, world models and agents.

Every contract is a NamedTuple of pure functions closed over static configuration; parameters and state
are explicit pytrees. Functions are written without the seed axis: ``jax.vmap`` adds it outside.

Axis legend, used in every docstring: ``S`` seeds, ``E`` environments, ``B`` batch, ``T`` time,
``H`` horizon, ``N`` samples, ``A`` action, ``F`` features. Arrays are time-major, ``[T, B, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

Array = jax.Array
PyTree = Any
Params = PyTree
State = PyTree
Metrics = dict[str, Array]


@dataclass(frozen=True)
class ArraySpec:
    """One array of an observation, or the action.

    shape: without batch axes. dtype: numpy name. classes: number of categories of a discrete entry,
    None for a continuous one. Actions are always float32 vectors of shape (A,): continuous ones lie in
    [-1, 1], discrete ones are one-hot with ``classes == A``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    classes: int | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=int))


@dataclass(frozen=True)
class EnvSpec:
    """What an environment shows: ``obs`` by key, ``action``, and its clock.

    action_repeat: simulator frames per agent step. max_steps: agent steps of the longest episode, None
    when episodes have no time limit.
    """

    name: str
    obs: dict[str, ArraySpec]
    action: ArraySpec
    action_repeat: int = 1
    max_steps: int | None = None
    tasks: tuple[EnvSpec, ...] = ()
    """Of an environment that is several: the specs of the single ones, in the order of ``obs["task"]``."""

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> EnvSpec:
        """The spec of which ``dataclasses.asdict``, after a trip through JSON, is ``stored``."""
        array = lambda a: ArraySpec(tuple(a["shape"]), a["dtype"], a["classes"])
        obs = {key: array(a) for key, a in stored["obs"].items()}
        action, tasks = array(stored["action"]), tuple(map(cls.of_json, stored.get("tasks", ())))
        return cls(stored["name"], obs, action, stored["action_repeat"], stored["max_steps"], tasks)


class TimeStep(NamedTuple):
    """What one environment returns from reset and step. No batch axis, or [E, ...] from a pool.

    reward: float32, 0 at reset. is_last: the episode ends with this observation, for whatever reason.
    is_terminal: it ends because no further reward can follow (not because of a time limit).
    """

    obs: dict[str, Any]
    reward: Any
    is_last: Any
    is_terminal: Any


class JaxEnv(NamedTuple):
    """ONE environment written in JAX, pure functions, no batch axis, no auto-reset (the collector resets).

    reset(key) -> (state, TimeStep); step(state, action [A] float32, key) -> (state, TimeStep).
    costly_reset: a reset takes as long as several steps; collectors then draw fresh states in advance, once
    per length of an episode, where they would otherwise reset at every step and use it where one ended.
    """

    spec: EnvSpec
    reset: Callable[[Array], tuple[State, TimeStep]]
    step: Callable[[State, Array, Array], tuple[State, TimeStep]]
    costly_reset: bool = False


@runtime_checkable
class HostEnv(Protocol):
    """ONE environment in Python (numpy in, numpy out), no auto-reset (the collector resets)."""

    spec: EnvSpec

    def reset(self) -> TimeStep: ...

    def step(self, action: np.ndarray) -> TimeStep: ...

    def get_state(self) -> dict[str, np.ndarray]:
        """The whole state (simulator, task, random streams) as arrays, so that a run can be resumed."""
        ...

    def set_state(self, state: dict[str, np.ndarray]) -> None: ...

    def render(self, height: int, width: int) -> np.ndarray:
        """One uint8 RGB frame [height, width, 3]; raises RuntimeError with one sentence without GL."""
        ...

    def close(self) -> None: ...


class Transition(NamedTuple):
    """One stored step of each environment, [E, ...]. A Trajectory has the same fields with [T, B, ...].

    ``action[t]`` is the action that LED TO ``obs[t]`` (zeros where ``is_first[t]``); ``reward[t]`` was
    received on arrival at ``obs[t]``. latent: the acting latent state after ``obs[t]`` when replay stores
    latents for context, else the empty tuple.
    """

    obs: dict[str, Array]
    action: Array
    reward: Array
    is_first: Array
    is_last: Array
    is_terminal: Array
    latent: PyTree = ()


Trajectory = Transition


class Starts(NamedTuple):
    """Where imagination begins: ``states`` with leading axes, and a read-only ``ctx`` that all share.

    ctx is () for recurrent models; attention models keep keys and values of the observed sequence there,
    so that it is never carried through a scan nor repeated per start.
    """

    ctx: PyTree
    states: State


class Observed(NamedTuple):
    """Result of ``WorldModel.observe`` on a trajectory [T, B].

    state: the carry after the last step [B]. starts: one start per posterior, states [T, B].
    features: [T, B, F]. losses: {name: [T, B]}, unscaled. metrics: {name: scalar}.
    predicted: [T, B, F], features of each step as predicted from the sequence's, or its episode's, first
    step by the actions alone, where a model learns that way; else (). statistics: what a model learns without
    gradients, the new ``params["statistics"]``, where it has such; else ().
    """

    state: State
    starts: Starts
    features: Array
    losses: dict[str, Array]
    metrics: Metrics
    predicted: Any = ()
    statistics: Any = ()


class Prediction(NamedTuple):
    """What a model says of a state. reward: expected reward on ARRIVAL at the state [...];
    cont: discount times the probability that the episode continues [...]; uncertainty: named scalars [...].
    """

    reward: Array
    cont: Array
    uncertainty: dict[str, Array]


def whole(state: State) -> State:
    """`WorldModel.emit` of a model whose imagined states hold no cache."""
    return state


def starts_at(params: Params, state: State) -> Starts:
    """`WorldModel.starts` of a model whose acting state is all that imagination needs."""
    return Starts((), state)


def states_of(params: Params, starts: Starts, horizon: int) -> State:
    """`WorldModel.imagine_init` of a model without a cache."""
    return starts.states


class WorldModel(NamedTuple):
    """A world model. Leading axes written ``...`` may be any number of axes; where there are several, the
    last is the batch axis of ``ctx``, so [T, B] of a sequence, and [N, B] of N plans.

    init(key) -> params
    init_state(params, batch) -> state [batch]
    observe(params, state [B], traj [T, B], keys [T]) -> Observed; parallel over T or a scan, as it likes
    observe_step(params, state [B], prev_action, obs, is_first, key) -> state [B]; O(1) in the history
    starts(params, state [B]) -> Starts; from an acting state, for planning
    imagine_init(params, starts, horizon) -> state; identity, or allocates a suffix cache
    imagine_step(params, ctx, state [...], action [..., A], key) -> state [...]
    predict(params, state [...]) -> Prediction; separate from imagine_step so that a rollout evaluates the
        heads once for all steps in one large matmul, not once per step
    features(params, state [...]) -> [..., F]; what actor, critic and planner read
    decode(params, features [..., F]) -> {obs key: distribution} or None
    param_groups() -> {path pattern: {"lr_scale": float, "weight_decay": float}}
    emit(state) -> state without caches; what a rollout keeps of every imagined state, and what ``features``
        and ``predict`` read of it
    storable: whether posterior states are acting states, and small, so that replay can store them
    """

    init: Callable[..., Params]
    init_state: Callable[..., State]
    observe: Callable[..., Observed]
    observe_step: Callable[..., State]
    imagine_step: Callable[..., State]
    predict: Callable[..., Prediction]
    features: Callable[..., Array]
    decode: Callable[..., dict[str, Any] | None]
    param_groups: Callable[[], dict[str, dict[str, float]]]
    starts: Callable[..., Starts] = starts_at
    imagine_init: Callable[..., State] = states_of
    emit: Callable[[State], State] = whole
    storable: bool = True


class Simulator(NamedTuple):
    """What a search rolls forward: a world model, or a true environment, and what an agent knows of it.

    starts, imagine_init, imagine_step, predict, features and emit as in `WorldModel`; a search calls them
        with leading axes [N, P, E]: candidates, particles, environments
    policy(params, features [..., F], key) -> action [..., A]; key None asks for its most likely action.
        None where there is no policy
    value(params, features [..., F], key) -> return from there on [...], or a pair of it and a dict of named
        uncertainties [...]; all calls of one plan get the same key. None where there is no value
    mask(params, state [E]) -> [E, A], 0 for entries of a continuous action that an environment does not have
        and 1 for the others; None where all are in use
    """

    imagine_step: Callable[..., State]
    predict: Callable[..., Prediction]
    features: Callable[..., Array]
    starts: Callable[..., Starts] = starts_at
    imagine_init: Callable[..., State] = states_of
    emit: Callable[[State], State] = whole
    policy: Callable[..., Array] | None = None
    value: Callable[..., Any] | None = None
    mask: Callable[..., Array] | None = None


class Agent(NamedTuple):
    """An agent. ``train`` is everything that learns, ``actor`` what acting carries per environment.

    init(key) -> train
    init_actor(train, batch) -> actor [batch]; a NamedTuple with a field ``action`` [batch, A], the previous
        action, which a collector overwrites when it acts at random
    act(train, actor [E], obs {key: [E, ...]}, is_first [E], key, mode) -> (action [E, A], actor, info);
        mode is the static string "train" (explore), "eval" (deterministic given the key) or "watch" (keep
        memory up to date: a random action replaces the one returned);
        info["latent"] is what replay stores where latents serve as context; info["noise"] [E, A], of agents
        that explore by adding to an action, is what was added: a planner adds it to the action that it chose
    update(train, traj [T, B], key) -> (train, UpdateInfo); ONE gradient step
    """

    init: Callable[..., PyTree]
    init_actor: Callable[..., PyTree]
    act: Callable[..., tuple[Array, PyTree, dict[str, Any]]]
    update: Callable[..., tuple[PyTree, UpdateInfo]]


class UpdateInfo(NamedTuple):
    """metrics: {name: scalar}. latent: fresh posteriors [T, B, ...] to write back into replay, or ()."""

    metrics: Metrics
    latent: PyTree = ()
