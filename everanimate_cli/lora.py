"""LoRA files: recognise their key names, check them against a network, add them to its weights.

Everything but `load_lora` and `LoraFiles` works on headers and imports neither torch nor numpy, so
that a file that does not fit is refused before the first heavy import.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from everanimate_cli.errors import WeightsError
from everanimate_cli.lora_config import LoraConfig, read_lora_config
from everanimate_cli.safetensors_header import read_metadata, read_number, read_tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

# What training attaches LoRA to: full match on module names. Without the restriction to the blocks
# the names would also hit the face adapter, which the released LoRAs never touch.
LORA_TARGET_PATTERN = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"

_FUSED_ROWS = 256  # of a weight, which are fused at a time
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
# Ends of keys of other kinds of adapters, which are not sums of weight and product.
_OTHER_KINDS = {
    "DoRA": re.compile(r".+\.(lora_magnitude_vector(\.[^.]+)?(\.weight)?|dora_scale)"),
    "LoHa": re.compile(r".+\.hada_(w[12]_[ab]|t[12])(\.[^.]+)?"),
    "LoKr": re.compile(r".+\.lokr_(w[12](_[ab])?|t2)(\.[^.]+)?"),
    "OFT": re.compile(r".+\.(oft_blocks|oft_[rR](\.[^.]+)?(\.weight)?)"),
}


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """What a file adds to one parameter of the network.

    Attributes:
        parameter: diffusers name of the parameter.
        keys: Names in the file: (down, up), whose product up @ down is added, or (difference,).
        strength: Factor on it, such as alpha / rank.
        alpha: That this comes from; None where the product counts as it is.
    """

    parameter: str
    keys: tuple[str, ...]
    strength: float = 1.0
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoraDescription:
    """What a LoRA file says of itself.

    Attributes:
        naming: How its keys are called.
        num_parameters: Of the network that it changes.
        ranks: That its matrices have, rising; none where it holds whole differences only.
        alphas: By which their products are scaled; empty where they count as they are.
        base: The model that it was trained on; None where it is not told, as the next two.
        stage: Of EverAnimate's training.
        step: Steps that it was trained for.
    """

    naming: str
    num_parameters: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    base: str | None = None
    stage: str | None = None
    step: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, as JSON values; a list where there are several."""
        told = {
            "rank": _one_or_all(self.ranks),
            "alpha": _one_or_all(self.alphas),
            "naming": self.naming,
            "layers": self.num_parameters,
            "base": self.base,
            "stage": self.stage,
            "step": self.step,
        }
        return {name: value for name, value in told.items() if value is not None}


def plan_lora(path: Path, network_shapes: Shapes) -> list[LoraUpdate]:
    """Match every key of a LoRA file with a parameter of the network.

    Known namings: original Wan names (`self_attn.q`) and diffusers names (`attn1.to_q`); with or
    without a prefix (`diffusion_model.`, `transformer.`, `base_model.model.`, `pipe.dit.`);
    `lora_A`/`lora_B` with or without an adapter name (`.default.`), or `lora_down`/`lora_up`;
    kohya's `lora_unet_` with underscores for dots. diffusers' own loader passes over the released
    naming in silence, so that nothing is loaded. Alpha comes from the file's own tensors, from its
    header as diffusers writes it, or from `adapter_config.json` beside it as PEFT does.

    Args:
        path: The LoRA file.
        network_shapes: Shape by parameter name of the network, e.g. from `read_tensor_shapes` of
            its own weight files.

    Returns:
        One update per parameter; together they use every key of the file.

    Raises:
        WeightsError: If the file cannot be read, is another kind of adapter, or a key is unknown,
            unpaired or of the wrong shape; names the first keys and how many there are.

    Source: method page section 6; parity files `lora_keys.json`, `lora_checkpoint.safetensors`.
    """
    shapes = read_tensor_shapes(path)
    _refuse_other_kinds(path, shapes)
    config = read_lora_config(path)
    updates, unknown = _match_keys(path, shapes, network_shapes, config)
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


def describe_lora(path: Path, network_shapes: Shapes) -> LoraDescription:
    """What a LoRA file is, from its header.

    Args:
        path: The LoRA file.
        network_shapes: As in `plan_lora`.

    Raises:
        WeightsError: As `plan_lora`.
    """
    updates = plan_lora(path, network_shapes)
    shapes, told = read_tensor_shapes(path), read_metadata(path)
    config = read_lora_config(path)
    base = None if config is None else config.base
    products = [update for update in updates if len(update.keys) > 1]
    modules = _modules_by_alias(network_shapes)
    return LoraDescription(
        naming=_name_naming([_split_key(key, modules) for key in shapes]),
        num_parameters=len(updates),
        ranks=tuple(sorted({shapes[update.keys[0]][0] for update in products})),
        alphas=tuple(sorted({each.alpha for each in products if each.alpha is not None})),
        base=told.get("base") or told.get("ss_base_model_version") or base,
        stage=told.get("stage"),
        step=told.get("step") or told.get("ss_steps"),
    )


def load_lora(path: Path, network_shapes: Shapes) -> "dict[str, Tensor]":
    """Load a LoRA file under diffusers names, to train it further.

    Args:
        path: The LoRA file.
        network_shapes: As in `plan_lora`.

    Returns:
        `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], which
        `load_lora_adapter(..., prefix=None)` of diffusers takes; the strength of the product is
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
        module = update.parameter.removesuffix(".weight")
        converted[f"{module}.lora_A.weight"] = down
        converted[f"{module}.lora_B.weight"] = up if update.strength == 1 else update.strength * up
    return converted


class LoraShare(NamedTuple):
    """What one of several LoRAs adds to a parameter.

    Attributes:
        lora: Its number, from 0.
        update: From its file.
        factor: On the product or difference: the file's strength times the scale asked for.
    """

    lora: int
    update: LoraUpdate
    factor: float


def plan_loras(
    loras: Sequence[tuple[Path, float]], network_shapes: Shapes
) -> dict[str, list[LoraShare]]:
    """What several LoRAs add, by parameter of the network.

    Args:
        loras: Files with their scales; 1 is what a LoRA was trained for, whatever its rank.
        network_shapes: As in `plan_lora`.

    Raises:
        WeightsError: As `plan_lora`.
    """
    found: dict[str, list[LoraShare]] = {}
    for number, (path, scale) in enumerate(loras):
        for update in plan_lora(path, network_shapes):
            share = LoraShare(number, update, scale * update.strength)
            found.setdefault(update.parameter, []).append(share)
    return found


class LoraFiles(ExitStack):
    """Open LoRA files, whose tensors are read one by one."""

    def __init__(self, loras: Sequence[tuple[Path, float]]) -> None:
        """Open them.

        Args:
            loras: As in `plan_loras`; the scales do not matter.
        """
        super().__init__()
        from safetensors import safe_open  # noqa: PLC0415  # late, as in `load_lora`

        self._files = [self.enter_context(safe_open(path, framework="pt")) for path, _ in loras]

    def read(self, share: LoraShare) -> "list[Tensor]":
        """The tensors of an update, as they are stored."""
        return [self._files[share.lora].get_tensor(key) for key in share.update.keys]

    def fuse(self, shares: Sequence[LoraShare], weight: "Tensor") -> "Tensor":
        """A weight with what is added to it: W + sum of scale * B @ A.

        The sum is formed in float32 and rounded once to the dtype of the weight, so that the order
        of two LoRAs does not matter. It is formed some rows at a time: whole, the largest weights
        in float32 would take more memory than a block.

        Source: parity file `lora.safetensors`.
        """
        updates = [
            (share.factor, [each.to(weight.device).float() for each in self.read(share)])
            for share in shares
        ]
        result = weight.new_empty(weight.shape)
        for start in range(0, len(weight), _FUSED_ROWS):
            rows = slice(start, start + _FUSED_ROWS)
            delta = sum(factor * _rows(tensors, rows, weight) for factor, tensors in updates)
            result[rows] = weight[rows].float() + delta
        return result


def _rows(tensors: "Sequence[Tensor]", rows: slice, weight: "Tensor") -> "Tensor":
    """Some rows of an update of a weight, before its factor."""
    if len(tensors) == 1:
        return tensors[0].view(weight.shape)[rows]
    down, up = tensors
    # Convolutions come as [rank, in, 1, 2, 2].
    return (up[rows].flatten(1) @ down.flatten(1)).view(-1, *weight.shape[1:])


def released_key(diffusers_key: str) -> str:
    """Name a trained LoRA tensor as the released files do.

    Args:
        diffusers_key: E.g. `blocks.0.attn1.to_q.lora_A.weight`.

    Returns:
        E.g. `blocks.0.self_attn.q.lora_A.default.weight`.
    """
    module, matrix, _ = diffusers_key.rsplit(".", 2)
    return f"{_original_name(module)}.{matrix}.default.weight"


def _refuse_other_kinds(path: Path, shapes: Shapes) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        foreign = [key for key in shapes if pattern.fullmatch(key)]
        if foreign:
            raise WeightsError(
                f"LoRA {path} is a {kind} ({len(foreign)} keys such as {foreign[0]}), which is "
                "more than a product that can be added. Give a plain LoRA."
            )


class _Key(NamedTuple):
    """A key of a file in its parts.

    Attributes:
        role: None if the key has no place in the network.
        module: In diffusers.
        written: What stands for `module` in the file, without prefix, as far as it is known.
        prefix: Before it.
        matrix: Such as `lora_A.default`; empty for others than matrices.
        has_adapter_name: As in the released naming.
    """

    role: _Role | None = None
    module: str = ""
    written: str = ""
    prefix: str = ""
    matrix: str = ""
    has_adapter_name: bool = False


def _match_keys(
    path: Path, shapes: Shapes, network_shapes: Shapes, config: LoraConfig | None
) -> tuple[list[LoraUpdate], list[str]]:
    """What the keys of a file add to which parameters, and the keys that have no place."""
    modules = _modules_by_alias(network_shapes)
    keys_of_module: dict[str, dict[_Role, str]] = {}
    unknown: list[str] = []
    written: dict[str, _Key] = {}
    for key in shapes:
        parts = _split_key(key, modules)
        if parts.role is None or parts.role in keys_of_module.setdefault(parts.module, {}):
            unknown.append(key)
            continue
        keys_of_module[parts.module][parts.role] = key
        if parts.matrix:
            written[parts.module] = parts

    candidates: list[LoraUpdate] = []
    for module, keys in keys_of_module.items():
        if "down" in keys and "up" in keys:
            pair = (keys["down"], keys["up"])
            rank = shapes[pair[0]][0] if shapes[pair[0]] else 0
            strength, alpha = 1.0, None
            # The released loader adds B @ A as it is, whatever an alpha in the file says.
            if "alpha" in keys and not written[module].has_adapter_name:
                alpha = read_number(path, keys["alpha"])
                strength = alpha / max(rank, 1)
            elif config is not None:
                alpha = config.alpha_of(written[module].written)
                strength = config.strength(written[module].written, max(rank, 1))
            candidates.append(
                LoraUpdate(parameter=f"{module}.weight", keys=pair, strength=strength, alpha=alpha)
            )
        else:
            unknown += [keys[role] for role in _LOW_RANK_ROLES if role in keys]
        for role, name in _WHOLE_ROLES.items():
            if role in keys:
                candidates.append(LoraUpdate(parameter=f"{module}.{name}", keys=(keys[role],)))
    updates = [update for update in candidates if update.parameter in network_shapes]
    unknown += [update.keys[-1] for update in candidates if update.parameter not in network_shapes]
    return updates, unknown


def _split_key(key: str, modules: Mapping[str, str]) -> _Key:
    """The parts of a key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return _Key()
    bare = alias = match["module"].replace(".", "_")
    while (shorter := _PREFIX.sub("", bare)) != bare:
        bare = shorter
    if bare not in modules:
        return _Key()
    # Dots and underscores count one each.
    cut = len(alias) - len(bare)
    adapter = match["adapter"]
    return _Key(
        role=_ROLES[match["matrix"] or match["whole"]],
        module=modules[bare],
        written=match["module"][cut:],
        prefix=match["module"][:cut],
        matrix=".".join(part for part in (match["matrix"], adapter) if part),
        has_adapter_name=bool(adapter),
    )


def _name_naming(keys: Sequence[_Key]) -> str:
    """Such as "Wan names after diffusion_model., lora_down and lora_up"."""
    kinds = {
        "diffusers" if each.written.replace(".", "_") == each.module.replace(".", "_") else "Wan"
        for each in keys
        # A name that both write alike tells nothing.
        if each.module != _original_name(each.module)
    }
    names = " and ".join(sorted(kinds)) or "diffusers"
    prefixes = sorted({each.prefix for each in keys if each.prefix})
    after = f" after {' and '.join(prefixes)}" if prefixes else ""
    matrices = sorted({each.matrix for each in keys if each.matrix})
    wholes = sorted({each.role for each in keys if each.role in _WHOLE_ROLES})
    return f"{names} names{after}, {' and '.join([*matrices, *map(str, wholes)])}"


def _one_or_all(values: Sequence[float]) -> Any:
    """A single value as it is, several as a list, none as None; whole numbers without a point."""
    numbers = [int(value) if value == int(value) else value for value in values]
    return numbers if len(numbers) > 1 else next(iter(numbers), None)


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
    if not down or not up:
        return False
    return (up[0], *down[1:]) == expected and up[1:] == (down[0], *(1 for _ in expected[2:]))


def _list_first(names: Iterable[str]) -> str:
    """The first few names, for an error message."""
    names = list(names)
    listed = ", ".join(names[:_NUM_LISTED]) or "it has none for this network"
    return f"first: {listed}" if len(names) > _NUM_LISTED else listed
