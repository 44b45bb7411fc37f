"""`everanimate eval`: videos against a truth, a reference and a driving pose, moment by moment.

Every video goes by once, beside its truth and its driving poses. All metrics look at the same frame
and keep a few numbers of it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from everanimate_cli import frame_metrics
from everanimate_cli.eval_manifest import list_entries
from everanimate_cli.eval_meters import Networks, build_meters, missing_input
from everanimate_cli.eval_result import (
    FORMAT_VERSION,
    EvalPlan,
    Evaluation,
    Measure,
    MethodResult,
    summarise,
)
from everanimate_cli.eval_subject import Subject, open_subject
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.frame_metrics import Moment, Whole, person_mask
from everanimate_cli.frechet import PairSums
from everanimate_cli.hashes import hash_file
from everanimate_cli.images import atomic_path
from everanimate_cli.metric_table import METRICS
from everanimate_cli.records import read_json_object

if TYPE_CHECKING:
    from everanimate_cli.eval_manifest import EvalEntry
    from everanimate_cli.eval_settings import EvalSettings
    from everanimate_cli.frame_metrics import Outcome

_BATCH_FRAMES = 8  # that are decoded at a time
_BATCH_BYTES = 2**26
_OF_SETS = ("fid", "fvd")
_PACKAGES = ("everanimate", "av", "numpy", "onnxruntime", "opencv-python-headless", "torch")
_EVAL_PACKAGES = ("cd-fvd", "torch-fidelity", "torchmetrics", "torchvision")


def evaluate(settings: EvalSettings, on_event: OnEvent) -> Evaluation | EvalPlan:
    """Measure the videos that the settings name.

    Args:
        settings: Checked options.
        on_event: Told of every frame, and of what is worth a line.

    Returns:
        All numbers; with `settings.dry_run` the plan alone.

    Raises:
        EverAnimateError: If a file cannot be used, or does not fit the others.
        OSError: If the disk is full.
    """
    with ExitStack() as stack:
        subjects = []
        for entry in list_entries(settings):
            subject = open_subject(entry, settings, on_event)
            stack.callback(subject.close)
            subjects.append(subject)
        if settings.dry_run:
            return _plan(subjects, settings)
        networks = Networks(settings, on_event)
        pools: dict[tuple[str, str], PairSums] = {}
        results = [_measure(subject, settings, networks, pools, on_event) for subject in subjects]
    return Evaluation(
        settings=settings,
        methods=tuple(results),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        pools=pools,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_EVAL_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _measure(
    subject: Subject,
    settings: EvalSettings,
    networks: Networks,
    pools: dict[tuple[str, str], PairSums],
    on_event: OnEvent,
) -> MethodResult:
    """Measure one video; of a test set, its features go into the pools."""
    entry = subject.entry
    hashes = _hashes(entry)
    cache = _Cache(settings.cache, _request(subject, settings, hashes))
    measures = cache.read()
    if settings.manifest is not None:  # the features themselves are too many to be kept
        measures = {name: each for name, each in measures.items() if name not in _OF_SETS}
    wanted = [name for name in settings.metric_names if name not in measures]
    if len(wanted) < len(settings.metric_names):
        on_event(Note(text=f"{entry.name}: {len(measures)} metrics from the cache"))
    if wanted:
        meters, failed = build_meters(subject, wanted, settings, networks)
        outcomes: dict[str, Outcome] = dict(failed)
        if meters:
            needs_mask = any(isinstance(each, frame_metrics.BackgroundMeter) for each in meters)
            on_event(PhaseStarted(name=f"measuring {entry.name}", total=subject.num_frames))
            for moment in _moments(subject, with_person=needs_mask):
                for meter in meters:
                    meter.add(moment)
                on_event(PhaseAdvanced(done=moment.index + 1))
            for meter in meters:
                outcomes |= meter.outcomes()
        horizons, fps = settings.stretches, float(subject.made.rate)
        for name in wanted:
            outcome = outcomes[name]
            measures[name] = summarise(name, outcome, horizons, fps)
            if settings.manifest is not None and isinstance(outcome, Whole) and outcome.sums:
                pools.setdefault((entry.method, name), PairSums()).absorb(outcome.sums)
        # What lacked a package or weights is tried again the next time.
        cache.write({name: each for name, each in measures.items() if name not in failed})
    subject.close()
    return MethodResult(
        entry=entry,
        sha256=str(hashes["generated"]),
        fps=float(subject.made.rate),
        size=subject.size,
        num_frames=subject.num_frames,
        start_s=subject.start_s,
        chunk_joins=subject.joins or (),
        compared_frames=subject.compared_frames,
        metrics={name: measures[name] for name in settings.metric_names},
    )


def _moments(subject: Subject, *, with_person: bool) -> Iterator[Moment]:
    """All frames in order, with those of the same moment in truth and driving.

    Each file is decoded in a thread of its own, a few frames ahead.
    """
    height, width = subject.size
    step = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (3 * height * width)))
    readers = {"made": subject.made}
    if subject.truth is not None:
        readers["truth"] = subject.truth
    if subject.poses is not None and with_person:
        readers["poses"] = subject.poses
    with ThreadPoolExecutor(max_workers=len(readers)) as pool:

        def ask(first: int) -> dict[str, Future[NDArray[np.uint8]]]:
            return {
                name: pool.submit(reader.read, range(first, min(first + step, len(reader))))
                for name, reader in readers.items()
                if first < len(reader)
            }

        coming = ask(0)
        for first in range(0, subject.num_frames, step):
            frames = {name: future.result() for name, future in coming.items()}
            coming = ask(first + step) if first + step < subject.num_frames else {}
            for offset, made_u8 in enumerate(frames["made"]):
                found = {
                    name: frames[name][offset]
                    for name in ("truth", "poses")
                    if name in frames and offset < len(frames[name])
                }
                person = None
                if "poses" in found:
                    person = person_mask(found["poses"], height, width)
                yield Moment(first + offset, made_u8, found.get("truth"), person)


# --- files that were measured before -------------------------------------------------------------


def _hashes(entry: EvalEntry) -> dict[str, str]:
    """Of all files that shape the numbers."""
    files = {"generated": entry.generated, "truth": entry.truth, "reference": entry.reference}
    if entry.driving is not None:
        for name in ("pose.mp4", "keypoints.npz", "extract.json"):
            files[name] = entry.driving / name
    return {name: hash_file(path) for name, path in files.items() if path and path.is_file()}


def _request(
    subject: Subject, settings: EvalSettings, hashes: Mapping[str, str]
) -> dict[str, object]:
    """All that the numbers hang on."""
    shaping = ("resize", "horizons", "sample_fps", "model", "pose_model", "detector")
    saved = settings.to_json()
    return {
        "format_version": FORMAT_VERSION,
        "files": dict(hashes),
        "model": _fingerprint(Path(settings.model)),
        "start_s": subject.start_s,
        "fit": subject.fit,
        "joins": list(subject.joins) if subject.joins is not None else None,
        "baseline_frames": subject.baseline_frames,
        "options": {name: saved[name] for name in shaping},
        "versions": _versions(),
    }


def _fingerprint(model: Path) -> list[object]:
    """What tells one content of a checkpoint folder from another; empty for other models."""
    files = sorted((model / "image_encoder").glob("*.safetensors"))
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


class _Cache:
    """Measurements of one video in a folder, by a hash of all that shapes them."""

    def __init__(self, folder: Path | None, request: Mapping[str, object]) -> None:
        text = json.dumps(request, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._path = None if folder is None else folder / f"{digest}.json"

    def read(self) -> dict[str, Measure]:
        """What is there by name; nothing from a damaged file."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            entries: Any = read_json_object(self._path)
            return {
                name: Measure.from_json(name, entry)
                for name, entry in entries.items()
                if name in METRICS
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def write(self, measures: Mapping[str, Measure]) -> None:
        """Keep what was measured."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entries = {name: measure.to_json() for name, measure in measures.items()}
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(entries), encoding="utf-8")


# --- a plan --------------------------------------------------------------------------------------


def _plan(subjects: Sequence[Subject], settings: EvalSettings) -> EvalPlan:
    lacking: dict[str, str] = {}
    for name in settings.metric_names:
        reasons = [missing_input(name, subject.entry) for subject in subjects]
        if all(reasons) and reasons[0] is not None:
            lacking[name] = reasons[0]
    facts = {
        "videos": {
            subject.entry.name: f"{subject.num_frames} frames, "
            f"{subject.num_frames / float(subject.made.rate):.2f} s"
            for subject in subjects
        },
        "metrics": ", ".join(name for name in settings.metric_names if name not in lacking),
        "not_available": lacking,
        "horizons": ", ".join(horizon.label for horizon in settings.stretches),
    }
    return EvalPlan(output=settings.output or Path(), facts=facts)
