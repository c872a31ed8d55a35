"""Layout and encoding of open-loop films, and what can be filmed; that runs leave them is tested in tests/reliability/test_command.py."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbrl import experiment, finished, open_loop
from mbrl.errors import UserError
from mbrl.seeds import Seeds
from mbrl.types import Trajectory
from tests.helpers import stored_run

T, N, H, W = 50, 2, 3, 4


def film() -> np.ndarray:
    """[T, 3, N, h, w, 3] whose pixels say where they come from: moment, row of the film, point."""
    shape = (T, 3, N, H, W)
    moment, row, point, *_ = np.indices(shape)
    return np.stack([moment, 10 * row, 20 * point], -1).astype(np.uint8)


def test_grid():
    """Truth, model and error below each other, points side by side, moments as frames."""
    frames = open_loop.grid(film())
    assert frames.shape == (T, 3 * H, N * W, 3)
    for t, row, point in ((0, 0, 0), (7, 1, 1), (49, 2, 0)):
        part = frames[t, row * H : (row + 1) * H, point * W : (point + 1) * W]
        assert (part == [t, 10 * row, 20 * point]).all()


def test_strip():
    """The first point only, ten moments from the first to the last."""
    picture = open_loop.strip(film())
    assert picture.shape == (3 * H, 10 * W, 3)
    assert picture[0, ::W, 0].tolist() == [0, 5, 10, 16, 21, 27, 32, 38, 43, 49]
    assert (picture[2 * H :, :, 1] == 20).all() and (picture[..., 2] == 0).all()


def test_encoding():
    """A GIF of all frames and a PNG with the very pixels, small pictures drawn larger."""
    frames = open_loop.grid(film())
    with Image.open(io.BytesIO(open_loop.encode(frames, "GIF"))) as gif:
        assert gif.n_frames == T and gif.size[1] >= 180
    with Image.open(io.BytesIO(open_loop.encode(frames[7:8], "PNG"))) as png:
        scale = png.size[1] // (3 * H)
        np.testing.assert_array_equal(np.asarray(png)[::scale, ::scale], frames[7])


@pytest.mark.parametrize(
    ("task", "words"), [("pendulum", "none of dm_control's"), ("humanoid_run", "cannot be recovered")]
)
def test_what_cannot_be_drawn(task, words):
    with pytest.raises(UserError, match=f"{words}.*{task}" if "cannot" in words else f"{task}.*{words}"):
        open_loop._stage(task)


def test_newest_of_stacked_frames():
    stacked = np.arange(6)[None]
    assert open_loop._newest(stacked).tolist() == [[3, 4, 5]]
    assert open_loop._newest(np.array([[7]])).tolist() == [[7, 7, 7]]


class Stage:
    """Draws the first entry of an observation; remembers that it was closed."""

    closed = False

    def pose(self, obs):
        self.brightness = np.uint8(100 + 50 * np.clip(obs["orientation"][0], -1, 1))

    def render(self, height, width):
        return np.full((2, 2, 3), self.brightness)

    def close(self):
        self.closed = True


def untrained(script_name: str, planner: str, run_dir: Path) -> finished.Finished:
    """A run of an experiment on pendulum, as `mbrl.load` rebuilds it, that has learned nothing."""
    stored = stored_run(script_name, planner)
    parts, seeds = finished.rebuild(stored), Seeds.make(3, 1)
    return finished.Finished(run_dir, stored, 0, parts, seeds, seeds.program(parts.agent.init)(seeds.keys()))


def played(length: int) -> Trajectory:
    """An episode [1, length + 1, 1] of pendulum, such as `Finished.play` returns."""
    angle = np.linspace(0, 7, length + 1)[None, :, None]
    at = np.broadcast_to(np.arange(length + 1)[None, :, None], angle.shape)
    obs = {"orientation": np.stack([np.cos(angle), np.sin(angle)], -1), "velocity": angle[..., None]}
    obs = {key: value.astype(np.float32) for key, value in obs.items()}
    reward, action = np.zeros(angle.shape, np.float32), np.zeros((*angle.shape, 1), np.float32)
    return Trajectory(obs, action, reward, at == 0, at == length, np.zeros(angle.shape, bool))


def test_an_ensemble_is_filmed(tmp_path, monkeypatch):
    """Its features are those of a start, not of its acting state. A stage is closed, also where the episode
    is too short to film."""
    stage, run = Stage(), untrained("pets", "random", tmp_path)
    monkeypatch.setattr(open_loop, "_stage", lambda task: stage)
    film = open_loop.measure(run, played(20))["bodies"]
    assert film.shape == (5 + 10, 2, open_loop.BODIES, 2, 2, 3) and stage.closed
    stage.closed = False
    with pytest.raises(UserError, match="too short"):
        open_loop.measure(run, played(1))
    assert stage.closed


def test_a_model_without_a_decoder_is_not_filmed(tmp_path):
    run = untrained("tdmpc_dmc", "none", tmp_path)
    with pytest.raises(UserError, match="does not predict observations"):
        open_loop.write(run)


@pytest.mark.parametrize(
    ("error", "said"),
    [(UserError("no pictures"), ": no pictures"), (AttributeError("no z\nat all"), ": AttributeError: no z")],
)
def test_a_film_that_fails_is_one_line(error, said, monkeypatch, capsys, tmp_path):
    """Whatever the reason, and after the results."""

    def load(path):
        raise error

    monkeypatch.setattr(experiment, "load", load)
    experiment.film(tmp_path)
    assert capsys.readouterr().out == f"no film of what the world model expects{said}\n"
