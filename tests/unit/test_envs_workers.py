"""WorkerPool: the results of HostPool to the last bit, and what happens to a worker that dies, hangs or errs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mbrl.collect import HostCollector
from mbrl.drivers import make_source
from mbrl.envs import workers
from mbrl.envs.pool import HostPool
from mbrl.envs.workers import WorkerPool
from mbrl.errors import UserError
from mbrl.types import ArraySpec, EnvSpec, TimeStep
from tests.helpers import rng_words, set_rng

SPEC = EnvSpec(
    "noise", {"x": ArraySpec((2,)), "image": ArraySpec((4, 4, 3), "uint8")}, ArraySpec((1,)), max_steps=9
)
TROUBLES = {"kill": 1.0, "hang": 2.0, "raise": 3.0, "nan": 4.0, "shape": 5.0}
"""An action of this value makes the environment do it."""


class Noise:
    """Shows a random picture; ``x`` is its steps so far and its number in the pool."""

    def __init__(self, seed: int, index: int):
        self.spec, self.rng, self.count, self.index = SPEC, np.random.default_rng(seed), 0, index

    def show(self, reward) -> TimeStep:
        x = np.array([self.count, self.index], np.float32)
        image = self.rng.integers(0, 256, (4, 4, 3), np.uint8)
        return TimeStep({"x": x, "image": image}, np.float32(reward), self.count == 9, False)

    def reset(self) -> TimeStep:
        self.count = 0
        return self.show(0)

    def step(self, action) -> TimeStep:
        self.count += 1
        timestep = self.show(action[0])
        match next((name for name, value in TROUBLES.items() if value == action[0]), None):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(1000)
            case "raise":
                raise OSError("broken")
            case "nan":
                return timestep._replace(reward=np.float32(np.nan))
            case "shape":
                return timestep._replace(obs=timestep.obs | {"x": np.zeros(3, np.float32)})
        return timestep

    def get_state(self):
        return {"count": np.array(self.count), "rng": rng_words(self.rng)}

    def set_state(self, state):
        self.count = int(state["count"])
        set_rng(self.rng, state["rng"])

    def render(self, height, width):
        raise RuntimeError

    def close(self):
        pass


@pytest.fixture(scope="module")
def shared():
    """Four environments in two workers, for all tests that leave them alive."""
    pool = WorkerPool(SPEC, Noise, range(4), 2, timeout=60.0)
    yield pool
    pool.close()


def act(pool, troubles=None, reset=()):
    """One step with rewards of 0.5, in which some environments get into trouble."""
    actions = np.full((pool.size, 1), 0.5, np.float32)
    for i, name in (troubles or {}).items():
        actions[i] = TROUBLES[name]
    mask = np.zeros(pool.size, bool)
    mask[list(reset)] = True
    return pool.step(actions, mask)


def onward(pool, steps=12):
    """What an environment shows over some steps, resetting it where an episode ends."""
    rng, last, seen = np.random.default_rng(0), np.ones(pool.size, bool), []
    for _ in range(steps):
        timestep = pool.step(
            rng.uniform(-1, 1, (pool.size, *pool.spec.action.shape)).astype(np.float32), last
        )
        last = timestep.is_last
        seen.append(timestep)
    return seen


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.obs.keys() == y.obs.keys()
        for name in x.obs:
            assert x.obs[name].dtype == y.obs[name].dtype
            np.testing.assert_array_equal(x.obs[name], y.obs[name])
        for name in ("reward", "is_last", "is_terminal"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


def test_the_same_bits_as_in_one_process_and_states_that_go_both_ways(shared):
    alone = HostPool([Noise(i, i) for i in range(4)])
    shared.set_state(alone.get_state())
    assert_equal(onward(shared), onward(alone))
    state = shared.get_state()
    assert state.keys() == alone.get_state().keys()
    for name, value in alone.get_state().items():
        np.testing.assert_array_equal(state[name], value)
    expected = onward(alone)
    alone.set_state(state)
    assert_equal(onward(alone), expected)
    shared.set_state(state)
    first = onward(shared, 1)[0]
    onward(shared, 3)
    assert_equal([first], expected[:1])  # earlier arrays stay as they were


def test_the_collector_leaves_no_trace_of_the_step_under_way(shared):
    """Rows, episodes and states are equal for both pools, and a state that is taken while a step is under way
    continues exactly."""

    def policy(actor, obs, is_first, i):
        action = np.tanh(obs["x"][..., 1:] + i - is_first[..., None]).astype(np.float32)
        return action, actor + 1, i

    def assert_tree_equal(a, b):
        jax.tree.map(np.testing.assert_array_equal, a, b)

    alone = HostCollector(HostPool([Noise(i, i) for i in range(4)]), 2, 2)
    shared.set_state(HostPool([Noise(i, i) for i in range(4)]).get_state())
    other = HostCollector(shared, 2, 2)
    for _ in range(3):
        assert_tree_equal(other.collect(policy, 0, 5), alone.collect(policy, 0, 5))
    state = alone.get_state()
    assert_tree_equal(other.get_state(), state)
    expected = alone.collect(policy, 0, 5)
    other.collect(policy, 0, 2)
    other.set_state(state)
    assert_tree_equal(other.collect(policy, 0, 5), expected)
    assert_tree_equal(other.get_state(), alone.get_state())


def test_dm_control_in_a_worker():
    make = make_source("cartpole_swingup", 2).make_host
    alone = HostPool([make(seed, i) for i, seed in enumerate((3, 4))])
    pool = WorkerPool(alone.spec, make, (3, 4), 8, timeout=60.0)
    assert_equal(onward(pool, 5), onward(alone, 5))
    pool.close(), pool.close()


@pytest.mark.parametrize("trouble", ["raise", "nan", "shape"])
def test_what_errs_in_a_worker_is_a_fault_there(shared, trouble):
    shared.set_state(HostPool([Noise(i, i) for i in range(4)]).get_state())
    shared.reset()
    what = "raised OSError" if trouble == "raise" else "returned numbers that are not finite or a wrong shape"
    with pytest.warns(RuntimeWarning, match=rf"environment 2 \(worker 1\) {what}") as caught:
        bad = act(shared, {2: trouble})
    assert len(caught) == 1
    np.testing.assert_array_equal(bad.is_last, [False, False, True, False])
    np.testing.assert_array_equal(bad.reward, [0.5, 0.5, 0, 0.5])
    np.testing.assert_array_equal(bad.obs["x"][:, 0], [1, 1, 0, 1])
    np.testing.assert_array_equal(shared.faults, [0, 0, 1, 0])
    np.testing.assert_array_equal(act(shared, reset=[2]).obs["x"][:, 0], [2, 2, 0, 2])


@pytest.mark.parametrize(
    ("trouble", "why"), [("kill", "died with exit code -9"), ("hang", "did not answer for 0.5 s")]
)
def test_a_worker_that_dies_or_hangs_is_started_again(trouble, why):
    """Its environments' episodes end; those of the other worker go on as in one process. The new ones keep
    their numbers, by which they know their task, and draw other random numbers."""
    alone, pool = (
        HostPool([Noise(i, i) for i in range(4)]),
        WorkerPool(SPEC, Noise, range(4), 2, timeout=0.5),
    )
    assert_equal([pool.reset()], [alone.reset()])
    act(alone), act(pool)
    expected = act(alone)
    with pytest.warns(
        RuntimeWarning, match=f"worker 1 {why} in environment 3: .* environments 2 to 3"
    ) as caught:
        bad = act(pool, {3: trouble})
    assert len(caught) == 1
    np.testing.assert_array_equal(bad.is_last, [False, False, True, True])
    assert not bad.is_terminal.any() and not bad.reward[2:].any()
    assert not bad.obs["x"][2:].any() and not bad.obs["image"][2:].any()
    np.testing.assert_array_equal(bad.obs["image"][:2], expected.obs["image"][:2])
    np.testing.assert_array_equal(pool.faults, [0, 0, 1, 1])
    after, expected = act(pool, reset=[2, 3]), act(alone, reset=[2, 3])
    np.testing.assert_array_equal(after.obs["x"], [[3, 0], [3, 1], [0, 2], [0, 3]])
    np.testing.assert_array_equal(after.obs["image"][:2], expected.obs["image"][:2])
    assert (after.obs["image"][2:] != HostPool([Noise(2, 2), Noise(3, 3)]).reset().obs["image"]).any(), (
        "other episodes"
    )
    np.testing.assert_array_equal(act(pool).obs["x"][:, 0], [4, 4, 1, 1])
    pool.close()


@pytest.mark.slow
def test_ten_of_ten_workers_come_back(monkeypatch, capsys):
    """Killed and hanging in turn, with a second to answer: within 10 s from the step that goes wrong to the first
    observation of the new process. Of computation, since other processes may share the cores."""
    monkeypatch.setattr(workers, "RESTARTS", 11)  # ten end a run
    pool, seconds = WorkerPool(SPEC, Noise, range(2), 2, timeout=1.0), []
    pool.reset()
    usage = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = usage()
    for i in range(10):
        began = time.monotonic()
        with pytest.warns(RuntimeWarning, match=f"worker {i % 2} "):
            bad = act(pool, {i % 2: ("kill", "hang")[i // 2 % 2]})
        assert bad.is_last[i % 2] and act(pool, reset=[i % 2]).obs["x"][i % 2, 0] == 0
        seconds.append(time.monotonic() - began)
    assert len(pool._restarts) == 10 and pool.faults.tolist() == [5, 5]
    pool.close()
    computing = (usage() - before) / 10
    with capsys.disabled():
        print(f" {computing:.1f} s of computation each, {min(seconds):.1f} to {max(seconds):.1f} s", end=" ")
    assert computing < 10


def test_a_worker_that_dies_between_steps_is_found(monkeypatch):
    """While a state is taken, too; and the run ends when it happens again and again."""
    monkeypatch.setattr(workers, "RESTARTS", 2)
    pool = WorkerPool(SPEC, Noise, range(2), 2, timeout=60.0)
    monkeypatch.setattr(pool, "_restarts", type(pool._restarts)(maxlen=2))
    pool.reset()
    os.kill(pool._workers[1].process.pid, signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="worker 1 died .* between two steps: .* environment 1 end here"):
        state = pool.get_state()
    assert state["faults"].tolist() == [0, 1] and {"0/count", "1/count"} <= state.keys()
    lost = act(pool)  # nobody has told the new environment to begin
    np.testing.assert_array_equal(lost.is_last, [False, True])
    np.testing.assert_array_equal(lost.obs["x"][:, 0], [1, 0])
    act(pool, reset=[1])
    with pytest.raises(UserError, match=r"workers of noise failed 2 times within 10 minutes; .* worker 0"):
        act(pool, {0: "kill"})
    pool.close()


def test_mistakes_of_the_program_are_errors():
    other = EnvSpec("other", SPEC.obs, ArraySpec((2,)), max_steps=9)
    pool = WorkerPool(other, Noise, range(1), 1, timeout=60.0)
    with pytest.raises(ValueError, match=r"Environment 0 \(worker 0\) has the spec"):
        pool.reset()
    with pytest.raises(ValueError, match="must have shape"):
        pool.step(np.zeros((2, 2), np.float32), np.ones(1, bool))
    pool.close()


RUN = """
import sys, time
from mbrl.envs.workers import WorkerPool
from tests.unit.test_envs_workers import SPEC, TROUBLES, Noise, act
if __name__ == "__main__":
    pool = WorkerPool(SPEC, Noise, range(2), 2, timeout=60.0)
    pool.reset()
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    if sys.argv[1] == "hang":
        act(pool, {1: "hang"})
    if sys.argv[1] == "wait":
        time.sleep(1000)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("mode", "number"),
    [("end", None), ("wait", signal.SIGTERM), ("wait", signal.SIGKILL), ("hang", signal.SIGKILL)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and /dev/shm")
def test_nothing_is_left_behind(tmp_path, mode, number):
    """No process and no shared memory, however the run ends; with a worker that hangs, too."""
    script, before = tmp_path / "run.py", set(os.listdir("/dev/shm"))
    script.write_text(textwrap.dedent(RUN))
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), mode],
        cwd=root, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if number is not None:
        assert all(map(alive, pids))
        process.send_signal(number)
    process.wait(timeout=60)
    process.stdout.close()
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert set(os.listdir("/dev/shm")) <= before
