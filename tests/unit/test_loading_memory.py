"""Main memory while a transformer is loaded: one block more than what stays, whatever is done."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file
from torch import nn

from everanimate_cli import main_memory, offloading, placement, stored_weights, weights
from everanimate_cli.checkpoint import build_empty
from everanimate_cli.errors import RunError
from everanimate_cli.hub import locate_model
from everanimate_cli.main_memory import PinnedMemory
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.offloading import Placing, Rota
from everanimate_cli.placement import Job, estimate, read_sizes
from everanimate_cli.placement_settings import Placement
from everanimate_cli.records import LoraSpec
from everanimate_cli.transformer import EverAnimateTransformer3DModel

CPU, CARD = torch.device("cpu"), torch.device("meta")  # has memory of its own, and none
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
NUM_LAYERS = 12


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with many blocks, so that one is a small part of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.TRANSFORMER_CONFIG, "num_layers", NUM_LAYERS)
        patch.setitem(tiny.TRANSFORMER_CONFIG, "inject_face_latents_blocks", 6)
        folder = tiny.write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for index in range(NUM_LAYERS):
        name = f"blocks.{index}.attn1.to_q"
        matrices[f"{name}.lora_A.weight"] = torch.randn(1, 48, generator=generator)
        matrices[f"{name}.lora_B.weight"] = torch.randn(48, 1, generator=generator)
    save_file(matrices, folder / "lora.safetensors")
    return folder


@pytest.fixture
def source(written: Path) -> ModelSource:
    return locate_model(str(written), lambda _event: None)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the package: each linear layer of what it is given gets weights of 8 bits."""

    def quantize_(block: nn.Module, _config: object) -> None:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                packed = layer.weight.data.to(torch.int8)
                layer.weight = nn.Parameter(packed, requires_grad=False)

    stand_in = types.SimpleNamespace(quantize_=quantize_, Int8WeightOnlyConfig=dict)
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", stand_in)
    monkeypatch.setattr(offloading, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("placed", "lora_mode", "on_card"),
    [
        (Placement(), None, False),
        (Placement(), None, True),
        (Placement(offload="model"), "fused", True),
        (Placement(offload="group"), None, True),
        (Placement(precision="fp8", offload="group"), "fused", True),
        (Placement(precision="fp8", offload="group"), "fused", False),
        (Placement(precision="fp8", offload="group"), "separate", False),
        (Placement(precision="fp8"), "fused", True),
        (Placement(precision="torchao-int8", offload="group"), "fused", False),
        (Placement(offload="disk"), "fused", False),
        (Placement(precision="fp8", offload="disk"), "separate", False),
    ],
)
@pytest.mark.usefixtures("torchao")
def test_the_estimate_is_what_loading_takes(
    source: ModelSource,
    placed: Placement,
    lora_mode: Any,
    on_card: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32 from a file in bfloat16, so that nothing stays mapped."""
    mapped = {key: value.bfloat16() for key, value in load_file(source.folder / WEIGHTS).items()}
    monkeypatch.setattr(stored_weights, "load_file", lambda _path: dict(mapped))
    sizes = read_sizes(source)
    job = Job(height=48, width=64, frames_per_chunk=9, num_identity_slots=4, dtype=torch.float32)
    # Large for a tiny network, so that no weight takes a piece of its own.
    for module in (main_memory, placement):
        monkeypatch.setattr(module, "PINNED_PIECE", 2**15)
    needed = estimate(sizes, placed, job, has_streams=on_card)
    others = needed.weights_mib["vae"] + needed.weights_mib["image_encoder"]
    # Positions, which are no weights, are nothing beside those of a real network.
    buffers = build_empty(source, "transformer").buffers()
    tables_mib = sum(each.numel() * each.element_size() for each in buffers) / 2**20
    expected_mib = needed.loading_mib - others + tables_mib
    whole_mib = sum(sizes.stored_mib("transformer", "full", torch.float32).values())
    loras = [(LoraSpec("lora", 1.0), source.folder / "lora.safetensors")] if lora_mode else []
    is_pinned = on_card and placed.offload != "none"
    device = CARD if on_card and not is_pinned else CPU
    placing = Placing(placed, device, torch.float32, folder=tmp_path)
    pinned = PinnedMemory(lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    if is_pinned:
        placing._pinned = pinned
    with LiveBytes(elsewhere=mapped.values()) as live:
        mode = lora_mode or "auto"
        network = weights._load_with_loras(source, loras, torch.float32, mode, placing)
        if placed.offload == "model":  # nothing has moved yet
            Rota({"transformer": network}, CPU, pinned=pinned).settle("transformer")
    # Pieces are a larger part of a tiny network.
    assert live.peak_mib == pytest.approx(expected_mib, rel=0.18 if is_pinned else 0.12)
    assert pinned.reason is None
    leaves = placed.offload == "disk" or (placed.offload == "none" and on_card)
    if leaves or placed.precision != "full":
        assert live.peak_mib < 0.6 * whole_mib


def test_blocks_leave_for_files_while_others_are_loaded(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    take = Placing.take

    def note(placing: Placing, name: str, part: nn.Module) -> None:
        take(placing, name, part)
        written.append(len(list(tmp_path.iterdir())))

    monkeypatch.setattr(Placing, "take", note)
    placing = Placing(Placement(offload="disk"), CPU, torch.float32, folder=tmp_path)
    network = weights._load_with_loras(source, [], torch.float32, "auto", placing)
    assert written == list(range(1, NUM_LAYERS + 3))  # with two face adapters
    assert isinstance(network, EverAnimateTransformer3DModel)


def test_the_disk_is_checked_before_a_weight_is_read(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(stored_weights, "load_file", None)
    with pytest.raises(RunError, match=r"^--offload disk needs 0\.0 GiB in .*Free some space"):
        weights.load_pipeline(
            source,
            [],
            CPU,
            torch.float32,
            without=["text_encoder"],
            placement=Placement(offload="disk"),
            offload_folder=tmp_path,
        )


def test_a_file_that_cannot_be_written_is_told(source: ModelSource, tmp_path: Path) -> None:
    placing = Placing(
        Placement(offload="disk"), CPU, torch.float32, folder=tmp_path / "run" / "offload-1"
    )
    with pytest.raises(RunError) as caught:
        weights._load_with_loras(source, [], torch.float32, "auto", placing)
    assert str(caught.value).startswith(f"--offload disk cannot write to {tmp_path / 'run'}: ")
    assert str(caught.value).endswith("Give --offload group, or an --output on another disk.")
