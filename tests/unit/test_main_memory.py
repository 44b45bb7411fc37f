"""What is left of main memory, and which of it is pinned."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from everanimate_cli import main_memory
from everanimate_cli.main_memory import (
    PINNING_RESERVE,
    PinnedMemory,
    free_main_memory,
    lay_out,
    layout_size,
    pinned_size,
    why_not_pinned,
)

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MACHINE = {"proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n"}  # 32 GiB free


@pytest.mark.parametrize(
    ("files", "free_gib"),
    [
        (MACHINE, 32),
        # In no group with a limit.
        (MACHINE | {"proc/self/cgroup": "0::/\n"}, 32),
        (
            MACHINE
            | {
                "proc/self/cgroup": "0::/user.slice/job\n",
                "sys/fs/cgroup/user.slice/job/memory.max": "max\n",
                "sys/fs/cgroup/user.slice/job/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/user.slice/job/memory.stat": "anon 1\n",
            },
            32,
        ),
        # A container that sees its own group as the root; cached files can be dropped.
        (
            MACHINE
            | {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{9 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {2 * GIB}\n"
                f"active_file {1 * GIB}\nfile {4 * GIB}\n",
            },
            10,
        ),
        # A group around it has less left; one that asks to stay below a mark, too.
        (
            MACHINE
            | {
                "proc/self/cgroup": "0::/slurm/job/step\n",
                "sys/fs/cgroup/slurm/job/step/memory.max": f"{30 * GIB}\n",
                "sys/fs/cgroup/slurm/job/step/memory.current": f"{1 * GIB}\n",
                "sys/fs/cgroup/slurm/job/step/memory.stat": "",
                "sys/fs/cgroup/slurm/job/memory.max": f"{20 * GIB}\n",
                "sys/fs/cgroup/slurm/job/memory.high": f"{12 * GIB}\n",
                "sys/fs/cgroup/slurm/job/memory.current": f"{4 * GIB}\n",
                "sys/fs/cgroup/slurm/job/memory.stat": "",
            },
            8,
        ),
        # Version 1, in a container that is told names of the host.
        (
            MACHINE
            | {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{6 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
            },
            3,
        ),
        # No limit, as version 1 writes it.
        (
            MACHINE
            | {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{6 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": "",
            },
            32,
        ),
        # Above its limit for a moment.
        (
            MACHINE
            | {
                "proc/self/cgroup": "0::/../job\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.stat": "",
            },
            0,
        ),
        ({}, None),
        ({"proc/meminfo": "MemAvailable: some kB\n", "proc/self/cgroup": "broken"}, None),
    ],
)
def test_the_least_of_all_limits_counts(
    tmp_path: Path, files: dict[str, str], free_gib: int | None
) -> None:
    write(tmp_path, files)
    free = free_main_memory(tmp_path)
    assert free == (None if free_gib is None else free_gib * GIB)


def test_of_this_machine_something_is_left() -> None:
    free = free_main_memory()
    assert free is None or 0 <= free < 2**50


# --- pinned --------------------------------------------------------------------------------------


def test_a_layout_keeps_the_order_of_elements() -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    tensors = [
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        whole[:, :2],  # a part of a larger one
        whole.permute(2, 0, 1),
        torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.randn(7, 5).to(torch.float8_e4m3fn),
        torch.empty(0, 3),
    ]
    buffer = torch.zeros(layout_size(tensors), dtype=torch.uint8)
    for place, tensor in zip(lay_out(tensors, buffer), tensors, strict=True):
        place.copy_(tensor)
        assert (place.data_ptr() - buffer.data_ptr()) % 256 == 0 or not tensor.numel()
    for place, tensor in zip(lay_out(tensors, buffer), tensors, strict=True):
        assert torch.equal(place.float(), tensor.float())
        assert place.stride() == torch.empty_like(tensor).stride()
    assert layout_size(tensors) < sum(t.numel() * t.element_size() + 256 for t in tensors)


def test_pinning_leaves_a_reserve() -> None:
    assert why_not_pinned(10 * GIB, 10 * GIB + PINNING_RESERVE) is None
    assert why_not_pinned(10 * GIB, None) is None
    assert why_not_pinned(10 * GIB, 10 * GIB + PINNING_RESERVE - 1) == (
        "10.0 GiB of main memory are too much to pin with 13.0 GiB free: copies to the card take "
        "longer"
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of 1 KiB; how much is free can be set by the test, as the one number."""
    free = [2**40]
    monkeypatch.setattr(main_memory, "PINNED_PIECE", 1024)
    monkeypatch.setattr(main_memory, "free_main_memory", lambda: free[0])
    return free


def test_a_tensor_lies_in_the_first_piece_with_room_for_it(small_pieces: list[int]) -> None:
    sizes: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        sizes.append(num_bytes)
        small_pieces[0] -= num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    memory = PinnedMemory(allocate)
    # Bytes: 768, 512 in a new piece, 256 in the gap of the first, 512 again in the second.
    tensors = [torch.full((count,), float(count)) for count in (150, 100, 50, 101)]
    first, second = memory.copy(tensors[:2]), memory.copy(tensors[2:])
    copies = (*first, *second)
    assert sizes == [1024, 1024]
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
    starts = [copy.storage_offset() * 4 for copy in copies]
    assert starts == [0, 0, 768, 512]
    assert copies[2].untyped_storage().data_ptr() == copies[0].untyped_storage().data_ptr()
    memory.copy([torch.zeros(700)])  # larger than a piece: a power of two, as torch would take
    assert sizes[2:] == [4096]
    assert memory.reason is None
    # From the first piece on that there is no room for, nothing more is pinned.
    small_pieces[0] = PINNING_RESERVE + 1000
    assert memory.copy([tensors[0]])[0] is not tensors[0]  # fits in the piece that is begun
    kept = memory.copy([torch.zeros(300), tensors[1]])
    assert kept[1] is tensors[1]
    assert memory.reason is not None
    assert memory.reason.startswith("0.0 GiB of main memory are too much to pin with 3.0 GiB free")
    assert len(sizes) == 3


def test_what_is_pinned_is_known_before(small_pieces: list[int]) -> None:
    assert small_pieces
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 1500, (200,), generator=draw).tolist()
    sizes: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    tensors = [
        torch.full((count,), index % 251, dtype=torch.uint8) for index, count in enumerate(counts)
    ]
    copies = PinnedMemory(allocate).copy(tensors)
    assert all(torch.equal(*pair) for pair in zip(copies, tensors, strict=True))  # none overlap
    assert pinned_size(counts) == sum(sizes)
    assert sum(sizes) < 1.4 * sum(counts)
    assert pinned_size([]) == 0


def test_what_the_driver_refuses_stays_where_it_is(small_pieces: list[int]) -> None:
    def refuse(_num_bytes: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    memory = PinnedMemory(refuse)
    tensor = torch.ones(3)
    assert memory.copy([tensor])[0] is tensor
    assert memory.reason == (
        "main memory cannot be pinned (CUDA error: out of memory): copies to the card take longer"
    )
    assert small_pieces
