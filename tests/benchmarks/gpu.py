r"""How fast and how large the full-size networks are on a card, beside what it could do at best.

    python tests/benchmarks/gpu.py [--parts step,vae,...] [--config full|toy] [--device cuda|cpu]
        [--time-limit SECONDS] [--steps N] [--repeats N] [--presets 8,16,...] [--json FILE]
    python tests/benchmarks/gpu.py --merge FILE ... [--json FILE]

Needs no weights and no network: the weights are drawn on the card, so that speed and memory are
those of the released model and pictures are noise. Before anything is timed, the operations and the
bytes of the work are counted. The larger of operations over the card's peak in bfloat16 and bytes
over its bandwidth is the floor; each time is printed with its multiple of that.

parity      Each way to compute a step against float32, and the VAE against the CPU, at a small size
            with a few blocks.
step        One Euler step at 832x480 with 77 frames and 4 identity slots.
vae         What is computed once per chunk or run: VAE, CLIP, T5, faces.
attention   A step, and attention alone, with each kernel that this machine has.
compile     A step with compiled blocks, with the fastest of those kernels and with torch's own.
fp8         A step with weights stored in fp8, and with products in fp8 (needs torchao).
cache       A step with the step cache when it skips as often as it may.
presets     Each preset of `--vram` that fits, on a card that gives torch no more than one of that
            size would beside its context. A preset exceeds if tensors take more than 1.1 times the
            estimate, or torch and the context more than the card.
chunk       Two whole chunks.
toy         Three chunks of the embedded toy model, compared with those of the CPU: by `animate`, or
            without PyAV by the chunk loop alone.

Results are added to the JSON file one by one, so that a run that is cut off keeps what it has. A
case that fails leaves its error there and the others go on; one that exceeds a limit keeps its
figures and is marked. In both cases the exit code is 1. Cases that would not end before the time
limit are left out and named, with the command that runs them alone. With `--config toy` all of it
runs on a CPU in two minutes, of which the figures mean nothing.

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

In three calls of ten minutes, each of which should take about seven on an H100 with 128 GB of main
memory (by counting: 4 to 5 s a step, a minute for each compilation, half a minute for weights that
wait in pinned memory), and a fourth anywhere that prints their figures as one:

    python tests/benchmarks/gpu.py --parts parity,step,attention,compile \
        --time-limit 560 --json gpu-1.json
    python tests/benchmarks/gpu.py --parts fp8,cache,vae --time-limit 560 --json gpu-2.json
    python tests/benchmarks/gpu.py --parts presets,chunk,toy --steps 8 \
        --time-limit 560 --json gpu-3.json
    python tests/benchmarks/gpu.py --merge gpu-1.json gpu-2.json gpu-3.json --json gpu.json
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
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
COMPILE_S = 90.0  # cautiously, for all that is compiled of a transformer
PARTS_OF_TRANSFORMER = ("blocks", "face_adapter")  # which loading finishes one by one
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
    take: Callable[[str, nn.Module], None] | None = None,
) -> nn.Module:
    """A network with weights drawn on a device, in the dtypes that loading gives them.

    Args:
        setup: Has its config.
        name: In a checkpoint.
        device: Where weights are drawn: always the same ones on the same kind of device.
        dtype: Of the network.
        home: Where the weights go; None leaves them there.
        take: Called with each block and face adapter of a transformer as soon as it is drawn, under
            its name such as "blocks.0"; they are still on `device` then, and this puts them where
            they are to stay.
    """
    from everanimate_cli.checkpoint import dtype_in_memory  # noqa: PLC0415

    network = build_empty(setup, name)
    generator = torch.Generator(device).manual_seed(SEED)
    modules = list(network.named_modules())
    # The last module of each part that is taken, and the part; a part's modules follow each other.
    ends = {} if take is None else {_last_module(part): key for key, part in _parts_of(network)}
    drawn: dict[Tensor, nn.Parameter] = {}  # one weight may have two places
    for prefix, module in modules:
        is_taken = take is not None and prefix.split(".")[0] in PARTS_OF_TRANSFORMER
        target = device if home is None or is_taken else home
        for own_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in drawn:
                key = f"{prefix}.{own_name}" if prefix else own_name
                value = torch.empty(parameter.shape, device=device)
                _draw(value, module, own_name, generator)
                value = value.to(dtype_in_memory(name, key, dtype)).to(target)
                drawn[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[own_name] = drawn[parameter]
        for own_name, buffer in module._buffers.items():
            module._buffers[own_name] = None if buffer is None else buffer.to(target)
        if take is not None and module in ends:
            part = ends[module]
            take(part, network.get_submodule(part))
    return network


def _parts_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks and face adapters with their names."""
    return [
        (f"{name}.{index}", part)
        for name in PARTS_OF_TRANSFORMER
        for index, part in enumerate(getattr(network, name))
    ]


def _last_module(part: nn.Module) -> nn.Module:
    *_, last = part.modules()
    return last


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
    use_best_attention(networks["transformer"], device, dtype)
    return assemble(networks, device)


def use_best_attention(transformer: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Let a transformer compute attention as it does without any option; the kernel's name."""
    from everanimate_cli.acceleration import choose_attention, use_attention  # noqa: PLC0415

    name = choose_attention("auto", device, dtype)
    use_attention(transformer, name)
    return name


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


def work_of(setup: Setup, dtype: torch.dtype) -> list[Work]:
    """As `step_work`, of a network in a dtype as the pipeline computes it."""
    # In float32 one token stands for all padding.
    is_merged = dtype == torch.float32
    num_text_tokens = NUM_USED_TEXT_TOKENS + 1 if is_merged else NUM_TEXT_TOKENS
    return step_work(setup, num_text_tokens=num_text_tokens, itemsize=dtype.itemsize)


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
        measured_flops: Of a large matrix product, here; None if that failed.
        measured_bandwidth: Of a large copy, bytes read and written, here; None if that failed.
    """

    name: str
    date: str
    driver: str | None
    memory_mib: float | None
    versions: dict[str, str | None]
    sheet_flops: float | None
    sheet_bandwidth: float | None
    measured_flops: float | None
    measured_bandwidth: float | None

    @property
    def peak_flops(self) -> float:
        """Of the data sheet where it is known."""
        return self.sheet_flops or self.measured_flops or math.nan

    @property
    def peak_bandwidth(self) -> float:
        """Of the data sheet where it is known."""
        return self.sheet_bandwidth or self.measured_bandwidth or math.nan

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
    flops, bandwidth = measure_ceilings(device, dtype)
    give_back(device)
    return Card(
        name=name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        driver=_driver() if is_cuda else None,
        memory_mib=memory,
        versions=versions,
        sheet_flops=None if sheet is None else sheet[0],
        sheet_bandwidth=None if sheet is None else sheet[1],
        measured_flops=flops,
        measured_bandwidth=bandwidth,
    )


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float | None, float | None]:
    """Operations per second of a large matrix product, and bytes per second of a large copy.

    None for what cannot be measured, such as on a card whose memory others have.
    """
    is_cuda = device.type == "cuda"
    size = 8192 if is_cuda else 512
    timed = partial(time_calls, device=device, repeats=10, warmups=3)
    flops = bandwidth = None
    try:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        flops = 2 * size**3 / statistics.median(timed(lambda: left @ right))
        source = torch.randn((2**29 if is_cuda else 2**22), device=device)
        target = torch.empty_like(source)
        num_bytes = 2 * source.numel() * source.element_size()
        bandwidth = num_bytes / statistics.median(timed(lambda: target.copy_(source)))
    except RuntimeError as error:
        sys.stderr.write(f"the card's ceilings: {error}\n")
    return flops, bandwidth


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


def reserved_mib(device: torch.device) -> float | None:
    """Most memory that torch kept for tensors since `forget_peak`; None without a card."""
    return torch.cuda.max_memory_reserved(device) / _MIB if device.type == "cuda" else None


def outside_mib(device: torch.device) -> float | None:
    """A card's memory that torch does not count: context, kernels, libraries, other programs."""
    if device.type != "cuda":
        return None
    free, whole = torch.cuda.mem_get_info(device)
    return (whole - free - torch.cuda.memory_reserved(device)) / _MIB


def count_shortages(device: torch.device) -> dict[str, int]:
    """How often this process had to empty its cache for memory, and how often that was too little.

    Empty without a card.
    """
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    names = {"alloc_retries": "num_alloc_retries", "ooms": "num_ooms"}
    return {own: int(stats.get(name, 0)) for own, name in names.items()}


@contextmanager
def held_to(limit_mib: float | None, card: Card, device: torch.device) -> Iterator[None]:
    """Let torch take no more than a smaller card would leave to it.

    Args:
        limit_mib: Memory of the smaller card; None holds to nothing.
        card: The larger one.
        device: That card.
    """
    if limit_mib is None or card.memory_mib is None:
        yield
        return
    # A context and its kernels would have to have their place there too.
    left_mib = limit_mib - (outside_mib(device) or 0.0)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, left_mib / card.memory_mib)))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def give_back(device: torch.device) -> None:
    """Free what nobody holds any more of a card's memory, and of main memory pinned for it."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    # Of torch's own, which has no public name in all releases.
    empty_pinned = getattr(torch._C, "_host_emptyCache", None)
    if empty_pinned is not None:
        empty_pinned()


# --- the run -------------------------------------------------------------------------------------


# Preset of `--vram`: those first that tell most about their estimates.
PRESET_ORDER = ("8", "16", "24", "12", "48", "80")


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

        Raises:
            OSError: If it cannot be written.
        """
        self._path = path
        self.record: dict[str, Any] = {**head, "parts": {}, "results": []}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_record(path, self.record)

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
            if value is not None and (name in COLUMNS or name in REMARKS)
        )
        sys.stderr.write(f"{part}: {case}: {shown}\n")

    def end_part(self, part: str, took_s: float) -> None:
        """Keep and show how long a part took and what came of it."""
        counts = count_results(self.results, part)
        self.record["parts"][part] = {"took_s": took_s}
        self._write()
        words = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        sys.stderr.write(f"{part} took {took_s:.1f} s: {words}\n")

    def note_rest(self, parts: Sequence[str]) -> None:
        """Name the parts that were not even begun."""
        for part in parts:
            if part not in self.record["parts"]:
                self.add(part, ALL, skipped="was not begun in time", late=True)
                self.end_part(part, 0.0)

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            write_record(self._path, self.record)
        except OSError as error:  # a full disk, say: the tables are still to be printed
            sys.stderr.write(f"{self._path} cannot be written: {error}\n")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write all figures, at once or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    partial_path = path.with_name(path.name + ".part")
    # What JSON has no form for must not cost all the other figures.
    text = json.dumps(record, indent=1, default=str)
    partial_path.write_text(text + "\n", encoding="utf-8")
    partial_path.replace(path)


def count_results(results: Sequence[Mapping[str, Any]], part: str) -> dict[str, int]:
    """How many cases of a part were measured, failed and so on."""
    counts = dict.fromkeys(("measured", "exceeded", "failed", "skipped", "left_out"), 0)
    for each in results:
        if each["part"] == part:
            counts[_outcome(each)] += 1
    return counts


def _outcome(result: Mapping[str, Any]) -> str:
    if result.get("late"):
        return "left_out"
    words = ("failed", "skipped", "exceeded")
    return next((word for word in words if word in result), "measured")


# What stands in place of several cases of a part.
ALL, OTHERS, STEPS, CHUNKS = WHOLE = ("all cases", "other cases", "steps", "two chunks")


class OutOfTimeError(BaseException):
    """The time is over. No library must take it for an error that it can live with."""


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
        presets: To measure, in this order.
        has_failed: Whether a case has, or has exceeded a limit.
        slowest_step_s: Of all steps measured so far; None before.
    """

    setup: Setup
    device: torch.device
    dtype: torch.dtype
    card: Card
    report: Report
    num_steps: int
    repeats: int
    ends_s: float
    presets: Sequence[str] = PRESET_ORDER
    has_failed: bool = field(default=False, init=False)
    slowest_step_s: float | None = field(default=None, init=False)

    @property
    def left_s(self) -> float:
        """Time left."""
        return self.ends_s - time.monotonic()

    @cached_property
    def work(self) -> list[Work]:
        """Of a step, as the network computes it here."""
        return work_of(self.setup, self.dtype)

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
        if self.slowest_step_s is not None:
            return 1.25 * self.slowest_step_s
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
        if self.is_late(part, case, needs_s):
            return
        started_s = time.monotonic()
        before: dict[str, int] = {}
        try:
            give_back(self.device)
            forget_peak(self.device)
            before = count_shortages(self.device)
            figures = {**call(), "took_s": time.monotonic() - started_s}
        except OutOfTimeError:
            self._note_end(part, case)
        except Exception as error:  # the results of all other cases must not be lost with it
            self._note_failure(part, case, error, self._memory_since(before))
        else:
            self.has_failed |= "exceeded" in figures
            self.report.add(part, case, **{**self._memory_since(before), **figures})

    def guard(self, part: str, case: str, call: Callable[[], Any]) -> Any:
        """What a preparation gives; None if it fails, which is noted."""
        try:
            return call()
        except Exception as error:  # as in `case`
            self._note_failure(part, case, error)
            return None

    def run_part(self, part: str) -> None:
        """Measure all cases of a part; that it cannot begin is no reason to give up the others."""
        started_s = time.monotonic()
        try:
            if not self.is_late(part, ALL, 0.0) and not self._is_lost(part):
                PARTS[part](self)
        except OutOfTimeError:
            self._note_end(part, OTHERS)
        except Exception as error:  # as in `case`
            self._note_failure(part, ALL, error)
        self.report.end_part(part, time.monotonic() - started_s)

    def is_late(self, part: str, case: str, needs_s: float) -> bool:
        """Whether a case is left out, which is noted, as it would not be done in time."""
        left_s = self.left_s
        if left_s > needs_s:
            return False
        reason = f"needs about {needs_s:.0f} s, {max(0.0, left_s):.0f} s are left"
        self.report.add(part, case, skipped=reason, late=True)
        return True

    def _is_lost(self, part: str) -> bool:
        """Whether nothing can run any more, which is noted: some errors of a card are for good."""
        try:
            synchronize(self.device)
        except RuntimeError:
            reason = "the card is lost to this process by an earlier error"
            self.report.add(part, ALL, skipped=reason, late=True)
            return True
        return False

    def _note_end(self, part: str, case: str) -> None:
        self.ends_s = min(self.ends_s, time.monotonic())
        self.report.add(part, case, skipped="was cut off at the end of the time", late=True)

    def _memory_since(self, before: Mapping[str, int]) -> dict[str, Any]:
        """What a case took of a card's memory; nothing without a card."""
        after = count_shortages(self.device)
        if not after:
            return {}
        shortages = {name: count - before.get(name, 0) for name, count in after.items()}
        return {"reserved_mib": reserved_mib(self.device), **shortages}

    def _note_failure(
        self, part: str, case: str, error: Exception, figures: Mapping[str, Any] | None = None
    ) -> None:
        self.has_failed = True
        text = (str(error).strip().splitlines() or [""])[0]
        trace = "".join(traceback.format_exception(error)).splitlines()
        failed = f"{type(error).__name__}: {text}"
        self.report.add(part, case, failed=failed, trace=trace[-12:], **(figures or {}))

    def leave_out(self, part: str, case: str, reason: str) -> None:
        """Note that a case cannot be measured on this machine."""
        self.report.add(part, case, skipped=reason)

    def rate(self, seconds: float, flops: float, num_bytes: float = 0.0) -> dict[str, Any]:
        """Figures of a time: beside the floor, and the share of the card's peak.

        The time alone if nothing is known of the work (0).
        """
        if not flops:
            return {"seconds": seconds}
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
        first_peak_mib = None
        started_s = time.perf_counter()
        for latents in steps:
            synchronize(self.device)
            now_s = time.perf_counter()
            seconds.append(now_s - started_s)
            if len(seconds) == 1:
                first_peak_mib = peak_mib(self.device)
                forget_peak(self.device)
            is_finite = bool(latents.isfinite().all())
            started_s = time.perf_counter()
        step_s = statistics.median(seconds[1:])
        self.slowest_step_s = max(self.slowest_step_s or 0.0, step_s)
        figures = {
            **self.rate(step_s, self.step_flops, self.step_bytes),
            "first_s": seconds[0],
            "all_s": seconds[1:],
            "peak_mib": peak_mib(self.device),
            "first_peak_mib": first_peak_mib,
        }
        if not is_finite:
            figures["exceeded"] = "the latents are not finite"
        return figures


# --- the parts -----------------------------------------------------------------------------------


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected, in float64 on the CPU."""
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    return float((value - expected).norm() / expected.norm())


def compare(value: Tensor, expected: Tensor, limit: float) -> dict[str, Any]:
    """Figures of a comparison; with "exceeded" if the error is not below the limit."""
    error = relative_error(value, expected)
    figures: dict[str, Any] = {"relative_error": error, "limit": limit}
    if not error <= limit:
        figures["exceeded"] = f"relative error {error:.2e} is above {limit:.0e}"
    return figures


# One velocity, against float32.
BF16_LIMIT = 2e-2
FP8_LIMIT = 1e-1
SAGE_LIMIT = 1e-1
VAE_LIMIT, VAE_TF32_LIMIT = 1e-4, 2e-2


def run_parity(bench: Bench) -> None:
    """Each way to compute a velocity against float32, and the VAE against the CPU."""
    setup = bench.setup.shrunk()
    vae = build_network(setup, "vae", bench.device, torch.float32)
    bench.guard("parity", "velocities", partial(compare_velocities, bench, setup, vae))
    bench.guard("parity", "VAE", partial(compare_vae, bench, setup, vae))


def compare_velocities(bench: Bench, setup: Setup, vae: nn.Module) -> None:
    """One velocity in each way against float32."""
    from everanimate_cli.acceleration import (  # noqa: PLC0415
        compile_blocks,
        enable_fp8_matmul,
        use_attention,
    )
    from everanimate_cli.narrow_linear import store_blocks_as_fp8  # noqa: PLC0415

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
        try:
            change(network)
            return compare(velocity(network), expected, limit)
        finally:
            torch._dynamo.reset()

    ways: list[tuple[str, Callable[[Any], None], float, str | None]] = [
        ("weights stored in fp8", store_blocks_as_fp8, FP8_LIMIT, None),
        (
            "products in fp8",
            partial(enable_fp8_matmul, device=device),
            FP8_LIMIT,
            why_not_fp8(device, torch.bfloat16),
        ),
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
        # A number that is none is larger than nothing, and exceeds.
        return max(encoded, decoded, key=lambda each: ("exceeded" in each, each["relative_error"]))

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

    def plain() -> dict[str, Any]:
        pipeline, given = build_for_steps(bench)
        attention = use_best_attention(pipeline.transformer, bench.device, bench.dtype)
        return {"attention": attention, **bench.measure_steps(pipeline, given)}

    bench.case("step", "default", plain, needs_s=(1 + bench.repeats) * bench.likely_step_s)


def usable_attention(bench: Bench) -> dict[str, str | None]:
    """As `available_attention`, at the full size."""
    setup = bench.setup
    num_tokens = setup.num_slots * setup.tokens_per_slot
    num_heads = int(setup.config("transformer").num_attention_heads)
    scores_mib = num_heads * num_tokens**2 * bench.dtype.itemsize / _MIB
    reasons = available_attention(bench.device, bench.dtype)
    if bench.card.memory_mib is not None and 2 * scores_mib > bench.card.memory_mib:
        reasons["sdpa-math"] = f"keeps the scores, {scores_mib:.0f} MiB"
    return reasons


def measure_attention(bench: Bench, name: str) -> dict[str, Any]:
    """Self attention of one block, alone."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: PLC0415

    from everanimate_cli.speed_settings import KERNELS  # noqa: PLC0415

    setup, dtype = bench.setup, bench.dtype
    num_tokens = setup.num_slots * setup.tokens_per_slot
    config = setup.config("transformer")
    shape = (1, num_tokens, config.num_attention_heads, config.attention_head_dim)
    work = attention("", num_tokens, num_tokens, setup.inner_dim, itemsize=dtype.itemsize)
    tensors = [torch.randn(shape, device=bench.device).to(dtype) for _ in range(3)]
    backend: Any = KERNELS[name].backend
    with torch.no_grad():
        call = partial(dispatch_attention_fn, *tensors, backend=backend)
        return bench.measure(call, work.flops, repeats=5)


def run_attention(bench: Bench) -> None:
    """A step, and self attention alone, with each kernel."""
    from everanimate_cli.acceleration import use_attention  # noqa: PLC0415

    reasons = usable_attention(bench)
    usable = [name for name, reason in reasons.items() if reason is None]
    for name, reason in reasons.items():
        if reason is None:
            call = partial(measure_attention, bench, name)
            bench.case("attention", f"{name}, alone", call, needs_s=5.0)
        else:
            bench.leave_out("attention", name, reason)
    if bench.is_late("attention", STEPS, 10 + (1 + bench.repeats) * bench.likely_step_s):
        return
    pipeline, given = build_for_steps(bench)
    for name in usable:

        def steps(name: Any = name) -> dict[str, Any]:
            use_attention(pipeline.transformer, name)
            return bench.measure_steps(pipeline, given)

        needs_s = (1 + bench.repeats) * bench.likely_step_s
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

    if fastest_attention(bench.report.results) is None:  # this part runs alone
        for name, missing in usable_attention(bench).items():
            if missing is None:
                call = partial(measure_attention, bench, name)
                bench.case("compile", f"{name}, alone, not compiled", call, needs_s=5.0)
    fastest = fastest_attention(bench.report.results)
    for name in dict.fromkeys((fastest or "sdpa", "sdpa")):
        needs_s = COMPILE_S + (1 + bench.repeats) * bench.likely_step_s
        bench.case("compile", f"{name}, step", partial(compiled, name), needs_s=needs_s)


def fastest_attention(results: Sequence[Mapping[str, Any]]) -> str | None:
    """The kernel of the shortest step in part "attention", or else of the shortest time alone.

    None if there are neither.
    """
    for part, ending in (("attention", ", step"), ("compile", ", alone, not compiled")):
        seconds = {
            each["case"].removesuffix(ending): each["seconds"]
            for each in results
            if each["part"] == part and each["case"].endswith(ending) and "seconds" in each
        }
        if seconds:
            return min(seconds, key=lambda name: seconds[name])
    return None


def run_fp8(bench: Bench) -> None:
    """A step with weights or products in fp8, and one product alone."""
    from everanimate_cli.acceleration import compile_blocks, enable_fp8_matmul  # noqa: PLC0415
    from everanimate_cli.narrow_linear import store_blocks_as_fp8  # noqa: PLC0415

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
        enable_fp8_matmul(pipeline.transformer, bench.device)
        try:
            if is_compiled:
                compile_blocks(pipeline.transformer)
            return bench.measure_steps(pipeline, given)
        finally:
            torch._dynamo.reset()

    for is_compiled in (False, True):
        case = "products in fp8, compiled" if is_compiled else "products in fp8"
        missing = reason or (why_not_compile(bench.device) if is_compiled else None)
        if missing is not None:
            bench.leave_out("fp8", case, missing)
            continue
        call = partial(multiplied, is_compiled=is_compiled)
        bench.case("fp8", case, call, needs_s=needs_s + (COMPILE_S if is_compiled else 0))


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
    # Some are skipped, and before those the ratios are measured.
    if bench.is_late("cache", STEPS, 10 + (num_steps + 2) * bench.likely_step_s):
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
    # Times are worth something without them.
    flops = bench.guard("vae", "counting operations", partial(once_flops, setup))
    flops = defaultdict(int, flops or {})

    def text() -> dict[str, Any]:
        encoder = build_network(setup, "text_encoder", device, bench.dtype)
        return bench.measure(partial(encode_text, encoder, device), flops[prompt])

    prompt = "T5, one prompt"
    bench.case("vae", prompt, text, needs_s=20.0)
    height, width, frames = setup.height, setup.width, setup.frames_per_chunk
    networks = {
        name: build_network(setup, name, device, bench.dtype) for name in ("vae", "image_encoder")
    }
    # Only what encodes faces is used of it.
    networks["transformer"] = build_network(setup.shrunk(), "transformer", device, bench.dtype)
    pipeline = assemble(networks, device)
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


def encode_text(encoder: Any, device: torch.device) -> None:
    """Run a text encoder on a prompt of random words."""
    ids = torch.randint(1, 100, (1, NUM_TEXT_TOKENS), device=device)
    mask = (torch.arange(NUM_TEXT_TOKENS, device=device) < NUM_USED_TEXT_TOKENS).long()[None]
    with torch.no_grad():
        encoder(ids, attention_mask=mask)


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
    beside_s = min(60.0, 30 * bench.likely_step_s)
    if bench.is_late("chunk", CHUNKS, beside_s + 2 * bench.likely_step_s):
        return
    fitting = (bench.left_s - beside_s) / (2 * bench.likely_step_s)
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
            figures: dict[str, Any] = {}
            if not difference <= limit:
                figures["exceeded"] = f"values differ by {difference:.2f} on average"
            return {
                **figures,
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
    """Each preset: a prompt, a picture, a step, a chunk's frames, on a card held to its size."""
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
    for name in bench.presets:
        placement = PRESETS[name]
        memory_mib = bench.card.memory_mib
        limit_mib = None if memory_mib is None else int(name) * 1e9 / _MIB
        if memory_mib is not None and limit_mib is not None and limit_mib > memory_mib:
            bench.leave_out("presets", name, f"the card has {memory_mib:.0f} MiB")
            continue
        has_streams = device.type == "cuda"
        plan = partial(estimate, sizes, placement, job, has_streams=has_streams)
        needed = bench.guard("presets", f"{name}, estimate", plan)
        if needed is not None:
            call = partial(_measure_preset, bench, placement, needed, limit_mib)
            bench.case("presets", name, call, needs_s=45 + 4 * bench.likely_step_s)


# What may be taken beside the tensors that an estimate counts: a share of it, and what cuBLAS takes
# even for the smallest network.
ESTIMATE_FACTOR, ESTIMATE_SLACK_MIB = 1.1, 128.0


class PhasePeaks:
    """Most memory of a card in each phase of a chunk.

    Attributes:
        allocated_mib: In tensors, by phase; None without a card.
        reserved_mib: Kept by torch for them.
    """

    def __init__(self, device: torch.device) -> None:
        """Take nothing yet."""
        self._device = device
        self.allocated_mib: dict[str, float | None] = {}
        self.reserved_mib: dict[str, float | None] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the peaks of what is done inside; of those forgotten there, `raise_to` tells.

        Memory that torch keeps is left to it from phase to phase, as in a run.
        """
        synchronize(self._device)
        forget_peak(self._device)
        yield
        synchronize(self._device)
        self.raise_to(name, peak_mib(self._device))
        self.reserved_mib[name] = reserved_mib(self._device)

    def raise_to(self, name: str, value_mib: float | None) -> None:
        """Take another peak of a phase into account."""
        self.allocated_mib[name] = _largest([self.allocated_mib.get(name), value_mib])


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _measure_preset(
    bench: Bench, placement: Any, needed: Any, limit_mib: float | None
) -> dict[str, Any]:
    """Peaks of the phases of a chunk beside their estimates, and the seconds of a step."""
    from everanimate_cli.offloading import Placing  # noqa: PLC0415

    setup, device, dtype = bench.setup, bench.device, bench.dtype
    cpu = torch.device("cpu")
    encoder = None
    if placement.text_device == "device":
        encoder = build_network(setup, "text_encoder", device, dtype)
    give_back(device)  # weights are drawn in float32, which no run does
    peaks = PhasePeaks(device)
    before = count_shortages(device)
    with held_to(limit_mib, bench.card, device):
        if encoder is not None:
            with peaks.phase("text"):
                encode_text(encoder, device)
            encoder = None
            give_back(device)
        started_s = time.perf_counter()
        placing = Placing(placement, device, dtype)
        networks = {
            "transformer": build_network(
                setup, "transformer", device, dtype, home=cpu, take=placing.take
            ),
            "vae": build_network(setup, "vae", device, dtype, home=cpu),
            "image_encoder": build_network(setup, "image_encoder", device, dtype, home=cpu),
        }
        use_best_attention(networks["transformer"], device, dtype)
        rota = placing.finish(networks)
        synchronize(device)
        place_s = time.perf_counter() - started_s
        pipeline = assemble(networks, device, rota=rota, tile_decoding=placement.tile_decoding)
        picture_u8 = draw_frames(1, setup.height, setup.width)[0]
        pose_u8 = draw_frames(setup.frames_per_chunk, setup.height, setup.width)
        latents = draw_noise(setup)[:, :, setup.num_identity_slots :]
        drawn = draw_conditioning(setup, cpu, dtype)
        give_back(device)
        with peaks.phase("encode"):
            pipeline.encode_clip(picture_u8)
            pipeline.encode_pose(pose_u8)
        with peaks.phase("denoise"):
            tensors = {name: value for name, value in vars(drawn).items() if value is not None}
            given = replace(drawn, **{name: value.to(device) for name, value in tensors.items()})
            figures = bench.measure_steps(pipeline, given, num_steps=min(2, bench.repeats))
            peaks.raise_to("denoise", figures["first_peak_mib"])
        del given
        with peaks.phase("decode"):
            started_s = time.perf_counter()
            pipeline.decode(latents)
            synchronize(device)
            decode_s = time.perf_counter() - started_s
    shortages = {name: count - before[name] for name, count in count_shortages(device).items()}
    figures |= {
        **shortages,
        "peak_mib": _largest(peaks.allocated_mib.values()),
        "estimate_mib": max(needed.phases_mib[phase] for phase in peaks.allocated_mib),
        "needed_mib": needed.needed_mib,
        "reserved_mib": _largest(peaks.reserved_mib.values()),
        "outside_mib": outside_mib(device),
        "phase_peaks_mib": peaks.allocated_mib,
        "phase_reserved_mib": peaks.reserved_mib,
        "phase_estimates_mib": needed.phases_mib,
        "limit_mib": limit_mib,
        "place_s": place_s,
        "decode_s": decode_s,
        "placement": placement.describe(),
    }
    if rota is not None and rota.notes():
        figures["note"] = "; ".join(rota.notes())
    reasons = [figures["exceeded"]] if "exceeded" in figures else []
    reasons += exceeded_memory(figures)
    return {**figures, "exceeded": "; ".join(reasons)} if reasons else figures


def exceeded_memory(figures: Mapping[str, Any]) -> list[str]:
    """In what a preset takes more than it may, in words.

    Args:
        figures: In MiB: "peak_mib" beside "estimate_mib"; "reserved_mib" and "outside_mib" together
            beside "limit_mib". Without a card all but the estimate are None.
    """
    reasons = []
    peak, estimated = figures["peak_mib"], figures["estimate_mib"]
    allowed = max(ESTIMATE_FACTOR * estimated, estimated + ESTIMATE_SLACK_MIB)
    if peak is not None and peak > allowed:
        reasons.append(
            f"peak of {peak:.0f} MiB, {peak / estimated:.2f} times the estimate of "
            f"{estimated:.0f} MiB"
        )
    reserved, limit = figures["reserved_mib"], figures["limit_mib"]
    outside = figures["outside_mib"] or 0.0
    if reserved is not None and limit is not None and reserved + outside > limit:
        reasons.append(
            f"{reserved:.0f} MiB reserved and {outside:.0f} MiB beside them on a card of "
            f"{limit:.0f} MiB"
        )
    return reasons


PARTS: dict[str, Callable[[Bench], None]] = {
    "parity": run_parity,
    "step": run_step,
    "vae": run_vae,
    "attention": run_attention,
    "compile": run_compile,
    "fp8": run_fp8,
    "cache": run_cache,
    "presets": run_presets,
    "chunk": run_chunk,
    "toy": run_toy,
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
    "reserved_mib": ("reserved MiB", "{:.0f}".format),
    "outside_mib": ("context MiB", "{:.0f}".format),
    "limit_mib": ("card MiB", "{:.0f}".format),
    "alloc_retries": ("retries", "{}".format),
    "ooms": ("OOMs", "{}".format),
    "place_s": ("place s", "{:.1f}".format),
    "decode_s": ("decode s", "{:.2f}".format),
    "relative_error": ("relative error", "{:.1e}".format),
    "mean_difference": ("mean difference", "{:.3f}".format),
    "limit": ("at most", "{:g}".format),
}


def write_figure(name: str, value: Any) -> str:
    """A figure as it stands in a table."""
    if value is None:
        return ""
    try:
        return COLUMNS[name][1](value)
    except (KeyError, TypeError, ValueError):  # no column, or no number
        return str(value)


# What stands below a table, not in it.
REMARKS = ("failed", "exceeded", "skipped", "note")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns after the first aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def lay_out_results(results: Sequence[Mapping[str, Any]]) -> str:
    """One table per part, with the columns that it has, and lines for what has no figures."""
    texts = []
    for part in dict.fromkeys(result["part"] for result in results):
        of_part = [result for result in results if result["part"] == part]
        measured = [each for each in of_part if _outcome(each) in ("measured", "exceeded")]
        names = [name for name in COLUMNS if any(each.get(name) is not None for each in measured)]
        if measured:
            head = [part, *(COLUMNS[name][0] for name in names)]
            lines = [
                [_case_cell(each), *(write_figure(name, each.get(name)) for name in names)]
                for each in measured
            ]
            texts.append(table(head, lines))
        texts += [
            # What to do about it stands in the JSON file.
            f"{part}, {each['case']}: {word}: {str(each[word]).partition('. ')[0]}\n"
            for each in of_part
            for word in REMARKS
            if word in each
        ]
    return "\n".join(texts)


def _case_cell(result: Mapping[str, Any]) -> str:
    return f"{result['case']} (EXCEEDED)" if "exceeded" in result else str(result["case"])


def lay_out_parts(
    parts: Mapping[str, Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> str:
    """How long each part took and what came of it; a part that was killed has no time."""
    lines = []
    for part in dict.fromkeys([*parts, *(each["part"] for each in results)]):
        counts = count_results(results, part)
        took_s = f"{parts[part]['took_s']:.1f}" if part in parts else ""
        lines.append([part, took_s, *map(str, counts.values())])
    head = ["part", "s", "measured", "exceeded", "failed", "skipped", "left out"]
    return table(head, lines) if lines else ""


def lay_out_left_out(results: Sequence[Mapping[str, Any]]) -> str:
    """What there was no time for, or no card any more, and how to run it alone."""
    late = [each for each in results if each.get("late")]
    if not late:
        return ""
    names = "; ".join(f"{each['part']}: {each['case']}" for each in late)
    words = ["--parts", ",".join(dict.fromkeys(each["part"] for each in late))]
    presets = [each["case"] for each in late if each["case"] in PRESET_ORDER]
    if presets:
        words += ["--presets", ",".join(presets)]
    command = " ".join(words)
    return f"Left out: {names}. Alone: python tests/benchmarks/gpu.py {command}\n"


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
    flops, bandwidth = card.measured_flops or math.nan, card.measured_bandwidth or math.nan
    return (
        f"{card.name}{memory}{driver}; {versions}; {card.date}.\n"
        f"Data sheet: {sheet}. Measured: {flops / 1e12:.4g} TFLOP/s in a large product, "
        f"{bandwidth / 1e9:.4g} GB/s in a large copy.\n"
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
    """Checked options; `parts` and `presets` are lists."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="names, joined by commas")
    parser.add_argument("--config", choices=SETUPS, default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds for it all")
    parser.add_argument("--steps", type=int, help="Euler steps of a chunk; default: the model's")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls or steps per case")
    parser.add_argument(
        "--presets", default=",".join(PRESET_ORDER), help="of part presets, joined by commas"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing; print the tables of several --json files as one",
    )
    options = parser.parse_args(words)
    for name, known in (("parts", list(PARTS)), ("presets", list(PRESET_ORDER))):
        values = getattr(options, name).split(",")
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"--{name} {unknown[0]} is unknown. Known: {', '.join(known)}.")
        setattr(options, name, values)
    for name in ("time_limit", "steps", "repeats"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value:g} is not above 0.")
    if options.merge:
        try:
            options.merge = merge_records([read_record(path) for path in options.merge])
        except ValueError as error:
            parser.error(f"--merge: {error}")
        return options
    has_cuda = torch.cuda.is_available()
    options.device = options.device or ("cuda" if has_cuda else "cpu")
    if options.device == "cuda" and not has_cuda:
        parser.error("--device cuda: torch finds no CUDA card.")
    if options.config == "full" and options.device == "cpu":
        parser.error("--config full needs a CUDA card. Give --config toy.")
    return options


def read_record(path: Path) -> dict[str, Any]:
    """What a run has written.

    Raises:
        ValueError: If the file is none of this script.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        lay_out(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no file of this script ({reason})") from error
    return record  # type: ignore[no-any-return]


def merge_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs as one.

    A case that two runs measured is that of the later file, unless only the earlier has figures.

    Raises:
        ValueError: If they measured on different cards, or different things.
    """
    first = dict(records[0])
    for what, of in (("card", lambda each: each["card"]["name"]), ("work", itemgetter("title"))):
        for record in records:
            if of(record) != of(first):
                raise ValueError(f"not the same {what}: {of(first)} and {of(record)}")
    cases: dict[tuple[str, str], Mapping[str, Any]] = {}
    parts: dict[str, dict[str, Any]] = {}
    for record in records:
        run_elsewhere = {
            each["part"]
            for other in records
            if other is not record
            for each in other["results"]
            if not each.get("late")
        }
        for each in record["results"]:
            if each.get("late") and each["case"] in WHOLE and each["part"] in run_elsewhere:
                continue
            key = (each["part"], each["case"])
            if _outcome(each) in ("measured", "exceeded") or key not in cases:
                cases[key] = each
        for part, figures in record["parts"].items():
            took_s = parts.get(part, {}).get("took_s", 0.0) + figures["took_s"]
            parts[part] = {"took_s": took_s}
    dates = dict.fromkeys(record["card"]["date"] for record in records)
    return {
        **first,
        "card": {**first["card"], "date": ", ".join(dates)},
        "parts": parts,
        "results": list(cases.values()),
    }


def lay_out(record: Mapping[str, Any]) -> str:
    """All tables of a run, or of several as one."""
    card = Card(**record["card"])
    work = [Work(**each) for each in record["work"]]
    texts = [
        lay_out_card(card),
        f"{record['title']}\n",
        lay_out_floor(work, card),
        lay_out_results(record["results"]),
        lay_out_parts(record["parts"], record["results"]),
        lay_out_left_out(record["results"]),
    ]
    return "\n".join(text for text in texts if text)


@contextmanager
def timed_out_at(bench: Bench) -> Iterator[None]:
    """Cut off what is still at work at the end of the time, or when the program is asked to stop.

    A case that hangs in Python, such as a compilation, then costs no other case its figures.
    """

    def ring(*_: object) -> None:
        bench.ends_s = min(bench.ends_s, time.monotonic())
        raise OutOfTimeError

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = {each: signal.signal(each, ring) for each in (signal.SIGALRM, signal.SIGTERM)}
    if math.isfinite(bench.left_s):
        # Again and again, as there is code from which no exception gets out.
        signal.setitimer(signal.ITIMER_REAL, max(bench.left_s, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, handler)


def main(words: Sequence[str] | None = None) -> int:
    """Measure what was asked for and print the tables.

    Returns:
        Exit code: 1 if a case failed or exceeded a limit.
    """
    started_s = time.monotonic()
    options = parse_options(words)
    if options.merge:
        if options.json is not None:
            write_record(options.json, options.merge)
        sys.stdout.write(lay_out(options.merge))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        device = torch.device(options.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        setup = SETUPS[options.config]()
        card = describe_card(device, dtype)
        title = (
            f"{setup.width}x{setup.height}, {setup.frames_per_chunk} frames per chunk, "
            f"{setup.num_identity_slots} identity slots, {options.config} networks with random "
            f"weights in {str(dtype).removeprefix('torch.')}."
        )
        report = Report(
            options.json,
            card=asdict(card),
            config=options.config,
            device=options.device,
            title=title,
            repeats=options.repeats,
            work=[asdict(each) for each in work_of(setup, dtype)],
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
            presets=options.presets,
        )
        report.record["step"] = {"flops": bench.step_flops, "bytes": bench.step_bytes}
        floor = lay_out_floor(bench.work, card)
        sys.stderr.write(f"{lay_out_card(card)}\n{floor}\n")
        report.end_part("start", time.monotonic() - started_s)
        with timed_out_at(bench), suppress(OutOfTimeError):
            for name in options.parts:
                bench.run_part(name)
        report.note_rest(options.parts)
    sys.stdout.write(lay_out(report.record))
    sys.stdout.flush()
    return 1 if bench.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
