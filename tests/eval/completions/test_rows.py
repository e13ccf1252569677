"""Completions on disk: what is read, what is refused, resuming a file, files made elsewhere."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny_runs import CLEAN, ROOT

from drpo.data.records import DataError
from eval.completions.fixed_systems import constant_rows, reference_rows
from eval.completions.rows import (
    CompletionRow,
    CompletionsWriter,
    import_alpaca_eval,
    load_completions,
    prompt_id_of,
    read_completions,
    read_meta,
)

PROMPT = "POST: where is my hat?\nTL;DR:"


def row(system: str = "sft", prompt: str = PROMPT, **changes) -> CompletionRow:
    known = CompletionRow(
        system, prompt_id_of(prompt), prompt, " héllo\n", True, 3, 0, " hat lost", {"beta": 1}
    )
    return replace(known, **changes)


def write(path, *lines) -> None:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def as_dict(**changes) -> dict:
    values = {
        "system": "sft",
        "prompt_id": hashlib.sha256(PROMPT.encode()).hexdigest()[:16],
        "prompt": PROMPT,
        "response": " x",
        "ended": True,
        "num_tokens": 2,
        "seed": 0,
        "reference": None,
        "meta": {},
    }
    return {k: v for k, v in {**values, **changes}.items() if v != "left out"}


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "c.jsonl"
    rows = [row(), row("dpo", response="", ended=False, num_tokens=0, reference=None, seed=2)]
    writer = CompletionsWriter(path, {"model": "abc"})
    writer.write(rows[:1])
    writer.write(rows[1:])
    assert read_completions(path) == rows and read_meta(path) == {"model": "abc"}
    assert (tmp_path / "new" / "c.meta.json").exists()


def test_meta_may_hold_what_utf_8_does_not(tmp_path):
    rows = [row(meta={"half \ud800": "\udfff", "whole": "\U0001f600"})]
    CompletionsWriter(tmp_path / "c.jsonl", {}).write(rows)
    assert read_completions(tmp_path / "c.jsonl") == rows


def test_the_format_is_the_documented_one(tmp_path):
    path = tmp_path / "c.jsonl"
    CompletionsWriter(path, {}).write([row()])
    assert json.loads(path.read_text()) == as_dict(
        response=" héllo\n", num_tokens=3, reference=" hat lost", meta={"beta": 1}
    )


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "c.jsonl"
    CompletionsWriter(path, {"seed": 1}).write([row(), row(seed=1)])
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(as_dict(seed=2)).encode()[:40] + "é".encode()[:1])
    with pytest.raises(DataError, match="unfinished line"):
        read_completions(path)
    writer = CompletionsWriter(path, {"seed": 1})
    assert path.read_bytes() == whole
    assert writer.done == {row().key, row(seed=1).key}
    with pytest.raises(DataError, match="already has system sft"):
        writer.write([row(seed=1)])
    writer.write([row(seed=2)])
    assert [r.seed for r in read_completions(path)] == [0, 1, 2]


def test_a_file_is_not_continued_by_another_model(tmp_path):
    path = tmp_path / "c.jsonl"
    CompletionsWriter(path, {"model": "abc", "data": "x"}).write([row()])
    with pytest.raises(DataError, match="model: 'abc' -> 'def'"):
        CompletionsWriter(path, {"model": "def", "data": "x"})


WRITER = """
import resource, sys
from eval.completions.rows import CompletionRow, CompletionsWriter, prompt_id_of
writer = CompletionsWriter(sys.argv[1], {"model": "abc"})
print("open", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # a full disk: no file may grow beyond that
for seed in range(100):
    rows = [CompletionRow("sft", prompt_id_of("post"), "post", "x" * 100, True, 2, s) for s in (2 * seed, 2 * seed + 1)]
    try:
        writer.write(rows)
    except OSError as error:
        print(error, len(writer.done), flush=True)
        break
sys.stdin.readline()
"""


def test_one_writer_at_a_time_and_a_full_disk_leaves_the_file_whole(tmp_path):
    """Another process has the file; it ends, and the file holds the pairs of rows that fitted."""
    path = tmp_path / "c.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, env=CLEAN, **pipes)
    assert process.stdout.readline() == "open\n"
    full = process.stdout.readline()
    with pytest.raises(DataError, match="is being written by another run"):
        CompletionsWriter(path, {"model": "abc"})
    process.communicate("\n", timeout=60)
    assert "File too large 6" in full.replace("[Errno 27] ", "")
    writer = CompletionsWriter(path, {"model": "abc"})
    assert len(writer.done) == 6 and [r.seed for r in read_completions(path)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="is being written by another run"):
        CompletionsWriter(path, {"model": "abc"})
    writer.close()
    CompletionsWriter(path, {"model": "abc"}).write([row()])


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="completions cannot be written to .*file/c.jsonl"):
        CompletionsWriter(tmp_path / "file" / "c.jsonl", {})


def test_a_file_without_rows_binds_nobody(tmp_path):
    """A run that was killed before its first row leaves nothing that another one would continue."""
    path = tmp_path / "c.jsonl"
    CompletionsWriter(path, {"model": "abc"})
    CompletionsWriter(path, {"model": "def"}).write([row()])
    assert read_meta(path) == {"model": "def"} and len(read_completions(path)) == 1


def test_facts_that_cannot_be_read_are_told(tmp_path):
    path = tmp_path / "c.jsonl"
    CompletionsWriter(path, {"model": "abc"}).write([row()])
    told = {'{"mo': "c.meta.json is not JSON", "[" * 100_000: "is not JSON", "[]": "must hold a JSON object"}
    for text, message in told.items():
        (tmp_path / "c.meta.json").write_text(text)
        with pytest.raises(DataError, match=message):
            CompletionsWriter(path, {"model": "abc"})


BAD = {
    "no such field": (as_dict(response="left out"), "1 x missing field"),
    "wrong type": (as_dict(ended=1), "1 x wrong type"),
    "bool as number": (as_dict(seed=True), "1 x wrong type"),
    "empty prompt": (as_dict(prompt="  "), "1 x empty text"),
    "other prompt's id": (as_dict(prompt="other"), "1 x prompt_id is not of this prompt"),
    "unknown field": (as_dict(score=1.0), "1 x unknown field"),
    "half a character": (as_dict(response="\ud800"), "1 x invalid text"),
    "no JSON": ("{not json}\n", "1 x invalid JSON"),
    "too deep": ("[" * 100_000 + "\n", "1 x invalid JSON"),
    "negative seed": (as_dict(seed=-1), "1 x number out of range"),
    "negative length": (as_dict(num_tokens=-5), "1 x number out of range"),
    "length without end": (as_dict(num_tokens=10**400), "1 x number out of range"),
    "no object": ("[1]\n", "1 x wrong type"),
    "repeated": (as_dict(), "1 x repeated row"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_counted_and_named(tmp_path, line, message):
    write(tmp_path / "c.jsonl", as_dict(), line)
    with pytest.raises(DataError, match=f"1 rows are bad:\n{message}\n    c.jsonl:2"):
        read_completions(tmp_path / "c.jsonl")


def test_a_missing_and_an_empty_file_are_told(tmp_path):
    with pytest.raises(DataError, match="no completions file"):
        read_completions(tmp_path / "c.jsonl")
    write(tmp_path / "c.jsonl", "")
    with pytest.raises(DataError, match="has no rows"):
        read_completions(tmp_path / "c.jsonl")


def test_alpaca_eval_files_are_imported(tmp_path):
    path = tmp_path / "outputs.json"
    path.write_text(
        json.dumps([{"instruction": PROMPT, "output": " o", "generator": "gpt", "dataset": "selfinstruct"}])
    )
    (only,) = import_alpaca_eval(path)
    assert only == CompletionRow(
        "gpt", prompt_id_of(PROMPT), PROMPT, " o", True, None, 0, None, {"dataset": "selfinstruct"}
    )
    path.write_text(json.dumps([{"instruction": PROMPT, "generator": "gpt"}]))
    with pytest.raises(DataError, match="missing field"):
        import_alpaca_eval(path)


def test_several_files_are_one_table_and_repeats_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", as_dict())
    write(tmp_path / "b.jsonl", as_dict(system="dpo"))
    (tmp_path / "c.json").write_text(json.dumps([{"instruction": PROMPT, "output": "o", "generator": "gpt"}]))
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.json")]
    assert [r.system for r in load_completions(paths)] == ["sft", "dpo", "gpt"]
    with pytest.raises(DataError, match="repeats system sft"):
        load_completions([paths[0], paths[0]])


def test_the_datasets_own_responses_are_a_system():
    rows = [row(), row("dpo", reference=None), row(prompt="other", reference=" r")]
    made = reference_rows(rows)
    assert [(r.system, r.prompt, r.response, r.num_tokens) for r in made] == [
        ("reference", PROMPT, " hat lost", None),
        ("reference", "other", " r", None),
    ]
    with pytest.raises(DataError, match="1 x no reference"):
        reference_rows([*rows, row(prompt="third", reference=None)])
    with pytest.raises(DataError, match="1 x two references"):
        reference_rows([*rows, row("ppo", reference=" another")])


def test_a_constant_system_answers_every_prompt_once():
    rows = [row(), row("dpo"), row(prompt="other")]
    assert [(r.system, r.prompt, r.response) for r in constant_rows(rows, "null", "-")] == [
        ("null", PROMPT, "-"),
        ("null", "other", "-"),
    ]
