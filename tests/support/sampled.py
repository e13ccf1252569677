"""The sampler's tokens alone."""

from __future__ import annotations

from drpo.rollout.sampler import Vocabulary, sample


def generate(
    model, contexts, max_new_tokens, uniforms, *, sampling, stop_ids, suppressed_ids=(), batch_size
) -> list[list[int]]:
    vocabulary = Vocabulary(-1, tuple(stop_ids), tuple(suppressed_ids))
    return sample(model, contexts, max_new_tokens, uniforms, sampling, vocabulary, batch_size).tokens
