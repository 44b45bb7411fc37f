"""Rows of the CSV and JSONL files that list videos."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping

WrongLine = Callable[[int, str], Exception]  # makes the error for (line, what is wrong with it)


def csv_rows(
    text: str, check_header: Callable[[list[str]], None], wrong_line: WrongLine
) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(number of the line at which it ends, values by column) of each row.

    Args:
        text: With a first line that names the columns.
        check_header: Refuses names of columns.
        wrong_line: Makes what is raised for a damaged line.
    """
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        check_header(header)
        for values in reader:
            if not any(values):  # an empty line, or one of commas as spreadsheets leave them
                continue
            if len(values) != len(header):
                raise wrong_line(
                    reader.line_num,
                    f"{len(values)} values for {len(header)} columns. Quote values with commas.",
                )
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise wrong_line(reader.line_num, f"{error}.") from error


def jsonl_rows(text: str, wrong_line: WrongLine) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(number of the line, values by column) of each row.

    Args:
        text: One JSON object a line; empty lines are passed over.
        wrong_line: Makes what is raised for a damaged line.
    """
    # Not `splitlines`: text in JSON may hold the rarer line ends as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise wrong_line(number, f"not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise wrong_line(number, "not a JSON object.")
        yield number, row
