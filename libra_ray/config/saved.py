"""A configuration as it is saved, and read again by this version and later ones. Standard library only."""

import dataclasses
import json
from collections.abc import Mapping
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


def from_tree(tree: Mapping[str, Any]) -> Config:
    """The configuration of a saved tree, also one of an earlier version.

    Raises:
        ValueError: a setting that neither this version nor an earlier one has, or a value that is none; as `override`.
    """
    return override(Config(), upgraded(flatten_mapping(tree)))
