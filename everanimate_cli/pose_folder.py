"""The files of an extraction: frames drawn and encoded segment by segment, then put together.

Source: pose page sections 4, 7 and 9.
"""

from __future__ import annotations

import enum
import json
import zipfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from everanimate_cli import skeleton
from everanimate_cli.atomic_files import atomic_path, publish
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import MediaError, RunError
from everanimate_cli.images import fit_frame, fit_points
from everanimate_cli.joining import join_videos
from everanimate_cli.preflight import POSE_FOLDER_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from everanimate_cli.retarget import RetargetPlan
    from everanimate_cli.runs import ExtractFolder
    from everanimate_cli.settings import ExtractSettings

    Frames = NDArray[np.uint8]
    Points = NDArray[np.float64]

_SMALL_FACE = 1 / 16  # of the side of the face video
# The encoder's trade of speed for size. Thin coloured sticks need its best; a face crop, which
# mostly is an enlarged picture, takes 0.4 of the time of "medium" with "veryfast", for as many
# bytes and 0.2 dB less at 43 dB (two clips of real people).
PRESETS = {"pose": "medium", "face": "veryfast", "preview": "veryfast"}
_GAPS_SHOWN = 3


class Flag(enum.IntFlag):
    """What is special about a frame, in `keypoints.npz` under "flags"."""

    NO_PERSON = 1
    FILLED = 2  # keypoints between two neighbours that were seen
    NO_FACE = 4
    FACE_HELD = 8  # the last good box, for a moment


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One frame and what was found in it.

    Attributes:
        index: Position in the result.
        frame_u8: [H, W, 3].
        raw: [133, 3] as estimated; NaN where nobody was seen.
        keypoints: [133, 3] smoothed or filled in, with calibrated scores; None for nobody.
        box: [4] of the person, source pixels; NaN where nobody was seen.
        person: Number of the track; -1 for nobody.
        face_box: Of the face crop; None for a black face picture.
        flags: What is special.
    """

    index: int
    frame_u8: Frames
    raw: Points = field(default_factory=lambda: np.full((skeleton.NUM_KEYPOINTS, 3), np.nan))
    keypoints: Points | None = None
    box: Points = field(default_factory=lambda: np.full(4, np.nan))
    person: int = -1
    face_box: skeleton.Box | None = None
    flags: int = 0


class Renderer:
    """Turns what was seen into the frames of the videos."""

    def __init__(
        self,
        settings: ExtractSettings,
        source_size: tuple[int, int],
        size: tuple[int, int],
        plan: RetargetPlan | None,
    ) -> None:
        self._settings, self._source_size, self._size, self._plan = (
            settings,
            source_size,
            size,
            plan,
        )
        height, width = size
        face = settings.face_size
        self.sizes = {"pose": (height, width), "face": (face, face)}
        if settings.preview:
            source_width = max(2, round(height * source_size[1] / source_size[0] / 2) * 2)
            self._preview_source = (height, source_width)
            self.sizes["preview"] = (height, source_width + width + height)

    def render(self, seen: Seen) -> dict[str, Frames]:
        """Frames [*, *, 3] by the names of `sizes`."""
        face = skeleton.crop_face(seen.frame_u8, seen.face_box, self._settings.face_size)
        frames = {"pose": self._pose(seen.keypoints), "face": face}
        if self._settings.preview:
            height = self._size[0]
            parts = [
                fit_frame(seen.frame_u8, *self._preview_source, fit="stretch"),
                frames["pose"],
                fit_frame(face, height, height, fit="stretch"),
            ]
            frames["preview"] = np.concatenate(parts, axis=1)
        return frames

    def _pose(self, keypoints: Points | None) -> Frames:
        height, width = self._size
        if keypoints is None:
            return np.zeros((height, width, 3), np.uint8)
        fit = self._settings.fit
        if self._plan is not None:
            moved = fit_points(self._plan.apply(keypoints), self._plan.canvas, self._size, fit)
        elif self._settings.draw_mode == "native":
            drawn = skeleton.draw_pose(keypoints, *self._source_size)
            if fit == "contain":
                return skeleton.letterbox_frame(drawn, self._size)
            return fit_frame(drawn, height, width, fit)
        else:
            moved = fit_points(keypoints, self._source_size, self._size, fit)
        return skeleton.draw_pose(moved, height, width)


class _SegmentWriter:
    """The videos and keypoints of one segment; finished when `close` has written the latter."""

    def __init__(
        self, work: ExtractFolder, index: int, renderer: Renderer, settings: ExtractSettings
    ) -> None:
        self._work, self._index, self._renderer = work, index, renderer
        self._rows: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._writers = {
                name: stack.enter_context(
                    VideoWriter(
                        work.video_path(index, name),
                        height=size[0],
                        width=size[1],
                        rate=settings.fps,
                        crf=settings.crf,
                        preset=PRESETS[name],
                        # The preview is for people, whose players know nothing else.
                        lossless=settings.lossless and name != "preview",
                        # As the released files, which the network's readers take it for.
                        matrix="bt601",
                    )
                )
                for name, size in renderer.sizes.items()
            }
            self._threads = stack.enter_context(ThreadPoolExecutor(max_workers=len(self._writers)))
            self._stack = stack.pop_all()

    def write(self, seen: Seen) -> None:
        """Append a frame; the videos are encoded side by side."""
        frames = self._renderer.render(seen)
        jobs = [
            self._threads.submit(writer.write, frames[name][None])
            for name, writer in self._writers.items()
        ]
        wait(jobs)
        for job in jobs:
            job.result()
        nobody = np.full((skeleton.NUM_KEYPOINTS, 3), np.nan)
        values = {
            "keypoints": nobody if seen.keypoints is None else seen.keypoints,
            "raw_keypoints": seen.raw,
            "boxes": seen.box,
            "face_boxes": (-1, -1, -1, -1) if seen.face_box is None else seen.face_box,
            "persons": seen.person,
            "flags": seen.flags,
        }
        for name, value in values.items():
            self._rows[name].append(np.asarray(value, _ARRAYS[name]))

    def close(self, state: dict[str, Any]) -> None:
        """Finish the segment: from now on it is not made again."""
        with self._stack:
            pass
        arrays = {name: np.stack(rows) for name, rows in self._rows.items()}
        packed = np.frombuffer(json.dumps(_pack(state)).encode(), np.uint8)
        path = self._work.part_path(self._index)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, state=packed, **arrays)

    def abandon(self) -> None:
        """Throw an unfinished segment away."""
        with suppress(_Abandoned), self._stack:
            raise _Abandoned


class _Abandoned(Exception):  # noqa: N818  # no error: it tells the writers to leave nothing
    """A segment is given up."""


# What `keypoints.npz` holds per frame.
_ARRAYS: dict[str, Any] = {
    # [N, 133, 3] as drawn: smoothed and filled in, source pixels; scores on a scale on which 0.5 is
    # drawn. NaN for nobody.
    "keypoints": np.float32,
    "raw_keypoints": np.float32,  # [N, 133, 3] as estimated, with the model's own scores
    "boxes": np.float32,  # [N, 4] of the person, NaN for nobody
    "face_boxes": np.int32,  # [N, 4] of the face crop, -1 for none
    "persons": np.int32,  # [N] number of the track, -1 for nobody
    "flags": np.uint8,  # [N] see `Flag`
}


def _pack(value: Any) -> Any:
    """A state as JSON values; floats come back to the last bit."""
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "shape": value.shape, "data": value.ravel().tolist()}
    if isinstance(value, dict):
        return {"items": {key: _pack(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_pack(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any) -> Any:
    """What `_pack` was given; tuples come back as lists."""
    if isinstance(value, dict):
        if "items" in value:
            return {key: _unpack(item) for key, item in value["items"].items()}
        return np.array(value["data"], value["dtype"]).reshape(value["shape"])
    return [_unpack(item) for item in value] if isinstance(value, list) else value


def read_state(work: ExtractFolder, index: int) -> dict[str, Any]:
    """What `Encoder.close` was given for a finished segment; tuples come back as lists.

    Raises:
        RunError: If the file is damaged.
    """
    path = work.part_path(index)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state: dict[str, Any] = _unpack(json.loads(arrays["state"].tobytes()))
            return state
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({error}). Start again with --no-resume.") from error


class Encoder:
    """Draws and encodes frames in a thread of its own, in order."""

    def __init__(
        self,
        work: ExtractFolder,
        renderer: Renderer,
        settings: ExtractSettings,
        num_segments: int,
        in_flight: int,
    ) -> None:
        self._work, self._renderer, self._settings = work, renderer, settings
        self._index = num_segments
        self._segment: _SegmentWriter | None = None
        self._jobs: deque[Future[None]] = deque()
        self._has_failed = False
        self._in_flight = in_flight
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Encoder:
        """The encoder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is not written yet, then give up an unfinished segment.

        After an interruption too: one more segment may become whole.
        """
        try:
            while kind is None and self._jobs:
                self._jobs.popleft().result()
        finally:
            self._thread.shutdown(wait=True)
            if self._segment is not None:
                self._segment.abandon()

    def write(self, seen: Seen) -> None:
        """Append a frame to the segment at work; waits if too many are waiting."""
        self._submit(self._write, seen)

    def close(self, state: dict[str, Any]) -> None:
        """End the segment at work; the next frame begins a new one."""
        self._submit(self._close, state)

    def _submit(self, job: Callable[[Any], None], value: object) -> None:
        while self._jobs and (self._jobs[0].done() or len(self._jobs) >= self._in_flight):
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(self._run, job, value))

    def _run(self, job: Callable[[Any], None], value: object) -> None:
        """Do a job, unless one before it failed: a segment without a frame may not be finished."""
        if self._has_failed:
            return
        try:
            job(value)
        except BaseException:
            self._has_failed = True
            raise

    def _write(self, seen: Seen) -> None:
        if self._segment is None:
            self._segment = _SegmentWriter(self._work, self._index, self._renderer, self._settings)
        self._segment.write(seen)

    def _close(self, state: dict[str, Any]) -> None:
        assert self._segment is not None  # a segment has at least one frame
        self._segment.close(state)
        self._segment = None
        self._index += 1


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is told of all frames.

    Attributes:
        persons: [N] number of the track, -1 for nobody.
        scores: [N] mean score of the body, 0 for nobody.
        flags: [N] see `Flag`.
        small_faces: How many face crops come from few pixels: below 32 for a video of 512.
        fps: Frames per second.
        start_s: Time of the first frame in the video [s].
    """

    persons: NDArray[np.int32]
    scores: Points
    flags: NDArray[np.uint8]
    small_faces: int
    fps: float
    start_s: float = 0.0

    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of each stretch of frames without a person, in the time of the video [s]."""
        missing = np.concatenate([[False], (self.flags & Flag.NO_PERSON) > 0, [False]])
        edges = np.flatnonzero(np.diff(missing.astype(np.int8)))
        return [
            (self.start_s + a / self.fps, self.start_s + b / self.fps)
            for a, b in edges.reshape(-1, 2).tolist()
        ]

    def _count(self, flag: Flag) -> int:
        return int(((self.flags & flag) > 0).sum())

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "frames_without_person": self._count(Flag.NO_PERSON),
            "frames_filled": self._count(Flag.FILLED),
            "frames_without_face": self._count(Flag.NO_FACE),
            "gaps": [[round(value, 3) for value in gap] for gap in self.gaps()],
            "switches": int((np.diff(self.persons[self.persons >= 0]) != 0).sum()),
        }

    def record(self) -> dict[str, Any]:
        """For `extract.json`."""
        return {
            **self.facts(),
            "persons": self.persons.tolist(),
            "scores": [round(score, 3) for score in self.scores.tolist()],
        }

    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        total, lines = len(self.flags), []
        missing = self._count(Flag.NO_PERSON)
        if missing:
            gaps = [f"{clock(a)}-{clock(b)}" for a, b in self.gaps()]
            shown, rest = ", ".join(gaps[:_GAPS_SHOWN]), len(gaps) - _GAPS_SHOWN
            shown += f" and {rest} more" if rest > 0 else ""
            lines.append(f"{missing} of {total} frames without a person ({shown})")
        switches = self.facts()["switches"]
        if switches > 0:
            times = "once" if switches == 1 else f"{switches} times"
            lines.append(f"another person was followed {times}, as --reacquire any allows")
        faceless = self._count(Flag.NO_FACE) - missing
        if faceless > 0:
            lines.append(f"{faceless} of {total} frames with a person but no face in view")
        if self.small_faces:
            lines.append(
                f"{self.small_faces} of {total} face crops come from very few pixels: "
                "the model sees little expression in them"
            )
        return lines


def clock(time_s: float) -> str:
    """Minutes and seconds, such as "1:02.5"."""
    minutes, seconds = divmod(time_s, 60)
    return f"{int(minutes)}:{seconds:04.1f}"


def join_segments(work: ExtractFolder, settings: ExtractSettings, renderer: Renderer) -> Summary:
    """Put the segments together, in the run folder."""
    num_segments = work.count_finished()
    for name in renderer.sizes:
        parts = [work.video_path(index, name) for index in range(num_segments)]
        try:
            join_videos(parts, work.joined_path(f"{name}.mp4"))
        except MediaError as error:
            raise RunError(f"{error} Start again with --no-resume.") from error
    parts = [work.part_path(index) for index in range(num_segments)]
    with atomic_path(work.joined_path("keypoints.npz")) as temporary:
        _join_arrays(parts, temporary, settings.fps)
    persons, scores, flags, small = [], [], [], 0
    for path in parts:
        with np.load(path, allow_pickle=False) as arrays:
            persons.append(arrays["persons"])
            flags.append(arrays["flags"])
            body = arrays["raw_keypoints"][:, :17].astype(np.float64)
            score = np.where(np.isfinite(body).all(axis=2), body[..., 2], 0.0)
            scores.append(score.mean(axis=1))
            boxes = arrays["face_boxes"]
            sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
            small += int(((boxes[:, 0] >= 0) & (sides < _SMALL_FACE * settings.face_size)).sum())
    return Summary(
        persons=np.concatenate(persons),
        scores=np.concatenate(scores),
        flags=np.concatenate(flags),
        small_faces=small,
        fps=settings.fps,
        start_s=settings.start,
    )


def _join_arrays(parts: Sequence[Path], output: Path, fps: float) -> None:
    """Append the arrays of all segments, one segment in memory at a time."""
    num_frames = 0
    for path in parts:
        with np.load(path, allow_pickle=False) as arrays:
            num_frames += len(arrays["flags"])
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:

        def write(name: str, dtype: Any, rows: Iterator[NDArray[Any]]) -> None:
            # A fixed date, so that the same frames give the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                header_written = False
                for block in rows:
                    if not header_written:
                        header = {
                            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                            "fortran_order": False,
                            "shape": (num_frames, *block.shape[1:]),
                        }
                        np.lib.format.write_array_header_1_0(file, header)
                        header_written = True
                    file.write(np.ascontiguousarray(block).tobytes())

        for name, dtype in _ARRAYS.items():
            write(name, dtype, _blocks(parts, name))
        write("times_s", np.float64, iter([np.arange(num_frames) / fps]))


def _blocks(parts: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    for path in parts:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays[name]


def publish_files(work: ExtractFolder, output: Path) -> None:
    """Move the files of the result to their places; with the last one the folder is whole."""
    output.mkdir(exist_ok=True)
    # What an older extraction left may not pass for a part of this one.
    for name in reversed(POSE_FOLDER_FILES):
        if name == POSE_FOLDER_FILES[-1] or not work.joined_path(name).exists():
            (output / name).unlink(missing_ok=True)
    for name in POSE_FOLDER_FILES:
        if work.joined_path(name).exists():
            publish(work.joined_path(name), output / name)
