"""What one chunk hands to the next, and the condition that the network sees of it.

Identity and motion memory stay in the VAE's normalised latent space: they are never decoded and
encoded again. The only pixels that become memory are those of chunk 0 that are drawn as anchors.
"""

import numpy as np
import torch
from torch import Tensor

from everanimate_cli.errors import SettingsError
from everanimate_cli.settings import TEMPORAL_STRIDE

NUM_MASK_CHANNELS = TEMPORAL_STRIDE  # one per pixel frame that a latent frame stands for

# Keeps the stream of the anchor draw apart from those of the chunks' noise.
ANCHOR_STREAM = 2**31
# The released script seeds chunk k with 42 * k; seed 0 gives the released noise.
RELEASED_SEED_STEP = 42


def to_uint8(pixels: Tensor) -> Tensor:
    """Cut decoded pixels to 8 bits.

    Truncates, as the released code does: rounding would put half of all values off by one, and
    frames cut here become anchors and CLIP images.

    Args:
        pixels: [3, S, H, W] float, nominally in [-1, 1].

    Returns:
        [S, H, W, 3] RGB uint8.
    """
    scaled = ((pixels.float() + 1) * 127.5).clamp(0, 255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def from_uint8(frames_u8: Tensor | np.ndarray) -> Tensor:
    """Bring 8-bit frames to the range the networks take.

    Args:
        frames_u8: [S, H, W, 3] RGB uint8.

    Returns:
        [1, 3, S, H, W] float32 in [-1, 1].
    """
    frames = torch.as_tensor(frames_u8).permute(3, 0, 1, 2)[None]
    return frames.float() * (2 / 255) - 1


def chunk_noise(seed: int, chunk_index: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the noise that a chunk starts from: all slots at once, from the chunk's own generator.

    Drawn on the CPU in float32 whatever the network runs on, so that a run can be repeated
    elsewhere and continued at any chunk.

    Args:
        seed: Base seed, at least 0; 0 gives the noise of the released script.
        chunk_index: Chunk, from 0 on.
        shape: (1, C, K_id + T, h, w).

    Returns:
        Standard normal noise of `shape`, float32 on the CPU.

    Source: method page section 2, "Randomness"; `clip*.noise` in parity file
    `rollout.safetensors`.
    """
    if seed == 0:
        torch_seed = RELEASED_SEED_STEP * chunk_index
    else:
        state = np.random.SeedSequence([seed, chunk_index]).generate_state(1, np.uint64)
        torch_seed = int(state[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(torch_seed))


def draw_anchor_indices(seed: int, frames_per_chunk: int, num_frames: int) -> list[int]:
    """Choose the frames of chunk 0 that become identity memory.

    Frame 0 is left out: it decodes from a latent of its own and repeats the reference most.

    Args:
        seed: Base seed of the run, at least 0.
        frames_per_chunk: Pixel frames F of a chunk.
        num_frames: How many to draw, see `count_drawn_frames`.

    Returns:
        `num_frames` different indices in 1 .. F - 1, rising.

    Raises:
        SettingsError: If chunk 0 has too few frames.

    Source: method page section 2, "Randomness".
    """
    if num_frames > frames_per_chunk - 1:
        raise SettingsError(
            f"--frames-per-chunk {frames_per_chunk} leaves {frames_per_chunk - 1} frames for "
            f"{num_frames} identity slots. Give longer chunks or fewer --identity-slots."
        )
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, ANCHOR_STREAM])))
    drawn = generator.choice(np.arange(1, frames_per_chunk), num_frames, replace=False)
    return sorted(int(index) for index in drawn)


def count_drawn_frames(num_identity_slots: int, num_views: int = 0) -> int:
    """Identity slots that chunk 0 fills for the later chunks: all but the views and the reference.

    Raises:
        SettingsError: If the views leave no slot for the reference.
    """
    if num_views > num_identity_slots - 1:
        raise SettingsError(
            f"--identity-slots {num_identity_slots} has no room for {num_views} views and the "
            f"reference. Give fewer --view pictures, or at least {num_views + 1} slots."
        )
    return num_identity_slots - 1 - num_views


def assemble_identity(
    reference: Tensor,
    num_identity_slots: int,
    *,
    views: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """Fill the identity slots: the views, then drawn frames or the reference, the reference last.

    Args:
        reference: [B, C, 1, h, w] latent of the reference image.
        num_identity_slots: K_id, at least 1.
        views: [B, C, V, h, w] latents of the user's other views, each encoded alone; they hold
            slots 0 .. V-1 in every chunk.
        drawn: [B, C, K_id-1-V, h, w] latents of frames drawn from chunk 0, each encoded alone, in
            temporal order; None in chunk 0 and with `--memory sink`, where the reference stands in
            for them.

    Returns:
        [B, C, K_id, h, w].

    Raises:
        SettingsError: If the views leave no slot for the reference.
        ValueError: If `drawn` does not fill the slots between.

    Source: method page section 2, "Identity memory".
    """
    num_between = count_drawn_frames(num_identity_slots, 0 if views is None else views.shape[2])
    between = reference.expand(-1, -1, num_between, -1, -1) if drawn is None else drawn
    if between.shape[2] != num_between:
        raise ValueError(f"{between.shape[2]} drawn frames for {num_between} identity slots")
    filled = [between, reference] if views is None else [views, between, reference]
    return torch.cat(filled, dim=2)


def build_condition(
    identity_latents: Tensor, motion_latents: Tensor | None, num_target_slots: int
) -> Tensor:
    """Lay out identity and motion memory as the condition `y`.

    The mask is 1 on the identity slots only: the motion slots are recognised by their content.
    What no memory fills is true zero latents, not the code of a grey picture.

    Args:
        identity_latents: [B, C, K_id, h, w] normalised latents.
        motion_latents: [B, C, K_mo, h, w], the last latents that the previous chunk sampled; None
            (zeros) in the first chunk and with `--memory sink`.
        num_target_slots: T.

    Returns:
        [B, 4 + C, K_id + T, h, w]: mask, then latents.

    Raises:
        ValueError: If the motion memory is longer than the chunk.

    Source: method page section 2; parity file `conditioning.safetensors`.
    """
    batch_size, num_channels, num_identity_slots, height, width = identity_latents.shape
    num_slots = num_identity_slots + num_target_slots
    num_all_channels = NUM_MASK_CHANNELS + num_channels
    condition = identity_latents.new_zeros(batch_size, num_all_channels, num_slots, height, width)
    condition[:, :NUM_MASK_CHANNELS, :num_identity_slots] = 1
    condition[:, NUM_MASK_CHANNELS:, :num_identity_slots] = identity_latents
    if motion_latents is not None:
        end = num_identity_slots + motion_latents.shape[2]
        if end > num_slots:
            raise ValueError(f"{motion_latents.shape[2]} motion latents, {num_target_slots} slots")
        condition[:, NUM_MASK_CHANNELS:, num_identity_slots:end] = motion_latents
    return condition


def pixel_condition_video(
    carried_pixels: Tensor | None, frames_per_chunk: int, height: int, width: int
) -> Tensor:
    """Build the video whose code is the condition of a chunk with `--memory pixel`.

    Args:
        carried_pixels: [B, 3, o, H, W] float32 in [-1, 1], the last decoded frames of the previous
            chunk, not cut to 8 bits; None in the first chunk.
        frames_per_chunk: Pixel frames F.
        height: Pixels H.
        width: Pixels W.

    Returns:
        [B, 3, F, H, W]: the carried frames, then zeros (mid-grey); to be encoded as one video.
        B is 1 in the first chunk.

    Source: method page section 4, "Comparison modes"; diffusers' `WanAnimatePipeline`.
    """
    if carried_pixels is None:
        return torch.zeros(1, 3, frames_per_chunk, height, width)
    rest = frames_per_chunk - carried_pixels.shape[2]
    return torch.nn.functional.pad(carried_pixels, (0, 0, 0, 0, 0, rest))


def build_pixel_condition(
    reference: Tensor, video_latents: Tensor, num_carried_frames: int
) -> Tensor:
    """Lay out the condition of a chunk with `--memory pixel`: Wan-Animate as diffusers runs it.

    Each of a latent's four mask channels stands for one of its pixel frames and is 1 where that
    frame was carried over; the first latent has one frame, which fills all four.

    Args:
        reference: [B, C, 1, h, w] latent of the reference image, the only identity slot.
        video_latents: [B, C, T, h, w] code of `pixel_condition_video`.
        num_carried_frames: o, or 0 in the first chunk.

    Returns:
        [B, 4 + C, 1 + T, h, w]: mask, then latents.

    Source: method page section 4, "Comparison modes"; `get_i2v_mask` of diffusers'
    `WanAnimatePipeline`.
    """
    num_target_slots = video_latents.shape[2]
    frame_index = torch.arange(num_target_slots * TEMPORAL_STRIDE) - (TEMPORAL_STRIDE - 1)
    is_carried = frame_index.clamp(min=0) < num_carried_frames
    mask = is_carried.view(num_target_slots, TEMPORAL_STRIDE).T  # [4, T]
    mask = torch.nn.functional.pad(mask.to(reference), (1, 0), value=1)  # [4, 1 + T]
    latents = torch.cat([reference, video_latents], dim=2)
    batch_size, _, _, height, width = latents.shape
    mask = mask[None, :, :, None, None].expand(batch_size, -1, -1, height, width)
    return torch.cat([mask, latents], dim=1)
