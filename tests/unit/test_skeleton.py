"""Skeleton drawing, face crop and canvas geometry on numbers worked out by hand."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from everanimate_cli import skeleton
from everanimate_cli.images import fit_points

NOSE, LEFT_SHOULDER, RIGHT_SHOULDER, RIGHT_ELBOW, RIGHT_ANKLE = 0, 5, 6, 8, 16
LEFT_BIG_TOE, LEFT_SMALL_TOE, RIGHT_HEEL = 17, 18, 22
LEFT_HAND, RIGHT_HAND = 91, 112
FACE = slice(23, 91)
RED = (255, 0, 0)
BLUE = (0, 0, 255)


def nobody() -> NDArray[np.float64]:
    """133 keypoints of score 0; one shoulder at 1 would bring the neck to 0.5, so tests use 0.9."""
    keypoints = np.zeros((133, 3))
    keypoints[:, :2] = 32.35
    return keypoints


def with_points(points: dict[int, tuple[float, float, float]]) -> NDArray[np.float64]:
    keypoints = nobody()
    for index, point in points.items():
        keypoints[index] = point
    return keypoints


def with_face(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    """Landmarks whose extent is the given rectangle."""
    keypoints = nobody()
    keypoints[FACE, :2] = ((x0 + x1) / 2, (y0 + y1) / 2)
    keypoints[40, :2], keypoints[70, :2] = (x0, y1), (x1, y0)
    return keypoints


def lit_pixels(picture: NDArray[np.uint8]) -> set[tuple[int, int]]:
    """(x, y) of everything that is not black."""
    rows, columns = np.nonzero(picture.any(axis=2))
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


def plus(x: int, y: int) -> set[tuple[int, int]]:
    """A filled circle of radius 1."""
    return {(x, y), (x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)}


def small_person() -> NDArray[np.float64]:
    """A whole body with hands, at least six pixels between joints, for a 128 x 128 canvas."""
    keypoints = np.ones((133, 3))
    body = [
        *((64, 14), (70, 10), (58, 10), (78, 14), (50, 14)),  # nose, eyes, ears
        *((84, 36), (44, 36), (98, 54), (30, 54), (108, 74), (20, 74)),  # shoulders, elbows, wrists
        *((76, 72), (52, 72), (78, 94), (50, 94), (78, 114), (50, 114)),  # hips, knees, ankles
        *((90, 122), (88, 122), (80, 118), (38, 122), (40, 122), (48, 118)),  # feet
    ]
    keypoints[:23, :2] = np.array(body) + 0.35
    keypoints[FACE, :2] = (64.35, 14.35)
    for first_row, side, wrist_x in ((91, 1, 108), (112, -1, 20)):
        for point in range(21):
            finger, joint = divmod(point - 1, 4) if point else (0, -1)
            keypoints[first_row + point, :2] = (
                wrist_x + side * (joint + 1) * 3 + 0.35,
                74 + (finger - 2) * (joint + 1) * 2 + 0.35,
            )
    return keypoints


class TestBodyJoints:
    def test_neck_is_the_mean_of_the_shoulders_in_place_and_score(self) -> None:
        keypoints = with_points({LEFT_SHOULDER: (40, 10, 0.95), RIGHT_SHOULDER: (20, 14, 0.06)})
        joints = skeleton.body_joints(keypoints)
        np.testing.assert_allclose(joints[1], (30, 12, 0.505), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(joints[2], (20, 14, 0.06))
        np.testing.assert_array_equal(joints[5], (40, 10, 0.95))

    def test_left_toe_comes_before_the_right_one(self) -> None:
        keypoints = with_points(
            {17: (10, 50, 1.0), 18: (14, 52, 0.5), 20: (30, 50, 0.4), 21: (36, 54, 0.2)}
        )
        joints = skeleton.body_joints(keypoints)
        np.testing.assert_allclose(joints[18:], [(12, 51, 0.75), (33, 52, 0.3)], rtol=0, atol=1e-12)

    def test_every_other_joint_is_one_keypoint(self) -> None:
        keypoints = np.arange(133 * 3, dtype=np.float64).reshape(133, 3)
        joints = skeleton.body_joints(keypoints)
        sources = [0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
        np.testing.assert_array_equal(joints[[0, *range(2, 18)]], keypoints[sources])

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e12])
    @pytest.mark.parametrize("column", [0, 1])
    def test_joint_with_a_bad_source_has_score_zero(self, bad: float, column: int) -> None:
        keypoints = with_points({LEFT_SHOULDER: (40, 10, 1), RIGHT_SHOULDER: (20, 14, 1)})
        keypoints[RIGHT_SHOULDER, column] = bad
        joints = skeleton.body_joints(keypoints)
        for joint in (1, 2):
            np.testing.assert_array_equal(joints[joint], (np.nan, np.nan, 0))
        np.testing.assert_array_equal(joints[5], (40, 10, 1))

    @pytest.mark.parametrize("shape", [(17, 3), (133, 2), (1, 133, 3)])
    def test_other_keypoint_sets_are_refused(self, shape: tuple[int, ...]) -> None:
        message = f"keypoints must be [133, 3], got {list(shape)}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            skeleton.body_joints(np.zeros(shape))


class TestDrawPose:
    def test_nobody_is_a_black_picture(self) -> None:
        picture = skeleton.draw_pose(nobody(), 48, 80)
        assert picture.shape == (48, 80, 3)
        assert picture.dtype == np.uint8
        assert not picture.any()

    def test_joint_is_a_dot_at_the_truncated_place(self) -> None:
        picture = skeleton.draw_pose(with_points({NOSE: (10.9, 20.9, 1)}), 48, 80)
        assert lit_pixels(picture) == plus(10, 20)
        assert tuple(picture[20, 10]) == RED

    @pytest.mark.parametrize(("score", "drawn"), [(0.5, True), (0.4999, False), (0.51, True)])
    def test_score_of_exactly_the_threshold_is_drawn(self, score: float, drawn: bool) -> None:
        for index in (NOSE, LEFT_HAND, RIGHT_HAND + 20):
            picture = skeleton.draw_pose(with_points({index: (30.35, 20.35, score)}), 48, 80)
            assert picture.any() == drawn

    def test_threshold_can_be_changed(self) -> None:
        keypoints = with_points({NOSE: (30, 20, 0.3)})
        assert not skeleton.draw_pose(keypoints, 48, 80).any()
        assert skeleton.draw_pose(keypoints, 48, 80, threshold=0.3).any()

    @pytest.mark.parametrize(
        ("other_score", "neck_drawn"),
        [(0.06, True), (0.05, True), (0.04, False)],
        ids=["mean 0.505", "mean 0.5", "mean 0.495"],
    )
    def test_neck_shows_by_its_mean_score(self, other_score: float, neck_drawn: bool) -> None:
        keypoints = with_points(
            {LEFT_SHOULDER: (50, 20, 0.95), RIGHT_SHOULDER: (10, 20, other_score)}
        )
        picture = skeleton.draw_pose(keypoints, 48, 80)
        assert (tuple(picture[20, 30]) == (255, 85, 0)) == neck_drawn
        assert not picture[20, 10].any()

    @pytest.mark.parametrize(("score", "drawn"), [(0.51, True), (0.49, False)])
    def test_toe_shows_by_its_mean_score(self, score: float, drawn: bool) -> None:
        """0.9 and 0.08 would pass a maximum, 0.92 and 0.1 would fail a minimum."""
        keypoints = with_points(
            {LEFT_BIG_TOE: (40, 30, 0.9), LEFT_SMALL_TOE: (44, 30, 2 * score - 0.9)}
        )
        assert skeleton.draw_pose(keypoints, 48, 80).any() == drawn

    def test_limb_is_a_dark_ellipse_under_bright_joints(self) -> None:
        keypoints = with_points({RIGHT_SHOULDER: (10, 20, 0.9), RIGHT_ELBOW: (40, 20, 1)})
        picture = skeleton.draw_pose(keypoints, 48, 80)
        assert tuple(picture[20, 10]) == (255, 170, 0)
        assert tuple(picture[20, 40]) == (255, 255, 0)
        assert {tuple(pixel) for pixel in picture[19:22, 25]} == {(153, 102, 0)}
        assert not picture[[18, 22], 25].any()

    def test_limb_is_pointed(self) -> None:
        """Half height 4 in the middle, 4 * sqrt(1 - (140/150)**2) = 1.4 ten pixels from the end."""
        keypoints = with_points({RIGHT_SHOULDER: (100, 500, 0.9), RIGHT_ELBOW: (400, 500, 1)})
        picture = skeleton.draw_pose(keypoints, 1000, 1000)
        thickness = np.count_nonzero(picture.any(axis=2), axis=0)
        assert (thickness[250], thickness[110], thickness[390]) == (9, 3, 3)

    def test_limb_needs_both_joints(self) -> None:
        keypoints = with_points({RIGHT_SHOULDER: (10, 20, 0.9), RIGHT_ELBOW: (40, 20, 0.49)})
        assert lit_pixels(skeleton.draw_pose(keypoints, 48, 80)) == plus(10, 20)

    def test_limb_between_equal_joints_is_hidden_under_them(self) -> None:
        keypoints = with_points({RIGHT_SHOULDER: (30, 20, 0.9), RIGHT_ELBOW: (30, 20, 1)})
        assert lit_pixels(skeleton.draw_pose(keypoints, 48, 80)) == plus(30, 20)

    def test_face_and_heels_are_not_drawn(self) -> None:
        keypoints = nobody()
        keypoints[FACE, 2] = 1
        keypoints[[19, RIGHT_HEEL], 2] = 1
        assert not skeleton.draw_pose(keypoints, 48, 80).any()

    @pytest.mark.parametrize("first_row", [LEFT_HAND, RIGHT_HAND])
    def test_finger_is_a_line_between_blue_dots(self, first_row: int) -> None:
        keypoints = with_points({first_row + 3: (10, 20, 1), first_row + 4: (20, 20, 1)})
        picture = skeleton.draw_pose(keypoints, 48, 80)
        line = {(x, 20) for x in range(10, 21)}
        assert lit_pixels(picture) == plus(10, 20) | plus(20, 20) | line
        assert tuple(picture[20, 10]) == tuple(picture[20, 20]) == BLUE
        assert tuple(picture[20, 15]) == (255, 229, 0)

    def test_hands_are_drawn_over_the_body(self) -> None:
        picture = skeleton.draw_pose(
            with_points({NOSE: (30, 20, 1), LEFT_HAND: (30, 20, 1)}), 48, 80
        )
        assert {tuple(picture[y, x]) for x, y in plus(30, 20)} == {BLUE}

    @pytest.mark.parametrize(("x", "y"), [(0.9, 20), (20, 0.9), (-3, 20), (20, -3)])
    def test_hand_at_the_near_edges_is_dropped_with_its_lines(self, x: float, y: float) -> None:
        keypoints = with_points({LEFT_HAND: (x, y, 1), LEFT_HAND + 1: (30, 30, 1)})
        assert lit_pixels(skeleton.draw_pose(keypoints, 48, 80)) == plus(30, 30)

    def test_hand_beyond_the_far_edge_is_clipped(self) -> None:
        keypoints = with_points({LEFT_HAND: (70, 30, 1), LEFT_HAND + 1: (500, 30, 1)})
        line = {(x, 30) for x in range(70, 80)}
        assert lit_pixels(skeleton.draw_pose(keypoints, 48, 80)) == plus(70, 30) | line

    def test_body_beyond_the_edge_is_clipped(self) -> None:
        """The hands' border test does not apply to the body."""
        keypoints = with_points({NOSE: (0.35, 20.35, 1), RIGHT_ANKLE: (79.35, 47.35, 1)})
        lit = lit_pixels(skeleton.draw_pose(keypoints, 48, 80))
        assert lit == (plus(0, 20) - {(-1, 20)}) | {(79, 47), (78, 47), (79, 46)}

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("column", [0, 1, 2])
    @pytest.mark.parametrize("threshold", [0.5, 0.0])
    def test_row_that_is_not_finite_is_missing(
        self, bad: float, column: int, threshold: float
    ) -> None:
        keypoints = small_person()
        missing = [RIGHT_ELBOW, LEFT_SHOULDER, LEFT_HAND + 4]
        keypoints[missing, 2] = -1
        keypoints[RIGHT_SHOULDER, 2] = 0.9  # The neck is then below either threshold.
        expected = skeleton.draw_pose(keypoints, 128, 128, threshold=threshold)
        keypoints[missing, 2] = 1
        keypoints[missing, column] = bad
        drawn = skeleton.draw_pose(keypoints, 128, 128, threshold=threshold)
        np.testing.assert_array_equal(drawn, expected)

    @pytest.mark.parametrize("far", [1e6, -1e6, 1e12, -1e30])
    def test_absurd_coordinates_do_not_stop_the_drawing(self, far: float) -> None:
        """OpenCV raises on integers beyond 32 bits."""
        keypoints = small_person()
        keypoints[::2, 0] = far
        picture = skeleton.draw_pose(keypoints, 128, 128)
        assert tuple(picture[14, 78]) == (255, 0, 85)  # left ear, row 3

    def test_keypoints_are_left_as_they_were(self) -> None:
        keypoints = small_person()
        keypoints[3, 0] = np.nan
        before = keypoints.copy()
        skeleton.draw_pose(keypoints, 64, 64)
        np.testing.assert_array_equal(keypoints, before)

    def test_small_canvas_shows_every_joint_and_limb(self) -> None:
        keypoints = small_person()
        keypoints[LEFT_HAND:, 2] = 0  # Hands are drawn over the wrists.
        picture = skeleton.draw_pose(keypoints, 128, 128)
        shown = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()} - {(0, 0, 0)}
        assert shown == {*skeleton._JOINT_RGB, *(rgb for _, _, rgb in skeleton._LIMBS)}
        assert 0.05 < np.mean(picture.any(axis=2)) < 0.15

    def test_smallest_canvas_keeps_the_figure_legible(self) -> None:
        keypoints = fit_points(small_person(), (128, 128), (64, 64), "contain")
        picture = skeleton.draw_pose(keypoints, 64, 64)
        assert 0.1 < np.mean(picture.any(axis=2)) < 0.3
        assert tuple(picture[36, 38]) == (0, 85, 255)  # left hip
        assert tuple(picture[47, 25]) == (0, 255, 255)  # right knee


class TestFaceBox:
    def test_area_factor_grows_each_side_by_its_root_mostly_upwards(self) -> None:
        """Twice each side: 50 px left and right, 75 px above, 25 px below."""
        box = skeleton.face_box(with_face(100, 100, 200, 200), 480, 832, area_factor=4)
        assert box == (50, 25, 250, 225)

    def test_default_factor(self) -> None:
        """sqrt(1.3) - 1 = 0.140175: 7.009 px left and right, 10.513 above, 3.504 below."""
        assert skeleton.face_box(with_face(100, 100, 200, 200), 480, 832) == (92, 89, 207, 203)

    def test_factor_one_is_the_extent(self) -> None:
        box = skeleton.face_box(with_face(100, 110, 180, 220), 480, 832, area_factor=1)
        assert box == (100, 110, 180, 220)

    def test_box_ends_at_the_frame(self) -> None:
        box = skeleton.face_box(with_face(-20, -30, 400, 300), 200, 300)
        assert box == (0, 0, 300, 200)

    @pytest.mark.parametrize(
        "extent",
        [
            (-90, 50, -30, 90),
            (330, 50, 390, 90),
            (50, -90, 90, -30),
            (50, 230, 90, 290),
            (50, 60, 50, 90),
            (50, 60, 90, 60),
            (50.2, 60, 50.4, 90),
        ],
        ids=["left", "right", "above", "below", "no width", "no height", "less than a pixel"],
    )
    def test_no_face_without_pixels(self, extent: tuple[float, float, float, float]) -> None:
        assert skeleton.face_box(with_face(*extent), 200, 300) is None

    def test_face_just_touching_the_frame_from_outside_is_none(self) -> None:
        """Grown by 7 px it would reach column 2; grown by 4 px it stays outside."""
        assert skeleton.face_box(with_face(-105, 50, -5, 90), 200, 300) == (0, 45, 2, 91)
        assert skeleton.face_box(with_face(-65, 50, -5, 90), 200, 300) is None

    def test_scores_play_no_part(self) -> None:
        keypoints = with_face(100, 100, 200, 200)
        expected = skeleton.face_box(keypoints, 480, 832)
        keypoints[FACE, 2] = np.linspace(-1, 2, 68)
        assert skeleton.face_box(keypoints, 480, 832) == expected

    def test_only_the_68_landmarks_count(self) -> None:
        """The right heel is row 22, and the released face array starts with it."""
        keypoints = with_face(100, 100, 200, 200)
        expected = skeleton.face_box(keypoints, 480, 832)
        keypoints[[0, RIGHT_HEEL, LEFT_HAND]] = (500, 470, 1)
        assert skeleton.face_box(keypoints, 480, 832) == expected
        for last_or_first in (23, 90):
            moved = keypoints.copy()
            moved[last_or_first, :2] = (400, 400)
            assert skeleton.face_box(moved, 480, 832) != expected

    def test_landmarks_that_are_not_finite_are_left_out(self) -> None:
        keypoints = with_face(100, 100, 200, 200)
        keypoints[[23, 50, 90], 0] = (np.nan, np.inf, -np.inf)
        assert skeleton.face_box(keypoints, 480, 832) == (92, 89, 207, 203)
        keypoints[FACE, 1] = np.nan
        assert skeleton.face_box(keypoints, 480, 832) is None


class TestCropFace:
    def test_no_face_is_black(self) -> None:
        frame = np.full((30, 40, 3), 200, np.uint8)
        picture = skeleton.crop_face(frame, None)
        assert picture.shape == (512, 512, 3)
        assert picture.dtype == np.uint8
        assert not picture.any()

    def test_rectangle_fills_the_square_and_nothing_else_shows(self) -> None:
        """A 20 x 10 rectangle of two colours: each takes half of the square, colours unchanged."""
        frame = np.full((40, 60, 3), 255, np.uint8)
        frame[12:22, 5:15] = (200, 10, 30)
        frame[12:22, 15:25] = (20, 110, 60)
        picture = skeleton.crop_face(frame, (5, 12, 25, 22), 64)
        assert picture.shape == (64, 64, 3)
        assert {tuple(pixel) for pixel in picture[:, :30].reshape(-1, 3)} == {(200, 10, 30)}
        assert {tuple(pixel) for pixel in picture[:, 34:].reshape(-1, 3)} == {(20, 110, 60)}

    def test_interpolation_is_bilinear(self) -> None:
        """Pixel centres 0 and 1 of two columns fall at 0.5 and 2.5 of four: a quarter each way."""
        frame = np.zeros((2, 2, 3), np.uint8)
        frame[:, 1] = 100
        picture = skeleton.crop_face(frame, (0, 0, 2, 2), 4)
        np.testing.assert_array_equal(picture[0, :, 0], [0, 25, 75, 100])


class TestLetterbox:
    @pytest.mark.parametrize("source", [(90, 160), (160, 90), (48, 80), (480, 853)])
    def test_keypoints_and_picture_agree(self, source: tuple[int, int]) -> None:
        """A bright rectangle lands where its corners do."""
        canvas = (96, 128)
        frame = np.zeros((*source, 3), np.uint8)
        frame[10:40, 20:60] = 255
        fitted = skeleton.letterbox_frame(frame, canvas)
        assert fitted.shape == (*canvas, 3)
        rows, columns = np.nonzero(fitted[..., 0] >= 128)
        corners = fit_points(np.array([[20.0, 10.0], [60.0, 40.0]]), source, canvas, "contain")
        found = [[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]
        np.testing.assert_allclose(corners, found, rtol=0, atol=0.51)

    def test_margins_are_black(self) -> None:
        fitted = skeleton.letterbox_frame(np.full((10, 20, 3), 255, np.uint8), (20, 20))
        assert (fitted[5:15] == 255).all()
        assert not fitted[:5].any()
        assert not fitted[15:].any()
