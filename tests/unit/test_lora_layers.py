"""LoRAs computed beside weights: the same velocity, whatever the weights are stored as."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from loras import fuse_loras
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.lora import LORA_TARGET_PATTERN, released_key
from everanimate_cli.lora_layers import (
    UpdatedLinear,
    attach_loras,
    choose_lora_mode,
    list_ranks,
    update_shapes,
)
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.offloading import place, store_blocks
from everanimate_cli.placement_settings import Placement
from everanimate_cli.transformer import EverAnimateTransformer3DModel

CPU = torch.device("cpu")
Loras = list[tuple[Path, float]]


def network(dtype: torch.dtype = torch.float32) -> EverAnimateTransformer3DModel:
    """The same weights every time."""
    return tiny.build_tiny_pipeline(dtype=dtype).transformer


def shapes_of(made: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in made.named_parameters()}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Loras:
    """One of the released kind, and one as distilled ones are, of another rank and strength."""
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(network())
    trained: dict[str, Tensor] = {}
    distilled: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if re.fullmatch(LORA_TARGET_PATTERN, module):
            for key, size in (("lora_A", (3, shape[1])), ("lora_B", (shape[0], 3))):
                values = 0.1 * torch.randn(size, generator=generator)
                trained[released_key(f"{module}.{key}.weight")] = values
        is_linear = len(shape) == 2 and name.startswith(("blocks.0", "condition_embedder.text"))
        if is_linear and name.endswith(".weight"):
            sizes = ((5, shape[1]), (shape[0], 5))
            down, up = (0.1 * torch.randn(size, generator=generator) for size in sizes)
            distilled |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            distilled[f"{module}.alpha"] = torch.tensor(8.0)
    bias = "blocks.1.attn1.to_q.bias"
    distilled["blocks.1.attn1.to_q.diff_b"] = 0.1 * torch.randn(shapes[bias], generator=generator)
    save_file(trained, folder / "trained.safetensors")
    save_file(distilled, folder / "distilled.safetensors")
    return [(folder / "trained.safetensors", 1.0), (folder / "distilled.safetensors", 0.5)]


@torch.no_grad()
def run(made: EverAnimateTransformer3DModel) -> Tensor:
    velocity: Tensor = made(**tiny.draw_inputs(seed=2, dtype=made.dtype))
    return velocity.float()


def fused(loras: Loras, dtype: torch.dtype = torch.float32) -> EverAnimateTransformer3DModel:
    made = network(dtype)
    fuse_loras(made, loras)
    return made


def separate(loras: Loras, dtype: torch.dtype = torch.float32) -> EverAnimateTransformer3DModel:
    made = network(dtype)
    attach_loras(made, loras, shapes_of(made), dtype)
    return made


def test_beside_the_weights_they_do_what_they_do_in_them(loras: Loras) -> None:
    plain, wanted = run(network()), run(fused(loras))
    made = separate(loras)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(run(made), wanted, atol=1e-4, rtol=1e-4)
    untouched = network().state_dict()
    beside = [name for name, each in made.named_modules() if isinstance(each, UpdatedLinear)]
    assert len(beside) > 10 * len(made.blocks)
    for name in beside:
        layer = made.get_submodule(name)
        assert torch.equal(layer.base_layer.weight, untouched[f"{name}.weight"])
        assert layer.weight is layer.base_layer.weight
    # Two LoRAs are one update; elsewhere than in the blocks they are in the weights.
    assert made.blocks[0].attn1.to_q.update.down.shape[0] == 3 + 5
    assert made.blocks[1].attn1.to_q.update.down.shape[0] == 3
    assert all(name.startswith("blocks.") for name in beside)


def test_what_they_take_is_known_from_their_headers(loras: Loras) -> None:
    """The names and shapes of what is put beside the weights, without putting it there."""
    made = separate(loras)
    shapes = shapes_of(network())
    told = update_shapes(list_ranks(loras, shapes), shapes)
    assert told == {key: shape for key, shape in shapes_of(made).items() if ".update." in key}
    assert len(told) > 2 * 10 * len(made.blocks)


@pytest.mark.parametrize("build", [fused, separate])
def test_their_order_does_not_matter(loras: Loras, build: type) -> None:
    torch.testing.assert_close(run(build(loras)), run(build(loras[::-1])), atol=1e-5, rtol=1e-5)


def test_in_bfloat16_both_ways_are_as_near_to_float32(loras: Loras) -> None:
    wanted = run(fused(loras))
    errors = [
        (run(build(loras, torch.bfloat16)) - wanted).abs().mean() for build in (fused, separate)
    ]
    assert max(errors) < 0.1 * wanted.abs().mean()
    assert 0.5 < errors[0] / errors[1] < 2


@pytest.mark.parametrize("offload", ["none", "group", "disk"])
def test_they_stay_as_they_are_where_weights_are_stored_in_8_bits(
    loras: Loras, tmp_path: Path, offload: str
) -> None:
    made = separate(loras)
    placement = Placement(precision="fp8", offload=offload)  # type: ignore[arg-type]
    place({"transformer": made}, placement, CPU, folder=tmp_path)
    velocity = run(made)
    reference = separate(loras)
    for module in reference.blocks.modules():
        for parameter in module.parameters() if isinstance(module, nn.Linear) else ():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(velocity, run(reference), atol=1e-4, rtol=1e-4)


def test_what_is_stored_in_8_bits_after_fusing_is_as_near(loras: Loras) -> None:
    """Rounding the sum costs what rounding the weight costs: fusing first loses nothing."""
    wanted = run(fused(loras))
    errors = []
    for build in (fused, separate):
        made = build(loras)
        store_blocks(made, "fp8", CPU)
        errors.append(float((run(made) - wanted).norm() / wanted.norm()))
    assert errors[0] < 1.5 * errors[1]


class Packed(nn.Module):
    """A block with one layer of a GGUF file."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        layer = GGUFLinear(64, 96, bias=True, compute_dtype=torch.float32)
        layer.weight = GGUFParameter(
            torch.from_numpy(packed), quant_type=gguf.GGMLQuantizationType.Q8_0
        )
        layer.bias = nn.Parameter(torch.zeros(96), requires_grad=False)
        self.time_embedder = layer
        self.weight = weight


PACKED_SHAPES = {"time_embedder.weight": (96, 64), "time_embedder.bias": (96,)}


def test_packed_weights_stay_packed_wherever_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(96, 64, generator=generator), torch.randn(5, 64)
    down, up = torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator)
    path = tmp_path / "lora.safetensors"
    tensors = {
        "time_embedder.lora_A.weight": down,
        "time_embedder.lora_B.weight": up,
        "time_embedder.diff_b": torch.arange(96.0),
    }
    save_file(tensors, path)
    made = Packed(weight)
    plain = made.time_embedder(inputs)
    assert attach_loras(made, [(path, 0.5)], PACKED_SHAPES, torch.float32) == 1
    assert list_ranks([(path, 0.5)], PACKED_SHAPES) == {}  # not in the blocks
    ranks = list_ranks([(path, 0.5)], PACKED_SHAPES, packed={"time_embedder.weight"})
    assert ranks == {"time_embedder.weight": 2}
    assert isinstance(made.time_embedder, UpdatedLinear)
    assert made.time_embedder.weight.dtype == torch.uint8
    wanted = plain + 0.5 * linear(linear(inputs, down), up) + 0.5 * torch.arange(96.0)
    torch.testing.assert_close(made.time_embedder(inputs), wanted, atol=1e-4, rtol=1e-4)
    near = linear(inputs, weight + 0.5 * up @ down, 0.5 * torch.arange(96.0))
    assert np.abs((wanted - near).numpy()).max() < 0.5


def test_whole_differences_of_packed_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(
        {"time_embedder.diff": torch.ones(96, 64), "time_embedder.diff_b": torch.ones(96)}, path
    )
    made = Packed(torch.zeros(96, 64))
    with pytest.raises(WeightsError) as error:
        attach_loras(made, [(path, 1.0)], PACKED_SHAPES, torch.float32)
    assert str(error.value) == (
        f"LoRA {path} changes whole weights (time_embedder.diff), which are packed in this "
        "transformer. Give a transformer that is not packed."
    )
    assert not made.time_embedder.bias.any()


@pytest.mark.parametrize(
    ("dtype", "asked", "chosen"),
    [
        (torch.bfloat16, "auto", "fused"),
        (torch.float8_e4m3fn, "auto", "separate"),
        (torch.float8_e4m3fn, "fused", "fused"),
        (torch.bfloat16, "separate", "separate"),
    ],
)
def test_weights_of_8_bits_in_the_file_keep_loras_apart(
    tmp_path: Path, dtype: torch.dtype, asked: str, chosen: str
) -> None:
    path = tmp_path / "transformer.safetensors"
    save_file({"bias": torch.zeros(3), "weight": torch.zeros(3, 3).to(dtype)}, path)
    assert choose_lora_mode(asked, source_of(path)) == chosen  # type: ignore[arg-type]


def test_gguf_cannot_be_fused_with(tmp_path: Path) -> None:
    source = source_of(tmp_path / "wan.gguf")
    assert choose_lora_mode("auto", source) == "separate"
    with pytest.raises(SettingsError) as error:
        choose_lora_mode("fused", source)
    assert str(error.value) == (
        "--lora-mode fused cannot change the packed weights of "
        f"--transformer {tmp_path / 'wan.gguf'}. Give --lora-mode separate, or leave it out."
    )


def source_of(transformer: Path) -> ModelSource:
    return ModelSource(
        folder=transformer.parent, defaults=tiny.TINY_DEFAULTS, name="m", transformer=transformer
    )
