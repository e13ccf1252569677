"""One batch of rollouts: prompts, resets, sampling, scoring - everything the update needs, as a Trajectory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.data.encode import Example, said_texts
from drpo.data.order import item_at
from drpo.models.trunk import has_trunk, trunk_output
from drpo.rewards import Completion, RewardFn
from drpo.rollout.resets import ResetConfig, draw_reset_length, prefix_boundaries, reset_response
from drpo.rollout.sampler import SamplingConfig, draw_uniforms, generate
from drpo.rollout.trajectory import Trajectory
from drpo.run.metrics import Phases
from drpo.tensors import PaddedBatch, pad_batch


@dataclass(frozen=True)
class RolloutConfig:
    """How many rollouts a step has and how they are sampled."""

    batch_size: int = 512
    """Rollouts per step over all processes (episodes)."""
    rollouts_per_prompt: int = 1
    """How many rollouts share a prompt; each has its own reset and its own random numbers."""
    max_response_length: int = 53
    """Longest response in tokens, forced prefix and stop token included."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7))
    """Temperature. top_k and top_p are refused: log-probabilities are those of all tokens."""
    bad_tokens: list[str] = field(default_factory=list)
    """Tokens that are never sampled, beside padding and ids that the tokenizer does not have."""
    generation_batch_size: int = 64
    """Rows decoded together on one device."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rollouts_per_prompt", "max_response_length", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size % self.rollouts_per_prompt:
            raise ValueError(
                f"rollout.batch_size ({self.batch_size}) must be a multiple of "
                f"rollout.rollouts_per_prompt ({self.rollouts_per_prompt})"
            )
        if self.sampling.temperature <= 0:
            raise ValueError("rollout.sampling.temperature must be > 0: greedy rollouts explore nothing")
        for key, off in (("top_k", 0), ("top_p", 1)):
            if (value := getattr(self.sampling, key)) != off:
                raise ValueError(
                    f"rollout.sampling.{key}={value:g}: rollouts would be drawn from a narrower distribution than the "
                    "one whose log-probabilities are trained on, so ratios and KL would be wrong; set "
                    f"rollout.sampling.{key}={off} and use rollout.sampling.temperature"
                )


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that matter to sampling."""

    pad_id: int
    stop_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]


def vocabulary_of(
    config: RolloutConfig, tokenizer, num_logits: int, policy_stops: Sequence[int] = ()
) -> Vocabulary:
    """The ids that end a response, the tokenizer's eos token before those of the policy (`drpo.models.stops`), and
    the ids that are never sampled: the tokenizer may have none for some of the logits, at the end or in between.

    Raises ConfigError for a bad token that is not one token of the tokenizer, or that ends responses.
    """
    known = tokenizer.get_vocab()
    if missing := [token for token in config.bad_tokens if token not in known]:
        raise ConfigError(f"rollout.bad_tokens: {missing} are not single tokens of this tokenizer")
    bad = {known[token] for token in config.bad_tokens}
    never = {tokenizer.pad_token_id} | bad | set(range(num_logits)).difference(known.values())
    if (stop := tokenizer.eos_token_id) in never:
        raise ConfigError(
            f"rollout.bad_tokens or padding and the token that ends responses (data.stop_token) share the ids [{stop}]"
        )
    suppressed = sorted(i for i in never if i < num_logits)
    others = [i for i in policy_stops if i != stop and i < num_logits and i not in never]
    return Vocabulary(tokenizer.pad_token_id, (stop, *others), tuple(suppressed))


@dataclass(frozen=True)
class Start:
    """Where a rollout starts: the prompt, and `prefix` tokens of a dataset response of `source_length`."""

    episode: int
    example: Example
    prefix: tuple[int, ...]
    source_length: int


def draw_starts(
    examples: Sequence[Example],
    episodes: range,
    reset: ResetConfig,
    rollout: RolloutConfig,
    tokenizer,
    vocabulary: Vocabulary,
    progress: float,
    seed: int,
) -> list[Start]:
    """The starts of the given episodes; each depends on (seed, episode) alone.

    A dataset response ends at its first stop token, so no prefix goes past an end.
    """
    starts = []
    for episode in episodes:
        example = item_at(examples, episode // rollout.rollouts_per_prompt, seed)
        prefix: tuple[int, ...] = ()
        source_length = 0
        if reset.proportion > 0:
            source = _up_to_stop(reset_response(example, reset.source), vocabulary.stop_ids)
            boundaries = prefix_boundaries(source, reset.boundary, tokenizer)
            length = draw_reset_length(
                reset, boundaries, len(source), rollout.max_response_length, progress, seed, episode
            )
            prefix = tuple(source[:length])
            source_length = len(source) if length else 0
        starts.append(Start(episode, example, prefix, source_length))
    return starts


def _up_to_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> Sequence[int]:
    ends = [position for position, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids


@torch.no_grad()
def collect(
    starts: Sequence[Start],
    *,
    policy,
    measure: Callable[[PaddedBatch, Tensor | None], tuple[Tensor, Tensor, Tensor]],
    reference_logprobs: Callable[[PaddedBatch, Tensor | None], Tensor],
    reward_fn: RewardFn,
    tokenizer,
    vocabulary: Vocabulary,
    rollout: RolloutConfig,
    microbatch_size: int,
    query_length: int,
    common_length: Callable[[int], int],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    seed: int,
    phases: Phases,
    reward_from_trunk: bool = False,
) -> tuple[Trajectory, list[Completion]]:
    """Roll out from the given starts and measure the result.

    `measure` gives (logprobs, entropy, values) by the same forward as training, on micro-batches of the same
    size and padding, so that the first ratio is 1. `common_length` turns this process's longest response into
    the padded length that all processes share. A frozen trunk (drpo.models.trunk) is computed once, for all of them;
    with `reward_from_trunk` the reward function (a TrunkRewardFn) stands on it too.
    """
    with phases("generate"), autocast():
        continuations = generate(
            policy,
            [[*start.example.query_ids, *start.prefix] for start in starts],
            [rollout.max_response_length - len(start.prefix) for start in starts],
            draw_uniforms(seed, [start.episode for start in starts], rollout.max_response_length),
            sampling=rollout.sampling,
            stop_ids=vocabulary.stop_ids,
            suppressed_ids=vocabulary.suppressed_ids,
            batch_size=rollout.generation_batch_size,
        )
    responses = [[*start.prefix, *new] for start, new in zip(starts, continuations, strict=True)]
    completions = completions_of(starts, responses, vocabulary, tokenizer)
    response_length = common_length(max(map(len, responses)))
    batch = pad_batch(
        [start.example.query_ids for start in starts],
        responses,
        vocabulary.pad_id,
        query_length,
        response_length,
    ).to(device)
    parts = [batch.select(rows) for rows in torch.arange(len(starts), device=device).split(microbatch_size)]
    trunks: list[Tensor | None] = [None] * len(parts)
    if has_trunk(policy):
        with phases("trunk"), autocast():
            trunks = [trunk_output(policy, part) for part in parts]
    with phases("reward"):
        score = reward_fn
        if reward_from_trunk:
            score = functools.partial(reward_fn.score_from_trunk, parts=parts, trunks=trunks)
        scores = call_reward_fn(score, completions)
    logprobs, entropy, values, ref_logprobs = [], [], [], []
    with phases("score"):
        for part, trunk in zip(parts, trunks, strict=True):
            measured = measure(part, trunk)
            logprobs.append(measured[0])
            entropy.append(measured[1])
            values.append(measured[2])
            with autocast():
                ref_logprobs.append(reference_logprobs(part, trunk))
    trajectory = Trajectory(
        queries=batch.queries,
        query_mask=batch.query_mask,
        responses=batch.responses,
        response_mask=batch.response_mask,
        reset_lengths=torch.tensor([len(start.prefix) for start in starts], device=device),
        source_lengths=torch.tensor([start.source_length for start in starts], device=device),
        ended=torch.tensor([c.ended for c in completions], device=device),
        scores=scores.to(device),
        logprobs=torch.cat(logprobs).float(),
        ref_logprobs=torch.cat(ref_logprobs).float(),
        values=torch.cat(values).float(),
        entropy=torch.cat(entropy).float(),
        trunk=torch.cat(trunks) if has_trunk(policy) else None,
    )
    return trajectory, completions


def completions_of(
    starts: Sequence[Start], responses: Sequence[Sequence[int]], vocabulary: Vocabulary, tokenizer
) -> list[Completion]:
    """Finished rollouts as reward functions see them; `ended` when the last token is a stop token."""
    ended = [ids[-1] in vocabulary.stop_ids for ids in responses]
    bodies = [ids[:-1] if end else ids for ids, end in zip(responses, ended, strict=True)]
    texts = said_texts(tokenizer, bodies, [start.example.record.opening for start in starts])
    return [
        Completion(
            prompt=start.example.record.prompt,
            response=text,
            ended=end,
            query_ids=list(start.example.query_ids),
            response_ids=list(ids),
            record=start.example.record,
        )
        for start, ids, text, end in zip(starts, responses, texts, ended, strict=True)
    ]


def call_reward_fn(reward_fn: RewardFn, completions: Sequence[Completion]) -> Tensor:
    """(B,) float32 scores. Raises ValueError unless the function returns one number a completion."""
    scores = torch.as_tensor(reward_fn(completions), dtype=torch.float32).detach().cpu()
    if scores.shape != (len(completions),):
        raise ValueError(
            f"the reward function returned shape {tuple(scores.shape)} for {len(completions)} completions; "
            "it must return one number each"
        )
    return scores
