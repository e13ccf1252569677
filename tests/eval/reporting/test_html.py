"""Pages as files: what a text may hold that HTML, or a reader, could not see."""

from __future__ import annotations

from eval.reporting.html import write_pages


def test_control_characters_are_shown_and_line_breaks_stay(tmp_path):
    text = "a\x00b\x01\x1f\x7f\tc\n\r\n€"
    write_pages({"page.html": text, "page.md": text}, tmp_path / "pages")
    for name in ("page.html", "page.md"):
        content = (tmp_path / "pages" / name).read_bytes()
        assert content == "a␀b␁␟␡\tc\n\r\n€".encode()


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path):
    write_pages({"page.html": "a\ud800b"}, tmp_path)
    assert (tmp_path / "page.html").read_bytes() == b"a?b"
