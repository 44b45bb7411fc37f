"""The command `train-lora`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from everanimate_cli.cli_options import (
    MEMORY,
    MODEL,
    OF_MODEL,
    PICTURE,
    PROGRAM,
    RESULT,
    RUN,
    AsJson,
    ConfigFile,
    Quiet,
    option,
    resumable,
    show_result,
)
from everanimate_cli.errors import SettingsError
from everanimate_cli.preflight import check_train
from everanimate_cli.records import read_saved_options
from everanimate_cli.settings import Device, Dtype, Fit, Memory
from everanimate_cli.train_settings import (
    Checkpointing,
    Correction,
    LoraNaming,
    MixedPrecision,
    QuantizeBase,
    TrainSettings,
)

TRAIN_HELP = (
    "Train a LoRA on videos of people, so that long videos keep their characters.\n\n"
    "DATASET is a folder of videos, a .csv or .jsonl manifest (columns video, and pose and face or "
    "pose_folder, prompt, start, end), or one video. The poses of raw videos are extracted first. "
    "Three stages, each from the LoRA of the one before: 1 extends videos, 2 also restores, 3 is "
    "stage 2 at 720p.\n\n"
    "The training is the folder DATASET_stage1 in the current folder unless --output says "
    "otherwise; the path of the LoRA in it goes to stdout. An interrupted training continues when "
    "the same command is run again; with more --steps a finished one goes on. "
    f"On several GPUs: accelerate launch -m {__package__} train-lora ..."
    f"""

\b
Examples:
  {PROGRAM} train-lora videos
  {PROGRAM} train-lora videos --stage 2 --init videos_stage1/lora.safetensors
  {PROGRAM} train-lora list.csv --latent-cache cache --validate-every 500
  {PROGRAM} train-lora videos --model toy --steps 200 --memory pixel -o carry
  {PROGRAM} train-lora --config videos_stage1/train.json --seed 7 -o again
"""
)

_DATA = "Data"
_MACHINE = "Machine"
_TRAINING = "Training"
_RESTORATION = "Restoration"
_VALIDATION = "Validation"

_option = partial(option, TrainSettings)


def run_train_lora(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATASET",
            help="Folder of videos, .csv or .jsonl manifest, or one video.",
            show_default=False,
        ),
    ] = None,
    latent_cache: Annotated[
        Path | None,
        _option(
            "latent_cache",
            "Encode the samples once, into this folder, instead of in every step.",
            _DATA,
            metavar="DIR",
        ),
    ] = None,
    cache_samples: Annotated[
        int | None,
        _option("cache_samples", "How many samples it holds.", _DATA, default="4 per clip"),
    ] = None,
    prompt: Annotated[
        str | None,
        _option("prompt", "Text for clips that bring none.", _DATA, default=OF_MODEL),
    ] = None,
    pose_folder: Annotated[
        Path | None,
        _option(
            "pose_folder",
            "Where the poses of raw videos are kept, and found again.",
            _DATA,
            metavar="DIR",
            default="DATASET_poses beside the dataset",
        ),
    ] = None,
    pose_model: Annotated[
        str | None,
        _option(
            "pose_model",
            "Who estimates them, see extract-pose.",
            _DATA,
            metavar="NAME|FILE",
            default=OF_MODEL,
        ),
    ] = None,
    detector: Annotated[
        str | None,
        _option(
            "detector",
            "Who finds the person.",
            _DATA,
            metavar="NAME|FILE",
            default="the pose model's",
        ),
    ] = None,
    size: Annotated[
        str | None,
        _option(
            "size",
            "Size of the training pictures.",
            PICTURE,
            metavar="WxH",
            default=f"{OF_MODEL}; 1280x720 in stage 3",
        ),
    ] = None,
    fit: Annotated[
        Fit | None, _option("fit", "How videos of another aspect fill them.", PICTURE)
    ] = None,
    fps: Annotated[
        float | None,
        _option("fps", "Frames per second; motion keeps its speed.", PICTURE, default=OF_MODEL),
    ] = None,
    stage: Annotated[
        int | None,
        _option(
            "stage",
            "Presets of size, restoration and memory augmentation.",
            _TRAINING,
            metavar="1|2|3",
        ),
    ] = None,
    init: Annotated[
        str | None,
        _option(
            "init",
            "LoRA to start from: a file, or owner/name/file on the Hub.",
            _TRAINING,
            metavar="FILE",
        ),
    ] = None,
    steps: Annotated[
        int | None, _option("steps", "Steps of the optimiser.", _TRAINING, default="3000")
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("batch_size", "Samples that go through the network together.", _TRAINING),
    ] = None,
    accumulate: Annotated[
        int | None, _option("accumulate", "Batches that make one step.", _TRAINING)
    ] = None,
    lr: Annotated[float | None, _option("lr", "Learning rate.", _TRAINING)] = None,
    warmup: Annotated[
        int | None, _option("warmup", "Steps in which it rises from zero.", _TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, _option("weight_decay", "Of AdamW.", _TRAINING)] = None,
    max_grad_norm: Annotated[
        float | None, _option("max_grad_norm", "Longest gradient.", _TRAINING)
    ] = None,
    ema: Annotated[
        float | None,
        _option(
            "ema",
            "Save a running average of the weights; its decay, such as 0.99.",
            _TRAINING,
            default="off",
        ),
    ] = None,
    seed: Annotated[
        int | None, _option("seed", "Every random draw follows from it.", _TRAINING)
    ] = None,
    shift: Annotated[
        float | None,
        _option("shift", "Warp of the noise levels.", _TRAINING, default=OF_MODEL),
    ] = None,
    memory: Annotated[
        Memory | None,
        _option(
            "memory",
            "What a chunk hands on: latent (its latents), pixel (its last frames, as Wan-Animate) "
            "or sink (nothing).",
            MEMORY,
            metavar="NAME",
        ),
    ] = None,
    carry_frames: Annotated[
        int | None,
        _option(
            "carry_frames", "Frames that pixel memory carries.", MEMORY, metavar="1|5", default="1"
        ),
    ] = None,
    frames_per_chunk: Annotated[
        int | None,
        _option("frames_per_chunk", "Frames of one chunk, 4n+1.", MEMORY, default=OF_MODEL),
    ] = None,
    identity_slots: Annotated[
        int | None,
        _option("identity_slots", "Slots of identity memory.", MEMORY, default=OF_MODEL),
    ] = None,
    first_chunk_probability: Annotated[
        float | None,
        _option("first_chunk_probability", "Share of samples without memory.", MEMORY),
    ] = None,
    reference_anchor_probability: Annotated[
        float | None,
        _option(
            "reference_anchor_probability",
            "Share of the others that remember the reference only.",
            MEMORY,
        ),
    ] = None,
    memory_augmentation: Annotated[
        float | None,
        _option(
            "memory_augmentation",
            "Share of identity memories that are moved and scaled.",
            MEMORY,
            default="0; 0.5 from stage 2 on",
        ),
    ] = None,
    error_recycling: Annotated[
        float | None,
        _option(
            "error_recycling",
            "Share of samples whose motion memory is degraded (SVI's way).",
            MEMORY,
        ),
    ] = None,
    pose_drop: Annotated[
        float | None, _option("pose_drop", "Share of samples without pose.", MEMORY)
    ] = None,
    degradation_probability: Annotated[
        float | None,
        _option(
            "degradation_probability",
            "Share of samples that learn to restore; 0 for none.",
            _RESTORATION,
            default="0; 0.64 from stage 2 on",
        ),
    ] = None,
    degradation_min_sigma: Annotated[
        float | None,
        _option("degradation_min_sigma", "Lowest noise level at which they do.", _RESTORATION),
    ] = None,
    correction: Annotated[
        Correction | None,
        _option(
            "correction",
            "How strongly, over the noise levels: gaussian, exact (1/sigma) or constant.",
            _RESTORATION,
            metavar="NAME",
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "model", "'toy' (embedded), a checkpoint folder, or a Hub id.", MODEL, metavar="MODEL"
        ),
    ] = None,
    rank: Annotated[int | None, _option("rank", "Of the LoRA.", MODEL)] = None,
    lora_alpha: Annotated[
        float | None,
        _option("lora_alpha", "Its update counts alpha/rank times.", MODEL, default="the rank"),
    ] = None,
    gradient_checkpointing: Annotated[
        Checkpointing | None,
        _option(
            "gradient_checkpointing",
            "on saves memory and computes activations twice; offload keeps the rest of them in "
            "main memory; off.",
            _MACHINE,
            metavar="NAME",
        ),
    ] = None,
    quantize_base: Annotated[
        QuantizeBase | None,
        _option(
            "quantize_base",
            "Store the weights that are not trained in less memory: none, fp8, int8 (needs "
            "torchao) or nf4 (4 bits, needs bitsandbytes).",
            _MACHINE,
            metavar="NAME",
        ),
    ] = None,
    mixed_precision: Annotated[
        MixedPrecision | None,
        _option(
            "mixed_precision",
            "Compute in bf16, or as the weights are stored: no.",
            _MACHINE,
            metavar="NAME",
            default="bf16 for weights in bfloat16",
        ),
    ] = None,
    compile: Annotated[  # noqa: A002  # all are named as the fields of the settings
        bool | None,
        _option(
            "compile",
            "Compile the network: slower to start, faster steps.",
            _MACHINE,
            flags=("--compile/--no-compile",),
            default="off",
        ),
    ] = None,
    device: Annotated[
        Device | None, _option("device", "Where the networks run.", _MACHINE, metavar="NAME")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        _option(
            "dtype",
            "Number format of their weights: auto, float32 or bfloat16.",
            _MACHINE,
            metavar="NAME",
        ),
    ] = None,
    validate_every: Annotated[
        int | None,
        _option("validate_every", "Steps from one validation video to the next.", _VALIDATION),
    ] = None,
    validation: Annotated[
        Path | None,
        _option(
            "validation",
            "A video, folder or manifest whose first clip it shows.",
            _VALIDATION,
            metavar="PATH",
            default="DATASET",
        ),
    ] = None,
    validation_chunks: Annotated[
        int | None, _option("validation_chunks", "Its length in chunks.", _VALIDATION)
    ] = None,
    validation_steps: Annotated[
        int | None,
        _option("validation_steps", "Euler steps per chunk.", _VALIDATION, default=OF_MODEL),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "output",
            "Folder of the training.",
            RESULT,
            flags=("--output", "-o"),
            metavar="DIR",
            default="DATASET_stage1",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, _option("overwrite", "Replace an existing result.", RESULT)
    ] = None,
    export: Annotated[
        LoraNaming | None,
        _option(
            "export",
            "Names in the file: of diffusers, or the original ones of the released LoRAs.",
            RESULT,
            metavar="NAME",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("checkpoint_every", "Steps between two checkpoints.", RESULT)
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _option("keep_checkpoints", "How many of them stay.", RESULT)
    ] = None,
    tensorboard: Annotated[
        bool | None,
        _option(
            "tensorboard",
            "Write TensorBoard logs.",
            RESULT,
            flags=("--tensorboard/--no-tensorboard",),
        ),
    ] = None,
    config: ConfigFile = None,
    resume: Annotated[
        bool | None,
        _option("resume", "Continue an unfinished training.", RUN, flags=("--resume/--no-resume",)),
    ] = None,
    dry_run: Annotated[bool | None, _option("dry_run", "Print the plan and stop.", RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate train-lora`."""
    # The parameters are named as the settings fields; the other three are the command line's own.
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("config", "as_json", "quiet")
    }
    options = {**({} if config is None else read_saved_options(config, TrainSettings)), **given}
    if "dataset" not in options:
        raise SettingsError("DATASET is missing. Give a folder of videos or a manifest.")
    settings = TrainSettings.from_json(options)
    check_train(settings)
    with resumable("again" if settings.resume else "without --no-resume"):
        from everanimate_cli.console import show_progress
        from everanimate_cli.train_lora import train_lora

        with show_progress(quiet=quiet) as on_event:
            result = train_lora(settings, on_event)
    if result is not None:  # of several processes only the main one has a result
        show_result(result, as_json=as_json, is_plan=settings.dry_run)
