"""What the measuring scripts print alike; loads nothing heavy."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns after the first aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def lay_out_targets(targets: Iterable[dict[str, Any]], *, digits: int = 3) -> str:
    """The targets as a table, what was measured with so many digits after the point."""
    lines = [
        [
            target["target"],
            f"{target['value']:.{digits}f}",
            f"{target['limit']:.4g}",
            "ok" if target["met"] else "**short**",
        ]
        for target in targets
    ]
    return table(["target", "measured", "at most", ""], lines)


def describe_machine(*libraries: str) -> str:
    """Processor and versions, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"
