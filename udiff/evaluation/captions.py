"""CIDEr (arXiv 1411.5726) and BLEU (ACL P02-1040) of captions, by pycocoevalcap without its Java.

Java does no more there than cut texts into words (Stanford's PTB tokenizer), which is done here by
a regular expression: lower case, punctuation left out, contractions cut as PTB does.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't)|\w+(?:[-.]\w+)*")


def rate_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Rate captions against the references of each: `cider`, and `bleu_1` to `bleu_4`, from 0 up.

    CIDEr weighs words by how few pictures they are said of, so that it needs many pictures: of one
    alone it is 0.

    Raises:
        ValueError: there are no captions, or one has no references.
        ModuleNotFoundError: pycocoevalcap (extra `captions`) is not installed.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if not captions or not all(references) or len(captions) != len(references):
        raise ValueError("every caption needs references, and there must be some captions")
    found = {number: [cut_words(caption)] for number, caption in enumerate(captions)}
    wanted = {number: [cut_words(text) for text in each] for number, each in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    cider, _ = Cider().compute_score(wanted, found)
    return {"cider": float(cider), **{f"bleu_{n}": float(b) for n, b in enumerate(bleu, 1)}}


def cut_words(text: str) -> str:
    """Cut a text into words, with single spaces between them."""
    return " ".join(_WORD.findall(text.lower()))
