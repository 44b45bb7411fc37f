"""LoRA files under every known naming, on a network of one block with unequal sizes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from loras import fuse_loras
from safetensors.torch import save_file
from torch import Tensor, nn

from everanimate_cli.errors import WeightsError
from everanimate_cli.lora import (
    LORA_TARGET_PATTERN,
    LoraFiles,
    describe_lora,
    load_lora,
    plan_lora,
    plan_loras,
    released_key,
)
from everanimate_cli.lora_config import lora_weights_file
from everanimate_cli.safetensors_header import read_number, read_tensor_shapes

RANK = 2
# Original name, diffusers name: one of each kind that LoRA files address.
NAMES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.0.cross_attn.v": "blocks.0.attn2.to_v",
    "blocks.0.cross_attn.k_img": "blocks.0.attn2.add_k_proj",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.0.ffn.2": "blocks.0.ffn.net.2",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
# [out, in] of every layer above.
SIZE = (5, 3)


class Block(nn.Module):
    """Only its parameters count."""


def build_network() -> nn.Module:
    """A network with diffusers' module names, weights all zero."""
    network = Block()
    for name in NAMES.values():
        parent = network
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, Block())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(SIZE[1], SIZE[0]))
    block = network.get_submodule("blocks.0")
    block.add_module("norm2", nn.LayerNorm(3))
    block.register_parameter("scale_shift_table", nn.Parameter(torch.zeros(1, 6, 3)))
    network.add_module("patch_embedding", nn.Conv3d(3, 5, (1, 2, 2)))
    for parameter in network.parameters():
        parameter.data.zero_()
    return network


def network_shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in build_network().named_parameters()}


@pytest.fixture
def matrices() -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by original name."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(RANK, SIZE[1], generator=generator),
            torch.randn(SIZE[0], RANK, generator=generator),
        )
        for name in NAMES
    }


def assert_fused(
    network: nn.Module, matrices: dict[str, tuple[Tensor, Tensor]], factor: float = 1.0
) -> None:
    for original, name in NAMES.items():
        down, up = matrices[original]
        weight = network.get_parameter(f"{name}.weight")
        torch.testing.assert_close(weight.data, factor * up @ down, rtol=1e-6, atol=1e-6)
        assert not network.get_parameter(f"{name}.bias").any()


@pytest.mark.parametrize("prefix", ["", "pipe.dit.", "diffusion_model.", "base_model.model."])
@pytest.mark.parametrize("suffix", ["lora_{}.default.weight", "lora_{}.weight"])
@pytest.mark.parametrize("is_original", [True, False])
def test_namings_with_a_and_b(
    matrices: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
    prefix: str,
    suffix: str,
    is_original: bool,
) -> None:
    tensors = {}
    for name, (down, up) in matrices.items():
        module = prefix + (name if is_original else NAMES[name])
        tensors[f"{module}.{suffix.format('A')}"] = down
        tensors[f"{module}.{suffix.format('B')}"] = up
    save_file(tensors, tmp_path / "lora.safetensors")
    network = build_network()
    assert fuse_loras(network, [(tmp_path / "lora.safetensors", 1.0)]) == len(NAMES)
    assert_fused(network, matrices)


@pytest.mark.parametrize("style", ["diffusion_model.{}", "lora_unet_{}", "lora_unet__{}"])
def test_namings_with_down_up_and_alpha(
    matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, style: str
) -> None:
    tensors = {}
    for name, (down, up) in matrices.items():
        module = style.format(name.replace(".", "_") if "unet" in style else name)
        tensors[f"{module}.lora_down.weight"] = down
        tensors[f"{module}.lora_up.weight"] = up
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    network = build_network()
    fuse_loras(network, [(tmp_path / "lora.safetensors", 3.0)])
    assert_fused(network, matrices, factor=3.0 / RANK)


def test_alpha_in_a_released_file_is_ignored(
    matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    tensors = {}
    for name, (down, up) in matrices.items():
        tensors[f"{name}.lora_A.default.weight"] = down
        tensors[f"{name}.lora_B.default.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    network = build_network()
    fuse_loras(network, [(tmp_path / "lora.safetensors", 1.0)])
    assert_fused(network, matrices)


def test_whole_differences_and_convolutions(tmp_path: Path) -> None:
    """What lightx2v adds to its low-rank matrices."""
    down, up = torch.randn(RANK, 3, 1, 2, 2), torch.randn(5, RANK, 1, 1, 1)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.blocks.0.norm3.diff": torch.full((3,), 2.0),
        "diffusion_model.blocks.0.norm3.diff_b": torch.full((3,), 3.0),
        "diffusion_model.blocks.0.diff_m": torch.full((1, 6, 3), 4.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    network = build_network()
    assert fuse_loras(network, [(tmp_path / "lora.safetensors", 0.5)]) == 4
    expected = 0.5 * torch.einsum("orxyz,riabc->oiabc", up, down)
    torch.testing.assert_close(network.get_parameter("patch_embedding.weight").data, expected)
    assert (network.get_parameter("blocks.0.norm2.weight") == 1.0).all()
    assert (network.get_parameter("blocks.0.norm2.bias") == 1.5).all()
    assert (network.get_parameter("blocks.0.scale_shift_table") == 2.0).all()


def test_sum_is_formed_in_float32(tmp_path: Path) -> None:
    """In bfloat16 the product 256 + 1 would be 256, and nothing would remain beside -256."""
    down = torch.ones(RANK, SIZE[1], dtype=torch.bfloat16)
    up = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16).expand(SIZE[0], -1).contiguous()
    save_file(
        {"head.head.lora_A.weight": down, "head.head.lora_B.weight": up},
        tmp_path / "lora.safetensors",
    )
    network = build_network().to(torch.bfloat16)
    network.get_parameter("proj_out.weight").data.fill_(-256)
    fuse_loras(network, [(tmp_path / "lora.safetensors", 1.0)])
    weight = network.get_parameter("proj_out.weight")
    assert weight.dtype == torch.bfloat16
    assert (weight == 1).all()


def test_loaded_for_training_under_diffusers_names(tmp_path: Path) -> None:
    down, up = torch.randn(RANK, SIZE[1]), torch.randn(SIZE[0], RANK)
    tensors = {
        "lora_unet_blocks_0_self_attn_q.lora_down.weight": down,
        "lora_unet_blocks_0_self_attn_q.lora_up.weight": up,
        "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(8.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded = load_lora(tmp_path / "lora.safetensors", network_shapes())
    assert loaded.keys() == {
        "blocks.0.attn1.to_q.lora_A.weight",
        "blocks.0.attn1.to_q.lora_B.weight",
    }
    torch.testing.assert_close(loaded["blocks.0.attn1.to_q.lora_A.weight"], down)
    torch.testing.assert_close(loaded["blocks.0.attn1.to_q.lora_B.weight"], 4 * up)


PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": "a/b"}


def write_peft(
    folder: Path, matrices: dict[str, tuple[Tensor, Tensor]], config: dict[str, object]
) -> Path:
    """A folder as `save_pretrained` of PEFT makes it; the file in it."""
    folder.mkdir()
    tensors = {}
    for name, (down, up) in matrices.items():
        tensors[f"base_model.model.{NAMES[name]}.lora_A.weight"] = down
        tensors[f"base_model.model.{NAMES[name]}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return lora_weights_file(folder)


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, 8 / RANK),
        ({"use_rslora": True}, 8 / RANK**0.5),
        ({"lora_alpha": RANK}, 1.0),
        ({"alpha_pattern": {"blocks.0.*": 3, "proj_out": 3, "condition_embedder.*": 3}}, 3 / RANK),
    ],
)
def test_the_configuration_of_peft_scales_the_product(
    matrices: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
    more: dict[str, object],
    factor: float,
) -> None:
    path = write_peft(tmp_path / "adapter", matrices, PEFT | more)
    network = build_network()
    fuse_loras(network, [(path, 1.0)])
    assert_fused(network, matrices, factor=factor)
    loaded = load_lora(path, network_shapes())
    torch.testing.assert_close(loaded["proj_out.lora_B.weight"], factor * matrices["head.head"][1])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_configuration_in_a_file_of_diffusers_scales_the_product(
    matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, prefix: str
) -> None:
    tensors = {}
    for name, (down, up) in matrices.items():
        tensors[f"{prefix}{NAMES[name]}.lora_A.weight"] = down
        tensors[f"{prefix}{NAMES[name]}.lora_B.weight"] = up
    config = json.dumps({f"{prefix}{key}": value for key, value in PEFT.items()})
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": config})
    network = build_network()
    fuse_loras(network, [(path, 1.0)])
    assert_fused(network, matrices, factor=8 / RANK)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (PEFT | {"use_dora": True}, "describes a DoRA. Give a plain LoRA."),
        (PEFT | {"peft_type": "LOHA"}, "describes LOHA, not LORA. Give a plain LoRA."),
        ({"r": 3}, "names no lora_alpha. Give a configuration of PEFT."),
        ([1], "names no lora_alpha. Give a configuration of PEFT."),
        ("{", "cannot be read: it holds no JSON object."),
    ],
)
def test_other_configurations_are_refused(
    matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, config: object, problem: str
) -> None:
    path = write_peft(tmp_path / "adapter", matrices, {})
    config_path = tmp_path / "adapter" / "adapter_config.json"
    text = config if isinstance(config, str) else json.dumps(config)
    config_path.write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError) as caught:
        plan_lora(path, network_shapes())
    assert str(caught.value) == f"{config_path} {problem}"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("head.head.lora_magnitude_vector", "DoRA"),
        ("head.head.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_head_head.dora_scale", "DoRA"),
        ("lora_unet_head_head.hada_w1_a", "LoHa"),
        ("lora_unet_head_head.lokr_w1", "LoKr"),
        ("head.head.oft_R.weight", "OFT"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path, key: str, kind: str) -> None:
    """Their matrices alone would load, and count as they should not."""
    path = tmp_path / "other.safetensors"
    tensors = {
        "head.head.lora_A.weight": torch.ones(RANK, SIZE[1]),
        "head.head.lora_B.weight": torch.ones(SIZE[0], RANK),
    }
    assert refuse(path, tensors | {key: torch.ones(5)}) == (
        f"LoRA {path} is a {kind} (1 keys such as {key}), which is more than a product that can "
        "be added. Give a plain LoRA."
    )


def test_the_order_of_two_loras_does_not_matter(
    matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    """Rounded after each of them, the first one's last bits would be lost."""
    loras = []
    for number, suffix in enumerate(["lora_{}.default.weight", "lora_{}.weight"], start=1):
        path = tmp_path / f"{number}.safetensors"
        tensors = {}
        for name, (down, up) in matrices.items():
            tensors[f"{name}.{suffix.format('A')}"] = down / number
            tensors[f"{name}.{suffix.format('B')}"] = up + number
        save_file(tensors, path)
        loras.append((path, 0.01 * number))
    made = []
    for order in (loras, loras[::-1]):
        network = build_network().to(torch.bfloat16)
        for parameter in network.parameters():
            parameter.data.fill_(1.37)
        assert fuse_loras(network, order) == len(NAMES)
        made.append(network.state_dict())
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_what_a_file_says_of_itself(
    matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    down, up = matrices["head.head"]
    released = {"head.head.lora_A.default.weight": down, "head.head.lora_B.default.weight": up}
    told = {"base": "a/b", "stage": "2", "step": "3000", "rank": "2", "format": "pt"}
    save_file(released, path, metadata=told)
    assert describe_lora(path, network_shapes()).to_json() == {
        "rank": RANK,
        "naming": "Wan names, lora_A.default and lora_B.default",
        "layers": 1,
        "base": "a/b",
        "stage": "2",
        "step": "3000",
    }
    kohya = {
        "lora_unet_head_head.lora_down.weight": down,
        "lora_unet_head_head.lora_up.weight": up,
        "lora_unet_head_head.alpha": torch.tensor(0.5, dtype=torch.bfloat16),
        "lora_unet_blocks_0_norm3.diff_b": torch.ones(3),
    }
    save_file(kohya, path, metadata={"ss_steps": "40"})
    assert describe_lora(path, network_shapes()).to_json() == {
        "rank": RANK,
        "alpha": 0.5,
        "naming": "Wan names after lora_unet_, lora_down and lora_up and diff_b",
        "layers": 2,
        "step": "40",
    }
    path = write_peft(tmp_path / "adapter", matrices, PEFT | {"alpha_pattern": {"proj_out": 2}})
    assert describe_lora(path, network_shapes()).to_json() == {
        "rank": RANK,
        "alpha": [2, 8],
        "naming": "diffusers names after base_model.model., lora_A and lora_B",
        "layers": len(NAMES),
        "base": "a/b",
    }


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.5, torch.float16),
        (-3.25, torch.bfloat16),
        (1e-3, torch.float32),
        (1e-3, torch.float64),
        (32, torch.int64),
    ],
)
def test_numbers_are_read_without_torch(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = tmp_path / "numbers.safetensors"
    stored = torch.tensor(value, dtype=dtype)
    save_file({"before": torch.ones(3), "number": stored, "z": torch.ones(2)}, path)
    assert read_number(path, "number") == stored.item()
    with pytest.raises(WeightsError, match=r"is of type F32 and shape \[3\], not a single number"):
        read_number(path, "before")


def test_released_key() -> None:
    assert released_key("blocks.7.attn2.to_out.0.lora_B.weight") == (
        "blocks.7.cross_attn.o.lora_B.default.weight"
    )


def test_training_targets_leave_the_face_adapter_alone() -> None:
    assert re.fullmatch(LORA_TARGET_PATTERN, "blocks.39.attn1.to_out.0")
    for name in ("face_adapter.0.to_q", "blocks.0.attn2.add_k_proj", "proj_out"):
        assert not re.fullmatch(LORA_TARGET_PATTERN, name)


def refuse(path: Path, tensors: dict[str, Tensor]) -> str:
    """Error text for a file; the network must be as it was."""
    save_file(tensors, path)
    network = build_network()
    with pytest.raises(WeightsError) as caught:
        fuse_loras(network, [(path, 1.0)])
    assert not any(parameter.any() for parameter in network.parameters())
    return str(caught.value)


def test_unknown_keys_are_listed_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors = {
        f"blocks.{index}.self_attn.q.lora_{matrix}.weight": torch.ones(2, 2)
        for index in (1, 2)
        for matrix in "AB"
    }
    tensors["blocks.0.self_attn.q.lora_A.weight"] = torch.ones(RANK, SIZE[1])
    tensors["blocks.0.self_attn.q.lora_B.weight"] = torch.ones(SIZE[0], RANK)
    assert refuse(path, tensors) == (
        f"LoRA {path}: 4 of its 6 keys have no place in the network (first: "
        "blocks.1.self_attn.q.lora_A.weight, blocks.1.self_attn.q.lora_B.weight, "
        "blocks.2.self_attn.q.lora_A.weight). Give a LoRA made for Wan2.2-Animate."
    )


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        (["head.head.lora_A.weight"], "head.head.lora_A.weight"),
        (["head.head.alpha"], "head.head.alpha"),
        (["blocks.0.norm3.diff_m"], "blocks.0.norm3.diff_m"),
        (["head.head.diff", "proj_out.diff"], "proj_out.diff"),
    ],
)
def test_unpaired_unknown_and_doubled_keys(tmp_path: Path, keys: list[str], refused: str) -> None:
    path = tmp_path / "odd.safetensors"
    message = refuse(path, {key: torch.ones(1) for key in keys})
    assert f"1 of its {len(keys)} keys have no place in the network ({refused})" in message


def test_file_without_lora_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    assert refuse(path, {}) == (
        f"LoRA {path}: 0 of its 0 keys have no place in the network (it has none for this "
        "network). Give a LoRA made for Wan2.2-Animate."
    )


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    tensors = {
        "head.head.lora_A.weight": torch.ones(RANK, SIZE[1] + 1),
        "head.head.lora_B.weight": torch.ones(SIZE[0], RANK),
    }
    assert refuse(path, tensors) == (
        f"LoRA {path}: 1 of its 1 layers have another shape than the network "
        "(head.head.lora_B.weight for [5, 3]). Give a LoRA made for this network's size."
    )
    tensors["head.head.lora_A.weight"] = torch.ones(RANK + 1, SIZE[1])
    assert "1 of its 1 layers have another shape" in refuse(path, tensors)


def test_differences_cannot_be_trained_further(tmp_path: Path) -> None:
    path = tmp_path / "diff.safetensors"
    save_file({"head.head.diff": torch.ones(SIZE)}, path)
    with pytest.raises(WeightsError) as caught:
        load_lora(path, network_shapes())
    assert str(caught.value) == (
        f"LoRA {path} cannot be trained further: 1 of its keys are not low-rank matrices "
        "(head.head.diff). Give a file made by LoRA training."
    )


def test_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors in here", encoding="utf-8")
    cut = tmp_path / "cut.safetensors"
    save_file({"head.head.diff": torch.ones(SIZE)}, cut)
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-4])
    messages = {
        missing: f"{missing} cannot be read: No such file or directory. Check the path.",
        text: f"{text} is not a safetensors file. Give one.",
        cut: f"{cut} has {size - 4} bytes where its header announces {size}. Download it again.",
    }
    for path, message in messages.items():
        with pytest.raises(WeightsError) as caught:
            read_tensor_shapes(path)
        assert str(caught.value) == message
        assert caught.value.exit_code == 2


def test_checking_a_file_loads_no_heavy_module(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {
        "head.head.lora_A.weight": torch.ones(RANK, SIZE[1]),
        "head.head.lora_B.weight": torch.ones(SIZE[0], RANK),
    }
    save_file(tensors, path)
    updates = plan_lora(path, network_shapes())
    assert [update.parameter for update in updates] == ["proj_out.weight"]
    program = (
        "import sys; from pathlib import Path; from everanimate_cli.lora import plan_lora; "
        f"plan_lora(Path({str(path)!r}), {{'proj_out.weight': {SIZE}}}); "
        "print(sorted({'torch', 'numpy', 'safetensors', 'diffusers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_fusing_takes_little_more_than_the_weight(tmp_path: Path) -> None:
    """Sums of whole weights in float32 took six times as much, and with it more than a block."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 128, generator=draw).bfloat16()
    tensors = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.randn(4, 128, generator=draw),
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.randn(3000, 4, generator=draw),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    files = [(tmp_path / "lora.safetensors", 0.5), (tmp_path / "lora.safetensors", 2.0)]
    name = "blocks.0.ffn.net.0.proj.weight"
    shares = plan_loras(files, {name: (3000, 128)})[name]
    down, up = tensors.values()
    with LoraFiles(files) as opened, LiveBytes(elsewhere=[weight]) as live:
        fused = opened.fuse(shares, weight)
    expected = (weight.float() + 2.5 * up @ down).bfloat16()
    torch.testing.assert_close(fused, expected, rtol=1e-2, atol=1e-2)
    assert fused.dtype == torch.bfloat16
    size = weight.numel() * 2
    assert size <= live.peak < 2.2 * size
