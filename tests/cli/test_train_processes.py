"""`train-lora` in two processes on the CPU: the same LoRA as in one, and one voice when it fails.

A launcher starts them once for all tests here, see `ranks.py`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import Command
from safetensors.torch import load_file
from studio import Outcome
from trainings import largest_difference, launch, losses, words, write_clips

from everanimate_cli.cli import main

SILENCE = Outcome(0, "", "")
STEPS = ("--steps", "4", "--ema", "0.9")
MIXED = ("--steps", "2", "--dtype", "bfloat16")
LOOK = ("--validate-every", "4", "--validation-chunks", "1", "--validation-steps", "1")
BROKEN = ("--lr", "1e30", "--max-grad-norm", "1e30", "--checkpoint-every", "1")


# Name -> what the two processes run, in this order.
COMMANDS = {
    # Only the main process looks at the clips: where it fails to extract poses, another would try.
    "data parallel": Command(words=words("dp", *STEPS), rank=1, place="train_lora.open_clips"),
    "quantised": Command(words=words("fp8", "--steps", "1", "--quantize-base", "fp8")),
    "sharded": Command(words=words("sharded", *STEPS, "--steps", "2"), sharing="fsdp2"),
    "sharded, going on": Command(words=words("sharded", *STEPS, *LOOK), sharing="fsdp2"),
    "offloaded": Command(words=words("offloaded", *STEPS), sharing="fsdp2 offloading"),
    "sharded, mixed": Command(words=words("mixed", *MIXED), sharing="fsdp2"),
    "sharded, quantised": Command(words=words("x", "--quantize-base", "fp8"), sharing="fsdp2"),
    "wrong size": Command(words=words("x", "--size", "40x40")),
    "other options": Command(words=words("dp", *STEPS, "--warmup", "3")),
    "no number": Command(words=words("broken", *BROKEN)),
    "disk full": Command(
        words=words("full"), rank=0, place="train_lora.save_checkpoint", failure="disk full"
    ),
    "clip gone": Command(
        words=words("gone"),
        rank=1,
        place="training_samples.SampleSource.example",
        failure="clip gone",
    ),
    "cache": Command(words=words("cached", *STEPS, "--latent-cache", "latents")),
}


@dataclass(frozen=True)
class Studio:
    """What the two processes made, and the same in one.

    Attributes:
        folder: Theirs.
        answers: Name of a command -> what each process said.
        alone: Folder of the same samples in one process.
    """

    folder: Path
    answers: dict[str, list[Outcome]]
    alone: Path


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Studio:
    """All commands run."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny").symlink_to(tiny_model)
    write_clips(folder)
    for output, more in (("alone", STEPS), ("alone-mixed", MIXED)):
        command = words(output, *more, "--accumulate", "2", "-q", "--model", str(tiny_model))
        command[1] = str(folder / "clips.csv")
        assert main([*command, "-o", str(folder / output)]) == 0
    answers = launch(folder, list(COMMANDS.values()))
    return Studio(folder, dict(zip(COMMANDS, answers, strict=True)), folder / "alone")


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("data parallel", "dp"),
        ("sharded, going on", "sharded"),
        ("offloaded", "offloaded"),
        ("cache", "cached"),
    ],
)
def test_two_processes_are_one_that_accumulates(studio: Studio, name: str, output: str) -> None:
    """However they share the work, and also when they went on half-way."""
    made = studio.folder / output
    first, second = studio.answers[name]
    assert (first.code, first.out) == (0, f"{output}/lora.safetensors\n"), first.err + second.err
    assert second == SILENCE
    assert json.loads((made / "train.json").read_text())["result"]["processes"] == 2
    # AdamW makes steps of 0.01 of the smallest gradients too, and so something of their rounding.
    assert largest_difference(made / "lora.safetensors", studio.alone / "lora.safetensors") < 1e-4
    # The average and the optimiser's state too, whole.
    last = "checkpoint-000004.safetensors"
    kinds = {key.partition("/")[0] for key in load_file(made / last)}
    assert kinds == {"lora", "ema", "exp_avg", "exp_avg_sq"}
    assert largest_difference(made / last, studio.alone / last) < 1e-4
    torch.testing.assert_close(losses(made), losses(studio.alone), atol=0, rtol=1e-5)


def test_shared_weights_were_trained_and_looked_at(studio: Studio) -> None:
    """What the comparison above rests on."""
    updates = [
        v for k, v in load_file(studio.folder / "sharded/lora.safetensors").items() if "_B" in k
    ]
    assert max(float(value.abs().max()) for value in updates) > 0.005
    going_on = studio.answers["sharded, going on"][0]
    assert "from step 2 to step 4" in going_on.err
    assert "validation after step 4: psnr first" in going_on.err


def test_float32_adapters_sit_in_shared_blocks_of_bfloat16(studio: Studio) -> None:
    first, second = studio.answers["sharded, mixed"]
    assert first.code == 0, first.err
    assert second == SILENCE
    made, alone = studio.folder / "mixed", studio.folder / "alone-mixed"
    state = load_file(made / "checkpoint-000002.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    # Sums in another order, rounded to 8 bits on their way.
    torch.testing.assert_close(losses(made), losses(alone), atol=0, rtol=1e-3)


def test_a_base_in_8_bits_is_not_sent_around(studio: Studio) -> None:
    """No channel but NCCL's newest knows the format, and DDP sent all weights at the start."""
    first, second = studio.answers["quantised"]
    assert (first.code, second) == (0, SILENCE), first.err + second.err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "sharded, quantised",
            2,
            "error: --quantize-base fp8 does not go with FSDP. "
            "Leave it out: FSDP2 and ZeRO-3 split the weights already.",
        ),
        (
            "wrong size",
            2,
            "error: --size 40x40 is not a multiple of 16 on both sides. Give 32x32 or 48x48.",
        ),
        (
            "other options",
            2,
            "error: --output dp has a run folder of another request: --warmup was 0, is 3. "
            "Give the same options to continue it, another --output, or --no-resume to start "
            "again.",
        ),
        (
            "no number",
            1,
            "error: the loss of step 2 is nan with a gradient of nan. "
            "The checkpoint of step 1 is good. Give a smaller --lr and another --output.",
        ),
        (
            "disk full",
            1,
            "error: disk full: [Errno 28] No space left on device. "
            "Free some space, then run the same command again to continue.",
        ),
    ],
)
def test_only_the_main_process_tells_of_a_failure(
    studio: Studio, name: str, code: int, message: str
) -> None:
    """The other one ended in a stack trace, or said the same again."""
    first, second = studio.answers[name]
    assert first.code == code
    assert first.err.splitlines()[-1] == message
    assert first.err.count("error: ") == 1
    assert second == SILENCE


def test_no_process_waits_for_one_that_fails(studio: Studio) -> None:
    first, second = studio.answers["clip gone"]
    assert (second.code, second.err) == (1, "error: the clip is gone.\n")
    assert (first.code, first.out) == (0, "")
    assert "error" not in first.err
