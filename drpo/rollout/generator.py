"""Generate responses for rollouts, held-out evaluation, `eval` and neuron analysis.

    generator.generate(contexts, max_new_tokens, draws)   token ids after any contexts
    generator.respond(starts)                             finished responses to prompts, as reward functions see them

`generate` calls the sampling engine: drpo.rollout.sampler, on the policy itself, or, on copies of its weights,
drpo.rollout.vllm_engine in this process or drpo.rollout.vllm_servers elsewhere. Another engine would be a file of its
own, and a case here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from drpo.config import ConfigError, Section, key, refuse, refuse_changed, setting
from drpo.data.encode import readable_texts
from drpo.engine import Engine
from drpo.models.adapters import folded
from drpo.rewards import Completion
from drpo.rollout.sampler import Generated, SamplingConfig, Vocabulary, draw_uniforms, sample
from drpo.rollout.starts import Start
from drpo.rollout.vllm_engine import VLLMEngine
from drpo.rollout.vllm_requests import VLLMConfig, request_seed
from drpo.rollout.vllm_servers import VLLMServers

Draw = tuple[int, int]
"Seed and number of a response: all that its random numbers depend on."


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How many rollouts a step has and how they are sampled."""

    batch_size: int = setting(512, ge=1)
    """Rollouts per step over all processes (episodes)."""
    rollouts_per_prompt: int = setting(1, ge=1)
    """How many rollouts share a prompt; each has its own random numbers, and its own reset unless reset.per=prompt."""
    max_response_length: int = setting(53, ge=1)
    """Longest response in tokens, forced prefix and stop token included."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7))
    """Temperature. top_k and top_p are refused: log-probabilities are those of all tokens."""
    bad_tokens: list[str] = field(default_factory=list)
    """Tokens that are never sampled, in addition to padding and ids that the tokenizer does not have."""
    generation_batch_size: int = setting(64, ge=1)
    """Rows decoded together on one device; with rollout.vllm.urls, rows that each process asks for at a time."""
    engine: Literal["native", "vllm"] = "native"
    """native: the policy itself, a row's text independent of the other rows. vllm: vLLM with a copy of the policy's
    weights, in every process or on servers (vllm.urls), faster but equal to the policy only up to rounding
    (docs/rollout_engines.md)."""
    fold_lora: bool = False
    """Fold the adapter into the base while rollouts are sampled: faster, for a second copy of the adapted layers. In
    bf16 the sum is rounded, so rollouts come from a policy that differs from the trained one by that."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """Memory and speed of engine=vllm, or its servers."""

    def check(self) -> None:
        if self.engine == "native":
            refuse_changed(self, ("vllm",), f"does not apply to {key('engine')}=native")
        else:
            rule = f"is for {key('engine')}=native; {key('engine')}=vllm has the adapter folded in always: drop it"
            refuse(self.fold_lora, "fold_lora", rule)
        rule = f"must be a multiple of {key('rollouts_per_prompt')} ({self.rollouts_per_prompt})"
        refuse(self.batch_size % self.rollouts_per_prompt != 0, "batch_size", f"({self.batch_size}) {rule}")
        rule = "must be > 0: greedy rollouts explore nothing"
        refuse(self.sampling.temperature == 0, "sampling.temperature", rule)
        for name, off in (("top_k", 0), ("top_p", 1)):
            rule = (
                f"must be {off}, got {getattr(self.sampling, name):g}: rollouts would be drawn from a narrower "
                "distribution than the one whose log-probabilities are trained on, so ratios and KL would be wrong; "
                f"use {key('sampling.temperature')}"
            )
            refuse(getattr(self.sampling, name) != off, f"sampling.{name}", rule)


def vocabulary_of(
    tokenizer,
    num_logits: int,
    policy_stops: Sequence[int] = (),
    bad_tokens: Sequence[str] = (),
    key: str = "rollout.bad_tokens",
) -> Vocabulary:
    """Find the ids that end a response and the ids that are never sampled.

    Raises ConfigError, naming `key`, for a bad token that is not one token of the tokenizer, or that ends responses.

    Args:
        tokenizer: its eos token is the first stop id; ids without a token, at the end or in between, are suppressed.
        num_logits: size of the policy's output.
        policy_stops: further stop ids, those of the policy (`drpo.models.policy_stops`).
        bad_tokens: tokens that are never sampled.
        key: recipe key of `bad_tokens`, for errors.
    """
    known = tokenizer.get_vocab()
    if unknown := [token for token in bad_tokens if token not in known]:
        raise ConfigError(f"{key}: {unknown} are not single tokens of this tokenizer")
    bad = {known[token] for token in bad_tokens}
    suppressed = {tokenizer.pad_token_id} | bad | set(range(num_logits)).difference(known.values())
    if (stop := tokenizer.eos_token_id) in suppressed:
        raise ConfigError(
            f"{key} or padding and the token that ends responses (data.stop_token) share the ids [{stop}]"
        )
    further_stops = [i for i in policy_stops if i != stop and i < num_logits and i not in suppressed]
    suppressed_ids = sorted(i for i in suppressed if i < num_logits)
    return Vocabulary(tokenizer.pad_token_id, (stop, *further_stops), tuple(suppressed_ids))


@dataclass(frozen=True)
class Generator:
    """A policy with its tokenizer, vocabulary and sampling settings."""

    policy: nn.Module
    tokenizer: object
    vocabulary: Vocabulary
    sampling: SamplingConfig
    max_response_length: int
    "Longest response in tokens, forced prefix and stop token included."
    batch_size: int
    "Rows decoded together."
    seed: int = 0
    "Seed of the responses of `respond`."
    fold_lora: bool = False
    "Whether the policy's adapter is folded in within `ready`."
    vllm: VLLMEngine | VLLMServers | None = None
    "Samples in place of the policy, with its weights within `synced`."

    def synced(self) -> AbstractContextManager[None]:
        """Return a context in which a rollout engine has the policy's weights; nothing is done without one.

        ZeRO-3: all processes must enter it, outside `Engine.whole_weights`.
        """
        return nullcontext() if self.vllm is None else self.vllm.weights_of(self.policy)

    @contextmanager
    def ready(self, engine: Engine) -> Iterator[None]:
        """Return a context for `generate` alone: the policy's weights are whole, or a rollout engine has them."""
        if self.vllm is not None:
            with self.synced():
                yield
            return
        with engine.whole_weights(self.policy), folded(self.policy) if self.fold_lora else nullcontext():
            yield

    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        draws: Sequence[Draw],
        logprobs: bool = False,
    ) -> Generated:
        """Sample new tokens after each context, in the order of `contexts`, a sampled stop token included.

        Row i ends at a stop id or after `max_new_tokens[i]` tokens; its text depends on its context and on `draws[i]`
        alone, with vLLM up to rounding, which may depend on the other rows. With `logprobs` the result includes
        log-probabilities of the new tokens, under the distribution that they were sampled from. Raises the errors of
        `drpo.rollout.sampler.sample` or `VLLMEngine.sample`.
        """
        match self.vllm:
            case None:
                length = max(max_new_tokens, default=0)
                rows = [draw_uniforms(seed, [number], length) for seed, number in draws]
                uniforms = torch.cat([draw_uniforms(0, [], length), *rows])
                settings = (self.sampling, self.vocabulary, self.batch_size, logprobs)
                return sample(self.policy, contexts, max_new_tokens, uniforms, *settings)
            case vllm:
                seeds = [request_seed(seed, number) for seed, number in draws]
                return vllm.sample(contexts, max_new_tokens, seeds, self.sampling)

    def respond(self, starts: Sequence[Start]) -> list[Completion]:
        """Complete the responses that begin at `starts`; each depends on (seed, episode) alone."""
        new = self.generate(
            [[*start.example.query_ids, *start.prefix] for start in starts],
            [self.max_response_length - len(start.prefix) for start in starts],
            [(self.seed, start.episode) for start in starts],
        )
        responses = [[*start.prefix, *ids] for start, ids in zip(starts, new.tokens, strict=True)]
        completions = self.completions(starts, responses)
        if self.vllm is None:
            return completions
        return [
            replace(c, engine_logprobs=values) for c, values in zip(completions, new.logprobs, strict=True)
        ]

    def completions(self, starts: Sequence[Start], responses: Sequence[Sequence[int]]) -> list[Completion]:
        """Make Completions of responses for reward functions, `ended` when the last token is a stop token."""
        ended = [ids[-1] in self.vocabulary.stop_ids for ids in responses]
        bodies = [ids[:-1] if end else ids for ids, end in zip(responses, ended, strict=True)]
        texts = readable_texts(self.tokenizer, bodies, [start.example.record.opening for start in starts])
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
