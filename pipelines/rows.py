"""Rows on their way through a chain, and why some of them do not arrive.

Every sample that comes in ends as exactly one row: cached, or rejected with a reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

Item = TypeVar("Item")
Row = dict[str, Any]
Stage = Callable[[Row], Row]
"""Gives the row with what it adds; raises `Refusal` for a row that must not go on."""


class Reason(StrEnum):
    """Why a row is rejected, as `stage/reason`: the whole vocabulary."""

    BAD_URL = "download/bad_url"
    ADDRESS = "download/address"
    """Not public, and not allowed."""
    NAME = "download/name"
    """Has no address."""
    CONNECTION = "download/connection"
    TLS = "download/tls"
    TIMEOUT = "download/timeout"
    DEADLINE = "download/deadline"
    REDIRECTS = "download/redirects"
    NOT_FOUND = "download/not_found"
    FORBIDDEN = "download/forbidden"
    BUSY = "download/busy"
    SERVER_ERROR = "download/server_error"
    STATUS = "download/status"
    """Any other than 200."""
    OPTED_OUT = "download/opted_out"
    TOO_MANY_BYTES = "download/too_many_bytes"
    CUT_OFF = "download/cut_off"
    NO_PICTURE = "download/no_picture"
    OTHER_HASH = "download/other_hash"
    MISSING_IMAGE = "read/missing_image"
    MISSING_CAPTION = "read/missing_caption"
    EMPTY = "read/empty"
    BAD_TEXT = "read/bad_text"
    UNIDENTIFIED = "decode/unidentified"
    TRUNCATED = "decode/truncated"
    CORRUPT = "decode/corrupt"
    BOMB = "decode/bomb"
    UNSUPPORTED = "decode/unsupported"
    TOO_SMALL = "filter/too_small"
    TOO_LARGE = "filter/too_large"
    BAD_ASPECT = "filter/bad_aspect"
    BAD_LABEL = "filter/bad_label"
    WATERMARK = "filter/watermark"
    UNSAFE = "filter/unsafe"
    UNLIKE_CAPTION = "filter/unlike_caption"
    UNSCORED = "filter/unscored"
    LANGUAGE = "filter/language"
    UGLY = "filter/ugly"
    DUPLICATE = "dedup/duplicate"
    RECAPTION_EMPTY = "recaption/empty"
    RECAPTION_REPEATED = "recaption/repeated"
    RECAPTION_TOO_LONG = "recaption/too_long"
    NOT_FINITE = "encode/not_finite"


class Refusal(Exception):  # noqa: N818 (the outcome of a row, not an error of the program)
    """Raised by a stage for a row that it does not let through."""

    def __init__(self, reason: Reason, detail: object = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = stable_text(detail)


@dataclass(frozen=True)
class Rejected:
    """A row that is in no cache."""

    key: str
    source: str
    reason: Reason
    detail: str

    def columns(self) -> dict[str, str]:
        """Give the row as it is stored."""
        stage, reason = self.reason.split("/")
        return {
            "key": self.key,
            "source": self.source,
            "stage": stage,
            "reason": reason,
            "detail": self.detail,
        }


@dataclass
class Rows:
    """The rows of one unit, in the order of its source: those kept, and those rejected."""

    kept: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def add(self, row: Row, *stages: Stage) -> None:
        """Carry one row through all stages, so that only one large picture is in memory."""
        try:
            for stage in stages:
                row = stage(row)
        except Refusal as refusal:
            self.reject(row, refusal)
        else:
            self.kept.append(row)

    def reject(self, row: Row, refusal: Refusal) -> None:
        """Note why a row is left out."""
        self.rejected.append(Rejected(row["key"], row["source"], refusal.reason, refusal.detail))

    def rejected_counts(self) -> dict[str, int]:
        """Count the rejected rows per `stage/reason`."""
        return dict(sorted(Counter(str(row.reason) for row in self.rejected).items()))


def carry(rows: Iterable[Row], *stages: Stage) -> Rows:
    """Carry rows through all stages, one after another."""
    carried = Rows()
    for row in rows:
        carried.add(row, *stages)
    return carried


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut rows, or anything else, into batches, in order; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_PATH = re.compile(r"(?<!\w)/(?:[\w.@+-]+/)+[\w.@+-]*")


def stable_text(detail: object) -> str:
    """Shorten a message and take out addresses and paths: a second run must write the same."""
    text = " ".join(str(detail).split())
    for pattern, substitute in ((_OBJECT, "<object>"), (_ADDRESS, "<address>"), (_PATH, "<path>")):
        text = pattern.sub(substitute, text)
    return text[:200].encode("utf-8", "backslashreplace").decode()
