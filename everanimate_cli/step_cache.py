"""The step cache: where the blocks' update hardly changes from step to step, it is used again.

The blocks and the face adapters between them add one update to the tokens, the residual. Its
magnitude shrinks slowly and much alike for all inputs of a model, so that the ratios between steps,
measured once, tell in advance how wrong an old residual would be at a later step. Steps whose error
stays below a threshold skip blocks *and adapters* and add the old residual instead.

Caches that wrap single blocks, such as those of diffusers, are wrong for this network: they skip
blocks only, so that the adapters between them would add their updates a second time.

Source: the idea of MagCache (Ma et al. 2025, arXiv 2506.09045); method page section 6, last point.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

# As in the paper's settings for Wan: after so many skipped steps one is computed, and the first
# fifth of the steps, which lay out the picture, is never skipped. Nor is the last one, which draws
# the details: without it the toy model's frames are 10 dB further from those of all steps.
MAX_CONSECUTIVE_SKIPS = 2
RETAINED_SHARE = 0.2


def plan_skips(
    ratios: Sequence[float],
    threshold: float,
    *,
    max_consecutive: int = MAX_CONSECUTIVE_SKIPS,
    retained_share: float = RETAINED_SHARE,
) -> list[bool]:
    """Choose the steps whose blocks are skipped.

    Follows the product of the ratios since the last computed step, which is the magnitude that the
    residual would have relative to the old one. Its distance from 1, summed over the skipped steps
    in a row, is the error. (To shrink the old residual so makes results worse, not better.)

    Args:
        ratios: [steps] magnitude of each step's residual over that of the step before; the first
            is not used.
        threshold: What the error must stay below; with 0 no step is skipped.
        max_consecutive: Most steps that are skipped in a row.
        retained_share: Share of the steps at the start that are always computed, at least one.

    Returns:
        Whether each step is skipped; the last one never is.
    """
    first = max(1, math.ceil(retained_share * len(ratios)))
    skips = [False] * len(ratios)
    magnitude, error, num_in_row = 1.0, 0.0, 0
    for step_index in range(first, len(ratios) - 1):
        magnitude *= ratios[step_index]
        error += abs(1 - magnitude)
        if error < threshold and num_in_row < max_consecutive:
            skips[step_index] = True
            num_in_row += 1
        else:
            magnitude, error, num_in_row = 1.0, 0.0, 0
    return skips


class StepCache:
    """The cache of one chunk and one branch of guidance: made for it, used once, thrown away.

    Either follows a plan, or skips nothing and measures the ratios that a plan is made from.
    """

    def __init__(self, skips: Sequence[bool] | None = None) -> None:
        """Start before the first step.

        Args:
            skips: From `plan_skips`; None measures.
        """
        self._skips = skips
        self._step_index = 0
        self._residual: Tensor | None = None
        self._magnitudes: Tensor | None = None  # [B, N] of the last step
        self._ratios: list[Tensor] = []

    def apply(
        self,
        tokens: Tensor,
        run_blocks: Callable[[Tensor], Tensor],
        *,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The tokens after all blocks and adapters, computed or from the last residual.

        Args:
            tokens: [B, N, inner] before the first block.
            run_blocks: Computes them.
            total: Where several processes have a part of the tokens each, sums a tensor over them:
                all must come to the same plan.

        Returns:
            [B, N, inner].
        """
        step_index = self._step_index
        self._step_index += 1
        if self._skips is None:
            result = run_blocks(tokens)
            self._measure(result - tokens, total)
            return result
        if self._skips[step_index]:
            assert self._residual is not None  # the first step is never skipped
            return tokens + self._residual
        # Freed first: with the tokens before and after, it is the largest tensor of a step.
        self._residual = None
        result = run_blocks(tokens)
        if step_index + 1 < len(self._skips) and self._skips[step_index + 1]:
            self._residual = result - tokens
        return result

    def _measure(self, residual: Tensor, total: Callable[[Tensor], Tensor] | None) -> None:
        magnitudes = torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)  # [B, N]
        before = magnitudes if self._magnitudes is None else self._magnitudes
        ratios = magnitudes / before.clamp(min=torch.finfo(torch.float32).tiny)
        total_and_count = torch.stack([ratios.sum(), ratios.new_tensor(ratios.numel())])
        if total is not None:
            total_and_count = total(total_and_count)
        self._ratios.append(total_and_count[0] / total_and_count[1])
        self._magnitudes = magnitudes

    @property
    def ratios(self) -> Tensor:
        """[steps] float32 on the CPU, the first 1: what a measuring cache has seen."""
        return torch.stack(self._ratios).cpu()
