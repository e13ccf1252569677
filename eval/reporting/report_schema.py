"""The shape of comparison.json, written as it looks, and a check that names the field that does not fit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drpo.data.records import DataError


@dataclass(frozen=True)
class Maybe:
    """The shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """A mapping from any text to the shape."""

    shape: Any


@dataclass(frozen=True)
class OneOf:
    """One of these texts."""

    choices: tuple[str, ...]


MAX_NUMBER = sys.float_info.max
MAX_DIGITS = 15
"No double has more."
STATUSES = ("ok", "refused", "malformed", "truncated", "failed")
_SHARE = Maybe(float)
_ESTIMATE = {"value": Maybe(float), "low": Maybe(float), "high": Maybe(float)}

# A type stands for a value of it (int: never negative; float: any finite number), [shape] for a list of them.
COMPARISON: dict[str, Any] = {
    "title": str,
    "task": str,
    "baseline": str,
    "created": str,
    "commit": Maybe(str),
    "versions": Each(str),
    "judge": Maybe(
        {
            "kind": str,
            "name": str,
            "prompt": Maybe(str),
            "orders": OneOf(("both", "one")),
            "ties": bool,
            "spent": Maybe(Each(Maybe(float))),
        }
    ),
    "measures": [
        {
            "key": str,
            "name": str,
            "unit": str,
            "digits": int,
            "better": Maybe(OneOf(("high", "low"))),
            "help": str,
        }
    ],
    "systems": [
        {
            "name": str,
            "method": str,
            "setting": Maybe(float),
            "policies": [str],
            "num_runs": int,
            "num_prompts": int,
            "values": Each(Maybe({**_ESTIMATE, "runs": [Maybe(float)]})),
            "judged": Maybe(
                {
                    **dict.fromkeys(("wins", "ties", "losses", "undecided"), int),
                    **dict.fromkeys(("worst_case", "best_case"), _SHARE),
                    **dict.fromkeys(("consistent", "consistent_low", "consistent_high"), _SHARE),
                    **dict.fromkeys(("first_slot_wins", "first_slot_p"), _SHARE),
                    "statuses": dict.fromkeys(STATUSES, int),
                }
            ),
            "warnings": [str],
        }
    ],
    "tests": [
        {
            **dict.fromkeys(("measure", "system_1", "system_2"), str),
            **dict.fromkeys(("difference", "low", "high", "p_value", "p_holm"), Maybe(float)),
            "num_prompts": int,
            "detectable": Maybe(float),
            "over": Maybe(str),
            "reason": Maybe(str),
        }
    ],
    "matches": [
        {
            **dict.fromkeys(("system_1", "system_2"), str),
            **_ESTIMATE,
            **dict.fromkeys(("wins", "ties", "losses", "undecided", "num_prompts"), int),
        }
    ],
    "ranking": Maybe(
        {
            "systems": [{"name": str, "elo": float, "low": Maybe(float), "high": Maybe(float)}],
            "anchor": Maybe(str),
            "num_comparisons": int,
            "warnings": [str],
        }
    ),
    "frontiers": [
        {
            "reward": str,
            "points": [
                {"system": str, "method": str, "kl": _ESTIMATE, "reward": _ESTIMATE, "on_front": bool}
            ],
        }
    ],
    "curves": [
        {
            "setting": str,
            "measure": str,
            "points": [{"system": str, "method": str, "setting": float, **_ESTIMATE}],
        }
    ],
    "examples": [
        {
            **dict.fromkeys(("id", "prompt_id", "prompt", "system"), str),
            "run": int,
            **dict.fromkeys(("baseline", "response_a", "response_b"), str),
            "ended_a": Maybe(bool),
            "ended_b": Maybe(bool),
            "prefix_a": int,
            "score": _SHARE,
            "consistent": Maybe(bool),
            "verdicts": [
                {
                    "order": OneOf(("ab", "ba")),
                    "status": OneOf(STATUSES),
                    "winner": Maybe(OneOf(("a", "b", "tie"))),
                    "text": Maybe(str),
                    "detail": str,
                }
            ],
            "suspicions_a": [str],
            "suspicions_b": [str],
            "values": Each(Maybe(float)),
        }
    ],
    "rollouts": [
        {
            "system": str,
            "step": int,
            **dict.fromkeys(("prompt", "prefix", "continuation"), str),
            "ended": Maybe(bool),
            "scores": Each(Maybe(float)),
        }
    ],
    "configs": Each(str),
    "hashes": Each(Each(str)),
}


def check_comparison(comparison: Any) -> None:
    """Raise DataError, with the path of the field, unless `comparison` has the shape and fits together.

    Fits together: keys of measures, names of systems and ids of examples are unique, every system has a value
    (or null) for every measure, and what names a measure names one of them. Fields beyond the shape are ignored.
    """
    _check(comparison, COMPARISON, "")
    for i, measure in enumerate(comparison["measures"]):
        if measure["digits"] > MAX_DIGITS:
            _refuse(f"measures[{i}].digits must be at most {MAX_DIGITS}, got {_short(measure['digits'])}")
    measures = [measure["key"] for measure in comparison["measures"]]
    _refuse_repeats(measures, "measures", "key")
    _refuse_repeats([system["name"] for system in comparison["systems"]], "systems", "name")
    _refuse_repeats([example["id"] for example in comparison["examples"]], "examples", "id")
    for i, system in enumerate(comparison["systems"]):
        for key in measures:
            if key not in system["values"]:
                _refuse(f"systems[{i}].values.{key} is missing; null stands for a value that there is not")
    for section, field in (("tests", "measure"), ("curves", "measure"), ("frontiers", "reward")):
        for i, row in enumerate(comparison[section]):
            if row[field] not in measures:
                _refuse(f"{section}[{i}].{field} must be the key of a measure, got {row[field]!r}")
    for i, example in enumerate(comparison["examples"]):
        if example["prefix_a"] > len(example["response_a"]):
            _refuse(
                f"examples[{i}].prefix_a must be at most the {len(example['response_a'])} characters of response_a, "
                f"got {example['prefix_a']}"
            )


def _refuse(message: str) -> None:
    raise DataError(f"the comparison cannot be shown: {message}. launch/compare.py writes one that can")


def _refuse_repeats(names: list[str], section: str, field: str) -> None:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            _refuse(f"{section}[{i}].{field} must be unique, {name!r} stood there before")
        seen.add(name)


def _check(value: Any, shape: Any, path: str) -> None:
    match shape:
        case Maybe():
            if value is not None:
                _check(value, shape.shape, path)
        case Each():
            _require(isinstance(value, Mapping), "a mapping", value, path)
            for key, item in value.items():
                _require(isinstance(key, str), "a mapping from text", key, path)
                _check(item, shape.shape, f"{path}.{key}")
        case OneOf():
            _require(value in shape.choices, "one of " + ", ".join(shape.choices), value, path)
        case dict():
            _require(isinstance(value, Mapping), "a mapping", value, path)
            for key, item in shape.items():
                if key not in value:
                    _refuse(f"{path}.{key} is missing".removeprefix("."))
                _check(value[key], item, f"{path}.{key}")
        case list():
            _require(isinstance(value, list | tuple), "a list", value, path)
            for i, item in enumerate(value):
                _check(item, shape[0], f"{path}[{i}]")
        case type():
            fits, name = _fits(value, shape)
            _require(fits, name, value, path)


def _fits(value: Any, kind: type) -> tuple[bool, str]:
    if kind is str:
        return isinstance(value, str), "text"
    if kind is bool:
        return isinstance(value, bool), "true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and number and value >= 0, "a whole number >= 0"
    return number and -MAX_NUMBER <= value <= MAX_NUMBER, "a finite number"


def _require(fits: bool, expected: str, value: Any, path: str) -> None:
    if not fits:
        _refuse(f"{path.removeprefix('.') or 'the whole'} must be {expected}, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:57]}..."
