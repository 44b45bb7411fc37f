"""The command `extract-pose`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from everanimate_cli.cli_options import (
    LENGTH,
    MODEL,
    PROGRAM,
    RESULT,
    RUN,
    AsJson,
    Quiet,
    option,
    resumable,
    show_result,
)
from everanimate_cli.preflight import check_extract
from everanimate_cli.settings import (
    DrawMode,
    ExtractSettings,
    Fit,
    Provider,
    Reacquire,
    Select,
)

EXTRACT_HELP = (
    "Turn VIDEO into pose and face videos, the folder that animate takes.\n\n"
    "One person is chosen and followed. The folder is VIDEO_pose in the current folder unless "
    "--output says otherwise; its path is all that goes to stdout. An interrupted extraction "
    "continues when the same command is run again. Models are downloaded once; --pose-model and "
    "--detector also take .onnx files."
    f"""

\b
Examples:
  {PROGRAM} extract-pose dance.mp4
  {PROGRAM} extract-pose dance.mp4 --size 480x832 --preview
  {PROGRAM} extract-pose dance.mp4 --list-persons
  {PROGRAM} extract-pose dance.mp4 --person 1 --start 1:10 --end 1:30
  {PROGRAM} extract-pose dance.mp4 --retarget anna.png -o dance_anna
"""
)

_PERSON = "Person"
_DRAWING = "Drawing"

_option = partial(option, ExtractSettings)


def run_extract_pose(
    video: Annotated[
        Path, typer.Argument(metavar="VIDEO", help="Video of a moving person.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        _option(
            "output",
            "The folder to make.",
            RESULT,
            flags=("--output", "-o"),
            default="VIDEO_pose",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        _option("overwrite", "Replace an existing result.", RESULT),
    ] = None,
    size: Annotated[
        str | None,
        _option(
            "size",
            "Of the pose video; auto: the aspect of the reference, or else of the video.",
            RESULT,
            metavar="WxH|auto",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        _option("fps", "Frames per second; the motion keeps its speed.", RESULT),
    ] = None,
    fit: Annotated[
        Fit | None,
        _option("fit", "How the video fills the pose video.", RESULT),
    ] = None,
    crf: Annotated[
        int | None,
        _option("crf", "Quality, 0 to 51; lower is better and larger.", RESULT),
    ] = None,
    lossless: Annotated[
        bool | None,
        _option(
            "lossless",
            "Exact colours (yuv444p, CRF 0); few players show such files.",
            RESULT,
        ),
    ] = None,
    preview: Annotated[
        bool | None,
        _option(
            "preview",
            "Also write preview.mp4: source, pose and face side by side.",
            RESULT,
        ),
    ] = None,
    face_size: Annotated[
        int | None, _option("face_size", "Side of the face video.", RESULT)
    ] = None,
    start: Annotated[
        str | None,
        _option("start", "Where to begin: 12.5 or 1:02.5.", LENGTH, metavar="TIME"),
    ] = None,
    end: Annotated[
        str | None,
        _option(
            "end",
            "Where to end.",
            LENGTH,
            metavar="TIME",
            default="the video's end",
        ),
    ] = None,
    list_persons: Annotated[
        bool,
        typer.Option(
            "--list-persons",
            help="List the people in the video, and stop.",
            rich_help_panel=_PERSON,
        ),
    ] = False,
    person: Annotated[
        int | None,
        _option(
            "person",
            "Whom to follow: a number of --list-persons, 0 is the largest at the start.",
            _PERSON,
        ),
    ] = None,
    select: Annotated[
        Select | None,
        _option(
            "select",
            "Or by size or place in the first second.",
            _PERSON,
            default="size",
        ),
    ] = None,
    reacquire: Annotated[
        Reacquire | None,
        _option(
            "reacquire",
            "Who may take over when this person is gone for long: the same one only, or any.",
            _PERSON,
        ),
    ] = None,
    max_gap: Annotated[
        float | None,
        _option(
            "max_gap",
            "Seconds without the person that are filled in.",
            _PERSON,
        ),
    ] = None,
    pose_model: Annotated[
        str | None,
        _option(
            "pose_model",
            "rtmw, rtmw-m, dwpose, vitpose, toy, or an .onnx file.",
            MODEL,
            metavar="NAME|FILE",
        ),
    ] = None,
    detector: Annotated[
        str | None,
        _option(
            "detector",
            "yolox-m, yolox-tiny, yolov10m, toy, or an .onnx file.",
            MODEL,
            metavar="NAME|FILE",
            default="the pose model's",
        ),
    ] = None,
    detect_every: Annotated[
        int | None,
        _option(
            "detect_every",
            "Frames from one look of the detector to the next; more looks where it is needed.",
            MODEL,
        ),
    ] = None,
    provider: Annotated[
        Provider | None,
        _option("provider", "Where the networks run.", MODEL),
    ] = None,
    threads: Annotated[
        int | None,
        _option(
            "threads",
            "Threads of a network on the CPU.",
            MODEL,
            default="all cores",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        _option(
            "reference",
            "Picture of the character, stored beside as the poses are fitted.",
            _DRAWING,
            metavar="REF",
        ),
    ] = None,
    retarget: Annotated[
        Path | None,
        _option(
            "retarget",
            "The same, and the poses get its limb lengths and its place.",
            _DRAWING,
            metavar="REF",
        ),
    ] = None,
    template_frame: Annotated[
        int | None,
        _option(
            "template_frame",
            "Frame that is compared with the reference.",
            _DRAWING,
            default="the first with a whole pose",
        ),
    ] = None,
    smooth: Annotated[
        bool | None,
        _option(
            "smooth",
            "Smooth the keypoints.",
            _DRAWING,
            flags=("--smooth/--no-smooth",),
        ),
    ] = None,
    face_smooth: Annotated[
        bool | None,
        _option(
            "face_smooth",
            "Smooth the face box.",
            _DRAWING,
            flags=("--face-smooth/--no-face-smooth",),
            default="off",
        ),
    ] = None,
    face_scale: Annotated[
        float | None,
        _option(
            "face_scale",
            "Area of the face crop over that of the landmarks.",
            _DRAWING,
        ),
    ] = None,
    face_square: Annotated[
        bool | None,
        _option("face_square", "Cut a square instead.", _DRAWING),
    ] = None,
    face_hold: Annotated[
        float | None,
        _option(
            "face_hold",
            "Seconds for which the last face box is used when the face turns away.",
            _DRAWING,
        ),
    ] = None,
    face_threshold: Annotated[
        float | None,
        _option(
            "face_threshold",
            "Least mean score of a face.",
            _DRAWING,
            default="the pose model's",
        ),
    ] = None,
    body_threshold: Annotated[
        float | None,
        _option(
            "body_threshold",
            "Least score of a drawn joint.",
            _DRAWING,
            default="the pose model's",
        ),
    ] = None,
    hand_threshold: Annotated[
        float | None,
        _option(
            "hand_threshold",
            "Least score of a drawn hand point.",
            _DRAWING,
            default="the pose model's",
        ),
    ] = None,
    draw_mode: Annotated[
        DrawMode | None,
        _option(
            "draw_mode",
            "canvas: drawn at the size of the result; native: at the video's, then shrunk.",
            _DRAWING,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        _option(
            "resume",
            "Continue an unfinished extraction.",
            RUN,
            flags=("--resume/--no-resume",),
        ),
    ] = None,
    dry_run: Annotated[bool | None, _option("dry_run", "Print the plan and stop.", RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate extract-pose`."""
    # The parameters are named as the settings fields; the other three are the command line's own.
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("list_persons", "as_json", "quiet")
    }
    settings = ExtractSettings.from_json(given)
    check_extract(settings, lists_only=list_persons)
    with resumable("again" if settings.resume else "without --no-resume"):
        from everanimate_cli import extract
        from everanimate_cli.console import show_progress

        with show_progress(quiet=quiet) as on_event:
            if list_persons:
                persons = extract.list_persons(settings, on_event)
            else:
                result = extract.extract(settings, on_event)
    if list_persons:
        if as_json:
            typer.echo(json.dumps([person.to_json() for person in persons], ensure_ascii=False))
        else:
            for person_seen in persons:
                typer.echo(person_seen.describe())
        return
    show_result(result, as_json=as_json, is_plan=settings.dry_run)
