"""Features of pictures by the CLIP image encoder of a checkpoint, for likeness to the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from everanimate_cli.clip_image import clip_pixel_values
from everanimate_cli.errors import WeightsError
from everanimate_cli.hub import locate_model
from everanimate_cli.weights import load_image_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from everanimate_cli.events import OnEvent


def load_clip_features(
    model: str, device: torch.device, on_event: OnEvent, *, download: bool
) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """Make the image encoder of a model ready; its other networks are left alone.

    Args:
        model: "toy", a checkpoint folder or a Hub id, of which the image encoder alone is
            downloaded.
        device: Where it runs.
        on_event: Told how far a download is.
        download: False refuses what is not in the cache.

    Returns:
        From a picture [H, W, 3] uint8, squashed to a square, to its pooled features [D].

    Raises:
        WeightsError: If the model is nowhere to be had or has no image encoder.
    """
    try:
        source = locate_model(model, on_event, download=download, networks=("image_encoder",))
    except WeightsError as error:
        if download:
            raise
        raise WeightsError(
            f"the image encoder of --model {model} is not on this machine, and --no-download "
            "fetches none"
        ) from error
    encoder = load_image_encoder(source, device)
    size = int(encoder.config.image_size)

    def features_of(frame_u8: NDArray[np.uint8]) -> NDArray[np.float64]:
        height, width = frame_u8.shape[:2]
        pixels = clip_pixel_values(frame_u8[None], height, width, size).to(device)
        with torch.no_grad():
            pooled = encoder(pixels).pooler_output[0]
        return np.asarray(pooled.double().cpu().numpy(), np.float64)

    return features_of
