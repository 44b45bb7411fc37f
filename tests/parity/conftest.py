"""Golden numbers of the released code, and what the parity tests share.

Which cases there are, and every size, is read from the files: another folder of the same format is
tested with `EVERANIMATE_PARITY_DIR=<folder> pytest tests/parity`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from everanimate_cli.pipeline import AnimatePipeline
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
def codec() -> AnimatePipeline:
    """The product's pipeline of the files' networks: encodes and decodes videos and pictures."""
    vae = AutoencoderKLWan(**load_config("vae_config"))
    vae.load_state_dict(load_golden("vae"), strict=True)
    image_encoder = CLIPVisionModel(CLIPVisionConfig(**load_config("clip_config")))
    image_encoder.load_state_dict(strip_prefix(load_golden("clip"), "weights."), strict=True)
    return AnimatePipeline(
        transformer=build_transformer(),
        vae=vae.eval().requires_grad_(False),
        text_encoder=None,
        tokenizer=None,
        image_encoder=image_encoder.eval().requires_grad_(False),
        image_processor=None,
        device=torch.device("cpu"),
    )
