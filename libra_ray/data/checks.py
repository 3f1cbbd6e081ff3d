"""What can be wrong with a dataset folder, said so that the reader knows what to do."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONVERTER = "uv run python -m lerobot.scripts.convert_dataset_v21_to_v30"
_FORMAT = 3


class DatasetError(ValueError):
    """A dataset that cannot be used as it is; the message names the remedy."""


def read_info(root: Path) -> dict[str, Any]:
    """The dataset's `meta/info.json`, its format version checked.

    Raises:
        DatasetError: no such folder, not a LeRobotDataset, not finalised, or of another format version.
    """
    if not root.is_dir():
        partial = root.with_name(root.name + ".partial")
        hint = f"; {partial} is an unfinished one: record again, it continues" if partial.is_dir() else ""
        raise DatasetError(f"dataset folder {root} does not exist{hint}; name a folder that holds meta/info.json")
    path = root / "meta" / "info.json"
    if not path.is_file():
        if (root / "meta_data").is_dir():
            raise DatasetError(_old_format(root, "v1"))
        raise DatasetError(f"{root} is not a LeRobotDataset: it has no meta/info.json")
    try:
        # Bytes, for JSON's own look at the encoding: a byte order mark does no harm.
        info: dict[str, Any] = dict(json.loads(path.read_bytes()))
    except UnicodeError as error:
        raise DatasetError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8 without a byte order mark") from error
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{path} is no JSON object ({error}); mend it, or copy or write the dataset again") from error
    check_version(root, str(info.get("codebase_version", "missing")))
    if not info.get("total_episodes") or not info.get("total_frames"):
        raise DatasetError(f"dataset {root} is empty: it holds no episodes; record at least one")
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise DatasetError(f"{path}: fps is {fps!r}; it must be the frames per second, a number above 0")
    features = info.get("features")
    if not isinstance(features, dict) or not all(map(_is_feature, features.values())):
        raise DatasetError(f"{path} has no table of features with dtype and shape; {_finalize_hint()}")
    return info


def _is_feature(description: object) -> bool:
    if not isinstance(description, dict) or "dtype" not in description:
        return False
    shape = description.get("shape")
    return isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)


def check_version(root: Path, version: str) -> None:
    """Refuse formats other than v3.

    Raises:
        DatasetError: names LeRobot's converter for older formats.
    """
    major = version.removeprefix("v").split(".")[0]
    if not major.isdigit():
        raise DatasetError(f"{root} names no format version (codebase_version is {version}); expected v{_FORMAT}.x")
    if int(major) < _FORMAT:
        raise DatasetError(_old_format(root, version))
    if int(major) > _FORMAT:
        raise DatasetError(f"dataset {root} has format {version}, newer than v{_FORMAT}.x which this version reads; update")


def unfinished(path: Path, reason: str) -> DatasetError:
    """The error for a dataset whose writer never called `finalize()`."""
    return DatasetError(f"{path}: {reason}; {_finalize_hint()}")


def check_finite(
    name: str, values: NDArray[np.float32], episode_index: NDArray[np.int64], frame_index: NDArray[np.int64]
) -> None:
    """Refuse NaN and infinity in `(F, dims)` values.

    Raises:
        DatasetError: names column, dimension, episode and frame of the first one and how many frames are affected.
    """
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    row, dim = (int(i) for i in np.argwhere(bad)[0])
    raise DatasetError(
        f"{name}[{dim}] is {values[row, dim]} in episode {episode_index[row]}, frame {frame_index[row]} "
        f"({int(bad.any(1).sum())} frames in all are not finite); remove or record these episodes again"
    )


def check_dimensions(name: str, found: int, expected: int | None) -> None:
    """Refuse another number of dimensions than expected; None expects nothing.

    Raises:
        DatasetError: names both numbers.
    """
    if expected is not None and found != expected:
        raise DatasetError(f"{name} has {found} dimensions in the dataset, expected {expected}")


def _old_format(root: Path, version: str) -> str:
    first = "" if version.startswith("v2.1") else "bring it to v2.1 with an older LeRobot release first, then "
    command = f"{CONVERTER} --repo-id=local/demos --root={shlex.quote(str(root.resolve()))} --push-to-hub=false"
    return f"dataset {root} has the old format {version}, v{_FORMAT}.x is needed; {first}convert it with LeRobot: {command}"


def _finalize_hint() -> str:
    return "the writer did not call finalize(): write the dataset again and call finalize() at the end"
