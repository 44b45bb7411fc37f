"""`everanimate analyze`: from words to settings, and from the result to stdout."""

import errno
import json
from dataclasses import fields
from pathlib import Path

import pytest
from stand_ins import Worker

from everanimate_cli.analyze_settings import AttentionSettings, RoundtripSettings
from everanimate_cli.cli import main
from everanimate_cli.errors import RunError
from everanimate_cli.events import Note
from everanimate_cli.records import CommandResult, LoraSpec

WORDS = {
    "roundtrip": ["analyze", "roundtrip", "film.mp4", "--model", "toy"],
    "attention": ["analyze", "attention", "anna.png", "dance", "--model", "toy"],
}


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker behind both commands, in a folder with inputs."""
    fake = Worker(CommandResult(output=Path("out"), facts={"trips": 2}), Note(text="a note"))
    fake.put_behind(monkeypatch, "roundtrip", "analyze_roundtrip")
    fake.put_behind(monkeypatch, "attention_shares", "analyze_attention")
    monkeypatch.chdir(tmp_path)
    Path("dance").mkdir()
    names = ["dance/pose.mp4", "dance/face.mp4", "dance/extract.json", "a.safetensors"]
    for name in ("anna.png", "back.png", "film.mp4", *names):
        Path(name).write_bytes(b"content")
    return fake


# Field -> (words after those above, the value that they must lead to).
ROUNDTRIP: dict[str, tuple[list[str], object]] = {
    "video": ([], Path("film.mp4")),
    "output": (["-o", "here"], Path("here")),
    "trips": (["--trips", "5"], 5),
    "quantise": (["--quantise", "none"], "none"),
    "flat": (["--no-flat"], False),
    "model": ([], "toy"),
    "size": (["--size", "96x64"], "96x64"),
    "fit": (["--fit", "stretch"], "stretch"),
    "start": (["--start", "1:02.5"], 62.5),
    "end": (["--end", "3"], 3.0),
    "frames_per_chunk": (["--frames-per-chunk", "21"], 21),
    "device": (["--device", "cpu"], "cpu"),
    "overwrite": (["--overwrite"], True),
    "dry_run": (["--dry-run"], True),
}
ATTENTION: dict[str, tuple[list[str], object]] = {
    "ref": ([], Path("anna.png")),
    "driving": ([], Path("dance")),
    "output": (["-o", "here"], Path("here")),
    "seconds": (["--seconds", "2.5"], 2.5),
    "frames": (["--frames", "30"], 30),
    "start": (["--start", "1:02.5"], 62.5),
    "pose_model": (["--pose-model", "toy"], "toy"),
    "pose_folder": (["--pose-folder", "poses"], Path("poses")),
    "model": ([], "toy"),
    "lora": (["--lora", "a.safetensors=0.5"], (LoraSpec("a.safetensors", 0.5),)),
    "view": (["--view", "back.png"], (Path("back.png"),)),
    "size": (["--size", "96x64"], "96x64"),
    "fit": (["--fit", "cover"], "cover"),
    "seed": (["--seed", "7"], 7),
    "steps": (["--steps", "4"], 4),
    "shift": (["--shift", "3"], 3.0),
    "prompt": (["--prompt", "a dance"], "a dance"),
    "frames_per_chunk": (["--frames-per-chunk", "21"], 21),
    "overlap": (["--overlap", "8"], 8),
    "identity_slots": (["--identity-slots", "2"], 2),
    "memory": (["--memory", "sink"], "sink"),
    "carry_frames": (["--memory", "pixel", "--carry-frames", "5"], 5),
    "clip_image": (["--clip-image", "reference"], "reference"),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "overwrite": (["--overwrite"], True),
    "dry_run": (["--dry-run"], True),
}
CASES = [("roundtrip", name, *case) for name, case in ROUNDTRIP.items()] + [
    ("attention", name, *case) for name, case in ATTENTION.items()
]


@pytest.mark.parametrize(("command", "name", "words", "value"), CASES)
def test_each_option_reaches_its_field(
    worker: Worker, command: str, name: str, words: list[str], value: object
) -> None:
    base = list(WORDS[command])
    if name in ("pose_model", "pose_folder"):  # only raw videos have poses to be extracted
        base[3] = "film.mp4"
    assert main([*base, *words]) == 0
    assert getattr(worker.calls[0], name) == value
    given_above = ("video", "ref", "driving", "model")
    default = next(item.default for item in fields(worker.calls[0]) if item.name == name)
    assert (value == default) is False or name in given_above


def test_every_field_has_its_option() -> None:
    assert set(ROUNDTRIP) == {item.name for item in fields(RoundtripSettings)}
    assert set(ATTENTION) == {item.name for item in fields(AttentionSettings)}


def test_options_not_given_keep_the_defaults_of_the_settings(worker: Worker) -> None:
    assert main(WORDS["roundtrip"]) == 0
    assert main(WORDS["attention"]) == 0
    assert worker.calls == [
        RoundtripSettings(video=Path("film.mp4"), model="toy"),
        AttentionSettings(ref=Path("anna.png"), driving=Path("dance"), model="toy"),
    ]


def test_no_lora_at_all(worker: Worker) -> None:
    assert main([*WORDS["attention"], "--lora", "none"]) == 0
    assert worker.calls[0].to_json()["lora"] == []


@pytest.mark.parametrize("command", WORDS)
def test_stdout_carries_the_folder_and_stderr_the_progress(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(WORDS[command]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("out\n", "a note\n")


@pytest.mark.parametrize("command", WORDS)
def test_json_and_quiet(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*WORDS[command], "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"output": "out", "trips": 2}
    assert captured.err == ""


@pytest.mark.parametrize("command", WORDS)
def test_a_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*WORDS[command], "--dry-run", "-q"]) == 0
    assert capsys.readouterr().out == "output: out\ntrips: 2\n"


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize(
    ("error", "exit_code", "last_line"),
    [
        (RunError("the device is lost."), 1, "error: the device is lost."),
        (KeyboardInterrupt(), 130, "interrupted. Run the same command to begin again."),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: disk full: [Errno 28] No space left on device. Free some space, "
            "then run the same command again.",
        ),
    ],
)
def test_failures_end_with_one_line_and_their_exit_code(
    worker: Worker,
    capsys: pytest.CaptureFixture[str],
    command: str,
    error: BaseException,
    exit_code: int,
    last_line: str,
) -> None:
    worker.error = error
    assert main(WORDS[command]) == exit_code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == last_line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roundtrip", "film.mp4", "--trips", "many"], "many is not a whole number."),
        (["roundtrip", "film.mp4", "--trips", "0"], "--trips 0 is too small. Give 1 or more."),
        (["roundtrip", "no.mp4"], "VIDEO no.mp4 does not exist. Give a video or a picture."),
        (["roundtrip"], "Missing argument 'VIDEO'."),
        (["attention", "anna.png"], "Missing argument 'DRIVING'."),
        (["attention", "anna.png", "dance", "--bogus"], "No such option: --bogus."),
        (["attention", "anna.png", "dance", "--steps", "0"], "--steps 0 is too small."),
        (["sideways"], "No such command 'sideways'."),
        ([], "Missing command."),
    ],
)
def test_slips_are_one_line(
    worker: Worker, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["analyze", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert worker.calls == []
