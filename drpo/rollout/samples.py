"""Format sample completions as rows of samples.jsonl, with forced prefixes separate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drpo.data.encode import readable_texts
from drpo.rewards import Completion
from drpo.rollout.trajectory import Rollouts


def rollout_samples(
    rollouts: Rollouts, completions: Sequence[Completion], tokenizer, num_samples: int
) -> list[dict[str, Any]]:
    """Return the first rollouts of this process as rows: prompt, forced prefix, sampled text, score."""
    rows = []
    for index in range(min(num_samples, len(completions))):
        completion = completions[index]
        num_forced = int(rollouts.reset_lengths[index])
        forced_ids, sampled_ids = completion.response_ids[:num_forced], completion.response_ids[num_forced:]
        prefix, continuation = readable_texts(tokenizer, [forced_ids, sampled_ids], ["", ""])
        row = evaluation_sample(completion, {"score": float(rollouts.scores[index])})
        rows.append(row | {"split": "rollout", "prefix": prefix, "continuation": continuation})
    return rows


def evaluation_sample(completion: Completion, scores: dict[str, float]) -> dict[str, Any]:
    """Return a held-out completion as a row, without a forced prefix."""
    return {
        "split": "eval",
        "origin": completion.record.origin,
        "prompt": completion.prompt,
        "prefix": "",
        "continuation": completion.response,
        "ended": completion.ended,
        "scores": scores,
    }
