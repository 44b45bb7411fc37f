"""Markup in which text is text: whatever a file is called, it cannot become a tag."""

import html
from collections.abc import Sequence
from typing import Final

_VOID: Final = {"br", "img"}  # elements without an end tag

# What HTML cannot hold, in place of which browsers show the replacement character.
_CONTROL: Final = {code: 0xFFFD for code in range(32) if chr(code) not in "\t\n"}


class Html(str):
    """Markup as it stands; any other string is text that must be escaped."""

    __slots__ = ()


def plain(text: str) -> str:
    """The text without what no page or font can show: control codes and broken UTF-8.

    A file name that is not UTF-8 reaches Python with lone surrogates, which cannot be written.
    """
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROL)


def escaped(text: str) -> Html:
    """Markup that shows the text, inside an element or inside a quoted attribute."""
    return text if isinstance(text, Html) else Html(html.escape(plain(text), quote=True))


def joined(*parts: str) -> Html:
    """Markup of one part after the other."""
    return Html("".join(escaped(part) for part in parts))


def start_tag(tag: str, **attributes: str | float | None) -> Html:
    """The opening tag of an element.

    Args:
        tag: Name of the element.
        attributes: By name, "_" for "-" and one "_" at the end where the name is a Python keyword;
            True for one without value, None and False for none.
    """
    words = [tag]
    for key, value in attributes.items():
        name = key.removesuffix("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f'{name}="{escaped(str(value))}"')
    return Html(f"<{' '.join(words)}>")


def element(tag: str, *children: str, **attributes: str | float | None) -> Html:
    """An element; children that are not `Html` are escaped.

    Args:
        tag: Name of the element.
        children: In their order.
        attributes: As in `start_tag`.
    """
    start = start_tag(tag, **attributes)
    if tag in _VOID:
        return start
    return Html(f"{start}{joined(*children)}</{tag}>")


def identifier(name: str) -> str:
    """An `id` that is as unique as the name and needs no escapes anywhere."""
    return "".join(sign if sign.isascii() and sign.isalnum() else f"-{ord(sign)}-" for sign in name)


def table(caption: str, columns: Sequence[str], bodies: Sequence[Html], *, class_: str) -> Html:
    """A table in a box of its own, which scrolls sideways, by keyboard too.

    Args:
        caption: What it shows.
        columns: Heads.
        bodies: `tbody` elements.
        class_: For the style.
    """
    heads = (element("th", column, scope="col") for column in columns)
    whole = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", *heads)),
        *bodies,
        class_=class_,
    )
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)
