"""Lines and objects of JSONL files: where a line ends, what a damaged one says; atomic writes of whole files."""

from __future__ import annotations

import json
import random

import pytest

from drpo.data.records import DataError, RowError
from drpo.jsonl import encodable, fields_of_line, lines_of, read_objects, write_whole

CUT_BY_SPLITLINES = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"What `str.splitlines` takes for an end of line and JSON does not (the controls are escaped by `json.dumps`)."


def test_only_newlines_end_a_line():
    assert list(lines_of("a\u2028b\x85c\n\n  \nd\u2029e\r\nf\rg\n")) == [
        (1, "a\u2028b\x85c"),
        (4, "d\u2029e"),
        (5, "f\rg"),
    ]
    assert list(lines_of(b"a\xe2\x80\xa8b\r\n\nc")) == [(1, b"a\xe2\x80\xa8b"), (3, b"c")]
    assert list(lines_of("")) == list(lines_of(b"")) == []


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_random_texts_come_back(tmp_path, end):
    rng = random.Random(0)
    letters = CUT_BY_SPLITLINES + '\n\r\t" \\é猫x'
    rows = [{"text": "".join(rng.choices(letters, k=rng.randrange(12)))} for _ in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    assert read_objects(path) == rows


@pytest.mark.parametrize("line", [b"{", b"\xff", b'"text', b"[" * 5000, b"\0\0\0", b"[1]", b"null", b"3"])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:3 (is not JSON|must be a JSON object)"):
        read_objects(path)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"{", "invalid JSON"),
        (b"[]", "wrong type"),
        (b'{"n": 1}', "missing field"),
        (b'{"n": true, "t": "x"}', "wrong type"),
        (b'{"n": -1, "t": "x"}', "number out of range"),
        (b'{"n": 1, "t": "x", "more": 2}', "unknown field"),
    ],
)
def test_line_without_exactly_its_fields_is_refused(line, kind):
    types = {"n": (int,), "t": (str,)}
    assert fields_of_line(b'{"t": "x", "n": 1}', types) == {"t": "x", "n": 1}
    with pytest.raises(RowError, match=f"^{kind}"):
        fields_of_line(line, types)


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_whole(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800\n")
    assert path.read_text() == "old\n" and [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    write_whole(path, encodable("new \ud800, \ud83d\ude00\n"))
    assert path.read_text(encoding="utf-8") == "new \ufffd, \U0001f600\n"
