"""How many rows of logits exist at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _Recorder(TorchDispatchMode):
    def __init__(self, vocab_size: int, seen: list[int]) -> None:
        super().__init__()
        self.vocab_size, self.seen = vocab_size, seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and out.shape[-1] == self.vocab_size:
            self.seen.append(out.numel() // self.vocab_size)
        return out


@contextmanager
def logit_rows(vocab_size: int) -> Iterator[list[int]]:
    """A list that gets the number of rows of every matrix product that is `vocab_size` wide: logits, in order."""
    seen: list[int] = []
    with _Recorder(vocab_size, seen):
        yield seen
