"""The run folder beside a result: finished chunks on disk, so that a killed run loses one at most.

What lies in the folder is described in `runs`.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from everanimate_cli.errors import EverAnimateError, InputError, RunError, SettingsError
from everanimate_cli.images import atomic_path
from everanimate_cli.preflight import output_exists
from everanimate_cli.rollout import Chunk, RolloutState
from everanimate_cli.runs import RunFolder
from everanimate_cli.settings import option_name, run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

_STATE_TENSORS = ("drawn_latents", "motion_latents", "carried_pixels")
_HASH = " sha256"


def save_chunk(run: RunFolder, chunk: Chunk) -> None:
    """Store a chunk whose frames are encoded already; it counts as finished from then on.

    Raises:
        OSError: If the disk is full.
    """
    tensors: dict[str, Tensor] = {"latents": chunk.latents}
    state = chunk.state
    if state.last_frame_u8 is not None:
        tensors["last_frame_u8"] = torch.from_numpy(state.last_frame_u8.copy())
    for name in _STATE_TENSORS:
        value = getattr(state, name)
        if value is not None:
            tensors[name] = value
    # Through Python's own file, so that a full disk is an OSError like everywhere else.
    data = save({name: value.contiguous().cpu() for name, value in tensors.items()})
    with atomic_path(run.chunk_path(chunk.chunk_index)) as temporary:
        temporary.write_bytes(data)


def load_chunk(run: RunFolder, chunk_index: int) -> tuple[Tensor, RolloutState]:
    """Latents [1, C, T, h, w] of a finished chunk and the state after it.

    Raises:
        RunError: If the file is damaged.
    """
    path = run.chunk_path(chunk_index)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        latents = tensors.pop("latents")
        frame = tensors.pop("last_frame_u8").numpy()
    except (SafetensorError, KeyError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}). Start again with --no-resume.") from error
    state = {name: tensors.get(name) for name in _STATE_TENSORS}
    return latents, RolloutState(next_chunk=chunk_index + 1, last_frame_u8=frame, **state)


@contextmanager
def open_run(
    output: Path, request: Mapping[str, object], *, resume: bool, overwrite: bool
) -> Iterator[RunFolder]:
    """Hold the run folder of a result; only one process can.

    Args:
        output: The result.
        request: All that shapes the frames, JSON values; a folder made for another request is
            refused.
        resume: Continue what is there; False removes it first.
        overwrite: Whether a result that no run folder belongs to may be replaced.

    Yields:
        The folder, new or with the chunks that are finished.

    Raises:
        InputError: If another process is at work on the same result, or has just finished it.
        SettingsError: If the folder belongs to another request; the message names each difference.
        RunError: If the folder is damaged.
        OSError: If the disk is full.
    """
    run = RunFolder(run_folder(output))
    with run.hold() as is_ours:
        if not is_ours:
            raise InputError(
                f"--output {output} is being made by another process. "
                "Wait for it, or give another --output."
            )
        if not resume:
            run.clear()
        is_new = not run.request_path.exists()
        if not is_new:
            _compare(output, _read_request(run), request)
            run.clear_temporaries()
        else:
            run.clear()
            if output.exists() and not overwrite:
                run.remove()
                raise output_exists(output)
            with atomic_path(run.request_path) as temporary:
                text = json.dumps(request, ensure_ascii=False, indent=1)
                temporary.write_text(text, encoding="utf-8")
        try:
            yield run
        except EverAnimateError as error:
            # What is refused leaves nothing behind, however late it is found.
            if is_new and error.exit_code != RunError.exit_code and not run.count_finished():
                run.remove()
            raise


def publish(made: Path, target: Path) -> None:
    """Move a finished file to its place, durably; both are in one file system."""
    made.replace(target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_request(run: RunFolder) -> dict[str, object]:
    path = run.request_path
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
        return dict(request.items())
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}). Start again with --no-resume.") from error


def _compare(output: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to continue what was begun differently."""
    differences = [
        _difference(key, before.get(key), now.get(key))
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise SettingsError(
            f"--output {output} has a run folder of another request: {'; '.join(differences)}. "
            "Give the same options to continue it, another --output, or --no-resume to start again."
        )


def _difference(key: str, before: object, now: object) -> str:
    """One of them in words; only what is named as a settings field is an option."""
    name = key.removesuffix(_HASH)
    if name != key:
        if before is not None and now is not None:
            return f"{name} has another content"
        before, now = (value and "given" for value in (before, now))
    label = option_name(name) if name.isidentifier() and name.islower() else name
    return f"{label} was {_in_words(before)}, is {_in_words(now)}"


def _in_words(value: object) -> str:
    if value is None:
        return "not given"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
