"""Train online: PPO from dataset resets (DR-PO, arXiv 2404.08495, Algorithm 1). PPO is reset.proportion=0.

Each step: draw prompts and resets, roll out, score, assign credit, update. All processes hold the whole batch
after the rollout, so statistics are global and the result does not depend on how many processes there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drpo.data.load import Splits, load_examples
from drpo.data.stop import with_stop_token
from drpo.engine import Engine
from drpo.kl import kl_per_token
from drpo.models.tokenizer import load_tokenizer
from drpo.optim import scheduled_rate, set_learning_rates
from drpo.reward_functions import identities_of
from drpo.rewards import Completion, RewardFn, RunningMoments
from drpo.rollout.collect import collect
from drpo.rollout.further_scores import score_sources
from drpo.rollout.held_out import Held, evaluate
from drpo.rollout.resets import check_resets
from drpo.rollout.samples import rollout_samples
from drpo.rollout.starts import Start, Starts
from drpo.rollout.trajectory import Rollouts
from drpo.rollout.vine import continue_states
from drpo.rollout.vllm_requests import check_agreement
from drpo.run.checkpoints import read_trainer_state
from drpo.run.folder import Callback, RunFolder
from drpo.run.metrics import Phases, peak_memory_gib
from drpo.run.result import Result
from drpo.run.stopped import Interrupted, RunStopped
from drpo.trainers.credit import assign_credit, method_name
from drpo.trainers.drawn_resets import drawn_resets
from drpo.trainers.finite import finite_or_stop
from drpo.trainers.kl_guard import KLGuard
from drpo.trainers.online_checks import (
    check_forced_tokens,
    check_identities,
    check_launcher,
    notes_on_targets,
)
from drpo.trainers.online_metrics import SHOWN, online_metrics
from drpo.trainers.online_models import OnlineModels, load_models
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.ppo_update import UpdateSettings, ppo_update

POLICY_GROUP = 0  # the optimizer's parameter groups: policy, critic


def train(
    recipe: OnlineRecipe,
    engine: Engine,
    reward_fn: RewardFn,
    eval_rewards: Mapping[str, RewardFn],
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Run the recipe and return the folder of the final policy.

    Raises CheckpointError when run_dir holds another run, FloatingPointError on inf or nan, RunStopped when
    the KL exceeds kl.max_per_token with kl.on_max=stop.

    Args:
        recipe: all settings.
        engine: processes, devices and precision.
        reward_fn: scores rollouts and held-out completions.
        eval_rewards: further scores of the held-out completions, by name; none is named score.
        callbacks: called with step and metrics after every step.
    """
    run = RunFolder(recipe, engine, callbacks)
    key = "model.path" if recipe.model.tokenizer is None else "model.tokenizer"
    tokenizer = with_stop_token(load_tokenizer(recipe.tokenizer_path, key), recipe.data)
    splits = load_examples(recipe.data, tokenizer, "prompts")
    run.take_data(splits.report, splits.train_digest())
    check_launcher(recipe, engine.world_size, engine.partitions_weights)
    resets = (splits.train, recipe.reset, recipe.rollout.max_response_length, tokenizer)
    check_resets(*resets)  # before models are loaded, which may take long
    models = load_models(run, splits, tokenizer, reward_fn)
    check_resets(*resets, models.generator.vocabulary.stop_ids)
    check_forced_tokens(recipe, splits.train, models.generator)
    run.say(*models.notes, *notes_on_targets(recipe, splits.train, models.generator))
    state = run.open()
    loop = _Loop(run, models, splits, {"score": reward_fn, **eval_rewards})
    if state is not None:
        loop.load_state_dict(state)
    critic = models.actor_critic.critic
    result = Result(run, models.actor_critic, models.generator.policy, tokenizer, splits.report, "policy",
                    {} if critic is None else {"critic": critic})  # fmt: skip
    start_step = 0 if state is None else state["step"]
    name = method_name(recipe.advantage.estimator, recipe.reset.proportion > 0)
    run.start_progress(name, start_step, recipe.num_steps)
    try:
        if state is None:
            loop.begin()
        for step in range(start_step + 1, recipe.num_steps + 1):
            loop.step(step)
            result.at_step(step)
            run.save(step, recipe.num_steps, loop.state_dict())
    except Interrupted:  # within an evaluation, which no checkpoint can go on from
        run.leave()
    return result.finish()


class _Loop:
    """Steps of an online run, and the state between them."""

    def __init__(
        self, run: RunFolder, models: OnlineModels, splits: Splits, rewards: Mapping[str, RewardFn]
    ) -> None:
        self.run, self.recipe, self.engine = run, run.recipe, run.engine
        self.models, self.splits, self.rewards = models, splits, rewards
        self.controller, self.running = run.recipe.kl.controller(), RunningMoments()
        self.guard = KLGuard(run.recipe.kl)
        recipe = run.recipe
        self.starts = Starts(splits.train, recipe.reset, recipe.rollout, models.generator, recipe.seed,
                             models.sample_initial)  # fmt: skip
        self._identities = identities_of(rewards["score"], f"reward.{self.recipe.reward.kind or 'function'}")

    def begin(self) -> None:
        """Evaluate before the first update, and save a checkpoint if the guard may roll back to it."""
        if self.recipe.eval.every:
            metrics, samples = self.evaluate()
            self.run.record(0, metrics, SHOWN)
            self.run.write_samples(0, samples)
        if self.guard.needs_first_checkpoint:
            self.run.save(0, self.recipe.num_steps, self.state_dict(), always=True)

    def step(self, step: int) -> None:
        """Draw starts, roll out, assign credit, update (or roll back), report."""
        recipe, engine, models = self.recipe, self.engine, self.models
        phases = Phases()
        check_finite = functools.partial(finite_or_stop, engine, self.run.path, step)
        batch_size = recipe.rollout.batch_size
        episodes = range((step - 1) * batch_size, step * batch_size)
        with phases("starts"):
            starts = self.starts.draw(episodes, (step - 1) / recipe.num_steps)
        local, completions = self._roll_out(starts[engine.shard(batch_size)], step, phases, check_finite)
        with phases("score"):
            trajectory = models.measure(local.map(engine.gather_rows), recipe.ppo, (recipe.seed, step))

        kl_coef = self.controller.coef
        credit = assign_credit(trajectory, recipe.reward.shaping, recipe.kl, kl_coef, recipe.advantage,
                               recipe.reset.masking, self.running, recipe.rollout.rollouts_per_prompt)  # fmt: skip
        metrics = online_metrics(trajectory, credit, kl_coef) | self.starts.metrics()
        if recipe.reset.proportion > 0:
            self.run.write_resets(step, drawn_resets(trajectory))
        if trajectory.engine_logprobs is not None:
            check_agreement(metrics["rollout/logprob_difference"])

        if self.guard.passes(metrics):
            if recipe.reset.remembers:
                sources = trajectory.source_scores
                counts_cut_off = recipe.reward.shaping.missing_stop == "none"
                self.starts.observe(starts, trajectory.response_ids(), trajectory.scores.tolist(),
                                    (trajectory.ended | counts_cut_off).tolist(),
                                    None if sources is None else sources.tolist())  # fmt: skip
            rates = learning_rates(recipe, step)
            set_learning_rates(engine.optimizer, rates)
            with phases("update"):
                settings = UpdateSettings(
                    recipe.ppo,
                    recipe.rollout.max_response_length,
                    recipe.reset.sft_coef,
                    train_policy=step > recipe.critic.pretrain_steps,
                )
                update = ppo_update(engine, models.prepared, trajectory, credit, settings, (recipe.seed, step),
                                    check_finite)  # fmt: skip
            if step <= recipe.critic.pretrain_steps:
                # Adam counts steps of size 0 too: the policy's first real ones would be several times too large.
                engine.reset_optimizer(group=POLICY_GROUP)
            metrics |= {f"ppo/{name}": value for name, value in update.items()}
            names = ("optim/policy_learning_rate", "optim/critic_learning_rate")
            metrics |= dict(zip(names, rates, strict=False))
            kl = kl_per_token(trajectory.logprobs, trajectory.ref_logprobs, trajectory.action_mask,
                              recipe.kl.estimator)  # fmt: skip
            if step > recipe.critic.pretrain_steps:  # until then the policy is the reference
                self.controller.update(float(kl), batch_size)
        else:
            try:
                checkpoint = self.guard.roll_back(engine, self.run, step, metrics)
                state = read_trainer_state(checkpoint)
                self.starts.load_state_dict(state.get("starts", {}))
                self.running.load_state_dict(state["running"])
            except RunStopped:
                self.run.record(step, metrics, SHOWN)
                raise
        metrics["safety/num_rollbacks"] = float(self.guard.num_rollbacks)

        samples = []
        if recipe.log.samples_every and (step % recipe.log.samples_every == 0 or step == 1):
            samples += rollout_samples(local, completions, models.generator.tokenizer, recipe.log.num_samples)
        if recipe.eval.every and (step % recipe.eval.every == 0 or step == recipe.num_steps):
            with phases("eval"):
                eval_metrics, eval_samples = self.evaluate()
            metrics |= eval_metrics
            samples += eval_samples
        metrics |= _speed(engine, phases, trajectory)
        self.run.write_samples(step, samples)
        self.run.record(step, metrics, SHOWN)
        self.run.advance()

    def _roll_out(
        self, starts: Sequence[Start], step: int, phases: Phases, check_finite: Callable[..., None]
    ) -> tuple[Rollouts, list[Completion]]:
        """Sample and score this process's share of the rollouts, and what else the settings need scores of."""
        recipe, models, reward_fn = self.recipe, self.models, self.rewards["score"]
        try:
            local, completions = collect(starts, models.generator, self.engine, reward_fn,
                                         models.rollouts_together, phases)  # fmt: skip
            if recipe.reset.compares_with_source:
                source_scores = score_sources(starts, models.generator, self.engine, reward_fn,
                                              completions[-1], phases)  # fmt: skip
                local = replace(local, source_scores=source_scores)
            if recipe.advantage.estimator == "vine":
                continuations = continue_states(starts, completions, models.generator, self.engine, reward_fn,
                                                recipe.vine, phases)  # fmt: skip
                local = replace(local, continuations=continuations)
        except Interrupted:  # nothing has changed since the last step
            self.run.save(step - 1, recipe.num_steps, self.state_dict())
            raise
        origins = [c.record.origin for c in completions]
        check_finite(local.scores, "the reward", origins)
        if local.reward_details is not None:
            check_finite(local.reward_details, f"one of the reward's parts {local.reward_names}", origins)
        if local.source_scores is not None:
            check_finite(local.source_scores, "the reward of a response that rollouts are reset to", origins)
        if local.continuations is not None:
            check_finite(local.continuations.scores, "the reward of a continuation", origins)
        return local, completions

    def evaluate(self) -> Held:
        """Complete and score the held-out prompts."""
        models = self.models
        generator = models.generator
        # Weights go to a rollout engine before they are gathered: ZeRO-3 cannot gather them twice.
        with (
            generator.synced(),
            self.engine.whole_weights(generator.policy),
            models.reference_present(),
            self.engine.autocast(),
        ):
            return evaluate(self.recipe.eval, self.engine, generator, self.splits.eval, self.rewards,
                            models.reference_logprobs)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs in addition to the engine's."""
        state = {"kl": self.controller.state_dict(), "running": self.running.state_dict()}
        state |= {"reward": self._identities, "starts": self.starts.state_dict()}
        return state | self.guard.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state["kl"])
        self.running.load_state_dict(state["running"])
        self.guard.load_state_dict(state)
        self.starts.load_state_dict(state.get("starts", {}))
        check_identities(state.get("reward"), self._identities)


def learning_rates(recipe: OnlineRecipe, step: int) -> tuple[float, ...]:
    """Return the learning rates of policy and, if there is one, critic at `step` (1-based).

    The policy's is 0 during critic pretraining, and its schedule, warm-up included, runs over the steps after it.
    """
    if not recipe.advantage.needs_critic:
        return (scheduled_rate(recipe.optim.learning_rate, recipe.optim, step - 1, recipe.num_steps),)
    critic_peak = recipe.critic.learning_rate or recipe.optim.learning_rate
    critic_rate = scheduled_rate(
        critic_peak, recipe.optim, step - 1, recipe.num_steps, warmup_steps=recipe.critic.warmup_steps
    )
    pretrain_steps = recipe.critic.pretrain_steps
    if step <= pretrain_steps:
        return 0.0, critic_rate
    args = (recipe.optim, step - 1 - pretrain_steps, recipe.num_steps - pretrain_steps)
    return scheduled_rate(recipe.optim.learning_rate, *args), critic_rate


def _speed(engine: Engine, phases: Phases, trajectory) -> dict[str, float]:
    seconds = phases.seconds()
    num_tokens = float(trajectory.action_mask.sum())
    return seconds | {
        "perf/episodes_per_second": len(trajectory.scores) / seconds["time/step"],
        "perf/sampled_tokens_per_second": num_tokens / seconds["time/step"],
        "perf/peak_memory_gib": peak_memory_gib(engine.device),
    }
