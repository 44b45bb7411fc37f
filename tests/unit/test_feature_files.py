"""Features in files: written as they come, summed up by stretches of time."""

from pathlib import Path

import numpy as np
import pytest

from everanimate_cli import feature_files
from everanimate_cli.eval_settings import parse_horizons
from everanimate_cli.feature_files import FeatureWriter, distances, places_of, read_sums
from everanimate_cli.frame_metrics import Unavailable, Whole
from everanimate_cli.frechet import PairSums


def features(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 2, 3)).astype(np.float32)


def write(path: Path, rows: np.ndarray) -> Path:
    with FeatureWriter(path) as writer:
        for row in rows:
            writer.add(*row)
    return path


@pytest.mark.parametrize("count", [1, 7, 1234])
def test_the_file_is_an_array(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "new" / "f.npy", features(count))
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), features(count))


def test_sums_are_those_of_the_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "_BLOCK_ROWS", 4)
    rows = features(25)
    horizons = parse_horizons("0-1,0-2,5+")
    sums = read_sums(write(tmp_path / "f.npy", rows), horizons, step_s=0.1)
    assert sums is not None
    expected = PairSums()
    for index, row in enumerate(rows):
        expected.add(places_of(index * 0.1, horizons), row[:1], row[1:])
    for horizon in (None, 0, 1):
        assert sums.distance(horizon) == pytest.approx(expected.distance(horizon), rel=1e-9)
    outcome = distances("fid", sums, 3)
    assert isinstance(outcome, Whole)
    assert outcome.horizons[2] is None


def test_no_feature_is_too_few(tmp_path: Path) -> None:
    sums = read_sums(write(tmp_path / "f.npy", features(0)), (), step_s=1)
    assert sums is not None
    assert distances("fid", sums, 0) == Unavailable("needs two frames or more")
    assert distances("fvd", sums, 0) == Unavailable("needs two clips of 16 frames or more")


def test_what_is_no_such_file_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "f.npy"
    assert read_sums(path, (), step_s=1) is None
    path.write_bytes(b"")
    assert read_sums(path, (), step_s=1) is None
    write(path, features(9))
    path.write_bytes(path.read_bytes()[:-4])
    assert read_sums(path, (), step_s=1) is None
    np.save(path, np.zeros((3, 2)))
    assert read_sums(path, (), step_s=1) is None


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f.npy", features(3))

    def break_off() -> None:
        with FeatureWriter(path) as writer:
            writer.add(*features(1)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert [each.name for each in tmp_path.iterdir()] == ["f.npy"]
    assert np.load(path).shape == (3, 2, 3)
