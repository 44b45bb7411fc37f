"""`everanimate eval`: videos against a truth, a reference and a driving pose, moment by moment.

Every video goes by once, beside its truth and its driving poses. All metrics look at the same frame
and keep a few numbers of it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.eval_manifest import list_entries
from everanimate_cli.eval_meters import (
    OF_BACKGROUND,
    Networks,
    build_meters,
    missing_input,
)
from everanimate_cli.eval_result import (
    FORMAT_VERSION,
    EvalPlan,
    Evaluation,
    Measure,
    MethodResult,
    summarise,
)
from everanimate_cli.eval_subject import PersonMasks, Subject, open_subject
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.feature_files import STEP_FRAMES, FeatureWriter, distances, read_sums
from everanimate_cli.frame_metrics import Moment, Whole
from everanimate_cli.frechet import PairSums
from everanimate_cli.hashes import hash_file
from everanimate_cli.metric_table import METRICS
from everanimate_cli.records import read_json_object

if TYPE_CHECKING:
    from everanimate_cli.eval_manifest import EvalEntry
    from everanimate_cli.eval_settings import EvalSettings
    from everanimate_cli.frame_metrics import Outcome

_BATCH_FRAMES = 8  # that are decoded at a time
_BATCH_BYTES = 2**26
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
    horizons, fps = settings.stretches, float(subject.made.rate)
    measures = cache.read()
    features = _feature_paths(subject, settings, hashes)
    outcomes: dict[str, Outcome] = {}
    if settings.manifest is not None:  # whose FID and FVD need the features themselves
        measures = {name: each for name, each in measures.items() if name not in STEP_FRAMES}
        for name, path in features.items():
            sums = read_sums(path, horizons, step_s=STEP_FRAMES[name] / fps)
            if sums is not None:
                outcomes[name] = distances(name, sums, len(horizons))
    wanted = [name for name in settings.metric_names if name not in measures]
    missing = [name for name in wanted if name not in outcomes]
    if len(missing) < len(settings.metric_names):
        count = len(settings.metric_names) - len(missing)
        on_event(Note(text=f"{entry.name}: {count} metrics from the cache"))
    logs = {name: FeatureWriter(path) for name, path in features.items() if name in missing}
    measured, failed = _look(subject, missing, settings, networks, logs, on_event)
    outcomes |= measured
    for name in wanted:
        outcome = outcomes[name]
        measures[name] = summarise(name, outcome, horizons, fps)
        if settings.manifest is not None and isinstance(outcome, Whole) and outcome.sums:
            pools.setdefault((entry.method, name), PairSums()).absorb(outcome.sums)
    if missing:
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
        truth_start_s=subject.truth_start_s,
        extend=None if subject.extension is None else subject.extension.extend,
        driving_frames=None if subject.extension is None else subject.extension.num_frames,
        chunk_joins=subject.joins or (),
        compared_frames=subject.compared_frames,
        metrics={name: measures[name] for name in settings.metric_names},
    )


def _look(
    subject: Subject,
    names: Sequence[str],
    settings: EvalSettings,
    networks: Networks,
    logs: Mapping[str, FeatureWriter],
    on_event: OnEvent,
) -> tuple[dict[str, Outcome], Collection[str]]:
    """Measure a video.

    Returns:
        What came of each metric, and the names of those that lack something.
    """
    meters, failed = build_meters(subject, names, settings, networks, logs)
    outcomes: dict[str, Outcome] = dict(failed)
    if not meters:
        return outcomes, failed
    needs_mask = any(name in names and name not in failed for name in OF_BACKGROUND)
    with ExitStack() as stack:
        for name in logs.keys() - failed.keys():
            stack.enter_context(logs[name])
        on_event(PhaseStarted(name=f"measuring {subject.entry.name}", total=subject.num_frames))
        for moment in _moments(subject, with_person=needs_mask):
            for meter in meters:
                meter.add(moment)
            on_event(PhaseAdvanced(done=moment.index + 1))
        for meter in meters:
            outcomes |= meter.outcomes()
    return outcomes, failed


def _moments(subject: Subject, *, with_person: bool) -> Iterator[Moment]:
    """All frames in order, with those of the same moment in truth and driving.

    Each file is decoded in a thread of its own, a few frames ahead.
    """
    height, width = subject.size
    step = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (3 * height * width)))
    readers: dict[str, tuple[Callable[[range], Any], int]] = {
        "made": (subject.made.read, subject.num_frames)
    }
    if subject.truth is not None:
        readers["truth"] = (subject.truth.read, subject.compared_frames)
    if subject.poses is not None and with_person:
        readers["person"] = (PersonMasks(subject).read, subject.num_frames)
    with ThreadPoolExecutor(max_workers=len(readers)) as pool:

        def ask(first: int) -> dict[str, Future[Any]]:
            return {
                name: pool.submit(read, range(first, min(first + step, count)))
                for name, (read, count) in readers.items()
                if first < count
            }

        coming = ask(0)
        for first in range(0, subject.num_frames, step):
            frames = {name: future.result() for name, future in coming.items()}
            coming = ask(first + step) if first + step < subject.num_frames else {}
            for offset in range(len(frames["made"])):
                made_u8, truth_u8, person = (
                    frames[name][offset] if offset < len(frames.get(name, ())) else None
                    for name in ("made", "truth", "person")
                )
                assert made_u8 is not None
                yield Moment(first + offset, made_u8, truth_u8, person)


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
        "start_s": [subject.start_s, subject.truth_start_s],
        "extension": None if subject.extension is None else asdict(subject.extension),
        "fit": subject.fit,
        "joins": list(subject.joins) if subject.joins is not None else None,
        "baseline_frames": subject.baseline_frames,
        "options": {name: saved[name] for name in shaping},
        "versions": _versions(),
    }


def _feature_paths(
    subject: Subject, settings: EvalSettings, hashes: Mapping[str, str]
) -> dict[str, Path]:
    """Where the features behind a metric of a test set are kept; empty without a cache."""
    if settings.cache is None or settings.manifest is None:
        return {}
    request = {
        "files": [hashes["generated"], hashes.get("truth")],
        "truth_start_s": subject.truth_start_s,
        "compared_frames": subject.compared_frames,
        "resize": settings.resize,
        "versions": _versions(),
    }
    names = [name for name in STEP_FRAMES if name in settings.metric_names]
    return {name: settings.cache / f"{_digest({**request, 'of': name})}.npy" for name in names}


def _digest(request: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _fingerprint(model: Path) -> list[object]:
    """What tells one content of a checkpoint folder from another; empty for other models."""
    files = sorted((model / "image_encoder").glob("*.safetensors"))
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


class _Cache:
    """Measurements of one video in a folder, by a hash of all that shapes them."""

    def __init__(self, folder: Path | None, request: Mapping[str, object]) -> None:
        self._path = None if folder is None else folder / f"{_digest(request)}.json"

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
        entries = {name: each.to_json(as_lists=False) for name, each in measures.items()}
        with atomic_path(self._path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(entries, file, default=list)


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
