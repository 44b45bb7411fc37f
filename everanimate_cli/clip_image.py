"""Preparing a picture for the CLIP image encoder, as the released code does."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from everanimate_cli.memory import from_uint8

CLIP_SIZE = 224  # pixels per side of the released encoder's input
# Colour statistics of CLIP's training pictures, on [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixel_values(
    frames_u8: Tensor | np.ndarray, height: int, width: int, size: int = CLIP_SIZE
) -> Tensor:
    """Turn frames into the input of the CLIP vision model.

    A frame is brought to the video's size first, then squashed to a square without cropping,
    antialiasing or clamping. CLIP's own image processor crops: its features are 47 % off.

    Args:
        frames_u8: [S, H, W, 3] RGB uint8, any size.
        height: Height of the generated video.
        width: Width of the generated video.
        size: Side of the square that the encoder takes, pixels.

    Returns:
        [S, 3, size, size] float32, normalised with CLIP's mean and deviation.

    Source: method page section 2, "Text and CLIP"; parity file `clip.safetensors`.
    """
    frames_u8 = torch.as_tensor(frames_u8)
    if frames_u8.shape[1:3] != (height, width):
        frames_u8 = torch.stack([stretch_frame(frame, height, width) for frame in frames_u8])
    pixels = from_uint8(frames_u8)[0].transpose(0, 1)  # [S, 3, H, W]
    square = torch.nn.functional.interpolate(
        pixels, size=(size, size), mode="bicubic", align_corners=False
    )
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    return (square * 0.5 + 0.5 - mean) / std


def stretch_frame(frame_u8: Tensor | np.ndarray, height: int, width: int) -> Tensor:
    """Resize one [H, W, 3] uint8 frame without keeping its proportions, bicubic as Pillow does."""
    picture = Image.fromarray(np.asarray(frame_u8))
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))
