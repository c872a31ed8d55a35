"""Memory tasks: what is seen at the start decides the reward at the end, and nothing in between tells it.

The reward of every step but the last is 0. `recall` and `hallway` are passive, no action changes the reward:
they probe a world model alone. In `tmaze` the last action must answer, so it needs an agent. Each has one
size, given by name as in ``recall:30``. Observations are {"state": float32 [F]}.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl.envs import probes
from mbrl.envs.probes import assemble, draw_bit
from mbrl.types import Array, ArraySpec, JaxEnv

SYMBOLS = 4
"""Distractors are one of this many, each step anew."""


def recall(gap: int = 30) -> JaxEnv:
    """A cue +-1 at reset, ``gap`` random symbols, then a query on which the reward arrives: the cue.

    state: (cue at reset and else 0, 1 at the query and else 0, the symbol one-hot [4] during the gap and else
    0). Episodes have gap + 1 steps; actions [2], one-hot, are without effect. Raises ValueError for gap < 1.
    """
    if gap < 1:
        raise ValueError(f"gap must be at least 1, found {gap}.")

    def draw(key: Array) -> tuple[Array, Array]:
        cue_key, symbol_key = jax.random.split(key)
        return draw_bit(cue_key), jax.random.randint(symbol_key, (gap + 2,), 0, SYMBOLS)

    def show(secret: tuple[Array, Array], step: Array, action: Array) -> Array:
        cue, symbols = secret
        symbol = jnp.where((step > 0) & (step <= gap), jax.nn.one_hot(symbols[step], SYMBOLS), 0)
        return jnp.concatenate([jnp.stack([jnp.where(step == 0, cue, 0), step == gap + 1]), symbol])

    def reward(secret: tuple[Array, Array], step: Array, action: Array) -> Array:
        return jnp.where(step == gap + 1, secret[0], 0)

    return assemble("recall", 2 + SYMBOLS, _choice(), gap + 1, draw, show, reward)


def tmaze(length: int = 20) -> JaxEnv:
    """Passive T-maze: the side of the goal is shown at the start of a corridor of ``length`` steps; the turn
    taken at the junction earns 1 if it is that side's, else 0. The walk itself is automatic, so that the task
    asks for memory and not for exploration (after arXiv 2307.03864).

    state: (side +-1 at reset and else 0, 1 at the junction and else 0). Actions [2], one-hot: left (-1) or
    right (+1). Episodes have length + 1 steps. Best return 1, without memory 0.5.
    """
    return probes.memory(length, discrete=True, name="tmaze")


def hallway(width: int = 50) -> JaxEnv:
    """Distracting Memory (S4WM, arXiv 2307.02064) with vector observations: the agent is moved along a
    hallway of ``width`` cells, whose walls have random colours on both sides; it chooses the side that it
    looks at. The colour at the entrance, one of the first two, decides the reward at the exit: +1 or -1.

    state: (colour one-hot [4], 0 at the exit; the side looked at, +-1, 0 at reset; position in [0, 1]). The
    cue comes in the same entries as the distractors. Actions [2], one-hot: side -1 or +1. Episodes have
    ``width`` steps. Raises ValueError for width < 2.
    """
    if width < 2:
        raise ValueError(f"width must be at least 2, found {width}.")

    def draw(key: Array) -> tuple[Array, Array]:
        cue_key, wall_key = jax.random.split(key)
        return draw_bit(cue_key), jax.random.randint(wall_key, (width + 1, 2), 0, SYMBOLS)

    def show(secret: tuple[Array, Array], step: Array, action: Array) -> Array:
        cue, walls = secret
        entrance, side = step == 0, jnp.argmax(action)
        colour = jnp.where(entrance, (cue > 0).astype(jnp.int32), walls[step, side])
        seen = jnp.where(step == width, 0, jax.nn.one_hot(colour, SYMBOLS))
        return jnp.concatenate([seen, jnp.stack([jnp.where(entrance, 0, 2 * side - 1), step / width])])

    def reward(secret: tuple[Array, Array], step: Array, action: Array) -> Array:
        return jnp.where(step == width, secret[0], 0)

    return assemble("hallway", SYMBOLS + 2, _choice(), width, draw, show, reward)


def _choice() -> ArraySpec:
    return ArraySpec((2,), classes=2)
