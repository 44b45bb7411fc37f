"""`everanimate extract-pose` on rendered dances, with the embedded pose models."""

import json
from pathlib import Path

import numpy as np
import pytest
from dances import FPS, write_dance_video
from media import decode_video
from PIL import Image
from studio import Outcome, Program

from everanimate_cli import extract, pose_models, skeleton
from everanimate_cli.cli import main
from everanimate_cli.images import fit_points
from everanimate_cli.pose_analysis import Source
from everanimate_cli.smoothing import BoxFilter
from everanimate_cli.toyworld import Dance, ToyScene
from everanimate_cli.video import VideoReader

TOY = ("--pose-model", "toy", "--threads", "1", "--fps", str(FPS))
SMALL = ("--size", "96x64", "--face-size", "32")


@pytest.fixture(scope="module")
def dance_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dance_video(tmp_path_factory.mktemp("dance") / "dance.mp4", num_frames=30)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, dance_video: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dance.mp4").symlink_to(dance_video)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(program: Program) -> Program:
    def call(*words: str) -> Outcome:
        return program("extract-pose", *words, *TOY)

    return call


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "dance.mp4")


def test_a_folder_with_two_videos_keypoints_and_a_record(run) -> None:
    outcome = run("dance.mp4", *SMALL)
    assert (outcome.code, outcome.out) == (0, "dance_pose\n")
    assert names("dance_pose") == ["extract.json", "face.mp4", "keypoints.npz", "pose.mp4"]
    pose, face = (
        VideoReader(Path("dance_pose/pose.mp4")).info,
        VideoReader(Path("dance_pose/face.mp4")).info,
    )
    assert (pose.height, pose.width, pose.num_frames) == (64, 96, 30)
    assert (face.height, face.width, face.num_frames) == (32, 32, 30)
    assert pose.rate == face.rate == FPS
    with np.load("dance_pose/keypoints.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays.files}
    assert shapes == {
        "keypoints": (30, 133, 3),
        "raw_keypoints": (30, 133, 3),
        "boxes": (30, 4),
        "face_boxes": (30, 4),
        "persons": (30,),
        "flags": (30,),
        "times_s": (30,),
    }
    record = json.loads(Path("dance_pose/extract.json").read_text())
    assert record["format_version"] == 1
    assert record["source"] == "../dance.mp4"
    assert len(record["source_sha256"]) == 64
    assert (record["fps"], record["size"], record["num_frames"]) == (FPS, "96x64", 30)
    assert record["persons"] == [0] * 30
    assert min(record["scores"]) > 0.5
    assert record["gaps"] == []
    assert made(Path()) == ["dance_pose"]  # no run folder is left


def test_the_joints_are_where_the_renderer_has_them(run) -> None:
    assert run("dance.mp4", *SMALL, "--no-smooth").code == 0
    scene = ToyScene(1_000_001, Dance(1_000_000, turn_after_s=9.0), height=256, width=256)
    exact = np.stack([frame.keypoints for frame in scene.frames(30, rate_fps=FPS)])
    with np.load("dance_pose/keypoints.npz") as arrays:
        found = arrays["keypoints"].astype(float)
    visible = exact[:, :23, 2] >= 0.5
    error_px = np.linalg.norm(found[:, :23, :2] - exact[:, :23, :2], axis=2)[visible]
    body_px = np.ptp(exact[:, :17, 1], axis=1).mean()
    assert np.median(error_px) < 0.025 * body_px


def test_the_pose_video_shows_the_keypoints_on_the_canvas(run) -> None:
    assert run("dance.mp4", "--size", "192x128", "--lossless").code == 0
    _, frames = decode_video(Path("dance_pose/pose.mp4"))
    with np.load("dance_pose/keypoints.npz") as arrays:
        keypoints = arrays["keypoints"].astype(float)
    for index in (0, 15, 29):
        moved = fit_points(keypoints[index], (256, 256), (128, 192), "contain")
        drawn = skeleton.draw_pose(moved, 128, 192)
        difference = np.abs(frames[index].astype(int) - drawn)
        assert drawn.max() == 255
        assert np.median(difference[drawn > 0]) <= 2
        assert (difference > 8).mean() < 1e-3  # float32 keypoints may cut another pixel


def test_a_second_run_is_refused_and_overwrite_gives_the_same_bytes(run) -> None:
    assert run("dance.mp4", *SMALL).code == 0
    before = {name: Path("dance_pose", name).read_bytes() for name in names("dance_pose")}
    outcome = run("dance.mp4", *SMALL)
    assert (outcome.code, outcome.err) == (
        2,
        "error: --output dance_pose holds keypoints.npz. Add --overwrite to replace it, or give "
        "another folder.\n",
    )
    assert run("dance.mp4", *SMALL, "--overwrite").code == 0
    for name in ("pose.mp4", "face.mp4", "keypoints.npz"):
        assert Path("dance_pose", name).read_bytes() == before[name]


@pytest.mark.parametrize("stopped_at", [3, 11, 22])
def test_an_interrupted_extraction_goes_on_and_gives_the_same_bytes(
    run, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    monkeypatch.setattr(extract, "SEGMENT_FRAMES", 7)
    assert run("dance.mp4", *SMALL, "-o", "whole").code == 0
    read = Source.read

    def interrupt(source: Source, index: int) -> object:
        if index == stopped_at and extract.ExtractFolder(Path("dance_pose.run")).holds_run():
            raise KeyboardInterrupt
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", interrupt)
        outcome = run("dance.mp4", *SMALL)
    assert outcome.code == 130
    assert outcome.err.endswith("interrupted. Run the same command again to continue.\n")
    assert not Path("dance_pose").exists()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Source, "read", lambda source, index: (seen.append(index), read(source, index))[1]
        )
        assert run("dance.mp4", *SMALL).code == 0
    finished = stopped_at // 7 * 7
    # After the look at the opening second only what was not finished is read again.
    assert seen[seen.index(14) + 1 :] == list(range(finished, 30))
    for name in ("pose.mp4", "face.mp4", "keypoints.npz"):
        assert Path("dance_pose", name).read_bytes() == Path("whole", name).read_bytes()
    assert made(Path()) == ["dance_pose", "whole"]


def test_another_request_does_not_continue_a_run(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "join_segments", interrupt)
        assert run("dance.mp4", *SMALL).code == 130
    outcome = run("dance.mp4", *SMALL, "--crf", "20", "--no-smooth")
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        2,
        "error: --output dance_pose has a run folder of another request: --crf was 12, is 20; "
        "--smooth was on, is off. Give the same options to continue it, another --output, or "
        "--no-resume to start again.",
    )
    assert run("dance.mp4", *SMALL, "--crf", "20", "--no-resume").code == 0


def test_a_preview_shows_source_pose_and_face(run) -> None:
    assert run("dance.mp4", *SMALL, "--preview").code == 0
    _, frames = decode_video(Path("dance_pose/preview.mp4"))
    assert frames.shape == (30, 64, 64 + 96 + 64, 3)
    _, poses = decode_video(Path("dance_pose/pose.mp4"))
    assert np.abs(frames[:, :, 64:160].astype(int) - poses).mean() < 6
    # Without it an overwritten folder does not keep the old one.
    assert run("dance.mp4", *SMALL, "--overwrite").code == 0
    assert names("dance_pose") == ["extract.json", "face.mp4", "keypoints.npz", "pose.mp4"]


def test_a_reference_is_stored_as_the_poses_are_fitted(run) -> None:
    picture = ToyScene(1_000_002, 3, height=200, width=100).reference()
    Image.fromarray(picture).save("anna.png")
    assert run("dance.mp4", *SMALL, "--reference", "anna.png").code == 0
    stored = np.asarray(Image.open("dance_pose/reference.png"))
    assert stored.shape == (64, 96, 3)
    assert stored[:, :30].max() == 0  # black bars beside a portrait
    assert stored[:, 35:60].std() > 10


def test_auto_size_follows_the_reference(run) -> None:
    picture = ToyScene(1_000_002, 3, height=200, width=100).reference()
    Image.fromarray(picture).save("anna.png")
    words = ("dance.mp4", "--size", "auto", "--dry-run", "--json")
    assert json.loads(run(*words).out)["size"] == "624x624"
    assert json.loads(run(*words, "--reference", "anna.png").out)["size"] == "432x880"
    assert made(Path()) == ["anna.png"]


def test_retargeting_puts_the_person_where_the_character_stands(run) -> None:
    room = ToyScene(1_000_004, 3, height=128, width=128)
    picture = np.full((256, 256, 3), 90, np.uint8)
    picture[120:248, 10:138] = room.reference()
    Image.fromarray(picture).save("anna.png")
    outcome = run("dance.mp4", "--size", "256x256", "--face-size", "32", "--retarget", "anna.png")
    assert outcome.code == 0
    _, frames = decode_video(Path("dance_pose/pose.mp4"))
    rows, columns = np.nonzero(frames[0].max(axis=2) > 60)
    assert rows.min() > 100
    assert columns.mean() < 128
    assert "retarget" in json.loads(Path("dance_pose/extract.json").read_text())
    # The face is still the driving person's.
    _, faces = decode_video(Path("dance_pose/face.mp4"))
    assert faces.std() > 20


def test_the_plan_is_printed(run) -> None:
    outcome = run("dance.mp4", *SMALL, "--dry-run", "--start", "0.8", "--end", "1.6")
    assert outcome.out == (
        "output: dance_pose\nframes: 10\nseconds: 0.8\nfps: 12.5\nsize: 96x64\n"
        "source size: 256x256\npose model: toy\n"
    )
    assert made(Path()) == []


def test_another_rate_keeps_the_speed(run) -> None:
    assert run("dance.mp4", *SMALL, "--start", "0.4", "--fps", "25").code == 0
    assert main(["extract-pose", "dance.mp4", *TOY[:4], *SMALL, "--fps", "25", "-o", "fast"]) == 0
    with np.load("fast/keypoints.npz") as arrays:
        fast = arrays["raw_keypoints"]
    with np.load("dance_pose/keypoints.npz") as arrays:
        slow = arrays["raw_keypoints"]
    assert len(fast) == 60
    assert np.allclose(fast[0, :17, :2], fast[1, :17, :2], atol=4)  # one source frame, twice
    assert len(slow) == 25


def test_the_face_is_cut_where_the_raw_keypoints_are(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the released preprocessing; smoothing of the crops is an option of its own."""
    boxes = {}
    # A dance is too fast to be smoothed by a whole pixel.
    monkeypatch.setattr(BoxFilter, "update_box", lambda _, box, __: (1, 2, box[2], box[3]))
    for words in ((), ("--no-smooth",), ("--face-smooth",)):
        folder = "_".join(words) or "default"
        assert run("dance.mp4", *SMALL, *words, "-o", folder).code == 0
        with np.load(f"{folder}/keypoints.npz") as arrays:
            boxes[folder] = arrays["face_boxes"]
            raw = arrays["raw_keypoints"].astype(float)
    assert np.array_equal(boxes["default"], boxes["--no-smooth"])
    assert boxes["--face-smooth"][:, :2].tolist() == [[1, 2]] * 30
    expected = [skeleton.face_box(keypoints, 256, 256) for keypoints in raw]
    assert np.abs(boxes["default"] - np.array(expected)).max() <= 1  # float32


def test_the_template_is_the_first_frame_that_shows_as_much_as_any(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Legs that nobody sees must not decide with their noise."""
    calibrate = pose_models.calibrate
    num_calls = 0

    def without_legs(keypoints: np.ndarray, thresholds: object) -> np.ndarray:
        nonlocal num_calls
        num_calls += 1
        changed = calibrate(keypoints, thresholds)
        changed[13:23, 2] = 1e-4 * num_calls
        return changed

    monkeypatch.setattr(pose_models, "calibrate", without_legs)
    Image.fromarray(ToyScene(1_000_004, 3, height=128, width=128).reference()).save("anna.png")
    outcome = run("dance.mp4", *SMALL, "--retarget", "anna.png")
    assert outcome.code == 0
    assert (
        json.loads(Path("dance_pose/extract.json").read_text())["retarget"]["template_frame"] == 0
    )
