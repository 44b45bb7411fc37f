"""Weights of a module that wait in main memory, or in a file, and are lent to a device."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from everanimate_cli.main_memory import PinnedMemory

    Rebuild = Callable[[Iterator[Tensor]], Tensor]


class WaitingWeights:
    """The weights and buffers of a module, which have a home and are on a device for a time.

    They do not change, so that the way back costs nothing: the module is given its home again.
    What the module has in several places, in one parameter or in several of the same data, is kept
    and lent once.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the module, whose home is where its weights are now."""
        self._tensors = _list_tensors(module)
        parts = [part for each in self._tensors for part in each.parts()]
        # Which of the tensors at home each part is.
        self._home: list[Tensor] | None
        self._home, self._indices = _unite(parts)
        self._path: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        assert self._home is not None
        return sum(part.numel() * part.element_size() for part in self._home)

    def read(self) -> list[Tensor]:
        """All weights at home, each once, as plain tensors; from a file they are mapped."""
        if self._home is not None:
            return self._home
        stored = load_file(str(self._path))
        return [stored[str(index)] for index in range(len(stored))]

    def lend(self, parts: Sequence[Tensor]) -> None:
        """Let the module compute with copies of what `read` gave."""
        left = iter([parts[index] for index in self._indices])
        for tensor in self._tensors:
            tensor.put(left)

    def bring(self, device: torch.device) -> None:
        """Let the module compute on a device."""
        # A copy also where main memory is the device, so that this can be measured there.
        self.lend(
            [part.to(device, non_blocking=outlives_copy(part), copy=True) for part in self.read()]
        )

    def recall(self) -> None:
        """Give the device's memory back."""
        if self._home is not None:
            self.lend(self._home)
            return
        for tensor in self._tensors:
            tensor.put(iter([_placeholder(part) for part in tensor.parts()]))

    def pin(self, memory: PinnedMemory) -> None:
        """Move what is at home into pinned memory, as far as there is any, one by one."""
        assert self._home is not None
        originals: dict[int, Tensor] = dict(enumerate(self._home))
        copies: dict[int, Tensor] = {}
        self._home, left = None, iter(self._indices)
        for tensor in self._tensors:
            indices = [next(left) for _ in tensor.parts()]
            for index in indices:
                if index in originals:
                    (copies[index],) = memory.copy([originals.pop(index)])
            tensor.put(iter([copies[index] for index in indices]))
        self._home = [copies[index] for index in range(len(copies))]

    def move_to_file(self, path: Path) -> None:
        """Keep the weights in a file from now on.

        Raises:
            OSError: If it cannot be written.
        """
        assert self._home is not None
        parts = {str(index): part for index, part in enumerate(_separate(self._home))}
        try:
            save_file(parts, str(path))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._home, self._path = None, path
        self.recall()


def outlives_copy(tensor: Tensor) -> bool:
    """Whether a copy to a card may still be under way when the tensor in main memory is given up.

    torch keeps pinned memory until the copy is done. Of other memory CUDA takes a copy first on
    most machines, but where the card reads it by itself (Grace, and Linux with heterogeneous memory
    management) it may be gone by then, such as a file that is no longer mapped.
    """
    return tensor.is_pinned()


class _Plain:
    """A weight whose data is one tensor: that is exchanged, and whoever has the weight sees it.

    What else a weight of a GGUF file knows of itself stays with it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def parts(self) -> list[Tensor]:
        # Views of weights of a GGUF file would be such weights too, which not every shape can be.
        with torch._C.DisableTorchFunctionSubclass():
            return [self._tensor.data]

    def put(self, parts: Iterator[Tensor]) -> None:
        self._tensor.data = next(parts)


class _Wrapped:
    """A weight of several tensors, such as torchao's: the parameter is exchanged."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner, self._name = owner, name
        tensor = owner._parameters[name]
        assert tensor is not None
        self._requires_grad = tensor.requires_grad
        self._rebuild = _flatten(tensor.data)[1]

    def parts(self) -> list[Tensor]:
        tensor = self._owner._parameters[self._name]
        assert tensor is not None
        return _flatten(tensor.data)[0]

    def put(self, parts: Iterator[Tensor]) -> None:
        tensor = nn.Parameter(self._rebuild(parts), requires_grad=self._requires_grad)
        self._owner._parameters[self._name] = tensor


def _list_tensors(module: nn.Module) -> list[_Plain | _Wrapped]:
    found: list[_Plain | _Wrapped] = []
    seen: set[int] = set()
    for part in module.modules():
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if is_traceable_wrapper_subclass(tensor) and name in part._parameters:
                found.append(_Wrapped(part, name))
            else:
                found.append(_Plain(tensor))
    return found


def _unite(parts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Parts without those that are the same memory, and for each part which of these it is."""
    found: dict[tuple[Any, ...], int] = {}
    home: list[Tensor] = []
    indices = []
    for part in parts:
        memory = (part.untyped_storage()._cdata, part.storage_offset(), part.dtype)
        key = (*memory, part.shape, part.stride())
        if key not in found:
            found[key] = len(home)
            home.append(part)
        indices.append(found[key])
    return home, indices


def _separate(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same, contiguous and without common memory: safetensors writes no others."""
    result = [part.contiguous() for part in parts]
    end = 0
    for index in sorted(range(len(result)), key=lambda index: result[index].data_ptr()):
        part = result[index]
        if part.data_ptr() < end:
            result[index] = part.clone()
        else:
            end = part.data_ptr() + part.numel() * part.element_size()
    return result


def _flatten(tensor: Tensor) -> tuple[list[Tensor], Rebuild]:
    """The plain tensors that a weight consists of, and how it is made of others like them."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor], next
    kind: Any = type(tensor)
    names, context = tensor.__tensor_flatten__()
    flattened = [_flatten(getattr(tensor, name)) for name in names]
    shape, strides = tensor.shape, tensor.stride()

    def rebuild(parts: Iterator[Tensor]) -> Tensor:
        inner = {name: make(parts) for name, (_, make) in zip(names, flattened, strict=True)}
        return kind.__tensor_unflatten__(inner, context, shape, strides)

    return [part for parts, _ in flattened for part in parts], rebuild


def _placeholder(tensor: Tensor) -> Tensor:
    """Shape and dtype of a tensor whose content is elsewhere."""
    return torch.zeros((), dtype=torch.uint8).to(tensor.dtype).expand(tensor.shape)
