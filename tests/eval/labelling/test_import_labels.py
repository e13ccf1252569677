"""Human verdicts that come with data, as comparisons with a label each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo.config import load_recipe
from drpo.data.load import DataConfig
from drpo.data.records import BadRows, DataError, Record
from eval.completions.rows import read_completions
from eval.judging.matchup import pair_up
from eval.labelling.import_labels import SYSTEMS, ImportLabelsRecipe, labels_from_pairs
from eval.labelling.import_labels import import_labels as run
from eval.labelling.labels import current_labels, read_labels
from eval.labelling.ratings import side_by_side
from launch.command_line import find_recipe


def pair(prompt, chosen, rejected, origin="t:1", **extra) -> Record:
    return Record(prompt, chosen=chosen, rejected=rejected, origin=origin, extra=extra)


def made(records):
    bad = BadRows()
    rows, labels, notes = labels_from_pairs(records, bad)
    return rows, labels, notes, bad


def winner_text(rows, label) -> str:
    """The response that a label prefers."""
    (c,) = [c for c in pair_up(rows, *SYSTEMS) if (c.prompt_id, c.seed) == (label.prompt_id, label.seed)]
    return c.response_a if label.winner == "a" else c.response_b


def test_each_pair_is_a_comparison_and_its_label_prefers_the_chosen_response():
    records = [pair(f"p{i // 3}", f" good {i}", f" bad {i}") for i in range(30)]
    rows, labels, notes, bad = made(records)
    assert not bad and len(rows) == 60 and len(labels) == 30
    assert sorted(winner_text(rows, label) for label in labels) == sorted(r.chosen for r in records)
    assert {label.seed for label in labels} == {0, 1, 2}
    assert {label.annotator for label in labels} == {"data"} and {label.order for label in labels} == {None}
    assert {label.winner for label in labels} == {"a", "b"}, "which one is text_1 does not tell who won"
    assert notes == [
        "labels: 30, annotators: 1, prompts: 10, pairs: 30, pairs with labels by several annotators: 0"
    ]


def test_the_order_of_the_data_and_the_label_change_nothing_else():
    records = [pair(f"p{i // 3}", f" good {i}", f" bad {i}") for i in range(9)]
    flipped = [pair(r.prompt, r.rejected, r.chosen) for r in reversed(records)]
    rows, labels, *_ = made(records)
    rows_2, labels_2, *_ = made(flipped)
    as_set = {(row.system, row.prompt, row.response, row.seed) for row in rows}
    assert {(row.system, row.prompt, row.response, row.seed) for row in rows_2} == as_set
    scores = {label.key: label.score for label in labels}
    assert {label.key: 1 - label.score for label in labels_2} == scores


def test_several_workers_on_one_pair_are_several_labels_of_one_comparison():
    records = [
        pair("p", " x", " y", worker="w1", extra={"confidence": 9}),
        pair("p", " y", " x", worker="w2", extra={"confidence": 1}),
        pair("p", " x", " z", worker="w1"),
        pair("q", " x", " y", worker="w2", confidence=3.5),
    ]
    rows, labels, notes, _ = made(records)
    assert len(rows) == 6 and notes == [
        "labels: 4, annotators: 2, prompts: 2, pairs: 3, pairs with labels by several annotators: 1"
    ]
    one, two = labels[:2] if labels[0].key == labels[1].key else labels[1:3]
    assert one.key == two.key and {one.score, two.score} == {0, 1}
    assert sorted(label.confidence or 0 for label in labels) == [0, 1, 3.5, 9]
    shared = side_by_side([], labels).labels
    assert sorted(int(n) for n in (~(shared != shared)).sum(axis=1)) == [1, 1, 2]


def test_a_second_label_of_the_same_worker_replaces_the_first_and_is_told():
    rows, labels, notes, _ = made([pair("p", " x", " y", worker="w"), pair("p", " y", " x", worker="w")])
    (last,) = current_labels(labels)
    assert winner_text(rows, last) == " y"
    assert notes[1] == "an annotator's second labels of a pair, of which the last one counts: 1"


def test_bad_annotators_and_confidences_are_counted():
    *_, bad = made(
        [
            pair("p", " x", " y", worker="<w>"),
            pair("p", " x", " y", worker=3),
            pair("p", " x", " y", confidence="high"),
            pair("p", " x", " y", extra={"confidence": True}),
            pair("p", " x", " y", confidence=float("nan")),
            pair("p", " x", " y", confidence=10**400),
        ]
    )
    assert bad.counts == {"bad annotator": 2, "wrong type": 2, "number out of range": 2}


# --- the script -------------------------------------------------------------------------------------------

INFO = {"id": "t3_1", "title": "A title", "subreddit": "advice", "article": None}


def comparison(post, choice, worker, confidence, texts=(" first", " second")) -> str:
    """A row as openai/summarize_from_feedback has it."""
    row = {
        "info": {**INFO, "post": post},
        "summaries": [{"text": text, "policy": f"p{i}", "note": ""} for i, text in enumerate(texts)],
        "choice": choice,
        "worker": worker,
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": confidence},
    }
    return json.dumps(row)


@pytest.fixture
def tldr(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [comparison("one", 0, "w1", 9), comparison("one", 1, "w2", 2), comparison("two", 0, "w1", 5)]
    (tmp_path / "comparisons.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(**changes) -> ImportLabelsRecipe:
    known = {"data": DataConfig(task="tldr", path="comparisons.jsonl"), "run_dir": "run"}
    return ImportLabelsRecipe(**{**known, **changes})


def test_tldr_comparisons_with_their_workers(tldr, capsys):
    path = run(recipe())
    assert path == Path("run/labels.jsonl")
    out = capsys.readouterr().out
    assert "labels: 3, annotators: 2, prompts: 2, pairs: 2, pairs with labels by several annotators: 1" in out
    rows = read_completions("run/completions.jsonl")
    assert {row.prompt for row in rows} == {
        f"SUBREDDIT: r/advice\n\nTITLE: A title\n\nPOST: {post}\n\nTL;DR:" for post in ("one", "two")
    }
    said = {(label.annotator, label.confidence): winner_text(rows, label) for label in read_labels(path)}
    assert said == {("w1", 9.0): " first", ("w2", 2.0): " second", ("w1", 5.0): " first"}
    with pytest.raises(DataError, match="is there already"):
        run(recipe())


def test_the_demos_annotator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run(load_recipe(ImportLabelsRecipe, find_recipe("demo/import_labels.yaml"), []))
    assert len(read_labels(path)) == 256 and len(read_completions(path.parent / "completions.jsonl")) == 512


@pytest.mark.parametrize(
    "data, message",
    [
        ({"max_prompt_length": 9}, "data.max_prompt_length does not apply"),
        ({"eval_split": "test"}, "data.eval_split does not apply"),
    ],
)
def test_options_that_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        recipe(data=DataConfig(task="tldr", path="x", **data))
    with pytest.raises(ValueError, match="split must be train or eval"):
        recipe(data=DataConfig(), split="test")
