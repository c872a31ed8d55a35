"""Every block of Dreamer against arrays computed with the reference implementation (tests/data/README.md).

These tests fail when a formula differs from the published code, however plausible the difference: a KL
clipped per factor, a return that bootstraps through a truncation, an RMS that forgets its bias correction.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import losses, optimisers
from mbrl.distributions import BoundedNormal, TwoHot, one_hot, two_hot, twohot_bins
from mbrl.losses import ReturnNorm
from mbrl.optimisers import OptimiserConfig
from world_models import rssm
from world_models.rssm import RSSM, RSSMConfig

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, jax.Array]:
    with np.load(Path(__file__).parents[1] / "data" / "dreamer_golden.npz", allow_pickle=False) as file:
        return {name: jnp.asarray(array) for name, array in file.items()}


def close(ours, reference, rtol: float = TOLERANCE, atol: float = TOLERANCE):
    np.testing.assert_allclose(np.asarray(ours), reference, rtol=rtol, atol=atol)


def time_major(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1)


def test_all_arrays_are_used(golden):
    """A new golden block must come with a test."""
    prefixes = {name.split("/")[0] for name in golden}
    assert prefixes == {"lambda", "twohot", "kl", "opt", "retnorm", "rssm", "imag", "repl"}


def test_lambda_return(golden, strict_numerics):
    """Terminals end the return; a truncation cuts the trace but still bootstraps fully."""
    last, term, reward, boot = (time_major(golden[f"lambda/{k}"]) for k in ("last", "term", "rew", "boot"))
    ours = losses.replay_returns(reward, last, term, boot, discount=0.997, lam=0.95)
    close(ours, time_major(golden["lambda/ret"]))


def test_two_hot(golden):
    """Bins are symmetric with an exact zero; the target is interpolated in raw space; the prediction sums mirrored bins in pairs."""
    dist = two_hot(golden["twohot/logits"])
    bins = twohot_bins(255, 20.0)
    close(bins, golden["twohot/bins"], atol=0)
    assert bins[127] == 0 and (bins == -bins[::-1]).all() and (np.diff(bins) > 0).all()
    close(dist.loss(golden["twohot/target"]), golden["twohot/loss"])
    close(dist.mean(), golden["twohot/pred"])


def test_kl_and_entropy(golden, strict_numerics):
    """One per cent of uniform in both distributions; summed over the factors."""
    post, prior = (one_hot(golden[f"kl/{k}"], unimix=0.01) for k in ("post", "prior"))
    close(post.kl(prior).sum(-1), golden["kl/kl"])
    close(post.entropy().sum(-1), golden["kl/entropy_post"])
    clipped, kl = losses.kl_losses(post, prior, free_nats=1.0)
    for value in (kl, clipped["dyn"], clipped["rep"]):
        close(value, golden["kl/kl"])


def test_optimiser(golden):
    """Five updates, with a huge gradient in the second and a parameter that starts at zero: whole-tensor AGC,
    RMS before momentum, bias corrections, warm-up from exactly 0."""
    params = {name: golden[f"opt/p0_{name}"] for name in "wz"}
    optimiser = optimisers.make(OptimiserConfig(learning_rate=4e-5, warmup=1000), total_updates=10_000)
    state = optimiser.init(params)
    for i in range(5):
        grads = {name: golden[f"opt/g{i}_{name}"] for name in "wz"}
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in "wz":
            # The reference stores differences of parameters, so their rounding adds to updates of 1e-8.
            reference, size = golden[f"opt/u{i}_{name}"], np.abs(golden[f"opt/u{i}_{name}"]).max()
            close(updates[name], reference, rtol=TOLERANCE, atol=TOLERANCE * size)


def test_return_norm(golden):
    """Percentiles 5 and 95, rate 0.01 from 0 without bias correction, scale at least 1."""
    norm = ReturnNorm(jnp.zeros(()), jnp.zeros(()))
    for i in range(4):
        norm = losses.update_return_norm(norm, golden[f"retnorm/x{i}"], rate=0.01)
        close(jnp.stack([norm.low, norm.scale]), golden[f"retnorm/lo_scale{i}"])


RSSM_NAMES = {
    "dynin0": "in_deter/linear",
    "dynin0norm": "in_deter/norm",
    "dynin1": "in_stoch/linear",
    "dynin1norm": "in_stoch/norm",
    "dynin2": "in_action/linear",
    "dynin2norm": "in_action/norm",
    "dynhid0": "dyn_0",
    "dynhid0norm": "dyn_norm_0",
    "dyngru": "gates",
    "obs0": "post_net/dense0/linear",
    "obs0norm": "post_net/dense0/norm",
    "obslogit": "post_net/out",
    "prior0": "prior_net/dense0/linear",
    "prior0norm": "prior_net/dense0/norm",
    "prior1": "prior_net/dense1/linear",
    "prior1norm": "prior_net/dense1/norm",
    "priorlogit": "prior_net/out",
}


def test_rssm(golden):
    """One step of core, prior and posterior with the reference's parameters, actions beyond 1 included. The
    parameter trees must match name by name and shape by shape."""
    params: dict = {}
    for name, array in golden.items():
        if name.startswith("rssm/param/dyn/"):
            layer, leaf = name.removeprefix("rssm/param/dyn/").split("/")
            node = params
            for part in RSSM_NAMES[layer].split("/"):
                node = node.setdefault(part, {})
            node[leaf] = array
    config = RSSMConfig(deter=32, hidden=8, stoch=4, classes=3, units=5, blocks=4)
    ours = rssm.backbone(config, action_size=2).init(jax.random.key(0), token_size=5)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)

    deter, stoch, action, token = (golden[f"rssm/{k}"] for k in ("deter", "stoch", "action", "token"))

    def step(module):
        deter_next = module.core(deter, stoch, module.embed_action(action))
        prior, post = module.prior(deter_next), module.posterior(deter_next, token)
        return deter_next, prior.log_probs, post.log_probs

    deter_next, prior, post = RSSM(config).apply({"params": params}, method=step)
    close(deter_next, golden["rssm/deter_next"])
    close(prior, one_hot(golden["rssm/prior_logit"], 0.01).log_probs)
    close(post, one_hot(golden["rssm/post_logit"], 0.01).log_probs)
    # The logits themselves, up to the constant that a softmax ignores.
    for ours, name in ((prior, "prior_logit"), (post, "post_logit")):
        probs = (np.exp(ours) - 0.01 / 3) / 0.99
        logits = golden[f"rssm/{name}"]
        close(np.log(probs) - np.log(probs)[..., :1], logits - logits[..., :1], rtol=1e-4, atol=1e-5)


def imagined(golden, name: str):
    return time_major(golden[f"imag/{name}"])


def values(golden, rows: int | None = None) -> tuple[TwoHot, jax.Array]:
    """The critic's distribution and the slow critic's prediction, [T, B]."""
    current, slow = (imagined(golden, k)[:, :rows] for k in ("value_logits", "slow_logits"))
    return two_hot(current), two_hot(slow).mean()


def without_last(dist: TwoHot) -> TwoHot:
    return TwoHot(dist.logits[:-1], dist.bins)


def test_imagination_losses(golden):
    """Returns, the normaliser that sees them first, REINFORCE with entropy, and the critic's two targets."""
    value, slow = values(golden)
    cont = imagined(golden, "con")
    returns = losses.lambda_return(imagined(golden, "rew"), cont, value.mean(), lam=0.95)
    close(returns, time_major(golden["imag/ret"]))
    norm = losses.update_return_norm(ReturnNorm(jnp.zeros(()), jnp.zeros(())), returns, rate=0.01)
    advantage = (returns - value.mean()[:-1]) / norm.scale
    policy = BoundedNormal(imagined(golden, "mean"), imagined(golden, "std"))
    log_prob, entropy = policy.log_prob(imagined(golden, "action"))[:-1], policy.entropy()[:-1]
    weight = losses.trajectory_weight(cont)[:-1]
    actor = losses.reinforce_loss(log_prob, advantage, entropy, weight, 3e-4)
    critic = losses.critic_loss(without_last(value), returns, slow[:-1], weight)
    reference = time_major(golden["imag/loss_policy"])
    # Values of 1e5 cancel in the advantage, so the tolerance is that of the largest entry.
    close(actor, reference, atol=1e-6 * np.abs(reference).max())
    close(critic, time_major(golden["imag/loss_value"]))


def test_replay_value_loss(golden):
    """Real rewards, bootstrapped from given returns; no loss where an episode was cut or ended."""
    last, term, reward, boot = (
        time_major(golden[f"lambda/{k}"])[:6] for k in ("last", "term", "rew", "boot")
    )
    returns = losses.replay_returns(reward, last, term, boot, discount=1 - 1 / 333, lam=0.95)
    close(returns, time_major(golden["repl/ret"]))
    value, slow = values(golden, rows=3)
    weight = 1.0 - last[:-1].astype(jnp.float32)
    loss = losses.critic_loss(without_last(value), returns, slow[:-1], weight)
    close(loss, time_major(golden["repl/loss"]))
