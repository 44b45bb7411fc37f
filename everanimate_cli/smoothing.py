"""Steadier keypoints and face boxes: the one-euro filter, and gaps filled between two sights.

A pose model places points on a grid of half an input pixel and trembles by about one more, which is
seen on a person who stands still and drowns in the movement of one who does not. The filter holds
points that hardly move and lets go at once of those that do. Speeds count in body heights per
second and times in seconds: neither the resolution nor the rate of a video changes what it does.

Source: Casiez, Roussel and Vogel, "1 Euro Filter: A Simple Speed-based Low-pass Filter for Noisy
Input in Interactive Systems", CHI 2012; pose page sections 7, 11.4 and 13.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

# The paper's advice is a low cutoff first and then as much speed coefficient as lag asks for. With
# dancing toy people (25 fps, noise of 0.5 to 1 input pixel of 384 x 288) these take 32 to 39 % of
# the jitter from points that are nearly still, leave the mean error as it is or lower, and delay
# fast points by 0.01 frames. A coefficient of 30 takes 60 %, and makes the error of fast points 1.6
# to 2.9 times as large.
MIN_CUTOFF_HZ: Final = 3.0
SPEED_COEFFICIENT: Final = 500.0  # added Hz of the cutoff per body height a second
SPEED_CUTOFF_HZ: Final = 3.0
STILL_SPEED: Final = 0.05  # [body heights a second] what noise alone looks like
MAX_GAP_S: Final = 0.3  # a point unseen for longer starts anew
_SEEN_SCORE: Final = 0.25  # half the drawing threshold: below it a point has no place to follow
_BODY_PER_FACE: Final = 8.0  # heights of the body in one of the face box


class OneEuroFilter:
    """Smooths many points at once, each on its own.

    Differs from the paper: a speed below `STILL_SPEED` does not raise the cutoff, because noise has
    a speed as well; and both coordinates of a point share one speed, so that no direction is bent.
    """

    def __init__(self) -> None:
        self._values: Points | None = None  # [N, 2] as last seen; None before the first frame
        self._speeds = np.zeros((0, 2))  # [N, 2] in units a second
        self._seen_s = np.zeros(0)  # [N] time of the last sight, -inf for none

    def update(self, values: Points, time_s: float, unit: float, seen: NDArray[np.bool_]) -> Points:
        """Filter the next values.

        Args:
            values: [N, 2], with one N in all calls.
            time_s: Later than the call before.
            unit: Length that speeds are relative to, such as the body's height [px].
            seen: [N] whether a point is to be trusted. Others, and those that are not finite, come
                back as they are and leave no trace.

        Returns:
            [N, 2] filtered.

        Raises:
            ValueError: If time does not rise or the unit is not positive.
        """
        if self._values is None:
            self._values, self._speeds = np.zeros(values.shape), np.zeros(values.shape)
            self._seen_s = np.full(len(values), -np.inf)
        elapsed_s = time_s - self._seen_s
        if elapsed_s.min() <= 0 or not unit > 0:
            raise ValueError(f"time must rise and the unit be positive, got {time_s} and {unit}")
        seen = seen & np.isfinite(values).all(axis=1)
        known = seen & (elapsed_s <= MAX_GAP_S)
        result = np.array(values, np.float64)
        if known.any():
            before, step_s = self._values[known], elapsed_s[known, None]
            # Against the filtered place, as in the paper: a point left behind is a fast one.
            speeds = (result[known] - before) / (step_s * unit)
            weight = _weight(SPEED_CUTOFF_HZ, step_s)
            self._speeds[known] += weight * (speeds - self._speeds[known])
            speed = np.linalg.norm(self._speeds[known], axis=1, keepdims=True)
            cutoff_hz = MIN_CUTOFF_HZ + SPEED_COEFFICIENT * np.maximum(speed - STILL_SPEED, 0.0)
            result[known] = before + _weight(cutoff_hz, step_s) * (result[known] - before)
        self._speeds[seen & ~known] = 0.0
        self._values[seen], self._seen_s[seen] = result[seen], time_s
        return result

    def reset(self) -> None:
        """Forget everything: a cut, another person, a long gap."""
        self._values = None

    def state(self) -> dict[str, Any]:
        """What later values depend on: numpy arrays, or None."""
        arrays = {"values": self._values, "speeds": self._speeds, "seen_s": self._seen_s}
        return {name: None if array is None else array.copy() for name, array in arrays.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, bit for bit."""
        values = state["values"]
        self._values = None if values is None else np.array(values, np.float64)
        self._speeds = np.array(state["speeds"], np.float64)
        self._seen_s = np.array(state["seen_s"], np.float64)


class KeypointFilter(OneEuroFilter):
    """Smooths the places of keypoints; their scores stay."""

    def update_points(self, keypoints: Points, time_s: float, box: Points) -> Points:
        """Filter one frame's keypoints.

        Args:
            keypoints: [133, 3] (x_px, y_px, score), scores on a scale on which 0.5 is drawn. Points
                below 0.25 neither move the filter nor are moved by it.
            time_s: Of the frame.
            box: [4] of the person; its height is the unit of speed.

        Returns:
            [133, 3].
        """
        result = np.array(keypoints, np.float64)
        seen = result[:, 2] >= _SEEN_SCORE
        result[:, :2] = self.update(result[:, :2], time_s, float(box[3] - box[1]), seen)
        return result


class BoxFilter(OneEuroFilter):
    """Smooths a box of whole pixels."""

    def update_box(
        self, box: tuple[int, int, int, int], time_s: float
    ) -> tuple[int, int, int, int]:
        """Filter one frame's face box, corner by corner."""
        corners = np.array(box, np.float64).reshape(2, 2)
        unit = _BODY_PER_FACE * float(corners[1, 1] - corners[0, 1])
        moved = self.update(corners, time_s, unit, np.ones(2, bool))
        x0, y0, x1, y1 = (round(value) for value in moved.ravel().tolist())
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def fill_gap(before: Points, after: Points, num_frames: int) -> Points:
    """Keypoints of frames without a sight, on straight lines.

    Args:
        before: [133, 3] of the last frame seen.
        after: [133, 3] of the next one.
        num_frames: Frames between them.

    Returns:
        [num_frames, 133, 3]; scores are the lower of the two. A point that is not finite at either
        end is NaN with score 0.

    Source: pose page section 13.
    """
    share = (np.arange(1, num_frames + 1) / (num_frames + 1))[:, None, None]
    between = np.asarray(before + share * (after - before), np.float64)
    between[..., 2] = np.minimum(before[:, 2], after[:, 2])
    broken = ~(np.isfinite(before) & np.isfinite(after)).all(axis=1)
    between[:, broken] = (np.nan, np.nan, 0.0)
    return between


def _weight(cutoff_hz: float | Points, elapsed_s: Points) -> Points:
    """Share of the new value in an exponential filter of this cutoff."""
    return np.asarray(1 / (1 + 1 / (2 * math.pi * cutoff_hz * elapsed_s)))
