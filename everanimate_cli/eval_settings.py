"""Every option of `eval` with its default, and how stretches of time and gates are written.

Standard library only.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple, Self

from everanimate_cli.errors import SettingsError
from everanimate_cli.metric_table import METRICS
from everanimate_cli.records import THIS_RUN, Options, decode_time
from everanimate_cli.settings import HUB_MODEL, Device, Fit

HORIZONS: Final = "0-10,10-30,30-60,60-90,90+"
# What papers report: the first ten seconds, and a minute and a half.
PAPER_HORIZONS: Final = "0-10,0-90"
BASELINE_S: Final = 2.0  # what drift is measured against, where chunks are not known

# How a video goes on after the end of its driving; with "none" the driving is as long as the video.
Continuation = Literal["pingpong", "loop", "hold", "none"]
# What a report shows beside its numbers: players and pictures, pictures, or nothing.
ReportMedia = Literal["videos", "stills", "none"]

_OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"\d+(?:\.\d+)?"
_GATE = re.compile(
    r"\s*(?P<metric>[a-z]\w*)(?:\.(?P<place>overall|slope|[\d.]+(?:-[\d.]+|\+)?s))?"
    r"(?:@(?P<method>[^<>=@]*[^<>=@\s]))?\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
_IN_METHOD_NAMES = re.compile(r"[^<>=@]*[^<>=@\s]")


class Horizon(NamedTuple):
    """A stretch of the video.

    Attributes:
        start_s: Its first moment [s].
        end_s: The moment after its last one [s]; None for the end of the video.
    """

    start_s: float
    end_s: float | None = None

    @property
    def label(self) -> str:
        """Such as "10-30s" or "90+s"."""
        end = "+" if self.end_s is None else f"-{self.end_s:g}"
        return f"{self.start_s:g}{end}s"

    def holds(self, time_s: float) -> bool:
        """Whether a frame shown at this moment belongs to it."""
        return self.start_s <= time_s and (self.end_s is None or time_s < self.end_s)


def parse_horizons(text: str) -> tuple[Horizon, ...]:
    """Stretches of time from "0-10,10-30,90+", or "paper" for the first 10 and the first 90 s.

    Raises:
        ValueError: If the text is none, or a stretch is empty or there twice.
    """
    horizons = []
    for part in (PAPER_HORIZONS if text.strip() == "paper" else text).split(","):
        match = re.fullmatch(rf"\s*({_NUMBER})(?:-({_NUMBER})|\+)\s*", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is not a stretch of time")
        horizon = Horizon(float(match[1]), None if match[2] is None else float(match[2]))
        if horizon.end_s is not None and horizon.end_s <= horizon.start_s:
            raise ValueError(f"{part.strip()!r} is empty")
        if horizon in horizons:
            raise ValueError(f"{part.strip()!r} is there twice")
        horizons.append(horizon)
    return tuple(horizons)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must not be: `psnr.90s<20`, `flicker.slope@ours>0.5`.

    Attributes:
        text: As given.
        metric: Its name.
        place: "overall", "slope" or a stretch of time: "10-30s", "90+s", or "90s" for the one that
            ends there.
        method: Whose; None for all.
        sign: "<", "<=", ">" or ">=".
        limit: What it is compared with.
    """

    text: str
    metric: str
    place: str
    method: str | None
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read METRIC[.PLACE][@METHOD]<NUMBER.

        Raises:
            ValueError: If the text is no such comparison, or the metric is unknown.
        """
        match = _GATE.fullmatch(text)
        if match is None:
            raise ValueError(
                "it is no comparison. Write METRIC<NUMBER, such as psnr<20, psnr.90s<20, "
                "psnr.slope<-1 or 'ssim.overall@ours<=0.8'"
            )
        if match["metric"] not in METRICS:
            raise ValueError(f"'{match['metric']}' is unknown. Known: {', '.join(METRICS)}")
        limit = float(match["limit"])
        if not math.isfinite(limit):
            raise ValueError(f"{match['limit']} is not a finite number")
        return cls(
            text=text.strip(),
            metric=match["metric"],
            place=match["place"] or "overall",
            method=match["method"],
            sign=match["sign"],
            limit=limit,
        )

    def horizon_index(self, horizons: Sequence[Horizon]) -> int | None:
        """Which stretch of time is meant; None for "overall" and "slope".

        Raises:
            ValueError: If there is none such, or "90s" could be two.
        """
        if self.place in ("overall", "slope"):
            return None
        labels = [horizon.label for horizon in horizons]
        if self.place in labels:
            return labels.index(self.place)
        end = re.fullmatch(rf"({_NUMBER})s", self.place)
        fitting = [
            index
            for index, horizon in enumerate(horizons)
            if end is not None and horizon.end_s == float(end[1])
        ]
        if len(fitting) == 1:
            return fitting[0]
        problem = "could be several stretches of time" if fitting else "is no stretch of time"
        raise ValueError(f"'{self.place}' {problem}. Known: {', '.join(labels)}")

    def is_broken_by(self, value: float) -> bool:
        """Whether the value is what must not be."""
        return _OPERATORS[self.sign](value, self.limit)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Options):
    """What `everanimate eval` is asked to do.

    Attributes:
        generated: Videos to measure, each called by its file name without the suffix.
        method: More of them, written NAME=FILE.
        manifest: A test set instead: a .csv or .jsonl list, see `read_manifest`.
        truth: The video that they should equal.
        reference: Picture of the character.
        driving: Folder that `extract-pose` made of the driving video.
        start: Where `truth` and `driving` begin [s]; None for what the settings beside a result
            say, else 0.
        extend: How the videos go on after the end of the driving; None for what the settings beside
            a result say, else "none".
        resize: How a truth of another size is brought to that of the video; None refuses it.
        horizons: Stretches of time, see `parse_horizons`.
        metrics: Names separated by commas; None for all.
        baseline: Seconds at the start that drift is measured against; None for the first chunk.
        frames_per_chunk: Of the videos; None for what the settings beside a result say.
        overlap: Frames that neighbouring chunks share, see `frames_per_chunk`.
        sample_fps: Frames per second that networks look at, except for FID and FVD.
        model: Whose CLIP image encoder measures identity.
        pose_model: Who estimates poses; None for who did it for `driving`.
        detector: Who finds the person; None for the one that goes with `pose_model`.
        device: Where the networks run.
        download: Whether weights that are missing are fetched.
        fail_if: Gates, see `Gate`.
        cache: Folder where measurements are kept and found again.
        output: JSON file for the whole result.
        csv: Table of it as a CSV file.
        plot: Its curves over time as a PNG file.
        report: Page of it as an HTML file.
        report_media: What the page holds beside its numbers.
        overwrite: Whether these files may be replaced.
        dry_run: Whether only the plan is made.
    """

    LEAST: ClassVar = {"frames_per_chunk": 2, "overlap": 0, "start": 0}
    ABOVE_ZERO: ClassVar = ("baseline", "sample_fps")

    generated: tuple[Path, ...] = ()
    method: tuple[str, ...] = ()
    manifest: Path | None = None
    truth: Path | None = None
    reference: Path | None = None
    driving: Path | None = None
    start: float | None = field(default=None, metadata={"decode": decode_time})
    extend: Continuation | None = None
    resize: Fit | None = None
    horizons: str = HORIZONS
    metrics: str | None = None
    baseline: float | None = None
    frames_per_chunk: int | None = None
    overlap: int | None = None
    sample_fps: float = 2.0
    model: str = HUB_MODEL
    pose_model: str | None = None
    detector: str | None = None
    device: Device = "auto"
    download: bool = True
    fail_if: tuple[str, ...] = ()
    cache: Path | None = None
    output: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    report: Path | None = None
    report_media: ReportMedia = "videos"
    overwrite: bool = field(default=False, metadata=THIS_RUN)
    dry_run: bool = field(default=False, metadata=THIS_RUN)

    @staticmethod
    def label(name: str) -> str:
        """How a field is written on the command line."""
        return "GENERATED" if name == "generated" else "--" + name.replace("_", "-")

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        self._check_inputs()
        check_chunks(self.frames_per_chunk, self.overlap, self.label)
        for name, parse in (("horizons", parse_horizons), ("metrics", _parse_metrics)):
            value = getattr(self, name)
            try:
                parse(value)
            except ValueError as error:
                raise SettingsError(f"{self.label(name)} {value}: {error}.") from error
        self._check_gates()

    def _check_inputs(self) -> None:
        if self.manifest is not None:
            for name in ("generated", "method", "truth", "reference", "driving", "start"):
                value = getattr(self, name)
                if value not in (None, ()):
                    shown = value[0] if isinstance(value, tuple) else value
                    raise SettingsError(
                        f"{self.label(name)} {shown} and --manifest {self.manifest} exclude each "
                        "other: the manifest names all files. Leave one of them out."
                    )
            return
        if not self.generated and not self.method:
            raise SettingsError(
                "GENERATED is missing. Give a video, --method NAME=FILE or --manifest FILE."
            )
        names = self.methods()
        for name in names:
            if names.count(name) > 1:
                raise SettingsError(
                    f"two videos are called '{name}'. Name them by --method NAME=FILE."
                )

    def _check_gates(self) -> None:
        known = None if self.manifest is not None else [name for name, _ in self.methods_and_files]
        for text in self.fail_if:
            try:
                gate = Gate.parse(text)
                gate.horizon_index(self.stretches)
                if gate.metric not in self.metric_names:
                    raise ValueError(f"'{gate.metric}' is not among --metrics {self.metrics}")
                if known is not None and gate.method not in (None, *known):
                    raise ValueError(f"'{gate.method}' is no video. Known: {', '.join(known)}")
            except ValueError as error:
                raise SettingsError(f"--fail-if '{text}': {error}.") from error

    def methods(self) -> list[str]:
        """Names of the videos, in their order."""
        return [name for name, _ in self.methods_and_files]

    @property
    def methods_and_files(self) -> list[tuple[str, Path]]:
        """(name, video) of all that are not in a manifest.

        Raises:
            SettingsError: If one is not written NAME=FILE.
        """
        pairs = [(path.stem, path) for path in self.generated]
        for text in self.method:
            name, _, file = text.partition("=")
            if not file or not is_method_name(name):
                raise SettingsError(f"--method {text} is not a named video. Write NAME=FILE.")
            pairs.append((name, Path(file)))
        return pairs

    @property
    def stretches(self) -> tuple[Horizon, ...]:
        """The horizons."""
        return parse_horizons(self.horizons)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What to measure, in the order of the table."""
        return _parse_metrics(self.metrics)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """What must not be."""
        return tuple(Gate.parse(text) for text in self.fail_if)


def check_chunks(
    frames_per_chunk: int | None, overlap: int | None, label: Callable[[str], str]
) -> None:
    """Refuse one without the other, or an overlap that leaves nothing of a chunk.

    Args:
        frames_per_chunk: Frames of a chunk.
        overlap: Frames that neighbouring chunks share.
        label: What an error calls the two fields.

    Raises:
        SettingsError: Naming the field and the value.
    """
    length, shared = label("frames_per_chunk"), label("overlap")
    if overlap is None:
        if frames_per_chunk is not None:
            raise SettingsError(
                f"{length} {frames_per_chunk} needs {shared} beside it. "
                f"Give {shared} 0 for chunks that share no frames."
            )
    elif frames_per_chunk is None:
        raise SettingsError(f"{shared} {overlap} needs {length} beside it.")
    elif overlap >= frames_per_chunk:
        raise SettingsError(f"{shared} {overlap} is not below {length} {frames_per_chunk}.")


def is_method_name(name: str) -> bool:
    """Whether a gate can name it."""
    return _IN_METHOD_NAMES.fullmatch(name) is not None


def _parse_metrics(text: str | None) -> tuple[str, ...]:
    if text is None:
        return tuple(METRICS)
    wanted: Collection[str] = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in METRICS:
            raise ValueError(f"'{name}' is unknown. Known: {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in wanted)
