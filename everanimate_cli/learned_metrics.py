"""Metrics that lean on published networks: LPIPS, FID and FVD.

The networks come from torchmetrics, torch-fidelity and cd-fvd, which are no part of a plain
installation, and fetch their weights on first use. Where one of them is missing, the metric says so
instead of a number. The arithmetic behind FID and FVD is `frechet`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everanimate_cli.events import Note, OnEvent
from everanimate_cli.feature_files import CLIP_FRAMES, distances, places_of
from everanimate_cli.frame_metrics import Outcome, Series, Track, Unavailable
from everanimate_cli.frechet import PairSums

if TYPE_CHECKING:
    from everanimate_cli.eval_settings import Horizon
    from everanimate_cli.feature_files import FeatureWriter
    from everanimate_cli.frame_metrics import Backdrop, Moment
    from everanimate_cli.metrics import Frame

LPIPS_LEAST_PX: Final = 31  # below, AlexNet's second pooling has nothing to pool
_BATCH: Final = 8  # frames that go through a network together

# What loading a network of a package can end with: no package or a build of torchvision for another
# torch (RuntimeError), no connection (OSError), a page of an error where weights should be.
_FAILURES = (ImportError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)

# Metric -> packages behind it and what is fetched.
PACKAGES: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "lpips": (("torchmetrics", "torchvision"), "AlexNet of torchvision, 233 MB"),
    "fid": (("torchmetrics", "torch_fidelity"), "Inception of torch-fidelity, 91 MB"),
    "fvd": (("cdfvd",), "I3D of cd-fvd, 51 MB"),
}
_INSTALL: Final = {"torch_fidelity": "torch-fidelity", "cdfvd": "cd-fvd"}
# Where each package keeps its weights; FVD's lie beside the code of cd-fvd.
_WEIGHT_FILES: Final = {
    "lpips": "alexnet-owt-*.pth",
    "fid": "weights-inception-2015-12-05-*.pth",
}


def lacking(metric: str, *, download: bool) -> str | None:
    """What a metric needs that is not here, told without loading anything.

    Args:
        metric: "lpips", "fid" or "fvd".
        download: Whether missing weights may be fetched.

    Returns:
        None if nothing is known to be missing.
    """
    packages, weights = PACKAGES[metric]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        words = " ".join(_INSTALL.get(name, name) for name in missing)
        return f"needs pip install {words}"
    if not download and not _has_weights(metric):
        return f"needs weights ({weights}), and --no-download fetches none"
    return None


def _has_weights(metric: str) -> bool:
    if metric in _WEIGHT_FILES:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return any(folder.glob(_WEIGHT_FILES[metric]))
    spec = importlib.util.find_spec("cdfvd")
    places = [] if spec is None else spec.submodule_search_locations or []
    return any(Path(place, "third_party/i3d/i3d_pretrained_400.pt").exists() for place in places)


def load_network(
    metric: str, device: torch.device, on_event: OnEvent, *, download: bool
) -> Callable[..., Any] | Unavailable:
    """The network behind a metric, on the device and ready to run.

    Args:
        metric: "lpips", "fid" or "fvd".
        device: Where it runs.
        on_event: Told that weights are fetched.
        download: Whether they may be.

    Returns:
        For LPIPS a function of two pictures, for FID of pictures and for FVD of clips, see the
        meters; or what is missing.
    """
    reason = lacking(metric, download=download)
    if reason is not None:
        return Unavailable(reason)
    if not _has_weights(metric):
        on_event(Note(text=f"fetching weights for {metric}: {PACKAGES[metric][1]}"))
    try:
        with redirect_stdout(StringIO()):  # stdout is for the result
            network: Callable[..., Any] = _LOADERS[metric](device)
            return network
    except _FAILURES as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        packages, weights = PACKAGES[metric]
        if isinstance(error, ImportError | RuntimeError):
            return Unavailable(f"needs {' and '.join(packages)} that work: {first_line}")
        return Unavailable(f"needs weights ({weights}): {first_line}")


def _load_lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    module = importlib.import_module("torchmetrics.image.lpip")
    metric = module.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    network: Callable[[Tensor, Tensor], Tensor] = metric.to(device).eval()
    return network


def _load_inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    module = importlib.import_module("torchmetrics.image.fid")
    metric = module.FrechetInceptionDistance(feature=2048)
    network: Callable[[Tensor], Tensor] = metric.inception.to(device).eval()
    return network


def _load_i3d(device: torch.device) -> Callable[[NDArray[np.uint8]], Tensor]:
    module = importlib.import_module("cdfvd.third_party.i3d.utils")
    network = module.load_i3d_model(device)

    def features_of(clips_u8: NDArray[np.uint8]) -> Tensor:
        features: Tensor = network(module.preprocess_i3d(clips_u8).to(device))
        return features

    return features_of


_LOADERS: Final[Mapping[str, Callable[[torch.device], Any]]] = {
    "lpips": _load_lpips,
    "fid": _load_inception,
    "fvd": _load_i3d,
}


def _to_tensor(frame_u8: Frame, device: torch.device) -> Tensor:
    """[1, 3, H, W] uint8."""
    return torch.from_numpy(frame_u8.copy()).permute(2, 0, 1)[None].to(device)


def _distance(
    network: Callable[[Tensor, Tensor], Tensor], pair: Sequence[Frame], device: torch.device
) -> float:
    """Of two frames [H, W, 3], as shares of white."""
    with torch.no_grad():
        return float(network(*(_to_tensor(frame, device).float() / 255 for frame in pair)))


def _is_too_small(frame_u8: Frame) -> bool:
    return bool(min(frame_u8.shape[:2]) < LPIPS_LEAST_PX)


_TOO_SMALL: Final = f"needs frames of at least {LPIPS_LEAST_PX}x{LPIPS_LEAST_PX} pixels"


class LpipsMeter:
    """Perceptual distance of every so many frames to the truth."""

    def __init__(
        self, network: Callable[[Tensor, Tensor], Tensor], device: torch.device, every: int
    ) -> None:
        """Take a network and how often to use it.

        Args:
            network: Distance of two pictures [1, 3, H, W] float in 0..1.
            device: Where it runs.
            every: Frames from one use to the next.
        """
        self._network, self._device, self._every = network, device, every
        self._series, self._num_frames = Series(), 0
        self._is_too_small = False

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        self._num_frames = moment.index + 1
        self._is_too_small = _is_too_small(moment.made_u8)
        if moment.truth_u8 is None or moment.index % self._every or self._is_too_small:
            return
        pair = (moment.made_u8, moment.truth_u8)
        self._series.put(moment.index, _distance(self._network, pair, self._device))

    def outcomes(self) -> Mapping[str, Outcome]:
        """LPIPS."""
        if self._is_too_small:
            return {"lpips": Unavailable(_TOO_SMALL)}
        return {"lpips": Track(self._series.rows(self._num_frames))}


class BackgroundLpipsMeter:
    """Perceptual distance of what lies around the person to the start of the video.

    The scene of the first frames is painted over the person, and over what was hidden then: both
    pictures are alike there, and the distance is that of the rest, which is divided by its share
    of the frame. Differs from a distance of cut-out pixels: features at the edge see both.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
        every: int,
        backdrop: Backdrop,
    ) -> None:
        """Take a network as `LpipsMeter` does, and what knows the scene."""
        self._network, self._device, self._every = network, device, every
        self._backdrop, self._series = backdrop, Series()
        self._is_too_small = False

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        seen = self._backdrop.seen_in(moment)
        self._is_too_small = _is_too_small(moment.made_u8)
        if seen is None or moment.index % self._every or self._is_too_small:
            return
        scene_u8 = np.rint(self._backdrop.scene).astype(np.uint8)
        made_u8 = np.where(seen[..., None], moment.made_u8, scene_u8)
        distance = _distance(self._network, (made_u8, scene_u8), self._device)
        self._series.put(moment.index, distance / float(seen.mean()))

    def outcomes(self) -> Mapping[str, Outcome]:
        """LPIPS of the background."""
        if self._is_too_small:
            return {"background_lpips": Unavailable(_TOO_SMALL)}
        if not len(self._series):
            return {"background_lpips": self._backdrop.why_never_seen()}
        return {"background_lpips": Track(self._series.rows(self._backdrop.num_frames))}


class _SetMeter:
    """Features of sets: the whole video, and each stretch of time."""

    name: str

    def __init__(
        self, horizons: Sequence[Horizon], fps: float, log: FeatureWriter | None = None
    ) -> None:
        self._horizons, self._fps = horizons, fps
        self._sums, self._log = PairSums(), log

    def _take(self, index: int, made: NDArray[np.float32], truth: NDArray[np.float32]) -> None:
        """Add features [D] of what begins at a frame."""
        where = places_of(index / self._fps, self._horizons)
        self._sums.add(where, made[None], truth[None])
        if self._log is not None:
            self._log.add(made, truth)

    def _flush(self) -> None:
        """Look at what waits."""

    def outcomes(self) -> Mapping[str, Outcome]:
        """The distance."""
        self._flush()
        return {self.name: distances(self.name, self._sums, len(self._horizons))}


class FidMeter(_SetMeter):
    """Frechet distance of the frames' features to those of the truth."""

    name = "fid"

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        device: torch.device,
        horizons: Sequence[Horizon],
        fps: float,
        log: FeatureWriter | None = None,
    ) -> None:
        """Take a network that turns pictures [B, 3, H, W] uint8 into features [B, D]."""
        super().__init__(horizons, fps, log)
        self._network, self._device = network, device
        self._waiting: list[Moment] = []

    def add(self, moment: Moment) -> None:
        """Look at the next frame."""
        if moment.truth_u8 is not None:
            self._waiting.append(moment)
        if len(self._waiting) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        pictures = [moment.made_u8 for moment in waiting]
        pictures += [moment.truth_u8 for moment in waiting if moment.truth_u8 is not None]
        with torch.no_grad():
            batch = torch.cat([_to_tensor(picture, self._device) for picture in pictures])
            features = self._network(batch).float().cpu().numpy()
        half = len(waiting)
        for moment, made, truth in zip(waiting, features[:half], features[half:], strict=True):
            self._take(moment.index, made, truth)


class FvdMeter(_SetMeter):
    """Frechet distance of the features of clips, one after the other, to those of the truth."""

    name = "fvd"

    def __init__(
        self,
        network: Callable[[NDArray[np.uint8]], Tensor],
        horizons: Sequence[Horizon],
        fps: float,
        log: FeatureWriter | None = None,
    ) -> None:
        """Take a network that turns clips [B, 16, H, W, 3] uint8 into features [B, D]."""
        super().__init__(horizons, fps, log)
        self._network = network
        self._clip: list[Moment] = []

    def add(self, moment: Moment) -> None:
        """Look at the next frame; what does not fill a clip at the end is left out."""
        if moment.truth_u8 is None:
            return
        self._clip.append(moment)
        if len(self._clip) < CLIP_FRAMES:
            return
        clip, self._clip = self._clip, []
        made = np.stack([each.made_u8 for each in clip])
        truth = np.stack([each.truth_u8 for each in clip if each.truth_u8 is not None])
        with torch.no_grad():
            features = self._network(np.stack([made, truth])).float().cpu().numpy()
        self._take(clip[0].index, features[0], features[1])
