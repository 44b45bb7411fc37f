"""Flow matching and restorative flow matching: training pairs, targets, loss."""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from everanimate_cli.schedule import TrainingSchedule
from everanimate_cli.train_settings import Correction


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """What the network gets, and what it is to answer.

    Attributes:
        noisy_latents: [B, C, L, h, w].
        target: [B, C, L, h, w] velocity.
    """

    noisy_latents: Tensor
    target: Tensor


def correction_weight(
    correction: Correction, schedule: TrainingSchedule, step_index: Tensor
) -> Tensor:
    """Weight w of the restorative correction at drawn noise levels.

    Args:
        correction: `gaussian`, the bell of the paper, falls to 0 towards pure noise; `exact` is
            1 / sigma, the constant velocity that reaches the clean end, and explodes near it;
            `constant` is 1.
        schedule: The training schedule.
        step_index: [B] int64 points of the schedule.

    Returns:
        [B] float32.

    Source: method page section 3; parity file `rfm.safetensors`, where the three are called
    gaussian_timestep, augmented_velocity and fixed.
    """
    match correction:
        case "gaussian":
            return schedule.gaussian_weights[step_index]
        case "exact":
            return 1 / schedule.sigmas[step_index]
        case "constant":
            return torch.ones(step_index.shape)
        case _:
            assert_never(correction)


def gate_degradation(
    clean_latents: Tensor, degraded_latents: Tensor, sigma: Tensor, min_sigma: float
) -> Tensor:
    """Keep the degraded endpoint only where the noise is high enough.

    Args:
        clean_latents: [B, C, L, h, w].
        degraded_latents: [B, C, L, h, w].
        sigma: [B] noise levels.
        min_sigma: Lowest noise level at which a degraded endpoint is used; 0.5 in the released
            training.

    Returns:
        [B, C, L, h, w] endpoint for `training_pair`.
    """
    is_noisy = _per_sample(sigma, clean_latents) >= min_sigma
    return torch.where(is_noisy, degraded_latents, clean_latents)


def training_pair(
    clean_latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    endpoint_latents: Tensor | None = None,
    weight: Tensor | None = None,
) -> TrainingPair:
    """Mix one noise level, towards the clean latents or towards degraded ones.

    With a degraded endpoint z~ the network sees (1 - sigma) z~ + sigma eps and is to answer
    (eps - z) + w (x~ - x): it learns to leave the degraded trajectory. Where the endpoint is clean
    the correction vanishes and the pair is plain flow matching.

    Args:
        clean_latents: [B, C, L, h, w] z, identity slots first; normalised.
        noise: [B, C, L, h, w] eps.
        sigma: [B] noise levels in [0, 1].
        endpoint_latents: [B, C, L, h, w] z~, whose identity slots must be the clean ones; None
            for plain flow matching.
        weight: [B] from `correction_weight`, needed with `endpoint_latents`.

    Returns:
        Noisy latents and target.

    Raises:
        ValueError: If only one of `endpoint_latents` and `weight` is given.

    Source: method page section 3; parity file `rfm.safetensors`.
    """
    if (endpoint_latents is None) != (weight is None):
        raise ValueError("a degraded endpoint and the weight of its correction go together")
    level = _per_sample(sigma, clean_latents)
    target = noise - clean_latents
    if endpoint_latents is None or weight is None:
        return TrainingPair(
            noisy_latents=(1 - level) * clean_latents + level * noise, target=target
        )
    shift = (1 - level) * (endpoint_latents - clean_latents)  # x~ - x
    return TrainingPair(
        noisy_latents=(1 - level) * endpoint_latents + level * noise,
        target=target + _per_sample(weight, shift) * shift,
    )


def velocity_loss(prediction: Tensor, target: Tensor, loss_weight: Tensor) -> Tensor:
    """Weighted squared error over all slots, the identity slots too.

    Args:
        prediction: [B, C, L, h, w] network output, any float dtype.
        target: [B, C, L, h, w] from `training_pair`.
        loss_weight: [B] from the training schedule.

    Returns:
        [] float32, mean over the batch.

    Source: method page section 3.
    """
    squared_error = (prediction.float() - target.float()).square().flatten(1).mean(1)  # [B]
    return (loss_weight.to(squared_error) * squared_error).mean()


def _per_sample(values: Tensor, latents: Tensor) -> Tensor:
    """Shape and place [B] so that it multiplies [B, C, L, h, w]."""
    return values.to(latents.device).view(-1, 1, 1, 1, 1)
