"""A tiny checkpoint as the authors of Wan2.2-Animate lay theirs out, and the same for diffusers.

The names go the other way than in the product, and are written down here once more. What shapes do
not tell is as in the released networks: 16 heads of CLIP, 16 latent channels.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanAnimatePipeline
from diffusers import WanAnimateTransformer3DModel as StockTransformer
from safetensors.torch import save_file
from tiny import TINY_DEFAULTS, TRANSFORMER_CONFIG, build_networks, build_tokenizer
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from everanimate_cli.settings import MODEL_DEFAULTS_FILE
from everanimate_cli.transformer import EverAnimateTransformer3DModel

Tensors = dict[str, Tensor]

LATENT_CHANNELS = 16
CLIP_DIM = 32
CLIP_SIZE = 32
# Rows of 32 numbers and more, as GGUF packs them.
ORIGINAL_CONFIG: dict[str, Any] = TRANSFORMER_CONFIG | {
    "attention_head_dim": 32,
    "added_kv_proj_dim": 64,
    "in_channels": 2 * LATENT_CHANNELS + 4,
    "latent_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "image_dim": CLIP_DIM,
    "motion_encoder_dim": 32,
    "face_encoder_hidden_dim": 32,
}
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"

# Names of diffusers and transformers, and of the authors.
_TRANSFORMER = (
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"(blocks\.\d+)\.attn1\.(norm_[qk])", r"\1.self_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"(blocks\.\d+)\.attn2\.(norm_[qk])", r"\1.cross_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
    (r"(blocks\.\d+)\.attn2\.norm_added_k", r"\1.cross_attn.norm_k_img"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
    (r"face_adapter\.(\d+)\.to_q", r"face_adapter.fuser_blocks.\1.linear1_q"),
    (r"face_adapter\.(\d+)\.to_out", r"face_adapter.fuser_blocks.\1.linear2"),
    (r"face_adapter\.(\d+)\.norm_([qk])", r"face_adapter.fuser_blocks.\1.\2_norm"),
    (r"face_encoder\.(conv\d\w*)", r"face_encoder.\1.conv"),
    (r"motion_encoder\.motion_synthesis_weight", "motion_encoder.dec.direction.weight"),
    (r"motion_encoder\.motion_network\.(\d+)", r"motion_encoder.enc.fc.\1"),
)
_T5 = (
    (r"shared", "token_embedding"),
    (r"encoder\.final_layer_norm", "norm"),
    (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm", r"blocks.\1.norm1"),
    (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm", r"blocks.\1.norm2"),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias",
        r"blocks.\1.pos_embedding.embedding",
    ),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.(\w)", r"blocks.\1.attn.\2"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0", r"blocks.\1.ffn.gate.0"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1", r"blocks.\1.ffn.fc1"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo", r"blocks.\1.ffn.fc2"),
)
_CLIP = (
    (r"embeddings\.class_embedding", "visual.cls_embedding"),
    (r"embeddings\.position_embedding\.weight", "visual.pos_embedding"),
    (r"embeddings\.patch_embedding", "visual.patch_embedding"),
    (r"pre_layrnorm", "visual.pre_norm"),
    (r"post_layernorm", "visual.post_norm"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])", r"visual.transformer.\1.norm\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"visual.transformer.\1.attn.proj"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1", r"visual.transformer.\1.mlp.0"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2", r"visual.transformer.\1.mlp.2"),
)
_VAE_LAYERS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3"} | {
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def build_original_networks() -> dict[str, Any]:
    """Networks that the original layout can hold, always with the same weights."""
    networks = build_networks()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks["transformer"] = EverAnimateTransformer3DModel(**ORIGINAL_CONFIG)
        networks["vae"] = AutoencoderKLWan(base_dim=4)
        networks["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=CLIP_DIM,
                intermediate_size=56,
                num_hidden_layers=3,
                num_attention_heads=16,
                image_size=CLIP_SIZE,
                patch_size=8,
                hidden_act="gelu",
            )
        )
    for network in networks.values():
        network.eval().requires_grad_(False)
    networks["transformer"].patch_embedding.weight.mul_(3)
    networks["transformer"].proj_out.weight.mul_(4)
    return networks


def write_diffusers(folder: Path, networks: dict[str, Any]) -> Path:
    """Save networks in diffusers layout."""
    stock = StockTransformer.from_config(networks["transformer"].config)
    stock.load_state_dict(networks["transformer"].state_dict())
    WanAnimatePipeline(
        **(networks | {"transformer": stock}),
        tokenizer=build_tokenizer(),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE}
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ).save_pretrained(folder)
    return _write_defaults(folder)


def write_original(folder: Path, networks: dict[str, Any]) -> Path:
    """Save networks in the original layout, the transformer in two files with an index."""
    folder.mkdir(parents=True)
    tensors = sorted(name_transformer(networks["transformer"]).items())
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(dict(part), folder / name, {"format": "pt"})
        weight_map |= {key: name for key, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{TRANSFORMER_FILE}.index.json").write_text(json.dumps(index))
    torch.save(name_vae(networks["vae"]), folder / VAE_FILE)
    torch.save(name_text_encoder(networks["text_encoder"]), folder / T5_FILE)
    torch.save(name_image_encoder(networks["image_encoder"]), folder / CLIP_FILE)
    build_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return _write_defaults(folder)


def _write_defaults(folder: Path) -> Path:
    text = json.dumps(TINY_DEFAULTS.to_json(), ensure_ascii=False)
    (folder / MODEL_DEFAULTS_FILE).write_text(text, encoding="utf-8")
    return folder


# --- the authors' names --------------------------------------------------------------------------


def name_transformer(network: Any) -> Tensors:
    """Weights of a transformer as the authors name and shape them, with blur kernels."""
    state = network.state_dict()
    named: Tensors = {}
    for key in list(state):
        if re.fullmatch(r"face_adapter\.\d+\.to_k\.\w+", key):
            pair = (state.pop(key), state.pop(key.replace("to_k", "to_v")))
            new_key = re.sub(
                r"face_adapter\.(\d+)\.to_k", r"face_adapter.fuser_blocks.\1.linear1_kv", key
            )
            named[new_key] = torch.cat(pair)
    num_blocks = len(network.motion_encoder.res_blocks)
    for key, value in state.items():
        match = re.fullmatch(r"motion_encoder\.(conv_in|conv_out|res_blocks.+?)\.(\w+\.)?\w+", key)
        if match is None:
            named[_rename(key, _TRANSFORMER)] = value.contiguous()
            continue
        new_key, weight = _name_motion_convolution(key, value, num_blocks)
        named[new_key] = weight.contiguous()
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for index in range(num_blocks):
        for layer in ("conv2", "skip"):
            key = f"motion_encoder.enc.net_app.convs.{index + 1}.{layer}.0.kernel"
            named[key] = torch.outer(kernel, kernel) / 64
    return named


def _name_motion_convolution(key: str, value: Tensor, num_blocks: int) -> tuple[str, Tensor]:
    """The authors keep them in numbered lists, with blur in front and activation behind."""
    is_bias = key.endswith(".bias")
    value = value.reshape(1, -1, 1, 1) if is_bias else value
    convolutions = "motion_encoder.enc.net_app.convs"
    if "conv_in" in key:
        return f"{convolutions}.0.{'1.bias' if is_bias else '0.weight'}", value
    if "conv_out" in key:
        return f"{convolutions}.{num_blocks + 1}.weight", value
    _, _, index, layer, *_ = key.split(".")
    has_blur = layer != "conv1"
    place = f"{int(has_blur) + int(is_bias)}.{'bias' if is_bias else 'weight'}"
    return f"{convolutions}.{int(index) + 1}.{layer.replace('conv_skip', 'skip')}.{place}", value


def name_text_encoder(network: Any) -> Tensors:
    """Weights of UMT5 as the authors name them."""
    state = network.state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    return {_rename(key, _T5): value.clone() for key, value in state.items()}


def name_image_encoder(network: Any) -> Tensors:
    """Weights of CLIP as the authors name them, with a text half that nothing uses."""
    state = {key.removeprefix("vision_model."): v for key, v in network.state_dict().items()}
    named: Tensors = {}
    for key in list(state):
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key)
        if match:
            parts = [state.pop(key.replace("q_proj", f"{name}_proj")) for name in "qkv"]
            named[f"visual.transformer.{match[1]}.attn.to_qkv.{match[2]}"] = torch.cat(parts)
    for key, value in state.items():
        if "position_ids" not in key:
            named[_rename(key, _CLIP)] = value.clone()
    width = network.config.hidden_size
    named["visual.cls_embedding"] = named["visual.cls_embedding"].reshape(1, 1, width)
    named["visual.pos_embedding"] = named["visual.pos_embedding"][None]
    return named | {
        "visual.head": torch.zeros(width, 8),
        "textual.token_embedding.weight": torch.zeros(5, 8),
        "log_scale": torch.zeros(()),
    }


def name_vae(network: Any) -> Tensors:
    """Weights of the VAE as the authors name them."""
    return {_name_vae_key(key): value.clone() for key, value in network.state_dict().items()}


def _name_vae_key(key: str) -> str:
    def layers(text: str) -> str:
        first, _, rest = text.partition(".")
        return ".".join(filter(None, (_VAE_LAYERS.get(first, first), rest)))

    rules: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
        (r"quant_conv\.(\w+)", lambda m: f"conv1.{m[1]}"),
        (r"post_quant_conv\.(\w+)", lambda m: f"conv2.{m[1]}"),
        (r"(\w+)\.conv_in\.(\w+)", lambda m: f"{m[1]}.conv1.{m[2]}"),
        (r"(\w+)\.norm_out\.gamma", lambda m: f"{m[1]}.head.0.gamma"),
        (r"(\w+)\.conv_out\.(\w+)", lambda m: f"{m[1]}.head.2.{m[2]}"),
        (
            r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)",
            lambda m: f"{m[1]}.middle.{2 * int(m[2])}.{layers(m[3])}",
        ),
        (r"(\w+)\.mid_block\.attentions\.0\.(.+)", lambda m: f"{m[1]}.middle.1.{m[2]}"),
        (
            r"encoder\.down_blocks\.(\d+)\.(.+)",
            lambda m: f"encoder.downsamples.{m[1]}.{layers(m[2])}",
        ),
        (
            r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.(.+)",
            lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}.{layers(m[3])}",
        ),
        (
            r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.(.+)",
            lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}.{m[2]}",
        ),
    )
    for pattern, name in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return name(match)
    raise AssertionError(key)


def _rename(key: str, names: tuple[tuple[str, str], ...]) -> str:
    module, dot, parameter = key.rpartition(".")
    for pattern, replacement in names:
        for whole, rest in ((key, ""), (module, f"{dot}{parameter}")):
            match = re.fullmatch(pattern, whole)
            if match:
                return match.expand(replacement) + rest
    return key
