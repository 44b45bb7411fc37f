"""The chunk loop: persistent latent propagation from the first chunk to the last.

A `Rollout` holds what is fixed for a video; the small `RolloutState` is all that crosses from
chunk to chunk, so that a run can stop after any chunk and go on from the state alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
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

    Source: method page section 2, "State after chunk k".
    """

    next_chunk: int = 0
    drawn_latents: Tensor | None = None
    motion_latents: Tensor | None = None
    last_frame_u8: Frames | None = None
    carried_pixels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One Euler step of a chunk is done.

    Attributes:
        step_index: From 0 in every chunk.
    """

    step_index: int


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

    def run(self, state: RolloutState | None = None) -> Iterator[Step | Chunk]:
        """Generate the chunks from `state` on.

        Args:
            state: Of an earlier run after any chunk; None starts at the beginning.

        Yields:
            A `Step` after each Euler step, then the `Chunk`.

        Source: method page section 2.
        """
        state = state or RolloutState()
        sigmas = shifted_sigmas(self.num_inference_steps, self.shift)
        for chunk_index in range(state.next_chunk, self.num_chunks):
            latents = self.noise(chunk_index)
            steps = self.pipeline.denoise(
                latents,
                sigmas,
                self._conditioning(state),
                guidance_scale=self.guidance_scale,
                as_stock=self.memory == "pixel",
            )
            for step_index, latents in enumerate(steps):  # noqa: B007  # the last ones stay
                yield Step(step_index=step_index)
            chunk = self._finish(state, latents)
            state = chunk.state
            yield chunk

    def decode_frames(self, latents: Tensor) -> Frames:
        """Frames [F, H, W, 3] of a chunk from its `Chunk.latents`, the same as when it was made."""
        return to_uint8(self.pipeline.decode(latents)).cpu().numpy()

    def _conditioning(self, state: RolloutState) -> Conditioning:
        """All that the network sees beside the noise in the chunk that follows `state`."""
        pose_u8, face_u8 = self.read_driving(state.next_chunk)
        return Conditioning(
            condition=self._condition(state),
            pose_embeds=self.pipeline.embed_pose(pose_u8),
            face_tokens=self.pipeline.embed_face(face_u8),
            prompt_embeds=self.prompt_embeds,
            clip_embeds=self._clip_embeds(state),
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

    def _finish(self, state: RolloutState, latents: Tensor) -> Chunk:
        """The chunk that follows `state` from its clean latents [1, C, L, h, w] of all slots."""
        # The network restores the identity slots too, but they are no part of the video.
        latents = latents[:, :, self.num_identity_slots :]
        pixels = self.pipeline.decode(latents)
        frames_u8 = to_uint8(pixels).cpu().numpy()
        return Chunk(
            chunk_index=state.next_chunk,
            latents=latents.cpu().contiguous(),
            frames_u8=frames_u8,
            state=self._next_state(state, latents, pixels, frames_u8),
        )

    def _next_state(
        self, state: RolloutState, latents: Tensor, pixels: Tensor, frames_u8: Frames
    ) -> RolloutState:
        """State after the chunk that follows `state`; copies, so that the chunk can be freed."""
        following = replace(
            state, next_chunk=state.next_chunk + 1, last_frame_u8=frames_u8[-1].copy()
        )
        if self.memory == "pixel":
            carried = pixels[None, :, -self.overlap :]
            return replace(following, carried_pixels=carried.cpu().contiguous())
        if self.memory == "sink":
            return following
        drawn = state.drawn_latents
        if state.next_chunk == 0 and self.anchor_frame_indices:
            chosen_u8 = frames_u8[list(self.anchor_frame_indices)]
            drawn = self.pipeline.encode_pictures(chosen_u8).cpu()
        num_motion_slots = self.overlap // TEMPORAL_STRIDE
        return replace(
            following,
            drawn_latents=drawn,
            motion_latents=latents[:, :, -num_motion_slots:].cpu().contiguous(),
        )

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
    def _blank_face_tokens(self) -> Tensor:
        return self.pipeline.embed_blank_face(self.frames_per_chunk)


def _move(latents: Tensor | None, device: torch.device) -> Tensor | None:
    return None if latents is None else latents.to(device)
