"""How a vision-language model reads a prompt: by its own forward, or by the same parts of it without a look at values.

A model's own forward counts placeholders, looks whether a mask has padding in it, and loops over the grids of pictures: each
time the host waits for the device, and no CUDA graph can be captured. Here all of that is known beforehand. Padding is on the
right of a causal decoder, so that no mask is needed: nothing that is read ever looks at it.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNMASKED = "unmasked_causal"
Inputs = Mapping[str, Tensor]
OfPictures = Callable[[torch.device], Inputs]
"""What is known of one window's pictures beside their pixels: `PictureInputs.of_one`."""


class Uncached:
    """A key-value cache that keeps nothing: to a decoder without one, positions would be a reason to look for packed texts."""

    is_compileable = False

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens read before."""
        return 0

    def get_query_offset(self, layer: int = 0) -> int:
        """The first token's place."""
        return 0

    def get_mask_sizes(self, length: int, layer: int = 0) -> tuple[int, int]:
        """Keys, and the place of the first."""
        return length, 0

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Those that attention shall read: the new ones."""
        return keys, values


UNCACHED = Uncached()


def _unmasked() -> str:
    """The name of causal attention that makes no mask, whether it is compiled, recorded or neither.

    The library's own makes one, or none, by what goes on around it: what was compiled before a recording would not do in it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)
    return UNMASKED


def positions(model: Any, said: Inputs) -> Inputs:
    """Where a reader wants to know more of every token of one prompt than its processor said: `(1, S, ...)` by name."""
    if STATIC.get(model.config.model_type) is not QwenReader:
        return {}
    grid, types = said["image_grid_thw"], said["mm_token_type_ids"].int()
    found: Tensor = model.get_rope_index(said["input_ids"], types, image_grid_thw=grid)[0]
    return {"position_ids": found.permute(1, 2, 0)}


class Reader:
    """Reads by the model's own forward."""

    def __init__(self, model: Any, pictures: OfPictures) -> None:
        """Of a model below its head."""
        self.model, self.pictures = model, pictures

    def __call__(self, inputs: Inputs, places: Int[Tensor, "B K"]) -> Float[Tensor, "B S width"]:
        """The last hidden states; `places` are those of the placeholders."""
        # Nothing is generated that would read a cache of keys and values.
        hidden: Tensor = self.model(**inputs, use_cache=False).last_hidden_state
        return hidden


class StaticReader(Reader):
    """Reads by a model's parts: pictures, then the decoder over words with what was seen in the places of the placeholders."""

    def __call__(self, inputs: Inputs, places: Int[Tensor, "B K"]) -> Float[Tensor, "B S width"]:
        """The last hidden states."""
        words = self.model.get_input_embeddings()(inputs["input_ids"])
        at = places[..., None].expand(-1, -1, words.shape[-1])
        seen, *deeper = (value.reshape(at.shape).to(words.dtype) for value in self.see(inputs))
        return self.decode(words.scatter(1, at, seen), inputs, at, deeper)

    def __init__(self, model: Any, pictures: OfPictures) -> None:
        super().__init__(model, pictures)
        decoder = self._decoder()
        if decoder.config._attn_implementation == "sdpa":  # noqa: SLF001
            decoder.config._attn_implementation = _unmasked()  # noqa: SLF001

    def see(self, inputs: Inputs) -> list[Tensor]:
        """What stands for the placeholders, of all prompts together; behind that what is added in deeper layers."""
        return [self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output]

    def decode(self, embedded: Tensor, inputs: Inputs, at: Tensor, deeper: list[Tensor]) -> Tensor:
        """The decoder's last hidden states."""
        decoder = self._decoder()
        hidden: Tensor = decoder(inputs_embeds=embedded, past_key_values=UNCACHED, use_cache=False).last_hidden_state
        return hidden

    def _decoder(self) -> Any:
        return getattr(self.model, "language_model", None) or self.model.text_model


class InternVLReader(StaticReader):
    """InternVL, whose last layer is read."""

    def see(self, inputs: Inputs) -> list[Tensor]:
        """Their own way there would have every layer's output collected, by hooks that no compiler can follow."""
        config = self.model.config
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            return super().see(inputs)
        patches = self.model.vision_tower(pixel_values=inputs["pixel_values"]).last_hidden_state[:, 1:]
        side = math.isqrt(patches.shape[1])
        merged = self.model.pixel_shuffle(patches.unflatten(1, (side, side)), scale_factor=config.downsample_ratio)
        return [self.model.multi_modal_projector(merged.flatten(1, 2))]


class Idefics3Reader(StaticReader):
    """SmolVLM and Idefics 3, whose pictures fill their tiles."""

    def see(self, inputs: Inputs) -> list[Tensor]:
        """Every tile is read, also one that is grey all over, which their own forward takes for none."""
        tower, pixels = self.model.vision_model, inputs["pixel_values"].flatten(0, 1)
        side = [length // tower.patch_size for length in pixels.shape[-2:]]
        everywhere = torch.ones(len(pixels), *side, dtype=torch.bool, device=pixels.device)
        x = tower.embeddings(pixel_values=pixels, patch_attention_mask=everywhere)
        x = tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
        return [self.model.connector(tower.post_layernorm(x))]


class QwenReader(StaticReader):
    """Qwen2-VL, 2.5 and 3, whose pictures are rows of patches: where they lie is computed once for each size of batch."""

    def __init__(self, model: Any, pictures: OfPictures) -> None:
        super().__init__(model, pictures)
        self._layouts: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        lengths = [ends.diff() for name, ends in self._layout(1, torch.device("cpu")).items() if name.startswith("cu_")]
        if all((of == of[0]).all() for of in lengths):
            for block in model.visual.blocks:
                block.attn.__class__ = _in_chunks(block.attn.__class__)

    def see(self, inputs: Inputs) -> list[Tensor]:
        """Merged patches, and Qwen3-VL's deep ones."""
        pixels, windows = inputs["pixel_values"], len(inputs["input_ids"])
        said = self.model.visual(pixels, **self._layout(windows, pixels.device))
        return [said.pooler_output, *getattr(said, "deepstack_features", ())]

    def decode(self, embedded: Tensor, inputs: Inputs, at: Tensor, deeper: list[Tensor]) -> Tensor:
        """With three positions a token."""
        decoder, options = self.model.language_model, dict[str, Any]()
        if deeper:
            decoder._deepstack_process = _added  # noqa: SLF001
            options = {"visual_pos_masks": at, "deepstack_visual_embeds": deeper}
        positions = inputs["position_ids"].permute(2, 0, 1)
        hidden: Tensor = decoder(
            inputs_embeds=embedded, position_ids=positions, past_key_values=UNCACHED, use_cache=False, **options
        ).last_hidden_state
        return hidden

    def _layout(self, windows: int, device: torch.device) -> dict[str, Tensor]:
        """Where patches lie in so many windows: lengths, by which the host cuts, stay there."""
        if (windows, device) not in self._layouts:
            self._layouts[windows, device] = self._laid_out(windows, device)
        return self._layouts[windows, device]

    def _laid_out(self, windows: int, device: torch.device) -> dict[str, Tensor]:
        from transformers import vision_utils

        tower, settings = self.model.visual, self.model.visual.config
        with torch.device("cpu"):
            grid = self.pictures(torch.device("cpu"))["image_grid_thw"].repeat(windows, 1)
            merge = settings.spatial_merge_size
            found = {"grid_thw": grid, "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
            moved = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
            if hasattr(tower, "window_size"):
                sizes = {"spatial_merge_size": merge, "window_size": tower.window_size, "patch_size": tower.patch_size}
                moved["window_index"], found["cu_window_seqlens"] = vision_utils.get_vision_window_index(grid, **sizes)
            if hasattr(tower, "num_grid_per_side"):
                names = ("interp_indices", "interp_weights")
                sides = {
                    "num_grid_per_side": tower.num_grid_per_side,
                    "mode": tower.interpolation_mode,
                    "align_corners": tower.interpolation_align_corners,
                    "spatial_merge_size": merge,
                }
                made = vision_utils.get_vision_interpolation_indices_and_weights(grid, **sides)
                moved |= dict(zip(names, made, strict=True))
        return {**found, **{name: value.to(device) for name, value in moved.items()}}


@cache
def _in_chunks(own: Any) -> type[torch.nn.Module]:
    """A tower's attention within pictures or windows of one length, of all at once: its own goes through them one by one."""
    rotated = sys.modules[own.__module__].apply_rotary_pos_emb_vision

    class InChunks(own):
        def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
            q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            q, k = rotated(q, k, *options["position_embeddings"])
            q, k, v = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in (q, k, v))
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scaling)
            seen: Tensor = self.proj(found.transpose(1, 2).flatten(2).flatten(0, 1))
            return seen

    return InChunks


def _added(hidden: Tensor, at: Tensor, seen: Tensor) -> Tensor:
    """What was seen, added in its places."""
    return hidden.scatter_add(1, at, seen.to(hidden.dtype))


STATIC: dict[str, type[Reader]] = {
    "internvl": InternVLReader,
    "smolvlm": Idefics3Reader,
    "idefics3": Idefics3Reader,
    "qwen2_vl": QwenReader,
    "qwen2_5_vl": QwenReader,
    "qwen3_vl": QwenReader,
}
"""Model type -> how it is read without a look at values."""


def reader_of(model: Any, pictures: OfPictures) -> Reader:
    """The reader of a model below its head."""
    return STATIC.get(model.config.model_type, Reader)(model, pictures)
