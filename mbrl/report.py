"""``report.html`` of a run, one file: what was trained, how well, how fast, and what the model knows."""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import warnings
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mbrl import charts, published
from mbrl.charts import Series, card, group, line_chart, table
from mbrl.config import flatten
from mbrl.errors import UserError
from mbrl.logger import format_seconds
from mbrl.plots import aggregate
from mbrl.results import Result, by_setting, describe, read
from mbrl.run_folder import write_atomic, write_json
from mbrl.statistics import iqm

PREDICTION = "prediction.json"
LATENT = {
    "kl": ("KL of posterior and prior", "nats per step"),
    "entropy_post": ("Entropy of the posterior", "nats"),
    "entropy_prior": ("Entropy of the prior", "nats"),
}
LATENT_NOTE = (
    "How much the categorical latents say. A KL near its free nats means that observations bring no news, an "
    "entropy near its bound that a latent stores nothing."
)
_ELSEWHERE = {"episode_return", "episodes", "updates", "time/train", *LATENT}


def write(run_dir: str | os.PathLike, predict: bool = False) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    predict: rebuild the agents and measure their world models first, which compiles and plays one episode per
    seed; the result is kept in ``prediction.json`` for later reports. Raises UserError when there is no run
    or no evaluation, or when the agents cannot be rebuilt.
    """
    result = read(run_dir)
    if predict:
        from mbrl import finished, open_loop, prediction  # here: a report without it needs no JAX

        run = finished.load(run_dir)
        _, played = run.play(1)
        measured = prediction.measure(run, played) | {"frames": run.frames}
        try:
            open_loop.write(run, played)
        except UserError as reason:
            measured["no_film"] = str(reason)
        write_json(result.path / PREDICTION, measured)
    path = result.path / "report.html"
    write_atomic(path, html(result, _stored_prediction(result.path)).encode())
    return path


def write_at_end(run_dir: str | os.PathLike) -> None:
    """`write` of what the files say, nothing measured; a full disk gives a warning, not an end of the run."""
    try:
        write(run_dir)
    except OSError as error:
        warnings.warn(f"report.html was not written: {error.strerror}", RuntimeWarning, stacklevel=2)


def html(result: Result, predicted: dict[str, Any] | None = None) -> str:
    """The whole report. predicted: what `mbrl.prediction.measure` returned, after a trip through JSON."""
    title = f"{result.task}: {result.path.resolve().name}"
    parts = [
        f"<h1>{escape(result.task)}</h1>",
        f"<p class=lead>{escape(_lead(result))}</p>",
        _figures(result),
        group("Return", [_curve(result), _swept(result), _distribution(result)]),
        _prediction(result, predicted),
        _films(result, predicted),
        group("Losses", list(_lines(result, [n for n in result.metrics() if n.endswith("loss")]))),
        group("Latent state", list(_latent(result)), LATENT_NOTE),
        group("Behaviour and health", list(_lines(result, _others(result)))),
        group("Speed", [_throughput(result)]),
        _settings(result),
    ]
    return charts.page(title, "".join(parts))


def _lead(result: Result) -> str:
    config = result.config
    words = [result.agent, *(config[name] for name in ("world_model", "preset") if name in config)]
    when = datetime.datetime.fromtimestamp((result.path / "summary.json").stat().st_mtime)
    return f"{', '.join(words)}; run folder {result.path.resolve().name}, {when:%Y-%m-%d %H:%M}"


def _figures(result: Result) -> str:
    summary, returned = result.summary, result.summary["eval_return"]
    low, high = (None, None) if result.vary else returned["ci"]
    many = len(result.seeds) > 1
    figures = [
        (str(len(by_setting(result))), "settings, see below")
        if result.vary
        else (_number(returned["iqm"]), "return, IQM of seeds" if many else "return"),
        (f"{summary['env_steps']:,}", f"{result.unit.split()[-1]} per seed"),
        (str(len(result.seeds)), "seeds" if many else "seed"),
        (format_seconds(summary["wall_seconds"]), "wall time, all seeds"),
        (f"{summary['params']:,}", "parameters"),
    ]
    if low is not None:
        figures.insert(1, (f"{low:.0f} to {high:.0f}", "95 % interval of the IQM"))
    method = published.method_of(result.record)
    score = None if result.offline else published.score_at(result.task, summary["env_steps"], method)
    if score is not None:
        figures.insert(1, (score.text(), "published at these frames"))
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for value, name in figures)
    return f"<ul class=figures>{items}</ul>"


def _number(value: float | None) -> str:
    return "failed" if value is None or math.isnan(value) else f"{value:.1f}"


def _curve(result: Result) -> str:
    """Evaluations per seed and their IQM, training episodes, and the published curve as far as it matters."""
    points = [list(zip(result.frames, result.returns[:, i])) for i in range(len(result.seeds))]
    frames, centre, low, high = aggregate(points)
    series, note = [], ""
    method = published.method_of(result.record)
    if not result.offline and (curve := published.curve(result.task, method)) is not None:
        until = max(1.5 * result.frames[-1], curve.frames[0])
        shown = slice(int(np.searchsorted(curve.frames, until)) + 1)  # one beyond: a lone point is no line
        mean, std = curve.mean[shown], curve.std[shown]
        series.append(Series(curve.label, curve.frames[shown], mean, mean - std, mean + std, 1, "dashed"))
        note = f"Published curve: {curve.source}."
    for i, seed in enumerate(result.seeds):
        x, y = result.metric("episode_return", seed)
        series.append(Series("" if i else "training episodes", x, y, colour=7, kind="dots"))
    if len(result.seeds) == 1:
        series.append(Series(f"evaluation, seed {result.seeds[0]}", frames, centre))
    else:
        for i in range(len(result.seeds)):
            label = "" if i else "evaluation of each seed"
            series.append(Series(label, result.frames, result.returns[:, i], kind="thin"))
        if not result.vary:  # or it would mix settings
            label = f"IQM of {len(result.seeds)} seeds, 95 % bootstrap interval"
            series.append(Series(label, frames, centre, low, high))
    chart = line_chart(series, result.unit, "episode return", zero=True)
    return card(f"Return against {result.unit.split()[-1]}", chart, note, wide=True)


def _swept(result: Result) -> str:
    """Where the seeds differ in settings: the IQM of each setting in the last evaluation."""
    if not result.vary:
        return ""
    rows = [
        [describe(part.setting), ", ".join(map(str, part.seeds)), _number(float(iqm(part.returns[-1])))]
        for part in by_setting(result)
    ]
    return card("Return by setting", table(["setting", "seeds", "IQM"], rows))


def _distribution(result: Result) -> str:
    """Returns of the last evaluation, an episode each, seed by seed."""
    series = []
    for i, episodes in enumerate(result.episodes):
        ranks = (np.arange(len(episodes)) + 0.5) / len(episodes)
        label = f"seed {result.seeds[i]}" if len(result.seeds) <= charts.COLOURS else ""
        series.append(Series(label, np.sort(episodes), ranks, colour=i, kind="line"))
    chart = line_chart(series, "return", "fraction of episodes", zero=True, top=1.0)
    mean, worst, best = (f(result.episodes) for f in (np.nanmean, np.nanmin, np.nanmax))
    note = (
        f"Fraction of the last evaluation's episodes ({result.episodes.shape[1]} per seed) up to each "
        f"return: mean {mean:.1f}, worst {worst:.1f}, best {best:.1f}."
    )
    return card("Distribution of returns", chart, note)


def _seed_series(result: Result, name: str) -> list[Series]:
    """One line per seed, in its colour; named where there are few."""
    few = 1 < len(result.seeds) <= charts.COLOURS
    return [
        Series(f"{seed}" if few else "", *result.metric(name, seed), colour=i, kind="thin" if few else "line")
        for i, seed in enumerate(result.seeds)
    ]


def _lines(result: Result, names: list[str]) -> Iterator[str]:
    for name in names:
        yield card(name.replace("_", " "), line_chart(_seed_series(result, name), result.unit, name))


def _others(result: Result) -> list[str]:
    """Whatever else was logged, unless it never moved from zero."""
    names = [n for n in result.metrics() if n not in _ELSEWHERE and not n.endswith("loss") and "/" not in n]
    moved = lambda name: any(np.nan_to_num(result.metric(name, seed)[1]).any() for seed in result.seeds)
    return [name for name in names if name != "eval_return" and moved(name)]


def _latent(result: Result) -> Iterator[str]:
    model = result.config.get("model", {})
    bound = model["stoch"] * math.log(model["classes"]) if {"stoch", "classes"} <= model.keys() else None
    logged = result.metrics()
    for name, (title, unit) in LATENT.items():
        if name not in logged:
            continue
        series, note = _seed_series(result, name), ""
        if name == "kl" and "free_nats" in model:
            x = series[0].x
            series.append(
                Series("free nats", x, np.full(len(x), model["free_nats"]), colour=7, kind="dashed")
            )
        elif bound is not None:
            note = f"At most {bound:.1f} nats: {model['stoch']} latents of {model['classes']} classes."
        yield card(title, line_chart(series, result.unit, unit, zero=True), note)


def _throughput(result: Result) -> str:
    """Updates and frames per second of training, from one row of metrics to the next. Rows that follow
    closely, as at evaluations, are left out: their seconds end before their updates do."""
    seconds = result.metric("time/train", result.seeds[0])[1]
    frames, updates = result.metric("updates", result.seeds[0])
    if len(seconds) < 2 or len(seconds) != len(updates):
        return ""
    apart, kept = np.median(np.diff(frames)) / 2, [0]
    for i in range(1, len(frames)):
        if frames[i] - frames[kept[-1]] >= apart:
            kept.append(i)
    seconds, frames, updates = seconds[kept], frames[kept], updates[kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        learning = (np.diff(seconds) > 0) & (np.diff(updates) > 0)  # prefilling is another speed
        rate = lambda count: np.where(learning, np.diff(count) / np.diff(seconds), np.nan)
        series = [Series("updates per second and seed", frames[1:], rate(updates), colour=1)]
        if not result.offline:
            series.insert(0, Series("frames per second and seed", frames[1:], rate(frames)))
    summary = result.summary
    parts = {name: summary[f"{name}_seconds"] for name in ("train", "evaluate", "compile")}
    spent = ", ".join(f"{format_seconds(value)} {name}" for name, value in parts.items())
    chart = line_chart(series, result.unit, "per second", zero=True)
    return card("Throughput", chart, f"Wall time: {spent}.", wide=False)


def _prediction(result: Result, predicted: dict[str, Any] | None) -> str:
    if predicted is None:
        hint = "Not measured yet: in this folder, python -m mbrl report . adds it."
        return f"<h2>World model</h2><p class=note>{escape(hint)}</p>"
    if not predicted.get("error"):
        return ""
    horizon = predicted["horizon"]
    steps = np.arange(1, horizon + 1)
    cards = []
    for name, errors in predicted["error"].items():
        series = [
            Series(f"seed {seed}" if len(result.seeds) <= charts.COLOURS else "", steps, error, colour=i)
            for i, (seed, error) in enumerate(zip(result.seeds, errors))
        ]
        constant = np.nanmean(np.array(predicted["unchanged"][name], np.float64), 0)
        series.append(Series("if nothing changed", steps, constant, colour=7, kind="dashed"))
        cards.append(card(f"Error of {name}", line_chart(series, "steps ahead", "error", zero=True)))
    for name, truth in predicted["example"]["truth"].items():
        cards.append(_example(name, np.array(truth), np.array(predicted["example"]["predicted"][name])))
    note = (
        f"Open-loop prediction at {predicted['frames']:,} frames: from points along a real episode the model "
        f"is given the actions of the next {horizon} steps and sees nothing more. Errors are in standard "
        "deviations of each dimension over the episode. The examples show one such prediction."
    )
    return group("World model", cards, note)


def _films(result: Result, predicted: dict[str, Any] | None) -> str:
    """Open-loop films of what the model expects, as `mbrl.open_loop` left them, inside the page."""
    cards = []
    for path in sorted((result.path / "videos").glob("open_loop_*.gif")):
        data = base64.b64encode(path.read_bytes()).decode()
        name = path.stem.removeprefix("open_loop_")
        picture = f'<img src="data:image/gif;base64,{data}" alt="{escape(name)}" style="max-width:100%">'
        cards.append(card(f"Film of {name}", picture, wide=True))
    note = (
        "Rows: what happened, what the model expected and, of pictures that the agent sees, their difference "
        "(grey is none). A column begins with frames that the model saw; from then on it knew the actions "
        "alone."
    )
    if not cards and predicted and "no_film" in predicted:
        return f"<p class=note>No picture: {escape(predicted['no_film'])}.</p>"
    return group("Open-loop prediction", cards, note)


def _example(name: str, truth: np.ndarray, guess: np.ndarray) -> str:
    steps, series = np.arange(1, len(truth) + 1), []
    for d in range(truth.shape[1]):
        entry = f" {d}" if truth.shape[1] > 1 else ""
        series.append(Series(f"true{entry}", steps, truth[:, d], colour=d))
        series.append(Series(f"predicted{entry}", steps, guess[:, d], colour=d, kind="dashed"))
    return card(f"Example: {name}", line_chart(series, "steps ahead", name))


def _settings(result: Result) -> str:
    record = result.record
    flat = [(name, _shown(value)) for name, value in flatten(result.config)]
    about = [("commit", record.get("commit") or "unknown")]
    about += [(name, _shown(value)) for name, value in record.get("machine", {}).items()]
    about += [(name, value or "not installed") for name, value in record.get("versions", {}).items()]
    wrap = lambda rows: f"<div class=settings>{table([], rows)}</div>"
    cards = [card("Machine and versions", wrap(about))]
    cards.append(
        card("All settings", f"<details><summary>{len(flat)} fields</summary>{wrap(flat)}</details>")
    )
    return group("How it was made", cards)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _stored_prediction(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PREDICTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"{folder / PREDICTION} is ignored: {error}", RuntimeWarning, stacklevel=2)
        return None
