"""Clean-up of generated captions: words and groups of words that are repeated at once."""

_OPENING, _CLOSING = "([{", "?!.,:;}])"
_NEXT, _BEFORE = object(), object()
"""Marks: the piece before this one sticks to the next, the next one to the piece before."""


def clean_caption(text: str) -> str:
    """Remove repetitions of words, and of groups of them; punctuation counts as a word.

    "blue car blue car in the street" becomes "blue car in the street". Punctuation that stands free
    is joined to its word.
    """
    pieces = [piece for word in text.split() for piece in _split_punctuation(word)]
    length = 1
    while 2 * length <= len(pieces):
        pieces = _remove_repeats(pieces, length)
        length += 1
    return _join(pieces)


def merge_words(text: str) -> str:
    """Remove repetitions of single words, as the first release did."""
    words = text.split()
    return " ".join(w for w, before in zip(words, [None, *words], strict=False) if w != before)


def _split_punctuation(word: str) -> list[object]:
    front: list[object] = []
    while word and word[0] in _OPENING:
        front += [word[0], _NEXT]
        word = word[1:]
    back: list[object] = []
    while word and word[-1] in _CLOSING:
        back = [_BEFORE, word[-1], *back]
        word = word[:-1]
    return [*front, *([word] if word else []), *back]


def _remove_repeats(pieces: list[object], length: int) -> list[object]:
    start = 0
    while start + 2 * length <= len(pieces):
        middle = start + length
        if pieces[start:middle] == pieces[middle : middle + length]:
            pieces = pieces[:start] + pieces[middle:]
        else:
            start += 1
    return pieces


def _join(pieces: list[object]) -> str:
    text, is_joined = "", True
    for piece in pieces:
        if isinstance(piece, str):
            text += piece if is_joined else f" {piece}"
            is_joined = False
        else:
            is_joined = True
    return text
