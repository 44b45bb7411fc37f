"""The degradation that restorative flow matching learns to undo: one draw for a whole clip.

It imitates what long rollouts do to pictures: local contrast and colours drift, detail is lost.

Source: method page section 3 (`A`); paper section 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

CONTRAST_PROBABILITY: Final = 0.9
CONTRAST_LIMITS: Final = (1.0, 64.0)
CONTRAST_TILES: Final = (1, 32)  # tiles along each side, both ends included
SATURATION_PROBABILITY: Final = 0.3
SATURATION_FACTORS: Final = (1.3, 3.0)
BRIGHTNESS_PROBABILITY: Final = 0.1
BRIGHTNESS_FACTORS: Final = (0.8, 1.2)
ERASING_PROBABILITY: Final = 0.9
NUM_PATCHES: Final = (1, 4)
PATCH_SHARES: Final = (0.1, 0.3)  # of the picture's side
MIN_PATCH_PX: Final = 8
PATCH_REDUCTIONS: Final = (8, 32)
_LUMA: Final = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Patch:
    """A rectangle that loses its detail.

    Attributes:
        top: Of its place, as a share of the free height: 0 at the upper edge, 1 at the lower.
        left: The same across.
        height: As a share of the picture's height.
        width: As a share of the picture's width.
        reduction: Factor of the area averaging before the picture is interpolated back.
    """

    top: float
    left: float
    height: float
    width: float
    reduction: int


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """Parameters of one draw; what was not drawn is None or empty.

    Attributes:
        contrast_limit: Of the adaptive histogram equalisation (CLAHE) on L of Lab.
        contrast_tiles: Its tiles along each side.
        saturation: Factor on the distance from grey.
        brightness: Factor on all colours.
        patches: Rectangles without detail, in the order in which they are laid.
    """

    contrast_limit: float | None = None
    contrast_tiles: int = 1
    saturation: float | None = None
    brightness: float | None = None
    patches: Sequence[Patch] = ()

    def apply(self, frames_u8: Frames) -> Frames:
        """Degrade a clip.

        Args:
            frames_u8: [S, H, W, 3] uint8 RGB.

        Returns:
            [S, H, W, 3] uint8 RGB, a copy.
        """
        return np.stack([self._frame(frame_u8) for frame_u8 in frames_u8])

    def _frame(self, frame_u8: Frames) -> Frames:
        frame = frame_u8.copy()
        if self.contrast_limit is not None:
            lab = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)
            tiles = (self.contrast_tiles, self.contrast_tiles)
            equaliser = cv2.createCLAHE(clipLimit=self.contrast_limit, tileGridSize=tiles)
            lab[..., 0] = equaliser.apply(np.ascontiguousarray(lab[..., 0]))
            frame = np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)
        if self.saturation is not None:
            values = frame.astype(np.float64)
            grey = (values @ _LUMA)[..., None]
            frame = _to_u8(grey + self.saturation * (values - grey))
        if self.brightness is not None:
            frame = _to_u8(self.brightness * frame.astype(np.float64))
        for patch in self.patches:
            _erase(frame, patch)
        return frame


def draw_degradation(rng: np.random.Generator) -> Degradation:
    """Draw the parameters for one clip.

    Every number is drawn whether it is used or not, so that a probability that is changed does not
    shift the draws behind it.
    """
    contrast, saturation, brightness, erasing = rng.random(4)
    limit = float(rng.uniform(*CONTRAST_LIMITS))
    tiles = int(rng.integers(*CONTRAST_TILES, endpoint=True))
    saturation_factor = float(rng.uniform(*SATURATION_FACTORS))
    brightness_factor = float(rng.uniform(*BRIGHTNESS_FACTORS))
    num_patches = int(rng.integers(*NUM_PATCHES, endpoint=True))
    patches = [
        Patch(
            top=float(rng.random()),
            left=float(rng.random()),
            height=float(rng.uniform(*PATCH_SHARES)),
            width=float(rng.uniform(*PATCH_SHARES)),
            reduction=int(rng.integers(*PATCH_REDUCTIONS, endpoint=True)),
        )
        for _ in range(NUM_PATCHES[1])
    ]
    return Degradation(
        contrast_limit=limit if contrast < CONTRAST_PROBABILITY else None,
        contrast_tiles=tiles,
        saturation=saturation_factor if saturation < SATURATION_PROBABILITY else None,
        brightness=brightness_factor if brightness < BRIGHTNESS_PROBABILITY else None,
        patches=patches[:num_patches] if erasing < ERASING_PROBABILITY else (),
    )


def _erase(frame: Frames, patch: Patch) -> None:
    """Blur a rectangle in place."""
    height, width = frame.shape[:2]
    patch_height = min(height, max(MIN_PATCH_PX, round(patch.height * height)))
    patch_width = min(width, max(MIN_PATCH_PX, round(patch.width * width)))
    top = round(patch.top * (height - patch_height))
    left = round(patch.left * (width - patch_width))
    region = frame[top : top + patch_height, left : left + patch_width]
    small = (max(1, patch_width // patch.reduction), max(1, patch_height // patch.reduction))
    reduced = cv2.resize(region, small, interpolation=cv2.INTER_AREA)
    frame[top : top + patch_height, left : left + patch_width] = cv2.resize(
        reduced, (patch_width, patch_height), interpolation=cv2.INTER_LINEAR
    )


def _to_u8(values: NDArray[np.float64]) -> Frames:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
