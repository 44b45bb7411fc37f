"""The report of an evaluation: one HTML page that needs nothing else, and its curves as PNG.

The page is made of the JSON of an `Evaluation` and of the video files. It loads nothing from
anywhere: styles, script, curves and pictures are part of it, and so are videos up to a limit. A
policy in its head forbids browsers to run or load anything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from itertools import islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.report_curves import palette_css, png_plots
from everanimate_cli.report_frames import read_picture
from everanimate_cli.report_markup import Html, element, escaped, joined, start_tag, table
from everanimate_cli.report_sheets import (
    EMBED_LIMIT_BYTES,
    SECTIONS,
    Players,
    image,
    list_samples,
    picture_sections,
)
from everanimate_cli.report_tables import (
    Column,
    Method,
    list_columns,
    list_methods,
    main_plots,
    number_sections,
    sections,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from everanimate_cli.eval_settings import ReportMedia

PAGE_FOLDER: Final = Path(__file__).parent / "report_page"
_PNG_PLOTS = 6
_LEFT_OUT: Final = {"videos": (), "stills": ("videos",), "none": tuple(SECTIONS)}


def write_report(
    evaluation_json: Mapping[str, Any],
    path: Path,
    *,
    videos: Mapping[str, Path],
    truth: Path | None,
    reference: Path | None,
    driving: Path | None,
    media: ReportMedia = "videos",
    embed_limit_bytes: int = EMBED_LIMIT_BYTES,
) -> None:
    """Write the page, whole or not at all; videos are read as streams.

    Args:
        evaluation_json: What `Evaluation.to_json` gives.
        path: HTML file to make or replace.
        videos: File of each method by its name; without one, its pictures are left out.
        truth: Video of the truth; None too for a test set, whose entries name their own.
        reference: Picture of the character.
        driving: Folder with `pose.mp4`, or a video; None too for a test set.
        media: "videos" for players and contact sheets, "stills" for the sheets, "none" for neither.
        embed_limit_bytes: Larger videos are linked, not embedded.

    Raises:
        InputError: If the evaluation has another format.
        MediaError: If a video or picture cannot be read.
        OSError: If the disk is full.
    """
    methods = list_methods(evaluation_json, videos)
    columns = list_columns(evaluation_json, methods)
    samples = [] if media == "none" else list_samples(methods, truth, driving)
    players = Players(page=path, limit_bytes=embed_limit_bytes) if media == "videos" else None
    shown = {key: SECTIONS[key] for key in SECTIONS if key not in _LEFT_OUT[media]}
    contents = {"files": "Files", **sections(columns), **shown, "settings": "Settings"}
    style = palette_css() + (PAGE_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (PAGE_FOLDER / "page.js").read_text(encoding="utf-8")
    page = Template((PAGE_FOLDER / "page.html").read_text(encoding="utf-8"))
    before, after = page.substitute(
        policy=_policy(style, script),
        title=escaped("Evaluation of " + ", ".join(column.name for column in columns)),
        style=style,
        script=script,
        body="\0",  # which no escaped text holds
    ).split("\0")
    # Hashes in the policy are those of lines that end alike on every system.
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.write(before)
        picture = None if media == "none" else reference
        file.writelines(_header(evaluation_json, methods, columns, picture, contents))
        file.writelines(number_sections(columns, evaluation_json["horizons_s"]))
        if media != "none":
            file.writelines(picture_sections(samples, len(methods), players))
        file.writelines(_settings(evaluation_json))
        file.write(after)


def plot_png(evaluation_json: Mapping[str, Any], path: Path) -> None:
    """Draw the main curves of an evaluation, at most six, as a PNG file.

    Args:
        evaluation_json: What `Evaluation.to_json` gives.
        path: File to make or replace, whole or not at all.

    Raises:
        InputError: If the evaluation has another format.
        OSError: If the disk is full.
    """
    columns = list_columns(evaluation_json, list_methods(evaluation_json, {}))
    plots = main_plots(columns, evaluation_json["horizons_s"])
    png_plots(path, list(islice(plots, _PNG_PLOTS)))


def _policy(style: str, script: str) -> str:
    """Only this style and this script; pictures from the page itself; videos also beside it."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "img-src data:; media-src data: 'self' file:; base-uri 'none'; form-action 'none'"
    )


def _header(
    evaluation: Mapping[str, Any],
    methods: Sequence[Method],
    columns: Sequence[Column],
    reference: Path | None,
    contents: Mapping[str, str],
) -> Iterator[str]:
    yield start_tag("header", class_="wrap")
    if reference is not None:
        yield element(
            "figure",
            image(read_picture(reference), "Reference picture of the character"),
            element("figcaption", "reference"),
            class_="reference",
        )
    count = "one video" if len(methods) == 1 else f"{len(methods)} videos"
    makers = f" by {len(columns)} methods" if 1 < len(columns) < len(methods) else ""
    yield element("h1", f"Evaluation of {count}{makers}")
    versions = ", ".join(f"{name} {text}" for name, text in evaluation["versions"].items())
    yield element("p", f"{evaluation['created']}. {versions}", class_="quiet")
    inputs = {"Truth": evaluation["truth"], "Reference": evaluation["reference"]}
    yield element(
        "p",
        *(
            joined(f"{noun}: ", element("code", given), ". ")
            for noun, given in inputs.items()
            if given is not None
        ),
    )
    yield Html("</header>")
    links = (element("li", element("a", title, href=f"#{key}")) for key, title in contents.items())
    yield element("nav", element("ul", *links), aria_label="Sections")
    yield element("h2", "Files", id="files")
    heads = ("Method", "File", "Size", "Frames", "Length", "Chunks", "SHA-256")
    rows = map(_file_row, methods)
    yield table("What was compared", heads, [element("tbody", *rows)], class_="facts")


def _file_row(method: Method) -> Html:
    facts = method.facts
    height, width = facts["size"]
    frames = f"{facts['num_frames']} at {method.fps:g} fps"
    compared = facts.get("compared_frames")
    if compared and compared != facts["num_frames"]:
        frames += f", {compared} compared"
    if facts.get("extend"):
        frames += f", driven by {facts['driving_frames']} and on by {facts['extend']}"
    return element(
        "tr",
        element("th", method.title(), scope="row"),
        element("td", element("code", facts["path"]), class_="long"),
        element("td", f"{width}x{height}"),
        element("td", frames),
        element("td", f"{method.seconds:.2f} s"),
        # Without joins it is a single chunk, or its chunks are not known.
        element("td", str(len(method.joins) + 1) if method.joins else Html("&ndash;")),
        element("td", element("code", facts["sha256"]), class_="long"),
    )


def _settings(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield element("h2", "Settings", id="settings")
    rows = (
        element("tr", element("th", name, scope="row"), element("td", element("code", text)))
        for part in ("settings", "versions")
        for name, text in _flat(part, evaluation[part])
    )
    heads = ("Name", "Value")
    yield table("How it was measured", heads, [element("tbody", *rows)], class_="facts")


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Name and text of each value in nested objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
