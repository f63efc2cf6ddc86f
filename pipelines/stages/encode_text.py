"""Stage: texts -> tokens and the states of their tokens. One encoder per actor."""

import json
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipelines.latents_settings import TextSettings, read_text, states_column
from pipelines.rows import Row, Rows
from pipelines.stages.encode_image import check_finite, to_stored
from udiff.data.conversation import QUESTION, QUESTION_BEHIND, Turn, lay_out
from udiff.encoders.text import Prompted, TextEncoder


class EncodeText:
    """Encode each distinct text of a unit once, in the order of their first use.

    Reads: the column of the texts (str, or list of str).
    Writes: `<name>_states`, float (tokens, width), without what belongs to padding, and
    `<name>_tokens`, int32 (max_tokens,), whichever is stored; the same arrays for equal texts.
    Conversations (`layout`) become `<name>_tokens` and `<name>_learned`, int32 (max_tokens,).
    Refuses: texts whose states the stored type cannot hold.
    """

    def __init__(
        self, settings: TextSettings, encoder: TextEncoder, *, device: str, batch_size: int
    ) -> None:
        self._settings = settings
        self._encoder = encoder
        self._device = torch.device(device)
        self._batch_size = batch_size

    def shape(self) -> tuple[int, int]:
        """Find the largest number of tokens that have states, and their width."""
        ids = self._encoder.tokenize([""], self._settings.max_tokens)
        _, tokens, width = self._encode(ids).shape
        return tokens, width

    def __call__(self, rows: Rows) -> Rows:
        """Encode the texts of the rows kept."""
        source = self._settings.source
        texts = [read_text(row, source) for row in rows.kept]
        columns = dict(self._columns(list(dict.fromkeys(texts))))
        encoded = Rows(rejected=rows.rejected)
        for row, text in zip(rows.kept, texts, strict=True):
            values = columns[text]
            encoded.add({**row, **values}, partial(check_finite, names=tuple(values)))
        return encoded

    def _columns(self, texts: Sequence[str]) -> Iterator[tuple[str, Row]]:
        settings = self._settings
        for start in range(0, len(texts), self._batch_size):
            batch = texts[start : start + self._batch_size]
            if settings.layout != "plain":
                yield from zip(batch, map(self._lay_out, batch), strict=True)
                continue
            ids = self._encoder.tokenize(batch, settings.max_tokens)
            columns: list[Row] = [{} for _ in batch]
            if settings.store != "states":
                for row, values in zip(columns, ids.to(torch.int32).numpy(), strict=True):
                    row[f"{settings.name}_tokens"] = values
            if settings.store != "tokens":
                for row, states in zip(columns, self._states(ids), strict=True):
                    row[states_column(settings.name)] = states
            yield from zip(batch, columns, strict=True)

    def _lay_out(self, conversation: str) -> Row:
        settings, encoder = self._settings, self._encoder
        assert settings.layout != "plain"
        if not isinstance(encoder, Prompted):
            raise TypeError(f"texts.{settings.name}: {settings.encoder} lays out no conversations")
        question = QUESTION if settings.layout == "forward" else QUESTION_BEHIND
        turns = [
            Turn(encoder.tokenize_bare(question.format(asked)), encoder.tokenize_bare(answer))
            for asked, answer in json.loads(conversation)
        ]
        tokens = lay_out(
            turns, num_tokens=settings.max_tokens, end_id=encoder.end_id, layout=settings.layout
        )
        values = np.array(tokens.ids, np.int32), np.array(tokens.is_learned, np.int32)
        return dict(zip(settings.token_columns(), values, strict=True))

    def _states(self, ids: Tensor) -> list[np.ndarray]:
        states = to_stored(self._encode(ids), self._settings.dtype)
        counts = self._encoder.count_tokens(ids).tolist()
        if not self._settings.trim:
            return list(states)
        # A copy: a view would keep the padding in memory as long as the unit is there.
        return [each[:count].copy() for each, count in zip(states, counts, strict=True)]

    @torch.inference_mode()
    def _encode(self, ids: Tensor) -> Tensor:
        return self._encoder.encode(ids.to(self._device))
