"""Charts and the report of a run: whole HTML in one file, whatever a run left behind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mbrl import charts, compare, prediction, published, report, statistics
from mbrl.__main__ import main
from mbrl.charts import Series
from mbrl.errors import UserError
from mbrl.run_folder import write_json

VOID = {"meta", "link", "line", "circle", "polyline", "polygon", "br"}
NAN = float("nan")


class Checker(HTMLParser):
    """Every tag is closed in order, nothing is loaded from elsewhere, every number in a chart is finite."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.count = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        assert tag not in ("script", "img", "iframe")
        for name, value in attributes:
            assert not (name in ("src", "href") and not value.startswith("data:")), value
            if name in ("points", "cx", "cy", "x1", "x2", "y1", "y2", "x", "y", "viewBox"):
                assert np.isfinite([float(v) for v in re.split("[ ,]", value)]).all(), value
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert "http" not in "".join(re.findall(r"<style>.*?</style>", text, re.S))
    return checker


# Charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1000, [0, 250, 500, 750, 1000]),
        (3, 97, [0, 50, 100]),
        (-0.02, 0.03, [-0.02, 0, 0.02, 0.04]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    marks = charts.ticks(low, high, 4)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 8
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0])
    assert len(set(charts.labels(marks))) == len(marks)


def test_labels_tell_neighbours_apart():
    assert charts.labels([0.02045, 0.0205, 0.02055]) == ["0.02045", "0.0205", "0.02055"]
    assert charts.labels([0, 20_000, 40_000]) == ["0", "20k", "40k"]
    assert [charts.short(v) for v in (1.5e6, 3e-5, -0.25, NAN)] == ["1.5M", "3e-5", "-0.25", "-"]


def test_line_chart_leaves_gaps_and_keeps_inside():
    x, y = np.arange(6.0), np.array([0, 1, NAN, 3, NAN, 5])
    svg = charts.line_chart([Series("a <b>", x, y, y - 1, y + 1), Series("", x, y, kind="dots")], "x", "y")
    checker = check(svg)
    assert checker.count["polyline"] == 1 and checker.count["polygon"] == 3
    assert checker.count["circle"] == 2 + 4  # points alone between gaps; dots
    assert "a <b>" in checker.text
    points = [tuple(map(float, p.split(","))) for p in re.findall(r"[\d.]+,[\d.]+", svg)]
    assert all(0 <= px <= charts.WIDTH and 0 <= py <= charts.HEIGHT for px, py in points)


def test_nothing_to_draw_is_nothing():
    assert charts.line_chart([], "x", "y") == "" == charts.line_chart([Series("", [1], [NAN])], "x", "y")
    assert charts.interval_chart([("a", NAN, NAN, NAN)], "x") == ""
    assert charts.card("title", "") == "" == charts.group("title", ["", ""])


def test_long_lines_are_thinned_without_changing_their_mean():
    y = np.arange(10_000.0)
    thin = charts._thinned(Series("", y, y))
    assert len(thin.x) <= charts.MOST_POINTS and thin.y.mean() == pytest.approx(y.mean())
    dots = charts._thinned(Series("", y, y, kind="dots"))
    assert len(dots.x) <= charts.MOST_POINTS and set(dots.y) < set(y)


def test_intervals():
    checker = check(charts.interval_chart([("a", 1.0, 0.5, 1.5), ("b", 2.0, NAN, NAN)], "score"))
    assert checker.count["circle"] == 2 and "a" in checker.text


# Reports


def run_folder(path, seeds: int, evaluations: int = 3, task: str = "cup_catch", **config):
    """A run folder as training leaves it, with made-up numbers; the last seed failed."""
    rng = np.random.default_rng(seeds)
    frames = [10_000 * (k + 1) for k in range(evaluations)]
    returns = 300.0 * rng.uniform(0.5, 1, (evaluations, seeds)) * np.arange(1, evaluations + 1)[:, None]
    path.mkdir()
    settings = {"task": task, "preset": "s", "world_model": "rssm", "seed": 0, "num_seeds": seeds}
    settings |= {"model": {"stoch": 8, "classes": 4, "free_nats": 1.0}, **config}
    machine = {"cpu": "a <cpu> & more", "devices": ["cpu", "cpu"]}
    write_json(path / "config.json", {"config": settings, "machine": machine, "versions": {"jax": "1"}})
    episodes = returns[-1][:, None] + rng.normal(size=(seeds, 4))
    summary = {
        "env_steps": frames[-1], "wall_seconds": 100.0, "train_seconds": 80.0, "evaluate_seconds": 5.0,
        "compile_seconds": 15.0, "updates": 1000, "params": 12345, "seeds": list(range(seeds)),
        "eval_return": {"per_seed": returns[-1], "episodes": episodes, "mean": returns[-1].mean(),
                        "iqm": returns[-1].mean(), "ci": [NAN, NAN] if seeds == 1 else [1.0, 2.0]},
        "evaluations": [{"env_steps": f, "per_seed": r} for f, r in zip(frames, returns)],
    }  # fmt: skip
    write_json(path / "summary.json", summary)
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(1000, frames[-1] + 1, 1000):
            for seed in range(seeds):
                learning = step > 2000
                row = {"step": step, "seed": seed, "updates": step * learning, "time/train": step / 100}
                row |= {"episode_return": 5.0 if step % 2000 else None, "episodes": 1}
                if learning:
                    failed = seed == seeds - 1 > 0
                    row |= {"kl": None if failed else 1.0 + 1 / step, "reward_loss": 1 / step, "frozen": 0.0}
                    row |= {"entropy_post": 7.0, "entropy_prior": 8.0, "loss": -1.0, "novel_metric": step}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("seeds", [1, 3, 12])
@pytest.mark.parametrize("task", ["cup_catch", "somewhere"])
def test_a_report_is_whole(tmp_path, seeds, task):
    path = report.write(run_folder(tmp_path / "run", seeds, task=task))
    text = path.read_text()
    checker = check(text)
    shown = " ".join(checker.text)
    for words in ("12,345", "reward loss", "novel metric", "a <cpu> & more", "11.1 nats", "Throughput"):
        assert words in shown, words
    assert ("published" in shown) == (task == "cup_catch") and ("IQM" in shown) == (seeds > 1)
    assert "frozen" not in shown  # never moved from zero
    assert "python -m mbrl report ." in shown  # how to measure the world model
    assert 'name="viewport"' in text and "prefers-color-scheme:dark" in text
    assert len(text) < 1_000_000


def test_throughput_is_that_of_training(tmp_path):
    """1000 frames in 10 s while learning; the rows of prefill are another speed."""
    result = report.read(run_folder(tmp_path / "run", 1))
    lines = re.findall(r"<polyline[^>]*points=\"([^\"]*)\"", report._throughput(result))
    assert len(lines) == 2
    assert len({point.split(",")[1] for point in lines[0].split()}) == 1  # constant


def test_a_young_run_with_a_failed_seed(tmp_path):
    folder = run_folder(tmp_path / "run", 2, evaluations=1)
    summary = json.loads((folder / "summary.json").read_text())
    summary["eval_return"] |= {"iqm": None, "ci": [None, None]}
    summary["eval_return"]["episodes"][1] = [None] * 4
    summary["evaluations"][0]["per_seed"][1] = None
    write_json(folder / "summary.json", summary)
    assert "failed" in " ".join(check(report.write(folder).read_text()).text)


def test_stored_predictions_are_shown(tmp_path):
    folder = run_folder(tmp_path / "run", 2)
    rng = np.random.default_rng(0)
    curve, example = rng.uniform(size=(2, 5)), rng.uniform(size=(5, 3))
    measured = {"horizon": 5, "error": {"position": curve}, "unchanged": {"position": curve + 1}}
    measured["example"] = {"truth": {"position": example}, "predicted": {"position": example}}
    write_json(folder / report.PREDICTION, measured | {"frames": 30_000})
    shown = " ".join(check(report.write(folder).read_text()).text)
    assert "Error of position" in shown and "Example: position" in shown and "30,000" in shown
    assert "No picture" not in shown
    write_json(folder / report.PREDICTION, measured | {"frames": 30_000, "no_film": "there is no library"})
    assert "No picture: there is no library." in " ".join(check(report.write(folder).read_text()).text)
    write_json(folder / report.PREDICTION, {"frames": 30_000})  # nothing could be predicted
    assert "World model" not in " ".join(check(report.write(folder).read_text()).text)


def test_eight_long_runs_stay_small(tmp_path):
    """600k frames of 8 seeds with everything that a report can show, a film of 3 MiB included."""
    folder = run_folder(tmp_path / "run", 8, evaluations=60)
    steps = np.random.default_rng(0).uniform(size=(8, 50))
    measured = {"horizon": 50, "error": {"position": steps}, "unchanged": {"position": steps}}
    measured["example"] = {"truth": {"position": steps.T}, "predicted": {"position": steps.T}}
    write_json(folder / report.PREDICTION, measured | {"frames": 600_000})
    (folder / "videos").mkdir()
    (folder / "videos" / "open_loop_bodies.gif").write_bytes(bytes(3 * 2**20))
    page = report.write(folder).read_text()
    assert "open_loop" not in page and "Film of bodies" in page
    assert 4 * 2**20 < len(page) < 6 * 2**20  # base64 makes 4 MiB of the film


def test_command_and_what_is_missing(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", 1)
    main(["report", "--fast", str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match="has not been evaluated"):
        report.write(folder)
    with pytest.raises(UserError, match="config"):
        report.write(tmp_path)
    with pytest.raises(SystemExit):
        main(["nothing"])


# Prediction


def test_errors_of_a_prediction_by_hand():
    """A ramp: predicting exactly has no error; that nothing changes is off by h slopes."""
    seen = np.stack([np.arange(10.0), np.ones(10)], 1)  # the second dimension never moves and is left out
    points, horizon = (0, 4), 3
    truth = np.stack([seen[np.array(points) + h] for h in range(1, horizon + 1)])
    scale = seen[:, 0].std()
    error, unchanged, got, guess = prediction._compare(seen, truth, points, horizon)
    np.testing.assert_allclose(error, 0, atol=1e-12)
    np.testing.assert_allclose(unchanged, np.arange(1, 4) / scale)
    np.testing.assert_array_equal(got, truth)
    error = prediction._compare(seen, truth + np.array([2.0, 50.0]), points, horizon)[0]
    np.testing.assert_allclose(error, 2 / scale)
    still = prediction._compare(np.ones((10, 1)), np.ones((3, 2, 1)), points, horizon)
    assert np.isnan(still[0]).all() and np.isnan(still[1]).all()


def test_an_episode_that_never_ends_crosses_no_other_ones_end():
    ends = np.zeros((3, 10), bool)
    assert prediction.common_length(ends) == 9
    ends[1, 4] = ends[2, 7] = True
    assert prediction.common_length(ends) == 4


# Comparisons


def test_methods_are_grouped_by_their_settings(tmp_path):
    folders = [
        run_folder(tmp_path / "a1", 2, task="cup_catch"),
        run_folder(tmp_path / "a2", 3, task="walker_walk"),
        run_folder(tmp_path / "b", 2, preset="xs"),
        run_folder(tmp_path / "c", 2, preset="xs", agent={"lam": 0.5}),
    ]
    methods = compare.methods_of([str(f) for f in folders[:3]])
    assert [(m.name, len(m.runs)) for m in methods] == [("s", 2), ("xs", 1)]
    names = [m.name for m in compare.methods_of([str(f) for f in folders])]
    assert names == ["s, lam=None", "xs, lam=None", "xs, lam=0.5"]
    assert [m.name for m in compare.methods_of([f"mine={folders[0]}", str(folders[1])])] == [
        "mine",
        "dreamer, rssm, s",
    ]


def sweep_folder(path):
    """Two settings with two seeds each, in one program: nothing is said over all of them."""
    folder = run_folder(path, 4, agent={"entropy": 0.1, "lam": 0.9})
    record = json.loads((folder / "config.json").read_text())
    vary = {"agent.entropy": [0.1, 0.1, 0.2, 0.2], "agent.lam": [0.9] * 4}
    write_json(folder / "config.json", record | {"vary": vary})
    summary = json.loads((folder / "summary.json").read_text())
    kept = {name: summary["eval_return"][name] for name in ("per_seed", "episodes")}
    write_json(folder / "summary.json", summary | {"eval_return": kept})
    return folder


def test_settings_of_a_sweep_are_methods_of_their_own(tmp_path):
    """Each with its own seeds; one that equals a run alone joins that."""
    folder = sweep_folder(tmp_path / "group0")
    alone = run_folder(tmp_path / "alone", 3, agent={"entropy": 0.2, "lam": 0.9})
    returns, first, second = report.read(folder).returns, *compare.methods_of([str(folder), str(alone)])
    assert (first.name, second.name) == ("entropy=0.1", "entropy=0.2")
    assert [run.seeds for run in first.runs] == [[0, 1]]
    assert [run.seeds for run in second.runs] == [[2, 3], [0, 1, 2]]
    np.testing.assert_array_equal(second.runs[0].returns, returns[:, 2:])
    assert {row["seed"] for row in second.runs[0].rows} == {2, 3}
    names = [method.name for method in compare.methods_of([f"mine={folder}"])]
    assert names == ["mine, agent.entropy=0.1, agent.lam=0.9", "mine, agent.entropy=0.2, agent.lam=0.9"]
    found = compare.compare([first, second], samples=10)
    assert found.counts == {"entropy=0.1": [2], "entropy=0.2": [5]}


def test_a_report_aggregates_no_settings_that_differ(tmp_path):
    folder = sweep_folder(tmp_path / "group0")
    shown = " ".join(check(report.write(folder).read_text()).text)
    assert "IQM of" not in shown and "interval of the IQM" not in shown
    assert "Return by setting" in shown and "agent.entropy=0.2, agent.lam=0.9" in shown
    expected = statistics.iqm(report.read(folder).returns[-1, :2])
    assert f"{expected:.1f}" in shown and "2 settings" in shown


@pytest.mark.parametrize(
    ("one", "other"),
    [("cup_catch", "ball_in_cup_catch"), ("mt3", "cartpole_swingup,pendulum_swingup, ball_in_cup_catch")],
)
def test_names_of_one_task_are_one(tmp_path, one, other):
    folders = [run_folder(tmp_path / f"{i}", 2, task=task) for i, task in enumerate((one, other))]
    assert len(compare.compare(compare.methods_of(list(map(str, folders))), samples=10).tasks) == 1


def test_what_changes_no_result_makes_no_method(tmp_path):
    """Nor are updates of recorded episodes compared with frames."""
    one, two, offline = (tmp_path / name for name in ("one", "two", "offline"))
    run_folder(one, 2, loop={"env_workers": 0, "num_envs": 4})
    run_folder(two, 2, loop={"env_workers": 2, "num_envs": 4}, data_parallel=2)
    run_folder(offline, 2, offline="data")
    methods = compare.methods_of([str(one), str(two)])
    assert [len(m.runs) for m in methods] == [2]
    with pytest.raises(UserError, match="compare them apart"):
        compare.compare(compare.methods_of([f"a={one}", f"b={offline}"]))


def test_a_comparison_is_that_of_the_statistics(tmp_path):
    """Scores are taken where the shortest run of a task ends, on the tasks that both methods have."""
    a1, a2 = run_folder(tmp_path / "a1", 4, 3), run_folder(tmp_path / "a2", 3, 2, task="walker_walk")
    b1, b2 = run_folder(tmp_path / "b1", 5, 4), run_folder(tmp_path / "b2", 2, 2, task="walker_walk")
    extra = run_folder(tmp_path / "c", 2, task="cheetah_run")
    methods = compare.methods_of([f"a={a1}", f"a={a2}", f"b={b1}", f"b={b2}", f"b={extra}"])
    found = compare.compare(methods, scale=500.0, threshold=0.6, samples=200)
    assert found.tasks == ["ball_in_cup_catch", "walker_walk"] and found.missing == ["cheetah_run"]
    assert found.frames == [30_000, 20_000] and found.counts == {"a": [4, 3], "b": [5, 2]}
    result = {f: report.read(f) for f in (a1, a2, b1, b2)}
    a = [result[a1].returns[2] / 500, result[a2].returns[1] / 500]
    b = [result[b1].returns[2] / 500, result[b2].returns[1] / 500]
    assert found.aggregates["a"]["IQM"].value == statistics.aggregate_iqm(a)
    assert found.aggregates["b"]["optimality gap"].value == statistics.optimality_gap(b)
    assert found.improvement["b"].value == statistics.probability_of_improvement(b, a)
    np.testing.assert_allclose(found.per_task[0], [500 * one.mean() for one in a])
    np.testing.assert_array_equal(found.efficiency["a"][0], [10_000, 20_000])
    for estimate in found.aggregates["a"].values():
        assert estimate.low <= estimate.value <= estimate.high
    # Runs reach 300 at their first evaluation with that return or never; the median counts the latter.
    times = [
        next((f for f, v in zip(r.frames, r.returns[:, s]) if v >= 300 and f <= end), np.inf)
        for r, end in ((result[a1], 30_000), (result[a2], 20_000))
        for s in range(len(r.seeds))
    ]
    reached = found.reached["a"]
    assert (reached.runs, reached.reached) == (7, int(np.isfinite(times).sum()))
    assert reached.frames.value == sorted(times)[3]


def test_a_comparison_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    a, b = run_folder(tmp_path / "a", 3), run_folder(tmp_path / "b", 1, preset="xs")
    main(["compare", str(b), "--baseline", str(a), "--out", str(tmp_path / "out"), "--threshold", "0.9"])
    shown = capsys.readouterr().out
    for words in ("optimality gap", "baseline", "published", "never", "single run", "0 of 3"):
        assert words in shown, words
    checker = check((tmp_path / "out.html").read_text())
    assert "Performance profile" in checker.text and checker.count["svg"] >= 6
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize(("agent", "row"), [("dreamer", True), ("tdmpc", True), ("pets", False)])
def test_published_scores_are_those_of_the_runs_own_method(tmp_path, agent, row):
    folder = run_folder(tmp_path / "run", 2, evaluations=12)
    record = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", record | {"agent": agent})
    found = compare.compare(compare.methods_of([str(folder)]), samples=10)
    _, head, rows = compare.tables(found)[-1]
    assert head == ["method", "ball_in_cup_catch"] and len(rows) == 1 + row
    if row:
        method = published.METHODS[agent]
        known = published.score_at("cup_catch", 120_000, method)
        assert known is not None and rows[1] == [f"{method}, published", known.text(1)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--frames 99000000", ["--frames", "99,000,000", "30,000"]),
        ("--max-return 0", ["--max-return", "above 0"]),
        ("--threshold 2", ["--threshold", "between 0 and 1"]),
        ("--baseline {other}", ["no task", "walker_walk", "cup_catch"]),
        ("--out {folder}/missing/out", ["--out", "missing"]),
    ],
)
def test_impossible_comparisons_are_sentences(tmp_path, flags, words):
    folder = run_folder(tmp_path / "a", 2)
    other = run_folder(tmp_path / "b", 2, task="walker_walk")
    flags = flags.format(other=other, folder=tmp_path).split()
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError) as error:
        main(["compare", str(folder), *flags, *out])
    assert all(word in str(error.value) for word in words), error.value
