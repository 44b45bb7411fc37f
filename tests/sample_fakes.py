"""What tests of training samples share: settings, clips in memory, an encoder that shows frames."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from studio import picture
from tiny import TINY_DEFAULTS
from torch import Tensor

from everanimate_cli.train_settings import (
    ResolvedTrainSettings,
    TrainSettings,
    resolve_training,
)

Frames = NDArray[np.uint8]


def train_settings(**changes: Any) -> ResolvedTrainSettings:
    """Settings of stage 2 for the tiny checkpoint: chunks of 9 frames, 32 x 16 pixels."""
    given = {"dataset": Path("dances"), "stage": 2, "seed": 3, "size": "32x16"} | changes
    return resolve_training(TrainSettings(**given), TINY_DEFAULTS)


@dataclass(frozen=True, kw_only=True)
class FakeFrames:
    rgb_u8: Frames
    pose_u8: Frames
    face_u8: Frames


@dataclass(kw_only=True)
class FakeClip:
    """A clip in memory that notes which frames were read."""

    rgb_u8: Frames
    pose_u8: Frames
    face_u8: Frames
    prompt: str | None = None
    fingerprint: str = "one"
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_frames(self) -> int:
        return len(self.rgb_u8)

    def read(self, start: int, count: int) -> FakeFrames:
        assert 0 <= start <= start + count <= self.num_frames
        self.reads.append((start, count))
        part = slice(start, start + count)
        return FakeFrames(
            rgb_u8=self.rgb_u8[part], pose_u8=self.pose_u8[part], face_u8=self.face_u8[part]
        )


def numbered_clip(num_frames: int) -> FakeClip:
    """Frame i is i all over, its pose 80 + i, its face 160 + i."""
    values = np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    frames = np.repeat(np.repeat(np.repeat(values, 16, 1), 24, 2), 3, 3)
    return FakeClip(rgb_u8=frames, pose_u8=frames + 80, face_u8=frames[:, :8, :8] + 160)


def moving_clip(num_frames: int, phase: float, **changes: Any) -> FakeClip:
    """A clip of the settings' size, in which every frame is another."""

    def video(height: int, width: int, offset: float) -> Frames:
        return np.stack(
            [picture(height, width, phase + offset + 0.3 * i) for i in range(num_frames)]
        )

    clip: dict[str, Any] = {
        "rgb_u8": video(16, 32, 0.0),
        "pose_u8": video(16, 32, 1.0),
        "face_u8": video(16, 16, 2.0),
        "fingerprint": f"phase {phase}",
    }
    return FakeClip(**(clip | changes))


class FrameNumbers:
    """Stands for a pipeline: its codes are the numbers of the frames that they cover.

    A latent has four channels, one per frame; the first has its only frame four times.
    """

    def encode_video(self, pixels: Tensor) -> Tensor:
        numbers = ((pixels + 1) * 127.5)[:, 0, :, 0, 0].round(decimals=2)  # [1, S]
        assert numbers.shape[1] % 4 == 1
        numbers = torch.cat([numbers[:, :1].expand(-1, 3), numbers], dim=1)  # [1, S + 3]
        return numbers.unflatten(1, (-1, 4)).transpose(1, 2)[..., None, None]  # [1, 4, T, 1, 1]

    def encode_pictures(self, frames_u8: Frames) -> Tensor:
        numbers = torch.tensor(frames_u8[:, 0, 0, 0].astype(np.float32))
        return numbers.expand(1, 4, -1)[..., None, None]

    def embed_face(self, face_u8: Frames) -> Tensor:
        return torch.tensor(face_u8[None, ::4, :1, 0, 0].astype(np.float32))[..., None]

    def encode_clip(self, frame_u8: Frames) -> Tensor:
        return torch.full((1, 2, 3), float(frame_u8[0, 0, 0]))

    def encode_clip_as_stock(self, frame_u8: Frames) -> Tensor:
        return torch.full((1, 5, 3), float(frame_u8[0, 0, 0]))

    def encode_prompt(self, prompt: str) -> Tensor:
        return torch.full((1, 512, 2), float(len(prompt)))


def shown_frames(latents: Tensor) -> list[list[float]]:
    """Per latent the frames that it covers, from codes [1, 4, T, 1, 1] of `FrameNumbers`."""
    return [[round(float(value), 2) for value in latent] for latent in latents[0, :, :, 0, 0].T]


def covering(frames: Sequence[int]) -> list[list[float]]:
    """What `shown_frames` gives for a video of these frames."""
    first, *rest = (float(frame) for frame in frames)
    return [[first] * 4, *(rest[i : i + 4] for i in range(0, len(rest), 4))]
