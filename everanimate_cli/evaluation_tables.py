"""An evaluation as text for people, and as a CSV table for programs."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from everanimate_cli.metric_table import METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from everanimate_cli.eval_result import Evaluation, Measure

from everanimate_cli.atomic_files import atomic_path

_NOTHING = "-"


def lay_out(evaluation: Evaluation) -> str:
    """A block of lines for each metric, a line for each method.

    Of a test set the means over its videos.
    """
    summaries = {method: evaluation.summary(method) for method in evaluation.method_names}
    labels = [horizon.label for horizon in evaluation.settings.stretches]
    blocks = []
    missing = []
    for name in evaluation.settings.metric_names:
        measures = {method: found[name] for method, found in summaries.items()}
        reasons = {measure.unavailable for measure in measures.values()}
        if None not in reasons and len(reasons) == 1:
            missing.append(f"{name}: not available: {reasons.pop()}")
        else:
            blocks.append(_block(name, measures, labels))
    if missing:
        blocks.append("\n".join(missing))
    return "\n\n".join(blocks)


def _block(name: str, measures: Mapping[str, Measure], labels: Sequence[str]) -> str:
    kind = METRICS[name]
    unit = f" [{kind.unit}]" if kind.unit else ""
    head = [f"{name}{unit}, {kind.better} is better", "overall", *labels, "per minute"]
    rows = []
    for method, measure in measures.items():
        if measure.unavailable is not None:
            rows.append([f"  {method}", f"not available: {measure.unavailable}"])
            continue
        numbers = [measure.overall, *(measure.horizons or [None] * len(labels))]
        cells = [_number(value, kind.digits) for value in numbers]
        rows.append([f"  {method}", *cells, _slope(measure, kind.digits)])
    full = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(len(row[column]) for row in full) for column in range(len(head))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows))
    lines = []
    for row in [head, *rows]:
        first, *rest = row
        if len(row) == len(head):
            rest = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _slope(measure: Measure, digits: int) -> str:
    if measure.slope_per_minute is None:
        return _NOTHING
    text = f"{measure.slope_per_minute:+.{digits}f}"
    if measure.interval is None:
        return text
    low, high = measure.interval
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """One line for each metric of each video.

    Columns: method, sample, metric, unit, better, overall, a column for each stretch of time,
    slope_per_minute, interval_low, interval_high, not_available.

    Args:
        evaluation: What was measured.
        path: File to make or replace, whole or not at all.

    Raises:
        OSError: If the disk is full.
    """
    labels = [horizon.label for horizon in evaluation.settings.stretches]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    head = ["method", "sample", "metric", "unit", "better", "overall", *labels]
    writer.writerow([*head, "slope_per_minute", "interval_low", "interval_high", "not_available"])
    for result in evaluation.methods:
        for name, measure in result.metrics.items():
            kind = METRICS[name]
            horizons = measure.horizons or (None,) * len(labels)
            low, high = measure.interval or (None, None)
            writer.writerow(
                [
                    result.entry.method,
                    result.entry.sample,
                    name,
                    kind.unit,
                    kind.better,
                    measure.overall,
                    *horizons,
                    measure.slope_per_minute,
                    low,
                    high,
                    measure.unavailable,
                ]
            )
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
