from __future__ import annotations

import json
import random

import pytest
from datasets import Dataset
from real_data import DATA
from tiny_tokenizers import byte_level, single_bytes

from drpo.data.encode import query_counter
from drpo.data.files import Row, Table, read_table
from drpo.data.records import BadRows, DataError, RowError
from drpo.data.tasks.tldr import (
    axis_record,
    comparison_record,
    demonstration_record,
    format_query,
    formatted_record,
    keep_column,
    ranked_record,
    tldr_records,
    truncate_query,
)

FILE = DATA / "tldr/axis.jsonl"

INFO = {
    "id": "t3_1",
    "post": "The post.",
    "title": "A title",
    "subreddit": "advice",
    "site": None,
    "article": None,
}
ARTICLE = {
    "id": "a1",
    "post": None,
    "title": "News",
    "subreddit": None,
    "site": "cnn",
    "article": "It rained.",
}
QUERY = "SUBREDDIT: r/advice\n\nTITLE: A title\n\nPOST: The post.\n\nTL;DR:"


def comparison(choice=1, info=INFO, texts=(" first", " second")):
    return {
        "info": info,
        "summaries": [{"text": text, "policy": f"policy{i}", "note": "n"} for i, text in enumerate(texts)],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 8},
    }


def axis(text, overall, info=INFO):
    axes = {"overall": overall, "accuracy": 7, "coverage": 5, "coherence": 7, "compatible": None}
    summary = {"text": text, "policy": "sup2", "note": None, "axes": axes}
    return {"info": info, "summary": summary, "worker": "w", "batch": "tldraxis1", "split": "test"}


def table_of(rows):
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table("t", columns, [Row(row, f"t:{i}") for i, row in enumerate(rows, 1)], len(rows))


def records_of(rows):
    bad = BadRows()
    records, notes = tldr_records(table_of(rows), bad)
    return records, notes, bad


# --- template -------------------------------------------------------------------------------------------


def test_lines_without_a_value_are_left_out():
    assert format_query("p", "t", "s") == "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
    assert format_query("p", "t") == "TITLE: t\n\nPOST: p\n\nTL;DR:"
    assert format_query("p", None, "") == "POST: p\n\nTL;DR:"


# --- layouts --------------------------------------------------------------------------------------------


def test_local_ranked_rows():
    row = Row({"post": "p", "summaries": [" a", "b"], "overall": [3, 6], "id": 9}, "axis.jsonl:4")
    record = ranked_record(row)
    assert record.prompt == "POST: p\n\nTL;DR:"
    assert record.responses == (" a", " b")
    assert record.scores == (3.0, 6.0)
    assert (record.completion, record.chosen) == (None, None)
    assert record.origin == "axis.jsonl:4"
    assert record.extra["id"] == 9


@pytest.mark.parametrize("choice", [0, 1])
def test_comparisons(choice):
    record = comparison_record(Row(comparison(choice), "t:1"))
    texts = (" first", " second")
    assert record.prompt == QUERY
    assert (record.chosen, record.rejected) == (texts[choice], texts[1 - choice])
    assert record.extra["chosen_policy"] == f"policy{choice}"
    assert record.extra["rejected_policy"] == f"policy{1 - choice}"
    assert record.extra["extra"] == {"confidence": 8}
    assert record.extra["info"]["id"] == "t3_1"


def test_the_n_plus_preference_set_is_read_from_its_original_columns():
    made = {
        "query": "SUBREDDIT: cut",
        "chosen": " second<|endoftext|>",
        "rejected": " first<|endoftext|>",
        "chosen_policy": "x",
        "query_chosen": "...",
        "query_token": [1, 2],
        "chosen_token_len": 3,
    }
    record = comparison_record(Row(comparison(1) | made, "t:1"))
    assert record.chosen == " second"
    assert record.extra["chosen_policy"] == "policy1"
    assert not {"query", "chosen", "query_chosen", "query_token", "chosen_token_len"} & set(record.extra)


def test_the_n_plus_demonstrations_get_their_leading_space_and_no_stop_token():
    row = {
        "id": "t3_1",
        "subreddit": "advice",
        "title": "A title",
        "post": "The post.",
        "summary": "Short.",
        "query": "SUBREDDIT: cut",
        "reference_response": " Short.<|endoftext|>",
        "query_reference_response": "...",
    }
    record = demonstration_record(Row(row, "t:1"))
    assert (record.prompt, record.completion) == (QUERY, " Short.")
    assert record.extra == {"id": "t3_1", "subreddit": "advice", "title": "A title", "post": "The post."}


def test_ready_prompts_of_trl():
    record = formatted_record(Row({"prompt": QUERY, "completion": " Short.", "n": 1}, "t:1"))
    assert (record.prompt, record.completion, record.extra) == (QUERY, " Short.", {"n": 1})
    record = formatted_record(Row({"prompt": QUERY, "chosen": "a", "rejected": " b"}, "t:1"))
    assert (record.chosen, record.rejected, record.completion) == (" a", " b", None)


def test_axis_rows_of_one_post_become_one_ranking_with_mean_scores():
    other = {**INFO, "post": "Another."}
    rows = [axis(" a", 3), axis(" b", 7), axis(" x", 1, other), axis("a", 6), axis(" c", 5)]
    records, notes, bad = records_of(rows)
    assert [record.responses for record in records] == [(" a", " b", " c"), (" x",)]
    assert [record.scores for record in records] == [(4.5, 7.0, 5.0), (1.0,)]
    assert records[0].prompt == QUERY
    assert records[0].extra["policies"] == ["sup2"] * 3
    assert records[0].origin == "t:1"
    assert (notes, len(bad)) == ([], 0)


def test_news_articles_are_left_out_with_a_note_and_are_not_bad():
    rows = [comparison(), comparison(info=ARTICLE), comparison(info=ARTICLE)]
    records, notes, bad = records_of(rows)
    assert len(records) == 1
    assert notes == ["2 rows are on CNN/DM articles, not Reddit posts: left out"]
    assert len(bad) == 0
    records, notes, _ = records_of([axis(" a", 3, ARTICLE), axis(" a", 3)])
    assert len(records) == len(notes) == 1


@pytest.mark.parametrize(
    ("convert", "values", "kind"),
    [
        (ranked_record, {"post": None, "summaries": [" a"], "overall": [1]}, "missing field"),
        (ranked_record, {"post": " ", "summaries": [" a"], "overall": [1]}, "empty text"),
        (ranked_record, {"post": 3, "summaries": [" a"], "overall": [1]}, "wrong type"),
        (ranked_record, {"post": "p", "overall": [1]}, "missing field"),
        (ranked_record, {"post": "p", "summaries": " a", "overall": [1]}, "wrong type"),
        (ranked_record, {"post": "p", "summaries": [], "overall": []}, "empty text"),
        (ranked_record, {"post": "p", "summaries": [" a", " "], "overall": [1, 2]}, "empty text"),
        (ranked_record, {"post": "p", "summaries": [" a"]}, "missing field"),
        (ranked_record, {"post": "p", "summaries": [" a"], "overall": [1, 2]}, "responses and scores differ"),
        (ranked_record, {"post": "p", "summaries": [" a"], "overall": [float("nan")]}, "score not finite"),
        (comparison_record, comparison(choice=2), "wrong type"),
        (comparison_record, comparison(choice=None), "wrong type"),
        (comparison_record, comparison(info=None), "missing field"),
        (comparison_record, comparison(texts=(" a",)), "missing field"),
        (comparison_record, comparison(texts=(" a", "a")), "chosen = rejected"),
        (comparison_record, comparison(texts=(" a", None)), "missing field"),
        (comparison_record, {**comparison(), "summaries": [" a", " b"]}, "wrong type"),
        (axis_record, axis(" a", None), "missing field"),
        (axis_record, {**axis(" a", 1), "summary": " a"}, "wrong type"),
        (demonstration_record, {"post": "p", "summary": ""}, "empty text"),
        (formatted_record, {"prompt": "POST: p", "completion": " a"}, "no TL;DR"),
        (formatted_record, {"prompt": QUERY, "chosen": " a"}, "missing field"),
        (formatted_record, {"prompt": QUERY, "chosen": " a", "rejected": " a"}, "chosen = rejected"),
        (formatted_record, {"prompt": QUERY, "completion": ""}, "empty text"),
    ],
)
def test_bad_rows_by_kind(convert, values, kind):
    with pytest.raises(RowError) as error:
        convert(Row(values, "t:1"))
    assert error.value.kind == kind


def test_an_unknown_layout_names_its_columns():
    with pytest.raises(DataError, match="its columns are body, tldr"):
        records_of([{"body": "p", "tldr": "s"}])


def test_a_saved_copy_of_a_hub_set_is_read_without_its_token_columns(tmp_path):
    rows = [comparison(0) | {"query_token": [1, 2, 3], "chosen_token": [4]}, comparison(1, ARTICLE)]
    Dataset.from_list([row | {"query_token": [1], "chosen_token": [2]} for row in rows]).save_to_disk(
        tmp_path / "c"
    )
    bad = BadRows()
    table = read_table(str(tmp_path / "c"), "train", bad, keep=keep_column)
    assert not any("_token" in name for name in table.columns)
    records, notes = tldr_records(table, bad)
    assert [record.chosen for record in records] == [" first"]
    assert len(notes) == 1


# --- truncation -----------------------------------------------------------------------------------------


def naive_truncation(fields, num_tokens, length):
    """Cut the post at its last newline, else by one character, until the whole query fits."""
    post, title, subreddit = fields
    while num_tokens(format_query(post, title, subreddit)) > length:
        if not post:
            return None
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return format_query(post, title, subreddit) if post.strip() else None


def random_fields(rng, words):
    paragraphs = [" ".join(rng.choices(words, k=rng.randrange(1, 15))) for _ in range(rng.randrange(1, 6))]
    post = paragraphs[0]
    for paragraph in paragraphs[1:]:
        post += rng.choice(["\n", "\n\n", "\n\n"]) + paragraph
    return post, rng.choice([None, "POST: of mine"]), rng.choice([None, "advice"])


@pytest.mark.parametrize("make", [single_bytes, byte_level])
def test_truncation_is_the_naive_loop(make):
    rng, num_tokens = random.Random(0), query_counter(make())
    words = ["dishes", "I", "can't", "TL;DR:", "room", "naïve", "POST:", "24", "never."]
    outcomes = set()
    for _ in range(300):
        fields = random_fields(rng, words)
        query = format_query(*fields)
        length = rng.randrange(15, 160)
        expected = naive_truncation(fields, num_tokens, length)
        if expected is None:
            with pytest.raises(RowError) as error:
                truncate_query(query, num_tokens, length)
            assert error.value.kind == "prompt too long"
            outcomes.add("no room")
            continue
        got = truncate_query(query, num_tokens, length)
        outcomes.add("whole" if got == query else "cut")
        assert num_tokens(got) <= length
        assert got.endswith("\n\nTL;DR:")
        first_paragraph = format_query(fields[0].split("\n")[0], *fields[1:])
        if make is byte_level and len(expected) < len(first_paragraph):
            # cut inside the first paragraph: with BPE one character more can make fewer tokens
            assert abs(len(got) - len(expected)) <= 8
        else:
            assert got == expected
    assert outcomes == {"no room", "whole", "cut"}


def test_paragraphs_go_before_characters_and_the_head_stays():
    num_tokens = query_counter(single_bytes())
    query = format_query("one two\n\nthree\nfour", "A title", "advice")
    head = "SUBREDDIT: r/advice\n\nTITLE: A title\n\nPOST: "

    def cut(length):
        return truncate_query(query, num_tokens, length)

    assert cut(len(query)) == query
    assert cut(len(query) - 1) == head + "one two\n\nthree" + "\n\nTL;DR:"
    assert cut(len(head + "one two\n\nTL;DR:") + 1) == head + "one two\n" + "\n\nTL;DR:"
    assert cut(len(head + "one two\n\nTL;DR:")) == head + "one two" + "\n\nTL;DR:"
    assert cut(len(head + "one two\n\nTL;DR:") - 3) == head + "one " + "\n\nTL;DR:"


# --- real data ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FILE.is_file(), reason=f"no real TL;DR data at {FILE} (set DRPO_DATA)")
def test_every_row_of_the_real_file_becomes_a_record():
    lines = [json.loads(line) for line in FILE.read_text(encoding="utf-8").split("\n") if line]
    bad = BadRows()
    table = read_table(str(FILE), "train", bad)
    records, notes = tldr_records(table, bad)
    assert (table.num_rows, len(records), len(bad), notes) == (572, 572, 0, [])
    assert sum(len(record.responses) for record in records) == 4110
    for line, record in zip(lines, records, strict=True):
        assert record.prompt == f"POST: {line['post']}\n\nTL;DR:"
        assert list(record.responses) == line["summaries"]
        assert list(record.scores) == line["overall"]


@pytest.mark.skipif(not FILE.is_file(), reason=f"no real TL;DR data at {FILE} (set DRPO_DATA)")
def test_real_posts_are_truncated_as_by_the_naive_loop():
    posts = [json.loads(line)["post"] for line in FILE.read_text(encoding="utf-8").split("\n")[:60]]
    num_tokens = query_counter(byte_level(posts, vocab_size=2000))
    num_cut = 0
    for post in posts:
        query = format_query(post)
        got = truncate_query(query, num_tokens, 160)
        expected = naive_truncation((post, None, None), num_tokens, 160)
        num_cut += got != query
        if len(expected) >= len(format_query(post.split("\n")[0])):
            assert got == expected
        assert abs(len(got) - len(expected)) <= 8
    assert num_cut > 30
