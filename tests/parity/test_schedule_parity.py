"""`schedule.safetensors`: sigmas, timesteps, Euler steps, training weights."""

import re
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from everanimate_cli.schedule import (
    TrainingSchedule,
    euler_step,
    model_timestep,
    shifted_sigmas,
    training_schedule,
)

Golden = Callable[[str], dict[str, Tensor]]

SIGMA_TOLERANCE = 1e-6
TIMESTEP_TOLERANCE = 1e-3
WEIGHT_TOLERANCE = 1e-5


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def read_name(case: str) -> tuple[int, float]:
    """Points and shift, from e.g. infer20_shift5."""
    match = re.fullmatch(r"\D+(\d+)_shift([\d.]+)", case)
    assert match
    return int(match[1]), float(match[2])


@pytest.fixture
def expected(golden: Golden, request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Tensors of the test's case, by their name within it."""
    name = next(
        request.getfixturevalue(fixture)
        for fixture in ("infer_case", "train_case")
        if fixture in request.fixturenames
    )
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value
        for key, value in golden("schedule").items()
        if key.startswith(prefix)
    }


@pytest.fixture
def schedule(train_case: str) -> TrainingSchedule:
    num_points, shift = read_name(train_case)
    return training_schedule(shift, num_points)


def test_sampling_sigmas_and_timesteps(infer_case: str, expected: dict[str, Tensor]) -> None:
    sigmas = shifted_sigmas(*read_name(infer_case))
    assert_near(sigmas[:-1], expected["sigmas"], SIGMA_TOLERANCE)
    assert sigmas[-1] == 0
    assert_near(sigmas.diff(), expected["dsigma"], SIGMA_TOLERANCE)
    timesteps = model_timestep(sigmas[:-1], torch.float32)
    assert_near(timesteps, expected["timesteps"].double(), TIMESTEP_TOLERANCE)


def test_bfloat16_runs_feed_rounded_timesteps(infer_case: str, expected: dict[str, Tensor]) -> None:
    timesteps = model_timestep(shifted_sigmas(*read_name(infer_case))[:-1], torch.bfloat16)
    assert_near(timesteps, expected["timesteps_bf16_as_fed"].double(), 0)


def test_euler_replay(infer_case: str, expected: dict[str, Tensor]) -> None:
    sigmas = shifted_sigmas(*read_name(infer_case))
    latents = expected["euler.x_init"]
    for step, velocity in enumerate(expected["euler.velocities"]):
        latents = euler_step(latents, velocity, sigmas[step], sigmas[step + 1])
        if step == 0:
            assert_near(latents, expected["euler.x_after_first"], 1e-5)
    assert_near(latents, expected["euler.x_final"], 1e-5)


def test_plain_set_timesteps_of_diffusers_misses(
    infer_case: str, expected: dict[str, Tensor]
) -> None:
    num_steps, shift = read_name(infer_case)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(num_steps)
    error = (scheduler.sigmas[:-1] - expected["sigmas"]).abs().max()
    assert error > 1000 * SIGMA_TOLERANCE


def test_training_schedule(schedule: TrainingSchedule, expected: dict[str, Tensor]) -> None:
    assert_near(schedule.sigmas, expected["sigmas"], SIGMA_TOLERANCE)
    assert_near(schedule.timesteps, expected["timesteps"], TIMESTEP_TOLERANCE)
    assert_near(schedule.loss_weights, expected["loss_weight"], WEIGHT_TOLERANCE)
    gaussian = expected["alpha_gaussian_timestep"]
    assert_near(schedule.gaussian_weights, gaussian, WEIGHT_TOLERANCE)


def test_other_correction_schedules_follow_from_ours(
    schedule: TrainingSchedule, expected: dict[str, Tensor]
) -> None:
    lowest, highest = schedule.sigmas.min(), schedule.sigmas.max()
    ramp = (schedule.sigmas - lowest) / (highest - lowest)
    assert_near(ramp, expected["alpha_sigma_ramp"], WEIGHT_TOLERANCE)
    assert_near(schedule.loss_weights, expected["alpha_scheduler_weight"], WEIGHT_TOLERANCE)


def test_look_ups_of_a_bfloat16_training_run(
    schedule: TrainingSchedule, expected: dict[str, Tensor]
) -> None:
    """The released trainer rounds before it looks up; ours does not, but its numbers explain it."""
    fed = model_timestep(schedule.sigmas, torch.bfloat16)
    assert_near(fed, expected["bf16_timestep"].double(), 0)
    found = (schedule.timesteps - fed.float()[:, None]).abs().argmin(dim=1)
    assert_near(found.float(), expected["bf16_lookup_index"], 0)
    rounded = schedule.gaussian_weights.to(torch.bfloat16).float()
    assert_near(rounded, expected["alpha_gaussian_timestep_bf16"], 0.004)
