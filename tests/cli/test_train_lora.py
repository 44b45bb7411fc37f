"""`train-lora` end to end on a tiny checkpoint: a LoRA, exact resume, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from media import decode_video, write_media
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from studio import Outcome, picture

from everanimate_cli.cli import main

Train = Callable[..., Outcome]

FRAMES = 30  # a sample of the tiny model needs 22
OPTIONS = ("--rank", "2", "--lr", "0.01", "--checkpoint-every", "2", "--no-tensorboard")


def write_clip(folder: Path, name: str, phase: float) -> list[str]:
    """Video, pose and face of a clip: waves that move."""
    sizes = {"": (48, 64), "_pose": (48, 64), "_face": (32, 32)}
    files = []
    for suffix, size in sizes.items():
        frames = np.stack([picture(*size, phase + 0.2 * i) for i in range(FRAMES)])
        files.append(f"{name}{suffix}.mp4")
        write_media(folder / files[-1], frames, rate=25, options={"crf": "4"})
    return files


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with a text each; no test may change them."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["video,pose,face,prompt"]
    for number, name in enumerate(("one", "two")):
        rows.append(",".join([*write_clip(folder, name, 2.0 * number), f"dancer {name}"]))
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder / "clips.csv"


@pytest.fixture
def train(place: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Runs `everanimate train-lora` on the two clips with the tiny model and further words."""
    assert place.is_dir()

    def run(*words: str, output: str = "out") -> Outcome:
        capsys.readouterr()
        code = main(words_of(dataset, output, *words))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def words_of(dataset: Path, output: str, *words: str) -> list[str]:
    # The last of an option that is given twice counts.
    given = ["--model", "tiny", "--fps", "25", "-o", output, "--steps", "4", *OPTIONS, *words]
    return ["train-lora", str(dataset), *given]


def lora(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "lora.safetensors")


def rows(folder: str | Path) -> list[dict[str, float]]:
    """The log without times."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same(one: str | Path, other: str | Path) -> None:
    """Two trainings that must agree to the last bit."""
    first, second = lora(one), lora(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert rows(one) == rows(other)


def largest_difference(one: str | Path, other: str | Path) -> float:
    first, second = lora(one), lora(other)
    assert first.keys() == second.keys()
    return max(float((value - second[key]).abs().max()) for key, value in first.items())


def size_of_update(folder: str | Path) -> float:
    return max(float(v.abs().max()) for key, v in lora(folder).items() if ".lora_B." in key)


def test_a_lora_comes_out_and_says_what_it_is(train: Train, place: Path) -> None:
    outcome = train()
    assert outcome.code == 0, outcome.err
    assert outcome.out == "out/lora.safetensors\n"
    assert "2 of 2 clips can be used" in outcome.err
    made = {path.name for path in (place / "out").iterdir()}
    assert made == {
        *("lora.safetensors", "train.json", "loss.png", "metrics.jsonl", "run.json", "lock"),
        *("checkpoint-000002.safetensors", "checkpoint-000004.safetensors"),
    }
    with safe_open("out/lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["rank"], metadata["stage"], metadata["step"]) == ("2", "1", "4")
    assert metadata["base"] == "tiny"
    assert json.loads(metadata["settings"])["lr"] == 0.01
    record = json.loads(Path("out/train.json").read_text())
    assert record["settings"]["steps"] == 4
    assert record["result"]["clips"] == 2
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4]
    assert size_of_update("out") > 0.01
    assert Image.open("out/loss.png").size[0] > 500


def test_going_on_gives_what_one_run_gives(train: Train) -> None:
    assert train(output="whole").code == 0
    assert train("--steps", "3", output="parts").code == 0
    assert train(output="parts").code == 0
    assert_same("whole", "parts")


def test_what_is_done_is_not_done_again(train: Train, place: Path) -> None:
    assert train().code == 0
    before = (place / "out" / "lora.safetensors").stat().st_mtime_ns, rows("out")
    outcome = train()
    assert outcome.code == 0
    assert outcome.out == "out/lora.safetensors\n"
    assert rows("out") == before[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_training_goes_on_bit_for_bit(
    train: Train, place: Path, dataset: Path, number: signal.Signals
) -> None:
    options = ("--steps", "16", "--ema", "0.9")
    assert train(*options, output="whole").code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "everanimate_cli", *words_of(dataset, "stopped", *options), "-q"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 120
    while not (place / "stopped" / "checkpoint-000002.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number], err
    assert not (place / "stopped" / "lora.safetensors").exists()
    if number == signal.SIGINT:
        assert b"Run the same command again to continue" in err
    assert train(*options, output="stopped").code == 0
    assert_same("whole", "stopped")


def test_two_processes_are_one_that_accumulates(train: Train, dataset: Path, place: Path) -> None:
    assert train("--accumulate", "2", output="one").code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--master-port", "29617", "-m", "everanimate_cli"]
    made = subprocess.run(
        [*command, *words_of(dataset, "two", "--device", "cpu")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == "two/lora.safetensors\n"
    assert json.loads(Path("two/train.json").read_text())["result"]["processes"] == 2
    assert size_of_update("one") > 0.01
    assert largest_difference("one", "two") < 1e-5
    losses = [[row["loss"] for row in rows(name)] for name in ("one", "two")]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)


def test_a_cache_changes_where_samples_come_from_and_nothing_else(train: Train) -> None:
    cache = ("--latent-cache", "cache", "--cache-samples", "8")
    assert train(*cache, output="cached").code == 0
    assert train(output="plain").code == 0
    assert_same("cached", "plain")
    outcome = train(*cache, "--stage", "2", output="second")
    assert outcome.code == 0
    assert train("--stage", "2", output="second-plain").code == 0
    assert_same("second", "second-plain")


@pytest.mark.parametrize("how", ["on", "offload"])
def test_checkpointing_saves_memory_only(train: Train, how: str) -> None:
    assert train("--gradient-checkpointing", "off", output="off").code == 0
    assert train("--gradient-checkpointing", how, output=how).code == 0
    assert largest_difference("off", how) < 1e-5


def test_a_second_stage_starts_from_the_first(train: Train) -> None:
    assert train(output="first").code == 0
    words = ("--stage", "2", "--init", "first/lora.safetensors", "--steps", "1", "--lr", "1e-9")
    assert train(*words, output="second").code == 0
    assert largest_difference("first", "second") < 1e-6
    record = json.loads(Path("second/train.json").read_text())
    assert record["effective"]["degradation_probability"] == 0.64


def test_another_start_is_never_taken_in_silence(train: Train) -> None:
    assert train(output="first").code == 0
    assert train("--steps", "2", output="second").code == 0
    before = lora("second")
    outcome = train("--init", "first/lora.safetensors", output="second")
    assert outcome.code == 2
    assert "init was not given, is given" in outcome.err
    assert all(torch.equal(value, before[key]) for key, value in lora("second").items())


def test_both_namings_animate_alike(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(output="diffusers").code == 0
    assert train("--export", "original", output="original").code == 0
    assert all(".default." in key for key in lora("original"))
    videos = []
    for name in ("none", "diffusers", "original"):
        file = "none" if name == "none" else f"{name}/lora.safetensors"
        words = ["--seconds", "0.6", "--lora", file, "-o", f"{name}.mp4", "--quiet"]
        assert main(["animate", "anna.png", "dance", "--model", "tiny", *words]) == 0
        videos.append(decode_video(Path(f"{name}.mp4"))[1])
    capsys.readouterr()
    assert (videos[1] == videos[2]).all()
    assert (videos[0] != videos[1]).any()


def test_a_loss_that_is_no_number_stops_the_training(train: Train, place: Path) -> None:
    assert train("--steps", "2").code == 0
    before = lora("out")
    outcome = train("--lr", "1e30", "--max-grad-norm", "1e30", output="broken")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("error: the loss of step ")
    assert "Give a smaller --lr" in outcome.err
    assert not (place / "broken" / "lora.safetensors").exists()
    assert all(torch.equal(value, before[key]) for key, value in lora("out").items())


def test_validation_shows_truth_and_result(train: Train) -> None:
    words = ("--validate-every", "2", "--validation-chunks", "2", "--validation-steps", "1")
    outcome = train(*words)
    assert outcome.code == 0
    assert "validation after step 2: psnr first" in outcome.err
    _, frames = decode_video(Path("out/validation-000004.mp4"))
    assert frames.shape == (9 + 5, 48, 128, 3)
    validations = [row["validation"] for row in rows("out") if "validation" in row]
    assert [sorted(row) for row in validations] == 2 * [
        ["psnr_first", "psnr_last", "seam", "ssim_first", "ssim_last"]
    ]
    # Looking changes nothing of what is learnt.
    assert train(output="blind").code == 0
    assert all(torch.equal(value, lora("blind")[key]) for key, value in lora("out").items())


@pytest.mark.parametrize(
    "words",
    [
        ("--memory", "sink"),
        ("--memory", "pixel"),
        ("--memory", "pixel", "--carry-frames", "5"),
        ("--stage", "2"),
        ("--stage", "2", "--correction", "exact"),
        ("--stage", "2", "--correction", "constant"),
        ("--stage", "2", "--degradation-min-sigma", "0"),
        ("--error-recycling", "1"),
        ("--memory-augmentation", "1"),
        ("--first-chunk-probability", "1"),
        ("--reference-anchor-probability", "1"),
        ("--pose-drop", "1"),
        ("--batch-size", "2"),
        ("--rank", "3"),
        ("--lora-alpha", "1"),
        ("--warmup", "3"),
        ("--weight-decay", "1"),
        ("--max-grad-norm", "1e-6"),
        ("--seed", "1"),
        ("--shift", "1"),
        ("--identity-slots", "2"),
        ("--frames-per-chunk", "5"),
        ("--size", "32x48"),
        ("--fps", "24"),
        ("--ema", "0.5"),
        ("--dtype", "bfloat16"),
        ("--mixed-precision", "bf16"),
        ("--dtype", "bfloat16", "--mixed-precision", "no"),
        ("--quantize-base", "fp8"),
    ],
)
def test_every_option_has_an_effect(
    train: Train, words: tuple[str, ...], plain: dict[str, torch.Tensor]
) -> None:
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    made = lora("out")
    assert all(torch.isfinite(value).all() for value in made.values())
    assert any(
        plain[key].shape != value.shape or not torch.equal(plain[key].float(), value.float())
        for key, value in made.items()
    )


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path, tiny_model: Path
) -> dict[str, torch.Tensor]:
    """What the default options give."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    words = words_of(dataset, str(folder), "--quiet", "--model", str(tiny_model))
    assert main(words) == 0
    return lora(folder)


def test_the_plan(train: Train, place: Path) -> None:
    outcome = train("--dry-run", "--json", "--batch-size", "3", "--accumulate", "2")
    assert outcome.code == 0
    plan = json.loads(outcome.out)
    assert plan["samples_per_step"] == 6
    assert plan["clips"] == 2
    assert plan["estimated_memory_mib"] > 0
    assert not (place / "out").exists()
