"""Options that make a video faster: each is seen to work, and says what it cannot do."""

import json
import shutil
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import load_file, save_file
from studio import Animate, frames_of
from tiny import INNER_DIM

from everanimate_cli import acceleration, console
from everanimate_cli.events import ChunkDone, ChunkStarted, Event, StepDone
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.rollout import Rollout

THREE_CHUNKS = ("--frames", "15", "--no-audio")
CACHED = ("--steps", "8", "--step-cache", "mag", "--step-cache-threshold", "0.5")


def content(folder: str) -> dict[str, bytes]:
    """The chunks of a run folder with their states."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("0*")}


def facts_of(name: str) -> dict[str, Any]:
    return json.loads(Path(name).with_suffix(".json").read_text())["result"]


# --- attention and compilation -------------------------------------------------------------------


def test_attention_reaches_the_network(animate: Animate, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        kernel = _AttentionBackendRegistry._backends[name]
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends,
            name,
            lambda *args, kernel=kernel, name=name, **kwargs: (
                calls.update([name.value]) or kernel(*args, **kwargs)
            ),
        )
    assert animate("-o", "a.mp4", "--frames", "5").code == 0
    assert set(calls) == {"native"}
    num_calls = calls.total()
    calls.clear()
    assert animate("-o", "b.mp4", "--frames", "5", "--attention", "sdpa-math").code == 0
    assert calls == {"_native_math": num_calls}
    assert facts_of("a.mp4")["speed"]["attention"] == "sdpa"
    assert facts_of("b.mp4")["speed"]["attention"] == "sdpa-math"
    assert np.abs(frames_of("a.mp4").astype(int) - frames_of("b.mp4")).max() <= 2


def test_a_kernel_that_is_not_installed_is_refused_before_anything_is_loaded(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everanimate_cli.speed_settings.find_spec", lambda _: None)
    monkeypatch.setattr("everanimate_cli.preflight.check_model", lambda _: pytest.fail("too late"))
    done = animate("--attention", "flash3")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: --attention flash3 needs the package flash_attn_interface, which is not installed. "
        "To install it: build the folder `hopper` of github.com/Dao-AILab/flash-attention. Or give "
        "auto, which takes what is there.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--attention", "sdpa-cudnn"],
            "--attention sdpa-cudnn needs --device cuda, and the networks run on cpu. Give sdpa or "
            "auto.",
        ),
        (
            ["--step-cache-threshold", "0.2"],
            "--step-cache-threshold 0.2 has no effect without --step-cache. Give --step-cache mag.",
        ),
        (
            ["--step-cache", "mag", "--step-cache-threshold", "-1"],
            "--step-cache-threshold -1.0 is too small. Give 0 or more.",
        ),
    ],
)
def test_what_cannot_be_is_one_line(animate: Animate, words: list[str], message: str) -> None:
    done = animate("--device", "cpu", *words)
    assert (done.code, done.out, done.err) == (2, "", f"error: {message}\n")


def test_blocks_are_compiled(animate: Animate, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = partial(acceleration.compile_blocks, backend=backend)
    monkeypatch.setattr(acceleration, "compile_blocks", compiled)
    torch._dynamo.reset()
    assert animate("-o", "plain.mp4", *THREE_CHUNKS).code == 0
    assert not graphs
    assert animate("-o", "compiled.mp4", *THREE_CHUNKS, "--compile").code == 0
    assert len(graphs) == 2  # a block and a face adapter, for all chunks
    assert np.abs(frames_of("plain.mp4").astype(int) - frames_of("compiled.mp4")).max() <= 2


def test_without_a_compiler_nothing_is_begun(
    animate: Animate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    before = sorted(place.iterdir())
    done = animate("--compile")
    assert done.code == 2
    assert done.err.startswith("error: --compile needs /nowhere/Python.h, which is missing.")
    assert sorted(place.iterdir()) == before


# --- step cache ----------------------------------------------------------------------------------


def test_the_step_cache_skips_and_its_threshold_0_does_not(animate: Animate) -> None:
    words = (*THREE_CHUNKS, "--steps", "8")
    assert animate("-o", "plain.mp4", *words).code == 0
    assert animate("-o", "zero.mp4", *words, *CACHED[2:4], "--step-cache-threshold", "0").code == 0
    assert animate("-o", "cached.mp4", *words, *CACHED[2:]).code == 0
    assert Path("zero.mp4").read_bytes() == Path("plain.mp4").read_bytes()
    plain, cached = frames_of("plain.mp4").astype(int), frames_of("cached.mp4")
    np.testing.assert_array_equal(plain[:9], cached[:9])  # the first chunk measures
    assert np.abs(plain[9:] - cached[9:]).max() > 2
    assert facts_of("cached.mp4")["speed"]["step_cache"] == "mag 0.5"


def test_a_resumed_run_skips_the_same_steps(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*THREE_CHUNKS, *CACHED, "--keep-run")
    assert animate("-o", "whole.mp4", *words).code == 0
    ratios = load_file("whole.mp4.run/00002.safetensors")["step_ratios"]
    assert ratios.shape == (1, 8)
    for num_finished in (1, 2):
        generate = Rollout._conditioning

        def stop(rollout: Rollout, state: Any, *rest: Any, n: int = num_finished) -> Any:
            if state.next_chunk == n:
                raise KeyboardInterrupt
            return generate(rollout, state, *rest)  # noqa: B023  # used in this round only

        with monkeypatch.context() as patch:
            patch.setattr(Rollout, "_conditioning", stop)
            assert animate("-o", "anna.mp4", *words).code == 130
        assert len(list(Path("anna.mp4.run").glob("0*.safetensors"))) == num_finished
        assert animate("-o", "anna.mp4", *words).code == 0
        assert Path("anna.mp4").read_bytes() == Path("whole.mp4").read_bytes()
        assert content("anna.mp4.run") == content("whole.mp4.run")
        shutil.rmtree("anna.mp4.run")
        Path("anna.mp4").unlink()


def test_options_that_change_pixels_belong_to_the_run(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "_conditioning", stop)
        assert animate("-o", "a.mp4", *THREE_CHUNKS).code == 130
    done = animate("-o", "a.mp4", *THREE_CHUNKS, "--attention", "sdpa-math", "--step-cache", "mag")
    assert done.code == 2
    assert "--attention was sdpa, is sdpa-math; --step-cache was off, is mag; " in done.err
    assert "--step-cache-threshold was not given, is 0.12." in done.err
    assert animate("-o", "a.mp4", *THREE_CHUNKS, "--attention", "sdpa", "--no-concurrent").code == 0


# --- the fast preset -----------------------------------------------------------------------------


def write_lora(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 2, INNER_DIM, generator=generator)
    layer = "diffusion_model.blocks.0.self_attn.o"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up.T.contiguous()}, path)


def test_fast_takes_the_models_steps_and_lora_and_explicit_options_win(
    animate: Animate, place: Path, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, "mine")
    for name in ("own", "fast", "other"):
        write_lora(place / f"{name}.safetensors", len(name))
    defaults = json.loads(Path("mine/everanimate.json").read_text())
    defaults |= {"lora": [str(place / "own.safetensors")], "fast_steps": 3}
    defaults |= {"fast_lora": [str(place / "fast.safetensors")]}
    Path("mine/everanimate.json").write_text(json.dumps(defaults))
    loras = ("--lora", "own.safetensors", "--lora", "fast.safetensors")

    def make(name: str, *words: str) -> bytes:
        done = animate("-o", name, "--frames", "5", "--model", "mine", *words)
        assert done.code == 0, done.err
        assert "step-distilled" not in done.err
        return Path(name).read_bytes()

    fast = make("fast.mp4", "--fast")
    assert facts_of("fast.mp4")["speed"]["steps"] == "3 by --fast"
    assert fast == make("a.mp4", "--steps", "3", *loras)
    explicit = ("--steps", "1", "--lora", "other.safetensors")
    assert make("c.mp4", "--fast", *explicit) == make("d.mp4", *explicit)
    plan = animate("--model", "mine", "--fast", "--dry-run").out
    assert "steps: 3\n" in plan
    assert "speed: steps 3 by --fast, guidance off," in plan


def test_fast_without_a_distilled_lora_says_so(animate: Animate) -> None:
    done = animate("--fast", "--dry-run")
    assert done.code == 0
    assert done.err == (
        "--fast: no step-distilled LoRA is known for tiny, so that 6 steps instead of 2 cost "
        "quality\n"
    )


# --- concurrency ---------------------------------------------------------------------------------


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "_count_cores", lambda: 64)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("words", "num_deferred"),
    [
        ([], 1),
        (["--clip-image", "reference"], 2),
        (["--memory", "sink", "--clip-image", "reference", "--pose-beside"], 3),
        (["--memory", "pixel", "--carry-frames", "5"], 1),
    ],
)
def test_concurrent_work_makes_the_same_bytes(
    animate: Animate, monkeypatch: pytest.MonkeyPatch, words: list[str], num_deferred: int
) -> None:
    decoding: list[bool] = []
    decode = AnimatePipeline.decode

    def noted(pipeline: AnimatePipeline, latents: torch.Tensor) -> torch.Tensor:
        decoding.append(threading.current_thread() is threading.main_thread())
        return decode(pipeline, latents)

    monkeypatch.setattr(AnimatePipeline, "decode", noted)
    assert animate("-o", "a.mp4", *THREE_CHUNKS, "--keep-run", *words).code == 0
    assert decoding.count(False) == num_deferred
    assert len(decoding) == 3
    decoding.clear()
    assert animate("-o", "b.mp4", *THREE_CHUNKS, "--keep-run", *words, "--no-concurrent").code == 0
    assert decoding == [True] * 3
    assert content("a.mp4.run") == content("b.mp4.run")
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize("words", [(), ("--no-concurrent",)], ids=["concurrent", "in turn"])
def test_poses_beside_the_result_are_decoded_once(
    animate: Animate, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """They used to be read again for the picture, from the key frame before the chunk."""
    from everanimate_cli.video import VideoReader  # noqa: PLC0415  # after the fixtures

    read, calls = VideoReader.read, Counter[VideoReader]()

    def count(reader: VideoReader, indices: Any) -> Any:
        calls[reader] += 1
        return read(reader, indices)

    monkeypatch.setattr(VideoReader, "read", count)
    beside = ("-o", "a.mp4", "--no-audio", "--pose-beside", "--keep-run", *words)
    assert animate(*beside, "--frames", "15").code == 0
    assert sorted(calls.values()) == [3, 3]  # pose and face of three chunks
    # A chunk that is only encoded again has no network to read for.
    calls.clear()
    assert animate(*beside, "--frames", "12", "--overwrite").code == 0
    assert sorted(calls.values()) == [1]


@pytest.mark.usefixtures("many_cores")
def test_a_chunk_is_written_while_the_next_one_is_sampled(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing of the first chunk waits for a step of the second, which would else hang."""
    from everanimate_cli import generation as worker  # noqa: PLC0415  # after the fixtures

    stepped = threading.Event()
    write, events = worker.write_segment, list[Event]()

    def wait(run: Any, chunk_index: int, *rest: Any) -> None:
        if chunk_index == 0:
            assert stepped.wait(20)
        write(run, chunk_index, *rest)

    def report(_reporter: Any, event: Event) -> None:
        events.append(event)
        if (
            isinstance(event, StepDone)
            and ChunkStarted(chunk_index=1, num_chunks=3, num_steps=2) in events
        ):
            stepped.set()

    monkeypatch.setattr(worker, "write_segment", wait)
    monkeypatch.setattr(console.LineReporter, "__call__", report)
    assert animate("-o", "a.mp4", *THREE_CHUNKS).code == 0
    done = [event.chunk_index for event in events if isinstance(event, ChunkDone)]
    assert done == [0, 1, 2]
    kinds = [type(event) for event in events]
    assert kinds.count(ChunkStarted) == 3
    first_done, second = kinds.index(ChunkDone), kinds.index(ChunkStarted, 2)
    assert second < first_done


@pytest.mark.usefixtures("many_cores")
def test_an_error_of_the_writer_ends_the_run_and_keeps_the_chunks_before(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everanimate_cli import generation as worker  # noqa: PLC0415

    write = worker.write_segment

    def fail(run: Any, chunk_index: int, *rest: Any) -> None:
        if chunk_index == 1:
            raise OSError(28, "No space left on device", "disk")
        write(run, chunk_index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "write_segment", fail)
        done = animate("-o", "a.mp4", *THREE_CHUNKS)
    assert done.code == 1
    assert "disk full" in done.err
    assert [path.name for path in Path("a.mp4.run").glob("0*.safetensors")] == ["00000.safetensors"]
    assert animate("-o", "a.mp4", *THREE_CHUNKS).code == 0
    assert animate("-o", "b.mp4", *THREE_CHUNKS).code == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
