"""Make the pairs of each stage of preference training and the held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from drpo.data.encode import Example
from drpo.data.load import Splits
from drpo.run.folder import RunFolder
from drpo.trainers.preference.curriculum import CurriculumConfig, build_stages
from drpo.trainers.preference.dataset_logprobs import reference_logprobs
from drpo.trainers.preference.pairs import Pair, make_pairs
from drpo.trainers.preference.recipe import LossConfig
from drpo.trainers.reference import Reference


@dataclass(frozen=True)
class PairStages:
    """Items of each stage in the order of training, held-out items, and a report on them."""

    stages: list[list[Any]]
    held_out: list[Any]
    report: str


def pair_stages(run: RunFolder, splits: Splits, tokenizer, reference: Reference | None) -> PairStages:
    """Make pairs of the splits: as given, or from ranked responses, easy stages first.

    Held out under a curriculum are all pairs of the held-out ranked responses, so that runs with different
    curricula are compared on the same ones.
    """
    recipe = run.recipe
    notes = [splits.report]
    stages: list[list[Example]] = [splits.train]
    held_out: list[Example] = splits.eval
    if recipe.curriculum is not None:
        logprobs = None
        if recipe.orders_by_reference:
            prompts = [(example.query_ids, example.ranked_ids) for example in splits.train]
            tokens = reference_logprobs(run, prompts, tokenizer, reference)
            logprobs = [[float(response.sum()) for response in responses] for responses in tokens]
        stages, stage_notes = build_stages(splits.train, recipe.curriculum, logprobs)
        notes += stage_notes
        if splits.eval:
            all_pairs = CurriculumConfig(num_stages=1, pairs="all")
            (held_out,), held_out_notes = build_stages(splits.eval, all_pairs)
            # Restore the order of the data: eval.num_examples takes the first, which must not be the easiest.
            place = {example.record.origin: i for i, example in enumerate(splits.eval)}
            held_out.sort(key=lambda pair: place[pair.record.origin])
            notes += [f"held out: {note}" for note in held_out_notes]

    def pairs_of(examples: list[Example], loss: LossConfig, prefix: str = "") -> list[Pair]:
        pairs, pair_notes = make_pairs(examples, loss, tokenizer, recipe.data.max_bad_fraction)
        notes.extend(prefix + note for note in pair_notes)
        return pairs

    pairs = [pairs_of(examples, recipe.loss) for examples in stages]
    # Held-out pairs need no offset, so those of equal score count too.
    held_out_pairs = pairs_of(held_out, replace(recipe.loss, offset=None), "held out: ") if held_out else []
    return PairStages(pairs, held_out_pairs, "\n".join(notes))
