"""The plots of a report: which number is drawn against which, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from eval.reporting.report_tables import Cell, Column, Table, estimate_text, measure_title, setting_text
from eval.reporting.svg_chart import Bar, Point, bar_chart, legend_mark, point_chart

WIN_RATES = ("win_rate", "lc_win_rate")
EVEN = 50.0
KL = {"key": "kl", "name": "KL to the reference policy", "unit": "nats", "digits": 2}


@dataclass(frozen=True)
class Figure:
    """A drawing, its legend (mark and name), what it shows, and the numbers in it."""

    title: str
    drawing: Markup
    legend: tuple[tuple[Markup, str], ...]
    caption: str
    table: Table


def figures(comparison: Mapping[str, Any]) -> list[Figure]:
    """All plots for which there are numbers, in the order of the page."""
    measures = {measure["key"]: measure for measure in comparison["measures"]}
    styles = _styles(comparison)
    found = [_win_rates(comparison, measures[key], styles) for key in WIN_RATES if key in measures]
    found += [_frontier(frontier, measures, styles) for frontier in comparison["frontiers"]]
    lengths = [measure for measure in comparison["measures"] if measure["unit"] == "tokens"]
    if "win_rate" in measures and lengths:
        found.append(_against_length(comparison, measures["win_rate"], lengths[0], styles))
    found += [_curve(curve, measures[curve["measure"]], styles) for curve in comparison["curves"]]
    return [figure for figure in found if figure is not None]


def _styles(comparison: Mapping[str, Any]) -> dict[str, int]:
    """A colour and shape for each method, the same in every plot."""
    methods = [system["method"] for system in comparison["systems"]]
    methods += [point["method"] for frontier in comparison["frontiers"] for point in frontier["points"]]
    return {method: i for i, method in enumerate(dict.fromkeys(methods))}


def _scaled(
    estimate: Mapping[str, Any], measure: Mapping[str, Any]
) -> tuple[float, float | None, float | None]:
    factor = 100 if measure["unit"] == "%" else 1
    low, high = (None if limit is None else limit * factor for limit in (estimate["low"], estimate["high"]))
    return estimate["value"] * factor, low, high


def _has_value(estimate: Mapping[str, Any] | None) -> bool:
    return estimate is not None and estimate["value"] is not None


def _name(title: str, points: Sequence[Bar | Point]) -> str:
    return f"{title}. " + "; ".join(point.text for point in points)


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _legend(points: Sequence[Point]) -> tuple[tuple[Markup, str], ...]:
    groups = {point.group: point.style for point in points}
    return tuple((legend_mark(style), group) for group, style in groups.items())


def _win_rates(
    comparison: Mapping[str, Any], measure: Mapping[str, Any], styles: Mapping[str, int]
) -> Figure | None:
    bars = []
    for system in comparison["systems"]:
        estimate = system["values"][measure["key"]]
        if _has_value(estimate):
            text = estimate_text(estimate, measure)
            bars.append(
                Bar(
                    system["name"],
                    styles[system["method"]],
                    *_scaled(estimate, measure),
                    f"{system['name']}: {text}",
                )
            )
    if not bars:
        return None
    title = f"{_capital(measure['name'])} against {comparison['baseline']}"
    drawing = bar_chart(
        bars, measure_title(measure), _name(title, bars), EVEN if measure["unit"] == "%" else None
    )
    rows = tuple((Cell(bar.label), Cell(bar.text.removeprefix(f"{bar.label}: "))) for bar in bars)
    table = Table(title, (Column("system", numeric=False), Column(measure_title(measure))), rows)
    return Figure(title, drawing, (), "Lines are 95% intervals; dashed: as good as the baseline.", table)


def _frontier(
    frontier: Mapping[str, Any], measures: Mapping[str, Mapping[str, Any]], styles: Mapping[str, int]
) -> Figure | None:
    reward, kl = measures[frontier["reward"]], measures.get("kl", KL)
    points, rows = [], []
    for point in frontier["points"]:
        if not (_has_value(point["kl"]) and _has_value(point["reward"])):
            continue
        texts = (estimate_text(point["reward"], reward), estimate_text(point["kl"], kl))
        front = " (on the front)" if point["on_front"] else ""
        text = f"{point['system']}: {texts[0]} at {texts[1]} nats{front}"
        position = (_scaled(point["kl"], kl), _scaled(point["reward"], reward))
        style = styles[point["method"]]
        points.append(Point(point["system"], style, point["method"], *position, point["on_front"], text))
        front = Cell("yes" if point["on_front"] else "no")
        rows.append((Cell(point["system"]), Cell(point["method"]), Cell(texts[1]), Cell(texts[0]), front))
    if not points:
        return None
    title = f"{_capital(reward['name'])} against KL"
    names = (("system", False), ("method", False), (measure_title(kl), True), (measure_title(reward), True))
    columns = [Column(name, numeric=numeric) for name, numeric in (*names, ("on the Pareto front", False))]
    drawing = point_chart(
        points,
        "KL to the reference policy (nats)",
        measure_title(reward),
        _name(title, points),
        x_from_zero=True,
    )
    caption = (
        "Ringed: the Pareto front, where no other system has more reward at less KL. Lines are 95% intervals."
    )
    return Figure(title, drawing, _legend(points), caption, Table(title, tuple(columns), tuple(rows)))


def _against_length(
    comparison: Mapping[str, Any],
    measure: Mapping[str, Any],
    length: Mapping[str, Any],
    styles: Mapping[str, int],
) -> Figure | None:
    points, rows = [], []
    for system in comparison["systems"]:
        estimate, tokens = (system["values"][key] for key in (measure["key"], length["key"]))
        if not (_has_value(estimate) and _has_value(tokens)):
            continue
        texts = (estimate_text(estimate, measure), estimate_text(tokens, length))
        text = f"{system['name']}: {texts[0]} at {texts[1]} tokens"
        position = (_scaled(tokens, length), _scaled(estimate, measure))
        points.append(
            Point(system["name"], styles[system["method"]], system["method"], *position, False, text)
        )
        rows.append((Cell(system["name"]), Cell(texts[1]), Cell(texts[0])))
    if not points:
        return None
    title = f"{_capital(measure['name'])} against {length['name']}"
    titles = (measure_title(length), measure_title(measure))
    columns = (Column("system", numeric=False), *(Column(name) for name in titles))
    loose = [
        Point(p.label, p.style, p.label, p.x, p.y, p.ring, p.text) for p in points
    ]  # nothing is joined here
    drawing = point_chart(loose, *titles, _name(title, points))
    caption = "A win rate that rises with the length may be the judge's taste for long answers."
    return Figure(title, drawing, _legend(points), caption, Table(title, columns, tuple(rows)))


def _curve(curve: Mapping[str, Any], measure: Mapping[str, Any], styles: Mapping[str, int]) -> Figure | None:
    points, rows = [], []
    for point in curve["points"]:
        if not _has_value(point):
            continue
        shown = estimate_text(point, measure)
        setting = setting_text(point["setting"])
        text = f"{curve['setting']} {setting}: {shown}"
        position = ((point["setting"], None, None), _scaled(point, measure))
        method = point["method"]
        points.append(Point(point["system"], styles[method], method, *position, False, text))
        rows.append((Cell(point["system"]), Cell(method), Cell(setting), Cell(shown)))
    if not points:
        return None
    title = f"{_capital(measure['name'])} over {curve['setting']}"
    names = [Column(name, numeric=False) for name in ("system", "method")]
    columns = (*names, Column(curve["setting"]), Column(measure_title(measure)))
    drawing = point_chart(
        points, curve["setting"], measure_title(measure), _name(title, points), settings=True
    )
    caption = "Lines are 95% intervals."
    return Figure(title, drawing, _legend(points), caption, Table(title, columns, tuple(rows)))
