"""The geometry of the page's plots; the template turns it into SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Segment:
    """One outcome's part of a stacked bar: `start` and `width` in percent of the bar."""

    outcome: str
    start: float
    width: float


def stacked(rates: Mapping[str, Mapping[str, float]], outcomes: Sequence[str]) -> list[Segment]:
    """One bar: the outcomes' rates side by side, in the given order."""
    segments, start = [], 0.0
    for outcome in outcomes:
        width = 100 * rates[outcome]["rate"] if outcome in rates else 0.0
        if width:
            segments.append(Segment(outcome, round(start, 3), round(width, 3)))
        start += width
    return segments


@dataclass(frozen=True)
class Span:
    """A rate with its interval, as a position in [0, 1]."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A model on the plane of harm (x) and help (y); `number` is its place among all models, from 1."""

    number: int
    model: str
    unsafe: Span
    helpful: Span


def trade_off(models: Mapping[str, Any]) -> list[Point]:
    """Every model that has both a toxic unsafe and a harmless helpful rate."""
    points = []
    for number, (name, model) in enumerate(models.items(), start=1):
        unsafe = model.get("toxic", {}).get("unsafe")
        helpful = model.get("harmless", {}).get("helpful")
        if unsafe and helpful:
            x, y = (Span(rate["rate"], rate["low"], rate["high"]) for rate in (unsafe, helpful))
            points.append(Point(number, name, x, y))
    return points


@dataclass(frozen=True)
class Curve:
    """A quantity over training: `points` as (x, y) in [0, 1], y upwards, with the values at the edges."""

    name: str
    points: list[tuple[float, float]]
    rounds: list[float]
    steps: tuple[float, float]
    low: float
    high: float
    first: float
    last: float


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """One curve for each numeric column but step and round; `rounds` is where each further round begins.

    A round that counts its steps afresh goes on where the one before it ended. A row may leave out columns,
    and values that aren't finite are left out.
    """
    steps: list[float] = []
    offset = 0.0
    for index, row in enumerate(metrics):
        step = row.get("step", index) + offset
        if steps and step < steps[-1]:
            step, offset = step - offset + steps[-1], steps[-1]
        steps.append(step)
    names = dict.fromkeys(name for row in metrics for name in row if name not in ("step", "round"))
    turns = [
        step
        for step, row, before in zip(steps[1:], metrics[1:], metrics, strict=False)
        if row.get("round") != before.get("round")
    ]
    found = []
    for name in names:
        series = [(step, row[name]) for step, row in zip(steps, metrics, strict=True) if _finite(row.get(name))]
        if not series:
            continue
        values = [value for _, value in series]
        low, high, start, end = min(values), max(values), min(steps), max(steps)
        across, up = (end - start) or 1.0, (high - low) or 1.0
        points = [(round((step - start) / across, 4), round((value - low) / up, 4)) for step, value in series]
        rounds = [round((turn - start) / across, 4) for turn in turns]
        found.append(Curve(name, points, rounds, (start, end), low, high, values[0], values[-1]))
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
