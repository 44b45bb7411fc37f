"""Attention shares against whole matrices, and the measured network against the unmeasured one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY_DEFAULTS, build_tiny_pipeline
from torch import Tensor

from everanimate_cli.attention_shares import (
    GROUPS,
    AttentionMeter,
    AttentionShares,
    BlockShares,
    ChunkShares,
    Layout,
    attention_weights,
    measure_block,
    rotated_query_key,
)
from everanimate_cli.memory import chunk_noise, draw_anchor_indices
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.rollout import Chunk, Rollout, Step

LAYOUT = Layout(num_identity_slots=2, num_motion_slots=1, num_target_slots=3, rows=2, columns=3)
HEADS, WIDTH = 2, 4
TINY_LAYOUT = Layout(
    num_identity_slots=4, num_motion_slots=1, num_target_slots=3, rows=3, columns=4
)


@pytest.fixture(scope="module")
def pipeline() -> AnimatePipeline:
    return build_tiny_pipeline()


def build_rollout(pipeline: AnimatePipeline) -> Rollout:
    """Two chunks of noise."""
    defaults = TINY_DEFAULTS
    generator = np.random.default_rng(5)

    def frames(num_frames: int, height: int, width: int) -> np.ndarray:
        return generator.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)

    poses = frames(9, defaults.height, defaults.width)
    faces = frames(9, defaults.face_size, defaults.face_size)
    reference = frames(1, defaults.height, defaults.width)[0]
    rollout = Rollout(
        pipeline=replace(pipeline),
        reference_u8=reference,
        picture_u8=reference,
        views_u8=[],
        read_driving=lambda _: (poses, faces),
        noise=lambda chunk_index: chunk_noise(0, chunk_index, rollout.noise_shape),
        anchor_frame_indices=draw_anchor_indices(0, 9, 3),
        prompt_embeds=pipeline.encode_prompt("a fox"),
        num_chunks=2,
        frames_per_chunk=9,
        overlap=4,
        num_identity_slots=4,
        num_inference_steps=2,
        shift=5.0,
    )
    return rollout


def random_query_key(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Query of the target tokens and key of all, of the small layout."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(HEADS, LAYOUT.num_tokens, WIDTH, generator=generator)
    query = 2 * torch.randn(HEADS, 3 * LAYOUT.tokens_per_slot, WIDTH, generator=generator)
    return query, key


def whole_matrix(query: Tensor, key: Tensor) -> np.ndarray:
    """[heads, Q, N] softmax weights in float64, straight from the formula."""
    logits = query.double().numpy() @ key.double().numpy().transpose(0, 2, 1) / WIDTH**0.5
    powers = np.exp(logits)
    return powers / powers.sum(axis=2, keepdims=True)


@pytest.mark.parametrize("max_bytes", [1, 500, 10**9])
def test_the_weights_are_those_of_the_whole_matrix(max_bytes: int) -> None:
    query, key = random_query_key()
    pieces = list(attention_weights(query, key, max_bytes=max_bytes))
    starts = [first for first, _ in pieces]
    assert starts == list(np.cumsum([0] + [piece.shape[1] for _, piece in pieces])[:-1])
    weights = torch.cat([piece for _, piece in pieces], dim=1)
    assert np.abs(weights.numpy() - whole_matrix(query, key)).max() < 1e-6
    if max_bytes >= 4 * HEADS * LAYOUT.num_tokens:
        assert all(4 * piece.numel() <= max_bytes for _, piece in pieces)


def test_a_full_size_chunk_never_has_a_large_piece() -> None:
    """832x480: 24 slots of 1560 tokens, 40 heads; the whole matrix would have 224 GB."""
    key = torch.empty(40, 24 * 1560, 128, device="meta", dtype=torch.bfloat16)
    _, piece = next(attention_weights(key[:, 4 * 1560 :], key))
    assert piece.shape == (40, 44, 37440)
    assert piece.dtype == torch.float32


@pytest.mark.parametrize("max_bytes", [1, 2000, 10**9])
def test_sums_over_groups_slots_and_cells(max_bytes: int) -> None:
    """Twelve identity tokens, six of motion memory, twelve of the other target slots."""
    query, key = random_query_key()
    weights = whole_matrix(query, key)
    shares = measure_block(query, key, LAYOUT, max_bytes=max_bytes)
    new = weights[:, 6:]  # the tokens after the motion slot
    by_head = [new[:, :, :12], new[:, :, 12:18], new[:, :, 18:]]
    expected = np.stack([part.sum(2).mean(1) for part in by_head], axis=1)
    np.testing.assert_allclose(shares.by_head, expected, atol=1e-6)
    by_slot = weights.mean(0).reshape(3, 6, 5, 6).sum(3).mean(1)
    np.testing.assert_allclose(shares.by_slot, by_slot, atol=1e-6)
    from_cells = weights[:, :, :12].sum(2).mean(0).reshape(3, 2, 3)
    np.testing.assert_allclose(shares.from_cells, from_cells, atol=1e-6)
    to_cells = new[:, :, :12].mean((0, 1)).reshape(2, 2, 3)
    np.testing.assert_allclose(shares.to_cells, to_cells, atol=1e-6)


def test_the_groups_are_all_of_the_attention() -> None:
    shares = measure_block(*random_query_key(1), LAYOUT)
    np.testing.assert_allclose(shares.by_head.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(shares.by_slot.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(shares.to_cells.sum(), shares.by_head[:, 0].mean(), atol=1e-6)


def test_who_looks_at_nothing_in_particular_gives_uniform_shares() -> None:
    query, key = random_query_key()
    shares = measure_block(torch.zeros_like(query), key, LAYOUT)
    assert LAYOUT.uniform_shares == [0.4, 0.2, 0.4]
    np.testing.assert_allclose(shares.by_head, [[0.4, 0.2, 0.4]] * HEADS, atol=1e-6)


def test_a_sink_shows_where_it_is() -> None:
    query, key = random_query_key()
    query[..., 0], key[..., 0] = 5.0, 0.0
    key[:, 10, 0] = 20.0  # token 4 of identity slot 1: row 1, column 1
    shares = measure_block(query, key, LAYOUT)
    assert shares.by_head[:, 0].min() > 0.99
    assert shares.to_cells[1, 1, 1] > 0.99


def test_what_is_measured_is_what_the_network_computes(pipeline: AnimatePipeline) -> None:
    """Query and key, with the value and the way out added, give the output of the module."""
    network = pipeline.transformer
    generator = torch.Generator().manual_seed(0)
    slots = torch.empty(1, 1, TINY_LAYOUT.num_slots, 6, 8)
    rotary = network.rope(slots)
    attention = network.blocks[1].attn1
    hidden = torch.randn(1, TINY_LAYOUT.num_tokens, 48, generator=generator)
    with torch.no_grad():
        expected = attention(hidden, None, None, rotary)
        query, key = rotated_query_key(attention, hidden, rotary)
        weights = torch.cat([piece for _, piece in attention_weights(query, key)], dim=1)
        value = attention.to_v(hidden).unflatten(2, (2, -1))[0].transpose(0, 1)
        made = attention.to_out[0]((weights @ value).transpose(0, 1).flatten(1)[None])
    torch.testing.assert_close(made, expected, atol=2e-6, rtol=1e-5)


def test_the_measured_network_makes_the_same_video(pipeline: AnimatePipeline) -> None:
    plain = list(build_rollout(pipeline).run())
    measured: list[Step | Chunk] = []
    taken: list[list[BlockShares]] = []
    with AttentionMeter(pipeline.transformer, TINY_LAYOUT) as meter:
        for made in build_rollout(pipeline).run():
            measured.append(made)
            taken.append(meter.take())
    assert [len(blocks) for blocks in taken] == [4, 4, 0] * 2  # a list a step, none for a chunk
    for one, other in zip(plain, measured, strict=True):
        if isinstance(one, Chunk) and isinstance(other, Chunk):
            assert torch.equal(one.latents, other.latents)
            assert np.array_equal(one.frames_u8, other.frames_u8)
    # Memory is not looked at as anything else is.
    assert taken[0][0].by_head.shape == (2, 3)
    assert np.ptp([blocks[3].by_head[:, 0].mean() for blocks in taken if blocks]) > 1e-6


def test_nothing_stays_on_the_network(pipeline: AnimatePipeline) -> None:
    with AttentionMeter(pipeline.transformer, TINY_LAYOUT):
        assert all(block.attn1._forward_pre_hooks for block in pipeline.transformer.blocks)
    assert not any(block.attn1._forward_pre_hooks for block in pipeline.transformer.blocks)


def constant_block(identity: float, motion: float) -> BlockShares:
    """Two heads, the second of which looks at identity memory twice as much."""
    one = [identity, motion, 1 - identity - motion]
    two = [2 * identity, motion, 1 - 2 * identity - motion]
    return BlockShares(
        by_head=np.array([one, two]),
        by_slot=np.full((3, 5), 0.2),
        from_cells=np.full((3, 2, 3), identity),
        to_cells=np.full((2, 2, 3), motion),
    )


def test_a_chunk_is_the_mean_over_steps_and_blocks() -> None:
    steps = [[constant_block(0.1, 0.2), constant_block(0.3, 0.2)], [constant_block(0.2, 0.0)] * 2]
    chunk = ChunkShares.average(steps)
    assert chunk.by_head.shape == (2, 2, 2, 3)
    assert chunk.by_head[0, 1, 1].tolist() == pytest.approx([0.6, 0.2, 0.2])
    np.testing.assert_allclose(chunk.from_cells, 0.2)
    np.testing.assert_allclose(chunk.to_cells, 0.1)


def test_the_figures_of_a_video() -> None:
    chunks = [
        ChunkShares.average([[constant_block(0.1, 0.2)], [constant_block(0.2, 0.2)]]),
        ChunkShares.average([[constant_block(0.3, 0.2)], [constant_block(0.2, 0.2)]]),
    ]
    measured = AttentionShares(layout=LAYOUT, sigmas=[1.0, 0.75], chunks=chunks)
    figures = measured.to_json()
    assert figures["tokens"] == 30
    assert figures["slots"] == {"identity": 2, "motion": 1, "target": 2}
    assert figures["uniform_share"] == {"identity": 0.4, "motion": 0.2, "target": 0.4}
    assert figures["share"] == {"identity": 0.3, "motion": 0.2, "target": 0.5}
    assert figures["share_by_chunk"]["identity"] == [0.225, 0.375]
    assert figures["share_by_step"]["identity"] == [0.3, 0.3]
    assert figures["share_by_block"]["identity"] == [0.3]
    assert figures["share_by_block_and_head"]["identity"] == [[0.2, 0.4]]
    rows = measured.rows()
    assert len(rows) == 2 * 2 * 1 * len(GROUPS)
    assert rows[0] == {
        "chunk": 0,
        "step": 0,
        "sigma": "1.000000",
        "block": 0,
        "group": "identity",
        "share": "0.150000",
        "uniform_share": "0.400000",
        "over_uniform": "0.3750",
        "lowest_head": "0.100000",
        "highest_head": "0.200000",
    }
