"""What a checkpoint takes in memory, from its headers alone, and the sizes that a plan needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from everanimate_cli.checkpoint import check_network, full_config
from everanimate_cli.errors import WeightsError
from everanimate_cli.lora import LORA_TARGET_PATTERN
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.piecewise import BAND_BYTES, PIECE_TOKENS
from everanimate_cli.settings import TEMPORAL_STRIDE
from everanimate_cli.train_settings import Checkpointing

# What `offloading.store_blocks` stores in fewer bits.
BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(?!.*norm).+\.(weight|bias)")
_MIB = 2**20
_TILE_PX = 256  # side of diffusers' tiles


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a checkpoint's networks that a plan needs before they are loaded.

    Attributes:
        size_multiple: What width and height of a video must be multiples of, in pixels.
        face_size: Side of the face crops, in pixels.
        inner_dim: Channels of a token in the transformer.
        ffn_dim: Channels inside its feed-forward layers.
        num_layers: Blocks of the transformer.
        num_heads: Of its attention.
        decoder_channels: Of the VAE at full resolution.
    """

    size_multiple: int
    face_size: int
    inner_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    decoder_channels: int

    def step_mib(
        self,
        height: int,
        width: int,
        frames_per_chunk: int,
        num_identity_slots: int,
        dtype: torch.dtype,
        *,
        piecewise: bool = False,
    ) -> float:
        """Memory in MiB of one call of the transformer beside its weights, estimated.

        The factor 3.3 is the peak of live tensors in that call per token and channel, counted
        with fake tensors on the full-size network in bfloat16 from 480p to 720p; 2.9 in float32.
        Beside them the steps of a chunk share 3 numbers per token and inner channel: the pose's
        embedding as it came and at its slots, face tokens and positions.

        With `piecewise`, as on a card (`piecewise.PiecewiseBlock`), it is 13 numbers per token and
        inner channel in all, most of them while queries and keys are rotated; or with few tokens 6,
        and what a piece takes in the feed-forward layers or while these are added.
        """
        num_tokens = self.count_tokens(height, width, frames_per_chunk, num_identity_slots)
        inner = self.inner_dim
        numbers = num_tokens * (3.3 * (inner + self.ffn_dim) + 3 * inner)
        if piecewise:
            of_piece = PIECE_TOKENS * max(2 * self.ffn_dim + 3 * inner, 9 * inner)
            cut = max(13 * num_tokens * inner, 6 * num_tokens * inner + of_piece)
            numbers = min(numbers, cut)
        return numbers * dtype.itemsize / _MIB

    def tokens_mib(
        self,
        height: int,
        width: int,
        frames_per_chunk: int,
        num_identity_slots: int,
        dtype: torch.dtype,
    ) -> float:
        """Memory in MiB of a chunk's tokens, of which the step cache keeps some."""
        num_tokens = self.count_tokens(height, width, frames_per_chunk, num_identity_slots)
        return num_tokens * self.inner_dim * dtype.itemsize / _MIB

    def training_step_mib(
        self,
        height: int,
        width: int,
        frames_per_chunk: int,
        num_identity_slots: int,
        *,
        dtype: torch.dtype,
        autocast: bool,
        checkpointing: Checkpointing,
    ) -> float:
        """Memory in MiB that one sample of LoRA training takes beside the weights, estimated.

        All numbers are peaks of live tensors, counted as in `step_mib` on blocks of full size with
        adapters of rank 32, in bytes per token and channel: 26 while a block is computed anew and
        differentiated, 18 that it keeps without checkpointing; 31 and 25 where adapters or all is
        float32. With checkpointing 1.2 numbers per token and inner channel are left of a block,
        with its share of the face adapters. A fused attention keeps no scores.

        Args:
            height: Pixels.
            width: Pixels.
            frames_per_chunk: F.
            num_identity_slots: K_id.
            dtype: Of the weights.
            autocast: Whether it computes in bfloat16 all through.
            checkpointing: What a block keeps for its backward pass.
        """
        num_tokens = self.count_tokens(height, width, frames_per_chunk, num_identity_slots)
        unit = num_tokens * (self.inner_dim + self.ffn_dim) / _MIB
        kept, computed = (18, 26) if autocast else (25, 31)
        left = 1.2 * num_tokens * self.inner_dim * dtype.itemsize / _MIB
        needed = {
            "off": (kept * self.num_layers + computed - kept) * unit,
            "on": computed * unit + left * self.num_layers,
            "offload": computed * unit,
        }
        return needed[checkpointing]

    def count_tokens(
        self, height: int, width: int, frames_per_chunk: int, num_identity_slots: int
    ) -> int:
        """Tokens of a chunk in the transformer."""
        num_slots = num_identity_slots + (frames_per_chunk - 1) // TEMPORAL_STRIDE + 1
        return num_slots * (height // self.size_multiple) * (width // self.size_multiple)

    def decode_mib(
        self,
        height: int,
        width: int,
        frames_per_chunk: int,
        *,
        tiled: bool = False,
        piecewise: bool = False,
    ) -> float:
        """Memory in MiB of decoding a chunk in float32, estimated.

        One latent frame is decoded at a time. The factor 51 is the peak of live tensors, counted
        as in `step_mib`, in units of one picture with the decoder's last channels; with
        `piecewise`, as on a card, it is 43 and four bands. In tiles, of which diffusers decodes one
        after the other, it is that of a tile, and they overlap.
        """
        video_bytes = frames_per_chunk * height * width * 3 * 4
        if not tiled:
            return (self._vae_bytes(height, width, 51, 43, piecewise) + video_bytes) / _MIB
        tile_bytes = self._picture_bytes(min(height, _TILE_PX), min(width, _TILE_PX))
        return (51 * tile_bytes + 1.5 * video_bytes) / _MIB

    def encode_mib(
        self, height: int, width: int, num_frames: int, *, piecewise: bool = False
    ) -> float:
        """Memory in MiB of encoding a video in float32, or with one frame a picture; estimated.

        Four frames are encoded at a time. The factors are counted as in `decode_mib`.
        """
        video_bytes = num_frames * height * width * 3 * 4
        factors = (10, 10) if num_frames == 1 else (37, 29)
        return (self._vae_bytes(height, width, *factors, piecewise) + video_bytes) / _MIB

    def _vae_bytes(
        self, height: int, width: int, whole: int, banded: int, piecewise: bool
    ) -> float:
        """Of the VAE's tensors, in pictures: all at once, or without what exists in bands alone."""
        picture_bytes = self._picture_bytes(height, width)
        at_once = whole * picture_bytes
        return min(at_once, banded * picture_bytes + 4 * BAND_BYTES) if piecewise else at_once

    def _picture_bytes(self, height: int, width: int) -> int:
        """Of one picture with the channels that the VAE has at full resolution."""
        return height * width * self.decoder_channels * 4

    def step_flops(
        self,
        height: int,
        width: int,
        frames_per_chunk: int,
        num_identity_slots: int,
    ) -> float:
        """Floating point operations of one call of the transformer, a product and a sum as two.

        What costs less than 1 % is left out. Text and image tokens are counted as in the released
        model, 512 and 257.
        """
        num_tokens = self.count_tokens(height, width, frames_per_chunk, num_identity_slots)
        inner = self.inner_dim
        linear = 2 * num_tokens * inner * (6 * inner + 2 * self.ffn_dim)
        context = 2 * (2 * 512 + 2 * 257) * inner * inner
        attention = 4 * num_tokens * inner * (num_tokens + 512 + 257)
        adapters = self.num_layers // 5 * 2 * num_tokens * inner * 2 * inner
        return float(self.num_layers * (linear + context + attention) + adapters)


def lora_mib(source: ModelSource, rank: int) -> float:
    """Memory in MiB that a LoRA takes in training: itself, its gradient and AdamW's two averages.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    shapes = check_network(source, "transformer").items()
    target = re.compile(rf"{LORA_TARGET_PATTERN}\.weight")
    sides = sum(sum(shape) for key, shape in shapes if target.fullmatch(key))
    return 4 * torch.float32.itemsize * rank * sides / _MIB


def read_geometry(source: ModelSource) -> Geometry:
    """Sizes of the networks, from their `config.json`.

    Raises:
        WeightsError: If a config is missing or describes another network.
    """
    transformer, vae = full_config(source, "transformer"), full_config(source, "vae")
    scale = vae.scale_factor_spatial  # no weight tells it
    if not isinstance(scale, int) or scale < 1:
        raise WeightsError(
            f"{source.label}: vae/config.json states scale_factor_spatial {scale}. "
            "Give a Wan2.2-Animate checkpoint."
        )
    return geometry_of(transformer, vae)


def geometry_of(transformer: Any, vae: Any) -> Geometry:
    """Sizes of networks with these configs of diffusers."""
    return Geometry(
        size_multiple=int(vae.scale_factor_spatial) * int(transformer.patch_size[-1]),
        face_size=int(transformer.motion_encoder_size),
        inner_dim=int(transformer.num_attention_heads) * int(transformer.attention_head_dim),
        ffn_dim=int(transformer.ffn_dim),
        num_layers=int(transformer.num_layers),
        num_heads=int(transformer.num_attention_heads),
        decoder_channels=int(vae.decoder_base_dim or vae.base_dim),
    )
