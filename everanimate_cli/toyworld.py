"""A procedural paper-doll world with exact keypoints.

Seeded people in clothes, rooms, cameras and dances: everything that the toy checkpoint learns and
everything that its tests look at is drawn here. A person is a chain of capsules around a textured
torso and a textured head; clothes and hair differ between front and back, so that a turn shows what
one picture cannot tell. One unit of length is the height of the person; x points to the right of
the picture, y up, z towards the camera.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from everanimate_cli import skeleton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]
    Points = NDArray[np.float64]

Camera = Literal["still", "moving"]

FRAME_RATE_FPS = 12.5
NUM_KEYPOINTS = 133
MIN_RENDER_SIZE_PX = (
    256  # drawn at least this large and then shrunk: soft edges, readable face crops
)
FACE_SIZE_PX = 32
VISIBLE_SCORE, HIDDEN_SCORE = 0.95, 0.1
MIN_HAND_PX = 8  # no estimator tells the fingers of a smaller hand apart
FACE_SCORE_THRESHOLD = 0.3

# Anatomy as fractions of the person's height, standing with arms down and facing the camera. A head
# of one quarter of the height keeps the face readable in thumbnails.
HEAD_RADIUS = 0.115
HEAD_CENTRE_Y = 0.885
SHOULDER_Y, HIP_Y = 0.735, 0.43
SHOULDER_X, HIP_X = 0.125, 0.075
UPPER_ARM, FOREARM, HAND = 0.165, 0.15, 0.05
THIGH, SHIN, FOOT = 0.20, 0.19, 0.085
TORSO_DEPTH = 0.085
ARM_RADIUS, LEG_RADIUS, HAND_RADIUS, SHOE_RADIUS = 0.036, 0.048, 0.036, 0.036

TEXTURE_ROWS, TEXTURE_COLUMNS = (
    24,
    96,
)  # latitude or height by longitude; column 0 is the middle of the back


@dataclass(frozen=True)
class Person:
    """How somebody looks.

    Attributes:
        torso: [TEXTURE_ROWS, TEXTURE_COLUMNS, 3] uint8 RGB, neck to hips by longitude.
        head: The same size, crown to chin by longitude, with eyes open and mouth closed.
        skin: RGB of hands, neck and, with short sleeves, the forearms.
        sleeve: RGB of the upper arms.
        forearm: RGB of the forearms.
        thigh: RGB of the thighs.
        shin: RGB of the shins.
        shoe: RGB of the shoes.
        hair: RGB of the hair.
        long_hair: Whether hair falls over the back.
        width: Factor on shoulders, hips and limb thickness, about 1.
        limb: Factor on the length of arms and legs, about 1.
        words: Description of the clothes, the world's captions.
    """

    torso: Frame
    head: Frame
    skin: tuple[int, int, int]
    sleeve: tuple[int, int, int]
    forearm: tuple[int, int, int]
    thigh: tuple[int, int, int]
    shin: tuple[int, int, int]
    shoe: tuple[int, int, int]
    hair: tuple[int, int, int]
    long_hair: bool
    width: float
    limb: float
    words: str


_HUES = {
    "red": 0.0, "orange": 0.08, "yellow": 0.15, "green": 0.33, "cyan": 0.5, "blue": 0.61,
    "purple": 0.77, "pink": 0.9,
}  # fmt: skip


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _named_colour(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    """A colour of clothes with the word for it."""
    kind = rng.random()
    if kind < 0.1:
        return "white", _rgb(rng.random(), 0.05, rng.uniform(0.85, 0.95))
    if kind < 0.2:
        return "black", _rgb(rng.random(), 0.2, rng.uniform(0.12, 0.22))
    name = str(rng.choice(list(_HUES)))
    hue = _HUES[name] + rng.uniform(-0.025, 0.025)
    return name, _rgb(hue, rng.uniform(0.55, 0.95), rng.uniform(0.5, 0.95))


def _torso_texture(
    rng: np.random.Generator, front: tuple[int, int, int], back: tuple[int, int, int]
) -> Frame:
    """Front and back colour, a pattern on the front and a sign on the back."""
    texture = np.empty((TEXTURE_ROWS, TEXTURE_COLUMNS, 3), np.uint8)
    texture[:] = back
    quarter = TEXTURE_COLUMNS // 4
    texture[:, quarter : 3 * quarter] = front
    accent = _named_colour(rng)[1]
    middle = TEXTURE_COLUMNS // 2
    pattern = rng.integers(5)
    if pattern == 1:  # two broad stripes
        texture[6:11, quarter : 3 * quarter] = accent
        texture[16:21, quarter : 3 * quarter] = accent
    elif pattern == 2:  # an open jacket
        texture[:, middle - 9 : middle + 9] = accent
    elif pattern == 3:  # a badge
        cv2.ellipse(texture, (middle, 10), (12, 6), 0, 0, 360, accent, -1)
    elif pattern == 4:  # upper and lower half
        texture[12:, quarter : 3 * quarter] = accent
    sign = _named_colour(rng)[1]
    if rng.random() < 0.6:  # a broad band or a cross over the back, seen only after a turn
        band = slice(8, 16)
        texture[band, :quarter] = sign
        texture[band, 3 * quarter :] = sign
    return texture


def _head_texture(
    rng: np.random.Generator, skin: tuple[int, int, int], hair: tuple[int, int, int]
) -> Frame:
    texture = np.empty((TEXTURE_ROWS, TEXTURE_COLUMNS, 3), np.uint8)
    texture[:] = skin
    middle = TEXTURE_COLUMNS // 2
    fringe = int(rng.integers(6, 9))
    texture[:fringe] = hair
    side = int(rng.integers(19, 24))
    texture[:19, : middle - side] = hair
    texture[:19, middle + side :] = hair
    return texture


def make_person(seed: int) -> Person:
    """The person with this seed."""
    rng = np.random.default_rng([seed, 1])
    skin = _rgb(rng.uniform(0.05, 0.09), rng.uniform(0.3, 0.6), rng.uniform(0.45, 0.95))
    hair_kinds = ((0.07, 0.7, 0.25), (0.1, 0.6, 0.75), (0.03, 0.8, 0.5), (0.6, 0.1, 0.12))
    hue, saturation, value = hair_kinds[int(rng.integers(len(hair_kinds)))]
    hair = _rgb(hue, saturation, value * rng.uniform(0.85, 1.1))
    front_word, front = _named_colour(rng)
    back_word, back = _named_colour(rng) if rng.random() < 0.7 else (front_word, front)
    leg_word, leg = _named_colour(rng)
    shoe = _named_colour(rng)[1]
    short_sleeves, shorts = rng.random() < 0.4, rng.random() < 0.25
    long_hair = bool(rng.random() < 0.4)
    words = (
        f"a person with {'long' if long_hair else 'short'} hair, {front_word} shirt, "
        f"{back_word} back, {leg_word} {'shorts' if shorts else 'trousers'}"
    )
    return Person(
        torso=_torso_texture(rng, front, back),
        head=_head_texture(rng, skin, hair),
        skin=skin,
        sleeve=front,
        forearm=skin if short_sleeves else front,
        thigh=leg,
        shin=skin if shorts else leg,
        shoe=shoe,
        hair=hair,
        long_hair=long_hair,
        width=float(rng.uniform(0.9, 1.12)),
        limb=float(rng.uniform(0.94, 1.06)),
        words=words,
    )


def make_background(seed: int, size_px: int) -> Frame:
    """A wall with large soft shapes over a floor.

    Args:
        seed: Which room.
        size_px: Height and width; a moving camera needs more than the frame.

    Returns:
        [size_px, size_px, 3] uint8 RGB.
    """
    rng = np.random.default_rng([seed, 2])
    grid = np.linspace(0, 1, size_px, dtype=np.float32)
    hue = rng.random()
    top = np.array(_rgb(hue, rng.uniform(0.1, 0.5), rng.uniform(0.45, 0.95)), np.float32)
    low_hue = hue + rng.uniform(-0.15, 0.15)
    bottom = np.array(_rgb(low_hue, rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.9)), np.float32)
    wall = top + (bottom - top) * grid[:, None, None]
    room = np.ascontiguousarray(np.broadcast_to(wall, (size_px, size_px, 3)))
    for _ in range(int(rng.integers(2, 5))):  # pictures, windows, lamps
        colour = _rgb(rng.random(), rng.uniform(0.2, 0.7), rng.uniform(0.3, 0.95))
        x, y = (int(v * size_px) for v in (rng.random(), rng.uniform(0.05, 0.6)))
        half_width, half_height = (int(v * size_px) for v in rng.uniform(0.06, 0.15, 2))
        if rng.random() < 0.5:
            cv2.ellipse(room, (x, y), (half_width, half_height), 0, 0, 360, colour, -1)
        else:
            corner = (x + half_width, y + half_height)
            cv2.rectangle(room, (x - half_width, y - half_height), corner, colour, -1)
    horizon = int(size_px * rng.uniform(0.68, 0.76))
    floor = np.array(_rgb(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.25, 0.8)), np.float32)
    shade = np.linspace(0.85, 1.1, size_px - horizon, dtype=np.float32)[:, None, None]
    room[horizon:] = floor * shade
    if rng.random() < 0.6:  # broad boards
        board = size_px // int(rng.integers(4, 7))
        for left in range(0, size_px, 2 * board):
            room[horizon:, left : left + board] *= 0.85
    blurred = cv2.GaussianBlur(room, (0, 0), size_px / 160)
    return np.clip(blurred, 0, 255).astype(np.uint8)


class Dance:
    """Smooth random motion: sways, steps, arm raises, turns, a talking and blinking face.

    Args:
        seed: Which dance.
        turn_after_s: Until then the person keeps facing the camera within 40 degrees; afterwards
            whole turns follow. None draws a dance that may turn at any time.
    """

    def __init__(self, seed: int, *, turn_after_s: float | None = None) -> None:
        rng = np.random.default_rng([seed, 3])
        self._rng = rng
        self.beat_hz = float(rng.uniform(0.45, 0.8))
        self.turn_after_s = turn_after_s
        self._arm_lift = [self._wave(0.1, 0.45, 2) for _ in range(2)]
        self._arm_forward = [self._wave(0.15, 0.6, 2) for _ in range(2)]
        self._elbow = [self._wave(0.15, 0.7, 2) for _ in range(2)]
        self._leg_side = [self._wave(0.1, 0.5, 1) for _ in range(2)]
        self._lean = self._wave(0.1, 0.5, 2)
        self._bow = self._wave(0.05, 0.3, 1)
        self._sway = self._wave(0.05, 0.3, 2)
        self._nod = self._wave(0.1, 0.6, 2)
        self._look = self._wave(0.1, 0.4, 2)
        self._yaw = self._wave(0.04, 0.14, 2)
        self._mouth = self._wave(0.6, 2.2, 2)
        self._blink_period_s = float(rng.uniform(1.5, 3.5))
        self._arm_range = rng.uniform(0.55, 1.0, 2)
        self._step = float(rng.uniform(0.15, 0.55))
        self._yaw_range = float(rng.choice([0.5, 1.2, 3.4], p=[0.3, 0.3, 0.4]))
        self._turn_speed = float(rng.uniform(0.5, 0.9) * rng.choice([-1, 1]))
        self._turn_every_s = float(rng.uniform(9.0, 14.0))

    def _wave(self, low_hz: float, high_hz: float, num_terms: int) -> Points:
        """Random (frequency, phase, weight) rows of one smooth signal within [-1, 1]."""
        frequency = self._rng.uniform(low_hz, high_hz, num_terms)
        phase = self._rng.uniform(0, 2 * np.pi, num_terms)
        weight = self._rng.uniform(0.5, 1.0, num_terms)
        return np.stack([frequency, phase, weight / weight.sum()])

    @staticmethod
    def _value(wave: Points, time_s: float) -> float:
        frequency, phase, weight = wave
        return float((weight * np.sin(2 * np.pi * frequency * time_s + phase)).sum())

    def yaw(self, time_s: float) -> float:
        """Heading in radians: 0 faces the camera, positive turns the person's left side away."""
        if self.turn_after_s is None:
            return self._yaw_range * self._value(self._yaw, time_s)
        swing = 0.6 * self._value(self._yaw, time_s)
        since_s = time_s - self.turn_after_s
        if since_s <= 0:
            return swing
        # One smooth whole turn at the start of every period.
        turns, into_s = divmod(since_s, self._turn_every_s)
        progress = min(into_s * abs(self._turn_speed) / (2 * np.pi), 1.0)
        smooth = progress * progress * (3 - 2 * progress)
        return swing + float(np.sign(self._turn_speed)) * 2 * np.pi * (turns + smooth)

    def face(self, time_s: float) -> tuple[float, bool]:
        """How far the mouth is open, 0 to 1, and whether the eyes are shut."""
        mouth = float(np.clip(0.5 + 0.7 * self._value(self._mouth, time_s), 0, 1))
        return mouth, time_s % self._blink_period_s < 0.17

    def joints(self, time_s: float, person: Person) -> dict[str, Points]:
        """Joint positions in the world.

        Returns:
            Name to [3]: head, neck, and left_/right_ shoulder, elbow, wrist, hip, knee, ankle, toe;
            `look` holds the heading and tilt of the head in its first two numbers.
        """
        value, width, limb = self._value, person.width, person.limb
        beat = np.sin(2 * np.pi * self.beat_hz * time_s)
        yaw = self.yaw(time_s)
        lean = 0.14 * value(self._lean, time_s)
        bow = 0.12 * value(self._bow, time_s)
        points: dict[str, Points] = {}
        bounce = 0.012 * np.cos(4 * np.pi * self.beat_hz * time_s)
        lowest = 0.0
        legs = {}
        for side, sign, index in (("left", 1.0, 0), ("right", -1.0, 1)):
            swing = self._step * beat * sign
            lift = max(0.0, swing)
            side_angle = 0.06 + 0.16 * max(0.0, value(self._leg_side[index], time_s))
            hip = np.array([sign * HIP_X * width, 0.0, 0.0])
            thigh = THIGH * limb * _direction(side_angle * sign, swing * 0.8)
            shin = SHIN * limb * _direction(side_angle * sign, swing * 0.8 - lift * 1.5)
            legs[side] = (hip, hip + thigh, hip + thigh + shin)
            lowest = min(lowest, float(legs[side][2][1]))
        hip_y = 0.04 - lowest + bounce
        for side, (hip, knee, ankle) in legs.items():
            for name, place in (("hip", hip), ("knee", knee), ("ankle", ankle)):
                points[f"{side}_{name}"] = place + np.array([0, hip_y, 0])
            points[f"{side}_toe"] = ankle + np.array([0, hip_y - 0.02, FOOT])
        spine = (SHOULDER_Y - HIP_Y) * np.array([np.sin(lean), np.cos(lean), np.sin(bow)])
        chest = np.array([0, hip_y, 0]) + spine
        across = np.array([np.cos(lean), -np.sin(lean), 0.0])
        points["neck"] = chest
        nod = 0.25 * value(self._nod, time_s)
        points["head"] = chest + (HEAD_CENTRE_Y - SHOULDER_Y) * np.array(
            [np.sin(lean + nod), np.cos(lean + nod), np.sin(bow)]
        )
        for side, sign, index in (("left", 1.0, 0), ("right", -1.0, 1)):
            raised = 0.5 + 0.5 * value(self._arm_lift[index], time_s)
            lift_angle = 0.15 + 2.75 * raised * self._arm_range[index]
            forward = 0.7 * value(self._arm_forward[index], time_s)
            bend = 0.9 * (0.5 + 0.5 * value(self._elbow[index], time_s))
            shoulder = chest + across * sign * SHOULDER_X * width
            upper = UPPER_ARM * limb * _direction(lift_angle * sign, forward)
            lower = FOREARM * limb * _direction((lift_angle + bend * 0.8) * sign, forward + bend)
            points[f"{side}_shoulder"] = shoulder
            points[f"{side}_elbow"] = shoulder + upper
            points[f"{side}_wrist"] = shoulder + upper + lower
        turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        place = np.array([0.12 * value(self._sway, time_s), 0.0, 0.0])
        placed = {name: turn @ point + place for name, point in points.items()}
        look = yaw + 0.35 * value(self._look, time_s)
        placed["look"] = np.array([look, lean * np.cos(yaw) + nod * np.cos(look), 0.0])
        return placed


def _direction(side_angle: float, forward_angle: float) -> Points:
    """Unit vector of a limb that hangs down, lifted sidewards and swung forwards (radians)."""
    down = np.cos(side_angle)
    return np.array(
        [np.sin(side_angle), -down * np.cos(forward_angle), down * np.sin(forward_angle)]
    )


class StandingPose(Dance):
    """No motion: upright, facing the camera, arms a little away from the body."""

    def __init__(self) -> None:
        super().__init__(0)

    def joints(self, time_s: float, person: Person) -> dict[str, Points]:  # noqa: ARG002
        """The same joints at every time."""
        width, limb = person.width, person.limb
        points = {
            "neck": np.array([0, SHOULDER_Y, 0.0]),
            "head": np.array([0, HEAD_CENTRE_Y, 0.0]),
            "look": np.zeros(3),
        }
        for side, sign in (("left", 1.0), ("right", -1.0)):
            hip = np.array([sign * HIP_X * width, 0.04 + (THIGH + SHIN) * limb * np.cos(0.06), 0.0])
            shoulder = np.array([sign * SHOULDER_X * width, SHOULDER_Y, 0.0])
            leg, arm = _direction(0.06 * sign, 0.0), _direction(0.35 * sign, 0.05)
            points[f"{side}_hip"] = hip
            points[f"{side}_knee"] = hip + THIGH * limb * leg
            points[f"{side}_ankle"] = hip + (THIGH + SHIN) * limb * leg
            points[f"{side}_toe"] = points[f"{side}_ankle"] + np.array([0, -0.02, FOOT])
            points[f"{side}_shoulder"] = shoulder
            points[f"{side}_elbow"] = shoulder + UPPER_ARM * limb * arm
            points[f"{side}_wrist"] = shoulder + (UPPER_ARM + FOREARM) * limb * arm
        return points

    def face(self, time_s: float) -> tuple[float, bool]:  # noqa: ARG002
        """Mouth closed, eyes open."""
        return 0.0, False


@dataclass(frozen=True)
class ToyFrame:
    """One moment of a toy video.

    Attributes:
        rgb: [H, W, 3] uint8, the picture.
        keypoints: [133, 3] float64 COCO-WholeBody in pixels of `rgb`: x, y, score.
        pose: [H, W, 3] uint8, the pose picture of those keypoints.
        face: [FACE_SIZE_PX, FACE_SIZE_PX, 3] uint8 face crop, black while the face is turned away.
    """

    rgb: Frame
    keypoints: Points
    pose: Frame
    face: Frame


class _Stage:
    """A room before a camera.

    Args:
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
        background_seed: Which room.
        camera: "moving" pans, zooms and shakes slowly.
        camera_seed: Which camera motion.
    """

    def __init__(
        self, *, height: int, width: int, background_seed: int, camera: Camera, camera_seed: int
    ) -> None:
        self.height, self.width = height, width
        self._scale = max(1, -(-MIN_RENDER_SIZE_PX // min(height, width)))
        canvas_px = max(height, width) * self._scale
        margin = 1.5 if camera == "moving" else 1.0
        self._background = make_background(background_seed, round(canvas_px * margin))
        self.camera = camera
        rng = np.random.default_rng([camera_seed, 4])
        self._camera_phase = rng.uniform(0, 2 * np.pi, 5)
        self._camera_hz = rng.uniform(0.02, 0.07, 5)
        self._camera_hz[3:] = rng.uniform(0.5, 1.0, 2)  # hand shake

    def room_at(self, time_s: float) -> Frame:
        """[H, W, 3] uint8: the room without a person, as the camera sees it at a moment."""
        room = self._room(*self._view(time_s))
        if self._scale == 1:
            return room
        return _shrink(room, self.height, self.width)

    def _view(self, time_s: float) -> tuple[float, float, float]:
        """Zoom and shift of the camera, the shift in parts of the frame."""
        if self.camera == "still":
            return 1.0, 0.0, 0.0
        signal = np.sin(2 * np.pi * self._camera_hz * time_s + self._camera_phase)
        shift_x, shift_y = (
            0.10 * signal[0] + 0.006 * signal[3],
            0.04 * signal[1] + 0.006 * signal[4],
        )
        return float(1.0 + 0.1 * signal[2]), float(shift_x), float(shift_y)

    def _room(self, zoom: float, shift_x: float, shift_y: float) -> Frame:
        """The canvas that people are drawn on, `_scale` times as large as the frame."""
        height, width = self.height * self._scale, self.width * self._scale
        size = self._background.shape[0]
        if self.camera == "still":
            top, left = (size - height) // 2, (size - width) // 2
            return self._background[top : top + height, left : left + width].copy()
        centre = np.array([size / 2, size / 2])
        matrix = np.array(
            [
                [zoom, 0, width * (0.5 + shift_x) - zoom * centre[0]],
                [0, zoom, height * (0.5 + shift_y) - zoom * centre[1]],
            ]
        )
        return np.asarray(
            cv2.warpAffine(
                self._background, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE
            ),
            np.uint8,
        )

    def _place(
        self, view: tuple[float, float, float], station: tuple[float, float, float]
    ) -> tuple[tuple[float, float], float]:
        """Where somebody stands on the canvas, and how many pixels their height has.

        Args:
            view: Zoom and shift of the camera.
            station: (x, y, scale): away from the middle in parts of the frame, and relative size.
        """
        zoom, shift_x, shift_y = view
        x, y, scale = station
        height, width = self.height * self._scale, self.width * self._scale
        origin = (
            width * (0.5 + shift_x) + width * x * zoom,
            height * 0.5
            + (0.45 * min(height, width)) * zoom
            + height * shift_y
            + height * y * zoom,
        )
        return origin, 0.86 * min(height, width) * zoom * scale

    def _to_frame(self, keypoints: Points, unit_px: float) -> None:
        """Canvas to frame pixels, in place; hands that became too small to tell get a low score."""
        if self._scale > 1:
            keypoints[:, :2] = (keypoints[:, :2] + 0.5) / self._scale - 0.5
        if HAND * unit_px / self._scale < MIN_HAND_PX:
            keypoints[91:, 2] = HIDDEN_SCORE


class ToyScene(_Stage):
    """A person who dances in a room before a camera.

    Args:
        person_seed: Who.
        dance: How they move; a seed or a ready dance.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
        background_seed: Which room; the person's seed if None.
        camera: "moving" pans, zooms and shakes slowly.
        camera_seed: Which camera motion; the person's seed if None.
    """

    def __init__(
        self,
        person_seed: int,
        dance: int | Dance,
        *,
        height: int = 64,
        width: int = 64,
        background_seed: int | None = None,
        camera: Camera = "still",
        camera_seed: int | None = None,
    ) -> None:
        super().__init__(
            height=height,
            width=width,
            background_seed=person_seed if background_seed is None else background_seed,
            camera=camera,
            camera_seed=person_seed if camera_seed is None else camera_seed,
        )
        self.person = make_person(person_seed)
        self.dance = Dance(dance) if isinstance(dance, int) else dance

    def frame_at(self, time_s: float) -> ToyFrame:
        """The world at a moment in seconds."""
        view = self._view(time_s)
        canvas = self._room(*view)
        joints = self.dance.joints(time_s, self.person)
        origin, unit_px = self._place(view, (0.0, 0.0, 1.0))
        mouth, eyes_shut = self.dance.face(time_s)
        _draw_person(canvas, self.person, joints, origin, unit_px, mouth, eyes_shut)
        keypoints = _keypoints(joints, self.person, origin, unit_px, mouth)
        box = None
        if keypoints[23:91, 2].mean() >= FACE_SCORE_THRESHOLD:
            box = skeleton.face_box(keypoints, *canvas.shape[:2])
        face = skeleton.crop_face(canvas, box, FACE_SIZE_PX)
        if self._scale > 1:
            canvas = _shrink(canvas, self.height, self.width)
        self._to_frame(keypoints, unit_px)
        pose = skeleton.draw_pose(keypoints, self.height, self.width)
        return ToyFrame(rgb=canvas, keypoints=keypoints, pose=pose, face=face)

    def frames(
        self, num_frames: int, *, start_s: float = 0.0, rate_fps: float = FRAME_RATE_FPS
    ) -> Iterator[ToyFrame]:
        """Consecutive frames at a constant rate."""
        for index in range(num_frames):
            yield self.frame_at(start_s + index / rate_fps)

    def reference(self) -> Frame:
        """[H, W, 3] uint8: the person standing still and facing the camera in the same room."""
        scene = object.__new__(ToyScene)
        scene.__dict__.update(self.__dict__)
        scene.dance = StandingPose()
        return scene.frame_at(0.0).rgb


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Somebody in a `ToyGroup`.

    Attributes:
        person_seed: Who.
        dance: How they move; a seed or a ready dance.
        path: Where they are: rows (time_s, x, y, scale) at rising times, straight lines between,
            and the first and last row hold before and after. x and y are the way from where a
            `ToyScene` has its person, in parts of the frame, to the right and down; at x = 1.2
            nothing is left in sight. The scale is relative to a `ToyScene`'s person; whoever is
            larger stands in front, then whoever comes later in the group.
    """

    person_seed: int
    dance: int | Dance
    path: tuple[tuple[float, float, float, float], ...] = ((0.0, 0.0, 0.0, 1.0),)

    def station(self, time_s: float) -> tuple[float, float, float]:
        """(x, y, scale) at a moment."""
        times_s, *columns = zip(*self.path, strict=True)
        x, y, scale = (float(np.interp(time_s, times_s, column)) for column in columns)
        return x, y, scale


@dataclass(frozen=True)
class Figure:
    """One person in a picture of several.

    Attributes:
        keypoints: [133, 3] float64 COCO-WholeBody in pixels of the frame: x, y, score. The scores
            know nothing of other people in front and nothing of the frame's edges.
        box: [4] float64 x0, y0, x1, y1 in pixel edges: the extent of what was drawn, true to two
            pixels of the canvas; it may reach beyond the frame or lie outside it.
    """

    keypoints: Points
    box: Points


@dataclass(frozen=True)
class GroupFrame:
    """One moment of a group.

    Attributes:
        rgb: [H, W, 3] uint8, the picture.
        figures: One for each actor, in the group's order, also for those who are out of sight.
    """

    rgb: Frame
    figures: tuple[Figure, ...]


class ToyGroup(_Stage):
    """Several people, or nobody, in a room before a camera.

    Two who cross, and one who leaves at 2 s and comes back at 5 s:

        ToyGroup([Actor(person_seed=1, dance=1, path=((0, -0.3, 0, 0.7), (4, 0.3, 0, 0.7))),
                  Actor(person_seed=2, dance=2, path=((0, 0.3, 0, 0.7), (4, -0.3, 0, 0.7)))],
                 height=256, width=448)
        ToyGroup([Actor(person_seed=1, dance=1, path=((1, 0, 0, 1), (2, 1.2, 0, 1), (5, 1.2, 0, 1),
                                                      (6, 0, 0, 1)))], height=256, width=256)

    Args:
        actors: Who is there; an empty list shows the empty room.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
        background_seed: Which room.
        camera: "moving" pans, zooms and shakes slowly.
        camera_seed: Which camera motion.
    """

    def __init__(
        self,
        actors: Sequence[Actor],
        *,
        height: int = 64,
        width: int = 64,
        background_seed: int = 0,
        camera: Camera = "still",
        camera_seed: int = 0,
    ) -> None:
        super().__init__(
            height=height,
            width=width,
            background_seed=background_seed,
            camera=camera,
            camera_seed=camera_seed,
        )
        self.actors = tuple(actors)
        self._persons = [make_person(actor.person_seed) for actor in self.actors]
        self._dances = [
            Dance(actor.dance) if isinstance(actor.dance, int) else actor.dance
            for actor in self.actors
        ]

    def frame_at(self, time_s: float) -> GroupFrame:
        """The world at a moment in seconds."""
        view = self._view(time_s)
        canvas = self._room(*view)
        stations = [actor.station(time_s) for actor in self.actors]
        figures: dict[int, Figure] = {}
        for index in sorted(range(len(stations)), key=lambda i: stations[i][2]):
            person, dance = self._persons[index], self._dances[index]
            joints = dance.joints(time_s, person)
            origin, unit_px = self._place(view, stations[index])
            mouth, eyes_shut = dance.face(time_s)
            extent = _draw_person(canvas, person, joints, origin, unit_px, mouth, eyes_shut)
            keypoints = _keypoints(joints, person, origin, unit_px, mouth)
            self._to_frame(keypoints, unit_px)
            figures[index] = Figure(keypoints=keypoints, box=(extent + 0.5) / self._scale)
        if self._scale > 1:
            canvas = _shrink(canvas, self.height, self.width)
        return GroupFrame(rgb=canvas, figures=tuple(figures[i] for i in range(len(figures))))

    def frames(
        self, num_frames: int, *, start_s: float = 0.0, rate_fps: float = FRAME_RATE_FPS
    ) -> Iterator[GroupFrame]:
        """Consecutive frames at a constant rate."""
        for index in range(num_frames):
            yield self.frame_at(start_s + index / rate_fps)


def _shrink(frame: Frame, height: int, width: int) -> Frame:
    return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _shade(colour: tuple[int, int, int], depth: float) -> tuple[int, int, int]:
    """A part behind the body is a little darker."""
    factor = float(np.clip(1.0 + 0.9 * depth, 0.8, 1.05))
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


_SUBPIXEL_BITS = 4


def _draw_person(
    canvas: Frame,
    person: Person,
    joints: dict[str, Points],
    origin: tuple[float, float],
    unit_px: float,
    mouth: float,
    eyes_shut: bool,
) -> Points:
    """Draw all parts onto [H, W, 3], far parts first.

    Returns:
        [4] x0, y0, x1, y1: the extent of everything drawn, as if the canvas had no edges.
    """
    scale = unit_px * (1 << _SUBPIXEL_BITS)

    def project(point: Points) -> tuple[int, int]:
        x = (origin[0] * (1 << _SUBPIXEL_BITS)) + point[0] * scale
        y = (origin[1] * (1 << _SUBPIXEL_BITS)) - point[1] * scale
        return round(float(x)), round(float(y))

    def capsule(start: Points, end: Points, radius: float, colour: tuple[int, int, int]) -> Points:
        depth = float(start[2] + end[2]) / 2
        thickness = max(1, round(2 * radius * unit_px))
        cv2.line(
            canvas, project(start), project(end), _shade(colour, depth), thickness,
            cv2.LINE_AA, _SUBPIXEL_BITS,
        )  # fmt: skip
        ends = np.stack([start[:2], end[:2]]) * (unit_px, -unit_px) + origin
        reach = (thickness + 1) / 2  # with the soft edge
        return np.concatenate([ends.min(0) - reach, ends.max(0) + reach])

    width = person.width
    # Each part: its depth, then the call that draws it and tells its extent.
    parts: list[tuple[float, Callable[[], Points]]] = []
    for side in ("left", "right"):
        hip, knee, ankle, toe = (joints[f"{side}_{n}"] for n in ("hip", "knee", "ankle", "toe"))
        shoulder, elbow, wrist = (joints[f"{side}_{n}"] for n in ("shoulder", "elbow", "wrist"))
        leg_depth = float(hip[2] + ankle[2]) / 2 - 0.03
        limbs = (
            (leg_depth - 0.002, ankle, toe, SHOE_RADIUS, person.shoe),
            (leg_depth - 0.001, knee, ankle, LEG_RADIUS * 0.85, person.shin),
            (leg_depth, hip, knee, LEG_RADIUS, person.thigh),
            (float(shoulder[2] + elbow[2]) / 2, shoulder, elbow, ARM_RADIUS, person.sleeve),
            (float(elbow[2] + wrist[2]) / 2, elbow, wrist, ARM_RADIUS * 0.9, person.forearm),
        )
        for depth, start, end, radius, colour in limbs:
            parts.append((depth, partial(capsule, start, end, radius * width, colour)))
        palm = wrist + (wrist - elbow) / FOREARM * HAND * 0.5
        depth = float(elbow[2] + wrist[2]) / 2 + 0.001
        parts.append((depth, partial(capsule, wrist, palm, HAND_RADIUS * width, person.skin)))
    look = float(joints["look"][0])
    head, neck = joints["head"], joints["neck"]
    yaw = float(np.arctan2(
        -(joints["left_shoulder"] - joints["right_shoulder"])[2],
        (joints["left_shoulder"] - joints["right_shoulder"])[0],
    ))  # fmt: skip
    torso = partial(_draw_torso, canvas, person, joints, origin, unit_px, yaw)
    parts.append((0.0, torso))
    parts.append((0.01, partial(capsule, neck, (neck + head) / 2, 0.04 * width, person.skin)))
    round_head = partial(_draw_head, canvas, person, joints, origin, unit_px, mouth, eyes_shut)
    parts.append((0.05 + float(head[2]) * 0.2, round_head))
    if person.long_hair:  # a fall of hair behind the head: before the torso when seen from the back
        back = np.array([-np.sin(look), 0.0, -np.cos(look)]) * 0.05
        fall = neck + back + (neck - head) * 0.55
        hair = partial(capsule, head + back, fall, 0.075 * width, person.hair)
        parts.append((0.04 if np.cos(look) < 0 else -0.2, hair))
    extents = np.stack([draw() for _, draw in sorted(parts, key=lambda part: part[0])])
    return np.concatenate([extents[:, :2].min(0), extents[:, 2:].max(0)])


def _visible_columns(num_columns: int, heading: float) -> NDArray[np.intp]:
    """Texture columns that a camera sees across a round body, from left to right."""
    across = (np.arange(num_columns) + 0.5) / num_columns * 2 - 1
    longitude = np.arcsin(across) - heading  # 0 is the front
    return (
        np.floor((longitude / (2 * np.pi) + 0.5) * TEXTURE_COLUMNS).astype(np.intp)
        % TEXTURE_COLUMNS
    )


def _paste(canvas: Frame, patch: Frame, alpha: Frame, matrix: Points) -> None:
    """Blend a warped patch into the canvas.

    Args:
        canvas: [H, W, 3] uint8, changed in place.
        patch: [p, q, 3] uint8.
        alpha: [p, q] uint8 opacity.
        matrix: [2, 3] affine map from patch to canvas pixels.
    """
    rows, columns = patch.shape[:2]
    corners = matrix @ np.array([[0, columns, 0, columns], [0, 0, rows, rows], [1, 1, 1, 1]])
    left, top = np.maximum(np.floor(corners.min(1)).astype(int) - 1, 0)
    right, bottom = np.ceil(corners.max(1)).astype(int) + 2
    right, bottom = min(int(right), canvas.shape[1]), min(int(bottom), canvas.shape[0])
    if right <= left or bottom <= top:
        return
    shifted = matrix.copy()
    shifted[:, 2] -= (left, top)
    size = (int(right - left), int(bottom - top))
    warped = cv2.warpAffine(patch, shifted, size, borderMode=cv2.BORDER_REPLICATE)
    opacity = cv2.warpAffine(alpha, shifted, size).astype(np.float32)[..., None] / 255
    region = canvas[top:bottom, left:right]
    region[:] = (region + (warped.astype(np.float32) - region) * opacity + 0.5).astype(np.uint8)


def _draw_torso(
    canvas: Frame,
    person: Person,
    joints: dict[str, Points],
    origin: tuple[float, float],
    unit_px: float,
    yaw: float,
) -> Points:
    """Draw the torso; returns its extent."""
    chest = (joints["left_shoulder"] + joints["right_shoulder"]) / 2
    hips = (joints["left_hip"] + joints["right_hip"]) / 2
    turned = np.hypot(np.cos(yaw), TORSO_DEPTH / SHOULDER_X * np.sin(yaw))
    half_width = (SHOULDER_X + 0.015) * person.width * turned
    columns = 24
    patch = person.torso[:, _visible_columns(columns, yaw)]
    light = 1.0 - 0.18 * np.abs(np.linspace(-1, 1, columns, dtype=np.float32)) ** 2
    patch = (patch * light[None, :, None]).astype(np.uint8)
    # A shape that narrows to the waist, as opacity.
    rows = patch.shape[0]
    alpha = np.zeros((rows * 4, columns * 4), np.uint8)
    outline = np.array([[2, 8], [10, 0], [columns * 4 - 11, 0], [columns * 4 - 3, 8],
                        [columns * 4 - 14, rows * 4 - 1], [13, rows * 4 - 1]])  # fmt: skip
    cv2.fillConvexPoly(alpha, outline.astype(np.int32), 255)
    patch = np.asarray(cv2.resize(patch, (columns * 4, rows * 4)), np.uint8)
    spine = chest - hips
    down = np.array([-spine[0], spine[1]]) * unit_px * 1.16 / (rows * 4)
    right = np.array([down[1], -down[0]]) / max(float(np.hypot(*down)), 1e-6)
    right = right * 2 * half_width * unit_px / (columns * 4)
    top_middle = np.array([origin[0] + chest[0] * unit_px, origin[1] - chest[1] * unit_px])
    top_middle = top_middle - down * rows * 4 * 0.06
    corner = top_middle - right * columns * 2
    matrix = np.column_stack([right, down, corner])
    _paste(canvas, patch, alpha, matrix)
    corners = outline @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([corners.min(0), corners.max(0)])


_HEAD_PX = 64


def _head_maps() -> tuple[NDArray[np.intp], Points, Frame]:
    """Latitude row and camera longitude of each pixel of a round head, and its opacity."""
    grid = (np.arange(_HEAD_PX) + 0.5) / _HEAD_PX * 2 - 1
    v, u = np.meshgrid(grid, grid, indexing="ij")
    latitude = np.arcsin(np.clip(v, -1, 1))
    rows = np.clip((latitude / np.pi + 0.5) * TEXTURE_ROWS, 0, TEXTURE_ROWS - 1).astype(np.intp)
    longitude = np.arcsin(np.clip(u / np.maximum(np.cos(latitude), 1e-6), -1, 1))
    alpha = (np.clip((1 - np.hypot(u, v)) * _HEAD_PX / 2, 0, 1) * 255).astype(np.uint8)
    return rows, longitude, alpha


_HEAD_ROWS, _HEAD_LONGITUDE, _HEAD_ALPHA = _head_maps()

# Where facial features lie on the head: (longitude, latitude) in radians, latitude downwards.
_EYE = (0.42, 0.02)
_MOUTH_LATITUDE = 0.55


def _draw_head(
    canvas: Frame,
    person: Person,
    joints: dict[str, Points],
    origin: tuple[float, float],
    unit_px: float,
    mouth: float,
    eyes_shut: bool,
) -> Points:
    """Draw the head; returns its extent."""
    look, tilt = float(joints["look"][0]), float(joints["look"][1])
    column = np.floor(((_HEAD_LONGITUDE - look) / (2 * np.pi) + 0.5) * TEXTURE_COLUMNS)
    patch = np.ascontiguousarray(person.head[_HEAD_ROWS, column.astype(np.intp) % TEXTURE_COLUMNS])
    for sign in (-1.0, 1.0):
        place = _on_head(sign * _EYE[0], _EYE[1], look)
        if place is None:
            continue
        x, y, facing = place
        centre = (round(x * 16), round(y * 16))
        if eyes_shut:
            axes = (round(6 * facing * 16), 24)
            cv2.ellipse(patch, centre, axes, 0, 0, 360, (60, 30, 20), -1, cv2.LINE_AA, 4)
        else:
            axes = (round(6.5 * facing * 16), 6 * 16)
            cv2.ellipse(patch, centre, axes, 0, 0, 360, (250, 250, 250), -1, cv2.LINE_AA, 4)
            axes = (round(3.6 * facing * 16), 3 * 16 + 10)
            cv2.ellipse(patch, centre, axes, 0, 0, 360, (25, 20, 30), -1, cv2.LINE_AA, 4)
    place = _on_head(0.0, _MOUTH_LATITUDE, look)
    if place is not None:
        x, y, facing = place
        centre = (round(x * 16), round(y * 16))
        axes = (round(9 * facing * 16), round((1.8 + 5.5 * mouth) * 16))
        cv2.ellipse(patch, centre, axes, 0, 0, 360, (140, 30, 40), -1, cv2.LINE_AA, 4)
    size = 2 * HEAD_RADIUS * unit_px / _HEAD_PX
    cos, sin = np.cos(tilt) * size, np.sin(tilt) * size
    head = joints["head"]
    centre_px = np.array([origin[0] + head[0] * unit_px, origin[1] - head[1] * unit_px])
    linear = np.array([[cos, -sin], [sin, cos]])
    corner = centre_px - linear @ np.array([_HEAD_PX / 2, _HEAD_PX / 2])
    _paste(canvas, patch, _HEAD_ALPHA, np.column_stack([linear, corner]))
    reach = HEAD_RADIUS * unit_px
    return np.concatenate([centre_px - reach, centre_px + reach])


def _on_head(longitude: float, latitude: float, look: float) -> tuple[float, float, float] | None:
    """Place of a facial point on the patch, and how much it faces the camera; None if hidden."""
    facing = float(np.cos(longitude + look) * np.cos(latitude))
    if facing <= 0.12:
        return None
    x = np.sin(longitude + look) * np.cos(latitude)
    return float((x + 1) * _HEAD_PX / 2), float((np.sin(latitude) + 1) * _HEAD_PX / 2), facing


def _face_layout() -> Points:
    """[68, 2] longitude and latitude on the head of the iBUG landmarks, COCO-WholeBody 23..90."""
    rows: list[tuple[float, float]] = []
    for angle in np.linspace(-1.2, 1.2, 17):  # jaw, from the person's right ear over the chin
        rows.append((float(angle), float(0.25 + 0.6 * np.cos(angle * 1.25))))
    for side in (-1.0, 1.0):  # brows
        offsets = np.linspace(0.7, 0.2, 5) if side < 0 else np.linspace(0.2, 0.7, 5)
        rows += [
            (side * float(o), -0.24 - 0.06 * float(np.sin((o - 0.2) / 0.5 * np.pi)))
            for o in offsets
        ]
    rows += [(0.0, latitude) for latitude in (-0.05, 0.06, 0.16, 0.26)]
    rows += [(x, 0.32) for x in (-0.14, -0.07, 0.0, 0.07, 0.14)]
    ring = ((-1, 0), (-0.4, -1), (0.4, -1), (1, 0), (0.4, 1), (-0.4, 1))
    for side in (-1.0, 1.0):
        rows += [(side * _EYE[0] + 0.17 * x, _EYE[1] + 0.08 * y) for x, y in ring]
    outer = np.linspace(np.pi, -np.pi, 12, endpoint=False)
    rows += [(0.3 * float(np.cos(a)), _MOUTH_LATITUDE - 0.1 * float(np.sin(a))) for a in outer]
    inner = np.linspace(np.pi, -np.pi, 8, endpoint=False)
    rows += [(0.22 * float(np.cos(a)), _MOUTH_LATITUDE - 0.05 * float(np.sin(a))) for a in inner]
    return np.array(rows)


_FACE_LAYOUT = _face_layout()
# Palm to tip for thumb, index, middle, ring, little: sideways angle of each finger, radians.
_FINGER_ANGLES = (-0.9, -0.35, 0.0, 0.3, 0.6)


def _keypoints(
    joints: dict[str, Points],
    person: Person,
    origin: tuple[float, float],
    unit_px: float,
    mouth: float,
) -> Points:
    """[133, 3] COCO-WholeBody keypoints on the canvas; hidden facial points have a low score."""
    world = np.zeros((NUM_KEYPOINTS, 3))
    scores = np.full(NUM_KEYPOINTS, VISIBLE_SCORE)
    look, tilt = float(joints["look"][0]), float(joints["look"][1])
    head = joints["head"]

    def on_head(longitudes: Points, latitudes: Points) -> Points:
        angle = longitudes + look
        x = np.sin(angle) * np.cos(latitudes) * HEAD_RADIUS
        y = -np.sin(latitudes) * HEAD_RADIUS
        z = np.cos(angle) * np.cos(latitudes) * HEAD_RADIUS
        turned = [x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt), z]
        return np.asarray(head + np.stack(turned, axis=1))

    # Nose, left and right eye, left and right ear: the person's left is to the right of the
    # picture.
    head_angles = np.array([0.0, _EYE[0], -_EYE[0], 1.45, -1.45])
    head_latitudes = np.array([0.28, _EYE[1], _EYE[1], 0.1, 0.1])
    world[0:5] = on_head(head_angles, head_latitudes)
    scores[0:5] = np.where(np.cos(head_angles + look) > -0.1, VISIBLE_SCORE, HIDDEN_SCORE)
    names = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    for row, name in enumerate(names):
        world[5 + 2 * row] = joints[f"left_{name}"]
        world[6 + 2 * row] = joints[f"right_{name}"]
    for first, side in ((17, "left"), (20, "right")):
        toe, ankle = joints[f"{side}_toe"], joints[f"{side}_ankle"]
        world[first] = world[first + 1] = toe
        world[first + 2] = ankle - (toe - ankle) * 0.3
    layout = _FACE_LAYOUT.copy()
    layout[48:, 1] += np.where(layout[48:, 1] > _MOUTH_LATITUDE, 0.15, -0.1) * mouth
    world[23:91] = on_head(layout[:, 0], layout[:, 1])
    scores[23:91] = VISIBLE_SCORE if np.cos(look) > 0.15 else HIDDEN_SCORE
    for first, side in ((91, "left"), (112, "right")):
        wrist, elbow = joints[f"{side}_wrist"], joints[f"{side}_elbow"]
        along = (wrist - elbow) / FOREARM / person.limb
        across = np.array([along[1], -along[0], 0.0])
        world[first] = wrist
        for finger, angle in enumerate(_FINGER_ANGLES):
            ray = np.cos(angle) * along + np.sin(angle) * across
            for knuckle in range(4):
                reach = HAND * (0.6 + 0.25 * knuckle)
                world[first + 1 + 4 * finger + knuckle] = wrist + ray * reach
    result = np.empty((NUM_KEYPOINTS, 3))
    result[:, 0] = origin[0] + world[:, 0] * unit_px
    result[:, 1] = origin[1] - world[:, 1] * unit_px
    result[:, 2] = scores
    return result
