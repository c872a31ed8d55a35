"""What others have recorded, read from tiny files made here: rows by hand, and every contradiction refused."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from mbrl import dataset, hdf5
from mbrl.__main__ import main
from mbrl.errors import UserError
from mbrl.types import ArraySpec

BOX = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-3, -3], "high": [3, 3]}
TORQUE = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-2.0], "high": [2.0]}
DISCRETE = {"type": "Discrete", "dtype": "int64", "start": 1, "n": 3}


def minari(folder, observation=BOX, action=TORQUE, episodes=(), **about):
    """A local Minari dataset: ``episodes`` are dicts of arrays, observations possibly nested."""
    (folder / "data").mkdir(parents=True)
    about = {
        "data_format": "hdf5",
        "total_episodes": len(episodes),
        "dataset_id": "made/here-v0",
        "observation_space": json.dumps(observation),
        "action_space": json.dumps(action),
        "env_spec": json.dumps({"id": "Pendulum-v1", "max_episode_steps": 200}),
    } | about
    (folder / "data" / "metadata.json").write_text(json.dumps(about))

    def write(group, name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                write(group.require_group(name), key, inner)
        else:
            group.create_dataset(name, data=value)

    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            for name, value in episode.items():
                write(file.require_group(f"episode_{i}"), name, value)
    return folder


def episode(steps=3, **arrays):
    """An episode that terminates at its last step."""
    end = np.arange(steps) == steps - 1
    return {
        "observations": np.arange(2.0 * (steps + 1)).reshape(-1, 2),
        "actions": np.linspace(-2, 2, steps)[:, None],
        "rewards": np.arange(1.0, steps + 1),
        "terminations": end,
        "truncations": np.zeros(steps, bool),
    } | arrays


def test_minari_rows_by_hand(tmp_path):
    """Four observations and three steps are four rows; actions in [-2, 2] are halved."""
    going = episode(2, terminations=np.zeros(2, bool))
    found = dataset.load(minari(tmp_path / "set", episodes=[episode(), going]))
    assert found.spec.name == "gym:Pendulum-v1" and found.spec.max_steps == 200
    assert found.spec.obs == {"state": ArraySpec((2,))} and found.spec.action == ArraySpec((1,))
    one, two = found.episodes
    np.testing.assert_array_equal(one.obs["state"], np.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(one.action[:, 0], [0, -1, 0, 1])
    np.testing.assert_array_equal(one.reward, [0, 1, 2, 3])
    np.testing.assert_array_equal(one.is_first, [True, False, False, False])
    np.testing.assert_array_equal(one.is_last, [False, False, False, True])
    assert one.is_terminal[-1] and not two.is_last.any() and not two.is_terminal.any()


def test_minari_spaces(tmp_path):
    """Nested observations get the keys of the gymnasium adapter; discrete actions are one-hot from start."""
    counts = {"type": "MultiDiscrete", "dtype": "int64", "nvec": [2, 4], "start": [0, 1]}
    space = {"type": "Dict", "subspaces": {"a": {"type": "Tuple", "subspaces": [BOX, DISCRETE]}, "b": counts}}
    seen = {
        "a": {"_index_0": np.ones((4, 2)), "_index_1": np.array([1, 2, 3, 1])},
        "b": np.array([[0, 1], [1, 4], [0, 2], [1, 1]]),
    }
    one = episode(observations=seen, actions=np.array([1, 3, 2]))
    found = dataset.load(minari(tmp_path / "set", space, DISCRETE, [one]))
    kinds = {"a/0": ArraySpec((2,)), "a/1": ArraySpec((), "int32", 3), "b": ArraySpec((2,), "int32", 4)}
    assert found.spec.obs == kinds and found.spec.action == ArraySpec((3,), classes=3)
    np.testing.assert_array_equal(found.episodes[0].obs["a/1"], [0, 1, 2, 0])
    np.testing.assert_array_equal(found.episodes[0].obs["b"][1], [1, 3])
    np.testing.assert_array_equal(found.episodes[0].action.argmax(-1)[1:], [0, 2, 1])


def d4rl(path, **changes):
    """Seven transitions: a terminal episode of three, one of two that timed out, two that go on."""
    arrays = {
        "observations": np.arange(14.0).reshape(7, 2),
        "actions": np.linspace(-1, 1, 7)[:, None],
        "rewards": np.arange(1.0, 8.0),
        "terminals": np.arange(7) == 2,
        "timeouts": np.arange(7) == 4,
    } | changes
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            if value is not None:
                file[name] = value
    return path


def test_d4rl_rows_by_hand(tmp_path):
    """With the next observations nothing is lost; without them a timeout loses its last transition, and a
    terminal step repeats its observation."""
    following = np.arange(14.0).reshape(7, 2) + 100
    full = dataset.load(d4rl(tmp_path / "full.hdf5", next_observations=following))
    assert [len(e.reward) for e in full.episodes] == [4, 3, 3] and full.spec.max_steps == 3
    np.testing.assert_array_equal(full.episodes[0].obs["state"][:, 0], [0, 2, 4, 104])
    np.testing.assert_array_equal(full.episodes[0].reward, [0, 1, 2, 3])
    np.testing.assert_array_equal([e.is_last[-1] for e in full.episodes], [True, True, False])
    np.testing.assert_array_equal([e.is_terminal[-1] for e in full.episodes], [True, False, False])
    bare = dataset.load(d4rl(tmp_path / "bare.hdf5"))
    assert [len(e.reward) for e in bare.episodes] == [4, 2, 2]
    np.testing.assert_array_equal(bare.episodes[0].obs["state"][:, 0], [0, 2, 4, 4])
    np.testing.assert_array_equal(bare.episodes[1].reward, [0, 4])
    np.testing.assert_allclose(bare.episodes[1].action[:, 0], [0, 0], atol=1e-6)


def test_statistics_of_any_dataset_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(["data", str(d4rl(tmp_path / "flat.hdf5"))])
    said = capsys.readouterr().out
    assert "D4RL-style file flat.hdf5: 8 rows in 3 episodes, 2 of them whole, 1 terminal" in said


IMAGE = {"type": "Box", "dtype": "uint8", "shape": [8, 8, 3], "low": 0, "high": 255}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: minari(p, episodes=[episode(rewards=np.ones(2))]), ["episode_0", "'state'", "(4, 2)", "expected (3, 2)"]),
        (lambda p: minari(p, episodes=[episode(actions=np.full((3, 1), 5.0))]), ["episode_0", "2.5", "[-1, 1]"]),
        (lambda p: minari(p, episodes=[episode(observations=np.full((4, 2), np.nan))]), ["'state'", "finite"]),
        (lambda p: minari(p, episodes=[episode(terminations=np.ones(3, bool))]), ["episode_0", "goes on"]),
        (lambda p: minari(p, episodes=[{"actions": np.ones(3)}]), ["observations", "only actions"]),
        (lambda p: minari(p, episodes=[episode(actions=np.ones((3, 2)))]), ["actions", "(3, 2)", "(3, 1)"]),
        (lambda p: minari(p, episodes=[episode(observations=np.ones((4, 3)))]), ["'state'", "(4, 3)", "(4, 2)"]),
        (lambda p: minari(p, IMAGE, episodes=[episode()]), ["'state'", "image"]),
        (lambda p: minari(p, {"type": "Text"}), ["Text"]),
        (lambda p: minari(p, total_episodes=1), ["episode_0"]),
        (lambda p: minari(p, data_format="arrow"), ["arrow", "hdf5"]),
        (lambda p: minari(p, observation_space=None), ["metadata.json", "0.5"]),
        (lambda p: minari(p, DISCRETE, DISCRETE, [episode(observations=np.ones(4), actions=np.full(3, 9))]), ["none of the 3"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), rewards=None), ["rewards", "only actions"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), rewards=np.ones(6)), ["one length", "[6, 7]"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), actions=np.ones(7)), ["actions", "(7,)", "[N, size]"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), actions=np.full((7, 1), 3.0)), ["[3, 3]", "rescale"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), terminals=np.full(7, b"code")), ["terminals", "numbers"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), rewards=h5py.SoftLink("/actions")), ["rewards", "link"]),
        (lambda p: d4rl(p.with_suffix(".hdf5"), rewards=h5py.ExternalLink("/etc/x", "y")), ["rewards", "link"]),
        (lambda p: p.with_suffix(".hdf5"), ["cannot be read", "No such file"]),
        (lambda p: p, ["no dataset", "dataset.json", "Minari", "hdf5"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence(tmp_path, make, words):
    with pytest.raises(UserError) as error:
        dataset.load(make(tmp_path / "set"))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_python_objects_are_refused(tmp_path):
    """A variable-length entry is stored as objects: its type is refused before anything is read."""
    path = d4rl(tmp_path / "flat.hdf5", rewards=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", (7,), h5py.string_dtype())
    with pytest.raises(UserError, match="rewards' must be an array of numbers"):
        hdf5.read_d4rl(path)
