"""TL;DR through a chat template: the post is a question for a summary, the summary the answer."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizers import CHATML, SENTENCES, byte_level

from drpo.data.encode import query_counter
from drpo.data.load import DataConfig, load_examples
from drpo.data.records import DataError

POST = "He never washes the dishes.\nI asked him twice.\nWhat should I do?"
QUESTION = (
    "<|im_start|>user\nSummarize the following Reddit post in one or two sentences.\n\n"
    "SUBREDDIT: r/advice\n\nTITLE: my room mate\n\nPOST: {}\n\nTL;DR:<|im_end|>\n<|im_start|>assistant\n"
)
INFO = {"subreddit": "advice", "title": "my room mate", "post": POST}
PLAIN = QUESTION.partition("sentences.\n\n")[2].partition("<|im_end|>")[0].format(POST)


@pytest.fixture(scope="module")
def tokenizer():
    """With an end of turn of its own beside its end of text."""
    return byte_level([*SENTENCES, POST], chat_template=CHATML)


def examples(tmp_path, tokenizer, view, rows, **changes):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(task="tldr", path=str(path), eval_fraction=0, chat_template=True, **changes)
    return load_examples(config, tokenizer, view).train


RANKED = {**INFO, "summaries": [" dishes.", "Dishes, again? ", " nobody washes"], "overall": [2, 7, 4]}
LAYOUTS = {
    "post + summaries + overall": RANKED,
    "post + summary": {**INFO, "summary": " Dishes, again?"},
    "info + summaries + choice": {
        "info": INFO,
        "summaries": [{"text": " dishes."}, {"text": " Dishes, again?"}],
        "choice": 1,
    },
    "info + summary": {"info": INFO, "summary": {"text": "Dishes, again?", "axes": {"overall": 7}}},
    "prompt + completion": {"prompt": PLAIN, "completion": " Dishes, again?"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_same_conversation(tmp_path, tokenizer, layout):
    [example] = examples(tmp_path, tokenizer, "demonstrations", [LAYOUTS[layout]])
    assert tokenizer.decode(example.query_ids) == QUESTION.format(POST)
    assert tokenizer.decode(example.completion_ids) == "Dishes, again?<|im_end|>"
    assert example.record.shared_prompt == PLAIN, (
        "judges and other models see the post as it is without a template"
    )
    assert [message["role"] for message in example.record.chat.messages] == ["user"]


def test_ranked_summaries_make_pairs_and_prompts(tmp_path, tokenizer):
    pairs = examples(tmp_path, tokenizer, "pairs", [RANKED])
    assert {(pair.record.chosen, pair.record.rejected) for pair in pairs} == {
        ("Dishes, again?", "dishes."),
        ("Dishes, again?", "nobody washes"),
        ("nobody washes", "dishes."),
    }
    [prompt] = examples(tmp_path, tokenizer, "prompts", [RANKED])
    assert prompt.record.completion == "Dishes, again?"
    assert [tokenizer.decode(ids) for ids in prompt.ranked_ids] == [
        "dishes.<|im_end|>",
        "Dishes, again?<|im_end|>",
        "nobody washes<|im_end|>",
    ]


def test_a_summary_scored_by_several_workers_is_one_of_its_post(tmp_path, tokenizer):
    rows = [
        {"info": INFO, "summary": {"text": text, "axes": {"overall": score}}}
        for text, score in ((" one", 2), (" one", 4), (" two", 7))
    ]
    [prompt] = examples(tmp_path, tokenizer, "prompts", rows)
    assert (prompt.record.responses, prompt.record.scores) == (("one", "two"), (3.0, 7.0))
    assert prompt.record.shared_prompt == PLAIN


def test_a_long_post_loses_paragraphs_and_the_template_stays(tmp_path, tokenizer):
    count = query_counter(tokenizer)
    for kept in ("He never washes the dishes.\nI asked him twice.", "He never washes the dishes."):
        shorter = QUESTION.format(kept)
        [example] = examples(
            tmp_path, tokenizer, "demonstrations", [RANKED], max_prompt_length=count(shorter)
        )
        assert tokenizer.decode(example.query_ids) == shorter
    with pytest.raises(DataError, match="no room for the post"):
        bare = count(QUESTION.format(""))
        examples(tmp_path, tokenizer, "demonstrations", [RANKED], max_prompt_length=bare)


def test_a_marker_that_a_post_spells_out_stays_text_when_the_post_is_cut(tmp_path, tokenizer):
    post = "She wrote <|im_end|> to me.\n" + POST
    row = {**RANKED, "post": post}
    limit = query_counter(tokenizer)(QUESTION.format(post)) - 1
    [example] = examples(tmp_path, tokenizer, "demonstrations", [row], max_prompt_length=limit)
    assert "to me.\nHe never" in tokenizer.decode(example.query_ids)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.query_ids.count(end) == 1, "the one of the template"


def test_spelled_out_markup_counts_as_text_when_a_post_is_shortened(tmp_path, tokenizer):
    spelled = "one <|im_end|><|im_end|><|im_end|>\ntwo <|im_end|>"
    row = {**INFO, "post": spelled, "summary": " dishes"}
    (whole,) = examples(tmp_path, tokenizer, "demonstrations", [row])
    longest = len(whole.query_ids)
    lengths = set()
    for limit in range(longest - 20, longest):
        (example,) = examples(tmp_path, tokenizer, "demonstrations", [row], max_prompt_length=limit)
        assert len(example.query_ids) <= limit
        lengths.add(len(example.query_ids))
    assert len(lengths) > 1
