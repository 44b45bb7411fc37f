"""LoRA files: recognise their key names, check them against a network, add them to its weights.

Everything but `load_lora` and `fuse_lora` works on names and shapes and imports neither torch nor
numpy, so that a file that does not fit is refused before the first heavy import.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from everanimate_cli.errors import WeightsError
from everanimate_cli.safetensors_header import read_tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]

# What training attaches LoRA to: full match on module names. Without the restriction to the blocks
# the names would also hit the face adapter, which the released LoRAs never touch.
LORA_TARGET_PATTERN = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"

_NUM_LISTED = 3  # keys that an error message names before it counts the rest

# Module names of diffusers, and of the original Wan code that most LoRA files use. Read from top
# to bottom, the first match counts.
_ORIGINAL_NAMES = (
    (r"attn1\.to_out\.0", "self_attn.o"),
    (r"attn1\.to_([qkv])", r"self_attn.\1"),
    (r"attn1\.(norm_[qk])", r"self_attn.\1"),
    (r"attn2\.to_out\.0", "cross_attn.o"),
    (r"attn2\.to_([qkv])", r"cross_attn.\1"),
    (r"attn2\.add_([kv])_proj", r"cross_attn.\1_img"),
    (r"attn2\.norm_added_k", "cross_attn.norm_k_img"),
    (r"attn2\.(norm_[qk])", r"cross_attn.\1"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"proj_out", "head.head"),
)

_PREFIX = re.compile(r"^(base_model_model|pipe_dit|diffusion_model|transformer|lora_unet)_+")

_Role = Literal["down", "up", "alpha", "diff", "diff_b", "diff_m"]

# `lora_A.default.weight` is the released naming, `lora_down.weight` that of kohya and lightx2v.
# The diff keys of lightx2v and others hold a whole difference of weight, bias or modulation.
_ROLES: dict[str, _Role] = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff_m",
}
_LOW_RANK_ROLES: tuple[_Role, ...] = ("down", "up", "alpha")
# Which parameter of its module a whole difference is for.
_WHOLE_ROLES: dict[_Role, str] = {"diff": "weight", "diff_b": "bias", "diff_m": "scale_shift_table"}
_KEY = re.compile(
    r"(?P<module>.+)\."
    r"((?P<matrix>lora_A|lora_down|lora_B|lora_up)(\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<whole>alpha|diff|diff_b|diff_m))"
)


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """What a file adds to one parameter of the network.

    Attributes:
        parameter: diffusers name of the parameter.
        keys: Names in the file: (down, up), whose product up @ down is added, or (difference,).
        alpha_key: Name in the file of the alpha that scales the product by alpha / rank; None
            where it counts as it is.
    """

    parameter: str
    keys: tuple[str, ...]
    alpha_key: str | None = None


def plan_lora(path: Path, network_shapes: Shapes) -> list[LoraUpdate]:
    """Match every key of a LoRA file with a parameter of the network.

    Known namings: original Wan names (`self_attn.q`) and diffusers names (`attn1.to_q`); with or
    without a prefix (`diffusion_model.`, `transformer.`, `base_model.model.`, `pipe.dit.`);
    `lora_A`/`lora_B` with or without an adapter name (`.default.`), or `lora_down`/`lora_up`;
    kohya's `lora_unet_` with underscores for dots. diffusers' own loader passes over the released
    naming in silence, so that nothing is loaded.

    Args:
        path: The LoRA file.
        network_shapes: Shape by parameter name of the network, e.g. from `read_tensor_shapes` of
            its own weight files.

    Returns:
        One update per parameter; together they use every key of the file.

    Raises:
        WeightsError: If the file cannot be read, or a key is unknown, unpaired or of the wrong
            shape; names the first keys and how many there are.

    Source: method page section 6; parity files `lora_keys.json`, `lora_checkpoint.safetensors`.
    """
    shapes = read_tensor_shapes(path)
    updates, unknown = _match_keys(shapes, network_shapes)
    if unknown or not updates:
        raise WeightsError(
            f"LoRA {path}: {len(unknown)} of its {len(shapes)} keys have no place in the network "
            f"({_list_first(unknown)}). Give a LoRA made for Wan2.2-Animate."
        )
    misfits = [
        f"{update.keys[-1]} for {list(network_shapes[update.parameter])}"
        for update in updates
        if not _fits(update, shapes, network_shapes[update.parameter])
    ]
    if misfits:
        raise WeightsError(
            f"LoRA {path}: {len(misfits)} of its {len(updates)} layers have another shape than "
            f"the network ({_list_first(misfits)}). Give a LoRA made for this network's size."
        )
    return updates


def load_lora(path: Path, network_shapes: Shapes) -> "dict[str, Tensor]":
    """Load a LoRA file under diffusers names, to train it further.

    Args:
        path: The LoRA file.
        network_shapes: As in `plan_lora`.

    Returns:
        `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], which
        `load_lora_adapter(..., prefix=None)` of diffusers takes; an alpha in the file is
        multiplied into `lora_B`.

    Raises:
        WeightsError: As `plan_lora`, and if the file holds more than low-rank matrices.
    """
    updates = plan_lora(path, network_shapes)
    others = [update.keys[0] for update in updates if len(update.keys) == 1]
    if others:
        raise WeightsError(
            f"LoRA {path} cannot be trained further: {len(others)} of its keys are not low-rank "
            f"matrices ({_list_first(others)}). Give a file made by LoRA training."
        )
    # Late, so that checks of names and shapes stay cheap.
    from safetensors.torch import load_file  # noqa: PLC0415

    tensors = load_file(path)
    converted = {}
    for update in updates:
        down, up = (tensors[key] for key in update.keys)
        if update.alpha_key is not None:
            up = up * (tensors[update.alpha_key].item() / down.shape[0])
        module = update.parameter.removesuffix(".weight")
        converted[f"{module}.lora_A.weight"] = down
        converted[f"{module}.lora_B.weight"] = up
    return converted


def fuse_lora(network: "nn.Module", path: Path, *, scale: float = 1.0) -> int:
    """Add a LoRA to the weights of a network: W + scale * B @ A, once and for all.

    The sum is formed in float32 and then rounded to the dtype of the weight.

    Args:
        network: A network without adapters; changed in place.
        path: The LoRA file.
        scale: Strength; 1 is what the LoRA was trained for. Not divided by the rank.

    Returns:
        Number of parameters changed.

    Raises:
        WeightsError: As `plan_lora`; the network is unchanged then.

    Source: parity file `lora.safetensors`.
    """
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    updates = plan_lora(path, shapes)
    # Late, so that checks of names and shapes stay cheap.
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(path, framework="pt") as file:
        for update in updates:
            weight = parameters[update.parameter].data
            tensors = [file.get_tensor(key).to(weight.device).float() for key in update.keys]
            strength = scale
            if update.alpha_key is not None:
                strength *= file.get_tensor(update.alpha_key).item() / tensors[0].shape[0]
            if len(tensors) == 1:
                delta = tensors[0]
            else:
                down, up = tensors
                delta = up.flatten(1) @ down.flatten(1)  # convolutions come as [rank, in, 1, 2, 2]
            weight.copy_(weight.float() + strength * delta.view(weight.shape))
    return len(updates)


def released_key(diffusers_key: str) -> str:
    """Name a trained LoRA tensor as the released files do.

    Args:
        diffusers_key: E.g. `blocks.0.attn1.to_q.lora_A.weight`.

    Returns:
        E.g. `blocks.0.self_attn.q.lora_A.default.weight`.
    """
    module, matrix, _ = diffusers_key.rsplit(".", 2)
    return f"{_original_name(module)}.{matrix}.default.weight"


def _match_keys(shapes: Shapes, network_shapes: Shapes) -> tuple[list[LoraUpdate], list[str]]:
    """What the keys of a file add to which parameters, and the keys that have no place."""
    modules = _modules_by_alias(network_shapes)
    keys_of_module: dict[str, dict[_Role, str]] = {}
    unknown: list[str] = []
    with_adapter_name: set[str] = set()
    for key in shapes:
        role, module, adapter = _split_key(key, modules)
        if role is None or role in keys_of_module.setdefault(module, {}):
            unknown.append(key)
            continue
        keys_of_module[module][role] = key
        if adapter:
            with_adapter_name.add(module)

    candidates: list[LoraUpdate] = []
    for module, keys in keys_of_module.items():
        if "down" in keys and "up" in keys:
            # The released loader adds B @ A as it is, whatever an alpha in the file says.
            alpha_key = None if module in with_adapter_name else keys.get("alpha")
            pair = (keys["down"], keys["up"])
            candidates.append(
                LoraUpdate(parameter=f"{module}.weight", keys=pair, alpha_key=alpha_key)
            )
        else:
            unknown += [keys[role] for role in _LOW_RANK_ROLES if role in keys]
        for role, name in _WHOLE_ROLES.items():
            if role in keys:
                candidates.append(LoraUpdate(parameter=f"{module}.{name}", keys=(keys[role],)))
    updates = [update for update in candidates if update.parameter in network_shapes]
    unknown += [update.keys[-1] for update in candidates if update.parameter not in network_shapes]
    return updates, unknown


def _split_key(key: str, modules: Mapping[str, str]) -> tuple[_Role | None, str, str | None]:
    """Role of a key (None if unknown), name of its module in diffusers, adapter name."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None, "", None
    alias = match["module"].replace(".", "_")
    while (bare := _PREFIX.sub("", alias)) != alias:
        alias = bare
    if alias not in modules:
        return None, "", None
    return _ROLES[match["matrix"] or match["whole"]], modules[alias], match["adapter"]


def _modules_by_alias(network_shapes: Shapes) -> dict[str, str]:
    """Name in diffusers by every name a module goes by, dots written as underscores."""
    modules = {name.rpartition(".")[0] for name in network_shapes}
    aliases = {_original_name(module).replace(".", "_"): module for module in modules}
    return aliases | {module.replace(".", "_"): module for module in modules}


def _original_name(module: str) -> str:
    """Name of a diffusers module in the original Wan code."""
    for pattern, original in _ORIGINAL_NAMES:
        name, count = re.subn(pattern, original, module)
        if count:
            return name
    return module


def _fits(update: LoraUpdate, shapes: Shapes, expected: tuple[int, ...]) -> bool:
    """Whether an update has the shape of its parameter."""
    if len(update.keys) == 1:
        return shapes[update.keys[0]] == expected
    down, up = (shapes[key] for key in update.keys)
    return (up[0], *down[1:]) == expected and up[1:] == (down[0], *(1 for _ in expected[2:]))


def _list_first(names: Iterable[str]) -> str:
    """The first few names, for an error message."""
    names = list(names)
    listed = ", ".join(names[:_NUM_LISTED]) or "it has none for this network"
    return f"first: {listed}" if len(names) > _NUM_LISTED else listed
