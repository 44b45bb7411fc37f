"""What a placement takes of the card and of main memory, and which one fits.

The same estimate is printed by `--dry-run` and `doctor`, chooses the preset, and is compared with
measured peaks by the tests and on a card.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import torch

from everanimate_cli.acceleration import check_fp8_matmul
from everanimate_cli.checkpoint import KINDS, check_network, dtype_in_memory, packed_weights
from everanimate_cli.errors import SettingsError
from everanimate_cli.estimates import BLOCK_LINEAR, Geometry, geometry_of, read_geometry
from everanimate_cli.library_logs import quiet_libraries
from everanimate_cli.main_memory import PINNED_PIECE, free_main_memory, pinned_size
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.offloading import STREAMED, check_package
from everanimate_cli.placement_settings import Placement, PlacementOptions, Precision, Tiling

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Shapes = Mapping[str, tuple[int, ...]]

_MIB = 2**20
# Of the released base, where they differ from the defaults of its classes: what diffusers' script
# `convert_wan_to_diffusers.py` and the repositories that it names write into `config.json`.
RELEASED_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {"added_kv_proj_dim": 5120},
    "vae": {},
    "text_encoder": {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
    "image_encoder": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
# Of a weight with its share of a scale.
_PACKED_BITS = {"fp8": 8.0, "fp8-matmul": 8.0, "torchao-fp8": 8.0, "torchao-int8": 8.0, "nf4": 4.5}
# With streams a block computes and the next one arrives.
_NUM_STREAMED = 2
# What a card needs beside the tensors that are counted. Gaps between them, as a factor. And for its
# libraries: 256 MiB of kernels, which are loaded when they are first called; 64 of cuBLAS; and
# three copies of a band of the VAE (`piecewise`) where cuDNN lays it out otherwise. What it lays
# out whole, before sampling down or up, is less than the VAE has there at its peak.
_GAPS, _WORK_SPACE_MIB = 1.03, 512.0
# What a screen, the driver and the context leave of a card.
_FREE_OF_A_CARD = 0.96
# Where plans for a card that is not here place the networks.
ABSENT_CARD = torch.device("cuda")
_LESS = 0.97  # of the memory used, for a preset to be worth another try


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an estimate needs to know of a checkpoint.

    Attributes:
        geometry: Of its networks.
        shapes: Of all weights, by network and name.
        packed: Bytes of those of the transformer that come in fewer bits already, such as GGUF's.
    """

    geometry: Geometry
    shapes: Mapping[str, Shapes]
    packed: Mapping[str, int] = field(default_factory=dict)

    def stored_mib(self, name: str, precision: str, dtype: torch.dtype) -> dict[str, float]:
        """Memory of a network's weights by name."""
        result = {}
        for key, shape in self.shapes[name].items():
            mib = _mib(shape, dtype_in_memory(name, key, dtype))
            if name == "transformer" and key in self.packed:
                mib = self.packed[key] / _MIB
            elif name == "transformer" and _is_packed(key, precision):
                mib = math.prod(shape) * _PACKED_BITS[precision] / 8 / _MIB
            result[key] = mib
        return result


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be computed.

    Attributes:
        height: Pixels.
        width: Pixels.
        frames_per_chunk: F.
        num_identity_slots: K_id.
        dtype: Of the networks.
        num_step_caches: Runs of the transformer in a step that each have a step cache.
    """

    height: int
    width: int
    frames_per_chunk: int
    num_identity_slots: int
    dtype: torch.dtype
    num_step_caches: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory that a placement takes.

    Attributes:
        weights_mib: Of each network as it is stored.
        phases_mib: Most that is on the device while text is encoded, pictures are encoded, a step
            is computed, frames are decoded.
        main_memory_mib: What waits in main memory for its turn; for a card, with what its pieces
            have left over (`main_memory.pinned_size`).
        loading_mib: Most of main memory that loading takes, but for mapped files, which the system
            drops when it needs the memory.
        disk_mib: Files of the blocks.
    """

    weights_mib: dict[str, float]
    phases_mib: dict[str, float]
    main_memory_mib: float
    loading_mib: float
    disk_mib: float

    @property
    def device_mib(self) -> float:
        """Most that is ever on the device."""
        return max(self.phases_mib.values())

    @property
    def needed_mib(self) -> float:
        """What must be free on a card: `device_mib`, work space and gaps."""
        return _GAPS * self.device_mib + _WORK_SPACE_MIB

    def to_json(self) -> dict[str, Any]:
        """As shown by `--dry-run` and `doctor`."""
        return {
            "weights_mib": {name: round(value, 1) for name, value in self.weights_mib.items()},
            "phases_mib": {name: round(value) for name, value in self.phases_mib.items()},
            "estimated_memory_mib": round(self.device_mib),
            "main_memory_mib": round(self.main_memory_mib),
            "loading_mib": round(self.loading_mib),
            "disk_mib": round(self.disk_mib),
        }


def read_sizes(source: ModelSource) -> Sizes:
    """Sizes of a checkpoint, from the headers of its files.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    return Sizes(
        geometry=read_geometry(source),
        shapes={name: check_network(source, name) for name in KINDS},
        packed=packed_weights(source),
    )


@functools.cache
def released_sizes() -> Sizes:
    """Sizes of the released base, without its files."""
    networks = {name: _build_released(name) for name in KINDS}
    return Sizes(
        geometry=geometry_of(networks["transformer"].config, networks["vae"].config),
        shapes={
            name: {key: tuple(value.shape) for key, value in network.named_parameters()}
            for name, network in networks.items()
        },
    )


def _build_released(name: str) -> Any:
    kind, config = KINDS[name], RELEASED_CONFIGS[name]
    with quiet_libraries(), torch.device("meta"):
        if kind.config_class is None:
            return kind.network_class.from_config(config)
        return kind.network_class(kind.config_class.from_dict(config))


# --- estimate ------------------------------------------------------------------------------------


def estimate(sizes: Sizes, placement: Placement, job: Job, *, has_streams: bool = True) -> Estimate:
    """Memory that a placement takes for one chunk after the other.

    The text encoder runs before the other networks are loaded.

    Args:
        sizes: Of the checkpoint.
        placement: Where the networks are.
        job: What they compute.
        has_streams: Whether there is a CUDA card: it has memory of its own, blocks are copied
            while others compute, and what takes most is computed piece by piece.
    """
    stored = {name: sizes.stored_mib(name, placement.precision, job.dtype) for name in sizes.shapes}
    weights = {name: sum(values.values()) for name, values in stored.items()}
    transformer = sizes.shapes["transformer"]
    # A layer's weights in the dtype that it computes in, beside those in 8 bits.
    unpacked = max(
        (
            _mib(shape, job.dtype)
            for key, shape in transformer.items()
            if key in sizes.packed or _is_packed(key, placement.precision)
        ),
        default=0.0,
    )
    streamed = {
        key: mib for key, mib in stored["transformer"].items() if key.split(".")[0] in STREAMED
    }
    streams = placement.offload in ("group", "disk")
    stays = weights["transformer"] - sum(streamed.values())  # with the blocks being streamed
    passing = (_NUM_STREAMED if has_streams and placement.prefetch else 1) * _largest_block_mib(
        streamed
    )

    vae, clip = weights["vae"], weights["image_encoder"]
    # What is there beside the networks of the name.
    beside = {"transformer": 0.0, "vae": 0.0, "image_encoder": 0.0}
    if placement.offload == "none":
        idle_clip = 0.0 if has_streams else clip  # which waits for its turn where there is a card
        beside = {
            "transformer": vae + idle_clip,
            "vae": weights["transformer"] + idle_clip,
            "image_encoder": weights["transformer"] + vae,
        }
    elif streams and not has_streams:
        beside |= {"vae": stays, "image_encoder": stays}
    geometry, size = sizes.geometry, (job.height, job.width)
    chunk = (*size, job.frames_per_chunk, job.num_identity_slots, job.dtype)
    step = geometry.step_mib(*chunk, piecewise=has_streams)
    if job.num_step_caches:
        # An update of each cache, and the tokens before the blocks.
        step += (job.num_step_caches + 1) * geometry.tokens_mib(*chunk)
    encode = geometry.encode_mib(*size, job.frames_per_chunk, piecewise=has_streams)
    decode = geometry.decode_mib(
        *size, job.frames_per_chunk, tiled=placement.tile_decoding, piecewise=has_streams
    )
    phases = {
        "text": weights["text_encoder"] if placement.text_device == "device" else 0.0,
        "encode": max(
            beside["vae"] + vae + encode,
            beside["image_encoder"] + clip,
        ),
        "denoise": beside["transformer"]
        + (stays + passing if streams else weights["transformer"])
        + unpacked
        + step,
        "decode": beside["vae"] + vae + decode,
    }
    rest = {key: mib for key, mib in stored["transformer"].items() if key not in streamed}
    # In the order in which they come to their home.
    homes = {
        "none": [],
        "model": [stored["transformer"], stored["vae"]],
        "group": [streamed, rest if has_streams else {}, stored["vae"]],
        "disk": [rest if has_streams else {}, stored["vae"]],
    }[placement.offload]
    if has_streams or placement.offload != "none":
        homes.append(stored["image_encoder"])
    home_sizes = [round(mib * _MIB) for home in homes for mib in home.values()]
    is_pinned = has_streams and placement.offload != "disk"
    main_memory_mib = (pinned_size(home_sizes) if is_pinned else sum(home_sizes)) / _MIB
    loaded = vae + clip + weights["transformer"]
    passes = 0.0
    # One block after the other is stored as it stays, and leaves if it waits elsewhere.
    leaves = placement.offload == "disk" or (placement.offload == "none" and has_streams)
    if leaves:
        loaded -= sum(streamed.values())
    if leaves or placement.precision != "full":
        full = sizes.stored_mib("transformer", "full", job.dtype)
        passes = _largest_block_mib({key: full[key] for key in streamed})
    if is_pinned and placement.offload != "none":
        # The newest piece is there before the weights that it is for have left their place.
        loaded += main_memory_mib - sum(home_sizes) / _MIB
        passes = max(passes, PINNED_PIECE / _MIB)
    return Estimate(
        weights_mib=weights,
        phases_mib=phases,
        main_memory_mib=main_memory_mib,
        loading_mib=max(loaded + passes, weights["text_encoder"]),
        disk_mib=sum(streamed.values()) if placement.offload == "disk" else 0.0,
    )


def _is_packed(key: str, precision: str) -> bool:
    """Whether `store_blocks` stores a weight of the transformer in fewer bits."""
    if precision == "full" or not BLOCK_LINEAR.fullmatch(key):
        return False
    return precision == "fp8" or key.endswith(".weight")  # only diffusers stores the biases too


def _mib(shape: Iterable[int], dtype: torch.dtype) -> float:
    return math.prod(shape) * dtype.itemsize / _MIB


def _largest_block_mib(streamed: Mapping[str, float]) -> float:
    """Of the blocks and face adapters, by what their weights take."""
    totals: dict[tuple[str, ...], float] = {}
    for key, mib in streamed.items():
        block = tuple(key.split(".")[:2])
        totals[block] = totals.get(block, 0.0) + mib
    return max(totals.values(), default=0.0)


# --- choose --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and what that takes.

    Attributes:
        placement: Where the networks go.
        estimate: Memory.
        fits: Whether the card's free memory is enough, as estimated; True without a card.
    """

    placement: Placement
    estimate: Estimate
    fits: bool


def choose_placement(
    options: PlacementOptions,
    device_type: str,
    sizes: Sizes,
    job: Job,
    *,
    free_mib: float | None = None,
    free_main_mib: float | None = None,
) -> Choice:
    """The first of the placements left open that fits, else the one that takes least.

    It must fit the card and main memory. Where main memory has no room for waiting blocks even in
    the smallest of them, they wait on disk, unless `--offload` says otherwise.

    Args:
        options: Of the command line.
        device_type: "cuda", "mps" or "cpu".
        sizes: Of the checkpoint.
        job: What is computed.
        free_mib: Of the card; None where there is none.
        free_main_mib: Of main memory; None if unknown.

    Raises:
        SettingsError: If an option has no effect on the device, lacks its package, or does not fit
            the checkpoint.
    """
    if sizes.packed:
        if options.precision not in ("auto", "full"):
            raise SettingsError(
                f"--precision {options.precision} does not fit the transformer's file, whose "
                "weights come in fewer bits already. Leave it out."
            )
        options = replace(options, precision="full")
    choices = []
    for placement in options.candidates(device_type):
        needed = _estimate_on(device_type, sizes, placement, job)
        fits = free_mib is None or needed.needed_mib <= free_mib
        choices.append(Choice(placement=placement, estimate=needed, fits=fits))
    main_mib = math.inf if free_main_mib is None else free_main_mib
    roomy = [choice for choice in choices if choice.estimate.main_memory_mib <= main_mib]
    if options.offload == "auto" and not any(choice.fits for choice in roomy):
        on_disk = [_wait_on_disk(choice, device_type, sizes, job) for choice in choices]
        roomy = [choice for choice in on_disk if choice.estimate.main_memory_mib <= main_mib]
        roomy.sort(key=lambda choice: choice.estimate.disk_mib)  # all of it is read in every step
    chosen = next(
        (choice for choice in roomy or choices if choice.fits),
        min(choices, key=lambda choice: choice.estimate.device_mib),
    )
    check_package(chosen.placement.precision)
    return chosen


def _wait_on_disk(choice: Choice, device_type: str, sizes: Sizes, job: Job) -> Choice:
    """The same with blocks in files instead of main memory."""
    if choice.placement.offload != "group":
        return choice
    placement = replace(choice.placement, offload="disk")
    needed = _estimate_on(device_type, sizes, placement, job)
    return replace(choice, placement=placement, estimate=needed)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run uses this machine's memory.

    Attributes:
        options: Of the command line.
        device: Where the networks compute.
        sizes: Of the checkpoint.
        job: What is computed.
        choice: What follows from them and from what is free.
    """

    options: PlacementOptions
    device: torch.device
    sizes: Sizes
    job: Job
    choice: Choice

    @property
    def placement(self) -> Placement:
        """Where the networks go."""
        return self.choice.placement

    @property
    def text_device(self) -> torch.device:
        """Where the text encoder runs."""
        return torch.device("cpu") if self.placement.text_device == "cpu" else self.device

    def notes(self) -> list[str]:
        """What is worth a line before the networks are loaded."""
        if self.placement.preset is None:
            return []
        lines = [self.placement.describe()]
        if not self.choice.fits:
            lines.append(
                f"the card may be too small: {self.choice.estimate.needed_mib:.0f} MiB are needed, "
                "as estimated, and less are free"
            )
        return lines

    def describe_shortage(self, num_finished: int) -> str:
        """What to do after running out of memory, see `describe_shortage`."""
        return describe_shortage(
            self.options,
            self.placement,
            self.sizes,
            self.job,
            device_type=self.device.type,
            num_finished=num_finished,
        )


def plan_for_machine(
    options: PlacementOptions,
    device: torch.device,
    sizes: Sizes,
    job: Job,
    *,
    begun: Mapping[str, object] | None = None,
    num_sharing: int = 1,
) -> Plan:
    """`choose_placement` with what is free on this machine now.

    Args:
        options: Of the command line.
        device: Where the networks compute.
        sizes: Of the checkpoint.
        job: What is computed.
        begun: Request of a run that may be continued, see `continued`.
        num_sharing: Processes of the run on this machine, each with a card of its own. Weights
            wait in the main memory of each.

    Raises:
        SettingsError: As `choose_placement`, and if the device cannot multiply as asked for.
    """
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    free_main_bytes = free_main_memory()
    choice = choose_placement(
        continued(options, begun or {}),
        device.type,
        sizes,
        job,
        free_mib=None if free_bytes is None else free_bytes / _MIB,
        free_main_mib=None if free_main_bytes is None else free_main_bytes / _MIB / num_sharing,
    )
    if choice.placement.precision == "fp8-matmul":
        check_fp8_matmul(device, job.dtype)
    return Plan(options=options, device=device, sizes=sizes, job=job, choice=choice)


def plan_for_absent_card(options: PlacementOptions, sizes: Sizes, job: Job) -> Plan:
    """`choose_placement` for the card that `--vram` names, where there is none to look at.

    Main memory is taken to be enough.

    Args:
        options: Of the command line, with `vram` other than "auto".
        sizes: Of the checkpoint.
        job: What is computed.

    Raises:
        SettingsError: As `choose_placement`.
    """
    free_mib = _FREE_OF_A_CARD * 1024 * int(options.vram)
    choice = choose_placement(options, "cuda", sizes, job, free_mib=free_mib)
    return Plan(options=options, device=ABSENT_CARD, sizes=sizes, job=job, choice=choice)


def _estimate_on(device_type: str, sizes: Sizes, placement: Placement, job: Job) -> Estimate:
    return estimate(sizes, placement, job, has_streams=device_type == "cuda")


def next_lower(
    options: PlacementOptions, current: Placement, sizes: Sizes, job: Job
) -> Placement | None:
    """The largest preset that takes less of a card than the current placement does.

    Args:
        options: Of the run. What they fix stays, but for the preset and what waits where: those
            were too much.
        current: What did not fit.
        sizes: Of the checkpoint.
        job: What is computed.
    """
    used_mib = estimate(sizes, current, job).device_mib
    for candidate in replace(options, vram="auto", offload="auto").candidates("cuda"):
        if estimate(sizes, candidate, job).device_mib < _LESS * used_mib:
            return candidate
    return None


def describe_shortage(
    options: PlacementOptions,
    current: Placement,
    sizes: Sizes,
    job: Job,
    *,
    device_type: str,
    num_finished: int,
) -> str:
    """What to do after running out of memory, in one line.

    Args:
        options: Of the command line.
        current: What did not fit.
        sizes: Of the checkpoint.
        job: What is computed.
        device_type: Whose memory it is.
        num_finished: Chunks that are kept. With any, only what changes no pixel goes on with them.
    """
    needed = _estimate_on(device_type, sizes, current, job).needed_mib
    start = f"out of memory with {current.describe()}, estimated at {needed:.0f} MiB."
    smaller = f"a --size below {job.width}x{job.height}, or fewer --frames-per-chunk"
    if num_finished:
        kept = "1 chunk is kept" if num_finished == 1 else f"{num_finished} chunks are kept"
        fixed = continued(options, pixel_options(current))
        way = _ways_out(fixed, current, sizes, job, device_type)
        if way is not None:
            return f"{start} {kept}. Run the same command with {way} to go on."
        start += f" {kept}, but what takes less makes other pixels."
        smaller += ", with --no-resume to start again"
    way = _ways_out(options, current, sizes, job, device_type)
    if way is None:
        return f"{start} Give {smaller}."
    return f"{start} Run the same command with {way}, or give {smaller}."


def _ways_out(
    options: PlacementOptions, current: Placement, sizes: Sizes, job: Job, device_type: str
) -> str | None:
    """Options with which less memory is taken, as they are written."""
    if device_type == "cuda":
        lower = next_lower(options, current, sizes, job)
        if lower is None:
            return None
        # What the command line fixed was too much, and `--vram` would not change it.
        said = "" if options.offload == "auto" else f" --offload {lower.offload}"
        return f"--vram {lower.preset}{said}"
    if current.offload != "disk":
        return "--offload disk"
    return "--precision fp8" if options.precision == "auto" else None


def pixel_options(placement: Placement) -> dict[str, object]:
    """The choices that change pixels, as the options are written; they are part of a request."""
    return {
        "precision": placement.precision,
        "vae_tiling": "on" if placement.tile_decoding else "off",
    }


def continued(options: PlacementOptions, begun: Mapping[str, object]) -> PlacementOptions:
    """Options for a run that was begun: what changes pixels stays as it was if left open.

    Args:
        options: Of the command line.
        begun: Request of the run, with "precision" and "vae_tiling".
    """
    known = {"precision": get_args(Precision), "vae_tiling": get_args(Tiling)}
    changes: dict[str, Any] = {
        name: begun[name]
        for name, values in known.items()
        if getattr(options, name) == "auto" and begun.get(name) in values
    }
    return replace(options, **changes)
