"""The toy's training script: its optimiser, and all stages down to a checkpoint that loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from everanimate_cli import checkpoint, hub, toy_loop, toy_training, toyworld, weights
from everanimate_cli.toy_loop import Muon, TrainingPlan, load_average, train


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (12, 400)])
def test_muon_orthogonalises(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    update = toy_loop._orthogonalised(torch.randn(shape))
    assert update.shape == shape
    values = torch.linalg.svdvals(update)
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_muon_minimises() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 8))
    target = torch.randn(6, 8)
    optimizer = Muon([weight], lr=0.05)
    before = float((weight - target).detach().square().mean())
    for _ in range(120):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    assert float((weight - target).square().mean()) < 0.1 * before


def _line() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def _line_loss(_work: Path, _device: torch.device) -> toy_loop.LossFunction:
    def loss(model: torch.nn.Module, rng: np.random.Generator) -> toy_loop.Loss:
        x = torch.from_numpy(rng.normal(size=(8, 3)).astype(np.float32))
        return {"loss": (model(x).float() - x[:, :2]).square().mean()}

    return loss


def test_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    plan = TrainingPlan(name="line", minutes=0.01, processes=1)
    train(tmp_path, plan, _line, _line_loss)
    first = torch.load(tmp_path / "line.checkpoint.pt", weights_only=True)
    assert first["step"] > 0
    assert first["spent_s"] >= 0.6
    train(tmp_path, plan, _line, _line_loss)  # the time is over: nothing more happens
    same = torch.load(tmp_path / "line.checkpoint.pt", weights_only=True)
    assert same["step"] == first["step"]
    train(tmp_path, TrainingPlan(name="line", minutes=0.02, processes=1), _line, _line_loss)
    second = torch.load(tmp_path / "line.checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"]
    averaged = load_average(tmp_path, "line", _line())
    torch.testing.assert_close(averaged.weight, second["average"]["weight"])


def test_all_stages_make_a_checkpoint_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage runs in seconds at its smallest; the result is complete and small enough."""
    monkeypatch.setattr(toy_training, "VIDEOS_PER_SHARD", 2)
    monkeypatch.setattr(toy_training, "IMAGE_TEXT_BATCH", 4)
    monkeypatch.setattr(toy_training, "TRANSFORMER_BATCH", 2)
    _render_here(tmp_path, 4)
    toy_training.train_vae(tmp_path, 0.005, 1)
    toy_training.train_encoders(tmp_path, 0.01)
    (tmp_path / "latents").mkdir()
    toy_training.measure_latents(tmp_path)
    toy_training._encode_shard(tmp_path, 0)
    _check_shard(tmp_path)
    toy_training._parts = None
    toy_training.train_transformer(tmp_path, 0.005, 1)
    output = tmp_path / "model"
    toy_training.export(tmp_path, output)
    source = hub.locate_model(str(output), lambda _event: None)
    checkpoint.check_checkpoint(source)
    assert source.defaults.frames_per_chunk == toy_training.FRAMES_PER_CHUNK
    assert sum(p.stat().st_size for p in output.rglob("*") if p.is_file()) < 16_000_000
    config = json.loads((output / "vae" / "config.json").read_text())
    assert config["latents_std"] != [1.0] * toy_training.LATENT_CHANNELS
    pipeline = weights.load_pipeline(source, [], torch.device("cpu"), torch.float32)
    assert pipeline.encode_prompt(source.defaults.prompt).shape == (1, 512, toy_training.TEXT_DIM)


def _check_shard(work: Path) -> None:
    """What was stored is the code of the frames it stands for.

    Identity memory was once stored with its axes swapped in memory: the loss fell all the same, and
    the network learnt to read pictures that nobody would ever show it.
    """
    shard = load_file(work / "latents" / "00000.safetensors")
    parts = toy_training._load_frozen_parts(work)
    for row in range(toy_training.VIDEOS_PER_SHARD):
        video = toy_training._render_video(row)
        frames = toy_training.to_pixels(video["rgb"])[:, -1:]  # [3, 1, H, W], the standing person
        with torch.no_grad():
            code = parts.encode(frames[None])[0, :, 0]
        torch.testing.assert_close(
            torch.from_numpy(shard["single"][row, :, -1]).float(), code, atol=5e-3, rtol=5e-3
        )


def _render_here(work: Path, num_videos: int) -> None:
    """As the stage `render`, without worker processes."""
    for name, (shape, dtype) in toy_training._video_shapes(num_videos).items():
        array = np.zeros(shape, dtype)
        for seed in range(num_videos):
            array[seed] = toy_training._render_video(seed)[name]
        np.save(work / f"videos_{name}.npy", array)


def test_captions_fit_the_stored_text() -> None:
    tokenizer = toy_training.build_tokenizer()
    captions = [toyworld.make_person(seed).words for seed in range(200)]
    assert max(len(ids) for ids in tokenizer(captions)["input_ids"]) < toy_training.MAX_TEXT_TOKENS


def test_the_tokenizer_is_the_same_every_time_and_that_of_the_embedded_model() -> None:
    first, second = (toy_training.build_tokenizer() for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert (
        first.get_vocab() == AutoTokenizer.from_pretrained(hub.TOY_FOLDER / "tokenizer").get_vocab()
    )
