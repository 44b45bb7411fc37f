"""Noise levels of sampling and training, and the weights that hang on them.

Sampling and training read from the same functions. Everything is float32 on the CPU, in the order
of operations of the released code, so that values at the edge of a bfloat16 step round alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from everanimate_cli.errors import SettingsError

NUM_TRAIN_TIMESTEPS = 1000  # timestep = 1000 * sigma; also the points of the training schedule


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels of one sampling run, from pure noise down to clean.

    diffusers' `set_timesteps(num_steps)` is another grid, off by up to 0.6 in sigma.

    Args:
        num_steps: Euler steps, at least 1.
        shift: Warp of the linear grid; 1 keeps it linear, larger values stay longer at high noise.

    Returns:
        [num_steps + 1] float32, strictly falling, first 1.0, last 0.0.

    Raises:
        SettingsError: If `num_steps` < 1 or `shift` <= 0.

    Source: method page section 2; parity file `schedule.safetensors`.
    """
    if num_steps < 1:
        raise SettingsError(f"--steps {num_steps} is too few. Give at least 1.")
    if shift <= 0:
        raise SettingsError(f"--shift {shift} does not order the noise levels. Give more than 0.")
    linear = torch.linspace(1, 0, num_steps + 1)
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    sigmas[0] = 1  # rounding leaves it a hair off for some shifts
    return sigmas


def model_timestep(sigma: Tensor, network_dtype: torch.dtype, *, as_stock: bool = False) -> Tensor:
    """Timestep to feed to the network at a noise level.

    Args:
        sigma: [B] or [] float32 noise levels in [0, 1].
        network_dtype: What the network computes in; for bfloat16 the timestep is rounded to it,
            as in the released all-bfloat16 runs (833.33 -> 832). The Euler step uses the
            unrounded sigma all the same.
        as_stock: Keep what diffusers' pipeline feeds, unrounded float32 (pixel memory only).

    Returns:
        Shape of `sigma`: float64, for which the network takes float64 sinusoids as the released
        code does, or float32 with `as_stock`.

    Source: method page section 6; `timesteps_bf16_as_fed` in parity file `schedule.safetensors`.
    """
    timestep = NUM_TRAIN_TIMESTEPS * sigma
    if as_stock:
        return timestep
    if network_dtype == torch.bfloat16:
        timestep = timestep.to(torch.bfloat16)
    return timestep.double()


def euler_step(
    latents: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float
) -> Tensor:
    """Take one Euler step of dx/dsigma = v.

    Args:
        latents: [B, C, L, h, w] float32 at noise level `sigma`.
        velocity: Network output of the same shape, any float dtype.
        sigma: Noise level of `latents`, a number or [].
        next_sigma: Level to go to, smaller.

    Returns:
        [B, C, L, h, w] at `next_sigma` in the dtype of `latents`.
    """
    return latents + velocity.to(latents.dtype) * (next_sigma - sigma)


@dataclass(frozen=True, kw_only=True)
class TrainingSchedule:
    """The noise levels that training draws from, index 0 is pure noise.

    Attributes:
        sigmas: [n] float32, falling from 1, without 0.
        timesteps: [n] 1000 * sigma, unrounded.
        loss_weights: [n] factor of each level's loss; 0 at pure noise.
        gaussian_weights: [n] bell w(t) of the restorative correction in [0, 1].
    """

    sigmas: Tensor
    timesteps: Tensor
    loss_weights: Tensor
    gaussian_weights: Tensor


def training_schedule(shift: float, num_points: int = NUM_TRAIN_TIMESTEPS) -> TrainingSchedule:
    """Build the schedule that training draws its noise levels from, uniformly over the points.

    Args:
        shift: Warp of the linear grid, as in `shifted_sigmas`.
        num_points: Noise levels, at least 2; 1000 in the released training.

    Returns:
        The levels and their weights, all read at the same index.

    Raises:
        SettingsError: If `shift` <= 0.

    Source: method page section 3; parity file `schedule.safetensors`, `train*`.
    """
    sigmas = shifted_sigmas(num_points, shift)[:-1]
    timesteps = NUM_TRAIN_TIMESTEPS * sigmas
    middle = NUM_TRAIN_TIMESTEPS / 2
    bell = torch.exp(-2 * ((timesteps - middle) / NUM_TRAIN_TIMESTEPS) ** 2)
    above = bell - bell.min()
    loss_weights = above * (NUM_TRAIN_TIMESTEPS / above.sum())
    if num_points != NUM_TRAIN_TIMESTEPS:
        # A short schedule has its weights scaled to its length and lifted off zero.
        loss_weights = loss_weights * (num_points / NUM_TRAIN_TIMESTEPS)
        loss_weights = loss_weights + loss_weights[1]
    return TrainingSchedule(
        sigmas=sigmas,
        timesteps=timesteps,
        loss_weights=loss_weights,
        gaussian_weights=above / above.max(),
    )
