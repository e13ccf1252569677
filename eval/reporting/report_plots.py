"""The plots of a report, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from eval.reporting.chart import Mark, bar_chart, point_chart
from eval.reporting.comparison import Comparison, Curve, Estimate, Frontier, MeasureRow
from eval.reporting.report_tables import SYSTEM, Column, Table, estimate_text, measure_title, row_of

WIN_RATES = ("win_rate", "lc_win_rate")
EVEN = 50.0
KL = MeasureRow("kl", "KL to the reference policy", "nats", 2, None, "")
METHOD = Column("method", numeric=False)
INTERVALS = "Lines are 95% intervals."


@dataclass(frozen=True)
class Figure:
    """A drawing, its description, and its numbers."""

    title: str
    drawing: Markup
    caption: str
    table: Table


def figures(comparison: Comparison) -> list[Figure]:
    """Draw all plots for which there are numbers, in the order of the page."""
    measures = {measure.key: measure for measure in comparison.measures}
    styles = _styles(comparison)
    drawn = [_win_rates(comparison, measures[key], styles) for key in WIN_RATES if key in measures]
    drawn += [_frontier(frontier, measures, styles) for frontier in comparison.frontiers]
    lengths = [measure for measure in comparison.measures if measure.unit == "tokens"]
    if "win_rate" in measures and lengths:
        drawn.append(_against_length(comparison, measures["win_rate"], lengths[0], styles))
    drawn += [_curve(curve, measures[curve.measure], styles) for curve in comparison.curves]
    return [figure for figure in drawn if figure is not None]


def _styles(comparison: Comparison) -> dict[str, int]:
    """Number the methods: one colour and shape per method, the same in every plot."""
    methods = [system.method for system in comparison.systems]
    methods += [point.method for frontier in comparison.frontiers for point in frontier.points]
    methods += [point.method for curve in comparison.curves for point in curve.points]
    return {method: i for i, method in enumerate(dict.fromkeys(methods))}


def _scaled(estimate: Estimate, measure: MeasureRow) -> Estimate:
    factor = 100 if measure.unit == "%" else 1
    limits = (estimate.value, estimate.low, estimate.high)
    return Estimate(*(None if limit is None else limit * factor for limit in limits))


def _has_value(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.value is not None


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _win_rates(comparison: Comparison, measure: MeasureRow, styles: Mapping[str, int]) -> Figure | None:
    bars, rows = [], []
    for system in comparison.systems:
        rate = system.values[measure.key]
        if _has_value(rate):
            rate_text = estimate_text(rate, measure)
            text = f"{system.name}: {rate_text}"
            bars.append(Mark(system.name, styles[system.method], text, _scaled(rate, measure)))
            rows.append(row_of(system.name, rate_text))
    if not bars:
        return None
    title, axis = f"{_capital(measure.name)} against {comparison.baseline}", measure_title(measure)
    drawing = bar_chart(bars, axis, title, EVEN if measure.unit == "%" else None)
    table = Table(title, (SYSTEM, Column(axis)), tuple(rows))
    return Figure(title, drawing, f"{INTERVALS} Dashed: as good as the baseline.", table)


def _frontier(
    frontier: Frontier, measures: Mapping[str, MeasureRow], styles: Mapping[str, int]
) -> Figure | None:
    reward, kl = measures[frontier.reward], measures.get("kl", KL)
    points, rows = [], []
    for point in frontier.points:
        if not (_has_value(point.kl) and _has_value(point.reward)):
            continue
        reward_text, kl_text = estimate_text(point.reward, reward), estimate_text(point.kl, kl)
        text = f"{point.system}: {reward_text} at {kl_text} nats{' (on the front)' if point.on_front else ''}"
        xy = (_scaled(point.kl, kl), _scaled(point.reward, reward))
        points.append(Mark(point.system, styles[point.method], text, *xy, point.method, True, point.on_front))
        front = "yes" if point.on_front else "no"
        rows.append(row_of(point.system, point.method, kl_text, reward_text, front))
    if not points:
        return None
    title = f"{_capital(reward.name)} against KL"
    numbers = (Column(measure_title(kl)), Column(measure_title(reward)))
    columns = (SYSTEM, METHOD, *numbers, Column("on the Pareto front", numeric=False))
    axes = ("KL to the reference policy (nats)", measure_title(reward))
    drawing = point_chart(points, *axes, title, x_from_zero=True)
    caption = f"Ringed: the Pareto front, where no other system has more reward at less KL. {INTERVALS}"
    return Figure(title, drawing, caption, Table(title, columns, tuple(rows)))


def _against_length(
    comparison: Comparison, measure: MeasureRow, length: MeasureRow, styles: Mapping[str, int]
) -> Figure | None:
    points, rows = [], []
    for system in comparison.systems:
        rate, tokens = (system.values[key] for key in (measure.key, length.key))
        if not (_has_value(rate) and _has_value(tokens)):
            continue
        rate_text, tokens_text = estimate_text(rate, measure), estimate_text(tokens, length)
        text = f"{system.name}: {rate_text} at {tokens_text} tokens"
        xy = (_scaled(tokens, length), _scaled(rate, measure))
        points.append(Mark(system.name, styles[system.method], text, *xy, system.method))
        rows.append(row_of(system.name, tokens_text, rate_text))
    if not points:
        return None
    title = f"{_capital(measure.name)} against {length.name}"
    axes = (measure_title(length), measure_title(measure))
    drawing = point_chart(points, *axes, title)
    columns = (SYSTEM, *map(Column, axes))
    caption = "A win rate that rises with the length may be the judge's taste for long answers."
    return Figure(title, drawing, caption, Table(title, columns, tuple(rows)))


def _curve(curve: Curve, measure: MeasureRow, styles: Mapping[str, int]) -> Figure | None:
    points, rows = [], []
    for point in curve.points:
        if not _has_value(point):
            continue
        value, setting = estimate_text(point, measure), f"{point.setting:g}"
        text = f"{curve.setting} {setting}: {value}"
        xy = (Estimate(point.setting, None, None), _scaled(point, measure))
        points.append(Mark(point.system, styles[point.method], text, *xy, point.method, True))
        rows.append(row_of(point.system, point.method, setting, value))
    if not points:
        return None
    title, axes = f"{_capital(measure.name)} over {curve.setting}", (curve.setting, measure_title(measure))
    columns = (SYSTEM, METHOD, *map(Column, axes))
    drawing = point_chart(points, *axes, title, settings=True)
    return Figure(title, drawing, INTERVALS, Table(title, columns, tuple(rows)))
