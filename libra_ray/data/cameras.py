"""Which of a dataset's features are cameras to train on, and where their pictures lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libra_ray.data.checks import DatasetError
from libra_ray.data.columns import Table, numbers, read_batches, read_table, whole_numbers
from libra_ray.data.layout import Layout
from libra_ray.data.pictures import PictureFormat, open_image
from libra_ray.data.video import picture_format

_REMEDY = "write the dataset again, or leave the camera out with data.cameras"


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoPlaces:
    """Where the video of each episode lies: `chunk`, `file` `(E,)` name it, it begins at `start` `(E,)` seconds of the file."""

    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    start: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Camera:
    """A camera to train on.

    Attributes:
        key: its feature name; `stored` that in the dataset's files, which may be another one (`data.keys`).
        format: of its first picture, and so of all.
        videos: None where its pictures lie in the parquet files.
    """

    key: str
    stored: str
    format: PictureFormat
    videos: VideoPlaces | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Cameras:
    """The `chosen` cameras, and in `notes` what is not used, or not as it is stored; a line each."""

    chosen: tuple[Camera, ...]
    notes: list[str] = field(default_factory=list)


def choose_cameras(
    layout: Layout, features: Mapping[str, Any], stored: Mapping[str, str], wanted: Sequence[str], episodes: int
) -> Cameras:
    """The cameras that `wanted` names, in that order; where it is empty, all colour cameras, in the order of `features`.

    Args:
        layout: the dataset's files.
        features: its feature table, by the names that are used here.
        stored: of renamed features, the name in the files.
        wanted: `data.cameras`.
        episodes: E.

    Raises:
        DatasetError: there is no such camera, it gives no colour pictures, or none is left.
    """
    every = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
    if unknown := [key for key in wanted if key not in every]:
        raise DatasetError(
            f"data.cameras={','.join(wanted)}: dataset {layout.root} has no camera {unknown[0]!r}; "
            f"its cameras are {', '.join(every) or 'none'}"
        )
    chosen, notes = [], []
    for key in wanted or every:
        camera = None if _is_depth(features[key]) else _opened(layout, key, stored.get(key, key), features[key], episodes)
        unfit = "it is a depth map (is_depth_map)" if camera is None else _unfit(camera.format, asked=bool(wanted))
        if unfit and wanted:
            raise DatasetError(f"data.cameras={','.join(wanted)}: {key} cannot be used: {unfit}")
        if unfit or camera is None:
            notes.append(f"camera {key} is left out: {unfit}")
            continue
        chosen.append(camera)
        notes += _remarks(camera, features[key])
    if others := [key for key in every if wanted and key not in wanted]:
        notes.append(f"left out, as data.cameras does not name them: {', '.join(others)}")
    if not chosen:
        raise DatasetError(f"dataset {layout.root} has no colour camera; it has {', '.join([*features, *notes])}")
    return Cameras(chosen=tuple(chosen), notes=notes)


def _is_depth(feature: Mapping[str, Any]) -> bool:
    said = [entry for name in ("info", "video_info") if isinstance(entry := feature.get(name), Mapping)]
    return any(entry.get("is_depth_map") or entry.get("video.is_depth_map") for entry in said)


def _unfit(found: PictureFormat, *, asked: bool) -> str:
    """Why pictures cannot be used as a colour camera's; empty where they can."""
    if found.kind == "deep":
        return f"its pictures are {found.words}, which is depth and not colour"
    if found.kind == "grey" and not asked:
        return "its pictures are greyscale; name it in data.cameras to use them, with grey as red, green and blue"
    return ""


def _remarks(camera: Camera, feature: Mapping[str, Any]) -> list[str]:
    """What is made of pictures that are not what they were said to be, or lose something."""
    found, remarks = camera.format, []
    if found.kind == "grey":
        remarks.append(f"camera {camera.key} is greyscale; grey is used as red, green and blue")
    if found.alpha:
        remarks.append(f"camera {camera.key} has a transparency, which is left out")
    announced = _announced_size(feature)
    if announced is not None and announced != (found.height, found.width):
        remarks.append(
            f"camera {camera.key} is announced with {announced[0]}x{announced[1]} pixels in info.json, "
            f"its pictures have {found.height}x{found.width}; they are used as they are"
        )
    return remarks


def _announced_size(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in the feature table, whichever way round it names its axes; None where it does not say."""
    shape, names = tuple(feature["shape"]), feature.get("names")
    if len(shape) != 3:
        return None
    if isinstance(names, list) and "height" in names and "width" in names:
        return shape[names.index("height")], shape[names.index("width")]
    return shape[1:] if shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4) else shape[:2]


def _opened(layout: Layout, key: str, stored: str, feature: Mapping[str, Any], episodes: int) -> Camera:
    """The camera with the format of its first picture; every video is seen to be there, none is decoded."""
    if feature["dtype"] == "image":
        return Camera(key=key, stored=stored, format=_first_picture(layout, key, stored))
    places = _video_places(layout, key, stored, episodes)
    for episode, (chunk, file) in enumerate(zip(places.chunk.tolist(), places.file.tolist(), strict=True)):
        if not (path := layout.video(stored, chunk, file)).is_file():
            raise DatasetError(
                f"video {path} is missing (camera {key}, episode {episode}); copy the dataset again with its videos"
            )
    first = layout.video(stored, int(places.chunk[0]), int(places.file[0]))
    return Camera(key=key, stored=stored, format=picture_format(first), videos=places)


def _first_picture(layout: Layout, key: str, stored: str) -> PictureFormat:
    for path in layout.data:
        file = pq.ParquetFile(path)
        if stored not in file.schema_arrow.names:
            raise DatasetError(f"{path} has no column {stored!r}; it has {', '.join(file.schema_arrow.names)}")
        for batch in read_batches(path, [stored], 1):
            with open_image(batch[stored][0].as_py(), layout.root, f"camera {key}, first row of {path}") as image:
                return PictureFormat.of_image(image)
    raise AssertionError("a dataset without frames was refused before")


def _video_places(layout: Layout, key: str, stored: str, episodes: int) -> VideoPlaces:
    """Where camera `key`'s video of every episode lies.

    Raises:
        DatasetError: a place is missing; names the episode, the camera and the remedy.
    """
    names = [f"videos/{stored}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    table = read_table(layout.root / "meta" / "episodes", layout.episodes, ["episode_index", *names])
    number = episode_numbers(table)
    assert len(number) == episodes, "the number of episodes was compared before"
    order = np.argsort(number)

    def where(row: int) -> str:
        return f"for episode {number[row]} in meta/episodes, which is where the video of camera {key} lies"

    try:
        chunk, file = (whole_numbers(table[name], name, where)[order] for name in names[:2])
        start = numbers(table[names[2]], names[2], where)[order]
    except DatasetError as error:
        raise DatasetError(f"{str(error).partition(';')[0]}; {_REMEDY}") from None
    return VideoPlaces(chunk=chunk, file=file, start=start)


def episode_numbers(table: Table) -> NDArray[np.int64]:
    """The column `episode_index` of `meta/episodes`: every episode once, in any order.

    Raises:
        DatasetError: a number is missing or comes twice.
    """
    number = whole_numbers(table["episode_index"], "episode_index", table.place)
    if not np.array_equal(np.sort(number), np.arange(len(number))):
        raise DatasetError("meta/episodes does not number its episodes consecutively from 0; write the dataset again")
    return number
