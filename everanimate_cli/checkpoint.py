"""Check a checkpoint and its LoRAs by their headers, before any weight is read.

Names and shapes come from the headers of the weight files and are compared with networks built on
the meta device. No code from a checkpoint is run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from everanimate_cli.errors import WeightsError
from everanimate_cli.hashes import add_samples
from everanimate_cli.library_logs import quiet_libraries
from everanimate_cli.lora import plan_lora
from everanimate_cli.model_folder import ModelSource, list_first
from everanimate_cli.stored_weights import read_description, read_stored
from everanimate_cli.transformer import EverAnimateTransformer3DModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn


# What a config may state of items that are built one by one; the released networks have 40.
_COUNTS = ("num_layers", "num_hidden_layers", "num_res_blocks")
_MAX_COUNT = 1000
# What the classes of networks raise for configs that make no sense.
_BUILD_ERRORS = (
    *(StrictDataclassError, TypeError, ValueError, AttributeError, AssertionError, NameError),
    *(LookupError, ArithmeticError, RuntimeError),
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What one network of a checkpoint must be.

    Attributes:
        network_class: What it is loaded as.
        may_be_extra: Names of tensors that a file may hold beyond the network's.
        dtype_option: How its library calls the dtype to load in.
        config_class: Turns `config.json` into what the class is built from; None for diffusers.
    """

    network_class: Any
    may_be_extra: str = r"(?!)"
    dtype_option: str = "torch_dtype"
    config_class: Any = None


KINDS = {
    "transformer": Kind(
        network_class=EverAnimateTransformer3DModel,
        may_be_extra=r"norm_added_q\.",  # in the original code too nothing uses it
    ),
    "vae": Kind(network_class=AutoencoderKLWan),
    "text_encoder": Kind(
        network_class=UMT5EncoderModel, dtype_option="dtype", config_class=UMT5Config
    ),
    "image_encoder": Kind(
        network_class=CLIPVisionModel,
        may_be_extra=r"^visual_projection\.|\.position_ids$",
        dtype_option="dtype",
        config_class=CLIPVisionConfig,
    ),
}


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
    shapes = {name: check_network(source, name) for name in KINDS}
    source.tokenizer_files()
    _check_fit(source)
    for path in loras:
        plan_lora(path, shapes["transformer"])


def checkpoint_hash(source: ModelSource, networks: Sequence[str] = tuple(KINDS)) -> str:
    """Fingerprint of a checkpoint that costs milliseconds whatever its size.

    It covers the names of all files that are loaded and samples of each, among them the header.
    Training changes nearly every weight and is seen.

    Args:
        source: From `hub.locate_model`.
        networks: Those that count; the tokenizer goes with the text encoder.

    Returns:
        64 hexadecimal digits; the folder's place does not matter.
    """
    paths = [path for name in networks for path in source.weight_files(name)]
    paths += [source.config_file(name) for name in networks if source.has_config(name)]
    if "text_encoder" in networks:
        paths += source.tokenizer_files()
    digest = hashlib.sha256()
    for path in sorted(paths):
        is_extra = path == source.transformer
        name = "--transformer" if is_extra else path.relative_to(source.folder).as_posix()
        digest.update(f"{name} ".encode())
        add_samples(digest, path)
    return digest.hexdigest()


def check_network(source: ModelSource, name: str) -> dict[str, tuple[int, ...]]:
    """Compare a network's weights with those of its class by the headers of their files.

    Args:
        source: From `hub.locate_model`.
        name: Of the network.

    Returns:
        Shape by parameter name.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    expected = {
        one_name(key): tuple(tensor.shape)
        for key, tensor in build_empty(source, name).state_dict().items()
    }
    found = {one_name(key): stored.shape for key, stored in read_stored(source, name).items()}
    is_gguf = source.weight_files(name)[0].suffix == ".gguf"
    refuse_misfits(
        source,
        name,
        missing=[key for key in expected if key not in found],
        unexpected=[key for key in found if key not in expected],
        reshaped=[
            f"{key} is {list(found[key])}, not {list(shape)}"
            for key, shape in expected.items()
            if not _is_same(found.get(key, shape), shape, may_lack_ones=is_gguf)
        ],
    )
    return expected


def packed_weights(source: ModelSource) -> dict[str, int]:
    """Bytes of the transformer's weights that stay packed in memory, by parameter name.

    They are those of linear layers in a GGUF file, but for layers that stay in float32.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    network = build_empty(source, "transformer")
    linear = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and not stays_float32(name)
    }
    return {
        key: stored.packed_bytes
        for key, stored in read_stored(source, "transformer").items()
        if stored.packed_bytes is not None and key in linear
    }


def stays_float32(key: str) -> bool:
    """Whether a weight of the transformer is float32 whatever the others are."""
    kept = EverAnimateTransformer3DModel._keep_in_fp32_modules
    return not set(kept).isdisjoint(key.split("."))


def dtype_in_memory(name: str, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight gets when its network is loaded in `dtype`."""
    if name == "vae" or (name == "transformer" and stays_float32(key)):
        return torch.float32
    # What comes out of this layer is beyond the range of float16, so that transformers keeps it.
    if name == "text_encoder" and dtype == torch.float16 and ".wo." in key:
        return torch.float32
    return dtype


def one_name(key: str) -> str:
    """One name for weights that transformers writes under two.

    CLIP's prefix went away in transformers 5, and UMT5's embedding is one tensor in two places.
    """
    key = key.removeprefix("vision_model.")
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


def _is_same(found: tuple[int, ...], shape: tuple[int, ...], *, may_lack_ones: bool) -> bool:
    if may_lack_ones:  # writers of GGUF drop those in front
        found = (1,) * (len(shape) - len(found)) + found
    return found == shape


def refuse_misfits(
    source: ModelSource,
    name: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    reshaped: Iterable[str],
) -> None:
    """Refuse a network whose weights are not those of its config.

    Args:
        source: Where it comes from.
        name: Of the network.
        missing: Names of weights that the network has and the files lack.
        unexpected: The reverse.
        reshaped: What to say about weights of another shape.

    Raises:
        WeightsError: Naming the first of each.
    """
    extra = [key for key in unexpected if not re.search(KINDS[name].may_be_extra, key)]
    groups = ((missing, "missing"), (extra, "unexpected"), (reshaped, "of another shape"))
    problems = [
        f"{len(keys)} {problem} ({list_first(keys)})"
        for keys, problem in ((sorted(keys), problem) for keys, problem in groups)
        if keys
    ]
    if problems:
        network = "its config.json" if source.has_config(name) else "that network"
        raise WeightsError(
            f"{source.label_of(name)}: the weights in {name} are not those of {network}: "
            f"{', '.join(problems)}. Give a complete Wan2.2-Animate checkpoint."
        )


def _check_fit(source: ModelSource) -> None:
    """Refuse networks of different models: each alone would load."""
    transformer = full_config(source, "transformer")
    for name, key, wanted_key in (
        ("vae", "z_dim", "latent_channels"),
        ("text_encoder", "d_model", "text_dim"),
        ("image_encoder", "hidden_size", "image_dim"),
    ):
        found = getattr(full_config(source, name), key)
        wanted = getattr(transformer, wanted_key)
        if found != wanted:
            raise WeightsError(
                f"--model {source.name}: {name} has {key} {found}, but transformer has "
                f"{wanted_key} {wanted}. Give networks of one model."
            )


def build_empty(source: ModelSource, name: str) -> nn.Module:
    """The network that `config.json` describes, without memory for its weights; not to change."""
    config = read_description(source, name)
    try:
        for key in _COUNTS:
            if config.get(key, 0) > _MAX_COUNT:
                raise ValueError(f"{key} is above {_MAX_COUNT}")
        return _build_from_config(name, json.dumps(config))
    except _BUILD_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        described = f"{name}/config.json" if source.has_config(name) else f"the weights of {name}"
        raise WeightsError(
            f"{source.label}: no network can be built from {described}: {reason}"
        ) from error


# The plan and the checks ask several times; a network of full size takes seconds each time.
@functools.lru_cache(maxsize=len(KINDS))
def _build_from_config(name: str, config_json: str) -> nn.Module:
    kind, config = KINDS[name], json.loads(config_json)
    with quiet_libraries(), torch.device("meta"):
        if kind.config_class is None:
            return kind.network_class.from_config(config)
        return kind.network_class(kind.config_class.from_dict(config))


def full_config(source: ModelSource, name: str) -> Any:
    """A network's config with the defaults of its class where `config.json` is silent."""
    return build_empty(source, name).config
