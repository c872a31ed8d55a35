"""The mesh ('seed', 'data'): the same learning on 1, 2 and 4 devices and in 2 processes, and checkpoints that
go from any of them to any other. Devices are virtual ones of a CPU; tests/mesh.py is what runs on them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mbrl import checkpoints
from mbrl.drivers import join_states, state_part
from mbrl.errors import UserError
from mbrl.logger import read_metrics
from mbrl.seeds import Seeds
from tests.helpers import as_numpy, assert_close, on_one_device, tiny_run
from tests.mesh import SOURCE, UPDATES, learn, make_run, start_state

ROOT = Path(__file__).parents[2]


def launch(folder: Path, cases: str, devices: int = 1, processes: int = 1) -> list[str]:
    """``python -m tests.mesh`` on as many devices in each of the processes; what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    base = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    meet = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "tests.mesh", str(folder), *cases.split()]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=base | (meet | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    told = [one.communicate(timeout=600)[0] for one in running]
    assert [one.returncode for one in running] == [0] * processes
    return told


@pytest.fixture(scope="module")
def start():
    return start_state(make_run(on_one_device(0, 1)))


@pytest.fixture(scope="module")
def alone(start):
    """What two members learn on one device, and their metrics."""
    seeds = on_one_device(0, 1, loop=True)
    state, metrics = learn(make_run(seeds), start)
    assert state.train.updates.tolist() == [UPDATES] * 2 and state.health.rejected.tolist() == [0, 0]
    return as_numpy((state.train, metrics))


def test_a_split_batch_equals_a_whole_one(start, alone):
    """Two devices, half of each batch on either, two members in turn."""
    seeds = Seeds.make(0, 2, data=2)
    state, metrics = learn(make_run(seeds), start)
    assert_close((state.train, metrics), alone, 1e-4)
    before = jax.tree.leaves(start.train.params)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(alone[0].params), before)) > 1e-3
    assert all(x.sharding.is_equivalent_to(seeds.sharding, x.ndim) for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_split_batch_of_a_dreamer_equals_a_whole_one():
    """The world model, imagination and every loss: half of each batch on either of two devices."""
    whole, split = on_one_device(0), Seeds.make(0, 1, data=2)
    runs = [tiny_run(SOURCE, seeds, batch_size=4, pretrain=UPDATES) for seeds in (whole, split)]
    start = start_state(runs[0])
    (a, metrics_a), (b, metrics_b) = (learn(run, start) for run in runs)
    assert_close((b.train, metrics_b), as_numpy((a.train, metrics_a)), 1e-4)
    assert a.train.updates.tolist() == [UPDATES]


@pytest.fixture(scope="module")
def elsewhere(start, tmp_path_factory):
    """The folder of tests/mesh.py after runs in two processes with two devices each, then on four devices."""
    folder = tmp_path_factory.mktemp("mesh")
    np.savez(folder / "start.npz", *jax.tree.leaves(start))
    launch(folder, "2 2 2 4", devices=2, processes=2)
    launch(folder, "4 1 2 2", devices=4)
    return folder


@pytest.mark.parametrize("case", ["processes-2-2", "processes-2-4", "devices-4-1", "devices-2-2"])
def test_other_meshes_learn_the_same(elsewhere, alone, case):
    """Seeds over processes with a split batch in each; a batch split over processes; four members on four
    devices; two members with two devices each."""
    with np.load(elsewhere / f"{case}.npz") as file:
        found = [file[name] for name in file.files]
    members, data = (int(x) for x in case.split("-")[1:])
    wanted = jax.tree.map(lambda x: np.tile(x, (members // 2, *[1] * (x.ndim - 1))), alone)
    if members == 4:  # two more keys: they learn from the same data by other samples
        found, wanted = ([x[:2] for x in leaves] for leaves in (found, jax.tree.leaves(wanted)))
    assert_close(found, jax.tree.leaves(wanted), 1e-5 if data == 1 else 1e-4)


def test_a_checkpoint_of_two_processes_restores_anywhere(elsewhere, alone):
    """On one device and on four: the same numbers, whole; and only the first process wrote what there is one
    of."""
    like = jax.eval_shape(lambda: make_run(on_one_device(0, 1)).shapes)
    restored = checkpoints.restore(elsewhere / "saved", like)
    assert restored.step == UPDATES and checkpoints.steps(elsewhere / "saved") == [UPDATES]
    assert_close(restored.state.train, alone[0], 1e-4)
    with np.load(elsewhere / "restored.npz") as file:
        on_four = [file[name] for name in file.files]
    for a, b in zip(jax.tree.leaves(restored.state.train), on_four, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tmp_path):
    """A whole run with MuJoCo environments, those of one seed in each process: the first process alone speaks
    and writes, and what it writes is what one process alone does. One process goes on from an earlier
    checkpoint of the two, to the same end."""
    told = launch(tmp_path / "two", "train 256", processes=2)
    assert "evaluation at" in told[0] and "seed" not in told[1]
    launch(tmp_path / "one", "train 256")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one["updates"] == two["updates"] and one["seeds"] == two["seeds"]
    np.testing.assert_allclose(one["eval_return"]["episodes"], two["eval_return"]["episodes"], rtol=1e-3)

    def losses(name):
        rows = read_metrics(tmp_path / name)
        return np.array([[row["step"], row["seed"], row.get("loss") or 0] for row in rows])

    first = losses("two")
    np.testing.assert_allclose(losses("one"), first, rtol=1e-4)
    found = tmp_path / "two" / "checkpoints"
    shutil.rmtree(found / f"{max(checkpoints.steps(found)):012d}")
    launch(tmp_path / "two", "train 256")
    np.testing.assert_allclose(losses("two"), first, rtol=1e-4)


def test_environments_of_processes_are_joined_and_parted():
    """The states of two collectors, with two members of two environments each, and the parts of their sum."""
    parts = [
        {"carry/0": np.arange(4) + 10 * p, "pool/faults": np.arange(4)}
        | {f"pool/{i}/x": np.array(10 * p + i) for i in range(4)}
        for p in range(2)
    ]
    joined = join_states(parts, size=4)
    assert joined["carry/0"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13] and joined["pool/5/x"] == 11
    for p, part in enumerate(parts):
        again = state_part(joined, range(2 * p, 2 * p + 2), total=4, size=4)
        assert again.keys() == part.keys()
        assert all((again[name] == part[name]).all() for name in part)


def test_impossible_meshes_are_refused():
    with pytest.raises(UserError, match="data_parallel is 3, but there are 2 devices"):
        Seeds.make(0, 1, data=3)
    with pytest.raises(UserError, match="data_parallel is 0"):
        Seeds.make(0, 1, data=0)


def test_as_many_devices_as_divide_the_seeds():
    assert dict(Seeds.make(0, 3).mesh.shape) == {"seed": 1, "data": 1}
    assert dict(Seeds.make(0, 4).mesh.shape) == {"seed": 2, "data": 1}
    assert dict(Seeds.make(0, 4, data=2).mesh.shape) == {"seed": 1, "data": 2}
