"""Stage: pictures -> signatures, by which duplicates are found."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipelines.rows import Reason, Refusal, Row, Rows, cut
from udiff.data.schema import decode_png

if TYPE_CHECKING:
    from pipelines.stages.score import Score

_MIN_CONTRAST = 8  # gray levels; the perceptual hash of anything flatter is noise


def sign_content(row: Row) -> Row:
    """Sign a picture with a hash of its bytes: equal pixels, equal signatures.

    Reads: number, key, width, height, image.
    Writes: row, key, pixels, identity (64 bits), comparable (False); drops all else.
    """
    return _signature(row, _digest(row["image"]), comparable=False)


def sign_perceptually(row: Row) -> Row:
    """Sign a picture with its perceptual hash; a flat one, of which that says nothing, by content.

    64 signs of the low frequencies, as ImageHash's `phash`: what is scaled, compressed again or
    slightly retouched differs in few of them.

    Reads, writes: as `sign_content`; comparable says whether the identity is a perceptual hash.
    Refuses: a picture that cannot be decoded.
    """
    import imagehash

    picture = open_cached(row)
    gray = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX))
    if np.ptp(gray) < _MIN_CONTRAST:
        return sign_content(row)
    bits = np.packbits(imagehash.phash(picture).hash.reshape(-1))
    return _signature(row, int.from_bytes(bits.tobytes(), "big", signed=True), comparable=True)


def sign_by_embedding(rows: Sequence[Row], score: "Score", batch_size: int) -> Rows:
    """Sign the pictures of a unit with a network's embedding.

    Reads, writes: as `sign_content`, and embedding (float16, of length 1).
    Refuses: a picture that cannot be decoded.
    """
    signed = Rows()
    for batch in cut(rows, batch_size):
        decoded = Rows()
        for row in batch:
            decoded.add(row, lambda row: {**row, "picture": open_cached(row)})
        signed.rejected += decoded.rejected
        if not decoded.kept:
            continue
        embeddings = score.embed([row["picture"] for row in decoded.kept]).half().cpu().numpy()
        for row, embedding in zip(decoded.kept, embeddings, strict=True):
            signature = _signature(row, _digest(embedding.tobytes()), comparable=True)
            signed.kept.append({**signature, "embedding": embedding})
    return signed


def open_cached(row: Row) -> Image.Image:
    """Decode the picture of a cached row.

    Reads: image.
    Refuses: a damaged one.
    """
    try:
        return Image.fromarray(decode_png(row["image"]))
    except Exception as error:
        raise Refusal(Reason.CORRUPT, error) from error


def _signature(row: Row, identity: int, *, comparable: bool) -> Row:
    return {
        "row": row["number"],
        "key": row["key"],
        "source": row["source"],
        "pixels": row["width"] * row["height"],
        "identity": identity,
        "comparable": comparable,
    }


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)
