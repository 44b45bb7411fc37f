"""From the frames of a clip to what the network is trained on.

A *sample* is a pair of neighbouring chunks of one clip and all that can be encoded of it; an
*example* is one use of a sample: what the draws of a step take from it. Samples are encoded when
they are needed, or come from a `LatentCache`; both give the same numbers.

Source: method page section 3.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from everanimate_cli.latent_cache import LatentCache
from everanimate_cli.memory import (
    build_condition,
    build_pixel_condition,
    from_uint8,
    pixel_condition_video,
)
from everanimate_cli.objective import gate_degradation
from everanimate_cli.schedule import training_schedule
from everanimate_cli.settings import CARRY_FRAMES
from everanimate_cli.training_draws import (
    Affine,
    Purpose,
    SampleDraw,
    StepDraw,
    Windows,
    draw_key,
    draw_sample,
    draw_step,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from everanimate_cli.pipeline import AnimatePipeline
    from everanimate_cli.train_settings import ResolvedTrainSettings

    Frames = NDArray[np.uint8]

# What can be encoded of a sample, beside `anchors_name` and `carry_name`.
TARGET: Final = "target"  # [1, C, T, h, w]
TARGET_DEGRADED: Final = "target_degraded"  # [1, C, T, h, w]
POSE: Final = "pose"  # [1, C, T, h, w]
FACE_TOKENS: Final = "face_tokens"  # [1, T, N, inner]
REFERENCE: Final = "reference"  # [1, C, 1, h, w]
MOTION: Final = "motion"  # [1, C, 1, h, w]
MOTION_RECYCLED: Final = "motion_recycled"  # [1, C, 1, h, w]
CLIP_TARGET: Final = "clip_target"  # [1, tokens, image_dim]
CLIP_REFERENCE: Final = "clip_reference"  # [1, tokens, image_dim], as diffusers prepares it

# What all samples share.
BLANK_VIDEO: Final = "blank_video"  # [1, C, T, h, w] code of a mid-grey video
DROPPED_POSE: Final = "dropped_pose"  # [1, C, T, h, w] code of a black video

SAMPLES_PER_CLIP: Final = 4  # in a latent cache, unless the settings say how many
# Settings that change what is encoded of a sample, beside the clips themselves.
_SHAPING: Final = ("seed", "size", "fit", "fps", "frames_per_chunk")
# Draws, windows or encoding changed: then old caches hold something else.
_CACHE_FORMAT: Final = 1
_MAX_PROMPTS: Final = 32  # kept in memory, 4 MiB each with the 14B model


class ClipFrames(Protocol):
    """Frames of one clip at the same times, uint8 RGB."""

    @property
    def rgb_u8(self) -> Frames:
        """[S, H, W, 3] the person."""

    @property
    def pose_u8(self) -> Frames:
        """[S, H, W, 3] the drawn pose."""

    @property
    def face_u8(self) -> Frames:
        """[S, Hf, Wf, 3] the face crop."""


class Clip(Protocol):
    """A video with its pose and face, at the size and rate of the training."""

    @property
    def prompt(self) -> str | None:
        """Its own text; None for the text of the settings."""

    @property
    def num_frames(self) -> int:
        """How many frames there are."""

    @property
    def fingerprint(self) -> str:
        """Another one for other frames."""

    def read(self, start: int, count: int) -> ClipFrames:
        """Frames `start` to `start + count`."""


@dataclass(frozen=True, kw_only=True)
class TrainingExample:
    """What one example of a batch consists of, on the device where it was encoded or on the CPU.

    Attributes:
        clean_latents: [1, C, L, h, w] identity memory, then the target; float32.
        endpoint_latents: [1, C, L, h, w] the same with the degraded target where degradation was
            drawn and the noise is high enough.
        condition: [1, 4+C, L, h, w] mask and memory.
        pose_latents: [1, C, T, h, w].
        face_tokens: [1, T, N, inner] in the network's dtype, like the next two.
        prompt_embeds: [1, 512, text_dim].
        clip_embeds: [1, tokens, image_dim].
        noise: [1, C, L, h, w] float32 on the CPU.
        step_index: Point of the training schedule.
    """

    clean_latents: Tensor
    endpoint_latents: Tensor
    condition: Tensor
    pose_latents: Tensor
    face_tokens: Tensor
    prompt_embeds: Tensor
    clip_embeds: Tensor
    noise: Tensor
    step_index: int


# --- which tensors an example is made of ----------------------------------------------------------


def anchors_name(num_identity_slots: int, *, augmented: bool) -> str:
    """Name of the drawn frames of identity memory [1, C, K_id, h, w], as they are or moved."""
    return f"anchors{num_identity_slots}{'_augmented' if augmented else ''}"


def carry_name(num_frames: int) -> str:
    """Name of the code [1, C, T, h, w] of carried frames and zeros after them (pixel memory)."""
    return f"carry{num_frames}"


def used_components(settings: ResolvedTrainSettings) -> list[str]:
    """All tensors of a sample that any draw can ask for, sorted; no others are encoded."""
    first, reference = settings.first_chunk_probability, settings.reference_anchor_probability
    degradation, pose_drop = settings.degradation_probability, settings.pose_drop
    moves, recycles = settings.memory_augmentation, settings.error_recycling
    continues = settings.memory == "latent" and first < 1
    draws_anchors = continues and reference < 1
    is_used = {
        TARGET: True,
        TARGET_DEGRADED: degradation > 0,
        POSE: pose_drop < 1,
        FACE_TOKENS: True,
        REFERENCE: settings.memory != "latent" or first > 0 or reference > 0,
        anchors_name(settings.identity_slots, augmented=False): draws_anchors and moves < 1,
        anchors_name(settings.identity_slots, augmented=True): draws_anchors and moves > 0,
        MOTION: continues and recycles < 1,
        MOTION_RECYCLED: continues and recycles > 0,
        CLIP_TARGET: settings.memory != "pixel",
        CLIP_REFERENCE: settings.memory == "pixel",
    }
    if settings.memory == "pixel":
        is_used[carry_name(settings.carry_frames)] = first < 1
    return sorted(name for name, used in is_used.items() if used)


def used_constants(settings: ResolvedTrainSettings) -> list[str]:
    """All tensors shared by samples that any draw can ask for, sorted."""
    is_used = {
        BLANK_VIDEO: settings.memory == "pixel" and settings.first_chunk_probability > 0,
        DROPPED_POSE: settings.pose_drop > 0,
    }
    return sorted(name for name, used in is_used.items() if used)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Which tensors make an example; names, or None where true zeros or nothing stand.

    Attributes:
        identity: Fills the identity slots; a single frame is repeated.
        motion: Fills the first target slot of the condition.
        carried: Code of carried frames, which fills all target slots of the condition (pixel
            memory); `BLANK_VIDEO` in the first chunk.
        degraded: Endpoint in place of the target, at high noise.
        pose: Of the target.
        clip: What CLIP sees.
    """

    identity: str
    motion: str | None
    carried: str | None
    degraded: str | None
    pose: str
    clip: str

    @property
    def names(self) -> list[str]:
        """All tensors of the sample and constants, each once."""
        wanted = [TARGET, FACE_TOKENS, self.identity, self.pose, self.clip]
        wanted += [name for name in (self.motion, self.carried, self.degraded) if name is not None]
        return sorted(set(wanted))


def _recipe(settings: ResolvedTrainSettings, draw: StepDraw) -> _Recipe:
    """What the draws of a step take from a sample.

    Source: method page section 3, "Memory construction in training" and "Comparison modes".
    """
    memory = settings.memory
    continues = memory == "latent" and not draw.is_first
    identity, motion, carried = REFERENCE, None, None
    if continues:
        motion = MOTION_RECYCLED if draw.recycles else MOTION
        if not draw.repeats_reference:
            identity = anchors_name(settings.identity_slots, augmented=draw.augments)
    if memory == "pixel":
        carried = BLANK_VIDEO if draw.is_first else carry_name(settings.carry_frames)
    return _Recipe(
        identity=identity,
        motion=motion,
        carried=carried,
        degraded=TARGET_DEGRADED if draw.degrades else None,
        pose=DROPPED_POSE if draw.drops_pose else POSE,
        clip=CLIP_REFERENCE if memory == "pixel" else CLIP_TARGET,
    )


# --- encode -------------------------------------------------------------------------------------


def encode_sample(
    pipeline: AnimatePipeline,
    frames: ClipFrames,
    draw: SampleDraw,
    windows: Windows,
    names: Collection[str],
) -> dict[str, Tensor]:
    """Encode what is asked for of a sample.

    Args:
        pipeline: The networks.
        frames: The 2F + 4 frames from the sample's start on.
        draw: Which frames are reference and anchors, and how they are damaged.
        windows: Which frames are what.
        names: Of `used_components`.

    Returns:
        Name -> tensor on the pipeline's device: latents float32, tokens in the network's dtype.

    Source: method page section 3, "Memory construction in training".
    """
    reference_u8 = frames.rgb_u8[windows.reference][draw.reference_index]  # [H, W, 3]
    previous_u8 = frames.rgb_u8[windows.previous]  # [F+4, H, W, 3]
    target_u8 = frames.rgb_u8[windows.target]  # [F, H, W, 3]

    anchors_u8 = previous_u8[list(draw.anchor_indices)]  # [K_id, H, W, 3]
    num_slots = len(anchors_u8)

    def encode_video(frames_u8: Frames) -> Tensor:
        return pipeline.encode_video(from_uint8(frames_u8))  # [1, C, (S-1)/4 + 1, h, w]

    def encode_motion(frames_u8: Frames) -> Tensor:
        # Of the chunk as a whole, for the VAE is causal; a copy, so that the rest can be freed.
        return encode_video(frames_u8)[:, :, -1:].clone()  # [1, C, 1, h, w]

    encoders: dict[str, Callable[[], Tensor]] = {
        TARGET: lambda: encode_video(target_u8),
        TARGET_DEGRADED: lambda: encode_video(draw.degradation.apply(target_u8)),
        POSE: lambda: encode_video(frames.pose_u8[windows.target]),
        FACE_TOKENS: lambda: pipeline.embed_face(frames.face_u8[windows.target]),
        REFERENCE: lambda: pipeline.encode_pictures(reference_u8[None]),
        MOTION: lambda: encode_motion(previous_u8),
        MOTION_RECYCLED: lambda: encode_motion(draw.recycling.apply(previous_u8)),
        CLIP_TARGET: lambda: pipeline.encode_clip(target_u8[0]),
        CLIP_REFERENCE: lambda: pipeline.encode_clip_as_stock(reference_u8),
        anchors_name(num_slots, augmented=False): lambda: pipeline.encode_pictures(anchors_u8),
        anchors_name(num_slots, augmented=True): lambda: _encode_moved(
            pipeline, anchors_u8, draw.affine
        ),
    }
    for num_frames in CARRY_FRAMES:
        encoders[carry_name(num_frames)] = partial(_encode_carried, pipeline, target_u8, num_frames)
    return {name: encoders[name]() for name in names}


def encode_constant(
    pipeline: AnimatePipeline, name: str, frames_per_chunk: int, height: int, width: int
) -> Tensor:
    """Encode a video that no clip has any part in.

    Args:
        pipeline: The networks.
        name: Of `used_constants`.
        frames_per_chunk: F.
        height: Pixels H.
        width: Pixels W.

    Returns:
        [1, C, T, h, w] float32.
    """
    grey = pixel_condition_video(None, frames_per_chunk, height, width)  # [1, 3, F, H, W]
    return pipeline.encode_video({BLANK_VIDEO: grey, DROPPED_POSE: grey - 1}[name])


def move_pixels(pixels: Tensor, affine: Affine) -> Tensor:
    """Scale and shift pictures, all alike.

    Args:
        pixels: [1, 3, S, H, W] in [-1, 1].
        affine: How.

    Returns:
        [1, 3, S, H, W]; what comes from outside is 0, mid-grey.

    Source: method page section 3, "memory augmentation".
    """
    pictures = pixels[0].transpose(0, 1)  # [S, 3, H, W]
    theta = torch.tensor([[affine.scale, 0, affine.x], [0, affine.scale, affine.y]])
    grid = affine_grid(
        theta.expand(len(pictures), -1, -1), list(pictures.shape), align_corners=False
    )
    moved = grid_sample(
        pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )  # [S, 3, H, W]
    return moved.transpose(0, 1)[None]


def _encode_moved(pipeline: AnimatePipeline, frames_u8: Frames, affine: Affine) -> Tensor:
    """Latents [1, C, K_id, h, w] of pictures moved by one draw, each encoded alone."""
    moved = move_pixels(from_uint8(frames_u8), affine)  # [1, 3, K_id, H, W]
    codes = [pipeline.encode_video(picture) for picture in torch.split(moved, 1, dim=2)]
    return torch.cat(codes, dim=2)


def _encode_carried(pipeline: AnimatePipeline, target_u8: Frames, num_frames: int) -> Tensor:
    """Code [1, C, T, h, w] of the target's first frames and zeros after them (pixel memory)."""
    frames_per_chunk, height, width, _ = target_u8.shape
    carried = from_uint8(target_u8[:num_frames])  # [1, 3, o, H, W]
    return pipeline.encode_video(pixel_condition_video(carried, frames_per_chunk, height, width))


# --- assemble -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents of an example.

    Attributes:
        clean: [1, C, L, h, w].
        endpoint: [1, C, L, h, w].
        condition: [1, 4+C, L, h, w].
    """

    clean: Tensor
    endpoint: Tensor
    condition: Tensor


def assemble(
    settings: ResolvedTrainSettings, draw: StepDraw, parts: Mapping[str, Tensor], sigma: Tensor
) -> Latents:
    """Lay out memory and target as the draws of a step say.

    Identity memory is the same in condition and clean latents, moved or not, and never degraded.

    Args:
        settings: Memory mode, identity slots and the lowest noise for degradation.
        draw: Of the step.
        parts: Tensors of the sample and constants.
        sigma: [1] noise level of the step.

    Returns:
        The latents.

    Source: method page section 3; parity file `conditioning.safetensors`, `train.*`.
    """
    recipe = _recipe(settings, draw)
    target = parts[TARGET]  # [1, C, T, h, w]
    identity = parts[recipe.identity]  # [1, C, 1 or K_id, h, w]
    if recipe.identity == REFERENCE:
        identity = identity.expand(-1, -1, settings.identity_slots, -1, -1)  # [1, C, K_id, h, w]
    if recipe.carried is not None:
        num_carried = 0 if recipe.carried == BLANK_VIDEO else settings.carry_frames
        condition = build_pixel_condition(identity, parts[recipe.carried], num_carried)
    else:
        motion = None if recipe.motion is None else parts[recipe.motion]
        condition = build_condition(identity, motion, target.shape[2])
    clean = torch.cat([identity, target], dim=2)  # [1, C, L, h, w]
    endpoint = clean
    if recipe.degraded is not None:
        degraded = torch.cat([identity, parts[recipe.degraded]], dim=2)  # [1, C, L, h, w]
        endpoint = gate_degradation(clean, degraded, sigma, settings.degradation_min_sigma)
    return Latents(clean=clean, endpoint=endpoint, condition=condition)


def training_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Noise of one example.

    Args:
        seed: Base seed of the run.
        index: Global sample index.
        shape: (1, C, L, h, w).

    Returns:
        Standard normal noise of `shape`, float32 on the CPU.
    """
    state = draw_key(seed, index, Purpose.NOISE).generate_state(1, "uint64")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(state[0])))


class SampleSource:
    """Where training gets its examples from, by their global index and in any order."""

    def __init__(
        self,
        settings: ResolvedTrainSettings,
        clips: Sequence[Clip],
        pipeline: AnimatePipeline | None,
        cache: LatentCache | None,
    ) -> None:
        """Take samples from a cache, or encode them when they are asked for.

        Args:
            settings: Of the training.
            clips: Of the dataset; with a cache their frames are not read.
            pipeline: Needed without a cache only.
            cache: Filled with what the settings use.

        Raises:
            ValueError: If there is neither.
        """
        if pipeline is None and cache is None:
            raise ValueError("samples come from a cache or from a pipeline")
        self._settings = settings
        self._clips = clips
        self._pipeline = pipeline
        self._cache = cache
        self._constants: dict[str, Tensor] = {}
        self._prompts: dict[str, Tensor] = {}

    def example(self, index: int) -> TrainingExample:
        """The example of a global sample index.

        Args:
            index: From 0. With a cache of N samples, example i is another use of sample i mod N.

        Returns:
            The same whenever it is asked for, with a cache or without.

        Raises:
            RunError: If a file of the cache is missing or damaged.
            EverAnimateError: If a clip cannot be read.
        """
        settings = self._settings
        draw = draw_step(settings, settings.seed, index)
        recipe = _recipe(settings, draw)
        sample_index = index if self._cache is None else index % self._cache.num_samples
        sample = draw_sample(settings, settings.seed, sample_index, self._clip_lengths)
        constants = {
            name: self._constant(name)
            for name in recipe.names
            if name in (BLANK_VIDEO, DROPPED_POSE)
        }
        own_names = [name for name in recipe.names if name not in constants]
        parts = constants | self._sample(sample_index, sample, own_names)
        sigma = self._sigmas[draw.step_index][None]  # [1]
        latents = assemble(settings, draw, parts, sigma)
        return TrainingExample(
            clean_latents=latents.clean,
            endpoint_latents=latents.endpoint,
            condition=latents.condition,
            pose_latents=parts[recipe.pose],
            face_tokens=parts[FACE_TOKENS],
            prompt_embeds=self._prompt(clip_prompt(settings, self._clips[sample.clip_index])),
            clip_embeds=parts[recipe.clip],
            noise=training_noise(settings.seed, index, latents.clean.shape),
            step_index=draw.step_index,
        )

    @cached_property
    def _clip_lengths(self) -> list[int]:
        return [clip.num_frames for clip in self._clips]

    @cached_property
    def _sigmas(self) -> Tensor:
        return training_schedule(self._settings.shift).sigmas  # [1000]

    def _sample(self, index: int, draw: SampleDraw, names: Collection[str]) -> dict[str, Tensor]:
        if self._cache is not None:
            return self._cache.load_sample(index, names)
        assert self._pipeline is not None
        return _encode_drawn(self._settings, self._clips, self._pipeline, draw, names)

    def _constant(self, name: str) -> Tensor:
        if name not in self._constants:
            self._constants[name] = (
                _encode_shared(self._settings, self._networks, name)
                if self._cache is None
                else self._cache.load_constant(name)
            )
        return self._constants[name]

    def _prompt(self, prompt: str) -> Tensor:
        if prompt not in self._prompts:
            if len(self._prompts) == _MAX_PROMPTS:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[prompt] = (
                self._networks.encode_prompt(prompt)
                if self._cache is None
                else self._cache.load_prompt(prompt)
            )
        return self._prompts[prompt]

    @property
    def _networks(self) -> AnimatePipeline:
        assert self._pipeline is not None
        return self._pipeline


def clip_prompt(settings: ResolvedTrainSettings, clip: Clip) -> str:
    """Text of a clip: its own, else that of the settings."""
    return settings.prompt if clip.prompt is None else clip.prompt


# --- the latent cache -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheWork:
    """What a cache lacks, or one process's share of it.

    Attributes:
        prompts: Texts.
        constants: Names of tensors that all samples share.
        samples: Indices of samples that lack something.
    """

    prompts: Sequence[str]
    constants: Sequence[str]
    samples: Sequence[int]

    def __len__(self) -> int:
        """Files to write."""
        return len(self.prompts) + len(self.constants) + len(self.samples)


def open_cache(
    settings: ResolvedTrainSettings,
    clips: Sequence[Clip],
    *,
    model_hash: str,
    dtype: torch.dtype,
) -> LatentCache:
    """Look into the folder that `settings.latent_cache` names; nothing is written.

    Neither probabilities nor the memory mode are part of its identity: they decide which tensors
    are needed, not what is in them, so that the arms of an experiment share one cache.

    Args:
        settings: With `latent_cache`.
        clips: Of the dataset, in their order.
        model_hash: `checkpoint.checkpoint_hash`.
        dtype: Of the network, in which tokens are stored.

    Returns:
        The cache, which may be empty or lack anything.

    Raises:
        SettingsError: If it was filled for another training; the message names each difference.
        RunError: If it is damaged.
    """
    assert settings.latent_cache is not None
    frames = "\n".join(f"{clip.fingerprint} {clip.num_frames}" for clip in clips)
    identity = {
        "--model sha256": model_hash,
        "DATASET sha256": hashlib.sha256(frames.encode()).hexdigest(),
        "DATASET clips": len(clips),
        "dtype": str(dtype).removeprefix("torch."),
        "format of the cache": _CACHE_FORMAT,
        **{name: getattr(settings, name) for name in _SHAPING},
    }
    num_samples = settings.cache_samples or SAMPLES_PER_CLIP * len(clips)
    return LatentCache(folder=settings.latent_cache, identity=identity, num_samples=num_samples)


def missing_work(
    cache: LatentCache,
    settings: ResolvedTrainSettings,
    clips: Sequence[Clip],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> CacheWork:
    """What must be encoded before training can do without VAE, text encoder and CLIP.

    Args:
        cache: From `open_cache`.
        settings: Of the training.
        clips: Of the dataset.
        rank: Of this process.
        world_size: Processes that share the work; each has the same share however much is done.

    Returns:
        This process's share; its length is 0 if nothing is missing.
    """
    prompts = sorted({clip_prompt(settings, clip) for clip in clips})[rank::world_size]
    constants = used_constants(settings)[rank::world_size]
    names = used_components(settings)
    return CacheWork(
        prompts=[prompt for prompt in prompts if not cache.has_prompt(prompt)],
        constants=[name for name in constants if not cache.has_constant(name)],
        samples=[
            index
            for index in range(rank, cache.num_samples, world_size)
            if cache.missing(index, names)
        ],
    )


def fill_cache(
    cache: LatentCache,
    work: CacheWork,
    settings: ResolvedTrainSettings,
    clips: Sequence[Clip],
    pipeline: AnimatePipeline,
) -> Iterator[int]:
    """Encode what a cache lacks; a kill loses the sample at work.

    Args:
        cache: From `open_cache`.
        work: From `missing_work`.
        settings: Of the training.
        clips: Of the dataset.
        pipeline: The networks.

    Yields:
        How much of the work is done, from 1 to its length.

    Raises:
        SettingsError: If another process has just taken the folder for another training.
        EverAnimateError: If a clip cannot be read.
        OSError: If the disk is full.
    """
    if not len(work):
        return
    cache.claim()
    done = 0
    for prompt in work.prompts:
        cache.save_prompt(prompt, pipeline.encode_prompt(prompt))
        yield (done := done + 1)
    for name in work.constants:
        cache.save_constant(name, _encode_shared(settings, pipeline, name))
        yield (done := done + 1)
    lengths = [clip.num_frames for clip in clips]
    names = used_components(settings)
    for index in work.samples:
        missing = cache.missing(index, names)
        if not cache.sample_path(index, missing).exists():  # else another process was faster
            draw = draw_sample(settings, settings.seed, index, lengths)
            tensors = _encode_drawn(settings, clips, pipeline, draw, missing)
            cache.save_sample(index, tensors)
        yield (done := done + 1)


def _encode_drawn(
    settings: ResolvedTrainSettings,
    clips: Sequence[Clip],
    pipeline: AnimatePipeline,
    draw: SampleDraw,
    names: Collection[str],
) -> dict[str, Tensor]:
    """Read a sample's frames and encode what is asked for."""
    windows = Windows(settings.frames_per_chunk)
    frames = clips[draw.clip_index].read(draw.start, windows.num_frames)
    return encode_sample(pipeline, frames, draw, windows, names)


def _encode_shared(settings: ResolvedTrainSettings, pipeline: AnimatePipeline, name: str) -> Tensor:
    """A tensor that all samples share."""
    height, width = settings.height_width
    return encode_constant(pipeline, name, settings.frames_per_chunk, height, width)
