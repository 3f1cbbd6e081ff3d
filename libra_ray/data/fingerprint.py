"""Whether a data set is still the one it was: compared wherever work goes on that an earlier start began."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from libra_ray.data.checks import DatasetError

if TYPE_CHECKING:
    # A report holds fingerprints, and reads no videos.
    from libra_ray.data.dataset import Demonstrations


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What tells a data set from what it was before; cheap, because no picture is decoded.

    The same data in another place, or with other times of modification, have the same one.

    Attributes:
        episodes: their number; `frames` likewise.
        content: 16 hex digits over every number that is trained on, the instructions, cameras and control rate, and the sizes
            of the files that hold pictures.
    """

    episodes: int
    frames: int
    content: str

    @classmethod
    def of(cls, recorded: "Demonstrations") -> Self:
        """The fingerprint of a data set as it is now."""
        digest = hashlib.sha256(repr((float(recorded.fps), recorded.image_keys, recorded.instructions)).encode())
        for array in (recorded.state, recorded.action, recorded.task_index, recorded.lengths):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        for path in _picture_files(recorded):
            digest.update(f"{path.relative_to(recorded.root)}:{path.stat().st_size}\n".encode())
        return cls(episodes=len(recorded.lengths), frames=len(recorded), content=digest.hexdigest()[:16])

    def check_unchanged(self, now: Self, root: Path) -> None:
        """Refuse to go on with other data than those of the beginning, whose fingerprint this is.

        Statistics and held-out episodes follow from the data: with others, weights would go on under another normalisation.

        Raises:
            DatasetError: says what differs.
        """
        if now == self:
            return
        pairs = {"episodes": (self.episodes, now.episodes), "frames": (self.frames, now.frames)}
        counts = [f"{after} {name} (then {before})" for name, (before, after) in pairs.items() if before != after]
        raise DatasetError(
            f"the data set {root} is not the one that this run's training began with: it has "
            f"{', '.join(counts) or f'other content in as many ({now.frames}) frames'}; "
            "give --fresh to start over (earlier results are kept aside), or another --name"
        )


def _picture_files(recorded: "Demonstrations") -> list[Path]:
    embedded = any(camera.videos is None for camera in recorded.cameras)
    return sorted((*recorded.layout.videos, *(recorded.layout.data if embedded else ())))
