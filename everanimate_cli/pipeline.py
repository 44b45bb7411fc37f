"""The networks of one checkpoint and what they compute: encode, denoise, decode.

Nothing here knows of chunks, files or the length of a video; `rollout` strings these calls
together. Latents cross the borders of this module normalised and in float32, pictures as uint8 or
as float pixels in [-1, 1].
"""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

# The same function as the Wan-Animate pipeline's, whose import warns of a missing torchvision.
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from everanimate_cli.acceleration import use_channels_last
from everanimate_cli.clip_image import clip_pixel_values
from everanimate_cli.memory import from_uint8
from everanimate_cli.piecewise import work_in_bands
from everanimate_cli.schedule import euler_step, model_timestep
from everanimate_cli.transformer import NUM_TEXT_TOKENS, EverAnimateTransformer3DModel, Shared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffusers import AutoencoderKLWan
    from numpy.typing import NDArray
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        UMT5EncoderModel,
    )

    from everanimate_cli.offloading import Rota
    from everanimate_cli.step_cache import StepCache


_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Everything that is constant over the steps of one chunk, ready for the network.

    Attributes:
        condition: [1, 4+C, L, h, w] mask and memory.
        pose_embeds: [1, inner, T, h/2, w/2].
        face_tokens: [1, T, N, inner].
        prompt_embeds: [1, 512, text_dim].
        clip_embeds: [1, tokens, image_dim].
        negative_prompt_embeds: [1, 512, text_dim] with guidance, else None.
        blank_face_tokens: [1, T, N, inner] of a black face video with guidance, else None.
    """

    condition: Tensor
    pose_embeds: Tensor
    face_tokens: Tensor
    prompt_embeds: Tensor
    clip_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    blank_face_tokens: Tensor | None = None


@dataclass(kw_only=True)
class AnimatePipeline:
    """The networks of a checkpoint, which compute on one device.

    Attributes:
        transformer: The velocity network.
        vae: Video autoencoder; its config holds the latents' mean and deviation.
        text_encoder: UMT5 encoder; None once the prompt is encoded. May stay on the CPU.
        tokenizer: Of the text encoder.
        image_encoder: CLIP vision model.
        image_processor: CLIP's own preprocessing, used with pixel memory only.
        device: Where latents and all other results are.
        rota: Who brings a network to the device when it is needed; None where all are there.
        tile_decoding: Whether frames are decoded in tiles. Encoding never is: anchors and poses are
            encoded whole, as in training.
    """

    transformer: EverAnimateTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerFast | None
    image_encoder: CLIPVisionModel
    image_processor: CLIPImageProcessor | None
    device: torch.device
    rota: Rota | None = None
    tile_decoding: bool = False

    def __post_init__(self) -> None:
        """Make networks take the faster of two ways whose results differ by rounding only."""
        if self.transformer.dtype == torch.float32:
            self.transformer.merge_padding()
        if self.device.type == "cpu":
            if _has_fast_onednn():
                _convolve_with_onednn(self.vae)
                use_channels_last(self.vae)
        elif self.device.type == "cuda":
            use_channels_last(self.vae)
            work_in_bands(self.vae)

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.vae.config.z_dim)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell."""
        return int(self.vae.config.scale_factor_spatial)

    @property
    def size_multiple(self) -> int:
        """What width and height of a video must be multiples of."""
        return self.spatial_stride * int(self.transformer.config.patch_size[-1])

    @property
    def face_size(self) -> int:
        """Side of the face crops, pixels."""
        return int(self.transformer.config.motion_encoder_size)

    @property
    def may_overlap(self) -> bool:
        """Whether two networks can compute at once; those that share the card cannot."""
        return self.rota is None or self.rota.may_overlap

    def encode_prompt(self, prompt: str) -> Tensor:
        """Text tokens of a prompt, zeros after the last.

        Returns:
            [1, 512, text_dim] in the network's dtype.

        Source: method page section 2, "Text and CLIP".
        """
        assert self.text_encoder is not None, "the text encoder was released"
        assert self.tokenizer is not None
        embeds = encode_text(self.text_encoder, self.tokenizer, prompt)
        return self.take_prompt(embeds)

    def take_prompt(self, prompt_embeds: Tensor) -> Tensor:
        """Text tokens [1, 512, text_dim] from elsewhere, as the network takes them."""
        return prompt_embeds.to(self.device, self.transformer.dtype)

    def _need(self, name: str) -> None:
        """To be called before a network is used."""
        if self.rota is not None:
            self.rota.bring(name)

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back; prompts are encoded once per run."""
        self.text_encoder = None
        self.tokenizer = None

    @torch.no_grad()
    def encode_clip(self, frame_u8: NDArray[np.uint8]) -> Tensor:
        """CLIP tokens of a frame, preprocessed as the released code does.

        Args:
            frame_u8: [H, W, 3] RGB at the size of the video.

        Returns:
            [1, tokens, image_dim] in the network's dtype.

        Source: method page section 2, "Text and CLIP"; parity file `clip.safetensors`.
        """
        height, width = frame_u8.shape[:2]
        size = int(self.image_encoder.config.image_size)
        return self._clip_tokens(clip_pixel_values(frame_u8[None], height, width, size))

    @torch.no_grad()
    def encode_clip_as_stock(self, picture_u8: NDArray[np.uint8]) -> Tensor:
        """CLIP tokens of the unresized reference through the checkpoint's own image processor.

        Args:
            picture_u8: [H, W, 3] RGB.

        Returns:
            [1, tokens, image_dim] in the network's dtype.

        Source: method page section 3, "Comparison modes"; diffusers' `WanAnimatePipeline`.
        """
        assert self.image_processor is not None
        values = self.image_processor(images=picture_u8, return_tensors="pt")["pixel_values"]
        return self._clip_tokens(values)

    def _clip_tokens(self, pixel_values: Tensor) -> Tensor:
        self._need("image_encoder")
        encoder = self.image_encoder
        seen = encoder(pixel_values.to(encoder.device, encoder.dtype), output_hidden_states=True)
        if self.rota is not None:
            self.rota.clear()  # not needed again before the next chunk
        return seen.hidden_states[-2].to(self.device, self.transformer.dtype)

    @torch.no_grad()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """VAE code (the distribution's mode) of a video.

        Args:
            pixels: [B, 3, S, H, W] in [-1, 1], S = 4n+1.

        Returns:
            [B, C, n+1, h, w] normalised, float32.
        """
        self._need("vae")
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents = posterior.mode().float()
        mean, inverse_std = self._latent_statistics()
        return ((latents - mean) * inverse_std).contiguous()

    def encode_pictures(self, frames_u8: NDArray[np.uint8]) -> Tensor:
        """VAE codes of pictures, each encoded alone.

        Args:
            frames_u8: [n, H, W, 3] RGB.

        Returns:
            [1, C, n, h, w] normalised, float32.
        """
        codes = [self.encode_video(from_uint8(frame_u8[None])) for frame_u8 in frames_u8]
        return torch.cat(codes, dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of a chunk.

        Args:
            latents: [1, C, T, h, w] normalised; the identity slots are already dropped.

        Returns:
            [3, 4T-3, H, W] float32 in [-1, 1], on the device.
        """
        mean, inverse_std = self._latent_statistics()
        latents = latents.to(self.device, torch.float32) / inverse_std + mean
        # A view of the same weights with states of its own: another thread may encode meanwhile,
        # and either would forget the frames that the other goes on from.
        self._need("vae")
        vae = copy.copy(self.vae)
        vae.use_tiling = self.tile_decoding
        return vae.decode(latents.to(vae.dtype)).sample[0].float()

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation [1, C, 1, 1, 1] of the VAE's latents, float32."""
        config = self.vae.config
        mean = torch.tensor(config.latents_mean, device=self.device).view(1, -1, 1, 1, 1)
        std = torch.tensor(config.latents_std, device=self.device).view(1, -1, 1, 1, 1)
        return mean, 1 / std

    def encode_pose(self, pose_u8: NDArray[np.uint8]) -> Tensor:
        """VAE code [1, C, T, h, w] of a chunk's pose pictures [F, H, W, 3]."""
        return self.encode_video(from_uint8(self._upload(pose_u8)))

    @torch.no_grad()
    def embed_pose(self, pose_latents: Tensor) -> Tensor:
        """Patch embedding of `encode_pose`'s code, for all steps of a chunk."""
        self._need("transformer")
        return self.transformer.embed_pose(pose_latents)

    @torch.no_grad()
    def embed_face(self, face_u8: NDArray[np.uint8]) -> Tensor:
        """Face tokens of a chunk's face crops [F, Hf, Wf, 3], for all its steps."""
        self._need("transformer")
        return self.transformer.embed_face(from_uint8(self._upload(face_u8)))

    def _upload(self, frames_u8: NDArray[np.uint8]) -> Tensor:
        """Frames on the device, in 8 bits: a quarter of what they become there."""
        frames = torch.from_numpy(frames_u8)
        if self.device.type != "cuda":
            return frames.to(self.device)
        return frames.pin_memory().to(self.device, non_blocking=True)

    def embed_blank_face(self, num_frames: int) -> Tensor:
        """Face tokens of a black face video: what guidance steers away from."""
        return self.embed_face(np.zeros((num_frames, self.face_size, self.face_size, 3), np.uint8))

    def denoise(
        self,
        noise: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        *,
        guidance_scale: float = 1.0,
        as_stock: bool = False,
        step_caches: Sequence[StepCache] = (),
    ) -> Iterator[Tensor]:
        """Walk from noise to clean latents, all slots alike, one Euler step at a time.

        Args:
            noise: [1, C, L, h, w] float32.
            sigmas: [steps + 1] from `shifted_sigmas`, on the CPU.
            conditioning: Of this chunk.
            guidance_scale: Above 1 the network also runs with the negative prompt and black faces.
            as_stock: Feed timesteps unrounded, as diffusers' pipeline does.
            step_caches: New ones, one for each run of the network in a step; none computes all.

        Yields:
            [1, C, L, h, w] float32 after each step; the last one is clean.

        Source: method page section 2, "Sampling".
        """
        latents = noise.to(self.device, torch.float32)
        network_dtype = self.transformer.dtype  # which diffusers searches all parameters for
        num_branches = 1 if guidance_scale == 1 else 2
        branches = [Shared(step_cache=cache) for cache in step_caches or (None,) * num_branches]
        for sigma, next_sigma in pairwise(sigmas):
            timestep = model_timestep(sigma[None], network_dtype, as_stock=as_stock)
            velocity = self._velocity(latents, timestep, conditioning, guidance_scale, branches)
            latents = euler_step(latents, velocity, sigma, next_sigma)
            yield latents

    # Not on `denoise`: between two steps of a generator its caller's code runs.
    @torch.no_grad()
    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        given: Conditioning,
        guidance_scale: float,
        branches: Sequence[Shared],
    ) -> Tensor:
        """Velocity [1, C, L, h, w] of one step, float32."""
        self._need("transformer")
        network_input = torch.cat([latents, given.condition], dim=1)

        def run(prompt_embeds: Tensor, face_tokens: Tensor, shared: Shared) -> Tensor:
            return self.transformer(
                network_input,
                timestep,
                prompt_embeds,
                given.clip_embeds,
                given.pose_embeds,
                face_tokens,
                shared,
            ).float()

        velocity = run(given.prompt_embeds, given.face_tokens, branches[0])
        if guidance_scale == 1:
            return velocity
        assert given.negative_prompt_embeds is not None
        assert given.blank_face_tokens is not None
        unguided = run(given.negative_prompt_embeds, given.blank_face_tokens, branches[1])
        return unguided + guidance_scale * (velocity - unguided)


@torch.no_grad()
def encode_text(
    text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> Tensor:
    """Text tokens of a prompt [1, 512, text_dim], zeros after the last, as the encoder gives them.

    Source: method page section 2, "Text and CLIP".
    """
    tokens = tokenizer(
        prompt_clean(prompt),
        padding="max_length",
        max_length=NUM_TEXT_TOKENS,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    seen = text_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])
    is_padding = tokens["attention_mask"] == 0
    return seen.last_hidden_state.masked_fill(is_padding[..., None], 0)


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory used so far: of the card, or else of this process; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    try:
        import resource  # noqa: PLC0415  # absent on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if platform.system() == "Darwin" else 1024)


def _has_fast_onednn() -> bool:
    """Elsewhere than on x86, oneDNN has no fast convolution of videos."""
    return torch.backends.mkldnn.is_available() and platform.machine() in {"x86_64", "AMD64"}


def _convolve_with_onednn(vae: AutoencoderKLWan) -> None:
    """Leave all 3D convolutions on the CPU to oneDNN.

    torch 2.13 does so for a single video only where channels * frames * height of the input exceed
    20480, which is most layers at 128 pixels and hardly one at 64. What it does with smaller ones
    takes twice the time and several copies of the input. Pixels change by up to 2e-6.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            # What torch's own `forward` calls, after diffusers' causal convolution has padded.
            module._conv_forward = partial(  # type: ignore[method-assign]
                torch.mkldnn_convolution,
                padding=module.padding,  # type: ignore[arg-type]  # a str would be "same"
                stride=module.stride,
                dilation=module.dilation,
                groups=module.groups,
            )
