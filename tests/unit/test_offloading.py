"""Networks that come to the device in parts, or are stored in fewer bits, on a tiny checkpoint.

The device is the CPU here: what comes is copied, so that it counts, and numbers can be compared.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY_DEFAULTS, build_tiny_pipeline
from torch import Tensor, nn

from everanimate_cli import main_memory, offloading
from everanimate_cli.acceleration import use_channels_last
from everanimate_cli.block_stream import BlockStream
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.estimates import geometry_of
from everanimate_cli.offloading import (
    Rota,
    check_package,
    is_out_of_memory,
    offload_folder,
    place,
    resident_layers,
    store_blocks,
    stream_blocks,
)
from everanimate_cli.piecewise import BandedConv3d, PiecewiseBlock
from everanimate_cli.pipeline import AnimatePipeline, Conditioning
from everanimate_cli.placement import Job, Sizes, estimate
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
        pose_latents, clip_embeds = pipeline.encode_pose(pose_u8), pipeline.encode_clip(pose_u8[0])
        conditioning = Conditioning(
            condition=torch.randn(1, 10, 7, height // 8, width // 8, generator=draw),
            pose_embeds=pipeline.embed_pose(pose_latents),
            face_tokens=pipeline.embed_face(face_u8),
            prompt_embeds=prompt_embeds,
            clip_embeds=clip_embeds,
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


def test_clip_comes_beside_the_others_and_changes_no_pixel(
    monkeypatch: pytest.MonkeyPatch, expected: list[Tensor]
) -> None:
    """As on a card where all else stays; another thread may decode meanwhile."""
    moved: list[nn.Module] = []
    pipeline = build_tiny_pipeline()
    clip = pipeline.image_encoder
    homes = places(clip)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", lambda network, _device: moved.append(network))
        patch.setattr(main_memory, "free_main_memory", lambda: 2**30)  # too little to pin
        rota = place(networks_of(pipeline), Placement(), torch.device("cuda"))
    assert rota is not None
    assert pipeline.vae in moved
    assert pipeline.transformer in moved
    assert clip not in moved
    assert places(clip) == homes
    assert rota.notes() == []
    rota.device = CPU
    pipeline.rota = rota
    assert pipeline.may_overlap
    seen: list[bool] = []

    def look(*_: Any) -> None:
        rota.bring("vae")  # of a thread that decodes
        seen.append(set(places(clip)).isdisjoint(homes))

    clip.register_forward_pre_hook(look)
    torch.testing.assert_close(make_chunks(pipeline), expected, rtol=0, atol=0)
    assert seen == [True, True]
    assert places(clip) == homes


@pytest.mark.parametrize("offload", ["model", "group", "disk"])
def test_weights_in_8_bits_come_in_parts_too(tmp_path: Path, offload: Any) -> None:
    resident = make_chunks(placed(Placement(precision="fp8")))
    pipeline = placed(Placement(precision="fp8", offload=offload), tmp_path)
    torch.testing.assert_close(make_chunks(pipeline), resident, rtol=0, atol=0)


# --- one network at a time -----------------------------------------------------------------------


def places(network: nn.Module) -> list[int]:
    return [each.data_ptr() for each in chain(network.parameters(), network.buffers())]


def test_where_blocks_are_streamed_the_other_layers_leave_for_the_vae_and_clip(
    expected: list[Tensor],
) -> None:
    pipeline = build_tiny_pipeline()
    network, rest = pipeline.transformer, resident_layers(pipeline.transformer)
    assert {id(value) for value in network.parameters()} == {
        id(value)
        for part in (rest, network.blocks, network.face_adapter)
        for value in part.parameters()
    }
    stream = stream_blocks(network, CPU)
    networks = networks_of(pipeline) | {"transformer": rest}
    rota = pipeline.rota = Rota(networks, CPU, stream=stream)
    homes = places(rest)
    for name in ("vae", "image_encoder"):
        rota.bring("transformer")
        assert set(places(rest)).isdisjoint(homes)
        rota.bring(name)
        assert places(rest) == homes
    torch.testing.assert_close(make_chunks(pipeline), expected, rtol=0, atol=1e-5)


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
        *("vae", "image_encoder", "transformer", "transformer"),
        *("transformer", "transformer", "vae"),
    ]


# --- block by block ------------------------------------------------------------------------------


def test_blocks_come_one_after_the_other_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = build_tiny_pipeline()
    network = pipeline.transformer
    streamed = (*network.blocks, *network.face_adapter)
    names = {id(part): f"{type(part).__name__}" for part in streamed}
    homes = {id(part): places(part) for part in streamed}
    log: list[tuple[str, str]] = []
    stream = stream_blocks(network, CPU)
    for word in ("bring", "leave"):
        call = getattr(BlockStream, word)

        def wrapped(stream: BlockStream, index: int, call: Any = call, word: str = word) -> None:
            call(stream, index)
            away = [part for part in streamed if set(places(part)).isdisjoint(homes[id(part)])]
            assert len(away) == (word == "bring")  # never two at once
            log.append((word, names[id(away[0])] if away else ""))

        monkeypatch.setattr(BlockStream, word, wrapped)
    assert isinstance(stream, BlockStream)
    make_chunks(pipeline, num_chunks=1)
    # Two steps of four blocks, with face adapters after blocks 0 and 2.
    block, adapter = names[id(network.blocks[0])], names[id(network.face_adapter[0])]
    one_step = [block, adapter, block, block, adapter, block]
    assert log == 2 * [each for name in one_step for each in (("bring", name), ("leave", ""))]
    # What returned never left: not a byte was copied back.
    assert {id(part): places(part) for part in streamed} == homes


@pytest.mark.parametrize("prefetch", [True, False])
def test_on_a_card_blocks_are_pinned_and_the_next_is_fetched_meanwhile(
    monkeypatch: pytest.MonkeyPatch, prefetch: bool
) -> None:
    card = torch.device("cuda")
    given: dict[str, Any] = {}

    def stand_in(blocks: Any, device: torch.device, *, prefetch: bool) -> Any:
        given.update(blocks=blocks, device=device, prefetch=prefetch)

    pieces: list[Tensor] = []

    def allocate(num_bytes: int) -> Tensor:
        pieces.append(torch.empty(num_bytes, dtype=torch.uint8))
        return pieces[-1]

    monkeypatch.setattr(offloading, "BlockStream", stand_in)
    monkeypatch.setattr(main_memory, "_allocate_pinned", allocate)
    monkeypatch.setattr(main_memory, "PINNED_PIECE", 2**18)
    monkeypatch.setattr(main_memory, "free_main_memory", lambda: 2**40)
    networks = networks_of(build_tiny_pipeline())
    transformer: Any = networks["transformer"]
    for child in transformer.children():
        monkeypatch.setattr(child, "to", lambda _device: None)  # there is no such device here
    transformer.scale_shift_table = None
    before = {name: value.clone() for name, value in transformer.blocks.named_parameters()}
    rota = place(networks, Placement(offload="group", prefetch=prefetch), card)
    assert (given["device"], given["prefetch"]) == (card, prefetch)
    assert [block for block, _ in given["blocks"]] == [
        *(transformer.blocks[0], transformer.face_adapter[0], transformer.blocks[1]),
        *(transformer.blocks[2], transformer.face_adapter[1], transformer.blocks[3]),
    ]
    ends = [(piece.data_ptr(), piece.data_ptr() + piece.numel()) for piece in pieces]
    assert len(pieces) > 1
    for name, value in transformer.blocks.named_parameters():
        assert torch.equal(value, before[name])
        assert any(start <= value.data_ptr() < end for start, end in ends)
    assert rota is not None
    assert rota.notes() == []
    assert all(type(block) is PiecewiseBlock for block in transformer.blocks)
    # The other layers come and go like a network.
    table = transformer.patch_embedding.weight
    assert any(start <= table.data_ptr() < end for start, end in ends)
    rota.device = CPU
    rota.bring("transformer")
    assert not any(start <= table.data_ptr() < end for start, end in ends)
    rota.clear()
    assert any(start <= table.data_ptr() < end for start, end in ends)
    # All pieces, with what is left over in them, are what was estimated.
    for name in ("vae", "image_encoder"):
        rota.bring(name)
    weights = {
        name: {key: tuple(value.shape) for key, value in network.named_parameters()}
        for name, network in networks.items()
    }
    geometry = geometry_of(transformer.config, networks["vae"].config)
    needed = estimate(
        Sizes(geometry=geometry, shapes=weights | {"text_encoder": {}}),
        Placement(offload="group", prefetch=prefetch),
        Job(height=48, width=64, frames_per_chunk=9, num_identity_slots=4, dtype=torch.float32),
    )
    assert sum(piece.numel() for piece in pieces) == needed.main_memory_mib * 2**20


def test_on_a_card_the_vae_works_in_bands() -> None:
    pipeline = build_tiny_pipeline()
    assert type(pipeline.vae.quant_conv) is not BandedConv3d
    replace(pipeline, device=torch.device("cuda"))
    assert type(pipeline.vae.quant_conv) is BandedConv3d


def test_without_room_to_pin_blocks_wait_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_memory, "free_main_memory", lambda: 2**30)
    networks = networks_of(build_tiny_pipeline())
    homes = places(networks["transformer"])
    rota = place(networks, Placement(offload="model"), torch.device("cuda"))
    assert places(networks["transformer"]) == homes
    assert rota is not None
    assert rota.notes() == [
        "0.5 GiB of main memory are too much to pin with 1.0 GiB free: copies to the card take "
        "longer"
    ]


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
    given: list[tuple[nn.Module, tuple[str, dict[str, Any]]]] = []
    fake = types.ModuleType("torchao.quantization")
    for name in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
        setattr(fake, name, lambda name=name, **options: (name, options))
    fake.quantize_ = lambda module, how: given.append((module, how))
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    monkeypatch.setattr(offloading, "find_spec", lambda _name: fake)
    network = build_tiny_pipeline().transformer
    store_blocks(network, precision, CPU)
    asked = (config, {"set_inductor_config": False})  # the process is not torchao's
    assert given == [(block, asked) for block in network.blocks]


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
    assert Rota({"transformer": network}, CPU).settle("transformer")
    store_blocks(network, "nf4", CPU)
    assert not Rota({"transformer": network}, CPU).settle("transformer")  # it is moved
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
        (lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cu"), True),
        (lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (lambda: RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (lambda: RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(
    make: Callable[[], RuntimeError], is_it: bool
) -> None:
    assert is_out_of_memory(make()) is is_it
