from __future__ import annotations

import gzip
import json
import random

import pytest
from real_data import DATA
from tiny_tokenizers import CHATML, byte_level

from drpo.data.chat import ChatTemplate
from drpo.data.dialogue import parse_turns, split_dialogue
from drpo.data.files import Row, Table, read_table
from drpo.data.records import BadRows, DataError, RowError
from drpo.data.tasks.hh import hh_record, hh_records, split_pair

FILE = DATA / "hh/harmless-base.jsonl.gz"
CONTEXT = "\n\nHuman: hello\n\nAssistant: Hi!\n\nHuman: can you?\n\nAssistant:"


def test_i_can_and_i_cannot_differ_in_the_whole_reply():
    assert split_pair(CONTEXT + " I can", CONTEXT + " I cannot") == (CONTEXT, " I can", " I cannot")
    assert split_pair(CONTEXT + " Sure", CONTEXT + " Sur") == (CONTEXT, " Sure", " Sur")


def test_prompt_and_response_make_the_dialogue_and_the_prompt_ends_at_the_last_marker():
    rng = random.Random(0)
    words = ["I can", "I cannot", "Human:", "Assistant:", "\n\n", " ", "no", "Human", "\nAssistant:"]
    for _ in range(300):
        turns = rng.randrange(1, 5)
        text = ""
        for _ in range(turns):
            human, reply = (" x" + "".join(rng.choices(words[:-5], k=3)) for _ in "ha")
            text += f"\n\nHuman:{human}\n\nAssistant:{reply}"
        prompt, response = split_dialogue(text)
        assert prompt + response == text
        assert prompt.endswith("\n\nAssistant:")
        assert prompt.count("\n\nAssistant:") == turns
        assert "\n\nAssistant:" not in response


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n\nHuman: hello", "no assistant turn"),
        ("\n\nHuman: hello\nAssistant: one newline only", "no assistant turn"),
        (CONTEXT + " yes\n\nHuman: thanks", "no assistant turn"),
        (CONTEXT, "empty text"),
        (CONTEXT + "  \n", "empty text"),
    ],
)
def test_dialogues_without_a_last_reply(text, kind):
    with pytest.raises(RowError) as error:
        split_dialogue(text)
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"chosen": CONTEXT + " a"}, "missing field"),
        ({"chosen": CONTEXT + " a", "rejected": None}, "missing field"),
        ({"chosen": CONTEXT + " a", "rejected": 4}, "wrong type"),
        ({"chosen": CONTEXT + " a", "rejected": CONTEXT + " a"}, "chosen = rejected"),
        ({"chosen": CONTEXT + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "prompts differ"),
    ],
)
def test_bad_rows_by_kind(values, kind):
    with pytest.raises(RowError) as error:
        hh_record(Row(values, "f:1"), None)
    assert error.value.kind == kind


def test_a_record_keeps_the_context_the_origin_and_the_other_columns():
    record = hh_record(Row({"chosen": CONTEXT + " a", "rejected": CONTEXT + " b", "id": 5}, "f:1"), None)
    assert (record.prompt, record.chosen, record.rejected) == (CONTEXT, " a", " b")
    assert record.completion is None
    assert (record.origin, record.extra) == ("f:1", {"id": 5})


def test_a_table_without_the_columns_names_those_that_are_there():
    with pytest.raises(DataError, match="no column rejected; its columns are: chosen, text"):
        hh_records(Table("t", ("chosen", "text"), [], 1), BadRows())


def test_turns():
    assert parse_turns(CONTEXT) == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "can you?"},
    ]
    # Some dialogues have two turns of one speaker in a row, or an empty turn in the middle: kept as they are.
    assert [
        turn["role"]
        for turn in parse_turns("\n\nHuman: a\n\nHuman: b\n\nAssistant:\n\nHuman: c\n\nAssistant:")
    ] == [
        "user",
        "user",
        "assistant",
        "user",
    ]
    with pytest.raises(RowError) as error:
        parse_turns("Once upon a time\n\nHuman: a\n\nAssistant:")
    assert error.value.kind == "no human turn"


def test_turns_go_through_the_chat_template_with_their_context():
    chat = ChatTemplate(byte_level(chat_template=CHATML))
    record = hh_record(Row({"chosen": CONTEXT + " I can ", "rejected": CONTEXT + " I cannot"}, "f:1"), chat)
    assert record.prompt == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\ncan you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (record.chosen, record.rejected) == ("I can", "I cannot")


@pytest.mark.skipif(not FILE.is_file(), reason=f"no real HH data at {FILE} (set DRPO_DATA)")
def test_every_row_of_the_real_file_is_a_record_or_a_counted_bad_row():
    lines = [json.loads(line) for line in gzip.open(FILE, "rt", encoding="utf-8")]
    bad = BadRows()
    table = read_table(str(FILE), "train", bad)
    records = hh_records(table, bad)
    assert table.num_rows == len(lines) == 1800
    assert len(records) + len(bad) == 1800
    assert bad.counts == {"empty text": 4, "prompts differ": 2}
    for record in records:
        row = lines[int(record.origin.rpartition(":")[2]) - 1]
        assert record.prompt + record.chosen == row["chosen"]
        assert record.prompt + record.rejected == row["rejected"]

    chat = ChatTemplate(byte_level(chat_template=CHATML))
    rendered = hh_records(table, BadRows(), chat)
    assert [record.origin for record in rendered] == [record.origin for record in records]
