"""Encode frames to a video file."""

# PyAV's `Packet` takes a type argument in its stubs only, so annotations must not be evaluated.
from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import av
import av.error
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)
from av.video.stream import VideoStream

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.containers import open_output, tag_for_players
from everanimate_cli.errors import SettingsError
from everanimate_cli.images import Frames
from everanimate_cli.settings import MAX_CRF, Codec
from everanimate_cli.video import as_rate

Matrix = Literal["bt601", "bt709"]

# By how many frames x264 and x265 may run ahead of the display: B-frames with one level between.
_REORDER_DELAY = 2

# x265 4.2 reads and writes past its buffers in pictures up to 64 pixels wide: the program crashes,
# or the bytes differ from run to run.
_MIN_H265_SIDE = 128

# Matrix, primaries and transfer curve of a file.
_TAGS = {
    "bt601": (Colorspace.ITU601, ColorPrimaries.SMPTE170M, ColorTrc.SMPTE170M),
    "bt709": (Colorspace.ITU709, ColorPrimaries.BT709, ColorTrc.BT709),
}


class VideoWriter:
    """Encode frames to an MP4 file that appears under its name only when it is whole.

    Colours are converted to limited range and tagged so. The same frames
    and settings give the same bytes: the number of threads is fixed and no date is stored. Groups
    of pictures are closed, so that `join_videos` can put files end to end.
    """

    def __init__(  # noqa: PLR0913 - an encoder's settings, all by keyword
        self,
        path: Path,
        *,
        width: int,
        height: int,
        rate: Fraction | float,
        codec: Codec = "h264",
        crf: int = 18,
        preset: str = "medium",
        threads: int = 1,
        lossless: bool = False,
        matrix: Matrix = "bt709",
    ) -> None:
        """Check the settings; the file is opened by `with`.

        Args:
            path: File to make or replace; its folder must exist.
            width: Width of all frames, even.
            height: Height of all frames, even.
            rate: Frames per second.
            codec: Video format.
            crf: Quality from 0 (best) to 51, on the encoder's own scale.
            preset: The encoder's trade of speed for size, "ultrafast" to "placebo".
            threads: Encoder threads; another number may give other bytes.
            lossless: Full colour resolution without quantisation, whatever `crf` says. Only the
                rounding to YUV remains, at most 2 of 255; few players show such a file.
            matrix: Between RGB and YUV. Readers that ignore the tag, such as OpenCV before 5, take
                "bt601" for granted.

        Raises:
            SettingsError: If a value is out of range.
        """
        if min(width, height) < 1 or width % 2 or height % 2:
            raise SettingsError(
                f"video size {width}x{height} cannot be encoded. Use an even width and height."
            )
        if codec == "h265" and min(width, height) < _MIN_H265_SIDE:
            raise SettingsError(
                f"video size {width}x{height} is too small for h265. "
                f"Use at least {_MIN_H265_SIDE}x{_MIN_H265_SIDE}, or h264."
            )
        if not 0 <= crf <= MAX_CRF:
            raise SettingsError(f"crf {crf} is out of range. Use 0 (best) to {MAX_CRF}.")
        if threads < 1:
            raise SettingsError(f"threads {threads} is out of range. Use at least 1.")
        self._path = path
        self._size = (height, width)
        self._rate = as_rate(rate)
        self._pixel_format = "yuv444p" if lossless else "yuv420p"
        self._codec = codec
        self._matrix: Matrix = matrix
        self._options = {"preset": preset, "crf": "0" if lossless else str(crf)}
        if codec == "h264":
            # x264's macroblock tree (core 165, AVX-512) reads memory that nobody has written in
            # pictures of most widths, so that the bytes would differ from run to run.
            self._options |= {"threads": str(threads), "x264-params": "open-gop=0:mbtree=0"}
        else:
            # x265 prints by itself unless told not to, and opens its groups unless told not to.
            self._options["x265-params"] = (
                f"open-gop=0:frame-threads=1:pools={threads}:info=0:log-level=none"
                f":lossless={int(lossless)}"
            )
        self._num_frames = 0
        self._num_packets = 0
        self._reformatter = VideoReformatter()
        self._stack = ExitStack()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None

    def __enter__(self) -> Self:
        """Open the encoder.

        Raises:
            SettingsError: If the encoder does not know the preset.
            OSError: If the folder cannot be written.
        """
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            self._container = stack.enter_context(open_output(temporary))
            self._stream = stream = self._container.add_stream(
                "libx264" if self._codec == "h264" else "libx265",
                rate=self._rate,
                options=self._options,
                height=self._size[0],
                width=self._size[1],
                time_base=1 / self._rate,
            )
            context = stream.codec_context
            context.pix_fmt = self._pixel_format
            context.colorspace, context.color_primaries, context.color_trc = _TAGS[self._matrix]
            context.color_range = ColorRange.MPEG
            tag_for_players(stream)
            try:
                context.open()
            except av.error.FFmpegError as error:
                raise SettingsError(
                    f"preset {self._options['preset']!r} or size {self._size[1]}x{self._size[0]} "
                    f"was refused by the {self._codec} encoder."
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it after an exception."""
        if exc is not None:
            self._stack.__exit__(exc_type, exc, traceback)
            return
        with self._stack:
            if not self._num_frames:
                raise ValueError(f"no frame was written to {self._path}")
            self._encode(None)

    def write(self, frames_u8: Frames) -> None:
        """Append frames.

        Args:
            frames_u8: [S, H, W, 3] uint8 RGB.

        Raises:
            ValueError: If shape or dtype differ.
            OSError: If the disk is full.
        """
        expected = (*self._size, 3)
        if frames_u8.dtype != np.uint8 or frames_u8.shape[1:] != expected:
            raise ValueError(f"frames {frames_u8.dtype} {frames_u8.shape}, not uint8 {expected}")
        for frame_u8 in frames_u8:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame_u8), format="rgb24")
            # Without a target matrix swscale takes BT.601 whatever the stream is tagged with.
            frame = self._reformatter.reformat(
                frame,
                format=self._pixel_format,
                dst_colorspace=_TAGS[self._matrix][0],
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
            frame.pts = self._num_frames
            frame.time_base = 1 / self._rate
            self._num_frames += 1
            self._encode(frame)

    def _encode(self, frame: VideoFrame | None) -> None:
        """Encode a frame, or with None what the encoder still holds."""
        if self._container is None or self._stream is None:
            raise ValueError("the writer is not open")
        for packet in self._stream.encode(frame):
            # x265 leaves this time undefined in files of one or two frames.
            packet.dts = self._num_packets - _REORDER_DELAY
            packet.duration = 1
            self._num_packets += 1
            self._container.mux(packet)
