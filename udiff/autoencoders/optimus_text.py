"""Texts for Optimus: word pieces of BERT's cased vocabulary, byte pairs of GPT-2's."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from udiff.weights import WeightsError

ENCODER_VOCABULARY, DECODER_VOCABULARY, DECODER_MERGES = "vocab.txt", "vocab.json", "merges.txt"
MAX_PIECES = 77
"""Word pieces of a text that are encoded, beside start and end."""

_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class OptimusTokenizer:
    """Texts -> ids for the encoder, texts -> ids for the decoder, ids of the decoder -> text."""

    def __init__(
        self,
        pieces: Mapping[str, int],
        byte_pairs: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
    ) -> None:
        """Take the vocabularies; the decoder's has three more: filler, start, end."""
        self.pieces, self.byte_pairs, self.merges = dict(pieces), dict(byte_pairs), list(merges)
        self.pad_id = len(byte_pairs)
        self._special = {self.pad_id: "<PAD>", self.pad_id + 1: "<BOS>", self.pad_id + 2: "<EOS>"}

    @cached_property
    def _word_pieces(self) -> Any:
        from transformers import BertTokenizer

        return BertTokenizer(vocab=self.pieces, do_lower_case=False, strip_accents=False)

    @cached_property
    def _bytes(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=self.byte_pairs, merges=self.merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def encode(
        self, texts: Sequence[str], *, max_pieces: int = MAX_PIECES
    ) -> Int64[Tensor, "texts tokens"]:
        """Cut texts for the encoder: in lower case, between [CLS] and [SEP], filled up with 0."""
        tokenizer = self._word_pieces
        rows = []
        for text in texts:
            pieces = tokenizer.tokenize(text.lower())[:max_pieces]
            ids = tokenizer.convert_tokens_to_ids(pieces)
            rows.append([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id])
        return _filled(rows, max_pieces + 2, 0)

    def encode_labels(
        self, texts: Sequence[str], *, max_tokens: int
    ) -> Int64[Tensor, "texts tokens"]:
        """Cut texts for the decoder, between start and end; longer ones lose what is too much."""
        rows = [
            [self.pad_id + 1, *self.byte_ids(text)[: max_tokens - 2], self.pad_id + 2]
            for text in texts
        ]
        return _filled(rows, max_tokens, self.pad_id)

    def byte_ids(self, text: str) -> list[int]:
        """Cut one text into byte pairs; a space is put before it, if it has anything."""
        text = text.strip()
        return self._bytes.encode(f" {text}").ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Turn the decoder's ids into text, without its first and last word: start and end."""
        return " ".join(self.decode_raw(ids).split()[1:-1])

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Turn the decoder's ids into text, with names of the special ones."""
        text, run = "", []
        for number in ids:
            if number not in self._special:
                run.append(number)
                continue
            text += self._bytes.decode(run) + f" {self._special[number]}"
            run = []
        text += self._bytes.decode(run)
        for spaced, joined in _CLEAN_UP:
            text = text.replace(spaced, joined)
        return text

    def save(self, folder: str | Path) -> None:
        """Write the vocabularies, as BERT and GPT-2 publish theirs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pieces = sorted(self.pieces, key=self.pieces.__getitem__)
        (folder / ENCODER_VOCABULARY).write_text("\n".join(pieces) + "\n", encoding="utf-8")
        (folder / DECODER_VOCABULARY).write_text(json.dumps(self.byte_pairs), encoding="utf-8")
        merges = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / DECODER_MERGES).write_text("\n".join(merges) + "\n", encoding="utf-8")


class OptimusTokens(nn.Module):
    """Texts -> ids alone, for caches that Optimus itself is trained on."""

    def __init__(self, cut: Callable[[Sequence[str], int], Tensor], fill: int, about: str) -> None:
        """Take what cuts texts to a length, what fills them up, and what is hashed."""
        super().__init__()
        self._cut, self._fill, self._about = cut, fill, about

    @classmethod
    def of_pieces(cls, tokenizer: OptimusTokenizer) -> "OptimusTokens":
        """Cut texts for the encoder."""
        return cls(
            lambda texts, length: tokenizer.encode(texts, max_pieces=length - 2),
            0,
            json.dumps(tokenizer.pieces),
        )

    @classmethod
    def of_labels(cls, tokenizer: OptimusTokenizer) -> "OptimusTokens":
        """Cut texts for the decoder."""
        return cls(
            lambda texts, length: tokenizer.encode_labels(texts, max_tokens=length),
            tokenizer.pad_id,
            json.dumps([tokenizer.byte_pairs, tokenizer.merges]),
        )

    @property
    def width(self) -> int:
        """Nothing: there are no states."""
        return 0

    def tokenize(
        self, texts: Sequence[str], max_tokens: int
    ) -> Int64[Tensor, "texts {max_tokens}"]:
        """Cut texts, start and end among the `max_tokens`; short ones are filled up."""
        return self._cut(texts, max_tokens)

    def count_tokens(self, ids: Int64[Tensor, "texts tokens"]) -> Int64[Tensor, " texts"]:
        """Count the tokens of each text."""
        return (ids != self._fill).sum(1)

    def encode(self, ids: Int64[Tensor, "texts tokens"]) -> Float[Tensor, "texts tokens 0"]:
        """Find no states."""
        return torch.empty(*ids.shape, 0)

    def fingerprint(self) -> str:
        """Hash the vocabulary."""
        return hashlib.sha256(self._about.encode()).hexdigest()


def load_optimus_tokenizer(folder: str | Path) -> OptimusTokenizer:
    """Read a folder with BERT's `vocab.txt`, GPT-2's `vocab.json` and `merges.txt`.

    Raises:
        FileNotFoundError: one of them is not there.
        WeightsError: one of them is damaged.
    """
    files = [Path(folder) / n for n in (ENCODER_VOCABULARY, DECODER_VOCABULARY, DECODER_MERGES)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"the tokenizers of Optimus need {file}, which does not exist")
    pieces, byte_pairs, merges = (file.read_text(encoding="utf-8") for file in files)
    try:
        pairs = [tuple(line.split(" ")) for line in merges.split("\n")[1:] if line]
        return OptimusTokenizer(
            {piece: number for number, piece in enumerate(pieces.rstrip("\n").split("\n"))},
            json.loads(byte_pairs),
            [(first, second) for first, second in pairs],
        )
    except ValueError as error:
        raise WeightsError(f"the vocabularies in {folder} are damaged: {error}") from error


def train_optimus_tokenizer(texts: Sequence[str], *, num_tokens: int) -> OptimusTokenizer:
    """Learn small vocabularies from texts, in place of the published ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=num_tokens, special_tokens=special)
    words.train_from_iterator([text.lower() for text in texts], trainer)
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        [f" {text}" for text in texts],
        trainers.BpeTrainer(vocab_size=num_tokens, initial_alphabet=alphabet),
    )
    merges = [(first, second) for first, second in json.loads(pairs.to_str())["model"]["merges"]]
    return OptimusTokenizer(words.get_vocab(), pairs.get_vocab(), merges)


def _filled(rows: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    filled = torch.full((len(rows), length), pad)
    for row, ids in zip(filled, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return filled
