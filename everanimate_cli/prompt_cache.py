"""Text embeddings of prompts, kept on disk: the text encoder is loaded once for a prompt.

An entry is a safetensors file named by what it depends on: the weights of the text encoder with its
tokenizer, the text, and the number format. It holds the tokens up to the last; the zeros behind
them are put back. What cannot be read is made again.
"""

from __future__ import annotations

import gc
import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.functional import pad

from everanimate_cli import weights
from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.checkpoint import checkpoint_hash, full_config
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.pipeline import encode_text
from everanimate_cli.transformer import NUM_TEXT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from everanimate_cli.model_folder import ModelSource

_FORMAT = "1"  # of an entry; another one is not read
_TENSOR = "prompt_embeds"
_LARGE_BYTES = 2**30  # of a text encoder that is worth a line


def encode_prompts(
    source: ModelSource,
    prompts: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    folders: Sequence[Path],
    on_event: OnEvent,
) -> dict[str, Tensor]:
    """Text tokens of prompts, from the cache or else by the text encoder.

    The text encoder is loaded only if a prompt is in no folder, and gone from memory afterwards.
    The numbers are the same in both cases.

    Args:
        source: The checkpoint.
        prompts: Texts.
        device: Where the text encoder runs.
        dtype: In which it runs.
        folders: Where entries are looked for, in this order. All get a copy; a folder that cannot
            be written is passed over.
        on_event: Told when a text encoder is loaded that takes a while.

    Returns:
        [1, 512, text_dim] by prompt, zeros after the last token; on the CPU.

    Raises:
        WeightsError: If the text encoder cannot be loaded.
    """
    width = int(full_config(source, "text_encoder").d_model)
    encoder_hash = checkpoint_hash(source, ["text_encoder"])
    names = {prompt: _entry_name(encoder_hash, prompt, dtype) for prompt in prompts}
    found: dict[str, Tensor] = {}
    for prompt, name in names.items():
        for folder in folders:
            tokens = _read_entry(folder / name, width, dtype)
            if tokens is not None:
                found[prompt] = tokens
                break
    missing = [prompt for prompt in names if prompt not in found]
    if missing:
        if sum(path.stat().st_size for path in source.weight_files("text_encoder")) > _LARGE_BYTES:
            on_event(Note(text=f"encoding the prompt with the text encoder on {device.type}"))
        text_encoder, tokenizer = weights.load_text_encoder(source, device, dtype)
        for prompt in missing:
            embeds = encode_text(text_encoder, tokenizer, prompt)[0].cpu()
            num_used = int(embeds.any(dim=1).nonzero().max()) + 1 if embeds.any() else 0
            found[prompt] = embeds[:num_used].clone()
        # Before the transformer comes: the largest part of a card may be taken by this one.
        del text_encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for prompt, name in names.items():
        for folder in folders:
            if _read_entry(folder / name, width, dtype) is None:
                _write_entry(folder / name, found[prompt])
    return {
        prompt: pad(tokens, (0, 0, 0, NUM_TEXT_TOKENS - len(tokens)))[None]
        for prompt, tokens in found.items()
    }


def _entry_name(encoder_hash: str, prompt: str, dtype: torch.dtype) -> str:
    key = json.dumps([_FORMAT, encoder_hash, prompt, str(dtype)])
    return f"prompt-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _read_entry(path: Path, width: int, dtype: torch.dtype) -> Tensor | None:
    """Tokens [n, text_dim] of an entry; None if there is none that can be used."""
    try:
        # In one piece: another process may replace the file, and the library opens it twice.
        data = path.read_bytes()
        tokens = load(data)[_TENSOR]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        digest = header["__metadata__"]["sha256"]
    except (SafetensorError, OSError, KeyError):
        return None
    is_ours = tokens.dtype == dtype and tokens.ndim == 2 and tokens.shape[1] == width  # noqa: PLR2004
    if not is_ours or len(tokens) > NUM_TEXT_TOKENS or digest != _hash_tokens(tokens):
        return None
    return tokens


def _write_entry(path: Path, tokens: Tensor) -> None:
    """Keep tokens; two processes may do so at once, and a reader sees a whole file or none."""
    # One entry of metadata: the library writes several in any order.
    data = save({_TENSOR: tokens.contiguous()}, {"sha256": _hash_tokens(tokens)})
    with suppress(OSError):  # a shared cache may be read-only, a disk full
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)


def _hash_tokens(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
