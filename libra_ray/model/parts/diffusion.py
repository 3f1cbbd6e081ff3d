"""The two interchangeable denoising objectives: DDPM with epsilon prediction (as published) and flow matching.

A network is a function `predict(x, t)` with `t` in [0, 1]. For both objectives `t = 0` is pure noise and `t = 1` is data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Predict = Callable[[Float[Tensor, "B *shape"], Float[Tensor, " B"]], Float[Tensor, "B *shape"]]


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A noised sample and what the network has to say about it.

    Attributes:
        x: `(B, ...)` the sample at noise level `t`.
        t: `(B,)` in [0, 1]; 0 is pure noise.
        target: `(B, ...)` the regression target.
    """

    x: Float[Tensor, "B *shape"]
    t: Float[Tensor, " B"]
    target: Float[Tensor, "B *shape"]


@runtime_checkable
class Objective(Protocol):
    """A forward corruption for training and the solver that undoes it."""

    def corrupt(self, data: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], u: Float[Tensor, " B"]) -> Corrupted:
        """Noise `data` to the level that `u`, uniform in [0, 1), selects."""

    def sample(self, predict: Predict, noise: Float[Tensor, "B *shape"], steps: int) -> Float[Tensor, "B *shape"]:
        """Turn `noise` into data with `steps` evaluations of `predict`, one at each of `times(steps)`, in their order."""

    def times(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
        """The `K = steps` times at which `sample` asks, from pure noise at 0 on; data are at 1. Made on `device`."""

    def target_of(
        self, data: Float[Tensor, "B *shape"], x: Float[Tensor, "B *shape"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B *shape"]:
        """The regression target that an estimate of the data means at `x`; `t` below 1."""

    def data_weight(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """What a squared error of the data is worth as one of the target: at least 1, bounded where noise is nearly gone."""


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """Where and how often a system denoises.

    Attributes:
        level: the level that does.
        setting: which says in how many steps, at inference; a checkpoint may be loaded with another value of it.
        most: steps that are still different ones.
    """

    level: str
    setting: str
    most: int


LEAST_NOISE = 0.2
"""Share of noise below which an error of the data is not weighed more: a solver of a few steps seldom asks there, and the
unbounded weight, 1 / noise squared, would be nearly all of the loss."""


def _rows(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Velocity regression on the straight path x_t = (1 - t) noise + t data (Lipman et al., Flow Matching)."""

    def corrupt(self, data: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], u: Float[Tensor, " B"]) -> Corrupted:
        """A point on the path; the target is its velocity, `data - noise`."""
        t = _rows(u, data)
        return Corrupted(x=(1 - t) * noise + t * data, t=u, target=data - noise)

    def sample(self, predict: Predict, noise: Float[Tensor, "B *shape"], steps: int) -> Float[Tensor, "B *shape"]:
        """Euler's method over `steps` equal intervals."""
        x = noise
        for t in self.times(steps, x.device).to(x):
            x = x + predict(x, t.expand(len(x))) / steps
        return x

    def times(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
        """The beginnings of the intervals."""
        return torch.arange(steps, device=device) / steps

    def target_of(
        self, data: Float[Tensor, "B *shape"], x: Float[Tensor, "B *shape"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B *shape"]:
        """The velocity from `x` to the data in the time that is left."""
        return (data - x) / _rows(1 - t, x)

    def data_weight(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """1 / (1 - t)^2, bounded."""
        return 1 / (1 - t).clamp(min=LEAST_NOISE).square()


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Epsilon prediction on a cosine schedule (Ho et al.; Nichol & Dhariwal), sampled with DDIM steps.

    Attributes:
        levels: noise levels K of the discrete schedule.
        clip: bound on the predicted data at every step; infinity turns clipping off.
    """

    levels: int = 100
    clip: float = 1.0

    def alpha_bar(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The share of signal variance at level `t`: 1 at t = 1, near 0 at t = 0."""
        s = 0.008
        f = torch.cos((1 - t + s) / (1 + s) * math.pi / 2) ** 2
        return (f / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(1e-4, 1 - 1e-5)

    def corrupt(self, data: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], u: Float[Tensor, " B"]) -> Corrupted:
        """Noise to one of the K levels; the target is the noise."""
        t = (u * self.levels).floor() / self.levels
        a = _rows(self.alpha_bar(t), data)
        return Corrupted(x=a.sqrt() * data + (1 - a).sqrt() * noise, t=t, target=noise)

    def sample(self, predict: Predict, noise: Float[Tensor, "B *shape"], steps: int) -> Float[Tensor, "B *shape"]:
        """Deterministic DDIM steps (Song et al.) over an even sub-grid of the K levels."""
        x = noise
        for now, later in pairwise([*self.times(steps, x.device).to(x), x.new_ones(())]):
            t = now.expand(len(x))
            a = _rows(self.alpha_bar(t), x)
            epsilon = predict(x, t)
            data = ((x - (1 - a).sqrt() * epsilon) / a.sqrt()).clamp(-self.clip, self.clip)
            epsilon = (x - a.sqrt() * data) / (1 - a).sqrt()
            b = _rows(self.alpha_bar(later.expand(len(x))), x)
            x = torch.where(later >= 1, data, b.sqrt() * data + (1 - b).sqrt() * epsilon)
        return x

    def times(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
        """An even sub-grid of the K levels, without its end."""
        return (torch.linspace(0, 1, steps + 1, device=device)[:-1] * self.levels).round() / self.levels

    def target_of(
        self, data: Float[Tensor, "B *shape"], x: Float[Tensor, "B *shape"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B *shape"]:
        """The noise that is left when the data's share is taken off."""
        a = _rows(self.alpha_bar(t), x)
        return (x - a.sqrt() * data) / (1 - a).sqrt()

    def data_weight(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The ratio of signal to noise, bounded on both sides (Salimans & Ho, truncated SNR; Hang et al., Min-SNR).

        Near pure noise the ratio is near 0: by it alone nobody would learn where sampling begins.
        """
        a = self.alpha_bar(t)
        return (a / (1 - a).clamp(min=LEAST_NOISE**2)).clamp(min=1)


def make_objective(name: str, levels: int) -> Objective:
    """The objective of that name: `ddpm` or `flow`."""
    if name == "flow":
        return FlowMatching()
    if name == "ddpm":
        return DDPM(levels=levels)
    raise ValueError(f"unknown objective {name!r}; valid: ddpm, flow")
