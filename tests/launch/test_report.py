"""launch/report.py as a user runs it: the pages anew from comparison.json, and errors in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_comparisons import comparison
from tiny_runs import finished, plain

from launch.report import main


def test_writes_the_pages_anew_from_the_file_alone(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()), encoding="utf-8")
    done = finished(plain("report"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip().splitlines()[-1])
    assert page == (tmp_path / "report.html").resolve()
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "report.html", "report.md"}
    first = [(tmp_path / name).read_bytes() for name in ("report.html", "report.md")]
    main([str(tmp_path / "comparison.json")])
    assert [(tmp_path / name).read_bytes() for name in ("report.html", "report.md")] == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds none of comparison.json, evaluation.json, metrics.jsonl: give the folder of"),
        ("{", "comparison.json is not JSON"),
        (b"\xff", "comparison.json is not JSON"),
        ("[" * 100_000, "comparison.json is not JSON"),
        ("{}", "title is missing"),
        ('{"title": NaN}', "title must be a valid string, got nan"),
    ],
)
def test_what_cannot_be_read_is_one_message(content, message, tmp_path):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "comparison.json").write_bytes(data)
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()), encoding="utf-8")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SystemExit, match="Is a directory.*report.html"):
        main([str(tmp_path)])
