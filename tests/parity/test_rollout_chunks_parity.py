"""`rollout.safetensors` chunk by chunk: each chunk from its stored noise, condition and inputs."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.memory import (
    assemble_identity,
    build_condition,
    chunk_noise,
    from_uint8,
    to_uint8,
)
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.schedule import euler_step, model_timestep, shifted_sigmas
from everanimate_cli.settings import TEMPORAL_STRIDE
from everanimate_cli.transformer import EverAnimateTransformer3DModel

Golden = Callable[[str], dict[str, Tensor]]
Config = Callable[[str], dict[str, object]]

CODEC_TOLERANCE = 1e-5
VELOCITY_TOLERANCE = 1e-4
LATENT_TOLERANCE = 2e-4
# Of 8-bit values: a difference of 1e-6 before the cut can move one by 1.
MAX_SHARE_OFF_BY_ONE = 0.005


class Rollout:
    """The golden file with its settings."""

    def __init__(self, tensors: dict[str, Tensor], settings: dict[str, int]) -> None:
        self.tensors = tensors
        self.num_chunks = settings["num_clips"]
        self.num_steps = settings["num_inference_steps"]
        self.shift = settings["sigma_shift"]
        self.num_motion_slots = settings["num_motion_latents"]
        self.num_identity_slots = settings["num_video_anchor_latents"]
        self.anchor_seed = settings["numpy_seed_before_rollout"]
        assert settings["pingpong"]
        self.plan = ChunkPlan(
            num_frames=int(tensors["num_output_frames"]),
            frames_per_chunk=settings["frames_per_clip"],
            overlap=settings["num_overlap_frame"],
        )

    def chunk(self, chunk_index: int) -> dict[str, Tensor]:
        prefix = f"clip{chunk_index}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def video(self, name: str, indices: list[int]) -> Tensor:
        """Pixels [1, 3, S, H, W] of some frames of a stored video."""
        return from_uint8(self.tensors[name][indices])

    def driving(self, chunk_index: int) -> list[int]:
        num_driving_frames = len(self.tensors["pose_video_u8"])
        return driving_indices(self.plan, chunk_index, num_driving_frames)


@pytest.fixture
def rollout(golden: Golden, config: Config) -> Rollout:
    settings: dict[str, int] = config("rollout_settings")  # type: ignore[assignment]
    return Rollout(golden("rollout"), settings)


@pytest.fixture
def chunk(rollout: Rollout, chunk_index: int) -> dict[str, Tensor]:
    return rollout.chunk(chunk_index)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_same_picture(actual_u8: Tensor, expected_u8: Tensor) -> None:
    difference = (actual_u8.int() - expected_u8.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < MAX_SHARE_OFF_BY_ONE


def sample(
    rollout: Rollout,
    chunk_index: int,
    transformer: EverAnimateTransformer3DModel,
    network_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Tensor]]:
    """Final latents and the velocity of every step, from the stored inputs of a chunk."""
    chunk = rollout.chunk(chunk_index)
    pose_embeds = transformer.embed_pose(chunk["pose_latents"])
    face_pixels = rollout.video("face_video_u8", rollout.driving(chunk_index))
    face_tokens = transformer.embed_face(face_pixels)
    sigmas = shifted_sigmas(rollout.num_steps, rollout.shift)
    latents = chunk["noise"]
    velocities = []
    for sigma, next_sigma in pairwise(sigmas):
        velocity = transformer(
            torch.cat([latents, chunk["y"]], dim=1),
            model_timestep(sigma.view(1), network_dtype),
            rollout.tensors["text_embeds"],
            chunk["clip_feature"],
            pose_embeds,
            face_tokens,
        )
        velocities.append(velocity)
        latents = euler_step(latents, velocity, sigma, next_sigma)
    return latents, velocities


def test_plan_and_schedule(rollout: Rollout) -> None:
    assert rollout.plan.num_chunks == rollout.num_chunks
    assert rollout.plan.overlap == TEMPORAL_STRIDE * rollout.num_motion_slots
    kept = sum(len(rollout.plan.kept_frames(index)) for index in range(rollout.num_chunks))
    assert kept == len(rollout.tensors["output_frames_u8"]) == rollout.plan.num_frames
    sigmas = shifted_sigmas(rollout.num_steps, rollout.shift)[:-1]
    assert_near(sigmas, rollout.tensors["sigmas"], 1e-6)
    timesteps = model_timestep(sigmas, torch.float32).float()
    assert_near(timesteps, rollout.tensors["timesteps"], 1e-3)


def test_driving_frames(rollout: Rollout, chunk: dict[str, Tensor], chunk_index: int) -> None:
    assert rollout.driving(chunk_index) == chunk["driving_indices"].tolist()


def test_noise(chunk: dict[str, Tensor], chunk_index: int) -> None:
    noise = chunk_noise(0, chunk_index, tuple(chunk["noise"].shape))
    assert_near(noise, chunk["noise"], 0)


def test_pose_latents(
    codec: AnimatePipeline, rollout: Rollout, chunk: dict[str, Tensor], chunk_index: int
) -> None:
    pose_latents = codec.encode_video(rollout.video("pose_video_u8", rollout.driving(chunk_index)))
    assert_near(pose_latents, chunk["pose_latents"], CODEC_TOLERANCE)


def test_anchors(codec: AnimatePipeline, rollout: Rollout) -> None:
    tensors = rollout.tensors
    indices = tensors["anchor_frame_indices"].tolist()
    frames_per_chunk = rollout.plan.frames_per_chunk
    num_drawn = rollout.num_identity_slots - 1
    legacy = np.random.RandomState(rollout.anchor_seed)
    drawn = legacy.choice(np.arange(1, frames_per_chunk), num_drawn, replace=False)
    assert indices == sorted(drawn.tolist())

    reference = codec.encode_pictures(tensors["ref_image_u8"][None].numpy())
    assert_near(reference, tensors["user_anchor_latent"][None], CODEC_TOLERANCE)
    identity = assemble_identity(
        reference,
        rollout.num_identity_slots,
        drawn=codec.encode_pictures(tensors["output_frames_u8"][indices].numpy()),
    )
    assert_near(identity, tensors["anchors_after_clip0"][None], CODEC_TOLERANCE)


def test_condition(rollout: Rollout, chunk: dict[str, Tensor], chunk_index: int) -> None:
    motion = None
    if chunk_index == 0:
        reference = rollout.tensors["user_anchor_latent"][None]
        identity = assemble_identity(reference, rollout.num_identity_slots)
    else:
        identity = rollout.tensors["anchors_after_clip0"][None]
        motion = rollout.chunk(chunk_index - 1)["motion_latent_out"][None]
    condition = build_condition(identity, motion, chunk["pose_latents"].shape[2])
    assert_near(condition, chunk["y"], 0)


def test_clip_image_and_feature(
    rollout: Rollout, chunk: dict[str, Tensor], chunk_index: int
) -> None:
    picture = rollout.tensors["ref_image_u8"]
    if chunk_index:
        picture = to_uint8(rollout.chunk(chunk_index - 1)["last_frame_float"])[0]
    assert_near(picture, chunk["clip_image_u8"], 0)

    # The toy CLIP of the file: average-pool, scale by U, project by V.
    scales, projection = rollout.tensors["toy_clip.U"], rollout.tensors["toy_clip.V"]
    side = round((scales.shape[1] / 3) ** 0.5)
    pixels = from_uint8(picture[None])[:, :, 0]
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, side).flatten()
    assert_near((scales * pooled @ projection)[None], chunk["clip_feature"], CODEC_TOLERANCE)


def test_sampled_latents(
    transformer: EverAnimateTransformer3DModel,
    rollout: Rollout,
    chunk: dict[str, Tensor],
    chunk_index: int,
) -> None:
    latents, velocities = sample(rollout, chunk_index, transformer)
    assert_near(velocities[0], chunk["velocity_step0"], VELOCITY_TOLERANCE)
    assert_near(velocities[-1], chunk["velocity_last"], LATENT_TOLERANCE)
    assert_near(latents, chunk["final_latents_all"], LATENT_TOLERANCE)
    target = latents[:, :, rollout.num_identity_slots :]
    assert_near(target, chunk["decoded_latents"], LATENT_TOLERANCE)
    motion = target[0, :, -rollout.num_motion_slots :]
    assert_near(motion, chunk["motion_latent_out"], LATENT_TOLERANCE)


def test_sampled_latents_with_bfloat16_timesteps(
    transformer: EverAnimateTransformer3DModel,
    rollout: Rollout,
    chunk: dict[str, Tensor],
    chunk_index: int,
) -> None:
    expected = chunk["final_latents_all_bf16_timesteps"]
    latents, _ = sample(rollout, chunk_index, transformer, network_dtype=torch.bfloat16)
    assert_near(latents, expected, LATENT_TOLERANCE)
    # Unrounded timesteps are another result, so the test above can fail.
    assert (chunk["final_latents_all"] - expected).abs().max() > 2 * LATENT_TOLERANCE


def test_decoded_frames(
    codec: AnimatePipeline, rollout: Rollout, chunk: dict[str, Tensor], chunk_index: int
) -> None:
    pixels = codec.decode(chunk["decoded_latents"])
    assert_near(pixels[:, -1:], chunk["last_frame_float"], CODEC_TOLERANCE)
    if "decoded_pixels" in chunk:
        assert_near(pixels[None], chunk["decoded_pixels"], CODEC_TOLERANCE)
    frames_u8 = to_uint8(pixels)
    kept = rollout.plan.kept_frames(chunk_index)
    start = rollout.plan.first_frame(chunk_index)
    output = rollout.tensors["output_frames_u8"][start + kept.start : start + kept.stop]
    assert_same_picture(frames_u8[kept.start : kept.stop], output)
    if chunk_index:
        assert_same_picture(frames_u8[: kept.start], chunk["overlap_frames_u8"])


def test_frames_are_truncated_not_rounded(rollout: Rollout) -> None:
    pixels = rollout.chunk(0)["decoded_pixels"][0]
    expected = rollout.tensors["output_frames_u8"][: pixels.shape[1]]
    assert_near(to_uint8(pixels), expected, 0)
    rounded = ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert (rounded != expected).float().mean() > 0.3
