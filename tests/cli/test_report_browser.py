"""The report in a real browser: it renders, complains about nothing and fits a phone."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import evaluation, method, write_frames
from PIL import Image

from everanimate_cli.report import write_report

pytestmark = pytest.mark.browser

TIMEOUT_S = 120
DESKTOP = (1280, 2000)
PHONE = (390, 844)
METHODS = ("everanimate", "a-rather-long-name-without-any-place-to-break-it", "<script>alert(1)")
NUM_FRAMES = 100
JOIN = 8

# Measures the page from within, and tells the one around it. Videos count when their length is
# known.
PROBE = """
<script>
addEventListener("load", async () => {
  const players = [...document.querySelectorAll("video")];
  const settled = (player) => player.readyState || player.error ? 0 : new Promise((settle) => {
    player.onloadedmetadata = player.onerror = settle;
  });
  await Promise.all(players.map(settled));
  document.querySelector("a[data-seek-s='0.320']").click();
  const times = players.map((player) => player.currentTime);
  const press = (action) => {
    document.querySelector(`button[data-action=${action}]`).click();
    return players.map((player) => [player.paused, player.currentTime]);
  };
  const pressed = [press("pause"), press("start"), press("play")];
  const box = (node) => node.getBoundingClientRect();
  parent.postMessage(JSON.stringify({
    window: [innerWidth, innerHeight],
    width: document.documentElement.scrollWidth,
    players: players.map((player, i) => [player.videoWidth, player.duration, times[i]]),
    pressed,
    plots: [...document.querySelectorAll("svg.plot")].map((plot) => [
      box(plot).width, box(plot).height,
      Math.min(...[...plot.querySelectorAll("text")].map((text) => box(text).height)),
      Math.min(...[...plot.querySelectorAll("text")].map((text) => box(text).left)),
      plot.querySelector("path.curve").getTotalLength(),
    ]),
    broken: [...document.images].filter((image) => !image.naturalWidth).length,
    images: document.images.length,
    scrolling: [...document.querySelectorAll(".scroll")].filter(
      (node) => node.scrollWidth > node.clientWidth).length,
    buttons: !document.querySelector(".together").hidden,
  }), "*");
});
</script>
"""

# A window is at least 500 pixels wide, a frame within it is as narrow as it says.
FRAME = """<!doctype html>
<title>nothing was told</title>
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="probed.html" width="%d" height="%d" style="border: 0"></iframe>
"""


@dataclass(frozen=True)
class Visit:
    """What the browser printed, and what it complained about."""

    output: str
    complaints: list[str]

    @property
    def told(self) -> Any:
        """What `PROBE` measured."""
        found = re.search("<title>(.*?)</title>", self.output, re.DOTALL)
        assert found is not None
        return json.loads(html.unescape(found[1]))


def visit(page: Path, size: tuple[int, int], profile: Path, *options: str) -> Visit:
    """Open a page in headless Chromium, without network and with a profile of its own."""
    chromium = shutil.which("chromium")
    assert chromium is not None, (
        "this test needs Chromium as `chromium` on the PATH: on Debian "
        "`apt-get update && apt-get install -y chromium`"
    )
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--no-first-run",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three methods, two of them embedded and one linked."""
    folder = tmp_path_factory.mktemp("report")
    videos = {
        name: write_frames(folder / f"{index}.mp4", NUM_FRAMES, tint=30 * index)
        for index, name in enumerate(METHODS)
    }
    sizes = sorted(path.stat().st_size for path in videos.values())
    assert sizes[1] < sizes[2]
    Image.new("RGB", (60, 80), (200, 90, 40)).save(folder / "anna.png")
    path = folder / "report.html"
    write_report(
        evaluation(
            *(
                method(
                    name, num_frames=NUM_FRAMES, seed=seed, chunk_joins=range(JOIN, NUM_FRAMES, 8)
                )
                for seed, name in enumerate(METHODS)
            )
        ),
        path,
        videos=videos,
        truth=videos[METHODS[0]],
        reference=folder / "anna.png",
        driving=None,
        embed_limit_bytes=sizes[1],
    )
    return path


def measured(page: Path, size: tuple[int, int], profile: Path) -> Any:
    """What the page is like on a screen of that size. Its policy would refuse the probe."""
    source = page.read_text(encoding="utf-8")
    source, num_policies = re.subn(r"<meta http-equiv=[^>]*>", "", source)
    assert num_policies == 1
    probed = source.replace("</body>", PROBE + "</body>")
    page.with_name("probed.html").write_text(probed, encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME % size, encoding="utf-8")
    seen = visit(frame, DESKTOP, profile, "--dump-dom", "--virtual-time-budget=20000")
    assert seen.complaints == []
    return seen.told


def test_the_page_renders_without_a_complaint(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    seen = visit(page, DESKTOP, tmp_path / "profile", f"--screenshot={picture}")
    assert seen.complaints == []
    with Image.open(picture) as shot:
        assert shot.size == DESKTOP
        pixels = np.asarray(shot.convert("RGB")).reshape(-1, 3)
    # Text on a light page, the mark of the best values, and the first method's curve.
    assert 0.7 < (pixels == 255).all(1).mean() < 0.99
    for colour in ("#dff3e4", "#0b5fa5"):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(1).sum() > 50, colour


def test_a_page_of_stills_renders_without_a_complaint(page: Path, tmp_path: Path) -> None:
    videos = {"one": page.with_name("0.mp4")}
    facts = method("one", num_frames=NUM_FRAMES, chunk_joins=range(JOIN, NUM_FRAMES, 8))
    path = tmp_path / "stills.html"
    write_report(
        evaluation(facts),
        path,
        videos=videos,
        truth=videos["one"],
        reference=page.with_name("anna.png"),
        driving=None,
        media="stills",
    )
    picture = tmp_path / "page.png"
    seen = visit(path, (1280, 8000), tmp_path / "profile", f"--screenshot={picture}")
    assert seen.complaints == []
    with Image.open(picture) as shot:
        pixels = np.asarray(shot.convert("RGB")).astype(int)
    # The reference is drawn, and so are the sheets: a page without pictures is hardly coloured.
    assert (np.abs(pixels[:400] - (200, 90, 40)) <= 4).all(-1).sum() > 1000
    assert (np.ptp(pixels[3000:], axis=-1) > 20).mean() > 0.02


def test_everything_is_there_on_a_phone(page: Path, tmp_path: Path) -> None:
    told = measured(page, PHONE, tmp_path / "profile")
    assert told["window"] == list(PHONE)
    assert told["width"] == PHONE[0]  # the page itself does not scroll sideways
    assert told["scrolling"] > 5  # its tables do
    assert len(told["plots"]) == 10
    for width, height, text_px, text_left, curve in told["plots"]:
        assert 300 < width <= PHONE[0]
        assert 150 < height < 300
        assert text_px > 10
        assert text_left >= 0
        assert curve > 50
    assert told["buttons"]
    assert told["images"] > 40
    assert told["broken"] == 0
    # Three methods and the truth; a click on a moment at a join takes all of them there.
    assert told["players"] == [[48, pytest.approx(NUM_FRAMES / 25), JOIN / 25]] * 4
    assert told["pressed"] == [[[True, JOIN / 25]] * 4, [[True, 0]] * 4, [[False, 0]] * 4]


def test_the_page_prints(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    seen = visit(page, DESKTOP, tmp_path / "profile", f"--print-to-pdf={paper}")
    assert seen.complaints == []
    num_pages = len(re.findall(rb"/Type /Page\b", paper.read_bytes()))
    assert 4 < num_pages < 30


def test_the_check_notices_what_a_page_complains_about(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>a</title><script>nothing.here()</script>")
    seen = visit(page, PHONE, tmp_path / "profile", "--dump-dom")
    assert len(seen.complaints) == 1
    assert "nothing is not defined" in seen.complaints[0]
