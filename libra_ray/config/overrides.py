"""Changing a tree of frozen dataclasses by dotted names: the mechanics of `config.override`. Standard library only."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin


def with_changes[C](config: C, changes: Mapping[str, Any]) -> C:
    """A copy of `config` with dotted names replaced; text is converted to the field's type.

    Raises:
        ValueError: a name that does not exist (the message names its nearest neighbours), a value of the wrong type or choice.
    """
    known = leaf_types(type(config))
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or _same_ending(name, known) or sorted(known)[:5]
            raise ValueError(f"unknown configuration key {name!r}; did you mean {' or '.join(near)}?")
        config = _replaced(config, name.split("."), _converted(name, value, known[name]))
    return config


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted name of a configuration class with its annotation."""
    hints = typing.get_type_hints(cls)
    names: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            names |= leaf_types(typing.cast("type", hints[f.name]), f"{prefix}{f.name}.")
        else:
            names[prefix + f.name] = hints[f.name]
    return names


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, as trackers log them."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return flat


def flatten_mapping(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names, as JSON and YAML write them, to dotted ones; names already dotted stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_mapping(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _same_ending(name: str, known: Mapping[str, Any]) -> list[str]:
    return [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:3]


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return dataclasses.replace(config, **{head: _replaced(getattr(config, head), rest, value) if rest else value})


def _converted(name: str, value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin is Literal:
        if value not in get_args(annotation):
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, get_args(annotation)))}")
        return value
    if origin is tuple:
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"{name}={value!r} is not a list; write its items with commas between them")
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        return tuple(_converted(name, item, get_args(annotation)[0]) for item in items)
    if isinstance(annotation, types.UnionType):
        raise TypeError(f"{name}: union types are not supported in the configuration")
    return _scalar(name, value, annotation)


def _scalar(name: str, value: Any, kind: type) -> Any:
    wrong = ValueError(f"{name}={value!r} is not of type {kind.__name__}")
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        key = str(value).lower()
        if key not in words:
            raise ValueError(f"{name}={value!r} is not a yes or no; write true or false")
        return words[key]
    # Nearly everything has a text; YAML's empty value or a list was not meant as one.
    if isinstance(value, bool) or (kind is str and not isinstance(value, str | int | float)):
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and converted != value:
        raise wrong
    if kind is float and not math.isfinite(converted):
        raise ValueError(f"{name}={value!r} is not a finite number")
    return converted
