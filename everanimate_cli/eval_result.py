"""What `everanimate eval` finds: numbers of each metric, video and method, and gates on them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from everanimate_cli import metrics
from everanimate_cli.eval_manifest import EvalEntry
from everanimate_cli.eval_settings import EvalSettings
from everanimate_cli.frame_metrics import Unavailable, Whole, measure_slope
from everanimate_cli.metric_table import METRICS

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from everanimate_cli.eval_settings import Horizon
    from everanimate_cli.frame_metrics import Outcome, Track
    from everanimate_cli.frechet import PairSums

FORMAT_VERSION: Final = 1

_MOSTLY: Final = 0.5  # a stretch of time that is covered less has no number of its own
_DIGITS: Final = 6  # significant ones, of all numbers
_WORST_FRAMES: Final = 3  # of each metric
_WORST_APART_S: Final = 1.0
_WORST_OF: Final = (
    "psnr",
    "ssim",
    "lpips",
    "identity",
    "background_psnr",
    "colour_drift",
    "pose_distance",
    "flicker",
)


class PerFrame(Sequence[float | None]):
    """Numbers of the frames of a video, None where there is none, in eight bytes each.

    An hour of video has 90,000 of each metric; as objects of Python they would need five times
    the memory.
    """

    def __init__(self, values: Iterable[float | None]) -> None:
        """Take the numbers; NaN and infinity become None."""
        self._values = array(
            "d", (v if v is not None and math.isfinite(v) else math.nan for v in values)
        )

    @overload
    def __getitem__(self, index: int) -> float | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[float | None]: ...

    def __getitem__(self, index: int | slice) -> float | list[float | None] | None:
        """The number of a frame, or a list of them."""
        if isinstance(index, slice):
            return [None if value != value else value for value in self._values[index]]  # noqa: PLR0124  # NaN
        value = self._values[index]
        return None if math.isnan(value) else value

    def __len__(self) -> int:
        """Frames of the video."""
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same, and missing in the same places."""
        if not isinstance(other, PerFrame):
            return NotImplemented
        return self._values.tobytes() == other._values.tobytes()

    def __hash__(self) -> int:
        """Of the numbers."""
        return hash(self._values.tobytes())

    def __array__(
        self, dtype: DTypeLike | None = None, copy: bool | None = None
    ) -> NDArray[np.float64]:
        """[N] float64, NaN where there is none."""
        return np.array(self._values, np.float64).astype(dtype or np.float64, copy=bool(copy))


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric of one video, or the means of it over a test set.

    Attributes:
        name: In `METRICS`.
        per_frame: [N], None where it was not measured; None if frames do not have it.
        overall: Of the whole video.
        horizons: Of each stretch of time; None for one that the video does not cover by half.
        slope_per_minute: Of the least-squares line through seconds.
        interval: Of the slope, 95 %.
        unavailable: Why there are no numbers; None if there are.
    """

    name: str
    per_frame: PerFrame | None = None
    overall: float | None = None
    horizons: tuple[float | None, ...] = ()
    slope_per_minute: float | None = None
    interval: tuple[float, float] | None = None
    unavailable: str | None = None

    def to_json(self, *, as_lists: bool = True) -> dict[str, Any]:
        """JSON values; without `as_lists` the numbers of the frames are a `PerFrame`."""
        kind = METRICS[self.name]
        per_frame: Sequence[float | None] | None = self.per_frame
        if per_frame is not None and as_lists:
            per_frame = per_frame[:]
        return {
            "unit": kind.unit,
            "better": kind.better,
            "group": kind.group,
            "about": kind.about,
            "per_frame": per_frame,
            "overall": self.overall,
            "horizons": list(self.horizons),
            "slope_per_minute": self.slope_per_minute,
            "interval": None if self.interval is None else list(self.interval),
            "unavailable": self.unavailable,
        }

    @classmethod
    def from_json(cls, name: str, entries: Mapping[str, Any]) -> Measure:
        """What `to_json` was called on."""
        per_frame, interval = entries["per_frame"], entries["interval"]
        return cls(
            name=name,
            per_frame=None if per_frame is None else PerFrame(per_frame),
            overall=entries["overall"],
            horizons=tuple(entries["horizons"]),
            slope_per_minute=entries["slope_per_minute"],
            interval=None if interval is None else (interval[0], interval[1]),
            unavailable=entries["unavailable"],
        )


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One video.

    Attributes:
        entry: What it is and what it was compared with.
        sha256: Of the video.
        fps: Frames per second.
        size: (height, width).
        num_frames: Its length.
        start_s: Where its first frame lies in the driving [s].
        truth_start_s: Where it lies in the truth [s].
        extend: In which order the frames of the driving come again after its end; None if they do
            not.
        driving_frames: Of the driving before its end; None if the video is not longer.
        chunk_joins: Frames at which a new chunk begins; empty if that is not known.
        compared_frames: How many have a truth; 0 without one.
        metrics: By name.
    """

    entry: EvalEntry
    sha256: str
    fps: float
    size: tuple[int, int]
    num_frames: int
    start_s: float
    truth_start_s: float
    extend: str | None
    driving_frames: int | None
    chunk_joins: tuple[int, ...]
    compared_frames: int
    metrics: Mapping[str, Measure]

    def worst_frames(self) -> list[dict[str, Any]]:
        """Up to three frames of each metric, a second apart, the worst first."""
        found = []
        for name in _WORST_OF:
            measure = self.metrics.get(name)
            if measure is None or measure.per_frame is None:
                continue
            values = np.asarray(measure.per_frame)
            if METRICS[name].better == "lower":
                values = -values
            chosen: list[int] = []
            order = np.argsort(values, kind="stable")  # of equal ones the first; NaN at the end
            for index in order[: np.count_nonzero(np.isfinite(values))].tolist():
                if len(chosen) == _WORST_FRAMES:
                    break
                if all(abs(index - other) >= _WORST_APART_S * self.fps for other in chosen):
                    chosen.append(index)
            for index in chosen:
                found.append({"frame": index, "metric": name, "value": measure.per_frame[index]})
        return found

    def to_json(self, *, as_lists: bool = True) -> dict[str, Any]:
        """JSON values; see `Measure.to_json`."""
        paths = {
            name: None if path is None else str(path)
            for name in ("truth", "reference", "driving")
            for path in [getattr(self.entry, name)]
        }
        return {
            "name": self.entry.name,
            "method": self.entry.method,
            "sample": self.entry.sample,
            "path": str(self.entry.generated),
            **paths,
            "sha256": self.sha256,
            "fps": self.fps,
            "size": list(self.size),
            "num_frames": self.num_frames,
            "seconds": self.num_frames / self.fps,
            "start_s": self.start_s,
            "truth_start_s": self.truth_start_s,
            "extend": self.extend,
            "driving_frames": self.driving_frames,
            "compared_frames": self.compared_frames,
            "chunk_joins": list(self.chunk_joins),
            "metrics": {
                name: measure.to_json(as_lists=as_lists) for name, measure in self.metrics.items()
            },
            "worst_frames": self.worst_frames(),
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        settings: What was asked for.
        methods: The videos.
        created: When, ISO 8601.
        versions: Of the packages that took part.
        pools: Of a test set, by method and metric, all features that FID and FVD have seen.
    """

    settings: EvalSettings
    methods: tuple[MethodResult, ...]
    created: str
    versions: Mapping[str, str]
    pools: Mapping[tuple[str, str], PairSums] = field(default_factory=dict)

    @property
    def method_names(self) -> list[str]:
        """Who made the videos, in the order of first appearance."""
        return list(dict.fromkeys(result.entry.method for result in self.methods))

    def summary(self, method: str) -> dict[str, Measure]:
        """Means over the videos of a method, with intervals over videos; of one video its own.

        FID and FVD are distances of sets: those of all videos are put together.

        A stretch of time counts the videos that cover it. An unavailable metric of one video does
        not count for the others; the reason is given if it is unavailable for all.
        """
        of_method = [result for result in self.methods if result.entry.method == method]
        if len(of_method) == 1:
            return dict(of_method[0].metrics)
        means = {
            name: _mean_measure([result.metrics[name] for result in of_method])
            for name in self.settings.metric_names
        }
        for name, mean in means.items():
            pool = self.pools.get((method, name))
            if pool is not None and mean.unavailable is None:
                indices = range(len(self.settings.stretches))
                horizons = tuple(rounded(pool.distance(index)) for index in indices)
                means[name] = replace(mean, overall=rounded(pool.distance()), horizons=horizons)
        return means

    def to_json(self, *, as_lists: bool = True) -> dict[str, Any]:
        """One JSON object; not a number is written as null. See `Measure.to_json`."""
        settings = self.settings
        summaries = [
            {
                "method": method,
                "samples": [r.entry.sample for r in self.methods if r.entry.method == method],
                "metrics": {n: m.to_json() for n, m in self.summary(method).items()},
            }
            for method in self.method_names
        ]
        found = {
            "format_version": FORMAT_VERSION,
            "created": self.created,
            "versions": dict(self.versions),
            "settings": settings.to_json(),
            "horizons_s": [[h.start_s, h.end_s] for h in settings.stretches],
            "reference": None if settings.reference is None else str(settings.reference),
            "truth": None if settings.truth is None else str(settings.truth),
            "methods": [result.to_json(as_lists=as_lists) for result in self.methods],
        }
        # Of single videos it would say the same again.
        return found | ({"summary": summaries} if settings.manifest is not None else {})

    def broken_gates(self) -> list[str]:
        """A line for each gate that is broken, by each method that breaks it.

        A value that is not there breaks the gate too: nothing is passed unseen.
        """
        lines = []
        for gate in self.settings.gates:
            index = gate.horizon_index(self.settings.stretches)
            for method in self.method_names:
                if gate.method not in (None, method):
                    continue
                measure = self.summary(method)[gate.metric]
                if index is not None:
                    value = measure.horizons[index] if measure.horizons else None
                elif gate.place == "slope":
                    value = measure.slope_per_minute
                else:
                    value = measure.overall
                if value is None:
                    reason = measure.unavailable or f"the video has no {gate.place} value"
                    lines.append(f"{gate.text}: {method} has no value ({reason})")
                elif gate.is_broken_by(value):
                    lines.append(f"{gate.text}: {method} has {value:.6g}")
            if gate.method is not None and gate.method not in self.method_names:
                lines.append(f"{gate.text}: there is no {gate.method}")
        return lines


def _mean_measure(measures: Sequence[Measure]) -> Measure:
    """Means over videos; the interval is that of the mean slope."""
    name = measures[0].name
    there = [measure for measure in measures if measure.unavailable is None]
    if not there:
        return Measure(name=name, unavailable=measures[0].unavailable)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    slopes = [m.slope_per_minute for m in there if m.slope_per_minute is not None]
    interval = None
    if len(slopes) > 1:
        spread = metrics.bootstrap(slopes)
        interval = (spread.low, spread.high)
    return Measure(
        name=name,
        overall=mean([measure.overall for measure in there]),
        horizons=tuple(mean(column) for column in zip(*(m.horizons for m in there), strict=True)),
        slope_per_minute=mean(slopes),
        interval=interval,
    )


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """What would be measured.

    Attributes:
        output: Where the result would go; none says "stdout".
        facts: JSON values.
    """

    output: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as one flat JSON object."""
        return self.facts


# --- numbers of one metric -----------------------------------------------------------------------


def summarise(name: str, outcome: Outcome, horizons: Sequence[Horizon], fps: float) -> Measure:
    """Numbers of a metric over the whole video, over stretches of it, and its slope.

    Args:
        name: In `METRICS`.
        outcome: What a meter gave.
        horizons: Stretches of time.
        fps: Frames per second.
    """
    if isinstance(outcome, Unavailable):
        return Measure(name=name, unavailable=outcome.reason)
    if isinstance(outcome, Whole):
        return Measure(
            name=name,
            overall=rounded(outcome.overall),
            horizons=tuple(rounded(value) for value in outcome.horizons),
        )
    values = outcome.per_frame()
    times_s = np.arange(len(values)) / fps
    measured = np.flatnonzero(np.isfinite(values))
    if not len(measured):
        return Measure(name=name, unavailable="not defined: no frame could be measured")
    # Up to here it was measured: a metric of every second frame covers its video.
    step = int(np.diff(measured).min()) if len(measured) > 1 else 1
    reach_s = min(len(values), int(measured[-1]) + step) / fps
    slope = measure_slope(times_s, values)
    return Measure(
        name=name,
        per_frame=PerFrame(map(rounded, values)),
        overall=rounded(outcome.over(slice(None))),
        horizons=tuple(_of_horizon(outcome, h, times_s, reach_s) for h in horizons),
        slope_per_minute=None if slope is None else rounded(slope.per_minute),
        interval=None if slope is None else _rounded_pair(slope.interval),
    )


def _of_horizon(
    track: Track, horizon: Horizon, times_s: NDArray[np.float64], reach_s: float
) -> float | None:
    if horizon.end_s is not None:
        covered_s = min(horizon.end_s, reach_s) - horizon.start_s
        if covered_s < _MOSTLY * (horizon.end_s - horizon.start_s):
            return None
    inside = times_s >= horizon.start_s
    if horizon.end_s is not None:
        inside &= times_s < horizon.end_s
    return rounded(track.over(inside))


def rounded(value: float | None) -> float | None:
    """To six significant digits; not a number becomes None."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def _rounded_pair(pair: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if pair is None else (float(f"{pair[0]:.6g}"), float(f"{pair[1]:.6g}"))
