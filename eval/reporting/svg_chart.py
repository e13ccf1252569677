"""Charts as small SVG texts: horizontal bars with intervals, and points with intervals both ways.

Written by hand rather than by a plotting library so that the page decides the colours (dark, light, print) through
classes, text stays text, and the same numbers give the same bytes. Colours are classes c0 to c7, and the shape of
a mark changes with them, for readers who cannot tell the colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval.reporting.chart_scale import Limits, Scale, padded, rounded_ticks, settings_scale, span, tick_text

WIDTH = 460
NUM_COLOURS = 8
NUM_SHAPES = 6
CHARACTER = 6.3
"Width of an average character of a label."
LABEL_LENGTH = 20
TICK_ROOM = 26
"Pixels between the middles of two numbers below an axis; one that comes closer is left out."

Segment = tuple[float, float, float, float]
"Of a line: x1, y1, x2, y2. Of a box: left, top, right, bottom."


@dataclass(frozen=True)
class Bar:
    """One row: its label, colour, value with limits (None: no interval) and the text that says them."""

    label: str
    style: int
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), each (value, low, high); points of one `group` are joined in order; `ring` sets it apart."""

    label: str
    style: int
    group: str
    x: Limits
    y: Limits
    ring: bool
    text: str


def _shortened(label: str, length: int = LABEL_LENGTH) -> str:
    label = " ".join(label.split())
    return label if len(label) <= length else label[: length - 1] + "…"


# --- pieces -----------------------------------------------------------------------------------------------


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    return Markup('<text class="{} {}" x="{:.1f}" y="{:.1f}">{}</text>').format(anchor, kind, x, y, text)


def mark(x: float, y: float, style: int, size: float = 4.5) -> Markup:
    """The shape of a style around (x, y)."""
    s = size
    match style % NUM_SHAPES:
        case 0:
            return Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(x, y, s)
        case 1:
            corners = [(-s, -s), (s, -s), (s, s), (-s, s)]
        case 2:
            corners = [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)]
        case 3:
            corners = [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)]
        case 4:
            corners = [(0, 1.3 * s), (1.2 * s, -s), (-1.2 * s, -s)]
        case _:
            a, b = 0.45 * s, 1.3 * s
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            corners += [(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    places = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return Markup('<polygon class="mark" points="{}"/>').format(places)


def legend_mark(style: int) -> Markup:
    """The mark of a style by itself, for a legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 16 16" aria-hidden="true"><g class="c{}">{}</g></svg>'
    ).format(style % NUM_COLOURS, mark(8, 8, style))


def _chart(height: float, name: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, name, Markup("").join(parts)
    )


# --- charts -----------------------------------------------------------------------------------------------


def bar_chart(bars: Sequence[Bar], x_label: str, name: str, reference: float | None = None) -> Markup:
    """Horizontal bars from 0 with intervals, one row each; a dashed line at `reference`. `name` is read aloud."""
    row, top = 26, 8
    longest = max(len(_shortened(bar.label)) for bar in bars)
    left = max(40.0, longest * CHARACTER + 14)
    base = top + row * len(bars)
    low, high = span([(bar.value, bar.low, bar.high) for bar in bars] + [(0.0, reference, None)])
    room = padded(low, high)
    scale = Scale(room[0] if low < 0 else 0.0, room[1] if high > 0 else 0.0, left, WIDTH - 18)
    parts = []
    for tick in rounded_ticks(scale.low, scale.high):
        x = scale.place(tick)
        parts += [_line(x, top, x, base, "grid"), _text(x, base + 16, tick_text(tick), "middle")]
    for i, bar in enumerate(bars):
        y = top + row * (i + 0.5)
        x = sorted((scale.place(0.0), scale.place(bar.value)))
        pieces = [
            Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14"/>').format(
                x[0], y - 7, x[1] - x[0]
            )
        ]
        if bar.low is not None and bar.high is not None:
            ends = [scale.place(bar.low), scale.place(bar.high)]
            pieces.append(_line(ends[0], y, ends[1], y, "whisker"))
            pieces += [_line(end, y - 4, end, y + 4, "whisker") for end in ends]
        parts.append(
            Markup('<g class="c{}"><title>{}</title>{}</g>').format(
                bar.style % NUM_COLOURS, bar.text, Markup("").join(pieces)
            )
        )
        parts.append(_text(left - 8, y + 4, _shortened(bar.label), "end"))
    if reference is not None:
        x = scale.place(reference)
        parts.append(_line(x, top, x, base, "reference"))
    parts.append(_text(WIDTH - 18, base + 34, x_label, "end", "axis"))
    return _chart(base + 42, name, parts)


def point_chart(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    name: str,
    x_from_zero: bool = False,
    settings: bool = False,
) -> Markup:
    """Points with intervals, those of one group joined. With `settings` the ticks of x are the points' own x.

    `name` is read aloud.
    """
    height, left, top, right, bottom = 300, 52, 30, WIDTH - 18, 250
    if settings:
        x_ticks = sorted({point.x[0] for point in points})
        scale_x = settings_scale(x_ticks, left, right)
    else:
        zero = [(0.0, None, None)] if x_from_zero else []
        scale_x = Scale(*padded(*span([point.x for point in points] + zero)), left, right)
        x_ticks = rounded_ticks(scale_x.low, scale_x.high)
    scale_y = Scale(*padded(*span(point.y for point in points)), bottom, top)

    parts = []
    for tick in rounded_ticks(scale_y.low, scale_y.high):
        y = scale_y.place(tick)
        parts += [_line(left, y, right, y, "grid"), _text(left - 8, y + 4, tick_text(tick), "end")]
    parts.append(_line(left, bottom, right, bottom, "grid"))
    written = -math.inf
    for x, tick in ((scale_x.place(tick), tick) for tick in x_ticks):
        parts.append(_line(x, bottom, x, bottom + 4, "tick"))
        if x - written >= TICK_ROOM:
            parts.append(_text(x, bottom + 18, tick_text(tick), "middle"))
            written = x
    parts += [_text(8, 14, y_label, "start", "axis"), _text(right, height - 12, x_label, "end", "axis")]

    places = [(scale_x.place(point.x[0]), scale_y.place(point.y[0])) for point in points]
    drawn: list[Segment] = []
    for group in dict.fromkeys(point.group for point in points):
        members = [i for i, point in enumerate(points) if point.group == group]
        drawn += [(*places[i], *places[j]) for i, j in zip(members, members[1:], strict=False)]
        if len(members) > 1:
            path = " ".join(f"{places[i][0]:.1f},{places[i][1]:.1f}" for i in members)
            style = points[members[0]].style % NUM_COLOURS
            parts.append(Markup('<polyline class="join c{}" points="{}"/>').format(style, path))
    for point, (x, y) in zip(points, places, strict=True):
        limits = _limits(point, x, y, scale_x, scale_y)
        drawn += limits
        pieces = [_line(*segment, "whisker") for segment in limits] + [mark(x, y, point.style)]
        if point.ring:
            pieces.append(Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="9"/>').format(x, y))
        parts.append(
            Markup('<g class="c{}"><title>{}</title>{}</g>').format(
                point.style % NUM_COLOURS, point.text, Markup("").join(pieces)
            )
        )
    if not settings:
        parts += _point_labels(points, places, drawn, (left, top, right, bottom))
    return _chart(height, name, parts)


def _limits(point: Point, x: float, y: float, scale_x: Scale, scale_y: Scale) -> list[Segment]:
    segments = []
    if point.x[1] is not None and point.x[2] is not None:
        segments.append((scale_x.place(point.x[1]), y, scale_x.place(point.x[2]), y))
    if point.y[1] is not None and point.y[2] is not None:
        segments.append((x, scale_y.place(point.y[1]), x, scale_y.place(point.y[2])))
    return segments


def _boxes_along(segments: Sequence[Segment]) -> list[Segment]:
    """Small boxes (left, top, right, bottom) that cover the segments (x1, y1, x2, y2)."""
    boxes = []
    for x1, y1, x2, y2 in segments:
        steps = max(1, math.ceil(math.hypot(x2 - x1, y2 - y1) / 4))
        for k in range(steps + 1):
            x, y = x1 + (x2 - x1) * k / steps, y1 + (y2 - y1) * k / steps
            boxes.append((x - 2, y - 2, x + 2, y + 2))
    return boxes


def _point_labels(
    points: Sequence[Point],
    places: Sequence[tuple[float, float]],
    drawn: Sequence[Segment],
    frame: Segment,
) -> list[Markup]:
    """Labels beside the points where there is room; the others keep their tooltip and their row in the table."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in places] + _boxes_along(drawn)
    parts = []
    for point, (x, y) in zip(points, places, strict=True):
        label = _shortened(point.label)
        width = len(label) * CHARACTER
        for dx, dy, anchor in ((9, -7, "start"), (-9, -7, "end"), (9, 16, "start"), (-9, 16, "end")):
            x0 = x + dx - (width if anchor == "end" else 0)
            box = (x0, y + dy - 10, x0 + width, y + dy + 3)
            inside = box[0] >= frame[0] and box[2] <= frame[2] and box[1] >= frame[1] and box[3] <= frame[3]
            apart = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            if inside and apart:
                taken.append(box)
                parts.append(_text(x + dx, y + dy, label, anchor))
                break
    return parts
