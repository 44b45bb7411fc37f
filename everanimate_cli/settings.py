"""Every option of `animate`, `extract-pose` and `demo` with its default, and a model's defaults.

An option of the command line, a field here and a key in JSON have one name; only dash and
underscore differ. None means "as the model, the memory mode or the driving motion says";
`resolve` fills that in once the model is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.placement_settings import (
    Offload,
    PlacementOptions,
    Precision,
    TextDevice,
    Tiling,
    Vram,
    check_placement,
)
from everanimate_cli.records import (
    THIS_RUN,
    LoraSpec,
    Options,
    Record,
    counted,
    decode_time,
    parse_size,
    read_json_object,
)
from everanimate_cli.speed_settings import STEP_CACHE_THRESHOLD, Attention, StepCacheKind

Memory = Literal["latent", "pixel", "sink"]
ClipImage = Literal["previous", "reference"]
Fit = Literal["contain", "cover", "stretch"]
Extend = Literal["pingpong", "loop", "hold", "error"]
Codec = Literal["h264", "h265"]
Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Parallel = Literal["auto", "ulysses", "ring"]
LoraMode = Literal["auto", "fused", "separate"]
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
MAX_SIDE_PX = 16384  # of the pictures that x264 takes
MAX_CRF = 51  # the coarsest quality of x264 and x265

# Options of which only one makes sense: one on the command line makes void what a file says.
_DISPLACES = {
    "minutes": ("seconds", "frames"),
    "seconds": ("minutes", "frames"),
    "frames": ("minutes", "seconds"),
    "driving": ("pose", "face"),
    "pose": ("driving",),
    "face": ("driving",),
}


def run_folder(output: Path) -> Path:
    """Where the finished chunks of a result wait until it is whole: `NAME.mp4.run` beside it."""
    return output.with_name(output.name + ".run")


def with_name(path: Path) -> Path:
    """A path that ends in a name: "." and ".." have none until they are resolved.

    Others stay, since a link may lead to a file whose name says nothing.
    """
    return path if path.name not in ("", "..") else path.resolve()


def check_stretch(start: float, end: float | None) -> None:
    """Refuse `--end` before `--start`; None passes.

    Raises:
        SettingsError: With both.
    """
    if end is not None and end <= start:
        raise SettingsError(f"--end {end} is not after --start {start}.")


def check_size(size: str) -> None:
    """Refuse what `parse_size` cannot read, and what no video can be.

    Raises:
        SettingsError: With the notation, or with the largest side.
    """
    try:
        sides = parse_size(size)
    except ValueError as error:
        raise SettingsError(
            f"--size {size} is not a size. Write WIDTHxHEIGHT (832x480) or auto."
        ) from error
    if sides is not None and max(sides) > MAX_SIDE_PX:
        raise SettingsError(f"--size {size} is too large. Sides have {MAX_SIDE_PX} pixels at most.")


def check_frames_per_chunk(record: Record, frames_per_chunk: int | None) -> None:
    """Refuse a number of frames that the VAE cannot make.

    Args:
        record: What the number belongs to; names it in the error.
        frames_per_chunk: None passes.

    Raises:
        SettingsError: With the neighbours that fit.
    """
    if frames_per_chunk is not None and frames_per_chunk % TEMPORAL_STRIDE != 1:
        lower = frames_per_chunk - (frames_per_chunk - 1) % TEMPORAL_STRIDE
        raise SettingsError(
            f"{record.label('frames_per_chunk')} {frames_per_chunk} is not 4n+1. "
            f"Give {lower} or {lower + TEMPORAL_STRIDE}."
        )


def _check_chunk(record: Record, frames_per_chunk: int | None, overlap: int | None) -> None:
    check_frames_per_chunk(record, frames_per_chunk)
    if frames_per_chunk is not None and overlap is not None and overlap >= frames_per_chunk:
        raise SettingsError(
            f"{record.label('overlap')} {overlap} is not below "
            f"{record.label('frames_per_chunk')} {frames_per_chunk}."
        )


def _check_latent_overlap(record: Record, overlap: int | None) -> None:
    if overlap is not None and overlap % TEMPORAL_STRIDE != 0:
        lower = overlap // TEMPORAL_STRIDE * TEMPORAL_STRIDE
        choices = f"{lower} or {lower + TEMPORAL_STRIDE}" if lower else str(TEMPORAL_STRIDE)
        raise SettingsError(
            f"{record.label('overlap')} {overlap} is not a multiple of 4. Give {choices}."
        )


def _decode_lora(value: object) -> object:
    return [] if value == ["none"] else value


@dataclass(frozen=True, kw_only=True)
class ModelDefaults(Record):
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
        fast_steps: Euler steps per chunk with `--fast`.
        fast_lora: LoRAs that `--fast` adds to `lora`: the model distilled to few steps.
    """

    LEAST: ClassVar = {
        "face_size": 1,
        "fast_steps": 1,
        "frames_per_chunk": 1 + TEMPORAL_STRIDE,
        "height": 1,
        "identity_slots": 1,
        "num_inference_steps": 1,
        "overlap": 1,
        "width": 1,
    }
    ABOVE_ZERO: ClassVar = ("fps", "shift")

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
    fast_steps: int = 6
    fast_lora: tuple[LoraSpec, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that no chunk plan can follow.

        Raises:
            SettingsError: Naming the key and the value.
        """
        super().__post_init__()
        _check_chunk(self, self.frames_per_chunk, self.overlap)
        _check_latent_overlap(self, self.overlap)


# Wan 2.1 I2V 14B distilled by lightx2v to 4 steps without guidance, as a LoRA of rank 64. LightX2V
# runs Wan-Animate with its rank-32 version: 4 steps, shift 5, no guidance, strength 1
# (`configs/wan22/wan_animate_lora.json`); with rank 64, 6 steps are usual.
_STEP_DISTILLED = (
    "Kijai/WanVideo_comfy/Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
    "@8260d429d19fd7a72304cad059160b95d843913f"
)

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
    fast_lora=(LoraSpec(_STEP_DISTILLED),),
)


@dataclass(frozen=True, kw_only=True)
class AnimateSettings(Options):
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
        transformer: File to take instead of the model's transformer: .safetensors or .gguf.
        lora: LoRAs on top of the model; None for the model's own, empty for none at all.
        lora_mode: Whether they are added to the weights, or computed beside them; see
            `lora_layers.choose_lora_mode`.
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
        vram: Preset for cards of so many GB; "auto" takes the largest that fits. The next four
            override its choices, see `placement_settings.Placement`.
        precision: How the weights of the transformer's blocks are stored.
        offload: What waits in main memory or on disk until it is needed.
        vae_tiling: Whether frames are decoded in tiles.
        text_device: Where the text encoder runs.
        parallel: How processes that torchrun has started share self-attention.
        spare_rank: Whether the first of them computes all but the transformer, beside the others.
        fast: Whether few steps are taken, with the model's step-distilled LoRA; `steps`, `lora` and
            `guidance_scale` win over it.
        attention: Which kernels compute attention.
        compile: Whether the transformer's blocks are compiled.
        step_cache: How steps that change little are skipped; see `step_cache.plan_skips`.
        step_cache_threshold: Error that it may make; None for `STEP_CACHE_THRESHOLD`.
        concurrent: Whether a chunk is decoded, encoded and written while the next one is sampled.
        resume: Whether an unfinished run of the same settings is continued.
        overwrite: Whether an existing result may be replaced.
        keep_run: Whether the run folder stays, so that the video can be lengthened later.
        dry_run: Whether only the plan is made.
    """

    LEAST: ClassVar = {
        "crf": 0,
        "frames": 1,
        "frames_per_chunk": 1 + TEMPORAL_STRIDE,
        "guidance_scale": 1,
        "identity_slots": 1,
        "overlap": 1,
        "person": 0,
        "seed": 0,
        "start": 0,
        "step_cache_threshold": 0,
        "steps": 1,
    }
    MOST: ClassVar = {"crf": MAX_CRF}
    ABOVE_ZERO: ClassVar = ("end", "fps", "minutes", "seconds", "shift")

    ref: Path
    driving: Path | None = None
    pose: Path | None = None
    face: Path | None = None
    output: Path | None = None
    minutes: float | None = None
    seconds: float | None = None
    frames: int | None = None
    start: float = field(default=0.0, metadata={"decode": decode_time})
    end: float | None = field(default=None, metadata={"decode": decode_time})
    pose_model: str | None = None
    detector: str | None = None
    person: int | None = None
    select: Select | None = None
    retarget: bool = False
    pose_folder: Path | None = None
    model: str = HUB_MODEL
    transformer: Path | None = None
    lora: tuple[LoraSpec, ...] | None = field(default=None, metadata={"decode": _decode_lora})
    lora_mode: LoraMode = "auto"
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
    vram: Vram = "auto"
    precision: Precision = "auto"
    offload: Offload = "auto"
    vae_tiling: Tiling = "auto"
    text_device: TextDevice = "auto"
    parallel: Parallel = field(default="auto", metadata=THIS_RUN)
    spare_rank: bool = field(default=False, metadata=THIS_RUN)
    fast: bool = False
    attention: Attention = "auto"
    compile: bool = False
    step_cache: StepCacheKind = "off"
    step_cache_threshold: float | None = None
    concurrent: bool = True
    resume: bool = field(default=True, metadata=THIS_RUN)
    overwrite: bool = field(default=False, metadata=THIS_RUN)
    keep_run: bool = field(default=False, metadata=THIS_RUN)
    dry_run: bool = field(default=False, metadata=THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        self._check_inputs()
        self._check_length()
        _check_chunk(self, self.frames_per_chunk, self.overlap)
        self._check_memory()
        self._check_output()
        check_placement(self.placement_options)
        if self.step_cache_threshold is not None and self.step_cache == "off":
            raise SettingsError(
                f"--step-cache-threshold {self.step_cache_threshold:g} has no effect without "
                "--step-cache. Give --step-cache mag."
            )

    @property
    def placement_options(self) -> PlacementOptions:
        """What is asked for of the card's memory."""
        names = ("vram", "precision", "offload", "vae_tiling", "text_device")
        return PlacementOptions(**{name: getattr(self, name) for name in names})

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
        check_stretch(self.start, self.end)

    def _check_memory(self) -> None:
        if self.memory == "pixel":
            self._check_pixel_memory()
            return
        if self.carry_frames is not None:
            raise SettingsError(
                f"--carry-frames {self.carry_frames} works with --memory pixel only, "
                f"not with {self.memory}."
            )
        _check_latent_overlap(self, self.overlap)
        slots = self.identity_slots
        if slots is not None and len(self.view) >= slots:
            given = counted(len(self.view), "time")
            raise SettingsError(
                f"--view is given {given}, but --identity-slots {slots} has room "
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
            check_size(self.size)
        if self.output is not None and self.output.suffix.lower() != ".mp4":
            raise SettingsError(
                f"--output {self.output} does not end in .mp4. Give a name that does."
            )

    @property
    def default_output(self) -> Path:
        """`<driving>_<ref>.mp4` in the current folder, from the names of the two inputs."""
        if self.driving is not None:
            # A video and the folder made of it give one name.
            path = with_name(self.driving)
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
    def cache_threshold(self) -> float | None:
        """Error that the step cache may make; None without it."""
        if self.step_cache == "off":
            return None
        given = self.step_cache_threshold
        return STEP_CACHE_THRESHOLD if given is None else given

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
class ExtractSettings(Options):
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

    LEAST: ClassVar = {
        "body_threshold": 0,
        "crf": 0,
        "detect_every": 1,
        "face_hold": 0,
        "face_scale": 0.1,
        "face_size": 1,
        "hand_threshold": 0,
        "max_gap": 0,
        "person": 0,
        "start": 0,
        "template_frame": 0,
        "threads": 1,
    }
    MOST: ClassVar = {"crf": MAX_CRF}
    ABOVE_ZERO: ClassVar = ("end", "fps")

    video: Path
    output: Path | None = None
    start: float = field(default=0.0, metadata={"decode": decode_time})
    end: float | None = field(default=None, metadata={"decode": decode_time})
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
    resume: bool = field(default=True, metadata=THIS_RUN)
    overwrite: bool = field(default=False, metadata=THIS_RUN)
    dry_run: bool = field(default=False, metadata=THIS_RUN)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            SettingsError: Naming the option and the value.
        """
        super().__post_init__()
        check_stretch(self.start, self.end)
        check_size(self.size)
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

    @property
    def default_output(self) -> Path:
        """`<video>_pose` in the current folder."""
        return Path(f"{with_name(self.video).stem}{POSE_SUFFIX}")

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Pixels of the pose video; None for "auto", which needs a picture."""
        return parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Options):
    """What `everanimate demo` is asked to do.

    Attributes:
        directory: Where everything is written; made if missing.
        seconds: Length of the video.
        seed: Character, dance and noise follow from it.
        overwrite: Whether the files of an earlier demo may be replaced.
    """

    LEAST: ClassVar = {"seed": 0}
    ABOVE_ZERO: ClassVar = ("seconds",)

    directory: Path = Path("everanimate-demo")
    seconds: float = 10.0
    seed: int = 0
    overwrite: bool = field(default=False, metadata=THIS_RUN)

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
        return ModelDefaults.from_json(read_json_object(path))
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
        "lora": (*defaults.lora, *defaults.fast_lora) if settings.fast else defaults.lora,
        "size": f"{defaults.width}x{defaults.height}",
        "fps": defaults.fps,
        "steps": defaults.fast_steps if settings.fast else defaults.num_inference_steps,
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


def combine(saved: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Options of a file and of the command line together; the command line wins.

    Where two options exclude each other, one on the command line also drops the other one of the
    file: `--minutes 3` replaces a saved `seconds`.
    """
    displaced = {name for option in given for name in _DISPLACES.get(option, ())}
    kept = {name: value for name, value in saved.items() if name not in displaced}
    return {**kept, **given}
