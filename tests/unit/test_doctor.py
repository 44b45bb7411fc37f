"""What is told of a machine, from facts made up for the occasion."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everanimate_cli import doctor
from everanimate_cli.doctor import (
    ENCODERS,
    PACKAGES,
    Card,
    Disk,
    Facts,
    Model,
    diagnose,
    examine,
    gather_facts,
    peak_tflops,
)
from everanimate_cli.errors import InputError
from everanimate_cli.placement import released_sizes
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET

GIB = 1024.0
H100 = Card(
    name="NVIDIA H100 80GB HBM3", total_mib=79.2 * GIB, free_mib=78.7 * GIB, capability=(9, 0)
)
RTX_4090 = Card(
    name="NVIDIA GeForce RTX 4090", total_mib=24 * GIB, free_mib=23.4 * GIB, capability=(8, 9)
)


def machine(**changes: Any) -> Facts:
    """A machine with a good card on which everything is in place."""
    good = Facts(
        system="Linux-6.1-x86_64",
        python="3.12.1",
        packages=dict.fromkeys(PACKAGES, "1.0"),
        accelerators={"flash-attn": "2.8", "torchao": None},
        cuda="12.8",
        driver="570.86",
        driver_cards=("NVIDIA GeForce RTX 4090",),
        cards=(RTX_4090,),
        has_mps=False,
        processors=16,
        memory_total_mib=64 * GIB,
        memory_free_mib=60 * GIB,
        disks=(
            Disk(purpose="results", path="/home/eve", free_gib=500),
            Disk(purpose="cache of models", path="/home/eve/.cache", free_gib=500),
        ),
        models=(Model(name=HUB_MODEL, state="complete", text="in the cache, 82 GB"),),
        encoders=dict.fromkeys(ENCODERS, True),
        decoders={"h264": True},
        providers=("CUDA", "CPU"),
    )
    return replace(good, **changes)


def examined(**changes: Any) -> doctor.Diagnosis:
    return diagnose(machine(**changes), HUB_MODEL, released_sizes(), HUB_PRESET)


def texts(found: doctor.Diagnosis, severity: str) -> list[str]:
    return [each.text for each in found.problems if each.severity == severity]


def test_a_good_machine_has_no_problems() -> None:
    found = examined()
    assert found.problems == ()
    assert found.is_usable
    assert found.job.dtype == torch.bfloat16
    assert found.choice.placement.preset == "24"


def test_time_follows_from_work_and_rate() -> None:
    """21 chunks of 20 steps of two petaflop."""
    assert peak_tflops(H100.name) == 989
    assert peak_tflops("NVIDIA GeForce GT 710") is None
    minutes = examined(cards=(H100,)).minutes_per_minute
    assert minutes is not None
    steps_s = 21 * 20 * 2.09e15 / (989e12 * doctor.utilisation(H100.name))
    assert 60 * minutes == pytest.approx(steps_s, rel=0.06)  # and the VAE
    slower = examined().minutes_per_minute
    assert slower is not None
    assert RTX_4090.name == "NVIDIA GeForce RTX 4090"
    assert slower / minutes == pytest.approx(989 * 0.4 / (165 * 0.65), rel=0.01)
    # Half an hour on the one, hours on the other.
    assert 30 < minutes < 45
    assert examined(cards=(replace(RTX_4090, name="NVIDIA X"),)).minutes_per_minute is None


def test_the_fastest_disk_is_slower_than_the_card() -> None:
    found = examined(cards=(replace(H100, free_mib=11 * GIB),), memory_free_mib=16 * GIB)
    assert found.choice.placement.offload == "disk"
    minutes = found.minutes_per_minute
    assert minutes is not None
    read_s = (
        21
        * 20
        * (found.choice.estimate.disk_mib + found.choice.estimate.main_memory_mib)
        / (doctor._DISK_MIB_PER_S)
    )
    assert 60 * minutes == pytest.approx(read_s, rel=0.06)


def test_a_torch_without_cuda_beside_a_card_is_an_error() -> None:
    packages = dict.fromkeys(PACKAGES, "1.0") | {"torch": "2.13.0+cpu"}
    found = examined(cards=(), cuda=None, packages=packages, memory_free_mib=400 * GIB)
    assert not found.is_usable
    assert texts(found, "error") == [
        "torch 2.13.0+cpu is built without CUDA and cannot use the NVIDIA GeForce RTX 4090 "
        "(driver 570.86)"
    ]
    assert found.problems[0].remedy == (
        "Install a torch build for this driver, see pytorch.org/get-started."
    )


def test_no_card_is_a_warning_for_the_large_model_only() -> None:
    found = examined(cards=(), driver=None, driver_cards=(), memory_free_mib=400 * GIB)
    assert found.is_usable
    assert found.job.dtype == torch.float32
    assert texts(found, "warning") == ["no CUDA card: the networks run on cpu"]
    toy = examine("toy", Path())
    assert not [text for text in texts(toy, "warning") if "no CUDA card" in text]


def test_old_and_full_cards_are_told() -> None:
    old = Card(
        name="Tesla V100-SXM2-32GB", total_mib=32 * GIB, free_mib=31 * GIB, capability=(7, 0)
    )
    assert texts(examined(cards=(old,)), "warning") == [
        "the Tesla V100-SXM2-32GB has compute capability 7.0, for which torch has no attention in "
        "bfloat16 that fits a card"
    ]
    full = examined(cards=(replace(RTX_4090, free_mib=3 * GIB),))
    assert not full.choice.fits
    assert texts(full, "warning")[0].startswith(
        "even preset 8: precision fp8, offload group, VAE tiling on, text on cpu needs "
    )
    two = examined(cards=(RTX_4090, H100))
    assert two.choice.placement.preset == "80"  # of two cards the larger


def test_what_is_missing_or_short_is_an_error_with_a_remedy() -> None:
    packages = dict.fromkeys(PACKAGES, "1.0") | {"peft": None, "onnxruntime": None}
    found = examined(
        packages=packages,
        providers=(),
        encoders=dict.fromkeys(ENCODERS, True) | {"libx264": False, "libx265": False},
        models=(Model(name=HUB_MODEL, state="absent", text="not in the cache"),),
        disks=(
            Disk(purpose="results", path="/home/eve", free_gib=500),
            Disk(purpose="cache of models", path="/small", free_gib=40),
        ),
    )
    assert texts(found, "error") == [
        "the package peft is missing",
        "ONNX Runtime is missing, which finds poses in raw videos",
        "PyAV has no libx264, which results are written with",
        f"{HUB_MODEL} takes about 77 GiB, and 40 GiB are free in /small",
    ]
    assert texts(found, "warning") == [
        "poses are estimated on the CPU, although there is a card",
        f"{HUB_MODEL} is not in the cache",
    ]
    assert found.problems[-1].remedy == (
        "The first run downloads it, or beforehand: everanimate models pull"
    )
    assert all(problem.remedy.endswith(".") for problem in found.problems[:-1])


def test_little_main_memory_is_told() -> None:
    found = examined(memory_free_mib=28 * GIB)
    assert found.choice.placement.preset == "16"  # whose blocks have room there
    assert texts(found, "warning") == []
    found = examined(memory_free_mib=19.1 * GIB)
    assert found.choice.placement.preset == "16"
    (text,) = texts(found, "warning")
    assert text == "20226 MiB of main memory are needed, and 19558 MiB are free"


def test_json_and_text_tell_the_same() -> None:
    found = examined()
    data = json.loads(json.dumps(found.to_json()))
    assert data.keys() >= {
        *("system", "python", "packages", "accelerators", "cuda", "driver", "cards", "disks"),
        *("memory_total_mib", "memory_free_mib", "models", "encoders", "decoders", "providers"),
        *("device", "model", "plan", "problems", "usable"),
    }
    assert data["cards"][0]["capability"] == [8, 9]
    plan = data["plan"]
    assert plan["placement"]["vram"] == "24"
    assert plan["fits"] is True
    assert plan["size"] == "832x480"
    assert list(plan["phases_mib"]) == ["text", "encode", "denoise", "decode"]
    assert plan["estimated_minutes_per_minute"] == float(f"{found.minutes_per_minute:.2g}")
    sections = found.sections()
    assert dict(sections["Plan"])["networks"] == found.choice.placement.describe()
    assert dict(sections["Plan"])["time for 1 minute of video"] == "about 2.3 h (estimated)"
    assert dict(sections["Device"])["NVIDIA GeForce RTX 4090"] == (
        "24.0 GiB, 23.4 GiB free, compute capability 8.9"
    )
    assert dict(sections["Accelerators"]) == {"flash-attn": "2.8", "torchao": "not installed"}
    assert dict(sections["Media"])["encoders"] == "libx264, libx265, aac"


def test_facts_of_this_machine(tmp_path: Path) -> None:
    facts = gather_facts("toy", tmp_path / "not" / "made")
    assert facts.packages["torch"] == torch.__version__
    assert facts.encoders == dict.fromkeys(ENCODERS, True)
    assert facts.decoders["h264"]
    assert "CPU" in facts.providers
    assert [disk.purpose for disk in facts.disks] == [
        "results",
        "cache of models",
        "cache of prompts",
    ]
    assert all(disk.free_gib > 0 for disk in facts.disks)
    assert [(model.name, model.state) for model in facts.models] == [("toy", "embedded")]
    with pytest.raises(InputError):
        gather_facts("no such model", tmp_path)


def test_the_driver_is_asked_and_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return subprocess.CompletedProcess([], 0, "570.86, NVIDIA A, B\n570.86, NVIDIA C\n", "")

    monkeypatch.setattr(doctor.subprocess, "run", answer)
    assert doctor._ask_driver() == ("570.86", ("NVIDIA A, B", "NVIDIA C"))

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert doctor._ask_driver() == (None, ())
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    assert doctor._ask_driver() == (None, ())


def test_cards_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "NVIDIA A", 24 * 2**30, 8, 9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (23 * 2**30, 24 * 2**30))
    assert doctor._list_cards() == (
        Card(name="NVIDIA A", total_mib=24 * GIB, free_mib=23 * GIB, capability=(8, 9)),
    )
