"""Files of one JSON object a line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class JsonLine(NamedTuple):
    """An object, and the number of its line, from 1."""

    number: int
    value: dict[str, Any]


def parse_json_lines(lines: Iterable[str]) -> Iterator[JsonLine]:
    """Read the objects of lines; blank ones are passed over.

    Raises:
        ValueError: a line is no JSON object; says which.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"line {number} is no JSON object, but a {type(value).__name__}")
        yield JsonLine(number, value)


def read_json_lines(file: Path) -> list[JsonLine]:
    """Read a file; raises as `parse_json_lines` does, with the file's name."""
    # Not `splitlines`: texts may hold what that takes for an end of a line.
    try:
        return list(parse_json_lines(file.read_text("utf-8").split("\n")))
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None
