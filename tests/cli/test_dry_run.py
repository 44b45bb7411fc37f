"""`animate --dry-run` where files are missing: the plan all the same, and what is to be had."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import COMMIT, Hub, use_hub
from media import numbered_frames, write_media
from original import name_transformer
from safetensors.torch import save_file
from studio import DANCE_FPS, Animate, made_files
from tiny import INNER_DIM, TRANSFORMER_CONFIG

from everanimate_cli import acceleration
from everanimate_cli import hub as hub_module
from everanimate_cli.placement import RELEASED_CONFIGS, Job, estimate, released_sizes
from everanimate_cli.placement_settings import PRESETS, Placement
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET
from everanimate_cli.transformer import EverAnimateTransformer3DModel

(RELEASED_LORA,) = (spec.source for spec in HUB_PRESET.lora)
(FAST_LORA,) = (spec.source for spec in HUB_PRESET.fast_lora)
DEFAULT = ("--model", HUB_MODEL, "--device", "cpu", "--dry-run")
GIB = 2**30


@pytest.fixture
def no_network(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine that reaches no Hub; it does not exist."""
    cache = tmp_path_factory.mktemp("home") / "cache"
    use_hub("http://127.0.0.1:9", cache, monkeypatch)
    return cache


@pytest.fixture
def hub(
    hub_server: tuple[str, list[Hub]], no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> Hub:
    """A Hub that answers, and an empty cache."""
    address, current = hub_server
    current[:] = [Hub()]
    use_hub(address, no_network, monkeypatch)
    return current[0]


def plan_of(animate: Animate, *words: str, **inputs: Any) -> dict[str, Any]:
    done = animate(*words, "--json", "-q", **inputs)
    assert (done.code, done.err) == (0, "")
    plan: dict[str, Any] = json.loads(done.out)
    return plan


def released_estimate() -> dict[str, Any]:
    job = Job(
        height=480,
        width=832,
        frames_per_chunk=77,
        num_identity_slots=4,
        dtype=torch.float32,
    )
    needed = estimate(released_sizes(), Placement(), job, has_streams=False)
    return needed.to_json()


def test_the_released_base_is_not_here(animate: Animate, place: Path, no_network: Path) -> None:
    """Its sizes are known without it, and nothing is written or asked for long."""
    plan = plan_of(animate, *DEFAULT, "--minutes", "2")
    assert (plan["frames"], plan["chunks"], plan["seconds"]) == (3000, 42, 120.0)
    assert (plan["size"], plan["steps"], plan["model"]) == ("832x480", 20, HUB_MODEL)
    assert plan["weights_mib"]["transformer"] == pytest.approx(65898, abs=1)
    for name, value in released_estimate().items():
        assert plan[name] == value
    assert plan["downloads"] == [
        {"name": HUB_MODEL, "size_mb": 82240.0, "size_is": "estimated"},
        {"name": RELEASED_LORA, "size_mb": 306.7, "size_is": "estimated"},
    ]
    assert plan["download_command"] == "everanimate models pull"
    assert plan["loras"] == [{"source": RELEASED_LORA, "scale": 1.0, "mode": "fused", "rank": 32}]
    assert made_files(place) == []
    assert not no_network.exists()


def write_header_only(path: Path, network: EverAnimateTransformer3DModel, dtype: str) -> None:
    """A safetensors file in the authors' names that takes no block of the disk."""
    header: dict[str, Any] = {}
    end = 0
    for key, value in name_transformer(network).items():
        start, end = end, end + value.numel() * (1 if dtype.startswith("F8") else 2)
        entry = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
        header[key] = entry
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_gguf_header_only(path: Path, network: EverAnimateTransformer3DModel) -> None:
    """Likewise, with the matrices of the blocks in 8 bits."""
    writer = gguf.GGUFWriter(path, "wan")
    kinds = gguf.GGMLQuantizationType
    for key, value in network.state_dict().items():
        is_packed = value.ndim == 2 and value.shape[1] % 32 == 0 and key.startswith("blocks.")
        kind = kinds.Q8_0 if is_packed else kinds.F32
        num_bytes = value.numel() * 34 // 32 if is_packed else value.numel() * 4
        shape = value.shape
        if is_packed:  # the writer wants to know the bytes of a row
            shape = torch.Size([shape[0], shape[1] * 34 // 32])
        kept = np.dtype(np.uint8 if is_packed else np.float32)
        writer.add_tensor_info(key, shape, kept, num_bytes, raw_dtype=kind)
    for write in ("header", "kv_data", "ti_data"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(30 * GIB)


@pytest.mark.usefixtures("no_network")
def test_a_file_in_place_of_a_transformer_whose_base_is_not_here(animate: Animate) -> None:
    """It was refused, although its header and what is known of the base make a plan."""
    with torch.device("meta"):
        network = EverAnimateTransformer3DModel.from_config(RELEASED_CONFIGS["transformer"])
    write_header_only(Path("mine.safetensors"), network, "BF16")
    write_header_only(Path("eight.safetensors"), network, "F8_E4M3")
    write_gguf_header_only(Path("mine.gguf"), network)
    words = (*DEFAULT, "--dtype", "bfloat16", "--transformer")
    plans = {name: plan_of(animate, *words, name) for name in ("mine.safetensors", "mine.gguf")}
    plan, packed = plans.values()
    assert plan["transformer"] == "mine.safetensors"
    assert plan["weights_mib"]["transformer"] == pytest.approx(33005, abs=1)
    matrices = [each for each in network.blocks.parameters() if each.ndim == 2]
    saved = sum(each.numel() for each in matrices) * (2 - 34 / 32)
    lora = hub_module.known_lora(RELEASED_LORA)
    assert lora is not None
    less = plan["weights_mib"]["transformer"] - packed["weights_mib"]["transformer"]
    assert less * 2**20 == pytest.approx(saved - lora.num_bytes, rel=1e-4)
    for each in plans.values():
        assert each["downloads"] == [
            {"name": HUB_MODEL, "size_mb": 13140.0, "size_is": "estimated"},
            {"name": RELEASED_LORA, "size_mb": 306.7, "size_is": "estimated"},
        ]
        assert each["download_command"] == "everanimate models pull --no-transformer"
    modes = [each["loras"][0]["mode"] for each in plans.values()]
    assert modes == ["fused", "separate"]
    assert plan_of(animate, *words, "eight.safetensors")["loras"][0]["mode"] == "separate"


@pytest.mark.usefixtures("no_network")
def test_a_file_that_does_not_fit_the_base_that_is_not_here(
    animate: Animate, tiny_model: Path
) -> None:
    file = tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"
    refused = animate(*DEFAULT, "--transformer", str(file))
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(
        f"error: --transformer {file}: the weights in transformer are not those of its config.json:"
    )
    assert len(refused.err.splitlines()) == 1
    # Of another model nothing is known.
    refused = animate("--model", "owner/model", "--dry-run", "--transformer", str(file))
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: --model owner/model is not in the cache")


@pytest.mark.usefixtures("no_network")
def test_attention_is_told_the_size_of_a_chunk(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For kernels that keep all scores, of which this machine has none."""
    told: list[Any] = []
    monkeypatch.setattr(acceleration, "check_scores", lambda *_, **sizes: told.append(sizes))
    plan_of(animate, *DEFAULT)
    plan_of(animate, "--model", HUB_MODEL, "--dry-run", "--vram", "24")  # nothing is known of it
    assert told == [{"num_heads": 40, "num_tokens": 24 * 30 * 52}]


@pytest.mark.usefixtures("no_network")
def test_the_plan_for_a_card_that_is_not_here(animate: Animate) -> None:
    words = ("--model", HUB_MODEL, "--dry-run", "--minutes", "2")
    done = animate(*words, "--vram", "24")
    assert done.code == 0
    assert done.err.startswith("no CUDA card is here: planned for one of 24 GB\n")
    plans = {name: plan_of(animate, *words, "--vram", name) for name in PRESETS}
    needs = [plans[name]["estimated_memory_mib"] for name in PRESETS]
    assert needs == sorted(needs, reverse=True)
    for name, plan in plans.items():
        assert (plan["device"], plan["dtype"]) == ("cuda", "bfloat16")
        assert plan["placement"]["vram"] == name
        assert plan["estimated_memory_mib"] < 1024 * int(name)
    with_kernels = plan_of(animate, *words, "--vram", "24", "--attention", "sdpa-cudnn")
    assert with_kernels["speed"]["attention"] == "sdpa-cudnn"
    # A run is another matter.
    refused = animate("--model", "toy", "--vram", "24")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "error: --vram 24 has no effect on cpu, which has no memory of its own. Leave it out.\n"
    )


def test_the_plan_for_a_reader(
    animate: Animate, no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50 * 10**9})())
    done = animate(*DEFAULT)
    assert done.code == 0
    assert done.err == (
        "the downloads take 82.55 GB, but the disk of the cache has 50.00 GB free: "
        "set HF_HOME to a folder on a larger one\n"
    )
    lines = done.out.splitlines()
    assert (
        f"downloads: name {HUB_MODEL}, size 82240.0 MB, size is estimated; "
        f"name {RELEASED_LORA}, size 306.7 MB, size is estimated"
    ) in lines
    assert "download command: everanimate models pull" in lines
    assert "size: 832x480" in lines
    assert any(line.startswith("weights: transformer 65898.") for line in lines)
    assert not no_network.exists()


def test_the_hub_tells_sizes_where_it_answers(
    animate: Animate,
    hub: Hub,
    tiny_model: Path,
    no_network: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(HUB_MODEL, tiny_model)
    monkeypatch.setitem(hub_module.HUB_REVISIONS, HUB_MODEL, COMMIT[:7])
    size = sum(map(len, hub.repositories[HUB_MODEL].values()))
    hub.repositories["epfl-vita/everanimate"] = {RELEASED_LORA.split("/", 2)[2]: bytes(700_000)}
    plan = plan_of(animate, *DEFAULT)
    assert plan["downloads"] == [
        {"name": HUB_MODEL, "size_mb": round(size / 1e6, 1), "size_is": "stated by the Hub"},
        {"name": RELEASED_LORA, "size_mb": 0.7, "size_is": "stated by the Hub"},
    ]
    assert not no_network.exists()
    # A Hub that is down is asked once, not for each file.
    hub.requests.clear()
    hub.refused = (503, {})
    plan = plan_of(animate, *DEFAULT)
    assert [each["size_is"] for each in plan["downloads"]] == ["estimated", "estimated"]
    assert hub.num_requests == 1


def test_what_the_hub_does_not_have_is_refused(animate: Animate, hub: Hub) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": b"weights"}
    done = animate("--lora", "owner/lora/b.safetensors", "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: --lora owner/lora/b.safetensors has no b.safetensors. "
        "Known: owner/lora/a.safetensors.\n"
    )


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("words", "downloads", "command"),
    [
        ([], [], None),
        (["--lora", "owner/lora/a.safetensors"], [("owner/lora/a.safetensors", None)], "x"),
        (["--lora", RELEASED_LORA], [(RELEASED_LORA, 306.7)], ""),
        (["--lora", FAST_LORA], [(FAST_LORA, 718.3)], " --fast"),
    ],
    ids=["none", "unknown", "default", "fast"],
)
def test_loras_that_are_not_here(
    animate: Animate, words: list[str], downloads: list[tuple[str, float | None]], command: str
) -> None:
    """On a model that is."""
    plan = plan_of(animate, *words, "--dry-run")
    assert [(each["name"], each["size_mb"]) for each in plan["downloads"]] == downloads
    assert "lora" not in plan
    if not downloads:
        assert "download_command" not in plan
    elif command == "x":
        assert plan["downloads"][0]["size_is"] == "unknown"
        assert plan["download_command"] == f"everanimate models pull {downloads[0][0]}"
    else:
        assert plan["download_command"] == f"everanimate models pull{command}"


@pytest.mark.usefixtures("no_network")
def test_pose_models_of_a_raw_video(
    animate: Animate, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERANIMATE_CACHE", str(tmp_path / "pose-cache"))
    write_media(place / "film.mp4", numbered_frames(10), rate=DANCE_FPS)
    inputs = ("anna.png", "film.mp4")

    def names(*words: str) -> list[str]:
        plan = plan_of(animate, "--dry-run", *words, inputs=inputs)
        return [each["name"] for each in plan["downloads"]]

    assert names("--pose-model", "toy") == []
    assert names("--pose-model", "dwpose") == ["dwpose", "yolox-l"]
    assert names("--pose-model", "dwpose", "--detector", "yolov10m") == ["dwpose", "yolov10m"]
    plan = plan_of(animate, *DEFAULT, inputs=inputs)
    assert [each["name"] for each in plan["downloads"]] == [*hub_module.DEFAULT_NAMES]
    assert plan["download_command"] == "everanimate models pull"
    # Poses that are there need no model.
    (place / "film_pose").mkdir()
    (place / "film_pose" / "extract.json").write_text("{}")
    assert names("--pose-model", "dwpose") == []


def lora_of(rank: int, names: list[str], sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {
        f"{name}.{side}.weight": torch.zeros(
            (rank, sizes[name][1]) if side == "lora_A" else (sizes[name][0], rank),
            dtype=torch.bfloat16,
        )
        for name in names
        for side in ("lora_A", "lora_B")
    }


@pytest.mark.usefixtures("no_network")
def test_loras_beside_the_weights_take_memory(animate: Animate, place: Path) -> None:
    """In the estimate, to the byte; in the weights they take none."""
    ffn = TRANSFORMER_CONFIG["ffn_dim"]
    sizes = {
        "blocks.0.attn1.to_q": (INNER_DIM, INNER_DIM),
        "blocks.3.ffn.net.0.proj": (ffn, INNER_DIM),
        "proj_out": (4 * 6, INNER_DIM),  # outside the blocks: added to the weight in either mode
    }
    save_file(lora_of(200, list(sizes), sizes), place / "a.safetensors")
    save_file(lora_of(100, list(sizes)[1:], sizes), place / "b.safetensors")
    both = ("--lora", "a.safetensors", "--lora", "b.safetensors=0.5", "--dry-run")
    plain, fused, separate = (
        plan_of(animate, *words)
        for words in (
            ("--lora", "none", "--dry-run"),
            (*both, "--lora-mode", "fused"),
            (*both, "--lora-mode", "separate"),
        )
    )
    num_bytes = 4 * (200 * 2 * INNER_DIM + 300 * (ffn + INNER_DIM))
    assert fused["weights_mib"] == plain["weights_mib"]
    more = separate["weights_mib"]["transformer"] - plain["weights_mib"]["transformer"]
    assert more == pytest.approx(num_bytes / 2**20, abs=0.1)
    assert more > 0.3
    in_phase = separate["phases_mib"]["denoise"] - plain["phases_mib"]["denoise"]
    assert in_phase == pytest.approx(more, abs=1)


@pytest.mark.usefixtures("no_network")
def test_missing_loras_beside_the_weights_are_counted_by_rank(animate: Animate) -> None:
    """0.9 GiB of matrices for `--fast`, in bfloat16."""
    words = (*DEFAULT, "--dtype", "bfloat16", "--fast")
    fused = plan_of(animate, *words)
    separate = plan_of(animate, *words, "--lora-mode", "separate")
    more = separate["weights_mib"]["transformer"] - fused["weights_mib"]["transformer"]
    known = [hub_module.known_lora(source) for source in (RELEASED_LORA, FAST_LORA)]
    assert more * 2**20 == pytest.approx(sum(each.num_bytes for each in known if each), rel=0.001)
    assert 0.9 * GIB < more * 2**20 < GIB
    assert separate["download_command"] == "everanimate models pull --fast"
    assert [each["rank"] for each in separate["loras"]] == [32, 64]


def test_known_sizes_are_those_of_the_networks() -> None:
    """As the conversion stores them: text and image encoder in 16 bits, the others in 32."""
    stored = {
        name: sum(math.prod(shape) for shape in shapes.values())
        * (4 if name in ("transformer", "vae") else 2)
        for name, shapes in released_sizes().shapes.items()
    }
    known = hub_module._HUB_MODEL_BYTES
    assert set(known) == set(stored)
    for name, num_bytes in stored.items():
        assert known[name] == pytest.approx(num_bytes, rel=0.002)
    without = hub_module.model_asset(HUB_MODEL, Path("mine.gguf"))
    assert without.size == "about 13 GB"
    assert without.command == "everanimate models pull --no-transformer"
