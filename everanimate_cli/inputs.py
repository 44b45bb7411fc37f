"""What a video is made of: pictures, driving videos and sound, found, checked and opened.

`animate` and `analyze attention` start from here; `build_rollout` makes a chunk loop of it.
"""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.downloads import cache_folder
from everanimate_cli.errors import InputError, MediaError, SettingsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.extract import extract, make_request, reusable
from everanimate_cli.hashes import hash_file
from everanimate_cli.images import fit_frame, fit_size, read_image
from everanimate_cli.joining import AudioSource
from everanimate_cli.memory import chunk_noise, count_drawn_frames, draw_anchor_indices
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.preflight import default_pose_folder, unfit_size
from everanimate_cli.prompt_cache import encode_prompts
from everanimate_cli.rollout import Rollout
from everanimate_cli.settings import (
    AnimateSettings,
    ExtractSettings,
    ModelDefaults,
    ResolvedSettings,
)
from everanimate_cli.video import VideoReader, as_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from fractions import Fraction

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from everanimate_cli.pipeline import AnimatePipeline

    Frames = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Media:
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
class Inputs:
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


def choose_size(
    settings: ResolvedSettings,
    picture_u8: Frames,
    defaults: ModelDefaults,
    multiple: int,
) -> tuple[int, int]:
    """(height, width) of the video."""
    asked = settings.height_width
    if asked is None:
        area = defaults.width * defaults.height
        return fit_size(picture_u8.shape[0], picture_u8.shape[1], area, multiple)
    height, width = asked
    if height % multiple or width % multiple:
        raise unfit_size(asked, multiple)
    return height, width


def check_media(settings: AnimateSettings) -> Media:
    """Read the pictures, and refuse videos that cannot be read or do not belong together."""
    with _named("REF"):
        picture_u8 = read_image(settings.ref)
    with _named("--view"):
        views_u8 = [read_image(path) for path in settings.view]
    raw = settings.driving
    if raw is not None and not raw.is_dir():
        open_video("DRIVING", raw, settings)
        return Media(picture_u8=picture_u8, views_u8=views_u8, motion=(), raw=raw)
    motion = _motion_of(settings)
    counts = [open_video(*place, settings).info.num_frames for place in motion]
    if counts[0] != counts[1]:
        raise MediaError(
            f"{motion[0][1]} has {counts[0]} frames and {motion[1][1]} has {counts[1]}. "
            "Both must come from the same driving video."
        )
    return Media(picture_u8=picture_u8, views_u8=views_u8, motion=motion)


def _motion_of(settings: AnimateSettings) -> Sequence[tuple[str, Path]]:
    """(what an error calls it, file) of the pose and the face video."""
    if settings.driving is not None:
        return [("DRIVING", settings.driving / name) for name in ("pose.mp4", "face.mp4")]
    assert settings.pose is not None  # checked on construction
    assert settings.face is not None
    return [("--pose", settings.pose), ("--face", settings.face)]


def extract_driving(
    settings: ResolvedSettings,
    media: Media,
    source: ModelSource,
    size: tuple[int, int],
    face_size: int,
    on_event: OnEvent,
) -> tuple[ResolvedSettings, Media]:
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


def open_video(
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


def output_rate(settings: ResolvedSettings) -> Fraction:
    """Frames per second of the result; raises SettingsError if no video file can store it."""
    try:
        return as_rate(settings.fps)
    except SettingsError as error:
        raise SettingsError(f"--fps {settings.fps:g}: {error}") from error


def open_motion(
    settings: ResolvedSettings,
    media: Media,
    size: tuple[int, int],
    face_size: int,
    stack: ExitStack,
    on_event: OnEvent,
) -> tuple[Inputs | None, int, ChunkPlan]:
    """What drives the video, and how it is cut.

    Args:
        settings: Of the run.
        media: From `check_media`.
        size: (height, width) of the video.
        face_size: Side of the face crops.
        stack: Closes the videos.
        on_event: Told what is worth a line.

    Returns:
        The opened videos, None where poses must be extracted first; their number of frames at the
        rate of the video; its chunks.

    Raises:
        EverAnimateError: If a video cannot be used or is too short.
    """
    if media.raw is None:
        inputs = open_inputs(settings, media, size, face_size, stack, on_event)
        num_driving = len(inputs.pose)
    else:
        inputs = None
        with open_video("DRIVING", media.raw, settings, output_rate(settings)) as raw:
            num_driving = len(raw)
    plan = ChunkPlan(
        num_frames=settings.requested_frames or num_driving,
        frames_per_chunk=settings.frames_per_chunk,
        overlap=settings.overlap,
    )
    driving_indices(plan, 0, num_driving, settings.extend)  # refuses what is too short
    return inputs, num_driving, plan


def open_inputs(
    settings: ResolvedSettings,
    media: Media,
    size: tuple[int, int],
    face_size: int,
    stack: ExitStack,
    on_event: OnEvent,
) -> Inputs:
    """Open the videos at the rate and size of the result and find the sound."""
    fit = functools.partial(fit_frame, height=size[0], width=size[1], fit=settings.fit)
    squash = functools.partial(fit_frame, height=face_size, width=face_size, fit="stretch")
    rate = output_rate(settings)
    (pose_label, pose_path), (face_label, face_path) = media.motion
    pose = stack.enter_context(open_video(pose_label, pose_path, settings, rate, fit))
    face = stack.enter_context(open_video(face_label, face_path, settings, rate, squash))
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
    return Inputs(
        picture_u8=media.picture_u8,
        reference_u8=fit(media.picture_u8),
        views_u8=[fit(view_u8) for view_u8 in media.views_u8],
        pose=pose,
        face=face,
        audio=audio,
        hashes={name: hash_file(path) for name, path in files.items()},
    )


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the option in front of what is wrong with its file."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{label} {error}") from error


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
    if not path.is_file() or hash_file(path) != digest:
        on_event(Note(text=f"no sound: {name}, the driving video, is gone or has changed"))
        return None
    return AudioSource(path=path, start_s=start_s + settings.start)


def draw_anchors(settings: ResolvedSettings, plan: ChunkPlan) -> list[int]:
    """Frames of chunk 0 that become identity memory."""
    num_drawn = 0
    if settings.memory == "latent":
        num_drawn = count_drawn_frames(settings.identity_slots, len(settings.view))
    return draw_anchor_indices(settings.seed, plan.frames_per_chunk, num_drawn)


def encode_texts(
    settings: ResolvedSettings,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    on_event: OnEvent,
    *,
    run_folder: Path | None = None,
) -> dict[str, Tensor]:
    """What the network sees of the prompts, before it is loaded itself.

    Args:
        settings: With the model's defaults.
        source: The checkpoint.
        device: Where the text encoder runs if a prompt is in no cache.
        dtype: Of the networks.
        on_event: Told when the text encoder is loaded.
        run_folder: Keeps a copy, so that a run goes on with the same numbers whatever becomes of
            the cache.

    Returns:
        [1, 512, text_dim] by text.
    """
    texts = [settings.prompt]
    if settings.guidance_scale != 1:
        texts.append(settings.negative_prompt)
    folders = [cache_folder("prompts")]
    if run_folder is not None:
        folders.insert(0, run_folder)
    return encode_prompts(
        source, texts, device=device, dtype=dtype, folders=folders, on_event=on_event
    )


def build_rollout(
    settings: ResolvedSettings,
    pipeline: AnimatePipeline,
    inputs: Inputs,
    plan: ChunkPlan,
    anchors: Sequence[int],
    prompts: Mapping[str, Tensor],
) -> Rollout:
    """The chunk loop of a video.

    Args:
        settings: With the model's defaults.
        pipeline: The networks; no text encoder is needed.
        inputs: Opened for these settings.
        plan: The chunks.
        anchors: Frames of chunk 0 that become identity memory.
        prompts: From `encode_texts`.
    """

    def read_driving(chunk_index: int) -> tuple[Frames, Frames]:
        indices = driving_indices(plan, chunk_index, len(inputs.pose), settings.extend)
        return inputs.pose.read(indices), inputs.face.read(indices)

    negative_prompt_embeds = None
    if settings.guidance_scale != 1:
        negative_prompt_embeds = pipeline.take_prompt(prompts[settings.negative_prompt])
    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=inputs.reference_u8,
        picture_u8=inputs.picture_u8,
        views_u8=inputs.views_u8,
        read_driving=read_driving,
        noise=lambda chunk_index: chunk_noise(settings.seed, chunk_index, rollout.noise_shape),
        anchor_frame_indices=anchors,
        prompt_embeds=pipeline.take_prompt(prompts[settings.prompt]),
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
        step_cache_threshold=settings.cache_threshold,
    )
    return rollout
