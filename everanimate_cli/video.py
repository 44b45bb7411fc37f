"""Read a video by time, write one, and join chunk files under the driving video's sound.

Frames are RGB uint8 `[S, H, W, 3]`, upright and with square pixels. Memory does not grow with the
length of a video: of the whole file only the time stamps are kept.
"""

# PyAV's `Packet` takes a type argument in its stubs only, so annotations must not be evaluated.
from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)
from av.video.stream import VideoStream

from everanimate_cli.errors import MediaError, SettingsError
from everanimate_cli.images import Frames, atomic_path, check_media_file
from everanimate_cli.settings import MAX_CRF, Codec

Ticks = npt.NDArray[np.int64]
AudioOutcome = Literal["copied", "re-encoded", "absent"]
Matrix = Literal["bt601", "bt709"]

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

# A file has a constant rate if no frame is this far from its place [frames].
_HALF_A_FRAME = 0.5

# By how many frames x264 and x265 may run ahead of the display: B-frames with one level between.
_REORDER_DELAY = 2

# x265 4.2 reads and writes past its buffers in pictures up to 64 pixels wide: the program crashes,
# or the bytes differ from run to run.
_MIN_H265_SIDE = 128

# Matrix, primaries and transfer curve of a file.
_TAGS = {
    "bt601": (Colorspace.ITU601, ColorPrimaries.SMPTE170M, ColorTrc.SMPTE170M),
    "bt709": (Colorspace.ITU709, ColorPrimaries.BT709, ColorTrc.BT709),
}

# What `VideoWriter` writes.
_JOINED_VIDEO_CODECS = {"h264", "hevc"}

# Sound that MP4 has a registered sample entry for, so that players know it. FFmpeg would put
# Vorbis and plain PCM into MP4 as well, but few other programs play that.
_COPIED_AUDIO_CODECS = {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}

# Rates of AAC that every player knows; other sound is brought to 48 kHz.
_AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}
_AAC_BITS_PER_CHANNEL = 96_000

# Time stamps of sound may be this far from where the samples so far end, because containers round
# them to milliseconds. Beyond it there is a gap that has to stay one.
_AUDIO_JITTER_S = Fraction(1, 50)


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video is like when it is played.

    Attributes:
        height: Height after rotation [pixels].
        width: Width after rotation and with square pixels [pixels].
        rate: Average frames per second; exact if the rate is constant.
        num_frames: Frames that can be shown.
        duration_s: From the first frame to the end of the last one [s].
        start_s: Time stamp of the first frame in the file [s].
        rotation: Degrees counter-clockwise by which the stored picture is turned: 0, 90, 180, 270.
        has_audio: Whether the file has sound in a known format.
        codec: FFmpeg's name of the video format, such as "h264".
    """

    height: int
    width: int
    rate: Fraction
    num_frames: int
    duration_s: float
    start_s: float
    rotation: int
    has_audio: bool
    codec: str


@dataclass(frozen=True, kw_only=True)
class AudioSource:
    """Sound to put under a joined video.

    Attributes:
        path: Video or sound file.
        start_s: Where the sound begins [s], counted from the first frame of the file's video, or
            from the first sound if it has no video.
    """

    path: Path
    start_s: float = 0.0


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
            [num_frames] positions in `times`; of two frames equally near, the even position.

        Source: pose page section 6, by time stamps; golden file `frame_sampling.json`.
        """
        # The floating-point steps of the released code in their order, so that ties fall alike.
        wanted = np.arange(num_frames) / float(rate) * float(1 / self.time_base)
        wanted += float(Fraction(start_s) / self.time_base)
        since_first = self.times - self.times[0]
        middles = (since_first[:-1] + since_first[1:]) / 2  # [N - 1]
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


def probe_video(path: Path) -> VideoInfo:
    """Size, rate, length and further facts of a video, from its time stamps and its first frame.

    Args:
        path: Video file; a picture counts as a video of one frame.

    Returns:
        The facts, as played.

    Raises:
        MediaError: If the file is missing, empty, damaged or has no video stream.
    """
    examined = _examine(path)
    if examined.damaged_s is not None:
        raise DamagedError(path, examined.damaged_s)
    return examined.info


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
        """Frames of the timeline, in the order asked for.

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


class VideoWriter:
    """Encode frames to an MP4 file that appears under its name only when it is whole.

    Colours are converted to limited range and tagged so. The same frames
    and settings give the same bytes: the number of threads is fixed and no date is stored. Groups
    of pictures are closed, so that `join_videos` can put files end to end.
    """

    def __init__(  # noqa: PLR0913 - an encoder's settings, all by keyword
        self,
        path: Path,
        *,
        width: int,
        height: int,
        rate: Fraction | float,
        codec: Codec = "h264",
        crf: int = 18,
        preset: str = "medium",
        threads: int = 1,
        lossless: bool = False,
        matrix: Matrix = "bt709",
    ) -> None:
        """Check the settings; the file is opened by `with`.

        Args:
            path: File to make or replace; its folder must exist.
            width: Width of all frames, even.
            height: Height of all frames, even.
            rate: Frames per second.
            codec: Video format.
            crf: Quality from 0 (best) to 51, on the encoder's own scale.
            preset: The encoder's trade of speed for size, "ultrafast" to "placebo".
            threads: Encoder threads; another number may give other bytes.
            lossless: Full colour resolution without quantisation, whatever `crf` says. Only the
                rounding to YUV remains, at most 2 of 255; few players show such a file.
            matrix: Between RGB and YUV. Readers that ignore the tag, such as OpenCV before 5, take
                "bt601" for granted.

        Raises:
            SettingsError: If a value is out of range.
        """
        if min(width, height) < 1 or width % 2 or height % 2:
            raise SettingsError(
                f"video size {width}x{height} cannot be encoded. Use an even width and height."
            )
        if codec == "h265" and min(width, height) < _MIN_H265_SIDE:
            raise SettingsError(
                f"video size {width}x{height} is too small for h265. "
                f"Use at least {_MIN_H265_SIDE}x{_MIN_H265_SIDE}, or h264."
            )
        if not 0 <= crf <= MAX_CRF:
            raise SettingsError(f"crf {crf} is out of range. Use 0 (best) to {MAX_CRF}.")
        if threads < 1:
            raise SettingsError(f"threads {threads} is out of range. Use at least 1.")
        self._path = path
        self._size = (height, width)
        self._rate = as_rate(rate)
        self._pixel_format = "yuv444p" if lossless else "yuv420p"
        self._codec = codec
        self._matrix: Matrix = matrix
        self._options = {"preset": preset, "crf": "0" if lossless else str(crf)}
        if codec == "h264":
            # x264's macroblock tree (core 165, AVX-512) reads memory that nobody has written in
            # pictures of most widths, so that the bytes would differ from run to run.
            self._options |= {"threads": str(threads), "x264-params": "open-gop=0:mbtree=0"}
        else:
            # x265 prints by itself unless told not to, and opens its groups unless told not to.
            self._options["x265-params"] = (
                f"open-gop=0:frame-threads=1:pools={threads}:info=0:log-level=none"
                f":lossless={int(lossless)}"
            )
        self._num_frames = 0
        self._num_packets = 0
        self._reformatter = VideoReformatter()
        self._stack = ExitStack()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None

    def __enter__(self) -> Self:
        """Open the encoder.

        Raises:
            SettingsError: If the encoder does not know the preset.
            OSError: If the folder cannot be written.
        """
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            self._container = stack.enter_context(_output(temporary))
            self._stream = stream = self._container.add_stream(
                "libx264" if self._codec == "h264" else "libx265",
                rate=self._rate,
                options=self._options,
                height=self._size[0],
                width=self._size[1],
                time_base=1 / self._rate,
            )
            context = stream.codec_context
            context.pix_fmt = self._pixel_format
            context.colorspace, context.color_primaries, context.color_trc = _TAGS[self._matrix]
            context.color_range = ColorRange.MPEG
            _tag_for_players(stream)
            try:
                context.open()
            except av.error.FFmpegError as error:
                raise SettingsError(
                    f"preset {self._options['preset']!r} or size {self._size[1]}x{self._size[0]} "
                    f"was refused by the {self._codec} encoder."
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it after an exception."""
        if exc is not None:
            self._stack.__exit__(exc_type, exc, traceback)
            return
        with self._stack:
            if not self._num_frames:
                raise ValueError(f"no frame was written to {self._path}")
            self._encode(None)

    def write(self, frames_u8: Frames) -> None:
        """Append frames.

        Args:
            frames_u8: [S, H, W, 3] uint8 RGB.

        Raises:
            ValueError: If shape or dtype differ.
            OSError: If the disk is full.
        """
        expected = (*self._size, 3)
        if frames_u8.dtype != np.uint8 or frames_u8.shape[1:] != expected:
            raise ValueError(f"frames {frames_u8.dtype} {frames_u8.shape}, not uint8 {expected}")
        for frame_u8 in frames_u8:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame_u8), format="rgb24")
            # Without a target matrix swscale takes BT.601 whatever the stream is tagged with.
            frame = self._reformatter.reformat(
                frame,
                format=self._pixel_format,
                dst_colorspace=_TAGS[self._matrix][0],
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
            frame.pts = self._num_frames
            frame.time_base = 1 / self._rate
            self._num_frames += 1
            self._encode(frame)

    def _encode(self, frame: VideoFrame | None) -> None:
        """Encode a frame, or with None what the encoder still holds."""
        if self._container is None or self._stream is None:
            raise ValueError("the writer is not open")
        for packet in self._stream.encode(frame):
            # x265 leaves this time undefined in files of one or two frames.
            packet.dts = self._num_packets - _REORDER_DELAY
            packet.duration = 1
            self._num_packets += 1
            self._container.mux(packet)


def join_videos(
    paths: Sequence[Path], output: Path, *, audio: AudioSource | None = None
) -> AudioOutcome:
    """Put files of `VideoWriter` end to end without encoding them again, and add sound.

    Args:
        paths: Parts of one size, rate and encoder setting, each of at least 1 frame.
        output: MP4 file to make or replace; its folder must exist.
        audio: Sound that begins with the first frame. It is cut at the end of the video and, if
            shorter, simply ends; it is never stretched.

    Returns:
        Whether the sound was copied packet by packet, was encoded again as AAC because MP4 players
        do not know it, or is absent because the source has none in the range.

    Raises:
        MediaError: If a part is damaged or differs in its settings, or the sound is damaged.
        OSError: If the disk is full.
    """
    if not paths:
        raise ValueError("there are no parts to join")
    parts = [_examine_part(path) for path in paths]
    for part in parts:
        if (part.rate, part.encoding) != (parts[0].rate, parts[0].encoding):
            raise MediaError(
                f"{part.path} has another rate or encoding than {parts[0].path}, so the two "
                "cannot be joined. Write both with the same settings."
            )
    length_s = sum(part.num_frames for part in parts) / parts[0].rate
    try:
        return _join(parts, output, audio, length_s)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise MediaError(
            f"{output} cannot be put together from its parts and sound: {error.strerror}. "
            "One of them is damaged."
        ) from error


def _join(
    parts: Sequence[_Part], output: Path, audio: AudioSource | None, length_s: Fraction
) -> AudioOutcome:
    """Write the joined file of parts that fit together."""
    with ExitStack() as stack:
        sound = None if audio is None else stack.enter_context(_open_sound(audio, length_s))
        temporary = stack.enter_context(atomic_path(output))
        container = stack.enter_context(_output(temporary))
        with _open(parts[0].path) as first:
            template = _video_stream(first, parts[0].path)
            stream = container.add_stream_from_template(template, opaque=True)
        stream.time_base = 1 / parts[0].rate
        _tag_for_players(stream)
        feeds: list[Iterator[Packet[Any]]] = [_joined_packets(parts, stream)]
        if sound is not None:
            feeds.append(sound.packets_for(container))
        outcome: AudioOutcome = "absent"
        for packet in heapq.merge(*feeds, key=_decode_time):
            if sound is not None and packet.stream is not stream:
                outcome = sound.outcome
            container.mux(packet)
    return outcome


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


class DamagedError(MediaError):
    """A video is torn from some time on.

    Attributes:
        time_s: That time after the first frame [s]; every frame before it can be read.
    """

    def __init__(self, path: Path, time_s: float) -> None:
        super().__init__(
            f"{path} is damaged at {time_s:.3f} s. "
            "Convert the file anew, or use the part before it."
        )
        self.time_s = time_s


class _TornError(Exception):
    """A packet is missing or incomplete."""


def _open(path: Path) -> InputContainer:
    """Open a media file for reading."""
    try:
        # "file:" keeps FFmpeg from taking "a:b.mp4" for a protocol. Missing times stay missing:
        # FFmpeg makes them up wrongly where frames are reordered (AVI with B-frames). And tags
        # that are not UTF-8 would otherwise stop PyAV.
        return av.open(
            f"file:{path}", container_options={"fflags": "-genpts"}, metadata_errors="replace"
        )
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{path} cannot be read as a video: {error.strerror}. "
            "Give a file that plays, such as MP4, MOV, MKV or WebM."
        ) from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream that players show."""
    stream = container.streams.best("video")
    # The cover picture of a sound file is a video stream too.
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise MediaError(f"{path} has no video stream. Give a video file.")
    if stream.codec_context is None:
        raise MediaError(f"{path} holds a video format that is not known. Convert it to H.264.")
    return stream


def _audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound that players play, if its format is known."""
    stream = container.streams.best("audio")
    if isinstance(stream, AudioStream) and stream.codec_context is not None:
        return stream
    return None


def _examine(path: Path) -> _Examined:
    """Read all time stamps and the first frame; without time stamps decode every frame."""
    check_media_file(path, "video")
    with _open(path) as container:
        stream = _video_stream(container, path)
        packets = _packet_times(container, stream)
        time_base = stream.time_base or Fraction(1, 1000)
        stated_rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
        sample_aspect = stream.sample_aspect_ratio or Fraction(1)
        codec = stream.codec_context.codec.canonical_name
        has_audio = _audio_stream(container) is not None
    first = _first_frame(path)
    by_order = first.pts is None or not packets.complete
    if first.pts is None or by_order:
        times, damaged = _decoded_times(path, stated_rates, time_base)
    else:
        # Frames before the first one that decodes lean on pictures that were cut off.
        times = np.unique(packets.times[packets.times >= first.pts])
        damaged = packets.damaged
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
            start_s=float(start * time_base),
            rotation=rotation,
            has_audio=has_audio,
            codec=codec,
        ),
        timeline=timeline,
        keys=np.arange(len(times)) if by_order else times,
        key_frames=packets.key_frames,
        by_order=by_order,
        start_s=start * time_base,
        damaged_s=None if damaged is None else float(max(0, damaged - start) * time_base),
    )


def _intact_packets(
    container: InputContainer, stream: VideoStream
) -> Iterator[Packet[VideoStream]]:
    """All packets of a stream in the order of the file; `_TornError` where one is missing."""
    num_packets = 0
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _TornError
            if packet.size:
                num_packets += 1
                yield packet
    except av.error.FFmpegError as error:
        raise _TornError from error
    # MP4 lists all packets at one place: a file cut between two packets shows no other sign.
    if len(stream.index_entries) > num_packets:
        raise _TornError


def _packet_times(container: InputContainer, stream: VideoStream) -> _PacketTimes:
    """Collect the time stamps of a stream without decoding it."""
    times, key_frames = array("q"), array("q")
    latest, last_duration, complete = None, 0, True
    sure, damaged = 0, None
    try:
        for packet in _intact_packets(container, stream):
            if packet.pts is None:
                complete = False
                continue
            if packet.is_keyframe:
                key_frames.append(packet.pts)
            # A later packet is decoded later, so it cannot be shown before this time.
            sure = (packet.pts if packet.dts is None else packet.dts) + (packet.duration or 0)
            if packet.is_discard:
                continue
            times.append(packet.pts)
            if latest is None or packet.pts > latest:
                latest, last_duration = packet.pts, packet.duration or 0
    except _TornError:
        damaged = sure
    return _PacketTimes(
        times=np.sort(np.asarray(times, np.int64)),
        key_frames=np.unique(np.asarray(key_frames, np.int64)),
        last_duration=last_duration,
        complete=complete,
        damaged=damaged,
    )


def _first_frame(path: Path) -> VideoFrame:
    """The first frame that decodes."""
    with _open(path) as container:
        try:
            for frame in container.decode(_video_stream(container, path)):
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
    with _open(path) as container:
        try:
            for frame in container.decode(_video_stream(container, path)):
                stamp = -1 if frame.pts is None else frame.pts
                rising = rising and frame.pts is not None and (not stamps or stamp > stamps[-1])
                stamps.append(stamp)
        except av.error.FFmpegError:
            damaged = True
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
        stream = _video_stream(container, self._path)
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
        self._container = _open(self._path)
        stream = _video_stream(self._container, self._path)
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


@contextmanager
def _output(path: Path) -> Iterator[OutputContainer]:
    """An MP4 file that ends properly, or is given up after an exception.

    On a full disk PyAV raises `av.error.OSError`, which is an `OSError` with the usual `errno`:
    while packets are written or, since 32 kB are held back, only here at the end.
    """
    container = av.open(
        f"file:{path}", "w", format="mp4", container_options={"movflags": "+faststart"}
    )
    try:
        yield container
    except BaseException:
        with suppress(av.error.FFmpegError):
            container.close()
        raise
    container.close()


def _tag_for_players(stream: VideoStream) -> None:
    """Mark H.265 the way Apple's players demand it."""
    if stream.codec_context.codec.canonical_name == "hevc":
        stream.codec_context.codec_tag = "hvc1"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What has to agree between files that are joined, and what the joining needs.

    Attributes:
        path: The file.
        num_frames: Frames, which are as many packets.
        rate: Frames per second.
        encoding: Format and parameter sets, which hold size, colours and all coding tools.
        reorder_delay: By how many frames the decoding order may run ahead of the display.
    """

    path: Path
    num_frames: int
    rate: Fraction
    encoding: tuple[str, bytes | None]
    reorder_delay: int


def _examine_part(path: Path) -> _Part:
    """Check that a part is whole and has a constant rate."""
    check_media_file(path, "video")
    stamps = array("q")
    durations: set[int] = set()
    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            for packet in _intact_packets(container, stream):
                stamps.append(_ticks(packet))
                durations.add(packet.duration or 0)
        except _TornError as error:
            raise DamagedError(path, float(len(stamps) / (stream.average_rate or 1))) from error
        encoding = (stream.codec_context.codec.canonical_name, stream.codec_context.extradata)
        time_base = stream.time_base or Fraction(1, 1000)
    step = durations.pop() if len(durations) == 1 else 0
    steps = np.arange(len(stamps))
    times = np.asarray(stamps, np.int64) - min(stamps, default=0)
    if encoding[0] not in _JOINED_VIDEO_CODECS:
        raise MediaError(f"{path} holds {encoding[0]} video, which cannot be joined.")
    if not step or not np.array_equal(np.sort(times), steps * step):
        raise MediaError(f"{path} has no constant frame rate, so it cannot be joined.")
    return _Part(
        path=path,
        num_frames=len(stamps),
        rate=1 / (step * time_base),
        encoding=encoding,
        reorder_delay=int((steps - times // step).max()),
    )


def _joined_packets(parts: Sequence[_Part], stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """All packets of the parts with the time stamps of one video, in the order of decoding."""
    delay = max(part.reorder_delay for part in parts)
    num_packets = 0
    for part in parts:
        with _open(part.path) as container:
            source = _video_stream(container, part.path)
            first = num_packets - round(_start_s(source) * part.rate)
            for packet in _intact_packets(container, source):
                packet.pts = first + round(_seconds(packet) * part.rate)
                # One packet per frame. The parts' own decoding times would not do: a short part
                # starts with a smaller delay, so that time would run backwards at the seam.
                packet.dts = num_packets - delay
                packet.duration = 1
                packet.time_base = 1 / part.rate
                packet.stream = stream
                num_packets += 1
                yield packet


def _start_s(stream: Stream) -> Fraction:
    """Time stamp of a stream's first frame or sound [s]."""
    return (stream.start_time or 0) * (stream.time_base or Fraction(1))


def _ticks(packet: Packet[Any]) -> int:
    """Presentation time; only for packets that have one."""
    return 0 if packet.pts is None else packet.pts


def _seconds(packet: Packet[Any]) -> Fraction:
    """Presentation time [s]; only for packets that have one."""
    return _ticks(packet) * packet.time_base


def _decode_time(packet: Packet[Any]) -> Fraction:
    """When a packet of an output is due [s]."""
    return (packet.dts or 0) * packet.time_base


@dataclass(frozen=True, kw_only=True)
class _Sound:
    """The open sound of an `AudioSource`.

    Attributes:
        path: The file.
        container: The file, open.
        stream: Its sound.
        begin_s: Time stamp in the file that becomes time 0 [s].
        length_s: Length of the video [s].
        outcome: What `packets_for` does with the sound.
    """

    path: Path
    container: InputContainer
    stream: AudioStream
    begin_s: Fraction
    length_s: Fraction
    outcome: AudioOutcome

    def packets_for(self, output: OutputContainer) -> Iterator[Packet[AudioStream]]:
        """Add a stream to `output`, whose header is not yet written, and make its packets.

        Args:
            output: Container that the packets are for.

        Returns:
            Packets that begin at time 0 or, hidden by an edit list, up to two packets before.
        """
        if self.outcome == "copied":
            copy = output.add_stream_from_template(self.stream)
            copy.time_base = Fraction(1, self.stream.rate)
            return self._cut(self._copied(copy), self.stream.rate)
        rate = self.stream.rate if self.stream.rate in _AAC_RATES else 48000
        layout = "mono" if self.stream.channels == 1 else "stereo"
        encoder = output.add_stream("aac", rate=rate, layout=layout)
        encoder.bit_rate = _AAC_BITS_PER_CHANNEL * (1 if layout == "mono" else 2)
        return self._cut(self._encoded(encoder, rate, layout), rate)

    def _cut(
        self, packets: Iterator[Packet[AudioStream]], rate: int
    ) -> Iterator[Packet[AudioStream]]:
        """End the sound with the video, to the sample."""
        end = int(self.length_s * rate)
        for packet in packets:
            if _ticks(packet) >= end:
                return
            packet.duration = min(packet.duration or 0, end - _ticks(packet))
            yield packet

    def _copied(self, stream: AudioStream) -> Iterator[Packet[AudioStream]]:
        """Packets of the range, with times in samples; the one before the range comes first."""
        rate = self.stream.rate
        before: Packet[AudioStream] | None = None
        last: int | None = None  # begin and end of the packet handed out last [samples]
        end = 0
        for packet in self._packets():
            begin = round((_seconds(packet) - self.begin_s) * rate)
            stated = (packet.duration or 0) * packet.time_base * rate
            # A container that counts milliseconds cannot state 1024 samples, so that its packets
            # would overlap or leave gaps of a few samples.
            samples = self.stream.frame_size
            exact = samples > 0 and abs(stated - samples) <= packet.time_base * rate
            packet.pts = packet.dts = begin
            packet.duration = samples if exact else round(stated)
            packet.time_base = Fraction(1, rate)
            packet.stream = stream
            if begin + packet.duration <= 0:
                before = packet
                continue
            # A decoder needs the packet before to get the first one right; players skip it.
            for due in (packet,) if before is None else (before, packet):
                if exact and last is not None and abs(_ticks(due) - end) < samples / 2:
                    due.pts = due.dts = end
                if last is None or _ticks(due) > last:  # else time runs backwards
                    last, end = _ticks(due), _ticks(due) + (due.duration or 0)
                    yield due
            before = None

    def _encoded(
        self, stream: AudioStream, rate: int, layout: str
    ) -> Iterator[Packet[AudioStream]]:
        """The range as new AAC packets."""
        position = 0
        for samples in self._samples(rate, layout):
            frame = AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate = rate
            frame.pts = position
            frame.time_base = Fraction(1, rate)
            position += samples.shape[1]
            yield from stream.encode(frame)
        if position:
            yield from stream.encode(None)

    def _samples(self, rate: int, layout: str) -> Iterator[npt.NDArray[np.float32]]:
        """The range as blocks [channels, n] without gaps, placed by their time stamps."""
        total = int(self.length_s * rate)
        position = 0
        for frame in self._resampled(rate, layout):
            begin = round(((frame.pts or 0) * (frame.time_base or 1) - self.begin_s) * rate)
            if position and abs(begin - position) <= _AUDIO_JITTER_S * rate:
                begin = position
            samples = np.asarray(frame.to_ndarray(), np.float32)
            while position < min(begin, total):
                silence = min(begin, total, position + rate) - position
                yield np.zeros((samples.shape[0], silence), np.float32)
                position += silence
            samples = samples[:, max(0, position - begin) :][:, : total - position]
            if samples.shape[1]:
                yield np.ascontiguousarray(samples)
                position += samples.shape[1]
            if position >= total:
                return

    def _resampled(self, rate: int, layout: str) -> Iterator[AudioFrame]:
        """The whole sound, decoded; decoders need a run-up, and this is quick."""
        resampler = AudioResampler(format="fltp", layout=layout, rate=rate)
        for packet in self._packets():
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                raise self._damaged(packet) from error
            for frame in frames:
                yield from resampler.resample(frame)
        for frame in self.stream.decode(None):
            yield from resampler.resample(frame)
        yield from resampler.resample(None)

    def _packets(self) -> Iterator[Packet[AudioStream]]:
        """All packets of the sound that have a time."""
        packet: Packet[AudioStream] | None = None
        try:
            for packet in self.container.demux(self.stream):
                if packet.size and packet.pts is not None:
                    yield packet
        except av.error.FFmpegError as error:
            raise self._damaged(packet) from error

    def _damaged(self, packet: Packet[AudioStream] | None) -> MediaError:
        time_s = Fraction(0) if packet is None else _seconds(packet)
        return MediaError(
            f"{self.path} has damaged sound at {float(time_s):.3f} s. Give other sound."
        )


@contextmanager
def _open_sound(audio: AudioSource, length_s: Fraction) -> Iterator[_Sound | None]:
    """The sound of a source, or None if it has none."""
    check_media_file(audio.path, "video")
    with _open(audio.path) as container:
        stream = _audio_stream(container)
        if stream is None:
            yield None
            return
        try:
            first_s = _examine(audio.path).start_s
        except MediaError:
            first_s = _start_s(stream)
        copied = stream.codec_context.codec.canonical_name in _COPIED_AUDIO_CODECS
        yield _Sound(
            path=audio.path,
            container=container,
            stream=stream,
            begin_s=first_s + Fraction(audio.start_s),
            length_s=length_s,
            outcome="copied" if copied else "re-encoded",
        )
