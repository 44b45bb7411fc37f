"""What a LoRA training keeps on disk while it goes on: checkpoints and the log.

Where the files lie is described in `runs`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from everanimate_cli.runs import TrainFolder


def save_checkpoint(folder: TrainFolder, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Store the state after a step, whole or not at all.

    Raises:
        OSError: If the disk is full.
    """
    data = save(dict(tensors), metadata={"step": str(step)})
    with atomic_path(folder.part_path(step)) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(folder: TrainFolder, step: int) -> dict[str, Tensor]:
    """What `save_checkpoint` was given.

    Raises:
        RunError: If the file is damaged.
    """
    path = folder.part_path(step)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path} is damaged ({error}). Delete it to go on from the checkpoint before it."
        ) from error


class MetricsLog:
    """The log of a training on disk: JSON lines, of which a killed run loses none that counts."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep what the file holds up to a step: what came later is made again.

        Args:
            path: Of the log; need not exist.
            step: Where the training goes on.
        """
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(path, step))
        with atomic_path(path) as temporary:
            temporary.write_text(kept, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a line; "step" says when."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines of a log up to a step; none where there is no log."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        # After a power cut a file may end in anything.
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut by a kill, and so the last one
                break
    return [row for row in rows if row["step"] <= last_step]
