"""`rfm.safetensors`: noisy latents, targets and losses of restorative flow matching."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from everanimate_cli.objective import (
    correction_weight,
    gate_degradation,
    training_pair,
    velocity_loss,
)
from everanimate_cli.schedule import (
    NUM_TRAIN_TIMESTEPS,
    TrainingSchedule,
    training_schedule,
)
from everanimate_cli.train_settings import Correction

Golden = Callable[[str], dict[str, Tensor]]

TOLERANCE = 1e-5
# 1 / sigma at the last step divides by 0.005.
TOLERANCE_EXACT = 2e-4
MIN_SIGMA = 0.5
CORRECTIONS: dict[str, Correction] = {
    "gaussian_timestep": "gaussian",
    "augmented_velocity": "exact",
    "fixed": "constant",
}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def tensors(golden: Golden) -> dict[str, Tensor]:
    return golden("rfm")


@pytest.fixture
def step_index(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["step_ids"].long()


@pytest.fixture
def schedule(golden: Golden) -> TrainingSchedule:
    """The schedule of `NUM_TRAIN_TIMESTEPS` points, with the shift of `schedule.safetensors`."""
    pattern = rf"train{NUM_TRAIN_TIMESTEPS}_shift([\d.]+)\.sigmas"
    shifts = [match[1] for key in golden("schedule") if (match := re.fullmatch(pattern, key))]
    return training_schedule(float(shifts[0]))


@pytest.fixture
def batch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clean and degraded latents, noise and prediction, one row per noise level."""
    anchors = tensors["anchor_latents"][None]
    full = {
        "clean": torch.cat([anchors, tensors["clean_latents"]], dim=2),
        "degraded": torch.cat([anchors, tensors["aug_latents"]], dim=2),
        "noise": tensors["noise"],
        "prediction": tensors["model_pred"],
    }
    assert_near(full["clean"], tensors["clean_full"], 0)
    assert_near(full["degraded"], tensors["aug_full"], 0)
    assert_near(full["degraded"], tensors["aug_full_no_anchor_hint"], 0)
    count = len(tensors["step_ids"])
    return {name: value.expand(count, -1, -1, -1, -1) for name, value in full.items()}


def read_weight(
    correction_case: str, schedule: TrainingSchedule, step_index: Tensor
) -> tuple[Tensor, float]:
    """Weight of the correction and the tolerance, from e.g. gaussian_timestep_w0.5."""
    name, _, strength = correction_case.rpartition("_w")
    weight = correction_weight(CORRECTIONS[name], schedule, step_index)
    if CORRECTIONS[name] == "exact":  # the strength is ignored there
        return weight, TOLERANCE_EXACT
    return weight * float(strength), TOLERANCE


def test_levels(tensors: dict[str, Tensor], schedule: TrainingSchedule, step_index: Tensor) -> None:
    assert_near(schedule.sigmas[step_index], tensors["sigmas"], 1e-6)
    assert_near(schedule.timesteps[step_index], tensors["timesteps"], 1e-3)
    assert_near(schedule.loss_weights[step_index], tensors["loss_weight"])
    gate = (schedule.sigmas[step_index] >= MIN_SIGMA).float()
    assert_near(gate, tensors["gate"], 0)
    assert 0 < gate.sum() < len(gate)


def test_plain_pair(tensors: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    pair = training_pair(batch["clean"], batch["noise"], tensors["sigmas"])
    assert_near(pair.noisy_latents[:, None], tensors["plain.x_t"])
    assert_near(pair.target[:, None], tensors["plain.target"].expand_as(pair.target[:, None]))


def test_weights(
    tensors: dict[str, Tensor], schedule: TrainingSchedule, step_index: Tensor, correction_case: str
) -> None:
    weight, _ = read_weight(correction_case, schedule, step_index)
    if correction_case.startswith("augmented_velocity"):
        assert f"{correction_case}.alpha" not in tensors
    else:
        assert_near(weight, tensors[f"{correction_case}.alpha"])


def test_restorative_pair(
    tensors: dict[str, Tensor],
    batch: dict[str, Tensor],
    schedule: TrainingSchedule,
    step_index: Tensor,
    correction_case: str,
) -> None:
    weight, tolerance = read_weight(correction_case, schedule, step_index)
    pair = training_pair(
        batch["clean"],
        batch["noise"],
        tensors["sigmas"],
        endpoint_latents=batch["degraded"],
        weight=weight,
    )
    expected = f"{correction_case}.ungated"
    assert_near(pair.noisy_latents[:, None], tensors[f"{expected}.x_t"])
    assert_near(pair.target[:, None], tensors[f"{expected}.target"], tolerance)


def test_gated_pair_and_loss(
    tensors: dict[str, Tensor],
    batch: dict[str, Tensor],
    schedule: TrainingSchedule,
    step_index: Tensor,
    correction_case: str,
) -> None:
    sigma = schedule.sigmas[step_index]
    weight, _ = read_weight(correction_case, schedule, step_index)
    pair = training_pair(
        batch["clean"],
        batch["noise"],
        sigma,
        endpoint_latents=gate_degradation(batch["clean"], batch["degraded"], sigma, MIN_SIGMA),
        weight=weight,
    )
    assert_near(pair.noisy_latents[:, None], tensors[f"{correction_case}.gated.x_t"])
    loss_weights = schedule.loss_weights[step_index]
    losses = [
        velocity_loss(
            batch["prediction"][row : row + 1],
            pair.target[row : row + 1],
            loss_weights[row : row + 1],
        )
        for row in range(len(sigma))
    ]
    assert_near(torch.stack(losses), tensors[f"{correction_case}.gated.loss"])
    together = velocity_loss(batch["prediction"], pair.target, loss_weights)
    assert_near(together, torch.stack(losses).mean())


def test_bfloat16_case(
    tensors: dict[str, Tensor],
    batch: dict[str, Tensor],
    schedule: TrainingSchedule,
    step_index: Tensor,
) -> None:
    """The released trainer rounds the timestep first, then looks everything up at another index."""
    rounded = schedule.timesteps[step_index].to(torch.bfloat16).float()
    assert_near(rounded, tensors["bf16.timestep"], 0)
    found = (schedule.timesteps - rounded[:, None]).abs().argmin(dim=1)
    sigma = schedule.sigmas[found]
    weight = correction_weight("gaussian", schedule, found).to(torch.bfloat16).float()
    assert_near(sigma, tensors["bf16.sigma"], 1e-6)
    assert_near(weight, tensors["bf16.alpha"], 0.004)
    assert_near(schedule.loss_weights[found], tensors["bf16.loss_weight"])
    assert_near((sigma >= MIN_SIGMA).float(), tensors["bf16.gate"], 0)
    pair = training_pair(
        batch["clean"],
        batch["noise"],
        sigma,
        endpoint_latents=batch["degraded"],
        weight=tensors["bf16.alpha"],
    )
    (prefix,) = {
        key.removesuffix(".x_t") for key in tensors if re.fullmatch(r"bf16\..+ungated\.x_t", key)
    }
    # Theirs is computed in bfloat16 throughout: four roundings of values up to 4, 2^-7 each.
    close = partial(torch.testing.assert_close, rtol=2**-7, atol=2**-5)
    close(pair.noisy_latents[:, None], tensors[f"{prefix}.x_t"])
    close(pair.target[:, None], tensors[f"{prefix}.target"])
    # Our look-ups are unrounded, which is another number.
    ours = training_pair(batch["clean"], batch["noise"], tensors["sigmas"]).noisy_latents
    theirs = training_pair(batch["clean"], batch["noise"], sigma).noisy_latents
    assert (ours - theirs).abs().max() > 100 * TOLERANCE


def test_degraded_endpoint_without_a_weight_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="go together"):
        training_pair(
            batch["clean"],
            batch["noise"],
            torch.ones(len(batch["noise"])),
            endpoint_latents=batch["degraded"],
        )
