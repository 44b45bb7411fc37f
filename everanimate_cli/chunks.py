"""Which output and driving frames each chunk has: count, stride, overlap, extension."""

from dataclasses import dataclass
from typing import assert_never

from everanimate_cli.errors import SettingsError
from everanimate_cli.settings import TEMPORAL_STRIDE, Extend


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """How the output video is cut into chunks that overlap.

    Attributes:
        num_frames: Output frames, at least 1.
        frames_per_chunk: Pixel frames F decoded from one chunk, 4n + 1.
        overlap: Frames o that neighbouring chunks share, 0 < o < F.

    Raises:
        SettingsError: If a number is outside its range.

    Source: method page section 1.
    """

    num_frames: int
    frames_per_chunk: int
    overlap: int

    def __post_init__(self) -> None:
        """Check the three numbers."""
        if self.num_frames < 1:
            raise SettingsError(f"A video of {self.num_frames} frames. Ask for at least 1.")
        frames = self.frames_per_chunk
        if frames < 1 + TEMPORAL_STRIDE or (frames - 1) % TEMPORAL_STRIDE:
            below = max(1, (frames - 1) // TEMPORAL_STRIDE)
            raise SettingsError(
                f"--frames-per-chunk {frames} is not 4n+1, at least 5. "
                f"Give {below * TEMPORAL_STRIDE + 1} or {(below + 1) * TEMPORAL_STRIDE + 1}."
            )
        if not 0 < self.overlap < frames:
            raise SettingsError(
                f"--overlap {self.overlap} does not fit --frames-per-chunk {frames}. "
                f"Give 1 to {frames - 1}."
            )

    @property
    def stride(self) -> int:
        """Output frames from the start of one chunk to the start of the next."""
        return self.frames_per_chunk - self.overlap

    @property
    def num_chunks(self) -> int:
        """Chunks needed to cover all output frames."""
        missing = max(0, self.num_frames - self.frames_per_chunk)
        return 1 + -(-missing // self.stride)

    def first_frame(self, chunk_index: int) -> int:
        """Output index of the chunk's frame 0, which an earlier chunk may have made already."""
        return chunk_index * self.stride

    def kept_frames(self, chunk_index: int) -> range:
        """Frames within the decoded chunk that go to the output.

        The first `overlap` frames of every chunk but the first repeat the end of the one before;
        the end of the last chunk is cut at `num_frames`.
        """
        start = self.overlap if chunk_index else 0
        wanted = self.num_frames - self.first_frame(chunk_index)
        return range(start, min(self.frames_per_chunk, wanted))


def driving_index(output_index: int, num_driving_frames: int, extend: Extend = "pingpong") -> int:
    """Driving frame that output frame `output_index` follows, also past the end of the driving.

    Args:
        output_index: Output frame, from 0 on.
        num_driving_frames: Driving frames at the output rate, at least 1.
        extend: `pingpong` runs back and forth without repeating a turning frame, `loop` starts
            again, `hold` stays on the last frame; `error` is for outputs no longer than the
            driving and follows `pingpong`.

    Returns:
        Index in 0 .. num_driving_frames - 1.

    Source: method page section 1.
    """
    match extend:
        case "pingpong" | "error":
            position = output_index % max(1, 2 * num_driving_frames - 2)
            turned = position >= num_driving_frames
            return 2 * num_driving_frames - 2 - position if turned else position
        case "loop":
            return output_index % num_driving_frames
        case "hold":
            return min(output_index, num_driving_frames - 1)
        case _:
            assert_never(extend)


def driving_indices(
    plan: ChunkPlan, chunk_index: int, num_driving_frames: int, extend: Extend = "pingpong"
) -> list[int]:
    """Driving frames of one chunk, one per decoded frame, the surplus of the last chunk included.

    The requested length changes no index, so a finished run can be made longer.

    Args:
        plan: The cut of the output.
        chunk_index: Chunk, from 0 on.
        num_driving_frames: Driving frames at the output rate, at least 1.
        extend: As in `driving_index`; `error` refuses an output longer than the driving.

    Returns:
        `frames_per_chunk` indices.

    Raises:
        SettingsError: With `error`, if the output is longer than the driving.
    """
    if extend == "error" and plan.num_frames > num_driving_frames:
        raise SettingsError(
            f"--extend error: {plan.num_frames} output frames need as many driving frames, found "
            f"{num_driving_frames}. Ask for a shorter video, or give --extend pingpong, loop or "
            "hold."
        )
    first = plan.first_frame(chunk_index)
    return [
        driving_index(first + offset, num_driving_frames, extend)
        for offset in range(plan.frames_per_chunk)
    ]
