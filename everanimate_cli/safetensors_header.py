"""Names and shapes in a safetensors file, without the library and without its tensors."""

import json
from pathlib import Path

from everanimate_cli.errors import WeightsError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header of a safetensors file.

    Args:
        path: A complete safetensors file.

    Returns:
        Shape by tensor name, in the order of the file.

    Raises:
        WeightsError: If the file is missing, of another format or cut short.
    """
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_size} bytes")
            header: dict[str, dict[str, list[int]]] = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        data_size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        file_size = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a safetensors file. Give one.") from error
    if file_size != 8 + header_size + data_size:
        raise WeightsError(
            f"{path} has {file_size} bytes where its header announces "
            f"{8 + header_size + data_size}. Download it again."
        )
    return shapes
