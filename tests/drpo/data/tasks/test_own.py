from __future__ import annotations

import csv
import datetime
import gzip
import json

import pytest
from datasets import Dataset
from tiny_tokenizers import CHATML, byte_level

from drpo.data.chat import ChatTemplate
from drpo.data.files import Row, Table, read_table
from drpo.data.records import BadRows, DataError, RowError
from drpo.data.tasks.own import own_record, own_records

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
RENDERED = "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"


def convert(values, columns=None, chat=False):
    template = ChatTemplate(byte_level(chat_template=CHATML)) if chat else None
    return own_record(Row(values, "f:1"), columns or {}, template)


def texts(record):
    return {
        name: getattr(record, name)
        for name in ("prompt", "completion", "chosen", "rejected")
        if getattr(record, name) is not None
    }


# --- standard format ------------------------------------------------------------------------------------


def test_every_standard_type():
    assert texts(convert({"prompt": "The sky is"})) == {"prompt": "The sky is"}
    row = {"prompt": "The sky is", "completion": " blue."}
    assert texts(convert(row)) == row
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert texts(convert(row)) == row


def test_a_text_prompt_inside_the_pair_is_cut_at_the_last_assistant_turn():
    prompt = "\n\nHuman: can you?\n\nAssistant:"
    record = convert({"chosen": prompt + " I can", "rejected": prompt + " I cannot"})
    assert texts(record) == {"prompt": prompt, "chosen": " I can", "rejected": " I cannot"}


def test_ranked_rows_and_every_reset_source_together():
    row = {"prompt": "p", "completion": " c", "chosen": " a", "rejected": " b"}
    record = convert(row | {"responses": [" a", " b", " d"], "scores": [3, 1.5, 2]})
    assert texts(record) == row
    assert record.responses == (" a", " b", " d")
    assert record.scores == (3.0, 1.5, 2.0)


def test_mapped_columns_and_the_rest_in_extra():
    day = datetime.date(2026, 3, 1)
    row = {"question": "q", "answer": " a", "prompt": "not this", "id": 4, "tags": ["x"], "day": day}
    record = convert(row, {"prompt": "question", "completion": "answer"})
    assert texts(record) == {"prompt": "q", "completion": " a"}
    assert record.extra == {"prompt": "not this", "id": 4, "tags": ["x"], "day": "2026-03-01"}
    json.dumps(record.extra)


def test_scores_of_a_pair_have_columns_that_can_be_mapped():
    row = {"prompt": "p", "chosen": " a", "rejected": " b", "score_chosen": 3, "rejected_score": "1.5"}
    record = convert(row, {"chosen_score": "score_chosen"})
    assert record.extra == {"chosen_score": 3, "rejected_score": 1.5}  # as text: from a CSV file
    assert convert({"prompt": "p", "chosen": " a", "rejected": " b", "chosen_score": None}).extra == {}
    with pytest.raises(RowError, match="chosen_score"):
        convert({"prompt": "p", "chosen": " a", "rejected": " b", "chosen_score": "high"})


@pytest.mark.parametrize(
    ("given", "label"), [(True, True), ("False", False), ("true", True), (1, 1), ("spam", "spam"), ("1", "1")]
)
def test_a_label_is_kept_as_it_is_but_for_true_and_false_in_a_csv_file(given, label):
    record = convert({"prompt": "p", "completion": " c", "good": given}, {"label": "good"})
    assert record.extra == {"label": label}
    assert type(record.extra["label"]) is type(label)


def test_relevance_of_lines_is_a_list():
    row = {
        "prompt": "p",
        "chosen": " a",
        "rejected": " b",
        "chosen_relevance": "[1, 0]",
        "rejected_relevance": [1],
    }
    assert convert(row).extra == {"chosen_relevance": [1, 0], "rejected_relevance": [1]}


# --- conversations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER]}, {}),
        ({"prompt": [USER], "completion": [BLUE]}, {"completion": "It is blue."}),
        ({"messages": [USER, BLUE]}, {"completion": "It is blue."}),
        (
            {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
            {"chosen": "It is blue.", "rejected": "It is green."},
        ),
        (
            {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            {"chosen": "It is blue.", "rejected": "It is green."},
        ),
        # UltraFeedback: one turn as text, whole conversations in the other columns
        (
            {
                "prompt": USER["content"],
                "chosen": [USER, BLUE],
                "rejected": [USER, GREEN],
                "messages": [USER, BLUE],
            },
            {"completion": "It is blue.", "chosen": "It is blue.", "rejected": "It is green."},
        ),
        # text with a chat template: one user message
        ({"prompt": USER["content"], "completion": " It is blue."}, {"completion": "It is blue."}),
        ({"prompt": USER["content"], "completion": [BLUE]}, {"completion": "It is blue."}),
        # a dialogue as text
        (
            {
                "chosen": "\n\nHuman: What color is the sky?\n\nAssistant: It is blue.",
                "rejected": "\n\nHuman: What color is the sky?\n\nAssistant: It is green.",
            },
            {"chosen": "It is blue.", "rejected": "It is green."},
        ),
    ],
)
def test_every_conversational_type(row, expected):
    assert texts(convert(row, chat=True)) == {"prompt": RENDERED} | expected


def test_ranked_conversations():
    record = convert({"prompt": [USER], "responses": [[BLUE], "Grey."], "scores": [2, 1]}, chat=True)
    assert (record.prompt, record.responses) == (RENDERED, ("It is blue.", "Grey."))


def test_earlier_turns_are_part_of_the_prompt():
    messages = [USER, GREEN, {"role": "user", "content": "Sure?"}, BLUE]
    record = convert({"messages": messages}, chat=True)
    assert record.prompt == (
        "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\nIt is green.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert record.completion == "It is blue."


def test_messages_beside_a_completion_stay_in_extra():
    record = convert({"prompt": "p", "completion": " c", "messages": [USER, BLUE]})
    assert record.extra == {"messages": [USER, BLUE]}


def test_a_conversation_without_chat_template_says_what_to_set():
    with pytest.raises(DataError, match="f:1 holds a conversation: set chat_template=true"):
        convert({"messages": [USER, BLUE]})


# --- bad rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({}, "missing field"),
        ({"completion": None, "prompt": None}, "missing field"),
        ({"prompt": ""}, "empty text"),
        ({"prompt": 4}, "wrong type"),
        ({"prompt": ["a"]}, "wrong type"),
        ({"prompt": "p", "completion": "\n"}, "empty text"),
        ({"prompt": "p", "completion": 4}, "wrong type"),
        ({"prompt": "p", "completion": {"role": "assistant", "content": "x"}}, "wrong type"),
        ({"prompt": "p", "chosen": " a"}, "missing field"),
        ({"prompt": "p", "chosen": " a", "rejected": " a"}, "chosen = rejected"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "missing field"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "no assistant turn"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "prompts differ",
        ),
        ({"prompt": "p", "responses": [" a"]}, "missing field"),
        ({"prompt": "p", "scores": [1]}, "missing field"),
        ({"prompt": "p", "responses": " a", "scores": [1]}, "invalid JSON"),
        ({"prompt": "p", "responses": {}, "scores": [1]}, "wrong type"),
        ({"prompt": "p", "responses": [], "scores": []}, "empty text"),
        ({"prompt": "p", "responses": [" a", ""], "scores": [1, 2]}, "empty text"),
        ({"prompt": "p", "responses": [" a", " b"], "scores": [1]}, "responses and scores differ"),
        ({"prompt": "p", "responses": [" a"], "scores": [float("nan")]}, "score not finite"),
        ({"prompt": "p", "messages": "hi"}, "invalid JSON"),
        ({"messages": ["hi"]}, "wrong type"),
        ({"messages": []}, "wrong type"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty text"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "missing field"),
        ({"messages": [BLUE]}, "missing field"),
        ({"prompt": [{"role": "user"}], "completion": [BLUE]}, "wrong type"),
        ({"messages": [{"role": "system"}, USER, BLUE]}, "wrong type"),
        ({"prompt": [USER], "completion": [GREEN, BLUE]}, "prompts differ"),
        ({"chosen": [USER, BLUE], "rejected": [{**USER, "content": "x"}, GREEN]}, "prompts differ"),
        ({"prompt": "other", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "prompts differ"),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]}, "chosen = rejected"),
    ],
)
def test_bad_rows_by_kind(row, kind):
    # A chat template is needed for conversations; rows of plain text are tried without one.
    chat = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())
    with pytest.raises(RowError) as error:
        convert(row, chat=chat)
    assert error.value.kind == kind


# --- tables ---------------------------------------------------------------------------------------------


def test_a_missing_column_names_those_that_are_there():
    table = Table("mine.csv", ("question", "answer"), [Row({"question": "q", "answer": "a"}, "f:1")], 1)
    with pytest.raises(DataError, match=r"no column prompt.* question, answer\. .*columns\.prompt"):
        own_records(table, BadRows(), {})
    with pytest.raises(DataError, match=r"no column 'query' \(columns\.prompt\).* question, answer"):
        own_records(table, BadRows(), {"prompt": "query"})


ROWS = [
    {
        "question": "q1",
        "chosen": ' a, "b"',
        "rejected": " c\nd",
        "responses": [" x", " y"],
        "scores": [1.0, 2.5],
    },
    {"question": "q2", "chosen": " ü", "rejected": " d", "responses": [" z", " w"], "scores": [0.0, -1.0]},
]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "saved"])
def test_all_formats_give_the_same_records(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    match form:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case "jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
        case "json":
            path.write_text(json.dumps(ROWS))
        case "csv":
            with path.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(ROWS[0]))
                writer.writeheader()
                for row in ROWS:
                    lists = {name: json.dumps(row[name]) for name in ("responses", "scores")}
                    writer.writerow(row | lists)
        case "parquet":
            Dataset.from_list(ROWS).to_parquet(path)
        case "saved":
            Dataset.from_list(ROWS).save_to_disk(path)
    bad = BadRows()
    table = read_table(str(path), "train", bad)
    records = own_records(table, bad, {"prompt": "question"})
    assert len(bad) == 0
    for row, record in zip(ROWS, records, strict=True):
        assert texts(record) == {
            "prompt": row["question"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        assert list(record.responses) == row["responses"]
        assert list(record.scores) == row["scores"]
        assert record.extra == {}
