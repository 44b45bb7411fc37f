"""Blocks in two places of a card, with stand-ins for its streams that check the order of work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everanimate_cli.block_stream import BlockStream
from everanimate_cli.waiting import WaitingWeights

CPU = torch.device("cpu")


class Clock:
    """Counts what happens on all streams, in the order in which the program asks for it."""

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now


class Event:
    def __init__(self) -> None:
        self.time = 0  # of the record; nothing waits for an event that was never recorded

    def record(self, stream: "Stream") -> None:
        self.time = stream.clock.tick()
        self.stream = stream


class Stream:
    """Remembers how far it has waited for the other one."""

    clock = Clock()

    def __init__(self, _device: torch.device) -> None:
        self.seen = 0
        self.done = 0

    def wait_event(self, event: Event) -> None:
        self.seen = max(self.seen, event.time)

    def synchronize(self) -> None:
        """The program waits for all that the stream was given."""
        self.done = Stream.clock.tick()


class Streams:
    """Stands for `torch.cuda`; work is done at once, and is noted on the stream that is current."""

    Event = Event

    def __init__(self) -> None:
        self.main = Stream(CPU)
        self.made: list[Stream] = []
        self.active = self.main

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802  # as in torch.cuda
        self.made.append(Stream(device))
        return self.made[-1]

    def current_stream(self, _device: torch.device) -> Stream:
        return self.active

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.active = self.active, stream
        try:
            yield
        finally:
            self.active = before


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Blocks on stand-ins for streams; checks each copy and each use of a place."""
    streams = Streams()
    blocks = [nn.Linear(4, 4 + index).requires_grad_(False) for index in range(4)]
    homes = {id(block): (block.weight.data_ptr(), block.bias.data_ptr()) for block in blocks}
    copied: dict[int, int] = {}  # when, by address of a place
    used: dict[int, int] = {}
    log: list[str] = []
    marked: dict[int, Stream] = {}  # who uses which place, beside its own stream
    copy = Tensor.copy_
    # As where main memory had no room to pin all.
    pinned = {block.weight.data_ptr() for block in blocks[1:]}
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)

    def mark(tensor: Tensor, stream: Stream) -> None:
        marked[tensor.untyped_storage().data_ptr()] = stream

    monkeypatch.setattr(Tensor, "record_stream", mark)

    def note_copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if streams.active is not streams.main:
            # What is not pinned may be gone before the copy is done.
            assert non_blocking == (source.data_ptr() in pinned)
            place = target.untyped_storage().data_ptr()
            # Nothing is written over what a block still computes with.
            assert streams.active.seen >= used.get(place, 0)
            copied[place] = Stream.clock.tick()
            # Dropped during this copy, the place is kept from others until it is done.
            assert marked[place] is streams.active
            if source.ndim == 2:
                log.append(f"copy {source.shape[0] - 4}")
        return copy(target, source)

    monkeypatch.setattr(Tensor, "copy_", note_copy)

    class Work:
        def __init__(self) -> None:
            pairs = [(block, WaitingWeights(block)) for block in blocks]
            self.stream = BlockStream(pairs, CPU, prefetch=True, streams=streams)
            self.log, self.blocks, self.streams, self.copied = log, blocks, streams, copied

        def call(self, index: int) -> None:
            block = blocks[index]
            expected = torch.nn.functional.linear(torch.ones(2, 4), block.weight, block.bias)

            # Below the hook of the stream, which replaces `forward`.
            inner = block._diffusers_hook._fn_refs[0]
            forward = inner.forward

            def check(given: Tensor) -> Tensor:
                place = block.weight.untyped_storage().data_ptr()
                assert block.weight.data_ptr() not in homes[id(block)]
                # Nothing is read before it has arrived.
                assert streams.main.seen >= copied[place]
                used[place] = Stream.clock.tick()
                log.append(f"work {index}")
                return forward(given)

            inner.forward = check
            assert torch.equal(block(torch.ones(2, 4)), expected)
            inner.forward = forward
            assert (block.weight.data_ptr(), block.bias.data_ptr()) == homes[id(block)]

        def places(self) -> int:
            return len(self.stream._places)

    return Work()


def test_the_next_block_is_copied_beside_the_work_of_this_one(work: Any) -> None:
    for _ in range(3):
        for index in range(4):
            work.call(index)
            assert work.places() == 2
    one_round = [word for i in range(4) for word in (f"work {i}", f"copy {(i + 1) % 4}")]
    assert work.log == ["copy 0", *(3 * one_round)]  # each block once for each time it works


def test_another_order_costs_time_only(work: Any) -> None:
    for index in (0, 1, 3, 3, 0, 2, 1):
        work.call(index)


def test_memory_is_given_back_between(work: Any) -> None:
    work.call(0)
    work.stream.clear()
    assert work.places() == 0
    # The next block was under way, and nothing is any longer.
    (side,) = work.streams.made
    assert side.done > max(work.copied.values())
    for index in range(4):
        work.call(index)


def test_memory_of_a_block_that_raised_is_given_back(work: Any) -> None:
    block = work.blocks[0]
    homes = [block.weight.data_ptr(), block.bias.data_ptr()]
    with pytest.raises(RuntimeError):
        block(torch.ones(2, 7))
    assert block.weight.data_ptr() != homes[0]
    work.stream.clear()
    assert [block.weight.data_ptr(), block.bias.data_ptr()] == homes
    work.call(0)


def test_a_block_that_could_not_be_read_is_not_taken_for_there(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place had its number before it had its weights."""
    copy = Tensor.copy_
    with monkeypatch.context() as patch:

        def fail(target: Tensor, source: Tensor, **options: Any) -> Tensor:
            if source.ndim == 1:  # after the weight itself
                raise OSError("Input/output error")
            return copy(target, source, **options)

        patch.setattr(Tensor, "copy_", fail)
        with pytest.raises(OSError, match="Input/output"):
            work.blocks[0](torch.ones(2, 4))
    for index in range(4):
        work.call(index)


@pytest.mark.parametrize("failed", [0, 2])
def test_a_block_that_raises_gives_its_place_back(work: Any, failed: int) -> None:
    for index in range(failed):
        work.call(index)
    block = work.blocks[failed]
    home = block.weight.data_ptr()
    with pytest.raises(RuntimeError):
        block(torch.ones(2, 7))
    assert block.weight.data_ptr() != home
    for index in (*range(4), *range(4)):
        work.call(index)
    assert block.weight.data_ptr() == home


def test_without_prefetch_a_block_is_copied_once_and_never_back() -> None:
    blocks = [nn.Linear(3, 5).requires_grad_(False) for _ in range(3)]
    homes = [block.weight.data_ptr() for block in blocks]
    brought = []
    weights = [WaitingWeights(block) for block in blocks]
    for block in weights:
        lend = block.lend
        block.lend = lambda parts, lend=lend: (brought.append(parts), lend(parts))  # type: ignore[method-assign]
    BlockStream(list(zip(blocks, weights, strict=True)), CPU)
    network = nn.ModuleList(blocks)
    given = torch.ones(1, 3)
    for _ in range(2):
        for block in network:
            block(given)
    copies = [part for parts in brought for part in parts if part.data_ptr() not in homes]
    weights_copied = [part for part in copies if part.ndim == 2]
    assert len(weights_copied) == 6  # two rounds of three blocks, one way
    assert [block.weight.data_ptr() for block in blocks] == homes
