"""Where the bodies of dm_control's tasks are, from what the agent sees: to draw what a world model expects.

A function per domain maps one observation {key: [size]} to a `Pose`. A prediction need not be exact, so
angles are those of predicted directions, whatever their lengths. Domains whose observations do not say where
their bodies are (the swimmer's, say, are relative to its head) are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Obs = Mapping[str, np.ndarray]


class Pose(NamedTuple):
    """qpos: float64 [nq]. target: of tasks that place one anew in every episode, the array of MuJoCo's model
    that holds its place, axes, and its place along them."""

    qpos: np.ndarray
    target: tuple[str, str, np.ndarray] | None = None


def _acrobot(obs: Obs) -> Pose:
    sine, cosine = np.split(obs["orientations"], 2)
    return Pose(_relative(np.arctan2(sine, cosine)))


def _cartpole(obs: Obs) -> Pose:
    cart, poles = obs["position"][:1], obs["position"][1:].reshape(-1, 2)
    return Pose(np.concatenate([cart, _relative(np.arctan2(poles[:, 1], poles[:, 0]))]))


def _finger(obs: Obs) -> Pose:
    """The spinner's tip is seen relative to its hinge, which is at (0.2, 0.4), as is the target."""
    joints, (x, z) = obs["position"][:2], obs["position"][2:]
    qpos = np.append(joints, np.arctan2(-x, z))
    if "target_position" not in obs:
        return Pose(qpos)
    return Pose(qpos, ("site_pos", "xz", obs["target_position"] + [0.2, 0.4]))


def _pendulum(obs: Obs) -> Pose:
    cosine, sine = obs["orientation"]
    return Pose(np.arctan2([sine], [cosine]))


def _reacher(obs: Obs) -> Pose:
    """Both links are 0.12 m long; the target is seen relative to the finger."""
    angles = np.cumsum(obs["position"])
    finger = 0.12 * np.array([np.cos(angles).sum(), np.sin(angles).sum()])
    return Pose(obs["position"], ("geom_pos", "xy", finger + obs["to_target"]))


def _walker(obs: Obs) -> Pose:
    """Seven bodies: torso, then thigh, leg and foot of the right and the left. The torso starts 1.3 m high,
    joints of the legs turn the other way than its own."""
    cosine, sine = obs["orientations"].reshape(7, 2).T
    angles = np.arctan2(sine, cosine)
    legs = [-np.diff(angles[[0, *leg]]) for leg in ((1, 2, 3), (4, 5, 6))]
    return Pose(np.concatenate([[obs["height"][0] - 1.3, 0.0, angles[0]], *legs]))


def _as_seen(obs: Obs) -> Pose:
    return Pose(obs["position"])


def _without_x(obs: Obs) -> Pose:
    """How far it has come is not seen."""
    return Pose(np.concatenate([[0.0], obs["position"]]))


def _relative(angles: np.ndarray) -> np.ndarray:
    """Angles of a chain of joints, each against the one before."""
    return np.diff(angles, prepend=0.0)


DOMAINS: dict[str, Callable[[Obs], Pose]] = {
    "acrobot": _acrobot,
    "ball_in_cup": _as_seen,
    "cartpole": _cartpole,
    "cheetah": _without_x,
    "finger": _finger,
    "hopper": _without_x,
    "pendulum": _pendulum,
    "point_mass": _as_seen,
    "reacher": _reacher,
    "walker": _walker,
}
