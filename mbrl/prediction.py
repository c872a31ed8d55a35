"""How well a world model predicts: its open-loop imagination against what really happened."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.finished import Finished, expect
from mbrl.images import is_image
from mbrl.types import Trajectory

HORIZON = 50
"""Agent steps that are predicted."""
STARTS = 50
"""Points of an episode that are predicted from, evenly spread."""
MOST_DIMENSIONS = 6  # of the example that a report draws


def measure(run: Finished, played: Trajectory) -> dict[str, Any]:
    """Compares the model's predictions with an episode of each seed, the first of ``played`` [S, T, E], which
    `Finished.play` returned.

    From points all along the episode the model is given the actions that were really taken and sees nothing
    more. Errors are root mean squares over points and dimensions, each dimension divided by its standard
    deviation over the episode, so that 1 is about as bad as predicting the mean.

    Returns {"horizon": H, "error": {name: [S, H]}, "unchanged": {name: [S, H]}, "example": {...}}: names are
    the continuous observation keys and "reward"; "unchanged" is the error of predicting that nothing changes.
    Errors of what never changes in an episode are NaN. The example is one prediction of the first seed, where
    most happens: {"truth": {name: [H, D]}, "predicted": ...}. Empty when episodes are too short to predict
    anything, or when nothing changes.
    """
    played = jax.tree.map(lambda x: x[:, :, :1], played)
    length = common_length(np.asarray(played.is_last[:, :, 0]))
    horizon = min(HORIZON, length // 2)
    if horizon < 1:
        return {}
    predict = jax.jit(_predict, static_argnums=(0, 3))
    errors, unchanged, example, moved = {}, {}, {}, 0.0
    for i, seed in enumerate(run.seeds.seeds):
        episode = jax.tree.map(lambda x, i=i: jnp.asarray(x[i, : length + 1]), played)
        points = tuple(np.unique(np.linspace(0, length - horizon, STARTS).astype(int)).tolist())
        predicted = predict(run.model, run.learned(seed).params["model"], episode, (points, horizon))
        obs = run.spec.obs
        seen = {k: v for k, v in episode.obs.items() if obs[k].classes is None and not is_image(obs[k])}
        seen = {k: np.asarray(v, np.float64).reshape(length + 1, -1) for k, v in seen.items()}
        seen["reward"] = np.asarray(episode.reward, np.float64)
        for name in seen.keys() & predicted.keys():
            error, constant, truth, guess = _compare(seen[name], predicted[name], points, horizon)
            errors.setdefault(name, []).append(error)
            unchanged.setdefault(name, []).append(constant)
            if i == 0:
                example[name] = (truth, guess)
                moved += (truth.var(0) / (truth.var((0, 1)) + 1e-12)).mean(-1)
    errors = {name: error for name, error in errors.items() if np.isfinite(error).any()}
    if not errors:
        return {}
    most = int(np.argmax(moved))  # an example in which something happens
    return {
        "horizon": horizon,
        "error": {k: np.array(v) for k, v in sorted(errors.items())},
        "unchanged": {k: np.array(unchanged[k]) for k in sorted(errors)},
        "example": {
            "truth": {k: example[k][0][:, most, :MOST_DIMENSIONS] for k in sorted(errors)},
            "predicted": {k: example[k][1][:, most, :MOST_DIMENSIONS] for k in sorted(errors)},
        },
    }


def common_length(is_last: np.ndarray) -> int:
    """Steps of the shortest of episodes bool [S, T]; one that never ends is as long as it was watched."""
    ends = np.where(is_last.any(1), is_last.argmax(1), is_last.shape[1] - 1)
    return int(ends.min())


def _predict(model, params, episode: Trajectory, where) -> dict[str, jax.Array]:
    """{name: [H, N, D]}: predictions of H steps from N points of an episode [T, 1]."""
    points, horizon = where
    observe_key, key = jax.random.split(jax.random.key(0))
    steps = episode.reward.shape[0]
    keys = jax.random.split(observe_key, steps)
    seen = model.observe(params, model.init_state(params, 1), episode, keys)
    starts = seen.starts._replace(states=jax.tree.map(lambda x: x[np.array(points)], seen.starts.states))
    actions = jnp.stack([episode.action[np.array(points) + h] for h in range(1, horizon + 1)])
    expected = expect(model, params, starts, actions, key)
    # Pictures have their own page: see `mbrl.open_loop`.
    vectors = {k: x for k, x in expected.obs.items() if episode.obs[k].dtype != jnp.uint8}
    flat = {name: x.reshape(horizon, len(points), -1) for name, x in vectors.items()}
    return flat | {"reward": expected.reward.reshape(horizon, len(points), 1)}


def _compare(seen: np.ndarray, predicted: Any, points, horizon: int):
    """(error [H], error of no change [H], truth [H, N, D], prediction [H, N, D]) of one entry [T, D]; NaN
    for the errors of an entry that never changes."""
    seen, guess = seen.reshape(len(seen), -1), np.asarray(predicted, np.float64)
    index = np.array(points)
    truth = np.stack([seen[index + h] for h in range(1, horizon + 1)])
    scale = seen.std(0)
    moving = scale > 1e-6
    if not moving.any():
        never = np.full(horizon, np.nan)
        return never, never, truth, guess
    rms = lambda x: np.sqrt(np.mean(np.square(x / scale)[..., moving], axis=(1, 2)))
    with np.errstate(divide="ignore", invalid="ignore"):  # entries that never move are dropped after division
        return rms(guess - truth), rms(seen[index][None] - truth), truth, guess
