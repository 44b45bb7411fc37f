"""Finding, checking and loading a checkpoint: what loads is exact, what does not fit is named."""

import json
import re
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same_weights, ignore, message_of, weights_mib
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel
from live_bytes import LiveBytes as PeakBytes
from safetensors.torch import load_file, save_file
from tiny import (
    TINY_DEFAULTS,
    TRANSFORMER_CONFIG,
    build_networks,
    build_tiny_pipeline,
    write_tiny_checkpoint,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everanimate_cli.checkpoint import check_checkpoint, checkpoint_hash
from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.estimates import Geometry, lora_mib, read_geometry
from everanimate_cli.hub import locate_lora, locate_model
from everanimate_cli.lora_adapter import attach_lora, lora_parameters
from everanimate_cli.model_folder import NETWORKS, ModelSource
from everanimate_cli.offloading import store_blocks
from everanimate_cli.placement_settings import Placement
from everanimate_cli.records import LoraSpec
from everanimate_cli.settings import HUB_PRESET
from everanimate_cli.transformer import EverAnimateTransformer3DModel
from everanimate_cli.weights import (
    choose_device,
    choose_dtype,
    load_image_processor,
    load_pipeline,
    load_shared_transformer,
    load_transformer,
)

CPU = torch.device("cpu")
TO_Q = "blocks.0.attn1.to_q.weight"
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
ADVICE = "Give a complete Wan2.2-Animate checkpoint."
LAYOUT = "Give a complete checkpoint in diffusers layout."


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test may change."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, `tiny` in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def source(folder: Path) -> ModelSource:
    assert folder.is_dir()
    return ModelSource(folder=Path("tiny"), defaults=TINY_DEFAULTS, name="tiny")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rename_tensors(path: Path, pattern: str, replacement: str) -> None:
    renamed = {re.sub(pattern, replacement, key): value for key, value in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})


def split_in_two(path: Path) -> None:
    """Turn a weight file into two shards with an index, as diffusers saves large networks."""
    tensors = sorted(load_file(path).items())
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        name = f"{path.stem}-0000{number}-of-00002.safetensors"
        save_file(dict(part), path.with_name(name), {"format": "pt"})
        weight_map |= {key: name for key, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()


# --- loading -------------------------------------------------------------------------------------


def test_a_folder_is_found_with_its_own_defaults(folder: Path) -> None:
    source = locate_model("tiny", ignore)
    assert source == ModelSource(
        folder=Path("tiny"), defaults=TINY_DEFAULTS, name="tiny", revision=None
    )
    (folder / "everanimate.json").unlink()
    assert locate_model("./tiny", ignore).defaults == HUB_PRESET


def test_loading_gives_exactly_the_saved_networks(
    source: ModelSource, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(source, [], CPU, torch.float32)
    assert capfd.readouterr() == ("", "")  # the libraries' bars and remarks stay off the console
    expected = build_tiny_pipeline()
    assert type(pipeline.transformer) is EverAnimateTransformer3DModel
    for name in NETWORKS:
        network = getattr(pipeline, name)
        assert_same_weights(network, getattr(expected, name))
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    prompt = TINY_DEFAULTS.prompt
    assert torch.equal(pipeline.encode_prompt(prompt), expected.encode_prompt(prompt))
    assert pipeline.device == CPU
    assert pipeline.image_processor is None


def test_in_bfloat16_the_vae_and_some_layers_stay_float32(source: ModelSource) -> None:
    pipeline = load_pipeline(source, [], CPU, torch.bfloat16)
    dtypes = {name: {p.dtype for p in getattr(pipeline, name).parameters()} for name in NETWORKS}
    assert dtypes == {
        "transformer": {torch.bfloat16, torch.float32},
        "vae": {torch.float32},
        "text_encoder": {torch.bfloat16},
        "image_encoder": {torch.bfloat16},
    }
    kept = {n for n, p in pipeline.transformer.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.scale_shift_table" in kept
    assert TO_Q not in kept
    # The estimate of --dry-run, made from the headers, is what was loaded.
    in_memory = {
        name: sum(p.numel() * p.element_size() for p in getattr(pipeline, name).parameters())
        for name in NETWORKS
    }
    expected = weights_mib(source, torch.bfloat16)
    assert in_memory == {name: mib * 2**20 for name, mib in expected.items()}


def test_counting_needs_no_weights(source: ModelSource) -> None:
    networks = build_networks()
    expected = {name: sum(p.numel() for p in networks[name].parameters()) for name in NETWORKS}
    assert weights_mib(source, torch.float32) == {
        name: count * 4 / 2**20 for name, count in expected.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda: split_in_two(Path("tiny", TRANSFORMER_FILE)), id="shards"),
        pytest.param(lambda: split_in_two(Path("tiny/text_encoder/model.safetensors")), id="t5"),
        pytest.param(
            lambda: edit_json(
                Path("tiny/transformer/config.json"), _class_name="EverAnimateTransformer3DModel"
            ),
            id="our own class",
        ),
        pytest.param(
            lambda: edit_tensors(
                Path("tiny", TRANSFORMER_FILE),
                lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": torch.zeros(3)}),
            ),
            id="norm_added_q",
        ),
        pytest.param(
            lambda: rename_tensors(
                Path("tiny/image_encoder/model.safetensors"), "^", "vision_model."
            ),
            id="CLIP as transformers 4 writes it",
        ),
        pytest.param(
            lambda: edit_tensors(
                Path("tiny/image_encoder/model.safetensors"),
                lambda t: t.update({"visual_projection.weight": torch.zeros(4, 28)}),
            ),
            id="CLIP with projection",
        ),
        pytest.param(
            lambda: rename_tensors(
                Path("tiny/text_encoder/model.safetensors"),
                "^shared",
                "encoder.embed_tokens",
            ),
            id="T5's other name",
        ),
    ],
)
def test_other_spellings_load_alike(source: ModelSource, change: Callable[[], object]) -> None:
    change()
    pipeline = load_pipeline(source, [], CPU, torch.float32)
    expected = build_tiny_pipeline()
    for name in NETWORKS:
        assert_same_weights(getattr(pipeline, name), getattr(expected, name))


def test_the_image_processor_is_stocks_and_needs_no_torchvision(source: ModelSource) -> None:
    pipeline = load_pipeline(source, [], CPU, torch.float32, with_image_processor=True)
    picture_u8 = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
    tokens = pipeline.encode_clip_as_stock(picture_u8)
    torch.testing.assert_close(
        tokens, build_tiny_pipeline().encode_clip_as_stock(picture_u8), rtol=0, atol=0
    )
    assert "Pil" in type(pipeline.image_processor).__name__
    Path("tiny/image_processor/preprocessor_config.json").write_text("{")
    assert message_of(WeightsError, lambda: load_image_processor(source)) == (
        f"--model tiny: image_processor cannot be loaded. {LAYOUT}"
    )


# --- what does not fit ---------------------------------------------------------------------------


def drop(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def drop_all(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


def make_pickle() -> None:
    Path("tiny", VAE_FILE).rename("tiny/vae/diffusion_pytorch_model.bin")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "missing weights": (
        lambda: edit_tensors(
            Path("tiny", TRANSFORMER_FILE),
            drop(*(f"blocks.{i}.attn1.to_q.weight" for i in range(4))),
        ),
        "--model tiny: the weights in transformer are not those of its config.json: 4 missing "
        "(first: blocks.0.attn1.to_q.weight, blocks.1.attn1.to_q.weight, "
        f"blocks.2.attn1.to_q.weight). {ADVICE}",
    ),
    "unexpected weights": (
        lambda: edit_tensors(
            Path("tiny", VAE_FILE), lambda t: t.update({"encoder.extra": torch.zeros(2)})
        ),
        "--model tiny: the weights in vae are not those of its config.json: 1 unexpected "
        f"(encoder.extra). {ADVICE}",
    ),
    "other shape": (
        lambda: edit_tensors(
            Path("tiny", TRANSFORMER_FILE), lambda t: t.update({TO_Q: torch.zeros(48, 47)})
        ),
        "--model tiny: the weights in transformer are not those of its config.json: 1 of another "
        f"shape (blocks.0.attn1.to_q.weight is [48, 47], not [48, 48]). {ADVICE}",
    ),
    "two problems at once": (
        lambda: rename_tensors(
            Path("tiny/image_encoder/model.safetensors"), "^pre_layrnorm.", "pre_layernorm."
        ),
        "--model tiny: the weights in image_encoder are not those of its config.json: 2 missing "
        "(pre_layrnorm.bias, pre_layrnorm.weight), 2 unexpected "
        f"(pre_layernorm.bias, pre_layernorm.weight). {ADVICE}",
    ),
    "no embedding": (
        lambda: edit_tensors(
            Path("tiny/text_encoder/model.safetensors"),
            lambda t: [t.pop(key) for key in list(t) if "shared" in key or "embed_tokens" in key],
        ),
        "--model tiny: the weights in text_encoder are not those of its config.json: 1 missing "
        f"(shared.weight). {ADVICE}",
    ),
    "no folder": (
        lambda: shutil.rmtree("tiny/vae"),
        f"--model tiny has no folder vae. {LAYOUT}",
    ),
    "no config": (
        lambda: Path("tiny/vae/config.json").unlink(),
        "tiny/vae/config.json cannot be read: No such file or directory.",
    ),
    "config is no JSON": (
        lambda: Path("tiny/vae/config.json").write_text("{"),
        "tiny/vae/config.json cannot be read: it holds no JSON object.",
    ),
    "config is a list": (
        lambda: Path("tiny/vae/config.json").write_text("[]"),
        "tiny/vae/config.json cannot be read: it holds no JSON object.",
    ),
    "other network": (
        lambda: edit_json(
            Path("tiny/transformer/config.json"), _class_name="WanTransformer3DModel"
        ),
        "--model tiny: transformer/config.json describes WanTransformer3DModel, not "
        "WanAnimateTransformer3DModel. Give a Wan2.2-Animate checkpoint.",
    ),
    "other text encoder": (
        lambda: edit_json(Path("tiny/text_encoder/config.json"), architectures=["T5EncoderModel"]),
        "--model tiny: text_encoder/config.json describes T5EncoderModel, not UMT5EncoderModel. "
        "Give a Wan2.2-Animate checkpoint.",
    ),
    "no class": (
        lambda: edit_json(Path("tiny/image_encoder/config.json"), architectures=None),
        "--model tiny: image_encoder/config.json describes no network, not CLIPVisionModel. "
        "Give a Wan2.2-Animate checkpoint.",
    ),
    "pickles only": (
        make_pickle,
        "--model tiny: vae holds pickled weights only (diffusion_pytorch_model.bin), which can "
        "run code when they are opened. Convert them to safetensors.",
    ),
    "no weights": (
        lambda: Path("tiny", VAE_FILE).unlink(),
        f"--model tiny has no {VAE_FILE}. {LAYOUT}",
    ),
    "shard missing": (
        lambda: (
            split_in_two(Path("tiny", VAE_FILE)),
            Path("tiny/vae/diffusion_pytorch_model-00002-of-00002.safetensors").unlink(),
        ),
        "--model tiny: vae lacks 1 of its 2 weight files "
        "(diffusion_pytorch_model-00002-of-00002.safetensors). Download them.",
    ),
    "index is none": (
        lambda: Path(f"tiny/{VAE_FILE}.index.json").write_text("[]"),
        f"tiny/{VAE_FILE}.index.json cannot be read: it is no index of weights.",
    ),
    "not safetensors": (
        lambda: Path("tiny", VAE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        f"tiny/{VAE_FILE} is not a safetensors file. Give one.",
    ),
    "no tokenizer": (
        lambda: Path("tiny/tokenizer/tokenizer.json").unlink(),
        f"--model tiny has no tokenizer/tokenizer.json. {LAYOUT}",
    ),
    "damaged tokenizer": (
        lambda: Path("tiny/tokenizer/tokenizer.json").write_text("{"),
        f"--model tiny: tokenizer cannot be loaded. {LAYOUT}",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_come_before_any_weight_is_read(
    source: ModelSource, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("weights are read")

    for network_class in (EverAnimateTransformer3DModel, AutoencoderKLWan):
        monkeypatch.setattr(network_class, "from_pretrained", fail)
    damage, message = REFUSALS[name]
    damage()
    call = partial(load_pipeline, source, [], CPU, torch.float32)
    assert message_of(WeightsError, call) == message


def test_a_config_that_describes_nothing_is_refused(source: ModelSource) -> None:
    edit_json(Path("tiny/image_encoder/config.json"), num_attention_heads=5)
    message = message_of(WeightsError, lambda: check_checkpoint(source))
    start = "--model tiny: no network can be built from image_encoder/config.json: "
    assert message.startswith(start)
    assert "28" in message  # the library's own words say what is wrong


def test_a_cut_file_is_refused(source: ModelSource) -> None:
    path = Path("tiny", TRANSFORMER_FILE)
    size = path.stat().st_size
    cut_short(path)
    assert message_of(WeightsError, lambda: check_checkpoint(source)) == (
        f"tiny/{TRANSFORMER_FILE} has {size - 5} bytes where its header announces {size}. "
        "Download it again."
    )


def test_networks_of_two_models_are_refused(source: ModelSource) -> None:
    AutoencoderKLWan(
        base_dim=4, z_dim=5, num_res_blocks=1, latents_mean=[0.0] * 5, latents_std=[1.0] * 5
    ).save_pretrained("tiny/vae")
    assert message_of(WeightsError, lambda: check_checkpoint(source)) == (
        "--model tiny: vae has z_dim 5, but transformer has latent_channels 6. "
        "Give networks of one model."
    )


def test_what_the_library_does_not_recognise_is_refused(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers may be right and a loader still leave weights at random, without an error."""
    load = WanAnimateTransformer3DModel.from_pretrained.__func__

    def forget(cls: type, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, list[str]]]:
        network, report = load(cls, *args, **kwargs)
        return network, report | {"missing_keys": [TO_Q]}

    monkeypatch.setattr(EverAnimateTransformer3DModel, "from_pretrained", classmethod(forget))
    call = partial(load_transformer, source, CPU, torch.float32)
    assert message_of(WeightsError, call) == (
        "--model tiny: the weights in transformer are not those of its config.json: 1 missing "
        f"({TO_Q}). {ADVICE}"
    )


# --- LoRA ----------------------------------------------------------------------------------------


def write_lora(path: Path, **matrices: Tensor) -> Path:
    save_file({key.replace("__", "."): value for key, value in matrices.items()}, path)
    return path


def test_loras_are_added_one_after_the_other(source: ModelSource) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, down2, up2 = (
        torch.randn(shape, generator=generator) for shape in ((2, 48), (48, 2), (3, 48), (48, 3))
    )
    first = write_lora(
        Path("a.safetensors"),
        blocks__0__self_attn__q__lora_A__default__weight=down,
        blocks__0__self_attn__q__lora_B__default__weight=up,
    )
    second = write_lora(
        Path("b.safetensors"),
        diffusion_model__blocks__0__self_attn__q__lora_A__weight=down2,
        diffusion_model__blocks__0__self_attn__q__lora_B__weight=up2,
    )
    loras = [(LoraSpec("a.safetensors", 0.5), first), (LoraSpec("b.safetensors", -2.0), second)]
    fused = load_pipeline(source, loras, CPU, torch.float32).transformer.state_dict()
    plain = load_pipeline(source, [], CPU, torch.float32).transformer.state_dict()
    torch.testing.assert_close(fused.pop(TO_Q), plain.pop(TO_Q) + 0.5 * up @ down - 2 * up2 @ down2)
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_lora", [False, True])
def test_weights_in_8_bits_are_never_all_in_memory_before(
    source: ModelSource, dtype: torch.dtype, with_lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    lora = write_lora(
        Path("a.safetensors"),
        blocks__1__self_attn__q__lora_A__default__weight=torch.randn(2, 48, generator=generator),
        blocks__1__self_attn__q__lora_B__default__weight=torch.randn(48, 2, generator=generator),
        diffusion_model__blocks__0__cross_attn__k__diff_b=torch.randn(48, generator=generator),
        diffusion_model__patch_embedding__diff_b=torch.randn(48, generator=generator),
    )
    loras = [(LoraSpec("a.safetensors", 0.5), lora)] if with_lora else []

    def load(precision: Any) -> EverAnimateTransformer3DModel:
        placement = Placement(precision=precision)
        return load_pipeline(source, loras, CPU, dtype, placement=placement).transformer

    def count_bytes(network: nn.Module) -> int:
        tensors = (*network.parameters(), *network.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    expected = load("full")
    num_before = count_bytes(expected)
    store_blocks(expected, "fp8", CPU)
    largest = max(parameter.numel() for parameter in expected.parameters())
    allowed = count_bytes(expected) + 4 * largest  # in float32, on its way
    assert allowed < 0.9 * num_before
    mapped = load_file(source.folder / TRANSFORMER_FILE)  # the system may drop it from memory
    monkeypatch.setattr("everanimate_cli.stored_weights.load_file", lambda _path: dict(mapped))
    with PeakBytes(elsewhere=mapped.values()) as alive:
        network = load_shared_transformer(
            source, loras, CPU, dtype, placement=Placement(precision="fp8")
        )
    assert_same_weights(network, expected)
    assert network.dtype == dtype
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert alive.peak < allowed


def test_a_lora_that_does_not_fit_is_refused_before_any_weight_is_read(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EverAnimateTransformer3DModel, "from_pretrained", None)
    path = write_lora(
        Path("a.safetensors"),
        blocks__9__self_attn__q__lora_A__default__weight=torch.zeros(2, 48),
        blocks__9__self_attn__q__lora_B__default__weight=torch.zeros(48, 2),
    )
    loras = [(LoraSpec("a.safetensors"), path)]
    call = partial(load_pipeline, source, loras, CPU, torch.float32)
    assert message_of(WeightsError, call) == (
        "LoRA a.safetensors: 2 of its 2 keys have no place in the network "
        "(blocks.9.self_attn.q.lora_A.default.weight, "
        "blocks.9.self_attn.q.lora_B.default.weight). Give a LoRA made for Wan2.2-Animate."
    )
    write_lora(
        path,
        blocks__0__self_attn__q__lora_A__default__weight=torch.zeros(2, 40),
        blocks__0__self_attn__q__lora_B__default__weight=torch.zeros(48, 2),
    )
    assert message_of(WeightsError, call) == (
        "LoRA a.safetensors: 1 of its 1 layers have another shape than the network "
        "(blocks.0.self_attn.q.lora_B.default.weight for [48, 48]). "
        "Give a LoRA made for this network's size."
    )


def test_a_local_lora_is_found(folder: Path) -> None:
    path = write_lora(folder.parent / "a.safetensors", a=torch.zeros(1))
    assert locate_lora(LoraSpec(str(path), 0.5)) == path
    assert message_of(InputError, lambda: locate_lora(LoraSpec("b.safetensors"))) == (
        "--lora b.safetensors does not exist. "
        "Give a .safetensors file or a Hub id, with its strength as FILE=SCALE."
    )


# --- device, dtype, sizes, fingerprint -----------------------------------------------------------


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "chosen"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_is_chosen(
    has_cuda: bool, has_mps: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == CPU
    if not has_cuda:
        known = "mps, cpu" if has_mps else "cpu"
        assert message_of(SettingsError, lambda: choose_device("cuda")) == (
            f"--device cuda is not available: torch {torch.__version__} finds {known}. "
            "Give one of these or auto, or install a torch build for cuda."
        )


@pytest.mark.parametrize(
    ("dtype", "device", "chosen"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "mps", torch.float32),
        ("auto", "cpu", torch.float32),
        ("float16", "cuda", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_dtype(dtype: Any, device: str, chosen: torch.dtype) -> None:
    assert choose_dtype(dtype, torch.device(device)) == chosen


def test_geometry(source: ModelSource) -> None:
    assert read_geometry(source) == Geometry(
        size_multiple=16,
        face_size=16,
        inner_dim=48,
        ffn_dim=96,
        num_layers=4,
        num_heads=2,
        decoder_channels=4,
    )


class LiveBytes(TorchDispatchMode):
    """Peak of all tensors that are alive at once, but for a network's own weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        own = [*network.parameters(), *network.buffers()]
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_the_memory_estimate_is_near_what_is_counted(source: ModelSource) -> None:
    """On fake tensors at the released size: no memory, and the same code as for real."""
    height, width, frames_per_chunk, num_slots = 480, 832, 77, 20
    geometry = read_geometry(source)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        networks = build_networks()
        transformer, vae = networks["transformer"], networks["vae"]
        config = transformer.config
        cells = (height // 8, width // 8)
        with LiveBytes(transformer) as step:
            transformer(
                torch.empty(1, config.in_channels, 4 + num_slots, *cells),
                torch.tensor([500.0]),
                torch.empty(1, 512, config.text_dim),
                torch.empty(1, 17, config.image_dim),
                torch.empty(1, 48, num_slots, height // 16, width // 16),
                torch.empty(1, num_slots, 5, 48),
            )
        with LiveBytes(vae) as decoding:
            vae.decode(torch.empty(1, config.latent_channels, num_slots, *cells))
    step_mib = geometry.step_mib(height, width, frames_per_chunk, 4, torch.float32)
    assert step_mib == pytest.approx(step.peak / 2**20, rel=0.25)
    decode_mib = geometry.decode_mib(height, width, frames_per_chunk)
    assert decode_mib == pytest.approx(decoding.peak / 2**20, rel=0.25)


# As wide as the released network, with every fifth of its blocks and one face adapter.
FULL_WIDTH = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "added_kv_proj_dim": 5120,
    "num_layers": 5,
    "inject_face_latents_blocks": 5,
}


def network_with_adapters(dtype: torch.dtype) -> EverAnimateTransformer3DModel:
    """Without memory for its weights."""
    with torch.device("meta"):
        network = EverAnimateTransformer3DModel(**(TRANSFORMER_CONFIG | FULL_WIDTH))
    for name, parameter in network.named_parameters():
        if not any(part in name for part in network._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    attach_lora(network, rank=32, alpha=32, seed=0)
    return network.train()


def make_fake(network: nn.Module) -> None:
    """Give it weights on a CPU that is not there; to be called under a `FakeTensorMode`."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(empty, value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@pytest.mark.parametrize(
    ("dtype", "autocast", "checkpointing"),
    [
        (torch.bfloat16, True, "off"),
        (torch.bfloat16, True, "on"),
        (torch.bfloat16, True, "offload"),
        (torch.bfloat16, False, "on"),
        (torch.float32, False, "off"),
        (torch.float32, False, "on"),
    ],
)
def test_the_estimate_of_training_is_near_what_is_counted(
    dtype: torch.dtype, autocast: bool, checkpointing: Any
) -> None:
    """It was a tenth short of memory where it is wanted most, and twice too high in float32."""
    height, width, num_target_slots = 480, 832, 20
    cells = (height // 8, width // 8)
    # What is offloaded leaves the memory, and comes back when it is wanted.
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype),
        lambda saved: torch.empty(saved[0], dtype=saved[1]),
    )
    network = network_with_adapters(dtype)
    if checkpointing != "off":
        network.enable_gradient_checkpointing()
    config = network.config
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(network)
        with LiveBytes(network) as step:
            with (
                hooks if checkpointing == "offload" else nullcontext(),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                velocity = network(
                    torch.empty(1, config.in_channels, 4 + num_target_slots, *cells),
                    torch.tensor([500.0], dtype=torch.float64),
                    torch.empty(1, 512, config.text_dim, dtype=dtype),
                    torch.empty(1, 257, config.image_dim, dtype=dtype),
                    torch.empty(1, 5120, num_target_slots, height // 16, width // 16, dtype=dtype),
                    torch.empty(1, num_target_slots, 5, 5120, dtype=dtype),
                )
            velocity.float().square().mean().backward()
    geometry = Geometry(
        size_multiple=16,
        face_size=512,
        inner_dim=5120,
        ffn_dim=13824,
        num_layers=5,
        num_heads=40,
        decoder_channels=96,
    )
    estimate = geometry.training_step_mib(
        height, width, 77, 4, dtype=dtype, autocast=autocast, checkpointing=checkpointing
    )
    assert estimate == pytest.approx(step.peak / 2**20, rel=0.1)


def test_the_memory_of_a_lora(source: ModelSource) -> None:
    network = build_tiny_pipeline(dtype=torch.bfloat16).transformer
    attach_lora(network, rank=3, alpha=3, seed=0)
    lora = sum(p.numel() for p in lora_parameters(network).values())
    assert lora_mib(source, 3) == 4 * 4 * lora / 2**20


def test_the_fingerprint_follows_the_weights_and_not_the_place(
    source: ModelSource, original: Path
) -> None:
    first = checkpoint_hash(source)
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    elsewhere = ModelSource(folder=original, defaults=HUB_PRESET, name="another")
    Path("tiny/everanimate.json").unlink()
    Path("tiny/README.md").write_text("not loaded")
    assert checkpoint_hash(source) == checkpoint_hash(elsewhere) == first

    seen = {first}
    edit_tensors(Path("tiny", TRANSFORMER_FILE), lambda t: t[TO_Q].add_(1))
    seen.add(checkpoint_hash(source))
    edit_json(Path("tiny/vae/config.json"), latents_mean=[0.0] * 6)
    seen.add(checkpoint_hash(source))
    edit_json(Path("tiny/tokenizer/tokenizer_config.json"), pad_token="</s>")
    seen.add(checkpoint_hash(source))
    assert len(seen) == 4


def test_the_fingerprint_reads_little_of_a_large_file(source: ModelSource) -> None:
    path = Path("tiny", TRANSFORMER_FILE)
    with path.open("r+b") as file:
        file.truncate(20 * 2**30)  # sparse
    started_s = time.monotonic()
    first = checkpoint_hash(source)
    assert time.monotonic() - started_s < 2
    with path.open("r+b") as file:
        file.seek(10 * 2**30)
        file.write(b"another")
    assert checkpoint_hash(source) != first
