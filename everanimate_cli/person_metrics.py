"""Metrics of the person: likeness to the reference, and whether the pose is the driving one.

No network that recognises faces is at hand: identity is the cosine of features of the model's CLIP
image encoder, of the person's square crop. The pose is estimated again in the video, with the pose
model that saw the driving video, and compared with what it saw there.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from everanimate_cli import pose_models
from everanimate_cli.errors import InputError
from everanimate_cli.frame_metrics import Outcome, Series, Track, Unavailable
from everanimate_cli.images import fit_points
from everanimate_cli.records import parse_size
from everanimate_cli.retarget import RetargetPlan
from everanimate_cli.tracking import choose_box
from everanimate_cli.video import Timeline, as_rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction
    from pathlib import Path

    from everanimate_cli.frame_metrics import Moment
    from everanimate_cli.metrics import Frame
    from everanimate_cli.settings import Fit

Points = NDArray[np.float64]

# COCO rows: the body without its feet.
_NUM_KEYPOINTS = 133  # of the whole body
BODY_ROWS: Final = slice(0, 17)
_SHOULDERS, _HIPS = [5, 6], [11, 12]
_SEEN: Final = 0.5  # score on the calibrated scale
PCK_REACH: Final = 0.2  # torso lengths
PCK_STRICT_REACH: Final = 0.1
_CROP_MARGIN: Final = 1.1  # side of the crop over the longer side of the person's box
_MIN_OVERLAP: Final = 0.1  # of a found box and the driving one, to be the same person


class PersonFinder:
    """Finds the person in frames, once per frame however many ask.

    Attributes:
        models: A detector and a pose model.
        every: Frames from one look to the next.
    """

    def __init__(
        self, models: pose_models.PoseModels, every: int, wanted: DrivingPose | None = None
    ) -> None:
        """Take the networks and what is known.

        Args:
            models: A detector and a pose model.
            every: Frames from one look to the next.
            wanted: Where the driving person is in these frames: of several people that one counts.
        """
        self.models, self.every = models, every
        self._wanted = wanted
        self._index: int | None = None
        self._box: Points | None = None

    def find(self, moment: Moment) -> Points | None:
        """The box [4] of the person in a frame; None for nobody."""
        if self._index != moment.index:
            near = None
            if self._wanted is not None:
                near = box_of(self._wanted.points[moment.index // self.every])
            self._index, self._box = moment.index, self.find_in(moment.made_u8, near)
        return self._box

    def find_in(self, frame_u8: Frame, near: Points | None = None) -> Points | None:
        """The same in any picture; `near` [4] is where the person should be."""
        found = self.models.detector.detect(frame_u8)
        if not len(found.boxes):
            return None
        if near is not None:
            overlaps = [_overlap(box, near) for box in found.boxes]
            best = int(np.argmax(overlaps))
            if overlaps[best] >= _MIN_OVERLAP:
                return np.asarray(found.boxes[best], np.float64)
        chosen = choose_box(found.boxes, found.scores)
        return None if chosen is None else np.asarray(found.boxes[chosen], np.float64)


def _overlap(box: Points, other: Points) -> float:
    """Shared area over the area of both."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    shared = float(np.prod(np.clip(sides, 0, None)))
    areas = [float(np.prod(each[2:] - each[:2])) for each in (box, other)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


# --- identity ------------------------------------------------------------------------------------


def crop_person(frame_u8: Frame, box: Points) -> Frame:
    """A square [side, side, 3] about the person, black beyond the frame."""
    x0, y0, x1, y1 = box.tolist()
    side = max(2, round(_CROP_MARGIN * max(x1 - x0, y1 - y0)))
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    height, width = frame_u8.shape[:2]
    crop = np.zeros((side, side, 3), np.uint8)
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    crop[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = frame_u8[
        rows, columns
    ]
    return crop


class IdentityMeter:
    """Cosine of the features of the person and of the person in the reference."""

    def __init__(
        self,
        features_of: Callable[[Frame], Points],
        reference: Points,
        finder: PersonFinder,
    ) -> None:
        """Take a network and what to compare with.

        Args:
            features_of: Features [D] of a picture.
            reference: [D] of the person in the reference.
            finder: Finds the person.
        """
        self._features_of, self._reference = features_of, reference
        self._finder = finder
        self._series, self._num_frames = Series(), 0

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        if moment.index % self._finder.every:
            return
        box = self._finder.find(moment)
        if box is not None:
            features = self._features_of(crop_person(moment.made_u8, box))
            self._series.put(moment.index, cosine(features, self._reference))

    def outcomes(self) -> Mapping[str, Outcome]:
        """Identity."""
        if not len(self._series):
            return {"identity": Unavailable("not defined: nobody is found in the video")}
        return {"identity": Track(self._series.rows(self._num_frames))}


def cosine(first: Points, second: Points) -> float:
    """Of the angle between two vectors, -1 to 1."""
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


# --- pose ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DrivingPose:
    """What `extract-pose` has seen, as far as it is asked for.

    Attributes:
        points: [n, 17, 3] body joints (x_px, y_px, score) in pixels of the video, NaN for nobody.
        torso_px: Median distance between the middles of shoulders and hips; None if they are never
            in view.
    """

    points: Points
    torso_px: float | None


def read_driving_record(folder: Path) -> dict[str, Any]:
    """The `extract.json` of a folder.

    Raises:
        InputError: If it is damaged.
    """
    path = folder / "extract.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return dict(record.items())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--driving {path} cannot be read ({error}).") from error


def read_driving_pose(
    folder: Path,
    *,
    indices: Sequence[int],
    rate: Fraction,
    start_s: float,
    size: tuple[int, int],
    fit: Fit,
) -> DrivingPose | None:
    """Where the joints should be in some frames of a video.

    Args:
        folder: Made by extract-pose.
        indices: Frames of the video; those after the end of the driving are NaN.
        rate: Frames per second of the video.
        start_s: Where its first frame lies in the driving [s].
        size: (height, width) of the video.
        fit: How the pose video was fitted into it.

    Returns:
        None if the folder holds no keypoints.

    Raises:
        InputError: If a file of the folder is damaged.
    """
    path = folder / "keypoints.npz"
    if not path.is_file():
        return None
    record = read_driving_record(folder)
    try:
        num_keypoints = _count_keypoints(path)
        place = _placement(record, size, fit)
        step = 1 / as_rate(float(record["fps"]))
        timeline = Timeline(times=np.arange(num_keypoints), end=num_keypoints, time_base=step)
        num_frames = timeline.count_frames(rate, start_s)
        nearest = timeline.nearest_frames(rate, num_frames, start_s)
        rows_of: defaultdict[int, list[int]] = defaultdict(list)
        for row, index in enumerate(indices):
            if index < num_frames:
                rows_of[int(nearest[index])].append(row)
        points = np.full((len(indices), 17, 3), np.nan)
        for number, keypoints in _each_keypoints(path):
            if number in rows_of and np.isfinite(keypoints).all():
                points[rows_of[number]] = place(keypoints.astype(np.float64))[BODY_ROWS]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"--driving {folder} is damaged ({error}). Extract it again.") from error
    return DrivingPose(points=points, torso_px=_torso(points))


@contextmanager
def _open_keypoints(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """The array of a `keypoints.npz` as a stream: its content, shape and type.

    Raises:
        ValueError: If it is no such array.
    """
    with zipfile.ZipFile(path) as archive, archive.open("keypoints.npy") as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} holds an array of another version")
        shape, is_fortran, dtype = npy.read_array_header_1_0(file)
        if is_fortran or dtype.hasobject or shape[1:] != (_NUM_KEYPOINTS, 3):
            raise ValueError(f"{path.name} holds keypoints {dtype} {shape}")
        yield file, shape, dtype


def _count_keypoints(path: Path) -> int:
    with _open_keypoints(path) as (_, shape, _):
        return shape[0]


def _each_keypoints(path: Path) -> Iterator[tuple[int, NDArray[np.floating[Any]]]]:
    """Number and keypoints [133, 3] of each frame, one after the other: an hour is 140 MB.

    Raises:
        ValueError: If the file ends too early.
    """
    with _open_keypoints(path) as (file, shape, dtype):
        num_bytes = math.prod(shape[1:]) * dtype.itemsize
        for number in range(shape[0]):
            yield number, np.frombuffer(file.read(num_bytes), dtype).reshape(shape[1:])


def _placement(
    record: Mapping[str, Any], size: tuple[int, int], fit: Fit
) -> Callable[[Points], Points]:
    """From keypoints [133, 3] in the driving video to where they were drawn, in the video's pixels.

    Raises:
        ValueError: If the record is damaged.
        KeyError: Likewise.
    """
    canvas, source = _size(record["size"]), _size(record["source_size"])
    drawn_fit = record["settings"]["fit"]
    plan = RetargetPlan.from_json(_plan_of(record)) if "retarget" in record else None

    def place(keypoints: Points) -> Points:
        if plan is not None:
            drawn = fit_points(plan.apply(keypoints), plan.canvas, canvas, drawn_fit)
        else:
            drawn = fit_points(keypoints, source, canvas, drawn_fit)
        return fit_points(drawn, canvas, size, fit)

    return place


def _plan_of(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["retarget"].items() if name != "template_frame"}


def _size(text: str) -> tuple[int, int]:
    size = parse_size(text)
    if size is None:
        raise ValueError(f"{text} is no size")
    return size


def _torso(points: Points) -> float | None:
    """Median length where both shoulders and both hips are seen."""
    seen = (points[:, [*_SHOULDERS, *_HIPS], 2] >= _SEEN).all(axis=1)  # NaN is not
    if not seen.any():
        return None
    middles = [points[seen][:, rows, :2].mean(axis=1) for rows in (_SHOULDERS, _HIPS)]
    length = float(np.median(np.linalg.norm(middles[0] - middles[1], axis=1)))
    return length or None


def box_of(points: Points) -> Points | None:
    """The box [4] around the joints [17, 3] that are seen; None for fewer than two."""
    seen = points[points[:, 2] >= _SEEN]
    if len(seen) < 2:  # noqa: PLR2004  # one point has no extent
        return None
    return np.concatenate([seen[:, :2].min(0), seen[:, :2].max(0)])


class PoseErrors(NamedTuple):
    """How far the joints of one frame are from where they should be.

    Attributes:
        pck: Share of the joints within 0.2 torso lengths.
        strict_pck: Share within 0.1.
        distance: Mean in torso lengths; infinite if nobody was found.
    """

    pck: float
    strict_pck: float
    distance: float


def pose_errors(found: Points | None, wanted: Points, torso_px: float) -> PoseErrors:
    """Compare what was found with what was wanted.

    Args:
        found: [17, 3]; None for nobody, who has no joint in the right place.
        wanted: [17, 3]; only joints with a score of 0.5 or more count, at least one.
        torso_px: Length of the torso.
    """
    seen = wanted[:, 2] >= _SEEN
    away = np.full(int(seen.sum()), np.inf)
    if found is not None:
        away = np.linalg.norm(found[seen, :2] - wanted[seen, :2], axis=1) / torso_px
    return PoseErrors(
        pck=float((away <= PCK_REACH).mean()),
        strict_pck=float((away <= PCK_STRICT_REACH).mean()),
        distance=float(away.mean()),
    )


class PoseMeter:
    """PCK and mean distance of the joints, estimated again in every so many frames."""

    def __init__(self, finder: PersonFinder, wanted: DrivingPose) -> None:
        """Take what the pose should be.

        Args:
            finder: Finds the person, and brings the pose model.
            wanted: Its points belong to the frames that the finder looks at.
        """
        self._finder, self._wanted = finder, wanted
        self._pck, self._strict, self._distance = Series(), Series(), Series()
        self._num_frames = 0

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        torso_px, every = self._wanted.torso_px, self._finder.every
        if moment.index % every or torso_px is None:
            return
        wanted = self._wanted.points[moment.index // every]
        if box_of(wanted) is None:
            return
        box = self._finder.find(moment)
        found = None
        if box is not None:
            estimator = self._finder.models.estimator
            found = estimator.estimate(moment.made_u8, box[None])[0][BODY_ROWS]
        errors = pose_errors(found, wanted, torso_px)
        self._pck.put(moment.index, errors.pck)
        self._strict.put(moment.index, errors.strict_pck)
        if found is not None:
            self._distance.put(moment.index, errors.distance)

    def outcomes(self) -> Mapping[str, Outcome]:
        """The three metrics of the pose."""
        names = ("pose_pck", "pose_pck_strict", "pose_distance")
        if self._wanted.torso_px is None:
            reason = "not defined: shoulders and hips are never in view together in the driving"
            return dict.fromkeys(names, Unavailable(reason))
        tracks: dict[str, Outcome] = {}
        for name, series in zip(names, (self._pck, self._strict, self._distance), strict=True):
            if len(series):
                tracks[name] = Track(series.rows(self._num_frames))
            else:
                tracks[name] = Unavailable("not defined: nobody is found in the video")
        return tracks
