"""Import reward functions by name, and call them with errors that locate the fault."""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.rewards import Completion, DetailedScores, IdentifiedRewardFn, RewardFn, SharingRewardFn
from drpo.run.stopped import RunStopped
from drpo.tensors import PaddedBatch


def import_functions(functions: Mapping[str, str], key: str) -> dict[str, RewardFn]:
    """Import the functions of a mapping name -> module:function."""
    return {
        name: with_located_errors(import_function(spec, f"{key}.{name}"), f"{key}.{name}={spec!r}")
        for name, spec in functions.items()
    }


def with_located_errors(function: RewardFn, where: str, identity: str | None = None) -> RewardFn:
    """Wrap `function` so that an exception in it becomes a ConfigError that names `where`.

    RunStopped stays: a judge whose budget is spent ends the run on purpose. The identity is that of `function`, or
    where it has none `identity`.
    """

    def score(completions: Sequence[Completion]) -> list[float] | DetailedScores:
        try:
            returned = function(completions)
            scores = [float(score) for score in returned]
        except RunStopped:
            raise
        except Exception as error:
            raise ConfigError(f"{where} does not score the responses: {_described(error)}") from error
        if len(scores) != len(completions):
            raise ConfigError(f"{where} returned {len(scores)} scores for {len(completions)} responses")
        return returned if isinstance(returned, DetailedScores) else scores

    score.identity = getattr(function, "identity", None) or identity
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
    return score_in_detail(reward_fn, completions).scores


def score_in_detail(reward_fn: RewardFn, completions: Sequence[Completion]) -> DetailedScores:
    """Score completions, (B,) float32, with the details that the function gives, if any.

    Raises ValueError unless scores and details have one number per completion.
    """
    returned = reward_fn(completions)
    if not isinstance(returned, DetailedScores):
        returned = DetailedScores(_one_each(returned, len(completions)))
    details = {name: _one_each(values, len(completions), name) for name, values in returned.details.items()}
    return DetailedScores(_one_each(returned.scores, len(completions)), details)


def _one_each(values: Sequence[float] | Tensor, number: int, detail: str | None = None) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    if values.shape != (number,):
        what = "" if detail is None else f" as the detail {detail!r}"
        raise ValueError(
            f"the reward function returned shape {tuple(values.shape)} for {number} completions{what}; "
            "it must return one number each"
        )
    return values


def reading_trunk(reward_fn: RewardFn, parts: Sequence[PaddedBatch], trunks: Sequence[Tensor]) -> RewardFn:
    """Return the function that scores from the policy's trunk where `reward_fn` shares it, else `reward_fn`."""
    if isinstance(reward_fn, SharingRewardFn) and reward_fn.shares_trunk:
        return functools.partial(reward_fn.score_from_trunk, parts=parts, trunks=trunks)
    return reward_fn


def identities_of(reward_fn: RewardFn, place: str) -> dict[str, str]:
    """Return the identity of a RewardFn at `place`, those of its members at place/<name>, or {} where it has none.

    Raises ConfigError for an identity that is neither text nor a mapping of texts.
    """
    identity = reward_fn.identity if isinstance(reward_fn, IdentifiedRewardFn) else None
    if identity is None:
        return {}
    if isinstance(identity, str):
        return {place: identity} if identity else {}
    if not isinstance(identity, Mapping) or not all(isinstance(value, str) for value in identity.values()):
        raise ConfigError(
            f"{place}: the attribute `identity` of a reward function must be text, or a mapping of names to texts, "
            f"got {identity!r}"
        )
    return {f"{place}/{name}": value for name, value in identity.items()}
