"""The policy as a planner: alone, or the best of several of its rollouts (COPlanner, arXiv 2310.07220)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from mbrl.errors import check_at_least
from mbrl.planning import RuleConfig, SearchRule, Stage
from mbrl.types import Array, ArraySpec
from planners.random import keep_best


@dataclass(frozen=True)
class PolicyConfig(RuleConfig):
    """Acting without a search."""

    horizon: int = 1
    """Actions in a plan (H); more than one only to execute several."""


@dataclass(frozen=True)
class GuidedConfig(RuleConfig):
    """COPlanner's settings."""

    horizon: int = 10
    """Actions in a plan (H)."""
    policy_samples: int = 5
    """Rollouts of the policy to choose from (K)."""


class Search(NamedTuple):
    """sequence: the best so far [H, A], with its score []."""

    sequence: Array
    score: Array
    proposals: Array


def make(config: PolicyConfig, action: ArraySpec) -> SearchRule:
    """The policy's sample in mode "train", its most likely action in mode "eval"."""
    return _rule(action, config.horizon, 1, greedy=True)


def make_guided(config: GuidedConfig, action: ArraySpec) -> SearchRule:
    """The best of K sampled sequences of the policy, without a refit. They are scored on a second rollout."""
    return _rule(action, config.horizon, config.policy_samples, Stage(1, config.policy_samples))


def _rule(action: ArraySpec, horizon: int, samples: int, *stages: Stage, greedy: bool = False) -> SearchRule:
    check_at_least("search.horizon", horizon, 1)
    check_at_least("search.policy_samples", samples, 1)
    return SearchRule(
        init_warm=tuple,
        start=lambda warm, proposals, key: Search(proposals[0], -jnp.inf * jnp.ones(()), proposals),
        ask=lambda search, stage, i, key: search.proposals,
        tell=lambda search, stage, candidates, scores, gradients: keep_best(search, candidates, scores),
        select=lambda search, key, mode: search.sequence,
        shift=lambda search, steps: (),
        action=action,
        horizon=horizon,
        stages=stages,
        policy_samples=samples,
        greedy=greedy,
    )
