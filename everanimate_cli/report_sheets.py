"""The pictures of a report: players, and frames at joins, minute by minute, and the worst ones."""

from __future__ import annotations

import base64
import math
import mimetypes
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from everanimate_cli.chunks import driving_index
from everanimate_cli.report_curves import clock
from everanimate_cli.report_frames import DIFFERENCE_GAIN, read_strip
from everanimate_cli.report_markup import Html, element, escaped, joined, start_tag, table
from everanimate_cli.report_tables import LABELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from everanimate_cli.report_frames import FilmStrip, Thumbnail
    from everanimate_cli.report_tables import Method

# Of one video, and of all together: browsers become slow, and Firefox refuses, above 32 MB each.
EMBED_LIMIT_BYTES: Final = 12 * 2**20
EMBED_ALL_BYTES: Final = 48 * 2**20
_BASE64_PIECE_BYTES = 3 * 2**16  # divisible by 3, so that pieces need no padding between them

# Limits of what is shown, so that the page of an hour is as large as that of some minutes.
MAX_VIDEOS: Final = 12
FIRST_JOINS: Final = 4
WORST_JOINS: Final = 4
MAX_MINUTES: Final = 12
_LEAST_MINUTES = 2  # of each of several samples
MAX_WORST_FRAMES: Final = 24

SECTIONS: Final = {
    "videos": "Videos",
    "joins": "Chunk joins",
    "minutes": "Minute by minute",
    "worst": "Worst frames",
}
_NO_VIDEO: Final = "No video file was given."
_S_PER_MINUTE = 60
_SHEET_COLUMNS = 6
_SHEET_STEP_S = 10.0
_SHORT_S = 30.0  # shorter videos are sampled more densely than every ten seconds
_TINY_PX = 160  # smaller pictures are enlarged without smoothing


@dataclass(frozen=True)
class Sample:
    """Videos that show the same dance, with what they are compared with.

    Attributes:
        name: Of the sample; None outside a test set.
        methods: The videos.
        truth: Video of the truth.
        poses: Video of the driving poses.
    """

    name: str | None
    methods: Sequence[Method]
    truth: Path | None
    poses: Path | None

    @property
    def seconds(self) -> float:
        """Length of the longest video."""
        return max(method.seconds for method in self.methods)

    @property
    def prefix(self) -> str:
        """What stands before the names of its tables."""
        return "" if self.name is None else f"{self.name}: "

    def truth_at(self, index: int) -> int | None:
        """The frame of the truth beside a frame of the first video; None where there is none."""
        counts = [method.facts.get("compared_frames") for method in self.methods]
        return index if index < max(count or math.inf for count in counts) else None

    def pose_at(self, index: int) -> int:
        """The frame of the driving that a frame of the first video follows."""
        facts = self.methods[0].facts
        extend = facts.get("extend")
        return index if extend is None else driving_index(index, facts["driving_frames"], extend)

    @property
    def others(self) -> dict[str, Path]:
        """Videos beside those that were measured, by what they are."""
        found = {"truth": self.truth, "driving pose": self.poses}
        return {name: path for name, path in found.items() if path is not None}


def list_samples(
    methods: Sequence[Method], truth: Path | None, driving: Path | None
) -> list[Sample]:
    """The videos by what they show.

    Args:
        methods: All videos.
        truth: Of all of them; the entries of a test set name their own.
        driving: Likewise, a folder with `pose.mp4` or a video.

    Returns:
        As many samples as make `MAX_VIDEOS`, at least one unless there is no video.
    """
    by_name: defaultdict[str | None, list[Method]] = defaultdict(list)
    for method in methods:
        by_name[method.facts.get("sample")].append(method)
    samples: list[Sample] = []
    for name, members in by_name.items():
        if samples and sum(len(s.methods) for s in samples) + len(members) > MAX_VIDEOS:
            break
        own_truth, own_driving = truth, driving
        if name is not None:
            own_truth = truth or _named(members[0], "truth")
            own_driving = driving or _named(members[0], "driving")
        if own_driving is not None and own_driving.is_dir():
            own_driving /= "pose.mp4"
        samples.append(Sample(name, members, own_truth, own_driving))
    return samples


def _named(method: Method, what: str) -> Path | None:
    """A file or folder that the entry of a test set names, if it is still there."""
    path = method.facts.get(what)
    return Path(path) if path is not None and Path(path).exists() else None


def picture_sections(
    samples: Sequence[Sample], num_videos: int, players: Players | None
) -> Iterator[str]:
    """Players and sheets; each video is read once for its player and once for all sheets.

    Args:
        samples: What is shown.
        num_videos: How many were measured.
        players: Where videos are embedded; None for sheets alone.

    Raises:
        MediaError: If a video cannot be read.
    """
    num_shown = sum(len(sample.methods) for sample in samples)
    some = element("p", f"Here and below {num_shown} of {num_videos} videos are shown.")
    some = some if num_shown < num_videos else Html()
    if players is not None:
        yield element("h2", SECTIONS["videos"], id="videos")
        yield some
        yield from _video_section(samples, players)
    max_minutes = _count_minutes(samples)
    reels = [_read_reel(sample, max_minutes, players is not None) for sample in samples]
    yield element("h2", SECTIONS["joins"], id="joins")
    if players is None:
        yield some
    yield element(
        "p",
        "The last frames of one chunk and the first ones of the next. A good join cannot be seen: "
        "what changes at it is movement only.",
    )
    for reel in reels:
        yield from _join_sheets(reel)
    yield element("h2", SECTIONS["minutes"], id="minutes")
    for reel in reels:
        yield from _minute_sheets(reel)
    yield element("h2", SECTIONS["worst"], id="worst")
    for reel in reels:
        yield from _worst_sheets(reel)


# --- players -------------------------------------------------------------------------------------


@dataclass
class Players:
    """Video elements, embedded as long as there is room.

    Attributes:
        page: Where the page will be; linked files are found from there.
        limit_bytes: Of one embedded video.
        embedded_bytes: Of all so far.
    """

    page: Path
    limit_bytes: int
    embedded_bytes: int = 0

    def figure(self, title: str, name: str, video: Path, poster: Thumbnail) -> Iterator[str]:
        """A player in pieces, so that no video is in memory as a whole.

        Args:
            title: Above the player.
            name: The same in words.
            video: File.
            poster: Shown until it plays, and on paper.
        """
        size = video.stat().st_size
        embed = size <= self.limit_bytes and self.embedded_bytes + size <= EMBED_ALL_BYTES
        link = self._address(video)
        yield start_tag("figure")
        yield element("figcaption", title)
        # The source is the last attribute and goes on below.
        yield start_tag(
            "video",
            controls=True,
            muted=True,
            playsinline=True,
            preload="metadata",
            poster=poster.uri,
            width=poster.width,
            height=poster.height,
            class_=_tiny(poster),
            aria_label=f"Video: {name}",
        ).removesuffix(">")
        if embed:
            self.embedded_bytes += size
            kind = mimetypes.guess_type(video.name)[0] or "video/mp4"
            yield Html(f' src="data:{kind};base64,')
            with video.open("rb") as file:
                while piece := file.read(_BASE64_PIECE_BYTES):
                    yield base64.b64encode(piece).decode("ascii")
        else:
            yield Html(f' src="{escaped(link)}')
        yield joined(Html('">'), "This browser cannot play the video.", Html("</video>"))
        megabytes = f"{size / 1e6:.1f} MB"
        if embed:
            told = escaped(f"{video.name}, {megabytes}, part of this page")
        else:
            told = joined(
                f"{megabytes}, too large for this page: it plays ",
                element("a", video.name, href=link),
                ", which must stay where it is",
            )
        yield element("p", element("small", told))
        yield Html("</figure>")

    def _address(self, video: Path) -> str:
        """Where the video is as seen from the page."""
        try:
            relative = Path(os.path.relpath(video, self.page.parent)).as_posix()
        except ValueError:  # on another drive (Windows)
            return video.absolute().as_uri()
        # A colon in the first part would make it an address of its own kind.
        return quote(os.fsencode(relative), safe="/")


def _video_section(samples: Sequence[Sample], players: Players) -> Iterator[str]:
    shown = [
        [
            *((m.title(), m.name, m.video) for m in sample.methods if m.video is not None),
            *((escaped(f"{sample.prefix}{n}"), n, path) for n, path in sample.others.items()),
        ]
        for sample in samples
    ]
    if not any(shown):
        yield element("p", _NO_VIDEO)
        return
    buttons = (
        element("button", text, type="button", data_action=action)
        for action, text in (("play", "Play all"), ("pause", "Pause all"), ("start", "To start"))
    )
    yield element("div", *buttons, class_="together", hidden=True)
    yield start_tag("div", class_="players")
    for title, name, video in (player for of_sample in shown for player in of_sample):
        poster = read_strip(video, [0]).frames[0]
        yield from players.figure(title, name, video, poster)
    yield Html("</div>")


# --- sheets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reel:
    """All pictures of a sample.

    Attributes:
        sample: What they show.
        minutes: Moments of each minute that is shown [s].
        joins: By video, the joins that are shown and what is special about each.
        worst: By video, the worst frames and what was found in each.
        strips: By video.
        others: Of truth and driving poses, numbered as the first video is.
        has_players: Whether a moment can be played.
    """

    sample: Sample
    minutes: Sequence[Sequence[float]]
    joins: Mapping[str, Mapping[int, str]]
    worst: Mapping[str, Mapping[int, Sequence[str]]]
    strips: Mapping[str, FilmStrip]
    others: Mapping[str, FilmStrip]
    has_players: bool


def _read_reel(sample: Sample, max_minutes: int, has_players: bool) -> _Reel:
    minutes = _minutes(sample.seconds, max_minutes)
    moments_s = [moment_s for minute in minutes for moment_s in minute]
    joins = {method.name: _joins_shown(method) for method in sample.methods}
    worst = {method.name: _worst_shown(method) for method in sample.methods}
    strips = {
        method.name: read_strip(
            method.video,
            {join + step for join in joins[method.name] for step in (-2, -1, 0, 1)}
            | set(worst[method.name]),
            moments_s=moments_s,
            changes=joins[method.name],
        )
        for method in sample.methods
        if method.video is not None
    }
    first = sample.methods[0]
    worst_s = [frame / method.fps for method in sample.methods for frame in worst[method.name]]
    others = {
        name: read_strip(
            path,
            moments_s=[*moments_s, *worst_s] if name == "truth" else moments_s,
            # As they were compared: at the rate of the video, from where its first frame lies.
            rate=first.fps,
            start_s=first.facts.get("truth_start_s" if name == "truth" else "start_s"),
            follows=sample.truth_at if name == "truth" else sample.pose_at,
        )
        for name, path in sample.others.items()
    }
    return _Reel(sample, minutes, joins, worst, strips, others, has_players)


def _joins_shown(method: Method) -> dict[int, str]:
    """The joins to show and what is special about each: the first few and the worst."""
    sizes = _join_sizes(method)
    worst = sorted(sizes, key=lambda join: -sizes[join])[:WORST_JOINS]
    shown = sorted({*method.joins[:FIRST_JOINS], *worst})
    ranks = {join: "worst" if rank == 1 else f"worst {rank}" for rank, join in enumerate(worst, 1)}
    return {join: ranks.get(join, "") for join in shown}


def _join_sizes(method: Method) -> dict[int, float]:
    """How large the step at each join is, where that was measured."""
    per_frame = method.metric("seam").get("per_frame") or []
    values = {join: per_frame[join] for join in method.joins if join < len(per_frame)}
    return {join: value for join, value in values.items() if value is not None}


def _join_sheets(reel: _Reel) -> Iterator[str]:
    for method in reel.sample.methods:
        strip, shown = reel.strips.get(method.name), reel.joins[method.name]
        yield element("h3", method.title())
        if not method.joins:
            yield element("p", "One chunk only, or chunks were not known.")
        elif strip is None:
            yield element("p", _NO_VIDEO)
        else:
            if len(shown) < len(method.joins):
                yield element("p", f"The first and the worst of {len(method.joins)} joins.")
            yield _join_table(method, shown, strip, has_players=reel.has_players)


def _join_table(
    method: Method, shown: Mapping[int, str], strip: FilmStrip, *, has_players: bool
) -> Html:
    sizes = _join_sizes(method)
    numbers = {join: number for number, join in enumerate(method.joins, 1)}
    columns = ("Join", "2 before", "1 before", f"change x{DIFFERENCE_GAIN}", "first", "second")
    rows = []
    for join, rank in shown.items():
        where = f"{method.name}, join {numbers[join]}"
        pictures = (
            (strip.frames.get(join - 2), f"{where}: two frames before"),
            (strip.frames.get(join - 1), f"{where}: last frame before"),
            (strip.changes.get(join), f"{where}: what changes, amplified {DIFFERENCE_GAIN} times"),
            (strip.frames.get(join), f"{where}: first frame"),
            (strip.frames.get(join + 1), f"{where}: second frame"),
        )
        head = [f"{numbers[join]} ", element("span", rank, class_="flag") if rank else ""]
        moment = _seek(join / method.fps, has_players=has_players)
        head += [element("br"), moment, element("br")]
        head += [element("small", f"frame {join}")]
        if join in sizes:
            head += [element("br"), element("small", f"step {sizes[join]:.3g}")]
        cells = (_cell(picture, alt) for picture, alt in pictures)
        rows.append(element("tr", element("th", *head, scope="row"), *cells))
    return table(f"Joins of {method.name}", columns, [element("tbody", *rows)], class_="sheet")


def _count_minutes(samples: Sequence[Sample]) -> int:
    """How many minutes of each sample there is room for."""
    return max(_LEAST_MINUTES, MAX_MINUTES // len(samples)) if len(samples) > 1 else MAX_MINUTES


def _minutes(longest_s: float, max_minutes: int) -> list[list[float]]:
    """Moments of each minute to show [s]; if there are too many minutes, evenly spread ones."""
    num_minutes = max(1, math.ceil(longest_s / _S_PER_MINUTE))
    num_shown = min(num_minutes, max_minutes)
    gaps = max(1, num_shown - 1)
    numbers = [round(index * (num_minutes - 1) / gaps) for index in range(num_shown)]
    step_s = _SHEET_STEP_S if longest_s >= _SHORT_S else longest_s / _SHEET_COLUMNS
    minutes = (
        [_S_PER_MINUTE * number + column * step_s for column in range(_SHEET_COLUMNS)]
        for number in numbers
    )
    return [[moment for moment in minute if moment < longest_s or not moment] for minute in minutes]


def _minute_sheets(reel: _Reel) -> Iterator[str]:
    sample = reel.sample
    num_minutes = math.ceil(sample.seconds / _S_PER_MINUTE)
    if len(reel.minutes) < num_minutes:
        shown = f"{len(reel.minutes)} of {num_minutes} minutes are shown, evenly spread."
        yield element("p", sample.prefix, shown)
    rows = [(escaped(name), name, strip) for name, strip in reel.others.items()]
    rows += [
        (method.title(), method.name, reel.strips[method.name])
        for method in sample.methods
        if method.name in reel.strips
    ]
    if not rows:
        yield element("p", sample.prefix, _NO_VIDEO)
        return
    for minute in reel.minutes:
        lines = []
        for title, name, strip in rows:
            cells = (
                _cell(
                    strip.frames.get(strip.index_at(moment_s)),
                    f"{name} at {clock(moment_s, sample.seconds)}",
                )
                for moment_s in minute
            )
            lines.append(element("tr", element("th", title, scope="row"), *cells))
        number = int(minute[0] // _S_PER_MINUTE) + 1
        moments = (_seek(moment_s, has_players=reel.has_players) for moment_s in minute)
        heads = ["Video", *moments]
        caption = f"{sample.prefix}Minute {number}"
        yield table(caption, heads, [element("tbody", *lines)], class_="sheet")


def _worst_shown(method: Method) -> dict[int, list[str]]:
    """What was found in each of the worst frames, in the order of the evaluation."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for entry in method.facts["worst_frames"]:
        name, unit = entry["metric"], method.metric(entry["metric"]).get("unit", "")
        label = LABELS.get(name, name)
        found[int(entry["frame"])].append(f"{label} {float(entry['value']):.4g} {unit}".rstrip())
    return dict(list(found.items())[:MAX_WORST_FRAMES])


def _worst_sheets(reel: _Reel) -> Iterator[str]:
    truth = reel.others.get("truth")
    columns = ("Frame", "Measured", "Made", *(["Truth"] if truth is not None else []))
    for method in reel.sample.methods:
        yield element("h3", method.title())
        strip, worst = reel.strips.get(method.name), reel.worst[method.name]
        if strip is None or not worst:
            yield element("p", _NO_VIDEO if strip is None else "None was named.")
            continue
        rows = []
        for frame, measured in worst.items():
            time_s = frame / method.fps
            moment = _seek(time_s, has_players=reel.has_players)
            head = element("th", str(frame), element("br"), moment, scope="row")
            lines = [part for text in measured for part in (text, element("br"))][:-1]
            cells = [_cell(strip.frames.get(frame), f"{method.name}, frame {frame}", "wide")]
            if truth is not None:
                there = truth.frames.get(truth.index_at(time_s))
                cells.append(_cell(there, f"truth at frame {frame} of {method.name}", "wide"))
            rows.append(element("tr", head, element("td", *lines), *cells))
        caption = f"Worst frames of {method.name}"
        yield table(caption, columns, [element("tbody", *rows)], class_="sheet")


def _seek(time_s: float, *, has_players: bool) -> Html:
    """A moment; where there are players, a link that also takes them to it."""
    text = f"{time_s:.2f}".rstrip("0").rstrip(".") + " s"
    if not has_players:
        return escaped(text)
    return element("a", text, href="#videos", data_seek_s=f"{time_s:.3f}")


def _cell(picture: Thumbnail | None, alt: str, class_: str | None = None) -> Html:
    if picture is None:
        return element("td", element("span", "no such frame", class_="quiet"), class_=class_)
    return element("td", image(picture, alt), class_=class_)


def image(picture: Thumbnail, alt: str) -> Html:
    """An `img` element that holds its picture.

    Args:
        picture: What to show.
        alt: The same in words.
    """
    return element(
        "img",
        src=picture.uri,
        alt=alt,
        width=picture.width,
        height=picture.height,
        class_=_tiny(picture),
    )


def _tiny(picture: Thumbnail) -> str | None:
    return "tiny" if max(picture.width, picture.height) < _TINY_PX else None
