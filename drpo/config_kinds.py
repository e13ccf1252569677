"""Whether a value is of the kind that a setting's type allows, for settings that are given as Python objects."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def is_of_kind(value: Any, hint: Any) -> bool:
    """Return whether a value is of the type `hint`; types that are not listed here, such as sections, allow anything.

    Whole numbers are numbers, truth values are neither, and a path is text.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in parts)
    if origin in (Union, types.UnionType):
        return any(is_of_kind(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list | tuple) and all(is_of_kind(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(is_of_kind(item, parts[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return isinstance(value, hint) if hint in WORDS else True


def kind_text(hint: Any) -> str:
    """Return a type in words, as in "must be a number or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(kind_text, parts))
    if origin in (list, dict):
        return f"a {'list' if origin is list else 'mapping'} whose items are each {kind_text(parts[-1])}"
    return WORDS.get(hint, str(hint))
