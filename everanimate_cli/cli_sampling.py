"""Options of the commands that make a video with the chunk loop, declared once."""

from functools import partial
from pathlib import Path
from typing import Annotated

from everanimate_cli.cli_options import LENGTH, MEMORY, MODEL, OF_MODEL, PICTURE, option
from everanimate_cli.settings import (
    HUB_MODEL,
    AnimateSettings,
    ClipImage,
    Dtype,
    Fit,
    Memory,
)

SAMPLING = "Sampling"

_option = partial(option, AnimateSettings)

StartOption = Annotated[
    str | None,
    _option("start", "Where the motion begins: 12.5 or 1:02.5.", LENGTH, metavar="TIME"),
]
ModelOption = Annotated[
    str | None,
    _option(
        "model",
        "'toy' (embedded), a checkpoint folder, or a Hub id.",
        MODEL,
        metavar="MODEL",
    ),
]
LoraOption = Annotated[
    list[str] | None,
    _option(
        "lora",
        "LoRA file, PEFT folder, or owner/name/file on the Hub; repeatable; 'none' for none.",
        MODEL,
        metavar="FILE[=SCALE]",
        default=f"{OF_MODEL}; for {HUB_MODEL} the released stage 2",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    _option(
        "dtype",
        "Their number format: auto, float32, bfloat16 or float16.",
        MODEL,
        metavar="NAME",
    ),
]
ViewOption = Annotated[
    list[Path] | None,
    _option(
        "view",
        "Another picture of the character; repeatable, one slot each.",
        PICTURE,
        metavar="FILE",
    ),
]
FitOption = Annotated[
    Fit | None, _option("fit", "How pictures of another aspect fill the frame.", PICTURE)
]
SeedOption = Annotated[int | None, _option("seed", "Every random draw follows from it.", SAMPLING)]
StepsOption = Annotated[
    int | None, _option("steps", "Euler steps per chunk.", SAMPLING, default=OF_MODEL)
]
ShiftOption = Annotated[
    float | None, _option("shift", "Warp of the noise levels.", SAMPLING, default=OF_MODEL)
]
PromptOption = Annotated[
    str | None, _option("prompt", "Text that the model sees.", SAMPLING, default=OF_MODEL)
]
MemoryOption = Annotated[
    Memory | None,
    _option(
        "memory",
        "What a chunk hands on: its latents; its last frames (as Wan-Animate); nothing (sink).",
        MEMORY,
    ),
]
CarryFramesOption = Annotated[
    int | None,
    _option(
        "carry_frames", "Frames that pixel memory carries.", MEMORY, metavar="1|5", default="1"
    ),
]
FramesPerChunkOption = Annotated[
    int | None,
    _option("frames_per_chunk", "Frames of one chunk, 4n+1.", MEMORY, default=OF_MODEL),
]
OverlapOption = Annotated[
    int | None,
    _option("overlap", "Frames that two chunks share.", MEMORY, default=OF_MODEL),
]
IdentitySlotsOption = Annotated[
    int | None,
    _option("identity_slots", "Slots of identity memory.", MEMORY, default=OF_MODEL),
]
ClipImageOption = Annotated[
    ClipImage | None,
    _option(
        "clip_image",
        "What CLIP sees after chunk 0: the last frame of the previous chunk, or the reference.",
        MEMORY,
        default="previous; with pixel memory always reference",
    ),
]
