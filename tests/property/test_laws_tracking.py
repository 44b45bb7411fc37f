"""Laws of following a person and of smoothing, over generated scenes."""

import io
import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from everanimate_cli.smoothing import BoxFilter, KeypointFilter, fill_gap
from everanimate_cli.tracking import Tracker, Tracks, choose_box, choose_track, describe

Floats = NDArray[np.float64]

HEIGHT, WIDTH = 72, 128
FPS = 12.5
seeds = st.integers(0, 2**32 - 1)


class Scene:
    """People who wander, hide, flash up and are cut away; the same for the same seed."""

    def __init__(self, seed: int, num_frames: int) -> None:
        rng = np.random.default_rng(seed)
        num_people = int(rng.integers(1, 4))
        self.colours = rng.integers(0, 256, (num_people, 3))
        starts = rng.uniform(-10, WIDTH - 20, num_people)
        speeds = rng.uniform(-30, 30, num_people)  # px/s
        self.frames: list[NDArray[np.uint8]] = []
        self.boxes: list[Floats] = []
        self.scores: list[Floats] = []
        grey = 120
        for index in range(num_frames):
            if rng.random() < 0.05:
                grey = int(rng.integers(0, 256))
            frame = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
            boxes = []
            for start, speed, colour in zip(starts, speeds, self.colours, strict=True):
                x0 = start + speed * index / FPS
                y0 = 10 + 3 * np.sin(index + start)
                frame[int(y0) : 68, max(int(x0), 0) : max(int(x0) + 26, 0)] = colour
                if rng.random() < 0.85:
                    boxes.append((x0, y0, x0 + 26, 68))
            if rng.random() < 0.1:
                boxes.append((np.nan, 0, 20, 20))
            self.frames.append(frame)
            self.boxes.append(rng.permutation(np.array(boxes, np.float64).reshape(-1, 4)))
            self.scores.append(rng.uniform(0.1, 1.0, len(boxes)))
        self.weak = rng.random(num_frames) < 0.15
        self.noise = rng.normal(0, 0.5, (num_frames, 133, 2))
        self.spots = rng.uniform(0.1, 0.9, (133, 2))

    def pose(self, index: int, box: Floats) -> Floats:
        keypoints = np.empty((133, 3))
        keypoints[:, :2] = box[:2] + self.spots * (box[2:] - box[:2]) + self.noise[index]
        keypoints[:, 2] = 0.2 if self.weak[index] else 0.9
        keypoints[index % 133] = np.nan
        return keypoints

    def opening(self) -> Tracks:
        tracks = Tracks(HEIGHT, WIDTH)
        for index, (frame, boxes, scores) in enumerate(
            zip(self.frames, self.boxes, self.scores, strict=True)
        ):
            tracks.update(index / FPS, boxes, scores, describe(frame, boxes))
        return tracks

    def follow(self, tracker: Tracker, indices: range) -> list[Any]:
        """All that a tracker says about some frames."""
        said: list[Any] = []
        for index in indices:
            wanted = tracker.start_frame(index, index / FPS, self.frames[index])
            if wanted:
                tracker.update_detections(self.boxes[index], self.scores[index], self.frames[index])
            box = tracker.box_for_pose()
            used = box is not None and tracker.update_pose(self.pose(index, box))
            said.append((wanted, None if box is None else box.tolist(), used, tracker.followed_id))
        said.append((tracker.num_detections, tracker.num_cuts))
        said.append(json.dumps([tracker.switches, tracker.lost_spans]))
        return said


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """A state after a JSON file and an npz file."""
    arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in state.items() if key not in arrays}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        return {**json.loads(json.dumps(plain)), **dict(loaded)}


def same(first: Any, second: Any) -> bool:
    """Equality of nested states with arrays."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return bool(first == second)


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    first_frames=st.integers(0, 30),
    reacquire=st.sampled_from(["same", "any"]),
    detect_every=st.integers(1, 8),
)
def test_a_restored_tracker_continues_bit_for_bit(
    seed: int, first_frames: int, reacquire: Any, detect_every: int
) -> None:
    scene = Scene(seed, 45)
    tracks = scene.opening()
    track = choose_track(tracks)
    if track is None:
        return
    tracker = Tracker(tracks, track.track_id, reacquire=reacquire, detect_every=detect_every)
    scene.follow(tracker, range(first_frames))
    restored = Tracker.restore(through_files(tracker.state()))
    assert same(restored.state(), tracker.state())
    rest = range(first_frames, 45)
    assert scene.follow(restored, rest) == scene.follow(tracker, rest)
    assert same(restored.state(), tracker.state())


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_the_order_of_detections_does_not_matter(seed: int) -> None:
    scene, shuffled = Scene(seed, 30), Scene(seed, 30)
    rng = np.random.default_rng(seed)
    first, second = Tracks(HEIGHT, WIDTH), Tracks(HEIGHT, WIDTH)
    for index, frame in enumerate(scene.frames):
        boxes, scores = scene.boxes[index], scene.scores[index]
        order = rng.permutation(len(boxes))
        shuffled.boxes[index], shuffled.scores[index] = boxes[order], scores[order]
        looks = describe(frame, boxes)
        ids = first.update(index / FPS, boxes, scores, looks)
        again = second.update(index / FPS, boxes[order], scores[order], looks[order])
        assert [ids[position] for position in order] == again
    chosen = choose_track(first)
    if chosen is not None:
        said = [
            one.follow(Tracker(tracks, chosen.track_id), range(30))
            for one, tracks in ((scene, first), (shuffled, second))
        ]
        assert said[0] == said[1]


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_ids_are_unique_and_never_used_again(seed: int) -> None:
    scene, tracks = Scene(seed, 30), Tracks(HEIGHT, WIDTH)
    known: dict[int, float] = {}
    for index, frame in enumerate(scene.frames):
        boxes = scene.boxes[index]
        ids = tracks.update(index / FPS, boxes, scene.scores[index], describe(frame, boxes))
        given_ids = [track_id for track_id in ids if track_id >= 0]
        assert len(set(given_ids)) == len(given_ids)
        new = sorted(set(given_ids) - known.keys())
        assert new == list(range(len(known), len(known) + len(new)))
        known.update({track_id: tracks.find(track_id).start_s for track_id in new})
        # The same id is the same person, from the same first sight on.
        assert all(known[t.track_id] == t.start_s for t in tracks.tracks)
    assert tracks.num_ids == len(known)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, reacquire=st.sampled_from(["same", "any"]))
def test_nobody_else_is_followed_without_a_word(seed: int, reacquire: Any) -> None:
    scene = Scene(seed, 45)
    tracks = scene.opening()
    track = choose_track(tracks)
    if track is None:
        return
    tracker = Tracker(tracks, track.track_id, reacquire=reacquire)
    followed = [said[3] for said in scene.follow(tracker, range(45))[:-2]]
    changes = [
        (index, before, after)
        for index, (before, after) in enumerate(
            zip([track.track_id, *followed], followed, strict=False)
        )
        if before != after
    ]
    told = [(s["frame_index"], s["from_id"], s["to_id"]) for s in tracker.switches]
    assert told == changes
    assert reacquire == "any" or not told


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_empty_frames_are_told(seed: int) -> None:
    scene = Scene(seed, 45)
    tracks = scene.opening()
    track = choose_track(tracks)
    if track is None:
        return
    tracker = Tracker(tracks, track.track_id)
    said = scene.follow(tracker, range(45))[:-2]
    empty = {index for index, (_, box, _, _) in enumerate(said) if box is None}
    spans = [(first, 45 if end is None else end) for first, end in tracker.lost_spans]
    assert empty == {index for first, end in spans for index in range(first, end)}
    assert spans == sorted(spans)


boxes = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(1, 300), st.integers(1, 300)),
    min_size=1,
    max_size=6,
    unique=True,
).map(lambda rows: np.array([(x, y, x + w, y + h) for x, y, w, h in rows], np.float64))


@given(boxes=boxes, seed=seeds)
def test_the_choice_does_not_depend_on_the_order(boxes: Floats, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.04, 0.3, 0.6, 0.9], len(boxes))
    order = rng.permutation(len(boxes))
    chosen, again = choose_box(boxes, scores), choose_box(boxes[order], scores[order])
    if chosen is None or again is None:
        assert chosen is again
    else:
        np.testing.assert_array_equal(boxes[chosen], boxes[order][again])


@given(boxes=boxes)
def test_nobody_chosen_is_much_smaller_than_another(boxes: Floats) -> None:
    chosen = choose_box(boxes, np.full(len(boxes), 0.9))
    sides = boxes[:, 2:] - boxes[:, :2]
    usable = (sides >= 10).all(axis=1)
    assert (chosen is None) == (not usable.any())
    if chosen is not None:
        larger = usable & (sides.prod(axis=1) > sides[chosen].prod())
        # Whatever is larger has too short a side, against the choice or one chosen before it.
        assert (sides[larger].max(axis=1) < 0.4 * sides[usable].max()).all()


def poses(seed: int, num_frames: int) -> Floats:
    """[S, 133, 3] wandering points, some of them doubtful or missing."""
    rng = np.random.default_rng(seed)
    result = np.empty((num_frames, 133, 3))
    result[..., :2] = 100 + rng.normal(0, 2, (num_frames, 133, 2)).cumsum(axis=0)
    result[..., 2] = rng.choice([0.1, 0.9], (num_frames, 133), p=[0.2, 0.8])
    result[rng.random((num_frames, 133)) < 0.02] = np.nan
    return result


BOX = np.array([20.0, 10.0, 90.0, 210.0])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, first_frames=st.integers(0, 15))
def test_a_restored_filter_continues_bit_for_bit(seed: int, first_frames: int) -> None:
    points = poses(seed, 20)
    point_filter, box_filter = KeypointFilter(), BoxFilter()

    def run(one: KeypointFilter, other: BoxFilter, indices: range) -> list[Any]:
        return [
            (
                one.update_points(points[i], i / FPS, BOX).tobytes(),
                other.update_box((10 + i, 20, 40 + i % 3, 60), i / FPS),
            )
            for i in indices
        ]

    run(point_filter, box_filter, range(first_frames))
    again, box_again = KeypointFilter(), BoxFilter()
    again.restore(point_filter.state())
    box_again.restore(box_filter.state())
    rest = range(first_frames, 20)
    assert run(again, box_again, rest) == run(point_filter, box_filter, rest)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, factor=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_the_size_of_a_video_does_not_matter(seed: int, factor: float) -> None:
    small, large = KeypointFilter(), KeypointFilter()
    for index, points in enumerate(poses(seed, 12)):
        found = small.update_points(points, index / FPS, BOX)
        enlarged = large.update_points(points * (factor, factor, 1), index / FPS, BOX * factor)
        np.testing.assert_array_equal(enlarged, found * (factor, factor, 1))


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_smoothed_point_lies_between_its_old_and_its_new_place(seed: int) -> None:
    point_filter = KeypointFilter()
    before = None
    for index, points in enumerate(poses(seed, 12)):
        np.nan_to_num(points, copy=False, nan=100.0)
        points[:, 2] = 0.9
        found = point_filter.update_points(points, index / FPS, BOX)
        if before is not None:
            low, high = np.minimum(before, points), np.maximum(before, points)
            assert ((found >= low - 1e-9) & (found <= high + 1e-9)).all()
        before = found


@given(seed=seeds, num_frames=st.integers(0, 12))
def test_gaps_are_filled_evenly(seed: int, num_frames: int) -> None:
    before, after = np.nan_to_num(poses(seed, 2), nan=0.0)
    path = np.stack([before, *fill_gap(before, after, num_frames), after])[..., :2]
    np.testing.assert_allclose(
        np.diff(path, axis=0) * (num_frames + 1), (after - before)[None, :, :2].repeat(
            num_frames + 1, axis=0
        ), rtol=0, atol=1e-9,
    )  # fmt: skip
