"""Transformer state-space model: attention over a sliding window of latents (TransDreamer, arXiv 2202.09481;
the baseline of S4WM, arXiv 2307.02064), pre-norm, with rotary positions (arXiv 2104.09864).

Keys and values of the observed sequence are the read-only ``ctx`` of imagination. A start is only (h, z,
position, row, column) and finds its past there, so that imagining from all T x B posteriors takes memory
O(T), not O(T x window).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl import frame_posterior, latent_model
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.frame_posterior import FrameConfig, FrameLatent, sample
from mbrl.latent_model import Backbone, flat
from mbrl.networks import MAX_LAYERS, Linear, RMSNorm, apply
from mbrl.recurrence import clear, previous
from mbrl.types import Array, EnvSpec, Starts, State, WorldModel


@dataclass(frozen=True)
class TransformerConfig(FrameConfig):
    """Sizes of the transformer."""

    layers: int = 4
    """Layers of the stack."""
    heads: int = 8
    """Attention heads; width / heads must be even."""
    window: int = 64
    """Steps that each layer attends to, the current one included (W)."""
    mlp_factor: int = 4
    """Width of the MLP's hidden layer as a multiple of width."""
    concat_layers: bool = False
    """Whether h is the outputs of all layers (TransDreamer), else that of the last one."""


@dataclass(frozen=True)
class StormConfig(TransformerConfig):
    """Like STORM (arXiv 2310.09615): its size. Norm and positions are ours."""

    layers: int = 2
    heads: int = 8
    window: int = 64


@dataclass(frozen=True)
class TransDreamerConfig(TransformerConfig):
    """Like TransDreamer (arXiv 2202.09481): deep and narrow, h from all layers, a window of its sequences'
    length. Positions are ours."""

    layers: int = 6
    heads: int = 8
    window: int = 50
    mlp_factor: int = 2
    concat_layers: bool = True


class KeyValue(NamedTuple):
    """Keys (already rotated) and values of one layer, each [..., rows, heads, head size]."""

    key: Array
    value: Array


Memory = tuple[KeyValue, ...]  # one per layer


class Layer(nn.Module):
    """Pre-norm attention and MLP; the attention itself is a function of queries, keys and masks outside."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.qkv = Linear(3 * c.width)
        self.out = Linear(c.width)
        self.mlp_hidden, self.mlp_out = Linear(c.mlp_factor * c.width), Linear(c.width)

    def project(self, x: Array, position: Array) -> tuple[Array, KeyValue]:
        """Rotated queries [..., heads, head size], rotated keys and values, of x [..., width]."""
        heads = self.qkv(self.norm(x)).reshape(*x.shape[:-1], 3, self.config.heads, -1)
        query, key, value = (heads[..., i, :, :] for i in range(3))
        return rotate(query, position), KeyValue(rotate(key, position), value)

    def finish(self, x: Array, attended: Array) -> Array:
        x = x + self.out(attended.reshape(x.shape))
        return x + self.mlp_out(nn.gelu(self.mlp_hidden(self.mlp_norm(x))))


class Transformer(nn.Module):
    """The stack. Memory is handed to it by ``attend``, so sequences, acting and imagination share it."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.latent = FrameLatent(c)
        self.stack = [Layer(c) for _ in range(c.layers)]
        self.out_norm = RMSNorm()

    def run(self, x: Array, position: Array, attend) -> tuple[Array, list]:
        """h [..., D] of inputs x [..., width] at ``position`` [...] in their episodes.

        attend(layer, query, key_value) -> (attended, memory), whose memories are returned in order.
        """
        outputs, memory = [], []
        for i, layer in enumerate(self.stack):
            query, new = layer.project(x, position)
            attended, kept = attend(i, query, new)
            x = layer.finish(x, attended)
            outputs.append(x)
            memory.append(kept)
        if self.config.concat_layers:
            x = jnp.concatenate(outputs, -1)
        return self.out_norm(x), memory

    def inputs(self, stoch: Array, action: Array) -> Array:
        return self.latent.inputs(stoch, action)

    def prior(self, deter: Array):
        return self.latent.prior(deter)

    def posterior(self, token: Array):
        return self.latent.posterior(token)

    def everything(self, stoch, action, token):
        """Touches every parameter once, for initialisation."""
        x = self.inputs(stoch, action)
        deter, _ = self.run(x, jnp.zeros(x.shape[:-1], jnp.int32), lambda i, query, new: (new.value, new))
        return self.prior(deter), self.posterior(token)


def rotate(x: Array, position: Array) -> Array:
    """Rotary embedding of x [..., heads, size] at ``position`` [...]: the product of a rotated query and a
    rotated key depends on the difference of their positions alone, so stored keys stay as they are."""
    half = x.shape[-1] // 2
    angle = position[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def attention(query: Array, *sources: tuple[str, KeyValue, Array]) -> Array:
    """Softmax attention of queries over all rows of several sources at once, in float32.

    query: [n, c, b, heads, size], blocks of c queries of b columns. A source is its axes, its keys and
    values, and which rows each query sees [n, c, b, rows]: axes "bnrhd" for rows that a block of queries
    shares, "ncbrhd" for rows of each query alone. At least one row must be visible.
    """
    scale, scores = query.shape[-1] ** -0.5, []
    for axes, memory, mask in sources:
        score = jnp.einsum(f"ncbhd,{axes}->ncbhr", query, memory.key).astype(jnp.float32) * scale
        scores.append(jnp.where(mask[..., None, :], score, -jnp.inf))
    # Softmax over the sources side by side: to join them would copy the largest arrays here.
    top = reduce(jnp.maximum, [jax.lax.stop_gradient(score).max(-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - top) for score in scores]
    mixed = [
        jnp.einsum(f"ncbhr,{axes}->ncbhd", weight.astype(query.dtype), memory.value)
        for weight, (axes, memory, _) in zip(weights, sources, strict=True)
    ]
    total = reduce(jnp.add, [weight.sum(-1, keepdims=True) for weight in weights])
    return (reduce(jnp.add, mixed) / total).astype(query.dtype)


def bands(x: Array, window: int, count: int) -> Array:
    """Rows [B, window + count * window, ...] -> what each block of queries can see [B, count, 2 window, ...].
    A single block sees all rows, however many."""
    if count == 1:
        return x[:, None]
    blocks = x.reshape(x.shape[0], count + 1, window, *x.shape[2:])
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], 2)


class Blocks(NamedTuple):
    """``length`` times [length, B, ...] as ``count`` blocks of ``size`` [count, size, B, ...]."""

    length: int
    count: int
    size: int

    @staticmethod
    def of(length: int, window: int) -> Blocks:
        count = -(-length // window)
        return Blocks(length, count, window if count > 1 else length)

    def split(self, x: Array, fill: int = 0) -> Array:
        """Pads the last block with ``fill``."""
        padding = [(0, self.count * self.size - self.length)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(self.count, self.size, *x.shape[1:])

    def join(self, x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[: self.length]


class Context(NamedTuple):
    """What all starts share. memory: per layer [B, rows, heads, size]; row: the row of each time [T]."""

    memory: Memory
    row: Array


class Past(NamedTuple):
    """How queries of any leading axes find their past in ctx, without copying it where they can share it.

    Two or more leading axes: the last is the batch of ctx, as `Observed.starts` has it, and queries share
    rows; all T x B posteriors in their order do so in blocks of the window. One axis: any selection of
    starts, whose rows are gathered (fine for few). found: False where a start is not where the axes say;
    its features become nan rather than remember another episode.
    """

    queries: Callable[[Array], Array]
    results: Callable[[Array, tuple[int, ...]], Array]
    rows: Callable[[Array], Array]
    seen: Array
    found: Array

    @staticmethod
    def of(ctx: Context, state: State, window: int) -> Past:
        lead, batch, times = state["steps"].shape, ctx.memory[0].key.shape[0], ctx.row.shape[0]
        shared = len(lead) > 1 and lead[-1] == batch
        columns = batch if shared else math.prod(lead)
        length = math.prod(lead[:-1]) if shared else 1
        ordered = shared and lead == (times, batch)
        blocks = Blocks.of(length, window) if ordered else Blocks(length, 1, length)
        queries = lambda x: blocks.split(x.reshape(length, columns, *x.shape[len(lead) :]))
        row, column, found = state["row"], state["column"], jnp.ones(lead, bool)
        if shared:
            rows = lambda x: bands(x, window, blocks.count)
            first = (jnp.arange(blocks.count) * window)[:, None, None]
            row, found = queries(row) - first, column == jnp.arange(batch)
            if ordered:
                found &= state["row"] == ctx.row[:, None]
        else:
            index = row.reshape(-1, 1) - jnp.arange(window)[::-1]
            rows = lambda x: x[column.reshape(-1, 1), index][:, None]
            row = jnp.full((1, 1, columns), window - 1)
        total = jax.eval_shape(rows, ctx.memory[0].key).shape[2]
        age = row[..., None] - jnp.arange(total)  # of a row, as the start saw it
        i, steps = queries(state["imagined"])[..., None], queries(state["steps"])[..., None]
        seen = (age >= 0) & (age < steps) & (age + i + 1 < window)
        return Past(queries, lambda x, shape: blocks.join(x).reshape(shape), rows, seen, found)


def steps_in_episode(is_first: Array, before: Array) -> Array:
    """How many steps each time [T, B] is into its episode, itself included, after ``before`` [B] steps."""
    t = jnp.arange(is_first.shape[0])[:, None]
    begin = jax.lax.cummax(jnp.where(is_first, t, -1))
    return jnp.where(begin >= 0, t - begin + 1, before + t + 1)


def make(config: TransformerConfig, spec: EnvSpec) -> WorldModel:
    """Transformer world model for the observations and actions of ``spec``."""
    return latent_model.make(config, spec, backbone(config, spec.action.size))


def make_storm(config: StormConfig, spec: EnvSpec) -> WorldModel:
    """The same with settings like STORM's as defaults."""
    return make(config, spec)


def make_transdreamer(config: TransDreamerConfig, spec: EnvSpec) -> WorldModel:
    """The same with settings like TransDreamer's as defaults."""
    return make(config, spec)


def backbone(config: TransformerConfig, action_size: int) -> Backbone:
    """The memory alone, on encoded observations.

    Acting state: deter [B, D], stoch [B, S, C], steps [B] seen in this episode, and per layer the keys and
    values of the last W of them [B, W, heads, size], oldest first. Start: deter, stoch, steps, and where in
    ctx its own keys are, row and column [...]. ctx: per layer [B, W + T, heads, size], the acting state's W
    rows before the T of the sequence (rounded up to whole blocks). Imagined state: a start, the number of
    steps imagined [...], and per layer their keys and values [..., H, heads, size].
    """
    frame_posterior.check(config)
    check_between("model.layers", config.layers, 1, MAX_LAYERS)
    for field in ("heads", "window", "mlp_factor"):
        check_at_least(f"model.{field}", getattr(config, field), 1)
    if config.width % (2 * config.heads):
        raise UserError(
            f"model.width is {config.width}, it must be an even multiple of model.heads, "
            f"which is {config.heads}"
        )
    module, dtype, window = Transformer(config), jnp.dtype(config.dtype), config.window
    deter = config.width * (config.layers if config.concat_layers else 1)
    head = (config.heads, config.width // config.heads)

    def call(params, method, *args):
        return apply(module, params, *args, method=method)

    def zeros(*shape) -> Memory:
        layer = lambda: KeyValue(jnp.zeros((*shape, *head), dtype), jnp.zeros((*shape, *head), dtype))
        return tuple(layer() for _ in range(config.layers))

    def init_state(params, batch):
        return {
            "deter": jnp.zeros((batch, deter), dtype),
            "stoch": jnp.zeros((batch, config.stoch, config.classes), dtype),
            "steps": jnp.zeros(batch, jnp.int32),
            "window": zeros(batch, window),
        }

    def init(key, token_size):
        stoch = jnp.zeros((1, config.stoch, config.classes), dtype)
        action, token = jnp.zeros((1, action_size)), jnp.zeros((1, token_size), dtype)
        return module.init(key, stoch, action, token, method="everything")["params"]

    def step(params, state, token, action, is_first, key):
        x = call(params, "inputs", clear(is_first, state["stoch"]), clear(is_first, action))
        past = jax.tree.map(lambda x: clear(is_first, x), state["window"])
        steps = clear(is_first, state["steps"]) + 1
        seen = (jnp.arange(window)[::-1] < steps[:, None])[None, None]

        def attend(i, query, new):
            rows = jax.tree.map(lambda old, x: jnp.concatenate([old[:, 1:], x[:, None]], 1), past[i], new)
            shared = jax.tree.map(lambda x: x[:, None], rows)
            return attention(query[None, None], ("bnrhd", shared, seen))[0, 0], rows

        h, memory = call(params, "run", x, steps - 1, attend)
        stoch = call(params, "posterior", token).sample(key).astype(dtype)
        return {"deter": h, "stoch": stoch, "steps": steps, "window": tuple(memory)}

    def observe(params, state, token, action, is_first, keys):
        """Blocks of W queries, each on the 2 W rows around it, so that the cost is linear in T."""
        length, batch = is_first.shape
        blocks = Blocks.of(length, window)
        post = call(params, "posterior", token)
        stoch = sample(post, keys, dtype)
        before = clear(is_first, previous(stoch, state["stoch"]))
        x = call(params, "inputs", before, clear(is_first, action))
        past = jax.tree.map(lambda x: clear(is_first[0], x), state["window"])
        steps = steps_in_episode(is_first, state["steps"])
        age = jnp.arange(blocks.size)[:, None] + window - jnp.arange(blocks.size + window)
        visible = jnp.minimum(blocks.split(steps, fill=1), window)[..., None]
        seen = (age[:, None] >= 0) & (age[:, None] < visible)

        def append(old, x):
            """The sequence [T, B] after the carried rows [B, W], up to a whole block."""
            x = jnp.moveaxis(x, 0, 1)
            spare = jnp.zeros((batch, blocks.count * blocks.size - length, *head), x.dtype)
            return jnp.concatenate([old, x, spare], 1)

        def attend(i, query, new):
            rows = jax.tree.map(append, past[i], new)
            shared = jax.tree.map(lambda x: bands(x, window, blocks.count), rows)
            return blocks.join(attention(blocks.split(query), ("bnrhd", shared, seen))), rows

        h, memory = call(params, "run", x, steps - 1, attend)
        begun = jnp.arange(window)[::-1] >= steps[-1][:, None]  # rows of earlier episodes
        last = jax.tree.map(lambda x: clear(begun, x[:, length : length + window]), tuple(memory))
        row = jnp.arange(window, window + length)
        states = {"deter": h, "stoch": stoch, "steps": steps}
        carry = jax.tree.map(lambda x: x[-1], states) | {"window": last}
        where = {"row": row[:, None], "column": jnp.arange(batch)}
        states |= {k: jnp.broadcast_to(v, (length, batch)) for k, v in where.items()}
        return carry, Starts(Context(tuple(memory), row), states), post, call(params, "prior", h)

    def starts(params, state):
        batch = state["steps"].shape[0]
        where = {"row": jnp.full(batch, window - 1), "column": jnp.arange(batch)}
        states = {k: state[k] for k in ("deter", "stoch", "steps")} | where
        return Starts(Context(state["window"], jnp.full(1, window - 1)), states)

    def imagine_init(params, starts, horizon):
        lead = starts.states["steps"].shape
        return {**starts.states, "imagined": jnp.zeros(lead, jnp.int32), "suffix": zeros(*lead, horizon)}

    @partial(jax.checkpoint, prevent_cse=False)  # a pathwise gradient keeps no gathered rows nor weights
    def imagine_step(params, ctx, state, action, key):
        """Attends to the rows of ctx up to the start's own, and to the steps imagined since. All starts have
        imagined equally many, so that a step writes one slice of the suffix, in place."""
        x = call(params, "inputs", state["stoch"], action)
        past = Past.of(ctx, state, window)
        i, offset = state["imagined"], jnp.arange(state["suffix"][0].key.shape[-3])
        now = i.reshape(-1)[0]
        since = past.queries((offset <= i[..., None]) & (offset > i[..., None] - window))

        def attend(layer, query, new):
            write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(
                old, x[..., None, :, :], now, old.ndim - 3
            )
            suffix = jax.tree.map(write, state["suffix"][layer], new)
            prefix = jax.tree.map(past.rows, ctx.memory[layer])
            own = jax.tree.map(past.queries, suffix)
            sources = ("bnrhd", prefix, past.seen), ("ncbrhd", own, since)
            return past.results(attention(past.queries(query), *sources), query.shape), suffix

        h, suffix = call(params, "run", x, state["steps"] + i, attend)
        h = jnp.where(past.found[..., None], h, jnp.nan)
        stoch = call(params, "prior", h).sample(key).astype(dtype)
        return state | {"deter": h, "stoch": stoch, "imagined": i + 1, "suffix": tuple(suffix)}

    return Backbone(
        init=init,
        init_state=init_state,
        observe=observe,
        step=step,
        starts=starts,
        imagine_init=imagine_init,
        imagine_step=imagine_step,
        features=lambda params, state: jnp.concatenate([state["deter"], flat(state["stoch"])], -1),
        feature_size=deter + config.stoch * config.classes,
        param_groups=dict,
        emit=lambda state: {k: v for k, v in state.items() if k != "suffix"},
        storable=False,
    )
