"""Which meters look at a video, the networks behind them, and why a metric cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everanimate_cli import frame_metrics
from everanimate_cli.errors import WeightsError
from everanimate_cli.frame_metrics import Meter, Unavailable
from everanimate_cli.images import read_image
from everanimate_cli.metric_table import METRICS
from everanimate_cli.settings import DEFAULT_POSE_MODEL

if TYPE_CHECKING:
    from everanimate_cli.eval_manifest import EvalEntry
    from everanimate_cli.eval_settings import EvalSettings
    from everanimate_cli.eval_subject import Subject
    from everanimate_cli.events import OnEvent
    from everanimate_cli.feature_files import FeatureWriter
    from everanimate_cli.person_metrics import DrivingPose, PersonFinder

_OF_DRIFT = ("colour_drift", "contrast_drift", "saturation_drift", "sharpness_drift")
_OF_LEARNED = ("lpips", "background_lpips", "fid", "fvd")
OF_BACKGROUND = ("background_psnr", "background_lpips")
_OF_POSE = ("pose_pck", "pose_pck_strict", "pose_distance")


class Networks:
    """Networks that metrics share, loaded when the first one asks; of each a reason if it fails."""

    def __init__(self, settings: EvalSettings, on_event: OnEvent) -> None:
        self._settings, self._on_event = settings, on_event
        self._loaded: dict[object, Any] = {}

    def _once(self, key: object, load: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            try:
                self._loaded[key] = load()
            except WeightsError as error:
                self._loaded[key] = Unavailable(f"needs weights: {error}")
        return self._loaded[key]

    def device(self) -> Any:
        """Where the networks run."""
        from everanimate_cli.weights import choose_device  # noqa: PLC0415  # heavy

        return self._once("device", lambda: choose_device(self._settings.device))

    def learned(self, metric: str) -> Any:
        """The network of LPIPS, FID or FVD, or `Unavailable`."""
        from everanimate_cli import learned_metrics  # noqa: PLC0415  # heavy

        reason = learned_metrics.lacking(metric, download=self._settings.download)
        if reason is not None:
            return Unavailable(reason)
        return self._once(
            metric,
            lambda: learned_metrics.load_network(
                metric, self.device(), self._on_event, download=self._settings.download
            ),
        )

    def pose_models(self, driving: Path | None) -> Any:
        """Detector and pose model, or `Unavailable`."""
        from everanimate_cli import pose_models  # noqa: PLC0415  # heavy

        names = choose_pose_models(self._settings, driving)
        device, download = self._settings.device, self._settings.download

        def load() -> pose_models.PoseModels:
            try:
                return pose_models.load_models(
                    *names,
                    provider=device if device in ("cuda", "cpu") else "auto",
                    threads=None,
                    on_event=self._on_event,
                    download=download,
                )
            except WeightsError as error:
                if download:
                    raise
                raise WeightsError(
                    f"the pose model {names[0]} or its detector is not on this machine, and "
                    "--no-download fetches none"
                ) from error

        return self._once(names, load)

    def clip_features(self) -> Any:
        """Features [D] of a picture by the model's image encoder, or `Unavailable`."""
        from everanimate_cli.clip_features import load_clip_features  # noqa: PLC0415  # heavy

        return self._once(
            "clip",
            lambda: load_clip_features(
                self._settings.model,
                self.device(),
                self._on_event,
                download=self._settings.download,
            ),
        )


def choose_pose_models(settings: EvalSettings, driving: Path | None) -> tuple[str, str | None]:
    """(pose model, detector): as given, else those that saw the driving video."""
    if settings.pose_model is not None:
        return settings.pose_model, settings.detector
    saved: Mapping[str, Any] = {}
    if driving is not None and (driving / "extract.json").is_file():
        from everanimate_cli.person_metrics import read_driving_record  # noqa: PLC0415  # heavy

        options = read_driving_record(driving).get("settings")
        saved = options if isinstance(options, dict) else {}
    pose_model = str(saved.get("pose_model") or DEFAULT_POSE_MODEL)
    detector = settings.detector or saved.get("detector")
    return pose_model, None if detector is None else str(detector)


def missing_input(name: str, entry: EvalEntry) -> str | None:
    """Which option a metric lacks, in words; None if it lacks none."""
    lacking = [
        option for option in METRICS[name].needs if getattr(entry, option.lstrip("-")) is None
    ]
    return f"needs {' and '.join(lacking)}" if lacking else None


def build_meters(
    subject: Subject,
    wanted: Sequence[str],
    settings: EvalSettings,
    networks: Networks,
    logs: Mapping[str, FeatureWriter],
) -> tuple[list[Meter], dict[str, Unavailable]]:
    """What is to look at the frames, and which metrics cannot be had.

    Args:
        subject: The video.
        wanted: Names of metrics.
        settings: Checked options.
        networks: Behind some of them.
        logs: Where the features behind a metric go, by its name; it may be nowhere.
    """
    entry, fps = subject.entry, float(subject.made.rate)
    failed: dict[str, Unavailable] = {}
    names = []
    for name in wanted:
        reason = missing_input(name, entry)
        if reason is None:
            names.append(name)
        else:
            failed[name] = Unavailable(reason)
    meters: list[Meter] = []
    if {"psnr", "l1"} & {*names}:
        meters.append(frame_metrics.ErrorMeter())
    if "ssim" in names:
        meters.append(frame_metrics.SsimMeter())
    if {*_OF_DRIFT} & {*names}:
        meters.append(frame_metrics.DriftMeter(subject.baseline_frames))
    backdrop = frame_metrics.Backdrop(subject.baseline_frames)
    if "background_psnr" in names:
        meters.append(frame_metrics.BackgroundMeter(backdrop))
    if {"flicker", "seam"} & {*names}:
        meters.append(frame_metrics.MotionMeter(subject.joins))
    every = max(1, round(fps / settings.sample_fps))
    learned = [name for name in _OF_LEARNED if name in names]
    if learned:
        found, lacking = _learned_meters(subject, learned, settings, networks, backdrop, logs)
        meters += found
        failed |= lacking
    if {*_OF_POSE, "identity"} & {*names}:
        found, lacking = _person_meters(subject, names, every, networks)
        meters += found
        failed |= lacking
    return meters, failed


def _learned_meters(
    subject: Subject,
    names: Sequence[str],
    settings: EvalSettings,
    networks: Networks,
    backdrop: frame_metrics.Backdrop,
    logs: Mapping[str, FeatureWriter],
) -> tuple[list[Meter], dict[str, Unavailable]]:
    """Meters with published networks."""
    fps, horizons = float(subject.made.rate), settings.stretches
    every = max(1, round(fps / settings.sample_fps))
    meters: list[Meter] = []
    failed: dict[str, Unavailable] = {}
    for name in names:
        network = networks.learned(name.removeprefix("background_"))
        if isinstance(network, Unavailable):
            failed[name] = network
            continue
        from everanimate_cli import learned_metrics as learned  # noqa: PLC0415  # heavy

        device, log = networks.device(), logs.get(name)
        match name:
            case "lpips":
                meters.append(learned.LpipsMeter(network, device, every))
            case "background_lpips":
                meters.append(learned.BackgroundLpipsMeter(network, device, every, backdrop))
            case "fid":
                meters.append(learned.FidMeter(network, device, horizons, fps, log))
            case _:
                meters.append(learned.FvdMeter(network, horizons, fps, log))
    return meters, failed


def _person_meters(
    subject: Subject, names: Sequence[str], every: int, networks: Networks
) -> tuple[list[Meter], dict[str, Unavailable]]:
    """Meters of identity and pose."""
    from everanimate_cli import person_metrics  # noqa: PLC0415  # heavy

    entry = subject.entry
    asked = [name for name in (*_OF_POSE, "identity") if name in names]
    models = networks.pose_models(entry.driving)
    if isinstance(models, Unavailable):
        return [], dict.fromkeys(asked, models)
    wanted: DrivingPose | None = None
    if entry.driving is not None:
        wanted = person_metrics.read_driving_pose(
            entry.driving,
            indices=[subject.driving_at(i) for i in range(0, subject.num_frames, every)],
            rate=subject.made.rate,
            start_s=subject.start_s,
            size=subject.size,
            fit=subject.fit,
        )
    finder = person_metrics.PersonFinder(models, every, wanted)
    meters: list[Meter] = []
    failed: dict[str, Unavailable] = {}
    if {*_OF_POSE} & {*names}:
        if wanted is None:
            reason = "needs the keypoints.npz of extract-pose in --driving"
            failed |= dict.fromkeys(_OF_POSE, Unavailable(reason))
        else:
            meters.append(person_metrics.PoseMeter(finder, wanted))
    if "identity" in names:
        meter = _identity_meter(entry, finder, networks)
        if isinstance(meter, Unavailable):
            failed["identity"] = meter
        else:
            meters.append(meter)
    return meters, failed


def _identity_meter(
    entry: EvalEntry, finder: PersonFinder, networks: Networks
) -> Meter | Unavailable:
    from everanimate_cli import person_metrics  # noqa: PLC0415  # heavy

    assert entry.reference is not None  # else the metric lacks an input
    picture = read_image(entry.reference)
    box = finder.find_in(picture)
    if box is None:
        return Unavailable("not defined: nobody is found in the reference")
    features_of = networks.clip_features()
    if isinstance(features_of, Unavailable):
        return features_of
    reference = features_of(person_metrics.crop_person(picture, box))
    return person_metrics.IdentityMeter(features_of, reference, finder)
