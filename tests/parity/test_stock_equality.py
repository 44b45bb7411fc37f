"""`--memory pixel` is Wan-Animate as diffusers' `WanAnimatePipeline` runs it, in float32.

Both sides get the same random weights, noise levels and noise; everything else is their own code.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import TINY_DEFAULTS, build_stock_pipeline, build_tiny_pipeline
from torch import Tensor

from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.memory import from_uint8, to_uint8
from everanimate_cli.rollout import Chunk, Rollout
from everanimate_cli.schedule import shifted_sigmas
from everanimate_cli.settings import TEMPORAL_STRIDE

# Of pixels in [-1, 1].
TOLERANCE = 1e-4
SHIFT = 5.0
NUM_STEPS = 3
NOISE_SEED = 7
PROMPT, NEGATIVE_PROMPT = "a dancing <b>fox</b>", "blurred"


class OurNoiseLevels(FlowMatchEulerDiscreteScheduler):
    """Plain Euler whose `set_timesteps(n)` yields the noise levels of `shifted_sigmas`."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        sigmas = shifted_sigmas(num_inference_steps, SHIFT)[:-1].tolist()
        super().set_timesteps(sigmas=sigmas, device=device)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A video to be made by both sides; the driving video is as long as the output."""

    frames_per_chunk: int
    overlap: int
    num_frames: int
    guidance_scale: float

    @property
    def plan(self) -> ChunkPlan:
        return ChunkPlan(
            num_frames=self.num_frames,
            frames_per_chunk=self.frames_per_chunk,
            overlap=self.overlap,
        )

    def pictures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reference [H, W, 3], poses [S, H, W, 3] and faces [S, Hf, Wf, 3]."""
        generator = np.random.default_rng(0)
        height, width, side = TINY_DEFAULTS.height, TINY_DEFAULTS.width, TINY_DEFAULTS.face_size
        reference_u8, *poses_u8 = generator.integers(
            0, 256, (1 + self.num_frames, height, width, 3), dtype=np.uint8
        )
        faces_u8 = generator.integers(0, 256, (self.num_frames, side, side, 3), dtype=np.uint8)
        return reference_u8, np.stack(poses_u8), faces_u8


def run_stock(case: Case) -> Tensor:
    """[S, 3, H, W] in [-1, 1]."""
    pipeline = build_stock_pipeline()
    pipeline.scheduler = OurNoiseLevels(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    reference_u8, poses_u8, faces_u8 = case.pictures()
    frames = pipeline(
        image=Image.fromarray(reference_u8),
        pose_video=[Image.fromarray(pose_u8) for pose_u8 in poses_u8],
        face_video=[Image.fromarray(face_u8) for face_u8 in faces_u8],
        prompt=PROMPT,
        negative_prompt=NEGATIVE_PROMPT,
        height=reference_u8.shape[0],
        width=reference_u8.shape[1],
        segment_frame_length=case.frames_per_chunk,
        prev_segment_conditioning_frames=case.overlap,
        num_inference_steps=NUM_STEPS,
        guidance_scale=case.guidance_scale,
        generator=torch.Generator().manual_seed(NOISE_SEED),
        output_type="pt",
    ).frames[0]
    return frames * 2 - 1


def build_rollout(case: Case) -> Rollout:
    pipeline = build_tiny_pipeline()
    plan = case.plan
    reference_u8, poses_u8, faces_u8 = case.pictures()

    def read_driving(chunk_index: int) -> tuple[np.ndarray, np.ndarray]:
        indices = driving_indices(plan, chunk_index, case.num_frames, "error")
        return poses_u8[indices], faces_u8[indices]

    # One generator, chunk after chunk, as stock draws its noise.
    generator = torch.Generator().manual_seed(NOISE_SEED)
    num_slots = 1 + (plan.frames_per_chunk - 1) // TEMPORAL_STRIDE + 1
    height, width = (side // pipeline.spatial_stride for side in reference_u8.shape[:2])
    shape = (1, pipeline.latent_channels, num_slots, height, width)
    noises = [torch.randn(shape, generator=generator) for _ in range(plan.num_chunks)]
    return Rollout(
        pipeline=pipeline,
        reference_u8=reference_u8,
        picture_u8=reference_u8,
        views_u8=[],
        read_driving=read_driving,
        noise=noises.__getitem__,
        anchor_frame_indices=[],
        prompt_embeds=pipeline.encode_prompt(PROMPT),
        negative_prompt_embeds=pipeline.encode_prompt(NEGATIVE_PROMPT),
        num_chunks=plan.num_chunks,
        frames_per_chunk=plan.frames_per_chunk,
        overlap=plan.overlap,
        num_identity_slots=1,
        num_inference_steps=NUM_STEPS,
        shift=SHIFT,
        guidance_scale=case.guidance_scale,
        memory="pixel",
    )


def kept_pixels(rollout: Rollout, plan: ChunkPlan, chunk: Chunk) -> Tensor:
    """[S, 3, H, W] in [-1, 1], before the cut to 8 bits."""
    kept = plan.kept_frames(chunk.chunk_index)
    return rollout.pipeline.decode(chunk.latents)[:, kept.start : kept.stop].transpose(0, 1)


# The last chunk of the guided cases goes past the end of the driving video.
CASES = {
    "carry-1": Case(frames_per_chunk=9, overlap=1, num_frames=9 + 2 * 8, guidance_scale=1),
    "carry-5": Case(frames_per_chunk=13, overlap=5, num_frames=13 + 2 * 8, guidance_scale=1),
    "carry-1-guided": Case(frames_per_chunk=9, overlap=1, num_frames=22, guidance_scale=3),
    "carry-5-guided": Case(frames_per_chunk=13, overlap=5, num_frames=27, guidance_scale=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_pixel_memory_is_stock(case: Case) -> None:
    rollout, plan = build_rollout(case), case.plan
    assert plan.num_chunks >= 3
    chunks = [made for made in rollout.run() if isinstance(made, Chunk)]
    pixels = torch.cat([kept_pixels(rollout, plan, chunk) for chunk in chunks])
    expected = run_stock(case)
    assert expected.std() > 0.1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["carry-1", "carry-5"])
def test_carrying_frames_cut_to_8_bits_misses(name: str) -> None:
    """What stock carries are the floats, not the frames of the file."""
    case = replace(CASES[name], num_frames=CASES[name].plan.first_frame(2))
    rollout, plan = build_rollout(case), case.plan
    first, second = (made for made in rollout.run() if isinstance(made, Chunk))
    carried = first.state.carried_pixels
    assert carried is not None
    cut = replace(first.state, carried_pixels=from_uint8(to_uint8(carried[0])))
    *_, from_cut = rollout.run(cut)
    assert isinstance(from_cut, Chunk)
    pixels = kept_pixels(rollout, plan, second)
    assert (kept_pixels(rollout, plan, from_cut) - pixels).abs().max() > 10 * TOLERANCE
