"""Which person of a video is followed, and where that person is in each frame.

`Tracks` joins the boxes of a person detector to persons over time. `Tracker` follows one of them:
it says when the detector has to look again, gives the box for the pose model, and judges the pose.
Nobody takes the place of the followed person unnoticed: a detection has to continue the movement or
to look alike, and where neither holds the person is lost and the frame stays empty.

Frames are RGB uint8 [H, W, 3]; boxes are (x0, y0, x1, y1) in pixels and may reach over the frame's
edges; times are seconds and rise. Nothing here is random and no result depends on the order in
which a detector returns its boxes.

Source: pose page sections 2, 11.8, 12 and 13.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from everanimate_cli.errors import SettingsError
from everanimate_cli.settings import Reacquire, Select

Floats: TypeAlias = NDArray[np.float64]
Looks: TypeAlias = NDArray[np.float32]
FrameU8: TypeAlias = NDArray[np.uint8]
State: TypeAlias = dict[str, Any]

# Person choice, as released.
MIN_DETECTION_SCORE: Final = 0.05
MIN_SIDE_PX: Final = 10
SHORT_SIDE_SHARE: Final = 0.4

OPENING_S: Final = 1.0  # from the first sight of anybody: the time in which the person is chosen
NEAR_S: Final = 2.0  # a person who is back within this time is looked for near the place
FORGET_S: Final = 10.0  # somebody else who comes back later counts as a new person
CONTINUOUS_S: Final = 0.35  # nobody takes another's place within so short a time
FRESH_S: Final = 0.7
_EARLY_S: Final = 0.3  # the choosing pass may have looked later
UNCONFIRMED_S: Final = 1.0  # how long good poses carry on without any detection

# Cosine of two descriptions. Measured: the same person half a second later 0.84 or more (99 %, toy
# people who turn), different people in the same place 0.63 or less (99 %), three footballers in one
# picture 0.40 to 0.61, two clips of real people over three seconds 0.89 or more.
SIMILAR: Final = 0.7
STRONG: Final = 0.82
_NOT_UNLIKE: Final = 0.6
# Between these two a look counts more and more, up to more than any overlap: people who changed
# places behind one another get their own boxes back as soon as they can be told apart.
_UNLIKE, _ALIKE = 0.55, 0.85
_LOOK_WEIGHT: Final = 1.5
_STAND_IN: Final = 0.01  # factor on the merits of somebody who came later
_CLEAR: Final = 0.3  # a smaller lead over exchanged persons decides nothing
_MARGIN: Final = 0.05  # smaller differences decide nothing
_SAME_LOOK: Final = 0.9
_MAX_LOOKS: Final = 3
_CERTAIN_SIGHTS: Final = 3
_LOOK_RATE: Final = 0.1  # share of a new sight in the memory of a look

_BESIDE: Final = 0.25  # widths of the box on either side that tell the background
_MIN_BESIDE_PX: Final = 2
_LEAST_OWN: Final = 0.25  # share that a colour of the background keeps: clothes may have it too

_LIGHTNESS_BINS: Final = 6
_COLOUR_BINS: Final = 16
# Shared parts of boxes.
_APART: Final = 0.1
_TOUCHING: Final = 0.3
_SAME_PLACE: Final = 0.5
_DOUBLE: Final = 0.7  # two boxes for one person

# Scene cuts, on two frames of 36 x 64 pixels. A mean absolute difference of the greys of 25 % is a
# cut (pose page section 12). Of less, a picture is another one if its middle is found nowhere in
# the frame before and its colours are others. Measured: cuts between 24 rendered rooms correlate up
# to 0.59 and share up to 0.86 of the colours; neighbours in four clips of real people, pans of 10 %
# of the frame and sudden changes of the light correlate at least 0.71; pans of 20 % share 0.95.
_CUT_DIFFERENCE: Final = 0.25 * 255
_CUT_CHANGE: Final = 0.04 * 255  # noise and most movements change a picture less
_CUT_CORRELATION: Final = 0.6
_CUT_COLOURS: Final = 0.9
_SMALL_SIZE: Final = (36, 64)
_MIDDLE: Final = (slice(8, 28), slice(14, 50))
_VELOCITY_S: Final = 0.25  # time constant of the measured velocity
_COAST_S: Final = 0.5  # and of its decay while nobody is seen

_BODY_ROWS: Final = slice(0, 17)
_MOVING_ROWS: Final = slice(0, 23)  # body and feet
_FACE_ROWS: Final = slice(23, 91)
_EXTENT_ROWS: Final = slice(0, 91)  # the face too: a close-up has little else
_NUM_BEST: Final = 5  # body points that a half-length portrait and a back view have as well
_CONFIDENT_SHARE: Final = 0.6  # of the drawing threshold: 0.3 where 0.5 is drawn
_POSE_BOX_SCALE: Final = 1.2
_OUTSIDE_SCALE: Final = 1.5
_MAX_WEAK: Final = 2
_JUMP: Final = 0.08  # farthest median movement of a body, in longest sides of its box, and
_JUMP_PER_S: Final = 2.5  # what every second allows in addition
_CROSSING_SCALE: Final = 1.1  # people who almost touch overlap before the next look
_CROSSING_SHARE: Final = 0.02
_CROSSING_S: Final = 1.0
_MIN_RIVAL_AREA: Final = 0.15  # a spectator far behind is mistaken for nobody
_POSE_BOX_WEIGHT: Final = 0.6  # of the pose just found; the rest is the predicted box


def choose_box(boxes: Floats, scores: Floats) -> int | None:
    """The person that the released preprocessing picks from one frame: nearly always the largest.

    Boxes are gone through by falling score. One becomes the choice if its area exceeds that of the
    choice so far, unless its longest side is below 40 % of the choice's longest side, or of the
    longest side of all as long as there is no choice.

    Args:
        boxes: [P, 4], persons only.
        scores: [P].

    Returns:
        Position in `boxes`; None without a box that is finite, scores above 0.05 and measures at
        least 10 pixels each way.

    Source: pose page section 2; `person_choice_cases`.
    """
    order = [i for i in _canonical_order(boxes, scores) if scores[i] > MIN_DETECTION_SCORE]
    if not order:
        return None
    sides = boxes[:, 2:] - boxes[:, :2]  # [P, 2]
    chosen, chosen_area, longest = None, 0.0, float(sides[order].max())
    for index in order:
        area, long_side = float(sides[index].prod()), float(sides[index].max())
        if area > chosen_area and long_side >= SHORT_SIDE_SHARE * longest:
            chosen, chosen_area, longest = index, area, long_side
    return chosen


def describe(frame_u8: FrameU8, boxes: Floats) -> Looks:
    """How the persons in some boxes look: colours of the torso and of the legs.

    Colours that are there beside the box as well count for less.

    Args:
        frame_u8: [H, W, 3] uint8 RGB.
        boxes: [P, 4].

    Returns:
        [P, D] float32 of length 1; the scalar product of two is near 1 for the same clothes. Zeros
        for a box that is not finite.
    """
    looks = np.empty((len(boxes), 2 * _LIGHTNESS_BINS * _COLOUR_BINS**2), np.float32)
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if not np.isfinite(boxes[index]).all():
            looks[index] = 0.0
            continue
        parts, width = [], x1 - x0
        for top, bottom in ((0.15, 0.55), (0.55, 0.9)):
            rows = y0 + top * (y1 - y0), y0 + bottom * (y1 - y0)
            shares = _shares(_thinned(frame_u8, (x0 + 0.25 * width, x0 + 0.75 * width), rows))
            beside = [
                _thinned(frame_u8, columns, rows).reshape(-1, 3)
                for columns in ((x0 - _BESIDE * width, x0), (x1, x1 + _BESIDE * width))
                if min(columns[1], frame_u8.shape[1]) - max(columns[0], 0) >= _MIN_BESIDE_PX
            ]
            if beside:
                # Arms that are spread leave much room for the background, which is not theirs.
                own = shares - _shares(np.concatenate(beside)[None])
                shares = np.maximum(own, _LEAST_OWN * shares)
                shares /= shares.sum()
            parts.append(np.sqrt(shares).ravel())
        looks[index] = np.concatenate(parts) / math.sqrt(2)
    return looks


@dataclass(eq=False)
class Track:
    """One person over time.

    Attributes:
        track_id: Never given to anybody else.
        start_s: Time of the first sight.
        first_box: [4] box of the first sight.
        time_s: Time of the last sight.
        box: [4] box of the last sight.
        looks: [G, D] up to three descriptions, for instance front and back.
        velocity: [2] of the box's centre [px/s].
        placed: False after a cut, until seen again: the old place says nothing.
        totals: [7] sums over all sights: box (4), area, score, number of sights.
        opening: The same over the time in which the person to follow is chosen.
        last_look: Number of the detector's look with the last sight.
        confirmed_s: When it was no single glimpse any more, such as half an arm at the frame's edge
            or a mistake of the detector; None for such a one.
    """

    track_id: int
    start_s: float
    first_box: Floats
    time_s: float
    box: Floats
    looks: Looks
    velocity: Floats = field(default_factory=lambda: np.zeros(2))
    placed: bool = True
    totals: Floats = field(default_factory=lambda: np.zeros(7))
    opening: Floats = field(default_factory=lambda: np.zeros(7))
    last_look: int = -1
    confirmed_s: float | None = None

    @property
    def num_sights(self) -> int:
        """How many detections belong to the person."""
        return int(self.totals[6])

    @property
    def mean_box(self) -> Floats:
        """[4] mean over all sights."""
        return np.asarray(self.totals[:4] / max(self.totals[6], 1))

    def predict(self, time_s: float) -> Floats:
        """[4] where the box should be by now; the last movement fades out within a second."""
        elapsed_s = max(time_s - self.time_s, 0.0)
        shift = self.velocity * _COAST_S * (1 - math.exp(-elapsed_s / _COAST_S))
        return np.asarray(self.box + np.concatenate([shift, shift]))

    def observe(self, box: Floats, time_s: float) -> None:
        """Move to a box that was seen."""
        elapsed_s = time_s - self.time_s
        if elapsed_s > NEAR_S or not self.placed:
            self.velocity = np.zeros(2)
        elif elapsed_s > 0:
            measured = (_centres(box) - _centres(self.box)) / elapsed_s
            self.velocity += (measured - self.velocity) * (1 - math.exp(-elapsed_s / _VELOCITY_S))
        self.box, self.time_s, self.placed = box.copy(), time_s, True

    def count(self, look: int, time_s: float) -> bool:
        """Take down in which look of the detector the person was seen; True if now confirmed."""
        again = self.last_look == look - 1 or self.num_sights >= _CERTAIN_SIGHTS
        is_new = again and self.confirmed_s is None and self.last_look >= 0
        if is_new:
            self.confirmed_s = time_s
        self.last_look = look
        return is_new

    def remember(self, look: Looks) -> None:
        """Let a new sight change the memory a little, or enter it beside the older looks."""
        likeness = self.looks @ look
        nearest = int(likeness.argmax())
        if likeness[nearest] >= _SAME_LOOK:
            mixed = (1 - _LOOK_RATE) * self.looks[nearest] + _LOOK_RATE * look
            self.looks[nearest] = mixed / np.linalg.norm(mixed)
            return
        # The first look stays for good: it belongs to the person who was chosen.
        kept = self.looks if len(self.looks) < _MAX_LOOKS else np.delete(self.looks, 1, axis=0)
        self.looks = np.concatenate([kept, look[None]])


class Tracks:
    """All persons of a video, from detections alone.

    Args:
        height: Frame height [px].
        width: Frame width [px].
        min_score: Score from which a detection that belongs to nobody starts a new person.

    Attributes:
        tracks: Persons who are remembered, and glimpses.
        num_ids: How many ids were given away.
        num_looks: Calls of `update`.
        num_people: Persons who were confirmed, also those forgotten since.
    """

    def __init__(self, height: int, width: int, *, min_score: float = 0.3) -> None:
        self.height, self.width, self.min_score = height, width, min_score
        self.tracks: list[Track] = []
        self.num_ids = self.num_looks = self.num_people = 0
        self.followed_id = -1  # who is never forgotten; -1 for nobody
        self.opening_start_s: float | None = None
        self.opening_done = False

    def update(self, time_s: float, boxes: Floats, scores: Floats, looks: Looks) -> list[int]:
        """Tell who is who among the detections of one frame.

        Args:
            time_s: Time of the frame, later than the one before.
            boxes: [P, 4] in any order; none is fine.
            scores: [P].
            looks: [P, D] from `describe`.

        Returns:
            [P] track ids; -1 for a box that is nobody: not finite, tiny, a double, or too doubtful.
        """
        # float64 is what a restored state holds.
        boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
        order = _canonical_order(boxes, scores)
        ids = [-1] * len(boxes)
        self.num_looks += 1
        if self.opening_start_s is not None:
            self.opening_done = time_s >= self.opening_start_s + OPENING_S
        if not order:
            return ids
        boxes, scores, looks = boxes[order], scores[order], looks[order]
        shared = _shared_parts(boxes, boxes)  # [P, P]
        np.fill_diagonal(shared, 0.0)
        known = [track for track in self.tracks if self._is_remembered(track, time_s)]
        matches, disputed, contested = self._match(known, time_s, boxes, looks)
        pairs = list(zip(known, matches, strict=True))
        for track, index in pairs:
            if index < 0:
                continue
            self._absorb(track, boxes[index], time_s, [t for t, i in pairs if i < 0])
            track.observe(boxes[index], time_s)
            ids[order[index]] = track.track_id
            whole = not any(_touched_edges(boxes[index], self.height, self.width))
            if shared[index].max() < _APART and whole and index not in contested:
                track.remember(looks[index])
        # Ids of one frame follow the size, so that 0 is the largest person at the start.
        areas = _areas(boxes)
        doubles = _ious(boxes, boxes) >= _DOUBLE
        for index in np.argsort(-areas, kind="stable").tolist():
            taken = [i for i, position in enumerate(order) if ids[position] >= 0]
            doubtful = index in taken or index in disputed or bool(doubles[index, taken].any())
            # Half behind somebody: rather who was lost there, and may not look like it yet.
            if shared[index].max() >= _SAME_PLACE:
                lost = [t for t, i in pairs if i < 0 and t.placed and t.time_s >= time_s - NEAR_S]
                places = np.array([t.predict(time_s) for t in lost]).reshape(-1, 4)
                doubtful |= bool((_ious(boxes[[index]], places) >= _TOUCHING).any())
            if scores[index] >= self.min_score and not doubtful:
                seen_ids = [ids[position] for position in order]
                glimpse = self._glimpse(boxes[index], time_s, seen_ids)
                if glimpse is None:
                    ids[order[index]] = self._start(time_s, boxes[index], looks[index])
                else:
                    glimpse.observe(boxes[index], time_s)
                    glimpse.looks = looks[[index]].copy()
                    ids[order[index]] = glimpse.track_id
        for index, position in enumerate(order):
            if ids[position] >= 0:
                seen = np.array([*boxes[index], areas[index], scores[index], 1.0])
                track = self.find(ids[position])
                track.totals += seen
                track.opening += 0.0 if self.opening_done else seen
                self.num_people += track.count(self.num_looks, time_s)
        return ids

    def find(self, track_id: int) -> Track:
        """The person with this id."""
        return next(track for track in self.tracks if track.track_id == track_id)

    def ranked(self) -> list[Track]:
        """Persons in the order of `--person`: those of the opening second by falling size, others.

        The size is the mean area. Whoever was there in less than half of the frames comes after the
        steady ones: a detector flickers. Later persons follow in the order in which they are
        confirmed, so that nobody's number changes by what comes later. Who was seen in a single
        look of the detector is left out, unless there is nobody else.
        """
        steady, opening_start_s = self.steady(), self.opening_start_s or 0.0

        def place(track: Track) -> tuple[float, bool, float, int]:
            seen, confirmed_s = track.opening[6], track.confirmed_s
            if not seen or (confirmed_s or 0.0) >= opening_start_s + OPENING_S:
                return confirmed_s or math.inf, False, 0.0, track.track_id
            return -math.inf, track not in steady, -track.opening[4] / seen, track.track_id

        certain = [track for track in self.tracks if track.confirmed_s is not None]
        return sorted(certain or self.tracks, key=place)

    def steady(self) -> list[Track]:
        """Persons seen in at least half of the frames of the opening second, as seen most often."""
        most = max((track.opening[6] for track in self.tracks), default=0.0)
        return [track for track in self.tracks if most and 2 * track.opening[6] >= most]

    def rewound(self) -> "Tracks":
        """The same persons with their ids and looks, each waiting where first seen."""
        again = Tracks(self.height, self.width, min_score=self.min_score)
        again.num_ids, again.num_looks = self.num_ids, self.num_looks
        again.num_people = self.num_people
        again.tracks = [
            Track(
                t.track_id,
                t.start_s,
                t.first_box,
                t.start_s,
                t.first_box.copy(),
                t.looks.copy(),
                confirmed_s=t.confirmed_s,
            )
            for t in self.tracks
        ]
        return again

    def _start(self, time_s: float, box: Floats, look: Looks) -> int:
        track_id = self.num_ids
        self.num_ids += 1
        # Not with a box too doubtful to start anybody: nobody would be there to choose from.
        if self.opening_start_s is None:
            self.opening_start_s = time_s
        self.tracks.append(
            Track(track_id, time_s, box.copy(), time_s, box.copy(), look[None].copy())
        )
        return track_id

    def _glimpse(self, box: Floats, time_s: float, seen_ids: list[int]) -> Track | None:
        """Who was glimpsed in the look before in a part of this box, perhaps an arm that came in.

        Nobody is mixed up by that: a glimpse is not yet anybody.
        """
        for track in self.tracks:
            is_fresh = track.last_look == self.num_looks - 1 and time_s - track.time_s <= FRESH_S
            is_fresh &= track.confirmed_s is None
            is_free = track.track_id not in (self.followed_id, *seen_ids)
            if is_fresh and is_free:
                place = track.predict(time_s)
                if _shared_parts(place[None], box[None])[0, 0] >= _SAME_PLACE:
                    return track
        return None

    def _absorb(self, elder: Track, box: Floats, time_s: float, unseen: list[Track]) -> None:
        """Who turns out to be the person lost before is not somebody else any more."""
        for other in unseen:
            younger = other.start_s > elder.time_s and other.track_id != self.followed_id
            place = _ious(other.predict(time_s)[None], box[None])[0, 0]
            if younger and place >= _SAME_PLACE and other in self.tracks:
                elder.totals += other.totals
                elder.opening += other.opening
                self.num_people -= other.confirmed_s is not None
                self.tracks.remove(other)

    def _is_remembered(self, track: Track, time_s: float) -> bool:
        elapsed_s = time_s - track.time_s
        return -_EARLY_S <= elapsed_s <= FORGET_S or track.track_id == self.followed_id

    def _match(
        self, tracks: list[Track], time_s: float, boxes: Floats, looks: Looks
    ) -> tuple[list[int], set[int], set[int]]:
        """Who is who.

        Returns:
            [K] position of each track's detection or -1; the positions that are in dispute; and
            those that somebody who is not seen might have had as well.
        """
        merits = np.zeros((len(tracks), len(boxes)))
        likeness = np.zeros_like(merits)
        for row, track in enumerate(tracks):
            likeness[row] = (track.looks @ looks.T).max(axis=0)
            merits[row] = _merits(track, time_s, boxes, likeness[row])
        # Somebody who came after another was lost may be that other, if the look says so.
        present, rivals = np.zeros_like(merits), merits > 0
        for row, track in enumerate(tracks):
            if track.track_id != self.followed_id:
                elder = [track.start_s > other.time_s for other in tracks]
                claimed = (rivals[elder] & (likeness[elder] >= STRONG)).any(axis=0)
                merits[row, claimed] *= _STAND_IN
                rivals[row, claimed] = False
                if claimed.any():
                    continue  # not on to the next box, where somebody else may be
            if track.placed and time_s - track.time_s <= CONTINUOUS_S:
                present[row] = merits[row]
        disputed = set[int]()
        while True:
            # Nobody who comes back pushes somebody away who was there all the time.
            matches = _assign(present)
            taken = [index for index in matches if index >= 0]
            free = merits.copy()
            free[:, taken] = 0.0
            free[[index >= 0 for index in matches]] = 0.0
            matches = [max(pair) for pair in zip(matches, _assign(free), strict=True)]
            unclear = [
                row
                for row, index in enumerate(matches)
                if index >= 0
                and not (
                    _is_clear(row, matches, merits, likeness, rivals)
                    if tracks[row].placed and time_s - tracks[row].time_s <= NEAR_S
                    else _is_alone(row, matches, likeness, tracks)
                )
            ]
            if not unclear:
                unseen = [index < 0 for index in matches]
                contested = np.flatnonzero(rivals[unseen].any(axis=0)).tolist()
                return matches, disputed, set(contested)
            disputed |= {matches[row] for row in unclear}
            merits[unclear] = present[unclear] = 0.0


def choose_track(
    tracks: Tracks, select: Select = "size", person: int | None = None
) -> Track | None:
    """The person to follow, from what was seen in the opening second.

    Args:
        tracks: Fed with the detections of at least the opening second.
        select: "size" applies the rule of `choose_box` to the mean boxes, "centre" takes the
            person nearest to the middle of the picture, "left" and "right" the outermost in the
            picture; among those who were there at least half of the time.
        person: Position in `Tracks.ranked`, from 0; goes before `select`.

    Returns:
        The track; None if nobody was seen.

    Raises:
        SettingsError: If there is no person of that number.

    Source: pose page sections 2 and 13.
    """
    if not tracks.tracks:
        return None
    if person is not None:
        ranked = tracks.ranked()
        if not 0 <= person < len(ranked):
            seen = "1 person was" if len(ranked) == 1 else f"{len(ranked)} persons were"
            raise SettingsError(
                f"--person {person} was given, but {seen} found. "
                f"Give a number from 0 to {len(ranked) - 1}; --list-persons shows them."
            )
        return ranked[person]
    steady = tracks.steady()
    means = np.array([track.opening / track.opening[6] for track in steady])  # [K, 7]
    boxes, scores = means[:, :4], means[:, 5]
    if select == "size":
        chosen = choose_box(boxes, scores)
        return steady[0 if chosen is None else chosen]
    x_px = _centres(boxes)[:, 0]
    keys = {"centre": np.abs(x_px - tracks.width / 2), "left": x_px, "right": -x_px}
    return steady[int(keys[select].argmin())]


class Tracker:
    """Follows one person.

    For every frame of the video, in order:

        if tracker.start_frame(frame_index, time_s, frame_u8):
            detections = detector.detect(frame_u8)
            tracker.update_detections(detections.boxes, detections.scores, frame_u8)
        box = tracker.box_for_pose()  # None: nobody, the frame stays empty
        if box is not None:
            keypoints = ...
            use_them = tracker.update_pose(keypoints)

    A lost person is taken up again under the same id if found within two seconds near the place
    and looking alike, or later anywhere if looking very much alike, with nobody dressed alike
    beside. With `reacquire="any"` somebody else takes over after two seconds, or at once behind a
    cut; that is counted as a switch.

    Args:
        tracks: Persons of the choosing pass. They are met again at the places of first sight.
        track_id: Who is followed.
        body_threshold: Score from which the pose model's body points are drawn.
        detect_every: Frames from one look of the detector to the next while nothing is doubtful.
        reacquire: Whether somebody else may take over.

    Attributes:
        followed_id: Track id of the person who is followed now.
        lost: Whether that person is out of sight.
        num_frames: Frames started.
        num_detections: Frames at which the detector looked.
        num_cuts: Scene cuts. Nothing may be smoothed or interpolated across one.
        switches: Each with `frame_index`, `time_s`, `from_id`, `to_id`.
        lost_spans: [first, end) frame indices without the person; None ends one that goes on.

    Source: pose page sections 12 and 13.
    """

    def __init__(
        self,
        tracks: Tracks,
        track_id: int,
        *,
        body_threshold: float = 0.5,
        detect_every: int = 8,
        reacquire: Reacquire = "same",
    ) -> None:
        self.tracks = tracks.rewound()
        self.tracks.followed_id = track_id
        self.body_threshold, self.detect_every = body_threshold, detect_every
        self.reacquire: Reacquire = reacquire
        self.lost = True
        self.num_frames = self.num_detections = self.num_cuts = 0
        self.switches: list[dict[str, float]] = []
        self.lost_spans: list[list[int | None]] = []
        self._frame_index, self._time_s = -1, 0.0
        self._small = np.zeros((0, 0, 3), np.uint8)  # the frame before
        self._points = np.zeros((0, 3))  # [23, 3] body and feet of the last accepted pose
        self._points_s = self._confirmed_s = 0.0
        self._detected_at: int | None = None  # frame index of the detector's last look
        self._sighted = False  # by the detector, in this frame
        self._num_weak = 0  # poses refused in a row
        self._cut_here = False
        self._doubtful = False  # the last pose asks for a look in the next frame

    @property
    def followed_id(self) -> int:
        """Track id of the person who is followed now."""
        return self.tracks.followed_id

    def start_frame(self, frame_index: int, time_s: float, frame_u8: FrameU8) -> bool:
        """Go to the next frame.

        Args:
            frame_index: Rises by one.
            time_s: Rises.
            frame_u8: [H, W, 3] uint8 RGB.

        Returns:
            Whether the detector has to look; then `update_detections` must follow. It may follow
            in other frames as well.
        """
        small = _shrunk(frame_u8)
        cut = self._small.size > 0 and _is_cut(self._small, small)
        if cut:
            self.num_cuts += 1
            self._points = self._points[:0]
            for track in self.tracks.tracks:
                track.placed = False
        self._small, self._cut_here = small, cut
        self._frame_index, self._time_s, self._sighted = int(frame_index), float(time_s), False
        self.num_frames += 1
        since_s = time_s - self._followed.time_s
        if self._detected_at is None:
            self.lost_spans = [[frame_index, None]]
        wanted = (
            cut
            or self._detected_at is None
            or frame_index - self._detected_at >= self.detect_every
            or (0 <= since_s <= NEAR_S if self.lost else self._doubtful or self._is_crossing())
        )
        return wanted

    def update_detections(self, boxes: Floats, scores: Floats, frame_u8: FrameU8) -> Floats | None:
        """Find the followed person among the detections of the current frame.

        Args:
            boxes: [P, 4] in any order; none is fine.
            scores: [P].
            frame_u8: The frame given to `start_frame`.

        Returns:
            [4] the person's box as detected; None if the person is not among them.
        """
        ids = self.tracks.update(self._time_s, boxes, scores, describe(frame_u8, boxes))
        self.num_detections += 1
        self._detected_at, self._doubtful = self._frame_index, False
        self._forget_strangers()
        if self.followed_id not in ids:
            self._miss()
            successor = self._successor(ids, boxes, scores)
            if successor is None:
                return None
            self.switches.append(
                {
                    "frame_index": self._frame_index,
                    "time_s": self._time_s,
                    "from_id": self.followed_id,
                    "to_id": successor,
                }
            )
            self.tracks.followed_id = successor
        self._sighted, self._num_weak, self._confirmed_s = True, 0, self._time_s
        if self.lost:
            self._set_lost(False)
        return self._followed.box.copy()

    def box_for_pose(self) -> Floats | None:
        """Where the pose model has to look in the current frame.

        Returns:
            [4] the detector's box if it looked, else the box of the last poses, moved on; None
            while the person is lost.
        """
        if self.lost or not self._followed.placed:
            return None
        return self._followed.predict(self._time_s)

    def update_pose(self, keypoints: Floats) -> bool:
        """Judge a pose in the current frame and follow it.

        Args:
            keypoints: [133, 3] (x_px, y_px, score); rows that are not finite count as score 0.

        Returns:
            Whether it is the followed person's: False for low scores, a jump, or a pose that
            belongs to somebody who passes by.

        Raises:
            ValueError: If there is no box to judge by, because the person is lost.
        """
        box = self.box_for_pose()
        if box is None:
            raise ValueError("no pose can belong to a person who is lost")
        rows = np.where(np.isfinite(keypoints).all(axis=1, keepdims=True), keypoints, 0.0)
        points = np.asarray(rows[_EXTENT_ROWS], np.float64)
        strength = max(
            np.sort(points[_BODY_ROWS, 2])[-_NUM_BEST:].mean(), points[_FACE_ROWS, 2].mean()
        )
        confident = points[points[:, 2] >= _CONFIDENT_SHARE * self.body_threshold, :2]
        if strength < self.body_threshold:
            return self._refuse()
        extent = _scaled(
            np.concatenate([confident.min(axis=0), confident.max(axis=0)]), _POSE_BOX_SCALE
        )
        if not self._fits(extent, confident, box) or self._jumps(points, box):
            return self._refuse()
        self._num_weak = 0
        self._points, self._points_s = points[_MOVING_ROWS], self._time_s
        if not self._sighted:
            track = self._followed
            moved = box + _POSE_BOX_WEIGHT * (extent - box)
            entered = np.array(_touched_edges(moved, self.tracks.height, self.tracks.width))
            entered &= ~np.array(_touched_edges(track.box, self.tracks.height, self.tracks.width))
            changed = float(_ious(extent[None], box[None])[0, 0]) < _SAME_PLACE
            self._doubtful |= changed or bool(entered.any())
            track.observe(moved, self._time_s)
        return True

    def state(self) -> State:
        """Everything that the frames so far have left behind.

        Returns:
            JSON values and, as `looks`, `small` and `points`, numpy arrays. Written to a JSON file
            (Python's keeps every digit) and an npz file and given to `restore`, they continue with
            the same results, bit for bit.
        """
        return {
            "tracker": {k: copy.deepcopy(v) for k, v in vars(self).items() if k not in _ARRAYS},
            "persons": {k: v for k, v in vars(self.tracks).items() if k != "tracks"},
            "tracks": [
                {
                    key: value.tolist() if isinstance(value, np.ndarray) else value
                    for key, value in vars(track).items()
                    if key != "looks"
                }
                for track in self.tracks.tracks
            ],
            "num_looks": [len(track.looks) for track in self.tracks.tracks],
            "looks": np.concatenate([track.looks for track in self.tracks.tracks]),
            "small": self._small.copy(),
            "points": self._points.copy(),
        }

    @classmethod
    def restore(cls, state: State) -> "Tracker":
        """The tracker that `state` was taken from, after the same frame."""
        tracker = object.__new__(cls)
        vars(tracker).update(copy.deepcopy(state["tracker"]))
        tracker._small = np.array(state["small"], np.uint8)
        tracker._points = np.array(state["points"], np.float64)
        tracker.tracks = Tracks(0, 0)
        vars(tracker.tracks).update(state["persons"])
        first = 0
        for plain, num_looks in zip(state["tracks"], state["num_looks"], strict=True):
            values: State = {k: np.array(v) if isinstance(v, list) else v for k, v in plain.items()}
            values["looks"] = np.array(state["looks"][first : first + num_looks], np.float32)
            tracker.tracks.tracks.append(Track(**values))
            first += num_looks
        return tracker

    @property
    def _followed(self) -> Track:
        return self.tracks.find(self.followed_id)

    def _is_crossing(self) -> bool:
        """Whether somebody of comparable size overlaps the followed person, or soon may."""
        own = self._followed
        if not own.placed:
            return False
        box = _scaled(own.predict(self._time_s), _CROSSING_SCALE)
        for other in self.tracks.tracks:
            recent = other.placed and 0 <= self._time_s - other.time_s <= _CROSSING_S
            if other is own or not recent:
                continue
            theirs = other.predict(self._time_s)
            comparable = _areas(theirs) >= _MIN_RIVAL_AREA * _areas(own.box)
            if comparable and _shared_parts(box[None], theirs[None])[0, 0] > _CROSSING_SHARE:
                return True
        return False

    def _miss(self) -> None:
        """The detector does not see the person: wait a little on good poses, or give up."""
        unconfirmed = self._time_s - self._confirmed_s > UNCONFIRMED_S
        hopeless = unconfirmed or not self._followed.placed or self._num_weak >= _MAX_WEAK
        self._doubtful = True
        if not self.lost and (hopeless or self._is_crossing()):
            self._set_lost(True)

    def _set_lost(self, lost: bool) -> None:
        self.lost = lost
        self._points = self._points[:0]
        if lost:
            self.lost_spans.append([self._frame_index, None])
        elif self.lost_spans[-1][0] == self._frame_index:
            self.lost_spans.pop()
        else:
            self.lost_spans[-1][1] = self._frame_index

    def _successor(self, ids: list[int], boxes: Floats, scores: Floats) -> int | None:
        """Who takes over, if that is allowed and it is time."""
        waited = self._time_s - self._followed.time_s >= NEAR_S
        # Behind a cut, waiting brings nothing.
        if self.reacquire == "same" or not self.lost or not (waited or self._cut_here):
            return None
        known = [index for index, track_id in enumerate(ids) if track_id >= 0]
        chosen = choose_box(boxes[known], scores[known])
        return None if chosen is None else ids[known[chosen]]

    def _forget_strangers(self) -> None:
        """Leave out people who left long ago; memory stays constant over hours."""
        self.tracks.tracks = [
            track
            for track in self.tracks.tracks
            if track.track_id == self.followed_id or self._time_s - track.time_s <= FORGET_S
        ]

    def _refuse(self) -> bool:
        self._num_weak += 1
        self._doubtful = True
        return False

    def _fits(self, extent: Floats, confident: Floats, box: Floats) -> bool:
        """Whether a pose lies in its box, and not better in the box of somebody else."""
        x0, y0, x1, y1 = _scaled(box, _OUTSIDE_SCALE)
        x, y = confident.T
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        if 2 * inside.sum() < len(confident):
            return False
        others = [
            track.box
            for track in self.tracks.tracks
            if track.track_id != self.followed_id and track.placed and track.time_s == self._time_s
        ]
        own = _ious(extent[None], box[None])[0, 0]
        return not others or bool(_ious(extent[None], np.array(others)).max() <= own + _MARGIN)

    def _jumps(self, points: Floats, box: Floats) -> bool:
        """Whether the body moved farther than a body does since the last accepted pose."""
        elapsed_s = self._time_s - self._points_s
        confirmed = self._sighted and not self._is_crossing()  # the detector says so as well
        if confirmed or not len(self._points) or elapsed_s > UNCONFIRMED_S:
            return False
        points = points[_MOVING_ROWS]
        both = np.minimum(points[:, 2], self._points[:, 2])
        both = both >= _CONFIDENT_SHARE * self.body_threshold
        if both.sum() < _NUM_BEST:
            return False
        moved_px = np.linalg.norm(points[both, :2] - self._points[both, :2], axis=1)
        limit_px = (_JUMP + _JUMP_PER_S * elapsed_s) * (box[2:] - box[:2]).max()
        return bool(np.median(moved_px) > limit_px)


_ARRAYS: Final = ("tracks", "_small", "_points")


def _merits(track: Track, time_s: float, boxes: Floats, likeness: Floats) -> Floats:
    """[P] how well detections continue a track; 0 where they cannot."""
    elapsed_s = time_s - track.time_s
    overlap = _ious(track.predict(time_s)[None], boxes)[0]
    look = _LOOK_WEIGHT * np.clip((likeness - _UNLIKE) / (_ALIKE - _UNLIKE), 0, 1)
    if elapsed_s < -_EARLY_S:
        return np.zeros(len(boxes))
    if not track.placed:
        stayed = (elapsed_s <= FRESH_S) & (overlap >= _SAME_PLACE) & (likeness >= SIMILAR)
        return np.where(stayed | (likeness >= STRONG), look + overlap * stayed, 0.0)
    if elapsed_s > NEAR_S:
        return np.where(likeness >= STRONG, look, 0.0)
    long_side = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    own_side = float((track.box[2:] - track.box[:2]).max())
    distance = np.minimum(
        np.linalg.norm(_centres(boxes) - _centres(track.box), axis=1),
        np.linalg.norm(_centres(boxes) - _centres(track.predict(time_s)), axis=1),
    )
    near = (
        (distance <= (0.5 + 0.5 * elapsed_s) * own_side)
        & (long_side <= 2 * own_side)
        & (own_side <= 2 * long_side)
    )
    possible = near & (likeness >= SIMILAR)
    if 0 <= elapsed_s <= FRESH_S:
        possible |= (overlap >= _TOUCHING) & (likeness >= _NOT_UNLIKE)
    if 0 <= elapsed_s <= CONTINUOUS_S:  # whatever the light does
        possible |= overlap >= _SAME_PLACE
    return np.where(possible, look + overlap, 0.0)


def _is_clear(
    row: int, matches: list[int], merits: Floats, likeness: Floats, rivals: NDArray[np.bool_]
) -> bool:
    """Whether the match of a row holds against the next best explanation.

    Args:
        row: Of the track.
        matches: [K] column of each row, or -1.
        merits: [K, P].
        likeness: [K, P].
        rivals: [K, P] which tracks could have had which detection.
    """
    index, own = matches[row], likeness[row, matches[row]]
    for rival, theirs in enumerate(matches):
        if rival == row or not rivals[rival, index]:
            continue
        if theirs < 0:
            # One box where two people were: whom it shows is for the look to say.
            lead = own - likeness[rival, index]
            if lead < -_MARGIN or (lead < _MARGIN and own < SIMILAR):
                return False
        elif merits[row, theirs] > 0:
            # Two boxes for two people: what if they were exchanged?
            lead = merits[row, index] + merits[rival, theirs]
            lead -= merits[row, theirs] + merits[rival, index]
            if lead < _CLEAR and own < STRONG:
                return False
    return True


def _is_alone(row: int, matches: list[int], likeness: Floats, tracks: list[Track]) -> bool:
    """Whether nobody dressed alike stands beside somebody brought back by the look alone.

    People who were known before the loss are no matter: they are where they are seen to be.
    """
    familiar = {
        index
        for track, index in zip(tracks, matches, strict=True)
        if track.start_s <= tracks[row].time_s
    }
    strangers = [index for index in range(likeness.shape[1]) if index not in familiar]
    return bool((likeness[row, strangers] <= likeness[row, matches[row]] - _MARGIN).all())


def _canonical_order(boxes: Floats, scores: Floats) -> list[int]:
    """Positions of the usable boxes by falling score; equal scores by their coordinates."""
    sides = boxes[:, 2:] - boxes[:, :2]
    usable = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    usable &= (sides >= MIN_SIDE_PX).all(axis=1)
    order = np.lexsort((*boxes.T, -scores))
    return [int(index) for index in order if usable[index]]


def _centres(boxes: Floats) -> Floats:
    """[..., 2] of [..., 4]."""
    return np.asarray((boxes[..., :2] + boxes[..., 2:]) / 2)


def _areas(boxes: Floats) -> Floats:
    """[...] of [..., 4]."""
    return np.asarray((boxes[..., 2:] - boxes[..., :2]).prod(axis=-1))


def _scaled(box: Floats, factor: float) -> Floats:
    """[4] a box whose sides are longer by a factor, about the same centre."""
    half = (box[2:] - box[:2]) / 2 * factor
    return np.concatenate([_centres(box) - half, _centres(box) + half])


def _shared_areas(first: Floats, second: Floats) -> Floats:
    """[N, P] area that boxes [N, 4] and [P, 4] have in common."""
    near = np.maximum(first[:, None, :2], second[None, :, :2])
    far = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.asarray(np.maximum(far - near, 0.0).prod(axis=2))


def _ious(first: Floats, second: Floats) -> Floats:
    """[N, P] shared area as part of the area that either covers."""
    shared = _shared_areas(first, second)
    return np.asarray(shared / (_areas(first)[:, None] + _areas(second)[None] - shared))


def _shared_parts(first: Floats, second: Floats) -> Floats:
    """[N, P] shared area as part of the smaller box."""
    smaller = np.minimum(_areas(first)[:, None], _areas(second)[None])
    return np.asarray(_shared_areas(first, second) / smaller)


def _touched_edges(box: Floats, height: int, width: int) -> tuple[bool, bool, bool, bool]:
    """Whether a box reaches the left, upper, right and lower edge of the frame."""
    x0, y0, x1, y1 = box.tolist()
    return x0 <= 1, y0 <= 1, x1 >= width - 1, y1 >= height - 1


def _thinned(frame_u8: FrameU8, columns: tuple[float, float], rows: tuple[float, float]) -> FrameU8:
    """About 24 x 24 single pixels of a region: fast, good for colours."""
    height, width = frame_u8.shape[:2]
    left, top = min(max(int(columns[0]), 0), width - 1), min(max(int(rows[0]), 0), height - 1)
    right = min(max(int(columns[1]), left + 1), width)
    bottom = min(max(int(rows[1]), top + 1), height)
    down, across = max((bottom - top) // 24, 1), max((right - left) // 24, 1)
    return np.ascontiguousarray(frame_u8[top:bottom:down, left:right:across])


def _shrunk(frame_u8: FrameU8) -> FrameU8:
    """[36, 64, 3] of a frame, from about 72 x 128 single pixels."""
    height, width = frame_u8.shape[:2]
    pixels = np.ascontiguousarray(frame_u8[:: max(height // 72, 1), :: max(width // 128, 1)])
    return np.asarray(cv2.resize(pixels, _SMALL_SIZE[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def _is_cut(before_u8: FrameU8, after_u8: FrameU8) -> bool:
    """Whether one small frame [36, 64, 3] shows another scene than the other."""
    greys = [cv2.cvtColor(frame_u8, cv2.COLOR_RGB2GRAY) for frame_u8 in (before_u8, after_u8)]
    if cv2.absdiff(*greys).mean() > _CUT_DIFFERENCE:
        return True
    if cv2.absdiff(before_u8, after_u8).mean() <= _CUT_CHANGE:
        return False
    before, after = (cv2.GaussianBlur(frame_u8, (0, 0), 1.0) for frame_u8 in (before_u8, after_u8))
    # Wherever the camera went meanwhile, and both ways, since one of the two middles may be plain.
    found = min(
        cv2.matchTemplate(frame, other[_MIDDLE], cv2.TM_CCOEFF_NORMED).max()
        for frame, other in ((before, after), (after, before))
    )
    if found >= _CUT_CORRELATION:
        return False
    shares = (_shares(before_u8), _shares(after_u8))
    return bool(np.sqrt(shares[0] * shares[1]).sum() < _CUT_COLOURS)


def _shares(patch_u8: FrameU8) -> Floats:
    """[6, 16, 16] a blurred histogram of the colours in Lab; its sum is 1."""
    lab = cv2.cvtColor(patch_u8, cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(np.intp)
    lightness = lab[:, 0] * _LIGHTNESS_BINS // 256
    # Clothes have chroma within 64 of grey (128); what is beyond counts as 64.
    colour = np.clip((lab[:, 1:] - 64) // (128 // _COLOUR_BINS), 0, _COLOUR_BINS - 1)
    cells = (lightness * _COLOUR_BINS + colour[:, 0]) * _COLOUR_BINS + colour[:, 1]
    shape = (_LIGHTNESS_BINS, _COLOUR_BINS, _COLOUR_BINS)
    shares = np.bincount(cells, minlength=math.prod(shape)).reshape(shape) / len(cells)
    # A little light or shadow moves a colour into the next cell.
    return np.asarray(np.tensordot(_BLUR_LIGHTNESS, _BLUR_COLOUR @ shares @ _BLUR_COLOUR.T, axes=1))


def _blur(size: int) -> Floats:
    """[size, size] weights 1/4, 1/2, 1/4; what would leave at an end stays there."""
    weights = np.eye(size) / 2 + (np.eye(size, k=1) + np.eye(size, k=-1)) / 4
    weights[[0, -1], [0, -1]] = 0.75
    return weights


_BLUR_LIGHTNESS, _BLUR_COLOUR = _blur(_LIGHTNESS_BINS), _blur(_COLOUR_BINS)


def _assign(merits: Floats) -> list[int]:
    """The pairs of rows and columns with the largest sum; pairs of merit 0 are not made.

    Args:
        merits: [K, P], not negative.

    Returns:
        [K] column of each row, or -1.

    Source: shortest augmenting paths, Jonker and Volgenant (1987).
    """
    num_rows, num_columns = merits.shape
    # One more column per row, of merit 0: to stay alone.
    costs = np.concatenate([-merits, np.zeros((num_rows, num_rows))], axis=1)
    row_prices, prices = np.zeros(num_rows), np.zeros(costs.shape[1])
    owners = np.full(costs.shape[1], -1)
    for new_row in range(num_rows):
        distance = np.full(costs.shape[1], np.inf)
        came_from = np.full(costs.shape[1], -1)
        done = np.zeros(costs.shape[1], bool)
        row, column, length = new_row, -1, 0.0
        while row >= 0:
            through = length + costs[row] - row_prices[row] - prices
            better = ~done & (through < distance)
            distance[better], came_from[better] = through[better], column
            column = int(np.where(done, np.inf, distance).argmin())
            done[column], length = True, distance[column]
            row = int(owners[column])
        reached = done.copy()
        reached[column] = False
        row_prices[owners[reached]] += length - distance[reached]
        row_prices[new_row] += length
        prices[done] -= length - distance[done]
        while came_from[column] >= 0:
            owners[column] = owners[came_from[column]]
            column = int(came_from[column])
        owners[column] = new_row
    matches = [-1] * num_rows
    for column, row in enumerate(owners[:num_columns].tolist()):
        if row >= 0 and merits[row, column] > 0:
            matches[row] = column
    return matches
