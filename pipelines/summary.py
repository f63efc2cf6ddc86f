"""What is in a download or a cache: counts, histograms, and some of its rows to look at."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipelines.rows import carry
from pipelines.source import Source, open_source
from pipelines.stages.decode import decode, identify
from udiff.data.manifest import (
    MANIFEST,
    PLAN,
    Kind,
    Plan,
    read_entries,
    read_manifest,
)
from udiff.data.schema import column_values, decode_png
from udiff.data.storage import Folder, open_folder

CountTokens = Callable[[Sequence[str]], Sequence[int]]

_LATENTS = ("latent_mean", "latent")
_SCORES = ("clip_score", "aesthetic")
_SIDES = (64, 128, 256, 512, 1024, 2048)
_LENGTHS = (0, 4, 8, 16, 32, 64, 128, 256, 512)
_ASPECTS = {"1:2": 1 / 2, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0}
_ASPECTS |= {"4:3": 4 / 3, "3:2": 3 / 2, "2:1": 2.0}
_STATS = "_stats.json"
_EXAMPLE_PIXELS = 64_000_000


@dataclass
class Summary:
    """Counts of a download or a cache; every row is in it or rejected."""

    kind: Kind
    finished: bool
    rows_in: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    sides: Counter[str] = field(default_factory=Counter)
    """Shorter sides of the original pictures, in pixels."""
    aspects: Counter[str] = field(default_factory=Counter)
    """Width over height, the nearest."""
    lengths: Counter[str] = field(default_factory=Counter)
    """Of captions, in words or tokens."""
    recaptions: Counter[str] = field(default_factory=Counter)
    """Captions of a model that a row has."""
    labels: Counter[str] = field(default_factory=Counter)
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Number, sum, least and most."""

    def add(self, columns: dict[str, pa.ChunkedArray], count: CountTokens) -> None:
        """Count the rows of one file."""
        if "width" in columns:
            width, height = (columns[side].to_numpy() for side in ("width", "height"))
            self.sides.update(_bins(np.minimum(width, height), _SIDES))
            self.aspects.update(map(_nearest_aspect, (width / height).tolist()))
        if "caption" in columns:
            captions = [caption or "" for caption in columns["caption"].to_pylist()]
            self.lengths.update(_bins(np.array(count(captions)), _LENGTHS))
        if "recaption" in columns:
            self.recaptions.update(str(len(made)) for made in columns["recaption"].to_pylist())
        if "label" in columns:
            self.labels.update(str(label) for label in columns["label"].to_pylist())
        for name in set(_SCORES) & set(columns):
            values = columns[name].to_numpy()
            if len(values := values[np.isfinite(values)]):
                found = self.scores.get(name, [0, 0.0, math.inf, -math.inf])
                low, high = min(found[2], values.min()), max(found[3], values.max())
                sums = [found[0] + len(values), found[1] + float(values.sum())]
                self.scores[name] = [*sums, float(low), float(high)]


@dataclass
class Example:
    """A row to look at."""

    key: str
    caption: str
    recaption: list[str]
    label: str
    size: str
    picture: Image.Image | None
    latent: np.ndarray | None
    """Raw, float (channels, height, width)."""


def count_words(captions: Sequence[str]) -> list[int]:
    """Count what spaces separate."""
    return [len(caption.split()) for caption in captions]


def summarize(location: str, *, count: CountTokens = count_words) -> Summary:
    """Count a download or a cache, finished or not, a file at a time.

    Raises:
        FileNotFoundError: there is neither.
    """
    folder = open_folder(location)
    if folder.exists(MANIFEST):
        manifest = read_manifest(folder)
        summary = Summary(manifest.kind, finished=True, rows_in=manifest.images_in)
        summary.rejected.update(manifest.rejected)
        files = [(file.path, file.rows) for file in manifest.files]
    elif folder.exists(PLAN):
        plan = Plan.model_validate_json(folder.read(PLAN))
        summary, files = Summary(plan.kind, finished=False), []
        for entry in read_entries(folder):
            summary.rows_in += entry.images_in
            summary.rejected.update(entry.rejected)
            files += [(file.path, file.rows) for file in entry.files]
    else:
        summary, files = _summarize_shards(folder)
    summary.rows, summary.files = sum(rows for _, rows in files), len(files)
    for path, _ in files:
        summary.bytes += _size(folder, path)
        summary.add(_columns(folder, path.replace(".tar", ".parquet")), count)
    return summary


def find_examples(location: str, number: int) -> list[Example]:
    """Take rows from all over a download or a finished cache.

    Raises:
        FileNotFoundError: there is neither.
    """
    folder = open_folder(location)
    if not folder.exists(MANIFEST) or read_manifest(folder).kind == "shards":
        return list(_shard_examples(open_source(location), number))
    manifest = read_manifest(folder)
    wanted = np.unique(np.linspace(0, manifest.num_rows - 1, number).astype(int))
    examples: list[Example] = []
    start = 0
    for file in manifest.files:
        rows = wanted[(wanted >= start) & (wanted < start + file.rows)] - start
        if len(rows):
            examples += _cached_examples(folder, file.path, rows, manifest.class_names)
        start += file.rows
    return examples


def _summarize_shards(folder: Folder) -> tuple[Summary, list[tuple[str, int]]]:
    """Read img2dataset's own statistics."""
    names = [name for name in folder.names() if name.endswith(_STATS)]
    if not names:
        raise FileNotFoundError(f"{folder} holds no cache and no shards (*{_STATS})")
    summary, files = Summary("shards", finished=True), []
    for name in names:
        stats = json.loads(folder.read(name))
        summary.rows_in += stats["count"]
        failures = {
            kind: n for kind, n in stats.get("status_dict", {}).items() if kind != "success"
        }
        summary.rejected.update(failures)
        files.append((f"{name.removesuffix(_STATS)}.tar", stats["successes"]))
    return summary, files


def _columns(folder: Folder, path: str) -> dict[str, pa.ChunkedArray]:
    """Read what is counted; of a shard, the rows that are in its tar."""
    wanted = {"width", "height", "caption", "recaption", "label", "status", *_SCORES}
    if not folder.exists(path):
        return {}
    with folder.open(path) as source:
        file = pq.ParquetFile(source)
        table = file.read([name for name in file.schema_arrow.names if name in wanted])
    if "status" in table.column_names:
        table = table.filter(pc.equal(table["status"], "success"))
    return {name: table[name] for name in table.column_names}


def _size(folder: Folder, path: str) -> int:
    with folder.open(path) as file:
        return file.size()


def _cached_examples(
    folder: Folder, path: str, rows: np.ndarray, class_names: Sequence[str]
) -> Iterator[Example]:
    with folder.open(path) as source:
        table = pq.read_table(source).take(rows)
    latent = next((name for name in _LATENTS if name in table.column_names), None)
    latents = column_values(table[latent], table.schema.field(latent)) if latent else None
    for number in range(len(rows)):
        row = {name: table[name][number].as_py() for name in table.column_names if name != latent}
        label = row.get("label", -1)
        yield Example(
            key=row["key"],
            caption=row.get("caption", ""),
            recaption=row.get("recaption", []),
            label=class_names[label] if 0 <= label < len(class_names) else "",
            size=f"{row['width']} x {row['height']}" if "width" in row else "",
            picture=Image.fromarray(decode_png(row["image"])) if "image" in row else None,
            latent=None if latents is None else np.asarray(latents[number], np.float32),
        )


def _shard_examples(source: Source, number: int) -> Iterator[Example]:
    """Take the first pictures of shards from all over."""
    files = list(source.fingerprints().items())
    places = np.unique(np.linspace(0, len(files) - 1, min(number, len(files))).astype(int))
    each = math.ceil(number / len(places))
    with TemporaryDirectory() as name:
        for place in places.tolist():
            file, fingerprint = files[int(place)]
            units = source.cut(open_folder(name), file, fingerprint, each)
            for row in _decoded(source, units[0]) if units else ():
                yield Example(
                    key=row["key"],
                    caption=row["caption"],
                    recaption=[],
                    label="" if row["label"] is None else str(row["label"]),
                    size=f"{row['width']} x {row['height']}",
                    picture=row["picture"],
                    latent=None,
                )


def _decoded(source: Source, unit: Any) -> list[dict[str, Any]]:
    def header(row: dict[str, Any]) -> dict[str, Any]:
        return identify(row, max_pixels=_EXAMPLE_PIXELS)

    return carry(source.read(unit), source.take, header, decode).kept


def _bins(values: np.ndarray, edges: Sequence[int]) -> Counter[str]:
    """Count values per bin, of which each edge is the last value but for the sides' first one."""
    counts: Counter[str] = Counter()
    for value in np.searchsorted(edges, values, side="left").tolist():
        low = edges[value - 1] + 1 if value else None
        high = edges[value] if value < len(edges) else None
        name = f"{low}-{high}" if low is not None and high is not None else f"> {edges[-1]}"
        counts[f"<= {high}" if low is None else name] += 1
    return counts


def _nearest_aspect(ratio: float) -> str:
    return min(_ASPECTS, key=lambda name: abs(math.log(ratio / _ASPECTS[name])))
