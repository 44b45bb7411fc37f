"""Frechet distance of given features, against other ways to the same number."""

import numpy as np
import pytest

from everanimate_cli.frechet import FeatureSums, PairSums, frechet_distance, merge


def sums(*blocks: np.ndarray) -> FeatureSums:
    total = FeatureSums()
    for block in blocks:
        total.add(block)
    return total


def whole_numbers(count: int, dimension: int, factor: int) -> np.ndarray:
    row, column = np.indices((count, dimension))
    return (row * factor + column * 7 + row * column % 5 + row * row % 11) % 23 + column


def by_eigenvalues_of_the_product(first: np.ndarray, second: np.ndarray) -> float:
    """As torchmetrics: the eigenvalues of C1 C2 are those of the root, squared."""
    away = first.mean(0) - second.mean(0)
    covariances = [np.cov(each, rowvar=False) for each in (first, second)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
    return float(away @ away + sum(np.trace(each) for each in covariances) - 2 * roots.sum())


def test_sums_give_mean_and_covariance() -> None:
    features = np.random.default_rng(1).normal(1000, 1, (50, 4))  # far from zero
    total = sums(features[:1], features[1:30], features[30:], features[:0])
    np.testing.assert_allclose(total.mean(), features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(total.covariance(), np.cov(features, rowvar=False), rtol=1e-9)


def test_parts_add_up() -> None:
    features = np.random.default_rng(2).normal(5, 3, (40, 3))
    parts = merge([sums(features[:7]), FeatureSums(), sums(features[7:9]), sums(features[9:])])
    assert parts.count == 40
    np.testing.assert_allclose(parts.mean(), features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance(), np.cov(features, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize(("count", "other"), [(40, 40), (9, 60)])
def test_the_distance_is_that_of_the_products_eigenvalues(count: int, other: int) -> None:
    first, second = whole_numbers(count, 6, 3), whole_numbers(other, 6, 5) * 1.5
    distance = frechet_distance(sums(first), sums(second))
    assert distance == pytest.approx(by_eigenvalues_of_the_product(first, second), rel=1e-9)


def test_the_distance_is_that_of_pytorch_fid() -> None:
    """pytorch-fid's formula, made with scipy 1.17.1.

    mu1, mu2 = a.mean(0), b.mean(0)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    diff @ diff + np.trace(s1) + np.trace(s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2).real)
    """
    first, second = whole_numbers(30, 5, 3), whole_numbers(45, 5, 8) * 1.25
    assert frechet_distance(sums(first), sums(second)) == pytest.approx(PYTORCH_FID, rel=1e-9)


PYTORCH_FID = 55.30701133951493


def test_in_one_dimension_it_is_the_textbooks() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    first, second = np.array([[1.0], [3.0], [8.0]]), np.array([[2.0], [2.5]])
    expected = (4 - 2.25) ** 2 + (np.std(first, ddof=1) - np.std(second, ddof=1)) ** 2
    assert frechet_distance(sums(first), sums(second)) == pytest.approx(expected, rel=1e-12)


def test_fewer_features_than_dimensions() -> None:
    """The covariances are singular, where a plain matrix root is lost."""
    first, second = (np.random.default_rng(seed).normal(seed, 1, (4, 30)) for seed in (3, 4))
    distance = frechet_distance(sums(first), sums(second))
    # Through the 4 x 4 matrix of inner products: the trace is the nuclear norm of A B^T.
    a, b = ((each - each.mean(0)) / np.sqrt(3) for each in (first, second))
    away = first.mean(0) - second.mean(0)
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = away @ away + (a * a).sum() + (b * b).sum() - 2 * nuclear
    assert distance == pytest.approx(expected, rel=1e-6)


def test_pairs_are_kept_by_stretch_and_put_together() -> None:
    made, truth = whole_numbers(30, 3, 3), whole_numbers(30, 3, 8)
    first, second = PairSums(), PairSums()
    first.add((0, 1), made[:10], truth[:10])
    first.add((1,), made[10:15], truth[10:15])
    second.add((1,), made[15:28], truth[15:28])
    second.add((), made[28:], truth[28:])
    assert second.distance(0) is None
    first.absorb(second)
    for horizon, stop in ((0, 10), (1, 28), (None, 30)):
        expected = by_eigenvalues_of_the_product(made[:stop], truth[:stop])
        assert first.distance(horizon) == pytest.approx(expected, rel=1e-9)
    assert PairSums().distance() is None


def test_one_feature_is_too_few() -> None:
    with pytest.raises(ValueError, match="a covariance needs two features, not 1"):
        frechet_distance(sums(np.ones((1, 2))), sums(np.ones((3, 2))))
