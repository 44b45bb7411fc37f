"""The command `animate`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from everanimate_cli.cli_launch import leave, run_partner, this_launch
from everanimate_cli.cli_options import (
    CARD,
    LENGTH,
    MODEL,
    OF_MODEL,
    PICTURE,
    PROGRAM,
    RESULT,
    RUN,
    SPEED,
    AsJson,
    ConfigFile,
    Quiet,
    option,
    resumable,
    show_result,
)
from everanimate_cli.cli_sampling import (
    SAMPLING,
    CarryFramesOption,
    ClipImageOption,
    DtypeOption,
    FitOption,
    FramesPerChunkOption,
    IdentitySlotsOption,
    LoraOption,
    MemoryOption,
    ModelOption,
    OverlapOption,
    PromptOption,
    SeedOption,
    ShiftOption,
    StartOption,
    StepsOption,
    ViewOption,
)
from everanimate_cli.errors import SettingsError
from everanimate_cli.launch import check_launch
from everanimate_cli.placement_settings import Offload, Precision, TextDevice, Tiling, Vram
from everanimate_cli.preflight import check_animate
from everanimate_cli.records import read_saved_options
from everanimate_cli.settings import (
    AnimateSettings,
    Codec,
    Device,
    Extend,
    LoraMode,
    Parallel,
    Select,
    combine,
)
from everanimate_cli.speed_settings import STEP_CACHE_THRESHOLD, Attention, StepCacheKind

# The help keeps line breaks, so a paragraph is one line; a lone backspace keeps the lines below it.
ANIMATE_HELP = (
    "Animate the character in the picture REF with the motion in DRIVING.\n\n"
    "DRIVING is a video of a moving person, or the folder that extract-pose made of one; or give "
    "--pose and --face. The poses of a video are kept in VIDEO_pose beside the result. "
    "The result is DRIVING_REF.mp4 in the current folder unless --output says otherwise; its path "
    "is all that goes to stdout. An interrupted run continues when the same command is run again."
    f"""

\b
Examples:
  {PROGRAM} animate anna.png dance.mp4
  {PROGRAM} animate anna.png dance.mp4 --minutes 2 -o anna.mp4
  {PROGRAM} animate anna.png dance_pose --size auto
  {PROGRAM} animate anna.png dance.mp4 --model toy
  {PROGRAM} animate anna.png dance.mp4 --lora my.safetensors=0.8
  {PROGRAM} animate --config anna.json --seed 7 -o other.mp4
"""
)


_option = partial(option, AnimateSettings)


def run_animate(
    ref: Annotated[
        Path | None,
        typer.Argument(metavar="REF", help="Picture of the character.", show_default=False),
    ] = None,
    driving: Annotated[
        Path | None,
        typer.Argument(
            metavar="DRIVING",
            help="Video of a moving person, or a folder made by extract-pose.",
            show_default=False,
        ),
    ] = None,
    pose: Annotated[
        Path | None, _option("pose", "Video of drawn skeletons, instead of DRIVING.", LENGTH)
    ] = None,
    face: Annotated[
        Path | None, _option("face", "Video of face crops, instead of DRIVING.", LENGTH)
    ] = None,
    minutes: Annotated[
        float | None,
        _option("minutes", "Length of the video.", LENGTH, default="the driving motion's"),
    ] = None,
    seconds: Annotated[
        float | None, _option("seconds", "Or its length in seconds.", LENGTH)
    ] = None,
    frames: Annotated[int | None, _option("frames", "Or its length in frames.", LENGTH)] = None,
    start: StartOption = None,
    end: Annotated[
        str | None,
        _option("end", "Where the motion ends.", LENGTH, metavar="TIME", default="its own end"),
    ] = None,
    extend: Annotated[
        Extend | None,
        _option(
            "extend",
            "When the motion is shorter than asked: pingpong, loop, hold, or an error.",
            LENGTH,
            metavar="HOW",
        ),
    ] = None,
    pose_model: Annotated[
        str | None,
        _option(
            "pose_model",
            "Who estimates the poses of a raw video, see extract-pose.",
            LENGTH,
            metavar="NAME|FILE",
            default=OF_MODEL,
        ),
    ] = None,
    detector: Annotated[
        str | None,
        _option(
            "detector",
            "Who finds the person in it.",
            LENGTH,
            metavar="NAME|FILE",
            default="the pose model's",
        ),
    ] = None,
    person: Annotated[
        int | None,
        _option("person", "Whom to follow in it: a number of --list-persons.", LENGTH),
    ] = None,
    select: Annotated[
        Select | None,
        _option("select", "Or by size or place in its first second.", LENGTH, default="size"),
    ] = None,
    retarget: Annotated[
        bool | None,
        _option(
            "retarget",
            "Give its poses the limb lengths and the place of the character.",
            LENGTH,
            flags=("--retarget/--no-retarget",),
            default="off",
        ),
    ] = None,
    pose_folder: Annotated[
        Path | None,
        _option(
            "pose_folder",
            "Where its poses are kept, and found again.",
            LENGTH,
            metavar="DIR",
            default="VIDEO_pose beside the result",
        ),
    ] = None,
    model: ModelOption = None,
    transformer: Annotated[
        Path | None,
        _option(
            "transformer",
            "Take the transformer from this .safetensors (float8 too) or .gguf file.",
            MODEL,
            metavar="FILE",
            default=OF_MODEL,
        ),
    ] = None,
    lora: LoraOption = None,
    lora_mode: Annotated[
        LoraMode | None,
        _option(
            "lora_mode",
            "LoRAs: auto, fused (into the weights) or separate (beside them).",
            MODEL,
            metavar="MODE",
            default="separate where weights come in 8 bits or less",
        ),
    ] = None,
    device: Annotated[
        Device | None,
        _option("device", "Where they run: auto, cuda, mps or cpu.", MODEL, metavar="NAME"),
    ] = None,
    dtype: DtypeOption = None,
    view: ViewOption = None,
    size: Annotated[
        str | None,
        _option(
            "size",
            "Size of the result; auto: the reference's aspect at the model's area.",
            PICTURE,
            metavar="WxH|auto",
            default=OF_MODEL,
        ),
    ] = None,
    fit: FitOption = None,
    fps: Annotated[
        float | None,
        _option("fps", "Frames per second; the motion keeps its speed.", PICTURE, default=OF_MODEL),
    ] = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    shift: ShiftOption = None,
    prompt: PromptOption = None,
    negative_prompt: Annotated[
        str | None,
        _option("negative_prompt", "Text to steer away from.", SAMPLING, default=OF_MODEL),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        _option("guidance_scale", "Above 1 every step costs twice.", SAMPLING),
    ] = None,
    memory: MemoryOption = None,
    carry_frames: CarryFramesOption = None,
    frames_per_chunk: FramesPerChunkOption = None,
    overlap: OverlapOption = None,
    identity_slots: IdentitySlotsOption = None,
    clip_image: ClipImageOption = None,
    vram: Annotated[
        Vram | None,
        _option(
            "vram",
            "Preset for a card of so many GB: 80, 48, 24, 16, 12 or 8; auto: what fits.",
            CARD,
            metavar="GB",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        _option(
            "precision",
            "How the blocks' weights are stored: full, fp8, fp8-matmul (multiplies in fp8 too), "
            "torchao-fp8, torchao-int8 or nf4.",
            CARD,
            metavar="HOW",
            default="the preset's",
        ),
    ] = None,
    offload: Annotated[
        Offload | None,
        _option(
            "offload",
            "What waits in main memory: none; model: idle networks; group: idle blocks; or on "
            "disk. Changes no pixel.",
            CARD,
            metavar="WHAT",
            default="the preset's",
        ),
    ] = None,
    vae_tiling: Annotated[
        Tiling | None,
        _option(
            "vae_tiling",
            "Decode frames in tiles of 256 pixels; they are always encoded whole.",
            CARD,
            default="the preset's",
        ),
    ] = None,
    text_device: Annotated[
        TextDevice | None,
        _option(
            "text_device",
            "Where a prompt is encoded that is not in the cache: on the device, or cpu.",
            CARD,
            default="the preset's",
        ),
    ] = None,
    fast: Annotated[
        bool | None,
        _option(
            "fast",
            "Few steps with the model's step-distilled LoRA; --steps, --lora and --guidance-scale "
            "win over it.",
            SPEED,
            default="off",
        ),
    ] = None,
    attention: Annotated[
        Attention | None,
        _option(
            "attention",
            "Kernels of attention: auto, sdpa (torch's), sdpa-math, sdpa-flash, sdpa-efficient, "
            "sdpa-cudnn, flash, flash3, sage.",
            SPEED,
            metavar="NAME",
        ),
    ] = None,
    compile: Annotated[  # noqa: A002  # named as its field
        bool | None,
        _option(
            "compile",
            "Compile the transformer's blocks first; pays off in long videos.",
            SPEED,
            default="off",
        ),
    ] = None,
    step_cache: Annotated[
        StepCacheKind | None,
        _option(
            "step_cache",
            "Skip the blocks of steps that change little, from the second chunk on: off or mag.",
            SPEED,
            metavar="HOW",
        ),
    ] = None,
    step_cache_threshold: Annotated[
        float | None,
        _option(
            "step_cache_threshold",
            "How much error it may gather: more is faster.",
            SPEED,
            default=f"{STEP_CACHE_THRESHOLD:g}",
        ),
    ] = None,
    concurrent: Annotated[
        bool | None,
        _option(
            "concurrent",
            "Decode, encode and write a chunk while the next one is sampled.",
            SPEED,
            flags=("--concurrent/--no-concurrent",),
        ),
    ] = None,
    parallel: Annotated[
        Parallel | None,
        _option(
            "parallel",
            "How the processes that torchrun starts share a video: ulysses, ring, or what they "
            "can.",
            SPEED,
            metavar="HOW",
        ),
    ] = None,
    spare_rank: Annotated[
        bool | None,
        _option(
            "spare_rank",
            "The first of them leaves the transformer to the others, and decodes meanwhile.",
            SPEED,
            default="off",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "output",
            "The video to write.",
            RESULT,
            flags=("--output", "-o"),
            default="DRIVING_REF.mp4",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, _option("overwrite", "Replace an existing result.", RESULT)
    ] = None,
    audio: Annotated[
        bool | None,
        _option("audio", "Keep the driving video's sound.", RESULT, flags=("--audio/--no-audio",)),
    ] = None,
    pose_beside: Annotated[
        bool | None,
        _option(
            "pose_beside",
            "Show the pose beside the result.",
            RESULT,
            flags=("--pose-beside/--no-pose-beside",),
            default="off",
        ),
    ] = None,
    codec: Annotated[Codec | None, _option("codec", "Video codec.", RESULT)] = None,
    crf: Annotated[
        int | None, _option("crf", "Quality, 0 to 51; lower is better and larger.", RESULT)
    ] = None,
    png: Annotated[
        Path | None,
        _option("png", "Also write every frame into this folder as PNG.", RESULT, metavar="DIR"),
    ] = None,
    config: ConfigFile = None,
    resume: Annotated[
        bool | None,
        _option("resume", "Continue an unfinished run.", RUN, flags=("--resume/--no-resume",)),
    ] = None,
    keep_run: Annotated[
        bool | None,
        _option("keep_run", "Keep the run folder, so that the video can be lengthened.", RUN),
    ] = None,
    dry_run: Annotated[bool | None, _option("dry_run", "Print the plan and stop.", RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate animate`."""
    # The parameters are named as the settings fields; the other three are the command line's own.
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("config", "as_json", "quiet")
    }
    options = combine({} if config is None else read_saved_options(config, AnimateSettings), given)
    if "ref" not in options:
        raise SettingsError("REF is missing. Give a picture of the character.")
    settings = AnimateSettings.from_json(options)
    launch = this_launch()
    if launch is not None and not launch.is_main:
        run_partner(launch)
        return
    check_launch(settings, launch)
    check_animate(settings)
    with resumable("again" if settings.resume else "without --no-resume"):
        from everanimate_cli.animate import animate
        from everanimate_cli.animate_processes import open_processes
        from everanimate_cli.console import show_progress

        with (
            show_progress(quiet=quiet) as on_event,
            open_processes(launch, leave) as processes,
        ):
            result = animate(settings, on_event, processes)
    show_result(result, as_json=as_json, is_plan=settings.dry_run)
