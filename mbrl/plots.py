"""The learning curve of a run as one picture, with the published curve beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbrl.published import PublishedCurve
from mbrl.statistics import bootstrap_interval, iqm

Points = Any  # [N] pairs (frames, return), or an array [N, 2]

_OURS, _PUBLISHED, _TRAINING = "#0b6fb8", "#d1702a", "#8fa3b3"
_LINES = _OURS, _PUBLISHED, _TRAINING, "#3d8f5a", "#7a4fb5"


def aggregate(evaluations: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(frames [K], IQM [K], low [K], high [K]) over seeds, at the frames where every seed was evaluated.

    evaluations: per seed, (frames, return) points. Non-finite returns are left out of their point. low and
    high are the 95 % bootstrap interval, NaN with one seed.
    """
    if not evaluations:
        return np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0)
    by_seed = [{float(frame): float(value) for frame, value in points} for points in evaluations]
    frames = sorted(set.intersection(*(set(points) for points in by_seed)))
    columns = [np.array([points[frame] for points in by_seed], dtype=np.float64) for frame in frames]
    columns = [column[np.isfinite(column)] for column in columns]
    frames = np.array([f for f, column in zip(frames, columns, strict=True) if column.size], dtype=np.float64)
    columns = [column for column in columns if column.size]
    centre = np.array([iqm(column) for column in columns])
    intervals = np.array([bootstrap_interval(column, samples=1000) for column in columns]).reshape(-1, 2)
    return frames, centre, intervals[:, 0], intervals[:, 1]


def save_curve(
    path: str | os.PathLike,
    evaluations: Sequence[Points],
    training: Sequence[Points] | None = None,
    published: PublishedCurve | None = None,
    title: str = "",
    unit: str = "frames",
    alike: bool = True,
) -> None:
    """Draw return against simulator frames, or another ``unit``, and write it to ``path`` (PNG, replaced
    atomically).

    evaluations: per seed, its evaluation points (frames, return): thin lines, with the IQM over seeds thick
    and its 95 % bootstrap interval shaded. training: per seed, its training episodes (frames, return): dots.
    published: drawn as mean +- one standard deviation over its seeds, as far as our run goes and half as far
    again. title: of the picture. alike: whether the seeds have equal settings; else there is no IQM. Any of
    the others may be empty. Raises OSError when the file cannot be written.
    """
    figure, axes = _figure()
    episodes = [point for points in training or () for point in points]
    ours = [frame for points in [*evaluations, episodes] for frame, _ in points]
    last = max(ours, default=0.0)
    if published is not None:
        last = max(last, min(1.5 * last, published.frames[-1])) if ours else published.frames[-1]

    _draw_evaluations(axes, evaluations, alike)
    if episodes:
        x, y = np.array(episodes, dtype=np.float64).T
        style = {"color": _TRAINING, "ms": 5, "alpha": 0.6, "mec": "none", "zorder": 1}
        axes.plot(x, y, ".", label="training episodes", **style)
    if published is not None:
        _draw_published(axes, published, float(last))

    axes.set_xlim(0, 1.02 * last or 1.0)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("simulator frames" if unit == "frames" else unit)
    axes.set_ylabel("episode return")
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    _save(figure, axes, path, title)


def save_lines(
    path: str | os.PathLike,
    lines: Mapping[str, tuple[Sequence[Any], Any]],
    x_label: str,
    y_label: str,
    title: str = "",
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """Draw several named results, of several seeds each, and write them to ``path`` (PNG, replaced
    atomically).

    lines: by name, x [K], numbers or words, and y [K, S]; a thin line per seed and a thick one for their
    mean. title: of the picture. limits: of the vertical axis, where they are not those of the values. Raises
    OSError when the file cannot be written.
    """
    figure, axes = _figure()
    for i, (name, (x, values)) in enumerate(lines.items()):
        values, colour = np.asarray(values, np.float64), _LINES[i % len(_LINES)]
        axes.plot(x, values.mean(1), color=colour, lw=2.4, marker="o", ms=3.5, zorder=4, label=name)
        axes.plot(x, values, color=colour, lw=0.9, alpha=0.55, zorder=3)
    axes.set_ylim(*limits)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _save(figure, axes, path, title)


def _figure():
    """A figure and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display, faster start

    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure, axes, path: str | os.PathLike, title: str) -> None:
    """Grid, title and legend; then the file, at once."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontweight="bold")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", fontsize=7.5, frameon=False, ncols=2)

    save_figure(figure, path)


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a matplotlib figure as PNG, replacing an older file atomically. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_evaluations(axes, evaluations: Sequence[Points], alike: bool) -> None:
    drawn = [
        np.array(sorted(map(tuple, points)), dtype=np.float64).T for points in evaluations if len(points)
    ]
    if not drawn:
        return
    thick = {"color": _OURS, "lw": 2.4, "marker": "o", "ms": 3.5, "zorder": 4}
    if len(evaluations) == 1:
        axes.plot(*drawn[0], label="evaluation", **thick)
        return
    if alike:
        frames, centre, low, high = aggregate(evaluations)
        axes.plot(frames, centre, label=f"evaluation, IQM of {len(evaluations)} seeds", **thick)
        label = "its 95 % bootstrap interval"
        axes.fill_between(frames, low, high, color=_OURS, alpha=0.18, lw=0, label=label)
    each = "each seed" if alike else "evaluation of each seed; their settings differ"
    for i, (x, y) in enumerate(drawn):
        axes.plot(x, y, color=_OURS, lw=0.9, alpha=0.55, zorder=3, label=None if i else each)


def _draw_published(axes, published: PublishedCurve, until: float) -> None:
    # One point beyond the limit, so that the line reaches the edge of the picture.
    shown = min(int(np.searchsorted(published.frames, until)) + 1, len(published.frames))
    x, mean, std = (values[:shown] for values in (published.frames, published.mean, published.std))
    source = published.source.replace(" (", "\n(")
    label = f"{published.label}\n{source}"
    axes.fill_between(x, mean - std, mean + std, color=_PUBLISHED, alpha=0.14, lw=0)
    axes.plot(x, mean, color=_PUBLISHED, lw=1.8, ls="--", label=label)


def _short(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 else f"{value:g}"
