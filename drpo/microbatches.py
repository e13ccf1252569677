"""Cut rows of uneven length into micro-batches with little padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

Lengths = tuple[int, int]
"Tokens of a row's query and of its response, which are padded apart."


def microbatches(
    lengths: Sequence[Lengths], max_rows: int | None, max_tokens: int | None, world_size: int = 1
) -> list[list[int]]:
    """Group rows of like length, longest first; the number of groups is a multiple of the processes.

        tokens of a group = rows * (longest query + longest response)

    Every row is in exactly one group, and which one depends on the lengths and their order alone. A row longer than
    `max_tokens` is a group of its own. Raises ValueError for rows that do not divide over the processes, and for no
    bound.

    Args:
        lengths: of every row, in tokens.
        max_rows: rows of a group; None leaves them unbounded.
        max_tokens: tokens of a group, padding included; None leaves them unbounded.
        world_size: processes; group i is for process i % world_size, so that all have like work.
    """
    if max_rows is None and max_tokens is None:
        raise ValueError("max_rows and max_tokens are both None; give one")
    if len(lengths) % world_size:
        raise ValueError(f"{len(lengths)} rows do not divide over {world_size} processes")
    order = sorted(range(len(lengths)), key=lambda row: sum(lengths[row]), reverse=True)
    groups: list[list[int]] = []
    query = response = 0
    for row in order:
        query, response = max(query, lengths[row][0]), max(response, lengths[row][1])
        size = len(groups[-1]) + 1 if groups else 0
        too_many = max_rows is not None and size > max_rows
        too_long = max_tokens is not None and size * (query + response) > max_tokens
        if not groups or too_many or too_long:
            groups.append([])
            query, response = lengths[row]
        groups[-1].append(row)
    while len(groups) % world_size:
        largest = max(range(len(groups)), key=lambda group: len(groups[group]))
        half = (len(groups[largest]) + 1) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def sharing_saves(lengths: Sequence[Lengths], num_continuations: int) -> bool:
    """Return whether attention over [query | K responses] costs at most that of K separate rows, at mean lengths.

        (Q + K R)^2 <= K (Q + R)^2

    Short prompts with long responses cost more together, since attention is computed under the mask too.
    """
    query_length, response_length = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
    shared = (query_length + num_continuations * response_length) ** 2
    return bool(shared <= num_continuations * (query_length + response_length) ** 2)


def same_query_batches(
    queries: Sequence[Sequence[int]],
    lengths: Sequence[Lengths],
    max_rows: int,
    most_together: int | None = None,
) -> list[tuple[list[int], int]]:
    """Group rows into batches of K blocks with the same queries; return the rows of each batch, and its K.

    Row k*B + b of a batch is the k-th with its b-th query, as `continuation_logprobs` takes them. Rows whose query no
    other has, or that cost less apart, come with K = 1. Rows of like length are together.

    Args:
        queries: token ids of every row's query.
        lengths: of every row, in tokens.
        max_rows: rows of a batch.
        most_together: bound of K; None for no further one.
    """
    by_query: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, query in enumerate(queries):
        by_query[tuple(query)].append(row)
    by_size: dict[int, list[list[int]]] = defaultdict(list)
    most_together = most_together or len(queries)
    parts = [
        rows[first : first + most_together]
        for rows in by_query.values()
        for first in range(0, len(rows), most_together)
    ]
    for rows in parts:
        if 1 < len(rows) <= max_rows and sharing_saves([lengths[row] for row in rows], len(rows)):
            by_size[len(rows)].append(rows)
        else:
            by_size[1] += [[row] for row in rows]
    batches = []
    for size, groups in sorted(by_size.items()):
        groups.sort(key=lambda rows: (sum(sum(lengths[row]) for row in rows), rows))
        num_groups = max_rows // size
        for first in range(0, len(groups), num_groups):
            part = groups[first : first + num_groups]
            batches.append(([group[k] for k in range(size) for group in part], size))
    return batches
