"""Adapters in training: where they sit, what they start as, and the file that becomes of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from loras import fuse_loras
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.lora import released_key
from everanimate_cli.lora_adapter import (
    attach_lora,
    load_initial_lora,
    lora_parameters,
    read_adapters,
    save_lora,
    write_adapters,
)
from everanimate_cli.transformer import EverAnimateTransformer3DModel

RANK = 3
NUM_LAYERS_PER_BLOCK = 10  # q, k, v, o twice and the two of the feed-forward layer


def network() -> EverAnimateTransformer3DModel:
    """The same weights every time."""
    return tiny.build_tiny_pipeline().transformer


def with_lora(alpha: float = RANK, seed: int = 0) -> EverAnimateTransformer3DModel:
    made = network()
    attach_lora(made, rank=RANK, alpha=alpha, seed=seed)
    return made


def trained(alpha: float = RANK) -> EverAnimateTransformer3DModel:
    """Adapters that are no longer zero."""
    made = with_lora(alpha)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(made).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return tiny.draw_inputs(seed=2)


@torch.no_grad()
def run(made: EverAnimateTransformer3DModel, inputs: dict[str, Tensor]) -> Tensor:
    return made(**inputs)


def test_adapters_sit_on_attention_and_feed_forward_layers_of_the_blocks_only() -> None:
    made = with_lora()
    modules = {key.rsplit(".", 2)[0] for key in lora_parameters(made)}
    assert len(modules) == NUM_LAYERS_PER_BLOCK * len(made.blocks)
    assert all(module.startswith("blocks.") for module in modules)
    in_training = [name for name, value in made.named_parameters() if value.requires_grad]
    assert len(in_training) == 2 * len(modules)
    assert all(".lora_" in name for name in in_training)


def test_fresh_adapters_change_nothing(inputs: dict[str, Tensor]) -> None:
    assert torch.equal(run(with_lora(), inputs), run(network(), inputs))


def test_the_draw_follows_from_the_seed_alone() -> None:
    first = read_adapters(with_lora(seed=4))
    torch.manual_seed(123)
    assert all(torch.equal(a, first[key]) for key, a in read_adapters(with_lora(seed=4)).items())
    other = read_adapters(with_lora(seed=5))
    assert any(not torch.equal(value, first[key]) for key, value in other.items())


def test_adapters_come_back() -> None:
    source, target = trained(), with_lora()
    write_adapters(target, read_adapters(source))
    for key, value in read_adapters(source).items():
        assert torch.equal(value, read_adapters(target)[key])


def test_adapters_of_a_network_in_bfloat16_are_float32() -> None:
    made = tiny.build_tiny_pipeline(dtype=torch.bfloat16).transformer
    attach_lora(made, rank=RANK, alpha=RANK, seed=0)
    assert {value.dtype for value in lora_parameters(made).values()} == {torch.float32}


@pytest.mark.parametrize("naming", ["diffusers", "original"])
@pytest.mark.parametrize("alpha", [RANK, 7.5])
def test_a_fused_file_equals_the_adapters(
    tmp_path: Path, inputs: dict[str, Tensor], naming: str, alpha: float
) -> None:
    made = trained(alpha)
    path = tmp_path / "lora.safetensors"
    save_lora(
        path,
        read_adapters(made),
        strength=alpha / RANK,
        naming=naming,  # type: ignore[arg-type]
        dtype=torch.float32,
        metadata={"rank": str(RANK)},
    )
    fused = network()
    assert fuse_loras(fused, [(path, 1.0)]) == NUM_LAYERS_PER_BLOCK * len(fused.blocks)
    wanted = run(made, inputs)
    torch.testing.assert_close(run(fused, inputs), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - run(network(), inputs)).abs().max() > 1e-3
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"rank": str(RANK)}
        is_released = all(".default.weight" in key for key in file.keys())  # noqa: SIM118
    assert is_released == (naming == "original")


@pytest.mark.parametrize("naming", ["diffusers", "original"])
@pytest.mark.parametrize("alpha", [RANK, 7.5])
def test_a_file_is_trained_further_from_where_it_was(
    tmp_path: Path, inputs: dict[str, Tensor], naming: str, alpha: float
) -> None:
    made = trained()
    path = tmp_path / "lora.safetensors"
    tensors = read_adapters(made)
    save_lora(
        path,
        tensors,
        strength=1,
        naming=naming,  # type: ignore[arg-type]
        dtype=torch.float32,
        metadata={},
    )
    further = with_lora(alpha)
    load_initial_lora(further, path, label="--init x", rank=RANK, alpha=alpha)
    torch.testing.assert_close(run(further, inputs), run(made, inputs), atol=1e-5, rtol=1e-5)


def initial_file(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(change(read_adapters(trained())), path)
    return path


def test_a_file_is_trained_further_over_packed_weights(tmp_path: Path) -> None:
    """bitsandbytes keeps two entries in a byte, in one column: no file seemed to fit that."""
    path = initial_file(tmp_path / "lora.safetensors", lambda tensors: tensors)
    packed = network()
    for layer in packed.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            data = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            layer.weight = torch.nn.Parameter(data, requires_grad=False)
    attach_lora(packed, rank=RANK, alpha=RANK, seed=0)
    load_initial_lora(packed, path, label="--init x", rank=RANK, alpha=RANK)
    torch.testing.assert_close(
        read_adapters(packed), read_adapters(trained()), rtol=1e-6, atol=1e-7
    )


def test_another_rank_is_refused(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value[: RANK - 1].clone() if ".lora_A." in key else value[:, : RANK - 1].clone()
            for key, value in tensors.items()
        }

    path = initial_file(tmp_path / "lora.safetensors", cut)
    with pytest.raises(SettingsError) as error:
        load_initial_lora(with_lora(), path, label="--init a", rank=RANK, alpha=RANK)
    assert str(error.value) == "--init a has rank 2, not 3. Give --rank 2."


def test_layers_that_are_not_trained_are_refused(tmp_path: Path) -> None:
    def extend(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inner = tiny.INNER_DIM
        return tensors | {
            "face_adapter.0.to_q.lora_A.weight": torch.zeros(RANK, inner),
            "face_adapter.0.to_q.lora_B.weight": torch.zeros(inner, RANK),
        }

    path = initial_file(tmp_path / "lora.safetensors", extend)
    with pytest.raises(SettingsError) as error:
        load_initial_lora(with_lora(), path, label="--init a", rank=RANK, alpha=RANK)
    assert str(error.value) == (
        "--init a has 2 matrices on layers that are not trained "
        "(first: face_adapter.0.to_q.lora_A.weight). "
        "Give a LoRA of the blocks' attention and feed-forward layers."
    )


def test_a_lora_of_another_network_is_refused(tmp_path: Path) -> None:
    path = initial_file(
        tmp_path / "lora.safetensors", lambda tensors: {f"x.{k}": v for k, v in tensors.items()}
    )
    with pytest.raises(WeightsError, match="no place in the network"):
        load_initial_lora(with_lora(), path, label="--init a", rank=RANK, alpha=RANK)


def test_every_name_of_a_saved_file_is_a_released_one(tmp_path: Path) -> None:
    tensors = read_adapters(trained())
    path = tmp_path / "lora.safetensors"
    save_lora(
        path, tensors, strength=1, naming="original", dtype=torch.bfloat16, metadata={"stage": "2"}
    )
    loaded = load_file(path)
    assert set(loaded) == {released_key(key) for key in tensors}
    assert {value.dtype for value in loaded.values()} == {torch.bfloat16}
