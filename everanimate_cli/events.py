"""What a worker reports while it works; the console draws it, a test records it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChunkStarted:
    """A chunk is about to be sampled; a resumed run starts with a `chunk_index` above 0."""

    chunk_index: int
    num_chunks: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One Euler step of the current chunk is done; `step_index` counts from 0."""

    step_index: int


@dataclass(frozen=True, kw_only=True)
class ChunkDone:
    """A chunk is decoded, encoded and safe on disk.

    Attributes:
        chunk_index: Position of the chunk, from 0.
        num_frames: Frames that the chunk adds to the video.
        seconds: Wall time spent on the chunk.
        peak_memory_mib: Most memory used so far, of the device or else of the process; None where
            the platform does not tell.
    """

    chunk_index: int
    num_frames: int
    seconds: float
    peak_memory_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """Work that is counted begins, or goes on where an earlier run stopped.

    Attributes:
        name: What is done, such as "poses".
        total: How many there are in all.
        done: How many an earlier run has done.
        unit: What is counted, such as "frames".
    """

    name: str
    total: int
    done: int = 0
    unit: str = "frames"


@dataclass(frozen=True, kw_only=True)
class PhaseAdvanced:
    """So many are done in the phase that started last; it ends with `done` at its total."""

    done: int


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """One step of the optimiser is done.

    Attributes:
        step: How many are done, those of earlier runs included.
        num_steps: How many there are in all.
        loss: Of this step, over all its samples.
        learning_rate: Of this step.
        seconds: Wall time of the step.
        peak_memory_mib: As in `ChunkDone`.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    seconds: float
    peak_memory_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line for the reader: a phase that takes time, a warning, a choice made on the way."""

    text: str


Event = ChunkStarted | StepDone | ChunkDone | PhaseStarted | PhaseAdvanced | TrainStep | Note
OnEvent = Callable[[Event], None]
