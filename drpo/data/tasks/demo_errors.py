"""Demo summaries with one known kind of error each, to test whether a reward sees it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drpo.data.records import Record
from drpo.data.tasks.demo import ITEMS, DemoConfig, make_demo, needed_items

ERROR_KINDS = ("incomplete", "wrong_item", "wrong_order", "no_stop")


@dataclass(frozen=True, slots=True)
class FaultySummary:
    """A held-out post's reference with one fault; `record.completion` is the reference itself."""

    kind: str
    record: Record
    response: str
    ended: bool


def make_faulty_summaries(config: DemoConfig) -> list[FaultySummary]:
    """Make one summary of every kind in ERROR_KINDS for every held-out post, from the config's seed.

    incomplete: cut after 1 to n-1 items. wrong_item: one item replaced by one that is not needed. wrong_order: two
    neighbours swapped. no_stop: the reference without its stop token.
    """
    rng = random.Random(f"{config.seed}/faults")
    summaries = []
    for record in make_demo(config, "prompts", "eval"):
        words = needed_items(record.prompt)
        position = rng.randrange(len(words))
        swap = rng.randrange(len(words) - 1)
        other_item = rng.choice([item for item in ITEMS if item not in words])
        faults = {
            "incomplete": words[: rng.randrange(1, len(words))],
            "wrong_item": [*words[:position], other_item, *words[position + 1 :]],
            "wrong_order": [*words[:swap], words[swap + 1], words[swap], *words[swap + 2 :]],
            "no_stop": words,
        }
        for kind in ERROR_KINDS:
            response = "".join(f" {word}" for word in faults[kind])
            summaries.append(FaultySummary(kind, record, response, ended=kind != "no_stop"))
    return summaries
