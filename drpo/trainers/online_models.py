"""Load, prepare and check the models of an online run: policy, critic and reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from drpo.config import ConfigError
from drpo.data.load import Splits
from drpo.engine import Engine
from drpo.models.actor_critic import ActorCritic
from drpo.models.frozen_weights import share_frozen
from drpo.models.inputs import unwrap_peft
from drpo.models.loading import fresh_critic, load_critic, load_policy
from drpo.models.policy_stops import check_stop_token, stop_ids
from drpo.models.positions import check_sampling
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import adapter_disabled
from drpo.models.shared_prompt import continuation_logprobs, packed_states, shares_rows
from drpo.models.trunk import share_trunk
from drpo.models.vocabulary import check_same_texts, check_trained_alike
from drpo.optim import build_optimizer
from drpo.random_streams import SeedOffset
from drpo.rewards import BoundedRewardFn, RewardFn, SharingRewardFn
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.starts import Start
from drpo.rollout.trajectory import Rollouts, Trajectory
from drpo.rollout.vllm_engine import VLLMEngine
from drpo.rollout.vllm_servers import VLLMServers
from drpo.run.folder import RunFolder
from drpo.tensors import PaddedBatch
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.ppo_update import PPOConfig, minibatches
from drpo.trainers.reference import AdapterOff, FrozenCopy, can_share_trunk


@dataclass(frozen=True)
class OnlineModels:
    """The models of an online run."""

    engine: Engine
    actor_critic: ActorCritic
    prepared: nn.Module
    "The actor-critic wrapped by the engine, for forwards with gradients."
    generator: Generator
    reference_logprobs: Callable[..., Tensor]
    "Takes a batch, the output of the frozen trunk, if there is one, and the number of blocks with the same queries."
    notes: list[str]
    "Warnings for the user."
    reference_copy: nn.Module | None = None
    "The reference's own weights, which forwards need on the device; None under LoRA."
    rollouts_together: int = 1
    "Rollouts of a prompt that policy, critic and reference can score with one forward over it."

    @torch.no_grad()
    def measure(self, rollouts: Rollouts, config: PPOConfig, draw: tuple[int, int]) -> Trajectory:
        """Measure log-probs, entropy, values and reference log-probs of rollouts that all processes hold in full.

        The forwards are those of the update's first epoch: the same micro-batches, on the same processes, by the same
        module. The first probability ratio of the update is then exactly 1.
        """
        engine, columns = self.engine, {}
        first_epoch = itertools.islice(
            minibatches(rollouts, config, engine.world_size, draw), config.num_minibatches
        )
        own_parts = [part for parts in first_epoch for part in parts[engine.rank :: engine.world_size]]
        with self.reference_present():
            for part in own_parts:
                for name, numbers in self._measure(*rollouts.select(part), part.num_continuations).items():
                    if name not in columns:
                        columns[name] = torch.zeros(rollouts.responses.shape, device=engine.device)
                    columns[name][part.rows, : part.response_length] = numbers.float()
        measurements = {name: engine.sum(column) for name, column in columns.items()}
        return Trajectory(**rollouts.columns(), **measurements)

    def _measure(self, batch: PaddedBatch, trunk: Tensor | None, num_continuations: int) -> dict[str, Tensor]:
        tokens = (batch.queries, batch.query_mask, batch.responses, batch.response_mask)
        with self.engine.autocast():
            logprobs, entropy, values = self.prepared(*tokens, trunk, num_continuations)
            ref_logprobs = self.reference_logprobs(batch, trunk, num_continuations)
        measured = {"logprobs": logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs}
        return measured if values is None else measured | {"values": values}

    def sample_initial(self, starts: Sequence[Start]) -> list[list[int]]:
        """Sample the initial policy's response to each start, by (seed, episode); the same on all processes.

        The policy that the KL is taken to, in the native engine, at the rollouts' temperature. Source: the roll-in
        policy of PPO++, Chang et al. 2024 (arXiv 2404.08495), Remark 5.1.
        """
        engine, policy = self.engine, self.generator.policy
        sampled = self.reference_copy or policy
        initial = replace(
            self.generator,
            policy=sampled,
            seed=self.generator.seed + SeedOffset.INITIAL_POLICY,
            fold_lora=False,
            vllm=None,
        )
        own = starts[engine.rank :: engine.world_size]
        frozen = adapter_disabled(policy) if self.reference_copy is None else self.reference_present()
        with initial.ready(engine), frozen, engine.autocast():
            responses = [completion.response_ids for completion in initial.respond(own)] if own else []
        numbered = zip((start.episode for start in own), responses, strict=True)
        by_episode = dict(engine.gather_objects(list(numbered)))
        return [by_episode[start.episode] for start in starts]

    def reference_present(self) -> AbstractContextManager:
        """Return a context with the reference's weights on the device."""
        return nullcontext() if self.reference_copy is None else self.engine.on_device(self.reference_copy)


def load_models(run: RunFolder, splits: Splits, tokenizer, reward_fn: RewardFn) -> OnlineModels:
    """Load and prepare policy, critic and reference, and share the policy's frozen trunk with the reward model.

    Raises ConfigError for models that do not fit each other, the data or the settings.
    """
    recipe, engine, rollout = run.recipe, run.engine, run.recipe.rollout
    policy = load_policy(recipe.model, tokenizer, recipe.seed)
    check_stop_token(policy, tokenizer)
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size, stop_ids(policy), rollout.bad_tokens)
    critic = _load_critic(recipe, policy, tokenizer) if recipe.advantage.needs_critic else None
    actor_critic = ActorCritic(
        policy,
        critic,
        temperature=rollout.sampling.temperature,
        suppressed_ids=vocabulary.suppressed_ids,
        entropy_gradient=recipe.ppo.entropy_coef > 0,
    )
    engine.hold_frozen(actor_critic)
    if critic is not None:
        share_frozen(critic, policy)
    if not engine.partitions_weights:
        actor_critic.to(engine.device)
    if isinstance(reward_fn, SharingRewardFn):
        reward_fn.share_weights(policy, critic)
    notes = [*_check_positions(recipe, splits, policy, critic, reward_fn), *_notes_on_groups(recipe)]
    groups = [module.parameters() for module in (policy, critic) if module is not None]
    optimizer = build_optimizer(groups, recipe.optim, engine.casts_weights)
    prepared = engine.prepare(actor_critic, optimizer)
    reference = _reference(run, tokenizer, policy)
    score = functools.partial(
        continuation_logprobs,
        temperature=rollout.sampling.temperature,
        suppressed_ids=vocabulary.suppressed_ids,
    )

    def reference_logprobs(
        batch: PaddedBatch, trunk: Tensor | None = None, num_continuations: int = 1
    ) -> Tensor:
        trunk = packed_states(trunk, batch, num_continuations)
        return reference.apply(score, batch, num_continuations, trunk=trunk).logprobs

    vllm = None
    if rollout.engine == "vllm":
        longest = max(len(example.query_ids) for example in [*splits.train, *splits.eval])
        max_tokens = longest + rollout.max_response_length
        sizes = (vocabulary, rollout.generation_batch_size, max_tokens)
        if rollout.vllm.urls:
            run.say(f"rollouts by {', '.join(rollout.vllm.urls)}, when they are up")
            vllm = VLLMServers(rollout.vllm, engine, *sizes)
        else:
            vllm = VLLMEngine(rollout.vllm, engine, policy, *sizes)
    generator = Generator(
        policy,
        tokenizer,
        vocabulary,
        rollout.sampling,
        rollout.max_response_length,
        rollout.generation_batch_size,
        recipe.seed,
        rollout.fold_lora,
        vllm,
    )
    longest = max(len(example.query_ids) for example in splits.train)
    together = rollouts_together(
        recipe, longest, [module for module in (policy, critic) if module is not None]
    )
    copy = reference.module if isinstance(reference, FrozenCopy) else None
    return OnlineModels(
        engine, actor_critic, prepared, generator, reference_logprobs, notes, copy, rollouts_together=together
    )


def rollouts_together(recipe: OnlineRecipe, longest_query: int, models: Sequence[nn.Module]) -> int:
    """Return the rollouts of a prompt, or 1 where a model must score them as separate rows.

    ZeRO-3: all processes must call the same modules, so the choice is made once, for the longest row that can come.
    """
    num_rollouts = recipe.rollout.rollouts_per_prompt
    if num_rollouts == 1 or not recipe.ppo.share_prompts:
        return 1
    longest = longest_query + num_rollouts * recipe.rollout.max_response_length
    return num_rollouts if all(shares_rows(model, longest) for model in models) else 1


def _load_critic(recipe: OnlineRecipe, policy, tokenizer) -> ScalarModel:
    path, chat, arguments = recipe.critic.path, recipe.data.chat_template, recipe.data.chat_template_kwargs
    if path is None:
        critic = fresh_critic(policy, recipe.model, recipe.seed)
    else:
        check_same_texts(tokenizer, path, "critic.path", chat)
        check_trained_alike(path, "critic.path", chat, arguments)
        critic = load_critic(path, recipe.model, recipe.seed, policy)
    texts = {"chat_template": chat, "chat_template_kwargs": dict(arguments)}
    unwrap_peft(critic).config.update(texts)  # for runs that start from this critic
    return critic


def _notes_on_groups(recipe: OnlineRecipe) -> list[str]:
    """Return a warning if an estimator compares rollouts that start from different states."""
    if not (recipe.advantage.compares_group and recipe.reset.proportion and recipe.reset.per == "rollout"):
        return []
    return [
        f"advantage.estimator={recipe.advantage.estimator} compares rollouts of a prompt that start from different "
        "prefixes, so the baseline says little; reset.per=prompt lets them share one"
    ]


def _check_positions(
    recipe: OnlineRecipe, splits: Splits, policy, critic: ScalarModel | None, reward_fn: RewardFn
) -> list[str]:
    """Raise ConfigError for texts beyond a model's positions; return warnings where rotary ones have no end."""
    examples, length = [*splits.train, *splits.eval], recipe.rollout.max_response_length
    longest = max(len(example.query_ids) for example in examples) + length
    limit = reward_fn.max_tokens if isinstance(reward_fn, BoundedRewardFn) else None
    if limit is not None and longest > limit:
        place = f"reward.{recipe.reward.kind}" if recipe.reward.kind else "the reward"
        raise ConfigError(
            f"{place}: prompts and responses take up to {longest} tokens, and the reward model has {limit} "
            f"positions; set data.max_prompt_length, or lower rollout.max_response_length={length}"
        )
    key = "rollout.max_response_length"
    if critic is not None and recipe.critic.path is not None:
        check_sampling(critic, examples, length, "critic.path", key)
    return check_sampling(policy, examples, length, "model.path", key)


def _reference(run: RunFolder, tokenizer, policy: nn.Module) -> AdapterOff | FrozenCopy:
    """Return the initial policy: the base weights under LoRA, else a copy, which shares a frozen trunk if it can."""
    model, offload = run.recipe.model, run.recipe.kl.offload_reference
    if model.lora.r:
        return AdapterOff(policy)
    copy = run.engine.place(load_policy(model, tokenizer, run.recipe.seed), as_trained=True, on_host=offload)
    shares_trunk = can_share_trunk(policy, run.engine.partitions_weights)
    reference = FrozenCopy(copy, shares_trunk)
    if shares_trunk:
        share_trunk(copy, policy)
    else:
        run.engine.partition(reference.scored, offload)
    return reference
