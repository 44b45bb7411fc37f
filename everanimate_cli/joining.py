"""Put encoded files end to end, under the driving video's sound."""

# PyAV's `Packet` takes a type argument in its stubs only, so annotations must not be evaluated.
from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.containers import (
    DamagedError,
    TornError,
    audio_stream,
    intact_packets,
    open_container,
    open_output,
    seconds_of,
    stream_start_s,
    tag_for_players,
    ticks_of,
    video_stream,
)
from everanimate_cli.errors import MediaError
from everanimate_cli.images import check_media_file
from everanimate_cli.video import first_frame_s

AudioOutcome = Literal["copied", "re-encoded", "absent"]

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
class AudioSource:
    """Sound to put under a joined video.

    Attributes:
        path: Video or sound file.
        start_s: Where the sound begins [s], counted from the first frame of the file's video, or
            from the first sound if it has no video.
    """

    path: Path
    start_s: float = 0.0


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
        container = stack.enter_context(open_output(temporary))
        with open_container(parts[0].path) as first:
            template = video_stream(first, parts[0].path)
            stream = container.add_stream_from_template(template, opaque=True)
        stream.time_base = 1 / parts[0].rate
        tag_for_players(stream)
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
    with open_container(path) as container:
        stream = video_stream(container, path)
        try:
            for packet in intact_packets(container, stream):
                stamps.append(ticks_of(packet))
                durations.add(packet.duration or 0)
        except TornError as error:
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
        with open_container(part.path) as container:
            source = video_stream(container, part.path)
            first = num_packets - round(stream_start_s(source) * part.rate)
            for packet in intact_packets(container, source):
                packet.pts = first + round(seconds_of(packet) * part.rate)
                # One packet per frame. The parts' own decoding times would not do: a short part
                # starts with a smaller delay, so that time would run backwards at the seam.
                packet.dts = num_packets - delay
                packet.duration = 1
                packet.time_base = 1 / part.rate
                packet.stream = stream
                num_packets += 1
                yield packet


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
            if ticks_of(packet) >= end:
                return
            packet.duration = min(packet.duration or 0, end - ticks_of(packet))
            yield packet

    def _copied(self, stream: AudioStream) -> Iterator[Packet[AudioStream]]:
        """Packets of the range, with times in samples; the one before the range comes first."""
        rate = self.stream.rate
        before: Packet[AudioStream] | None = None
        last: int | None = None  # begin and end of the packet handed out last [samples]
        end = 0
        for packet in self._packets():
            begin = round((seconds_of(packet) - self.begin_s) * rate)
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
                if exact and last is not None and abs(ticks_of(due) - end) < samples / 2:
                    due.pts = due.dts = end
                if last is None or ticks_of(due) > last:  # else time runs backwards
                    last, end = ticks_of(due), ticks_of(due) + (due.duration or 0)
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
        time_s = Fraction(0) if packet is None else seconds_of(packet)
        return MediaError(
            f"{self.path} has damaged sound at {float(time_s):.3f} s. Give other sound."
        )


@contextmanager
def _open_sound(audio: AudioSource, length_s: Fraction) -> Iterator[_Sound | None]:
    """The sound of a source, or None if it has none."""
    check_media_file(audio.path, "video")
    with open_container(audio.path) as container:
        stream = audio_stream(container)
        if stream is None:
            yield None
            return
        try:
            first_s = first_frame_s(audio.path)
        except MediaError:
            first_s = stream_start_s(stream)
        copied = stream.codec_context.codec.canonical_name in _COPIED_AUDIO_CODECS
        yield _Sound(
            path=audio.path,
            container=container,
            stream=stream,
            begin_s=first_s + Fraction(audio.start_s),
            length_s=length_s,
            outcome="copied" if copied else "re-encoded",
        )
