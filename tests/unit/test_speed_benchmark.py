"""The script that measures the options of speed runs, and its figures fit each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_checkpoint

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed.py"
ROWS = ("once", "cache-0.5", "overlap")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the script prints, and its JSON."""
    folder = tmp_path_factory.mktemp("speed")
    figures = folder / "figures.json"
    words = ["--model", write_tiny_checkpoint(folder / "tiny"), "--chunks", 2, "--steps", 4]
    words += ["--repeats", 1, "--json", figures, "--only", *ROWS]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text())


def test_rows_are_measured_and_printed(measured: tuple[str, dict]) -> None:
    printed, figures = measured
    rows = {row["name"]: row for row in figures["rows"]}
    assert tuple(rows) == ROWS
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert f"| {row['name']} | {row['unit']} | {1e3 * row['plain_s']:.1f} | " in printed


def test_frames_are_compared(measured: tuple[str, dict]) -> None:
    _, figures = measured
    rows = {row["name"]: row for row in figures["rows"]}
    assert rows["overlap"]["is_equal"] is True
    assert rows["once"]["is_equal"] is None
    assert 5 < rows["cache-0.5"]["psnr_db"] < 60
