"""The plots of a report: where marks stand, what is drawn, and what a reader without eyes or colours gets."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
from report_comparisons import comparison, empty_comparison, estimate

from eval.reporting.chart import MARKERS, NUM_COLOURS, Mark, bar_chart, point_chart
from eval.reporting.comparison import Estimate, comparison_from
from eval.reporting.report_plots import figures


def rows_of(**changes):
    return comparison_from(comparison(**changes))


def at(value, low=None, high=None) -> Estimate:
    return Estimate(value, low, high)


def parsed(drawing) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawing))


def of_class(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if kind in element.get("class", "").split()]


def written(root: ElementTree.Element) -> list[str]:
    return [element.text for element in root.iter("text")]


def corners(group: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of the first path in a group."""
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", group.find("path").get("d"))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def sides(group: ElementTree.Element) -> tuple[float, float]:
    xs = [x for x, _ in corners(group)]
    return min(xs), max(xs)


def places(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the marks are."""
    used = [use for group in of_class(root, "mark") for use in group.iter("use")]
    return [(float(use.get("x")), float(use.get("y"))) for use in used]


def test_a_bar_reaches_from_zero_to_its_value_and_its_line_from_limit_to_limit():
    bars = [Mark("one", 0, "one: 60", at(60.0, 50.0, 70.0)), Mark("two", 1, "two: 30", at(30.0))]
    root = parsed(bar_chart(bars, "rate (%)", "name", reference=50.0))
    (zero, first), (left, second) = map(sides, of_class(root, "bar"))
    assert zero == left
    assert first - zero == pytest.approx(2 * (second - zero), abs=0.01)
    unit = (first - zero) / 60
    (whisker,) = of_class(root, "whisker")  # the second bar has no interval
    assert sides(whisker) == pytest.approx((zero + 50 * unit, zero + 70 * unit), abs=0.01)
    (reference,) = of_class(root, "reference")
    assert sides(reference) == pytest.approx([zero + 50 * unit] * 2, abs=0.01)
    assert written(root)[-3:] == ["rate (%)", "one", "two"]


def test_a_negative_bar_ends_at_zero():
    bars = [Mark("a", 0, "", at(-2.0)), Mark("b", 0, "", at(1.0))]
    negative, positive = map(sides, of_class(parsed(bar_chart(bars, "x", "n")), "bar"))
    assert negative[1] == positive[0]
    assert negative[1] - negative[0] == pytest.approx(2 * (positive[1] - positive[0]), abs=0.01)


def test_an_interval_may_leave_its_value_out():
    (bar,), (whisker,) = (
        of_class(parsed(bar_chart([Mark("a", 0, "", at(1.0, 2.0, 3.0))], "x", "n")), kind)
        for kind in ("bar", "whisker")
    )
    assert sides(whisker)[0] > sides(bar)[1]


def test_points_of_a_method_are_joined_in_order():
    points = [
        Mark("a", 0, "a", at(1.0), at(1.0, 0.5, 1.5), "m", True, ring=True),
        Mark("b", 1, "b", at(2.0), at(1.0), "n", True),
        Mark("c", 0, "c", at(3.0, 2.0, 4.0), at(2.0), "m", True),
    ]
    root = parsed(point_chart(points, "x", "y", "name"))
    first, second, third = places(root)
    (join,) = of_class(root, "join")
    assert corners(join) == [first, third]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0])
    assert first[1] == second[1] > third[1]  # y grows upwards
    assert len(of_class(root, "ring")) == 1
    upright, level = map(corners, of_class(root, "whisker"))
    half = (first[1] - third[1]) / 2
    assert [x for x, _ in upright] == [first[0]] * 2
    assert [y for _, y in upright] == pytest.approx([first[1] + half, first[1] - half])
    assert [y for _, y in level] == [third[1]] * 2
    assert [x for x, _ in level] == pytest.approx([second[0], 2 * third[0] - second[0]])
    assert {"a", "b", "c", "m", "n"} <= set(written(root))


def test_points_at_one_place_still_have_axes():
    point = Mark("a", 0, "a", at(3.0), at(0.0), "m")
    assert len(set(places(parsed(point_chart([point, point], "x", "y", "n"))))) == 1


def settings_chart(*settings: float) -> ElementTree.Element:
    points = [Mark("a", 0, "a", at(setting), at(1.0), "m", True) for setting in settings]
    return parsed(point_chart(points, "beta", "y", "n", settings=True))


def test_settings_far_apart_have_a_logarithmic_axis():
    first, second, third = (x for x, _ in places(settings_chart(0.01, 0.1, 1.0)))
    assert second - first == pytest.approx(third - second)
    for near in ((0.0, 0.5, 1.0), (0.1, 0.55, 1.0)):
        first, second, third = (x for x, _ in places(settings_chart(*near)))
        assert second - first == pytest.approx(third - second)


def test_settings_are_the_ticks_and_one_that_is_too_close_has_no_label():
    texts = written(settings_chart(0.0, 0.01, 0.5, 1.0))
    assert texts[: texts.index("beta")] == ["0", "0.5", "1"]


def test_labels_give_way_to_each_other_and_every_point_keeps_its_tooltip():
    crowd = [Mark(f"system {i}", i, f"p{i}", at(1 + i / 1e3), at(1.0), f"m{i}") for i in range(9)]
    crowd.append(Mark("far", 1, "far", at(5.0), at(1.0), "far"))
    root = parsed(point_chart(crowd, "x", "y", "name"))
    labels = [text for text in written(root) if text.startswith("system")]
    assert 1 <= len(labels) < 9
    titles = [group.find("title").text for group in of_class(root, "mark")]
    assert titles == [*(f"p{i}" for i in range(9)), "far"]


def test_colour_and_shape_together_tell_many_methods_apart():
    points = [Mark(f"s{i}", i, "", at(float(i)), at(1.0), f"m{i}") for i in range(48)]
    uses = [group.find(".//use") for group in of_class(parsed(point_chart(points, "x", "y", "n")), "mark")]
    assert len({use.get("fill") for use in uses}) == NUM_COLOURS
    assert len({(use.get("fill"), use.get("href")) for use in uses}) == 24
    assert len(MARKERS) == len({i % len(MARKERS) for i in range(48)}) == 6


def test_the_page_decides_colours_and_fonts():
    for figure in figures(rows_of()):
        drawing = str(figure.drawing)
        assert not re.search(r"style|#[0-9a-f]{6}\b|font|xlink|rgb", drawing)
        ids = set(re.findall(r'id="(.*?)"', drawing))
        assert ids == set(re.findall(r'(?:href="|url\()#(.*?)["\)]', drawing))


def test_a_name_in_any_script_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = parsed(bar_chart([Mark("模型 😀", 0, "", at(1.0))], "x", "n"))
    assert "模型 😀" in written(root)


# --- which plots ------------------------------------------------------------------------------------------


def test_every_plot_for_which_there_are_numbers():
    found = figures(rows_of())
    assert [figure.title for figure in found] == [
        *("Win rate against reference", "LC win rate against reference", "True reward against KL"),
        *("Win rate against length", "Win rate over beta"),
    ]
    frontier = found[2]
    assert written(parsed(frontier.drawing))[-2:] == ["DR-PO", "PPO"]  # the legend
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
    assert figures(comparison_from(empty_comparison())) == []


def test_a_plot_is_read_aloud_with_its_numbers():
    drawing = parsed(figures(rows_of())[0].drawing)
    assert drawing.get("role") == "img"
    assert drawing.get("aria-label") == (
        "Win rate against reference. DR-PO beta 1: 70.2 [66.1, 74.0]; DR-PO beta 0.5: 60.0 [55.0, 65.0]; "
        "PPO: 41.0 [36.0, 46.0]"
    )


def test_points_without_a_value_are_left_out():
    whole = comparison()
    for point in whole["frontiers"][0]["points"][:2]:
        point["reward"] = estimate(None)
    assert [row[0].text for row in figures(comparison_from(whole))[2].table.rows] == ["PPO"]
    whole["frontiers"][0]["points"][2]["kl"] = estimate(None)
    assert "True reward against KL" not in [figure.title for figure in figures(comparison_from(whole))]


def test_names_are_text_in_a_drawing():
    whole = comparison()
    for system in whole["systems"]:
        system["name"] = f"<b>&{system['name']} $x_1$"
    drawing = parsed(figures(comparison_from(whole))[0].drawing)
    assert "<b>&PPO $x_1$" in written(drawing)
    assert not list(drawing.iter("b"))


def test_characters_that_cannot_be_printed_are_question_marks():
    assert "a????b" in written(parsed(bar_chart([Mark("a\0\x1b\u202e\ud800b", 0, "", at(1.0))], "x", "n")))


def test_the_same_numbers_give_the_same_bytes():
    assert [str(figure.drawing) for figure in figures(rows_of())] == [
        str(figure.drawing) for figure in figures(rows_of())
    ]
