"""Completions that tell what was read of them, and a recipe's reward that asks a server for their scores."""

from __future__ import annotations

from pathlib import Path

from drpo.config import load_recipe
from drpo.data.records import Chat, Record
from drpo.engine import Engine
from drpo.rewards import Completion
from drpo.trainers.online_recipe import OnlineRecipe
from reward_models.sources import reward_from


def remote(url: str, engine: Engine, policy: Path, *overrides: str, chat: bool = False):
    overrides = (f"reward.url={url}", "reward.server.timeout_minutes=0.05", *overrides)
    return reward_from(load_recipe(OnlineRecipe, None, overrides).reward, engine, str(policy), chat)


def plain(number: int, ended: bool = True) -> Completion:
    """Its text says nothing of its ids, so a score tells which of the two was read."""
    query, response = [40 + number, 41, 42], [90 + number, 10]
    return Completion(f"Question {number}:", f" no {number}", ended, query, response, Record("", "label"))


def conversation(number: int, ended: bool = True) -> Completion:
    chat = Chat(({"role": "user", "content": f"Why {number}?"},), f"Why {number}?")
    prompt, query, response = "<|im_start|>...", [50 + number, 51], [70 + number, 10]
    return Completion(prompt, f"Because {number}", ended, query, response, Record(prompt, chat=chat))


def rows_of(make) -> list[Completion]:
    return [make(number, ended=number % 3 > 0) for number in range(11)]
