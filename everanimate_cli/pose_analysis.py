"""Who is in a driving video, and where that person's joints are in each frame.

Source: pose page sections 2, 7, 12 and 13.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from everanimate_cli import pose_models, retarget, skeleton
from everanimate_cli.containers import DamagedError
from everanimate_cli.errors import InputError, MediaError, SettingsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.pose_folder import Flag, Seen, clock
from everanimate_cli.smoothing import BoxFilter, KeypointFilter, fill_gap
from everanimate_cli.tracking import Tracker, Tracks, choose_box, choose_track, describe
from everanimate_cli.video import VideoReader, as_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from everanimate_cli.model_table import Thresholds
    from everanimate_cli.settings import ExtractSettings

    Frames = NDArray[np.uint8]
    Points = NDArray[np.float64]

_CALIBRATED = 0.5  # threshold of calibrated scores, of every model and every part
_LIMB_ROWS = slice(5, 17)  # shoulders to ankles
# Share of the sureness when the person was seen. Measured: the toy pose model is up to 0.80 sure of
# empty rooms and at least 0.99 of people, also from behind.
_STILL_SURE = 0.85
_TEMPLATE_SEARCH_S = 5.0
_SIGHTS_PER_S = 8  # of the detector while it looks for people
_SILENT_S = 10  # of video in which nobody is found before the search shows its progress
_LEAST_THRESHOLD = 1e-6  # a threshold of 0 draws all that has a score at all


@contextmanager
def opencv_in_line() -> Iterator[None]:
    """Let OpenCV work in the threads that call it.

    Its own threads make nothing here faster, take 2 ms of processor time a frame, and stand in the
    way of the networks'.
    """
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(num_threads)


# --- the video -----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Source:
    """The driving video at the rate of the result.

    Attributes:
        reader: Gives the frames.
        size: (height, width) of them.
        num_frames: How many can be read, as far as is known: some damage shows only when a frame is
            decoded.
        damaged_s: Time after the first frame from which the file is damaged; None if it is whole,
            as far as is known.
    """

    reader: VideoReader
    size: tuple[int, int]
    num_frames: int
    damaged_s: float | None

    def read(self, index: int) -> Frames:
        """One frame [H, W, 3].

        Raises:
            DamagedError: If it cannot be decoded; the video then ends before it.
            MediaError: If its colours are of an unknown kind.
        """
        try:
            frame: Frames = self.reader.read([index])[0]
        except DamagedError as error:
            if index < self.num_frames:
                self.num_frames, self.damaged_s = index, error.time_s
            raise
        except MediaError as error:
            raise MediaError(f"VIDEO {error}") from error
        return frame


@contextmanager
def open_source(settings: ExtractSettings, on_event: OnEvent) -> Iterator[Source]:
    """Open the part of the video that was asked for."""
    try:
        rate = as_rate(settings.fps)
    except SettingsError as error:
        raise SettingsError(f"--fps {settings.fps:g}: {error}") from error

    def open_until(end_s: float | None) -> VideoReader:
        try:
            return VideoReader(settings.video, rate=rate, start_s=settings.start, end_s=end_s)
        except SettingsError as error:  # about `start`, which is an option of the same name
            raise SettingsError(f"--{error} Give an earlier time.") from error

    damaged_s = None
    try:
        reader = open_until(settings.end)
    except DamagedError as error:
        if error.time_s <= settings.start:
            raise MediaError(f"VIDEO {error}") from error
        damaged_s = error.time_s
        on_event(damage_note(settings, damaged_s))
        reader = open_until(damaged_s)
    except MediaError as error:
        raise MediaError(f"VIDEO {error}") from error
    with reader:
        yield Source(
            reader=reader,
            size=(reader.info.height, reader.info.width),
            num_frames=len(reader),
            damaged_s=damaged_s,
        )


def damage_note(settings: ExtractSettings, damaged_s: float) -> Note:
    """What is told of a video that cannot be read to its end."""
    return Note(text=f"{settings.video} is damaged at {damaged_s:.3f} s: only the part before")


def read_ahead(source: Source, first: int, in_flight: int) -> Iterator[Frames]:
    """Frames from `first` on, decoded in a thread of their own, up to the end or to a damage."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead: deque[Future[Frames]] = deque()
        try:
            for index in range(first, source.num_frames):
                ahead.append(thread.submit(source.read, index))
                if len(ahead) >= in_flight:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except DamagedError:
            return  # `source` knows where
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


# --- whom to follow ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody in the video.

    Attributes:
        number: For `--person`.
        start_s: First sight, in the time of the video [s].
        end_s: Last sight [s].
        num_sights: In how many of the frames looked at.
        box: (x0, y0, x1, y1) on average, source pixels.
        place: "left", "centre" or "right".
    """

    number: int
    start_s: float
    end_s: float
    num_sights: int
    box: tuple[int, int, int, int]
    place: str

    def describe(self) -> str:
        """Such as "0: 0:00.0-0:09.8, 118x231 pixels, left"."""
        x0, y0, x1, y1 = self.box
        span = f"{clock(self.start_s)}-{clock(self.end_s)}"
        return f"{self.number}: {span}, {x1 - x0}x{y1 - y0} pixels, {self.place}"

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {**vars(self), "box": list(self.box)}


def describe_people(tracks: Tracks, settings: ExtractSettings) -> list[Person]:
    """Everybody in the order of `--person`.

    Raises:
        InputError: If there is nobody.
    """
    if not tracks.tracks:
        raise _nobody(settings)
    people = []
    for number, track in enumerate(tracks.ranked()):
        x0, y0, x1, y1 = (round(value) for value in track.mean_box.tolist())
        third = min(2, max(0, int(3 * (x0 + x1) / 2 / tracks.width)))
        people.append(
            Person(
                number=number,
                start_s=round(settings.start + track.start_s, 3),
                end_s=round(settings.start + track.time_s, 3),
                num_sights=track.num_sights,
                box=(x0, y0, x1, y1),
                place=("left", "centre", "right")[third],
            )
        )
    return people


def look_through(
    source: Source, detector: pose_models.Detector, settings: ExtractSettings, tracks: Tracks
) -> Iterator[int]:
    """Feed the tracks with the detector's boxes of every eighth of a second, or more rarely.

    Yields:
        The index of each frame after it was looked at.

    Raises:
        MediaError: If the video is damaged before anybody is seen.
    """
    step = max(1, min(settings.detect_every, round(settings.fps / _SIGHTS_PER_S)))
    for index in range(0, source.num_frames, step):
        try:
            frame_u8 = source.read(index)
        except DamagedError as error:
            if not tracks.tracks:
                raise MediaError(f"VIDEO {error}") from error
            return
        found = detector.detect(frame_u8)
        looks = describe(frame_u8, found.boxes)
        tracks.update(index / settings.fps, found.boxes, found.scores, looks)
        yield index


def choose_person(
    source: Source, detector: pose_models.Detector, settings: ExtractSettings, on_event: OnEvent
) -> tuple[Tracks, int]:
    """Whom to follow: looks through the opening second, and further only for who comes later."""
    tracks = Tracks(*source.size)
    shown = False
    for index in look_through(source, detector, settings, tracks):
        enough = settings.person is None or settings.person < len(tracks.ranked())
        if tracks.opening_done and enough:
            break
        if index >= _SILENT_S * settings.fps:
            if not shown:
                on_event(PhaseStarted(name="persons", total=source.num_frames, done=index))
            shown = True
            on_event(PhaseAdvanced(done=index + 1))
    track = choose_track(tracks, settings.select or "size", settings.person)
    if track is None:
        raise _nobody(settings)
    return tracks, track.track_id


def _nobody(settings: ExtractSettings) -> InputError:
    return InputError(
        f"VIDEO {settings.video} shows nobody that the detector knows. "
        "Give a video of a person, another part of it (--start), or another --detector."
    )


def plan_retarget(
    source: Source,
    models: pose_models.PoseModels,
    settings: ExtractSettings,
    picture: Frames,
    chosen: tuple[Tracks, int],
) -> tuple[retarget.RetargetPlan, Template]:
    """Compare the person in a frame of the video with the character in the picture.

    Raises:
        InputError: If one of the two shows nobody.
        SettingsError: If the frame asked for does not exist.
    """
    found = models.detector.detect(picture)
    largest = choose_box(found.boxes, found.scores)
    if largest is None:
        raise InputError(
            f"--retarget {settings.retarget} shows nobody that the detector knows. "
            "Give a picture of a whole person, or no --retarget."
        )
    thresholds = _thresholds(models, settings)
    _, reference = _estimate(models, thresholds, picture, found.boxes[largest])
    template = _find_template(source, models, settings, chosen)
    try:
        plan = retarget.measure(template.keypoints, source.size, reference, picture.shape[:2])
    except InputError as error:
        raise InputError(f"--retarget {settings.retarget}: {error}") from error
    return plan, template


@dataclass(frozen=True, kw_only=True)
class Template:
    """The frame of the video that is compared with the character.

    Attributes:
        index: Its number in the result.
        keypoints: [133, 3] with calibrated scores.
        is_whole: Whether shoulders, arms, hips and legs are all seen.
    """

    index: int
    keypoints: Points
    is_whole: bool

    def note(self, settings: ExtractSettings) -> str | None:
        """What to tell of a choice that was not the user's; None for the usual, frame 0."""
        if settings.template_frame is not None or (self.is_whole and self.index == 0):
            return None
        why = (
            "the first one with a whole pose"
            if self.is_whole
            else f"no frame of {_TEMPLATE_SEARCH_S:g} s shows the whole pose"
        )
        where = f"frame {self.index} ({clock(self.index / settings.fps)})"
        return f"--retarget compares {where} with {settings.retarget}: {why}"


def _find_template(
    source: Source,
    models: pose_models.PoseModels,
    settings: ExtractSettings,
    chosen: tuple[Tracks, int],
) -> Template:
    """The frame asked for, else the first whole pose, or the best of some seconds."""
    tracker, thresholds = _make_tracker(settings, chosen), _thresholds(models, settings)
    asked = settings.template_frame
    if asked is not None and asked >= source.num_frames:
        raise SettingsError(
            f"--template-frame {asked} is behind the last frame. "
            f"Give 0 to {source.num_frames - 1}, or leave it out."
        )
    best: tuple[int, Template] | None = None
    last = source.num_frames if asked is None else asked + 1
    for index in range(last):
        try:
            frame_u8 = source.read(index)
        except DamagedError:
            break
        if tracker.start_frame(index, index / settings.fps, frame_u8):
            boxes = models.detector.detect(frame_u8)
            tracker.update_detections(boxes.boxes, boxes.scores, frame_u8)
        box = tracker.box_for_pose()
        if box is None:
            continue
        _, keypoints = _estimate(models, thresholds, frame_u8, box)
        if not tracker.update_pose(keypoints) or (asked is not None and index < asked):
            continue
        num_joints = int((keypoints[_LIMB_ROWS, 2] >= _CALIBRATED).sum())
        is_whole = num_joints == _LIMB_ROWS.stop - _LIMB_ROWS.start
        if best is None:
            last_s = index / settings.fps + _TEMPLATE_SEARCH_S
        # Of frames that show as much the first one, as the released code takes it.
        if best is None or num_joints > best[0]:
            best = num_joints, Template(index=index, keypoints=keypoints, is_whole=is_whole)
        if is_whole or index / settings.fps >= last_s:
            break
    if best is not None:
        return best[1]
    if asked is not None:
        raise InputError(
            f"--template-frame {asked} does not show the person followed in VIDEO "
            f"{settings.video}. Give another frame, or leave it out."
        )
    raise no_pose(settings)


def no_pose(settings: ExtractSettings) -> InputError:
    """The refusal of a video in which the detector sees somebody and the pose model does not."""
    return InputError(
        f"VIDEO {settings.video} shows nobody whose pose --pose-model {settings.pose_model} "
        "recognizes. Give a video of a person, another part of it (--start), "
        "or another --pose-model."
    )


def _estimate(
    models: pose_models.PoseModels, thresholds: Thresholds, frame_u8: Frames, box: Points
) -> tuple[Points, Points]:
    """Keypoints [133, 3] as estimated, and with calibrated scores: 0 where a number is no number.

    Such points have no place either, so that what is measured on a face can leave them out.
    """
    raw = models.estimator.estimate(frame_u8, box[None])[0]
    keypoints = pose_models.calibrate(raw, thresholds)
    keypoints[~np.isfinite(keypoints).all(axis=1)] = (np.nan, np.nan, 0.0)
    return raw, keypoints


# --- frame by frame ------------------------------------------------------------------------------


class Analyser:
    """Finds the person in each frame, in order.

    Frames without the person wait until it is known whether the gap is short enough to be filled.

    Attributes:
        settings: Of the extraction.
    """

    def __init__(
        self,
        models: pose_models.PoseModels,
        settings: ExtractSettings,
        size: tuple[int, int],
        chosen: tuple[Tracks, int],
    ) -> None:
        self.settings = settings
        self._models, self._size = models, size
        self._thresholds = _thresholds(models, settings)
        self._tracker = _make_tracker(settings, chosen)
        self._keypoint_filter = KeypointFilter() if settings.smooth else None
        self._face_filter = BoxFilter() if settings.face_smooth else None
        self._waiting: list[Seen] = []
        self._last: Points | None = None  # keypoints of the last frame with the person
        self._last_person = -1
        self._num_cuts = 0
        self._sureness = 0.0  # of the pose, when the detector saw the person last
        self._face_box: skeleton.Box | None = None  # the last good one
        self._face_s = 0.0

    @property
    def num_people(self) -> int:
        """People whom the detector has seen, with the one who is followed."""
        return max(1, self._tracker.tracks.num_people)

    @property
    def is_settled(self) -> bool:
        """Whether no frame is waiting, so that the state can be saved."""
        return not self._waiting

    def push(self, index: int, frame_u8: Frames) -> list[Seen]:
        """Look at the next frame.

        Returns:
            The frames that are decided by now, in order.
        """
        seen = self._look(index, frame_u8)
        if seen.keypoints is None:
            self._waiting.append(seen)
            gap_s = len(self._waiting) / self.settings.fps
            if self._last is None or gap_s > self.settings.max_gap + 1e-6:
                self._last = None
                return self.flush()
            return []
        ready = self._filled(seen) if self._waiting else []
        self._last, self._last_person = seen.keypoints, seen.person
        return [*ready, self._with_face(seen)]

    def flush(self) -> list[Seen]:
        """The frames that wait, which stay empty."""
        ready, self._waiting = self._waiting, []
        return ready

    def _filled(self, seen: Seen) -> list[Seen]:
        """The frames that wait, with keypoints between the person's before and after."""
        waiting = self.flush()
        if self._last is None or seen.person != self._last_person:
            return waiting
        assert seen.keypoints is not None
        between = fill_gap(self._last, seen.keypoints, len(waiting))
        person, flags = seen.person, Flag.FILLED
        return [
            self._with_face(replace(gap, keypoints=points, person=person, flags=flags))
            for gap, points in zip(waiting, between, strict=True)
        ]

    def _look(self, index: int, frame_u8: Frames) -> Seen:
        """Detector, pose model and tracker on one frame."""
        tracker, time_s = self._tracker, index / self.settings.fps
        has_looked = tracker.start_frame(index, time_s, frame_u8)
        is_seen = has_looked and self._detect(frame_u8)
        if tracker.num_cuts != self._num_cuts:
            self._num_cuts, self._last = tracker.num_cuts, None
            self._reset_filters()
        while (box := tracker.box_for_pose()) is not None:
            raw, keypoints = _estimate(self._models, self._thresholds, frame_u8, box)
            sureness = float(np.clip(keypoints[_LIMB_ROWS, 2], 0, 1).mean())
            if is_seen:
                self._sureness = sureness
            elif sureness < _STILL_SURE * self._sureness:
                # A pose model finds somebody in an empty room as well.
                if not has_looked:
                    has_looked, is_seen = True, self._detect(frame_u8)
                    continue
                keypoints[:, 2] = 0
            if not tracker.update_pose(keypoints):
                break
            person = tracker.followed_id
            if person != self._last_person:
                self._reset_filters()
            if self._keypoint_filter is not None:
                keypoints = self._keypoint_filter.update_points(keypoints, time_s, box)
            return Seen(
                index=index,
                frame_u8=frame_u8,
                raw=raw,
                keypoints=keypoints,
                box=box,
                person=person,
            )
        return Seen(index=index, frame_u8=frame_u8, flags=Flag.NO_PERSON | Flag.NO_FACE)

    def _detect(self, frame_u8: Frames) -> bool:
        """Let the detector look at the frame; whether it sees the person followed."""
        found = self._models.detector.detect(frame_u8)
        box = self._tracker.update_detections(found.boxes, found.scores, frame_u8)
        return box is not None

    def _reset_filters(self) -> None:
        for smoother in (self._keypoint_filter, self._face_filter):
            if smoother is not None:
                smoother.reset()
        self._face_box = None

    def _with_face(self, seen: Seen) -> Seen:
        """The same with the box of the face crop."""
        assert seen.keypoints is not None
        settings, time_s = self.settings, seen.index / self.settings.fps
        height, width = self._size
        box = None
        if seen.keypoints[skeleton.FACE_ROWS, 2].mean() >= _CALIBRATED:
            # The released crops are of unsmoothed keypoints, so smoothing has an option of its own.
            points = seen.keypoints if seen.flags & Flag.FILLED else seen.raw
            box = skeleton.face_box(points, height, width, area_factor=settings.face_scale)
        if box is not None:
            if settings.face_square:
                box = _squared(box, height, width)
            if self._face_filter is not None:
                box = self._face_filter.update_box(box, time_s)
            self._face_box, self._face_s = box, time_s
            return replace(seen, face_box=box)
        if self._face_box is not None and time_s - self._face_s <= settings.face_hold:
            return replace(seen, face_box=self._face_box, flags=seen.flags | Flag.FACE_HELD)
        return replace(seen, flags=seen.flags | Flag.NO_FACE)

    def state(self) -> dict[str, Any]:
        """All that later frames depend on."""
        smoothers = {"keypoints": self._keypoint_filter, "face": self._face_filter}
        return {
            "tracker": self._tracker.state(),
            "filters": {name: f and f.state() for name, f in smoothers.items()},
            "last": self._last,
            "last_person": self._last_person,
            "num_cuts": self._num_cuts,
            "sureness": self._sureness,
            "face_box": self._face_box,
            "face_s": self._face_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._tracker = Tracker.restore(state["tracker"])
        smoothers = {"keypoints": self._keypoint_filter, "face": self._face_filter}
        for name, smoother in smoothers.items():
            if smoother is not None:
                smoother.restore(state["filters"][name])
        self._last, self._last_person = state["last"], state["last_person"]
        self._num_cuts = state["num_cuts"]
        self._sureness = state["sureness"]
        box = state["face_box"]
        self._face_box = None if box is None else (box[0], box[1], box[2], box[3])
        self._face_s = state["face_s"]


def _squared(box: skeleton.Box, height: int, width: int) -> skeleton.Box:
    """A square of the longer side about the same centre, cut at the frame's edges."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) // 2, (y0 + y1 - side) // 2
    return max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)


def _thresholds(models: pose_models.PoseModels, settings: ExtractSettings) -> Thresholds:
    """The pose model's, with those that were given in their place."""
    given = {
        part: max(value, _LEAST_THRESHOLD)
        for part in ("body", "hand", "face")
        if (value := getattr(settings, f"{part}_threshold")) is not None
    }
    return replace(models.estimator.thresholds, **given)


def _make_tracker(settings: ExtractSettings, chosen: tuple[Tracks, int]) -> Tracker:
    return Tracker(
        *chosen,
        body_threshold=_CALIBRATED,
        detect_every=settings.detect_every,
        reacquire=settings.reacquire,
    )
