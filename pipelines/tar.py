"""Members of a tar by walking its 512-byte headers, about eight times as fast as `tarfile` does.

Understands what img2dataset, webdataset and GNU tar write: ustar, GNU long names, PAX headers.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from tarfile import nti  # type: ignore[attr-defined]  # octal, or base 256 above 8 GB
from typing import Any, BinaryIO

_BLOCK = 512
_FILES = (b"0", b"\0", b"7")
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A file in a tar; offsets in bytes from the start of the stream."""

    name: str
    start: int
    """Of its first header, which is a PAX header where it has one."""
    data: int
    size: int

    @property
    def stop(self) -> int:
        """Offset of the next header."""
        return self.data + _padded(self.size)


@dataclass
class Sample:
    """Members in a row that share a key, by what comes after the first dot of their names."""

    key: str
    members: dict[str, Member]

    @property
    def start(self) -> int:
        """Offset of its first header."""
        return next(iter(self.members.values())).start

    @property
    def stop(self) -> int:
        """Offset of what follows it."""
        return list(self.members.values())[-1].stop


def walk(stream: BinaryIO | io.BufferedReader, *, slice_only: bool = False) -> Iterator[Member]:
    """Yield the regular files of a tar, seeking over their contents.

    Args:
        stream: at the start of a header.
        slice_only: the stream is cut from a larger tar, so it has no end-of-archive block.

    Raises:
        ValueError: a header is damaged, or the tar is cut off before its end-of-archive block.
    """
    start = position = stream.tell()
    extended: dict[str, Any] = {}
    while True:
        header = stream.read(_BLOCK)
        if not header and slice_only:
            return
        if len(header) < _BLOCK:
            raise ValueError(f"cut off at byte {position}, before its end-of-archive block")
        if not header.strip(b"\0"):
            return
        size = int(extended.get("size", _checked_size(header, position)))
        kind, data = header[156:157], position + _BLOCK
        if kind in (b"x", b"L"):
            content = stream.read(size)
            extended |= _pax(content) if kind == b"x" else {"path": _text(content)}
        elif kind in _FILES:
            yield Member(extended.get("path") or _name(header), start, data, size)
        position = data + _padded(size)
        stream.seek(position)
        if kind not in (b"x", b"L"):
            start, extended = position, {}


def samples(members: Iterator[Member]) -> Iterator[Sample]:
    """Group consecutive members into samples, as webdataset does.

    A key goes up to the first dot of the file name; a file without one belongs to no sample. A key
    that comes twice with the same extension is two samples, so that nothing is lost.
    """
    sample: Sample | None = None
    for member in members:
        match = _SAMPLE.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match.group(1), match.group(2).lower()
        if sample is not None and (key != sample.key or extension in sample.members):
            yield sample
            sample = None
        if sample is None:
            sample = Sample(key, {})
        sample.members[extension] = member
    if sample is not None:
        yield sample


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checked_size(header: bytes, position: int) -> int:
    try:
        checksum, size = nti(header[148:156]), nti(header[124:136])
    except Exception as error:
        raise ValueError(f"damaged header at byte {position}: {error}") from error
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum or size < 0:
        raise ValueError(f"damaged header at byte {position}: its checksum does not match")
    return size


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(content: bytes) -> dict[str, str]:
    """Read records of the form `<length> <key>=<value>\\n`."""
    records, position = {}, 0
    while position < len(content) and content[position : position + 1] != b"\0":
        space = content.index(b" ", position)
        stop = position + int(content[position:space])
        key, _, value = content[space + 1 : stop - 1].partition(b"=")
        records[_text(key)] = _text(value)
        position = stop
    return records


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
