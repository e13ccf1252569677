"""The demo task: made-up forum posts, summaries of uneven quality and a true reward that can be computed.

A post lists the things that are there and those that are needed::

    SUBREDDIT: r/camping
    POST: we have lamp mug but need rope soap tent
    TL;DR: rope soap tent

A good summary names all the things needed, in the order of the post, and stops. Reading costs, and only a complete
summary is useful: an unfinished one is worth less with every word. So a policy that rarely completes a summary from
the bare prompt learns to write little, unless its rollouts start inside complete ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING, Any, Literal

from drpo.config import Section, key, refuse, setting
from drpo.data.records import Record
from drpo.data.tasks.demo_writers import ITEMS, Split, as_text, demonstrate, draw_post, draw_several, draw_two
from drpo.data.tasks.task import Task
from drpo.data.views import View, view_name

if TYPE_CHECKING:
    from drpo.data.load import DataConfig
    from drpo.rewards import Completion

DemoView = Literal["demonstrations", "pairs", "prompts", "ranked"]

COMPLETE_REWARD = 4.0
"""Worth of a complete summary."""
RIGHT_COST = 0.25
"""Cost of reading a needed item in an unfinished or faulty summary."""
WRONG_COST = 2.0
"""Cost of an item that is not needed, comes twice or too late; of an empty summary; of a missing stop."""


@dataclass(frozen=True)
class DemoConfig(Section):
    """The demo task (section `data.demo` of a recipe)."""

    completion_rate: float = setting(1 / 128, gt=0, le=1)
    """Share of the demonstrations that are finished. From the bare prompt an SFT policy finishes about as
    often, or less where this is small: 0.2 is "often", 0.003 "hardly ever", 0.001 "never"."""
    num_items: int = setting(12, ge=2, le=len(ITEMS) - 1)
    """Items in a post."""
    num_needed: int = setting(8, ge=2)
    """Items of a post that belong into its summary."""
    error_rate: float = setting(0.02, ge=0, lt=1)
    """Chance of a slip (a wrong item, or one in the wrong place) at each word of a demonstration."""
    annotator_temperature: float = setting(0.5, ge=0)
    """Temperature of the Bradley-Terry annotator, P(a over b) = sigmoid((reward(a) - reward(b)) / T).
    At 0 the better one always wins."""
    num_ranked: int = setting(4, ge=2, le=32)
    """Responses to each post in ranked data."""
    num_train: int = setting(38400, ge=1)
    """Posts to train on."""
    num_eval: int = setting(256, ge=1)
    """Held-out posts."""
    seed: int = setting(0, ge=0)
    """Seed of posts, writers and annotator."""

    def check(self) -> None:
        rule = f"({self.num_needed}) must be <= {key('num_items')} ({self.num_items})"
        refuse(self.num_needed > self.num_items, "num_needed", rule)

    @property
    def stop_rate(self) -> float:
        """Chance that a demonstration ends after an item: 1 - completion_rate^(1/(num_needed-1))."""
        return 1 - self.completion_rate ** (1 / (self.num_needed - 1))


def needed_items(prompt: str) -> list[str]:
    """Return the needed items of a post, in its order.

    Raises ValueError when the prompt is not a demo post.
    """
    post, _, _ = prompt.partition("\nTL;DR:")
    items = post.partition(" need ")[2].split()
    if not items:
        raise ValueError(
            f"only demo posts have a true reward; this prompt names no needed item: {prompt[:80]!r}"
        )
    return items


def _count_wrong(needed: Sequence[str], words: Sequence[str]) -> int:
    num_wrong, last_place = 0, -1
    for word in words:
        place = needed.index(word) if word in needed else -1
        if place > last_place:
            last_place = place
        else:
            num_wrong += 1
    return num_wrong


def true_reward(prompt: str, response: str, ended: bool) -> float:
    """Compute the worth of a summary.

    It is 4 when complete, else -0.25 for each right item, -2 for each wrong one, -2 if empty and -2 if not ended.
    An item is right when the post needs it and no earlier right item comes after it in the post. Complete means
    exactly the needed items in the post's order, and a stop.
    """
    needed, words = needed_items(prompt), response.split()
    if ended and words == needed:
        return COMPLETE_REWARD
    num_wrong = _count_wrong(needed, words)
    faults = num_wrong + (not words) + (not ended)
    return -RIGHT_COST * (len(words) - num_wrong) - WRONG_COST * faults


def true_rewards(completions: Sequence[Completion]) -> list[float]:
    """Compute `true_reward` of each completion: the demo's reward function for online training."""
    return [true_reward(c.prompt, c.response, c.ended) for c in completions]


def error_kind(prompt: str, response: str, ended: bool) -> str:
    """Return the first that applies: no_stop, complete, wrong_item, wrong_order (or repeated), incomplete."""
    needed, words = needed_items(prompt), response.split()
    if not ended:
        return "no_stop"
    if words == needed:
        return "complete"
    if any(word not in needed for word in words):
        return "wrong_item"
    return "wrong_order" if _count_wrong(needed, words) else "incomplete"


def _label(config: DemoConfig, prompt: str, a: str, b: str, rng: random.Random) -> tuple[str, str]:
    """Draw chosen and rejected: P(a is chosen) = sigmoid((reward(a) - reward(b)) / T)."""
    margin = true_reward(prompt, a, True) - true_reward(prompt, b, True)
    if config.annotator_temperature == 0:
        a_wins = margin > 0 or (margin == 0 and rng.random() < 0.5)
    else:
        scaled = min(max(margin / config.annotator_temperature, -50.0), 50.0)
        a_wins = rng.random() < 1 / (1 + exp(-scaled))
    return (a, b) if a_wins else (b, a)


def _rate(config: DemoConfig, prompt: str, response: str, rng: random.Random) -> float:
    """Draw the reward as the same annotator sees it: plus Gumbel noise of scale T.

    Two such ratings are ordered as `_label` orders pairs, for the difference of two Gumbel variables is logistic.
    At T = 0 it is the true reward.
    """
    noise = -log(max(rng.expovariate(1.0), 1e-300))
    return true_reward(prompt, response, True) + config.annotator_temperature * noise


def make_demo(config: DemoConfig, view: DemoView, split: Split) -> list[Record]:
    """Make the records of one view and split; post i is the same in every view.

    No post of one split is in the other. demonstrations: `completion` by a writer of uneven quality. pairs:
    `chosen`, `rejected` by the annotator, with their true rewards in `extra` as chosen_score and rejected_score; a
    wrong label has a gap below 0. prompts: `completion` is the complete reference, `chosen` and `rejected` a
    labelled pair. ranked: `responses` with `scores` by the annotator.
    """
    posts, writers, annotator, rater = (
        random.Random(f"{config.seed}/{split}/{stream}")
        for stream in ("posts", "writers", "annotator", "ranked")
    )
    records = []
    for i in range(config.num_train if split == "train" else config.num_eval):
        post = draw_post(config, posts, split)
        fields: dict[str, Any] = {}
        match view:
            case "demonstrations":
                fields["completion"] = as_text(demonstrate(config, post, writers))
            case "pairs" | "prompts":
                drafts = draw_two(config, post, annotator)
                pair = dict(
                    zip(("chosen", "rejected"), _label(config, post.prompt, *drafts, annotator), strict=True)
                )
                if view == "prompts":
                    fields = {**pair, "completion": as_text(post.needed)}
                else:
                    rewards = {f"{n}_score": true_reward(post.prompt, text, True) for n, text in pair.items()}
                    fields = {**pair, "extra": rewards}
            case "ranked":
                responses = draw_several(config, post, rater, config.num_ranked)
                scores = tuple(_rate(config, post.prompt, text, rater) for text in responses)
                fields = {"responses": responses, "scores": scores}
        records.append(Record(post.prompt, origin=f"demo/{split}:{i}", **fields))
    return records


def demo_records(config: DataConfig, view: View, split: Split) -> tuple[list[Record], list[str]]:
    """Make the records of one split of a recipe, and a line for the report."""
    demo_view = "pairs" if view == "unpaired" else view
    records = make_demo(config.demo, demo_view, split)[: config.limit]
    return records, [f"demo/{split}: {len(records)} {view_name(demo_view)} made"]


FILE_KEYS = ("path", "subset", "train_split", "eval_split", "eval_fraction", "split_seed", "columns")
TASK = Task("demo", make=demo_records, eval_split="eval", unused=(*FILE_KEYS, "chat_template"))
