"""Building blocks that both systems share."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

FEW = 64
"""Tokens up to which attention's matrix is small enough to be kept for the backward pass."""
KeysValues = tuple[Tensor, Tensor]
"""`(B, heads, K, d / heads)` each, of tokens that are looked at and stay as they are."""


class Attention(nn.Module):
    """Bidirectional multi-head self-attention.

    With `sees` also attention to what was seen, added to it: the same queries, keys and values of their own (Ye et al.,
    IP-Adapter).
    """

    def __init__(self, width: int, heads: int, *, sees: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_seen = nn.Linear(width, 2 * width) if sees else None
        self.to_out = nn.Linear(width, width)

    def seen(self, tokens: Float[Tensor, "B K d"]) -> KeysValues:
        """The keys and values of what is seen."""
        assert self.to_seen is not None
        batch, length, width = tokens.shape
        made = self.to_seen(tokens).view(batch, length, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return made[0], made[1]

    def forward(
        self, x: Float[Tensor, "B S d"], mask: Bool[Tensor, "B S"] | None = None, seen: KeysValues | None = None
    ) -> Float[Tensor, "B S d"]:
        """Attend from every position to every position whose `mask` is True, and to all that is `seen`.

        Where fewer observations were seen, each belongs to as many rows of `x`, one after another.
        """
        batch, length, width = x.shape
        q, k, v = self.to_qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        bias = None if mask is None else mask[:, None, None, :]
        # The fused kernel's backward pass on a CPU is 2 to 6 times as slow as the plain products over a few tokens.
        plain = x.device.type == "cpu" and length <= FEW and torch.is_grad_enabled()
        y = _attend(q, k, v, bias) if plain else functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if seen is not None:
            # All rows of one observation ask together: its keys are not copied.
            of_one = q.unflatten(0, (len(seen[0]), -1)).transpose(1, 2).flatten(2, 3)
            found = functional.scaled_dot_product_attention(of_one, *seen)
            y = y + found.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return self.to_out(y.transpose(1, 2).reshape(batch, length, width))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1) @ v


class MLP(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class ModulatedBlock(nn.Module):
    """A transformer block modulated by a condition vector: adaLN-Zero (Peebles & Xie, Diffusion Models with Transformers)."""

    def __init__(self, width: int, heads: int, *, sees: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, sees=sees)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = MLP(width)
        self.to_modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def forward(
        self, x: Float[Tensor, "B S d"], condition: Float[Tensor, "B d"], mask: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S d"]:
        """One step of the residual stream; an untrained block leaves `x` as it is. `mask` as in `Attention`."""
        return self.modulated(x, self.to_modulation(condition), mask)

    def modulated(
        self,
        x: Float[Tensor, "B S d"],
        modulation: Float[Tensor, "B 6*d"],
        mask: Bool[Tensor, "B S"] | None = None,
        seen: KeysValues | None = None,
    ) -> Float[Tensor, "B S d"]:
        """The same by what `to_modulation` has made of the condition; `seen` as in `Attention`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attention(self.norm_attention(x) * (1 + scale_a) + shift_a, mask, seen)
        return x + gate_m * self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)


def sinusoids(t: Float[Tensor, " B"], width: int, max_period: float = 1e4) -> Float[Tensor, "B width"]:
    """Sinusoidal features of the noise level `t` in [0, 1]."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)
