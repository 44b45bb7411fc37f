"""Linear layers whose weights are kept in 8 bits and widened for each product."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from everanimate_cli.transformer import EverAnimateTransformer3DModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FP8_DTYPE = torch.float8_e4m3fn

_OPERATORS = torch.library.Library("everanimate", "DEF")
_OPERATORS.define("widen(Tensor weight, ScalarType dtype) -> Tensor")
_OPERATORS.impl("widen", lambda weight, dtype: weight.to(dtype), "CompositeExplicitAutograd")
_OPERATORS.impl("widen", lambda weight, dtype: torch.empty_like(weight, dtype=dtype), "Meta")


class NarrowLinear(nn.Linear):
    """A linear layer that stores weight and bias in 8 bits and computes in its inputs' dtype.

    Names in the state dict are those of `nn.Linear`. Nothing but this call knows of it, so that a
    compiled block has no break in it, and what moves weights or adds LoRAs beside them needs no
    care.

    Attributes:
        widens_outside: Whether compiled code leaves the widening to torch's own kernel.
    """

    widens_outside: bool = False

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        device_type, dtype = inputs.device.type, inputs.dtype
        if torch.is_autocast_enabled(device_type):  # which would otherwise widen twice
            dtype = torch.get_autocast_dtype(device_type)
        bias = None if self.bias is None else self._widen(self.bias, dtype)
        return linear(inputs, self._widen(self.weight, dtype), bias)

    def _widen(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.widens_outside:
            return torch.ops.everanimate.widen(weight, dtype)
        return weight.to(dtype)


def store_blocks_as_fp8(network: EverAnimateTransformer3DModel) -> None:
    """Keep the blocks' linear layers in 8 bits; each computes in the network's own dtype.

    Half the memory of bfloat16, a quarter of float32. Norms and tables stay as they are. To be
    called before adapters are attached, which are not stored so.

    Source: the numbers are those of diffusers' layerwise casting, whose hooks cast a weight back
    after each call and cannot be compiled.
    """
    for block in network.blocks:
        store_as_fp8(block)


def store_as_fp8(block: nn.Module) -> None:
    """As `store_blocks_as_fp8`, one block; changed in place."""
    skipped = EverAnimateTransformer3DModel._skip_layerwise_casting_patterns
    for layer in list(_linear_layers(block, skipped)):
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(FP8_DTYPE)
        layer.__class__ = NarrowLinear


def widen_outside(network: nn.Module) -> None:
    """Let compiled code call torch's own kernel to widen weights.

    For cards older than compute capability 8.9: Triton knows no float8_e4m3fn there, and only the
    newest releases of torch work around it.
    """
    for layer in network.modules():
        if isinstance(layer, NarrowLinear):
            layer.widens_outside = True


def _linear_layers(
    module: nn.Module, skipped: Sequence[str], prefix: str = ""
) -> Iterator[nn.Linear]:
    """Plain linear layers in a module, but for those in parts with such names."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if any(re.search(pattern, path) for pattern in skipped):
            continue
        if type(child) is nn.Linear:
            yield child
        else:
            yield from _linear_layers(child, skipped, path)
