"""Features of frames or clips in files, so that a test set need not go through a network again.

FID and FVD of a test set are distances of all its features together, which no number of a single
video gives back.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, Final, Self

import numpy as np
from numpy.lib import format as npy

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.frame_metrics import Unavailable, Whole
from everanimate_cli.frechet import PairSums

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from everanimate_cli.eval_settings import Horizon

CLIP_FRAMES: Final = 16  # of FVD, one clip after the other
# From the beginning of one feature to that of the next.
STEP_FRAMES: Final = {"fid": 1, "fvd": CLIP_FRAMES}
_TOO_FEW: Final = {
    "fid": "needs two frames or more",
    "fvd": f"needs two clips of {CLIP_FRAMES} frames or more",
}
_BLOCK_ROWS: Final = 256  # that are summed up at a time


class FeatureWriter:
    """Writes features as they come to a `.npy` file [n, 2, D] float32, of made and true pictures.

    The file appears under its name when all of them are there.
    """

    def __init__(self, path: Path) -> None:
        """Take the file to make or replace; it is opened by `with`."""
        self._path = path
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._count = self._size = 0

    def __enter__(self) -> Self:
        """Open a file beside the one to make, whose folder is made if it is not there."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._stack.enter_context(atomic_path(self._path))
        self._file = self._stack.enter_context(temporary.open("wb"))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it after an exception."""
        if exc is None:
            self._write_head()
        self._stack.__exit__(exc_type, exc, traceback)

    def add(self, made: ArrayLike, truth: ArrayLike) -> None:
        """Append features [D] of one frame or clip, and of the true one."""
        row = np.stack([np.asarray(each, np.float32) for each in (made, truth)])
        if not self._count:
            self._size = row.shape[1]
            self._write_head()
        assert self._file is not None
        self._file.write(row.tobytes())
        self._count += 1

    def _write_head(self) -> None:
        """NumPy leaves room in it for a longer first axis, so that it can be written again."""
        assert self._file is not None
        self._file.seek(0)
        head = {
            "descr": npy.dtype_to_descr(np.dtype("<f4")),
            "fortran_order": False,
            "shape": (self._count, 2, self._size),
        }
        npy.write_array_header_1_0(self._file, head)


def read_sums(path: Path, horizons: Sequence[Horizon], *, step_s: float) -> PairSums | None:
    """What a `FeatureWriter` has written, summed up by stretches of time.

    Args:
        path: The file.
        horizons: Stretches of time.
        step_s: From the beginning of one frame or clip to that of the next [s].

    Returns:
        None if there is no such file, or a damaged one.
    """
    try:
        features: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if features.ndim != 3 or features.shape[1] != 2 or features.dtype != np.float32:  # noqa: PLR2004
        return None
    sums = PairSums()
    first = 0
    places = [places_of(index * step_s, horizons) for index in range(len(features))]
    while first < len(features):
        stop = first + 1
        while stop < min(first + _BLOCK_ROWS, len(features)) and places[stop] == places[first]:
            stop += 1
        sums.add(places[first], features[first:stop, 0], features[first:stop, 1])
        first = stop
    return sums


def distances(name: str, sums: PairSums, num_horizons: int) -> Whole | Unavailable:
    """FID or FVD from the features of a video.

    Args:
        name: "fid" or "fvd".
        sums: Of all of it.
        num_horizons: How many stretches of time its features were told apart by.
    """
    overall = sums.distance()
    if overall is None:
        return Unavailable(_TOO_FEW[name])
    return Whole(overall, tuple(map(sums.distance, range(num_horizons))), sums)


def places_of(time_s: float, horizons: Sequence[Horizon]) -> tuple[int, ...]:
    """Positions of the stretches that hold a moment, rising."""
    return tuple(index for index, horizon in enumerate(horizons) if horizon.holds(time_s))
