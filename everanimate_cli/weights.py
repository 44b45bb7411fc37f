"""Check a checkpoint and its LoRAs by their headers, and load them.

What can be refused is refused before any weight is read: names and shapes come from the headers
of the safetensors files and are compared with networks built on the meta device. Pickles are
never opened and no code from a checkpoint is run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import (
    StrictDataclassError,
)
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.hashes import add_samples
from everanimate_cli.lora import LORA_TARGET_PATTERN, fuse_lora, plan_lora
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.records import LoraSpec
from everanimate_cli.safetensors_header import read_tensor_shapes
from everanimate_cli.settings import (
    TEMPORAL_STRIDE,
    Device,
    Dtype,
    ModelDefaults,
)
from everanimate_cli.train_settings import Checkpointing
from everanimate_cli.transformer import EverAnimateTransformer3DModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn
    from transformers import CLIPImageProcessor

_NUM_LISTED = 3  # names that an error message lists before it counts the rest
# What `lora_adapter.store_blocks_as_fp8` stores so.
_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(?!.*norm).+\.(weight|bias)")
_MIB = 2**20

_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What one network of a checkpoint must be.

    Attributes:
        network_class: What it is loaded as.
        described_as: Class names that its `config.json` may carry.
        stem: Name of its weight files.
        may_be_extra: Names of tensors that a file may hold beyond the network's.
        dtype_option: How its library calls the dtype to load in.
        config_class: Turns `config.json` into what the class is built from; None for diffusers.
    """

    network_class: Any
    described_as: tuple[str, ...]
    stem: str = "diffusion_pytorch_model"
    may_be_extra: str = r"(?!)"
    dtype_option: str = "torch_dtype"
    config_class: Any = None


_KINDS = {
    "transformer": _Kind(
        network_class=EverAnimateTransformer3DModel,
        described_as=("WanAnimateTransformer3DModel", "EverAnimateTransformer3DModel"),
        may_be_extra=r"norm_added_q\.",  # in the original code too nothing uses it
    ),
    "vae": _Kind(network_class=AutoencoderKLWan, described_as=("AutoencoderKLWan",)),
    "text_encoder": _Kind(
        network_class=UMT5EncoderModel,
        described_as=("UMT5EncoderModel",),
        stem="model",
        dtype_option="dtype",
        config_class=UMT5Config,
    ),
    "image_encoder": _Kind(
        network_class=CLIPVisionModel,
        described_as=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        stem="model",
        may_be_extra=r"^visual_projection\.|\.position_ids$",
        dtype_option="dtype",
        config_class=CLIPVisionConfig,
    ),
}
NETWORKS = tuple(_KINDS)  # folders of a checkpoint
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint that is on this machine.

    Attributes:
        folder: In diffusers layout.
        defaults: What the model was trained for.
        name: As given with `--model`.
        revision: Commit on the Hub; None for a folder and the embedded model.
    """

    folder: Path
    defaults: ModelDefaults
    name: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a checkpoint's networks that a plan needs before they are loaded.

    Attributes:
        size_multiple: What width and height of a video must be multiples of, in pixels.
        face_size: Side of the face crops, in pixels.
        inner_dim: Channels of a token in the transformer.
        ffn_dim: Channels inside its feed-forward layers.
        num_layers: Blocks of the transformer.
        decoder_channels: Of the VAE at full resolution.
    """

    size_multiple: int
    face_size: int
    inner_dim: int
    ffn_dim: int
    num_layers: int
    decoder_channels: int

    def working_set_mib(
        self,
        height: int,
        width: int,
        *,
        frames_per_chunk: int,
        num_identity_slots: int,
        dtype: torch.dtype,
    ) -> float:
        """Most memory in MiB that one chunk takes beside the weights, estimated."""
        return max(
            self.step_mib(height, width, frames_per_chunk, num_identity_slots, dtype),
            self.decode_mib(height, width, frames_per_chunk),
        )

    def step_mib(
        self,
        height: int,
        width: int,
        frames_per_chunk: int,
        num_identity_slots: int,
        dtype: torch.dtype,
    ) -> float:
        """Memory in MiB of one call of the transformer beside its weights, estimated.

        The factor 3.3 is the peak of live tensors in that call per token and channel, counted
        with fake tensors on the full-size network in bfloat16 from 480p to 720p; 2.9 in float32.
        """
        num_tokens = self._count_tokens(height, width, frames_per_chunk, num_identity_slots)
        return 3.3 * num_tokens * (self.inner_dim + self.ffn_dim) * dtype.itemsize / _MIB

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
        num_tokens = self._count_tokens(height, width, frames_per_chunk, num_identity_slots)
        unit = num_tokens * (self.inner_dim + self.ffn_dim) / _MIB
        kept, computed = (18, 26) if autocast else (25, 31)
        left = 1.2 * num_tokens * self.inner_dim * dtype.itemsize / _MIB
        needed = {
            "off": (kept * self.num_layers + computed - kept) * unit,
            "on": computed * unit + left * self.num_layers,
            "offload": computed * unit,
        }
        return needed[checkpointing]

    def _count_tokens(
        self, height: int, width: int, frames_per_chunk: int, num_identity_slots: int
    ) -> int:
        num_slots = num_identity_slots + (frames_per_chunk - 1) // TEMPORAL_STRIDE + 1
        return num_slots * (height // self.size_multiple) * (width // self.size_multiple)

    def decode_mib(self, height: int, width: int, frames_per_chunk: int) -> float:
        """Memory in MiB of decoding a chunk in float32, which is above encoding it; estimated.

        One latent frame is decoded at a time. The factor 51 is the peak of live tensors, counted
        as in `step_mib`, in units of one picture with the decoder's last channels.
        """
        picture_bytes = height * width * self.decoder_channels * 4
        video_bytes = frames_per_chunk * height * width * 3 * 4
        return (51 * picture_bytes + video_bytes) / _MIB


# --- check ---------------------------------------------------------------------------------------


def check_checkpoint(source: ModelSource, loras: Sequence[Path] = ()) -> None:
    """Refuse a checkpoint that is incomplete or holds other networks, without reading a weight.

    Args:
        source: From `hub.locate_model`.
        loras: LoRA files that are to go on top.

    Raises:
        WeightsError: If a folder, file or weight is missing, a weight is unknown or of another
            shape than `config.json` says, a file is damaged or a pickle, the networks belong to
            different models, or a LoRA does not fit.
    """
    shapes = {name: _check_network(source, name) for name in _KINDS}
    _check_tokenizer(f"--model {source.name}", source.folder)
    _check_fit(source)
    for path in loras:
        plan_lora(path, shapes["transformer"])


def count_parameters(source: ModelSource) -> dict[str, int]:
    """Number of parameters by network, from the headers of the weight files.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    return {name: sum(map(math.prod, _check_network(source, name).values())) for name in _KINDS}


def weights_mib(
    source: ModelSource, dtype: torch.dtype, *, quantize: bool = False
) -> dict[str, float]:
    """Memory in MiB of the weights by network once they are loaded, from the headers alone.

    Args:
        source: From `hub.locate_model`.
        dtype: As in `load_pipeline`.
        quantize: Whether the blocks' linear layers are stored in 8 bits.

    Raises:
        WeightsError: As `check_checkpoint`.
    """

    def itemsize(name: str, key: str) -> int:
        if quantize and name == "transformer" and _BLOCK_LINEAR.fullmatch(key):
            return 1
        return _dtype_in_memory(name, key, dtype).itemsize

    return {
        name: sum(
            math.prod(shape) * itemsize(name, key)
            for key, shape in _check_network(source, name).items()
        )
        / _MIB
        for name in _KINDS
    }


def lora_mib(source: ModelSource, rank: int) -> float:
    """Memory in MiB that a LoRA takes in training: itself, its gradient and AdamW's two averages.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    shapes = _check_network(source, "transformer").items()
    target = re.compile(rf"{LORA_TARGET_PATTERN}\.weight")
    sides = sum(sum(shape) for key, shape in shapes if target.fullmatch(key))
    return 4 * torch.float32.itemsize * rank * sides / _MIB


def read_geometry(source: ModelSource) -> Geometry:
    """Sizes of the networks, from their `config.json`.

    Raises:
        WeightsError: If a config is missing or describes another network.
    """
    transformer, vae = _full_config(source, "transformer"), _full_config(source, "vae")
    return Geometry(
        size_multiple=int(vae.scale_factor_spatial) * int(transformer.patch_size[-1]),
        face_size=int(transformer.motion_encoder_size),
        inner_dim=int(transformer.num_attention_heads) * int(transformer.attention_head_dim),
        ffn_dim=int(transformer.ffn_dim),
        num_layers=int(transformer.num_layers),
        decoder_channels=int(vae.decoder_base_dim or vae.base_dim),
    )


def checkpoint_hash(source: ModelSource) -> str:
    """Fingerprint of a checkpoint that costs milliseconds whatever its size.

    It covers the names of all files that are loaded and samples of each, among them the header.
    Training changes nearly every weight and is seen.

    Returns:
        64 hexadecimal digits; the folder's place does not matter.
    """
    label = f"--model {source.name}"
    paths = [path for name in _KINDS for path in _weight_files(label, source.folder, name)]
    paths += [source.folder / name / "config.json" for name in _KINDS]
    paths += _tokenizer_files(source.folder)
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(source.folder).as_posix()} ".encode())
        add_samples(digest, path)
    return digest.hexdigest()


def check_files(label: str, folder: Path) -> None:
    """Refuse a folder in which a file is missing.

    Args:
        label: How an error calls the checkpoint.
        folder: In diffusers layout.

    Raises:
        WeightsError: Naming the network and the files.
    """
    for name in _KINDS:
        _weight_files(label, folder, name)
        _read_config(label, folder, name)
    _check_tokenizer(label, folder)


def _check_network(source: ModelSource, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's weights by their name, once they are found to be complete."""
    label = f"--model {source.name}"
    expected = {
        _one_name(key): tuple(tensor.shape)
        for key, tensor in _build_empty(source, name).state_dict().items()
    }
    found: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(label, source.folder, name):
        found |= {_one_name(key): shape for key, shape in read_tensor_shapes(path).items()}
    _refuse_misfits(
        label,
        name,
        missing=[key for key in expected if key not in found],
        unexpected=[key for key in found if key not in expected],
        reshaped=[
            f"{key} is {list(found[key])}, not {list(shape)}"
            for key, shape in expected.items()
            if found.get(key, shape) != shape
        ],
    )
    return expected


def _one_name(key: str) -> str:
    """One name for weights that transformers writes under two.

    CLIP's prefix went away in transformers 5, and UMT5's embedding is one tensor in two places.
    """
    key = key.removeprefix("vision_model.")
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


def _refuse_misfits(
    label: str,
    name: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    reshaped: Iterable[str],
) -> None:
    extra = [key for key in unexpected if not re.search(_KINDS[name].may_be_extra, key)]
    groups = ((missing, "missing"), (extra, "unexpected"), (reshaped, "of another shape"))
    problems = [
        f"{len(keys)} {problem} ({_list_first(keys)})"
        for keys, problem in ((sorted(keys), problem) for keys, problem in groups)
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{label}: the weights in {name} are not those of its config.json: "
            f"{', '.join(problems)}. Give a complete Wan2.2-Animate checkpoint."
        )


def _check_fit(source: ModelSource) -> None:
    """Refuse networks of different models: each alone would load."""
    transformer = _full_config(source, "transformer")
    for name, key, wanted_key in (
        ("vae", "z_dim", "latent_channels"),
        ("text_encoder", "d_model", "text_dim"),
        ("image_encoder", "hidden_size", "image_dim"),
    ):
        found = getattr(_full_config(source, name), key)
        wanted = getattr(transformer, wanted_key)
        if found != wanted:
            raise WeightsError(
                f"--model {source.name}: {name} has {key} {found}, but transformer has "
                f"{wanted_key} {wanted}. Give networks of one model."
            )


def _read_config(label: str, folder: Path, name: str) -> dict[str, Any]:
    """Content of a network's `config.json`, which names the right class."""
    if not (folder / name).is_dir():
        raise WeightsError(
            f"{label} has no folder {name}. Give a complete checkpoint in diffusers layout."
        )
    path = folder / name / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        described = config.get("_class_name") or (config.get("architectures") or ["no network"])[0]
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path} cannot be read: it holds no JSON object.") from error
    kind = _KINDS[name]
    if described not in kind.described_as:
        raise WeightsError(
            f"{label}: {name}/config.json describes {described}, not {kind.described_as[0]}. "
            "Give a Wan2.2-Animate checkpoint."
        )
    return cast("dict[str, Any]", config)


def _build_empty(source: ModelSource, name: str) -> nn.Module:
    """The network that `config.json` describes, without memory for its weights; not to change."""
    label = f"--model {source.name}"
    config = _read_config(label, source.folder, name)
    try:
        return _build_from_config(name, json.dumps(config))
    except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{label}: no network can be built from {name}/config.json: {reason}"
        ) from error


# The plan and the checks ask several times; a network of full size takes seconds each time.
@functools.lru_cache(maxsize=len(_KINDS))
def _build_from_config(name: str, config_json: str) -> nn.Module:
    kind, config = _KINDS[name], json.loads(config_json)
    with quiet_libraries(), torch.device("meta"):
        if kind.config_class is None:
            return kind.network_class.from_config(config)
        return kind.network_class(kind.config_class.from_dict(config))


def _full_config(source: ModelSource, name: str) -> Any:
    """A network's config with the defaults of its class where `config.json` is silent."""
    return _build_empty(source, name).config


def _weight_files(label: str, folder: Path, name: str) -> list[Path]:
    """The safetensors files of a network, all of which exist."""
    stem = f"{_KINDS[name].stem}.safetensors"
    index = folder / name / f"{stem}.index.json"
    if not index.is_file():
        if (folder / name / stem).is_file():
            return [folder / name / stem]
        pickles = [
            path.name
            for path in sorted((folder / name).glob("*"))
            if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
        ]
        if pickles:
            raise WeightsError(
                f"{label}: {name} holds pickled weights only ({_list_first(pickles)}), which can "
                "run code when they are opened. Convert them to safetensors."
            )
        raise WeightsError(
            f"{label} has no {name}/{stem}. Give a complete checkpoint in diffusers layout."
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / name / file_name for file_name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} cannot be read: it is no index of weights.") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise WeightsError(
            f"{label}: {name} lacks {len(missing)} of its {len(paths)} weight files "
            f"({_list_first(missing)}). Download them."
        )
    return paths


def _check_tokenizer(label: str, folder: Path) -> None:
    names = ("tokenizer.json", "spiece.model")
    if not any((folder / "tokenizer" / name).is_file() for name in names):
        raise WeightsError(
            f"{label} has no tokenizer/{names[0]}. Give a complete checkpoint in diffusers layout."
        )


def _tokenizer_files(folder: Path) -> list[Path]:
    files = (folder / "tokenizer").iterdir()
    return [path for path in files if path.suffix in TOKENIZER_SUFFIXES]


def _list_first(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_NUM_LISTED])
    return f"first: {listed}" if len(names) > _NUM_LISTED else listed


# --- load ----------------------------------------------------------------------------------------


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


def load_pipeline(
    source: ModelSource,
    loras: Sequence[tuple[LoraSpec, Path]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    with_image_processor: bool = False,
) -> AnimatePipeline:
    """Load the networks of a checkpoint with LoRAs fused into the transformer.

    Everything is checked before the first weight is read.

    Args:
        source: From `hub.locate_model`.
        loras: Added one after the other, each with its strength.
        device: Where the networks go.
        dtype: Of transformer, text and image encoder, except for the layers that diffusers keeps
            in float32. The VAE is always float32.
        with_image_processor: Also load CLIP's own preprocessing, which pixel memory needs.

    Returns:
        Networks in evaluation mode, without gradients.

    Raises:
        WeightsError: As `check_checkpoint`, and if a LoRA does not fit.

    Source: method page sections 5 and 6.
    """
    check_checkpoint(source)
    shapes = _check_network(source, "transformer")
    for _, path in loras:
        plan_lora(path, shapes)
    tokenizer = _load_part(
        source,
        "tokenizer",
        lambda folder: AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )
    image_processor = load_image_processor(source) if with_image_processor else None
    networks: dict[str, Any] = {name: _load_network(source, name, dtype) for name in _KINDS}
    for spec, path in loras:
        fuse_lora(networks["transformer"], path, scale=spec.scale)
    return AnimatePipeline(
        **{name: network.to(device) for name, network in networks.items()},
        tokenizer=tokenizer,
        image_processor=image_processor,
        device=device,
    )


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
    return _load_part(
        source,
        "image_processor",
        lambda folder: CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
    )


def _load_part(source: ModelSource, name: str, load: Callable[[Path], _Loaded]) -> _Loaded:
    """Load what has no weights."""
    try:
        with quiet_libraries():
            return load(source.folder / name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"--model {source.name}: {name} cannot be loaded. "
            "Give a complete checkpoint in diffusers layout."
        ) from error


def _load_network(source: ModelSource, name: str, dtype: torch.dtype) -> nn.Module:
    kind = _KINDS[name]
    with quiet_libraries():
        network, report = kind.network_class.from_pretrained(
            source.folder / name,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **{kind.dtype_option: torch.float32 if name == "vae" else dtype},
        )
    # The headers were right, but the library would fill in at random what it does not recognise.
    _refuse_misfits(
        f"--model {source.name}",
        name,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        reshaped=[str(key) for key in report["mismatched_keys"]],
    )
    return cast("nn.Module", network.requires_grad_(False))  # already in evaluation mode


def _dtype_in_memory(name: str, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that `_load_network` gives a weight."""
    kept = EverAnimateTransformer3DModel._keep_in_fp32_modules
    if name == "vae" or (name == "transformer" and not set(kept).isdisjoint(key.split("."))):
        return torch.float32
    return dtype


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries from drawing bars and logging on stderr, which is the console's."""
    drawing = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    libraries = (diffusers_logging, transformers_logging, hub_logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in drawing:
            library.disable_progress_bar()
        for library in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
        for library in drawing:
            library.enable_progress_bar()
