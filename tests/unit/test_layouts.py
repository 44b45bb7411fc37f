"""Checkpoints in the original layout and transformers in single files: nothing lost, all named."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import assert_same_weights, ignore, message_of, weights_mib
from original import (
    CLIP_FILE,
    T5_FILE,
    TRANSFORMER_FILE,
    VAE_FILE,
    build_original_networks,
    name_image_encoder,
    name_text_encoder,
    name_transformer,
    write_diffusers,
    write_original,
)
from safetensors.torch import load_file, save_file
from tiny import TINY_DEFAULTS
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from everanimate_cli.checkpoint import (
    check_checkpoint,
    check_network,
    checkpoint_hash,
    packed_weights,
)
from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.estimates import read_geometry
from everanimate_cli.gguf_header import GGUF_TYPES, read_gguf_header
from everanimate_cli.hub import locate_model
from everanimate_cli.model_folder import NETWORKS, ModelSource, find_layout
from everanimate_cli.placement_settings import Placement
from everanimate_cli.preflight import check_transformer
from everanimate_cli.transformer import EverAnimateTransformer3DModel
from everanimate_cli.weights import (
    load_image_encoder,
    load_image_processor,
    load_pipeline,
    load_text_encoder,
    load_transformer,
    load_vae,
)

CPU = torch.device("cpu")
INDEX = f"{TRANSFORMER_FILE}.index.json"
ADVICE = "Give a complete Wan2.2-Animate checkpoint."

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return build_original_networks()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, networks: dict[str, Any]) -> Path:
    """The same networks in both layouts, which no test may change."""
    folder = tmp_path_factory.mktemp("written")
    write_original(folder / "original", networks)
    write_diffusers(folder / "diffusers", networks)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the original layout, `wan` in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(written / "original", tmp_path / "wan"))


@pytest.fixture
def source(folder: Path) -> ModelSource:
    assert folder.is_dir()
    return ModelSource(folder=Path("wan"), defaults=TINY_DEFAULTS, name="wan")


@pytest.fixture
def base(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """The diffusers layout, whose transformer a file is to replace."""
    monkeypatch.chdir(tmp_path)
    return ModelSource(folder=written / "diffusers", defaults=TINY_DEFAULTS, name="base")


def with_file(base: ModelSource, path: Path) -> ModelSource:
    return ModelSource(folder=base.folder, defaults=base.defaults, name=base.name, transformer=path)


@torch.no_grad()
def run(transformer: EverAnimateTransformer3DModel, dtype: torch.dtype = torch.float32) -> Tensor:
    """Velocity for inputs that are always the same."""
    generator = torch.Generator().manual_seed(7)
    draw = partial(torch.randn, generator=generator)
    config = transformer.config
    pose = transformer.embed_pose(draw(1, config.latent_channels, 3, 6, 8))
    face = transformer.embed_face(draw(1, 3, 9, 16, 16))
    velocity: Tensor = transformer(
        draw(1, config.in_channels, 4, 6, 8).to(dtype),
        torch.tensor([500.0]),
        draw(1, 512, config.text_dim).to(dtype),
        draw(1, 17, config.image_dim).to(dtype),
        pose,
        face,
    )
    return velocity


# --- the original layout -------------------------------------------------------------------------


def test_the_layout_is_found(written: Path, tmp_path: Path) -> None:
    assert find_layout(written / "original") == "original"
    assert find_layout(written / "diffusers") == "diffusers"
    assert find_layout(tmp_path) is None
    assert locate_model(str(written / "original"), ignore).layout == "original"


def test_the_original_layout_gives_exactly_the_networks(
    source: ModelSource, networks: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(source, [], CPU, torch.float32, with_image_processor=True)
    assert capfd.readouterr() == ("", "")
    for name in NETWORKS:
        network = getattr(pipeline, name)
        assert_same_weights(network, networks[name])
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        # Such as rotary frequencies and blur kernels, which no file holds.
        for (key, buffer), (_, expected) in zip(
            network.named_buffers(), networks[name].named_buffers(), strict=True
        ):
            torch.testing.assert_close(buffer, expected, rtol=0, atol=0, msg=key)
    torch.testing.assert_close(run(pipeline.transformer), run(networks["transformer"]))
    assert pipeline.tokenizer is not None
    assert pipeline.tokenizer("a")["input_ids"][-1] == pipeline.tokenizer.eos_token_id


def test_both_layouts_are_described_alike(written: Path, source: ModelSource) -> None:
    other = ModelSource(folder=written / "diffusers", defaults=TINY_DEFAULTS, name="diffusers")
    assert read_geometry(source) == read_geometry(other)
    for dtype in (torch.float32, torch.bfloat16):
        assert weights_mib(source, dtype) == weights_mib(other, dtype)
    for name in NETWORKS:
        assert check_network(source, name) == check_network(other, name)
    processors = [load_image_processor(each) for each in (source, other)]
    picture_u8 = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    values = [each(images=picture_u8, return_tensors="pt")["pixel_values"] for each in processors]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_parts_can_be_loaded_alone(source: ModelSource, networks: dict[str, Any]) -> None:
    assert_same_weights(load_vae(source, CPU), networks["vae"])
    assert_same_weights(load_image_encoder(source, CPU), networks["image_encoder"])
    transformer = load_transformer(source, CPU, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in transformer.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    in_memory = sum(p.numel() * p.element_size() for p in transformer.parameters())
    assert weights_mib(source, torch.bfloat16)["transformer"] == in_memory / 2**20
    text_encoder, _ = load_text_encoder(source, CPU, torch.bfloat16)
    assert {p.dtype for p in text_encoder.parameters()} == {torch.bfloat16}
    # As transformers does: one layer's results are beyond the range of float16.
    in_float16, _ = load_text_encoder(source, CPU, torch.float16)
    kept = [name for name, p in in_float16.named_parameters() if p.dtype == torch.float32]
    assert kept == [f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)]
    in_memory = sum(p.numel() * p.element_size() for p in in_float16.parameters())
    assert weights_mib(source, torch.float16)["text_encoder"] == in_memory / 2**20
    assert text_encoder.shared.weight is text_encoder.encoder.embed_tokens.weight


def original_t5(tensors: Tensors, ids: Tensor) -> Tensor:
    """The authors' text encoder, as their names are used there: [N] -> [N, D]."""

    def normed(x: Tensor, name: str) -> Tensor:
        return tensors[f"{name}.weight"] * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    x = tensors["token_embedding.weight"][ids]
    steps = torch.arange(len(ids))
    for block in range(2):
        name = f"blocks.{block}"
        bias = tensors[f"{name}.pos_embedding.embedding.weight"]  # [32, heads]
        offset = steps[None] - steps[:, None]
        far = 8 + (offset.abs().clamp(1).float() / 8).log() / math.log(128 / 8) * 8
        bucket = torch.where(offset.abs() < 8, offset.abs(), far.long().clamp(max=15))
        bucket = bucket + 16 * (offset > 0)
        heads = bias.shape[1]
        q, k, v = (
            (normed(x, f"{name}.norm1") @ tensors[f"{name}.attn.{part}.weight"].T)
            .unflatten(1, (heads, -1))
            .transpose(0, 1)
            for part in "qkv"
        )
        scores = q @ k.transpose(1, 2) + bias[bucket].permute(2, 0, 1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ tensors[f"{name}.attn.o.weight"].T
        y = normed(x, f"{name}.norm2")
        gate = gelu(y @ tensors[f"{name}.ffn.gate.0.weight"].T, approximate="tanh")
        y = gate * (y @ tensors[f"{name}.ffn.fc1.weight"].T)
        x = x + y @ tensors[f"{name}.ffn.fc2.weight"].T
    return normed(x, "norm")


def original_clip(tensors: Tensors, pixels: Tensor) -> Tensor:
    """The authors' image encoder up to the last block but one: [1, 3, H, W] -> [1, N, D]."""

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"visual.{name}.weight"].T + tensors[f"visual.{name}.bias"]

    def normed(x: Tensor, name: str) -> Tensor:
        weight, bias = tensors[f"visual.{name}.weight"], tensors[f"visual.{name}.bias"]
        return layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    patches = torch.conv2d(pixels, tensors["visual.patch_embedding.weight"], stride=8)
    x = torch.cat([tensors["visual.cls_embedding"], patches.flatten(2).transpose(1, 2)], dim=1)
    x = normed(x + tensors["visual.pos_embedding"], "pre_norm")
    for block in range(2):
        name = f"transformer.{block}"
        q, k, v = (
            layer(normed(x, f"{name}.norm1"), f"{name}.attn.to_qkv").unflatten(2, (3, 16, -1))
        ).unbind(2)
        mixed = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + layer(mixed.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + layer(gelu(layer(normed(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")
    return x


@torch.no_grad()
def test_the_encoders_compute_what_the_authors_compute(
    source: ModelSource, networks: dict[str, Any]
) -> None:
    """Names alone would pass with two layers exchanged."""
    text_encoder, _ = load_text_encoder(source, CPU, torch.float32)
    ids = torch.arange(40) * 5 % 200 + 2
    expected = original_t5(name_text_encoder(networks["text_encoder"]), ids)
    found = text_encoder(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = original_clip(name_image_encoder(networks["image_encoder"]), pixels)
    image_encoder = load_image_encoder(source, CPU)
    found = image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def edit_pickle(name: str, change: Callable[[Tensors], object]) -> None:
    tensors = torch.load(Path("wan", name), weights_only=True)
    change(tensors)
    torch.save(tensors, Path("wan", name))


def edit_transformer(change: Callable[[Tensors], object]) -> None:
    """Change the weights, and put them into one file."""
    tensors: Tensors = {}
    for path in Path("wan").glob("diffusion_pytorch_model-*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    Path("wan", INDEX).unlink()
    change(tensors)
    save_file(tensors, Path("wan", TRANSFORMER_FILE), {"format": "pt"})


class Trap:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trapped"),))


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "text encoder is missing": (
        lambda: Path("wan", T5_FILE).unlink(),
        f"--model wan has no {T5_FILE}. Give a complete checkpoint in the original layout.",
    ),
    "image encoder is missing": (
        lambda: Path("wan", CLIP_FILE).unlink(),
        "--model wan has no models_clip_open-clip-xlm-roberta-large-vit-huge-14*.pth. "
        "Give a complete checkpoint in the original layout.",
    ),
    "transformer is missing": (
        lambda: [path.unlink() for path in Path("wan").glob("diffusion_pytorch_model*")],
        f"--model wan has no {TRANSFORMER_FILE}. "
        "Give a complete checkpoint in the original layout.",
    ),
    "shard is missing": (
        lambda: Path("wan/diffusion_pytorch_model-00002-of-00002.safetensors").unlink(),
        "--model wan: transformer lacks 1 of its 2 weight files "
        "(diffusion_pytorch_model-00002-of-00002.safetensors). Download them.",
    ),
    "tokenizer is missing": (
        lambda: shutil.rmtree("wan/google"),
        "--model wan has no google/umt5-xxl/tokenizer.json. "
        "Give a complete checkpoint in the original layout.",
    ),
    "missing weights": (
        lambda: edit_transformer(
            lambda t: [t.pop(f"blocks.{i}.self_attn.q.weight") for i in range(4)]
        ),
        "--model wan: the weights in transformer are not those of that network: 4 missing (first: "
        "blocks.0.attn1.to_q.weight, blocks.1.attn1.to_q.weight, blocks.2.attn1.to_q.weight). "
        f"{ADVICE}",
    ),
    "unknown weights": (
        lambda: edit_pickle(VAE_FILE, lambda t: t.update({"encoder.extra": torch.zeros(2)})),
        "--model wan: the weights in vae are not those of that network: 1 unexpected "
        f"(encoder.extra). {ADVICE}",
    ),
    "another VAE": (
        lambda: edit_pickle(
            VAE_FILE,
            lambda t: t.update({"conv2.weight": torch.zeros(12, 12, 1, 1, 1)}),
        ),
        "--model wan: the weights in vae are not those of that network: ",
    ),
    "another transformer": (
        lambda: edit_transformer(
            lambda t: [t.pop(key) for key in list(t) if key.startswith("motion_encoder")]
        ),
        "--model wan: the transformer lacks motion_encoder.conv_in.weight. "
        "Give a Wan2.2-Animate checkpoint.",
    ),
    "one weight under two names": (
        lambda: edit_transformer(
            lambda t: t.update(
                {
                    "diffusion_model.head.head.bias": t["head.head.bias"] + 1,
                    "proj_out.bias": t["head.head.bias"] + 1,
                }
            )
        ),
        "--model wan: 1 weights of the transformer are there twice, under two names. " + ADVICE,
    ),
    "code in a pickle": (
        lambda: torch.save({"norm.weight": Trap()}, Path("wan", T5_FILE)),
        f"wan/{T5_FILE} holds more than weights, which could run code. Give the published file.",
    ),
    "no weights in a pickle": (
        lambda: torch.save([1, 2], Path("wan", T5_FILE)),
        f"wan/{T5_FILE} holds no plain weights. Give the published file.",
    ),
    "a pickle cut short": (
        lambda: Path("wan", VAE_FILE).write_bytes(Path("wan", VAE_FILE).read_bytes()[:-900]),
        f"wan/{VAE_FILE} is damaged or no file of torch. Download it again.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(source: ModelSource, name: str) -> None:
    damage, message = REFUSALS[name]
    damage()
    assert message_of(WeightsError, lambda: check_checkpoint(source)).startswith(message)
    assert not Path("trapped").exists()


def test_another_blur_is_noticed(source: ModelSource) -> None:
    """The network makes its kernels itself: those in the file are compared with them."""
    key = "motion_encoder.enc.net_app.convs.1.conv2.0.kernel"
    edit_transformer(lambda t: t.update({key: torch.full((4, 4), 1 / 16)}))
    check_checkpoint(source)  # a header says nothing of values
    assert message_of(WeightsError, lambda: load_transformer(source, CPU, torch.float32)) == (
        "--model wan: the motion encoder has other blur kernels than that of Wan2.2-Animate. "
        + ADVICE
    )


def test_the_fingerprint_covers_every_file(source: ModelSource, tmp_path: Path) -> None:
    seen = {checkpoint_hash(source)}
    edit_pickle(T5_FILE, lambda t: t["norm.weight"].add_(1))
    seen.add(checkpoint_hash(source))
    edit_pickle(CLIP_FILE, lambda t: t["visual.pre_norm.bias"].add_(1))
    seen.add(checkpoint_hash(source))
    edit_transformer(lambda t: t["head.head.bias"].add_(1))
    seen.add(checkpoint_hash(source))
    file = tmp_path / "another.safetensors"
    shutil.copy(Path("wan", TRANSFORMER_FILE), file)
    seen.add(checkpoint_hash(with_file(source, file)))
    assert len(seen) == 5
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    assert checkpoint_hash(with_file(source, Path(moved))) in seen


# --- a transformer in one file -------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_file_in_the_authors_names(
    base: ModelSource, networks: dict[str, Any], prefix: str
) -> None:
    tensors = name_transformer(networks["transformer"])
    path = Path("animate.safetensors")
    save_file({f"{prefix}{key}": value for key, value in tensors.items()}, path)
    source = with_file(base, path)
    check_checkpoint(source)
    assert_same_weights(
        load_pipeline(source, [], CPU, torch.float32).transformer, networks["transformer"]
    )


def test_a_file_in_diffusers_names_and_bfloat16(
    base: ModelSource, networks: dict[str, Any]
) -> None:
    state = networks["transformer"].state_dict()
    path = Path("animate.safetensors")
    save_file({key: value.bfloat16() for key, value in state.items()}, path)
    transformer = load_transformer(with_file(base, path), CPU, torch.float32)
    for key, value in transformer.state_dict().items():
        assert torch.equal(value, state[key].bfloat16().float()), key


def test_a_file_on_top_of_the_original_layout(
    source: ModelSource, networks: dict[str, Any]
) -> None:
    """The folder's own transformer need not be there."""
    for path in Path("wan").glob("diffusion_pytorch_model*"):
        path.unlink()
    save_file(networks["transformer"].state_dict(), Path("animate.safetensors"))
    source = with_file(source, Path("animate.safetensors"))
    check_checkpoint(source)
    assert_same_weights(load_transformer(source, CPU, torch.float32), networks["transformer"])


def in_8_bits(
    tensors: Tensors, *, scaled: str | None, per_row: bool = False
) -> tuple[Tensors, Tensors]:
    """(file, weights that it stands for) with linear layers of the blocks in float8."""
    file, meant = {}, {}
    for key, value in tensors.items():
        if not key.startswith("blocks.") or value.ndim != 2:
            file[key] = meant[key] = value
            continue
        amax = value.abs().amax(1, keepdim=True) if per_row else value.abs().max()
        scale = amax / 448 if scaled else torch.ones(())
        packed = (value / scale).to(torch.float8_e4m3fn)
        file[key] = packed
        meant[key] = packed.float() * scale
        if scaled:
            file[key.removesuffix(".weight") + scaled] = scale.reshape(-1) if per_row else scale
    return file, meant


@pytest.mark.parametrize(
    ("scaled", "per_row", "extra"),
    [
        (None, False, {}),
        (".scale_weight", False, {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
        (".weight_scale", True, {"blocks.0.ffn.0.input_scale": torch.ones(())}),
        (
            ".scale_weight",
            False,
            {
                "blocks.0.ffn.0.comfy_quant": torch.zeros(9, dtype=torch.uint8),
                "blocks.0.ffn.0.scale_input": torch.ones(1),
            },
        ),
    ],
    ids=["without scales", "ComfyUI's scales", "a scale for each row", "marks"],
)
def test_float8(
    base: ModelSource,
    networks: dict[str, Any],
    scaled: str | None,
    per_row: bool,
    extra: Tensors,
) -> None:
    tensors = name_transformer(networks["transformer"])
    file, meant = in_8_bits(tensors, scaled=scaled, per_row=per_row)
    save_file(file | extra, Path("float8.safetensors"))
    save_file(meant, Path("plain.safetensors"))
    source = with_file(base, Path("float8.safetensors"))
    check_checkpoint(source)
    assert weights_mib(source, torch.bfloat16) == weights_mib(base, torch.bfloat16)
    loaded = load_transformer(source, CPU, torch.float32)
    plain = load_transformer(with_file(base, Path("plain.safetensors")), CPU, torch.float32)
    assert_same_weights(loaded, plain)
    assert not torch.equal(run(loaded), run(networks["transformer"]))
    in_bfloat16 = load_transformer(source, CPU, torch.bfloat16)
    for key, value in in_bfloat16.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key].to(value.dtype)), key


FILE_REFUSALS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "left over": (
        lambda t: t.update({"blocks.0.extra.weight": torch.zeros(2)}),
        "the weights in transformer are not those of its config.json: 1 unexpected "
        f"(blocks.0.extra.weight). {ADVICE}",
    ),
    "a scale without weight": (
        lambda t: t.update({"blocks.0.extra.scale_weight": torch.zeros(())}),
        "the weights in transformer are not those of its config.json: 1 unexpected "
        f"(blocks.0.extra.scale_weight). {ADVICE}",
    ),
    "another size": (
        lambda t: t.update({"head.head.bias": torch.zeros(3)}),
        "the weights in transformer are not those of its config.json: 1 of another shape "
        f"(proj_out.bias is [3], not [64]). {ADVICE}",
    ),
    "scales for blocks": (
        lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.zeros(96, 2)}),
        "blocks.0.ffn.0.weight has scales of shape [96, 2], not one or one for each row. "
        "Give a file with such scales.",
    ),
    "whole numbers": (
        lambda t: t.update({"blocks.0.ffn.0.weight": torch.zeros(96, 64, dtype=torch.int8)}),
        "holds 1 weights as whole numbers (blocks.0.ffn.0.weight), packed in an unknown way. "
        "Give a file with float8 weights, or GGUF.",
    ),
    "another network": (
        lambda t: [t.pop(key) for key in list(t) if "face" in key],
        "the weights in transformer are not those of its config.json: ",
    ),
}


@pytest.mark.parametrize("name", FILE_REFUSALS)
def test_a_file_that_does_not_fit_is_refused(
    base: ModelSource, networks: dict[str, Any], name: str
) -> None:
    tensors = name_transformer(networks["transformer"])
    change, problem = FILE_REFUSALS[name]
    change(tensors)
    path = Path("animate.safetensors")
    save_file(tensors, path)
    message = message_of(WeightsError, lambda: check_checkpoint(with_file(base, path)))
    head, _, rest = message.partition(": " if ": " in message[:40] else " holds")
    assert head == f"--transformer {path}"
    assert (rest if "holds" not in problem else f"holds{rest}").startswith(problem)


def test_what_is_no_transformer_file_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    advice = "Give a .safetensors or .gguf file of a Wan2.2-Animate transformer."
    check = partial(check_transformer, Path("animate.ckpt"))
    assert message_of(InputError, check) == f"--transformer animate.ckpt does not exist. {advice}"
    Path("animate.ckpt").write_bytes(b"pickle")
    assert message_of(InputError, check) == (
        f"--transformer animate.ckpt is not a .safetensors or .gguf file. {advice}"
    )
    Path("animate.gguf").write_bytes(b"GGUF")
    check_transformer(Path("animate.gguf"))
    monkeypatch.setattr("everanimate_cli.preflight.find_spec", lambda _name: None)
    assert message_of(SettingsError, lambda: check_transformer(Path("animate.gguf"))) == (
        "--transformer animate.gguf needs the package gguf. Run pip install 'everanimate[gguf]'."
    )


# --- GGUF ----------------------------------------------------------------------------------------

Q = gguf.GGMLQuantizationType


def write_gguf(path: Path, tensors: Tensors, types: dict[str, Q], *, drop_ones: bool) -> Tensors:
    """Pack weights as other programs do.

    Args:
        path: To write.
        tensors: By the names in the file.
        types: Of those that are packed; others are F32.
        drop_ones: Whether leading axes of one element get lost, as in llama.cpp.

    Returns:
        The weights that the file stands for, unpacked by the package gguf itself.
    """
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("general.tags", ["animate", "tiny"])
    writer.add_uint32("general.quantization_version", 2)
    meant = {}
    for key, value in tensors.items():
        data = value.numpy()
        kind = types.get(key, Q.F32)
        if drop_ones:
            data = data.reshape(
                data.shape[next((i for i, n in enumerate(data.shape) if n > 1), 0) :]
            )
        packed = gguf.quants.quantize(data, kind)
        writer.add_tensor(key, packed, raw_dtype=kind)
        meant[key] = torch.from_numpy(gguf.quants.dequantize(packed, kind)).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def choose_types(tensors: Tensors) -> dict[str, Q]:
    """A mixture as in published files; what belongs to no linear layer is packed by some too."""
    kinds = (Q.Q8_0, Q.Q5_1, Q.Q4_0, Q.Q5_0, Q.Q4_1)
    types: dict[str, Q] = {}
    for key, value in tensors.items():
        if value.ndim == 2 and value.shape[1] % 32 == 0 and key.endswith(".weight"):
            types[key] = kinds[len(types) % len(kinds)]
        elif key.endswith("modulation"):
            types[key] = Q.BF16
        elif "face_encoder" in key and key.endswith("weight"):
            types[key] = Q.F16
    assert "motion_encoder.dec.direction.weight" not in types  # rows of 6
    assert "blocks.0.ffn.0.weight" in types
    assert "time_projection.1.weight" in types
    assert "time_embedding.0.weight" in types  # stays in float32 in memory
    return types


@pytest.mark.parametrize("drop_ones", [False, True])
def test_a_gguf_file(
    base: ModelSource, networks: dict[str, Any], drop_ones: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = name_transformer(networks["transformer"])
    meant = write_gguf(Path("animate.gguf"), tensors, choose_types(tensors), drop_ones=drop_ones)
    save_file(meant, Path("plain.safetensors"))
    source = with_file(base, Path("animate.gguf"))
    check_checkpoint(source)
    assert check_network(source, "transformer") == check_network(base, "transformer")
    loaded = load_transformer(source, CPU, torch.float32)
    assert capfd.readouterr() == ("", "")
    in_memory = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert weights_mib(source, torch.float32)["transformer"] == in_memory / 2**20
    assert in_memory < weights_mib(base, torch.float32)["transformer"] * 2**20 / 2
    plain = load_transformer(with_file(base, Path("plain.safetensors")), CPU, torch.float32)
    velocity = run(plain)
    # diffusers unpacks in float16. Packing itself changes the velocity by far more.
    torch.testing.assert_close(run(loaded), velocity, rtol=0, atol=5e-3)
    assert (run(networks["transformer"]) - velocity).abs().max() > 0.1
    assert not any(p.requires_grad for p in loaded.parameters())
    in_bfloat16 = load_transformer(source, CPU, torch.bfloat16)
    assert in_bfloat16.scale_shift_table.dtype == torch.float32
    assert in_bfloat16.dtype == torch.bfloat16
    torch.testing.assert_close(
        run(in_bfloat16, torch.bfloat16).float(), velocity, rtol=0.2, atol=0.2
    )


def test_a_gguf_file_in_a_pipeline(base: ModelSource, networks: dict[str, Any]) -> None:
    state = networks["transformer"].state_dict()
    types = {
        key: Q.Q8_0
        for key, value in state.items()
        if value.ndim == 2 and value.shape[1] % 32 == 0 and "motion" not in key
    }
    write_gguf(Path("animate.gguf"), state, types, drop_ones=False)  # in diffusers names
    source = with_file(base, Path("animate.gguf"))
    pipeline = load_pipeline(source, [], CPU, torch.float32)
    assert "GGUFLinear" in type(pipeline.transformer.blocks[0].attn1.to_q).__name__
    torch.testing.assert_close(
        run(pipeline.transformer), run(networks["transformer"]), rtol=0.1, atol=0.1
    )
    expected = run(pipeline.transformer)
    for offload in ("model", "group", "disk"):
        Path(offload).mkdir()
        placed = load_pipeline(
            source,
            [],
            CPU,
            torch.float32,
            placement=Placement(offload=offload),
            offload_folder=Path(offload),
        )
        assert torch.equal(run(placed.transformer), expected)
        assert bool(list(Path(offload).iterdir())) == (offload == "disk")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_gguf_file_is_mapped_and_not_written_to(
    base: ModelSource, networks: dict[str, Any]
) -> None:
    """It was copied to main memory whole, also where its blocks were to wait on disk."""
    tensors = name_transformer(networks["transformer"])
    path = Path("animate.gguf")
    write_gguf(path, tensors, choose_types(tensors), drop_ones=False)
    before = path.read_bytes()
    loaded = load_transformer(with_file(base, path), CPU, torch.float32)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (ends, *_) = (line[0].split("-") for line in lines if line[-1] == str(path.resolve()))
    start, end = (int(each, 16) for each in ends)
    packed = packed_weights(with_file(base, path))
    assert "blocks.0.ffn.net.0.proj.weight" in packed
    for key in packed:
        weight = loaded.get_parameter(key)
        assert start <= weight.data_ptr() < end
        with torch._C.DisableTorchFunctionSubclass():
            weight.data.fill_(7)
    assert path.read_bytes() == before


def test_a_gguf_header_is_read_without_the_package(tmp_path: Path) -> None:
    """A file made by hand, byte for byte as ggml describes it."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    def text(value: str) -> bytes:
        return number(len(value), 8) + value.encode()

    header = b"GGUF" + number(3, 4) + number(2, 8) + number(3, 8)
    header += text("general.architecture") + number(8, 4) + text("wan")
    header += text("general.alignment") + number(4, 4) + number(64, 4)
    header += text("list") + number(9, 4) + number(8, 4) + number(2, 8) + text("a") + text("bc")
    # Sides run from the fastest to the slowest.
    header += text("a.weight") + number(2, 4) + number(64, 8) + number(3, 8)
    header += number(8, 4) + number(0, 8)  # Q8_0 at the start of the data
    header += text("b") + number(1, 4) + number(5, 8) + number(0, 4) + number(256, 8)
    data = bytes(-len(header) % 64) + bytes(256 + 20)
    path = tmp_path / "made.gguf"
    path.write_bytes(header + data)
    tensors = read_gguf_header(path)
    assert {key: (t.shape, t.type.name, t.num_bytes) for key, t in tensors.items()} == {
        "a.weight": ((3, 64), "Q8_0", 3 * 2 * 34),
        "b": ((5,), "F32", 20),
    }
    path.write_bytes((header + data)[:-1])
    assert message_of(WeightsError, lambda: read_gguf_header(path)) == (
        f"{path} has {len(header + data) - 1} bytes where its header announces "
        f"{len(header + data)}. Download it again."
    )
    path.write_bytes(header[:-3])
    assert message_of(WeightsError, lambda: read_gguf_header(path)) == (
        f"{path} is not a GGUF file. Give one."
    )
    path.write_bytes(header.replace(number(8, 4) + number(0, 8), number(16, 4) + number(0, 8)))
    assert message_of(WeightsError, lambda: read_gguf_header(path)).startswith(
        f"{path} is packed in an unknown way: a.weight is of ggml type 16. Known: F32, F16, Q4_0,"
    )
    path.unlink()
    assert message_of(WeightsError, lambda: read_gguf_header(path)) == (
        f"{path} cannot be read: No such file or directory. Check the path."
    )


def test_the_sizes_of_packed_blocks_are_ggmls() -> None:
    for number, kind in GGUF_TYPES.items():
        assert Q(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[Q(number)] == (kind.block_size, kind.block_bytes)


# --- the released size ---------------------------------------------------------------------------


def test_the_released_transformer_is_described_by_its_shapes_alone(tmp_path: Path) -> None:
    """1441 names, of which 14 are blur kernels, as others count in the published checkpoint."""
    with torch.device("meta"):
        network = EverAnimateTransformer3DModel(added_kv_proj_dim=5120)
    header: dict[str, Any] = {}
    end = 0
    for key, value in name_transformer(network).items():
        num_bytes = value.numel() * 2
        header[key] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [end, end + num_bytes],
        }
        end += num_bytes
    assert len(header) == 1441
    text = json.dumps(header).encode()
    path = tmp_path / "animate.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # 34 GB without a block on the disk
    source = ModelSource(folder=tmp_path, defaults=TINY_DEFAULTS, name="released", transformer=path)
    (tmp_path / VAE_FILE).touch()  # makes it the original layout
    shapes = check_network(source, "transformer")
    assert sum(map(math.prod, shapes.values())) == sum(p.numel() for p in network.parameters())
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 3) == 17.275
