"""Datasets of small videos whose frames tell their number."""

import gc
import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dances import write_dance_video
from media import Frames, cut_file, frame_numbers, numbered_frames, write_media
from studio import dance_frames, dance_numbers

from everanimate_cli import extract, training_clips
from everanimate_cli import video as video_module
from everanimate_cli.errors import InputError, RunError, SettingsError, WeightsError
from everanimate_cli.events import Event, Note
from everanimate_cli.settings import HUB_PRESET, ExtractSettings
from everanimate_cli.train_settings import ResolvedTrainSettings, TrainSettings, resolve_training
from everanimate_cli.training_clips import (
    ClipFrames,
    ClipSet,
    TrainingClip,
    needed_frames,
    open_clips,
)
from everanimate_cli.video import VideoReader

FACE = 16
NEEDED = 14  # for chunks of 5 frames


@dataclass
class Studio:
    """A folder of clips, and what opening it told."""

    folder: Path
    events: list[Event] = field(default_factory=list)

    def settings(self, dataset: str = ".", **options: Any) -> ResolvedTrainSettings:
        values = {"fps": 10.0, "size": "48x32", "frames_per_chunk": 5, "pose_model": "toy"}
        path = self.folder / dataset
        return resolve_training(TrainSettings(dataset=path, **(values | options)), HUB_PRESET)

    def open(self, dataset: str = ".", **options: Any) -> ClipSet:
        self.events.clear()
        return open_clips(self.settings(dataset, **options), FACE, self.events.append)

    def clip(self, dataset: str = ".", **options: Any) -> TrainingClip:
        clips = self.open(dataset, **options)
        assert (len(clips.clips), clips.rejected) == (1, [])
        return clips.clips[0]

    def reason(self, dataset: str = ".", **options: Any) -> str:
        """Why the only clip is not used."""
        with pytest.raises(InputError):
            self.open(dataset, **options)
        (note,) = [text for text in self.notes if " is not used: " in text]
        return note.partition(" is not used: ")[2]

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Note)]

    def manifest(self, *rows: dict[str, object]) -> str:
        text = "\n".join(json.dumps(row) for row in rows)
        (self.folder / "list.jsonl").write_text(text)
        return "list.jsonl"

    def video(
        self, name: str, num_frames: int = 60, rate: Fraction | int = 10, **media: Any
    ) -> Path:
        """A video of frames 0, 1, 2 ..."""
        path = self.folder / name
        return write_media(path, numbered_frames(num_frames), rate=rate, **media)

    def poses(self, name: str, numbers: Sequence[int], *, video: Path, **record: Any) -> Path:
        """What extract-pose would make of these frames of a video."""
        folder = self.folder / name
        folder.mkdir()
        record = {"start_s": 0.0, "fps": 10.0, "num_frames": len(numbers), **record}
        rate = Fraction(record["fps"])
        write_media(folder / "pose.mp4", shown(numbers), rate=rate)
        write_media(folder / "face.mp4", shown(numbers, FACE), rate=rate)
        record["source"] = str(video)
        record["source_sha256"] = hashlib.sha256(video.read_bytes()).hexdigest()
        (folder / "extract.json").write_text(json.dumps(record))
        return folder

    def edit_record(self, folder: str, **changes: object) -> None:
        path = self.folder / folder / "extract.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    folder = tmp_path / "clips"
    folder.mkdir()
    return Studio(folder)


def shown(numbers: Sequence[int], side: int | None = None) -> Frames:
    """Frames with these numbers, [S, 32, 48, 3] or square."""
    frames = numbered_frames(60) if side is None else numbered_frames(60, side, side)
    return frames[list(numbers)]


def numbers_of(frames: ClipFrames) -> tuple[list[int], list[int], list[int]]:
    return (
        frame_numbers(frames.rgb_u8),
        frame_numbers(frames.pose_u8),
        frame_numbers(frames.face_u8),
    )


def test_needed_frames() -> None:
    assert needed_frames(77) == 158
    assert needed_frames(5) == NEEDED


# --- alignment -----------------------------------------------------------------------------------


def test_a_clip_is_read_frame_by_frame(studio: Studio) -> None:
    video = studio.video("a.mp4")
    studio.poses("a_pose", range(60), video=video)
    (studio.folder / "a.txt").write_text("a dance")
    clip = studio.clip()
    assert (clip.label, clip.prompt, clip.num_frames) == ("a.mp4", "a dance", 60)
    frames = clip.read(7, 14)
    assert frames.rgb_u8.shape == frames.pose_u8.shape == (14, 32, 48, 3)
    assert frames.face_u8.shape == (14, FACE, FACE, 3)
    assert numbers_of(frames) == (list(range(7, 21)),) * 3
    # At random places, backwards, and at the very end.
    for start in (46, 0, 30):
        assert numbers_of(clip.read(start, 14)) == (list(range(start, start + 14)),) * 3
    assert studio.notes == ["1 of 1 clips can be used"]


def test_what_is_not_in_the_clip_is_not_read(studio: Studio) -> None:
    studio.poses("a_pose", range(60), video=studio.video("a.mp4"))
    clip = studio.clip()
    assert len(clip.read(60, 0).rgb_u8) == 0
    for start, count in ((-1, 2), (59, 2), (5, -1)):
        with pytest.raises(IndexError, match=f"frames {start} to {start + count} of 60"):
            clip.read(start, count)


@pytest.mark.parametrize("fps", [5.0, 10.0])
def test_poses_that_begin_at_2_s_at_another_rate_are_aligned(studio: Studio, fps: float) -> None:
    """Poses 0, 1, 2 ... are of frames 20, 22, 24 ... of the video."""
    video = studio.video("a.mp4")
    studio.poses("a_pose", range(20, 60, 2), video=video, fps=5.0, start_s=2.0)
    clip = studio.clip(fps=fps)
    rgb, pose, face = numbers_of(clip.read(0, clip.num_frames))
    assert pose == face
    if fps == 5:
        assert rgb == pose == list(range(20, 60, 2))
    else:  # each pose twice, for the picture that it is of and one beside it
        assert rgb == list(range(20, 60))
        assert set(np.subtract(rgb, pose)) <= {-1, 0, 1}
        assert rgb[::2] == pose[::2]
    repeated = "1 clips have fewer poses per second than --fps 10, so that poses are repeated"
    assert (repeated in studio.notes) == (fps == 10)


def test_frames_exactly_between_two_fall_as_the_extraction_chose(studio: Studio) -> None:
    """A 10 fps video at 20 fps: every other time is as far from one frame as from the next."""
    video = studio.video("a.mp4")
    with VideoReader(video, rate=20, start_s=0.35) as reader:
        numbers = frame_numbers(reader.read(range(60)))
    studio.poses("a_pose", numbers, video=video, fps=20.0, start_s=0.35)
    for start in (0, 1.0, 0.95, 1.234):
        manifest = studio.manifest({"video": "a.mp4", "pose_folder": "a_pose", "start": start})
        rgb, pose, face = numbers_of(studio.clip(manifest, fps=20.0).read(0, 30))
        assert rgb == pose == face


def test_a_part_of_a_clip(studio: Studio) -> None:
    video = studio.video("a.mp4")
    studio.poses("poses", range(10, 60), video=video, start_s=1.0)
    row = {"video": "a.mp4", "pose_folder": "poses"}

    def read(**part: float) -> list[int]:
        clip = studio.clip(studio.manifest(row | part))
        rgb, pose, face = numbers_of(clip.read(0, clip.num_frames))
        assert rgb == pose == face
        return rgb

    assert read() == list(range(10, 60))
    assert read(start=0.5) == list(range(10, 60))  # the poses begin later
    assert read(start=2.0) == list(range(20, 60))
    assert read(start=2.01) == list(range(21, 60))  # nothing from before the begin
    assert read(start=2.0, end=4.0) == list(range(20, 40))
    assert read(end=4.05) == list(range(10, 40))
    assert read(end=400.0) == list(range(10, 60))


def test_pose_and_face_of_a_whole_video(studio: Studio) -> None:
    studio.video("a.mp4")
    folder = studio.poses("poses", range(60), video=studio.folder / "a.mp4")
    (folder / "extract.json").unlink()  # another program made them
    row = {"video": "a.mp4", "pose": "poses/pose.mp4", "face": "poses/face.mp4", "prompt": "hm"}
    clip = studio.clip(studio.manifest(row | {"start": 1.5, "end": 5}))
    assert (clip.label, clip.prompt) == ("a.mp4 from 1.5 s to 5 s", "hm")
    assert numbers_of(clip.read(0, clip.num_frames)) == (list(range(15, 50)),) * 3


def test_a_variable_rate(studio: Studio) -> None:
    """Frames 0-19 last 0.1 s each, frames 20-59 half of it: 4 s."""
    times = [100 * i for i in range(20)] + [2000 + 50 * i for i in range(40)]
    video = studio.video("a.mkv", times=times, time_base=Fraction(1, 1000))
    numbers = [*range(20), *range(20, 60, 2)]
    studio.poses("a_pose", numbers, video=video)
    clip = studio.clip()
    assert numbers_of(clip.read(0, clip.num_frames)) == (numbers,) * 3


def test_all_three_are_brought_to_their_sizes(studio: Studio) -> None:
    video = studio.video("a.mp4")
    folder = studio.poses("a_pose", range(60), video=video)
    write_media(folder / "face.mp4", numbered_frames(60, 32, 64), rate=10)
    bars = {"contain": True, "cover": False, "stretch": False}
    for fit, has_bars in bars.items():
        frames = studio.clip(size="64x32", fit=fit).read(40, 1)
        assert frames.rgb_u8.shape == frames.pose_u8.shape == (1, 32, 64, 3)
        for pixels in (frames.rgb_u8, frames.pose_u8):
            assert (pixels[0, 16, 2].max() < 8) == has_bars
            assert abs(int(pixels[0, 16, 32, 0]) - 162) < 4
        assert frames.face_u8.shape == (1, FACE, FACE, 3)
        assert frame_numbers(frames.face_u8) == [40]  # stretched, never with bars


# --- what cannot be used -------------------------------------------------------------------------


def test_poses_of_another_video(studio: Studio) -> None:
    """The hash counts for the video beside the poses, wherever the record says the source is."""
    video = studio.video("a.mp4")
    studio.poses("a_pose", range(60), video=video)
    other = video.rename(studio.folder.parent / "other.mp4")
    studio.video("a.mp4", options={"crf": "30"})
    reason = (
        f"{studio.folder / 'a_pose'} was made of another video, or the video has changed since. "
        "Run extract-pose on it again."
    )
    assert studio.reason() == reason
    studio.edit_record("a_pose", source=str(other))
    assert studio.reason() == reason


def test_a_folder_without_its_files(studio: Studio) -> None:
    studio.video("a.mp4")
    (studio.folder / "a_pose").mkdir()
    assert studio.reason() == (
        f"{studio.folder / 'a_pose'} has no pose.mp4 and no face.mp4 and no extract.json. "
        "Run extract-pose again."
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"source_sha256": None}, "/extract.json names no source_sha256."),
        ({"start_s": -1}, "/extract.json has an impossible start_s."),
        ({"start_s": float("nan")}, "/extract.json has an impossible start_s."),
        ({"fps": 0}, "/extract.json has an impossible fps."),
        ({"fps": True}, "/extract.json has an impossible fps."),
        ({"num_frames": "60"}, "/extract.json has an impossible num_frames."),
        ({"num_frames": 61}, " has 60 poses and its extract.json tells of 61."),
        ({"fps": 12.5}, " has poses at 10 fps and its extract.json tells of 12.5 fps."),
    ],
)
def test_records_that_cannot_be(studio: Studio, changes: dict[str, object], problem: str) -> None:
    studio.poses("a_pose", range(60), video=studio.video("a.mp4"))
    studio.edit_record("a_pose", **changes)
    assert studio.reason() == f"{studio.folder / 'a_pose'}{problem} Run extract-pose again."


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_records_that_are_no_json(studio: Studio, text: str) -> None:
    folder = studio.poses("a_pose", range(60), video=studio.video("a.mp4"))
    (folder / "extract.json").write_text(text, encoding="latin-1")
    assert studio.reason().startswith(f"{folder / 'extract.json'} cannot be read (")


def test_a_record_of_a_damaged_video(studio: Studio) -> None:
    """Its poses end before the damage; the same video is refused whoever extracted them."""
    video = studio.video("a.mp4")
    studio.poses("a_pose", range(40), video=video, damaged_s=4.0)
    assert studio.reason() == f"{video} is damaged at 4.000 s. Convert the file anew."


def test_lengths_that_differ(studio: Studio) -> None:
    studio.video("a.mp4")
    for count in (58, 59, 60):
        write_media(studio.folder / f"{count}.mp4", shown(range(count)), rate=10)
    whole = {"video": "a.mp4", "face": "60.mp4"}
    assert studio.clip(studio.manifest(whole | {"pose": "59.mp4"})).num_frames == 59
    # Also where the part in question has both.
    for part in ({}, {"end": 3.0}):
        manifest = studio.manifest(whole | {"pose": "58.mp4"} | part)
        assert studio.reason(manifest) == (
            "the video has 60 frames (6.00 s at 10 fps), pose has 58 frames (5.80 s at 10 fps), "
            "face has 60 frames (6.00 s at 10 fps). All must come from the same video and last as "
            "long as it."
        )


def test_a_folder_with_more_poses_than_the_video_has_frames(studio: Studio) -> None:
    video = studio.video("a.mp4", num_frames=50)
    folder = studio.poses("a_pose", range(40), video=video, start_s=1.0)
    assert studio.clip().num_frames == 40
    studio.edit_record("a_pose", start_s=1.3)
    assert studio.reason() == (
        "pose has 40 frames (4.00 s at 10 fps), face has 40 frames (4.00 s at 10 fps), "
        "the video has 37 frames (3.70 s at 10 fps). All must come from the same video and last "
        "as long as it."
    )
    studio.edit_record("a_pose", start_s=1.0)
    write_media(folder / "face.mp4", shown(range(30), FACE), rate=10)
    assert studio.reason().startswith("pose has 40 frames (4.00 s at 10 fps), face has 30 frames")


def test_too_short(studio: Studio) -> None:
    video = studio.video("a.mp4")
    studio.poses("poses", range(60), video=video)
    row = {"video": "a.mp4", "pose_folder": "poses", "start": 2.0}
    assert studio.clip(studio.manifest(row | {"end": 3.4})).num_frames == NEEDED
    problem = "it is too short: 13 frames (1.30 s at 10 fps), and 14 frames (1.40 s at 10 fps) "
    assert studio.reason(studio.manifest(row | {"end": 3.3})) == problem + "are needed."
    # A raw video is refused before its poses are extracted.
    raw = {"video": "a.mp4", "start": 2.0, "end": 3.3}
    assert studio.reason(studio.manifest(raw)) == problem + "are needed."
    late = studio.reason(studio.manifest(row | {"start": 7.0}))
    assert late.startswith("it is too short: 0 frames (0.00 s")


def test_bad_clips_are_told_and_counted(studio: Studio) -> None:
    for name in "bd":
        studio.poses(f"{name}_pose", range(60), video=studio.video(f"{name}.mp4"))
    (studio.folder / "a.mp4").write_bytes(b"no video")
    studio.poses("c_pose", range(9), video=studio.video("c.mp4", num_frames=9))
    clips = studio.open()
    assert [clip.label for clip in clips.clips] == ["b.mp4", "d.mp4"]
    assert [rejection.label for rejection in clips.rejected] == ["a.mp4", "c.mp4"]
    assert all(rejection.reason for rejection in clips.rejected)
    first, second, last = studio.notes
    assert first == f"a.mp4 is not used: {clips.rejected[0].reason}"
    assert "a.mp4 cannot be read as a video" in first
    assert second == (
        "c.mp4 is not used: it is too short: 9 frames (0.90 s at 10 fps), and 14 frames "
        "(1.40 s at 10 fps) are needed."
    )
    assert last == "2 of 4 clips can be used, 2 rejected"


def test_no_clip_can_be_used(studio: Studio) -> None:
    for name in "abcd":
        studio.video(f"{name}.mp4", num_frames=9)
    with pytest.raises(InputError) as caught:
        studio.open()
    reason = "it is too short: 9 frames (0.90 s at 10 fps), and 14 frames (1.40 s at 10 fps) are"
    reasons = " ".join(f"{name}.mp4: {reason} needed." for name in "abc")
    assert str(caught.value) == (
        f"DATASET {studio.folder}: none of 4 clips can be used. {reasons} And 1 more. A clip needs "
        "14 frames (1.40 s at 10 fps), as pictures, poses and faces."
    )


def test_files_that_are_missing_or_torn(studio: Studio) -> None:
    video = studio.video("whole.mp4", container_options={"movflags": "+faststart"})
    studio.poses("poses", range(60), video=video)
    cut_file(video, studio.folder / "torn.mp4", -700)
    rows = [
        {"video": "gone.mp4", "pose_folder": "poses"},
        {"video": "gone.mp4", "pose": "poses/pose.mp4", "face": "poses/face.mp4"},
        {"video": "whole.mp4", "pose": "gone.mp4", "face": "poses/face.mp4"},
        {"video": "whole.mp4", "pose_folder": "whole.mp4"},
        {"video": "torn.mp4"},
        {"video": "x" * 300 + ".mp4"},
        {"video": "whole.mp4", "pose_folder": "poses"},
    ]
    clips = studio.open(studio.manifest(*rows))
    assert [clip.label for clip in clips.clips] == ["whole.mp4"]
    reasons = [rejection.reason for rejection in clips.rejected]
    assert len(reasons) == 6
    ends = ("No such file or directory.", "does not exist. Give the path of a video file.") * 2
    assert reasons[0].endswith(ends[0])
    assert reasons[1].endswith(ends[1])
    assert reasons[2] == f"{studio.folder / 'gone.mp4'} {ends[1]}"
    assert reasons[3].startswith(f"{video} has no pose.mp4 and no face.mp4")
    assert "torn.mp4 is damaged at " in reasons[4]
    assert "File name too long" in reasons[5]


def test_an_impossible_rate_is_no_fault_of_the_clips(studio: Studio) -> None:
    studio.video("a.mp4")
    with pytest.raises(SettingsError, match=r"^--fps 2000: frame rate 2000 is out of range\."):
        studio.open(fps=2000.0)


# --- fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_follows_content_and_part_not_names(studio: Studio) -> None:
    video = studio.video("a.mp4")
    folder = studio.poses("a_pose", range(60), video=video)
    (studio.folder / "a.txt").write_text("one")
    first = studio.open()
    seen = {first.clips[0].fingerprint}
    video.rename(studio.folder / "b.mp4")
    folder.rename(studio.folder / "b_pose")
    (studio.folder / "a.txt").rename(studio.folder / "b.txt")
    moved = studio.open()
    assert {moved.clips[0].fingerprint} == seen
    assert moved.fingerprint == first.fingerprint
    (studio.folder / "b.txt").write_text("two")
    prompted = studio.open()
    assert {prompted.clips[0].fingerprint} == seen
    assert prompted.fingerprint != first.fingerprint
    row = {"video": "b.mp4", "pose_folder": "b_pose"}
    for part in ({"start": 1.0}, {"end": 5.0}):
        seen.add(studio.clip(studio.manifest(row | part)).fingerprint)
    seen.add(studio.clip(fps=5.0).fingerprint)
    for name in ("pose.mp4", "face.mp4"):
        frames = numbered_frames(60)[::-1]
        write_media(studio.folder / "b_pose" / name, frames, rate=10)
        seen.add(studio.clip().fingerprint)
    assert len(seen) == 6


# --- readers -------------------------------------------------------------------------------------


def is_open(reader: VideoReader) -> bool:
    return reader._decoder._container is not None


def test_few_files_are_open_and_few_time_stamps_known(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        studio.poses(f"{name}_pose", range(60), video=studio.video(f"{name}.mp4"))
    clips = studio.open().clips
    pool = clips[0].pool
    assert len(pool._readers) == 0
    monkeypatch.setattr(training_clips, "_NUM_KNOWN_FRAMES", 3 * 180)
    for clip in (*clips, *clips[:2]):
        assert numbers_of(clip.read(20, 3)) == ([20, 21, 22],) * 3
        assert sum(any(map(is_open, readers)) for readers in pool._readers.values()) <= 2
        assert len(pool._readers) <= 3
    assert list(pool._readers) == [clips[index].layout for index in (3, 0, 1)]
    pool.close()
    assert not pool._readers
    assert numbers_of(clips[0].read(5, 1)) == ([5],) * 3


def test_a_stretch_costs_the_frames_since_the_key_frame(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key frames at 0, 20 and 40; reading on costs nothing beside the frames themselves."""
    video = studio.video("a.mp4", options={"g": "20", "sc_threshold": "0", "bf": "0"})
    studio.poses("a_pose", range(60), video=video)
    clip = studio.clip()
    decoded = []
    timed = video_module._timed_frames

    def counted(packets: Any) -> Any:
        for item in timed(packets):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video_module, "_timed_frames", counted)
    with clip.layout.open_video() as reader:
        reader.read(range(45, 55))
        assert len(decoded) == 15
        reader.read(range(55, 60))
        assert len(decoded) == 20
        reader.read(range(25, 30))
        assert len(decoded) == 30


def read_in_child(clip: TrainingClip, start: int) -> tuple[list[int], list[int], list[int]]:
    numbers = numbers_of(clip.read(start, 5))
    gc.collect()
    return numbers


def fork_and_read(clip: TrainingClip, start: int) -> tuple[list[int], list[int], list[int]]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(read_in_child(clip, start)))
    child.start()
    assert receiver.poll(20)
    numbers = receiver.recv()
    child.join(20)
    assert child.exitcode == 0
    return numbers


def test_a_clip_that_is_being_read_travels_to_another_process(studio: Studio) -> None:
    studio.poses("a_pose", range(60), video=studio.video("a.mp4"))
    clips = studio.open()
    clip = clips.clips[0]
    clip.read(3, 4)
    copy = pickle.loads(pickle.dumps(clips)).clips[0]
    assert copy == clip
    assert not copy.pool._readers
    assert numbers_of(copy.read(30, 2)) == ([30, 31],) * 3
    # A forked process shares the position in an open file, and lacks the decoder's threads.
    assert fork_and_read(clip, 40) == (list(range(40, 45)),) * 3
    assert numbers_of(clip.read(7, 3)) == ([7, 8, 9],) * 3


def test_what_the_parent_has_dropped_is_left_alone_by_a_forked_process(studio: Studio) -> None:
    """The collector closed decoders there whose threads had stayed behind, and it crashed."""
    studio.poses("a_pose", range(60), video=studio.video("a.mp4"))
    clip, dropped = studio.open().clips[0], studio.open().clips[0]
    numbers_of(dropped.read(3, 4))
    gc.disable()
    try:
        loop: list[object] = [dropped]
        loop.append(loop)
        del loop, dropped
        assert fork_and_read(clip, 40) == (list(range(40, 45)),) * 3
    finally:
        gc.enable()


def test_threads_may_share_clips(studio: Studio) -> None:
    for name in "ab":
        studio.poses(f"{name}_pose", range(60), video=studio.video(f"{name}.mp4"))
    clips = studio.open().clips
    starts = [7, 40, 3, 22, 31, 50, 18, 0]
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(clips[i % 2].read, start, 5) for i, start in enumerate(starts)]
    for start, job in zip(starts, jobs, strict=True):
        assert numbers_of(job.result()) == (list(range(start, start + 5)),) * 3


def test_streams_of_unequal_length_cannot_be_handed_out() -> None:
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    with pytest.raises(AssertionError):
        ClipFrames(rgb_u8=frames, pose_u8=frames, face_u8=frames[:2])
    with pytest.raises(AssertionError):
        ClipFrames(rgb_u8=frames, pose_u8=frames[:2], face_u8=frames)


# --- raw videos ----------------------------------------------------------------------------------

RAW = {"fps": 12.5, "size": "64x48"}


@pytest.fixture(scope="module")
def dance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.2 s of a dance."""
    path = tmp_path_factory.mktemp("dance") / "dance.mp4"
    return write_dance_video(path, num_frames=15, height=96, width=96)


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that are extracted, without networks: the poses are pictures."""
    names: list[str] = []

    def pretend(settings: ExtractSettings, _on_event: object) -> None:
        assert settings.output is not None
        assert settings.height_width is not None
        names.append(settings.output.name)
        request = extract.make_request(settings, settings.height_width)
        with VideoReader(
            settings.video, rate=settings.fps, start_s=settings.start, end_s=settings.end
        ) as reader:
            frames = reader.read(range(len(reader)))
        settings.output.mkdir(exist_ok=True)
        for name in ("pose.mp4", "face.mp4"):
            write_media(settings.output / name, frames, rate=Fraction(settings.fps))
        record = {
            "source_sha256": request["VIDEO sha256"],
            "start_s": settings.start,
            "fps": settings.fps,
            "num_frames": len(frames),
            "request": request,
        }
        (settings.output / "extract.json").write_text(json.dumps(record))

    monkeypatch.setattr(training_clips, "extract", pretend)
    monkeypatch.setattr(training_clips, "load_models", lambda *_: None)
    return names


def test_raw_videos_are_extracted_once(
    studio: Studio, dance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (studio.folder / "a.mp4").symlink_to(dance)
    studio.video("b.mp4", num_frames=15)
    clips = studio.open(**RAW)
    assert [clip.label for clip in clips.clips] == ["a.mp4"]
    assert "shows nobody that the detector knows" in clips.rejected[0].reason
    assert "extracting the poses of a.mp4 (1 of 2)" in studio.notes
    assert "extracting the poses of b.mp4 (2 of 2)" in studio.notes
    assert studio.notes[-1] == "1 of 2 clips can be used, 1 rejected"
    poses = studio.folder.parent / "clips_poses"
    assert sorted(path.name for path in poses.iterdir()) == ["a_pose"]
    clip = clips.clips[0]
    assert clip.num_frames == 15
    frames = clip.read(0, 15)
    with VideoReader(poses / "a_pose" / "pose.mp4") as reader:
        assert np.array_equal(frames.pose_u8, reader.read(range(15)))
    assert frames.pose_u8.max() > 100
    assert frames.face_u8.shape == (15, FACE, FACE, 3)
    (studio.folder / "b.mp4").unlink()
    monkeypatch.delattr(training_clips, "extract")
    assert studio.clip(**RAW) == clip
    assert studio.notes == [
        "the poses of 1 raw videos are there already",
        "1 of 1 clips can be used",
    ]


def test_poses_that_were_made_otherwise(studio: Studio, dance: Path, extracted: list[str]) -> None:
    (studio.folder / "a.mp4").symlink_to(dance)
    studio.clip(**RAW)
    other = RAW | {"size": "48x48"}
    assert studio.reason(**other) == (
        f"--pose-folder {studio.folder.parent / 'clips_poses'} holds poses in a_pose that were "
        "made otherwise: --size was 64x48, is 48x48. Give another --pose-folder, or --overwrite to "
        "make them again."
    )
    assert studio.clip(**other, pose_folder=studio.folder.parent / "small").num_frames == 15
    assert studio.clip(**other, overwrite=True).read(0, 1).pose_u8.shape == (1, 48, 48, 3)
    assert extracted == ["a_pose"] * 3


def test_parts_and_equal_names_have_folders_of_their_own(
    studio: Studio, extracted: list[str]
) -> None:
    for name in ("x", "y"):
        (studio.folder / name).mkdir()
        frames = dance_frames(15, 32, 48)  # whose numbers survive being encoded twice
        write_media(studio.folder / name / "a.mp4", frames, rate=Fraction(25, 2))
    rows = [
        {"video": "x/a.mp4"},
        {"video": "y/a.mp4"},
        {"video": "x/a.mp4", "start": 0.04, "end": 1.16},
        {"video": "x/a.mp4", "start": 0.04, "end": 1.16, "prompt": "again"},
        {"video": "y/a.mp4", "start": 0.08},
    ]
    clips = studio.open(studio.manifest(*rows), fps=12.5).clips
    assert [clip.num_frames for clip in clips] == [15, 15, 14, 14, 14]
    marks = [hashlib.sha256(f"{name}/a.mp4".encode()).hexdigest()[:8] for name in "xy"]
    assert extracted == [
        f"a_{marks[0]}_pose",
        f"a_{marks[1]}_pose",
        "a_0.04s-1.16s_pose",
        "a_0.08s-end_pose",
    ]
    assert clips[2].fingerprint == clips[3].fingerprint
    for clip in clips:  # the pretended poses are the pictures
        frames = clip.read(0, clip.num_frames)
        numbers = dance_numbers(frames.rgb_u8)
        assert numbers == dance_numbers(frames.pose_u8) == dance_numbers(frames.face_u8)
        assert numbers[-1] == 14


def test_a_dry_run_extracts_nothing(studio: Studio, dance: Path, extracted: list[str]) -> None:
    (studio.folder / "a.mp4").symlink_to(dance)
    clips = studio.open(**RAW, dry_run=True)
    assert (clips.clips, clips.rejected, clips.pending) == ([], [], ["a.mp4"])
    assert studio.notes == ["1 of 1 clips can be used, 1 need their poses extracted first"]
    assert extracted == []
    assert sorted(path.name for path in studio.folder.parent.iterdir()) == ["clips"]


def test_what_is_wrong_with_every_extraction_is_an_error(studio: Studio, dance: Path) -> None:
    (studio.folder / "a.mp4").symlink_to(dance)
    with pytest.raises(SettingsError, match=r"^--pose-model toys is unknown\."):
        studio.open(**RAW | {"pose_model": "toys"})
    model = studio.folder / "model.onnx"
    model.write_bytes(b"no network")
    with pytest.raises(WeightsError):
        studio.open(**RAW | {"pose_model": str(model)})
    folder = studio.folder / "missing" / "poses"
    with pytest.raises(InputError, match=f"^--pose-folder {folder} cannot be made: No such file"):
        studio.open(**RAW, pose_folder=folder)


def test_a_pose_model_that_fails_stops_it_all(
    studio: Studio, dance: Path, extracted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where older poses lie: they are not those of this request."""

    def fail(*_: object) -> None:
        raise RunError("the pose model failed: out of memory.")

    (studio.folder / "a.mp4").symlink_to(dance)
    studio.clip(**RAW)
    assert extracted == ["a_pose"]
    monkeypatch.setattr(training_clips, "extract", fail)
    with pytest.raises(RunError, match="out of memory"):
        studio.open(**RAW | {"size": "48x48", "overwrite": True})


def test_a_second_process_at_the_same_poses(
    studio: Studio, dance: Path, extracted: list[str]
) -> None:
    """Going on without the clip would train on another dataset than the one given."""
    (studio.folder / "a.mp4").symlink_to(dance)
    poses = studio.folder.parent / "clips_poses"
    poses.mkdir()
    work = training_clips.ExtractFolder(poses / "a_pose.run")
    with work.hold(), pytest.raises(InputError) as caught:
        studio.open(**RAW)
    assert extracted == []
    assert str(caught.value) == (
        f"--pose-folder {poses}: another process is extracting a_pose. Wait for it, then run the "
        "same command again."
    )


@pytest.mark.usefixtures("extracted")
def test_a_video_that_is_found_damaged_while_it_is_extracted(
    studio: Studio, dance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run and the next one give the same clips."""
    for name in "ab":
        (studio.folder / f"{name}.mp4").write_bytes(dance.read_bytes())
    whole = training_clips.extract

    def extract_part(settings: ExtractSettings, on_event: Any) -> None:
        whole(settings, on_event)
        if settings.video.name == "a.mp4":
            studio.edit_record(f"../clips_poses/{settings.output.name}", damaged_s=1.1)
            raise RunError("VIDEO a.mp4 is damaged at 1.100 s.")

    monkeypatch.setattr(training_clips, "extract", extract_part)
    for _ in range(2):
        clips = studio.open(**RAW)
        assert [clip.label for clip in clips.clips] == ["b.mp4"]
        assert [item.reason for item in clips.rejected] == [
            f"{studio.folder / 'a.mp4'} is damaged at 1.100 s. Convert the file anew."
        ]


def test_one_video_with_the_settings_of_another_dataset(studio: Studio) -> None:
    """As a look at the training takes it."""
    studio.poses("a_pose", range(60), video=studio.video("a.mp4"))
    settings = replace(studio.settings(), dataset=studio.folder / "a.mp4")
    (clip,) = open_clips(settings, FACE, studio.events.append).clips
    assert clip.num_frames == 60
