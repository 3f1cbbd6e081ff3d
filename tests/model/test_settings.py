"""What a system says of the settings that it follows is so: others change nothing of it, and each of these changes something."""

import hashlib
from typing import Any

import pytest
import torch

from libra_ray.config import Config, override
from libra_ray.model.dry_run import seen_by
from libra_ray.model.registry import make_system
from libra_ray.model.system import System, answered
from tests.model.builders import SHAPE, make_batch, open_gates, tiny_config
from tests.model.test_systems import FORMS

OTHER: dict[str, Any] = {
    "action.bins": 7,
    "planner.width": 64,
    "planner.depth": 2,
    "planner.heads": 2,
    "planner.max_text_tokens": 80,
    "planner.see_state": False,
    "planner.train_vision": "frozen",
    "planner.train_language": "frozen",
    "planner.train_head": "frozen",
    "refiner.width": 64,
    "refiner.depth": 2,
    "refiner.heads": 2,
    "refiner.train_encoder": "frozen",
    "refiner.train_transformer": "frozen",
    "refiner.vision": "shared",
    "refiner.vision_tokens": "patches",
    "refiner.see_language": True,
    "refiner.objective": "ddpm",
    "refiner.predicts": "target",
    "refiner.train_timesteps": 50,
    "refiner.denoising_steps": 3,
    "refiner.noise_draws": 1,
    "refiner.sample_noise": 0.5,
    "refiner.condition_dropout": 0.5,
    "refiner.max_committed_steps": 1,
    "coarse_to_fine.steps": 3,
    "coarse_to_fine.noise": 0.3,
    "anchor_refine.backbone": "diffusion",
    "anchor_refine.levels": "two",
    "anchor_refine.anchor_share": 0.25,
    "anchor_refine.context": "own",
    "anchor_refine.gripper": "0",
    "anchor_refine.gripper_refinement": "naive",
    "anchor_refine.gripper_margin": 0.3,
    "anchor_refine.lambda_residual": 0.5,
    "anchor_refine.lambda_gripper": 0.5,
    "anchor_refine.stop_gradient": False,
    "anchor_refine.predicts": "action",
    "anchor_refine.see_anchor": True,
    "hierarchy.levels": "two",
    "hierarchy.plans": 3,
    "hierarchy.waypoint_steps": 2,
    "experts.names": "flow,token",
    "experts.routing": "soft",
    "experts.temperature": 0.5,
    "experts.balance": 0.5,
    "train.lambda_plan": 0.5,
    "train.lambda_diff": 0.5,
    "train.curriculum": "planner",
    "train.tau": 0.01,
}
