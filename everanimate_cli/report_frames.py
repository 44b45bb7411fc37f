"""Frames of a video as small JPEG pictures, for contact sheets."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np
from PIL import Image

from everanimate_cli.images import read_image
from everanimate_cli.video import VideoReader

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from everanimate_cli.images import Frames

MAX_SIDE_PX: Final = 320
_JPEG_QUALITY = 82
# What changes at a join is faint: eight grey levels would not be seen as they are.
DIFFERENCE_GAIN: Final = 4


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Attributes:
        uri: The picture itself as a `data:` address.
        height: [pixels].
        width: [pixels].
    """

    uri: str
    height: int
    width: int


@dataclass
class FilmStrip:
    """Small pictures of one video.

    Attributes:
        num_frames: Length of the video.
        fps: Its frames per second.
        frames: Pictures by frame number.
        changes: By frame number, what changed since the frame before, amplified.
    """

    num_frames: int
    fps: float
    frames: dict[int, Thumbnail] = field(default_factory=dict)
    changes: dict[int, Thumbnail] = field(default_factory=dict)

    def index_at(self, time_s: float) -> int:
        """Number of the frame nearest to a moment; it may lie behind the end."""
        return int(time_s * self.fps + 0.5)


def read_strip(
    path: Path,
    frames: Collection[int] = (),
    *,
    moments_s: Collection[float] = (),
    changes: Collection[int] = (),
    rate: float | None = None,
    start_s: float | None = None,
) -> FilmStrip:
    """Read frames in one pass; at most two are in memory at their full size.

    Args:
        path: Video file.
        frames: Numbers of frames; what the video does not have is left out.
        moments_s: Further frames by their time [s].
        changes: Numbers of frames, from 1, of which the change since the frame before is wanted.
        rate: Frames per second of the numbers; None for those of the file.
        start_s: Where number 0 lies in the file [s].

    Returns:
        The pictures that there are.

    Raises:
        MediaError: If the file is missing or damaged.
    """
    with VideoReader(path, rate=rate, start_s=start_s, transform=_shrunk) as reader:
        strip = FilmStrip(num_frames=len(reader), fps=float(reader.rate))
        wanted = {*frames, *(strip.index_at(moment_s) for moment_s in moments_s)}
        before = {index - 1 for index in changes}
        last: tuple[int, Frames] | None = None
        for index in sorted({*wanted, *before, *changes}):
            if not 0 <= index < len(reader):
                continue
            frame = reader.read([index])[0]
            if index in wanted:
                strip.frames[index] = _thumbnail(frame)
            if index in changes and last is not None and last[0] == index - 1:
                strip.changes[index] = _thumbnail(_difference(last[1], frame))
            last = index, frame
    return strip


def read_picture(path: Path) -> Thumbnail:
    """A picture file as a small picture.

    Raises:
        MediaError: If the file cannot be read.
    """
    return _thumbnail(_shrunk(read_image(path)))


def _shrunk(frame_u8: Frames) -> Frames:
    """The frame with its longer side at most `MAX_SIDE_PX`; never enlarged."""
    height, width = frame_u8.shape[:2]
    scale = MAX_SIDE_PX / max(height, width)
    if scale >= 1:
        return frame_u8
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(frame_u8, size, interpolation=cv2.INTER_AREA), np.uint8)


def _difference(before_u8: Frames, after_u8: Frames) -> Frames:
    """Absolute change, amplified and cut off at white."""
    change = np.abs(after_u8.astype(np.int16) - before_u8) * DIFFERENCE_GAIN
    return np.asarray(np.minimum(change, 255), np.uint8)


def _thumbnail(frame_u8: Frames) -> Thumbnail:
    file = io.BytesIO()
    # Full colour resolution: a colour cast is one of the things to be seen.
    Image.fromarray(frame_u8).save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    text = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = frame_u8.shape[:2]
    return Thumbnail(f"data:image/jpeg;base64,{text}", height, width)
