"""The demo task: made-up forum posts, summaries of uneven quality and a true reward that can be computed.

A post says which things are there and which ones are needed::

    SUBREDDIT: r/camping
    POST: we have lamp mug but need rope soap tent
    TL;DR: rope soap tent

A good summary names all the things needed, in the order of the post, and stops. Reading costs, and only a
complete summary is useful: an unfinished one is worth less with every word. So a policy that rarely completes
a summary from the bare prompt learns to say little, unless its rollouts start inside complete ones.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal, Protocol

from drpo.data.records import Record

View = Literal["demonstrations", "pairs", "prompts"]
Split = Literal["train", "eval"]

FORUMS = ("camping", "moving", "cooking", "school", "garden", "travel", "repair", "party")
ITEMS = tuple(
    (
        "rope lamp soap tent mug fork pan bag hat coat sock boot belt scarf map pen book desk chair rug "
        "bed sofa clock vase bowl plate knife spoon cup jar box bin broom mop saw nail drill tape glue paint "
        "brush seed rake hose pot kite ball bat net bike tire chain pump key lock phone cable radio watch "
        "ring comb towel candle match flag drum flute card dice doll"
    ).split()
)

COMPLETE_REWARD = 4.0
"""Worth of a complete summary."""
RIGHT_COST = 0.25
"""Cost of reading a needed item in an unfinished or faulty summary."""
WRONG_COST = 2.0
"""Cost of an item that is not needed, comes twice or too late; of an empty summary; of a missing stop."""


@dataclass(frozen=True)
class DemoConfig:
    """The demo task (section `data.demo` of a recipe)."""

    completion_rate: float = 1 / 128
    """Share of the demonstrations that are finished. From the bare prompt an SFT policy finishes about as
    often, or less where this is small: 0.2 is "often", 0.003 "hardly ever", 0.001 "never"."""
    num_items: int = 12
    """Items in a post."""
    num_needed: int = 8
    """Items of a post that belong into its summary."""
    error_rate: float = 0.02
    """Chance of a slip (a wrong item, or one in the wrong place) at each word of a demonstration."""
    annotator_temperature: float = 0.5
    """Temperature of the Bradley-Terry annotator, P(a over b) = sigmoid((reward(a) - reward(b)) / T).
    At 0 the better one always wins."""
    num_train: int = 38400
    """Posts to train on."""
    num_eval: int = 256
    """Held-out posts."""
    seed: int = 0
    """Seed of posts, writers and annotator."""

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"data.demo.{field} must be {rule}, got {getattr(self, field)!r}")

        check(0 < self.completion_rate <= 1, "completion_rate", "above 0 and at most 1")
        check(2 <= self.num_items <= len(ITEMS) - 1, "num_items", f"between 2 and {len(ITEMS) - 1}")
        check(
            2 <= self.num_needed <= self.num_items,
            "num_needed",
            f"between 2 and data.demo.num_items ({self.num_items})",
        )
        check(0 <= self.error_rate < 1, "error_rate", "at least 0 and below 1")
        check(self.annotator_temperature >= 0, "annotator_temperature", "at least 0")
        check(self.num_train > 0, "num_train", "positive")
        check(self.num_eval > 0, "num_eval", "positive")
        check(self.seed >= 0, "seed", "at least 0")

    @property
    def stop_rate(self) -> float:
        """Chance that a demonstration ends after an item: 1 - completion_rate^(1/(num_needed-1))."""
        return 1 - self.completion_rate ** (1 / (self.num_needed - 1))


class Scorable(Protocol):
    """What `true_rewards` reads of a completion (`drpo.rewards.Completion` has it)."""

    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def ended(self) -> bool: ...


def needed_items(prompt: str) -> list[str]:
    """Items that a post says are needed, in its order.

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
    wrong, last = 0, -1
    for word in words:
        place = needed.index(word) if word in needed else -1
        if place > last:
            last = place
        else:
            wrong += 1
    return wrong


def true_reward(prompt: str, response: str, ended: bool) -> float:
    """Worth of a summary: 4 when complete, else -0.25 a right item, -2 a wrong item, if empty, if not ended.

    An item is right when the post needs it and no earlier right item comes after it in the post. Complete
    means exactly the needed items in the post's order, and a stop.
    """
    needed, words = needed_items(prompt), response.split()
    if ended and words == needed:
        return COMPLETE_REWARD
    wrong = _count_wrong(needed, words)
    faults = wrong + (not words) + (not ended)
    return -RIGHT_COST * (len(words) - wrong) - WRONG_COST * faults


def true_rewards(completions: Sequence[Scorable]) -> list[float]:
    """`true_reward` of each completion: the demo's reward function for online training."""
    return [true_reward(c.prompt, c.response, c.ended) for c in completions]


def error_kind(prompt: str, response: str, ended: bool) -> str:
    """First that applies: no_stop, complete, wrong_item, wrong_order (or said twice), incomplete."""
    needed, words = needed_items(prompt), response.split()
    if not ended:
        return "no_stop"
    if words == needed:
        return "complete"
    if any(word not in needed for word in words):
        return "wrong_item"
    return "wrong_order" if _count_wrong(needed, words) else "incomplete"


@dataclass(frozen=True, slots=True)
class _Post:
    prompt: str
    needed: tuple[str, ...]
    spare: tuple[str, ...]  # in the post, but not needed

    def other(self, rng: random.Random) -> str:
        """An item that does not belong into the summary: one that the post has, or one from elsewhere."""
        if self.spare and rng.random() < 0.5:
            return rng.choice(self.spare)
        return rng.choice([item for item in ITEMS if item not in self.needed])

    def any_other(self, rng: random.Random) -> str:
        """A slip: an item that does not belong there, or a needed one, likely in the wrong place."""
        return self.other(rng) if rng.random() < 0.6 else rng.choice(self.needed)


def _draw_post(config: DemoConfig, rng: random.Random, split: Split) -> _Post:
    while True:
        items = rng.sample(ITEMS, config.num_items)
        needed, spare = tuple(items[: config.num_needed]), tuple(items[config.num_needed :])
        body = f"we have {' '.join(spare) or 'nothing'} but need {' '.join(needed)}"
        prompt = f"SUBREDDIT: r/{rng.choice(FORUMS)}\nPOST: {body}\nTL;DR:"
        if (zlib.crc32(prompt.encode()) % 8 == 0) == (split == "eval"):  # by its text a post is of one split
            return _Post(prompt, needed, spare)


def _replace(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    return [*words[:i], post.other(rng), *words[i + 1 :]]


def _insert(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words) + 1)
    return [*words[:i], post.other(rng), *words[i:]]


def _repeat(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    j = rng.randrange(i + 1, len(words) + 1)
    return [*words[:j], words[i], *words[j:]]


def _swap(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    j = rng.randrange(len(words))
    swapped = list(words)
    swapped[i], swapped[j] = words[j], words[i]
    return swapped


def _drop(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    return words[:i] + words[i + 1 :]


def _cut(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    return words[: rng.randrange(1, len(words) + 1)]


_EDITS = (_replace, _insert, _repeat, _swap, _drop, _cut)


def _demonstrate(config: DemoConfig, post: _Post, rng: random.Random) -> list[str]:
    """A summary by a writer who may stop after each item and slips now and then."""
    words: list[str] = []
    for item in post.needed:
        if rng.random() < config.error_rate:
            item = post.any_other(rng)
        words.append(item)
        if rng.random() < config.stop_rate:
            break
    return words


def _careless(post: _Post, words: list[str], rng: random.Random) -> list[str]:
    """The words by a writer who gets some, and up to all of them, wrong."""
    error_rate = rng.random()
    return [post.any_other(rng) if rng.random() < error_rate else word for word in words]


def _draft(config: DemoConfig, post: _Post, rng: random.Random) -> list[str]:
    """One side of a pair: a demonstration, or the reference cut anywhere and sometimes edited."""
    if rng.random() < 0.25:
        return _demonstrate(config, post, rng)
    words = list(post.needed) if rng.random() < 0.5 else _cut(post, list(post.needed), rng)
    return words if rng.random() < 0.5 else rng.choice(_EDITS)(post, words, rng) or words


def _draw_pair(config: DemoConfig, post: _Post, rng: random.Random) -> tuple[str, str]:
    """Chosen and rejected: 7 of 10 pairs differ by carelessness, 1 by one edit, the other 2 altogether.

    The first kind has many errors in text of equal length. Without it a reward model learns length alone.
    """
    first = second = _draft(config, post, rng)
    while second == first:
        kind = rng.random()
        if kind < 0.7:
            first = list(post.needed) if rng.random() < 0.5 else _cut(post, list(post.needed), rng)
            second = _careless(post, first, rng)
        elif kind < 0.8:
            second = rng.choice(_EDITS)(post, first, rng) or first
        else:
            second = _draft(config, post, rng)
    a, b = _text(first), _text(second)
    margin = true_reward(post.prompt, a, True) - true_reward(post.prompt, b, True)
    if config.annotator_temperature == 0:
        a_wins = margin > 0 or (margin == 0 and rng.random() < 0.5)
    else:
        scaled = min(max(margin / config.annotator_temperature, -50.0), 50.0)
        a_wins = rng.random() < 1 / (1 + exp(-scaled))
    return (a, b) if a_wins else (b, a)


def _text(words: Sequence[str]) -> str:
    return "".join(f" {word}" for word in words)


def make_demo(config: DemoConfig, view: View, split: Split) -> list[Record]:
    """The records of one view; post i is the same in every view, and no post of one split is in the other.

    demonstrations: `completion` by a writer of uneven quality. pairs: `chosen`, `rejected` by the annotator.
    prompts: `completion` is the complete reference, `chosen` and `rejected` a labelled pair.
    """
    posts = random.Random(f"{config.seed}/{split}/posts")
    writers = random.Random(f"{config.seed}/{split}/writers")
    annotator = random.Random(f"{config.seed}/{split}/annotator")
    records = []
    for i in range(config.num_train if split == "train" else config.num_eval):
        post = _draw_post(config, posts, split)
        completion = chosen = rejected = None
        if view == "demonstrations":
            completion = _text(_demonstrate(config, post, writers))
        else:
            chosen, rejected = _draw_pair(config, post, annotator)
            if view == "prompts":
                completion = _text(post.needed)
        records.append(Record(post.prompt, completion, chosen, rejected, origin=f"demo/{split}:{i}"))
    return records
