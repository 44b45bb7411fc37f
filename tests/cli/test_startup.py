"""Questions and slips are answered before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = [
    "accelerate",
    "av",
    "cv2",
    "diffusers",
    "numpy",
    "onnxruntime",
    "peft",
    "rtmlib",
    "safetensors",
    "torch",
    "transformers",
]
REPORT = f"""
import json, sys
print(json.dumps([code, sorted(set({HEAVY}) & set(sys.modules))]))
"""
RUN_MAIN = "import sys; from everanimate_cli.cli import main; code = main(sys.argv[1:])"


def run_fresh(program: str, words: list[str], folder: Path) -> tuple[int, list[str]]:
    """(exit code, heavy modules loaded) of a program in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{REPORT}", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    return code, loaded


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["--help"], 0),
        (["animate", "--help"], 0),
        (["extract-pose", "--help"], 0),
        (["train-lora", "--help"], 0),
        (["eval", "--help"], 0),
        (["analyze", "--help"], 0),
        (["analyze", "attention", "--help"], 0),
        (["models", "--help"], 0),
        (["models", "pull", "--help"], 0),
        (["models", "list", "toy"], 0),
        (["models", "path", "toy"], 0),
        (["models", "verify", "nothing"], 2),
        (["animate", "anna.png", "dance", "--transformer", "no.gguf"], 2),
        (["demo", "--help"], 0),
        (["doctor", "--help"], 0),
        (["doctor", "--output", "no"], 2),
        (["animate", "anna.png", "dance", "--vram", "20"], 2),
        (["animate", "anna.png", "dance", "--precision", "nf4", "--offload", "disk"], 2),
        (["--version"], 0),
        (["animate", "--bogus"], 2),
        (["animate", "anna.png", "dance", "--steps", "0"], 2),
        (["animate", "eve.png", "dance"], 2),
        (["animate", "anna.png", "dance", "--lora", "no.safetensors"], 2),
        (["animate", "anna.png", "dance", "-o", "taken.mp4"], 2),
        (["extract-pose", "eve.mp4"], 2),
        (["extract-pose", "taken.mp4", "--size", "830x480"], 2),
        (["extract-pose", "taken.mp4", "-o", "dance"], 2),
        (["train-lora", "--bogus"], 2),
        (["train-lora", "films", "--stage", "4"], 2),
        (["train-lora", "no.csv"], 2),
        (["train-lora", "films", "--init", "taken.safetensors"], 2),
        (["train-lora", "films", "-o", "dance"], 2),
        (["eval", "no.mp4"], 2),
        (["eval", "taken.mp4", "--fail-if", "x<1"], 2),
        (["analyze", "roundtrip", "eve.png"], 2),
        (["analyze", "attention", "eve.png", "dance"], 2),
        (["demo", "anna.png"], 2),
        (["runs"], 0),
        (["runs", "--remove", "--json"], 0),
    ],
)
def test_nothing_heavy_is_loaded(tmp_path: Path, words: list[str], exit_code: int) -> None:
    (tmp_path / "dance").mkdir()
    (tmp_path / "films").mkdir()
    names = ["anna.png", "taken.mp4", "taken.safetensors", "films/waltz.mp4"]
    for name in [*names, "dance/pose.mp4", "dance/face.mp4", "dance/extract.json"]:
        (tmp_path / name).write_bytes(b"content")
    (tmp_path / "old.mp4.run").mkdir()
    (tmp_path / "old.mp4.run" / "run.json").write_text("{}")
    assert run_fresh(RUN_MAIN, words, tmp_path) == (exit_code, [])


def test_the_console_is_light_too(tmp_path: Path) -> None:
    assert run_fresh("import everanimate_cli.console; code = 0", [], tmp_path) == (0, [])


def test_the_check_notices_a_heavy_import(tmp_path: Path) -> None:
    assert run_fresh("import numpy; code = 0", [], tmp_path) == (0, ["numpy"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["animate", "eve.png", "dance"],
            "REF eve.png does not exist. Give a picture of the character.",
        ),
        (["train-lora"], "DATASET is missing. Give a folder of videos or a manifest."),
    ],
)
def test_the_module_runs_as_the_program_does(tmp_path: Path, words: list[str], error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "everanimate_cli", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {error}\n"
