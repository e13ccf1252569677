"""Sample completions, as rows of samples.jsonl and as a table on the console, forced prefixes marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from drpo.data.encode import said_texts
from drpo.rewards import Completion
from drpo.rollout.trajectory import Trajectory

PROMPT_TAIL = 160  # characters of a prompt that the table shows


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


def sample_table(rows: Sequence[dict[str, Any]], step: int) -> Table:
    """A console table of sample rows; the forced prefix is shown in reverse."""
    table = Table(title=f"samples at step {step} (forced prefix in reverse; | = stopped)", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("response", ratio=3, overflow="fold")
    table.add_column("scores", justify="right")
    for row in rows:
        prompt = row["prompt"]
        shown = prompt if len(prompt) <= PROMPT_TAIL else "..." + prompt[-PROMPT_TAIL:]
        response = Text(row["prefix"], style="reverse") + Text(row["continuation"])
        response.append(" |" if row["ended"] else " ...")
        scores = "\n".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
        table.add_row(Text(shown), response, scores)
    return table
