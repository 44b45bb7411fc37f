"""The numbers of a report: tables by stretch of time, curves, and the change per minute."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from everanimate_cli.errors import InputError
from everanimate_cli.metric_table import METRICS
from everanimate_cli.report_curves import Plot, mean_curve, mean_of_videos, svg_plot, swatch
from everanimate_cli.report_markup import Html, element, identifier, joined, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from everanimate_cli.report_curves import Curve

    Horizons = Sequence[Sequence[float | None]]

FORMAT_VERSION: Final = 1

# Names for readers; a metric that is not here is called as in the file.
LABELS: Final = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "l1": "L1",
    "lpips": "LPIPS",
    "fid": "FID",
    "fvd": "FVD",
    "identity": "Identity",
    "background_psnr": "Background PSNR",
    "background_lpips": "Background LPIPS",
    "colour_drift": "Colour drift",
    "contrast_drift": "Contrast drift",
    "saturation_drift": "Saturation drift",
    "sharpness_drift": "Sharpness drift",
    "seam": "Seam jump",
    "pose_pck": "Pose PCK",
    "pose_pck_strict": "Pose PCK, strict",
    "pose_distance": "Pose distance",
    "flicker": "Flicker",
}
_GROUPS: Final = {
    "quality": "Frame quality",
    "identity": "Identity",
    "drift": "Drift",
    "motion": "Motion and seams",
}
# What a picture of the main curves shows if there is no room for all.
_MAIN: Final = ("psnr", "ssim", "identity", "background_psnr", "colour_drift", "sharpness_drift")
_BETTER: Final = {"higher": "higher is better", "lower": "lower is better"}
_NOTHING: Final = Html("&ndash;")
_VALUE_DIGITS, _SLOPE_DIGITS = 4, 3  # that count, where the metric's decimals are not known
_MAX_DECIMALS = 6


@dataclass(frozen=True)
class Method:
    """One video that was measured.

    Attributes:
        name: What it is called among all.
        colour: Which of the colours it has.
        facts: Its entry in the evaluation.
        video: File, if the caller gave it.
    """

    name: str
    colour: int
    facts: Mapping[str, Any]
    video: Path | None

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.facts["fps"])

    @property
    def seconds(self) -> float:
        """Its length."""
        return float(self.facts["seconds"])

    @property
    def joins(self) -> Sequence[int]:
        """Frames at which a new chunk begins."""
        joins: Sequence[int] = self.facts["chunk_joins"]
        return joins

    def metric(self, name: str) -> Mapping[str, Any]:
        """What was measured; empty if nothing was tried."""
        metric: Mapping[str, Any] = self.facts["metrics"].get(name, {})
        return metric

    def title(self) -> Html:
        """The name beside its line in the plots."""
        return joined(swatch(self.colour), self.name)


@dataclass(frozen=True)
class Column:
    """What stands side by side in tables and plots: a video, or the videos of a method.

    Attributes:
        name: Of the method.
        colour: Which of the colours it has.
        metrics: What was measured; of several videos the means.
        members: The videos.
    """

    name: str
    colour: int
    metrics: Mapping[str, Mapping[str, Any]]
    members: Sequence[Method]

    @property
    def seconds(self) -> float:
        """Length of the longest video."""
        return max(member.seconds for member in self.members)

    def metric(self, name: str) -> Mapping[str, Any]:
        """What was measured; empty if nothing was tried."""
        return self.metrics.get(name, {})

    def title(self) -> Html:
        """The name beside its line in the plots, and how many videos it stands for."""
        count = len(self.members)
        note = element("small", f" mean of {count} videos") if count > 1 else ""
        return joined(swatch(self.colour), self.name, note)


def list_methods(evaluation: Mapping[str, Any], videos: Mapping[str, Path]) -> list[Method]:
    """All videos that were measured.

    Args:
        evaluation: What `Evaluation.to_json` gives.
        videos: File of each by its name, as far as they are there.

    Raises:
        InputError: If the evaluation has another format.
    """
    version = evaluation.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"the evaluation has format {version}, but this version of everanimate draws "
            f"format {FORMAT_VERSION}. Run 'everanimate eval' again."
        )
    entries = evaluation["methods"]
    makers = list(dict.fromkeys(_maker(facts) for facts in entries))
    return [
        Method(facts["name"], makers.index(_maker(facts)), facts, videos.get(facts["name"]))
        for facts in entries
    ]


def list_columns(evaluation: Mapping[str, Any], methods: Sequence[Method]) -> list[Column]:
    """The videos themselves, or in the evaluation of a test set those who made them."""
    if "summary" not in evaluation:
        return [Column(m.name, m.colour, m.facts["metrics"], [m]) for m in methods]
    columns = []
    for colour, summary in enumerate(evaluation["summary"]):
        members = [method for method in methods if _maker(method.facts) == summary["method"]]
        columns.append(Column(summary["method"], colour, summary["metrics"], members))
    return columns


def _maker(facts: Mapping[str, Any]) -> str:
    maker: str = facts.get("method", facts["name"])
    return maker


# --- sections ------------------------------------------------------------------------------------


def sections(columns: Sequence[Column]) -> dict[str, str]:
    """Identifier and title of each section with numbers."""
    groups = {identifier(group): _group_title(group) for group in _groups(columns)}
    return groups | {"slopes": "Change per minute"}


def number_sections(columns: Sequence[Column], horizons: Horizons) -> Iterator[str]:
    """A section for each group of metrics, with a table and curves; then the slopes."""
    heads = [column.title() for column in columns]
    for group in _groups(columns):
        names = _metric_names(columns, group)
        yield element("h2", _group_title(group), id=identifier(group))
        bodies = [_horizon_rows(columns, name, horizons) for name in names]
        marked = "; the best of each row is marked" if len(columns) > 1 else ""
        caption = f"{_group_title(group)} by stretch of time{marked}"
        yield table(caption, ["Stretch of time", *heads], bodies, class_="values")
        plots = [(name, _plot(columns, name, horizons)) for name in names]
        drawn = [(name, plot) for name, plot in plots if plot is not None]
        if drawn:
            yield element("p", _about_curves([plot for _, plot in drawn], columns), class_="quiet")
            if group == "drift":
                yield element(
                    "p",
                    "The table averages the looks of a stretch before it takes their distance from "
                    "the beginning, which cancels movement; a curve averages distances of frames.",
                    class_="quiet",
                )
            yield element("div", *(_plot_figure(*pair) for pair in drawn), class_="plots")
    yield element("h2", "Change per minute", id="slopes")
    names = [
        name
        for name in _metric_names(columns)
        if any(column.metric(name).get("slope_per_minute") is not None for column in columns)
    ]
    rows = [_slope_row(columns, name) for name in names]
    if rows:
        caption = "Slope of the straight line through all moments, with its 95 % interval"
        yield table(caption, ["Metric", *heads], [element("tbody", *rows)], class_="values")
    else:
        yield element("p", "No metric has a slope: the videos are too short.")


def main_plots(columns: Sequence[Column], horizons: Horizons) -> Iterator[Plot]:
    """All curves, the main ones first."""
    names = _metric_names(columns)
    # Stable: those that are not main ones keep their order.
    for name in sorted(names, key=lambda n: _MAIN.index(n) if n in _MAIN else len(_MAIN)):
        plot = _plot(columns, name, horizons)
        if plot is not None:
            yield plot


def _groups(columns: Sequence[Column]) -> list[str]:
    """The groups that occur, known ones first."""
    found = {str(metric["group"]) for column in columns for metric in column.metrics.values()}
    return [group for group in _GROUPS if group in found] + sorted(found - {*_GROUPS})


def _group_title(group: str) -> str:
    return _GROUPS.get(group, group)


def _metric_names(columns: Sequence[Column], group: str | None = None) -> list[str]:
    """The metrics that occur in a group, known ones first; without a group all of them."""
    found = {
        name: None
        for column in columns
        for name, metric in column.metrics.items()
        if group in {None, metric["group"]}
    }
    return [name for name in METRICS if name in found] + [
        name for name in found if name not in METRICS
    ]


def _first(columns: Sequence[Column], name: str) -> Mapping[str, Any]:
    """What all say alike of a metric: its unit and which way is better."""
    return next(column.metric(name) for column in columns if column.metric(name))


# --- rows ----------------------------------------------------------------------------------------


def _horizon_rows(columns: Sequence[Column], name: str, horizons: Horizons) -> Html:
    """Rows of one metric: the whole video, each stretch of time, and why values are missing."""
    first = _first(columns, name)
    facts = (first["unit"], _BETTER.get(first["better"]), first.get("about"))
    note = element("small", ", ".join(filter(None, facts)))
    head = element("span", LABELS.get(name, name), " ", note)
    rows = [
        element(
            "tr", element("th", head, colspan=len(columns) + 1, scope="rowgroup"), class_="metric"
        )
    ]
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for column in columns:
        if column.metric(name).get("unavailable"):
            reasons[str(column.metric(name)["unavailable"])].append(column.name)
    if sum(map(len, reasons.values())) < len(columns):
        overall = [_number(column.metric(name).get("overall")) for column in columns]
        by_horizon = [
            [_number(_at(column.metric(name).get("horizons"), index)) for column in columns]
            for index in range(len(horizons))
        ]
        values = [*overall, *(value for row in by_horizon for value in row)]
        decimals = METRICS[name].digits if name in METRICS else _decimals(values, _VALUE_DIGITS)
        rows.append(_row("whole video", overall, first["better"], decimals))
        longest_s = max(column.seconds for column in columns)
        for (start_s, end_s), row in zip(horizons, by_horizon, strict=True):
            # A stretch that no video reaches would be a row of dashes.
            if (start_s or 0) < longest_s:
                rows.append(_row(_stretch(start_s, end_s), row, first["better"], decimals))
    for reason, without in reasons.items():
        who = "" if len(without) == len(columns) else ", ".join(without) + ": "
        text = element("span", who, _without_prefix(reason))
        rows.append(
            element(
                "tr",
                element("th", "not available", scope="row"),
                element("td", text, colspan=len(columns)),
                class_="missing",
            )
        )
    return element("tbody", *rows)


def _without_prefix(reason: str) -> str:
    """The reason alone, since its row already says that something is not available."""
    return reason.removeprefix("not available").removeprefix(":").lstrip()


def _slope_row(columns: Sequence[Column], name: str) -> Html:
    first = _first(columns, name)
    slopes = [_number(column.metric(name).get("slope_per_minute")) for column in columns]
    intervals = [column.metric(name).get("interval") for column in columns]
    facts = (f"{first['unit']} per minute".lstrip(), _BETTER.get(first["better"]))
    note = element("small", ", ".join(filter(None, facts)))
    head = joined(LABELS.get(name, name), " ", note)
    ends = (end for interval in intervals if interval is not None for end in interval)
    decimals = _decimals([*slopes, *ends], _SLOPE_DIGITS)
    return _row(head, slopes, first["better"], decimals, intervals, signed=True)


def _row(
    head: str,
    values: Sequence[float | None],
    better: str,
    decimals: int,
    intervals: Sequence[Sequence[float] | None] = (),
    *,
    signed: bool = False,
) -> Html:
    """A row of numbers, the best of which is marked if there is something to compare.

    Two values that read the same are equally good.
    """
    texts = [_text(value, decimals, signed=signed) for value in values]
    there = [value for value in values if value is not None]
    best = None
    if better in _BETTER and len(set(texts) - {_NOTHING}) > 1:
        best = _text(max(there) if better == "higher" else min(there), decimals, signed=signed)
    cells = []
    for index, text in enumerate(texts):
        parts: list[str] = [text]
        if text == best:
            parts.append(element("span", " (best)", class_="unseen"))
        interval = _at(intervals, index)
        if interval is not None:
            low, high = (_text(_number(end), decimals, signed=signed) for end in interval)
            parts.append(element("small", low, " to ", high))
        class_ = "number best" if text == best else "number"
        cells.append(element("td", *parts, class_=class_))
    return element("tr", element("th", head, scope="row"), *cells)


def _at(values: Sequence[Any] | None, index: int) -> Any:
    """The value at a position; None if there are not so many."""
    return values[index] if values is not None and index < len(values) else None


def _number(value: float | None) -> float | None:
    """The value; None for NaN, which is no value."""
    return None if value is None or math.isnan(value) else float(value)


def _decimals(values: Iterable[float | None], digits: int) -> int:
    """As many as show so many digits of the largest value."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    digits_before = math.floor(math.log10(largest)) + 1 if largest else 1
    return min(_MAX_DECIMALS, max(0, digits - digits_before))


def _text(value: float | None, decimals: int, *, signed: bool = False) -> Html:
    if value is None:
        return _NOTHING
    if math.isinf(value):
        return Html("&infin;" if value > 0 else "-&infin;")
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    # What is rounded to zero has no sign.
    return Html(text if float(text) else f"{0:.{decimals}f}")


def _stretch(start_s: float | None, end_s: float | None) -> str:
    """A horizon in words: "10-30 s", or "90+ s" without an end."""
    start = f"{start_s or 0:g}"
    return f"{start}+ s" if end_s is None or math.isinf(end_s) else f"{start}-{end_s:g} s"


# --- curves --------------------------------------------------------------------------------------


def _plot(columns: Sequence[Column], name: str, horizons: Horizons) -> Plot | None:
    """The curves of a metric; None if nobody has values over time."""
    curves = [_curve(column, name) for column in columns]
    if not any(curve.has_values for curve in curves):
        return None
    first = _first(columns, name)
    bounds = {end for horizon in horizons for end in horizon if end is not None}
    return Plot(
        title=LABELS.get(name, name),
        unit=first["unit"],
        note=_BETTER.get(first["better"], ""),
        curves=curves,
        marks_s=sorted(bounds),
    )


def _curve(column: Column, name: str) -> Curve:
    decibels = column.metric(name).get("unit") == "dB"
    videos = [
        (member.metric(name).get("per_frame") or [None], member.fps) for member in column.members
    ]
    if len(videos) == 1:
        return mean_curve(column.name, *videos[0], decibels=decibels)
    return mean_of_videos(column.name, videos, decibels=decibels)


def _about_curves(plots: Sequence[Plot], columns: Sequence[Column]) -> str:
    stretch_s = min(c.stretch_s for plot in plots for c in plot.curves if c.has_values)
    if any(len(column.members) > 1 for column in columns):
        band = "the band is its 95 % confidence interval over videos, if there are three or more"
    else:
        band = "the band is its 95 % confidence interval, from batches of neighbouring frames"
    return (
        f"Each point is the mean over {stretch_s:.2g} s or, where few frames have a value, longer; "
        f"{band}. Dotted lines bound the stretches of the table."
    )


def _plot_figure(name: str, plot: Plot) -> Html:
    legend = (element("li", swatch(index), curve.name) for index, curve in enumerate(plot.curves))
    note = element("small", f"({plot.note})") if plot.note else ""
    return element(
        "figure",
        element("figcaption", plot.title, " ", note),
        svg_plot(plot, f"plot-{identifier(name)}"),
        element("ul", *legend, class_="legend"),
    )
