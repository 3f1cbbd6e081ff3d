"""Model folders as the hub has them, with random weights, small enough to be written by a test."""

from pathlib import Path

import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

SIZE, PATCH = 28, 14
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_siglip(folder: Path) -> Path:
    """SigLIP's vision tower, the paper's encoder of the refiner."""
    config = SiglipVisionConfig(**VISION, image_size=SIZE, patch_size=PATCH)
    torch.manual_seed(0)
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder
