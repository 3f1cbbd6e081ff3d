"""Videos of small pictures: one continuous file for many episodes, and its frames back again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from libra_ray.data.checks import DatasetError
from libra_ray.data.pictures import PictureFormat

if TYPE_CHECKING:
    from lerobot.configs import RGBEncoderConfig

KEYFRAME_EVERY = 8
"""Frames between key frames: reaching any frame decodes at most this many."""


def encoder_config(codec: str) -> "RGBEncoderConfig":
    """LeRobot's encoder settings for small pictures.

    At 64x64 the usual 4:2:0 colour subsampling alone costs more than everything else (32 dB at best on Meta-World's
    pictures), and a constant-rate factor starves the moving frames; a constant quantiser without subsampling keeps every
    frame above 40 dB and is the fastest setting of x264.

    Args:
        codec: an encoder that LeRobot accepts: `h264`, `hevc`, `libsvtav1`, ...

    Raises:
        ValueError: the codec is unknown; the message lists the valid ones.
    """
    from lerobot.configs import RGBEncoderConfig

    if codec == "h264":
        return RGBEncoderConfig(
            vcodec="h264", pix_fmt="yuv444p", g=KEYFRAME_EVERY, crf=None, preset="ultrafast", extra_options={"qp": 8}
        )
    if codec == "hevc":
        return RGBEncoderConfig(vcodec="hevc", pix_fmt="yuv444p", g=KEYFRAME_EVERY, crf=8, preset="ultrafast")
    return RGBEncoderConfig(vcodec=codec, g=KEYFRAME_EVERY, crf=12)


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """One picture of a video: `time` in seconds from the video's start, `rgb` `(height, width, 3)` uint8."""

    time: float
    rgb: NDArray[np.uint8]


class VideoWriter:
    """Appends pictures to one video file.

    Args:
        path: the file to write.
        fps: pictures per second.
        encoder: LeRobot's encoder settings.
        height: picture height in pixels; `width` likewise.
    """

    def __init__(self, path: Path, *, fps: int | Fraction, encoder: "RGBEncoderConfig", height: int, width: int) -> None:
        _quiet()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.frames = 0
        self.bytes = 0
        self._tick = Fraction(1, fps)
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(encoder.vcodec, fps, options=encoder.get_codec_options(1, as_strings=True))
        self._stream.pix_fmt = encoder.pix_fmt
        self._stream.height = height
        self._stream.width = width
        self._stream.time_base = self._tick

    def write(self, pictures: NDArray[np.uint8]) -> None:
        """Append `(T, height, width, 3)` pictures."""
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = self.frames
            frame.time_base = self._tick
            self.frames += 1
            self._mux(self._stream.encode(frame))

    def close(self) -> None:
        """Flush the encoder and complete the file."""
        self._mux(self._stream.encode())
        self._container.close()

    def _mux(self, packets: list[av.Packet]) -> None:
        self.bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)


def decode(path: Path) -> Iterator[DecodedFrame]:
    """Every picture of the video at `path`, in order of time.

    Raises:
        DatasetError: the file holds no readable video.
    """
    with _opened(path) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.time is None:
                raise DatasetError(f"{path} cannot be read as a video: a frame has no time; write the dataset again")
            yield DecodedFrame(time=float(frame.time), rgb=np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))


def picture_format(path: Path) -> PictureFormat:
    """Size and kind of the pictures of the video at `path`; none is decoded.

    Raises:
        DatasetError: the file holds no readable video.
    """
    with _opened(path) as container:
        return PictureFormat.of_stream(container.streams.video[0])


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """The video at `path`; what FFmpeg says against it becomes one line."""
    _quiet()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DatasetError(f"{path} cannot be read as a video: it has no pictures; copy the dataset again")
            yield container
    except av.FFmpegError as error:
        raise DatasetError(f"{path} cannot be read as a video: {error}; copy the dataset again") from error


def _quiet() -> None:
    """FFmpeg's own chatter stays off the terminal; errors still raise."""
    logging.getLogger("libav").setLevel(logging.ERROR)
    av.logging.set_level(av.logging.ERROR)
