"""What the docstring below each setting says, for `--help`. Standard library only."""

import ast
import inspect
import itertools
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass


def docstrings(cls: type, prefix: str = "") -> dict[str, str]:
    """The docstring below each attribute of a configuration class, by dotted name; on one line each."""
    hints = typing.get_type_hints(cls)
    texts: dict[str, str] = {}
    for name, text in _attribute_docstrings(cls):
        texts[prefix + name] = text
    for name, hint in hints.items():
        if is_dataclass(hint):
            texts |= docstrings(typing.cast("type", hint), f"{prefix}{name}.")
    return texts


def _attribute_docstrings(cls: type) -> Iterator[tuple[str, str]]:
    body = typing.cast("ast.ClassDef", ast.parse(inspect.getsource(cls)).body[0]).body
    for setting, text in itertools.pairwise(body):
        if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name) and isinstance(text, ast.Expr):
            value = text.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield setting.target.id, " ".join(value.value.split())
