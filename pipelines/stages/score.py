"""Stage: how well a picture and its caption go together, and how much people like the picture.

CLIP score: cosine of open_clip's embeddings of picture and caption (arXiv 2104.08718, without its
factor). Aesthetic score: LAION's head on the normalized picture embedding; its heads, linear (v1)
or of several layers without activations between them (v2), are affine maps one after another.
"""

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipelines.rows import Reason, Refusal, Row, Rows
from pipelines.stages.filter import ScoreSettings
from udiff.weights import WeightsError, read_checkpoint

_SCHEMES = ("hf-hub", "local-dir")


class Score:
    """Score the pictures of a batch.

    Reads: picture (PIL, RGB), caption.
    Writes: clip_score (NaN where there is no caption); with a head, aesthetic.
    Refuses: rows below the limits.
    """

    def __init__(self, settings: ScoreSettings, *, device: str) -> None:
        assert settings.clip is not None
        self._settings = settings
        self._device = torch.device(device)
        self._model, self._preprocess, self._tokenize = _load_clip(settings.clip)
        self._model.eval().requires_grad_(False).to(self._device)
        head = settings.aesthetic_head
        self._head = None if head is None else load_head(head).to(self._device)

    def fingerprint(self) -> str:
        """Hash what the scores depend on: preprocessing and weights."""
        digest = hashlib.sha256(repr(self._preprocess).encode())
        for module in filter(None, (self._model, self._head)):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __call__(self, rows: Rows) -> Rows:
        """Score the kept rows, in order; those refused join the rejected."""
        scored = Rows(rejected=list(rows.rejected))
        if not rows.kept:
            return scored
        embeddings = self.embed([row["picture"] for row in rows.kept])
        columns = {"clip_score": self._clip_scores(embeddings, rows.kept)}
        if self._head is not None:
            columns["aesthetic"] = _numpy(self._head(embeddings)[:, 0])
        for number, row in enumerate(rows.kept):
            scores = {name: column[number] for name, column in columns.items()}
            scored.add({**row, **scores}, self._check)
        return scored

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embed pictures; of length 1, float32 (pictures, width)."""
        pixels = torch.stack([self._preprocess(picture) for picture in pictures])
        return normalize(self._model.encode_image(pixels.to(self._device)).float(), dim=-1)

    @torch.inference_mode()
    def _clip_scores(self, embeddings: Tensor, rows: Sequence[Row]) -> np.ndarray:
        tokens = self._tokenize([row["caption"] for row in rows]).to(self._device)
        texts = normalize(self._model.encode_text(tokens).float(), dim=-1)
        scores = _numpy((embeddings * texts).sum(-1))
        return np.where([bool(row["caption"]) for row in rows], scores, np.float32(math.nan))

    def _check(self, row: Row) -> Row:
        limits = (
            ("clip_score", self._settings.min_clip_score, Reason.UNLIKE_CAPTION),
            ("aesthetic", self._settings.min_aesthetic, Reason.UGLY),
        )
        for name, limit, reason in limits:
            if limit is not None and row[name] < limit:
                raise Refusal(reason, f"{name} {row[name]:.3f}, wanted at least {limit:g}")
        return row


def load_head(path: str) -> nn.Module:
    """Load an aesthetic head: pairs `<name>.weight`, `<name>.bias` in the order of their numbers.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it holds no chain of linear layers that ends in one number.
    """
    weights = read_checkpoint(path)
    names = sorted((key for key in weights if key.endswith("weight")), key=_numbers)
    layers: list[nn.Linear] = []
    for name in names:
        weight, bias = weights[name], weights.get(f"{name.removesuffix('weight')}bias")
        fits = not layers or layers[-1].out_features == weight.shape[-1]
        if weight.ndim != 2 or bias is None or not fits:
            raise WeightsError(f"{path}: {name} does not follow in a chain of linear layers")
        layer = nn.Linear(*weight.shape[::-1])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise WeightsError(f"{path} holds no head: its last layer must give one number")
    return nn.Sequential(*layers).float().eval().requires_grad_(False)


def _load_clip(name: str) -> tuple:
    import open_clip

    scheme, _, rest = name.partition(":")
    if not rest:
        raise ValueError(f"clip {name!r} must be NAME:WEIGHTS, hf-hub:ID or local-dir:FOLDER")
    names = (name, None) if scheme in _SCHEMES else (scheme, rest)
    try:
        model, preprocess = open_clip.create_model_from_pretrained(*names)
    except RuntimeError as error:
        raise ValueError(f"clip {name!r} can't be loaded: {error}") from error
    return model, preprocess, open_clip.get_tokenizer(names[0])


def _numbers(key: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", key)]


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
