"""The run folder beside a result: finished chunks on disk, so that a killed run loses one chunk at most.

Layout of `NAME.mp4.run`:
    run.json                  what the run was asked to do; another request is refused
    00007.safetensors         latents of chunk 7 and the state that chunk 8 needs
    00007_4-21.mp4            frames 4..20 of chunk 7, encoded; playable, joined at the end
    lock                      held by the process at work
A chunk is finished when its safetensors file is there: it is written last, under a temporary name first.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from everanimate_cli.errors import InputError, RunError, SettingsError
from everanimate_cli.images import atomic_path
from everanimate_cli.rollout import Chunk, RolloutState
from everanimate_cli.settings import option_name, run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import IO

    from torch import Tensor

_REQUEST_FILE = "run.json"
_LOCK_FILE = "lock"


class RunFolder:
    """Finished chunks of one video.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def count_finished(self) -> int:
        """Chunks that are finished without a gap from chunk 0 on."""
        count = 0
        while self._chunk_path(count).exists():
            count += 1
        return count

    def segment_path(self, chunk_index: int, kept: range) -> Path:
        """Where the encoded frames `kept` of a chunk are or go."""
        return self.path / f"{chunk_index:05d}_{kept.start}-{kept.stop}.mp4"

    def save(self, chunk: Chunk) -> None:
        """Store a chunk whose frames are encoded already.

        Raises:
            OSError: If the disk is full.
        """
        tensors: dict[str, Tensor] = {"latents": chunk.latents}
        state = chunk.state
        if state.last_frame_u8 is not None:
            tensors["last_frame_u8"] = torch.from_numpy(state.last_frame_u8.copy())
        for name in ("drawn_latents", "motion_latents", "carried_pixels"):
            value = getattr(state, name)
            if value is not None:
                tensors[name] = value
        # Through Python's own file, so that a full disk is an OSError like everywhere else.
        data = save({name: value.contiguous().cpu() for name, value in tensors.items()})
        with atomic_path(self._chunk_path(chunk.chunk_index)) as temporary:
            temporary.write_bytes(data)

    def load(self, chunk_index: int) -> tuple[Tensor, RolloutState]:
        """Latents [1, C, T, h, w] of a finished chunk and the state after it.

        Raises:
            RunError: If the file is damaged.
        """
        path = self._chunk_path(chunk_index)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            latents = tensors.pop("latents")
            frame = tensors.pop("last_frame_u8").numpy()
        except (SafetensorError, KeyError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}). Start again with --no-resume.") from error
        return latents, RolloutState(
            next_chunk=chunk_index + 1,
            drawn_latents=tensors.get("drawn_latents"),
            motion_latents=tensors.get("motion_latents"),
            last_frame_u8=frame,
            carried_pixels=tensors.get("carried_pixels"),
        )

    def remove(self) -> None:
        """Delete the folder with all it holds."""
        shutil.rmtree(self.path)

    def _chunk_path(self, chunk_index: int) -> Path:
        return self.path / f"{chunk_index:05d}.safetensors"


@contextmanager
def open_run(output: Path, request: Mapping[str, object], *, resume: bool) -> Iterator[RunFolder]:
    """Hold the run folder of a result; only one process can.

    Args:
        output: The result.
        request: All that shapes the frames, JSON values; a folder made for another request is refused.
        resume: Continue what is there; False removes it first.

    Yields:
        The folder, new or with the chunks that are finished.

    Raises:
        InputError: If another process is at work on the same result.
        SettingsError: If the folder belongs to another request; the message names each difference.
        OSError: If the disk is full.
    """
    folder = RunFolder(run_folder(output))
    folder.path.mkdir(exist_ok=True)
    with (folder.path / _LOCK_FILE).open("a") as lock:
        if not _try_lock(lock):
            raise InputError(
                f"--output {output} is being made by another process. Wait for it, or give another --output."
            )
        request_path = folder.path / _REQUEST_FILE
        if not resume:
            for path in folder.path.iterdir():
                if path.name != _LOCK_FILE:
                    path.unlink()
        if request_path.exists():
            _compare(output, json.loads(request_path.read_text(encoding="utf-8")), request)
        else:
            with atomic_path(request_path) as temporary:
                text = json.dumps(request, ensure_ascii=False, indent=1)
                temporary.write_text(text, encoding="utf-8")
        yield folder


def list_runs(folder: Path) -> list[tuple[Path, int, float]]:
    """Run folders that lie in a folder and that no process holds.

    Returns:
        (path, finished chunks, age in seconds) each, oldest first.
    """
    found = []
    for path in folder.glob(run_folder(folder / "*.mp4").name):
        if not (path / _REQUEST_FILE).is_file():
            continue
        with (path / _LOCK_FILE).open("a") as lock:
            if not _try_lock(lock):
                continue
        newest = max(item.stat().st_mtime for item in path.iterdir())
        found.append((path, RunFolder(path).count_finished(), time.time() - newest))
    return sorted(found, key=lambda run: -run[2])


def _try_lock(file: IO[str]) -> bool:
    """Take a file for this process until it is closed; False if another process has it."""
    try:
        import fcntl  # noqa: PLC0415  # absent on Windows
    except ImportError:
        import msvcrt  # noqa: PLC0415

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _compare(output: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to continue what was begun differently."""
    differences = []
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            differences.append(f"{_label(key)} was {before.get(key)}, is {now.get(key)}")
    if differences:
        raise SettingsError(
            f"--output {output} has an unfinished run of another request: {'; '.join(differences)}. "
            "Give the same options to continue it, another --output, or --no-resume to start again."
        )


def _label(key: str) -> str:
    """An option as it is written; anything else (hashes, versions) by its own name."""
    return key if " " in key else option_name(key)
