"""Records: frozen dataclasses that check their values and live in JSON, and how values are written.

The machinery behind the settings of every command; what a command can be told stands with its
settings.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from everanimate_cli.errors import InputError, SettingsError

# Metadata of fields about one run: a saved file must not overwrite anything when it is run again.
THIS_RUN = {"this_run": True}

_POSITIONAL = {
    "dataset": "DATASET",
    "directory": "DIR",
    "driving": "DRIVING",
    "ref": "REF",
    "video": "VIDEO",
}


def option_name(name: str) -> str:
    """How a field is written on the command line: `--frames-per-chunk`, or `REF`."""
    return _POSITIONAL.get(name) or "--" + name.replace("_", "-")


def counted(number: int, noun: str) -> str:
    """Such as "1 chunk" or "20 chunks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_time(text: str) -> float:
    """Seconds from "12.5", "1:02.5" or "1:00:02.5".

    Raises:
        ValueError: If the text is not such a time; after a colon 60 and more are refused.
    """
    match = re.fullmatch(r"(?:(?:(\d+):)?([0-5]?\d):(?=[0-5]?\d(?!\d)))?(\d+(?:\.\d*)?)", text)
    if match is None:
        raise ValueError(f"{text} is not a time")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) from "WIDTHxHEIGHT"; None for "auto".

    Raises:
        ValueError: If the text is neither.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"{text} is not a size")
    return int(match[2]), int(match[1])


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA and its strength, written `SOURCE` or `SOURCE=SCALE`.

    Attributes:
        source: A .safetensors file, or on the Hub `owner/name/path/to/file[@revision]`.
        scale: Factor on the LoRA's update; 1 is as trained.
    """

    source: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a LoRA as the command line and JSON write it.

        Only a finite number after the last "=" is a scale; any other "=" belongs to the source.

        Raises:
            ValueError: If the source is empty.
        """
        source, _, tail = text.rpartition("=")
        try:
            scale = float(tail) if source else math.nan
        except ValueError:
            scale = math.nan
        if not text or text.startswith("="):
            raise ValueError(f"{text} is not a LoRA")
        return cls(source, scale) if math.isfinite(scale) else cls(text)

    def __str__(self) -> str:
        """The form that `parse` reads back to the same LoRA."""
        # A source that ends like "=1" would be taken for a scale, so it always carries its own.
        if LoraSpec.parse(self.source) == self:
            return self.source
        return f"{self.source}={self.scale!r}"


class HubId(NamedTuple):
    """A place on the Hub, written `owner/name[/path][@revision]`.

    Attributes:
        repository: `owner/name`.
        path: Of a file in the repository, or "".
        revision: Branch, tag or commit hash; None where none is named.
    """

    repository: str
    path: str = ""
    revision: str | None = None


def split_hub_id(text: str) -> HubId | None:
    """The parts of a Hub id; None for anything else.

    What starts with "." or "~" is a path; so is what has an empty part, such as "/absolute", or
    leads upwards.
    """
    pattern = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([^@]*))?(?:@([\w./-]+))?"
    match = re.fullmatch(pattern, text)
    if match is None or ".." in text.replace("@", "/").split("/"):
        return None
    return HubId(match[1], match[2] or "", match[3])


# Field type -> (JSON types that fit, what an error asks for). A bool never passes for a number.
_JSON_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    Path: ((str, Path), "a path"),
    LoraSpec: ((str,), "a LoRA. Write FILE or FILE=SCALE"),
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}


class UnfitError(ValueError):
    """A value that cannot become what its field holds."""

    def __init__(self, value: object, wanted: str) -> None:
        shown = value if isinstance(value, str | Path) else json.dumps(value, ensure_ascii=False)
        super().__init__(f"{shown} is not {wanted}.")


def decode_time(value: object) -> object:
    """A time in any notation as seconds, other values as they are; "decode" of a field of times.

    Raises:
        UnfitError: If a text is not a time.
    """
    try:
        return parse_time(value) if isinstance(value, str) else value
    except ValueError as error:
        wanted = "a time. Write seconds (12.5) or minutes:seconds (1:02.5)"
        raise UnfitError(value, wanted) from error


@dataclass(frozen=True, kw_only=True)
class Record:
    """A frozen dataclass that checks its single values and lives in JSON.

    The metadata of a field may hold "decode", a function that a value from JSON goes through
    first, and "this_run", see `THIS_RUN`.

    Attributes:
        LEAST: Smallest value of fields that have one.
        MOST: Largest value of fields that have one.
        ABOVE_ZERO: Fields whose value is above 0.
    """

    LEAST: ClassVar[Mapping[str, float]] = {}
    MOST: ClassVar[Mapping[str, float]] = {}
    ABOVE_ZERO: ClassVar[Collection[str]] = ()

    def __post_init__(self) -> None:
        """Refuse single values that cannot work.

        Raises:
            SettingsError: Naming the field and the value.
        """
        hints = get_type_hints(type(self))
        for item in fields(self):
            self._check_value(item.name, _without_none(hints[item.name]), getattr(self, item.name))

    @staticmethod
    def label(name: str) -> str:
        """How an error names a field."""
        return name

    def _check_value(self, name: str, hint: Any, value: object) -> None:
        if value is None:
            return
        label = f"{self.label(name)} {value}"
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise SettingsError(f"{label} is unknown. Known: {', '.join(get_args(hint))}.")
        if isinstance(value, int | float):
            if not math.isfinite(value):
                raise SettingsError(f"{label} is not a finite number.")
            if name in self.LEAST and value < self.LEAST[name]:
                raise SettingsError(f"{label} is too small. Give {self.LEAST[name]} or more.")
            if name in self.MOST and value > self.MOST[name]:
                raise SettingsError(f"{label} is too large. Give {self.MOST[name]} or less.")
            if name in self.ABOVE_ZERO and value <= 0:
                raise SettingsError(f"{label} is too small. Give a number above 0.")

    @classmethod
    def saved_names(cls) -> list[str]:
        """The fields that JSON holds: all but those about one run, such as `overwrite`."""
        return [item.name for item in fields(cls) if "this_run" not in item.metadata]

    def to_json(self) -> dict[str, object]:
        """What shapes the result, ready for `json.dump`; see `saved_names`."""
        return {name: _encode(getattr(self, name)) for name in self.saved_names()}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """A record from JSON, or from the command line's options in the same form.

        Args:
            data: Field name -> value; a missing one keeps its default.

        Raises:
            SettingsError: If a key is unknown, a needed one is missing, or a value cannot work.
        """
        _refuse_unknown(data, [item.name for item in fields(cls)])
        hints = get_type_hints(cls)
        values = {}
        for item in fields(cls):
            label = cls.label(item.name)
            if item.name in data:
                try:
                    value = item.metadata.get("decode", lambda same: same)(data[item.name])
                    values[item.name] = _decode(hints[item.name], value)
                except UnfitError as error:
                    raise SettingsError(f"{label} {error}") from error
            elif item.default is MISSING:
                raise SettingsError(f"{label} is missing.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Options(Record):
    """A record whose fields are the options of a command: an error names them as they are given."""

    @staticmethod
    def label(name: str) -> str:
        """How a field is written on the command line."""
        return option_name(name)


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What a command made, or with `dry_run` what it would make.

    Attributes:
        output: The file or folder.
        facts: JSON values about it: sizes, counts, timings, figures.
    """

    output: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as one flat JSON object."""
        return {"output": str(self.output), **self.facts}


def read_saved_options(path: Path, command: type[Options]) -> dict[str, object]:
    """The options in a `--config` file: a JSON object, or its "settings" as saved with a result.

    Args:
        path: The file.
        command: Settings of the command that is to take them.

    Raises:
        InputError: If the file is missing or holds no JSON object.
        SettingsError: If it names an option that the command does not have.
    """
    try:
        content = read_json_object(path)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"--config {path} cannot be read: {error}.") from error
    saved = content.get("settings", content)
    if not isinstance(saved, dict):
        raise InputError(f"--config {path} cannot be read: its settings are not a JSON object.")
    _refuse_unknown(saved, command.saved_names(), f"--config {path}: ")
    return saved


def read_json_object(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: Saying why it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _without_none(hint: Any) -> Any:
    """`int` for `int | None`; other types as they are."""
    kinds = get_args(hint)
    return next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else hint


def _decode(hint: Any, value: object) -> Any:
    """Turn a JSON or command-line value into what a field of type `hint` holds."""
    if value is None and NoneType in get_args(hint):
        return None
    hint = _without_none(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UnfitError(value, "a list")
        return tuple(_decode(get_args(hint)[0], item) for item in value)
    if get_origin(hint) is Literal:
        hint = str
    json_types, wanted = _JSON_TYPES[hint]
    if not isinstance(value, json_types) or (isinstance(value, bool) and hint is not bool):
        raise UnfitError(value, wanted)
    try:
        return LoraSpec.parse(str(value)) if hint is LoraSpec else hint(value)
    except (ValueError, OverflowError) as error:
        raise UnfitError(value, wanted) from error


def _encode(value: object) -> object:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return str(value) if isinstance(value, Path | LoraSpec) else value


def _refuse_unknown(data: Mapping[str, object], known: Collection[str], where: str = "") -> None:
    unknown = ", ".join(f"'{key}'" for key in data if key not in known)
    if unknown:
        raise SettingsError(f"{where}{unknown} is unknown. Known: {', '.join(sorted(known))}.")
