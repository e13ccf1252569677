"""Tokenise records: queries and responses are encoded separately and joined as ids, never as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drpo.config import key
from drpo.data.markup import MarkedPrompt, Span, find_special, special_tokens
from drpo.data.records import BadRows, DataError, Record, RowError
from drpo.data.views import View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
ANCHORS = ("\n", ".", "a", "\n.")
"Texts to encode a response behind: the first that the tokenizer does not merge with it."
SINGLE_RESPONSES: dict[View, tuple[str, ...]] = {
    "demonstrations": ("completion",),
    "pairs": ("chosen", "rejected"),
    "prompts": ("completion", "chosen", "rejected"),
    "ranked": (),
    "unpaired": ("completion",),
}
"Fields of a record that a view uses, of those that hold one response."


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record, with the ids of the responses that its view uses; others are None or empty.

    Responses end with the stop token, except where a view cuts them at the length limit.
    """

    record: Record
    query_ids: list[int]
    completion_ids: list[int] | None = None
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None
    ranked_ids: list[list[int]] = field(default_factory=list)
    "`record.responses`, encoded."


def encode_query(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Encode a prompt, with the BOS token if the tokenizer adds one and without an appended EOS token.

    BOS comes once, also if a chat template has written it already.
    """
    return encode_queries(tokenizer, [prompt])[0]


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a response that continues a prompt, and append the stop token `tokenizer.eos_token_id`.

    Special tokens spelled out in the text are encoded as ordinary text: the only stop token is the last id.
    """
    return encode_responses(tokenizer, [text])[0]


def encode_queries(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Encode many prompts as `encode_query` does."""
    return encode_prompts(tokenizer, [(prompt, ()) for prompt in prompts])


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[MarkedPrompt]) -> list[list[int]]:
    """Encode many prompts, each with its own places where special tokens are ordinary text."""
    opening = _opening_ids(tokenizer)
    encoded = _encode(tokenizer, [text for text, _ in prompts])
    for number, (text, literal) in enumerate(prompts):
        if literal:
            encoded[number] = _encode_markup(tokenizer, text, literal, starts=True)
    return [_open(opening, ids) for ids in encoded]


def query_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, Sequence[Span]], int]:
    """Return a function that computes the length of a prompt in `encode_prompts`, for many calls."""
    opening = _opening_ids(tokenizer)

    def num_tokens(text: str, literal: Sequence[Span] = ()) -> int:
        ids = _encode_markup(tokenizer, text, literal, True) if literal else _encode(tokenizer, [text])[0]
        return len(_open(opening, ids))

    return num_tokens


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], opening: str = ""
) -> list[list[int]]:
    """Encode many responses as `encode_response` does; DataError if the tokenizer has no EOS token.

    Some of the texts may begin with the `opening` that a chat template wrote: its special tokens stay special.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, which ends responses: set tokenizer.eos_token")
    head, head_ids = _head(tokenizer, opening)
    has_opening = [bool(head) and text.startswith(opening) for text in texts]
    bodies = [text[len(head) :] if has else text for text, has in zip(texts, has_opening, strict=True)]
    encoded = _encode_continuations(tokenizer, bodies)
    stop = [tokenizer.eos_token_id]
    return [(head_ids if has else []) + ids + stop for ids, has in zip(encoded, has_opening, strict=True)]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode response ids to the text that they add to a prompt, leading space included.

    Some tokenizers drop that space at the start of a text. A character that is only partly there becomes "\ufffd".
    """
    anchor = _encode(tokenizer, ANCHORS[:1])[0]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode([*anchor, *ids], **options)
    return text.removeprefix(tokenizer.decode(anchor, **options))


def readable_texts(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[Sequence[int]], openings: Sequence[str]
) -> list[str]:
    """Decode sampled responses for readers other than the model: without special tokens and template openings.

    An opening is what the chat template writes before a reply; it is removed where the model wrote it.
    """
    tokens = special_tokens(tokenizer)
    special = set(tokens.values())
    plain = {opening: _without(opening, tokens) for opening in set(openings)}
    heads = {opening: _head(tokenizer, opening)[1] for opening in plain}
    texts = []
    for ids, opening in zip(responses, openings, strict=True):
        text = decode_response(tokenizer, [i for i in ids if i not in special])
        head = heads[opening]
        texts.append(text.removeprefix(plain[opening]) if list(ids[: len(head)]) == head else text)
    return texts


def encode_records(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    queries: Mapping[MarkedPrompt, list[int]],
    view: View,
    bad: BadRows,
    max_response_length: int | None = None,
) -> list[Example]:
    """Make an Example of each record, in order; examples with the same text share its list of ids.

    Args:
        tokenizer: its EOS token ends a response.
        records: records of the view.
        queries: the ids by prompt.
        view: the responses to encode.
        bad: gets the records with a stop token inside a response, and those with a response that is too long.
        max_response_length: tokens of a response, stop token included; None for no limit. In the prompts view a
            longer response is cut there: only a prefix of it can ever start a rollout.
    """
    texts = dict.fromkeys(text for record in records for text in _responses(record, view))
    # One template made all of them, so its opening is the same.
    opening = next((record.opening for record in records), "")
    ids_by_text = dict(zip(texts, encode_responses(tokenizer, list(texts), opening), strict=True))
    stop_inside = {text for text, ids in ids_by_text.items() if tokenizer.eos_token_id in ids[:-1]}
    if view == "prompts":
        ids_by_text = {text: ids[:max_response_length] for text, ids in ids_by_text.items()}
    examples = []
    for record in records:
        with bad.skipping(record.origin):
            responses = _responses(record, view)
            if inside := stop_inside.intersection(responses):
                raise RowError("stop token inside", f"{tokenizer.eos_token!r} in {min(inside)[:60]!r}")
            longest = max((len(ids_by_text[text]) for text in responses), default=0)
            if max_response_length is not None and longest > max_response_length:
                detail = f"{longest} tokens, {key('max_response_length')}={max_response_length}"
                raise RowError("response too long", detail)
            single_ids = {
                f"{name}_ids": ids_by_text.get(getattr(record, name)) for name in SINGLE_RESPONSES[view]
            }
            ranked_ids = [ids_by_text[text] for text in _ranked_responses(record, view)]
            examples.append(
                Example(record, queries[record.marked_prompt], **single_ids, ranked_ids=ranked_ids)
            )
    return examples


def longest_fit(fits: Callable[[int], bool], length: int) -> int:
    """Find by bisection an n < `length` such that n characters fit and n + 1 do not; 0 if none do.

    It is the largest such n as long as more characters make no fewer tokens, which holds but for a few characters.
    """
    best, too_long = 0, length
    while too_long - best > 1:
        middle = (best + too_long) // 2
        if fits(middle):
            best = middle
        else:
            too_long = middle
    return best


def truncate_left(prompt: str, num_tokens: Callable[[str], int], max_length: int) -> str:
    """Return the end of the prompt that fits into `max_length` tokens; RowError if nothing does."""
    if num_tokens(prompt) <= max_length:
        return prompt
    length = longest_fit(lambda n: num_tokens(prompt[len(prompt) - n :]) <= max_length, len(prompt))
    if length == 0:
        raise RowError("prompt too long", f"nothing of it fits into {key('max_prompt_length')}={max_length}")
    return prompt[len(prompt) - length :]


def _responses(record: Record, view: View) -> list[str]:
    single = (getattr(record, name) for name in SINGLE_RESPONSES[view])
    return [*(text for text in single if text is not None), *_ranked_responses(record, view)]


def _ranked_responses(record: Record, view: View) -> tuple[str, ...]:
    return record.responses if view in ("ranked", "prompts") else ()


def _open(opening: list[int], ids: list[int]) -> list[int]:
    return ids if opening and ids[: len(opening)] == opening else opening + ids


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options) -> list[list[int]]:
    encoded: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        encoded += tokenizer(
            chunk,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        ).input_ids
    return encoded


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text: [BOS] or nothing."""
    plain = _encode(tokenizer, ["a"])[0]
    with_special = tokenizer("a").input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    raise DataError("the tokenizer encodes a text otherwise when it adds special tokens; it cannot be used")


def _encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that continue another text; special tokens spelled out in them are ordinary text."""
    if _joins(tokenizer):
        return _encode(tokenizer, texts, split_special_tokens=True)
    # SentencePiece-like tokenizers put a space before any text: encode behind an anchor, then cut it off.
    encoded: dict[int, list[int]] = {}
    for anchor in ANCHORS:
        (anchor_ids,) = _encode(tokenizer, [anchor])
        remaining = [place for place in range(len(texts)) if place not in encoded]
        anchored = _encode(
            tokenizer, [anchor + texts[place] for place in remaining], split_special_tokens=True
        )
        for place, ids in zip(remaining, anchored, strict=True):
            if ids[: len(anchor_ids)] == anchor_ids:
                encoded[place] = ids[len(anchor_ids) :]
    for place, text in enumerate(texts):
        if place not in encoded:
            raise DataError(f"the tokenizer cannot encode this response apart from its prompt: {text[:60]!r}")
    return [encoded[place] for place in range(len(texts))]


def _encode_markup(
    tokenizer: PreTrainedTokenizerBase, text: str, literal: Sequence[Span], starts: bool
) -> list[int]:
    """Encode a text with special tokens, except for those in `literal`.

    `starts` is True for the beginning of a sequence, False for a continuation.
    """
    tokens = special_tokens(tokenizer)
    ids: list[int] = []
    begin = search = 0
    while begin < len(text):
        place, token = find_special(text, tokens, search)
        span = next((span for span in literal if span[0] <= place < span[1]), None)
        if token is not None and span is not None:
            search = span[1]
            continue
        if piece := text[begin:place]:
            encode = _encode if starts and not ids else _encode_continuations
            options = {"split_special_tokens": True} if encode is _encode else {}
            ids += encode(tokenizer, [piece], **options)[0]
        if token is not None:
            ids.append(tokens[token])
        begin = search = place + len(token or "")
    return ids


def _head(tokenizer: PreTrainedTokenizerBase, opening: str) -> tuple[str, list[int]]:
    """Split off an opening up to its last special token, and its ids; the rest is encoded with the response."""
    tokens = special_tokens(tokenizer) if opening else {}
    end, (place, token) = 0, find_special(opening, tokens)
    while token is not None:
        end = place + len(token)
        place, token = find_special(opening, tokens, end)
    return opening[:end], _encode_markup(tokenizer, opening[:end], (), starts=False)


def _without(text: str, tokens: Mapping[str, int]) -> str:
    place, token = find_special(text, tokens)
    return text if token is None else text[:place] + _without(text[place + len(token) :], tokens)


def _joins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the ids of texts encoded separately, joined, are the ids of the joined text."""
    first, spaced, plain = _encode(tokenizer, ["a", " b", "b"])
    decode = tokenizer.decode
    return decode(first + spaced) == "a b" and decode(first + plain) == "ab"
