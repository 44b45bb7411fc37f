"""Who is who, who is followed, and when nobody is, in small drawn and rendered scenes."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from dances import dancer, group_frames, pixels
from numpy.typing import NDArray

from everanimate_cli import tracking
from everanimate_cli.errors import SettingsError
from everanimate_cli.toyworld import Actor, GroupFrame, ToyGroup
from everanimate_cli.tracking import Tracker, Tracks, choose_box, choose_track, describe

Floats = NDArray[np.float64]
FrameU8 = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]
People = Sequence[tuple[Box, Rgb]]

FPS = 25.0
HEIGHT, WIDTH = 120, 240
RED, BLUE, GREEN, YELLOW = (200, 30, 30), (40, 60, 210), (30, 160, 60), (220, 210, 40)
PURPLE = (150, 20, 170)
LEFT: Box = (20, 20, 60, 110)
MIDDLE: Box = (100, 15, 145, 112)
RIGHT: Box = (180, 20, 220, 110)


def picture(people: People, grey: int = 120) -> FrameU8:
    """[H, W, 3] flat people in a grey room, the last one in front."""
    frame = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
    for (x0, y0, x1, y1), rgb in people:
        frame[max(int(y0), 0) : int(y1), max(int(x0), 0) : int(x1)] = rgb
    return frame


def pose_in(box: Iterable[float], score: float = 0.9) -> Floats:
    """[133, 3] points whose extent is a detector's box without its margin."""
    x0, y0, x1, y1 = box
    spots = np.random.default_rng(3).uniform(0, 1, (133, 2))
    spots[5], spots[16] = (0, 0), (1, 1)
    keypoints = np.full((133, 3), score)
    centre, side = np.array([x0 + x1, y0 + y1]) / 2, np.array([x1 - x0, y1 - y0]) / 1.2
    keypoints[:, :2] = centre + (spots - 0.5) * side
    return keypoints


def moved(box: Box, x: float) -> Box:
    return box[0] + x, box[1], box[2] + x, box[3]


def boxes_of(people: People) -> Floats:
    return np.array([box for box, _ in people], np.float64).reshape(-1, 4)


def feed(tracks: Tracks, time_s: float, people: People, scores: Sequence[float] = ()) -> list[int]:
    boxes = boxes_of(people)
    looks = describe(picture(people), boxes)
    return tracks.update(time_s, boxes, np.array(scores or [0.9] * len(boxes)), looks)


def tracker_of(people: People, followed: int = 0, **options: Any) -> Tracker:
    """A tracker after a choosing pass of one frame; ids follow the size."""
    tracks = Tracks(HEIGHT, WIDTH)
    feed(tracks, 0.0, people)
    return Tracker(tracks, followed, **options)


class Watch:
    """Shows frames to a tracker, with detections in random order."""

    def __init__(self, tracker: Tracker, fps: float = FPS) -> None:
        self.tracker, self.fps, self.index = tracker, fps, -1
        self.asked: list[int] = []  # frames for which the detector was wanted
        self._rng = np.random.default_rng(7)

    def show(
        self,
        people: People,
        *,
        detected: People | None = None,
        pose: Floats | None = None,
        grey: int = 120,
    ) -> Box | None:
        """One frame; the detector sees all people and the pose model whoever is in its box.

        Returns:
            The box for the pose model; None if nobody is followed or the pose is refused.
        """
        self.index += 1
        frame = picture(people, grey)
        if self.tracker.start_frame(self.index, self.index / self.fps, frame):
            self.asked.append(self.index)
            boxes = self._rng.permutation(boxes_of(people if detected is None else detected))
            self.tracker.update_detections(boxes, np.full(len(boxes), 0.9), frame)
        box = self.tracker.box_for_pose()
        if box is None:
            return None
        accepted = self.tracker.update_pose(pose_in(box) if pose is None else pose)
        x0, y0, x1, y1 = box.tolist()
        return (x0, y0, x1, y1) if accepted else None

    def show_many(self, num_frames: int, people: People, **how: Any) -> list[Box | None]:
        return [self.show(people, **how) for _ in range(num_frames)]


class TestChooseBox:
    @pytest.mark.parametrize(
        "boxes",
        [[], [(0, 0, 9, 50)], [(0, 0, 50, 9)], [(np.nan, 0, 50, 50)], [(0, 0, np.inf, 50)]],
    )
    def test_nobody(self, boxes: list[Box]) -> None:
        rows = np.array(boxes, np.float64).reshape(-1, 4)
        assert choose_box(rows, np.full(len(rows), 0.9)) is None

    def test_a_broken_box_does_not_hide_a_good_one(self) -> None:
        rows = np.array([(np.nan, 0, 900, 900), LEFT], np.float64)
        assert choose_box(rows, np.array([0.9, 0.3])) == 1


class TestDescribe:
    def test_the_same_clothes_elsewhere_look_alike(self) -> None:
        red_left, red_right, blue = describe(
            picture([(LEFT, RED), (RIGHT, RED), (MIDDLE, BLUE)]),
            np.array([LEFT, RIGHT, MIDDLE], np.float64),
        )
        assert red_left @ red_right > 0.99
        assert red_left @ blue < 0.3
        assert np.linalg.norm(blue) == pytest.approx(1, abs=1e-5)

    def test_boxes_outside_or_broken(self) -> None:
        boxes = np.array([(-80, -50, -20, -5), (500, 500, 600, 700), (np.nan, 0, 9, 9)])
        looks = describe(picture([]), boxes)
        assert np.isfinite(looks).all()
        assert not looks[2].any()

    def test_the_background_between_spread_arms_is_not_the_person(self) -> None:
        """Two who hardly fill their boxes once looked alike before the same wall."""
        wide = (20, 20, 100, 110)
        looks = []
        for rgb in (RED, BLUE):
            for grey in (120, 200):
                frame = picture([((54, 20, 66, 110), rgb)], grey)
                looks.append(describe(frame, np.array([wide], np.float64))[0])
        likeness = np.array(looks) @ np.array(looks).T
        np.testing.assert_allclose(np.diag(likeness), 1, atol=1e-5)
        assert likeness[0, 2] < 0.5
        assert likeness[1, 3] < 0.5

    def test_somebody_dressed_alike_beside_takes_no_colours_away(self) -> None:
        alone = describe(picture([(MIDDLE, RED)]), boxes_of([(MIDDLE, RED)]))[0]
        people: People = [(MIDDLE, RED), (moved(MIDDLE, 46), RED)]
        pair = describe(picture(people), boxes_of(people))
        assert (pair @ alone > 0.95).all()


class TestTracks:
    def test_ids_of_the_first_frame_follow_the_size(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        assert feed(tracks, 0.0, [(LEFT, RED), (MIDDLE, BLUE)], [0.9, 0.4]) == [1, 0]

    def test_ids_are_not_used_again(self) -> None:
        """rtmlib's PoseTracker took ids for list positions: with one who left, they ran away."""
        tracks = Tracks(HEIGHT, WIDTH)
        feed(tracks, 0.0, [(MIDDLE, RED), (LEFT, BLUE)])
        for index in range(1, 10):
            assert feed(tracks, index / FPS, [(MIDDLE, RED)]) == [0]
        for index in range(10, 40):
            assert feed(tracks, index / FPS, [(RIGHT, GREEN), (MIDDLE, RED)]) == [2, 0]
        assert [track.track_id for track in tracks.tracks] == [0, 1, 2]
        assert tracks.num_ids == 3

    def test_a_person_who_comes_back_keeps_the_id(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        feed(tracks, 0.0, [(LEFT, RED)])
        assert feed(tracks, 4.0, [(RIGHT, BLUE), (MIDDLE, RED)]) == [1, 0]

    def test_times_and_means(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        feed(tracks, 0.0, [((0, 20, 40, 110), RED)])
        feed(tracks, 0.2, [((10, 20, 50, 110), RED)])
        feed(tracks, 0.4, [])
        (track,) = tracks.tracks
        assert (track.start_s, track.time_s, track.num_sights) == (0.0, 0.2, 2)
        np.testing.assert_array_equal(track.mean_box, (5, 20, 45, 110))

    def test_what_is_nobody(self) -> None:
        """Broken, tiny, a second box on somebody, and a score too low to start a person."""
        tracks = Tracks(HEIGHT, WIDTH)
        people = [
            (MIDDLE, RED),
            (moved(MIDDLE, 2), RED),
            ((0, 0, 5, 90), BLUE),
            ((np.nan, 0, 50, 90), RED),
            (LEFT, BLUE),
        ]
        boxes = boxes_of(people)
        looks = describe(picture([(MIDDLE, RED), (LEFT, BLUE)]), boxes)
        ids = tracks.update(0.0, boxes, np.array([0.9, 0.8, 0.9, 0.9, 0.2]), looks)
        assert ids == [0, -1, -1, -1, -1]

    def test_a_low_score_continues_a_person(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        feed(tracks, 0.0, [(MIDDLE, RED)])
        assert feed(tracks, 0.04, [(MIDDLE, RED)], [0.1]) == [0]

    def test_one_box_for_two_people_goes_to_whom_it_shows(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        for index in range(6):
            people = [(moved(MIDDLE, 8 * index - 40), RED), (moved(MIDDLE, 40 - 8 * index), BLUE)]
            red_id, blue_id = feed(tracks, index / FPS, people)
        assert feed(tracks, 6 / FPS, [(MIDDLE, BLUE)]) == [blue_id]
        assert red_id != blue_id

    def test_a_person_recognised_later_is_one_person(self) -> None:
        """Who came back in odd light got a new id, and gives it up with the light."""
        tracks = Tracks(HEIGHT, WIDTH)
        feed(tracks, 0.0, [(MIDDLE, RED)])
        for index in range(20):
            assert feed(tracks, 1 + index / FPS, [(MIDDLE, BLUE)]) == [1]
        assert feed(tracks, 2.0, [(MIDDLE, RED)]) == [0]
        (track,) = tracks.tracks
        assert track.num_sights == 22
        assert feed(tracks, 2.1, [(RIGHT, GREEN), (MIDDLE, RED)]) == [2, 0]


class TestChooseTrack:
    @staticmethod
    def opening() -> Tracks:
        """Left small, right a little larger, the largest in the middle from 0.2 s on."""
        tracks = Tracks(HEIGHT, WIDTH)
        for index in range(30):
            people = [((20, 40, 50, 110), RED), (RIGHT, BLUE)]
            if index >= 5:
                people.append((MIDDLE, GREEN))
            feed(tracks, index / FPS, people)
        return tracks

    @pytest.mark.parametrize(
        ("select", "x"), [("size", 100), ("centre", 100), ("left", 20), ("right", 180)]
    )
    def test_select(self, select: tracking.Select, x: float) -> None:
        tracks = self.opening()
        assert tracks.opening_done
        track = choose_track(tracks, select)
        assert track is not None
        assert track.first_box[0] == x

    @pytest.mark.parametrize(("person", "x"), [(0, 100), (1, 180), (2, 20)])
    def test_person_goes_by_size(self, person: int, x: float) -> None:
        track = choose_track(self.opening(), "left", person)
        assert track is not None
        assert track.first_box[0] == x

    def test_later_people_come_last(self) -> None:
        tracks = self.opening()
        for time_s in (3.0, 3.1):
            feed(tracks, time_s, [((60, 0, 100, 119), YELLOW), (RIGHT, BLUE)])
        assert [track.first_box[0] for track in tracks.ranked()] == [100, 180, 20, 60]

    def test_glimpses_are_nobody(self) -> None:
        """Half an arm at the edge was a person of its own in `--list-persons`."""
        tracks = self.opening()
        arm = ((230, 50, 240, 60), YELLOW)
        feed(tracks, 3.0, [(RIGHT, BLUE), arm])
        for index in range(5):
            feed(tracks, 3.1 + index / FPS, [(RIGHT, BLUE)])
        feed(tracks, 3.5, [(RIGHT, BLUE), ((60, 0, 100, 119), PURPLE)])
        assert len(tracks.tracks) == 5
        assert [track.first_box[0] for track in tracks.ranked()] == [100, 180, 20]
        feed(tracks, 3.6, [(RIGHT, BLUE), ((60, 0, 100, 119), PURPLE)])
        assert [track.first_box[0] for track in tracks.ranked()] == [100, 180, 20, 60]
        # Numbers stay: who becomes certain later comes later.
        for index in range(2):
            feed(tracks, 3.7 + index / FPS, [(RIGHT, BLUE), arm])
        assert [track.first_box[0] for track in tracks.ranked()] == [100, 180, 20, 60, 230]

    def test_a_single_look_is_enough_for_a_picture(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        feed(tracks, 0.0, [(LEFT, RED), (MIDDLE, BLUE)])
        assert [track.first_box[0] for track in tracks.ranked()] == [100, 20]

    def test_flicker_is_not_chosen(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        for index in range(25):
            flicker = [((60, 1, 200, 119), GREEN)] if index == 3 else []
            feed(tracks, index / FPS, [*flicker, (LEFT, RED)])
        chosen, first = choose_track(tracks), choose_track(tracks, person=0)
        assert chosen is first
        assert chosen is not None
        assert chosen.first_box[0] == 20

    def test_the_opening_waits_for_somebody(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        for index in range(50):
            feed(tracks, index / FPS, [(LEFT, RED)] if index < 3 else [], [0.1] * (index < 3))
            assert not tracks.opening_done
        assert choose_track(tracks) is None
        for time_s in (2.0, 2.3, 2.6):
            feed(tracks, time_s, [(LEFT, RED)])
        feed(tracks, 2.9, [(LEFT, RED), (MIDDLE, BLUE)])
        assert not tracks.opening_done
        feed(tracks, 3.0, [])
        assert tracks.opening_done
        assert choose_track(tracks) is tracks.find(0)

    @pytest.mark.parametrize("person", [3, -1])
    def test_no_such_person(self, person: int) -> None:
        expected = (
            f"--person {person} was given, but 3 persons were found. "
            "Give a number from 0 to 2; --list-persons shows them."
        )
        with pytest.raises(SettingsError, match=f"^{re.escape(expected)}$"):
            choose_track(self.opening(), "size", person)


class TestQuietVideo:
    def test_one_frame(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        assert watch.show([(MIDDLE, RED)]) == MIDDLE
        assert watch.tracker.num_detections == 1
        assert watch.tracker.lost_spans == []

    @pytest.mark.parametrize("detect_every", [1, 5, 8])
    def test_the_detector_looks_now_and_then(self, detect_every: int) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED), (LEFT, BLUE)], detect_every=detect_every))
        watch.show_many(21, [(MIDDLE, RED), (LEFT, BLUE)])
        assert watch.asked == list(range(0, 21, detect_every))
        assert watch.tracker.num_detections == len(watch.asked)

    def test_between_looks_the_box_follows_the_pose(self) -> None:
        """The extent of body, feet and face times 1.2, with a part of the box before."""
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        for index in range(8):
            person = moved(MIDDLE, 2 * index)
            box = watch.show([(person, RED)], pose=pose_in(person))
            assert box is not None
            assert np.abs(np.subtract(box, person)).max() <= (0 if index == 0 else 3)
        assert watch.asked == [0]

    def test_points_without_confidence_do_not_stretch_the_box(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        keypoints = pose_in(MIDDLE)
        keypoints[15] = (239, 119, 0.2)
        keypoints[91:] = (5, 5, 0.9)  # hands
        watch.show([(MIDDLE, RED)], pose=keypoints)
        watch.show([(MIDDLE, RED)], pose=keypoints)
        box = watch.show([(MIDDLE, RED)])
        np.testing.assert_allclose(box, MIDDLE, rtol=0, atol=1)

    def test_people_of_a_late_frame_are_waited_for(self) -> None:
        tracks = Tracks(HEIGHT, WIDTH)
        for index in range(20):
            feed(tracks, index / FPS, [(LEFT, BLUE)] + [(MIDDLE, RED)] * (index >= 12))
        red = tracks.tracks[1]
        watch = Watch(Tracker(tracks, red.track_id))
        assert watch.show_many(12, [(LEFT, BLUE)]) == [None] * 12
        found = watch.show_many(10, [(LEFT, BLUE), (MIDDLE, RED)])
        assert MIDDLE in found
        assert watch.tracker.lost_spans == [[0, 12 + found.index(MIDDLE)]]


class TestDoubt:
    def test_a_weak_pose_calls_the_detector(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show_many(2, [(MIDDLE, RED)])
        assert watch.show([(MIDDLE, RED)], pose=pose_in(MIDDLE, 0.3)) is None
        assert watch.show([(MIDDLE, RED)]) == MIDDLE
        assert watch.asked == [0, 3]

    def test_two_weak_poses_and_no_detection_lose_the_person(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show_many(2, [(MIDDLE, RED)])
        weak = pose_in(MIDDLE, 0.3)
        watch.show([], detected=[(MIDDLE, RED)], pose=weak)
        watch.show([], detected=[], pose=weak)
        assert not watch.tracker.lost
        watch.show([], detected=[], pose=weak)
        assert watch.tracker.lost
        assert watch.tracker.lost_spans == [[4, None]]

    def test_good_poses_outlast_a_blind_detector_for_a_second(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show([(MIDDLE, RED)])
        found = watch.show_many(40, [(MIDDLE, RED)], detected=[])
        for box in found[:24]:
            np.testing.assert_allclose(box, MIDDLE, rtol=0, atol=1e-9)
        assert found[26:] == [None] * 14

    def test_no_detections_at_all(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        assert watch.show_many(10, [(MIDDLE, RED)], detected=[]) == [None] * 10
        assert watch.tracker.lost_spans == [[0, None]]
        with pytest.raises(ValueError, match=r"^no pose can belong to a person who is lost$"):
            watch.tracker.update_pose(pose_in(MIDDLE))

    def test_some_points_that_are_not_finite(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        keypoints = pose_in(MIDDLE)
        keypoints[[0, 9, 40]] = (np.nan, np.inf, 0.9)
        assert watch.show_many(3, [(MIDDLE, RED)], pose=keypoints)[-1] is not None

    def test_no_finite_point(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        nothing = np.full((133, 3), np.nan)
        assert watch.show_many(3, [(MIDDLE, RED)], pose=nothing) == [None] * 3
        assert watch.asked == [0, 1, 2]
        assert watch.show([(MIDDLE, RED)]) == MIDDLE

    def test_a_jump_is_refused_until_the_detector_confirms_it(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show_many(3, [(MIDDLE, RED)])
        there = moved(MIDDLE, 25)
        assert watch.show([(there, RED)], pose=pose_in(there)) is None
        assert watch.show([(there, RED)], pose=pose_in(there)) == there
        assert watch.asked == [0, 4]

    def test_a_pose_outside_its_box_is_refused(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        assert watch.show([(MIDDLE, RED)], pose=pose_in(LEFT)) is None

    def test_reaching_the_border_calls_the_detector_once(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)]))
        for x in (0, 7, 14, 21, 22, 22, 22, 22):
            person = moved(RIGHT, x)
            watch.show([(person, RED)], pose=pose_in(person))
        assert watch.asked == [0, 5]

    def test_a_close_up_is_followed_by_its_face(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        keypoints = pose_in(MIDDLE)
        keypoints[:23, 2] = 0.1
        assert None not in watch.show_many(4, [(MIDDLE, RED)], pose=keypoints)


class TestLeaving:
    def test_back_within_two_seconds(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)]))
        watch.show_many(5, [(RIGHT, RED)])
        assert watch.show([], detected=[], pose=pose_in(RIGHT, 0.1)) is None
        watch.show_many(30, [], pose=pose_in(RIGHT, 0.1))
        back = moved(RIGHT, -15)
        assert watch.show([(back, RED)]) == back
        assert watch.tracker.followed_id == 0
        assert watch.tracker.switches == []
        ((first, end),) = watch.tracker.lost_spans
        assert (first, end) == (7, 36)

    def test_back_after_five_seconds_elsewhere(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)]))
        watch.show_many(5, [(RIGHT, RED)])
        watch.show_many(125, [], pose=pose_in(RIGHT, 0.1))
        assert LEFT in watch.show_many(10, [(LEFT, RED)])
        assert watch.tracker.followed_id == 0

    def test_the_detector_rests_when_the_person_stays_away(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)]))
        watch.show_many(5, [(RIGHT, RED)])
        watch.show_many(200, [], pose=pose_in(RIGHT, 0.1))
        late = [index for index in watch.asked if index > 100]
        assert set(np.diff(late)) == {8}

    def test_a_stranger_is_not_followed(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)]))
        watch.show_many(5, [(RIGHT, RED)])
        watch.show_many(10, [], pose=pose_in(RIGHT, 0.1))
        assert watch.show_many(100, [(RIGHT, BLUE)]) == [None] * 100

    def test_a_thin_stranger_in_the_same_place_is_not_followed(self) -> None:
        """With much background in their boxes they were one person."""
        red, blue = (((114, 15, 126, 112), rgb) for rgb in (RED, BLUE))
        box = (80, 15, 160, 112)
        tracks = Tracks(HEIGHT, WIDTH)
        looks = describe(picture([red]), np.array([box], np.float64))
        tracks.update(0.0, np.array([box], np.float64), np.array([0.9]), looks)
        watch = Watch(Tracker(tracks, 0))
        seen: dict[str, Any] = {"detected": [(box, RED)], "pose": pose_in(box)}
        assert None not in watch.show_many(5, [red], **seen)
        watch.show_many(10, [], pose=pose_in(box, 0.1))
        assert watch.show_many(60, [blue], **seen) == [None] * 60
        assert watch.show_many(9, [red], **seen)[-1] is not None

    def test_a_stranger_takes_over_after_two_seconds_if_allowed(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)], reacquire="any"))
        watch.show_many(5, [(RIGHT, RED)])
        # Not in the very next frame: that would be a cut, behind which nobody waits.
        found = watch.show_many(1, [], pose=pose_in(RIGHT, 0.1))
        found += watch.show_many(80, [(LEFT, BLUE)], pose=pose_in(RIGHT, 0.1))
        assert watch.tracker.num_cuts == 0
        assert watch.tracker.followed_id == 1
        (switch,) = watch.tracker.switches
        assert (switch["from_id"], switch["to_id"]) == (0, 1)
        # Last seen in frame 4; two seconds are 50 frames.
        assert 50 <= switch["frame_index"] - 4 < 50 + 8
        assert switch["time_s"] == switch["frame_index"] / FPS
        assert found[: int(switch["frame_index"]) - 5] == [None] * (int(switch["frame_index"]) - 5)

    def test_of_two_dressed_alike_nobody_is_taken(self) -> None:
        watch = Watch(tracker_of([(RIGHT, RED)]))
        watch.show_many(5, [(RIGHT, RED)])
        watch.show_many(70, [], pose=pose_in(RIGHT, 0.1))
        both = [(LEFT, RED), (MIDDLE, RED)]
        assert watch.show_many(20, both) == [None] * 20
        assert MIDDLE in watch.show_many(9, [(MIDDLE, RED)])

    def test_strangers_are_forgotten(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]), fps=2)
        for index in range(60):
            passer_by = [(LEFT, (index * 4, 255 - index * 4, 128))] if index % 4 == 0 else []
            watch.show([(MIDDLE, RED), *passer_by], pose=pose_in(MIDDLE))
        assert len(watch.tracker.tracks.tracks) < 12
        assert watch.tracker.followed_id == 0


class TestCuts:
    def test_somebody_else_behind_a_cut_is_not_followed(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show_many(3, [(MIDDLE, RED)])
        assert watch.show_many(30, [(MIDDLE, BLUE)], grey=250) == [None] * 30
        assert watch.asked[1] == 3
        assert watch.tracker.num_cuts == 1
        assert watch.show([(LEFT, RED)]) == LEFT
        assert watch.tracker.num_cuts == 2
        assert watch.tracker.lost_spans == [[3, 33]]

    def test_the_same_person_behind_a_cut(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show_many(3, [(MIDDLE, RED)])
        assert watch.show([(LEFT, RED), (RIGHT, BLUE)], grey=250) == LEFT

    def test_a_cut_lets_somebody_take_over_at_once(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)], reacquire="any"))
        watch.show_many(3, [(MIDDLE, RED)])
        assert watch.show([(LEFT, BLUE), (MIDDLE, GREEN)], grey=250) == MIDDLE
        assert watch.tracker.switches[0]["frame_index"] == 3
        assert watch.tracker.lost_spans == []

    @pytest.mark.parametrize("rooms", [(0, 7), (3, 4), (11, 20)])
    def test_a_cut_between_rooms_of_equal_brightness(self, rooms: tuple[int, int]) -> None:
        """Nobody noticed: until the next look of the detector a stranger was the person."""
        first, second = (
            group_frames([dancer(number)], 4, height=HEIGHT, width=WIDTH, room=room)
            for number, room in enumerate(rooms)
        )
        frames = pixels(first).astype(float), pixels(second).astype(float)
        # Brought to the same brightness, frame by frame.
        level = frames[0].mean()
        shown = np.concatenate([f * level / f.mean(axis=(1, 2, 3), keepdims=True) for f in frames])
        shown = shown.clip(0, 255).astype(np.uint8)
        greys = shown.mean(axis=(1, 2, 3))
        assert np.ptp(greys) < 6
        assert np.abs(np.diff(shown[3:5].mean(axis=3), axis=0)).mean() < 0.2 * 255
        boxes = [frame.figures[0].box[None] for frame in (*first, *second)]
        tracks = Tracks(HEIGHT, WIDTH)
        tracks.update(0.0, boxes[0], np.array([0.9]), describe(shown[0], boxes[0]))
        tracker, asked, found = Tracker(tracks, 0), [], []
        for index, frame in enumerate(shown):
            if tracker.start_frame(index, index / FPS, frame):
                asked.append(index)
                tracker.update_detections(boxes[index], np.array([0.9]), frame)
            found.append(tracker.box_for_pose() is not None)
        assert tracker.num_cuts == 1
        assert asked[:2] == [0, 4]
        assert found == [True] * 4 + [False] * 4

    @pytest.mark.parametrize("change", ["light", "dark", "red", "flash", "pan", "zoom"])
    def test_light_and_camera_are_no_cuts(self, change: str) -> None:
        frame = group_frames([dancer(0)], 1, height=288, width=512, room=7)[0].rgb
        after = {
            "light": frame * 1.3,
            "dark": frame * 0.6,
            "red": frame * (1.1, 0.6, 0.6),
            "flash": frame + 50.0,
            "pan": frame[:, 50:],
            "zoom": frame[20:-20, 36:-36],
        }[change]
        before = frame[:, :-50] if change == "pan" else frame
        watch = tracker_of([(MIDDLE, RED)])
        watch.start_frame(0, 0.0, before)
        watch.start_frame(1, 1 / FPS, np.asarray(after).clip(0, 255).astype(np.uint8))
        assert watch.num_cuts == 0

    def test_a_person_who_walks_through_is_no_cut(self) -> None:
        watch = Watch(tracker_of([((0, 0, 100, 120), RED)]))
        for index in range(10):
            person = (10.0 * index, 0.0, 100 + 10.0 * index, 120.0)
            watch.show([(person, RED)], pose=pose_in(person))
        assert watch.tracker.num_cuts == 0


class TestCrossing:
    """Two people who cross, the one followed behind or in front, in drawn boxes."""

    @staticmethod
    def people(index: int, behind: Rgb, front: Rgb) -> People:
        y = (15, 20)
        back, fore = 10 + 4.0 * index, 190 - 4.0 * index
        return [
            ((back, y[0], back + 40, 110), behind),
            ((fore, y[1], fore + 36, 112), front),
        ]

    @pytest.mark.parametrize("followed", [0, 1], ids=["behind", "in front"])
    @pytest.mark.parametrize("colours", [(RED, BLUE), (RED, RED)], ids=["unlike", "alike"])
    @pytest.mark.parametrize("hidden", [True, False])
    def test_nobody_is_mixed_up(
        self, followed: int, colours: tuple[Rgb, Rgb], hidden: bool
    ) -> None:
        watch = Watch(tracker_of(self.people(0, *colours), followed))
        seen = 0
        for index in range(45):
            people = self.people(index, *colours)
            (back, _), (fore, _) = people
            overlap = max(min(back[2], fore[2]) - max(back[0], fore[0]), 0) / 36
            visible = people[1:] if hidden and overlap > 0.7 else people
            own = people[followed][0]
            box = watch.show(people, detected=visible, pose=pose_in(own))
            if box is not None:
                seen += 1
                assert abs(box[0] - own[0]) < 12
            if overlap > 0:
                assert index in watch.asked
        assert seen >= (36 if hidden and not followed else 43)
        assert watch.tracker.followed_id == followed
        assert watch.tracker.switches == []
        assert watch.tracker.tracks.num_ids == 2

    def test_the_pose_of_a_passer_by_is_refused(self) -> None:
        """The pose model finds the person in front although it was sent to the one behind."""
        watch = Watch(tracker_of(self.people(0, RED, BLUE), 0))
        for index in range(17):
            people = self.people(index, RED, BLUE)
            assert watch.show(people, pose=pose_in(people[0][0])) is not None
        people = self.people(17, RED, BLUE)
        assert watch.show(people, pose=pose_in(people[1][0])) is None

    def test_small_people_far_behind_do_not_keep_the_detector_busy(self) -> None:
        spectators = [((95, 20, 106, 45), BLUE), ((135, 20, 146, 45), GREEN)]
        watch = Watch(tracker_of([*spectators, (MIDDLE, RED)]))
        watch.show_many(9, [*spectators, (MIDDLE, RED)])
        assert watch.asked == [0, 8]


class TestRendered:
    """Toy people who dance past one another, with boxes in random order."""

    NUM_FRAMES, RATE_FPS = 50, 12.5

    def group(self, first_seed: int, second_seed: int) -> list[GroupFrame]:
        walks = (
            ((0.0, -0.35, 0.0, 0.8), (4.0, 0.35, 0.0, 0.8)),
            ((0.0, 0.35, 0.0, 0.85), (4.0, -0.35, 0.0, 0.85)),
        )
        group = ToyGroup(
            [
                Actor(person_seed=seed, dance=seed + 10 + index, path=walk)
                for index, (seed, walk) in enumerate(
                    zip((first_seed, second_seed), walks, strict=True)
                )
            ],
            height=128,
            width=256,
            background_seed=3,
        )
        return list(group.frames(self.NUM_FRAMES, rate_fps=self.RATE_FPS))

    @staticmethod
    def shared(first: Floats, second: Floats) -> float:
        """Part of the first box that the second covers."""
        sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
        return float(np.maximum(sides, 0).prod() / (first[2:] - first[:2]).prod())

    @pytest.mark.parametrize("seeds", [(0, 6), (2, 8), (4, 4)], ids=["a", "b", "twins"])
    def test_the_followed_person_never_changes(self, seeds: tuple[int, int]) -> None:
        frames = self.group(*seeds)
        rng = np.random.default_rng(11)

        def detect(frame: GroupFrame) -> tuple[Floats, list[int]]:
            """Exact boxes in random order; whoever is nearly covered is missing."""
            behind, front = (figure.box for figure in frame.figures)
            who = rng.permutation([0, 1] if self.shared(behind, front) < 0.85 else [1]).tolist()
            return np.array([frame.figures[index].box for index in who]), who

        tracks = Tracks(128, 256)
        owners: dict[int, int] = {}
        for index in range(13):
            boxes, who = detect(frames[index])
            looks = describe(frames[index].rgb, boxes)
            ids = tracks.update(index / self.RATE_FPS, boxes, np.full(len(boxes), 0.9), looks)
            owners.update(zip(ids, who, strict=True))
        assert sorted(owners) == [0, 1]
        for track_id, person in owners.items():
            tracker, seen, orders = Tracker(tracks, track_id), 0, set()
            for index, frame in enumerate(frames):
                if tracker.start_frame(index, index / self.RATE_FPS, frame.rgb):
                    boxes, who = detect(frame)
                    found = tracker.update_detections(boxes, np.full(len(boxes), 0.9), frame.rgb)
                    orders.add(tuple(who))
                    if found is not None:
                        np.testing.assert_array_equal(found, frame.figures[person].box)
                box = tracker.box_for_pose()
                if box is None:
                    continue
                # A pose model finds whoever fills the box best; who stands in front has an edge.
                fit = [self.shared(box, figure.box) for figure in frame.figures]
                pictured = int(fit[1] + 0.1 > fit[0])
                if tracker.update_pose(frame.figures[pictured].keypoints):
                    assert pictured == person
                    seen += 1
            assert len(orders) == 3
            assert seen >= (40 if person == 0 else 48)
            assert tracker.followed_id == track_id
            assert tracker.switches == []


class TestState:
    def test_json_and_arrays_only(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED), (LEFT, BLUE)]))
        watch.show_many(12, [(MIDDLE, RED), (LEFT, BLUE)])
        state = watch.tracker.state()
        arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
        assert set(arrays) == {"looks", "small", "points"}
        plain = {k: v for k, v in state.items() if k not in arrays}
        assert json.loads(json.dumps(plain)) == plain

    def test_a_state_does_not_change_with_its_tracker(self) -> None:
        watch = Watch(tracker_of([(MIDDLE, RED)]))
        watch.show_many(3, [(MIDDLE, RED)])
        state = watch.tracker.state()
        before = repr(state)
        restored = Tracker.restore(state)
        watch.show_many(20, [(moved(MIDDLE, 10), RED)])
        Watch(restored).show_many(20, [(LEFT, BLUE)])
        assert repr(state) == before
