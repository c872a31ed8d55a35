"""The curve: what is aggregated, and that every combination of inputs gives a picture."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mbrl import published
from mbrl.plots import aggregate, save_curve, save_lines
from mbrl.statistics import bootstrap_interval, iqm

ROOT = Path(__file__).resolve().parents[2]


def points(seed, n=6):
    rng = np.random.default_rng(seed)
    return [(10_000 * i, 100.0 * i + 10 * rng.normal()) for i in range(n)]


def test_aggregate_where_all_seeds_were_evaluated():
    seeds = [points(0), points(1)[:4], points(2), points(3)]
    frames, centre, low, high = aggregate(seeds)
    np.testing.assert_array_equal(frames, [0, 10_000, 20_000, 30_000])
    column = [seed[2][1] for seed in seeds]
    assert centre[2] == pytest.approx(iqm(column))
    assert (low[2], high[2]) == pytest.approx(bootstrap_interval(column, samples=1000))


def test_aggregate_leaves_out_what_is_not_finite():
    frames, centre, low, _ = aggregate([[(0, 1.0), (5, np.nan)], [(0, np.nan), (5, np.nan)]])
    np.testing.assert_array_equal(frames, [0])
    np.testing.assert_array_equal(centre, [1.0])
    assert np.isnan(low).all()
    assert all(values.size == 0 for values in aggregate([]))
    assert all(values.size == 0 for values in aggregate([[], []]))


CURVE = published.curve("walker_walk")


@pytest.mark.parametrize("seeds", [0, 1, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("curve", [None, CURVE], ids=["alone", "published"])
def test_every_combination_gives_a_picture(tmp_path, seeds, training, curve):
    path = tmp_path / "curve.png"
    episodes = [points(9), []] if training else None
    save_curve(path, [points(seed) for seed in range(seeds)], episodes, curve, "walker_walk")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 500 and picture.shape[1] > 800
    assert picture[..., :3].std() > 0.01  # not a blank page
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_settings_that_differ_have_no_iqm(tmp_path, monkeypatch):
    monkeypatch.setattr("mbrl.plots.aggregate", lambda points: pytest.fail("aggregated"))
    save_curve(tmp_path / "a.png", [points(0), points(1)], alike=False)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_evaluations_that_have_not_begun_and_arrays(tmp_path):
    save_curve(tmp_path / "a.png", [[], []], None, CURVE)
    save_curve(tmp_path / "b.png", [np.array(points(0)), np.array(points(1))], [np.array(points(2))], None)
    save_curve(tmp_path / "c.png", [[(0, np.nan)], [(0, 1.0)]], None, CURVE)
    save_curve(tmp_path / "d.png", [[(2_000_000, 900.0)]], None, CURVE)  # beyond the published curve


@pytest.mark.parametrize("x", [[1, 2, 3, 4], ["0", "-0.3", "-1", "-3"]], ids=["numbers", "words"])
def test_lines_give_a_picture(tmp_path, x):
    y = np.linspace(0.5, 1, 8).reshape(4, 2)
    lines = {"one": (x, y), "two": (x, y[::-1])}
    save_lines(tmp_path / "a.png", lines, "updates", "accuracy", "recall:30", (0.4, 1.02))
    assert matplotlib.image.imread(tmp_path / "a.png")[..., :3].std() > 0.01


def test_an_old_picture_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space"):
        save_curve(path, [points(0)])
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_matplotlib_and_orbax_are_loaded_only_when_used():
    code = (
        "import sys, mbrl.plots, mbrl.logger, mbrl.checkpoints, mbrl.run_folder;"
        "print([m for m in ('matplotlib', 'orbax.checkpoint', 'tensorboardX') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
