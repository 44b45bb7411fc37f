import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY_DEFAULTS, write_tiny_checkpoint

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
SPEED_SCRIPT = SCRIPTS / "animate_speed.py"
EXTRACT_SCRIPT = SCRIPTS / "extract_speed.py"
NUM_CHUNKS, NUM_STEPS = 2, 1


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the script prints, and its JSON."""
    folder = tmp_path_factory.mktemp("speed")
    figures = folder / "figures.json"
    arguments = {
        "--model": write_tiny_checkpoint(folder / "tiny"),
        "--chunks": NUM_CHUNKS,
        "--steps": NUM_STEPS,
        "--repeats": 1,
        "--json": figures,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    done = subprocess.run(
        [sys.executable, SPEED_SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text())


def test_each_side_makes_its_video(speed: tuple[str, dict]) -> None:
    _, figures = speed
    num_target_slots = (TINY_DEFAULTS.frames_per_chunk - 1) // 4 + 1
    rows = {row["side"]: row for row in figures["rows"]}
    assert {side: row["num_slots"] for side, row in rows.items()} == {
        "diffusers": 1 + num_target_slots,
        "pixel": 1 + num_target_slots,
        "latent": TINY_DEFAULTS.identity_slots + num_target_slots,
    }
    for row in rows.values():
        assert row["num_chunks"] == NUM_CHUNKS
        assert row["peak_mib"] > 100
        assert 0 < row["outside_share"] < 1
        inside_s = (1 - row["outside_share"]) * row["chunk_s"]
        assert sum(row["networks_s"].values()) == pytest.approx(inside_s)
        assert set(row["networks_s"]) == {"transformer", "vae", "image_encoder", "text_encoder"}
    assert rows["diffusers"]["time_ratio"] == 1


def test_diffusers_and_pixel_memory_do_the_same_work(speed: tuple[str, dict]) -> None:
    """Other noise gives 23 dB, one more step 29; both sides' encoders lose a little."""
    _, figures = speed
    assert figures["psnr_db"] > 40


def test_targets_are_judged_and_printed(speed: tuple[str, dict]) -> None:
    printed, figures = speed
    assert len(figures["targets"]) == 7
    for target in figures["targets"]:
        assert target["met"] == (target["value"] <= target["limit"])
        verdict = "ok" if target["met"] else "**short**"
        line = f"| {target['target']} | {target['value']:.3f} | {target['limit']:g} | {verdict} |"
        assert line in printed
    for row in figures["rows"]:
        assert f" {row['chunk_s']:.3f} | {row['time_ratio']:.2f} | " in printed


# --- extract_speed.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the script prints, and its JSON."""
    figures = tmp_path_factory.mktemp("extraction") / "figures.json"
    words = ["--rounds", "1", "--detector-gflop", "0.1", "--pose-gflop", "0.1"]
    words += ["--clips", "192x108:0.8", "--memory-clip", "192x108:0.5:2"]
    words += ["--dances", "1", "--dance-clip", "224x128:0.8", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, EXTRACT_SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text())


def test_both_sides_extract_the_same_clip(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    rows = {row["side"]: row for row in figures["rows"]}
    assert set(rows) == {"rtmlib", "everanimate"}
    for row in rows.values():
        assert (row["clip"], row["num_frames"]) == ("0.8 s 192x108", 24)
        assert row["peak_mib"] > 100
        assert row["networks_ms"] > 0
        assert row["total_s"] > row["networks_ms"] * row["num_frames"] / 1000
    assert rows["rtmlib"]["detector_calls"] == 24
    # Frames 0, 8 and 16, and again before to choose the person.
    assert rows["everanimate"]["detector_calls"] <= 2 * 24 / 4
    # One fixed pose: all that differs is where the box went between two looks of the detector.
    assert figures["apart_share"] < 0.01


def test_ratios_are_to_the_rtmlib_loop(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    theirs, ours = figures["rows"]
    for name in ("total", "outside", "cpu", "outside_cpu"):
        assert theirs[f"{name}_ratio"] == 1
    assert ours["total_ratio"] == pytest.approx(ours["total_s"] / theirs["total_s"])
    assert ours["outside_ratio"] == pytest.approx(ours["outside_ms"] / theirs["outside_ms"])
    clip, first = (figures["rounds"][0][1][part] for part in ("clip", "first"))
    outside_s = (clip["wall_s"] - clip["networks_s"]) - (first["wall_s"] - first["networks_s"])
    assert (clip["num_frames"], first["num_frames"]) == (24, 1)
    assert ours["outside_ms"] == pytest.approx(1000 * outside_s / 23)


def test_keypoints_are_compared_with_rtmlibs(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    (dance,) = figures["dances"]
    assert (dance["frames"], dance["frames_without_person"]) == (24, [0, 0])
    every_frame, every_eighth = dance["detector_calls"]
    assert every_frame >= 24 > every_eighth
    assert dance["from_rtmlib_px"] < 1e-3
    assert 0 < dance["drift_share"] < dance["drift_share_95"]


def test_memory_is_that_of_a_clip_and_of_a_longer_one(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    assert [one["num_frames"] for one in figures["memory"]] == [15, 30]


def test_targets_of_the_extraction_are_judged_and_printed(extraction: tuple[str, dict]) -> None:
    printed, figures = extraction
    limits = [target["limit"] for target in figures["targets"]]
    assert limits == [0.5, pytest.approx((3 + 10) / 24), 1.1, 1e-3, 0.01]
    for target in figures["targets"]:
        assert target["met"] == (target["value"] <= target["limit"])
        verdict = "ok" if target["met"] else "**short**"
        values = f"{target['value']:.4f} | {target['limit']:.4g} | {verdict}"
        assert f"| {target['target']} | {values} |" in printed


def test_rtmlib_is_asked_for(tmp_path: Path) -> None:
    """The script is run with everything but rtmlib."""
    hidden = "import importlib.util as u; f = u.find_spec; "
    hidden += "u.find_spec = lambda name: None if name == 'rtmlib' else f(name); "
    hidden += f"import runpy; runpy.run_path({str(EXTRACT_SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "pip install --no-deps rtmlib==0.0.16" in done.stderr
