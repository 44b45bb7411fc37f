"""Open a dataset: every clip checked, its poses extracted where needed, its frames ready to read.

All three videos of a clip lie on one timeline: frame `j` is what each of them shows at
`origin + j / fps` of the source video. The origin is where the poses begin, so that at the rate of
the extraction each frame meets the very pose that was drawn of it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from everanimate_cli.errors import InputError, RunError, SettingsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.extract import extract, load_models, make_request, reusable
from everanimate_cli.hashes import add_samples, hash_file
from everanimate_cli.images import fit_frame
from everanimate_cli.manifest import ClipEntry, read_dataset
from everanimate_cli.model_table import check_models
from everanimate_cli.preflight import DRIVING_FILES, check_extract
from everanimate_cli.records import read_json_object
from everanimate_cli.runs import ExtractFolder
from everanimate_cli.settings import POSE_SUFFIX, ExtractSettings, Fit, run_folder
from everanimate_cli.training_draws import Windows
from everanimate_cli.video import VideoReader, as_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from everanimate_cli.train_settings import ResolvedTrainSettings

    Frames = NDArray[np.uint8]

# Clips whose files stay open: the one that is read, and the one that a look at the training shows.
# Each keeps up to three decoders, which take some 100 MB for videos of 1080p on many cores.
_NUM_OPEN_CLIPS = 2

# Frames of all files whose time stamps are kept, 32 bytes each: what is forgotten has to be looked
# through again.
_NUM_KNOWN_FRAMES = 2_000_000

# As the fingerprint of a checkpoint: all of a file up to 1 MiB, pieces of a larger one.

_NUM_REASONS_SHOWN = 3

# Poses may leave their place by so much over a whole video before they are refused [frames].
_HALF_A_FRAME = 0.5

# Seconds, rates and frames of a record stay below this.
_MOST = 1e9

# A part that is shorter than this is the rounding of a product of times and rates [frames].
_ROUNDING = Fraction(1, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class ClipFrames:
    """Frames of a clip, the same times in all three.

    Attributes:
        rgb_u8: [S, H, W, 3] uint8 RGB pictures of the person.
        pose_u8: [S, H, W, 3] uint8 RGB drawn poses.
        face_u8: [S, Hf, Wf, 3] uint8 RGB face crops.
    """

    rgb_u8: Frames
    pose_u8: Frames
    face_u8: Frames

    def __post_init__(self) -> None:
        """What the objective relies on."""
        assert self.rgb_u8.shape == self.pose_u8.shape
        assert len(self.face_u8) == len(self.rgb_u8)


@dataclass(frozen=True, kw_only=True)
class ClipLayout:
    """Where the frames of a clip are.

    Attributes:
        video: Pictures of the person.
        pose: Drawn poses; its first frame is at `origin_s` of `video`.
        face: Face crops of the same times.
        rate: Frames per second of the clip.
        origin_s: Where the poses begin, after the first frame of `video` [s].
        first: Frames of the timeline before the clip begins.
        end_s: What follows in `video` is not needed and may be damaged [s]; None for its end.
        height: Of pictures and poses [px].
        width: Of pictures and poses [px].
        fit: How frames of another aspect fill that.
        face_size: Side of the face crops [px].
    """

    video: Path
    pose: Path
    face: Path
    rate: Fraction
    origin_s: float
    first: int
    end_s: float | None
    height: int
    width: int
    fit: Fit
    face_size: int

    def open_video(self) -> VideoReader:
        """The pictures, from the origin on."""
        return VideoReader(
            self.video,
            rate=self.rate,
            start_s=self.origin_s,
            end_s=self.end_s,
            transform=self._fitted,
        )

    def open_pose(self) -> VideoReader:
        """The poses, from the origin on."""
        return VideoReader(self.pose, rate=self.rate, transform=self._fitted)

    def open_face(self) -> VideoReader:
        """The face crops, from the origin on."""
        side = self.face_size
        squash = functools.partial(fit_frame, height=side, width=side, fit="stretch")
        return VideoReader(self.face, rate=self.rate, transform=squash)

    def _fitted(self, frame_u8: Frames) -> Frames:
        return fit_frame(frame_u8, self.height, self.width, self.fit)


class ReaderPool:
    """The readers of the clips that were used last; its memory does not grow with the dataset.

    Threads may share one. A copy in another process, forked or unpickled, starts empty.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._readers: OrderedDict[ClipLayout, tuple[VideoReader, ...]] = OrderedDict()

    def _reset_after_fork(self) -> None:
        if self._process != os.getpid():
            # The decoders' threads are not here: closing a decoder would wait for them or crash.
            # So would the collector, with those that only wait to be collected.
            gc.freeze()
            self._inherited = self._readers
            self._reset()

    def __reduce__(self) -> tuple[type[ReaderPool], tuple[()]]:
        """A new one: files and decoders stay in their process."""
        return ReaderPool, ()

    def close(self) -> None:
        """Close all files; the next use opens them again."""
        self._reset_after_fork()
        with self._lock:
            for readers in self._readers.values():
                _close(readers)
            self._readers.clear()

    @contextmanager
    def hold(self, layout: ClipLayout) -> Iterator[tuple[VideoReader, ...]]:
        """The readers of pictures, poses and faces of a clip, for one thread at a time."""
        self._reset_after_fork()
        with self._lock:
            readers = self._readers.pop(layout, None)
            if readers is None:
                readers = (layout.open_video(), layout.open_pose(), layout.open_face())
            self._readers[layout] = readers  # the newest comes last
            self._forget()
            yield readers

    def _forget(self) -> None:
        for old in list(self._readers)[:-_NUM_OPEN_CLIPS]:
            _close(self._readers[old])
        num_known = sum(map(_count_known, self._readers.values()))
        while num_known > _NUM_KNOWN_FRAMES and len(self._readers) > 1:
            _, readers = self._readers.popitem(last=False)
            num_known -= _count_known(readers)
            _close(readers)


def _close(readers: Sequence[VideoReader]) -> None:
    for reader in readers:
        reader.close()


def _count_known(readers: Sequence[VideoReader]) -> int:
    return sum(reader.info.num_frames for reader in readers)


@dataclass(frozen=True, kw_only=True)
class TrainingClip:
    """A clip that can be trained on. It can be pickled.

    Attributes:
        label: How messages call it.
        prompt: Its own text; None for that of the settings.
        num_frames: Length at the rate of the training.
        fingerprint: Another one for other files or another part of them, whatever their names: it
            covers the sizes of the three files and 16 pieces of 64 KiB spread over each, so it
            costs milliseconds and is no protection against forgery. The prompt does not count.
        layout: Where its frames are.
        pool: Shared by the clips of a dataset.
    """

    label: str
    prompt: str | None
    num_frames: int
    fingerprint: str
    layout: ClipLayout
    pool: ReaderPool = field(default_factory=ReaderPool, compare=False, repr=False)

    def read(self, start: int, count: int) -> ClipFrames:
        """Frames of the clip.

        A stretch at a random place costs, in each of the three files, decoding it and the frames
        between it and the key frame before it; one that goes on where the last one ended costs
        nothing beyond itself, as long as at most one other clip was read in between.

        Args:
            start: First frame.
            count: How many; what is asked for is what is in memory.

        Returns:
            `count` frames.

        Raises:
            IndexError: If the clip has no such frames.
            MediaError: If a file is gone, has changed or cannot be decoded.
        """
        if not 0 <= start <= start + count <= self.num_frames:
            raise IndexError(f"frames {start} to {start + count} of {self.num_frames}")
        first = self.layout.first + start
        with self.pool.hold(self.layout) as readers:
            indices = range(first, first + count)
            rgb_u8, pose_u8, face_u8 = (reader.read(indices) for reader in readers)
        return ClipFrames(rgb_u8=rgb_u8, pose_u8=pose_u8, face_u8=face_u8)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A clip that cannot be used.

    Attributes:
        label: How messages call it.
        reason: What is wrong, a sentence or more.
    """

    label: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClipSet:
    """What a dataset gives.

    Attributes:
        clips: In the order of the dataset.
        rejected: Likewise.
        pending: Labels of clips whose poses a dry run did not extract.
    """

    clips: Sequence[TrainingClip]
    rejected: Sequence[Rejection]
    pending: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        """Another one for other clips, another order of them or other prompts."""
        parts = [[clip.fingerprint, clip.num_frames, clip.prompt] for clip in self.clips]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def needed_frames(frames_per_chunk: int) -> int:
    """How many frames a clip must have: the reference's place, two chunks and what they share.

    Args:
        frames_per_chunk: F.

    Returns:
        2F + 4, which is 158 for the released 77.

    Source: method page section 3.
    """
    return Windows(frames_per_chunk).num_frames


def open_clips(settings: ResolvedTrainSettings, face_size: int, on_event: OnEvent) -> ClipSet:
    """Check every clip of the dataset, and extract the poses of raw videos.

    A clip that cannot be used is left out with its reason; what is wrong with all of them, such as
    a pose model that cannot be had, is an error. Poses go to `NAME_pose` in the pose folder, and
    are found there again.

    Args:
        settings: `dataset`, `size`, `fit`, `fps`, `frames_per_chunk` and those of the poses; with
            `dry_run` nothing is extracted.
        face_size: Side of the face crops that the model takes [px].
        on_event: Told of every rejection, of the count, and how far the work is.

    Returns:
        At least one clip, or with `dry_run` one that waits for its poses.

    Raises:
        InputError: If the dataset is wrong as a whole or none of its clips can be used, or another
            process is extracting the same poses.
        SettingsError: If the rate, the pose model or the detector cannot be.
        WeightsError: If the pose model cannot be had.
        RunError: If the pose model fails; the same command goes on.
        OSError: If the disk is full.
    """
    opener = _Opener(settings, face_size, on_event)
    return opener.open(read_dataset(settings.dataset))


class _UnfitError(Exception):
    """A clip cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """A clip whose poses are still to be extracted."""

    entry: ClipEntry
    request: ExtractSettings


_Outcome = TrainingClip | _Raw | Rejection


class _Opener:
    """What one call of `open_clips` shares between the clips."""

    def __init__(self, settings: ResolvedTrainSettings, face_size: int, on_event: OnEvent) -> None:
        self._settings, self._face_size, self._on_event = settings, face_size, on_event
        try:
            self._rate = as_rate(settings.fps)
        except SettingsError as error:
            raise SettingsError(f"--fps {settings.fps:g}: {error}") from error
        self._needed = needed_frames(settings.frames_per_chunk)
        self._pool = ReaderPool()
        self._num_found = self._num_slow = 0

    def open(self, entries: Sequence[ClipEntry]) -> ClipSet:
        """Check all, then extract: hours of work wait until every slip is told."""
        if any(entry.is_raw for entry in entries):
            check_models(self._settings.pose_model, self._settings.detector)
        folders = _pose_folders(self._settings.pose_folder, entries)
        outcomes: list[_Outcome] = []
        self._on_event(PhaseStarted(name="clips", total=len(entries), unit="clips"))
        for entry, folder in zip(entries, folders, strict=True):
            outcomes.append(self._attempt(entry, functools.partial(self._check, entry, folder)))
            self._on_event(PhaseAdvanced(done=len(outcomes)))
        if self._num_found:
            self._note(f"the poses of {self._num_found} raw videos are there already")
        raw = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, _Raw)]
        if not self._settings.dry_run:
            for number, index in enumerate(raw, start=1):
                waiting = outcomes[index]
                assert isinstance(waiting, _Raw)  # chosen so above
                if number == 1:
                    self._prepare(waiting.request)
                self._refuse_second_process(waiting.request)
                self._note(
                    f"extracting the poses of {waiting.entry.label} ({number} of {len(raw)})"
                )
                work = functools.partial(self._extract, waiting)
                outcomes[index] = self._attempt(waiting.entry, work)
        if self._num_slow:
            self._note(
                f"{self._num_slow} clips have fewer poses per second than "
                f"--fps {self._settings.fps:g}, so that poses are repeated"
            )
        return self._count(outcomes)

    def _count(self, outcomes: Sequence[_Outcome]) -> ClipSet:
        clips = [outcome for outcome in outcomes if isinstance(outcome, TrainingClip)]
        rejected = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
        pending = [outcome.entry.label for outcome in outcomes if isinstance(outcome, _Raw)]
        if not clips and not pending:
            shown = [f"{item.label}: {item.reason}" for item in rejected[:_NUM_REASONS_SHOWN]]
            rest = len(rejected) - len(shown)
            raise InputError(
                f"DATASET {self._settings.dataset}: none of {len(rejected)} clips can be used. "
                f"{' '.join(shown)} {f'And {rest} more. ' if rest else ''}"
                f"A clip needs {self._in_words(self._needed)}, as pictures, poses and faces."
            )
        text = f"{len(clips) + len(pending)} of {len(outcomes)} clips can be used"
        text += f", {len(rejected)} rejected" if rejected else ""
        text += f", {len(pending)} need their poses extracted first" if pending else ""
        self._note(text)
        return ClipSet(clips=clips, rejected=rejected, pending=pending)

    def _note(self, text: str) -> None:
        self._on_event(Note(text=text))

    def _in_words(self, num_frames: int) -> str:
        seconds = float(num_frames / self._rate)
        return f"{num_frames} frames ({seconds:.2f} s at {self._settings.fps:g} fps)"

    def _attempt(self, entry: ClipEntry, work: Callable[[], TrainingClip | _Raw]) -> _Outcome:
        """Do the work, or say why the clip cannot be used."""
        try:
            return work()
        except (_UnfitError, InputError, SettingsError) as error:
            rejection = Rejection(label=entry.label, reason=str(error))
        self._note(f"{rejection.label} is not used: {rejection.reason}")
        return rejection

    # --- one clip ---

    def _check(self, entry: ClipEntry, folder: Path) -> TrainingClip | _Raw:
        try:
            return self._check_files(entry, folder)
        except OSError as error:
            place = error.filename or entry.video
            raise _UnfitError(f"{place} cannot be read: {error.strerror}.") from error

    def _check_files(self, entry: ClipEntry, folder: Path) -> TrainingClip | _Raw:
        if entry.pose is not None and entry.face is not None:
            return self._open_files(entry, entry.pose, entry.face)
        if entry.pose_folder is not None:
            return self._open_folder(entry, entry.pose_folder)
        layout = self._layout(entry, entry.video, entry.video, origin_s=entry.start)
        with layout.open_video() as reader:
            self._check_length(len(reader))  # before the hours that its poses may take
        request = self._request(entry, folder)
        differences = reusable(folder, make_request(request, self._settings.height_width))
        if differences and not self._settings.overwrite:
            raise _UnfitError(
                f"--pose-folder {self._settings.pose_folder} holds poses in {folder.name} that "
                f"were made otherwise: {'; '.join(differences)}. Give another --pose-folder, or "
                "--overwrite to make them again."
            )
        if differences == []:
            self._num_found += 1
            return self._open_folder(entry, folder, is_sure=True)
        return _Raw(entry=entry, request=request)

    def _open_files(self, entry: ClipEntry, pose: Path, face: Path) -> TrainingClip:
        """A clip with pose and face videos of the whole video."""
        layout = self._layout(entry, pose, face)
        with layout.open_video() as video, layout.open_pose() as poses, layout.open_face() as faces:
            # Of the whole file, whatever part of it the clip is.
            num_video = max(1, self._count_until(video.info.duration_s))
            self._compare(poses, {"the video": num_video, "pose": len(poses), "face": len(faces)})
            return self._clip(entry, layout, min(map(len, (video, poses, faces))))

    def _open_folder(
        self, entry: ClipEntry, folder: Path, *, is_sure: bool = False
    ) -> TrainingClip:
        """A clip with a folder that extract-pose made.

        Args:
            entry: The clip.
            folder: Made of its video.
            is_sure: Whether that is known already.
        """
        missing = [name for name in DRIVING_FILES if not (folder / name).is_file()]
        if missing:
            raise _UnfitError(
                f"{folder} has no {' and no '.join(missing)}. Run extract-pose again."
            )
        record = _Extraction.read(folder / "extract.json")
        # The path of the source in the record is never followed: only our own video counts.
        if not is_sure and record.source_sha256 != _video_sha256(entry.video):
            raise _UnfitError(
                f"{folder} was made of another video, or the video has changed since. "
                "Run extract-pose on it again."
            )
        if record.damaged_s is not None:
            raise _UnfitError(
                f"{entry.video} is damaged at {record.damaged_s:.3f} s. Convert the file anew."
            )
        pose, face = folder / "pose.mp4", folder / "face.mp4"
        layout = self._layout(entry, pose, face, origin_s=record.start_s)
        with layout.open_video() as video, layout.open_pose() as poses, layout.open_face() as faces:
            record.check(folder, poses)
            lengths = {"pose": len(poses), "face": len(faces)}
            # Poses may be of a part of the video, but not of more than there is.
            num_left = max(1, self._count_until(video.info.duration_s - record.start_s))
            if num_left < len(poses):
                lengths["the video"] = num_left
            self._compare(poses, lengths)
            return self._clip(entry, layout, min(map(len, (video, poses, faces))))

    def _layout(
        self, entry: ClipEntry, pose: Path, face: Path, *, origin_s: float = 0.0
    ) -> ClipLayout:
        height, width = self._settings.height_width
        before = Fraction(entry.start) - Fraction(origin_s)
        return ClipLayout(
            video=entry.video,
            pose=pose,
            face=face,
            rate=self._rate,
            origin_s=origin_s,
            first=max(0, math.ceil(before * self._rate - _ROUNDING)),
            end_s=entry.end,
            height=height,
            width=width,
            fit=self._settings.fit,
            face_size=self._face_size,
        )

    def _count_until(self, time_s: float) -> int:
        """Frames of the timeline that fit before a time after its begin."""
        return int(Fraction(time_s) * self._rate + _ROUNDING)

    def _compare(self, poses: VideoReader, lengths: Mapping[str, int]) -> None:
        """Refuse videos that do not belong together: more than a frame apart."""
        if poses.info.rate < self._rate:
            self._num_slow += 1
        # Poses that are fewer per second end up to one of theirs before the video does.
        most_apart = max(1, math.ceil(self._rate / poses.info.rate))
        if max(lengths.values()) - min(lengths.values()) > most_apart:
            found = [f"{name} has {self._in_words(length)}" for name, length in lengths.items()]
            raise _UnfitError(
                f"{', '.join(found)}. All must come from the same video and last as long as it."
            )

    def _check_length(self, num_frames: int) -> None:
        if num_frames < self._needed:
            raise _UnfitError(
                f"it is too short: {self._in_words(num_frames)}, and "
                f"{self._in_words(self._needed)} are needed."
            )

    def _clip(self, entry: ClipEntry, layout: ClipLayout, num_common: int) -> TrainingClip:
        """The clip, once its files are known to go together in `num_common` frames."""
        num_frames = max(0, num_common - layout.first)
        self._check_length(num_frames)
        digest = hashlib.sha256(
            f"{layout.rate} {layout.origin_s!r} {layout.first} {num_frames}\n".encode()
        )
        for path in (layout.video, layout.pose, layout.face):
            add_samples(digest, path)
        return TrainingClip(
            label=entry.label,
            prompt=entry.prompt,
            num_frames=num_frames,
            fingerprint=digest.hexdigest(),
            layout=layout,
            pool=self._pool,
        )

    # --- poses of raw videos ---

    def _request(self, entry: ClipEntry, folder: Path) -> ExtractSettings:
        settings = self._settings
        height, width = settings.height_width
        return ExtractSettings(
            video=entry.video,
            output=folder,
            start=entry.start,
            end=entry.end,
            fps=settings.fps,
            size=f"{width}x{height}",
            fit=settings.fit,
            pose_model=settings.pose_model,
            detector=settings.detector,
            provider="auto" if settings.device == "mps" else settings.device,
            face_size=self._face_size,
            resume=settings.resume,
            overwrite=settings.overwrite,
        )

    def _prepare(self, request: ExtractSettings) -> None:
        """Tell what is wrong with every extraction before clips are rejected one by one."""
        load_models(request, self._on_event)
        folder = self._settings.pose_folder
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--pose-folder {folder} cannot be made: {error.strerror}. Give another path."
            ) from error

    def _refuse_second_process(self, request: ExtractSettings) -> None:
        """Stop rather than go on without the clips that another process is working on."""
        assert request.output is not None  # given by `_request`
        if ExtractFolder(run_folder(request.output)).is_held():
            raise InputError(
                f"--pose-folder {self._settings.pose_folder}: another process is extracting "
                f"{request.output.name}. Wait for it, then run the same command again."
            )

    def _extract(self, raw: _Raw) -> TrainingClip:
        folder = raw.request.output
        assert folder is not None  # given by `_request`
        # Two entries of one video and part share their poses.
        request = make_request(raw.request, self._settings.height_width)
        if reusable(folder, request) != []:
            check_extract(raw.request)
            try:
                extract(raw.request, self._on_event)
            except RunError:
                # Of a damaged video the part before the damage is there now, and `_open_folder`
                # says the rest. Anything else would fail for the next clip too.
                if reusable(folder, request) != []:
                    raise
        return self._open_folder(raw.entry, folder, is_sure=True)


@dataclass(frozen=True, kw_only=True)
class _Extraction:
    """What `extract.json` tells of the poses beside it.

    Attributes:
        source_sha256: Of the video that they were made of.
        start_s: Their first frame, after the first frame of the video [s].
        fps: Their rate; None where the record does not tell.
        num_frames: How many there are; likewise.
        damaged_s: From where on the video could not be read [s].
    """

    source_sha256: str
    start_s: float
    fps: float | None
    num_frames: float | None
    damaged_s: float | None

    @classmethod
    def read(cls, path: Path) -> _Extraction:
        """Read the record, which anybody may have written."""
        advice = "Run extract-pose again."
        try:
            record = read_json_object(path)
        except (OSError, ValueError, RecursionError) as error:
            raise _UnfitError(f"{path} cannot be read ({error}). {advice}") from error

        def number(name: str, least: float = 0.0) -> float | None:
            value: Any = record.get(name)
            if value is None:
                return None
            # Written so that NaN is refused too; a bool is no number.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value < _MOST:
                raise _UnfitError(f"{path} has an impossible {name}. {advice}")
            return float(value)

        source_sha256 = record.get("source_sha256")
        if not isinstance(source_sha256, str):
            raise _UnfitError(f"{path} names no source_sha256. {advice}")
        return cls(
            source_sha256=source_sha256,
            start_s=number("start_s") or 0.0,
            fps=number("fps", least=1 / _MOST),
            num_frames=number("num_frames"),
            damaged_s=number("damaged_s"),
        )

    def check(self, folder: Path, poses: VideoReader) -> None:
        """Refuse a pose video whose frames are not those that were extracted."""
        info = poses.info
        if self.num_frames is not None and info.num_frames != self.num_frames:
            raise _UnfitError(
                f"{folder} has {info.num_frames} poses and its extract.json tells of "
                f"{self.num_frames:g}. Run extract-pose again."
            )
        if self.fps is None:
            return
        # At another rate the poses would run away from the pictures.
        seconds_apart = info.num_frames * abs(1 / self.fps - 1 / float(info.rate))
        if seconds_apart * self.fps >= _HALF_A_FRAME:
            raise _UnfitError(
                f"{folder} has poses at {float(info.rate):g} fps and its extract.json tells of "
                f"{self.fps:g} fps. Run extract-pose again."
            )


def _pose_folders(pose_folder: Path, entries: Sequence[ClipEntry]) -> list[Path]:
    """Where the poses of each clip are if its video is raw: a name that tells, but its own."""
    names: list[str] = []
    owners: dict[str, set[str]] = {}
    for entry in entries:
        part = ""
        if entry.start or entry.end is not None:
            end = "end" if entry.end is None else f"{entry.end:.15g}s"
            part = f"_{entry.start:.15g}s-{end}"
        names.append(f"{entry.video.stem}{part}")
        if entry.is_raw:
            # Not every file system tells upper from lower case.
            owners.setdefault(names[-1].casefold(), set()).add(entry.label)
    folders = []
    for name, entry in zip(names, entries, strict=True):
        mark = ""
        if len(owners.get(name.casefold(), ())) > 1:
            mark = "_" + hashlib.sha256(os.fsencode(entry.label)).hexdigest()[:8]
        folders.append(pose_folder / f"{name}{mark}{POSE_SUFFIX}")
    return folders


def _video_sha256(path: Path) -> str:
    """Of the whole file, once for all clips that are parts of it."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, _size: int, _changed_ns: int) -> str:
    return hash_file(path)
