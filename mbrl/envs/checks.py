"""What every environment must do. `check` runs it on one of your own and explains what fails.

Each check takes ``make(seed) -> HostEnv`` and raises `Failed` with a sentence. The conformance tests run the
same ones on the environments that come with the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.errors import UserError
from mbrl.types import EnvSpec, HostEnv, JaxEnv, TimeStep

Make = Callable[[int], Any]


class Failed(Exception):
    """What an environment does wrong, and what it must do, in one sentence."""


def check(
    env: JaxEnv | HostEnv | Make, random_starts: bool = True, say: Callable[[str], None] = print
) -> bool:
    """Whether an environment does what collectors and agents rely on; says a line per check.

    env: a `JaxEnv`, or ``make(seed) -> HostEnv`` (a function, since some checks compare two environments).
    random_starts: whether another seed or episode starts elsewhere; False skips that check.
    """
    make, found = env, {**CHECKS}
    if isinstance(env, JaxEnv):
        make = functools.partial(JaxAsHost, env)
        found |= {name: functools.partial(_of_jax, f, env) for name, f in JAX_CHECKS.items()}
    elif isinstance(env, HostEnv):
        raise UserError(
            "check needs the function that makes the environment: check(lambda seed: MyEnv(seed))"
        )
    if not random_starts:
        found.pop("starts differ")
    good = True
    for name, function in found.items():
        opened: list[Any] = []

        def tracked(seed: int, opened=opened) -> Any:
            opened.append(make(seed))  # pyright: ignore[reportCallIssue]
            return opened[-1]

        try:
            function(tracked)
            say(f"ok      {name}")
        except Failed as failure:
            good = False
            say(f"FAILED  {name}: {failure}")
        except Exception as error:
            good = False
            say(f"FAILED  {name}: it raised {type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            for one in opened:
                one.close()
    return good


def _of_jax(function: Callable[[JaxEnv], None], env: JaxEnv, make: Make) -> None:
    function(env)


class JaxAsHost:
    """A JaxEnv with the methods of a HostEnv, jitted, so that one check serves both kinds."""

    def __init__(self, env: JaxEnv, seed: int):
        self.spec = env.spec
        self._reset, self._step = _jitted(env)
        self._key = jax.random.key(seed)
        self._state: Any = None

    def _next_key(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def reset(self) -> TimeStep:
        self._state, timestep = self._reset(self._next_key())
        return jax.tree.map(np.asarray, timestep)

    def step(self, action: np.ndarray) -> TimeStep:
        self._state, timestep = self._step(self._state, jnp.asarray(action, jnp.float32), self._next_key())
        return jax.tree.map(np.asarray, timestep)

    def get_state(self) -> dict[str, np.ndarray]:
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._state))}
        return leaves | {"key": np.asarray(jax.random.key_data(self._key))}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"]))
        shape = jax.eval_shape(self._reset, self._key)[0]
        leaves = [jnp.asarray(state[str(i)]) for i in range(len(jax.tree.leaves(shape)))]
        self._state = jax.tree.unflatten(jax.tree.structure(shape), leaves)

    def render(self, height: int, width: int) -> np.ndarray:
        raise RuntimeError("an environment written in JAX has no pictures")

    def close(self) -> None: ...


_compiled: dict[int, tuple[JaxEnv, Any, Any]] = {}


def _jitted(env: JaxEnv) -> tuple[Any, Any]:
    """Compiled reset and step, once per environment however many copies of it are opened."""
    if id(env) not in _compiled:
        _compiled[id(env)] = (env, jax.jit(env.reset), jax.jit(env.step))
    return _compiled[id(env)][1:]


def actions(spec: EnvSpec, count: int, seed: int = 0) -> np.ndarray:
    """Random actions float32 [count, A]; one-hot where the action is discrete."""
    rng = np.random.default_rng(seed)
    if spec.action.classes:
        return np.eye(spec.action.classes, dtype=np.float32)[rng.integers(spec.action.classes, size=count)]
    return rng.uniform(-1, 1, (count, *spec.action.shape)).astype(np.float32)


def play(env: Any, count: int, seed: int = 0) -> list[TimeStep]:
    """``count`` time steps after a reset, which comes first in the list; resets where an episode ends."""
    steps = [env.reset()]
    for action in actions(env.spec, count, seed):
        steps.append(env.reset() if steps[-1].is_last else env.step(action))
    return steps


def same(a: TimeStep, b: TimeStep) -> bool:
    """Equal bit by bit."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def require(condition: Any, sentence: str) -> None:
    if not condition:
        raise Failed(sentence)


def check_spec(make: Make) -> None:
    spec = make(0).spec
    require(isinstance(spec, EnvSpec), f"spec is {type(spec).__name__}, it must be an mbrl.types.EnvSpec")
    action = spec.action
    require(
        len(action.shape) == 1 and action.dtype == "float32",
        f"spec.action is {action.dtype} {action.shape}, actions must be float32 vectors of shape (A,)",
    )
    require(
        action.classes in (None, action.size),
        f"spec.action.classes is {action.classes}, a discrete action is one-hot: {action.size} or None",
    )
    require(spec.obs, "spec.obs is empty, at least one entry is needed")
    require(
        list(spec.obs) == sorted(spec.obs),
        f"spec.obs has the keys {list(spec.obs)}, they must be sorted: {sorted(spec.obs)}",
    )
    require(spec.action_repeat >= 1, f"spec.action_repeat is {spec.action_repeat}, it must be at least 1")


def check_data(make: Make) -> None:
    env = make(0)
    for t, timestep in enumerate(play(env, 12)):
        where = "after a reset" if t == 0 else f"at step {t}"
        shown, spec = timestep.obs, env.spec.obs
        require(
            list(shown) == list(spec),
            f"{where} obs has the keys {list(shown)}, in spec.obs they are {list(spec)}, in this order",
        )
        for key, entry in spec.items():
            value = np.asarray(shown[key])
            require(
                value.shape == tuple(entry.shape) and value.dtype == entry.dtype,
                f"{where} obs[{key!r}] is {value.dtype} {value.shape}, the spec says {entry.dtype} "
                f"{tuple(entry.shape)}",
            )
            require(np.isfinite(value).all(), f"{where} obs[{key!r}] is not finite: {value}")
            require(
                entry.classes is None or ((value >= 0) & (value < entry.classes)).all(),
                f"{where} obs[{key!r}] is {value}, it must lie in 0 to {entry.classes} exclusive",
            )
        reward = np.asarray(timestep.reward)
        require(
            reward.shape == () and reward.dtype == np.float32,
            f"{where} reward is {reward.dtype} {reward.shape}, it must be one float32 (np.float32(reward))",
        )
        for name in ("is_last", "is_terminal"):
            flag = np.asarray(getattr(timestep, name))
            require(
                flag.shape == () and flag.dtype == bool,
                f"{where} {name} is {flag.dtype} {flag.shape}, it must be one bool",
            )


def check_reset(make: Make) -> None:
    env = make(0)
    for _ in range(3):
        first = env.reset()
        require(first.reward == 0, f"reset returns the reward {first.reward}, it must be 0: nothing was done")
        require(not first.is_last, "reset returns is_last, but an episode has at least one step")
        require(not first.is_terminal, "reset returns is_terminal, but an episode has at least one step")
        env.step(actions(env.spec, 1)[0])


def check_end(make: Make) -> None:
    env, limit = make(0), make(0).spec.max_steps
    env.reset()
    for t, action in enumerate(actions(env.spec, min(limit or 1000, 2000)), start=1):
        timestep = env.step(action)
        require(
            timestep.is_last or not timestep.is_terminal,
            f"step {t} is terminal but not last: is_terminal says how an episode ends, is_last that it does",
        )
        if timestep.is_last:
            return
        require(
            limit is None or t < limit,
            f"spec.max_steps is {limit}, but the episode goes on after step {t}: set is_last there",
        )


def check_same_seed(make: Make) -> None:
    for t, (a, b) in enumerate(zip(play(make(3), 20), play(make(3), 20))):
        require(
            same(a, b),
            f"two environments with the same seed and actions differ at step {t}: draw random numbers from a "
            "generator made from the seed, and from nothing else",
        )


def check_starts_differ(make: Make) -> None:
    start = lambda env: tuple(np.concatenate([np.ravel(v) for v in env.reset().obs.values()]))
    require(
        len({start(make(seed)) for seed in range(8)}) >= 2,
        "environments with the seeds 0 to 7 all start the same: use the seed (or say random_starts=False)",
    )
    env = make(1)
    require(
        len({start(env) for _ in range(8)}) >= 2,
        "eight episodes all start the same: go on drawing from one generator (or say random_starts=False)",
    )


def check_clipping(make: Make) -> None:
    a, b = make(1), make(1)
    if a.spec.action.classes:
        return
    a.reset()
    b.reset()
    for sign in np.sign(actions(a.spec, a.spec.max_steps or 5)[:5]):
        outside, bound = a.step(3 * sign), b.step(sign)
        require(same(outside, bound), "an action of 3 does something else than 1: clip actions to [-1, 1]")
        if bound.is_last:
            return


def check_state(make: Make) -> None:
    env = make(5)
    play(env, 7)
    state = {name: np.array(value) for name, value in env.get_state().items()}
    for name, value in state.items():
        require(
            not value.dtype.hasobject,
            f"get_state()[{name!r}] holds Python objects, a checkpoint needs plain arrays of numbers",
        )
    other = make(6)
    other.set_state(state)

    def onward(one: Any) -> list[TimeStep]:
        steps = []
        for action in actions(one.spec, 5, 1):
            steps.append(one.step(action))
            if steps[-1].is_last:
                break
        return steps + play(one, 10, 2) + play(one, 10, 3)

    if env.spec.max_steps == 1:  # the episode may be over already
        env.reset()
        other.reset()
    for t, (a, b) in enumerate(zip(onward(env), onward(other))):
        require(
            same(a, b),
            f"an environment restored by set_state(get_state()) differs {t + 1} steps later: the state must "
            "hold everything that the future depends on, random streams and counters too",
        )


def check_kept(make: Make) -> None:
    env = make(0)
    first = env.reset()
    kept = {key: np.array(value) for key, value in first.obs.items()}
    env.step(actions(env.spec, 1)[0])
    for key, value in kept.items():
        require(
            np.array_equal(first.obs[key], value),
            f"obs[{key!r}] changes when step is called: return a copy, as observations are kept",
        )


CHECKS: dict[str, Callable[[Make], None]] = {
    "spec": check_spec,
    "data match the spec": check_data,
    "reset": check_reset,
    "end of an episode": check_end,
    "same seed, same data": check_same_seed,
    "starts differ": check_starts_differ,
    "actions are clipped": check_clipping,
    "state can be saved": check_state,
    "observations may be kept": check_kept,
}


# Environments written in JAX


def check_batch(env: JaxEnv) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    batch = jnp.asarray(actions(env.spec, 5))
    states, first = jax.jit(jax.vmap(env.reset))(keys)
    _, second = jax.jit(jax.vmap(env.step))(states, batch, keys)
    reset, step = _jitted(env)
    for i in range(5):
        state, alone = reset(keys[i])
        _, after = step(state, batch[i], keys[i])
        for batched, single in ((first, alone), (second, after)):
            for x, y in zip(jax.tree.leaves(batched), jax.tree.leaves(single), strict=True):
                require(
                    np.allclose(x[i], y, rtol=1e-4, atol=1e-4),  # another program rounds otherwise
                    "under jax.vmap it does something else than alone: no function may look across "
                    "environments",
                )


def check_types(env: JaxEnv) -> None:
    key, action = jax.random.key(0), jnp.zeros(env.spec.action.shape)
    state, first = jax.eval_shape(env.reset, key)
    after, second = jax.eval_shape(env.step, state, action, key)
    require(
        jax.tree.structure(state) == jax.tree.structure(after),
        "the state after step has another structure than after reset, a scan cannot carry it",
    )
    strict = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    for path, a, b in zip(jax.tree_util.tree_leaves_with_path(state), strict(state), strict(after)):
        require(
            a == b,
            f"state{jax.tree_util.keystr(path[0])} is {_typed(a)} after reset and {_typed(b)} after step, a "
            "scan needs the same: give the type, as in jnp.float32(0)",
        )
    loose = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    require(loose(first) == loose(second), "reset and step return time steps of different types or shapes")


def _typed(described: tuple[Any, Any, bool]) -> str:
    shape, dtype, weak = described
    return f"{'weakly typed ' * weak}{dtype} {shape}"


def check_keys(env: JaxEnv) -> None:
    def episode(key, action):
        reset_key, step_key = jax.random.split(key)
        state, first = env.reset(reset_key)
        return first, env.step(state, action, step_key)[1]

    try:
        with jax.debug_key_reuse(True):
            jax.jit(episode)(jax.random.key(0), jnp.asarray(actions(env.spec, 1)[0]))
    except jax.errors.KeyReuseError as error:
        raise Failed(f"a random key is used twice, split it first: {str(error).splitlines()[0]}") from None


def check_buffers(env: JaxEnv) -> None:
    key, action = jax.random.key(0), jnp.zeros(env.spec.action.shape)
    for reset, step in (_jitted(env), (env.reset, env.step)):
        first = reset(key)
        for result in (first, step(first[0], action, key)):
            leaves = jax.tree.leaves(result)
            pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves if isinstance(leaf, jax.Array)}
            require(
                len(pointers) == len(leaves),
                "two entries of state and time step are one array in memory (or no JAX arrays), such a state "
                "cannot be donated: copy one with jnp.copy",
            )


JAX_CHECKS: dict[str, Callable[[JaxEnv], None]] = {
    "the same in a batch": check_batch,
    "types of the state": check_types,
    "random keys": check_keys,
    "shared memory": check_buffers,
}
