"""The Action Refiner (System 1): a diffusion transformer, with its own encoder, from coarse tokens to continuous actions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat as repeated
from pathlib import Path
from typing import cast

import torch
from einops import repeat
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.config import RefinerConfig
from libra_ray.model.parts.adapters import Adaptable, Way
from libra_ray.model.parts.attention import KeysValues, ModulatedBlock, sinusoids
from libra_ray.model.parts.chunks import Chunk, Prefix, masked_mean
from libra_ray.model.parts.diffusion import Objective, make_objective
from libra_ray.model.parts.draws import normal, uniform
from libra_ray.model.parts.vision import VISION_TOKENS, PictureEncoder, PretrainedEncoder, make_encoder
from libra_ray.model.precision import matched

CODE_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class RefinerContext:
    """What is seen, computed once for all denoising steps.

    Attributes:
        vector: `(B, d)`, modulates every layer together with the noise level.
        seen: per layer the keys and values of the patches, where it attends to them.
    """

    vector: Float[Tensor, "B d"]
    seen: Sequence[KeysValues] | None = None

    def repeated(self, times: int) -> "RefinerContext":
        """Every observation so many times, one after another; what attention looks up is not copied."""
        return replace(self, vector=repeat(self.vector, "b d -> (b k) d", k=times))


def followed(config: RefinerConfig) -> tuple[str, ...]:
    """The names of the settings that a refiner of this configuration follows."""
    unused = {"max_staleness"} | (set() if config.objective == "ddpm" else {"train_timesteps"})
    if config.vision == "shared":
        unused |= {"encoder", "train_encoder", "vision_tokens"}
    return tuple(f"refiner.{f.name}" for f in fields(config) if f.name not in unused)


Modulation = Sequence[Tensor]
"""Per layer the adaLN modulation for one noise level and context, `(B, 6 width)`."""
Begin = Callable[[Tensor, Tensor], Tensor]
"""Of an intent and noise, `(B, H, D)`, where the path to the actions begins."""


class Refiner(Adaptable):
    """Denoises an action chunk under what the robot sees now and the coarse intent (method.md, Libra-VLA).

    The intent enters through a learned codebook, one code per dimension and bin, concatenated to the noisy action of the same
    step, as in RoboDual (the paper is silent); pictures, proprioception and noise level modulate every layer by adaLN-Zero.
    With `vision_tokens=patches` every layer also attends to the places of the pictures. There is no language: the coarse tokens
    are the only task channel, unless `see_language` opens another for ablation. With `bins=0` hidden states
    `(B, H, hidden_width)`, projected to the codes' width, stand in their place (see `Monolithic`).

    With `max_committed_steps` it also learns to go on from the beginning of a chunk that is being executed while it computes:
    those steps are given without noise and marked, and only the rest is learned (training-time real-time chunking, Black et
    al., arXiv 2512.05964; there the mark is each step's own noise level).
    """

    STAYS_FP32 = ("codebook", "from_action", "position", "is_committed", "from_state", "to_action")

    def __init__(
        self,
        config: RefinerConfig,
        *,
        image_size: int,
        pictures: int,
        horizon: int,
        dims: int,
        state: int,
        feature_width: int,
        bins: int = 0,
        hidden_width: int = 0,
        folder: Path | None = None,
    ) -> None:
        """Build for `pictures` pictures.

        `feature_width` and `hidden_width` are the widths of the planner's features and hidden states, for who shares them;
        `folder` is a checkpoint to take a pretrained encoder's architecture from instead of its source.
        """
        super().__init__()
        self.config = config
        self.objective: Objective = make_objective(config.objective, config.train_timesteps)
        width = config.width
        own = config.vision == "own"
        patches = own and config.vision_tokens == "patches"
        self.eyes = (
            make_encoder(config.encoder, image_size, width, folder, patches=patches) if own else nn.Linear(feature_width, width)
        )
        self.place = nn.Parameter(torch.randn(pictures, self._encoder.places, width) * 0.02) if patches else None
        self.codebook = nn.Embedding(dims * (bins + 1), CODE_WIDTH) if bins else None
        self.from_features = None if bins else nn.Linear(hidden_width, dims * CODE_WIDTH)
        self.code_offset: Tensor
        self.register_buffer("code_offset", torch.arange(dims) * (bins + 1), persistent=False)
        self.from_action = nn.Linear(dims + dims * CODE_WIDTH, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.is_committed = nn.Parameter(torch.zeros(width)) if config.max_committed_steps else None
        self.from_state = nn.Linear(state, width)
        self.from_pictures = nn.Linear(VISION_TOKENS * pictures * width, width)
        self.from_language = nn.Linear(feature_width, width) if config.see_language else None
        self.from_level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(ModulatedBlock(width, config.heads, sees=patches) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.to_action = nn.Linear(width, dims)
        if config.predicts == "action":
            nn.init.zeros_(self.to_action.weight)
            nn.init.zeros_(self.to_action.bias)
        self.width = width

    def ways(self) -> Mapping[str, Way]:
        """Its encoder and the rest, of which the first layer, whose weights are read in two parts, has no adapter."""
        own, rest = self.config.train_encoder, self.config.train_transformer
        ways: dict[str, Way] = {"": rest, "from_action.": "frozen" if rest == "lora" else rest}
        return ways if self.config.vision == "shared" else {**ways, f"eyes.{self._encoder.tower}": own}

    def encode_context(
        self,
        images: UInt8[Tensor, "B T C height width"] | None,
        state: Float[Tensor, "B S"],
        shared: Float[Tensor, "B K seen"] | None = None,
        language: Float[Tensor, "B seen"] | None = None,
    ) -> RefinerContext:
        """The context: pictures and proprioception, computed once for all denoising steps.

        Pictures are not read where features of theirs are `shared`.
        """
        seen = None
        if self.place is None or images is None:
            tokens = self.eyes(images if shared is None else shared)
        else:
            pictures = self._encoder.see(images)
            tokens, patches = pictures.tokens, (pictures.patches + self.place).flatten(1, 2)
            seen = [block.attention.seen(patches) for block in self._layers]
        context = self.from_pictures(tokens.flatten(1)) + self.from_state(state)
        if self.from_language is not None:
            assert language is not None
            context = context + self.from_language(language)
        return RefinerContext(vector=context, seen=seen)

    def forward(
        self,
        noisy: Float[Tensor, "B H D"],
        level: Float[Tensor, " B"],
        intent: Int[Tensor, "B H D"] | Float[Tensor, "B H read"],
        context: RefinerContext,
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "B H D"]:
        """The output for a noisy chunk at noise level `level` in [0, 1]: as configured, the target or the action's residual.

        Args:
            intent: one coarse token per step and dimension, or, in the monolithic baseline, one hidden state per step.
            prefix: the steps of the chunk that are decided already.
        """
        condition = self._condition(sinusoids(level, self.width), context)
        modulation = [block.to_modulation(condition) for block in self._layers]
        if prefix is not None:
            noisy = prefix.into(noisy)
        return self.denoise(noisy, self.embed_intent(intent, prefix), modulation, context.seen)

    def embed_intent(
        self, intent: Int[Tensor, "B H D"] | Float[Tensor, "B H read"], prefix: Prefix | None = None
    ) -> Float[Tensor, "B H d"]:
        """The embedded intent: its part of the first layer, computed once for all denoising steps."""
        dims = self.to_action.out_features
        by_intent = self.from_action.weight[:, dims:]
        codes = matched(self._codes(intent), by_intent)
        embedded = functional.linear(codes, by_intent, self.from_action.bias) + self.position
        if prefix is None or self.is_committed is None:
            return embedded
        return embedded + prefix.mask[..., None] * self.is_committed

    def modulation(self, levels: Float[Tensor, " K"], context: RefinerContext) -> list[Modulation]:
        """The modulation of every layer at each of `K` noise levels, in their order."""
        condition = self._condition(sinusoids(levels, self.width)[:, None], context)
        return list(zip(*[block.to_modulation(condition) for block in self._layers], strict=True))

    def denoise(
        self,
        noisy: Float[Tensor, "B H D"],
        embedded_intent: Float[Tensor, "B H d"],
        modulations: Modulation,
        seen: Sequence[KeysValues] | None = None,
    ) -> Float[Tensor, "B H D"]:
        """`forward` from the embedded intent and the modulation: all that is computed anew in every denoising step."""
        x = functional.linear(noisy, self.from_action.weight[:, : noisy.shape[-1]]) + embedded_intent
        x = matched(x, self.norm.weight)
        looked_at = seen or repeated(None, len(modulations))
        for block, modulation, patches in zip(self._layers, modulations, looked_at, strict=True):
            x = block.modulated(x, modulation, seen=patches)
        return self.to_action(matched(self.norm(x), self.to_action.weight))

    def loss(
        self,
        chunk: Chunk,
        intent: Int[Tensor, "B H D"] | Float[Tensor, "B H read"],
        context: RefinerContext,
        anchor: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
        begin: Begin | None = None,
    ) -> Float[Tensor, ""]:
        """The denoising loss on the chunk's unmasked steps.

        Args:
            anchor: of the intent, the actions that an answer is counted from, where the network says a residual of them.
            begin: by default the noise itself.
        """
        draws, most = self.config.noise_draws, self.config.max_committed_steps
        values = (chunk.actions, chunk.mask, intent)
        actions, mask, intent = (repeat(v, "b ... -> (b k) ...", k=draws) for v in values)
        context = context.repeated(draws)
        whole, prefix = Chunk(actions=actions, mask=mask), None
        data = whole.data
        if most:
            prefix = Prefix.drawn(whole, most, generator)
            mask = mask & ~prefix.mask
        noise = normal(data.shape, data, generator)
        level = uniform(data.shape[:1], data, generator)
        corrupted = self.objective.corrupt(data, noise if begin is None else begin(intent, noise).to(data), level)
        said = self(corrupted.x, corrupted.t, intent, context, prefix).float()
        if self.config.predicts == "target":
            return masked_mean((said - corrupted.target).square().mean(-1), mask)
        errors = (anchor(intent).to(said) + said - data).square().mean(-1)
        return masked_mean(self.objective.data_weight(corrupted.t)[:, None] * errors, mask)

    def sample(
        self,
        intent: Int[Tensor, "B H D"] | Float[Tensor, "B H read"],
        context: RefinerContext,
        anchor: Callable[[Tensor], Tensor],
        noise: Float[Tensor, "B H D"],
        committed: Float[Tensor, "B K D"] | None = None,
        begin: Begin | None = None,
    ) -> Float[Tensor, "B H D"]:
        """Normalised actions in [-1, 1], denoised from `noise`, which is scaled by `sample_noise`.

        Args:
            begin: as in `loss`.
            committed: what the robots execute meanwhile, as in `SystemInput`; a refiner that did not learn to go on from it
                does not read it.
        """
        noise, steps, most = self.config.sample_noise * noise, self.config.denoising_steps, self.config.max_committed_steps
        prefix = Prefix.of(committed, noise.shape[1], most) if most and committed is not None else None
        # The solver asks once per level, in their order: whatever does not depend on the noisy actions is computed before.
        modulations = iter(self.modulation(self.objective.times(steps, noise.device).to(noise), context))
        embedded_intent, start = self.embed_intent(intent, prefix), anchor(intent).to(noise)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            x = x if prefix is None else prefix.into(x)
            said = self.denoise(x, embedded_intent, next(modulations), context.seen)
            return said if self.config.predicts == "target" else self.objective.target_of(start + said, x, t)

        first = noise if begin is None else begin(intent, noise).to(noise)
        actions = self.objective.sample(predict, first, steps).clamp(-1, 1)
        return actions if prefix is None else prefix.into(actions)

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """What its time goes into, see `System.stages`; the last one is called once per denoising step."""
        return {"refiner context": self.encode_context, "noise levels": self.modulation, "denoising step": self.denoise}

    @property
    def _encoder(self) -> PictureEncoder:
        return cast("PictureEncoder", self.eyes)

    @property
    def _layers(self) -> Iterable[ModulatedBlock]:
        return cast("Iterable[ModulatedBlock]", self.blocks)

    def _condition(self, level: Tensor, context: RefinerContext) -> Tensor:
        narrow = self.from_pictures.weight
        return self.mix(matched(context.vector + self.from_level(matched(level, narrow)), narrow))

    def _codes(self, intent: Tensor) -> Tensor:
        if self.codebook is not None:
            return self.codebook(intent + self.code_offset).flatten(2)
        assert self.from_features is not None
        return self.from_features(intent)

    def save_processor(self, folder: Path) -> None:
        """Write a pretrained encoder's architecture and image processor under `folder`."""
        if isinstance(self.eyes, PretrainedEncoder):
            self.eyes.save_processor(folder)
