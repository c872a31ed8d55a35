"""Checkpoints: bit-equal round trips, every fault found, nothing cast, older steps never lost."""

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mbrl import checkpoints
from mbrl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class State(NamedTuple):
    params: dict
    opt: object
    keys: jax.Array
    replay: dict
    clock: jax.Array
    latent: tuple = ()


def make_state(seed=0):
    key = jax.random.key(seed)
    params = {
        "dense/kernel": jax.random.normal(key, (4, 3)),
        "bias": jnp.zeros(3),
        "half": jnp.bfloat16([1, 2.5]),
    }
    return State(
        params=params,
        opt=optax.adam(1e-3).init(params),
        keys=jax.random.split(key, 3),
        replay={
            "image": jax.random.randint(key, (5, 2, 2), 0, 255).astype(jnp.uint8),
            "is_first": jnp.array([True, False]),
            "legacy": jax.random.PRNGKey(seed),
            "rbg": jax.random.key(seed, impl="rbg"),
            "empty": jnp.zeros((2, 0), jnp.float32),
            "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        },
        clock=jnp.int32(seed),
    )


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


@pytest.fixture(params=["npz", "shards"])
def either_format(request, monkeypatch):
    """As one process writes arrays, and as several do, and did releases before schema 4."""
    if request.param == "shards":
        monkeypatch.setattr(checkpoints, "_write_arrays", checkpoints._write_shards)


def test_round_trip_of_every_dtype(tmp_path, either_format):
    state = make_state(3)
    extra = {
        "env/0/qpos": np.arange(3.0),
        "file": np.array(7, np.int64),
        "rng": np.array("state"),
        "a": np.zeros(0),
    }
    assert checkpoints.save(tmp_path, 120, state, extra, {"updates": 7, "shape": (1, 2)})
    restored = checkpoints.restore(tmp_path, make_state(4))
    assert_same(restored.state, state)
    assert isinstance(restored.state, State) and type(restored.state.opt) is type(state.opt)
    assert restored.step == 120 and restored.meta == {"updates": 7, "shape": [1, 2]}
    assert restored.extra.keys() == extra.keys()
    for name, array in extra.items():
        assert restored.extra[name].dtype == array.dtype
        np.testing.assert_array_equal(restored.extra[name], array)
    # The keys go on as they would have.
    a, b = jax.random.normal(restored.state.keys[1], (3,)), jax.random.normal(state.keys[1], (3,))
    np.testing.assert_array_equal(a, b)


def test_an_abstract_state_is_enough(tmp_path):
    checkpoints.save(tmp_path, 1, make_state(3))
    assert_same(checkpoints.restore(tmp_path, jax.eval_shape(make_state)).state, make_state(3))


def test_buffers_may_be_donated_after_save_and_after_restore(tmp_path, either_format):
    copies = jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)
    state = jax.tree.map(jnp.copy, make_state(3))
    checkpoints.save(tmp_path, 1, state)
    copies(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    restored = checkpoints.restore(tmp_path, make_state(0)).state
    expected = make_state(3)
    assert_same(restored, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "some donated buffers were not usable"
        moved = copies(restored)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored))
    assert_same(moved, expected)


def test_leaves_are_placed_as_in_like(tmp_path, either_format):
    assert len(jax.devices()) == 2, "tests/conftest.py gives two virtual devices"
    mesh = jax.make_mesh((2,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
    over_seeds = NamedSharding(mesh, PartitionSpec("seed"))
    second = SingleDeviceSharding(jax.devices()[1])

    def placed(seed):
        return {
            "params": jax.device_put(jnp.arange(8.0).reshape(4, 2) + seed, over_seeds),
            "keys": jax.device_put(jax.random.split(jax.random.key(seed), 4), over_seeds),
            "second": jax.device_put(jnp.float32(seed), second),
            "free": jnp.float32(seed),
        }

    checkpoints.save(tmp_path, 1, placed(3))
    like = placed(0)
    restored = checkpoints.restore(tmp_path, like).state
    assert_same(restored, placed(3))
    for name in like:
        assert restored[name].sharding == like[name].sharding, name
        assert restored[name].committed == like[name].committed, name
    # From a mesh to one device: the sharding is that of like, not that of the run which saved.
    alone = jax.tree.map(lambda x: jax.device_put(x, second), placed(0))
    assert checkpoints.restore(tmp_path, alone).state["keys"].sharding == second


def corrupt(path, fault):
    data = path.read_bytes()
    if fault == "delete":
        path.unlink()
    elif fault == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("fault", ["truncate", "flip", "delete"])
def test_every_damaged_file_is_found_and_the_previous_step_used(tmp_path, fault, either_format):
    for step in (10, 20):
        checkpoints.save(tmp_path, step, make_state(step), {"env": np.arange(step)}, {"at": step})
    pristine, newest = tmp_path / "pristine", tmp_path / "000000000020"
    shutil.copytree(newest, pristine)
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    assert len(files) == 3 or len(files) >= 8  # state.npz or orbax's own; extra.npz, manifest.json
    # A file without content (orbax's commit_success.txt) has no byte to flip and none to cut.
    faults = [name for name in files if fault == "delete" or (newest / name).stat().st_size > 0]
    for name in faults:
        corrupt(newest / name, fault)
        with pytest.warns(RuntimeWarning) as caught:
            restored = checkpoints.restore(tmp_path, make_state(0))
        assert len(caught) == 1
        message = str(caught[0].message)
        assert str(newest / name) in message and "step 20 is skipped" in message
        assert restored.step == 10 and restored.meta == {"at": 10}
        assert_same(restored.state, make_state(10))
        shutil.rmtree(newest)
        shutil.copytree(pristine, newest)
    assert checkpoints.restore(tmp_path, make_state(0)).step == 20


def test_nothing_intact_is_refused(tmp_path):
    with pytest.raises(UserError, match="it holds no checkpoint"):
        checkpoints.restore(tmp_path / "nothing", make_state())
    checkpoints.save(tmp_path, 10, make_state())
    corrupt(tmp_path / "000000000010" / "extra.npz", "flip")
    with pytest.warns(RuntimeWarning), pytest.raises(UserError, match="none of its 1 checkpoints is intact"):
        checkpoints.restore(tmp_path, make_state())


def test_a_torn_save_is_ignored_and_cleaned_up(tmp_path):
    checkpoints.save(tmp_path, 10, make_state(10))
    shutil.copytree(tmp_path / "000000000010", tmp_path / ".saving")
    (tmp_path / ".saving" / "manifest.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.restore(tmp_path, make_state()).step == 10
        assert checkpoints.save(tmp_path, 20, make_state(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000010", "000000000020"]


def change(state, **changes):
    return state._replace(params={**state.params, **changes})


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        (lambda s: change(s, bias=jnp.zeros(3, jnp.float16)),
         r"dtype of state\.params\['bias'\] is float32 in the checkpoint, expected float16"),
        (lambda s: change(s, bias=jnp.zeros(4)),
         r"shape of state\.params\['bias'\] is \[3\] in the checkpoint, expected \[4\]"),
        (lambda s: change(s, more=jnp.zeros(1)), r"state\.params\['more'\] is expected and was not saved"),
        (lambda s: s._replace(params={"bias": s.params["bias"]}),
         r"state\.params\['dense/kernel'\] was saved and"),
        (lambda s: s._replace(keys=jax.random.key_data(s.keys)), r"shape of state\.keys is \[3\]"),
        (lambda s: s._replace(keys=jax.random.split(jax.random.key(0, impl="rbg"), 3)),
         r"dtype of state\.keys is key<fry> in the checkpoint, expected key<rbg>"),
        (lambda s: s._replace(clock=s.clock.astype(jnp.uint32)), r"dtype of state\.clock is int32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_never_cast(tmp_path, like, sentence):
    checkpoints.save(tmp_path, 10, make_state())
    with pytest.raises(UserError, match=sentence) as error:
        checkpoints.restore(tmp_path, like(make_state()))
    assert "\n" not in str(error.value)


class Trap:
    """An object that leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_of_a_stranger_executes_nothing(tmp_path, monkeypatch):
    """Even one whose checksums are right: pickled objects in it are refused, and no pickle is read anywhere."""
    checkpoints.save(tmp_path, 10, make_state(3), {"env": np.arange(3)})
    directory, sprung = tmp_path / "000000000010", tmp_path / "sprung"
    with monkeypatch.context() as patched:
        for name in ("load", "loads", "Unpickler"):
            patched.setattr(pickle, name, lambda *args, **kwargs: pytest.fail("a pickle was read"))
        assert_same(checkpoints.restore(tmp_path, make_state(0)).state, make_state(3))
    for name, array in (("extra.npz", "_env"), ("state.npz", "00000")):
        kept = (directory / name).read_bytes()
        with np.load(directory / name) as file:
            others = {key: file[key] for key in file.files if key != array}
        np.savez(directory / name, **others, **{array: np.array([Trap(sprung)], object)})
        vouch_for(directory, name)
        with pytest.raises(UserError, match=f"{name} holds Python objects, which are never loaded"):
            checkpoints.restore(tmp_path, make_state(0))
        assert not sprung.exists()
        np.load(directory / name, allow_pickle=True)[array]  # the trap works
        assert sprung.exists()
        sprung.unlink()
        (directory / name).write_bytes(kept)
        vouch_for(directory, name)
    assert_same(checkpoints.restore(tmp_path, make_state(0)).state, make_state(3))


def vouch_for(directory, name):
    """The manifest says that a file is as it was written."""
    body = json.loads((directory / "manifest.json").read_text())
    body.pop("sha256")
    body["files"][name] = checkpoints._sha256(directory / name)
    (directory / "manifest.json").write_bytes(checkpoints._seal(body))


@pytest.mark.parametrize("package", ["mbrl", "world_models", "experiments"])
def test_no_module_reads_pickles(package):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "cloudpickle", "joblib", "allow_pickle=True", "torch.load"):
            assert word not in text, f"{path}: {word}"


def test_a_newer_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SCHEMA", checkpoints.SCHEMA + 1)
    checkpoints.save(tmp_path, 10, make_state())
    monkeypatch.undo()
    with pytest.raises(
        UserError,
        match=rf"has schema {checkpoints.SCHEMA + 1}, this release reads schema {checkpoints.SCHEMA}:",
    ):
        checkpoints.restore(tmp_path, make_state())


def test_the_manifest_lists_leaves_and_files(tmp_path):
    checkpoints.save(tmp_path, 10, make_state())
    directory = tmp_path / "000000000010"
    body = json.loads((directory / "manifest.json").read_text())
    table = {leaf["path"]: (leaf["shape"], leaf["dtype"]) for leaf in body["leaves"]}
    assert table[".params['half']"] == ([2], "bfloat16")
    assert table[".keys"] == ([3], "key<fry>")
    on_disk = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert set(body["files"]) == on_disk - {"manifest.json"}


def test_the_newest_are_kept(tmp_path):
    small = {"x": jnp.zeros(2)}
    for step in (10, 20, 30, 40):
        checkpoints.save(tmp_path, step, small)
    assert checkpoints.steps(tmp_path) == [30, 40]
    checkpoints.save(tmp_path, 50, small, keep=3)
    assert checkpoints.steps(tmp_path) == [30, 40, 50]
    checkpoints.save(tmp_path, 50, {"x": jnp.ones(2)}, keep=1)  # the same step again replaces it
    assert checkpoints.steps(tmp_path) == [50]
    np.testing.assert_array_equal(checkpoints.restore(tmp_path, small).state["x"], [1, 1])
    with pytest.raises(ValueError, match="keep must be at least 1, found 0"):
        checkpoints.save(tmp_path, 60, small, keep=0)


def test_a_damaged_later_step_does_not_count_as_kept(tmp_path):
    small = {"x": jnp.zeros(2)}
    for step in (10, 20, 30, 50):
        checkpoints.save(tmp_path, step, small, keep=4)
    corrupt(tmp_path / "000000000050" / "extra.npz", "truncate")
    with pytest.warns(RuntimeWarning):
        assert checkpoints.restore(tmp_path, small).step == 30
    checkpoints.save(tmp_path, 40, small)
    assert checkpoints.steps(tmp_path) == [30, 40, 50]
    checkpoints.save(tmp_path, 50, small)  # reached again: the damaged one is replaced
    assert checkpoints.steps(tmp_path) == [40, 50]
    assert checkpoints.restore(tmp_path, small).step == 50


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (({"x": 3.0},), r"state\['x'\] must be an array, found float"),
        (({"x": jnp.zeros(1)}, {"rng": np.array([object()])}), r"extra\['rng'\] must be"),
    ],
)
def test_what_cannot_be_stored_is_an_error_at_once(tmp_path, arguments, sentence):
    with pytest.raises(TypeError, match=sentence):
        checkpoints.save(tmp_path, 1, *arguments)
    assert checkpoints.steps(tmp_path) == []


FULL_DISK = """
import resource, sys, warnings
import jax.numpy as jnp
from mbrl import checkpoints

folder, state = sys.argv[1], {"replay": jnp.arange(300_000, dtype=jnp.int32) * 1103515245}
assert checkpoints.save(folder, 10, state)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert checkpoints.save(folder, 20, state) is False
print([str(w.message) for w in caught])
assert len(caught) == 1 and "step 20 was not written" in str(caught[0].message)
assert str(caught[0].message).endswith("untouched: File too large")
assert checkpoints.restore(folder, state).step == 10
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert checkpoints.save(folder, 30, state)
assert checkpoints.steps(folder) == [10, 30]
assert checkpoints.restore(folder, state).step == 30
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs RLIMIT_FSIZE")
def test_no_space_left(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr  # orbax and tensorstore log theirs unless they are kept quiet
    assert not (tmp_path / ".saving").exists()


SAVE_FOREVER = """
import itertools, sys
import jax.numpy as jnp
from mbrl import checkpoints

for step in itertools.count(1):
    checkpoints.save(sys.argv[1], step, {"x": jnp.full((300, 300), step)}, {"env": jnp.full(5, step)})
    print(step, flush=True)
"""


def test_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    like = {"x": jnp.zeros((300, 300), jnp.int32)}
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(folder)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "1\n"
        try:
            process.wait(timeout=float(rng.uniform(0.02, 0.4)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        reported = int(rest[-1]) if rest else 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill is no damage
            restored = checkpoints.restore(folder, like)
        assert restored.step in (reported, reported + 1)
        assert (np.asarray(restored.state["x"]) == restored.step).all()
        assert (restored.extra["env"] == restored.step).all()
