"""The chunks of a run: made, encoded and put together in its run folder."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everanimate_cli import acceleration
from everanimate_cli.atomic_files import write_json
from everanimate_cli.background import Background
from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import MediaError, RunError, SettingsError
from everanimate_cli.estimates import geometry_of
from everanimate_cli.events import ChunkDone, ChunkStarted, OnEvent, StepDone
from everanimate_cli.images import write_png
from everanimate_cli.inputs import Inputs
from everanimate_cli.joining import AudioOutcome, join_videos
from everanimate_cli.pipeline import peak_memory_mib
from everanimate_cli.resume import load_chunk, save_chunk
from everanimate_cli.rollout import Chunk, Rollout, Sampled, Step
from everanimate_cli.runs import Pictures, RunFolder
from everanimate_cli.settings import ResolvedSettings

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is left to do in a run.

    Attributes:
        num_finished: Chunks that are there already.
        to_encode: Those of them whose kept frames changed with the length, or whose pictures are
            missing: their frames are made again from their latents.
        num_chunks: Of the video.
    """

    num_finished: int
    to_encode: Sequence[int]
    num_chunks: int

    def __bool__(self) -> bool:
        """Whether the networks are needed."""
        return bool(self.to_encode) or self.num_finished < self.num_chunks


class _PosesBeside:
    """Pose pictures of chunks, kept from when they drive one until they stand beside it.

    Read again, they would have to be decoded a second time, after the reader has gone on.
    """

    def __init__(self, rollout: Rollout) -> None:
        """Keep none yet.

        Args:
            rollout: That reads them.
        """
        self._read_driving = rollout.read_driving
        self._kept: dict[int, Frames] = {}

    def read(self, chunk_index: int) -> tuple[Frames, Frames]:
        """What drives a chunk, see `Rollout.read_driving`."""
        pose_u8, face_u8 = self._read_driving(chunk_index)
        self._kept[chunk_index] = pose_u8
        return pose_u8, face_u8

    def take(self, chunk_index: int) -> Frames | None:
        """Pose pictures [F, H, W, 3] of a chunk, once; None if it was not read."""
        return self._kept.pop(chunk_index, None)


def plan_work(run: RunFolder, plan: ChunkPlan, settings: ResolvedSettings) -> Work:
    """Compare what lies in the run folder with what is wanted."""
    num_finished = min(run.count_finished(), plan.num_chunks)
    num_without_pictures = 0
    if settings.png is not None:
        num_without_pictures = _take_pictures_folder(run, settings.png, num_finished)

    def is_whole(chunk_index: int) -> bool:
        kept = plan.kept_frames(chunk_index)
        if not run.segment_path(chunk_index, kept).exists():
            return False
        if settings.png is None:
            return True
        return chunk_index >= num_without_pictures and all(
            path.exists() for path in _picture_paths(settings.png, plan, chunk_index)
        )

    return Work(
        num_finished=num_finished,
        to_encode=[k for k in range(num_finished) if not is_whole(k)],
        num_chunks=plan.num_chunks,
    )


def _take_pictures_folder(run: RunFolder, folder: Path, num_finished: int) -> int:
    """Make the folder of the pictures this run's own.

    Returns:
        How many chunks were finished before.
    """
    pictures = run.read_pictures()
    if pictures is None or pictures.folder != folder.resolve():
        pictures = _write_pictures(run, folder, num_missing=num_finished)
    for path in folder.glob(".*.png.*.part"):  # of a process that was killed
        path.unlink()
    return pictures.num_missing


def _write_pictures(run: RunFolder, folder: Path, *, num_missing: int) -> Pictures:
    """Note where the pictures are, and of how many chunks there are none."""
    pictures = Pictures(folder=folder.resolve(), num_missing=num_missing)
    write_json(run.pictures_path, pictures.to_json())
    return pictures


def _picture_paths(folder: Path, plan: ChunkPlan, chunk_index: int) -> list[Path]:
    """Where the kept frames of a chunk go as pictures."""
    first = plan.first_frame(chunk_index)
    return [folder / f"{first + offset:06d}.png" for offset in plan.kept_frames(chunk_index)]


def encode_again(
    run: RunFolder,
    rollout: Rollout,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: Inputs,
    work: Work,
) -> None:
    """Encode finished chunks another time, from their latents."""
    for chunk_index in work.to_encode:
        latents, _ = load_chunk(run, chunk_index)
        frames_u8 = rollout.decode_frames(latents)
        write_segment(run, chunk_index, frames_u8, plan, settings, inputs)
    if settings.png is not None:
        _write_pictures(run, settings.png, num_missing=0)


def generate(
    run: RunFolder,
    rollout: Rollout,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: Inputs,
    work: Work,
    timings: dict[str, float],
    on_event: OnEvent,
) -> dict[str, float]:
    """Run the chunk loop from the first unfinished chunk on.

    With `settings.concurrent` and a core to spare, a chunk is decoded, where it can be, encoded and
    written while the next one is sampled; it is safe before the next one is begun to be written.

    Args:
        run: Where the chunks go.
        rollout: The chunk loop.
        plan: The cut of the video.
        settings: Of the run.
        inputs: Of the run.
        work: What is left to do.
        timings: Takes the seconds spent.
        on_event: Told of every step and chunk.

    Returns:
        Facts about the work; none if all chunks were there.
    """
    if work.num_finished == plan.num_chunks:
        return {}
    state = load_chunk(run, work.num_finished - 1)[1] if work.num_finished else None
    num_frames = 0
    timings |= {"chunks_s": 0.0, "encode_s": 0.0}

    def announce(chunk_index: int) -> None:
        on_event(
            ChunkStarted(
                chunk_index=chunk_index, num_chunks=plan.num_chunks, num_steps=settings.steps
            )
        )

    announce(work.num_finished)
    started_s = time.monotonic()
    poses = _PosesBeside(rollout)
    if settings.pose_beside:
        rollout = replace(rollout, read_driving=poses.read)

    def finish(made: Sampled | Chunk) -> tuple[int, float]:
        """(the chunk, seconds it took) once it is on disk."""
        begun_s = time.monotonic()
        chunk = made if isinstance(made, Chunk) else rollout.finish(made, beside=True)
        pose_u8 = poses.take(chunk.chunk_index)
        write_segment(run, chunk.chunk_index, chunk.frames_u8, plan, settings, inputs, pose_u8)
        save_chunk(run, chunk)
        return chunk.chunk_index, time.monotonic() - begun_s

    def report(chunk_index: int, encode_s: float) -> None:
        nonlocal num_frames, started_s
        now_s = time.monotonic()
        timings["encode_s"] += encode_s
        timings["chunks_s"] += now_s - started_s
        num_kept = len(plan.kept_frames(chunk_index))
        num_frames += num_kept
        on_event(
            ChunkDone(
                chunk_index=chunk_index,
                num_frames=num_kept,
                seconds=now_s - started_s,
                peak_memory_mib=peak_memory_mib(rollout.pipeline.device),
            )
        )
        started_s = now_s

    pipeline = rollout.pipeline
    concurrent = settings.concurrent and acceleration.has_core_to_spare(pipeline.device)
    chunks: Generator[Step | Sampled | Chunk] = (
        rollout.run_ahead(state, can_defer=partial(_can_decode_beside, rollout))
        if concurrent
        else rollout.run(state)
    )
    with closing(chunks), Background[tuple[int, float]](enabled=concurrent) as writer:
        for made in chunks:
            if isinstance(made, Step):
                on_event(StepDone(step_index=made.step_index))
            else:
                if writer.is_busy:
                    report(*writer.take())
                writer.start(partial(finish, made))
            if writer.is_done:
                report(*writer.take())
            if not isinstance(made, Step) and made.chunk_index + 1 < plan.num_chunks:
                announce(made.chunk_index + 1)
        if writer.is_busy:
            report(*writer.take())
    facts = {"seconds_per_frame": round(timings["chunks_s"] / num_frames, 4)}
    peak_mib = peak_memory_mib(rollout.pipeline.device)
    if peak_mib is not None:
        facts["peak_memory_mib"] = round(peak_mib)
    return facts


def _can_decode_beside(rollout: Rollout) -> bool:
    """Whether a chunk can be decoded while the next one is encoded and sampled."""
    pipeline = rollout.pipeline
    if not pipeline.may_overlap:
        return False
    geometry = geometry_of(pipeline.transformer.config, pipeline.vae.config)
    height, width = rollout.reference_u8.shape[:2]
    num_frames, tiled = rollout.frames_per_chunk, pipeline.tile_decoding
    piecewise = pipeline.device.type == "cuda"
    sampling_mib = max(
        geometry.step_mib(
            height,
            width,
            num_frames,
            rollout.num_identity_slots,
            pipeline.transformer.dtype,
            piecewise=piecewise,
        ),
        geometry.encode_mib(height, width, num_frames, piecewise=piecewise),
    )
    decoding_mib = geometry.decode_mib(height, width, num_frames, tiled=tiled, piecewise=piecewise)
    return acceleration.has_room_beside(pipeline.device, sampling_mib + decoding_mib)


def write_segment(
    run: RunFolder,
    chunk_index: int,
    frames_u8: Frames,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: Inputs,
    pose_u8: Frames | None = None,
) -> None:
    """Encode the kept frames of a chunk into the run folder, and as PNG where asked for.

    Args:
        run: Where they go.
        chunk_index: Of the chunk.
        frames_u8: [F, H, W, 3] all of its frames.
        plan: The cut of the video.
        settings: Of the run.
        inputs: Of the run.
        pose_u8: [F, H, W, 3] its pose pictures; None reads them if they are to stand beside.
    """
    kept = plan.kept_frames(chunk_index)
    frames_u8 = frames_u8[kept.start : kept.stop]
    height, width = frames_u8.shape[1:3]
    if settings.png is not None:
        settings.png.mkdir(exist_ok=True)
        paths = _picture_paths(settings.png, plan, chunk_index)
        for path, frame_u8 in zip(paths, frames_u8, strict=True):
            write_png(path, frame_u8)
    if settings.pose_beside:
        if pose_u8 is None:
            indices = driving_indices(plan, chunk_index, len(inputs.pose), settings.extend)
            pose_u8 = inputs.pose.read(indices)
        pose_u8 = pose_u8[kept.start : kept.stop]
        frames_u8 = np.concatenate([frames_u8, pose_u8], axis=2)
    path = run.segment_path(chunk_index, kept)
    with segment_writer(path, height, width, settings) as writer:
        writer.write(frames_u8)


def segment_writer(path: Path, height: int, width: int, settings: ResolvedSettings) -> VideoWriter:
    """The encoder of a chunk of generated frames of this size."""
    try:
        return VideoWriter(
            path,
            height=height,
            width=2 * width if settings.pose_beside else width,
            rate=settings.fps,
            codec=settings.codec,
            crf=settings.crf,
        )
    except SettingsError as error:
        raise SettingsError(f"--codec {settings.codec}: {error}") from error


def join(run: RunFolder, plan: ChunkPlan, inputs: Inputs) -> AudioOutcome:
    """Put the chunks together under the sound, in the run folder.

    Raises:
        RunError: If they, or the sound, cannot be joined.
    """
    segments = [run.segment_path(k, plan.kept_frames(k)) for k in range(plan.num_chunks)]
    try:
        return join_videos(segments, run.joined_path, audio=inputs.audio)
    except MediaError as error:
        raise RunError(
            f"{error} All chunks are finished and kept in {run.path}: run the same command with "
            "--no-audio if the sound is at fault, else with --no-resume."
        ) from error
