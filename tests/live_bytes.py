"""How much memory a piece of code takes at most, by the tensors that are alive in it.

Works on fake tensors too, which have sizes and no memory: networks of full size can be counted.
"""

import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Peak of all tensors that are alive at once within `with`.

    Args:
        there: Networks whose weights count as they are now and as long as they live.
        given: Tensors that count likewise.
        elsewhere: Tensors that do not count: those that wait in another memory.
    """

    def __init__(
        self,
        there: Iterable[nn.Module] = (),
        *,
        given: Iterable[Tensor] = (),
        elsewhere: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in elsewhere}
        self._sizes: dict[int, int] = {}
        weights = [(*network.parameters(), *network.buffers()) for network in there]
        for tensor in (*chain.from_iterable(weights), *given):
            self._count(tensor)
        self.peak = self._total()

    @property
    def peak_mib(self) -> float:
        return self.peak / 2**20

    def _total(self) -> int:
        return sum(self._sizes.values())

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        is_real = tensor.device.type != "meta"
        if is_real and key not in self._ignored and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, key)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self._total())
        return result
