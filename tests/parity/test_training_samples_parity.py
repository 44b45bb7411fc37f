"""`conditioning.safetensors`, `train.*`, through the code that encodes and assembles examples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_fakes import FakeClip
from torch import Tensor

from everanimate_cli.degradation import Degradation
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.train_settings import ResolvedTrainSettings
from everanimate_cli.training_draws import Affine, SampleDraw, StepDraw, Windows
from everanimate_cli.training_samples import assemble, encode_sample, used_components

Golden = Callable[[str], dict[str, Tensor]]

TOLERANCE = 1e-5
WRONG = 0.05
REFERENCE_INDEX = 2


@pytest.fixture
def tensors(golden: Golden) -> dict[str, Tensor]:
    return golden("conditioning")


def build_clip(tensors: dict[str, Tensor]) -> FakeClip:
    """The reference among three others, the previous chunk, then what its end begins."""
    reference = tensors["ref_image_u8"].numpy()
    previous = tensors["train.aux_video_u8"].numpy()
    num_frames = 4 + 2 * len(previous) - 8  # 2F + 4
    frames = np.zeros((num_frames, *reference.shape), np.uint8)
    frames[REFERENCE_INDEX] = reference
    frames[4 : 4 + len(previous)] = previous
    return FakeClip(rgb_u8=frames, pose_u8=frames, face_u8=frames[:, :16, :16])


def build_settings(tensors: dict[str, Tensor], case: str) -> ResolvedTrainSettings:
    height, width = tensors["ref_image_u8"].shape[:2]
    return ResolvedTrainSettings(
        dataset=Path("dances"),
        output=Path("lora"),
        steps=1,
        lora_alpha=1.0,
        carry_frames=0,
        degradation_probability=0.0,
        memory_augmentation=0.0,
        size=f"{width}x{height}",
        fps=25.0,
        frames_per_chunk=len(tensors["train.aux_video_u8"]) - 4,
        identity_slots=tensors[f"{case}.anchor_latents"].shape[1],
        shift=5.0,
        prompt="",
        pose_folder=Path("poses"),
        pose_model="toy",
    )


def build_example(
    codec: AnimatePipeline, tensors: dict[str, Tensor], case: str, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """(condition, clean latents); `shift` moves the sample's start, which is wrong."""
    settings = build_settings(tensors, case)
    # A case that draws no anchors has no indices: the first will do.
    drawn = tensors.get(f"{case}.anchor_frame_indices", torch.arange(settings.identity_slots))
    sample = SampleDraw(
        clip_index=0,
        start=0,
        reference_index=REFERENCE_INDEX,
        anchor_indices=tuple(drawn.tolist()),
        affine=Affine(scale=1.0, x=0.0, y=0.0),
        degradation=Degradation(),
        recycling=Degradation(),
    )
    step = StepDraw(
        is_first=case.endswith(".first"),
        repeats_reference=f"{case}.anchor_frame_indices" not in tensors,
        augments=False,
        degrades=False,
        recycles=False,
        drops_pose=False,
        step_index=0,
    )
    clip = build_clip(tensors)
    if shift:
        clip.rgb_u8 = np.roll(clip.rgb_u8, shift, axis=0)
    windows = Windows(settings.frames_per_chunk)
    names = [
        name
        for name in used_components(settings)
        if name not in ("pose", "face_tokens", "clip_target")
    ]
    frames = clip.read(0, windows.num_frames)
    parts = encode_sample(codec, frames, sample, windows, names)
    latents = assemble(settings, step, parts, torch.ones(1))
    return latents.condition, latents.clean


def test_training_condition(
    codec: AnimatePipeline, tensors: dict[str, Tensor], training_condition_case: str
) -> None:
    condition, clean = build_example(codec, tensors, training_condition_case)
    expected = tensors[f"{training_condition_case}.y"]
    torch.testing.assert_close(condition, expected, rtol=0, atol=TOLERANCE)
    anchors = tensors[f"{training_condition_case}.anchor_latents"][None]
    torch.testing.assert_close(clean[:, :, : anchors.shape[2]], anchors, rtol=0, atol=TOLERANCE)
    assert clean.shape[2] == expected.shape[2]


def test_another_window_misses(
    codec: AnimatePipeline, tensors: dict[str, Tensor], training_condition_case: str
) -> None:
    """One frame off is seen in whatever the case takes from the clip."""
    condition, _ = build_example(codec, tensors, training_condition_case, shift=1)
    expected = tensors[f"{training_condition_case}.y"]
    assert (condition - expected).abs().max() > WRONG
