"""The report of an evaluation: its markup, its curves, its tables, its pictures."""

import base64
import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from evaluations import NEEDS_LPIPS, evaluation, made_up_test_set, method, metric, write_frames
from media import frame_numbers, numbered_frames
from PIL import Image

from everanimate_cli import report_sheets
from everanimate_cli.encode import VideoWriter
from everanimate_cli.errors import InputError, MediaError
from everanimate_cli.evaluation import FORMAT_VERSION
from everanimate_cli.metric_table import METRICS
from everanimate_cli.report import plot_png, write_report
from everanimate_cli.report_curves import (
    MAX_POINTS,
    Plot,
    clock,
    mean_curve,
    mean_of_videos,
    png_plots,
    svg_plot,
    time_ticks,
    value_range,
    value_ticks,
)
from everanimate_cli.report_frames import Thumbnail
from everanimate_cli.report_markup import Html, element, identifier, joined, plain
from everanimate_cli.report_tables import LABELS

NASTY = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """A page taken apart: elements, texts, and tables as rows of cell texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.row_pictures: list[list[str]] = []
        self.text_of: dict[str, str] = {}  # of style, script and title
        self._within: list[str] = []
        self._cell: list[str] | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in {"meta", "link", "img", "br"}:
            self._within.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.row_pictures.append([])
        elif tag in {"td", "th"}:
            self._cell = []
        elif tag == "img" and self.row_pictures and "tr" in self._within:
            self.row_pictures[-1].append(attributes["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._within.pop() == tag, f"</{tag}> does not close what is open"
        if tag in {"td", "th"} and self._cell is not None:
            self.rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._within and self._within[-1] in {"style", "script", "title"}:
            self.text_of.setdefault(self._within[-1], data)
        self.texts.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, *heads: str) -> list[str]:
        """The first row that begins with `heads[1]` at or after the one of `heads[0]`, ..."""
        rows = iter(self.rows)
        for head in heads:
            row = next(row for row in rows if row and row[0].startswith(head))
        return row


def pixels(uri: str) -> np.ndarray:
    """[H, W, 3] of a picture that is part of a page."""
    kind, data = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def written(folder: Path, results: dict[str, Any], **files: Any) -> Page:
    """A page without any file that is not named."""
    inputs: dict[str, Any] = {"videos": {}, "truth": None, "reference": None, "driving": None}
    path = folder / "report.html"
    write_report(results, path, **(inputs | files))
    return Page(path)


# --- markup --------------------------------------------------------------------------------------


def test_text_stays_text() -> None:
    made = element("a", NASTY, title=NASTY, class_="x", data_time=1.5, hidden=True, lang=None)
    text = "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;"
    assert made == f'<a title="{text}" class="x" data-time="1.5" hidden>{text}</a>'
    assert isinstance(made, Html)


def test_markup_is_not_escaped_twice() -> None:
    assert element("p", element("br"), joined("a<", Html("<i>"))) == "<p><br>a&lt;<i></p>"


def test_what_cannot_be_written_is_replaced() -> None:
    assert plain("a\udcffb\0c\nd") == "a?b\ufffdc\nd"


def test_identifiers_of_different_names_differ() -> None:
    assert identifier("psnr_2") == "psnr-95-2"
    assert len({identifier(name) for name in ("a b", "a-b", "a_b", "ab", "\u00e9")}) == 5


# --- curves --------------------------------------------------------------------------------------


def test_a_point_is_a_mean_with_student_interval() -> None:
    curve = mean_curve("a", [1, 2, 3, 4, 5], fps=2)
    assert curve.times_s.tolist() == [1.25]
    assert curve.stretch_s == 2.5
    assert curve.means.tolist() == [3]
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert curve.low.tolist() == [pytest.approx(3 - half, rel=1e-3)]
    assert curve.high.tolist() == [pytest.approx(3 + half, rel=1e-3)]


def test_decibels_are_averaged_as_errors() -> None:
    curve = mean_curve("a", [10, 20], fps=1, decibels=True)
    assert curve.means.tolist() == [pytest.approx(-10 * math.log10((0.1 + 0.01) / 2))]
    without_error = mean_curve("a", [math.inf, 20], fps=1, decibels=True)
    assert without_error.means.tolist() == [pytest.approx(20 + 10 * math.log10(2))]
    assert not mean_curve("a", [math.inf] * 9, fps=1, decibels=True).has_values


def test_a_curve_is_no_longer_for_a_longer_video() -> None:
    curve = mean_curve("a", list(range(90_000)), fps=25)
    assert len(curve.means) == MAX_POINTS
    assert curve.times_s[-1] + curve.stretch_s / 2 == pytest.approx(3600)
    assert np.all(np.diff(curve.means) > 0)


def test_missing_values_are_gaps() -> None:
    values: list[float | None] = [1.0] * 50 + [None] * 50 + [2.0] * 49 + [math.nan]
    curve = mean_curve("a", values, fps=1)
    gap = np.isnan(curve.means)
    assert gap[len(gap) // 2]
    assert not gap[[0, -1]].any()
    drawn = svg_plot(Plot("A", "", "", [curve]), "k")
    (path,) = re.findall(r'd="([^"]*)" class="curve', drawn)
    assert path.count("M") == 2


def test_few_values_make_few_points() -> None:
    values: list[float | None] = [None] * 1000
    values[::100] = [float(v) for v in range(10)]
    assert mean_curve("a", values, fps=1).means.tolist() == [2, 7]


def test_no_values_make_no_curve() -> None:
    assert not mean_curve("a", [None, math.nan], fps=1).has_values
    assert not mean_curve("a", [None], fps=1, decibels=True).has_values


def test_the_band_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    curves = [mean_curve("a", rng.normal(size=2400).tolist(), fps=25) for _ in range(20)]
    held = np.mean([(curve.low <= 0) & (curve.high >= 0) for curve in curves])
    assert held == pytest.approx(0.95, abs=0.03)


def test_a_curve_of_a_test_set_has_the_interval_over_videos() -> None:
    videos = [([float(level)] * 40, 4.0) for level in (1, 2, 6)]
    curve = mean_of_videos("a", videos)
    assert curve.means.tolist() == pytest.approx([3] * 8)
    half = 4.303 * math.sqrt(7) / math.sqrt(3)
    assert (curve.high - curve.means).tolist() == pytest.approx([half] * 8, rel=1e-3)
    assert curve.stretch_s == 1.25


def test_a_test_set_of_several_lengths_and_rates_is_averaged_by_time() -> None:
    long, short = [float(second) for second in range(20) for _ in range(5)], [100.0] * 20
    curve = mean_of_videos("a", [(long, 5.0), (short, 2.0)])  # 20 s and 10 s
    assert len(curve.means) == 20
    assert curve.means.tolist() == pytest.approx(
        [(100 + second) / 2 for second in range(10)] + list(range(10, 20))
    )
    assert np.isnan(curve.low).all()  # two videos say nothing of others


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (17.3, 25.9), (-0.002, 0.0007), (1e6, 1e6 + 3), (-5e-9, 7e-9)]
)
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = value_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    step = ticks[1] - ticks[0]
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert round(leading, 3) in {1, 2, 2.5, 5}
    edge = 1e-9 * max(abs(low), abs(high))
    assert all(low - edge <= tick <= high + edge for tick in ticks)


@pytest.mark.parametrize("end_s", [0.04, 0.6, 1, 10, 90, 149, 150, 3600, 36_000, 400_000])
def test_times_have_a_few_ticks(end_s: float) -> None:
    ticks = time_ticks(end_s)
    assert ticks[0] == 0
    assert ticks[-1] <= end_s * (1 + 1e-9)
    assert len(ticks) <= 8
    assert len(ticks) >= 2 or end_s < 0.1
    texts = [clock(tick, end_s) for tick in ticks]
    assert len(set(texts)) == len(texts)


def test_long_times_are_written_as_a_clock_shows_them() -> None:
    assert clock(90, 100) == "90"
    assert clock(90, 200) == "1:30"


def test_a_level_line_lies_in_the_middle() -> None:
    low, high = value_range([mean_curve("a", [20.0] * 40, fps=1)])
    assert low < 20 < high
    assert 20 - low == pytest.approx(high - 20)


def test_a_wide_band_does_not_flatten_the_curves() -> None:
    values = [1000.0, -1000, 1, 1, 1] + [2.0] * 5
    low, high = value_range([mean_curve("a", values, fps=1)])
    means = [0.6, 2.0]
    assert low < min(means) < max(means) < high
    assert high - low < 5


def test_a_drawing_is_well_formed_and_says_what_it_shows() -> None:
    curves = [mean_curve(name, [1.0, 2, 3, 4, 5] * 9, fps=1) for name in (NASTY, "b")]
    drawn = svg_plot(Plot("PSNR", "dB", "higher is better", curves, marks_s=(10, 99)), "k")
    root = ElementTree.fromstring(drawn)
    texts = [node.text for node in root.iter("text")]
    assert "PSNR [dB]" in texts
    assert "time [s]" in texts
    desc = root.findtext("desc") or ""
    assert desc.startswith(f"higher is better. {NASTY}: from 3 at the beginning to 3 at the end")
    ids = {node.get("id") for node in root.iter()}
    assert set((root.get("aria-labelledby") or "").split()) <= ids
    shown = [node for node in root.iter("path") if "curve" in (node.get("class") or "")]
    assert len(shown) == 2
    # Told apart by more than colour.
    assert shown[0].get("stroke-dasharray") != shown[1].get("stroke-dasharray")
    assert [node.get("class") for node in root.iter("line")].count("mark") == 1


def test_many_methods_look_different() -> None:
    curves = [mean_curve(str(number), [1.0, 2], fps=1) for number in range(32)]
    root = ElementTree.fromstring(svg_plot(Plot("A", "", "", curves), "k"))
    looks = {
        (node.get("class"), node.get("stroke-dasharray"))
        for node in root.iter("path")
        if "curve" in (node.get("class") or "")
    }
    assert len(looks) == 32


# --- the page ------------------------------------------------------------------------------------


def test_a_name_cannot_become_a_tag(tmp_path: Path) -> None:
    results = evaluation(method(NASTY), method("b"))
    results["settings"] = {NASTY: NASTY}
    results["methods"][0]["metrics"][NASTY] = metric([1.0] * 300, group=NASTY, unit=NASTY)
    results["methods"][0]["metrics"]["fvd"] = metric(None, unavailable=NASTY)
    page = written(tmp_path, results)
    assert len(page.all("script")) == 1
    assert NASTY not in page.source
    assert sum(NASTY in text for text in page.texts) >= 10
    assert page.text_of["title"] == f"Evaluation of {NASTY}, b"


def test_a_name_that_is_not_utf8_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("caf\udce9")))
    assert "caf?" in page.texts


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    video = write_frames(tmp_path / "a.mp4", 20)
    page = written(tmp_path, evaluation(method("a")), videos={"a": video}, truth=video)
    addresses = [
        attributes[key]
        for _, attributes in page.elements
        for key in ("src", "href", "poster", "data", "srcset")
        if attributes.get(key)
    ]
    assert len(addresses) > 20
    assert all(re.match(r"data:|#", address or "") for address in addresses)
    assert "url(" not in page.text_of["style"]
    assert "@import" not in page.text_of["style"]


def test_the_policy_allows_this_script_and_style_only(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a")))
    (policy,) = [
        meta["content"] or "" for meta in page.all("meta") if meta.get("http-equiv") is not None
    ]
    assert "default-src 'none'" in policy
    for kind in ("script", "style"):
        digest = hashlib.sha256(page.text_of[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    # These would be refused.
    assert not any(re.match("on|style$", key) for _, found in page.elements for key in found)


def test_identifiers_are_unique_and_links_lead_somewhere(tmp_path: Path) -> None:
    video = write_frames(tmp_path / "a.mp4", 40)
    results = evaluation(method("a", num_frames=40, chunk_joins=[20]), method("b"))
    page = written(tmp_path, results, videos={"a": video})
    ids = [found["id"] for _, found in page.elements if found.get("id")]
    assert len(set(ids)) == len(ids)
    links = {(found["href"] or "")[1:] for found in page.all("a")}
    assert links <= set(ids)
    assert {"quality", "identity", "drift", "motion", "slopes", "videos", "joins"} <= links


def test_settings_and_hashes_are_shown(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a", seed=255, num_frames=100, chunk_joins=[77])))
    assert page.row("Method", "a") == [
        "a",
        "videos/a.mp4",
        "48x64",
        "100 at 25 fps",
        "4.00 s",
        "2",
        f"{255:064x}",
    ]
    assert page.row("settings.preset") == ["settings.preset", "paper"]
    assert page.row("settings.pose.threshold") == ["settings.pose.threshold", "0.5"]
    assert page.row("settings.fail_if") == ["settings.fail_if", '["psnr.90s<20"]']
    assert page.row("versions.numpy") == ["versions.numpy", "2.4.0"]


def test_the_report_knows_what_the_evaluation_writes(tmp_path: Path) -> None:
    assert list(LABELS) == list(METRICS)
    written(tmp_path, evaluation(method("a")) | {"format_version": FORMAT_VERSION})


def test_another_format_is_refused(tmp_path: Path) -> None:
    message = (
        "the evaluation has format 7, but this version of everanimate draws format 1. "
        "Run 'everanimate eval' again."
    )
    for draw in (lambda results: written(tmp_path, results), lambda r: plot_png(r, tmp_path / "p")):
        with pytest.raises(InputError, match=re.escape(message)):
            draw(evaluation(method("a")) | {"format_version": 7})
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"gone\.mp4 does not exist"):
        written(tmp_path, evaluation(method("a")), videos={"a": tmp_path / "gone.mp4"})
    assert list(tmp_path.iterdir()) == []


# --- tables --------------------------------------------------------------------------------------


def three(name: str, values: Sequence[float | None], better: str, unit: str = "") -> dict[str, Any]:
    """An evaluation of methods of one metric that has a value per second of three."""
    methods = []
    for index, value in enumerate(values):
        facts = method("abc"[index], num_frames=3, fps=1)
        facts["metrics"] = {name: metric([value] * 3, 1, better=better, unit=unit)}
        methods.append(facts)
    return evaluation(*methods)


@pytest.mark.parametrize(
    ("values", "better", "marked"),
    [
        ([1, 3, 2], "higher", [1]),
        ([1, 3, 2], "lower", [0]),
        ([3, 1, 3], "higher", [0, 2]),
        ([3, 2.999999, 1], "higher", [0, 1]),  # they read the same
        ([2, 2, 2], "higher", []),
        ([None, 2, None], "higher", []),
        ([None, 2, 1], "lower", [2]),
        ([math.inf, 2, 1], "higher", [0]),
        ([math.nan, 2, 1], "higher", [1]),
    ],
)
def test_the_best_is_marked(
    tmp_path: Path, values: list[float | None], better: str, marked: list[int]
) -> None:
    page = written(tmp_path, three("psnr", values, better))
    for head in ("whole video", "0-10 s"):
        cells = page.row("PSNR", head)[1:]
        assert [index for index, cell in enumerate(cells) if "(best)" in cell] == marked
    shown = {"class": "number best"}
    assert [cell for cell in page.all("td") if cell == shown] == [shown] * 2 * len(marked)


def test_one_video_alone_is_not_the_best(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a")))
    assert "(best)" not in page.source
    assert "best of each row" not in page.source


def test_a_metric_that_is_neither_better_high_nor_low_has_no_best(tmp_path: Path) -> None:
    page = written(tmp_path, three("odd", [1, 2, 3], "neither"))
    assert "(best)" not in page.source
    assert page.row("odd", "whole video")[1].startswith("1.000")


def test_numbers_have_the_digits_that_count(tmp_path: Path) -> None:
    page = written(tmp_path, three("psnr", [24.1234, 3.14159, -math.inf], "higher", "dB"))
    assert page.row("PSNR", "0-10 s") == ["0-10 s", "24.12 (best)", "3.14", "-\u221e"]
    page = written(tmp_path, three("l1", [0.012345, 0.5, None], "lower"))
    assert page.row("L1", "0-10 s") == ["0-10 s", "0.0123 (best)", "0.5000", "\u2013"]
    page = written(tmp_path, three("fid", [123.456, 7.0, 9], "lower"))
    assert page.row("FID", "0-10 s") == ["0-10 s", "123.46", "7.00 (best)", "9.00"]


def test_stretches_that_no_video_reaches_are_left_out(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a", num_frames=1000), method("b")))
    heads = [row[0] for row in page.rows]
    first = heads.index("whole video")
    assert heads[first : first + 4] == ["whole video", "0-10 s", "10-30 s", "30-60 s"]
    assert "60-90 s" not in heads
    assert page.row("PSNR", "30-60 s")[2] == "\u2013"  # b is shorter


def test_an_open_stretch_is_written_so(tmp_path: Path) -> None:
    results = evaluation(method("a", num_frames=2300))
    assert written(tmp_path, results).row("90+ s")[1] != "\u2013"
    results["horizons_s"][-1] = [90, math.inf]
    assert written(tmp_path, results).row("90+ s")[1] != "\u2013"


def test_the_interval_stands_below_the_slope(tmp_path: Path) -> None:
    results = three("psnr", [20.0], "higher", "dB")
    results["methods"][0]["metrics"]["psnr"] |= {"slope_per_minute": -1, "interval": [-2, 0.5]}
    page = written(tmp_path, results)
    assert page.row("Metric", "PSNR")[1] == "-1.00-2.00 to +0.50"
    assert page.row("PSNR", "whole video")[1] == "20.00"


def test_what_is_not_available_says_why(tmp_path: Path) -> None:
    results = evaluation(method("a"), method("b"))
    results["methods"][1]["metrics"]["pose_distance"] = metric(
        None, group="motion", better="lower", unavailable="not available: needs --driving"
    )
    page = written(tmp_path, results)
    assert NEEDS_LPIPS == "not available: needs weights X"
    assert page.row("LPIPS", "")[:2] == ["not available", "needs weights X"]
    assert page.row("Pose distance", "not available")[1] == "b: needs --driving"
    assert page.row("Pose distance", "whole video")[2] == "\u2013"
    greyed = [found for found in page.all("tr") if found.get("class") == "missing"]
    assert len(greyed) == 2


def test_a_metric_that_one_method_lacks_is_a_dash(tmp_path: Path) -> None:
    results = evaluation(method("a"), method("b"))
    del results["methods"][0]["metrics"]["ssim"]
    page = written(tmp_path, results)
    assert page.row("SSIM", "whole video")[1] == "\u2013"
    assert page.row("Metric", "SSIM")[1] == "\u2013"


def test_slopes_have_signs_and_the_steadiest_is_best(tmp_path: Path) -> None:
    results = evaluation(method("a", drift=3), method("b", drift=0.5))
    for name, slopes in (("psnr", (-4.5, -0.75)), ("l1", (3.6, 0.6)), ("ssim", (-1e-9, 0.01))):
        for facts, slope in zip(results["methods"], slopes, strict=True):
            facts["metrics"][name] |= {"slope_per_minute": slope, "interval": None}
    page = written(tmp_path, results)
    heads = ("Metric", "PSNR dB per minute, higher is better")
    assert page.row(*heads) == [heads[1], "-4.50", "-0.75 (best)"]
    assert page.row("Metric", "L1 per minute")[1:] == ["+3.60", "+0.60 (best)"]
    assert page.row("Metric", "SSIM")[1:] == ["0.0000", "+0.0100 (best)"]


def test_identity_stands_apart(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a")))
    heads = [row[0].split()[0] for row in page.rows if len(row) == 1]
    headings = [text for text in page.texts if text in {"Frame quality", "Identity"}]
    assert headings.count("Identity") >= 2  # in the list of sections and as a heading
    assert heads[:5] == ["PSNR", "SSIM", "L1", "LPIPS", "Identity"]
    assert [found.get("id") for found in page.all("h2")][1:3] == ["quality", "identity"]


def test_tables_have_captions_and_headers(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a")))
    num_tables = len(page.all("table"))
    assert len(page.all("caption")) == num_tables
    assert len([found for found in page.all("div") if found.get("role") == "region"]) == num_tables
    assert {found.get("scope") for found in page.all("th")} == {"col", "row", "rowgroup"}


def test_every_metric_with_values_over_time_is_drawn(tmp_path: Path) -> None:
    results = evaluation(method("a", chunk_joins=[100]), method("b"))
    page = written(tmp_path, results)
    drawn = [found for found in page.all("svg") if found.get("class") == "plot"]
    assert all(found["role"] == "img" for found in drawn)
    metrics = results["methods"][0]["metrics"]
    assert len(drawn) == sum(entry["per_frame"] is not None for entry in metrics.values()) == 10


# --- videos and pictures -------------------------------------------------------------------------


def test_a_small_video_is_part_of_the_page(tmp_path: Path) -> None:
    video = write_frames(tmp_path / "a.mp4", 20)
    page = written(tmp_path, evaluation(method("a", num_frames=20)), videos={"a": video})
    (player,) = page.all("video")
    kind, data = (player["src"] or "").split(",")
    assert kind == "data:video/mp4;base64"
    assert base64.b64decode(data) == video.read_bytes()
    assert "controls" in player
    assert player["aria-label"] == "Video: a"
    assert pixels(player["poster"] or "").shape == (64, 48, 3)
    assert any("part of this page" in text for text in page.texts)


def test_a_large_video_is_linked_from_where_the_page_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    video = write_frames(tmp_path / 'a#b "<c>%.mp4', 20)
    page = written(
        tmp_path / "out",
        evaluation(method("a", num_frames=20)),
        videos={"a": video},
        embed_limit_bytes=video.stat().st_size - 1,
    )
    (player,) = page.all("video")
    assert player["src"] == "../a%23b%20%22%3Cc%3E%25.mp4"
    assert (tmp_path / "out" / unquote(player["src"])).read_bytes() == video.read_bytes()
    assert any("too large for this page" in text for text in page.texts)


def test_all_embedded_videos_together_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = write_frames(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(report_sheets, "EMBED_ALL_BYTES", 2 * video.stat().st_size)
    results = evaluation(*(method(name, num_frames=20) for name in "abc"))
    page = written(tmp_path, results, videos=dict.fromkeys("abc", video))
    sources = [(player["src"] or "")[:5] for player in page.all("video")]
    assert sources == ["data:", "data:", "a.mp4"]


def test_truth_and_poses_are_shown_beside(tmp_path: Path) -> None:
    (tmp_path / "dance").mkdir()
    video = write_frames(tmp_path / "a.mp4", 20)
    write_frames(tmp_path / "dance" / "pose.mp4", 20)
    Image.new("RGB", (400, 800)).save(tmp_path / "anna.png")
    page = written(
        tmp_path,
        evaluation(method("a", num_frames=20)),
        videos={"a": video},
        truth=video,
        driving=tmp_path / "dance",
        reference=tmp_path / "anna.png",
    )
    labels = [player["aria-label"] for player in page.all("video")]
    assert labels == ["Video: a", "Video: truth", "Video: driving pose"]
    assert [row[0] for row in page.rows if len(row) == 7][-3:] == ["truth", "driving pose", "a"]
    assert page.all("img")[0]["alt"] == "Reference picture of the character"
    assert page.all("img")[0]["height"] == "320"
    assert all(image["alt"] for image in page.all("img"))


def numbered_video(path: Path, num_frames: int = 60, fps: float = 10) -> Path:
    """A video whose frames tell their number, see `frame_numbers`."""
    with VideoWriter(path, height=32, width=48, rate=fps, crf=4) as writer:
        writer.write(numbered_frames(num_frames))
    return path


def test_sheets_show_the_frames_that_they_say(tmp_path: Path) -> None:
    made = numbered_video(tmp_path / "made.mp4")
    truth = numbered_video(tmp_path / "truth.mp4", 30, fps=5)
    facts = method("a", num_frames=60, fps=10, chunk_joins=[20, 37])
    facts["worst_frames"] = [
        {"frame": 40, "metric": "psnr", "value": 12.3456},
        {"frame": 11, "metric": "ssim", "value": 0.5},
        {"frame": 40, "metric": "l1", "value": 7},
        {"frame": 99, "metric": "l1", "value": 7},
    ]
    page = written(tmp_path, evaluation(facts), videos={"a": made}, truth=truth)

    def shown(row: list[str]) -> list[int]:
        return frame_numbers([pixels(uri) for uri in page.row_pictures[page.rows.index(row)]])

    join = page.row("Join", "2 ")
    assert join[0].startswith("2 worst")
    assert "3.7 sframe 37step 1." in join[0].replace(" s frame", " sframe")
    before, last, change, first, second = shown(join)
    assert (before, last, first, second) == (35, 36, 37, 38)
    # Neighbours differ by 4 grey levels, amplified 4 times: 16 is the grey of number 3.5.
    assert change in {3, 4}

    times = page.row("Video")
    assert times == ["Video", "0 s", "1 s", "2 s", "3 s", "4 s", "5 s"]
    assert shown(page.row("Video", "a")) == [0, 10, 20, 30, 40, 50]
    assert shown(page.row("Video", "truth")) == [0, 5, 10, 15, 20, 25]

    assert page.row("Frame", "40")[1] == "PSNR 12.35 dBL1 7"
    assert shown(page.row("Frame", "40")) == [40, 20]
    assert page.row("Frame", "11")[1] == "SSIM 0.5"
    assert shown(page.row("Frame", "11"))[0] == 11
    assert page.row("Frame", "99")[2:] == ["no such frame"] * 2


def test_the_first_and_the_worst_joins_are_shown(tmp_path: Path) -> None:
    joins = list(range(10, 300, 20))
    facts = method("a", chunk_joins=joins)
    jumps: list[float | None] = [None] * 300
    for rank, join in enumerate(joins):
        jumps[join] = 1 + rank / 100
    jumps[30], jumps[290], jumps[250] = 9, 8, None
    facts["metrics"]["seam"]["per_frame"] = jumps
    video = write_frames(tmp_path / "a.mp4", 300)
    page = written(tmp_path, evaluation(facts), videos={"a": video})
    # The first four, and by size 30, 290, 270, 230.
    heads = [row[0].split()[0] for row in page.rows if re.search(r"frame \d", row[0])]
    assert heads[:7] == ["1", "2", "3", "4", "12", "14", "15"]
    assert page.row("Join", "2 worst")[0].startswith("2 worst1.2 s")
    assert page.row("Join", "15 worst 2")[0].startswith("15 worst 2")
    assert "The first and the worst of 15 joins." in page.texts


def test_a_long_video_has_a_page_of_bounded_size(tmp_path: Path) -> None:
    video = write_frames(tmp_path / "a.mp4", 901, fps=1)
    facts = method("a", num_frames=901, fps=1, chunk_joins=list(range(4, 900, 4)))
    page = written(tmp_path, evaluation(facts), videos={"a": video})
    assert "12 of 16 minutes are shown, evenly spread." in page.texts
    minutes = [text for text in page.texts if re.fullmatch(r"Minute \d+", text)]
    assert len(minutes) == 12
    assert minutes[0] == "Minute 1"
    assert minutes[-1] == "Minute 16"
    # The last one has a second only.
    assert page.rows[[row[0] for row in page.rows].index("Frame") - 2] == ["Video", "900 s"]
    assert len(page.all("img")) <= 12 * 6 + 8 * 5 + 12


def test_moments_lead_to_the_players(tmp_path: Path) -> None:
    video = write_frames(tmp_path / "a.mp4", 40)
    facts = method("a", num_frames=40, chunk_joins=[20])
    page = written(tmp_path, evaluation(facts), videos={"a": video})
    seeks = [found["data-seek-s"] for found in page.all("a") if "data-seek-s" in found]
    assert "0.800" in seeks


def test_without_videos_the_page_says_so(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(method("a", chunk_joins=[20])))
    assert page.texts.count("No video file was given.") == 4
    assert page.all("img") == []


def test_no_piece_of_the_page_is_as_large_as_a_video(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(bytes(3_000_001))
    players = report_sheets.Players(page=tmp_path / "r.html", limit_bytes=10**7)
    poster = Thumbnail("data:,", 2, 2)
    pieces = list(players.figure("a", "a", video, poster))
    assert max(map(len, pieces)) < 300_000
    whole = re.search('src="data:video/mp4;base64,([^"]*)"', "".join(pieces))
    assert whole is not None
    assert base64.b64decode(whole[1]) == video.read_bytes()


# --- test sets -----------------------------------------------------------------------------------


def test_a_test_set_has_a_column_for_each_method(tmp_path: Path) -> None:
    results = made_up_test_set("ours", "theirs", samples=["waltz", "tango", "polka"])
    page = written(tmp_path, results)
    assert page.row("Stretch of time") == [
        "Stretch of time",
        "ours mean of 3 videos",
        "theirs mean of 3 videos",
    ]
    mean = results["summary"][1]["metrics"]["psnr"]["overall"]
    assert page.row("PSNR", "whole video")[2].startswith(f"{mean:.2f}")
    assert page.row("Method", "ours: tango")[0] == "ours: tango"
    assert any(text == "Evaluation of 6 videos by 2 methods" for text in page.texts)
    assert any("confidence interval over videos, if" in text for text in page.texts)
    plots = [found for found in page.all("svg") if found.get("class") == "plot"]
    assert len(plots) == 9  # without seams, which no video has
    assert page.text_of["title"] == "Evaluation of ours, theirs"


def test_videos_of_a_test_set_stand_beside_their_own_truth(tmp_path: Path) -> None:
    results = made_up_test_set("ours", "theirs", samples=["a", "b"], num_frames=60)
    videos = {}
    for shift, facts in enumerate(results["methods"]):
        name = facts["name"]
        facts |= {"fps": 10.0, "seconds": 6.0}
        facts["truth"] = str(tmp_path / f"truth_{facts['sample']}.mp4")
        videos[name] = numbered_video(tmp_path / f"{shift}.mp4")
    numbered_video(tmp_path / "truth_a.mp4", fps=10)
    numbered_video(tmp_path / "truth_b.mp4", fps=5)
    page = written(tmp_path, results, videos=videos)
    heads = [
        row[0] for row, uris in zip(page.rows, page.row_pictures, strict=True) if len(uris) == 6
    ]
    assert heads == ["truth", "ours: a", "theirs: a", "truth", "ours: b", "theirs: b"]
    pictures = [
        frame_numbers([pixels(uri) for uri in found])
        for row, found in zip(page.rows, page.row_pictures, strict=True)
        if row[0] == "truth"
    ]
    assert pictures == [[0, 10, 20, 30, 40, 50], [0, 5, 10, 15, 20, 25]]
    captions = [text for text in page.texts if text.endswith(": Minute 1")]
    assert captions == ["a: Minute 1", "b: Minute 1"]


def test_of_a_large_test_set_some_videos_are_shown(tmp_path: Path) -> None:
    results = made_up_test_set("ours", "theirs", samples=[str(number) for number in range(8)])
    page = written(tmp_path, results)
    assert "Here and below 12 of 16 videos are shown." in page.texts
    assert len([row for row in page.rows if row and row[0].startswith("ours: ")]) == 8


def test_the_truth_is_shown_from_where_the_video_begins(tmp_path: Path) -> None:
    facts = method("a", num_frames=30, fps=10) | {"truth_start_s": 1.5, "start_s": 9.0}
    page = written(
        tmp_path,
        evaluation(facts),
        videos={"a": numbered_video(tmp_path / "made.mp4", 30)},
        truth=numbered_video(tmp_path / "truth.mp4", 60),
    )
    row = page.row_pictures[page.rows.index(page.row("Video", "truth"))]
    assert frame_numbers([pixels(uri) for uri in row]) == [15, 20, 25, 30, 35, 40]


def test_after_the_end_of_the_driving_there_are_poses_and_no_truth(tmp_path: Path) -> None:
    changes = {"extend": "pingpong", "driving_frames": 12, "compared_frames": 12, "start_s": 0.2}
    facts = method("a", num_frames=30, fps=10) | changes
    (tmp_path / "dance").mkdir()
    numbered_video(tmp_path / "dance" / "pose.mp4", 20)
    video = numbered_video(tmp_path / "made.mp4", 30)
    page = written(
        tmp_path, evaluation(facts), videos={"a": video}, truth=video, driving=tmp_path / "dance"
    )
    assert page.row("Method", "a")[3] == (
        "30 at 10 fps, 12 compared, driven by 12 and on by pingpong"
    )
    assert page.row("Video", "truth")[1:] == [""] * 3 + ["no such frame"] * 3
    row = page.row_pictures[page.rows.index(page.row("Video", "driving pose"))]
    # 0, 5, 10 and, on the way back, 15, 20, 25; all of them two frames later in the file.
    assert frame_numbers([pixels(uri) for uri in row]) == [2, 7, 12, 9, 4, 5]


# --- without videos ------------------------------------------------------------------------------


def test_a_page_of_stills_has_no_player(tmp_path: Path) -> None:
    video = numbered_video(tmp_path / "a.mp4")
    facts = method("a", num_frames=60, fps=10, chunk_joins=[20])
    whole, stills, bare = (
        written(
            tmp_path,
            evaluation(facts),
            videos={"a": video},
            truth=video,
            reference=None,
            media=media,
        )
        for media in ("videos", "stills", "none")
    )
    assert [len(page.all("video")) for page in (whole, stills, bare)] == [2, 0, 0]
    assert len(stills.all("img")) == len(whole.all("img")) > 10
    assert bare.all("img") == []
    for page in (stills, bare):
        links = {str(link["href"])[1:] for link in page.all("a") if "href" in link}
        assert links <= {str(found["id"]) for _, found in page.elements if "id" in found}
        assert not [link for link in page.all("a") if "data-seek-s" in link]
    assert stills.row("Join", "1 ")[0].replace(" s", "s").startswith("1 worst2s")
    plots = [[p["aria-labelledby"] for p in page.all("svg") if p["class"] == "plot"]
             for page in (whole, bare)]  # fmt: skip
    assert plots[0] == plots[1] != []


# --- PNG -----------------------------------------------------------------------------------------


def test_the_main_curves_are_drawn_as_png(tmp_path: Path) -> None:
    # Names that matplotlib would hide, read as a broken formula, or lack letters for.
    names = ["_hidden", r"$\frac{", "\u821e\u8e0f", "caf\udce9"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_png(evaluation(*map(method, names)), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 800  # three rows of two
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
    assert (0x0B, 0x5F, 0xA5) in colours
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_no_curve_is_a_picture_too(tmp_path: Path) -> None:
    facts = method("a")
    facts["metrics"] = {"lpips": metric(None, unavailable=NEEDS_LPIPS)}
    plot_png(evaluation(facts), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.convert("L").getextrema()[0] < 100  # it says so
    assert "No metric has a slope" in written(tmp_path, evaluation(facts)).source


def test_the_legend_of_the_png_names_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  # heavy

    seen: list[str] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **options: Any) -> None:
        seen.extend(text.get_text() for text in self.legends[0].get_texts())
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    curves = [mean_curve(name, [1.0, 2], fps=1) for name in ("_a", "$b$")]
    png_plots(tmp_path / "plot.png", [Plot("A", "", "", curves)])
    assert seen == ["_a", "$b$"]
