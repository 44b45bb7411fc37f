"""Noise levels and weights, with numbers worked out by hand."""

import math

import pytest
import torch

from everanimate_cli.errors import SettingsError
from everanimate_cli.schedule import (
    euler_step,
    model_timestep,
    shifted_sigmas,
    training_schedule,
)


def test_shift_one_keeps_the_grid_linear() -> None:
    torch.testing.assert_close(
        shifted_sigmas(4, 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=1e-7
    )


def test_shift_five_stays_at_high_noise() -> None:
    # s = 1/2 becomes 5 * 0.5 / (1 + 4 * 0.5) = 5/6.
    torch.testing.assert_close(
        shifted_sigmas(2, 5.0), torch.tensor([1.0, 5 / 6, 0.0]), rtol=0, atol=1e-7
    )


def test_timesteps_are_rounded_for_bfloat16_only() -> None:
    sigmas = torch.tensor([1.0, 5 / 6])
    rounded = model_timestep(sigmas, torch.bfloat16)
    assert rounded.dtype == torch.float64
    assert rounded.tolist() == [1000.0, 832.0]
    for dtype in (torch.float32, torch.float16):
        assert model_timestep(sigmas, dtype).tolist() == pytest.approx([1000.0, 2500 / 3])
    stock = model_timestep(sigmas, torch.bfloat16, as_stock=True)
    assert stock.dtype == torch.float32
    assert stock.tolist() == pytest.approx([1000.0, 2500 / 3])


def test_euler_step_keeps_the_latents_in_float32() -> None:
    latents = torch.full((1, 2, 1, 1, 1), 3.0)
    velocity = torch.full((1, 2, 1, 1, 1), 2.0, dtype=torch.bfloat16)
    stepped = euler_step(latents, velocity, torch.tensor(1.0), torch.tensor(0.75))
    assert stepped.dtype == torch.float32
    assert stepped.flatten().tolist() == [2.5, 2.5]
    assert euler_step(latents, velocity, 0.75, 0.0).flatten().tolist() == [1.5, 1.5]


def test_training_weights() -> None:
    schedule = training_schedule(5.0)
    assert schedule.sigmas.shape == (1000,)
    assert int((schedule.sigmas >= 0.5).sum()) == 834
    assert schedule.loss_weights.sum().item() == pytest.approx(1000, rel=1e-5)
    # The bell is lowest at pure noise and highest next to timestep 500.
    assert schedule.loss_weights[0] == schedule.gaussian_weights[0] == 0
    assert schedule.loss_weights.max().item() == pytest.approx(2.08, abs=0.005)
    assert schedule.gaussian_weights.max() == 1
    assert schedule.gaussian_weights.argmax() == schedule.loss_weights.argmax() == 833
    lowest, highest = math.exp(-0.5), 1.0
    last = math.exp(-2 * ((schedule.timesteps[-1].item() - 500) / 1000) ** 2)
    expected = (last - lowest) / (highest - lowest)
    assert schedule.gaussian_weights[-1].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("num_steps", "shift", "message"),
    [
        (0, 5.0, "--steps 0 is too few. Give at least 1."),
        (4, 0.0, "--shift 0.0 does not order the noise levels. Give more than 0."),
    ],
)
def test_impossible_schedules_are_refused(num_steps: int, shift: float, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        shifted_sigmas(num_steps, shift)
    assert str(caught.value) == message
