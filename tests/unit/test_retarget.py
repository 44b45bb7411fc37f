"""Retargeting on a stick figure whose numbers can be worked out by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from everanimate_cli import retarget, skeleton
from everanimate_cli.errors import InputError
from everanimate_cli.retarget import RetargetPlan, hands_look_swapped, measure

Floats = NDArray[np.float64]

SIZE = (600, 400)
NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR = range(5)
LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_ELBOW, RIGHT_ELBOW, LEFT_WRIST, RIGHT_WRIST = range(5, 11)
LEFT_HIP, RIGHT_HIP, LEFT_KNEE, RIGHT_KNEE, LEFT_ANKLE, RIGHT_ANKLE = range(11, 17)
RIGHT_BIG_TOE, RIGHT_SMALL_TOE, RIGHT_HEEL = 20, 21, 22
FACE = slice(23, 91)
LEFT_HAND, RIGHT_HAND = slice(91, 112), slice(112, 133)

# Places in the list of ratios.
SHOULDERS, UPPER_ARMS, FOREARMS, TORSO = [0, 1], [2, 4], [3, 5], [6, 9]
THIGHS, SHINS, FEET, EYES, EARS = [7, 10], [8, 11], [17, 18], [13, 15], [14, 16]
NECK_LIMB = 12


def person() -> Floats:
    """Upright, 320 px from nose to ankles, every row at score 0.9; its right side has small x."""
    keypoints = np.full((133, 3), 0.9)
    keypoints[:23, :2] = [
        *((200, 60), (210, 50), (190, 50), (220, 55), (180, 55)),
        *((240, 100), (160, 100), (240, 160), (160, 160), (240, 210), (160, 210)),
        *((220, 200), (180, 200), (220, 300), (180, 300), (220, 380), (180, 380)),
        *((234, 400), (230, 400), (216, 390), (166, 400), (170, 400), (184, 390)),
    ]
    keypoints[FACE, 0] = np.linspace(185, 215, 68)
    keypoints[FACE, 1] = np.linspace(50, 80, 68)
    for hand, x in ((LEFT_HAND, 241), (RIGHT_HAND, 159)):
        keypoints[hand, 0] = x + np.linspace(0, 10, 21)
        keypoints[hand, 1] = 214 + np.linspace(0, 20, 21)
    return keypoints


def shifted(x: float, y: float) -> Floats:
    keypoints = person()
    keypoints[:, :2] += (x, y)
    return keypoints


def on_wrists(keypoints: Floats) -> Floats:
    """The same hands with their roots on the wrists, where a plan puts them."""
    placed = keypoints.copy()
    for hand, wrist in ((LEFT_HAND, LEFT_WRIST), (RIGHT_HAND, RIGHT_WRIST)):
        placed[hand, :2] += keypoints[wrist, :2] - keypoints[hand][0, :2]
    return placed


def with_scores(scores: dict[int, float], keypoints: Floats | None = None) -> Floats:
    changed = person() if keypoints is None else keypoints.copy()
    for row, score in scores.items():
        changed[row, 2] = score
    return changed


def moved(moves: dict[int, tuple[float, float]]) -> Floats:
    keypoints = person()
    for row, (x, y) in moves.items():
        keypoints[row, :2] += (x, y)
    return keypoints


def long_arms(factor: float = 1.5) -> Floats:
    """Both arms longer; nothing else changes."""
    upper, fore = 60 * (factor - 1), 50 * (factor - 1)
    return moved(
        {
            LEFT_ELBOW: (0, upper),
            RIGHT_ELBOW: (0, upper),
            LEFT_WRIST: (0, upper + fore),
            RIGHT_WRIST: (0, upper + fore),
        }
    )


def compared(template: Floats, reference: Floats) -> RetargetPlan:
    return measure(template, SIZE, reference, SIZE)


def plan_with(*changes: tuple[list[int], float], **fields: object) -> RetargetPlan:
    """A plan that changes nothing but the given limbs: no scale, no offset."""
    ratios = [1.0] * 19
    for limbs, ratio in changes:
        for limb in limbs:
            ratios[limb] = ratio
    plan = RetargetPlan(
        scale=1.0,
        offset=(0.0, 0.0),
        ratios=tuple(ratios),
        hand_factor=1.0,
        body_class="full",
        frame_size=SIZE,
        canvas=SIZE,
    )
    return replace(plan, **fields)  # type: ignore[arg-type]


def assert_places(placed: Floats, expected: dict[int, tuple[float, float]]) -> None:
    rows = list(expected)
    np.testing.assert_allclose(placed[rows, :2], [expected[row] for row in rows], rtol=0, atol=1e-9)


class TestMeasure:
    def test_the_same_person_only_sinks_by_half_an_ankle_toe_height(self) -> None:
        plan = compared(person(), person())
        np.testing.assert_allclose(plan.ratios, np.ones(19), rtol=0, atol=1e-12)
        assert plan == RetargetPlan(
            scale=1.0,
            offset=(0.0, -10.0),
            ratios=plan.ratios,
            hand_factor=1.0,
            body_class="full",
            frame_size=SIZE,
            canvas=SIZE,
        )
        placed = plan.apply(person())
        np.testing.assert_allclose(placed, on_wrists(shifted(0, 10)), rtol=0, atol=1e-9)

    def test_longer_legs_in_a_larger_picture(self) -> None:
        """320 px from nose to ankles against 420: S = 320 / 420; thighs of 200 px become 152."""
        down = (0, 100)
        reference = moved(dict.fromkeys((*range(LEFT_KNEE, RIGHT_ANKLE + 1), *range(17, 23)), down))
        plan = measure(person(), SIZE, reference, (840, 630))
        assert plan.scale == pytest.approx(320 / 420, abs=1e-12)
        expected = np.full(19, 320 / 420)
        expected[THIGHS] = 200 / 100 * 320 / 420
        np.testing.assert_allclose(plan.ratios, expected, rtol=0, atol=1e-12)
        assert plan.hand_factor == pytest.approx(1.0, abs=1e-12)
        assert plan.canvas == (840, 630)
        placed = plan.apply(person())
        # Hips over hips, ankles on the reference's height between ankles (480) and toes (500), and
        # from neck to ankles 100 + 200 + 80 px as in the reference.
        assert_places(
            placed, {LEFT_ANKLE: (220, 490), RIGHT_HIP: (180, 210), RIGHT_KNEE: (180, 410)}
        )
        assert_places(placed, {LEFT_SHOULDER: (240, 110), RIGHT_SHOULDER: (160, 110)})

    def test_the_scaled_reference_has_whole_pixels(self) -> None:
        """The ratio of the sizes, 0.5, makes 200 px of 401: half bodies show the rounding."""
        hidden = dict.fromkeys((LEFT_HIP, RIGHT_HIP, LEFT_ANKLE, RIGHT_ANKLE), 0.35)
        plan = measure(with_scores(hidden), (300, 401), with_scores(hidden), (1200, 401))
        assert plan.scale == pytest.approx(0.5, abs=1e-12)
        assert plan.offset[0] == pytest.approx(200 - 200 / 401 * 200, abs=1e-12)
        assert plan.offset[1] == pytest.approx(100 - 50, abs=1e-12)
        assert plan.ratios[0] == pytest.approx(200 / 401, abs=1e-12)

    def test_scale_follows_ankles_then_hips_then_picture_sizes(self) -> None:
        """Nose to ankles 320 against 320, nose to hips 140 against 100, sizes 2 to 1."""
        reference = moved({LEFT_HIP: (0, -40), RIGHT_HIP: (0, -40)})
        small = (300, 200)
        assert measure(person(), SIZE, reference, small).scale == 1.0
        for hidden in (LEFT_ANKLE, RIGHT_ANKLE):
            for pair in (
                (with_scores({hidden: 0.5}), reference),
                (person(), with_scores({hidden: 0.5}, reference)),
            ):
                plan = measure(pair[0], SIZE, pair[1], small)
                assert plan.scale == pytest.approx(1.4, abs=1e-12)
        for hidden in (NOSE, LEFT_HIP):
            template = with_scores({hidden: 0.5, LEFT_ANKLE: 0.5})
            plan = measure(template, SIZE, reference, small)
            assert plan.scale == pytest.approx(2.0, abs=1e-12)

    def test_a_person_lying_down_does_not_divide_by_zero(self) -> None:
        flat = person()
        flat[:, 1] = 100
        for template, reference in ((flat, person()), (person(), flat), (flat, flat)):
            plan = compared(template, reference)
            assert plan.scale == 1.0
            assert np.isfinite(plan.ratios).all()
            assert np.isfinite(plan.apply(person())).all()

    @pytest.mark.parametrize(
        ("template_scores", "height", "expected"),
        [
            ({}, 600, "full"),
            ({}, 380, "full"),  # ankles on the last line
            ({}, 379, "three-quarter"),
            ({}, 199, "half"),
            ({LEFT_ANKLE: 0.4}, 600, "full"),
            ({LEFT_ANKLE: 0.39}, 600, "three-quarter"),
            ({RIGHT_HIP: 0.39}, 600, "half"),
            ({RIGHT_HIP: np.nan}, 600, "half"),
        ],
    )
    def test_the_lower_body_class_counts(
        self, template_scores: dict[int, float], height: int, expected: str
    ) -> None:
        cut = with_scores(template_scores)
        assert measure(cut, (height, 400), person(), SIZE).body_class == expected
        assert measure(person(), SIZE, cut, (height, 400)).body_class == expected

    def test_bodies_without_feet_are_aligned_at_the_neck(self) -> None:
        reference = with_scores({LEFT_ANKLE: 0.1}, shifted(30, 40))
        offset = compared(person(), reference).offset
        np.testing.assert_allclose(offset, (-30, -40), rtol=0, atol=1e-12)

    def test_sole_without_a_seen_toe_is_the_ankle(self) -> None:
        hidden = dict.fromkeys(range(17, 23), 0.2)
        assert compared(person(), with_scores(hidden)).offset == (0.0, 0.0)

    def test_the_longer_side_counts_but_heads_are_averaged(self) -> None:
        """A left forearm of 75 px against 50; a left eye and ear further out."""
        reference = moved({LEFT_WRIST: (0, 25), LEFT_EYE: (10, -10), LEFT_EAR: (15, -10)})
        ratios = np.array(compared(person(), reference).ratios)
        np.testing.assert_allclose(ratios[FOREARMS], 1.5, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ratios[EYES], 1.5, rtol=0, atol=1e-12)
        ear = (1 + np.hypot(15, 5) / np.hypot(10, 5)) / 2
        np.testing.assert_allclose(ratios[EARS], ear, rtol=0, atol=1e-12)
        others = np.setdiff1d(np.arange(19), [*FOREARMS, *EYES, *EARS])
        np.testing.assert_allclose(ratios[others], 1, rtol=0, atol=1e-12)

    def test_shorter_sides_do_not_count(self) -> None:
        reference = moved({LEFT_WRIST: (0, -10), RIGHT_KNEE: (0, -10)})
        ratios = np.array(compared(person(), reference).ratios)
        np.testing.assert_allclose(ratios[[*FOREARMS, *THIGHS]], 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ratios[SHINS], 90 / 80, rtol=0, atol=1e-12)

    def test_plan_does_not_depend_on_rows_that_are_not_drawn(self) -> None:
        plan = compared(person(), long_arms())
        changed = long_arms()
        changed[FACE] = changed[RIGHT_HEEL] = np.nan
        assert compared(person(), changed) == plan


class TestUnseenLimbs:
    """A limb counts if both ends have score 0.3 in both pictures."""

    def test_the_other_side_stands_in(self) -> None:
        """A guess would be three times the seen side, and the larger side would win."""
        for pair, place in (
            (
                (with_scores({LEFT_WRIST: 0.29}, moved({LEFT_WRIST: (0, -33)})), person()),
                "template frame",
            ),
            (
                (person(), with_scores({LEFT_WRIST: 0.29}, moved({LEFT_WRIST: (0, 100)}))),
                "reference picture",
            ),
        ):
            plan = compared(*pair)
            np.testing.assert_allclose(np.array(plan.ratios)[FOREARMS], 1, rtol=0, atol=1e-12)
            assert plan.warnings == (
                f"Not clearly seen in the {place}: left forearm; the other side stands in.",
            )

    def test_a_score_of_three_tenths_is_seen(self) -> None:
        plan = compared(person(), with_scores({LEFT_WRIST: 0.3}, moved({LEFT_WRIST: (0, 60)})))
        np.testing.assert_allclose(np.array(plan.ratios)[FOREARMS], 2.2, rtol=0, atol=1e-12)
        assert plan.warnings == (
            "The forearms would come out 2.2 times too long for the body: mostly they are bent or "
            "turned in the template frame; another template frame may help.",
        )

    @pytest.mark.parametrize(("longer", "warns"), [(24, False), (26, True)])
    def test_arms_that_are_half_as_long_again_are_told(self, longer: float, warns: bool) -> None:
        """50 px and up to 25 more are taken for a body's own proportions."""
        plan = compared(person(), moved({LEFT_WRIST: (0, longer)}))
        assert any("too long for the body" in line for line in plan.warnings) is warns

    @pytest.mark.parametrize(("longer", "expected"), [(4, 1.08), (6, 1.0), (-30, 1.0)])
    def test_a_guess_that_confirms_the_other_side_counts(
        self, longer: float, expected: float
    ) -> None:
        """54 px against 50 agree within a tenth, 56 do not."""
        reference = with_scores({RIGHT_WRIST: 0.1}, moved({RIGHT_WRIST: (0, longer)}))
        plan = compared(person(), reference)
        np.testing.assert_allclose(np.array(plan.ratios)[FOREARMS], expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("longer", "expected"), [(10, 1.2), (24, 1.48), (26, 1.0), (-16, 0.68), (-18, 1.0)]
    )
    def test_without_a_seen_side_a_plausible_guess_is_used(
        self, longer: float, expected: float
    ) -> None:
        """Forearms of 50 px; the shoulders say 1, and two thirds to three halves are believed."""
        wrists = (LEFT_WRIST, RIGHT_WRIST)
        reference = with_scores(
            dict.fromkeys(wrists, 0.1), moved(dict.fromkeys(wrists, (0, longer)))
        )
        plan = compared(person(), reference)
        np.testing.assert_allclose(np.array(plan.ratios)[FOREARMS], expected, rtol=0, atol=1e-12)
        source = "the pose model's guess" if expected != 1 else "the overall build"
        assert plan.warnings == (
            f"Not clearly seen in the reference picture: forearms; {source} is used.",
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
    def test_missing_legs_get_the_overall_build(self, bad: float) -> None:
        """Shoulders of 60 px against 40; everything else as in the template."""
        reference = moved({LEFT_SHOULDER: (20, 0), RIGHT_SHOULDER: (-20, 0)})
        reference[LEFT_KNEE : RIGHT_HEEL + 1, 1] = bad
        plan = compared(person(), reference)
        ratios = np.array(plan.ratios)
        legs = [*THIGHS, *SHINS, *FEET]
        np.testing.assert_allclose(ratios[[*SHOULDERS, *legs]], 1.5, rtol=0, atol=1e-12)
        assert plan.body_class == "three-quarter"
        assert plan.warnings == (
            "Not clearly seen in the reference picture: thighs, shins and feet; "
            "the overall build is used.",
        )

    def test_lines_are_grouped_by_what_stands_in(self) -> None:
        template = with_scores({LEFT_ELBOW: 0.1})
        template[[LEFT_ELBOW], 0] += 500
        reference = with_scores(dict.fromkeys((NOSE, LEFT_KNEE), np.nan))
        assert compared(template, reference).warnings == (
            "Not clearly seen in the template frame and the reference picture: left upper arm, "
            "left forearm, left thigh and left shin; the other side stands in.",
            "Not clearly seen in the reference picture: neck and eyes; the overall build is used.",
        )

    def test_with_one_shoulder_each_only_arms_and_torso_tell_the_build(self) -> None:
        template = with_scores({LEFT_SHOULDER: 0.1})
        reference = with_scores({RIGHT_SHOULDER: 0.1}, long_arms(1.5))
        reference[[LEFT_EAR, RIGHT_EAR]] = np.nan
        plan = compared(template, reference)
        # Forearms say 1.5, the torso 1; no side shows both ends of an upper arm in both pictures.
        np.testing.assert_allclose(np.array(plan.ratios)[EARS], 1.25, rtol=0, atol=1e-12)
        assert plan.hand_factor == pytest.approx(1.25, abs=1e-12)

    @pytest.mark.parametrize("bad", [np.nan, 0.1])
    def test_shoulders_alone_are_enough(self, bad: float) -> None:
        """A head-and-shoulders reference: everything grows with the shoulders."""
        reference = np.full((133, 3), np.nan)
        reference[[LEFT_SHOULDER, RIGHT_SHOULDER]] = [(300, 100, 0.9), (180, 100, 0.9)]
        if not np.isnan(bad):
            reference[np.isnan(reference[:, 0])] = (-900, -900, bad)
        plan = compared(person(), reference)
        np.testing.assert_allclose(plan.ratios, 1.5, rtol=0, atol=1e-12)
        assert plan.hand_factor == 1.5
        assert plan.offset == (-40.0, 0.0)
        assert plan.body_class == "half"

    @pytest.mark.parametrize(
        ("shoulders", "score"), [((np.nan, np.nan), "0.00"), ((0.5, 0.08), "0.29")]
    )
    def test_nobody_to_measure_is_one_clear_line(
        self, shoulders: tuple[float, float], score: str
    ) -> None:
        hidden = with_scores(dict(zip((LEFT_SHOULDER, RIGHT_SHOULDER), shoulders, strict=True)))
        for pair, place, remedy in (
            ((hidden, person()), "template frame", "another template frame"),
            (
                (person(), hidden),
                "reference picture",
                "a reference picture that shows both shoulders",
            ),
        ):
            message = (
                f"cannot retarget: the {place} shows no neck (score {score}, the mean of both "
                f"shoulders, and 0.3 is needed). Give {remedy}, or do not retarget."
            )
            with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
                compared(*pair)


class TestDoubtfulMeasurements:
    def test_a_side_view_does_not_explode_the_hands(self) -> None:
        """Shoulders of 4 px against 40: the body follows, ten times too wide, but not the hands."""
        template = moved({LEFT_SHOULDER: (-36, 0), RIGHT_SHOULDER: (36, 0)})
        template[[LEFT_ELBOW, LEFT_WRIST], 0] -= 36
        template[[RIGHT_ELBOW, RIGHT_WRIST], 0] += 36
        template[[LEFT_KNEE, RIGHT_KNEE], 1] -= 20
        plan = compared(template, person())
        np.testing.assert_allclose(np.array(plan.ratios)[SHOULDERS], 10, rtol=0, atol=1e-12)
        assert plan.hand_factor == 1.0
        assert plan.warnings == (
            "The proportions hardly fit: the shoulders would grow 12 times relative to the shins. "
            "Mostly a limb is bent or turned in the template frame or the reference picture; "
            "another template frame may help.",
            "The person stands sideways in the template frame (a shoulder measures 0.04 of the "
            "torso, from the front it is about 0.33): proportions will come out wrong.",
            "The shoulders ask for hands 10 times as large as arms and torso do: "
            "the hands follow arms and torso.",
        )

    @pytest.mark.parametrize(
        ("shoulder", "factor", "sideways"),
        [(80.0, 2.0, False), (81.0, 1.0, False), (26.0, 0.65, False), (20.0, 0.5, True)],
    )
    def test_half_or_twice_the_build_is_believed(
        self, shoulder: float, factor: float, sideways: bool
    ) -> None:
        """Shoulders of 40 px in the template; a quarter of the torso is 25 px."""
        outward = shoulder - 40
        reference = moved({LEFT_SHOULDER: (outward, 0), RIGHT_SHOULDER: (-outward, 0)})
        reference[[LEFT_ELBOW, LEFT_WRIST], 0] += outward
        reference[[RIGHT_ELBOW, RIGHT_WRIST], 0] -= outward
        plan = compared(person(), reference)
        assert plan.hand_factor == pytest.approx(factor, abs=1e-12)
        assert any("hands" in line for line in plan.warnings) == (shoulder == 81)
        assert any("sideways in the reference" in line for line in plan.warnings) == sideways

    def test_one_bent_arm_does_not_spoil_the_build(self) -> None:
        """Forearms a tenth as long, in a side view: torso and upper arms outvote them."""
        template = moved({LEFT_SHOULDER: (-36, 0), RIGHT_SHOULDER: (36, 0)})
        template[[LEFT_ELBOW, LEFT_WRIST], 0] -= 36
        template[[RIGHT_ELBOW, RIGHT_WRIST], 0] += 36
        template[[LEFT_WRIST, RIGHT_WRIST], 1] = 165
        assert compared(template, person()).hand_factor == 1.0

    @pytest.mark.parametrize(("longer", "warned"), [(99, False), (101, True)])
    def test_proportions_beyond_three_to_one(self, longer: float, warned: bool) -> None:
        """Forearms of 50 px."""
        reference = moved({LEFT_WRIST: (0, longer), RIGHT_WRIST: (0, longer)})
        lines = [line for line in compared(person(), reference).warnings if "proport" in line]
        assert bool(lines) == warned
        if warned:
            assert "the forearms would grow 3 times relative to the " in lines[0]

    def test_somebody_who_does_not_stand(self) -> None:
        """Turned on the side, the same person is 7 px from nose to ankles."""
        lying = person()
        lying[:, :2] = lying[:, [1, 0]]
        lying[[LEFT_ANKLE, RIGHT_ANKLE], 1] += 40
        (line,) = compared(lying, person()).warnings
        assert line == (
            "Height and bone lengths disagree by a factor of 8: somebody does not stand upright in "
            "the template frame or the reference picture, and ways across the picture will come "
            "out too long."
        )
        assert compared(person(), lying).warnings[-1].endswith("will come out too short.")

    def test_confused_hands(self) -> None:
        template = person()
        template[[*range(91, 133)]] = template[[*range(112, 133), *range(91, 112)]]
        assert compared(template, person()).warnings == (
            "Left and right hand look confused in the template frame: "
            "each hand goes to the wrist that it lies at.",
        )


class TestHandsLookSwapped:
    def swapped(self) -> Floats:
        keypoints = person()
        keypoints[[*range(91, 133)]] = keypoints[[*range(112, 133), *range(91, 112)]]
        return keypoints

    def test_hands_at_the_other_wrists(self) -> None:
        assert not hands_look_swapped(person())
        assert hands_look_swapped(self.swapped())

    @pytest.mark.parametrize("unseen_root", [91, 112])
    def test_one_seen_hand_decides(self, unseen_root: int) -> None:
        assert not hands_look_swapped(with_scores({unseen_root: 0.39}))
        assert hands_look_swapped(with_scores({unseen_root: 0.39}, self.swapped()))

    def test_labels_stand_where_hands_or_a_wrist_are_not_seen(self) -> None:
        assert not hands_look_swapped(with_scores({91: 0.39, 112: np.nan}, self.swapped()))
        assert not hands_look_swapped(with_scores({LEFT_WRIST: 0.29}, self.swapped()))

    def test_one_hand_near_both_wrists_does_not_outvote_the_other(self) -> None:
        """The left hand's root is 30 px from its wrist and 20 from the other, the right one's 0."""
        keypoints = person()
        keypoints[[LEFT_WRIST, RIGHT_WRIST], :2] = ((225, 210), (175, 210))
        keypoints[[91, 112], :2] = ((195, 210), (175, 210))
        assert not hands_look_swapped(keypoints)


class TestApply:
    def test_nothing_to_change_changes_nothing(self) -> None:
        placed = plan_with().apply(person())
        np.testing.assert_allclose(placed, on_wrists(person()), rtol=0, atol=1e-12)

    def test_offset_comes_off_before_the_scale(self) -> None:
        placed = plan_with(offset=(20.0, -40.0), scale=2.0, hand_factor=0.5).apply(person())
        expected = on_wrists(shifted(-20, 40))[:, :2] / 2
        np.testing.assert_allclose(placed[:, :2], expected, rtol=0, atol=1e-12)

    def test_a_longer_limb_takes_along_what_hangs_on_it(self) -> None:
        placed = plan_with((UPPER_ARMS, 1.5)).apply(person())
        assert_places(
            placed,
            {
                LEFT_SHOULDER: (240, 100),
                LEFT_ELBOW: (240, 190),
                LEFT_WRIST: (240, 240),
                91: (240, 240),
                RIGHT_ELBOW: (160, 190),
                RIGHT_WRIST: (160, 240),
                112: (160, 240),
                LEFT_HIP: (220, 200),
                NOSE: (200, 60),
            },
        )

    def test_wider_shoulders_keep_the_neck_and_the_torso(self) -> None:
        placed = plan_with((SHOULDERS, 1.5)).apply(person())
        assert_places(
            placed,
            {
                LEFT_SHOULDER: (260, 100),
                RIGHT_SHOULDER: (140, 100),
                LEFT_WRIST: (260, 210),
                RIGHT_HIP: (180, 200),
            },
        )

    def test_a_foot_is_at_most_half_of_the_new_shin(self) -> None:
        """Ankle to toe (-12, 20), 23.3 px; shins of 80 px halved leave 20 px."""
        placed = plan_with((SHINS, 0.5)).apply(person())
        share = 20 / np.hypot(12, 20)
        toe = skeleton.body_joints(placed)[19, :2]
        np.testing.assert_allclose(toe, (180 - 12 * share, 340 + 20 * share), rtol=0, atol=1e-9)
        assert_places(
            placed,
            {
                RIGHT_BIG_TOE: (180 - 14 * share, 340 + 20 * share),
                RIGHT_SMALL_TOE: (180 - 10 * share, 340 + 20 * share),
                RIGHT_HEEL: (180 + 4 * share, 340 + 10 * share),
            },
        )

    def test_a_foot_below_that_is_free(self) -> None:
        placed = plan_with((FEET, 1.5)).apply(person())
        assert_places(placed, {RIGHT_BIG_TOE: (159, 410), RIGHT_HEEL: (186, 395)})

    def test_the_face_grows_with_the_eyes_around_the_nose(self) -> None:
        placed = plan_with(([NECK_LIMB], 1.5), (EYES, 2.0)).apply(person())
        assert_places(placed, {NOSE: (200, 40), LEFT_EYE: (220, 20), RIGHT_EYE: (180, 20)})
        expected = (200, 40) + 2 * (person()[FACE, :2] - (200, 60))
        np.testing.assert_allclose(placed[FACE, :2], expected, rtol=0, atol=1e-9)

    def test_a_hand_is_set_on_its_wrist_and_scaled_around_its_root(self) -> None:
        """Roots lie at (1, 4) and (-1, 4) from the wrists, the last points 10, 20 further."""
        placed = plan_with(hand_factor=1.5).apply(person())
        assert_places(placed, {91: (240, 210), 111: (255, 240), 112: (160, 210), 132: (175, 240)})

    def test_hand_factor_is_a_ratio_of_final_and_source_pixels(self) -> None:
        placed = plan_with(hand_factor=1.5, scale=2.0).apply(person())
        assert_places(placed, {91: (120, 105), 111: (135, 135)})

    @pytest.mark.parametrize("score", [0.39, np.nan])
    def test_a_hand_without_a_clear_root_is_scaled_around_the_wrist(self, score: float) -> None:
        placed = plan_with(hand_factor=1.5).apply(with_scores({91: score}))
        assert_places(placed, {111: (240 + 1.5 * 11, 210 + 1.5 * 24), 132: (175, 240)})

    @pytest.mark.parametrize("score", [0.29, np.nan])
    def test_a_hand_root_ends_the_forearm_without_a_clear_wrist(self, score: float) -> None:
        """Elbow (240, 160), root (241, 214): twice as long."""
        keypoints = with_scores({LEFT_WRIST: score})
        placed = plan_with((FOREARMS, 2.0)).apply(keypoints)
        assert_places(placed, {91: (242, 268), 111: (252, 288)})

    def test_a_hand_without_wrist_and_root_keeps_its_place(self) -> None:
        keypoints = with_scores({LEFT_WRIST: np.nan, 91: np.nan})
        placed = plan_with((FOREARMS, 2.0), offset=(10.0, 0.0)).apply(keypoints)
        assert_places(placed, {111: (241, 234), 91: (0, 0)})

    def test_confused_hands_follow_the_wrist_they_lie_at(self) -> None:
        """The original puts them 180 px away from both arms."""
        keypoints = person()
        keypoints[[*range(91, 133)]] = keypoints[[*range(112, 133), *range(91, 112)]]
        placed = plan_with((UPPER_ARMS, 1.5)).apply(keypoints)
        assert_places(placed, {91: (160, 240), 112: (240, 240)})

    def test_scores_are_unchanged(self) -> None:
        keypoints = person()
        keypoints[:, 2] = np.linspace(0.001, 3, 133)
        placed = compared(person(), long_arms()).apply(keypoints)
        np.testing.assert_array_equal(placed[:, 2], keypoints[:, 2])

    def test_keypoints_are_left_as_they_were(self) -> None:
        keypoints = with_scores({LEFT_WRIST: np.nan, LEFT_SHOULDER: 0})
        before = keypoints.copy()
        compared(person(), long_arms()).apply(keypoints)
        np.testing.assert_array_equal(keypoints, before)

    @pytest.mark.parametrize("shape", [(17, 3), (133, 2), (1, 133, 3)])
    def test_other_keypoint_sets_are_refused(self, shape: tuple[int, ...]) -> None:
        message = f"^{re.escape(f'keypoints must be [133, 3], got {list(shape)}')}$"
        wrong = np.zeros(shape)
        for call in (
            lambda: plan_with().apply(wrong),
            lambda: compared(wrong, person()),
            lambda: compared(person(), wrong),
            lambda: hands_look_swapped(wrong),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_an_upright_neck_stays_upright_to_the_last_bit(self) -> None:
        """Drawing truncates its angle: 89.999999 degrees would turn the limb by a whole degree."""
        plan = compared(person(), long_arms(1.37))
        plan = replace(plan, scale=0.6220659, ratios=(1.0051587,) * 2 + plan.ratios[2:])
        for shift in np.linspace(0, 1, 50):
            joints = skeleton.body_joints(plan.apply(shifted(shift * 256, 0)))
            assert abs(joints[0, 0] - joints[1, 0]) < 1e-12
        exact = skeleton.body_joints(plan.apply(person()))
        assert exact[0, 0] == exact[1, 0]


class TestMissingRows:
    @pytest.mark.parametrize(
        "bad",
        [
            (np.nan, 5, 0.9),
            (5, np.inf, 0.9),
            (5, 5, np.nan),
            (-np.inf, np.nan, np.nan),
            (1e9, 5, 0.9),
            (5, 5, 0.0),
            (5, 5, -0.2),
        ],
    )
    def test_a_missing_joint_comes_out_as_zeros(self, bad: tuple[float, float, float]) -> None:
        keypoints = person()
        keypoints[RIGHT_EAR] = bad
        keypoints[[30, 100]] = bad
        placed = plan_with((UPPER_ARMS, 1.5)).apply(keypoints)
        np.testing.assert_array_equal(placed[[RIGHT_EAR, 30, 100]], np.zeros((3, 3)))
        assert_places(placed, {LEFT_ELBOW: (240, 190), LEFT_EAR: (220, 55)})

    def test_a_limb_over_a_missing_joint_has_the_mean_ratio(self) -> None:
        """Shoulder to wrist is 110 px; upper arm 1.5 and forearm 2.0 make 1.75 together."""
        keypoints = with_scores({LEFT_ELBOW: np.nan})
        placed = plan_with((UPPER_ARMS, 1.5), (FOREARMS, 2.0)).apply(keypoints)
        assert_places(placed, {LEFT_WRIST: (240, 100 + 1.75 * 110), RIGHT_WRIST: (160, 290)})
        assert_places(placed, {91: (240, 100 + 1.75 * 110)})

    def test_over_two_missing_joints(self) -> None:
        """Neck to ankle is (20, 280) px; torso 1.0, thigh 1.2 and shin 1.7 make 1.3."""
        keypoints = with_scores({LEFT_HIP: 0, LEFT_KNEE: np.nan})
        placed = plan_with((THIGHS, 1.2), (SHINS, 1.7)).apply(keypoints)
        assert_places(placed, {LEFT_ANKLE: (200 + 1.3 * 20, 100 + 1.3 * 280)})

    @pytest.mark.parametrize(("row", "partner"), [(LEFT_SHOULDER, 6), (RIGHT_SHOULDER, 5)])
    def test_a_missing_shoulder_lies_on_the_other(self, row: int, partner: int) -> None:
        """The neck moves there as well and carries the rest; a mean with (0, 0) would not."""
        placed = plan_with((TORSO, 1.5)).apply(with_scores({row: np.nan}))
        np.testing.assert_allclose(placed[row, :2], placed[partner, :2], rtol=0, atol=1e-12)
        assert placed[row, 2] == 0
        neck_x, neck_y = person()[partner, :2]
        assert_places(
            placed, {LEFT_HIP: (neck_x + 1.5 * (220 - neck_x), neck_y + 1.5 * (200 - neck_y))}
        )

    def test_a_missing_toe_lies_on_the_other(self) -> None:
        placed = plan_with().apply(with_scores({RIGHT_BIG_TOE: np.nan}))
        np.testing.assert_array_equal(placed[RIGHT_BIG_TOE, :2], placed[RIGHT_SMALL_TOE, :2])
        assert placed[RIGHT_BIG_TOE, 2] == 0

    def test_without_a_neck_each_limb_starts_where_it_is(self) -> None:
        keypoints = with_scores({LEFT_SHOULDER: np.nan, RIGHT_SHOULDER: 0})
        placed = plan_with((THIGHS, 1.5), (TORSO, 1.5), (UPPER_ARMS, 1.5)).apply(keypoints)
        assert_places(
            placed,
            {
                NOSE: (200, 60),
                LEFT_ELBOW: (240, 160),
                LEFT_HIP: (220, 200),
                LEFT_KNEE: (220, 350),
                LEFT_SHOULDER: (0, 0),
            },
        )

    def test_nobody_at_all(self) -> None:
        for empty in (np.full((133, 3), np.nan), np.zeros((133, 3))):
            np.testing.assert_array_equal(plan_with().apply(empty), np.zeros((133, 3)))


class TestTables:
    def test_limbs_are_the_drawn_ones(self) -> None:
        assert tuple((start, end) for start, end, _ in skeleton._LIMBS) == retarget._LIMBS

    def test_single_joints_are_the_drawn_ones(self) -> None:
        assert {
            joint: row
            for joint, row in enumerate(skeleton._JOINT_FIRST)
            if row == skeleton._JOINT_SECOND[joint]
        } == dict(zip(retarget._SINGLE_JOINTS, retarget._SINGLE_ROWS, strict=True))

    def test_every_limb_belongs_to_one_part(self) -> None:
        limbs = [limb for part in retarget._PARTS for limb in part.limbs]
        assert sorted(limbs) == list(range(19))


def test_plan_survives_json() -> None:
    plan = compared(person(), with_scores({NOSE: np.nan}, long_arms(1.37)))
    assert plan.warnings
    assert RetargetPlan.from_json(plan.to_json()) == plan
