"""The chunk loop: persistent latent propagation from the first chunk to the last.

A `Rollout` holds what is fixed for a video; the small `RolloutState` is all that crosses from
chunk to chunk, so that a run can stop after any chunk and go on from the state alone.
"""

from __future__ import annotations

from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from everanimate_cli.background import Background
from everanimate_cli.memory import (
    assemble_identity,
    build_condition,
    build_pixel_condition,
    count_drawn_frames,
    pixel_condition_video,
    to_uint8,
)
from everanimate_cli.pipeline import AnimatePipeline, Conditioning
from everanimate_cli.schedule import shifted_sigmas
from everanimate_cli.settings import TEMPORAL_STRIDE, ClipImage, Memory
from everanimate_cli.step_cache import StepCache, plan_skips

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """What chunk `next_chunk` needs of the chunks before it; tensors are float32 on the CPU.

    Attributes:
        next_chunk: Index of the chunk to generate next.
        drawn_latents: [1, C, n, h, w] frames of chunk 0 that became identity memory, each encoded
            alone; None before chunk 0, with sink and pixel memory, and where views leave no slot.
        motion_latents: [1, C, K_mo, h, w] last latents sampled; None before chunk 0 and with sink
            and pixel memory.
        last_frame_u8: [H, W, 3] last decoded frame of the previous chunk; None before chunk 0.
        carried_pixels: [1, 3, o, H, W] in [-1, 1], last decoded frames of the previous chunk;
            pixel memory only.
        step_ratios: [branches of guidance, steps] float32, what the step cache measured in the
            first chunk; None before it and without the cache.

    Source: method page section 2, "State after chunk k".
    """

    next_chunk: int = 0
    drawn_latents: Tensor | None = None
    motion_latents: Tensor | None = None
    last_frame_u8: Frames | None = None
    carried_pixels: Tensor | None = None
    step_ratios: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One Euler step of a chunk is done.

    Attributes:
        step_index: From 0 in every chunk.
    """

    step_index: int


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A chunk whose frames the next one does not need: `Rollout.finish` decodes them at any time.

    Attributes:
        chunk_index: From 0.
        latents: [1, C, T, h, w] sampled target latents, float32 on the device.
        before: The state that the chunk followed.
        step_ratios: Of the state after it.
        is_ready: When the latents are there, on a CUDA card.
    """

    chunk_index: int
    latents: Tensor
    before: RolloutState
    step_ratios: Tensor | None
    is_ready: torch.cuda.Event | None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A generated chunk.

    Attributes:
        chunk_index: From 0.
        latents: [1, C, T, h, w] sampled target latents without the identity slots, float32 on the
            CPU.
        frames_u8: [F, H, W, 3] all decoded frames, also those that repeat the previous chunk.
        state: What the next chunk needs.
    """

    chunk_index: int
    latents: Tensor
    frames_u8: Frames
    state: RolloutState


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Everything that is fixed for one video.

    Attributes:
        pipeline: The networks.
        reference_u8: [H, W, 3] reference at the size of the video.
        picture_u8: [*, *, 3] reference before it was resized; only pixel memory shows it to CLIP.
        views_u8: [H, W, 3] each, further pictures of the character at the size of the video.
        read_driving: Gives (pose [F, H, W, 3], face [F, Hf, Wf, 3]) of a chunk, uint8.
        noise: Gives the noise of a chunk, of `noise_shape`, float32.
        anchor_frame_indices: Frames of chunk 0 that become identity memory, rising; with latent
            memory one per slot that neither a view nor the reference takes, else none.
        prompt_embeds: [1, 512, text_dim].
        negative_prompt_embeds: [1, 512, text_dim], needed with guidance.
        num_chunks: How many chunks the video has.
        frames_per_chunk: F.
        overlap: Frames shared by neighbours; with latent memory a multiple of 4.
        num_identity_slots: K_id, 1 with pixel memory.
        num_inference_steps: Euler steps.
        shift: Warp of the noise levels.
        guidance_scale: 1 runs the network once a step, any other value twice.
        memory: What one chunk hands to the next.
        clip_image: What CLIP sees from the second chunk on; with pixel memory always the reference.
        step_cache_threshold: Error below which steps are skipped, see `plan_skips`; None computes
            all steps. The first chunk is computed whole and tells which steps the others skip.

    Raises:
        ValueError: If parts do not fit, which the chunks after the first would stumble on.
    """

    pipeline: AnimatePipeline
    reference_u8: Frames
    picture_u8: Frames
    views_u8: Sequence[Frames]
    read_driving: Callable[[int], tuple[Frames, Frames]]
    noise: Callable[[int], Tensor]
    anchor_frame_indices: Sequence[int]
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    num_chunks: int
    frames_per_chunk: int
    overlap: int
    num_identity_slots: int
    num_inference_steps: int
    shift: float
    guidance_scale: float = 1.0
    memory: Memory = "latent"
    clip_image: ClipImage = "previous"
    step_cache_threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        num_drawn = len(self.anchor_frame_indices)
        num_wanted = (
            count_drawn_frames(self.num_identity_slots, len(self.views_u8))
            if self.memory == "latent"
            else 0
        )
        if num_drawn != num_wanted:
            raise ValueError(f"{num_drawn} anchor frames for {num_wanted} slots")
        if self.memory == "pixel" and (self.num_identity_slots != 1 or len(self.views_u8)):
            raise ValueError("pixel memory has one identity slot, which holds the reference")
        if self.memory == "latent" and self.overlap % TEMPORAL_STRIDE:
            raise ValueError(f"latent memory cannot carry {self.overlap} frames")
        if self.guidance_scale != 1 and self.negative_prompt_embeds is None:
            raise ValueError("guidance needs a negative prompt")

    @property
    def num_target_slots(self) -> int:
        """T."""
        return (self.frames_per_chunk - 1) // TEMPORAL_STRIDE + 1

    @property
    def noise_shape(self) -> tuple[int, int, int, int, int]:
        """(1, C, K_id + T, h, w)."""
        height, width = self.reference_u8.shape[:2]
        stride = self.pipeline.spatial_stride
        num_slots = self.num_identity_slots + self.num_target_slots
        return (1, self.pipeline.latent_channels, num_slots, height // stride, width // stride)

    def run(self, state: RolloutState | None = None) -> Generator[Step | Chunk]:
        """Generate the chunks from `state` on.

        Args:
            state: Of an earlier run after any chunk; None starts at the beginning.

        Yields:
            A `Step` after each Euler step, then the `Chunk`.

        Source: method page section 2.
        """
        for made in self._run(state or RolloutState(), reads_ahead=False, can_defer=_never):
            assert not isinstance(made, Sampled)
            yield made

    def run_ahead(
        self,
        state: RolloutState | None = None,
        *,
        can_defer: Callable[[], bool] = lambda: True,
    ) -> Generator[Step | Sampled | Chunk]:
        """Generate the chunks of `run`, the same bit for bit, with work for more than one thread.

        What drives the next chunk is read while one is sampled, and the decoding of a chunk is left
        to the caller wherever the next one does not need its frames: with `clip_image` "reference",
        except for the first chunk if its frames become identity memory.

        Args:
            state: As in `run`.
            can_defer: Asked before a decoding is left to the caller: whether there is room for it
                beside the sampling.

        Yields:
            A `Step` after each Euler step, then the `Chunk`, or `Sampled`, of which `finish` makes
            it.
        """
        return self._run(state or RolloutState(), reads_ahead=True, can_defer=can_defer)

    def _run(
        self, state: RolloutState, *, reads_ahead: bool, can_defer: Callable[[], bool]
    ) -> Generator[Step | Sampled | Chunk]:
        sigmas = shifted_sigmas(self.num_inference_steps, self.shift)
        with closing(self._read_all(state.next_chunk, ahead=reads_ahead)) as all_driving:
            for driving in all_driving:
                caches = self._step_caches(state)
                latents = self.noise(state.next_chunk)
                conditioning = self._conditioning(state, *driving)
                del driving  # pictures need not lie about while the network works
                steps = self.pipeline.denoise(
                    latents,
                    sigmas,
                    conditioning,
                    guidance_scale=self.guidance_scale,
                    as_stock=self.memory == "pixel",
                    step_caches=caches,
                )
                del conditioning  # `steps` keeps it as long as they last, and decoding needs room
                for step_index, latents in enumerate(steps):  # noqa: B007  # the last ones stay
                    yield Step(step_index=step_index)
                sampled = self._sampled(state, latents, caches)
                if not self._needs_frames(state) and can_defer():
                    state = self._state_without_frames(sampled)
                    yield sampled
                else:
                    chunk = self.finish(sampled)
                    state = chunk.state
                    yield chunk

    def _read_all(self, first_chunk: int, *, ahead: bool) -> Generator[tuple[Frames, Frames]]:
        """What drives each chunk; with `ahead` the next one is read while the caller works."""
        chunk_indices = range(first_chunk, self.num_chunks)
        if not ahead:
            yield from map(self.read_driving, chunk_indices)
            return
        with Background[tuple["Frames", "Frames"]]() as reader:
            for chunk_index in chunk_indices:
                if not reader.is_busy:
                    reader.start(partial(self.read_driving, chunk_index))
                read = [reader.take()]
                if chunk_index + 1 < self.num_chunks:
                    reader.start(partial(self.read_driving, chunk_index + 1))
                yield read.pop()  # not kept here until the caller comes back

    def finish(self, sampled: Sampled, *, beside: bool = False) -> Chunk:
        """Decode a chunk.

        Args:
            sampled: From `run_ahead`.
            beside: Work in a CUDA stream of its own, which waits for the latents and for nothing
                else; for another thread than that of `run_ahead`, and one chunk at a time.
        """
        with self._stream_beside(sampled) if beside else nullcontext():
            pixels = self.pipeline.decode(sampled.latents)
            frames_u8 = to_uint8(pixels).cpu().numpy()
            return Chunk(
                chunk_index=sampled.chunk_index,
                latents=sampled.latents.cpu().contiguous(),
                frames_u8=frames_u8,
                state=self._next_state(sampled, pixels, frames_u8),
            )

    def decode_frames(self, latents: Tensor) -> Frames:
        """Frames [F, H, W, 3] of a chunk from its `Chunk.latents`, the same as when it was made."""
        return to_uint8(self.pipeline.decode(latents)).cpu().numpy()

    def _needs_frames(self, state: RolloutState) -> bool:
        """Whether the chunk after the one that follows `state` needs decoded frames of it.

        CLIP's picture is the last frame, which the causal VAE makes of all latents of a chunk: its
        decoder looks back further than a chunk is long.
        """
        if state.next_chunk + 1 == self.num_chunks:
            return False
        becomes_memory = state.next_chunk == 0 and len(self.anchor_frame_indices) > 0
        return self.memory == "pixel" or self.clip_image == "previous" or becomes_memory

    def _step_caches(self, state: RolloutState) -> list[StepCache]:
        """A new cache for each run of the network in a step; empty without the step cache."""
        threshold = self.step_cache_threshold
        if threshold is None:
            return []
        if state.step_ratios is None:
            return [StepCache() for _ in range(1 if self.guidance_scale == 1 else 2)]
        return [StepCache(plan_skips(ratios, threshold)) for ratios in state.step_ratios.tolist()]

    def _sampled(
        self, state: RolloutState, latents: Tensor, caches: Sequence[StepCache]
    ) -> Sampled:
        """The chunk that follows `state` from its clean latents [1, C, L, h, w] of all slots."""
        step_ratios = state.step_ratios
        if caches and step_ratios is None:
            step_ratios = torch.stack([cache.ratios for cache in caches])
        is_ready = None
        if latents.device.type == "cuda":
            is_ready = torch.cuda.Event()
            is_ready.record(torch.cuda.current_stream(latents.device))
        return Sampled(
            chunk_index=state.next_chunk,
            # The network restores the identity slots too, but they are no part of the video.
            latents=latents[:, :, self.num_identity_slots :],
            before=state,
            step_ratios=step_ratios,
            is_ready=is_ready,
        )

    @contextmanager
    def _stream_beside(self, sampled: Sampled) -> Iterator[None]:
        if sampled.is_ready is None:  # no CUDA card
            yield
            return
        stream = self._decoding_stream
        with torch.cuda.stream(stream):
            stream.wait_event(sampled.is_ready)
            # The next chunk must not get the memory of these latents before they are read.
            sampled.latents.record_stream(stream)
            yield
            stream.synchronize()

    def _conditioning(self, state: RolloutState, pose_u8: Frames, face_u8: Frames) -> Conditioning:
        """All that the network sees beside the noise in the chunk that follows `state`."""
        # The networks in the order in which each has to come to the card only once per chunk: the
        # VAE, which the chunk before used last, CLIP, and the transformer, which then samples.
        condition, pose_latents = self._condition(state), self.pipeline.encode_pose(pose_u8)
        clip_embeds = self._clip_embeds(state)
        return Conditioning(
            condition=condition,
            pose_embeds=self.pipeline.embed_pose(pose_latents),
            face_tokens=self.pipeline.embed_face(face_u8),
            prompt_embeds=self.prompt_embeds,
            clip_embeds=clip_embeds,
            negative_prompt_embeds=self.negative_prompt_embeds,
            blank_face_tokens=None if self.guidance_scale == 1 else self._blank_face_tokens,
        )

    def _condition(self, state: RolloutState) -> Tensor:
        """Memory and mask [1, 4+C, L, h, w], on the device."""
        reference = self._reference_latents
        if self.memory == "pixel":
            height, width = self.reference_u8.shape[:2]
            carried = state.carried_pixels
            video = pixel_condition_video(carried, self.frames_per_chunk, height, width)
            num_carried = 0 if carried is None else self.overlap
            return build_pixel_condition(reference, self.pipeline.encode_video(video), num_carried)
        identity = assemble_identity(
            reference,
            self.num_identity_slots,
            views=self._views_latents,
            drawn=_move(state.drawn_latents, reference.device),
        )
        motion = _move(state.motion_latents, reference.device)
        return build_condition(identity, motion, self.num_target_slots)

    def _clip_embeds(self, state: RolloutState) -> Tensor:
        if self.memory == "pixel" or self.clip_image == "reference" or state.last_frame_u8 is None:
            return self._reference_clip_embeds
        return self.pipeline.encode_clip(state.last_frame_u8)

    def _next_state(self, sampled: Sampled, pixels: Tensor, frames_u8: Frames) -> RolloutState:
        """State after a chunk; copies, so that the chunk can be freed."""
        state = sampled.before
        following = replace(self._state_without_frames(sampled), last_frame_u8=frames_u8[-1].copy())
        if self.memory == "pixel":
            carried = pixels[None, :, -self.overlap :]
            return replace(following, carried_pixels=carried.cpu().contiguous())
        if self.memory == "latent" and state.next_chunk == 0 and self.anchor_frame_indices:
            chosen_u8 = frames_u8[list(self.anchor_frame_indices)]
            drawn = self.pipeline.encode_pictures(chosen_u8).cpu()
            return replace(following, drawn_latents=drawn)
        return following

    def _state_without_frames(self, sampled: Sampled) -> RolloutState:
        """As much of the state after a chunk as its latents tell."""
        following = replace(
            sampled.before,
            next_chunk=sampled.before.next_chunk + 1,
            step_ratios=sampled.step_ratios,
        )
        if self.memory != "latent":
            return following
        num_motion_slots = self.overlap // TEMPORAL_STRIDE
        motion = sampled.latents[:, :, -num_motion_slots:].cpu().contiguous()
        return replace(following, motion_latents=motion)

    # What the chunks share is computed when the first of them asks for it.

    @cached_property
    def _reference_latents(self) -> Tensor:
        return self.pipeline.encode_pictures(self.reference_u8[None])

    @cached_property
    def _views_latents(self) -> Tensor | None:
        return self.pipeline.encode_pictures(np.stack(self.views_u8)) if self.views_u8 else None

    @cached_property
    def _reference_clip_embeds(self) -> Tensor:
        if self.memory == "pixel":
            return self.pipeline.encode_clip_as_stock(self.picture_u8)
        return self.pipeline.encode_clip(self.reference_u8)

    @cached_property
    def _decoding_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.pipeline.device)

    @cached_property
    def _blank_face_tokens(self) -> Tensor:
        return self.pipeline.embed_blank_face(self.frames_per_chunk)


def _never() -> bool:
    return False


def _move(latents: Tensor | None, device: torch.device) -> Tensor | None:
    return None if latents is None else latents.to(device)
