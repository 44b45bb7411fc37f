"""Where networks wait, how they are stored, and what happens when memory is short."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from original import build_original_networks, name_transformer, write_diffusers
from studio import Animate, Outcome, frames_of, made_files

from everanimate_cli import weights
from everanimate_cli.offloading import Rota
from everanimate_cli.rollout import Rollout
from everanimate_cli.transformer import EverAnimateTransformer3DModel

# Two chunks, so that what the first hands to the second counts.
LENGTH = ("--frames", "10", "--steps", "1")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Fills with every load of the text encoder; the cache is this test's own."""
    monkeypatch.setenv("EVERANIMATE_CACHE", str(tmp_path / "cache"))
    made: list[str] = []
    load = weights.load_text_encoder

    def count(source: Any, *args: Any) -> Any:
        made.append(source.name)
        return load(source, *args)

    monkeypatch.setattr(weights, "load_text_encoder", count)
    return made


@pytest.fixture
def run_short_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int, type[RuntimeError]], None]:
    """Lets the network fail once, in the call of this number."""
    forward = EverAnimateTransformer3DModel.forward

    def fail_in(call: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        left = [call]

        def short(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(*args, **kwargs)

        monkeypatch.setattr(EverAnimateTransformer3DModel, "forward", short)

    return fail_in


# --- what the options change ---------------------------------------------------------------------


def test_what_waits_elsewhere_changes_no_byte(animate: Animate, place: Path) -> None:
    assert animate("-o", "a.mp4", *LENGTH).code == 0
    for offload in ("none", "group", "disk"):
        done = animate("-o", "b.mp4", *LENGTH, "--offload", offload, "--overwrite", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["placement"]["offload"] == offload
        assert Path("b.mp4").read_bytes() == Path("a.mp4").read_bytes()
    # The files of the blocks are gone with the run.
    assert made_files(place) == ["a.json", "a.mp4", "b.json", "b.mp4"]


def test_a_packed_transformer_waits_elsewhere_too(animate: Animate, place: Path) -> None:
    """Where main memory is short it is disk by itself; layers of the file are cut into several."""
    networks = build_original_networks()
    write_diffusers(place / "base", networks)
    writer = gguf.GGUFWriter("q8.gguf", "wan")
    for key, value in name_transformer(networks["transformer"]).items():
        is_packed = value.ndim == 2 and value.shape[1] % 32 == 0 and key.endswith(".weight")
        kind = getattr(gguf.GGMLQuantizationType, "Q8_0" if is_packed else "F32")
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    made = set()
    for offload in ("none", "group", "disk"):
        words = ("--model", "base", "--transformer", "q8.gguf", "--offload", offload)
        done = animate("-o", f"{offload}.mp4", *LENGTH, *words)
        assert done.code == 0, done.err
        made.add(Path(f"{offload}.mp4").read_bytes())
    assert len(made) == 1
    assert not list(place.glob("*.run"))


def test_why_memory_is_not_pinned_is_told(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rota, "notes", lambda _rota: ["3.0 GiB are too much to pin"])
    assert "3.0 GiB are too much to pin" in animate("-o", "a.mp4", *LENGTH, "--offload", "disk").err
    assert "too much to pin" not in animate("-o", "b.mp4", *LENGTH).err


def test_precision_and_tiles_change_pixels(animate: Animate) -> None:
    words = ("--frames", "5", "--steps", "1", "--size", "272x48")  # wider than a tile
    made = {}
    for name, options in {
        "plain": (),
        "full": ("--precision", "full", "--vae-tiling", "off"),
        "fp8": ("--precision", "fp8"),
        "tiles": ("--vae-tiling", "on"),
    }.items():
        done = animate("-o", f"{name}.mp4", *words, *options)
        assert done.code == 0, done.err
        made[name] = frames_of(f"{name}.mp4").astype(int)
    np.testing.assert_array_equal(made["plain"], made["full"])
    for name in ("fp8", "tiles"):
        assert np.abs(made[name] - made["plain"]).max() > 1
        assert np.abs(made[name] - made["plain"]).mean() < 30


def test_the_plan_tells_the_memory(animate: Animate, place: Path) -> None:
    plan = json.loads(animate("--dry-run", "--json", "--precision", "fp8").out)
    assert plan["placement"] == {
        "precision": "fp8",
        "offload": "none",
        "vae_tiling": "off",
        "text_device": "device",
    }
    assert list(plan["phases_mib"]) == ["text", "encode", "denoise", "decode"]
    assert plan["estimated_memory_mib"] == max(plan["phases_mib"].values())
    plain = json.loads(animate("--dry-run", "--json").out)
    assert plan["weights_mib"]["transformer"] < plain["weights_mib"]["transformer"]
    disk = json.loads(animate("--dry-run", "--json", "--offload", "disk").out)
    assert disk["phases_mib"]["decode"] <= plain["phases_mib"]["decode"]
    assert made_files(place) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--vram", "24"),
            "--vram 24 has no effect on cpu, which has no memory of its own. Leave it out.",
        ),
        (("--vram", "20"), "--vram 20 is unknown. Known: auto, 80, 48, 24, 16, 12, 8."),
        (
            ("--offload", "model"),
            "--offload model has no effect on cpu, which has no memory of its own. Give none or "
            "disk.",
        ),
        (
            ("--text-device", "cpu"),
            "--text-device cpu is what --device cpu means. Leave it out.",
        ),
        (
            ("--precision", "nf4", "--offload", "disk"),
            "--precision nf4 does not fit --offload disk, which moves plain tensors only. Give "
            "--precision fp8, or --offload model.",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_written(
    animate: Animate, place: Path, words: tuple[str, ...], message: str
) -> None:
    done = animate("--device", "cpu", *words)
    assert (done.code, done.out) == (2, "")
    # A choice that does not exist is found by the command line, in its own words.
    if words == ("--vram", "20"):
        assert "20" in done.err
    else:
        assert done.err == f"error: {message}\n"
    assert made_files(place) == []


# --- the prompt ----------------------------------------------------------------------------------


def test_the_text_encoder_is_loaded_once_for_a_prompt(animate: Animate, loads: list[str]) -> None:
    assert animate("-o", "a.mp4", *LENGTH).code == 0
    assert animate("-o", "b.mp4", *LENGTH).code == 0
    assert loads == ["tiny"]
    shutil.rmtree("cache")
    assert animate("-o", "c.mp4", *LENGTH).code == 0
    assert loads == ["tiny"] * 2
    assert Path("b.mp4").read_bytes() == Path("a.mp4").read_bytes()
    assert Path("c.mp4").read_bytes() == Path("a.mp4").read_bytes()
    assert animate("-o", "d.mp4", *LENGTH, "--prompt", "a fox").code == 0
    assert len(loads) == 3
    assert Path("d.mp4").read_bytes() != Path("a.mp4").read_bytes()


def test_a_run_keeps_what_it_saw_of_the_prompt(animate: Animate, loads: list[str]) -> None:
    """Whatever becomes of the cache, a run goes on with the numbers that it began with."""
    assert animate("-o", "a.mp4", *LENGTH, "--keep-run").code == 0
    shutil.rmtree("cache")
    assert animate("-o", "a.mp4", "--frames", "15", "--steps", "1", "--keep-run").code == 0
    assert len(loads) == 1
    assert len(list(Path("a.mp4.run").glob("prompt-*.safetensors"))) == 1


# --- going on with another placement -------------------------------------------------------------


def stop_before(monkeypatch: pytest.MonkeyPatch, chunk_index: int) -> None:
    """Let the next run be interrupted when it begins a chunk."""
    conditioning = Rollout._conditioning

    def interrupt(rollout: Rollout, state: Any, *driving: Any) -> Any:
        if state.next_chunk == chunk_index:
            monkeypatch.setattr(Rollout, "_conditioning", conditioning)
            raise KeyboardInterrupt
        return conditioning(rollout, state, *driving)

    monkeypatch.setattr(Rollout, "_conditioning", interrupt)


def test_a_run_goes_on_with_another_offload(
    animate: Animate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert animate("-o", "whole.mp4", *LENGTH).code == 0
    stop_before(monkeypatch, 1)
    assert animate("-o", "a.mp4", *LENGTH, "--offload", "disk").code == 130
    assert not list(place.rglob("offload-*"))
    (place / "a.mp4.run" / "offload-killed").mkdir()  # as a killed process leaves it
    done = animate("-o", "a.mp4", *LENGTH, "--offload", "group")
    assert done.code == 0
    assert "1 done already" in done.err
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert not (place / "a.mp4.run").exists()


def test_a_run_keeps_its_precision_unless_another_is_given(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert animate("-o", "whole.mp4", *LENGTH, "--precision", "fp8").code == 0
    stop_before(monkeypatch, 1)
    assert animate("-o", "a.mp4", *LENGTH, "--precision", "fp8").code == 130
    assert animate("-o", "a.mp4", *LENGTH, "--precision", "full") == Outcome(
        2,
        "",
        "error: --output a.mp4 has a run folder of another request: --precision was fp8, is full. "
        "Give the same options to continue it, another --output, or --no-resume to start again.\n",
    )
    done = animate("-o", "a.mp4", *LENGTH, "--json")  # left open
    assert done.code == 0
    assert json.loads(done.out)["placement"]["precision"] == "fp8"
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()


# --- out of memory -------------------------------------------------------------------------------


def test_out_of_memory_in_the_first_chunk_leaves_nothing(
    animate: Animate, place: Path, run_short_of_memory: Callable[[int], None]
) -> None:
    run_short_of_memory(1)
    done = animate("-o", "a.mp4", *LENGTH)
    assert (done.code, done.out) == (1, "")
    error = done.err.splitlines()[-1]
    assert error.startswith(
        "error: out of memory with precision full, offload none, VAE tiling off, text on device, "
        "estimated at "
    )
    assert error.endswith(
        " MiB. Run the same command with --offload disk, or give a --size below 64x48, or fewer "
        "--frames-per-chunk."
    )
    assert made_files(place) == []
    # Nothing is to be continued: whatever takes less memory may follow.
    assert animate("-o", "a.mp4", *LENGTH, "--precision", "fp8").code == 0


def test_out_of_memory_later_keeps_the_finished_chunks(
    animate: Animate, place: Path, run_short_of_memory: Callable[[int], None]
) -> None:
    assert animate("-o", "whole.mp4", *LENGTH).code == 0
    run_short_of_memory(2)
    done = animate("-o", "a.mp4", *LENGTH)
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].endswith(
        " MiB. 1 chunk is kept. Run the same command with --offload disk to go on."
    )
    assert not Path("a.mp4").exists()
    done = animate("-o", "a.mp4", *LENGTH, "--offload", "disk")
    assert done.code == 0
    assert "1 done already" in done.err
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert made_files(place) == ["a.json", "a.mp4", "whole.json", "whole.mp4"]


def test_out_of_memory_while_loading_is_told_alike(
    animate: Animate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(weights, "Placing", fail)
    done = animate("-o", "a.mp4", *LENGTH)
    assert done.code == 1
    assert "error: out of memory with precision full, offload none" in done.err
    assert made_files(place) == []


def test_another_error_is_no_shortage_of_memory(
    animate: Animate, run_short_of_memory: Callable[[int, type[RuntimeError]], None]
) -> None:
    run_short_of_memory(1, RuntimeError)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        animate("-o", "a.mp4", *LENGTH)
