"""What an online run checks before its first step: processes, responses to reset to, and the models of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.rollout.generator import Generator
from drpo.rollout.resets import dataset_source, prefix_lengths
from drpo.rollout.starts import ends_within
from drpo.rollout.vllm_requests import check_installed
from drpo.trainers.online_recipe import OnlineRecipe


def check_launcher(recipe: OnlineRecipe, world_size: int, partitions_weights: bool) -> None:
    """Raise ConfigError if rows do not divide over the processes, or these cannot sample what the recipe asks for."""
    minibatch = recipe.rollout.batch_size // recipe.ppo.num_minibatches
    if minibatch % world_size:
        raise ConfigError(
            f"a minibatch has {minibatch} rows (rollout.batch_size / ppo.num_minibatches), which do not divide "
            f"over {world_size} processes"
        )
    if recipe.rollout.engine == "vllm" and not recipe.rollout.vllm.urls:
        check_installed()
    samples_initial = recipe.reset.proportion > 0 and recipe.reset.source == "initial"
    if samples_initial and partitions_weights and not recipe.model.lora.r:
        raise ConfigError(
            "reset.source=initial: this launcher cuts the copy of the initial policy over the processes, so it cannot "
            "sample; use LoRA under ZeRO-3 (model.lora.r), another launcher, or responses sampled beforehand "
            "(launch/complete.py)"
        )


def check_forced_tokens(recipe: OnlineRecipe, examples: Sequence[Example], generator: Generator) -> None:
    """Raise ConfigError if a token that may be forced is never sampled: it has no likelihood that could be raised."""
    reset, suppressed_ids = recipe.reset, set(generator.vocabulary.suppressed_ids)
    if not (reset.sft_coef and reset.proportion and reset.from_data):
        return
    for example in examples:
        source = dataset_source(example, reset.source, generator.vocabulary.stop_ids)
        if suppressed_ids.isdisjoint(source):
            continue  # finding the boundaries of every response would take long
        lengths = prefix_lengths(reset, source, generator.max_response_length, generator.tokenizer)
        if found := suppressed_ids.intersection(source[: max(lengths, default=0)]):
            tokens = generator.tokenizer.convert_ids_to_tokens(sorted(found))
            place = example.record.origin or "an unknown place"
            raise ConfigError(
                f"reset.sft_coef trains on forced tokens, and the response at {place} has {tokens}, which "
                "the policy may not sample (rollout.bad_tokens or padding); take them out of rollout.bad_tokens or out "
                "of the data, or set reset.sft_coef=0"
            )


def notes_on_targets(recipe: OnlineRecipe, examples: Sequence[Example], generator: Generator) -> list[str]:
    """Note how many responses the adaptive length has no target for; raise ConfigError where it has none at all."""
    reset, longest, stop_ids = recipe.reset, recipe.rollout.max_response_length, generator.vocabulary.stop_ids
    if not (reset.from_data and reset.compares_with_source):
        return []
    sources = (dataset_source(example, reset.source, stop_ids) for example in examples)
    num_without = sum(not ends_within(source, longest, stop_ids) for source in sources)
    limit = f"rollout.max_response_length={longest}"
    without = f"{num_without} of {len(examples)} responses do not end within {limit} tokens"
    if num_without == len(examples):
        raise ConfigError(
            f"reset.length=adaptive: {without}, and what was cut off has no score to compare rollouts with; raise that "
            "limit (and data.max_response_length, if it cuts), or set reset.adaptive.target=score"
        )
    return [f"reset.length=adaptive: {without}, so it learns nothing from them"] * (num_without > 0)


def check_identities(earlier: Mapping[str, str] | str | None, now: Mapping[str, str]) -> None:
    """Raise ConfigError if other models or settings than in the earlier part of the run give the scores.

    Older checkpoints hold the identity of the server at reward.url alone, or (None) do not say what gave the scores:
    those are taken as they are.
    """
    if earlier is None:
        return
    if isinstance(earlier, str):
        earlier = {"reward.url": earlier}
    for place in sorted(earlier | now):
        if (before := earlier.get(place)) != now.get(place):
            raise ConfigError(
                f"{place}: this run was trained on the scores of {before}, and {now.get(place)} is there now; give "
                "it the earlier one again, or begin anew with resume=restart"
            )
