"""Attention kernels, compilation and fp8: what reaches the network, and what is refused."""

import importlib.util
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from graphs import CountingBackend
from torch import Tensor
from torch.testing import assert_close

from everanimate_cli import acceleration, speed_settings
from everanimate_cli.acceleration import (
    check_compile,
    check_fp8_matmul,
    check_scores,
    choose_attention,
    compile_blocks,
    enable_fp8_matmul,
    has_core_to_spare,
    has_room_beside,
    use_attention,
    use_channels_last,
)
from everanimate_cli.errors import SettingsError
from everanimate_cli.estimates import geometry_of
from everanimate_cli.generation import _can_decode_beside
from everanimate_cli.offloading import Rota, stream_blocks
from everanimate_cli.rollout import Chunk
from everanimate_cli.speed_settings import KERNELS, Attention
from everanimate_cli.transformer import EverAnimateTransformer3DModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_BLOCKS, NUM_ADAPTERS = 4, 2


def build_transformer(
    dtype: torch.dtype = torch.float32, *, merged: bool = False
) -> EverAnimateTransformer3DModel:
    transformer = tiny.build_tiny_pipeline(dtype=dtype).transformer
    assert transformer._merges_padding == (dtype == torch.float32)
    if not merged and dtype == torch.float32:
        transformer = tiny.build_networks()["transformer"]
    return transformer


@torch.no_grad()
def velocity(transformer: EverAnimateTransformer3DModel) -> Tensor:
    inputs = tiny.draw_inputs(cells=(6, 4), dtype=transformer.dtype)
    inputs["encoder_hidden_states"][:, 9:] = 0
    return transformer(**inputs).float()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of every kernel by diffusers' name."""
    counted: Counter[str] = Counter()

    def count(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kernel(*args: Any, **kwargs: Any) -> Tensor:
            counted[name] += 1
            return function(*args, **kwargs)

        return kernel

    for name, function in dict(_AttentionBackendRegistry._backends).items():
        counting = count(name.value, function)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counting)
    return counted


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_kernels_on_the_cpu_agree_and_are_used_everywhere(
    calls: Counter[str], merged: bool
) -> None:
    transformer = build_transformer(merged=merged)
    expected = velocity(transformer)
    # Self attention, cross attention to text and to the picture; and the faces.
    num_calls = 3 * NUM_BLOCKS + NUM_ADAPTERS
    assert calls == {"native": num_calls}
    for name in ("sdpa", "sdpa-math"):
        calls.clear()
        use_attention(transformer, choose_attention(name, CPU, torch.float32))
        assert_close(velocity(transformer), expected, rtol=0, atol=3e-6)
        assert calls == {KERNELS[name].backend: num_calls}


def test_kernels_stay_chosen_when_another_pipeline_takes_the_network(calls: Counter[str]) -> None:
    """As `open_shared_pipeline` does: the main process once fell back to torch's own choice."""
    transformer = build_transformer(merged=True)
    use_attention(transformer, "sdpa-math")
    transformer.merge_padding()
    velocity(transformer)
    assert set(calls) == {"_native_math"}


def test_flash_attention_of_the_cpu_agrees_in_bfloat16(calls: Counter[str]) -> None:
    transformer = build_transformer(torch.bfloat16)
    use_attention(transformer, "sdpa-math")
    expected = velocity(transformer)
    calls.clear()
    use_attention(transformer, choose_attention("sdpa-flash", CPU, torch.bfloat16))
    made = velocity(transformer)
    assert calls == {"_native_flash": 3 * NUM_BLOCKS + NUM_ADAPTERS}
    assert_close(made, expected, rtol=0, atol=0.1)
    assert expected.std() > 1


def test_a_quantising_kernel_serves_self_attention_only(calls: Counter[str]) -> None:
    transformer = build_transformer()
    registry = _AttentionBackendRegistry._backends
    registry[AttentionBackendName.SAGE] = (  # restored by the fixture
        lambda *args, **kwargs: (
            calls.update(["stand-in"]) or registry[AttentionBackendName.NATIVE](*args, **kwargs)
        )
    )
    use_attention(transformer, "sage")
    velocity(transformer)
    assert calls["stand-in"] == NUM_BLOCKS
    assert calls["native"] == NUM_BLOCKS + 2 * NUM_BLOCKS + NUM_ADAPTERS


def test_every_name_is_one_of_diffusers() -> None:
    known = {name.value for name in AttentionBackendName}
    assert {kernel.backend for kernel in KERNELS.values()} <= known
    assert {"auto", *KERNELS} == set(Attention.__args__)  # type: ignore[attr-defined]
    # Those would load code from the Hub, of whatever revision is newest.
    assert not [kernel.backend for kernel in KERNELS.values() if "hub" in kernel.backend]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flash",
            "--attention flash needs the package flash_attn, which is not installed. To install "
            "it: pip install flash-attn --no-build-isolation. Or give auto, which takes what is "
            "there.",
        ),
        (
            "sage",
            "--attention sage needs the package sageattention, which is not installed. To install "
            "it: pip install sageattention --no-build-isolation (2.1.1 or later). Or give auto, "
            "which takes what is there.",
        ),
        (
            "sdpa-cudnn",
            "--attention sdpa-cudnn needs --device cuda, and the networks run on cpu. Give sdpa or "
            "auto.",
        ),
        (
            "sdpa-flash",
            "--attention sdpa-flash computes in bfloat16 and float16 only, and --dtype is float32. "
            "Give --dtype bfloat16, or sdpa.",
        ),
    ],
)
def test_what_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: Attention, message: str
) -> None:
    monkeypatch.setattr(speed_settings, "find_spec", lambda _: None)
    with pytest.raises(SettingsError) as error:
        choose_attention(name, CPU, torch.float32)
    assert str(error.value) == message


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Pretends that there is a CUDA card of some capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Some Card")
        monkeypatch.setattr(acceleration, "_try", lambda *_: None)  # which computes there

    return pretend


def test_auto_takes_flash3_on_hopper_only(
    monkeypatch: pytest.MonkeyPatch, card: Callable[[int, int], None]
) -> None:
    def choose(dtype: torch.dtype = torch.bfloat16) -> str:
        return choose_attention("auto", CUDA, dtype)

    card(9, 0)
    assert choose() == "sdpa"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn_interface")
    assert choose() == "sdpa"  # there, but diffusers cannot load it
    monkeypatch.setattr(acceleration, "_why_unusable", lambda *_: None)
    assert choose() == "flash3"
    assert choose(torch.float32) == "sdpa"
    card(8, 9)
    assert choose() == "sdpa"
    assert choose_attention("auto", CPU, torch.bfloat16) == "sdpa"


def test_a_card_that_is_too_old_is_named(card: Callable[[int, int], None]) -> None:
    card(7, 5)
    with pytest.raises(SettingsError) as error:
        choose_attention("sdpa-cudnn", CUDA, torch.bfloat16)
    assert str(error.value) == (
        "--attention sdpa-cudnn needs a card of compute capability 8.0, and Some Card has 7.5. "
        "Give sdpa or auto."
    )


def test_what_diffusers_refuses_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, card: Callable[[int, int], None]
) -> None:
    """An installed package that is too old, or broken."""
    card(9, 0)
    monkeypatch.setattr(speed_settings, "find_spec", lambda name: name)
    with pytest.raises(SettingsError) as error:
        choose_attention("flash", CUDA, torch.bfloat16)
    text = str(error.value)
    assert text.startswith("--attention flash cannot be used: Flash Attention backend 'flash' is ")
    assert text.endswith("flash-attn>=2.6.3`. Give sdpa or auto.")
    assert "\n" not in text


def test_kernels_are_tried_on_the_card_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, card: Callable[[int, int], None]
) -> None:
    """One built for other cards was refused by a trace, after the networks had been loaded."""
    tried: list[tuple[Any, ...]] = []

    def fail(*given: Any) -> str:
        tried.append(given)
        return "CUDA error: no kernel image is available"

    card(9, 0)
    monkeypatch.setattr(acceleration, "_try", fail)
    with pytest.raises(SettingsError) as error:
        choose_attention("sdpa-flash", CUDA, torch.bfloat16)
    assert str(error.value) == (
        "--attention sdpa-flash cannot be used: CUDA error: no kernel image is available. "
        "Give sdpa or auto."
    )
    assert tried == [("sdpa-flash", CUDA, torch.bfloat16)]
    assert choose_attention("sdpa", CUDA, torch.bfloat16) == "sdpa"
    # By itself it passes them over.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn_interface")
    backends = dict.fromkeys(["flash3"], replace(KERNELS["flash3"], backend="native"))
    monkeypatch.setattr(acceleration, "KERNELS", {**KERNELS, **backends})
    assert choose_attention("auto", CUDA, torch.bfloat16) == "sdpa"
    assert tried[1:] == [("flash3", CUDA, torch.bfloat16)]
    monkeypatch.setattr(acceleration, "_try", lambda *_: None)
    assert choose_attention("auto", CUDA, torch.bfloat16) == "flash3"


def test_what_a_trial_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with kernels that are broken in one way or another."""

    def trial(kernel: Callable[..., Tensor] | None = None) -> str | None:
        if kernel is not None:
            monkeypatch.setitem(
                _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, kernel
            )
        return acceleration._try("sdpa-math", CPU, torch.bfloat16)

    def raises(**_: Any) -> Tensor:
        raise TypeError("flash_attn_func() got an unexpected keyword 'qv'\n  more")

    assert trial() is None
    assert trial(raises) == "flash_attn_func() got an unexpected keyword 'qv'"
    assert trial(lambda value, **_: value * torch.nan) == "it computes wrong numbers here"


def test_scores_that_no_card_can_keep_are_refused(
    monkeypatch: pytest.MonkeyPatch, card: Callable[[int, int], None]
) -> None:
    """Old cards ran out of memory with every preset, and were told to try the next lower one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 << 30, 16 << 30))

    def refusal(attention: Attention, dtype: torch.dtype, num_tokens: int = 24 * 1560) -> str:
        with pytest.raises(SettingsError) as error:
            check_scores(attention, CUDA, dtype, num_heads=40, num_tokens=num_tokens)
        return str(error.value)

    card(7, 5)
    assert refusal("sdpa", torch.bfloat16) == (
        "--dtype bfloat16 keeps 209 GiB of scores, and Some Card has 16: below compute capability "
        "8.0 torch has no other attention for it, and this card has 7.5. Give --dtype float16."
    )
    check_scores("sdpa", CUDA, torch.float16, num_heads=40, num_tokens=24 * 1560)
    check_scores("sdpa", CUDA, torch.bfloat16, num_heads=40, num_tokens=10_000)
    card(8, 0)
    check_scores("sdpa", CUDA, torch.bfloat16, num_heads=40, num_tokens=24 * 1560)
    assert refusal("sdpa-math", torch.bfloat16) == (
        "--attention sdpa-math keeps 209 GiB of scores, and Some Card has 16. Give sdpa or auto."
    )
    check_scores("sdpa-math", CPU, torch.float32, num_heads=40, num_tokens=24 * 1560)


# --- compilation ---------------------------------------------------------------------------------


def test_each_kind_of_module_is_compiled_once_for_all_chunks() -> None:
    guidance_scale = 2.0
    plain = tiny.build_tiny_rollout(guidance_scale=guidance_scale)
    expected = [made for made in plain.run() if isinstance(made, Chunk)]
    torch._dynamo.reset()
    rollout, backend = tiny.build_tiny_rollout(guidance_scale=guidance_scale), CountingBackend()
    compile_blocks(rollout.pipeline.transformer, backend)
    num_graphs = []
    for made, wanted in zip(
        (made for made in rollout.run() if isinstance(made, Chunk)), expected, strict=True
    ):
        num_graphs.append(backend.num_graphs)
        assert_close(made.latents, wanted.latents, rtol=0, atol=1e-5)
    # Blocks, once for each length of the two prompts; face adapters.
    assert num_graphs == [2 + 1] * 3


def test_streamed_blocks_are_compiled_without_what_brings_them() -> None:
    """Of the hooks every block had a version of its own, and after eight the compiler gave up."""
    transformer = build_transformer()
    expected = velocity(transformer)
    stream_blocks(transformer, CPU)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = CountingBackend()
    compile_blocks(transformer, backend)
    for _ in range(3):
        assert_close(velocity(transformer), expected, rtol=0, atol=1e-5)
        assert backend.num_graphs == 2  # a block, a face adapter
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder  # noqa: PLC0415  # slow
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    def find() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find)
    with pytest.raises(SettingsError) as error:
        check_compile(CPU)
    assert str(error.value) == (
        "--compile needs a C++ compiler, and torch finds none. Install one (on Debian and Ubuntu: "
        "apt install g++), or leave --compile out."
    )


def test_missing_headers_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(SettingsError, match=r"^--compile needs /nowhere/Python\.h, which is miss"):
        check_compile(CPU)


def test_a_card_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "has_triton", lambda: False)
    with pytest.raises(SettingsError, match=r"^--compile needs Triton, which torch does not find"):
        check_compile(CUDA)


# --- fp8, VAE, memory ----------------------------------------------------------------------------


def test_fp8_needs_torchao_a_card_and_bfloat16(
    monkeypatch: pytest.MonkeyPatch, card: Callable[[int, int], None]
) -> None:
    def refusal(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
        with pytest.raises(SettingsError) as error:
            check_fp8_matmul(device, dtype)
        return str(error.value)

    option = "--precision fp8-matmul"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert refusal(CPU) == (
        f"{option} needs the package torchao, which is not installed. "
        "To install it: pip install torchao."
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert refusal(CPU).startswith(f"{option} needs a CUDA card, and the networks run on cpu.")
    card(8, 6)
    assert refusal(CUDA).startswith(
        f"{option} needs a card of compute capability 8.9, and Some Card has 8.6."
    )
    card(8, 9)
    assert refusal(CUDA, torch.float16) == f"{option} needs --dtype bfloat16, not float16."
    check_fp8_matmul(CUDA, torch.bfloat16)


def test_fp8_is_for_all_linear_layers_of_the_blocks_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantised: list[torch.nn.Module] = []

    class PerRow:
        pass

    class Config:
        def __init__(self, granularity: PerRow, set_inductor_config: bool) -> None:
            assert isinstance(granularity, PerRow)
            assert not set_inductor_config  # for the whole process

    def quantize_(model: torch.nn.Module, config: Config, filter_fn: Any) -> None:
        assert isinstance(config, Config)
        quantised.extend(part for name, part in model.named_modules() if filter_fn(part, name))

    stand_in = types.SimpleNamespace(
        quantize_=quantize_, PerRow=PerRow, Float8DynamicActivationFloat8WeightConfig=Config
    )
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", stand_in)
    monkeypatch.setattr(acceleration, "check_fp8_matmul", lambda _device, _dtype: None)
    transformer = build_transformer(torch.bfloat16)
    enable_fp8_matmul(transformer, CPU)
    inside = [part for part in transformer.blocks.modules() if isinstance(part, torch.nn.Linear)]
    # 4 of self attention, 6 of cross attention with its picture, 2 of the feed-forward part.
    assert len(quantised) == len(inside) == 12 * NUM_BLOCKS
    assert all(first is second for first, second in zip(quantised, inside, strict=True))


def test_products_in_fp8_by_the_package_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, scales and dtypes, on the CPU, which has the product that cards have."""
    package = pytest.importorskip("torchao.quantization.quant_api")
    from torch._inductor import config  # noqa: PLC0415  # slow

    monkeypatch.setattr(package, "_check_hardware_support", lambda _granularity: None)
    monkeypatch.setattr(acceleration, "check_fp8_matmul", lambda _device, _dtype: None)
    monkeypatch.setattr(config, "coordinate_descent_tuning", False)
    precision = torch.get_float32_matmul_precision()
    transformer = build_transformer(torch.bfloat16)
    expected = velocity(transformer)
    enable_fp8_matmul(transformer, CPU)
    weight: Any = transformer.blocks[0].attn1.to_q.weight
    assert weight.qdata.dtype == torch.float8_e4m3fn
    assert weight.scale.shape == (tiny.INNER_DIM, 1)
    found = velocity(transformer)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05
    stream_blocks(transformer, CPU)
    assert torch.equal(velocity(transformer), found)
    # It would set both for the whole process.
    assert not config.coordinate_descent_tuning
    assert torch.get_float32_matmul_precision() == precision


@torch.no_grad()
def test_channels_last_is_the_same_vae() -> None:
    vae = tiny.build_networks()["vae"]
    latents = torch.randn(
        1, tiny.LATENT_CHANNELS, 2, 4, 6, generator=torch.Generator().manual_seed(0)
    )
    expected = vae.decode(latents).sample
    use_channels_last(vae)
    convolutions = [part for part in vae.modules() if isinstance(part, torch.nn.Conv3d)]
    assert convolutions[3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(vae.decode(latents).sample, expected, rtol=0, atol=1e-5)


def test_room_beside_counts_what_both_take_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest peak so far once decided, and after two had run at once it stood for each."""

    def room(resident: int, needed: float, reserved: int, free: int) -> bool:
        values = {
            "memory_allocated": resident << 30,
            "memory_reserved": reserved << 30,
            "mem_get_info": (free << 30, 0),
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
        return has_room_beside(CUDA, needed * 1024)

    assert room(resident=35, needed=20, reserved=50, free=30)  # 55 of 80
    assert not room(resident=18, needed=8, reserved=23, free=1)  # 26 of 24
    assert not room(resident=35, needed=20, reserved=50, free=9)  # others have the rest
    assert not has_room_beside(torch.device("mps"), 0)


def test_decoding_beside_sampling_needs_room_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = tiny.build_tiny_rollout()
    asked: list[float] = []

    def answer(_device: torch.device, needed_mib: float) -> bool:
        asked.append(needed_mib)
        return True

    monkeypatch.setattr(acceleration, "has_room_beside", answer)
    assert _can_decode_beside(rollout)
    longer = replace(rollout, frames_per_chunk=9)
    assert _can_decode_beside(longer)
    rollout.pipeline.tile_decoding = True
    assert _can_decode_beside(longer)
    geometry = geometry_of(rollout.pipeline.transformer.config, rollout.pipeline.vae.config)
    sizes = (16, 32)
    assert asked[0] == pytest.approx(
        geometry.decode_mib(*sizes, 5)
        + max(geometry.step_mib(*sizes, 5, 1, torch.float32), geometry.encode_mib(*sizes, 5))
    )
    assert asked[1] > asked[0]
    rollout.pipeline.rota = Rota({}, CPU)
    assert not _can_decode_beside(rollout)  # networks that share the card
    assert len(asked) == 3


def test_threads_of_the_cpu_are_not_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(num_threads: int, num_cores: int) -> tuple[bool, bool]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        monkeypatch.setattr(acceleration, "_count_cores", lambda: num_cores)
        return has_core_to_spare(CPU), has_room_beside(CPU, 0)

    assert answers(1, 1) == (False, False)
    assert answers(1, 2) == (True, False)
    assert answers(1, 3) == (True, True)
    assert answers(4, 8) == (True, False)
    assert answers(8, 8) == (False, False)
    assert has_core_to_spare(CUDA)
