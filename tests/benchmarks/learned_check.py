"""The networks behind LPIPS, FID and FVD for once, with random weights and without a network.

    pip install "everanimate[eval]"
    python tests/benchmarks/learned_check.py [--frames 48]

Random weights are put where torchmetrics, torch-fidelity and cd-fvd look for theirs (a temporary
folder), so that all of their code runs; the distances that `everanimate eval` finds are compared
with those of the packages on the same features. The published weights are not needed, and what a
metric means is not seen.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from everanimate_cli.events import Event
from everanimate_cli.feature_files import CLIP_FRAMES
from everanimate_cli.frame_metrics import Moment, Track, Whole
from everanimate_cli.learned_metrics import FidMeter, FvdMeter, LpipsMeter, load_network

CPU = torch.device("cpu")
SIDE = 64


def silent(_event: Event) -> None:
    """An `on_event` for nobody."""


def import_torchvision() -> None:
    """A build for another torch refuses to be imported for two operators that nobody needs here."""
    try:
        import torchvision  # noqa: PLC0415
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        import torchvision  # noqa: F401, PLC0415

        import_torchvision.library = library  # type: ignore[attr-defined]  # lives as long
        print("torchvision is for another torch: two of its operators are made up")


def spread(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights with which features of different pictures differ, as random ones alone hardly do."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.state_dict()


def write_weights(folder: Path) -> None:
    """Random weights for all three networks, under the names that the packages look for."""
    import torch_fidelity.feature_extractor_inceptionv3 as inception  # noqa: PLC0415
    from cdfvd.third_party.i3d import pytorch_i3d, utils  # noqa: PLC0415
    from torchvision.models import alexnet  # noqa: PLC0415

    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    os.environ["TORCH_HOME"] = str(folder)
    torch.save(spread(alexnet(weights=None)), checkpoints / "alexnet-owt-7be5be79.pth")

    class Extractor(inception.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Keeps what it was made with."""

    path = checkpoints / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({}, path)
    torch.save(spread(Extractor("inception-v3-compat", ["2048"])), path)
    path = folder / "i3d.pt"
    torch.save(spread(pytorch_i3d.InceptionI3d(400, in_channels=3)), path)
    utils.load_i3d_model = functools.partial(utils.load_i3d_model, ckpt_path=str(path))


def scenes(num_frames: int, seed: int) -> np.ndarray:
    """[S, 64, 64, 3] waves that move, of random colours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    rows = []
    for index in range(num_frames):
        phases, lengths = rng.uniform(0, 6, 3), rng.uniform(3, 15, 3)
        waves = np.sin((x[..., None] + y[..., None] * phases) / lengths + index / 5)
        rows.append((127 + 110 * waves).astype(np.uint8))
    return np.stack(rows)


def compare(name: str, ours: float, theirs: float, tolerance: float) -> bool:
    away = abs(ours - theirs) / max(abs(theirs), 1e-12)
    print(f"{name}: {ours:.8g}, by the package {theirs:.8g}, relative difference {away:.1e}")
    return away <= tolerance


def check_lpips(made: np.ndarray, truth: np.ndarray) -> bool:
    network = load_network("lpips", CPU, silent, download=False)
    assert callable(network), network
    meter = LpipsMeter(network, CPU, 1)
    for index, pair in enumerate(zip(made, truth, strict=True)):
        meter.add(Moment(index, *pair))
    outcome = meter.outcomes()["lpips"]
    assert isinstance(outcome, Track)
    network.reset()  # type: ignore[attr-defined]  # what follows is summed up by the package
    for frames in (made, truth):
        assert float(network(*[_pictures(frames[:1])] * 2)) == 0
    network.reset()  # type: ignore[attr-defined]
    network.update(_pictures(made), _pictures(truth))  # type: ignore[attr-defined]
    mean = outcome.over(slice(None))
    assert mean is not None
    return compare("LPIPS", mean, float(network.compute()), 1e-4)  # type: ignore[attr-defined]


def _pictures(frames_u8: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames_u8).permute(0, 3, 1, 2).float() / 255


def check_fid(made: np.ndarray, truth: np.ndarray) -> bool:
    from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: PLC0415

    network = load_network("fid", CPU, silent, download=False)
    assert callable(network), network
    meter = FidMeter(network, CPU, (), 25.0)
    theirs = FrechetInceptionDistance(feature=2048).set_dtype(torch.float64)
    for index, pair in enumerate(zip(made, truth, strict=True)):
        meter.add(Moment(index, *pair))
    outcome = meter.outcomes()["fid"]
    assert isinstance(outcome, Whole)
    theirs.inception = network
    for frames, real in ((made, False), (truth, True)):
        pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
        for few in pictures.split(8):
            theirs.update(few, real=real)
    assert outcome.overall is not None
    return compare("FID", outcome.overall, float(theirs.compute()), 1e-3)


def check_fvd(made: np.ndarray, truth: np.ndarray) -> bool:
    from cdfvd.third_party.i3d import utils  # noqa: PLC0415

    network = load_network("fvd", CPU, silent, download=True)
    assert callable(network), network
    meter = FvdMeter(network, (), 25.0)
    for index, pair in enumerate(zip(made, truth, strict=True)):
        meter.add(Moment(index, *pair))
    outcome = meter.outcomes()["fvd"]
    assert isinstance(outcome, Whole)
    features = []
    with torch.no_grad():
        for frames in (made, truth):
            clips = frames.reshape(-1, CLIP_FRAMES, *frames.shape[1:])
            features.append(torch.cat([network(clip[None]) for clip in clips]).double())
    assert outcome.overall is not None
    return compare("FVD", outcome.overall, float(utils.frechet_distance(*features)), 1e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=3 * CLIP_FRAMES, help="at least 32")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    num_frames = max(2, options.frames // CLIP_FRAMES) * CLIP_FRAMES
    made, truth = scenes(num_frames, 1), scenes(num_frames, 2)
    import_torchvision()
    with tempfile.TemporaryDirectory() as name:
        write_weights(Path(name))
        good = [check_lpips(made, truth), check_fid(made, truth), check_fvd(made, truth)]
    if not all(good):
        raise SystemExit("a distance is not that of its package")


if __name__ == "__main__":
    main()
