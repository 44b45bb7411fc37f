"""Golden numbers of the released code, and what the parity tests share.

Which cases there are, and every size, is read from the files: another folder of the same format is
tested with `EVERANIMATE_PARITY_DIR=<folder> pytest tests/parity`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from everanimate_cli.transformer import EverAnimateTransformer3DModel

PARITY_DIR = Path(
    os.environ.get("EVERANIMATE_PARITY_DIR")
    or Path(__file__).resolve().parents[1] / "golden" / "parity"
)

# Fixture name -> file and pattern of the keys; the first group names the case.
DISCOVERED_CASES = {
    "transformer_case": ("transformer", r"(.+)\.out\.velocity"),
    "infer_case": ("schedule", r"(infer\d+_shift[\d.]+)\.sigmas"),
    "train_case": ("schedule", r"(train\d+_shift[\d.]+)\.sigmas"),
    "condition_case": ("conditioning", r"((?!train\.).+)\.y"),
    "training_condition_case": ("conditioning", r"(train\..+)\.y"),
    "chunk_index": ("rollout", r"clip(\d+)\.noise"),
    "correction_case": ("rfm", r"((?!bf16\.).+)\.ungated\.target"),
    "lora_scale": ("lora", r"out\.velocity_lora_scale([\d.]+)"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, (file_name, pattern) in DISCOVERED_CASES.items():
        if fixture in metafunc.fixturenames:
            with safe_open(PARITY_DIR / f"{file_name}.safetensors", framework="pt") as file:
                matches = [re.fullmatch(pattern, key) for key in file.keys()]  # noqa: SIM118
            cases = sorted(match[1] for match in matches if match)
            assert cases, f"{file_name}.safetensors has no key like {pattern}"
            metafunc.parametrize(
                fixture, [int(case) for case in cases] if fixture == "chunk_index" else cases
            )


@cache
def load_golden(name: str) -> dict[str, Tensor]:
    return load_file(PARITY_DIR / f"{name}.safetensors")


@cache
def load_config(name: str) -> dict[str, object]:
    config = json.loads((PARITY_DIR / f"{name}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def build_transformer() -> EverAnimateTransformer3DModel:
    transformer = EverAnimateTransformer3DModel(**load_config("transformer_config"))
    transformer.load_state_dict(strip_prefix(load_golden("transformer"), "weights."), strict=True)
    return transformer.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The VAE of `vae.safetensors`, to and from normalised latents, mode of the distribution."""

    vae: AutoencoderKLWan

    @property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean, std = self.vae.config.latents_mean, self.vae.config.latents_std
        return torch.tensor(mean).view(1, -1, 1, 1, 1), torch.tensor(std).view(1, -1, 1, 1, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """[1, 3, S, H, W] -> [1, C, T, h, w]."""
        mean, std = self.mean_and_std
        return (self.vae.encode(pixels).latent_dist.mode() - mean) / std

    def encode_alone(self, pixels: Tensor) -> Tensor:
        """[1, 3, S, H, W] -> [1, C, S, h, w], each frame as a video of its own."""
        return torch.cat([self.encode(frame) for frame in pixels.split(1, dim=2)], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """[1, C, T, h, w] -> [1, 3, S, H, W]."""
        mean, std = self.mean_and_std
        return self.vae.decode(latents * std + mean).sample


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    return PARITY_DIR


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Tensors of `<name>.safetensors`."""
    return load_golden


@pytest.fixture(scope="session")
def config() -> Callable[[str], dict[str, object]]:
    """Content of `<name>.json` without the keys that start with an underscore."""
    return load_config


@pytest.fixture
def transformer() -> EverAnimateTransformer3DModel:
    """The network of `transformer.safetensors`, a fresh copy."""
    return build_transformer()


@pytest.fixture(scope="session")
def codec() -> Codec:
    vae = AutoencoderKLWan(**load_config("vae_config"))
    vae.load_state_dict(load_golden("vae"), strict=True)
    return Codec(vae=vae.eval().requires_grad_(False))
