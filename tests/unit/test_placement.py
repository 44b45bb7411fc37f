"""What placements take, against counted tensors of full width, and which of them is chosen."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from live_bytes import LiveBytes
from tiny import build_tiny_pipeline, write_tiny_checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from everanimate_cli import offloading, placement
from everanimate_cli import pipeline as pipeline_module
from everanimate_cli.errors import SettingsError
from everanimate_cli.hub import locate_model
from everanimate_cli.offloading import Rota, place, resident_layers
from everanimate_cli.piecewise import compute_blocks_piecewise, work_in_bands
from everanimate_cli.pipeline import AnimatePipeline, Conditioning
from everanimate_cli.placement import (
    RELEASED_CONFIGS,
    Job,
    Sizes,
    choose_placement,
    continued,
    describe_shortage,
    estimate,
    next_lower,
    pixel_options,
    plan_for_machine,
    read_sizes,
    released_sizes,
)
from everanimate_cli.placement_settings import PRESETS, Placement, PlacementOptions
from everanimate_cli.schedule import shifted_sigmas
from everanimate_cli.transformer import EverAnimateTransformer3DModel

CPU = torch.device("cpu")
JOB = Job(height=480, width=832, frames_per_chunk=77, num_identity_slots=4, dtype=torch.bfloat16)
LARGE = replace(JOB, height=720, width=1280)
GIB = 1024


# --- against what is counted ---------------------------------------------------------------------

NUM_BLOCKS = 5  # with one face adapter, as in every fifth of the released network


@pytest.fixture
def fakes_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules of fake tensors change their dtype, which torch does by swapping otherwise.

    And let them be convolved by torch's own operator, of which fake tensors know.
    """

    def to(network: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(*args, **kwargs)
        return network

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(pipeline_module, "_convolve_with_onednn", lambda _vae: None)


def fake_pipeline() -> AnimatePipeline:
    """Networks of full width in bfloat16 whose weights have no memory; VAE and CLIP are whole."""
    config = RELEASED_CONFIGS["transformer"] | {"num_layers": NUM_BLOCKS}
    transformer = EverAnimateTransformer3DModel.from_config(config)
    for name, parameter in transformer.named_parameters():
        if set(transformer._keep_in_fp32_modules).isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    clip = CLIPVisionModel(CLIPVisionConfig.from_dict(RELEASED_CONFIGS["image_encoder"]))
    return AnimatePipeline(
        transformer=transformer.requires_grad_(False),
        vae=AutoencoderKLWan().requires_grad_(False),
        text_encoder=None,
        tokenizer=None,
        image_encoder=clip.to(torch.bfloat16).requires_grad_(False),
        image_processor=None,
        device=CPU,
    )


def sizes_of(pipeline: AnimatePipeline) -> Sizes:
    networks = {name: getattr(pipeline, name) for name in ("transformer", "vae", "image_encoder")}
    shapes: Any = {
        name: {key: tuple(value.shape) for key, value in network.named_parameters()}
        for name, network in networks.items()
    }
    geometry = replace(released_sizes().geometry, num_layers=NUM_BLOCKS)
    return Sizes(geometry=geometry, shapes={**shapes, "text_encoder": {}})


def count_phases(
    placed: Placement, num_frames: int, *, on_card: bool = False
) -> tuple[dict[str, float], Sizes]:
    """MiB that are alive in each phase, weights included, and the sizes of the networks.

    With `on_card` what can wait does so, also where main memory is the device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        pipeline = fake_pipeline()
        sizes = sizes_of(pipeline)
        networks: dict[str, nn.Module] = {
            name: getattr(pipeline, name) for name in ("transformer", "vae", "image_encoder")
        }
        if on_card:
            compute_blocks_piecewise(pipeline.transformer)
            work_in_bands(pipeline.vae)
        rota = place(networks, placed, CPU)
        transformer, rest = pipeline.transformer, resident_layers(pipeline.transformer)
        guests: dict[str, nn.Module] = {}
        if placed.offload == "none" and on_card:
            guests["image_encoder"] = pipeline.image_encoder
            rota = Rota(guests, CPU, may_overlap=True)
        elif placed.offload == "model":
            guests |= networks
        elif placed.offload == "group":
            guests |= {"vae": pipeline.vae, "image_encoder": pipeline.image_encoder}
            if on_card:
                guests["transformer"] = rest
                rota = Rota(guests, CPU)  # the blocks are called by their hooks
        pipeline.rota, pipeline.tile_decoding = rota, placed.tile_decoding
        idle = list(guests.values())
        if placed.offload == "group":
            idle += [transformer.blocks, transformer.face_adapter]
        # As it is now: later the same parameters hold what is on the card.
        waiting = [each.data for network in idle for each in network.parameters()]
        num_slots = (num_frames - 1) // 4 + 1
        cells = (JOB.height // 8, JOB.width // 8)
        patches = (JOB.height // 16, JOB.width // 16)
        conditioning = Conditioning(
            condition=torch.empty(1, 20, 4 + num_slots, *cells),
            pose_embeds=torch.empty(1, 5120, num_slots, *patches, dtype=torch.bfloat16),
            face_tokens=torch.empty(1, num_slots, 5, 5120, dtype=torch.bfloat16),
            prompt_embeds=torch.empty(1, 512, 4096, dtype=torch.bfloat16),
            clip_embeds=torch.empty(1, 257, 1280, dtype=torch.bfloat16),
        )
        phases = {}

        def measure(name: str, *given: torch.Tensor) -> LiveBytes:
            phases[name] = LiveBytes(networks.values(), given=given, elsewhere=waiting)
            return phases[name]

        video = torch.empty(1, 3, num_frames, JOB.height, JOB.width)
        with measure("encode"):
            pipeline.encode_video(video)
            pipeline.encode_clip(np.zeros((JOB.height, JOB.width, 3), np.uint8))
        del video
        noise = torch.empty(1, 16, 4 + num_slots, *cells)
        with measure("denoise", *filter(torch.is_tensor, vars(conditioning).values())):
            list(pipeline.denoise(noise, shifted_sigmas(1, 5.0), conditioning))
        with measure("decode"):
            pipeline.decode(noise[:, :, 4:])
    return {name: live.peak_mib for name, live in phases.items()}, sizes


@pytest.mark.parametrize(
    "placed",
    [
        Placement(),
        Placement(offload="model"),
        Placement(offload="group"),
        # Without prefetch one block is there on a card too.
        Placement(precision="fp8", offload="group", prefetch=False),
    ],
    ids=Placement.describe,
)
@pytest.mark.parametrize("on_card", [True, False])
@pytest.mark.usefixtures("fakes_move")
def test_the_estimate_is_near_what_is_counted(placed: Placement, on_card: bool) -> None:
    """Within 8 % in every phase, at the released size of pictures."""
    if on_card:
        placed = replace(placed, prefetch=False)
    job = replace(JOB, frames_per_chunk=41 if on_card else 17)  # enough tokens for two pieces
    counted, sizes = count_phases(placed, job.frames_per_chunk, on_card=on_card)
    needed = estimate(sizes, placed, job, has_streams=on_card)
    expected = {name: needed.phases_mib[name] for name in counted}
    assert expected == pytest.approx(counted, rel=0.08)


@pytest.mark.usefixtures("fakes_move")
def test_clip_takes_nothing_of_a_card_but_when_it_looks() -> None:
    """Where all others stay, they alone are there beside what one network at a time takes."""
    job = replace(JOB, frames_per_chunk=5)
    alone, beside = Placement(offload="model"), Placement()
    found = []
    for placed in (alone, beside):
        counted, sizes = count_phases(placed, 5, on_card=True)
        found.append((counted, estimate(sizes, placed, job).phases_mib))
    weights = estimate(sizes, beside, job).weights_mib
    for one, all_but_clip in zip(*found, strict=True):
        for phase, other in (
            ("encode", "transformer"),
            ("denoise", "vae"),
            ("decode", "transformer"),
        ):
            taken = all_but_clip[phase] - one[phase]
            assert taken == pytest.approx(weights[other], abs=3)
    tiny = replace(job, height=64, width=64)
    waits, stays = (estimate(sizes, beside, tiny, has_streams=card) for card in (True, False))
    # Then it is what takes most beside the others.
    assert waits.phases_mib["encode"] == pytest.approx(
        sum(weights[name] for name in ("transformer", "vae", "image_encoder"))
    )
    assert waits.phases_mib["encode"] < stays.phases_mib["encode"]
    assert stays.phases_mib["denoise"] - waits.phases_mib["denoise"] == pytest.approx(
        weights["image_encoder"]
    )
    assert weights["image_encoder"] <= waits.main_memory_mib < weights["image_encoder"] + 512
    assert stays.main_memory_mib == 0


@pytest.mark.usefixtures("fakes_move")
def test_the_estimate_of_tiles_is_near_what_is_counted() -> None:
    placed = Placement(offload="model", tile_decoding=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        pipeline = fake_pipeline()
        sizes = sizes_of(pipeline)
        pipeline.tile_decoding = True
        with LiveBytes([pipeline.vae]) as live:
            pipeline.decode(torch.empty(1, 16, 2, 40, 40))
    job = replace(JOB, height=320, width=320, frames_per_chunk=5)
    needed = estimate(sizes, placed, job).phases_mib["decode"]
    assert needed == pytest.approx(live.peak_mib, rel=0.08)
    whole = replace(placed, tile_decoding=False)
    assert needed < 0.8 * estimate(sizes, whole, job).phases_mib["decode"]


def test_tiles_change_decoded_pixels_and_nothing_that_is_encoded() -> None:
    plain, tiled = build_tiny_pipeline(), build_tiny_pipeline()
    tiled.tile_decoding = True
    video = torch.rand(1, 3, 5, 48, 304, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = plain.encode_video(video)
    assert torch.equal(tiled.encode_video(video), latents)
    difference = (tiled.decode(latents) - plain.decode(latents)).abs()
    assert difference.max() > 1e-4
    assert difference.mean() < 0.05
    assert torch.equal(tiled.encode_video(video), latents)  # and not after decoding either


def test_streams_need_two_blocks_and_waiting_networks_main_memory() -> None:
    sizes = released_sizes()
    group, disk = (Placement(offload=offload) for offload in ("group", "disk"))
    block_mib = 403_838_464 * 2 / 2**20
    with_streams, without = (
        estimate(sizes, replace(group, prefetch=prefetch), JOB).phases_mib["denoise"]
        for prefetch in (True, False)
    )
    assert with_streams - without == pytest.approx(block_mib, rel=0.01)
    streamed_mib = (40 * 403_838_464 + 839_026_688) * 2 / 2**20
    vae_mib, clip_mib = 126_892_531 * 4 / 2**20, 630_766_080 * 2 / 2**20
    in_memory, on_disk = (estimate(sizes, placed, JOB) for placed in (group, disk))
    rest_mib = in_memory.weights_mib["transformer"] - streamed_mib  # comes for the steps alone
    assert 500 < rest_mib < 700
    waiting_mib = streamed_mib + rest_mib + vae_mib + clip_mib
    # In pieces, of which little is left over.
    assert waiting_mib < in_memory.main_memory_mib < 1.02 * waiting_mib
    assert in_memory.main_memory_mib % 512 == 0
    plain = estimate(sizes, group, JOB, has_streams=False)
    assert plain.main_memory_mib == pytest.approx(waiting_mib - rest_mib, rel=0.001)
    assert on_disk.main_memory_mib == pytest.approx(rest_mib + vae_mib + clip_mib, rel=0.002)
    for phase in ("encode", "decode"):
        alone = estimate(sizes, Placement(offload="model"), JOB).phases_mib
        assert in_memory.phases_mib[phase] == alone[phase]
    assert on_disk.disk_mib == pytest.approx(streamed_mib, rel=0.001)
    assert in_memory.disk_mib == 0
    assert in_memory.phases_mib == on_disk.phases_mib


def test_the_sizes_of_a_checkpoint_come_from_its_headers(tmp_path: Path) -> None:
    source = locate_model(str(write_tiny_checkpoint(tmp_path / "tiny")), lambda _event: None)
    sizes = read_sizes(source)
    pipeline = build_tiny_pipeline(dtype=torch.bfloat16)
    for precision in ("full", "fp8"):
        offloading.store_blocks(pipeline.transformer, precision, CPU)
        needed = estimate(sizes, Placement(precision=precision), replace(JOB, height=48, width=64))
        for name in ("transformer", "vae", "text_encoder", "image_encoder"):
            network = getattr(pipeline, name)
            in_memory = sum(p.numel() * p.element_size() for p in network.parameters())
            assert needed.weights_mib[name] * 2**20 == pytest.approx(in_memory, rel=1e-6)
    assert json.loads(json.dumps(needed.to_json())).keys() == {
        "weights_mib",
        "phases_mib",
        "estimated_memory_mib",
        "main_memory_mib",
        "loading_mib",
        "disk_mib",
    }


def test_loading_takes_one_block_more_than_what_stays_in_main_memory() -> None:
    def loading_gib(precision: Any, offload: Any, *, on_card: bool = True) -> float:
        placed = Placement(precision=precision, offload=offload)
        needed = estimate(released_sizes(), placed, JOB, has_streams=on_card)
        return needed.loading_mib / GIB

    block_gib = 403_838_464 * 2 / 2**30
    assert loading_gib("full", "none", on_card=False) == pytest.approx(33.9, abs=0.1)
    # With what is left over of pinned pieces, and one that is not filled yet.
    assert loading_gib("full", "model") == pytest.approx(33.9 + 0.6 + 0.5, abs=0.1)
    for precision, gib in (("fp8", 18.5), ("torchao-int8", 18.5), ("nf4", 12.0)):
        assert loading_gib(precision, "model") == pytest.approx(gib + block_gib + 0.3, abs=0.6)
    # Blocks that go to the card or to files leave main memory: the text encoder takes most.
    text_gib = released_sizes().stored_mib("text_encoder", "full", JOB.dtype).values()
    for precision in ("full", "fp8"):
        assert loading_gib(precision, "none") == pytest.approx(sum(text_gib) / GIB)
        assert loading_gib(precision, "disk") == pytest.approx(sum(text_gib) / GIB)


def test_packed_blocks_leave_main_memory_as_others_do() -> None:
    """They were taken to be there whole, as they were before files of GGUF were mapped."""
    sizes = released_sizes()
    shapes = sizes.shapes["transformer"]
    packed = {
        key: math.prod(shape) * 34 // 32
        for key, shape in shapes.items()
        if key.startswith("blocks.") and len(shape) == 2
    }
    sizes = replace(sizes, packed=packed)
    text_mib = sum(sizes.stored_mib("text_encoder", "full", JOB.dtype).values())
    group, disk = (
        estimate(sizes, Placement(offload=offload), JOB, has_streams=False)
        for offload in ("group", "disk")
    )
    assert group.loading_mib > 1.5 * text_mib
    assert disk.loading_mib == text_mib


# --- which one -----------------------------------------------------------------------------------


def choose(free_gib: float, *, job: Job = JOB, main_gib: float = 128, **options: Any) -> Any:
    return choose_placement(
        PlacementOptions(**options),
        "cuda",
        released_sizes(),
        job,
        free_mib=free_gib * GIB,
        free_main_mib=main_gib * GIB,
    )


@pytest.mark.parametrize(
    ("free_gib", "preset"),
    [
        # Free memory of cards as they come, some less than their name says.
        (78.5, "80"),  # H100, A100
        (47.0, "80"),  # A6000: all fits at this size
        (44.0, "80"),  # L40S, which has error correction on
        (38.9, "48"),  # A100 40 GB, less the driver's share
        (31.0, "24"),  # RTX 5090
        (23.4, "24"),  # RTX 4090, 3090
        (15.5, "24"),  # RTX 4080: at this size all of its blocks fit one after the other
        (11.0, "12"),  # RTX 3060 with a screen: the text encoder alone would not fit
        (7.4, "8"),  # RTX 4060
        (6.4, "8"),  # the same with a screen
    ],
)
def test_the_largest_preset_that_fits_is_chosen(free_gib: float, preset: str) -> None:
    choice = choose(free_gib)
    assert choice.placement == PRESETS[preset]
    assert choice.fits
    assert choice.estimate.needed_mib <= free_gib * GIB


def test_every_preset_fits_the_card_of_its_name() -> None:
    for name, preset in PRESETS.items():
        needed = estimate(released_sizes(), preset, JOB).needed_mib
        assert needed < 0.97 * float(name) * GIB, name


def test_a_larger_picture_needs_a_lower_preset() -> None:
    assert choose(47.0, job=LARGE).placement.preset == "48"
    assert choose(39.3, job=LARGE).placement.preset == "24"
    assert choose(15.5, job=LARGE).placement.preset == "8"


def test_what_is_fixed_is_kept_and_what_fits_nowhere_is_told() -> None:
    choice = choose(9.7, precision="full")
    assert choice.placement == replace(PRESETS["12"], precision="full")
    assert choose(23.4, vram="80").placement == PRESETS["80"]
    assert not choose(23.4, vram="80").fits
    assert not choose(2.0).fits
    assert choose(2.0).placement == PRESETS["8"]


def test_main_memory_counts_too() -> None:
    # Half as much is enough with weights in 8 bits.
    assert choose(23.4, main_gib=30).placement == PRESETS["16"]
    # Less than that, and blocks wait on disk: the smaller ones, since all are read in every step.
    assert choose(23.4, main_gib=16).placement == replace(PRESETS["16"], offload="disk")
    assert choose(11, main_gib=16).placement == replace(PRESETS["12"], offload="disk")
    asked = choose(23.4, main_gib=16, offload="group").placement
    assert asked == replace(PRESETS["80"], offload="group")
    assert choose(78.5, main_gib=4).placement == PRESETS["80"]


def test_without_a_card_all_is_in_main_memory() -> None:
    choice = choose_placement(PlacementOptions(), "cpu", released_sizes(), JOB, free_main_mib=1.0)
    assert choice.placement == Placement()
    assert choice.fits


def test_weights_that_come_packed_stay_so() -> None:
    sizes = released_sizes()
    blocks = {key: shape for key, shape in sizes.shapes["transformer"].items() if "ffn" in key}
    packed = replace(sizes, packed=dict.fromkeys(blocks, 1000))
    options = PlacementOptions(precision="nf4")
    with pytest.raises(SettingsError, match="--precision nf4 does not fit the transformer's file"):
        choose_placement(options, "cuda", packed, JOB, free_mib=1.0)
    choice = choose_placement(PlacementOptions(), "cuda", packed, JOB, free_mib=24.0 * GIB)
    assert choice.placement.precision == "full"
    plain = choose_placement(PlacementOptions(precision="full"), "cuda", sizes, JOB, free_mib=1.0)
    assert (
        choice.estimate.weights_mib["transformer"] < 0.7 * plain.estimate.weights_mib["transformer"]
    )


def test_what_is_free_is_asked_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (24 * 2**30, 24 * 2**30))
    monkeypatch.setattr(placement, "free_main_memory", lambda: 2**40)
    card = torch.device("cuda")
    plan = plan_for_machine(PlacementOptions(), card, released_sizes(), JOB)
    assert plan.placement.preset == "24"
    assert plan.text_device == card
    assert plan.notes() == [
        "preset 24: precision full, offload group, VAE tiling off, text on device"
    ]
    plan = plan_for_machine(PlacementOptions(vram="80"), card, released_sizes(), JOB)
    assert plan.notes()[1].startswith("the card may be too small: 4")
    plan = plan_for_machine(PlacementOptions(vram="12"), card, released_sizes(), JOB)
    assert plan.text_device == CPU
    plan = plan_for_machine(PlacementOptions(), CPU, released_sizes(), JOB)
    assert plan.notes() == []


def test_processes_of_a_run_share_the_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which weights wait for the card of each."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (24 * 2**30, 24 * 2**30))
    monkeypatch.setattr(placement, "free_main_memory", lambda: 60 * 2**30)
    presets = [
        plan_for_machine(
            PlacementOptions(), torch.device("cuda"), released_sizes(), JOB, num_sharing=num_sharing
        ).placement.preset
        for num_sharing in (1, 2)
    ]
    assert presets == ["24", "16"]


def test_what_the_device_cannot_multiply_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offloading, "find_spec", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = PlacementOptions(precision="fp8-matmul")
    with pytest.raises(SettingsError, match=r"^--precision fp8-matmul needs a CUDA card, and the"):
        plan_for_machine(options, CPU, released_sizes(), JOB)


# --- going on with less --------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_pixels() -> None:
    begun = pixel_options(PRESETS["48"])
    assert begun == {"precision": "full", "vae_tiling": "off"}
    fixed = continued(PlacementOptions(), begun)
    assert fixed == PlacementOptions(precision="full", vae_tiling="off")
    # What is given wins, and is then refused for what it is: another request.
    assert continued(PlacementOptions(precision="fp8"), begun).precision == "fp8"
    assert continued(PlacementOptions(), {"precision": "no such"}) == PlacementOptions()
    assert continued(PlacementOptions(vram="16"), begun).candidates("cuda") == [
        replace(PRESETS["16"], precision="full")
    ]


def shortage(
    current: Placement, num_finished: int, device_type: str = "cuda", **options: Any
) -> str:
    return describe_shortage(
        PlacementOptions(**options),
        current,
        released_sizes(),
        JOB,
        device_type=device_type,
        num_finished=num_finished,
    )


def test_the_next_lower_preset_is_offered() -> None:
    text = shortage(PRESETS["80"], 0)
    assert text.startswith(
        "out of memory with preset 80: precision full, offload none, VAE tiling off, text on "
        "device, estimated at 4"
    )
    assert text.endswith(
        " MiB. Run the same command with --vram 48, or give a --size below 832x480, or fewer "
        "--frames-per-chunk."
    )
    assert "Run the same command with --vram 24, or" in shortage(PRESETS["48"], 0)
    assert "Run the same command with --vram 12, or" in shortage(PRESETS["16"], 0)
    assert "Run the same command with --vram 8, or" in shortage(PRESETS["12"], 0)
    assert shortage(PRESETS["8"], 0).endswith(
        "MiB. Give a --size below 832x480, or fewer --frames-per-chunk."
    )
    assert "with --vram 24 --offload group, or" in shortage(PRESETS["48"], 0, offload="model")
    lower = next_lower(PlacementOptions(), PRESETS["80"], released_sizes(), JOB)
    assert lower == PRESETS["48"]


def test_finished_chunks_go_on_with_the_same_pixels_if_that_helps() -> None:
    assert shortage(PRESETS["80"], 3).endswith(
        "MiB. 3 chunks are kept. Run the same command with --vram 48 to go on."
    )
    # From 16 on presets store in 8 bits, which a run that was begun otherwise does not take over.
    assert shortage(PRESETS["24"], 1).endswith(
        "MiB. 1 chunk is kept. Run the same command with --vram 12 to go on."
    )
    last = replace(PRESETS["8"], precision="full", tile_decoding=False)
    assert shortage(last, 2).endswith(
        "MiB. 2 chunks are kept, but what takes less makes other pixels. Run the same command with "
        "--vram 8, or give a --size below 832x480, or fewer --frames-per-chunk, with --no-resume "
        "to start again."
    )


def test_without_a_card_the_ways_out_are_others() -> None:
    assert shortage(Placement(), 2, "cpu").endswith(
        "2 chunks are kept. Run the same command with --offload disk to go on."
    )
    disk = Placement(offload="disk")
    assert "Run the same command with --precision fp8, or give a" in shortage(disk, 0, "cpu")
    fp8 = replace(disk, precision="fp8")
    assert shortage(fp8, 0, "cpu", precision="fp8").endswith(
        "MiB. Give a --size below 832x480, or fewer --frames-per-chunk."
    )
