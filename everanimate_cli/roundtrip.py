"""`everanimate analyze roundtrip`: what repeated decoding and encoding leaves of a picture.

Source: method page section 4, Finding 1.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from everanimate_cli import checkpoint, estimates, hub, metrics, weights
from everanimate_cli.analyze import write_record, write_table
from everanimate_cli.analyze_settings import ROUNDTRIP_FILES
from everanimate_cli.errors import MediaError, SettingsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.figures import dress, hide_frames, new_figure, save_figure, whole_ticks
from everanimate_cli.hashes import hash_file
from everanimate_cli.images import fit_frame, fit_size
from everanimate_cli.memory import from_uint8, to_uint8
from everanimate_cli.preflight import unfit_size
from everanimate_cli.records import CommandResult
from everanimate_cli.settings import TEMPORAL_STRIDE
from everanimate_cli.video import VideoReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from everanimate_cli.analyze_settings import Quantise, RoundtripSettings
    from everanimate_cli.model_folder import ModelSource

    Frames = NDArray[np.uint8]
    Values = NDArray[np.float64]

_NETWORKS = ("vae",)
_WAN_PATCH_SIDE = 2  # latent cells

# The corners of the colour cube, greys between, and colours that pictures of people are full of.
FLAT_COLOURS = {
    "black": (0, 0, 0),
    "dark grey": (64, 64, 64),
    "grey": (128, 128, 128),
    "light grey": (192, 192, 192),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "cyan": (0, 255, 255),
    "blue": (0, 0, 255),
    "magenta": (255, 0, 255),
    "skin": (224, 172, 138),
    "brown": (110, 70, 40),
    "sky": (135, 190, 235),
    "leaf": (80, 120, 60),
}

_SHEET_TRIPS = (1, 2, 5, 10, 20, 50, 100)
_MIDDLE = 128  # the grey of no difference
_MAX_GAIN = 32
# This share of the differences after the first trip is shown without being cut off.
_SHOWN_SHARE = 0.98


# --- one trip ------------------------------------------------------------------------------------


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Encode a video (the mode of the distribution) and decode the code.

    The latents are not normalised, since decoding would undo it at once.

    Args:
        vae: In float32.
        pixels: [1, 3, S, H, W] in [-1, 1], S = 4n+1.

    Returns:
        The same shape, clamped to [-1, 1], as what carries decoded frames does.
    """
    latents = vae.encode(pixels).latent_dist.mode()
    return vae.decode(latents).sample.float().clamp(-1, 1)


def to_8_bits(pixels: Tensor, quantise: Quantise) -> Frames:
    """Frames [S, H, W, 3] of pixels [1, 3, S, H, W], as they are handed on and measured.

    Truncating, as the released code does, darkens by half a level on each trip; "none" hands on
    floats, and what is measured is rounded.
    """
    if quantise == "truncate":
        return to_uint8(pixels[0]).cpu().numpy()
    levels = ((pixels[0] + 1) * 127.5).round().to(torch.uint8)
    return np.asarray(levels.permute(1, 2, 3, 0).contiguous().cpu().numpy())


# --- figures -------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Frames against others, pooled.

    Attributes:
        psnr_db: Of the mean squared error of all frames; infinite if they are equal.
        ssim: Mean over frames.
        lightness: Mean colour shift in L*; positive is brighter.
        green_red: Likewise a*; positive is more red.
        blue_yellow: Likewise b*; positive is more yellow.
    """

    psnr_db: float
    ssim: float
    lightness: float
    green_red: float
    blue_yellow: float

    @property
    def colour_shift(self) -> float:
        """Size of the mean shift; 2.3 is about a just noticeable difference."""
        return math.hypot(self.lightness, self.green_red, self.blue_yellow)

    def to_json(self) -> dict[str, float | None]:
        """Rounded; an infinite PSNR is None."""
        values = {**self._asdict(), "colour_shift": self.colour_shift}
        return {
            name: round(value, 4) if math.isfinite(value) else None
            for name, value in values.items()
        }


def compare(made_u8: Frames, truth_u8: Frames) -> Values:
    """One frame [H, W, 3] against another: squared error, SSIM, and the colour shift's three."""
    shift = metrics.colour_shift(made_u8, truth_u8)
    error = metrics.squared_error(made_u8, truth_u8)
    return np.array([error, metrics.ssim(made_u8, truth_u8), *shift])


@dataclass(kw_only=True)
class Pool:
    """Frames against others, summed up as they come, so that memory does not grow with them."""

    count: int = 0
    total: Values = field(default_factory=lambda: np.zeros(5))

    def add(self, figures: Iterable[Values]) -> None:
        """Take what `compare` says of each frame."""
        for each in figures:
            self.count += 1
            self.total += each

    def mean(self) -> Comparison:
        """Over all frames so far, at least one."""
        error, *others = (self.total / self.count).tolist()
        return Comparison(metrics.psnr_db(error), *others)


class Trip(NamedTuple):
    """What one trip did.

    Attributes:
        to_input: Frames after this trip against those before the first.
        to_previous: Against those before this trip.
    """

    to_input: Pool
    to_previous: Pool

    @classmethod
    def begin(cls) -> Self:
        """A trip that no frame has made yet."""
        return cls(Pool(), Pool())


@dataclass(kw_only=True)
class Journey:
    """All trips of one subject: the input, or a flat colour.

    Attributes:
        name: As shown.
        trips: In order.
        stills: Trip -> [n, H, W, 3] frames to be looked at; 0 is the input.
    """

    name: str
    trips: list[Trip]
    stills: dict[int, Frames] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The figures of each trip."""
        return {
            "name": self.name,
            "trips": [
                {
                    "trip": number,
                    "input": trip.to_input.mean().to_json(),
                    "previous": trip.to_previous.mean().to_json(),
                }
                for number, trip in enumerate(self.trips, start=1)
            ],
        }

    def rows(self) -> list[dict[str, object]]:
        """One for each trip."""
        rows: list[dict[str, object]] = []
        for number, trip in enumerate(self.trips, start=1):
            row: dict[str, object] = {"subject": self.name, "trip": number}
            for reference, comparison in (
                ("input", trip.to_input.mean()),
                ("previous", trip.to_previous.mean()),
            ):
                values = comparison.to_json()
                row |= {f"{name}_to_{reference}": value for name, value in values.items()}
            rows.append(row)
        return rows


def travel(
    journey: Journey,
    frames_u8: Frames,
    trip: Callable[[Tensor], Tensor],
    quantise: Quantise,
    *,
    still_indices: Sequence[int] = (),
    workers: ThreadPoolExecutor,
) -> Iterator[int]:
    """Send one chunk on all trips and add what they did to the journey.

    Args:
        journey: Takes figures and stills.
        frames_u8: [S, H, W, 3], any S: the last frame is repeated to a length that the VAE takes,
            and the copies are not counted.
        trip: See `round_trip`.
        quantise: See `to_8_bits`.
        still_indices: Frames to be kept as stills.
        workers: Measure the frames.

    Yields:
        The number of the trip just finished, from 1 on.
    """
    num_frames = len(frames_u8)
    surplus = -(num_frames - 1) % TEMPORAL_STRIDE
    padded = np.concatenate([frames_u8, np.repeat(frames_u8[-1:], surplus, axis=0)])
    pixels = from_uint8(padded)
    previous_u8 = frames_u8
    stills = list(still_indices)
    if stills:
        journey.stills[0] = frames_u8[stills]
    shown = sheet_trips(len(journey.trips))
    for number, collected in enumerate(journey.trips, start=1):
        pixels = trip(pixels)
        made = to_8_bits(pixels, quantise)
        if quantise != "none":
            pixels = from_uint8(made)
        made = made[:num_frames]
        collected.to_input.add(workers.map(compare, made, frames_u8))
        collected.to_previous.add(workers.map(compare, made, previous_u8))
        previous_u8 = made
        if stills and number in shown:
            journey.stills[number] = made[stills]
        yield number


def sheet_trips(num_trips: int) -> list[int]:
    """After which trips pictures are shown, the last one among them."""
    return sorted({trip for trip in _SHEET_TRIPS if trip < num_trips} | {num_trips})


# --- the work ------------------------------------------------------------------------------------


def analyze_roundtrip(settings: RoundtripSettings, on_event: OnEvent) -> CommandResult:
    """Send a video or picture, and flat colours, through the VAE again and again.

    Args:
        settings: Checked options.
        on_event: Told how far the work is, and of what is worth a line.

    Returns:
        The folder with table, record and pictures; with `settings.dry_run` the plan alone.

    Raises:
        EverAnimateError: If an input, option or checkpoint cannot be used; nothing is written then.
        OSError: If the disk is full.
    """
    video_size = _open(settings).info
    # Of a checkpoint on the Hub nothing else is downloaded.
    source = hub.locate_model(
        settings.model, on_event, download=not settings.dry_run, networks=_NETWORKS
    )
    checkpoint.check_network(source, *_NETWORKS)
    multiple = _size_multiple(source)
    defaults = source.defaults
    size = settings.height_width or fit_size(
        video_size.height, video_size.width, defaults.height * defaults.width, multiple
    )
    if any(side % multiple for side in size):
        raise unfit_size(size, multiple)
    if min(size) < metrics.SSIM_WINDOW_PX:
        raise SettingsError(
            f"--size {size[1]}x{size[0]} is too small: SSIM needs 11 pixels on both sides. "
            "Give a larger one."
        )
    device = weights.choose_device(settings.device)
    output = settings.output or settings.default_output
    height, width = size
    fit = functools.partial(fit_frame, height=height, width=width, fit=settings.fit)
    with _open(settings, fit) as reader:
        length = settings.frames_per_chunk or defaults.frames_per_chunk
        facts: dict[str, Any] = {
            "frames": len(reader),
            "size": f"{width}x{height}",
            "trips": settings.trips,
            "chunks": math.ceil(len(reader) / length),
            "frames_per_chunk": min(length, len(reader)),
            "model": source.name,
            "device": str(device),
        }
        if settings.dry_run:
            return CommandResult(output=output, facts=facts)
        vae = weights.load_vae(source, device)

        def trip(pixels: Tensor) -> Tensor:
            return round_trip(vae, pixels.to(device))

        journeys = _travel_all(settings, reader, length, trip, on_event)
    rows = [row for journey in journeys for row in journey.rows()]
    comparisons = [each.to_input.mean() for each in journeys[0].trips]
    for name in ("psnr_db", "ssim", "colour_shift"):
        facts[name] = [comparison.to_json()[name] for comparison in comparisons]
    output.mkdir(exist_ok=True)
    title = f"{settings.video.name}, {width}x{height}, VAE of {source.name}"
    table, plot, sheet, record_path = (output / name for name in ROUNDTRIP_FILES)
    write_table(table, rows)
    plot_curves(plot, journeys, title)
    draw_sheet(sheet, journeys, title)
    record = {
        "model_revision": source.revision,
        "vae_sha256": checkpoint.checkpoint_hash(source, _NETWORKS),
        "video_sha256": hash_file(settings.video),
        **facts,
    }
    results = {"subjects": [journey.to_json() for journey in journeys]}
    write_record(record_path, settings, record, results)
    for number in sheet_trips(settings.trips):
        on_event(Note(text=_trip_line(number, comparisons[number - 1])))
    return CommandResult(output=output, facts=facts)


def _size_multiple(source: ModelSource) -> int:
    """What the sides of a video by this model are multiples of."""
    if source.has_config("transformer"):
        return estimates.read_geometry(source).size_multiple
    # The weights that would tell are not needed for anything else.
    return int(checkpoint.full_config(source, "vae").scale_factor_spatial) * _WAN_PATCH_SIDE


def _trip_line(number: int, comparison: Comparison) -> str:
    trips = "1 trip" if number == 1 else f"{number} trips"
    return (
        f"after {trips}: PSNR {comparison.psnr_db:.2f} dB, SSIM {comparison.ssim:.3f}, "
        f"colour shift {comparison.colour_shift:.2f}"
    )


def _open(
    settings: RoundtripSettings, transform: Callable[[Frames], Frames] | None = None
) -> VideoReader:
    try:
        return VideoReader(
            settings.video, start_s=settings.start, end_s=settings.end, transform=transform
        )
    except MediaError as error:
        raise MediaError(f"VIDEO {error}") from error
    except SettingsError as error:  # about `start`, which is an option of the same name
        raise SettingsError(f"--{error} Give an earlier time.") from error


def _travel_all(
    settings: RoundtripSettings,
    reader: VideoReader,
    length: int,
    trip: Callable[[Tensor], Tensor],
    on_event: OnEvent,
) -> list[Journey]:
    """The journey of the video, chunk by chunk, then those of the flat colours."""
    num_trips = settings.trips
    colours = FLAT_COLOURS if settings.flat else {}
    total = num_trips * (len(reader) + len(colours))
    on_event(PhaseStarted(name="round trips", total=total))
    done = 0
    journeys = []
    # As many as torch uses, which the environment can limit.
    with ThreadPoolExecutor(torch.get_num_threads()) as workers:

        def send(journey: Journey, frames_u8: Frames, still_indices: Sequence[int]) -> None:
            nonlocal done
            numbers = travel(
                journey,
                frames_u8,
                trip,
                settings.quantise,
                still_indices=still_indices,
                workers=workers,
            )
            for _ in numbers:
                done += len(frames_u8)
                on_event(PhaseAdvanced(done=done))

        video = Journey(name=settings.video.name, trips=[Trip.begin() for _ in range(num_trips)])
        journeys.append(video)
        for first in range(0, len(reader), length):
            frames_u8 = reader.read(range(first, min(first + length, len(reader))))
            # Within a chunk, damage grows with time.
            ends = sorted({0, len(frames_u8) - 1}) if first == 0 else ()
            send(video, frames_u8, ends)
        height, width = frames_u8.shape[1:3]
        for name, colour in colours.items():
            flat = Journey(name=name, trips=[Trip.begin() for _ in range(num_trips)])
            journeys.append(flat)
            send(flat, np.full((1, height, width, 3), colour, np.uint8), [0])
    return journeys


# --- pictures ------------------------------------------------------------------------------------


def plot_curves(path: Path, journeys: Sequence[Journey], title: str) -> None:
    """Draw PSNR, SSIM and colour shift over the trips.

    Args:
        path: PNG file, written whole or not at all.
        journeys: The video, then the flat colours, if any.
        title: What was measured.

    Raises:
        OSError: If the disk is full.
    """
    video, *flats = journeys
    figure = new_figure(13, 8, f"Repeated VAE round trips\n{title}")
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    numbers = range(1, len(video.trips) + 1)
    to_input = [trip.to_input.mean() for trip in video.trips]
    to_previous = [trip.to_previous.mean() for trip in video.trips]
    for axes, name, label in (
        (top_left, "psnr_db", "PSNR [dB]"),
        (top_right, "ssim", "SSIM"),
    ):
        for comparisons, colour, against in (
            (to_input, "#1f4e8c", "against the input"),
            (to_previous, "#d9822b", "against the trip before"),
        ):
            values = [getattr(comparison, name) for comparison in comparisons]
            axes.plot(numbers, values, "o-", color=colour, markersize=4, label=against)
        axes.set(ylabel=label)
        axes.legend(frameon=False)
    for name, colour, label in (
        ("colour_shift", "#222222", "size"),
        ("lightness", "#999999", "L*: brighter"),
        ("green_red", "#c0392b", "a*: more red"),
        ("blue_yellow", "#c9a400", "b*: more yellow"),
    ):
        values = [getattr(comparison, name) for comparison in to_input]
        style = {"linewidth": 2.2} if name == "colour_shift" else {"linestyle": "--"}
        low_left.plot(numbers, values, color=colour, label=label, **style)
    low_left.axhline(0, color="black", linewidth=0.8)
    low_left.set(ylabel="mean colour shift [CIELAB]", title="input")
    low_left.margins(y=0.2)  # room for the legend
    low_left.legend(frameon=False, ncols=4, loc="upper center", fontsize=9)
    if flats:
        _plot_flats(low_right, flats)
    else:
        low_right.set_axis_off()
    for axes in (top_left, top_right, low_left, low_right):
        axes.set(xlabel="round trips", xlim=(0.6, len(numbers) + 0.4))
        whole_ticks(axes.xaxis)
        dress(axes)
    save_figure(path, figure)


def _plot_flats(axes: Axes, flats: Sequence[Journey]) -> None:
    """The colour shift of each flat colour, in its own colour."""
    for flat in flats:
        values = [trip.to_input.mean().colour_shift for trip in flat.trips]
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values, color="#555555", linewidth=2.6)  # lets white be seen
        axes.plot(numbers, values, color=_matplotlib_colour(flat.name), linewidth=1.8)
    axes.set(ylabel="size of the colour shift [CIELAB]", title="flat colours", ylim=(0, None))
    _label_ends(
        axes,
        len(flats[0].trips),
        {flat.name: flat.trips[-1].to_input.mean().colour_shift for flat in flats},
    )


def _label_ends(axes: Axes, last_trip: int, ends: Mapping[str, float]) -> None:
    """Write each name beside the right end of its curve, above the name below it."""
    step = axes.get_ylim()[1] / 26
    place = -step
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        place = max(end, place + step)
        axes.annotate(
            name,
            (last_trip, end),
            xytext=(1.04, place),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
            annotation_clip=False,
        )


def _matplotlib_colour(name: str) -> tuple[float, float, float]:
    red, green, blue = FLAT_COLOURS[name]
    return red / 255, green / 255, blue / 255


def draw_sheet(path: Path, journeys: Sequence[Journey], title: str) -> None:
    """Draw pictures after some trips, how they differ from the input, and the flat colours.

    Args:
        path: PNG file, written whole or not at all.
        journeys: The video, then the flat colours, if any; with stills.
        title: What was measured.

    Raises:
        OSError: If the disk is full.
    """
    video, *flats = journeys
    trips = sorted(video.stills)
    num_stills, height, width = video.stills[0].shape[:3]
    cell_width = 2.2 if width <= height else 3.0
    cell_height = cell_width * height / width
    num_rows = 2 * num_stills + bool(flats)
    figure = new_figure(
        cell_width * len(trips) + 1.2,
        cell_height * num_rows + 1.6 + 0.1 * num_rows,
        f"Repeated VAE round trips\n{title}",
    )
    grid = figure.subplots(num_rows, len(trips), squeeze=False)
    names = ["first frame", "last frame\nof the chunk"] if num_stills > 1 else ["picture"]
    gain = choose_gain(video.stills[1], video.stills[0])
    for column, number in enumerate(trips):
        grid[0][column].set_title(
            "input" if number == 0 else f"{number} trip{'s' if number > 1 else ''}", fontsize=10
        )
        for still, name in enumerate(names):
            picture, difference = grid[2 * still][column], grid[2 * still + 1][column]
            made_u8, input_u8 = video.stills[number][still], video.stills[0][still]
            picture.imshow(made_u8)
            if number:
                difference.imshow(amplified(made_u8, input_u8, gain))
            else:
                _name_row(picture, name)
                _name_row(difference, f"difference\ntimes {gain}")
        if flats:
            _draw_flats(grid[-1][column], [flat.stills[number][0] for flat in flats])
    if flats:
        _name_row(grid[-1][0], "flat colours")
    hide_frames(grid)
    save_figure(path, figure)


def choose_gain(made_u8: Frames, truth_u8: Frames) -> int:
    """A power of two, 1 to 32, that lets nearly all of the differences be seen uncut."""
    sizes = np.abs(made_u8.astype(np.int16) - truth_u8)
    largest = max(1.0, float(np.quantile(sizes, _SHOWN_SHARE)))
    return int(2 ** np.clip(math.floor(math.log2(_MIDDLE / largest)), 0, math.log2(_MAX_GAIN)))


def amplified(made_u8: Frames, truth_u8: Frames, gain: int) -> Frames:
    """The difference of two frames [H, W, 3], so many times as large, about mid-grey."""
    difference = made_u8.astype(np.int16) - truth_u8
    return np.clip(_MIDDLE + gain * difference, 0, 255).astype(np.uint8)


def _draw_flats(axes: Axes, frames_u8: Sequence[Frames]) -> None:
    """All flat colours as they came back, in rows of five."""
    side = 24
    columns = 5
    rows = math.ceil(len(frames_u8) / columns)
    canvas = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for index, frame_u8 in enumerate(frames_u8):
        top, left = index // columns * side, index % columns * side
        canvas[top : top + side, left : left + side] = fit_frame(frame_u8, side, side, "stretch")
    axes.imshow(canvas)


def _name_row(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
