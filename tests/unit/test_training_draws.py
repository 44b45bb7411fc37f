"""The draws of a training sample: keyed by position and purpose, thresholded by probabilities."""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_fakes import train_settings

from everanimate_cli.errors import SettingsError
from everanimate_cli.schedule import NUM_TRAIN_TIMESTEPS
from everanimate_cli.training_draws import (
    NUM_LEVELS,
    Purpose,
    SampleDraw,
    Windows,
    draw_key,
    draw_sample,
    draw_step,
)

SETTINGS = train_settings()
LENGTHS = [40, 22, 30]
# Choice of a step -> the option that decides how often it is made.
PROBABILITIES = {
    "is_first": "first_chunk_probability",
    "repeats_reference": "reference_anchor_probability",
    "augments": "memory_augmentation",
    "degrades": "degradation_probability",
    "recycles": "error_recycling",
    "drops_pose": "pose_drop",
}

seeds = st.integers(0, 2**40)
indices = st.integers(0, 2**33)
probabilities = st.floats(0, 1)


def draw(index: int) -> SampleDraw:
    return draw_sample(SETTINGS, 3, index, LENGTHS)


def test_windows_of_the_released_length() -> None:
    windows = Windows(77)
    assert windows.num_frames == 158
    assert windows.reference == slice(0, 4)
    assert windows.previous == slice(4, 85)
    assert windows.target == slice(81, 158)


@given(st.integers(1, 40).map(lambda n: 4 * n + 1))
def test_windows_of_any_length(frames_per_chunk: int) -> None:
    windows = Windows(frames_per_chunk)
    frames = range(windows.num_frames)
    assert len(frames) == 2 * frames_per_chunk + 4
    assert [*frames[windows.reference], *frames[windows.previous]] == list(
        range(frames_per_chunk + 8)
    )
    assert list(frames[windows.previous])[-4:] == list(frames[windows.target])[:4]
    assert len(frames[windows.target]) == frames_per_chunk
    assert frames[windows.target][-1] == frames[-1]


@given(seeds, indices, st.lists(st.integers(22, 90), min_size=1, max_size=6))
def test_a_sample_stays_within_its_clip(seed: int, index: int, lengths: list[int]) -> None:
    sample = draw_sample(SETTINGS, seed, index, lengths)
    assert 0 <= sample.start <= lengths[sample.clip_index] - 22
    assert 0 <= sample.reference_index < 4
    assert len(sample.anchor_indices) == 4
    assert all(low < high for low, high in pairwise(sample.anchor_indices))
    assert sample.anchor_indices[0] >= 0
    assert sample.anchor_indices[-1] < 13
    assert sample == draw_sample(SETTINGS, seed, index, lengths)


def test_every_choice_is_made_somewhere() -> None:
    samples = [draw_sample(SETTINGS, 0, index, [25]) for index in range(600)]
    assert {sample.start for sample in samples} == {0, 1, 2, 3}
    assert {sample.reference_index for sample in samples} == {0, 1, 2, 3}
    assert {i for sample in samples for i in sample.anchor_indices} == set(range(13))
    affines = np.array([(s.affine.scale, s.affine.x, s.affine.y) for s in samples])
    np.testing.assert_allclose(affines.min(axis=0), [0.8, -0.1, -0.1], atol=2e-3)
    np.testing.assert_allclose(affines.max(axis=0), [1.2, 0.1, 0.1], atol=2e-3)
    assert np.abs(np.corrcoef(affines.T) - np.eye(3)).max() < 0.15
    assert all(sample.degradation != sample.recycling for sample in samples)


def test_every_clip_comes_once_an_epoch_in_another_order() -> None:
    lengths = [22] * 7
    epochs = [
        [draw_sample(SETTINGS, 0, 7 * epoch + i, lengths).clip_index for i in range(7)]
        for epoch in range(5)
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@given(seeds, indices, st.sampled_from(sorted(PROBABILITIES)), probabilities, probabilities)
def test_a_probability_changes_no_other_draw(
    seed: int, index: int, choice: str, before: float, after: float
) -> None:
    low, high = sorted([before, after])
    option = PROBABILITIES[choice]
    rare = replace(SETTINGS, **{option: low})
    often = replace(SETTINGS, **{option: high})
    first, second = (asdict(draw_step(given, seed, index)) for given in (rare, often))
    assert first.pop(choice) <= second.pop(choice)  # what happens at the lower one, happens
    assert first == second
    assert draw_sample(rare, seed, index, LENGTHS) == draw_sample(often, seed, index, LENGTHS)


@given(seeds, indices, st.sampled_from(sorted(PROBABILITIES)))
def test_probabilities_of_none_and_all(seed: int, index: int, choice: str) -> None:
    for probability in (0.0, 1.0):
        settings = replace(SETTINGS, **{PROBABILITIES[choice]: probability})
        assert getattr(draw_step(settings, seed, index), choice) is bool(probability)


def test_choices_come_as_often_as_asked_and_independently() -> None:
    settings = replace(SETTINGS, error_recycling=0.95)
    count = 3000
    steps = [draw_step(settings, 1, index) for index in range(count)]
    made = np.array([[getattr(step, choice) for choice in PROBABILITIES] for step in steps])
    wanted = np.array([getattr(settings, option) for option in PROBABILITIES.values()])
    # Four deviations of a binomial; a wrong probability by 0.04 is seen.
    bound = 4 * np.sqrt(wanted * (1 - wanted) / count)
    assert (np.abs(made.mean(axis=0) - wanted) < bound).all()
    assert np.abs(np.corrcoef(made.T) - np.eye(len(PROBABILITIES))).max() < 0.08
    levels = np.array([step.step_index for step in steps])
    assert (levels.min(), levels.max()) == (pytest.approx(0, abs=5), pytest.approx(999, abs=5))
    assert np.bincount(levels // 100, minlength=10) == pytest.approx(count / 10, rel=0.25)
    assert abs(np.corrcoef(levels, made[:, 3])[0, 1]) < 0.08


def test_levels_are_those_of_the_training_schedule() -> None:
    assert NUM_LEVELS == NUM_TRAIN_TIMESTEPS


def test_order_of_calls_and_other_processes_change_nothing() -> None:
    expected = {index: draw(index) for index in range(24)}
    shuffled = list(expected)
    random.Random(0).shuffle(shuffled)
    assert {index: draw(index) for index in shuffled} == expected
    # Not `draw`, so that the other processes need not import torch with this file.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(draw_sample, SETTINGS, 3, clip_lengths=LENGTHS), shuffled)
        assert dict(zip(shuffled, found, strict=True)) == expected


def test_seeds_and_samples_differ() -> None:
    starts = [
        tuple(draw_sample(SETTINGS, seed, index, [2000]).start for index in range(8))
        for seed in range(8)
    ]
    assert len({start for row in starts for start in row}) > 55


def test_no_stream_is_that_of_a_chunk() -> None:
    """numpy pads a key with zeros: purpose 0 would give the noise of chunk `index` again."""
    chunk = np.random.SeedSequence([3, 7]).generate_state(4)
    assert (np.random.SeedSequence([3, 7, 0]).generate_state(4) == chunk).all()
    for purpose in Purpose:
        assert (draw_key(3, 7, purpose).generate_state(4) != chunk).any()
    assert len({tuple(draw_key(3, 7, purpose).generate_state(4)) for purpose in Purpose}) == 15


def test_values_of_a_seed_stay_as_they_are() -> None:
    """Latent caches and resumed trainings of earlier versions depend on them."""
    sample = draw_sample(SETTINGS, 3, 7, [40, 22, 2000])
    assert (sample.clip_index, sample.start, sample.reference_index) == (2, 1765, 3)
    assert sample.anchor_indices == (3, 6, 7, 9)
    affine = sample.affine
    assert (affine.scale, affine.x, affine.y) == pytest.approx(
        (1.103299431, 0.070485384, 0.076845702)
    )
    assert sample.degradation.contrast_limit == pytest.approx(4.0927635890)
    assert sample.recycling.contrast_limit == pytest.approx(62.209383446)
    step = draw_step(SETTINGS, 3, 7)
    assert step.step_index == 532
    assert [name for name, made in asdict(step).items() if made is True] == ["degrades"]


def test_too_short_a_clip_is_a_bug() -> None:
    with pytest.raises(ValueError, match="clip 0 has 21 of 22 frames"):
        draw_sample(SETTINGS, 0, 0, [21])


def test_more_slots_than_frames() -> None:
    settings = replace(SETTINGS, identity_slots=14)
    with pytest.raises(SettingsError) as caught:
        draw_sample(settings, 0, 0, [30])
    assert str(caught.value) == (
        "--frames-per-chunk 9 gives 13 frames to choose 14 identity slots from. Give longer chunks "
        "or fewer --identity-slots."
    )
