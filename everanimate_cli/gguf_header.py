"""Names, shapes and types in a GGUF file, without a library and without its tensors.

Source: ggml's description of the format, versions 2 and 3, little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from everanimate_cli.errors import WeightsError


@dataclass(frozen=True)
class GgufType:
    """How a tensor is packed.

    Attributes:
        name: As ggml calls it.
        block_size: Numbers in a block, which follow each other in a row.
        block_bytes: Bytes of a block.
    """

    name: str
    block_size: int
    block_bytes: int


# Those that diffusers unpacks, by ggml's number.
GGUF_TYPES = {
    0: GgufType("F32", 1, 4),
    1: GgufType("F16", 1, 2),
    2: GgufType("Q4_0", 32, 18),
    3: GgufType("Q4_1", 32, 20),
    6: GgufType("Q5_0", 32, 22),
    7: GgufType("Q5_1", 32, 24),
    8: GgufType("Q8_0", 32, 34),
    10: GgufType("Q2_K", 256, 84),
    11: GgufType("Q3_K", 256, 110),
    12: GgufType("Q4_K", 256, 144),
    13: GgufType("Q5_K", 256, 176),
    14: GgufType("Q6_K", 256, 210),
    20: GgufType("IQ4_NL", 32, 18),
    23: GgufType("IQ4_XS", 256, 136),
    30: GgufType("BF16", 1, 2),
}

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 10**6  # tensors, or facts about the model; guards against nonsense
_MAX_DIMENSIONS = 8
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        shape: In torch's order; some writers drop leading ones.
        type: How it is packed.
    """

    shape: tuple[int, ...]
    type: GgufType

    @property
    def num_bytes(self) -> int:
        """As it is packed."""
        return math.prod(self.shape) // self.type.block_size * self.type.block_bytes

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Its bytes, row by row."""
        rows, length = self.shape[:-1], self.shape[-1]
        return (*rows, length // self.type.block_size * self.type.block_bytes)


def read_gguf_header(path: Path) -> dict[str, GgufTensor]:
    """Read what a GGUF file holds.

    Args:
        path: A complete file.

    Returns:
        Tensors by name, in the order of the file.

    Raises:
        WeightsError: If the file is missing, of another format, cut short, or packed in a way that
            is not known here.
    """
    try:
        with path.open("rb") as file:
            tensors, end = _read(file)
        size = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, struct.error, MemoryError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path} is not a GGUF file. Give one.") from error
    except _UnknownTypeError as error:
        known = ", ".join(kind.name for kind in GGUF_TYPES.values())
        raise WeightsError(
            f"{path} is packed in an unknown way: {error}. Known: {known}. Give another file."
        ) from error
    if size < end:
        raise WeightsError(
            f"{path} has {size} bytes where its header announces {end}. Download it again."
        )
    return tensors


class _UnknownTypeError(Exception):
    """A tensor is of a type that is not in `GGUF_TYPES`."""


def _read(file: BinaryIO) -> tuple[dict[str, GgufTensor], int]:
    """The tensors and where the last of them ends."""
    if file.read(4) != _MAGIC:
        raise ValueError("no GGUF")
    version, num_tensors, num_facts = _unpack(file, "IQQ")
    if version not in _VERSIONS or max(num_tensors, num_facts) > _MAX_ENTRIES:
        raise ValueError(f"version {version}")
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(num_facts):
        key = _read_string(file)
        value = _read_value(file, *_unpack(file, "I"))
        if key == _ALIGNMENT_KEY:
            alignment = int(value or 0)
    if alignment < 1:
        raise ValueError(f"alignment {alignment}")
    tensors: dict[str, GgufTensor] = {}
    data_end = 0
    for _ in range(num_tensors):
        name = _read_string(file)
        (num_dimensions,) = _unpack(file, "I")
        if num_dimensions > _MAX_DIMENSIONS or name in tensors:
            raise ValueError(name)
        sides = _unpack(file, f"{num_dimensions}Q")
        number, offset = _unpack(file, "IQ")
        if number not in GGUF_TYPES:
            raise _UnknownTypeError(f"{name} is of ggml type {number}")
        tensor = GgufTensor(tuple(reversed(sides)), GGUF_TYPES[number])
        if not sides or 0 in sides or sides[0] % tensor.type.block_size:
            raise ValueError(name)
        tensors[name] = tensor
        data_end = max(data_end, offset + tensor.num_bytes)
    data_start = -(-file.tell() // alignment) * alignment
    return tensors, data_start + data_end


def _unpack(file: BinaryIO, numbers: str) -> tuple[int, ...]:
    """Little-endian numbers without padding; `struct.error` at the end of the file."""
    form = f"<{numbers}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return struct.unpack(f"<{length}s", file.read(length))[0].decode()  # type: ignore[no-any-return]


def _read_value(file: BinaryIO, kind: int) -> int | float | None:
    """A number; None for what else a file says of its model, which is passed over."""
    if kind == _STRING:
        _read_string(file)
        return None
    if kind == _ARRAY:
        item_kind, length = _unpack(file, "IQ")
        if item_kind in _NUMBERS:
            file.seek(length * struct.calcsize(f"<{_NUMBERS[item_kind]}"), 1)
            return None
        for _ in range(length):
            _read_value(file, item_kind)
        return None
    if kind not in _NUMBERS:
        raise ValueError(f"a value of type {kind}")
    return _unpack(file, _NUMBERS[kind])[0]
