"""The memory tasks against a description in NumPy that knows only what was shown and done."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs
from mbrl.errors import UserError

EPISODES = 64


@pytest.fixture(scope="module")
def played():
    """play(name) -> (observations [B, T + 1, F], actions [B, T] as categories, rewards [B, T]), random actions."""

    def play(name):
        env = envs.make_jax(name)
        choices = np.random.default_rng(1).integers(2, size=(EPISODES, env.spec.max_steps))

        def episode(key, choices):
            state, first = env.reset(key)
            step = lambda state, choice: env.step(state, jax.nn.one_hot(choice, 2), key)
            _, steps = jax.lax.scan(step, state, choices)
            shown = jnp.concatenate([first.obs["state"][None], steps.obs["state"]])
            return shown, steps.reward, steps.is_last

        shown, reward, last = jax.jit(jax.vmap(episode))(
            jax.random.split(jax.random.key(0), EPISODES), choices
        )
        assert not last[:, :-1].any() and last[:, -1].all()
        return np.asarray(shown), choices, np.asarray(reward)

    return play


def only_at_the_end(reward):
    """The last reward [B], after zeros."""
    assert not reward[:, :-1].any()
    return reward[:, -1]


def about_half(bits):
    assert 0.3 < np.mean(bits) < 0.7


def test_recall(played):
    shown, _, reward = played("recall:5")
    assert shown.shape == (EPISODES, 7, 6)
    cue = shown[:, 0, 0]
    np.testing.assert_array_equal(only_at_the_end(reward), cue)
    assert set(cue) == {-1, 1}
    about_half(cue > 0)
    assert not shown[:, 1:, 0].any(), "the cue is hidden"
    np.testing.assert_array_equal(shown[:, :, 1], np.tile(np.arange(7) == 6, (EPISODES, 1)))
    symbols = shown[:, :, 2:]
    np.testing.assert_array_equal(symbols.sum(-1), np.tile([0, 1, 1, 1, 1, 1, 0], (EPISODES, 1)))
    frequency = symbols[:, 1:6].mean((0, 1))
    assert (abs(frequency - 0.25) < 0.1).all()
    assert abs(np.corrcoef(symbols[:, 1:6].argmax(-1).mean(1), cue)[0, 1]) < 0.4, "symbols tell nothing"


def test_tmaze(played):
    shown, turns, reward = played("tmaze:4")
    assert shown.shape == (EPISODES, 6, 2)
    side = shown[:, 0, 0]
    np.testing.assert_array_equal(only_at_the_end(reward), (2 * turns[:, -1] - 1) == side)
    about_half(reward[:, -1])
    assert set(side) == {-1, 1} and not shown[:, 1:, 0].any()
    np.testing.assert_array_equal(shown[:, :, 1], np.tile(np.arange(6) == 4, (EPISODES, 1)))


def test_hallway(played):
    shown, sides, reward = played("hallway:6")
    assert shown.shape == (EPISODES, 7, 6)
    colour, side, position = shown[..., :4], shown[..., 4], shown[..., 5]
    entrance = colour[:, 0].argmax(-1)
    assert set(entrance) == {0, 1}
    about_half(entrance)
    np.testing.assert_array_equal(only_at_the_end(reward), 2 * entrance - 1)
    np.testing.assert_array_equal(colour.sum(-1), np.tile([1] * 6 + [0], (EPISODES, 1)))
    np.testing.assert_array_equal(side[:, 1:], 2 * sides - 1)
    assert not side[:, 0].any()
    np.testing.assert_allclose(position, np.tile(np.arange(7) / 6, (EPISODES, 1)), atol=1e-6)
    walls = colour[:, 1:6].reshape(-1, 4).mean(0)
    assert (abs(walls - 0.25) < 0.1).all(), "all colours, the cue's too"


def test_the_side_looked_at_decides_what_is_seen():
    env = envs.make_jax("hallway:8")
    look = jax.jit(
        lambda key, choice: env.step(env.reset(key)[0], jax.nn.one_hot(choice, 2), key)[1].obs["state"]
    )
    seen = [[np.asarray(look(jax.random.key(i), side))[:4] for side in (0, 1)] for i in range(16)]
    different = [not np.array_equal(left, right) for left, right in seen]
    assert 4 < sum(different) < 16  # three of four walls differ


def test_memory_chain(played):
    """gymnax shows the first observation twice; the answer follows the query, whose index is 0."""
    pytest.importorskip("gymnax")
    shown, answers, reward = played("memory_chain:4")
    assert shown.shape == (EPISODES, 6, 3)
    bit = shown[:, 0, 2]
    assert set(bit) == {-1, 1}
    right = (2 * answers[:, -1] - 1) == bit
    np.testing.assert_array_equal(only_at_the_end(reward), np.where(right, 1, -1))
    np.testing.assert_array_equal(shown[:, 1, 2], bit)
    assert not shown[:, 2:, 2].any()
    np.testing.assert_allclose(shown[:, :, 0], np.tile([1, 1, 0.75, 0.5, 0.25, 0], (EPISODES, 1)))


def test_memory_chain_without_gymnax_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(UserError, match=r"memory_chain needs gymnax.*pip install 'mbrl-jax\[gymnax\]'"):
        envs.make_jax("memory_chain:5")


def test_the_number_in_a_name():
    assert envs.make_jax("recall:7").spec.max_steps == 8 and envs.make_jax("recall:7").spec.name == "recall:7"
    assert envs.make_jax("hallway:9").spec.max_steps == 9
    assert envs.make_jax("tmaze").spec.max_steps == 21
    assert envs.is_jax("tmaze:3") and not envs.is_jax("walker_walk:3")


@pytest.mark.parametrize(
    "name, part",
    [
        ("recall:", "'recall:' must end in a whole number, its gap, as in 'recall:30'"),
        ("recall:-3", "whole number"),
        ("hallway:5.5", "its width"),
        ("recall:0", "gap must be at least 1, found 0"),
        ("hallway:1", "width must be at least 2, found 1"),
        ("tmaze:0", "at least 1, found 0"),
        ("pendulum:3", "'pendulum' takes no number, found 'pendulum:3'; these do: recall"),
        ("recal:3", "'recall'"),
    ],
)
def test_impossible_names(name, part):
    with pytest.raises(ValueError) as caught:
        envs.make_jax(name)
    assert part in str(caught.value) and "\n" not in str(caught.value)
