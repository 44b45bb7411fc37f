"""The one-euro filter takes the tremble from points at rest and leaves movement alone."""

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from everanimate_cli import smoothing
from everanimate_cli.smoothing import BoxFilter, KeypointFilter, fill_gap
from everanimate_cli.toyworld import Dance, make_person

FPS = 25.0
BODY_PX = 220.0
BOX = np.array([10.0, 20.0, 110.0, 20.0 + BODY_PX])
INPUT_PX = 1.25 * 1.2 * BODY_PX / 384  # one pixel of the pose model's input, in the frame

Floats = NDArray[np.float64]


def pose(x: float = 50.0, y: float = 60.0, score: float = 0.9) -> Floats:
    keypoints = np.empty((133, 3))
    keypoints[:] = (x, y, score)
    return keypoints


def places(keypoint_filter: KeypointFilter, poses: Floats) -> Floats:
    """[S, 133, 3] filtered one by one."""
    return np.array(
        [keypoint_filter.update_points(p, index / FPS, BOX) for index, p in enumerate(poses)]
    )


class TestDancers:
    """Six seconds of exact joints, at the pace of a dance and much faster."""

    @staticmethod
    @cache
    def joints(person_seed: int, pace: float) -> Floats:
        """[150, 13, 2] places in pixels."""
        person, dance = make_person(person_seed), Dance(person_seed + 50)
        moments = [dance.joints(index / FPS * pace, person) for index in range(150)]
        names = [name for name in moments[0] if name != "look"]
        flat = [[joints[name][:2] for name in names] for joints in moments]
        return np.array(flat) * (BODY_PX, -BODY_PX)

    def measure(
        self, jitter_input_px: float, update: Callable[[Floats], Floats] | None = None
    ) -> dict[str, float]:
        """Jitter of points at rest, mean error of all and of fast ones, and delay of fast ones."""
        rng = np.random.default_rng(5)
        jitter, errors, fast_errors, behind, way = [], [], [], 0.0, 0.0
        for seed, pace in itertools.product(range(2), (1.0, 2.5)):
            truth = self.joints(seed, pace)
            noisy = truth + rng.normal(0, jitter_input_px * INPUT_PX, truth.shape)
            # The grid of half an input pixel lies in the crop, which moves with the person.
            phase, step = rng.uniform(0, 1, (len(truth), 1, 2)), 0.5 * INPUT_PX
            found = (np.round(noisy / step + phase) - phase) * step
            if update is not None:
                found = update(found)
            velocity = np.gradient(truth, 1 / FPS, axis=0)
            speed = np.linalg.norm(velocity, axis=2) / BODY_PX
            settled = np.arange(len(truth))[:, None] >= 12
            still, fast = settled & (speed < 0.06), settled & (speed > 0.5)
            error = found - truth
            bends = np.linalg.norm(error[2:] - 2 * error[1:-1] + error[:-2], axis=2)
            jitter.append(bends[still[2:] & still[1:-1] & still[:-2]])
            errors.append(np.linalg.norm(error, axis=2)[12:].ravel())
            fast_errors.append(np.linalg.norm(error, axis=2)[fast])
            # A delay d makes errors of -d times the velocity: least squares for d.
            behind -= float((error * velocity).sum(axis=2)[fast].sum())
            way += float((velocity**2).sum(axis=2)[fast].sum())
        return {
            "jitter": float(np.sqrt((np.concatenate(jitter) ** 2).mean())),
            "error": float(np.concatenate(errors).mean()),
            "fast_error": float(np.concatenate(fast_errors).mean()),
            "delay_frames": behind / way * FPS,
        }

    @staticmethod
    def filtered(found: Floats) -> Floats:
        """[S, J, 2] through the keypoint filter, as its first rows."""
        poses = np.zeros((len(found), 133, 3))
        poses[:, : found.shape[1], :2] = found
        poses[:, : found.shape[1], 2] = 0.9
        return places(KeypointFilter(), poses)[:, : found.shape[1], :2]

    @pytest.mark.parametrize("jitter_input_px", [0.5, 1.0])
    def test_less_jitter_no_larger_error_and_no_delay(self, jitter_input_px: float) -> None:
        before = self.measure(jitter_input_px)
        after = self.measure(jitter_input_px, self.filtered)
        assert after["jitter"] < 0.72 * before["jitter"]
        assert after["error"] < 1.005 * before["error"]
        assert after["fast_error"] < 1.03 * before["fast_error"]
        assert abs(after["delay_frames"]) < 0.05

    def test_usual_settings_would_lag(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the test above guards against: a coefficient that is right for a mouse pointer."""
        monkeypatch.setattr(smoothing, "SPEED_COEFFICIENT", 10.0)
        before, after = self.measure(0.5), self.measure(0.5, self.filtered)
        assert after["fast_error"] > 2 * before["fast_error"]
        assert after["delay_frames"] > 0.15


class TestKeypointFilter:
    def test_the_first_pose_stays(self) -> None:
        first = pose()
        result = KeypointFilter().update_points(first, 3.0, BOX)
        np.testing.assert_array_equal(result, first)
        assert result is not first

    def test_a_point_at_rest_stays(self) -> None:
        np.testing.assert_allclose(
            places(KeypointFilter(), np.stack([pose()] * 9))[-1], pose(), rtol=0, atol=1e-12
        )

    def test_rest_is_calmed_by_the_cutoff(self) -> None:
        """At rest the weight is that of a 3 Hz low pass: 1 / (1 + 25 / (2 pi 3))."""
        keypoint_filter = KeypointFilter()
        keypoint_filter.update_points(pose(x=50), 0.0, BOX)
        moved = keypoint_filter.update_points(pose(x=50.1), 1 / FPS, BOX)
        weight = 1 / (1 + FPS / (2 * np.pi * 3.0))
        np.testing.assert_allclose(moved[:, 0], 50 + 0.1 * weight, rtol=0, atol=1e-9)

    def test_a_fast_point_is_let_go(self) -> None:
        keypoint_filter = KeypointFilter()
        keypoint_filter.update_points(pose(x=50), 0.0, BOX)
        moved = keypoint_filter.update_points(pose(x=60), 1 / FPS, BOX)
        assert moved[0, 0] > 59.5

    def test_scores_stay(self) -> None:
        poses = np.stack([pose(x=float(i), score=0.3 + 0.1 * i) for i in range(5)])
        np.testing.assert_array_equal(places(KeypointFilter(), poses)[..., 2], poses[..., 2])

    def test_doubtful_points_come_back_and_leave_no_trace(self) -> None:
        steady = np.stack([pose(x=50 + 0.1 * (i % 2)) for i in range(8)])
        disturbed = steady.copy()
        disturbed[4, 7] = (900.0, -900.0, 0.2)
        disturbed[5, 9] = (np.nan, np.nan, 0.9)
        expected = places(KeypointFilter(), np.delete(steady, [4, 5], axis=0))
        found = places(KeypointFilter(), disturbed)
        np.testing.assert_array_equal(found[4, 7], (900.0, -900.0, 0.2))
        np.testing.assert_array_equal(found[5, 9], (np.nan, np.nan, 0.9))
        assert abs(found[6, 7, 0] - expected[4, 7, 0]) < 0.05
        assert np.isfinite(found[6]).all()

    @pytest.mark.parametrize(("gap_s", "jumps"), [(0.2, False), (0.4, True)])
    def test_after_a_long_gap_a_point_starts_anew(self, gap_s: float, jumps: bool) -> None:
        keypoint_filter = KeypointFilter()
        keypoint_filter.update_points(pose(x=50), 0.0, BOX)
        again = keypoint_filter.update_points(pose(x=50.5), gap_s, BOX)
        assert bool(again[0, 0] == 50.5) is jumps

    def test_reset_starts_anew(self) -> None:
        keypoint_filter = KeypointFilter()
        keypoint_filter.update_points(pose(x=50), 0.0, BOX)
        keypoint_filter.reset()
        np.testing.assert_array_equal(
            keypoint_filter.update_points(pose(x=51), 0.04, BOX), pose(x=51)
        )

    def test_the_rate_does_not_matter(self) -> None:
        """A slow sway, seen 25 and 100 times a second."""

        def sway(rate_fps: int) -> Floats:
            keypoint_filter = KeypointFilter()
            return np.array(
                [
                    keypoint_filter.update_points(
                        pose(x=50 + 5 * np.sin(2 * np.pi * 0.3 * index / rate_fps)),
                        index / rate_fps,
                        BOX,
                    )[0, 0]
                    for index in range(2 * rate_fps)
                ]
            )

        np.testing.assert_allclose(sway(25), sway(100)[::4], rtol=0, atol=0.3)

    def test_time_has_to_rise_and_the_person_to_have_a_height(self) -> None:
        keypoint_filter = KeypointFilter()
        keypoint_filter.update_points(pose(), 1.0, BOX)
        with pytest.raises(ValueError, match=r"time must rise .* got 1\.0 and 220\.0"):
            keypoint_filter.update_points(pose(), 1.0, BOX)
        with pytest.raises(ValueError, match=r"got 2\.0 and 0\.0"):
            keypoint_filter.update_points(pose(), 2.0, np.zeros(4))


class TestBoxFilter:
    def test_a_trembling_box_is_calmer(self) -> None:
        rng = np.random.default_rng(1)
        boxes = [(100 + rng.integers(-1, 2), 50, 160 + rng.integers(-1, 2), 130) for _ in range(60)]
        box_filter = BoxFilter()
        found = [box_filter.update_box(box, i / FPS) for i, box in enumerate(boxes)]
        assert np.diff(found, axis=0).std() < 0.7 * np.diff(boxes, axis=0).std()
        assert all(isinstance(value, int) for value in found[-1])

    def test_a_moving_box_is_followed(self) -> None:
        box_filter = BoxFilter()
        for index in range(20):
            box = (100 + 8 * index, 50, 160 + 8 * index, 130)
            found = box_filter.update_box(box, index / FPS)
        assert np.abs(np.subtract(found, box)).max() <= 1

    def test_a_tiny_box_keeps_a_pixel(self) -> None:
        assert BoxFilter().update_box((5, 7, 5, 9), 0.0) == (5, 7, 6, 9)


class TestFillGap:
    def test_straight_lines_and_the_lower_score(self) -> None:
        between = fill_gap(pose(10, 20, 0.9), pose(50, 0, 0.6), 3)
        assert between.shape == (3, 133, 3)
        np.testing.assert_allclose(
            between[:, 5], [(20, 15, 0.6), (30, 10, 0.6), (40, 5, 0.6)], rtol=0, atol=1e-12
        )

    def test_no_frames(self) -> None:
        assert fill_gap(pose(), pose(), 0).shape == (0, 133, 3)

    def test_what_is_missing_at_one_end_is_missing_between(self) -> None:
        before = pose()
        before[3] = (np.nan, np.nan, 0.0)
        after = pose()
        after[4, 2] = np.inf
        between = fill_gap(before, after, 2)
        np.testing.assert_array_equal(between[:, 3:5], [[(np.nan, np.nan, 0.0)] * 2] * 2)
        assert np.isfinite(between[:, 5:]).all()
