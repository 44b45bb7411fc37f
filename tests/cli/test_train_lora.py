"""`train-lora` end to end on a tiny checkpoint: a LoRA, exact resume, what goes wrong."""

import errno
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dances import group_frames, write_dance_video, write_group_video
from kill_resume import start_program
from media import decode_video, write_media
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from studio import Outcome, Program, picture

from everanimate_cli import offloading, train_lora
from everanimate_cli.cli import main
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.placement import released_sizes
from everanimate_cli.runs import TrainFolder
from everanimate_cli.training_validation import Validation

Train = Callable[..., Outcome]
Reference = Callable[..., Path]

FRAMES = 30  # a sample of the tiny model needs 22
OPTIONS = ("--rank", "2", "--lr", "0.01", "--checkpoint-every", "2", "--no-tensorboard")
ONE_STEP = ("--steps", "1")


def write_clip(folder: Path, name: str, phase: float, num_frames: int = FRAMES) -> list[str]:
    """Video, pose and face of a clip: waves that move."""
    sizes = {"": (48, 64), "_pose": (48, 64), "_face": (32, 32)}
    files = []
    for suffix, size in sizes.items():
        frames = np.stack([picture(*size, phase + 0.2 * i) for i in range(num_frames)])
        files.append(f"{name}{suffix}.mp4")
        write_media(folder / files[-1], frames, rate=25, options={"crf": "4"})
    return files


def write_manifest(path: Path, *rows: list[str]) -> Path:
    path.write_text("\n".join(map(",".join, (["video", "pose", "face", "prompt"], *rows))) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training collects garbage at its end: not among all that pytest holds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, one with a text of its own; no test may change them."""
    folder = tmp_path_factory.mktemp("data")
    one, two = write_clip(folder, "one", 0.0), write_clip(folder, "two", 2.0)
    return write_manifest(folder / "clips.csv", [*one, "dancer one"], [*two, ""])


@pytest.fixture
def train(place: Path, dataset: Path, program: Program) -> Train:
    """Runs `everanimate train-lora` on the two clips with the tiny model and further words."""
    assert place.is_dir()

    def run(*words: str, output: str = "out", data: Path = dataset) -> Outcome:
        return program(*words_of(data, output, *words))

    return run


def words_of(dataset: Path, output: str, *words: str) -> list[str]:
    # The last of an option that is given twice counts.
    given = ["--model", "tiny", "--fps", "25", "-o", output, "--steps", "4", *OPTIONS, *words]
    return ["train-lora", str(dataset), *given]


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path, tiny_model: Path
) -> Reference:
    """Folder of a training with these words, made once; no test may change it."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*words: str) -> Path:
        if words not in made:
            folder = tmp_path_factory.mktemp("reference") / "out"
            assert (
                main(words_of(dataset, str(folder), "-q", "--model", str(tiny_model), *words)) == 0
            )
            made[words] = folder
        return made[words]

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Words for a latent cache that many trainings share."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    return ("--latent-cache", str(folder), "--cache-samples", "4")


def lora(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "lora.safetensors")


def rows(folder: str | Path) -> list[dict[str, float]]:
    """The log without times."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def checkpoints(folder: str) -> list[int]:
    return TrainFolder(Path(folder)).checkpoints()


def last_line(outcome: Outcome) -> str:
    return outcome.err.splitlines()[-1]


def same_lora(one: str | Path, other: str | Path) -> bool:
    first, second = lora(one), lora(other)
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


def assert_same(one: str | Path, other: str | Path) -> None:
    """Two trainings that must agree to the last bit."""
    assert same_lora(one, other)
    assert rows(one) == rows(other)


def largest_difference(one: str | Path, other: str | Path) -> float:
    first, second = lora(one), lora(other)
    assert first.keys() == second.keys()
    return max(float((value - second[key]).abs().max()) for key, value in first.items())


def size_of_update(folder: str | Path) -> float:
    return max(float(v.abs().max()) for key, v in lora(folder).items() if ".lora_B." in key)


# --- what comes out -------------------------------------------------------------------------------


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
    # What is done is not done again.
    before = (rows("out"), lora("out"))
    again = train()
    assert (again.code, again.out) == (0, "out/lora.safetensors\n")
    assert "step 4/4" not in again.err
    assert rows("out") == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in lora("out").items())


def test_both_namings_animate_alike(
    train: Train, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--export", "original", output="original").code == 0
    assert all(".default." in key for key in lora("original"))
    videos = []
    for name in ("none", str(reference()), "original"):
        file = "none" if name == "none" else f"{name}/lora.safetensors"
        words = ["--seconds", "0.6", "--lora", file, "-o", f"{len(videos)}.mp4", "--quiet"]
        assert main(["animate", "anna.png", "dance", "--model", "tiny", *words]) == 0
        videos.append(decode_video(Path(f"{len(videos)}.mp4"))[1])
    capsys.readouterr()
    assert (videos[1] == videos[2]).all()
    assert (videos[0] != videos[1]).any()


def test_a_second_stage_starts_from_the_first(train: Train, reference: Reference) -> None:
    first = str(reference() / "lora.safetensors")
    words = ("--stage", "2", "--init", first, "--steps", "1", "--lr", "1e-9")
    assert train(*words, output="second").code == 0
    assert largest_difference(reference(), "second") < 1e-6
    record = json.loads(Path("second/train.json").read_text())
    assert record["effective"]["degradation_probability"] == 0.64


def test_validation_shows_truth_and_result(
    train: Train, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    precise: list[bool] = []
    decode = AnimatePipeline.decode

    def spy(self: AnimatePipeline, latents: torch.Tensor) -> torch.Tensor:
        precise.append(not torch.is_autocast_enabled("cpu"))
        return decode(self, latents)

    monkeypatch.setattr(AnimatePipeline, "decode", spy)
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
    assert same_lora("out", reference())
    # The VAE computes in float32 whatever the network does, as in `animate`.
    assert (
        train(*words, *ONE_STEP, "--validate-every", "1", "--dtype", "bfloat16", output="b").code
        == 0
    )
    assert precise == 6 * [True]


def test_the_plan(train: Train, place: Path) -> None:
    outcome = train("--dry-run", "--json", "--batch-size", "3", "--accumulate", "2")
    assert outcome.code == 0
    plan = json.loads(outcome.out)
    assert plan["samples_per_step"] == 6
    assert plan["clips"] == 2
    assert plan["estimated_memory_mib"] > 0
    assert not (place / "out").exists()


def test_raw_videos_get_their_poses_first(
    train: Train, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both stages, each by one command; what cannot be extracted is told, and left out."""
    videos = tmp_path_factory.mktemp("raw")
    write_dance_video(videos / "dance.mp4", num_frames=16, height=128, width=128)
    empty = group_frames([], 16, height=128, width=128)
    write_group_video(videos / "nobody.mp4", empty)
    words = ("--fps", "12.5", "--frames-per-chunk", "5", "--pose-model", "toy", "--steps", "2")
    kept = ("--pose-folder", "poses", "--latent-cache", "cache", "--cache-samples", "2")
    outcome = train(*words, *kept, output="first", data=videos)
    assert outcome.code == 0, outcome.err
    assert "nobody.mp4 is not used: " in outcome.err
    assert "1 of 2 clips can be used, 1 rejected" in outcome.err
    more = ("--stage", "2", "--init", "first/lora.safetensors")
    outcome = train(*words, *kept, *more, output="second", data=videos)
    assert outcome.code == 0, outcome.err
    assert "the poses of 1 raw videos are there already" in outcome.err
    assert largest_difference("first", "second") > 1e-4
    # A plan extracts nothing, and does not take the cache of all clips for one of others.
    (place / "poses").rename(place / "elsewhere")
    plan = train(*words, *kept, "--dry-run", "--json", output="third", data=videos)
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["clips"] == 2


# --- going on -------------------------------------------------------------------------------------


def test_going_on_gives_what_one_run_gives(train: Train, reference: Reference) -> None:
    assert train("--steps", "3").code == 0
    # The same request in other words, and options that shape no weight.
    words = ("--dtype", "float32", "--keep-checkpoints", "1", "--checkpoint-every", "1")
    assert train(*words).code == 0
    assert_same("out", reference())
    assert checkpoints("out") == [4]


def test_a_stopped_training_goes_on_bit_for_bit(
    train: Train, place: Path, dataset: Path, reference: Reference
) -> None:
    """After Ctrl-C, and after a kill."""
    options = ("--steps", "8", "--ema", "0.9")
    for number, after_step, code in ((signal.SIGINT, 2, 130), (signal.SIGKILL, 6, -9)):
        process = start_program(words_of(dataset, "out", *options), place)
        assert process.pid is not None
        deadline_s = time.monotonic() + 120
        while not (place / "out" / f"checkpoint-00000{after_step}.safetensors").exists():
            assert process.is_alive(), Path("log").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        os.kill(process.pid, number)
        process.join(60)
        log = Path("log").read_text()
        assert process.exitcode == code, log
        assert not (place / "out" / "lora.safetensors").exists()
        if number == signal.SIGINT:
            assert log.endswith("interrupted. Run the same command again to continue.\n")
    assert train(*options).code == 0
    assert_same("out", reference(*options))


def test_another_start_is_never_taken_in_silence(train: Train, reference: Reference) -> None:
    assert train("--steps", "2").code == 0
    before = lora("out")
    outcome = train("--init", str(reference() / "lora.safetensors"))
    assert outcome.code == 2
    assert "init was not given, is given" in outcome.err
    assert all(torch.equal(value, before[key]) for key, value in lora("out").items())


def test_fewer_steps_than_are_made_are_refused(train: Train) -> None:
    """The LoRA of more steps was given out for that of fewer."""
    assert train("--steps", "2").code == 0
    outcome = train("--steps", "1")
    assert outcome.code == 2
    assert last_line(outcome) == (
        "error: --steps 1 is less than the 2 that --output out has made. "
        "Give --steps 2 or more, or another --output."
    )
    assert checkpoints("out") == [2]


def test_a_lora_without_its_training_is_never_replaced_in_silence(
    train: Train, place: Path
) -> None:
    """A folder with a LoRA, but without run.json, was emptied for the new training."""
    assert train(*ONE_STEP).code == 0
    (place / "out" / "run.json").unlink()
    before = lora("out")
    outcome = train("--steps", "2")
    assert outcome.code == 2
    assert outcome.err == (
        "error: --output out exists. Add --overwrite to replace it, or give another name.\n"
    )
    assert all(torch.equal(value, before[key]) for key, value in lora("out").items())
    assert train("--steps", "2", "--overwrite").code == 0
    assert any(not torch.equal(value, before[key]) for key, value in lora("out").items())


def test_a_damaged_checkpoint_is_named_and_can_be_left_out(
    train: Train, reference: Reference
) -> None:
    assert train().code == 0
    path = Path("out/checkpoint-000004.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    outcome = train()
    assert outcome.code == 1
    assert last_line(outcome).startswith(f"error: {path} is damaged (")
    assert last_line(outcome).endswith("Delete it to go on from the checkpoint before it.")
    path.unlink()
    assert train().code == 0
    assert_same("out", reference())


def test_a_lost_log_is_no_obstacle(train: Train) -> None:
    assert train(*ONE_STEP).code == 0
    before = lora("out")
    Path("out/metrics.jsonl").unlink()
    assert train(*ONE_STEP).code == 0
    assert all(torch.equal(value, before[key]) for key, value in lora("out").items())


@pytest.mark.parametrize("place_of_failure", ["save_checkpoint", "MetricsLog.write", "save_lora"])
def test_a_full_disk_stops_the_training_until_there_is_room(
    train: Train, reference: Reference, monkeypatch: pytest.MonkeyPatch, place_of_failure: str
) -> None:
    module: Any = train_lora
    owner, _, name = place_of_failure.rpartition(".")
    target = getattr(module, owner) if owner else module
    works = getattr(target, name)
    calls = []

    def fill(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if name == "save_lora" or len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return works(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fill)
        outcome = train()
    assert outcome.code == 1
    assert last_line(outcome) == (
        "error: disk full: [Errno 28] No space left on device. "
        "Free some space, then run the same command again to continue."
    )
    assert not Path("out/lora.safetensors").exists()
    assert train().code == 0
    assert_same("out", reference())


def test_a_validation_that_was_cut_short_is_made_up_for(
    train: Train, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written first, so that the next start took the validation for done."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("--validate-every", "4", "--validation-chunks", "1", "--validation-steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "run", interrupt)
        assert train(*words).code == 130
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4]
    assert train(*words).code == 0
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4, 4]
    assert Path("out/validation-000004.mp4").exists()
    assert same_lora("out", reference())
    assert train(*words).code == 0
    assert len(rows("out")) == 5


def test_two_trainings_do_not_share_a_folder(train: Train) -> None:
    folder = TrainFolder(Path("out"))
    with folder.hold():
        outcome = train(*ONE_STEP)
    assert outcome.code == 2
    assert last_line(outcome) == (
        "error: --output out is being made by another process. "
        "Wait for it, or give another --output."
    )


# --- what changes nothing -------------------------------------------------------------------------


def test_a_cache_changes_where_samples_come_from_and_nothing_else(
    train: Train, reference: Reference
) -> None:
    cache = ("--latent-cache", "cache", "--cache-samples", "4")
    assert train(*cache, output="cached").code == 0
    assert_same("cached", reference())
    assert train(*cache, "--stage", "2", output="second").code == 0
    assert_same("second", reference("--stage", "2"))


@pytest.mark.parametrize("how", ["off", "offload"])
def test_checkpointing_saves_memory_only(train: Train, reference: Reference, how: str) -> None:
    assert train("--gradient-checkpointing", how).code == 0
    assert largest_difference("out", reference()) < 1e-5


def test_a_variable_of_the_launcher_does_not_change_the_batch(
    train: Train, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop ended in an exception, for accelerate believed the variable, not the option."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert train().code == 0
    assert_same("out", reference())


def test_compiling_is_asked_for_once_per_block(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def note(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    assert train("--compile", *ONE_STEP).code == 0
    assert compiled == 4 * ["WanTransformerBlock"]


# --- a base in fewer bits ------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_missing_package_is_told_before_anything_is_written(
    train: Train,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    package: str,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr(offloading, "find_spec", lambda _name: None)
    outcome = train("--quantize-base", how, *more)
    assert (outcome.code, outcome.out) == (2, "")
    assert last_line(outcome) == (
        f"error: --quantize-base {how} needs the package {package}, which is not installed. "
        f"Install it with 'pip install {package}', or give --quantize-base fp8."
    )
    assert not (place / "out").exists()


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("source", ["encoders", "cache"])
def test_the_base_is_stored_as_in_animate_before_it_gets_adapters(
    train: Train,
    reference: Reference,
    cache: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    source: str,
) -> None:
    """A stand-in for both packages, which rounds weights to steps of 1/8."""
    packed: list[torch.nn.Linear] = []

    def store(block: torch.nn.Module, precision: str, *_more: Any) -> None:
        if precision == "full":  # the training to compare with
            return
        assert precision == {"int8": "torchao-int8", "nf4": "nf4"}[how]
        for name, layer in block.named_modules():
            assert ".lora_" not in name
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data.mul_(8).round_().div_(8)
                layer.compute_dtype = torch.float32
                packed.append(layer)

    monkeypatch.setattr(offloading, "store_block", store)
    monkeypatch.setattr(offloading, "find_spec", lambda _name: object())
    monkeypatch.setattr(train_lora, "version", lambda package: f"{package} 1.0")
    words = (*ONE_STEP, "--mixed-precision", "bf16", *(cache if source == "cache" else ()))
    outcome = train(*words, "--quantize-base", how)
    assert outcome.code == 0, outcome.err
    assert len(packed) == len({id(layer) for layer in packed}) > 0
    assert not any(layer.weight.requires_grad for layer in packed)
    # bitsandbytes' layers take no notice of autocast.
    assert {layer.compute_dtype for layer in packed} == {torch.bfloat16}
    assert_other("out", reference(*words))
    request = json.loads(Path("out/train.json").read_text())["request"]
    package = {"int8": "torchao", "nf4": "bitsandbytes"}[how]
    assert request[f"{package} version"] == f"{package} 1.0"


def test_the_plan_counts_packed_weights_and_what_a_step_unpacks(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sizes of the released model.

    Layers for text and picture have inputs without gradients, and leave nothing to a backward pass.
    """
    monkeypatch.setattr(train_lora, "read_sizes", lambda _source: released_sizes())
    monkeypatch.setattr(offloading, "find_spec", lambda _name: object())

    def plan(*words: str) -> tuple[float, int]:
        made = json.loads(train("--dry-run", "--json", "--dtype", "bfloat16", *words).out)
        return made["weights_mib"]["transformer"], made["estimated_memory_mib"]

    weights, total = plan()
    whole = weights - plan("--quantize-base", "int8")[0]
    whole *= 2  # bytes of bfloat16 for one of int8
    layer = 5120 * 13824 * 2 / 2**20
    block = 2 * (6 * 5120**2 + 2 * 5120 * 13824) / 2**20
    for how, share, unpacked in (
        ("fp8", 1 / 2, block),
        ("int8", 1 / 2, block),
        ("nf4", 4.5 / 16, layer),
    ):
        stored, needed = plan("--quantize-base", how)
        assert weights - stored == pytest.approx((1 - share) * whole, rel=1e-3)
        assert total - needed == pytest.approx(weights - stored - unpacked, abs=2)
        kept = ("--gradient-checkpointing", "off")
        saved = plan(*kept)[1] - plan("--quantize-base", how, *kept)[1]
        all_unpacked = layer if how == "nf4" else 40 * block
        assert saved == pytest.approx(weights - stored - all_unpacked, rel=1e-3)
    # float32 weights that compute in bfloat16 are unpacked to that.
    floats = ("--dtype", "float32", "--mixed-precision", "bf16", "--quantize-base", "nf4")
    plain = ("--dtype", "float32", "--mixed-precision", "bf16")
    (before, all_before), (after, all_after) = plan(*plain), plan(*floats)
    assert all_before - all_after == pytest.approx(before - after - layer, abs=2)


# --- what changes something -----------------------------------------------------------------------

STAGE_2 = ("--stage", "2", "--degradation-probability", "1")
PIXEL = ("--memory", "pixel", "--first-chunk-probability", "0")
DRAWN = ("--first-chunk-probability", "0", "--reference-anchor-probability", "0")


# Words, and those of the training that they are compared with.
@pytest.mark.parametrize(
    ("words", "others"),
    [
        (("--memory", "sink"), ("--first-chunk-probability", "0")),
        (PIXEL, ("--first-chunk-probability", "0")),
        ((*PIXEL, "--carry-frames", "5"), PIXEL),
        (("--stage", "2", "--accumulate", "4"), ("--accumulate", "4")),
        (STAGE_2, ("--stage", "2", "--degradation-probability", "0")),
        ((*STAGE_2, "--correction", "exact"), STAGE_2),
        ((*STAGE_2, "--correction", "constant"), STAGE_2),
        ((*STAGE_2, "--degradation-min-sigma", "1"), STAGE_2),
        ((*DRAWN, "--error-recycling", "1"), DRAWN),
        ((*DRAWN, "--memory-augmentation", "1"), DRAWN),
        (("--first-chunk-probability", "1"), ("--first-chunk-probability", "0")),
        ((*DRAWN, "--reference-anchor-probability", "1"), DRAWN),
        ((*DRAWN, "--identity-slots", "2"), DRAWN),
        (("--pose-drop", "1"), ("--pose-drop", "0")),
        (("--prompt", "a waltz", "--batch-size", "2"), ("--batch-size", "2")),
        (("--batch-size", "2"), ()),
        (("--accumulate", "2"), ()),
        (("--rank", "3"), ()),
        (("--lora-alpha", "1"), ()),
        (("--warmup", "3"), ()),
        (("--weight-decay", "1"), ()),
        (("--max-grad-norm", "1e-6"), ()),
        (("--shift", "1"), ()),
        (("--ema", "0.5"), ()),
        (("--mixed-precision", "bf16"), ()),
        (("--quantize-base", "fp8"), ()),
    ],
)
def test_every_option_of_the_steps_has_an_effect(
    train: Train,
    reference: Reference,
    cache: tuple[str, ...],
    words: tuple[str, ...],
    others: tuple[str, ...],
) -> None:
    outcome = train(*ONE_STEP, *cache, *words)
    assert outcome.code == 0, outcome.err
    assert_other("out", reference(*ONE_STEP, *cache, *others))


@pytest.mark.parametrize(
    ("words", "others"),
    [
        (("--seed", "1"), ()),
        (("--frames-per-chunk", "5"), ()),
        (("--size", "32x48"), ()),
        (("--size", "32x48", "--fit", "cover"), ("--size", "32x48")),
        (("--fps", "24"), ()),
        (("--dtype", "bfloat16"), ()),
        (("--dtype", "bfloat16", "--mixed-precision", "no"), ("--dtype", "bfloat16")),
    ],
)
def test_every_option_of_the_samples_has_an_effect(
    train: Train, reference: Reference, words: tuple[str, ...], others: tuple[str, ...]
) -> None:
    outcome = train(*ONE_STEP, *words)
    assert outcome.code == 0, outcome.err
    assert_other("out", reference(*ONE_STEP, *others))


def assert_other(one: str | Path, other: str | Path) -> None:
    """Two trainings that must not agree."""
    first, second = lora(one), lora(other)
    assert all(torch.isfinite(value).all() for value in first.values())
    assert any(
        second[key].shape != value.shape or not torch.equal(second[key].float(), value.float())
        for key, value in first.items()
    )


def test_tensorboard_logs_are_written_and_deleted_with_the_training(train: Train) -> None:
    def logs() -> list[Path]:
        return list(Path("out/tensorboard").glob("events.out.tfevents.*"))

    assert train("--tensorboard", *ONE_STEP).code == 0
    assert len(logs()) == 1
    assert train("--no-resume", "--overwrite", *ONE_STEP).code == 0
    assert logs() == []


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_training(train: Train, place: Path) -> None:
    outcome = train("--lr", "1e30", "--max-grad-norm", "1e30", "--checkpoint-every", "1")
    assert outcome.code == 1
    message = last_line(outcome)
    assert message.startswith("error: the loss of step 2 is ")
    assert message.endswith(
        "The checkpoint of step 1 is good. Give a smaller --lr and another --output."
    )
    assert not (place / "out" / "lora.safetensors").exists()
    assert checkpoints("out") == [1]


@pytest.mark.parametrize(
    ("error", "words", "ways"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            ("--batch-size", "2"),
            "--gradient-checkpointing offload, or --latent-cache DIR, which keeps the encoders out "
            "of memory, or a smaller --batch-size with more --accumulate, or a --size below 64x48 "
            "or fewer --frames-per-chunk",
        ),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
            ("--gradient-checkpointing", "off", "--latent-cache", "cache", "--cache-samples", "1"),
            "--gradient-checkpointing on, or a --size below 64x48 or fewer --frames-per-chunk",
        ),
    ],
)
def test_out_of_memory_says_what_lowers_it(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    words: tuple[str, ...],
    ways: str,
) -> None:
    def run_out(*_: object) -> None:
        raise error

    monkeypatch.setattr(train_lora, "velocity_loss", run_out)
    outcome = train(*words)
    assert outcome.code == 1
    plan = json.loads(train("--dry-run", "--json", *words).out)
    assert last_line(outcome) == (
        f"error: out of memory in training, which takes about {plan['estimated_memory_mib']} MiB. "
        f"Give {ways}; --dry-run tells the estimate."
    )


def test_other_errors_of_the_network_are_no_lack_of_memory(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    with monkeypatch.context() as patch:
        patch.setattr(train_lora, "velocity_loss", break_down)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            train()
    # Nothing is left of it in this process that another precision would meet.
    assert train("--dtype", "bfloat16", *ONE_STEP, output="next").code == 0


def test_a_size_that_the_network_cannot_take(train: Train, place: Path) -> None:
    outcome = train("--size", "40x40")
    assert outcome.code == 2
    assert outcome.err == (
        "error: --size 40x40 is not a multiple of 16 on both sides. Give 32x32 or 48x48.\n"
    )
    assert not (place / "out").exists()


def test_too_short_videos_tell_the_frames_that_are_needed(
    train: Train, place: Path, tmp_path: Path
) -> None:
    data = write_manifest(tmp_path / "short.csv", [*write_clip(tmp_path, "short", 0.0, 20), ""])
    outcome = train(data=data)
    assert outcome.code == 2
    assert (
        "20 frames (0.80 s at 25 fps), and 22 frames (0.88 s at 25 fps) are needed" in outcome.err
    )
    assert last_line(outcome).startswith(f"error: DATASET {data}: none of 1 clips can be used.")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda key, value: (key.replace("blocks.", "layers."), value),
            "80 of its 80 keys have no place in the network (first: ",
        ),
        (
            lambda key, value: (key, value[..., :-1].clone() if ".lora_A." in key else value),
            "40 of its 40 layers have another shape than the network (first: ",
        ),
    ],
)
def test_a_lora_of_another_base_is_refused_before_anything_is_written(
    train: Train, place: Path, reference: Reference, change: Any, message: str
) -> None:
    tensors = dict(change(key, value) for key, value in lora(reference()).items())
    save_file(tensors, "other.safetensors")
    outcome = train("--init", "other.safetensors")
    assert outcome.code == 2
    assert last_line(outcome).startswith(f"error: LoRA other.safetensors: {message}")
    assert not (place / "out").exists()


def test_a_lora_of_the_hub_is_checked_as_a_file_is(
    train: Train, place: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks were looked at after the networks were loaded, and several led to bad advice."""
    tensors = lora(reference())
    half = [key for key in tensors if key.startswith(("blocks.0.", "blocks.1."))]
    for key in half:
        tensors[key] = (tensors[key][:1] if ".lora_A." in key else tensors[key][:, :1]).clone()
    save_file(tensors, "mixed.safetensors")
    monkeypatch.setattr(train_lora.hub, "locate_lora", lambda *_, **__: Path("mixed.safetensors"))
    outcome = train("--init", "owner/name/mixed.safetensors")
    assert outcome.code == 2
    assert outcome.err == (
        "error: --init owner/name/mixed.safetensors has several ranks (1, 2). "
        "Give a LoRA of one rank.\n"
    )
    assert not (place / "out").exists()
