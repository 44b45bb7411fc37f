"""`train-lora` under DeepSpeed's ZeRO, in two processes on the CPU.

Needs the package deepspeed (`pip install "everanimate[deepspeed]"`), which a plain run of the tests
does not: run with `-m slow`. accelerate runs DeepSpeed on GPUs only, so that it is let believe in
them, see `ranks`; engine, optimiser and communication are DeepSpeed's own.
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

pytestmark = pytest.mark.slow

SILENCE = Outcome(0, "", "")
STEPS = ("--steps", "4", "--ema", "0.9")
ODD = ("--rank", "5")  # matrices that two processes cannot share out evenly
LOOK = ("--validate-every", "4", "--validation-chunks", "1", "--validation-steps", "1")
MIXED = ("--steps", "2", "--dtype", "bfloat16")
TWICE = ("--steps", "2", "--accumulate", "2")
BROKEN = ("--lr", "1e30", "--max-grad-norm", "1e30", "--checkpoint-every", "1")
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
NVME = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
AUTO = {"bf16": {"enabled": "auto"}, "zero_optimization": {"reduce_bucket_size": "auto"}}

# Name -> what the two processes run, in this order.
COMMANDS = {
    "zero1": Command(words=words("zero1", *STEPS), sharing="zero1", configuration=AUTO),
    "zero2, half": Command(words=words("zero2", *STEPS, "--steps", "2"), sharing="zero2"),
    "zero2": Command(words=words("zero2", *STEPS, *LOOK), sharing="zero2"),
    "zero3, half": Command(words=words("zero3", *STEPS, "--steps", "2"), sharing="zero3"),
    "zero3": Command(words=words("zero3", *STEPS, *LOOK), sharing="zero3"),
    "ddp, half": Command(words=words("moved", *STEPS, "--steps", "2")),
    "moved": Command(words=words("moved", *STEPS), sharing="zero2"),
    "odd, half": Command(words=words("odd", *STEPS, *ODD, "--steps", "2"), sharing="zero3"),
    "odd": Command(words=words("odd", *STEPS, *ODD), sharing="zero3"),
    "offloaded": Command(words=words("off", *STEPS), sharing="zero2", configuration=OFFLOAD),
    "accumulating": Command(words=words("twice", *TWICE), sharing="zero2"),
    "accumulating alone": Command(words=words("twice-ddp", *TWICE)),
    "mixed": Command(words=words("mixed", *MIXED), sharing="zero2"),
    "mixed, zero3": Command(words=words("mixed3", *MIXED), sharing="zero3"),
    "quantised": Command(words=words("x", "--quantize-base", "fp8"), sharing="zero2"),
    "no number": Command(words=words("broken", *BROKEN), sharing="zero2"),
    "no number, zero3": Command(words=words("broken3", *BROKEN), sharing="zero3"),
    "zero0": Command(words=words("x"), sharing="zero0"),
    "clipping": Command(words=words("x"), sharing="zero2", configuration={"gradient_clipping": 2}),
    "nvme": Command(words=words("x"), sharing="zero2", configuration=NVME),
    "unknown": Command(
        words=words("x"),
        sharing="zero2",
        configuration={"zero_optimization": {"reduce_bucket_size": "many"}},
    ),
}


@dataclass(frozen=True)
class Studio:
    """What the two processes made, and the same in one."""

    folder: Path
    answers: dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Studio:
    """All commands run."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "tiny").symlink_to(tiny_model)
    write_clips(folder)
    for output, more in (("alone", STEPS), ("odd-alone", (*STEPS, *ODD)), ("mixed-alone", MIXED)):
        command = words(output, *more, "--accumulate", "2", "-q", "--model", str(tiny_model))
        command[1] = str(folder / "clips.csv")
        assert main([*command, "-o", str(folder / output)]) == 0
    answers = launch(folder, list(COMMANDS.values()))
    return Studio(folder, dict(zip(COMMANDS, answers, strict=True)))


@pytest.mark.parametrize(
    ("name", "output", "alone"),
    [
        ("zero1", "zero1", "alone"),
        ("zero2", "zero2", "alone"),
        ("zero3", "zero3", "alone"),
        ("moved", "moved", "alone"),
        ("odd", "odd", "odd-alone"),
        ("offloaded", "off", "alone"),
    ],
)
def test_zero_makes_the_lora_of_one_process(
    studio: Studio, name: str, output: str, alone: str
) -> None:
    """Also after a break half-way, of DDP too; average and moments come back whole."""
    made, wanted = studio.folder / output, studio.folder / alone
    first, second = studio.answers[name]
    assert (first.code, first.out) == (0, f"{output}/lora.safetensors\n"), first.err + second.err
    assert second == SILENCE
    assert largest_difference(made / "lora.safetensors", wanted / "lora.safetensors") < 1e-4
    last = "checkpoint-000004.safetensors"
    assert {key.partition("/")[0] for key in load_file(made / last)} == {
        *("lora", "ema", "exp_avg", "exp_avg_sq")
    }
    assert largest_difference(made / last, wanted / last) < 1e-4
    torch.testing.assert_close(losses(made), losses(wanted), atol=0, rtol=1e-5)


@pytest.mark.parametrize("output", ["zero2", "moved", "off"])
def test_going_on_gives_the_bits_of_one_run(studio: Studio, output: str) -> None:
    """ZeRO-1, which was not interrupted, adds up the same two gradients."""
    for name in ("lora.safetensors", "checkpoint-000004.safetensors"):
        whole, continued = studio.folder / "zero1" / name, studio.folder / output / name
        assert largest_difference(whole, continued) == 0


def test_accumulation_is_that_of_ddp(studio: Studio) -> None:
    files = [studio.folder / name / "lora.safetensors" for name in ("twice", "twice-ddp")]
    assert largest_difference(*files) < 1e-4


@pytest.mark.parametrize(("name", "output"), [("mixed", "mixed"), ("mixed, zero3", "mixed3")])
def test_float32_adapters_sit_in_a_network_of_bfloat16(
    studio: Studio, name: str, output: str
) -> None:
    """DeepSpeed's own bf16 would round them and what sampling keeps in float32."""
    first, second = studio.answers[name]
    assert (first.code, second) == (0, SILENCE), first.err + second.err
    state = load_file(studio.folder / output / "checkpoint-000002.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    wanted = losses(studio.folder / "mixed-alone")
    torch.testing.assert_close(losses(studio.folder / output), wanted, atol=0, rtol=1e-3)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_network_that_is_shared_out_renders_validations(studio: Studio, name: str) -> None:
    first, _ = studio.answers[name]
    assert "from step 2 to step 4" in first.err
    assert "validation after step 4: psnr first" in first.err
    rows = map(json.loads, (studio.folder / name / "metrics.jsonl").read_text().splitlines())
    found = [row["validation"]["psnr_first"] for row in rows if "validation" in row]
    assert len(found) == 1
    other = {"zero2": "zero3", "zero3": "zero2"}[name]
    rows = map(json.loads, (studio.folder / other / "metrics.jsonl").read_text().splitlines())
    assert found == pytest.approx(
        [row["validation"]["psnr_first"] for row in rows if "validation" in row], abs=0.01
    )


NO_NUMBER = "error: the loss of step 2 is nan with a gradient of inf. The checkpoint of step 1 is "


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "quantised",
            2,
            "error: --quantize-base fp8 does not go with DeepSpeed. "
            "Leave it out: FSDP2 and ZeRO-3 split the weights already.",
        ),
        ("no number", 1, NO_NUMBER),
        ("no number, zero3", 1, NO_NUMBER),
        (
            "zero0",
            2,
            "error: DeepSpeed without ZeRO shares out nothing. Launch with --zero_stage 1, 2 or 3, "
            "or without --use_deepspeed.",
        ),
        (
            "clipping",
            2,
            "error: DeepSpeed's gradient_clipping is 2, --max-grad-norm is 1.0. Give one value to "
            "both, or leave DeepSpeed's out.",
        ),
        ("nvme", 2, "error: DeepSpeed's offload_optimizer to NVMe keeps state where no"),
        ("unknown", 2, "error: DeepSpeed cannot start: 1 validation error for"),
    ],
)
def test_only_the_main_process_tells_of_a_failure(
    studio: Studio, name: str, code: int, message: str
) -> None:
    first, second = studio.answers[name]
    assert first.code == code, first.err
    assert first.err.splitlines()[-1].startswith(message)
    assert first.err.count("error: ") == 1
    assert first.out == ""
    assert second == SILENCE
