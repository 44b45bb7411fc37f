"""What a card computes piece by piece: the same numbers, with less of them there at a time."""

import pytest
import torch
from live_bytes import LiveBytes
from tiny import build_tiny_pipeline
from torch import Tensor, nn

from everanimate_cli import piecewise
from everanimate_cli.acceleration import use_channels_last
from everanimate_cli.piecewise import (
    BandedConv3d,
    PiecewiseBlock,
    compute_blocks_piecewise,
    work_in_bands,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_pieces_are_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(piecewise, "PIECE_TOKENS", 10)  # the last of 3 pieces is smaller
    whole, cut = (build_tiny_pipeline(dtype=dtype).transformer for _ in range(2))
    compute_blocks_piecewise(cut)
    assert all(type(block) is PiecewiseBlock for block in cut.blocks)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden_states, modulation = draw(1, 26, 48), draw(1, 6, 48)
    context = whole._embed_context(draw(1, 512, 20), draw(1, 17, 28))
    rotary = whole.rope(torch.empty(1, 16, 26, 2, 2))
    before = hidden_states.clone()
    with torch.no_grad():
        expected = whole.blocks[1](hidden_states, context, modulation, rotary)
        made = cut.blocks[1](hidden_states, context, modulation, rotary)
    assert torch.equal(hidden_states, before)  # the caller goes on with it
    assert (expected - before).abs().max() > 0.1
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance)


def test_pieces_of_tokens_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_tiny_pipeline(dtype=torch.bfloat16).transformer
    compute_blocks_piecewise(network)
    block = network.blocks[0]
    given = (
        torch.zeros(1, 4000, 48, dtype=torch.bfloat16),
        torch.zeros(1, 512 + 17, 48, dtype=torch.bfloat16),
        torch.zeros(1, 6, 48),
        network.rope(torch.empty(1, 16, 10, 40, 40)),
    )
    peaks = []
    for num_tokens in (4000, 500):
        monkeypatch.setattr(piecewise, "PIECE_TOKENS", num_tokens)
        with torch.no_grad(), LiveBytes([block], given=given[:3]) as live:
            block(*given)
        peaks.append(live.peak)
    assert peaks[1] < 0.95 * peaks[0]


def test_compiled_code_takes_the_whole_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE_TOKENS", 10)
    monkeypatch.setattr(piecewise, "_cut", None)
    network = build_tiny_pipeline(dtype=torch.bfloat16).transformer
    compute_blocks_piecewise(network)
    context = torch.ones(1, 512 + 17, 48, dtype=torch.bfloat16)
    given = torch.ones(1, 26, 48, dtype=torch.bfloat16), context, torch.ones(1, 6, 48)
    rotary = network.rope(torch.empty(1, 16, 26, 2, 2))
    with torch.no_grad():
        compiled = torch.compile(network.blocks[0], backend="eager", fullgraph=True)
        assert compiled(*given, rotary).shape == given[0].shape
        with pytest.raises(TypeError):
            network.blocks[0](*given, rotary)  # which is cut


def test_gradients_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE_TOKENS", 10)
    gradients = []
    for is_cut in (False, True):
        network = build_tiny_pipeline().transformer
        if is_cut:
            compute_blocks_piecewise(network)
        given = torch.ones(1, 26, 48, requires_grad=True)
        context = network._embed_context(torch.ones(1, 512, 20), torch.ones(1, 17, 28))
        rotary = network.rope(torch.empty(1, 16, 26, 2, 2))
        network.blocks[0](given, context, torch.ones(1, 6, 48), rotary).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_bands_of_pictures_are_the_same_pictures(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool, num_frames: int
) -> None:
    monkeypatch.setattr(piecewise, "BAND_BYTES", 2**12)
    whole, banded = build_tiny_pipeline(), build_tiny_pipeline()
    for pipeline in (whole, banded):
        if channels_last:
            use_channels_last(pipeline.vae)
    work_in_bands(banded.vae)
    seen: list[int] = []
    forward = nn.Conv3d._conv_forward
    monkeypatch.setattr(
        BandedConv3d,
        "_conv_forward",
        lambda conv, band, *args: seen.append(band.shape[3]) or forward(conv, band, *args),
    )
    for module in banded.vae.modules():
        if isinstance(module, nn.Conv3d):
            vars(module).pop("_conv_forward", None)  # oneDNN's, on the CPU
    video = torch.rand(1, 3, num_frames, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = whole.encode_video(video)
    torch.testing.assert_close(banded.encode_video(video), latents, rtol=1e-5, atol=1e-4)
    assert min(seen) < 10  # a few rows at a time
    torch.testing.assert_close(banded.decode(latents), whole.decode(latents), rtol=1e-5, atol=1e-4)
