"""The loss curve of a training as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from everanimate_cli.figures import dress, new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

_RUNNING_SHARE = 0.05  # of the curve, over which it is averaged


def running_mean(values: Sequence[float], width: int) -> NDArray[np.float64]:
    """Mean over the last `width` values up to each; over fewer at the beginning.

    Args:
        values: [N].
        width: At least 1.

    Returns:
        [N] float64.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def plot_losses(path: Path, losses: Sequence[tuple[int, float]]) -> None:
    """Draw every step's loss, and its running mean.

    Args:
        path: PNG file, written whole or not at all.
        losses: (step, loss), steps rising.

    Raises:
        OSError: If the disk is full.
    """
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    width = max(1, round(_RUNNING_SHARE * len(values)))
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss, weighted by noise level", title="Training loss"
    )
    axes.plot(steps, values, color="#9ab8d8", linewidth=0.7, label="each step")
    axes.plot(
        steps, running_mean(values, width), color="#1f4e8c", label=f"mean of the last {width}"
    )
    dress(axes)
    axes.legend(frameon=False)
    save_figure(path, figure)
