"""Sample held-out prompts during training: completions of bare prompts, their scores and their KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from drpo.config import ConfigError, Section, refuse, setting
from drpo.data.encode import Example
from drpo.engine import Engine
from drpo.kl import sequence_kl
from drpo.models.loading import load_policy
from drpo.models.policy_stops import stop_ids
from drpo.models.positions import check_sampling
from drpo.models.scoring import response_logprobs
from drpo.models.vocabulary import check_same_vocabulary
from drpo.random_streams import SeedOffset
from drpo.reward_functions import score_in_detail
from drpo.rewards import Completion, RewardFn
from drpo.rollout.generator import Generator, RolloutConfig, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.samples import evaluation_sample
from drpo.rollout.starts import Start
from drpo.run.folder import RunFolder
from drpo.tensors import PaddedBatch, pad_batch

Held = tuple[dict[str, float], list[dict[str, Any]]]
"Metrics `eval/<name>`, and the completions as sample rows."


@dataclass(frozen=True)
class EvalConfig(Section):
    """Schedule and settings of the evaluation on held-out prompts."""

    every: int = setting(50, ge=0)
    """Evaluate after every so many steps, and after the last; 0 for never."""
    num_prompts: int = setting(64, ge=1)
    """How many held-out prompts, the same ones every time."""
    temperature: float = setting(0.01, ge=0)
    """Sampling temperature of the evaluation; 0 is greedy."""
    reward_functions: dict[str, str] = field(default_factory=dict)
    """Further scores to report, name: module:function."""

    def check(self) -> None:
        for name in self.reward_functions:
            taken = name in ("score", "kl", "log_ratio", "length", "ended")
            refuse(taken, f"reward_functions.{name}", "is the name of another metric; choose another")


@dataclass(frozen=True)
class SampleConfig(Section):
    """Completions of held-out prompts that are written at every evaluation."""

    num_prompts: int = setting(16, ge=0)
    """How many held-out prompts; 0 for none."""
    temperature: float = setting(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    max_response_length: int = setting(53, ge=1)
    """Longest completion in tokens."""
    reward_functions: dict[str, str] = field(default_factory=dict)
    """Scores to report of them, name: module:function."""
    kl_reference: str | None = None
    """Folder or hub id of a policy to measure eval/kl to (at other temperatures than 1: eval/log_ratio), kept in memory
    besides; null: the reference of the loss, if it is in memory and does not move, else neither."""

    def check(self) -> None:
        for name in self.reward_functions:
            taken = name in ("loss", "kl", "log_ratio", "length", "ended")
            refuse(taken, f"reward_functions.{name}", "is the name of another metric; choose another")


@torch.no_grad()
def evaluate(
    config: EvalConfig,
    engine: Engine,
    generator: Generator,
    examples: Sequence[Example],
    rewards: Mapping[str, RewardFn],
    reference_logprobs: Callable[[PaddedBatch], Tensor] | None,
) -> Held:
    """Complete the first `num_prompts` held-out prompts and measure: `eval/<name>`, and sample rows.

    The random numbers depend on (seed, prompt) alone, so runs and steps are compared on the same draws. With a
    reference the metrics have the mean over completions of sum_t log pi/pi_ref under the generator's temperature, the
    one of training: `eval/kl` when the completions are sampled at it too, else `eval/log_ratio`, which does not
    estimate a KL. The processes divide the prompts among themselves. Raises ConfigError when there are none, and
    Interrupted, in all processes, when one is to stop while it waits for a server.

    Args:
        config: number of prompts and sampling temperature.
        engine: gathers results over the processes.
        generator: samples from the policy.
        examples: held-out examples.
        rewards: scores by name, `eval/<name>`.
        reference_logprobs: maps a batch to log-probs (B, R); None without a reference.
    """
    if not examples:
        raise ConfigError(
            "there are no held-out prompts to evaluate on; set data.eval_split or data.eval_fraction, or turn the "
            "evaluation off with eval.every=0"
        )
    starts = [Start(episode, example) for episode, example in enumerate(examples[: config.num_prompts])]
    own = starts[engine.rank :: engine.world_size]
    # Forwards of weights that are cut over the processes need all of them: the last prompt fills up.
    num_rows = -(-len(starts) // engine.world_size) if engine.partitions_weights else len(own)
    starts = own + starts[-1:] * (num_rows - len(own))
    results: list[tuple[int, dict[str, float], dict[str, Any]]] = []
    sampling = SamplingConfig(temperature=config.temperature)
    evaluator = replace(generator, sampling=sampling, seed=generator.seed + SeedOffset.EVALUATION)
    completions: list[Completion] = []
    scores: dict[str, list[float]] = {}
    with engine.interruptible():
        if starts:
            completions = evaluator.respond(starts)
        for name, reward_fn in rewards.items() if starts else ():
            scored = score_in_detail(reward_fn, completions)
            scores[name] = scored.scores.tolist()
            scores |= {f"{name}/{detail}": values.tolist() for detail, values in scored.details.items()}
    if starts:
        if reference_logprobs is not None:
            name = "kl" if config.temperature == generator.sampling.temperature else "log_ratio"
            scores[name] = _log_ratios(generator, completions, reference_logprobs, engine.device)
        for row, (start, completion) in enumerate(zip(own, completions, strict=False)):
            numbers = {name: values[row] for name, values in scores.items()}
            length, ended = float(len(completion.response_ids)), float(completion.ended)
            measured = {**numbers, "length": length, "ended": ended}
            results.append((start.episode, measured, evaluation_sample(completion, numbers)))
    _, measurements, samples = zip(*sorted(engine.gather_objects(results), key=lambda r: r[0]), strict=True)
    means = {
        f"eval/{name}": sum(numbers[name] for numbers in measurements) / len(measurements)
        for name in measurements[0]
    }
    return means, list(samples)


def _log_ratios(
    generator: Generator,
    completions: Sequence[Completion],
    reference_logprobs: Callable[[PaddedBatch], Tensor],
    device: torch.device,
) -> list[float]:
    """Compute sum_t log pi/pi_ref of each completion, at the generator's temperature."""
    ratios: list[float] = []
    for first in range(0, len(completions), generator.batch_size):
        part = completions[first : first + generator.batch_size]
        batch = pad_batch(
            [completion.query_ids for completion in part],
            [completion.response_ids for completion in part],
            generator.vocabulary.pad_id,
        ).to(device)
        logprobs = response_logprobs(
            generator.policy,
            batch,
            temperature=generator.sampling.temperature,
            suppressed_ids=generator.vocabulary.suppressed_ids,
        ).logprobs
        ratios += sequence_kl(
            logprobs.float(), reference_logprobs(batch).float(), batch.response_mask
        ).tolist()
    return ratios


def held_out_sampler(
    run: RunFolder,
    policy: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    rewards: Mapping[str, RewardFn],
    reference_logprobs: Callable[[PaddedBatch], Tensor] | None = None,
) -> Callable[[], Held] | None:
    """Make a function that samples a completion of each distinct prompt, or None when there is nothing to sample.

    With a reference the metrics have the mean over completions of log pi/pi_ref in nats: `eval/kl`, which estimates
    KL(pi, pi_ref), when they are sampled at temperature 1, else `eval/log_ratio`, which does not.

    Args:
        run: its recipe has the sections `sample` and `model`; with the latter's settings a policy at
            `sample.kl_reference` is loaded as the reference.
        policy: the policy in training.
        tokenizer: its tokenizer.
        examples: held-out examples.
        rewards: scores by name, `eval/<name>`.
        reference_logprobs: maps a batch to log-probs (B, R); None without another reference.
    """
    engine, config, seed = run.engine, run.recipe.sample, run.recipe.seed
    if not config.num_prompts or not examples:
        return None
    key = "sample.max_response_length"
    check_sampling(policy, examples, config.max_response_length, "model.path", key)
    if config.kl_reference is not None:
        check_same_vocabulary(tokenizer, config.kl_reference, "sample.kl_reference")
        defaults = {"architecture": {}, "tokenizer": None, "vocab_size": None, "trainable_layers": None}
        source = run.recipe.model.without_adapter(path=config.kl_reference, **defaults)
        frozen = engine.place(load_policy(source, tokenizer, seed, "sample.kl_reference"), as_trained=True)
        check_sampling(frozen, examples, config.max_response_length, "sample.kl_reference", key)

        def reference_logprobs(batch: PaddedBatch) -> Tensor:
            return response_logprobs(frozen, batch).logprobs

    prompts = list({example.record.marked_prompt: example for example in reversed(examples)}.values())[::-1]
    generator = Generator(
        policy,
        tokenizer,
        vocabulary_of(tokenizer, policy.config.vocab_size, stop_ids(policy)),
        SamplingConfig(temperature=1.0),
        config.max_response_length,
        RolloutConfig.generation_batch_size,
        seed,
    )
    settings = EvalConfig(num_prompts=config.num_prompts, temperature=config.temperature)

    def sample() -> Held:
        with engine.autocast():
            return evaluate(settings, engine, generator, prompts, rewards, reference_logprobs)

    return sample
