"""Describe sample completions as rows of samples.jsonl, forced prefixes apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drpo.data.encode import said_texts
from drpo.rewards import Completion
from drpo.rollout.trajectory import Trajectory


def rollout_samples(
    trajectory: Trajectory, completions: Sequence[Completion], tokenizer, num_samples: int
) -> list[dict[str, Any]]:
    """The first rollouts of this process as rows: prompt, forced prefix, what the policy wrote, score."""
    rows = []
    for index in range(min(num_samples, len(completions))):
        completion = completions[index]
        forced = int(trajectory.reset_lengths[index])
        forced_ids, sampled_ids = completion.response_ids[:forced], completion.response_ids[forced:]
        prefix, continuation = said_texts(tokenizer, [forced_ids, sampled_ids], ["", ""])
        rows.append(
            {
                "split": "rollout",
                "origin": completion.record.origin,
                "prompt": completion.prompt,
                "prefix": prefix,
                "continuation": continuation,
                "ended": completion.ended,
                "scores": {"score": float(trajectory.scores[index])},
            }
        )
    return rows


def evaluation_sample(completion: Completion, scores: dict[str, float]) -> dict[str, Any]:
    """A held-out completion as a row; nothing is forced there."""
    return {
        "split": "eval",
        "origin": completion.record.origin,
        "prompt": completion.prompt,
        "prefix": "",
        "continuation": completion.response,
        "ended": completion.ended,
        "scores": scores,
    }
