"""Train online: PPO from dataset resets (DR-PO, arXiv 2404.08495, Algorithm 1). PPO is reset.proportion=0.

Each step: draw prompts and resets, roll out, score, assign credit, update. All processes hold the whole batch
after the rollout, so statistics are global and the result does not depend on how many processes there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.data.load import Splits, load_examples
from drpo.data.stop import with_stop_token
from drpo.engine import Engine
from drpo.kl import kl_per_token
from drpo.models.actor_critic import ActorCritic
from drpo.models.loading import fresh_critic, load_critic, load_policy
from drpo.models.positions import check_sampling
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import response_logprobs
from drpo.models.stops import check_stop_token, stop_ids
from drpo.models.tokenizer import load_tokenizer
from drpo.models.vocabulary import check_same_texts, check_trained_alike
from drpo.optim import build_optimizer, scheduled_rate, set_learning_rates
from drpo.rewards import BoundedRewardFn, RewardFn, RunningMoments, TrunkRewardFn
from drpo.rollout.collect import Measured, Measurement, collect
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.held_out import Held, evaluate
from drpo.rollout.resets import check_resets
from drpo.rollout.samples import rollout_samples
from drpo.rollout.starts import draw_starts
from drpo.run.checkpoints import list_checkpoints, step_of
from drpo.run.folder import Callback, RunFolder, RunStopped
from drpo.run.metrics import Phases, peak_memory_gib
from drpo.run.result import Result
from drpo.tensors import PaddedBatch
from drpo.trainers.credit import assign_credit
from drpo.trainers.finite import finite_or_stop
from drpo.trainers.online_metrics import SHOWN, online_metrics
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.ppo_update import ppo_update
from drpo.trainers.reference import policy_as_it_starts

POLICY_GROUP = 0  # the optimizer's parameter groups: policy, critic


def train(
    recipe: OnlineRecipe,
    engine: Engine,
    reward_fn: RewardFn,
    eval_rewards: Mapping[str, RewardFn],
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Run the recipe and return the folder of the final policy.

    `reward_fn` scores rollouts; `eval_rewards` are further scores of the held-out completions, by name.
    Raises CheckpointError when run_dir holds another run, FloatingPointError on inf or nan, RunStopped when
    the KL passes kl.max_per_token with kl.on_max=stop.
    """
    run = RunFolder(recipe, engine, callbacks)
    key = "model.path" if recipe.model.tokenizer is None else "model.tokenizer"
    tokenizer = with_stop_token(load_tokenizer(recipe.tokenizer_path, key), recipe.data)
    splits = load_examples(recipe.data, tokenizer, "prompts")
    run.say_data(splits.report)
    _check(recipe, engine, splits, tokenizer)

    policy = load_policy(recipe.model, tokenizer, recipe.seed)
    check_stop_token(policy, tokenizer)
    vocabulary = vocabulary_of(
        tokenizer, policy.config.vocab_size, stop_ids(policy), recipe.rollout.bad_tokens
    )
    actor_critic = ActorCritic(
        policy,
        _load_critic(recipe, policy, tokenizer) if recipe.advantage.needs_critic else None,
        temperature=recipe.rollout.sampling.temperature,
        suppressed_ids=vocabulary.suppressed_ids,
        entropy_gradient=recipe.ppo.entropy_coef > 0,
    )
    if isinstance(reward_fn, TrunkRewardFn):
        reward_fn.share_trunk(policy)
    for note in _check_positions(recipe, splits, policy, actor_critic.critic, reward_fn):
        run.say(note)
    trained = [module for module in (policy, actor_critic.critic) if module is not None]
    optimizer = build_optimizer(
        [module.parameters() for module in trained], recipe.optim, engine.casts_weights
    )
    model = engine.prepare(actor_critic, optimizer)
    reference_logprobs = _reference(recipe, engine, tokenizer, policy, vocabulary.suppressed_ids)
    generator = Generator(
        policy,
        tokenizer,
        vocabulary,
        recipe.rollout.sampling,
        recipe.rollout.max_response_length,
        recipe.rollout.generation_batch_size,
        recipe.seed,
    )

    controller, running = recipe.kl.controller(), RunningMoments()
    start_step, num_rollbacks, rolled_back = 0, 0, False
    if state := run.open():
        start_step, num_rollbacks, rolled_back = (state[k] for k in ("step", "num_rollbacks", "rolled_back"))
        controller.load_state_dict(state["kl"])
        running.load_state_dict(state["running"])

    @torch.no_grad()
    def measure(batch: PaddedBatch, trunk: Tensor | None) -> Measured:
        with engine.autocast():
            own = actor_critic(batch.queries, batch.query_mask, batch.responses, batch.response_mask, trunk)
            return Measured(*own, reference_logprobs(batch, trunk))

    def evaluate_now() -> Held:
        rewards = {"score": reward_fn, **eval_rewards}
        with engine.whole_weights(actor_critic), engine.autocast():
            return evaluate(recipe.eval, engine, generator, splits.eval, rewards, reference_logprobs)

    def trainer_state(num_rollbacks: int, rolled_back: bool) -> dict[str, Any]:
        return {
            "kl": controller.state_dict(),
            "running": running.state_dict(),
            "num_rollbacks": num_rollbacks,
            "rolled_back": rolled_back,
        }

    result = Result(recipe, engine, run, actor_critic, policy, tokenizer, splits.report, "policy")
    run.start_progress("DR-PO" if recipe.reset.proportion else "PPO", start_step, recipe.num_steps)
    if state is None and recipe.eval.every:
        metrics, rows = evaluate_now()
        run.record(0, metrics, SHOWN)
        run.write_samples(0, rows)
    if state is None and recipe.kl.max_per_token is not None and recipe.kl.on_max == "rollback":
        run.save(0, recipe.num_steps, trainer_state(0, False), always=True)
    batch_size = recipe.rollout.batch_size
    for step in range(start_step + 1, recipe.num_steps + 1):
        phases = Phases()
        check_finite = functools.partial(finite_or_stop, engine, run.path, step)
        progress = (step - 1) / recipe.num_steps
        episodes = range((step - 1) * batch_size, step * batch_size)
        starts = draw_starts(splits.train, episodes, recipe.reset, recipe.rollout, generator,
                             progress, recipe.seed)  # fmt: skip

        with engine.whole_weights(actor_critic):
            local, completions = collect(starts[engine.shard(batch_size)], generator, engine,
                                         Measurement(measure, recipe.ppo.microbatch_size),
                                         reward_fn, phases)  # fmt: skip
        check_finite(local.scores, "the reward", [c.record.origin for c in completions])
        trajectory = local.map(engine.gather_rows)

        credit = assign_credit(trajectory, recipe.reward.shaping, recipe.kl, controller.coef,
                               recipe.advantage, recipe.reset.masking, running,
                               recipe.rollout.rollouts_per_prompt)  # fmt: skip
        metrics = online_metrics(trajectory, credit, controller.coef)

        limit = recipe.kl.max_per_token
        if limit is None or metrics["objective/kl_k3_per_token"] <= limit:
            rates = _learning_rates(recipe, step)
            set_learning_rates(engine.optimizer, rates)
            with phases("update"):
                update = ppo_update(engine, model, trajectory, credit, recipe.ppo,
                                    train_policy=step > recipe.critic.pretrain_steps,
                                    seed=recipe.seed, step=step, check_finite=check_finite)  # fmt: skip
            if step <= recipe.critic.pretrain_steps:
                # Steps of size 0 count for Adam too: the policy's first real ones would be several times too large.
                engine.reset_optimizer(group=POLICY_GROUP)
            metrics |= {f"ppo/{name}": value for name, value in update.items()}
            names = ("optim/policy_learning_rate", "optim/critic_learning_rate")
            metrics |= dict(zip(names, rates, strict=False))
            kl = kl_per_token(trajectory.logprobs, trajectory.ref_logprobs, trajectory.action_mask,
                              recipe.kl.estimator)  # fmt: skip
            controller.update(float(kl), batch_size)
            rolled_back = False
        else:
            _roll_back(recipe, engine, run, step, metrics, again=rolled_back)
            num_rollbacks += 1
            rolled_back = True
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
        result.at_step(step)
        run.save(step, recipe.num_steps, trainer_state(num_rollbacks, rolled_back))

    return result.finish()


def _check(recipe: OnlineRecipe, engine: Engine, splits: Splits, tokenizer) -> None:
    """Refuse what could only fail later: rows that do not divide, or data without the reset source."""
    minibatch = recipe.rollout.batch_size // recipe.ppo.num_minibatches
    if minibatch % engine.world_size:
        raise ConfigError(
            f"a minibatch has {minibatch} rows (rollout.batch_size / ppo.num_minibatches), which do not divide "
            f"over {engine.world_size} processes"
        )
    if recipe.reset.proportion > 0:
        check_resets(splits.train, recipe.reset, recipe.rollout.max_response_length, tokenizer)


def _check_positions(
    recipe: OnlineRecipe, splits: Splits, policy, critic: ScalarModel | None, reward_fn: RewardFn
) -> list[str]:
    """Refuse prompts and responses that are longer than a model has positions; warnings where rotary ones go on."""
    examples, length = [*splits.train, *splits.eval], recipe.rollout.max_response_length
    longest = max(len(example.query_ids) for example in examples) + length
    limit = reward_fn.max_tokens if isinstance(reward_fn, BoundedRewardFn) else None
    if limit is not None and longest > limit:
        raise ConfigError(
            f"reward.path: prompts and responses take up to {longest} tokens, and the reward model has {limit} "
            f"positions; set data.max_prompt_length, or lower rollout.max_response_length={length}"
        )
    key = "rollout.max_response_length"
    if critic is not None and recipe.critic.path is not None:
        check_sampling(critic, examples, length, "critic.path", key)
    return check_sampling(policy, examples, length, "model.path", key)


def _load_critic(recipe: OnlineRecipe, policy, tokenizer) -> ScalarModel:
    if recipe.critic.path is None:
        return fresh_critic(policy, recipe.model, recipe.seed)
    chat, arguments = recipe.data.chat_template, recipe.data.chat_template_kwargs
    check_same_texts(tokenizer, recipe.critic.path, "critic.path", chat)
    check_trained_alike(recipe.critic.path, "critic.path", chat, arguments)
    return load_critic(recipe.critic.path, recipe.model, recipe.seed, policy)


def _reference(
    recipe: OnlineRecipe, engine: Engine, tokenizer, policy, suppressed_ids: tuple[int, ...]
) -> Callable[..., Tensor]:
    """Log-probs under the policy as it was: of a batch and, where there is one, the output of the frozen trunk."""
    reference = policy_as_it_starts(recipe.model, engine, tokenizer, policy, recipe.seed)
    score = functools.partial(
        response_logprobs, temperature=recipe.rollout.sampling.temperature, suppressed_ids=suppressed_ids
    )

    def logprobs(batch: PaddedBatch, trunk: Tensor | None = None) -> Tensor:
        return reference.apply(score, batch, trunk=trunk).logprobs

    return logprobs


def _learning_rates(recipe: OnlineRecipe, step: int) -> tuple[float, ...]:
    """Learning rates of policy and, if there is one, critic at `step` (1-based).

    The policy's is 0 during critic pretraining, and its schedule, warm-up included, runs over the steps after it.
    """
    if not recipe.advantage.needs_critic:
        return (scheduled_rate(recipe.optim.learning_rate, recipe.optim, step - 1, recipe.num_steps),)
    critic_peak = recipe.critic.learning_rate or recipe.optim.learning_rate
    critic_rate = scheduled_rate(
        critic_peak, recipe.optim, step - 1, recipe.num_steps, warmup_steps=recipe.critic.warmup_steps
    )
    alone = recipe.critic.pretrain_steps
    if step <= alone:
        return 0.0, critic_rate
    args = (recipe.optim, step - 1 - alone, recipe.num_steps - alone)
    return scheduled_rate(recipe.optim.learning_rate, *args), critic_rate


def _roll_back(
    recipe: OnlineRecipe, engine: Engine, run: RunFolder, step: int, metrics: dict[str, float], again: bool
) -> None:
    """Back to the last weights whose KL was below the limit; RunStopped when that is not wanted or did not help."""
    checkpoints = engine.from_main(list_checkpoints(run.path))
    # The weights after step-1 are those found too far away: a checkpoint from before them is needed.
    earlier = [folder for folder in checkpoints if step_of(folder) < step - 1]
    message = (
        f"step {step}: KL to the reference is {metrics['objective/kl_k3_per_token']:.3g} nats per sampled token, "
        f"above kl.max_per_token={recipe.kl.max_per_token:g}"
    )
    if recipe.kl.on_max == "stop" or again or not earlier:
        run.record(step, metrics, SHOWN)
        reason = ""
        if recipe.kl.on_max == "rollback":
            missing = f"; no checkpoint from before step {step - 1} is left, see checkpoint.every and checkpoint.keep"
            reason = "; going back did not help" if again else missing
        raise RunStopped(
            f"{message}{reason}. Last checkpoint: {checkpoints[-1] if checkpoints else 'none'}. "
            "Raise kl.coef or lower optim.learning_rate"
        )
    run.say(f"{message}: back to the weights of {earlier[-1]}")
    engine.load_state(earlier[-1])


def _speed(engine: Engine, phases: Phases, trajectory) -> dict[str, float]:
    seconds = phases.seconds()
    num_tokens = float(trajectory.action_mask.sum())
    return seconds | {
        "perf/episodes_per_second": len(trajectory.scores) / seconds["time/step"],
        "perf/sampled_tokens_per_second": num_tokens / seconds["time/step"],
        "perf/peak_memory_gib": peak_memory_gib(engine.device),
    }
