"""`everanimate animate` from a raw video: the poses are extracted first."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from dances import dancer, group_frames, write_dance_video, write_group_video
from media import decode_video, sound_length, tone_bursts, write_media
from PIL import Image
from studio import Animate, dance_frames

import everanimate_cli
from everanimate_cli import extract
from everanimate_cli.cli import main
from everanimate_cli.toyworld import ToyScene

RAW = ("anna.png", "film.mp4")
TOY = ("--pose-model", "toy")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw dance of 1.2 s with sound."""
    folder = tmp_path_factory.mktemp("film")
    dance = write_dance_video(folder / "silent.mp4", num_frames=15, height=128, width=128)
    _, frames = decode_video(dance)
    return write_media(
        folder / "film.mp4", frames, rate=Fraction(25, 2), sound=tone_bursts(1.2, 44100)
    )


@pytest.fixture(autouse=True)
def raw_film(place: Path, film: Path) -> None:
    (place / "film.mp4").symlink_to(film)


def test_one_command_does_both_and_both_roads_give_equal_bytes(
    animate: Animate, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = animate("-o", "one.mp4", inputs=RAW)
    assert (outcome.code, outcome.out) == (0, "one.mp4\n")
    lines = outcome.err.splitlines()
    assert lines[0] == "extracting the poses of film.mp4 into film_pose"
    assert any(line.startswith("poses: 15/15 frames") for line in lines)
    assert any(line.startswith("chunk 3/3") for line in lines)
    assert sound_length(Path("one.mp4")) == pytest.approx(1.2, abs=0.03)
    words = ("film.mp4", "--size", "64x48", "--fps", "12.5", "--face-size", "16", *TOY)
    assert main(["extract-pose", *words, "-o", "by_hand"]) == 0
    for name in ("pose.mp4", "face.mp4", "keypoints.npz"):
        assert Path("by_hand", name).read_bytes() == Path("film_pose", name).read_bytes()
    assert animate("-o", "two.mp4", inputs=("anna.png", "by_hand")).code == 0
    assert Path("two.mp4").read_bytes() == Path("one.mp4").read_bytes()
    # Its own settings file runs it again, from the raw video.
    saved = json.loads(Path("one.json").read_text())["settings"]
    assert saved["driving"] == "film.mp4"
    assert main(["animate", "--config", "one.json", "-o", "three.mp4"]) == 0
    assert "the poses of film.mp4 are in film_pose already" in capsys.readouterr().err
    assert Path("three.mp4").read_bytes() == Path("one.mp4").read_bytes()


def test_the_name_of_the_result_comes_from_the_video(animate: Animate) -> None:
    assert animate(inputs=RAW).out == "film_anna.mp4\n"
    assert animate("--overwrite", inputs=("anna.png", "film_pose")).out == "film_anna.mp4\n"


def test_poses_that_were_made_otherwise_are_not_used(animate: Animate) -> None:
    assert animate("-o", "a.mp4", inputs=RAW).code == 0
    outcome = animate("-o", "b.mp4", "--end", "0.8", inputs=RAW)
    assert (outcome.code, outcome.err) == (
        2,
        "error: --pose-folder film_pose holds poses that were made otherwise: --end was not given, "
        "is 0.8. Give another --pose-folder, --overwrite to make them again, or this folder itself "
        "as DRIVING.\n",
    )
    assert animate("-o", "b.mp4", "--end", "0.8", "--pose-folder", "short", inputs=RAW).code == 0
    assert len(decode_video(Path("b.mp4"))[1]) == 10
    assert animate("-o", "a.mp4", "--end", "0.8", "--overwrite", inputs=RAW).code == 0
    assert len(decode_video(Path("a.mp4"))[1]) == 10


def test_a_part_of_the_video_keeps_its_sound(animate: Animate) -> None:
    assert animate("-o", "a.mp4", "--start", "0.4", inputs=RAW).code == 0
    assert json.loads(Path("film_pose/extract.json").read_text())["start_s"] == 0.4
    assert len(decode_video(Path("a.mp4"))[1]) == 10
    assert sound_length(Path("a.mp4")) == pytest.approx(0.8, abs=0.03)


def test_an_interrupted_extraction_goes_on(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "join_segments", interrupt)
        outcome = animate(inputs=RAW)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        130,
        "interrupted. Run the same command again to continue.",
    )
    assert not Path("film_pose").exists()
    assert animate(inputs=RAW).code == 0


def test_a_dry_run_extracts_nothing(animate: Animate) -> None:
    outcome = animate("--dry-run", inputs=RAW)
    assert outcome.code == 0
    assert "driving frames: 15\n" in outcome.out
    assert not Path("film_pose").exists()
    outcome = animate("--extend", "error", "--seconds", "5", inputs=RAW)
    assert outcome.code == 2
    assert not Path("film_pose").exists()


def test_a_video_without_a_person(animate: Animate) -> None:
    write_media(Path("empty.mp4"), dance_frames(10), rate=25)
    outcome = animate(inputs=("anna.png", "empty.mp4"))
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        2,
        "error: VIDEO empty.mp4 shows nobody that the detector knows. Give a video of a person, "
        "another part of it (--start), or another --detector.",
    )
    assert not Path("empty_pose").exists()
    assert not Path("empty_pose.run").exists()
    assert not Path("empty_anna.mp4.run").exists()


@pytest.fixture(scope="module")
def duet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people side by side, the left one nearer to the camera."""
    left, right = dancer(0, (0.0, -0.25, 0.0, 0.95)), dancer(2, (0.0, 0.25, 0.0, 0.75))
    frames = group_frames([left, right], 15, height=160, width=240)
    return write_group_video(tmp_path_factory.mktemp("duet") / "duet.mp4", frames)


def mean_pose_x(folder: str) -> float:
    with np.load(f"{folder}/keypoints.npz") as arrays:
        return float(arrays["raw_keypoints"][:, :17, 0].mean())


def test_one_of_several_people_is_followed(animate: Animate, duet: Path) -> None:
    places = {}
    for words in ((), ("--person", "1"), ("--select", "right")):
        folder = "_".join(words) or "none"
        rest = ("--pose-folder", folder, "-o", "a.mp4", "--overwrite", "--frames", "5")
        assert animate(*words, *rest, inputs=("anna.png", str(duet))).code == 0
        places[folder] = mean_pose_x(folder)
    assert places["none"] < 100
    assert places["--person_1"] > 140
    assert places["--select_right"] == places["--person_1"]


def test_model_files_and_retargeting(animate: Animate, place: Path) -> None:
    toy = Path(everanimate_cli.__file__).parent / "toy_pose"
    for name in ("pose", "detector"):
        (place / f"{name}.onnx").symlink_to(toy / f"{name}.onnx")
    words = ("--frames", "5", "--overwrite", "-o", "a.mp4")
    assert animate(*words, "--pose-folder", "plain", inputs=RAW).code == 0
    outcome = animate(
        *words,
        *("--pose-folder", "files", "--pose-model", "pose.onnx", "--detector", "detector.onnx"),
        inputs=RAW,
    )
    assert outcome.code == 0, outcome.err
    with np.load("plain/keypoints.npz") as plain, np.load("files/keypoints.npz") as files:
        assert np.array_equal(plain["raw_keypoints"], files["raw_keypoints"])
    # The picture of a small person at the lower left.
    picture = np.full((96, 128, 3), 90, np.uint8)
    picture[32:, :64] = ToyScene(1_000_004, 3).reference()
    Image.fromarray(picture).save("small.png")
    outcome = animate(
        *words, "--pose-folder", "moved", "--retarget", inputs=("small.png", "film.mp4")
    )
    assert outcome.code == 0, outcome.err
    _, frames = decode_video(Path("moved/pose.mp4"))
    rows, columns = np.nonzero(frames[0].max(axis=2) > 60)
    assert rows.mean() > 24
    assert columns.mean() < 32
