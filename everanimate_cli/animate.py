"""`everanimate animate`: from pictures and driving videos to one finished file."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everanimate_cli import hub, weights
from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import InputError, MediaError, RunError, SettingsError
from everanimate_cli.events import ChunkDone, ChunkStarted, Note, OnEvent, StepDone
from everanimate_cli.extract import extract, make_request, reusable
from everanimate_cli.images import atomic_path, fit_frame, fit_size, read_image, write_png
from everanimate_cli.joining import AudioOutcome, AudioSource, join_videos
from everanimate_cli.memory import chunk_noise, count_drawn_frames, draw_anchor_indices
from everanimate_cli.pipeline import peak_memory_mib
from everanimate_cli.preflight import default_pose_folder, settings_path, unfit_size
from everanimate_cli.records import LoraSpec
from everanimate_cli.resume import load_chunk, save_chunk
from everanimate_cli.rollout import Rollout, Step
from everanimate_cli.runs import Pictures, RunFolder, list_runs
from everanimate_cli.settings import (
    AnimateSettings,
    ExtractSettings,
    ResolvedSettings,
    resolve,
    run_folder,
)
from everanimate_cli.video import VideoReader, as_rate
from everanimate_cli.workspace import open_work, publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from fractions import Fraction

    from numpy.typing import NDArray

    from everanimate_cli.pipeline import AnimatePipeline

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


@dataclass(frozen=True, kw_only=True)
class _Media:
    """The pictures as they are in their files, and which videos the motion is in.

    Attributes:
        picture_u8: [*, *, 3] reference.
        views_u8: [*, *, 3] each.
        motion: (what an error calls it, file) of pose and face; empty until they are made.
        raw: The driving video that they are made of, as long as they are not.
    """

    picture_u8: Frames
    views_u8: Sequence[Frames]
    motion: Sequence[tuple[str, Path]]
    raw: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The pictures and videos of a run, opened and checked.

    Attributes:
        picture_u8: [*, *, 3] reference as it is in the file.
        reference_u8: [H, W, 3] reference at the size of the video.
        views_u8: [H, W, 3] each.
        pose: Pose frames at the output rate and size.
        face: Face crops at the output rate.
        audio: Where the sound is; None if there is none or none is wanted.
        hashes: What -> sha256 of the file.
    """

    picture_u8: Frames
    reference_u8: Frames
    views_u8: Sequence[Frames]
    pose: VideoReader
    face: VideoReader
    audio: AudioSource | None
    hashes: dict[str, str]


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
    media = _check_media(settings)  # before the model, which may take hours to download
    download = not settings.dry_run
    source = hub.locate_model(settings.model, on_event, download=download)
    resolved = resolve(settings, source.defaults)
    loras = [(spec, hub.locate_lora(spec, on_event, download=download)) for spec in resolved.lora]
    device = weights.choose_device(resolved.device)
    dtype = weights.choose_dtype(resolved.dtype, device)
    weights.check_checkpoint(source, [path for _, path in loras])
    geometry = weights.read_geometry(source)
    with ExitStack() as stack:
        height, width = _choose_size(resolved, media.picture_u8, source, geometry.size_multiple)
        if media.raw is None:
            inputs = _open_inputs(
                resolved, media, (height, width), geometry.face_size, stack, on_event
            )
            num_driving = len(inputs.pose)
        else:
            inputs = None
            with _open_video("DRIVING", media.raw, resolved, _rate(resolved)) as raw:
                num_driving = len(raw)
        plan = ChunkPlan(
            num_frames=resolved.requested_frames or num_driving,
            frames_per_chunk=resolved.frames_per_chunk,
            overlap=resolved.overlap,
        )
        driving_indices(plan, 0, num_driving, resolved.extend)  # refuses what is too short
        anchors = _draw_anchors(resolved, plan)
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
            resolved, media = _extract_driving(
                resolved, media, source, (height, width), geometry.face_size, on_event
            )
            timings["poses_s"] = time.monotonic() - started_s
            facts["pose_folder"] = str(resolved.driving)
            inputs = _open_inputs(
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
            rollout = _build_rollout(resolved, pipeline, inputs, plan, anchors)
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


# --- inputs --------------------------------------------------------------------------------------


def _choose_size(
    settings: ResolvedSettings,
    picture_u8: Frames,
    source: weights.ModelSource,
    multiple: int,
) -> tuple[int, int]:
    """(height, width) of the video."""
    asked = settings.height_width
    if asked is None:
        area = source.defaults.width * source.defaults.height
        return fit_size(picture_u8.shape[0], picture_u8.shape[1], area, multiple)
    height, width = asked
    if height % multiple or width % multiple:
        raise unfit_size(asked, multiple)
    return height, width


def _check_media(settings: AnimateSettings) -> _Media:
    """Read the pictures, and refuse videos that cannot be read or do not belong together."""
    with _named("REF"):
        picture_u8 = read_image(settings.ref)
    with _named("--view"):
        views_u8 = [read_image(path) for path in settings.view]
    raw = settings.driving
    if raw is not None and not raw.is_dir():
        _open_video("DRIVING", raw, settings)
        return _Media(picture_u8=picture_u8, views_u8=views_u8, motion=(), raw=raw)
    motion = _motion_of(settings)
    counts = [_open_video(*place, settings).info.num_frames for place in motion]
    if counts[0] != counts[1]:
        raise MediaError(
            f"{motion[0][1]} has {counts[0]} frames and {motion[1][1]} has {counts[1]}. "
            "Both must come from the same driving video."
        )
    return _Media(picture_u8=picture_u8, views_u8=views_u8, motion=motion)


def _motion_of(settings: AnimateSettings) -> Sequence[tuple[str, Path]]:
    """(what an error calls it, file) of the pose and the face video."""
    if settings.driving is not None:
        return [("DRIVING", settings.driving / name) for name in ("pose.mp4", "face.mp4")]
    assert settings.pose is not None  # checked on construction
    assert settings.face is not None
    return [("--pose", settings.pose), ("--face", settings.face)]


def _extract_driving(
    settings: ResolvedSettings,
    media: _Media,
    source: weights.ModelSource,
    size: tuple[int, int],
    face_size: int,
    on_event: OnEvent,
) -> tuple[ResolvedSettings, _Media]:
    """Make the poses of a raw video, or find them from an earlier run.

    Returns:
        Settings and media as if the folder of the poses had been given.
    """
    assert media.raw is not None
    asked = ExtractSettings(
        video=media.raw,
        output=settings.pose_folder or default_pose_folder(settings.output, media.raw),
        start=settings.start,
        end=settings.end,
        fps=settings.fps,
        size=f"{size[1]}x{size[0]}",
        fit=settings.fit,
        pose_model=settings.pose_model or source.defaults.pose_model,
        detector=settings.detector,
        provider="auto" if settings.device == "mps" else settings.device,
        person=settings.person,
        select=settings.select,
        face_size=face_size,
        retarget=settings.ref if settings.retarget else None,
        resume=settings.resume,
        overwrite=settings.overwrite,
    )
    folder = asked.output
    assert folder is not None
    differences = reusable(folder, make_request(asked, size))
    if differences and not settings.overwrite:
        raise SettingsError(
            f"--pose-folder {folder} holds poses that were made otherwise: "
            f"{'; '.join(differences)}. Give another --pose-folder, --overwrite to make them "
            "again, or this folder itself as DRIVING."
        )
    if differences == []:
        on_event(Note(text=f"the poses of {media.raw} are in {folder} already"))
    else:
        on_event(Note(text=f"extracting the poses of {media.raw} into {folder}"))
        extract(asked, on_event)
    # The folder holds the part that was asked for.
    settings = replace(settings, driving=folder, start=0.0, end=None)
    return settings, replace(media, motion=_motion_of(settings), raw=None)


def _open_video(
    label: str,
    path: Path,
    settings: AnimateSettings,
    rate: Fraction | None = None,
    transform: Callable[[Frames], Frames] | None = None,
) -> VideoReader:
    """A reader of the part of a driving video that was asked for."""
    try:
        with _named(label):
            return VideoReader(
                path,
                rate=rate,
                start_s=settings.start,
                end_s=settings.end,
                transform=transform,
            )
    except SettingsError as error:  # about `start`, which is an option of the same name
        raise SettingsError(f"--{error} Give an earlier time.") from error


def _rate(settings: ResolvedSettings) -> Fraction:
    try:
        return as_rate(settings.fps)
    except SettingsError as error:
        raise SettingsError(f"--fps {settings.fps:g}: {error}") from error


def _open_inputs(
    settings: ResolvedSettings,
    media: _Media,
    size: tuple[int, int],
    face_size: int,
    stack: ExitStack,
    on_event: OnEvent,
) -> _Inputs:
    """Open the videos at the rate and size of the result and find the sound."""
    fit = functools.partial(fit_frame, height=size[0], width=size[1], fit=settings.fit)
    squash = functools.partial(fit_frame, height=face_size, width=face_size, fit="stretch")
    rate = _rate(settings)
    (pose_label, pose_path), (face_label, face_path) = media.motion
    pose = stack.enter_context(_open_video(pose_label, pose_path, settings, rate, fit))
    face = stack.enter_context(_open_video(face_label, face_path, settings, rate, squash))
    if len(pose) != len(face):
        raise MediaError(
            f"{pose_path} lasts {pose.info.duration_s:.3f} s and {face_path} "
            f"{face.info.duration_s:.3f} s. Both must come from the same driving video."
        )
    files = {"REF": settings.ref, "pose video": pose_path, "face video": face_path}
    files |= {f"--view {index + 1}": path for index, path in enumerate(settings.view)}
    audio = _find_audio(settings, pose_path, on_event) if settings.audio else None
    if audio is not None and audio.path.resolve() == settings.output.resolve():
        raise InputError(
            f"--output {settings.output} is the driving video, which has the sound. "
            "Give another name."
        )
    return _Inputs(
        picture_u8=media.picture_u8,
        reference_u8=fit(media.picture_u8),
        views_u8=[fit(view_u8) for view_u8 in media.views_u8],
        pose=pose,
        face=face,
        audio=audio,
        hashes={name: _sha256(path) for name, path in files.items()},
    )


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the option in front of what is wrong with its file."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{label} {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_audio(
    settings: ResolvedSettings, pose_path: Path, on_event: OnEvent
) -> AudioSource | None:
    """The driving video's sound, or that of the pose video where there is no driving folder."""
    if settings.driving is None:
        return AudioSource(path=pose_path, start_s=settings.start)
    record_path = settings.driving / "extract.json"
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        name, digest = str(record["source"]), str(record["source_sha256"])
        start_s = float(record.get("start_s", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{record_path} cannot be read ({type(error).__name__}: {error}). "
            "Extract the pose again, or give --no-audio."
        ) from error
    # The name comes from a file: it is only used if it leads to the very video that was extracted.
    path = settings.driving / name
    if not path.is_file() or _sha256(path) != digest:
        on_event(Note(text=f"no sound: {name}, the driving video, is gone or has changed"))
        return None
    return AudioSource(path=path, start_s=start_s + settings.start)


# --- the run -------------------------------------------------------------------------------------


def _request(
    settings: ResolvedSettings,
    source: weights.ModelSource,
    loras: Sequence[tuple[LoraSpec, Path]],
    inputs: _Inputs,
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
        request[f"--lora {number} sha256"] = _sha256(path)
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


def _draw_anchors(settings: ResolvedSettings, plan: ChunkPlan) -> list[int]:
    """Frames of chunk 0 that become identity memory."""
    num_drawn = 0
    if settings.memory == "latent":
        num_drawn = count_drawn_frames(settings.identity_slots, len(settings.view))
    return draw_anchor_indices(settings.seed, plan.frames_per_chunk, num_drawn)


def _build_rollout(
    settings: ResolvedSettings,
    pipeline: AnimatePipeline,
    inputs: _Inputs,
    plan: ChunkPlan,
    anchors: Sequence[int],
) -> Rollout:
    def read_driving(chunk_index: int) -> tuple[Frames, Frames]:
        indices = driving_indices(plan, chunk_index, len(inputs.pose), settings.extend)
        return inputs.pose.read(indices), inputs.face.read(indices)

    prompt_embeds = pipeline.encode_prompt(settings.prompt)
    negative_prompt_embeds = None
    if settings.guidance_scale != 1:
        negative_prompt_embeds = pipeline.encode_prompt(settings.negative_prompt)
    pipeline.release_text_encoder()
    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=inputs.reference_u8,
        picture_u8=inputs.picture_u8,
        views_u8=inputs.views_u8,
        read_driving=read_driving,
        noise=lambda chunk_index: chunk_noise(settings.seed, chunk_index, rollout.noise_shape),
        anchor_frame_indices=anchors,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        num_chunks=plan.num_chunks,
        frames_per_chunk=plan.frames_per_chunk,
        overlap=plan.overlap,
        num_identity_slots=settings.identity_slots,
        num_inference_steps=settings.steps,
        shift=settings.shift,
        guidance_scale=settings.guidance_scale,
        memory=settings.memory,
        clip_image=settings.clip_image,
    )
    return rollout


def _encode_again(
    run: RunFolder,
    rollout: Rollout,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    inputs: _Inputs,
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
    inputs: _Inputs,
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
    inputs: _Inputs,
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


def _join(run: RunFolder, segments: Sequence[Path], inputs: _Inputs) -> AudioOutcome:
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
