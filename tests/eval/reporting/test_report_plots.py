"""The plots of a report: where marks stand, what is drawn, and what a reader without eyes or colours gets."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from report_comparisons import comparison, empty_comparison, estimate

from eval.reporting.chart_scale import Scale, padded, rounded_ticks, settings_scale
from eval.reporting.report_plots import figures
from eval.reporting.svg_chart import NUM_COLOURS, NUM_SHAPES, Bar, Point, bar_chart, mark, point_chart


def parsed(drawing) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawing))


def of_class(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if kind in element.get("class", "").split()]


def written(root: ElementTree.Element) -> list[str]:
    return [element.text for element in root.iter("text")]


def test_a_scale_places_its_ends_and_its_middle():
    assert [Scale(0, 10, 50, 250).place(x) for x in (0, 5, 10)] == [50, 150, 250]
    assert [Scale(0, 10, 250, 50).place(x) for x in (0, 2.5)] == [250, 200]  # the y axis grows upwards
    assert Scale(0.01, 100, 0, 400, log=True).place(1) == pytest.approx(200)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (-0.3, 2.6, [0, 0.5, 1, 1.5, 2, 2.5]),
        (0.05, 0.07, [0.05, 0.055, 0.06, 0.065, 0.07]),
        (1e6, 3e6, [1e6, 1.5e6, 2e6, 2.5e6, 3e6]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, ticks):
    assert rounded_ticks(low, high) == pytest.approx(ticks)


def test_equal_numbers_still_have_an_axis():
    assert padded(3.0, 3.0) == pytest.approx((2.85, 3.15))
    assert padded(0.0, 0.0) == (-1.0, 1.0)


def test_settings_far_apart_stand_by_their_logarithms():
    scale = settings_scale([0.01, 0.1, 1.0], 0, 300)
    first, second, third = (scale.place(x) for x in (0.01, 0.1, 1.0))
    assert scale.log and second - first == pytest.approx(third - second)
    assert 0 < first and third < 300
    assert not settings_scale([0.0, 0.5, 1.0], 0, 300).log
    assert not settings_scale([0.1, 1.0], 0, 300).log


def test_a_bar_reaches_from_zero_to_its_value_and_its_line_from_limit_to_limit():
    bars = [Bar("one", 0, 60.0, 50.0, 70.0, "one: 60"), Bar("two", 1, 30.0, None, None, "two: 30")]
    root = parsed(bar_chart(bars, "rate (%)", "name", reference=50.0))
    rects = [{key: float(rect.get(key)) for key in ("x", "width")} for rect in of_class(root, "bar")]
    assert rects[0]["x"] == rects[1]["x"]
    assert rects[0]["width"] == pytest.approx(2 * rects[1]["width"], abs=0.2)
    line = of_class(root, "whisker")[0]
    unit = rects[0]["width"] / 60
    assert float(line.get("x1")) == pytest.approx(rects[0]["x"] + 50 * unit, abs=0.3)
    assert float(line.get("x2")) == pytest.approx(rects[0]["x"] + 70 * unit, abs=0.3)
    assert len(of_class(root, "whisker")) == 3  # the second bar has no interval
    reference = of_class(root, "reference")[0]
    assert float(reference.get("x1")) == pytest.approx(rects[0]["x"] + 50 * unit, abs=0.3)


def test_a_negative_bar_ends_at_zero():
    rect = of_class(parsed(bar_chart([Bar("a", 0, -2.0, None, None, "")], "x", "n")), "bar")[0]
    assert float(rect.get("x")) + float(rect.get("width")) == pytest.approx(442, abs=0.1)


def test_points_of_a_group_are_joined_in_order():
    points = [
        Point("a", 0, "m", (1.0, None, None), (1.0, 0.5, 1.5), True, "a"),
        Point("b", 1, "n", (2.0, None, None), (1.0, None, None), False, "b"),
        Point("c", 0, "m", (3.0, 2.0, 4.0), (2.0, None, None), False, "c"),
    ]
    root = parsed(point_chart(points, "x", "y", "name"))
    (join,) = of_class(root, "join")
    xs = [float(pair.split(",")[0]) for pair in join.get("points").split()]
    assert len(xs) == 2 and xs[0] < xs[1]
    assert len(of_class(root, "ring")) == 1
    assert len(of_class(root, "whisker")) == 2
    assert {"a", "b", "c"} <= set(written(root))


def test_labels_give_way_to_each_other_and_every_point_keeps_its_tooltip():
    crowd = [
        Point(f"system {i}", i, f"m{i}", (1 + i / 1e3, None, None), (1.0, None, None), False, f"p{i}")
        for i in range(9)
    ]
    crowd.append(Point("far", 1, "far", (5.0, None, None), (1.0, None, None), False, "far"))
    root = parsed(point_chart(crowd, "x", "y", "name"))
    labels = [text for text in written(root) if text.startswith("system")]
    assert 1 <= len(labels) < 9
    titles = [element.text for element in root.iter("title")]
    assert titles == [*(f"p{i}" for i in range(9)), "far"]


def test_colour_and_shape_together_tell_many_methods_apart():
    looks = {(style % NUM_COLOURS, mark(0, 0, style)) for style in range(48)}
    assert len({shape for _, shape in looks}) == NUM_SHAPES
    assert len(looks) == 24


# --- which plots ------------------------------------------------------------------------------------------


def test_every_plot_for_which_there_are_numbers():
    found = figures(comparison())
    assert [figure.title for figure in found] == [
        *("Win rate against reference", "LC win rate against reference", "True reward against KL"),
        *("Win rate against length", "Win rate over beta"),
    ]
    frontier = found[2]
    assert [name for _, name in frontier.legend] == ["DR-PO", "PPO"]
    assert len(of_class(parsed(frontier.drawing), "ring")) == 2
    assert [cell.text for cell in frontier.table.rows[2]] == [
        *("PPO", "PPO", "6.00 [5.50, 6.50]", "-0.25 [-0.40, -0.10]", "no")
    ]
    length = found[3]
    assert [row[0].text for row in length.table.rows] == [
        "DR-PO beta 1",
        "PPO",
    ]  # the other's length is unknown
    assert not of_class(parsed(length.drawing), "join")
    assert figures(empty_comparison()) == []


def test_a_plot_is_read_aloud_with_its_numbers():
    drawing = parsed(figures(comparison())[0].drawing)
    assert drawing.get("role") == "img"
    assert drawing.get("aria-label") == (
        "Win rate against reference. DR-PO beta 1: 70.2 [66.1, 74.0]; DR-PO beta 0.5: 60.0 [55.0, 65.0]; "
        "PPO: 41.0 [36.0, 46.0]"
    )


def test_points_without_a_value_are_left_out():
    whole = comparison()
    for point in whole["frontiers"][0]["points"][:2]:
        point["reward"] = estimate(None)
    assert [row[0].text for row in figures(whole)[2].table.rows] == ["PPO"]
    whole["frontiers"][0]["points"][2]["kl"] = estimate(None)
    assert "True reward against KL" not in [figure.title for figure in figures(whole)]


def test_names_are_text_in_a_drawing():
    whole = comparison()
    for system in whole["systems"]:
        system["name"] = f"<b>&{system['name']}"
    drawing = parsed(figures(whole)[0].drawing)
    assert "<b>&PPO" in written(drawing)
    assert not list(drawing.iter("b"))


def test_the_same_numbers_give_the_same_bytes():
    assert [str(figure.drawing) for figure in figures(comparison())] == [
        str(figure.drawing) for figure in figures(comparison())
    ]
