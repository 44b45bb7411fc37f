"""LoRAs on the command line: in the weights or beside them, and what a plan says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from studio import Animate, Outcome, frames_of
from tiny import INNER_DIM

LENGTH = ("--frames", "5")
LAYER = "blocks.0.self_attn.o"


@pytest.fixture(autouse=True)
def files(place: Path) -> Path:
    """my.safetensors of the released naming, and the same matrices as a folder of PEFT."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 2, INNER_DIM, generator=generator)
    up = up.T.contiguous()
    save_file(
        {f"{LAYER}.lora_A.default.weight": down, f"{LAYER}.lora_B.default.weight": up},
        place / "my.safetensors",
        metadata={"stage": "2", "base": "a/b", "step": "3000"},
    )
    (place / "peft").mkdir()
    save_file(
        {
            f"base_model.model.{LAYER}.lora_A.weight": down,
            f"base_model.model.{LAYER}.lora_B.weight": up,
        },
        place / "peft/adapter_model.safetensors",
    )
    write_config(2)
    return place


def write_config(alpha: float) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
    Path("peft/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_transformer_in_8_bits(path: Path) -> None:
    """The tiny transformer with the blocks' weights in float8."""
    (weights,) = Path("tiny/transformer").glob("*.safetensors")
    save_file(
        {
            key: value.to(torch.float8_e4m3fn)
            if key.startswith("blocks.") and key.endswith("weight") and value.dim() == 2
            else value
            for key, value in load_file(weights).items()
        },
        path,
    )


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def test_beside_the_weights_a_lora_makes_the_same_video(animate: Animate) -> None:
    words = ("--lora", "my.safetensors=0.5", *LENGTH)
    for name, more in {
        "fused": ["--lora-mode", "fused"],
        "separate": ["--lora-mode", "separate"],
        "auto": [],
    }.items():
        done(animate("-o", f"{name}.mp4", *words, *more))
    done(animate("-o", "bare.mp4", *LENGTH))
    fused, separate, bare = (
        frames_of(f"{name}.mp4").astype(int) for name in ("fused", "separate", "bare")
    )
    assert np.abs(fused - separate).max() <= 2
    assert np.abs(fused - bare).max() > 10
    assert Path("auto.mp4").read_bytes() == Path("fused.mp4").read_bytes()
    record = json.loads(Path("separate.json").read_text())
    assert record["result"]["loras"][0]["mode"] == "separate"


def test_a_plan_says_what_a_lora_is(animate: Animate) -> None:
    words = ("--lora", "my.safetensors=0.5", "--lora", "peft", "--dry-run")
    write_config(8)
    plan = done(animate(*words)).out.splitlines()
    assert (
        "loras: source my.safetensors, scale 0.5, mode fused, rank 2, naming Wan names, "
        "lora_A.default and lora_B.default, layers 1, base a/b, stage 2, step 3000; "
        "source peft, scale 1.0, mode fused, rank 2, alpha 8, naming Wan names after "
        "base_model.model., lora_A and lora_B, layers 1"
    ) in plan
    first, second = json.loads(done(animate(*words, "--json")).out)["loras"]
    assert first == {
        "source": "my.safetensors",
        "scale": 0.5,
        "mode": "fused",
        "rank": 2,
        "naming": "Wan names, lora_A.default and lora_B.default",
        "layers": 1,
        "base": "a/b",
        "stage": "2",
        "step": "3000",
    }
    assert (second["source"], second["alpha"]) == ("peft", 8)
    assert "loras: none" in done(animate("--dry-run")).out.splitlines()


def test_a_folder_of_peft_counts_alpha(animate: Animate) -> None:
    """alpha / rank = 1 is the file as it is, 4 is four times as much."""
    done(animate("-o", "file.mp4", "--lora", "my.safetensors", *LENGTH))
    done(animate("-o", "folder.mp4", "--lora", "peft", *LENGTH))
    write_config(8)
    done(animate("-o", "four.mp4", "--lora", "peft=0.25", *LENGTH))
    made = [Path(f"{name}.mp4").read_bytes() for name in ("file", "folder", "four")]
    assert made[0] == made[1] == made[2]


def test_alpha_and_mode_belong_to_a_run(animate: Animate) -> None:
    words = ("-o", "a.mp4", "--lora", "peft", "--keep-run")
    done(animate(*words, *LENGTH))
    refused = animate(*words, "--frames", "6", "--lora-mode", "separate")
    assert refused.code == 2
    assert "--lora-mode was fused, is separate" in refused.err
    write_config(8)
    refused = animate(*words, "--frames", "6")
    assert refused.code == 2
    assert "alpha of --lora 1 was 2, is 8" in refused.err


def test_a_folder_that_is_not_of_peft_is_refused(animate: Animate) -> None:
    Path("peft/adapter_config.json").unlink()
    refused = animate("--lora", "peft", *LENGTH)
    assert (refused.code, refused.err) == (
        2,
        "error: --lora peft is a folder without PEFT's adapter_config.json. Give a .safetensors "
        "file or a Hub id, with its strength as FILE=SCALE.\n",
    )


def test_a_transformer_in_8_bits_keeps_its_weights(animate: Animate) -> None:
    write_transformer_in_8_bits(Path("eight.safetensors"))
    words = ("--transformer", "eight.safetensors", "--lora", "my.safetensors", *LENGTH)
    assert json.loads(done(animate(*words, "--dry-run", "--json")).out)["loras"][0]["mode"] == (
        "separate"
    )
    done(animate("-o", "auto.mp4", *words))
    done(animate("-o", "fused.mp4", *words, "--lora-mode", "fused"))
    done(animate("-o", "bare.mp4", *words[:2], *LENGTH))
    auto, fused, bare = (frames_of(f"{name}.mp4").astype(int) for name in ("auto", "fused", "bare"))
    assert np.abs(auto - fused).mean() < 0.1  # H.264 may code a block otherwise
    assert np.abs(fused - bare).mean() > 1
