"""Build a network from weights that its library does not load by itself.

These are the original layout, and single files of the transformer: in plain numbers, in 8 bits, or
packed as GGUF. The headers have been checked before (`checkpoint.check_checkpoint`).
"""

from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights

from everanimate_cli.checkpoint import (
    KINDS,
    build_empty,
    dtype_in_memory,
    one_name,
    packed_weights,
    refuse_misfits,
)
from everanimate_cli.errors import WeightsError
from everanimate_cli.library_logs import quiet_libraries
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.offloading import STREAMED
from everanimate_cli.stored_weights import LoadedTensors, load_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

# A kernel is published in the precision of the other weights; its entries are n / 64.
_KERNEL_TOLERANCE = 1e-3


def assemble(
    source: ModelSource,
    name: str,
    dtype: torch.dtype,
    *,
    change: Callable[[str, Tensor], Tensor] | None = None,
    finish: Callable[[str, nn.Module], None] | None = None,
) -> nn.Module:
    """Load one network, the blocks of a transformer one after the other.

    Files are mapped where they can be, not read: memory is taken by what is in another dtype there,
    or comes out of `change`, and by no more than one block before `finish` stores it in less.

    Args:
        source: From `hub.locate_model`; checked by `check_checkpoint`.
        name: Of the network.
        dtype: As in `weights.load_pipeline`.
        change: What becomes of each weight, given its name and the weight in its dtype. Not for
            GGUF.
        finish: Called with each block and face adapter when its weights are there, under its name
            such as "blocks.0". Not for GGUF.

    Returns:
        The network in evaluation mode on the CPU. Linear layers of a GGUF file stay packed and
        compute in `dtype`.

    Raises:
        WeightsError: If a file is damaged, or a weight is missing or left over.
    """
    with quiet_libraries():
        loaded = load_tensors(source, name)
        loaded = replace(
            loaded,
            tensors={one_name(key): tensor for key, tensor in loaded.tensors.items()},
        )
        if source.weight_files(name)[0].suffix == ".gguf":
            network = _build_packed(source, loaded.tensors, dtype)
        else:
            network = _build(source, name, loaded, dtype, change or _leave, finish or _keep)
    if loaded.kernels:
        _check_kernels(source, network, loaded.kernels.values())
    return network.eval()


def _leave(_key: str, weight: Tensor) -> Tensor:
    return weight


def _keep(_name: str, _module: nn.Module) -> None:
    pass


def _build(
    source: ModelSource,
    name: str,
    loaded: LoadedTensors,
    dtype: torch.dtype,
    change: Callable[[str, Tensor], Tensor],
    finish: Callable[[str, nn.Module], None],
) -> nn.Module:
    kind = KINDS[name]
    empty = build_empty(source, name)
    with init_empty_weights():  # of parameters alone: buffers get their values
        if kind.config_class is None:
            network = kind.network_class.from_config(empty.config)
        else:
            network = kind.network_class(empty.config)
    own_keys = list(network.state_dict())
    known = {one_name(key) for key in own_keys}
    _refuse_rest(
        source,
        name,
        [key for key in own_keys if one_name(key) not in loaded.tensors],
        [key for key in loaded.tensors if key not in known],
    )

    def fill(module: nn.Module, prefix: str, keys: Sequence[str]) -> None:
        state = {
            key.removeprefix(prefix): change(
                key, loaded.plain(one_name(key), dtype_in_memory(name, key, dtype))
            )
            for key in keys
        }
        for key in keys:
            loaded.tensors.pop(one_name(key), None)  # one of two names may be gone already
        module.load_state_dict(state, assign=True, strict=False)
        module.requires_grad_(False)

    units: dict[str, list[str]] = {}
    for key in own_keys:
        units.setdefault(_unit_of(key) if name == "transformer" else "", []).append(key)
    fill(network, "", units.pop("", []))
    for unit, keys in units.items():
        module = network.get_submodule(unit)
        fill(module, f"{unit}.", keys)
        finish(unit, module)
    if hasattr(network, "tie_weights"):
        network.tie_weights()
    return cast("nn.Module", network)


def _unit_of(key: str) -> str:
    """The block or face adapter that a weight of the transformer is in, or nothing."""
    list_name, _, rest = key.partition(".")
    return f"{list_name}.{rest.partition('.')[0]}" if list_name in STREAMED else ""


def _build_packed(source: ModelSource, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The transformer of a GGUF file, by diffusers' quantiser."""
    from diffusers import GGUFQuantizationConfig  # noqa: PLC0415  # need the package gguf
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor  # noqa: PLC0415

    empty: Any = build_empty(source, "transformer")
    packed = packed_weights(source)
    state = {}
    for key, parameter in empty.state_dict().items():
        tensor = tensors.pop(key, None)
        if tensor is None:
            _refuse_rest(source, "transformer", [key], {})
        elif key in packed:
            state[key] = tensor
        else:
            # diffusers would put the bytes into layers that take them for numbers.
            plain = dequantize_gguf_tensor(tensor).reshape(parameter.shape)
            state[key] = plain.to(dtype_in_memory("transformer", key, dtype))
    _refuse_rest(source, "transformer", [], tensors)
    with TemporaryDirectory() as folder:
        empty.save_config(folder)
        network = type(empty).from_single_file(
            state,
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
        )
    return cast("nn.Module", network)


def _refuse_rest(
    source: ModelSource, name: str, missing: list[str], left_over: Iterable[str]
) -> None:
    refuse_misfits(source, name, missing=missing, unexpected=left_over, reshaped=())


def _check_kernels(source: ModelSource, network: nn.Module, kernels: Iterable[Tensor]) -> None:
    """Refuse a motion encoder that was trained with other blur kernels than the network makes."""
    own = next(b for key, b in network.named_buffers() if key.endswith("blur_kernel"))
    for kernel in kernels:
        difference = kernel.float() - own.float()
        if kernel.shape != own.shape or difference.abs().max() > _KERNEL_TOLERANCE:
            raise WeightsError(
                f"{source.label_of('transformer')}: the motion encoder has other blur kernels than "
                "that of Wan2.2-Animate. Give a complete Wan2.2-Animate checkpoint."
            )
