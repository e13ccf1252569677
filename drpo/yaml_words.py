"""Keep YAML scalars as text where a recipe's type is text.

YAML 1.1 reads a bare no, off, yes or on as a truth value and 007 or 1.10 as a number. Where the recipe's type is
text, such scalars are quoted before parsing, so that their spelling is kept.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from drpo.config_help import hints_of

NULLS = ("", "~", "null", "Null", "NULL")


def quote_words(text: str, kind: Any) -> str:
    """Quote the plain scalars of a YAML value of the type `kind` where that type is text.

    null stays null. Invalid YAML is returned unchanged, and its parser raises.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    places = {node.end_mark.index: node.value for node in _texts(root, kind, set())}
    for end in sorted(places, reverse=True):
        word = places[end]
        start = end - len(word)
        if text[start:end] == word:  # otherwise it spans several lines, and is text
            text = f"{text[:start]}'{word.replace(chr(39), 2 * chr(39))}'{text[end:]}"
    return text


def kind_at(kind: Any, key: str) -> Any:
    """Return the type at `section.list[0].name` within the type `kind`, or None where it is unknown."""
    for name in filter(None, re.split(r"[.\[\]]+", key)):
        kind = _known(kind)
        if dataclasses.is_dataclass(kind):
            kind = hints_of(kind).get(name)
        else:
            kind = get_args(kind)[-1] if get_origin(kind) in (list, dict) else None
    return kind


def _texts(node: yaml.Node | None, kind: Any, seen: set[tuple[int, str]]) -> Iterator[yaml.ScalarNode]:
    """Yield the plain scalars of a YAML tree whose type in `kind` is text."""
    if node is None or (id(node), str(kind)) in seen:  # an alias repeats its node
        return
    seen.add((id(node), str(kind)))
    kind = _known(kind)
    if isinstance(node, yaml.ScalarNode):
        if _is_text(kind) and node.style is None and node.value not in NULLS:
            yield node
    elif isinstance(node, yaml.SequenceNode) and get_origin(kind) is list:
        for item in node.value:
            yield from _texts(item, get_args(kind)[0], seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _texts(merged, kind, seen)
            elif dataclasses.is_dataclass(kind):
                yield from _texts(value, hints_of(kind).get(str(key.value)), seen)
            elif get_origin(kind) is dict:
                for part, its_kind in zip((key, value), get_args(kind), strict=True):
                    yield from _texts(part, its_kind, seen)


def _known(kind: Any) -> Any:
    """Return a type without None."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [part for part in get_args(kind) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else None
    return kind


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return kind is str
