"""What a training keeps on disk: checkpoints, the log, and that nothing else is ever deleted."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from everanimate_cli.errors import RunError
from everanimate_cli.runs import TrainFolder
from everanimate_cli.training_state import (
    MetricsLog,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
)


@pytest.fixture
def folder(tmp_path: Path) -> TrainFolder:
    (tmp_path / "out").mkdir()
    return TrainFolder(tmp_path / "out")


def names(folder: TrainFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(folder: TrainFolder) -> None:
    tensors = {"lora/a": torch.arange(6.0).view(2, 3), "exp_avg/a": torch.zeros(0, 3)}
    save_checkpoint(folder, 1_200_000, tensors)
    assert names(folder) == ["checkpoint-1200000.safetensors"]
    loaded = load_checkpoint(folder, 1_200_000)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in tensors.items())
    with safe_open(folder.part_path(1_200_000), framework="pt") as file:
        assert file.metadata() == {"step": "1200000"}


def test_checkpoints_are_counted_by_their_steps_and_not_by_their_letters(
    folder: TrainFolder,
) -> None:
    for step in (200, 1_000_000, 999_999):
        save_checkpoint(folder, step, {"a": torch.zeros(1)})
    others = ("checkpoint-000300", "checkpoint-12.safetensors", ".checkpoint-000500.safetensors")
    for name in (*others, "checkpoint-000400.safetensors.bak"):
        (folder.path / name).touch()
    assert folder.checkpoints() == [200, 999_999, 1_000_000]
    assert folder.count_finished() == 3


@pytest.mark.parametrize(("num_kept", "left"), [(1, [600]), (2, [400, 600]), (9, [200, 400, 600])])
def test_the_last_checkpoints_stay(folder: TrainFolder, num_kept: int, left: list[int]) -> None:
    for step in (200, 400, 600):
        save_checkpoint(folder, step, {"a": torch.zeros(1)})
    folder.drop_checkpoints(num_kept)
    assert folder.checkpoints() == left


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "gone"])
def test_a_damaged_checkpoint_is_named(folder: TrainFolder, damage: str) -> None:
    save_checkpoint(folder, 200, {"a": torch.ones(100)})
    path = folder.part_path(200)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-8], "zeros": bytes(len(data)), "empty": b""}[damage])
    with pytest.raises(RunError) as error:
        load_checkpoint(folder, 200)
    assert str(error.value).startswith(f"{path} is damaged (")
    assert str(error.value).endswith("Delete it to go on from the checkpoint before it.")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    folder: TrainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(folder, 200, {"a": torch.ones(4)})

    def refuse(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, 400, {"a": torch.ones(4)})
    assert names(folder) == ["checkpoint-000200.safetensors"]


# --- the log --------------------------------------------------------------------------------------


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_goes_on_where_the_training_does(folder: TrainFolder) -> None:
    rows = [{"step": step, "loss": 0.1 * step} for step in range(1, 6)]
    log = MetricsLog(folder.metrics_path, 0)
    for row in rows:
        log.write(row)
    log.write({"step": 3, "validation": {"psnr_first": 20.0}})
    assert written(folder.metrics_path)[:5] == rows  # on the disk before it is closed
    log.close()
    log = MetricsLog(folder.metrics_path, 3)
    log.write({"step": 4, "loss": 7.0})
    log.close()
    assert [row["step"] for row in written(folder.metrics_path)] == [1, 2, 3, 3, 4]
    assert written(folder.metrics_path)[-1]["loss"] == 7.0


def test_numbers_come_back_to_the_last_bit(folder: TrainFolder) -> None:
    values = [0.1 + 0.2, 1e-300, 25.918359756469727]
    log = MetricsLog(folder.metrics_path, 0)
    for step, value in enumerate(values, start=1):
        log.write({"step": step, "loss": value})
    log.close()
    MetricsLog(folder.metrics_path, 3).close()
    assert [row["loss"] for row in read_metrics(folder.metrics_path, 3)] == values


@pytest.mark.parametrize("rest", [b'{"step": 3, "lo', b"{", b"\x00" * 40, b'{"step": 3, "l\xc3'])
def test_a_line_that_a_kill_has_cut_does_not_count(folder: TrainFolder, rest: bytes) -> None:
    """After a power cut there may be zeros, or half a letter."""
    lines = b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'
    folder.metrics_path.write_bytes(lines + rest)
    assert [row["step"] for row in read_metrics(folder.metrics_path, 9)] == [1, 2]
    MetricsLog(folder.metrics_path, 2).close()
    assert folder.metrics_path.read_bytes() == lines


def test_no_log_is_an_empty_one(folder: TrainFolder) -> None:
    assert read_metrics(folder.metrics_path, 9) == []


# --- what is deleted ------------------------------------------------------------------------------


def test_only_what_the_program_has_written_is_deleted(folder: TrainFolder) -> None:
    own = (
        *("run.json", "lora.safetensors", "train.json", "loss.png", "metrics.jsonl"),
        *("checkpoint-000200.safetensors", "validation-000200.mp4"),
        *(".checkpoint-000400.safetensors.0123abcd.part", ".metrics.jsonl.0123abcd.part"),
        "tensorboard/events.out.tfevents.1.host",
    )
    foreign = (
        *("notes.txt", "lora-best.safetensors", "checkpoint-000200.safetensors.bak", "loss2.png"),
        *("validation.mp4", "my/run.json", "tensorboard/mine.txt", ".hidden"),
    )
    for name in (*own, *foreign, "lock"):
        path = folder.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
    folder.clear()
    left = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert left == {*foreign, "lock"}


def test_a_removed_training_leaves_no_folder(folder: TrainFolder) -> None:
    """An empty folder of logs kept it."""
    (folder.path / "lock").touch()
    folder.tensorboard_path.mkdir()
    (folder.tensorboard_path / "events.out.tfevents.1.host").touch()
    save_checkpoint(folder, 200, {"a": torch.zeros(1)})
    folder.remove()
    assert not folder.path.exists()


def test_what_was_about_to_be_written_is_cleared_and_nothing_else(folder: TrainFolder) -> None:
    save_checkpoint(folder, 200, {"a": torch.zeros(1)})
    part = folder.path / ".checkpoint-000400.safetensors.0123abcd.part"
    part.write_bytes(struct.pack("<Q", 9))
    folder.clear_temporaries()
    assert names(folder) == ["checkpoint-000200.safetensors"]
