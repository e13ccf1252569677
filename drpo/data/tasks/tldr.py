"""Reddit posts and their summaries (TL;DR).

Sources: openai/summarize_from_feedback, trl-lib/tldr, the N+ sets, axis.jsonl. All have one template::

    SUBREDDIT: r/{}\\n\\nTITLE: {}\\n\\nPOST: {}\\n\\nTL;DR:

without the lines that a row has no value for; a summary follows with a leading space (Huang et al. 2024, "The N+
implementation details of RLHF with PPO", details 1-3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from drpo.config import key
from drpo.data.chat import ChatTemplate
from drpo.data.encode import longest_fit
from drpo.data.files import Row, Table, convert_rows
from drpo.data.records import (
    BadRows,
    DataError,
    Record,
    RowError,
    require_different,
    require_scores,
    require_text,
)
from drpo.data.tasks.task import Task

ENDING = "\n\nTL;DR:"
INSTRUCTION = "Summarize the following Reddit post in one or two sentences."
"The request to a chat model: its own conversations do not show that TL;DR asks for a summary of this length."
POST_LINE = re.compile(r"(?:\A|\n\n)POST: ")
RESPONSES = ("completion", "chosen", "rejected")
PREPROCESSED = ("query", "chosen", "rejected", "reference_response")
"Columns of the N+ sets that are made from the others for one tokenizer and one length."


def keep_column(column: str) -> bool:
    """Exclude the token ids of the N+ sets: they belong to another tokenizer, and are slow to read."""
    return "_token" not in column


def format_query(post: str, title: str | None = None, subreddit: str | None = None) -> str:
    """Format the prompt of one post."""
    lines = [f"SUBREDDIT: r/{subreddit}"] if subreddit else []
    lines += [f"TITLE: {title}"] if title else []
    return "\n\n".join([*lines, f"POST: {post}"]) + ENDING


def truncate_query(query: str, num_tokens: Callable[[str], int], max_length: int) -> str:
    """Shorten the post in a query to at most `max_length` tokens (N+ detail 2).

    Paragraphs go first: the post is cut at its last newline again and again. If its first paragraph alone is too
    long, that is shortened from the end. The other lines, the ending "TL;DR:" and what a chat template puts around
    them always stay; RowError if there is no room for any of the post.
    """
    if num_tokens(query) <= max_length:
        return query
    post_line = POST_LINE.search(query)
    start, end = post_line.end() if post_line else 0, query.rindex(ENDING)

    def shortened(post_length: int) -> str:
        return query[: start + post_length] + query[end:]

    post = query[start:end]
    while "\n" in post:
        post = post[: post.rindex("\n")]
        if post.strip() and num_tokens(shortened(len(post))) <= max_length:
            return shortened(len(post))
    length = longest_fit(lambda n: num_tokens(shortened(n)) <= max_length, len(post))
    if not post[:length].strip():
        raise RowError("prompt too long", f"no room for the post in {key('max_prompt_length')}={max_length}")
    return shortened(length)


def tldr_records(
    table: Table, bad: BadRows, chat: ChatTemplate | None = None
) -> tuple[list[Record], list[str]]:
    """Convert a table in any of the known layouts to records, with notes on what was left out by design.

    With `chat` they go through the chat template. Raises DataError, naming the columns that are there, for an
    unknown layout.
    """

    def convert(table: Table, to_record: Callable[[Row], Record]) -> list[Record]:
        return convert_rows(
            table, bad, to_record if chat is None else lambda row: chat_record(to_record(row), chat)
        )

    columns = set(table.columns)
    if {"info", "summaries", "choice"} <= columns:
        table, notes = _posts_only(table)
        return convert(table, comparison_record), notes
    if {"info", "summary"} <= columns:
        table, notes = _posts_only(table)
        return _merge_ranked(convert(table, axis_record)), notes
    if {"post", "summaries", "overall"} <= columns:
        return convert(table, ranked_record), []
    if {"post", "summary"} <= columns:
        return convert(table, demonstration_record), []
    if "prompt" in columns:
        return convert(table, formatted_record), []
    raise DataError(
        f"{table.name} is not TL;DR data: its columns are {', '.join(table.columns)}; known layouts are "
        "info + summaries + choice, info + summary, post + summaries + overall, post + summary, prompt"
    )


def chat_record(record: Record, chat: ChatTemplate) -> Record:
    """Convert a record to a conversation: a user's message asks for the summary, the summaries answer it."""
    messages = [{"role": "user", "content": f"{INSTRUCTION}\n\n{record.prompt}"}]
    texts = {name: text for name in RESPONSES if (text := getattr(record, name)) is not None}
    stripped = [text.strip() for text in (*texts.values(), *record.responses)]
    prompt, responses, rendered = chat.convert(messages, stripped, record.prompt)
    single = dict(zip(texts, responses, strict=False))
    return replace(record, prompt=prompt, **single, responses=tuple(responses[len(texts) :]), chat=rendered)


# --- layouts --------------------------------------------------------------------------------------------


def ranked_record(row: Row) -> Record:
    """Convert a row of axis.jsonl: post, summaries, overall (one score for each summary).

    The columns title and subreddit are optional.
    """
    values = dict(row.values)
    summaries, scores = values.pop("summaries", None), values.pop("overall", None)
    if not isinstance(summaries, list):
        kind = "missing field" if summaries is None else "wrong type"
        raise RowError(kind, f"summaries is {type(summaries).__name__}, not a list")
    if not summaries:
        raise RowError("empty text", "summaries is an empty list")
    return Record(
        _query(values),
        responses=tuple(_response(summary, "summaries") for summary in summaries),
        scores=require_scores(scores, "overall", len(summaries)),
        origin=row.origin,
        extra=values,
    )


def demonstration_record(row: Row) -> Record:
    """Convert a row of the N+ SFT sets: id, subreddit, title, post, summary, and columns made from these."""
    values = {name: value for name, value in row.values.items() if not name.startswith(PREPROCESSED)}
    completion = _response(values.pop("summary", None), "summary")
    return Record(_query(values), completion=completion, origin=row.origin, extra=values)


def comparison_record(row: Row) -> Record:
    """Convert a comparison of openai/summarize_from_feedback: info, two summaries, choice.

    Columns that the N+ sets add are left out.
    """
    values = {name: value for name, value in row.values.items() if not name.startswith(PREPROCESSED)}
    summaries, choice = values.pop("summaries", None), values.pop("choice", None)
    if not isinstance(summaries, list) or not all(isinstance(summary, Mapping) for summary in summaries):
        raise RowError("wrong type", "summaries is not a list of objects with text and policy")
    if len(summaries) != 2:
        raise RowError("missing field", f"{len(summaries)} summaries, not 2")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise RowError("wrong type", f"choice is {choice!r}, neither 0 nor 1")
    better, worse = summaries[choice], summaries[1 - choice]
    chosen = _response(better.get("text"), "summaries.text")
    rejected = _response(worse.get("text"), "summaries.text")
    require_different(chosen, rejected)
    policies = {"chosen_policy": better.get("policy"), "rejected_policy": worse.get("policy")}
    return Record(
        _query(values["info"]), chosen=chosen, rejected=rejected, origin=row.origin, extra=values | policies
    )


def axis_record(row: Row) -> Record:
    """Convert a row of summarize_from_feedback's axis part: info, and one summary scored by one worker."""
    values = dict(row.values)
    summary = values.pop("summary", None)
    if not isinstance(summary, Mapping):
        raise RowError("wrong type", f"summary is {type(summary).__name__}, not an object with text and axes")
    overall = (summary.get("axes") or {}).get("overall")
    return Record(
        _query(values["info"]),
        responses=(_response(summary.get("text"), "summary.text"),),
        scores=require_scores(None if overall is None else [overall], "axes.overall", 1),
        origin=row.origin,
        extra={"info": values["info"], "policies": [summary.get("policy")]},
    )


def formatted_record(row: Row) -> Record:
    """Convert a row of trl-lib/tldr or trl-lib/tldr-preference, whose prompts are formatted already."""
    values = dict(row.values)
    prompt = require_text(values.pop("prompt", None), "prompt")
    if not prompt.endswith(ENDING):
        raise RowError("no TL;DR", f"the prompt ends with {prompt[-20:]!r}, not with {ENDING!r}")
    texts = {name: _response(values.pop(name), name) for name in RESPONSES if values.get(name) is not None}
    require_different(texts.get("chosen"), texts.get("rejected"))
    return Record(prompt, **texts, origin=row.origin, extra=values)


def _query(info: Any) -> str:
    if not isinstance(info, Mapping):
        raise RowError("missing field" if info is None else "wrong type", "info is not an object with a post")
    title, subreddit = (
        require_text(info[name], name) if info.get(name) else None for name in ("title", "subreddit")
    )
    return format_query(require_text(info.get("post"), "post"), title, subreddit)


def _response(value: Any, field: str) -> str:
    """Return the summary with exactly what the template needs before it: some leading whitespace."""
    text = require_text(value, field)
    return text if text[0].isspace() else " " + text


def _posts_only(table: Table) -> tuple[Table, list[str]]:
    """Drop the news articles (CNN/DM), another task, that the hub sets mix with Reddit posts."""

    def is_article(row: Row) -> bool:
        info = row.values.get("info")
        return isinstance(info, Mapping) and not info.get("post") and bool(info.get("article"))

    posts = [row for row in table.rows if not is_article(row)]
    num_articles = len(table.rows) - len(posts)
    notes = [f"{num_articles} rows are on CNN/DM articles, not Reddit posts: left out"] * bool(num_articles)
    return Table(table.name, table.columns, posts, table.num_rows), notes


def _merge_ranked(records: list[Record]) -> list[Record]:
    """Merge records into one for each post, with every summary once.

    A summary scored by several workers has the mean score.
    """
    posts: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        posts.setdefault(record.prompt, {}).setdefault(record.responses[0], []).append(record)
    merged = []
    for summaries in posts.values():
        firsts = [same[0] for same in summaries.values()]
        scores = tuple(sum(each.scores[0] for each in same) / len(same) for same in summaries.values())
        extra = firsts[0].extra | {"policies": [first.extra["policies"][0] for first in firsts]}
        merged.append(replace(firsts[0], responses=tuple(summaries), scores=scores, extra=extra))
    return merged


TASK = Task(
    "tldr",
    read=lambda table, bad, config, chat: tldr_records(table, bad, chat),
    keep=keep_column,
    truncation="paragraph",
    by_paragraph=truncate_query,
)
