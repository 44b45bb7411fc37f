"""Ways to make the networks faster on the hardware at hand: kernels, compilation, fp8, layouts.

Each has a check, which refuses in words what this machine cannot do and is called before anything
is loaded, and a function that changes the network.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import nn
from torch.utils._triton import has_triton

from everanimate_cli.errors import SettingsError
from everanimate_cli.library_logs import quiet_libraries
from everanimate_cli.narrow_linear import widen_outside
from everanimate_cli.speed_settings import KERNELS, Attention, check_installed

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKLWan

    from everanimate_cli.transformer import EverAnimateTransformer3DModel

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_HOPPER = (9, 0)
# The first cards on which torch has attention in bfloat16 that does without keeping all scores.
_BF16_CAPABILITY = (8, 0)
_TRIAL_SHAPE = (1, 256, 2, 128)  # [B, N, heads, d], d as in the released network
# The first cards that multiply fp8 (Ada), and the only dtype whose rows torchao scales one by one.
_FP8_CAPABILITY = (8, 9)
_FP8_DTYPE = torch.bfloat16
# Of the memory of a card, what may be in use before the allocator runs into its limit.
_USABLE_SHARE = 0.92
_MIB, _GIB = 2**20, 2**30


# --- attention -----------------------------------------------------------------------------------


def choose_attention(attention: Attention, device: torch.device, dtype: torch.dtype) -> Attention:
    """Which kernels compute attention.

    "auto" takes FlashAttention-3 on a Hopper card if it is installed, else "sdpa", with which torch
    itself chooses between cuDNN, FlashAttention-2 and others. It never takes one that quantises.

    Args:
        attention: What was asked for.
        device: Where the network runs.
        dtype: What it computes in.

    Returns:
        The same, but never "auto".

    Raises:
        SettingsError: If this machine, card or dtype cannot do it.
    """
    if attention == "auto":
        wants_flash3 = (
            device.type == "cuda"
            and dtype in _HALF_DTYPES
            and _capability(device) == _HOPPER
            and importlib.util.find_spec(KERNELS["flash3"].package) is not None
            and _why_unusable("flash3", device, dtype) is None
        )
        return "flash3" if wants_flash3 else "sdpa"
    kernel = KERNELS[attention]
    check_installed(attention)
    if device.type not in kernel.devices:
        needed = " or ".join(kernel.devices)
        raise SettingsError(
            f"--attention {attention} needs --device {needed}, and the networks run on "
            f"{device.type}. Give sdpa or auto."
        )
    if device.type == "cuda" and _capability(device) < kernel.capability:
        raise SettingsError(
            f"--attention {attention} needs a card of compute capability "
            f"{_written(kernel.capability)}, and {torch.cuda.get_device_name(device)} has "
            f"{_written(_capability(device))}. Give sdpa or auto."
        )
    if kernel.half_only and dtype not in _HALF_DTYPES:
        raise SettingsError(
            f"--attention {attention} computes in bfloat16 and float16 only, and --dtype is "
            f"{str(dtype).removeprefix('torch.')}. Give --dtype bfloat16, or sdpa."
        )
    why_not = _why_unusable(attention, device, dtype)
    if why_not is not None:
        raise SettingsError(
            f"--attention {attention} cannot be used: {why_not}. Give sdpa or auto."
        )
    return attention


def _why_unusable(attention: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with these kernels here: not installed, too old, broken, or for other cards."""
    try:
        with quiet_libraries(), attention_backend(KERNELS[attention].backend):
            pass
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        return _first_line(error)
    # Torch's own choice always finds a way.
    return None if attention == "sdpa" or device.type != "cuda" else _try(attention, device, dtype)


def _try(attention: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """What goes wrong when these kernels compute something small; None if nothing does.

    A package may be built for other cards, or have changed what its functions take, which shows
    when they are called.
    """
    backend: Any = KERNELS[attention].backend
    try:
        with quiet_libraries(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            tokens = torch.ones(_TRIAL_SHAPE, device=device, dtype=dtype)
            result = dispatch_attention_fn(tokens, tokens, tokens, backend=backend)
            # The mean of equal tokens is that token.
            is_right = bool((result - 1).abs().max() < 0.1)  # noqa: PLR2004
    except Exception as error:  # packages of others and compilers raise all kinds
        return _first_line(error)
    return None if is_right else "it computes wrong numbers here"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def check_scores(
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    num_tokens: int,
) -> None:
    """Refuse attention that would keep more scores than a card has memory.

    Torch's plain way keeps all of them, and so does its own choice in bfloat16 on cards before
    compute capability 8.0, where nothing else computes in bfloat16.

    Args:
        attention: From `choose_attention`.
        device: Where the network runs.
        dtype: What it computes in.
        num_heads: Of the network, as many as one card has.
        num_tokens: Of a chunk.

    Raises:
        SettingsError: Telling what to give instead.
    """
    if device.type != "cuda":
        return
    is_old = dtype == torch.bfloat16 and _capability(device) < _BF16_CAPABILITY
    if attention != "sdpa-math" and not (is_old and attention == "sdpa"):
        return
    needed = torch.float32.itemsize * num_heads * num_tokens**2  # which torch widens them to
    _, memory = torch.cuda.mem_get_info(device)
    if needed <= memory:
        return
    name = torch.cuda.get_device_name(device)
    text = f"keeps {needed / _GIB:.0f} GiB of scores, and {name} has {memory / _GIB:.0f}"
    if is_old:
        raise SettingsError(
            f"--dtype bfloat16 {text}: below compute capability 8.0 torch has no other attention "
            f"for it, and this card has {_written(_capability(device))}. Give --dtype float16."
        )
    raise SettingsError(f"--attention {attention} {text}. Give sdpa or auto.")


def use_attention(transformer: EverAnimateTransformer3DModel, attention: Attention) -> None:
    """Compute attention with these kernels from now on.

    Args:
        transformer: Changed in place, its face adapters included.
        attention: From `choose_attention`.
    """
    kernel = KERNELS[attention]
    elsewhere = kernel if kernel.exact else KERNELS["sdpa"]
    for block in transformer.blocks:
        block.attn1.set_attention_backend(kernel.backend)
        block.attn2.set_attention_backend(elsewhere.backend)
    for adapter in transformer.face_adapter:
        adapter.set_attention_backend(elsewhere.backend)


# --- compilation ---------------------------------------------------------------------------------


def check_compile(device: torch.device) -> None:
    """Refuse compilation where torch has no compiler to do it with.

    Raises:
        SettingsError: Naming what is missing.
    """
    if device.type == "cuda" and not has_triton():
        raise SettingsError(
            "--compile needs Triton, which torch does not find. Install it (pip install triton, on "
            "Windows triton-windows), or leave --compile out."
        )
    # Imported here: it takes a second, which only who compiles should wait for.
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise SettingsError(
            "--compile needs a C++ compiler, and torch finds none. Install one (on Debian and "
            "Ubuntu: apt install g++), or leave --compile out."
        ) from error
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise SettingsError(
            f"--compile needs {header}, which is missing. Install Python's headers (on Debian and "
            "Ubuntu: apt install python3-dev), or leave --compile out."
        )


def compile_blocks(
    transformer: EverAnimateTransformer3DModel, backend: str | Callable[..., object] = "inductor"
) -> None:
    """Compile blocks and face adapters, each kind once for all of its places, at their first call.

    All else, such as skipping blocks, stays outside. Shapes are constants of the compiled code,
    since they never change within a video: with guidance in float32, whose two prompts differ in
    length, there are two versions of the block. No chunk after the first compiles anything.

    Args:
        transformer: Changed in place. Where its blocks are streamed, what brings them is not
            compiled: it differs from block to block, and the compiler would give up on all of them.
        backend: Of `torch.compile`.
    """
    if torch.cuda.is_available() and _capability(None) < _FP8_CAPABILITY:
        widen_outside(transformer)
    for module in (*transformer.blocks, *transformer.face_adapter):
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is None:
            module.compile(backend=backend, dynamic=False)
        else:
            innermost = hooks._fn_refs[0]
            innermost.forward = torch.compile(innermost.forward, backend=backend, dynamic=False)


# --- fp8 -----------------------------------------------------------------------------------------


def check_fp8_matmul(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse matrix products in fp8 where there is no way to compute them.

    Raises:
        SettingsError: Naming what is missing.
    """
    option = "--precision fp8-matmul"
    if importlib.util.find_spec("torchao") is None:
        raise SettingsError(
            f"{option} needs the package torchao, which is not installed. "
            "To install it: pip install torchao."
        )
    if device.type != "cuda":
        raise SettingsError(
            f"{option} needs a CUDA card, and the networks run on {device.type}. "
            "Choose another precision."
        )
    if _capability(device) < _FP8_CAPABILITY:
        raise SettingsError(
            f"{option} needs a card of compute capability {_written(_FP8_CAPABILITY)}, and "
            f"{torch.cuda.get_device_name(device)} has {_written(_capability(device))}. "
            "Choose another precision."
        )
    if dtype != _FP8_DTYPE:
        raise SettingsError(
            f"{option} needs --dtype bfloat16, not {str(dtype).removeprefix('torch.')}."
        )


def enable_fp8_matmul(transformer: EverAnimateTransformer3DModel, device: torch.device) -> None:
    """Store the blocks' linear layers in fp8 and multiply in it, on the card's tensor cores.

    Weights are scaled row by row once, tokens row by row in each call. LoRAs must be fused before.
    `compile_blocks` should follow, which makes the scaling of the tokens part of other kernels.

    Args:
        transformer: In bfloat16, anywhere; changed in place and left where it was.
        device: The card, which gets one block at a time.

    Raises:
        SettingsError: If torchao or a card of compute capability 8.9 is missing.
    """
    check_fp8_matmul(device, transformer.blocks[0].attn1.to_q.weight.dtype)
    for block in transformer.blocks:
        home = block.attn1.to_q.weight.device
        block.to(device)
        multiply_in_fp8(block)
        block.to(home)


def multiply_in_fp8(block: nn.Module) -> None:
    """As `enable_fp8_matmul`, one block, which is on the card."""
    torchao = importlib.import_module("torchao.quantization")  # not everybody has it
    config = torchao.Float8DynamicActivationFloat8WeightConfig(
        granularity=torchao.PerRow(),
        # It would change the whole process: every kernel tuned for minutes, and in older releases
        # products in float32 rounded to TF32, the VAE's too.
        set_inductor_config=False,
    )
    torchao.quantize_(block, config, filter_fn=_is_linear)


def _is_linear(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear)


# --- VAE and memory ------------------------------------------------------------------------------


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Lay out the weights of all 3D convolutions as cuDNN and oneDNN read them, channels last.

    What they compute comes out in the same layout, so that neither rearranges inputs and outputs.
    On an x86 processor encoding took 0.69 and decoding 0.75 of the time with the toy model
    (`tests/benchmarks/speed.py`). On H100 others measured 0.91 for the decoding of this VAE
    (sglang, pull request 26214; as much with torch up to 2.8 in LightX2V, pull request 860, where
    torch 2.9 gained more). Pixels change by rounding.

    Args:
        vae: Changed in place.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)


def has_core_to_spare(device: torch.device) -> bool:
    """Whether another thread can encode a video without slowing down the networks.

    The answer decides what runs at the same time, never the result.
    """
    return device.type != "cpu" or torch.get_num_threads() < _count_cores()


def has_room_beside(device: torch.device, needed_mib: float) -> bool:
    """Whether another thread can run a network meanwhile, on the same device.

    On a CPU there must be cores for twice the threads, since threads of torch that wait for one
    another wait busily: with two on two free cores, runs took twice the time. The answer never
    changes the result.

    Args:
        device: Where both run.
        needed_mib: What both take beside what is on the card now. As estimated: the peak measured
            so far knows nothing of a network that has not run yet, and counts both where they
            have been beside each other.
    """
    if device.type == "cpu":
        return 2 * torch.get_num_threads() < _count_cores()
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + free  # other programs have the rest
    return torch.cuda.memory_allocated(device) + needed_mib * _MIB < _USABLE_SHARE * own


def _count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _capability(device: torch.device | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _written(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
