"""`everanimate animate`: from pictures and driving videos to one finished file."""

from __future__ import annotations

import platform
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from everanimate_cli import placement
from everanimate_cli.atomic_files import publish, write_json
from everanimate_cli.errors import RunError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.generation import Work, encode_again, generate, join, plan_work
from everanimate_cli.inputs import build_rollout, encode_texts, extract_driving, open_inputs
from everanimate_cli.offloading import is_out_of_memory, offload_folder
from everanimate_cli.preflight import settings_path
from everanimate_cli.preparation import Networks, Preparation, make_request, prepare
from everanimate_cli.records import CommandResult, counted
from everanimate_cli.runs import RunFolder, list_runs
from everanimate_cli.settings import AnimateSettings, run_folder
from everanimate_cli.workspace import open_work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from everanimate_cli.animate_processes import Processes
    from everanimate_cli.inputs import Inputs
    from everanimate_cli.model_folder import ModelSource


def animate(
    settings: AnimateSettings, on_event: OnEvent, processes: Processes | None = None
) -> CommandResult:
    """Make the video that the settings ask for, or continue where an earlier run stopped.

    Args:
        settings: Checked options.
        on_event: Told of every chunk and step, and of what is worth a line.
        processes: Those that share the transformer; None for this one alone.

    Returns:
        The finished video and facts about it; with `settings.dry_run` the plan alone.

    Raises:
        EverAnimateError: If an input, option or checkpoint cannot be used; nothing is written then.
        OSError: If the disk is full; the run folder stays and the same command continues it.
    """
    started_s = time.monotonic()
    timings: dict[str, float] = {}
    with ExitStack() as stack:
        prepared = prepare(settings, processes, stack, on_event)
        resolved, run, facts = prepared.settings, prepared.run, prepared.facts
        if resolved.dry_run:
            facts |= prepared.memory.choice.estimate.to_json()
            return CommandResult(output=resolved.output, facts=facts)
        networks = prepared.networks
        assert networks is not None  # only a dry run does without
        if prepared.inputs is None:
            prepared = _with_poses(prepared, networks.source, stack, on_event)
            resolved = prepared.settings
            timings["poses_s"] = time.monotonic() - started_s
            facts["pose_folder"] = str(resolved.driving)
        inputs = prepared.inputs
        assert inputs is not None
        request = make_request(prepared, networks, inputs)
        _name_other_runs(resolved.output, on_event)
        stack.enter_context(
            open_work(
                run,
                request,
                resume=resolved.resume,
                overwrite=resolved.overwrite,
            )
        )
        work = plan_work(run, prepared.chunks, resolved)
        on_event(Note(text=_describe_work(facts, work)))
        if work:
            facts |= _make_chunks(prepared, networks, inputs, work, timings, processes, on_event)
        facts["audio"] = join(run, prepared.chunks, inputs)
        publish(run.joined_path, resolved.output)
        timings["total_s"] = time.monotonic() - started_s
        facts["settings_file"] = str(settings_path(resolved.output))
        facts["timings"] = {name: round(value, 3) for name, value in timings.items()}
        record = {
            "settings": settings.to_json(),
            "effective": resolved.to_json(),
            "result": facts,
            "request": request,
            "model_revision": networks.source.revision,
            "anchor_frame_indices": prepared.anchors,
            "platform": platform.platform(),
        }
        write_json(run.record_path, record)
        publish(run.record_path, settings_path(resolved.output))
        if not resolved.keep_run:
            run.remove()
    return CommandResult(output=resolved.output, facts=facts)


# --- the run -------------------------------------------------------------------------------------


def _with_poses(
    prepared: Preparation, source: ModelSource, stack: ExitStack, on_event: OnEvent
) -> Preparation:
    """The same with the poses of its raw driving video extracted and opened."""
    size = prepared.size
    resolved, media = extract_driving(
        prepared.settings, prepared.media, source, size, prepared.face_size, on_event
    )
    inputs = open_inputs(resolved, media, size, prepared.face_size, stack, on_event)
    return replace(prepared, settings=resolved, media=media, inputs=inputs)


def _make_chunks(
    prepared: Preparation,
    networks: Networks,
    inputs: Inputs,
    work: Work,
    timings: dict[str, float],
    processes: Processes | None,
    on_event: OnEvent,
) -> dict[str, float]:
    """Load the networks and make what is left to do; facts about it."""
    settings, run, memory = prepared.settings, prepared.run, prepared.memory
    chunks = prepared.chunks
    if processes is not None:
        processes.describe_shortage = partial(_describe_shortage, run, memory)
        processes.forget = partial(_forget, run)
    with _working_memory(run, memory, on_event) as folder:
        loading_s = time.monotonic()
        prompts = encode_texts(
            settings,
            networks.source,
            memory.text_device,
            networks.dtype,
            on_event,
            run_folder=run.path,
        )
        pipeline = networks.load(prepared.device, processes, settings, folder)
        timings["load_s"] = time.monotonic() - loading_s
        for line in [] if pipeline.rota is None else pipeline.rota.notes():
            on_event(Note(text=line))
        rollout = build_rollout(settings, pipeline, inputs, chunks, prepared.anchors, prompts)
        encode_again(run, rollout, chunks, settings, inputs, work)
        return generate(run, rollout, chunks, settings, inputs, work, timings, on_event)


def _name_other_runs(output: Path, on_event: OnEvent) -> None:
    for run in list_runs(output.parent):
        path = run.folder.path
        # A run beside its result was kept on purpose.
        if path != run_folder(output) and not run.is_held and not run.has_result:
            on_event(
                Note(
                    text=f"{path} is an unfinished run ({run.describe()}). Its own command "
                    f"continues it; to delete it: everanimate runs --remove {quote(str(path))}"
                )
            )


def _describe_work(facts: dict[str, Any], work: Work) -> str:
    """What is about to happen, in one line."""
    line = (
        f"{counted(facts['frames'], 'frame')} of {facts['size']} at {facts['fps']:g} fps in "
        f"{counted(work.num_chunks, 'chunk')} of {counted(facts['steps'], 'step')}, "
        f"{facts['model']} on {facts['device']} in {facts['dtype']}"
    )
    parallel = facts["speed"].get("parallel")
    if parallel is not None:
        line += f", {parallel}"
    return f"{line}; {work.num_finished} done already" if work.num_finished else line


@contextmanager
def _working_memory(
    run: RunFolder, memory: placement.Plan, on_event: OnEvent
) -> Iterator[Path | None]:
    """Give the folder where blocks wait on disk, and turn running out of memory into a line."""
    for line in memory.notes():
        on_event(Note(text=line))
    try:
        with ExitStack() as stack:
            is_on_disk = memory.placement.offload == "disk"
            yield stack.enter_context(offload_folder(run.path)) if is_on_disk else None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(_describe_shortage(run, memory)) from error


def _describe_shortage(run: RunFolder, memory: placement.Plan) -> str:
    """What to do now that memory ran out."""
    _forget(run)
    return memory.describe_shortage(run.count_finished())


def _forget(run: RunFolder) -> None:
    """Remove a run in which nothing is finished, so that any options may follow."""
    if not run.count_finished():
        run.remove()
