from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from media import corner_frame, corners, moving_frames
from PIL import Image
from pose_golden import GOLDEN

from everanimate_cli.errors import MediaError, SettingsError
from everanimate_cli.images import (
    contain_box,
    fit_frame,
    fit_points,
    fit_size,
    read_image,
    write_png,
)
from everanimate_cli.settings import Fit

Case = dict[str, Any]
ORIENTATION_TAG = 0x0112


def test_a_plain_picture_is_read_as_it_is(tmp_path: Path) -> None:
    frame = moving_frames(1)[0]
    Image.fromarray(frame).save(tmp_path / "plain.png")
    read = read_image(tmp_path / "plain.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, frame)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, ["red", "green", "blue", "white"]),
        (2, ["green", "red", "white", "blue"]),
        (3, ["blue", "white", "red", "green"]),
        (6, ["white", "red", "green", "blue"]),
        (8, ["green", "blue", "white", "red"]),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, expected: list[str]) -> None:
    image = Image.fromarray(corner_frame())
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "turned.jpg")
    assert corners(read) == expected
    assert read.shape == ((48, 32, 3) if orientation in {6, 8} else (32, 48, 3))


def test_grey_palette_and_bilevel_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "grey.png"), np.full((4, 6, 3), 77, np.uint8)
    )
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png")[0, 0], [10, 20, 30])
    Image.new("1", (6, 4), 1).save(tmp_path / "bilevel.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bilevel.png")[0, 0], [255, 255, 255])


def test_transparency_is_composed_on_black(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), (200, 100, 50, 128)).save(tmp_path / "alpha.png")
    np.testing.assert_allclose(read_image(tmp_path / "alpha.png")[0, 0], [100, 50, 25], atol=1)
    Image.new("LA", (6, 4), (200, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png")[0, 0], [0, 0, 0])
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "clear_colour.gif", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "clear_colour.gif")[0, 0], [0, 0, 0])
    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "key.png", transparency=(9, 8, 7))
    np.testing.assert_array_equal(read_image(tmp_path / "key.png")[0, 0], [0, 0, 0])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    """Pillow's own conversion of 16-bit grey clips at 255, so that the picture turns white."""
    grey: npt.NDArray[np.uint16] = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 1, 128, 255])


def test_sixteen_bit_colour_is_scaled(tmp_path: Path) -> None:
    deep = np.zeros((2, 3, 3), np.uint16)
    deep[...] = (65535, 32896, 0)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[0, 0], [255, 128, 0])


def test_cmyk_is_accepted(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "print.jpg")[8, 8], [0, 255, 0], atol=3)


def test_of_an_animation_the_first_picture_counts(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pictures[0].save(
        tmp_path / "two.webp", save_all=True, append_images=pictures[1:], lossless=True
    )
    np.testing.assert_array_equal(read_image(tmp_path / "two.webp")[0, 0], [255, 0, 0])


def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(MediaError) as caught:
            read_image(path)
        return str(caught.value)

    missing = tmp_path / "missing.png"
    assert message(missing) == f"{missing} does not exist. Give the path of a picture file."
    assert message(tmp_path) == f"{tmp_path} is a folder. Give the path of a picture file."
    empty = tmp_path / "empty.png"
    empty.touch()
    assert message(empty) == f"{empty} is empty (0 bytes). Give another picture file."
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert message(text) == (
        f"{text} is not a picture in a known format. Give a PNG, JPEG or WebP file."
    )
    whole = tmp_path / "whole.png"
    write_png(whole, moving_frames(1)[0])
    torn = tmp_path / "torn.png"
    torn.write_bytes(whole.read_bytes()[:-100])
    assert message(torn) == (
        f"{torn} cannot be read as a picture: image file is truncated. "
        "Give a PNG, JPEG or WebP file."
    )
    floating = tmp_path / "floating.tif"
    Image.fromarray(np.ones((4, 6), np.float32)).save(floating)
    assert message(floating) == (
        f"{floating} cannot be read as a picture: it holds floating-point values of unknown "
        "range. Give a PNG, JPEG or WebP file."
    )
    deep = tmp_path / "deep.tif"
    Image.fromarray(np.full((4, 6), 70000, np.int32)).save(deep)
    assert message(deep) == (
        f"{deep} cannot be read as a picture: its grey values need more than 16 bits. "
        "Give a PNG, JPEG or WebP file."
    )


def test_a_decompression_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "bomb.png"
    Image.new("L", (40, 30)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(MediaError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path} has too many pixels. Give a smaller picture."
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # Pillow refuses twice as many
    assert read_image(path).shape == (30, 40, 3)
    assert not recwarn.list


def test_damage_anywhere_gives_a_picture_or_a_clear_error(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Pillow raises many kinds of exception on damaged bytes, and warns; none may come through."""
    messages = []
    rng = np.random.default_rng(0)
    image = Image.fromarray(moving_frames(1)[0])
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif", "ppm", "ico", "tga"):
        whole = tmp_path / f"whole.{suffix}"
        image.save(whole)
        for _ in range(30):
            data = bytearray(whole.read_bytes())
            for position in rng.integers(0, min(len(data), 400), 6):
                data[position] = rng.integers(256)
            path = tmp_path / f"hurt.{suffix}"
            path.write_bytes(data[: rng.integers(1, len(data) + 1)])
            try:
                read_image(path)
            except MediaError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert all("hurt." in message and "\n" not in message for message in messages)
    assert not recwarn.list


def test_png_round_trip_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    frames = moving_frames(2)
    path = tmp_path / "frame.png"
    write_png(path, frames[0])
    first = path.read_bytes()
    write_png(path, frames[1])
    np.testing.assert_array_equal(read_image(path), frames[1])
    write_png(path, frames[0])
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("case", GOLDEN["canvas_size_cases"])
def test_canvas_size_and_content_equal_the_golden_ones(case: Case) -> None:
    (source_width, source_height), (width, height) = case["source"], case["canvas"]
    assert fit_size(source_height, source_width, case["area"], 16) == (height, width)
    left, top, content_width, content_height = case["content_rect_xywh"]
    box = contain_box(source_height, source_width, height, width)
    assert box == (top, left, content_height, content_width)


@pytest.mark.parametrize("case", GOLDEN["letterbox_cases"], ids=lambda case: case["name"])
def test_content_box_equals_the_golden_one(case: Case) -> None:
    left, top, content_width, content_height = case["content_rect_xywh"]
    sizes = ("source_height", "source_width", "canvas_height", "canvas_width")
    box = contain_box(*(case[name] for name in sizes))
    assert box == (top, left, content_height, content_width)


@pytest.mark.parametrize(
    ("source", "canvas", "expected"),
    [
        ((100, 200), (100, 200), (0, 0, 100, 200)),
        ((100, 200), (100, 100), (25, 0, 50, 100)),
        ((200, 100), (100, 100), (0, 25, 100, 50)),
        ((3, 4), (10, 10), (1, 0, 7, 10)),  # 7.5 rows floored to 7, margin 1.5 to 1
        ((1, 1000), (100, 100), (49, 0, 1, 100)),  # a tenth of a row is still drawn
        ((1000, 1), (100, 100), (0, 49, 100, 1)),
    ],
)
def test_content_box_by_hand(
    source: tuple[int, int], canvas: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert contain_box(*source, *canvas) == expected


def test_points_use_the_scale_of_the_floored_content() -> None:
    """4 x 3 px on 10 x 10: 2.5 across, but 7 rows for 3 down, and one row of margin."""
    points = np.array([[0, 0, 0.3], [4, 3, 0.9], [2, 1.5, np.nan]])
    np.testing.assert_allclose(
        fit_points(points, (3, 4), (10, 10), "contain"),
        [[0, 1, 0.3], [10, 8, 0.9], [5, 4.5, np.nan]],
        rtol=0,
        atol=1e-12,
    )


def test_canvas_size_by_hand() -> None:
    assert fit_size(480, 832, 832 * 480, 16) == (480, 832)
    assert fit_size(1080, 1920, 832 * 480, 16) == (464, 832)
    assert fit_size(10, 1000, 256, 16) == (16, 160)
    assert fit_size(100, 100, 1, 16) == (16, 16)
    # In floating point sqrt(area / aspect) is 751.9999 here, and the height one step short.
    assert fit_size(752, 1264, 752 * 1264, 16) == (752, 1264)
    with pytest.raises(SettingsError) as caught:
        fit_size(10, 10, 0, 16)
    assert str(caught.value) == "area 0 and multiple 16 must both be at least 1."


def test_contain_puts_black_bars_around_the_whole_frame() -> None:
    frame = np.full((20, 40, 3), 200, np.uint8)
    fitted = fit_frame(frame, 32, 48, "contain")  # content 24x48, bars of 4
    assert fitted.shape == (32, 48, 3)
    assert (fitted[:4] == 0).all()
    assert (fitted[4:28] == 200).all()
    assert (fitted[28:] == 0).all()
    fitted = fit_frame(frame, 10, 48, "contain")  # content 10x20
    assert (fitted[:, :14] == 0).all()
    assert (fitted[:, 14:34] == 200).all()
    assert (fitted[:, 34:] == 0).all()


def test_cover_cuts_both_sides_alike() -> None:
    frame = np.zeros((20, 60, 3), np.uint8)
    frame[:, 20:40] = 255
    np.testing.assert_array_equal(
        fit_frame(frame, 20, 20, "cover"), np.full((20, 20, 3), 255, np.uint8)
    )
    tall = frame.transpose(1, 0, 2).copy()
    np.testing.assert_array_equal(
        fit_frame(tall, 40, 40, "cover"), np.full((40, 40, 3), 255, np.uint8)
    )


def test_stretch_uses_the_whole_frame() -> None:
    fitted = fit_frame(corner_frame(32, 48), 16, 96, "stretch")
    assert fitted.shape == (16, 96, 3)
    assert corners(fitted) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("fit", ["contain", "cover", "stretch"])
def test_a_frame_that_fits_is_not_touched(fit: Fit) -> None:
    frame = moving_frames(1)[0]
    assert fit_frame(frame, 32, 48, fit) is frame


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2] = 200
    np.testing.assert_array_equal(
        fit_frame(stripes, 8, 8, "stretch"), np.full((8, 8, 3), 100, np.uint8)
    )
    edge = np.zeros((2, 2, 3), np.uint8)
    edge[:, 1] = 200
    enlarged = fit_frame(edge, 8, 8, "stretch")[0, :, 0].astype(int)
    assert list(enlarged) == sorted(enlarged)
    assert len(set(enlarged)) > 2


def test_a_sliver_keeps_at_least_one_pixel() -> None:
    assert fit_frame(np.full((1, 900, 3), 9, np.uint8), 32, 48, "contain").max() == 9
    assert fit_frame(np.full((1, 900, 3), 9, np.uint8), 900, 1, "cover").shape == (900, 1, 3)
