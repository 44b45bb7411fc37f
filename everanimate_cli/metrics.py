"""How far a video is from the truth, and how that changes with time.

Pictures are compared frame by frame, so that a video of any length needs the memory of two frames:
RGB uint8 `[H, W, 3]`, data range 255, computed in float64. Squared errors can be averaged over
frames, decibels cannot: pool the errors of a stretch first, then call `psnr_db`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Values = NDArray[np.float64]

DATA_RANGE: Final = 255.0

# Wang et al. 2004: a Gaussian window of 11 pixels, and constants that steady dark and flat places.
SSIM_WINDOW_PX: Final = 11
SSIM_SIGMA_PX: Final = 1.5
_SSIM_MEAN_CONSTANT: Final = (0.01 * DATA_RANGE) ** 2
_SSIM_CONTRAST_CONSTANT: Final = (0.03 * DATA_RANGE) ** 2

# IEC 61966-2-1 (sRGB) to CIE 1976 L*a*b* under D65, 2 degrees.
_SRGB = np.arange(256) / 255
_CURVE_FROM = 0.04045  # below, sRGB is a straight line
_LINEAR: Final = np.where(_SRGB > _CURVE_FROM, ((_SRGB + 0.055) / 1.055) ** 2.4, _SRGB / 12.92)
_XYZ_OF_RGB: Final = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
)
_WHITE_XYZ: Final = np.array([0.95047, 1.0, 1.08883])
_CUBE_ROOT_FROM: Final = 0.008856  # below, CIE prescribes a straight line
_LINE_SLOPE, _LINE_OFFSET = 7.787, 16 / 116

BOOTSTRAP_RESAMPLES: Final = 10_000
_MIN_VIDEOS = 2  # with one, every resample is the same
CONFIDENCE: Final = 0.95

_S_PER_MINUTE = 60


# --- one frame against another -------------------------------------------------------------------


def squared_error(made_u8: Frame, truth_u8: Frame, mask: Mask | None = None) -> float:
    """Mean squared error over all channels of the pixels that count.

    Args:
        made_u8: [H, W, 3], or frames [S, H, W, 3].
        truth_u8: The same shape.
        mask: [H, W] or [S, H, W], True where a pixel counts; None for all.

    Returns:
        In squared grey levels, 0 to 65025.

    Raises:
        ValueError: If the shapes differ, a frame is not uint8 or the mask is empty.
    """
    made_u8, truth_u8 = _choose_pixels(made_u8, truth_u8, mask)
    # int32 holds every difference and every square of one; uint8 would wrap around.
    difference = made_u8.astype(np.int32) - truth_u8
    return float(np.square(difference).mean(dtype=np.float64))


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio of a mean squared error, peak 255; infinite for no error.

    Raises:
        ValueError: If the error is below 0.
    """
    if mean_squared_error == 0:
        return math.inf
    return 10 * math.log10(DATA_RANGE**2 / mean_squared_error)


def psnr(made_u8: Frame, truth_u8: Frame, mask: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB; arguments as in `squared_error`."""
    return psnr_db(squared_error(made_u8, truth_u8, mask))


def ssim(made_u8: Frame, truth_u8: Frame) -> float:
    """Structural similarity (Wang et al. 2004), the mean over channels and places.

    Gaussian window of 11x11 pixels, sigma 1.5, population covariance, data range 255. Only places
    count where the whole window lies inside the frame.

    Args:
        made_u8: [H, W, 3], both sides at least 11.
        truth_u8: The same shape.

    Returns:
        -1 to 1; 1 for equal frames.

    Raises:
        ValueError: If the shapes differ, a frame is not uint8 or smaller than the window.

    Source: scikit-image's `structural_similarity` with `gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255, channel_axis=-1` gives the same number.
    """
    _check_alike(made_u8, truth_u8)
    *frames, height, width, _ = made_u8.shape
    if frames or min(height, width) < SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs a frame of at least 11x11 pixels, not {made_u8.shape}")
    made, truth = made_u8.astype(np.float64), truth_u8.astype(np.float64)
    made_mean, truth_mean = _windowed(made), _windowed(truth)
    covariance = _windowed(made * truth) - made_mean * truth_mean
    variances = _windowed(made * made) + _windowed(truth * truth)
    squared_means = made_mean**2 + truth_mean**2
    luminance = (2 * made_mean * truth_mean + _SSIM_MEAN_CONSTANT) / (
        squared_means + _SSIM_MEAN_CONSTANT
    )
    contrast_structure = (2 * covariance + _SSIM_CONTRAST_CONSTANT) / (
        variances - squared_means + _SSIM_CONTRAST_CONSTANT
    )
    return float((luminance * contrast_structure).mean())


def _windowed(values: Values) -> Values:
    """Gaussian mean of [H, W, 3] around each place whose window lies inside."""
    size = (SSIM_WINDOW_PX, SSIM_WINDOW_PX)
    blurred = np.asarray(cv2.GaussianBlur(values, size, SSIM_SIGMA_PX), np.float64)
    edge = SSIM_WINDOW_PX // 2
    return blurred[edge:-edge, edge:-edge]


class ColourShift(NamedTuple):
    """Mean colour of one frame less that of another, in CIELAB units.

    Attributes:
        lightness: L*; positive is brighter.
        green_red: a*; positive is more red, negative more green.
        blue_yellow: b*; positive is more yellow, negative more blue.
    """

    lightness: float
    green_red: float
    blue_yellow: float

    @property
    def size(self) -> float:
        """Euclidean length; 2.3 is about a just noticeable difference."""
        return math.hypot(*self)


def colour_shift(made_u8: Frame, truth_u8: Frame, mask: Mask | None = None) -> ColourShift:
    """How the colours moved on the whole: errors of shape cancel, a cast or fading remains.

    Over a stretch of time, average the three numbers first and take the size then.

    Args:
        made_u8: [H, W, 3].
        truth_u8: The same shape.
        mask: [H, W], True where a pixel counts; None for all.

    Returns:
        Mean signed difference, made less truth.

    Raises:
        ValueError: If the shapes differ, a frame is not uint8 or the mask is empty.
    """
    made_u8, truth_u8 = _choose_pixels(made_u8, truth_u8, mask)
    difference = (_to_lab(made_u8) - _to_lab(truth_u8)).reshape(-1, 3).mean(0)
    return ColourShift(*difference.tolist())


def _to_lab(pixels_u8: Frame) -> Values:
    """CIELAB of [..., 3] sRGB pixels. OpenCV's conversion is off by up to 0.3 in a* and b*."""
    relative = _LINEAR[pixels_u8] @ (_XYZ_OF_RGB.T / _WHITE_XYZ)  # [..., 3] XYZ over white
    x, y, z = np.moveaxis(
        np.where(
            relative > _CUBE_ROOT_FROM, np.cbrt(relative), _LINE_SLOPE * relative + _LINE_OFFSET
        ),
        -1,
        0,
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _choose_pixels(made_u8: Frame, truth_u8: Frame, mask: Mask | None) -> tuple[Frame, Frame]:
    """Pixels of both frames that count; raises ValueError as `squared_error`."""
    _check_alike(made_u8, truth_u8)
    if mask is not None:
        made_u8, truth_u8 = made_u8[mask], truth_u8[mask]
    if not made_u8.size:
        raise ValueError("no pixel is in the mask")
    return made_u8, truth_u8


def _check_alike(made_u8: Frame, truth_u8: Frame) -> None:
    for frame_u8 in (made_u8, truth_u8):
        if frame_u8.dtype != np.uint8 or frame_u8.shape[-1:] != (3,):
            raise ValueError(f"a frame is {frame_u8.dtype} {frame_u8.shape}, not uint8 RGB")
    if made_u8.shape != truth_u8.shape:
        raise ValueError(f"a frame of {made_u8.shape} against one of {truth_u8.shape}")


# --- over time -----------------------------------------------------------------------------------


def frame_jump(frame_u8: Frame, next_u8: Frame) -> float:
    """Mean absolute difference of neighbouring frames, 0 to 255; a pop at a seam stands out."""
    _check_alike(frame_u8, next_u8)
    return float(np.abs(next_u8.astype(np.int16) - frame_u8).mean(dtype=np.float64))


def seam_jump(jumps: ArrayLike, seams: Sequence[int]) -> float:
    """Mean jump where one chunk follows another, over the mean jump within chunks.

    Args:
        jumps: [n] `frame_jump` from frame i to frame i + 1.
        seams: Positions in `jumps` at which a new chunk begins, at least one but not all.

    Returns:
        1 where seams cannot be told from other frames; NaN for a video that stands still.

    Raises:
        ValueError: If nothing is left on one side.
    """
    values = np.asarray(jumps, np.float64)
    is_seam = np.zeros(len(values), np.bool_)
    is_seam[list(seams)] = True
    if is_seam.all() or not is_seam.any():
        raise ValueError(f"{is_seam.sum()} seams among {len(values)} pairs of frames")
    within = float(values[~is_seam].mean())
    return float(values[is_seam].mean()) / within if within else math.nan


def slope_per_minute(times_s: ArrayLike, values: ArrayLike) -> float:
    """Slope of the least-squares line, in units of the values per minute.

    Args:
        times_s: [n] moments, at least two different ones.
        values: [n].

    Raises:
        ValueError: If there are no two different moments.
    """
    times, heights = np.asarray(times_s, np.float64), np.asarray(values, np.float64)
    if not times.size or np.ptp(times) == 0:
        raise ValueError("a slope needs two different moments")
    away = times - times.mean()
    return float(away @ (heights - heights.mean()) / (away @ away)) * _S_PER_MINUTE


# --- over videos ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean and the range that it may have had with other videos.

    Attributes:
        value: Of the videos that were measured.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends lie on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: ArrayLike,
    *,
    seed: int = 0,
    num_resamples: int = BOOTSTRAP_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile bootstrap interval of a mean over videos.

    With eight videos such an interval is a little narrow: count it as a lower bound of the doubt.

    Args:
        values: [n] one number for each video, at least two.
        seed: Of the resamples; the same seed and number of videos give the same ones.
        num_resamples: How many.
        confidence: Share of the resampled means that the interval holds, 0 to 1.

    Raises:
        ValueError: If there are fewer than two videos.
    """
    numbers = np.asarray(values, np.float64)
    means = _resampled_means(numbers[:, None], seed, num_resamples)[:, 0]
    return _interval(float(numbers.mean()), means, confidence)


def paired_bootstrap(
    ours: ArrayLike,
    theirs: ArrayLike,
    *,
    relative: bool = False,
    seed: int = 0,
    num_resamples: int = BOOTSTRAP_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Bootstrap interval of the difference between two ways to make the same videos.

    Whole pairs are drawn again, so that easy and hard videos do not widen the interval.

    Args:
        ours: [n] one number for each video, at least two.
        theirs: [n] of the same videos in the same order.
        relative: Give the gain of the mean, `mean(ours) / mean(theirs) - 1`, not the difference.
        seed: As in `bootstrap`, and so the rest.
        num_resamples: How many.
        confidence: Share of the resampled results that the interval holds, 0 to 1.

    Raises:
        ValueError: If the lengths differ or there are fewer than two videos.
    """
    first, second = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} against {second.size} videos")
    pairs = np.stack([first, second], axis=1)
    # The mean of the videos themselves in front of those of the resamples.
    means = np.concatenate([pairs.mean(0)[None], _resampled_means(pairs, seed, num_resamples)])
    gains = means[:, 0] / means[:, 1] - 1 if relative else means[:, 0] - means[:, 1]
    return _interval(float(gains[0]), gains[1:], confidence)


def _resampled_means(rows: Values, seed: int, num_resamples: int) -> Values:
    """Means [num_resamples, k] of rows [n, k] drawn with replacement."""
    num_rows = len(rows)
    if num_rows < _MIN_VIDEOS:
        raise ValueError(f"an interval needs at least {_MIN_VIDEOS} videos, not {num_rows}")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    drawn = generator.integers(num_rows, size=(num_resamples, num_rows))
    # Times a row is drawn, so that the sum is one small product however many columns there are.
    counts = np.stack([np.bincount(one, minlength=num_rows) for one in drawn])
    return np.asarray(counts @ rows / num_rows, np.float64)


def _interval(value: float, resampled: Values, confidence: float) -> Interval:
    edge = (1 - confidence) / 2
    low, high = np.quantile(resampled, [edge, 1 - edge])
    return Interval(value, float(low), float(high))
