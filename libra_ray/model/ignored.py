"""Settings that were given and mean nothing to the policy: nothing of them is refused, and none passed over in silence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from libra_ray.config import PRESETS, Config, preset
from libra_ray.config.checks import counts_of
from libra_ray.config.overrides import flatten
from libra_ray.model.registry import system_class
from libra_ray.types import Level

OF_SYSTEMS = (
    "action.bins", "planner.", "refiner.", "coarse_to_fine.", "anchor_refine.", "hierarchy.", "experts.", "train.lambda_plan",
    "train.lambda_diff", "train.curriculum", "train.tau",
)  # fmt: skip
"""Settings that mean something to some systems: names, or beginnings that end with a dot."""
OF_WINDOWS = ("refiner.max_staleness", "hierarchy.subgoals")
"""Of these, what training windows are cut by, whatever the system."""
OF_INTENTS = ("control.rule", "control.max_intent_age_steps", "delay.intent_steps", "delay.lost_share", "delay.reordered_share")
"""Settings of intents: without a level above the last there are none."""
OF_CURRICULA = ("train.curriculum", "train.tau")
"""Settings of what levels read while they learn together."""
WAYS = (
    "planner.train_vision",
    "planner.train_language",
    "planner.train_head",
    "refiner.train_encoder",
    "refiner.train_transformer",
)
"""Settings of how parts train."""


class Need(NamedTuple):
    """Without what other setting one means nothing: in words, and whether all settings together give it."""

    words: str
    met: Callable[[Mapping[str, Any]], bool]


BY_LORA = Need("without a part that trains by lora", lambda s: any(s[way] == "lora" for way in WAYS))
OF_RECORDING: Mapping[str, Need] = {
    "record.": Need("beside data.root", lambda s: not s["data.root"]),
    "record.noise_std": Need("without record.noise_share above 0", lambda s: s["record.noise_share"] > 0),
    "record.noise_share": Need("without record.noise_std above 0", lambda s: s["record.noise_std"] > 0),
    "record.episodes_per_task": Need(
        "where record.episodes_of counts every task",
        lambda s: not {*s["sim.tasks"]} <= counts_of(s["record.episodes_of"]).keys(),
    ),
}
OF_TRAINING: Mapping[str, Need] = {
    "train.start_parts": Need("without train.start_from", lambda s: bool(s["train.start_from"])),
    "train.balance_memory": Need("without train.balance=gradient", lambda s: s["train.balance"] == "gradient"),
    "train.validate_every": Need("without data.holdout_share above 0", lambda s: s["data.holdout_share"] > 0),
}
OF_NETWORKS: Mapping[str, Need] = {
    "train.checkpointing": Need(
        "without a pretrained planner.backbone or refiner.encoder",
        lambda s: (s["planner.backbone"], s["refiner.encoder"]) != ("tiny", "conv"),
    ),
    "model.lora_rank": BY_LORA,
    "model.lora_alpha": BY_LORA,
}
"""Of our own systems; one of a user's may have other networks."""
OF_EVALUATION: Mapping[str, Need] = {
    "delay.seed": Need(
        "without delay.trace, delay.lost_share or delay.reordered_share",
        lambda s: bool(s["delay.trace"] or s["delay.lost_share"] or s["delay.reordered_share"]),
    ),
    "evaluate.gpus_per_replica": Need("without ray.use_gpu=true", lambda s: bool(s["ray.use_gpu"])),
}
"""Settings, or beginnings that end with a dot, and what each of them needs."""


def remarks_in_recording(config: Config) -> list[str]:
    """What recording does not depend on of the given settings, one line for each reason."""
    return _remarks(config, OF_RECORDING)


def remarks_in_training(config: Config) -> list[str]:
    """Of which given settings training does not depend for want of another one, one line for each reason."""
    follows = system_class(config.model.system).follows(config)
    return _remarks(config, OF_TRAINING if follows is None else {**OF_TRAINING, **OF_NETWORKS})


def remarks_in_evaluation(config: Config) -> list[str]:
    """Of which given settings evaluation does not depend for want of another one, one line for each reason."""
    return _remarks(config, OF_EVALUATION)


def ignored_in_training(config: Config, *, apart: bool) -> list[str]:
    """The given settings that training a policy of this configuration does not depend on, by their names.

    Given is what differs from the preset.

    Args:
        apart: whether some levels learn without the others.
    """
    return without_effect(given(config, OF_SYSTEMS), config, apart=apart)


def without_effect(names: Iterable[str], config: Config, *, apart: bool = False) -> list[str]:
    """Those of the named settings that training a policy of this configuration does not depend on, whatever their values.

    Args:
        apart: as in `ignored_in_training`.
    """
    followed = system_class(config.model.system).follows(config)
    if followed is None:
        return []
    known = [name for name in followed if not (apart and name in OF_CURRICULA)]
    return [name for name in names if _among(name, OF_SYSTEMS) and not _among(name, (*known, *OF_WINDOWS))]


def ignored_in_evaluation(config: Config, levels: Sequence[Level]) -> list[str]:
    """The given settings that driving robots by a policy of these levels does not depend on, by their names."""
    found = given(config, OF_INTENTS) if len(levels) == 1 else []
    if config.delay.trace:
        found += [name for name in given(config, ("delay.intent_steps", "delay.chunk_steps")) if name not in found]
    else:
        found += given(config, ("delay.control_hz",))
    return found


def ignored_beside(config: Config, trained: Config) -> list[str]:
    """The given settings of networks in whose place a checkpoint has other values of its own, by their names."""
    own, now = flatten(trained), flatten(config)
    return [name for name in given(config, (*OF_SYSTEMS, "action.", "model.")) if own[name] != now[name]]


def remark(names: Sequence[str], config: Config, why: str) -> str:
    """That settings have no effect, in one line."""
    values = flatten(config)
    return f"no effect {why}: {', '.join(f'{name}={_said(values[name])}' for name in names)}"


def _remarks(config: Config, needs: Mapping[str, Need]) -> list[str]:
    """The first reason of each setting that was given, and is not turned off anyway."""
    values, found = flatten(config), dict[str, list[str]]()
    for name in given(config, tuple(needs)):
        missing = [need.words for key, need in needs.items() if _among(name, (key,)) and not need.met(values)]
        if missing and values[name]:
            found.setdefault(missing[0], []).append(name)
    return [remark(names, config, words) for words, names in found.items()]


def given(config: Config, names: Sequence[str]) -> list[str]:
    """Those of the settings that differ from the preset; a name that ends with a dot stands for all that begin so."""
    usual = flatten(preset(config.preset) if config.preset in PRESETS else Config())
    return [name for name, value in flatten(config).items() if value != usual[name] and _among(name, names)]


def _among(name: str, names: Sequence[str]) -> bool:
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in names)


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
