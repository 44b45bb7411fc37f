"""Every option of `train-lora` with its default, the presets of its stages, and what fills gaps.

None means "as the stage, the model or the memory mode says"; `resolve_training` fills that in once
the model is known.

Source: method page section 3.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from everanimate_cli.errors import SettingsError
from everanimate_cli.records import THIS_RUN, Options, parse_size
from everanimate_cli.settings import (
    CARRY_FRAMES,
    HUB_MODEL,
    TEMPORAL_STRIDE,
    Device,
    Dtype,
    Fit,
    Memory,
    ModelDefaults,
    check_frames_per_chunk,
)

# How strongly the target leads from the degraded trajectory back to the clean end.
Correction = Literal["gaussian", "exact", "constant"]
Checkpointing = Literal["off", "on", "offload"]
QuantizeBase = Literal["none", "fp8", "int8", "nf4"]
MixedPrecision = Literal["no", "bf16"]
LoraNaming = Literal["diffusers", "original"]

_Precision = Literal["full", "fp8", "torchao-int8", "nf4"]
# What `--quantize-base` is called where networks are placed.
_PRECISIONS: dict[QuantizeBase, _Precision] = {
    "none": "full",
    "fp8": "fp8",
    "int8": "torchao-int8",
    "nf4": "nf4",
}

POSES_SUFFIX = "_poses"  # of the folder that holds the poses of a dataset's raw videos

_PROBABILITIES = (
    "degradation_probability",
    "memory_augmentation",
    "error_recycling",
    "first_chunk_probability",
    "reference_anchor_probability",
    "pose_drop",
)
# Options that speak of what latent memory alone has: drawn frames and a motion latent.
_OF_LATENT_MEMORY = ("memory_augmentation", "error_recycling", "reference_anchor_probability")
# Options that need --validate-every.
_OF_VALIDATION = ("validation", "validation_chunks", "validation_steps")


class Stage(NamedTuple):
    """What `--stage` stands for; each value has an option of its own, which wins.

    Attributes:
        steps: Of the optimiser.
        degradation_probability: Share of samples that learn to restore (RFM).
        memory_augmentation: Share of memories that are moved against the frames.
        size: "WIDTHxHEIGHT"; None for the model's.
    """

    steps: int = 3000
    degradation_probability: float = 0.0
    memory_augmentation: float = 0.0
    size: str | None = None


STAGES = {
    1: Stage(),
    2: Stage(degradation_probability=0.64, memory_augmentation=0.5),
    3: Stage(degradation_probability=0.64, memory_augmentation=0.5, size="1280x720"),
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Options):
    """What `everanimate train-lora` is asked to do.

    Attributes:
        dataset: A folder of videos, a CSV or JSONL manifest, or one video.
        output: Folder of the training; None for `default_output`.
        stage: 1, 2 or 3, see `STAGES`.
        init: LoRA to start from: a file, or on the Hub `owner/name/path/to/file[@revision]`.
        model: "toy", a checkpoint folder or a Hub id `owner/name[@revision]`.
        steps: Steps of the optimiser.
        batch_size: Samples that go through the network together, per process.
        accumulate: Batches whose gradients make one step, per process.
        lr: Learning rate.
        warmup: Steps in which the learning rate rises to `lr`.
        weight_decay: Of AdamW.
        max_grad_norm: Longest gradient; a longer one is cut to it.
        rank: Of the LoRA.
        lora_alpha: Its update counts `lora_alpha / rank` times; None for `rank`.
        memory: What one chunk hands to the next.
        carry_frames: Frames carried in pixel memory, 1 or 5.
        correction: Weight of the restorative correction over the noise levels.
        degradation_probability: Share of samples whose noisy side is degraded; 0 switches
            restorative flow matching off.
        degradation_min_sigma: Lowest noise level at which that happens.
        memory_augmentation: Share of drawn identity memories that are moved and scaled.
        error_recycling: Share of samples whose motion memory is degraded (SVI's way).
        first_chunk_probability: Share of samples that act as a first chunk.
        reference_anchor_probability: Share of the others whose identity memory is the reference.
        pose_drop: Share of samples without pose.
        size: "WIDTHxHEIGHT" of the training pictures.
        fit: How videos of another aspect fill them.
        fps: Rate of the training clips; frames are chosen by their times.
        frames_per_chunk: Frames of one chunk, 4n+1.
        identity_slots: Latent frames of identity memory.
        shift: Warp of the noise levels.
        prompt: Text for clips that bring none.
        latent_cache: Folder of encoded samples; None encodes anew in every step.
        cache_samples: How many samples it holds; None for 4 per clip.
        pose_folder: Where the poses of raw videos are kept; None for `<dataset>_poses` beside the
            dataset.
        pose_model: Who estimates the poses of raw videos; None for the model's choice.
        detector: Who finds the person in them; None for the one that goes with `pose_model`.
        seed: Every random draw follows from it.
        checkpoint_every: Steps between two checkpoints.
        keep_checkpoints: How many of the latest checkpoints stay.
        validate_every: Steps between two validations; 0 for none.
        validation: Dataset whose first clip they show; None for `dataset`.
        validation_chunks: Length of a validation.
        validation_steps: Euler steps per chunk; None for the model's.
        ema: Decay of a running average of the weights, which is saved then; None for no average.
        gradient_checkpointing: Whether activations are computed again in the backward pass
            ("on"), and what is kept of them waits in main memory ("offload").
        quantize_base: Number format of the weights that are not trained; "int8" needs the package
            torchao, "nf4" bitsandbytes.
        mixed_precision: "bf16" computes in bfloat16 whatever the weights are stored in; None does
            so where they are bfloat16.
        compile: Whether the blocks of the network are compiled.
        export: Names of the tensors in the file.
        tensorboard: Whether TensorBoard logs are written.
        device: Where the networks run.
        dtype: Number format of the networks.
        resume: Whether an unfinished training of the same settings is continued.
        overwrite: Whether an existing result may be replaced.
        dry_run: Whether only the plan is made.
    """

    LEAST: ClassVar = {
        **dict.fromkeys(_PROBABILITIES, 0),
        "accumulate": 1,
        "batch_size": 1,
        "cache_samples": 1,
        "carry_frames": 0,
        "checkpoint_every": 1,
        "degradation_min_sigma": 0,
        "ema": 0,
        "frames_per_chunk": 1 + TEMPORAL_STRIDE,
        "identity_slots": 1,
        "keep_checkpoints": 1,
        "rank": 1,
        "seed": 0,
        "steps": 1,
        "validate_every": 0,
        "validation_chunks": 1,
        "validation_steps": 1,
        "warmup": 0,
        "weight_decay": 0,
    }
    MOST: ClassVar = {**dict.fromkeys(_PROBABILITIES, 1), "degradation_min_sigma": 1}
    ABOVE_ZERO: ClassVar = ("fps", "lora_alpha", "lr", "max_grad_norm", "shift")

    dataset: Path
    output: Path | None = None
    stage: int = 1
    init: str | None = None
    model: str = HUB_MODEL
    steps: int | None = None
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    rank: int = 32
    lora_alpha: float | None = None
    memory: Memory = "latent"
    carry_frames: int | None = None
    correction: Correction = "gaussian"
    degradation_probability: float | None = None
    degradation_min_sigma: float = 0.5
    memory_augmentation: float | None = None
    error_recycling: float = 0.0
    first_chunk_probability: float = 0.2
    reference_anchor_probability: float = 0.05
    pose_drop: float = 0.05
    size: str | None = None
    fit: Fit = "contain"
    fps: float | None = None
    frames_per_chunk: int | None = None
    identity_slots: int | None = None
    shift: float | None = None
    prompt: str | None = None
    latent_cache: Path | None = None
    cache_samples: int | None = None
    pose_folder: Path | None = None
    pose_model: str | None = None
    detector: str | None = None
    seed: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    validate_every: int = 0
    validation: Path | None = None
    validation_chunks: int = 3
    validation_steps: int | None = None
    ema: float | None = None
    gradient_checkpointing: Checkpointing = "on"
    quantize_base: QuantizeBase = "none"
    mixed_precision: MixedPrecision | None = None
    compile: bool = False
    export: LoraNaming = "diffusers"
    tensorboard: bool = True
    device: Device = "auto"
    dtype: Dtype = "auto"
    resume: bool = field(default=True, metadata=THIS_RUN)
    overwrite: bool = field(default=False, metadata=THIS_RUN)
    dry_run: bool = field(default=False, metadata=THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        if self.stage not in STAGES:
            raise SettingsError(f"--stage {self.stage} is unknown. Known: 1, 2, 3.")
        if self.ema is not None and self.ema >= 1:
            raise SettingsError(f"--ema {self.ema} is too large. Give a number below 1.")
        if self.dtype == "float16":
            raise SettingsError(
                "--dtype float16 is too small a range for gradients. Give bfloat16 or float32."
            )
        check_frames_per_chunk(self, self.frames_per_chunk)
        self._check_size()
        if self.memory == "pixel":
            self._check_pixel_memory()
        elif self.carry_frames:
            raise SettingsError(
                f"--carry-frames {self.carry_frames} works with --memory pixel only, "
                f"not with {self.memory}."
            )
        self._check_effects()

    def _check_size(self) -> None:
        try:
            is_usable = self.size is None or parse_size(self.size) is not None
        except ValueError:
            is_usable = False
        if not is_usable:
            raise SettingsError(
                f"--size {self.size} is not a size. Write WIDTHxHEIGHT, such as 832x480."
            )

    def _check_pixel_memory(self) -> None:
        if self.carry_frames not in (None, *CARRY_FRAMES):
            raise SettingsError(f"--carry-frames {self.carry_frames} is unknown. Known: 1, 5.")
        if self.identity_slots not in (None, 1):
            raise SettingsError(
                f"--identity-slots {self.identity_slots} does not fit --memory pixel, "
                "which has one slot."
            )
        carried, length = self.carry_frames, self.frames_per_chunk
        if carried is not None and length is not None and carried >= length:
            raise SettingsError(
                f"--carry-frames {carried} is not below --frames-per-chunk {length}."
            )

    def _check_effects(self) -> None:
        """Refuse options that would change nothing."""
        for name in _OF_LATENT_MEMORY:
            value = getattr(self, name)
            if self.memory != "latent" and value not in (None, 0, getattr(TrainSettings, name)):
                raise SettingsError(
                    f"{self.label(name)} {value} works with --memory latent only, "
                    f"not with {self.memory}. Leave it out."
                )
        first, usual_first = self.first_chunk_probability, TrainSettings.first_chunk_probability
        if self.memory == "sink" and first not in (1, usual_first):
            raise SettingsError(
                f"--first-chunk-probability {first} has no effect with --memory sink, "
                "where every chunk is like the first. Leave it out."
            )
        if self.cache_samples is not None and self.latent_cache is None:
            raise SettingsError(
                f"--cache-samples {self.cache_samples} has no effect without --latent-cache. "
                "Give a folder for it."
            )
        if self.validate_every == 0:
            for name in _OF_VALIDATION:
                value = getattr(self, name)
                if value != getattr(TrainSettings, name):
                    raise SettingsError(
                        f"{self.label(name)} {value} has no effect without --validate-every. "
                        "Give a number of steps for it."
                    )

    @property
    def base_precision(self) -> _Precision:
        """How the blocks' linear layers are stored, in the words of `Placement`."""
        return _PRECISIONS[self.quantize_base]

    @property
    def default_output(self) -> Path:
        """`<dataset>_stage<N>` in the current folder."""
        return Path(f"{_bare_name(self.dataset.resolve())}_stage{self.stage}")

    @property
    def default_pose_folder(self) -> Path:
        """`<dataset>_poses` beside the dataset."""
        # "." has no name and nothing beside it until it is resolved.
        path = self.dataset if self.dataset.name not in ("", "..") else self.dataset.resolve()
        return path.with_name(_bare_name(path) + POSES_SUFFIX)


def _bare_name(dataset: Path) -> str:
    """Name of a folder, or of a file without its suffix."""
    return dataset.name if dataset.is_dir() else dataset.stem


@dataclass(frozen=True, kw_only=True)
class ResolvedTrainSettings(TrainSettings):
    """Settings in which nothing is left to stage and model; made by `resolve_training`.

    Attributes:
        carry_frames: 0 where the memory is not pixels.
    """

    output: Path
    steps: int
    lora_alpha: float
    carry_frames: int
    degradation_probability: float
    memory_augmentation: float
    size: str
    fps: float
    frames_per_chunk: int
    identity_slots: int
    shift: float
    prompt: str
    pose_folder: Path
    pose_model: str

    @property
    def height_width(self) -> tuple[int, int]:
        """Pixels of the training pictures."""
        size = parse_size(self.size)
        assert size is not None  # "auto" is refused on construction
        return size


def resolve_training(settings: TrainSettings, defaults: ModelDefaults) -> ResolvedTrainSettings:
    """Fill in what the command line left to the stage, the model and the memory mode.

    Raises:
        SettingsError: If an option and a default do not go together.
    """
    stage = STAGES[settings.stage]
    fill: dict[str, object] = {
        "output": settings.default_output,
        "steps": stage.steps,
        "lora_alpha": float(settings.rank),
        "carry_frames": CARRY_FRAMES[0] if settings.memory == "pixel" else 0,
        "degradation_probability": stage.degradation_probability,
        "memory_augmentation": stage.memory_augmentation if settings.memory == "latent" else 0.0,
        "size": stage.size or f"{defaults.width}x{defaults.height}",
        "fps": defaults.fps,
        "frames_per_chunk": defaults.frames_per_chunk,
        "identity_slots": 1 if settings.memory == "pixel" else defaults.identity_slots,
        "shift": defaults.shift,
        "prompt": defaults.prompt,
        "pose_folder": settings.default_pose_folder,
        "pose_model": defaults.pose_model,
    }
    values: dict[str, Any] = dict(vars(settings))
    values.update({name: value for name, value in fill.items() if values[name] is None})
    return ResolvedTrainSettings(**values)
