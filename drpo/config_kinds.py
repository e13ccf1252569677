"""Values of the kind that a setting's type allows, for settings that are given as Python objects."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def as_kind(value: Any, hint: Any) -> Any:
    """Return a value as one of the type `hint`; raise TypeError where it is none.

    As a recipe file would give it: a number of NumPy as Python's, a path as text, a tuple as a list. Whole numbers are
    numbers, truth values are neither. Types that are not listed here, such as sections, allow anything.
    """
    origin, parts = get_origin(hint), get_args(hint)
    is_bool = isinstance(value, bool)
    if origin is Literal:
        for choice in parts:
            if value == choice and is_bool == isinstance(choice, bool):
                return choice
    elif origin in (Union, types.UnionType):
        for part in parts:
            try:
                return as_kind(value, part)
            except TypeError:
                continue
    elif origin is list and isinstance(value, list | tuple):
        return [as_kind(item, parts[0]) for item in value]
    elif origin is dict and isinstance(value, Mapping):
        return {name: as_kind(item, parts[1]) for name, item in value.items()}
    elif hint is int and isinstance(value, Integral) and not is_bool:
        return int(value)
    elif hint is float and isinstance(value, Real) and not is_bool:
        return value if type(value) is int else float(value)
    elif hint is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    elif hint in (bool, types.NoneType):
        if isinstance(value, hint):
            return value
    elif origin is None and hint not in WORDS:
        return value
    raise TypeError(f"{value!r} is not {kind_text(hint)}")


def kind_text(hint: Any) -> str:
    """Return a type in words, as in "must be a number or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(kind_text, parts))
    if origin in (list, dict):
        items = f" whose items are each {kind_text(parts[-1])}" * (parts[-1] is not Any)
        return f"a {'list' if origin is list else 'mapping'}{items}"
    return WORDS.get(hint, str(hint))
