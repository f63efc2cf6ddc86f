"""Stage: which of a model's captions are kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.rows import Reason, Refusal, Row

if TYPE_CHECKING:
    from pipelines.recaption import RecaptionSettings

DEFAULT_PROMPT = "Describe this picture in one sentence."
"""What a model that chats is asked where nothing else is."""
_MAX_PHRASE_WORDS = 8
_MAX_IN_A_ROW = 3


class Made(NamedTuple):
    """A caption as the model gave it."""

    text: str
    ended: bool
    """Whether the model came to an end by itself."""


def keep_sane(row: Row, *, settings: "RecaptionSettings") -> Row:
    """Keep the captions that say something, once each.

    Reads: made; recaption (captions of an earlier run, which stay before the new ones), if any.
    Writes: recaption; drops made.
    Refuses: a row with fewer than `min_captions` new ones, for what its first bad caption is.
    """
    sane: list[str] = []
    refusals = []
    for caption in row["made"]:
        text = " ".join(caption.text.split())
        try:
            check_caption(text, caption.ended, settings.max_chars)
        except Refusal as refusal:
            refusals.append(refusal)
            continue
        if text not in sane:
            sane.append(text)
    if len(sane) < settings.min_captions:
        raise next(iter(refusals), Refusal(Reason.RECAPTION_REPEATED, "the same caption again"))
    rest = {name: value for name, value in row.items() if name != "made"}
    return {**rest, "recaption": [*row.get("recaption", []), *sane]}


def check_caption(text: str, ended: bool, max_chars: int) -> None:
    """Refuse captions that are empty, go round in circles, or do not come to an end."""
    if not any(character.isalnum() for character in text):
        raise Refusal(Reason.RECAPTION_EMPTY, text)
    if phrase := find_repeated(text.split()):
        raise Refusal(Reason.RECAPTION_REPEATED, phrase)
    if not ended:
        raise Refusal(Reason.RECAPTION_TOO_LONG, "cut off at max_tokens")
    if len(text) > max_chars:
        raise Refusal(Reason.RECAPTION_TOO_LONG, f"{len(text)} characters, at most {max_chars}")


def find_repeated(words: Sequence[str]) -> str:
    """Find a phrase of up to 8 words that comes more than 3 times in a row; "" for none."""
    for length in range(1, _MAX_PHRASE_WORDS + 1):
        run = 0  # words that equal the one a phrase before
        for place in range(length, len(words)):
            run = run + 1 if words[place] == words[place - length] else 0
            if run == length * _MAX_IN_A_ROW:
                return " ".join(words[place - length + 1 : place + 1])
    return ""
