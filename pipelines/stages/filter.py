"""Stage: which rows are wanted."""

from pipelines.rows import Reason, Refusal, Row
from udiff.data.schema import NO_LABEL

_MAX_LABEL = 2**63


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


def check_size(row: Row, *, min_side: int) -> Row:
    """Refuse pictures whose shorter side has less than `min_side` pixels.

    Reads: width, height.
    """
    if min(row["width"], row["height"]) < min_side:
        detail = f"{row['width']} x {row['height']}, wanted at least {min_side} on each side"
        raise Refusal(Reason.TOO_SMALL, detail)
    return row
