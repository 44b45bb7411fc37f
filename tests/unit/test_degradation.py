"""The degradation of restorative training: what each part does to a picture, how often it comes."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studio import picture

from everanimate_cli.degradation import Degradation, Patch, draw_degradation

FRAMES = np.stack([picture(48, 64, phase) for phase in (0.0, 0.4)])


def draws(count: int) -> list[Degradation]:
    return [draw_degradation(np.random.default_rng([seed, 1])) for seed in range(count)]


def test_no_draw_changes_nothing() -> None:
    result = Degradation().apply(FRAMES)
    np.testing.assert_array_equal(result, FRAMES)
    assert result is not FRAMES


def test_brightness_and_saturation_by_hand() -> None:
    frames = np.full((1, 2, 2, 3), (200, 100, 60), np.uint8)
    np.testing.assert_array_equal(
        Degradation(brightness=1.2).apply(frames)[0, 0, 0], (240, 120, 72)
    )
    # Grey is 0.299 * 200 + 0.587 * 100 + 0.114 * 60 = 125.34.
    np.testing.assert_array_equal(Degradation(saturation=1.5).apply(frames)[0, 0, 0], (237, 87, 27))
    np.testing.assert_array_equal(Degradation(saturation=3.0).apply(frames)[0, 0, 0], (255, 49, 0))


def test_contrast_works_on_lightness_alone() -> None:
    result = Degradation(contrast_limit=8.0, contrast_tiles=4).apply(FRAMES)
    before, after = (
        cv2.cvtColor(side[0], cv2.COLOR_RGB2LAB).astype(int) for side in (FRAMES, result)
    )
    assert np.abs(after[..., 0] - before[..., 0]).mean() > 5
    # Colours move only where the lighter picture leaves the range of RGB.
    assert np.median(np.abs(after[..., 1:] - before[..., 1:])) <= 2


def test_a_patch_loses_its_detail_and_nothing_else_changes() -> None:
    patch = Patch(top=1.0, left=0.0, height=0.25, width=0.3, reduction=8)
    result = Degradation(patches=[patch]).apply(FRAMES)
    changed = (result != FRAMES).any(axis=(0, 3))
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 47, 0, 18)
    inside = result[0, 36:, :19].astype(int)
    assert (
        np.abs(np.diff(inside, axis=1)).max()
        < np.abs(np.diff(FRAMES[0, 36:, :19].astype(int), axis=1)).max()
    )
    np.testing.assert_allclose(
        inside.mean(axis=(0, 1)), FRAMES[0, 36:, :19].mean(axis=(0, 1)), atol=6
    )


def test_a_patch_has_at_least_eight_pixels() -> None:
    patch = Patch(top=0.0, left=0.0, height=0.1, width=0.1, reduction=32)
    result = Degradation(patches=[patch]).apply(FRAMES)
    rows, columns = np.nonzero((result != FRAMES).any(axis=(0, 3)))
    assert (rows.max(), columns.max()) == (7, 7)


def test_one_draw_holds_for_the_whole_clip() -> None:
    for degradation in draws(20):
        together = degradation.apply(FRAMES)
        alone = np.concatenate([degradation.apply(FRAMES[:1]), degradation.apply(FRAMES[1:])])
        np.testing.assert_array_equal(together, alone)


def test_every_part_comes_as_often_as_it_should() -> None:
    many = draws(4000)
    for share, present in (
        (0.9, [draw.contrast_limit is not None for draw in many]),
        (0.3, [draw.saturation is not None for draw in many]),
        (0.1, [draw.brightness is not None for draw in many]),
        (0.9, [bool(draw.patches) for draw in many]),
    ):
        assert np.mean(present) == pytest.approx(share, abs=0.025)
    limits = [draw.contrast_limit for draw in many if draw.contrast_limit is not None]
    assert (min(limits), max(limits)) == (pytest.approx(1, abs=0.2), pytest.approx(64, abs=0.2))
    assert {draw.contrast_tiles for draw in many} == set(range(1, 33))
    counts = [len(draw.patches) for draw in many if draw.patches]
    assert np.bincount(counts)[1:] == pytest.approx(len(counts) / 4, rel=0.1)
    patches = [patch for draw in many for patch in draw.patches]
    assert {patch.reduction for patch in patches} == set(range(8, 33))
    sides = np.array([(patch.height, patch.width) for patch in patches])
    assert (sides.min(), sides.max()) == (
        pytest.approx(0.1, abs=1e-3),
        pytest.approx(0.3, abs=1e-3),
    )
    assert abs(np.corrcoef(sides.T)[0, 1]) < 0.05  # drawn apart


@given(st.integers(0, 2**32), st.integers(8, 40), st.integers(8, 40))
def test_any_draw_fits_any_picture(seed: int, height: int, width: int) -> None:
    degradation = draw_degradation(np.random.default_rng(seed))
    frames = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), np.uint8)
    result = degradation.apply(frames)
    assert (result.shape, result.dtype) == (frames.shape, np.uint8)
    again = draw_degradation(np.random.default_rng(seed))
    assert again == degradation
    np.testing.assert_array_equal(again.apply(frames), result)
