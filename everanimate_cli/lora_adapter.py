"""LoRA in training: adapters on a network by PEFT, and the file that becomes of them."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.errors import SettingsError
from everanimate_cli.lora import LORA_TARGET_PATTERN, load_lora, released_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from everanimate_cli.train_settings import LoraNaming
    from everanimate_cli.transformer import EverAnimateTransformer3DModel

_ADAPTER = "default"


def attach_lora(network: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
    """Put fresh adapters on the blocks' attention and feed-forward layers; the rest is frozen.

    The matrices are float32 whatever the network is. `lora_A` is drawn as PEFT draws it, but from
    a generator of its own; `lora_B` is zero, so that the network computes what it did.

    Args:
        network: A network without adapters; changed in place.
        rank: Of the matrices.
        alpha: The product counts alpha / rank.
        seed: Of the draw.

    Source: method page section 3, "Stages"; parity file `lora_keys.json`.
    """
    network.requires_grad_(False)
    # PEFT annotates alpha as int, but only divides by the rank.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGET_PATTERN)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # It could not merge adapters into torchao's weights, which nobody asks it for.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
        inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in lora_parameters(network).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in key:
            drawn = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' matrices by their diffusers names, such as `blocks.0.ffn.net.2.lora_B.weight`.

    Also of a network that a wrapper for several processes holds.
    """
    marker = f".{_ADAPTER}.weight"
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name and name.endswith(marker):
            key = name.removeprefix("module.").replace("_orig_mod.", "")
            key = key.replace("_checkpoint_wrapped_module.", "")
            found[key.removesuffix(marker) + ".weight"] = parameter
    return found


def read_adapters(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the matrices on the CPU, whole even where several processes hold a part each."""
    return {key: gather(value) for key, value in lora_parameters(network).items()}


def write_adapters(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `read_adapters` gave."""
    for key, parameter in lora_parameters(network).items():
        parameter.data.copy_(scatter_like(tensors[key], parameter.data))


def gather(value: Tensor) -> Tensor:
    """A tensor as a whole on the CPU; every process must call it."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def scatter_like(value: Tensor, like: Tensor) -> Tensor:
    """Place and share a whole tensor as `like` is."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def ignore_frozen_weights(network: nn.Module) -> None:
    """Let DDP neither send nor compare what is the same in all processes and stays so.

    At the start it would send the whole base, in formats that not every channel knows (fp8).
    """
    names = [name for name, value in network.named_parameters() if not value.requires_grad]
    names += [name for name, _ in network.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)


def shard_network(
    network: EverAnimateTransformer3DModel, device: torch.device, *, offload: bool
) -> None:
    """Leave each process a part of every weight (FSDP2); all must call it.

    A block or face adapter is put together for the moments in which it computes. Weights keep
    their own formats, so that float32 adapters sit in bfloat16 blocks.

    Args:
        network: With adapters, on the CPU or the device; changed in place. Its parameters are
            others afterwards.
        device: Where it computes.
        offload: Whether the parts wait in main memory.
    """
    # What leaves a block is a view sometimes; nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    pinned = device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for module in (*network.blocks, *network.face_adapter):
        # Put together anew in the backward pass: after a validation no part may stay whole.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    fully_shard(network, mesh=mesh, offload_policy=policy)
    for name in ("embed_pose", "embed_face"):  # they need weights before `forward` is called
        register_fsdp_forward_method(network, name)


def load_initial_lora(
    network: nn.Module, path: Path, *, label: str, rank: int, alpha: float
) -> None:
    """Start the adapters from a LoRA file of any known naming.

    Args:
        network: With fresh adapters; changed in place.
        path: The file.
        label: How an error calls it.
        rank: Of the adapters.
        alpha: Of the adapters; the file's own strength is kept whatever it is.

    Raises:
        WeightsError: If the file does not fit the network.
        SettingsError: If it has another rank, or layers that training does not touch.
    """
    marker = ".base_layer."
    shapes = {
        name.replace(marker, "."): tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if ".lora_" not in name
    }
    # A packed weight has other sides than its layer.
    for name, layer in network.named_modules():
        key = f"{name}.weight".replace(marker, ".")
        if isinstance(layer, nn.Linear) and key in shapes:
            shapes[key] = (layer.out_features, layer.in_features)
    tensors = load_lora(path, shapes)
    expected = lora_parameters(network)
    foreign = sorted(tensors.keys() - expected.keys())
    if foreign:
        raise SettingsError(
            f"{label} has {len(foreign)} matrices on layers that are not trained "
            f"(first: {foreign[0]}). Give a LoRA of the blocks' attention and feed-forward layers."
        )
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key}
    if ranks != {rank}:
        found = " and ".join(str(each) for each in sorted(ranks))
        raise SettingsError(f"{label} has rank {found}, not {rank}. Give --rank {max(ranks)}.")
    for key, parameter in expected.items():
        value = tensors.get(key)
        if value is None:  # a layer that the file leaves alone: the product stays zero
            continue
        factor = rank / alpha if ".lora_B." in key else 1.0
        parameter.data.copy_(factor * value.float())


def save_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    strength: float,
    naming: LoraNaming,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write a LoRA file that counts at scale 1 in every program, without alpha entries.

    Args:
        path: Written whole or not at all.
        tensors: From `read_adapters`.
        strength: alpha / rank, which is multiplied into `lora_B`.
        naming: "diffusers", or "original" for the names of the released files.
        dtype: Number format of the file.
        metadata: Goes into the header.

    Raises:
        OSError: If the disk is full.
    """
    named = {}
    for key, value in tensors.items():
        scaled = value * strength if ".lora_B." in key else value
        named[key if naming == "diffusers" else released_key(key)] = scaled.to(dtype).contiguous()
    data = save(named, metadata=dict(metadata))
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
