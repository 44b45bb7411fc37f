"""Blocks that come to the card one after the other, each for as long as it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook

from everanimate_cli.main_memory import lay_out, layout_size
from everanimate_cli.waiting import outlives_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from everanimate_cli.waiting import WaitingWeights

_HOOK = "everanimate_stream"


class BlockStream:
    """Brings blocks to a device in the order in which they compute.

    With `prefetch` there are two places on the card: while a block computes in one, the next is
    copied to the other on a stream of its own. The copy waits for the block that computed there
    before, on the card, so that no more than two are ever there however far the program is ahead.
    (diffusers' group offloading waits for copies only: a program that is ahead by ten blocks takes
    memory for ten.) Without it the one block is copied before its work, on the same stream.

    The way back is no copy: weights do not change.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[nn.Module, WaitingWeights]],
        device: torch.device,
        *,
        prefetch: bool = False,
        streams: Any = torch.cuda,
    ) -> None:
        """Take the blocks; from now on each is brought when it is called.

        Args:
            blocks: With their weights, in the order of calls.
            device: Where they compute.
            prefetch: Whether the next block is copied meanwhile; for cards only.
            streams: Has the streams and events of the device.
        """
        self._device = device
        self._weights = [weights for _, weights in blocks]
        self._streams = streams
        self._side: Any = streams.Stream(device) if prefetch else None
        self._places: list[_Place] = []
        self._size = 0
        if prefetch:
            self._size = max(layout_size(weights.read()) for weights in self._weights)
        for index, (block, _) in enumerate(blocks):
            hook = _Bring(self, index)
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _HOOK)

    def bring(self, index: int) -> None:
        """Let a block compute on the device."""
        if self._side is None:
            self._weights[index].bring(self._device)
            return
        if not self._places:
            self._places = [self._make_place(), self._make_place()]
        for each in self._places:
            if each.is_used and each.index is not None:  # by a block that raised: it never left
                self._weights[each.index].recall()
                self._free(each)
        place = next((each for each in self._places if each.index == index), None)
        if place is None:
            # In the first call, or where calls come in another order.
            place = next(each for each in self._places if not each.is_used)
            self._fetch(index, place)
        self._current().wait_event(place.arrived)
        place.is_used = True
        self._weights[index].lend(place.parts)

    def leave(self, index: int) -> None:
        """Give the memory of a block to others, and fetch the next one."""
        self._weights[index].recall()
        if self._side is None:
            return
        place = next(each for each in self._places if each.is_used)
        # In the other place, while this block is still at work.
        other = next(each for each in self._places if not each.is_used)
        self._free(place)
        self._fetch((index + 1) % len(self._weights), other)

    def clear(self) -> None:
        """Leave the card to others, who can have its memory at once."""
        for place in self._places:
            if place.is_used and place.index is not None:  # by a block that raised
                self._weights[place.index].recall()
        if self._places:
            # A copy that nobody waited for may still be under way.
            self._side.synchronize()
        self._places = []

    def _fetch(self, index: int, place: _Place) -> None:
        """Copy a block to a place as soon as the work of the one before is done there."""
        source = self._weights[index].read()
        parts = lay_out(source, place.buffer)
        with self._streams.stream(self._side):
            self._side.wait_event(place.left)
            for target, home in zip(parts, source, strict=True):
                target.copy_(home, non_blocking=outlives_copy(home))
            place.arrived.record(self._side)
        place.index, place.parts = index, parts  # not if one of them cannot be read

    def _free(self, place: _Place) -> None:
        place.left.record(self._current())
        place.index, place.parts, place.is_used = None, [], False

    def _make_place(self) -> _Place:
        buffer = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        # Whoever drops the stream during a copy: nobody gets this memory before the copy is done.
        buffer.record_stream(self._side)
        place = _Place(buffer, arrived=self._streams.Event(), left=self._streams.Event())
        # What had this memory before may still be at work.
        place.left.record(self._current())
        return place

    def _current(self) -> Any:
        return self._streams.current_stream(self._device)


class _Place:
    """Room for a block on the card.

    Attributes:
        buffer: [bytes] uint8.
        arrived: After the copy of a block to this place.
        left: After the work of the block that was here.
        index: Of the block that is here or on its way; None if there is none.
        parts: Its weights.
        is_used: Whether it computes.
    """

    def __init__(self, buffer: Tensor, *, arrived: Any, left: Any) -> None:
        self.buffer = buffer
        self.arrived = arrived
        self.left = left
        self.index: int | None = None
        self.parts: list[Tensor] = []
        self.is_used = False


class _Bring(ModelHook):
    """Calls a `BlockStream` before and after a block."""

    def __init__(self, stream: BlockStream, index: int) -> None:
        super().__init__()
        self._stream = stream
        self._index = index

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG002  # the hook of diffusers is given it
        self._stream.bring(self._index)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002  # see above
        self._stream.leave(self._index)
        return output
