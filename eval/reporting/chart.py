"""Charts for the page: matplotlib draws them as SVG, and the page's style sheet sets colours and fonts.

The page forbids inline styles and has a dark mode, so every style of the drawing becomes attributes, and every colour a
variable of the style sheet. Text stays text, and output is deterministic. The shape of a mark changes with its colour,
for colour-blind readers.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.reporting.comparison import Estimate

WIDTH = 460
"Width of a chart, in pixels; all lengths below are in pixels, too."
VARIABLES = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--ink", "--line", "--paper")
NUM_COLOURS = 8
MARKERS = "os^DvP"
LABEL_LENGTH = 20
LEGEND_COLUMNS = 3
TICK_ROOM = 26
"Least distance between two labelled settings on an axis."
LOG_SPAN = 20
"An axis of positive settings is logarithmic when the largest is this many times the smallest."


@dataclass(frozen=True)
class Mark:
    """An estimate of x (a bar), or of x and y (a point), with its tooltip `text`.

    A line joins the `joined` points of a method, in their order.
    """

    label: str
    style: int
    text: str
    x: Estimate
    y: Estimate = Estimate(0.0, None, None)
    method: str = ""
    joined: bool = False
    ring: bool = False


def _colour(name: str) -> str:
    """Return the placeholder colour for a variable of the style sheet while matplotlib draws."""
    return f"#fe00{VARIABLES.index(name):02x}"


INK, LINE, PAPER = (_colour(name) for name in ("--ink", "--line", "--paper"))


def _mark_colour(style: int) -> str:
    return _colour(f"--c{style % NUM_COLOURS}")


def shortened(label: str, length: int = LABEL_LENGTH) -> str:
    """Return the label on one line, at most `length` characters, with a question mark for unprintable characters."""
    label = "".join(c if c.isprintable() else "?" for c in " ".join(label.split()))
    return label if len(label) <= length else label[: length - 1] + "…"


@contextmanager
def _settings() -> Iterator[None]:
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "figure.dpi": 72,
        "font.size": 11.5,
        "text.parse_math": False,  # a name is not a formula
        "text.usetex": False,
        "axes.titlesize": "medium",
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "axes.formatter.useoffset": False,
        "grid.color": LINE,
        "legend.frameon": False,
        "lines.linewidth": 1.25,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    } | {f"axes.spines.{side}": False for side in ("left", "top", "right", "bottom")}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # depends on the reader's fonts, not on these
        yield


@_settings()
def bar_chart(bars: Sequence[Mark], x_label: str, title: str, reference: float | None = None) -> Markup:
    """Draw the marks' x as horizontal bars from 0, one row each, and a dashed line at `reference`."""
    labels = [shortened(bar.label) for bar in bars]
    left = 14 + max(26, 6.5 * max(map(len, labels)))
    axes = _axes(50 + 26 * len(bars), x_label, left, top=8, bottom=42)
    for row, bar in enumerate(bars):
        colour = _mark_colour(bar.style)
        axes.barh(row, bar.x.value, 0.55, color=colour, alpha=0.55, gid=f"bar:{row}")
        _interval(axes, bar.x, Estimate(row, None, None), gid=f"whisker:{row}", color=INK, marker="|")
    axes.set_yticks(range(len(bars)), labels)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(axis="x")
    if reference is not None:
        axes.axvline(reference, color=INK, linestyle="--", gid="reference:")
    return _svg(axes.figure, title, [bar.text for bar in bars])


@_settings()
def point_chart(
    points: Sequence[Mark],
    x_label: str,
    y_label: str,
    title: str,
    x_from_zero: bool = False,
    settings: bool = False,
) -> Markup:
    """Draw points with their intervals, and a legend of the methods' colours and shapes.

    Args:
        points: Marks with x and y.
        x_label: Name of the x axis, with its unit.
        y_label: Name of the y axis, with its unit.
        title: Title for screen readers, followed by the marks' texts.
        x_from_zero: Whether the x axis includes 0.
        settings: Whether the ticks of x are the points' own x; otherwise points are labelled where there is room.
    """
    methods = {point.method: point.style for point in points}
    legend_height = 12 + 18 * math.ceil(len(methods) / LEGEND_COLUMNS)
    axes = _axes(296 + legend_height, x_label, left=52, top=30, bottom=42 + legend_height)
    axes.set_title(shortened(y_label, 60), loc="left", gid="axis:")
    axes.grid(axis="y")
    for method, style in methods.items():
        line = [(point.x.value, point.y.value) for point in points if point.method == method and point.joined]
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=_mark_colour(style), alpha=0.7, gid="join:")
    for i, point in enumerate(points):
        _interval(axes, point.x, point.y, gid=f"whisker:{i}", color=_mark_colour(point.style))
        _interval(axes, point.y, point.x, gid=f"whisker:{i}", color=_mark_colour(point.style), upright=True)
        place = (point.x.value, point.y.value)
        axes.plot(*place, **_marker(point.style), gid=f"mark:{i}")
        if point.ring:
            axes.plot(*place, "o", markersize=18, markerfacecolor="none", markeredgecolor=INK, gid="ring:")
    handles = [Line2D([], [], **_marker(style)) for style in methods.values()]
    axes.figure.legend(handles, map(shortened, methods), loc="lower left", ncols=LEGEND_COLUMNS)
    if x_from_zero:
        axes.dataLim.update_from_data_x([0.0], ignore=False)
        axes.autoscale_view()
    if settings:
        _settings_axis(axes, sorted({point.x.value for point in points}))
    else:
        _label(axes, points)
    return _svg(axes.figure, title, [point.text for point in points])


# --- pieces -----------------------------------------------------------------------------------------------


def _axes(height: float, x_label: str, left: float, top: float, bottom: float) -> Axes:
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, 1 - (left + 18) / WIDTH, 1 - (top + bottom) / height)
    )
    axes.patch.set_visible(False)
    axes.set_xlabel(shortened(x_label, 60), loc="right", gid="axis:")
    return axes


def _marker(style: int) -> dict[str, object]:
    shape = {"marker": MARKERS[style % len(MARKERS)], "markersize": 9, "markeredgecolor": PAPER}
    return shape | {"color": _mark_colour(style), "linestyle": "none", "zorder": 3}  # above all lines


def _interval(axes: Axes, along: Estimate, across: Estimate, upright: bool = False, **style: object) -> None:
    if along.low is not None and along.high is not None:
        ends, level = (along.low, along.high), (across.value, across.value)
        axes.plot(*((level, ends) if upright else (ends, level)), **style)


def _settings_axis(axes: Axes, settings: Sequence[float]) -> None:
    """Put a tick at each setting, on a logarithmic axis for a wide range, and omit labels that are too close."""
    if settings[0] > 0 and settings[-1] >= LOG_SPAN * settings[0]:
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(settings, [""] * len(settings))
    axes.set_xlim(axes.get_xlim())  # places the ticks
    labels, last = [], float("-inf")
    for setting in settings:
        x = axes.transData.transform((setting, 1.0))[0]
        labels.append(f"{setting:.6g}" if x - last >= TICK_ROOM else "")
        last = x if labels[-1] else last
    axes.set_xticks(settings, labels)
    axes.tick_params(axis="x", length=4, color=LINE)


def _label(axes: Axes, points: Sequence[Mark]) -> None:
    """Label the points where there is room; the others keep their tooltip and their row in the table."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the labels do not move them
    boxes = [line.get_window_extent() for line in axes.lines if len(line.get_xdata()) == 1]
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
    paths = [line.get_path().transformed(line.get_transform()) for line in lines]
    for point in points:
        for dx, dy, side in ((9, 5, "left"), (-9, 5, "right"), (9, -13, "left"), (-9, -13, "right")):
            place = {"xytext": (dx, dy), "textcoords": "offset points", "horizontalalignment": side}
            text = axes.annotate(shortened(point.label), (point.x.value, point.y.value), **place)
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            meets = box.count_overlaps(boxes) or any(path.intersects_bbox(box, False) for path in paths)
            if inside and not meets:
                boxes.append(box)
                break
            text.remove()


# --- from matplotlib's SVG to the page's ------------------------------------------------------------------


def _svg(figure: Figure, title: str, texts: Sequence[str]) -> Markup:
    """Render the figure without styles and ids; an artist's gid kind:i becomes the class `kind` and the tooltip i."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    root = ElementTree.fromstring(file.getvalue())
    for child in list(root)[:2]:  # metadata, and the style that the page would block
        root.remove(child)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for declaration in filter(None, attributes.pop("style", "").split(";")):
            key, value = (part.strip() for part in declaration.split(":"))
            if not key.startswith("font"):
                attributes[key] = re.sub("#fe00(..)", lambda c: f"var({VARIABLES[int(c[1], 16)]})", value)
        if element.tag == "g":  # the other ids are of shapes that are used
            kind, is_ours, number = attributes.pop("id", "").partition(":")
            if is_ours:
                attributes["class"] = kind
            if number:
                tooltip = ElementTree.Element("title")
                tooltip.text = texts[int(number)]
                element.insert(0, tooltip)
        element.attrib = attributes
    root.attrib = {"class": "chart", "viewBox": root.get("viewBox"), "role": "img"}
    root.set("aria-label", f"{title}. {'; '.join(texts)}")
    return Markup(ElementTree.tostring(root, encoding="unicode"))
