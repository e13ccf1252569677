"""The browser of examples in a report: filters, sorting, the address, the keys, and very many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from report_comparisons import comparison, examples
from report_pages import count, report_viewer, shown_id, to_start, wait_for_count, walk

EXAMPLES = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture
def show(chromium, tmp_path) -> Iterator[Callable]:
    with report_viewer(chromium, tmp_path) as start:
        yield start


# --- filters ----------------------------------------------------------------------------------------------


FILTERS = [
    ("system", "method:DR-PO", ["one", "two", "three", "four"]),
    ("system", "system:DR-PO beta 1", ["one", "two", "three"]),
    ("system", "system:PPO", ["five", "six", "seven", "eight"]),
    ("verdict", "won", ["one", "four"]),
    ("verdict", "tied", ["two", "eight"]),
    ("verdict", "lost", ["five", "seven"]),
    ("verdict", "undecided", ["three", "six"]),
    ("orders", "consistent", ["one", "five", "eight"]),
    ("orders", "inconsistent", ["two", "four", "seven"]),
    ("failure", "any", ["three", "six"]),
    ("failure", "refused", ["three"]),
    ("failure", "malformed", ["six"]),
    ("failure", "failed", ["six"]),
    ("attack", "yes", ["seven", "eight"]),
    ("prefix", "yes", ["one"]),
    ("search", "ANSWER T", ["two", "three"]),
    ("search", "content filter", ["three"]),
]


def test_each_filter_finds_its_examples(show):
    page = show(comparison())
    for control, value, ids in FILTERS:
        field = page.locator(f"#filter-{control}")
        match control:
            case "attack" | "prefix":
                field.check()
            case "search":
                field.fill(value)
            case _:
                field.select_option(value)
        wait_for_count(page, f"Example 1 of {len(ids)} (8 in all)")
        field.blur()
        assert walk(page) == ids, (control, value)
        page.locator("#clear").click()
        assert count(page) == f"Example {EXAMPLES.index(ids[-1]) + 1} of 8"  # the one that was shown stays
        to_start(page)


def test_where_nothing_matches_the_page_says_so(show):
    page = show(comparison())
    page.locator("#filter-failure").select_option("truncated")
    assert count(page) == "No example of 8 matches"
    assert page.locator("#example").inner_text() == ""
    assert page.locator("#next").is_disabled() and page.locator("#previous").is_disabled()
    page.keyboard.press("j")
    page.locator("#clear").click()
    assert count(page) == "Example 1 of 8"


def test_filters_combine(show):
    page = show(comparison())
    page.locator("#filter-system").select_option("method:DR-PO")
    page.locator("#filter-orders").select_option("inconsistent")
    assert count(page) == "Example 1 of 2 (8 in all)"
    page.locator("#filter-verdict").select_option("won")
    page.locator("#filter-verdict").blur()
    assert walk(page) == ["four"]


def test_sorting_puts_what_has_no_number_last(show):
    page = show(comparison())
    for by, ids in (
        ("score", ["five", "seven", "two", "eight", "four", "one", "three", "six"]),
        ("value:true_reward", ["two", "four", "five", "one", "three", "six", "seven", "eight"]),
        ("length", ["two", "three", "four", "five", "six", "seven", "eight", "one"]),
    ):
        page.locator("#filter-sort").select_option(by)
        page.locator("#filter-sort").blur()
        assert walk(page) == ids
    page.locator("#filter-sort").select_option("value:true_reward")
    page.locator("#filter-descending").check()
    assert walk(page) == ["one", "five", "four", "two", "three", "six", "seven", "eight"]
    page.locator("#filter-sort").select_option("")
    page.locator("#filter-sort").blur()
    assert walk(page) == EXAMPLES[::-1]


def test_the_address_holds_filters_and_example(show):
    page = show(comparison(), "#system=method%3ADR-PO&orders=inconsistent&example=four")
    assert (count(page), shown_id(page)) == ("Example 2 of 2 (8 in all)", "four")
    assert page.locator("#filter-system").input_value() == "method:DR-PO"
    page.locator("#filter-orders").select_option("")
    page.locator("#filter-search").fill("three & <x>")
    page.locator("#filter-search").fill("three")
    page.wait_for_function("() => location.hash === '#system=method%3ADR-PO&search=three&example=three'")
    page.evaluate("location.hash = '#verdict=lost&example=seven&attack=yes'")
    wait_for_count(page, "Example 1 of 1 (8 in all)")
    assert shown_id(page) == "seven"
    assert page.locator("#filter-search").input_value() == ""
    page.locator("nav a", has_text="Ranking").click()  # an anchor changes no filter
    assert shown_id(page) == "seven"


def test_an_address_that_names_nothing_shows_everything(show):
    page = show(comparison(), "#system=system%3Agone&example=gone&more=x")
    assert count(page) == "Example 1 of 8"


# --- keys, and very many -----------------------------------------------------------------------------------


def test_the_whole_browser_works_from_the_keyboard(show):
    page = show(comparison())
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for key, expected in (
        ("j", "two"),
        ("ArrowRight", "three"),
        ("k", "two"),
        ("ArrowLeft", "one"),
        ("k", "one"),
    ):
        press(key)
        assert shown_id(page) == expected
    press("?")
    assert page.locator("#help").is_visible()
    press("j")
    assert shown_id(page) == "one"
    press("Escape")
    assert not page.locator("#help").is_visible()
    press("/")
    page.keyboard.type("jk/?")
    wait_for_count(page, "No example of 8 matches")  # letters are text here
    assert not page.locator("#help").is_visible()
    for _ in range(4):
        press("Backspace")
    page.keyboard.type("answer e")
    press("Enter")  # sends no form
    wait_for_count(page, "Example 1 of 1 (8 in all)")
    assert shown_id(page) == "eight"
    press("Escape")
    assert page.evaluate("document.activeElement.id") != "filter-search"


def test_focus_can_be_seen_and_every_control_has_a_name(show):
    page = show(comparison())
    page.locator("#filter-sort").focus()
    page.keyboard.press("Tab")
    style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert (page.evaluate("document.activeElement.id"), style) == ("filter-search", "solid")
    for name in ("System", "Verdict", "Orders", "Judge's failure", "Sort by"):
        assert page.get_by_role("combobox", name=name, exact=True).count() == 1
    assert page.get_by_role("searchbox", name="Search").count() == 1
    assert page.get_by_role("checkbox").count() == 3
    assert page.locator("#count").get_attribute("aria-live") == "polite"
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0


def test_twenty_thousand_examples_open_and_filter(show):
    kinds = examples()
    many = [
        dict(kinds[i % 8], id=f"{kinds[i % 8]['id']}/{i}", response_b="word " * 60) for i in range(20_000)
    ]
    page = show(comparison(examples=many), "#example=two%2F19993")
    assert count(page) == "Example 19994 of 20000"
    page.locator("#filter-verdict").select_option("lost")
    assert count(page) == "Example 1 of 5000 (20000 in all)"
    page.locator("#filter-search").fill("answer seven")
    wait_for_count(page, "Example 1 of 2500 (20000 in all)")
    page.locator("#filter-sort").select_option("score")
    assert page.evaluate("document.querySelectorAll('*').length") < 2000  # only what is shown is in the page
