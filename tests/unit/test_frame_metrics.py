"""Meters on frames whose numbers are worked out by hand, or by other code."""

import math
from collections.abc import Iterable

import cv2
import numpy as np
import pytest

from everanimate_cli import frame_metrics, metrics
from everanimate_cli.frame_metrics import (
    Backdrop,
    BackgroundMeter,
    DriftMeter,
    ErrorMeter,
    Meter,
    Moment,
    MotionMeter,
    Outcome,
    Series,
    SsimMeter,
    Track,
    Unavailable,
    measure_slope,
    person_mask,
    student_quantile,
)


def noise(seed: int, height: int = 16, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def grey(value: int, height: int = 16, width: int = 20) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def run(meter: Meter, moments: Iterable[Moment]) -> dict[str, Outcome]:
    for moment in moments:
        meter.add(moment)
    return dict(meter.outcomes())


def tracks(meter: Meter, moments: Iterable[Moment]) -> dict[str, Track]:
    found = run(meter, moments)
    assert all(isinstance(outcome, Track) for outcome in found.values())
    return found  # type: ignore[return-value]


# --- against the truth ---------------------------------------------------------------------------


def test_errors_are_those_of_the_frames() -> None:
    pairs = [(noise(i), noise(i + 10)) for i in range(3)]
    found = tracks(ErrorMeter(), [Moment(i, *pair) for i, pair in enumerate(pairs)])
    expected = [metrics.psnr(*pair) for pair in pairs]
    np.testing.assert_allclose(found["psnr"].per_frame(), expected, rtol=1e-12)
    pooled = metrics.psnr_db(float(np.mean([metrics.squared_error(*pair) for pair in pairs])))
    assert found["psnr"].over(slice(None)) == pytest.approx(pooled, rel=1e-12)
    l1 = [np.abs(a.astype(int) - b).mean() / 255 for a, b in pairs]
    np.testing.assert_allclose(found["l1"].per_frame(), l1, rtol=1e-12)
    assert found["l1"].over(slice(1, None)) == pytest.approx(np.mean(l1[1:]), rel=1e-12)


def test_white_against_black_does_not_wrap_around() -> None:
    found = tracks(ErrorMeter(), [Moment(0, grey(255), grey(0)), Moment(1, grey(0), grey(255))])
    assert found["psnr"].per_frame().tolist() == [0, 0]
    assert found["l1"].per_frame().tolist() == [1, 1]


def test_sums_of_a_large_frame_are_exact() -> None:
    large = grey(255, 2160, 3840)
    found = tracks(ErrorMeter(), [Moment(0, large, np.zeros_like(large))])
    assert found["psnr"].per_frame()[0] == 0
    large[0, 0, 0] = 254
    pixels = large.size
    expected = (65025 * (pixels - 1) + 254**2) / pixels
    found = tracks(ErrorMeter(), [Moment(0, large, np.zeros_like(large))])
    assert found["psnr"].rows[0, 0] == expected


def test_equal_frames_have_the_largest_psnr() -> None:
    found = tracks(ErrorMeter(), [Moment(0, noise(1), noise(1))])
    assert found["psnr"].over(slice(None)) == pytest.approx(frame_metrics.MAX_PSNR_DB)


def test_frames_without_a_truth_are_left_out() -> None:
    moments = [Moment(0, noise(1), noise(2)), Moment(1, noise(3)), Moment(2, noise(4), noise(5))]
    moments.append(Moment(3, noise(6)))
    found = tracks(ErrorMeter(), moments)
    assert np.isnan(found["psnr"].per_frame()).tolist() == [False, True, False, True]
    assert found["psnr"].over(slice(1, 2)) is None
    ssim = tracks(SsimMeter(), moments)["ssim"]
    assert ssim.per_frame()[2] == pytest.approx(metrics.ssim(noise(4), noise(5)))
    assert len(ssim.per_frame()) == 4


def test_ssim_needs_room_for_its_window() -> None:
    small = noise(1, height=10)
    assert run(SsimMeter(), [Moment(0, small, small)]) == {
        "ssim": Unavailable("needs frames of at least 11x11 pixels")
    }


# --- against the beginning -----------------------------------------------------------------------


def test_drift_is_measured_against_the_first_frames() -> None:
    frames = [grey(100), grey(110), grey(125), grey(95)]
    frames[0][0, 0] = frames[1][0, 0] = 0  # an edge, for the sharpness
    found = tracks(DriftMeter(2), [Moment(i, frame) for i, frame in enumerate(frames)])
    lightness = [metrics.colour_shift(frame, np.zeros_like(frame)).lightness for frame in frames]
    base = np.mean(lightness[:2])
    colour = found["colour_drift"]
    assert colour.per_frame() == pytest.approx([abs(v - base) for v in lightness], abs=0.01)
    # Over a stretch the brighter and the darker frame cancel.
    assert colour.over(slice(2, 4)) == pytest.approx(abs(np.mean(lightness[2:]) - base), abs=0.01)
    assert found["saturation_drift"].over(slice(None)) == 0


def test_contrast_saturation_and_sharpness_by_hand() -> None:
    stripes = grey(0)
    stripes[:, ::2] = (200, 150, 100)
    weaker = stripes // 2
    found = tracks(DriftMeter(1), [Moment(0, stripes), Moment(1, weaker)])
    brightness = 0.299 * 200 + 0.587 * 150 + 0.114 * 100
    assert found["contrast_drift"].per_frame()[1] == pytest.approx(brightness / 4, abs=0.5)
    assert found["saturation_drift"].per_frame()[1] == pytest.approx((100 - 50) / 2)
    assert found["sharpness_drift"].per_frame()[1] == pytest.approx(50, abs=0.7)  # per cent


def test_a_flat_beginning_has_no_sharpness_to_lose() -> None:
    found = run(DriftMeter(1), [Moment(0, grey(9)), Moment(1, noise(1))])
    assert found["sharpness_drift"] == Unavailable("not defined: the video begins without any edge")


def test_a_video_as_short_as_its_beginning_has_no_drift() -> None:
    found = run(DriftMeter(2), [Moment(i, noise(i)) for i in range(2)])
    assert set(found.values()) == {
        Unavailable("needs a video that is longer than its first 2 frames")
    }


def test_large_frames_are_shrunk_for_their_mean_colours_only() -> None:
    large = np.repeat(np.repeat(noise(3, 40, 60), 10, axis=0), 10, axis=1)
    moment = Moment(0, large)
    assert moment.small.shape == (171, 256, 3)
    assert moment.grey.shape == (400, 600)
    looks = frame_metrics.measure_looks(moment)
    exact = metrics.colour_shift(large, np.zeros_like(large))
    assert looks[:3] == pytest.approx(exact, abs=1.0)


def test_the_background_is_what_lies_around_the_person() -> None:
    person = np.zeros((16, 20), np.bool_)
    person[4:9, 5:12] = True
    scene = noise(1)
    frames = []
    for index in range(5):
        frame = scene.copy()
        frame[person] = noise(index + 2)[person]
        frames.append(frame)
    frames[4][~person] = np.clip(frames[4][~person].astype(int) + 10, 0, 255)
    track = tracks(
        BackgroundMeter(Backdrop(2)),
        [Moment(i, frame, person=person) for i, frame in enumerate(frames)],
    )["background_psnr"]
    values = track.per_frame()
    assert np.isnan(values[:2]).all()  # they are the measure
    assert values[2:4].tolist() == [pytest.approx(frame_metrics.MAX_PSNR_DB)] * 2
    error = np.square(frames[4][~person].astype(float) - scene[~person]).mean()
    assert values[4] == pytest.approx(metrics.psnr_db(error), abs=1e-3)


def test_what_the_person_always_covered_at_first_is_unknown_background() -> None:
    left = np.zeros((16, 20), np.bool_)
    left[:, :10] = True
    first, later = grey(50), grey(50)
    later[:, :10] = 99  # bare now, but never seen before
    reason = Unavailable("not defined: no pixel is ever seen beside the person")
    moments = [Moment(0, first, person=left), Moment(1, later, person=~left)]
    assert run(BackgroundMeter(Backdrop(1)), moments) == {"background_psnr": reason}
    covered = np.ones((16, 20), np.bool_)
    found = run(
        BackgroundMeter(Backdrop(1)), [Moment(i, grey(1), person=covered) for i in range(3)]
    )
    assert found == {"background_psnr": reason}


def test_the_mask_is_the_hull_with_a_margin() -> None:
    pose = np.zeros((100, 200, 3), np.uint8)
    pose[30:71, 100] = (255, 0, 0)
    pose[30, 100:121] = (0, 255, 0)
    mask = person_mask(pose, 100, 200)
    assert mask is not None
    assert mask[31:70, 101].all()
    assert mask[45, 108]  # inside the triangle, where nothing is drawn
    margin = round(0.15 * 41)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max()) == (30 - margin, 70 + margin)
    assert columns.min() == 100 - margin
    # A dilation by the margin, taken from OpenCV.
    hull = np.zeros((100, 200), np.uint8)
    cv2.fillConvexPoly(hull, np.array([[100, 30], [120, 30], [100, 70]], np.int32), 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1, 2 * margin + 1))
    dilated = cv2.dilate(hull, disc).astype(bool)
    assert (mask != dilated).mean() < 0.01


def test_a_mask_follows_the_pose_into_a_frame_of_another_shape() -> None:
    pose = np.zeros((50, 50, 3), np.uint8)
    pose[25, 25] = 255
    mask = person_mask(pose, 100, 300)
    assert mask is not None
    assert mask[51, 151]
    assert not mask[:, :140].any()
    assert person_mask(np.full((50, 50, 3), 20, np.uint8), 50, 50) is None  # noise of the encoder


# --- from frame to frame -------------------------------------------------------------------------


def test_flicker_is_what_goes_up_and_down() -> None:
    steady = tracks(MotionMeter([2]), [Moment(i, grey(10 * i)) for i in range(5)])
    assert np.nanmax(steady["flicker"].per_frame()) == 0
    flicker = tracks(MotionMeter([2]), [Moment(i, grey([50, 70][i % 2])) for i in range(5)])
    values = flicker["flicker"].per_frame()
    assert np.isnan(values[[0, 4]]).all()
    assert values[1:4].tolist() == [20, 20, 20]


def test_seams_are_told_relative_to_other_neighbours() -> None:
    levels = [0, 2, 4, 14, 16, 18, 38, 40]
    frames = [Moment(i, grey(level)) for i, level in enumerate(levels)]
    seam = tracks(MotionMeter([3, 6]), frames)["seam"]
    jumps = [2, 2, 10, 2, 2, 20, 2]
    assert seam.over(slice(None)) == pytest.approx(metrics.seam_jump(jumps, [2, 5]))
    values = seam.per_frame()
    assert values[[3, 6]].tolist() == [5, 10]
    assert np.isfinite(values).sum() == 2


@pytest.mark.parametrize(
    ("joins", "frames", "reason"),
    [
        (None, [noise(i) for i in range(4)], "needs the chunks: --frames-per-chunk and --overlap, "
         "or the settings file beside the video"),
        ([], [noise(i) for i in range(4)], "not defined: the video is a single chunk"),
        ([4], [noise(i) for i in range(4)], "not defined: the video is a single chunk"),
        ([2], [grey(9)] * 4, "not defined: the video stands still within its chunks"),
    ],
)  # fmt: skip
def test_why_there_may_be_no_seam(
    joins: list[int] | None, frames: list[np.ndarray], reason: str
) -> None:
    found = run(MotionMeter(joins), [Moment(i, frame) for i, frame in enumerate(frames)])
    assert found["seam"] == Unavailable(reason)


def test_two_frames_do_not_flicker() -> None:
    found = run(MotionMeter([1]), [Moment(0, grey(1)), Moment(1, grey(9))])
    assert found["flicker"] == Unavailable("needs a video of three frames or more")


def test_a_series_keeps_gaps() -> None:
    series = Series(2)
    series.put(1, 3.0, 4.0)
    assert len(series) == 2
    rows = series.rows(3)
    assert np.isnan(rows[[0, 2]]).all()
    assert rows[1].tolist() == [3, 4]


# --- over time -----------------------------------------------------------------------------------


def test_the_slope_of_a_line_is_certain() -> None:
    times = np.arange(500) / 25
    slope = measure_slope(times, 30 - 2 * times / 60)
    assert slope is not None
    assert slope.per_minute == pytest.approx(-2)
    assert slope.interval == pytest.approx((-2, -2), abs=1e-6)


def test_gaps_do_not_move_the_slope() -> None:
    times = np.arange(500) / 25
    values = 5 + 3 * times / 60
    values[100:110] = np.nan
    values[::7] = np.nan
    slope = measure_slope(times, values)
    assert slope is not None
    assert slope.per_minute == pytest.approx(3)


def test_an_interval_holds_the_slope_as_often_as_it_says() -> None:
    """Noise that lasts for seconds, as in a video: 95 % of 400 intervals hold the truth."""
    rng = np.random.default_rng(5)
    times = np.arange(60 * 10) / 10
    hits, naive_hits = 0, 0
    for _ in range(400):
        drift = np.zeros(60)
        for second in range(1, 60):
            drift[second] = 0.5 * drift[second - 1] + rng.normal()
        values = 1.0 * times / 60 + np.repeat(drift, 10)
        slope = measure_slope(times, values)
        assert slope is not None
        assert slope.interval is not None
        hits += slope.interval[0] <= 1.0 <= slope.interval[1]
        # As if every frame were an observation of its own.
        away = times - times.mean()
        rest = values - values.mean() - slope.per_minute / 60 * away
        error = 60 * math.sqrt(rest @ rest / 598 / (away @ away))
        naive_hits += abs(slope.per_minute - 1.0) <= 1.96 * error
    assert 0.9 <= hits / 400 <= 0.99
    assert naive_hits / 400 < 0.5


def test_a_slope_needs_three_seconds_and_an_interval_five() -> None:
    times = np.arange(100) / 10
    assert measure_slope(times[:20], times[:20]) is None
    assert measure_slope(times, np.full(100, np.nan)) is None
    slope = measure_slope(times[:40], times[:40])
    assert slope is not None
    assert slope.interval is None
    assert measure_slope(times[:50], times[:50]).interval is not None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1e6, 1.960)],
)
def test_students_table(degrees: float, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, rel=0.01)
