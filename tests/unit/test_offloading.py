"""Networks that come to the device in parts, or are stored in fewer bits, on a tiny checkpoint.

The device is the CPU here: what comes is copied, so that it counts, and numbers can be compared.
"""

import sys
import types
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from tiny import TINY_DEFAULTS, build_tiny_pipeline
from torch import Tensor, nn

from everanimate_cli import offloading
from everanimate_cli.acceleration import use_channels_last
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.offloading import (
    Rota,
    check_package,
    holds_packed_weights,
    is_out_of_memory,
    offload_folder,
    place,
    store_blocks,
    stream_blocks,
)
from everanimate_cli.pipeline import AnimatePipeline, Conditioning
from everanimate_cli.placement_settings import Placement
from everanimate_cli.schedule import shifted_sigmas

CPU = torch.device("cpu")
NETWORKS = ("transformer", "vae", "image_encoder")


def networks_of(pipeline: AnimatePipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in NETWORKS}


def placed(placement: Placement, folder: Path | None = None, **options: Any) -> AnimatePipeline:
    """The tiny pipeline as `load_pipeline` would give it with this placement."""
    pipeline = build_tiny_pipeline(**options)
    pipeline.rota = place(networks_of(pipeline), placement, CPU, folder=folder)
    pipeline.tile_decoding = placement.tile_decoding
    return pipeline


def make_chunks(pipeline: AnimatePipeline, num_chunks: int = 2) -> list[Tensor]:
    """Frames of chunks, through every network, in the order of the chunk loop."""
    draw = torch.Generator().manual_seed(0)
    random = np.random.default_rng(0)
    height, width = TINY_DEFAULTS.height, TINY_DEFAULTS.width
    pose_u8 = random.integers(0, 256, (9, height, width, 3), dtype=np.uint8)
    face_u8 = random.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    prompt_embeds = pipeline.encode_prompt("a fox")
    chunks = []
    for _ in range(num_chunks):
        conditioning = Conditioning(
            condition=torch.randn(1, 10, 7, height // 8, width // 8, generator=draw),
            pose_embeds=pipeline.embed_pose(pose_u8),
            face_tokens=pipeline.embed_face(face_u8),
            prompt_embeds=prompt_embeds,
            clip_embeds=pipeline.encode_clip(pose_u8[0]),
        )
        noise = torch.randn(1, 6, 7, height // 8, width // 8, generator=draw)
        *_, latents = pipeline.denoise(noise, shifted_sigmas(2, 5.0), conditioning)
        chunks.append(pipeline.decode(latents[:, :, 4:]))
    return chunks


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return make_chunks(build_tiny_pipeline())


@pytest.mark.parametrize("offload", ["none", "model", "group", "disk"])
def test_waiting_elsewhere_changes_no_pixel(
    tmp_path: Path, expected: list[Tensor], offload: Any
) -> None:
    pipeline = placed(Placement(offload=offload), tmp_path)
    assert pipeline.may_overlap == (offload == "none")
    torch.testing.assert_close(make_chunks(pipeline), expected, rtol=0, atol=0)
    assert bool(list(tmp_path.iterdir())) == (offload == "disk")


@pytest.mark.parametrize("offload", ["model", "group", "disk"])
def test_weights_in_8_bits_come_in_parts_too(tmp_path: Path, offload: Any) -> None:
    resident = make_chunks(placed(Placement(precision="fp8")))
    pipeline = placed(Placement(precision="fp8", offload=offload), tmp_path)
    torch.testing.assert_close(make_chunks(pipeline), resident, rtol=0, atol=0)


# --- one network at a time -----------------------------------------------------------------------


def places(network: nn.Module) -> list[int]:
    return [each.data_ptr() for each in chain(network.parameters(), network.buffers())]


def test_of_a_rota_one_network_is_on_the_card() -> None:
    networks = networks_of(build_tiny_pipeline())
    homes = {name: places(network) for name, network in networks.items()}
    rota = Rota(networks, CPU)
    for name in ("vae", "transformer", "transformer", "image_encoder", "vae"):
        rota.bring(name)
        for key, network in networks.items():
            if key == name:
                assert set(places(network)).isdisjoint(homes[key])
            else:
                assert places(network) == homes[key]
    rota.bring("text_encoder")  # not of this rota: the card is left to it
    # What returned never left: not a byte was copied back.
    assert {name: places(network) for name, network in networks.items()} == homes


def test_what_is_changed_before_the_first_call_stays() -> None:
    """Weights were once put back as they had been loaded, and the VAE computed otherwise."""
    pipeline = build_tiny_pipeline()
    rota = Rota(networks_of(pipeline), CPU)
    weight = pipeline.vae.quant_conv.weight
    weight.data = 2 * weight.data
    changed = weight.data.clone()
    for name in ("vae", "image_encoder", "vae"):
        rota.bring(name)
        assert torch.equal(weight, changed)


def test_an_order_of_elements_chosen_after_placing_stays_too() -> None:
    pipeline = build_tiny_pipeline()
    rota = Rota(networks_of(pipeline), CPU)
    weights = [each.weight for each in pipeline.vae.modules() if isinstance(each, nn.Conv3d)]
    for weight in weights:
        weight.data = weight.data.contiguous()
    use_channels_last(pipeline.vae)
    for name in ("vae", "image_encoder", "vae"):
        rota.bring(name)
        order = torch.channels_last_3d
        assert all(weight.is_contiguous(memory_format=order) for weight in weights)


def test_a_pipeline_asks_for_the_network_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    bring = Rota.bring
    monkeypatch.setattr(Rota, "bring", lambda rota, name: asked.append(name) or bring(rota, name))
    make_chunks(placed(Placement(offload="model")), num_chunks=1)
    assert asked == [
        *("vae", "transformer", "transformer", "image_encoder"),
        *("transformer", "transformer", "vae"),
    ]


# --- block by block ------------------------------------------------------------------------------


@pytest.fixture
def group_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """("on" or "off", number of weights) of every group that comes or goes."""
    log: list[tuple[str, int]] = []

    def spy(name: str, word: str) -> None:
        call = getattr(ModuleGroup, name)

        def wrapped(group: ModuleGroup) -> None:
            log.append((word, sum(p.numel() for m in group.modules for p in m.parameters())))
            call(group)

        monkeypatch.setattr(ModuleGroup, name, wrapped)

    spy("onload_", "on")
    spy("offload_", "off")
    return log


def test_blocks_come_one_after_the_other_and_the_rest_stays(
    group_log: list[tuple[str, int]],
) -> None:
    pipeline = build_tiny_pipeline()
    network = pipeline.transformer
    order = [name for name, _ in network.named_modules()]
    block, adapter = (
        sum(p.numel() for p in module.parameters())
        for module in (network.blocks[0], network.face_adapter[0])
    )
    stream_blocks(network, CPU)
    assert [name for name, _ in network.named_modules()] == order
    group_log.clear()
    make_chunks(pipeline, num_chunks=1)
    # Two steps of four blocks, with face adapters after blocks 0 and 2. The group without modules
    # is the network's own table.
    one_step = [block, adapter, block, block, adapter, block]
    expected = [("on", 0)]
    expected += [(word, size) for size in one_step for word in ("on", "off")]
    assert group_log == 2 * [*expected, ("off", 0)]


def test_on_a_card_the_next_block_is_copied_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(offloading, "apply_group_offloading", lambda _n, **kw: given.update(kw))
    network = build_tiny_pipeline().transformer
    for child in network.children():
        monkeypatch.setattr(child, "to", lambda _device: None)  # there is no such device here
    monkeypatch.setattr(offloading, "free_main_memory", lambda: 2**40)
    stream_blocks(network, torch.device("cuda"), folder=Path("files"))
    assert given == {
        "onload_device": torch.device("cuda"),
        "offload_device": CPU,
        "offload_type": "block_level",
        "num_blocks_per_group": 1,
        "use_stream": True,
        "record_stream": True,
        "low_cpu_mem_usage": False,
        "offload_to_disk_path": "files",
    }
    # Pinned memory cannot be swapped out: where it is short, a block is pinned at a time.
    monkeypatch.setattr(offloading, "free_main_memory", lambda: 2**20)
    stream_blocks(network, torch.device("cuda"))
    assert given["low_cpu_mem_usage"] is True
    assert given["offload_to_disk_path"] is None


def test_files_hold_the_weights_and_are_deleted(tmp_path: Path) -> None:
    def work() -> None:
        with offload_folder(tmp_path) as folder:
            pipeline = placed(Placement(offload="disk"), folder)
            blocks = chain(pipeline.transformer.blocks, pipeline.transformer.face_adapter)
            num_weights = sum(p.numel() for block in blocks for p in block.parameters())
            written = sum(path.stat().st_size for path in folder.iterdir())
            assert 4 * num_weights < written < 4.2 * num_weights
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(offloading.shutil, "disk_usage", lambda _path: usage)
    folder = tmp_path / "offload-1"
    folder.mkdir()
    with pytest.raises(RunError, match=r"--offload disk needs 0\.0 GiB in .*, where 0\.0 GiB are"):
        placed(Placement(offload="disk"), folder)
    assert list(folder.iterdir()) == []


# --- fewer bits ----------------------------------------------------------------------------------


def test_8_bits_for_the_linear_layers_of_the_blocks_and_no_others() -> None:
    network = placed(Placement(precision="fp8"), dtype=torch.bfloat16).transformer
    dtypes: dict[torch.dtype, set[str]] = {}
    for name, value in network.named_parameters():
        dtypes.setdefault(value.dtype, set()).add(name)
    assert set(dtypes) == {torch.float8_e4m3fn, torch.bfloat16, torch.float32}
    linear = {
        f"blocks.{index}.{name}.{kind}"
        for index, block in enumerate(network.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        for kind in ("weight", "bias")
    }
    assert dtypes[torch.float8_e4m3fn] == linear
    kept = set(network._keep_in_fp32_modules)
    assert dtypes[torch.float32] == {
        name for name, _ in network.named_parameters() if kept & set(name.split("."))
    }
    assert network.dtype == torch.bfloat16  # in which it computes


def test_8_bits_change_pixels_a_little(expected: list[Tensor]) -> None:
    made = make_chunks(placed(Placement(precision="fp8")))
    differences = [float((a - b).abs().mean()) for a, b in zip(made, expected, strict=True)]
    assert all(1e-4 < difference < 0.05 for difference in differences)


@pytest.mark.parametrize(
    ("precision", "package"),
    [
        ("torchao-fp8", "torchao"),
        ("torchao-int8", "torchao"),
        ("nf4", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    precision: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "find_spec", lambda _name: None)
    with pytest.raises(SettingsError) as caught:
        store_blocks(build_tiny_pipeline().transformer, precision, CPU)
    assert str(caught.value) == (
        f"--precision {precision} needs the package {package}, which is not installed. Install it "
        f"with 'pip install {package}', or give --precision fp8."
    )
    check_package("fp8")
    check_package("full")
    with pytest.raises(SettingsError) as caught:
        check_package(precision, "--quantize-base 4-bit")
    assert str(caught.value) == (
        f"--quantize-base 4-bit needs the package {package}, which is not installed. Install it "
        f"with 'pip install {package}', or give --quantize-base fp8."
    )


@pytest.mark.parametrize(
    ("precision", "config"),
    [("torchao-int8", "Int8WeightOnlyConfig"), ("torchao-fp8", "Float8WeightOnlyConfig")],
)
def test_torchao_gets_every_block(
    precision: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package: which modules it is given, and what it is asked for."""
    given: list[tuple[nn.Module, str]] = []
    fake = types.ModuleType("torchao.quantization")
    for name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
        setattr(fake, name, type(name, (), {}))
    fake.quantize_ = lambda module, how: given.append((module, type(how).__name__))
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    monkeypatch.setattr(offloading, "find_spec", lambda _name: fake)
    network = build_tiny_pipeline().transformer
    store_blocks(network, precision, CPU)
    assert given == [(block, config) for block in network.blocks]


def test_nf4_takes_the_place_of_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for bitsandbytes: layers that are given their weights, not made."""

    class Packed(nn.Parameter):
        def __new__(cls, data: Tensor, requires_grad: bool, quant_type: str) -> "Packed":
            assert quant_type == "nf4"
            return super().__new__(cls, data, requires_grad)  # type: ignore[call-arg]

    class Linear4bit(nn.Linear):
        def __init__(self, *sizes: int, bias: bool, device: str, **given: Any) -> None:
            super().__init__(*sizes, bias=bias, device=device)
            assert given == {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}

    fake = types.ModuleType("bitsandbytes.nn")
    fake.Linear4bit, fake.Params4bit = Linear4bit, Packed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", fake)
    monkeypatch.setattr(offloading, "find_spec", lambda _name: fake)
    network = build_tiny_pipeline(dtype=torch.bfloat16).transformer
    before = {name: value.clone() for name, value in network.named_parameters()}
    assert not holds_packed_weights(network)
    store_blocks(network, "nf4", CPU)
    assert holds_packed_weights(network)
    torch.testing.assert_close(dict(network.named_parameters()), before, rtol=0, atol=0)
    replaced = {name for name, each in network.named_modules() if isinstance(each, Linear4bit)}
    linear = {name for name, each in network.named_modules() if isinstance(each, nn.Linear)}
    assert replaced == {name for name in linear if name.startswith("blocks.")}
    packed = [network.get_submodule(name) for name in replaced]
    assert all(isinstance(layer.weight, Packed) for layer in packed)
    # A format of bitsandbytes for CPUs that has no gradient.
    assert not any(layer.support_avx512bf16_for_cpu for layer in packed)


# --- out of memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "is_it"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (lambda: RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(
    make: Callable[[], RuntimeError], is_it: bool
) -> None:
    assert is_out_of_memory(make()) is is_it
