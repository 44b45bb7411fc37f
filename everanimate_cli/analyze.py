"""What the analyses share: their folder of results, and tables."""

from __future__ import annotations

import csv
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from everanimate_cli.atomic_files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from everanimate_cli.records import Options

FORMAT_VERSION = 1
_LIBRARIES = ("everanimate", "torch", "diffusers", "numpy", "av")


def write_record(
    path: Path, settings: Options, facts: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write the JSON file of an analysis.

    Args:
        path: File to make or replace.
        settings: As given.
        facts: What was measured: sizes, counts, model, hashes.
        results: The figures.

    Raises:
        OSError: If the disk is full.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "settings": settings.to_json(),
        **facts,
        **results,
    }
    with atomic_path(path) as temporary:
        # An infinite PSNR is null: JSON has no infinity.
        text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of equal keys as CSV; None is an empty cell.

    Raises:
        OSError: If the disk is full.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
