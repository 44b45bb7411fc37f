"""Train the embedded toy checkpoint from scratch on the toy world, stage by stage.

    python -m everanimate_cli.toy_training render      --work DIR
    python -m everanimate_cli.toy_training vae         --work DIR --minutes 35
    python -m everanimate_cli.toy_training encoders    --work DIR --minutes 5
    python -m everanimate_cli.toy_training latents     --work DIR
    python -m everanimate_cli.toy_training transformer --work DIR --minutes 60 --compile
    python -m everanimate_cli.toy_training export      --work DIR --output everanimate_cli/toy_model

Every stage can be stopped and started again: it goes on from its last checkpoint in DIR, at most a
minute old, and adds to the minutes already spent. On a CPU the work is shared by `--processes`
single-threaded processes whose gradients are averaged, which is faster than one process with
threads at this size; on a GPU one process is used.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.multiprocessing
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from everanimate_cli import toyworld
from everanimate_cli.clip_image import CLIP_MEAN, CLIP_STD
from everanimate_cli.memory import build_condition, build_pixel_condition
from everanimate_cli.schedule import training_schedule
from everanimate_cli.settings import MODEL_DEFAULTS_FILE, ModelDefaults
from everanimate_cli.toy_loop import Loss, LossFunction, TrainingPlan, load_average, train
from everanimate_cli.transformer import NUM_TEXT_TOKENS, EverAnimateTransformer3DModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("everanimate.toy_training")

SIZE_PX = 64
FRAMES_PER_CHUNK = 21
OVERLAP = 4
NUM_IDENTITY_SLOTS = 4
LATENT_CHANNELS = 32

# A rendered video: one stretch of neighbouring frames, then frames of the same scene from other
# times, then the person standing still.
NUM_NEIGHBOURS = 2 * FRAMES_PER_CHUNK + OVERLAP + 4
NUM_FAR = 7
FRAMES_PER_VIDEO = NUM_NEIGHBOURS + NUM_FAR + 1
MOVING_CAMERA_SHARE = 1 / 3
FAR_RANGE_S = 40.0

VAE_CONFIG: dict[str, Any] = {
    "base_dim": 24,
    "decoder_base_dim": 24,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}


# --- the rendered set ----------------------------------------------------------------------------


def has_moving_camera(seed: int) -> bool:
    """Whether the camera of the scene with this seed moves."""
    return bool(np.random.default_rng([seed, 5]).random() < MOVING_CAMERA_SHARE)


def training_scene(seed: int) -> toyworld.ToyScene:
    """The scene with this seed: person, dance, room and camera all follow from it."""
    camera: toyworld.Camera = "moving" if has_moving_camera(seed) else "still"
    return toyworld.ToyScene(seed, seed, height=SIZE_PX, width=SIZE_PX, camera=camera)


def _render_video(seed: int) -> dict[str, NDArray[Any]]:
    """All frames of one training video with the labels that the motion encoder learns from."""
    cv2.setNumThreads(1)
    scene = training_scene(seed)
    rng = np.random.default_rng([seed, 6])
    start_s = rng.uniform(FAR_RANGE_S, 2 * FAR_RANGE_S)
    times_s = [start_s + i / toyworld.FRAME_RATE_FPS for i in range(NUM_NEIGHBOURS)]
    times_s += list(start_s + rng.uniform(-FAR_RANGE_S, FAR_RANGE_S, NUM_FAR))
    frames = [scene.frame_at(t) for t in times_s]
    labels = []
    for time_s in times_s:
        mouth, shut = scene.dance.face(time_s)
        look = float(scene.dance.joints(time_s, scene.person)["look"][0])
        labels.append((np.sin(look), np.cos(look), mouth, float(shut)))
    return {
        "rgb": np.stack([f.rgb for f in frames] + [scene.reference()]),
        "pose": np.stack([f.pose for f in frames[:NUM_NEIGHBOURS]]),
        "face": np.stack([f.face for f in frames[:NUM_NEIGHBOURS]]),
        "labels": np.array(labels[:NUM_NEIGHBOURS], np.float32),
    }


def _video_shapes(num_videos: int) -> dict[str, tuple[tuple[int, ...], type]]:
    face = toyworld.FACE_SIZE_PX
    return {
        "rgb": ((num_videos, FRAMES_PER_VIDEO, SIZE_PX, SIZE_PX, 3), np.uint8),
        "pose": ((num_videos, NUM_NEIGHBOURS, SIZE_PX, SIZE_PX, 3), np.uint8),
        "face": ((num_videos, NUM_NEIGHBOURS, face, face, 3), np.uint8),
        "labels": ((num_videos, NUM_NEIGHBOURS, 4), np.float32),
    }


def render(work: Path, num_videos: int, processes: int) -> None:
    """Draw the training videos into memory-mapped arrays `videos_*.npy`."""
    work.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.lib.format.open_memmap(
            work / f"videos_{name}.partial.npy", mode="w+", dtype=dtype, shape=shape
        )
        for name, (shape, dtype) in _video_shapes(num_videos).items()
    }
    started_s = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for index, video in enumerate(pool.imap(_render_video, range(num_videos), chunksize=8)):
            for name, values in video.items():
                arrays[name][index] = values
            if (index + 1) % 500 == 0:
                log.info("rendered %d videos in %.0f s", index + 1, time.monotonic() - started_s)
    for name, array in arrays.items():
        array.flush()
        (work / f"videos_{name}.partial.npy").replace(work / f"videos_{name}.npy")


def open_videos(work: Path, name: str) -> NDArray[Any]:
    """A rendered array, read from disk as needed."""
    return np.asarray(np.load(work / f"videos_{name}.npy", mmap_mode="r"))


def to_pixels(frames_u8: NDArray[np.uint8]) -> Tensor:
    """[..., S, H, W, 3] uint8 to [..., 3, S, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(frames_u8, np.float32)) * (2 / 255) - 1
    return pixels.movedim(-1, -4)


# --- stage: VAE ----------------------------------------------------------------------------------

# What one process sees in one step, (frames, clips). Single pictures bring variety, without which
# the normalised updates chase the colours of one clip; whole chunks keep the end of a chunk from
# fading.
_CLIPS_PER_STEP = ((1, 4), (5, 1), (21, 1))
_POSE_SHARE, _EMPTY_SHARE = 0.35, 0.04
_KL_WEIGHT = 1e-4
_FIRST_LOG_VARIANCE = -6.0


def build_vae() -> AutoencoderKLWan:
    """The toy VAE with fresh weights, started so that it can learn at once.

    Residual branches start at zero, the posterior starts narrow, and a constant on some channels
    keeps the last norms from erasing how bright a place is.
    """
    vae = AutoencoderKLWan(**VAE_CONFIG)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith("conv2"):
                module.weight.zero_()
                module.bias.zero_()
            elif name.endswith("attentions.0"):
                module.proj.weight.zero_()
                module.proj.bias.zero_()
        for block in (vae.encoder.mid_block, vae.decoder.up_blocks[-1]):
            block.resnets[-1].conv2.bias[:4] = 2.0
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = _FIRST_LOG_VARIANCE
    return vae


def _vae_loss(work: Path, device: torch.device) -> LossFunction:
    videos, poses = open_videos(work, "rgb"), open_videos(work, "pose")
    scale = 8 if device.type == "cuda" else 1

    def draw(rng: np.random.Generator, num_frames: int, pose: bool) -> Tensor:
        source = poses if pose else videos
        start = int(rng.integers(NUM_NEIGHBOURS - num_frames + 1))
        clip = to_pixels(source[rng.integers(len(source)), start : start + num_frames])
        if rng.random() < _EMPTY_SHARE:  # carried frames and then nothing; a pose that was dropped
            clip[:, int(rng.integers(num_frames)) :] = -1.0 if pose else 0.0
        return clip.flip(-1) if not pose and rng.random() < 0.5 else clip

    def loss(model: torch.nn.Module, rng: np.random.Generator) -> Loss:
        total, divergence, weight_sum = 0.0, 0.0, 0
        errors: dict[str, list[Tensor]] = {"rgb": [], "pose": []}
        for num_frames, num_clips in _CLIPS_PER_STEP:
            is_pose = [rng.random() < _POSE_SHARE for _ in range(num_clips * scale)]
            pixels = torch.stack([draw(rng, num_frames, pose) for pose in is_pose]).to(device)
            posterior = model.encode(pixels).latent_dist  # type: ignore[operator]
            restored = model.decode(posterior.sample()).sample.float()  # type: ignore[operator]
            error = restored - pixels
            squared = error.square()
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float()
            total = total + num_clips * (squared.mean() + 0.05 * error.abs().mean())
            divergence = divergence + num_clips * kl.mean()
            weight_sum += num_clips
            for pose, value in zip(is_pose, squared.detach().mean((1, 2, 3, 4)), strict=True):
                errors["pose" if pose else "rgb"].append(value)
        result = {
            "loss": (total + _KL_WEIGHT * divergence) / weight_sum,
            "kl": divergence.detach() / weight_sum,  # type: ignore[attr-defined]
        }
        for name, values in errors.items():
            if values:
                result[f"{name}_db"] = -10 * torch.log10(torch.stack(values).mean() / 4)
        return result

    return loss


def train_vae(work: Path, minutes: float, processes: int) -> None:
    """Stage `vae`."""
    plan = TrainingPlan(name="vae", minutes=minutes, processes=processes, adam_lr=3e-3)
    train(work, plan, build_vae, _vae_loss, use_adam=_is_edge_of_vae)


def _is_edge_of_vae(name: str) -> bool:
    """First and last convolutions learn better with AdamW."""
    return "conv_in" in name or "conv_out" in name or "quant_conv" in name


# --- stage: encoders (CLIP with text, motion) ----------------------------------------------------

PROMPT = "the person in the video is moving"
CAMERA_PROMPTS = (
    "still camera, ",
    "moving camera, ",
)  # before every prompt: one picture cannot tell
TEXT_VOCABULARY = 160
TEXT_DIM = IMAGE_DIM = 64
IMAGE_TEXT_BATCH = 64

CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": IMAGE_DIM,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE_PX,
    "patch_size": 16,
    "projection_dim": 64,
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": TEXT_VOCABULARY,
    "d_model": TEXT_DIM,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in T5's conventions, learnt from the world's captions."""
    captions = [toyworld.make_person(seed).words for seed in range(500)]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=TEXT_VOCABULARY,
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(32, 127)],
        show_progress=False,
    )
    texts = [*captions, *([PROMPT] * 50)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model = models.Unigram(_with_unseen_in_order(tokenizer, texts), unk_id=2)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _with_unseen_in_order(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[str, float]]:
    """Pieces and scores without what the trainer leaves to chance.

    That is the order of the characters which no text has, and the last digits of the scores.
    """
    pieces: list[tuple[str, float]] = json.loads(tokenizer.to_str())["model"]["vocab"]
    seen = set("".join(texts).replace(" ", "▁"))
    unseen = sorted(piece for piece, _ in pieces if len(piece) == 1 and piece not in seen)
    in_order = iter(unseen)
    return [
        (next(in_order) if piece in unseen else piece, round(score, 6)) for piece, score in pieces
    ]


class _ImageTextModel(torch.nn.Module):
    """CLIP vision and T5 text towers with the projections that only their training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = CLIPVisionModel(CLIPVisionConfig(**CLIP_CONFIG))
        self.text = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
        self.image_projection = torch.nn.Linear(IMAGE_DIM, 64)
        self.text_projection = torch.nn.Linear(TEXT_DIM, 64)
        self.log_temperature = torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, B] similarity of pictures and captions."""
        # The layer before the last is what the network reads, so that is what must carry the
        # meaning.
        seen = self.image(images, output_hidden_states=True).hidden_states[-2].mean(1)
        read = self.text(tokens, attention_mask=mask).last_hidden_state
        read = (read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        seen = torch.nn.functional.normalize(self.image_projection(seen), dim=-1)
        read = torch.nn.functional.normalize(self.text_projection(read), dim=-1)
        return seen @ read.T * self.log_temperature.exp()


def _image_text_loss(work: Path, device: torch.device) -> LossFunction:
    videos = open_videos(work, "rgb")
    tokenizer = build_tokenizer()
    captions = [toyworld.make_person(seed).words for seed in range(len(videos))]
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    batch_size = IMAGE_TEXT_BATCH

    def loss(model: torch.nn.Module, rng: np.random.Generator) -> Loss:
        chosen = np.sort(rng.choice(len(videos), batch_size, replace=False))
        pictures = [videos[i, rng.integers(FRAMES_PER_VIDEO)] for i in chosen]
        images = (to_pixels(np.stack(pictures)[:, None])[:, :, 0] + 1) / 2
        images = ((images - mean) / std).to(device)
        tokens = encoded["input_ids"][chosen].to(device)
        mask = encoded["attention_mask"][chosen].to(device)
        logits = model(images, tokens, mask).float()
        target = torch.arange(batch_size, device=device)
        cross_entropy = torch.nn.functional.cross_entropy
        total = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        hits = (logits.argmax(1) == target).float().mean()
        return {"loss": total, "hits": hits.detach()}

    return loss


class _MotionModel(torch.nn.Module):
    """The motion encoder with a linear read-out of what the face does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_transformer().motion_encoder
        self.read_out = torch.nn.Linear(TRANSFORMER_CONFIG["motion_encoder_dim"], 4)

    def forward(self, faces: Tensor) -> Tensor:
        """[B, 3, Hf, Wf] to [B, 4]: sine and cosine of the heading, mouth, blink."""
        return self.read_out(self.encoder(faces))


def _motion_loss(work: Path, device: torch.device) -> LossFunction:
    faces, labels = open_videos(work, "face"), open_videos(work, "labels")
    batch_size = 48

    def loss(model: torch.nn.Module, rng: np.random.Generator) -> Loss:
        videos = np.sort(rng.integers(len(faces), size=batch_size))
        frames = rng.integers(NUM_NEIGHBOURS, size=batch_size)
        crops = faces[videos, frames]
        target = torch.from_numpy(labels[videos, frames]).to(device)
        visible = torch.from_numpy(crops.reshape(batch_size, -1).any(1)).to(device)
        pixels = to_pixels(crops[:, None])[:, :, 0].to(device)
        error = (model(pixels).float() - target * visible[:, None]).square().mean(0)
        names = ("sin", "cos", "mouth", "blink")
        return {"loss": error.sum()} | dict(zip(names, error.detach(), strict=True))

    return loss


def train_encoders(work: Path, minutes: float) -> None:
    """Stage `encoders`: half the time for pictures with words, half for faces."""
    plan = TrainingPlan(
        name="image_text", minutes=minutes / 2, processes=1, muon_lr=0.01, adam_lr=1e-3
    )
    train(work, plan, _ImageTextModel, _image_text_loss, use_adam=lambda name: "embed" in name)
    plan = TrainingPlan(name="motion", minutes=minutes / 2, processes=1, muon_lr=0.0, adam_lr=1e-3)
    train(work, plan, _MotionModel, _motion_loss, use_adam=lambda _name: True)


# --- the transformer -----------------------------------------------------------------------------

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 7,
    "attention_head_dim": 32,
    "in_channels": 2 * LATENT_CHANNELS + 4,
    "latent_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 640,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": IMAGE_DIM,
    "added_kv_proj_dim": 224,
    "rope_max_seq_len": 1024,
    "motion_encoder_channel_sizes": {"4": 48, "8": 32, "16": 24, "32": 16},
    "motion_encoder_size": toyworld.FACE_SIZE_PX,
    "motion_style_dim": 48,
    "motion_dim": 12,
    "motion_encoder_dim": 48,
    "face_encoder_hidden_dim": 48,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 3,
    "motion_encoder_batch_size": 8,
}


def build_transformer() -> EverAnimateTransformer3DModel:
    """The toy network with fresh weights."""
    return EverAnimateTransformer3DModel(**TRANSFORMER_CONFIG)


# --- stage: latents ------------------------------------------------------------------------------

MAX_TEXT_TOKENS = 64
VIDEOS_PER_SHARD = 50
NUM_CANDIDATES = 7  # anchor candidates from the previous chunk, and as many from far away


def load_half_precision(work: Path, name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The averaged weights as the exported file will hold them: rounded to half precision."""
    return load_average(work, name, model).half().float()


@dataclass(frozen=True)
class _FrozenParts:
    """What turns a rendered video into training tensors."""

    vae: AutoencoderKLWan
    image: CLIPVisionModel
    text: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerFast
    motion: torch.nn.Module
    latents_mean: Tensor  # [C]
    latents_std: Tensor  # [C]

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, H, W] in [-1, 1] to [B, C, T, h, w] normalised latents."""
        posterior = self.vae.encode(pixels).latent_dist
        mean, std = (v.view(1, -1, 1, 1, 1) for v in (self.latents_mean, self.latents_std))
        return (posterior.mode() - mean) / std

    def see(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, tokens, IMAGE_DIM] CLIP features."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        values = (pictures / 2 + 0.5 - mean) / std
        return self.image(values, output_hidden_states=True).hidden_states[-2]

    def read(self, prompt: str) -> Tensor:
        """[MAX_TEXT_TOKENS, TEXT_DIM] text features of a prompt, zeros after the last token."""
        tokens = self.tokenizer(
            prompt, return_tensors="pt", truncation=True, max_length=MAX_TEXT_TOKENS - 1
        )
        words = self.text(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0][0]
        return torch.nn.functional.pad(words, (0, 0, 0, MAX_TEXT_TOKENS - len(words)))


def _load_frozen_parts(work: Path) -> _FrozenParts:
    towers = load_half_precision(work, "image_text", _ImageTextModel())
    motion = load_half_precision(work, "motion", _MotionModel())
    vae = load_half_precision(work, "vae", build_vae())
    statistics = json.loads((work / "latents.json").read_text())
    return _FrozenParts(
        vae=vae,  # type: ignore[arg-type]
        image=towers.image,  # type: ignore[arg-type]
        text=towers.text,  # type: ignore[arg-type]
        tokenizer=build_tokenizer(),
        motion=motion.encoder,  # type: ignore[arg-type]
        latents_mean=torch.tensor(statistics["latents_mean"]),
        latents_std=torch.tensor(statistics["latents_std"]),
    )


def measure_latents(work: Path) -> None:
    """Mean and deviation of each latent channel over whole chunks, into `latents.json`."""
    vae = load_half_precision(work, "vae", build_vae())
    videos = open_videos(work, "rgb")
    chosen = np.unique(np.linspace(0, len(videos) - 1, 150).astype(int))
    with torch.no_grad():
        latents = torch.cat([
            vae.encode(to_pixels(videos[i : i + 1, :FRAMES_PER_CHUNK])).latent_dist.mode()  # type: ignore[operator]
            for i in chosen
        ])  # fmt: skip
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    text = json.dumps({"latents_mean": mean.tolist(), "latents_std": std.tolist()})
    (work / "latents.json").write_text(text)
    log.info("latents: deviation of the channels %.3f to %.3f", std.min(), std.max())


@torch.no_grad()
def _training_tensors(parts: _FrozenParts, seed: int) -> dict[str, NDArray[np.float16]]:
    """All that the transformer's training reads of one video (method page section 3, windows)."""
    video = _render_video(seed)
    rng = np.random.default_rng([seed, 8])
    rgb, pose, face = (to_pixels(video[name]) for name in ("rgb", "pose", "face"))  # [3, S, ., .]
    start = int(rng.integers(NUM_NEIGHBOURS - 2 * FRAMES_PER_CHUNK - OVERLAP + 1))
    previous_start = start + OVERLAP
    target_start = start + FRAMES_PER_CHUNK + OVERLAP
    window = slice(target_start, target_start + FRAMES_PER_CHUNK)
    previous = rgb[:, previous_start : target_start + OVERLAP]
    carried = torch.zeros(2, 3, FRAMES_PER_CHUNK, SIZE_PX, SIZE_PX)
    for row, count in enumerate((1, 5)):
        carried[row, :, :count] = rgb[:, target_start : target_start + count]
    chunks = parts.encode(torch.cat([torch.stack([rgb[:, window], pose[:, window]]), carried]))
    near = previous_start + np.sort(
        rng.choice(previous.shape[1] - OVERLAP, NUM_CANDIDATES, replace=False)
    )
    far = np.arange(NUM_NEIGHBOURS, NUM_NEIGHBOURS + NUM_FAR)
    references = (start + int(rng.integers(OVERLAP)), FRAMES_PER_VIDEO - 1)
    single = parts.encode(rgb[:, [*near, *far, *references]].transpose(0, 1)[:, :, None])
    pictures = rgb[:, [*references, target_start]].transpose(0, 1)
    tensors = {
        "target": chunks[0],
        "pose": chunks[1],
        "carry1": chunks[2],
        "carry5": chunks[3],
        "motion": parts.encode(previous[None])[0, :, -1:],
        "single": single[:, :, 0].transpose(0, 1),  # [C, near, far, early and standing reference]
        "clip": parts.see(pictures),
        "face": parts.motion(face[:, window].transpose(0, 1)),
    }
    return {name: value.numpy().astype(np.float16) for name, value in tensors.items()}


_parts: _FrozenParts | None = None


def _encode_shard(work: Path, shard: int) -> int:
    """Render and encode one shard; worker processes load the networks once."""
    global _parts  # noqa: PLW0603  # one copy a process
    torch.set_num_threads(1)
    path = work / "latents" / f"{shard:05d}.safetensors"
    if not path.exists():
        if _parts is None:
            _parts = _load_frozen_parts(work)
        first = shard * VIDEOS_PER_SHARD
        rows = [_training_tensors(_parts, first + i) for i in range(VIDEOS_PER_SHARD)]
        temporary = path.with_suffix(".partial")
        # safetensors writes memory as it lies: arrays that were transposed must be laid out anew.
        arrays = {
            name: np.ascontiguousarray(np.stack([row[name] for row in rows])) for name in rows[0]
        }
        save_file(arrays, temporary)
        temporary.replace(path)
    return shard


def encode_latents(work: Path, num_videos: int, processes: int) -> None:
    """Stage `latents`: shards of training tensors; the transformer may train while they grow."""
    (work / "latents").mkdir(exist_ok=True)
    if not (work / "latents.json").exists():
        measure_latents(work)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        job = functools.partial(_encode_shard, work)
        for shard in pool.imap(job, range(-(-num_videos // VIDEOS_PER_SHARD))):
            if shard % 10 == 9:
                log.info("encoded %d videos", (shard + 1) * VIDEOS_PER_SHARD)


# --- stage: transformer --------------------------------------------------------------------------


# Shares of the memory modes in the mixture that the base learns: none must be off its distribution.
_MODE_SHARES = {"latent": 0.56, "alone": 0.2, "pixel": 0.24}
_FIRST_CHUNK_SHARE = 0.5
# The reference is a frame two seconds before the target, the person standing still, or, for the
# first chunk of a video only, the target's own opening frame (self-reenactment).
_REFERENCE_SHARES = {False: (0.55, 0.45, 0.0), True: (0.15, 0.15, 0.7)}
_PIXEL_CARRY_SHARES = (0.25, 0.4, 0.35)  # nothing, 1 and 5 frames
_POSE_DROP_SHARE = 0.05
_DEFAULT_PROMPT_SHARE = 0.5
_NOISY_MOTION_SHARE = 0.3
_UNSHIFTED_SHARE = 0.3
_TRAINING_SHIFT = 5.0
TRANSFORMER_BATCH = 16  # a process on a CPU


class _LatentSet:
    """The shards on disk, in memory, growing while the stage `latents` still runs."""

    def __init__(self, work: Path, parts: _FrozenParts) -> None:
        self._folder = work / "latents"
        self._parts = parts
        self._shards: list[dict[str, NDArray[Any]]] = []
        self._seen: set[Path] = set()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Load shards that are new and encode their captions."""
        for path in sorted(self._folder.glob("*.safetensors")):
            if path in self._seen:
                continue
            self._seen.add(path)
            shard: dict[str, NDArray[Any]] = load_numpy(path)
            first = int(path.stem) * VIDEOS_PER_SHARD
            seeds = range(first, first + VIDEOS_PER_SHARD)
            moving = [has_moving_camera(seed) for seed in seeds]
            words = [
                self._parts.read(CAMERA_PROMPTS[flag] + toyworld.make_person(seed).words)
                for seed, flag in zip(seeds, moving, strict=True)
            ]
            shard["text"] = torch.stack(words).numpy().astype(np.float16)
            shard["moving"] = np.array(moving)
            self._shards.append(shard)

    def draw(self, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """A batch of random videos as float32."""
        shards = rng.integers(len(self._shards), size=count)
        rows = rng.integers(VIDEOS_PER_SHARD, size=count)
        return {
            name: torch.from_numpy(
                np.stack([self._shards[s][name][r] for s, r in zip(shards, rows, strict=True)])
            ).float()
            for name in self._shards[0]
        }


@torch.no_grad()
def _constant_tensors(parts: _FrozenParts) -> dict[str, Tensor]:
    """Code of a grey video, of a black pose video, and the default prompts' features by camera."""
    grey = torch.zeros(1, 3, FRAMES_PER_CHUNK, SIZE_PX, SIZE_PX)
    prompts = torch.stack([parts.read(camera + PROMPT) for camera in CAMERA_PROMPTS])
    return {"grey": parts.encode(grey)[0], "black": parts.encode(grey - 1)[0], "prompts": prompts}


def _with_opening(batch: dict[str, Tensor]) -> Tensor:
    """Codes of the single frames, and as the last one that of the target's opening frame.

    The first slot of a causal code holds the first frame alone, as if it were a picture.
    """
    return torch.cat([batch["single"], batch["target"][:, :, :1]], dim=2)


def _identity_and_motion(
    batch: dict[str, Tensor], mode: str, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity slots, motion slot and CLIP tokens of a batch in a layout of four slots."""
    single = _with_opening(batch)
    identity, motion, clip = [], batch["motion"].clone(), []
    for row in range(len(single)):
        first = bool(rng.random() < _FIRST_CHUNK_SHARE)
        kind = int(rng.choice(3, p=_REFERENCE_SHARES[first]))
        reference = 2 * NUM_CANDIDATES + kind
        slots = [reference] * NUM_IDENTITY_SLOTS
        if not first and rng.random() > 0.05:
            pool = int(rng.random() < 0.5) * NUM_CANDIDATES
            count = NUM_IDENTITY_SLOTS - int(rng.random() < 0.6)
            drawn = pool + np.sort(rng.choice(NUM_CANDIDATES, count, replace=False))
            slots[:count] = [int(slot) for slot in drawn]
        if first or mode == "alone":
            motion[row] = 0
        elif rng.random() < _NOISY_MOTION_SHARE:
            motion[row] += torch.randn(motion[row].shape) * rng.uniform(0, 0.3)
        identity.append(single[row, :, slots])
        from_target = not first and rng.random() < 0.5
        clip.append(batch["clip"][row, 2 if from_target else kind])
    return torch.stack(identity), motion, torch.stack(clip)


def _pixel_layout(
    batch: dict[str, Tensor], grey: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity slot, condition and CLIP tokens of a batch as stock Wan-Animate lays them out."""
    carried = int(rng.choice([0, 1, 5], p=_PIXEL_CARRY_SHARES))
    kind = int(rng.choice(3, p=_REFERENCE_SHARES[carried == 0]))
    reference = _with_opening(batch)[:, :, [2 * NUM_CANDIDATES + kind]]
    video = batch[f"carry{carried}"] if carried else grey.expand_as(batch["target"])
    if carried and rng.random() < _NOISY_MOTION_SHARE:
        video = video + torch.randn_like(video) * rng.uniform(0, 0.3)
    return reference, build_pixel_condition(reference, video, carried), batch["clip"][:, kind]


def _transformer_loss(work: Path, device: torch.device) -> LossFunction:
    parts = _load_frozen_parts(work)
    latents = _LatentSet(work, parts)
    constants = _constant_tensors(parts)
    sigmas = training_schedule(_TRAINING_SHIFT).sigmas
    batch_size = TRANSFORMER_BATCH * (8 if device.type == "cuda" else 1)
    step = 0

    def loss(model: torch.nn.Module, rng: np.random.Generator) -> Loss:
        nonlocal step
        step += 1
        if step % 100 == 0:
            latents.refresh()
        batch = latents.draw(rng, batch_size)
        # The same in all processes, so that none waits for a longer layout.
        shared = np.random.default_rng([step, 9])
        mode = str(shared.choice(list(_MODE_SHARES), p=list(_MODE_SHARES.values())))
        if mode == "pixel":
            identity, condition, clip = _pixel_layout(batch, constants["grey"], rng)
        else:
            identity, motion, clip = _identity_and_motion(batch, mode, rng)
            condition = build_condition(identity, motion, batch["target"].shape[2])
        clean = torch.cat([identity, batch["target"]], dim=2)
        dropped = torch.from_numpy(rng.random(batch_size) < _POSE_DROP_SHARE)
        pose = torch.where(dropped.view(-1, 1, 1, 1, 1), constants["black"], batch["pose"])
        plain = torch.from_numpy(rng.random(batch_size) < _DEFAULT_PROMPT_SHARE)
        default = constants["prompts"][batch["moving"].long()]
        text = torch.where(plain.view(-1, 1, 1), default, batch["text"])
        text = torch.nn.functional.pad(text, (0, 0, 0, NUM_TEXT_TOKENS - MAX_TEXT_TOKENS))
        sigma = sigmas[rng.integers(len(sigmas), size=batch_size)]
        unshifted = torch.from_numpy(rng.random(batch_size) < _UNSHIFTED_SHARE)
        sigma = torch.where(unshifted, torch.rand(batch_size), sigma)
        noise = torch.randn_like(clean)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        # On a CPU the fused attention's backward pass is several times slower than explicit
        # attention at this size.
        explicit = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with explicit:
            velocity = model(
                torch.cat([noisy, condition], dim=1).to(device),
                (1000 * sigma).to(device),
                text.to(device),
                clip.to(device),
                model.embed_pose(pose.to(device)),  # type: ignore[operator]
                model.face_encoder(batch["face"].to(device)),  # type: ignore[operator]
            )
        squared = (velocity.float() - (noise - clean).to(device)).square()
        num_identity = identity.shape[2]
        target = squared[:, :, num_identity:].detach().mean()
        identity_part = squared[:, :, :num_identity].detach().mean()
        return {"loss": squared.mean(), "target": target, "identity": identity_part, mode: target}

    return loss


def _build_for_training(work: Path) -> EverAnimateTransformer3DModel:
    """The network with the trained motion encoder, which stays as it is."""
    model = build_transformer()
    motion = load_average(work, "motion", _MotionModel())
    model.motion_encoder.load_state_dict(motion.encoder.state_dict())  # type: ignore[union-attr]
    model.motion_encoder.requires_grad_(False)
    model.merge_padding()  # nearly all of the 512 text tokens are padding
    return model


def train_transformer(
    work: Path, minutes: float, processes: int, *, compiled: bool = False
) -> None:
    """Stage `transformer`; compiled its steps take 0.7 of the time, but it needs a C++ compiler."""
    plan = TrainingPlan(
        name="transformer",
        minutes=minutes,
        processes=processes,
        muon_lr=0.01,
        adam_lr=2e-3,
        ema=0.9995,
        warmup_steps=100,
        compile_each="blocks" if compiled else "",
    )
    build = functools.partial(_build_for_training, work)
    train(work, plan, build, _transformer_loss, use_adam=_is_edge_of_transformer)


def _is_edge_of_transformer(name: str) -> bool:
    """What stands before and after the blocks, and the tables, learn better with AdamW."""
    inside = name.startswith(("blocks.", "face_adapter."))
    return not inside or "scale_shift_table" in name


# --- stage: export -------------------------------------------------------------------------------

MAX_CHECKPOINT_BYTES = 16_000_000


def export(work: Path, output: Path) -> None:
    """Write the checkpoint in half precision as diffusers lays it out, with `everanimate.json`."""
    statistics = json.loads((work / "latents.json").read_text())
    vae = AutoencoderKLWan(**(VAE_CONFIG | statistics))
    vae.load_state_dict(load_average(work, "vae", build_vae()).state_dict())
    towers = load_average(work, "image_text", _ImageTextModel())
    trained = load_average(work, "transformer", build_transformer())
    transformer = WanAnimateTransformer3DModel(**TRANSFORMER_CONFIG)
    transformer.load_state_dict(trained.state_dict())
    edge = {"height": SIZE_PX, "width": SIZE_PX}
    pipeline = WanAnimatePipeline(
        transformer=transformer.half(),
        vae=vae.half(),
        text_encoder=towers.text.half(),  # type: ignore[union-attr,operator]
        tokenizer=build_tokenizer(),
        image_encoder=towers.image.half(),  # type: ignore[union-attr,operator]
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE_PX}, crop_size=edge),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_TRAINING_SHIFT
        ),
    )
    pipeline.save_pretrained(output)
    defaults = ModelDefaults(
        fps=toyworld.FRAME_RATE_FPS,
        width=SIZE_PX,
        height=SIZE_PX,
        num_inference_steps=12,
        shift=_TRAINING_SHIFT,
        frames_per_chunk=FRAMES_PER_CHUNK,
        overlap=OVERLAP,
        identity_slots=NUM_IDENTITY_SLOTS,
        pose_model="toy",
        face_size=toyworld.FACE_SIZE_PX,
        prompt=CAMERA_PROMPTS[0] + PROMPT,
    )
    text = json.dumps(defaults.to_json(), indent=2)
    (output / MODEL_DEFAULTS_FILE).write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    log.info("%s: %.2f MB", output, size / 1e6)
    if size > MAX_CHECKPOINT_BYTES:
        raise SystemExit(f"the checkpoint has {size} bytes, more than {MAX_CHECKPOINT_BYTES}")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "stage", choices=["render", "vae", "encoders", "latents", "transformer", "export"]
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of data and checkpoints")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of the stage in all")
    parser.add_argument("--videos", type=int, default=3000, help="videos to render")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer (needs a C++ compiler)"
    )
    parser.add_argument("--output", type=Path, help="folder of the exported checkpoint")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.stage == "render":
        render(options.work, options.videos, options.processes)
    elif options.stage == "vae":
        train_vae(options.work, options.minutes, options.processes)
    elif options.stage == "encoders":
        train_encoders(options.work, options.minutes)
    elif options.stage == "latents":
        encode_latents(options.work, options.videos, options.processes)
    elif options.stage == "transformer":
        train_transformer(
            options.work, options.minutes, options.processes, compiled=options.compile
        )
    elif options.stage == "export":
        export(options.work, options.output or Path(__file__).parent / "toy_model")


if __name__ == "__main__":
    main()
