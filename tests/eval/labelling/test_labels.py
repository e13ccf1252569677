"""Labels on disk: appended at once, read strictly, the last word counts."""

from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import replace

import pytest
from label_runs import BETTER, WORSE, matchups

from drpo.data.records import DataError
from eval.labelling.labels import (
    LabelsWriter,
    checked_annotator,
    current_labels,
    label_of,
    load_labels,
    read_labels,
)

FIRST, SECOND, *_ = matchups()


def label(matchup=FIRST, annotator="anna", status="labelled", winner="a", order="ab", **more):
    return label_of(matchup, annotator, status, winner, order, **more)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "labels.jsonl"


# --- one label --------------------------------------------------------------------------------------------


def test_a_row_holds_what_was_shown_and_said(path):
    with LabelsWriter(path) as writer:
        writer.append([label(order="ba", winner="b", question="tldr-1", seconds=2.5, confidence=7.0)])
    (row,) = rows_of(path)
    assert row.pop("time").endswith("+00:00")
    assert row == {
        "prompt_id": hashlib.sha256(FIRST.prompt.encode()).hexdigest()[:16],
        "system_a": BETTER,
        "system_b": WORSE,
        "seed": 0,
        "annotator": "anna",
        "order": "ba",
        "status": "labelled",
        "winner": "b",
        "hash_a": hashlib.sha256(b" topic000 is late").hexdigest()[:16],
        "hash_b": hashlib.sha256(b" it is number 0").hexdigest()[:16],
        "length_a": 17,
        "length_b": 15,
        "question": "tldr-1",
        "seconds": 2.5,
        "confidence": 7.0,
    }


@pytest.mark.parametrize(
    "winner, order, score, first_slot",
    [
        ("a", "ab", 1, 1),
        ("a", "ba", 1, 0),
        ("b", "ab", 0, 0),
        ("b", "ba", 0, 1),
        ("tie", "ab", 0.5, 0.5),
        ("tie", "ba", 0.5, 0.5),
        ("a", None, 1, None),
    ],
)
def test_scores_and_slots(winner, order, score, first_slot):
    said = label(winner=winner, order=order)
    assert (said.score, said.first_slot_won) == (score, first_slot)


def test_a_skipped_comparison_has_no_winner():
    assert label(status="skipped", winner=None).score is None
    for status, winner in (("labelled", None), ("skipped", "a"), ("undone", "tie")):
        with pytest.raises(ValueError, match="winner"):
            label(status=status, winner=winner)


@pytest.mark.parametrize(
    "given, kept",
    [
        ("anna", "anna"),
        ("  Anna  B. ", "Anna B."),
        ("Jose\u0301", "Jos\u00e9"),
        ("\u738b 2", "\u738b 2"),
        ("a" * 40, "a" * 40),
    ],
)
def test_names(given, kept):
    assert checked_annotator(given) == kept


@pytest.mark.parametrize(
    "name", ["", "  ", "a" * 41, "<b>", "a/b", "a\nb\x00", ".hidden", "\ud800", None, 3, ["a"]]
)
def test_what_is_no_name(name):
    with pytest.raises(ValueError, match="name"):
        checked_annotator(name)


# --- the last word counts ---------------------------------------------------------------------------------


def test_the_last_row_of_an_annotator_and_comparison_counts():
    said = [
        label(winner="a"),
        label(SECOND, winner="b"),
        label(annotator="ben", winner="tie"),
        label(status="undone", winner=None),  # anna on the first one
        label(SECOND, winner="a"),
        label(status="skipped", winner=None),
        label(annotator="ben", status="undone", winner=None),
    ]
    assert current_labels(said) == [said[4], said[5]]
    assert current_labels(said[:4]) == [said[1], said[2]]


def test_two_files_may_share_an_annotator_but_no_label(tmp_path):
    one, other = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    for path, said in ((one, [label()]), (other, [label(SECOND), label(annotator="ben")])):
        with LabelsWriter(path) as writer:
            writer.append(said)
    assert len(load_labels([one, other])) == 3
    with LabelsWriter(other) as writer:
        writer.append([label()])
    with pytest.raises(DataError, match="1.jsonl both hold what anna said of prompt"):
        load_labels([one, other])


# --- reading ----------------------------------------------------------------------------------------------


def write(path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def good_row(path) -> dict:
    with LabelsWriter(path) as writer:
        writer.append([label()])
    return rows_of(path)[0]


def test_bad_rows_are_counted_and_named(path):
    good = good_row(path)
    bad = [
        {**good, "winner": "c"},
        {**good, "order": "first"},
        {**good, "status": "maybe"},
        {**good, "winner": None},
        {**good, "seconds": float("nan")},
        {**good, "confidence": 10**400},
        {**good, "length_a": -1},
        {**good, "annotator": "<b>"},
        {**good, "time": "\ud800"},
        {**good, "length_a": True},
        {**good, "seed": "0"},
        {**good, "colour": "red"},
        {name: value for name, value in good.items() if name != "hash_b"},
    ]
    write(path, json.dumps(good), *map(json.dumps, bad), "{", "[" * 100_000, "[]")
    with pytest.raises(DataError) as error:
        read_labels(path)
    message = str(error.value)
    assert "16 rows are bad" in message and "labels.jsonl:15" in message
    for told in (
        *("3 x unknown value", "winner is 'c'", "order is 'first'", "status is 'maybe'", "colour"),
        *("1 x status and winner differ", "3 x number out of range", "3 x wrong type", "length_a is bool"),
        *(
            "1 x missing field",
            "no hash_b",
            "2 x invalid JSON",
            "1 x bad annotator",
            "1 x invalid text",
            "a row is an object, not list",
        ),
    ):
        assert told in message, told


def test_a_missing_file_is_an_error(path):
    with pytest.raises(DataError, match="no labels file"):
        read_labels(path)


def test_an_unfinished_line_is_told_by_the_reader_and_cut_off_by_the_writer(path):
    good_row(path)
    whole = path.read_bytes()
    for length in (1, 40, len(whole) - 2):
        path.write_bytes(whole + whole[:length])
        with pytest.raises(DataError, match="unfinished line"):
            read_labels(path)
        with LabelsWriter(path) as writer:
            assert len(writer.labels) == 1 and writer.num_cut == length
            writer.append([label(SECOND)])
        assert [said.prompt_id for said in read_labels(path)] == [FIRST.prompt_id, SECOND.prompt_id]
        path.write_bytes(whole)


def test_an_end_that_no_kill_leaves_is_refused_and_kept(path):
    """A last line that an editor left without its line break, and a file that holds no labels at all."""
    good_row(path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "a whole label without a line break"),
        (b"my notes", "b'my notes'"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            LabelsWriter(path)
        assert path.read_bytes() == content


# --- writing ----------------------------------------------------------------------------------------------


def test_a_label_is_in_the_file_when_append_returns(path):
    with LabelsWriter(path) as writer:
        for i in range(3):
            writer.append([label(annotator=f"anna{i}")])
            assert len(read_labels(path)) == i + 1


def test_a_second_writer_is_refused_until_the_first_one_ends(path):
    with LabelsWriter(path):
        with pytest.raises(DataError, match="open in another run"):
            LabelsWriter(path)
    with LabelsWriter(path) as writer:
        writer.append([label()])


@pytest.mark.parametrize("room", [0, 100])
def test_what_cannot_be_written_leaves_no_half_line(path, room):
    """The system lets no file grow by more than `room` bytes."""
    with LabelsWriter(path) as writer:
        writer.append([label()])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        try:
            with pytest.raises(OSError):
                writer.append([label(SECOND)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(read_labels(path)) == 1
        writer.append([label(SECOND, winner="b")])
    assert [said.winner for said in read_labels(path)] == ["a", "b"]


def test_a_bad_file_is_no_file_to_append_to(path):
    write(path, "{}")
    with pytest.raises(DataError, match="missing field"):
        LabelsWriter(path)
    write(path)
    with LabelsWriter(path) as writer:  # the lock was given back
        writer.append([replace(label(), seconds=None)])
