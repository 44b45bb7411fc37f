"""One network over several processes: each holds a part of the tokens of every chunk.

All processes hold all weights. Tokens are shared out after the patch embedding and brought together
before they are put back in place; between the two, only self-attention needs those of the others.
Ulysses trades them for heads and back, so that each process attends from all tokens with a part of
the heads, by any kernel; ring, by diffusers, sends keys and values round. Text and picture are seen
whole by every process.

A face adapter lets the tokens of a latent slot look at the face of that slot, so that a process
needs whole slots there. What it lacks of its first and last slot is filled up with zeros, which
are queries only: they change nothing else and are dropped again. So it talks to nobody. (diffusers
has no plan for this network; with the plan of Wan's, tokens would look at faces of other slots.)

What a process sends in one step, for n processes, N tokens of `inner` numbers and b blocks: with
Ulysses 4 b N inner (n - 1) / n^2 numbers, with ring 2 b N inner (n - 1) / n, and once the velocity
of its tokens.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from everanimate_cli.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import WanAnimateTransformer3DModel
    from diffusers.models.transformers.transformer_wan_animate import WanAttention

    from everanimate_cli.settings import Parallel

SharedAttention = Literal["ulysses", "ring"]

# Ring adds up partial results by the logarithm of the sum of their weights, which torch's own
# choice of a kernel does not tell.
_TORCH_CHOOSES = AttentionBackendName.NATIVE
_KERNEL_FOR_RING = AttentionBackendName._NATIVE_FLASH


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """The tokens of a chunk that one process holds.

    Attributes:
        tokens: Which of all tokens, slot by slot.
        slots: The latent slots that they belong to.
        before: How many tokens of the first of these slots are in another process.
        after: How many of the last.
    """

    tokens: slice
    slots: slice
    before: int
    after: int

    def fill_slots(self, hidden_states: Tensor) -> Tensor:
        """Make whole slots of the tokens of this process with zeros: [B, n, C] -> [B, m, C]."""
        if self.before == self.after == 0:
            return hidden_states
        return pad(hidden_states, (0, 0, self.before, self.after))

    def drop_filling(self, hidden_states: Tensor) -> Tensor:
        """Undo `fill_slots`: [B, m, C] -> [B, n, C]."""
        return hidden_states[:, self.before : hidden_states.shape[1] - self.after]


def share_out(total: int, count: int) -> list[int]:
    """How many of `total` each process gets: the same, but the first ones one more if need be."""
    share, num_longer = divmod(total, count)
    return [share + (rank < num_longer) for rank in range(count)]


def shard_tokens(num_tokens: int, num_slots: int, rank: int, count: int) -> TokenShard:
    """Which tokens a process holds.

    Args:
        num_tokens: N, a multiple of `num_slots`.
        num_slots: L.
        rank: Of the process, from 0.
        count: How many processes there are, at most `num_tokens`.
    """
    lengths = share_out(num_tokens, count)
    first = sum(lengths[:rank])
    end = first + lengths[rank]
    per_slot = num_tokens // num_slots
    slots = slice(first // per_slot, -(-end // per_slot))
    return TokenShard(
        tokens=slice(first, end),
        slots=slots,
        before=first - slots.start * per_slot,
        after=slots.stop * per_slot - end,
    )


class HeadExchange:
    """Trades the tokens of this process with all heads for all tokens with some heads.

    Parts need not be even; nothing is filled up.
    """

    def __init__(self, group: distributed.ProcessGroup, num_heads: int) -> None:
        """Share out the heads.

        Args:
            group: Of the processes.
            num_heads: At least as many as processes.
        """
        self._group = group
        self._rank = distributed.get_rank(group)
        self._heads = share_out(num_heads, distributed.get_world_size(group))
        self._tokens: list[int] = []

    def set_tokens(self, num_tokens: int) -> None:
        """To be told how many tokens a chunk has before the first exchange."""
        self._tokens = share_out(num_tokens, len(self._heads))

    def to_heads(self, values: Tensor) -> Tensor:
        """[B, n, k, heads, d] of this process to [B, N, k, own heads, d]."""
        batch_size, num_own, num_kinds, _, dim = values.shape
        unit = batch_size * num_kinds * dim
        sent = [part.transpose(0, 1).reshape(-1) for part in values.split(self._heads, dim=3)]
        num_heads = self._heads[self._rank]
        received = self._trade(
            sent,
            [num_own * heads * unit for heads in self._heads],
            [tokens * num_heads * unit for tokens in self._tokens],
        )
        return received.view(-1, batch_size, num_kinds, num_heads, dim).transpose(0, 1)

    def to_tokens(self, values: Tensor) -> Tensor:
        """[B, N, own heads, d] to [B, n, heads, d] of this process."""
        batch_size, _, num_heads, dim = values.shape
        unit = batch_size * dim
        num_own = self._tokens[self._rank]
        sizes = [num_own * heads * unit for heads in self._heads]
        received = self._trade(
            [values.transpose(0, 1).reshape(-1)],
            [tokens * num_heads * unit for tokens in self._tokens],
            sizes,
        )
        parts = [
            part.view(num_own, batch_size, heads, dim)
            for part, heads in zip(received.split(sizes), self._heads, strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(0, 1)

    def _trade(self, sent: list[Tensor], sizes: list[int], received_sizes: list[int]) -> Tensor:
        """Numbers in a row, so many for and so many from each process."""
        received = sent[0].new_empty(sum(received_sizes))
        distributed.all_to_all_single(
            received,
            sent[0] if len(sent) == 1 else torch.cat(sent),
            output_split_sizes=received_sizes,
            input_split_sizes=sizes,
            group=self._group,
        )
        return received


class UlyssesAttnProcessor:
    """diffusers' `WanAttnProcessor` for self-attention over several processes."""

    # As on diffusers' processors. The second stays None: the kernel sees whole sequences.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, exchange: HeadExchange, backend: str | None) -> None:
        """Take the kernel of the processor that this one replaces."""
        self._exchange = exchange
        self._attention_backend = backend

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None,  # noqa: ARG002  # blocks pass None for it and for the mask
        attention_mask: None,  # noqa: ARG002
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attend to all tokens from those of this process; [B, n, inner] to [B, n, inner]."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))  # [B, n, heads, d]
        tokens = [_rotate(query, *rotary_emb), _rotate(key, *rotary_emb), value]
        query, key, value = self._exchange.to_heads(torch.stack(tokens, dim=2)).unbind(2)
        result = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        result = self._exchange.to_tokens(result).flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](result))


def _rotate(tokens: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn pairs of channels [B, n, heads, d] by the angles of their positions [1, n, 1, d]."""
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    turned = [first * cosine - second * sine, first * sine + second * cosine]
    return torch.stack(turned, dim=-1).flatten(-2).type_as(tokens)


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """This process among those that compute one network; from `share_tokens`.

    Attributes:
        rank: From 0.
        count: How many there are.
        group: Over which they talk.
        exchange: Of Ulysses, else None.
        ring: What diffusers' attention reads for ring, else None.
    """

    rank: int
    count: int
    group: distributed.ProcessGroup
    exchange: HeadExchange | None
    ring: ContextParallelConfig | None

    def shard(self, num_tokens: int, num_slots: int) -> TokenShard:
        """The tokens of this process; self-attention learns how many the others have."""
        if self.exchange is not None:
            self.exchange.set_tokens(num_tokens)
        if self.ring is not None:
            # The way for uneven parts exchanges their sizes first, in every layer.
            self.ring.ring_anything = num_tokens % self.count != 0
        return shard_tokens(num_tokens, num_slots, self.rank, self.count)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same in each."""
        values = values.clone()
        distributed.all_reduce(values, group=self.group)
        return values

    def gather(self, patches: Tensor, num_tokens: int) -> Tensor:
        """The tokens of all processes from those of each: [B, n, c] -> [B, N, c]."""
        lengths = share_out(num_tokens, self.count)
        filled = pad(patches, (0, 0, 0, lengths[0] - patches.shape[1])).contiguous()
        parts = [torch.empty_like(filled) for _ in lengths]
        distributed.all_gather(parts, filled, group=self.group)
        return torch.cat([part[:, :n] for part, n in zip(parts, lengths, strict=True)], dim=1)


def choose_attention(
    wanted: Parallel,
    *,
    num_heads: int,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> SharedAttention:
    """How the processes share self-attention, or why they cannot.

    Args:
        wanted: `--parallel`; "auto" takes Ulysses, which sends less, unless heads run out.
        num_heads: Of the network.
        count: How many processes compute it, at least 2.
        device: Kind of device.
        dtype: Of the network.
        backend: Kernel of its attention, by diffusers' name.

    Raises:
        SettingsError: If it cannot be done so.
    """
    reason = _why_not_ring(device, dtype, backend)
    if wanted == "ring":
        if reason is not None:
            raise SettingsError(f"--parallel ring {reason}, or --parallel ulysses.")
        return "ring"
    if count <= num_heads:
        return "ulysses"
    if wanted == "auto" and reason is None:
        return "ring"
    mend = "" if reason else ", or give --parallel ring"
    raise SettingsError(
        f"--parallel {wanted}: {count} processes cannot share the {num_heads} heads of the "
        f"network. Start {num_heads} or fewer{mend}."
    )


def _why_not_ring(device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    if device.type != "cuda":
        return "needs CUDA devices. Give --device cuda"
    if dtype == torch.float32:
        return "needs kernels of 16 bits. Give --dtype bfloat16"
    kernel = _kernel_for_ring(backend)
    if not _AttentionBackendRegistry._is_context_parallel_available(kernel):
        return "has no way with these kernels of attention. Give --attention sdpa"
    return None


def _kernel_for_ring(backend: str | None) -> AttentionBackendName:
    kernel = _TORCH_CHOOSES if backend is None else AttentionBackendName(backend)
    return _KERNEL_FOR_RING if kernel == _TORCH_CHOOSES else kernel


def open_mesh(attention: SharedAttention, ranks: Sequence[int], device: torch.device) -> DeviceMesh:
    """The processes that share a network; every process must call it, also one that does not.

    Args:
        attention: From `choose_attention`.
        ranks: Of these processes.
        device: Kind of device.
    """
    ranks = list(ranks)
    shape = [[rank] for rank in ranks] if attention == "ring" else [ranks]
    return DeviceMesh(device.type, shape, mesh_dim_names=("ring", "ulysses"))


def share_tokens(
    transformer: WanAnimateTransformer3DModel,
    attention: SharedAttention,
    mesh: DeviceMesh,
    device: torch.device,
) -> ContextParallel:
    """Make the self-attention of a network one over all processes of a mesh.

    Args:
        transformer: With its attention backend chosen; changed in place.
        attention: From `choose_attention`.
        mesh: From `open_mesh`, with this process in it.
        device: Of this process.

    Returns:
        What the network needs to share out its tokens.
    """
    line = mesh[attention]
    group = line.get_group()
    exchange = ring = None
    if attention == "ulysses":
        exchange = HeadExchange(group, int(transformer.config.num_attention_heads))
        for block in transformer.blocks:
            backend = block.attn1.processor._attention_backend
            block.attn1.set_processor(UlyssesAttnProcessor(exchange, backend))
    else:
        # What diffusers calls for it has a new name in torch.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=attention_dispatch.__name__
        )
        ring = ContextParallelConfig(ring_degree=line.size(), mesh=mesh)
        config = ParallelConfig(context_parallel_config=ring)
        config.setup(distributed.get_rank(), distributed.get_world_size(), device, mesh=mesh)
        # Not by `enable_parallelism`, which would do so to the face adapters too: their batch is
        # made of slots.
        for block in transformer.blocks:
            processor = block.attn1.processor
            processor._attention_backend = _kernel_for_ring(processor._attention_backend)
            processor._parallel_config = config
    return ContextParallel(
        rank=line.get_local_rank(), count=line.size(), group=group, exchange=exchange, ring=ring
    )
