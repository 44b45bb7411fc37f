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
from everanimate_cli.safetensors_header import read_tensor_entries

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from everanimate_cli.lora import LoraShare, Shapes
    from everanimate_cli.model_folder import ModelSource
    from everanimate_cli.settings import LoraMode

# What is stored in fewer bits lies there; elsewhere weights are plain and LoRAs are fused.
_PACKED_IN = "blocks."


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


def attach_loras(
    network: nn.Module,
    loras: Sequence[tuple[Path, float]],
    network_shapes: Shapes,
    dtype: torch.dtype,
) -> int:
    """Let a network compute with LoRAs, its packed weights and those of its blocks untouched.

    Products for linear layers outside the blocks whose weights are plain, and whole differences,
    are added to the weights as `fuse_loras` does.

    Args:
        network: A network without adapters, before its weights are stored in fewer bits; changed
            in place.
        loras: As in `fuse_loras`.
        network_shapes: Shape by parameter name as if nothing were packed.
        dtype: Of the matrices: what the network computes in.

    Returns:
        Number of layers with an update beside them.

    Raises:
        WeightsError: As `plan_lora`, and if a file changes a packed weight in another way than by
            a product; the network is unchanged then.
    """
    found = plan_loras(loras, network_shapes)
    parameters = dict(network.named_parameters())
    beside = {name for name in found if _is_beside(network, name)}
    for name, shares in found.items():
        for share in shares:
            is_whole = len(share.update.keys) == 1
            if is_whole and not parameters[name].is_floating_point():
                path = loras[share.lora][0]
                raise WeightsError(
                    f"LoRA {path} changes whole weights ({share.update.keys[0]}), which are "
                    "packed in this transformer. Give a transformer that is not packed."
                )
    with LoraFiles(loras) as files:
        for name, shares in found.items():
            products = [each for each in shares if name in beside and len(each.update.keys) > 1]
            plain = [each for each in shares if each not in products]
            if plain:
                weight = parameters[name].data
                weight.copy_(files.fuse(plain, weight))
            if products:
                _attach(network, name.removesuffix(".weight"), products, files, dtype)
    return len(beside)


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
