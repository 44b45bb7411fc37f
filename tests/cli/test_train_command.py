"""`everanimate train-lora`: from words to settings, and from the result to stdout."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from stand_ins import Worker

from everanimate_cli.cli import main
from everanimate_cli.errors import RunError
from everanimate_cli.events import Note, TrainStep
from everanimate_cli.records import CommandResult
from everanimate_cli.train_settings import TrainSettings

TRAIN = ["train-lora", "videos"]
RESULT = CommandResult(
    output=Path("videos_stage1/lora.safetensors"), facts={"steps": 2, "weights_mib": {"vae": 3.5}}
)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker behind the command, in a folder with a dataset of a raw video."""
    step = TrainStep(step=1, num_steps=1, loss=0.25, learning_rate=1e-4, seconds=2.0)
    fake = Worker(RESULT, Note(text="a note"), step)
    fake.put_behind(monkeypatch, "train_lora", "train_lora")
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    for name in ("videos/dance.mp4", "film.mp4"):
        Path(name).write_bytes(b"content")
    return fake


# Field -> (words after `train-lora videos`, the value that they must lead to).
OPTIONS: dict[str, tuple[list[str], object]] = {
    "dataset": ([], Path("videos")),
    "output": (["-o", "here"], Path("here")),
    "stage": (["--stage", "2"], 2),
    "init": (["--init", "o/n/a.safetensors"], "o/n/a.safetensors"),
    "model": (["--model", "toy"], "toy"),
    "steps": (["--steps", "4"], 4),
    "batch_size": (["--batch-size", "2"], 2),
    "accumulate": (["--accumulate", "3"], 3),
    "lr": (["--lr", "3e-4"], 3e-4),
    "warmup": (["--warmup", "10"], 10),
    "weight_decay": (["--weight-decay", "0"], 0.0),
    "max_grad_norm": (["--max-grad-norm", "2.5"], 2.5),
    "rank": (["--rank", "8"], 8),
    "lora_alpha": (["--lora-alpha", "16"], 16.0),
    "memory": (["--memory", "sink"], "sink"),
    "carry_frames": (["--memory", "pixel", "--carry-frames", "5"], 5),
    "correction": (["--correction", "exact"], "exact"),
    "degradation_probability": (["--degradation-probability", "0.5"], 0.5),
    "degradation_min_sigma": (["--degradation-min-sigma", "0"], 0.0),
    "memory_augmentation": (["--memory-augmentation", "0.25"], 0.25),
    "error_recycling": (["--error-recycling", "0.95"], 0.95),
    "first_chunk_probability": (["--first-chunk-probability", "0.1"], 0.1),
    "reference_anchor_probability": (["--reference-anchor-probability", "0"], 0.0),
    "pose_drop": (["--pose-drop", "0"], 0.0),
    "size": (["--size", "96x64"], "96x64"),
    "fit": (["--fit", "cover"], "cover"),
    "fps": (["--fps", "12.5"], 12.5),
    "frames_per_chunk": (["--frames-per-chunk", "21"], 21),
    "identity_slots": (["--identity-slots", "2"], 2),
    "shift": (["--shift", "3"], 3.0),
    "prompt": (["--prompt", "a dance"], "a dance"),
    "latent_cache": (["--latent-cache", "cache"], Path("cache")),
    "cache_samples": (["--latent-cache", "cache", "--cache-samples", "9"], 9),
    "pose_folder": (["--pose-folder", "poses"], Path("poses")),
    "pose_model": (["--pose-model", "toy"], "toy"),
    "detector": (["--detector", "yolox-tiny"], "yolox-tiny"),
    "seed": (["--seed", "7"], 7),
    "checkpoint_every": (["--checkpoint-every", "5"], 5),
    "keep_checkpoints": (["--keep-checkpoints", "1"], 1),
    "validate_every": (["--validate-every", "50"], 50),
    "validation": (["--validate-every", "50", "--validation", "film.mp4"], Path("film.mp4")),
    "validation_chunks": (["--validate-every", "50", "--validation-chunks", "2"], 2),
    "validation_steps": (["--validate-every", "50", "--validation-steps", "8"], 8),
    "ema": (["--ema", "0.99"], 0.99),
    "gradient_checkpointing": (["--gradient-checkpointing", "offload"], "offload"),
    "quantize_base": (["--quantize-base", "fp8"], "fp8"),
    "mixed_precision": (["--mixed-precision", "bf16"], "bf16"),
    "compile": (["--compile"], True),
    "export": (["--export", "original"], "original"),
    "tensorboard": (["--no-tensorboard"], False),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "resume": (["--no-resume"], False),
    "overwrite": (["--overwrite"], True),
    "dry_run": (["--dry-run"], True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_its_field(worker: Worker, name: str) -> None:
    words, value = OPTIONS[name]
    assert main([*TRAIN, *words]) == 0
    assert getattr(worker.calls[0], name) == value
    default = getattr(TrainSettings(dataset=Path("videos")), name)
    assert (value == default) is (name == "dataset")


def test_every_field_has_its_option() -> None:
    assert set(OPTIONS) == {item.name for item in fields(TrainSettings)}


def test_options_not_given_keep_the_defaults_of_the_settings(worker: Worker) -> None:
    assert main(TRAIN) == 0
    assert worker.calls == [TrainSettings(dataset=Path("videos"))]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in TrainSettings.saved_names()])
def test_a_saved_training_sets_what_the_option_sets(worker: Worker, name: str) -> None:
    assert main([*TRAIN, *OPTIONS[name][0]]) == 0
    saved = {"settings": worker.calls[0].to_json(), "versions": {"everanimate": "0.1.0"}}
    Path("train.json").write_text(json.dumps(saved))
    assert main(["train-lora", "--config", "train.json"]) == 0
    assert worker.calls[1] == worker.calls[0]


def test_the_command_line_wins_over_the_saved_training(worker: Worker) -> None:
    Path("train.json").write_text('{"dataset": "videos", "steps": 20, "lr": 0.1, "compile": true}')
    assert main(["train-lora", "--config", "train.json", "--steps", "4", "--no-compile"]) == 0
    assert worker.calls == [TrainSettings(dataset=Path("videos"), steps=4, lr=0.1)]


def test_a_file_of_another_command_is_refused(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("anna.json").write_text('{"ref": "anna.png", "seed": 3}')
    assert main(["train-lora", "--config", "anna.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --config anna.json: 'ref' is unknown. Known: accumulate, ")
    assert worker.calls == []


@pytest.mark.usefixtures("worker")
def test_stdout_carries_the_lora_and_stderr_the_progress(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(TRAIN) == 0
    captured = capsys.readouterr()
    assert captured.out == "videos_stage1/lora.safetensors\n"
    assert captured.err == "a note\nstep 1/1: loss 0.2500, 2.0 s/step\n"


@pytest.mark.usefixtures("worker")
def test_json_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == RESULT.to_json()
    assert captured.err == ""


@pytest.mark.usefixtures("worker")
def test_a_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--dry-run", "-q"]) == 0
    assert capsys.readouterr().out == (
        "output: videos_stage1/lora.safetensors\nsteps: 2\nweights: vae 3.5 MiB\n"
    )


@pytest.mark.parametrize("words", [[], ["--json"], ["--dry-run"]])
def test_only_the_main_process_prints(
    worker: Worker, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    worker.result = None
    assert main([*TRAIN, *words]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("words", "error", "exit_code", "last_line"),
    [
        ([], RunError("the loss is no number."), 1, "error: the loss is no number."),
        (
            [],
            KeyboardInterrupt(),
            130,
            "interrupted. Run the same command again to continue.",
        ),
        (
            ["--no-resume"],
            KeyboardInterrupt(),
            130,
            "interrupted. Run the same command without --no-resume to continue.",
        ),
    ],
)
def test_failures_end_with_one_line_and_their_exit_code(
    worker: Worker,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    error: BaseException,
    exit_code: int,
    last_line: str,
) -> None:
    worker.error = error
    assert main([*TRAIN, *words]) == exit_code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == last_line
    assert captured.out == ""
