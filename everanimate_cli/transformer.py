"""The Wan-Animate network with any number of identity slots.

Weights, state dict and config are those of diffusers' `WanAnimateTransformer3DModel`; only the
forward pass differs. What does not depend on the noise level is computed once per chunk: pose
embedding and face tokens by `embed_pose` and `embed_face`, and in the first step what a `Shared`
then hands to the others.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan_animate import (
    WanAnimateTransformer3DModel,
    WanAttention,
)
from torch import Tensor
from torch.nn.functional import pad

from everanimate_cli.step_cache import StepCache

if TYPE_CHECKING:
    from everanimate_cli.context_parallel import ContextParallel, TokenShard

# diffusers' WanAttnProcessor splits image from text tokens by this number, fixed in its source.
NUM_TEXT_TOKENS = 512


class MergedContext(NamedTuple):
    """What cross attention reads when one token stands for all the padding of the prompt.

    Attributes:
        text: [B, n, inner] text tokens and, if the prompt is shorter than 512, one of the padding.
        text_bias: [1, 1, 1, n] added to the attention logits: the logarithm of how many tokens each
            one stands for.
        image: [B, 257, inner] CLIP tokens; None for a network without image attention.
    """

    text: Tensor
    text_bias: Tensor
    image: Tensor | None


class SharedTokens(NamedTuple):
    """What the blocks of all steps read alike.

    Attributes:
        context: [B, 257 + 512, inner] image and text tokens, or with the padding merged.
        rotary_emb: Cosines and sines [1, N, 1, d] of the tokens' positions.
        pose_embeds: [B, inner, L, h/2, w/2], zero at the identity slots.
        face_tokens: [B, L, N, inner], zero groups for the identity slots.
        shard: Which tokens, positions and slots these are, where several processes compute one
            chunk; of the pose all slots are kept.
    """

    context: "Tensor | MergedContext"
    rotary_emb: tuple[Tensor, Tensor]
    pose_embeds: Tensor
    face_tokens: Tensor
    shard: "TokenShard | None" = None


@dataclass(kw_only=True)
class Shared:
    """What the steps of one chunk share, in one branch of guidance; made anew for each.

    Attributes:
        step_cache: Skips the blocks of some steps; None computes them all.
        tokens: Filled by the first step.
    """

    step_cache: StepCache | None = None
    tokens: SharedTokens | None = None


class MergedPaddingAttnProcessor:
    """diffusers' `WanAttnProcessor` for cross attention to a `MergedContext`."""

    # As on diffusers' processors: the kernel chosen, None for torch's own; and how tokens are
    # spread over several cards, which cross attention does not mind.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: MergedContext,
        attention_mask: None = None,  # noqa: ARG002  # blocks pass None for it and for the rotation
        rotary_emb: None = None,  # noqa: ARG002
    ) -> Tensor:
        """Attend to text and image apart; [B, N, inner] to [B, N, inner]."""
        text, text_bias, image = encoder_hidden_states

        def split_heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (attn.heads, -1))  # [B, N, heads, d]

        def attend(key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            backend = self._attention_backend
            return dispatch_attention_fn(query, key, value, attn_mask=bias, backend=backend)

        query = split_heads(attn.norm_q(attn.to_q(hidden_states)))
        key, value = split_heads(attn.norm_k(attn.to_k(text))), split_heads(attn.to_v(text))
        result = attend(key, value, text_bias)
        if image is not None:
            key = split_heads(attn.norm_added_k(attn.add_k_proj(image)))
            value = split_heads(attn.add_v_proj(image))
            result = result + attend(key, value)
        return attn.to_out[1](attn.to_out[0](result.flatten(2)))


class EverAnimateTransformer3DModel(WanAnimateTransformer3DModel):
    """Velocity network of one chunk: `K_id` identity slots, then `T` target latents.

    Differs from diffusers 0.42, which knows exactly one identity slot: pose is added from slot
    `K_id` on, and `K_id` zero token groups stand before the face tokens. All slots share one
    timestep and count rotary positions 0 .. L-1.

    Source: method page sections 2 and 6; parity file `transformer.safetensors`.
    """

    _merges_padding = False
    # Set where several processes compute one chunk; each then holds a part of the tokens.
    _parallel: "ContextParallel | None" = None

    def merge_padding(self) -> None:
        """From now on let one token stand for all the padding of the prompt, as many as it is.

        The same sum in another order: tokens that are all zero have one key and one value, so that
        one of them with the logarithm of their number on its logit has their weight. The velocity
        changes by rounding only, and half the time of a small network is saved, which it would
        spend on 500 such tokens.

        Only for float32: in bfloat16 the logarithm rounds by 1 % of the weight. A network that
        attends to image and text at once stays as it is, and so does one that merges already: its
        kernels may have been chosen since.
        """
        if self.config.added_kv_proj_dim is None or self._merges_padding:
            return
        for block in self.blocks:
            block.attn2.set_processor(MergedPaddingAttnProcessor())
        self._merges_padding = True

    def embed_pose(self, pose_latents: Tensor) -> Tensor:
        """Patch-embed the pose latents of a chunk; the result goes to every step.

        Args:
            pose_latents: [B, C, T, h, w] normalised VAE code of the pose frames, target slots only.

        Returns:
            [B, inner, T, h/2, w/2] in the network's dtype.
        """
        weight = self.pose_patch_embedding.weight
        return self.pose_patch_embedding(pose_latents.to(weight.device, self.dtype))

    def embed_face(
        self, face_pixels: Tensor, *, motion_encode_batch_size: int | None = None
    ) -> Tensor:
        """Turn the face crops of a chunk into one token group per target latent.

        Args:
            face_pixels: [B, 3, S, Hf, Wf] in [-1, 1], S = 4T - 3, of the size in the network's
                config. May lie on the CPU in float32: one batch of frames at a time is moved and
                cast.
            motion_encode_batch_size: Frames encoded at once, memory against speed; None takes
                `motion_encoder_batch_size` of the config.

        Returns:
            [B, T, N, inner] in the network's dtype, without groups for the identity slots.
        """
        batch_size, num_frames = face_pixels.shape[0], face_pixels.shape[2]
        device, dtype = self.motion_encoder.conv_in.weight.device, self.dtype
        frames = face_pixels.transpose(1, 2).flatten(0, 1)  # [B*S, 3, Hf, Wf]
        batches = frames.split(motion_encode_batch_size or self.config.motion_encoder_batch_size)
        # The encoder does its QR decomposition in float32 and answers in the dtype of its input.
        motion = torch.cat([self.motion_encoder(batch.to(device, dtype)) for batch in batches])
        return self.face_encoder(motion.unflatten(0, (batch_size, num_frames)))

    # Takes a chunk's embeddings where diffusers takes pose latents and face pixels.
    def forward(  # the inputs of the network, one by one
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None,
        pose_embeds: Tensor,
        face_tokens: Tensor,
        shared: Shared | None = None,
    ) -> Tensor:
        """Predict the velocity of all slots at one noise level.

        The number of identity slots is what `hidden_states` has more than `pose_embeds`.

        Args:
            hidden_states: [B, 2C+4, L, h, w], L = K_id + T: noisy latents, mask and condition,
                joined on the channel axis.
            timestep: [B], 1000 * sigma, already rounded where the caller wants it rounded. Its
                dtype decides the precision of the sinusoids: float64 as in the released code, any
                other as in diffusers (the velocity differs by up to 6e-5). May lie on the CPU.
            encoder_hidden_states: [B, 512, text_dim] text tokens, zeros after the last.
            encoder_hidden_states_image: [B, 257, image_dim] CLIP tokens; None for a network
                without image attention.
            pose_embeds: [B, inner, T, h/2, w/2] from `embed_pose`.
            face_tokens: [B, T, N, inner] from `embed_face`.
            shared: Given to all steps of a chunk whose inputs but the first two are the same. The
                first step fills it, the others read those inputs from it.

        Returns:
            [B, C, L, h, w] velocity (noise - clean) in the network's dtype.

        Raises:
            ValueError: If the shapes do not belong to one chunk.
        """
        dtype = self.patch_embedding.weight.dtype  # `self.dtype` searches all parameters
        num_slots, height, width = hidden_states.shape[2:]
        num_identity_slots = num_slots - pose_embeds.shape[2]
        if num_identity_slots < 0 or face_tokens.shape[1] != pose_embeds.shape[2]:
            raise ValueError(
                f"{num_slots} latent slots, {pose_embeds.shape[2]} pose frames and "
                f"{face_tokens.shape[1]} face token groups do not make one chunk"
            )
        if encoder_hidden_states.shape[1] != NUM_TEXT_TOKENS:
            raise ValueError(f"need {NUM_TEXT_TOKENS} text tokens: {encoder_hidden_states.shape}")
        shared = shared or Shared()
        if shared.tokens is None:
            context = self._embed_context(
                encoder_hidden_states.to(dtype), encoder_hidden_states_image
            )
            # Zero groups are not a no-op: after norm and projection the key/value bias remains.
            face_tokens = pad(face_tokens, (0, 0, 0, 0, num_identity_slots, 0))
            pose_embeds = pad(pose_embeds, (0, 0, 0, 0, num_identity_slots, 0))
            rotary_emb = self.rope(hidden_states)
            shared.tokens = self._shard(
                SharedTokens(context, rotary_emb, pose_embeds, face_tokens), num_slots
            )
        tokens = shared.tokens

        hidden_states = self.patch_embedding(hidden_states.to(dtype))  # [B, inner, L, h/2, w/2]
        # Not in place: in training a hook may have made this output a leaf that requires grad.
        hidden_states = hidden_states + tokens.pose_embeds
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous()  # [B, L*h*w/4, inner]
        num_tokens = hidden_states.shape[1]
        if tokens.shard is not None:
            hidden_states = hidden_states[:, tokens.shard.tokens]

        time_embeds = self._embed_time(timestep, dtype, hidden_states.device)  # [B, inner]
        embedder = self.condition_embedder
        modulation = embedder.time_proj(embedder.act_fn(time_embeds)).unflatten(1, (6, -1))

        def run_blocks(hidden_states: Tensor) -> Tensor:
            return self._run_blocks(hidden_states, tokens, modulation)

        if shared.step_cache is None:
            hidden_states = run_blocks(hidden_states)
        else:
            total = None if self._parallel is None else self._parallel.total
            hidden_states = shared.step_cache.apply(hidden_states, run_blocks, total=total)

        table = self.scale_shift_table.to(time_embeds.device) + time_embeds.unsqueeze(1)
        shift, scale = table.to(hidden_states.device).chunk(2, dim=1)  # [B, 1, inner] each
        normed = self.norm_out(hidden_states.float()) * (1 + scale) + shift
        patches = self.proj_out(normed.to(hidden_states.dtype))  # [B, L*h*w/4, p_t*p_h*p_w*C]
        if self._parallel is not None:
            patches = self._parallel.gather(patches, num_tokens)
        return self._unpatchify(patches, num_slots, height, width)

    def _shard(self, tokens: SharedTokens, num_slots: int) -> SharedTokens:
        """Of the shared tokens those of this process, where several compute one chunk."""
        if self._parallel is None:
            return tokens
        cosines, sines = tokens.rotary_emb
        shard = self._parallel.shard(cosines.shape[1], num_slots)
        return tokens._replace(
            rotary_emb=(cosines[:, shard.tokens], sines[:, shard.tokens]),
            face_tokens=tokens.face_tokens[:, shard.slots],
            shard=shard,
        )

    def _run_blocks(
        self, hidden_states: Tensor, tokens: SharedTokens, modulation: Tensor
    ) -> Tensor:
        """All blocks and the face adapters between them: [B, N, inner] to [B, N, inner]."""
        for block_index, block in enumerate(self.blocks):
            hidden_states = self._run(
                block, hidden_states, tokens.context, modulation, tokens.rotary_emb
            )
            adapter_index, blocks_since = divmod(
                block_index, self.config.inject_face_latents_blocks
            )
            if blocks_since == 0:
                adapter = self.face_adapter[adapter_index]
                face_update = self._adapt(adapter, hidden_states, tokens)
                hidden_states = hidden_states + face_update.to(hidden_states.device)
        return hidden_states

    def _adapt(
        self, adapter: torch.nn.Module, hidden_states: Tensor, tokens: SharedTokens
    ) -> Tensor:
        """What a face adapter adds to the tokens."""
        if tokens.shard is None:
            return self._run(adapter, hidden_states, tokens.face_tokens)
        filled = tokens.shard.fill_slots(hidden_states)
        return tokens.shard.drop_filling(self._run(adapter, filled, tokens.face_tokens))

    def _embed_context(
        self, text_tokens: Tensor, image_tokens: Tensor | None
    ) -> Tensor | MergedContext:
        """What the blocks' cross attention reads: [B, 257 + 512, inner], or padding merged."""
        embedder = self.condition_embedder
        if image_tokens is not None:
            image_tokens = embedder.image_embedder(image_tokens.to(text_tokens.dtype))
        if not self._merges_padding:
            text = embedder.text_embedder(text_tokens)  # [B, 512, inner]
            return text if image_tokens is None else torch.cat([image_tokens, text], dim=1)
        used = text_tokens.any(dim=2).any(dim=0).nonzero()
        num_used = int(used[-1]) + 1 if len(used) else 0
        num_kept = min(num_used + 1, NUM_TEXT_TOKENS)
        bias = text_tokens.new_zeros(1, 1, 1, num_kept)
        bias[..., -1] = math.log(NUM_TEXT_TOKENS - num_kept + 1)
        text = embedder.text_embedder(text_tokens[:, :num_kept])
        return MergedContext(text=text, text_bias=bias, image=image_tokens)

    def _embed_time(
        self, timestep: Tensor, network_dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Time embedding [B, inner] in the network's dtype."""
        embedder = self.condition_embedder
        if timestep.dtype == torch.float64:
            half = self.config.freq_dim // 2
            exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
            angles = timestep[:, None] * 10000.0**-exponents
            sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # [B, freq_dim]
        else:
            sinusoids = embedder.timesteps_proj(timestep)
        weight_dtype = embedder.time_embedder.linear_1.weight.dtype
        # Weights stored as integers (quantised) say nothing about the dtype to compute in.
        dtype = weight_dtype if weight_dtype.is_floating_point else network_dtype
        sinusoids = sinusoids.to(dtype=dtype).to(device)
        return embedder.time_embedder(sinusoids).to(network_dtype)

    def _run(
        self, module: torch.nn.Module, *args: Tensor | tuple[Tensor, Tensor] | MergedContext
    ) -> Tensor:
        """Call a block or face adapter, through gradient checkpointing where it is switched on.

        Differs from diffusers, which checkpoints the blocks only: at 480p the face adapters of the
        14B network would keep several GiB of activations.
        """
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def _unpatchify(self, patches: Tensor, num_slots: int, height: int, width: int) -> Tensor:
        """Put the output patches back in place: [B, L*h*w/4, p_t*p_h*p_w*C] -> [B, C, L, h, w]."""
        p_t, p_h, p_w = self.config.patch_size
        grid = (num_slots // p_t, height // p_h, width // p_w)
        patches = patches.unflatten(2, (p_t, p_h, p_w, -1)).unflatten(1, grid)
        patches = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, L/p_t, p_t, h/p_h, p_h, ...]
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)
