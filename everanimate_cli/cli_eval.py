"""The command `eval`."""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everanimate_cli.cli_options import (
    MODEL,
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
from everanimate_cli.eval_settings import Continuation, EvalSettings, ReportMedia
from everanimate_cli.preflight import check_eval
from everanimate_cli.records import read_saved_options
from everanimate_cli.settings import Device, Fit

if TYPE_CHECKING:
    from everanimate_cli.eval_result import Evaluation

EVAL_HELP = (
    "Measure how good videos are, and whether they stay so for minutes.\n\n"
    "With --truth they are compared with the video that they should equal; with --reference the "
    "person is compared with the character; with --driving the pose with the driving one, and the "
    "background is told from the person. Drift of colours and sharpness, flicker and jumps at "
    "chunk joins need nothing but the video. What cannot be measured says what it needs.\n\n"
    "Every metric is given for the whole video, by stretches of time (--horizons) and as a slope "
    "per minute. The table goes to stdout, or all numbers with --json; --output, --csv, --plot and "
    "--report write files. --fail-if ends with exit code 1 if a number is not as it should be."
    f"""

\b
Examples:
  {PROGRAM} eval anna.mp4 --truth dance.mp4
  {PROGRAM} eval anna.mp4 --reference anna.png --driving dance_pose
  {PROGRAM} eval --method ours=a.mp4 --method peer=b.mp4 --truth dance.mp4
  {PROGRAM} eval a.mp4 b.mp4 --truth dance.mp4 --report report.html
  {PROGRAM} eval a.mp4 --truth t.mp4 --fail-if 'psnr.90s<20'
  {PROGRAM} eval --manifest testset.csv --metrics psnr,ssim -o eval.json
"""
)

_COMPARED = "What it is compared with"
_MEASURED = "What is measured"

_option = partial(option, EvalSettings)


def run_eval(
    generated: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="GENERATED",
            help="Videos to measure, each called by its file name.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        _option("method", "A video with a name; can be repeated.", _COMPARED, metavar="NAME=FILE"),
    ] = None,
    manifest: Annotated[
        Path | None,
        _option(
            "manifest",
            "A test set instead: .csv or .jsonl with the columns generated, method, sample, truth, "
            "reference, driving, start, extend, frames_per_chunk, overlap.",
            _COMPARED,
            metavar="FILE",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        _option("truth", "The video that they should equal.", _COMPARED, metavar="VIDEO"),
    ] = None,
    reference: Annotated[
        Path | None,
        _option("reference", "Picture of the character.", _COMPARED, metavar="PICTURE"),
    ] = None,
    driving: Annotated[
        Path | None,
        _option(
            "driving",
            "Folder that extract-pose made of the driving video.",
            _COMPARED,
            flags=("--driving",),
            metavar="DIR",
        ),
    ] = None,
    start: Annotated[
        str | None,
        _option(
            "start",
            "Where truth and driving begin: 12.5 or 1:02.5.",
            _COMPARED,
            metavar="TIME",
            default="as saved beside the video, or 0",
        ),
    ] = None,
    extend: Annotated[
        Continuation | None,
        _option(
            "extend",
            "How the videos go on after the end of the driving: pingpong, loop, hold or none.",
            _COMPARED,
            metavar="HOW",
            default="as saved beside the video, or none",
        ),
    ] = None,
    resize: Annotated[
        Fit | None,
        _option(
            "resize",
            "Bring a truth of another size to that of the video: contain, cover or stretch.",
            _COMPARED,
            metavar="HOW",
            default="refuse it",
        ),
    ] = None,
    horizons: Annotated[
        str | None,
        _option(
            "horizons",
            "Stretches of time in seconds, or 'paper' for 0-10,0-90.",
            _MEASURED,
            metavar="LIST",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        _option("metrics", "Names separated by commas.", _MEASURED, metavar="LIST", default="all"),
    ] = None,
    baseline: Annotated[
        float | None,
        _option(
            "baseline",
            "Seconds at the start that drift is measured against.",
            _MEASURED,
            default="the first chunk, or 2",
        ),
    ] = None,
    frames_per_chunk: Annotated[
        int | None,
        _option(
            "frames_per_chunk",
            "Frames of a chunk, to find the joins.",
            _MEASURED,
            default="as saved beside the video",
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        _option(
            "overlap",
            "Frames that neighbouring chunks share.",
            _MEASURED,
            default="as saved beside the video",
        ),
    ] = None,
    sample_fps: Annotated[
        float | None,
        _option(
            "sample_fps",
            "Frames per second that networks look at; FID and FVD take all.",
            _MEASURED,
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        _option(
            "fail_if",
            "Exit with 1 if so: METRIC[.slope|.90s|.10-30s][@NAME]<NUMBER; can be repeated.",
            _MEASURED,
            metavar="GATE",
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "model",
            "Whose CLIP image encoder measures identity: 'toy' (embedded), a folder, or a Hub id.",
            MODEL,
            metavar="MODEL",
            default="the released model",
        ),
    ] = None,
    pose_model: Annotated[
        str | None,
        _option(
            "pose_model",
            "Who estimates the poses, see extract-pose.",
            MODEL,
            metavar="NAME|FILE",
            default="as for --driving",
        ),
    ] = None,
    detector: Annotated[
        str | None,
        _option(
            "detector",
            "Who finds the person.",
            MODEL,
            metavar="NAME|FILE",
            default="the pose model's",
        ),
    ] = None,
    device: Annotated[
        Device | None, _option("device", "Where the networks run.", MODEL, metavar="NAME")
    ] = None,
    download: Annotated[
        bool | None,
        _option(
            "download",
            "Fetch weights that a metric needs.",
            MODEL,
            flags=("--download/--no-download",),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "output",
            "Write all numbers into this JSON file.",
            RESULT,
            flags=("--output", "-o"),
            metavar="FILE",
        ),
    ] = None,
    csv: Annotated[
        Path | None, _option("csv", "Write the table as CSV.", RESULT, metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None,
        _option("plot", "Draw the curves over time as PNG.", RESULT, metavar="FILE"),
    ] = None,
    report: Annotated[
        Path | None,
        _option("report", "Write a page with all of it as HTML.", RESULT, metavar="FILE"),
    ] = None,
    report_media: Annotated[
        ReportMedia | None,
        _option(
            "report_media",
            "What the page shows beside its numbers: videos (and stills), stills or none.",
            RESULT,
            metavar="WHAT",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, _option("overwrite", "Replace existing files.", RESULT)
    ] = None,
    cache: Annotated[
        Path | None,
        _option("cache", "Keep measurements here, and find them again.", RUN, metavar="DIR"),
    ] = None,
    config: ConfigFile = None,
    dry_run: Annotated[bool | None, _option("dry_run", "Print the plan and stop.", RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate eval`."""
    # The parameters are named as the settings fields; the other three are the command line's own.
    given = {
        name: [str(item) for item in value] if isinstance(value, list) else value
        for name, value in locals().items()
        if value not in (None, []) and name not in ("config", "as_json", "quiet")
    }
    saved = {} if config is None else read_saved_options(config, EvalSettings)
    settings = EvalSettings.from_json({**saved, **given})
    check_eval(settings)
    with resumable("again"):
        from everanimate_cli.console import show_progress
        from everanimate_cli.eval_result import EvalPlan
        from everanimate_cli.evaluation import evaluate

        with show_progress(quiet=quiet) as on_event:
            result = evaluate(settings, on_event)
        if isinstance(result, EvalPlan):
            show_result(result, as_json=as_json, is_plan=True)
            return
        entries = result.to_json(as_lists=False)
        _write_files(result, entries)
    if as_json:
        # Piece by piece: as one text an hour of video would need many times its own size.
        json.dump(entries, sys.stdout, ensure_ascii=False, default=list)
        typer.echo()
    else:
        from everanimate_cli.evaluation_tables import lay_out

        typer.echo(lay_out(result))
    broken = result.broken_gates()
    for line in broken:
        typer.echo(f"--fail-if {line}", err=True)
    if broken:
        raise typer.Exit(1)


def _write_files(evaluation: "Evaluation", entries: Mapping[str, Any]) -> None:
    """The files that were asked for; `entries` is the evaluation as JSON."""
    settings = evaluation.settings
    if settings.output is not None:
        from everanimate_cli.atomic_files import atomic_path

        with (
            atomic_path(settings.output) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            json.dump(entries, file, ensure_ascii=False, default=list)
            file.write("\n")
    if settings.csv is not None:
        from everanimate_cli.evaluation_tables import write_csv

        write_csv(evaluation, settings.csv)
    if settings.plot is not None:
        from everanimate_cli.report import plot_png

        plot_png(entries, settings.plot)
    if settings.report is not None:
        from everanimate_cli.report import write_report

        write_report(
            entries,
            settings.report,
            videos={result.entry.name: result.entry.generated for result in evaluation.methods},
            truth=settings.truth,
            reference=settings.reference,
            driving=settings.driving,
            media=settings.report_media,
        )
