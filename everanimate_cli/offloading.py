"""How networks are stored in less memory, and how they get to the card in parts.

`place` does what a `Placement` says. Three ways to leave the card free:

- a `Rota` holds whole networks in main memory and lets one of them on the card at a time;
- `stream_blocks` brings the transformer's blocks one after the other, from main memory or from
  files;
- `store_blocks` keeps the blocks' linear layers in 8 or 4 bits.

`Placing` does the same block by block while a transformer is being loaded.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from everanimate_cli.acceleration import check_fp8_matmul, multiply_in_fp8
from everanimate_cli.block_stream import BlockStream
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.main_memory import PinnedMemory
from everanimate_cli.narrow_linear import store_as_fp8
from everanimate_cli.piecewise import compute_blocks_piecewise
from everanimate_cli.placement_settings import PRECISION_PACKAGES
from everanimate_cli.runs import OFFLOAD_PREFIX
from everanimate_cli.waiting import WaitingWeights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from everanimate_cli.placement_settings import Placement
    from everanimate_cli.transformer import EverAnimateTransformer3DModel

# Children of the transformer whose parts come and go with `stream_blocks`.
STREAMED = ("blocks", "face_adapter")
_TORCHAO_CONFIGS = {
    "torchao-fp8": "Float8WeightOnlyConfig",
    "torchao-int8": "Int8WeightOnlyConfig",
}
_GIB = 2**30


class Rota:
    """Networks that share the card: the one that is needed is there, the others wait.

    Their weights stay in main memory all the time, so that leaving the card costs nothing. Results
    are the same to the bit.

    Attributes:
        device: The card.
        may_overlap: Whether all others than its networks are on the card all the time, and may
            compute in another thread meanwhile.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        *,
        stream: BlockStream | None = None,
        pinned: PinnedMemory | None = None,
        may_overlap: bool = False,
    ) -> None:
        """Take the networks, which are in main memory.

        Args:
            networks: By their names in a checkpoint.
            device: The card.
            stream: Of the blocks of the transformer, of which the other layers are "transformer".
            pinned: Where they wait; None for memory as it is.
            may_overlap: See above.
        """
        self.device = device
        self.may_overlap = may_overlap
        self._networks = dict(networks)
        self._waiting: dict[str, WaitingWeights] = {}
        self._on_card: str | None = None
        self._stream = stream
        self._pinned = pinned

    def notes(self) -> list[str]:
        """What is worth a line about how they wait."""
        # It is not where one network comes for one picture in a chunk.
        pinned = None if self.may_overlap else self._pinned
        reason = None if pinned is None else pinned.reason
        return [] if reason is None else [reason]

    def bring(self, name: str) -> None:
        """Make sure that a network is on the card and that the others have left it.

        Args:
            name: One that is not of this rota only needs the others to leave, or nothing at all
                where it is on the card.
        """
        if name == self._on_card or (self.may_overlap and name not in self._networks):
            return
        self.clear()
        if name not in self._networks:
            return
        if self._stream is not None and name != "transformer":
            self._stream.clear()
        if not self.settle(name):
            self._networks[name].to(self.device)
        else:
            self._waiting[name].bring(self.device)
        self._on_card = name

    def settle(self, name: str) -> bool:
        """Let a network's home be where its weights are now, or in pinned memory.

        Not before it is complete: a pipeline may still change the order of a weight's elements.

        Returns:
            Whether it has a home. Weights that are more than tensors have none: they are moved.
        """
        network = self._networks[name]
        if name not in self._waiting and _can_wait(network):
            self._waiting[name] = WaitingWeights(network)
            if self._pinned is not None:
                self._waiting[name].pin(self._pinned)
        return name in self._waiting

    def clear(self) -> None:
        """Let the network that is on the card leave it."""
        name, self._on_card = self._on_card, None
        if name in self._waiting:
            self._waiting[name].recall()
        elif name is not None:
            self._networks[name].to("cpu")


def place(
    networks: Mapping[str, nn.Module],
    placement: Placement,
    device: torch.device,
    *,
    folder: Path | None = None,
) -> Rota | None:
    """Store the networks as a placement says, and bring to the device what stays there.

    Args:
        networks: By their names in a checkpoint, in main memory, LoRAs already fused.
        placement: What to do.
        device: Where they compute.
        folder: Empty; takes the blocks' files with `offload` "disk".

    Returns:
        Who shares the card; None where all stay on it.

    Raises:
        SettingsError: If a package is missing that `precision` needs.
        RunError: If the disk has no room for the blocks.
    """
    transformer: Any = networks["transformer"]
    if placement.offload == "disk":
        assert folder is not None, "files need a folder"
        parts = [getattr(transformer, name) for name in STREAMED]
        check_room(sum(_num_bytes(part) for part in parts), folder)
    return Placing(placement, device, transformer.dtype, folder=folder).finish(networks)


class Placing:
    """Stores and places a transformer's parts one by one, as soon as each of them is loaded.

    Neither main memory nor the card ever holds more than one block in another form than its last.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        dtype: torch.dtype,
        *,
        folder: Path | None = None,
    ) -> None:
        """Refuse what cannot be done; see `place`.

        Args:
            placement: What to do.
            device: Where the networks compute.
            dtype: Of the transformer.
            folder: Empty; takes the blocks' files with `offload` "disk".

        Raises:
            SettingsError: If a package is missing that `precision` needs, or the device cannot
                multiply as it says.
        """
        check_precision(placement.precision, device, dtype)
        self._placement = placement
        self._device = device
        self._dtype = dtype
        self._folder = folder
        # Waiting blocks must be moved as they are there: nothing to pin where nothing is copied.
        is_copied = device.type == "cuda" and placement.offload != "disk"
        self._pinned = PinnedMemory() if is_copied else None
        self._waiting: dict[str, WaitingWeights] = {}
        self._taken: set[str] = set()

    def take(self, name: str, part: nn.Module) -> None:
        """Store a block or face adapter as it is to stay, and put it in its place.

        Args:
            name: In the transformer, such as "blocks.0".
            part: In main memory, with its LoRAs.

        Raises:
            RunError: If a file cannot be written.
        """
        offload = self._placement.offload
        home = self._device if offload == "none" else torch.device("cpu")
        if name.startswith("blocks."):
            store_block(part, self._placement.precision, self._device, self._dtype)
        part.to(home)
        self._taken.add(name)
        if offload not in ("group", "disk"):
            return
        waiting = self._waiting[name] = WaitingWeights(part)
        if offload == "disk":
            assert self._folder is not None, "files need a folder"
            try:
                waiting.move_to_file(self._folder / f"{name}.safetensors")
            except OSError as error:
                raise RunError(
                    f"--offload disk cannot write to {self._folder.parent}: {error}. "
                    "Give --offload group, or an --output on another disk."
                ) from error
        elif self._pinned is not None:
            waiting.pin(self._pinned)

    def finish(self, networks: Mapping[str, nn.Module]) -> Rota | None:
        """Place all else, with the parts of the transformer that were not taken yet.

        Args:
            networks: As in `place`.

        Returns:
            As `place`.
        """
        transformer: Any = networks["transformer"]
        for name, part in _streamed_parts(transformer).items():
            if name not in self._taken:
                self.take(name, part)
        if self._device.type == "cuda":
            compute_blocks_piecewise(transformer)
        offload = self._placement.offload
        others = {name: each for name, each in networks.items() if name != "transformer"}
        if offload == "none":
            guests = {}
            if self._device.type == "cuda" and "image_encoder" in networks:
                # Needed for one picture in a chunk.
                guests["image_encoder"] = networks["image_encoder"]
            for name, network in networks.items():
                if name not in guests:
                    network.to(self._device)
            if not guests:
                return None
            return Rota(guests, self._device, pinned=self._pinned, may_overlap=True)
        if offload == "model":
            rota = Rota(networks, self._device, pinned=self._pinned)
            rota.settle("transformer")  # nothing changes it any longer
            return rota
        prefetch = self._placement.prefetch and self._device.type == "cuda"
        stream = stream_blocks(transformer, self._device, waiting=self._waiting, prefetch=prefetch)
        rest = resident_layers(transformer)
        leaves = self._device.type == "cuda" and bool(others)  # for networks that need its place
        if leaves:
            others["transformer"] = rest
        else:
            rest.to(self._device)
        rota = Rota(others, self._device, stream=stream, pinned=self._pinned)
        if leaves:
            rota.settle("transformer")
        return rota


# --- stored in fewer bits ------------------------------------------------------------------------


def check_package(precision: str, given: str | None = None) -> None:
    """Refuse a precision whose package is not installed.

    Args:
        precision: As in `store_blocks`.
        given: The option that asked for it, with its value; None for `--precision`.

    Raises:
        SettingsError: Telling how to install it.
    """
    package, remedy = PRECISION_PACKAGES.get(precision, (None, None))
    if package is not None and find_spec(package) is None:
        given = given or f"--precision {precision}"
        raise SettingsError(
            f"{given} needs the package {package}, which is not installed. "
            f"Install it with '{remedy}', or give {given.partition(' ')[0]} fp8."
        )


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a precision that this machine cannot store or compute in.

    Raises:
        SettingsError: Telling what is missing.
    """
    check_package(precision)
    if precision == "fp8-matmul":
        check_fp8_matmul(device, dtype)


def store_blocks(
    network: EverAnimateTransformer3DModel, precision: str, device: torch.device
) -> None:
    """Store the linear layers of the blocks in fewer bits; they compute in the network's dtype.

    Except for "fp8-matmul", which multiplies in fp8.

    Norms, tables and all that diffusers keeps in float32 stay as they are, and so do the layers
    outside the blocks.

    Args:
        network: Loaded, LoRAs already fused; changed in place.
        precision: "full" changes nothing.
        device: Where packed weights are made.

    Raises:
        SettingsError: If the package is not installed, or the device cannot multiply so.
    """
    check_precision(precision, device, network.dtype)
    for block in network.blocks:
        store_block(block, precision, device, network.dtype)
        if precision not in ("full", "fp8"):
            block.to("cpu")


def store_block(block: nn.Module, precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """As `store_blocks`, one block, which is on the device then if that is where it is packed.

    Args:
        block: In main memory; changed in place.
        precision: "full" changes nothing.
        device: Where packed weights are made, in seconds.
        dtype: In which it computes.
    """
    if precision == "fp8":
        store_as_fp8(block)
    elif precision == "fp8-matmul":
        block.to(device)
        multiply_in_fp8(block)
    elif precision in _TORCHAO_CONFIGS:
        quantization = importlib.import_module("torchao.quantization")
        block.to(device)
        # Left on, it would change the compiler's settings of the whole process.
        config = getattr(quantization, _TORCHAO_CONFIGS[precision])(set_inductor_config=False)
        quantization.quantize_(block, config)
    elif precision == "nf4":
        _store_as_nf4(block, dtype)
        block.to(device)  # which packs them


def _store_as_nf4(block: nn.Module, dtype: torch.dtype) -> None:
    bitsandbytes = importlib.import_module("bitsandbytes.nn")
    for name, layer in list(block.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        packed = bitsandbytes.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4"
        )
        packed.bias = layer.bias
        # Packed once more for a CPU's inference, weights have no gradient any longer, and
        # widths have to be multiples of 32 and 64.
        packed.support_avx512bf16_for_cpu = False
        parent, _, own_name = name.rpartition(".")
        setattr(block.get_submodule(parent), own_name, packed)


def _can_wait(network: nn.Module) -> bool:
    """Whether all weights are one tensor each, or say themselves which tensors they are made of.

    Those of torchao do; those of bitsandbytes are more, and are moved.
    """
    return all(
        # diffusers' own are those of GGUF files.
        type(value).__module__.startswith(("torch.", "diffusers."))
        or is_traceable_wrapper_subclass(value)
        for value in network.parameters()
    )


# --- brought in parts ----------------------------------------------------------------------------


def stream_blocks(
    network: EverAnimateTransformer3DModel,
    device: torch.device,
    *,
    waiting: Mapping[str, WaitingWeights] | None = None,
    prefetch: bool = False,
) -> BlockStream:
    """Bring blocks and face adapters to the device only for as long as they compute.

    All other layers must be there: chunks are embedded outside `forward`, where no block is called.

    Args:
        network: Its blocks are in main memory; changed in place.
        device: Where it computes.
        waiting: The weights of its parts, by their names, as far as they have a home already.
        prefetch: On a card, copy the next one while this one computes.
    """
    parts = _streamed_parts(network)
    waiting = waiting or {}
    every = network.config.inject_face_latents_blocks
    order = []
    for index in range(len(network.blocks)):
        order.append(f"blocks.{index}")
        if index % every == 0:
            order.append(f"face_adapter.{index // every}")
    return BlockStream(
        [(parts[name], waiting.get(name) or WaitingWeights(parts[name])) for name in order],
        device,
        prefetch=prefetch,
    )


def _streamed_parts(network: EverAnimateTransformer3DModel) -> dict[str, nn.Module]:
    """Blocks and face adapters by their names."""
    return {
        f"{name}.{index}": part
        for name in STREAMED
        for index, part in enumerate(getattr(network, name))
    }


def resident_layers(network: EverAnimateTransformer3DModel) -> nn.Module:
    """All that is in no block and no face adapter, the very same modules and parameters."""
    resident = nn.Module()
    for name, child in network.named_children():
        if name not in STREAMED:
            resident.add_module(name, child)
    for name, parameter in network.named_parameters(recurse=False):
        resident.register_parameter(name, parameter)
    for name, buffer in network.named_buffers(recurse=False):
        resident.register_buffer(name, buffer)
    return resident


@contextmanager
def offload_folder(parent: Path) -> Iterator[Path]:
    """A folder for the blocks' files, deleted afterwards.

    Args:
        parent: Where; that of a run clears away what a killed process has left.
    """
    folder = Path(tempfile.mkdtemp(prefix=OFFLOAD_PREFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_room(num_bytes: float, folder: Path) -> None:
    """Refuse a folder for the blocks' files that has no room for them.

    Raises:
        RunError: Telling how much is free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunError(
            f"--offload disk needs {num_bytes / _GIB:.1f} GiB in {folder.parent}, where "
            f"{free / _GIB:.1f} GiB are free. Free some space, or give --offload group."
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is short.

    torch's exception for it comes from its own allocator of CUDA memory alone.
    """
    words = (
        "CUDA error: out of memory",  # of the driver, for kernels and handles
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory",
        "DefaultCPUAllocator: can't allocate memory",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _num_bytes(network: nn.Module) -> int:
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
