"""Videos of small pictures: episodes encoded apart, put together into one file, and its frames back again."""

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Self

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from numpy.typing import NDArray

from libra_ray.data.checks import DatasetError
from libra_ray.data.pictures import PictureFormat

if TYPE_CHECKING:
    from lerobot.configs import RGBEncoderConfig

KEYFRAME_EVERY = 8
"""Frames between key frames: reaching any frame decodes at most this many."""
SAMPLES = 8
"""Pictures of a clip that are kept as they are."""


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
    try:
        return RGBEncoderConfig(vcodec=codec, g=KEYFRAME_EVERY, crf=12)
    except ValueError as error:
        raise ValueError(f"record.video_codec={codec}: LeRobot cannot encode so here ({error}); give h264") from error


def check_encodes(codec: str, size: int) -> None:
    """Encode two blank pictures, `size` pixels a side: hardware may be missing, and some encoders take no small pictures.

    Raises:
        ValueError: there is no such encoder, or it does not work here.
    """
    encoder, said = EncoderSettings.of(encoder_config(codec)), logging.getLogger("libav")
    said.disabled = True
    try:
        encode(np.zeros((2, size, size, 3), np.uint8), 10, encoder)
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(
            f"record.video_codec={codec} ({encoder.vcodec}) does not encode pictures of {size} pixels here ({error}); give h264"
        ) from error
    finally:
        said.disabled = False


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """An encoder as FFmpeg knows it, for processes without LeRobot."""

    vcodec: str
    pix_fmt: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, encoder: "RGBEncoderConfig") -> Self:
        """Those of LeRobot's settings."""
        options = encoder.get_codec_options(1, as_strings=True)
        return cls(vcodec=encoder.vcodec, pix_fmt=encoder.pix_fmt, options={str(k): str(v) for k, v in options.items()})


@dataclass(frozen=True, kw_only=True)
class EncodedClip:
    """The pictures of one camera in one episode, encoded: a piece of the data set's video.

    Attributes:
        encoded: a whole video file of its own.
        frames: how many pictures.
        samples: `(n, height, width, 3)` uint8, at most `SAMPLES` of them, spread over the episode and not encoded.
    """

    encoded: bytes
    frames: int
    samples: NDArray[np.uint8]


def encode(pictures: NDArray[np.uint8], fps: int | Fraction, encoder: EncoderSettings) -> EncodedClip:
    """The clip of `(T, height, width, 3)` pictures; the same pictures give the same bytes in any process."""
    file = io.BytesIO()
    writer = VideoWriter(file, fps=fps, encoder=encoder, height=pictures.shape[1], width=pictures.shape[2])
    writer.write(pictures)
    writer.close()
    chosen = np.linspace(0, len(pictures) - 1, min(len(pictures), SAMPLES)).astype(int)
    return EncodedClip(encoded=file.getvalue(), frames=len(pictures), samples=pictures[chosen])


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """One picture of a video: `time` in seconds from the video's start, `rgb` `(height, width, 3)` uint8."""

    time: float
    rgb: NDArray[np.uint8]


class VideoWriter:
    """Encodes pictures into one video file.

    Args:
        file: to write.
        fps: pictures per second.
        height: picture height in pixels; `width` likewise.
    """

    def __init__(
        self, file: Path | io.BytesIO, *, fps: int | Fraction, encoder: EncoderSettings, height: int, width: int
    ) -> None:
        self.frames = 0
        self._tick = Fraction(1, fps)
        self._container = _created(file)
        stream = self._container.add_stream(encoder.vcodec, fps, options=dict(encoder.options))
        assert isinstance(stream, av.VideoStream), "LeRobot's encoders are of videos"
        self._stream = stream
        self._stream.pix_fmt = encoder.pix_fmt
        self._stream.height = height
        self._stream.width = width
        self._stream.time_base = self._tick
        # No picture is encoded before one that is shown later: any clip can follow any other.
        self._stream.codec_context.max_b_frames = 0

    def write(self, pictures: NDArray[np.uint8]) -> None:
        """Append `(T, height, width, 3)` pictures."""
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = self.frames
            frame.time_base = self._tick
            self.frames += 1
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Flush the encoder and complete the file."""
        self._container.mux(self._stream.encode())
        self._container.close()


class JoinedVideo:
    """Puts clips of one encoder together into one video file, as they are: nothing is encoded again.

    Args:
        path: the file to write.
        fps: the clips' pictures per second.

    Attributes:
        frames: pictures so far.
        bytes: encoded bytes so far.
    """

    def __init__(self, path: Path, fps: int | Fraction) -> None:
        self.frames = 0
        self.bytes = 0
        self._tick = Fraction(1, fps)
        self._container = _created(path)
        self._stream: av.VideoStream | None = None

    def append(self, clip: EncodedClip) -> None:
        """Append a clip."""
        with av.open(io.BytesIO(clip.encoded), "r") as source:
            given = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(given, opaque=True)
            assert given.time_base is not None, "a file has its own clock"
            begins = round(self.frames * self._tick / given.time_base)
            for packet in source.demux(given):
                # The last one is empty.
                if packet.dts is None or packet.pts is None:
                    continue
                packet.pts += begins
                packet.dts += begins
                packet.stream = self._stream
                self.bytes += packet.size
                self._container.mux(packet)
        self.frames += clip.frames

    def close(self) -> None:
        """Complete the file."""
        self._container.close()


def _created(file: Path | io.BytesIO) -> OutputContainer:
    _quiet()
    if isinstance(file, io.BytesIO):
        return av.open(file, "w", format="mp4")
    file.parent.mkdir(parents=True, exist_ok=True)
    return av.open(str(file), "w")


def decode(path: Path) -> Iterator[DecodedFrame]:
    """Every picture of the video at `path`, in order of time.

    Raises:
        DatasetError: the file holds no readable video, or a picture of it is damaged and the decoder knows: that fills in what
            it lacks from around it, and goes on.
    """
    with _opened(path) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.time is None:
                raise DatasetError(f"{path} cannot be read as a video: a frame has no time; write the dataset again")
            if frame.is_corrupt:
                raise DatasetError(
                    f"{path}: its picture at {frame.time:.4f} s is damaged; copy the dataset again, record the episode again, "
                    "or leave the camera out with data.cameras"
                )
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
    """FFmpeg's own chatter stays off the terminal; errors still raise, in its words."""
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    av.logging.set_level(av.logging.ERROR)
