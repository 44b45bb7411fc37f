"""Read a video by time.

Frames are RGB uint8 `[S, H, W, 3]`, upright and with square pixels. Memory does not grow with the
length of a video: of the whole file only the time stamps are kept.
"""

# PyAV's `Packet` takes a type argument in its stubs only, so annotations must not be evaluated.
from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import (
    VideoReformatter,
)
from av.video.stream import VideoStream

from everanimate_cli.containers import (
    DamagedError,
    TornError,
    intact_packets,
    open_container,
    video_stream,
)
from everanimate_cli.errors import MediaError, SettingsError
from everanimate_cli.images import Frames, check_media_file

Ticks = npt.NDArray[np.int64]

# Rates are fractions that fit MP4's 32-bit time scale: 30000/1001 stays exact.
_MIN_RATE = Fraction(1, 1000)
_MAX_RATE = Fraction(1000)
_MAX_RATE_DENOMINATOR = 100_000

# Decoded frames that are kept from one call of `VideoReader.read` to the next, since neighbouring
# chunks share a few (4 in the released setting, 5 at most in pixel mode).
_NUM_CACHED_FRAMES = 8

# Jumping to a key frame pays only if it saves decoding at least this many frames.
_NUM_FRAMES_WORTH_A_SEEK = 16

# Key frames to try, backwards, before decoding from the start.
_NUM_SEEKS = 4

# Of two frames, one that is nearer by no more than this is not nearer [s].
_TIE_S = 4e-10

# A file has a constant rate if no frame is this far from its place [frames].
_HALF_A_FRAME = 0.5


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video is like when it is played.

    Attributes:
        height: Height after rotation [pixels].
        width: Width after rotation and with square pixels [pixels].
        rate: Average frames per second; exact if the rate is constant.
        num_frames: Frames that can be shown.
        duration_s: From the first frame to the end of the last one [s].
        rotation: Degrees counter-clockwise by which the stored picture is turned: 0, 90, 180, 270.
    """

    height: int
    width: int
    rate: Fraction
    num_frames: int
    duration_s: float
    rotation: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When each frame of a file is shown.

    Attributes:
        times: [N] time stamps, rising [ticks].
        end: End of the last frame [ticks].
        time_base: Seconds per tick.
    """

    times: Ticks
    end: int
    time_base: Fraction

    @property
    def duration_s(self) -> Fraction:
        """From the first frame to the end of the last one [s]."""
        return (self.end - int(self.times[0])) * self.time_base

    def count_frames(self, rate: Fraction, start_s: float = 0.0, end_s: float | None = None) -> int:
        """How many frames of an even rate fit between two times.

        Args:
            rate: Frames per second.
            start_s: Begin after the first frame [s].
            end_s: End after the first frame [s]; None for the end of the last frame.

        Returns:
            floor(duration * rate + 1e-6); 0 for less than one frame.

        Source: pose page section 6.
        """
        stop_s = self.duration_s if end_s is None else min(self.duration_s, Fraction(end_s))
        return max(0, int((stop_s - Fraction(start_s)) * rate + Fraction(1, 1_000_000)))

    def nearest_frames(self, rate: Fraction, num_frames: int, start_s: float = 0.0) -> Ticks:
        """Which frame is nearest in time to each frame of an even rate.

        Args:
            rate: Frames per second.
            num_frames: Length of the result.
            start_s: Time of its first frame after the file's first frame [s].

        Returns:
            [num_frames] positions in `times`; of two frames equally near, the even position if the
            result begins with the file, else the later one.

        Source: pose page section 6, by time stamps; `frame_sampling_cases` of `pose_golden.json`.
        Differs from it where the start lies half-way between two frames: at the file's own rate
        every frame is a tie then, and even positions would show every other frame twice.
        """
        # The floating-point steps of the released code in their order, so that ties fall alike.
        wanted = np.arange(num_frames) / float(rate) * float(1 / self.time_base)
        since_first = self.times - self.times[0]
        middles = (since_first[:-1] + since_first[1:]) / 2  # [N - 1]
        if start_s:
            wanted += float(Fraction(start_s) / self.time_base)
            # Rounding must not let ties fall to either side.
            wanted += _TIE_S / self.time_base
            return np.searchsorted(middles, wanted, side="right").astype(np.int64)
        lower = np.searchsorted(middles, wanted, side="left")
        upper = np.searchsorted(middles, wanted, side="right")
        return np.where(lower % 2 == 0, lower, upper).astype(np.int64)


def as_rate(rate: Fraction | float) -> Fraction:
    """A frame rate as a fraction that video files can store.

    Args:
        rate: Frames per second, 0.001 to 1000.

    Returns:
        The nearest fraction with a denominator of at most 100000.

    Raises:
        SettingsError: If the rate is out of range.
    """
    # Written so that NaN is refused too.
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise SettingsError(f"frame rate {float(rate):g} is out of range. Use 0.001 to 1000.")
    return Fraction(rate).limit_denominator(_MAX_RATE_DENOMINATOR)


def first_frame_s(path: Path) -> Fraction:
    """Time stamp of a video's first frame [s], however torn the rest of the file is.

    Raises:
        MediaError: If the file cannot be read as a video.
    """
    return _examine(path).start_s


class VideoReader:
    """Frames of a video at an even rate, in any order, with bounded memory.

    Colours: the matrix and range that a frame is tagged with are used; an untagged frame counts as
    BT.601, limited range, which is what FFmpeg and with it decord and OpenCV assume. Only the
    matrix is applied: HDR transfer curves are not tone-mapped.

    Attributes:
        info: Facts of the whole file.
        rate: Frames per second of the timeline.
    """

    info: VideoInfo
    rate: Fraction

    def __init__(
        self,
        path: Path,
        *,
        rate: Fraction | float | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        transform: Callable[[Frames], Frames] | None = None,
    ) -> None:
        """Open a video and lay out its timeline.

        Args:
            path: Video file; a picture counts as a video of one frame.
            rate: Frames per second of the timeline; None for the file's average rate, which keeps
                every frame exactly once if the file's rate is constant.
            start_s: Begin of the timeline after the first frame [s].
            end_s: End of the timeline after the first frame [s].
            transform: Applied to each frame [H, W, 3] as soon as it is decoded, so that a call
                holds small frames only; for example `fit_frame` to the canvas. All results must
                have one shape.

        Raises:
            MediaError: If the file is missing, empty, damaged or has no video stream.
            SettingsError: If the rate is out of range or the time range is empty.
        """
        examined = _examine(path)
        if examined.damaged_s is not None and (end_s is None or end_s > examined.damaged_s):
            raise DamagedError(path, examined.damaged_s)
        begin_s = 0.0 if start_s is None else start_s
        timeline = examined.timeline
        if not 0 <= begin_s < timeline.duration_s:
            raise SettingsError(
                f"start {begin_s:g} s is not within {path}, which lasts "
                f"{float(timeline.duration_s):.3f} s."
            )
        if end_s is not None and end_s <= begin_s:
            raise SettingsError(f"end {end_s:g} s is not after start {begin_s:g} s.")
        self.info = examined.info
        self.rate = examined.info.rate if rate is None else as_rate(rate)
        # What is shorter than one frame of the timeline, such as a picture, still shows one.
        num_frames = max(1, timeline.count_frames(self.rate, begin_s, end_s))
        self._sampled = timeline.nearest_frames(self.rate, num_frames, begin_s)
        self._decoder = _Decoder(path, examined)
        self._transform = transform
        self._cached: dict[int, Frames] = {}
        self._lock = Lock()  # one thread reads ahead, another may read again

    def __len__(self) -> int:
        """Number of frames on the timeline, at least 1."""
        return len(self._sampled)

    def __enter__(self) -> Self:
        """The reader itself; the file is opened by the first `read`."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file and forget the cached frames."""
        self._cached = {}
        self._decoder.close()

    def read(self, indices: Sequence[int]) -> Frames:
        """Frames of the timeline, in the order asked for; threads wait for one another.

        A run that goes on where the last one ended costs one decode per frame. Going back costs
        decoding from the key frame before the earliest frame of the call, once per call whatever
        the order within it: ask for a falling run in one call.

        Args:
            indices: [S] positions on the timeline, in any order, repeats allowed.

        Returns:
            [S, H, W, 3] uint8 RGB.

        Raises:
            IndexError: If a position is not on the timeline.
            MediaError: If a frame cannot be decoded.
        """
        positions = np.asarray(indices, np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {len(self)}")
        with self._lock:
            return self._read(positions)

    def _read(self, positions: Ticks) -> Frames:
        wanted = self._sampled[positions]  # [S] frame numbers in the file
        kept = set(list(dict.fromkeys(wanted[::-1].tolist()))[:_NUM_CACHED_FRAMES])
        cached: dict[int, Frames] = {}
        frames: Frames | None = None
        for number in np.unique(wanted).tolist():
            frame = self._cached.get(number)
            if frame is None:
                frame = self._transformed(self._decoder.decode(number))
            if number in kept:
                cached[number] = frame
            if frames is None:
                frames = np.empty((len(wanted), *frame.shape), np.uint8)
            frames[wanted == number] = frame
        if frames is None:
            black = np.zeros((self.info.height, self.info.width, 3), np.uint8)
            return np.empty((0, *self._transformed(black).shape), np.uint8)
        self._cached = cached
        return frames

    def _transformed(self, frame_u8: Frames) -> Frames:
        return frame_u8 if self._transform is None else self._transform(frame_u8)


@dataclass(frozen=True, kw_only=True)
class _Examined:
    """What one pass over a file tells.

    Attributes:
        info: Facts for the caller.
        timeline: When each frame is shown; exact steps if the rate is constant, since containers
            with coarse ticks (Matroska: 1 ms) cannot store them.
        keys: [N] what identifies a decoded frame: its time stamp, or its position if `by_order`.
        key_frames: [K] time stamps at which decoding can start, rising.
        by_order: The container has no usable time stamps, so frames are counted instead.
        start_s: Time stamp of the first frame in the file [s].
        damaged_s: Time after the first frame from which the file is torn [s]; None if it is whole.
    """

    info: VideoInfo
    timeline: Timeline
    keys: Ticks
    key_frames: Ticks
    by_order: bool
    start_s: Fraction
    damaged_s: float | None


@dataclass(frozen=True, kw_only=True)
class _PacketTimes:
    """Time stamps of a stream's packets.

    Attributes:
        times: [N] presentation times of the frames that are shown, rising [ticks].
        key_frames: [K] presentation times at which decoding can start, rising [ticks]. Some may
            lie before the first frame that is shown, if an edit list starts inside a group.
        last_duration: Duration of the frame that is shown last [ticks]; 0 if unknown.
        complete: Whether every packet has a time.
        damaged: Time before which every frame is in the file [ticks]; None if it is whole.
    """

    times: Ticks
    key_frames: Ticks
    last_duration: int
    complete: bool
    damaged: int | None


def _examine(path: Path) -> _Examined:
    """Read all time stamps and the first frame; without time stamps decode every frame."""
    check_media_file(path, "video")
    with open_container(path) as container:
        stream = video_stream(container, path)
        packets = _packet_times(container, stream)
        time_base = stream.time_base or Fraction(1, 1000)
        stated_rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
        sample_aspect = stream.sample_aspect_ratio or Fraction(1)
    first = _first_frame(path)
    by_order = first.pts is None or not packets.complete
    if first.pts is None or by_order:
        times, damaged = _decoded_times(path, stated_rates, time_base)
    else:
        # Frames before the first one that decodes lean on pictures that were cut off.
        times = np.unique(packets.times[packets.times >= first.pts])
        damaged = packets.damaged
        if not len(times):
            raise DamagedError(path, 0)
    start = int(times[0])
    if damaged is not None:
        times = times[: max(1, int(np.searchsorted(times, damaged)))]
    last_duration = packets.last_duration or _usual_step(times, stated_rates, time_base)
    timeline = Timeline(times=times, end=int(times[-1]) + last_duration, time_base=time_base)
    rate = _constant_rate(timeline, stated_rates)
    if rate is None:
        average = len(times) / timeline.duration_s
        rate = as_rate(min(max(average.limit_denominator(1001), _MIN_RATE), _MAX_RATE))
    else:
        # Not simply one step after the last frame, which may be a still that lasts longer.
        end = max(len(times), round(timeline.duration_s * rate))
        timeline = Timeline(times=np.arange(len(times)), end=end, time_base=1 / rate)
    rotation = 90 * (round(first.rotation / 90) % 4)
    height, width = first.height, max(1, round(first.width * sample_aspect))
    if rotation in {90, 270}:
        height, width = width, height
    return _Examined(
        info=VideoInfo(
            height=height,
            width=width,
            rate=rate,
            num_frames=len(times),
            duration_s=float(timeline.duration_s),
            rotation=rotation,
        ),
        timeline=timeline,
        keys=np.arange(len(times)) if by_order else times,
        key_frames=packets.key_frames,
        by_order=by_order,
        start_s=start * time_base,
        damaged_s=None if damaged is None else float(max(0, damaged - start) * time_base),
    )


def _packet_times(container: InputContainer, stream: VideoStream) -> _PacketTimes:
    """Collect the time stamps of a stream without decoding it."""
    times, key_frames = array("q"), array("q")
    latest, last_duration, complete = None, 0, True
    sure: int | None = None
    damaged = None
    try:
        for packet in intact_packets(container, stream):
            if packet.pts is None:
                complete = False
                continue
            if packet.is_keyframe:
                key_frames.append(packet.pts)
            # A later packet is decoded later, so it cannot be shown before this time. Matroska does
            # not know it of the first few packets.
            if packet.dts is not None or sure is None:
                sure = (packet.pts if packet.dts is None else packet.dts) + (packet.duration or 0)
            if packet.is_discard:
                continue
            times.append(packet.pts)
            if latest is None or packet.pts > latest:
                latest, last_duration = packet.pts, packet.duration or 0
    except TornError:
        damaged = sure or 0
    return _PacketTimes(
        times=np.sort(np.asarray(times, np.int64)),
        key_frames=np.unique(np.asarray(key_frames, np.int64)),
        last_duration=last_duration,
        complete=complete,
        damaged=damaged,
    )


def _first_frame(path: Path) -> VideoFrame:
    """The first frame that decodes."""
    with open_container(path) as container:
        try:
            for frame in container.decode(video_stream(container, path)):
                return frame
        except av.error.FFmpegError as error:
            raise DamagedError(path, 0) from error
    raise MediaError(f"{path} has a video stream without frames. Give another video file.")


def _decoded_times(
    path: Path, stated_rates: Sequence[Fraction], time_base: Fraction
) -> tuple[Ticks, int | None]:
    """Times of all frames [N] by decoding them, and from where the file is damaged if it is.

    Times that the decoder does not know, or that run backwards, become even steps.
    """
    stamps = array("q")
    rising, damaged = True, False
    with open_container(path) as container:
        stream = video_stream(container, path)

        def frames() -> Iterator[VideoFrame]:
            for packet in intact_packets(container, stream):
                yield from packet.decode()
            # Only now: of a torn file the decoder holds frames that others should have preceded.
            yield from stream.decode(None)

        try:
            for frame in frames():
                stamp = -1 if frame.pts is None else frame.pts
                rising = rising and frame.pts is not None and (not stamps or stamp > stamps[-1])
                stamps.append(stamp)
        except (av.error.FFmpegError, TornError):
            damaged = True
    if not stamps:
        raise DamagedError(path, 0)
    times = np.asarray(stamps, np.int64)
    if not rising:
        times = np.arange(len(stamps)) * _usual_step(times[:1], stated_rates, time_base)
    if not damaged:
        return times, None
    return times, int(times[-1]) + _usual_step(times, stated_rates, time_base)


def _usual_step(times: Ticks, stated_rates: Sequence[Fraction], time_base: Fraction) -> int:
    """Ticks from one frame to the next where no duration is stored."""
    if len(times) > 1:
        return int(np.median(np.diff(times)))
    rate = stated_rates[0] if stated_rates else Fraction(25)
    return max(1, round(1 / (rate * time_base)))


def _constant_rate(timeline: Timeline, stated_rates: Sequence[Fraction]) -> Fraction | None:
    """The rate at which every frame is less than half a frame from its place, if there is one."""
    num_frames = len(timeline.times)
    since_first = timeline.times - timeline.times[0]
    candidates = list(stated_rates)
    if num_frames > 1:
        measured = (num_frames - 1) / (int(since_first[-1]) * timeline.time_base)
        candidates += [measured.limit_denominator(1001), measured]
    candidates.append(num_frames / timeline.duration_s)
    for rate in candidates:
        if _MIN_RATE <= rate <= _MAX_RATE:
            places = since_first * float(timeline.time_base * rate)
            if np.abs(places - np.arange(num_frames)).max() < _HALF_A_FRAME:
                return as_rate(rate)
    return None


class _Decoder:
    """Decodes single frames of a file by their number, cheapest in rising order."""

    def __init__(self, path: Path, examined: _Examined) -> None:
        self._path = path
        self._examined = examined
        self._reformatter = VideoReformatter()
        self._container: InputContainer | None = None
        self._frames: Iterator[tuple[int, VideoFrame]] = iter(())
        self._last_key: int | None = None

    def close(self) -> None:
        """Close the file; the next `decode` opens it again."""
        self._frames = iter(())
        self._last_key = None
        if self._container is not None:
            self._container.close()
            self._container = None

    def decode(self, number: int) -> Frames:
        """Frame `number` of the file [H, W, 3], upright and with square pixels."""
        key = int(self._examined.keys[number])
        try:
            if not self._continues_to(key):
                self._seek(key)
            frame = self._next_frame(key)
        except av.error.FFmpegError:
            frame = None
        if frame is None or frame.is_corrupt:
            frame = self._decode_from_start(number)
        return self._to_upright_rgb(frame)

    def _decode_from_start(self, number: int) -> VideoFrame:
        """Second try for a frame that a jump may have lost.

        A stream that refreshes its picture bit by bit shows nothing for a while after a jump, and
        some containers cannot jump at all.
        """
        self._start()
        cause = None
        try:
            frame = self._next_frame(int(self._examined.keys[number]))
        except av.error.FFmpegError as error:
            frame, cause = None, error
        if frame is None or frame.is_corrupt:
            self.close()
            times = self._examined.timeline.times
            ticks = int(times[number]) - int(times[0])
            time_s = float(ticks * self._examined.timeline.time_base)
            raise DamagedError(self._path, time_s) from cause
        return frame

    def _next_frame(self, key: int) -> VideoFrame | None:
        """Decode up to the frame `key`; None if the decoder leaves it out."""
        for found_key, frame in self._frames:
            self._last_key = found_key
            if found_key >= key:
                return frame if found_key == key else None
        return None

    def _continues_to(self, key: int) -> bool:
        """Whether going on from the last frame is the cheapest way to the frame `key`."""
        if self._last_key is None or self._last_key >= key:
            return False
        key_frames = self._key_frames_up_to(key)
        if self._examined.by_order or not len(key_frames):
            return True
        reached, jump = np.searchsorted(self._examined.keys, [self._last_key, key_frames[-1]])
        return bool(jump - reached < _NUM_FRAMES_WORTH_A_SEEK)

    def _key_frames_up_to(self, key: int) -> Ticks:
        """Times at or before `key` at which decoding can start, rising."""
        key_frames = self._examined.key_frames
        return key_frames[: np.searchsorted(key_frames, key, side="right")]

    def _seek(self, key: int) -> None:
        """Arrange that the frame `key` is still to come."""
        if self._container is None or self._examined.by_order:
            container = self._start()
        else:
            container = self._container
        if self._examined.by_order:
            return
        stream = video_stream(container, self._path)
        # A container may land later than asked (MPEG-TS guesses by the bit rate), so go back until
        # decoding can start at a key frame that is not after `key`.
        for key_frame in self._key_frames_up_to(key)[::-1][:_NUM_SEEKS].tolist():
            container.seek(key_frame, stream=stream)
            packets = container.demux(stream)
            first = next((packet for packet in packets if packet.is_keyframe), None)
            if first is not None and first.pts is not None and first.pts <= key:
                self._frames = _timed_frames(chain((first,), packets))
                self._last_key = None
                return
        self._start()

    def _start(self) -> InputContainer:
        """Open the file anew, with its first frame still to come."""
        self.close()
        self._container = open_container(self._path)
        stream = video_stream(self._container, self._path)
        stream.thread_type = "AUTO"
        packets = self._container.demux(stream)
        if self._examined.by_order:
            self._frames = enumerate(frame for packet in packets for frame in packet.decode())
        else:
            self._frames = _timed_frames(packets)
        return self._container

    def _to_upright_rgb(self, frame: VideoFrame) -> Frames:
        """[H, W, 3] uint8 RGB with square pixels and the rotation of the file applied."""
        info = self._examined.info
        height, width = info.height, info.width
        if info.rotation in {90, 270}:
            height, width = width, height
        try:
            rgb = self._reformatter.reformat(
                frame, width=width, height=height, format="rgb24", threads=1
            ).to_ndarray()
        except av.error.FFmpegError as error:
            raise MediaError(
                f"{self._path} has colours that cannot be converted ({error.strerror}). "
                "Convert it to H.264 with BT.709 colours first."
            ) from error
        # PyAV never rotates by itself; its angle is counter-clockwise, as that of `np.rot90`.
        return np.ascontiguousarray(np.rot90(rgb, k=info.rotation // 90), np.uint8)


def _timed_frames(packets: Iterator[Packet[VideoStream]]) -> Iterator[tuple[int, VideoFrame]]:
    """Decode packets to (time, frame)."""
    for packet in packets:
        for frame in packet.decode():
            if frame.pts is not None:
                yield frame.pts, frame
