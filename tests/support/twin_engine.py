"""A rollout engine that every machine has: a second copy of the policy, as old as its last weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from drpo.models.adapters import merged_weights
from drpo.models.inputs import unwrap_peft
from drpo.rollout.sampler import Generated, SamplingConfig, Vocabulary, sample


class TwinEngine:
    """What VLLMEngine is to a Generator, sampling as the native engine does."""

    def __init__(self, plain: nn.Module, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = copy.deepcopy(unwrap_peft(plain)), vocabulary
        self.awake = False

    @contextmanager
    def weights_of(self, policy: nn.Module) -> Iterator[None]:
        self.model.load_state_dict(dict(merged_weights(policy)))
        self.awake = True
        yield
        self.awake = False

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        seeds: Sequence[int],
        sampling: SamplingConfig,
    ) -> Generated:
        assert self.awake
        uniforms = [np.random.default_rng(seed).random(max(max_new_tokens)) for seed in seeds]
        rows = torch.from_numpy(np.stack(uniforms))
        return sample(self.model, contexts, max_new_tokens, rows, sampling, self.vocabulary, 4, logprobs=True)
