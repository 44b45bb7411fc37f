"""`everanimate demo` with a tiny checkpoint in the place of the embedded model."""

import json
from pathlib import Path

import numpy as np
import pytest
from media import decode_video, sound_length
from PIL import Image

from everanimate_cli import demo, hub
from everanimate_cli.cli import main

MADE = [
    "contact_sheet.png",
    "demo.json",
    "demo.mp4",
    "driving.json",
    "driving.mp4",
    "driving_pose",
    "driving_pose/extract.json",
    "driving_pose/face.mp4",
    "driving_pose/keypoints.npz",
    "driving_pose/pose.mp4",
    "reference.png",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (demo, hub):
        monkeypatch.setattr(module, "TOY_FOLDER", tiny_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_a_demo_leaves_its_inputs_a_video_and_a_contact_sheet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "d", "--seconds", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "d/demo.mp4\nd/contact_sheet.png\n"
    lines = captured.err.splitlines()
    assert lines[0] == "rendering a character and 1 s of dance into d"
    assert lines[1] == "extracting the poses of d/driving.mp4 into d/driving_pose"
    assert any(line.startswith("12 frames of 64x48 at 12.5 fps in 2 chunks") for line in lines)
    assert names("d") == MADE
    _, frames = decode_video(Path("d/demo.mp4"))
    assert frames.shape == (12, 48, 64, 3)
    assert sound_length(Path("d/demo.mp4")) == pytest.approx(0.96, abs=0.001)
    # The poses were extracted from the raw video, with its dancer in every frame.
    assert len(decode_video(Path("d/driving.mp4"))[0]) == 12
    record = json.loads(Path("d/driving_pose/extract.json").read_text())
    assert (record["num_frames"], record["size"], record["frames_without_person"]) == (
        12,
        "64x48",
        0,
    )
    # Eight moments of driving video, pose and result beside the reference.
    sheet = np.asarray(Image.open("d/contact_sheet.png"))
    assert sheet.shape == (24 + 3 * 128, 96 + 128 + 16 + 8 * 128, 3)
    cells = sheet[24:, 240:].reshape(3, 128, 8, 128, 3)
    assert cells.std(axis=(1, 3, 4)).min() > 5
    moves = np.abs(np.diff(cells.astype(int), axis=2)).max((1, 3, 4))
    assert moves.min() > 50  # every row, from one moment to the next


def test_json_tells_all_paths_and_the_seed_changes_everything(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "a", "--seconds", "0.4", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert {name: told[name] for name in ("output", "contact_sheet", "reference", "driving")} == {
        "output": "a/demo.mp4",
        "contact_sheet": "a/contact_sheet.png",
        "reference": "a/reference.png",
        "driving": "a/driving.mp4",
    }
    assert (told["frames"], captured.err) == (5, "")
    assert main(["demo", "b", "--seconds", "0.4"]) == 0
    assert main(["demo", "c", "--seconds", "0.4", "--seed", "1"]) == 0
    for name in ("demo.mp4", "reference.png", "driving_pose/pose.mp4", "driving.mp4"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
        assert Path("a", name).read_bytes() != Path("c", name).read_bytes()


@pytest.mark.parametrize("moment", ["rendering", "animating"])
def test_an_interrupted_demo_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Also when the folder holds a reference and half a driving folder already."""
    words = ["demo", "d", "--seconds", "0.4"]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_music" if moment == "rendering" else "contact_sheet", interrupt)
        if moment == "animating":
            patch.setattr("everanimate_cli.animate.publish", interrupt)
        assert main(words) == 130
    assert not Path("d/demo.mp4").exists()
    capsys.readouterr()
    assert main([*words, "--seed", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: DIR d holds an unfinished demo with --seed 0 --seconds 0.4. Give the same options "
        "to continue it, add --overwrite, or give another folder.\n"
    )
    assert main(words) == 0
    assert ("1 done already" in capsys.readouterr().err) is (moment == "animating")
    assert names("d") == MADE
    assert main(["demo", "whole", "--seconds", "0.4"]) == 0
    assert Path("d/demo.mp4").read_bytes() == Path("whole/demo.mp4").read_bytes()


def test_a_demo_of_other_options_begins_anew_with_overwrite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("everanimate_cli.animate.publish", interrupt)
        assert main(["demo", "d", "--seconds", "0.4"]) == 130
    assert main(["demo", "d", "--seconds", "0.4", "--seed", "1", "--overwrite"]) == 0
    assert json.loads(Path("d/demo.json").read_text())["effective"]["seed"] == 1
    assert names("d") == MADE


def test_files_of_others_are_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("reference.png").write_bytes(b"precious")
    assert main(["demo", "."]) == 2
    assert capsys.readouterr().err == (
        "error: DIR . holds another reference.png. Add --overwrite to replace it, or give another "
        "folder.\n"
    )
    assert names(".") == ["reference.png"]
    Path("film").mkdir()
    Path("film/demo.mp4").write_bytes(b"precious")
    assert main(["demo", "film"]) == 2
    assert capsys.readouterr().err == (
        "error: DIR film holds an earlier demo.mp4. Add --overwrite to replace it, or give another "
        "folder.\n"
    )
