"""Errors of model.attn_implementation that name the key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from drpo.config import ConfigError


@contextmanager
def attention_errors(implementation: str | None) -> Iterator[None]:
    """Raise ConfigError where transformers fails on an attention implementation.

    That is one that transformers does not know, the model does not support, or whose package is not installed.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if implementation is None or not re.search("attention|attn|kernel", str(error), re.IGNORECASE):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.attn_implementation: {implementation!r} cannot be used here: {reason} Choose eager or sdpa, or "
            "null for transformers' choice"
        ) from error
