"""Linear layers in 8 bits: the same numbers as by diffusers' hooks, and one graph when compiled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.hooks import apply_layerwise_casting
from graphs import CountingBackend
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from everanimate_cli import acceleration
from everanimate_cli.acceleration import compile_blocks
from everanimate_cli.lora_adapter import attach_lora, lora_parameters
from everanimate_cli.lora_layers import attach_loras
from everanimate_cli.narrow_linear import (
    FP8_DTYPE,
    NarrowLinear,
    store_blocks_as_fp8,
    widen_outside,
)
from everanimate_cli.offloading import stream_blocks
from everanimate_cli.transformer import EverAnimateTransformer3DModel

CPU = torch.device("cpu")


def build(dtype: torch.dtype = torch.bfloat16) -> EverAnimateTransformer3DModel:
    return tiny.build_tiny_pipeline(dtype=dtype).transformer


def store_by_hooks(network: EverAnimateTransformer3DModel) -> None:
    apply_layerwise_casting(
        network.blocks,
        storage_dtype=FP8_DTYPE,
        compute_dtype=network.dtype,
        skip_modules_pattern=tuple(network._skip_layerwise_casting_patterns),
    )


def velocity(network: EverAnimateTransformer3DModel) -> Tensor:
    return network(**tiny.draw_inputs(cells=(4, 6), dtype=network.dtype))


def add_separate_lora(network: nn.Module, folder: Path) -> None:
    """On a self attention and a feed-forward layer, beside their weights."""
    generator = torch.Generator().manual_seed(1)
    sides = {"blocks.1.attn1.to_q": (48, 48), "blocks.2.ffn.net.2": (96, 48)}
    matrices = {}
    for name, (num_in, num_out) in sides.items():
        matrices[f"{name}.lora_A.weight"] = torch.randn(4, num_in, generator=generator)
        matrices[f"{name}.lora_B.weight"] = torch.randn(num_out, 4, generator=generator)
    save_file(matrices, folder / "lora.safetensors")
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert attach_loras(network, [(folder / "lora.safetensors", 1.0)], shapes, torch.bfloat16) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_lora", [False, True])
@torch.no_grad()
def test_numbers_and_names_are_those_of_diffusers_hooks(
    dtype: torch.dtype, with_lora: bool, tmp_path: Path
) -> None:
    expected, network = build(dtype), build(dtype)
    if with_lora:
        for each in (expected, network):
            add_separate_lora(each, tmp_path)
    plain = velocity(network)
    store_by_hooks(expected)
    store_blocks_as_fp8(network)
    made, wanted = network.state_dict(), expected.state_dict()
    assert {key: value.dtype for key, value in made.items()} == {
        key: value.dtype for key, value in wanted.items()
    }
    assert_close(made, wanted, rtol=0, atol=0)
    assert network.dtype == dtype
    assert torch.equal(velocity(network), velocity(expected))
    assert not torch.equal(velocity(network), plain)
    narrow = [part for part in network.modules() if isinstance(part, NarrowLinear)]
    assert len(narrow) == 12 * len(network.blocks)  # base layers of those with a LoRA included
    # A copy, as of networks that processes share, is one too.
    assert torch.equal(velocity(copy.deepcopy(network)), velocity(network))


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_adapters_are_those_of_diffusers_hooks(autocast: bool) -> None:
    gradients = []
    for store in (store_by_hooks, store_blocks_as_fp8):
        network = build(torch.float32 if autocast else torch.bfloat16)
        network.requires_grad_(False)
        store(network)
        attach_lora(network, rank=2, alpha=2.0, seed=0)
        for key, parameter in lora_parameters(network).items():
            if ".lora_B." in key:
                parameter.data.fill_(0.01)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            velocity(network).float().square().mean().backward()
        gradients.append({key: value.grad for key, value in lora_parameters(network).items()})
        assert not any(value.grad is not None for value in network.blocks[0].norm2.parameters())
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert max(float(each.abs().max()) for each in gradients[1].values()) > 0


# --- compiled ------------------------------------------------------------------------------------


def inputs_of_block(network: EverAnimateTransformer3DModel) -> tuple[Any, ...]:
    """What the first block is called with."""
    given: list[tuple[Any, ...]] = []
    handle = network.blocks[0].register_forward_pre_hook(lambda _m, args: given.append(args))
    velocity(network)
    handle.remove()
    return given[0]


@torch.no_grad()
def test_a_compiled_block_has_no_break() -> None:
    network = build()
    store_blocks_as_fp8(network)
    given = inputs_of_block(network)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(network.blocks[0])(*given)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize(("streamed", "with_lora"), [(False, False), (True, True)])
@torch.no_grad()
def test_all_blocks_share_one_compiled_graph(
    streamed: bool, with_lora: bool, tmp_path: Path
) -> None:
    network = build()
    if with_lora:
        add_separate_lora(network, tmp_path)
    store_blocks_as_fp8(network)
    expected = velocity(network)
    if streamed:
        stream_blocks(network, CPU)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = CountingBackend()
    compile_blocks(network, backend)
    for _ in range(2):
        assert_close(velocity(network), expected, rtol=0, atol=0.02)
    # A block, a face adapter; and blocks 1 and 2, of which each has a LoRA elsewhere.
    assert len(backend.called) == (4 if with_lora else 2)
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_on_older_cards_torch_itself_widens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no float8_e4m3fn below compute capability 8.9."""

    def compiled_for(*capability: int) -> tuple[EverAnimateTransformer3DModel, CountingBackend]:
        network, backend = build(), CountingBackend()
        store_blocks_as_fp8(network)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(acceleration, "_capability", lambda _: capability)
            compile_blocks(network, backend)
        return network, backend

    network, _ = compiled_for(8, 9)
    assert not network.blocks[0].attn1.to_q.widens_outside
    torch._dynamo.reset()
    network, backend = compiled_for(8, 6)
    eager = build()
    store_blocks_as_fp8(eager)
    assert_close(velocity(network), velocity(eager), rtol=0, atol=0.02)
    assert any("everanimate.widen" in name for name in backend.called[0])
    assert len(backend.called) == 2


def test_compiled_gradients_of_adapters_are_the_same() -> None:
    """Of a block that inductor compiles, in float32: all gradients as one vector."""

    def learn(*, compiled: bool) -> Tensor:
        network = build(torch.float32)
        store_blocks_as_fp8(network)
        attach_lora(network, rank=3, alpha=3, seed=0)
        parameters = list(lora_parameters(network).values())
        generator = torch.Generator().manual_seed(1)
        for parameter in parameters:  # of fresh adapters, one side is zero
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        network.train()
        if compiled:
            network.blocks[1].compile()
        velocity(network).square().sum().backward()
        return torch.cat([each.grad.flatten() for each in parameters if each.grad is not None])

    expected = learn(compiled=False)
    made = learn(compiled=True)
    assert expected.norm() > 1
    assert (made - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
def test_widening_by_its_own_operator_is_the_same() -> None:
    network = build()
    store_blocks_as_fp8(network)
    expected = velocity(network)
    widen_outside(network)
    assert torch.equal(velocity(network), expected)
    # Of a dtype that these checks can compute with.
    given = (torch.ones(3, 2, dtype=torch.float16), torch.float32)
    torch.library.opcheck(torch.ops.everanimate.widen.default, given)
