"""Identity and pose with stand-ins for the networks, and joints where the pose video has them."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from everanimate_cli.errors import InputError
from everanimate_cli.frame_metrics import Moment, Track, Unavailable
from everanimate_cli.person_metrics import (
    DrivingPose,
    IdentityMeter,
    PersonFinder,
    PoseMeter,
    box_of,
    crop_person,
    pose_errors,
    read_driving_pose,
)
from everanimate_cli.pose_models import Detections, PoseModels
from everanimate_cli.retarget import RetargetPlan
from everanimate_cli.skeleton import draw_pose

FRAME = np.zeros((60, 80, 3), np.uint8)


class Detector:
    name, num_calls = "fake", 0

    def __init__(self, *boxes: tuple[float, ...]) -> None:
        self.boxes = np.array(boxes, np.float64).reshape(-1, 4)

    def detect(self, frame_u8: np.ndarray) -> Detections:
        assert frame_u8.ndim == 3
        self.num_calls += 1
        return Detections(self.boxes, np.full(len(self.boxes), 0.9))


class Estimator:
    """Finds every joint in the middle of the box."""

    name, thresholds = "fake", None

    def estimate(self, frame_u8: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        assert frame_u8.ndim == 3
        middle = (boxes[0, :2] + boxes[0, 2:]) / 2
        return np.tile([*middle, 1.0], (1, 133, 1))


def models(*boxes: tuple[float, ...]) -> PoseModels:
    return PoseModels(Detector(*boxes), Estimator(), {})  # type: ignore[arg-type]


def joints(x: float, y: float, score: float = 1.0) -> np.ndarray:
    """[17, 3]: a torso 20 px high, everything else between."""
    points = np.tile([x, y, score], (17, 1))
    points[[5, 6], 1] = y - 10
    points[[11, 12], 1] = y + 10
    return points


# --- finding -------------------------------------------------------------------------------------


def test_the_person_near_the_driving_one_counts_else_the_largest() -> None:
    small, large = (0.0, 20.0, 20.0, 45.0), (30.0, 0.0, 75.0, 55.0)
    finder = PersonFinder(models(large, small), 1)
    assert finder.find_in(FRAME).tolist() == list(large)  # type: ignore[union-attr]
    near = np.array([5.0, 25.0, 15.0, 40.0])
    assert finder.find_in(FRAME, near).tolist() == list(small)  # type: ignore[union-attr]
    far = np.array([0.0, 0.0, 2.0, 2.0])
    assert finder.find_in(FRAME, far).tolist() == list(large)  # type: ignore[union-attr]
    assert PersonFinder(models(), 1).find_in(FRAME) is None


def test_a_frame_is_looked_at_once() -> None:
    found = models((10, 10, 40, 50))
    finder = PersonFinder(found, 1)
    for index in (0, 0, 1, 1):
        finder.find(Moment(index, FRAME))
    assert found.detector.num_calls == 2


# --- identity ------------------------------------------------------------------------------------


def test_the_crop_is_a_square_about_the_person() -> None:
    frame = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3).astype(np.uint8)
    crop = crop_person(frame, np.array([20.0, 10, 40, 50]))
    assert crop.shape == (44, 44, 3)
    np.testing.assert_array_equal(crop, frame[8:52, 8:52])
    beyond = crop_person(frame, np.array([0.0, 0, 20, 60]))
    assert beyond.shape == (66, 66, 3)
    assert not beyond[:, :20].any()
    np.testing.assert_array_equal(beyond[3:63, 23:], frame[:, :43])


def test_identity_is_the_cosine_of_every_so_many_frames() -> None:
    def features_of(crop: np.ndarray) -> np.ndarray:
        return np.array([float(crop.max()), 30.0])

    finder = PersonFinder(models((10, 10, 40, 50)), 2)
    meter = IdentityMeter(features_of, np.array([40.0, 30.0]), finder)
    for index, level in enumerate([40, 0, 0, 9, 40]):
        meter.add(Moment(index, np.full((60, 80, 3), level, np.uint8)))
    outcome = meter.outcomes()["identity"]
    assert isinstance(outcome, Track)
    values = outcome.per_frame()
    assert values[[0, 2, 4]] == pytest.approx([1, 0.6, 1])
    assert np.isnan(values[[1, 3]]).all()


def test_nobody_has_no_identity() -> None:
    meter = IdentityMeter(lambda crop: crop.mean((0, 1)), np.ones(3), PersonFinder(models(), 1))
    meter.add(Moment(0, FRAME))
    assert meter.outcomes() == {
        "identity": Unavailable("not defined: nobody is found in the video")
    }


# --- pose ----------------------------------------------------------------------------------------


def test_errors_of_a_pose_by_hand() -> None:
    wanted = joints(40, 30)
    wanted[0, 2] = 0.4  # not seen, does not count
    found = joints(40, 30)
    found[0, :2] = 1000
    found[1, 0] += 3.0  # 0.15 torso lengths
    found[2, 1] += 20.0  # 1
    errors = pose_errors(found, wanted, 20.0)
    assert errors.pck == pytest.approx(15 / 16)
    assert errors.strict_pck == pytest.approx(14 / 16)
    assert errors.distance == pytest.approx(1.15 / 16)
    nobody = pose_errors(None, wanted, 20.0)
    assert nobody == (0, 0, np.inf)


def test_the_pose_is_compared_where_it_should_be() -> None:
    wanted = np.stack([joints(25, 30), np.full((17, 3), np.nan), joints(35, 30)])
    finder = PersonFinder(models((10, 10, 40, 50)), 2, DrivingPose(points=wanted, torso_px=20.0))
    meter = PoseMeter(finder, DrivingPose(points=wanted, torso_px=20.0))
    for index in range(6):
        meter.add(Moment(index, FRAME))
    found = meter.outcomes()
    for name, expected in {
        "pose_pck": [13 / 17, 0],
        "pose_pck_strict": [13 / 17, 0],
        "pose_distance": [4 * 0.5 / 17, (13 * 0.5 + 4 * np.hypot(0.5, 0.5)) / 17],
    }.items():
        outcome = found[name]
        assert isinstance(outcome, Track)
        values = outcome.per_frame()
        assert values[[0, 4]] == pytest.approx(expected)
        assert np.isfinite(values).sum() == 2  # nobody is driving in frame 2


def test_who_is_not_found_has_no_joint_in_place_and_no_distance() -> None:
    pose = DrivingPose(points=joints(25, 30)[None], torso_px=20.0)
    meter = PoseMeter(PersonFinder(models(), 1, pose), pose)
    meter.add(Moment(0, FRAME))
    found = meter.outcomes()
    assert isinstance(found["pose_pck"], Track)
    assert found["pose_pck"].over(slice(None)) == 0
    assert found["pose_distance"] == Unavailable("not defined: nobody is found in the video")


def test_without_a_torso_there_is_no_measure() -> None:
    pose = DrivingPose(points=joints(25, 30)[None], torso_px=None)
    meter = PoseMeter(PersonFinder(models(), 1, pose), pose)
    meter.add(Moment(0, FRAME))
    assert set(meter.outcomes().values()) == {
        Unavailable("not defined: shoulders and hips are never in view together in the driving")
    }


def test_the_box_of_joints_that_are_seen() -> None:
    points = joints(40, 30)
    points[0] = (0, 0, 0.4)
    assert box_of(points).tolist() == [40, 20, 40, 40]  # type: ignore[union-attr]
    assert box_of(joints(1, 1, 0.4)) is None
    assert box_of(np.full((17, 3), np.nan)) is None


# --- the driving folder --------------------------------------------------------------------------


def body(height: int, width: int) -> np.ndarray:
    """[133, 3] somebody upright, the hands and face beside them."""
    keypoints = np.zeros((133, 3))
    places = {
        0: (0.5, 0.2), 5: (0.6, 0.3), 6: (0.4, 0.3), 7: (0.65, 0.42), 8: (0.35, 0.42),
        9: (0.68, 0.55), 10: (0.32, 0.55), 11: (0.56, 0.6), 12: (0.44, 0.6), 13: (0.56, 0.75),
        14: (0.44, 0.75), 15: (0.56, 0.9), 16: (0.44, 0.9),
    }  # fmt: skip
    for row, (x, y) in places.items():
        keypoints[row] = (x * width, y * height, 1.0)
    return keypoints


def write_folder(folder: Path, keypoints: np.ndarray, **record: Any) -> Path:
    folder.mkdir()
    np.savez(folder / "keypoints.npz", keypoints=keypoints.astype(np.float32))
    base = {
        "fps": 25.0,
        "size": "96x64",
        "source_size": "200x100",
        "settings": {"fit": "contain", "draw_mode": "canvas"},
    }
    (folder / "extract.json").write_text(json.dumps(base | record))
    return folder


def read(folder: Path, size: tuple[int, int], **given: Any) -> DrivingPose | None:
    options = {"indices": [0], "rate": Fraction(25), "start_s": 0.0, "fit": "contain"} | given
    return read_driving_pose(folder, size=size, **options)


def drawn_joint(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Middle (x, y) of what has exactly a joint's colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


@pytest.mark.parametrize("retarget", [False, True])
def test_joints_are_where_the_pose_video_shows_them(tmp_path: Path, retarget: bool) -> None:
    """The pose picture, drawn as extract-pose does and enlarged to the video, is the witness."""
    keypoints = body(100, 200)
    record: dict[str, Any] = {}
    if retarget:
        plan = RetargetPlan(
            scale=1.1,
            offset=(12.0, 5.0),
            ratios=(1.0,) * 19,
            hand_factor=1.0,
            body_class="whole body",  # type: ignore[arg-type]
            frame_size=(100, 200),
            canvas=(90, 150),
        )
        record["retarget"] = plan.to_json() | {"template_frame": 0}
    folder = write_folder(tmp_path / "pose", keypoints[None], **record)
    pose = read(folder, (640, 960))
    assert pose is not None
    if retarget:
        scaled = plan.apply(keypoints)
        canvas = draw_pose(_enlarged(scaled, (90, 150), (640, 960)), 640, 960)
    else:
        canvas = draw_pose(_enlarged(keypoints, (100, 200), (640, 960)), 640, 960)
    right_wrist, left_knee = drawn_joint(canvas, (255, 255, 0)), drawn_joint(canvas, (0, 0, 255))
    assert right_wrist[0] > 0
    assert pose.points[0, 8, :2] == pytest.approx(right_wrist, abs=12)
    assert pose.points[0, 13, :2] == pytest.approx(left_knee, abs=12)
    middles = [pose.points[0, rows, :2].mean(0) for rows in ([5, 6], [11, 12])]
    assert pose.torso_px == pytest.approx(np.linalg.norm(middles[0] - middles[1]))


def _enlarged(
    keypoints: np.ndarray, source: tuple[int, int], canvas: tuple[int, int]
) -> np.ndarray:
    scale = min(canvas[0] / source[0], canvas[1] / source[1])
    moved = keypoints.copy()
    moved[:, 0] = keypoints[:, 0] * scale + (canvas[1] - source[1] * scale) / 2
    moved[:, 1] = keypoints[:, 1] * scale + (canvas[0] - source[0] * scale) / 2
    return moved


def test_frames_are_found_by_time_and_end_with_the_driving(tmp_path: Path) -> None:
    keypoints = np.stack([body(100, 200) + np.array([i, 0, 0]) for i in range(10)])
    keypoints[5] = np.nan
    folder = write_folder(tmp_path / "pose", keypoints, size="200x100")
    pose = read(folder, (100, 200), indices=[0, 1, 2, 3, 4], rate=Fraction(25, 2), start_s=0.04)
    assert pose is not None
    # Every second frame of 25 per second, from frame 1 on: 1, 3, 5 (nobody), 7, 9.
    nose_x = pose.points[:, 0, 0]
    assert nose_x[[0, 1, 3]].tolist() == [101, 103, 107]
    assert np.isnan(pose.points[2]).all()
    assert np.isnan(pose.points[4]).all()  # half a frame of the video is left of the driving


def test_frames_of_a_driving_can_come_again(tmp_path: Path) -> None:
    keypoints = np.stack([body(100, 200) + np.array([i, 0, 0]) for i in range(3)])
    folder = write_folder(tmp_path / "pose", keypoints, size="200x100")
    pose = read(folder, (100, 200), indices=[0, 1, 2, 1, 0, 7])
    assert pose is not None
    assert pose.points[:5, 0, 0].tolist() == [100, 101, 102, 101, 100]
    assert np.isnan(pose.points[5]).all()


def test_keypoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pose", body(100, 200)[None])
    path = folder / "keypoints.npz"
    np.savez(path, keypoints=np.zeros((4, 17, 3)))
    with pytest.raises(InputError, match=r"holds keypoints float64 \(4, 17, 3\)\). Extract it"):
        read(folder, (64, 96))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(InputError, match=r"is damaged"):
        read(folder, (64, 96))
    np.savez_compressed(path, keypoints=np.random.default_rng(0).random((9, 133, 3)))
    content = bytearray(path.read_bytes())
    content[2000:2200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged"):
        read(folder, (64, 96))


def test_a_folder_without_keypoints_or_with_damaged_ones(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pose", body(100, 200)[None])
    (folder / "extract.json").write_text("{")
    with pytest.raises(InputError, match=r"^--driving .*extract.json cannot be read"):
        read(folder, (64, 96))
    (folder / "extract.json").write_text("{}")
    with pytest.raises(InputError, match=r"is damaged \('size'\). Extract it again."):
        read(folder, (64, 96))
    (folder / "keypoints.npz").unlink()
    assert read(folder, (64, 96)) is None


def test_opencv_is_the_witness_of_a_stretched_frame(tmp_path: Path) -> None:
    """A point drawn on the canvas lies, after stretching, where the joint is said to be."""
    keypoints = body(64, 96)
    folder = write_folder(tmp_path / "pose", keypoints[None], source_size="96x64")
    pose = read(folder, (128, 384), fit="stretch")
    assert pose is not None
    canvas = np.zeros((64, 96), np.uint8)
    x, y = keypoints[9, :2]
    canvas[int(y), int(x)] = 255
    big = cv2.resize(canvas, (384, 128), interpolation=cv2.INTER_NEAREST)
    rows, columns = np.nonzero(big)
    assert pose.points[0, 9, :2] == pytest.approx([columns.mean(), rows.mean()], abs=4)
