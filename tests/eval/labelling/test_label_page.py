"""The label page in a real browser: by keyboard, by buttons, on a narrow screen, with texts that would be HTML."""

from __future__ import annotations

from pathlib import Path

import pytest
from label_runs import BETTER, WORSE, matchups, queue, serving

from eval.judging.matchup import Matchup
from eval.labelling.labels import current_labels, read_labels

PAIR = "document.body.dataset.pair"


class Page:
    """A page in the browser that remembers every error and every request."""

    def __init__(self, browser, url: str, width: int = 1100, height: int = 760, **context) -> None:
        self.url = url
        self.context = browser.new_context(viewport={"width": width, "height": height}, **context)
        self.page = self.context.new_page()
        self.errors, self.requests = [], []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, query: str = "?annotator=anna") -> Page:
        self.page.goto(self.url + query)
        self.page.wait_for_selector("main:not([hidden])")
        return self

    def press(self, key: str) -> None:
        """Press a key and wait until another pair, or the end, is shown."""
        before = self.page.evaluate(PAIR)
        self.page.keyboard.press(key)
        self.page.wait_for_function(f"before => {PAIR} !== before", arg=before)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def better_key(self) -> str:
        return "1" if self.text("#first").startswith("topic") else "2"

    def close(self) -> None:
        self.context.close()
        assert self.errors == []
        foreign = [url for url in self.requests if not url.startswith((self.url, "data:,"))]
        assert foreign == []


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "labels.jsonl"


def test_everything_by_keyboard_from_the_name_to_the_thanks(chromium, path):
    with serving(queue(path)) as server:
        page = Page(chromium, server.url).open("")
        assert page.page.evaluate("document.activeElement.id") == "name"
        page.page.keyboard.type("anna")
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#label:visible")
        assert page.text("#question").startswith("Which of the two summaries of the forum post")
        assert page.text("#count") == "0 of 6 done" and page.text("#first-title") == "Summary 1"
        said = [page.better_key()]
        page.press(said[-1])
        assert page.text("#count") == "1 of 6 done"
        arrow = {"1": "ArrowLeft", "2": "ArrowRight"}
        page.press(arrow[page.better_key()])
        page.press("t")
        page.press("s")
        prompt = page.text("#prompt")
        page.press("1")
        page.press("u")
        assert page.text("#prompt") == prompt, "undone: the same pair again"
        page.press(page.better_key())
        page.press("T")
        page.page.wait_for_selector("#end:visible")
        assert page.text("#end-text") == (
            "anna, you are through with all 6 pairs: 3 decided, 2 tied, 1 skipped."
        )
        page.press("u")
        page.page.wait_for_selector("#label:visible")
        page.press("2")
        page.page.wait_for_selector("#end:visible")
        page.close()
    labels = read_labels(path)
    assert len(labels) == 10 and [label.status for label in labels].count("undone") == 2
    counted = current_labels(labels)
    assert [label.winner for label in counted[:2]] == ["a", "a"] and counted[4].winner == "a"
    assert [label.winner for label in counted].count("tie") == 1 and len(counted) == 6
    assert all(0 < label.seconds < 60 for label in counted)
    last = counted[-1]
    assert last.winner == ("b" if last.order == "ab" else "a"), "the second slot"


def test_a_reload_goes_on_where_the_page_was(chromium, path):
    with serving(queue(path)) as server:
        page = Page(chromium, server.url).open("")
        page.page.fill("#name", "anna")
        page.page.click("text=Start")
        page.page.wait_for_selector("#label:visible")
        page.press("1")
        page.press("t")
        shown = [page.text(place) for place in ("#prompt", "#first", "#second", "#count")]
        page.page.reload()
        page.page.wait_for_selector("#label:visible")
        assert [page.text(place) for place in ("#prompt", "#first", "#second", "#count")] == shown
        page.press("u")
        assert page.text("#count") == "1 of 6 done"
        page.close()


def test_two_people_at_the_same_time(chromium, path):
    with serving(queue(path)) as server:
        pages = [Page(chromium, server.url).open(f"?annotator={name}") for name in ("anna", "ben")]
        first = [page.text("#prompt") for page in pages]
        for _ in range(6):
            for page in pages:
                page.press(page.better_key())
        for page in pages:
            page.page.wait_for_selector("#end:visible")
            page.close()
    labels = read_labels(path)
    assert {(label.annotator, label.winner) for label in labels} == {("anna", "a"), ("ben", "a")}
    assert len(labels) == 12 and len(first) == 2


def test_no_page_holds_the_name_of_a_system(chromium, path):
    with serving(queue(path)) as server:
        page = Page(chromium, server.url).open()
        for key in ("1", "2", "u", "t", "s", "1", "2", "1"):
            held = page.page.content() + page.page.title() + page.page.url
            assert BETTER not in held and WORSE not in held
            page.press(key)
        page.close()


XSS = (
    "<script>alert('script')</script>",
    "<img src=x onerror=\"alert('image')\">",
    "</div><h1 id=injected>big</h1>",
    "javascript:alert(1)",
    "{{token}} ${alert(2)} &lt;b&gt;",
    "\u202eright to left",
)


def test_responses_are_shown_as_text(chromium, path):
    compared = [
        Matchup(f"{i:016x}", f"Prompt {i} {text}", BETTER, f" {text} a", WORSE, f" {text} b")
        for i, text in enumerate(XSS)
    ]
    with serving(queue(path, compared)) as server:
        page = Page(chromium, server.url).open()
        shown = set()
        for _ in compared:
            for place in ("#prompt", "#first", "#second"):
                assert page.page.locator(f"{place} *").count() == 0
            shown |= {
                page.page.locator(place).evaluate("e => e.textContent") for place in ("#first", "#second")
            }
            page.press("1")
        assert shown == {f"{text} {slot}" for text in XSS for slot in "ab"}
        assert page.page.locator("#injected").count() == 0
        page.close()


def test_an_empty_response_is_told_from_one_that_says_so(chromium, path):
    compared = [Matchup("0" * 16, "Prompt", BETTER, "\n", WORSE, "nothing was written")]
    with serving(queue(path, compared)) as server:
        page = Page(chromium, server.url).open()
        classes = [page.page.get_attribute(place, "class") for place in ("#first", "#second")]
        assert sorted(classes) == ["text", "text empty"]
        page.close()


def test_keys_that_are_no_choice(chromium, path):
    with serving(queue(path, ties=False)) as server:
        page = Page(chromium, server.url).open()
        assert not page.page.is_visible("#tie")
        for key in ("t", "Control+1", "Alt+2", "Meta+s", "x", "3", "Enter", "u"):
            page.page.keyboard.press(key)
        page.page.keyboard.down("1")  # held down: one label
        page.page.wait_for_function("() => document.getElementById('count').textContent === '1 of 6 done'")
        for _ in range(4):
            page.page.keyboard.down("1")
        page.page.keyboard.up("1")
        page.page.wait_for_timeout(100)
        assert page.text("#count") == "1 of 6 done"
        page.close()
    assert len(read_labels(path)) == 1


def test_buttons_work_and_the_focus_is_seen(chromium, path):
    with serving(queue(path)) as server:
        page = Page(chromium, server.url).open()
        names = page.page.evaluate(
            "[...document.querySelectorAll('#label button')].map(b => b.innerText.trim())"
        )
        assert [name.split()[-1] for name in names] == ["1", "Tie", "2", "Skip", "Undo"]
        seen = []
        for _ in range(5):  # the post, and the buttons that can be pressed
            page.page.keyboard.press("Tab")
            seen.append(
                page.page.evaluate(
                    "[document.activeElement.innerText, getComputedStyle(document.activeElement).outlineStyle]"
                )
            )
        assert all(outline == "solid" for _, outline in seen)
        before = page.page.evaluate(PAIR)
        page.page.get_by_role("button", name="Summary 1").click()
        page.page.wait_for_function(f"before => {PAIR} !== before", arg=before)
        assert "Summary 1. 1 of 6 done." in page.page.locator("[aria-live=polite]").inner_text()
        page.page.get_by_role("button", name="Undo").click()
        page.page.wait_for_function(f"before => {PAIR} === before", arg=before)
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(chromium, path, scheme):
    """Long posts, a word without an end, 40 characters of name: no sideways scrolling, the buttons always there."""
    long = Matchup("0" * 16, "word " * 900 + "x" * 400, BETTER, " y" * 300 + "z" * 300, WORSE, " short")
    with serving(queue(path, [long, *matchups(2)])) as server:
        page = Page(chromium, server.url, 360, 640, color_scheme=scheme, has_touch=True).open(
            "?annotator=" + "a" * 40
        )
        while page.page.evaluate(PAIR):
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
            first, second = (page.page.locator(place).bounding_box() for place in ("#first", "#second"))
            assert first["y"] + first["height"] <= second["y"] and abs(first["x"] - second["x"]) < 1, (
                "stacked"
            )
            for button in page.page.locator("#label button").all():
                box = button.bounding_box()
                assert 0 <= box["x"] and box["x"] + box["width"] <= 360
                assert 0 <= box["y"] and box["y"] + box["height"] <= 640
            page.press("1")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
        page.close()


def test_a_wide_screen_has_the_responses_side_by_side(chromium, path):
    with serving(queue(path)) as server:
        page = Page(chromium, server.url).open()
        first, second = (page.page.locator(place).bounding_box() for place in ("#first", "#second"))
        assert abs(first["y"] - second["y"]) < 1 and first["x"] + first["width"] <= second["x"]
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 1100
        page.close()


def test_contrast_of_text_and_ground(chromium, path):
    """WCAG AA: 4.5 to 1, in both colour schemes, for texts, hints and buttons."""
    contrast = """place => {
        const style = element => getComputedStyle(element);
        let element = document.querySelector(place), ground = element;
        while (style(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
        const light = colour => {
            const parts = colour.match(/\\d+/g).map(part => part / 255)
                .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
            return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
        };
        const [a, b] = [light(style(element).color), light(style(ground).backgroundColor)];
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    }"""
    with serving(queue(path)) as server:
        for scheme in ("light", "dark"):
            page = Page(chromium, server.url, color_scheme=scheme).open()
            for place in (
                "#question",
                "#prompt",
                "#prompt-title",
                "#who",
                "button.choice",
                ".lesser button",
                "kbd",
            ):
                assert page.page.evaluate(contrast, place) >= 4.5, (scheme, place)
            page.close()


def test_a_server_that_is_gone_or_new_is_told_and_nothing_is_lost(chromium, path):
    first = queue(path)
    with serving(first) as server:
        page = Page(chromium, server.url).open()
        page.press(page.better_key())
    first.close()
    page.page.keyboard.press("1")
    page.page.wait_for_selector("#problem:visible")
    assert "nothing was stored" in page.text("#problem-text") and page.text("#count") == "1 of 6 done"
    with serving(queue(path)) as server:
        page.url = server.url
        page.open()
        assert page.text("#count") == "1 of 6 done" and not page.page.is_visible("#problem")
        server.token = "of another start"
        page.page.keyboard.press("1")
        page.page.wait_for_selector("#problem:visible")
        assert "load it again" in page.text("#problem-text")
        page.page.get_by_role("button", name="Load again").click()
        page.page.wait_for_selector("#label:visible")
        page.press(page.better_key())
        assert page.text("#count") == "2 of 6 done"
    page.context.close()
    assert [label.winner for label in read_labels(path)] == ["a", "a"]


def test_a_name_that_is_none_is_told(chromium, path):
    with serving(queue(path, annotators=["anna"])) as server:
        page = Page(chromium, server.url).open("?annotator=eve")
        assert page.text("#problem-text") == "This run has no annotator eve."
        page.page.fill("#name", "anna")
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#label:visible")
        assert not page.page.is_visible("#problem")
        page.context.close()
