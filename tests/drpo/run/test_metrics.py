"""metrics.jsonl and phase times."""

from __future__ import annotations

import json
import math

import pytest

from drpo.data.records import DataError
from drpo.run.metrics import JsonLines, Phases, read_metrics, reproducible


def test_rows_are_appended_one_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write({"step": 1, "train/loss": 0.5})
    JsonLines(path).write({"step": 2}, {"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2},
        {"step": 3},
    ]


def test_floats_come_back_exactly(tmp_path):
    row = {"step": 1, "a": 0.1 + 0.2, "b": 1e-45, "c": -1 / 3, "d": math.inf}
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write(row)
    assert read_metrics(lines.path) == [row]
    lines.write({"step": 2, "a": math.nan})
    assert math.isnan(read_metrics(lines.path)[1]["a"])


def test_keep_up_to_drops_later_steps_and_keeps_earlier_lines_as_they_are(tmp_path):
    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.write({"step": 1, "n": 0}, {"step": 1, "n": 1}, {"step": 2}, {"step": 3})
    before = lines.path.read_bytes().splitlines(keepends=True)
    lines.keep_up_to(2)
    assert lines.path.read_bytes() == b"".join(before[:3])
    lines.keep_up_to(0)
    assert lines.path.read_bytes() == b""


def test_rows_can_be_written_after_a_cut(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1}, {"step": 2})
    lines.keep_up_to(1)
    lines.write({"step": 2, "again": 1.0})
    assert read_metrics(lines.path) == [{"step": 1}, {"step": 2, "again": 1.0}]


def test_damaged_rows_are_named(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for line in ('{"step": 2, "a', "[2]", '{"loss": 1.0}'):
        lines.path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(DataError, match=r"metrics\.jsonl:2 "):
            lines.keep_up_to(3)
    lines.path.write_text('{"step": 1}\n{"step": 2, "a')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON .* unfinished"):
        read_metrics(lines.path)


def test_a_file_that_is_not_there_stays_away(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.keep_up_to(3)
    assert list(tmp_path.iterdir()) == []


def test_a_last_line_cut_anywhere_by_a_kill_is_dropped(tmp_path):
    first = '{"step": 1, "text": "grün 猫"}\n'.encode()
    second = '{"step": 2, "text": "grün 猫"}\n'.encode()
    lines = JsonLines(tmp_path / "samples.jsonl")
    for length in range(len(second)):  # in the middle of a character too
        lines.path.write_bytes(first + second[:length])
        lines.keep_up_to(2)
        assert lines.path.read_bytes() == first
    lines.path.write_bytes(first + second)
    lines.keep_up_to(2)
    assert lines.path.read_bytes() == first + second


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\r", "\r\n", "\n", "\x0b", "\x0c", "\x1c"]
)
def test_line_separators_in_a_text_do_not_break_its_line(tmp_path, separator):
    rows = [{"step": 1, "text": f"a{separator}b"}, {"step": 2}]
    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.write(*rows)
    assert read_metrics(lines.path) == rows
    lines.keep_up_to(1)
    assert read_metrics(lines.path) == rows[:1]


def test_reproducible_leaves_out_times_and_throughput_only():
    row = {"step": 1, "time/step": 0.1, "perf/tokens": 9.0, "train/time/x": 1.0, "timed": 2.0, "eval/kl": 3.0}
    assert reproducible(row) == {"step": 1, "train/time/x": 1.0, "timed": 2.0, "eval/kl": 3.0}


def test_phases_add_up_repeats_and_survive_errors():
    phases = Phases()
    with phases("work"):
        pass
    once = phases.seconds()["time/work"]
    with pytest.raises(KeyError), phases("work"):
        raise KeyError
    with phases("rest"):
        pass
    seconds = phases.seconds()
    assert list(seconds) == ["time/work", "time/rest", "time/step"]
    assert seconds["time/work"] > once > 0
    assert seconds["time/step"] >= seconds["time/work"] + seconds["time/rest"]
