"""Noise on preference pairs: wrong labels, and pairs in which neither response answers the prompt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drpo.config import Section, key, setting
from drpo.data.encode import Example
from drpo.data.records import DataError


@dataclass(frozen=True)
class NoiseConfig(Section):
    """Noise that is put on the pairs to train on (section `data.noise`); held-out pairs stay as they are."""

    flip_rate: float = setting(0.0, ge=0, le=1)
    """Pairwise noise: chance that the two responses of a pair change places."""
    off_topic_rate: float = setting(0.0, ge=0, le=1)
    """Pointwise noise: chance that both responses of a pair are replaced by those of a pair on another
    prompt."""
    seed: int = setting(0, ge=0)
    """Seed of the noise. Under one seed, the pairs hit at a rate are among those hit at a higher rate."""

    @property
    def on(self) -> bool:
        """Whether any pair can be hit."""
        return self.flip_rate > 0 or self.off_topic_rate > 0


def add_noise(pairs: Sequence[Example], config: NoiseConfig) -> tuple[list[Example], list[str]]:
    """Return the pairs with noise, marked in `extra` as `flipped` and `off_topic`, and lines for the report.

    Each pair is hit with the configured chances, independently of all others (i.i.d., as in the Dr. DPO
    release: a rate, not an exact share). Whether a pair is hit depends on the seed, its prompt and its
    place among the pairs of that prompt alone. Texts, token ids and the entries of `extra` named chosen_... and
    rejected_... (chosen_score) move together, so a flip turns the sign of the score gap.

    Without noise the pairs are returned as they are. Raises DataError for an example that is no pair, and when
    there is no other prompt to take an off-topic pair from.
    """
    for pair in pairs:
        if pair.chosen_ids is None or pair.rejected_ids is None:
            raise DataError(f"{key('noise')} applies to pairs; {pair.record.origin} is none")
    if not config.on:
        return list(pairs), []
    if config.off_topic_rate > 0 and len({pair.record.prompt for pair in pairs}) < 2:
        raise DataError(f"{key('noise.off_topic_rate')} needs pairs on at least 2 distinct prompts")
    places: Counter[str] = Counter()
    noisy = []
    for pair in pairs:
        prompt = pair.record.prompt
        rng = random.Random(f"{config.seed}/{places[prompt]}/{prompt}")
        places[prompt] += 1
        flipped, off_topic = rng.random() < config.flip_rate, rng.random() < config.off_topic_rate
        source = _other_prompt(pairs, prompt, rng) if off_topic else pair
        noisy.append(_corrupted(pair, source, flipped, off_topic))
    notes = []
    for name, rate in (("flipped", config.flip_rate), ("off_topic", config.off_topic_rate)):
        count = sum(pair.record.extra[name] for pair in noisy)
        share = count / max(len(noisy), 1)
        label = name.replace("_", " ")
        notes += [f"noise: {count} of {len(noisy)} pairs {label} ({share:.1%})"] * (rate > 0)
    return noisy, notes


def _other_prompt(pairs: Sequence[Example], prompt: str, rng: random.Random) -> Example:
    while True:
        pair = rng.choice(pairs)
        if pair.record.prompt != prompt:
            return pair


def _corrupted(pair: Example, source: Example, flipped: bool, off_topic: bool) -> Example:
    """Combine the prompt of `pair` with the responses of `source`, in their order or flipped."""
    texts = [(source.record.chosen, source.chosen_ids), (source.record.rejected, source.rejected_ids)]
    (chosen, chosen_ids), (rejected, rejected_ids) = reversed(texts) if flipped else texts
    extra = {name: value for name, value in pair.record.extra.items() if not _of_response(name)}
    extra |= {_flip(n) if flipped else n: v for n, v in source.record.extra.items() if _of_response(n)}
    extra |= {"flipped": flipped, "off_topic": off_topic}
    record = replace(pair.record, chosen=chosen, rejected=rejected, extra=extra)
    return replace(pair, record=record, chosen_ids=chosen_ids, rejected_ids=rejected_ids)


def _of_response(name: str) -> bool:
    return name.startswith(("chosen_", "rejected_"))


def _flip(name: str) -> str:
    side, _, rest = name.partition("_")
    return f"{'rejected' if side == 'chosen' else 'chosen'}_{rest}"
