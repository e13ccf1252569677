"""Recipes: one YAML file plus `key=value` overrides, merged strictly into frozen dataclasses.

A config dataclass is a frozen `Section` in the file that reads it. The string literal under each field is its help
text; `setting` declares the bounds of a number; `check` holds the rules between fields. `--help` prints all keys with
defaults and bounds, and errors name the full key: a section does not know its place in the recipe, the loader does.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import operator
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drpo.config_help import bounds_text, default_of, hints_of, options
from drpo.config_kinds import as_kind, kind_text
from drpo.versions import git_commit, package_versions
from drpo.yaml_words import kind_at, quote_words

Recipe = TypeVar("Recipe")
Function = TypeVar("Function", bound=Callable[..., Any])

COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}

_PREFIX: ContextVar[str] = ContextVar("prefix", default="")
"Place of the section that is being made: `rollout.sampling.`"


class ConfigError(ValueError):
    """Error in a recipe or an override; the message names the full key."""


# --- sections -------------------------------------------------------------------------------------------


def key(name: str) -> str:
    """Return the full key of a setting: `horizon` -> `kl.horizon`, while its section is made and in `names_keys`."""
    return _PREFIX.get() + name


def setting(
    default: float | None,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare a field whose number, if not None, must lie within bounds: `num_epochs: int = setting(4, ge=1)`.

    Args:
        default: the value without a setting.
        ge, gt, le, lt: limits that the number must be >=, >, <= or < than; None leaves a side open.
    """
    limits = zip(COMPARISONS, (ge, gt, le, lt), strict=True)
    bounds = {sign: limit for sign, limit in limits if limit is not None}
    return dataclasses.field(default=default, metadata={"bounds": bounds})


class Section:
    """Base of config dataclasses: takes nested sections as mappings too, checks types and bounds, then does `check`."""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            hint, place, value = hints[field.name], key(field.name), getattr(self, field.name)
            if _section_class(hint) is not None:
                value = _as_sections(hint, value, place, default_of(field))
            else:
                value = _as_kind(value, hint, place)
            object.__setattr__(self, field.name, value)
            _check_finite(value, place)
            bounds = field.metadata.get("bounds", {}) if value is not None else {}
            if not all(COMPARISONS[sign](value, limit) for sign, limit in bounds.items()):
                or_null = " or null" if type(None) in get_args(hint) else ""
                raise ConfigError(f"{place} must be {bounds_text(field)}{or_null}, got {value}")
        _place(self, _PREFIX.get())
        self.check()

    def check(self) -> None:
        """Raise ConfigError, naming `key(...)` of the wrong setting, for an invalid combination of settings."""

    def changed(self) -> list[str]:
        """Return the names of the settings that differ from their defaults, in the order of the source."""
        fields = dataclasses.fields(self)
        return [field.name for field in fields if getattr(self, field.name) != default_of(field)]


def _place(value: Any, prefix: str) -> None:
    """Note its place in every section of a value; that of the outermost section is noted last, and stays."""
    if isinstance(value, Section):
        object.__setattr__(value, "_prefix", prefix)
        for field in dataclasses.fields(value):
            _place(getattr(value, field.name), f"{prefix}{field.name}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _place(item, f"{prefix.removesuffix('.')}[{index}].")
    elif isinstance(value, dict):
        for name, item in value.items():
            _place(item, f"{prefix}{name}.")


def replaced(section: Recipe, **changes: Any) -> Recipe:
    """Return a copy with other values, at the same place in the recipe."""
    copy = dataclasses.replace(section, **changes)
    _place(copy, section._prefix)
    return copy


def names_keys(function: Function) -> Function:
    """Let `key`, while the function runs, return the full keys of settings of the section among its arguments."""

    @functools.wraps(function)
    def with_keys(*args: Any, **kwargs: Any) -> Any:
        section = next(value for value in (*args, *kwargs.values()) if isinstance(value, Section))
        before = _PREFIX.set(section._prefix)
        try:
            return function(*args, **kwargs)
        finally:
            _PREFIX.reset(before)

    return with_keys


def refuse(condition: bool, name: str, rule: str) -> None:
    """Raise ConfigError `<full key of name> <rule>` if `condition`."""
    if condition:
        raise ConfigError(f"{key(name)} {rule}")


def refuse_changed(section: Section, names: Collection[str], rule: str, within: str = "") -> None:
    """Raise ConfigError `<full key> <rule>` for the first of `names` that is not at its default in `section`.

    `within` is the place of that section in the one that is being checked: `critic.`.
    """
    for name in section.changed():
        refuse(name in names, within + name, rule)


def make_section(
    section: type[Recipe], values: Mapping[str, Any], prefix: str = "", default: Recipe | None = None
) -> Recipe:
    """Make a section from a mapping over `default`, as strictly as from a recipe file.

    `prefix` is the place of the section, dot included: `rollout.`. Raises ConfigError naming the full key.
    """
    defaults = _unlocked(OmegaConf.structured(section if default is None else default))
    try:
        layer = OmegaConf.create(dict(values))
        _check_kinds(layer, defaults, prefix)
        return _made(OmegaConf.merge(defaults, layer), prefix)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, section, prefix=prefix)) from None


def _section_class(hint: Any) -> type | None:
    """Return the section class of a field that holds one, an optional one, or a list or mapping of them."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := _section_class(part)) is not None), None)


def _as_sections(hint: Any, value: Any, place: str, default: Any = None) -> Any:
    """Replace mappings by sections in the value of a field that holds sections; `place` is its full key."""
    section, container = _section_class(hint), get_origin(hint)
    if container is list and isinstance(value, list | tuple):
        return [_as_sections(section, item, f"{place}[{i}]") for i, item in enumerate(value)]
    if container is dict and isinstance(value, Mapping):
        return {name: _as_sections(section, item, f"{place}.{name}") for name, item in value.items()}
    if container in (list, dict):
        raise ConfigError(f"{place} must be a {container.__name__} of sections, got {value!r}")
    if isinstance(value, Mapping):
        return make_section(section, value, f"{place}.", default if isinstance(default, section) else None)
    if not (isinstance(value, section) or value is None and type(None) in get_args(hint)):
        raise ConfigError(_no_section(section, value, place))
    return value


def _as_kind(value: Any, hint: Any, place: str) -> Any:
    try:
        return as_kind(value, hint)
    except TypeError:
        raise ConfigError(f"{place} must be {kind_text(hint)}, got {value!r}") from None


def _no_section(section: type, value: Any, place: str) -> str:
    keys = ", ".join(f"{place}.{field.name}" for field in dataclasses.fields(section))
    return f"{place} is a section, found {value!r}; known keys there: {keys}"


def _made(value: Any, prefix: str) -> Any:
    """Make the dataclasses of a merged node, inner sections first, each under its full prefix, dot included."""
    if OmegaConf.is_list(value):
        return [_made(value[i], f"{prefix.removesuffix('.')}[{i}].") for i in range(len(value))]
    if not OmegaConf.is_dict(value):
        return value
    is_section = dataclasses.is_dataclass(section := OmegaConf.get_type(value))
    values = {
        name: None
        if is_section and OmegaConf.is_missing(value, name)
        else _made(value[name], f"{prefix}{name}.")
        for name in value
    }
    if not is_section:
        return values
    before = _PREFIX.set(prefix)
    try:
        return section(**values)
    finally:
        _PREFIX.reset(before)


# --- loading --------------------------------------------------------------------------------------------


def load_recipe(recipe_class: type[Recipe], path: Path | None, overrides: Sequence[str]) -> Recipe:
    """Merge defaults < recipe file < overrides (`section.key=value`), and validate every value.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type, or a value that the
    section's bounds or `check` refuse.
    """
    defaults = _defaults(recipe_class)
    layers = [] if path is None else [_read_recipe(Path(path), recipe_class)]
    assignments = []
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"{override!r} is not an override: write section.key=value")
        assignments.append(f"{name}={quote_words(value, kind_at(recipe_class, name))}")
    try:
        layers.append(OmegaConf.from_dotlist(assignments))
        for layer in layers:
            _check_kinds(layer, defaults)
        return _made(OmegaConf.merge(defaults, *layers), "")
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, recipe_class, path)) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(error)) from None


def _check_kinds(layer: DictConfig, defaults: DictConfig, prefix: str = "") -> None:
    """Raise ConfigError for a section without keys or a list that is none; merging would not name the key."""
    for name in list(layer):
        if name not in defaults:
            retired = getattr(OmegaConf.get_type(defaults), "RETIRED", {})
            if name in retired and layer._get_node(name)._is_none():
                del layer[name]  # a recipe that was saved with it unset
            elif name in retired:
                raise ConfigError(f"{prefix}{name} {retired[name]}")
            continue  # the merge names unknown keys
        place, value, default = f"{prefix}{name}", layer._get_node(name), defaults._get_node(name)
        if OmegaConf.is_dict(default) and dataclasses.is_dataclass(section := OmegaConf.get_type(default)):
            if not OmegaConf.is_dict(value):
                raise ConfigError(_no_section(section, layer[name], place))
            _check_kinds(value, default, f"{place}.")
        elif OmegaConf.is_dict(default) and OmegaConf.is_list(value):
            raise ConfigError(f"{place} is a mapping, written {place}.name=value, found a list: {value}")
        elif OmegaConf.is_list(default) and OmegaConf.is_list(value):
            _check_items(value, default._metadata.element_type, place)
        elif OmegaConf.is_list(default) and not (value._is_none() or value._is_interpolation()):
            shown = f"keys: {', '.join(map(str, value))}" if OmegaConf.is_dict(value) else repr(layer[name])
            raise ConfigError(f"{place} is a list, written {place}=[a,b], found {shown}")


def _check_items(items: ListConfig, item_class: type, key: str) -> None:
    """Check list items one by one; merging the whole list would name neither item nor key in an error."""
    for index in range(len(items)):
        item, place = items._get_node(index), f"{key}[{index}]"
        if dataclasses.is_dataclass(item_class):
            if not OmegaConf.is_dict(item):
                raise ConfigError(_no_section(item_class, items[index], place))
            defaults = _defaults(item_class)
            _check_kinds(item, defaults, f"{place}.")
            try:
                OmegaConf.merge(defaults, item)
            except OmegaConfBaseException as error:
                raise ConfigError(_explain(error, item_class, prefix=f"{place}.")) from None
        elif item_class in (str, int, float, bool) and OmegaConf.is_config(item):
            raise ConfigError(f"{place} must be one value, found {item}")


def _check_finite(value: Any, place: str) -> None:
    """Raise ConfigError for inf or nan, which would pass range checks, since comparisons with nan are false."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place} is {value}; give a finite number, or null where it may be off")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_finite(inner, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_finite(inner, f"{place}[{index}]")


@functools.cache
def _defaults(section: type) -> DictConfig:
    """Return a section's defaults to be merged into, which copies them; making them takes as long as all the rest."""
    return _unlocked(OmegaConf.structured(section))


def _unlocked(node: DictConfig) -> DictConfig:
    """Make the read-only nodes of frozen dataclasses writable at every level, as merging needs them."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        child = node._get_node(name)
        if OmegaConf.is_dict(child) and not child._is_none():
            _unlocked(child)
    return node


def _read_recipe(path: Path, recipe_class: type) -> DictConfig:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path(".")
        names = ", ".join(sorted(file.name for file in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"no recipe {path}; the YAML files in {folder}/ are: {names}")
    try:
        node = OmegaConf.load(io.StringIO(quote_words(path.read_text(encoding="utf-8"), recipe_class)))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{path} must hold a mapping of sections, found {type(node).__name__}")
    return node


def _explain(error: OmegaConfBaseException, section: type, path: Path | None = None, prefix: str = "") -> str:
    key = error.full_key or ""
    where = f" (recipe {path} or an override)" if path else ""
    place = f"{prefix}{key}".rstrip(".")
    message = f"{place}: " * bool(place) + str(error).splitlines()[0] + where
    known = [option.key for option in options(section)]
    if key and key.partition("[")[0] not in known:
        level = key.rpartition(".")[0] + "." if "." in key else ""
        inside = [name.removeprefix(level) for name in known if name.startswith(level)]
        siblings = dict.fromkeys(prefix + level + name.partition(".")[0] for name in inside)
        message += f"\nknown keys there: {', '.join(siblings)}"
    return message


# --- saving ---------------------------------------------------------------------------------------------


def save_resolved(recipe: object, path: Path) -> None:
    """Write the resolved recipe as YAML that can be loaded again, with versions and commit on top."""
    header = {"git_commit": git_commit(), "python": platform.python_version()} | package_versions()
    lines = [f"# {name}: {value}" for name, value in header.items()]
    Path(path).write_text("\n".join(lines) + "\n" + resolved_yaml(recipe))


def resolved_yaml(recipe: object) -> str:
    """Return every setting of a recipe as YAML that can be loaded again."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))
