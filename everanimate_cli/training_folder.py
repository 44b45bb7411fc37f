"""The folder of a LoRA training: result, log, checkpoints.

Layout of `OUTPUT`:
    lora.safetensors                 the result; made anew whenever the training ends or is extended
    train.json                       its settings and facts
    loss.png                         the curve
    metrics.jsonl                    a line a step, and a line a validation
    validation-000200.mp4            truth and result side by side
    tensorboard/                     the same curves for TensorBoard
    checkpoint-000200.safetensors    all that the training needs to go on
    run.json, lock                   what was asked for, and which process is at work
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from everanimate_cli.errors import RunError
from everanimate_cli.images import atomic_path
from everanimate_cli.runs import WorkFolder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})\.safetensors")


class TrainFolder(WorkFolder):
    """The files of one training; the folder itself is what `--output` names."""

    unit = "checkpoint"
    part_file = _CHECKPOINT
    other_file = re.compile(
        r"metrics\.jsonl|lora\.safetensors|train\.json|loss\.png|validation-\d{6,}\.mp4"
    )

    @property
    def output(self) -> Path:
        """The folder."""
        return self.path

    @property
    def lora_path(self) -> Path:
        """The result."""
        return self.path / "lora.safetensors"

    @property
    def record_path(self) -> Path:
        """Settings and facts of the result."""
        return self.path / "train.json"

    @property
    def plot_path(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def metrics_path(self) -> Path:
        """The log, JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_path(self) -> Path:
        """Folder of event files."""
        return self.path / "tensorboard"

    def validation_path(self, step: int) -> Path:
        """The video rendered after a step."""
        return self.path / f"validation-{step:06d}.mp4"

    def part_path(self, index: int) -> Path:
        """The checkpoint after a step."""
        return self.path / f"checkpoint-{index:06d}.safetensors"

    def has_result(self) -> bool:
        """Whether a LoRA is there."""
        return self.lora_path.exists()

    def count_finished(self) -> int:
        """Number of checkpoints."""
        return len(self.checkpoints())

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, rising."""
        names = (path.name for path in self.path.glob("checkpoint-*"))
        return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))

    def clear(self) -> None:
        """Delete the training's files and begin anew; the lock stays."""
        super().clear()
        for path in self.tensorboard_path.glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)

    def drop_checkpoints(self, num_kept: int) -> None:
        """Delete all checkpoints but the last ones."""
        for step in self.checkpoints()[:-num_kept]:
            self.part_path(step).unlink(missing_ok=True)


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
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut by a kill, and so the last one
                break
    return [row for row in rows if row["step"] <= last_step]
