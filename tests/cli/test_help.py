"""The help pages: every option with its default, examples that parse."""

import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from everanimate_cli.cli import DEMO_HELP, RUNS_HELP, main
from everanimate_cli.cli_animate import ANIMATE_HELP
from everanimate_cli.cli_doctor import DOCTOR_HELP
from everanimate_cli.cli_extract import EXTRACT_HELP
from everanimate_cli.cli_train import TRAIN_HELP
from everanimate_cli.eval_settings import EvalSettings
from everanimate_cli.records import option_name
from everanimate_cli.settings import AnimateSettings, DemoSettings, ExtractSettings
from everanimate_cli.train_settings import TrainSettings

SETTINGS = {
    "animate": AnimateSettings,
    "eval": EvalSettings,
    "extract-pose": ExtractSettings,
    "train-lora": TrainSettings,
}


@functools.cache
def help_page(*words: str, columns: int = 200) -> str:
    """A help page as plain text, whatever the terminal and CI around the tests look like."""
    forced = ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERMINAL_WIDTH")
    environment = {name: value for name, value in os.environ.items() if name not in forced}
    return subprocess.run(
        [sys.executable, "-m", "everanimate_cli", *words, "--help"],
        env={**environment, "COLUMNS": str(columns), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def line_of(command: str, name: str) -> str | None:
    """Where the page of a command has an option; an argument that is needed has a star before."""
    found = re.search(rf"^│ \*? *{name}\b.*$", help_page(command), re.MULTILINE)
    return None if found is None else found[0]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, settings.label(item.name))
        for command, settings in SETTINGS.items()
        for item in fields(settings)
    ],
)
def test_every_option_is_on_the_page(command: str, name: str) -> None:
    assert line_of(command, name) is not None


@pytest.mark.parametrize(
    ("command", "name", "default"),
    [
        ("animate", "--model", "Wan-AI/Wan2.2-Animate-14B-Diffusers"),
        ("animate", "--memory", "latent"),
        ("animate", "--extend", "pingpong"),
        ("animate", "--fit", "contain"),
        ("animate", "--guidance-scale", "1"),
        ("animate", "--seed", "0"),
        ("animate", "--crf", "18"),
        ("animate", "--audio", "on"),
        ("animate", "--pose-beside", "off"),
        ("animate", "--steps", "the model's"),
        ("animate", "--output", "DRIVING_REF.mp4"),
        ("extract-pose", "--size", "832x480"),
        ("extract-pose", "--fps", "25"),
        ("extract-pose", "--crf", "12"),
        ("extract-pose", "--pose-model", "rtmw"),
        ("extract-pose", "--detect-every", "8"),
        ("extract-pose", "--max-gap", "0.3"),
        ("extract-pose", "--smooth", "on"),
        ("extract-pose", "--face-scale", "1.3"),
        ("extract-pose", "--output", "VIDEO_pose"),
        ("train-lora", "--stage", "1"),
        ("train-lora", "--steps", "3000"),
        ("train-lora", "--lr", "0.0001"),
        ("train-lora", "--rank", "32"),
        ("train-lora", "--memory", "latent"),
        ("train-lora", "--correction", "gaussian"),
        ("train-lora", "--first-chunk-probability", "0.2"),
        ("train-lora", "--degradation-probability", "0; 0.64 from stage 2 on"),
        ("train-lora", "--gradient-checkpointing", "on"),
        ("train-lora", "--compile", "off"),
        ("train-lora", "--tensorboard", "on"),
        ("train-lora", "--output", "DATASET_stage1"),
    ],
)
def test_defaults_are_shown(command: str, name: str, default: str) -> None:
    line = line_of(command, name)
    assert line is not None
    assert f"(default: {default})" in line


GROUPS = {
    "animate": [
        *("Length and motion", "Model", "Picture", "Sampling", "Memory between chunks"),
        *("Memory of the card", "Speed", "Result", "Run"),
    ],
    "train-lora": [
        *("Data", "Picture", "Training", "Memory between chunks", "Restoration"),
        *("Model", "Machine", "Validation", "Result", "Run"),
    ],
}


@pytest.mark.parametrize("command", GROUPS)
def test_options_are_grouped(command: str) -> None:
    headings = re.findall(r"^╭─ (.*?) ─", help_page(command), re.MULTILINE)
    assert headings == ["Arguments", "Options", *GROUPS[command]]


def test_the_demo_page_shows_its_options_and_defaults() -> None:
    page = help_page("demo")
    for item in fields(DemoSettings):
        assert option_name(item.name) in page
    assert "[default: everanimate-demo]" in page
    assert "[default: 10.0]" in page


def test_the_program_lists_its_commands() -> None:
    page = help_page()
    assert re.search(r"^│ animate +Animate the character", page, re.MULTILINE)
    assert re.search(r"^│ extract-pose +Turn VIDEO into", page, re.MULTILINE)
    assert re.search(r"^│ train-lora +Train a LoRA on videos", page, re.MULTILINE)
    assert re.search(r"^│ doctor +Say what this machine has", page, re.MULTILINE)
    assert re.search(r"^│ demo +Render a character and a dance", page, re.MULTILINE)
    assert re.search(r"^│ runs +List the runs in FOLDER", page, re.MULTILINE)


@pytest.mark.parametrize("command", ["animate", "extract-pose", "train-lora"])
def test_a_page_fits_a_terminal_of_80_columns(command: str) -> None:
    page = help_page(command, columns=80)
    assert max(len(line) for line in page.splitlines()) <= 80
    assert "…" not in page


def examples(text: str) -> list[list[str]]:
    return [
        shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  everanimate ")
    ]


def test_all_commands_give_examples() -> None:
    assert len(examples(ANIMATE_HELP)) >= 3
    assert len(examples(EXTRACT_HELP)) >= 3
    assert len(examples(TRAIN_HELP)) >= 3
    assert len(examples(DEMO_HELP)) >= 2
    assert len(examples(DOCTOR_HELP)) >= 3
    assert len(examples(RUNS_HELP)) >= 2


TRAIN_ADVICE = "Give a folder of videos, or a .csv or .jsonl manifest that lists them."
# What the examples lack.
MISSING = {
    ANIMATE_HELP: (
        "REF anna.png does not exist. Give a picture of the character.",
        "--config anna.json cannot be read: No such file or directory.",
    ),
    EXTRACT_HELP: ("VIDEO dance.mp4 does not exist. Give a video of a moving person.",),
    TRAIN_HELP: (
        f"DATASET videos does not exist. {TRAIN_ADVICE}",
        f"DATASET list.csv does not exist. {TRAIN_ADVICE}",
        "--config videos_stage1/train.json cannot be read: No such file or directory.",
    ),
}


@pytest.mark.parametrize(
    ("words", "missing"),
    [(words, missing) for text, missing in MISSING.items() for words in examples(text)],
)
def test_the_examples_parse_and_lack_nothing_but_their_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    missing: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.removeprefix("error: ").removesuffix("\n") in missing
