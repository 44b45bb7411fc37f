"""A video that is to be measured, opened beside what it is compared with.

The truth and the driving poses are read at the video's rate, by their time stamps. What `animate`
saved beside a result tells where they begin and where its chunks join.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from everanimate_cli.errors import InputError, MediaError, SettingsError
from everanimate_cli.eval_settings import BASELINE_S
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.images import fit_frame
from everanimate_cli.preflight import settings_path
from everanimate_cli.records import read_json_object
from everanimate_cli.video import VideoReader

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

    from everanimate_cli.eval_manifest import EvalEntry
    from everanimate_cli.eval_settings import EvalSettings
    from everanimate_cli.frame_metrics import Frame
    from everanimate_cli.settings import Fit


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One video, opened, with what it is compared with.

    Attributes:
        entry: As listed.
        made: The video at its own rate.
        truth: At the rate of the video and brought to its size.
        poses: The driving poses, likewise at the rate of the video.
        start_s: Where its first frame lies in truth and driving [s].
        fit: How the driving poses were brought into its frame.
        joins: Frames at which a new chunk begins; None if that is not known.
        baseline_frames: Frames at the start that drift is measured against.
    """

    entry: EvalEntry
    made: VideoReader
    truth: VideoReader | None
    poses: VideoReader | None
    start_s: float
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
        """How many of its frames have a truth."""
        return 0 if self.truth is None else min(len(self.made), len(self.truth))

    def close(self) -> None:
        """Close all files; they open again when they are read."""
        for reader in (self.made, self.truth, self.poses):
            if reader is not None:
                reader.close()


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
    record = read_result_record(entry.generated)
    start_s = entry.start
    if start_s is None:
        start_s = _number(record, "start") or 0.0
        if start_s and (entry.truth or entry.driving):
            on_event(
                Note(
                    text=f"{label}: truth and driving from {start_s:g} s on, as "
                    f"{settings_path(entry.generated).name} says"
                )
            )
    truth = poses = None
    if entry.truth is not None:
        truth = _open_truth(entry.truth, made, start_s, settings, label)
        _note_length(label, "truth", made, truth, on_event)
        if truth.info.rate != made.rate:
            on_event(
                Note(
                    text=f"{label}: the truth has {float(truth.info.rate):g} frames/s, "
                    f"compared at {float(made.rate):g} by time stamps"
                )
            )
    if entry.driving is not None:
        poses = _open("--driving", entry.driving / "pose.mp4", rate=made.rate, start_s=start_s)
        _note_length(label, "driving pose", made, poses, on_event)
    joins = _chunk_joins(record, settings, len(made))
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
        fit=_fit(record),
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


def _note_length(
    label: str, what: str, made: VideoReader, other: VideoReader, on_event: OnEvent
) -> None:
    if len(other) != len(made):
        rate = float(made.rate)
        on_event(
            Note(
                text=f"{label} lasts {len(made) / rate:.2f} s, the {what} {len(other) / rate:.2f} "
                f"s: {min(len(made), len(other))} frames are compared"
            )
        )


def read_result_record(video: Path) -> dict[str, object]:
    """The options that `animate` saved beside a result; empty if there are none."""
    try:
        saved = read_json_object(settings_path(video)).get("effective")
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


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
    record: Mapping[str, object], settings: EvalSettings, num_frames: int
) -> tuple[int, ...] | None:
    length: float | None = settings.frames_per_chunk
    overlap: float | None = settings.overlap
    if length is None:
        length, overlap = _number(record, "frames_per_chunk"), _number(record, "overlap")
    if length is None or overlap is None:
        return None
    stride = int(length) - int(overlap)
    return tuple(range(int(length), num_frames, stride)) if stride > 0 else None
