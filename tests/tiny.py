"""A complete checkpoint with small random weights, in memory or in diffusers' folder layout.

Every network is the real class with two or four layers; a chunk of 9 frames takes a fraction of a
second on one core. No two sizes are equal, so that a swapped axis shows.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from everanimate_cli.memory import chunk_noise
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.rollout import Rollout
from everanimate_cli.settings import MODEL_DEFAULTS_FILE, ModelDefaults
from everanimate_cli.transformer import EverAnimateTransformer3DModel

TINY_DEFAULTS = ModelDefaults(
    fps=12.5,
    width=64,
    height=48,
    num_inference_steps=2,
    shift=5.0,
    frames_per_chunk=9,
    overlap=4,
    identity_slots=4,
    face_size=16,
    pose_model="toy",
    prompt="视频中的人在做动作",
    negative_prompt="blurred",
)

LATENT_CHANNELS = 6
TEXT_DIM = 20
CLIP_DIM = 28
CLIP_SIZE = 32  # pixels per side
INNER_DIM = 2 * 24

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 2 * LATENT_CHANNELS + 4,
    "latent_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 4,
    "image_dim": CLIP_DIM,
    "added_kv_proj_dim": INNER_DIM,
    "motion_encoder_channel_sizes": {"4": 12, "8": 10, "16": 8},
    "motion_encoder_size": TINY_DEFAULTS.face_size,
    "motion_style_dim": 14,
    "motion_dim": 6,
    "motion_encoder_dim": 18,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 2,  # two face adapters
}
VAE_CONFIG: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": LATENT_CHANNELS,
    "num_res_blocks": 1,
    "latents_mean": [-0.3, 0.2, 0.1, -0.1, 0.4, 0.0],
    "latents_std": [1.3, 0.7, 1.1, 0.9, 0.8, 1.2],
}


def build_networks(
    seed: int = 0,
    transformer_class: type[WanAnimateTransformer3DModel] = EverAnimateTransformer3DModel,
) -> dict[str, Any]:
    """The networks by their names in a checkpoint; a seed always gives the same weights.

    The same seed gives stock's transformer class the weights of ours.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks: dict[str, Any] = {
            "transformer": transformer_class(**TRANSFORMER_CONFIG),
            "vae": AutoencoderKLWan(**VAE_CONFIG),
            "text_encoder": UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(pre_tokenizers.ByteLevel.alphabet()) + 2,
                    d_model=TEXT_DIM,
                    d_kv=8,
                    d_ff=32,
                    num_layers=2,
                    num_heads=3,
                )
            ),
            "image_encoder": CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=CLIP_DIM,
                    intermediate_size=56,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=CLIP_SIZE,
                    patch_size=8,
                )
            ),
        }
    for network in networks.values():
        network.eval().requires_grad_(False)
    # Fresh weights make little of their inputs: without these gains a result would hardly change
    # with the memory, the pose or the prompt, and tests of that could not fail.
    networks["transformer"].patch_embedding.weight.mul_(3)
    networks["transformer"].proj_out.weight.mul_(4)
    networks["vae"].quant_conv.weight.mul_(40)
    networks["text_encoder"].encoder.final_layer_norm.weight.mul_(20)
    return networks


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that it knows every text."""
    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def build_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE}
    )


def build_tiny_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> AnimatePipeline:
    """The pipeline that loading `write_tiny_checkpoint(..., seed)` gives, on the CPU.

    Args:
        seed: Of the weights.
        dtype: Of transformer, text and image encoder; the VAE stays float32.
    """
    networks = build_networks(seed)
    networks["text_encoder"].to(dtype)
    networks["image_encoder"].to(dtype)
    for name, parameter in networks["transformer"].named_parameters():
        if not any(part in name for part in EverAnimateTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)  # as loading with a dtype does
    return AnimatePipeline(
        **networks,
        tokenizer=build_tokenizer(),
        image_processor=build_image_processor(),
        device=torch.device("cpu"),
    )


def draw_inputs(
    *,
    num_identity_slots: int = 2,
    num_target_slots: int = 3,
    cells: tuple[int, int] = (6, 8),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """What the transformer is given at a step: noise, without padding after the prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    height, width = cells
    num_slots = num_identity_slots + num_target_slots
    num_clip_tokens = (CLIP_SIZE // 8) ** 2 + 1
    return {
        "hidden_states": draw(1, TRANSFORMER_CONFIG["in_channels"], num_slots, height, width),
        "timestep": torch.tensor([600.0], dtype=torch.float64),
        "encoder_hidden_states": draw(1, 512, TEXT_DIM),
        "encoder_hidden_states_image": draw(1, num_clip_tokens, CLIP_DIM),
        "pose_embeds": draw(1, INNER_DIM, num_target_slots, height // 2, width // 2),
        "face_tokens": draw(1, num_target_slots, 5, INNER_DIM),
    }


def build_tiny_rollout(*, guidance_scale: float = 1.0, **changes: Any) -> Rollout:
    """The chunk loop over three chunks of five frames, driven by noise."""
    pipeline = build_tiny_pipeline()
    frames = np.random.default_rng(0).integers(0, 256, (30, 16, 32, 3), dtype=np.uint8)
    options: dict[str, Any] = {"num_inference_steps": 2, **changes}
    if guidance_scale != 1:
        options["negative_prompt_embeds"] = pipeline.encode_prompt("a longer text")
    return Rollout(
        pipeline=pipeline,
        reference_u8=frames[0],
        picture_u8=frames[0],
        views_u8=[],
        read_driving=lambda k: (frames[k : k + 5], frames[k : k + 5, :, :16]),
        noise=lambda k: chunk_noise(3, k, (1, LATENT_CHANNELS, 3, 2, 4)),
        anchor_frame_indices=[],
        prompt_embeds=pipeline.encode_prompt("dance"),
        num_chunks=3,
        frames_per_chunk=5,
        overlap=4,
        num_identity_slots=1,
        shift=5.0,
        guidance_scale=guidance_scale,
        **options,
    )


def build_stock_pipeline(seed: int = 0) -> WanAnimatePipeline:
    """diffusers' pipeline with the networks of `build_tiny_pipeline(seed)`."""
    return WanAnimatePipeline(
        **build_networks(seed, WanAnimateTransformer3DModel),
        tokenizer=build_tokenizer(),
        image_processor=build_image_processor(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    )


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Save a checkpoint as diffusers lays it out, with `everanimate.json` beside it.

    Args:
        folder: Made if missing.
        seed: Of the weights.

    Returns:
        `folder`.
    """
    build_stock_pipeline(seed).save_pretrained(folder)
    text = json.dumps(TINY_DEFAULTS.to_json(), ensure_ascii=False, indent=2)
    (folder / MODEL_DEFAULTS_FILE).write_text(text, encoding="utf-8")
    return folder
