"""Laws of the noise levels, for every number of steps and shift."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everanimate_cli.schedule import (
    euler_step,
    model_timestep,
    shifted_sigmas,
    training_schedule,
)

step_counts = st.integers(1, 200)
shifts = st.floats(0.1, 20)


@given(num_steps=step_counts, shift=shifts)
def test_sigmas_fall_from_one_to_zero(num_steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@given(num_steps=step_counts, shift=shifts, more=st.floats(0.5, 10))
def test_a_larger_shift_stays_noisier(num_steps: int, shift: float, more: float) -> None:
    assert (shifted_sigmas(num_steps, shift + more) >= shifted_sigmas(num_steps, shift)).all()


@given(num_steps=step_counts, shift=shifts)
def test_rounded_timesteps_stay_in_order_and_near(num_steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(num_steps, shift)
    rounded = model_timestep(sigmas, torch.bfloat16)
    assert (rounded.diff() <= 0).all()
    torch.testing.assert_close(rounded, 1000 * sigmas.double(), rtol=2**-8, atol=0)


@given(num_steps=step_counts, shift=shifts)
def test_a_straight_trajectory_is_followed_exactly_by_any_schedule(
    num_steps: int, shift: float
) -> None:
    clean, noise = torch.tensor([-2.0, 0.5]), torch.tensor([1.0, 3.0])
    sigmas = shifted_sigmas(num_steps, shift)
    latents = noise
    for sigma, next_sigma in pairwise(sigmas):
        latents = euler_step(latents, noise - clean, sigma, next_sigma)
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-4)


@given(shift=shifts)
@settings(max_examples=25)
def test_training_weights_are_those_of_a_bell(shift: float) -> None:
    schedule = training_schedule(shift)
    for weights in (schedule.gaussian_weights, schedule.loss_weights):
        assert (weights >= 0).all()
        peak = int(weights.argmax())
        assert (weights[: peak + 1].diff() >= 0).all()
        assert (weights[peak:].diff() <= 0).all()
    assert schedule.gaussian_weights.max() == 1
