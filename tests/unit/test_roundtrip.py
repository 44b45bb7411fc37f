"""Round trips with a VAE whose damage is known, and with a real tiny one."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub, serve, use_hub
from original import build_original_networks, write_original
from tiny import build_tiny_pipeline, write_tiny_checkpoint
from torch import Tensor

from everanimate_cli.analyze_settings import Quantise, RoundtripSettings
from everanimate_cli.images import write_png
from everanimate_cli.memory import from_uint8
from everanimate_cli.roundtrip import (
    Comparison,
    Journey,
    Pool,
    Trip,
    amplified,
    analyze_roundtrip,
    choose_gain,
    compare,
    round_trip,
    sheet_trips,
    to_8_bits,
    travel,
)

LEVEL = 2 / 255  # of 8 bits, in pixels


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def send(
    frames_u8: np.ndarray,
    trip: Callable[[Tensor], Tensor],
    workers: ThreadPoolExecutor,
    *,
    num_trips: int = 3,
    quantise: Quantise = "round",
) -> Journey:
    """A journey of one chunk; all its frames are stills."""
    journey = Journey(name="test", trips=[Trip.begin() for _ in range(num_trips)])
    stills = range(len(frames_u8))
    numbers = travel(journey, frames_u8, trip, quantise, still_indices=stills, workers=workers)
    assert list(numbers) == list(range(1, num_trips + 1))
    return journey


def psnr_of(levels: float) -> float:
    return 20 * math.log10(255 / levels)


def grey_frames(num_frames: int, level: int = 100) -> np.ndarray:
    return np.full((num_frames, 16, 12, 3), level, np.uint8)


def test_damage_adds_up_against_the_input_only(workers: ThreadPoolExecutor) -> None:
    """Ten levels brighter on every trip."""
    journey = send(grey_frames(5), lambda pixels: pixels + 10 * LEVEL, workers)
    to_input = [trip.to_input.mean() for trip in journey.trips]
    to_previous = [trip.to_previous.mean() for trip in journey.trips]
    assert [each.psnr_db for each in to_input] == pytest.approx(
        [psnr_of(10), psnr_of(20), psnr_of(30)]
    )
    assert [each.psnr_db for each in to_previous] == pytest.approx([psnr_of(10)] * 3)
    assert to_input[0].lightness < to_input[1].lightness < to_input[2].lightness
    assert to_input[2].colour_shift == pytest.approx(to_input[2].lightness, abs=0.05)
    assert to_input[2].lightness == pytest.approx(
        sum(each.lightness for each in to_previous), rel=1e-6
    )
    assert [journey.stills[number][0, 0, 0, 0] for number in range(4)] == [100, 110, 120, 130]


def test_a_perfect_vae_loses_nothing(workers: ThreadPoolExecutor) -> None:
    frames_u8 = np.random.default_rng(0).integers(0, 256, (5, 16, 12, 3), dtype=np.uint8)
    journey = send(frames_u8, lambda pixels: pixels, workers)
    last = journey.trips[-1].to_input.mean()
    assert last.psnr_db == math.inf
    assert last.ssim == pytest.approx(1)
    assert last.colour_shift == 0
    assert journey.to_json()["trips"][2]["input"]["psnr_db"] is None
    assert journey.rows()[2]["psnr_db_to_input"] is None


@pytest.mark.parametrize(("num_frames", "length"), [(1, 1), (2, 5), (5, 5), (6, 9), (8, 9)])
def test_a_chunk_is_filled_up_to_a_length_that_the_vae_takes(
    workers: ThreadPoolExecutor, num_frames: int, length: int
) -> None:
    seen = []

    def trip(pixels: Tensor) -> Tensor:
        seen.append(pixels.shape)
        # What fills up does not count, however damaged it is.
        return torch.cat([pixels[:, :, :num_frames], 0 * pixels[:, :, num_frames:]], dim=2)

    journey = send(grey_frames(num_frames), trip, workers)
    assert seen == [(1, 3, length, 16, 12)] * 3
    assert journey.trips[0].to_input.count == num_frames
    assert journey.trips[0].to_input.mean().psnr_db == math.inf
    assert journey.stills[0].shape[0] == num_frames


def test_floats_keep_what_8_bits_lose(workers: ThreadPoolExecutor) -> None:
    """A third of a level on each trip: lost by rounding, kept by floats."""

    def trip(pixels: Tensor) -> Tensor:
        return pixels + LEVEL / 3

    rounded = send(grey_frames(1), trip, workers, num_trips=6)
    assert rounded.stills[6].max() == 100
    kept = send(grey_frames(1), trip, workers, num_trips=6, quantise="none")
    assert kept.stills[6].min() == 102


def test_truncating_darkens(workers: ThreadPoolExecutor) -> None:
    def trip(pixels: Tensor) -> Tensor:
        return pixels - LEVEL / 3

    assert send(grey_frames(1), trip, workers).stills[1].min() == 100
    cut = send(grey_frames(1), trip, workers, quantise="truncate")
    assert [int(cut.stills[number].max()) for number in (1, 2)] == [99, 98]


@pytest.mark.parametrize(
    ("quantise", "expected"), [("round", 101), ("truncate", 100), ("none", 101)]
)
def test_how_pixels_become_8_bits(quantise: Quantise, expected: int) -> None:
    pixels = torch.full((1, 3, 1, 2, 4), 100.7 * LEVEL - 1)
    frames_u8 = to_8_bits(pixels, quantise)
    assert frames_u8.dtype == np.uint8
    assert frames_u8.shape == (1, 2, 4, 3)
    assert (frames_u8 == expected).all()


def test_the_extremes_stay_in_range() -> None:
    pixels = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 1, 2).expand(1, 3, 1, 1, 2)
    assert to_8_bits(pixels, "round")[0, 0, :, 0].tolist() == [0, 255]


def test_a_trip_is_the_pipelines_encoding_and_decoding() -> None:
    pipeline = build_tiny_pipeline()
    frames_u8 = np.random.default_rng(1).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    pixels = from_uint8(frames_u8)
    expected = pipeline.decode(pipeline.encode_video(pixels)).clamp(-1, 1)
    made = round_trip(pipeline.vae, pixels)
    assert made.shape == pixels.shape
    torch.testing.assert_close(made[0], expected, atol=1e-5, rtol=0)
    assert (made - pixels).abs().mean() > 0.05  # random weights


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_of_a_model_on_the_hub_the_vae_alone_is_fetched(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if layout == "original":
        folder = write_original(tmp_path / "theirs", build_original_networks())
    else:
        folder = write_tiny_checkpoint(tmp_path / "tiny")
    write_png(Path("anna.png"), np.full((32, 48, 3), 90, np.uint8))
    settings = RoundtripSettings(
        video=Path("anna.png"), model="owner/tiny", size="48x32", trips=1, flat=False, device="cpu"
    )
    hub = Hub()
    hub.add("owner/tiny", folder)
    with serve([hub]) as address:
        use_hub(address, tmp_path / "cache", monkeypatch)
        result = analyze_roundtrip(settings, lambda _: None)
    assert result.facts["size"] == "48x32"
    sent = [request.path for request in hub.requests if request.path.startswith("/cdn/")]
    vae_file = {
        "diffusers": "vae/diffusion_pytorch_model.safetensors",
        "original": "Wan2.1_VAE.pth",
    }
    assert sent == [f"/cdn/owner/tiny/{vae_file[layout]}"]


def test_squared_errors_are_averaged_and_not_decibels() -> None:
    pool = Pool()
    grey, brighter = grey_frames(1)[0], grey_frames(1, 104)[0]
    pool.add([compare(grey, grey)])
    pool.add([compare(brighter, grey), compare(grey_frames(1, 108)[0], grey)])
    assert pool.count == 3
    assert pool.mean().psnr_db == pytest.approx(10 * math.log10(255**2 / (80 / 3)))


def test_opposite_shifts_cancel() -> None:
    """A cast is what stays over time."""
    pool = Pool()
    red, blue = grey_frames(1)[0].copy(), grey_frames(1)[0].copy()
    red[..., 0] += 20
    blue[..., 2] += 20
    pool.add([compare(red, blue), compare(blue, red)])
    assert pool.mean().colour_shift == pytest.approx(0, abs=1e-9)
    assert Comparison(30.0, 1.0, 2.0, 3.0, 6.0).colour_shift == 7


@pytest.mark.parametrize(
    ("num_trips", "shown"),
    [(1, [1]), (2, [1, 2]), (7, [1, 2, 5, 7]), (20, [1, 2, 5, 10, 20])],
)
def test_which_trips_are_shown(num_trips: int, shown: list[int]) -> None:
    assert sheet_trips(num_trips) == shown


@pytest.mark.parametrize(
    ("levels", "gain"), [(200, 1), (128, 1), (60, 2), (9, 8), (4, 32), (1, 32), (0, 32)]
)
def test_differences_are_amplified_as_far_as_they_fit(levels: int, gain: int) -> None:
    truth_u8 = grey_frames(1, 10)
    made_u8 = truth_u8 + np.uint8(levels)
    assert choose_gain(made_u8, truth_u8) == gain
    expected = min(255, 128 + gain * levels)
    assert (amplified(made_u8[0], truth_u8[0], gain) == expected).all()
    darker = amplified(truth_u8[0], made_u8[0], gain)
    assert (darker == max(0, 128 - gain * levels)).all()
