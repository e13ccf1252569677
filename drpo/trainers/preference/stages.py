"""Make the pairs of each stage of preference training and the held-out ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from drpo.data.encode import Example
from drpo.data.load import Splits
from drpo.engine import Engine
from drpo.run.folder import RunFolder
from drpo.trainers.preference.curriculum import CurriculumConfig, build_stages
from drpo.trainers.preference.dataset_logprobs import all_logprobs
from drpo.trainers.preference.pair_objective import block_logprobs
from drpo.trainers.preference.pairs import make_pairs
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.reference import Reference


@dataclass(frozen=True)
class PairStages:
    """Items of each stage in the order of training, held-out items, and a report on them."""

    stages: list[list[Any]]
    held_out: list[Any]
    report: str


def pair_stages(
    recipe: PreferenceRecipe,
    engine: Engine,
    run: RunFolder,
    splits: Splits,
    tokenizer,
    reference: Reference | None,
) -> PairStages:
    """Make pairs of the splits: as given, or from ranked responses, easy stages first.

    Held out under a curriculum are all pairs of the held-out ranked responses, so that runs with different
    curricula are compared on the same ones.
    """
    notes = [splits.report]
    stages: list[list[Example]] = [splits.train]
    held_out: list[Example] = splits.eval
    if recipe.curriculum is not None:
        logprobs = None
        if recipe.orders_by_reference:
            logprobs = _ranked_logprobs(recipe, engine, run, splits.train, tokenizer, reference)
        stages, further = build_stages(splits.train, recipe.curriculum, logprobs)
        notes += further
        if splits.eval:
            everything = CurriculumConfig(num_stages=1, pairs="all")
            (held_out,), further = build_stages(splits.eval, everything)
            # Restore the order of the data: eval.num_examples takes the first, which must not be the easiest.
            place = {example.record.origin: i for i, example in enumerate(splits.eval)}
            held_out.sort(key=lambda pair: place[pair.record.origin])
            notes += [f"held out: {note}" for note in further]
    made = []
    for examples in stages:
        pairs, further = make_pairs(examples, recipe.loss, tokenizer, recipe.data.max_bad_fraction)
        made.append(pairs)
        notes += further
    # Held-out pairs need no offset, so those of equal score count too.
    held_out_pairs: list[Any] = []
    if held_out:
        held_out_loss = replace(recipe.loss, offset=None)
        held_out_pairs, further = make_pairs(held_out, held_out_loss, tokenizer, recipe.data.max_bad_fraction)
        notes += [f"held out: {note}" for note in further]
    return PairStages(made, held_out_pairs, "\n".join(notes))


def _ranked_logprobs(
    recipe: PreferenceRecipe,
    engine: Engine,
    run: RunFolder,
    examples: Sequence[Example],
    tokenizer,
    reference: Reference,
) -> list[list[float]]:
    """Compute log pi_ref of every ranked response of every example, summed over its tokens."""
    score = functools.partial(block_logprobs, share_prompts=recipe.share_prompts)
    rows = all_logprobs(
        [(example.query_ids, example.ranked_ids) for example in examples],
        engine,
        run,
        functools.partial(reference.apply, score),
        recipe.batch.microbatch_size,
        tokenizer.pad_token_id,
    )
    return [[float(logprobs.sum()) for logprobs in responses] for responses in rows]
