"""Line charts and scatter plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qvl_hydra.reports.page import number, text

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
Limits = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One point, with an optional interval in `y`, what hovering over it tells, and the plan that a click shows."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    plan: int | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour: joined by a line (with a band where there are intervals), or dots."""

    name: str
    points: Sequence[Point]
    line: bool = True
    dashed: bool = False


def chart(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    y_limits: Limits | None = None,
    diagonal: bool = False,
) -> str:
    """The chart with its legend; nothing when no point is finite.

    Args:
        log_x: binary logarithm, ticks at the values met (sizes).
        log_y: decimal logarithm of values above zero, ticks at powers of ten.
        y_limits: else taken from the data.
        diagonal: draw the line on which both coordinates are equal.
    """
    series = [Series(item.name, _finite(item.points), item.line, item.dashed) for item in series]
    points = [point for item in series for point in item.points]
    if not points:
        return ""
    xs = [math.log2(point.x) if log_x else point.x for point in points]
    ys = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    ys = [math.log10(value) for value in ys] if log_y else ys
    frame = _Frame(_widened(min(xs), max(xs)), y_limits or _widened(min(ys), max(ys)), log_x, log_y)
    ticks = sorted({point.x for point in points}) if log_x else _ticks(*frame.x_limits)
    parts = [*_axes(frame, ticks, x_title, y_title)]
    if diagonal:
        low, high = max(frame.x_limits[0], frame.y_limits[0]), min(frame.x_limits[1], frame.y_limits[1])
        parts.append(f'<path class="grid" d="M{frame.at(low, low)}L{frame.at(high, high)}"/>')
    parts += [_draw(item, index, frame) for index, item in enumerate(series)]
    legend = "".join(
        f'<li class="s{index % 4}{" dashed" if item.dashed else ""}"><span class="key"></span>{text(item.name)}</li>'
        for index, item in enumerate(series)
    )
    label = text(f"{y_title} over {x_title}")
    svg = f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
    return f'<figure style="margin:0"><ul class="legend">{legend}</ul>{svg}</figure>'


@dataclass(frozen=True)
class _Frame:
    x_limits: Limits
    y_limits: Limits
    log_x: bool
    log_y: bool

    def x(self, value: float) -> float:
        value = math.log2(value) if self.log_x else value
        low, high = self.x_limits
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log_y else value
        low, high = self.y_limits
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f} {self.y(y):.1f}"


def _axes(frame: _Frame, x_ticks: Sequence[float], x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in _powers(*frame.y_limits) if frame.log_y else _ticks(*frame.y_limits):
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        said = f"1e{round(math.log10(tick))}" if frame.log_y else number(float(tick))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{frame.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{text(x_title)}</text>')
    parts.append(f'<text transform="translate(12 {centre}) rotate(-90)" text-anchor="middle">{text(y_title)}</text>')
    return parts


def _draw(series: Series, index: int, frame: _Frame) -> str:
    parts = []
    ranged = [point for point in series.points if point.low is not None and point.high is not None]
    if series.line and len(ranged) > 1:
        upper = [frame.at(point.x, point.high or 0.0) for point in ranged]
        lower = [frame.at(point.x, point.low or 0.0) for point in reversed(ranged)]
        parts.append(f'<path class="band" d="M{"L".join(upper + lower)}Z"/>')
    elif ranged:
        parts += [
            f'<path class="whisker" d="M{frame.at(p.x, p.low or 0.0)}L{frame.at(p.x, p.high or 0.0)}"/>' for p in ranged
        ]
    if series.line and len(series.points) > 1:
        path = "L".join(frame.at(point.x, point.y) for point in series.points)
        parts.append(f'<path class="curve{" dashed" if series.dashed else ""}" d="M{path}"/>')
    for point in series.points:
        tip = f' data-tip="{text(point.tip)}"' if point.tip else ""
        tip += "" if point.plan is None else f' data-plan="{point.plan}"'
        parts.append(f'<circle class="dot" r="3.5" cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}"{tip}/>')
    return f'<g class="s{index % 4}">{"".join(parts)}</g>'


def _finite(points: Sequence[Point]) -> list[Point]:
    def known(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return [
        Point(point.x, point.y, known(point.low), known(point.high), point.tip, point.plan)
        for point in points
        if math.isfinite(point.x) and math.isfinite(point.y)
    ]


def _widened(low: float, high: float) -> Limits:
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two exponents, about five of them."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    return [10.0**exponent for exponent in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two limits, about five of them."""
    raw = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]
