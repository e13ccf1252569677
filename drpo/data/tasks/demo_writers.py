"""The demo's forum posts, and the writers of its summaries: careful ones, careless ones, early stoppers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from drpo.data.tasks.demo import DemoConfig

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


@dataclass(frozen=True, slots=True)
class Post:
    """A post, with the items that belong into its summary and those that do not."""

    prompt: str
    needed: tuple[str, ...]
    spare: tuple[str, ...]  # in the post, but not needed

    def other(self, rng: random.Random) -> str:
        """Draw an item that does not belong into the summary: from the post, or from elsewhere."""
        if self.spare and rng.random() < 0.5:
            return rng.choice(self.spare)
        return rng.choice([item for item in ITEMS if item not in self.needed])

    def any_other(self, rng: random.Random) -> str:
        """Draw a slip: an item that does not belong there, or a needed one, likely in the wrong place."""
        return self.other(rng) if rng.random() < 0.6 else rng.choice(self.needed)


def draw_post(config: DemoConfig, rng: random.Random, split: Split) -> Post:
    """Draw the next post of a split."""
    while True:
        items = rng.sample(ITEMS, config.num_items)
        needed, spare = tuple(items[: config.num_needed]), tuple(items[config.num_needed :])
        body = f"we have {' '.join(spare) or 'nothing'} but need {' '.join(needed)}"
        prompt = f"SUBREDDIT: r/{rng.choice(FORUMS)}\nPOST: {body}\nTL;DR:"
        if (zlib.crc32(prompt.encode()) % 8 == 0) == (split == "eval"):  # by its text a post is of one split
            return Post(prompt, needed, spare)


def _replace(post: Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    return [*words[:i], post.other(rng), *words[i + 1 :]]


def _insert(post: Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words) + 1)
    return [*words[:i], post.other(rng), *words[i:]]


def _repeat(post: Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    j = rng.randrange(i + 1, len(words) + 1)
    return [*words[:j], words[i], *words[j:]]


def _swap(post: Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    j = rng.randrange(len(words))
    swapped = list(words)
    swapped[i], swapped[j] = words[j], words[i]
    return swapped


def _drop(post: Post, words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    return words[:i] + words[i + 1 :]


def _cut(post: Post, words: list[str], rng: random.Random) -> list[str]:
    return words[: rng.randrange(1, len(words) + 1)]


_EDITS = (_replace, _insert, _repeat, _swap, _drop, _cut)


def demonstrate(config: DemoConfig, post: Post, rng: random.Random) -> list[str]:
    """Write a summary as a writer who may stop after each item and slips now and then."""
    words: list[str] = []
    for item in post.needed:
        if rng.random() < config.error_rate:
            item = post.any_other(rng)
        words.append(item)
        if rng.random() < config.stop_rate:
            break
    return words


def _careless(post: Post, words: list[str], rng: random.Random) -> list[str]:
    """Rewrite the words as a writer who gets some, and up to all of them, wrong."""
    error_rate = rng.random()
    return [post.any_other(rng) if rng.random() < error_rate else word for word in words]


def _draft(config: DemoConfig, post: Post, rng: random.Random) -> list[str]:
    """Write one side of a pair: a demonstration, or the reference cut anywhere and sometimes edited."""
    if rng.random() < 0.25:
        return demonstrate(config, post, rng)
    words = list(post.needed) if rng.random() < 0.5 else _cut(post, list(post.needed), rng)
    return words if rng.random() < 0.5 else rng.choice(_EDITS)(post, words, rng) or words


def draw_two(config: DemoConfig, post: Post, rng: random.Random) -> tuple[str, str]:
    """Draw two different summaries.

    7 of 10 times they differ by carelessness, 1 by one edit, else altogether. The first kind has many errors in
    text of equal length. Without it a reward model learns length alone.
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
    return as_text(first), as_text(second)


def draw_several(config: DemoConfig, post: Post, rng: random.Random, number: int) -> tuple[str, ...]:
    """Draw `number` different summaries by the writers of `draw_two`."""
    summaries: dict[str, None] = {}
    while len(summaries) < number:
        summaries |= dict.fromkeys(draw_two(config, post, rng))
    return tuple(summaries)[:number]


def as_text(words: Sequence[str]) -> str:
    """Join the words of a summary as it follows its prompt."""
    return "".join(f" {word}" for word in words)
