"""Values over time as curves with confidence bands, drawn as inline SVG or as PNG."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from everanimate_cli.figures import dress, new_figure, save_figure
from everanimate_cli.frame_metrics import student_quantile
from everanimate_cli.report_markup import Html, element, joined, plain

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

# More would not be seen in a plot of this width, and the page would grow with the video.
MAX_POINTS: Final = 48

# Batch means: the mean of a few neighbouring frames is one observation, since neighbouring frames
# are too much alike to be counted one by one.
_NUM_BATCHES = 5
_LEAST_OBSERVATIONS = 3  # with two, Student's factor is 12.7 and the band says nothing

# (light background, dark background) of each method; after Okabe and Ito, darkened or lightened to
# a contrast of at least 4.5 against the page.
PALETTE: Final = (
    ("#0b5fa5", "#6cb6ff"),
    ("#b84a00", "#ffa657"),
    ("#1a7045", "#74d99a"),
    ("#8f2a7c", "#e2a6f5"),
    ("#745700", "#e3c04b"),
    ("#00707a", "#5fd7e0"),
    ("#b3261e", "#ff8b83"),
    ("#4f5963", "#b6c0ca"),
)

# Told apart without colour too: on paper, or by the colour-blind.
_DASHES: Final = ("", "7 3", "2 2.5", "9 3 2 3")

# SVG units; small, so that a phone shows the same text in a size that can be read.
_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 10, 40
_NUM_VALUE_TICKS, _NUM_TIME_TICKS = 5, 7
_CLOCK_FROM_S = 150  # from here on times are written as minutes and seconds
_TIME_STEPS_S: Final = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600)
_STEPS: Final = (1, 2, 2.5, 5, 10)
_S_PER_MINUTE = 60


@dataclass(frozen=True)
class Curve:
    """Means over even stretches of time.

    Attributes:
        name: Of the method.
        times_s: [P] middles of the stretches.
        means: [P]; NaN where no frame has a value.
        low: [P] lower end of the 95 % interval of the mean; NaN where too few frames have a value.
        high: [P] upper end.
        stretch_s: Length of a stretch.
    """

    name: str
    times_s: Values
    means: Values
    low: Values
    high: Values
    stretch_s: float

    @property
    def has_values(self) -> bool:
        """Whether there is anything to draw."""
        return bool(np.isfinite(self.means).any())


@dataclass(frozen=True)
class Plot:
    """The curves of several methods and what their axes mean.

    Attributes:
        title: What was measured.
        unit: Of the values; "" if they have none.
        note: Which way is better.
        curves: One for each method, in the order of the colours.
        marks_s: Moments to mark by a vertical line.
    """

    title: str
    unit: str
    note: str
    curves: Sequence[Curve]
    marks_s: Sequence[float] = ()

    @property
    def label(self) -> str:
        """Name of the values with their unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title


def mean_curve(
    name: str, per_frame: Sequence[float | None], fps: float, *, decibels: bool = False
) -> Curve:
    """Average a value over stretches, and say how sure each mean is.

    Args:
        name: Of the method.
        per_frame: [S]; None or NaN where a frame has no value.
        fps: Frames per second.
        decibels: The values are decibels, of which the errors behind them are averaged; an
            infinite one counts as no error.

    Returns:
        At most `MAX_POINTS` points. The interval is that of Student for the means of five batches
        of neighbouring frames in the stretch.
    """
    values = _as_array(per_frame)
    num_points = _count_points(int(np.count_nonzero(~np.isnan(values))))
    points = []
    # Stretches whose lengths differ by one frame at most.
    for frames in np.array_split(values, num_points):
        stretch = frames[~np.isnan(frames)]
        batches = np.array(
            [_mean(batch, decibels=decibels) for batch in np.array_split(stretch, _NUM_BATCHES)]
        )
        points.append((_mean(stretch, decibels=decibels), _half_interval(batches)))
    return _curve(name, points, stretch_s=len(values) / num_points / fps)


def mean_of_videos(
    name: str,
    videos: Sequence[tuple[Sequence[float | None], float]],
    *,
    decibels: bool = False,
) -> Curve:
    """Average a value over stretches, and then over the videos of a test set.

    Args:
        name: Of the method that made them.
        videos: What `mean_curve` takes for each: values per frame, and frames per second.
        decibels: As in `mean_curve`; means over videos are those of decibels.

    Returns:
        As long as the longest video. The interval is that of Student over videos.
    """
    values = [_as_array(per_frame) for per_frame, _ in videos]
    end_s = max(len(frames) / fps for frames, (_, fps) in zip(values, videos, strict=True))
    num_values = max(int(np.count_nonzero(~np.isnan(frames))) for frames in values)
    num_points = _count_points(num_values)
    stretch_s = end_s / num_points
    rows = np.full((len(values), num_points), math.nan)
    for row, frames, (_, fps) in zip(rows, values, videos, strict=True):
        ends = np.ceil(np.arange(1, num_points) * stretch_s * fps - 1e-6).astype(int)
        for index, stretch in enumerate(np.split(frames, ends)):
            row[index] = _mean(stretch[~np.isnan(stretch)], decibels=decibels)
    points = [(_mean(column[np.isfinite(column)]), _half_interval(column)) for column in rows.T]
    return _curve(name, points, stretch_s=stretch_s)


def _as_array(per_frame: Sequence[float | None]) -> Values:
    # None becomes NaN.
    return np.array(per_frame, np.float64)


def _count_points(num_values: int) -> int:
    """How many points so many values make: fewer where only some frames have one."""
    return max(1, min(MAX_POINTS, num_values // _NUM_BATCHES))


def _half_interval(observations: Values) -> float:
    """Half of Student's 95 % interval of a mean; NaN if too few are finite."""
    there = observations[np.isfinite(observations)]
    if len(there) < _LEAST_OBSERVATIONS:
        return math.nan
    return student_quantile(len(there) - 1) * float(there.std(ddof=1)) / math.sqrt(len(there))


def _curve(name: str, points: Sequence[tuple[float, float]], stretch_s: float) -> Curve:
    """A curve from the mean and half the interval of each point."""
    means, halves = np.array(points, np.float64).T
    means[~np.isfinite(means)] = math.nan
    return Curve(
        name=name,
        times_s=np.asarray((np.arange(len(points)) + 0.5) * stretch_s, np.float64),
        means=means,
        low=means - halves,
        high=means + halves,
        stretch_s=stretch_s,
    )


def _mean(values: Values, *, decibels: bool = False) -> float:
    """Mean of values none of which is NaN; NaN if there are none."""
    if not len(values):
        return math.nan
    if not decibels:
        return float(values.mean())
    error = float((10 ** (-values / 10)).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


# --- axes ----------------------------------------------------------------------------------------


def value_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From where to where the value axis goes: all means, and the bands unless they dwarf them."""
    means = np.concatenate([curve.means for curve in curves])
    bands = np.concatenate([ends for curve in curves for ends in (curve.low, curve.high)])
    if not np.isfinite(means).any():
        return 0.0, 1.0
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    room = high - low
    if np.isfinite(bands).any():
        low = max(low - room, min(low, float(np.nanmin(bands))))
        high = min(high + room, max(high, float(np.nanmax(bands))))
    # A level line lies in the middle; so small a step that it is rounding counts as level.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = 0.05 * abs(low) or 1.0
        low, high = low - around, high + around
    edge = 0.05 * (high - low)
    return low - edge, high + edge


def value_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most five."""
    rough = (high - low) / _NUM_VALUE_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * step for step in _STEPS if power * step >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def time_ticks(end_s: float) -> list[float]:
    """Round moments from 0 to `end_s`, at most eight."""
    hours = 3600 * math.ceil(end_s / _NUM_TIME_TICKS / 3600)
    step = next((step for step in _TIME_STEPS_S if end_s / step <= _NUM_TIME_TICKS), hours)
    return [index * step for index in range(int(end_s / step + 1e-9) + 1)]


def clock(time_s: float, end_s: float) -> str:
    """A moment as the time axis writes it: seconds, or minutes:seconds in a long video."""
    if end_s < _CLOCK_FROM_S:
        return f"{time_s:g}"
    minutes, seconds = divmod(round(time_s), _S_PER_MINUTE)
    return f"{minutes}:{seconds:02d}"


def _time_label(end_s: float) -> str:
    return "time [s]" if end_s < _CLOCK_FROM_S else "time [min:s]"


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """All with the decimals that the step between them needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    decimals = next((n for n in range(9) if abs(round(step, n) - step) < 1e-6 * step), 9)
    return [f"{tick + 0.0:.{decimals}f}" for tick in ticks]


def _end_s(plot: Plot) -> float:
    return max(float(curve.times_s[-1]) + curve.stretch_s / 2 for curve in plot.curves)


# --- SVG -----------------------------------------------------------------------------------------


def palette_css() -> str:
    """The colours of the methods as CSS variables `--m0`, ..., for light and dark pages."""
    light, dark = (
        "".join(f"--m{index}:{pair[scheme]};" for index, pair in enumerate(PALETTE))
        for scheme in (0, 1)
    )
    lines = [
        f":root{{{light}}}",
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}",
    ]
    lines += [
        f".m{index}{{color:var(--m{index});stroke:var(--m{index})}}"
        for index in range(len(PALETTE))
    ]
    return "\n".join(lines)


def swatch(index: int) -> Html:
    """A short piece of the line of method number `index`."""
    line = element(
        "line", x1=0, y1=5, x2=30, y2=5, class_=_line_class(index), stroke_dasharray=_dash(index)
    )
    return element("svg", line, class_="swatch", viewBox="0 0 30 10", aria_hidden="true")


def _line_class(index: int) -> str:
    return f"curve m{index % len(PALETTE)}"


def _dash(index: int) -> str | None:
    # Moves on by one each time the colours begin again.
    return _DASHES[(index + index // len(PALETTE)) % len(_DASHES)] or None


def svg_plot(plot: Plot, key: str) -> Html:
    """Draw curves; colours and fonts come from the page.

    Args:
        plot: At least one curve.
        key: Letters that no other plot of the page has, for references within the drawing.

    Returns:
        An `svg` element that says in words what it shows.
    """
    end_s = _end_s(plot)
    low, high = value_range(plot.curves)
    x_per_s = (_WIDTH - _LEFT - _RIGHT) / end_s
    y_per_unit = (_HEIGHT - _TOP - _BOTTOM) / (high - low)

    def x(time_s: float) -> float:
        return _LEFT + time_s * x_per_s

    def y(value: float) -> float:
        return _TOP + (high - value) * y_per_unit

    bottom = _HEIGHT - _BOTTOM
    parts: list[Html] = []
    ticks = value_ticks(low, high)
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        parts.append(_line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "grid"))
        parts.append(_text(_LEFT - 6, y(tick) + 4, text, "end"))
    for mark_s in plot.marks_s:
        if 0 < mark_s < end_s:
            parts.append(_line(x(mark_s), _TOP, x(mark_s), bottom, "mark"))
    for tick in time_ticks(end_s):
        parts.append(_line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        parts.append(_text(x(tick), bottom + 17, clock(tick, end_s), "middle"))
    parts.append(_line(_LEFT, bottom, _WIDTH - _RIGHT, bottom, "axis"))
    parts.append(_text(13, (_TOP + bottom) / 2, plot.label, "middle", turned=True))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, _time_label(end_s), "middle"))

    box = element(
        "rect", x=_LEFT, y=_TOP, width=_WIDTH - _LEFT - _RIGHT, height=_HEIGHT - _TOP - _BOTTOM
    )
    clip = f"{key}-box"
    parts.append(element("clipPath", box, id=clip))
    bands, lines = [], []
    for index, curve in enumerate(plot.curves):
        xs = [x(float(time_s)) for time_s in curve.times_s]
        band = _band_path(xs, [y(v) for v in curve.low], [y(v) for v in curve.high])
        if band:
            bands.append(element("path", d=band, class_=f"band m{index % len(PALETTE)}"))
        path = _line_path(xs, [y(v) for v in curve.means])
        lines.append(
            element(
                "path",
                element("title", curve.name),
                d=path,
                class_=_line_class(index),
                stroke_dasharray=_dash(index),
            )
        )
    parts.append(element("g", *bands, *lines, clip_path=f"url(#{clip})"))
    return element(
        "svg",
        element("title", f"{plot.label} over time", id=f"{key}-title"),
        element("desc", _in_words(plot), id=f"{key}-desc"),
        joined(*parts),
        class_="plot",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return element("line", class_=class_, **{name: f"{end:.1f}" for name, end in ends.items()})


def _text(x: float, y: float, text: str, anchor: str, *, turned: bool = False) -> Html:
    place = f"translate({x:.1f} {y:.1f})" + (" rotate(-90)" if turned else "")
    return element("text", text, transform=place, text_anchor=anchor)


def _line_path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """A path that is broken where a value is missing; a lone point becomes a dot."""
    pieces = []
    for run in _runs(ys):
        steps = [f"{xs[i]:.1f} {ys[i]:.1f}" for i in run]
        # A line of no length has round ends only.
        pieces.append("M" + "L".join(steps if len(steps) > 1 else steps * 2))
    return "".join(pieces)


def _band_path(xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> str:
    """The outline between two curves, over each run of points that have both."""
    pieces = []
    for run in _runs(lows):
        there = [f"{xs[i]:.1f} {highs[i]:.1f}" for i in run]
        back = [f"{xs[i]:.1f} {lows[i]:.1f}" for i in reversed(run)]
        pieces.append("M" + "L".join(there + back) + "Z")
    return "".join(pieces)


def _runs(values: Sequence[float]) -> list[list[int]]:
    """Positions of neighbouring values that are there."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if math.isfinite(value):
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _in_words(plot: Plot) -> str:
    """What the curves show, for those who cannot see them."""
    sentences = [f"{plot.note}." if plot.note else ""]
    for curve in plot.curves:
        there = curve.means[np.isfinite(curve.means)]
        if len(there):
            sentences.append(
                f"{curve.name}: from {there[0]:.4g} at the beginning to {there[-1]:.4g} at the "
                f"end, lowest {there.min():.4g}, highest {there.max():.4g}."
            )
    return " ".join(sentence for sentence in sentences if sentence)


# --- PNG -----------------------------------------------------------------------------------------


def png_plots(path: Path, plots: Sequence[Plot]) -> None:
    """Draw curves side by side into a PNG file, written whole or not at all.

    Args:
        path: File to make or replace.
        plots: All of the same methods; without any the picture says so.

    Raises:
        OSError: If the disk is full.
    """
    num_columns = min(2, max(1, len(plots)))
    num_rows = max(1, math.ceil(len(plots) / num_columns))
    figure = new_figure(6.5 * num_columns, 3.4 * num_rows + 0.6)
    lines: list[Line2D] = []
    for position, plot in enumerate(plots):
        end_s = _end_s(plot)
        axes = figure.add_subplot(num_rows, num_columns, position + 1, xlabel=_time_label(end_s))
        lines = []
        for index, curve in enumerate(plot.curves):
            colour = PALETTE[index % len(PALETTE)][0]
            dash = tuple(float(length) for length in (_dash(index) or "").split())
            axes.fill_between(
                curve.times_s, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0
            )
            (line,) = axes.plot(
                curve.times_s, curve.means, color=colour, linestyle=(0, dash) if dash else "-"
            )
            lines.append(line)
        ticks = time_ticks(end_s)
        axes.set(xlim=(0, end_s), ylim=value_range(plot.curves), xticks=ticks)
        axes.set_xticklabels([clock(tick, end_s) for tick in ticks])
        axes.set_title(f"{plot.label}, {plot.note}" if plot.note else plot.label, parse_math=False)
        dress(axes)
    if lines:
        # Names are set afterwards: a label that begins with "_" is left out of a legend, and
        # between "$" matplotlib reads formulas.
        names = [plain(curve.name) for curve in plots[-1].curves]
        legend = figure.legend(
            lines, ["method"] * len(lines), loc="outside lower center", ncols=3, frameon=False
        )
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_parse_math(False)
            text.set_text(name)
    else:
        figure.text(0.5, 0.5, "No metric has values over time.", ha="center")
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        save_figure(path, figure)
