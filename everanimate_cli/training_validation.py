"""A look at a LoRA in training: a few chunks of a clip made and compared with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from everanimate_cli import metrics
from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.encode import VideoWriter
from everanimate_cli.memory import chunk_noise, count_drawn_frames, draw_anchor_indices
from everanimate_cli.rollout import Chunk, Rollout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from everanimate_cli.pipeline import AnimatePipeline
    from everanimate_cli.train_settings import ResolvedTrainSettings
    from everanimate_cli.training_clips import TrainingClip

    Frames = NDArray[np.uint8]

_CRF = 12


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is fixed for all looks: the clip, the noise, the first frame as the reference.

    Attributes:
        pipeline: The networks; the transformer is the one in training.
        clip: Its first frames are made again from its pose and face.
        settings: Of the training; chunks are sampled as it trains them.
        prompt_embeds: [1, 512, text_dim].
        overlap: Frames that two chunks share.
        num_inference_steps: Euler steps.
    """

    pipeline: AnimatePipeline
    clip: TrainingClip
    settings: ResolvedTrainSettings
    prompt_embeds: Tensor
    overlap: int
    num_inference_steps: int

    @property
    def plan(self) -> ChunkPlan:
        """The chunks, as many as asked for and the clip has frames."""
        length = self.settings.frames_per_chunk
        stride = length - self.overlap
        fitting = 1 + max(0, self.clip.num_frames - length) // stride
        num_chunks = min(self.settings.validation_chunks, fitting)
        return ChunkPlan(
            num_frames=length + (num_chunks - 1) * stride,
            frames_per_chunk=length,
            overlap=self.overlap,
        )

    def run(self, path: Path | None) -> dict[str, float]:
        """Make the chunks.

        Args:
            path: Video to write, truth and result side by side; None for the figures alone.

        Returns:
            "psnr" [dB] and "ssim" against the clip, of the first and of the last chunk, and
            "seam", the jump between chunks over the ordinary change of frames (not for one chunk).
        """
        plan = self.plan
        truth = self.clip.read(0, plan.num_frames).rgb_u8
        made = np.concatenate(list(self._frames(plan)))
        if path is not None:
            height, width = made.shape[1:3]
            with VideoWriter(
                path, height=height, width=2 * width, rate=self.settings.fps, crf=_CRF
            ) as writer:
                writer.write(np.concatenate([truth, made], axis=2))
        length = plan.frames_per_chunk
        figures = {}
        for name, part in (("first", slice(0, length)), ("last", slice(-length, None))):
            pairs = list(zip(made[part], truth[part], strict=True))
            figures[f"psnr_{name}"] = float(np.mean([metrics.psnr(*pair) for pair in pairs]))
            figures[f"ssim_{name}"] = float(np.mean([metrics.ssim(*pair) for pair in pairs]))
        if plan.num_chunks > 1:
            seams = [plan.first_frame(k) + plan.overlap for k in range(1, plan.num_chunks)]
            figures["seam"] = metrics.seam_jump(made, seams)
        return figures

    def _frames(self, plan: ChunkPlan) -> Iterator[Frames]:
        """The kept frames of each chunk."""
        settings = self.settings
        num_drawn = (
            count_drawn_frames(settings.identity_slots) if settings.memory == "latent" else 0
        )
        rollout = Rollout(
            pipeline=self.pipeline,
            reference_u8=self.clip.read(0, 1).rgb_u8[0],
            picture_u8=self.clip.read(0, 1).rgb_u8[0],
            views_u8=[],
            read_driving=self._read_driving,
            noise=lambda chunk_index: chunk_noise(settings.seed, chunk_index, rollout.noise_shape),
            anchor_frame_indices=draw_anchor_indices(
                settings.seed, plan.frames_per_chunk, num_drawn
            ),
            prompt_embeds=self.prompt_embeds,
            num_chunks=plan.num_chunks,
            frames_per_chunk=plan.frames_per_chunk,
            overlap=plan.overlap,
            num_identity_slots=settings.identity_slots,
            num_inference_steps=self.num_inference_steps,
            shift=settings.shift,
            memory=settings.memory,
        )
        for made in rollout.run():
            if isinstance(made, Chunk):
                kept = plan.kept_frames(made.chunk_index)
                yield made.frames_u8[kept.start : kept.stop]

    def _read_driving(self, chunk_index: int) -> tuple[Frames, Frames]:
        frames = self.clip.read(self.plan.first_frame(chunk_index), self.settings.frames_per_chunk)
        return frames.pose_u8, frames.face_u8
