"""A video that is to be measured, opened beside what it is compared with.

The truth and the driving poses are read at the video's rate, by their time stamps. What `animate`
saved beside a result tells where they begin, how the video goes on after the end of the driving,
and where its chunks join.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everanimate_cli.chunks import driving_index
from everanimate_cli.errors import InputError, MediaError, SettingsError
from everanimate_cli.eval_settings import BASELINE_S
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.frame_metrics import person_mask
from everanimate_cli.hashes import hash_file
from everanimate_cli.images import fit_frame
from everanimate_cli.preflight import settings_path
from everanimate_cli.records import read_json_object
from everanimate_cli.video import VideoReader

if TYPE_CHECKING:
    from fractions import Fraction

    from everanimate_cli.eval_manifest import EvalEntry
    from everanimate_cli.eval_settings import EvalSettings
    from everanimate_cli.metrics import Frame, Mask
    from everanimate_cli.settings import Extend, Fit

# Poses that run backwards are decoded from a key frame on, once per block.
_BLOCK_FRAMES = 64
_BLOCK_BYTES = 2**25
_NOTHING_DRAWN = 2
_SAME_RATE = 1e-3  # [frames/s]
# "none" is not among them: then the driving is taken as long as the video.
_EXTENDS: Mapping[str, Extend] = {"pingpong": "pingpong", "loop": "loop", "hold": "hold"}


@dataclass(frozen=True, kw_only=True)
class Extension:
    """How a video goes on after the end of its driving.

    Attributes:
        num_frames: Of the driving, at the rate of the video.
        extend: In which order the frames of the driving come again.
    """

    num_frames: int
    extend: Extend


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One video, opened, with what it is compared with.

    Attributes:
        entry: As listed.
        made: The video at its own rate.
        truth: At the rate of the video and brought to its size.
        poses: The driving poses, likewise at the rate of the video.
        start_s: Where its first frame lies in the driving [s].
        truth_start_s: Where it lies in the truth [s].
        extension: How it goes on after the end of the driving; None if it does not.
        fit: How the driving poses were brought into its frame.
        joins: Frames at which a new chunk begins; None if that is not known.
        baseline_frames: Frames at the start that drift is measured against.
    """

    entry: EvalEntry
    made: VideoReader
    truth: VideoReader | None
    poses: VideoReader | None
    start_s: float
    truth_start_s: float
    extension: Extension | None
    fit: Fit
    joins: tuple[int, ...] | None
    baseline_frames: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video."""
        return self.made.info.height, self.made.info.width

    @property
    def num_frames(self) -> int:
        """Length of the video."""
        return len(self.made)

    @property
    def compared_frames(self) -> int:
        """How many of its frames have a truth: none after the end of the driving."""
        if self.truth is None:
            return 0
        count = min(len(self.made), len(self.truth))
        return count if self.extension is None else min(count, self.extension.num_frames)

    def driving_at(self, index: int) -> int:
        """Which frame of the driving a frame of the video follows; it may lie behind the end."""
        if self.extension is None:
            return index
        return driving_index(index, self.extension.num_frames, self.extension.extend)

    def close(self) -> None:
        """Close all files; they open again when they are read."""
        for reader in (self.made, self.truth, self.poses):
            if reader is not None:
                reader.close()


class PersonMasks:
    """Where the person may be in each frame of a video, read in order from its driving poses."""

    def __init__(self, subject: Subject) -> None:
        """Take a video that has driving poses."""
        assert subject.poses is not None
        self._subject, self._poses = subject, subject.poses
        height, width = subject.size
        self._length = max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // (height * width)))
        self._first = 0
        self._block: Sequence[Mask | None] = ()

    def read(self, indices: range) -> list[Mask | None]:
        """[H, W] of each frame, None where no pose is drawn or known."""
        found = []
        for index in indices:
            if not self._first <= index < self._first + len(self._block):
                self._first, self._block = index, self._read_block(index)
            found.append(self._block[index - self._first])
        return found

    def _read_block(self, first: int) -> list[Mask | None]:
        stop = min(first + self._length, self._subject.num_frames)
        follows = [self._subject.driving_at(index) for index in range(first, stop)]
        frames = iter(self._poses.read([each for each in follows if each < len(self._poses)]))
        masks: list[Mask | None] = []
        for number in follows:
            coded = next(frames) if number < len(self._poses) else None
            is_known = coded is not None and coded[0, 0] != _NOTHING_DRAWN
            masks.append(coded.astype(np.bool_) if coded is not None and is_known else None)
        return masks


def open_subject(entry: EvalEntry, settings: EvalSettings, on_event: OnEvent) -> Subject:
    """Open a video with its company, and tell what does not match.

    Args:
        entry: What belongs together.
        settings: Checked options.
        on_event: Told of other rates and lengths.

    Raises:
        InputError: If the truth has another size and may not be resized.
        MediaError: If a file is no video, or damaged.
        SettingsError: If the truth ends before it begins.
    """
    label = entry.name
    made = _open("GENERATED", entry.generated)
    saved = read_result_record(entry.generated)
    record = _part(saved, "effective")
    start_s = truth_start_s = entry.start
    if start_s is None or truth_start_s is None:
        start_s = _number(record, "start") or 0.0
        truth_start_s = start_s + _extraction_start_s(entry, record)
        beside = settings_path(entry.generated).name
        for what, path, from_s in (
            ("the truth", entry.truth, truth_start_s),
            ("the driving", entry.driving, start_s),
        ):
            if path is not None and from_s:
                on_event(Note(text=f"{label}: {what} from {from_s:g} s on, as {beside} says"))
    fit = _fit(record)
    truth = poses = None
    if entry.truth is not None:
        truth = _open_truth(entry.truth, made, truth_start_s, settings, label)
        if truth.info.rate != made.rate:
            on_event(
                Note(
                    text=f"{label}: the truth has {float(truth.info.rate):g} frames/s, "
                    f"compared at {float(made.rate):g} by time stamps"
                )
            )
    if entry.driving is not None:
        poses = _open_poses(entry.driving / "pose.mp4", made, start_s, fit)
    extension = _extension(entry, saved, made, poses)
    for what, other in (("truth", truth), ("driving pose", poses)):
        if other is not None:
            _note_length(label, what, made, other, extension, on_event)
    joins = _chunk_joins(record, entry, len(made))
    baseline = settings.baseline
    if baseline is None and joins:
        baseline_frames = joins[0]
    else:
        seconds = BASELINE_S if baseline is None else baseline
        baseline_frames = max(1, round(seconds * float(made.rate)))
    return Subject(
        entry=entry,
        made=made,
        truth=truth,
        poses=poses,
        start_s=start_s,
        truth_start_s=truth_start_s,
        extension=extension,
        fit=fit,
        joins=joins,
        baseline_frames=baseline_frames,
    )


def _open(
    label: str,
    path: Path,
    *,
    rate: Fraction | None = None,
    start_s: float | None = None,
    transform: Callable[[Frame], Frame] | None = None,
) -> VideoReader:
    try:
        return VideoReader(path, rate=rate, start_s=start_s, transform=transform)
    except MediaError as error:
        raise MediaError(f"{label} {error}") from error
    except SettingsError as error:
        raise SettingsError(f"{label}: {error}") from error


def _open_truth(
    path: Path, made: VideoReader, start_s: float, settings: EvalSettings, label: str
) -> VideoReader:
    height, width = made.info.height, made.info.width

    def fitted(frame_u8: Frame) -> Frame:
        return fit_frame(frame_u8, height, width, settings.resize or "contain")

    truth = _open("--truth", path, rate=made.rate, start_s=start_s, transform=fitted)
    if (truth.info.height, truth.info.width) != (height, width) and settings.resize is None:
        raise InputError(
            f"--truth {path} is {truth.info.width}x{truth.info.height}, but {label} is "
            f"{width}x{height}. Add --resize contain, cover or stretch to bring the truth to that "
            "size."
        )
    return truth


def _open_poses(path: Path, made: VideoReader, start_s: float, fit: Fit) -> VideoReader:
    """Driving poses whose frames are masks [H, W] of the person, all `_NOTHING_DRAWN` for none."""
    height, width = made.info.height, made.info.width

    def coded(pose_u8: Frame) -> Frame:
        mask = person_mask(pose_u8, height, width, fit)
        if mask is None:
            return np.full((height, width), _NOTHING_DRAWN, np.uint8)
        return mask.astype(np.uint8)

    return _open("--driving", path, rate=made.rate, start_s=start_s, transform=coded)


def _note_length(
    label: str,
    what: str,
    made: VideoReader,
    other: VideoReader,
    extension: Extension | None,
    on_event: OnEvent,
) -> None:
    """Tell how much of a video is compared if that is not all of both."""
    rate, count = float(made.rate), min(len(made), len(other))
    lasts = f"{label} lasts {len(made) / rate:.2f} s, "
    if extension is not None:
        end_s, how = extension.num_frames / rate, f"by {extension.extend}"
        if what == "truth":
            count = min(count, extension.num_frames)
            after = f"the driving {end_s:.2f} s: {count} frames are compared with the truth"
        else:
            after = f"the {what} {end_s:.2f} s and goes on {how}: all frames are compared with it"
        on_event(Note(text=lasts + after))
    elif len(other) != len(made):
        after = f"the {what} {len(other) / rate:.2f} s: {count} frames are compared"
        on_event(Note(text=lasts + after))


def read_result_record(video: Path) -> dict[str, object]:
    """What `animate` saved beside a result; empty if there is nothing."""
    try:
        return read_json_object(settings_path(video))
    except (OSError, ValueError):
        return {}


def _part(saved: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = saved.get(name)
    return part if isinstance(part, dict) else {}


def _extraction_start_s(entry: EvalEntry, record: Mapping[str, object]) -> float:
    """Where the driving poses begin in the truth [s], if they were extracted from that very file.

    `animate` counts from the beginning of the folder of poses, which may hold a part of the video.
    """
    saved = record.get("driving")
    folder = entry.driving or (Path(saved) if isinstance(saved, str) else None)
    if entry.truth is None or folder is None:
        return 0.0
    try:
        extracted = read_json_object(folder / "extract.json")
    except (OSError, ValueError):
        return 0.0
    start_s = _number(extracted, "start_s") or 0.0
    if start_s and extracted.get("source_sha256") == hash_file(entry.truth):
        return start_s
    return 0.0


def _extension(
    entry: EvalEntry, saved: Mapping[str, object], made: VideoReader, poses: VideoReader | None
) -> Extension | None:
    """What is given and what was saved tell how a video goes on after the end of its driving."""
    result, rate = _part(saved, "result"), float(made.rate)
    length = _number(result, "driving_frames")
    if length is None or abs((_number(result, "fps") or 0.0) - rate) > _SAME_RATE:
        length = None if poses is None or entry.extend is None else len(poses)
    how: object = entry.extend or _part(saved, "effective").get("extend")
    extend = _EXTENDS.get(str(how))
    if extend is None or length is None or not 1 <= length < len(made):
        return None
    return Extension(num_frames=int(length), extend=extend)


def _number(record: Mapping[str, object], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def _fit(record: Mapping[str, object]) -> Fit:
    match record.get("fit"):
        case "cover":
            return "cover"
        case "stretch":
            return "stretch"
        case _:
            return "contain"


def _chunk_joins(
    record: Mapping[str, object], entry: EvalEntry, num_frames: int
) -> tuple[int, ...] | None:
    length: float | None = entry.frames_per_chunk
    overlap: float | None = entry.overlap
    if length is None:
        length, overlap = _number(record, "frames_per_chunk"), _number(record, "overlap")
    if length is None or overlap is None:
        return None
    stride = int(length) - int(overlap)
    return tuple(range(int(length), num_frames, stride)) if stride > 0 else None
