"""The report in a real browser: what it shows, on screens of all kinds, and that no text of a system ever runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from report_comparisons import comparison, empty_comparison, example, verdict
from report_pages import count, report_viewer, response, wait_for_count

from eval.reporting.comparison import comparison_from
from eval.reporting.report import write_report

ATTACKS = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror='window.pwned=2'>",
    "<!-- <script>",
    "{{ 7 * 7 }} {% raw %} ${window.pwned=3}",
    "line\u2028separator\u2029 \u202e right to left",
    '" onmouseover="window.pwned=4" x=\'',
    "javascript:window.pwned=5",
)


@pytest.fixture
def show(chromium, tmp_path) -> Iterator[Callable]:
    with report_viewer(chromium, tmp_path) as start:
        yield start


# --- what it shows ----------------------------------------------------------------------------------------


def test_the_page_holds_every_section(show):
    page = show(comparison())
    assert page.locator("h1").inner_text() == "demo: 3 systems against reference"
    titles = page.locator("main h2").all_inner_texts()
    assert titles == [
        *("Results", "Plots", "Judged against reference", "Differences between systems"),
        *("Judged against each other", "Ranking"),
        *("Examples", "Training rollouts", "Origin"),
    ]
    row = page.locator("#results tbody tr").first
    assert "70.2 [66.1, 74.0]" in row.inner_text() and "runs 69.0, 70.2, 71.4" in row.inner_text()
    assert (
        page.locator("#results .warning").inner_text()
        == "Warning: 2% of the responses hold a suspected attack"
    )
    assert (
        "The win rate that responses of equal length would have."
        in page.locator(".meanings").first.inner_text()
    )
    assert page.get_by_text("not resolved at this n, which can show 8.5 or more", exact=True).count() == 1
    assert page.locator("#plots svg[role=img]").count() == 5
    page.get_by_text("Settings of compare").click()
    assert page.locator("pre").first.inner_text() == "task: demo\nsystems: 3\n"
    page.get_by_text("Hashes of DR-PO beta 1/0").click()
    assert page.get_by_text("ab" * 32).is_visible()


def test_an_example_with_both_orders_and_the_words_of_the_judge(show):
    page = show(comparison())
    assert count(page) == "Example 1 of 8"
    article = page.locator("#example")
    assert article.locator("h3").inner_text() == "DR-PO beta 1 against reference DR-PO beta 1 won"
    assert response(page, 1).locator(".text").inner_text() == "Reference one."
    verdicts = article.locator(".pair").nth(1).locator(".panel")
    assert verdicts.nth(0).locator("h4").inner_text() == "DR-PO beta 1 shown first DR-PO beta 1 won"
    assert verdicts.nth(0).locator(".text").inner_text() == "Response A is complete.\nPreferred: A"
    assert verdicts.nth(1).locator("h4").inner_text() == "reference shown first DR-PO beta 1 won"
    assert article.locator("dl.facts div").all_inner_texts() == ["true reward\n4.00", "KL (nats)\n1.25"]


def test_exactly_the_forced_prefix_is_marked(show):
    page = show(comparison())
    box = response(page, 0).locator(".text")
    assert box.locator("mark").inner_text() == "😀 abc"  # five characters, though six units of UTF-16
    assert box.inner_text() == "😀 abc, and then what the policy wrote itself, at length."
    assert (
        response(page, 0).locator("p.note").inner_text()
        == "Marked: the forced prefix, not written by the policy"
    )
    assert response(page, 1).locator("mark").count() == 0
    rollout = page.locator("#rollouts details .text").nth(1)
    assert rollout.text_content() == " milk, eggs"
    assert rollout.locator("mark").text_content() == " milk,"


def test_an_undecided_example_says_what_each_order_gave(show):
    page = show(comparison(), "#example=three")
    assert page.locator("#example h3").inner_text() == "DR-PO beta 1 against reference undecided"
    refused = page.locator("#example .pair").nth(1).locator(".panel").nth(1)
    assert refused.inner_text() == "reference shown first refused\n\ncontent filter\n\nI cannot help."
    assert page.locator("#example dl.facts div").all_inner_texts() == ["true reward\n–"]
    page = show(comparison(), "#example=six")
    badges = page.locator("#example .badge").all_inner_texts()
    assert badges == ["undecided", "cut at its length limit", "ended", "malformed", "failed"]


# --- screens and colours ---------------------------------------------------------------------------------


def test_a_narrow_screen_scrolls_only_downwards(show):
    whole = comparison()
    whole["examples"][0]["response_a"] = "x" * 3000
    whole["title"] = "averylongnamewithoutanyspace" * 5
    page = show(whole, width=360, height=640)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    left, right = (response(page, side).bounding_box() for side in (0, 1))
    assert right["y"] >= left["y"] + left["height"] and left["x"] == right["x"]
    table = page.locator("#results .scroll")
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")


def test_wide_screens_have_the_responses_side_by_side(show):
    page = show(comparison())
    left, right = (response(page, side).bounding_box() for side in (0, 1))
    assert right["y"] == left["y"] and right["x"] >= left["x"] + left["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(show, scheme):
    page = show(comparison(), scheme=scheme)

    def luminance(colour: str) -> float:
        channels = [int(x) / 255 for x in colour[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for selector in ("h1", "dt", ".note", "#results .warning", "nav a", ".chart text"):
        kind = "fill" if selector.startswith(".chart") else "color"
        colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{kind}")
        low, high = sorted((paper, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector  # WCAG AA


# --- hostile and empty -----------------------------------------------------------------------------


def test_no_text_of_a_system_becomes_markup(show):
    text = " ".join(ATTACKS)
    whole = comparison(title=text, commit=text, baseline=text)
    for system in whole["systems"]:
        system["name"] += text
        system["method"] += text
        system["warnings"] = [text]
    for test in whole["tests"]:
        test["system_1"] += text
    whole["rollouts"][0] |= {"system": text, "prompt": text, "prefix": text, "scores": {text: 1.0}}
    whole["rollouts"][0]["continuation"] = text
    whole |= {"configs": {text: text}, "hashes": {text: {text: text}}, "versions": {text: text}}
    name = whole["systems"][0]["name"]
    whole["examples"] = [
        example(attack, name, 1.0, True, [verdict("ab", "ok", "a", attack, attack)])
        | {"prompt": attack, "response_a": attack, "response_b": attack, "prefix_a": 3}
        | {"suspicions_a": [attack], "suspicions_b": [attack], "values": {attack: 1.0}}
        for attack in ATTACKS
    ]
    page = show(whole)
    assert page.locator("head title").text_content() == page.locator("h1").text_content() == text
    assert page.locator("#rollouts .text").all_text_contents() == [text, text * 2]
    for attack in ATTACKS:
        assert page.locator("#example .text").all_text_contents() == [attack] * 4  # prompt, responses, judge
        assert page.locator("#example mark").last.text_content() == attack[:3]
        page.keyboard.press("j")
    assert page.locator("main img, main script, main iframe, main [onmouseover]").count() == 0
    page.locator("#filter-system").select_option("system:" + name)
    page.locator("#filter-sort").select_option("value:" + ATTACKS[1])
    page.locator("#filter-search").fill(ATTACKS[0])
    wait_for_count(page, f"Example 1 of 1 ({len(ATTACKS)} in all)")
    page.wait_for_function("() => location.hash.includes('search')")
    page.reload()
    assert page.locator("#filter-search").input_value() == ATTACKS[0]


def test_the_policy_of_the_page_stops_what_would_run(chromium, tmp_path):
    """Even markup that got in could not act: the browser refuses scripts and connections that are not the page's."""
    page = chromium.new_page()
    page.goto(write_report(comparison_from(comparison()), tmp_path).as_uri())
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
    blocked = page.evaluate(
        """() => new Promise(done => {
            const seen = [];
            document.addEventListener("securitypolicyviolation", event => {
                seen.push(event.effectiveDirective);
                if (seen.length === 2) done(seen.sort());
            });
            const script = document.createElement("script");
            script.textContent = "window.pwned = 1";
            document.body.append(script);
            fetch("http://127.0.0.1:9/").catch(() => {});
        })"""
    )
    assert blocked == ["connect-src", "script-src-elem"]
    assert page.evaluate("window.pwned") is None
    page.close()


def test_an_empty_comparison_opens(show):
    page = show(empty_comparison())
    assert page.locator("main h2").all_inner_texts() == ["Results", "Origin"]
    assert page.locator("#results tbody td").all_inner_texts() == ["–"] * 5
    page.keyboard.press("j")
    page = show(empty_comparison() | {"systems": [], "measures": []})
    assert page.locator("main h2").all_inner_texts() == ["Origin"]


def test_a_missing_judge_leaves_no_verdicts(show):
    page = show(comparison(judge=None, examples=[example("bare", "PPO", None, None, [])]))
    assert count(page) == "Example 1 of 1"
    assert page.get_by_role("heading", name="Verdicts").count() == 0
