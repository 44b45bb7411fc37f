"""Names, shapes and types in a safetensors file, without the library and without its tensors."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from everanimate_cli.errors import WeightsError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
# Bytes of a number; the library knows further types, of which two fit in a byte.
_NUM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# Of the types in which a single number may be stored: bytes, and how `struct` reads them.
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


class WrongSizeError(WeightsError):
    """A file is cut short, or goes on where it should end."""


class TensorEntry(NamedTuple):
    """One tensor of a file.

    Attributes:
        shape: In torch's order.
        dtype: As the format calls it, such as "BF16" or "F8_E4M3".
    """

    shape: tuple[int, ...]
    dtype: str


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape by tensor name; see `read_tensor_entries`."""
    return {name: entry.shape for name, entry in read_tensor_entries(path).items()}


def read_tensor_entries(path: Path) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file.

    Args:
        path: A complete safetensors file.

    Returns:
        Tensors by name, in the order of the file.

    Raises:
        WeightsError: If the file is missing, of another format or cut short.
    """
    return {name: entry for name, (entry, _) in _read_header(path)[0].items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What the header says beside the tensors; empty where it says nothing.

    Raises:
        WeightsError: As `read_tensor_entries`.
    """
    return _read_header(path)[1]


def read_number(path: Path, name: str) -> float:
    """The value of a tensor of one element.

    Args:
        path: A complete safetensors file.
        name: A tensor in it.

    Raises:
        WeightsError: As `read_tensor_entries`, and if it is no single finite number.
    """
    entries, _, data_start = _read_header(path)
    entry, start = entries[name]
    if any(side != 1 for side in entry.shape) or entry.dtype not in (*_NUMBERS, "BF16"):
        raise WeightsError(
            f"{path}: {name} is of type {entry.dtype} and shape {list(entry.shape)}, not a single "
            "number. Give another file."
        )
    layout = _NUMBERS.get(entry.dtype, "<f")
    with path.open("rb") as file:
        file.seek(data_start + start)
        # BF16 is the upper half of a float32.
        data = b"\0\0" + file.read(2) if entry.dtype == "BF16" else file.read(_size_of(entry))
    number = float(struct.unpack(layout, data)[0])
    if not math.isfinite(number):
        raise WeightsError(f"{path}: {name} is {number}, not a finite number. Give another file.")
    return number


def _size_of(entry: TensorEntry) -> int | None:
    """Bytes of a tensor; None for a type of which that is not known."""
    num_bytes = _NUM_BYTES.get(entry.dtype)
    return None if num_bytes is None else math.prod(entry.shape) * num_bytes


def _read_header(path: Path) -> tuple[dict[str, tuple[TensorEntry, int]], dict[str, str], int]:
    """Tensors with the place where their data begins, metadata, and where all data begins."""
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_size} bytes")
            file_size = path.stat().st_size
            if file_size < 8 + header_size:
                raise WrongSizeError(
                    f"{path} has {file_size} bytes and ends within its header. Download it again."
                )
            header: dict[str, dict[str, Any]] = json.loads(file.read(header_size))
        metadata = header.pop("__metadata__", {})
        entries = {
            name: (
                TensorEntry(_whole_numbers(entry["shape"]), str(entry["dtype"])),
                _whole_numbers(entry["data_offsets"])[0],
            )
            for name, entry in header.items()
        }
        data_size = _add_up(
            (entries[name][0], *entry["data_offsets"]) for name, entry in header.items()
        )
        described = {str(name): str(value) for name, value in metadata.items()}
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise WeightsError(f"{path} is not a safetensors file. Give one.") from error
    if file_size != 8 + header_size + data_size:
        raise WrongSizeError(
            f"{path} has {file_size} bytes where its header announces "
            f"{8 + header_size + data_size}. Download it again."
        )
    return entries, described, 8 + header_size


def _whole_numbers(values: list[Any]) -> tuple[int, ...]:
    """Sides or places as a header states them.

    Raises:
        ValueError: If one of them is something else.
    """
    if not isinstance(values, list) or any(type(each) is not int or each < 0 for each in values):
        raise ValueError(values)
    return tuple(values)


def _add_up(tensors: Iterable[tuple[TensorEntry, int, int]]) -> int:
    """Bytes of all tensors, which lie one behind the other as the format demands.

    Args:
        tensors: Each with where its data begins and ends, in any order.

    Raises:
        ValueError: If there are gaps, or a tensor has another size than its shape.
    """
    place = 0
    for entry, start, end in sorted(tensors, key=lambda each: each[1:]):
        size = _size_of(entry)
        if start != place or end < start or (size is not None and end - start != size):
            raise ValueError(entry)
        place = end
    return place
