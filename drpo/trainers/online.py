"""The online loop: PPO from dataset resets (DR-PO, arXiv 2404.08495, Algorithm 1). PPO is reset.proportion=0.

Each step: draw prompts and resets, roll out, score, assign credit, update. All processes hold the whole batch
after the rollout, so statistics are global and the result does not depend on how many processes there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drpo.checkpoints import list_checkpoints
from drpo.data.load import DataConfig, Splits, load_examples
from drpo.engine import Engine, EngineConfig
from drpo.metrics import Phases
from drpo.model_card import model_card
from drpo.models.actor_critic import ActorCritic
from drpo.models.export import save_policy
from drpo.models.loading import ModelConfig, fresh_critic, load_policy, load_scalar_model, load_tokenizer
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import adapter_disabled, response_logprobs
from drpo.optim import OptimConfig, build_optimizer, scheduled_rate, set_learning_rates
from drpo.rewards import RewardFn, RunningMoments
from drpo.rollout.collect import RolloutConfig, collect, draw_starts, vocabulary_of
from drpo.rollout.evaluate import EvalConfig, evaluate
from drpo.rollout.resets import ResetConfig, reset_response
from drpo.run_folder import CheckpointConfig, LogConfig, Resume, RunFolder, finite_or_stop
from drpo.samples import rollout_samples
from drpo.tensors import PaddedBatch
from drpo.trainers.credit import AdvantageConfig, KLConfig, ShapingConfig, assign_credit, episode_kl
from drpo.trainers.online_metrics import SHOWN, online_metrics
from drpo.trainers.ppo_update import PPOConfig, ppo_update


@dataclass(frozen=True)
class CriticConfig:
    """Where the critic comes from and how it learns."""

    path: str | None = None
    """Reward model (or *ForSequenceClassification folder) to start from; null: the policy with a fresh head."""
    learning_rate: float | None = None
    """Peak learning rate of the critic; null takes optim.learning_rate."""
    warmup_steps: int | None = None
    """Learning-rate warm-up of the critic; null takes optim.warmup_steps."""
    pretrain_steps: int = 0
    """First steps in which the critic alone learns."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"critic.learning_rate must be > 0 or null, got {self.learning_rate}")
        if self.pretrain_steps < 0:
            raise ValueError(f"critic.pretrain_steps must be >= 0, got {self.pretrain_steps}")


@dataclass(frozen=True)
class RewardConfig:
    """What scores the rollouts: a reward model or a Python callable."""

    path: str | None = None
    """Folder or hub id of a reward model."""
    function: str | None = None
    """Python callable as module:function; it gets a list of drpo.rewards.Completion and returns one number each."""
    batch_size: int = 32
    """Rows per forward of the reward model on one device."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """What happens to the score before training."""

    def __post_init__(self) -> None:
        if self.path is not None and self.function is not None:
            raise ValueError("give reward.path or reward.function, not both")


@dataclass(frozen=True)
class OnlineRecipe:
    """Everything that decides an online run."""

    run_dir: str = "runs/drpo"
    """Folder of the run."""
    seed: int = 0
    """Seed of all randomness."""
    num_steps: int = 1953
    """Updates; each takes rollout.batch_size rollouts."""
    resume: Resume = "auto"
    """auto: go on from the last checkpoint in run_dir, if any. restart: move an earlier run aside."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    reset: ResetConfig = field(default_factory=ResetConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.rollout.batch_size % self.ppo.num_minibatches:
            raise ValueError(
                f"ppo.num_minibatches ({self.ppo.num_minibatches}) must divide "
                f"rollout.batch_size ({self.rollout.batch_size})"
            )


def train(
    recipe: OnlineRecipe, engine: Engine, reward_fn: RewardFn, eval_rewards: Mapping[str, RewardFn]
) -> Path:
    """Run the recipe and return the folder of the final policy.

    `reward_fn` scores rollouts; `eval_rewards` are further scores of the held-out completions, by name.
    Raises CheckpointError when run_dir holds another run, FloatingPointError on inf or nan, RuntimeError when
    the KL passes kl.max with kl.on_max=stop.
    """
    run = RunFolder(recipe, engine, recipe.checkpoint, recipe.log)
    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.path)
    splits = load_examples(recipe.data, tokenizer, "prompts")
    run.say(splits.report)
    _check(recipe, engine, splits)

    policy = load_policy(recipe.model, tokenizer, recipe.seed)
    vocabulary = vocabulary_of(recipe.rollout, tokenizer, policy.config.vocab_size)
    actor_critic = ActorCritic(
        policy,
        _load_critic(recipe, policy),
        temperature=recipe.rollout.sampling.temperature,
        suppressed_ids=vocabulary.suppressed_ids,
    )
    optimizer = build_optimizer([policy.parameters(), actor_critic.critic.parameters()], recipe.optim)
    model = engine.prepare(actor_critic, optimizer)
    reference_logprobs = _reference(recipe, engine, tokenizer, policy, vocabulary.suppressed_ids)

    controller, running = recipe.kl.controller(), RunningMoments()
    start_step, num_rollbacks = 0, 0
    if state := run.open():
        start_step, num_rollbacks = state["step"], state["num_rollbacks"]
        controller.load_state_dict(state["kl"])
        running.load_state_dict(state["running"])

    @torch.no_grad()
    def measure(batch: PaddedBatch) -> tuple[Tensor, Tensor, Tensor]:
        with engine.autocast():
            return actor_critic(batch.queries, batch.query_mask, batch.responses, batch.response_mask)

    def evaluate_now() -> tuple[dict[str, float], list[dict[str, Any]]]:
        with engine.whole_weights(actor_critic), engine.autocast():
            return evaluate(
                recipe.eval,
                engine,
                policy=policy,
                reference_logprobs=reference_logprobs,
                examples=splits.eval,
                rewards={"score": reward_fn, **eval_rewards},
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                rollout=recipe.rollout,
                seed=recipe.seed,
            )

    run.start_progress("DR-PO" if recipe.reset.proportion else "PPO", start_step, recipe.num_steps)
    if start_step == 0 and recipe.eval.every:
        metrics, rows = evaluate_now()
        run.record(0, metrics, SHOWN)
        run.write_samples(0, rows)
    batch_size = recipe.rollout.batch_size
    for step in range(start_step + 1, recipe.num_steps + 1):
        phases = Phases()
        progress = (step - 1) / recipe.num_steps
        episodes = range((step - 1) * batch_size, step * batch_size)
        starts = draw_starts(
            splits.train, episodes, recipe.reset, recipe.rollout, tokenizer, progress, recipe.seed
        )
        query_length = max(len(start.example.query_ids) for start in starts)
        with engine.whole_weights(actor_critic):
            local, completions = collect(
                starts[engine.shard(batch_size)],
                policy=policy,
                measure=measure,
                reference_logprobs=reference_logprobs,
                reward_fn=reward_fn,
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                rollout=recipe.rollout,
                microbatch_size=recipe.ppo.microbatch_size,
                query_length=query_length,
                common_length=lambda longest: int(engine.max(longest)),
                autocast=engine.autocast,
                device=engine.device,
                seed=recipe.seed,
                phases=phases,
            )
        check_finite = functools.partial(finite_or_stop, engine, run.path, step)
        check_finite(local.scores, "the reward", [c.record.origin for c in completions])
        trajectory = local.map(engine.gather_rows)

        credit = assign_credit(
            trajectory, recipe.reward.shaping, recipe.kl, controller.coef, recipe.advantage,
            recipe.reset.masking, running,
        )  # fmt: skip
        kl = float(episode_kl(trajectory, "k3").mean())
        metrics = online_metrics(trajectory, credit, controller.coef)
        if recipe.kl.max is not None and kl > recipe.kl.max:
            _leave_or_roll_back(recipe, engine, run, step, kl)
            num_rollbacks += 1
        else:
            rates = _learning_rates(recipe, step)
            set_learning_rates(engine.optimizer, rates)
            with phases("update"):
                update = ppo_update(
                    engine, model, trajectory, credit, recipe.ppo,
                    train_policy=step > recipe.critic.pretrain_steps,
                    seed=recipe.seed, step=step, check_finite=check_finite,
                )  # fmt: skip
            metrics |= {f"ppo/{name}": value for name, value in update.items()}
            metrics |= {"optim/policy_learning_rate": rates[0], "optim/critic_learning_rate": rates[1]}
            controller.update(float(episode_kl(trajectory, recipe.kl.estimator).mean()), batch_size)
        metrics["safety/num_rollbacks"] = float(num_rollbacks)

        rows = []
        if recipe.log.samples_every and (step % recipe.log.samples_every == 0 or step == 1):
            rows += rollout_samples(local, completions, tokenizer, recipe.log.num_samples)
        if recipe.eval.every and (step % recipe.eval.every == 0 or step == recipe.num_steps):
            with phases("eval"):
                eval_metrics, eval_rows = evaluate_now()
            metrics |= eval_metrics
            rows += eval_rows
        metrics |= _speed(engine, phases, trajectory)
        run.write_samples(step, rows)
        run.record(step, metrics, SHOWN)
        run.advance()
        run.save(
            step,
            recipe.num_steps,
            {"kl": controller.state_dict(), "running": running.state_dict(), "num_rollbacks": num_rollbacks},
        )

    with engine.whole_weights(actor_critic):
        if engine.is_main:
            card = model_card(recipe, splits.report, run.metrics.path)
            save_policy(policy, tokenizer, run.path / "policy", card)
    engine.barrier()
    run.close()
    return run.path / "policy"


def _check(recipe: OnlineRecipe, engine: Engine, splits: Splits) -> None:
    """Refuse what could only fail later: rows that do not divide, or data without the reset source."""
    minibatch = recipe.rollout.batch_size // recipe.ppo.num_minibatches
    if minibatch % engine.world_size:
        raise ValueError(
            f"a minibatch has {minibatch} rows (rollout.batch_size / ppo.num_minibatches), which do not divide "
            f"over {engine.world_size} processes"
        )
    if recipe.reset.proportion > 0:
        for example in splits.train:
            reset_response(example, recipe.reset.source)


def _load_critic(recipe: OnlineRecipe, policy) -> ScalarModel:
    if recipe.critic.path is None:
        return fresh_critic(policy, recipe.model, recipe.seed)
    return load_scalar_model(recipe.critic.path, recipe.model, seed=recipe.seed)


def _reference(
    recipe: OnlineRecipe, engine: Engine, tokenizer, policy, suppressed_ids: tuple[int, ...]
) -> Callable[[PaddedBatch], Tensor]:
    """Log-probs under the policy as it was: the base weights under LoRA, else a frozen second copy."""
    score = functools.partial(
        response_logprobs, temperature=recipe.rollout.sampling.temperature, suppressed_ids=suppressed_ids
    )
    if recipe.model.lora.r:

        def with_adapter_off(batch: PaddedBatch) -> Tensor:
            with adapter_disabled(policy):
                return score(policy, batch).logprobs

        return with_adapter_off
    frozen = engine.place(load_policy(recipe.model, tokenizer, recipe.seed))
    return lambda batch: score(frozen, batch).logprobs


def _learning_rates(recipe: OnlineRecipe, step: int) -> tuple[float, float]:
    """Of the policy and the critic in step 1, 2, ..."""
    critic_peak = recipe.critic.learning_rate or recipe.optim.learning_rate
    args = (recipe.optim, step - 1, recipe.num_steps)
    return (
        scheduled_rate(recipe.optim.learning_rate, *args),
        scheduled_rate(critic_peak, *args, warmup_steps=recipe.critic.warmup_steps),
    )


def _leave_or_roll_back(recipe: OnlineRecipe, engine: Engine, run: RunFolder, step: int, kl: float) -> None:
    checkpoints = list_checkpoints(run.path)
    last = checkpoints[-1] if checkpoints else None
    message = f"step {step}: KL to the reference is {kl:.3g} nats per episode, above kl.max={recipe.kl.max:g}"
    if recipe.kl.on_max == "stop" or last is None:
        raise RuntimeError(
            f"{message}. Last checkpoint: {last or 'none'}. Raise kl.coef or lower optim.learning_rate"
        )
    run.say(f"{message}: back to the weights of {last}")
    engine.load_state(last)


def _speed(engine: Engine, phases: Phases, trajectory) -> dict[str, float]:
    seconds = phases.seconds()
    num_tokens = float(trajectory.action_mask.sum())
    return seconds | {
        "perf/episodes_per_second": len(trajectory.scores) / seconds["time/step"],
        "perf/sampled_tokens_per_second": num_tokens / seconds["time/step"],
        "perf/peak_memory_gib": engine.peak_memory_gib(),
    }
