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
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the module, whose home is where its weights are now."""
        self._tensors = _list_tensors(module)
        self._home: list[Tensor] | None = [part for each in self._tensors for part in each.parts()]
        self._path: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        assert self._home is not None
        return sum(part.numel() * part.element_size() for part in self._home)

    def read(self) -> list[Tensor]:
        """All weights at home, as plain tensors; from a file they are mapped."""
        if self._home is not None:
            return self._home
        stored = load_file(str(self._path))
        return [stored[str(index)] for index in range(len(stored))]

    def lend(self, parts: Sequence[Tensor]) -> None:
        """Let the module compute with copies of what `read` gave."""
        left = iter(parts)
        for tensor in self._tensors:
            tensor.put(left)

    def bring(self, device: torch.device) -> None:
        """Let the module compute on a device."""
        # A copy also where main memory is the device, so that this can be measured there. Work
        # that follows on the same stream waits for it.
        is_card = device.type == "cuda"
        self.lend([part.to(device, non_blocking=is_card, copy=True) for part in self.read()])

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
        originals, self._home = self._home[::-1], []
        for tensor in self._tensors:
            parts = memory.copy([originals.pop() for _ in tensor.parts()])
            tensor.put(iter(parts))
            self._home += parts

    def move_to_file(self, path: Path) -> None:
        """Keep the weights in a file from now on.

        Raises:
            OSError: If it cannot be written.
        """
        assert self._home is not None
        parts = {str(index): part.contiguous() for index, part in enumerate(self._home)}
        try:
            save_file(parts, str(path))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._home, self._path = None, path
        self.recall()


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
