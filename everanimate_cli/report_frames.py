"""Frames of a video as small WebP pictures, for contact sheets."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np
from PIL import Image

from everanimate_cli.images import read_image
from everanimate_cli.video import VideoReader

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from everanimate_cli.images import Frames

MAX_SIDE_PX: Final = 320
# A picture of 64x64 pixels takes half of the bytes that it takes as JPEG, whose tables alone are
# 600. The colours are smoothed to half the resolution, which leaves a cast as it is.
_WEBP_QUALITY = 88
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
        fps: Its frames per second.
        frames: Pictures by frame number.
        changes: By frame number, what changed since the frame before, amplified.
    """

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
    follows: Callable[[int], int | None] | None = None,
) -> FilmStrip:
    """Read frames in one pass; at most two are in memory at their full size.

    Args:
        path: Video file.
        frames: Numbers of frames; what the video does not have is left out.
        moments_s: Further frames by their time [s].
        changes: Numbers of frames, from 1, of which the change since the frame before is wanted.
        rate: Frames per second of the numbers; None for those of the file.
        start_s: Where number 0 lies in the file [s].
        follows: From the number of a frame to that of the one shown for it, None for none; by
            default the same. Changes are those of neighbours in the file.

    Returns:
        The pictures that there are.

    Raises:
        MediaError: If the file is missing or damaged.
    """
    with VideoReader(path, rate=rate, start_s=start_s, transform=_shrunk) as reader:
        strip = FilmStrip(fps=float(reader.rate))
        shown_for: defaultdict[int, list[int]] = defaultdict(list)
        for wanted in {*frames, *(strip.index_at(moment_s) for moment_s in moments_s)}:
            number = wanted if follows is None else follows(wanted)
            if number is not None:
                shown_for[number].append(wanted)
        before = {index - 1 for index in changes}
        last: tuple[int, Frames] | None = None
        for index in sorted({*shown_for, *before, *changes}):
            if not 0 <= index < len(reader):
                continue
            frame = reader.read([index])[0]
            if index in shown_for:
                strip.frames |= dict.fromkeys(shown_for[index], _thumbnail(frame))
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
    Image.fromarray(frame_u8).save(file, format="WEBP", quality=_WEBP_QUALITY)
    text = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = frame_u8.shape[:2]
    return Thumbnail(f"data:image/webp;base64,{text}", height, width)
