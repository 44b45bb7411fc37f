"""Pose pictures, face boxes and letterboxes against the released preprocessing.

`pose_golden.json` records what that code made of synthetic bodies. The file allows 1 % of the lit
pixels and one pixel per box side to differ, because its makers' own float32 path truncates some
coordinates the other way. From the same float64 keypoints nothing differs, so that is what is asked
here; the tolerance is used where the keypoints are float32.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pose_golden import GOLDEN, POSE_DIR

from everanimate_cli import skeleton
from everanimate_cli.images import fit_points

Case = dict[str, Any]
FrameU8 = NDArray[np.uint8]

draw_cases = pytest.mark.parametrize("case", GOLDEN["draw_cases"], ids=lambda case: case["name"])


def read_rgb(case: Case) -> FrameU8:
    """The golden picture of a case; its checksum guards against a damaged or re-encoded copy."""
    bgr = cv2.imread(str(POSE_DIR / case["png"]))
    assert bgr is not None, f"{POSE_DIR / case['png']} cannot be read"
    rgb: FrameU8 = np.ascontiguousarray(bgr[..., ::-1], np.uint8)
    assert hashlib.sha256(rgb.tobytes()).hexdigest() == case["sha256_rgb"]
    return rgb


def keypoints_of(case: Case) -> NDArray[np.float64]:
    return np.array(case["keypoints"], np.float64)


def draw(case: Case) -> FrameU8:
    return skeleton.draw_pose(keypoints_of(case), case["height"], case["width"])


def corners(box: dict[str, int]) -> tuple[int, int, int, int]:
    return box["x1"], box["y1"], box["x2"], box["y2"]


def draw_case(name: str) -> Case:
    return next(case for case in GOLDEN["draw_cases"] if case["name"] == name)


@draw_cases
def test_picture_equals_the_released_one(case: Case) -> None:
    np.testing.assert_array_equal(draw(case), read_rgb(case))


@draw_cases
def test_float32_keypoints_stay_within_the_tolerance(case: Case) -> None:
    keypoints = keypoints_of(case).astype(np.float32)
    drawn = skeleton.draw_pose(keypoints, case["height"], case["width"])
    golden = read_rgb(case)
    differing = np.count_nonzero((drawn != golden).any(axis=2))
    assert differing <= 0.01 * np.count_nonzero((drawn | golden).any(axis=2))
    box = skeleton.face_box(keypoints, case["height"], case["width"])
    assert box is not None
    np.testing.assert_allclose(box, corners(case["face_box"]), rtol=0, atol=1)


@draw_cases
def test_body_joints(case: Case) -> None:
    joints = skeleton.body_joints(keypoints_of(case))
    # The file's scores are rounded to four digits, which can move a mean of two by half a digit.
    np.testing.assert_allclose(joints, case["body20"], rtol=0, atol=1e-4)


@draw_cases
def test_face_box_of_a_body(case: Case) -> None:
    box = skeleton.face_box(keypoints_of(case), case["height"], case["width"])
    assert box == corners(case["face_box"])


@pytest.mark.parametrize("case", GOLDEN["face_box_cases"], ids=lambda case: case["name"])
def test_face_box(case: Case) -> None:
    """Where the reference raises or its box is empty or turned round, there is no face."""
    keypoints = np.zeros((133, 3))
    keypoints[23:91, :2] = case["face68"]
    expected = case["reference_box"] and corners(case["reference_box"])
    if expected and (expected[0] >= expected[2] or expected[1] >= expected[3]):
        expected = None
    assert skeleton.face_box(keypoints, case["height"], case["width"]) == expected


def test_face_box_cases_hold_faces_and_misses() -> None:
    """The test above could not fail for misses if a new file had none."""
    assert {case["name"] for case in GOLDEN["face_box_cases"]} >= {
        "large_centre",
        "cut_left",
        "cut_top",
        "cut_bottom_right",
        "fully_left",
        "fully_above",
        "fully_right",
        "zero_height",
        "tall_narrow",
    }


@pytest.mark.parametrize("case", GOLDEN["letterbox_cases"], ids=lambda case: case["name"])
def test_letterboxed_picture(case: Case) -> None:
    drawn = skeleton.draw_pose(keypoints_of(case), case["source_height"], case["source_width"])
    letterboxed = skeleton.letterbox_frame(drawn, (case["canvas_height"], case["canvas_width"]))
    np.testing.assert_array_equal(letterboxed, read_rgb(case))


@pytest.mark.parametrize("case", GOLDEN["letterbox_cases"], ids=lambda case: case["name"])
def test_keypoints_move_with_the_picture(case: Case) -> None:
    """Drawing moved keypoints lights the place where the drawn and then fitted picture is lit."""
    canvas = (case["canvas_height"], case["canvas_width"])
    source = (case["source_height"], case["source_width"])
    moved = fit_points(keypoints_of(case), source, canvas, "contain")
    drawn = skeleton.draw_pose(moved, *canvas)
    assert drawn.any()
    # Strokes differ in width and truncation by a pixel or two; a wrong margin or scale by many.
    fitted = np.asarray(read_rgb(case).any(axis=2), np.uint8)
    near = np.asarray(cv2.dilate(fitted, np.ones((5, 5), np.uint8)))
    assert not drawn[near == 0].any()


@pytest.mark.parametrize(
    "case",
    GOLDEN["constants"]["stick_width"],
    ids=lambda case: f"{case['width']}x{case['height']}",
)
def test_stroke_follows_the_canvas(case: Case) -> None:
    """A lone dot is 2 * radius + 1 pixels high."""
    keypoints = np.zeros((133, 3))
    keypoints[0] = (50.35, 50.35, 1.0)  # nose, red
    keypoints[95] = (100.35, 100.35, 1.0)  # left thumb tip, blue
    drawn = skeleton.draw_pose(keypoints, case["height"], case["width"])
    assert np.count_nonzero(drawn[:, 50, 0]) == 2 * case["body"] + 1
    assert np.count_nonzero(drawn[:, 100, 2]) == 2 * case["hand"] + 1


def full_colour_limbs(monkeypatch: pytest.MonkeyPatch, case: Case) -> FrameU8:
    joint_rgb = GOLDEN["constants"]["joint_rgb"]
    limbs = [
        (start, end, joint_rgb[index]) for index, (start, end, _) in enumerate(skeleton._LIMBS)
    ]
    monkeypatch.setattr(skeleton, "_LIMBS", limbs)
    return draw(case)


def bgr_canvas(monkeypatch: pytest.MonkeyPatch, case: Case) -> FrameU8:
    del monkeypatch
    return draw(case)[..., ::-1]


def exclusive_threshold(monkeypatch: pytest.MonkeyPatch, case: Case) -> FrameU8:
    del monkeypatch
    keypoints = keypoints_of(case)
    threshold = np.nextafter(0.5, 1)
    return skeleton.draw_pose(keypoints, case["height"], case["width"], threshold=threshold)


def lowest_score_of_the_two_sources(monkeypatch: pytest.MonkeyPatch, case: Case) -> FrameU8:
    def joints_with_lowest_score(keypoints: NDArray[np.float64]) -> NDArray[np.float64]:
        joints = mean_joints(keypoints)
        first, second = list(skeleton._JOINT_FIRST), list(skeleton._JOINT_SECOND)
        joints[:, 2] = np.minimum(keypoints[first, 2], keypoints[second, 2])
        return joints

    mean_joints = skeleton.body_joints
    monkeypatch.setattr(skeleton, "body_joints", joints_with_lowest_score)
    return draw(case)


def swapped_toes(monkeypatch: pytest.MonkeyPatch, case: Case) -> FrameU8:
    del monkeypatch
    keypoints = keypoints_of(case)
    keypoints[[17, 18, 20, 21]] = keypoints[[20, 21, 17, 18]]
    return skeleton.draw_pose(keypoints, case["height"], case["width"])


@pytest.mark.parametrize(
    "wrong_variant",
    [
        full_colour_limbs,
        bgr_canvas,
        exclusive_threshold,
        lowest_score_of_the_two_sources,
        swapped_toes,
    ],
    ids=lambda variant: variant.__name__,
)
def test_known_mistake_is_noticed(
    wrong_variant: Callable[[pytest.MonkeyPatch, Case], FrameU8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden picture with borderline scores tells each easy mistake from the right drawing."""
    case = draw_case("low_score_hands_832x480")
    assert (wrong_variant(monkeypatch, case) != read_rgb(case)).any()
