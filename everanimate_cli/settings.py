"""Every option with its default, in one frozen dataclass per command, to and from JSON.

An option of the command line, a field here and a key in JSON have one name; only dash and
underscore differ. None means "as the model, the memory mode or the driving motion says";
`resolve` fills that in once the model is known.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from everanimate_cli.errors import InputError, SettingsError, WeightsError

Memory = Literal["latent", "pixel", "sink"]
ClipImage = Literal["previous", "reference"]
Fit = Literal["contain", "cover", "stretch"]
Extend = Literal["pingpong", "loop", "hold", "error"]
Codec = Literal["h264", "h265"]
Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Provider = Literal["auto", "cuda", "cpu"]
Select = Literal["size", "centre", "left", "right"]
Reacquire = Literal["same", "any"]
DrawMode = Literal["canvas", "native"]

TOY_MODEL = "toy"
HUB_MODEL = "Wan-AI/Wan2.2-Animate-14B-Diffusers"
MODEL_DEFAULTS_FILE = "everanimate.json"
POSE_SUFFIX = "_pose"  # of the folder that is made of a driving video

TEMPORAL_STRIDE = 4  # pixel frames per latent frame after the first (method page section 1)
CARRY_FRAMES = (1, 5)  # pixel memory only (method page section 3); the first is the default
CANVAS_MULTIPLE = 16  # sides of a pose video: VAE stride 8 times patch size 2
DEFAULT_POSE_MODEL = "rtmw"
MAX_CRF = 51  # the coarsest quality of x264 and x265

_POSITIONAL = {"ref": "REF", "driving": "DRIVING", "directory": "DIR", "video": "VIDEO"}
# Options of which only one makes sense: one on the command line makes void what a file says.
_DISPLACES = {
    "minutes": ("seconds", "frames"),
    "seconds": ("minutes", "frames"),
    "frames": ("minutes", "seconds"),
    "driving": ("pose", "face"),
    "pose": ("driving",),
    "face": ("driving",),
}
_LEAST = {
    "body_threshold": 0,
    "crf": 0,
    "detect_every": 1,
    "face_hold": 0,
    "face_scale": 0.1,
    "face_size": 1,
    "frames": 1,
    "frames_per_chunk": 1 + TEMPORAL_STRIDE,
    "guidance_scale": 1,
    "hand_threshold": 0,
    "height": 1,
    "identity_slots": 1,
    "max_gap": 0,
    "num_inference_steps": 1,
    "overlap": 1,
    "person": 0,
    "seed": 0,
    "start": 0,
    "steps": 1,
    "template_frame": 0,
    "threads": 1,
    "width": 1,
}
_ABOVE_ZERO = ("end", "fps", "minutes", "seconds", "shift")
# Options about this one run: a saved file must not overwrite anything when it is run again.
_THIS_RUN = {"this_run": True}


def option_name(name: str) -> str:
    """How a field is written on the command line: `--frames-per-chunk`, or `REF`."""
    return _POSITIONAL.get(name) or "--" + name.replace("_", "-")


def run_folder(output: Path) -> Path:
    """Where the finished chunks of a result wait until it is whole: `NAME.mp4.run` beside it."""
    return output.with_name(output.name + ".run")


def parse_time(text: str) -> float:
    """Seconds from "12.5", "1:02.5" or "1:00:02.5".

    Raises:
        ValueError: If the text is not such a time; after a colon 60 and more are refused.
    """
    match = re.fullmatch(r"(?:(?:(\d+):)?([0-5]?\d):(?=[0-5]?\d(?!\d)))?(\d+(?:\.\d*)?)", text)
    if match is None:
        raise ValueError(f"{text} is not a time")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) from "WIDTHxHEIGHT"; None for "auto".

    Raises:
        ValueError: If the text is neither.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"{text} is not a size")
    return int(match[2]), int(match[1])


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA and its strength, written `SOURCE` or `SOURCE=SCALE`.

    Attributes:
        source: A .safetensors file, or on the Hub `owner/name/path/to/file[@revision]`.
        scale: Factor on the LoRA's update; 1 is as trained.
    """

    source: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a LoRA as the command line and JSON write it.

        Only a finite number after the last "=" is a scale; any other "=" belongs to the source.

        Raises:
            ValueError: If the source is empty.
        """
        source, _, tail = text.rpartition("=")
        try:
            scale = float(tail) if source else math.nan
        except ValueError:
            scale = math.nan
        if not text or text.startswith("="):
            raise ValueError(f"{text} is not a LoRA")
        return cls(source, scale) if math.isfinite(scale) else cls(text)

    def __str__(self) -> str:
        """The form that `parse` reads back to the same LoRA."""
        # A source that ends like "=1" would be taken for a scale, so it always carries its own.
        if LoraSpec.parse(self.source) == self:
            return self.source
        return f"{self.source}={self.scale!r}"


class HubId(NamedTuple):
    """A place on the Hub, written `owner/name[/path][@revision]`.

    Attributes:
        repository: `owner/name`.
        path: Of a file in the repository, or "".
        revision: Branch, tag or commit hash; None where none is named.
    """

    repository: str
    path: str = ""
    revision: str | None = None


def split_hub_id(text: str) -> HubId | None:
    """The parts of a Hub id; None for anything else.

    What starts with "." or "~" is a path; so is what has an empty part, such as "/absolute".
    """
    pattern = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([^@]*))?(?:@([\w./-]+))?"
    match = re.fullmatch(pattern, text)
    return HubId(match[1], match[2] or "", match[3]) if match else None


# Field type -> (JSON types that fit, what an error asks for). A bool never passes for a number.
_JSON_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    Path: ((str, Path), "a path"),
    LoraSpec: ((str,), "a LoRA. Write FILE or FILE=SCALE"),
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}


class _UnfitError(ValueError):
    """A value that cannot become what its field holds."""

    def __init__(self, value: object, wanted: str) -> None:
        shown = value if isinstance(value, str | Path) else json.dumps(value, ensure_ascii=False)
        super().__init__(f"{shown} is not {wanted}.")


def _without_none(hint: Any) -> Any:
    """`int` for `int | None`; other types as they are."""
    kinds = get_args(hint)
    return next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else hint


def _decode(hint: Any, value: object) -> Any:
    """Turn a JSON or command-line value into what a field of type `hint` holds."""
    if value is None and NoneType in get_args(hint):
        return None
    hint = _without_none(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _UnfitError(value, "a list")
        return tuple(_decode(get_args(hint)[0], item) for item in value)
    if get_origin(hint) is Literal:
        hint = str
    json_types, wanted = _JSON_TYPES[hint]
    if not isinstance(value, json_types) or (isinstance(value, bool) and hint is not bool):
        raise _UnfitError(value, wanted)
    try:
        return LoraSpec.parse(str(value)) if hint is LoraSpec else hint(value)
    except (ValueError, OverflowError) as error:
        raise _UnfitError(value, wanted) from error


def _decode_time(value: object) -> object:
    try:
        return parse_time(value) if isinstance(value, str) else value
    except ValueError as error:
        wanted = "a time. Write seconds (12.5) or minutes:seconds (1:02.5)"
        raise _UnfitError(value, wanted) from error


def _decode_lora(value: object) -> object:
    return [] if value == ["none"] else value


def _encode(value: object) -> object:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return str(value) if isinstance(value, Path | LoraSpec) else value


def _refuse_unknown(data: Mapping[str, object], known: Collection[str], where: str = "") -> None:
    unknown = ", ".join(f"'{key}'" for key in data if key not in known)
    if unknown:
        raise SettingsError(f"{where}{unknown} is unknown. Known: {', '.join(sorted(known))}.")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A frozen dataclass that checks its single values and lives in JSON."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            self._check_value(name, _without_none(hint), getattr(self, name))

    @staticmethod
    def _label(name: str) -> str:
        """How an error names a field."""
        return name

    def _check_value(self, name: str, hint: Any, value: object) -> None:
        if value is None:
            return
        label = f"{self._label(name)} {value}"
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise SettingsError(f"{label} is unknown. Known: {', '.join(get_args(hint))}.")
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise SettingsError(f"{label} is not a finite number.")
            if name in _LEAST and value < _LEAST[name]:
                raise SettingsError(f"{label} is too small. Give {_LEAST[name]} or more.")
            if name in _ABOVE_ZERO and value <= 0:
                raise SettingsError(f"{label} is too small. Give a number above 0.")

    def _check_chunk(self, frames_per_chunk: int | None, overlap: int | None) -> None:
        label = f"{self._label('frames_per_chunk')} {frames_per_chunk}"
        if frames_per_chunk is not None and frames_per_chunk % TEMPORAL_STRIDE != 1:
            lower = frames_per_chunk - (frames_per_chunk - 1) % TEMPORAL_STRIDE
            raise SettingsError(f"{label} is not 4n+1. Give {lower} or {lower + TEMPORAL_STRIDE}.")
        if frames_per_chunk is not None and overlap is not None and overlap >= frames_per_chunk:
            raise SettingsError(f"{self._label('overlap')} {overlap} is not below {label}.")

    def _check_latent_overlap(self, overlap: int | None) -> None:
        if overlap is not None and overlap % TEMPORAL_STRIDE != 0:
            lower = overlap // TEMPORAL_STRIDE * TEMPORAL_STRIDE
            choices = f"{lower} or {lower + TEMPORAL_STRIDE}" if lower else str(TEMPORAL_STRIDE)
            raise SettingsError(
                f"{self._label('overlap')} {overlap} is not a multiple of 4. Give {choices}."
            )

    @classmethod
    def saved_names(cls) -> list[str]:
        """The fields that JSON holds: all but those about one run, such as `overwrite`."""
        return [item.name for item in fields(cls) if "this_run" not in item.metadata]

    def to_json(self) -> dict[str, object]:
        """What shapes the result, ready for `json.dump`; see `saved_names`."""
        return {name: _encode(getattr(self, name)) for name in self.saved_names()}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """Settings from JSON, or from the command line's options in the same form.

        Args:
            data: Field name -> value; a missing one keeps its default.

        Raises:
            SettingsError: If a key is unknown, a needed one is missing, or a value cannot work.
        """
        _refuse_unknown(data, [item.name for item in fields(cls)])
        hints = get_type_hints(cls)
        values = {}
        for item in fields(cls):
            label = cls._label(item.name)
            if item.name in data:
                try:
                    value = item.metadata.get("decode", lambda same: same)(data[item.name])
                    values[item.name] = _decode(hints[item.name], value)
                except _UnfitError as error:
                    raise SettingsError(f"{label} {error}") from error
            elif item.default is MISSING:
                raise SettingsError(f"{label} is missing.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelDefaults(_Record):
    """What a model was trained for: the content of `everanimate.json` in its folder.

    Attributes:
        fps: Frames per second.
        width: Width of the training pictures [px].
        height: Height of the training pictures [px].
        num_inference_steps: Euler steps per chunk.
        shift: Warp of the noise levels.
        frames_per_chunk: Frames decoded from one chunk, 4n+1.
        overlap: Frames that neighbouring chunks share with latent memory.
        identity_slots: Latent frames of identity memory.
        face_size: Side of the square face crop [px].
        prompt: Text that the model was trained with.
        negative_prompt: Text to steer away from when guidance is on.
        lora: LoRAs that belong to the model, written as on the command line.
        pose_model: Who estimates the poses of a raw driving video.
    """

    fps: float
    width: int
    height: int
    num_inference_steps: int
    shift: float
    frames_per_chunk: int
    overlap: int
    identity_slots: int
    face_size: int
    prompt: str
    negative_prompt: str = ""
    lora: tuple[LoraSpec, ...] = ()
    pose_model: str = DEFAULT_POSE_MODEL

    def __post_init__(self) -> None:
        """Refuse numbers that no chunk plan can follow.

        Raises:
            SettingsError: Naming the key and the value.
        """
        super().__post_init__()
        self._check_chunk(self.frames_per_chunk, self.overlap)
        self._check_latent_overlap(self.overlap)


# Method page section 5. The face size is that of the released motion encoder.
HUB_PRESET = ModelDefaults(
    fps=25.0,
    width=832,
    height=480,
    num_inference_steps=20,
    shift=5.0,
    frames_per_chunk=77,
    overlap=4,
    identity_slots=4,
    face_size=512,
    prompt="视频中的人在做动作",
    lora=(LoraSpec("epfl-vita/everanimate/ckpts/everanimate-v1-lora32/stage2_480p.safetensors"),),
)


@dataclass(frozen=True, kw_only=True)
class AnimateSettings(_Record):
    """What `everanimate animate` is asked to do.

    Attributes:
        ref: Picture of the character.
        driving: Video of a moving person, or a folder that `extract-pose` made of one; instead of
            `pose` and `face`.
        pose: Video of drawn skeletons.
        face: Video of face crops, as long as `pose`.
        output: The video to write; None for `default_output`.
        minutes: Length of the video; at most one of `minutes`, `seconds` and `frames` is given,
            with none the video is as long as the driving motion.
        seconds: See `minutes`.
        frames: See `minutes`.
        start: Where the driving motion begins [s].
        end: Where the driving motion ends [s]; None for its own end.
        pose_model: Who estimates the poses of a raw driving video; None for the model's choice.
        detector: Who finds the person in it; None for the one that goes with `pose_model`.
        person: Whom to follow in it, see `ExtractSettings`.
        select: Whom to follow in it, see `ExtractSettings`.
        retarget: Whether its poses get the limb lengths and the place of the character.
        pose_folder: Where its poses are kept; None for `<video>_pose` beside the result.
        model: "toy", a checkpoint folder or a Hub id `owner/name[@revision]`.
        lora: LoRAs on top of the model; None for the model's own, empty for none at all.
        view: More pictures of the character; each takes an identity slot.
        size: "WIDTHxHEIGHT", or "auto" for the reference's aspect at the model's area.
        fit: How pictures of another aspect fill the frame.
        fps: Rate of the result; motion is resampled by time, so its speed stays true.
        steps: Euler steps per chunk.
        shift: Warp of the noise levels.
        seed: Every random draw follows from it.
        prompt: Text that the model sees.
        negative_prompt: Text to steer away from; needs `guidance_scale` above 1.
        guidance_scale: 1 runs the network once per step, more runs it twice.
        frames_per_chunk: Frames decoded from one chunk, 4n+1.
        overlap: Frames that neighbouring chunks share.
        identity_slots: Latent frames of identity memory.
        memory: What one chunk hands to the next.
        carry_frames: Frames carried in pixel memory, 1 or 5.
        clip_image: What CLIP sees from the second chunk on.
        extend: Where motion comes from when the driving video is shorter than asked.
        audio: Whether the driving video's sound is kept.
        pose_beside: Whether the pose picture stands beside the result.
        codec: Video codec of the result.
        crf: Quality of the encoder; lower is better and larger.
        png: Folder for every frame as a PNG picture, beside the video.
        device: Where the networks run.
        dtype: Number format of the networks.
        resume: Whether an unfinished run of the same settings is continued.
        overwrite: Whether an existing result may be replaced.
        keep_run: Whether the run folder stays, so that the video can be lengthened later.
        dry_run: Whether only the plan is made.
    """

    ref: Path
    driving: Path | None = None
    pose: Path | None = None
    face: Path | None = None
    output: Path | None = None
    minutes: float | None = None
    seconds: float | None = None
    frames: int | None = None
    start: float = field(default=0.0, metadata={"decode": _decode_time})
    end: float | None = field(default=None, metadata={"decode": _decode_time})
    pose_model: str | None = None
    detector: str | None = None
    person: int | None = None
    select: Select | None = None
    retarget: bool = False
    pose_folder: Path | None = None
    model: str = HUB_MODEL
    lora: tuple[LoraSpec, ...] | None = field(default=None, metadata={"decode": _decode_lora})
    view: tuple[Path, ...] = ()
    size: str | None = None
    fit: Fit = "contain"
    fps: float | None = None
    steps: int | None = None
    shift: float | None = None
    seed: int = 0
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float = 1.0
    frames_per_chunk: int | None = None
    overlap: int | None = None
    identity_slots: int | None = None
    memory: Memory = "latent"
    carry_frames: int | None = None
    clip_image: ClipImage | None = None
    extend: Extend = "pingpong"
    audio: bool = True
    pose_beside: bool = False
    codec: Codec = "h264"
    crf: int = 18
    png: Path | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    resume: bool = field(default=True, metadata=_THIS_RUN)
    overwrite: bool = field(default=False, metadata=_THIS_RUN)
    keep_run: bool = field(default=False, metadata=_THIS_RUN)
    dry_run: bool = field(default=False, metadata=_THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        self._check_inputs()
        self._check_length()
        self._check_chunk(self.frames_per_chunk, self.overlap)
        self._check_memory()
        self._check_output()

    @staticmethod
    def _label(name: str) -> str:
        return option_name(name)

    def _check_inputs(self) -> None:
        need = "Give a video or a folder made by extract-pose, or --pose and --face."
        if self.driving is None:
            if self.pose is None and self.face is None:
                raise SettingsError(f"DRIVING is missing. {need}")
            if self.face is None:
                raise SettingsError(f"--pose {self.pose} needs --face beside it.")
            if self.pose is None:
                raise SettingsError(f"--face {self.face} needs --pose beside it.")
        else:
            for name, path in (("--pose", self.pose), ("--face", self.face)):
                if path is not None:
                    raise SettingsError(
                        f"DRIVING {self.driving} and {name} {path} exclude each other. {need}"
                    )
        if self.person is not None and self.select is not None:
            raise SettingsError(
                f"--person {self.person} and --select {self.select} exclude each other. "
                "Give one of them."
            )
        if self.negative_prompt and self.guidance_scale == 1:
            raise SettingsError(
                f"--negative-prompt '{self.negative_prompt}' has no effect at --guidance-scale 1. "
                "Give a larger scale, such as 3."
            )

    def _check_length(self) -> None:
        names = ("minutes", "seconds", "frames")
        given = [f"--{name} {getattr(self, name)}" for name in names if getattr(self, name)]
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(given)} exclude each other. Give one of them.")
        if self.end is not None and self.end <= self.start:
            raise SettingsError(f"--end {self.end} is not after --start {self.start}.")

    def _check_memory(self) -> None:
        if self.memory == "pixel":
            self._check_pixel_memory()
            return
        if self.carry_frames is not None:
            raise SettingsError(
                f"--carry-frames {self.carry_frames} works with --memory pixel only, "
                f"not with {self.memory}."
            )
        self._check_latent_overlap(self.overlap)
        slots = self.identity_slots
        if slots is not None and len(self.view) >= slots:
            raise SettingsError(
                f"--view is given {len(self.view)} times, but --identity-slots {slots} has room "
                f"for {slots - 1}: the last slot holds the reference."
            )

    def _check_pixel_memory(self) -> None:
        if self.carry_frames not in (None, *CARRY_FRAMES):
            raise SettingsError(f"--carry-frames {self.carry_frames} is unknown. Known: 1, 5.")
        if self.overlap not in (None, self.carry_frames or CARRY_FRAMES[0]):
            raise SettingsError(
                f"--overlap {self.overlap} does not fit --memory pixel, "
                "where --carry-frames is the overlap."
            )
        if self.identity_slots not in (None, 1):
            raise SettingsError(
                f"--identity-slots {self.identity_slots} does not fit --memory pixel, "
                "which has one slot."
            )
        if self.clip_image == "previous":
            raise SettingsError(
                "--clip-image previous does not fit --memory pixel, which shows CLIP the reference."
            )
        if self.view:
            raise SettingsError(
                f"--view {self.view[0]} does not fit --memory pixel, "
                "whose one slot holds the reference."
            )

    def _check_output(self) -> None:
        if self.size is not None:
            try:
                parse_size(self.size)
            except ValueError as error:
                raise SettingsError(
                    f"--size {self.size} is not a size. Write WIDTHxHEIGHT (832x480) or auto."
                ) from error
        if self.output is not None and self.output.suffix.lower() != ".mp4":
            raise SettingsError(f"--output {self.output} does not end in .mp4.")
        if self.crf > MAX_CRF:
            raise SettingsError(f"--crf {self.crf} is too large. Give {MAX_CRF} or less.")

    @property
    def default_output(self) -> Path:
        """`<driving>_<ref>.mp4` in the current folder, from the names of the two inputs."""
        if self.driving is not None:
            # Resolved, since "." has no name. A video and the folder made of it give one name.
            path = self.driving.resolve()
            motion = path.name.removesuffix(POSE_SUFFIX) if path.is_dir() else path.stem
        else:
            assert self.pose is not None  # checked on construction
            motion = self.pose.stem
        return Path(f"{motion}_{self.ref.stem}.mp4")


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(AnimateSettings):
    """Settings in which the model's defaults are filled in; made by `resolve`.

    Still open may be the inputs and the length, `carry_frames` outside pixel memory, `end`, `png`.
    """

    output: Path
    lora: tuple[LoraSpec, ...]
    size: str
    fps: float
    steps: int
    shift: float
    prompt: str
    negative_prompt: str
    frames_per_chunk: int
    overlap: int
    identity_slots: int
    clip_image: ClipImage

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Pixels of the result; None for "auto", which needs the reference picture."""
        return parse_size(self.size)

    @property
    def requested_frames(self) -> int | None:
        """Frames asked for, at least 1; None for the length of the driving motion."""
        if self.frames is not None:
            return self.frames
        seconds = self.seconds if self.minutes is None else self.minutes * 60
        return None if seconds is None else max(1, round(seconds * self.fps))


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(_Record):
    """What `everanimate extract-pose` is asked to do.

    Attributes:
        video: Video of a moving person; a picture counts as a video of one frame.
        output: Folder to make; None for `default_output`.
        start: Where to begin [s].
        end: Where to end [s]; None for the video's end.
        fps: Rate of the pose and face videos; frames are chosen by their times.
        size: "WIDTHxHEIGHT" of the pose video, or "auto" for the aspect of the reference, or else
            of the video, at the default model's area.
        fit: How the video's picture fills the pose video, as `animate` fits the reference.
        draw_mode: "canvas" draws at the size of the result; "native" draws at the video's size and
            shrinks the picture, as the released scripts do without retargeting.
        pose_model: "rtmw", "dwpose", "vitpose" ..., "toy", or an .onnx file.
        detector: Name or .onnx file; None for the one that goes with the pose model.
        provider: Where the networks run.
        threads: Of each network on the CPU.
        detect_every: Frames from one look of the detector to the next, at most.
        person: Whom to follow: his number in `--list-persons`.
        select: Or by place or size in the first second; None for the largest.
        reacquire: Who may take over when the person followed is gone for long: "same" or "any".
        max_gap: Longest time without the person that is bridged [s].
        body_threshold: Least score of a drawn joint; None for the pose model's.
        hand_threshold: Least score of a drawn hand point; None for the pose model's.
        face_threshold: Least mean score of a face; None for the pose model's.
        smooth: Whether the keypoints are smoothed.
        face_smooth: Whether the face box is smoothed.
        face_scale: Area of the face crop over that of the landmarks.
        face_size: Side of the face video [px]; the released model takes 512.
        face_square: Whether the face crop is a square.
        face_hold: How long the last face box is used when the face turns away [s].
        reference: Picture of the character, to be stored beside, fitted as the poses are.
        retarget: The same, and the poses get its limb lengths and place.
        template_frame: Frame whose limbs are compared with the reference's; None for the first
            one that shows the whole pose.
        crf: Quality of the videos; lower is better and larger.
        lossless: Full colour resolution without quantisation.
        preview: Whether a video with source, pose and face side by side is made.
        resume: Whether an unfinished extraction of the same settings is continued.
        overwrite: Whether an existing result may be replaced.
        dry_run: Whether only the plan is made.
    """

    video: Path
    output: Path | None = None
    start: float = field(default=0.0, metadata={"decode": _decode_time})
    end: float | None = field(default=None, metadata={"decode": _decode_time})
    fps: float = HUB_PRESET.fps
    size: str = f"{HUB_PRESET.width}x{HUB_PRESET.height}"
    fit: Fit = "contain"
    draw_mode: DrawMode = "canvas"
    pose_model: str = DEFAULT_POSE_MODEL
    detector: str | None = None
    provider: Provider = "auto"
    threads: int | None = None
    detect_every: int = 8
    person: int | None = None
    select: Select | None = None
    reacquire: Reacquire = "same"
    max_gap: float = 0.3
    body_threshold: float | None = None
    hand_threshold: float | None = None
    face_threshold: float | None = None
    smooth: bool = True
    face_smooth: bool = False
    face_scale: float = 1.3
    face_size: int = HUB_PRESET.face_size
    face_square: bool = False
    face_hold: float = 0.5
    reference: Path | None = None
    retarget: Path | None = None
    template_frame: int | None = None
    crf: int = 12
    lossless: bool = False
    preview: bool = False
    resume: bool = field(default=True, metadata=_THIS_RUN)
    overwrite: bool = field(default=False, metadata=_THIS_RUN)
    dry_run: bool = field(default=False, metadata=_THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        if self.end is not None and self.end <= self.start:
            raise SettingsError(f"--end {self.end} is not after --start {self.start}.")
        try:
            parse_size(self.size)
        except ValueError as error:
            raise SettingsError(
                f"--size {self.size} is not a size. Write WIDTHxHEIGHT (832x480) or auto."
            ) from error
        if self.crf > MAX_CRF:
            raise SettingsError(f"--crf {self.crf} is too large. Give {MAX_CRF} or less.")
        exclusive = (("person", "select"), ("reference", "retarget"))
        for first, second in exclusive:
            values = getattr(self, first), getattr(self, second)
            if None not in values:
                raise SettingsError(
                    f"--{first} {values[0]} and --{second} {values[1]} exclude each other. "
                    "Give one of them."
                )
        if self.template_frame is not None and self.retarget is None:
            raise SettingsError(
                f"--template-frame {self.template_frame} has no effect without --retarget."
            )
        if self.retarget is not None and self.draw_mode == "native":
            raise SettingsError(
                "--draw-mode native does not fit --retarget, which draws on the canvas."
            )

    @staticmethod
    def _label(name: str) -> str:
        return option_name(name)

    @property
    def default_output(self) -> Path:
        """`<video>_pose` in the current folder."""
        return Path(f"{self.video.resolve().stem}{POSE_SUFFIX}")

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Pixels of the pose video; None for "auto", which needs a picture."""
        return parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(_Record):
    """What `everanimate demo` is asked to do.

    Attributes:
        directory: Where everything is written; made if missing.
        seconds: Length of the video.
        seed: Character, dance and noise follow from it.
        overwrite: Whether the files of an earlier demo may be replaced.
    """

    directory: Path = Path("everanimate-demo")
    seconds: float = 10.0
    seed: int = 0
    overwrite: bool = field(default=False, metadata=_THIS_RUN)

    @staticmethod
    def _label(name: str) -> str:
        return option_name(name)

    @property
    def output(self) -> Path:
        """The animated video."""
        return self.directory / "demo.mp4"


def read_model_defaults(folder: Path) -> ModelDefaults:
    """The defaults of the checkpoint in `folder`, from its `everanimate.json`.

    Returns:
        What the file says; `HUB_PRESET` where there is none, since a plain copy of the released
        base has none.

    Raises:
        WeightsError: If the file cannot be read or lacks something.
    """
    path = folder / MODEL_DEFAULTS_FILE
    if not path.exists():
        return HUB_PRESET
    try:
        return ModelDefaults.from_json(_read_object(path))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}.") from error
    except SettingsError as error:
        raise WeightsError(f"{path} cannot be used: {error}") from error


def resolve(settings: AnimateSettings, defaults: ModelDefaults) -> ResolvedSettings:
    """Fill in what the command line left to the model and the memory mode.

    Raises:
        SettingsError: If an option and a default do not go together, such as more views than slots.
    """
    pixel = settings.memory == "pixel"
    carry_frames = CARRY_FRAMES[0] if settings.carry_frames is None else settings.carry_frames
    fill: dict[str, object] = {
        "output": settings.default_output,
        "lora": defaults.lora,
        "size": f"{defaults.width}x{defaults.height}",
        "fps": defaults.fps,
        "steps": defaults.num_inference_steps,
        "shift": defaults.shift,
        "prompt": defaults.prompt,
        "negative_prompt": "" if settings.guidance_scale == 1 else defaults.negative_prompt,
        "frames_per_chunk": defaults.frames_per_chunk,
        "overlap": carry_frames if pixel else defaults.overlap,
        "identity_slots": 1 if pixel else defaults.identity_slots,
        "carry_frames": carry_frames if pixel else None,
        "clip_image": "reference" if pixel else "previous",
    }
    values: dict[str, Any] = dict(vars(settings))
    values.update({name: value for name, value in fill.items() if values[name] is None})
    return ResolvedSettings(**values)


def read_saved_options(path: Path) -> dict[str, object]:
    """The options in a `--config` file: a JSON object, or its "settings" as saved with a result.

    Raises:
        InputError: If the file is missing or holds no JSON object.
        SettingsError: If it names an option that `animate` does not have.
    """
    try:
        content = _read_object(path)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"--config {path} cannot be read: {error}.") from error
    saved = content.get("settings", content)
    if not isinstance(saved, dict):
        raise InputError(f"--config {path} cannot be read: its settings are not a JSON object.")
    _refuse_unknown(saved, AnimateSettings.saved_names(), f"--config {path}: ")
    return saved


def combine(saved: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Options of a file and of the command line together; the command line wins.

    Where two options exclude each other, one on the command line also drops the other one of the
    file: `--minutes 3` replaces a saved `seconds`.
    """
    displaced = {name for option in given for name in _DISPLACES.get(option, ())}
    kept = {name: value for name, value in saved.items() if name not in displaced}
    return {**kept, **given}


def _read_object(path: Path) -> dict[str, object]:
    """A JSON object; ValueError says why a file holds none."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content
