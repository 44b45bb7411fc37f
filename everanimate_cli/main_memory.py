"""Main memory: how much is left, and how a card reads it fastest."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

_GIB = 2**30
# What stays free beside pinned memory, which the system can neither swap out nor take back.
PINNING_RESERVE = 3 * _GIB
_ALIGNMENT = 256  # bytes, as of allocations of CUDA
PINNED_PIECE = 2**29  # bytes; a power of two, to which torch rounds up what it pins
# Of control groups, version 2 and 1: limits, what is in use, and what of it are cached files.
_GROUP_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    1: (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def free_main_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process can still take; None where the system does not tell.

    The least of what the machine has left and of what the limits of containers, Slurm and systemd
    leave (control groups, of which those around a group count too).

    Args:
        root: Where `proc` and `sys` are.
    """
    known = [_free_of_machine(root), *_free_of_groups(root)]
    return min((free for free in known if free is not None), default=None)


def _free_of_machine(root: Path) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _free_of_groups(root: Path) -> list[int | None]:
    """Of each group that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            version, mount = 2, root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            version, mount = 1, root / "sys/fs/cgroup/memory"
        else:
            continue
        # A container may see names that only exist outside; its own group is the mount itself.
        parts = [part for part in group.split("/") if part]
        depth = 0 if ".." in parts else len(parts)
        for count in range(depth, -1, -1):
            found.append(_free_of_group(mount.joinpath(*parts[:count]), version))
    return found


def _free_of_group(folder: Path, version: int) -> int | None:
    limit_names, used_name, cache_names = _GROUP_FILES[version]
    limits = []
    for name in limit_names:
        with suppress(OSError, ValueError):  # of "max", which is none
            limits.append(int((folder / name).read_text(encoding="ascii")))
    if not limits:
        return None
    with suppress(OSError, ValueError):
        used = int((folder / used_name).read_text(encoding="ascii"))
        # The system drops cached files before it refuses memory.
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        numbers = dict(line.split(maxsplit=1) for line in stat if " " in line)
        cached = sum(int(numbers.get(name, 0)) for name in cache_names)
        return max(0, min(limits) - used + cached)
    return None


# --- pinned --------------------------------------------------------------------------------------


def why_not_pinned(num_bytes: float, free_bytes: float | None) -> str | None:
    """Why so much more of main memory is not pinned, in words; None if it can be.

    Args:
        num_bytes: To be pinned, and not yet in memory.
        free_bytes: Of main memory; None if unknown.
    """
    if free_bytes is None or num_bytes + PINNING_RESERVE <= free_bytes:
        return None
    return (
        f"{num_bytes / _GIB:.1f} GiB of main memory are too much to pin with "
        f"{free_bytes / _GIB:.1f} GiB free: copies to the card take longer"
    )


class PinnedMemory:
    """Main memory that a card reads by itself, at the full speed of its bus and beside other work.

    It is taken in large pieces, for torch rounds each tensor that it pins up to a power of two,
    which for the weights of a large block is half as much again. A tensor lies in the first piece
    that has room for it, so that smaller ones fill the gaps that large ones leave (`pinned_size`).
    """

    def __init__(self, allocate: Callable[[int], Tensor] | None = None) -> None:
        """Take nothing yet.

        Args:
            allocate: Gives so many pinned bytes; None for torch's.
        """
        self._allocate = allocate or _allocate_pinned
        self._pieces: list[Tensor] = []
        self._packing = _Packing()
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why not everything is pinned, in words; None if it is."""
        return self._reason

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Pinned copies of tensors with the same order of elements, or they themselves.

        The originals should be given up then: no more than a piece is needed beside them. Once
        there is no memory to pin, nothing more is.

        Args:
            tensors: In main memory.
        """
        result = []
        for tensor in tensors:
            target = self._take(tensor) if self._reason is None else None
            result.append(tensor if target is None else target.copy_(tensor))
        return result

    def _take(self, tensor: Tensor) -> Tensor | None:
        needed = layout_size([tensor])
        found = self._packing.find(needed)
        if found is None:
            size = _piece_size(needed)
            self._reason = why_not_pinned(size, free_main_memory())
            if self._reason is not None:
                return None
            try:
                self._pieces.append(self._allocate(size))
            except RuntimeError as error:  # of the driver, which may have limits of its own
                words = str(error).strip().splitlines()
                self._reason = (
                    f"main memory cannot be pinned ({words[0] if words else 'refused'}): copies to "
                    "the card take longer"
                )
                return None
            found = self._packing.add(size, needed)
        piece, start = found
        (target,) = lay_out([tensor], self._pieces[piece][start : start + needed])
        return target


class _Packing:
    """Which tensor lies in which piece."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._used: list[int] = []

    def find(self, needed: int) -> tuple[int, int] | None:
        """Take so many bytes of the first piece that has them: its number and where they start."""
        for piece, (size, start) in enumerate(zip(self.sizes, self._used, strict=True)):
            if start + needed <= size:
                self._used[piece] += needed
                return piece, start
        return None

    def add(self, size: int, needed: int) -> tuple[int, int]:
        """The same of a new piece."""
        self.sizes.append(size)
        self._used.append(needed)
        return len(self.sizes) - 1, 0


def _piece_size(needed: int) -> int:
    return max(PINNED_PIECE, 1 << (needed - 1).bit_length())


def pinned_size(sizes: Iterable[int]) -> int:
    """Bytes of main memory that `PinnedMemory` takes for tensors.

    Args:
        sizes: Bytes of each, in the order in which they are copied.
    """
    packing = _Packing()
    for size in sizes:
        needed = _padded(size)
        if packing.find(needed) is None:
            packing.add(_piece_size(needed), needed)
    return sum(packing.sizes)


def _allocate_pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def layout_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of a buffer that holds tensors one after the other."""
    return sum(_padded(_num_bytes(tensor)) for tensor in tensors)


def lay_out(tensors: Iterable[Tensor], buffer: Tensor) -> list[Tensor]:
    """Room in a buffer for each of some tensors, with the same order of elements.

    Args:
        tensors: Of any devices; only their shapes, strides and dtypes count.
        buffer: [layout_size] uint8.
    """
    places, start = [], 0
    for tensor in tensors:
        # Strides of a part of a larger tensor have gaps, which a copy of it has not.
        strides = torch.empty_like(tensor, device="meta").stride()
        flat = buffer[start : start + _num_bytes(tensor)].view(tensor.dtype)
        places.append(flat.as_strided(tensor.shape, strides, flat.storage_offset()))
        start += _padded(_num_bytes(tensor))
    return places


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
