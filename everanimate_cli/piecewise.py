"""What a card computes piece by piece, so that less of it lies there at a time.

Blocks of the transformer: norms, feed-forward layers and sums part of the tokens at a time, which
know nothing of one another there. Norms and convolutions of the VAE: band by band of the picture,
for the latter with the rows next to it. Results are the same up to rounding, since kernels for
other sizes add in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from diffusers.models.transformers.transformer_wan_animate import WanTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel

# Large enough for a card to be as fast as with all at once, also where weights are unpacked for
# each piece; small enough for attention, which takes all tokens at once, to take more.
PIECE_TOKENS = 16384
_TOKEN_WIDTH = 5120
BAND_BYTES = 2**26
_TABLE_AXES = 3


class PiecewiseBlock(WanTransformerBlock):
    """A block that keeps full-size tensors in the network's dtype only, and no wider ones.

    Not where gradients are wanted, and not in compiled code, which keeps none anyway.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
    ) -> Tensor:
        """[B, N, inner] to [B, N, inner], see diffusers' class."""
        num_tokens = hidden_states.shape[1]
        if _is_whole() or num_tokens <= PIECE_TOKENS or temb.ndim != _TABLE_AXES:
            whole: Tensor = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
            return whole
        pieces = list(_cut(num_tokens, PIECE_TOKENS))
        table = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table

        normed = torch.empty_like(hidden_states)
        for piece in pieces:
            normed[:, piece] = self.norm1(hidden_states[:, piece].float()) * (1 + scale) + shift
        update = self.attn1(normed, None, None, rotary_emb)
        result = normed  # whose content is not needed any longer
        for piece in pieces:
            result[:, piece] = hidden_states[:, piece].float() + update[:, piece] * gate
        del update

        normed = torch.empty_like(result)
        for piece in pieces:
            normed[:, piece] = self.norm2(result[:, piece].float())
        result += self.attn2(normed, encoder_hidden_states, None, None)
        del normed

        for piece in pieces:
            tokens = result[:, piece]
            normed = self.norm3(tokens.float()) * (1 + ffn_scale) + ffn_shift
            update = self.ffn(normed.type_as(tokens))
            result[:, piece] = tokens.float() + update.float() * ffn_gate
        return result


class PiecewiseNorm(nn.RMSNorm):
    """A norm of queries and keys, which older kernels compute in several copies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to the same shape."""
        if _is_whole():
            return super().forward(x)
        rows = x.flatten(0, -2)
        result = None
        for piece in _cut(len(rows), max(1, PIECE_TOKENS * _TOKEN_WIDTH // x.shape[-1])):
            normed = super().forward(rows[piece])
            if result is None:
                result = torch.empty_like(rows, dtype=normed.dtype)
            result[piece] = normed
        assert result is not None
        return result.view(x.shape)


class BandedNorm(WanRMS_norm):
    """A norm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, S, H, W] or [B, C, H, W] to the same shape, see diffusers' class."""
        num_rows = x.shape[-2]
        rows_at_once = _count_rows(x)
        if rows_at_once >= num_rows or not self.channel_first:
            whole: Tensor = super().forward(x)
            return whole
        result = torch.empty_like(x)
        for rows in _cut(num_rows, rows_at_once):
            result[..., rows, :] = super().forward(x[..., rows, :])
        return result


class BandedConv3d(WanCausalConv3d):
    """A causal convolution that joins and pads its input band by band.

    diffusers copies all of it twice, each copy half as large again as the input.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """[B, C, S, H, W] to [B, C', S', H', W'], see diffusers' class."""
        num_rows, rows_at_once = x.shape[3], _count_rows(x)
        if rows_at_once >= num_rows or self.stride[1] != 1:
            whole: Tensor = super().forward(x, cache_x)
            return whole
        left, right, top, bottom, front, _ = self._padding
        kept = None if front == 0 else cache_x
        front -= 0 if kept is None else kept.shape[2]
        reach = self.kernel_size[1] - 1  # rows that a band reads beyond its own
        num_out = num_rows + top + bottom - reach
        result = None
        for rows in _cut(num_out, rows_at_once):
            first, last = rows.start - top, rows.stop - top + reach
            inside = slice(max(first, 0), min(last, num_rows))
            band = x[:, :, :, inside]
            if kept is not None:
                band = torch.cat([kept[:, :, :, inside], band], dim=2)
            margins = (left, right, inside.start - first, last - inside.stop, front, 0)
            band = self._conv_forward(pad(band, margins), self.weight, self.bias)
            if result is None:
                is_last = band.is_contiguous(memory_format=torch.channels_last_3d)
                result = torch.empty(
                    (*band.shape[:3], num_out, band.shape[4]),
                    dtype=band.dtype,
                    device=band.device,
                    memory_format=torch.channels_last_3d if is_last else torch.contiguous_format,
                )
            result[:, :, :, rows] = band
        assert result is not None
        return result


def compute_blocks_piecewise(network: WanAnimateTransformer3DModel) -> None:
    """Let the blocks of a network compute piece by piece; to be called before they get hooks."""
    for block in network.blocks:
        if type(block) is WanTransformerBlock:
            block.__class__ = PiecewiseBlock
    for part in (network.blocks, network.face_adapter):
        for module in part.modules():
            if type(module) is nn.RMSNorm:
                module.__class__ = PiecewiseNorm


def work_in_bands(vae: AutoencoderKLWan) -> None:
    """Let the norms and causal convolutions of a VAE work band by band."""
    for module in vae.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = BandedConv3d
        elif type(module) is WanRMS_norm:
            module.__class__ = BandedNorm


def _is_whole() -> bool:
    """Whether tokens are computed all at once: compiled, or with gradients."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _count_rows(x: Tensor) -> int:
    """How many rows of a picture [..., H, W] make a band."""
    return max(1, BAND_BYTES * x.shape[-2] // (x.numel() * x.element_size()))


def _cut(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
