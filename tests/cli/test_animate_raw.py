"""`everanimate animate` from a raw video: the poses are extracted first."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from dances import write_dance_video
from media import decode_video, sound_length, tone_bursts, write_media
from studio import Animate, dance_frames

from everanimate_cli import extract
from everanimate_cli.cli import main

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
