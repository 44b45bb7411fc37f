"""Open media files, walk through their packets, and close them properly."""

# PyAV's `Packet` takes a type argument in its stubs only, so annotations must not be evaluated.
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from everanimate_cli.errors import MediaError

# Matroska and WebM: elements of a name, a length and as many bytes.
_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_MAX_ELEMENTS_BEFORE_SEGMENT = 8
_RIFF = b"RIFF"  # AVI
# WMV and ASF: objects of a name, eight bytes with their whole length, and the rest.
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_FLV = b"FLV"
_FLV_TAGS = (8, 9, 18)  # sound, video, script
_GIF = b"GIF8"
_GIF_EXTENSION, _GIF_IMAGE, _GIF_END = b"!", b",", b";"


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


class TornError(Exception):
    """A packet is missing or incomplete."""


def open_container(path: Path) -> InputContainer:
    """Open a media file for reading.

    Raises:
        MediaError: If it is no media file.
    """
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


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream that players show.

    Raises:
        MediaError: If there is none, or its format is not known.
    """
    stream = container.streams.best("video")
    # The cover picture of a sound file is a video stream too.
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise MediaError(f"{path} has no video stream. Give a video file.")
    if stream.codec_context is None:
        raise MediaError(f"{path} holds a video format that is not known. Convert it to H.264.")
    return stream


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound that players play, if its format is known."""
    stream = container.streams.best("audio")
    if isinstance(stream, AudioStream) and stream.codec_context is not None:
        return stream
    return None


def intact_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """All packets of a stream in the order of the file.

    Raises:
        TornError: Where a packet is missing.
    """
    num_packets = 0
    # Of a packet that is cut short, FFmpeg's GIF reader gives what there is as if it were whole.
    is_gif = container.format.name == "gif"
    last: Packet[VideoStream] | None = None
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise TornError
            if not packet.size:
                continue
            num_packets += 1
            if not is_gif:
                yield packet
                continue
            if last is not None:
                yield last
            last = packet
    except av.error.FFmpegError as error:
        raise TornError from error
    # MP4 lists all packets at one place: a file cut between two packets shows no other sign. The
    # others are read up to their last whole packet, as if nothing ought to follow.
    if len(stream.index_entries) > num_packets or _is_cut_off(container):
        raise TornError
    if last is not None:
        yield last


def _is_cut_off(container: InputContainer) -> bool:
    """Whether a file is shorter than it says, if its container says so.

    MPEG's streams (TS, MPG) never do, and end anywhere.
    """
    path = Path(container.name.removeprefix("file:"))
    with path.open("rb") as file:
        start = file.read(16)
        if start.startswith(_EBML_HEADER):
            stated = _matroska_size(file)
        elif start.startswith(_RIFF):
            stated = _riff_size(file)
        elif start == _ASF_HEADER:
            stated = _asf_size(file)
        elif start.startswith(_FLV):
            stated = _flv_size(file)
        elif start.startswith(_GIF):
            stated = _gif_size(file)
        else:
            return False
        return stated is not None and stated > file.seek(0, os.SEEK_END)


def _matroska_size(file: BinaryIO) -> int | None:
    """Bytes up to the end of the segment, which holds everything; None if its end is left open.

    Source: RFC 8794 (EBML) sections 4 to 6, RFC 9559 (Matroska).
    """
    file.seek(0)
    for _ in range(_MAX_ELEMENTS_BEFORE_SEGMENT):
        name = _read_number(file, keep_marker=True)
        length = _read_number(file, keep_marker=False)
        if not name or not length:
            return None
        size = int.from_bytes(length)
        if name == _SEGMENT:
            # All bits set: a recording that was never finished, or a broadcast.
            is_open = size == (1 << 7 * len(length)) - 1
            return None if is_open else file.tell() + size
        file.seek(size, os.SEEK_CUR)
    return None


def _read_number(file: BinaryIO, *, keep_marker: bool) -> bytes:
    """A number of one byte more than zero bits lead, at most 8; empty at the end of the file."""
    first = file.read(1)
    if not first or not first[0]:
        return b""
    num_more = 8 - first[0].bit_length()
    rest = file.read(num_more)
    if len(rest) < num_more:
        return b""
    if not keep_marker:
        first = bytes([first[0] & (0x7F >> num_more)])
    return first + rest


def _riff_size(file: BinaryIO) -> int | None:
    """Bytes up to the end of the last list; None if its length was never filled in."""
    end = 0
    while True:
        file.seek(end + end % 2)
        head = file.read(8)
        if head[:4] != _RIFF:
            return end
        size = int.from_bytes(head[4:], "little")
        if not size:
            return None
        end = file.tell() + size


def _asf_size(file: BinaryIO) -> int | None:
    """Bytes up to the end of the packets; None if their length was never filled in.

    Source: Advanced Systems Format specification, sections 3.1 and 5.1.
    """
    file.seek(len(_ASF_HEADER))
    begin = int.from_bytes(file.read(8), "little")
    file.seek(begin)
    head = file.read(24)
    size = int.from_bytes(head[16:], "little")
    return begin + size if head.startswith(_ASF_DATA) and size else None


def _flv_size(file: BinaryIO) -> int | None:
    """Bytes up to the end of the last tag that was begun; None if something else lies between.

    Source: Adobe Flash Video File Format Specification 10.1, annex E.
    """
    file.seek(5)
    end = int.from_bytes(file.read(4))
    while True:
        # Four bytes with the length of the tag before, then this one's kind, its length and seven
        # bytes more.
        file.seek(end + 4)
        head = file.read(11)
        if not head:
            return end
        if head[0] & 0x1F not in _FLV_TAGS:
            return None
        end += 4 + 11 + int.from_bytes(head[1:4])


def _gif_size(file: BinaryIO) -> int | None:
    """Bytes up to the end of the last block that was begun; None if something else lies between.

    The end mark itself is left out by some programs.

    Source: GIF89a specification.
    """
    file.seek(10)
    _skip_colours(file, file.read(3)[:1])
    while True:
        end = file.tell()
        kind = file.read(1)
        if not kind or kind == _GIF_END:
            return end
        if kind == _GIF_EXTENSION:
            file.seek(1, os.SEEK_CUR)
        elif kind == _GIF_IMAGE:
            _skip_colours(file, file.read(9)[8:])
            file.seek(1, os.SEEK_CUR)
        else:
            return None
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], os.SEEK_CUR)
        else:
            return file.tell() + 1


def _skip_colours(file: BinaryIO, flags: bytes) -> None:
    """Go behind a table of colours, if the flags before it announce one."""
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, os.SEEK_CUR)


@contextmanager
def open_output(path: Path) -> Iterator[OutputContainer]:
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


def tag_for_players(stream: VideoStream) -> None:
    """Mark H.265 the way Apple's players demand it."""
    if stream.codec_context.codec.canonical_name == "hevc":
        stream.codec_context.codec_tag = "hvc1"


def stream_start_s(stream: Stream) -> Fraction:
    """Time stamp of a stream's first frame or sound [s]."""
    return (stream.start_time or 0) * (stream.time_base or Fraction(1))


def ticks_of(packet: Packet[Any]) -> int:
    """Presentation time; only for packets that have one."""
    return 0 if packet.pts is None else packet.pts


def seconds_of(packet: Packet[Any]) -> Fraction:
    """Presentation time [s]; only for packets that have one."""
    return ticks_of(packet) * packet.time_base
