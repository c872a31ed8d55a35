"""Charts as inline SVG and pages as one HTML file, without scripts or anything from the network.

Colours are CSS variables, so a page follows the reader's light or dark setting. Charts are drawn for a width
of 360 pixels, that of a phone, and scale with their card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
MOST_POINTS = 200  # of a line; at this size a point is 1.5 pixels from the next
COLOURS = 8


class Series(NamedTuple):
    """One line. x, y: [N]; entries that are not finite leave a gap. low, high: [N] or None, a shaded band.
    colour: a number, taken modulo the palette's length. kind: "line", "thin", "dashed" or "dots"."""

    label: str
    x: Any
    y: Any
    low: Any = None
    high: Any = None
    colour: int = 0
    kind: str = "line"


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, zero: bool = False, top: float | None = None
) -> str:
    """An SVG of all series, with a legend of the labels that are not empty.

    zero: the vertical axis includes 0. top: nor does it end below this. Empty when nothing is finite.
    """
    drawn = [_thinned(one) for one in series]
    x = _finite(*(one.x for one in drawn))
    shown = (part for one in drawn for part in (one.y, one.low, one.high) if part is not None)
    y = _finite(*shown, *([np.zeros(1)] if zero else []), *([np.array([top])] if top is not None else []))
    if not x.size or not y.size:
        return ""
    x_ticks, y_ticks = ticks(x.min(), x.max(), 4), ticks(y.min(), y.max(), 5)
    x_range = (min(x.min(), x_ticks[0]), x.max()) if x.max() > x.min() else (x_ticks[0], x_ticks[-1])
    y_range = (min(y.min(), y_ticks[0]), max(y.max(), y_ticks[-1]))
    left = max(LEFT, 8 + 5.5 * max(map(len, labels(y_ticks))))
    across = lambda v: left + (v - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - left - RIGHT)
    down = lambda v: HEIGHT - BOTTOM - (v - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
    parts = [_axes(x_ticks, y_ticks, x_range, left, across, down, x_label)]
    # Bands below dots below lines, whatever the order of the series.
    parts += [_band(one, across, down) for one in drawn if one.low is not None]
    parts += [_dots(one, across, down) for one in drawn if one.kind == "dots"]
    parts += [_line(one, across, down) for one in drawn if one.kind != "dots"]
    name = escape(f"{y_label} against {x_label}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    keys = [
        f'<li><i class="{one.kind} c{one.colour % COLOURS}"></i>{escape(one.label)}</li>'
        for one in series
        if one.label
    ]
    return svg + (f"<ul class=legend>{''.join(keys)}</ul>" if keys else "")


def interval_chart(
    rows: Sequence[tuple[str, float, float, float]],
    x_label: str,
    colour: int = 0,
    axis: Sequence[float] = (),
) -> str:
    """Points with intervals, one row each: (label, value, low, high); NaN bounds draw no interval.
    colour: of the first row, the next ones follow. axis: values that the axis includes."""
    values = _finite(np.array([row[1:] for row in rows], np.float64).ravel())
    if not values.size:
        return ""
    values = np.append(values, axis)
    marks = ticks(values.min(), values.max(), 4)
    bounds = (min(values.min(), marks[0]), max(values.max(), marks[-1]))
    height = 26 * len(rows) + BOTTOM + 4
    across = lambda v: LEFT / 2 + (v - bounds[0]) / (bounds[1] - bounds[0]) * (WIDTH - LEFT / 2 - 2 * RIGHT)
    parts = []
    for mark, text in zip(marks, labels(marks)):
        parts.append(f'<line class=grid x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="0" ')
        parts.append(f'y2="{height - BOTTOM}"/>')
        parts.append(f'<text class=x x="{across(mark):.1f}" y="{height - BOTTOM + 13}">{text}</text>')
    for i, (label, value, low, high) in enumerate(rows):
        y, shade = 26 * i + 18, f"c{(colour + i) % COLOURS}"
        parts.append(f'<text x="{LEFT / 2}" y="{y - 7}">{escape(label)}</text>')
        if np.isfinite([low, high]).all():
            line = f'x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y}" y2="{y}"'
            parts.append(f'<line class="bar {shade}" {line}/>')
        if np.isfinite(value):
            parts.append(f'<circle class="mark {shade}" cx="{across(value):.1f}" cy="{y}" r="4"/>')
    parts.append(f'<text class=x x="{WIDTH / 2}" y="{height - 5}">{escape(x_label)}</text>')
    name = escape(x_label)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from at most ``low`` to at least ``high``, at least two."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / count
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float, digits: int = 3) -> str:
    """At most about five characters: 20k, 1.5M, 0.02, 3e-5; ``-`` for what is not finite."""
    if not math.isfinite(value):
        return "-"
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g}{unit}"
    if value and abs(value) < 1e-3:
        return f"{value:.{digits - 3}e}".replace("e-0", "e-")
    return f"{value:.{digits}g}"


def labels(marks: Sequence[float]) -> list[str]:
    """`short` with as many digits as it takes to tell neighbours apart."""
    for digits in range(3, 9):
        texts = [short(mark, digits) for mark in marks]
        if len(set(texts)) == len(texts):
            break
    return texts


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; the first column names the row, numbers in the others are aligned to the right."""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    cells = lambda row: (
        f"<th>{escape(str(row[0]))}</th>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
    )
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<div class=scroll><table>{header}<tbody>{body}</tbody></table></div>"


def card(title: str, content: str, note: str = "", wide: bool = False) -> str:
    """A titled box; nothing for empty content. note: plain text below."""
    if not content:
        return ""
    below = f"<p class=note>{escape(note)}</p>" if note else ""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h3>{escape(title)}</h3>{content}{below}</section>"


def group(title: str, cards: Sequence[str], note: str = "") -> str:
    """A heading above cards side by side; nothing without cards."""
    kept = "".join(cards)
    below = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<h2>{escape(title)}</h2>{below}<div class=cards>{kept}</div>" if kept else ""


def page(title: str, body: str) -> str:
    """A whole HTML file."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _finite(*arrays: Any) -> np.ndarray:
    joined = np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays] or [np.zeros(0)])
    return joined[np.isfinite(joined)]


def _thinned(series: Series) -> Series:
    """Arrays of numbers, long ones as means of consecutive points, or of dots some."""
    size = np.size(series.x)
    width = math.ceil(size / MOST_POINTS)

    def thin(column: Any) -> np.ndarray | None:
        if column is None:
            return None
        column = np.asarray(column, np.float64)
        if series.kind == "dots" or width <= 1:
            return column[:: max(1, width)]
        return np.array([column[i : i + width].mean() for i in range(0, size, width)])

    x, y, low, high = map(thin, series[1:5])
    return series._replace(x=x, y=y, low=low, high=high)


def _axes(x_ticks, y_ticks, x_range, left: float, across, down, x_label: str) -> str:
    parts = []
    for value, label in zip(y_ticks, labels(y_ticks)):
        y = f"{down(value):.1f}"
        parts.append(f'<line class=grid x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class=y x="{left - 5:.1f}" y="{down(value) + 3.5:.1f}">{label}</text>')
    for value, label in zip(x_ticks, labels(x_ticks)):
        if x_range[0] <= value <= x_range[1]:
            x = min(across(value), WIDTH - 3.2 * len(label))  # the last one is not cut off at the edge
            parts.append(f'<text class=x x="{x:.1f}" y="{HEIGHT - 20}">{label}</text>')
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class=x x="{middle:.1f}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
    return "".join(parts)


def _runs(ok: np.ndarray) -> list[np.ndarray]:
    """Indices of stretches of True."""
    index = np.flatnonzero(ok)
    return [part for part in np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if part.size]


def _line(one: Series, across, down) -> str:
    parts = []
    for run in _runs(np.isfinite(one.x) & np.isfinite(one.y)):
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(one.x[run], one.y[run]))
        if run.size == 1:
            x, y = points.split(",")
            parts.append(f'<circle class="mark c{one.colour % COLOURS}" cx="{x}" cy="{y}" r="2.5"/>')
        else:
            parts.append(f'<polyline class="{one.kind} c{one.colour % COLOURS}" points="{points}"/>')
    return "".join(parts)


def _dots(one: Series, across, down) -> str:
    ok = np.isfinite(one.x) & np.isfinite(one.y)
    return "".join(
        f'<circle class="dot c{one.colour % COLOURS}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2"/>'
        for x, y in zip(one.x[ok], one.y[ok])
    )


def _band(one: Series, across, down) -> str:
    parts = []
    for run in _runs(np.isfinite(one.x) & np.isfinite(one.low) & np.isfinite(one.high)):
        there = [f"{across(one.x[i]):.1f},{down(one.high[i]):.1f}" for i in run]
        back = [f"{across(one.x[i]):.1f},{down(one.low[i]):.1f}" for i in run[::-1]]
        parts.append(f'<polygon class="band c{one.colour % COLOURS}" points="{" ".join(there + back)}"/>')
    return "".join(parts)


LIGHT = ("#0b6fb8", "#c8601c", "#2f8a3e", "#a13fa8", "#b8860b", "#c0364c", "#1f8f8f", "#6a6a75")
DARK = ("#5db3f2", "#f29a5c", "#74c983", "#d58bdb", "#e2b84b", "#f27a8c", "#5fcaca", "#a9a9b5")
STYLE = (
    ":root{color-scheme:light dark;--back:#f6f7f9;--card:#fff;--text:#1c232b;--soft:#5b6672;--grid:#e3e7ec;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(LIGHT))
    + "}@media(prefers-color-scheme:dark){:root{--back:#14181d;--card:#1c2229;--text:#e6eaee;--soft:#9aa7b4;"
    + "--grid:#323b45;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK))
    + "}}"
    + "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(COLOURS))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:15px/1.45 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:1.6em 0 .5em}
h3{font-size:.95rem;margin:0 0 .4em}
.note,.lead{color:var(--soft);font-size:.85rem;margin:.5em 0;overflow-wrap:anywhere}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
section{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px;min-width:0}
.wide{grid-column:1/-1}
@media(min-width:720px){.wide{grid-column:span 2}.wide svg text{font-size:6px}.wide .grid{stroke-width:.5}
.wide polyline{stroke-width:1.2}.wide polyline.thin{stroke-width:.6}.wide .dot{r:1.2px}}
.figures{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0;padding:0;list-style:none}
.figures li{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:8px 14px}
.figures b{display:block;font-size:1.25rem}.figures span{color:var(--soft);font-size:.8rem}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:10px}.x{text-anchor:middle}.y{text-anchor:end}
.grid{stroke:var(--grid);stroke-width:1}
polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
polyline.thin{stroke-width:1;opacity:.6}polyline.dashed{stroke-dasharray:5 3}
.band{fill:var(--c);opacity:.17}.dot{fill:var(--c);opacity:.5}.mark{fill:var(--c)}
.bar{stroke:var(--c);stroke-width:6;opacity:.45;stroke-linecap:round}
.legend{list-style:none;margin:.4em 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8rem;
color:var(--soft)}
.legend i{display:inline-block;width:16px;margin-right:5px;vertical-align:middle;
border-top:3px solid var(--c)}
.legend i.thin{border-top-width:1px}.legend i.dashed{border-top-style:dashed}
.legend i.dots{width:6px;height:6px;border:0;border-radius:3px;background:var(--c)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{padding:3px 10px 3px 0;border-bottom:1px solid var(--grid);text-align:left;font-weight:normal}
thead th{color:var(--soft)}td{text-align:right;font-variant-numeric:tabular-nums}
details{margin:.5em 0}summary{cursor:pointer}
.settings td{text-align:left;overflow-wrap:anywhere}
"""
)
