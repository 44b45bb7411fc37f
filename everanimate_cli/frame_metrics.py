"""Metrics that need no network: each sees one frame after the other, once, and keeps a few numbers.

A *meter* takes frames in order and gives a `Track` for each of its metrics. Frames are RGB uint8
`[H, W, 3]`; memory does not grow with the length of the video but for a few numbers per frame.

Peak signal-to-noise ratios are taken of errors that are averaged over a stretch of time, and end at
`MAX_PSNR_DB`, which equal frames have. Drift is measured on means over a stretch as well: ordinary
movement cancels, a steady change remains.
"""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from everanimate_cli import metrics
from everanimate_cli.frechet import PairSums
from everanimate_cli.images import fit_frame
from everanimate_cli.metrics import Frame, Mask, Values

if TYPE_CHECKING:
    from everanimate_cli.settings import Fit

MAX_PSNR_DB: Final = 100.0
_LEAST_ERROR: Final = metrics.DATA_RANGE**2 / 10 ** (MAX_PSNR_DB / 10)

# Drawn skeletons are thin: hair and clothes lie outside the hull of the joints.
HULL_MARGIN: Final = 0.15  # of the longer side of the hull
# Black of a pose video that was encoded is not quite black.
_DRAWN_FROM: Final = 48

# Mean colours and the like need no more pixels.
_SMALL_SIDE_PX: Final = 256
_BLOCK_S: Final = 1.0  # what counts as one observation of a slope
_MIN_BLOCKS: Final = 3
_MIN_BLOCKS_FOR_INTERVAL: Final = 5
_MAX_AUTOCORRELATION: Final = 0.95
_S_PER_MINUTE: Final = 60


@dataclass(eq=False)
class Moment:
    """One frame of a video, with what it is compared with.

    Attributes:
        index: Position in the video, from 0.
        made_u8: [H, W, 3].
        truth_u8: [H, W, 3] of the same moment; None where there is none.
        person: [H, W], True where the person may be; None where that is not known.
    """

    index: int
    made_u8: Frame
    truth_u8: Frame | None = None
    person: Mask | None = None

    @cached_property
    def grey(self) -> Frame:
        """[H, W] brightness, BT.601."""
        return np.asarray(cv2.cvtColor(self.made_u8, cv2.COLOR_RGB2GRAY), np.uint8)

    @cached_property
    def small(self) -> Frame:
        """[h, w, 3] averaged over areas so that no side is longer than 256."""
        height, width = self.made_u8.shape[:2]
        shrink = _SMALL_SIDE_PX / max(height, width)
        if shrink >= 1:
            return self.made_u8
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        return fit_frame(self.made_u8, *size, fit="stretch")


# --- what meters give ----------------------------------------------------------------------------


def _first_column(rows: Values) -> Values:
    return rows[:, 0]


def _mean(rows: Values) -> float:
    return float(rows[:, 0].mean())


@dataclass(frozen=True)
class Track:
    """A metric over the frames of a video.

    Attributes:
        rows: [N, k] numbers per frame; NaN where it was not measured.
        of_frames: From rows [n, k] to the metric of each frame [n].
        pooled: From rows [n, k], n at least 1 and none NaN, to the metric of that stretch.
    """

    rows: Values
    of_frames: Callable[[Values], Values] = _first_column
    pooled: Callable[[Values], float] = _mean

    def per_frame(self) -> Values:
        """[N], NaN where it was not measured."""
        return self.of_frames(self.rows)

    def over(self, chosen: slice | Mask) -> float | None:
        """The metric of some frames; None if it was measured on none of them."""
        rows = self.rows[chosen]
        rows = rows[np.isfinite(rows).all(axis=1)]
        return self.pooled(rows) if len(rows) else None


@dataclass(frozen=True)
class Whole:
    """A metric of sets of frames, which no single frame has.

    Attributes:
        overall: Of all frames; None if they are too few.
        horizons: Of each stretch of time.
        sums: What they come from, so that the sets of several videos can be put together.
    """

    overall: float | None
    horizons: tuple[float | None, ...]
    sums: PairSums | None = None


@dataclass(frozen=True)
class Unavailable:
    """A metric that cannot be measured.

    Attributes:
        reason: What it needs, or why it is not defined.
    """

    reason: str


Outcome = Track | Whole | Unavailable


class Meter(Protocol):
    """Measures while a video goes by."""

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""

    def outcomes(self) -> Mapping[str, Outcome]:
        """What was measured, by the metrics' names."""


def psnr_of(mean_squared_errors: Values) -> Values:
    """Decibels of errors, at most `MAX_PSNR_DB`; NaN stays."""
    clipped = np.maximum(mean_squared_errors, _LEAST_ERROR)
    return np.asarray(10 * np.log10(metrics.DATA_RANGE**2 / clipped), np.float64)


def _psnr_track(errors: Values) -> Track:
    return Track(
        errors[:, None],
        of_frames=lambda rows: psnr_of(rows[:, 0]),
        pooled=lambda rows: float(psnr_of(rows[:, 0].mean(keepdims=True))[0]),
    )


@dataclass
class Series:
    """Numbers per frame; frames that are left out are NaN."""

    num_columns: int = 1
    _values: array[float] = field(default_factory=lambda: array("d"))

    def put(self, index: int, *numbers: float) -> None:
        """Note the numbers of a frame; later frames come later."""
        missing = index * self.num_columns - len(self._values)
        self._values.extend([math.nan] * missing)
        self._values.extend(numbers)

    def rows(self, num_frames: int) -> Values:
        """[N, k]."""
        rows = np.full((num_frames, self.num_columns), np.nan)
        seen = np.frombuffer(self._values, np.float64).reshape(-1, self.num_columns)
        rows[: len(seen)] = seen
        return rows

    def __len__(self) -> int:
        """Frames up to the last one that was put in."""
        return len(self._values) // self.num_columns


# --- against the truth ---------------------------------------------------------------------------


class ErrorMeter:
    """PSNR and mean absolute difference."""

    def __init__(self) -> None:
        self._squared, self._absolute, self._num_frames = Series(), Series(), 0

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        if moment.truth_u8 is not None:
            squared, absolute = _errors(moment.made_u8, moment.truth_u8)
            self._squared.put(moment.index, squared)
            self._absolute.put(moment.index, absolute / metrics.DATA_RANGE)

    def outcomes(self) -> Mapping[str, Outcome]:
        """PSNR and L1."""
        return {
            "psnr": _psnr_track(self._squared.rows(self._num_frames)[:, 0]),
            "l1": Track(self._absolute.rows(self._num_frames)),
        }


def _errors(made_u8: Frame, truth_u8: Frame) -> tuple[float, float]:
    """Mean squared and mean absolute difference of two frames of one shape."""
    # In C and without copies; absdiff does not wrap around, and both sums are exact.
    difference = cv2.absdiff(made_u8, truth_u8)
    squared = cv2.norm(difference, cv2.NORM_L2SQR)
    absolute = cv2.norm(difference, cv2.NORM_L1)
    return float(squared) / difference.size, float(absolute) / difference.size


class SsimMeter:
    """Structural similarity, see `metrics.ssim`."""

    def __init__(self) -> None:
        self._series, self._num_frames = Series(), 0
        self._is_too_small = False

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        if moment.truth_u8 is None:
            return
        if min(moment.made_u8.shape[:2]) < metrics.SSIM_WINDOW_PX:
            self._is_too_small = True
            return
        self._series.put(moment.index, metrics.ssim(moment.made_u8, moment.truth_u8))

    def outcomes(self) -> Mapping[str, Outcome]:
        """SSIM."""
        if self._is_too_small:
            return {"ssim": Unavailable("needs frames of at least 11x11 pixels")}
        return {"ssim": Track(self._series.rows(self._num_frames))}


# --- against the beginning -----------------------------------------------------------------------


class Looks(NamedTuple):
    """How a frame looks on the whole.

    Attributes:
        lightness: Mean L* of CIELAB.
        green_red: Mean a*.
        blue_yellow: Mean b*.
        contrast: Standard deviation of brightness, in levels of 8 bits.
        saturation: Mean difference of the largest and the smallest colour channel, in levels.
        sharpness: Root mean square of the Laplacian of brightness, in levels.
    """

    lightness: float
    green_red: float
    blue_yellow: float
    contrast: float
    saturation: float
    sharpness: float


def measure_looks(moment: Moment) -> Looks:
    """See `Looks`; all but the sharpness on a small copy of the frame."""
    small = moment.small
    colour = metrics.colour_shift(small, np.zeros_like(small))  # black is the origin of CIELAB
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    edges = cv2.Laplacian(moment.grey, cv2.CV_32F)
    return Looks(
        *colour,
        contrast=float(grey.std(dtype=np.float64)),
        saturation=float((small.max(-1) - small.min(-1)).mean(dtype=np.float64)),
        sharpness=math.sqrt(float(np.square(edges).mean(dtype=np.float64))),
    )


class DriftMeter:
    """Change of colour, contrast, saturation and sharpness since the first frames."""

    def __init__(self, baseline_frames: int) -> None:
        """Take the number of frames at the start that are the measure."""
        self._baseline_frames = baseline_frames
        self._series, self._num_frames = Series(len(Looks._fields)), 0

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        self._series.put(moment.index, *measure_looks(moment))

    def outcomes(self) -> Mapping[str, Outcome]:
        """The four drifts."""
        names = ("colour_drift", "contrast_drift", "saturation_drift", "sharpness_drift")
        if self._num_frames <= self._baseline_frames:
            reason = _too_short(self._baseline_frames)
            return dict.fromkeys(names, Unavailable(reason))
        rows = self._series.rows(self._num_frames)
        base = Looks(*rows[: self._baseline_frames].mean(0).tolist())
        change = rows - base
        found: dict[str, Outcome] = {"colour_drift": _drift_track(change[:, :3])}
        for name in names[1:3]:
            column = Looks._fields.index(name.removesuffix("_drift"))
            found[name] = _drift_track(change[:, column : column + 1])
        if base.sharpness:
            found[names[3]] = _drift_track(100 * change[:, -1:] / base.sharpness)
        else:
            found[names[3]] = Unavailable("not defined: the video begins without any edge")
        return found


def _drift_track(change: Values) -> Track:
    return Track(
        change,
        of_frames=lambda rows: np.asarray(np.linalg.norm(rows, axis=1), np.float64),
        pooled=lambda rows: float(np.linalg.norm(rows.mean(0))),
    )


def _too_short(baseline_frames: int) -> str:
    return f"needs a video that is longer than its first {baseline_frames} frames"


def person_mask(pose_u8: Frame, height: int, width: int, fit: Fit = "contain") -> Mask | None:
    """Where the person of a pose picture may be: the hull of what is drawn, with a margin.

    Args:
        pose_u8: [h, w, 3] skeleton on black.
        height: Of the frame.
        width: Of the frame.
        fit: How the pose was brought into the frame.

    Returns:
        [height, width]; None where nothing is drawn.
    """
    pose_u8 = fit_frame(pose_u8, height, width, fit)
    drawn = cv2.findNonZero((pose_u8.max(-1) >= _DRAWN_FROM).astype(np.uint8))
    if drawn is None:
        return None
    hull = cv2.convexHull(drawn)
    _, _, box_width, box_height = cv2.boundingRect(hull)
    margin = max(1, round(HULL_MARGIN * max(box_width, box_height)))
    mask = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(mask, hull, 1)
    # A line along the hull as wide as twice the margin, which is much faster than a dilation.
    cv2.polylines(mask, [hull], isClosed=True, color=1, thickness=2 * margin)
    return mask.astype(np.bool_)


class Backdrop:
    """What lies around the person at the start of a video, and where later frames show it again.

    Looks at a frame once, however many ask.
    """

    def __init__(self, baseline_frames: int) -> None:
        """Take the number of frames at the start that are the measure."""
        self.baseline_frames = baseline_frames
        self.num_frames = 0
        self._sum: NDArray[np.float32] | None = None  # [H, W, 3]
        self._count: NDArray[np.float32] | None = None  # [H, W]
        self._scene: NDArray[np.float32] | None = None
        self._seen: Mask | None = None

    @property
    def scene(self) -> NDArray[np.float32]:
        """[H, W, 3] mean of the first frames; 0 where the person covered all of them."""
        if self._scene is None:
            assert self._sum is not None  # asked for once a frame was seen
            assert self._count is not None
            counted = np.maximum(self._count, 1)[..., None]
            self._scene = np.asarray(self._sum / counted, np.float32)
        return self._scene

    def seen_in(self, moment: Moment) -> Mask | None:
        """[H, W] pixels that show the scene; None in the first frames, and where there are none."""
        if moment.index >= self.num_frames:
            self.num_frames = moment.index + 1
            self._seen = self._look(moment)
        return self._seen

    def why_never_seen(self) -> Unavailable:
        """Why no frame showed the scene again."""
        if self.num_frames <= self.baseline_frames:
            return Unavailable(_too_short(self.baseline_frames))
        return Unavailable("not defined: no pixel is ever seen beside the person")

    def _look(self, moment: Moment) -> Mask | None:
        if moment.person is None:
            return None
        around = ~moment.person
        if self._sum is None or self._count is None:
            self._sum = np.zeros(moment.made_u8.shape, np.float32)
            self._count = np.zeros(moment.made_u8.shape[:2], np.float32)
        if moment.index < self.baseline_frames:
            self._sum[around] += moment.made_u8[around]
            self._count += around
            return None
        seen = around & (self._count > 0)
        return seen if seen.any() else None


class BackgroundMeter:
    """PSNR of the pixels around the person against their mean over the first frames."""

    def __init__(self, backdrop: Backdrop) -> None:
        """Take what knows the scene."""
        self._backdrop, self._series = backdrop, Series()

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        seen = self._backdrop.seen_in(moment)
        if seen is not None:
            away = self._backdrop.scene[seen] - moment.made_u8[seen]
            self._series.put(moment.index, float(np.square(away).mean(dtype=np.float64)))

    def outcomes(self) -> Mapping[str, Outcome]:
        """PSNR of the background."""
        if not len(self._series):
            return {"background_psnr": self._backdrop.why_never_seen()}
        return {"background_psnr": _psnr_track(self._series.rows(self._backdrop.num_frames)[:, 0])}


# --- from frame to frame -------------------------------------------------------------------------


class MotionMeter:
    """Flicker, and how far chunk joins stand out."""

    def __init__(self, joins: Sequence[int] | None) -> None:
        """Take the frames at which a new chunk begins; None where that is not known."""
        self._joins = joins
        self._jumps, self._flicker, self._num_frames = Series(), Series(), 0
        self._last: Frame | None = None  # [H, W, 3]
        self._greys: list[NDArray[np.int16]] = []  # of the last two frames

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        if self._last is not None:
            _, jump = _errors(moment.made_u8, self._last)
            self._jumps.put(moment.index, jump)
        grey = moment.grey.astype(np.int16)
        if len(self._greys) == 2:  # noqa: PLR2004  # the frame before and the one before that
            before, middle = self._greys
            twice = before + grey - 2 * middle
            self._flicker.put(moment.index - 1, float(np.abs(twice).mean(dtype=np.float64)) / 2)
        self._greys = [*self._greys[-1:], grey]
        self._last = moment.made_u8

    def outcomes(self) -> Mapping[str, Outcome]:
        """Flicker and seam."""
        flicker: Outcome = Unavailable("needs a video of three frames or more")
        if len(self._flicker):
            flicker = Track(self._flicker.rows(self._num_frames))
        return {"flicker": flicker, "seam": self._seam()}

    def _seam(self) -> Outcome:
        if self._joins is None:
            return Unavailable(
                "needs the chunks: --frames-per-chunk and --overlap, or the settings file beside "
                "the video"
            )
        joins = [join for join in self._joins if 0 < join < self._num_frames]
        if not joins:
            return Unavailable("not defined: the video is a single chunk")
        jumps = self._jumps.rows(self._num_frames)[:, 0]
        is_join = np.zeros(self._num_frames, np.bool_)
        is_join[joins] = True
        within = jumps[~is_join & np.isfinite(jumps)]
        if not len(within) or not within.any():
            return Unavailable("not defined: the video stands still within its chunks")
        return Track(np.where(is_join, jumps / within.mean(), np.nan)[:, None])


# --- over time -----------------------------------------------------------------------------------


class Slope(NamedTuple):
    """How a metric changes with time.

    Attributes:
        per_minute: Slope of the least-squares line.
        interval: Where the slope lies with 95 % confidence; None if there are too few moments.
    """

    per_minute: float
    interval: tuple[float, float] | None


def measure_slope(times_s: Values, values: Values) -> Slope | None:
    """Least-squares line through the means over seconds.

    Neighbouring frames are much alike, and would make any slope look certain: a second counts as
    one observation, and as less if the seconds are alike too (by the first autocorrelation of what
    the line leaves over).

    Args:
        times_s: [n], rising.
        values: [n]; NaN is left out.

    Returns:
        None if there are values in fewer than three different seconds.
    """
    is_there = np.isfinite(values)
    times, heights = times_s[is_there], values[is_there]
    if not len(times):
        return None
    _, block = np.unique(np.floor(times / _BLOCK_S), return_inverse=True)
    counts = np.bincount(block)
    num_blocks = len(counts)
    if num_blocks < _MIN_BLOCKS:
        return None
    middles = np.bincount(block, times) / counts
    means = np.bincount(block, heights) / counts
    slope = metrics.slope_per_minute(middles, means)
    if num_blocks < _MIN_BLOCKS_FOR_INTERVAL:
        return Slope(slope, None)
    away = middles - middles.mean()
    rest = means - means.mean() - slope / _S_PER_MINUTE * away
    spread = float(rest @ rest)
    correlation = float(rest[1:] @ rest[:-1]) / spread if spread else 0.0
    correlation = min(max(correlation, 0.0), _MAX_AUTOCORRELATION)
    inflation = (1 + correlation) / (1 - correlation)
    variance = inflation * spread / (num_blocks - 2) / float(away @ away)
    degrees = max(1.0, num_blocks / inflation - 2)
    reach = student_quantile(degrees) * math.sqrt(variance) * _S_PER_MINUTE
    return Slope(slope, (slope - reach, slope + reach))


def student_quantile(degrees: float, probability: float = 0.975) -> float:
    """Quantile of Student's distribution, within 1 % from 3 degrees of freedom on.

    Source: the asymptotic series in Abramowitz and Stegun 26.7.5; 1 and 2 in closed form.
    """
    if degrees <= 1:
        return math.tan(math.pi * (probability - 0.5))
    z = statistics.NormalDist().inv_cdf(probability)
    if degrees <= 2:  # noqa: PLR2004  # closed form
        away = 2 * probability - 1
        return away * math.sqrt(2 / (1 - away * away))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
