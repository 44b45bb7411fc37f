"""Load the networks of a checkpoint, with LoRAs fused into the transformer."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from transformers import AutoTokenizer

from everanimate_cli.assembly import assemble
from everanimate_cli.checkpoint import (
    KINDS,
    build_empty,
    check_checkpoint,
    check_network,
    full_config,
    packed_weights,
    refuse_misfits,
)
from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.library_logs import quiet_libraries
from everanimate_cli.lora import LoraFiles, plan_lora, plan_loras
from everanimate_cli.lora_layers import SeparateLoras, attach_loras, choose_lora_mode
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.offloading import STREAMED, Placing, check_room
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.placement import read_sizes
from everanimate_cli.placement_settings import Placement
from everanimate_cli.records import LoraSpec
from everanimate_cli.settings import Device, Dtype, LoraMode
from everanimate_cli.stored_weights import is_converted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from diffusers import AutoencoderKLWan
    from torch import Tensor, nn
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        UMT5EncoderModel,
    )

    from everanimate_cli.transformer import EverAnimateTransformer3DModel

_Loaded = TypeVar("_Loaded")
_MIB = 2**20


def choose_device(device: Device) -> torch.device:
    """Where the networks run: "auto" takes CUDA, else Apple's MPS, else the CPU.

    Raises:
        SettingsError: If the device asked for is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, is_present in present.items() if is_present))
    if not present[device]:
        known = ", ".join(name for name, is_present in present.items() if is_present)
        raise SettingsError(
            f"--device {device} is not available: torch {torch.__version__} finds {known}. "
            f"Give one of these or auto, or install a torch build for {device}."
        )
    return torch.device(device)


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Number format of the networks: "auto" is bfloat16 on CUDA and float32 elsewhere.

    Never float16 by itself: the released weights were trained in bfloat16, whose range is larger.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    formats = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return formats[dtype]


def load_pipeline(  # noqa: PLR0913  # each says something else about what is loaded
    source: ModelSource,
    loras: Sequence[tuple[LoraSpec, Path]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    with_image_processor: bool = False,
    without: Collection[str] = (),
    lora_mode: LoraMode = "auto",
    placement: Placement | None = None,
    offload_folder: Path | None = None,
) -> AnimatePipeline:
    """Load the networks of a checkpoint with LoRAs in the transformer.

    Everything is checked before the first weight is read.

    Args:
        source: From `hub.locate_model`.
        loras: On top of the transformer, each with its strength.
        device: Where the networks go.
        dtype: Of transformer, text and image encoder, except for the layers that diffusers keeps
            in float32. The VAE is always float32.
        with_image_processor: Also load CLIP's own preprocessing, which pixel memory needs.
        without: "text_encoder", where prompts come from elsewhere; "transformer", where another
            process has it: there is one without weights then, and all others are on the device.
        lora_mode: See `lora_layers.choose_lora_mode`.
        placement: How the networks are stored and where they wait; None for all on the device.
        offload_folder: Takes the blocks' files where they wait on disk.

    Returns:
        Networks in evaluation mode, without gradients.

    Raises:
        WeightsError: As `check_checkpoint`, and if a LoRA does not fit.
        SettingsError: If a package is missing that the placement needs.
        RunError: If the disk has no room for what waits there.

    Source: method page sections 5 and 6.
    """
    check_checkpoint(source)
    shapes = check_network(source, "transformer")
    for _, path in loras:
        plan_lora(path, shapes)
    placement = placement or Placement()
    tokenizer = _load_tokenizer(source) if "text_encoder" not in without else None
    image_processor = load_image_processor(source) if with_image_processor else None
    names = [name for name in KINDS if name != "text_encoder"]
    networks: dict[str, Any] = {
        name: _load_network(source, name, dtype) for name in names if name != "transformer"
    }
    rota = None
    if "transformer" not in without:
        if placement.offload == "disk" and offload_folder is not None:
            stored = read_sizes(source).stored_mib("transformer", placement.precision, dtype)
            streamed = [mib for key, mib in stored.items() if key.split(".")[0] in STREAMED]
            check_room(_MIB * sum(streamed), offload_folder)
        placing = Placing(placement, device, dtype, folder=offload_folder)
        networks["transformer"] = _load_with_loras(source, loras, dtype, lora_mode, placing)
        rota = placing.finish(networks)
    else:
        for network in networks.values():
            network.to(device)
        with quiet_libraries():  # diffusers would keep some layers in float32, if they had weights
            skeleton = copy.deepcopy(build_empty(source, "transformer")).to(dtype)
        networks["transformer"] = skeleton
    text_encoder: Any = None
    if "text_encoder" not in without:
        text_encoder = _load_network(source, "text_encoder", dtype)
        text_encoder.to("cpu" if placement.text_device == "cpu" else device)
    return AnimatePipeline(
        **networks,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        image_processor=image_processor,
        device=device,
        rota=rota,
        tile_decoding=placement.tile_decoding,
    )


def load_shared_transformer(
    source: ModelSource,
    loras: Sequence[tuple[LoraSpec, Path]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    lora_mode: LoraMode = "auto",
    placement: Placement,
) -> EverAnimateTransformer3DModel:
    """Load the velocity network as `load_pipeline` does, for a process that has no other network.

    Args:
        source: From `hub.locate_model`; checked, with the LoRAs.
        loras: As in `load_pipeline`.
        device: Where it computes.
        dtype: As in `load_pipeline`.
        lora_mode: As in `load_pipeline`.
        placement: As in `load_pipeline`; nothing can wait on disk.

    Returns:
        The network in evaluation mode, without gradients.
    """
    if placement.offload == "model":  # there is none to make room for
        placement = replace(placement, offload="none")
    placing = Placing(placement, device, dtype)
    network = _load_with_loras(source, loras, dtype, lora_mode, placing)
    placing.finish({"transformer": network})
    if network.dtype == torch.float32:
        network.merge_padding()  # as a pipeline does
    return network


def load_text_encoder(
    source: ModelSource, device: torch.device, dtype: torch.dtype
) -> tuple[UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Load the text encoder and its tokenizer alone.

    Args:
        source: From `hub.locate_model`; checked by `check_checkpoint`.
        device: Where it goes.
        dtype: As in `load_pipeline`.

    Returns:
        The network in evaluation mode, without gradients, and the tokenizer.

    Raises:
        WeightsError: If one of them cannot be loaded.
    """
    tokenizer = _load_tokenizer(source)
    network = cast("UMT5EncoderModel", _load_network(source, "text_encoder", dtype))
    return network.to(device), tokenizer


def load_transformer(
    source: ModelSource, device: torch.device, dtype: torch.dtype
) -> EverAnimateTransformer3DModel:
    """Load the velocity network alone, for training from a latent cache.

    Args:
        source: From `hub.locate_model`; checked by `check_checkpoint`.
        device: Where it goes.
        dtype: As in `load_pipeline`.

    Returns:
        The network in evaluation mode, without gradients.
    """
    network = cast("EverAnimateTransformer3DModel", _load_network(source, "transformer", dtype))
    if network.dtype == torch.float32:
        network.merge_padding()  # as a pipeline does
    return network.to(device)


def load_vae(source: ModelSource, device: torch.device) -> AutoencoderKLWan:
    """Load the VAE alone, in float32.

    Args:
        source: From `hub.locate_model`; checked by `check_checkpoint`.
        device: Where it goes.

    Returns:
        The network in evaluation mode, without gradients.
    """
    network = cast("AutoencoderKLWan", _load_network(source, "vae", torch.float32))
    return network.to(device)


def load_image_encoder(source: ModelSource, device: torch.device) -> CLIPVisionModel:
    """Load CLIP's vision model alone, in float32.

    Args:
        source: From `hub.locate_model`.
        device: Where it goes.

    Returns:
        The network in evaluation mode, without gradients.

    Raises:
        WeightsError: If it is incomplete or another network.
    """
    check_network(source, "image_encoder")
    network = cast("CLIPVisionModel", _load_network(source, "image_encoder", torch.float32))
    return network.to(device)


def load_image_processor(source: ModelSource) -> CLIPImageProcessor:
    """CLIP's own preprocessing of a checkpoint, on Pillow whatever else is installed.

    With torchvision, transformers would take a variant of slightly different numbers.

    Raises:
        WeightsError: If the checkpoint has none, or a damaged one.
    """
    try:
        from transformers import CLIPImageProcessorPil  # noqa: PLC0415  # see below
    except ImportError:
        # In the first releases of transformers 5 the plain name is the Pillow variant.
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil  # noqa: PLC0415
    if source.layout == "original":
        # It has none, and all CLIP models of its kind share the defaults of the class.
        side = int(full_config(source, "image_encoder").image_size)
        return CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    return _load_part(
        source,
        source.folder / "image_processor",
        lambda folder: CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
    )


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    return cast(
        "PreTrainedTokenizerFast",
        _load_part(
            source,
            source.tokenizer_folder,
            # Left open, the library would ask whether to run code from the checkpoint.
            lambda folder: AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ),
        ),
    )


def _load_with_loras(
    source: ModelSource,
    loras: Sequence[tuple[LoraSpec, Path]],
    dtype: torch.dtype,
    lora_mode: LoraMode,
    placing: Placing,
) -> EverAnimateTransformer3DModel:
    """The transformer with all LoRAs, each block stored and placed before the next is loaded."""
    files = [(path, spec.scale) for spec, path in loras]
    mode = choose_lora_mode(lora_mode, source)
    shapes = check_network(source, "transformer")
    load = partial(assemble, source, "transformer", dtype)
    if packed_weights(source):
        network = load()
        attach_loras(network, files, shapes, dtype)
    elif mode == "separate":
        with SeparateLoras(build_empty(source, "transformer"), files, shapes, dtype) as separate:

            def finish(name: str, part: nn.Module) -> None:
                separate.attach(name, part)
                placing.take(name, part)

            network = load(change=separate.change, finish=finish)
    else:
        found = plan_loras(files, shapes)
        with LoraFiles(files) as opened:

            def fuse(key: str, weight: Tensor) -> Tensor:
                return opened.fuse(found[key], weight) if key in found else weight

            network = load(change=fuse, finish=placing.take)
    return cast("EverAnimateTransformer3DModel", network.requires_grad_(False))


def _load_part(source: ModelSource, folder: Path, load: Callable[[Path], _Loaded]) -> _Loaded:
    """Load what has no weights."""
    try:
        with quiet_libraries():
            return load(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{source.label}: {folder.name} cannot be loaded. "
            f"Give a complete checkpoint in {source.layout} layout."
        ) from error


def _load_network(source: ModelSource, name: str, dtype: torch.dtype) -> nn.Module:
    dtype = torch.float32 if name == "vae" else dtype
    if is_converted(source, name):
        return assemble(source, name, dtype).requires_grad_(False)
    kind = KINDS[name]
    with quiet_libraries():
        network, report = kind.network_class.from_pretrained(
            source.folder / name,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **{kind.dtype_option: dtype},
        )
    # The headers were right, but the library would fill in at random what it does not recognise.
    refuse_misfits(
        source,
        name,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        reshaped=[str(key) for key in report["mismatched_keys"]],
    )
    return cast("nn.Module", network.requires_grad_(False))  # already in evaluation mode
