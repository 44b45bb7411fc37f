"""What is refused, word for word and with nothing written; and the odd files that are accepted."""

import json
import os
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from media import (
    Frames,
    corner_frame,
    corners,
    cut_file,
    moving_frames,
    numbered_frames,
    tone_bursts,
    write_media,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from studio import (
    DANCE_FPS,
    Animate,
    Outcome,
    dance_frames,
    dance_numbers,
    frames_of,
    made_files,
    write_dance,
)
from tiny import INNER_DIM

from everanimate_cli import hub
from everanimate_cli.cli import main
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET

PICTURE = "Give a picture of the character."
WEIGHTS = "Give a complete Wan2.2-Animate checkpoint."
TRANSFORMER = Path("mine/transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture
def own_model(place: Path, tiny_model: Path) -> Path:
    """A checkpoint in the current folder that may be changed."""
    return Path(shutil.copytree(tiny_model, place / "mine"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder with its size and time of change."""
    found = {}
    for name in made_files(folder):
        status = (folder / name).stat()
        found[name] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def refused(animate: Animate, place: Path) -> Callable[..., str]:
    """Runs the program and gives its one line of error; nothing else may come of it."""

    def run(*words: str, inputs: tuple[str, ...] = ("anna.png", "dance")) -> str:
        before = snapshot(place)
        done = animate(*words, inputs=inputs)
        assert (done.code, done.out) == (2, "")
        assert snapshot(place) == before
        lines = done.err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return run


Refused = Callable[..., str]


# --- pictures and videos -------------------------------------------------------------------------


def test_pictures(refused: Refused, place: Path) -> None:
    assert refused(inputs=("eve.png", "dance")) == (f"error: REF eve.png does not exist. {PICTURE}")
    Path("empty.png").touch()
    assert refused(inputs=("empty.png", "dance")) == f"error: REF empty.png is empty. {PICTURE}"
    cut_file(place / "anna.png", Path("cut.png"), 400)
    assert refused(inputs=("cut.png", "dance")) == (
        "error: REF cut.png cannot be read as a picture: image file is truncated. "
        "Give a PNG, JPEG or WebP file."
    )
    Path("text.png").write_text("no picture")
    assert refused(inputs=("text.png", "dance")) == (
        "error: REF text.png is not a picture in a known format. Give a PNG, JPEG or WebP file."
    )
    assert refused("--view", "text.png") == (
        "error: --view text.png is not a picture in a known format. Give a PNG, JPEG or WebP file."
    )


def test_videos(refused: Refused, place: Path) -> None:
    whole = place / "dance" / "pose.mp4"

    def pose(path: str) -> str:
        return refused("--pose", path, "--face", "dance/face.mp4", inputs=("anna.png",))

    assert pose("no.mp4") == "error: --pose no.mp4 does not exist. Give a video of drawn skeletons."
    Path("empty.mp4").touch()
    assert pose("empty.mp4") == (
        "error: --pose empty.mp4 is empty. Give a video of drawn skeletons."
    )
    cut_file(whole, Path("cut.mp4"), whole.stat().st_size // 2)
    assert pose("cut.mp4") == (
        "error: --pose cut.mp4 cannot be read as a video: Invalid data found when processing "
        "input. Give a file that plays, such as MP4, MOV, MKV or WebM."
    )
    faststart = {"movflags": "+faststart"}
    half = write_media(Path("half.mp4"), moving_frames(30), container_options=faststart)
    cut_file(half, half, half.stat().st_size // 2)
    assert re.fullmatch(
        r"error: --pose half\.mp4 is damaged at 0\.\d{3} s\. Convert the file anew, or use the "
        r"part before it\.",
        pose("half.mp4"),
    )
    write_media(Path("sound.wav"), sound=tone_bursts(1, 44100), sound_codec="pcm_s16le")
    assert pose("sound.wav") == ("error: --pose sound.wav has no video stream. Give a video file.")
    Path("text.mp4").write_text("no video")
    face = ("--pose", "dance/pose.mp4", "--face", "text.mp4")
    assert refused(*face, inputs=("anna.png",)) == (
        "error: --face text.mp4 cannot be read as a video: Invalid data found when processing "
        "input. Give a file that plays, such as MP4, MOV, MKV or WebM."
    )


def test_pose_and_face_of_different_length(refused: Refused) -> None:
    write_media(Path("short.mp4"), numbered_frames(20), rate=DANCE_FPS)
    write_media(Path("slow.mp4"), numbered_frames(30), rate=20)
    for name, problem in (
        ("short.mp4", "dance/pose.mp4 has 30 frames and short.mp4 has 20."),
        ("slow.mp4", "dance/pose.mp4 lasts 1.200 s and slow.mp4 1.500 s."),
    ):
        words = ("--pose", "dance/pose.mp4", "--face", name)
        assert refused(*words, inputs=("anna.png",)) == (
            f"error: {problem} Both must come from the same driving video."
        )


def test_a_driving_folder(refused: Refused, place: Path) -> None:
    assert refused(inputs=("anna.png", "waltz")) == (
        "error: DRIVING waltz does not exist. Give a video or a folder made by "
        "extract-pose, or --pose and --face."
    )
    write_dance(place / "waltz", num_frames=5)
    Path("waltz/pose.mp4").write_bytes(b"no video")
    assert refused(inputs=("anna.png", "waltz")) == (
        "error: DRIVING waltz/pose.mp4 cannot be read as a video: Invalid data found when "
        "processing input. Give a file that plays, such as MP4, MOV, MKV or WebM."
    )
    shutil.copy("dance/pose.mp4", "waltz/pose.mp4")
    shutil.copy("dance/face.mp4", "waltz/face.mp4")
    Path("waltz/extract.json").write_text("{}")
    assert refused(inputs=("anna.png", "waltz")) == (
        "error: waltz/extract.json cannot be read (KeyError: 'source'). "
        "Extract the pose again, or give --no-audio."
    )


def test_a_bad_input_is_told_before_a_model_is_downloaded(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("82 GB for nothing")

    monkeypatch.setattr(hub, "locate_model", download)
    Path("text.png").write_text("no picture")
    assert refused(inputs=("text.png", "dance")).startswith("error: REF text.png is not a picture")
    assert refused("--view", "text.png").startswith("error: --view text.png is not a picture")
    motion = ("--pose", "dance/pose.mp4", "--face", "text.png")
    assert refused(*motion, inputs=("anna.png",)).startswith("error: --face text.png is damaged")
    assert refused("--start", "2").startswith("error: --start 2 s is not within")


# --- numbers that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--size", "70x50"],
            "--size 70x50 is not a multiple of 16 on both sides. Give 64x48 or 80x64.",
        ),
        (
            ["--start", "2"],
            "--start 2 s is not within dance/pose.mp4, which lasts 1.200 s. Give an earlier time.",
        ),
        (
            ["--fps", "2000"],
            "--fps 2000: frame rate 2000 is out of range. Use 0.001 to 1000.",
        ),
        (
            ["--codec", "h265"],
            "--codec h265: video size 64x48 is too small for h265. Use at least 128x128, or h264.",
        ),
        (
            ["--frames-per-chunk", "5", "--overlap", "4", "--identity-slots", "6"],
            "--frames-per-chunk 5 leaves 4 frames for 5 identity slots. "
            "Give longer chunks or fewer --identity-slots.",
        ),
        (
            ["--overlap", "12"],
            "--overlap 12 is not below --frames-per-chunk 9.",
        ),
        (
            ["--view", "anna.png", "--identity-slots", "1"],
            "--view is given 1 time, but --identity-slots 1 has room for 0: the last slot holds "
            "the reference.",
        ),
    ],
)
def test_numbers_that_do_not_fit(refused: Refused, words: list[str], message: str) -> None:
    assert refused(*words) == f"error: {message}"


# --- models and LoRAs ----------------------------------------------------------------------------


def test_models(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("--model", "tinyy") == (
        "error: --model tinyy is unknown. Give 'toy' (embedded, works offline), a checkpoint "
        f"folder, or a Hub id such as {HUB_MODEL}."
    )
    cache = str(tmp_path.parent / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    assert refused("--model", "owner/name") == (
        f"error: --model owner/name is not in the cache ({cache}) and http://127.0.0.1:9 cannot "
        "be reached. Connect to the network and run everanimate models pull owner/name, give a "
        "checkpoint folder, or use --model toy, which works offline."
    )
    assert refused("--model", "owner/name", "--dry-run") == (
        f"error: --model owner/name is not in the cache ({cache}), and --dry-run downloads "
        "nothing. Run everanimate models pull owner/name first, give a checkpoint folder, or use "
        "--model toy, which works offline."
    )
    for words in ((), ("--dry-run",)):
        problem = "names no file and http://127.0.0.1:9 cannot be reached. Connect to the network "
        problem += "to see its files, "
        if words:
            problem = "names no file, and --dry-run downloads nothing. Run it without, "
        assert refused("--lora", "owner/name", *words) == (
            f"error: --lora owner/name {problem}or give owner/name/PATH/TO/FILE.safetensors."
        )
    # The model of a plain run, and its LoRA.
    default = "is not in the cache ({}) and http://127.0.0.1:9 cannot be reached. Connect to the "
    default = default.format(cache) + "network and run everanimate models pull (about {}), give "
    assert refused("--model", HUB_MODEL) == (
        f"error: --model {HUB_MODEL} {default.format('82 GB')}a checkpoint folder, or use --model "
        "toy, which works offline."
    )
    (spec,) = HUB_PRESET.lora
    assert refused("--lora", spec.source) == (
        f"error: --lora {spec.source} {default.format('307 MB')}a .safetensors file, or use "
        "--model toy, which works offline."
    )


@pytest.mark.usefixtures("own_model")
def test_missing_and_extra_weights(refused: Refused) -> None:
    tensors = load_file(TRANSFORMER)
    kept = {key: value for key, value in tensors.items() if "blocks.1.attn1.to_q" not in key}
    save_file({**kept, "surplus.weight": torch.zeros(1)}, TRANSFORMER, {"format": "pt"})
    assert refused("--model", "mine") == (
        "error: --model mine: the weights in transformer are not those of its config.json: "
        "2 missing (blocks.1.attn1.to_q.bias, blocks.1.attn1.to_q.weight), "
        f"1 unexpected (surplus.weight). {WEIGHTS}"
    )
    Path("mine/vae/diffusion_pytorch_model.safetensors").unlink()
    assert refused("--model", "mine", "--dry-run").startswith("error: --model mine")
    save_file(tensors, TRANSFORMER, {"format": "pt"})
    assert refused("--model", "mine") == (
        "error: --model mine has no vae/diffusion_pytorch_model.safetensors. Give a complete "
        "checkpoint in diffusers layout."
    )


@pytest.mark.usefixtures("own_model")
def test_what_is_found_only_on_loading_leaves_nothing(animate: Animate, place: Path) -> None:
    Path("mine/tokenizer/tokenizer.json").write_text("{}")
    before = snapshot(place)
    for words in (["--png", "frames"], ["--no-resume"]):
        done = animate("--model", "mine", *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.splitlines()[-1] == (
            "error: --model mine: tokenizer cannot be loaded. Give a complete checkpoint in "
            "diffusers layout."
        )
        assert snapshot(place) == before


def test_loras_that_do_not_fit(refused: Refused, place: Path) -> None:
    assert refused("--lora", "no.safetensors") == (
        "error: --lora no.safetensors does not exist. Give a .safetensors file or a Hub id, with "
        "its strength as FILE=SCALE."
    )
    pair = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, INNER_DIM),
        "blocks.0.attn1.to_q.lora_B.weight": torch.zeros(INNER_DIM, 2),
    }
    stray = {"blocks.99.attn1.to_q.lora_A.weight": torch.zeros(2, INNER_DIM)}
    save_file({**pair, **stray}, place / "stray.safetensors")
    assert refused("--lora", "stray.safetensors") == (
        "error: LoRA stray.safetensors: 1 of its 3 keys have no place in the network "
        "(blocks.99.attn1.to_q.lora_A.weight). Give a LoRA made for Wan2.2-Animate."
    )
    save_file(
        {key: value.repeat_interleave(2, dim=int("lora_A" in key)) for key, value in pair.items()},
        place / "large.safetensors",
    )
    assert refused("--lora", "large.safetensors", "--dry-run") == (
        "error: LoRA large.safetensors: 1 of its 1 layers have another shape than the network "
        f"(blocks.0.attn1.to_q.lora_B.weight for [{INNER_DIM}, {INNER_DIM}]). "
        "Give a LoRA made for this network's size."
    )


# --- the output ----------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("-o", "no/a.mp4") == (
        "error: --output no/a.mp4 cannot be written: the folder no does not exist. Make it first, "
        "or give another path."
    )
    (place / "locked").mkdir()
    with monkeypatch.context() as patch:
        # The superuser may write anywhere, so permission bits would not do.
        patch.setattr(os, "access", lambda path, _mode: Path(path).name != "locked")
        assert refused("-o", "locked/a.mp4") == (
            "error: --output locked/a.mp4 cannot be written: the folder locked is not writable. "
            "Give another path."
        )
        assert refused("--png", "locked/frames") == (
            "error: --png locked/frames cannot be written: the folder locked is not writable. "
            "Give another path."
        )
    Path("a.mp4").write_bytes(b"precious")
    assert refused("-o", "a.mp4") == (
        "error: --output a.mp4 exists. Add --overwrite to replace it, or give another name."
    )
    assert refused("-o", "a.avi") == (
        "error: --output a.avi does not end in .mp4. Give a name that does."
    )
    long_name = f"{'a' * 248}.mp4"
    assert refused("-o", long_name) == (
        f"error: --output {long_name} has too long a name. Give a shorter one."
    )
    Path("b.mp4.run").touch()
    assert refused("-o", "b.mp4") == (
        "error: --output b.mp4 needs a folder b.mp4.run beside it, but that is a file. "
        "Give another name."
    )


def test_a_result_never_replaces_what_is_not_its_own(refused: Refused, place: Path) -> None:
    Path("a.json").write_text(json.dumps({"ref": "anna.png", "driving": "dance"}))
    assert refused("-o", "a.mp4") == (
        "error: --output a.mp4 would replace a.json by its own settings. Add --overwrite to do "
        "so, or give another name."
    )
    write_dance(place / "waltz", num_frames=5)
    for name in ("pose.mp4", "face.mp4"):
        assert refused("-o", f"waltz/{name}", "--overwrite", inputs=("anna.png", "waltz")) == (
            f"error: --output waltz/{name} is also an input. Give another name."
        )
    assert refused("-o", "waltz/driving.mp4", "--overwrite", inputs=("anna.png", "waltz")) == (
        "error: --output waltz/driving.mp4 is the driving video, which has the sound. "
        "Give another name."
    )
    (place / "b.json").mkdir()
    assert refused("-o", "b.mp4") == (
        "error: --output b.mp4 needs a file b.json beside it, but that is a folder. "
        "Give another name."
    )
    (place / "frames").mkdir()
    (place / "frames" / "holiday.png").touch()
    assert refused("--png", "frames") == (
        "error: --png frames is not empty. Add --overwrite to write into it, or give another "
        "folder."
    )


def test_a_run_folder_never_lends_its_place_to_other_pictures(
    animate: Animate, refused: Refused, place: Path
) -> None:
    assert animate("-o", "a.mp4", "--frames", "1", "--steps", "1", "--keep-run").code == 0
    (place / "frames").mkdir()
    (place / "frames" / "holiday.png").touch()
    words = ("-o", "a.mp4", "--frames", "1", "--steps", "1", "--png", "frames")
    assert refused(*words).startswith("error: --png frames is not empty.")


# --- odd files that are accepted -----------------------------------------------------------------


def test_pictures_of_all_kinds(animate: Animate, place: Path) -> None:
    """One grey picture, stored in six ways, gives one video."""
    grey = np.asarray(Image.open(place / "anna.png").convert("L"))
    plain = Image.fromarray(grey)
    plain.convert("RGB").save("rgb.png")
    plain.save("grey.png")
    Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), "LA").save("alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("deep.png")
    black = np.dstack([np.zeros((*grey.shape, 3), np.uint8), 255 - grey])
    Image.fromarray(black, "CMYK").save("cmyk.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    plain.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    contents = set()
    for name in ("rgb.png", "grey.png", "alpha.png", "deep.png", "cmyk.tif", "turned.png"):
        words = ("-o", "a.mp4", "--frames", "1", "--steps", "1", "--overwrite")
        assert animate(*words, inputs=(name, "dance")).code == 0
        contents.add(Path("a.mp4").read_bytes())
    assert len(contents) == 1


def test_videos_of_all_kinds(animate: Animate) -> None:
    def pose_of(path: Path, *words: str) -> Frames:
        given = ("--pose", str(path), "--face", str(path), "--pose-beside", "--steps", "1")
        given += ("-o", "a.mp4", "--overwrite", "--crf", "1", "--frames", "5")
        done = animate(*given, *words, inputs=("anna.png",))
        assert done.code == 0, done.err
        frames = frames_of("a.mp4")
        return frames[:, :, frames.shape[2] // 2 :]

    exact = {"crf": "1"}
    frames = dance_frames(30)
    odd = write_media(Path("odd.mkv"), frames[:, :31, :47], codec="ffv1", pixel_format="yuv444p")
    assert dance_numbers(pose_of(odd, "--fit", "stretch")) == [0, 2, 4, 6, 8]
    deep = write_media(Path("deep.mp4"), frames, pixel_format="yuv420p10le", options=exact)
    assert dance_numbers(pose_of(deep, "--fit", "stretch")) == [0, 2, 4, 6, 8]
    # Each frame twice as long as the one before: 0 s, 0.04 s, 0.12 s, 0.28 s, 0.6 s.
    times = [0, 1, 3, 7, 15]
    odd_times = write_media(
        Path("vfr.mkv"), frames[:5], times=times, time_base=Fraction(1, 25), options=exact
    )
    # 0 s, 0.08 s, 0.16 s, 0.24 s, 0.32 s.
    assert dance_numbers(pose_of(odd_times, "--fit", "stretch")) == [0, 2, 2, 3, 3]
    # A phone stores its picture lying: players turn it back.
    lying = np.rot90(corner_frame(96, 48))
    turned = write_media(
        Path("turned.mp4"), np.repeat(lying[None], 20, axis=0), rotation=270, options=exact
    )
    upright = pose_of(turned, "--size", "48x96")[0]
    assert upright.shape == (96, 48, 3)
    assert corners(upright) == ["red", "green", "blue", "white"]


def test_a_usage_error_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made_files(place) == []
    assert main(["animate", "anna.png"]) == 2
    captured = capsys.readouterr()
    assert Outcome(2, captured.out, captured.err) == Outcome(
        2,
        "",
        "error: DRIVING is missing. Give a video or a folder made by extract-pose, or "
        "--pose and --face.\n",
    )
