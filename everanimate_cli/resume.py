"""Finished chunks on disk, so that a killed run loses one at most; see `runs` for the folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.errors import RunError
from everanimate_cli.rollout import Chunk, RolloutState

if TYPE_CHECKING:
    from torch import Tensor

    from everanimate_cli.runs import RunFolder

_STATE_TENSORS = ("drawn_latents", "motion_latents", "carried_pixels", "step_ratios")


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
    with atomic_path(run.part_path(chunk.chunk_index)) as temporary:
        temporary.write_bytes(data)


def load_chunk(run: RunFolder, chunk_index: int) -> tuple[Tensor, RolloutState]:
    """Latents [1, C, T, h, w] of a finished chunk and the state after it.

    Raises:
        RunError: If the file is damaged.
    """
    path = run.part_path(chunk_index)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        latents = tensors.pop("latents")
        frame = tensors.pop("last_frame_u8").numpy()
    except (SafetensorError, KeyError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}). Start again with --no-resume.") from error
    state = {name: tensors.get(name) for name in _STATE_TENSORS}
    return latents, RolloutState(next_chunk=chunk_index + 1, last_frame_u8=frame, **state)
