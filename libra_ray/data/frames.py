"""The decoded-frame cache: every picture decoded once, then read through a memory map, so training never waits for video."""

import fcntl
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import Recorded, read_table
from libra_ray.data.video import decode

_THREADS = 2
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass(frozen=True, kw_only=True)
class _VideoFile:
    """One video and the rows `(n,)` of the dataset whose pictures it holds, at `times` `(n,)` seconds, in order of time."""

    path: Path
    rows: NDArray[np.int64]
    times: NDArray[np.float64]
    frame_s: float


def frame_cache(recorded: Recorded, root: Path, image_size: int) -> NDArray[np.uint8]:
    """All pictures of the dataset, `(cameras, F, image_size, image_size, 3)` uint8 RGB, as a read-only memory map.

    Cameras stand in the order of `recorded.image_keys`. The cache is named by a digest of the dataset's files: a changed
    dataset gets a new cache. It appears only when complete; of several processes one decodes and the others wait.

    Args:
        recorded: the dataset.
        root: the folder of caches, made where missing.
        image_size: height and width in pixels; pictures of another size are resized (bilinear).

    Raises:
        DatasetError: a video is missing, unreadable, or lacks frames.
    """
    path = root / f"frames-{image_size}-{cache_digest(recorded)}.npy"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.is_file():
            _build(recorded, path, image_size)
    frames: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return frames


def cache_digest(recorded: Recorded) -> str:
    """16 hex digits over `info.json` and the names, sizes and modification times of the dataset's files."""
    digest = hashlib.sha256((recorded.root / "meta" / "info.json").read_bytes())
    files = [p for folder in ("data", "meta/episodes", "videos") for p in (recorded.root / folder).rglob("*") if p.is_file()]
    for path in sorted(files):
        stat = path.stat()
        digest.update(f"{path.relative_to(recorded.root)}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _build(recorded: Recorded, path: Path, image_size: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shape = (len(recorded.image_keys), len(recorded), image_size, image_size, 3)
    frames = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    with (
        tqdm(total=shape[0] * shape[1], desc="decoding", unit="frame", disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        jobs = []
        for camera, key in enumerate(recorded.image_keys):
            if recorded.features[key]["dtype"] == "image":
                jobs.append(pool.submit(_decode_images, recorded, key, frames[camera], bar))
            else:
                jobs += [pool.submit(_decode_video, file, frames[camera], bar) for file in _video_files(recorded, key)]
        for job in jobs:
            job.result()
    frames.flush()
    partial.replace(path)


def _video_files(recorded: Recorded, key: str) -> list[_VideoFile]:
    """Where the pictures of camera `key` lie."""
    names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    table = read_table(recorded.root, "meta/episodes", ["episode_index", *names])
    order = np.argsort(table["episode_index"].to_numpy())
    chunk, file, start = (table[name].to_numpy()[order] for name in names)
    template = json.loads((recorded.root / "meta" / "info.json").read_text(encoding="utf-8")).get("video_path") or _VIDEO_PATH
    times = start[recorded.episode_index] + recorded.frame_index / recorded.fps
    files = []
    for c, f in sorted(set(zip(chunk.tolist(), file.tolist(), strict=True))):
        rows = np.flatnonzero((chunk == c)[recorded.episode_index] & (file == f)[recorded.episode_index])
        rows = rows[np.argsort(times[rows], kind="stable")]
        path = recorded.root / template.format(video_key=key, chunk_index=c, file_index=f)
        files.append(_VideoFile(path=path, rows=rows, times=times[rows], frame_s=1 / recorded.fps))
    return files


def _decode_video(file: _VideoFile, out: NDArray[np.uint8], bar: tqdm) -> None:
    """Fill the rows of `out` that `file` holds; each gets the frame nearest in time, at most half a frame away."""
    if not file.path.is_file():
        raise DatasetError(f"video {file.path} is missing; copy the dataset again with its videos")
    done = 0
    for frame in decode(file.path):
        while done < len(file.rows) and file.times[done] < frame.time + file.frame_s / 2:
            if file.times[done] < frame.time - file.frame_s / 2:
                raise DatasetError(f"video {file.path} has no frame at {file.times[done]:.4f} s; write the dataset again")
            out[file.rows[done]] = resize(frame.rgb, out.shape[1])
            done += 1
            bar.update()
    if done < len(file.rows):
        raise DatasetError(f"video {file.path} ends before {file.times[done]:.4f} s; write the dataset again")


def _decode_images(recorded: Recorded, key: str, out: NDArray[np.uint8], bar: tqdm) -> None:
    """Fill `out` from an image feature: encoded pictures inside the parquet files."""
    for path in sorted((recorded.root / "data").glob("*/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["index", key]):
            for row, picture in zip(batch["index"].to_pylist(), batch[key].to_pylist(), strict=True):
                source = io.BytesIO(picture["bytes"]) if picture["bytes"] else recorded.root / picture["path"]
                with Image.open(source) as image:
                    out[row] = resize(np.asarray(image.convert("RGB")), out.shape[1])
                bar.update()


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
