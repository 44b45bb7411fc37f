"""Memory slots, their condition, and the random draws, on latents that show their origin."""

import numpy as np
import pytest
import torch
from diffusers import WanAnimatePipeline
from torch import Tensor

from everanimate_cli.errors import SettingsError
from everanimate_cli.memory import (
    assemble_identity,
    build_condition,
    build_pixel_condition,
    chunk_noise,
    count_drawn_frames,
    draw_anchor_indices,
    from_uint8,
    pixel_condition_video,
    to_uint8,
)

REFERENCE = 9


def latents_of(*values: float) -> Tensor:
    """[1, 2, len(values), 1, 3]: each slot is filled with its value."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(-1, 2, -1, 1, 3)


def values_of(latents: Tensor) -> list[float]:
    """The value of each slot, which must be the same in all cells and channels."""
    assert (latents == latents[:, :1, :, :1, :1]).all()
    return latents[0, 0, :, 0, 0].tolist()


def test_identity_of_the_first_chunk_is_the_reference_repeated() -> None:
    assert values_of(assemble_identity(latents_of(REFERENCE), 4)) == [9, 9, 9, 9]


def test_drawn_frames_stand_before_the_reference() -> None:
    identity = assemble_identity(latents_of(REFERENCE), 4, drawn=latents_of(1, 2, 3))
    assert values_of(identity) == [1, 2, 3, 9]


def test_views_hold_the_first_slots_in_every_chunk() -> None:
    views = latents_of(5, 6)
    assert values_of(assemble_identity(latents_of(9), 4, views=views)) == [5, 6, 9, 9]
    assert count_drawn_frames(4, 2) == 1
    identity = assemble_identity(latents_of(9), 4, views=views, drawn=latents_of(1))
    assert values_of(identity) == [5, 6, 1, 9]


def test_as_many_views_as_slots_leave_no_frame_to_draw() -> None:
    views = latents_of(5, 6, 7)
    assert count_drawn_frames(4, 3) == 0
    first = assemble_identity(latents_of(9), 4, views=views)
    later = assemble_identity(latents_of(9), 4, views=views, drawn=latents_of())
    assert values_of(first) == values_of(later) == [5, 6, 7, 9]


def test_one_slot_is_the_reference() -> None:
    assert count_drawn_frames(1) == 0
    assert values_of(assemble_identity(latents_of(9), 1, drawn=latents_of())) == [9]


def test_views_without_room_for_the_reference_are_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        assemble_identity(latents_of(9), 2, views=latents_of(5, 6))
    assert str(caught.value) == (
        "--identity-slots 2 has no room for 2 views and the reference. Give fewer --view "
        "pictures, or at least 3 slots."
    )


def test_drawn_frames_must_fill_the_slots() -> None:
    with pytest.raises(ValueError, match="2 drawn frames for 3 identity slots"):
        assemble_identity(latents_of(9), 4, drawn=latents_of(1, 2))


def test_condition_masks_the_identity_slots_only() -> None:
    condition = build_condition(latents_of(1, 2, 9), latents_of(7, 8), num_target_slots=4)
    assert condition.shape == (1, 4 + 2, 3 + 4, 1, 3)
    assert values_of(condition[:, :4]) == [1, 1, 1, 0, 0, 0, 0]
    assert values_of(condition[:, 4:]) == [1, 2, 9, 7, 8, 0, 0]


def test_condition_without_motion_is_zero_after_the_identity() -> None:
    condition = build_condition(latents_of(9, 9), None, num_target_slots=3)
    assert values_of(condition[:, 4:]) == [9, 9, 0, 0, 0]


def test_motion_longer_than_the_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="3 motion latents, 2 slots"):
        build_condition(latents_of(9), latents_of(1, 2, 3), num_target_slots=2)


def test_pixel_condition_video_puts_zeros_after_the_carried_frames() -> None:
    carried = torch.full((1, 3, 5, 2, 4), 0.5)
    video = pixel_condition_video(carried, 9, 2, 4)
    assert video.shape == (1, 3, 9, 2, 4)
    assert (video[:, :, :5] == 0.5).all()
    assert (video[:, :, 5:] == 0).all()
    assert not pixel_condition_video(None, 9, 2, 4).any()


@pytest.mark.parametrize(
    ("num_carried_frames", "expected"),
    [(0, [1, 0, 0, 0]), (1, [1, 1, 0, 0]), (5, [1, 1, 1, 0])],
)
def test_pixel_condition_masks_the_carried_slots(
    num_carried_frames: int, expected: list[float]
) -> None:
    condition = build_pixel_condition(latents_of(9), latents_of(1, 2, 3), num_carried_frames)
    assert values_of(condition[:, :4]) == expected
    assert values_of(condition[:, 4:]) == [9, 1, 2, 3]


@pytest.mark.parametrize("num_carried_frames", [0, 1, 3, 5, 9])
def test_pixel_mask_is_that_of_diffusers(num_carried_frames: int) -> None:
    """Also for counts that fill a latent only in part."""
    pipeline = WanAnimatePipeline.__new__(WanAnimatePipeline)
    pipeline.vae_scale_factor_temporal = 4
    expected = pipeline.get_i2v_mask(1, 3, 1, 3, mask_len=num_carried_frames, device="cpu")
    condition = build_pixel_condition(latents_of(9), latents_of(1, 2, 3), num_carried_frames)
    torch.testing.assert_close(condition[:, :4, 1:], expected, rtol=0, atol=0)


def test_pixels_are_truncated_and_clipped() -> None:
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5]).expand(3, 1, 1, -1)
    assert to_uint8(levels)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_uint8_survives_the_round_trip_up_to_truncation() -> None:
    """2/255 is no binary fraction: some values come back one lower, which rounding would hide."""
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(2, 1, 256, 3)
    pixels = from_uint8(frames.numpy())
    assert pixels.shape == (1, 3, 2, 1, 256)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    difference = frames.int() - to_uint8(pixels[0]).int()
    assert set(difference.unique().tolist()) <= {0, 1}


def test_axes_of_frames_are_kept_apart() -> None:
    frames = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3)
    pixels = from_uint8(frames)
    assert pixels.shape == (1, 3, 2, 4, 5)
    expected = frames[1, 3, 4, 2].item() * 2 / 255 - 1
    assert pixels[0, 2, 1, 3, 4].item() == pytest.approx(expected, abs=1e-6)
    assert to_uint8(pixels[0]).shape == frames.shape


def test_seed_zero_gives_the_released_noise() -> None:
    shape = (1, 2, 3, 1, 2)
    for chunk_index in (0, 3):
        generator = torch.Generator().manual_seed(42 * chunk_index)
        expected = torch.randn(shape, generator=generator)
        assert torch.equal(chunk_noise(0, chunk_index, shape), expected)


def test_noise_follows_seed_and_chunk_and_nothing_else() -> None:
    shape = (1, 2, 3, 1, 2)
    torch.manual_seed(1)
    noise = {pair: chunk_noise(*pair, shape) for pair in [(1, 0), (1, 1), (2, 0), (0, 1)]}
    torch.manual_seed(2)
    assert torch.equal(chunk_noise(1, 1, shape), noise[1, 1])
    values = [tuple(drawn.flatten().tolist()) for drawn in noise.values()]
    assert len(set(values)) == len(values)
    state = np.random.SeedSequence([1, 1]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    assert torch.equal(noise[1, 1], torch.randn(shape, generator=generator))


def test_anchor_draw_is_fixed_by_the_seed() -> None:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, 2**31])))
    expected = sorted(generator.choice(np.arange(1, 77), 3, replace=False).tolist())
    assert draw_anchor_indices(3, 77, 3) == expected
    assert draw_anchor_indices(4, 77, 3) != expected
    assert all(type(index) is int for index in draw_anchor_indices(3, 77, 3))


def test_anchor_draw_takes_every_frame_but_the_first_if_it_must() -> None:
    assert draw_anchor_indices(0, 5, 4) == [1, 2, 3, 4]
    assert draw_anchor_indices(0, 5, 0) == []
    with pytest.raises(SettingsError) as caught:
        draw_anchor_indices(0, 5, 5)
    assert str(caught.value) == (
        "--frames-per-chunk 5 leaves 4 frames for 5 identity slots. Give longer chunks or fewer "
        "--identity-slots."
    )
