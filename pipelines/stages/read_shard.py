"""Stage: the samples of a shard, and what is to be taken from each."""

import io
import json
from collections.abc import Iterator
from typing import Any

from pipelines.rows import Reason, Refusal, Row
from pipelines.shards import Unit
from pipelines.tar import Sample, samples, walk
from udiff.data.storage import Folder

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")


def read_slice(folder: Folder, unit: Unit) -> Iterator[Row]:
    """Read a unit's samples with one seek and one read.

    Writes: key; source (shard/member); members (bytes by extension).

    Raises:
        ValueError: the shard does not hold the samples that its index says.
    """
    with folder.open(unit.source) as file:
        file.seek(unit.start)
        content = file.read(unit.stop - unit.start)
    found = list(samples(walk(io.BytesIO(content), slice_only=True)))
    if len(found) != unit.num_samples:
        raise ValueError(
            f"{folder}/{unit.source} holds {len(found)} samples in bytes {unit.start} to "
            f"{unit.stop}, its index says {unit.num_samples}"
        )
    for sample in found:
        yield {
            "key": sample.key,
            "source": f"{unit.source}/{_name(sample)}",
            "members": {
                extension: content[member.data : member.data + member.size]
                for extension, member in sample.members.items()
            },
        }


def _name(sample: Sample) -> str:
    """Name the picture of a sample, or its first member where it has none."""
    picture = _picture_extension(sample.members)
    return sample.members[picture or next(iter(sample.members))].name


def take_fields(row: Row) -> Row:
    """Take picture, caption and label from a sample's members.

    The caption is `.txt`, else `caption` in `.json`; the label is `.cls`, else `label` in `.json`.

    Reads: members.
    Writes: file (bytes of the picture); caption ("" for none); label as it is written, or None;
    metadata (all that `.json` says).
    Refuses: a missing or empty picture, text that cannot be read.
    """
    members = row["members"]
    extension = _picture_extension(members)
    if extension is None:
        raise Refusal(Reason.MISSING_IMAGE, f"only {', '.join(members)}")
    if not members[extension]:
        raise Refusal(Reason.EMPTY)
    described = _json(members["json"]) if "json" in members else {}
    caption = _text(members["txt"]) if "txt" in members else described.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise Refusal(Reason.BAD_TEXT, f"caption is a {type(caption).__name__}")
    caption = encodable(caption or "").strip()
    label = _text(members["cls"]) if "cls" in members else described.get("label")
    kept = {"key": row["key"], "source": row["source"], "metadata": described}
    return {**kept, "file": members[extension], "caption": caption, "label": label}


def _picture_extension(members: dict[str, Any]) -> str | None:
    return next((extension for extension in PICTURES if extension in members), None)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(Reason.BAD_TEXT, error) from error


def _json(content: bytes) -> dict[str, Any]:
    try:
        described = json.loads(_text(content))
    except (ValueError, RecursionError) as error:
        raise Refusal(Reason.BAD_TEXT, f"json: {error}") from error
    if not isinstance(described, dict):
        raise Refusal(Reason.BAD_TEXT, f"json holds a {type(described).__name__}")
    return described


def encodable(text: str) -> str:
    """Refuse what JSON can write but UTF-8 cannot: lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(Reason.BAD_TEXT, error) from error
    return text
