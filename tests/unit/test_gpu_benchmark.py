"""Counting, building and bookkeeping of `tests/benchmarks/gpu.py`, and a short run on the CPU."""

import contextlib
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from torch.utils.flop_counter import FlopCounterMode

from everanimate_cli import acceleration
from everanimate_cli.checkpoint import KINDS, dtype_in_memory
from everanimate_cli.narrow_linear import store_as_fp8

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


def test_errors_above_the_limit_exceed_and_are_kept(toy: gpu.Setup) -> None:
    value, far = torch.ones(4), torch.full((4,), 1.5)
    assert gpu.compare(value, value, 0.1) == {"relative_error": 0, "limit": 0.1}
    assert gpu.compare(far, value, 0.1)["exceeded"] == "relative error 5.00e-01 is above 1e-01"
    assert "exceeded" in gpu.compare(torch.full((4,), torch.nan), value, 0.1)
    run = bench(toy)
    run.case("parity", "near", lambda: gpu.compare(value, value, 0.1))
    assert not run.has_failed
    run.case("parity", "far", lambda: gpu.compare(far, value, 0.1))
    assert run.has_failed
    text = gpu.lay_out_results(run.report.results)
    assert "| far (EXCEEDED) | 5.0e-01 |" in text
    assert "parity, far: exceeded: relative error 5.00e-01 is above 1e-01" in text


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
    # Where part "attention" was run by another call, part "compile" has measured this itself.
    alone = [
        {"part": "compile", "case": f"{name}, alone, not compiled", "seconds": seconds}
        for name, seconds in (("sdpa", 0.2), ("flash", 0.1))
    ]
    assert gpu.fastest_attention(alone) == "flash"
    assert gpu.fastest_attention([*results, *alone]) == "sage"


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


def test_fp8_products_are_told_the_card(toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were called without it, which no machine without torchao noticed."""
    multiplied: list[object] = []

    def multiply(block: torch.nn.Module) -> None:
        multiplied.append(block)
        store_as_fp8(block)

    def compile_nothing(_: object) -> None:
        """In place of minutes; whether blocks can be compiled is tested elsewhere."""

    monkeypatch.setattr(gpu, "why_not_fp8", lambda *_: None)
    monkeypatch.setattr(gpu, "why_not_compile", lambda *_: None)
    monkeypatch.setattr(acceleration, "check_fp8_matmul", lambda *_: None)
    monkeypatch.setattr(acceleration, "multiply_in_fp8", multiply)
    monkeypatch.setattr(acceleration, "compile_blocks", compile_nothing)
    run = bench(toy)
    small = toy.shrunk()
    gpu.compare_velocities(run, small, gpu.build_network(small, "vae", CPU, torch.float32))
    gpu.run_fp8(run)
    assert not run.has_failed, run.report.results
    cases = {(each["part"], each["case"]): each for each in run.report.results}
    assert 1e-3 < cases["parity", "products in fp8"]["relative_error"] < gpu.FP8_LIMIT
    assert cases["fp8", "products in fp8"]["seconds"] > 0
    assert cases["fp8", "products in fp8, compiled"]["seconds"] > 0
    num_blocks, num_small = (int(each.config("transformer").num_layers) for each in (toy, small))
    assert len(multiplied) == num_small + 2 * num_blocks


class PretendedCard:
    """Memory of a card that is not there, in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory_mib: float) -> None:
        self.peak_mib = 20.0
        self.reserved_mib = 30.0
        self.outside_mib = 500.0
        self.retries = 0
        self.shares: list[float] = []
        self.card = replace(CARD, memory_mib=memory_mib)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.shares.append)
        monkeypatch.setattr(gpu, "peak_mib", lambda _: self.peak_mib)
        monkeypatch.setattr(gpu, "reserved_mib", lambda _: self.reserved_mib)
        monkeypatch.setattr(gpu, "outside_mib", lambda _: self.outside_mib)
        monkeypatch.setattr(
            gpu, "count_shortages", lambda _: {"alloc_retries": self.retries, "ooms": 0}
        )


def test_presets_are_held_to_their_card(toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card with 20 GB: what is held back includes the context."""
    whole_mib = 20e9 / 2**20
    pretended = PretendedCard(monkeypatch, whole_mib)
    run = bench(toy)
    run.card = pretended.card
    gpu.run_presets(run)
    results = {each["case"]: each for each in run.report.results}
    assert not run.has_failed, run.report.results
    assert list(results) == ["8", "16", "24", "12", "48", "80"]
    assert [case for case, each in results.items() if "skipped" in each] == ["24", "48", "80"]
    context = 500 / whole_mib
    assert pretended.shares == pytest.approx([0.4 - context, 1, 0.8 - context, 1, 0.6 - context, 1])
    sixteen = results["16"]
    assert sixteen["limit_mib"] == pytest.approx(16e9 / 2**20)
    assert (sixteen["peak_mib"], sixteen["reserved_mib"], sixteen["outside_mib"]) == (20, 30, 500)
    assert (sixteen["alloc_retries"], sixteen["ooms"]) == (0, 0)
    # On smaller cards text is not the card's business.
    assert list(sixteen["phase_peaks_mib"]) == ["text", "encode", "denoise", "decode"]
    assert list(results["8"]["phase_peaks_mib"]) == ["encode", "denoise", "decode"]
    assert "| card MiB | retries | OOMs |" in gpu.lay_out_results(run.report.results)


def test_the_card_is_given_back_when_a_preset_fails(
    toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = PretendedCard(monkeypatch, 20e9 / 2**20)

    def run_out(*_: object, **__: object) -> None:
        pretended.retries += 2
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu.Bench, "measure_steps", run_out)
    run = bench(toy)
    run.card, run.presets = pretended.card, ["8"]
    gpu.run_presets(run)
    (failed,) = run.report.results
    assert failed["failed"] == "OutOfMemoryError: CUDA out of memory"
    assert (failed["alloc_retries"], failed["reserved_mib"]) == (2, 30)
    assert pretended.shares[-1] == 1


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        ({"peak_mib": 2000 * 1.09}, None),
        ({"peak_mib": 2000 * 1.11}, "peak of 2220 MiB, 1.11 times the estimate of 2000 MiB"),
        # The work space of libraries is no reason in the smallest of networks.
        ({"peak_mib": 100, "estimate_mib": 30}, None),
        (
            {"peak_mib": 200, "estimate_mib": 30},
            "peak of 200 MiB, 6.67 times the estimate of 30 MiB",
        ),
        ({"reserved_mib": 7400}, None),
        (
            {"reserved_mib": 7600},
            "7600 MiB reserved and 500 MiB beside them on a card of 8000 MiB",
        ),
        ({"peak_mib": None, "reserved_mib": None, "outside_mib": None, "limit_mib": None}, None),
    ],
)
def test_presets_above_their_estimate_or_card_exceed(
    taken: dict[str, float | None], reason: str | None
) -> None:
    figures = {
        "peak_mib": 1900,
        "estimate_mib": 2000,
        "reserved_mib": 5000,
        "outside_mib": 500,
        "limit_mib": 8000,
        **taken,
    }
    assert gpu.exceeded_memory(figures) == ([] if reason is None else [reason])


def test_a_preset_that_exceeds_is_marked_with_its_figures(
    toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = PretendedCard(monkeypatch, 20e9 / 2**20)
    pretended.peak_mib = 4000.0
    run = bench(toy)
    run.card, run.presets = pretended.card, ["12"]
    gpu.run_presets(run)
    (result,) = run.report.results
    assert run.has_failed
    assert result["peak_mib"] == 4000
    assert result["seconds"] > 0
    assert result["exceeded"].startswith("peak of 4000 MiB, ")
    assert "| 12 (EXCEEDED) |" in gpu.lay_out_results(run.report.results)


def test_pinned_memory_goes_back_between_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next preset finds none to pin. Not all releases of torch can do it."""
    emptied = []
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    gpu.give_back(torch.device("cuda"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append(1), raising=False)
    gpu.give_back(CPU)
    assert emptied == []
    gpu.give_back(torch.device("cuda"))
    assert emptied == [1]


def test_parts_are_taken_as_soon_as_they_are_drawn(toy: gpu.Setup) -> None:
    """As loading does, so that a card never holds more than one of them."""
    taken = []

    def take(name: str, part: torch.nn.Module) -> None:
        assert not any(value.is_meta for value in part.parameters())
        taken.append((name, dict(part.named_parameters())))

    network = gpu.build_network(toy, "transformer", CPU, torch.float32, take=take)
    expected = [
        *(f"blocks.{index}" for index in range(len(network.blocks))),
        *(f"face_adapter.{index}" for index in range(len(network.face_adapter))),
    ]
    assert sorted(name for name, _ in taken) == sorted(expected)
    plain = gpu.build_network(toy, "transformer", CPU, torch.float32).state_dict()
    for name, parameters in taken:
        for key, value in parameters.items():
            torch.testing.assert_close(value, plain[f"{name}.{key}"], rtol=0, atol=0)


# --- several calls -------------------------------------------------------------------------------


def test_a_case_is_cut_off_at_the_end_of_the_time(
    toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it catches all errors; what was measured before is kept, the rest is named."""

    def hang(run: gpu.Bench) -> None:
        def forever() -> dict:
            for _ in range(500):
                with contextlib.suppress(Exception):
                    time.sleep(0.01)
            pytest.fail("was not cut off")

        run.case("step", "short", lambda: {"seconds": 1.0})
        run.case("step", "long", forever)
        run.case("step", "later", lambda: pytest.fail("was begun"))

    monkeypatch.setitem(gpu.PARTS, "step", hang)
    run = bench(toy, left_s=0.2)
    handler = signal.getsignal(signal.SIGALRM)
    with gpu.timed_out_at(run):
        run.run_part("step")
        run.run_part("vae")
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    outcomes = [(each["case"], each.get("late", False)) for each in run.report.results]
    assert outcomes == [("short", False), ("long", True), ("later", True), ("all cases", True)]
    assert not run.has_failed
    assert gpu.count_results(run.report.results, "step")["left_out"] == 2
    assert set(run.report.record["parts"]) == {"step", "vae"}
    text = gpu.lay_out_left_out(run.report.results)
    assert text.startswith("Left out: step: long; step: later; vae: all cases. ")
    assert text.endswith("python tests/benchmarks/gpu.py --parts step,vae\n")


def test_no_part_is_begun_on_a_lost_card(toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would only fail, and hide that it can be run alone."""

    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "synchronize", fail)
    monkeypatch.setitem(gpu.PARTS, "vae", lambda _: pytest.fail("was begun"))
    run = bench(toy)
    run.run_part("vae")
    assert not run.has_failed
    text = gpu.lay_out_left_out(run.report.results)
    assert text == "Left out: vae: all cases. Alone: python tests/benchmarks/gpu.py --parts vae\n"


def test_presets_without_time_are_named() -> None:
    late = [
        {"part": "presets", "case": case, "skipped": "x", "late": True} for case in ("48", "80")
    ]
    assert "gpu.py --parts presets --presets 48,80\n" in gpu.lay_out_left_out(late)
    assert gpu.lay_out_left_out([{"part": "vae", "case": "x", "skipped": "no card"}]) == ""


def test_what_json_cannot_hold_costs_no_other_figure(toy: gpu.Setup, tmp_path: Path) -> None:
    run = bench(toy, tmp_path / "figures.json")
    run.case("step", "odd", lambda: {"seconds": 1.0, "kind": torch.float32, "peak_mib": "much"})
    run.case("step", "good", lambda: {"seconds": 2.0})
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [each["seconds"] for each in results] == [1, 2]
    assert "| odd | 1 | much |" in gpu.lay_out_results(run.report.results)


def test_a_part_that_cannot_prepare_has_the_others_still(
    toy: gpu.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu, "once_flops", fail)
    monkeypatch.setattr(gpu, "compare_velocities", fail)
    run = bench(toy)
    run.run_part("parity")
    run.run_part("vae")
    assert run.has_failed
    results = {(each["part"], each["case"]): each for each in run.report.results}
    assert results["parity", "velocities"]["failed"] == "RuntimeError: no kernel"
    assert results["parity", "VAE in float32"]["relative_error"] == 0
    assert results["vae", "counting operations"]["failed"] == "RuntimeError: no kernel"
    decoded = results["vae", "VAE decode, a chunk"]
    assert decoded["seconds"] > 0
    assert "over_floor" not in decoded


def record(name: str, results: list[dict], **parts: dict) -> dict:
    """As a run writes it."""
    work = [asdict(each) for each in gpu.step_work(gpu.toy_setup())]
    card = {**asdict(CARD), "name": name}
    return {"card": card, "title": "toy.", "work": work, "parts": parts, "results": results}


def test_files_of_several_calls_are_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = {"skipped": "needs about 9 s, 0 s are left", "late": True}
    first = [
        {"part": "step", "case": "default", "seconds": 3.5},
        {"part": "presets", "case": "8", "seconds": 7.0},
        {"part": "presets", "case": "16", **late},
        {"part": "toy", "case": gpu.ALL, **late},
        {"part": "cache", "case": gpu.STEPS, **late},
        {"part": "cache", "case": "x", "seconds": 1.0},
    ]
    second = [
        {"part": "presets", "case": "8", **late},
        {"part": "presets", "case": "16", "seconds": 6.0, "exceeded": "peak of 9 MiB"},
        {"part": "toy", "case": "float32", "seconds": 2.0},
        {"part": "vae", "case": "decode", **late},
    ]
    paths = []
    for index, (results, parts) in enumerate(
        [
            (first, {"step": {"took_s": 9.0}, "presets": {"took_s": 50.0}}),
            (second, {"presets": {"took_s": 40.0}, "toy": {"took_s": 2.0}}),
        ]
    ):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(json.dumps(record("NVIDIA H100", results, **parts)))
    merged = tmp_path / "all.json"
    assert gpu.main(["--merge", *map(str, paths), "--json", str(merged)]) == 0
    out = capsys.readouterr().out
    for line in ("| default | 3.5 |", "| 8 | 7 |", "| 16 (EXCEEDED) | 6 |", "| float32 | 2 |"):
        assert line in out
    assert "presets, 16: exceeded: peak of 9 MiB" in out
    assert "| presets | 90.0 | 1 | 1 | 0 | 0 | 0 |" in out
    assert "Left out: cache: steps; vae: decode. Alone: " in out
    # What was merged can be merged again.
    assert gpu.main(["--merge", str(merged)]) == 0
    assert capsys.readouterr().out == out


def test_other_cards_and_files_are_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, broken = (tmp_path / f"{name}.json" for name in ("one", "other", "broken"))
    one.write_text(json.dumps(record("NVIDIA H100", [])))
    other.write_text(json.dumps(record("NVIDIA H200", [])))
    broken.write_text('{"card": {}}')
    for path, message in (
        (other, "--merge: not the same card: NVIDIA H100 and NVIDIA H200"),
        (broken, f"--merge: {broken} is no file of this script"),
        (tmp_path / "none.json", "none.json is no file of this script (FileNotFoundError"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.main(["--merge", str(one), str(path)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--parts step,stop", "--parts stop is unknown. Known: parity, step,"),
        ("--repeats 0", "--repeats 0 is not above 0"),
        ("--presets 8,9", "--presets 9 is unknown. Known: 8, 16, 24, 12, 48, 80."),
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
    first, *skipped, last = cache["all_s"]
    assert min(skipped) < min(first, last)  # the others may have met other programs
    chunk = results["chunk", "second chunk"]
    assert 0 < chunk["beside_steps_s"] < chunk["seconds"]
    presets = [case for part, case in results if part == "presets"]
    assert presets == ["8", "16", "24", "12", "48", "80"]
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
