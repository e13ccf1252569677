"""Import reward functions by name, and call them with errors that locate the fault."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.rewards import Completion, RewardFn


def import_functions(functions: Mapping[str, str], key: str) -> dict[str, RewardFn]:
    """Import the functions of a mapping name -> module:function."""
    return {
        name: _with_located_errors(import_function(spec, f"{key}.{name}"), f"{key}.{name}={spec!r}")
        for name, spec in functions.items()
    }


def _with_located_errors(function: RewardFn, where: str) -> RewardFn:
    """Wrap `function` so that any exception in it becomes a ConfigError."""

    def score(completions: Sequence[Completion]) -> list[float]:
        try:
            scores = [float(score) for score in function(completions)]
        except Exception as error:
            raise ConfigError(f"{where} does not score the responses: {_described(error)}") from error
        if len(scores) != len(completions):
            raise ConfigError(f"{where} returned {len(scores)} scores for {len(completions)} responses")
        return scores

    return score


def _described(error: Exception) -> str:
    """Describe an error: its kind, where it was raised, and its message."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {place.filename}:{place.lineno}: {error}"


def import_function(spec: str, key: str) -> RewardFn:
    """Import the callable `module:function`; modules in the working directory are found too.

    Raises ConfigError naming the key when the module or the function does not exist, or the module fails.
    """
    module_name, colon, function_name = spec.partition(":")
    if not colon or not function_name or not module_name or module_name.startswith("."):
        raise ConfigError(f"{key}={spec!r} must be written module:function")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key}={spec!r}: {error}; looked on sys.path and in {working_directory}") from None
    except Exception as error:  # a user's module may do anything
        raise ConfigError(
            f"{key}={spec!r}: {module_name} fails when it is imported: {_described(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [name for name in vars(module) if not name.startswith("_")]
        functions = [name for name in public if callable(getattr(module, name))]
        raise ConfigError(
            f"{key}={spec!r}: {module_name} has no function {function_name}; it has {functions}"
        )
    return function


def call_reward_fn(reward_fn: RewardFn, completions: Sequence[Completion]) -> Tensor:
    """Score completions, (B,) float32; raise ValueError unless the function returns one number per completion."""
    scores = torch.as_tensor(reward_fn(completions), dtype=torch.float32).detach().cpu()
    if scores.shape != (len(completions),):
        raise ValueError(
            f"the reward function returned shape {tuple(scores.shape)} for {len(completions)} completions; "
            "it must return one number each"
        )
    return scores
