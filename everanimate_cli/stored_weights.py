"""What the weight files of a checkpoint hold, under the names that diffusers and transformers use.

Reads every form that a checkpoint may come in: safetensors, pickles of the original layout (with
`weights_only`, so that no code in them is run), single files of the transformer with weights in
8 bits, and GGUF. Everything can be asked without reading a weight: tensors on device "meta" have a
shape and a dtype, and no content.
"""

from __future__ import annotations

import functools
import pickle
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from everanimate_cli.errors import WeightsError
from everanimate_cli.gguf_header import read_gguf_header
from everanimate_cli.model_folder import ModelSource, list_first
from everanimate_cli.original_names import (
    BLUR_KERNEL,
    describe,
    from_original,
    has_original_names,
    strip_prefix,
)
from everanimate_cli.safetensors_header import read_tensor_entries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    Tensors = dict[str, Tensor]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What torch raises for files that are damaged, or none of its own.
_PICKLE_ERRORS = (
    *(RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    zipfile.BadZipFile,
)
_SCALES = (".scale_weight", ".weight_scale")  # in the naming of ComfyUI, old and new
# How ComfyUI marks such a file, and the scales for multiplying in 8 bits, which is not done here.
_MARKS = ("scaled_fp8",)
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True)
class Stored:
    """One weight as its file holds it.

    Attributes:
        shape: Of the weight.
        packed_bytes: How much of it stays in memory if it is loaded as it is packed; None for
            numbers that torch has.
    """

    shape: tuple[int, ...]
    packed_bytes: int | None = None


@dataclass(frozen=True)
class LoadedTensors:
    """The content of weight files.

    Attributes:
        tensors: Weights by the names of diffusers and transformers, as they are stored.
        kernels: Blur kernels of the motion encoder, which the network makes itself.
        scales: What weights in 8 bits are to be multiplied by, of their shapes.
    """

    tensors: Tensors
    kernels: Tensors
    scales: Tensors = field(default_factory=dict)

    def plain(self, key: str, dtype: torch.dtype) -> Tensor:
        """A weight to compute with: times its scale, where it has one.

        The product is formed in float32 and rounded once; without a scale nothing is rounded in
        float16, bfloat16 and float32, which hold all numbers of 8 bits.
        """
        tensor = self.tensors[key]
        if key in self.scales:
            tensor = tensor.float() * self.scales[key]
        return tensor.to(dtype)


def read_stored(source: ModelSource, name: str) -> dict[str, Stored]:
    """What the files of a network hold, without reading a weight.

    Args:
        source: From `hub.locate_model`.
        name: Of the network, as its folder in diffusers layout.

    Returns:
        Weights by the names of diffusers and transformers.

    Raises:
        WeightsError: If a file is missing, damaged or of another format.
    """
    paths = source.weight_files(name)
    if not is_converted(source, name):
        return {
            key: Stored(entry.shape)
            for path in paths
            for key, entry in read_tensor_entries(path).items()
        }
    if paths[0].suffix == ".gguf":
        return _read_stored_gguf(source, paths[0])
    loaded = load_tensors(source, name, device="meta")
    return {key: Stored(tuple(tensor.shape)) for key, tensor in loaded.tensors.items()}


def is_converted(source: ModelSource, name: str) -> bool:
    """Whether weights have other names or another form than their library loads by itself."""
    is_single_file = name == "transformer" and source.transformer is not None
    return is_single_file or source.layout == "original"


def read_description(source: ModelSource, name: str) -> dict[str, Any]:
    """The config of a network: its `config.json`, or what the shapes of its weights say.

    Raises:
        WeightsError: If there is none, or the network is another one.
    """
    if source.has_config(name):
        return source.read_config(name)
    shapes = {key: stored.shape for key, stored in read_stored(source, name).items()}
    return describe(name, shapes, source.label_of(name))


def load_tensors(source: ModelSource, name: str, *, device: str = "cpu") -> LoadedTensors:
    """Read the weights of a network, which are mapped as far as they are stored plainly.

    Args:
        source: From `hub.locate_model`.
        name: Of the network, as its folder in diffusers layout.
        device: "cpu", or "meta" to read no weights.

    Raises:
        WeightsError: If a file is missing, damaged, of another format, or packed in a way that is
            not known here.
    """
    label = source.label_of(name)
    found: Tensors = {}
    scales: Tensors = {}
    for path in source.weight_files(name):
        found |= _read_file(path, device)
    if name == "transformer":
        num_found = len(found)
        found = {strip_prefix(key): tensor for key, tensor in found.items()}
        if len(found) != num_found:
            raise WeightsError(
                f"{label}: {num_found - len(found)} weights of the transformer are there twice, "
                "under two names. Give a complete Wan2.2-Animate checkpoint."
            )
        _refuse_whole_numbers(found, label)
        found, scales = _split_scales(found, label)
    if scales and device != "meta":
        # They go the way of their weights, which may be renamed and split.
        beside = {
            key: scales.get(key, torch.empty(tensor.shape, device="meta"))
            for key, tensor in found.items()
        }
        converted = _convert(name, beside, label).tensors
        scales = {key: scale for key, scale in converted.items() if scale.device.type != "meta"}
    loaded = _convert(name, found, label)
    return replace(loaded, scales=scales)


def _convert(name: str, found: Tensors, label: str) -> LoadedTensors:
    kernels: Tensors = {}
    if name != "transformer" or has_original_names(list(found)):
        kernels = {key: found.pop(key) for key in list(found) if key.endswith(BLUR_KERNEL)}
        found = from_original(name, found, label)
    return LoadedTensors(found, kernels)


# --- files ---------------------------------------------------------------------------------------


def _read_file(path: Path, device: str) -> Tensors:
    if path.suffix == ".pth":
        return _read_pickle(path, device)
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if device != "meta":
        return load_file(path)
    entries = read_tensor_entries(path)
    unknown = [f"{key} of type {e.dtype}" for key, e in entries.items() if e.dtype not in _DTYPES]
    if unknown:
        raise WeightsError(
            f"{path} holds tensors of a type that torch has not ({list_first(unknown)}). "
            "Give a file in another format."
        )
    return {
        key: torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="meta")
        for key, entry in entries.items()
    }


def _read_pickle(path: Path, device: str) -> Tensors:
    """The state dict in a file of `torch.save`."""
    try:
        # On "meta" only the names are unpickled; else the weights are mapped, not copied.
        is_mapped = device == "cpu" and _can_be_mapped(path)
        found = torch.load(path, map_location=device, weights_only=True, mmap=is_mapped)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than weights, which could run code. Give the published file."
        ) from error
    except _PICKLE_ERRORS as error:
        raise WeightsError(f"{path} is damaged or no file of torch. Download it again.") from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in found.items()
    ):
        raise WeightsError(f"{path} holds no plain weights. Give the published file.")
    return found


def _can_be_mapped(path: Path) -> bool:
    """Whether tensors lie in a file of torch as they are: not compressed, nor the older format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())


# --- weights in 8 bits ---------------------------------------------------------------------------


def _refuse_whole_numbers(found: Tensors, label: str) -> None:
    """Refuse weights that are packed in a way that only another program knows."""
    strange = [
        key
        for key, tensor in found.items()
        # A tensor of GGUF is bytes, of which `quant_type` says what they mean.
        if not tensor.is_floating_point()
        and not hasattr(tensor, "quant_type")
        and not key.endswith((*_MARKS, *_UNUSED))
    ]
    if strange:
        raise WeightsError(
            f"{label} holds {len(strange)} weights as whole numbers ({list_first(strange)}), "
            "packed in an unknown way. Give a file with float8 weights, or GGUF."
        )


def _split_scales(found: Tensors, label: str) -> tuple[Tensors, Tensors]:
    """The weights, and the scales of those in 8 bits, expanded to their shapes without a copy."""
    plain: Tensors = {}
    scales: Tensors = {}
    for key, tensor in found.items():
        module, _, end = key.rpartition(".")
        weight = found.get(f"{module}.weight")
        if key in _MARKS or (weight is not None and f".{end}" in _UNUSED):
            continue
        if weight is not None and f".{end}" in _SCALES:
            scale = _fit_scale(tensor, weight, f"{label}: {module}.weight")
            scales[f"{module}.weight"] = scale.expand(weight.shape)
            continue
        plain[key] = tensor
    return plain, scales


def _fit_scale(scale: Tensor, weight: Tensor, label: str) -> Tensor:
    """One number for the weight, or one for each of its rows."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    if weight.ndim and scale.numel() == weight.shape[0]:
        return scale.float().reshape(-1, *(1 for _ in weight.shape[1:]))
    raise WeightsError(
        f"{label} has scales of shape {list(scale.shape)}, not one or one for each row. "
        "Give a file with such scales."
    )


# --- GGUF ----------------------------------------------------------------------------------------


def _read_stored_gguf(source: ModelSource, path: Path) -> dict[str, Stored]:
    """As `read_stored`, from the header alone and without the package gguf."""
    header = {strip_prefix(key): tensor for key, tensor in read_gguf_header(path).items()}
    label = source.label_of("transformer")

    def shapes_of(sides: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        empty = {key: torch.empty(shape, device="meta") for key, shape in sides.items()}
        converted = _convert("transformer", empty, label).tensors
        return {key: tuple(tensor.shape) for key, tensor in converted.items()}

    # The names are converted twice, for weights may be split: once with their shapes, once with
    # what they take, a byte for an element.
    shapes = shapes_of({key: tensor.shape for key, tensor in header.items()})
    packed = shapes_of(
        {
            key: tensor.packed_shape if is_packed_type(tensor.type.name) else (*tensor.shape, 0)
            for key, tensor in header.items()
            if not key.endswith(".bias")
        }
    )
    num_bytes = {key: functools.reduce(int.__mul__, shape, 1) for key, shape in packed.items()}
    return {key: Stored(shape, num_bytes.get(key) or None) for key, shape in shapes.items()}


def _read_gguf(path: Path) -> Tensors:
    """As `diffusers.models.model_loading_utils.load_gguf_checkpoint`, mapped instead of copied.

    The header has been read before (`read_gguf_header`), so that all types are known.
    """
    # An optional package; diffusers' part imports it too.
    from diffusers.quantizers.gguf.utils import GGUFParameter  # noqa: PLC0415
    from gguf import GGUFReader  # noqa: PLC0415

    found: Tensors = {}
    # "c": whoever writes to a tensor gets a copy of its page, and the file stays as it is.
    for entry in GGUFReader(path, "c").tensors:
        is_aligned = entry.data.flags.aligned  # which a file may leave open
        tensor = torch.from_numpy(entry.data if is_aligned else entry.data.copy())
        is_plain = tensor.is_floating_point()  # else bytes
        found[entry.name] = (
            tensor if is_plain else GGUFParameter(tensor, quant_type=entry.tensor_type)
        )
    return found


def is_packed_type(ggml_name: str) -> bool:
    """Whether linear layers keep weights of this type packed; others are as small in torch."""
    return ggml_name not in ("F32", "F16", "BF16")
