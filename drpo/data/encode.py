"""From records to token ids. Queries and responses are encoded apart and joined as ids, never as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drpo.data.records import DataError, Record, RowError
from drpo.data.views import View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
ANCHOR = "\n"


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record. Responses end with the stop token, except where a view cuts them at the length
    limit; those that a view does not use are None or empty."""

    record: Record
    query_ids: list[int]
    completion_ids: list[int] | None = None
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None
    ranked_ids: list[list[int]] = field(default_factory=list)
    "`record.responses`, encoded."


def encode_query(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt: with the BOS token if the tokenizer adds one (once, also if a chat template wrote it
    already), without the EOS token that some tokenizers append."""
    return encode_queries(tokenizer, [prompt])[0]


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a response that continues a prompt, and the stop token `tokenizer.eos_token_id`.

    Special tokens spelled out in the text are encoded as ordinary text: the only stop token is the last id.
    """
    return encode_responses(tokenizer, [text])[0]


def encode_queries(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """`encode_query` of many prompts."""
    opening = _opening_ids(tokenizer)
    return [_open(opening, ids) for ids in _encode(tokenizer, prompts)]


def query_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """A function that gives the length of `encode_query` of a prompt, for many calls."""
    opening = _opening_ids(tokenizer)
    return lambda prompt: len(_open(opening, _encode(tokenizer, [prompt])[0]))


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` of many texts. Raises DataError if the tokenizer has no EOS token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, which ends responses: set tokenizer.eos_token")
    stop = [tokenizer.eos_token_id]
    if _encodes_continuations(tokenizer):
        return [ids + stop for ids in _encode(tokenizer, texts, split_special_tokens=True)]
    # SentencePiece-like tokenizers put a space before any text: encode behind an anchor, then cut it off.
    anchor = _encode(tokenizer, [ANCHOR])[0]
    encoded = []
    for text, ids in zip(
        texts, _encode(tokenizer, [ANCHOR + text for text in texts], split_special_tokens=True), strict=True
    ):
        if ids[: len(anchor)] != anchor:
            raise DataError(f"the tokenizer cannot encode this response apart from its prompt: {text[:60]!r}")
        encoded.append(ids[len(anchor) :] + stop)
    return encoded


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text that response ids add to a prompt, as it is: with its leading space, which some tokenizers drop
    at the start of a text. Of a character that the ids hold only in part, "\ufffd" is left."""
    anchor = _encode(tokenizer, [ANCHOR])[0]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode([*anchor, *ids], **options)
    return text.removeprefix(tokenizer.decode(anchor, **options))


def encode_records(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    queries: Mapping[str, list[int]],
    view: View,
    max_response_length: int | None = None,
) -> Iterator[Example | RowError]:
    """An Example for each record, in order, or the RowError that stands for it; `queries` holds the ids by
    prompt.

    Records with a response of more than `max_response_length` tokens, stop token included, are errors. In
    the prompts view such a response is cut there: only a prefix of it can ever start a rollout. Examples
    with the same text share its list of ids.
    """
    texts = list(dict.fromkeys(text for record in records for text in _responses(record, view)))
    ids_by_text = dict(zip(texts, encode_responses(tokenizer, texts), strict=True))
    limit = max_response_length
    if view == "prompts":
        ids_by_text = {text: ids[:limit] for text, ids in ids_by_text.items()}
    for record in records:
        query_ids = queries[record.prompt]
        longest = max((len(ids_by_text[text]) for text in _responses(record, view)), default=0)
        if limit is not None and longest > limit:
            yield RowError("response too long", f"{longest} tokens, data.max_response_length={limit}")
            continue
        match view:
            case "demonstrations" | "unpaired":
                yield Example(record, query_ids, completion_ids=ids_by_text[record.completion])
            case "pairs":
                chosen_ids, rejected_ids = ids_by_text[record.chosen], ids_by_text[record.rejected]
                yield Example(record, query_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids)
            case "ranked":
                yield Example(record, query_ids, ranked_ids=[ids_by_text[text] for text in record.responses])
            case "prompts":
                yield Example(
                    record,
                    query_ids,
                    completion_ids=ids_by_text.get(record.completion),
                    chosen_ids=ids_by_text.get(record.chosen),
                    rejected_ids=ids_by_text.get(record.rejected),
                    ranked_ids=[ids_by_text[text] for text in record.responses],
                )


def longest_fit(fits: Callable[[int], bool], length: int) -> int:
    """An n < `length` for which n characters fit and n + 1 do not, 0 if none do; by bisection.

    It is the largest such n as long as more characters make no fewer tokens, which holds but for a few
    characters.
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
    """The end of the prompt that fits into `max_length` tokens (see `longest_fit`); RowError if nothing
    does."""
    if num_tokens(prompt) <= max_length:
        return prompt
    kept = longest_fit(lambda n: num_tokens(prompt[len(prompt) - n :]) <= max_length, len(prompt))
    if kept == 0:
        raise RowError("prompt too long", f"nothing of it fits into data.max_prompt_length={max_length}")
    return prompt[len(prompt) - kept :]


def _responses(record: Record, view: View) -> list[str]:
    match view:
        case "demonstrations" | "unpaired":
            texts = [record.completion]
        case "pairs":
            texts = [record.chosen, record.rejected]
        case "ranked":
            texts = list(record.responses)
        case "prompts":
            texts = [record.completion, record.chosen, record.rejected, *record.responses]
    return [text for text in texts if text is not None]


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
    """What the tokenizer puts before a text: [BOS] or nothing."""
    plain = _encode(tokenizer, ["a"])[0]
    with_special = tokenizer("a").input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    raise DataError("the tokenizer encodes a text otherwise when it adds special tokens; it cannot be used")


def _encodes_continuations(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids of texts encoded apart, joined, are the ids of the joined text."""
    first, spaced, plain = _encode(tokenizer, ["a", " b", "b"])
    decode = tokenizer.decode
    return decode(first + spaced) == "a b" and decode(first + plain) == "ab"
