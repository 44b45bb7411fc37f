import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY_DEFAULTS, write_tiny_checkpoint

SPEED_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "animate_speed.py"
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
