"""The list of videos to train on: a folder, a CSV or JSONL manifest, or one video.

A *clip* is one video, or a part of one, with its pose and face videos. Nothing is opened here but
the manifest itself, so that a slip in it is told at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import ClassVar

from everanimate_cli.errors import InputError, SettingsError
from everanimate_cli.records import Record, decode_time
from everanimate_cli.settings import POSE_SUFFIX
from everanimate_cli.table_rows import csv_rows, jsonl_rows

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

_ADVICE = "Give a folder of videos, or a .csv or .jsonl manifest that lists them."


@dataclass(frozen=True, kw_only=True)
class ClipEntry:
    """One clip as the dataset names it; no file is known to exist.

    Attributes:
        label: How messages call it; one for each video and part.
        video: Pictures of the person.
        pose: Video of drawn skeletons for the whole of `video`; with it there is `face`.
        face: Video of face crops, as long as `pose`.
        pose_folder: Made of `video` by extract-pose, instead of `pose` and `face`. With neither,
            the poses are to be extracted.
        start: Where the clip begins, after the first frame of `video` [s].
        end: Where it ends [s]; None for the end of `video`.
        prompt: Its own text; None for that of the settings.
    """

    label: str
    video: Path
    pose: Path | None = None
    face: Path | None = None
    pose_folder: Path | None = None
    start: float = 0.0
    end: float | None = None
    prompt: str | None = None

    @property
    def is_raw(self) -> bool:
        """Whether the poses are to be extracted."""
        return self.pose is None and self.pose_folder is None


def read_dataset(dataset: Path) -> list[ClipEntry]:
    """The clips that a dataset consists of.

    A folder: every video in it (not in folders below), by name. `NAME_pose` beside a video is what
    extract-pose made of it, `NAME.txt` its prompt. One video counts as a folder of its own.

    A manifest: a CSV file whose first line names the columns, or a JSONL file with one object per
    line. Columns: video (needed), pose and face, or pose_folder, prompt, start, end; paths count
    from the folder of the manifest, empty values are not given.

    Args:
        dataset: The folder, manifest or video.

    Returns:
        At least one entry.

    Raises:
        InputError: If it lists nothing, or a line of it is wrong.
    """
    try:
        if dataset.is_dir():
            return _read_folder(dataset)
        if not dataset.exists():
            raise InputError(f"DATASET {dataset} does not exist. {_ADVICE}")
        suffix = dataset.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            return [_entry_beside(dataset)]
        if suffix not in (".csv", ".jsonl"):
            raise InputError(
                f"DATASET {dataset} is neither a folder nor a .csv or .jsonl file. {_ADVICE}"
            )
        text = _read_text(dataset)
    except OSError as error:
        raise InputError(f"DATASET {dataset} cannot be read: {error.strerror}.") from error
    lines = (
        csv_rows(text, partial(_check_header, dataset), partial(_wrong_line, dataset))
        if suffix == ".csv"
        else jsonl_rows(text, partial(_wrong_line, dataset))
    )
    entries = [_entry_of_row(dataset, number, row) for number, row in lines]
    if not entries:
        raise InputError(f"DATASET {dataset} lists no video. Add a line for each video.")
    return entries


# --- a folder ------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> list[ClipEntry]:
    # Names with a dot are hidden: half-written files, and what macOS leaves on foreign disks.
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if "extract.json" in names:
        raise InputError(
            f"DATASET {folder} is a folder made by extract-pose, which has no pictures of the "
            "person. Give the folder of the videos, with such folders as NAME_pose beside them."
        )
    videos = [folder / name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    entries = [_entry_beside(video) for video in videos if video.is_file()]
    if not entries:
        known = ", ".join(VIDEO_SUFFIXES)
        raise InputError(f"DATASET {folder} holds no video ({known}). {_ADVICE}")
    return entries


def _entry_beside(video: Path) -> ClipEntry:
    """A video with what belongs to it by its name."""
    pose_folder = video.with_name(video.stem + POSE_SUFFIX)
    prompt_path = video.with_suffix(".txt")
    return ClipEntry(
        label=video.name,
        video=video,
        pose_folder=pose_folder if pose_folder.is_dir() else None,
        prompt=(_read_text(prompt_path).strip() or None) if prompt_path.is_file() else None,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows programs put a mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error


# --- a manifest ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Row(Record):
    """The columns of a manifest."""

    LEAST: ClassVar = {"start": 0}
    ABOVE_ZERO: ClassVar = ("end",)

    video: Path
    pose: Path | None = None
    face: Path | None = None
    pose_folder: Path | None = None
    prompt: str | None = None
    start: float = field(default=0.0, metadata={"decode": decode_time})
    end: float | None = field(default=None, metadata={"decode": decode_time})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pose is None) != (self.face is None):
            present, absent = ("pose", "face") if self.face is None else ("face", "pose")
            raise SettingsError(f"{present} needs {absent} beside it.")
        if self.pose is not None and self.pose_folder is not None:
            raise SettingsError("pose and pose_folder exclude each other. Give one of them.")
        if self.end is not None and self.end <= self.start:
            raise SettingsError(f"end {self.end:g} is not after start {self.start:g}.")


_COLUMNS = tuple(column.name for column in fields(_Row))


def _check_header(dataset: Path, header: list[str]) -> None:
    known = f"Known: {', '.join(_COLUMNS)}."
    if not any(header):
        raise InputError(f"DATASET {dataset} is empty. Its first line must name the columns.")
    for name in header:
        if name not in _COLUMNS:
            raise InputError(f"DATASET {dataset}: the column '{name}' is unknown. {known}")
        if header.count(name) > 1:
            raise InputError(f"DATASET {dataset}: the column '{name}' is there twice.")
    if "video" not in header:
        raise InputError(f"DATASET {dataset} has no column 'video'. {known}")


def _entry_of_row(dataset: Path, number: int, row: Mapping[str, object]) -> ClipEntry:
    try:
        for name, value in row.items():
            _check_text(name, value)
        given = {name: value for name, value in row.items() if value not in (None, "")}
        values = _Row.from_json(given)
    except SettingsError as error:
        raise _wrong_line(dataset, number, str(error)) from error

    def locate(path: Path | None) -> Path | None:
        return None if path is None else dataset.parent / path

    label = str(values.video)
    if values.start or values.end is not None:
        label += f" from {values.start:.15g} s"
        label += "" if values.end is None else f" to {values.end:.15g} s"
    return ClipEntry(
        label=label,
        video=dataset.parent / values.video,
        pose=locate(values.pose),
        face=locate(values.face),
        pose_folder=locate(values.pose_folder),
        start=values.start,
        end=values.end,
        prompt=values.prompt,
    )


def _check_text(name: str, value: object) -> None:
    """Refuse text that no path and no prompt can be."""
    if isinstance(value, str) and (
        "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
    ):
        raise SettingsError(f"{name} {json.dumps(value)} is not text.")


def _wrong_line(dataset: Path, number: int, problem: str) -> InputError:
    return InputError(f"DATASET {dataset} line {number}: {problem}")
