"""The released network on the meta device: how many weights, their names, what LoRAs cover."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_DEFAULTS, write_tiny_checkpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from everanimate_cli.checkpoint import dtype_in_memory
from everanimate_cli.hub import locate_model
from everanimate_cli.lora import LORA_TARGET_PATTERN, plan_lora
from everanimate_cli.placement import RELEASED_CONFIGS, released_sizes
from everanimate_cli.transformer import EverAnimateTransformer3DModel
from everanimate_cli.weights import load_pipeline

LORA_KEYS = Path(__file__).parent.parent / "golden/parity/lora_keys.json"
D, FFN, BLOCKS, ADAPTERS = 5120, 13824, 40, 8

# What diffusers' `convert_wan_to_diffusers.py` makes of the original checkpoint's names, with the
# sizes of Wan2.2-Animate-14B that it lists. "linear" stands for a weight and a bias.
LINEAR = {
    **{f"blocks.*.attn1.{name}": (D, D) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"blocks.*.attn2.{name}": (D, D) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"blocks.*.attn2.{name}": (D, D) for name in ("add_k_proj", "add_v_proj")},
    "blocks.*.ffn.net.0.proj": (FFN, D),
    "blocks.*.ffn.net.2": (D, FFN),
    **{f"face_adapter.*.{name}": (D, D) for name in ("to_q", "to_k", "to_v", "to_out")},
    "condition_embedder.time_embedder.linear_1": (D, 256),
    "condition_embedder.time_embedder.linear_2": (D, D),
    "condition_embedder.time_proj": (6 * D, D),
    "condition_embedder.text_embedder.linear_1": (D, 4096),
    "condition_embedder.text_embedder.linear_2": (D, D),
    "condition_embedder.image_embedder.ff.net.0.proj": (1280, 1280),
    "condition_embedder.image_embedder.ff.net.2": (D, 1280),
    "proj_out": (64, D),
    "patch_embedding": (D, 36, 1, 2, 2),
    "pose_patch_embedding": (D, 16, 1, 2, 2),
    "face_encoder.conv1_local": (4 * 1024, 512, 3),
    "face_encoder.conv2": (1024, 1024, 3),
    "face_encoder.conv3": (1024, 1024, 3),
    "face_encoder.out_proj": (D, 1024),
    "condition_embedder.image_embedder.norm1": (1280,),
    "condition_embedder.image_embedder.norm2": (D,),
    "blocks.*.norm2": (D,),
    **{f"motion_encoder.motion_network.{i}": (512, 512) for i in range(4)},
    "motion_encoder.motion_network.4": (20, 512),
}
OTHER = {
    "scale_shift_table": (1, 2, D),
    "blocks.*.scale_shift_table": (1, 6, D),
    **{f"blocks.*.attn1.{name}.weight": (D,) for name in ("norm_q", "norm_k")},
    **{f"blocks.*.attn2.{name}.weight": (D,) for name in ("norm_q", "norm_k", "norm_added_k")},
    **{f"face_adapter.*.{name}.weight": (128,) for name in ("norm_q", "norm_k")},
    "face_encoder.padding_tokens": (1, 1, 1, D),
    "motion_encoder.motion_synthesis_weight": (512, 20),
    "motion_encoder.conv_in.weight": (32, 3, 1, 1),
    "motion_encoder.conv_in.act_fn.bias": (32,),
    "motion_encoder.conv_out.weight": (512, 512, 4, 4),
}
# Channels of the motion encoder from 512 x 512 pixels down to 4 x 4.
MOTION_CHANNELS = (32, 64, 128, 256, 512, 512, 512, 512)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    patterns = dict(OTHER)
    for name, shape in LINEAR.items():
        patterns |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for index, (fine, coarse) in enumerate(pairwise(MOTION_CHANNELS)):
        block = f"motion_encoder.res_blocks.{index}"
        patterns |= {
            f"{block}.conv1.weight": (fine, fine, 3, 3),
            f"{block}.conv1.act_fn.bias": (fine,),
            f"{block}.conv2.weight": (coarse, fine, 3, 3),
            f"{block}.conv2.act_fn.bias": (coarse,),
            f"{block}.conv_skip.weight": (coarse, fine, 1, 1),
        }
    counts = {"blocks": BLOCKS, "face_adapter": ADAPTERS}
    return {
        key.replace("*", str(index)): shape
        for key, shape in patterns.items()
        for index in range(counts[key.split(".")[0]] if "*" in key else 1)
    }


@pytest.fixture(scope="module")
def network() -> EverAnimateTransformer3DModel:
    with torch.device("meta"):
        return EverAnimateTransformer3DModel.from_config(RELEASED_CONFIGS["transformer"])


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_names_and_shapes_are_those_of_the_conversion(
    network: EverAnimateTransformer3DModel,
) -> None:
    expected = expected_shapes()
    found = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert sorted(found) == sorted(expected)
    assert found == expected


def test_the_number_of_weights_is_exact(network: EverAnimateTransformer3DModel) -> None:
    assert count(network) == 17_274_816_884
    assert count(network) == sum(math.prod(shape) for shape in expected_shapes().values())
    with torch.device("meta"):
        default = EverAnimateTransformer3DModel()
    assert count(default) == 15_177_050_484
    # Keys, values and norms of the CLIP tokens make the difference.
    assert count(network) - count(default) == BLOCKS * (2 * (D * D + D) + D)


def test_the_other_networks_have_their_known_sizes() -> None:
    counts = {
        name: sum(math.prod(shape) for shape in shapes.values())
        for name, shapes in released_sizes().shapes.items()
    }
    assert counts == {
        "transformer": 17_274_816_884,
        "vae": 126_892_531,  # Wan 2.1's
        "text_encoder": 5_680_910_336,  # the encoder half of umt5-xxl
        "image_encoder": 630_766_080,  # ViT-H/14 without its projection
    }
    geometry = released_sizes().geometry
    assert (geometry.inner_dim, geometry.ffn_dim, geometry.num_layers) == (D, FFN, BLOCKS)
    assert (geometry.size_multiple, geometry.face_size, geometry.decoder_channels) == (16, 512, 96)


def test_a_lora_of_the_released_naming_covers_400_layers(
    network: EverAnimateTransformer3DModel, tmp_path: Path
) -> None:
    golden = json.loads(LORA_KEYS.read_text(encoding="utf-8"))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    # Of rank 1 instead of 32, which are 10 MB instead of 307.
    lora = {
        pattern.format(i=block): torch.zeros(
            [1 if side == 32 else side for side in entry["shape"]], dtype=torch.bfloat16
        )
        for pattern, entry in golden["patterns"].items()
        for block in range(BLOCKS)
    }
    assert len(lora) == golden["key_count_for_40_blocks"] == 800
    save_file(lora, tmp_path / "released.safetensors")
    updates = plan_lora(tmp_path / "released.safetensors", shapes)
    covered = {update.parameter.removesuffix(".weight") for update in updates}
    assert len(covered) == golden["lora_layers_for_40_blocks"] == 400
    # They are all that training adapts, and none of the face adapters.
    target = re.compile(LORA_TARGET_PATTERN)
    assert covered == {name for name, _ in network.named_modules() if target.fullmatch(name)}


def test_the_float32_islands_are_those_of_the_class(
    network: EverAnimateTransformer3DModel, tmp_path: Path
) -> None:
    """What the loader gives a tiny checkpoint, and the rule for it, applied to all names."""
    source = locate_model(str(write_tiny_checkpoint(tmp_path / "tiny")), lambda _event: None)
    assert source.defaults == TINY_DEFAULTS
    loaded = load_pipeline(source, [], torch.device("cpu"), torch.bfloat16).transformer
    islands = {key for key, value in loaded.named_parameters() if value.dtype == torch.float32}
    kept = EverAnimateTransformer3DModel._keep_in_fp32_modules
    assert islands == {
        key for key, _ in loaded.named_parameters() if set(kept) & set(key.split("."))
    }

    def roles(keys: set[str]) -> set[str]:
        return {re.sub(r"\d+", "*", key) for key in keys}

    full = {
        key
        for key, _ in network.named_parameters()
        if dtype_in_memory("transformer", key, torch.bfloat16) == torch.float32
    }
    # The same roles, and so many of them as blocks.
    assert (
        roles(full)
        == roles(islands)
        == {
            "scale_shift_table",
            "blocks.*.scale_shift_table",
            "blocks.*.norm*.weight",
            "blocks.*.norm*.bias",
            "condition_embedder.time_embedder.linear_*.weight",
            "condition_embedder.time_embedder.linear_*.bias",
            "condition_embedder.image_embedder.norm*.weight",
            "condition_embedder.image_embedder.norm*.bias",
            "motion_encoder.motion_synthesis_weight",
        }
    )
    assert len(full) == 1 + 3 * BLOCKS + 4 + 4 + 1


def test_the_work_of_a_step_is_counted() -> None:
    """On five blocks of full width; torch counts every product of matrices."""
    blocks, height, width, slots = 5, 480, 832, 20
    with torch.device("meta"):
        config = RELEASED_CONFIGS["transformer"] | {"num_layers": blocks}
        network = EverAnimateTransformer3DModel.from_config(config)
        cells = (height // 8, width // 8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(
                torch.empty(1, 36, 4 + slots, *cells),
                torch.empty(1),
                torch.empty(1, 512, 4096),
                torch.empty(1, 257, 1280),
                torch.empty(1, D, slots, height // 16, width // 16),
                torch.empty(1, slots, 5, D),
            )
    released = released_sizes().geometry
    fields = {name: getattr(released, name) for name in released.__dataclass_fields__}
    geometry = type(released)(**(fields | {"num_layers": blocks}))
    estimate = geometry.step_flops(height, width, 4 * (slots - 1) + 1, 4)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.01)
    # Of the released run: two petaflop.
    assert released.step_flops(480, 832, 77, 4) == pytest.approx(2.09e15, rel=0.02)
