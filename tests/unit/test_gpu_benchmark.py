"""Counting, building and bookkeeping of `tests/benchmarks/gpu.py`, and a short run on the CPU."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from benchmarks import gpu
from torch.utils.flop_counter import FlopCounterMode

from everanimate_cli.checkpoint import KINDS, dtype_in_memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def toy() -> gpu.Setup:
    return gpu.toy_setup()


@pytest.fixture(scope="module")
def full() -> gpu.Setup:
    return gpu.full_setup()


def total(work: list[gpu.Work], *, attention: bool | None = None) -> tuple[int, int]:
    """Operations and bytes of all of it, or of attention or the rest alone."""
    chosen = [each for each in work if attention in (None, each.is_attention)]
    return sum(each.flops for each in chosen), sum(each.num_bytes for each in chosen)


# --- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "full"])
def test_counted_work_is_that_of_the_network(name: str, request: pytest.FixtureRequest) -> None:
    """By hand and by running it on the meta device: operations, and bytes of all but attention."""
    setup = request.getfixturevalue(name)
    first, both = gpu.count_on_meta(setup, 1), gpu.count_on_meta(setup, 2)
    step = tuple(two - one for one, two in zip(first, both, strict=True))
    context = tuple(one - two for one, two in zip(first, step, strict=True))
    work = gpu.step_work(setup)
    attention_flops, _ = total(work, attention=True)
    other_flops, other_bytes = total(work, attention=False)
    assert step == (attention_flops + other_flops, attention_flops, other_bytes)
    context_flops, context_bytes = total(gpu.context_work(setup))
    assert context == (context_flops, 0, context_bytes)


def test_counted_work_on_the_cpu_has_merged_padding(toy: gpu.Setup) -> None:
    pipeline = gpu.build_pipeline(toy, CPU, torch.float32, ("transformer", "vae"))
    given = gpu.draw_conditioning(toy, CPU, torch.float32)
    counts = []
    for num_steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            sigmas = torch.linspace(1, 0, num_steps + 1)
            for _ in pipeline.denoise(gpu.draw_noise(toy), sigmas, given):
                pass
        by_kind = counter.get_flop_counts()["Global"]
        counts.append(
            sum(by_kind[kind] for kind in (torch.ops.aten.addmm, torch.ops.aten.convolution))
        )
    work = bench(toy).work
    assert counts[1] - counts[0] == total(work, attention=False)[0]
    whole, _ = total(gpu.step_work(toy), attention=True)
    assert total(work, attention=True)[0] < whole


def test_work_by_hand() -> None:
    assert gpu.linear("x", 2, 3, 5, times=7) == gpu.Work(
        part="x", flops=2 * 2 * 3 * 5 * 7, num_bytes=2 * 7 * (6 + 15 + 10)
    )
    # Scores [2, 3] over 5 channels, then their sum of the values; queries, keys, values, result.
    assert gpu.attention("x", 2, 3, 5, times=7, itemsize=4) == gpu.Work(
        part="x",
        flops=7 * (2 * 2 * 3 * 5 + 2 * 2 * 3 * 5),
        num_bytes=4 * 7 * (10 + 15 + 15 + 10),
        is_attention=True,
    )


def test_the_released_model_at_its_size(full: gpu.Setup) -> None:
    assert full.num_slots * full.tokens_per_slot == 37_440
    flops, num_bytes = total(gpu.step_work(full))
    assert flops == 2_101_844_275_363_840
    assert num_bytes > 2 * 14e9  # at least the weights
    self_attention = sum(
        each.flops for each in gpu.step_work(full) if each.part == "self attention"
    )
    assert self_attention / flops == pytest.approx(0.546, abs=0.001)
    numbers = {
        name: sum(value.numel() for value in network.parameters())
        for name, network in full.empty.items()
    }
    assert numbers == {
        "transformer": 17_274_816_884,
        "vae": 126_892_531,
        "text_encoder": 5_680_910_336,
        "image_encoder": 630_766_080,
    }


def test_once_per_chunk_is_counted_too(toy: gpu.Setup) -> None:
    flops = gpu.once_flops(toy)
    assert min(flops.values()) > 0
    # A picture has one frame, the pose of a chunk 21; a causal VAE does the first one alone.
    ratio = flops["VAE encode, pose of a chunk"] / flops["VAE encode, one picture"]
    assert 5 < ratio < 21


# --- building ------------------------------------------------------------------------------------


def test_networks_are_as_if_loaded(toy: gpu.Setup) -> None:
    for name in toy.configs:
        network = gpu.build_network(toy, name, CPU, torch.bfloat16)
        for key, value in network.named_parameters():
            assert value.dtype == dtype_in_memory(name, key, torch.bfloat16), key
            assert value.isfinite().all()
            assert value.any(), f"{name}.{key} is zero"
        again = gpu.build_network(toy, name, CPU, torch.bfloat16)
        for key, value in again.state_dict().items():
            torch.testing.assert_close(value, network.state_dict()[key], rtol=0, atol=0)
        # Buffers, which no file holds, are those of a network that was built as usual.
        kind, config = KINDS[name], dict(toy.configs[name])
        usual = (
            kind.network_class.from_config(config)
            if kind.config_class is None
            else kind.network_class(kind.config_class.from_dict(config))
        )
        for key, value in usual.named_buffers():
            torch.testing.assert_close(network.get_buffer(key), value, rtol=0, atol=0)


def test_velocity_has_the_size_of_noise(toy: gpu.Setup) -> None:
    """Else rounding would be measured on numbers unlike the model's."""
    pipeline = gpu.build_pipeline(toy, CPU, torch.float32, ("transformer", "vae"))
    given = gpu.draw_conditioning(toy, CPU, torch.float32)
    noise = gpu.draw_noise(toy)
    (latents,) = pipeline.denoise(noise, torch.tensor([1.0, 0.0]), given)
    assert 0.2 < (noise - latents).std() < 5


# --- bookkeeping ---------------------------------------------------------------------------------

CARD = gpu.Card(
    name="NVIDIA H100 80GB HBM3",
    date="2026-01-01 00:00 UTC",
    driver="580.1",
    memory_mib=80_000.0,
    versions={"torch": "2.9", "av": None},
    sheet_flops=1e15,
    sheet_bandwidth=2e12,
    measured_flops=8e14,
    measured_bandwidth=1.9e12,
)


def bench(setup: gpu.Setup, path: Path | None = None, left_s: float = 1e6) -> gpu.Bench:
    return gpu.Bench(
        setup=setup,
        device=CPU,
        dtype=torch.float32,
        card=CARD,
        report=gpu.Report(path, config=setup.name),
        num_steps=2,
        repeats=1,
        ends_s=gpu.time.monotonic() + left_s,
    )


def test_the_floor_is_the_larger_of_two(toy: gpu.Setup) -> None:
    assert CARD.floor_s(2e15, 2e12) == 2.0
    assert CARD.floor_s(1e15, 6e12) == 3.0
    rate = bench(toy).rate(4.0, 2e15, 2e12)
    assert rate["over_floor"] == 2.0
    assert rate["utilisation"] == 0.5
    assert rate["tera_flops_per_s"] == 500


@pytest.mark.parametrize(
    ("name", "tera_flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_cards_by_name(name: str, tera_flops: float | None) -> None:
    found = gpu.look_up_card(name)
    assert (None if found is None else found[0] / 1e12) == tera_flops


def test_unknown_cards_are_measured() -> None:
    card = gpu.describe_card(CPU, torch.float32)
    assert card.sheet_flops is None
    assert card.peak_flops == card.measured_flops > 1e9
    assert card.peak_bandwidth == card.measured_bandwidth > 1e8


def test_each_result_is_on_disk_at_once(toy: gpu.Setup, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    run = bench(toy, path)

    def results() -> list[dict]:
        return json.loads(path.read_text())["results"]

    assert results() == []
    run.case("step", "good", lambda: {"seconds": 1.0})
    assert [(each["case"], each["seconds"]) for each in results()] == [("good", 1.0)]

    def cut_off() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.case("step", "cut off", cut_off)
    assert [each["case"] for each in results()] == ["good"]
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]


def test_a_failure_is_a_result(
    toy: gpu.Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench(toy, tmp_path / "figures.json")

    def fail(*_: object) -> dict:
        raise torch.OutOfMemoryError("out of memory\nmore")

    run.case("step", "bad", fail)
    run.case("step", "good", lambda: {"seconds": 1.0})
    monkeypatch.setitem(gpu.PARTS, "vae", fail)
    run.run_part("vae")
    assert run.has_failed
    bad, good, part = run.report.results
    assert bad["failed"] == "OutOfMemoryError: out of memory"
    assert "in fail" in "\n".join(bad["trace"])
    assert good["seconds"] == 1.0
    assert (part["part"], part["failed"]) == ("vae", "OutOfMemoryError: out of memory")
    text = gpu.lay_out_results(run.report.results)
    assert "| good | 1 |" in text
    assert "step, bad: failed: OutOfMemoryError: out of memory" in text


def test_what_would_not_be_done_in_time_is_left_out(toy: gpu.Setup) -> None:
    run = bench(toy, left_s=5)
    run.case("step", "long", lambda: pytest.fail("was begun"), needs_s=60)
    run.case("step", "short", lambda: {"seconds": 1.0}, needs_s=1)
    long, short = run.report.results
    assert long["skipped"] == "needs about 60 s, 5 s are left"
    assert "seconds" in short
    assert not run.has_failed


def test_errors_above_the_limit_fail() -> None:
    value, far = torch.ones(4), torch.full((4,), 1.5)
    assert gpu.compare(value, value, 0.1)["relative_error"] == 0
    for wrong in (far, torch.full((4,), torch.nan)):
        with pytest.raises(ArithmeticError, match="relative error"):
            gpu.compare(wrong, value, 0.1)


def test_the_fastest_kernel_is_that_of_the_shortest_step() -> None:
    results = [
        {"part": "attention", "case": "sdpa, alone", "seconds": 0.1},
        {"part": "attention", "case": "sdpa, step", "seconds": 3.0},
        {"part": "attention", "case": "sage, step", "seconds": 2.0},
        {"part": "attention", "case": "flash, step", "failed": "no"},
        {"part": "step", "case": "default, step", "seconds": 1.0},
    ]
    assert gpu.fastest_attention(results) == "sage"
    assert gpu.fastest_attention([]) is None


def test_a_checkout_can_be_imported_without_installing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = list(sys.path)
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setattr(gpu, "_version", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    gpu.make_importable(tmp_path)
    assert path[-2:] == [str(gpu.REPOSITORY), str(tmp_path)]
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("everanimate", importlib.metadata.version("everanimate"))


def test_presets_are_held_to_their_card(toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card with 20 GB, whose memory is only pretended."""
    held = mock.create_autospec(torch.cuda.set_per_process_memory_fraction)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 3 * 2**20)
    monkeypatch.setattr(gpu, "peak_mib", lambda _: 2.0)
    run = bench(toy)
    run.card = replace(CARD, memory_mib=20e9 / 2**20)
    gpu.run_presets(run)
    results = {each["case"]: each for each in run.report.results}
    assert not run.has_failed, run.report.results
    assert [case for case, each in results.items() if "skipped" in each] == ["80", "48", "24"]
    assert results["16"]["limit_mib"] == pytest.approx(16e9 / 2**20)
    assert results["16"]["peak_mib"] == 2
    assert results["16"]["reserved_mib"] == 3
    shares = [call.args[0] for call in held.call_args_list]
    assert shares == pytest.approx([0.8, 1, 0.6, 1, 0.4, 1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--parts step,stop", "--parts stop is unknown. Known: parity, step,"),
        ("--repeats 0", "--repeats 0 is not above 0"),
        ("--config full --device cpu", "--config full needs a CUDA card. Give --config toy."),
    ],
)
def test_wrong_options(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.parse_options(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- runs ----------------------------------------------------------------------------------------


def run_here(path: Path, parts: str) -> tuple[int, dict[tuple[str, str], dict]]:
    words = f"--config toy --device cpu --repeats 1 --steps 4 --parts {parts} --json {path}"
    code = gpu.main(words.split())
    results = json.loads(path.read_text())["results"]
    return code, {(each["part"], each["case"]): each for each in results}


def test_steps_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = run_here(tmp_path / "figures.json", "step,cache,chunk,presets")
    assert code == 0, results
    step = results["step", "default"]
    assert step["floor_s"] * step["over_floor"] == pytest.approx(step["seconds"])
    cache = results["cache", "step on average, as many skipped as may be"]
    assert (cache["steps"], cache["skipped_steps"]) == (4, 2)
    assert cache["skipped_step_s"] < cache["computed_step_s"]
    chunk = results["chunk", "second chunk"]
    assert 0 < chunk["beside_steps_s"] < chunk["seconds"]
    presets = [case for part, case in results if part == "presets"]
    assert presets == ["80", "48", "24", "16", "12", "8"]
    assert results["presets", "24"]["estimate_mib"] < results["presets", "80"]["estimate_mib"]
    out = capsys.readouterr().out
    assert "| a step | TFLOP | share |" in out
    assert "| second chunk |" in out


def test_a_bare_machine_needs_little(tmp_path: Path) -> None:
    """Neither the package nor PyAV and others are installed."""
    site = str(Path(torch.__file__).parents[1])
    block = "; ".join(
        f"sys.modules[{name!r}] = None"
        for name in ("av", "onnxruntime", "onnx", "typer", "rich", "matplotlib")
    )
    run = "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    # Without `site` nobody reads the file that leads to an editable installation.
    code = f"import runpy, sys; sys.path.append({site!r}); {block}; {run}"
    path = tmp_path / "figures.json"
    words = ["--config", "toy", "--device", "cpu", "--parts", "toy", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, gpu.__file__, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(path.read_text())["results"]
    assert result["by"] == "chunk loop"
    assert result["mean_difference"] == 0


@pytest.mark.slow
def test_all_parts_on_the_cpu(tmp_path: Path) -> None:
    code, results = run_here(tmp_path / "figures.json", ",".join(gpu.PARTS))
    assert code == 0, results
    assert {part for part, _ in results} == set(gpu.PARTS)
    assert results["toy", "float32"]["by"] == "animate"
