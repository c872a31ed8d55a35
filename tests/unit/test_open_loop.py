"""Layout and encoding of open-loop films; that runs leave them is tested in tests/reliability/test_command.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mbrl import open_loop
from mbrl.errors import UserError

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
