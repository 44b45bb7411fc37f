"""Features of pictures by the CLIP image encoder of a checkpoint, for likeness to the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPVisionModel

from everanimate_cli.clip_image import clip_pixel_values
from everanimate_cli.errors import WeightsError
from everanimate_cli.hub import locate_model
from everanimate_cli.weights import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable

    from everanimate_cli.events import OnEvent


def load_clip_features(
    model: str, device: torch.device, on_event: OnEvent
) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """Make the image encoder of a model ready; its other networks are left alone.

    Nothing is downloaded: a whole checkpoint would be fetched for it.

    Args:
        model: "toy", a checkpoint folder or a Hub id in the local cache.
        device: Where it runs.
        on_event: Told what is found.

    Returns:
        From a picture [H, W, 3] uint8, squashed to a square, to its pooled features [D].

    Raises:
        WeightsError: If the model is not on this machine or has no image encoder.
    """
    try:
        source = locate_model(model, on_event, download=False)
    except WeightsError as error:
        raise WeightsError(
            f"--model {model} is not on this machine. Give --model toy or a checkpoint folder, or "
            "let animate download it."
        ) from error
    try:
        with quiet_libraries():
            encoder = CLIPVisionModel.from_pretrained(
                source.folder / "image_encoder", local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"--model {model}: image_encoder cannot be loaded. Give a complete checkpoint."
        ) from error
    encoder = encoder.to(device=device, dtype=torch.float32).eval()
    size = int(encoder.config.image_size)

    def features_of(frame_u8: NDArray[np.uint8]) -> NDArray[np.float64]:
        height, width = frame_u8.shape[:2]
        pixels = clip_pixel_values(frame_u8[None], height, width, size).to(device)
        with torch.no_grad():
            pooled = encoder(pixels).pooler_output[0]
        return np.asarray(pooled.double().cpu().numpy(), np.float64)

    return features_of
