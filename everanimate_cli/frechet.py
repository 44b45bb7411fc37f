"""Frechet distance of features, as FID and FVD take it, from sums that grow with no video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable

Values = NDArray[np.float64]

_MIN_FEATURES = 2  # a covariance needs two


@dataclass
class FeatureSums:
    """Mean and covariance of features that are seen once.

    Attributes:
        count: How many were added.
    """

    count: int = 0
    _sum: Values | None = None  # [D]
    _products: Values | None = None  # [D, D]
    _origin: Values | None = None  # [D] first feature: sums of squares about it do not cancel

    def add(self, features: ArrayLike) -> None:
        """Take features [n, D]."""
        rows = np.asarray(features, np.float64)
        if not len(rows):
            return
        if self._sum is None or self._products is None or self._origin is None:
            self._origin = rows[0].copy()
            self._sum = np.zeros(rows.shape[1])
            self._products = np.zeros((rows.shape[1], rows.shape[1]))
        away = rows - self._origin
        self.count += len(rows)
        self._sum += away.sum(0)
        self._products += away.T @ away

    def mean(self) -> Values:
        """[D]."""
        self._check()
        assert self._sum is not None  # checked
        assert self._origin is not None
        return np.asarray(self._origin + self._sum / self.count, np.float64)

    def covariance(self) -> Values:
        """[D, D], unbiased."""
        self._check()
        assert self._sum is not None  # checked
        assert self._products is not None
        centred = self._products - np.outer(self._sum, self._sum) / self.count
        return np.asarray(centred / (self.count - 1), np.float64)

    def _check(self) -> None:
        if self.count < _MIN_FEATURES:
            raise ValueError(f"a covariance needs two features, not {self.count}")


def merge(parts: Iterable[FeatureSums]) -> FeatureSums:
    """The sums over all that the parts have seen."""
    total = FeatureSums()
    for part in parts:
        if not part.count:
            continue
        assert part._sum is not None  # it has seen something
        assert part._products is not None
        assert part._origin is not None
        if total._sum is None or total._products is None or total._origin is None:
            total = FeatureSums(
                part.count, part._sum.copy(), part._products.copy(), part._origin.copy()
            )
            continue
        # About the other origin: x - o = (x - p) + (p - o).
        moved = part._origin - total._origin
        cross = np.outer(part._sum, moved)
        total._products += part._products + cross + cross.T + part.count * np.outer(moved, moved)
        total._sum += part._sum + part.count * moved
        total.count += part.count
    return total


class PairSums:
    """Features of made and true pictures, kept apart by the stretches of time they belong to.

    What belongs to the same stretches is summed up together, so that stretches may overlap.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, ...], tuple[FeatureSums, FeatureSums]] = {}

    def add(self, horizons: tuple[int, ...], made: ArrayLike, truth: ArrayLike) -> None:
        """Take features [n, D] of both.

        Args:
            horizons: Positions of the stretches that they belong to, rising.
            made: Of the video.
            truth: Of the truth.
        """
        pair = self._parts.setdefault(horizons, (FeatureSums(), FeatureSums()))
        for sums, features in zip(pair, (made, truth), strict=True):
            sums.add(features)

    def absorb(self, other: PairSums) -> None:
        """Take all that another has seen."""
        for horizons, pair in other._parts.items():
            mine = self._parts.get(horizons, (FeatureSums(), FeatureSums()))
            self._parts[horizons] = (merge([mine[0], pair[0]]), merge([mine[1], pair[1]]))

    def distance(self, horizon: int | None = None) -> float | None:
        """Between made and truth in one stretch, or in all; None for fewer than two features."""
        chosen = [
            pair for where, pair in self._parts.items() if horizon is None or horizon in where
        ]
        made, truth = (merge(pair[side] for pair in chosen) for side in (0, 1))
        return frechet_distance(made, truth) if made.count >= _MIN_FEATURES else None


def frechet_distance(first: FeatureSums, second: FeatureSums) -> float:
    """Squared Frechet (Wasserstein-2) distance of the normal distributions of two sets of features.

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)). The last trace is that of the root of the
    symmetric C1^(1/2) C2 C1^(1/2), which exists also where there are fewer features than
    dimensions, and is never complex.

    Args:
        first: At least two features.
        second: At least two of the same dimension.

    Returns:
        At least 0; 0 for equal means and covariances.

    Raises:
        ValueError: If there are too few features.

    Source: Heusel et al. 2017; pytorch-fid and torchmetrics give the same number.
    """
    covariance, other = first.covariance(), second.covariance()
    away = first.mean() - second.mean()
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T
    inner = root @ other @ root
    shared = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    distance = float(away @ away + np.trace(covariance) + np.trace(other) - 2 * shared)
    return max(0.0, distance)
