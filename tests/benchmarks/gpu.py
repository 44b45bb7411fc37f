r"""How fast and how large the full-size networks are on a card, beside what it could do at best.

    python tests/benchmarks/gpu.py [--parts step,vae,...] [--config full|toy] [--device cuda|cpu]
        [--time-limit SECONDS] [--steps N] [--repeats N] [--json FILE]

Needs no weights and no network: the weights are drawn on the card, so that speed and memory are
those of the released model and pictures are noise. Before anything is timed, the operations and the
bytes of the work are counted. The larger of operations over the card's peak in bfloat16 and bytes
over its bandwidth is the floor; each time is printed with its multiple of that.

parity      Each way to compute a step against float32, and the VAE against the CPU, at a small size
            with a few blocks.
step        One Euler step at 832x480 with 77 frames and 4 identity slots.
vae         What is computed once per chunk or run: VAE, CLIP, T5, faces.
attention   A step, and attention alone, with each kernel that this machine has.
compile     A step with compiled blocks.
fp8         A step with weights stored in fp8, and with products in fp8 (needs torchao).
cache       A step with the step cache when it skips as often as it may.
chunk       Two whole chunks.
toy         Three chunks of the embedded toy model, compared with those of the CPU: by `animate`, or
            without PyAV by the chunk loop alone.
presets     Each preset of `--vram` that fits, held to the memory of its card; peaks beside the
            estimate.

Results are added to the JSON file one by one, so that a run that is cut off keeps what it has. A
case that fails leaves its error there, the others go on, and the exit code is 1. With `--config
toy` all of it runs on a CPU in two minutes, of which the figures mean nothing.

On a bare machine with a card, from a checkout: torch, transformers, accelerate, peft, safetensors,
huggingface_hub >= 1.32, numpy, OpenCV and Pillow are needed, and diffusers. Neither PyAV nor
onnxruntime nor the package itself need be installed; `toy` also needs ftfy, products in fp8 need
torchao, compiling needs Triton, a C++ compiler and Python's headers. What is missing there, and
cannot be downloaded there, is fetched as wheels on another machine (10 MB; Python 3.12 here),

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -d wheels \
        diffusers==0.42.1 ftfy==6.3.1 wcwidth==0.9.4 torchao==0.18.0

and installed by

    pip install --no-index --no-deps --target site wheels/*.whl
    export PYTHONPATH=$PWD/site PYTHONUNBUFFERED=1

In two calls of ten minutes on a card with 80 GB, with 128 GB of main memory:

    python tests/benchmarks/gpu.py --parts parity,step,vae,attention,compile,fp8,cache \
        --time-limit 560 --json gpu-1.json
    python tests/benchmarks/gpu.py --parts chunk,toy,presets --time-limit 560 --json gpu-2.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from everanimate_cli.pipeline import AnimatePipeline, Conditioning
    from everanimate_cli.rollout import Rollout

    Frames = np.ndarray

REPOSITORY = Path(__file__).parents[2]
TOY_FOLDER = REPOSITORY / "everanimate_cli" / "toy_model"

SHIFT = 5.0
NUM_TEXT_TOKENS = 512
NUM_USED_TEXT_TOKENS = 12  # about as many as the released prompt has
TEMPORAL_STRIDE = 4
SEED = 0
_MIB = 2**20

# Dense bfloat16 products with float32 sums [TFLOP/s] and memory bandwidth [GB/s], from the makers'
# data sheets; the first name that is part of the card's own counts.
KNOWN_CARDS = {
    "B200": (2250.0, 8000.0),
    "H200": (989.0, 4800.0),
    "H100 PCIe": (756.0, 2000.0),
    "H100 NVL": (835.0, 3900.0),
    "H100": (989.0, 3350.0),
    "A100-SXM4-40GB": (312.0, 1555.0),
    "A100-PCIE-40GB": (312.0, 1555.0),
    "A100 80GB PCIe": (312.0, 1935.0),
    "A100": (312.0, 2039.0),
    "L40S": (362.0, 864.0),
    "RTX 6000 Ada": (364.0, 960.0),
    "RTX A6000": (155.0, 768.0),
    "RTX 5090": (209.5, 1792.0),
    "RTX 4090": (165.2, 1008.0),
    "RTX 3090": (71.0, 936.0),
}


# --- what is computed ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model and a video.

    Attributes:
        name: "full" or "toy".
        configs: Of the networks, by their names in a checkpoint.
        height: Pixels.
        width: Pixels.
        frames_per_chunk: F.
        overlap: Frames shared by neighbouring chunks.
        num_identity_slots: K_id.
        num_steps: Euler steps per chunk.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    height: int
    width: int
    frames_per_chunk: int
    overlap: int
    num_identity_slots: int
    num_steps: int

    @property
    def num_target_slots(self) -> int:
        """T."""
        return (self.frames_per_chunk - 1) // TEMPORAL_STRIDE + 1

    @property
    def num_slots(self) -> int:
        """L."""
        return self.num_identity_slots + self.num_target_slots

    @cached_property
    def empty(self) -> dict[str, nn.Module]:
        """The networks on the meta device, for their configs and for counting; not to change."""
        return {name: build_empty(self, name).to("meta") for name in self.configs}

    def config(self, name: str) -> Any:
        """A network's config with the defaults of its class."""
        return self.empty[name].config

    @property
    def inner_dim(self) -> int:
        """Channels of a token."""
        config = self.config("transformer")
        return int(config.num_attention_heads * config.attention_head_dim)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w)."""
        stride = int(self.config("vae").scale_factor_spatial)
        return self.height // stride, self.width // stride

    @property
    def tokens_per_slot(self) -> int:
        """Tokens of one latent frame."""
        _, patch_height, patch_width = self.config("transformer").patch_size
        height, width = self.latent_size
        return (height // patch_height) * (width // patch_width)

    @property
    def num_image_tokens(self) -> int:
        """What CLIP makes of a picture."""
        config = self.config("image_encoder")
        return int(config.image_size // config.patch_size) ** 2 + 1

    @property
    def face_size(self) -> int:
        """Side of the face crops, pixels."""
        return int(self.config("transformer").motion_encoder_size)

    def shrunk(self) -> Setup:
        """A few blocks of the same width, one face adapter, and a short and small video."""
        transformer = dict(self.configs["transformer"])
        transformer["num_layers"] = self.config("transformer").inject_face_latents_blocks
        return replace(
            self,
            configs={**self.configs, "transformer": transformer},
            height=min(self.height, 128),
            width=min(self.width, 192),
            frames_per_chunk=min(self.frames_per_chunk, 17),
        )


def full_setup() -> Setup:
    """The released model at the released size."""
    from everanimate_cli.placement import RELEASED_CONFIGS  # noqa: PLC0415  # see `make_importable`
    from everanimate_cli.settings import HUB_PRESET  # noqa: PLC0415

    return Setup(
        name="full",
        configs=RELEASED_CONFIGS,
        height=HUB_PRESET.height,
        width=HUB_PRESET.width,
        frames_per_chunk=HUB_PRESET.frames_per_chunk,
        overlap=HUB_PRESET.overlap,
        num_identity_slots=HUB_PRESET.identity_slots,
        num_steps=HUB_PRESET.num_inference_steps,
    )


def toy_setup() -> Setup:
    """The sizes of the embedded toy model; a few steps, since its weights are drawn here too."""
    from everanimate_cli.settings import read_model_defaults  # noqa: PLC0415

    defaults = read_model_defaults(TOY_FOLDER)
    names = ("transformer", "vae", "text_encoder", "image_encoder")
    return Setup(
        name="toy",
        configs={
            name: json.loads((TOY_FOLDER / name / "config.json").read_text(encoding="utf-8"))
            for name in names
        },
        height=defaults.height,
        width=defaults.width,
        frames_per_chunk=defaults.frames_per_chunk,
        overlap=defaults.overlap,
        num_identity_slots=defaults.identity_slots,
        num_steps=2,
    )


SETUPS = {"full": full_setup, "toy": toy_setup}


def build_empty(setup: Setup, name: str) -> nn.Module:
    """A network whose parameters are on the meta device and whose buffers are real."""
    from accelerate import init_empty_weights  # noqa: PLC0415

    from everanimate_cli.checkpoint import KINDS  # noqa: PLC0415
    from everanimate_cli.library_logs import quiet_libraries  # noqa: PLC0415

    kind, config = KINDS[name], dict(setup.configs[name])
    with quiet_libraries(), init_empty_weights(include_buffers=False):
        if kind.config_class is None:
            network = kind.network_class.from_config(config)
        else:
            network = kind.network_class(kind.config_class.from_dict(config))
    if kind.config_class is not None:
        network.tie_weights()  # which came apart on their way to the meta device
    return network.eval().requires_grad_(False)


def build_network(
    setup: Setup,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    home: torch.device | None = None,
) -> nn.Module:
    """A network with weights drawn on a device, in the dtypes that loading gives them.

    Args:
        setup: Has its config.
        name: In a checkpoint.
        device: Where weights are drawn: always the same ones on the same kind of device.
        dtype: Of the network.
        home: Where the weights go; None leaves them there.
    """
    from everanimate_cli.checkpoint import dtype_in_memory  # noqa: PLC0415

    network = build_empty(setup, name)
    home = home or device
    generator = torch.Generator(device).manual_seed(SEED)
    drawn: dict[Tensor, nn.Parameter] = {}  # one weight may have two places
    for prefix, module in network.named_modules():
        for own_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in drawn:
                key = f"{prefix}.{own_name}" if prefix else own_name
                value = torch.empty(parameter.shape, device=device)
                _draw(value, module, own_name, generator)
                value = value.to(dtype_in_memory(name, key, dtype)).to(home)
                drawn[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[own_name] = drawn[parameter]
        for own_name, buffer in module._buffers.items():
            module._buffers[own_name] = None if buffer is None else buffer.to(home)
    return network


def _draw(value: Tensor, module: nn.Module, own_name: str, generator: torch.Generator) -> None:
    """Fill a weight so that what goes through the network keeps its size."""
    kind = type(module).__name__
    if own_name == "scale_shift_table":
        value.normal_(0, value.shape[-1] ** -0.5, generator=generator)
    elif own_name == "motion_synthesis_weight" or kind.startswith("Motion"):
        # Convolutions of the motion encoder scale their weights themselves.
        value.normal_(0, 1 if value.ndim > 1 else 0.02, generator=generator)
    elif isinstance(module, nn.Embedding):
        value.normal_(0, 1, generator=generator)
    elif own_name in ("weight", "gamma") and (value.ndim == 1 or "norm" in kind.lower()):
        value.fill_(1)
    elif own_name.endswith("weight") and value.ndim > 1:
        fan_in = value[0].numel()
        value.normal_(0, fan_in**-0.5, generator=generator)
    else:
        value.normal_(0, 0.02, generator=generator)


def build_pipeline(
    setup: Setup,
    device: torch.device,
    dtype: torch.dtype,
    names: Sequence[str] = ("transformer", "vae", "image_encoder"),
) -> AnimatePipeline:
    """A pipeline of random networks that are all on the device."""
    networks = {name: build_network(setup, name, device, dtype) for name in names}
    return assemble(networks, device)


def assemble(networks: Mapping[str, Any], device: torch.device, **given: Any) -> AnimatePipeline:
    """A pipeline of these networks."""
    from everanimate_cli.pipeline import AnimatePipeline  # noqa: PLC0415

    return AnimatePipeline(
        transformer=networks["transformer"],
        vae=networks["vae"],
        text_encoder=networks.get("text_encoder"),
        tokenizer=None,
        image_encoder=networks.get("image_encoder"),  # type: ignore[arg-type]  # where unused
        image_processor=None,
        device=device,
        **given,
    )


def draw_conditioning(setup: Setup, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """What a step sees beside the noise, of the right shapes; prompts are mostly padding."""
    from everanimate_cli.pipeline import Conditioning  # noqa: PLC0415

    generator = torch.Generator(device if device.type != "meta" else "cpu").manual_seed(SEED + 1)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    config = setup.config("transformer")
    height, width = setup.latent_size
    grid = (height // config.patch_size[1], width // config.patch_size[2])
    prompt_embeds = draw(1, NUM_TEXT_TOKENS, config.text_dim)
    if device.type != "meta":
        prompt_embeds[:, NUM_USED_TEXT_TOKENS:] = 0
    return Conditioning(
        condition=draw(
            1, 4 + config.latent_channels, setup.num_slots, height, width, dtype=torch.float32
        ),
        pose_embeds=draw(1, setup.inner_dim, setup.num_target_slots, *grid),
        face_tokens=draw(
            1, setup.num_target_slots, config.face_encoder_num_heads + 1, setup.inner_dim
        ),
        prompt_embeds=prompt_embeds,
        clip_embeds=draw(1, setup.num_image_tokens, config.image_dim),
    )


def draw_noise(setup: Setup, chunk_index: int = 0) -> Tensor:
    """[1, C, L, h, w] float32 on the CPU."""
    from everanimate_cli.memory import chunk_noise  # noqa: PLC0415

    channels = int(setup.config("vae").z_dim)
    return chunk_noise(SEED, chunk_index, (1, channels, setup.num_slots, *setup.latent_size))


def draw_frames(num_frames: int, height: int, width: int, seed: int = SEED) -> Frames:
    """[S, H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


# --- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """Matrix products of one kind.

    Attributes:
        part: Of the network.
        flops: Floating-point operations: two for a multiplication with its addition.
        num_bytes: Each operand read once and each result written once, by each product on its own.
            Attention keeps no scores.
        is_attention: Whether it is attention itself, without projections.
    """

    part: str
    flops: int
    num_bytes: int
    is_attention: bool = False


def linear(
    part: str, rows: int, inner: int, columns: int, *, times: int = 1, itemsize: int = 2
) -> Work:
    """`times` products [rows, inner] x [inner, columns]."""
    numbers = rows * inner + inner * columns + rows * columns
    return Work(
        part=part,
        flops=2 * times * rows * inner * columns,
        num_bytes=itemsize * times * numbers,
    )


def attention(
    part: str, queries: int, keys: int, channels: int, *, times: int = 1, itemsize: int = 2
) -> Work:
    """`times` attentions of all heads together, which have `channels`."""
    return Work(
        part=part,
        flops=4 * times * queries * keys * channels,
        num_bytes=itemsize * times * 2 * (queries + keys) * channels,
        is_attention=True,
    )


def step_work(
    setup: Setup, *, num_text_tokens: int = NUM_TEXT_TOKENS, itemsize: int = 2
) -> list[Work]:
    """All matrix products of one step of a chunk but the first.

    Args:
        setup: The model and the video.
        num_text_tokens: That cross attention reads; fewer where padding is merged.
        itemsize: Bytes of a number in the network's dtype.
    """
    config, inner = setup.config("transformer"), setup.inner_dim
    num_layers = int(config.num_layers)
    num_adapters = math.ceil(num_layers / config.inject_face_latents_blocks)
    per_slot = setup.tokens_per_slot
    num_tokens = setup.num_slots * per_slot
    patch = math.prod(config.patch_size)
    faces = int(config.face_encoder_num_heads) + 1  # tokens of a slot

    own = partial(linear, itemsize=itemsize)
    exact = partial(linear, itemsize=4)  # always in float32
    attend = partial(attention, itemsize=itemsize)
    ends, cross = "embeddings and output", "cross attention"
    work = [
        own(ends, num_tokens, config.in_channels * patch, inner),
        exact(ends, 1, config.freq_dim, inner),
        exact(ends, 1, inner, inner),
        own(ends, 1, inner, 6 * inner),
        own(ends, num_tokens, inner, config.out_channels * patch),
        own("self attention: projections", num_tokens, inner, inner, times=4 * num_layers),
        attend("self attention", num_tokens, num_tokens, inner, times=num_layers),
        own(cross, num_tokens, inner, inner, times=2 * num_layers),
        own(cross, num_text_tokens, inner, inner, times=2 * num_layers),
        attend(cross, num_tokens, num_text_tokens, inner, times=num_layers),
        own("feed-forward", num_tokens, inner, config.ffn_dim, times=num_layers),
        own("feed-forward", num_tokens, config.ffn_dim, inner, times=num_layers),
        own("face adapters", num_tokens, inner, inner, times=2 * num_adapters),
        own("face adapters", setup.num_slots * faces, inner, inner, times=2 * num_adapters),
        attend("face adapters", per_slot, faces, inner, times=num_adapters * setup.num_slots),
    ]
    added = config.added_kv_proj_dim
    if added is not None:
        images = setup.num_image_tokens
        work += [
            own(cross, images, added, inner, times=2 * num_layers),
            attend(cross, num_tokens, images, inner, times=num_layers),
        ]
    return work


def context_work(setup: Setup, *, num_text_tokens: int = NUM_TEXT_TOKENS) -> list[Work]:
    """What the first step of a chunk computes for all of them: text and image tokens."""
    config, inner = setup.config("transformer"), setup.inner_dim
    work = [
        linear("context", num_text_tokens, config.text_dim, inner),
        linear("context", num_text_tokens, inner, inner),
    ]
    if config.added_kv_proj_dim is not None:
        images, dim = setup.num_image_tokens, config.image_dim
        work += [linear("context", images, dim, dim), linear("context", images, dim, inner)]
    return work


class ProductBytes(TorchDispatchMode):
    """Counts the bytes that matrix products and convolutions read and write, without biases.

    Attributes:
        total: Since the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        operands = {
            aten.mm.default: slice(0, 2),
            aten.addmm.default: slice(1, 3),
            aten.convolution.default: slice(0, 2),
        }.get(func)
        if operands is not None:
            tensors = [*args[operands], result]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count_on_meta(setup: Setup, num_steps: int) -> tuple[int, int, int]:
    """Run the first steps of a chunk without memory, and count.

    Returns:
        Operations; those of attention alone; bytes of all products but attention.
    """
    meta = torch.device("meta")
    names = ("transformer", "vae")
    pipeline = assemble({name: _in_bfloat16(setup, name) for name in names}, meta)
    sigmas = torch.linspace(1, 0, num_steps + 1)
    conditioning = draw_conditioning(setup, meta, torch.bfloat16)
    with FlopCounterMode(display=False) as flops, ProductBytes() as products:
        for _ in pipeline.denoise(draw_noise(setup), sigmas, conditioning):
            pass
    # On the meta device attention falls apart into its products, and nothing else uses these.
    attention_flops = flops.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return flops.get_total_flops(), attention_flops, products.total


def _in_bfloat16(setup: Setup, name: str) -> nn.Module:
    """A network on the meta device in the dtypes that loading in bfloat16 gives it."""
    from everanimate_cli.checkpoint import dtype_in_memory  # noqa: PLC0415

    network = copy.deepcopy(setup.empty[name])
    for key, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtype_in_memory(name, key, torch.bfloat16))
    return network


def count_flops(call: Callable[[], object]) -> int:
    """Operations of what is run on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def once_flops(setup: Setup) -> dict[str, int]:
    """Operations of what is computed once per chunk or run, by the names of `run_vae`."""
    meta = torch.device("meta")
    networks = {name: _in_bfloat16(setup, name) for name in setup.configs}
    pipeline = assemble(networks, meta)
    height, width = setup.height, setup.width
    frames = setup.frames_per_chunk
    pixels = torch.empty(1, 3, frames, height, width, device=meta)
    latents = torch.empty(
        1, pipeline.latent_channels, setup.num_target_slots, *setup.latent_size, device=meta
    )
    faces = torch.empty(1, 3, frames, setup.face_size, setup.face_size, device=meta)
    size = int(setup.config("image_encoder").image_size)
    picture = torch.empty(1, 3, size, size, device=meta, dtype=torch.bfloat16)
    ids = torch.zeros(1, NUM_TEXT_TOKENS, dtype=torch.long, device=meta)
    calls: dict[str, Callable[[], object]] = {
        "VAE encode, pose of a chunk": lambda: pipeline.encode_video(pixels),
        "VAE encode, one picture": lambda: pipeline.encode_video(pixels[:, :, :1]),
        "VAE decode, a chunk": lambda: pipeline.decode(latents),
        "faces of a chunk": lambda: pipeline.transformer.embed_face(faces),
        "CLIP, one picture": lambda: networks["image_encoder"](picture),
        "T5, one prompt": lambda: networks["text_encoder"](ids),
    }
    return {name: count_flops(call) for name, call in calls.items()}


# --- the card ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Card:
    """The device and what it can do.

    Attributes:
        name: Of the card, or of the processor.
        date: Of the run, UTC.
        driver: Of the card.
        memory_mib: Of the card.
        versions: Of libraries.
        sheet_flops: Dense bfloat16 operations per second by the data sheet; None if unknown.
        sheet_bandwidth: Bytes per second by the data sheet; None if unknown.
        measured_flops: Of a large matrix product, here.
        measured_bandwidth: Of a large copy, bytes read and written, here.
    """

    name: str
    date: str
    driver: str | None
    memory_mib: float | None
    versions: dict[str, str | None]
    sheet_flops: float | None
    sheet_bandwidth: float | None
    measured_flops: float
    measured_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Of the data sheet where it is known."""
        return self.sheet_flops or self.measured_flops

    @property
    def peak_bandwidth(self) -> float:
        """Of the data sheet where it is known."""
        return self.sheet_bandwidth or self.measured_bandwidth

    def floor_s(self, flops: float, num_bytes: float = 0.0) -> float:
        """What no version is faster than."""
        return max(flops / self.peak_flops, num_bytes / self.peak_bandwidth)


def look_up_card(name: str) -> tuple[float, float] | None:
    """(operations, bytes) per second of a card's data sheet."""
    for known, (tera_flops, giga_bytes) in KNOWN_CARDS.items():
        if known in name:
            return 1e12 * tera_flops, 1e9 * giga_bytes
    return None


def describe_card(device: torch.device, dtype: torch.dtype) -> Card:
    """Name the device and measure its two ceilings."""
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "CPU"
    memory = torch.cuda.get_device_properties(device).total_memory / _MIB if is_cuda else None
    sheet = look_up_card(name)
    packages = ("torch", "diffusers", "transformers", "triton", "torchao", "av", "everanimate")
    versions = {package: _version(package) for package in packages}
    versions["cuda"] = torch.version.cuda
    versions["cudnn"] = str(torch.backends.cudnn.version()) if is_cuda else None
    size = 8192 if is_cuda else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = statistics.median(time_calls(lambda: left @ right, device, repeats=10, warmups=3))
    source = torch.randn((2**29 if is_cuda else 2**22), device=device)
    target = torch.empty_like(source)
    copy_s = statistics.median(
        time_calls(lambda: target.copy_(source), device, repeats=10, warmups=3)
    )
    return Card(
        name=name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        driver=_driver() if is_cuda else None,
        memory_mib=memory,
        versions=versions,
        sheet_flops=None if sheet is None else sheet[0],
        sheet_bandwidth=None if sheet is None else sheet[1],
        measured_flops=2 * size**3 / product_s,
        measured_bandwidth=2 * source.numel() * source.element_size() / copy_s,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def synchronize(device: torch.device) -> None:
    """Wait until all work of a card is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], object], device: torch.device, *, repeats: int, warmups: int = 1
) -> list[float]:
    """Seconds of each call, the device's work included."""
    seconds = []
    for index in range(warmups + repeats):
        synchronize(device)
        started_s = time.perf_counter()
        call()
        synchronize(device)
        if index >= warmups:
            seconds.append(time.perf_counter() - started_s)
    return seconds


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float | None:
    """Most memory in tensors since `forget_peak`; None without a card."""
    return torch.cuda.max_memory_allocated(device) / _MIB if device.type == "cuda" else None


def give_back(device: torch.device) -> None:
    """Free what nobody holds any more of a card's memory."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# --- the run -------------------------------------------------------------------------------------


class Report:
    """All results, in a file at once and on the screen line by line.

    Attributes:
        record: What the file holds.
    """

    def __init__(self, path: Path | None, **head: Any) -> None:
        """Start the file.

        Args:
            path: JSON file; None writes none.
            head: What comes before the results.
        """
        self._path = path
        self.record: dict[str, Any] = {**head, "results": []}
        self._write()

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of all cases so far."""
        return self.record["results"]  # type: ignore[no-any-return]

    def add(self, part: str, case: str, **figures: Any) -> None:
        """Keep and show a result."""
        result = {"part": part, "case": case, **figures}
        self.results.append(result)
        self._write()
        shown = ", ".join(
            f"{name} {write_figure(name, value)}"
            for name, value in figures.items()
            if name in COLUMNS or name in ("failed", "skipped")
        )
        sys.stderr.write(f"{part}: {case}: {shown}\n")

    def _write(self) -> None:
        if self._path is None:
            return
        partial_path = self._path.with_name(self._path.name + ".part")
        partial_path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        partial_path.replace(self._path)


@dataclass(kw_only=True)
class Bench:
    """What all parts share.

    Attributes:
        setup: The model and the video.
        device: Where the networks run.
        dtype: Of the networks.
        card: What the device can do.
        report: Takes the results.
        num_steps: Euler steps of a whole chunk.
        repeats: Timed calls or steps per case.
        ends_s: `time.monotonic()` by which all must be over.
        has_failed: Whether a case has.
    """

    setup: Setup
    device: torch.device
    dtype: torch.dtype
    card: Card
    report: Report
    num_steps: int
    repeats: int
    ends_s: float
    has_failed: bool = field(default=False, init=False)

    @property
    def left_s(self) -> float:
        """Time left."""
        return self.ends_s - time.monotonic()

    @cached_property
    def work(self) -> list[Work]:
        """Of a step, as the network computes it here."""
        # In float32 one token stands for all padding.
        is_merged = self.dtype == torch.float32
        num_text_tokens = NUM_USED_TEXT_TOKENS + 1 if is_merged else NUM_TEXT_TOKENS
        return step_work(self.setup, num_text_tokens=num_text_tokens, itemsize=self.dtype.itemsize)

    @property
    def step_flops(self) -> int:
        """Operations of a step."""
        return sum(each.flops for each in self.work)

    @property
    def step_bytes(self) -> int:
        """Bytes of a step."""
        return sum(each.num_bytes for each in self.work)

    @property
    def likely_step_s(self) -> float:
        """A cautious guess of the seconds of a step."""
        return 4 * self.card.floor_s(self.step_flops, self.step_bytes)

    def case(
        self, part: str, case: str, call: Callable[[], dict[str, Any]], *, needs_s: float = 0.0
    ) -> None:
        """Measure one case and keep its figures, or why there are none.

        Args:
            part: Of `PARTS`.
            case: Its name within the part.
            call: Gives the figures.
            needs_s: Time that it is likely to take; it is left out if less is left.
        """
        if self.left_s < needs_s:
            reason = f"needs about {needs_s:.0f} s, {max(0.0, self.left_s):.0f} s are left"
            self.report.add(part, case, skipped=reason)
            return
        started_s = time.monotonic()
        try:
            give_back(self.device)
            forget_peak(self.device)
            figures = call()
        except Exception as error:  # the results of all other cases must not be lost with it
            self._note_failure(part, case, error)
        else:
            self.report.add(part, case, **figures, took_s=time.monotonic() - started_s)

    def run_part(self, part: str) -> None:
        """Measure all cases of a part; that it cannot begin is no reason to give up the others."""
        try:
            PARTS[part](self)
        except Exception as error:  # as in `case`
            self._note_failure(part, "all cases", error)

    def _note_failure(self, part: str, case: str, error: Exception) -> None:
        self.has_failed = True
        text = (str(error).strip().splitlines() or [""])[0]
        trace = "".join(traceback.format_exception(error)).splitlines()
        self.report.add(part, case, failed=f"{type(error).__name__}: {text}", trace=trace[-12:])

    def leave_out(self, part: str, case: str, reason: str) -> None:
        """Note that a case cannot be measured on this machine."""
        self.report.add(part, case, skipped=reason)

    def rate(self, seconds: float, flops: float, num_bytes: float = 0.0) -> dict[str, Any]:
        """Figures of a time: beside the floor, and the share of the card's peak."""
        floor_s = self.card.floor_s(flops, num_bytes)
        return {
            "seconds": seconds,
            "tera_flops": flops / 1e12,
            "tera_flops_per_s": flops / seconds / 1e12,
            "utilisation": flops / seconds / self.card.peak_flops,
            "floor_s": floor_s,
            "over_floor": seconds / floor_s,
        }

    def measure(
        self, call: Callable[[], object], flops: float, *, repeats: int | None = None
    ) -> dict[str, Any]:
        """Time a call after a warm-up."""
        forget_peak(self.device)
        seconds = time_calls(call, self.device, repeats=repeats or self.repeats)
        return {
            **self.rate(statistics.median(seconds), flops),
            "all_s": seconds,
            "peak_mib": peak_mib(self.device),
        }

    def measure_steps(
        self,
        pipeline: AnimatePipeline,
        conditioning: Conditioning,
        *,
        num_steps: int | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Time the steps of a chunk after the first, which may compile and does more.

        Args:
            pipeline: With the transformer to be measured.
            conditioning: Of the chunk.
            num_steps: Timed ones.
            given: For `denoise`.
        """
        from everanimate_cli.schedule import shifted_sigmas  # noqa: PLC0415

        sigmas = shifted_sigmas(1 + (num_steps or self.repeats), SHIFT)
        synchronize(self.device)
        steps = pipeline.denoise(draw_noise(self.setup), sigmas, conditioning, **given)
        seconds = []
        started_s = time.perf_counter()
        for latents in steps:
            synchronize(self.device)
            now_s = time.perf_counter()
            seconds.append(now_s - started_s)
            if len(seconds) == 1:
                forget_peak(self.device)
            is_finite = bool(latents.isfinite().all())
            started_s = time.perf_counter()
        if not is_finite:
            raise ArithmeticError("the latents are not finite")
        return {
            **self.rate(statistics.median(seconds[1:]), self.step_flops, self.step_bytes),
            "first_s": seconds[0],
            "all_s": seconds[1:],
            "peak_mib": peak_mib(self.device),
        }


# --- the parts -----------------------------------------------------------------------------------


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected, in float64 on the CPU."""
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    return float((value - expected).norm() / expected.norm())


def compare(value: Tensor, expected: Tensor, limit: float) -> dict[str, Any]:
    """Figures of a comparison.

    Raises:
        ArithmeticError: If the error is not below the limit.
    """
    error = relative_error(value, expected)
    if not error <= limit:
        raise ArithmeticError(f"relative error {error:.2e} is above {limit:.0e}")
    return {"relative_error": error, "limit": limit}


# One velocity, against float32.
BF16_LIMIT = 2e-2
FP8_LIMIT = 1e-1
SAGE_LIMIT = 1e-1
VAE_LIMIT, VAE_TF32_LIMIT = 1e-4, 2e-2


def run_parity(bench: Bench) -> None:
    """Each way to compute a velocity against float32, and the VAE against the CPU."""
    setup = bench.setup.shrunk()
    vae = build_network(setup, "vae", bench.device, torch.float32)
    compare_velocities(bench, setup, vae)
    compare_vae(bench, setup, vae)


def compare_velocities(bench: Bench, setup: Setup, vae: nn.Module) -> None:
    """One velocity in each way against float32."""
    from everanimate_cli.acceleration import (  # noqa: PLC0415
        compile_blocks,
        enable_fp8_matmul,
        use_attention,
    )
    from everanimate_cli.lora_adapter import store_blocks_as_fp8  # noqa: PLC0415

    device = bench.device
    low = build_network(setup, "transformer", device, torch.bfloat16)
    noise = draw_noise(setup)
    sigma = 0.832  # whose timestep is the same in bfloat16
    conditioning = draw_conditioning(setup, device, torch.bfloat16)

    def velocity(network: nn.Module) -> Tensor:
        pipeline = assemble({"transformer": network, "vae": vae}, device)
        given = {
            name: value if value is None else value.to(pipeline.transformer.dtype)
            for name, value in vars(conditioning).items()
        }
        sigmas = torch.tensor([sigma, 0.0])
        (latents,) = pipeline.denoise(noise, sigmas, replace(conditioning, **given))
        return (noise.to(device) - latents) / sigma

    expected = velocity(copy.deepcopy(low).float())
    give_back(device)
    bench.case("parity", "bfloat16", lambda: compare(velocity(low), expected, BF16_LIMIT))

    def repeat() -> dict[str, Any]:
        return {"relative_error": relative_error(velocity(low), velocity(low))}

    bench.case("parity", "bfloat16, a second time", repeat)
    for name, reason in available_attention(device, torch.bfloat16).items():
        if reason is not None:
            bench.leave_out("parity", f"attention {name}", reason)
            continue

        def with_kernel(name: Any = name) -> dict[str, Any]:
            use_attention(low, name)
            limit = SAGE_LIMIT if "sage" in name else BF16_LIMIT
            return compare(velocity(low), expected, limit)

        bench.case("parity", f"attention {name}", with_kernel)
    use_attention(low, "sdpa")

    def changed(change: Callable[[Any], None], limit: float) -> dict[str, Any]:
        network = copy.deepcopy(low)
        change(network)
        figures = compare(velocity(network), expected, limit)
        torch._dynamo.reset()
        return figures

    ways: list[tuple[str, Callable[[Any], None], float, str | None]] = [
        ("weights stored in fp8", store_blocks_as_fp8, FP8_LIMIT, None),
        ("products in fp8", enable_fp8_matmul, FP8_LIMIT, why_not_fp8(device, torch.bfloat16)),
        ("compiled", compile_blocks, BF16_LIMIT, why_not_compile(device)),
    ]
    for name, change, limit, reason in ways:
        if reason is None:
            call = partial(changed, change, limit)
            bench.case("parity", name, call, needs_s=60.0 if name == "compiled" else 0.0)
        else:
            bench.leave_out("parity", name, reason)


def compare_vae(bench: Bench, setup: Setup, vae: Any) -> None:
    """The VAE on the device against the CPU, exact and as cuDNN computes by default."""
    device = bench.device
    cpu = torch.device("cpu")
    unused = _in_bfloat16(setup, "transformer")
    on_device = assemble({"transformer": unused, "vae": vae}, device)
    beside = assemble({"transformer": unused, "vae": copy.deepcopy(vae).to(cpu)}, cpu)
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.rand(1, 3, 9, 64, 96, generator=generator) * 2 - 1
    latents = beside.encode_video(pixels)
    frames = beside.decode(latents)

    def against_cpu(*, tf32: bool) -> dict[str, Any]:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            limit = VAE_TF32_LIMIT if tf32 else VAE_LIMIT
            encoded = compare(on_device.encode_video(pixels), latents, limit)
            decoded = compare(on_device.decode(latents), frames, limit)
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return {
            "relative_error": max(encoded["relative_error"], decoded["relative_error"]),
            "limit": limit,
        }

    bench.case("parity", "VAE in float32", partial(against_cpu, tf32=False))
    if device.type == "cuda":
        bench.case("parity", "VAE in tf32", partial(against_cpu, tf32=True))


def available_attention(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Name of each kernel and why it cannot be used here; None if it can."""
    from everanimate_cli.acceleration import choose_attention  # noqa: PLC0415
    from everanimate_cli.errors import SettingsError  # noqa: PLC0415
    from everanimate_cli.speed_settings import KERNELS  # noqa: PLC0415

    reasons: dict[str, str | None] = {}
    for name in KERNELS:
        try:
            choose_attention(name, device, dtype)  # type: ignore[arg-type]
        except SettingsError as error:
            reasons[name] = str(error)
        else:
            reasons[name] = None
    return reasons


def why_not_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in fp8 cannot be computed here; None if they can."""
    from everanimate_cli.acceleration import check_fp8_matmul  # noqa: PLC0415
    from everanimate_cli.errors import SettingsError  # noqa: PLC0415

    try:
        check_fp8_matmul(device, dtype)
    except SettingsError as error:
        return str(error)
    return None


def why_not_compile(device: torch.device) -> str | None:
    """Why nothing can be compiled here; None if it can."""
    from everanimate_cli.acceleration import check_compile  # noqa: PLC0415
    from everanimate_cli.errors import SettingsError  # noqa: PLC0415

    try:
        check_compile(device)
    except SettingsError as error:
        return str(error)
    return None


def build_for_steps(bench: Bench) -> tuple[AnimatePipeline, Conditioning]:
    """A pipeline without encoders, and what a step needs."""
    give_back(bench.device)
    pipeline = build_pipeline(bench.setup, bench.device, bench.dtype, ("transformer", "vae"))
    return pipeline, draw_conditioning(bench.setup, bench.device, bench.dtype)


def run_step(bench: Bench) -> None:
    """A step as it is computed without any option."""
    from everanimate_cli.acceleration import choose_attention, use_attention  # noqa: PLC0415

    def plain() -> dict[str, Any]:
        pipeline, given = build_for_steps(bench)
        attention = choose_attention("auto", bench.device, bench.dtype)
        use_attention(pipeline.transformer, attention)
        return {"attention": attention, **bench.measure_steps(pipeline, given)}

    bench.case("step", "default", plain, needs_s=(1 + bench.repeats) * bench.likely_step_s)


def run_attention(bench: Bench) -> None:
    """A step, and self attention alone, with each kernel."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: PLC0415

    from everanimate_cli.acceleration import use_attention  # noqa: PLC0415
    from everanimate_cli.speed_settings import KERNELS  # noqa: PLC0415

    setup, device = bench.setup, bench.device
    num_tokens = setup.num_slots * setup.tokens_per_slot
    config = setup.config("transformer")
    shape = (1, num_tokens, config.num_attention_heads, config.attention_head_dim)
    whole = attention("", num_tokens, num_tokens, setup.inner_dim, itemsize=bench.dtype.itemsize)
    scores_mib = config.num_attention_heads * num_tokens**2 * bench.dtype.itemsize / _MIB
    reasons = available_attention(device, bench.dtype)
    if bench.card.memory_mib is not None and 2 * scores_mib > bench.card.memory_mib:
        reasons["sdpa-math"] = f"keeps the scores, {scores_mib:.0f} MiB"

    def alone(name: str) -> dict[str, Any]:
        tensors = [torch.randn(shape, device=device).to(bench.dtype) for _ in range(3)]
        backend: Any = KERNELS[name].backend
        call = partial(dispatch_attention_fn, *tensors, backend=backend)
        with torch.no_grad():
            return bench.measure(call, whole.flops, repeats=5)

    usable = [name for name, reason in reasons.items() if reason is None]
    for name, reason in reasons.items():
        if reason is None:
            bench.case("attention", f"{name}, alone", partial(alone, name), needs_s=5.0)
        else:
            bench.leave_out("attention", name, reason)
    needs_s = (1 + bench.repeats) * bench.likely_step_s
    if bench.left_s < needs_s:
        bench.leave_out("attention", "steps", f"{bench.left_s:.0f} s are left")
        return
    pipeline, given = build_for_steps(bench)
    for name in usable:

        def steps(name: Any = name) -> dict[str, Any]:
            use_attention(pipeline.transformer, name)
            return bench.measure_steps(pipeline, given)

        bench.case("attention", f"{name}, step", steps, needs_s=needs_s)


def run_compile(bench: Bench) -> None:
    """A step with compiled blocks, and how long compiling takes."""
    from everanimate_cli.acceleration import compile_blocks, use_attention  # noqa: PLC0415

    reason = why_not_compile(bench.device)
    if reason is not None:
        bench.leave_out("compile", "step", reason)
        return

    def compiled(attention: Any) -> dict[str, Any]:
        pipeline, given = build_for_steps(bench)
        use_attention(pipeline.transformer, attention)
        compile_blocks(pipeline.transformer)
        try:
            return bench.measure_steps(pipeline, given)
        finally:
            torch._dynamo.reset()

    needs_s = 90 + (1 + bench.repeats) * bench.likely_step_s
    fastest = fastest_attention(bench.report.results)
    for name in dict.fromkeys(("sdpa", fastest or "sdpa")):
        bench.case("compile", f"{name}, step", partial(compiled, name), needs_s=needs_s)


def fastest_attention(results: Sequence[Mapping[str, Any]]) -> str | None:
    """The kernel of the shortest step in part "attention"; None if that has no results."""
    steps = {
        each["case"].removesuffix(", step"): each["seconds"]
        for each in results
        if each["part"] == "attention" and each["case"].endswith(", step") and "seconds" in each
    }
    return min(steps, key=lambda name: steps[name], default=None)


def run_fp8(bench: Bench) -> None:
    """A step with weights or products in fp8, and one product alone."""
    from everanimate_cli.acceleration import compile_blocks, enable_fp8_matmul  # noqa: PLC0415
    from everanimate_cli.lora_adapter import store_blocks_as_fp8  # noqa: PLC0415

    needs_s = (1 + bench.repeats) * bench.likely_step_s

    def stored() -> dict[str, Any]:
        pipeline, given = build_for_steps(bench)
        store_blocks_as_fp8(pipeline.transformer)
        return bench.measure_steps(pipeline, given)

    bench.case("fp8", "weights stored in fp8", stored, needs_s=needs_s)
    product = "feed-forward product alone"
    bench.case("fp8", product, partial(_measure_product, bench, in_fp8=False))
    if _multiplies_fp8(bench.device):
        bench.case("fp8", f"{product}, in fp8", partial(_measure_product, bench, in_fp8=True))
    else:
        reason = "needs a CUDA card of compute capability 8.9"
        bench.leave_out("fp8", f"{product}, in fp8", reason)
    reason = why_not_fp8(bench.device, bench.dtype)

    def multiplied(*, is_compiled: bool) -> dict[str, Any]:
        pipeline, given = build_for_steps(bench)
        enable_fp8_matmul(pipeline.transformer)
        if is_compiled:
            compile_blocks(pipeline.transformer)
        figures = bench.measure_steps(pipeline, given)
        torch._dynamo.reset()
        return figures

    for is_compiled in (False, True):
        case = "products in fp8, compiled" if is_compiled else "products in fp8"
        missing = reason or (why_not_compile(bench.device) if is_compiled else None)
        if missing is not None:
            bench.leave_out("fp8", case, missing)
            continue
        call = partial(multiplied, is_compiled=is_compiled)
        bench.case("fp8", case, call, needs_s=needs_s + (90 if is_compiled else 0))


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _measure_product(bench: Bench, *, in_fp8: bool) -> dict[str, Any]:
    """The first layer of a feed-forward block, by torch alone; in fp8 without the scaling."""
    setup = bench.setup
    rows = setup.num_slots * setup.tokens_per_slot
    inner, columns = setup.inner_dim, int(setup.config("transformer").ffn_dim)
    left = torch.randn(rows, inner, device=bench.device).to(bench.dtype)
    right = torch.randn(columns, inner, device=bench.device).to(bench.dtype).t()
    call: Callable[[], object] = lambda: left @ right  # noqa: E731
    if in_fp8:
        left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
        scales = (
            torch.ones(rows, 1, device=bench.device),
            torch.ones(1, columns, device=bench.device),
        )
        call = partial(
            torch._scaled_mm,
            left,
            right,
            *scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # as torchao calls it
        )
    return bench.measure(call, 2 * rows * inner * columns, repeats=5)


def run_cache(bench: Bench) -> None:
    """Steps with the step cache, which skips as many as it ever does."""
    from everanimate_cli.schedule import shifted_sigmas  # noqa: PLC0415
    from everanimate_cli.step_cache import StepCache, plan_skips  # noqa: PLC0415

    num_steps = max(4, bench.num_steps // 2)
    # Ratios of 1 leave no error, so that only the rules of the plan keep steps from being skipped.
    skips = plan_skips([1.0] * num_steps, threshold=1.0)
    needs_s = (num_steps + 2) * bench.likely_step_s
    if bench.left_s < needs_s:
        bench.leave_out("cache", "steps", f"{bench.left_s:.0f} s are left")
        return
    pipeline, given = build_for_steps(bench)

    def measuring() -> dict[str, Any]:
        return bench.measure_steps(pipeline, given, step_caches=[StepCache()])

    def skipping() -> dict[str, Any]:
        sigmas = shifted_sigmas(num_steps, SHIFT)
        cache = StepCache(skips)
        seconds = []
        started_s = time.perf_counter()
        for _ in pipeline.denoise(draw_noise(bench.setup), sigmas, given, step_caches=[cache]):
            synchronize(bench.device)
            now_s = time.perf_counter()
            seconds.append(now_s - started_s)
            started_s = now_s
        of_kind = defaultdict(list)
        for is_skipped, one_s in list(zip(skips, seconds, strict=True))[1:]:
            of_kind[is_skipped].append(one_s)
        computed_share = 1 - sum(skips) / num_steps
        return {
            **bench.rate(sum(seconds) / num_steps, computed_share * bench.step_flops),
            "steps": num_steps,
            "skipped_steps": sum(skips),
            "computed_step_s": statistics.median(of_kind[False] or seconds[:1]),
            "skipped_step_s": statistics.median(of_kind[True]),
            "all_s": seconds,
            "peak_mib": peak_mib(bench.device),
        }

    bench.case("cache", "step while ratios are measured", measuring)
    bench.case("cache", "step on average, as many skipped as may be", skipping)


def run_vae(bench: Bench) -> None:
    """What is computed once per chunk or run, and other layouts of the VAE."""
    from everanimate_cli.acceleration import use_channels_last  # noqa: PLC0415

    setup, device = bench.setup, bench.device
    flops = once_flops(setup)

    def text() -> dict[str, Any]:
        encoder: Any = build_network(setup, "text_encoder", device, bench.dtype)
        ids = torch.randint(1, 100, (1, NUM_TEXT_TOKENS), device=device)
        mask = (torch.arange(NUM_TEXT_TOKENS, device=device) < NUM_USED_TEXT_TOKENS).long()[None]
        with torch.no_grad():
            return bench.measure(partial(encoder, ids, attention_mask=mask), flops[prompt])

    prompt = "T5, one prompt"
    bench.case("vae", prompt, text, needs_s=20.0)
    height, width, frames = setup.height, setup.width, setup.frames_per_chunk
    pipeline = build_pipeline(setup, device, bench.dtype)
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.rand(1, 3, frames, height, width, generator=generator).to(device) * 2 - 1
    latents = draw_noise(setup)[:, :, setup.num_identity_slots :].to(device)
    picture_u8 = draw_frames(1, height, width)[0]
    face_u8 = draw_frames(frames, setup.face_size, setup.face_size)
    encoding, decoding = "VAE encode, pose of a chunk", "VAE decode, a chunk"
    calls: dict[str, Callable[[], object]] = {
        encoding: lambda: pipeline.encode_video(pixels),
        "VAE encode, one picture": lambda: pipeline.encode_video(pixels[:, :, :1]),
        decoding: lambda: pipeline.decode(latents),
        "faces of a chunk": lambda: pipeline.embed_face(face_u8),
        "CLIP, one picture": lambda: pipeline.encode_clip(picture_u8),
    }
    for name, call in calls.items():
        bench.case("vae", name, partial(bench.measure, call, flops[name]), needs_s=10.0)

    def tiled() -> dict[str, Any]:
        pipeline.tile_decoding = True
        try:
            return bench.measure(calls[decoding], flops[decoding])
        finally:
            pipeline.tile_decoding = False

    bench.case("vae", f"{decoding}, tiled", tiled, needs_s=20.0)

    def in_other_form(change: Callable[[Any], None], name: str) -> dict[str, Any]:
        vae = copy.deepcopy(pipeline.vae)
        other = assemble({"transformer": pipeline.transformer, "vae": vae}, device)
        change(vae)
        codings = {
            encoding: lambda: other.encode_video(pixels),
            decoding: lambda: other.decode(latents),
        }
        return bench.measure(codings[name], flops[name])

    forms: dict[str, Callable[[Any], None]] = {
        "channels last": use_channels_last,
        "channels first": _use_channels_first,
        "bfloat16": lambda vae: vae.to(torch.bfloat16),
    }
    for form, change in forms.items():
        for name in (encoding, decoding):
            call = partial(in_other_form, change, name)
            bench.case("vae", f"{name}, {form}", call, needs_s=20.0)


def _use_channels_first(vae: nn.Module) -> None:
    """Undo `acceleration.use_channels_last`."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous()


def build_chunks(bench: Bench, pipeline: AnimatePipeline, num_chunks: int, steps: int) -> Rollout:
    """A chunk loop over noise."""
    from everanimate_cli.memory import count_drawn_frames, draw_anchor_indices  # noqa: PLC0415
    from everanimate_cli.rollout import Rollout  # noqa: PLC0415

    setup = bench.setup
    size = (setup.height, setup.width)
    pose_u8 = draw_frames(setup.frames_per_chunk, *size)
    face_u8 = draw_frames(setup.frames_per_chunk, setup.face_size, setup.face_size)
    picture_u8 = draw_frames(1, *size, seed=SEED + 2)[0]
    given = draw_conditioning(setup, bench.device, bench.dtype)
    num_drawn = count_drawn_frames(setup.num_identity_slots)
    return Rollout(
        pipeline=pipeline,
        reference_u8=picture_u8,
        picture_u8=picture_u8,
        views_u8=[],
        read_driving=lambda _: (pose_u8, face_u8),
        noise=lambda chunk_index: draw_noise(setup, chunk_index),
        anchor_frame_indices=draw_anchor_indices(SEED, setup.frames_per_chunk, num_drawn),
        prompt_embeds=given.prompt_embeds,
        num_chunks=num_chunks,
        frames_per_chunk=setup.frames_per_chunk,
        overlap=setup.overlap,
        num_identity_slots=setup.num_identity_slots,
        num_inference_steps=steps,
        shift=SHIFT,
    )


def run_chunk(bench: Bench) -> None:
    """Two chunks, the first of which also makes the identity memory."""
    from everanimate_cli.rollout import Chunk, Step  # noqa: PLC0415

    setup, device = bench.setup, bench.device
    # As many steps as there is time for, should that not be all of them.
    fitting = (bench.left_s - 60) / (2 * bench.likely_step_s)
    if fitting < 1:
        bench.leave_out("chunk", "two chunks", f"{bench.left_s:.0f} s are left")
        return
    steps = int(min(bench.num_steps, fitting))
    pipeline = build_pipeline(setup, device, bench.dtype)
    rollout = build_chunks(bench, pipeline, 2, steps)
    stages = iter(rollout.run())

    def one_chunk() -> dict[str, Any]:
        gaps = []
        started_s = before_s = time.perf_counter()
        for made in stages:
            synchronize(device)
            now_s = time.perf_counter()
            if isinstance(made, Step):
                gaps.append(now_s - before_s)
                before_s = now_s
            if isinstance(made, Chunk):
                break
        seconds = time.perf_counter() - started_s
        step_s = statistics.median(gaps[1:] or gaps)
        num_kept = setup.frames_per_chunk - setup.overlap
        return {
            **bench.rate(seconds, steps * bench.step_flops, steps * bench.step_bytes),
            "steps": steps,
            "step_s": step_s,
            "beside_steps_s": seconds - steps * step_s,
            "frames_per_s": num_kept / seconds,
            "peak_mib": peak_mib(device),
        }

    bench.case("chunk", "first chunk", one_chunk)
    bench.case("chunk", "second chunk", one_chunk)


# What rounding does to a toy video, on another device in float32 and in bfloat16: mean difference
# of 8-bit values, see `run_toy`.
TOY_LIMIT, TOY_BF16_LIMIT = 0.1, 1.0


def run_toy(bench: Bench) -> None:
    """Three chunks of the toy model on the device and on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        make: Callable[[torch.device, torch.dtype], Frames]
        if importlib.util.find_spec("av") is None:
            make = make_toy_frames
            how = "chunk loop"
        else:
            make = partial(animate_toy, Path(folder))
            how = "animate"
        expected = make(torch.device("cpu"), torch.float32)

        def on_device(dtype: torch.dtype, limit: float) -> dict[str, Any]:
            synchronize(bench.device)
            started_s = time.perf_counter()
            frames = make(bench.device, dtype)
            seconds = time.perf_counter() - started_s
            difference = np.abs(frames.astype(int) - expected).mean()
            if not difference <= limit:
                raise ArithmeticError(f"values differ by {difference:.2f} on average")
            return {
                "seconds": seconds,
                "frames": len(frames),
                "mean_difference": float(difference),
                "limit": limit,
                "by": how,
                "peak_mib": peak_mib(bench.device),
            }

        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            exact = partial(on_device, torch.float32, TOY_LIMIT)
            bench.case("toy", "float32", exact, needs_s=20.0)
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
        if bench.device.type == "cuda":
            rounded = partial(on_device, torch.bfloat16, TOY_BF16_LIMIT)
            bench.case("toy", "bfloat16", rounded, needs_s=20.0)


NUM_TOY_CHUNKS = 3


def toy_inputs() -> tuple[Frames, Frames, Frames]:
    """Reference [H, W, 3], poses [S, H, W, 3] and faces [S, Hf, Wf, 3] for three chunks."""
    from everanimate_cli.images import fit_frame  # noqa: PLC0415
    from everanimate_cli.settings import read_model_defaults  # noqa: PLC0415
    from everanimate_cli.toyworld import ToyScene  # noqa: PLC0415

    defaults = read_model_defaults(TOY_FOLDER)
    stride = defaults.frames_per_chunk - defaults.overlap
    num_frames = defaults.frames_per_chunk + (NUM_TOY_CHUNKS - 1) * stride
    size = {"height": defaults.height, "width": defaults.width}
    reference_u8 = ToyScene(SEED, SEED, **size).reference()
    side = defaults.face_size
    frames = list(ToyScene(SEED + 1, SEED, **size).frames(num_frames, rate_fps=defaults.fps))
    poses_u8 = np.stack([frame.pose for frame in frames])
    faces_u8 = np.stack([fit_frame(frame.face, side, side, "stretch") for frame in frames])
    return reference_u8, poses_u8, faces_u8


def make_toy_frames(device: torch.device, dtype: torch.dtype) -> Frames:
    """The frames [S, H, W, 3] of three chunks, by the chunk loop."""
    from everanimate_cli import weights  # noqa: PLC0415
    from everanimate_cli.chunks import ChunkPlan  # noqa: PLC0415
    from everanimate_cli.hub import locate_model  # noqa: PLC0415
    from everanimate_cli.memory import chunk_noise, draw_anchor_indices  # noqa: PLC0415
    from everanimate_cli.rollout import Chunk, Rollout  # noqa: PLC0415
    from everanimate_cli.settings import TOY_MODEL  # noqa: PLC0415

    reference_u8, poses_u8, faces_u8 = toy_inputs()
    source = locate_model(TOY_MODEL, lambda _: None, download=False)
    defaults = source.defaults
    plan = ChunkPlan(
        num_frames=len(poses_u8),
        frames_per_chunk=defaults.frames_per_chunk,
        overlap=defaults.overlap,
    )
    pipeline = weights.load_pipeline(source, [], device, dtype)

    def read_driving(chunk_index: int) -> tuple[Frames, Frames]:
        first = plan.first_frame(chunk_index)
        frames = slice(first, first + plan.frames_per_chunk)
        return poses_u8[frames], faces_u8[frames]

    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=reference_u8,
        picture_u8=reference_u8,
        views_u8=[],
        read_driving=read_driving,
        noise=lambda chunk_index: chunk_noise(SEED, chunk_index, rollout.noise_shape),
        anchor_frame_indices=draw_anchor_indices(
            SEED, defaults.frames_per_chunk, defaults.identity_slots - 1
        ),
        prompt_embeds=pipeline.encode_prompt(defaults.prompt),
        num_chunks=plan.num_chunks,
        frames_per_chunk=plan.frames_per_chunk,
        overlap=plan.overlap,
        num_identity_slots=defaults.identity_slots,
        num_inference_steps=defaults.num_inference_steps,
        shift=defaults.shift,
    )
    kept = []
    for made in rollout.run():
        if isinstance(made, Chunk):
            frames = plan.kept_frames(made.chunk_index)
            kept.append(made.frames_u8[frames.start : frames.stop])
    return np.concatenate(kept)


def animate_toy(folder: Path, device: torch.device, dtype: torch.dtype) -> Frames:
    """The frames [S, H, W, 3] of three chunks, by `animate` as the command runs it."""
    from everanimate_cli.animate import animate  # noqa: PLC0415
    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.images import read_image, write_png  # noqa: PLC0415
    from everanimate_cli.settings import (  # noqa: PLC0415
        TOY_MODEL,
        AnimateSettings,
        read_model_defaults,
    )

    rate = read_model_defaults(TOY_FOLDER).fps
    reference_u8, poses_u8, faces_u8 = toy_inputs()
    write_png(folder / "reference.png", reference_u8)
    for name, frames_u8 in (("pose", poses_u8), ("face", faces_u8)):
        height, width = frames_u8.shape[1:3]
        path = folder / f"{name}.mp4"
        with VideoWriter(path, height=height, width=width, rate=rate, crf=12) as writer:
            writer.write(frames_u8)
    label = f"{device.type}-{str(dtype).removeprefix('torch.')}"
    pictures = folder / label
    settings = AnimateSettings(
        ref=folder / "reference.png",
        pose=folder / "pose.mp4",
        face=folder / "face.mp4",
        output=folder / f"{label}.mp4",
        model=TOY_MODEL,
        png=pictures,
        device=device.type,  # type: ignore[arg-type]  # of those known
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        overwrite=True,
    )
    animate(settings, lambda _: None)
    return np.stack([read_image(path) for path in sorted(pictures.glob("*.png"))])


def run_presets(bench: Bench) -> None:
    """Each preset: a picture, a step, a chunk's frames, on a card held to its size."""
    from everanimate_cli.hub import locate_model  # noqa: PLC0415
    from everanimate_cli.placement import Job, estimate, read_sizes, released_sizes  # noqa: PLC0415
    from everanimate_cli.placement_settings import PRESETS  # noqa: PLC0415
    from everanimate_cli.settings import TOY_MODEL  # noqa: PLC0415

    setup, device = bench.setup, bench.device
    if setup.name == "full":
        sizes = released_sizes()
    else:
        sizes = read_sizes(locate_model(TOY_MODEL, lambda _: None, download=False))
    job = Job(
        height=setup.height,
        width=setup.width,
        frames_per_chunk=setup.frames_per_chunk,
        num_identity_slots=setup.num_identity_slots,
        dtype=bench.dtype,
    )
    for name, placement in PRESETS.items():
        needed = estimate(sizes, placement, job, has_streams=device.type == "cuda")
        memory_mib = bench.card.memory_mib
        limit_mib = None if memory_mib is None else int(name) * 1e9 / _MIB
        if memory_mib is not None and limit_mib is not None and limit_mib > memory_mib:
            bench.leave_out("presets", name, f"the card has {memory_mib:.0f} MiB")
            continue
        call = partial(_measure_preset, bench, placement, needed, limit_mib)
        bench.case("presets", name, call, needs_s=40 + 4 * bench.likely_step_s)


def _measure_preset(
    bench: Bench, placement: Any, needed: Any, limit_mib: float | None
) -> dict[str, Any]:
    """Peaks of the phases of a chunk beside their estimates, and the seconds of a step."""
    from everanimate_cli.offloading import place  # noqa: PLC0415

    setup, device = bench.setup, bench.device
    cpu = torch.device("cpu")
    names = ("transformer", "vae", "image_encoder")
    networks = {name: build_network(setup, name, device, bench.dtype, home=cpu) for name in names}
    give_back(device)
    if limit_mib is not None and bench.card.memory_mib is not None:
        share = limit_mib / bench.card.memory_mib
        torch.cuda.set_per_process_memory_fraction(share)
    try:
        started_s = time.perf_counter()
        rota = place(networks, placement, device)
        synchronize(device)
        place_s = time.perf_counter() - started_s
        tiled = placement.tile_decoding
        pipeline = assemble(networks, device, rota=rota, tile_decoding=tiled)
        picture_u8 = draw_frames(1, setup.height, setup.width)[0]
        pose_u8 = draw_frames(setup.frames_per_chunk, setup.height, setup.width)
        latents = draw_noise(setup)[:, :, setup.num_identity_slots :]
        peaks: dict[str, float | None] = {}
        forget_peak(device)
        pipeline.encode_clip(picture_u8)
        pipeline.encode_video(torch.from_numpy(pose_u8).permute(3, 0, 1, 2)[None] / 127.5 - 1)
        synchronize(device)
        peaks["encode"] = peak_mib(device)
        given = draw_conditioning(setup, device, bench.dtype)
        figures = bench.measure_steps(pipeline, given, num_steps=min(2, bench.repeats))
        peaks["denoise"] = figures["peak_mib"]
        forget_peak(device)
        started_s = time.perf_counter()
        pipeline.decode(latents)
        synchronize(device)
        decode_s = time.perf_counter() - started_s
        peaks["decode"] = peak_mib(device)
        reserved = torch.cuda.max_memory_reserved(device) / _MIB if limit_mib else None
    finally:
        if limit_mib is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
    estimated = max(needed.phases_mib[phase] for phase in peaks)
    measured = [value for value in peaks.values() if value is not None]
    return {
        **figures,
        "peak_mib": max(measured) if measured else None,
        "estimate_mib": estimated,
        "needed_mib": needed.needed_mib,
        "reserved_mib": reserved,
        "phase_peaks_mib": peaks,
        "phase_estimates_mib": needed.phases_mib,
        "limit_mib": limit_mib,
        "place_s": place_s,
        "decode_s": decode_s,
        "placement": placement.describe(),
    }


PARTS: dict[str, Callable[[Bench], None]] = {
    "parity": run_parity,
    "step": run_step,
    "vae": run_vae,
    "attention": run_attention,
    "compile": run_compile,
    "fp8": run_fp8,
    "cache": run_cache,
    "chunk": run_chunk,
    "toy": run_toy,
    "presets": run_presets,
}


# --- tables --------------------------------------------------------------------------------------

# Figure -> (head of its column, how it is written).
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("s", "{:.4g}".format),
    "steps": ("steps", "{}".format),
    "step_s": ("s / step", "{:.3f}".format),
    "first_s": ("first s", "{:.3g}".format),
    "tera_flops_per_s": ("TFLOP/s", "{:.4g}".format),
    "utilisation": ("of peak", "{:.1%}".format),
    "floor_s": ("floor s", "{:.4g}".format),
    "over_floor": ("over floor", "{:.2f}".format),
    "skipped_steps": ("skipped", "{}".format),
    "skipped_step_s": ("s / skipped step", "{:.3f}".format),
    "beside_steps_s": ("s beside steps", "{:.2f}".format),
    "frames_per_s": ("frames / s", "{:.2f}".format),
    "peak_mib": ("peak MiB", "{:.0f}".format),
    "estimate_mib": ("estimate MiB", "{:.0f}".format),
    "limit_mib": ("held to MiB", "{:.0f}".format),
    "decode_s": ("decode s", "{:.2f}".format),
    "relative_error": ("relative error", "{:.1e}".format),
    "mean_difference": ("mean difference", "{:.3f}".format),
    "limit": ("at most", "{:g}".format),
}


def write_figure(name: str, value: Any) -> str:
    """A figure as it stands in a table."""
    if value is None:
        return ""
    return COLUMNS[name][1](value) if name in COLUMNS else str(value)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns after the first aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def lay_out_results(results: Sequence[Mapping[str, Any]]) -> str:
    """One table per part, with the columns that it has, and lines for what has no figures."""
    texts = []
    for part in dict.fromkeys(result["part"] for result in results):
        of_part = [result for result in results if result["part"] == part]
        measured = [each for each in of_part if "failed" not in each and "skipped" not in each]
        names = [name for name in COLUMNS if any(each.get(name) is not None for each in measured)]
        if measured:
            head = [part, *(COLUMNS[name][0] for name in names)]
            lines = [
                [each["case"], *(write_figure(name, each.get(name)) for name in names)]
                for each in measured
            ]
            texts.append(table(head, lines))
        texts += [
            # What to do about it stands in the JSON file.
            f"{part}, {each['case']}: {word}: {each[word].partition('. ')[0]}\n"
            for each in of_part
            for word in ("failed", "skipped")
            if word in each
        ]
    return "\n".join(texts)


def lay_out_floor(work: Sequence[Work], card: Card) -> str:
    """Operations and bytes of a step by part, and the times that they take at best."""
    sums: dict[str, list[int]] = {}
    for each in work:
        flops, num_bytes = sums.setdefault(each.part, [0, 0])
        sums[each.part] = [flops + each.flops, num_bytes + each.num_bytes]
    total = [sum(values) for values in zip(*sums.values(), strict=True)]
    sums["all"] = total
    lines = [
        [
            part,
            f"{flops / 1e12:.4g}",
            f"{flops / total[0]:.1%}",
            f"{num_bytes / 1e9:.4g}",
            f"{card.floor_s(flops):.4g}",
            f"{num_bytes / card.peak_bandwidth:.4g}",
        ]
        for part, (flops, num_bytes) in sums.items()
    ]
    return table(["a step", "TFLOP", "share", "GB", "s by TFLOP/s", "s by GB/s"], lines)


def lay_out_card(card: Card) -> str:
    """Name, versions and ceilings."""
    versions = ", ".join(f"{name} {value}" for name, value in card.versions.items() if value)
    memory = "" if card.memory_mib is None else f", {card.memory_mib:.0f} MiB"
    driver = "" if card.driver is None else f", driver {card.driver}"
    sheet = (
        "unknown to this script, so that measured rates count as its peak"
        if card.sheet_flops is None or card.sheet_bandwidth is None
        else f"{card.sheet_flops / 1e12:.0f} TFLOP/s and {card.sheet_bandwidth / 1e9:.0f} GB/s"
    )
    return (
        f"{card.name}{memory}{driver}; {versions}; {card.date}.\n"
        f"Data sheet: {sheet}. Measured: {card.measured_flops / 1e12:.4g} TFLOP/s in a large "
        f"product, {card.measured_bandwidth / 1e9:.4g} GB/s in a large copy.\n"
    )


# --- start ---------------------------------------------------------------------------------------


def make_importable(folder: Path) -> None:
    """Let the package of this checkout be imported where it is not installed.

    Args:
        folder: Takes the few lines of metadata in which the package looks for its version.
    """
    if importlib.util.find_spec("everanimate_cli") is None:
        sys.path.append(str(REPOSITORY))
    if _version("everanimate") is None:
        text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        number = tomllib.loads(text)["project"]["version"]
        metadata = folder / f"everanimate-{number}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: everanimate", f"Version: {number}", ""]
        (metadata / "METADATA").write_text("\n".join(lines), encoding="utf-8")
        sys.path.append(str(folder))


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked options; `parts` is a list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="names, joined by commas")
    parser.add_argument("--config", choices=SETUPS, default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds for it all")
    parser.add_argument("--steps", type=int, help="Euler steps of a chunk; default: the model's")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls or steps per case")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(words)
    options.parts = options.parts.split(",")
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]} is unknown. Known: {', '.join(PARTS)}.")
    for name in ("time_limit", "steps", "repeats"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value:g} is not above 0.")
    has_cuda = torch.cuda.is_available()
    options.device = options.device or ("cuda" if has_cuda else "cpu")
    if options.device == "cuda" and not has_cuda:
        parser.error("--device cuda: torch finds no CUDA card.")
    if options.config == "full" and options.device == "cpu":
        parser.error("--config full needs a CUDA card. Give --config toy.")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure what was asked for and print the tables.

    Returns:
        Exit code: 1 if a case failed.
    """
    started_s = time.monotonic()
    options = parse_options(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        device = torch.device(options.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        setup = SETUPS[options.config]()
        card = describe_card(device, dtype)
        report = Report(
            options.json, card=asdict(card), config=options.config, device=options.device
        )
        bench = Bench(
            setup=setup,
            device=device,
            dtype=dtype,
            card=card,
            report=report,
            num_steps=options.steps or setup.num_steps,
            repeats=options.repeats,
            ends_s=started_s + options.time_limit,
        )
        floor = lay_out_floor(bench.work, card)
        report.record["step"] = {"flops": bench.step_flops, "bytes": bench.step_bytes}
        sys.stderr.write(f"{lay_out_card(card)}\n{floor}\n")
        for name in options.parts:
            bench.run_part(name)
    title = (
        f"{setup.width}x{setup.height}, {setup.frames_per_chunk} frames per chunk, "
        f"{setup.num_identity_slots} identity slots, {options.config} networks with random "
        f"weights in {str(dtype).removeprefix('torch.')}."
    )
    results = lay_out_results(report.results)
    sys.stdout.write("\n".join([lay_out_card(card), title, "", floor, results]))
    return 1 if bench.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
