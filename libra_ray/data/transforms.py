"""One set of transforms for training and serving: inputs are normalised, outputs undo the inputs in reverse order."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from libra_ray.data.dataset import Demonstrations

Normalisation = Literal["min_max", "quantile"]
STATE_LIMIT = 3.0
"""Normalised states are cut here: a state far outside the recorded range says no more than "outside"."""
FAR = 20
"""Times the span of 98 % of the values from which on extremes look like mistakes."""
CONSTANT_SPAN = 1e-6
"""A dimension whose range is smaller than this share of its size is a constant with rounding noise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorStats:
    """Statistics of one vector feature over the training frames; each `(dims,)` float32, in the feature's own units."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    q01: NDArray[np.float32]
    q99: NDArray[np.float32]

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Self:
        """The statistics of `(F, dims)` values."""
        wide = values.astype(np.float64)
        q01, q99 = np.quantile(wide, (0.01, 0.99), axis=0)
        found = {"low": wide.min(0), "high": wide.max(0), "mean": wide.mean(0), "std": wide.std(0), "q01": q01, "q99": q99}
        return cls(**{name: value.astype(np.float32) for name, value in found.items()})

    def far_extremes(self) -> NDArray[np.bool_]:
        """Which dimensions `(dims,)` have extremes many times further apart than nearly all of their values."""
        usual = self.q99.astype(np.float64) - self.q01
        return ~is_constant(self.q01, self.q99) & (self.high.astype(np.float64) - self.low > FAR * usual)


@dataclass(frozen=True, kw_only=True, eq=False)
class NormStats:
    """The normalisation statistics that travel in a checkpoint."""

    state: VectorStats
    action: VectorStats

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, every float32 exactly."""
        tree = {part: {k: v.tolist() for k, v in vector.items()} for part, vector in asdict(self).items()}
        return json.dumps(tree, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The statistics that `to_json` wrote.

        Raises:
            ValueError: a part or a statistic is missing or unknown.
        """
        tree = json.loads(text)
        _check_keys(tree, {f.name for f in fields(cls)}, "statistics")
        for part, vector in tree.items():
            _check_keys(vector, {f.name for f in fields(VectorStats)}, f"statistics of {part}")
        return cls(
            **{part: VectorStats(**{k: np.array(v, np.float32) for k, v in vector.items()}) for part, vector in tree.items()}
        )

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex: what client and server compare."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def check_fits(self, state_dim: int, action_dim: int) -> None:
        """Refuse statistics of other vectors than these.

        Raises:
            ValueError: names the dimensions of both.
        """
        for name, vector, dim in (("state", self.state, state_dim), ("action", self.action, action_dim)):
            if len(vector.low) != dim:
                raise ValueError(
                    f"the normalisation statistics have {len(vector.low)} {name} dimensions, the data have {dim}; "
                    "use the statistics of the same robot, or compute them again from this dataset"
                )


def compute_stats(recorded: "Demonstrations", rows: NDArray[np.int64]) -> NormStats:
    """Statistics over the given rows; give those of the *training* episodes only.

    Raises:
        ValueError: there are no rows.
    """
    if len(rows) == 0:
        raise ValueError("statistics need at least one training frame; lower data.holdout_share or record more episodes")
    return NormStats(state=VectorStats.of(recorded.state[rows]), action=VectorStats.of(recorded.action[rows]))


class Transform(Protocol):
    """An elementwise map over the last axis and its way back."""

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Inputs' direction, `(..., dims)` to `(..., dims)`."""

    def undo(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs' direction."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipTransform:
    """Cuts values to `[low, high]`, the same in both directions."""

    low: NDArray[np.float32] | np.float32
    high: NDArray[np.float32] | np.float32

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cut."""
        return np.clip(values, self.low, self.high)

    def undo(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cut."""
        return np.clip(values, self.low, self.high)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleTransform:
    """Maps `centre ± half` to [-1, 1]; a constant dimension (half 0) goes to 0 and comes back as its constant."""

    centre: NDArray[np.float32]
    half: NDArray[np.float32]

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """To about [-1, 1]."""
        return np.divide(values - self.centre, self.half, out=np.zeros_like(values), where=self.half > 0)

    def undo(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Back to the feature's own units."""
        return values * self.half + self.centre


class Pipeline:
    """Normalisation in and out, by one checkpoint's statistics.

    Args:
        stats: statistics of the training episodes.
        normalisation: `min_max` maps the recorded range to [-1, 1], `quantile` the range from 1 % to 99 %; a dimension
            whose quantiles coincide (a gripper that rarely moves) falls back to its recorded range.
    """

    def __init__(self, stats: NormStats, normalisation: Normalisation) -> None:
        self.stats = stats
        self.normalisation = normalisation
        limit, one = np.float32(STATE_LIMIT), np.float32(1)
        state_low, state_high = _bounds(stats.state, normalisation)
        low, high = _bounds(stats.action, normalisation)
        self._state: Sequence[Transform] = (_scale(state_low, state_high), ClipTransform(low=-limit, high=limit))
        self._action: Sequence[Transform] = (
            ClipTransform(low=low, high=high),
            _scale(low, high),
            ClipTransform(low=-one, high=one),
        )

    def inputs_state(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(..., S)` raw proprioception to about [-1, 1], cut at ±`STATE_LIMIT`."""
        return _apply(self._state, raw)

    def inputs_action(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(..., D)` raw actions to [-1, 1]."""
        return _apply(self._action, raw)

    def outputs_action(self, normalised: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(..., D)` normalised actions to the robot's own units, cut to the recorded range."""
        values = np.asarray(normalised, np.float32)
        for transform in reversed(self._action):
            values = transform.undo(values)
        return values


def _apply(transforms: Sequence[Transform], raw: NDArray[np.float32]) -> NDArray[np.float32]:
    values = np.asarray(raw, np.float32)
    for transform in transforms:
        values = transform.apply(values)
    return values


def _bounds(stats: VectorStats, normalisation: Normalisation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if normalisation == "min_max":
        return stats.low, stats.high
    if normalisation == "quantile":
        collapsed = is_constant(stats.q01, stats.q99)
        return np.where(collapsed, stats.low, stats.q01), np.where(collapsed, stats.high, stats.q99)
    raise ValueError(f"unknown normalisation {normalisation!r}; valid: min_max, quantile")


def _scale(low: NDArray[np.float32], high: NDArray[np.float32]) -> ScaleTransform:
    half = np.where(is_constant(low, high), 0, (high.astype(np.float64) - low) / 2)
    centre = (high.astype(np.float64) + low) / 2
    return ScaleTransform(centre=centre.astype(np.float32), half=half.astype(np.float32))


def is_constant(low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which dimensions `(dims,)` vary between `low` and `high` by no more than rounding noise."""
    return high - low <= CONSTANT_SPAN * np.maximum(1, np.abs(low))


def _check_keys(found: dict[str, object], expected: set[str], what: str) -> None:
    if set(found) != expected:
        raise ValueError(f"{what} must have exactly {', '.join(sorted(expected))}; found {', '.join(sorted(found))}")
