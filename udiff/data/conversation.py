"""Conversations about a picture as token ids, with a mark on the ids that are to be learned."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

QUESTION, QUESTION_BEHIND = "Q: {} A: ", " Q: {}"
"""How a question is written where its answer follows, and where it goes before."""
Layout = Literal["forward", "reverse", "reverse_end"]
"""Question then answer; answer then question; the same with the question at the very end."""


class Tokens(NamedTuple):
    """A text of fixed length."""

    ids: list[int]
    is_learned: list[int]
    """1 for answers and what fills the text up, 0 for questions."""


class Turn(NamedTuple):
    """A question's and an answer's ids, without end tokens."""

    question: Sequence[int]
    answer: Sequence[int]


def lay_out(
    turns: Iterable[Turn], *, num_tokens: int, end_id: int, layout: Layout = "forward"
) -> Tokens:
    """Lay the turns of a conversation out one behind the other.

    Every answer is ended by an end token, and more of them fill the text up. A question or an
    answer longer than `num_tokens` - 1 is cut there, so that a question too long leaves one id of
    its answer. In the reverse layouts, where the question is found for an answer, it is the
    question that is ended.
    """
    longest = num_tokens - 1
    pieces: list[tuple[list[int], int]] = []
    for turn in turns:
        question, answer = list(turn.question[:longest]), list(turn.answer[:longest])
        if layout == "forward":
            pieces += [(question, 0), ([*answer, end_id], 1)]
            continue
        gap = num_tokens - len(answer) - len(question) - 1 if layout == "reverse_end" else 0
        pieces += [(answer, 1), ([end_id] * gap, 1), ([*question, end_id], 0)]
    ids = [token for piece, _ in pieces for token in piece][:num_tokens]
    learned = [mark for piece, mark in pieces for _ in piece][:num_tokens]
    short = num_tokens - len(ids)
    return Tokens(ids + [end_id] * short, learned + [1] * short)


def prompt(question: Sequence[int], *, num_tokens: int, end_id: int) -> Tokens:
    """Lay a question out whose answer is to be found: the marks say where."""
    kept = list(question[: num_tokens - 1])
    rest = num_tokens - len(kept)
    return Tokens(kept + [end_id] * rest, [0] * len(kept) + [1] * rest)
