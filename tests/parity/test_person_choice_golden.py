"""The person that the released preprocessing picks from the boxes of one frame."""

from typing import Any

import numpy as np
import pytest
from pose_golden import GOLDEN

from everanimate_cli.tracking import choose_box

CASES: list[dict[str, Any]] = GOLDEN["person_choice_cases"]

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def chosen(rows: np.ndarray) -> list[float] | None:
    """The box and score that are picked; classes are the detector's business, 0 is a person."""
    people = rows[rows[:, 5] == 0]
    index = choose_box(people[:, :4], people[:, 4])
    return None if index is None else people[index, :5].tolist()


@cases
def test_choice(case: dict[str, Any]) -> None:
    assert chosen(np.array(case["candidates_xyxy_score_class"], float)) == case["chosen"]


@cases
def test_choice_does_not_depend_on_the_order(case: dict[str, Any]) -> None:
    rows = np.array(case["candidates_xyxy_score_class"], float)
    assert chosen(rows[::-1]) == case["chosen"]


def test_cases_tell_the_rule_from_simpler_ones() -> None:
    """Neither the best score nor the plain largest area gives all answers."""
    by_score, by_area = [], []
    for case in CASES:
        rows = np.array(case["candidates_xyxy_score_class"], float)
        rows = rows[(rows[:, 5] == 0) & (rows[:, 4] > 0.05)]
        if len(rows):
            areas = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])
            by_score.append(rows[rows[:, 4].argmax(), :5].tolist() == case["chosen"])
            by_area.append(rows[areas.argmax(), :5].tolist() == case["chosen"])
    assert not all(by_score)
    assert not all(by_area)
