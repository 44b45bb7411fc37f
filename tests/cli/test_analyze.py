"""`everanimate analyze` from end to end, on a tiny checkpoint."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from dances import write_dance_video
from media import corner_frame, moving_frames, write_media
from PIL import Image
from studio import Outcome, Program

from everanimate_cli import attention_shares, roundtrip
from everanimate_cli.roundtrip import FLAT_COLOURS

Analyze = Callable[..., Outcome]

ATTENTION_NAMES = ["attention.csv", "attention.json", "attention.png", "heatmap.png"]
ROUNDTRIP_NAMES = ["roundtrip.csv", "roundtrip.json", "roundtrip.png", "sheet.png"]


@pytest.fixture
def analyze(place: Path, program: Program) -> Analyze:
    """Runs `everanimate analyze ... --model tiny`."""
    assert place.is_dir()

    def run(*words: str) -> Outcome:
        return program("analyze", *words, "--model", "tiny")

    return run


@pytest.fixture
def film(place: Path) -> Path:
    """Twelve frames, so that a second chunk of nine is not full."""
    return write_media(place / "film.mp4", moving_frames(12, 48, 64), options={"crf": "1"})


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def record(folder: str, name: str) -> Any:
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def rows(folder: str, name: str) -> list[dict[str, str]]:
    with Path(folder, name).open(newline="") as file:
        return list(csv.DictReader(file))


def leave_out(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> None:
    """Drawing takes most of the time."""
    for name in names:
        monkeypatch.setattr(module, name, lambda *_: None)


def is_drawn(path: Path) -> bool:
    """Whether a picture has more on it than a title."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return pixels.shape[0] > 300 and pixels.shape[1] > 300 and (pixels < 200).mean() > 0.01


# --- roundtrip -----------------------------------------------------------------------------------


def test_a_video_travels(analyze: Analyze, film: Path) -> None:
    outcome = analyze("roundtrip", film.name, "--trips", "3")
    assert (outcome.code, outcome.out) == (0, "film_roundtrip\n")
    frames = 3 * (12 + len(FLAT_COLOURS))
    assert f"round trips: {frames}/{frames} frames" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("after 3 trips: PSNR ")
    assert names("film_roundtrip") == ROUNDTRIP_NAMES
    saved = record("film_roundtrip", "roundtrip.json")
    assert saved["format_version"] == 1
    assert (saved["frames"], saved["chunks"], saved["frames_per_chunk"]) == (12, 2, 9)
    assert saved["size"] == "64x48"
    assert saved["settings"]["trips"] == 3
    assert len(str(saved["video_sha256"])) == 64
    subjects = saved["subjects"]
    assert [subject["name"] for subject in subjects] == ["film.mp4", *FLAT_COLOURS]
    psnr = [trip["input"]["psnr_db"] for trip in subjects[0]["trips"]]
    assert psnr == saved["psnr_db"]
    assert psnr[0] == subjects[0]["trips"][0]["previous"]["psnr_db"]  # before it was the input
    # Random weights keep almost nothing of a picture, and the next trip meets what is left.
    assert psnr[0] < 25 < subjects[0]["trips"][2]["previous"]["psnr_db"]
    table = rows("film_roundtrip", "roundtrip.csv")
    assert len(table) == 3 * (1 + len(FLAT_COLOURS))
    assert float(table[1]["psnr_db_to_input"]) == psnr[1]
    for name in ("roundtrip.png", "sheet.png"):
        assert is_drawn(Path("film_roundtrip", name))


def test_a_picture_is_a_video_of_one_frame(analyze: Analyze) -> None:
    outcome = analyze("roundtrip", "anna.png", "--trips", "2", "--no-flat", "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    facts = json.loads(outcome.out)
    assert facts["output"] == "anna_roundtrip"
    assert (facts["frames"], facts["chunks"], facts["frames_per_chunk"]) == (1, 1, 1)
    assert len(facts["psnr_db"]) == len(facts["ssim"]) == len(facts["colour_shift"]) == 2
    assert len(rows("anna_roundtrip", "roundtrip.csv")) == 2
    assert is_drawn(Path("anna_roundtrip/sheet.png"))


def test_chunks_do_not_change_each_other(analyze: Analyze, film: Path) -> None:
    """Nine frames are a chunk of the model; three are left."""
    whole = json.loads(analyze("roundtrip", film.name, "--trips", "1", "--no-flat", "--json").out)
    parts = []
    for start, end in ((0, 9), (9, 12)):
        words = ("--start", str(start / 25), "--end", str(end / 25), "-o", f"part{start}")
        outcome = analyze("roundtrip", film.name, "--trips", "1", "--no-flat", "--json", *words)
        parts.append(json.loads(outcome.out))
    assert [part["frames"] for part in parts] == [9, 3]
    errors = [10 ** (-part["psnr_db"][0] / 10) for part in parts]
    pooled = -10 * np.log10((9 * errors[0] + 3 * errors[1]) / 12)
    assert whole["psnr_db"][0] == pytest.approx(pooled, abs=1e-3)


def test_options_that_change_the_journey(
    analyze: Analyze, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch, roundtrip, "plot_curves", "draw_sheet")
    seen = []
    for words in (
        [],
        ["--quantise", "truncate"],
        ["--quantise", "none"],
        ["--frames-per-chunk", "5"],
        ["--start", "0.2"],
        ["--end", "0.2"],
        ["--size", "96x64"],
        ["--size", "96x32"],
        ["--size", "96x32", "--fit", "contain"],
        ["--size", "96x32", "--fit", "stretch"],
    ):
        outcome = analyze(
            "roundtrip", film.name, "--trips", "2", "--no-flat", "--json", "--overwrite", *words
        )
        assert outcome.code == 0, outcome.err
        seen.append(tuple(json.loads(outcome.out)["psnr_db"]))
    assert len(set(seen)) == len(seen)


def test_auto_size_follows_the_input(analyze: Analyze) -> None:
    Image.fromarray(corner_frame(200, 100)).save("tall.png")
    outcome = analyze("roundtrip", "tall.png", "--dry-run", "--json")
    assert json.loads(outcome.out)["size"] == "32x64"
    assert not Path("tall_roundtrip").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "VIDEO dance is a folder. Give a video or a picture."),
        (
            ["anna.png", "--size", "60x48"],
            "--size 60x48 is not a multiple of 16 on both sides. Give 48x48 or 64x48.",
        ),
        (
            ["film.mp4", "--start", "9"],
            "--start 9 s is not within film.mp4, which lasts 0.480 s. Give an earlier time.",
        ),
        (
            ["notes.txt"],
            "VIDEO notes.txt ",
        ),
    ],
)
def test_what_cannot_travel_is_refused_and_leaves_nothing(
    analyze: Analyze, film: Path, words: list[str], message: str
) -> None:
    Path("notes.txt").write_text("no video")
    outcome = analyze("roundtrip", *words, "-o", "out")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1
    assert not Path("out").exists()
    assert film.exists()


def test_a_result_is_replaced_only_when_asked(analyze: Analyze) -> None:
    words = ("roundtrip", "anna.png", "--trips", "1", "--no-flat")
    assert analyze(*words).code == 0
    outcome = analyze(*words)
    assert (outcome.code, outcome.err) == (
        2,
        "error: --output anna_roundtrip holds roundtrip.json. Add --overwrite to replace it, or "
        "give another folder.\n",
    )
    assert analyze(*words, "--overwrite").code == 0


# --- attention -----------------------------------------------------------------------------------


def test_attention_is_measured_over_the_chunks(analyze: Analyze) -> None:
    outcome = analyze("attention", "anna.png", "dance", "--frames", "10")
    assert (outcome.code, outcome.out) == (0, "dance_anna_attention\n")
    lines = outcome.err.splitlines()
    assert lines[0] == (
        "10 frames of 64x48 in 2 chunks of 2 steps, 84 tokens in 7 slots, tiny on cpu in float32"
    )
    assert lines[-3].startswith("identity memory: ")
    assert names("dance_anna_attention") == ATTENTION_NAMES
    saved = record("dance_anna_attention", "attention.json")
    assert saved["slots"] == {"identity": 4, "motion": 1, "target": 2}
    uniform = saved["uniform_share"]
    assert uniform == {"identity": 0.571429, "motion": 0.142857, "target": 0.285714}
    assert sum(saved["share"].values()) == pytest.approx(1, abs=1e-5)
    assert saved["share"] != uniform
    assert set(saved["inputs_sha256"]) == {"REF", "pose video", "face video"}
    assert np.shape(saved["share_by_slot"]) == (3, 7)
    table = rows("dance_anna_attention", "attention.csv")
    assert len(table) == 2 * 2 * 4 * 3  # chunks, steps, blocks, groups
    mean = np.mean([float(row["share"]) for row in table if row["group"] == "identity"])
    assert mean == pytest.approx(saved["share"]["identity"], abs=1e-5)
    for name in ("attention.png", "heatmap.png"):
        assert is_drawn(Path("dance_anna_attention", name))


def test_options_of_animate_change_what_is_measured(
    analyze: Analyze, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch, attention_shares, "plot_shares", "plot_heat_maps")
    seen = []
    for words in (
        [],
        ["--seed", "1"],
        ["--memory", "sink"],
        ["--memory", "pixel"],
        ["--memory", "pixel", "--carry-frames", "5"],
        ["--identity-slots", "2"],
        ["--view", "back.png"],
        ["--steps", "3"],
        ["--frames-per-chunk", "13"],
    ):
        outcome = analyze(
            *("attention", "anna.png", "dance", "--frames", "10", "--json", "-q", "--overwrite"),
            *words,
        )
        assert (outcome.code, outcome.err) == (0, "")
        facts = json.loads(outcome.out)
        seen.append((tuple(facts["share"].values()), tuple(facts["uniform_share"].values())))
    assert len(set(seen)) == len(seen)


def test_one_identity_slot_and_one_chunk_are_drawn(analyze: Analyze) -> None:
    outcome = analyze("attention", "anna.png", "dance", "--memory", "pixel", "--frames", "9")
    assert outcome.code == 0
    saved = record("dance_anna_attention", "attention.json")
    assert (saved["chunks"], saved["slots"]["identity"]) == (1, 1)
    for name in ("attention.png", "heatmap.png"):
        assert is_drawn(Path("dance_anna_attention", name))


def test_the_plan_of_attention_is_printed(analyze: Analyze) -> None:
    outcome = analyze("attention", "anna.png", "dance", "--frames", "10", "--dry-run")
    assert outcome.out.splitlines()[:4] == [
        "output: dance_anna_attention",
        "frames: 10",
        "fps: 12.5",
        "size: 64x48",
    ]
    assert "tokens: 84" in outcome.out
    assert not Path("dance_anna_attention").exists()


def test_poses_of_a_raw_video_are_kept_beside_the_folder(analyze: Analyze) -> None:
    write_dance_video(Path("waltz.mp4"), num_frames=6)
    Path("sub").mkdir()
    words = ("attention", "anna.png", "waltz.mp4", "-o", "sub/seen")
    outcome = analyze(*words)
    assert (outcome.code, outcome.out) == (0, "sub/seen\n")
    assert names("sub") == ["seen", "waltz_pose"]
    again = analyze(*words, "--overwrite")
    assert "the poses of waltz.mp4 are in sub/waltz_pose already" in again.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["anna.png", "dance", "--identity-slots", "10"], "--frames-per-chunk 9 leaves 8 frames"),
        (["anna.png", "dance", "--size", "60x48"], "--size 60x48 is not a multiple of 16"),
        (["notes.txt", "dance"], "REF notes.txt "),
    ],
)
def test_what_cannot_be_animated_is_refused_and_leaves_nothing(
    analyze: Analyze, words: list[str], message: str
) -> None:
    Path("notes.txt").write_text("no picture")
    outcome = analyze("attention", *words, "-o", "out")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1
    assert not Path("out").exists()
