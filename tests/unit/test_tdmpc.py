"""TD-MPC2 against an independent computation: its blocks one by one, and a whole update in NumPy and float64."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import losses
from mbrl.agents import tdmpc
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import override
from mbrl.distributions import symlog_two_hot, tanh_normal
from mbrl.errors import UserError
from mbrl.networks import NormedMLP, apply, mish, simnorm
from mbrl.presets import TDMPC
from mbrl.programs import LoopConfig, make_clock
from mbrl.types import ArraySpec, EnvSpec, Trajectory
from planners.mppi import MPPIConfig
from world_models import tdmpc as model_file
from world_models.tdmpc import TDMPCModelConfig

# The same in NumPy -----------------------------------------------------------------------------------------


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_simnorm(x, group):
    return np.concatenate([np_softmax(part) for part in np.split(x, x.shape[-1] // group, -1)], -1)


def np_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def np_mish(x):
    return x * np.tanh(np.logaddexp(0, x))


def np_mlp(p, x, layers=2, group=0):
    for i in range(layers):
        x = np_mish(np_norm(x @ p[f"linear{i}"]["kernel"] + p[f"linear{i}"]["bias"], p[f"norm{i}"]))
    x = x @ p["out"]["kernel"] + p["out"]["bias"]
    return np_simnorm(np_norm(x, p["out_norm"]), group) if group else x


def np_bins(count, limit):
    return np.linspace(-limit, limit, count)


def np_mean(logits, limit):
    x = (np_softmax(logits) * np_bins(logits.shape[-1], limit)).sum(-1)
    return np.sign(x) * np.expm1(np.abs(x))


def np_two_hot(value, count, limit):
    """By search: the two bins around symlog(value)."""
    bins, x = np_bins(count, limit), np.sign(value) * np.log1p(np.abs(value))
    x, target = np.clip(x, -limit, limit), np.zeros(count)
    above = max(1, int(np.searchsorted(bins, x)))
    share = (x - bins[above - 1]) / (bins[above] - bins[above - 1])
    target[above - 1], target[above] = 1 - share, share
    return target


def np_cross_entropy(logits, value, limit):
    return -(np_two_hot(value, len(logits), limit) * np.log(np_softmax(logits))).sum()


# Blocks ----------------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_simnorm():
    x = 3 * noise(5, 12)
    np.testing.assert_allclose(simnorm(jnp.asarray(x), 4), np_simnorm(x.astype(np.float64), 4), rtol=1e-5)


def test_mish():
    """Its value everywhere, and a finite gradient far out, where exp overflows."""
    x = np.concatenate([np.linspace(-100, 100, 2001), [-1e30, -1e4, 1e4, 1e30]])
    np.testing.assert_allclose(mish(jnp.asarray(x, jnp.float32)), np_mish(x), rtol=1e-5, atol=1e-7)
    slope = jax.vmap(jax.grad(mish))(jnp.array([-1e30, -100.0, 0.0, 1.0, 100.0, 1e30]))
    np.testing.assert_allclose(slope, [0, 0, 0.6, 1.0490, 1, 1], atol=1e-4)


def randomise(params, scale=0.3):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(99), len(leaves))
    return tree.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("group", [0, 3])
def test_normed_mlp(group):
    net, x = NormedMLP(2, 8, 6, simnorm=group), jnp.asarray(noise(4, 5))
    params = randomise(net.init(jax.random.key(0), x)["params"])
    np.testing.assert_allclose(apply(net, params, x), np_mlp(double(params), double(x), 2, group), rtol=2e-4)


def test_initial_weights():
    """Normal with deviation 0.02, not truncated at two deviations; biases 0; a last layer of zeros on request."""
    x = jnp.zeros((1, 100))
    for zero in (False, True):
        params = NormedMLP(1, 400, 200, zero_out=zero).init(jax.random.key(0), x)["params"]
        kernel = np.asarray(params["linear0"]["kernel"])
        assert kernel.std() == pytest.approx(0.02, rel=0.02) and np.abs(kernel).max() > 0.06
        assert (params["linear0"]["bias"] == 0).all() and (params["out"]["bias"] == 0).all()
        assert (np.asarray(params["out"]["kernel"]) == 0).all() == zero


def test_dropout():
    """Only with a key, only in the first layer and before its norm; what stays is scaled up."""
    net, x = NormedMLP(2, 64, 3, dropout=0.25), jnp.asarray(noise(50, 5))
    params = randomise(net.init(jax.random.key(0), x)["params"])
    plain = NormedMLP(2, 64, 3)
    np.testing.assert_array_equal(apply(net, params, x), apply(plain, params, x))
    dropped = apply(net, params, x, jax.random.key(1))
    p, kept = double(params), np.asarray(jax.random.bernoulli(jax.random.key(1), 0.75, (50, 64)))
    hidden = (double(x) @ p["linear0"]["kernel"] + p["linear0"]["bias"]) * kept / 0.75
    hidden = np_mish(np_norm(hidden, p["norm0"]))
    hidden = np_mish(np_norm(hidden @ p["linear1"]["kernel"] + p["linear1"]["bias"], p["norm1"]))
    np.testing.assert_allclose(dropped, hidden @ p["out"]["kernel"] + p["out"]["bias"], rtol=1e-3, atol=1e-4)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("limit", [2.0, 10.0])
def test_symlog_two_hot(limit):
    """Loss and mean by brute force, at bins, between them and beyond them."""
    logits = noise(9, 11)
    edge = np.expm1(limit)
    values = np.array([0.0, 0.3, -0.3, 5.0, edge, -edge, 10 * edge, -10 * edge, np.expm1(2 * limit / 10)])
    dist = symlog_two_hot(jnp.asarray(logits), limit)
    expected = [np_cross_entropy(row.astype(np.float64), v, limit) for row, v in zip(logits, values)]
    np.testing.assert_allclose(dist.loss(jnp.asarray(values, jnp.float32)), expected, rtol=1e-4)
    np.testing.assert_allclose(dist.mean(), np_mean(logits.astype(np.float64), limit), rtol=1e-4, atol=1e-5)


def test_symlog_two_hot_round_trip():
    """Logits of the two-hot of a value give the value back; logits of 0 give exactly 0."""
    values = [-300.0, -1.0, 0.0, 0.01, 77.0]
    logits = np.log(np.stack([np_two_hot(v, 101, 10.0) for v in values]) + 1e-30)
    np.testing.assert_allclose(symlog_two_hot(jnp.asarray(logits), 10.0).mean(), values, rtol=1e-4, atol=1e-6)
    assert (symlog_two_hot(jnp.zeros((3, 101))).mean() == 0).all()


def test_tanh_normal():
    out = 20 * noise(6, 8)
    dist, eps = tanh_normal(jnp.asarray(out)), noise(6, 4, seed=1)
    log_std = np.asarray(dist.log_std, np.float64)
    assert ((log_std >= -10) & (log_std <= 2)).all() and log_std.min() < -9 and log_std.max() > 1
    inner = out[:, :4] + np.exp(log_std) * eps
    np.testing.assert_allclose(dist.at(jnp.asarray(eps)), np.tanh(inner), atol=1e-4)
    density = -0.5 * ((inner - out[:, :4]) / np.exp(log_std)) ** 2 - log_std - np.log(np.sqrt(2 * np.pi))
    np.testing.assert_allclose(dist.inner_log_prob(jnp.asarray(eps)), density.sum(-1), rtol=1e-3, atol=1e-3)
    middle = tanh_normal(jnp.zeros((1, 2)))
    assert middle.log_std == -4 and middle.mode() == 0


def test_update_scale(strict_numerics):
    """From 1 by 1 % of the way to the percentiles' range; a narrow range counts as 1."""
    wide, narrow = 10 * noise(101), 0.1 * noise(101)
    spread = np.percentile(wide, 95) - np.percentile(wide, 5)
    assert float(losses.update_scale(jnp.float32(1), jnp.asarray(wide))) == pytest.approx(
        1 + 0.01 * (spread - 1)
    )
    assert float(losses.update_scale(jnp.float32(2), jnp.asarray(narrow), 0.5)) == pytest.approx(1.5)


def test_ages_and_weights(strict_numerics):
    is_first = np.random.default_rng(0).random((12, 7)) < 0.2
    age = losses.steps_since_start(jnp.asarray(is_first))
    weight = losses.transition_weight(age, 0.7)
    for b in range(7):
        count = 0
        for t in range(12):
            count = 0 if t == 0 or is_first[t, b] else count + 1
            assert age[t, b] == count
            assert weight[t, b] == pytest.approx(0.7 ** (count - 1) if count else 0.0)


@pytest.mark.parametrize(
    ("steps", "gamma"), [(500, 0.99), (100, 0.95), (50, 0.95), (1000, 0.995), (None, 0.995)]
)
def test_episode_discount(steps, gamma):
    assert losses.episode_discount(steps) == pytest.approx(gamma)


# Sizes -----------------------------------------------------------------------------------------------------

WALKER = EnvSpec("walker", {"x": ArraySpec((24,))}, ArraySpec((6,)), max_steps=500)
# Entries of all weight matrices in millions; the names of the presets.
PUBLISHED = {"1M": 1.20, "5M": 4.93, "19M": 18.0, "48M": 47.1, "317M": 312.0}


def preset_params(name):
    model = model_file.make(override(TDMPCModelConfig(), TDMPC[name]["model"]), WALKER)
    agent = tdmpc.make(override(TDMPCConfig(), TDMPC[name]["agent"]), WALKER, model, 0.99, 100)
    return jax.eval_shape(agent.init, jax.random.key(0)).params


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    leaves = jax.tree_util.tree_leaves_with_path(preset_params(name))
    kernels = sum(np.prod(x.shape) for path, x in leaves if "kernel" in jax.tree_util.keystr(path))
    assert float(f"{kernels / 1e6:.3g}") == PUBLISHED[name]
    total = sum(np.prod(x.shape) for _, x in leaves)
    assert kernels < total < 1.02 * kernels  # biases and norms


@pytest.mark.parametrize("name", TDMPC)
def test_preset_is_consistent(name):
    """Every field exists (override refuses unknown ones); updates per agent step as published, or half of it; the
    seed phase is 5 episodes of 500 steps and as many updates."""
    values = TDMPC[name]
    loop = override(LoopConfig(), values["loop"])
    search = override(MPPIConfig(), values["search"].get("mppi", {}))
    clock = make_clock(loop, 100_000, loop.batch_length + 1)
    assert loop.batch_length == 3 and search.horizon == (5 if name == "s" else 3)
    assert loop.prefill_random and not loop.replay_online
    per_step = clock.updates / (clock.rows * loop.num_envs)
    assert clock.rows == 1 and per_step == (0.5 if name == "s" else 1.0)
    if name != "s":
        assert (loop.prefill, loop.pretrain, loop.num_envs, loop.batch_size) == (2500, 2500, 1, 256)
        assert (search.samples, search.elites, search.policy_samples, search.iterations) == (512, 64, 24, 6)


def test_parameters_of_5m_by_hand():
    """Every layer of the default preset: matrix, bias, and scale and bias of the norm."""

    def mlp(into, out, normed_out):
        return (into + 1) * 512 + 2 * 512 + 513 * 512 + 2 * 512 + 513 * out + 2 * out * normed_out

    encoder = 25 * 256 + 2 * 256 + 257 * 512 + 2 * 512
    expected = encoder + mlp(518, 512, True) + 6 * mlp(518, 101, False) + mlp(512, 12, False)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(preset_params("5M"))) == expected


# A whole update --------------------------------------------------------------------------------------------

T, B, A, OBS, LATENT, GROUP, BINS, LIMIT, GAMMA = 4, 5, 2, 3, 6, 3, 11, 3.0, 0.9
SPEC = EnvSpec("test", {"x": ArraySpec((OBS,))}, ArraySpec((A,)))
DISCRETE = dataclasses.replace(SPEC, action=ArraySpec((A,), classes=A))
MODEL = TDMPCModelConfig(
    latent=LATENT,
    simnorm=GROUP,
    encoder_units=8,
    units=8,
    bins=BINS,
    bin_limit=LIMIT,
    episodic=True,
    discount=GAMMA,
)
CONFIG = TDMPCConfig(units=8, critics=3, dropout=0.0, bins=BINS, bin_limit=LIMIT, entropy=0.1)
FROZEN = override(CONFIG, {"optimiser": {"learning_rate": 0.0}, "actor_optimiser": {"learning_rate": 0.0}})


class Case(NamedTuple):
    agent: object
    train: tdmpc.TrainState
    traj: Trajectory
    update: object


def make_case(spec) -> Case:
    """Parameters that are nowhere zero, and a policy without noise: its deviation is exp(-10)."""
    agent = tdmpc.make(FROZEN, spec, model_file.make(MODEL, spec), GAMMA, 100)
    train = jax.jit(agent.init)(jax.random.key(0))
    params, target = randomise(train.params), randomise(train.target, 0.6)
    if spec.action.classes is None:
        bias = params["actor"]["out"]["bias"]
        params["actor"]["out"]["bias"] = bias.at[A:].set(-50.0)
    rng = np.random.default_rng(1)
    first = np.zeros((T, B), bool)
    first[0, 0] = first[2, 1] = first[1, 2] = first[3, 3] = True  # column 4 has none
    terminal = rng.random((T, B)) < 0.3
    action = np.tanh(rng.normal(size=(T, B, A)))
    if spec.action.classes:
        action = np.eye(A)[rng.integers(0, A, (T, B))]
    traj = Trajectory(
        {"x": rng.normal(size=(T, B, OBS))}, action, 3 * rng.normal(size=(T, B)), first, terminal, terminal
    )
    traj = jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), traj)
    return Case(agent, train._replace(params=params, target=target), traj, jax.jit(agent.update))


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(SPEC)


def np_critics(params, z, action):
    """Logits of each critic."""
    members = [jax.tree.map(lambda x: x[i], params) for i in range(CONFIG.critics)]
    return [np_mlp(member, np.concatenate([z, action], -1)) for member in members]


PAIRS = [(0, 1), (0, 2), (1, 2)]


def reference(case: Case):
    """Metrics by loops over transitions; those that depend on the pair of critics are lists over PAIRS."""
    params, target = double(case.train.params), double(case.train.target)
    traj = jax.tree.map(np.asarray, case.traj)
    p, out = params["model"], dict.fromkeys(("consistency", "reward", "termination"), 0.0)
    obs, reward = double(traj.obs["x"]), double(traj.reward)
    value, predicted, policy_weight = [0.0] * 3, np.zeros((T, B, LATENT)), np.zeros((T, B))
    targets = [[] for _ in PAIRS]
    for b in range(B):
        for t in range(T):
            encoded = np_mlp(p["encoder"], obs[t, b], 1, GROUP)
            if t == 0 or traj.is_first[t, b]:
                z, age = encoded, 0
            else:
                weight, both = 0.5**age, np.concatenate([z, traj.action[t, b]])
                out["reward"] += weight * np_cross_entropy(np_mlp(p["reward"], both), reward[t, b], LIMIT)
                critics = np_critics(params["critic"], z, traj.action[t, b])
                z, age = np_mlp(p["dynamics"], both, 2, GROUP), age + 1
                out["consistency"] += weight * np.square(z - encoded).mean()
                logit = np_mlp(p["termination"], z)[0]
                out["termination"] += np.logaddexp(0, -logit if traj.is_terminal[t, b] else logit)
            if t > 0:
                goal = np.tanh(np_mlp(params["actor"], encoded)[:A])
                following = [np_mean(x, LIMIT) for x in np_critics(target, encoded, goal)]
                for i, (first, second) in enumerate(PAIRS):
                    alive = 0.0 if traj.is_terminal[t, b] else 1.0
                    y = reward[t, b] + GAMMA * alive * min(following[first], following[second])
                    targets[i].append(y)
                    if not traj.is_first[t, b]:
                        value[i] += (
                            weight * sum(np_cross_entropy(x, y, LIMIT) for x in critics) / CONFIG.critics
                        )
            predicted[t, b], policy_weight[t, b] = z, 0.5**age
    out = {f"{name}_loss": x / ((T - 1) * B) for name, x in out.items()}
    out["value_loss"] = np.array(value) / ((T - 1) * B)
    out["target_value"] = np.array([np.mean(x) for x in targets])
    out["loss"] = (
        20 * out["consistency_loss"]
        + 0.1 * (out["reward_loss"] + out["value_loss"])
        + out["termination_loss"]
    )
    return out, (params, predicted, policy_weight)


def test_model_loss(case):
    """Consistency with the encoder of the next observation, reward, termination and value along the rolled-out
    latents, restarted and masked at episode starts, all against loops; each of the three pairs is drawn."""
    expected, _ = reference(case)
    seen = set()
    for i in range(12):
        metrics = case.update(case.train, case.traj, jax.random.key(i))[1].metrics
        pair = int(np.abs(expected["target_value"] - float(metrics["target_value"])).argmin())
        seen.add(pair)
        for name, value in expected.items():
            value = value[pair] if np.ndim(value) else value
            np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    assert seen == {0, 1, 2}
    assert len({f"{x:.3f}" for x in expected["target_value"]}) == 3


def policy_reference(values, entropy, weight):
    """(loss, scale) from mean values and entropies [T, B]."""
    scale = 1 + 0.01 * (max(1.0, np.percentile(values[0], 95) - np.percentile(values[0], 5)) - 1)
    return (weight * (-values / scale - CONFIG.entropy * entropy)).mean(), scale


def test_policy_loss(case):
    """Mean of two critics at the policy's action, scaled, and its entropy as published."""
    _, (params, z, weight) = reference(case)
    critics = np.stack(
        [
            np_mean(x, LIMIT)
            for x in np_critics(params["critic"], z, np.tanh(np_mlp(params["actor"], z)[..., :A]))
        ]
    )
    for i in range(4):
        metrics = case.update(case.train, case.traj, jax.random.key(i))[1].metrics
        means = [critics[list(pair)].mean(0) for pair in PAIRS]
        values = min(means, key=lambda x: abs(x.mean() - metrics["value"]))
        np.testing.assert_allclose(metrics["value"], values.mean(), rtol=1e-3, atol=1e-4)
        # The noise is known only on average: -A log N = A^2 (log sigma + 0.5 log(2 pi)) + A eps^2 / 2.
        entropy = float(metrics["entropy_actor"])
        assert entropy == pytest.approx(A * A * (-10 + 0.5 * np.log(2 * np.pi) + 0.5), abs=0.6)
        loss, scale = policy_reference(values, 0.0, weight)
        assert float(metrics["value_scale"]) == pytest.approx(scale, rel=1e-3)
        # The weights are not all equal, so that the entropy term lies between bounds.
        bonus = loss - float(metrics["actor_loss"])
        assert bonus == pytest.approx(CONFIG.entropy * entropy * weight.mean(), rel=0.05)


def test_discrete_policy_loss():
    """The exact expectation over all actions, and the exact entropy."""
    case = make_case(DISCRETE)
    params = double(case.train.params)
    metrics = case.update(case.train, case.traj, jax.random.key(0))[1].metrics
    obs, traj = double(case.traj.obs["x"]), jax.tree.map(np.asarray, case.traj)
    z, weight = np.zeros((T, B, LATENT)), np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            if t == 0 or traj.is_first[t, b]:
                z[t, b], age = np_mlp(params["model"]["encoder"], obs[t, b], 1, GROUP), 0
            else:
                both = np.concatenate([z[t - 1, b], traj.action[t, b]])
                z[t, b], age = np_mlp(params["model"]["dynamics"], both, 2, GROUP), age + 1
            weight[t, b] = 0.5**age
    probs = np_softmax(np_mlp(params["actor"], z))
    entropy = -(probs * np.log(probs)).sum(-1)
    np.testing.assert_allclose(metrics["entropy_actor"], entropy.mean(), rtol=1e-4)
    critics = np.zeros((CONFIG.critics, T, B))
    for a in range(A):
        logits = np_critics(params["critic"], z, np.broadcast_to(np.eye(A)[a], (T, B, A)))
        critics += np.stack([probs[..., a] * np_mean(x, LIMIT) for x in logits])
    results = [policy_reference(critics[list(pair)].mean(0), entropy, weight)[0] for pair in PAIRS]
    assert np.abs(np.array(results) - float(metrics["actor_loss"])).min() < 1e-4
    assert np.ptp(results) > 1e-3


def test_critics_learn_from_the_latest_and_policy_from_them(case):
    """The target critics move by 1 % of the way to the NEW critics; the policy loss reads the new critics; the
    encoder learns at its own, lower rate."""
    agent = tdmpc.make(CONFIG, SPEC, model_file.make(MODEL, SPEC), GAMMA, 100)
    new, _ = jax.jit(agent.update)(case.train, case.traj, jax.random.key(0))
    jax.tree.map(
        lambda t, q, n: np.testing.assert_allclose(n, 0.99 * t + 0.01 * q, rtol=1e-5, atol=1e-6),
        case.train.target,
        new.params["critic"],
        new.target,
    )
    step = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), new.params, case.train.params)
    assert step["model"]["encoder"]["linear0"]["kernel"] == pytest.approx(
        0.3 * 3e-4, rel=0.02
    )  # Adam's first
    assert step["model"]["dynamics"]["linear0"]["kernel"] == pytest.approx(3e-4, rel=0.02)
    assert step["critic"]["out"]["kernel"] == pytest.approx(3e-4, rel=0.02)
    assert step["actor"]["out"]["kernel"] == pytest.approx(3e-4, rel=0.05)


def test_prediction_follows_the_taken_actions(case):
    """``predicted`` of a sequence is imagination from its first latent by the actions that were taken; the
    reward on arrival is that of the latent and action before."""
    model, params = model_file.make(MODEL, SPEC), case.train.params["model"]
    seen = model.observe(
        params, model.init_state(params, B), case.traj, jax.random.split(jax.random.key(0), T)
    )
    state = jax.tree.map(lambda x: x[0], seen.starts.states)
    for t in range(1, T):
        before = state.z
        state = model.imagine_step(params, (), state, case.traj.action[t], jax.random.key(0))
        running = ~np.asarray(case.traj.is_first)[1 : t + 1].any(0)
        np.testing.assert_allclose(seen.predicted[t][running], state.z[running], rtol=1e-5)
        p, both = double(params), np.concatenate([before, case.traj.action[t]], -1)
        said = model.predict(params, state)
        np.testing.assert_allclose(
            said.reward, np_mean(np_mlp(p["reward"], both), LIMIT), rtol=1e-3, atol=1e-4
        )
        ends = 1 / (1 + np.exp(-np_mlp(p["termination"], double(state.z))[:, 0]))
        np.testing.assert_allclose(said.cont, GAMMA * (1 - ends), rtol=1e-4)


def test_consistency_moves_the_prediction_not_its_target(case):
    """Of what is seen in a sequence only its first row, from which it is predicted, gets a gradient."""
    model, params = model_file.make(MODEL, SPEC), case.train.params["model"]
    traj = case.traj._replace(is_first=jnp.zeros((T, B), bool).at[0].set(True))
    keys = jax.random.split(jax.random.key(0), T)

    def consistency(obs):
        seen = model.observe(params, model.init_state(params, B), traj._replace(obs=obs), keys)
        return seen.losses["consistency"].sum()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(consistency))(traj.obs)):
        assert np.abs(gradient[0]).max() > 0 and not np.asarray(gradient[1:]).any()


def test_a_plan_ends_where_termination_is_likely(case):
    """It goes on for certain or not at all, by the likelier of the two."""
    model, params, rng = model_file.make(MODEL, SPEC), case.train.params, np.random.default_rng(0)
    z, source, action = (rng.normal(size=(20, width)) for width in (LATENT, LATENT, A))
    logits = np_mlp(double(params["model"]["termination"]), z)[:, 0]
    # A head whose latents are divided: random weights alone may call all of them likely.
    head = jax.tree.map(lambda x: x, params["model"]["termination"])
    head["out"]["bias"] = head["out"]["bias"] - np.median(logits)
    params = params | {"model": params["model"] | {"termination": head}}
    states = model_file.Latent(*(jnp.float32(x) for x in (z, source, action)))
    planned = tdmpc.make_simulator(FROZEN, SPEC, model, GAMMA).predict(params, states).cont
    np.testing.assert_array_equal(planned, np.where(logits < np.median(logits), np.float32(GAMMA), 0))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"critics": 1}, "critics"),
        ({"bins": 10}, "bins"),
        ({"rho": 2.0}, "rho"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_settings_are_refused(fields, name):
    with pytest.raises(UserError, match=f"agent.{name} is"):
        tdmpc.make(override(CONFIG, fields), SPEC, model_file.make(MODEL, SPEC), GAMMA, 100)


@pytest.mark.parametrize(
    ("fields", "name"), [({"latent": 7}, "latent"), ({"bins": 10}, "bins"), ({"units": 0}, "units")]
)
def test_impossible_models_are_refused(fields, name):
    with pytest.raises(UserError, match=f"model.{name} is"):
        model_file.make(override(MODEL, fields), SPEC)
