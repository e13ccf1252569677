"""A report opened in the browser, for its tests: nothing may be asked of a network or complained of in the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.reporting.comparison import comparison_from
from eval.reporting.report import write_report

WAIT = 10_000  # ms, for a busy machine


@contextmanager
def page_viewer(chromium) -> Iterator[Callable]:
    """`show(path, fragment)` opens a page; all is checked at the end."""
    pages, requests, complaints = [], [], []

    def show(path: Path, fragment: str = "", width: int = 1280, height: int = 900, scheme: str = "light"):
        address = path.as_uri()
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: requests.append(request.url.partition("#")[0]))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address + fragment)
        pages.append((page, address))
        return page

    yield show
    for page, _ in pages:
        assert page.evaluate("window.pwned") is None  # what hostile texts in the tests would set
        page.close()
    assert complaints == []
    loaded = {address for address in requests if not address.startswith("data:")}
    assert loaded <= {address for _, address in pages}  # the pages themselves, nothing else


@contextmanager
def report_viewer(chromium, folder: Path) -> Iterator[Callable]:
    """`show(comparison, fragment)` opens its report; all is checked at the end."""
    with page_viewer(chromium) as show:
        yield lambda whole, *place, **screen: show(
            write_report(comparison_from(whole), folder), *place, **screen
        )


def count(page) -> str:
    return page.locator("#count").inner_text()


def wait_for_count(page, text: str) -> None:
    page.wait_for_function("text => document.getElementById('count').textContent === text", arg=text)


def shown_id(page) -> str:
    return page.locator("#example > .note code").inner_text()


def response(page, side: int):
    return page.locator("#example .pair").first.locator(".panel").nth(side)


def to_start(page) -> None:
    while page.locator("#previous").is_enabled():
        page.keyboard.press("k")


def walk(page) -> list[str]:
    """The ids of all examples that match, in order."""
    to_start(page)
    ids = [shown_id(page)]
    while page.locator("#next").is_enabled():
        page.keyboard.press("j")
        ids.append(shown_id(page))
    return ids
