"""Networks of Wan2.2-Animate under their authors' names, and what their shapes say of them.

diffusers converts the transformer and the VAE; for the two encoders nothing exists there, so that
their names stand here. All functions work on tensors without memory (device "meta") as well, so
that a file is checked by its header.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)

from everanimate_cli.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Tensors = dict[str, Tensor]
    Shapes = Mapping[str, tuple[int, ...]]

BLUR_KERNEL = ".kernel"  # end of the names of what the network makes itself

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# All other convolutions of the motion encoder have a name between number and "weight".
_LAST_CONVOLUTION = re.compile(r"(motion_encoder\.enc\.net_app\.convs\.)\d+\.weight")
_CONVERTERS_LAST = 8  # what diffusers takes it to be: the number for faces of 512 pixels
_MOTION_BIAS = re.compile(r"motion_encoder\.enc\.net_app\.convs\..+\.bias")
_FUSED_KEY_VALUE = ".linear1_kv."

_TEXT_ENCODER_NAMES = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (
        r"blocks\.(\d+)\.attn\.([qkvo])\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    ),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (
        r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    ),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)
_IMAGE_ENCODER_NAMES = (
    (r"visual\.cls_embedding", "embeddings.class_embedding"),
    (r"visual\.pos_embedding", "embeddings.position_embedding.weight"),
    (r"visual\.patch_embedding\.weight", "embeddings.patch_embedding.weight"),
    (r"visual\.pre_norm\.(weight|bias)", r"pre_layrnorm.\1"),
    (r"visual\.post_norm\.(weight|bias)", r"post_layernorm.\1"),
    (
        r"visual\.transformer\.(\d+)\.norm([12])\.(weight|bias)",
        r"encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual\.transformer\.(\d+)\.attn\.proj\.(weight|bias)",
        r"encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"visual\.transformer\.(\d+)\.mlp\.0\.(weight|bias)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"visual\.transformer\.(\d+)\.mlp\.2\.(weight|bias)", r"encoder.layers.\1.mlp.fc2.\2"),
)
_FUSED_QKV = re.compile(r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)")
# The other half of CLIP reads text; the head is the projection that compares the halves.
_OTHER_HALF = re.compile(r"(textual\..+|log_scale|visual\.head)")
# Shapes do not tell them: of ViT-H/14, the only image encoder of the original layout.
_CLIP_HEADS = 16
_CLIP_ACTIVATION = "gelu"


def from_original(name: str, tensors: Tensors, label: str) -> Tensors:
    """Give the tensors of a network the names that diffusers and transformers use.

    Tensors with names that nothing is known of keep them.

    Args:
        name: Of the network, as its folder in diffusers layout.
        tensors: Under the authors' names; used up.
        label: How an error calls their file.

    Raises:
        WeightsError: If two would get one name.
    """
    converters: dict[str, Callable[[Tensors], Tensors]] = {
        "transformer": _convert_transformer,
        "vae": _convert_vae,
        "text_encoder": lambda given: _rename(given, _TEXT_ENCODER_NAMES),
        "image_encoder": _convert_image_encoder,
    }
    num_expected = len(tensors) + _count_splits(tensors)
    try:
        converted = converters[name](tensors)
    except (LookupError, RuntimeError, ValueError) as error:  # cannot be split or reshaped
        raise WeightsError(
            f"{label}: the {name} has weights of other shapes. Give a Wan2.2-Animate checkpoint."
        ) from error
    if len(converted) != num_expected:
        raise WeightsError(
            f"{label}: {num_expected - len(converted)} weights of the {name} are there twice, "
            "under two names. Give a complete Wan2.2-Animate checkpoint."
        )
    return converted


def has_original_names(names: Sequence[str]) -> bool:
    """Whether a transformer's tensors carry the authors' names, not those of diffusers."""
    return not any("condition_embedder." in name for name in names)


def strip_prefix(name: str) -> str:
    """The name of a tensor without what other programs put before it."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _count_splits(tensors: Tensors) -> int:
    """How many tensors become two more, less those that are dropped."""
    pairs = sum(_FUSED_KEY_VALUE in key for key in tensors)
    triples = sum(bool(_FUSED_QKV.fullmatch(key)) for key in tensors)
    return pairs + 2 * triples - sum(bool(_OTHER_HALF.fullmatch(key)) for key in tensors)


def _convert_transformer(tensors: Tensors) -> Tensors:
    prepared = {}
    for key, tensor in tensors.items():
        new_key = _LAST_CONVOLUTION.sub(rf"\g<1>{_CONVERTERS_LAST}.weight", key)
        # diffusers takes [1, C, 1, 1]; writers of GGUF drop ones.
        is_bias = _MOTION_BIAS.fullmatch(key) is not None
        prepared[new_key] = tensor.reshape(1, -1, 1, 1) if is_bias else tensor
    return dict(convert_wan_transformer_to_diffusers(prepared))


def _convert_vae(tensors: Tensors) -> Tensors:
    return dict(convert_wan_vae_to_diffusers(tensors))


def _convert_image_encoder(tensors: Tensors) -> Tensors:
    split: Tensors = {}
    for key, tensor in tensors.items():
        match = _FUSED_QKV.fullmatch(key)
        if match is None:
            split[key] = tensor
            continue
        for part, name in zip(tensor.chunk(3), "qkv", strict=True):
            split[f"encoder.layers.{match[1]}.self_attn.{name}_proj.{match[2]}"] = part
    seen = {key: tensor for key, tensor in split.items() if not _OTHER_HALF.fullmatch(key)}
    converted = _rename(seen, _IMAGE_ENCODER_NAMES)
    for key in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        if key in converted:  # [1, 1, D] and [1, N, D] there
            tensor = converted[key]
            converted[key] = tensor.reshape(tensor.shape[2 if "class" in key else 1 :])
    return converted


def _rename(tensors: Tensors, names: Sequence[tuple[str, str]]) -> Tensors:
    """Rename by the first pattern that fits the whole name."""
    renamed = {}
    for key, tensor in tensors.items():
        new_key = key
        for pattern, replacement in names:
            match = re.fullmatch(pattern, key)
            if match is not None:
                new_key = match.expand(replacement)
                break
        renamed[new_key] = tensor
    return renamed


# --- what the shapes say -------------------------------------------------------------------------


def describe(name: str, shapes: Shapes, label: str) -> dict[str, Any]:
    """The config of a network from the shapes of its weights.

    Args:
        name: Of the network, as its folder in diffusers layout.
        shapes: By the names that `from_original` gives.
        label: How an error calls their file.

    Returns:
        What stands in `config.json` in diffusers layout where it differs from the defaults of the
        class.

    Raises:
        WeightsError: If the weights are of another network.
    """
    describers = {
        "transformer": _describe_transformer,
        "vae": _describe_vae,
        "text_encoder": _describe_text_encoder,
        "image_encoder": _describe_image_encoder,
    }
    try:
        return describers[name](shapes)
    except KeyError as error:
        problem = f"lacks {error.args[0]}"
    except (IndexError, ValueError, ZeroDivisionError):
        problem = "has weights of other shapes"
    raise WeightsError(f"{label}: the {name} {problem}. Give a Wan2.2-Animate checkpoint.")


def _describe_transformer(shapes: Shapes) -> dict[str, Any]:
    inner_dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    head_dim = shapes["face_adapter.0.norm_q.weight"][0]
    num_layers = _count(shapes, r"blocks\.(\d+)\.")
    num_res_blocks = _count(shapes, r"motion_encoder\.res_blocks\.(\d+)\.")
    motion_size = 2 ** (num_res_blocks + 2)
    channels = {str(motion_size): shapes["motion_encoder.conv_in.weight"][0]}
    for index in range(num_res_blocks):
        side = motion_size // 2 ** (index + 1)
        channels[str(side)] = shapes[f"motion_encoder.res_blocks.{index}.conv2.weight"][0]
    face_hidden_dim = shapes["face_encoder.conv2.weight"][0]
    motion_encoder_dim, motion_dim = shapes["motion_encoder.motion_synthesis_weight"]
    image_norm = shapes.get("condition_embedder.image_embedder.norm1.weight")
    image_key = shapes.get("blocks.0.attn2.add_k_proj.weight")
    patch_t, patch_h, patch_w = patch_size
    return {
        "patch_size": patch_size,
        "num_attention_heads": inner_dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "latent_channels": shapes["pose_patch_embedding.weight"][1],
        "out_channels": shapes["proj_out.weight"][0] // (patch_t * patch_h * patch_w),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": num_layers,
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": image_norm and image_norm[0],
        "added_kv_proj_dim": image_key and image_key[1],
        "motion_encoder_channel_sizes": channels,
        "motion_encoder_size": motion_size,
        "motion_style_dim": shapes["motion_encoder.conv_out.weight"][0],
        "motion_dim": motion_dim,
        "motion_encoder_dim": motion_encoder_dim,
        "face_encoder_hidden_dim": face_hidden_dim,
        "face_encoder_num_heads": shapes["face_encoder.conv1_local.weight"][0] // face_hidden_dim,
        "inject_face_latents_blocks": num_layers // _count(shapes, r"face_adapter\.(\d+)\."),
    }


def _describe_vae(shapes: Shapes) -> dict[str, Any]:
    # All else, with the mean and deviation of the latents, are the defaults of the class.
    return {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "z_dim": shapes["post_quant_conv.weight"][0],
    }


def _describe_text_encoder(shapes: Shapes) -> dict[str, Any]:
    first = "encoder.block.0.layer"
    vocab_size, d_model = shapes["shared.weight"]
    num_buckets, num_heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // num_heads,
        "d_ff": shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
    }


def _describe_image_encoder(shapes: Shapes) -> dict[str, Any]:
    hidden_size, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
    num_patches = shapes["embeddings.position_embedding.weight"][0] - 1
    return {
        "hidden_size": hidden_size,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": _CLIP_HEADS,
        "image_size": round(num_patches**0.5) * patch_size,
        "patch_size": patch_size,
        "hidden_act": _CLIP_ACTIVATION,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """How many items a numbered list of layers has."""
    matches = (re.match(pattern, key) for key in shapes)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
