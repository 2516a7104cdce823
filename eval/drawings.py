"""Small drawings as inline SVG: their colours are CSS classes of the page, so they follow light, dark and paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from histoscale.eval.scores.binomial import wilson
from histoscale.eval.scores.calibration import Bins

LABEL_PX, PLOT_PX, VALUE_PX, ROW_PX = 220, 400, 200, 24
_LEAST_PX = 560  # a narrow screen scrolls a drawing rather than shrinking its letters further
_LETTERS = 27  # of a label; longer ones are cut at the front


@dataclass(frozen=True)
class Mark:
    """One row of an interval plot. look: `ours`, `outside`, `floor` or `published`. low, high: None without an interval.
    value: its text."""

    label: str
    point: float
    low: float | None
    high: float | None
    look: str
    value: str


def interval_plot(marks: Sequence[Mark], axis: str, chance: float | None) -> Markup:
    """Points with their intervals, one row each: discs are ours, squares are floors, hollow diamonds were published by others."""
    ends = [end for mark in marks for end in (mark.point, mark.low, mark.high) if end is not None]
    low, high, ticks = _scale([*ends, *([chance] if chance is not None else [])])
    width, bottom = LABEL_PX + PLOT_PX + VALUE_PX, 12 + ROW_PX * len(marks)
    x = _line(low, high, LABEL_PX, LABEL_PX + PLOT_PX)
    parts = [_grid_line(x(tick), 8, bottom) + _text(x(tick), bottom + 16, f"{tick:g}", "middle", "quiet") for tick in ticks]
    if chance is not None:
        parts.append(_segment(x(chance), 8, x(chance), bottom, "chance"))
        parts.append(_text(x(chance), bottom + 30, "chance", "middle", "quiet"))
    for row, mark in enumerate(marks):
        y = 8 + ROW_PX * (row + 0.5)
        parts.append(_text(LABEL_PX - 14, y + 4, _cut(mark.label), "end", mark.look, mark.label))
        if mark.low is not None and mark.high is not None:
            parts.append(_segment(x(mark.low), y, x(mark.high), y, f"whisker {mark.look}"))
        parts.append(_point(x(mark.point), y, mark.look))
        parts.append(_text(LABEL_PX + PLOT_PX + 14, y + 4, mark.value, "start", f"figures {mark.look}"))
    parts.append(_text(LABEL_PX + PLOT_PX / 2, bottom + (46 if chance is not None else 34), axis, "middle", "quiet"))
    return _svg(width, bottom + 54, parts, f"{axis} of {', '.join(mark.label for mark in marks)}")


def reliability_plot(bins: Bins, positive: str) -> Markup:
    """Observed rate against predicted probability, a disc a bin, its area by its share; bars: Wilson intervals."""
    side, left, top = 260, 56, 12
    x, y = _line(0, 1, left, left + side), _line(0, 1, top + side, top)
    parts = [_segment(x(0), y(0), x(1), y(1), "chance")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [_grid_line(x(tick), top, top + side), _segment(left, y(tick), left + side, y(tick), "gridline")]
        parts += [
            _text(x(tick), top + side + 16, f"{tick:g}", "middle", "quiet"),
            _text(left - 8, y(tick) + 4, f"{tick:g}", "end", "quiet"),
        ]
    for count, predicted, observed in zip(bins.count.tolist(), bins.predicted.tolist(), bins.observed.tolist(), strict=True):
        low, high = wilson(round(observed * count), count)
        parts.append(_segment(x(predicted), y(low), x(predicted), y(high), "whisker thin ours"))
        radius = 2.5 + 9 * math.sqrt(count / bins.count.sum())
        disc = Markup('<circle class="point ours" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>')
        parts.append(disc.format(x(predicted), y(observed), radius))
    parts.append(_text(left + side / 2, top + side + 36, f"predicted probability of {positive}", "middle", "quiet"))
    parts.append(_turned(14, top + side / 2, f"observed rate of {positive}"))
    return _svg(left + side + 16, top + side + 46, parts, f"Reliability of the predicted probability of {positive}")


@dataclass(frozen=True)
class Line:
    """A line of steps or points: [k, 2]; marks: [m, 2], discs on it. look: `ours`, `outside` or `floor`."""

    label: str
    points: np.ndarray
    marks: np.ndarray
    look: str


def roc_plot(lines: Sequence[Line]) -> Markup:
    """True-positive over false-positive rate; discs: what the carried thresholds do. Each line is named in the legend below."""
    x, y, parts = _square((0.0, 1.0), (0.0, 1.0), "1 − specificity", "sensitivity")
    parts.append(_segment(x(0), y(0), x(1), y(1), "chance"))
    return _lines(parts, lines, x, y, f"ROC curves of {', '.join(line.label for line in lines)}")


def survival_plot(lines: Sequence[Line], time: str) -> Markup:
    """Share without the event over time; discs: censored."""
    last = max(float(line.points[:, 0].max()) for line in lines)
    x, y, parts = _square((0.0, last), (0.0, 1.0), time, "share without the event")
    return _lines(parts, lines, x, y, f"Survival curves of {', '.join(line.label for line in lines)}")


def steps_plot(lines: Sequence[Line], axis: str, level: float | None) -> Markup:
    """A read-out over the steps of training; level: a dotted line, what it must leave or reach."""
    values = [*(v for line in lines for v in line.points[:, 1].tolist()), *([level] if level is not None else [])]
    last = max(float(line.points[:, 0].max()) for line in lines)
    x, y, parts = _square((0.0, last), (min(values), max(values)), "step", axis)
    if level is not None:
        parts.append(_segment(x(0), y(level), x(last), y(level), "chance"))
    return _lines(parts, lines, x, y, f"{axis} over the steps of {', '.join(line.label for line in lines)}")


def scatter_plot(points: np.ndarray, value: str) -> Markup:
    """points: [n, 2], observed and predicted, a disc each; the line where they are equal."""
    low, high, _ = _scale([float(points.min()), float(points.max())])
    x, y, parts = _square((low, high), (low, high), f"observed {value}", f"predicted {value}")
    parts.append(_segment(x(low), y(low), x(high), y(high), "chance"))
    disc = Markup('<circle class="point ours" cx="{:.1f}" cy="{:.1f}" r="3"/>')
    parts += [disc.format(x(a), y(b)) for a, b in points.tolist()]
    return _svg(_SIDE + 88, _SIDE + 58, parts, f"Predicted over observed {value}")


def kaplan_meier(times: np.ndarray, events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps [k, 2], censored [m, 2]): time and share without the event (Kaplan and Meier 1958, doi 10.2307/2281868)."""
    steps, censored, share = [(0.0, 1.0)], [], 1.0
    for time in np.unique(times).tolist():
        here, at_risk = times == time, int((times >= time).sum())
        died = int((here & events).sum())
        if died:
            steps.append((time, share))
            share *= 1 - died / at_risk
            steps.append((time, share))
        if (here & ~events).any():
            censored.append((time, share))
    steps.append((float(times.max()), share))
    return np.array(steps), np.array(censored).reshape(-1, 2)


_SIDE = 300


def _square(
    across: tuple[float, float], upward: tuple[float, float], x_name: str, y_name: str
) -> tuple["_line", "_line", list[Markup]]:
    left, top = 60, 12
    (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = _scale(across), _scale(upward)
    x, y = _line(x_low, x_high, left, left + _SIDE), _line(y_low, y_high, top + _SIDE, top)
    parts = [_grid_line(x(t), top, top + _SIDE) + _text(x(t), top + _SIDE + 16, f"{t:g}", "middle", "quiet") for t in x_ticks]
    parts += [
        _segment(left, y(t), left + _SIDE, y(t), "gridline") + _text(left - 8, y(t) + 4, f"{t:g}", "end", "quiet")
        for t in y_ticks
    ]
    parts += [_text(left + _SIDE / 2, top + _SIDE + 36, x_name, "middle", "quiet"), _turned(14, top + _SIDE / 2, y_name)]
    return x, y, parts


def _lines(parts: list[Markup], lines: Sequence[Line], x: "_line", y: "_line", words: str) -> Markup:
    legend = _SIDE + 66
    for row, line in enumerate(lines):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points.tolist())
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(line.look, path))
        parts += [_point(x(a), y(b), line.look) for a, b in line.marks.tolist()]
        at = legend + 20 * row
        parts += [_segment(60, at, 84, at, f"whisker {line.look}"), _text(92, at + 4, line.label, "start", line.look)]
    return _svg(_SIDE + 160, legend + 20 * len(lines), parts, words)


@dataclass(frozen=True)
class Curve:
    """One encoder over shots: x, points, lows and highs (None without an interval). look: `ours` or `floor`."""

    label: str
    x: Sequence[int]
    points: Sequence[float]
    ends: Sequence[tuple[float, float] | None]
    look: str


def shots_plot(curves: Sequence[Curve], axis: str, chance: float | None) -> Markup:
    """A metric over images a class, on a scale of doublings; each curve is named at its end."""
    left, top, wide, tall = 60, 12, 420, 240
    shots = sorted({x for curve in curves for x in curve.x})
    ends = [value for curve in curves for pair in curve.ends if pair for value in pair]
    low, high, ticks = _scale([*ends, *(p for curve in curves for p in curve.points), *([chance] if chance is not None else [])])
    y = _line(low, high, top + tall, top)
    x = _line(math.log2(shots[0]), math.log2(max(shots[-1], 2 * shots[0])), left + 14, left + wide - 14)
    parts = [
        _segment(left, y(t), left + wide, y(t), "gridline") + _text(left - 8, y(t) + 4, f"{t:g}", "end", "quiet") for t in ticks
    ]
    parts += [_text(x(math.log2(n)), top + tall + 16, str(n), "middle", "quiet") for n in shots]
    if chance is not None:
        parts += [
            _segment(left, y(chance), left + wide, y(chance), "chance"),
            _text(left + 4, y(chance) - 5, "chance", "start", "quiet"),
        ]
    places = _apart([y(curve.points[-1]) for curve in curves], 15)
    for place, (curve, at) in enumerate(zip(curves, places, strict=True)):
        along = [x(math.log2(n)) + 3 * (place - (len(curves) - 1) / 2) for n in curve.x]
        path = " ".join(f"{a:.1f},{y(p):.1f}" for a, p in zip(along, curve.points, strict=True))
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(curve.look, path))
        for a, point, pair in zip(along, curve.points, curve.ends, strict=True):
            if pair:
                parts.append(_segment(a, y(pair[0]), a, y(pair[1]), f"whisker thin {curve.look}"))
            parts.append(_point(a, y(point), curve.look))
        parts.append(_text(left + wide + 10, at + 4, _cut(curve.label), "start", curve.look, curve.label))
    parts.append(_text(left + wide / 2, top + tall + 36, "training images a class", "middle", "quiet"))
    parts.append(_turned(14, top + tall / 2, axis))
    words = f"{axis} over training images a class: {', '.join(c.label for c in curves)}"
    return _svg(left + wide + 260, top + tall + 46, parts, words)


@dataclass(frozen=True)
class Levels:
    """One line over levels that are put at equal steps. points: None where it says nothing there. look: `ours` or `floor`."""

    label: str
    points: Sequence[float | None]
    ends: Sequence[tuple[float, float] | None]
    look: str


def levels_plot(names: Sequence[str], lines: Sequence[Levels], axis: str, below: str, chance: float | None) -> Markup:
    """A number over named levels, left to right; below: what the levels are. Each line is named at its end."""
    left, top, wide, tall = 60, 12, 420, 200
    values = [p for line in lines for p in line.points if p is not None]
    ends = [end for line in lines for pair in line.ends if pair for end in pair]
    low, high, ticks = _scale([*values, *ends, *([chance] if chance is not None else [])])
    x, y = _line(0, max(len(names) - 1, 1), left + 24, left + wide - 24), _line(low, high, top + tall, top)
    parts = [
        _segment(left, y(t), left + wide, y(t), "gridline") + _text(left - 8, y(t) + 4, f"{t:g}", "end", "quiet") for t in ticks
    ]
    parts += [_text(x(place), top + tall + 16, name, "middle", "quiet") for place, name in enumerate(names)]
    if chance is not None:
        parts.append(_segment(left, y(chance), left + wide, y(chance), "chance"))
        parts.append(_text(left + 4, y(chance) - 5, "chance", "start", "quiet"))
    last = [next(p for p in reversed(line.points) if p is not None) for line in lines]
    places = _apart([y(point) for point in last], 15)
    for number, (line, at) in enumerate(zip(lines, places, strict=True)):
        aside = 3 * (number - (len(lines) - 1) / 2)
        spots = [
            (x(i) + aside, y(p), pair) for i, (p, pair) in enumerate(zip(line.points, line.ends, strict=True)) if p is not None
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in spots)
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(line.look, path))
        for a, b, pair in spots:
            if pair:
                parts.append(_segment(a, y(pair[0]), a, y(pair[1]), f"whisker thin {line.look}"))
            parts.append(_point(a, b, line.look))
        parts.append(_text(left + wide + 10, at + 4, _cut(line.label), "start", line.look, line.label))
    parts.append(_text(left + wide / 2, top + tall + 36, below, "middle", "quiet"))
    parts.append(_turned(14, top + tall / 2, axis))
    return _svg(left + wide + 260, top + tall + 46, parts, f"{axis} over {below}: {', '.join(line.label for line in lines)}")


def genes_plot(genes: Sequence[str], ours: np.ndarray, floor: np.ndarray | None, columns: int = 2) -> Markup:
    """Pearson r a gene, best first, in columns; hollow squares: the floor. NaN is written in words."""
    order = sorted(range(len(genes)), key=lambda i: -np.nan_to_num(ours[i], nan=-2.0))
    finite = [float(v) for values in (ours, floor) if values is not None for v in values if np.isfinite(v)]
    low, high, ticks = _scale([0.0, *finite])
    rows, step, name = -(-len(order) // columns), 17, 92
    wide = 270
    parts = []
    for column in range(columns):
        left = column * (name + wide + 30) + name
        x = _line(low, high, left, left + wide)
        parts += [
            _grid_line(x(t), 6, 10 + step * rows) + _text(x(t), 26 + step * rows, f"{t:g}", "middle", "quiet") for t in ticks
        ]
        parts.append(_segment(x(0), 6, x(0), 10 + step * rows, "chance"))
        for row, gene in enumerate(order[column * rows : (column + 1) * rows]):
            y = 8 + step * (row + 0.5)
            parts.append(_text(left - 10, y + 4, str(genes[gene])[:12], "end", "ours", str(genes[gene])))
            if not np.isfinite(ours[gene]):
                parts.append(_text(x(0) + 4, y + 4, "undefined: constant in a test part", "start", "quiet"))
                continue
            parts.append(_segment(x(0), y, x(float(ours[gene])), y, "whisker thin ours"))
            if floor is not None and np.isfinite(floor[gene]):
                parts.append(_point(x(float(floor[gene])), y, "floor"))
            parts.append(_point(x(float(ours[gene])), y, "ours"))
    width = columns * (name + wide + 30)
    parts.append(_text(width / 2, 44 + step * rows, "Pearson r of predicted and measured log1p counts", "middle", "quiet"))
    return _svg(width, 52 + step * rows, parts, f"Pearson r of {len(genes)} genes")


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis that holds the values, at round numbers."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-3)
    step = 10 ** math.floor(math.log10(span / 2))
    step = next(step * times for times in (1, 2, 2.5, 5, 10) if span / (step * times) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    return ticks[0], ticks[-1] if len(ticks) > 1 else ticks[0] + step, ticks


class _line:
    """A value to its place in px."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.slope, self.start = low, (stop - start) / (high - low), start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The places moved down as little as keeps them `least` px apart."""
    moved, last = [0.0] * len(places), -math.inf
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        last = moved[i] = max(places[i], last + least)
    return moved


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else "…" + text[-(_LETTERS - 1) :]


def _text(x: float, y: float, text: str, anchor: str, look: str, title: str = "") -> Markup:
    whole = Markup("<title>{}</title>").format(title) if title and title != text else Markup("")
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}{}</text>').format(look, x, y, anchor, text, whole)


def _turned(x: float, y: float, text: str) -> Markup:
    turn = Markup('<text class="quiet" text-anchor="middle" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>')
    return turn.format(x, y, text)


def _segment(x1: float, y1: float, x2: float, y2: float, look: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(look, x1, y1, x2, y2)


def _grid_line(x: float, top: float, bottom: float) -> Markup:
    return _segment(x, top, x, bottom, "gridline")


def _point(x: float, y: float, look: str) -> Markup:
    if look == "floor":
        return Markup('<rect class="point floor" x="{:.1f}" y="{:.1f}" width="8" height="8"/>').format(x - 4, y - 4)
    if look == "published":
        corners = f"{x:.1f},{y - 5.5:.1f} {x + 5.5:.1f},{y:.1f} {x:.1f},{y + 5.5:.1f} {x - 5.5:.1f},{y:.1f}"
        return Markup('<polygon class="point published" points="{}"/>').format(corners)
    return Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(look, x, y)


def _svg(width: float, height: float, parts: Sequence[Markup], words: str) -> Markup:
    head = Markup(
        '<svg viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" style="min-width:{2:.0f}px" '
        'role="img" aria-label="{3}">'
    ).format(width, height, min(width, _LEAST_PX), words)
    return head + Markup("").join(parts) + Markup("</svg>")
