"""Read and write pictures, and fit a frame into another size.

Every frame of the program is RGB uint8 `[H, W, 3]`. The reference picture and the pose frames go
through the same `fit_frame`, so that they line up.
"""

import math
import struct
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.errors import MediaError, SettingsError
from everanimate_cli.settings import Fit

Frames = npt.NDArray[np.uint8]

# Pillow's names for grey pictures with more than 8 bits. Its own `convert("L")` clips them at 255,
# which turns every 16-bit picture white.
_DEEP_GREY = {"I", "I;16", "I;16L", "I;16B", "I;16N"}

# What Pillow's readers raise on damaged data, from SyntaxError (PNG) to RuntimeError (AVIF).
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    RuntimeError,
    struct.error,
)


def check_media_file(path: Path, kind: Literal["picture", "video"]) -> None:
    """Refuse, before any decoder sees it, a path that cannot be a media file.

    Args:
        path: File that the user named.
        kind: Word for the message.

    Raises:
        MediaError: If the path is missing, a folder, not readable or empty.
    """
    try:
        with path.open("rb") as file:
            first_byte = file.read(1)
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist. Give the path of a {kind} file.") from error
    except IsADirectoryError as error:
        raise MediaError(f"{path} is a folder. Give the path of a {kind} file.") from error
    except OSError as error:
        raise MediaError(f"{path} cannot be opened: {error.strerror}.") from error
    if not first_byte:
        raise MediaError(f"{path} is empty (0 bytes). Give another {kind} file.")


def read_image(path: Path) -> Frames:
    """Read a picture the way a viewer shows it.

    The EXIF orientation is applied, transparency is composed on black, 16-bit values are scaled to
    8 bits. Of an animation the first picture counts.

    Args:
        path: PNG, JPEG, WebP, TIFF, BMP, GIF or another format that Pillow reads.

    Returns:
        [H, W, 3] uint8 RGB.

    Raises:
        MediaError: If the file is missing, empty, a folder, damaged, too large or no picture.
    """
    check_media_file(path, "picture")
    try:
        with warnings.catch_warnings():
            # Pillow tells odd tags, and 89 million pixels, by warnings; it refuses twice as many.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)
                return _to_rgb(upright)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} has too many pixels. Give a smaller picture.") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{path} is not a picture in a known format. Give a PNG, JPEG or WebP file."
        ) from error
    except _UNREADABLE as error:
        raise MediaError(
            f"{path} cannot be read as a picture: {error}. Give a PNG, JPEG or WebP file."
        ) from error


def write_png(path: Path, frame_u8: Frames) -> None:
    """Write a frame as a PNG file, whole or not at all.

    Args:
        path: File to make or replace.
        frame_u8: [H, W, 3] uint8 RGB.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(frame_u8, "RGB").save(temporary, format="PNG")


def contain_box(
    source_height: int, source_width: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Where `fit_frame` puts the picture in mode "contain".

    Args:
        source_height: Height of the frame to fit.
        source_width: Width of the frame to fit.
        height: Height of the canvas.
        width: Width of the canvas.

    Returns:
        (top, left, content height, content width) in canvas pixels.

    Source: pose page section 4.1; the order of the floating-point steps is part of the rule.
    """
    if source_height / source_width > height / width:
        content_height, content_width = height, max(1, int(height / source_height * source_width))
    else:
        content_height, content_width = max(1, int(width / source_width * source_height)), width
    return (
        (height - content_height) // 2,
        (width - content_width) // 2,
        content_height,
        content_width,
    )


def fit_frame(frame_u8: Frames, height: int, width: int, fit: Fit) -> Frames:
    """Bring a frame to the size of the canvas.

    Args:
        frame_u8: [H, W, 3] uint8 RGB.
        height: Height of the result.
        width: Width of the result.
        fit: "contain" keeps the whole frame between black bars, "cover" fills the canvas and cuts
            the overhang off both sides alike, "stretch" gives up the aspect ratio.

    Returns:
        [height, width, 3] uint8 RGB; the frame itself if it has that size already.

    Source: pose page section 4.1 ("contain").
    """
    if frame_u8.shape[:2] == (height, width):
        return frame_u8
    cut, place = _fit_boxes(frame_u8.shape[0], frame_u8.shape[1], height, width, fit)
    piece = frame_u8[cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
    if (place.height, place.width) == (height, width):
        return _resize(piece, height, width)
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[place.top : place.top + place.height, place.left : place.left + place.width] = _resize(
        piece, place.height, place.width
    )
    return canvas


def fit_points(
    points: npt.NDArray[np.float64], source: tuple[int, int], canvas: tuple[int, int], fit: Fit
) -> npt.NDArray[np.float64]:
    """Points of a frame, moved to where `fit_frame` puts the frame's pixels.

    Args:
        points: [..., 2 or more] (x_px, y_px, anything) in frame pixels.
        source: (height, width) of the frame [px].
        canvas: (height, width) of the canvas [px].
        fit: See `fit_frame`.

    Returns:
        The same shape, (x_px, y_px) in canvas pixels, the rest unchanged.
    """
    cut, place = _fit_boxes(*source, *canvas, fit)
    moved = points.copy()
    # The rounded content has its own scale in each direction; a common one would drift by a pixel.
    moved[..., 0] = place.left + (points[..., 0] - cut.left) * (place.width / cut.width)
    moved[..., 1] = place.top + (points[..., 1] - cut.top) * (place.height / cut.height)
    return moved


class _Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


def _fit_boxes(
    source_height: int, source_width: int, height: int, width: int, fit: Fit
) -> tuple[_Box, _Box]:
    """What is cut out of a frame, and where on the canvas it goes."""
    whole, canvas = _Box(0, 0, source_height, source_width), _Box(0, 0, height, width)
    if fit == "contain":
        return whole, _Box(*contain_box(source_height, source_width, height, width))
    if fit == "stretch":
        return whole, canvas
    if source_width * height > source_height * width:  # too wide
        crop_height, crop_width = source_height, max(1, round(source_height * width / height))
    else:
        crop_height, crop_width = max(1, round(source_width * height / width)), source_width
    top, left = (source_height - crop_height) // 2, (source_width - crop_width) // 2
    return _Box(top, left, crop_height, crop_width), canvas


def fit_size(
    reference_height: int, reference_width: int, area: int, multiple: int
) -> tuple[int, int]:
    """Largest canvas with about the reference's aspect ratio.

    Args:
        reference_height: Height of the reference picture.
        reference_width: Width of the reference picture.
        area: Most pixels that the canvas may have.
        multiple: Both sides are floored to a multiple of this.

    Returns:
        (height, width), each at least one `multiple`.

    Raises:
        SettingsError: If `area` or `multiple` is below 1.

    Source: pose page section 5. In integers: the same rule with a floating-point square root falls
    one step short where a side is an exact multiple.
    """
    if area < 1 or multiple < 1:
        raise SettingsError(f"area {area} and multiple {multiple} must both be at least 1.")
    step = multiple * multiple
    height = math.isqrt(area * reference_height // (reference_width * step))
    width = math.isqrt(area * reference_width // (reference_height * step))
    return max(1, height) * multiple, max(1, width) * multiple


def _resize(frame_u8: Frames, height: int, width: int) -> Frames:
    """Average over areas when the frame gets smaller, interpolate when it gets larger."""
    shrinks = height * width < frame_u8.shape[0] * frame_u8.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(frame_u8, (width, height), interpolation=interpolation)
    return np.asarray(resized, np.uint8)


def _to_rgb(image: Image.Image) -> Frames:
    """Any Pillow mode to [H, W, 3] uint8."""
    if image.mode in _DEEP_GREY:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > np.iinfo(np.uint16).max:
            raise ValueError("its grey values need more than 16 bits")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("it holds floating-point values of unknown range")
    if image.mode in {"LA", "PA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, rgba)
    return np.asarray(image.convert("RGB"), np.uint8).copy()
