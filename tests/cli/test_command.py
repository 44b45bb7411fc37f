"""From words to settings, from results and errors to stdout, stderr and exit codes."""

import errno
import json
import re
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import typer
from stand_ins import Worker

from everanimate_cli.cli import main
from everanimate_cli.cli_options import resumable
from everanimate_cli.errors import RunError, WeightsError
from everanimate_cli.events import ChunkDone, ChunkStarted, Note
from everanimate_cli.records import LoraSpec
from everanimate_cli.settings import AnimateSettings, DemoSettings

ANIMATE = ["animate", "anna.png", "dance"]


@dataclass
class Result:
    output: Path
    contact_sheet: Path = Path("sheet.png")

    def to_json(self) -> dict[str, object]:
        return {"output": str(self.output), "num_chunks": 3}


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker behind both commands, in a folder with the inputs that the tests name."""
    fake = Worker(
        Result(Path("dance_anna.mp4")),
        Note(text="a note"),
        ChunkStarted(chunk_index=0, num_chunks=1, num_steps=1),
        ChunkDone(chunk_index=0, num_frames=5, seconds=2.0),
    )
    fake.put_behind(monkeypatch, "animate", "animate")
    fake.put_behind(monkeypatch, "demo", "run_demo")
    monkeypatch.chdir(tmp_path)
    names = ["anna.png", "back.png", "film.mp4", "p.mp4", "f.mp4", "a.safetensors"]
    for name in [*names, *(f"dance/{name}" for name in ("pose.mp4", "face.mp4", "extract.json"))]:
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
    return fake


# Field -> (words after `animate anna.png dance`, the value that they must lead to).
OPTIONS: dict[str, tuple[list[str], object]] = {
    "ref": ([], Path("anna.png")),
    "driving": ([], Path("dance")),
    "output": (["-o", "x.mp4"], Path("x.mp4")),
    "minutes": (["--minutes", "2"], 2.0),
    "seconds": (["--seconds", "2.5"], 2.5),
    "frames": (["--frames", "7"], 7),
    "start": (["--start", "1:02.5"], 62.5),
    "end": (["--end", "70"], 70.0),
    "model": (["--model", "toy"], "toy"),
    "lora": (
        ["--lora", "a.safetensors=0.5", "--lora", "o/n/b.safetensors"],
        (LoraSpec("a.safetensors", 0.5), LoraSpec("o/n/b.safetensors")),
    ),
    "lora_mode": (["--lora-mode", "separate"], "separate"),
    "view": (["--view", "back.png", "--view", "anna.png"], (Path("back.png"), Path("anna.png"))),
    "size": (["--size", "96x64"], "96x64"),
    "fit": (["--fit", "cover"], "cover"),
    "fps": (["--fps", "12.5"], 12.5),
    "steps": (["--steps", "4"], 4),
    "shift": (["--shift", "3"], 3.0),
    "seed": (["--seed", "7"], 7),
    "prompt": (["--prompt", "a dance"], "a dance"),
    "negative_prompt": (["--negative-prompt", "blurry", "--guidance-scale", "2"], "blurry"),
    "guidance_scale": (["--guidance-scale", "1.5"], 1.5),
    "frames_per_chunk": (["--frames-per-chunk", "21"], 21),
    "overlap": (["--overlap", "8"], 8),
    "identity_slots": (["--identity-slots", "2"], 2),
    "memory": (["--memory", "sink"], "sink"),
    "carry_frames": (["--memory", "pixel", "--carry-frames", "5"], 5),
    "clip_image": (["--clip-image", "reference"], "reference"),
    "extend": (["--extend", "hold"], "hold"),
    "audio": (["--no-audio"], False),
    "pose_beside": (["--pose-beside"], True),
    "codec": (["--codec", "h265"], "h265"),
    "crf": (["--crf", "30"], 30),
    "png": (["--png", "frames"], Path("frames")),
    "transformer": (["--transformer", "a.safetensors"], Path("a.safetensors")),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "vram": (["--vram", "24"], "24"),
    "precision": (["--precision", "fp8"], "fp8"),
    "offload": (["--offload", "group"], "group"),
    "vae_tiling": (["--vae-tiling", "on"], "on"),
    "text_device": (["--text-device", "cpu"], "cpu"),
    "fast": (["--fast"], True),
    "attention": (["--attention", "sdpa"], "sdpa"),
    "compile": (["--compile"], True),
    "step_cache": (["--step-cache", "mag"], "mag"),
    "step_cache_threshold": (["--step-cache", "mag", "--step-cache-threshold", "0.1"], 0.1),
    "concurrent": (["--no-concurrent"], False),
    "resume": (["--no-resume"], False),
    "overwrite": (["--overwrite"], True),
    "keep_run": (["--keep-run"], True),
    "dry_run": (["--dry-run"], True),
}

# The same after `animate anna.png film.mp4`: options of the extraction.
RAW_OPTIONS: dict[str, tuple[list[str], object]] = {
    "pose_model": (["--pose-model", "dwpose"], "dwpose"),
    "detector": (["--detector", "yolox-tiny"], "yolox-tiny"),
    "person": (["--person", "1"], 1),
    "select": (["--select", "left"], "left"),
    "retarget": (["--retarget"], True),
    "pose_folder": (["--pose-folder", "poses"], Path("poses")),
}


@pytest.mark.parametrize("name", RAW_OPTIONS)
def test_each_option_of_a_raw_video_reaches_its_field(worker: Worker, name: str) -> None:
    words, value = RAW_OPTIONS[name]
    assert main(["animate", "anna.png", "film.mp4", *words]) == 0
    assert getattr(worker.calls[0], name) == value


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_its_field(worker: Worker, name: str) -> None:
    words, value = OPTIONS[name]
    assert main([*ANIMATE, *words]) == 0
    assert getattr(worker.calls[0], name) == value
    default = getattr(AnimateSettings(ref=Path("anna.png"), driving=Path("dance")), name)
    assert (value == default) is (name in ("ref", "driving"))


def test_pose_and_face_stand_in_for_the_driving_folder(worker: Worker) -> None:
    assert main(["animate", "anna.png", "--pose", "p.mp4", "--face", "f.mp4"]) == 0
    settings = worker.calls[0]
    assert (settings.driving, settings.pose, settings.face) == (None, Path("p.mp4"), Path("f.mp4"))


def test_every_field_has_its_option() -> None:
    names = {item.name for item in fields(AnimateSettings)}
    # Options for several processes are refused to a single one, see test_animate_processes.
    assert {*OPTIONS, *RAW_OPTIONS, "pose", "face", "parallel", "spare_rank"} == names


def test_options_not_given_keep_the_defaults_of_the_settings(worker: Worker) -> None:
    assert main(ANIMATE) == 0
    assert worker.calls == [AnimateSettings(ref=Path("anna.png"), driving=Path("dance"))]


@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if name in AnimateSettings.saved_names()]
)
def test_a_saved_run_sets_what_the_option_sets(worker: Worker, name: str) -> None:
    assert main([*ANIMATE, *OPTIONS[name][0]]) == 0
    saved = {"settings": worker.calls[0].to_json(), "versions": {"everanimate": "0.1.0"}}
    Path("saved.json").write_text(json.dumps(saved))
    assert main(["animate", "--config", "saved.json"]) == 0
    assert worker.calls[1] == worker.calls[0]


def test_the_command_line_wins_over_the_saved_run(worker: Worker) -> None:
    saved = {
        "ref": "anna.png",
        "driving": "dance",
        "seconds": 4,
        "steps": 20,
        "audio": False,
        "pose_beside": True,
        "lora": ["a.safetensors=0.5"],
    }
    Path("saved.json").write_text(json.dumps(saved))
    words = ["--minutes", "1", "--steps", "4", "--audio", "--no-pose-beside", "--lora", "none"]
    assert main(["animate", "--config", "saved.json", *words]) == 0
    assert worker.calls == [
        AnimateSettings(ref=Path("anna.png"), driving=Path("dance"), minutes=1.0, steps=4, lora=())
    ]


@pytest.mark.usefixtures("worker")
def test_stdout_carries_the_path_and_stderr_the_progress(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(ANIMATE) == 0
    captured = capsys.readouterr()
    assert captured.out == "dance_anna.mp4\n"
    assert captured.err == "a note\nchunk 1/1: 5 frames in 2.0 s, 2.5 frames/s\n"


@pytest.mark.usefixtures("worker")
def test_json_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ANIMATE, "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"output": "dance_anna.mp4", "num_chunks": 3}
    assert captured.err == ""


@pytest.mark.usefixtures("worker")
def test_a_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ANIMATE, "--dry-run", "-q"]) == 0
    assert capsys.readouterr().out == "output: dance_anna.mp4\nnum chunks: 3\n"


def test_demo(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "dance_anna.mp4\nsheet.png\n"
    assert main(["demo", "d", "--seconds", "3", "--seed", "5", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "dance_anna.mp4", "num_chunks": 3}
    assert worker.calls == [
        DemoSettings(),
        DemoSettings(directory=Path("d"), seconds=3.0, seed=5, overwrite=True),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["animate"], "REF is missing. Give a picture of the character."),
        ([*ANIMATE, "--steps", "0"], "--steps 0 is too small. Give 1 or more."),
        (
            [*ANIMATE, "--steps", "many"],
            "Invalid value for '--steps': many is not a whole number. "
            "See 'everanimate animate --help'.",
        ),
        (
            [*ANIMATE, "--fps", "fast"],
            "Invalid value for '--fps': fast is not a number. See 'everanimate animate --help'.",
        ),
        (
            ["demo", "--seed", "x"],
            "Invalid value for '--seed': x is not a whole number. See 'everanimate demo --help'.",
        ),
        (
            ["animate", "eve.png", "dance"],
            "REF eve.png does not exist. Give a picture of the character.",
        ),
        (
            ["animate", "--config", "no.json"],
            "--config no.json cannot be read: No such file or directory.",
        ),
    ],
)
def test_wrong_usage_and_input_are_one_line_and_exit_code_2(
    worker: Worker, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""
    assert worker.calls == []


@pytest.mark.parametrize(
    ("words", "found", "page"),
    [
        (["bogus"], "No such command 'bogus'", "everanimate"),
        (["anim"], "Did you mean 'animate'? See", "everanimate"),
        (["--bogus"], "--bogus. See", "everanimate"),
        (["animate", "--stepz"], "--steps", "everanimate animate"),
        ([*ANIMATE, "more"], "more", "everanimate animate"),
        ([*ANIMATE, "--steps"], "'--steps' requires an argument. See", "everanimate animate"),
        (
            [*ANIMATE, "--memory", "none"],
            "'--memory': 'none' is not one of 'latent', 'pixel', 'sink'. See",
            "everanimate animate",
        ),
        (["demo", "here", "there"], "there", "everanimate demo"),
    ],
)
def test_what_typer_refuses_is_one_line_that_names_the_help_page(
    worker: Worker,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    found: str,
    page: str,
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"error: .*[.?] See '{page} --help'\.\n", captured.err)
    assert found in captured.err
    assert captured.out == ""
    assert worker.calls == []


@pytest.mark.parametrize(
    ("error", "exit_code", "last_line"),
    [
        (
            WeightsError("--lora a.safetensors:\n3 keys fit nothing."),
            2,
            "error: --lora a.safetensors: 3 keys fit nothing.",
        ),
        (RunError("the GPU is gone."), 1, "error: the GPU is gone."),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.mp4"),
            1,
            "error: disk full: [Errno 28] No space left on device: 'x.mp4'. Free some space, "
            "then run the same command again to continue.",
        ),
        (
            KeyboardInterrupt(),
            130,
            "interrupted. Run the same command again to continue.",
        ),
    ],
)
def test_failures_end_with_one_line_and_their_exit_code(
    worker: Worker,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    exit_code: int,
    last_line: str,
) -> None:
    worker.error = error
    assert main(ANIMATE) == exit_code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == last_line
    assert captured.out == ""


def test_an_interrupted_run_that_was_not_to_resume_says_how_it_would(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.error = KeyboardInterrupt()
    assert main([*ANIMATE, "--no-resume"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted. Run the same command without --no-resume to continue."
    )


def test_a_second_interruption_ends_the_program_without_a_trace(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.error = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["everanimate", *ANIMATE])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_within_a_finalizer_is_not_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Finalized:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    @resumable("again")
    def work() -> None:
        Finalized()
        given_up_at = time.monotonic() + 10.0
        while time.monotonic() < given_up_at:
            pass

    with pytest.raises(typer.Exit) as caught:
        work()
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted. Run the same command again to continue.\n"


def test_an_interrupted_demo_says_so(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    worker.error = KeyboardInterrupt()
    assert main(["demo", "d"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted. Run the same command again to continue."
    )


@pytest.mark.parametrize("bug", [KeyError("k"), OSError(errno.EIO, "Input/output error")])
def test_a_bug_is_not_dressed_up_as_a_users_mistake(worker: Worker, bug: Exception) -> None:
    worker.error = bug
    with pytest.raises(type(bug)):
        main(ANIMATE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "everanimate 0.1.0\n"


def test_the_program_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: everanimate" in capsys.readouterr().out


def test_the_words_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["everanimate", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == "everanimate 0.1.0\n"
