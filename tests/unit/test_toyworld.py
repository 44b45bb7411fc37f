"""The procedural world: seeded, exact, and hard enough to prove something."""

import numpy as np
import pytest

from everanimate_cli import skeleton
from everanimate_cli.toyworld import (
    FACE_SIZE_PX,
    Dance,
    ToyScene,
    make_person,
)


def test_the_same_seeds_give_the_same_frames() -> None:
    first, second = (ToyScene(3, 4, camera="moving").frame_at(1.7) for _ in range(2))
    for name in ("rgb", "keypoints", "pose", "face"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (320, 160)])
def test_frames_have_the_size_asked_for(height: int, width: int) -> None:
    frame = ToyScene(1, 2, height=height, width=width).frame_at(0.5)
    assert frame.rgb.shape == frame.pose.shape == (height, width, 3)
    assert frame.rgb.dtype == frame.pose.dtype == frame.face.dtype == np.uint8
    assert frame.face.shape == (FACE_SIZE_PX, FACE_SIZE_PX, 3)
    assert frame.keypoints.shape == (133, 3)


def test_the_pose_picture_is_the_products_skeleton() -> None:
    frame = ToyScene(5, 6, height=96, width=64).frame_at(2.0)
    np.testing.assert_array_equal(frame.pose, skeleton.draw_pose(frame.keypoints, 96, 64))


def test_keypoints_lie_on_the_person() -> None:
    """Wrists, ankles and nose are where the frame differs from the empty room."""
    for seed in range(6):
        scene = ToyScene(seed, seed + 50, height=128, width=128)
        frame = scene.frame_at(3.0)
        person = np.abs(frame.rgb.astype(int) - scene.room_at(3.0)).max(-1) > 15
        for row in (5, 6, 9, 10, 11, 12, 15, 16):
            x, y = frame.keypoints[row, :2].round().astype(int)
            if not (4 <= x < 124 and 4 <= y < 124):
                continue
            assert person[y - 3 : y + 4, x - 3 : x + 4].any(), (seed, row)


def test_the_room_stands_still_unless_the_camera_moves() -> None:
    still, moving = (ToyScene(7, 8, camera=camera) for camera in ("still", "moving"))
    np.testing.assert_array_equal(still.room_at(0.0), still.room_at(9.0))
    assert np.abs(moving.room_at(0.0).astype(int) - moving.room_at(9.0)).mean() > 2


def test_a_turn_shows_what_the_front_does_not() -> None:
    """Some clothes differ between front and back, and the face goes away with its score."""
    turned = 0
    for seed in range(8):
        person = make_person(seed)
        quarter = person.torso.shape[1] // 4
        front, back = person.torso[:, quarter : 3 * quarter], person.torso[:, :quarter]
        turned += np.abs(front.mean((0, 1)) - back.mean((0, 1))).max() > 20
    assert turned >= 4
    dance = Dance(2, turn_after_s=5.0)
    scene = ToyScene(1, dance)
    times_s = np.arange(0, 20, 0.2)
    facing = np.cos([dance.yaw(float(t)) for t in times_s])
    assert facing[times_s < 5].min() > 0.5
    assert facing.min() < -0.9
    away = scene.frame_at(float(times_s[facing.argmin()]))
    assert away.keypoints[23:91, 2].mean() < 0.3
    assert not away.face.any()
    assert scene.frame_at(0.0).face.any()


def test_motion_is_smooth() -> None:
    """No joint jumps: at 12.5 fps nothing moves farther than an eighth of the person's height."""
    scene = ToyScene(4, 9, height=64, width=64)
    points = np.stack([frame.keypoints[:23, :2] for frame in scene.frames(60)])
    steps = np.linalg.norm(np.diff(points, axis=0), axis=-1)
    assert 0.1 < steps.max() < 64 / 8


def test_people_of_different_seeds_look_different() -> None:
    pictures = np.stack([ToyScene(seed, 0).reference() for seed in range(6)]).astype(int)
    for first in range(6):
        for second in range(first):
            assert np.abs(pictures[first] - pictures[second]).mean() > 5
