"""Comparing methods over runs and tasks: `compare` computes, `text`, `html` and `save_png` show."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table

from mbrl import charts, published
from mbrl.charts import Series, card, group, interval_chart, line_chart
from mbrl.config import flatten
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.plots import save_figure
from mbrl.results import FRAMES, Result, by_setting, describe, read
from mbrl.statistics import (
    Scores,
    aggregate_iqm,
    aggregate_mean,
    aggregate_median,
    first_reached,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_interval,
)

# Settings that do not make another method.
_INCIDENTAL = {
    *("task", "seed", "num_seeds", "steps", "run_dir", "resume", "video", "debug", "sinks"),
    *("data_parallel", "distributed", "deterministic", "loop.env_workers", "loop.env_timeout"),
}
AGGREGATES: dict[str, Callable[[Scores], float]] = {
    "IQM": aggregate_iqm,
    "median": aggregate_median,
    "mean": aggregate_mean,
    "optimality gap": optimality_gap,
}
PROFILE = np.linspace(0.0, 1.0, 51)


class Method(NamedTuple):
    """Runs of the same settings, on any tasks and seeds."""

    name: str
    runs: list[Result]


class Estimate(NamedTuple):
    """A number, or an array [K], and its 95 % stratified bootstrap interval; NaN where there is none."""

    value: Any
    low: Any
    high: Any


class Reached(NamedTuple):
    """When runs first evaluated at the threshold or above. runs: how many there are; reached: how many did;
    frames, seconds: medians over runs, infinite where most did not; seconds are of training, on whatever
    machines they ran, of all seeds of a run together."""

    runs: int
    reached: int
    frames: Estimate
    seconds: Estimate


class Comparison(NamedTuple):
    """methods, tasks: names. frames: per task, where scores are taken. scale: return of score 1. aggregates:
    {method: {statistic: Estimate}}. profiles [51] at thresholds `PROFILE`. improvement: over the reference,
    per other method. efficiency: (frames [K], IQM [K]). per_task: mean return, (methods, tasks).
    missing: tasks that not every method has, left out. sources: whose published scores the runs are compared
    with. unit: what "frames" count."""

    methods: list[str]
    tasks: list[str]
    frames: list[int]
    scale: float
    threshold: float
    reference: str
    counts: dict[str, list[int]]
    aggregates: dict[str, dict[str, Estimate]]
    profiles: dict[str, Estimate]
    improvement: dict[str, Estimate]
    reached: dict[str, Reached]
    efficiency: dict[str, tuple[np.ndarray, Estimate]]
    per_task: np.ndarray
    missing: list[str]
    sources: list[str]
    unit: str = FRAMES


def methods_of(folders: Sequence[str], prefix: str = "") -> list[Method]:
    """Runs grouped into methods. A folder may be given as NAME=FOLDER; others are grouped by their settings
    and named after those in which they differ. Each setting of a sweep is a method. Raises UserError for what
    is no run."""
    named: dict[str, list[Result]] = {}
    unnamed: dict[str, list[Result]] = {}
    for folder in folders:
        name, _, path = folder.partition("=")
        has_name = bool(path) and not Path(folder).exists()
        for result in by_setting(read(path if has_name else folder)):
            if has_name:
                words = filter(None, [name, describe(result.setting)])
                named.setdefault(", ".join(words), []).append(result)
            else:
                settings = json.dumps(_settings(result), sort_keys=True)
                unnamed.setdefault(settings, []).append(result)
    found = [Method(prefix + name, runs) for name, runs in named.items()]
    groups = list(unnamed.values())
    return found + [Method(prefix + name, runs) for name, runs in zip(_names(groups), groups)]


def _settings(result: Result) -> dict[str, Any]:
    """What makes a method: the kind of agent and its settings."""
    own = {k: v for k, v in flatten(result.config) if k not in _INCIDENTAL}
    return {"kind": result.agent} | own


def _names(groups: list[list[Result]]) -> list[str]:
    """Of the settings that differ: agent, world model and preset if they tell the groups apart, else three
    more, or the folder too, or all."""
    flat = [_settings(runs[0]) for runs in groups]
    keys = {key: None for one in flat for key in one}
    differing = [k for k in keys if len({json.dumps(one.get(k)) for one in flat}) > 1]
    main = [k for k in ("kind", "world_model", "preset") if k in keys]
    chosen = [k for k in main if k in differing] or ([] if differing else main)
    names = [", ".join(str(one[k]) for k in chosen if k in one) for one in flat]
    rest = [k for k in differing if k not in main]

    def longer(more: list[str]) -> list[str]:
        said = [[f"{k.split('.')[-1]}={one.get(k)}" for k in more] for one in flat]
        return [", ".join(filter(None, [name, *words])) for name, words in zip(names, said)]

    folders = lambda short: [f"{name} ({runs[0].path.name})" for name, runs in zip(short, groups)]
    alternatives = [names, longer(rest[:3]), folders(longer(rest[:3])), longer(rest)]
    told_apart = lambda tried: len(set(tried)) == len(tried) and all(tried)
    return next((tried for tried in alternatives if told_apart(tried)), alternatives[-1])


def compare(
    methods: Sequence[Method],
    reference: str | None = None,
    frames: int | None = None,
    scale: float = 1000.0,
    threshold: float = 0.5,
    samples: int = 2000,
) -> Comparison:
    """Compares methods on the tasks that all of them ran.

    reference: the method that others are said to improve on; the first by default. frames: where scores are
    taken, by default as far as the shortest run of each task went. scale: return that makes a score of 1.
    threshold: score whose first evaluation is timed. samples: of every bootstrap.

    Raises UserError when there is no common task, a run is shorter than ``frames``, or a value is impossible.
    """
    if not scale > 0:
        raise UserError(f"--max-return is {scale}, it must be above 0")
    check_between("--threshold", threshold, 0, 1)
    if frames is not None:
        check_at_least("--frames", frames, 1)
    units = {run.unit for method in methods for run in method.runs}
    if len(units) > 1:
        raise UserError(
            "some of these runs count frames and others, of --offline, updates: compare them apart"
        )
    by_task = [
        {task: [r for r in m.runs if r.task == task] for task in {r.task for r in m.runs}} for m in methods
    ]
    everything = sorted(set().union(*by_task))
    tasks = [task for task in everything if all(task in runs for runs in by_task)]
    if not tasks:
        raise UserError(f"no task was run by every method: {_listing(methods)}")
    ends = [int(min(r.frames[-1] for runs in by_task for r in runs[task])) for task in tasks]
    starts = [int(max(r.frames[0] for runs in by_task for r in runs[task])) for task in tasks]
    at = [frames or end for end in ends]
    for task, end, start, where in zip(tasks, ends, starts, at):
        if start > end:
            raise UserError(
                f"runs of {task} have no frames in common: one was first evaluated after {start:,}, another "
                f"for the last time after {end:,}"
            )
        if not start <= where <= end:
            raise UserError(
                f"--frames is {where:,}, but all runs of {task} were evaluated from {start:,} to {end:,} only"
            )

    def scores(runs: dict[str, list[Result]], where: Sequence[float]) -> list[np.ndarray]:
        return [np.concatenate([r.at(f) for r in runs[t]]) / scale for t, f in zip(tasks, where)]

    names = [method.name for method in methods]
    reference = names[0] if reference is None else reference
    final = {name: scores(runs, at) for name, runs in zip(names, by_task)}
    marks = sorted({f for runs in by_task for t in tasks for r in runs[t] for f in r.frames})
    marks = np.array([f for f in marks if max(starts) <= f <= min(at)])
    profile = lambda s: performance_profile(s, PROFILE)
    return Comparison(
        methods=names,
        tasks=tasks,
        frames=at,
        scale=scale,
        threshold=threshold,
        reference=reference,
        counts={name: [len(one) for one in final[name]] for name in names},
        aggregates={
            name: {kind: _estimate(f, final[name], samples=samples) for kind, f in AGGREGATES.items()}
            for name in names
        },
        profiles={name: _estimate(profile, final[name], samples=samples // 2) for name in names},
        improvement={
            name: _estimate(probability_of_improvement, final[name], final[reference], samples=samples)
            for name in names
            if name != reference
        },
        reached={
            name: _reached([runs[t] for t in tasks], at, threshold * scale, samples)
            for name, runs in zip(names, by_task)
        },
        efficiency={
            name: (marks, _curve([scores(runs, [f] * len(tasks)) for f in marks], samples // 2))
            for name, runs in zip(names, by_task)
        },
        per_task=np.array([[scale * one.mean() for one in final[name]] for name in names]),
        missing=[task for task in everything if task not in tasks],
        sources=sorted({published.method_of(r.record) for m in methods for r in m.runs} - {""}),
        unit=units.pop(),
    )


def _listing(methods: Sequence[Method]) -> str:
    return "; ".join(f"{m.name}: {', '.join(sorted({r.task for r in m.runs}))}" for m in methods)


def _estimate(statistic: Callable[..., Any], *groups: Scores, samples: int) -> Estimate:
    return Estimate(statistic(*groups), *stratified_interval(statistic, *groups, samples=samples))


def _curve(scores: list[list[np.ndarray]], samples: int) -> Estimate:
    estimates = [_estimate(aggregate_iqm, one, samples=samples) for one in scores]
    return Estimate(*(np.array(column) for column in zip(*estimates))) if estimates else Estimate([], [], [])


def _reached(runs: list[list[Result]], at: Sequence[int], threshold: float, samples: int) -> Reached:
    def times(clock: Callable[[Result], np.ndarray]) -> list[np.ndarray]:
        return [
            np.array(
                [
                    first_reached(clock(r)[r.frames <= end], r.returns[r.frames <= end, s], threshold)
                    for r in of_task
                    for s in range(len(r.seeds))
                ]
            )
            for of_task, end in zip(runs, at)
        ]

    # A median that exists among the runs, so that "never" (infinity) is not averaged with a number.
    median = lambda s: float(np.percentile(np.concatenate(s), 50, method="inverted_cdf"))
    frames, seconds = times(lambda r: r.frames), times(lambda r: r.train_seconds())
    flat = np.concatenate(frames)
    return Reached(
        flat.size,
        int(np.isfinite(flat).sum()),
        _estimate(median, frames, samples=samples),
        _estimate(median, seconds, samples=samples),
    )


# What is shown


def _number(value: float, digits: int = 3) -> str:
    return "never" if np.isinf(value) else "failed" if np.isnan(value) else f"{value:.{digits}f}"


def _with_interval(estimate: Estimate, show: Callable[[float], str] = _number) -> str:
    if not np.isfinite(estimate.value) or np.isnan(estimate.low):
        return show(estimate.value)
    return f"{show(estimate.value)}\n[{show(estimate.low)}, {show(estimate.high)}]"


def _whole(value: float) -> str:
    return "never" if np.isinf(value) else f"{value:,.0f}"


def tables(c: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of everything that is a number; intervals are 95 %."""
    named = ", ".join(f"{task} at {frames:,}" for task, frames in zip(c.tasks, c.frames))
    aggregates = [[m, *(_with_interval(c.aggregates[m][k]) for k in AGGREGATES)] for m in c.methods]
    found = [
        (
            f"Scores (return / {c.scale:g}) of {named} frames",
            ["method", *AGGREGATES, "runs"],
            [[*row, str(sum(c.counts[row[0]]))] for row in aggregates],
        )
    ]
    if c.improvement:
        rows = [[m, _with_interval(e)] for m, e in c.improvement.items()]
        found.append(("Probability of improvement", ["method", f"over {c.reference}"], rows))
    rows = []
    for m in c.methods:
        r = c.reached[m]
        times = [_with_interval(r.frames, _whole), _with_interval(r.seconds, _whole)]
        rows.append([m, f"{r.reached} of {r.runs}", *times])
    head = ["method", "runs that reached it", "median frames", "median training seconds"]
    found.append((f"First evaluation with a score of {c.threshold:g} or more", head, rows))
    rows = [[m, *(_number(v, 1) for v in c.per_task[i])] for i, m in enumerate(c.methods)]
    for source in c.sources if c.unit == FRAMES else ():
        known = [published.score_at(task, frames, source) for task, frames in zip(c.tasks, c.frames)]
        if any(known):
            rows.append([f"{source}, published", *(s.text(1) if s else "-" for s in known)])
    found.append(("Mean return by task", ["method", *c.tasks], rows))
    return found


def notes(c: Comparison) -> list[str]:
    """What a reader must know about these numbers."""
    said = []
    if any(min(counts) < 2 for counts in c.counts.values()):
        said.append("No interval where a task has a single run of a method: its spread is unknown.")
    elif any(min(counts) < 6 for counts in c.counts.values()):
        said.append("With fewer than six runs of a task bootstrap intervals are too narrow.")
    if c.missing:
        said.append(f"Left out, as not every method ran it: {', '.join(c.missing)}.")
    return said


def text(c: Comparison) -> Group:
    """For the terminal: ``rich.print(text(comparison))``."""
    shown = []
    for title, head, rows in tables(c):
        one = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(head):
            one.add_column(name, justify="right" if i else "left")
        for row in rows:
            one.add_row(*row)
        shown.append(one)
    return Group(*shown, *notes(c))


def html(c: Comparison) -> str:
    """One HTML file, as `mbrl.report` writes them."""
    profile, efficiency = [], []
    for i, name in enumerate(c.methods):
        p, (frames, e) = c.profiles[name], c.efficiency[name]
        profile.append(Series(name, PROFILE, p.value, p.low, p.high, i))
        efficiency.append(Series(name, frames, e.value, e.low, e.high, i))
    cards = [
        card("Sample efficiency", line_chart(efficiency, FRAMES, "IQM of scores", zero=True)),
        card(
            "Performance profile", line_chart(profile, "score", "fraction of runs above", zero=True, top=1.0)
        ),
    ]
    for kind in AGGREGATES:
        rows = [(name, *c.aggregates[name][kind]) for name in c.methods]
        cards.append(card(kind, interval_chart(rows, f"{kind}, 95 % interval")))
    if c.improvement:
        rows = [(name, *estimate) for name, estimate in c.improvement.items()]
        label = f"probability that a run is better than one of {c.reference}"
        cards.append(card("Probability of improvement", interval_chart(rows, label, 1, (0, 1))))
    numbers = [card(title, charts.table(head, rows), wide=True) for title, head, rows in tables(c)]
    title = f"{len(c.methods)} methods on {', '.join(c.tasks)}"
    note = " ".join(["Intervals: 95 %, stratified bootstrap over runs.", *notes(c)])
    return charts.page(
        title, f"<h1>{charts.escape(title)}</h1>" + group("", cards, note) + group("Numbers", numbers)
    )


def save_png(path: str | os.PathLike, c: Comparison) -> None:
    """Sample efficiency, profile, and the IQM with its interval, side by side. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for i, name in enumerate(c.methods):
        colour, y = charts.LIGHT[i % charts.COLOURS], len(c.methods) - i
        frames, e = c.efficiency[name]
        p, total = c.profiles[name], c.aggregates[name]["IQM"]
        left.plot(frames, e.value, color=colour, marker="o", ms=3)
        left.fill_between(frames, e.low, e.high, color=colour, alpha=0.17, lw=0)
        middle.plot(PROFILE, p.value, color=colour, label=name)
        middle.fill_between(PROFILE, p.low, p.high, color=colour, alpha=0.17, lw=0)
        right.plot([total.low, total.high], [y, y], color=colour, lw=6, alpha=0.4, solid_capstyle="round")
        right.plot(total.value, y, "o", color=colour)
    left.set(xlabel=FRAMES, ylabel="IQM of scores", ylim=(0, None))
    middle.set(xlabel="score", ylabel="fraction of runs above", ylim=(0, 1.02))
    right.set(xlabel="IQM of scores, 95 % interval", yticks=[], ylim=(0.5, len(c.methods) + 0.5))
    left.xaxis.set_major_formatter(lambda value, _: charts.short(value))
    for axes in (left, middle, right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=3)
    save_figure(figure, path)
