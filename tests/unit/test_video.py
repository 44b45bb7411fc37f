import errno
import itertools
import resource
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from media import (
    burst_times,
    corner_frame,
    corners,
    cut_file,
    decode_video,
    frame_numbers,
    moving_frames,
    mp4_boxes,
    numbered_frames,
    overwrite_bytes,
    packet_positions,
    sound_length,
    tone_bursts,
    write_cover_sound,
    write_media,
)
from PIL import Image
from pose_golden import GOLDEN

from everanimate_cli import video
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import MediaError, SettingsError
from everanimate_cli.images import fit_frame
from everanimate_cli.joining import AudioSource, join_videos
from everanimate_cli.video import Timeline, VideoInfo, VideoReader, as_rate, first_frame_s

# Of what a sound packet lasts at most: 1152 samples of MP3 at 44.1 kHz.
ONE_PACKET_S = 0.027

# B-frames, several key frames, and in the second case groups that lean on their neighbours.
SHORT_GROUPS = {"x264-params": "keyint=9:min-keyint=9:scenecut=0:bframes=3:b-adapt=0"}
OPEN_GROUPS = {"x264-params": "keyint=11:min-keyint=6:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}


def write_part(path: Path, frames: np.ndarray, **settings: object) -> Path:
    options = {"rate": 25, "preset": "ultrafast", "crf": 18, **settings}
    with VideoWriter(path, width=frames.shape[2], height=frames.shape[1], **options) as writer:
        writer.write(frames)
    return path


def info_of(path: Path) -> VideoInfo:
    with VideoReader(path) as reader:
        return reader.info


def media_error(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        info_of(path)
    return str(caught.value)


def damage_message(path: Path, time_s: float) -> str:
    return f"{path} is damaged at {time_s:.3f} s. Convert the file anew, or use the part before it."


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let every write beyond a size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------------------------- facts


def test_facts_of_a_constant_rate_file(tmp_path: Path) -> None:
    path = write_media(
        tmp_path / "plain.mp4", numbered_frames(20), rate=30, sound=tone_bursts(0.6, 44100)
    )
    assert info_of(path) == VideoInfo(
        height=32,
        width=48,
        rate=Fraction(30),
        num_frames=20,
        duration_s=20 / 30,
        rotation=0,
    )


def test_rates_are_exact_although_matroska_rounds_to_milliseconds(tmp_path: Path) -> None:
    for rate in (Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60), Fraction(25, 2)):
        info = info_of(write_media(tmp_path / "a.mkv", numbered_frames(50), rate=rate))
        assert (info.rate, info.num_frames, info.duration_s) == (rate, 50, float(50 / rate))


def test_facts_of_a_variable_rate_file(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 4, 5, 8, 11, 14, 17]  # 30 frames per second, then 10
    path = write_media(
        tmp_path / "vfr.mkv", numbered_frames(10), times=times, time_base=Fraction(1, 30)
    )
    info = info_of(path)
    assert info.num_frames == 10
    assert info.duration_s == pytest.approx(17 / 30, abs=0.11)
    assert float(info.rate) == pytest.approx(10 / info.duration_s, rel=1e-3)


def test_a_rate_that_the_header_states_wrongly_is_measured(tmp_path: Path) -> None:
    path = write_media(
        tmp_path / "a.mkv",
        numbered_frames(40),
        rate=25,
        times=range(0, 40 * 37, 37),
        time_base=Fraction(1, 1000),
    )
    info = info_of(path)
    assert (info.rate, info.num_frames) == (Fraction(1000, 37), 40)
    with VideoReader(path) as reader:
        assert frame_numbers(reader.read(range(len(reader)))) == list(range(40))


def test_the_last_frame_lasts_as_long_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    pictures = [Image.fromarray(frame) for frame in numbered_frames(3)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 200, 900])
    assert info_of(path).duration_s == pytest.approx(1.2)
    with VideoReader(path, rate=10) as reader:
        assert frame_numbers(reader.read(range(len(reader)))) == [0, 1, 1, *[2] * 9]


def test_a_file_may_begin_at_another_time(tmp_path: Path) -> None:
    path = write_media(tmp_path / "late.ts", numbered_frames(10), times=range(50, 60))
    info = info_of(path)
    assert float(first_frame_s(path)) == pytest.approx(2.0, abs=0.15)
    assert (info.rate, info.num_frames) == (25, 10)
    with VideoReader(path) as reader:
        assert frame_numbers(reader.read(range(10))) == list(range(10))


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "still.png"
    Image.fromarray(moving_frames(1)[0]).save(path)
    info = info_of(path)
    assert (info.num_frames, info.height, info.width) == (1, 32, 48)
    with VideoReader(path, rate=5) as reader:
        assert len(reader) == 1
        np.testing.assert_array_equal(reader.read([0, 0]), np.repeat(moving_frames(1), 2, axis=0))


def test_names_that_look_like_protocols_or_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a%03d.mp4", "data:,x.mp4", "-i.mp4", "a b\u00e9.mp4"):
        write_part(Path(name), numbered_frames(2))
        assert info_of(Path(name)).num_frames == 2
        join_videos([Path(name), Path(name)], Path(f"pipe:{name}"))
        assert info_of(Path(f"pipe:{name}")).num_frames == 4


def test_tags_that_are_not_utf8_do_not_matter(tmp_path: Path) -> None:
    """PyAV decodes tags strictly by default and then raises UnicodeDecodeError."""
    path = write_media(tmp_path / "tag.mkv", numbered_frames(2), tags={"title": "ABCDEFGH"})
    data = path.read_bytes()
    assert data.count(b"ABCDEFGH") == 1
    path.write_bytes(data.replace(b"ABCDEFGH", b"caf\xe9\xff\xfe!!"))
    assert info_of(path).num_frames == 2


# --------------------------------------------------------------------------------- refusals


def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing.mp4"
    assert media_error(missing) == f"{missing} does not exist. Give the path of a video file."
    assert media_error(tmp_path) == f"{tmp_path} is a folder. Give the path of a video file."
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert media_error(empty) == f"{empty} is empty (0 bytes). Give another video file."
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 50)
    assert media_error(text) == (
        f"{text} cannot be read as a video: Invalid data found when processing input. "
        "Give a file that plays, such as MP4, MOV, MKV or WebM."
    )
    whole = write_media(tmp_path / "whole.mp4", numbered_frames(20))
    torn = cut_file(whole, tmp_path / "torn.mp4", -200)  # the index is at the end
    assert media_error(torn) == (
        f"{torn} cannot be read as a video: Invalid data found when processing input. "
        "Give a file that plays, such as MP4, MOV, MKV or WebM."
    )


def test_sound_alone_is_refused_even_with_a_cover_picture(tmp_path: Path) -> None:
    sound = tone_bursts(0.5, 44100)
    for path in (
        write_media(tmp_path / "sound.wav", sound=sound, sound_codec="pcm_s16le"),
        write_cover_sound(tmp_path / "cover.mp3", sound),
    ):
        assert media_error(path) == f"{path} has no video stream. Give a video file."


def test_an_unknown_video_format_is_refused(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mkv", numbered_frames(2))
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    assert media_error(path) == (
        f"{path} holds a video format that is not known. Convert it to H.264."
    )


def test_a_file_that_is_cut_off_tells_where(tmp_path: Path) -> None:
    whole = write_media(
        tmp_path / "whole.mp4",
        moving_frames(50),
        options=SHORT_GROUPS,
        container_options={"movflags": "faststart"},
    )
    times = packet_positions(whole)
    in_a_packet = times[25][1] + times[25][2] // 2
    between_packets = times[25][1]
    for num_bytes in (in_a_packet, between_packets):
        torn = cut_file(whole, tmp_path / "torn.mp4", num_bytes)
        lost_s = min(time for time, _, _ in times[25:])
        message = media_error(torn)
        told_s = float(message.split(" at ")[1].split(" s.")[0])
        assert lost_s - 0.15 <= told_s <= lost_s
        assert message == damage_message(torn, told_s)
        with pytest.raises(MediaError, match="is damaged at"):
            VideoReader(torn)
        with VideoReader(torn, end_s=told_s) as reader:
            _, expected = decode_video(whole)
            np.testing.assert_array_equal(reader.read(range(len(reader))), expected[: len(reader)])
            assert len(reader) == round(told_s * 25)


TORN_KINDS: dict[str, dict] = {
    "mkv": {"options": SHORT_GROUPS},
    "webm": {"codec": "libvpx-vp9", "options": {"g": "9", "cpu-used": "8"}},
    "avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "avi of h264": {"options": SHORT_GROUPS},
}
# A cut between two of their packets shows no sign, except in WMV.
TORN_WITHIN_KINDS: dict[str, dict] = {
    "flv": {"codec": "flv", "options": {"g": "9", "qscale": "2"}},
    "gif": {"codec": "gif", "pixel_format": "rgb8"},
    "wmv": {"codec": "wmv2", "container_format": "asf", "options": {"g": "9", "qscale": "2"}},
}


@pytest.mark.parametrize("kind", TORN_KINDS)
def test_files_without_a_list_of_packets_tell_where_they_are_cut_off(
    tmp_path: Path, kind: str
) -> None:
    """They once passed for short videos; only their lengths tell."""
    suffix = kind.split(maxsplit=1)[0]
    whole = write_media(tmp_path / f"whole.{suffix}", moving_frames(50), **TORN_KINDS[kind])
    assert info_of(whole).num_frames == 50
    packets = packet_positions(whole)
    _, expected = decode_video(whole)
    torn = tmp_path / f"torn.{suffix}"
    for num_bytes in (packets[25][1] + packets[25][2] // 2, packets[25][1], packets[2][1] - 1):
        cut_file(whole, torn, num_bytes)
        message = media_error(torn)
        told_s = float(message.split(" at ")[1].split(" s.")[0])
        assert message == damage_message(torn, told_s)
        num_whole = sum(position + size <= num_bytes for _, position, size in packets)
        assert num_whole - 4 <= told_s * 25 <= num_whole
        if told_s:
            with VideoReader(torn, end_s=told_s) as reader:
                found = reader.read(range(len(reader)))
                np.testing.assert_array_equal(found, expected[: round(told_s * 25)])
    # A recording that nobody ended does not say how long it is, and what is there is all of it.
    if suffix == "mkv":
        data = whole.read_bytes()
        at = data.index(b"\x18\x53\x80\x67") + 4
        assert data[at] == 1  # a length of eight bytes
        torn.write_bytes((data[:at] + b"\x01" + b"\xff" * 7 + data[at + 8 :])[: packets[25][1]])
        assert info_of(torn).num_frames == 25


@pytest.mark.parametrize("suffix", TORN_WITHIN_KINDS)
def test_files_that_are_cut_off_within_a_packet_tell_where(tmp_path: Path, suffix: str) -> None:
    """All of them passed for short videos."""
    whole = write_media(
        tmp_path / f"whole.{suffix}", moving_frames(50, 96, 128), **TORN_WITHIN_KINDS[suffix]
    )
    assert info_of(whole).num_frames == 50
    _, expected = decode_video(whole)
    cuts = [int(whole.stat().st_size * share) for share in (0.4, 0.7)]
    if suffix == "flv":
        cuts.append(packet_positions(whole)[25][1] + 5)  # within the head of a packet
    for num_bytes in cuts:
        torn = cut_file(whole, tmp_path / f"torn.{suffix}", num_bytes)
        message = media_error(torn)
        told_s = float(message.split(" at ")[1].split(" s.")[0])
        assert message == damage_message(torn, told_s)
        assert 5 <= told_s * 25 <= 40
        with VideoReader(torn, end_s=told_s) as reader:
            found = reader.read(range(len(reader)))
        assert len(found) == round(told_s * 25)
        np.testing.assert_array_equal(found, expected[: len(found)])


def test_what_lies_behind_the_last_block_of_a_gif_is_no_damage(tmp_path: Path) -> None:
    whole = write_media(
        tmp_path / "whole.gif", moving_frames(5), codec="gif", pixel_format="rgb8"
    ).read_bytes()
    assert whole.endswith(b";")
    for number, data in enumerate((whole[:-1], whole + b"\0\0rubbish")):
        path = tmp_path / f"{number}.gif"
        path.write_bytes(data)
        assert info_of(path).num_frames == 5


def test_an_avi_file_cut_off_in_its_first_frame(tmp_path: Path) -> None:
    """FFmpeg shows such a frame; it was counted among the good ones, of which there were none."""
    whole = write_media(tmp_path / "whole.avi", moving_frames(3, 64, 96), codec="mpeg4")
    _, position, size = packet_positions(whole)[0]
    torn = cut_file(whole, tmp_path / "torn.avi", position + 3 * size // 4)
    assert media_error(torn) == damage_message(torn, 0)


def test_a_file_that_is_damaged_in_the_middle_tells_where(tmp_path: Path) -> None:
    whole = write_media(tmp_path / "whole.mp4", moving_frames(50), options=SHORT_GROUPS)
    _, expected = decode_video(whole)
    time_s, position, size = packet_positions(whole)[27]
    hurt = overwrite_bytes(whole, tmp_path / "hurt.mp4", position, size)
    with VideoReader(hurt) as reader:
        assert len(reader) == 50
        with pytest.raises(MediaError) as caught:
            reader.read(range(50))
        told_s = float(str(caught.value).split(" at ")[1].split(" s.")[0])
        assert time_s - 0.2 <= told_s <= time_s
        assert str(caught.value) == damage_message(hurt, told_s)
        # What lies before and, from the next key frame on, behind is still read.
        np.testing.assert_array_equal(reader.read(range(20)), expected[:20])
        np.testing.assert_array_equal(reader.read(range(45, 50)), expected[45:])


# ----------------------------------------------------------------------------------- frames


CONTAINERS = {
    "mp4": {"options": SHORT_GROUPS},
    "open groups": {"options": OPEN_GROUPS},
    "mkv": {"suffix": "mkv", "options": OPEN_GROUPS, "rate": Fraction(30000, 1001)},
    "webm": {"suffix": "webm", "codec": "libvpx-vp9", "options": {"g": "9", "cpu-used": "8"}},
    "transport stream": {"suffix": "ts", "options": SHORT_GROUPS},
    "avi without display times": {"suffix": "avi", "options": SHORT_GROUPS},
    "avi": {"suffix": "avi", "codec": "mpeg4", "options": {"bf": "2", "g": "9", "qmax": "2"}},
    "raw stream without times": {"suffix": "h264", "options": SHORT_GROUPS},
    "refreshed bit by bit": {
        "suffix": "ts",
        "options": {"x264-params": "intra-refresh=1:keyint=12:scenecut=0"},
    },
    "gif": {"suffix": "gif", "codec": "gif", "pixel_format": "rgb8"},
    "all key frames": {"suffix": "mov", "codec": "mjpeg", "pixel_format": "yuvj420p"},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_frame_comes_once_and_in_any_order(tmp_path: Path, kind: str) -> None:
    """FFmpeg's own display times of AVI with B-frames run backwards."""
    settings = dict(CONTAINERS[kind])
    path = tmp_path / f"video.{settings.pop('suffix', 'mp4')}"
    write_media(path, numbered_frames(40), **settings)
    _, expected = decode_video(path)
    assert frame_numbers(expected) == list(range(40))
    with VideoReader(path) as reader:
        assert reader.rate == settings.get("rate", 25)
        assert len(reader) == 40
        for indices in (
            range(40),
            range(39, -1, -1),
            [*range(30, 40), *range(38, 20, -1)],
            [7, 7, 3, 39, 0, 3],
            [21],
        ):
            np.testing.assert_array_equal(reader.read(indices), expected[list(indices)])


def test_reading_chunk_by_chunk_equals_reading_at_once(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(40), options=SHORT_GROUPS)
    ping_pong = [*range(40), *range(38, 0, -1), *range(40)]
    with VideoReader(path) as reader:
        for first in range(0, len(ping_pong) - 13, 9):  # chunks of 13 that share 4
            indices = ping_pong[first : first + 13]
            assert frame_numbers(reader.read(indices)) == indices


def test_frames_before_an_edit_list_are_not_shown(tmp_path: Path) -> None:
    path = write_media(
        tmp_path / "edit.mp4", numbered_frames(30), times=range(-10, 20), options=SHORT_GROUPS
    )
    with VideoReader(path) as reader:
        assert len(reader) == 20
        assert frame_numbers(reader.read(range(20))) == list(range(10, 30))
        assert frame_numbers(reader.read([3, 1, 0])) == [13, 11, 10]


def test_frames_behind_an_edit_list_are_not_shown(tmp_path: Path) -> None:
    path = write_media(tmp_path / "edit.mp4", numbered_frames(30), options=SHORT_GROUPS)
    data = bytearray(path.read_bytes())
    duration = data.index(b"elst") + 12
    assert data[duration : duration + 4] == (1200).to_bytes(4, "big")  # milliseconds
    data[duration : duration + 4] = (600).to_bytes(4, "big")
    path.write_bytes(data)
    assert len(packet_positions(path)) > 15
    with VideoReader(path) as reader:
        assert len(reader) == 15
        assert frame_numbers(reader.read(range(15))) == list(range(15))


def test_frames_that_lean_on_a_lost_group_are_not_counted(tmp_path: Path) -> None:
    """A file cut at an open group begins with frames that no decoder shows."""
    whole = write_media(tmp_path / "whole.mkv", numbered_frames(40), options=OPEN_GROUPS)
    path = tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0], opaque=True)
        num_key_frames = 0
        for packet in source.demux(video=0):
            num_key_frames += packet.is_keyframe
            if packet.size and num_key_frames > 1:
                packet.stream = copy
                target.mux(packet)
    _, expected = decode_video(path)
    with VideoReader(path) as reader:
        assert len(reader) == len(expected) < len(packet_positions(path))
        np.testing.assert_array_equal(reader.read(range(len(reader))), expected)


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_no_frame_is_decoded_needlessly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A jump in a transport stream lands one group too late and has to be repeated."""
    path = write_media(tmp_path / f"a.{suffix}", moving_frames(60, 96, 96), options=SHORT_GROUPS)
    num_decoded = 0
    plain = video._timed_frames

    def counted(packets: object) -> object:
        nonlocal num_decoded
        for item in plain(packets):
            num_decoded += 1
            yield item

    monkeypatch.setattr(video, "_timed_frames", counted)
    with VideoReader(path) as reader:
        for index in range(60):
            reader.read([index])
        assert num_decoded == 60
        reader.read(range(59, 30, -1))  # from the key frame 27 on
        assert num_decoded <= 60 + 33
        num_decoded = 0
        reader.read([10])
        reader.read([50])
        assert num_decoded <= 2 * 9


def test_index_errors_and_the_empty_list(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(5))
    with VideoReader(path, transform=lambda frame: frame[:8]) as reader:
        assert reader.read([]).shape == (0, 8, 48, 3)
        with pytest.raises(IndexError, match="positions 0 to 5 of 5"):
            reader.read([0, 5])
        with pytest.raises(IndexError, match="positions -1 to 2 of 5"):
            reader.read([2, -1])


def test_a_closed_reader_opens_again(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(5))
    with VideoReader(path) as reader:
        assert frame_numbers(reader.read([0, 1])) == [0, 1]
    assert frame_numbers(reader.read([1, 2])) == [1, 2]
    reader.close()


def test_each_frame_is_transformed_once_as_it_is_decoded(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(12))
    seen = []

    def shrink(frame: np.ndarray) -> np.ndarray:
        seen.extend(frame_numbers(frame[None]))
        return fit_frame(frame, 16, 24, "contain")

    with VideoReader(path, transform=shrink) as reader:
        frames = reader.read([4, 3, 4, 5])
        assert frames.shape == (4, 16, 24, 3)
        assert frame_numbers(frames) == [4, 3, 4, 5]
        assert frame_numbers(reader.read([5, 6])) == [5, 6]  # 5 is kept from the call before
    assert seen == [3, 4, 5, 6]


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    num_frames, frame_bytes = 60, 240 * 320 * 3
    path = write_media(tmp_path / "a.mp4", numbered_frames(num_frames, 240, 320))
    with VideoReader(path) as reader:
        tracemalloc.start()
        for first in range(0, num_frames, 4):
            reader.read(range(first, first + 4))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 24 * frame_bytes


# ------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("case", GOLDEN["frame_sampling_cases"])
def test_constant_rates_sample_as_the_golden_cases(case: dict[str, list[int] | int]) -> None:
    rate = Fraction(str(case["source_fps"])).limit_denominator(1001)
    target = Fraction(str(case["target_fps"]))
    num_frames = case["frame_count"]
    timeline = Timeline(times=np.arange(num_frames), end=num_frames, time_base=1 / rate)
    count = timeline.count_frames(target)
    assert count == case["target_count"]
    assert timeline.nearest_frames(target, count).tolist() == case["indices"]


@pytest.mark.parametrize(("fps", "start_s"), [("12.5", 1.0), ("25", 10.5), ("25", 0.02)])
def test_a_start_half_way_between_two_frames_keeps_every_frame_once(
    fps: str, start_s: float
) -> None:
    rate = Fraction(fps)
    timeline = Timeline(times=np.arange(400), end=400, time_base=1 / rate)
    first = int(Fraction(start_s).limit_denominator(1000) * rate) + 1
    taken = timeline.nearest_frames(rate, 100, start_s)
    assert taken.tolist() == list(range(first, first + 100))


def test_of_two_frames_equally_near_the_even_one_is_taken() -> None:
    timeline = Timeline(times=np.arange(6), end=6, time_base=Fraction(1, 10))
    assert timeline.nearest_frames(Fraction(20), 12).tolist() == [
        0,
        0,
        1,
        2,
        2,
        2,
        3,
        4,
        4,
        4,
        5,
        5,
    ]


def test_variable_rates_are_sampled_by_time(tmp_path: Path) -> None:
    """By number, frame 5 would be shown at 0.2 s, where the file shows frame 6."""
    times = [0, 10, 20, 30, 100, 110, 120, 200, 300, 400]  # hundredths of a second
    path = write_media(
        tmp_path / "vfr.mkv", numbered_frames(10), times=times, time_base=Fraction(1, 100)
    )
    with VideoReader(path, rate=2, end_s=4.5) as reader:
        # 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5 and, if the last frame lasts that long, 4 s
        assert frame_numbers(reader.read(range(8))) == [0, 3, 4, 6, 7, 8, 8, 8]
    with VideoReader(path, rate=10, start_s=0.98, end_s=1.28) as reader:
        assert frame_numbers(reader.read(range(len(reader)))) == [4, 5, 6]


def test_rates_and_ranges_of_a_constant_rate_file(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(50), rate=25)
    with VideoReader(path, rate=12.5) as reader:
        assert reader.rate == Fraction(25, 2)
        assert frame_numbers(reader.read(range(len(reader)))) == list(range(0, 50, 2))
    with VideoReader(path, start_s=0.4, end_s=0.8) as reader:
        assert frame_numbers(reader.read(range(len(reader)))) == list(range(10, 20))
    with VideoReader(path, rate=50, start_s=1.96) as reader:
        assert frame_numbers(reader.read(range(len(reader)))) == [49, 49]
    with VideoReader(path, end_s=100) as reader:
        assert len(reader) == 50
    with VideoReader(path, rate=5, start_s=1.9) as reader:  # less than one frame at this rate
        assert len(reader) == 1


def test_empty_ranges_and_impossible_rates_are_refused(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(50), rate=25)

    def message(**options: float) -> str:
        with pytest.raises(SettingsError) as caught:
            VideoReader(path, **options)
        return str(caught.value)

    assert message(start_s=2.0) == f"start 2 s is not within {path}, which lasts 2.000 s."
    assert message(start_s=-1) == f"start -1 s is not within {path}, which lasts 2.000 s."
    assert message(start_s=1, end_s=0.5) == "end 0.5 s is not after start 1 s."
    assert message(rate=0) == "frame rate 0 is out of range. Use 0.001 to 1000."
    assert message(rate=float("nan")) == ("frame rate nan is out of range. Use 0.001 to 1000.")
    assert message(rate=1e6) == "frame rate 1e+06 is out of range. Use 0.001 to 1000."


def test_rates_become_fractions() -> None:
    assert as_rate(29.97) == Fraction(2997, 100)
    assert as_rate(30000 / 1001) == Fraction(30000, 1001)
    assert as_rate(Fraction(24000, 1001)) == Fraction(24000, 1001)
    assert as_rate(16) == 16


# ----------------------------------------------------------------------------------- picture


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (0, ["red", "green", "blue", "white"]),
        (90, ["green", "blue", "white", "red"]),
        (180, ["blue", "white", "red", "green"]),
        (-90, ["white", "red", "green", "blue"]),
    ],
)
def test_rotation_is_applied(tmp_path: Path, rotation: int, expected: list[str]) -> None:
    path = write_media(tmp_path / "turned.mp4", corner_frame()[None], rotation=rotation)
    info = info_of(path)
    assert info.rotation == rotation % 360
    assert (info.height, info.width) == ((32, 48) if rotation in {0, 180} else (48, 32))
    with VideoReader(path) as reader:
        frame = reader.read([0])[0]
    assert frame.shape == (info.height, info.width, 3)
    assert corners(frame) == expected


def test_pixels_become_square(tmp_path: Path) -> None:
    path = write_media(
        tmp_path / "wide.mp4", corner_frame()[None], sample_aspect=Fraction(4, 3), rotation=90
    )
    info = info_of(path)
    assert (info.height, info.width) == (64, 32)
    with VideoReader(path) as reader:
        frame = reader.read([0])[0]
    assert frame.shape == (64, 32, 3)
    assert corners(frame) == ["green", "blue", "white", "red"]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [
        ("ffv1", "yuv420p10le", "mkv"),
        ("libx264", "yuv420p10le", "mp4"),
        ("prores_ks", "yuv422p10le", "mov"),
        ("mjpeg", "yuvj420p", "mkv"),
        ("ffv1", "gray", "mkv"),
        ("png", "rgba", "mov"),
        ("libvpx-vp9", "yuva420p", "webm"),
    ],
)
def test_pixel_formats(tmp_path: Path, codec: str, pixel_format: str, suffix: str) -> None:
    frames = numbered_frames(60)[::6]
    path = write_media(tmp_path / f"a.{suffix}", frames, codec=codec, pixel_format=pixel_format)
    with VideoReader(path) as reader:
        read = reader.read(range(10))
    assert read.dtype == np.uint8
    np.testing.assert_allclose(read.mean(axis=(1, 2)), frames.mean(axis=(1, 2)), atol=3)


def test_odd_sizes(tmp_path: Path) -> None:
    frames = moving_frames(3, 33, 47)
    path = write_media(tmp_path / "odd.mkv", frames, codec="ffv1", pixel_format="bgr0")
    info = info_of(path)
    assert (info.height, info.width) == (33, 47)
    with VideoReader(path) as reader:
        np.testing.assert_array_equal(reader.read([0, 2]), frames[[0, 2]])


@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("colorspace", [Colorspace.ITU709, Colorspace.ITU601, None])
def test_colours_follow_the_tags(
    tmp_path: Path, colorspace: Colorspace | None, color_range: ColorRange
) -> None:
    """The wrong matrix shifts green by about 30."""
    frame = corner_frame()
    path = write_media(
        tmp_path / "a.mkv",
        frame[None],
        codec="ffv1",
        pixel_format="yuv444p",
        colorspace=colorspace,
        color_range=color_range,
    )
    with VideoReader(path) as reader:
        np.testing.assert_allclose(reader.read([0])[0], frame, atol=2)


def test_colours_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    path = write_media(
        tmp_path / "a.mp4",
        corner_frame()[None],
        pixel_format="yuv444p",
        options={"x264-params": "colormatrix=ictcp"},
    )
    with VideoReader(path) as reader, pytest.raises(MediaError) as caught:
        reader.read([0])
    assert str(caught.value) == (
        f"{path} has colours that cannot be converted (Operation not supported). "
        "Convert it to H.264 with BT.709 colours first."
    )


# ----------------------------------------------------------------------------------- writing


def test_colours_are_really_converted_with_the_matrix_that_is_tagged(tmp_path: Path) -> None:
    frame = corner_frame()
    path = write_part(tmp_path / "a.mp4", frame[None], crf=1)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == ColorRange.MPEG
        assert (stream.codec_context.name, context.pix_fmt) == ("h264", "yuv420p")
        decoded = next(container.decode(stream))
        red, green, blue, white = (
            tuple(int(plane[y * plane.shape[0] // 4, x * plane.shape[1] // 4]) for plane in planes)
            for planes in [yuv_planes(decoded)]
            for y, x in ((1, 1), (1, 3), (3, 3), (3, 1))
        )
    # BT.709 in limited range, by hand; BT.601 would give red (81, 90, 240).
    np.testing.assert_allclose(red, (63, 102, 240), atol=1)
    np.testing.assert_allclose(green, (173, 42, 26), atol=1)
    np.testing.assert_allclose(blue, (32, 240, 118), atol=1)
    np.testing.assert_allclose(white, (235, 128, 128), atol=1)
    with VideoReader(path) as reader:
        read = reader.read([0])[0]
    np.testing.assert_allclose(read[8::16, 12::24], frame[8::16, 12::24], atol=3)


def test_a_file_for_old_readers_has_the_matrix_that_they_take_for_granted(tmp_path: Path) -> None:
    frame = corner_frame()
    with VideoWriter(
        tmp_path / "a.mp4", height=32, width=48, rate=25, crf=1, matrix="bt601"
    ) as writer:
        writer.write(frame[None])
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.colorspace == Colorspace.ITU601
        planes = yuv_planes(next(container.decode(stream)))
    np.testing.assert_allclose([int(plane[1, 1]) for plane in planes], (81, 90, 240), atol=1)
    with VideoReader(tmp_path / "a.mp4") as reader:
        read = reader.read([0])[0]
    np.testing.assert_allclose(read[8::16, 12::24], frame[8::16, 12::24], atol=3)


def yuv_planes(frame: av.VideoFrame) -> list[np.ndarray]:
    height, width = frame.height, frame.width
    flat = frame.to_ndarray().reshape(-1)
    luma, chroma = height * width, height * width // 4
    shape = (height // 2, width // 2)
    return [
        flat[:luma].reshape(height, width),
        flat[luma : luma + chroma].reshape(shape),
        flat[luma + chroma :].reshape(shape),
    ]


@pytest.mark.parametrize("codec", ["h264", "h265"])
@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), 12.5])
def test_written_files_have_all_frames_at_the_rate(
    tmp_path: Path, codec: str, rate: Fraction | float
) -> None:
    for num_frames in (1, 2, 17):
        frames = numbered_frames(num_frames, 128, 128)
        path = write_part(tmp_path / "a.mp4", frames, rate=rate, codec=codec, preset="medium")
        info = info_of(path)
        assert (info.rate, info.num_frames) == (as_rate(rate), num_frames)
        assert first_frame_s(path) == 0
        with av.open(str(path)) as container:
            name = container.streams.video[0].codec_context.name
            assert name == {"h264": "h264", "h265": "hevc"}[codec]
        times, decoded = decode_video(path)
        assert times[0] == 0
        assert len(set(np.diff(times))) <= 1
        assert frame_numbers(decoded) == list(range(num_frames))
        assert mp4_boxes(path).index("moov") < mp4_boxes(path).index("mdat")


def test_h265_is_silent_and_marked_for_apple_players(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_part(tmp_path / "a.mp4", numbered_frames(3, 128, 128), codec="h265")
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.codec_tag == "hvc1"
    joined = tmp_path / "joined.mp4"
    join_videos([path, path], joined)
    with av.open(str(joined)) as container:
        assert container.streams.video[0].codec_context.codec_tag == "hvc1"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, codec: str) -> None:
    frames = moving_frames(12, 128, 128)
    first = write_part(tmp_path / "a.mp4", frames, codec=codec, preset="medium", threads=2)
    second = write_part(tmp_path / "b.mp4", frames, codec=codec, preset="medium", threads=2)
    assert first.read_bytes() == second.read_bytes()


def test_the_bytes_do_not_depend_on_what_was_in_memory(tmp_path: Path) -> None:
    """x264's macroblock tree read past its buffers, so that the same run gave other bytes."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (18, 18, 3)).repeat(8, axis=0).repeat(8, axis=1)
    frames = np.stack([np.roll(picture, (2 * n, 3 * n), (0, 1)) for n in range(9)])
    frames = (frames + rng.integers(-20, 20, frames.shape)).clip(0, 255).astype(np.uint8)
    contents = set()
    for number in range(8):
        blocks = [np.full(size, 31 * number, np.uint8) for size in rng.integers(1000, 300_000, 50)]
        del blocks  # leaves its bytes in freed memory
        path = write_part(tmp_path / f"{number}.mp4", frames, preset="medium")
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_groups_of_pictures_are_closed(tmp_path: Path) -> None:
    path = write_part(tmp_path / "a.mp4", numbered_frames(1), preset="medium")
    assert b"open_gop=0" in path.read_bytes()
    # x265 opens its groups by default: its second key frame is then of type 21 instead of 19 or 20.
    frames = np.zeros((256, 128, 128, 3), np.uint8)
    path = write_part(tmp_path / "b.mp4", frames, codec="h265")
    with av.open(str(path)) as container:
        keys = [bytes(packet) for packet in container.demux(video=0) if packet.is_keyframe]
    assert len(keys) == 2
    assert keys[1][4] >> 1 in {19, 20}


def test_settings_of_the_encoder_change_the_file(tmp_path: Path) -> None:
    frames = moving_frames(12)
    sizes = {
        write_part(tmp_path / "a.mp4", frames, **settings).stat().st_size
        for settings in ({}, {"crf": 40}, {"preset": "slow"}, {"lossless": True})
    }
    assert len(sizes) == 4


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_lossless_keeps_every_pixel_but_for_rounding(tmp_path: Path, codec: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    path = write_part(tmp_path / "a.mp4", frames, codec=codec, lossless=True)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv444p"
    with VideoReader(path) as reader:
        assert np.abs(reader.read(range(3)).astype(int) - frames).max() <= 2


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    def message(**settings: object) -> str:
        options = {"width": 48, "height": 32, "rate": 25, **settings}
        with pytest.raises(SettingsError) as caught, VideoWriter(tmp_path / "a.mp4", **options):
            pass
        return str(caught.value)

    assert message(width=47) == (
        "video size 47x32 cannot be encoded. Use an even width and height."
    )
    assert message(height=0) == "video size 48x0 cannot be encoded. Use an even width and height."
    assert message(crf=52) == "crf 52 is out of range. Use 0 (best) to 51."
    assert message(threads=0) == "threads 0 is out of range. Use at least 1."
    assert message(rate=-1) == "frame rate -1 is out of range. Use 0.001 to 1000."
    assert message(codec="h265") == (
        "video size 48x32 is too small for h265. Use at least 128x128, or h264."
    )
    assert message(preset="quick") == (
        "preset 'quick' or size 48x32 was refused by the h264 encoder."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail() -> None:
        with VideoWriter(path, width=48, height=32, rate=25) as writer:
            writer.write(numbered_frames(30))
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError, match=r"no frame was written to .*a\.mp4"):
        write_part(path, numbered_frames(0))
    with (
        pytest.raises(ValueError, match=r"frames uint8 \(1, 32, 50, 3\), not uint8 \(32, 48, 3\)"),
        VideoWriter(path, width=48, height=32, rate=25) as writer,
    ):
        writer.write(numbered_frames(1, 32, 50))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    """PyAV tells it when packets are written or, for short files, only when the file ends."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), np.uint8)
    path = tmp_path / "a.mp4"
    for num_frames in (1, 30):
        with file_size_limit(3000), pytest.raises(OSError, match="File too large") as caught:
            write_part(path, noise[:num_frames], crf=0)
        assert caught.value.errno == errno.EFBIG
        assert list(tmp_path.iterdir()) == []
    part = write_part(tmp_path / "part.mp4", noise)
    with file_size_limit(3000), pytest.raises(OSError, match="File too large") as caught:
        join_videos([part], path)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [part]


def test_pyav_tells_a_full_disk_by_its_number() -> None:
    error = av.error.OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_part(tmp_path / "missing" / "a.mp4", numbered_frames(1))


# ----------------------------------------------------------------------------------- joining


@pytest.mark.parametrize("codec", ["h264", "h265"])
@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
def test_joined_parts_play_as_one_video(tmp_path: Path, codec: str, rate: Fraction | float) -> None:
    frames = moving_frames(29, 128, 128)
    lengths = [1, 2, 11, 1, 1, 13]
    ends = np.cumsum(lengths)
    parts = [
        write_part(
            tmp_path / f"{index}.mp4",
            frames[end - length : end],
            rate=rate,
            codec=codec,
            preset="medium",
        )
        for index, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]
    output = tmp_path / "joined.mp4"
    assert join_videos(parts, output) == "absent"
    expected = np.concatenate([decode_video(part)[1] for part in parts])
    times, decoded = decode_video(output)
    np.testing.assert_array_equal(decoded, expected)
    assert times[0] == 0
    assert len(set(np.diff(times))) == 1
    info = info_of(output)
    assert (info.rate, info.num_frames) == (as_rate(rate), 29)
    assert first_frame_s(output) == 0
    assert info.duration_s == float(29 / as_rate(rate))
    boxes = mp4_boxes(output)
    assert boxes.index("moov") < boxes.index("mdat")
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == as_rate(rate)
        assert stream.codec_context.colorspace == Colorspace.ITU709
        decode_times = [packet.dts for packet in container.demux(stream) if packet.size]
    assert decode_times == sorted(set(decode_times))
    # Random access works across the seams.
    with VideoReader(output) as reader:
        np.testing.assert_array_equal(reader.read(range(28, -1, -1)), expected[::-1])
    again = tmp_path / "again.mp4"
    join_videos(parts, again)
    assert again.read_bytes() == output.read_bytes()


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    frames = numbered_frames(5)
    first = write_part(tmp_path / "first.mp4", frames)
    output = tmp_path / "joined.mp4"

    def message(*others: Path) -> str:
        with pytest.raises(MediaError) as caught:
            join_videos([first, *others], output)
        assert not output.exists()
        return str(caught.value)

    for other in (
        write_part(tmp_path / "slower.mp4", frames, rate=24),
        write_part(tmp_path / "larger.mp4", numbered_frames(5, 48, 64)),
        write_part(tmp_path / "tools.mp4", frames, preset="medium"),
    ):
        assert message(other) == (
            f"{other} has another rate or encoding than {first}, so the two cannot be joined. "
            "Write both with the same settings."
        )
    torn = cut_file(first, tmp_path / "torn.mp4", -20)
    assert message(torn) == damage_message(torn, 0.16)
    uneven = write_media(
        tmp_path / "uneven.mp4", frames, times=[0, 1, 2, 3, 9], time_base=Fraction(1, 25)
    )
    assert message(uneven) == f"{uneven} has no constant frame rate, so it cannot be joined."
    foreign = write_media(tmp_path / "foreign.gif", frames, codec="gif", pixel_format="rgb8")
    assert message(foreign) == f"{foreign} holds gif video, which cannot be joined."
    missing = tmp_path / "missing.mp4"
    assert message(missing) == f"{missing} does not exist. Give the path of a video file."
    with pytest.raises(ValueError, match="there are no parts to join"):
        join_videos([], output)


# ------------------------------------------------------------------------------------- sound


@pytest.fixture(scope="module")
def silent_part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.4 seconds of video."""
    return write_part(tmp_path_factory.mktemp("part") / "part.mp4", numbered_frames(60))


SOUNDS = {
    "aac in mp4": ("mp4", "aac", 44100, "copied"),
    "aac in matroska": ("mkv", "aac", 44100, "copied"),
    "aac in a transport stream": ("ts", "aac", 48000, "copied"),
    "mp3 in mp4": ("mp4", "libmp3lame", 44100, "copied"),
    "ac3 in matroska": ("mkv", "ac3", 44100, "copied"),
    "opus in matroska": ("mkv", "libopus", 48000, "copied"),
    "flac in matroska": ("mkv", "flac", 44100, "copied"),
    "pcm in mov": ("mov", "pcm_s16le", 44100, "re-encoded"),
    "pcm of a high rate": ("mkv", "pcm_s24le", 96000, "re-encoded"),
    "vorbis in matroska": ("mkv", "vorbis", 44100, "re-encoded"),
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_sound_stays_in_sync(tmp_path: Path, silent_part: Path, kind: str) -> None:
    suffix, codec, sample_rate, outcome = SOUNDS[kind]
    source = write_media(
        tmp_path / f"source.{suffix}",
        numbered_frames(60).repeat(2, axis=0),
        sound=tone_bursts(4.5, sample_rate),
        sound_codec=codec,
        sound_rate=sample_rate,
    )
    output = tmp_path / "joined.mp4"
    for start_s in (0.0, 0.77, 1.8):
        audio = AudioSource(path=source, start_s=start_s)
        assert join_videos([silent_part], output, audio=audio) == outcome
        bursts = [k + 0.5 - start_s for k in range(5) if 0 <= k + 0.5 - start_s < 2.4]
        assert burst_times(output) == pytest.approx(bursts, abs=0.005)
        assert sound_length(output) == pytest.approx(2.4, abs=ONE_PACKET_S)
        times, frames = decode_video(output)
        assert (times[0], frame_numbers(frames)) == (0, list(range(60)))
        with av.open(str(output)) as container:
            assert container.duration / av.time_base <= 2.4 + ONE_PACKET_S
            expected = "aac" if outcome == "re-encoded" else codec.removeprefix("lib")
            name = container.streams.audio[0].codec_context.codec.canonical_name
            assert name == expected.removesuffix("lame")
    again = tmp_path / "again.mp4"
    join_videos([silent_part], again, audio=audio)
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_copied_sound_has_the_same_packets(tmp_path: Path, silent_part: Path, suffix: str) -> None:
    source = write_media(
        tmp_path / f"source.{suffix}", numbered_frames(60), sound=tone_bursts(2.4, 44100)
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))

    def packets(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    with av.open(str(output)) as container:
        times = [packet.pts for packet in container.demux(audio=0) if packet.size]
    assert set(np.diff(times)) == {1024}
    copied = packets(output)
    assert copied == packets(source)[: len(copied)]
    assert len(copied) >= 2.4 * 44100 / 1024


def test_sound_files_begin_with_their_first_sound(tmp_path: Path, silent_part: Path) -> None:
    output = tmp_path / "joined.mp4"
    sound = tone_bursts(3, 44100)
    for name, codec, outcome in (
        ("a.wav", "pcm_s16le", "re-encoded"),
        ("a.mp3", "libmp3lame", "copied"),
        ("a.m4a", "aac", "copied"),
        ("a.aac", "aac", "copied"),
    ):
        source = write_media(tmp_path / name, sound=sound, sound_codec=codec)
        audio = AudioSource(path=source, start_s=0.25)
        assert join_videos([silent_part], output, audio=audio) == outcome
        assert burst_times(output) == pytest.approx([0.25, 1.25, 2.25], abs=ONE_PACKET_S)
    late = write_media(tmp_path / "late.mka", sound=sound, sound_at_s=3)
    cover = write_cover_sound(tmp_path / "cover.mp3", sound)
    for source in (late, cover):
        assert join_videos([silent_part], output, audio=AudioSource(path=source)) == "copied"
        assert burst_times(output) == pytest.approx([0.5, 1.5], abs=2 * ONE_PACKET_S)


def test_times_rounded_to_milliseconds_do_not_cut_up_the_sound(
    tmp_path: Path, silent_part: Path
) -> None:
    """Placed by its rounded times, each packet would leave a gap or lose samples."""
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(3 * 44100) / 44100)
    source = write_media(
        tmp_path / "source.mkv",
        numbered_frames(60),
        sound=np.repeat(tone[None].astype(np.float32), 2, axis=0),
        sound_codec="pcm_s16le",
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))
    with av.open(str(output)) as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    inner = slice(4000, 100_000)
    np.testing.assert_allclose(heard[inner], tone[inner], atol=0.05)


def test_resampled_sound_keeps_its_last_samples(tmp_path: Path, silent_part: Path) -> None:
    source = write_media(
        tmp_path / "source.wav",
        sound=tone_bursts(1, 96000),
        sound_codec="pcm_s16le",
        sound_rate=96000,
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))
    with av.open(str(output)) as container:
        last = [packet for packet in container.demux(audio=0) if packet.size][-1]
        assert last.pts + last.duration == 48000


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_that_is_too_short_simply_stops(
    tmp_path: Path, silent_part: Path, codec: str
) -> None:
    source = write_media(
        tmp_path / "source.mkv",
        numbered_frames(25),
        sound=tone_bursts(1, 44100),
        sound_codec=codec,
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))
    assert burst_times(output) == pytest.approx([0.5], abs=0.005)
    assert sound_length(output) == pytest.approx(1, abs=2 * ONE_PACKET_S)
    assert info_of(output).num_frames == 60


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_that_begins_later_than_the_picture_stays_late(
    tmp_path: Path, silent_part: Path, codec: str
) -> None:
    source = write_media(
        tmp_path / "source.mkv",
        numbered_frames(60),
        sound=tone_bursts(1.5, 44100),
        sound_codec=codec,
        sound_at_s=Fraction(3, 4),
    )
    output = tmp_path / "joined.mp4"
    for start_s, expected in ((0.0, [1.25]), (0.5, [0.75]), (1.0, [0.25])):
        join_videos([silent_part], output, audio=AudioSource(path=source, start_s=start_s))
        assert burst_times(output) == pytest.approx(expected, abs=0.005)


def test_a_picture_that_begins_late_takes_the_sound_along(
    tmp_path: Path, silent_part: Path
) -> None:
    """The sound counts from the first frame, not from the file's time 0."""
    source = write_media(
        tmp_path / "source.mkv",
        numbered_frames(60),
        times=range(10, 70),
        sound=tone_bursts(2.8, 44100),
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))
    assert burst_times(output) == pytest.approx([0.1, 1.1, 2.1], abs=0.005)


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_a_gap_in_the_sound_stays_a_gap(tmp_path: Path, silent_part: Path, codec: str) -> None:
    source = write_media(
        tmp_path / "source.mkv",
        numbered_frames(60),
        sound=tone_bursts(2, 44100),
        sound_codec=codec,
        sound_gap=(40 * 1024, 17640),
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))
    assert burst_times(output) == pytest.approx([0.5, 1.9], abs=0.005)


def test_no_sound_is_told(tmp_path: Path, silent_part: Path) -> None:
    output = tmp_path / "joined.mp4"
    assert join_videos([silent_part], output, audio=AudioSource(path=silent_part)) == "absent"
    for codec in ("aac", "pcm_s16le"):
        source = write_media(
            tmp_path / "source.mkv",
            numbered_frames(60),
            sound=tone_bursts(1, 44100),
            sound_codec=codec,
        )
        audio = AudioSource(path=source, start_s=2.0)
        assert join_videos([silent_part], output, audio=audio) == "absent"
        assert sound_length(output) == 0


def test_sound_of_an_unknown_format_is_left_out(tmp_path: Path, silent_part: Path) -> None:
    source = write_media(tmp_path / "a.mkv", numbered_frames(9), sound=tone_bursts(1, 44100))
    source.write_bytes(source.read_bytes().replace(b"A_AAC", b"A_AAX"))
    output = tmp_path / "joined.mp4"
    assert join_videos([silent_part], output, audio=AudioSource(path=source)) == "absent"


def test_damaged_sound_is_refused_and_leaves_nothing(tmp_path: Path, silent_part: Path) -> None:
    """The packets of this file are found, but their headers say nothing that MP4 can store."""
    source = write_media(tmp_path / "a.ts", numbered_frames(9), sound=tone_bursts(1, 44100))
    with av.open(str(source)) as container:
        first = bytes(next(packet for packet in container.demux(audio=0) if packet.pts))
    data = source.read_bytes()
    position = data.index(first[:7])
    data = data[:position] + data[position : position + 2] + b"\xff" + data[position + 3 :]
    source.write_bytes(data)
    output = tmp_path / "joined.mp4"
    with pytest.raises(MediaError) as caught:
        join_videos([silent_part], output, audio=AudioSource(path=source))
    assert str(caught.value) == (
        f"{output} cannot be put together from its parts and sound: Invalid data found when "
        "processing input. One of them is damaged."
    )
    assert list(tmp_path.iterdir()) == [source]


def test_sound_and_picture_are_interleaved(tmp_path: Path, silent_part: Path) -> None:
    source = write_media(
        tmp_path / "source.mp4", numbered_frames(60), sound=tone_bursts(2.4, 44100)
    )
    output = tmp_path / "joined.mp4"
    join_videos([silent_part], output, audio=AudioSource(path=source))
    with av.open(str(output)) as container:
        order = sorted(
            (packet.pos, packet.dts * packet.time_base)
            for packet in container.demux()
            if packet.size
        )
    times = [time for _, time in order]
    assert all(later > earlier - 1 for earlier, later in itertools.pairwise(times))


def test_sound_whose_time_starts_anew_ends_there(tmp_path: Path, silent_part: Path) -> None:
    """Transport streams put end to end play on, but their time stamps repeat."""
    once = write_media(tmp_path / "once.ts", numbered_frames(40), sound=tone_bursts(1.6, 44100))
    twice = tmp_path / "twice.ts"
    twice.write_bytes(2 * once.read_bytes())
    output = tmp_path / "joined.mp4"
    assert join_videos([silent_part], output, audio=AudioSource(path=twice)) == "copied"
    assert burst_times(output) == pytest.approx([0.5, 1.5], abs=0.005)


def test_sound_that_cannot_be_opened_is_refused(tmp_path: Path, silent_part: Path) -> None:
    output = tmp_path / "joined.mp4"
    text = tmp_path / "text.mp3"
    text.write_text("this is no sound\n" * 99)
    with pytest.raises(MediaError, match="cannot be read as a video"):
        join_videos([silent_part], output, audio=AudioSource(path=text))
    assert not output.exists()


def test_a_large_join_holds_few_packets(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part.mp4", numbered_frames(3))
    output = tmp_path / "joined.mp4"
    parts = [shutil.copy(part, tmp_path / f"{index}.mp4") for index in range(40)]
    assert join_videos([Path(path) for path in parts], output) == "absent"
    assert frame_numbers(decode_video(output)[1]) == [0, 1, 2] * 40


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = write_media(tmp_path / "a.mp4", moving_frames(30), options=SHORT_GROUPS)
    _, position, size = packet_positions(whole)[20]
    hurt = overwrite_bytes(whole, tmp_path / "hurt.mp4", position, size)
    with VideoReader(hurt) as reader, pytest.raises(MediaError):
        reader.read(range(30))
    write_part(tmp_path / "b.mp4", moving_frames(3))
    assert capfd.readouterr() == ("", "")
