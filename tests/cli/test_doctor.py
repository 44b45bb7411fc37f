"""`everanimate doctor`: lines, tables or JSON, and the exit code."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from everanimate_cli import doctor
from everanimate_cli.cli import main


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "toy"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == [
        f"{name}:"
        for name in (
            *("System", "Device", "Packages", "Accelerators", "Media", "Models", "Plan"),
            "Problems",
        )
    ]
    assert any(line.startswith("  torch: 2.") for line in lines)
    assert "  encoders: libx264, libx265, aac" in lines
    assert captured.err == ""


def test_tables_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["doctor", "--model", "toy"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "Plan" in out
    assert "Plan:" not in out


def test_long_names_leave_room_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    main(["doctor"])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert re.search(r"^ *Wan-AI/.+ {2}(in|partly in|not in) the cache", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 60


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "toy"
    assert found["usable"] is True
    assert found["plan"]["estimated_memory_mib"] > 0


def test_what_is_broken_shows_in_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_codec = doctor._has_codec

    def lacks_x264(name: str, mode: Any) -> bool:
        return name != "libx264" and has_codec(name, mode)

    monkeypatch.setattr(doctor, "_has_codec", lacks_x264)
    assert main(["doctor", "--model", "toy"]) == 1
    out = capsys.readouterr().out
    assert "  encoders: libx265, aac; missing: libx264" in out.splitlines()
    assert "  error: PyAV has no libx264, which results are written with. Install PyAV" in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--output", "no"], "--output no does not exist. Give a folder."),
        (["--model", "/no/such"], None),
        (
            ["--model", "toyy"],
            "--model toyy is unknown. Give 'toy' (embedded, works offline), a checkpoint folder, "
            "or a Hub id such as Wan-AI/Wan2.2-Animate-14B-Diffusers.",
        ),
        (
            ["--model", "owner/name"],
            f"owner/name is not in the cache ({huggingface_hub.constants.HF_HUB_CACHE}). "
            "Run everanimate models pull owner/name.",
        ),
    ],
)
def test_slips(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    error: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    if error is not None:
        assert captured.err == f"error: {error}\n"
