"""A package as a table of contents: names that are imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, contents: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package from name -> module. It raises AttributeError, listing the names."""

    def get(name: str) -> Any:
        if name not in contents:
            raise AttributeError(f"{package} has no {name}; it has {', '.join(contents)}")
        return getattr(import_module(contents[name]), name)

    return get
