"""The probe of world models: whole episodes, accuracies by hand, an exact repetition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs, probing
from mbrl.errors import UserError
from mbrl.probing import ProbeConfig
from mbrl.types import Observed, Prediction, Starts, WorldModel

ENV = envs.make_jax("recall:3")


def test_episodes_are_whole():
    traj = jax.jit(lambda key: probing.episodes(ENV, key, 16))(jax.random.key(0))
    assert traj.obs["state"].shape == (5, 16, 6) and traj.action.shape == (5, 16, 2)
    first, last = np.asarray(traj.is_first), np.asarray(traj.is_last)
    assert first[0].all() and not first[1:].any() and last[-1].all() and not last[:-1].any()
    np.testing.assert_array_equal(traj.is_terminal, last)
    assert not traj.action[0].any() and (np.asarray(traj.action[1:]).sum(-1) == 1).all()
    np.testing.assert_array_equal(traj.reward[-1], traj.obs["state"][0, :, 0])
    assert len({tuple(np.asarray(traj.obs["state"][:, b]).ravel()) for b in range(16)}) > 8


def counting_model(forgets: bool) -> WorldModel:
    """Knows the cue from what it saw, and with ``forgets`` loses it while it imagines. Its state is the cue and
    the number of actions that it was told, all of category 1."""

    def observe(params, state, traj, keys):
        cue = jnp.broadcast_to(traj.obs["state"][0, :, 0], traj.reward.shape)
        states = {"cue": cue, "ones": jnp.cumsum(traj.action[..., 1], 0)}
        return Observed(jax.tree.map(lambda x: x[-1], states), Starts((), states), cue, {}, {})

    def imagine_step(params, ctx, state, action, key):
        kept = jnp.zeros_like(state["cue"]) - 1 if forgets else state["cue"]
        return {"cue": kept, "ones": state["ones"] + action[..., 1]}

    unused = lambda *args: None
    return WorldModel(
        init=unused,
        init_state=lambda params, batch: (),
        observe=observe,
        observe_step=unused,
        imagine_step=imagine_step,
        predict=lambda params, state: Prediction(state["cue"] * 0.1, state["ones"], {}),
        features=lambda params, state: state["cue"][..., None],
        decode=unused,
        param_groups=dict,
    )


@pytest.mark.parametrize("forgets", [False, True])
def test_accuracies(forgets):
    """A model that knows is right always; one that forgets while imagining says -1 and is right by chance, that
    is as often as -1 occurs."""
    config = ProbeConfig(eval_episodes=200, observed=2)
    found = jax.jit(probing.make(config, ENV, counting_model(forgets)).examine)(None, jax.random.key(0))
    assert float(found["inference"]) == 1.0
    assert 0.5 <= float(found["chance"]) < 0.6
    if forgets:
        assert float(found["imagination"]) in (
            pytest.approx(float(found["chance"])),
            pytest.approx(1 - float(found["chance"])),
        )
    else:
        assert float(found["imagination"]) == 1.0


@pytest.mark.parametrize(
    "values, part",
    [
        ({"updates": 70, "eval_every": 50}, "probe.updates is 70, it must be a multiple of probe.eval_every"),
        ({"observed": 5}, "probe.observed is 5, it must be below the 5 observations"),
        ({"observed": 0}, "probe.observed"),
        ({"batch_size": 0}, "probe.batch_size"),
        ({"scale_rec": -1.0}, "probe.scale_rec"),
    ],
)
def test_impossible_values(values, part):
    with pytest.raises(UserError) as caught:
        probing.make(ProbeConfig(**values), ENV, counting_model(False))
    assert part in str(caught.value)
