"""Retargeted bodies and hands against the released preprocessing.

`pose_golden.json` records bodies to four digits and hands as integers. Cases with a
`reference_defect` hold normal bodies, but hands that the released code puts in the wrong place.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pose_golden import GOLDEN, POSE_DIR

from everanimate_cli import retarget, skeleton
from everanimate_cli.retarget import RetargetPlan, measure

CASES: list[dict[str, Any]] = GOLDEN["retarget_cases"]
Case = dict[str, Any]
Floats = NDArray[np.float64]

BODY_TOLERANCE = 0.01  # [px]
HAND_TOLERANCE = 1.0  # [px]
DETACHED_HANDS = "swap_branch_detaches_hands"
# The golden names are crossed: the left list hangs on joint 4, the right wrist.
HAND_LISTS = {"left_hand_list": slice(112, 133), "right_hand_list": slice(91, 112)}
RIGHT_WRIST, LEFT_WRIST = 10, 9

retarget_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def size_of(picture: Case) -> tuple[int, int]:
    return picture["height"], picture["width"]


def frames_of(case: Case) -> Floats:
    return np.array(case["driving"]["frames"], np.float64)


def plan_of(case: Case) -> RetargetPlan:
    return measure(
        frames_of(case)[0],
        size_of(case["driving"]),
        np.array(case["reference"]["keypoints"], np.float64),
        size_of(case["reference"]),
    )


def applied(case: Case) -> list[Floats]:
    plan = plan_of(case)
    return [plan.apply(frame) for frame in frames_of(case)]


def body_error_px(case: Case) -> float:
    """Largest distance from the golden joints; their scores must agree in any case."""
    errors = []
    for placed, expected in zip(applied(case), case["expected"], strict=True):
        joints = skeleton.body_joints(placed)
        golden = np.array(expected["body"], np.float64)
        # Means of two rounded scores can be half a digit off.
        np.testing.assert_allclose(joints[:, 2], golden[:, 2], rtol=0, atol=1e-4)
        errors.append(float(np.abs(joints[:, :2] - golden[:, :2]).max()))
    return max(errors)


@retarget_cases
def test_body(case: Case) -> None:
    assert body_error_px(case) <= BODY_TOLERANCE


@retarget_cases
def test_intermediate_numbers(case: Case) -> None:
    plan, golden = plan_of(case), case["intermediate"]
    np.testing.assert_allclose(plan.scale, golden["scale_min"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(plan.ratios, golden["bone_ratios"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        plan.offset, (golden["delta_x"], golden["delta_y"]), rtol=0, atol=1e-5
    )
    assert plan.body_class.replace("-", "_") + "_body" == golden["body_flag"]
    assert plan.canvas == size_of(case["reference"])


def hand_error_px(case: Case) -> float:
    """Largest coordinate difference from the golden hands, whose points are truncated."""
    errors = [0.0]
    for placed, expected in zip(applied(case), case["expected"], strict=True):
        for name, rows in HAND_LISTS.items():
            for point, golden in zip(placed[rows], expected[name], strict=True):
                if golden is None:
                    assert point[2] < 0.4
                    continue
                assert abs(point[2] - golden[2]) <= 1e-4
                errors.append(float(np.abs(np.trunc(point[:2]) - golden[:2]).max()))
    return max(errors)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case["reference_defect"]],
    ids=lambda case: case["name"],
)
def test_hands(case: Case) -> None:
    assert hand_error_px(case) <= HAND_TOLERANCE


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["reference_defect"] == DETACHED_HANDS],
    ids=lambda case: case["name"],
)
def test_hands_that_the_original_detaches_stay_on_the_wrists(case: Case) -> None:
    for placed in applied(case):
        for rows in HAND_LISTS.values():
            distances = np.linalg.norm(
                placed[[RIGHT_WRIST, LEFT_WRIST], :2] - placed[rows][0, :2], axis=1
            )
            assert distances.min() <= 1.5


@pytest.mark.parametrize(
    ("case", "image"),
    [(case, image) for case in CASES for image in case["images"]],
    ids=lambda value: value["name"] if "name" in value else str(value["frame"]),
)
def test_picture(case: Case, image: Case) -> None:
    """Equal pixels; where the original misplaces hands, its own are drawn on our body."""
    placed = applied(case)[image["frame"]]
    expected = case["expected"][image["frame"]]
    if case["reference_defect"]:
        for name, rows in HAND_LISTS.items():
            placed[rows] = [point or (0, 0, 0) for point in expected[name]]
    drawn = skeleton.draw_pose(placed, *size_of(expected))
    bgr = cv2.imread(str(POSE_DIR / image["png"]))
    assert bgr is not None, f"{POSE_DIR / image['png']} cannot be read"
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    if "sha256_rgb" in image:
        assert hashlib.sha256(rgb.tobytes()).hexdigest() == image["sha256_rgb"]
    np.testing.assert_array_equal(drawn, rgb)


@retarget_cases
def test_saved_plan_places_the_same_bits(case: Case) -> None:
    plan = plan_of(case)
    saved = RetargetPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert saved == plan
    for frame in frames_of(case):
        assert saved.apply(frame).tobytes() == plan.apply(frame).tobytes()


@retarget_cases
def test_warnings(case: Case) -> None:
    reference = np.array(case["reference"]["keypoints"], np.float64)
    template = frames_of(case)[0]
    text = " ".join(plan_of(case).warnings)
    drawn_bodies = [skeleton.body_joints(keypoints) for keypoints in (template, reference)]
    assert ("Not clearly seen" in text) == any(body[:, 2].min() < 0.3 for body in drawn_bodies)
    assert ("look confused" in text) == (case["reference_defect"] == DETACHED_HANDS)
    if np.array_equal(template, reference):
        assert not text


def test_cases_cover_every_body_class_and_defect() -> None:
    """The tests above could not fail for what a new file leaves out."""
    assert {case["intermediate"]["body_flag"] for case in CASES} == {
        "full_body",
        "three_quarter_body",
        "half_body",
    }
    assert {case["reference_defect"] for case in CASES} >= {None, DETACHED_HANDS}


def smaller_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retarget, "_common", lambda _part, ratios: min(ratios))


def larger_side_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retarget, "_common", lambda _part, ratios: max(ratios))


def feet_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retarget, "_LONGEST_FOOT", np.inf)


def exact_scaled_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retarget, "int", float, raising=False)


def ankles_on_ankles(monkeypatch: pytest.MonkeyPatch) -> None:
    def offset(body_class: str, driving: Floats, target: Floats) -> tuple[float, float]:
        target = target.copy()
        target[[18, 19]] = target[[13, 10]]
        return exact_offset(body_class, driving, target)  # type: ignore[arg-type]

    exact_offset = retarget._offset
    monkeypatch.setattr(retarget, "_offset", offset)


@pytest.mark.parametrize(
    "wrong_variant",
    [
        smaller_side,
        larger_side_of_the_head,
        feet_of_any_length,
        exact_scaled_size,
        ankles_on_ankles,
    ],
    ids=lambda variant: variant.__name__,
)
def test_known_mistake_is_noticed(
    wrong_variant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each easy mistake moves some golden body by more than the tolerance."""
    wrong_variant(monkeypatch)
    assert max(body_error_px(case) for case in CASES) > 10 * BODY_TOLERANCE
