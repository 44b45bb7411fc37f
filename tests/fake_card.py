"""A CUDA card that is not there: its tensors have a shape, a dtype and a device, and no content.

Torch refuses what it would refuse on a real one: operands on several devices. Nothing is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from everanimate_cli.checkpoint import dtype_in_memory

CARD = torch.device("cuda:0")

_aten = torch.ops.aten


@contextmanager
def fake_card() -> Iterator[None]:
    """Let there be `CARD`."""
    with FakeTensorMode(allow_non_fake_inputs=True), _WithoutDriver(), torch.no_grad():
        yield


def put_on_card(network: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Give a network weights on `CARD`, in the dtypes that loading gives them.

    Args:
        network: Changed in place; weights of 8 bits stay so.
        name: In a checkpoint.
        dtype: Of the network.
    """
    for prefix, module in network.named_modules():
        for own_name, value in module._parameters.items():
            if value is None:
                continue
            kept = dtype_in_memory(name, f"{prefix}.{own_name}".strip("."), dtype)
            kept = value.dtype if value.dtype.itemsize == 1 else kept
            empty = torch.empty(value.shape, dtype=kept, device=CARD)
            module._parameters[own_name] = nn.Parameter(empty, requires_grad=False)
        for own_name, value in module._buffers.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=CARD)
                module._buffers[own_name] = empty


class _WithoutDriver(TorchFunctionMode):
    """Methods for which torch would ask a driver which card is current, by operators instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, Tensor) and (first.device.type == "cuda" or name == "pin_memory"):
            func = _METHODS.get(name, func)
        return func(*args, **kwargs)


def _read(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]` of numbers, slices, None, an ellipsis, and tensors of indices."""
    index = index if isinstance(index, tuple) else (index,)
    num_axes = sum(part is not None and part is not Ellipsis for part in index)
    whole = [slice(None)] * (tensor.ndim - num_axes)
    parts: Sequence[Any] = [
        each for part in index for each in (whole if part is Ellipsis else [part])
    ]
    axis, picked = 0, {}
    for part in parts:
        if part is None:
            tensor = _aten.unsqueeze(tensor, axis)
        elif isinstance(part, slice):
            tensor = _aten.slice(tensor, axis, part.start, part.stop, part.step or 1)
        elif isinstance(part, Tensor):
            picked[axis] = part
        else:
            tensor = _aten.select(tensor, axis, part)
            axis -= 1
        axis += 1
    if picked:
        tensor = _aten.index(tensor, [picked.get(each) for each in range(tensor.ndim)])
    return tensor


def _write(tensor: Tensor, index: Any, value: Any) -> None:
    """`tensor[index] = value`."""
    (_aten.copy_ if isinstance(value, Tensor) else _aten.fill_)(_read(tensor, index), value)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else _aten._to_copy(tensor, dtype=dtype)


_METHODS: dict[str, Callable[..., Any]] = {
    "__getitem__": _read,
    "__setitem__": _write,
    "contiguous": _aten.contiguous,
    "copy_": lambda target, source, **_: _aten.copy_(target, source),
    "float": lambda tensor: _cast(tensor, torch.float32),
    "type_as": lambda tensor, other: _cast(tensor, other.dtype),
    "pin_memory": lambda tensor: tensor,
    "nonzero": lambda _tensor: [5],  # how many words a prompt has is content
}
