"""The command `animate`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from everanimate_cli.cli_options import (
    LENGTH,
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
from everanimate_cli.preflight import check_animate
from everanimate_cli.records import read_saved_options
from everanimate_cli.settings import (
    AnimateSettings,
    Codec,
    Device,
    Extend,
    Select,
    combine,
)

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
    lora: LoraOption = None,
    device: Annotated[Device | None, _option("device", "Where the networks run.", MODEL)] = None,
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
    check_animate(settings)
    with resumable("again" if settings.resume else "without --no-resume"):
        from everanimate_cli.animate import animate
        from everanimate_cli.console import show_progress

        with show_progress(quiet=quiet) as on_event:
            result = animate(settings, on_event)
    show_result(result, as_json=as_json, is_plan=settings.dry_run)
