from __future__ import annotations

import json
from dataclasses import fields
from typing import get_args

import pytest
from tiny_tokenizers import single_bytes

from drpo.config_help import hints_of
from drpo.data.files import convert_rows
from drpo.data.load import DataConfig, load_examples, load_texts
from drpo.data.records import DataError, Record, require_text
from drpo.data.tasks.registry import TASKS, TaskName
from drpo.data.tasks.task import Task


def test_tasks_are_the_values_of_the_key_and_read_or_make_their_records():
    assert set(TASKS) == {"demo", "tldr", "hh", "own"} == set(get_args(TaskName))
    keys = {option.name for option in fields(DataConfig)}
    for name, task in TASKS.items():
        assert task.name == name
        assert (task.read is None) != (task.make is None)
        assert set(task.unused) <= keys
        assert (task.make is not None) == ("path" in task.unused)


def review(row) -> Record:
    """Question and answer of one row."""
    return Record(
        f"Q: {require_text(row.values['q'], 'q')}\nA:",
        completion=" " + require_text(row.values.get("a"), "a"),
        origin=row.origin,
        extra={"columns": sorted(row.values)},
    )


def first_words(text, num_tokens, max_length):
    """Keep as many words of the question as fit."""
    words = text.removesuffix("\nA:").split()
    while num_tokens(" ".join(words) + "\nA:") > max_length:
        words.pop()
    return " ".join(words) + "\nA:"


REVIEWS = Task(
    "reviews",
    read=lambda table, bad, config, chat: (convert_rows(table, bad, review), ["a note"]),
    keep=lambda column: column != "ids",
    truncation="paragraph",
    by_paragraph=first_words,
)
POEMS = Task(
    "poems",
    make=lambda config, view, split: (
        [Record(f"{split} {i}", completion=f" {view}") for i in range(9)],
        ["made"],
    ),
    eval_split="held",
    unused=("path", "demo"),
)


@pytest.fixture
def reviews(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "reviews", REVIEWS)
    monkeypatch.setitem(hints_of(DataConfig), "task", str)  # of which the names are made when it is imported
    path = tmp_path / "rows.jsonl"
    rows = [{"q": f"is {i} a large number then", "a": f"no {i}", "ids": [1]} for i in range(20)]
    rows[3]["a"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": "reviews", "path": str(path), "eval_fraction": 0.3, "max_bad_fraction": 0.1}


def test_a_new_task_needs_nothing_but_its_value(reviews):
    splits = load_examples(DataConfig(**reviews, max_prompt_length=16), single_bytes(), "demonstrations")
    assert len(splits.train) + len(splits.eval) == 19
    for example in splits.train + splits.eval:
        record = example.record
        number = record.completion.removeprefix(" no ")
        assert record.prompt == f"Q: is {number} a\nA:" or record.prompt == f"Q: is {number}\nA:"
        assert record.extra == {"columns": ["a", "q"]}
    assert "a note" in splits.report and "no a" in splits.report
    assert all(text.startswith(("Q: ", " no ")) for text in load_texts(DataConfig(**reviews)))


def test_rules_of_a_new_task_are_those_of_its_value(reviews, monkeypatch):
    with pytest.raises(ValueError, match="^columns applies to task=own only"):
        DataConfig(**reviews, columns={"prompt": "q"})
    with pytest.raises(ValueError, match="^path must name the data for task=reviews"):
        DataConfig(task="reviews")
    options = {"path": "x", "truncation": "paragraph", "max_prompt_length": 9}
    with pytest.raises(ValueError, match="can be paragraph for task=tldr or reviews only"):
        DataConfig(task="hh", **options)
    assert DataConfig(task="reviews", **options).prompt_truncation == "paragraph"
    monkeypatch.setitem(TASKS, "poems", POEMS)
    with pytest.raises(ValueError, match="^path does not apply to task=poems"):
        DataConfig(task="poems", path="x")
    splits = load_examples(DataConfig(task="poems"), single_bytes(), "demonstrations")
    assert [e.record.prompt for e in splits.eval] == [f"held {i}" for i in range(9)]
    assert [e.record.prompt for e in splits.train] == [f"train {i}" for i in range(9)]
    with pytest.raises(DataError, match="no file or folder"):
        load_texts(DataConfig(task="reviews", path="nowhere.jsonl"))
    assert set(load_texts(DataConfig(task="poems"))) == {" prompts", *(f"train {i}" for i in range(9))}
