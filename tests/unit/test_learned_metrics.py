"""LPIPS, FID and FVD with stand-ins for the networks, and what is said where they are missing."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from everanimate_cli import learned_metrics
from everanimate_cli.eval_settings import parse_horizons
from everanimate_cli.events import Note
from everanimate_cli.frame_metrics import Backdrop, Moment, Track, Unavailable, Whole
from everanimate_cli.frechet import FeatureSums, frechet_distance
from everanimate_cli.learned_metrics import (
    BackgroundLpipsMeter,
    FidMeter,
    FvdMeter,
    LpipsMeter,
    lacking,
    load_network,
)

CPU = torch.device("cpu")


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)


def moments(count: int) -> list[Moment]:
    return [Moment(i, frame(i), frame(1000 + i)) for i in range(count)]


def mean_colours(pictures: torch.Tensor) -> torch.Tensor:
    assert pictures.dtype == torch.uint8
    return pictures.float().mean((2, 3))


def distance_of(made: list[np.ndarray], truth: list[np.ndarray]) -> float:
    sums = FeatureSums(), FeatureSums()
    sums[0].add(np.stack(made))
    sums[1].add(np.stack(truth))
    return frechet_distance(*sums)


# --- arithmetic ----------------------------------------------------------------------------------


def test_fid_is_the_distance_of_the_frames_features() -> None:
    meter = FidMeter(mean_colours, CPU, parse_horizons("0-1,0-2,5+"), 10.0)
    for moment in moments(25):
        meter.add(moment)
    meter.add(Moment(25, frame(3)))  # beyond the truth
    outcome = meter.outcomes()["fid"]
    assert isinstance(outcome, Whole)
    colours = [[frame(k + i).mean((0, 1)) for i in range(25)] for k in (0, 1000)]
    assert outcome.overall == pytest.approx(distance_of(*colours), rel=1e-5)
    assert outcome.horizons[:2] == pytest.approx(
        [distance_of(*(each[:n] for each in colours)) for n in (10, 20)], rel=1e-5
    )
    assert outcome.horizons[2] is None


def test_fvd_is_the_distance_of_the_clips_features() -> None:
    def network(clips: np.ndarray) -> torch.Tensor:
        assert clips.shape == (2, 16, 8, 10, 3)
        return torch.from_numpy(clips.astype(np.float32)).mean((1, 2, 3))

    meter = FvdMeter(network, parse_horizons("0-3.2,3.2+"), 10.0)
    for moment in moments(60):  # three clips, and twelve frames over
        meter.add(moment)
    outcome = meter.outcomes()["fvd"]
    assert isinstance(outcome, Whole)
    clips = [
        [np.stack([frame(k + i) for i in range(c, c + 16)]).mean((0, 1, 2)) for c in (0, 16, 32)]
        for k in (0, 1000)
    ]
    assert outcome.overall == pytest.approx(distance_of(*clips), rel=1e-5)
    assert outcome.horizons[0] == pytest.approx(distance_of(*(c[:2] for c in clips)), rel=1e-5)
    assert outcome.horizons[1] is None  # one clip has no covariance


def test_too_few_frames_and_clips_are_said_so() -> None:
    fid = FidMeter(mean_colours, CPU, (), 10.0)
    fid.add(moments(1)[0])
    assert fid.outcomes() == {"fid": Unavailable("needs two frames or more")}
    fvd = FvdMeter(lambda clips: torch.zeros(2, 3), (), 10.0)  # noqa: ARG005
    for moment in moments(31):
        fvd.add(moment)
    assert fvd.outcomes() == {"fvd": Unavailable("needs two clips of 16 frames or more")}


def test_lpips_sees_every_so_many_frames_as_shares_of_white(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learned_metrics, "LPIPS_LEAST_PX", 8)

    def network(made: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        assert made.shape == (1, 3, 8, 10)
        return (made - truth).abs().mean()

    meter = LpipsMeter(network, CPU, 3)
    for moment in [*moments(7), Moment(7, frame(1))]:
        meter.add(moment)
    outcome = meter.outcomes()["lpips"]
    assert isinstance(outcome, Track)
    values = outcome.per_frame()
    expected = [np.abs(frame(i) / 255 - frame(1000 + i) / 255).mean() for i in (0, 3, 6)]
    assert values[[0, 3, 6]] == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(values).sum() == 3


def test_background_lpips_is_that_of_the_scene_over_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice the person: where it stands now, and where it stood when the scene was seen."""
    monkeypatch.setattr(learned_metrics, "LPIPS_LEAST_PX", 8)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def network(made: torch.Tensor, scene: torch.Tensor) -> torch.Tensor:
        pairs.append((made, scene))
        return (made - scene).abs().mean()

    left, right = np.zeros((2, 8, 10), np.bool_)
    left[2:6, :3] = True
    right[2:6, 6:] = True
    first, second = np.full((2, 8, 10, 3), 50, np.uint8)
    second += np.uint8(2)
    later = np.full((8, 10, 3), 51 + 20, np.uint8)
    for frame_u8, person in ((first, left), (second, left), (later, right)):
        frame_u8[person] = 200
    backdrop = Backdrop(2)
    meter = BackgroundLpipsMeter(network, CPU, 2, backdrop)
    for index, (frame_u8, person) in enumerate(
        [(first, left), (second, left), (later, right), (later, right), (later, None)]
    ):
        meter.add(Moment(index, frame_u8, person=person))
    outcome = meter.outcomes()["background_lpips"]
    assert isinstance(outcome, Track)
    # One frame of the first two is the measure, the third is not asked for, the last has no pose.
    assert np.isfinite(outcome.per_frame()).tolist() == [False, False, True, False, False]
    assert len(pairs) == 1
    made, scene = (part[0].permute(1, 2, 0).numpy() * 255 for part in pairs[0])
    hidden = left | right
    np.testing.assert_allclose(made[hidden], scene[hidden])
    np.testing.assert_allclose(scene[~left], 51)
    np.testing.assert_allclose(made[~hidden], 71)
    # All that is seen is 20 levels off, whatever share of the frame it is.
    assert outcome.per_frame()[2] == pytest.approx(20 / 255, rel=1e-5)


def test_why_there_may_be_no_background_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def reason(*moments: Moment) -> str:
        meter = BackgroundLpipsMeter(network, CPU, 1, Backdrop(1))
        for moment in moments:
            meter.add(moment)
        outcome = meter.outcomes()["background_lpips"]
        assert isinstance(outcome, Unavailable)
        return outcome.reason

    nobody = np.zeros((8, 10), np.bool_)
    pair = [Moment(index, frame(index), person=nobody) for index in (0, 1)]
    assert reason(*pair) == "needs frames of at least 31x31 pixels"
    monkeypatch.setattr(learned_metrics, "LPIPS_LEAST_PX", 8)
    assert reason(pair[0]) == "needs a video that is longer than its first 1 frames"
    covered = [Moment(index, frame(index), person=~nobody) for index in (0, 1)]
    assert reason(*covered) == "not defined: no pixel is ever seen beside the person"


def test_lpips_needs_room_for_its_network() -> None:
    meter = LpipsMeter(lambda made, truth: made - truth, CPU, 1)
    for moment in moments(2):
        meter.add(moment)
    reason = Unavailable("needs frames of at least 31x31 pixels")
    assert meter.outcomes() == {"lpips": reason}


# --- what is missing -----------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, metric: str, loader: Any) -> None:
    """That the packages of a metric are there, and what loading its network does."""
    monkeypatch.setattr(learned_metrics, "PACKAGES", {metric: (("numpy",), "weights, 9 MB")})
    monkeypatch.setattr(learned_metrics, "_LOADERS", {metric: loader})


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"fid": (("numpy", "torch_fidelity_x"), "w"), "fvd": (("cdfvd_x",), "w")}
    monkeypatch.setattr(learned_metrics, "PACKAGES", packages)
    assert lacking("fid", download=True) == "needs pip install torch_fidelity_x"
    monkeypatch.setattr(learned_metrics, "_INSTALL", {"cdfvd_x": "cd-fvd"})
    assert load_network("fvd", CPU, lambda _: None, download=True) == Unavailable(
        "needs pip install cd-fvd"
    )


@pytest.mark.parametrize("metric", ["lpips", "fid"])
def test_weights_are_not_fetched_if_they_may_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pretend(monkeypatch, metric, None)
    assert lacking(metric, download=True) is None
    assert lacking(metric, download=False) == (
        "needs weights (weights, 9 MB), and --no-download fetches none"
    )
    name = {
        "lpips": "alexnet-owt-7be5be79.pth",
        "fid": "weights-inception-2015-12-05-6726825d.pth",
    }[metric]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).touch()
    assert lacking(metric, download=False) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (URLError("no route to host"), "weights (weights, 9 MB): <urlopen error no route to host>"),
        (RuntimeError("operator torchvision::nms does not exist\nmore"), "numpy that work: "
         "operator torchvision::nms does not exist"),
        (ImportError("no libcudart"), "numpy that work: no libcudart"),
        (EOFError(), "weights (weights, 9 MB): EOFError"),
    ],
)  # fmt: skip
def test_a_failed_load_becomes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def loader(device: torch.device) -> None:
        assert device == CPU
        sys.stdout.write("Downloading ...")
        raise error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pretend(monkeypatch, "lpips", loader)
    notes: list[object] = []
    found = load_network("lpips", CPU, notes.append, download=True)
    assert found == Unavailable(f"needs {words}")
    assert notes == [Note(text="fetching weights for lpips: weights, 9 MB")]


def test_stdout_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loader(device: torch.device) -> str:
        sys.stdout.write(f"loading on {device}")
        return "network"

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pretend(monkeypatch, "fid", loader)
    assert load_network("fid", CPU, lambda _: None, download=True) == "network"
    assert capsys.readouterr().out == ""


# --- the libraries' interfaces -------------------------------------------------------------------


def test_lpips_is_asked_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metric(torch.nn.Module):
        def __init__(self, net_type: str, normalize: bool) -> None:
            super().__init__()
            assert (net_type, normalize) == ("alex", True)

        def forward(self, made: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            return (made - truth).abs().sum()

    module = ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = Metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    network = learned_metrics._load_lpips(CPU)
    assert float(network(torch.ones(1), torch.zeros(1))) == 1


def test_inception_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metric:
        def __init__(self, feature: int) -> None:
            assert feature == 2048
            self.inception = torch.nn.Flatten()

    module = ModuleType("torchmetrics.image.fid")
    module.FrechetInceptionDistance = Metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert learned_metrics._load_inception(CPU)(torch.ones(2, 3, 4, 4)).shape == (2, 48)


def test_i3d_is_that_of_cd_fvd(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("cdfvd.third_party.i3d.utils")
    module.load_i3d_model = lambda device: lambda x: x.to(device) + 1  # type: ignore[attr-defined]
    module.preprocess_i3d = lambda v: torch.from_numpy(v).float().mean((1, 2, 3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    clips = np.full((2, 16, 4, 4, 3), 5, np.uint8)
    assert learned_metrics._load_i3d(CPU)(clips).tolist() == [[6, 6, 6]] * 2
