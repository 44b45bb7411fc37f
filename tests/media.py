"""Make small media files on the spot, and look into files without the code under test."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace

Frames = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.float32]

# One step of grey per frame, wide enough to survive compression.
GREY_STEP = 4
BURST_PERIOD_S = 1.0
BURST_AT_S = 0.5
BURST_LENGTH_S = 0.05


def numbered_frames(num_frames: int, height: int = 32, width: int = 48) -> Frames:
    """Grey frames [S, H, W, 3] that tell their number, 0 to 59, by their brightness."""
    greys = (np.arange(num_frames) * GREY_STEP + GREY_STEP // 2).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (num_frames, height, width, 3)).copy()


def frame_numbers(frames: Frames) -> list[int]:
    """The numbers that `numbered_frames` gave to frames [S, H, W, 3]."""
    return [round((float(frame.mean()) - GREY_STEP / 2) / GREY_STEP) for frame in frames]


def moving_frames(num_frames: int, height: int = 32, width: int = 48) -> Frames:
    """Coloured frames [S, H, W, 3], each different everywhere, that give an encoder some work."""
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(num_frames), indexing="ij")
    red = 128 + 100 * np.sin((x + 3 * t) / 7)
    green = 128 + 100 * np.cos((y - 2 * t) / 5)
    blue = 40 + 3 * t % 200
    return np.stack((red, green, blue), axis=-1).transpose(2, 0, 1, 3).astype(np.uint8)


def corner_frame(height: int = 32, width: int = 48) -> Frames:
    """A frame [H, W, 3] with corners, clockwise from the upper left, red, green, blue, white."""
    frame = np.zeros((height, width, 3), np.uint8)
    half_height, half_width = height // 2, width // 2
    frame[:half_height, :half_width] = (255, 0, 0)
    frame[:half_height, half_width:] = (0, 255, 0)
    frame[half_height:, half_width:] = (0, 0, 255)
    frame[half_height:, :half_width] = (255, 255, 255)
    return frame


def corners(frame: Frames) -> list[str]:
    """Colours of the corners of a frame [H, W, 3], clockwise from the upper left."""
    height, width = frame.shape[:2]
    spots = [
        (height // 4, width // 4),
        (height // 4, -width // 4),
        (-height // 4, -width // 4),
        (-height // 4, width // 4),
    ]
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    bits = [tuple(int(value > 127) for value in frame[y, x]) for y, x in spots]
    return [names.get(bit, "other") for bit in bits]


def tone_bursts(duration_s: float, sample_rate: int) -> Samples:
    """Silence [2, n] with a short tone half a second into each second."""
    t = np.arange(round(duration_s * sample_rate)) / sample_rate
    since = (t - BURST_AT_S) % BURST_PERIOD_S
    tone = np.where(since < BURST_LENGTH_S, 0.8 * np.sin(2 * np.pi * 1000 * t), 0.0)
    return np.repeat(tone[None].astype(np.float32), 2, axis=0)


def write_media(  # noqa: PLR0913 - the one function that knows how to make odd files
    path: Path,
    frames: Frames | None = None,
    *,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    container_format: str | None = None,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int = 0,
    sample_aspect: Fraction | None = None,
    colorspace: Colorspace | None = None,
    color_range: ColorRange | None = None,
    tags: dict[str, str] | None = None,
    sound: Samples | None = None,
    sound_codec: str = "aac",
    sound_rate: int = 44100,
    sound_at_s: Fraction | int = 0,
    sound_gap: tuple[int, int] | None = None,
) -> Path:
    """Write a media file with plain PyAV.

    Args:
        path: File to make; its suffix selects the container.
        frames: [S, H, W, 3] uint8 RGB, None for sound only.
        rate: Nominal frames per second.
        codec: FFmpeg's name of the video encoder.
        pixel_format: FFmpeg's name.
        options: Of the video encoder.
        container_options: Of the container.
        container_format: Container, if the suffix does not tell.
        times: [S] time stamps, for a variable rate.
        time_base: Seconds per tick of `times`.
        rotation: Degrees counter-clockwise that players turn the picture by.
        sample_aspect: Width of a pixel over its height.
        colorspace: Matrix to convert with and to tag; None for BT.601 without a tag.
        color_range: Range to convert to and to tag.
        tags: Metadata of the container.
        sound: [channels, n] float32, None for no sound.
        sound_codec: FFmpeg's name of the sound encoder.
        sound_rate: Samples per second.
        sound_at_s: Time of the first sample [s].
        sound_gap: (sample, ticks): from that sample on, time runs later by so many samples.

    Returns:
        `path`.
    """
    packets = []
    with av.open(
        str(path), "w", format=container_format, container_options=container_options or {}
    ) as container:
        container.metadata.update(tags or {})
        if frames is not None:
            base = time_base or 1 / Fraction(rate)
            video = container.add_stream(codec, rate=Fraction(rate), options=options or {})
            video.width, video.height = frames.shape[2], frames.shape[1]
            video.pix_fmt = pixel_format
            video.codec_context.time_base = base
            video.codec_context.thread_count = 1
            if sample_aspect is not None:
                video.codec_context.sample_aspect_ratio = sample_aspect
            if colorspace is not None:
                video.codec_context.colorspace = int(colorspace)
            if color_range is not None:
                video.codec_context.color_range = int(color_range)
            if rotation:
                video.set_display_rotation(rotation)
            for index, pixels in enumerate(frames):
                # One thread: by default every conversion starts one thread per core.
                frame = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format=pixel_format,
                    dst_colorspace=colorspace,
                    dst_color_range=color_range,
                    threads=1,
                )
                frame.pts = index if times is None else times[index]
                frame.time_base = base
                packets += video.encode(frame)
            packets += video.encode()
        if sound is not None:
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            audio = container.add_stream(
                sound_codec, rate=sound_rate, layout=layout, options={"strict": "-2"}
            )
            begin = round(sound_at_s * sound_rate)
            blocks = np.array_split(sound, range(1024, sound.shape[1], 1024), axis=1)
            for index, block in enumerate(blocks):
                piece = AudioFrame.from_ndarray(
                    np.ascontiguousarray(block), format="fltp", layout=layout
                )
                piece.sample_rate = sound_rate
                piece.time_base = Fraction(1, sound_rate)
                piece.pts = begin + index * 1024
                if sound_gap is not None and index * 1024 >= sound_gap[0]:
                    piece.pts += sound_gap[1]
                packets += audio.encode(piece)
            packets += audio.encode()
        container.start_encoding()
        for packet in sorted(
            packets, key=lambda p: (p.pts if p.dts is None else p.dts) * p.time_base
        ):
            container.mux(packet)
    return path


def write_cover_sound(path: Path, sound: Samples, sound_rate: int = 44100) -> Path:
    """An MP3 file with a cover picture, which FFmpeg shows as a video stream."""
    with av.open(str(path), "w", format="mp3") as container:
        audio = container.add_stream("libmp3lame", rate=sound_rate, layout="stereo")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        piece = AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
        piece.sample_rate = sound_rate
        picture = VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
        picture.pts, picture.time_base = 0, Fraction(1)
        container.mux([*cover.encode(picture), *cover.encode()])
        container.mux([*audio.encode(piece), *audio.encode()])
    return path


def cut_file(source: Path, path: Path, num_bytes: int) -> Path:
    """Keep only the first bytes of a file; a negative number counts from its end."""
    path.write_bytes(source.read_bytes()[:num_bytes])
    return path


def overwrite_bytes(source: Path, path: Path, position: int, num_bytes: int) -> Path:
    """Copy a file with some bytes replaced by zeros."""
    data = bytearray(source.read_bytes())
    data[position : position + num_bytes] = bytes(num_bytes)
    path.write_bytes(data)
    return path


def packet_positions(path: Path) -> list[tuple[float, int, int]]:
    """(presentation time [s], byte position, size) of each video packet, in the file's order."""
    with av.open(str(path)) as container:
        return [
            (float(packet.pts * packet.time_base), packet.pos, packet.size)
            for packet in container.demux(video=0)
            if packet.size
        ]


def mp4_boxes(path: Path) -> list[str]:
    """Names of the top-level boxes of an MP4 file, in order."""
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        names.append(name.decode())
        position += size
    return names


def decode_video(path: Path) -> tuple[list[int], Frames]:
    """Time stamps [S] and frames [S, H, W, 3] of a plain decode from begin to end."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        pixels = np.stack(
            [frame.reformat(format="rgb24", threads=1).to_ndarray() for frame in frames]
        )
        return [frame.pts for frame in frames], pixels


def burst_times(path: Path) -> list[float]:
    """When the tones of `tone_bursts` begin [s], counted from the container's time 0."""
    times: list[float] = []
    latest = -BURST_PERIOD_S
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return []
        resampler = av.AudioResampler(format="fltp", layout="mono")
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                for position in np.flatnonzero(np.abs(part.to_ndarray()[0]) > 0.3):
                    time = part.pts * part.time_base + Fraction(int(position), part.sample_rate)
                    if time - latest > BURST_PERIOD_S / 2:
                        times.append(float(time))
                    latest = float(time)
    return times


def sound_length(path: Path) -> float:
    """Length of the sound track that players see [s]; 0 if there is none."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return 0.0
        stream = container.streams.audio[0]
        return float((stream.duration or 0) * stream.time_base)
