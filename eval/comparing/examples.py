"""Single responses of a comparison next to the baseline's, for the report's browser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.comparing.systems import KL, WIN_RATE, Run, System
from eval.completions.rows import CompletionRow
from eval.judging.verdict import Verdict
from eval.reporting.comparison import Example, VerdictRow


def examples_of(systems: Sequence[System], baseline: System, num_prompts: int | None) -> tuple[Example, ...]:
    """Pair each response of each system with the baseline's, with its verdicts and measured values.

    Prompts that the baseline did not answer have no examples. `num_prompts` selects the prompts with the smallest
    ids, the same for every system; None selects all.
    """
    prompt_ids = sorted({row.prompt_id for system in systems for run in system.runs for row in run.rows})
    chosen = set(prompt_ids[:num_prompts])
    return tuple(
        example
        for system in systems
        if system.name != baseline.name
        for index in range(len(system.runs))
        for example in _of_run(system, index, baseline, chosen)
    )


def _of_run(system: System, index: int, baseline: System, chosen: set[str]) -> list[Example]:
    run, rivals = system.runs[index], baseline.runs[index % len(baseline.runs)]
    by_prompt: dict[str, dict[int, CompletionRow]] = {}
    for row in rivals.rows:
        by_prompt.setdefault(row.prompt_id, {})[row.seed] = row
    verdicts: dict[tuple[str, int], list[Verdict]] = {}
    for verdict in run.verdicts:
        verdicts.setdefault((verdict.prompt_id, verdict.seed), []).append(verdict)
    judgments = {(judgment.prompt_id, judgment.seed): judgment for judgment in run.judgments}
    numbers = _numbers_of_responses(run)
    examples = []
    for place, row in enumerate(run.rows):
        answers = by_prompt.get(row.prompt_id)
        if row.prompt_id not in chosen or answers is None:
            continue
        key = row.prompt_id, row.seed
        rival = answers.get(row.seed) or next(iter(answers.values()))
        judgment = judgments.get(key)
        on_row = verdicts.get(key, [])
        examples.append(
            Example(
                id=f"{system.name}/{index}/{row.prompt_id}/{row.seed}",
                prompt_id=row.prompt_id,
                prompt=row.prompt,
                system=system.name,
                run=index,
                baseline=baseline.name,
                response_a=row.response,
                response_b=rival.response,
                ended_a=row.ended,
                ended_b=rival.ended,
                prefix_a=0,  # held-out prompts are continued from their end
                score=None if judgment is None else judgment.score,
                consistent=None if judgment is None else judgment.consistent,
                verdicts=tuple(
                    VerdictRow(v.order, v.status, v.winner, run.answers.get((*key, v.order)), v.detail)
                    for v in on_row
                ),
                suspicions_a=tuple(sorted({sign for verdict in on_row for sign in verdict.suspicions_a})),
                suspicions_b=tuple(sorted({sign for verdict in on_row for sign in verdict.suspicions_b})),
                values={name: column[place] for name, column in numbers.items()},
            )
        )
    return examples


def _numbers_of_responses(run: Run) -> dict[str, list[float | None]]:
    """Return the measures that have a number for each of the run's responses, in the order of the responses."""
    prompt_ids = tuple(row.prompt_id for row in run.rows)
    return {
        key: [None if np.isnan(number) else float(number) for number in values.numbers]
        for key, values in run.values.items()
        if values.prompt_ids == prompt_ids and key != WIN_RATE and (run.sampled or key != KL)
    }
