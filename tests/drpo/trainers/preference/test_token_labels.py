from __future__ import annotations

import random
from functools import partial

import pytest
from tiny_tokenizers import SENTENCES, byte_level, sentencepiece, single_bytes

from drpo.data.encode import decode_response, encode_response
from drpo.data.records import RowError
from drpo.trainers.preference.token_labels import token_relevance

MERGED = ("one\n\ntwo\n\n\nthree end.\n\nend.\n\n", "naïve naïve “hi”\n“hi”\n 🙂🙂\n🙂\n日本語\n日本\n") * 20
PIECES = "I can| naïve|\n|\n\n|“hi”| |🙂|日本|\t|…\n|\u2028|\r\n|end.|\ufffd|\x85".split("|")


def by_bytes(tokenizer, text, response_ids, labels):
    """The line in which each token's first byte lies, from the vocabulary alone: byte-level tokens spell bytes."""
    line_of_byte = []
    for number, line in enumerate(text.splitlines(keepends=True)):
        line_of_byte += [number] * len(line.encode())
    alphabet = {character: value for value, character in byte_alphabet().items()}
    relevance, place = [], 0
    for token in tokenizer.convert_ids_to_tokens(response_ids[:-1]):
        relevance.append(bool(labels[line_of_byte[place]]))
        place += len(bytes(alphabet[character] for character in token))
    assert place == len(line_of_byte)
    return [*relevance, True]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {
        value: chr(256 + i) for i, value in enumerate(others)
    }


# --- lines ----------------------------------------------------------------------------------------------


def test_by_hand_with_one_token_for_each_byte():
    tokenizer = single_bytes()
    text = " ab\n\ncé\nd"
    ids = encode_response(tokenizer, text)
    assert len(ids) == 11  # 4 bytes, 1, 4 (é has two), 1, and the stop token
    assert (
        token_relevance(tokenizer, text, ids, [1, 0, 0, 1], "line") == [True] * 4 + [False] * 5 + [True] * 2
    )
    assert token_relevance(tokenizer, text, ids, [False, True, True, False], "line") == (
        [False] * 4 + [True] * 5 + [False, True]
    )


def test_a_token_of_two_lines_belongs_to_the_line_in_which_it_starts():
    tokenizer = byte_level(texts=["x.\n\n\n" * 50], vocab_size=300)
    text = "x.\n\n\nx.\n"
    ids = encode_response(tokenizer, text)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    (spanning,) = [place for place, token in enumerate(tokens) if token.endswith("ĊĊ")]
    relevance = token_relevance(tokenizer, text, ids, [1, 0, 0, 0], "line")
    assert relevance == [place <= spanning for place in range(len(ids) - 1)] + [True]
    relevance = token_relevance(tokenizer, text, ids, [0, 1, 1, 1], "line")
    assert relevance == [place > spanning for place in range(len(ids) - 1)] + [True]


@pytest.mark.parametrize(
    "make", [single_bytes, byte_level, partial(byte_level, texts=(*SENTENCES, *MERGED), vocab_size=450)]
)
def test_byte_level_tokens_go_where_their_first_byte_is(make):
    tokenizer, rng = make(), random.Random(0)
    for _ in range(400):
        text = " " + "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 20)))
        labels = [rng.randrange(2) for _ in text.splitlines()]
        ids = encode_response(tokenizer, text)
        assert token_relevance(tokenizer, text, ids, labels, "line") == by_bytes(tokenizer, text, ids, labels)


def test_a_tokenizer_that_drops_leading_spaces():
    tokenizer = sentencepiece()
    text = " blue é\n help\n\n can"
    ids = encode_response(tokenizer, text)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    breaks = [place for place, token in enumerate(tokens) if token == "<0x0A>"]
    assert len(breaks) == 3 and tokens[0].startswith("▁")
    relevance = token_relevance(tokenizer, text, ids, [0, 1, 0, 1], "line")
    first = [True if breaks[0] < place <= breaks[1] else False for place in range(breaks[2] + 1)]
    assert relevance == first + [True] * (len(ids) - breaks[2] - 1)


# --- tokens ---------------------------------------------------------------------------------------------


def test_labels_of_tokens_are_taken_as_they_are():
    tokenizer = single_bytes()
    ids = encode_response(tokenizer, " ab")
    assert token_relevance(tokenizer, " ab", ids, [1, 0, True], "token") == [True, False, True, True]
    with pytest.raises(RowError, match="3 tokens, 4 labels") as error:
        token_relevance(tokenizer, " ab", ids, [1, 0, 1, 1], "token")
    assert error.value.kind == "labels and tokens differ"


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([1], "labels and lines differ"),
        ([1, 0, 1], "labels and lines differ"),
        ([], "labels and lines differ"),
        ("10", "wrong type"),
        (None, "wrong type"),
        ([1, 2], "wrong type"),
        ([1, "0"], "wrong type"),
        ([1, None], "wrong type"),
    ],
)
def test_wrong_labels_by_kind(labels, kind):
    tokenizer = single_bytes()
    with pytest.raises(RowError) as error:
        token_relevance(tokenizer, " a\nb", encode_response(tokenizer, " a\nb"), labels, "line")
    assert error.value.kind == kind


def test_ids_of_another_text_are_refused():
    tokenizer = single_bytes()
    with pytest.raises(RowError, match="the tokens do not spell"):
        token_relevance(tokenizer, " a\nb", encode_response(tokenizer, " a\nc"), [1, 0], "line")
    with pytest.raises(RowError, match="the tokens do not spell"):  # the stop token is missing
        token_relevance(tokenizer, " a\nb", encode_response(tokenizer, " a\nb")[:-1], [1, 0], "line")


@pytest.mark.parametrize("make", [byte_level, partial(byte_level, bos=True), sentencepiece])
def test_a_response_is_decoded_to_its_text(make):
    tokenizer = make()
    for text in (" blue", "blue", "\n\nno", "  help.", " don't , stop", " <|endoftext|> x", "\nI", " é"):
        assert decode_response(tokenizer, encode_response(tokenizer, text)[:-1]) == text
