"""Prompts are encoded once: later runs find them on disk, with the same numbers."""

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from tiny import build_tiny_pipeline, write_tiny_checkpoint
from torch import Tensor

from everanimate_cli import prompt_cache, weights
from everanimate_cli.downloads import cache_folder
from everanimate_cli.events import Event, Note
from everanimate_cli.hub import locate_model
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.prompt_cache import encode_prompts

CPU = torch.device("cpu")
PROMPT = "视频中的人在做动作"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def source(model: Path) -> ModelSource:
    return locate_model(str(model), lambda _event: None)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Fills with every load of the text encoder."""
    made: list[torch.dtype] = []
    load = weights.load_text_encoder

    def count(source: Any, device: Any, dtype: torch.dtype) -> Any:
        made.append(dtype)
        return load(source, device, dtype)

    monkeypatch.setattr(weights, "load_text_encoder", count)
    return made


def encode(
    source: ModelSource,
    *prompts: str,
    folders: list[Path],
    dtype: torch.dtype = torch.float32,
    events: list[Event] | None = None,
) -> dict[str, Tensor]:
    return encode_prompts(
        source,
        prompts,
        device=CPU,
        dtype=dtype,
        folders=folders,
        on_event=[].append if events is None else events.append,
    )


def test_a_prompt_is_encoded_once_with_the_same_numbers(
    source: ModelSource,
    tmp_path: Path,
    loads: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_cache, "_LARGE_BYTES", 1000)  # this one is worth a line
    events: list[Event] = []
    first = encode(source, PROMPT, "a fox", folders=[tmp_path / "new"], events=events)
    assert events == [Note(text="encoding the prompt with the text encoder on cpu")]
    again = encode(source, PROMPT, "a fox", folders=[tmp_path / "new"], events=events)
    assert len(loads) == 1
    assert len(events) == 1
    pipeline = build_tiny_pipeline()
    for prompt in (PROMPT, "a fox"):
        assert torch.equal(first[prompt], pipeline.encode_prompt(prompt))
        assert torch.equal(first[prompt], again[prompt])
        assert first[prompt].shape == (1, 512, 20)
    # An entry holds the tokens alone: one for each byte, and the end.
    shapes = {load_file(path)["prompt_embeds"].shape for path in (tmp_path / "new").iterdir()}
    assert shapes == {(28, 20), (6, 20)}


def test_text_dtype_and_weights_make_another_entry(
    source: ModelSource, model: Path, tmp_path: Path, loads: list[torch.dtype]
) -> None:
    folders = [tmp_path / "cache"]
    encode(source, PROMPT, folders=folders)
    half = encode(source, PROMPT, folders=folders, dtype=torch.bfloat16)[PROMPT]
    assert half.dtype == torch.bfloat16
    encode(source, PROMPT + "!", folders=folders)
    assert len(loads) == 3
    other = Path(shutil.copytree(model, tmp_path / "other"))
    path = other / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.final_layer_norm.weight"] *= 2
    save_file(tensors, path, {"format": "pt"})
    changed = encode(locate_model(str(other), lambda _event: None), PROMPT, folders=folders)
    assert len(loads) == 4
    assert not torch.equal(changed[PROMPT], encode(source, PROMPT, folders=folders)[PROMPT])
    # Another transformer beside the same text encoder is no reason to encode again.
    shutil.copy(model / "text_encoder" / "model.safetensors", path)
    transformer = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(transformer)
    tensors["scale_shift_table"] += 1
    save_file(tensors, transformer, {"format": "pt"})
    encode(locate_model(str(other), lambda _event: None), PROMPT, folders=folders)
    assert len(loads) == 4


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        assert how == "other width"
        save_file({"prompt_embeds": torch.zeros(3, 21)}, path)


@pytest.mark.parametrize("how", ["empty", "flipped", "other width"])
def test_a_damaged_entry_is_made_again(
    source: ModelSource, tmp_path: Path, loads: list[torch.dtype], how: str
) -> None:
    first = encode(source, PROMPT, folders=[tmp_path])[PROMPT]
    (path,) = tmp_path.glob("prompt-*.safetensors")
    content = load(path.read_bytes())
    spoil(path, how)
    assert torch.equal(encode(source, PROMPT, folders=[tmp_path])[PROMPT], first)
    assert len(loads) == 2
    torch.testing.assert_close(load(path.read_bytes()), content, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary is left


def test_a_folder_that_cannot_be_written_is_passed_over(
    source: ModelSource, tmp_path: Path, loads: list[torch.dtype]
) -> None:
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        encode(source, PROMPT, folders=[tmp_path / "file" / "cache"])
    assert len(loads) == 2
    first = encode(source, PROMPT, folders=[tmp_path / "run", tmp_path / "file" / "cache"])
    # What one folder has serves the others.
    again = encode(source, PROMPT, folders=[tmp_path / "cache", tmp_path / "run"])
    assert torch.equal(first[PROMPT], again[PROMPT])
    assert len(loads) == 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [
        path.name for path in (tmp_path / "run").iterdir()
    ]


def _write_many(folder: Path, seed: int) -> None:
    from everanimate_cli.prompt_cache import _write_entry  # noqa: PLC0415

    tokens = torch.full((4, 20), float(seed))
    for _ in range(20):
        _write_entry(folder / "prompt-0.safetensors", tokens)


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    """A reader sees a whole entry of one of them at any time."""
    from everanimate_cli.prompt_cache import _read_entry  # noqa: PLC0415

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(tmp_path, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        if (tmp_path / "prompt-0.safetensors").exists():
            tokens = _read_entry(tmp_path / "prompt-0.safetensors", 20, torch.float32)
            assert tokens is not None
            seen.add(float(tokens[0, 0]))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert seen <= {1.0, 2.0}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_lies_beside_that_of_the_pose_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERANIMATE_CACHE", str(tmp_path / "mine"))
    assert cache_folder("prompts") == tmp_path / "mine" / "prompts"
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("EVERANIMATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder("prompts") == tmp_path / "caches" / "everanimate" / "prompts"
    assert cache_folder() == tmp_path / "caches" / "everanimate" / "pose"
