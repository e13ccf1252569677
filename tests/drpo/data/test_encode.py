from __future__ import annotations

import random

import pytest
from tiny_tokenizers import CHATML, WITH_BOS, byte_level, sentencepiece, single_bytes

from drpo.data.chat import ChatTemplate
from drpo.data.encode import (
    encode_queries,
    encode_query,
    encode_records,
    encode_response,
    encode_responses,
    query_counter,
    truncate_left,
)
from drpo.data.records import BadRows, DataError, Record, RowError

PIECES = [
    "I can",
    " cannot",
    "\n\n",
    "Human:",
    " ",
    "  ",
    "\n",
    "naïve",
    " “hi”",
    "1",
    "2024",
    "…",
    "🙂",
    "a",
    "\t",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 12)))


# --- queries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_a_query_has_bos_when_the_tokenizer_adds_it_and_never_a_trailing_eos(bos, eos):
    tokenizer = byte_level(bos=bos, eos=eos)
    ids = encode_query(tokenizer, "The sky is")
    plain = byte_level().encode("The sky is")
    assert ids == [tokenizer.bos_token_id] * bos + plain


@pytest.mark.parametrize("bos", [False, True])
def test_a_rendered_chat_template_never_gets_a_second_bos(bos):
    tokenizer = byte_level(bos=bos, chat_template=WITH_BOS)
    prompt, _ = ChatTemplate(tokenizer).render([{"role": "user", "content": "why?"}], [])
    ids = encode_query(tokenizer, prompt)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == prompt


def test_a_template_without_bos_gets_the_one_that_the_tokenizer_adds():
    tokenizer = byte_level(bos=True, chat_template=CHATML)
    prompt, _ = ChatTemplate(tokenizer).render([{"role": "user", "content": "why?"}], [])
    assert tokenizer.decode(encode_query(tokenizer, prompt)) == "<s>" + prompt


@pytest.mark.parametrize("bos", [False, True])
def test_many_at_once_are_the_same_as_one_by_one(bos):
    tokenizer, rng = byte_level(bos=bos), random.Random(0)
    texts = [random_text(rng) for _ in range(1500)]
    assert encode_queries(tokenizer, texts) == [encode_query(tokenizer, text) for text in texts]
    assert encode_responses(tokenizer, texts) == [encode_response(tokenizer, text) for text in texts]
    count = query_counter(tokenizer)
    assert [count(text) for text in texts] == [len(ids) for ids in encode_queries(tokenizer, texts)]
    assert encode_queries(tokenizer, []) == encode_responses(tokenizer, []) == []


# --- responses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_query_and_response_joined_as_ids_are_the_text(bos, eos):
    tokenizer, rng = byte_level(bos=bos, eos=eos), random.Random(1)
    for _ in range(300):
        prompt, response = random_text(rng), random_text(rng)
        query_ids, response_ids = encode_query(tokenizer, prompt), encode_response(tokenizer, response)
        assert response_ids[-1] == tokenizer.eos_token_id
        assert not set(response_ids[:-1]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(query_ids[bos:] + response_ids[:-1]) == prompt + response


def test_special_tokens_in_a_response_are_text():
    tokenizer = byte_level()
    ids = encode_response(tokenizer, " stop<|endoftext|> or [PAD] me")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == " stop<|endoftext|> or [PAD] me"


@pytest.mark.parametrize("response", [" blue", "blue", "I can", "\n I can", "\n\nno", "  help"])
def test_a_tokenizer_that_puts_a_space_before_texts_adds_none_to_a_response(response):
    tokenizer = sentencepiece()
    assert tokenizer.decode(tokenizer.encode("blue")) == "blue"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("blue"))[0].startswith("▁")
    ids = encode_query(tokenizer, "The sky:") + encode_response(tokenizer, response)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "The sky:" + response


def test_a_tokenizer_without_eos_is_an_error():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        encode_response(tokenizer, " x")


# --- records --------------------------------------------------------------------------------------------


def bytes_of(text: str, tokenizer) -> list[int]:
    """The ids of an ASCII text, from the vocabulary alone: one token for each byte."""
    vocab = tokenizer.get_vocab()
    return [vocab["Ġ" if character == " " else character] for character in text]


RECORD = Record(
    "p", completion=" c", chosen=" ch", rejected=" re", responses=(" r1", " r2"), scores=(1.0, 2.0)
)


@pytest.mark.parametrize(
    ("view", "filled"),
    [
        ("demonstrations", {"completion_ids": " c"}),
        ("pairs", {"chosen_ids": " ch", "rejected_ids": " re"}),
        ("prompts", {"completion_ids": " c", "chosen_ids": " ch", "rejected_ids": " re"}),
        ("ranked", {}),
        ("unpaired", {"completion_ids": " c"}),
    ],
)
def test_an_example_has_the_ids_that_its_view_uses(view, filled):
    tokenizer = single_bytes()
    (example,) = encode_records(tokenizer, [RECORD], {("p", ()): [9]}, view, BadRows())
    stop = [tokenizer.eos_token_id]
    for name in ("completion_ids", "chosen_ids", "rejected_ids"):
        expected = bytes_of(filled[name], tokenizer) + stop if name in filled else None
        assert getattr(example, name) == expected
    ranked = [" r1", " r2"] if view in ("prompts", "ranked") else []
    assert example.ranked_ids == [bytes_of(text, tokenizer) + stop for text in ranked]
    assert example.query_ids == [9]
    assert example.record is RECORD


def test_a_prompt_without_responses_is_an_example():
    (example,) = encode_records(single_bytes(), [Record("p")], {("p", ()): [9]}, "prompts", BadRows(), 5)
    assert example.completion_ids is None and example.chosen_ids is None and example.ranked_ids == []


@pytest.mark.parametrize(("limit", "fits"), [(4, True), (3, False)])
@pytest.mark.parametrize("view", ["demonstrations", "pairs", "ranked", "unpaired"])
def test_the_stop_token_counts_towards_the_length_limit(view, limit, fits):
    record = Record("p", " ab", " ab", " b", responses=(" b", " ab"), scores=(1.0, 2.0), origin="f:1")
    bad = BadRows()
    examples = encode_records(single_bytes(), [record], {("p", ()): [9]}, view, bad, limit)
    assert len(examples) == fits
    if not fits:
        assert bad.counts == {"response too long": 1}
        assert "f:1: 4 tokens, max_response_length=3" in bad.summary()


def test_responses_to_reset_to_are_cut_at_the_limit():
    tokenizer = single_bytes()
    (example,) = encode_records(tokenizer, [RECORD], {("p", ()): [9]}, "prompts", BadRows(), 3)
    assert example.completion_ids == bytes_of(" c", tokenizer) + [tokenizer.eos_token_id]
    assert example.chosen_ids == bytes_of(" ch", tokenizer)
    assert example.ranked_ids == [bytes_of(" r1", tokenizer), bytes_of(" r2", tokenizer)]


# --- truncation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_left_truncation_keeps_exactly_the_last_bytes(bos):
    tokenizer, rng = single_bytes(bos), random.Random(2)
    count = query_counter(tokenizer)
    for _ in range(200):
        text = random_text(rng) + "end"
        limit = rng.randrange(5, 20)
        longest = next(text[i:] for i in range(len(text)) if len(text[i:].encode()) <= limit - bos)
        assert truncate_left(text, count, limit) == longest


def test_left_truncation_fits_and_keeps_an_end_whatever_the_tokenizer():
    tokenizer, rng = byte_level(bos=True), random.Random(3)
    count = query_counter(tokenizer)
    for _ in range(200):
        text = "".join(random_text(rng) for _ in range(4))
        limit = rng.randrange(6, 30)
        short = truncate_left(text, count, limit)
        assert text.endswith(short)
        assert len(encode_query(tokenizer, short)) <= limit
        assert short == text or count(text[-len(short) - 1 :]) > limit


def test_left_truncation_that_leaves_nothing_is_refused():
    with pytest.raises(RowError) as error:
        truncate_left("ab", query_counter(single_bytes(bos=True)), 1)
    assert error.value.kind == "prompt too long"
