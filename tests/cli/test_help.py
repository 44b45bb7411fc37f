"""The help pages: every option with its default, examples that parse."""

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


@pytest.fixture(scope="module")
def animate_page() -> str:
    return help_page("animate")


@pytest.mark.parametrize("name", [item.name for item in fields(AnimateSettings)])
def test_every_option_is_on_the_page(animate_page: str, name: str) -> None:
    assert re.search(rf"^│ +{option_name(name)}\b", animate_page, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("model", "Wan-AI/Wan2.2-Animate-14B-Diffusers"),
        ("memory", "latent"),
        ("extend", "pingpong"),
        ("fit", "contain"),
        ("guidance_scale", "1"),
        ("seed", "0"),
        ("crf", "18"),
        ("audio", "on"),
        ("pose_beside", "off"),
        ("steps", "the model's"),
        ("output", "DRIVING_REF.mp4"),
    ],
)
def test_defaults_are_shown(animate_page: str, name: str, default: str) -> None:
    line = re.search(rf"^│ +{option_name(name)}\b.*$", animate_page, re.MULTILINE)
    assert line is not None
    assert f"(default: {default})" in line[0]


def test_options_are_grouped(animate_page: str) -> None:
    headings = re.findall(r"^╭─ (.*?) ─", animate_page, re.MULTILINE)
    assert headings == [
        "Arguments",
        "Options",
        "Length and motion",
        "Model",
        "Picture",
        "Sampling",
        "Memory between chunks",
        "Memory of the card",
        "Speed",
        "Result",
        "Run",
    ]


@pytest.mark.parametrize("name", [item.name for item in fields(EvalSettings)])
def test_every_option_of_an_evaluation_is_on_the_page(eval_page: str, name: str) -> None:
    assert re.search(rf"^│ +{EvalSettings.label(name)}\b", eval_page, re.MULTILINE)


@pytest.fixture(scope="module")
def eval_page() -> str:
    return help_page("eval")


def test_the_demo_page_shows_its_options_and_defaults() -> None:
    page = help_page("demo")
    for item in fields(DemoSettings):
        assert option_name(item.name) in page
    assert "[default: everanimate-demo]" in page
    assert "[default: 10.0]" in page


@pytest.fixture(scope="module")
def extract_page() -> str:
    return help_page("extract-pose")


@pytest.mark.parametrize("name", [item.name for item in fields(ExtractSettings)])
def test_every_option_of_an_extraction_is_on_the_page(extract_page: str, name: str) -> None:
    # An argument that is needed has a star before its name.
    assert re.search(rf"^│ \*? *{option_name(name)}\b", extract_page, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("size", "832x480"),
        ("fps", "25"),
        ("crf", "12"),
        ("pose_model", "rtmw"),
        ("detect_every", "8"),
        ("max_gap", "0.3"),
        ("smooth", "on"),
        ("face_scale", "1.3"),
        ("output", "VIDEO_pose"),
    ],
)
def test_defaults_of_an_extraction_are_shown(extract_page: str, name: str, default: str) -> None:
    line = re.search(rf"^│ +{option_name(name)}\b.*$", extract_page, re.MULTILINE)
    assert line is not None
    assert f"(default: {default})" in line[0]


@pytest.fixture(scope="module")
def train_page() -> str:
    return help_page("train-lora")


@pytest.mark.parametrize("name", [item.name for item in fields(TrainSettings)])
def test_every_option_of_a_training_is_on_the_page(train_page: str, name: str) -> None:
    assert re.search(rf"^│ +{option_name(name)}\b", train_page, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("stage", "1"),
        ("steps", "3000"),
        ("lr", "0.0001"),
        ("rank", "32"),
        ("memory", "latent"),
        ("correction", "gaussian"),
        ("first_chunk_probability", "0.2"),
        ("degradation_probability", "0; 0.64 from stage 2 on"),
        ("gradient_checkpointing", "on"),
        ("compile", "off"),
        ("tensorboard", "on"),
        ("output", "DATASET_stage1"),
    ],
)
def test_defaults_of_a_training_are_shown(train_page: str, name: str, default: str) -> None:
    line = re.search(rf"^│ +{option_name(name)}\b.*$", train_page, re.MULTILINE)
    assert line is not None
    assert f"(default: {default})" in line[0]


def test_options_of_a_training_are_grouped(train_page: str) -> None:
    headings = re.findall(r"^╭─ (.*?) ─", train_page, re.MULTILINE)
    assert headings == [
        "Arguments",
        "Options",
        "Data",
        "Picture",
        "Training",
        "Memory between chunks",
        "Restoration",
        "Model",
        "Machine",
        "Validation",
        "Result",
        "Run",
    ]


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


@pytest.mark.parametrize("words", examples(ANIMATE_HELP))
def test_the_examples_parse_and_lack_nothing_but_their_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err in (
        "error: REF anna.png does not exist. Give a picture of the character.\n",
        "error: --config anna.json cannot be read: No such file or directory.\n",
    )


@pytest.mark.parametrize("words", examples(EXTRACT_HELP))
def test_the_examples_of_an_extraction_parse_and_lack_nothing_but_their_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "error: VIDEO dance.mp4 does not exist. Give a video of a moving person.\n"
    )


@pytest.mark.parametrize("words", examples(TRAIN_HELP))
def test_the_examples_of_a_training_parse_and_lack_nothing_but_their_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    advice = "Give a folder of videos, or a .csv or .jsonl manifest that lists them."
    config = "videos_stage1/train.json"
    assert capsys.readouterr().err in (
        f"error: DATASET videos does not exist. {advice}\n",
        f"error: DATASET list.csv does not exist. {advice}\n",
        f"error: --config {config} cannot be read: No such file or directory.\n",
    )
