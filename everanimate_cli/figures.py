"""Figures by matplotlib that look alike; it is heavy and imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everanimate_cli.atomic_files import atomic_path

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_DPI = 120


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure of so many inches, made without pyplot, which would look for a screen."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # heavy

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OSError: If the disk is full.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def dress(axes: Axes) -> None:
    """Give the axes of a curve the look of all curves."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def hide_frames(grid: NDArray[Any]) -> None:
    """Leave the pictures in axes and their names; empty places vanish."""
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def whole_ticks(*axes: Axis) -> None:
    """Let axes that count something show whole numbers only."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))
