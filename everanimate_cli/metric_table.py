"""The metrics of `everanimate eval`: what each is called, in what unit, and what it needs.

Standard library only, so that help texts and checks of options load nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Better = Literal["higher", "lower"]
Group = Literal["quality", "identity", "drift", "motion"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric says.

    Attributes:
        about: A line for tables.
        unit: "" where it is a share or a ratio. "levels" are steps of 8-bit colour.
        better: Which way is good.
        group: What it belongs to; identity is told apart from the quality of frames.
        needs: Options without which it cannot be measured.
        digits: Decimals in tables.
    """

    about: str
    unit: str = ""
    better: Better
    group: Group
    needs: tuple[str, ...] = ()
    digits: int = 3


_TRUTH: Final = ("--truth",)

METRICS: Final[Mapping[str, Metric]] = {
    "psnr": Metric(
        about="peak signal-to-noise ratio against the truth, peak 255",
        unit="dB",
        better="higher",
        group="quality",
        needs=_TRUTH,
        digits=2,
    ),
    "ssim": Metric(
        about="structural similarity to the truth, Gaussian window of 11 pixels",
        better="higher",
        group="quality",
        needs=_TRUTH,
        digits=4,
    ),
    "l1": Metric(
        about="mean absolute difference to the truth, colours from 0 to 1",
        better="lower",
        group="quality",
        needs=_TRUTH,
        digits=4,
    ),
    "lpips": Metric(
        about="perceptual distance to the truth (AlexNet)",
        better="lower",
        group="quality",
        needs=_TRUTH,
        digits=4,
    ),
    "fid": Metric(
        about="Frechet distance of Inception features of all frames to those of the truth",
        better="lower",
        group="quality",
        needs=_TRUTH,
        digits=2,
    ),
    "fvd": Metric(
        about="Frechet distance of I3D features of clips of 16 frames to those of the truth",
        better="lower",
        group="quality",
        needs=_TRUTH,
        digits=1,
    ),
    "identity": Metric(
        about="cosine of CLIP features of the person and of the person in the reference",
        # No network that recognises faces is at hand, and nobody is to believe so.
        unit="CLIP cosine",
        better="higher",
        group="identity",
        needs=("--reference",),
        digits=4,
    ),
    "background_psnr": Metric(
        about="PSNR of what lies around the person against the start of the video",
        unit="dB",
        better="higher",
        group="drift",
        needs=("--driving",),
        digits=2,
    ),
    "background_lpips": Metric(
        about="perceptual distance (AlexNet) of what lies around the person to the start of the "
        "video, over its share of the frame",
        better="lower",
        group="drift",
        needs=("--driving",),
        digits=4,
    ),
    "colour_drift": Metric(
        about="shift of the mean colour in CIELAB since the start",
        unit="dE",
        better="lower",
        group="drift",
        digits=2,
    ),
    "contrast_drift": Metric(
        about="change of the deviation of brightness since the start",
        unit="levels",
        better="lower",
        group="drift",
        digits=2,
    ),
    "saturation_drift": Metric(
        about="change of the mean distance from grey since the start",
        unit="levels",
        better="lower",
        group="drift",
        digits=2,
    ),
    "sharpness_drift": Metric(
        about="change of the strength of edges since the start",
        unit="%",
        better="lower",
        group="drift",
        digits=1,
    ),
    "seam": Metric(
        about="difference of frames where chunks join, over that of other neighbours",
        better="lower",
        group="motion",
    ),
    "pose_pck": Metric(
        about="share of joints within 0.2 torso lengths of the driving pose",
        better="higher",
        group="motion",
        needs=("--driving",),
    ),
    "pose_pck_strict": Metric(
        about="share of joints within 0.1 torso lengths of the driving pose",
        better="higher",
        group="motion",
        needs=("--driving",),
    ),
    "pose_distance": Metric(
        about="mean distance of joints to the driving pose in torso lengths",
        better="lower",
        group="motion",
        needs=("--driving",),
    ),
    "flicker": Metric(
        about="mean difference of a frame to the mean of its neighbours, brightness",
        unit="levels",
        better="lower",
        group="motion",
        digits=2,
    ),
}
