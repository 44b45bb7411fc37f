"""What `eval` is to measure: the videos on the command line, or a test set in a CSV or JSONL list.

Nothing is opened here but the list itself, so that a slip in it is told at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from everanimate_cli.errors import InputError, SettingsError
from everanimate_cli.eval_settings import (
    Continuation,
    EvalSettings,
    check_chunks,
    is_method_name,
)
from everanimate_cli.records import Record, decode_time
from everanimate_cli.table_rows import csv_rows, jsonl_rows


def _decode_count(value: object) -> object:
    """A number from the text in a table; other values as they are."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


@dataclass(frozen=True, kw_only=True)
class EvalEntry(Record):
    """One video and what it is compared with: a line of the list.

    Attributes:
        generated: The video.
        method: Who made it.
        sample: Which of the test set it is; None outside a test set.
        truth: The video that it should equal.
        reference: Picture of the character.
        driving: Folder that `extract-pose` made of the driving video.
        start: Where `truth` and `driving` begin [s]; None for what is saved beside the video.
        extend: How it goes on after the end of the driving; None likewise.
        frames_per_chunk: Of its chunks; None for what `--frames-per-chunk` says, or is saved.
        overlap: Frames that neighbouring chunks share, see `frames_per_chunk`.
    """

    LEAST: ClassVar = {"start": 0, "frames_per_chunk": 2, "overlap": 0}

    generated: Path
    method: str = "generated"
    sample: str | None = None
    truth: Path | None = None
    reference: Path | None = None
    driving: Path | None = None
    start: float | None = field(default=None, metadata={"decode": decode_time})
    extend: Continuation | None = None
    frames_per_chunk: int | None = field(default=None, metadata={"decode": _decode_count})
    overlap: int | None = field(default=None, metadata={"decode": _decode_count})

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the column and the value.
        """
        super().__post_init__()
        check_chunks(self.frames_per_chunk, self.overlap, self.label)

    @property
    def name(self) -> str:
        """What it is called among all."""
        return self.method if self.sample is None else f"{self.method}: {self.sample}"


_COLUMNS = tuple(column.name for column in fields(EvalEntry))
_PATHS = ("generated", "truth", "reference", "driving")
# What the command line gives to all videos.
_SHARED = ("truth", "reference", "driving", "start", "extend", "frames_per_chunk", "overlap")
_ADVICE = "Give a .csv or .jsonl list with a line for each video."


def list_entries(settings: EvalSettings) -> list[EvalEntry]:
    """All videos to measure.

    Raises:
        InputError: If the manifest is missing or a line of it is wrong.
    """
    if settings.manifest is not None:
        return [_completed(entry, settings) for entry in read_manifest(settings.manifest)]
    shared = {name: getattr(settings, name) for name in _SHARED}
    return [
        EvalEntry(generated=path, method=name, **shared)
        for name, path in settings.methods_and_files
    ]


def _completed(entry: EvalEntry, settings: EvalSettings) -> EvalEntry:
    """The entry with what the command line says of entries that do not say it themselves."""
    entry = replace(entry, extend=entry.extend or settings.extend)
    if entry.frames_per_chunk is None:
        chunks = {name: getattr(settings, name) for name in ("frames_per_chunk", "overlap")}
        entry = replace(entry, **chunks)
    return entry


def read_manifest(manifest: Path) -> list[EvalEntry]:
    """The videos of a test set.

    A CSV file whose first line names the columns, or a JSONL file with one object per line.
    Columns: generated (needed) and the other attributes of `EvalEntry`. Paths count from the folder
    of the list, empty values are not given. A sample without a name is called after its
    truth, else its driving folder, else its video.

    Returns:
        At least one entry; no two have one method and one sample.

    Raises:
        InputError: If it lists nothing, or a line of it is wrong.
    """
    suffix = manifest.suffix.lower()
    if not manifest.exists():
        raise InputError(f"--manifest {manifest} does not exist. {_ADVICE}")
    if suffix not in (".csv", ".jsonl") or manifest.is_dir():
        raise InputError(f"--manifest {manifest} is neither a .csv nor a .jsonl file. {_ADVICE}")
    try:
        text = manifest.read_text(encoding="utf-8-sig")  # Windows programs put a mark in front
    except OSError as error:
        raise InputError(f"--manifest {manifest} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--manifest {manifest} is not UTF-8 text. Save it as UTF-8.") from error
    wrong_line = partial(_wrong_line, manifest)
    rows = (
        csv_rows(text, partial(_check_header, manifest), wrong_line)
        if suffix == ".csv"
        else jsonl_rows(text, wrong_line)
    )
    entries: list[EvalEntry] = []
    for number, row in rows:
        entry = _entry_of_row(manifest, number, row)
        if entry.name in [other.name for other in entries]:
            raise _wrong_line(
                manifest, number, f"{entry.name} is there twice. Give each a sample of its own."
            )
        entries.append(entry)
    if not entries:
        raise InputError(f"--manifest {manifest} lists no video. Add a line for each video.")
    return entries


def _check_header(manifest: Path, header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise _wrong_line(manifest, 1, "a column is there twice.")


def _entry_of_row(manifest: Path, number: int, row: Mapping[str, object]) -> EvalEntry:
    unknown = [name for name in row if name not in _COLUMNS]
    if unknown:
        raise _wrong_line(
            manifest, number, f"'{unknown[0]}' is unknown. Known: {', '.join(_COLUMNS)}."
        )
    try:
        given = {name: value for name, value in row.items() if value not in (None, "")}
        entry = EvalEntry.from_json(given)
        if not is_method_name(entry.method):  # no gate could name it
            raise SettingsError(f"method {entry.method} holds <, >, = or @. Give a plain name.")
    except SettingsError as error:
        raise _wrong_line(manifest, number, str(error)) from error
    sample = entry.sample
    if sample is None:
        sample = next(path.stem for path in (entry.truth, entry.driving, entry.generated) if path)
    located = {
        name: manifest.parent / path
        for name in _PATHS
        if (path := getattr(entry, name)) is not None
    }
    return replace(entry, sample=sample, **located)


def _wrong_line(manifest: Path, number: int, problem: str) -> InputError:
    return InputError(f"--manifest {manifest} line {number}: {problem}")
