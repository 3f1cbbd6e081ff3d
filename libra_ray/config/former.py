"""Settings of earlier versions: what saved configurations mean by them, and what to give instead. Standard library only."""

from collections.abc import Mapping
from typing import Any

PICTURES = "sim.image_size"
RENAMED = {
    "control.planner_delay_steps": "delay.intent_steps",
    "control.intent_delay_steps": "delay.intent_steps",
    PICTURES: "data.image_size",
}
"""Former name -> present one, of the same meaning."""
FREEZE = "planner.freeze_backbone"
BACKBONE = ("planner.train_vision", "planner.train_language")
"""What `planner.freeze_backbone` kept as loaded: both `frozen`, or neither."""
CONDITION = "refiner.condition"
SYSTEM_OF = {"tokens": "libra", "features": "monolithic"}
"""What `refiner.condition` chose -> `model.system`."""
ALL = {
    "train.start_parts": ("planner", "refiner"),
    "evaluate.controllers": ("expert", "policy", "coarse_only", "zero_action"),
}
"""Setting -> how its default named all there was in the days of `refiner.condition`; now its default is empty and means all."""
BY_HAND = {"control.hold": "still", "anchor_refine.gripper": "last"}
"""Setting -> its default in the days of `sim.image_size`; where nothing is declared, today's `declared` means the same."""


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings by their dotted names, in the words of this version; other names stay as they are."""
    found = {RENAMED.get(name, name): value for name, value in settings.items()}
    if found.pop(FREEZE, False):
        found |= dict.fromkeys(BACKBONE, "frozen")
    if PICTURES in settings:
        found |= {name: "declared" for name, default in BY_HAND.items() if found.get(name) == default}
    if CONDITION in found:
        found["model.system"] = SYSTEM_OF.get(found.pop(CONDITION), "libra")
        found |= {name: () for name, everything in ALL.items() if tuple(found.get(name, ())) == everything}
    return found


def refuse_former(settings: Mapping[str, Any]) -> None:
    """Refuse names of earlier versions.

    Raises:
        ValueError: names the present setting.
    """
    for name, value in settings.items():
        if name in RENAMED:
            raise ValueError(f"{name} has another name now; give {RENAMED[name]}={value}")
        if name == FREEZE:
            raise ValueError(f"{name} is now {' and '.join(BACKBONE)}; give both full, frozen or lora")
        if name == CONDITION:
            raise ValueError(f"{name} is now model.system; give model.system={SYSTEM_OF.get(value, 'libra')}")
