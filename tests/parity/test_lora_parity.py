"""LoRA files: names of the released export, and the effect of a checkpoint on the network."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loras import fuse_loras
from safetensors import safe_open
from torch import Tensor

from everanimate_cli.lora import (
    LORA_TARGET_PATTERN,
    load_lora,
    plan_lora,
    released_key,
)
from everanimate_cli.safetensors_header import read_tensor_shapes
from everanimate_cli.transformer import EverAnimateTransformer3DModel

Golden = Callable[[str], dict[str, Tensor]]

TOLERANCE = 1.5e-4
WRONG = 1e-2


@pytest.fixture
def checkpoint_path(parity_dir: Path) -> Path:
    return parity_dir / "lora_checkpoint.safetensors"


@pytest.fixture
def key_list(parity_dir: Path) -> dict:
    return json.loads((parity_dir / "lora_keys.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(parity_dir: Path, golden: Golden) -> Callable[[EverAnimateTransformer3DModel], Tensor]:
    """Run a network on the inputs that the file names."""
    with safe_open(parity_dir / "lora.safetensors", framework="pt") as file:
        case = file.metadata()["inputs_from"].split()[-1]
    inputs = {
        key.removeprefix(f"{case}.in."): value
        for key, value in golden("transformer").items()
        if key.startswith(f"{case}.in.")
    }
    return lambda transformer: transformer(
        torch.cat([inputs["latents"], inputs["y"]], dim=1),
        inputs["timestep"].double(),
        inputs["text_embeds"],
        inputs["clip_embeds"],
        transformer.embed_pose(inputs["pose_latents"]),
        transformer.embed_face(inputs["face_pixels"]),
    )


Run = Callable[[EverAnimateTransformer3DModel], Tensor]


def network_shapes(transformer: EverAnimateTransformer3DModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in transformer.named_parameters()}


def measure(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


def test_base_velocity(
    transformer: EverAnimateTransformer3DModel, golden: Golden, run: Run
) -> None:
    assert measure(run(transformer), golden("lora")["out.velocity_base"]) < TOLERANCE


def test_fused_velocity(
    transformer: EverAnimateTransformer3DModel,
    golden: Golden,
    run: Run,
    checkpoint_path: Path,
    lora_scale: str,
) -> None:
    num_layers = fuse_loras(transformer, [(checkpoint_path, float(lora_scale))])
    assert 2 * num_layers == len(read_tensor_shapes(checkpoint_path))
    velocity = run(transformer)
    expected = golden("lora")[f"out.velocity_lora_scale{lora_scale}"]
    assert measure(velocity, expected) < TOLERANCE
    assert measure(velocity, golden("lora")["out.velocity_base"]) > WRONG


def test_dividing_by_the_rank_misses(
    transformer: EverAnimateTransformer3DModel,
    golden: Golden,
    run: Run,
    checkpoint_path: Path,
    lora_scale: str,
) -> None:
    rank = next(
        shape[0] for key, shape in read_tensor_shapes(checkpoint_path).items() if "lora_A" in key
    )
    fuse_loras(transformer, [(checkpoint_path, float(lora_scale) / rank)])
    expected = golden("lora")[f"out.velocity_lora_scale{lora_scale}"]
    assert measure(run(transformer), expected) > WRONG


def test_loaded_for_training(
    transformer: EverAnimateTransformer3DModel, golden: Golden, run: Run, checkpoint_path: Path
) -> None:
    """As an adapter at scale 1 the file acts as fused; unconverted, diffusers loads nothing."""
    base = golden("lora")["out.velocity_base"]
    converted = load_lora(checkpoint_path, network_shapes(transformer))
    unconverted = {released_key(key): value for key, value in converted.items()}
    assert unconverted.keys() == read_tensor_shapes(checkpoint_path).keys()
    transformer.load_lora_adapter(unconverted)
    assert measure(run(transformer), base) < TOLERANCE

    transformer.load_lora_adapter(converted, prefix=None)
    assert measure(run(transformer), golden("lora")["out.velocity_lora_scale1"]) < TOLERANCE


def test_training_targets_are_the_layers_of_the_export(
    transformer: EverAnimateTransformer3DModel, checkpoint_path: Path, key_list: dict
) -> None:
    exported = {
        update.parameter.removesuffix(".weight")
        for update in plan_lora(checkpoint_path, network_shapes(transformer))
    }
    linear = {
        name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)
    }
    targets = {name for name in linear if re.fullmatch(LORA_TARGET_PATTERN, name)}
    assert targets == exported
    count = len(transformer.blocks)
    untouched = {
        pattern.replace("{i}", str(index))
        for pattern in key_list["linear_layers_in_diffusers_model_without_lora"]
        for index in range(count)
    }
    assert not targets & untouched
    assert linear - targets <= untouched


def test_names_of_the_full_size_export(key_list: dict, tmp_path: Path) -> None:
    """Every key of a 40-block file, from its header alone: the data is a hole in the file."""
    patterns = key_list["patterns"]
    num_blocks = key_list["key_count_for_40_blocks"] // len(patterns)
    header, shapes, expected = {}, {}, {}
    end = 0
    for index in range(num_blocks):
        for pattern, entry in patterns.items():
            start, end = end, end + 2 * entry["shape"][0] * entry["shape"][1]
            key = pattern.replace("{i}", str(index))
            header[key] = {
                "dtype": "BF16",
                "shape": entry["shape"],
                "data_offsets": [start, end],
            }
            diffusers_key = entry["diffusers"].replace("{i}", str(index))
            assert released_key(diffusers_key) == key
            module, matrix, _ = diffusers_key.rsplit(".", 2)
            expected[key] = f"{module}.weight"
            out_and_in = shapes.setdefault(f"{module}.weight", [0, 0])
            if matrix == "lora_A":
                out_and_in[1] = entry["shape"][1]
            else:
                out_and_in[0] = entry["shape"][0]
    header_bytes = json.dumps(header).encode()
    path = tmp_path / "export.safetensors"
    with path.open("wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        file.truncate(8 + len(header_bytes) + end)

    updates = plan_lora(path, {name: tuple(shape) for name, shape in shapes.items()})
    assert len(updates) == key_list["lora_layers_for_40_blocks"]
    assert {key: update.parameter for update in updates for key in update.keys} == expected
