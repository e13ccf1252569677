"""Lines and objects of JSONL files: where a line ends, and what a damaged one says."""

from __future__ import annotations

import json
import random

import pytest

from drpo.data.records import DataError
from drpo.jsonl import lines_of, read_objects

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
