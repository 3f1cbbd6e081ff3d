"""A configuration as it is saved, and read again by this version and later ones. Standard library only."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libra_ray.config.former import upgraded
from libra_ray.config.overrides import flatten_mapping
from libra_ray.config.tree import Config, override


def to_json(config: Config) -> str:
    """The configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote; see `from_tree`."""
    return from_tree(json.loads(text))


def read_saved(path: Path) -> Config:
    """The configuration in the file that `to_json` was written to; see `from_tree`.

    Raises:
        ValueError: it cannot be read, holds something else, or a setting or value that there is none of; names the file.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no configuration that can be used ({error}); restore it, or run again") from error


def from_tree(tree: Mapping[str, Any]) -> Config:
    """The configuration of a saved tree, also one of an earlier version.

    Raises:
        ValueError: a setting that neither this version nor an earlier one has, or a value that is none; as `override`.
    """
    return override(Config(), upgraded(flatten_mapping(tree)))
