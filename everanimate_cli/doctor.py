"""What this machine can do: what is installed, what fits the card, how long a minute would take.

`gather_facts` looks around and judges nothing; `diagnose` judges facts, wherever they come from.
Nothing is downloaded, no weight is read and no network is loaded.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import av
import torch
from huggingface_hub import constants as hub_constants

from everanimate_cli import hub
from everanimate_cli.cached_models import inspect_model, locate
from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.downloads import cache_folder
from everanimate_cli.main_memory import free_main_memory
from everanimate_cli.placement import (
    Choice,
    Job,
    Sizes,
    choose_placement,
    read_sizes,
    released_sizes,
)
from everanimate_cli.placement_settings import PlacementOptions
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET, ModelDefaults

if TYPE_CHECKING:
    from collections.abc import Mapping

_MIB = 2**20
_GIB = 2**30
_SECONDS_TO_PREDICT = 60
_QUESTION_TIMEOUT_S = 10.0

PACKAGES = (
    *("everanimate", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors"),
    *("huggingface-hub", "av", "numpy", "opencv-python-headless", "onnxruntime"),
)
# What makes runs faster or smaller where it is installed, by the names of the distributions.
ACCELERATORS = (
    *("flash-attn", "flash-attn-3", "sageattention", "triton"),
    *("torchao", "bitsandbytes", "gguf", "hf-xet", "onnxruntime-gpu"),
)
ENCODERS = ("libx264", "libx265", "aac")
DECODERS = ("h264", "hevc", "vp9", "av1", "aac", "mp3")
_NEEDED_CODECS = ("libx264", "aac", "h264")

# Dense bfloat16 products with float32 sums, in TFLOP/s, from NVIDIA's data sheets and
# architecture papers. A name that contains another stands before it.
_PEAK_TFLOPS = (
    ("B200", 2250),
    ("H200", 989),
    ("H100 NVL", 835),
    ("H100 PCIe", 756),
    ("H100", 989),
    ("A100", 312),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("A10G", 70),
    ("A40", 150),
    ("A10", 125),
    ("RTX 6000 Ada", 364),
    ("RTX A6000", 155),
    ("RTX A5000", 111),
    ("RTX 5090", 210),
    ("RTX 5080", 113),
    ("RTX 5070 Ti", 88),
    ("RTX 5070", 62),
    ("RTX 4090", 165),
    ("RTX 4080", 98),
    ("RTX 4070 Ti", 80),
    ("RTX 4070", 58),
    ("RTX 4060 Ti", 44),
    ("RTX 4060", 30),
    ("RTX 3090", 71),
    ("RTX 3080", 60),
    ("RTX 3070", 41),
    ("RTX 3060", 26),
)
# Of that peak for a whole step. GeForce cards keep their stated rate up, larger ones do not: on an
# RTX 5090 users report 272 s for 81 frames of this base at 480p with 20 steps, all counted, which
# is 0.68 of it. The VAE, in float32, gets a quarter of the rate.
_UTILISATION = (("GeForce", 0.65), ("A100", 0.5), ("", 0.4))
_VAE_SHARE = 0.25
# Of decoding and encoding a frame, per pixel; counted with torch's flop counter.
_VAE_FLOPS_PER_PIXEL = 8.8e6 + 5.3e6
# From main memory or from a disk to the card: PCIe 4.0 x16 and a fast SSD, as found in practice.
_MAIN_MEMORY_MIB_PER_S, _DISK_MIB_PER_S = 20_000.0, 2_500.0
_BF16_CAPABILITY = (8, 0)
_SMALL_MIB = 2048.0  # of a model that a CPU can run
_MODELS_DISK = "cache of models"


@dataclass(frozen=True, kw_only=True)
class Card:
    """A CUDA card.

    Attributes:
        name: As its driver says.
        total_mib: Its memory.
        free_mib: What is free of it.
        capability: Compute capability.
    """

    name: str
    total_mib: float
    free_mib: float
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Where something is written.

    Attributes:
        purpose: What.
        path: The folder, which need not exist yet.
        free_gib: Of its file system.
    """

    purpose: str
    path: str
    free_gib: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model or LoRA that a run needs.

    Attributes:
        name: As on the command line.
        state: Where it is; "absent" and "partial" mean a download.
        text: The same for a reader.
    """

    name: str
    state: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found on a machine.

    Attributes:
        system: Operating system and processor architecture.
        python: Its version.
        packages: Version by distribution; None for what is missing.
        accelerators: Likewise, for what is not needed.
        cuda: Version that torch is built for; None for a build without CUDA.
        driver: Of NVIDIA; None if none answers.
        driver_cards: Names of the cards that the driver knows.
        cards: Those that torch can use.
        has_mps: Whether torch can use Apple's GPU.
        processors: Number of processors.
        memory_total_mib: Main memory; None if the system does not tell.
        memory_free_mib: What processes can still take of it; likewise.
        disks: Where files go.
        models: What is on this machine of the model and its LoRAs.
        encoders: Whether PyAV has them.
        decoders: Likewise.
        providers: Of ONNX Runtime, which finds the poses.
    """

    system: str
    python: str
    packages: Mapping[str, str | None]
    accelerators: Mapping[str, str | None]
    cuda: str | None
    driver: str | None
    driver_cards: tuple[str, ...]
    cards: tuple[Card, ...]
    has_mps: bool
    processors: int
    memory_total_mib: float | None
    memory_free_mib: float | None
    disks: tuple[Disk, ...]
    models: tuple[Model, ...]
    encoders: Mapping[str, bool]
    decoders: Mapping[str, bool]
    providers: tuple[str, ...]

    @property
    def device_type(self) -> str:
        """Where networks run by default."""
        return "cuda" if self.cards else "mps" if self.has_mps else "cpu"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that stands in the way.

    Attributes:
        severity: "error" if a run would fail, "warning" if it would be slow or may fail.
        text: What was found.
        remedy: What to do.
    """

    severity: Literal["error", "warning"]
    text: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What follows from the facts.

    Attributes:
        facts: They.
        model: Asked about.
        job: A chunk of that model at its own size.
        choice: How the networks would be placed, and what that takes.
        minutes_per_minute: Estimated minutes of work for a minute of video; None where nothing is
            known of the device.
        problems: Errors first.
    """

    facts: Facts
    model: str
    job: Job
    choice: Choice
    minutes_per_minute: float | None
    problems: tuple[Problem, ...]

    @property
    def is_usable(self) -> bool:
        """Whether nothing that is needed is broken."""
        return not any(problem.severity == "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        placement = self.choice.placement.to_json()
        return {
            **asdict(self.facts),
            "device": self.facts.device_type,
            "model": self.model,
            "plan": {
                "size": f"{self.job.width}x{self.job.height}",
                "frames_per_chunk": self.job.frames_per_chunk,
                "dtype": str(self.job.dtype).removeprefix("torch."),
                "placement": placement,
                "fits": self.choice.fits,
                "needed_mib": round(self.choice.estimate.needed_mib),
                **self.choice.estimate.to_json(),
                "estimated_minutes_per_minute": (
                    None
                    if self.minutes_per_minute is None
                    else _round_to_two_digits(self.minutes_per_minute)
                ),
            },
            "problems": [asdict(problem) for problem in self.problems],
            "usable": self.is_usable,
        }

    def sections(self) -> dict[str, list[tuple[str, str]]]:
        """All of it for a reader: (what, how it is) under headings."""
        facts = self.facts
        return {
            "System": [
                ("system", facts.system),
                ("Python", facts.python),
                ("processors", str(facts.processors)),
                ("main memory", _describe_memory(facts)),
                *(
                    (disk.purpose, f"{disk.free_gib:.0f} GiB free, {disk.path}")
                    for disk in facts.disks
                ),
            ],
            "Device": _describe_device(facts),
            "Packages": [(name, found or "missing") for name, found in facts.packages.items()],
            "Accelerators": [
                (name, found or "not installed") for name, found in facts.accelerators.items()
            ],
            "Media": [
                ("encoders", _list_present(facts.encoders)),
                ("decoders", _list_present(facts.decoders)),
                ("pose estimation on", ", ".join(facts.providers) or "nothing"),
            ],
            "Models": [(model.name, model.text) for model in facts.models],
            "Plan": self._describe_plan(),
        }

    def _describe_plan(self) -> list[tuple[str, str]]:
        needed, job = self.choice.estimate, self.job
        rows = [
            ("video", f"{job.width}x{job.height}, {job.frames_per_chunk} frames per chunk"),
            ("networks", self.choice.placement.describe()),
            ("memory of the device", f"{needed.needed_mib:.0f} MiB needed (estimated)"),
            *((f"  {name}", _amount(mib)) for name, mib in needed.phases_mib.items() if mib),
            *(
                (f"  weights of {name.replace('_', ' ')}", _amount(mib))
                for name, mib in needed.weights_mib.items()
            ),
            (
                "main memory",
                f"{needed.main_memory_mib:.0f} MiB, while loading "
                f"{needed.loading_mib:.0f} MiB (estimated)",
            ),
        ]
        if self.minutes_per_minute is None:
            return [*rows, ("time for 1 minute of video", "unknown")]
        minutes = _round_to_two_digits(self.minutes_per_minute)
        time = f"{minutes:g} min" if minutes < 90 else f"{minutes / 60:.1f} h"  # noqa: PLR2004
        return [*rows, ("time for 1 minute of video", f"about {time} (estimated)")]


# --- look around ---------------------------------------------------------------------------------


def gather_facts(model: str, output: Path) -> Facts:
    """Look around on this machine.

    Args:
        model: Asked about.
        output: Folder where results would go.

    Raises:
        InputError: If the model's name fits nothing.
    """
    driver, driver_cards = _ask_driver()
    total, free = _main_memory()
    names = hub.DEFAULT_NAMES if model == HUB_MODEL else (model,)
    found = [inspect_model(name) for name in names]
    places = {
        "results": output,
        _MODELS_DISK: Path(hub_constants.HF_HUB_CACHE),
        "cache of prompts": cache_folder("prompts"),
    }
    return Facts(
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        accelerators={name: _version(name) for name in ACCELERATORS},
        cuda=torch.version.cuda,
        driver=driver,
        driver_cards=driver_cards,
        cards=_list_cards(),
        has_mps=torch.backends.mps.is_available(),
        processors=os.cpu_count() or 1,
        memory_total_mib=total,
        memory_free_mib=free,
        disks=tuple(
            Disk(purpose=purpose, path=str(path), free_gib=_free_disk_gib(path))
            for purpose, path in places.items()
        ),
        models=tuple(
            Model(name=each.name, state=each.state, text=each.describe().partition(": ")[2])
            for each in found
        ),
        encoders={name: _has_codec(name, "w") for name in ENCODERS},
        decoders={name: _has_codec(name, "r") for name in DECODERS},
        providers=_list_providers(),
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _list_cards() -> tuple[Card, ...]:
    cards = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        cards.append(
            Card(
                name=properties.name,
                total_mib=properties.total_memory / _MIB,
                free_mib=torch.cuda.mem_get_info(index)[0] / _MIB,
                capability=(properties.major, properties.minor),
            )
        )
    return tuple(cards)


def _ask_driver() -> tuple[str | None, tuple[str, ...]]:
    """(version, names of cards) that NVIDIA's driver tells; None and nothing without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, ()
    query = ["--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            [program, *query],
            capture_output=True,
            text=True,
            check=True,
            timeout=_QUESTION_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None, ()
    rows = [line.split(", ", 1) for line in answer.stdout.splitlines() if ", " in line]
    return (rows[0][0], tuple(row[1] for row in rows)) if rows else (None, ())


def _main_memory() -> tuple[float | None, float | None]:
    """(all, free) MiB."""
    free = free_main_memory()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # absent on Windows
        total = None
    return None if total is None else total / _MIB, None if free is None else free / _MIB


def _free_disk_gib(path: Path) -> float:
    """Of the file system that a folder is in, or would be."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / _GIB


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    try:
        av.codec.Codec(name, mode)
    except ValueError:  # PyAV's error for an unknown one is of this kind
        return False
    return True


def _list_providers() -> tuple[str, ...]:
    try:
        # It may be what is broken.
        import onnxruntime  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        return ()
    names = onnxruntime.get_available_providers()
    return tuple(name.removesuffix("ExecutionProvider") for name in names)


# --- judge ---------------------------------------------------------------------------------------


def examine(model: str, output: Path) -> Diagnosis:
    """Look around and judge.

    Args:
        model: "toy", a checkpoint folder or a Hub id.
        output: Folder where results would go.

    Raises:
        InputError: If the model's name fits nothing.
        WeightsError: If the model is incomplete, or is unknown and not on this machine.
    """
    facts = gather_facts(model, output)
    is_here = all(each.state not in ("absent", "partial") for each in facts.models[:1])
    if model == HUB_MODEL and not is_here:
        return diagnose(facts, model, released_sizes(), HUB_PRESET)
    if not is_here:
        locate(model)  # refuses it, and tells how it gets here
    source = hub.locate_model(model, lambda _event: None, download=False)
    return diagnose(facts, model, read_sizes(source), source.defaults)


def diagnose(facts: Facts, model: str, sizes: Sizes, defaults: ModelDefaults) -> Diagnosis:
    """What follows from the facts for a run of a model with its own settings.

    Args:
        facts: Of a machine.
        model: Asked about.
        sizes: Of its networks.
        defaults: What it was trained for.
    """
    card = max(facts.cards, key=lambda each: each.free_mib, default=None)
    job = Job(
        height=defaults.height,
        width=defaults.width,
        frames_per_chunk=defaults.frames_per_chunk,
        num_identity_slots=defaults.identity_slots,
        dtype=torch.float32 if card is None else torch.bfloat16,
    )
    choice = choose_placement(
        PlacementOptions(),
        facts.device_type,
        sizes,
        job,
        free_mib=None if card is None else card.free_mib,
        free_main_mib=facts.memory_free_mib,
    )
    problems = [
        *_check_software(facts),
        *_check_device(facts, card, is_small=choice.estimate.device_mib < _SMALL_MIB),
        *_check_memory(facts, choice, card),
        *_check_models(facts, sizes),
    ]
    problems.sort(key=lambda problem: problem.severity)  # errors before warnings
    return Diagnosis(
        facts=facts,
        model=model,
        job=job,
        choice=choice,
        minutes_per_minute=None if card is None else _predict(card, choice, sizes, job, defaults),
        problems=tuple(problems),
    )


def _check_software(facts: Facts) -> list[Problem]:
    problems = [
        Problem(
            severity="error",
            text=f"the package {name} is missing",
            remedy="Install everanimate again: pip install --force-reinstall everanimate.",
        )
        for name, found in facts.packages.items()
        if found is None and name not in ("opencv-python-headless", "onnxruntime")
    ]
    if facts.packages.get("onnxruntime") is None and not facts.providers:
        problems.append(
            Problem(
                severity="error",
                text="ONNX Runtime is missing, which finds poses in raw videos",
                remedy="Install it: pip install onnxruntime, or onnxruntime-gpu.",
            )
        )
    codecs = {**facts.decoders, **facts.encoders}
    problems += [
        Problem(
            severity="error",
            text=f"PyAV has no {name}, which results are written with",
            remedy="Install PyAV from its wheels: pip install --force-reinstall --no-cache-dir av.",
        )
        for name in _NEEDED_CODECS
        if not codecs.get(name, False)
    ]
    return problems


def _check_device(facts: Facts, card: Card | None, *, is_small: bool) -> list[Problem]:
    if card is None and facts.driver_cards:
        build = "without CUDA" if facts.cuda is None else f"for CUDA {facts.cuda}"
        return [
            Problem(
                severity="error",
                text=f"torch {facts.packages.get('torch')} is built {build} and cannot use the "
                f"{facts.driver_cards[0]} (driver {facts.driver})",
                remedy="Install a torch build for this driver, see pytorch.org/get-started.",
            )
        ]
    if card is None and not is_small:
        return [
            Problem(
                severity="warning",
                text=f"no CUDA card: the networks run on {facts.device_type}",
                remedy="Use --model toy to try the program; the released model wants a card.",
            )
        ]
    problems: list[Problem] = []
    if card is None:
        return problems
    if card.capability < _BF16_CAPABILITY:
        shown = ".".join(map(str, card.capability))
        problems.append(
            Problem(
                severity="warning",
                text=f"the {card.name} has compute capability {shown}, for which torch has no "
                "attention in bfloat16 that fits a card",
                remedy="Give --dtype float16 and expect several times the estimated time, or use a "
                "card from 8.0 on.",
            )
        )
    if "CUDA" not in facts.providers:
        problems.append(
            Problem(
                severity="warning",
                text="poses are estimated on the CPU, although there is a card",
                remedy="Replace the package: pip uninstall onnxruntime, then pip install "
                "onnxruntime-gpu.",
            )
        )
    return problems


def _check_memory(facts: Facts, choice: Choice, card: Card | None) -> list[Problem]:
    needed, problems = choice.estimate, []
    if card is not None and not choice.fits:
        problems.append(
            Problem(
                severity="warning",
                text=f"even {choice.placement.describe()} needs {needed.needed_mib:.0f} MiB, and "
                f"{card.free_mib:.0f} MiB of the {card.name} are free",
                remedy="End other programs on the card, or give a smaller --size and fewer "
                "--frames-per-chunk.",
            )
        )
    wanted_mib = max(needed.loading_mib, needed.main_memory_mib)
    if card is None:
        wanted_mib = max(wanted_mib, needed.device_mib)
    if facts.memory_free_mib is not None and wanted_mib > facts.memory_free_mib:
        problems.append(
            Problem(
                severity="warning",
                text=f"{wanted_mib:.0f} MiB of main memory are needed, and "
                f"{facts.memory_free_mib:.0f} MiB are free",
                remedy="End other programs, or add swap space: it is needed while the weights are "
                "loaded.",
            )
        )
    if needed.disk_mib and facts.disks[0].free_gib * 1024 < needed.disk_mib:
        problems.append(
            Problem(
                severity="error",
                text=f"the blocks need {needed.disk_mib:.0f} MiB beside the result, and "
                f"{facts.disks[0].free_gib * 1024:.0f} MiB are free in {facts.disks[0].path}",
                remedy="Free some space, or give an --output on another disk.",
            )
        )
    return problems


def _check_models(facts: Facts, sizes: Sizes) -> list[Problem]:
    missing = [model for model in facts.models if model.state in ("absent", "partial")]
    problems = [
        Problem(
            severity="warning",
            text=f"{model.name} is {model.text}",
            remedy=f"The first run downloads it, or beforehand: {hub.pull_command([model.name])}",
        )
        for model in missing
    ]
    if facts.models[0].state == "absent":
        # As they are stored: the transformer and the VAE in float32, the others in bfloat16.
        numbers = {name: sum(map(math.prod, each.values())) for name, each in sizes.shapes.items()}
        needed_gib = (
            sum(
                number * (4 if name in ("transformer", "vae") else 2)
                for name, number in numbers.items()
            )
            / _GIB
        )
        disk = next(disk for disk in facts.disks if disk.purpose == _MODELS_DISK)
        if disk.free_gib < needed_gib:
            problems.append(
                Problem(
                    severity="error",
                    text=f"{facts.models[0].name} takes about {needed_gib:.0f} GiB, and "
                    f"{disk.free_gib:.0f} GiB are free in {disk.path}",
                    remedy="Free some space, or name a folder on another disk in HF_HOME.",
                )
            )
    return problems


def peak_tflops(card_name: str) -> float | None:
    """Dense bfloat16 peak of a card in TFLOP/s; None for one that is not in the table."""
    return next((peak for name, peak in _PEAK_TFLOPS if name in card_name), None)


def utilisation(card_name: str) -> float:
    """Share of a card's peak that a step is expected to reach."""
    return next(share for name, share in _UTILISATION if name in card_name)


def _predict(
    card: Card, choice: Choice, sizes: Sizes, job: Job, defaults: ModelDefaults
) -> float | None:
    """Minutes for a minute of video: work by rate, or what must be copied if that takes longer."""
    peak = peak_tflops(card.name)
    if peak is None:
        return None
    rate = 1e12 * peak * utilisation(card.name)
    geometry, placement = sizes.geometry, choice.placement
    flops = geometry.step_flops(job.height, job.width, job.frames_per_chunk, job.num_identity_slots)
    copied_s = 0.0
    if placement.offload in ("group", "disk"):
        waiting_mib = choice.estimate.main_memory_mib + choice.estimate.disk_mib
        speed = _MAIN_MEMORY_MIB_PER_S if placement.offload == "group" else _DISK_MIB_PER_S
        copied_s = waiting_mib / speed
    computed_s = flops / rate
    step_s = max(computed_s, copied_s) if placement.prefetch else computed_s + copied_s
    pixels = job.height * job.width * job.frames_per_chunk
    vae_s = _VAE_FLOPS_PER_PIXEL * pixels / (rate * _VAE_SHARE)
    plan = ChunkPlan(
        num_frames=math.ceil(_SECONDS_TO_PREDICT * defaults.fps),
        frames_per_chunk=job.frames_per_chunk,
        overlap=defaults.overlap,
    )
    return plan.num_chunks * (defaults.num_inference_steps * step_s + vae_s) / 60


# --- say -----------------------------------------------------------------------------------------


def _describe_memory(facts: Facts) -> str:
    known = {"in all": facts.memory_total_mib, "free": facts.memory_free_mib}
    parts = [f"{mib / 1024:.1f} GiB {word}" for word, mib in known.items() if mib is not None]
    return ", ".join(parts) or "unknown"


def _describe_device(facts: Facts) -> list[tuple[str, str]]:
    rows = [
        ("torch is built for", "no CUDA" if facts.cuda is None else f"CUDA {facts.cuda}"),
        ("driver of NVIDIA", facts.driver or "none"),
    ]
    for card in facts.cards:
        capability = ".".join(map(str, card.capability))
        rows.append(
            (
                card.name,
                f"{card.total_mib / 1024:.1f} GiB, {card.free_mib / 1024:.1f} GiB free, "
                f"compute capability {capability}",
            )
        )
    return [*rows, ("networks run on", facts.device_type)]


def _list_present(codecs: Mapping[str, bool]) -> str:
    absent = [name for name, is_there in codecs.items() if not is_there]
    present = ", ".join(name for name, is_there in codecs.items() if is_there) or "none"
    return f"{present}; missing: {', '.join(absent)}" if absent else present


def _amount(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"  # noqa: PLR2004


def _round_to_two_digits(value: float) -> float:
    """An estimate has no more."""
    return float(f"{value:.2g}")
