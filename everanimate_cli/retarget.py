"""Retargeting: the driving motion with the bone lengths and the place of the reference person.

The bones of one driving frame, the template, are measured against those of the reference picture
once. Each frame's body is then rebuilt outwards from the neck, every limb in its own direction and
with its new length, and moved to the reference person's place. The motion itself, also that of the
camera, stays.

Works on keypoints as in `skeleton`. A limb is *seen* when both of its ends have score 0.3 or more.
A row is *missing* when it is not finite, absurdly far away or its score is not above 0: pose models
give such rows no meaningful place. The numbers equal the released preprocessing's where all scores
are good; where that crashes or lets a wrong joint spoil the rest, its `Differs from` notes say what
happens here.

Source: pose page section 8; golden file `pose_golden.json`, `retarget_cases`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from everanimate_cli.errors import InputError
from everanimate_cli.skeleton import (
    FACE_ROWS,
    FARTHEST_PX,
    HAND_ROWS,
    NUM_KEYPOINTS,
    FloatArray,
    Size,
    body_joints,
)

BodyClass: TypeAlias = Literal["half", "three-quarter", "full"]
_Points: TypeAlias = NDArray[np.float64]
_Bone: TypeAlias = tuple[int, int, float]  # start joint, end joint, ratio

_NOSE: Final = 0
_NECK: Final = 1
_RIGHT_WRIST: Final = 4
_LEFT_WRIST: Final = 7
_HIPS: Final = (8, 11)
_ANKLES: Final = (10, 13)

# The drawn limbs as (start, end) joints, in drawing order: every start is rebuilt before its limbs.
_LIMBS: Final = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),  # shoulders, right arm, left arm
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),  # right and left hip and leg
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),  # neck, right and left eye and ear
    *((13, 18), (10, 19)),  # left and right foot
)
_EYE_LIMB: Final = 13
# Left and right: foot limb, shin limb, keypoints (two toes and the heel).
_FEET: Final = ((17, 11, slice(17, 20)), (18, 8, slice(20, 23)))
# Joints that are one keypoint, and that keypoint; neck and toes are means of the pairs below.
_SINGLE_JOINTS: Final = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
_SINGLE_ROWS: Final = (0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LEFT_SHOULDER_ROW, _RIGHT_SHOULDER_ROW = 5, 6
_PAIRED_ROWS: Final = ((_LEFT_SHOULDER_ROW, _RIGHT_SHOULDER_ROW), (17, 18), (20, 21))
_LEFT_HAND, _RIGHT_HAND = HAND_ROWS
# A hand hangs on the end of its forearm: (wrist joint, elbow joint, forearm limb).
_FOREARMS: Final = ((_RIGHT_WRIST, 3, 3), (_LEFT_WRIST, 6, 5))


@dataclass(frozen=True)
class _Part:
    """Limbs that get one ratio: the right and the left one, or a single one."""

    name: str
    plural: str
    limbs: tuple[int, ...]
    averaged: bool = False  # else the larger side counts


_SHOULDERS: Final = _Part("shoulder", "shoulders", (0, 1))
# What says how large a body is, apart from the shoulders.
_BUILD: Final = (
    _Part("hip", "hips", (6, 9)),
    _Part("upper arm", "upper arms", (2, 4)),
    _Part("forearm", "forearms", (3, 5)),
)
_PARTS: Final = (
    _SHOULDERS,
    *_BUILD,
    _Part("thigh", "thighs", (7, 10)),
    _Part("shin", "shins", (8, 11)),
    _Part("foot", "feet", (18, 17)),
    _Part("neck", "neck", (12,)),
    _Part("eye", "eyes", (13, 15), averaged=True),
    _Part("ear", "ears", (14, 16), averaged=True),
)

_SEEN_SCORE: Final = 0.3
_HEIGHT_SCORE: Final = 0.5  # must be exceeded where a person's height is measured
_CLASS_SCORE: Final = 0.4
_HAND_SCORE: Final = 0.4
_SHORTEST_PX: Final = 1.0  # below it a bone has neither length nor direction
_LONGEST_FOOT: Final = 0.5  # of the shin

# A person's left and right bones are equally long; a guess that is off by more is a bad guess.
_SIDES_AGREE: Final = 1.1
# A child's limbs against an adult's, relative to the shoulders, come down to about 0.7.
_GUESS_AGREES: Final = 1.5
# Measured parts may differ more, as with the builds of drawn figures; but shoulders turned by 60
# degrees measure half, and from there on they are no measure for anything else.
_BUILD_AGREES: Final = 2.0
_WIDEST_SPREAD: Final = 3.0
_LONG_FOR_BODY: Final = 1.5
_BENDING: Final = ("upper arm", "forearm", "neck")
_SIDEWAYS: Final = 0.25  # shoulder length over neck-hip length; about 0.33 seen from the front

_CLASSES: Final[tuple[BodyClass, ...]] = ("half", "three-quarter", "full")  # rising
_TEMPLATE: Final = "the template frame"
_REFERENCE: Final = "the reference picture"


@dataclass(frozen=True, kw_only=True)
class RetargetPlan:
    """What stays constant over the video: one measurement serves all frames.

    Attributes:
        scale: Driving pixels per reference pixel, above 0.
        offset: (x, y) [driving px] from the reference person's place to the driving person's.
        ratios: New length over driving length of the 19 limbs in drawing order, both in driving
            pixels.
        hand_factor: Size of a hand on the reference picture over its size in the driving frame.
        body_class: How much of the body both pictures show, which decides what is aligned.
        frame_size: (height, width) of the driving frames [px].
        canvas: (height, width) of the reference picture [px], on which `apply` places keypoints.
        warnings: What was guessed or looks wrong; each one line for the user.
    """

    scale: float
    offset: tuple[float, float]
    ratios: tuple[float, ...]
    hand_factor: float
    body_class: BodyClass
    frame_size: Size
    canvas: Size
    warnings: tuple[str, ...] = ()

    def apply(self, keypoints: FloatArray) -> NDArray[np.float64]:
        """One driving frame's keypoints on the reference picture, ready for `draw_pose`.

        Toes and heels are scaled with their foot, the face rows around the nose with the eyes. They
        serve a preview only: the face video is cut from the driving frame itself. Places are not
        rounded; drawing truncates them.

        Differs from the released preprocessing:
            - A hand follows the wrist that it lies at, also where the pose model has confused left
              and right; the original leaves both hands far from both arms.
            - Without a clear wrist the hand's root ends the forearm, and without a clear root the
              hand is scaled around the wrist.
            - What hangs on a missing joint is rebuilt from the next joint towards the neck with the
              mean ratio of the limbs between, and stays in place where there is none.

        Args:
            keypoints: [133, 3] (x_px, y_px, score) in driving pixels.

        Returns:
            [133, 3] float64, finite, in pixels of the reference picture. Scores are unchanged, and
            0 in missing rows. A missing shoulder or toe lies on its partner, which keeps the mean
            of both meaningful; other missing rows lie at (0, 0).

        Raises:
            ValueError: If `keypoints` has another shape.

        Source: pose page sections 8.4, 8.6 and 8.7.
        """
        rows = _with_nan_where_missing(keypoints)
        moved, neck = self._moved(rows)
        places = (np.vstack([moved, neck]) - self.offset) / self.scale
        # The drawn neck is the mean of the shoulders, which are equally long. Mirroring one makes
        # that mean exact: the last bit turns an upright neck by a degree when drawn.
        places[_LEFT_SHOULDER_ROW] = 2 * places[NUM_KEYPOINTS] - places[_RIGHT_SHOULDER_ROW]
        return np.nan_to_num(np.column_stack([places[:NUM_KEYPOINTS], rows[:, 2]]), nan=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Self:
        """The plan that `to_json` was called on."""
        (frame_height, frame_width), (height, width) = entries["frame_size"], entries["canvas"]
        offset_x, offset_y = entries["offset"]
        return cls(
            scale=entries["scale"],
            offset=(offset_x, offset_y),
            ratios=tuple(entries["ratios"]),
            hand_factor=entries["hand_factor"],
            body_class=entries["body_class"],
            frame_size=(frame_height, frame_width),
            canvas=(height, width),
            warnings=tuple(entries["warnings"]),
        )

    def _moved(self, rows: NDArray[np.float64]) -> tuple[_Points, _Points]:
        """The rebuilt keypoints [133, 2] and neck [2] in driving pixels, NaN without a place."""
        rows = rows.copy()
        for first, second in _PAIRED_ROWS:
            for row, partner in ((first, second), (second, first)):
                if np.isnan(rows[row, 0]):
                    rows[row] = rows[partner]
        # The released code averages shares of the frame, not pixels. The last bit decides whether
        # an upright neck is drawn at 90 or at 89 degrees.
        height, width = self.frame_size
        rows[:, :2] /= (width, height)
        joints = body_joints(rows)
        for places in (rows, joints):
            places[:, :2] *= (width, height)
        hands = _hands_by_wrist(rows, joints)
        # Two more joints end the forearms, because a hand's root can stand in for the wrist.
        ends = [_end_of_forearm(joints[wrist], rows[hands[wrist]][0]) for wrist, _, _ in _FOREARMS]
        points = np.vstack([joints[:, :2], ends])
        ratios = self._ratios_with_short_feet(joints[:, :2])
        bones = [
            *_bones(ratios),
            *(
                (elbow, len(joints) + index, ratios[limb])
                for index, (_, elbow, limb) in enumerate(_FOREARMS)
            ),
        ]
        rebuilt = _rebuilt(points, bones)

        moved = rows[:, :2].copy()
        moved[list(_SINGLE_ROWS)] = rebuilt[list(_SINGLE_JOINTS)]
        for foot, _, foot_rows in _FEET:
            toe = _LIMBS[foot][1]
            moved[foot_rows] = _carried(moved[foot_rows], points[toe], rebuilt[toe], ratios[foot])
        moved[FACE_ROWS] = _carried(
            moved[FACE_ROWS], points[_NOSE], rebuilt[_NOSE], ratios[_EYE_LIMB]
        )
        for index, (wrist, _, _) in enumerate(_FOREARMS):
            hand = rows[hands[wrist]]
            end = len(joints) + index
            centre = hand[0, :2] if _score(hand[0]) >= _HAND_SCORE else points[end]
            moved[hands[wrist]] = _carried(
                hand[:, :2], centre, rebuilt[end], self.hand_factor * self.scale
            )
        return moved, rebuilt[_NECK]

    def _ratios_with_short_feet(self, joints: _Points) -> list[float]:
        """The ratios for one frame: no foot is longer than half of its shin."""
        ratios = list(self.ratios)
        for foot, shin, _ in _FEET:
            foot_length = _length(joints, foot)
            longest = _LONGEST_FOOT * ratios[shin] * _length(joints, shin)
            # False with NaN: a leg that is not there limits nothing.
            if ratios[foot] * foot_length > longest:
                ratios[foot] = longest / foot_length
        return ratios


def measure(
    template: FloatArray, template_size: Size, reference: FloatArray, reference_size: Size
) -> RetargetPlan:
    """Compare the driving person with the reference person.

    Both should stand upright, facing the camera, with straight limbs. Whoever gets the template as
    reference gets the template's proportions, but full bodies stand half an ankle-toe height lower,
    as in the released preprocessing.

    Differs from the released preprocessing, which trusts every keypoint: a limb that is not seen in
    both pictures counts only as far as it agrees with the other side (within 10 %) or, without one,
    with the body's overall build (within a factor of 1.5). Otherwise the other side or the overall
    build takes its place. Hands have the shoulders' ratio only while that agrees with arms and
    torso within a factor of 2; in a side view it would let them explode.

    Args:
        template: [133, 3] (x_px, y_px, score) of the driving frame that stands for the video.
        template_size: (height, width) of that frame [px].
        reference: [133, 3] (x_px, y_px, score) of the reference picture.
        reference_size: (height, width) of that picture [px].

    Returns:
        The plan for all frames of the driving video.

    Raises:
        InputError: If one of the two has no neck: there is nothing to hang the limbs on.
        ValueError: If keypoints have another shape.

    Source: pose page sections 8.1 to 8.5, 8.8 and 8.10.
    """
    driving = body_joints(_with_nan_where_missing(template))
    target = body_joints(_with_nan_where_missing(reference))
    for joints, place, remedy in (
        (driving, _TEMPLATE, "another template frame"),
        (target, _REFERENCE, "a reference picture that shows both shoulders"),
    ):
        if joints[_NECK, 2] < _SEEN_SCORE:
            raise InputError(
                f"cannot retarget: {place} shows no neck (score {joints[_NECK, 2]:.2f}, the mean "
                f"of both shoulders, and {_SEEN_SCORE} is needed). Give {remedy}, or do not "
                "retarget."
            )

    scale, from_height = _scale(driving, template_size, target, reference_size)
    height, width = reference_size
    # Rounded down to whole pixels as in the released code, so not exactly `scale` times the place.
    scaled_size = (max(int(width * scale), 1), max(int(height * scale), 1))
    scaled = target.copy()
    scaled[:, :2] = target[:, :2] / (width, height) * scaled_size

    limbs = _compare(driving, scaled)
    build = _overall_build(limbs)
    ratios, warnings = _settle(limbs, build)
    body_class = min(
        _body_class(driving, template_size[0]),
        _body_class(target, reference_size[0]),
        key=_CLASSES.index,
    )
    warnings += _spread_warnings(limbs)
    warnings += _length_warnings(limbs, build)
    warnings += _sideways_warnings(driving, target)
    shoulders = ratios[_SHOULDERS.limbs[0]]
    if not _agree(shoulders, build, _BUILD_AGREES):
        warnings.append(
            f"The shoulders ask for hands {shoulders / build:.2g} times as large as arms and torso "
            "do: the hands follow arms and torso."
        )
    if from_height and not _agree(build, 1.0, _BUILD_AGREES):
        warnings.append(
            f"Height and bone lengths disagree by a factor of {max(build, 1 / build):.2g}: "
            f"somebody does not stand upright in {_TEMPLATE} or {_REFERENCE}, and ways across the "
            f"picture will come out too {'short' if build > 1 else 'long'}."
        )
    if hands_look_swapped(template):
        warnings.append(
            f"Left and right hand look confused in {_TEMPLATE}: each hand goes to the wrist that "
            "it lies at."
        )
    return RetargetPlan(
        scale=scale,
        offset=_offset(body_class, _rebuilt(driving[:, :2], _bones(ratios)), scaled),
        ratios=tuple(ratios),
        hand_factor=build / scale,
        body_class=body_class,
        frame_size=template_size,
        canvas=reference_size,
        warnings=tuple(warnings),
    )


def hands_look_swapped(keypoints: FloatArray) -> bool:
    """Whether the clearly seen hands lie at the other side's wrists, as a whole.

    Args:
        keypoints: [133, 3] (x_px, y_px, score).

    Returns:
        False where a wrist or both hands cannot be seen.

    Raises:
        ValueError: If `keypoints` has another shape.
    """
    rows = _with_nan_where_missing(keypoints)
    return _hands_by_wrist(rows, body_joints(rows))[_RIGHT_WRIST] == _LEFT_HAND


@dataclass(frozen=True)
class _Limbs:
    """The comparison of the two bodies, limb by limb."""

    ratios: NDArray[np.float64]  # [19] reference over template, NaN without a length
    seen_in_template: NDArray[np.bool_]  # [19]
    seen_in_reference: NDArray[np.bool_]  # [19]

    @property
    def seen(self) -> NDArray[np.bool_]:
        """[19] whether a ratio is a measurement; otherwise it is a guess."""
        return self.seen_in_template & self.seen_in_reference

    def measured(self, part: _Part) -> float | None:
        """Common ratio of a part's limbs, None if none of them is seen."""
        seen = [limb for limb in part.limbs if self.seen[limb]]
        if not seen:
            return None
        trusted = self.ratios[seen]
        counted = [
            ratio
            for limb, ratio in zip(part.limbs, self.ratios[list(part.limbs)].tolist(), strict=True)
            if limb in seen or _agree(ratio, float(trusted.mean()), _SIDES_AGREE)
        ]
        return _common(part, counted)

    def guessed(self, part: _Part, build: float) -> float | None:
        """Common ratio of limbs that are not seen, None if no guess is plausible."""
        guesses: list[float] = self.ratios[list(part.limbs)].tolist()
        plausible = [ratio for ratio in guesses if _agree(ratio, build, _GUESS_AGREES)]
        return _common(part, plausible) if plausible else None


def _with_nan_where_missing(keypoints: FloatArray) -> NDArray[np.float64]:
    """A float64 copy whose missing rows are NaN."""
    if keypoints.shape != (NUM_KEYPOINTS, 3):
        raise ValueError(f"keypoints must be [{NUM_KEYPOINTS}, 3], got {list(keypoints.shape)}")
    rows = np.array(keypoints, np.float64)
    present = (
        np.isfinite(rows).all(axis=1)
        & (np.abs(rows[:, :2]) <= FARTHEST_PX).all(axis=1)
        & (rows[:, 2] > 0)
    )
    rows[~present] = np.nan
    return rows


def _scale(
    driving: NDArray[np.float64],
    template_size: Size,
    target: NDArray[np.float64],
    reference_size: Size,
) -> tuple[float, bool]:
    """Driving pixels per reference pixel, and whether the persons' heights tell it."""
    for lower in (_ANKLES, _HIPS):
        needed = [_NOSE, *lower]
        if min(driving[needed, 2].min(), target[needed, 2].min()) > _HEIGHT_SCORE:
            heights = [
                abs(float(joints[list(lower), 1].mean() - joints[_NOSE, 1]))
                for joints in (driving, target)
            ]
            if min(heights) >= _SHORTEST_PX:
                return heights[0] / heights[1], True
    return math.sqrt(math.prod(template_size)) / math.sqrt(math.prod(reference_size)), False


def _body_class(joints: NDArray[np.float64], height: int) -> BodyClass:
    """How far down a body can be seen; hips beside the picture count, as in the original."""
    hips, ankles = (
        all(joints[joint, 1] <= height and joints[joint, 2] >= _CLASS_SCORE for joint in pair)
        for pair in (_HIPS, _ANKLES)
    )
    if hips and ankles:
        return "full"
    return "three-quarter" if hips else "half"


def _compare(driving: NDArray[np.float64], target: NDArray[np.float64]) -> _Limbs:
    """Limb ratios of two bodies in the same unit."""
    driving_lengths, target_lengths = (
        np.array([_length(joints[:, :2], limb) for limb in range(len(_LIMBS))])
        for joints in (driving, target)
    )
    measurable = (driving_lengths >= _SHORTEST_PX) & (target_lengths >= _SHORTEST_PX)
    return _Limbs(
        np.divide(
            target_lengths, driving_lengths, out=np.full(len(_LIMBS), np.nan), where=measurable
        ),
        _seen(driving) & (driving_lengths >= _SHORTEST_PX),
        _seen(target) & (target_lengths >= _SHORTEST_PX),
    )


def _seen(joints: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[19] whether both ends of a limb are clearly seen."""
    return np.array([joints[list(limb), 2].min() >= _SEEN_SCORE for limb in _LIMBS])


def _overall_build(limbs: _Limbs) -> float:
    """One ratio for hands and for what cannot be measured: the shoulders' if it is plausible.

    Shoulders shrink in a side view and exaggerate everything that is measured by them. Against
    this stands the median of torso, upper arms and forearms, which one bent arm does not spoil.
    """
    shoulders = limbs.measured(_SHOULDERS)
    others = [ratio for part in _BUILD if (ratio := limbs.measured(part)) is not None]
    if not others:
        return 1.0 if shoulders is None else shoulders
    median = float(np.median(others))
    return shoulders if shoulders and _agree(shoulders, median, _BUILD_AGREES) else median


def _settle(limbs: _Limbs, build: float) -> tuple[list[float], list[str]]:
    """The final ratio of each limb [19], and a line for each way of replacing a measurement."""
    ratios = [math.nan] * len(_LIMBS)
    hidden: dict[str, list[tuple[str, Sequence[int]]]] = {}  # replacement -> parts and their limbs
    for part in _PARTS:
        ratio = limbs.measured(part)
        unseen = [limb for limb in part.limbs if not limbs.seen[limb]]
        if ratio is not None:
            if unseen:
                side = "right" if unseen[0] == part.limbs[0] else "left"
                hidden.setdefault("the other side stands in", []).append(
                    (f"{side} {part.name}", unseen)
                )
        elif (ratio := limbs.guessed(part, build)) is not None:
            hidden.setdefault("the pose model's guess is used", []).append((part.plural, unseen))
        else:
            ratio = build
            hidden.setdefault("the overall build is used", []).append((part.plural, unseen))
        for limb in part.limbs:
            ratios[limb] = ratio
    return ratios, [
        f"Not clearly seen in {_places(limbs, parts)}: {_listed(name for name, _ in parts)}; "
        f"{replacement}."
        for replacement, parts in hidden.items()
    ]


def _places(limbs: _Limbs, parts: Iterable[tuple[str, Sequence[int]]]) -> str:
    unseen = [limb for _, indices in parts for limb in indices]
    return _listed(
        place
        for place, seen in (
            (_TEMPLATE, limbs.seen_in_template),
            (_REFERENCE, limbs.seen_in_reference),
        )
        if not seen[unseen].all()
    )


def _spread_warnings(limbs: _Limbs) -> list[str]:
    """A line if the seen limbs cannot all be right."""
    seen = [
        (float(limbs.ratios[limb]), part)
        for part in _PARTS
        for limb in part.limbs
        if limbs.seen[limb]
    ]
    if not seen:
        return []
    (least, shrunk), (most, grown) = (
        choose(seen, key=lambda pair: pair[0]) for choose in (min, max)
    )
    if most <= _WIDEST_SPREAD * least:
        return []
    return [
        f"The proportions hardly fit: the {grown.plural} would grow {most / least:.2g} times "
        f"relative to the {shrunk.plural}. Mostly a limb is bent or turned in {_TEMPLATE} or "
        f"{_REFERENCE}; another template frame may help."
    ]


def _length_warnings(limbs: _Limbs, build: float) -> list[str]:
    """A line for arms and neck that would come out much too long for the body."""
    lines = []
    for part in _PARTS:
        seen = [float(limbs.ratios[limb]) for limb in part.limbs if limbs.seen[limb]]
        if part.name in _BENDING and seen and max(seen) > _LONG_FOR_BODY * build:
            verb = "is" if part.plural == part.name else "are"
            lines.append(
                f"The {part.plural} would come out {max(seen) / build:.2g} times too long for the "
                f"body: mostly {'it' if verb == 'is' else 'they'} {verb} bent or turned in "
                f"{_TEMPLATE}; another template frame may help."
            )
    return lines


def _sideways_warnings(driving: NDArray[np.float64], target: NDArray[np.float64]) -> list[str]:
    """A line for each picture whose person does not face the camera."""
    lines = []
    for joints, place in ((driving, _TEMPLATE), (target, _REFERENCE)):
        # A score test also drops missing joints, which have score 0.
        hips = [limb for limb in _BUILD[0].limbs if joints[_LIMBS[limb][1], 2] >= _SEEN_SCORE]
        shoulders = [limb for limb in _SHOULDERS.limbs if joints[_LIMBS[limb][1], 2] >= _SEEN_SCORE]
        if not hips or not shoulders:
            continue
        torso = max(_length(joints[:, :2], limb) for limb in hips)
        shoulder = min(_length(joints[:, :2], limb) for limb in shoulders)
        if shoulder < _SIDEWAYS * torso:
            lines.append(
                f"The person stands sideways in {place} (a shoulder measures "
                f"{shoulder / torso:.2f} of the torso, from the front it is about 0.33): "
                "proportions will come out wrong."
            )
    return lines


def _offset(
    body_class: BodyClass, driving: _Points, target: NDArray[np.float64]
) -> tuple[float, float]:
    """(x, y) from the reference person to the rebuilt template, in driving pixels."""
    if body_class != "full":
        offset_x, offset_y = (driving[_NECK] - target[_NECK, :2]).tolist()
        return offset_x, offset_y
    # Ankles are aligned with points between ankle and toe: uneven, but as released.
    soles = [
        (target[ankle, 1] + target[toe, 1]) / 2
        if target[toe, 2] >= _SEEN_SCORE
        else target[ankle, 1]
        for ankle, toe in (_LIMBS[foot] for foot, _, _ in _FEET)
    ]
    return (
        float(driving[list(_HIPS), 0].mean() - target[list(_HIPS), 0].mean()),
        float(driving[list(_ANKLES), 1].max() - max(soles)),
    )


def _bones(ratios: Sequence[float]) -> list[_Bone]:
    return [(start, end, ratio) for (start, end), ratio in zip(_LIMBS, ratios, strict=True)]


def _rebuilt(points: _Points, bones: Sequence[_Bone]) -> _Points:
    """Points with new bone lengths in unchanged directions; the first bone's start stays.

    Args:
        points: [J, 2], NaN where missing.
        bones: Every start before its bones.

    Returns:
        [J, 2], NaN where missing.
    """
    rebuilt = points.copy()
    present = [not math.isnan(x) for x in points[:, 0].tolist()]
    # For a missing joint: the next one towards the neck, and the ratios on the way from there.
    passed: dict[int, tuple[int, list[float]]] = {}
    for start, end, ratio in bones:
        anchor, on_the_way = (start, []) if present[start] else passed.get(start, (start, []))
        if not present[anchor]:
            anchor = end
        on_the_way = [*on_the_way, ratio]
        passed[end] = (anchor, on_the_way)
        mean_ratio = sum(on_the_way) / len(on_the_way)
        rebuilt[end] = rebuilt[anchor] + mean_ratio * (points[end] - points[anchor])
    return rebuilt


def _carried(points: _Points, centre: _Points, new_centre: _Points, factor: float) -> _Points:
    """Points [P, 2] that move and grow with a joint; without it they stay."""
    if np.isnan(centre).any() or np.isnan(new_centre).any():
        return points
    carried: _Points = new_centre + factor * (points - centre)
    return carried


def _hands_by_wrist(rows: NDArray[np.float64], joints: NDArray[np.float64]) -> dict[int, slice]:
    """Which hand belongs to which wrist joint: as labelled unless it clearly lies at the other."""
    labelled = {_RIGHT_WRIST: _RIGHT_HAND, _LEFT_WRIST: _LEFT_HAND}
    crossed = {_RIGHT_WRIST: _LEFT_HAND, _LEFT_WRIST: _RIGHT_HAND}
    if min(_score(joints[wrist]) for wrist in labelled) < _SEEN_SCORE:
        return labelled

    def distance(hands: dict[int, slice]) -> float:
        roots = ((joints[wrist], rows[hand][0]) for wrist, hand in hands.items())
        return sum(
            math.dist(wrist[:2], root[:2]) for wrist, root in roots if _score(root) >= _HAND_SCORE
        )

    return crossed if distance(crossed) < distance(labelled) else labelled


def _end_of_forearm(wrist: NDArray[np.float64], hand_root: NDArray[np.float64]) -> _Points:
    """Where a hand is attached [2]: its root stands in for a wrist that is not clearly seen."""
    if _score(wrist) < _SEEN_SCORE and (_score(hand_root) >= _HAND_SCORE or np.isnan(wrist[0])):
        return hand_root[:2]
    return wrist[:2]


def _score(row: NDArray[np.float64]) -> float:
    """Score of an (x, y, score) row, 0 if it is missing."""
    return 0.0 if np.isnan(row[2]) else float(row[2])


def _length(points: _Points, limb: int) -> float:
    """Length of a limb, NaN if an end is missing."""
    start, end = _LIMBS[limb]
    return math.dist(points[start], points[end])


def _common(part: _Part, ratios: Sequence[float]) -> float:
    return sum(ratios) / len(ratios) if part.averaged else max(ratios)


def _agree(one: float, other: float, factor: float) -> bool:
    """Whether two positive numbers differ by at most a factor; never with NaN."""
    return one <= other * factor and other <= one * factor


def _listed(names: Iterable[str]) -> str:
    """A, B and C."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
