"""The procedural world: seeded, exact, and hard enough to prove something."""

import numpy as np
import pytest

from everanimate_cli import skeleton
from everanimate_cli.toyworld import (
    FACE_SIZE_PX,
    Actor,
    Camera,
    Dance,
    ToyGroup,
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


@pytest.mark.parametrize("camera", ["still", "moving"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (270, 480)])
def test_a_group_of_one_is_the_scene(height: int, width: int, camera: Camera) -> None:
    scene = ToyScene(3, 4, height=height, width=width, camera=camera)
    group = ToyGroup(
        [Actor(person_seed=3, dance=4)],
        height=height,
        width=width,
        background_seed=3,
        camera=camera,
        camera_seed=3,
    )
    alone, frame = scene.frame_at(5.1), group.frame_at(5.1)
    np.testing.assert_array_equal(frame.rgb, alone.rgb)
    np.testing.assert_array_equal(frame.figures[0].keypoints, alone.keypoints)
    np.testing.assert_array_equal(group.room_at(5.1), scene.room_at(5.1))


@pytest.mark.parametrize("side_px", [64, 300])
def test_a_box_is_the_extent_of_the_drawn_person(side_px: int) -> None:
    for seed in range(8):
        actor = Actor(
            person_seed=seed,
            dance=Dance(seed, turn_after_s=0.0),
            path=((0.0, 0.05, -0.1, 0.7),),
        )
        group = ToyGroup([actor], height=side_px, width=side_px, background_seed=seed + 77)
        frame = group.frame_at(7.0)
        drawn = np.abs(frame.rgb.astype(int) - group.room_at(7.0)).max(-1) > 12
        rows, columns = np.nonzero(drawn)
        extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        np.testing.assert_allclose(frame.figures[0].box, extent, atol=2)


def test_two_people_cross_and_the_larger_one_stands_in_front() -> None:
    near = Actor(person_seed=1, dance=1, path=((0, -0.3, 0, 0.8), (4, 0.3, 0, 0.8)))
    far = Actor(person_seed=2, dance=2, path=((0, 0.3, 0, 0.7), (4, -0.3, 0, 0.7)))
    size = {"height": 128, "width": 224}
    group, swapped = ToyGroup([near, far], **size), ToyGroup([far, near], **size)
    middles = []
    for time_s in (0.0, 2.0, 4.0):
        frame = group.frame_at(time_s)
        np.testing.assert_array_equal(frame.rgb, swapped.frame_at(time_s).rgb)
        middles.append([(figure.box[0] + figure.box[2]) / 2 for figure in frame.figures])
    assert middles[0][0] < middles[0][1] - 50
    assert middles[2][0] > middles[2][1] + 50
    alone = ToyGroup([near], **size).frame_at(2.0)
    crossing = group.frame_at(2.0)
    x0, y0, x1, y1 = alone.figures[0].box.round().astype(int)
    same = (crossing.rgb == alone.rgb).all(-1)[y0:y1, x0:x1]
    changed = np.abs(crossing.rgb.astype(int) - group.room_at(2.0)).max(-1)[y0:y1, x0:x1] > 12
    assert (same & changed).mean() > 0.2  # the near person is drawn over the far one
    np.testing.assert_array_equal(crossing.figures[0].keypoints, alone.figures[0].keypoints)


def test_somebody_leaves_and_comes_back() -> None:
    path = ((1, 0, 0, 1), (2, 1.2, 0, 1), (5, 1.2, 0, 1), (6, 0, 0, 1))
    group = ToyGroup([Actor(person_seed=1, dance=1, path=path)], height=64, width=64)
    for time_s, there in ((0.0, True), (3.0, False), (4.9, False), (7.0, True)):
        frame = group.frame_at(time_s)
        assert bool((frame.rgb != group.room_at(time_s)).any()) == there
        assert (frame.figures[0].box[0] < 64) == there


def test_an_empty_group_shows_the_empty_room() -> None:
    group = ToyGroup([], height=64, width=96, background_seed=5, camera="moving")
    frames = list(group.frames(3, start_s=2.0))
    assert [frame.figures for frame in frames] == [()] * 3
    np.testing.assert_array_equal(frames[0].rgb, group.room_at(2.0))
