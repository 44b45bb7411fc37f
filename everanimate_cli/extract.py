"""`everanimate extract-pose`: a driving video in, a folder with its pose and face videos out.

Decoding runs ahead of the networks and encoding behind them, each in its own thread with a bounded
number of frames in flight. Finished segments are on disk with the state that the next one needs,
so that a killed extraction goes on where it was and gives the same bytes.

Source: pose page sections 1, 4 to 9 and 12.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everanimate_cli import pose_models
from everanimate_cli.atomic_files import write_json
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import InputError, MediaError, RunError, SettingsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.hashes import hash_file
from everanimate_cli.images import contain_box, fit_frame, fit_size, read_image, write_png
from everanimate_cli.model_table import DETECTORS, POSE_MODELS, is_local, local_file
from everanimate_cli.pose_analysis import (
    Analyser,
    Person,
    Source,
    choose_person,
    damage_note,
    describe_people,
    look_through,
    no_pose,
    open_source,
    opencv_in_line,
    plan_retarget,
    read_ahead,
)
from everanimate_cli.pose_folder import (
    Encoder,
    Renderer,
    join_segments,
    publish_files,
    read_state,
)
from everanimate_cli.records import CommandResult, option_name
from everanimate_cli.runs import ExtractFolder
from everanimate_cli.settings import (
    CANVAS_MULTIPLE,
    HUB_PRESET,
    ExtractSettings,
    run_folder,
)
from everanimate_cli.tracking import Tracks
from everanimate_cli.workspace import list_differences, open_work

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

FORMAT_VERSION = 1
# A killed extraction loses less than this; a segment grows by some frames if the person is missing
# just at its end.
SEGMENT_FRAMES = 125
_FRAMES_IN_FLIGHT = 8
_WAITING_BYTES = 2**30
_SMALL_CONTENT = 0.5  # share of the canvas below which the person comes out small


def extract(settings: ExtractSettings, on_event: OnEvent) -> CommandResult:
    """Make the folder that the settings ask for, or continue where an earlier run stopped.

    Args:
        settings: Checked options.
        on_event: Told of the phases, of every frame and of what is worth a line.

    Returns:
        The finished folder and facts about it; with `settings.dry_run` the plan alone.

    Raises:
        EverAnimateError: If an input, option or model cannot be used; nothing is written then.
        RunError: If the video is damaged from some moment on; what comes before is written.
        OSError: If the disk is full; the run folder stays and the same command continues it.
    """
    started_s = time.monotonic()
    output = settings.default_output if settings.output is None else settings.output
    with ExitStack() as stack:
        stack.enter_context(opencv_in_line())
        source = stack.enter_context(open_source(settings, on_event))
        picture = _read_reference(settings)
        size = _choose_size(settings, picture, source.size)
        _check_gap(settings, source)
        facts: dict[str, Any] = {
            "frames": source.num_frames,
            "seconds": round(source.num_frames / settings.fps, 3),
            "fps": settings.fps,
            "size": f"{size[1]}x{size[0]}",
            "source_size": f"{source.size[1]}x{source.size[0]}",
            "pose_model": settings.pose_model,
        }
        if settings.dry_run:
            return CommandResult(output=output, facts=facts)
        request = make_request(settings, size)
        models = load_models(settings, on_event)
        tracks, chosen = choose_person(source, models.detector, settings, on_event)
        plan = template = None
        if settings.retarget is not None:
            assert picture is not None  # read above
            plan, template = plan_retarget(source, models, settings, picture, (tracks, chosen))
            note = template.note(settings)
            if note is not None:
                on_event(Note(text=note))
        warnings = [] if plan is None else list(plan.warnings)
        if plan is None and _content_share(source.size, size, settings) < _SMALL_CONTENT:
            warnings.append(
                "the driving picture fills less than half of the pose video: "
                "--retarget puts the person where the character stands"
            )
        for warning in warnings:
            on_event(Note(text=warning))
        work = stack.enter_context(
            open_work(
                ExtractFolder(run_folder(output)),
                request,
                resume=settings.resume,
                overwrite=settings.overwrite,
            )
        )
        analyser = Analyser(models, settings, source.size, (tracks, chosen))
        renderer = Renderer(settings, source.size, size, plan)
        num_frames = _work_through(work, source, analyser, renderer, on_event)
        facts |= {"frames": num_frames, "seconds": round(num_frames / settings.fps, 3)}
        summary = join_segments(work, settings, renderer)
        if not (summary.persons >= 0).any():
            work.remove()
            raise no_pose(settings)
        people = {"people": analyser.num_people}
        facts |= people | summary.facts()
        facts |= {
            "detector_calls": models.detector.num_calls,
            "networks_s": round(models.seconds_in_network, 3),
        }
        if picture is not None:
            write_png(
                work.joined_path("reference.png"), fit_frame(picture, *size, fit=settings.fit)
            )
        record = {
            "format_version": FORMAT_VERSION,
            "source": os.path.relpath(
                settings.video.parent.resolve() / settings.video.name, output.resolve()
            ),
            "source_sha256": request["VIDEO sha256"],
            "start_s": settings.start,
            "fps": settings.fps,
            "size": facts["size"],
            "source_size": facts["source_size"],
            "num_frames": num_frames,
            "models": models.record,
            "settings": settings.to_json(),
            "request": request,
            "warnings": warnings,
            "damaged_s": source.damaged_s,
            **people,
            **summary.record(),
        }
        if plan is not None and template is not None:
            record["retarget"] = plan.to_json() | {"template_frame": template.index}
        write_json(work.joined_path("extract.json"), record)
        publish_files(work, output)
        work.remove()
        facts["timings"] = {"total_s": round(time.monotonic() - started_s, 3)}
        for note in summary.notes():
            on_event(Note(text=note))
        if source.damaged_s is not None:
            raise RunError(
                f"VIDEO {settings.video} is damaged at {source.damaged_s:.3f} s. "
                f"The {num_frames} frames before it are in {output}."
            )
    return CommandResult(output=output, facts=facts)


def load_models(settings: ExtractSettings, on_event: OnEvent) -> pose_models.PoseModels:
    """The detector and the pose model of the settings, downloaded if need be."""
    return pose_models.load_models(
        settings.pose_model,
        settings.detector,
        provider=settings.provider,
        threads=settings.threads or os.cpu_count() or 1,
        on_event=on_event,
    )


def make_request(settings: ExtractSettings, size: tuple[int, int]) -> dict[str, Any]:
    """Everything that shapes the pose and face videos; an extraction belongs to one such request.

    Where a file lies does not matter, what is in it does.

    Args:
        settings: Checked options.
        size: (height, width) of the pose video.

    Returns:
        JSON values by name.
    """
    files = {
        "VIDEO": settings.video,
        "--reference": settings.reference,
        "--retarget": settings.retarget,
    }
    for name, known in (("pose_model", POSE_MODELS), ("detector", DETECTORS)):
        value = getattr(settings, name)
        if value is not None and is_local(value, known):
            files[option_name(name)] = local_file(option_name(name), value)
    paths = ("video", "output", "reference", "retarget", "threads")
    request = {k: v for k, v in settings.to_json().items() if k not in paths}
    request["size"] = f"{size[1]}x{size[0]}"
    for name, path in files.items():
        if path is not None:
            request.pop(name.lstrip("-").replace("-", "_"), None)
            request[f"{name} sha256"] = hash_file(path)
    names = ("everanimate", "onnxruntime", "av", "numpy")
    return request | {f"{name} version": version(name) for name in names}


def reusable(folder: Path, request: dict[str, Any]) -> list[str] | None:
    """Whether a folder was made for this request.

    Args:
        folder: Of an earlier extraction, or none at all.
        request: What `make_request` gives now.

    Returns:
        None if there is no whole extraction, else each difference in words; empty if it fits.

    Raises:
        InputError: If its record cannot be read.
    """
    path = folder / "extract.json"
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8")).get("request")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Delete the folder.") from error
    if not isinstance(before, dict):
        return ["it was made by another program"]
    kept = (_shaping(side) for side in (before, request))
    return list_differences(*kept)


def _shaping(request: dict[str, Any]) -> dict[str, Any]:
    """What poses hang on: they do not become wrong by an upgrade or on another machine."""
    return {
        name: value
        for name, value in request.items()
        if not name.endswith(" version") and name not in ("provider", "threads")
    }


# --- input ---------------------------------------------------------------------------------------


def _read_reference(settings: ExtractSettings) -> Frames | None:
    for name in ("reference", "retarget"):
        path = getattr(settings, name)
        if path is not None:
            try:
                return read_image(path)
            except MediaError as error:
                raise MediaError(f"--{name} {error}") from error
    return None


def _choose_size(
    settings: ExtractSettings, picture: Frames | None, source_size: tuple[int, int]
) -> tuple[int, int]:
    """(height, width) of the pose video; it and the face's are checked against the encoder."""
    size = settings.height_width
    if size is None:
        shape = source_size if picture is None else picture.shape[:2]
        area = HUB_PRESET.width * HUB_PRESET.height
        size = fit_size(shape[0], shape[1], area, CANVAS_MULTIPLE)
    face = settings.face_size
    checks = ((f"--size {settings.size}", size), (f"--face-size {face}", (face, face)))
    for label, (height, width) in checks:
        try:
            VideoWriter(Path(), height=height, width=width, rate=settings.fps, crf=settings.crf)
        except SettingsError as error:
            raise SettingsError(f"{label}: {error}") from error
    return size


def _check_gap(settings: ExtractSettings, source: Source) -> None:
    """Refuse to keep more frames waiting for the end of a gap than memory should hold."""
    most = max(
        _WAITING_BYTES // (3 * source.size[0] * source.size[1]),
        round(ExtractSettings.max_gap * settings.fps),
    )
    if settings.max_gap * settings.fps > most:
        size = f"{source.size[1]}x{source.size[0]}"
        raise SettingsError(
            f"--max-gap {settings.max_gap:g} would keep "
            f"{round(settings.max_gap * settings.fps)} frames of {size} in memory. "
            f"Give {int(10 * most / settings.fps) / 10:g} or less."
        )


def _content_share(
    source: tuple[int, int], canvas: tuple[int, int], settings: ExtractSettings
) -> float:
    """Part of the canvas that the driving picture fills."""
    if settings.fit != "contain":
        return 1.0
    _, _, height, width = contain_box(*source, *canvas)
    return height * width / (canvas[0] * canvas[1])


def list_persons(settings: ExtractSettings, on_event: OnEvent) -> list[Person]:
    """Look through the video for people, with the detector alone.

    Args:
        settings: Checked options.
        on_event: Told of every frame looked at.

    Returns:
        The people in the order of `--person`.

    Raises:
        EverAnimateError: If the video or a model cannot be used, or nobody is found.
    """
    with opencv_in_line(), open_source(settings, on_event) as source:
        models = load_models(settings, on_event)
        known_s = source.damaged_s
        tracks = Tracks(*source.size)
        on_event(PhaseStarted(name="persons", total=source.num_frames))
        for index in look_through(source, models.detector, settings, tracks):
            if index + 1 < source.num_frames:
                on_event(PhaseAdvanced(done=index + 1))
        on_event(PhaseAdvanced(done=source.num_frames))
        if source.damaged_s is not None and source.damaged_s != known_s:
            on_event(damage_note(settings, source.damaged_s))
        return describe_people(tracks, settings)


# --- the work ------------------------------------------------------------------------------------


def _work_through(
    work: ExtractFolder,
    source: Source,
    analyser: Analyser,
    renderer: Renderer,
    on_event: OnEvent,
) -> int:
    """Make all segments that are missing.

    Returns:
        Number of frames in all segments; fewer than planned if the video is damaged.
    """
    settings = analyser.settings
    num_segments, first = work.count_finished(), 0
    if num_segments:
        state = read_state(work, num_segments - 1)
        first = state["next_frame"]
        analyser.restore(state["analyser"])
    on_event(PhaseStarted(name="poses", total=source.num_frames, done=first))
    if first >= source.num_frames:
        return first
    in_flight = max(2, min(_FRAMES_IN_FLIGHT, 2**28 // (3 * source.size[0] * source.size[1])))
    with Encoder(work, renderer, settings, num_segments, in_flight) as encoder:
        start = num_frames = first
        for index, frame in enumerate(read_ahead(source, first, in_flight), first):
            for seen in analyser.push(index, frame):
                encoder.write(seen)
            if index + 1 - start >= SEGMENT_FRAMES and analyser.is_settled:
                encoder.close({"next_frame": index + 1, "analyser": analyser.state()})
                start = index + 1
            num_frames = index + 1
            on_event(PhaseAdvanced(done=num_frames))
        for seen in analyser.flush():
            encoder.write(seen)
        if start < num_frames:
            encoder.close({"next_frame": num_frames, "analyser": analyser.state()})
    return num_frames
