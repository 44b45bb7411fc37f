"""Laws of retargeting over generated bodies."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from everanimate_cli import skeleton
from everanimate_cli.errors import InputError
from everanimate_cli.retarget import RetargetPlan, measure

Floats = NDArray[np.float64]

SHOULDERS = [5, 6]
FEET = range(17, 23)
HANDS = (slice(91, 112), slice(112, 133))
WRISTS = (9, 10)
NUM_LIMBS = 19
FOOT_LIMBS = (17, 18)
# Left and right exchanged; the face rows stay, as nothing tells them apart here.
MIRROR = [
    *(0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15),
    *(20, 21, 22, 17, 18, 19),
    *range(23, 91),
    *range(112, 133),
    *range(91, 112),
]
BODY = [
    *((200, 60), (212, 50), (188, 50), (225, 55), (175, 55)),
    *((245, 105), (155, 105), (265, 175), (135, 175), (280, 240), (120, 240)),
    *((225, 230), (175, 230), (232, 330), (168, 330), (235, 425), (165, 425)),
    *((250, 452), (242, 452), (228, 438), (150, 452), (158, 452), (172, 438)),
]

numbers = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(300, 900), st.integers(250, 900))


def body(seed: int, *, jitter: float = 12, lowest_score: float = 0.5) -> Floats:
    """An upright person of any build, every joint moved a little."""
    draw = np.random.default_rng(seed)
    keypoints = np.empty((133, 3))
    keypoints[:23, :2] = BODY
    keypoints[23:91, :2] = draw.uniform((180, 40), (220, 85), (68, 2))
    for hand, wrist in zip(HANDS, WRISTS, strict=True):
        keypoints[hand, :2] = keypoints[wrist, :2] + draw.uniform(-15, 15, (21, 2))
        keypoints[hand, :2][0] = keypoints[wrist, :2]
    keypoints[:, :2] += draw.uniform(-jitter, jitter, (133, 2))
    keypoints[:, :2] *= draw.uniform(0.5, 1.5, 2)
    keypoints[:, 2] = draw.uniform(lowest_score, 1.2, 133)
    return keypoints


def damaged(
    keypoints: Floats, seed: int, share: float, *, spared: list[int], farthest: bool = True
) -> Floats:
    """Rows that are lost in any way, or off with a low score, or as far off as still counts."""
    draw = np.random.default_rng(seed)
    changed = keypoints.copy()
    rows = np.setdiff1d(np.flatnonzero(draw.random(133) < share), spared)
    ways = [
        (np.nan, np.nan, 0.9),
        (np.inf, 30, 0.9),
        (30, 30, np.nan),
        (0, 0, 0),
        (1e30, -1e30, 1),
        (5, 5, -1),
        (-400, 3000, 0.1),
        *[(-(2.0**20), 2.0**20, 5)] * farthest,
    ]
    for row in rows:
        changed[row] = ways[draw.integers(len(ways))]
    return changed


def limb_lengths(keypoints: Floats) -> Floats:
    joints = skeleton.body_joints(keypoints)
    limbs = np.array([(start, end) for start, end, _ in skeleton._LIMBS])
    lengths: Floats = np.linalg.norm(joints[limbs[:, 1], :2] - joints[limbs[:, 0], :2], axis=1)
    return lengths


@given(numbers, sizes)
@settings(max_examples=100, deadline=None)
def test_the_same_person_is_only_shifted(seed: int, size: tuple[int, int]) -> None:
    person = body(seed)
    # Both sides get the longer one's length, so only a symmetric body stays as it was.
    symmetric = (person + mirrored(person, size)) / 2
    plan = measure(symmetric, size, symmetric, size)
    joints = skeleton.body_joints(symmetric)
    sinks = joints[[10, 13], 1].max() < size[0]
    ankle_to_toe = max((joints[[10, 13], 1] + joints[[19, 18], 1]) / 2) - max(joints[[10, 13], 1])
    moved = plan.apply(symmetric) - symmetric
    kept = np.setdiff1d(np.arange(91), FEET)
    np.testing.assert_allclose(moved[kept, 0], 0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(moved[kept, 1], ankle_to_toe * sinks, rtol=0, atol=1e-9)


def mirrored(keypoints: Floats, size: tuple[int, int]) -> Floats:
    flipped = keypoints[MIRROR].copy()
    flipped[:, 0] = size[1] - flipped[:, 0]
    return flipped


@given(numbers, sizes, sizes, st.floats(0, 0.4))
@settings(max_examples=100, deadline=None)
def test_left_and_right_are_treated_alike(
    seed: int, template_size: tuple[int, int], reference_size: tuple[int, int], share: float
) -> None:
    template = damaged(body(seed), seed, share, spared=SHOULDERS, farthest=False)
    reference = damaged(body(seed + 1), seed + 1, share, spared=SHOULDERS, farthest=False)
    frame = damaged(body(seed + 2), seed + 2, share, spared=[], farthest=False)
    plan = measure(template, template_size, reference, reference_size)
    flipped = measure(
        mirrored(template, template_size),
        template_size,
        mirrored(reference, reference_size),
        reference_size,
    )
    placed = plan.apply(frame)
    assert flipped.scale == plan.scale
    np.testing.assert_allclose(flipped.ratios, plan.ratios, rtol=1e-9, atol=0)
    # The scaled reference is rounded down to whole pixels, which moves its middle.
    width = max(int(reference_size[1] * plan.scale), 1) / plan.scale
    expected = plan.apply(frame)[MIRROR]
    lies_somewhere = expected[:, :2].any(axis=1)
    expected[lies_somewhere, 0] = width - expected[lies_somewhere, 0]
    placed = flipped.apply(mirrored(frame, template_size))
    np.testing.assert_allclose(placed, expected, rtol=1e-6, atol=1e-6)


@given(numbers, sizes, sizes, st.sampled_from([2, 4, 8]), st.floats(0, 0.4))
@settings(max_examples=100, deadline=None)
def test_a_larger_reference_enlarges_the_result(
    seed: int,
    template_size: tuple[int, int],
    reference_size: tuple[int, int],
    factor: int,
    share: float,
) -> None:
    """Powers of two, because the size of the scaled reference is rounded down to pixels."""
    template = damaged(body(seed), seed, share, spared=SHOULDERS, farthest=False)
    reference = damaged(body(seed + 1), seed + 1, share, spared=SHOULDERS, farthest=False)
    frame = damaged(body(seed + 2), seed + 2, share, spared=[], farthest=False)
    height, width = reference_size
    plan = measure(template, template_size, reference, reference_size)
    larger = measure(
        template,
        template_size,
        reference * (factor, factor, 1),
        (height * factor, width * factor),
    )
    assert larger.ratios == plan.ratios
    assert larger.warnings == plan.warnings
    assert larger.hand_factor == pytest.approx(plan.hand_factor * factor, rel=1e-12)
    expected = plan.apply(frame) * (factor, factor, 1)
    np.testing.assert_allclose(larger.apply(frame), expected, rtol=1e-9, atol=1e-6)


@given(numbers, sizes, sizes, st.floats(-200, 200), st.floats(-200, 200))
@settings(max_examples=50, deadline=None)
def test_motion_through_the_picture_is_kept(
    seed: int,
    template_size: tuple[int, int],
    reference_size: tuple[int, int],
    x: float,
    y: float,
) -> None:
    """A frame that is shifted, as by the camera, comes out shifted by the scale's share."""
    plan = measure(body(seed), template_size, body(seed + 1), reference_size)
    frame = body(seed + 2)
    shifted = frame.copy()
    shifted[:, :2] += (x, y)
    moved = plan.apply(shifted) - plan.apply(frame)
    np.testing.assert_allclose(moved[:, :2] * plan.scale, np.tile((x, y), (133, 1)), atol=1e-6)


@given(numbers, sizes, sizes)
@settings(max_examples=100, deadline=None)
def test_bones_get_the_ratios_of_the_plan(
    seed: int, template_size: tuple[int, int], reference_size: tuple[int, int]
) -> None:
    plan = measure(body(seed), template_size, body(seed + 1), reference_size)
    frame = body(seed + 2)
    drawn, source = limb_lengths(plan.apply(frame)) * plan.scale, limb_lengths(frame)
    expected = np.array(plan.ratios) * source
    for foot, shin in ((17, 11), (18, 8)):
        expected[foot] = min(expected[foot], expected[shin] / 2)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-6)


@given(numbers, sizes, sizes)
@settings(max_examples=50, deadline=None)
def test_the_template_gets_the_bones_of_the_reference(
    seed: int, template_size: tuple[int, int], reference_size: tuple[int, int]
) -> None:
    """With both sides alike; a pixel's rounding of the scaled reference is what differs."""
    template = body(seed, jitter=0)
    reference = body(seed + 1, jitter=0)
    plan = measure(template, template_size, reference, reference_size)
    drawn, wanted = limb_lengths(plan.apply(template)), limb_lengths(reference)
    others = np.setdiff1d(np.arange(NUM_LIMBS), FOOT_LIMBS)
    rounding = 1 / (min(reference_size) * plan.scale)
    np.testing.assert_allclose(drawn[others], wanted[others], rtol=1.01 * rounding, atol=0)


@given(numbers, sizes, sizes, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_whatever_is_missing_the_result_is_finite_and_drawable(
    seed: int, template_size: tuple[int, int], reference_size: tuple[int, int], share: float
) -> None:
    template = damaged(body(seed), seed, share, spared=SHOULDERS)
    reference = damaged(body(seed + 1), seed + 1, share, spared=SHOULDERS)
    plan = measure(template, template_size, reference, reference_size)
    assert np.isfinite([plan.scale, *plan.offset, *plan.ratios, plan.hand_factor]).all()
    assert min(plan.scale, plan.hand_factor, *plan.ratios) > 0
    for line in plan.warnings:
        assert line == line.strip()
        assert "\n" not in line
        assert line.endswith(".")
    frame = damaged(body(seed + 2, lowest_score=0), seed + 2, share, spared=[])
    placed = plan.apply(frame)
    assert placed.dtype == np.float64
    assert np.isfinite(placed).all()
    lost = ~np.isfinite(frame).all(axis=1) | (frame[:, 2] <= 0) | (np.abs(frame[:, 0]) > 2**20)
    np.testing.assert_array_equal(placed[:, 2], np.where(lost, 0, frame[:, 2]))
    skeleton.draw_pose(placed, *plan.canvas)


@given(numbers, st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_any_two_pictures_give_a_plan_or_one_clear_error(seed: int, share: float) -> None:
    template = damaged(body(seed, lowest_score=0), seed, share, spared=[])
    reference = damaged(body(seed + 1, lowest_score=0), seed + 1, share, spared=[])
    necks = [skeleton.body_joints(keypoints)[1, 2] for keypoints in (template, reference)]
    shoulders = np.concatenate([template[SHOULDERS], reference[SHOULDERS]])
    assume(np.nan_to_num(shoulders[:, 2]).min() > 0)  # otherwise the drawn neck says too little
    if min(necks) < 0.3:
        with pytest.raises(InputError, match=r"\Acannot retarget: [^\n]*\Z"):
            measure(template, (600, 400), reference, (480, 832))
    else:
        plan = measure(template, (600, 400), reference, (480, 832))
        assert np.isfinite(plan.apply(template)).all()


@given(numbers, sizes, sizes, st.floats(0, 0.6))
@settings(max_examples=100, deadline=None)
def test_a_saved_plan_gives_the_same_bits(
    seed: int, template_size: tuple[int, int], reference_size: tuple[int, int], share: float
) -> None:
    template = damaged(body(seed), seed, share, spared=SHOULDERS)
    plan = measure(template, template_size, body(seed + 1), reference_size)
    saved = RetargetPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert saved == plan
    frame = damaged(body(seed + 2), seed + 2, share, spared=[])
    assert saved.apply(frame).tobytes() == plan.apply(frame).tobytes()
