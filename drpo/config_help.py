"""The keys of a recipe with their types, defaults and help texts, and the `--help` page that lists them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Literal, get_origin, get_type_hints

hints_of = functools.cache(get_type_hints)
"The types of a section's settings by name; they are compiled from text, which would take a third of reading a recipe."


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of a recipe, as `--help` shows it."""

    key: str
    type: str
    default: object
    help: str
    bounds: str = ""


def options(recipe_class: type, prefix: str = "", defaults: object | None = None) -> Iterator[Option]:
    """Yield every key of a recipe class, depth first, in the order of the source.

    Defaults are those of the instance `defaults` if given, since a section may set other defaults than its class.
    """
    helps = _field_docs(recipe_class)
    hints = hints_of(recipe_class)
    for field in dataclasses.fields(recipe_class):
        hint = hints[field.name]
        default = default_of(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            section = default if dataclasses.is_dataclass(default) else None
            yield from options(hint, f"{prefix}{field.name}.", section)
        else:  # the choices of an alias, otherwise as written
            shown = str(hint).removeprefix("typing.") if get_origin(hint) is Literal else str(field.type)
            yield Option(prefix + field.name, shown, default, helps.get(field.name, ""), bounds_text(field))


def default_of(field: dataclasses.Field) -> object:
    """Return the default of a field, or "required" without one."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def bounds_text(field: dataclasses.Field) -> str:
    """Return the bounds that `setting` gave a field, as ">= 0 and < 1"; empty without bounds."""
    bounds = field.metadata.get("bounds", {})
    return " and ".join(
        f"{sign} {limit:{'' if isinstance(limit, int) else 'g'}}" for sign, limit in bounds.items()
    )


def help_text(recipe_class: type, usage: str) -> str:
    """Return the `--help` page: usage, then the sections, each key with type, default and help.

    A section lists its own keys, and its subsections follow it.
    """
    sections: dict[str, list[Option]] = {}
    for option in options(recipe_class):
        path = option.key.split(".")[:-1]
        for depth in range(len(path) + 1):  # a section's first key may be in a subsection
            section = sections.setdefault(".".join(path[:depth]), [])
        section.append(option)
    lines = [usage, ""]
    for name, section in sections.items():
        lines += [f"\n[{name or 'top level'}]"] * bool(section)
        for option in section:
            kind = f"{option.type} {option.bounds}".rstrip()
            lines.append(f"  {option.key}  ({kind}; default {json.dumps(option.default, default=str)})")
            lines += textwrap.wrap(option.help, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _field_docs(config_class: type) -> dict[str, str]:
    """Return the string literals directly under the fields of a dataclass and its bases, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for statement, following in zip(body, body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                    docs[name] = " ".join(str(text).split())
    return docs
