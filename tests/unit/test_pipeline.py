"""What the networks of a checkpoint compute, on a tiny random checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanAnimatePipeline
from tiny import (
    LATENT_CHANNELS,
    TINY_DEFAULTS,
    build_stock_pipeline,
    build_tiny_pipeline,
    write_tiny_checkpoint,
)

from everanimate_cli.memory import from_uint8
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.settings import read_model_defaults

HEIGHT, WIDTH = TINY_DEFAULTS.height, TINY_DEFAULTS.width


@pytest.fixture(scope="module")
def pipeline() -> AnimatePipeline:
    return build_tiny_pipeline()


@pytest.fixture(scope="module")
def frames_u8() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_sizes(pipeline: AnimatePipeline) -> None:
    assert pipeline.latent_channels == LATENT_CHANNELS
    assert pipeline.spatial_stride == 8
    assert pipeline.size_multiple == 16
    assert pipeline.face_size == TINY_DEFAULTS.face_size


def test_prompts_are_encoded_as_stock_does(pipeline: AnimatePipeline) -> None:
    prompts = ["", "a  fox &amp; a\nhare ", "视频中的人在做动作", "long " * 200]
    with torch.no_grad():
        expected, _ = build_stock_pipeline().encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
    embeds = torch.cat([pipeline.encode_prompt(prompt) for prompt in prompts])
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-4)


def test_prompt_is_zero_after_the_last_token(pipeline: AnimatePipeline) -> None:
    embeds = pipeline.encode_prompt("fox")  # three bytes and the end token
    assert embeds.shape == (1, 512, 20)
    assert (embeds[:, :4].abs().amax(-1) > 0).all()
    assert (embeds[:, 4:] == 0).all()


def test_text_encoder_can_be_released() -> None:
    pipeline = build_tiny_pipeline()
    pipeline.release_text_encoder()
    assert pipeline.text_encoder is None
    with pytest.raises(AssertionError, match="released"):
        pipeline.encode_prompt("fox")


def test_latents_are_normalised_float32(pipeline: AnimatePipeline, frames_u8: np.ndarray) -> None:
    pixels = from_uint8(frames_u8)
    latents = pipeline.encode_video(pixels)
    assert latents.shape == (1, LATENT_CHANNELS, 3, HEIGHT // 8, WIDTH // 8)
    config = pipeline.vae.config
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mean
    for channel in range(LATENT_CHANNELS):
        scaled = latents[:, channel] * config.latents_std[channel] + config.latents_mean[channel]
        torch.testing.assert_close(scaled, raw[:, channel], rtol=1e-5, atol=1e-5)

    # Decoding takes the same normalised latents.
    with torch.no_grad():
        expected = pipeline.vae.decode(raw).sample[0]
    decoded = pipeline.decode(latents)
    assert decoded.shape == (3, 9, HEIGHT, WIDTH)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


def test_pictures_are_encoded_each_alone(pipeline: AnimatePipeline, frames_u8: np.ndarray) -> None:
    codes = pipeline.encode_pictures(frames_u8[:3])
    for index in range(3):
        alone = pipeline.encode_video(from_uint8(frames_u8[index : index + 1]))
        assert torch.equal(codes[:, :, index : index + 1], alone)


def test_a_vae_in_bfloat16_still_gives_float32(frames_u8: np.ndarray) -> None:
    pipeline = build_tiny_pipeline()
    expected = pipeline.encode_pictures(frames_u8[:1])
    pipeline.vae.to(torch.bfloat16)
    latents = pipeline.encode_pictures(frames_u8[:1])
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().max() < 0.05 * expected.abs().max()
    assert pipeline.decode(latents).dtype == torch.float32


def test_the_written_checkpoint_is_complete(tmp_path: Path, pipeline: AnimatePipeline) -> None:
    """diffusers loads it, and finds the weights of `build_tiny_pipeline`."""
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    loaded = WanAnimatePipeline.from_pretrained(folder)
    assert read_model_defaults(folder) == TINY_DEFAULTS
    for name in ("transformer", "vae", "text_encoder", "image_encoder"):
        expected = getattr(pipeline, name).state_dict()
        weights = getattr(loaded, name).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert loaded.tokenizer("fox").input_ids == pipeline.tokenizer("fox").input_ids
