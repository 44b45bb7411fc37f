"""Steadier keypoints and face boxes: the one-euro filter, and gaps filled between two sights.

A pose model places points on a grid of half an input pixel, so that a person who stands still
trembles. The filter is slow while a point hardly moves and follows at once when it moves fast.

Source: Casiez, Roussel, Vogel, "1 € Filter" (CHI 2012).
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

MIN_CUTOFF_HZ: Final = 2.0
SPEED_COEFFICIENT: Final = 30.0  # added Hz of the cutoff per body height a second
SPEED_CUTOFF_HZ: Final = 4.0
_SEEN_SCORE: Final = 0.25  # half the drawing threshold: below it a point has no place to follow


class OneEuroFilter:
    """Smooths many numbers at once, each on its own.

    Speeds are measured in body heights, so that a large and a small picture of a movement behave
    alike, and times in seconds, so that the frame rate does not matter.
    """

    def __init__(self) -> None:
        self._values: Points | None = None  # [...] NaN where nothing was seen yet
        self._speeds = np.zeros(0)
        self._time_s = 0.0

    def update(self, values: Points, time_s: float, unit: float, seen: NDArray[np.bool_]) -> Points:
        """Filter the next values.

        Args:
            values: [...] of one shape in all calls.
            time_s: Later than the call before.
            unit: Length that speeds are relative to, such as the body's height [px].
            seen: [...] whether a value is to be trusted; others pass through and are forgotten.

        Returns:
            [...] filtered.
        """
        if self._values is None:
            self._values, self._speeds = np.full(values.shape, np.nan), np.zeros(values.shape)
        elapsed_s = max(time_s - self._time_s, 1e-3)
        before = self._values
        known = seen & ~np.isnan(before)
        step = np.where(known, values - np.where(known, before, 0.0), 0.0)
        speed = step / (elapsed_s * max(unit, 1.0))
        weight = _weight(np.full(values.shape, SPEED_CUTOFF_HZ), elapsed_s)
        self._speeds = np.where(known, self._speeds + weight * (speed - self._speeds), 0.0)
        cutoff_hz = MIN_CUTOFF_HZ + SPEED_COEFFICIENT * np.abs(self._speeds)
        filtered = np.where(known, values - (1 - _weight(cutoff_hz, elapsed_s)) * step, values)
        self._values, self._time_s = np.where(seen, filtered, np.nan), time_s
        return filtered

    def reset(self) -> None:
        """Forget everything: a cut, another person, a long gap."""
        self._values = None

    def state(self) -> dict[str, Any]:
        """What later values depend on."""
        return {"values": self._values, "speeds": self._speeds, "time_s": self._time_s}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._values, self._speeds = state["values"], state["speeds"]
        self._time_s = state["time_s"]


class KeypointFilter(OneEuroFilter):
    """Smooths the places of keypoints; their scores stay."""

    def update_points(self, keypoints: Points, time_s: float, box: Points) -> Points:
        """Filter one frame's keypoints.

        Args:
            keypoints: [133, 3] (x_px, y_px, score), scores on a scale on which 0.5 is drawn.
            time_s: Of the frame.
            box: [4] of the person; its height is the unit of speed.

        Returns:
            [133, 3].
        """
        seen = np.isfinite(keypoints).all(axis=1) & (keypoints[:, 2] >= _SEEN_SCORE)
        both = np.repeat(seen[:, None], 2, axis=1)
        result = keypoints.copy()
        result[:, :2] = self.update(keypoints[:, :2], time_s, float(box[3] - box[1]), both)
        return result


class BoxFilter(OneEuroFilter):
    """Smooths a box of whole pixels."""

    def update_box(
        self, box: tuple[int, int, int, int], time_s: float
    ) -> tuple[int, int, int, int]:
        """Filter one frame's box, relative to its own height."""
        values = np.array(box, np.float64)
        unit = 4.0 * float(values[3] - values[1])  # a body is several heads high
        moved = self.update(values, time_s, unit, np.ones(4, bool))
        x0, y0, x1, y1 = (round(value) for value in moved.tolist())
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _weight(cutoff_hz: Points, elapsed_s: float) -> Points:
    """[...] share of the new value in an exponential filter of this cutoff."""
    return 1 / (1 + 1 / (2 * math.pi * cutoff_hz * elapsed_s))


def fill_gap(before: Points, after: Points, num_frames: int) -> Points:
    """Keypoints of frames without a sight, on straight lines.

    Args:
        before: [133, 3] of the last frame seen.
        after: [133, 3] of the next one.
        num_frames: Frames between them.

    Returns:
        [num_frames, 133, 3]; scores are the lower of the two.
    """
    share = (np.arange(1, num_frames + 1) / (num_frames + 1))[:, None, None]
    between = before + share * (after - before)
    between[..., 2] = np.minimum(before[:, 2], after[:, 2])
    return np.asarray(between, np.float64)
