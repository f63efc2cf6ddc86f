"""Source: a JSON list of picture files with captions.

Dual Diffusion's (`image_path`, `caption`, `re_caption`, `width`, `height`, `ratio`) and LLaVA's
(`image`, `conversations`), as one array or a line per element. A list is never held in memory: a
unit is a slice of its bytes.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pyarrow import fs
from pydantic import PositiveInt

from pipelines.rows import Reason, Refusal, Row
from pipelines.shards import Unit
from pipelines.stages.read_shard import encodable
from udiff.data.manifest import INDEX, to_json
from udiff.data.storage import Folder
from udiff.settings import Settings

_CHUNK_BYTES = 1 << 20
_BETWEEN = " \t\r\n,["


class ListIndex(Settings):
    """Where the units of a list start."""

    fingerprint: str
    unit_rows: PositiveInt
    rows: int
    bounds: tuple[int, ...]
    """Bytes; the last is the end of the last element."""


@dataclass(frozen=True)
class Listed:
    """Pictures that a list names by their paths."""

    folder: Folder
    """Of the list."""
    name: str
    pictures: Folder
    """What the paths are relative to."""
    class_names: tuple[str, ...] = ()

    def fingerprints(self) -> dict[str, str]:
        """Hash the whole list: what changes in its midst must not pass unseen."""
        with self.folder.open(self.name) as file:
            return {self.name: hashlib.file_digest(file, "sha256").hexdigest()}

    def cut(self, output: Folder, name: str, fingerprint: str, num_rows: int) -> list[Unit]:
        """Cut the list, by an index that is made in one pass over it."""
        kept, file = output / INDEX, f"{name}.json"
        index = ListIndex.model_validate_json(kept.read(file)) if kept.exists(file) else None
        if index is None or (index.fingerprint, index.unit_rows) != (fingerprint, num_rows):
            index = self._index(fingerprint, num_rows)
            kept.write(file, to_json(index))
        return [
            Unit(
                name=f"{posixpath.splitext(name)[0]}-{number:05d}",
                source=name,
                num_samples=min(num_rows, index.rows - number * num_rows),
                start=start,
                stop=index.bounds[number + 1],
            )
            for number, start in enumerate(index.bounds[:-1])
        ]

    def _index(self, fingerprint: str, num_rows: int) -> ListIndex:
        bounds, rows, stop = [], 0, 0
        with self.folder.open(self.name) as file:
            try:
                for start, end in element_bounds(file):
                    if rows % num_rows == 0:
                        bounds.append(start)
                    rows, stop = rows + 1, end
            except ValueError as error:
                raise ValueError(f"list {self.folder}/{self.name}: {error}") from error
        if not rows:
            raise ValueError(f"list {self.folder}/{self.name} is empty")
        return ListIndex(
            fingerprint=fingerprint, unit_rows=num_rows, rows=rows, bounds=(*bounds, stop)
        )

    def read(self, unit: Unit) -> Iterator[Row]:
        """Read a slice of the list.

        Writes: key and source (path of the picture), element.
        """
        with self.folder.open(unit.source) as file:
            file.seek(unit.start)
            text = file.read(unit.stop - unit.start).decode("utf-8", "replace")
        elements = list(_elements(text))
        if len(elements) != unit.num_samples:
            raise ValueError(
                f"{self.folder}/{unit.source} holds {len(elements)} elements in bytes {unit.start} "
                f"to {unit.stop}, its index says {unit.num_samples}"
            )
        for number, element in enumerate(elements):
            path = _path(element) or f"unit {unit.name} element {number}"
            path = path.encode("utf-8", "backslashreplace").decode()
            yield {"key": path, "source": f"{unit.source}/{path}", "element": element}

    def take(self, row: Row) -> Row:
        """Take the caption and read the picture.

        Reads: element.
        Writes: file; caption; recaption, where there is one; label; metadata (the whole element).
        Refuses: what names no picture, or one that is not there; texts that cannot be read.
        """
        element, path = row["element"], _path(row["element"])
        if path is None:
            raise Refusal(Reason.MISSING_IMAGE, "names no picture")
        caption = _text(element, "caption")
        if not caption:
            caption = _answer(element.get("conversations"))
        recaption = _text(element, "re_caption")
        return {
            "key": row["key"],
            "source": row["source"],
            "metadata": element,
            "file": read_picture(self.pictures, path),
            "caption": caption,
            "label": element.get("label"),
            **({"recaption": recaption} if recaption else {}),
        }


def read_picture(folder: Folder, path: str) -> bytes:
    """Read the file of a picture.

    Raises:
        Refusal: there is none, or an empty one.
    """
    name = posixpath.normpath(path)
    place = Folder(folder.filesystem, "") if name.startswith("/") else folder
    try:
        content = place.read(name.removeprefix("/"))
    except OSError as error:
        info = place.filesystem.get_file_info(f"{place.path}/{name.removeprefix('/')}")
        if info.type == fs.FileType.File:  # a disk or network that fails
            raise
        raise Refusal(Reason.MISSING_IMAGE, "no such file") from error
    if not content:
        raise Refusal(Reason.EMPTY)
    return content


def element_bounds(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Find the elements of a JSON array, or of JSON lines, in bytes from the start.

    Raises:
        ValueError: it is no JSON, or cut off.
    """
    # Latin-1 gives a character per byte, and leaves all that JSON's grammar looks at as it is.
    decoder, text, offset = json.JSONDecoder(), "", 0
    in_array, ended = False, False
    while True:
        chunk = b"" if ended else file.read(_CHUNK_BYTES)
        ended = not chunk
        text += bytes(chunk).decode("latin-1")
        place = 0
        while True:
            start = _skip(text, place)
            in_array = in_array or "[" in text[place:start]
            if start == len(text) or text[start] == "]":
                break
            try:
                _, place = decoder.raw_decode(text, start)
            except ValueError as error:
                if ended:
                    raise ValueError(f"damaged or cut off at byte {offset + start}") from error
                break
            yield offset + start, offset + place
        if text[start : start + 1] == "]":
            return
        if ended:
            if in_array:
                raise ValueError(f"cut off at byte {offset + start}, before the array's end")
            return
        text, offset = text[start:], offset + start


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BETWEEN:
        place += 1
    return place


def _elements(text: str) -> Iterator[Any]:
    decoder, place = json.JSONDecoder(), 0
    while (place := _skip(text, place)) < len(text):
        element, place = decoder.raw_decode(text, place)
        yield element


def _path(element: Any) -> str | None:
    if not isinstance(element, dict):
        return None
    path = element.get("image_path") or element.get("image")
    return path if isinstance(path, str) else None


def _text(element: dict[str, Any], name: str) -> str:
    text = element.get(name) or ""
    if not isinstance(text, str):
        raise Refusal(Reason.BAD_TEXT, f"{name} is a {type(text).__name__}")
    return encodable(text).strip()


def _answer(conversations: Any) -> str:
    """Give the first turn that is the model's: what LLaVA's captions are."""
    turns = conversations if isinstance(conversations, list) else []
    answers = (turn for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt")
    return _text(next(answers, {}), "value")
