"""Ways of computing that were chosen for speed give what the plain ones give."""

import math
from collections.abc import Callable

import pytest
import torch
from tiny import LATENT_CHANNELS, TEXT_DIM, build_networks, build_tiny_pipeline
from torch import Tensor

from everanimate_cli.memory import to_uint8
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.transformer import (
    NUM_TEXT_TOKENS,
    EverAnimateTransformer3DModel,
    MergedPaddingAttnProcessor,
)

# Of values of std 1: float32 rounding in another order.
TOLERANCE = 1e-5


@pytest.fixture
def plain() -> EverAnimateTransformer3DModel:
    return build_networks()["transformer"]


@pytest.fixture
def merging() -> EverAnimateTransformer3DModel:
    transformer = build_networks()["transformer"]
    transformer.merge_padding()
    return transformer


def prompts(*lengths: int) -> Tensor:
    """[B, 512, text_dim] of so many tokens, zeros after the last."""
    tokens = torch.randn(
        len(lengths), NUM_TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(1)
    )
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    return tokens


@torch.no_grad()
def velocity(transformer: EverAnimateTransformer3DModel, text: Tensor) -> Tensor:
    """What the network makes of a prompt, with other inputs always the same."""
    generator = torch.Generator().manual_seed(0)
    config, size = transformer.config, transformer.config.motion_encoder_size
    num_rows = len(text)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_rows, *shape, generator=generator)

    return transformer(
        draw(config.in_channels, 4, 4, 6),
        torch.full((num_rows,), 600.0),
        text,
        draw(17, config.image_dim),
        transformer.embed_pose(draw(LATENT_CHANNELS, 3, 4, 6)),
        transformer.embed_face(draw(3, 9, size, size).clamp(-1, 1)),
    )


@pytest.mark.parametrize("lengths", [(5,), (0,), (511,), (512,), (3, 40)])
def test_merged_padding_changes_rounding_only(
    plain: EverAnimateTransformer3DModel,
    merging: EverAnimateTransformer3DModel,
    lengths: tuple[int, ...],
) -> None:
    text = prompts(*lengths)
    expected = velocity(plain, text)
    assert expected.std() > 0.3
    torch.testing.assert_close(velocity(merging, text), expected, rtol=0, atol=TOLERANCE)


def test_zeros_between_words_are_no_padding(
    plain: EverAnimateTransformer3DModel, merging: EverAnimateTransformer3DModel
) -> None:
    text = prompts(7)
    text[:, 2:4] = 0
    torch.testing.assert_close(
        velocity(merging, text), velocity(plain, text), rtol=0, atol=TOLERANCE
    )


def test_padding_counted_once_misses(
    plain: EverAnimateTransformer3DModel,
    merging: EverAnimateTransformer3DModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(math, "log", lambda _: 0.0)
    text = prompts(5)
    difference = velocity(merging, text) - velocity(plain, text)
    assert difference.abs().max() > 100 * TOLERANCE


def test_a_network_without_image_attention_of_its_own_stays_as_it_is() -> None:
    config = {**build_networks()["transformer"].config, "added_kv_proj_dim": None}
    transformer = EverAnimateTransformer3DModel.from_config(config).eval()
    expected = velocity(transformer, prompts(5))
    transformer.merge_padding()
    torch.testing.assert_close(velocity(transformer, prompts(5)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "merges"), [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_padding_is_merged_in_float32_only(dtype: torch.dtype, merges: bool) -> None:
    blocks = build_tiny_pipeline(dtype=dtype).transformer.blocks
    processors = [block.attn2.processor for block in blocks]
    assert [isinstance(one, MergedPaddingAttnProcessor) for one in processors] == [merges] * 4


def convolutions(compute: Callable[[], object]) -> set[str]:
    """Which kinds of 3D convolution torch ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute()
    names = {event.key for event in profile.key_averages()}
    return names & {"aten::slow_conv3d_forward", "aten::mkldnn_convolution"}


def test_small_convolutions_change_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    fast = build_tiny_pipeline()
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    slow = build_tiny_pipeline()

    def encode(pipeline: AnimatePipeline) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline.encode_video(torch.rand(1, 3, 9, 48, 64, generator=generator) * 2 - 1)

    latents = encode(slow)
    assert latents.std() > 0.3
    torch.testing.assert_close(encode(fast), latents, rtol=1e-5, atol=TOLERANCE * latents.std())
    pixels = slow.decode(latents)
    assert to_uint8(pixels).float().std() > 10
    torch.testing.assert_close(fast.decode(latents), pixels, rtol=0, atol=TOLERANCE)
    if torch.backends.mkldnn.is_available():
        assert convolutions(lambda: encode(fast)) == {"aten::mkldnn_convolution"}
    assert "aten::slow_conv3d_forward" in convolutions(lambda: encode(slow))
