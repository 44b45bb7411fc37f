"""Weights that have a home and are lent: of tensors, of tensors made of others, and in files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn

from everanimate_cli import main_memory
from everanimate_cli.main_memory import PinnedMemory
from everanimate_cli.waiting import WaitingWeights

CPU = torch.device("cpu")


class Halves(Tensor):
    """A weight of a number and a scale, as torchao stores it; and these may be such themselves."""

    number: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, number: Tensor, scale: Tensor) -> "Halves":
        return Tensor._make_wrapper_subclass(cls, number.shape, dtype=scale.dtype)

    def __init__(self, number: Tensor, scale: Tensor) -> None:
        self.number, self.scale = number, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["number", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "Halves":
        return Halves(inner["number"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].number, args[0].scale)
        plain = [
            each.number.to(each.scale.dtype) * each.scale if isinstance(each, Halves) else each
            for each in args
        ]
        return func(*plain, **(kwargs or {}))


def wrapped_layer() -> nn.Linear:
    layer = nn.Linear(3, 2).requires_grad_(False)
    number = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)
    layer.weight = nn.Parameter(Halves(number, torch.tensor(0.5)), requires_grad=False)
    return layer


def test_a_weight_of_several_tensors_is_lent_and_taken_back() -> None:
    layer, given = wrapped_layer(), torch.ones(1, 3)
    expected = torch.tensor([[1.0, 1.5]]) + layer.bias
    home = layer.weight.number.data_ptr()
    waiting = WaitingWeights(layer)
    assert [tuple(part.shape) for part in waiting.read()] == [(2, 3), (), (2,)]
    assert waiting.num_bytes == 6 + 4 + 8
    waiting.bring(CPU)
    assert layer.weight.number.data_ptr() != home
    assert not layer.weight.requires_grad
    assert torch.equal(layer(given), expected)
    waiting.recall()
    assert layer.weight.number.data_ptr() == home
    waiting.pin(PinnedMemory(lambda size: torch.empty(size, dtype=torch.uint8)))
    pinned = layer.weight.number.data_ptr()
    assert pinned != home
    waiting.bring(CPU)
    waiting.recall()
    assert layer.weight.number.data_ptr() == pinned
    assert torch.equal(layer(given), expected)


def test_a_file_is_read_for_each_use_and_nothing_else_is_kept(tmp_path: Path) -> None:
    layer = nn.Sequential(
        nn.Linear(3, 2, dtype=torch.float8_e4m3fn, device="meta"), nn.Linear(4, 4)
    )
    layer[0].weight = nn.Parameter(torch.ones(2, 3).to(torch.float8_e4m3fn), requires_grad=False)
    layer[0].bias = None
    layer.register_buffer("table", torch.arange(3))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    waiting = WaitingWeights(layer)
    waiting.move_to_file(tmp_path / "a.safetensors")
    for _ in range(2):
        for key, value in layer.state_dict().items():
            assert (value.shape, value.dtype) == (before[key].shape, before[key].dtype)
            assert value.untyped_storage().nbytes() <= 8
        waiting.bring(CPU)
        for key, value in layer.state_dict().items():
            assert torch.equal(value.float(), before[key].float())
        waiting.recall()


def test_a_weight_in_two_places_is_moved_once() -> None:
    layer = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    layer[1].weight = layer[0].weight
    waiting = WaitingWeights(layer)
    assert len(waiting.read()) == 1
    waiting.bring(CPU)
    assert layer[1].weight is layer[0].weight


def test_pinning_lets_go_of_each_weight_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 32 GiB must not need twice as much."""
    monkeypatch.setattr(main_memory, "PINNED_PIECE", 1)
    layers = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(4)])
    weights = list(layers.requires_grad_(False).parameters())
    values = [weight.clone() for weight in weights]
    homes = [weight.data_ptr() for weight in weights]
    num_kept: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        kept = (weight.data_ptr() == home for weight, home in zip(weights, homes, strict=True))
        num_kept.append(sum(kept))
        return torch.empty(num_bytes, dtype=torch.uint8)

    waiting = WaitingWeights(layers)
    waiting.pin(PinnedMemory(allocate))
    assert num_kept == [4, 3, 2, 1]
    assert all(torch.equal(*pair) for pair in zip(waiting.read(), values, strict=True))
    waiting.bring(CPU)
    waiting.recall()
    assert all(torch.equal(*pair) for pair in zip(weights, values, strict=True))


def test_packed_weights_that_lie_in_one_piece_wait_in_a_file(tmp_path: Path) -> None:
    """Parts of a larger weight share its memory: safetensors looks at the last element of each."""
    kind = gguf.GGMLQuantizationType.Q8_0
    values = np.linspace(-3, 3, 4 * 32, dtype=np.float32).reshape(4, 32)
    both = GGUFParameter(torch.from_numpy(gguf.quants.quantize(values, kind)), quant_type=kind)
    layer = nn.Sequential(*(GGUFLinear(32, 2, compute_dtype=torch.float32) for _ in range(2)))
    for each, part in zip(layer, both.chunk(2), strict=True):
        each.weight = GGUFParameter(part, quant_type=kind)
    given = torch.ones(1, 32)
    expected = [each(given) for each in layer]
    waiting = WaitingWeights(layer)
    waiting.move_to_file(tmp_path / "a.safetensors")
    assert all(each.weight.untyped_storage().nbytes() == 1 for each in layer)
    for _ in range(2):
        waiting.bring(CPU)
        for each, value in zip(layer, expected, strict=True):
            assert type(each.weight) is GGUFParameter
            assert torch.equal(each(given), value)
        waiting.recall()


def test_only_what_is_pinned_is_copied_while_the_program_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file the mapping was given up during the copy: a card may read it by itself."""
    layer = nn.Linear(3, 2)
    pinned = {layer.weight.data_ptr()}
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    to = Tensor.to
    asked: dict[tuple[int, ...], bool] = {}

    def note(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if "copy" in options:
            asked[tuple(tensor.shape)] = options["non_blocking"]
        return to(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "to", note)
    waiting = WaitingWeights(layer)
    waiting.bring(CPU)
    assert asked == {(2, 3): True, (2,): False}
    waiting.recall()
    waiting.move_to_file(tmp_path / "a.safetensors")
    waiting.bring(CPU)
    assert asked == {(2, 3): False, (2,): False}


def tied_layers() -> nn.Sequential:
    """Two weights of the same data, one of a part of it, and one of the same read otherwise."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).requires_grad_(False)
    data = layers[0].weight.data
    layers[1].weight = nn.Parameter(data.view(4, 4), requires_grad=False)
    layers[2].weight = nn.Parameter(data[1:3], requires_grad=False)
    layers[3].weight = nn.Parameter(data.T, requires_grad=False)
    return layers


def addresses(network: nn.Module) -> list[int]:
    return [weight.data_ptr() for weight in network.parameters()]


@pytest.mark.parametrize("home", ["memory", "pinned", "file"])
def test_weights_that_share_memory_are_kept_and_lent_once(tmp_path: Path, home: str) -> None:
    """safetensors refused them: offloading to disk ended in a RuntimeError."""
    layers = tied_layers()
    values = [weight.clone() for weight in layers.parameters()]
    waiting = WaitingWeights(layers)
    assert waiting.num_bytes == 4 * (16 + 8 + 16)
    if home == "pinned":
        waiting.pin(PinnedMemory(lambda size: torch.empty(size, dtype=torch.uint8)))
        assert addresses(layers)[0] == addresses(layers)[1]
    if home == "file":
        waiting.move_to_file(tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").stat().st_size < 4 * 40 + 400
        assert all(each.untyped_storage().nbytes() == 4 for each in layers.parameters())
    for _ in range(2):
        waiting.bring(CPU)
        weights = list(layers.parameters())
        assert all(torch.equal(*pair) for pair in zip(weights, values, strict=True))
        places = addresses(layers)
        assert places[0] == places[1]
        assert len(set(places)) == 3
        waiting.recall()
