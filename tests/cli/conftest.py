"""A character, a dance with sound and a tiny checkpoint, made once for all tests of the program."""

from pathlib import Path

import pytest
from PIL import Image
from studio import Animate, Outcome, Program, picture, write_dance
from tiny import write_tiny_checkpoint

from everanimate_cli.cli import main


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset what makes rich believe in a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test may change."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Inputs that no test may change: anna.png, back.png, dance and tiny."""
    folder = tmp_path_factory.mktemp("studio")
    Image.fromarray(picture(60, 80, 0.0)).save(folder / "anna.png")
    Image.fromarray(picture(60, 80, 1.0)).save(folder / "back.png")
    write_dance(folder / "dance")
    (folder / "tiny").symlink_to(tiny_model)
    return folder


@pytest.fixture
def place(tmp_path: Path, studio: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the inputs in it."""
    for path in studio.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs `everanimate` and keeps the streams apart."""

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def animate(place: Path, program: Program) -> Animate:
    """Runs `everanimate animate anna.png dance --model tiny` and further words."""
    assert place.is_dir()

    def run(*words: str, inputs: tuple[str, ...] = ("anna.png", "dance")) -> Outcome:
        return program("animate", *inputs, "--model", "tiny", *words)

    return run
