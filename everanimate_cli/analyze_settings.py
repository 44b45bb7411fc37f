"""Every option of `analyze roundtrip` and `analyze attention` with its default."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from everanimate_cli.records import THIS_RUN, LoraSpec, Options, decode_time, parse_size
from everanimate_cli.settings import (
    HUB_MODEL,
    TEMPORAL_STRIDE,
    AnimateSettings,
    ClipImage,
    Device,
    Dtype,
    Fit,
    Memory,
    check_frames_per_chunk,
    check_size,
    check_stretch,
)

# What becomes of a decoded picture before it is encoded again.
Quantise = Literal["round", "truncate", "none"]

# What an analysis writes into its folder; with the last file it is whole.
ROUNDTRIP_FILES = ("roundtrip.csv", "roundtrip.png", "sheet.png", "roundtrip.json")
ATTENTION_FILES = ("attention.csv", "attention.png", "heatmap.png", "attention.json")


@dataclass(frozen=True, kw_only=True)
class RoundtripSettings(Options):
    """What `everanimate analyze roundtrip` is asked to do.

    Attributes:
        video: Video, or picture, which counts as a video of one frame.
        output: Folder to make; None for `default_output`.
        trips: How often the frames are encoded and decoded.
        quantise: How decoded pixels become 8 bits before they are encoded again; "none" hands on
            floats, clamped to [-1, 1].
        flat: Whether the built-in flat colours make the same trips.
        model: "toy", a checkpoint folder or a Hub id; only its VAE is loaded.
        size: "WIDTHxHEIGHT", or "auto" for the video's aspect at the model's area.
        fit: How frames of another aspect fill the picture.
        start: Where to begin [s].
        end: Where to end [s]; None for the video's end.
        frames_per_chunk: Frames that are encoded together, 4n+1; None for the model's.
        device: Where the VAE runs.
        overwrite: Whether an earlier result may be replaced.
        dry_run: Whether only the plan is made.
    """

    LEAST: ClassVar = {"frames_per_chunk": 1, "start": 0, "trips": 1}
    ABOVE_ZERO: ClassVar = ("end",)

    video: Path
    output: Path | None = None
    trips: int = 20
    quantise: Quantise = "round"
    flat: bool = True
    model: str = HUB_MODEL
    size: str = "auto"
    # Black bars would be part of what is measured.
    fit: Fit = "cover"
    start: float = field(default=0.0, metadata={"decode": decode_time})
    end: float | None = field(default=None, metadata={"decode": decode_time})
    frames_per_chunk: int | None = None
    device: Device = "auto"
    overwrite: bool = field(default=False, metadata=THIS_RUN)
    dry_run: bool = field(default=False, metadata=THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        check_stretch(self.start, self.end)
        check_frames_per_chunk(self, self.frames_per_chunk)
        check_size(self.size)

    @property
    def default_output(self) -> Path:
        """`<video>_roundtrip` in the current folder."""
        return Path(f"{self.video.resolve().stem}_roundtrip")

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Pixels of the frames; None for "auto", which needs the video."""
        return parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Options):
    """What `everanimate analyze attention` is asked to do: an animation that is looked into.

    Attributes:
        output: Folder to make; None for `default_output`.
        overwrite: Whether an earlier result may be replaced.
        dry_run: Whether only the plan is made.

    The other fields are those of `AnimateSettings`.
    """

    LEAST: ClassVar = AnimateSettings.LEAST
    ABOVE_ZERO: ClassVar = AnimateSettings.ABOVE_ZERO

    ref: Path
    driving: Path
    output: Path | None = None
    seconds: float | None = None
    frames: int | None = None
    start: float = field(default=0.0, metadata={"decode": decode_time})
    pose_model: str | None = None
    pose_folder: Path | None = None
    model: str = HUB_MODEL
    lora: tuple[LoraSpec, ...] | None = field(
        default=None, metadata={"decode": lambda value: [] if value == ["none"] else value}
    )
    view: tuple[Path, ...] = ()
    size: str | None = None
    fit: Fit = "contain"
    seed: int = 0
    steps: int | None = None
    shift: float | None = None
    prompt: str | None = None
    frames_per_chunk: int | None = None
    overlap: int | None = None
    identity_slots: int | None = None
    memory: Memory = "latent"
    carry_frames: int | None = None
    clip_image: ClipImage | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    overwrite: bool = field(default=False, metadata=THIS_RUN)
    dry_run: bool = field(default=False, metadata=THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        self.to_animate()

    @property
    def default_output(self) -> Path:
        """`<driving>_<ref>_attention` in the current folder, named as `animate` names its video."""
        return Path(f"{self.to_animate().default_output.stem}_attention")

    def to_animate(self) -> AnimateSettings:
        """The animation that is measured.

        Its `output` is never written; where it is decides where the poses of a raw video are kept.

        Raises:
            SettingsError: As `AnimateSettings` does.
        """
        shared = {item.name for item in fields(AnimateSettings)} - {"output", "dry_run"}
        values = {name: value for name, value in vars(self).items() if name in shared}
        beside = self.output and self.output.parent / f"{self.output.name}.mp4"
        return AnimateSettings(**values, output=beside, audio=False)


def motion_slots(memory: Memory, overlap: int) -> int:
    """How many of the target slots hold what the previous chunk handed on.

    Args:
        memory: What one chunk hands to the next.
        overlap: Frames that neighbouring chunks share; with pixel memory the frames carried.

    Returns:
        At least 1. With sink memory nothing is in these slots: they are counted for comparison.

    Source: method page section 2, "Condition tensor", and section 3, "Comparison modes".
    """
    if memory == "pixel":
        return (overlap - 1) // TEMPORAL_STRIDE + 1
    return max(1, overlap // TEMPORAL_STRIDE)
