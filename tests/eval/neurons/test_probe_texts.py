from __future__ import annotations

import json

import pytest
from tiny_tokenizers import byte_level, sentencepiece

from drpo.data.records import DataError
from drpo.data.tasks.demo import DemoConfig, error_kind, make_demo, needed_items
from eval.neurons.probe_texts import ProbeConfig, demo_texts, load_probe_texts

DEMO = DemoConfig(num_train=8, num_eval=8)


def write_rows(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def rows_of(number: int, **extra) -> list[dict]:
    return [{"text": f"text number {i}", "label": i % 2 == 0, **extra} for i in range(number)]


def test_own_texts_are_encoded_labelled_and_split(tmp_path):
    tokenizer = byte_level()
    path = write_rows(tmp_path / "texts.jsonl", rows_of(60))
    encoded = load_probe_texts(ProbeConfig("texts", path=path), DEMO, tokenizer, 0.0)
    assert encoded.labels == [i % 2 == 0 for i in range(60)]
    assert encoded.context_ids == [[]] * 60
    assert tokenizer.batch_decode(encoded.text_ids) == [f"text number {i}" for i in range(60)]
    assert 0 < sum(encoded.held_out) < 30
    assert f"tested on {sum(encoded.held_out)} texts" in encoded.report


@pytest.mark.parametrize("make_tokenizer", [byte_level, sentencepiece])
def test_a_prompt_is_read_and_not_pooled(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"Q{i}:", "text": " yes" if i % 2 else " no", "label": bool(i % 2)} for i in range(40)]
    encoded = load_probe_texts(
        ProbeConfig("texts", path=write_rows(tmp_path / "t.jsonl", rows)), DEMO, tokenizer, 0.0
    )
    for context_ids, text_ids, row in zip(encoded.context_ids, encoded.text_ids, rows, strict=True):
        assert tokenizer.decode(context_ids) == row["prompt"]
        assert tokenizer.decode(context_ids + text_ids) == row["prompt"] + row["text"]
        assert tokenizer.eos_token_id not in text_ids


def test_a_bos_token_is_read_and_not_pooled(tmp_path):
    tokenizer = byte_level(bos=True)
    path = write_rows(tmp_path / "texts.jsonl", rows_of(40))
    encoded = load_probe_texts(ProbeConfig("texts", path=path), DEMO, tokenizer, 0.0)
    assert encoded.context_ids == [[tokenizer.bos_token_id]] * 40
    assert all(tokenizer.bos_token_id not in ids for ids in encoded.text_ids)


def test_rows_of_one_prompt_are_on_one_side(tmp_path):
    rows = [{"prompt": f"Q{i // 4}:", "text": f" a{i}", "label": bool(i % 2)} for i in range(160)]
    encoded = load_probe_texts(
        ProbeConfig("texts", path=write_rows(tmp_path / "t.jsonl", rows)), DEMO, byte_level(), 0.0
    )
    sides = {tuple(encoded.held_out[start : start + 4]) for start in range(0, 160, 4)}
    assert sides == {(True,) * 4, (False,) * 4}


def test_labels_of_a_csv_file_under_other_names(tmp_path):
    lines = [f"comment {i},{i % 2}" for i in range(40)]
    (tmp_path / "jigsaw.csv").write_text("\n".join(["comment_text,toxic", *lines]))
    config = ProbeConfig(
        "texts", path=str(tmp_path / "jigsaw.csv"), text_column="comment_text", label_column="toxic"
    )
    assert load_probe_texts(config, DEMO, byte_level(), 0.0).labels == [bool(i % 2) for i in range(40)]


def test_bad_rows_are_counted_shown_and_limited(tmp_path):
    bad = [
        {"text": "", "label": True},
        {"text": "a", "label": "maybe"},
        {"text": "b"},
        {"text": "long " * 50, "label": True},
        "{not json",
    ]
    config = ProbeConfig("texts", path=write_rows(tmp_path / "t.jsonl", [*rows_of(45), *bad]), max_length=40)
    encoded = load_probe_texts(config, DEMO, byte_level(), 0.1)
    assert len(encoded.labels) == 45
    assert "50 rows read, 5 bad" in encoded.report
    for part in ("1 x empty text", "label is 'maybe', not true or false", "1 x text too long", "t.jsonl:50"):
        assert part in encoded.report
    with pytest.raises(DataError, match="5 of 50 rows are bad"):
        load_probe_texts(config, DEMO, byte_level(), 0.05)


def test_texts_of_one_label_and_missing_columns_are_refused(tmp_path):
    one = [{"text": f"text {i}", "label": True} for i in range(30)]
    with pytest.raises(DataError, match="fitted on texts of both labels"):
        load_probe_texts(
            ProbeConfig("texts", path=write_rows(tmp_path / "one.jsonl", one)), DEMO, byte_level(), 0.0
        )
    config = ProbeConfig("texts", path=write_rows(tmp_path / "t.jsonl", rows_of(30)), label_column="toxic")
    with pytest.raises(DataError, match=r"no column 'toxic' \(probe.label_column\).*text, label"):
        load_probe_texts(config, DEMO, byte_level(), 0.0)


@pytest.mark.parametrize("fault", ["incomplete", "wrong_item", "wrong_order"])
def test_demo_texts_are_references_and_the_same_with_one_fault(fault):
    texts = demo_texts(DEMO, fault)
    evaluated = {record.prompt for record in make_demo(DEMO, "prompts", "eval")}
    assert len(texts) == 2 * 1024
    for right, wrong in zip(texts[::2], texts[1::2], strict=True):
        assert right.prompt == wrong.prompt and right.prompt not in evaluated
        assert (right.label, wrong.label) == (False, True)
        assert right.text.split() == needed_items(right.prompt)
        assert error_kind(wrong.prompt, wrong.text, True) == fault


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"path": "x.jsonl"}, "^path does not apply to source=demo"),
        ({"source": "texts"}, "^path must name the file of source=texts"),
        ({"source": "file", "path": "p.npz", "l2": 2.0}, "^l2 does not apply to source=file"),
        ({"source": "file", "path": "p.npz", "fault": "wrong_item"}, "^fault does not apply"),
        ({"source": "demo", "text_column": "t"}, "^text_column does not apply to source=demo"),
        ({"l2": 0.0}, "^l2 must be > 0, got 0.0"),
        ({"holdout": 1.0}, "^holdout must be > 0 and < 1, got 1.0"),
        ({"max_length": 0}, "^max_length must be >= 1 or null, got 0"),
    ],
)
def test_impossible_settings_name_their_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**arguments)
