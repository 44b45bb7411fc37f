"""Everything random in a training sample, each draw from a generator of its own.

A draw is a function of (seed, global sample index, purpose) alone: a resumed run, a data-loader
worker and another number of processes get the same one, and one more kind of draw shifts none of
the others. What the draws mean for tensors stands in `training_samples`.

Source: method page section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from everanimate_cli.degradation import Degradation, draw_degradation
from everanimate_cli.errors import SettingsError
from everanimate_cli.settings import TEMPORAL_STRIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from everanimate_cli.train_settings import ResolvedTrainSettings

NUM_LEVELS: Final = 1000  # points of the training schedule, `schedule.NUM_TRAIN_TIMESTEPS`

# Method page section 3, "memory augmentation".
SCALES: Final = (0.8, 1.2)
SHIFTS: Final = (-0.10, 0.10)


class Purpose(IntEnum):
    """What a generator is for: the last word of its key.

    From 1 on: numpy pads keys with zeros, so that purpose 0 would repeat the stream of the key
    (seed, index), from which chunks take their noise. The numbers must stay as they are, or every
    latent cache holds other samples than it says.
    """

    CLIP_ORDER = 1
    START = 2
    REFERENCE = 3
    ANCHORS = 4
    AFFINE = 5
    DEGRADATION = 6
    RECYCLING = 7
    IS_FIRST = 8
    REPEATS_REFERENCE = 9
    AUGMENTS = 10
    DEGRADES = 11
    RECYCLES = 12
    DROPS_POSE = 13
    LEVEL = 14
    NOISE = 15


@dataclass(frozen=True)
class Windows:
    """Which frames of a sample are what, counted from its start.

    The last latent of the previous chunk covers exactly the first four frames of the target.

    Attributes:
        frames_per_chunk: F.

    Source: method page section 3, "Windows of a training sample".
    """

    frames_per_chunk: int

    @property
    def num_frames(self) -> int:
        """Frames that a sample needs, 2F + 4."""
        return 2 * self.frames_per_chunk + TEMPORAL_STRIDE

    @property
    def reference(self) -> slice:
        """One of these is the reference."""
        return slice(0, TEMPORAL_STRIDE)

    @property
    def previous(self) -> slice:
        """The previous chunk: F + 4 frames, the last four of which are the target's first."""
        return slice(TEMPORAL_STRIDE, self.frames_per_chunk + 2 * TEMPORAL_STRIDE)

    @property
    def target(self) -> slice:
        """The target, its poses and its faces: F frames."""
        return slice(self.frames_per_chunk + TEMPORAL_STRIDE, self.num_frames)


@dataclass(frozen=True)
class Affine:
    """How identity memory is moved: theta = [[scale, 0, x], [0, scale, y]] of `affine_grid`.

    Attributes:
        scale: Content is magnified by 1 / scale.
        x: Shift in units of half the width.
        y: Shift in units of half the height.
    """

    scale: float
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class SampleDraw:
    """What is drawn before a sample is encoded.

    Attributes:
        clip_index: Clip of the dataset.
        start: First frame of the sample in its clip.
        reference_index: Frame of the reference, counted from `start`, below 4.
        anchor_indices: K_id different frames of the previous chunk, rising, counted from its
            first frame.
        affine: Of the augmented identity memory, one for all its frames.
        degradation: Of the degraded target.
        recycling: Of the degraded previous chunk.
    """

    clip_index: int
    start: int
    reference_index: int
    anchor_indices: tuple[int, ...]
    affine: Affine
    degradation: Degradation
    recycling: Degradation


@dataclass(frozen=True, kw_only=True)
class StepDraw:
    """What is drawn each time that a sample is used.

    Whether a choice applies depends on the others: anchors that repeat the reference are not
    augmented, and a first chunk has no motion memory to degrade.

    Attributes:
        is_first: Act as a first chunk.
        repeats_reference: Fill all identity slots with the reference, although it is not a first
            chunk.
        augments: Move the frames in identity memory by `SampleDraw.affine`.
        degrades: Start from the degraded target where the noise is high enough.
        recycles: Take the motion memory from the degraded previous chunk.
        drops_pose: Show no pose.
        step_index: Point of the training schedule.
    """

    is_first: bool
    repeats_reference: bool
    augments: bool
    degrades: bool
    recycles: bool
    drops_pose: bool
    step_index: int


def draw_key(seed: int, index: int, purpose: Purpose) -> np.random.SeedSequence:
    """Key of one draw.

    Args:
        seed: Base seed of the run, at least 0.
        index: Global sample index; for the order of clips the number of the epoch.
        purpose: What is drawn.
    """
    return np.random.SeedSequence([seed, index, purpose])


def draw_sample(
    settings: ResolvedTrainSettings, seed: int, index: int, clip_lengths: Sequence[int]
) -> SampleDraw:
    """Draw a sample: the clip, its frames, and how they may be damaged.

    Every clip comes once before one comes again, each time in another order.

    Args:
        settings: Chunk length and identity slots; no probability has any influence.
        seed: Base seed of the run, at least 0.
        index: Global sample index, from 0.
        clip_lengths: Frames of each clip, each at least 2F + 4.

    Returns:
        The draw, the same whenever it is asked for.

    Raises:
        SettingsError: If the previous chunk has too few frames for the identity slots.
        ValueError: If the clip is too short.
    """
    windows = Windows(settings.frames_per_chunk)
    num_previous = windows.previous.stop - windows.previous.start
    num_slots = settings.identity_slots
    if num_slots > num_previous:
        raise SettingsError(
            f"--frames-per-chunk {windows.frames_per_chunk} gives {num_previous} frames to choose "
            f"{num_slots} identity slots from. Give longer chunks or fewer --identity-slots."
        )

    epoch, place = divmod(index, len(clip_lengths))
    order = _generator(seed, epoch, Purpose.CLIP_ORDER).permutation(len(clip_lengths))
    clip_index = int(order[place])
    num_starts = clip_lengths[clip_index] - windows.num_frames + 1
    if num_starts < 1:
        raise ValueError(
            f"clip {clip_index} has {clip_lengths[clip_index]} of {windows.num_frames} frames"
        )
    anchors = _generator(seed, index, Purpose.ANCHORS)
    affine = _generator(seed, index, Purpose.AFFINE)
    return SampleDraw(
        clip_index=clip_index,
        start=int(_generator(seed, index, Purpose.START).integers(num_starts)),
        reference_index=int(
            _generator(seed, index, Purpose.REFERENCE).integers(windows.reference.stop)
        ),
        anchor_indices=tuple(
            sorted(int(i) for i in anchors.choice(num_previous, num_slots, replace=False))
        ),
        affine=Affine(
            scale=float(affine.uniform(*SCALES)),
            x=float(affine.uniform(*SHIFTS)),
            y=float(affine.uniform(*SHIFTS)),
        ),
        degradation=draw_degradation(_generator(seed, index, Purpose.DEGRADATION)),
        recycling=draw_degradation(_generator(seed, index, Purpose.RECYCLING)),
    )


def draw_step(settings: ResolvedTrainSettings, seed: int, index: int) -> StepDraw:
    """Draw how a sample is used in one step.

    A probability only cuts a number that is drawn in any case, so that a change of one shifts no
    other draw and two runs that differ in it can be compared sample by sample.

    Args:
        settings: The probabilities.
        seed: Base seed of the run, at least 0.
        index: Global sample index, from 0; it goes on where samples of a latent cache come again.

    Returns:
        The draw, the same whenever it is asked for.
    """

    def happens(purpose: Purpose, probability: float) -> bool:
        return bool(_generator(seed, index, purpose).random() < probability)

    return StepDraw(
        is_first=happens(Purpose.IS_FIRST, settings.first_chunk_probability),
        repeats_reference=happens(Purpose.REPEATS_REFERENCE, settings.reference_anchor_probability),
        augments=happens(Purpose.AUGMENTS, settings.memory_augmentation),
        degrades=happens(Purpose.DEGRADES, settings.degradation_probability),
        recycles=happens(Purpose.RECYCLES, settings.error_recycling),
        drops_pose=happens(Purpose.DROPS_POSE, settings.pose_drop),
        step_index=int(_generator(seed, index, Purpose.LEVEL).integers(NUM_LEVELS)),
    )


def _generator(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(draw_key(seed, index, purpose)))
