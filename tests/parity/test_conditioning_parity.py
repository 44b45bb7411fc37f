"""`conditioning.safetensors`: the condition `y` of inference and training."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from everanimate_cli.clip_image import stretch_frame
from everanimate_cli.memory import (
    NUM_MASK_CHANNELS,
    assemble_identity,
    build_condition,
    build_pixel_condition,
    from_uint8,
    pixel_condition_video,
)
from everanimate_cli.pipeline import AnimatePipeline

Golden = Callable[[str], dict[str, Tensor]]

TOLERANCE = 1e-5
# The random VAE codes a grey video to values of about 1.
WRONG = 0.05


@pytest.fixture
def tensors(golden: Golden) -> dict[str, Tensor]:
    return golden("conditioning")


@pytest.fixture
def reference(codec: AnimatePipeline, tensors: dict[str, Tensor]) -> Tensor:
    return codec.encode_pictures(tensors["ref_image_u8"][None].numpy())


def count_motion_slots(variant: str) -> int:
    match = re.fullmatch(r"motion(\d+)", variant)
    return int(match[1]) if match else 1


def previous_latents(tensors: dict[str, Tensor], variant: str) -> Tensor:
    name = "prev_latents_short" if variant.startswith("short") else "prev_latents"
    return tensors[name][None]


def test_condition(
    codec: AnimatePipeline, tensors: dict[str, Tensor], reference: Tensor, condition_case: str
) -> None:
    variant, part = condition_case.split(".")
    expected = tensors[f"{condition_case}.y"]
    previous = previous_latents(tensors, variant)
    num_target_slots = previous.shape[2]
    num_identity_slots = expected.shape[2] - num_target_slots
    if variant == "resized":
        height, width = tensors["ref_image_u8"].shape[:2]
        stretched = stretch_frame(tensors["odd_size_image_u8"], height, width)
        torch.testing.assert_close(stretched, tensors["resized_image_u8"], rtol=0, atol=0)
        reference = codec.encode_pictures(stretched[None].numpy())
    if part == "first":
        identity = assemble_identity(reference, num_identity_slots)
        # An option of the released code that is off by default: the reference as motion.
        motion = reference if variant == "padfirst" else None
        tolerance = TOLERANCE
    else:
        assert part == "continuation"
        identity = tensors["video_anchor_latents"][None, :, :num_identity_slots]
        motion = previous[:, :, -count_motion_slots(variant) :]
        tolerance = 0.0
    condition = build_condition(identity, motion, num_target_slots)
    torch.testing.assert_close(condition, expected, rtol=0, atol=tolerance)


def test_training_condition(
    codec: AnimatePipeline,
    tensors: dict[str, Tensor],
    reference: Tensor,
    training_condition_case: str,
) -> None:
    expected = tensors[f"{training_condition_case}.y"]
    expected_identity = tensors[f"{training_condition_case}.anchor_latents"][None]
    num_identity_slots = expected_identity.shape[2]
    video_u8 = tensors["train.aux_video_u8"]
    anchor_indices = tensors.get(f"{training_condition_case}.anchor_frame_indices")
    if anchor_indices is None:
        identity = assemble_identity(reference, num_identity_slots)
    else:
        assert anchor_indices.tolist() == sorted(set(anchor_indices.tolist()))
        identity = codec.encode_pictures(video_u8[anchor_indices].numpy())
    torch.testing.assert_close(identity, expected_identity, rtol=0, atol=TOLERANCE)

    motion = None
    if not training_condition_case.endswith(".first"):
        motion = codec.encode_video(from_uint8(video_u8))[:, :, -1:]
        last_latent = tensors["train.aux_last_latent"][None]
        torch.testing.assert_close(motion, last_latent, rtol=0, atol=TOLERANCE)
    condition = build_condition(identity, motion, expected.shape[2] - num_identity_slots)
    torch.testing.assert_close(condition, expected, rtol=0, atol=TOLERANCE)


def test_what_diffusers_puts_in_the_motion_slot_misses(
    codec: AnimatePipeline, tensors: dict[str, Tensor], condition_case: str
) -> None:
    """A mask of 1 on carried frames, and the code of a grey video instead of zero latents."""
    expected = tensors[f"{condition_case}.y"]
    variant, _ = condition_case.split(".")
    num_target_slots = previous_latents(tensors, variant).shape[2]
    num_identity_slots = expected.shape[2] - num_target_slots
    first_target = expected[:, :, num_identity_slots:]
    assert first_target[:, :NUM_MASK_CHANNELS].abs().max() == 0

    height, width = tensors["ref_image_u8"].shape[:2]
    grey_video = pixel_condition_video(None, 4 * num_target_slots - 3, height, width)
    grey = codec.encode_video(grey_video)
    identity = expected[:, NUM_MASK_CHANNELS:, :1]
    masked = build_pixel_condition(identity, grey, num_carried_frames=1)
    wrong_mask = masked[:, :NUM_MASK_CHANNELS, 1:]
    assert (wrong_mask - first_target[:, :NUM_MASK_CHANNELS]).abs().max() == 1
    wrong_rest = masked[:, NUM_MASK_CHANNELS:, -1]
    assert (wrong_rest - first_target[:, NUM_MASK_CHANNELS:, -1]).abs().max() > WRONG


def test_images_are_encoded_untiled(codec: AnimatePipeline, tensors: dict[str, Tensor]) -> None:
    latents = codec.encode_pictures(tensors["tiled.image_u8"][None].numpy())[0]
    torch.testing.assert_close(latents, tensors["tiled.latent_untiled"], rtol=0, atol=TOLERANCE)

    tiled = tensors["tiled.latent_tiled"]
    assert (latents - tiled).abs().max() > WRONG
    codec.vae.enable_tiling()
    try:
        tiled_by_diffusers = codec.encode_pictures(tensors["tiled.image_u8"][None].numpy())[0]
    finally:
        codec.vae.disable_tiling()
    assert (tiled_by_diffusers - tiled).abs().max() > WRONG
    assert (tiled_by_diffusers - latents).abs().max() > WRONG
