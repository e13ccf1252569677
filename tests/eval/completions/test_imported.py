"""Completions made elsewhere: columns of any name, alpaca_eval's shape, and what is wrong with a file."""

from __future__ import annotations

import json
import re

import pytest

from drpo.data.records import DataError
from eval.completions.imported import ImportConfig, import_rows


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_only_prompt_and_response_are_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": " r"}, {"prompt": "q", "response": ""}])
    first, second = import_rows(ImportConfig(path=path), "gpt")
    assert (first.system, first.prompt, first.response) == ("gpt", "p", " r")
    assert first.prompt_id == "148de9c5a7a44d19"  # sha256sum of the letter p
    assert (first.ended, first.num_tokens, first.seed, first.reference, first.meta) == (
        True,
        None,
        0,
        None,
        {},
    )
    assert second.response == ""


def test_columns_have_any_name_and_the_rest_is_kept(tmp_path):
    rows = [
        {"q": "p", "a": "r", "m": "x", "gold": "g", "done": False, "n": 3, "run": 1, "cost": 0.5},
        {"q": "p", "a": "s", "m": "x", "gold": "g", "done": True, "n": 4, "run": 2, "cost": 0.7},
    ]
    columns = {"prompt": "q", "response": "a", "system": "m", "reference": "gold"}
    columns |= {"ended": "done", "num_tokens": "n", "seed": "run"}
    found = import_rows(ImportConfig(path=write(tmp_path / "a.jsonl", rows), columns=columns), None)
    assert [(r.system, r.response, r.reference, r.ended, r.num_tokens, r.seed) for r in found] == [
        ("x", "r", "g", False, 3, 1),
        ("x", "s", "g", True, 4, 2),
    ]
    assert [r.meta for r in found] == [{"cost": 0.5}, {"cost": 0.7}]


def test_a_csv_file_has_its_numbers_as_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,system,ended,seed\np,r,x,False,7\n")
    (found,) = import_rows(ImportConfig(path=str(tmp_path / "a.csv")), None)
    assert (found.system, found.ended, found.seed) == ("x", False, 7)


def test_alpaca_eval_shape_keeps_its_generators_or_gets_one_name(tmp_path):
    items = [{"instruction": "p", "output": "r", "generator": "llama", "dataset": "koala"}]
    (tmp_path / "model_outputs.json").write_text(json.dumps(items))
    config = ImportConfig(path=str(tmp_path / "model_outputs.json"), format="alpaca_eval")
    (own,), (named,) = import_rows(config, None), import_rows(config, "mine")
    assert (own.system, own.prompt, own.response, own.meta) == ("llama", "p", "r", {"dataset": "koala"})
    assert named.system == "mine"


def test_all_bad_rows_are_counted(tmp_path):
    rows = [
        {"prompt": "p", "response": "r", "seed": 0, "ended": True},
        {"prompt": "p", "response": "s", "seed": 0, "ended": True},
        {"prompt": " ", "response": "r", "seed": 0, "ended": True},
        {"prompt": "q", "response": None, "seed": 0, "ended": True},
        {"prompt": "q", "response": "r", "seed": -1, "ended": True},
        {"prompt": "s", "response": "r", "seed": 0, "ended": "perhaps"},
    ]
    with pytest.raises(DataError) as caught:
        import_rows(ImportConfig(path=write(tmp_path / "a.jsonl", rows)), "x")
    text = str(caught.value)
    assert "5 rows are bad" in text
    for kind in (
        "1 x repeated row",
        "1 x empty text",
        "1 x missing field",
        "2 x wrong type",
        "a.jsonl:4: no response",
    ):
        assert kind in text


@pytest.mark.parametrize(
    "config, system, message",
    [
        ({"columns": {"response": "answer"}}, "x", "no column 'answer' (imported.columns.response)"),
        ({"columns": {"ended": "stop"}}, "x", "no column 'stop' (imported.columns.ended)"),
        ({}, None, "no column 'system' (imported.columns.system)"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, config, system, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(DataError, match=re.escape(message) + ".*columns are: prompt, response"):
        import_rows(ImportConfig(path=path, **config), system)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="^columns does not apply to format=alpaca_eval"):
        ImportConfig(path="x", format="alpaca_eval", columns={"prompt": "q"})
    with pytest.raises(ValueError, match="^columns.answer is unknown; the fields are: prompt, response"):
        ImportConfig(path="x", columns={"answer": "a"})
    with pytest.raises(DataError, match="no file /nowhere.jsonl"):
        import_rows(ImportConfig(path="/nowhere.jsonl"), "x")


@pytest.mark.parametrize(
    ("suffix", "number"),
    [("csv", "9" * 5000), ("csv", "-1"), ("csv", str(2**63)), ("jsonl", "-1"), ("jsonl", str(2**63))],
    ids=["CSV, long", "CSV, negative", "CSV, out of range", "JSON, negative", "JSON, out of range"],
)
def test_numbers_that_the_file_could_not_hold_are_refused(tmp_path, suffix, number):
    path = tmp_path / f"a.{suffix}"
    rows = {
        "csv": f"prompt,response,seed\np,r,{number}\n",
        "jsonl": f'{{"prompt": "p", "response": "r", "seed": {number}}}\n',
    }
    path.write_text(rows[suffix])
    with pytest.raises(DataError, match="1 x wrong type"):
        import_rows(ImportConfig(path=str(path)), "x")
