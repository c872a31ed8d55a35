"""Optimisers: LaProp with adaptive gradient clipping as DreamerV3 uses it, and Adam; schedules; groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from mbrl.errors import check_above, check_at_least, check_between

PyTree = Any


@dataclass(frozen=True)
class OptimiserConfig:
    """How gradients become updates; one optimiser serves world model, actor and critic."""

    name: Literal["laprop", "adam"] = "laprop"
    """laprop: RMS scaling BEFORE momentum (arXiv 2002.04839), the published choice. adam: Adam."""
    learning_rate: float = 4e-5
    """Step size after warm-up."""
    warmup: int = 1000
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up, down to final_fraction at the run's last update."""
    final_fraction: float = 0.05
    """Learning rate at the end as a fraction of learning_rate; unused with decay=constant."""
    decay_start: float = 0.0
    """Fraction of the run's updates after which the decay begins."""
    agc: float = 0.3
    """Adaptive gradient clipping (arXiv 2102.06171), per tensor: |g| <= agc * max(1e-3, |w|); 0 is off."""
    clip_norm: float = 0.0
    """Global gradient-norm clip; 0 is off."""
    beta1: float = 0.9
    """Momentum."""
    beta2: float = 0.999
    """Decay of the squared-gradient average."""
    eps: float = 1e-20
    """Added to the root of the squared-gradient average."""
    weight_decay: float = 0.0
    """Decoupled, on kernels only; multiplied by the learning rate."""

    VARIES: ClassVar[tuple[str, ...]] = ("learning_rate", "final_fraction", "beta1", "beta2", "eps")


def adaptive_clip(clip: float, pmin: float = 1e-3) -> optax.GradientTransformation:
    """Scales each whole tensor's gradient down to ``clip * max(pmin, |w|)`` (not per unit as optax does)."""

    def clip_leaf(g, w):
        limit = clip * jnp.maximum(pmin, jnp.linalg.norm(w.ravel()))
        return g / jnp.maximum(1.0, jnp.linalg.norm(g.ravel()) / limit)

    def update(updates, state, params=None):
        return jax.tree.map(clip_leaf, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate(config: OptimiserConfig, total_updates: int) -> optax.Schedule:
    """Learning rate of update k = 0, 1, ...: linear warm-up, then the configured decay."""
    begin = max(config.warmup, int(config.decay_start * total_updates))
    length = max(1, total_updates - begin)
    final = config.final_fraction

    def schedule(count):
        warm = jnp.minimum(1.0, count / config.warmup) if config.warmup else 1.0
        x = jnp.clip((count - begin) / length, 0.0, 1.0)
        shape = {"constant": 1.0, "linear": 1.0 - x, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * x))}[config.decay]
        return config.learning_rate * warm * (final + (1 - final) * shape)

    return schedule


def make(
    config: OptimiserConfig, total_updates: int, groups: Mapping[str, Mapping[str, Any]] | None = None
) -> optax.GradientTransformation:
    """The whole gradient transformation.

    groups: {regular expression on the parameter path "a/b/kernel": {"lr_scale", "weight_decay"}}, as
    ``WorldModel.param_groups`` returns it; the first match wins.
    """
    groups = groups or {}
    check_at_least("optimiser.learning_rate", config.learning_rate, 0)
    check_between("optimiser.final_fraction", config.final_fraction, 0, 1)
    check_between("optimiser.decay_start", config.decay_start, 0, 1)
    for field in ("beta1", "beta2"):
        check_between(f"optimiser.{field}", getattr(config, field), 0, 0.999999)  # 1 forgets nothing: 0 / 0
    check_above("optimiser.eps", config.eps, 0)
    for field in ("warmup", "agc", "clip_norm", "weight_decay"):
        check_at_least(f"optimiser.{field}", getattr(config, field), 0)
    parts = []
    if config.agc:
        parts.append(adaptive_clip(config.agc))
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "laprop":
        parts.append(optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True))
        parts.append(optax.ema(config.beta1, debias=True))
    else:
        parts.append(optax.scale_by_adam(config.beta1, config.beta2, config.eps))
    parts.append(_groups(groups, config.weight_decay))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, total_updates)))
    return optax.chain(*parts)


def _groups(groups: Mapping[str, Mapping[str, Any]], weight_decay: float) -> optax.GradientTransformation:
    """Adds decoupled weight decay and multiplies by lr_scale, per parameter path."""

    def apply(path, update, param):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        default = {"weight_decay": weight_decay if name.endswith("kernel") else 0.0}
        group = next((g for pattern, g in groups.items() if re.search(pattern, name)), {})
        decay = group.get("weight_decay", default["weight_decay"])
        if decay:
            update = update + decay * param
        return update * group.get("lr_scale", 1.0)

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(apply, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
