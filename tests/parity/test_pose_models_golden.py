"""ViTPose's crop and decode against the released preprocessing.

`pose_golden.json` records what that code made of four boxes and of eight synthetic heatmaps. Its
keypoints have four digits; they come from float32 logarithms, of which a Newton step divides
differences, so that the last digit depends on the build of numpy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pose_golden import GOLDEN

from everanimate_cli import pose_models
from everanimate_cli.model_table import Thresholds
from everanimate_cli.pose_models import HeatmapEstimator, choose_crops, cut_patch

Case = dict[str, Any]
DECODE: Case = GOLDEN["heatmap_decode_case"]
NUM_PEAKS = len(DECODE["peaks_x_y_amplitude"])
TOLERANCE_PX = 1e-3  # a ten-thousandth of a cell; the nearest mistake below moves 0.3 px

crop_cases = pytest.mark.parametrize(
    "case", GOLDEN["vitpose_crop_cases"], ids=lambda case: "-".join(map(str, case["box"]))
)


def crop_of(case: Case) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and sides of the crop of one golden box."""
    width, height = case["model_input_wh"]
    centres, sides = choose_crops(np.array([case["box"]], np.float64), height, width)
    return centres[0], sides[0]


@crop_cases
def test_crop(case: Case) -> None:
    centre, side = crop_of(case)
    np.testing.assert_array_equal(centre, case["center"])
    np.testing.assert_allclose(side, case["box_size_px"], rtol=1e-12)


@crop_cases
def test_patch(case: Case) -> None:
    """Between the golden corners lie the frame's own pixels, and black beside it."""
    height, width = case["height"], case["width"]
    rows, columns = np.indices((height, width))
    place = np.stack([columns % 251, rows % 251, 1 + columns // 251 * 8 + rows // 251], axis=2)
    (left, top), (right, bottom) = case["crop_upper_left"], case["crop_lower_right"]
    beside = 2 * max(height, width)
    padded = np.pad(place.astype(np.uint8), ((beside, beside), (beside, beside), (0, 0)))
    expected = padded[beside + top : beside + bottom, beside + left : beside + right]
    np.testing.assert_array_equal(cut_patch(place.astype(np.uint8), *crop_of(case)), expected)


class GoldenNetwork:
    """Gives the golden heatmaps, first of all keypoints."""

    label = "golden"
    device = "cpu"
    is_batched = True
    height, width = 256, 192

    def run(self, blob: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        columns, rows = DECODE["heatmap_wh"]
        y, x = np.indices((rows, columns))
        maps = np.zeros((len(blob), 133, rows, columns), np.float32)
        for index, (peak_x, peak_y, amplitude) in enumerate(DECODE["peaks_x_y_amplitude"]):
            distance = (x - peak_x) ** 2 + (y - peak_y) ** 2
            maps[:, index] = amplitude * np.exp(-distance / (2 * DECODE["gaussian_sigma"] ** 2))
        return [maps]


def decode() -> NDArray[np.float64]:
    """The golden keypoints by the whole way from a box to pixels of the frame."""
    network: Any = GoldenNetwork()
    estimator = HeatmapEstimator("golden", network, Thresholds(body=1, hand=1, face=1), "rgb")
    frame = np.zeros((720, 1280, 3), np.uint8)
    (keypoints,) = estimator.estimate(frame, np.array([DECODE["box"]], np.float64))
    return keypoints[:NUM_PEAKS]


def test_decode() -> None:
    keypoints = decode()
    np.testing.assert_allclose(keypoints[:, :2], DECODE["decoded_xy"], rtol=0, atol=TOLERANCE_PX)
    np.testing.assert_allclose(keypoints[:, 2], DECODE["decoded_score"], rtol=0, atol=1e-5)


def test_a_map_without_a_peak() -> None:
    """Nowhere above 0: half a cell and more outside the crop, with score 0."""
    cells, scores = pose_models.decode_heatmaps(np.zeros((1, 2, 64, 48), np.float32))
    np.testing.assert_array_equal(cells, np.full((1, 2, 2), -1))
    np.testing.assert_array_equal(scores, np.zeros((1, 2)))


def no_newton_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pose_models, "_newton_step", lambda logs, *_: np.zeros((len(logs), 2)))


def no_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pose_models, "_log_blurred", lambda maps, _peaks: np.log(np.maximum(maps, 1e-10))
    )


def step_beside_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """rtmlib's ViTPose pads the map, and so does a step there too."""
    original = pose_models.decode_heatmaps

    def padded(heatmaps: NDArray[np.float32]) -> Any:
        border = ((0, 0), (0, 0), (3, 3), (3, 3))
        cells, scores = original(np.pad(heatmaps, border, mode="edge"))
        return cells - 3, scores

    monkeypatch.setattr(pose_models, "decode_heatmaps", padded)


def ends_on_cell_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    """rtmlib's ViTPose lets the outer cells lie on the crop's edge."""
    original = pose_models.decode_heatmaps

    def stretched(heatmaps: NDArray[np.float32]) -> Any:
        cells, scores = original(heatmaps)
        height, width = heatmaps.shape[2:]
        return cells * [width / (width - 1), height / (height - 1)], scores

    monkeypatch.setattr(pose_models, "decode_heatmaps", stretched)


@pytest.mark.parametrize(
    "wrong_variant",
    [no_newton_step, no_blur, step_beside_the_border, ends_on_cell_centres],
    ids=lambda variant: variant.__name__,
)
def test_known_mistake_is_noticed(
    wrong_variant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_variant(monkeypatch)
    distance_px = np.abs(decode()[:, :2] - DECODE["decoded_xy"]).max()
    assert distance_px > 100 * TOLERANCE_PX
