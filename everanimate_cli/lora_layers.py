"""LoRAs beside the weights of a network instead of in them.

For weights that no product can be added to (packed as GGUF), or only by rounding them again (8 bits
in the file). Costs two small products per layer and step. Several LoRAs become one update, whose
rank is the sum of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.lora import LoraFiles, plan_loras
from everanimate_cli.safetensors_header import read_tensor_entries, read_tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from everanimate_cli.lora import LoraShare, Shapes
    from everanimate_cli.model_folder import ModelSource
    from everanimate_cli.settings import LoraMode

# What is stored in fewer bits lies there; elsewhere weights are plain and LoRAs are fused.
_PACKED_IN = "blocks."
_LINEAR_AXES = 2


def choose_lora_mode(mode: LoraMode, source: ModelSource) -> Literal["fused", "separate"]:
    """Whether LoRAs are added to the weights or computed beside them.

    "auto" fuses where weights are stored in 16 bits or more: what is stored in 8 bits only
    afterwards is as near to the sum then as to the weight before. What the file holds in 8 bits or
    less stays as it is.

    Args:
        mode: As asked for.
        source: From `hub.locate_model`.

    Raises:
        SettingsError: If packed weights would have to be changed.
    """
    files = source.weight_files("transformer")
    is_packed = any(path.suffix == ".gguf" for path in files)
    if mode == "fused" and is_packed:
        label = source.label_of("transformer")
        raise SettingsError(
            f"--lora-mode fused cannot change the packed weights of {label}. "
            "Give --lora-mode separate, or leave it out."
        )
    if mode != "auto":
        return mode
    in_8_bits = is_packed or any(
        entry.dtype.startswith("F8")
        for path in files
        if path.suffix == ".safetensors"
        for entry in read_tensor_entries(path).values()
    )
    return "separate" if in_8_bits else "fused"


class LowRankUpdate(nn.Module):
    """The product of two matrices, applied one after the other."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        """Take the matrices.

        Args:
            down: [rank, in].
            up: [out, rank], with all factors.
        """
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        outputs: Tensor = linear(linear(inputs.to(self.down.dtype), self.down), self.up)
        return outputs


class UpdatedLinear(nn.Module):
    """A linear layer, however it stores its weight, and an update that is computed beside it."""

    def __init__(self, base_layer: nn.Linear, update: LowRankUpdate) -> None:
        """Take both.

        Args:
            base_layer: Keeps its weight; what stores it in fewer bits finds it under this name.
            update: To be added to its output.
        """
        super().__init__()
        self.base_layer = base_layer
        self.update = update

    @property
    def weight(self) -> Tensor:
        """Of the layer, as if the update were not there."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        outputs: Tensor = self.base_layer(inputs)
        update: Tensor = self.update(inputs)
        return outputs + update.to(outputs.dtype)


def list_ranks(
    loras: Sequence[tuple[Path, float]], network_shapes: Shapes, packed: Container[str] = ()
) -> dict[str, int]:
    """Ranks of the updates that `attach_loras` computes beside layers, without loading any.

    Args:
        loras: As in `plan_loras`.
        network_shapes: Shape by parameter name as if nothing were packed.
        packed: Parameters that are.

    Returns:
        Rank of all LoRAs together, by parameter of the network.

    Raises:
        WeightsError: As `plan_lora`.
    """
    shapes = [read_tensor_shapes(path) for path, _ in loras]
    ranks: dict[str, int] = {}
    for name, shares in plan_loras(loras, network_shapes).items():
        is_linear = name.endswith(".weight") and len(network_shapes[name]) == _LINEAR_AXES
        if is_linear and (name.startswith(_PACKED_IN) or name in packed):
            rank = sum(
                shapes[share.lora][share.update.keys[0]][0]
                for share in shares
                if len(share.update.keys) > 1
            )
            if rank:
                ranks[name] = rank
    return ranks


def update_shapes(ranks: Mapping[str, int], network_shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that `attach_loras` puts beside layers, by parameter name.

    Args:
        ranks: Of the updates by parameter of the network, from `list_ranks`.
        network_shapes: As there.
    """
    result: dict[str, tuple[int, ...]] = {}
    for name, rank in ranks.items():
        num_out, num_in = network_shapes[name]
        module = name.removesuffix(".weight")
        result[f"{module}.update.down"] = (rank, num_in)
        result[f"{module}.update.up"] = (num_out, rank)
    return result


def attach_loras(
    network: nn.Module,
    loras: Sequence[tuple[Path, float]],
    network_shapes: Shapes,
    dtype: torch.dtype,
) -> int:
    """Let a network compute with LoRAs, its packed weights and those of its blocks untouched.

    Products for linear layers outside the blocks whose weights are plain, and whole differences,
    are added to the weights, see `LoraFiles.fuse`.

    Args:
        network: A network without adapters, before its weights are stored in fewer bits; changed
            in place.
        loras: As in `plan_loras`.
        network_shapes: Shape by parameter name as if nothing were packed.
        dtype: Of the matrices: what the network computes in.

    Returns:
        Number of layers with an update beside them.

    Raises:
        WeightsError: As `plan_lora`, and if a file changes a packed weight in another way than by
            a product; the network is unchanged then.
    """
    parameters = dict(network.named_parameters())
    with SeparateLoras(network, loras, network_shapes, dtype) as separate:
        for name in separate.changed:
            weight = parameters[name].data
            weight.copy_(separate.change(name, weight))
        separate.attach("", network)
        return len(separate.beside)


class SeparateLoras(LoraFiles):
    """LoRAs for a network whose weights may come one by one, see `attach_loras`.

    Attributes:
        changed: Weights that something is added to, by their names.
        beside: Weights of layers that get an update beside them.
    """

    def __init__(
        self,
        network: nn.Module,
        loras: Sequence[tuple[Path, float]],
        network_shapes: Shapes,
        dtype: torch.dtype,
    ) -> None:
        """Open the files.

        Args:
            network: As in `attach_loras`, and not changed; its weights may be on "meta".
            loras: As in `attach_loras`.
            network_shapes: As in `attach_loras`.
            dtype: As in `attach_loras`.

        Raises:
            WeightsError: As `attach_loras`.
        """
        found = plan_loras(loras, network_shapes)
        parameters = dict(network.named_parameters())
        self.changed: dict[str, list[LoraShare]] = {}
        self.beside: dict[str, list[LoraShare]] = {}
        for name, shares in found.items():
            is_beside = _is_beside(network, name)
            for share in shares:
                is_whole = len(share.update.keys) == 1
                if is_whole and not parameters[name].is_floating_point():
                    path = loras[share.lora][0]
                    raise WeightsError(
                        f"LoRA {path} changes whole weights ({share.update.keys[0]}), which are "
                        "packed in this transformer. Give a transformer that is not packed."
                    )
                group = self.beside if is_beside and not is_whole else self.changed
                group.setdefault(name, []).append(share)
        super().__init__(loras)
        self._dtype = dtype

    def change(self, name: str, weight: Tensor) -> Tensor:
        """What becomes of a weight."""
        return self.fuse(self.changed[name], weight) if name in self.changed else weight

    def attach(self, prefix: str, part: nn.Module) -> None:
        """Put the updates beside the layers of a part of the network, whose weights are there.

        Args:
            prefix: Name of the part, such as "blocks.0"; empty for the network.
            part: Changed in place.
        """
        start = f"{prefix}." if prefix else ""
        for name, shares in self.beside.items():
            if name.startswith(start):
                module = name.removeprefix(start).removesuffix(".weight")
                _attach(part, module, shares, self, self._dtype)


def _is_beside(network: nn.Module, parameter: str) -> bool:
    """Whether products for a parameter are computed beside its layer."""
    module, _, kind = parameter.rpartition(".")
    layer = network.get_submodule(module)
    if kind != "weight" or not isinstance(layer, nn.Linear):
        return False
    return module.startswith(_PACKED_IN) or not layer.weight.is_floating_point()


def _attach(
    network: nn.Module,
    module: str,
    shares: Sequence[LoraShare],
    files: LoraFiles,
    dtype: torch.dtype,
) -> None:
    """Put an update beside a layer."""
    parent, _, name = module.rpartition(".")
    layer = network.get_submodule(module)
    assert isinstance(layer, nn.Linear)
    device = layer.weight.device
    pairs = [files.read(share) for share in shares]
    down = torch.cat([down.to(device).float() for down, _ in pairs])
    up = torch.cat(
        [
            share.factor * up.to(device).float()
            for share, (_, up) in zip(shares, pairs, strict=True)
        ],
        dim=1,
    )
    update = LowRankUpdate(down.to(dtype), up.to(dtype))
    network.get_submodule(parent).register_module(name, UpdatedLinear(layer, update))
