"""The configuration: one frozen tree, named presets, and `override`, the only way to change a value. Standard library only."""

from libra_ray.config.closed_loop import ControlConfig, DelayConfig, EvaluateConfig
from libra_ray.config.networks import ActionConfig, ModelConfig, PlannerConfig, PolicyConfig, RefinerConfig
from libra_ray.config.presets import PRESETS, QUICKSTART_TASKS, TABLETOP_TASKS
from libra_ray.config.saved import from_json, from_tree, read_saved, to_json
from libra_ray.config.systems import AnchorRefineConfig, CoarseToFineConfig, ExpertsConfig, HierarchyConfig
from libra_ray.config.training import RayConfig, TrainConfig
from libra_ray.config.tree import (
    Config,
    DataConfig,
    RecordConfig,
    SimConfig,
    TrackingConfig,
    inference_settings,
    override,
    preset,
)

__all__ = [
    "PRESETS",
    "QUICKSTART_TASKS",
    "TABLETOP_TASKS",
    "ActionConfig",
    "AnchorRefineConfig",
    "CoarseToFineConfig",
    "Config",
    "ControlConfig",
    "DataConfig",
    "DelayConfig",
    "EvaluateConfig",
    "ExpertsConfig",
    "HierarchyConfig",
    "ModelConfig",
    "PlannerConfig",
    "PolicyConfig",
    "RayConfig",
    "RecordConfig",
    "RefinerConfig",
    "SimConfig",
    "TrackingConfig",
    "TrainConfig",
    "from_json",
    "from_tree",
    "inference_settings",
    "override",
    "preset",
    "read_saved",
    "to_json",
]
