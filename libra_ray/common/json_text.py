"""Records and JSON: the one way from a frozen dataclass to JSON text, and back with the file and the field named.

A record's fields are the keys, in their order, but for `Flat` records and fields with the metadata `ABSENT`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BeforeValidator, GetCoreSchemaHandler, TypeAdapter, ValidationError

ABSENT: Mapping[str, bool] = {"absent": True}
"""Metadata of a field that JSON leaves out where it is None: `field(default=None, metadata=ABSENT)`."""


class Flat:
    """Base of records whose last field is a mapping that lies flat in JSON: its keys stand beside the other fields.

    Read back, it takes every key that no other field has.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """How pydantic reads the record: gathers the last field first."""
        *own, last = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every subclass is a dataclass

        def gather(tree: Any) -> Any:
            if not isinstance(tree, dict):
                return tree
            return {k: v for k, v in tree.items() if k in own} | {last: {k: v for k, v in tree.items() if k not in own}}

        return BeforeValidator(gather).__get_pydantic_core_schema__(source, handler)


def plain(value: Any) -> Any:
    """The value as strict JSON has it: records become objects, numpy becomes plain, what is not finite becomes None.

    Raises:
        TypeError: a value that JSON has no word for.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return _object(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a report")


def _object(record: Any) -> dict[str, Any]:
    items = [(f, getattr(record, f.name)) for f in fields(record)]
    tree = {f.name: plain(value) for f, value in items if not (value is None and f.metadata == ABSENT)}
    return tree | tree.pop(items[-1][0].name) if isinstance(record, Flat) else tree


def dump(value: Any) -> str:
    """A record, or any other tree, as indented strict JSON text."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def parse[T](kind: type[T], text: str | bytes, source: str) -> T:
    """The record that `dump` or `plain` wrote, of this version or an earlier one; keys that it does not know are passed over.

    Args:
        kind: a record, or a collection of some.
        text: JSON, which is in UTF-8 or else a mistake.
        source: where it comes from, for the message.

    Raises:
        ValueError: one line with the source, the field and what it should be.
    """
    try:
        record: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]  # types are hashable
        return record
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{source}: {place}{': ' if place else ''}{fault['msg'].removeprefix('Value error, ')}") from None


def read[T](kind: type[T], path: Path) -> T:
    """The record in a file; see `parse`.

    Raises:
        ValueError: it holds something else; names the file and the field.
    """
    return parse(kind, path.read_bytes(), str(path))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
