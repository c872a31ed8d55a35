"""HostPool: masks, faults, strictness at the first reset, state."""

from __future__ import annotations

import numpy as np
import pytest

from mbrl.envs import dmc
from mbrl.envs.pool import PATIENCE, HostPool
from mbrl.errors import UserError
from mbrl.types import ArraySpec, EnvSpec, TimeStep

SPEC = EnvSpec(
    "counter",
    {"count": ArraySpec((1,)), "grid": ArraySpec((2, 2)), "pixels": ArraySpec((2, 3), "uint8")},
    ArraySpec((2,)),
    max_steps=3,
)


class Counter:
    """Counts its steps, pays the first entry of the action, ends after three. ``spoil`` edits a time step."""

    def __init__(self, spec=SPEC, spoil=lambda step, timestep: timestep):
        self.spec, self.spoil, self.count, self.closed = spec, spoil, 0, False

    def show(self, reward) -> TimeStep:
        obs = {
            "count": np.full(1, self.count, np.float32),
            "grid": np.full((2, 2), -self.count, np.float32),
            "pixels": np.full((2, 3), self.count, np.uint8),
        }
        return self.spoil(self.count, TimeStep(obs, np.float32(reward), self.count >= 3, self.count >= 3))

    def reset(self) -> TimeStep:
        self.count = 0
        return self.show(0)

    def step(self, action) -> TimeStep:
        self.count += 1
        return self.show(action[0])

    def get_state(self):
        return {"count": np.array(self.count)}

    def set_state(self, state):
        self.count = int(state["count"])

    def render(self, height, width):
        raise RuntimeError

    def close(self):
        self.closed = True


def step(pool, reward=1.0, reset=()):
    mask = np.zeros(pool.size, bool)
    mask[list(reset)] = True
    return pool.step(np.full((pool.size, 2), reward, np.float32), mask)


def test_mask_resets_some_and_steps_the_others():
    pool = HostPool([Counter(), Counter(), Counter()])
    first = pool.reset()
    assert first.obs["count"].shape == (3, 1) and first.obs["pixels"].dtype == np.uint8
    np.testing.assert_array_equal(first.reward, 0)
    step(pool)
    mixed = step(pool, 2.0, reset=[1])
    np.testing.assert_array_equal(mixed.obs["count"][:, 0], [2, 0, 2])
    np.testing.assert_array_equal(mixed.reward, [2, 0, 2])
    last = step(pool)
    np.testing.assert_array_equal(last.is_last, [True, False, True])
    np.testing.assert_array_equal(last.is_terminal, [True, False, True])
    assert last.reward.dtype == np.float32 and last.is_last.dtype == bool
    np.testing.assert_array_equal(mixed.obs["count"][:, 0], [2, 0, 2])  # earlier arrays stay as they were
    assert not pool.faults.any()


def spoiled(**changes):
    """An environment whose second step has other entries."""

    def spoil(count, timestep):
        if count != 2:
            return timestep
        obs = {key: value for key, value in timestep.obs.items() if changes.get(key, 0) is not None}
        obs |= {key: changes[key] for key in obs if key in changes}
        return timestep._replace(obs=obs, is_terminal=True, reward=changes.get("reward", timestep.reward))

    return Counter(spoil=spoil)


@pytest.mark.parametrize(
    "fault",
    [
        {"count": np.array([np.nan], np.float32)},
        {"grid": np.array([[0, np.inf], [0, 0]], np.float32)},
        {"count": np.array([1e300])},
        {"grid": np.zeros((2, 3), np.float32)},
        {"count": np.float32(2)},
        {"pixels": None},
        {"reward": np.float32(-np.inf)},
        {"reward": np.float32(np.nan)},
        {"reward": np.zeros(2, np.float32)},
    ],
    ids=lambda fault: "-".join(fault),
)
def test_fault_truncates_only_its_own_environment(fault):
    pool = HostPool([Counter(), spoiled(**fault)])
    pool.reset()
    assert not step(pool).is_last.any()
    with pytest.warns(RuntimeWarning, match="environment 1 returned numbers that are not finite or a wrong"):
        bad = step(pool)
    np.testing.assert_array_equal(bad.is_last, [False, True])
    assert not bad.is_terminal.any()
    np.testing.assert_array_equal(bad.reward, [1, 0])
    np.testing.assert_array_equal(bad.obs["count"], [[2], [0]])
    assert not bad.obs["grid"][1].any() and not bad.obs["pixels"][1].any()
    np.testing.assert_array_equal(pool.faults, [0, 1])
    after = step(pool, reset=[1])
    np.testing.assert_array_equal(after.obs["count"], [[3], [0]])
    np.testing.assert_array_equal(pool.faults, [0, 1])


class Broken(Counter):
    """Raises in the calls ``at`` of reset and step, counted together."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = set(at), 0

    def fail_or(self, call):
        self.calls += 1
        if self.calls - 1 in self.at:
            raise OSError(f"call {self.calls - 1}")
        return call

    def reset(self):
        return self.fail_or(super().reset)()

    def step(self, action):
        return self.fail_or(super().step)(action)


def test_an_exception_is_a_fault_and_the_environment_is_reset():
    """In a step and in the reset after it: each ends the episode, the other environment does not notice."""
    pool = HostPool([Counter(), Broken(at=[2, 3])])
    pool.reset()
    step(pool)
    with pytest.warns(RuntimeWarning, match=r"environment 1 raised OSError\('call 2'\): its episode ends"):
        bad = step(pool)
    with pytest.warns(RuntimeWarning, match="call 3"):
        again = step(pool, reset=[1])
    for timestep in (bad, again):
        np.testing.assert_array_equal(timestep.is_last, [timestep is again, True])
        assert not timestep.is_terminal[1] and not timestep.obs["count"][1].any()
    after = step(pool, reset=[0, 1])
    np.testing.assert_array_equal(pool.faults, [0, 2])
    assert not after.is_last.any()
    np.testing.assert_array_equal(step(pool).obs["count"], [[1], [1]])


def test_an_environment_that_stays_broken_ends_the_run():
    pool = HostPool([Counter(), Broken(at=range(1, 100))])
    pool.reset()
    with pytest.warns(RuntimeWarning), pytest.raises(UserError, match="environment 1 of counter failed 10"):
        for _ in range(PATIENCE):
            step(pool, reset=[1])
    assert pool.faults[1] == PATIENCE


def test_a_simulation_that_diverges_is_a_fault():
    pool = HostPool([dmc.make("cartpole_swingup", i) for i in range(2)])
    pool.reset()
    with pytest.warns(RuntimeWarning, match="environment 0 returned"):
        end = pool.step(np.array([[np.nan], [0.0]], np.float32), np.zeros(2, bool))
    np.testing.assert_array_equal(end.is_last, [True, False])
    assert all(np.isfinite(value).all() for value in end.obs.values()) and np.isfinite(end.reward).all()
    np.testing.assert_array_equal(pool.faults, [1, 0])


@pytest.mark.parametrize(
    "key, value, found",
    [
        ("count", np.zeros(2, np.float32), r"float32 \(2,\)"),
        ("count", np.zeros(1), r"float64 \(1,\)"),
        ("pixels", np.zeros((2, 3), np.float32), r"float32 \(2, 3\)"),
    ],
)
def test_first_reset_names_the_field_that_contradicts_the_spec(key, value, found):
    wrong = Counter(spoil=lambda count, timestep: timestep._replace(obs=timestep.obs | {key: value}))
    with pytest.raises(
        ValueError, match=f"Environment 1: observation '{key}' is {found} where the spec says"
    ):
        HostPool([Counter(), wrong]).reset()


def test_first_reset_names_missing_keys():
    wrong = Counter(spoil=lambda count, timestep: timestep._replace(obs={"count": timestep.obs["count"]}))
    with pytest.raises(ValueError, match=r"Environment 0 shows \['count'\]"):
        HostPool([wrong]).reset()


def test_specs_must_agree():
    other = EnvSpec("other", SPEC.obs, ArraySpec((3,)), max_steps=3)
    with pytest.raises(ValueError, match="Environment 1 differs from environment 0 in action"):
        HostPool([Counter(), Counter(other)])
    with pytest.raises(ValueError, match="at least one"):
        HostPool([])


def test_arguments_of_a_wrong_shape():
    pool = HostPool([Counter(), Counter()])
    with pytest.raises(ValueError, match=r"shape \(2, 2\), found \(2, 3\)"):
        pool.step(np.zeros((2, 3), np.float32), np.ones(2, bool))
    with pytest.raises(ValueError, match="reset_mask must be bool"):
        pool.step(np.zeros((2, 2), np.float32), np.ones(2, np.float32))


def test_state_round_trip_through_a_file(tmp_path):
    def fresh(seed):
        return HostPool([dmc.make("reacher_easy", seed + i) for i in range(3)])

    def onward(pool):
        rng = np.random.default_rng(1)
        steps = [
            pool.step(rng.uniform(-1, 1, (3, 2)).astype(np.float32), np.arange(3) == t) for t in range(6)
        ]
        return np.stack([np.concatenate([s.obs["to_target"].ravel(), s.reward, s.is_last]) for s in steps])

    pool, other = fresh(0), fresh(10)
    pool.reset()
    pool.faults[1] = 4
    step(pool, 0.3)
    np.savez(tmp_path / "pool.npz", **pool.get_state())
    with np.load(tmp_path / "pool.npz", allow_pickle=False) as state:
        other.set_state(dict(state))
    np.testing.assert_array_equal(onward(pool), onward(other))
    np.testing.assert_array_equal(other.faults, [0, 4, 0])
    with pytest.raises(ValueError, match="one of 3 environments, this pool has 1"):
        HostPool([Counter()]).set_state(pool.get_state())


def test_close_closes_all():
    members = [Counter(), Counter()]
    HostPool(members).close()
    assert all(member.closed for member in members)
    pool = HostPool([dmc.make("cartpole_swingup", 0)])
    pool.close(), pool.close()
