"""Stage: fetched pictures -> a shard in img2dataset's layout, in the order of the list.

`00000.tar` has a `.jpg` (or `.png` ...), `.txt` and `.json` per picture, `00000.parquet` a row per
URL with `status` and `error_message`, `00000_stats.json` the counts. Pictures stay as they came.
Times are left out of the statistics: equal answers give equal bytes.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.rows import Reason, Refusal, Rejected
from pipelines.shards import Unit
from pipelines.stages.fetch import Body, DiskError
from udiff.data.manifest import ENTRIES, REJECTED, CacheFile, UnitEntry, to_json
from udiff.data.schema import REJECTED_SCHEMA
from udiff.data.storage import Content, Folder

_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "AVIF": "avif",
}
_FORMATS = tuple(name for name in _EXTENSIONS if name != "MPO")  # which comes as JPEG
_SUCCESS, _FAILURE = "success", "failed_to_download"
_ADDED = (
    pa.field("key", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error_message", pa.string()),
    *(pa.field(name, pa.int32()) for name in ("width", "height")),
    *(pa.field(name, pa.int32()) for name in ("original_width", "original_height")),
    pa.field("sha256", pa.string()),
)


@dataclass(frozen=True)
class Picture:
    """A picture that was fetched, and where its bytes are."""

    start: int
    size: int
    extension: str
    width: int
    height: int
    sha256: str

    def columns(self) -> dict[str, Any]:
        """Describe it as img2dataset does."""
        sides = {"width": self.width, "height": self.height}
        return {
            "status": _SUCCESS,
            **sides,
            **{f"original_{name}": side for name, side in sides.items()},
            "sha256": self.sha256,
        }


class Pictures:
    """Keeps fetched pictures in a file, in the order of their arrival."""

    def __init__(self, file: IO[bytes], hashes: Sequence[str | None]) -> None:
        """Begin with an empty file; `hashes` are the SHA-256 that rows must have, if any."""
        self._file = file
        self._hashes = hashes
        self.found: dict[int, Picture] = {}

    def take(self, place: int, body: Body) -> None:
        """Keep the body of a row, if its header is a picture's.

        Raises:
            Refusal: it is no picture, or not the one that was listed.
        """
        width, height, extension = _look(body)
        body.seek(0)
        sha256 = hashlib.file_digest(body, "sha256").hexdigest()
        if self._hashes[place] not in (None, sha256):
            raise Refusal(Reason.OTHER_HASH, f"sha256 {sha256}")
        start = self._file.tell()
        body.seek(0)
        try:
            shutil.copyfileobj(body, self._file)
        except OSError as error:
            raise DiskError(f"cannot write a temporary file: {error}") from error
        size = self._file.tell() - start
        self.found[place] = Picture(start, size, extension, width, height, sha256)

    def read(self, picture: Picture) -> bytes:
        """Read a picture back."""
        self._file.seek(picture.start)
        return self._file.read(picture.size)


def _look(body: Body) -> tuple[int, int, str]:
    try:
        with Image.open(body, formats=_FORMATS) as image:
            return image.width, image.height, _EXTENSIONS[str(image.format)]
    except Exception as error:  # as many kinds as there are ways to damage a header
        raise Refusal(Reason.NO_PICTURE, error) from error


class WriteShard:
    """Write a shard and its commit, unless another job has committed it.

    Reads: a row per URL (url, caption and what else the list has), pictures, refusals.
    """

    def __init__(self, folder: Folder, *, plan: str, key_digits: int) -> None:
        self._folder = folder
        self._plan = plan
        self._key_digits = key_digits

    def __call__(
        self,
        unit: Unit,
        rows: pa.Table,
        *,
        pictures: Pictures,
        refusals: Sequence[Refusal | None],
        temporary: Path,
    ) -> UnitEntry:
        """Commit a shard; equal pictures and refusals give equal bytes."""
        keys = [f"{unit.name}{place:0{self._key_digits}d}" for place in range(len(rows))]
        described = [
            {"key": key, **_outcome(pictures.found.get(place), refusals[place])}
            for place, key in enumerate(keys)
        ]
        tar = temporary / "shard.tar"
        _write_tar(tar, zip(rows.to_pylist(), described, strict=True), pictures)
        rejected = [
            Rejected(key, url, refusal.reason, refusal.detail)
            for key, url, refusal in zip(keys, rows["url"].to_pylist(), refusals, strict=True)
            if refusal is not None
        ]
        counts = dict(sorted(Counter(str(row.reason) for row in rejected).items()))
        entry = self._entry(unit, len(pictures.found), counts)
        files: dict[str, Content] = {f"{unit.name}.tar": tar}
        files[f"{unit.name}.parquet"] = _parquet(_described(rows, described))
        if rejected:
            files[f"{REJECTED}/{unit.name}.parquet"] = _parquet(_rejected_table(rejected))
        files[f"{unit.name}_stats.json"] = _stats(unit.num_samples, entry)
        files[f"{ENTRIES}/{unit.name}.json"] = to_json(entry)
        self._folder.publish(files)
        return entry

    def _entry(self, unit: Unit, successes: int, rejected: dict[str, int]) -> UnitEntry:
        file = CacheFile(path=f"{unit.name}.tar", rows=successes, row_groups=())
        return UnitEntry(
            unit=unit.name,
            plan=self._plan,
            images_in=unit.num_samples,
            files=(file,) if successes else (),
            rejected=rejected,
        )


def _outcome(picture: Picture | None, refusal: Refusal | None) -> dict[str, Any]:
    if picture is not None:
        return picture.columns()
    if refusal is None:
        raise ValueError("a row without a picture has no reason")
    detail = f": {refusal.detail}" if refusal.detail else ""
    return {"status": _FAILURE, "error_message": f"{refusal.reason}{detail}"}


def _write_tar(
    path: Path, rows: Iterable[tuple[dict[str, Any], dict[str, Any]]], pictures: Pictures
) -> None:
    with path.open("wb") as tar:
        for place, (row, outcome) in enumerate(rows):
            picture = pictures.found.get(place)
            if picture is None:
                continue
            described = json.dumps(row | outcome, default=str).encode()
            for extension, content in (
                (picture.extension, pictures.read(picture)),
                ("txt", (row["caption"] or "").encode()),
                ("json", described),
            ):
                tar.write(_member(f"{outcome['key']}.{extension}", content))
        tar.write(bytes(2 * tarfile.BLOCKSIZE))


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _described(rows: pa.Table, described: Sequence[dict[str, Any]]) -> pa.Table:
    for field in _ADDED:
        values = [outcome.get(field.name) for outcome in described]
        rows = rows.append_column(field, pa.array(values, field.type))
    return rows


def _rejected_table(rejected: Sequence[Rejected]) -> pa.Table:
    return pa.Table.from_pylist([row.columns() for row in rejected], schema=REJECTED_SCHEMA)


def _stats(count: int, entry: UnitEntry) -> bytes:
    successes = sum(file.rows for file in entry.files)
    stats = {
        "count": count,
        "successes": successes,
        "failed_to_download": count - successes,
        "failed_to_resize": 0,
        "status_dict": {_SUCCESS: successes, **entry.rejected},
    }
    return json.dumps(stats, indent=4).encode()


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return pa.py_buffer(sink.getbuffer())
