"""Every option changes something that can be seen in the result."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import (
    Frames,
    corner_frame,
    corners,
    decode_video,
    numbered_frames,
    sound_length,
    write_media,
)
from PIL import Image
from safetensors.torch import save_file
from studio import DANCE_FPS, Animate, Outcome, dance_numbers, frames_of
from tiny import INNER_DIM, write_tiny_checkpoint

from everanimate_cli.cli import main
from everanimate_cli.records import option_name
from everanimate_cli.settings import AnimateSettings

# Two chunks, so that what the first hands to the second counts.
LENGTH = ("--frames", "10")
# Options that change the picture: words -> all of these differ from each other and from none.
PICTURE_OPTIONS = [
    ["--seed", "1"],
    ["--steps", "1"],
    ["--shift", "2"],
    ["--prompt", "a man in a red coat"],
    ["--guidance-scale", "3"],
    ["--guidance-scale", "3", "--negative-prompt", "a man in a red coat"],
    ["--identity-slots", "2"],
    ["--overlap", "8"],
    ["--frames-per-chunk", "13"],
    ["--view", "back.png"],
    ["--memory", "sink"],
    ["--memory", "pixel"],
    ["--memory", "pixel", "--carry-frames", "5"],
    ["--clip-image", "reference"],
    ["--dtype", "bfloat16"],
    ["--lora", "my.safetensors"],
    ["--lora", "my.safetensors=0.5"],
    ["--lora", "my.safetensors", "--lora", "my.safetensors=0.5"],
    ["--fps", "10"],
    ["--start", "0.2"],
    ["--model", "other"],
]
# Options whose tests stand below.
OTHER_OPTIONS = [
    "ref",
    "driving",
    "pose",
    "face",
    "output",
    "minutes",
    "seconds",
    "frames",
    "end",
    "size",
    "fit",
    "extend",
    "audio",
    "pose_beside",
    "codec",
    "crf",
    "png",
    "device",
]
# In `test_models`.
MODEL_OPTIONS = ["transformer"]
# In `test_placement_options`.
CARD_OPTIONS = ["vram", "precision", "offload", "vae_tiling", "text_device"]
# In `test_lora_options`.
LORA_OPTIONS = ["lora_mode"]
# In `test_animate_processes`.
PROCESS_OPTIONS = ["parallel", "spare_rank"]
# In `test_animate_raw`.
RAW_OPTIONS = ["pose_model", "detector", "person", "select", "retarget", "pose_folder"]
# In `test_speed_options`.
SPEED_OPTIONS = [
    *("fast", "attention", "compile", "step_cache", "step_cache_threshold", "concurrent"),
]
# In `test_animate` and `test_resume`.
RUN_OPTIONS = ["resume", "overwrite", "keep_run", "dry_run"]


def test_every_option_has_its_test() -> None:
    tested = {
        *(*CARD_OPTIONS, *OTHER_OPTIONS, *LORA_OPTIONS, *PROCESS_OPTIONS, *RAW_OPTIONS),
        *(*MODEL_OPTIONS, *SPEED_OPTIONS, *RUN_OPTIONS),
    }
    words = {word for words in PICTURE_OPTIONS for word in words}
    assert words >= {
        option_name(item.name) for item in fields(AnimateSettings) if item.name not in tested
    }


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("other") / "model", seed=1)


def write_lora(path: Path) -> Path:
    """A LoRA of rank 2 on one layer, large enough to be seen."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 2, INNER_DIM, generator=generator)
    layer = "diffusion_model.blocks.0.self_attn.o"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up.T.contiguous()}, path)
    return path


def test_options_that_change_the_picture(animate: Animate, place: Path, other_model: Path) -> None:
    write_lora(place / "my.safetensors")
    (place / "other").symlink_to(other_model)
    assert animate("-o", "plain.mp4", *LENGTH).code == 0
    made = {"": frames_of("plain.mp4")}
    for number, words in enumerate(PICTURE_OPTIONS):
        name = f"{number}.mp4"
        done = animate("-o", name, *LENGTH, *words)
        assert done.code == 0, done.err
        made[" ".join(words)] = frames_of(name)
    assert all(frames.shape == (10, 48, 64, 3) for frames in made.values())
    names = list(made)
    for index, name in enumerate(names):
        for before in names[:index]:
            difference = np.abs(made[name].astype(int) - made[before]).max()
            # Encoding the same frames gives the same bytes, so that any difference counts.
            assert difference > 2, f"'{name}' is like '{before}'"


def test_what_comes_after_the_first_chunk_leaves_it_as_it_is(animate: Animate) -> None:
    assert animate("-o", "plain.mp4", *LENGTH).code == 0
    for words in (["--memory", "sink"], ["--clip-image", "reference"]):
        assert animate("-o", "a.mp4", *LENGTH, "--overwrite", *words).code == 0
        first, changed = frames_of("plain.mp4"), frames_of("a.mp4")
        np.testing.assert_array_equal(first[:9], changed[:9])
        assert np.abs(first[9].astype(int) - changed[9]).max() > 2


def test_a_model_may_bring_its_own_lora_which_none_takes_away(
    animate: Animate, place: Path, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, "mine")
    defaults = json.loads(Path("mine/everanimate.json").read_text())
    lora = str(write_lora(place / "my.safetensors"))
    Path("mine/everanimate.json").write_text(json.dumps({**defaults, "lora": [lora]}))
    one_chunk = ("--frames", "5", "--steps", "1")
    assert animate("-o", "own.mp4", "--model", "mine", *one_chunk).code == 0
    assert animate("-o", "given.mp4", "--lora", lora, *one_chunk).code == 0
    assert animate("-o", "none.mp4", "--model", "mine", "--lora", "none", *one_chunk).code == 0
    assert animate("-o", "bare.mp4", *one_chunk).code == 0
    own, given, none, bare = (
        Path(f"{name}.mp4").read_bytes() for name in ("own", "given", "none", "bare")
    )
    assert own == given
    assert none == bare
    assert own != bare


def test_another_reference_and_other_inputs(animate: Animate) -> None:
    one_chunk = ("--frames", "5", "--steps", "1")
    assert animate("-o", "a.mp4", *one_chunk).code == 0
    assert animate("-o", "b.mp4", *one_chunk, inputs=("back.png", "dance")).code == 0
    assert np.abs(frames_of("a.mp4").astype(int) - frames_of("b.mp4")).max() > 2
    # Pose and face one by one are the same as their folder, but for the sound.
    parts = ("--pose", "dance/pose.mp4", "--face", "dance/face.mp4")
    assert animate("-o", "c.mp4", *one_chunk, *parts, inputs=("anna.png",)).code == 0
    np.testing.assert_array_equal(frames_of("c.mp4"), frames_of("a.mp4"))
    assert sound_length(Path("c.mp4")) == 0
    # The face counts too, and sound of the pose video is taken.
    write_media(Path("face.mp4"), numbered_frames(30)[::-1], rate=DANCE_FPS)
    parts = ("--pose", "dance/driving.mp4", "--face", "face.mp4")
    assert animate("-o", "d.mp4", *one_chunk, *parts, inputs=("anna.png",)).code == 0
    assert np.abs(frames_of("a.mp4").astype(int) - frames_of("d.mp4")).max() > 2
    assert sound_length(Path("d.mp4")) > 0


@pytest.mark.parametrize(
    ("words", "num_frames"),
    [
        ([], 15),
        (["--frames", "4"], 4),
        (["--seconds", "0.5"], 6),
        (["--minutes", "0.02"], 15),
        (["--seconds", "0.01"], 1),
        (["--start", "0.4", "--end", "1"], 7),
        (["--fps", "5"], 6),
    ],
)
def test_the_length(animate: Animate, words: list[str], num_frames: int) -> None:
    done = animate("--dry-run", "--json", *words)
    assert json.loads(done.out)["frames"] == num_frames


# --- what the motion shows when, seen in the pose beside the result ------------------------------


def pose_of(name: str) -> Frames:
    frames = frames_of(name)
    return frames[:, :, frames.shape[2] // 2 :]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # 12.5 fps take every second frame of the dance's 25 fps.
        (["--frames", "5"], [0, 2, 4, 6, 8]),
        (["--frames", "5", "--fps", "25"], [0, 1, 2, 3, 4]),
        # The nearest in time: 0, 2.5, 5, 7.5, 10 -> of two equally near the even one.
        (["--frames", "5", "--fps", "10"], [0, 2, 5, 8, 10]),
        (["--frames", "4", "--fps", "50"], [0, 0, 1, 2]),
        (["--frames", "3", "--start", "0.4"], [10, 12, 14]),
        (["--start", "0.8", "--end", "1.12"], [20, 22, 24, 26]),
        # The motion ends after 4 frames; two frames more are made than there is motion for.
        (["--end", "0.32", "--frames", "9"], [0, 2, 4, 6, 4, 2, 0, 2, 4]),
        (["--end", "0.32", "--frames", "9", "--extend", "loop"], [0, 2, 4, 6, 0, 2, 4, 6, 0]),
        (["--end", "0.32", "--frames", "9", "--extend", "hold"], [0, 2, 4, 6, 6, 6, 6, 6, 6]),
    ],
)
def test_the_motion_keeps_its_speed(
    animate: Animate, words: list[str], expected: list[int]
) -> None:
    one_step = ("--pose-beside", "--steps", "1", "--crf", "1")
    assert animate("-o", "a.mp4", *one_step, *words).code == 0
    assert dance_numbers(pose_of("a.mp4")) == expected


def test_motion_that_is_too_short_can_be_an_error(animate: Animate) -> None:
    assert animate("--extend", "error", "--frames", "16") == Outcome(
        2,
        "",
        "error: --extend error: 16 output frames need as many driving frames, found 15. Ask for "
        "a shorter video, or give --extend pingpong, loop or hold.\n",
    )
    assert animate("--extend", "error", "--frames", "15", "--dry-run").code == 0


def test_the_pose_stands_beside_the_result_and_changes_nothing_else(animate: Animate) -> None:
    one_chunk = ("--frames", "5", "--steps", "1", "--crf", "1")
    assert animate("-o", "a.mp4", *one_chunk).code == 0
    assert animate("-o", "b.mp4", "--pose-beside", *one_chunk).code == 0
    beside = frames_of("b.mp4")
    assert beside.shape == (5, 48, 128, 3)
    # The encoder sees other neighbours, hence not equal.
    assert np.abs(beside[:, :, :56].astype(int) - frames_of("a.mp4")[:, :, :56]).mean() < 2


# --- size and file -------------------------------------------------------------------------------


def test_size_and_fit(animate: Animate, place: Path) -> None:
    """The pose frames go through the same transform as the reference."""
    assert place.is_dir()
    frames = np.repeat(corner_frame(96, 48)[None], 5, axis=0)  # twice as high as wide
    write_media(Path("tall.mp4"), frames, options={"crf": "1"})
    words = ("--pose", "tall.mp4", "--face", "tall.mp4", "--frames", "1", "--steps", "1")
    words += ("--pose-beside", "--crf", "1", "--overwrite", "-o", "a.mp4")
    pose = {}
    for fit in ("contain", "cover", "stretch"):
        assert animate(*words, "--fit", fit, "--size", "96x96", inputs=("anna.png",)).code == 0
        assert frames_of("a.mp4").shape == (1, 96, 192, 3)
        pose[fit] = pose_of("a.mp4")[0]
    # 48 of the 96 columns, in the middle.
    assert pose["contain"][:, :20].max() < 40
    assert pose["contain"][:, -20:].max() < 40
    assert corners(pose["contain"][:, 24:72]) == ["red", "green", "blue", "white"]
    # The middle half of the height.
    assert corners(pose["cover"]) == ["red", "green", "blue", "white"]
    assert corners(pose["stretch"]) == ["red", "green", "blue", "white"]
    plans = {
        size: json.loads(animate("--dry-run", "--json", "--size", size).out)["size"]
        for size in ("auto", "32x64")
    }
    # anna.png is 80x60; the tiny model's area is 64 * 48.
    assert plans == {"auto": "64x48", "32x64": "32x64"}
    Image.new("RGB", (50, 200)).save("thin.png")
    thin = animate("--dry-run", "--json", "--size", "auto", inputs=("thin.png", "dance"))
    assert json.loads(thin.out)["size"] == "16x96"


def test_codec_and_quality(animate: Animate) -> None:
    words = ("--frames", "5", "--steps", "1", "--size", "128x128")
    assert animate("-o", "fine.mp4", *words).code == 0
    assert animate("-o", "coarse.mp4", *words, "--crf", "40").code == 0
    assert animate("-o", "new.mp4", *words, "--codec", "h265").code == 0
    assert Path("coarse.mp4").stat().st_size < Path("fine.mp4").stat().st_size / 3
    codecs = {}
    for name in ("fine", "coarse", "new"):
        with av.open(f"{name}.mp4") as container:
            codecs[name] = container.streams.video[0].codec_context.name
    assert codecs == {"fine": "h264", "coarse": "h264", "new": "hevc"}


def test_pictures_are_the_frames_before_encoding(animate: Animate) -> None:
    assert animate("-o", "a.mp4", *LENGTH, "--png", "frames", "--crf", "1").code == 0
    paths = sorted(Path("frames").iterdir())
    assert [path.name for path in paths] == [f"{index:06d}.png" for index in range(10)]
    frames = np.stack([np.asarray(Image.open(path)) for path in paths])
    difference = np.abs(frames.astype(int) - frames_of("a.mp4"))
    assert difference.mean() < 10  # of colour at half resolution
    # Each picture is nearest to its own frame.
    distance = np.abs(frames[:, None].astype(int) - frames_of("a.mp4")[None]).mean((2, 3, 4))
    assert distance.argmin(axis=1).tolist() == list(range(10))


def test_the_name_of_the_result(animate: Animate, place: Path) -> None:
    (place / "videos").mkdir()
    one_chunk = ("--frames", "1", "--steps", "1")
    assert animate(*one_chunk).out == "dance_anna.mp4\n"
    assert animate(*one_chunk, "-o", "videos/x.MP4").out == "videos/x.MP4\n"
    assert decode_video(Path("videos/x.MP4"))[1].shape[0] == 1
    assert Path("videos/x.json").exists()


def test_a_device_that_is_not_there_is_refused(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert animate("--device", "cuda") == Outcome(
        2,
        "",
        f"error: --device cuda is not available: torch {torch.__version__} finds cpu. Give one of "
        "these or auto, or install a torch build for cuda.\n",
    )
    assert animate("--device", "cpu", "--frames", "1", "--steps", "1").code == 0


def test_options_of_a_file_and_of_the_command_line(animate: Animate) -> None:
    assert animate("-o", "a.mp4", *LENGTH, "--seed", "5").code == 0
    words = ["animate", "--config", "a.json", "-o", "b.mp4", "--seconds", "0.4", "--seed", "6"]
    assert main(words) == 0
    result = json.loads(Path("b.json").read_text())
    assert (result["result"]["frames"], result["effective"]["seed"]) == (5, 6)
