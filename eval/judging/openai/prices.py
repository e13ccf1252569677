"""Cost of calls: a table of prices, the cost of an answer by kind of token, and an upper bound for a call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drpo.config import ConfigError

PRICES = Path(__file__).with_name("prices.yaml")
MILLION = 1_000_000
TOKENS_AROUND_A_MESSAGE = 16
"Upper bound on the tokens that a chat format adds per message and to open the answer."
BYTES_PER_TOKEN = 4.0
"English prose; for an estimate, never for a bound."


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars per million tokens of each kind."""

    input: float
    cached: float
    cache_write: float
    output: float
    as_of: str

    def cost(self, prompt: int, cached: int, cache_write: int, completion: int) -> float:
        """Return the dollars of a call from its tokens: `cached` and `cache_write` are parts of `prompt`."""
        plain = max(0, prompt - cached - cache_write)  # some servers do not count those in prompt
        prompt_cost = plain * self.input + cached * self.cached + cache_write * self.cache_write
        return (prompt_cost + completion * self.output) / MILLION

    def at_most(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return an upper bound in dollars for a call with this many tokens, cached or not."""
        dearest = max(self.input, self.cached, self.cache_write)
        return (prompt_tokens * dearest + completion_tokens * self.output) / MILLION


def load_price(path: Path | str, model: str, batch: bool) -> Price | None:
    """Read the price of a model, None if the table does not have it.

    A name in the table matches that model and its dated snapshots: "m" matches m and m-2026-01-31, not m-mini.
    Raises ConfigError for a malformed table.
    """
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        factor = _number(table["batch_factor"]) if batch else 1.0
        models = {str(name): _prices(prices) for name, prices in table["models"].items()}
        as_of = str(table["as_of"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"budget.prices={path} is not a table of prices ({type(error).__name__}: {error}); "
            f"{PRICES.name} of the package eval shows the shape"
        ) from None
    undated = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)
    prices = models.get(model, models.get(undated))
    if prices is None:
        return None
    return Price(**{kind: dollars * factor for kind, dollars in prices.items()}, as_of=as_of)


def _prices(prices: Mapping[str, Any]) -> dict[str, float]:
    if unknown := set(prices) - {"input", "cached", "cache_write", "output"}:
        raise ValueError(f"unknown kinds of tokens {sorted(unknown)}")
    dollars = {kind: _number(value) for kind, value in prices.items()}
    price = dollars["input"]
    return {"cached": price, "cache_write": price, **dollars, "output": dollars["output"]}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise ValueError(f"{value!r} is not a price")
    return float(value)


def prompt_tokens_at_most(texts: list[str]) -> int:
    """Return an upper bound on the tokens of a prompt with these messages.

    No token of a byte-level vocabulary is shorter than one byte; what the chat format adds is counted generously.
    """
    return sum(len(text.encode()) + TOKENS_AROUND_A_MESSAGE for text in texts)


def prompt_tokens_about(texts: list[str]) -> float:
    """Estimate the tokens of a prompt of these messages."""
    return sum(len(text.encode()) / BYTES_PER_TOKEN + 4 for text in texts)
