"""How networks are stored in less memory, and how they get to the card in parts.

`place` does what a `Placement` says. Three ways to leave the card free:

- a `Rota` holds whole networks in main memory and lets one of them on the card at a time;
- `stream_blocks` brings the transformer's blocks one after the other, by diffusers' group
  offloading: from main memory, or from files;
- `store_blocks` keeps the blocks' linear layers in 8 or 4 bits.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from everanimate_cli.acceleration import enable_fp8_matmul
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.lora_adapter import store_blocks_as_fp8
from everanimate_cli.placement_settings import PRECISION_PACKAGES
from everanimate_cli.runs import OFFLOAD_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from everanimate_cli.placement_settings import Placement
    from everanimate_cli.transformer import EverAnimateTransformer3DModel

# Children of the transformer whose parts come and go with `stream_blocks`.
STREAMED = ("blocks", "face_adapter")
_GIB = 2**30


class Rota:
    """Networks that share the card: the one that is needed is there, the others wait.

    Their weights stay in main memory all the time, so that leaving the card costs nothing. Results
    are the same to the bit.

    Attributes:
        device: The card.
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device) -> None:
        """Take the networks, which are in main memory."""
        self.device = device
        self._networks = dict(networks)
        self._homes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._on_card: str | None = None

    def bring(self, name: str) -> None:
        """Make sure that a network is on the card and that the others have left it.

        Args:
            name: One that is not of this rota, such as a transformer whose blocks are streamed,
                only needs the others to leave.
        """
        if name == self._on_card:
            return
        self.clear()
        if name not in self._networks:
            return
        network = self._networks[name]
        # Not before: a pipeline may still change the order of a weight's elements in memory.
        if name not in self._homes and not holds_packed_weights(network):
            self._homes[name] = _list_tensors(network)
        if name in self._homes:
            for tensor, home in self._homes[name]:
                # A copy also where main memory is the device, so that this can be measured there.
                tensor.data = home.to(self.device, copy=True)
        else:
            network.to(self.device)
        self._on_card = name

    def clear(self) -> None:
        """Let the network that is on the card leave it."""
        name, self._on_card = self._on_card, None
        if name in self._homes:
            for tensor, home in self._homes[name]:
                tensor.data = home
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
    store_blocks(transformer, placement.precision, device)
    others = {name: each for name, each in networks.items() if name != "transformer"}
    if placement.offload == "none":
        for network in networks.values():
            network.to(device)
        return None
    if placement.offload == "model":
        return Rota(networks, device)
    if placement.offload == "disk":
        assert folder is not None, "files need a folder"
        _check_room(transformer, folder)
    stream_blocks(
        transformer,
        device,
        folder=folder if placement.offload == "disk" else None,
        prefetch=placement.prefetch,
    )
    return Rota(others, device)


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
        SettingsError: If the package is not installed.
    """
    check_package(precision)
    if precision == "fp8":
        store_blocks_as_fp8(network)
    elif precision == "fp8-matmul":
        enable_fp8_matmul(network, device)
    elif precision in ("torchao-fp8", "torchao-int8"):
        _store_by_torchao(network, precision, device)
    elif precision == "nf4":
        _store_as_nf4(network, device)


def _store_by_torchao(
    network: EverAnimateTransformer3DModel, precision: str, device: torch.device
) -> None:
    quantization = importlib.import_module("torchao.quantization")
    config = {
        "torchao-fp8": "Float8WeightOnlyConfig",
        "torchao-int8": "Int8WeightOnlyConfig",
    }[precision]
    for block in network.blocks:
        # On the card, where it takes seconds; one block at a time.
        block.to(device)
        quantization.quantize_(block, getattr(quantization, config)())
        block.to("cpu")


def _store_as_nf4(network: EverAnimateTransformer3DModel, device: torch.device) -> None:
    bitsandbytes = importlib.import_module("bitsandbytes.nn")
    dtype = network.dtype
    for block in network.blocks:
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
        block.to(device)  # which packs them
        block.to("cpu")


def holds_packed_weights(network: nn.Module) -> bool:
    """Whether any weight is more than a plain tensor of torch.

    So are those of torchao, of bitsandbytes, and from GGUF files.
    """
    modules = (type(value).__module__ for value in network.parameters())
    return not all(module.startswith("torch.") for module in modules)


# --- brought in parts ----------------------------------------------------------------------------


def stream_blocks(
    network: EverAnimateTransformer3DModel,
    device: torch.device,
    *,
    folder: Path | None = None,
    prefetch: bool = True,
) -> None:
    """Bring blocks and face adapters to the device only for as long as they compute.

    All other layers stay on the device: chunks are embedded outside `forward`, where no block is
    called.

    Args:
        network: In main memory; changed in place.
        device: Where it computes.
        folder: Keeps the weights in files instead of main memory; it must be empty.
        prefetch: On a card, copy the next one from pinned memory while this one computes.

    Source: diffusers' group offloading.
    """
    children = dict(network.named_children())
    has_streams = prefetch and device.type == "cuda"
    # diffusers would treat the other children as one more group, which only `forward` brings.
    for name in children.keys() - set(STREAMED):
        delattr(network, name)
    try:
        apply_group_offloading(
            network,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=has_streams,
            record_stream=has_streams,
            low_cpu_mem_usage=has_streams and not _may_pin(network),
            offload_to_disk_path=None if folder is None else str(folder),
        )
    finally:
        for name, child in children.items():  # in their order
            if name in network._modules:
                delattr(network, name)
            setattr(network, name, child)
    for name in children.keys() - set(STREAMED):
        children[name].to(device)


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


def _check_room(network: EverAnimateTransformer3DModel, folder: Path) -> None:
    children = (getattr(network, name) for name in STREAMED)
    needed = sum(_num_bytes(child) for child in children)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"--offload disk needs {needed / _GIB:.1f} GiB in {folder.parent}, where "
            f"{free / _GIB:.1f} GiB are free. Free some space, or give --offload group."
        )


def _may_pin(network: nn.Module) -> bool:
    """Whether main memory has room for all of it pinned, for which sizes are rounded up."""
    free = free_main_memory()
    return free is None or free > 2 * _num_bytes(network)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is short: torch has an exception for it on CUDA only."""
    words = ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def free_main_memory() -> int | None:
    """Bytes of main memory that processes can still take; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _num_bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(network))


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _list_tensors(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(what the network computes with, its data at home) of all weights."""
    return [(tensor, tensor.data) for tensor in _tensors(network)]
