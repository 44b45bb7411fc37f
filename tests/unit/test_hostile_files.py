"""Checkpoints and LoRAs made to break or mislead: refused in one line, nothing else read or run."""

import json
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import message_of
from original import VAE_FILE, build_original_networks, name_transformer, write_original
from safetensors.torch import save_file
from tiny import TINY_DEFAULTS, write_tiny_checkpoint

from everanimate_cli.checkpoint import check_checkpoint
from everanimate_cli.errors import WeightsError
from everanimate_cli.estimates import read_geometry
from everanimate_cli.gguf_header import read_gguf_header
from everanimate_cli.lora import plan_lora
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.safetensors_header import read_number, read_tensor_entries
from everanimate_cli.settings import read_model_defaults
from everanimate_cli.stored_weights import load_tensors
from everanimate_cli.weights import load_pipeline

DEEP = "[" * 100_000  # deeper than Python's parser goes
INDEX = "diffusion_pytorch_model.safetensors.index.json"


refusal = partial(message_of, WeightsError)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts, which no test may change."""
    folder = tmp_path_factory.mktemp("written")
    write_tiny_checkpoint(folder / "tiny")
    write_original(folder / "wan", build_original_networks())
    return folder


@pytest.fixture
def tiny(written: Path, tmp_path: Path) -> ModelSource:
    folder = Path(shutil.copytree(written / "tiny", tmp_path / "tiny"))
    return ModelSource(folder=folder, defaults=TINY_DEFAULTS, name="tiny")


@pytest.fixture
def wan(written: Path, tmp_path: Path) -> ModelSource:
    folder = Path(shutil.copytree(written / "wan", tmp_path / "wan"))
    return ModelSource(folder=folder, defaults=TINY_DEFAULTS, name="wan")


# --- safetensors and GGUF ------------------------------------------------------------------------


def write_header(path: Path, header: str) -> Path:
    encoded = header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"1234")
    return path


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ("[-1]", "[0, 4]"),
        ('"ab"', "[0, 4]"),
        ("[1.0]", "[0, 4]"),
        ("[true]", "[0, 4]"),
        ("[[1]]", "[0, 4]"),
        ("[4611686018427387904, 4611686018427387904]", "[0, 4]"),  # 0 modulo 2^64
        ("[2]", "[0, 4]"),
        ("[1]", '["0", "4"]'),
        ("[1]", "[-10, 4]"),
        ("[1]", "[0, 4.0]"),
        ("[1]", "[100, 4]"),
        ("[1]", "[0, Infinity]"),
        ("[0]", "[4, 4]"),
        ("[1]", "[0]"),
    ],
)
def test_headers_of_safetensors_that_make_no_sense(
    tmp_path: Path, shape: str, offsets: str
) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'
    path = write_header(tmp_path / "a.safetensors", header)
    message = f"{path} is not a safetensors file. Give one."
    assert refusal(lambda: read_tensor_entries(path)) == message
    assert refusal(lambda: read_number(path, "a")) == message


def test_tensors_that_share_or_skip_bytes(tmp_path: Path) -> None:
    def write(*places: tuple[int, int]) -> Path:
        entries = {
            str(index): {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            for index, (start, end) in enumerate(places)
        }
        return write_header(tmp_path / "a.safetensors", json.dumps(entries))

    assert list(read_tensor_entries(write((2, 4), (0, 2), (2, 2)))) == ["0", "1", "2"]
    for places in [((0, 4), (0, 4)), ((0, 1), (3, 4)), ((0, 3), (2, 4))]:
        call = partial(read_tensor_entries, write(*places))
        assert "is not a safetensors file" in refusal(call)


def test_a_header_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.safetensors", DEEP)
    assert "is not a safetensors file" in refusal(lambda: read_tensor_entries(path))


def test_a_gguf_tensor_without_elements(tmp_path: Path) -> None:
    """Its other sides may be anything."""
    sides = struct.pack("<I2Q", 2, 2**63, 0)
    name = struct.pack("<Q", 1) + b"a"
    path = tmp_path / "a.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    path.write_bytes(header + name + sides + struct.pack("<IQ", 0, 0) + bytes(64))
    assert refusal(lambda: read_gguf_header(path)) == f"{path} is not a GGUF file. Give one."


def test_one_weight_under_two_prefixes(wan: ModelSource, tmp_path: Path) -> None:
    tensors = name_transformer(build_original_networks()["transformer"])
    key = next(iter(tensors))
    path = tmp_path / "a.safetensors"
    save_file(tensors | {f"diffusion_model.{key}": tensors[key].clone()}, path)
    source = ModelSource(folder=wan.folder, defaults=TINY_DEFAULTS, name="wan", transformer=path)
    assert refusal(lambda: check_checkpoint(source)) == (
        f"--transformer {path}: 1 weights of the transformer are there twice, under two names. "
        "Give a complete Wan2.2-Animate checkpoint."
    )


def test_weights_that_cannot_be_converted(wan: ModelSource, tmp_path: Path) -> None:
    tensors = name_transformer(build_original_networks()["transformer"])
    path = tmp_path / "a.safetensors"
    source = ModelSource(folder=wan.folder, defaults=TINY_DEFAULTS, name="wan", transformer=path)
    fused = next(key for key in tensors if ".linear1_kv." in key)
    save_file(tensors | {fused: torch.ones(())}, path)
    assert refusal(lambda: check_checkpoint(source)) == (
        f"--transformer {path}: the transformer has weights of other shapes. "
        "Give a Wan2.2-Animate checkpoint."
    )
    query = "blocks.0.self_attn.q."
    scaled = {
        f"{query}weight": torch.ones((), dtype=torch.float8_e4m3fn),
        f"{query}scale_weight": torch.ones(2),
    }
    save_file(tensors | scaled, path)
    assert "has scales of shape [2], not one or one" in refusal(lambda: check_checkpoint(source))


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../vae/diffusion_pytorch_model.safetensors",
        "/etc/passwd",
        "a.bin",
        "",
        "..",
        "a\0b",
        "a\\b",
    ],
)
def test_an_index_names_files_beside_it_alone(tiny: ModelSource, name: str) -> None:
    index = tiny.folder / "transformer" / INDEX
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert refusal(lambda: check_checkpoint(tiny)) == (
        f"{index} names {name!r} where .safetensors files beside it are expected. "
        "Give a complete checkpoint in diffusers layout."
    )


def test_an_index_that_names_nothing_or_is_too_deep(tiny: ModelSource) -> None:
    index = tiny.folder / "transformer" / INDEX
    index.write_text('{"weight_map": {}}')
    assert refusal(lambda: check_checkpoint(tiny)).startswith(f"{index} names nothing where")
    index.write_text(DEEP)
    assert "it is no index of weights" in refusal(lambda: check_checkpoint(tiny))


def change_config(source: ModelSource, name: str, **values: Any) -> None:
    path = source.config_file(name)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_beside_a_network_is_not_followed(tiny: ModelSource, written: Path) -> None:
    """transformers would load the model that it names instead."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(written / "tiny/text_encoder")}
    (tiny.folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(config))
    assert refusal(lambda: check_checkpoint(tiny)) == (
        "--model tiny: text_encoder holds an adapter_config.json, for an adapter on another model. "
        "Delete it, or give a complete checkpoint."
    )


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "image_encoder"])
def test_a_config_of_quantised_weights(tiny: ModelSource, name: str) -> None:
    change_config(tiny, name, quantization_config={"quant_method": "bitsandbytes"})
    assert refusal(lambda: check_checkpoint(tiny)) == (
        f"--model tiny: {name}/config.json describes quantised weights. "
        "Give plain ones, or a GGUF or float8 file with --transformer."
    )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("transformer", "num_layers", 10**20),
        ("transformer", "attention_head_dim", 1.5),
        ("transformer", "attention_head_dim", 10**20),
        ("transformer", "ffn_dim", -1),
        ("transformer", "rope_max_seq_len", None),
        ("vae", "num_res_blocks", 10**20),
        ("vae", "dim_mult", []),
        ("vae", "temperal_downsample", []),
        ("text_encoder", "num_layers", 10**20),
        ("text_encoder", "dtype", "x"),
        ("image_encoder", "num_hidden_layers", 10**20),
    ],
)
def test_configs_that_make_no_sense(tiny: ModelSource, name: str, key: str, value: Any) -> None:
    change_config(tiny, name, **{key: value})
    assert refusal(lambda: check_checkpoint(tiny)).startswith(
        f"--model tiny: no network can be built from {name}/config.json: "
    )


def test_other_configs_that_make_no_sense(tiny: ModelSource) -> None:
    change_config(tiny, "vae", scale_factor_spatial=0)
    assert "vae/config.json states scale_factor_spatial 0" in refusal(lambda: read_geometry(tiny))
    change_config(tiny, "text_encoder", architectures=5)
    assert "its architectures are no list" in refusal(lambda: check_checkpoint(tiny))
    tiny.config_file("transformer").write_text(DEEP)
    assert "it holds no JSON object" in refusal(lambda: check_checkpoint(tiny))
    (tiny.folder / "everanimate.json").write_text(DEEP)
    assert "it is nested too deeply" in refusal(lambda: read_model_defaults(tiny.folder))


def test_no_code_of_a_tokenizer_is_run_or_asked_for(
    tiny: ModelSource, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library asks on the terminal whether to run it, unless it is told not to."""
    folder = tiny.folder / "tokenizer"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    cpu = torch.device("cpu")
    assert refusal(lambda: load_pipeline(tiny, [], cpu, torch.float32)) == (
        "--model tiny: tokenizer cannot be loaded. Give a complete checkpoint in diffusers layout."
    )
    assert "run the custom code?" not in capfd.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["[]", DEEP])
def test_a_tokenizer_that_is_none(tiny: ModelSource, content: str) -> None:
    (tiny.folder / "tokenizer" / "tokenizer_config.json").write_text(content)
    cpu = torch.device("cpu")
    assert "tokenizer cannot be loaded" in refusal(
        lambda: load_pipeline(tiny, [], cpu, torch.float32)
    )


# --- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["older", "compressed"])
def test_a_pickle_that_cannot_be_mapped(wan: ModelSource, form: str) -> None:
    """Compressed bytes would be taken for weights."""
    path = wan.folder / VAE_FILE
    tensors = torch.load(path, weights_only=True)
    # Copied: the file, which is mapped, is going to be replaced.
    loaded = load_tensors(wan, "vae").tensors
    expected = {key: tensor.clone() for key, tensor in loaded.items()}
    del loaded
    if form == "older":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
    check_checkpoint(wan)
    found = load_tensors(wan, "vae").tensors
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_pickle_without_names(wan: ModelSource) -> None:
    path = wan.folder / VAE_FILE
    torch.save({5: torch.ones(1)}, path)
    assert refusal(lambda: check_checkpoint(wan)) == (
        f"{path} holds no plain weights. Give the published file."
    )


# --- LoRAs ---------------------------------------------------------------------------------------

SHAPES = {"blocks.0.attn1.to_q.weight": (6, 5)}
MATRICES = {
    "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 5),
    "blocks.0.attn1.to_q.lora_B.weight": torch.ones(6, 2),
}


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number(tmp_path: Path, alpha: float) -> None:
    path = tmp_path / "a.safetensors"
    key = "blocks.0.attn1.to_q.alpha"
    save_file(MATRICES | {key: torch.tensor(alpha)}, path)
    assert refusal(lambda: plan_lora(path, SHAPES)) == (
        f"{path}: {key} is {alpha}, not a finite number. Give another file."
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('{"lora_alpha": NaN}', "names an alpha that is not finite"),
        ('{"lora_alpha": 1e999}', "names an alpha that is not finite"),
        ('{"lora_alpha": 1, "alpha_pattern": {"to_q": Infinity}}', "names an alpha that is not"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', "holds an alpha_pattern that is no"),
        (DEEP, "cannot be read: it holds no JSON object"),
    ],
    ids=["nan", "inf", "pattern inf", "pattern", "deep"],
)
def test_configurations_of_peft_that_make_no_sense(
    tmp_path: Path, config: str, problem: str
) -> None:
    save_file(MATRICES, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    path = tmp_path / "adapter_model.safetensors"
    assert problem in refusal(lambda: plan_lora(path, SHAPES))
    save_file(MATRICES, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    assert problem in refusal(lambda: plan_lora(tmp_path / "a.safetensors", SHAPES))


def test_matrices_without_sides(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(()) for key in MATRICES}, path)
    assert "have another shape than the network" in refusal(lambda: plan_lora(path, SHAPES))
