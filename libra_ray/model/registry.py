"""The systems by name: what `model.system` may be. Loads a system's module, and torch, only when one is made."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from libra_ray.config import Config

if TYPE_CHECKING:
    from libra_ray.model.system import System
    from libra_ray.types import Level, RobotShape

SYSTEMS = {
    "libra": "libra_ray.model.libra:Libra",
    "monolithic": "libra_ray.model.monolithic:Monolithic",
    "regression": "libra_ray.model.regression:Regression",
    "coarse_to_fine": "libra_ray.model.coarse_to_fine:CoarseToFine",
    "anchor_refine": "libra_ray.model.anchor_refine:AnchorRefine",
    "experts": "libra_ray.model.experts:Experts",
    "hierarchy": "libra_ray.model.hierarchy:Hierarchy",
}
"""Name -> `module:Class`. A system of one's own is given in this form as `model.system`, without an entry here."""


LONGEST_REASON = 300


def check_name(name: str) -> None:
    """Refuse what can be no system.

    Raises:
        ValueError: names the systems.
    """
    module, colon, cls = name.partition(":")
    if name not in SYSTEMS and not (colon and cls.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(
            f"model.system={name!r} is none of {', '.join(SYSTEMS)}, nor the address of a class of yours, package.module:Class"
        )


def system_class(name: str) -> "type[System]":
    """The class of a system.

    Raises:
        ValueError: there is none of that name, or at that address; or its module raises something.
    """
    from libra_ray.model.system import System

    check_name(name)
    module, _, cls = SYSTEMS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (Exception, SystemExit) as error:
        # A module of a user's own may raise anything, or be a program.
        raise ValueError(f"model.system={name!r} cannot be loaded ({said(error)}); systems are {', '.join(SYSTEMS)}") from error
    if not (isinstance(found, type) and issubclass(found, System)):
        raise ValueError(f"model.system={name!r} is no subclass of libra_ray.model.system.System")
    return found


def make_system(config: Config, shape: "RobotShape", folder: Path | None = None) -> "System":
    """The configured system with random weights, as it trains: some of its parts may be frozen or have adapters.

    Args:
        folder: a checkpoint whose architectures replace the configured sources of pretrained parts. Then it is as it runs,
            without adapters.

    Raises:
        ValueError: it cannot be made of this configuration. Of a system of a user's own, whatever its constructor raises.
    """
    from libra_ray.model.parts.adapters import adapt

    name = config.model.system
    cls = system_class(name)
    try:
        system = cls(config, shape, folder)
        check_system(system)
        if folder is None:
            adapt(system, config.model)
    except Exception as error:
        if name in SYSTEMS:
            raise
        raise ValueError(f"model.system={name!r} cannot be made ({said(error)}); see docs/systems.md") from error
    return system


def check_system(system: "System") -> None:
    """Refuse a system that breaks its own promises, before anything is trained.

    Raises:
        ValueError: names what is wrong.
    """
    from libra_ray.types import check_levels

    check_levels(system.levels)
    name, balance = system.config.model.system, system.config.train.balance
    upper = [level.name for level in system.levels[:-1]]
    if sorted(system.intents) != sorted(upper):
        raise ValueError(
            f"model.system={name} has intents of {', '.join(system.intents)}, levels above the last: {', '.join(upper)}"
        )
    if balance != "fixed" and not all(map(system.schedule().learns, system.parts())):
        raise ValueError(
            f"train.balance={balance} weighs losses that are learned together, those of model.system={name} are learned one "
            "after another; give fixed"
        )


def lengthening(config: Config, levels: "Sequence[Level]") -> dict[str, tuple[str, int]]:
    """By the name of each level that a setting lengthens: that setting, and the steps that one more of it adds.

    Args:
        config: what the levels were made of.
    """
    system = system_class(config.model.system)
    found = {level.name: system.lengthened_by(config, level, acts=level is levels[-1]) for level in levels}
    return {name: setting for name, setting in found.items() if setting is not None}


def said(error: BaseException) -> str:
    """What was raised, as part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
