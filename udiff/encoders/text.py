"""What every text encoder can do, whichever library it comes from."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor


@runtime_checkable
class TextEncoder(Protocol):
    """Turns texts into token ids, and ids into a state per token."""

    @property
    def width(self) -> int:
        """Length of a token's state."""

    def tokenize(
        self, texts: Sequence[str], max_tokens: int
    ) -> Int64[Tensor, "texts {max_tokens}"]:
        """Cut texts into tokens, each ended, cut and filled up as this encoder does it."""

    def count_tokens(self, ids: Int64[Tensor, "texts tokens"]) -> Int64[Tensor, " texts"]:
        """Count the tokens of each text, its start and end included, what fills it up not."""

    def encode(self, ids: Int64[Tensor, "texts tokens"]) -> Float[Tensor, "texts tokens width"]:
        """Find the states, on the encoder's device."""

    def fingerprint(self) -> str:
        """Hash what the states depend on: tokenizer, configuration and weights."""


@runtime_checkable
class Prompted(Protocol):
    """Encoders whose tokens can be put together piece by piece."""

    end_id: int

    def tokenize_bare(self, text: str) -> list[int]:
        """Cut a text into tokens, as many as it has, without an end token."""
