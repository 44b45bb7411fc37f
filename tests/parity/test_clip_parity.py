"""`clip.safetensors`: preparing a picture for CLIP, and CLIP's features."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from everanimate_cli.clip_image import CLIP_SIZE, clip_pixel_values, stretch_frame
from everanimate_cli.pipeline import AnimatePipeline

Golden = Callable[[str], dict[str, Tensor]]

TOLERANCE = 1e-5


@pytest.fixture
def tensors(golden: Golden) -> dict[str, Tensor]:
    return golden("clip")


@pytest.fixture
def encode(codec: AnimatePipeline) -> Callable[[Tensor], Tensor]:
    """Pixel values -> features, without the preprocessing."""
    model = codec.image_encoder
    return lambda pixel_values: model(pixel_values, output_hidden_states=True).hidden_states[-2]


def measure(features: Tensor, expected: Tensor) -> float:
    """Relative error."""
    return ((features - expected).norm() / expected.norm()).item()


def test_preprocessing_and_features(
    tensors: dict[str, Tensor], encode: Callable[[Tensor], Tensor]
) -> None:
    height, width = tensors["target_height_width"].tolist()
    resized = stretch_frame(tensors["image_u8"], height, width)
    torch.testing.assert_close(resized, tensors["resized_u8"], rtol=0, atol=0)
    pixel_values = clip_pixel_values(tensors["image_u8"][None], height, width)
    torch.testing.assert_close(pixel_values, tensors["pixel_values"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(
        encode(pixel_values), tensors["clip_feature"], rtol=0, atol=TOLERANCE
    )


def test_frames_of_the_videos_size_are_not_resized_first(tensors: dict[str, Tensor]) -> None:
    resized = tensors["resized_u8"]
    pixel_values = clip_pixel_values(resized[None].numpy(), *resized.shape[:2])
    torch.testing.assert_close(pixel_values, tensors["pixel_values"], rtol=0, atol=TOLERANCE)


def test_cropping_like_the_default_processor_misses(
    tensors: dict[str, Tensor], encode: Callable[[Tensor], Tensor]
) -> None:
    height, width = tensors["resized_u8"].shape[:2]
    scale = CLIP_SIZE / min(height, width)
    picture = Image.fromarray(tensors["resized_u8"].numpy()).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - CLIP_SIZE) // 2, (picture.height - CLIP_SIZE) // 2
    cropped = picture.crop((left, top, left + CLIP_SIZE, top + CLIP_SIZE))
    frame = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
    pixel_values = clip_pixel_values(frame.view(1, CLIP_SIZE, CLIP_SIZE, 3), CLIP_SIZE, CLIP_SIZE)
    assert measure(encode(pixel_values), tensors["clip_feature"]) > 0.1


def test_skipping_the_resize_to_the_videos_size_misses(tensors: dict[str, Tensor]) -> None:
    image = tensors["image_u8"]
    assert image.shape != tensors["resized_u8"].shape
    pixel_values = clip_pixel_values(image[None], *image.shape[:2])
    assert (pixel_values - tensors["pixel_values"]).abs().max() > 0.01
