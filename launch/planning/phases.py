"""The phases of a training step in a dry run: what each holds at its peak beyond the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.microbatches import microbatches
from drpo.models.actor_critic import ActorCritic
from drpo.models.adapters import folded
from drpo.models.inputs import unwrap_peft
from drpo.models.scoring import chunked_scores
from drpo.models.shared_prompt import continuation_logprobs, packed_states
from drpo.models.trunk import has_trunk, trunk_output
from drpo.optim import build_optimizer
from drpo.rollout.decode_cache import decode_cache
from drpo.rollout.generator import RolloutConfig
from drpo.rollout.sampler import SamplingConfig, Vocabulary, sample
from drpo.rollout.trajectory import Rollouts
from drpo.tensors import PaddedBatch, pad_batch
from drpo.trainers.offline import Objective, OfflineRecipe
from drpo.trainers.online_models import rollouts_together
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.ppo_update import minibatches
from drpo.trainers.preference.kto_objective import LabelledResponse, UnpairedObjective
from drpo.trainers.preference.pair_objective import PairObjective
from drpo.trainers.preference.pairs import Pair
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTObjective, SFTRecipe
from launch.planning.dry_run import DryRun
from launch.planning.four_bit import packed_sizes
from launch.planning.models import Precision, StageModels, reward_model_names, stage_models
from launch.planning.sizes import Phase, Weights
from reward_models.objective import RewardObjective
from reward_models.rankings import Ranking
from reward_models.train import RewardModelRecipe

PAD = 0
SUPPRESSED = (PAD,)
"Ids that are never sampled: padding at least, for which scoring copies the logits."
CHUNK = 1024
"Positions of a chunk of logits, as `drpo.models.scoring` takes them by default."


@dataclass(frozen=True)
class Step:
    """A dry run of a step: weights by model, and the phases in their order."""

    weights: dict[str, Weights]
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = field(default=())


def dry_step(recipe: OfflineRecipe | OnlineRecipe, precision: Precision, world_size: int) -> Step:
    """Run one step of the recipe, up to its optimizer, without arithmetic, on the longest rows that it admits.

    `world_size` processes divide the rows of a step.
    """
    with DryRun() as dry:
        models = stage_models(recipe, precision)
        phases = _Phases(dry, recipe, precision, world_size, models)
        run = phases.online() if isinstance(recipe, OnlineRecipe) else phases.offline()
        return Step(models.weights(), tuple(run), models.notes)


def dry_optimizer_step(recipe: OfflineRecipe | OnlineRecipe, num_weights: int, on_gpu: bool) -> Phase:
    """Run AdamW's step over `num_weights` float32 weights; `on_gpu` over all tensors at once, as torch does there."""
    with DryRun() as dry:
        weight = nn.Parameter(torch.empty(num_weights))
        weight.grad = torch.empty_like(weight)
        optimizer = build_optimizer([[weight]], recipe.optim)
        optimizer.param_groups[0]["foreach"] = on_gpu
        optimizer.step()  # makes the moments
        with dry.measured() as used:
            optimizer.step()
    return Phase("step", used.peak)


def rows_key(recipe: OfflineRecipe | OnlineRecipe, world_size: int) -> int:
    """Return what the phases depend on of the number of processes: rows of a process, if there are few."""
    online = isinstance(recipe, OnlineRecipe)
    section = recipe.ppo if online else recipe.batch
    largest = section.microbatch_size
    if section.microbatch_tokens is not None:  # a row has at least its response
        largest = max(1, section.microbatch_tokens // lengths_of(recipe)[1])
    if online:
        largest = max(recipe.rollout.generation_batch_size, recipe.reward.batch_size, largest)
        return min(recipe.rollout.batch_size // world_size, largest)
    sampled = getattr(recipe, "sample", None)
    num_prompts = 0 if sampled is None else -(-sampled.num_prompts // world_size)
    return max(min(recipe.batch.size // world_size, largest), num_prompts)


def lengths_of(recipe: OfflineRecipe | OnlineRecipe) -> tuple[int, int]:
    """Return the longest prompt and response that the recipe admits; raise ConfigError where it has no limit."""
    query = recipe.data.max_prompt_length
    response = recipe.data.max_response_length
    if isinstance(recipe, OnlineRecipe):
        response = recipe.rollout.max_response_length
    for name, length in (("max_prompt_length", query), ("max_response_length", response)):
        if length is None:
            raise ConfigError(
                f"data.{name} is null, so rows have no longest length: give data.{name}=... to plan with"
            )
    return query, response


class _Phases:
    """The phases of one recipe in one dry run."""

    def __init__(
        self,
        dry: DryRun,
        recipe: OfflineRecipe | OnlineRecipe,
        precision: Precision,
        world_size: int,
        models: StageModels,
    ) -> None:
        self.dry, self.recipe, self.precision, self.world_size, self.models = (
            dry,
            recipe,
            precision,
            world_size,
            models,
        )
        self.query_length, self.response_length = lengths_of(recipe)

    def offline(self) -> Iterator[Phase]:
        recipe = self.recipe
        objective = _objective(recipe, self.models)
        item = functools.partial(_item, recipe, self.response_length)
        if objective.before_lengths is not None:
            objective.before_lengths([item(self.query_length)])
        lengths = objective.lengths(item(self.query_length))
        local = max(1, recipe.batch.size // self.world_size)
        rows = min(recipe.batch.microbatch_size, local)
        if recipe.batch.microbatch_tokens is not None:
            rows = len(microbatches([lengths] * local, None, recipe.batch.microbatch_tokens)[0])
        batch = objective.collate([item(length) for length in self._query_lengths(rows)])
        statistics = (torch.zeros(()),) if objective.needs_step_statistics else ()

        def loss() -> Tensor:
            with self.precision.autocast():
                return objective(batch, *statistics)[0].float().sum()

        sampled = getattr(recipe, "sample", None)
        if sampled is not None and sampled.num_prompts:
            num_sampled = min(-(-sampled.num_prompts // self.world_size), RolloutConfig.generation_batch_size)
            yield self._rollout("sampling", num_sampled, 1, sampled.max_response_length)
        num_positions = getattr(batch, "padded", batch).responses.numel()
        yield self._update(loss, num_positions, "policy" in self.models.trained)

    def online(self) -> Iterator[Phase]:
        recipe, models = self.recipe, self.models
        policy, critic = models.trained["policy"], models.trained.get("critic")
        temperature = recipe.rollout.sampling.temperature
        actor_critic = ActorCritic(
            policy,
            critic,
            temperature=temperature,
            suppressed_ids=SUPPRESSED,
            entropy_gradient=recipe.ppo.entropy_coef > 0,
        )
        score = functools.partial(continuation_logprobs, temperature=temperature, suppressed_ids=SUPPRESSED)
        local = max(1, recipe.rollout.batch_size // self.world_size)
        rollouts = self._rollouts()
        part = next(minibatches(rollouts, recipe.ppo, self.world_size, (0, 0)))[0]
        batch, trunk = rollouts.select(part)
        stored = 0
        if has_trunk(policy):
            with self.dry.measured() as used:
                trunk = self._trunk(batch)
            stored = used.left * recipe.rollout.batch_size // len(part.rows)
        tokens = (batch.queries, batch.query_mask, batch.responses, batch.response_mask)

        rows = min(recipe.rollout.generation_batch_size, local)
        yield self._rollout("rollout", rows, recipe.rollout.rollouts_per_prompt, self.response_length)
        if recipe.reward.models:
            yield self._reward(min(recipe.reward.batch_size, local), stored)
        with self.dry.measured() as used, torch.no_grad(), self.precision.autocast():
            scores = actor_critic(*tokens, trunk, part.num_continuations)
            packed = packed_states(trunk, batch, part.num_continuations)
            scores += (models.reference.apply(score, batch, part.num_continuations, trunk=packed),)
            del scores, packed
        logits = self._logits(len(part.rows) * self.response_length, backward=False)
        yield Phase("scoring", used.peak + stored, logits=logits)

        def loss() -> Tensor:
            with self.precision.autocast():
                logprobs, entropy, values = actor_critic(*tokens, trunk, part.num_continuations)
            terms = [logprobs.sum(), *([] if values is None else [values.sum()])]
            return sum(terms) + (entropy.sum() if recipe.ppo.entropy_coef else 0.0)

        yield self._update(loss, len(part.rows) * self.response_length, True, stored)

    def _update(
        self, loss: Callable[[], Tensor], num_positions: int, has_head: bool, stored: int = 0
    ) -> Phase:
        """Measure a micro-batch after the first of a step: there are gradients already."""
        trained = [weight for model in self.models.trained.values() for weight in model.parameters()]
        for weight in trained:
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        with self.dry.measured() as used:
            loss().backward()
        for weight in trained:
            weight.grad = None
        logits = self._logits(num_positions, backward=True) if has_head else 0
        return Phase("update", used.peak + stored, logits=logits, with_gradients=True)

    def _rollout(self, name: str, num_rows: int, together: int, response_length: int) -> Phase:
        """Measure sampling up to the first token.

        With resets, and where states within a rollout are continued (vine), a context may have all of a response but a
        token.
        """
        policy, query_length = self.models.trained["policy"], self.query_length
        reset = getattr(self.recipe, "reset", None)
        resets = reset is not None and (reset.proportion > 0 or self.recipe.advantage.estimator == "vine")
        alike = 1 if resets else together  # equal contexts are computed once
        contexts = [
            [1 + row // alike] * length for row, length in enumerate(self._query_lengths(num_rows, alike))
        ]
        budgets = [response_length] * num_rows
        capacity = query_length + response_length
        if resets:
            contexts[0], budgets[0] = [1] * (capacity - 1), 1
            capacity += response_length - 1
        cache = self._cache_bytes(num_rows, capacity)
        rollout = getattr(self.recipe, "rollout", None)
        if rollout is not None and rollout.engine == "vllm":
            if rollout.vllm.urls:
                return Phase(name, 0)
            given = rollout.vllm.kv_cache_gib
            plain, element = unwrap_peft(policy), 2 if self.precision.bf16 else 4
            packed = packed_sizes(plain)
            copy = element * sum(packed.get(id(weight), weight.numel()) for weight in plain.parameters())
            return Phase(name, copy, cache=cache if given is None else int(given * 2**30))
        vocabulary = Vocabulary(PAD, range(10**9), SUPPRESSED)  # any token ends a row
        uniforms = torch.zeros(num_rows, response_length, dtype=torch.float64)
        sampling = SamplingConfig(temperature=1.0)
        fold = rollout is not None and rollout.fold_lora
        with (
            self.dry.measured() as used,
            self.precision.autocast(),
            folded(policy) if fold else nullcontext(),
        ):
            sample(policy, contexts, budgets, uniforms, sampling, vocabulary, num_rows)
        return Phase(name, max(0, used.peak - cache), cache=cache, gathers_policy=True)

    def _cache_bytes(self, num_rows: int, capacity: int) -> int:
        causal_lm = unwrap_peft(self.models.trained["policy"])
        ids, was_training = torch.ones(num_rows, 1, dtype=torch.long), causal_lm.training
        causal_lm.eval()
        with torch.no_grad(), self.dry.measured() as used, self.precision.autocast():
            cache = decode_cache(causal_lm.config, capacity)
            causal_lm.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        causal_lm.train(was_training)
        return used.left

    def _reward(self, num_rows: int, stored: int) -> Phase:
        """Measure the reward models, which score one after the other."""
        batch, peaks = self._batch(num_rows), []
        for name in reward_model_names(self.recipe):
            with self.dry.measured() as used, torch.no_grad(), self.precision.frozen_autocast():
                self.models.frozen[name].score(batch)
            peaks.append(used.peak)
        return Phase("reward", max(peaks) + stored)

    def _trunk(self, batch: PaddedBatch) -> Tensor:
        with self.precision.autocast():
            return trunk_output(self.models.trained["policy"], batch)

    def _logits(self, num_positions: int, backward: bool) -> int:
        """Measure the logits of one chunk alone, a part of the activations."""
        head = unwrap_peft(self.models.trained["policy"]).get_output_embeddings()
        size = min(num_positions, CHUNK)
        hidden = torch.zeros(size, head.weight.shape[1], dtype=head.weight.dtype, requires_grad=backward)
        ids = torch.zeros(size, dtype=torch.long)
        with self.dry.measured() as used, torch.set_grad_enabled(backward), self.precision.autocast():
            scores = chunked_scores(head, hidden, ids, size)
            if backward:
                torch.autograd.grad(scores.logprobs.sum(), hidden)
        return used.peak

    def _rollouts(self) -> Rollouts:
        size = self.recipe.rollout.batch_size
        models = list(self.models.trained.values())
        together = rollouts_together(self.recipe, self.query_length, models)
        per_prompt = self.recipe.rollout.rollouts_per_prompt
        batch = self._batch(size, per_prompt)
        zeros = torch.zeros(size, dtype=torch.long)
        return Rollouts(
            **vars(batch),
            reset_lengths=zeros,
            source_lengths=zeros,
            ended=zeros.bool(),
            scores=zeros,
            rollouts_together=together,
        )

    def _batch(self, num_rows: int, together: int = 1) -> PaddedBatch:
        queries = [[1] * length for length in self._query_lengths(num_rows, together)]
        return pad_batch(queries, [[1] * self.response_length] * num_rows, PAD)

    def _query_lengths(self, num_rows: int, together: int = 1) -> list[int]:
        """Return the longest length for the first prompt and one less for the others, so that rows have padding."""
        length = self.query_length
        return [length if row < together else max(1, length - 1) for row in range(num_rows)]


def _item(recipe: OfflineRecipe, response_length: int, query_length: int) -> object:
    """Make an item of the recipe's objective with these lengths."""
    query, response = [1] * query_length, [1] * response_length
    example = Example(Record(prompt=""), query, response, response, response)
    match recipe:
        case RewardModelRecipe():
            return Ranking(query, [response, response], [(0, 1, 0.0)], [0, 1])
        case PreferenceRecipe(loss=loss) if loss.name == "kto":
            return LabelledResponse(example, True, response)
        case PreferenceRecipe():
            return Pair(example)
    return example


def _objective(recipe: OfflineRecipe, models: StageModels) -> Objective:
    device, (model,) = torch.device("cpu"), models.trained.values()
    match recipe:
        case RewardModelRecipe():
            head = models.frozen.get("output embedding")
            return RewardObjective(model, PAD, recipe.loss, recipe.score.penalty, device, head)
        case SFTRecipe():
            return SFTObjective(model, PAD, recipe.loss_on, device)
        case PreferenceRecipe():
            options = {"reference": models.reference, "pad_id": PAD, "device": device}
            if recipe.loss.name == "kto":
                return UnpairedObjective(model, recipe.loss, **options)
            return PairObjective(model, recipe.loss, share_prompts=recipe.share_prompts, **options)
    raise TypeError(f"{type(recipe).__name__} is not the recipe of an offline stage")
