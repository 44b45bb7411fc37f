"""`everanimate animate`: from pictures and driving videos to one finished file."""

from __future__ import annotations

import json
import platform
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everanimate_cli import hub, weights
from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import MediaError, RunError, SettingsError
from everanimate_cli.events import ChunkDone, ChunkStarted, Note, OnEvent, StepDone
from everanimate_cli.hashes import hash_file
from everanimate_cli.images import atomic_path, write_png
from everanimate_cli.inputs import (
    Inputs,
    build_rollout,
    check_media,
    choose_size,
    draw_anchors,
    extract_driving,
    open_inputs,
    open_video,
    output_rate,
)
from everanimate_cli.joining import AudioOutcome, join_videos
from everanimate_cli.pipeline import peak_memory_mib
from everanimate_cli.preflight import settings_path
from everanimate_cli.records import LoraSpec
from everanimate_cli.resume import load_chunk, save_chunk
from everanimate_cli.rollout import Rollout, Step
from everanimate_cli.runs import Pictures, RunFolder, list_runs
from everanimate_cli.settings import (
    AnimateSettings,
    ResolvedSettings,
    resolve,
    run_folder,
)
from everanimate_cli.workspace import open_work, publish

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

# Options that change neither a frame nor a byte of the encoded chunks, and the length, which may
# change between runs.
# How poses were made shows in the pose and face videos, whose content counts.
_FREE_OPTIONS = (
    *("minutes", "seconds", "frames", "output", "device", "audio", "png"),
    *("pose_model", "detector", "person", "select", "retarget", "pose_folder"),
)


@dataclass(frozen=True, kw_only=True)
class AnimateResult:
    """What a run made, or with `dry_run` what it would make.

    Attributes:
        output: The video.
        facts: JSON values: length, size, chunks, timings, the settings file.
    """

    output: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as one flat JSON object."""
        return {"output": str(self.output), **self.facts}


def animate(settings: AnimateSettings, on_event: OnEvent) -> AnimateResult:
    """Make the video that the settings ask for, or continue where an earlier run stopped.

    Args:
        settings: Checked options.
        on_event: Told of every chunk and step, and of what is worth a line.

    Returns:
        The finished video and facts about it; with `settings.dry_run` the plan alone.

    Raises:
        EverAnimateError: If an input, option or checkpoint cannot be used; nothing is written then.
        OSError: If the disk is full; the run folder stays and the same command continues it.
    """
    started_s = time.monotonic()
    media = check_media(settings)  # before the model, which may take hours to download
    download = not settings.dry_run
    source = hub.locate_model(settings.model, on_event, download=download)
    resolved = resolve(settings, source.defaults)
    loras = [(spec, hub.locate_lora(spec, on_event, download=download)) for spec in resolved.lora]
    device = weights.choose_device(resolved.device)
    dtype = weights.choose_dtype(resolved.dtype, device)
    weights.check_checkpoint(source, [path for _, path in loras])
    geometry = weights.read_geometry(source)
    with ExitStack() as stack:
        height, width = choose_size(resolved, media.picture_u8, source, geometry.size_multiple)
        if media.raw is None:
            inputs = open_inputs(
                resolved, media, (height, width), geometry.face_size, stack, on_event
            )
            num_driving = len(inputs.pose)
        else:
            inputs = None
            with open_video("DRIVING", media.raw, resolved, output_rate(resolved)) as raw:
                num_driving = len(raw)
        plan = ChunkPlan(
            num_frames=resolved.requested_frames or num_driving,
            frames_per_chunk=resolved.frames_per_chunk,
            overlap=resolved.overlap,
        )
        driving_indices(plan, 0, num_driving, resolved.extend)  # refuses what is too short
        anchors = draw_anchors(resolved, plan)
        _segment_writer(Path(), height, width, resolved)  # refuses what no encoder takes
        facts: dict[str, Any] = {
            "frames": plan.num_frames,
            "seconds": round(plan.num_frames / resolved.fps, 3),
            "fps": resolved.fps,
            "size": f"{width}x{height}",
            "chunks": plan.num_chunks,
            "frames_per_chunk": plan.frames_per_chunk,
            "overlap": plan.overlap,
            "steps": resolved.steps,
            "driving_frames": num_driving,
            "model": source.name,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
        }
        if resolved.dry_run:
            estimate = _estimate_memory_mib(source, plan, resolved, (height, width), dtype)
            return AnimateResult(output=resolved.output, facts=facts | estimate)

        timings: dict[str, float] = {}
        if inputs is None:
            resolved, media = extract_driving(
                resolved, media, source, (height, width), geometry.face_size, on_event
            )
            timings["poses_s"] = time.monotonic() - started_s
            facts["pose_folder"] = str(resolved.driving)
            inputs = open_inputs(
                resolved, media, (height, width), geometry.face_size, stack, on_event
            )
        request = _request(resolved, source, loras, inputs, (height, width), facts)
        _name_other_runs(resolved.output, on_event)
        run = stack.enter_context(
            open_work(
                RunFolder(run_folder(resolved.output)),
                request,
                label="--output",
                resume=resolved.resume,
                overwrite=resolved.overwrite,
            )
        )
        work = _plan_work(run, plan, resolved)
        on_event(Note(text=_describe_work(facts, work)))
        if work:
            loading_s = time.monotonic()
            pipeline = weights.load_pipeline(
                source,
                loras,
                device,
                dtype,
                with_image_processor=resolved.memory == "pixel",
            )
            timings["load_s"] = time.monotonic() - loading_s
            rollout = build_rollout(resolved, pipeline, inputs, plan, anchors)
            _encode_again(run, rollout, plan, resolved, inputs, work)
            facts |= _generate(run, rollout, plan, resolved, inputs, work, timings, on_event)
        segments = [run.segment_path(k, plan.kept_frames(k)) for k in range(plan.num_chunks)]
        facts["audio"] = _join(run, segments, inputs)
        publish(run.joined_path, resolved.output)
        timings["total_s"] = time.monotonic() - started_s
        facts["settings_file"] = str(settings_path(resolved.output))
        facts["timings"] = {name: round(value, 3) for name, value in timings.items()}
        record = {
            "settings": settings.to_json(),
            "effective": resolved.to_json(),
            "result": facts,
            "request": request,
            "model_revision": source.revision,
            "anchor_frame_indices": anchors,
            "platform": platform.platform(),
        }
        with atomic_path(run.record_path) as temporary:
            text = json.dumps(record, ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        publish(run.record_path, settings_path(resolved.output))
        if not resolved.keep_run:
            run.remove()
    return AnimateResult(output=resolved.output, facts=facts)


# --- the run -------------------------------------------------------------------------------------


def _request(
    settings: ResolvedSettings,
    source: weights.ModelSource,
    loras: Sequence[tuple[LoraSpec, Path]],
    inputs: Inputs,
    size: tuple[int, int],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Everything that shapes the encoded chunks; a run folder belongs to one such request.

    Where a file lies does not matter, what is in it does.
    """
    paths = ("ref", "driving", "pose", "face", "view", "lora", "model")
    saved = settings.to_json()
    request = {k: v for k, v in saved.items() if k not in (*_FREE_OPTIONS, *paths)}
    request["size"] = f"{size[1]}x{size[0]}"
    request["dtype"] = facts["dtype"]
    request["device type"] = str(facts["device"]).partition(":")[0]
    request["--model sha256"] = weights.checkpoint_hash(source)
    request |= {f"{name} sha256": digest for name, digest in inputs.hashes.items()}
    for number, (spec, path) in enumerate(loras, start=1):
        request[f"--lora {number} sha256"] = hash_file(path)
        request[f"scale of --lora {number}"] = spec.scale
    names = ("everanimate", "torch", "diffusers", "av")
    return request | {f"{name} version": version(name) for name in names}


def _name_other_runs(output: Path, on_event: OnEvent) -> None:
    for run in list_runs(output.parent):
        path = run.folder.path
        # A run beside its result was kept on purpose.
        if path != run_folder(output) and not run.is_held and not run.has_result:
            on_event(
                Note(
                    text=f"{path} is an unfinished run ({run.describe()}). Its own command "
                    f"continues it; to delete it: everanimate runs --remove {quote(str(path))}"
                )
            )


@dataclass(frozen=True, kw_only=True)
class _Work:
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


def _plan_work(run: RunFolder, plan: ChunkPlan, settings: ResolvedSettings) -> _Work:
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

    return _Work(
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
        pictures = Pictures(folder=folder.resolve(), num_missing=num_finished)
        with atomic_path(run.pictures_path) as temporary:
            temporary.write_text(json.dumps(pictures.to_json()), encoding="utf-8")
    for path in folder.glob(".*.png.*.part"):  # of a process that was killed
        path.unlink()
    return pictures.num_missing


def _picture_paths(folder: Path, plan: ChunkPlan, chunk_index: int) -> list[Path]:
    """Where the kept frames of a chunk go as pictures."""
    first = plan.first_frame(chunk_index)
    return [folder / f"{first + offset:06d}.png" for offset in plan.kept_frames(chunk_index)]


def _describe_work(facts: dict[str, Any], work: _Work) -> str:
    """What is about to happen, in one line."""
    chunks = "1 chunk" if work.num_chunks == 1 else f"{work.num_chunks} chunks"
    line = (
        f"{facts['frames']} frames of {facts['size']} at {facts['fps']:g} fps in {chunks} of "
        f"{facts['steps']} steps, {facts['model']} on {facts['device']} in {facts['dtype']}"
    )
    return f"{line}; {work.num_finished} done already" if work.num_finished else line


def _encode_again(
    run: RunFolder,
    rollout: Rollout,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: Inputs,
    work: _Work,
) -> None:
    """Encode finished chunks another time, from their latents."""
    for chunk_index in work.to_encode:
        latents, _ = load_chunk(run, chunk_index)
        frames_u8 = rollout.decode_frames(latents)
        _write_segment(run, chunk_index, frames_u8, plan, settings, inputs)
    if settings.png is not None:
        pictures = Pictures(folder=settings.png.resolve(), num_missing=0)
        with atomic_path(run.pictures_path) as temporary:
            temporary.write_text(json.dumps(pictures.to_json()), encoding="utf-8")


def _generate(
    run: RunFolder,
    rollout: Rollout,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: Inputs,
    work: _Work,
    timings: dict[str, float],
    on_event: OnEvent,
) -> dict[str, float]:
    """Run the chunk loop from the first unfinished chunk on; every chunk is safe before the next.

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
    for made in rollout.run(state):
        if isinstance(made, Step):
            on_event(StepDone(step_index=made.step_index))
            continue
        encode_started_s = time.monotonic()
        _write_segment(run, made.chunk_index, made.frames_u8, plan, settings, inputs)
        save_chunk(run, made)
        now_s = time.monotonic()
        timings["encode_s"] += now_s - encode_started_s
        timings["chunks_s"] += now_s - started_s
        num_kept = len(plan.kept_frames(made.chunk_index))
        num_frames += num_kept
        on_event(
            ChunkDone(
                chunk_index=made.chunk_index,
                num_frames=num_kept,
                seconds=now_s - started_s,
                peak_memory_mib=peak_memory_mib(rollout.pipeline.device),
            )
        )
        started_s = now_s
        if made.chunk_index + 1 < plan.num_chunks:
            announce(made.chunk_index + 1)
    facts = {"seconds_per_frame": round(timings["chunks_s"] / num_frames, 4)}
    peak_mib = peak_memory_mib(rollout.pipeline.device)
    if peak_mib is not None:
        facts["peak_memory_mib"] = round(peak_mib)
    return facts


def _write_segment(
    run: RunFolder,
    chunk_index: int,
    frames_u8: Frames,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: Inputs,
) -> None:
    """Encode the kept frames of a chunk into the run folder, and as PNG where asked for."""
    kept = plan.kept_frames(chunk_index)
    frames_u8 = frames_u8[kept.start : kept.stop]
    height, width = frames_u8.shape[1:3]
    if settings.png is not None:
        settings.png.mkdir(exist_ok=True)
        paths = _picture_paths(settings.png, plan, chunk_index)
        for path, frame_u8 in zip(paths, frames_u8, strict=True):
            write_png(path, frame_u8)
    if settings.pose_beside:
        indices = driving_indices(plan, chunk_index, len(inputs.pose), settings.extend)
        pose_u8 = inputs.pose.read(indices[kept.start : kept.stop])
        frames_u8 = np.concatenate([frames_u8, pose_u8], axis=2)
    path = run.segment_path(chunk_index, kept)
    with _segment_writer(path, height, width, settings) as writer:
        writer.write(frames_u8)


def _segment_writer(path: Path, height: int, width: int, settings: ResolvedSettings) -> VideoWriter:
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


def _join(run: RunFolder, segments: Sequence[Path], inputs: Inputs) -> AudioOutcome:
    """Put the chunks together under the sound, in the run folder."""
    try:
        return join_videos(segments, run.joined_path, audio=inputs.audio)
    except MediaError as error:
        raise RunError(
            f"{error} All chunks are finished and kept in {run.path}: run the same command with "
            "--no-audio if the sound is at fault, else with --no-resume."
        ) from error


def _estimate_memory_mib(
    source: weights.ModelSource,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Weights, counted exactly, and the largest working set of one chunk, estimated."""
    parts = weights.weights_mib(source, dtype)
    working = weights.read_geometry(source).working_set_mib(
        *size,
        frames_per_chunk=plan.frames_per_chunk,
        num_identity_slots=settings.identity_slots,
        dtype=dtype,
    )
    total = sum(parts.values()) + working
    return {
        "weights_mib": {name: round(value, 1) for name, value in parts.items()},
        "estimated_memory_mib": round(total),
    }
