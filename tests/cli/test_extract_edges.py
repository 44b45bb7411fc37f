"""`everanimate extract-pose` on odd inputs: what it makes of them, what it says, what it refuses.

Source: pose page section 13.
"""

import errno
import io
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from dances import FPS, absent, dancer, group_frames, pixels, write_group_video
from media import (
    Frames,
    cut_file,
    decode_video,
    overwrite_bytes,
    packet_positions,
    tone_bursts,
    write_cover_sound,
    write_media,
)
from PIL import Image
from rich.console import Console
from studio import Outcome, Program

from everanimate_cli import console, extract, pose_folder, pose_models, skeleton
from everanimate_cli.cli import main
from everanimate_cli.images import fit_frame, fit_points
from everanimate_cli.pose_analysis import Source
from everanimate_cli.pose_folder import Flag, Renderer, Summary
from everanimate_cli.runs import ExtractFolder
from everanimate_cli.settings import ExtractSettings
from everanimate_cli.toyworld import GroupFrame, ToyScene
from everanimate_cli.tracking import Tracks, choose_track, describe
from everanimate_cli.video import VideoReader

Arrays = dict[str, npt.NDArray]
Run = Callable[..., Outcome]

RATE = Fraction(25, 2)
WORDS = ("--pose-model", "toy", "--threads", "1", "--size", "96x64", "--face-size", "32")
SHARP = {"crf": "12", "preset": "ultrafast"}
# Exactly the same pixels whatever lies between the frames.
EXACT = {"qp": "0", "preset": "ultrafast"}
CENTRE = (0.0, 0.0, 0.0, 1.0)


@pytest.fixture(scope="session")
def scenes() -> dict[str, list[GroupFrame]]:
    """What the videos below show."""
    walk = ((0.8, 0.0, 0.0, 0.9), (1.2, 1.4, 0.0, 0.9))
    return {
        "one": group_frames([dancer(0)], 12),
        # Away for two frames from frame 5 on, and for eight from frame 12 on.
        "gaps": group_frames([dancer(0, *absent([CENTRE], (0.39, 0.55), (0.95, 1.59)))], 25),
        "late": group_frames([dancer(0, *absent([CENTRE], (0.0, 0.47)))], 16),
        "empty": group_frames([], 6),
        "trio": group_frames(
            [
                dancer(0, (0, -0.35, 0.0, 0.6)),
                dancer(1, (0, 0.0, 0.0, 0.8)),
                dancer(2, (0, 0.34, 0.0, 0.7)),
            ],
            16,
            height=112,
            width=240,
        ),
        "soon": group_frames(
            [dancer(0, *walk, (1.8, 1.4, 0.0, 0.9), (2.2, 0.0, 0.0, 0.9))], 38, height=112
        ),
        "later": group_frames(
            [
                dancer(0, *walk, (4.0, 1.4, 0.0, 0.9), (4.4, 0.0, 0.0, 0.9)),
                dancer(1, (0, -0.33, 0.0, 0.7)),
            ],
            75,
            height=112,
            width=208,
        ),
    }


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, scenes: dict[str, list[GroupFrame]]) -> Path:
    """Videos of the scenes, which no test may change."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in scenes.items():
        write_group_video(folder / f"{name}.mp4", frames)
    # A key frame every fifth frame and no frames that need later ones, so that it is known what
    # becomes of a missing piece.
    options = {**SHARP, "g": "5", "bf": "0"}
    whole = write_media(
        folder / "whole.mp4",
        pixels(scenes["gaps"]),
        rate=RATE,
        options=options,
        container_options={"movflags": "faststart"},
    )
    _, position, size = packet_positions(whole)[10]
    cut_file(whole, folder / "torn.mp4", position + 20)
    overwrite_bytes(whole, folder / "scratched.mp4", position, size)
    _, position, size = packet_positions(whole)[0]
    overwrite_bytes(whole, folder / "headless.mp4", position, size)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the videos and a picture of a character in it."""
    for path in videos.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(program: Program) -> Run:
    """Runs `everanimate extract-pose` with small results; the words given come last and win."""

    def call(video: str, *words: str) -> Outcome:
        return program("extract-pose", video, *WORDS, "--fps", str(FPS), *words)

    return call


@pytest.fixture
def refused(run: Run, place: Path) -> Callable[..., str]:
    """Runs the program and gives its one line of error; nothing else may come of it."""

    def call(video: str, *words: str) -> str:
        before = snapshot(place)
        done = run(video, *words)
        assert (done.code, done.out) == (2, "")
        assert snapshot(place) == before
        (line,) = told(done)
        return line

    return call


Refused = Callable[..., str]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder with its size and time of change."""
    status = {str(path): path.lstat() for path in sorted(folder.rglob("*"))}
    return {name: (value.st_size, value.st_mtime_ns) for name, value in status.items()}


def told(outcome: Outcome) -> list[str]:
    """The lines on stderr but those of the progress, which hold times."""
    phases = ("poses: ", "persons: ")
    return [line for line in outcome.err.splitlines() if not line.startswith(phases)]


def arrays(folder: str) -> Arrays:
    """The keypoints file, in float64 where it holds floats."""
    with np.load(Path(folder, "keypoints.npz")) as file:
        return {
            name: file[name].astype(float) if file[name].dtype == np.float32 else file[name]
            for name in file.files
        }


def record(folder: str) -> dict:
    return json.loads(Path(folder, "extract.json").read_text())


def frames_of(folder: str, name: str) -> Frames:
    return decode_video(Path(folder, f"{name}.mp4"))[1]


def missing(folder: str) -> str:
    """A letter per frame: "." without the person, "f" filled in, "p" seen."""
    flags = arrays(folder)["flags"]
    return "".join("." if f & Flag.NO_PERSON else "f" if f & Flag.FILLED else "p" for f in flags)


def exact_joints(frames: Sequence[GroupFrame], actor: int = 0) -> npt.NDArray[np.float64]:
    """[N, 17, 2] body joints where the renderer has them."""
    return np.stack([frame.figures[actor].keypoints[:17, :2] for frame in frames])


def error_px(folder: str, frames: Sequence[GroupFrame], actor: int = 0) -> float:
    """How far the joints are from where the renderer has them, in the median."""
    found = arrays(folder)["keypoints"][:, :17, :2]
    assert len(found) == len(frames)
    return float(np.median(np.linalg.norm(found - exact_joints(frames, actor), axis=2)))


def overlap(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Shared area of two boxes as part of what either covers."""
    near, far = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = np.maximum(far - near, 0).prod()
    areas = [(box[2:] - box[:2]).prod() for box in (first, second)]
    return float(shared / (sum(areas) - shared))


# --- nobody --------------------------------------------------------------------------------------


def test_short_gaps_are_filled_and_long_ones_stay_black(run: Run) -> None:
    done = run("gaps.mp4", "--no-smooth", "--json", "--lossless")
    assert done.code == 0
    assert told(done) == ["8 of 25 frames without a person (0:01.0-0:01.6)"]
    facts = json.loads(done.out)
    assert {name: facts[name] for name in ("frames", "frames_without_person", "gaps")} == {
        "frames": 25,
        "frames_without_person": 8,
        "gaps": [[0.96, 1.6]],
    }
    assert facts["frames_filled"] == 2
    assert missing("gaps_pose") == "pppppffppppp........ppppp"
    values = arrays("gaps_pose")
    before, after = values["keypoints"][4], values["keypoints"][7]
    for index, share in ((5, 1 / 3), (6, 2 / 3)):
        between = before + share * (after - before)
        np.testing.assert_allclose(values["keypoints"][index, :, :2], between[:, :2], atol=1e-3)
    assert values["persons"].tolist() == [0] * 12 + [-1] * 8 + [0] * 5
    assert np.isnan(values["keypoints"][12:20]).all()
    assert (values["face_boxes"][12:20] == -1).all()
    for name in ("pose", "face"):
        frames = frames_of("gaps_pose", name)
        assert len(frames) == 25
        assert frames[12:20].max() <= 2
        assert frames[[0, 5, 11, 20]].max(axis=(1, 2, 3)).min() > 100


def test_the_longest_gap_is_the_users_choice(run: Run) -> None:
    done = run("gaps.mp4", "--max-gap", "0")
    assert told(done) == ["10 of 25 frames without a person (0:00.4-0:00.6, 0:01.0-0:01.6)"]
    assert missing("gaps_pose") == "ppppp..ppppp........ppppp"
    assert told(run("gaps.mp4", "--max-gap", "0.65", "--overwrite")) == []
    assert missing("gaps_pose") == "pppppffpppppffffffffppppp"


def test_a_gap_at_the_end_is_not_filled(run: Run) -> None:
    done = run("gaps.mp4", "--end", "1.12")
    assert told(done) == ["2 of 14 frames without a person (0:01.0-0:01.1)"]
    assert missing("gaps_pose") == "pppppffppppp.."


def test_many_gaps_take_one_line() -> None:
    flags = np.tile(np.array([Flag.NO_PERSON, 0], np.uint8), 5)
    summary = Summary(
        persons=np.where(flags > 0, -1, 0).astype(np.int32),
        scores=np.zeros(10),
        flags=flags,
        small_faces=0,
        fps=10.0,
        start_s=60.0,
    )
    assert summary.notes() == [
        "5 of 10 frames without a person (1:00.0-1:00.1, 1:00.2-1:00.3, 1:00.4-1:00.5 and 2 more)"
    ]


def test_a_way_there_and_back_is_two_switches() -> None:
    summary = Summary(
        persons=np.array([0, -1, 0, 1, 1, -1, 0], np.int32),
        scores=np.zeros(7),
        flags=np.array([0, Flag.NO_PERSON, 0, 0, 0, Flag.NO_PERSON, 0], np.uint8),
        small_faces=0,
        fps=10.0,
        start_s=60.0,
    )
    assert summary.facts()["switches"] == 2
    assert summary.notes()[1] == ("another person was followed 2 times, as --reacquire any allows")


def test_no_memory_is_filled_by_a_gap_without_end(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames wait until it is known whether the person comes back."""
    monkeypatch.setattr(extract, "_WAITING_BYTES", 20 * 3 * 96 * 128)
    assert refused("gaps.mp4", "--max-gap", "60") == (
        "error: --max-gap 60 would keep 750 frames of 128x96 in memory. Give 1.6 or less."
    )


def test_nobody_in_the_whole_video(refused: Refused) -> None:
    message = (
        "error: VIDEO empty.mp4 shows nobody that the detector knows. Give a video of a person, "
        "another part of it (--start), or another --detector."
    )
    assert refused("empty.mp4") == message
    assert refused("empty.mp4", "--list-persons") == message
    assert refused("empty.mp4", "--person", "1") == message


def test_nobody_in_the_first_frames(run: Run, scenes: dict[str, list[GroupFrame]]) -> None:
    done = run("late.mp4")
    assert done.code == 0
    assert told(done) == ["6 of 16 frames without a person (0:00.0-0:00.5)"]
    assert missing("late_pose") == "......pppppppppp"
    found = arrays("late_pose")["keypoints"][6:, :17, :2]
    assert np.median(np.abs(found - exact_joints(scenes["late"][6:]))) < 2


def test_retargeting_tells_which_frame_it_compares(run: Run, refused: Refused) -> None:
    Image.fromarray(ToyScene(1_000_004, 3, height=128, width=128).reference()).save("anna.png")
    done = run("late.mp4", "--retarget", "anna.png")
    assert done.code == 0
    assert told(done)[0] == (
        "--retarget compares frame 6 (0:00.5) with anna.png: the first one with a whole pose"
    )
    assert told(done)[-1] == "6 of 16 frames without a person (0:00.0-0:00.5)"
    assert record("late_pose")["retarget"]["template_frame"] == 6
    assert missing("late_pose") == "......pppppppppp"
    words = ("--overwrite", "--retarget", "anna.png", "--template-frame")
    assert refused("late.mp4", *words, "2") == (
        "error: --template-frame 2 does not show the person followed in VIDEO late.mp4. "
        "Give another frame, or leave it out."
    )
    assert refused("late.mp4", *words, "16") == (
        "error: --template-frame 16 is behind the last frame. Give 0 to 15, or leave it out."
    )
    assert told(run("late.mp4", *words, "9"))[-1].startswith("6 of 16 frames")
    assert record("late_pose")["retarget"]["template_frame"] == 9
    # Frame 0 is what everybody expects.
    assert "compares frame" not in run("one.mp4", *words[:-1]).err
    assert record("one_pose")["retarget"]["template_frame"] == 0


def test_a_character_that_is_none(refused: Refused, scenes: dict[str, list[GroupFrame]]) -> None:
    Image.fromarray(scenes["empty"][0].rgb).save("room.png")
    assert refused("one.mp4", "--retarget", "room.png") == (
        "error: --retarget room.png shows nobody that the detector knows. "
        "Give a picture of a whole person, or no --retarget."
    )
    assert refused("one.mp4", "--retarget", "one.mp4") == (
        "error: --retarget one.mp4 is not a picture in a known format. "
        "Give a PNG, JPEG or WebP file."
    )
    assert refused("one.mp4", "--reference", "eve.png") == (
        "error: --reference eve.png does not exist. Give a picture of the character."
    )


# --- several persons -----------------------------------------------------------------------------


def test_everybody_has_a_number_and_a_place(
    run: Run, refused: Refused, scenes: dict[str, list[GroupFrame]]
) -> None:
    done = run("trio.mp4", "--list-persons", "--json")
    people = json.loads(done.out)
    assert [person["number"] for person in people] == [0, 1, 2]
    assert [person["place"] for person in people] == ["centre", "right", "left"]
    assert [person["start_s"] for person in people] == [0.0] * 3
    lines = run("trio.mp4", "--list-persons").out.splitlines()
    x0, y0, x1, y1 = people[0]["box"]
    assert lines[0] == f"0: 0:00.0-0:01.1, {x1 - x0}x{y1 - y0} pixels, centre"
    assert [line[:3] for line in lines] == ["0: ", "1: ", "2: "]
    actors = (1, 2, 0)  # by falling size
    for person, actor in zip(people, actors, strict=True):
        mean = np.mean([frame.figures[actor].box for frame in scenes["trio"]], axis=0)
        assert overlap(np.array(person["box"], float), mean) > 0.7
    choices = {
        ("--person", "0"): 1,
        ("--person", "1"): 2,
        ("--person", "2"): 0,
        ("--select", "size"): 1,
        ("--select", "centre"): 1,
        ("--select", "left"): 0,
        ("--select", "right"): 2,
    }
    for words, actor in choices.items():
        done = run("trio.mp4", *words, "--overwrite")
        assert (done.code, told(done)) == (0, [])
        # On the first frames the pose may still lean on a neighbour's arm.
        assert error_px("trio_pose", scenes["trio"], actor) < 2.5
        assert len(set(arrays("trio_pose")["persons"].tolist())) == 1
        assert record("trio_pose")["people"] == 3
    assert refused("trio.mp4", "--overwrite", "--person", "3") == (
        "error: --person 3 was given, but 3 persons were found. "
        "Give a number from 0 to 2; --list-persons shows them."
    )
    assert refused("one.mp4", "--person", "1") == (
        "error: --person 1 was given, but 1 person was found. "
        "Give a number from 0 to 0; --list-persons shows them."
    )
    assert refused("trio.mp4", "--person", "1", "--select", "left") == (
        "error: --person 1 and --select left exclude each other. Give one of them."
    )


OUT, IN = (1.4, 0.0, 0.9), (0.0, 0.0, 0.9)
PAIRS = {
    # Who stood in front was taken for who was hidden, who then counted as somebody new.
    "cross": (
        (5, (0.8, -0.3, 0.0, 0.76), (2.6, 0.3, 0.0, 0.76)),
        (35, (0.8, 0.3, 0.0, 0.7), (2.6, -0.3, 0.0, 0.7)),
    ),
    # Half an arm at the edge was a person for one look.
    "leave": ((0, (0.8, *IN), (1.2, *OUT), (1.8, *OUT), (2.2, *IN)), (30, (0, -0.33, 0.0, 0.7))),
    "enter": ((0, (0, -0.25, 0.0, 0.8)), (30, (1.6, 1.4, 0.0, 0.7), (2.4, 0.3, 0.0, 0.7))),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_two_people_are_listed_as_two(run: Run, name: str) -> None:
    actors = [dancer(number, *path) for number, *path in PAIRS[name]]
    room = 5 if name == "cross" else 0
    frames = group_frames(actors, 42, height=112, width=192, room=room)
    write_group_video(Path("pair.mp4"), frames)
    people = json.loads(run("pair.mp4", "--list-persons", "--json").out)
    assert [person["number"] for person in people] == [0, 1]


def test_somebody_who_comes_later_can_be_chosen(run: Run) -> None:
    late = ((1.6, 1.4, 0.0, 0.7), (2.4, 0.3, 0.0, 0.7))
    frames = group_frames(
        [dancer(0, (0, -0.25, 0.0, 0.8)), dancer(1, *late)], 42, height=112, width=192
    )
    write_group_video(Path("enter.mp4"), frames)
    people = json.loads(run("enter.mp4", "--list-persons", "--json", "--start", "0.8").out)
    assert [person["place"] for person in people] == ["left", "right"]
    assert people[0]["start_s"] == 0.8  # in the time of the video
    assert 1.8 < people[1]["start_s"] < 2.4
    assert run("enter.mp4", "--person", "1").code == 0
    values = arrays("enter_pose")
    assert (values["persons"][:20] == -1).all()
    assert (values["persons"][-10:] == 1).all()
    found = values["keypoints"][-10:, :17, :2]
    assert np.median(np.linalg.norm(found - exact_joints(frames[-10:], 1), axis=2)) < 2.5


@pytest.mark.parametrize("scales", [(0.7, 0.76), (0.76, 0.7)], ids=["behind", "in front"])
def test_people_who_cross_are_not_mixed_up(run: Run, scales: tuple[float, float]) -> None:
    paths = [((0.8, side * -0.3, 0.0, s), (2.6, side * 0.3, 0.0, s)) for side, s in
             zip((1, -1), scales, strict=True)]  # fmt: skip
    frames = group_frames([dancer(3, *paths[0]), dancer(4, *paths[1])], 42, height=112, width=192)
    write_group_video(Path("cross.mp4"), frames)
    boxes = np.array([[figure.box for figure in frame.figures] for frame in frames])
    apart = np.array([overlap(*pair) < 0.2 for pair in boxes])
    assert apart[:12].all()
    assert apart[-8:].all()
    assert not apart.all()
    for actor, place in enumerate(("left", "right")):
        done = run("cross.mp4", "--select", place, "--overwrite", "--json")
        assert json.loads(done.out)["switches"] == 0
        values = arrays("cross_pose")
        is_seen = (values["flags"] & Flag.NO_PERSON) == 0
        assert is_seen[-8:].all()
        for index in np.flatnonzero(apart & is_seen):
            own, other = (
                overlap(values["boxes"][index], boxes[index, figure])
                if not values["flags"][index] & Flag.FILLED
                else float(figure == actor)
                for figure in (actor, 1 - actor)
            )
            assert own > other, index


def test_a_person_who_leaves_and_comes_back_is_the_same(
    run: Run, scenes: dict[str, list[GroupFrame]]
) -> None:
    assert run("soon.mp4", "--max-gap", "0").code == 0
    values = arrays("soon_pose")
    frames = scenes["soon"]
    gone = np.array([frame.figures[0].box[0] > 128 for frame in frames])
    here = np.array([frame.figures[0].box[2] < 128 for frame in frames])
    assert gone.sum() > 5
    is_seen = values["persons"] == 0
    assert set(values["persons"].tolist()) == {0, -1}
    assert not is_seen[gone].any()
    assert is_seen[here].mean() > 0.9
    assert is_seen[-8:].all()


def test_a_doubtful_box_long_before_the_person() -> None:
    """The choice was then made among nobody, and crashed."""
    tracks = Tracks(100, 100)
    boxes = np.array([[10.0, 10.0, 60.0, 90.0]])
    looks = describe(np.zeros((100, 100, 3), np.uint8), boxes)
    assert tracks.update(0.0, boxes, np.array([0.1]), looks) == [-1]
    assert tracks.update(5.0, boxes, np.array([0.9]), looks) == [0]
    chosen = choose_track(tracks)
    assert chosen is not None
    assert chosen.track_id == 0


def test_only_reacquire_any_follows_somebody_else(run: Run) -> None:
    done = run("later.mp4", "--select", "centre", "--json")
    assert json.loads(done.out)["switches"] == 0
    values = arrays("later_pose")
    first = values["persons"][0]
    assert set(values["persons"].tolist()) == {first, -1}
    assert (values["persons"][18:50] == -1).all()
    assert (values["persons"][-8:] == first).all()
    centres_x = (values["boxes"][:, 0] + values["boxes"][:, 2]) / 2
    assert (centres_x[-8:] > 80).all()  # the other one stands at about 35
    done = run("later.mp4", "--select", "centre", "--reacquire", "any", "--overwrite", "--json")
    assert json.loads(done.out)["switches"] == 1
    assert told(done)[-1] == "another person was followed once, as --reacquire any allows"
    values = arrays("later_pose")
    assert set(values["persons"].tolist()) == {first, -1, 1 - first}
    centres_x = (values["boxes"][:, 0] + values["boxes"][:, 2]) / 2
    assert (centres_x[values["persons"] == 1 - first] < 60).all()


def test_a_person_partly_out_of_the_frame(run: Run) -> None:
    frames = group_frames([dancer(0, (0, 0.0, 0.25, 1.1))], 12, height=112)
    write_group_video(Path("part.mp4"), frames)
    done = run("part.mp4", "--size", "160x128", "--lossless")
    assert (done.code, told(done)) == (0, [])
    assert missing("part_pose") == "p" * 12
    exact = exact_joints(frames)
    assert (exact[:, 15:, 1] > 112).all()  # the feet are below the picture
    found = arrays("part_pose")["keypoints"]
    upper = np.linalg.norm(found[:, 5:11, :2] - exact[:, 5:11], axis=2)
    assert np.median(upper) < 3
    assert frames_of("part_pose", "pose").max() == 255


# --- kinds of video ------------------------------------------------------------------------------


def test_a_variable_rate_gives_the_same_poses_at_the_same_times(run: Run) -> None:
    """The twin shows at each time what the other one shows; with indices all would be faster."""
    frames = pixels(group_frames([dancer(0)], 24))
    kept = [0, 1, 2, 5, 6, 9, 12, 13, 14, 17, 20, 23]
    shown = [min(kept, key=lambda index: abs(index - now)) for now in range(24)]
    options = {"options": EXACT, "pixel_format": "yuv444p"}
    write_media(Path("even.mkv"), frames[shown], rate=RATE, **options)
    write_media(
        Path("uneven.mkv"),
        frames[kept],
        rate=RATE,
        times=[80 * index for index in kept],
        time_base=Fraction(1, 1000),
        **options,
    )
    assert VideoReader(Path("uneven.mkv")).info.num_frames == 12
    assert run("even.mkv").code == run("uneven.mkv").code == 0
    even, uneven = arrays("even_pose"), arrays("uneven_pose")
    assert len(even["keypoints"]) == 24
    for name in ("keypoints", "boxes", "times_s"):
        np.testing.assert_array_equal(uneven[name], even[name][: len(uneven[name])])
    assert len(uneven["keypoints"]) in (23, 24)  # how long the last frame lasts is not stored


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_phone_held_sideways(
    run: Run, scenes: dict[str, list[GroupFrame]], rotation: int
) -> None:
    stored = np.ascontiguousarray(np.rot90(pixels(scenes["one"]), k=-rotation // 90, axes=(1, 2)))
    write_media(Path("phone.mp4"), stored, rate=RATE, rotation=rotation, options=SHARP)
    done = run("phone.mp4", "--json")
    assert json.loads(done.out)["source_size"] == "128x96"
    assert error_px("phone_pose", scenes["one"]) < 2


def test_wide_pixels(run: Run, scenes: dict[str, list[GroupFrame]]) -> None:
    narrow = np.stack(
        [cv2.resize(f, (64, 96), interpolation=cv2.INTER_AREA) for f in pixels(scenes["one"])]
    )
    write_media(Path("wide.mp4"), narrow, rate=RATE, sample_aspect=Fraction(2), options=SHARP)
    assert json.loads(run("wide.mp4", "--json").out)["source_size"] == "128x96"
    assert error_px("wide_pose", scenes["one"]) < 2.5


X265 = {"crf": "12", "preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}
KINDS = {
    "deep.mp4": {"codec": "libx265", "pixel_format": "yuv420p10le", "options": X265},
    "web.webm": {"codec": "libvpx-vp9", "options": {"crf": "12", "b": "0", "cpu-used": "8"}},
    "moving.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "full.mp4": {"pixel_format": "yuvj420p", "options": SHARP},
    "camera.avi": {"codec": "mjpeg", "pixel_format": "yuvj422p", "options": {"qscale": "2"}},
    "odd.mp4": {"pixel_format": "yuv444p", "options": SHARP},
}


@pytest.mark.parametrize("name", list(KINDS))
def test_kinds_of_video(run: Run, scenes: dict[str, list[GroupFrame]], name: str) -> None:
    frames = pixels(scenes["one"])
    if name == "odd.mp4":
        frames = frames[:, :95, :127]
    write_media(Path(name), frames, rate=RATE, **KINDS[name])
    done = run(name, "--json")
    assert (done.code, told(done)) == (0, [])
    facts = json.loads(done.out)
    assert facts["source_size"] == ("127x95" if name == "odd.mp4" else "128x96")
    assert facts["frames"] == 12
    assert error_px(f"{Path(name).stem}_pose", scenes["one"]) < 2
    pose = VideoReader(Path(f"{Path(name).stem}_pose/pose.mp4")).info
    assert (pose.height, pose.width, pose.rate) == (64, 96, RATE)


def test_a_small_figure_is_warned_of(run: Run, scenes: dict[str, list[GroupFrame]]) -> None:
    warning = (
        "the driving picture fills less than half of the pose video: "
        "--retarget puts the person where the character stands"
    )
    done = run("one.mp4", "--size", "64x112")
    assert (done.code, told(done)) == (0, [warning])
    assert record("one_pose")["warnings"] == [warning]
    shown = frames_of("one_pose", "pose").max(axis=(0, 2, 3)) > 40
    assert not shown[:32].any()  # black above and below
    assert not shown[-32:].any()
    assert shown[32:-32].any()
    for fit in ("cover", "stretch"):
        assert told(run("one.mp4", "--size", "64x112", "--fit", fit, "--overwrite")) == []
    Image.fromarray(scenes["one"][0].rgb).save("anna.png")
    done = run("one.mp4", "--size", "64x112", "--retarget", "anna.png", "--overwrite")
    assert warning not in told(done)


def test_one_frame_is_enough(
    run: Run, tiny_model: Path, scenes: dict[str, list[GroupFrame]]
) -> None:
    first = pixels(scenes["one"])[:1]
    write_media(Path("single.mp4"), first, rate=RATE, options=SHARP)
    Image.fromarray(first[0]).save("still.png")
    Image.fromarray(first[0]).save("photo.jpg", quality=95)
    for name in ("single.mp4", "still.png", "photo.jpg"):
        done = run(name, "--json", "--size", "64x48", "--face-size", "16")
        assert (done.code, json.loads(done.out)["frames"]) == (0, 1)
        folder = f"{Path(name).stem}_pose"
        assert error_px(folder, scenes["one"][:1]) < 2
        assert len(frames_of(folder, "pose")) == len(frames_of(folder, "face")) == 1
    assert main(["animate", "still.png", "single_pose", "--model", str(tiny_model)]) == 0
    assert len(decode_video(Path("single_still.mp4"))[1]) == 1


def test_a_fast_video(run: Run) -> None:
    frames = group_frames([dancer(0)], 20, rate_fps=60)
    write_group_video(Path("fast.mp4"), frames, rate_fps=60)
    done = run("fast.mp4", "--fps", "60", "--json")
    assert json.loads(done.out)["frames"] == 20
    assert error_px("fast_pose", frames) < 2
    assert VideoReader(Path("fast_pose/pose.mp4")).info.rate == 60


def test_a_large_video(run: Run, scenes: dict[str, list[GroupFrame]]) -> None:
    large = np.stack([cv2.resize(frame, (2880, 2160)) for frame in pixels(scenes["one"][:3])])
    options = {"crf": "18", "preset": "ultrafast", "tune": "zerolatency"}
    write_media(Path("large.mp4"), large, rate=RATE, options=options)
    done = run("large.mp4", "--json")
    assert json.loads(done.out)["source_size"] == "2880x2160"
    found = arrays("large_pose")["keypoints"][:, :17, :2] / 22.5
    assert np.median(np.abs(found - exact_joints(scenes["one"][:3]))) < 2


def test_few_frames_are_in_memory_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "_FRAMES_IN_FLIGHT", 2)
    read, render = Source.read, Renderer.render
    rendered, most = 0, 0

    def counted_read(source: Source, index: int) -> Frames:
        nonlocal most
        if threading.current_thread() is not threading.main_thread():  # not the search for people
            most = max(most, index + 1 - rendered)
        return read(source, index)

    def slow_render(renderer: Renderer, seen: pose_folder.Seen) -> dict[str, Frames]:
        nonlocal rendered
        time.sleep(0.02)  # drawing is slower than anything else
        rendered += 1
        return render(renderer, seen)

    monkeypatch.setattr(Source, "read", counted_read)
    monkeypatch.setattr(Renderer, "render", slow_render)
    assert run("trio.mp4").code == 0
    assert rendered == 16
    assert 2 <= most <= 2 + 1 + 2 + 1  # read ahead, at work, waiting, being drawn


# --- videos that cannot be used ------------------------------------------------------------------


def test_no_video(refused: Refused) -> None:
    moving = "Give a video of a moving person."
    assert refused("no.mp4") == f"error: VIDEO no.mp4 does not exist. {moving}"
    Path("zero.mp4").touch()
    assert refused("zero.mp4") == f"error: VIDEO zero.mp4 is empty. {moving}"
    Path("folder").mkdir()
    assert refused("folder") == f"error: VIDEO folder is a folder. {moving}"
    Path("text.mp4").write_text("no video\n" * 50)
    for words in ((), ("--list-persons",), ("--dry-run",)):
        assert refused("text.mp4", *words) == (
            "error: VIDEO text.mp4 cannot be read as a video: Invalid data found when processing "
            "input. Give a file that plays, such as MP4, MOV, MKV or WebM."
        )
    write_media(Path("sound.m4a"), sound=tone_bursts(0.5, 44100), container_format="mp4")
    write_cover_sound(Path("song.mp3"), tone_bursts(0.5, 44100))
    for name in ("sound.m4a", "song.mp3"):
        assert refused(name) == f"error: VIDEO {name} has no video stream. Give a video file."
    whole = write_media(Path("index_last.mp4"), frames_of(".", "one"), options=SHARP)
    cut_file(whole, Path("half.mp4"), whole.stat().st_size // 2)
    assert refused("half.mp4") == (
        "error: VIDEO half.mp4 cannot be read as a video: Invalid data found when processing "
        "input. Give a file that plays, such as MP4, MOV, MKV or WebM."
    )


@pytest.mark.parametrize("name", ["torn", "scratched"])
def test_a_video_damaged_in_the_middle(run: Run, refused: Refused, name: str) -> None:
    """What comes before is kept, whether the damage shows in the index or only in the decoder.

    The latter once refused the whole video, and without saying which one.
    """
    assert run("whole.mp4", "--end", "0.8").code == 0
    done = run(f"{name}.mp4")
    assert (done.code, done.out) == (1, "")
    assert told(done)[-1] == (
        f"error: VIDEO {name}.mp4 is damaged at 0.800 s. The 10 frames before it are in "
        f"{name}_pose."
    )
    assert record(f"{name}_pose")["damaged_s"] == pytest.approx(0.8)
    assert record(f"{name}_pose")["num_frames"] == 10
    for kept in ("pose.mp4", "face.mp4", "keypoints.npz"):
        assert Path(f"{name}_pose", kept).read_bytes() == Path("whole_pose", kept).read_bytes()
    assert not Path(f"{name}_pose.run").exists()
    done = run(f"{name}.mp4", "--end", "0.4", "-o", "before")
    assert (done.code, told(done)) == (0, [])
    assert len(arrays("before")["flags"]) == 5
    done = run(f"{name}.mp4", "--list-persons")
    assert done.code == 0
    assert told(done) == [f"{name}.mp4 is damaged at 0.800 s: only the part before"]
    if name == "torn":
        assert refused("torn.mp4", "-o", "after", "--start", "0.8") == (
            "error: VIDEO torn.mp4 is damaged at 0.800 s. Convert the file anew, or use the part "
            "before it."
        )


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi"])
def test_a_recording_that_is_cut_off(
    run: Run, scenes: dict[str, list[GroupFrame]], suffix: str
) -> None:
    """Without a list of packets it passed for a shorter video."""
    kind = {"webm": KINDS["web.webm"], "avi": KINDS["camera.avi"]}.get(suffix, {"options": SHARP})
    whole = write_media(Path(f"film.{suffix}"), pixels(scenes["one"]), rate=RATE, **kind)
    _, position, size = packet_positions(whole)[9]
    cut_file(whole, Path(f"cut.{suffix}"), position + size // 2)
    done = run(f"cut.{suffix}")
    kept = record("cut_pose")["num_frames"]
    time_s = record("cut_pose")["damaged_s"]
    assert 7 <= kept <= 9
    assert time_s == pytest.approx(kept / RATE, abs=2e-3)
    assert (done.code, done.out) == (1, "")
    assert told(done) == [
        f"cut.{suffix} is damaged at {time_s:.3f} s: only the part before",
        f"error: VIDEO cut.{suffix} is damaged at {time_s:.3f} s. The {kept} frames before it are "
        "in cut_pose.",
    ]
    assert run(f"film.{suffix}", "--end", str(float(kept / RATE))).code == 0
    for name in ("pose.mp4", "face.mp4", "keypoints.npz"):
        assert Path("cut_pose", name).read_bytes() == Path("film_pose", name).read_bytes()


def test_a_damaged_video_stays_damaged_when_it_is_continued(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "join_segments", interrupt)
        assert run("scratched.mp4").code == 130
    done = run("scratched.mp4")
    assert (done.code, told(done)[-1]) == (
        1,
        "error: VIDEO scratched.mp4 is damaged at 0.800 s. The 10 frames before it are in "
        "scratched_pose.",
    )


def test_a_video_damaged_at_once(refused: Refused) -> None:
    assert refused("headless.mp4") == (
        "error: VIDEO headless.mp4 is damaged at 0.000 s. Convert the file anew, or use the part "
        "before it."
    )


# --- options -------------------------------------------------------------------------------------


def test_parts_and_rates_that_do_not_exist(refused: Refused, run: Run) -> None:
    assert refused("one.mp4", "--start", "2") == (
        "error: --start 2 s is not within one.mp4, which lasts 0.960 s. Give an earlier time."
    )
    assert refused("one.mp4", "--start", "0.5", "--end", "0.5") == (
        "error: --end 0.5 is not after --start 0.5."
    )
    assert refused("one.mp4", "--end", "0") == (
        "error: --end 0.0 is too small. Give a number above 0."
    )
    assert refused("one.mp4", "--fps", "0") == (
        "error: --fps 0.0 is too small. Give a number above 0."
    )
    assert refused("one.mp4", "--fps", "5000") == (
        "error: --fps 5000: frame rate 5000 is out of range. Use 0.001 to 1000."
    )
    # An end behind the video's is its end.
    assert run("one.mp4", "--start", "0.48", "--end", "9").code == 0
    assert len(arrays("one_pose")["flags"]) == 6


@pytest.mark.parametrize(("rate_fps", "num_frames"), [(25.0, 24), (5.0, 4)])
def test_other_rates(
    run: Run, scenes: dict[str, list[GroupFrame]], rate_fps: float, num_frames: int
) -> None:
    done = run("one.mp4", "--fps", str(rate_fps), "--no-smooth", "--json")
    assert json.loads(done.out)["frames"] == num_frames
    assert VideoReader(Path("one_pose/face.mp4")).info.rate == rate_fps
    # Of two frames equally near the even one counts.
    nearest = np.round(np.arange(num_frames) / rate_fps * FPS).astype(int).clip(max=11)
    assert error_px("one_pose", [scenes["one"][index] for index in nearest]) < 2


def test_sizes_that_cannot_be_made(refused: Refused) -> None:
    assert refused("one.mp4", "--size", "100x64") == (
        "error: --size 100x64 is not a multiple of 16 on both sides. Give 96x64 or 112x64."
    )
    assert refused("one.mp4", "--size", "wide") == (
        "error: --size wide is not a size. Write WIDTHxHEIGHT (832x480) or auto."
    )
    assert refused("one.mp4", "--face-size", "33") == (
        "error: --face-size 33: video size 33x33 cannot be encoded. Use an even width and height."
    )


def test_a_threshold_of_zero_draws_everything(run: Run) -> None:
    """It was divided by."""
    words = ("--body-threshold", "0", "--hand-threshold", "0", "--face-threshold", "0")
    assert run("one.mp4", *words, "--lossless").code == 0
    hands = frames_of("one_pose", "pose")
    assert run("one.mp4", "--overwrite", "--lossless").code == 0
    assert (hands > 40).sum() > (frames_of("one_pose", "pose") > 40).sum()


def test_the_native_drawing_is_drawn_and_then_fitted(run: Run) -> None:
    words = ("--draw-mode", "native", "--lossless", "--no-smooth")
    assert run("one.mp4", *words).code == 0
    frames = frames_of("one_pose", "pose").astype(int)
    for frame, keypoints in zip(frames, arrays("one_pose")["keypoints"], strict=True):
        drawn = skeleton.letterbox_frame(skeleton.draw_pose(keypoints, 96, 128), (64, 96))
        assert (np.abs(frame - drawn) > 4).mean() < 1e-3  # float32 keypoints may cut another pixel
    assert run("one.mp4", "--overwrite", "--lossless", "--no-smooth").code == 0
    assert np.abs(frames_of("one_pose", "pose") - frames).max() > 100


def test_lossless_frames_are_the_drawing(run: Run) -> None:
    assert run("one.mp4", "--lossless").code == 0
    values = arrays("one_pose")
    source = frames_of(".", "one")
    poses, faces = frames_of("one_pose", "pose"), frames_of("one_pose", "face")
    for index in range(12):
        moved = fit_points(values["keypoints"][index], (96, 128), (64, 96), "contain")
        difference = np.abs(poses[index].astype(int) - skeleton.draw_pose(moved, 64, 96))
        assert (difference > 4).mean() < 1e-3
        box = tuple(values["face_boxes"][index].tolist())
        face = skeleton.crop_face(source[index], box, 32)
        assert np.abs(faces[index].astype(int) - face).mean() < 3  # another conversion to RGB


def test_pictures_of_the_character(run: Run) -> None:
    write_media(Path("single.mp4"), frames_of(".", "one")[:1], rate=RATE, options=SHARP)
    upright = ToyScene(1_000_002, 3, height=120, width=60).reference()

    def stored(name: str) -> Frames:
        assert run("single.mp4", "--reference", name, "--overwrite").code == 0
        return np.asarray(Image.open("single_pose/reference.png"))

    expected = fit_frame(upright, 64, 96, "contain")
    Image.fromarray(upright).save("plain.png")
    np.testing.assert_array_equal(stored("plain.png"), expected)
    # Lying, with the remark that it is to be turned.
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    lying.save("phone.png", exif=exif)
    np.testing.assert_array_equal(stored("phone.png"), expected)
    alpha = np.full((120, 60, 1), 255, np.uint8)
    alpha[:, :30] = 0
    Image.fromarray(np.concatenate([upright, alpha], axis=2)).save("cut.png")
    half = stored("cut.png")
    assert half[:, :47].max() == 0
    np.testing.assert_array_equal(half[:, 49:], expected[:, 49:])
    grey = Image.fromarray(upright).convert("L")
    grey.save("grey.png")
    three = fit_frame(np.repeat(np.asarray(grey)[..., None], 3, axis=2), 64, 96, "contain")
    np.testing.assert_array_equal(stored("grey.png"), three)


# --- a pose model out of order -------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Arrays], None]], None]:
    """Changes what the pose model finds."""
    load = pose_models.load_models

    class Spoilt:
        """The toy pose model with a fault."""

        def __init__(self, estimator: object, change: Callable[[npt.NDArray], None]) -> None:
            self._estimator, self._change = estimator, change

        def __getattr__(self, name: str) -> object:
            return getattr(self._estimator, name)

        def estimate(self, frame_u8: Frames, boxes: npt.NDArray) -> npt.NDArray:
            keypoints = self._estimator.estimate(frame_u8, boxes).copy()
            self._change(keypoints)
            return keypoints

    def spoil_with(change: Callable[[npt.NDArray], None]) -> None:
        def load_spoilt(*args: object, **options: object) -> pose_models.PoseModels:
            models = load(*args, **options)
            object.__setattr__(models, "estimator", Spoilt(models.estimator, change))
            return models

        monkeypatch.setattr(pose_models, "load_models", load_spoilt)

    return spoil_with


def test_numbers_that_are_none_count_as_unseen(run: Run, spoil: Callable) -> None:
    """One bad landmark once made the whole face black, and one bad joint the score of a frame."""
    assert run("one.mp4", "--lossless", "--no-smooth", "-o", "good").code == 0

    def change(keypoints: npt.NDArray) -> None:
        keypoints[:, 9, 0] = np.inf  # left wrist
        keypoints[:, 14, 2] = np.nan  # right knee
        keypoints[:, 60] = -np.inf  # inside the mouth
        keypoints[:, 92:112] = np.nan

    spoil(change)
    done = run("one.mp4", "--lossless", "--no-smooth", "--preview")
    assert (done.code, told(done)) == (0, [])
    good, bad = arrays("good"), arrays("one_pose")
    assert (bad["keypoints"][:, [9, 14, 60, 100], 2] == 0).all()
    assert np.isnan(bad["keypoints"][:, [9, 14, 60, 100], :2]).all()
    fine = [row for row in range(133) if row not in (9, 14, 60, *range(92, 112))]
    moved_px = np.abs(bad["keypoints"][:, fine] - good["keypoints"][:, fine])
    assert np.median(moved_px) < 0.1
    assert moved_px.max() < 6  # the box of the next frame lacks those joints
    assert (bad["flags"] == 0).all()
    assert min(record("one_pose")["scores"]) > 0.5
    for frame, keypoints in zip(frames_of("one_pose", "pose"), bad["keypoints"], strict=True):
        moved = fit_points(keypoints, (96, 128), (64, 96), "contain")
        difference = np.abs(frame.astype(int) - skeleton.draw_pose(moved, 64, 96))
        assert (difference > 4).mean() < 1e-3


def test_a_pose_model_that_finds_nobody(refused: Refused, spoil: Callable) -> None:
    """It once gave a folder of black frames."""

    def change(keypoints: npt.NDArray) -> None:
        keypoints[:] = np.nan

    spoil(change)
    message = (
        "error: VIDEO one.mp4 shows nobody whose pose --pose-model toy recognizes. Give a video "
        "of a person, another part of it (--start), or another --pose-model."
    )
    assert refused("one.mp4") == message
    Image.fromarray(ToyScene(1_000_004, 3, height=128, width=128).reference()).save("anna.png")
    assert refused("one.mp4", "--retarget", "anna.png") == message


def test_a_pose_model_that_sees_people_in_empty_rooms(run: Run) -> None:
    """The toy model does, and was believed for up to a second after somebody had gone."""
    for room in (20, 23, 27):
        path = absent([CENTRE], (0.47, 1.11))
        frames = group_frames([dancer(1, *path)], 22, room=room)
        write_group_video(Path("gone.mp4"), frames)
        assert run("gone.mp4", "--max-gap", "0", "--overwrite").code == 0
        assert missing("gone_pose") == "pppppp........pppppppp"


# --- the folder and interruptions ----------------------------------------------------------------


def test_places_that_cannot_take_a_folder(
    run: Run, refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("mine")
    assert refused("one.mp4", "-o", "file") == "error: --output file is a file. Give a folder."
    Path("link").symlink_to("nowhere")
    assert refused("one.mp4", "-o", "link") == "error: --output link is a file. Give a folder."
    assert refused("one.mp4", "-o", "no/where") == (
        "error: --output no/where cannot be made: the folder no does not exist. "
        "Make it first, or give another path."
    )
    for name in (".", ".."):
        assert refused("one.mp4", "-o", name) == (
            f"error: --output {name} has no name. Give the name of a folder to make."
        )
    long = "x" * 252
    assert refused("one.mp4", "-o", long) == (
        f"error: --output {long} has too long a name. Give a shorter one."
    )
    Path("blocked.run").write_text("mine")
    assert refused("one.mp4", "-o", "blocked") == (
        "error: --output blocked needs a folder blocked.run beside it, but that is a file. "
        "Give another name."
    )
    assert refused("one.mp4", "-o", "dance.mp4") == (
        "error: --output dance.mp4 is to be a folder. Give a name without .mp4."
    )
    Path("clips").mkdir()
    Path("clips/pose.mp4").write_bytes(Path("one.mp4").read_bytes())
    assert refused("clips/pose.mp4", "-o", "clips", "--overwrite") == (
        "error: --output clips would replace clips/pose.mp4, which is also an input. "
        "Give another folder."
    )
    Path("locked").mkdir()

    def is_open(path: str | Path, mode: int) -> bool:
        return Path(path).name != "locked" or not mode & os.W_OK

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", is_open)
        for name in ("locked/dance", "locked"):
            assert refused("one.mp4", "-o", name) == (
                f"error: --output {name} cannot be written: the folder locked is not writable. "
                "Give another path."
            )
    # Other things in a folder do not matter, and stay.
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    assert run("one.mp4", "-o", "notes", "--end", "0.3").code == 0
    assert refused("one.mp4", "-o", "notes") == (
        "error: --output notes holds keypoints.npz. Add --overwrite to replace it, or give "
        "another folder."
    )
    assert run("one.mp4", "-o", "notes", "--end", "0.2", "--overwrite").code == 0
    assert Path("notes/mine.txt").read_text() == "mine"
    assert place.joinpath("notes.run").exists() is False


def test_a_second_process_is_refused(refused: Refused) -> None:
    with ExtractFolder(Path("one_pose.run")).hold() as is_ours:
        assert is_ours
        assert refused("one.mp4") == (
            "error: --output one_pose is being made by another process. "
            "Wait for it, or give another --output."
        )


STOPS = {
    "drawing": (Renderer, "render"),
    "joining": (extract, "join_segments"),
    "writing the reference": (extract, "write_png"),
    "publishing": (pose_folder, "publish"),
    "removing": (ExtractFolder, "remove"),
}


@pytest.mark.parametrize("where", list(STOPS))
def test_an_interruption_anywhere_leaves_nothing_that_looks_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch, where: str, scenes: dict[str, list[GroupFrame]]
) -> None:
    monkeypatch.setattr(extract, "SEGMENT_FRAMES", 5)
    Image.fromarray(scenes["one"][0].rgb).save("anna.png")
    words = ("--reference", "anna.png")
    assert run("one.mp4", *words, "-o", "whole").code == 0
    owner, name = STOPS[where]
    original, calls = getattr(owner, name), 0

    def interrupt(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        # In the middle: of the fourth frame, between the files of the folder.
        if calls == {"drawing": 8, "publishing": 3}.get(where, 1):
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        done = run("one.mp4", *words)
    assert (done.code, done.out) == (130, "")
    assert told(done)[-1] == "interrupted. Run the same command again to continue."
    if where != "removing":
        assert not Path("one_pose/extract.json").exists()
        assert main(["animate", "anna.png", "one_pose", "--model", "toy", "--quiet"]) == 2
    assert run("one.mp4", *words).code == 0
    for file in ("pose.mp4", "face.mp4", "keypoints.npz", "reference.png"):
        assert Path("one_pose", file).read_bytes() == Path("whole", file).read_bytes()
    assert not Path("one_pose.run").exists()


@pytest.mark.parametrize("stopped_at", [6, 10, 17, 24])
def test_an_interruption_in_a_gap_changes_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """Segments end only where no frame waits, and all that later frames need is restored."""
    monkeypatch.setattr(extract, "SEGMENT_FRAMES", 3)
    words = ("--face-smooth", "--preview", "--detect-every", "4")
    assert run("gaps.mp4", *words, "-o", "whole").code == 0
    read = Source.read

    def interrupt(source: Source, index: int) -> Frames:
        if index == stopped_at and threading.current_thread() is not threading.main_thread():
            raise KeyboardInterrupt
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", interrupt)
        assert run("gaps.mp4", *words).code == 130
    assert ExtractFolder(Path("gaps_pose.run")).count_finished() >= 1
    assert run("gaps.mp4", *words).code == 0
    for file in ("pose.mp4", "face.mp4", "preview.mp4", "keypoints.npz"):
        assert Path("gaps_pose", file).read_bytes() == Path("whole", file).read_bytes()


def test_a_full_disk_keeps_what_is_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "SEGMENT_FRAMES", 5)
    fsync, num_writes, last_write = os.fsync, 0, 10**9

    def write(file: int) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes > last_write:
            raise OSError(errno.ENOSPC, "No space left on device", "disk")
        fsync(file)

    monkeypatch.setattr(os, "fsync", write)
    assert run("one.mp4", "-o", "whole").code == 0
    total = num_writes
    for stop in (0, 5, total // 2, total - 3):
        folder = f"stopped{stop}"
        num_writes, last_write = 0, stop
        done = run("one.mp4", "-o", folder)
        assert (done.code, done.out) == (1, "")
        assert told(done)[-1] == (
            "error: disk full: [Errno 28] No space left on device: 'disk'. Free some space, then "
            "run the same command again to continue."
        )
        assert not Path(folder, "extract.json").exists()
        last_write = 10**9
        assert run("one.mp4", "-o", folder).code == 0
        for file in ("pose.mp4", "face.mp4", "keypoints.npz"):
            assert Path(folder, file).read_bytes() == Path("whole", file).read_bytes()


@pytest.fixture
def unfinished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extraction of one.mp4 that was stopped near its end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "SEGMENT_FRAMES", 5)
        patch.setattr(extract, "join_segments", interrupt)
        assert run("one.mp4").code == 130


@pytest.mark.usefixtures("unfinished")
def test_another_video_under_the_same_name_is_not_continued(run: Run, refused: Refused) -> None:
    Path("one.mp4").unlink()
    Path("one.mp4").write_bytes(Path("late.mp4").read_bytes())
    assert refused("one.mp4") == (
        "error: --output one_pose has a run folder of another request: VIDEO has another content. "
        "Give the same options to continue it, another --output, or --no-resume to start again."
    )
    assert run("one.mp4", "--no-resume").code == 0
    assert len(arrays("one_pose")["flags"]) == 16


@pytest.mark.usefixtures("unfinished")
def test_damaged_segments_are_named(run: Run) -> None:
    Path("one_pose.run/00002.npz").write_bytes(b"PK")
    done = run("one.mp4")
    assert done.code == 1
    assert told(done)[-1].startswith("error: one_pose.run/00002.npz is damaged (")
    assert told(done)[-1].endswith("). Start again with --no-resume.")


@pytest.mark.usefixtures("unfinished")
def test_unfinished_extractions_are_listed_and_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("one_pose.run/mine.txt").write_text("mine")
    capsys.readouterr()
    assert main(["runs"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("one_pose.run: 3 segments, 0.")
    assert line.endswith(" MiB, 0 min old\n")
    assert main(["runs", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["path"], entry["output"], entry["segments"]) == ("one_pose.run", "one_pose", 3)
    assert main(["runs", "--remove"]) == 0
    assert capsys.readouterr().out.endswith(", removed\n")
    assert [path.name for path in Path("one_pose.run").iterdir()] == ["mine.txt"]


# --- what is told --------------------------------------------------------------------------------


def test_quiet_and_json(run: Run) -> None:
    done = run("gaps.mp4", "--quiet")
    assert (done.code, done.out, done.err) == (0, "gaps_pose\n", "")
    done = run("gaps.mp4", "--quiet", "--json", "--overwrite")
    facts = json.loads(done.out)
    assert done.err == ""
    assert facts.pop("timings")["total_s"] > 0
    assert facts.pop("networks_s") > 0
    assert 10 < facts.pop("detector_calls") < 60
    assert facts == {
        "output": "gaps_pose",
        "frames": 25,
        "seconds": 2.0,
        "fps": 12.5,
        "size": "96x64",
        "source_size": "128x96",
        "pose_model": "toy",
        "people": 1,
        "frames_without_person": 8,
        "frames_filled": 2,
        "frames_without_face": 8,
        "gaps": [[0.96, 1.6]],
        "switches": 0,
    }


def test_progress_in_a_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LINE_PERIOD_S", 0.0)
    lines = run("one.mp4").err.splitlines()
    assert [line.split(" frames, ")[0] for line in lines] == [
        f"poses: {done}/12" for done in range(1, 13)
    ]
    assert all(" frames/s, 0:" in line and line.endswith(" left") for line in lines[:-1])
    assert lines[-1].endswith(" frames/s")
    lines = run("one.mp4", "--list-persons").err.splitlines()
    assert lines[-1].startswith("persons: 12/12 frames, ")
    assert len(lines) == len(set(lines)) == 7  # every second frame, and the end


def test_progress_on_a_terminal() -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, legacy_windows=False)
    settings = ExtractSettings(
        video=Path("one.mp4"), pose_model="toy", threads=1, fps=FPS, size="96x64", face_size=32
    )
    with console.show_progress(console=terminal) as on_event:
        extract.extract(settings, on_event)
    last = [line for line in screen.getvalue().splitlines() if "poses" in line][-1]
    assert "12/12" in last
    assert "frames/s" in last
    assert "0:00:0" in last  # the time left, and in the end the time taken
