"""The chunk loop: persistent latent propagation from the first chunk to the last.

A `Rollout` holds what is fixed for a video; the small `RolloutState` is all that crosses from chunk to chunk, so that
a run can stop after any chunk and go on from the state alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """What chunk `next_chunk` needs of the chunks before it.

    Attributes:
        next_chunk: Index of the chunk to generate next.
        drawn_latents: [1, C, n, h, w] frames of chunk 0 that became anchors, each encoded alone; None before chunk 0,
            with sink and pixel memory, and where views fill all slots.
        motion_latents: [1, C, K_mo, h, w] last latents sampled; None before chunk 0 and with sink and pixel memory.
        last_frame_u8: [H, W, 3] last decoded frame of the previous chunk; None before chunk 0.
        carried_pixels: [1, 3, o, H, W] float32 last decoded frames, pixel memory only.
    """

    next_chunk: int = 0
    drawn_latents: Tensor | None = None
    motion_latents: Tensor | None = None
    last_frame_u8: Frames | None = None
    carried_pixels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One Euler step of a chunk is done; counts from 0."""

    step_index: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A generated chunk.

    Attributes:
        chunk_index: From 0.
        latents: [1, C, T, h, w] float32 sampled target latents, identity slots dropped.
        frames_u8: [F, H, W, 3] all decoded frames; the first `overlap` repeat the previous chunk.
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
        views_u8: [V, H, W, 3] further pictures of the character at the size of the video.
        read_driving: Gives (pose [F, H, W, 3], face [F, Hf, Wf, 3]) of a chunk, uint8.
        noise: Gives the noise of a chunk, [1, C, K_id+T, h, w] float32.
        anchor_frame_indices: Frames of chunk 0 that become anchors, rising; one per identity slot that neither a view
            nor the reference takes.
        prompt_embeds: [1, 512, text_dim].
        negative_prompt_embeds: The same for guidance above 1.
        num_chunks: How many chunks the video has.
        frames_per_chunk: F.
        overlap: Frames shared by neighbours; with latent memory a multiple of 4.
        num_identity_slots: K_id.
        num_inference_steps: Euler steps.
        shift: Warp of the noise levels.
        guidance_scale: 1 runs the network once a step.
        memory: What one chunk hands to the next.
        clip_image: What CLIP sees from the second chunk on.
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

    @property
    def num_target_slots(self) -> int:
        """T."""
        return (self.frames_per_chunk - 1) // TEMPORAL_STRIDE + 1

    @property
    def num_motion_slots(self) -> int:
        """K_mo."""
        return self.overlap // TEMPORAL_STRIDE

    @property
    def noise_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of a chunk's noise."""
        height, width = self.reference_u8.shape[:2]
        stride = self.pipeline.spatial_stride
        num_slots = self.num_identity_slots + self.num_target_slots
        return (1, self.pipeline.latent_channels, num_slots, height // stride, width // stride)

    def run(self, state: RolloutState | None = None) -> Iterator[Step | Chunk]:
        """Generate the chunks from `state` on.

        Args:
            state: Of an earlier run after any chunk; None starts at the beginning.

        Yields:
            A `Step` after each Euler step, then the `Chunk`.

        Source: method page section 2.
        """
        state = state or RolloutState()
        pipeline = self.pipeline
        height, width = self.reference_u8.shape[:2]
        sigmas = shifted_sigmas(self.num_inference_steps, self.shift)
        reference_latents = pipeline.encode_pictures(self.reference_u8[None])
        views_latents = (
            pipeline.encode_pictures(np.stack(self.views_u8)) if len(self.views_u8) else None
        )
        if self.memory == "pixel":
            reference_clip = pipeline.encode_clip_as_stock(self.picture_u8)
        else:
            reference_clip = pipeline.encode_clip(self.reference_u8, height, width)
        blank_face = None
        if self.guidance_scale != 1:
            blank_face = pipeline.embed_blank_face(self.frames_per_chunk)

        for chunk_index in range(state.next_chunk, self.num_chunks):
            pose_u8, face_u8 = self.read_driving(chunk_index)
            clip_embeds = reference_clip
            if self.clip_image == "previous" and state.last_frame_u8 is not None:
                clip_embeds = pipeline.encode_clip(state.last_frame_u8, height, width)
            conditioning = Conditioning(
                condition=self._condition(state, reference_latents, views_latents),
                pose_embeds=pipeline.embed_pose(pose_u8),
                face_tokens=pipeline.embed_face(face_u8),
                prompt_embeds=self.prompt_embeds,
                clip_embeds=clip_embeds,
                negative_prompt_embeds=self.negative_prompt_embeds,
                blank_face_tokens=blank_face,
            )
            steps = pipeline.denoise(
                self.noise(chunk_index),
                sigmas,
                conditioning,
                guidance_scale=self.guidance_scale,
                as_stock=self.memory == "pixel",
            )
            latents = reference_latents  # replaced by the first step
            for step_index, latents in enumerate(steps):  # noqa: B007
                yield Step(step_index=step_index)
            target_latents = latents[:, :, self.num_identity_slots :]
            pixels = pipeline.decode(target_latents)
            frames_u8 = to_uint8(pixels).cpu().numpy()
            state = self._next_state(state, target_latents, pixels, frames_u8)
            yield Chunk(
                chunk_index=chunk_index,
                latents=target_latents,
                frames_u8=frames_u8,
                state=state,
            )

    def _condition(
        self, state: RolloutState, reference_latents: Tensor, views_latents: Tensor | None
    ) -> Tensor:
        """The condition tensor of the next chunk, on the device."""
        if self.memory == "pixel":
            height, width = self.reference_u8.shape[:2]
            video = pixel_condition_video(
                state.carried_pixels, self.frames_per_chunk, height, width
            )
            num_carried = 0 if state.carried_pixels is None else self.overlap
            video_latents = self.pipeline.encode_video(video)
            return build_pixel_condition(reference_latents, video_latents, num_carried)
        identity = assemble_identity(
            reference_latents,
            self.num_identity_slots,
            views=views_latents,
            drawn=_to(state.drawn_latents, reference_latents),
        )
        motion = _to(state.motion_latents, reference_latents)
        return build_condition(identity, motion, self.num_target_slots)

    def _next_state(
        self, state: RolloutState, target_latents: Tensor, pixels: Tensor, frames_u8: Frames
    ) -> RolloutState:
        """State after the chunk that was just decoded."""
        following = replace(state, next_chunk=state.next_chunk + 1, last_frame_u8=frames_u8[-1])
        if self.memory == "pixel":
            return replace(following, carried_pixels=pixels[None, :, -self.overlap :])
        if self.memory == "sink":
            return following
        following = replace(
            following, motion_latents=target_latents[:, :, -self.num_motion_slots :]
        )
        if state.next_chunk == 0 and len(self.anchor_frame_indices):
            chosen = frames_u8[list(self.anchor_frame_indices)]
            return replace(following, drawn_latents=self.pipeline.encode_pictures(chosen))
        return following

    def count_anchors(self) -> int:
        """How many frames of chunk 0 become identity memory with these slots and views."""
        if self.memory != "latent":
            return 0
        return count_drawn_frames(self.num_identity_slots, len(self.views_u8))


def _to(latents: Tensor | None, like: Tensor) -> Tensor | None:
    return None if latents is None else latents.to(like)
