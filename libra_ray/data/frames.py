"""The decoded-frame cache: every picture decoded once, then read through a memory map, so training never waits for video."""

import fcntl
import hashlib
import math
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from libra_ray.common.disk import check_room, explained, reserve
from libra_ray.data.cameras import Camera
from libra_ray.data.checks import DatasetError
from libra_ray.data.columns import read_batches
from libra_ray.data.dataset import Demonstrations
from libra_ray.data.pictures import PictureFormat, open_image, rgb_of
from libra_ray.data.video import decode

_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class _VideoFile:
    """A video of a camera; it holds the pictures of the dataset's rows `rows` `(n,)` at `times` `(n,)` s, in order of time."""

    camera: Camera
    path: Path
    rows: NDArray[np.int64]
    times: NDArray[np.float64]
    frame_s: float


def frame_cache(recorded: Demonstrations, root: Path, image_size: int) -> NDArray[np.uint8]:
    """All pictures of the dataset, `(cameras, F, image_size, image_size, 3)` uint8 RGB, as a read-only memory map.

    Cameras stand in the order of `recorded.image_keys`. The cache is named by a digest of the dataset's files: a changed
    dataset gets a new cache. It appears only when complete; of several processes one decodes and the others wait.

    Args:
        recorded: the dataset.
        root: the folder of caches, made where missing.
        image_size: height and width in pixels; pictures of another size are resized (bilinear).

    Raises:
        DatasetError: a video or picture is missing, unreadable, lacks frames, or has another size than the camera's others.
        NoRoomError: the disk has too little room; said before anything is decoded.
    """
    path = root / f"frames-{image_size}-{cache_digest(recorded)}.npy"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.is_file():
            _build(recorded, path, image_size)
    frames: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return frames


def cache_digest(recorded: Demonstrations) -> str:
    """16 hex digits over `info.json`, the names, sizes and modification times of the dataset's files, and the cameras used."""
    digest = hashlib.sha256((recorded.root / "meta" / "info.json").read_bytes())
    digest.update("".join(f"{camera.stored}\n" for camera in recorded.cameras).encode())
    for path in sorted(recorded.layout.files):
        stat = path.stat()
        digest.update(f"{path.relative_to(recorded.root)}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _build(recorded: Demonstrations, path: Path, image_size: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # what an interrupted process left has no claim to the room
    shape = (len(recorded.cameras), len(recorded), image_size, image_size, 3)
    what = f"the decoded pictures ({shape[0]} cameras, {shape[1]} frames of {image_size}x{image_size} pixels)"
    size = math.prod(shape)
    check_room(path.parent, size, what)
    try:
        with explained(path.parent):
            frames = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        reserve(partial, partial.stat().st_size, what)
        _decode(recorded, frames)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    frames.flush()
    partial.replace(path)


def _decode(recorded: Demonstrations, frames: NDArray[np.uint8]) -> None:
    """Fill `frames` with all pictures; the first one that cannot be had ends it."""
    with (
        tqdm(total=math.prod(frames.shape[:2]), desc="decoding", unit="frame", disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        jobs: list[Future[None]] = []
        for out, camera in zip(frames, recorded.cameras, strict=True):
            if camera.videos is None:
                jobs.append(pool.submit(_decode_images, recorded, camera, out, bar))
            else:
                jobs += [pool.submit(_decode_video, recorded, file, out, bar) for file in _video_files(recorded, camera)]
        done, waiting = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in waiting:
            job.cancel()
        for job in done:
            job.result()


def _video_files(recorded: Demonstrations, camera: Camera) -> list[_VideoFile]:
    """Where the pictures of a camera with videos lie."""
    places = camera.videos
    assert places is not None
    times = places.start[recorded.episode_index] + recorded.frame_index / recorded.fps
    files = []
    for chunk, file in sorted(set(zip(places.chunk.tolist(), places.file.tolist(), strict=True))):
        rows = np.flatnonzero(((places.chunk == chunk) & (places.file == file))[recorded.episode_index])
        rows = rows[np.argsort(times[rows], kind="stable")]
        path = recorded.layout.video(camera.stored, chunk, file)
        files.append(_VideoFile(camera=camera, path=path, rows=rows, times=times[rows], frame_s=1 / recorded.fps))
    return files


def _decode_video(recorded: Demonstrations, file: _VideoFile, out: NDArray[np.uint8], bar: tqdm) -> None:
    """Fill the rows of `out` that `file` holds; each gets the frame nearest in time, at most half a frame away."""
    if not file.path.is_file():
        raise DatasetError(f"video {file.path} is missing; copy the dataset again with its videos")
    done = 0
    for frame in decode(file.path):
        while done < len(file.rows) and file.times[done] < frame.time + file.frame_s / 2:
            if file.times[done] < frame.time - file.frame_s / 2:
                raise _no_frame(recorded, file, done, f"the next one is at {frame.time:.4f} s")
            found = replace(file.camera.format, height=frame.rgb.shape[0], width=frame.rgb.shape[1])
            _check_same(file.camera, found, _place(recorded, file.camera, int(file.rows[done])))
            out[file.rows[done]] = resize(frame.rgb, out.shape[1])
            done += 1
            bar.update()
    if done < len(file.rows):
        raise _no_frame(recorded, file, done, "it ends before")


def _no_frame(recorded: Demonstrations, file: _VideoFile, at: int, instead: str) -> DatasetError:
    place = _place(recorded, file.camera, int(file.rows[at]))
    return DatasetError(
        f"video {file.path} has no frame at {file.times[at]:.4f} s, {instead} ({place}); "
        f"write the dataset again, or mend fps in its info.json, which is {recorded.fps:g}, if that is not the video's"
    )


def _decode_images(recorded: Demonstrations, camera: Camera, out: NDArray[np.uint8], bar: tqdm) -> None:
    """Fill `out` from an image feature: encoded pictures inside the parquet files."""
    column = recorded.index_column
    for path in recorded.layout.data:
        for batch in read_batches(path, [column, camera.stored], 256):
            for row, picture in zip(batch[column].to_pylist(), batch[camera.stored].to_pylist(), strict=True):
                place = _place(recorded, camera, int(row))
                with open_image(picture, recorded.root, place) as image:
                    _check_same(camera, PictureFormat.of_image(image), place)
                    out[int(row)] = resize(rgb_of(image, place), out.shape[1])
                bar.update()


def _place(recorded: Demonstrations, camera: Camera, row: int) -> str:
    return f"camera {camera.key}, episode {recorded.episode_index[row]}, frame {recorded.frame_index[row]}"


def _check_same(camera: Camera, found: PictureFormat, place: str) -> None:
    """Refuse a camera whose pictures change: stretched to one size they would no longer show the same."""
    if found != camera.format:
        raise DatasetError(
            f"{place}: its picture is {found.words}, its first one was {camera.format.words}; "
            "record these episodes again, or leave the camera out with data.cameras"
        )


def resize(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`(h, w, 3)` uint8 to `(size, size, 3)`, bilinear with antialiasing; untouched where the size fits."""
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file lock at `path`; the system frees it when the process dies."""
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
