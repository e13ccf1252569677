"""Preference training: DPO and its family on pairs, Curry-DPO in stages, KTO on single responses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from drpo.data.load import load_examples
from drpo.engine import Engine
from drpo.models.loading import load_policy
from drpo.models.policy_stops import check_stop_token
from drpo.models.positions import check_examples
from drpo.models.scoring import response_logprobs
from drpo.rewards import RewardFn
from drpo.rollout.held_out import held_out_sampler
from drpo.run.folder import Callback, RunFolder
from drpo.run.result import Result
from drpo.tensors import PaddedBatch
from drpo.trainers.offline import fit
from drpo.trainers.preference.kto_objective import UnpairedObjective, make_labelled
from drpo.trainers.preference.pair_objective import PairObjective
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.preference.reference import starting_reference
from drpo.trainers.preference.reference_cache import is_cached, with_cached_reference
from drpo.trainers.preference.stages import PairStages, pair_stages
from drpo.trainers.reference import FrozenCopy, Reference
from drpo.trainers.sft import tokenizer_for


def train(
    recipe: PreferenceRecipe,
    engine: Engine,
    rewards: Mapping[str, RewardFn],
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Run the recipe and return the folder of the policy. `rewards` score the held-out samples, by name.

    Raises DataError when the data lacks what the loss needs, ConfigError when a cache or setting does not fit.
    """
    run = RunFolder(recipe, engine, callbacks)
    tokenizer = tokenizer_for(recipe.model, recipe.data)
    splits = load_examples(recipe.data, tokenizer, recipe.view)
    policy = load_policy(recipe.model, tokenizer, recipe.seed)
    if recipe.loss.name != "orpo":  # which is SFT too
        check_stop_token(policy, tokenizer)
    examples = [*splits.train, *splits.eval]
    run.say(*check_examples(policy, examples))
    reference = None
    # Metrics must not depend on which run wrote the cache, so a reference that needs no memory is always loaded.
    is_free = recipe.reference_is_adapter_off
    is_used = is_free or recipe.orders_by_reference or not is_cached(recipe, engine)
    if recipe.loss.needs_reference and is_used:
        reference = starting_reference(recipe, engine, tokenizer, policy)
        if isinstance(reference, FrozenCopy) and recipe.reference.path is not None:
            check_examples(reference.module, examples, "reference.path")

    options = {"pad_id": tokenizer.pad_token_id, "device": engine.device}
    if recipe.loss.name == "kto":
        data = PairStages([make_labelled(splits.train)], make_labelled(splits.eval), splits.report)
        objective = UnpairedObjective(policy, recipe.loss, reference=reference, **options)
    else:
        data = pair_stages(run, splits, tokenizer, reference)
        if recipe.reference.cache_dir is not None:
            data = with_cached_reference(run, data, tokenizer, reference)
            reference = reference if is_free else None  # a copy is no longer needed
        objective = PairObjective(
            policy, recipe.loss, reference=reference, share_prompts=recipe.share_prompts, **options
        )
    run.take_data(data.report, splits.train_digest())
    if recipe.reference_moves:
        engine.keep_in_state(reference.module)
    elif isinstance(reference, FrozenCopy) and not reference.shares_trunk:
        engine.partition(reference.scored)

    def reference_logprobs(batch: PaddedBatch) -> Tensor:
        return reference.apply(response_logprobs, batch).logprobs

    is_fixed = reference is not None and not recipe.reference_moves
    sample = held_out_sampler(
        run, policy, tokenizer, splits.eval, rewards, reference_logprobs if is_fixed else None
    )
    result = Result(run, objective, policy, tokenizer, data.report, "policy")
    fit(
        run,
        objective,
        data.stages,
        data.held_out,
        name=recipe.loss.name.upper(),
        result=result,
        sample=sample,
        after_step=functools.partial(_after_step, run, objective, policy, reference),
    )
    return result.finish()


def _after_step(
    run: RunFolder,
    objective: nn.Module,
    policy: nn.Module,
    reference: Reference | None,
    step: int,
    stage_ended: bool,
) -> None:
    """Update the reference for TR-DPO or Curry-DPO, and reset the optimizer between stages."""
    recipe, engine = run.recipe, run.engine
    sync, curriculum = recipe.reference, recipe.curriculum
    mix = 0.0
    if sync.sync_every and step % sync.sync_every == 0:
        mix = sync.sync_mix
    if curriculum is not None and stage_ended:
        if recipe.reference_moves_per_stage:
            mix = 1.0
        if curriculum.reset_optimizer:
            engine.reset_optimizer()
    if mix:
        with engine.whole_weights(objective):
            reference.move_towards(policy, mix)
