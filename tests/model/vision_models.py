"""Vision model folders of the true architectures as the hub has them, with random weights, small enough for a test."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SwinConfig,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    YolosConfig,
    YolosModel,
)

SIZE, PATCH = 32, 8
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHED = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
SQUARE = {"height": SIZE, "width": SIZE}


def _write(folder: Path, model: torch.nn.Module, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def siglip(folder: Path) -> Path:
    """Both towers, as the hub has them: the text's is not used."""
    config = SiglipConfig(
        vision_config=PATCHED, text_config={**TOWER, "vocab_size": 20, "max_position_embeddings": 8, "projection_size": 32}
    )
    return _write(folder, SiglipModel(config), SiglipImageProcessor(size=SQUARE))


def clip(folder: Path) -> Path:
    """A class token."""
    config = CLIPVisionConfig(**PATCHED, projection_dim=32)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    return _write(folder, CLIPVisionModel(config), processor)


def vit(folder: Path) -> Path:
    """A class token and a pooler."""
    return _write(folder, ViTModel(ViTConfig(**PATCHED)), ViTImageProcessor(size=SQUARE))


def dinov2(folder: Path) -> Path:
    """Its configuration's pictures are larger than its processor's."""
    config = Dinov2Config(**{**PATCHED, "image_size": 2 * SIZE})
    return _write(folder, Dinov2Model(config), BitImageProcessor(size={"shortest_edge": SIZE + 4}, crop_size=SQUARE))


def dinov2_registers(folder: Path) -> Path:
    """Class and register tokens."""
    config = Dinov2WithRegistersConfig(**PATCHED, num_register_tokens=4)
    return _write(folder, Dinov2WithRegistersModel(config), BitImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE))


def dinov3(folder: Path) -> Path:
    """Class and register tokens, rotary positions."""
    config = DINOv3ViTConfig(**PATCHED, num_register_tokens=4)
    return _write(folder, DINOv3ViTModel(config), DINOv3ViTImageProcessor(size=SQUARE))


def dinov3_convnext(folder: Path) -> Path:
    """Pooled token first, then a grid without a patch size in its configuration."""
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], image_size=SIZE)
    return _write(folder, DINOv3ConvNextModel(config), DINOv3ViTImageProcessor(size={"height": 64, "width": 64}))


def convnext(folder: Path) -> Path:
    """A feature map, channels first."""
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])
    return _write(folder, ConvNextModel(config), ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875))


def resnet(folder: Path) -> Path:
    """A feature map, batch norm."""
    config = ResNetConfig(embedding_size=8, **STAGES, layer_type="basic")
    processor = ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=0.875)
    return _write(folder, ResNetModel(config), processor)


def swin(folder: Path) -> Path:
    """A grid coarser than its patches."""
    config = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return _write(folder, SwinModel(config), ViTImageProcessor(size=SQUARE))


def timm(folder: Path, architecture: str, size: int = SIZE, **arguments: object) -> Path:
    """A model of timm's: its processor and the pictures' size lie in the configuration."""
    data = {
        "input_size": [3, size, size], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 1.0,
        "interpolation": "bilinear", "fixed_input_size": False,
    }  # fmt: skip
    config = TimmWrapperConfig(
        architecture=architecture, model_args=arguments, pretrained_cfg=data, num_labels=3, do_pooling=True
    )
    TimmWrapperModel(config).save_pretrained(folder)
    return folder


def timm_resnet(folder: Path) -> Path:
    """A feature map, channels first."""
    return timm(folder, "resnet10t", size=128)


def timm_vit(folder: Path) -> Path:
    """Class and register tokens."""
    return timm(
        folder, "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, depth=1, embed_dim=32, num_heads=2, reg_tokens=4
    )


def timm_swin(folder: Path) -> Path:
    """A feature map, channels last."""
    return timm(
        folder, "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, depths=(1, 1), embed_dim=16, num_heads=(2, 2)
    )


def mae(folder: Path) -> Path:
    """Hides patches at random."""
    return _write(folder, ViTMAEModel(ViTMAEConfig(**PATCHED)), ViTImageProcessor(size=SQUARE))


def naflex(folder: Path) -> Path:
    """Takes patches of any number instead of pictures."""
    return _write(
        folder, Siglip2VisionModel(Siglip2VisionConfig(**TOWER, patch_size=PATCH)), Siglip2ImageProcessor(patch_size=PATCH)
    )


def yolos(folder: Path) -> Path:
    """Many tokens behind the patches, which are no part of the picture."""
    config = YolosConfig(**{**PATCHED, "image_size": [SIZE, SIZE]}, num_detection_tokens=20)
    return _write(folder, YolosModel(config), ViTImageProcessor(size=SQUARE))


SEEING: dict[str, Callable[[Path], Path]] = {
    f.__name__: f
    for f in (
        siglip, clip, vit, dinov2, dinov2_registers, dinov3, dinov3_convnext, convnext, resnet, swin, timm_resnet, timm_vit,
        timm_swin,
    )
}  # fmt: skip
"""Families whose pictures become tokens or maps of places."""
