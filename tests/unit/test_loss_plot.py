"""The loss curve: its running mean, and a picture that shows both."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everanimate_cli.loss_plot import plot_losses, running_mean


@pytest.mark.parametrize(
    ("width", "means"),
    [
        (1, [4.0, 2.0, 0.0, 6.0]),
        (2, [4.0, 3.0, 1.0, 3.0]),
        (3, [4.0, 3.0, 2.0, 8 / 3]),
        (9, [4.0, 3.0, 2.0, 3.0]),
    ],
)
def test_the_mean_is_over_the_last_values(width: int, means: list[float]) -> None:
    np.testing.assert_allclose(running_mean([4.0, 2.0, 0.0, 6.0], width), means)


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_the_picture_shows_each_step_and_the_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = [(step, 1 + float(rng.random())) for step in range(1, 201)]
    plot_losses(tmp_path / "noisy.png", noisy)
    plot_losses(tmp_path / "flat.png", [(step, 1.5) for step, _ in noisy])
    made, flat = drawn(tmp_path / "noisy.png"), drawn(tmp_path / "flat.png")
    assert made.shape == (540, 960, 3)
    assert count(made, (31, 78, 140)) > 500  # the mean
    assert (made != flat).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat.png", "noisy.png"]


def test_one_step_is_a_curve_too(tmp_path: Path) -> None:
    plot_losses(tmp_path / "one.png", [(1, 0.5)])
    assert drawn(tmp_path / "one.png").std() > 1
