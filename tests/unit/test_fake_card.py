"""All that a chunk computes stays on the card: nothing meets a tensor of main memory there.

Three parts of the program only run with a card. What they compute is compared elsewhere; here they
run with tensors of which torch knows where they are.
"""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from fake_card import CARD, fake_card, put_on_card
from tiny import LATENT_CHANNELS, build_networks, build_tokenizer
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from everanimate_cli import piecewise
from everanimate_cli.memory import chunk_noise, draw_anchor_indices
from everanimate_cli.narrow_linear import store_blocks_as_fp8
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.rollout import Rollout, RolloutState
from everanimate_cli.schedule import shifted_sigmas
from everanimate_cli.step_cache import StepCache

HEIGHT, WIDTH, NUM_FRAMES, FACE_SIZE = 48, 64, 9, 16
PICTURE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def build_pipeline(dtype: torch.dtype, *, in_fp8: bool) -> AnimatePipeline:
    """On the card; to be called where there is one."""
    networks = build_networks()
    if in_fp8:
        store_blocks_as_fp8(networks["transformer"])
    for name, network in networks.items():
        put_on_card(network, name, dtype)
    piecewise.compute_blocks_piecewise(networks["transformer"])
    return AnimatePipeline(
        **networks, tokenizer=build_tokenizer(), image_processor=None, device=CARD
    )


def build_rollout(
    pipeline: AnimatePipeline, memory: Literal["latent", "sink", "pixel"], guidance_scale: float
) -> Rollout:
    pose_u8 = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    face_u8 = np.zeros((NUM_FRAMES, FACE_SIZE, FACE_SIZE, 3), np.uint8)
    num_identity_slots = 1 if memory == "pixel" else 4
    # As from the cache of prompts.
    prompt_embeds = pipeline.take_prompt(torch.zeros(1, 512, pipeline.transformer.config.text_dim))
    return Rollout(
        pipeline=pipeline,
        reference_u8=PICTURE,
        picture_u8=PICTURE,
        views_u8=[PICTURE] if memory == "latent" else [],
        read_driving=lambda _: (pose_u8, face_u8),
        noise=lambda k: chunk_noise(
            0, k, (1, LATENT_CHANNELS, num_identity_slots + 3, HEIGHT // 8, WIDTH // 8)
        ),
        anchor_frame_indices=draw_anchor_indices(0, NUM_FRAMES, 2) if memory == "latent" else [],
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=prompt_embeds,
        num_chunks=2,
        frames_per_chunk=NUM_FRAMES,
        overlap=1 if memory == "pixel" else 4,
        num_identity_slots=num_identity_slots,
        num_inference_steps=3,
        shift=5.0,
        guidance_scale=guidance_scale,
        memory=memory,
    )


def states(memory: str) -> list[RolloutState]:
    """Before the first chunk and after it, as a run folder gives it back."""
    cells = (HEIGHT // 8, WIDTH // 8)
    is_latent = memory == "latent"
    after = RolloutState(
        next_chunk=1,
        drawn_latents=torch.zeros(1, LATENT_CHANNELS, 2, *cells) if is_latent else None,
        motion_latents=torch.zeros(1, LATENT_CHANNELS, 1, *cells) if is_latent else None,
        last_frame_u8=PICTURE,
        carried_pixels=torch.zeros(1, 3, 1, HEIGHT, WIDTH) if memory == "pixel" else None,
    )
    return [RolloutState(), after]


@pytest.mark.parametrize(
    ("dtype", "memory", "given"),
    [
        (torch.bfloat16, "latent", {}),
        (torch.bfloat16, "latent", {"in_pieces": True, "in_fp8": True}),
        (torch.float16, "sink", {"in_pieces": True}),
        (torch.float32, "latent", {"guidance_scale": 3.0}),
        (torch.bfloat16, "pixel", {}),
    ],
)
def test_a_chunk_stays_on_the_card(
    dtype: torch.dtype,
    memory: Literal["latent", "sink", "pixel"],
    given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if given.get("in_pieces"):
        for name, value in (("PIECE_TOKENS", 40), ("_TOKEN_WIDTH", 48), ("BAND_BYTES", 2**15)):
            monkeypatch.setattr(piecewise, name, value)
    # The package's own preprocessing looks at pixels.
    monkeypatch.setattr(AnimatePipeline, "encode_clip_as_stock", AnimatePipeline.encode_clip)
    guidance_scale = given.get("guidance_scale", 1.0)
    with fake_card():
        pipeline = build_pipeline(dtype, in_fp8=given.get("in_fp8", False))
        rollout = build_rollout(pipeline, memory, guidance_scale)
        for state in states(memory):
            conditioning = rollout._conditioning(state, *rollout.read_driving(0))
            num_branches = 1 if guidance_scale == 1 else 2
            caches = [StepCache([False, True, False]) for _ in range(num_branches)]
            *_, latents = pipeline.denoise(
                rollout.noise(0),
                shifted_sigmas(3, 5.0),
                conditioning,
                guidance_scale=guidance_scale,
                as_stock=memory == "pixel",
                step_caches=caches,
            )
            assert (latents.device, latents.dtype) == (CARD, torch.float32)
            latents = latents[:, :, rollout.num_identity_slots :]
            pixels = pipeline.decode(latents)
            assert (pixels.device, pixels.dtype) == (CARD, torch.float32)
            assert pixels.shape == (3, NUM_FRAMES, HEIGHT, WIDTH)


def test_what_is_left_in_main_memory_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everanimate_cli.rollout._move", lambda latents, _device: latents)
    with fake_card():
        rollout = build_rollout(build_pipeline(torch.bfloat16, in_fp8=False), "latent", 1.0)
        first, second = states("latent")
        rollout._conditioning(first, *rollout.read_driving(0))
        with pytest.raises(FakeTensorDeviceMismatchError):
            rollout._conditioning(second, *rollout.read_driving(0))
