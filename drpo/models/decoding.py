"""Savings in decoding, where a forward has one token a row: the same logits bit for bit, with fewer copies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from drpo.models.scoring import forward_replaced

DECISION = "use_gqa_in_sdpa"
"Where transformers decides whether sdpa gets grouped queries: a private function, which other versions may lack."


@contextmanager
def keys_in_place() -> Iterator[None]:
    """Let sdpa attention on a CPU read the keys and values of grouped queries in place within this context.

    Where there is a mask, transformers copies them for every query head, because the fast kernels of GPUs take no
    groups beside one. torch's CPU kernel does, and the copies cost more than the attention of one query.
    """
    decide = getattr(sdpa_attention, DECISION, None)
    if decide is None or decide.__module__ == __name__:  # another call's, in another thread
        yield
        return

    def takes_groups(attention_mask: Tensor | None, key: Tensor, *others: Any) -> bool:
        return key.device.type == "cpu" or decide(attention_mask, key, *others)

    setattr(sdpa_attention, DECISION, takes_groups)
    try:
        yield
    finally:
        setattr(sdpa_attention, DECISION, decide)


@contextmanager
def head_rounded_once(causal_lm: nn.Module) -> Iterator[None]:
    """Round a frozen float32 LM head to autocast's precision once within this context; its weights must not change.

    Autocast keeps the rounded copies of weights that require gradients, and rounds others in every forward. Under LoRA
    a tied embedding is such a weight (the matrices are held in bf16, `drpo.models.frozen_weights`).
    """
    head = causal_lm.get_output_embeddings()
    if not _is_rounded_every_time(head):
        yield
        return
    weight = head.weight.to(torch.get_autocast_dtype(head.weight.device.type))
    with forward_replaced(head, functools.partial(nn.functional.linear, weight=weight, bias=head.bias)):
        yield


def _is_rounded_every_time(head: nn.Module | None) -> bool:
    if type(head) is not nn.Linear:
        return False
    weight = head.weight
    rounds = torch.is_autocast_enabled(weight.device.type) and weight.dtype == torch.float32
    return rounds and not weight.requires_grad
