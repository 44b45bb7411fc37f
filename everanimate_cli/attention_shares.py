"""`everanimate analyze attention`: how much target tokens look at identity and motion memory.

The measuring network is the network: hooks read what goes into self attention and compute the same
weights beside it, in float32 and a few queries at a time, so that no [N, N] matrix ever exists.

Source: method page section 4, Finding 2.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from everanimate_cli import checkpoint, estimates, hub, weights
from everanimate_cli.analyze import write_record, write_table
from everanimate_cli.analyze_settings import ATTENTION_FILES, AttentionSettings, motion_slots
from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.events import ChunkDone, ChunkStarted, Note, OnEvent, StepDone
from everanimate_cli.figures import dress, hide_frames, new_figure, save_figure, whole_ticks
from everanimate_cli.inputs import (
    build_rollout,
    check_media,
    choose_size,
    draw_anchors,
    encode_texts,
    extract_driving,
    open_inputs,
    open_motion,
)
from everanimate_cli.offloading import offload_folder
from everanimate_cli.pipeline import peak_memory_mib
from everanimate_cli.placement import Job, plan_for_machine, read_sizes
from everanimate_cli.records import CommandResult, counted
from everanimate_cli.rollout import Step
from everanimate_cli.schedule import shifted_sigmas
from everanimate_cli.settings import TEMPORAL_STRIDE, ResolvedSettings, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from diffusers.models.transformers.transformer_wan_animate import WanAttention
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from numpy.typing import NDArray

    from everanimate_cli.rollout import Chunk, Rollout
    from everanimate_cli.transformer import EverAnimateTransformer3DModel

    Frames = NDArray[np.uint8]
    Values = NDArray[np.float64]

GROUPS = ("identity", "motion", "target")
# Attention weights that exist at one time: 44 queries of the 37,440 tokens and 40 heads of the
# released model at 832x480.
_WEIGHTS_BYTES = 256 * 2**20

_COLOURS = {"identity": "#1f4e8c", "motion": "#d9822b", "target": "#5a8f5a"}
_NAMES = {
    "identity": "identity memory",
    "motion": "motion memory",
    "target": "other target slots",
}
_MAX_SHEET_COLUMNS = 8
_MAX_SHEET_CHUNKS = 3


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens are what.

    Attributes:
        num_identity_slots: K_id.
        num_motion_slots: K_mo, the first of the target slots.
        num_target_slots: T.
        rows: Tokens of a slot from top to bottom.
        columns: Tokens of a slot from left to right.
    """

    num_identity_slots: int
    num_motion_slots: int
    num_target_slots: int
    rows: int
    columns: int

    @property
    def num_slots(self) -> int:
        """L."""
        return self.num_identity_slots + self.num_target_slots

    @property
    def tokens_per_slot(self) -> int:
        """Tokens of one latent frame."""
        return self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_slots * self.tokens_per_slot

    def slots(self, group: str) -> slice:
        """The slots of a group, of all L."""
        first_new = self.num_identity_slots + self.num_motion_slots
        return {
            "identity": slice(0, self.num_identity_slots),
            "motion": slice(self.num_identity_slots, first_new),
            "target": slice(first_new, self.num_slots),
        }[group]

    @property
    def uniform_shares(self) -> list[float]:
        """Share of each of `GROUPS` if all tokens were looked at alike."""
        return [len(range(self.num_slots)[self.slots(group)]) / self.num_slots for group in GROUPS]


@dataclass(frozen=True, kw_only=True)
class BlockShares:
    """Self attention of one block in one call of the network, as shares of 1.

    Attributes:
        by_head: [heads, 3] given to each of `GROUPS` by the tokens of the target slots after the
            motion memory. Those of the motion slots are left out: all tokens look at their own
            frame most, and theirs would count as looking at motion memory.
        by_slot: [T, L] given by each target slot to each slot, mean over heads.
        from_cells: [T, rows, columns] given to identity memory by each target token, mean over
            heads.
        to_cells: [K_id, rows, columns] of the attention in `by_head`, the part that each token of
            identity memory gets, mean over heads.
    """

    by_head: Values
    by_slot: Values
    from_cells: Values
    to_cells: Values


def attention_weights(
    query: Tensor, key: Tensor, *, max_bytes: int = _WEIGHTS_BYTES
) -> Iterator[tuple[int, Tensor]]:
    """Softmax weights of attention, exact, a few queries at a time.

    Args:
        query: [heads, Q, d].
        key: [heads, N, d].
        max_bytes: Most memory for the weights of one piece; one query is always done.

    Yields:
        (position of the first query, [heads, n, N] float32 weights), in order.
    """
    num_heads, num_keys, width = key.shape
    num_queries = max(1, max_bytes // (4 * num_heads * num_keys))
    keys = key.float().transpose(1, 2) / math.sqrt(width)
    for first in range(0, query.shape[1], num_queries):
        logits = query[:, first : first + num_queries].float() @ keys
        yield first, logits.softmax(dim=-1)


def measure_block(
    query: Tensor, key: Tensor, layout: Layout, *, max_bytes: int = _WEIGHTS_BYTES
) -> BlockShares:
    """Sum up the attention of the target tokens.

    Args:
        query: [heads, T * rows * columns, d] of the target slots, rotated.
        key: [heads, N, d] of all slots, rotated.
        layout: Of the tokens.
        max_bytes: See `attention_weights`.
    """
    cells = layout.tokens_per_slot
    num_identity = layout.num_identity_slots * cells
    num_motion = layout.num_motion_slots * cells
    slot_shares = query.new_empty(
        (query.shape[0], query.shape[1], layout.num_slots), dtype=torch.float32
    )
    received = query.new_zeros(num_identity, dtype=torch.float32)
    for first, piece in attention_weights(query, key, max_bytes=max_bytes):
        last = first + piece.shape[1]
        slot_shares[:, first:last] = piece.unflatten(2, (layout.num_slots, cells)).sum(3)
        counted = piece[:, max(0, num_motion - first) :, :num_identity]
        received += counted.sum((0, 1))
    shares = slot_shares.unflatten(1, (layout.num_target_slots, cells))
    by_slot = shares.mean(2)  # [heads, T, L]
    grid = (layout.rows, layout.columns)
    new_slots = by_slot[:, layout.num_motion_slots :]
    groups = [new_slots[..., layout.slots(group)].sum(2).mean(1) for group in GROUPS]
    from_cells = shares[..., layout.slots("identity")].sum(3).mean(0).unflatten(1, grid)
    num_counted = query.shape[0] * (query.shape[1] - num_motion)
    to_cells = (received / num_counted).unflatten(0, (-1, *grid))
    return BlockShares(
        by_head=_to_numpy(torch.stack(groups, dim=1)),
        by_slot=_to_numpy(by_slot.mean(0)),
        from_cells=_to_numpy(from_cells),
        to_cells=_to_numpy(to_cells),
    )


def _to_numpy(values: Tensor) -> Values:
    # Only here in float64, which Apple's devices do not have.
    return values.cpu().double().numpy()


def rotated_query_key(
    attention: WanAttention, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Query and key of a block's self attention, as its processor makes them.

    Args:
        attention: `attn1` of a block.
        hidden_states: [1, N, inner] what goes into it.
        rotary: Cosines and sines [1, N, 1, d], each number twice in a row.

    Returns:
        Both [heads, N, d], in the network's dtype.

    Source: diffusers' `WanAttnProcessor`, whose rotation stands inside its call.
    """
    cosines, sines = rotary[0][..., 0::2], rotary[1][..., 1::2]

    def rotate(tokens: Tensor) -> Tensor:
        even, odd = tokens.unflatten(2, (attention.heads, -1)).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1)
        return turned.flatten(-2).to(tokens.dtype)[0].transpose(0, 1)

    query = attention.norm_q(attention.to_q(hidden_states))
    key = attention.norm_k(attention.to_k(hidden_states))
    return rotate(query), rotate(key)


class AttentionMeter:
    """Measures every self attention of a network for as long as `with` lasts.

    The network computes what it always does: the hooks only read.
    """

    def __init__(self, transformer: EverAnimateTransformer3DModel, layout: Layout) -> None:
        """Take the network and how its tokens are laid out."""
        self._transformer = transformer
        self._layout = layout
        self._measured: list[BlockShares] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        """Put the hooks in place."""
        for block in self._transformer.blocks:
            hook = block.attn1.register_forward_pre_hook(self._measure)
            self._hooks.callback(hook.remove)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the hooks away."""
        self._hooks.close()

    def take(self) -> list[BlockShares]:
        """What was measured since the last time, a block after the other."""
        measured, self._measured = self._measured, []
        return measured

    @torch.no_grad()
    def _measure(self, attention: WanAttention, given: tuple[Any, ...]) -> None:
        hidden_states, _, _, rotary = given
        query, key = rotated_query_key(attention, hidden_states, rotary)
        first_target = self._layout.num_identity_slots * self._layout.tokens_per_slot
        self._measured.append(measure_block(query[:, first_target:], key, self._layout))


@dataclass(kw_only=True)
class ChunkShares:
    """Self attention of the network over one chunk.

    Attributes:
        by_head: [steps, blocks, heads, 3], see `BlockShares`; and so the others.
        by_slot: [T, L], mean over steps and blocks.
        from_cells: [T, rows, columns], mean over steps and blocks.
        to_cells: [K_id, rows, columns], mean over steps and blocks.
        frames_u8: [T, H, W, 3] a decoded frame of each target slot; kept for some chunks.
        identity_u8: [K_id, H, W, 3] the pictures in identity memory; likewise.
    """

    by_head: Values
    by_slot: Values
    from_cells: Values
    to_cells: Values
    frames_u8: Frames | None = None
    identity_u8: Frames | None = None

    @classmethod
    def average(cls, steps: Sequence[Sequence[BlockShares]]) -> Self:
        """Put the calls of a chunk together: one list of blocks for each step."""

        def mean(name: str) -> Values:
            total = sum(getattr(block, name) for blocks in steps for block in blocks)
            return np.asarray(total / (len(steps) * len(steps[0])), np.float64)

        return cls(
            by_head=np.stack([np.stack([block.by_head for block in blocks]) for blocks in steps]),
            by_slot=mean("by_slot"),
            from_cells=mean("from_cells"),
            to_cells=mean("to_cells"),
        )


@dataclass(kw_only=True)
class AttentionShares:
    """Self attention of the network over a video.

    Attributes:
        layout: Of the tokens.
        sigmas: [steps] noise level of each step.
        chunks: In order.
    """

    layout: Layout
    sigmas: list[float]
    chunks: list[ChunkShares] = field(default_factory=list)

    @property
    def shares(self) -> Values:
        """[chunks, steps, blocks, 3] given to each of `GROUPS`, mean over heads."""
        return np.stack([chunk.by_head.mean(2) for chunk in self.chunks])

    def to_json(self) -> dict[str, Any]:
        """The figures, rounded to 6 digits; uniform attention beside them."""
        shares = self.shares
        by_head = np.stack([chunk.by_head for chunk in self.chunks])

        def by_group(values: Values) -> dict[str, Any]:
            return {
                group: values[..., index].round(6).tolist() for index, group in enumerate(GROUPS)
            }

        return {
            "tokens": self.layout.num_tokens,
            "tokens_per_slot": self.layout.tokens_per_slot,
            "slots": dict(
                zip(
                    GROUPS,
                    (
                        self.layout.num_identity_slots,
                        self.layout.num_motion_slots,
                        self.layout.num_target_slots - self.layout.num_motion_slots,
                    ),
                    strict=True,
                )
            ),
            "sigmas": [round(sigma, 6) for sigma in self.sigmas],
            "uniform_share": by_group(np.asarray(self.layout.uniform_shares)),
            "share": by_group(shares.mean((0, 1, 2))),
            "share_by_chunk": by_group(shares.mean((1, 2))),
            "share_by_step": by_group(shares.mean((0, 2))),
            "share_by_block": by_group(shares.mean((0, 1))),
            "share_by_block_and_head": by_group(by_head.mean((0, 1))),
            "share_by_slot": np.mean([chunk.by_slot for chunk in self.chunks], axis=0)
            .round(6)
            .tolist(),
        }

    def rows(self) -> list[dict[str, object]]:
        """One for each chunk, step, block and group."""
        uniform = self.layout.uniform_shares
        return [
            {
                "chunk": chunk_index,
                "step": step_index,
                "sigma": f"{self.sigmas[step_index]:.6f}",
                "block": block_index,
                "group": group,
                "share": f"{heads[:, index].mean():.6f}",
                "uniform_share": f"{uniform[index]:.6f}",
                "over_uniform": f"{heads[:, index].mean() / uniform[index]:.4f}",
                "lowest_head": f"{heads[:, index].min():.6f}",
                "highest_head": f"{heads[:, index].max():.6f}",
            }
            for chunk_index, chunk in enumerate(self.chunks)
            for step_index, blocks in enumerate(chunk.by_head)
            for block_index, heads in enumerate(blocks)
            for index, group in enumerate(GROUPS)
        ]


# --- the work ------------------------------------------------------------------------------------


def analyze_attention(settings: AttentionSettings, on_event: OnEvent) -> CommandResult:
    """Run the chunk loop as `animate` does and measure all self attention on the way.

    Args:
        settings: Checked options.
        on_event: Told of every chunk and step, and of what is worth a line.

    Returns:
        The folder with table, record and pictures; with `settings.dry_run` the plan alone.

    Raises:
        EverAnimateError: If an input, option or checkpoint cannot be used; nothing is written then.
        OSError: If the disk is full.
    """
    asked = settings.to_animate()
    media = check_media(asked)
    download = not settings.dry_run
    source = hub.locate_model(settings.model, on_event, download=download)
    resolved = resolve(asked, source.defaults)
    loras = [(spec, hub.locate_lora(spec, on_event, download=download)) for spec in resolved.lora]
    device = weights.choose_device(resolved.device)
    dtype = weights.choose_dtype(resolved.dtype, device)
    checkpoint.check_checkpoint(source, [path for _, path in loras])
    geometry = estimates.read_geometry(source)
    height, width = choose_size(resolved, media.picture_u8, source.defaults, geometry.size_multiple)
    output = settings.output or settings.default_output
    with ExitStack() as stack:
        size, face_size = (height, width), geometry.face_size
        inputs, _, plan = open_motion(resolved, media, size, face_size, stack, on_event)
        anchors = draw_anchors(resolved, plan)
        layout = Layout(
            num_identity_slots=resolved.identity_slots,
            num_motion_slots=motion_slots(resolved.memory, resolved.overlap),
            num_target_slots=(plan.frames_per_chunk - 1) // TEMPORAL_STRIDE + 1,
            rows=height // geometry.size_multiple,
            columns=width // geometry.size_multiple,
        )
        facts: dict[str, Any] = {
            "frames": plan.num_frames,
            "fps": resolved.fps,
            "size": f"{width}x{height}",
            "chunks": plan.num_chunks,
            "steps": resolved.steps,
            "blocks": geometry.num_layers,
            "tokens": layout.num_tokens,
            "memory": resolved.memory,
            "model": source.name,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
        }
        if settings.dry_run:
            return CommandResult(output=output, facts=facts)
        if inputs is None:
            resolved, media = extract_driving(
                resolved, media, source, (height, width), geometry.face_size, on_event
            )
            size, face_size = (height, width), geometry.face_size
            inputs = open_inputs(resolved, media, size, face_size, stack, on_event)
        job = Job(
            height=height,
            width=width,
            frames_per_chunk=plan.frames_per_chunk,
            num_identity_slots=resolved.identity_slots,
            dtype=dtype,
        )
        memory = plan_for_machine(resolved.placement_options, device, read_sizes(source), job)
        prompts = encode_texts(resolved, source, memory.text_device, dtype, on_event)
        folder = None
        if memory.placement.offload == "disk":
            folder = stack.enter_context(offload_folder(output.parent))
        pipeline = weights.load_pipeline(
            source,
            loras,
            device,
            dtype,
            with_image_processor=resolved.memory == "pixel",
            without=["text_encoder"],
            placement=memory.placement,
            offload_folder=folder,
        )
        rollout = build_rollout(resolved, pipeline, inputs, plan, anchors, prompts)
        on_event(Note(text=_describe(facts, layout)))
        measured = _measure_rollout(rollout, plan, resolved, layout, on_event)
        hashes = inputs.hashes
    results = measured.to_json()
    facts |= {name: results[name] for name in ("share", "uniform_share")}
    output.mkdir(exist_ok=True)
    title = f"{source.name}: {settings.ref.name}, {settings.driving.name}"
    table, plot, sheet, record_path = (output / name for name in ATTENTION_FILES)
    write_table(table, measured.rows())
    plot_shares(plot, measured, title)
    plot_heat_maps(sheet, measured, title)
    record = {
        "model_revision": source.revision,
        "model_sha256": checkpoint.checkpoint_hash(source),
        "inputs_sha256": hashes,
        **facts,
    }
    write_record(record_path, settings, record, results)
    for group in GROUPS:
        share, uniform = results["share"][group], results["uniform_share"][group]
        text = f"{_NAMES[group]}: {share:.1%} of the attention, {share / uniform:.2f} of uniform"
        on_event(Note(text=text))
    return CommandResult(output=output, facts=facts)


def _describe(facts: dict[str, Any], layout: Layout) -> str:
    return (
        f"{counted(facts['frames'], 'frame')} of {facts['size']} in "
        f"{counted(facts['chunks'], 'chunk')} of {counted(facts['steps'], 'step')}, "
        f"{layout.num_tokens} tokens in {layout.num_slots} slots, "
        f"{facts['model']} on {facts['device']} in {facts['dtype']}"
    )


def _measure_rollout(
    rollout: Rollout,
    plan: ChunkPlan,
    settings: ResolvedSettings,
    layout: Layout,
    on_event: OnEvent,
) -> AttentionShares:
    """Run all chunks under the meter."""
    sigmas = shifted_sigmas(settings.steps, settings.shift)[:-1].tolist()
    measured = AttentionShares(layout=layout, sigmas=sigmas)
    shown = _spread(plan.num_chunks, _MAX_SHEET_CHUNKS)
    drawn_u8: Frames | None = None
    steps: list[list[BlockShares]] = []

    def announce(chunk_index: int) -> None:
        event = ChunkStarted(
            chunk_index=chunk_index, num_chunks=plan.num_chunks, num_steps=settings.steps
        )
        on_event(event)

    started_s = time.monotonic()
    announce(0)
    with AttentionMeter(rollout.pipeline.transformer, layout) as meter:
        for made in rollout.run():
            if isinstance(made, Step):
                steps.append(meter.take())
                on_event(StepDone(step_index=made.step_index))
                continue
            chunk = ChunkShares.average(steps)
            steps = []
            if made.chunk_index in shown:
                chunk.frames_u8 = _frames_of_slots(made)
                chunk.identity_u8 = _identity_pictures(rollout, drawn_u8)
            measured.chunks.append(chunk)
            if made.chunk_index == 0 and rollout.anchor_frame_indices:
                drawn_u8 = made.frames_u8[list(rollout.anchor_frame_indices)]
            now_s = time.monotonic()
            on_event(
                ChunkDone(
                    chunk_index=made.chunk_index,
                    num_frames=len(plan.kept_frames(made.chunk_index)),
                    seconds=now_s - started_s,
                    peak_memory_mib=peak_memory_mib(rollout.pipeline.device),
                )
            )
            started_s = now_s
            if made.chunk_index + 1 < plan.num_chunks:
                announce(made.chunk_index + 1)
    return measured


def _spread(count: int, most: int) -> list[int]:
    """At most so many positions of 0 .. count - 1, evenly, the first and the last among them."""
    return sorted({round(float(place)) for place in np.linspace(0, count - 1, min(count, most))})


def _frames_of_slots(chunk: Chunk) -> Frames:
    """A decoded frame in the middle of each target slot, [T, H, W, 3]."""
    num_slots = chunk.latents.shape[2]
    middles = [max(0, TEMPORAL_STRIDE * slot - TEMPORAL_STRIDE // 2) for slot in range(num_slots)]
    return chunk.frames_u8[middles]


def _identity_pictures(rollout: Rollout, drawn_u8: Frames | None) -> Frames:
    """What is in the identity slots of a chunk, in their order."""
    pictures = list(rollout.views_u8)
    num_drawn = rollout.num_identity_slots - len(pictures) - 1
    pictures += [rollout.reference_u8] * num_drawn if drawn_u8 is None else list(drawn_u8)
    return np.stack([*pictures, rollout.reference_u8])


# --- pictures ------------------------------------------------------------------------------------


def plot_shares(path: Path, measured: AttentionShares, title: str) -> None:
    """Draw the shares over blocks, steps, chunks and slots.

    Args:
        path: PNG file, written whole or not at all.
        measured: At least one chunk.
        title: What was measured.

    Raises:
        OSError: If the disk is full.
    """
    figure = new_figure(15, 8, f"Self attention of target tokens\n{title}")
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    _draw_maps(upper, measured)
    shares, uniform = measured.shares, measured.layout.uniform_shares
    curves = (
        ("block", shares.mean((0, 1))),
        ("step (noise falls from left to right)", shares.mean((0, 2))),
        ("chunk", shares.mean((1, 2))),
    )
    axes_row = lower.subplots(1, 3, sharey=True)
    by_head = np.mean([chunk.by_head[..., 0] for chunk in measured.chunks], axis=(0, 1))
    axes_row[0].fill_between(
        range(len(by_head)),
        by_head.min(1),
        by_head.max(1),
        color=_COLOURS["identity"],
        alpha=0.15,
        linewidth=0,
        label="identity memory, lowest to highest head",
    )
    for axes, (label, values) in zip(axes_row, curves, strict=True):
        for index, group in enumerate(GROUPS):
            style = {"color": _COLOURS[group], "label": _NAMES[group]}
            axes.plot(range(len(values)), values[:, index], "o-", markersize=4, **style)
            axes.axhline(uniform[index], color=_COLOURS[group], linestyle=":", linewidth=1.2)
        axes.axhline(-1, color="#555555", linestyle=":", label="if all tokens were looked at alike")
        axes.set(xlabel=label, xlim=(-0.4, len(values) - 0.6), ylim=(0, None))
        whole_ticks(axes.xaxis)
        dress(axes)
    axes_row[0].set_ylabel("share of the attention")
    lower.legend(
        *axes_row[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9
    )
    save_figure(path, figure)


def _draw_maps(figure: SubFigure, measured: AttentionShares) -> None:
    """Blocks over steps for each group, as multiples of uniform attention, and slots over slots."""
    layout = measured.layout
    over_uniform = measured.shares.mean(0) / layout.uniform_shares  # [steps, blocks, 3]
    by_slot = np.mean([chunk.by_slot for chunk in measured.chunks], axis=0) * layout.num_slots
    span = max(1.0, float(np.abs(np.log2(over_uniform)).max()))
    *maps, slots = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    image = None
    for axes, index, group in zip(maps, range(len(GROUPS)), GROUPS, strict=True):
        image = axes.imshow(
            np.log2(over_uniform[..., index]).T,
            cmap="RdBu_r",
            vmin=-span,
            vmax=span,
            aspect="auto",
            origin="lower",
        )
        axes.set_title(f"to {_NAMES[group]}", fontsize=10)
        axes.set(xlabel="step")
        whole_ticks(axes.xaxis, axes.yaxis)
    maps[0].set_ylabel("block")
    assert image is not None
    bar = figure.colorbar(image, ax=maps, pad=0.01, fraction=0.03)
    _powers_of_two(bar, span)
    bar.set_label("times uniform attention")
    slot_span = max(1.0, float(np.abs(np.log2(by_slot)).max()))
    image = slots.imshow(
        np.log2(by_slot), cmap="RdBu_r", vmin=-slot_span, vmax=slot_span, aspect="auto"
    )
    bar = figure.colorbar(image, ax=slots, pad=0.02, fraction=0.05)
    _powers_of_two(bar, slot_span)
    bar.set_label("times uniform attention")
    for edge in (layout.num_identity_slots, layout.num_identity_slots + layout.num_motion_slots):
        slots.axvline(edge - 0.5, color="black", linewidth=1)
    slots.set_title("from each target slot to each slot", fontsize=10)
    slots.set(xlabel="identity | motion | other targets", ylabel="target slot")
    whole_ticks(slots.xaxis, slots.yaxis)


def _powers_of_two(bar: Any, span: float) -> None:
    """Label a bar of logarithms with the numbers themselves."""
    most = math.floor(span)
    ticks = sorted({-most, -math.ceil(most / 2), 0, math.ceil(most / 2), most})
    bar.set_ticks(ticks, labels=[f"{2.0**tick:g}" for tick in ticks])


def plot_heat_maps(path: Path, measured: AttentionShares, title: str) -> None:
    """Draw over the frames how much their tokens look at identity memory, and where it is seen.

    Args:
        path: PNG file, written whole or not at all.
        measured: At least one chunk with pictures.
        title: What was measured.

    Raises:
        OSError: If the disk is full.
    """
    layout = measured.layout
    shown = [index for index, chunk in enumerate(measured.chunks) if chunk.frames_u8 is not None]
    slots = _spread(layout.num_target_slots, _MAX_SHEET_COLUMNS)
    memory = _spread(layout.num_identity_slots, _MAX_SHEET_COLUMNS)
    num_columns = max(len(slots), len(memory))
    cell_height = 1.5 * layout.rows / layout.columns if layout.rows < layout.columns else 1.5
    cell_width = cell_height * layout.columns / layout.rows
    num_rows = 2 * len(shown) + 2
    figure = new_figure(
        cell_width * num_columns + 2.2,
        cell_height * num_rows + 1.2 + 0.25 * num_rows,
        f"Attention to identity memory\n{title}",
    )
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(len(shown), 1))[:, 0]
    pictures = [measured.chunks[index] for index in shown]
    maps = np.stack([chunk.from_cells[slots] for chunk in pictures])
    grid = upper.subplots(2 * len(shown), num_columns, squeeze=False)
    image = None
    for row, (chunk_index, chunk) in enumerate(zip(shown, pictures, strict=True)):
        assert chunk.frames_u8 is not None
        for column, slot in enumerate(slots):
            frame_u8 = chunk.frames_u8[slot]
            plain, overlaid = grid[2 * row][column], grid[2 * row + 1][column]
            plain.imshow(frame_u8)
            is_motion = slot < layout.num_motion_slots
            plain.set_title(f"slot {slot}{' (motion)' if is_motion else ''}", fontsize=8)
            image = _overlay(
                overlaid, frame_u8, maps[row, column], float(maps.min()), float(maps.max())
            )
        _name_row(grid[2 * row][0], f"chunk {chunk_index}")
        _name_row(grid[2 * row + 1][0], "share to\nidentity")
    hide_frames(grid)
    assert image is not None
    bar = upper.colorbar(image, ax=grid, pad=0.01, fraction=0.025, shrink=0.8)
    uniform = layout.uniform_shares[0]
    bar.set_label(f"share given to identity memory\n(uniform: {uniform:.2f})", fontsize=9)
    _draw_memory(lower, pictures[-1], shown[-1], memory, num_columns, layout)
    save_figure(path, figure)


def _draw_memory(
    figure: SubFigure,
    chunk: ChunkShares,
    chunk_index: int,
    memory: Sequence[int],
    num_columns: int,
    layout: Layout,
) -> None:
    """The pictures in identity memory, and which of their places are looked at."""
    assert chunk.identity_u8 is not None
    received = chunk.to_cells[list(memory)] * layout.num_tokens
    grid = figure.subplots(2, num_columns, squeeze=False)
    image = None
    for column, slot in enumerate(memory):
        plain, overlaid = grid[0][column], grid[1][column]
        plain.imshow(chunk.identity_u8[slot])
        plain.set_title(f"identity {slot}", fontsize=8)
        image = _overlay(
            overlaid, chunk.identity_u8[slot], received[column], 0.0, float(received.max())
        )
    _name_row(grid[0][0], f"memory of\nchunk {chunk_index}")
    _name_row(grid[1][0], "looked at")
    hide_frames(grid)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, pad=0.01, fraction=0.025, shrink=0.9)
    bar.set_label("attention that a token gets\n(times uniform)", fontsize=9)


def _overlay(axes: Axes, frame_u8: Frames, cells: Values, low: float, high: float) -> Any:
    """A grey picture with a colour for each of its tokens."""
    height, width = frame_u8.shape[:2]
    axes.imshow(frame_u8.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    return axes.imshow(
        cells,
        cmap="inferno",
        vmin=low,
        vmax=high,
        alpha=0.6,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )


def _name_row(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center", labelpad=10)
