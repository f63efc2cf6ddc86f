"""VQA accuracy (arXiv 1505.00468) as Dual Diffusion's evaluation measures it.

Normalization is that of the VQA evaluation toolkit (GT-Vision-Lab, BSD 2-clause), its table of
contractions included, with ordinal numbers beside the cardinal ones. Two habits of the published
evaluation: full stops go only up to 32 in a text, and after a digit too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
_GROUPED_DIGITS = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
    "first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th",
    "sixth": "6th", "seventh": "7th", "eighth": "8th", "ninth": "9th", "tenth": "10th",
    "eleventh": "11th",
    "twelth": "12th",  # misspelt in the published table, so that "twelfth" stays as it is
}  # fmt: skip
# Every word that has one spelling without any of its apostrophes ...
_WITHOUT = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've
"""
# ... and those with two apostrophes, which may lack either of them, or with other spellings.
_DOUBLE = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll
"""
_OTHER = {
    "let's": "let's", "she's": "she's", "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
}  # fmt: skip
CONTRACTIONS: dict[str, str] = {
    **{word.replace("'", ""): word for word in _WITHOUT.split()},
    **{word.replace("'", "", 1): word for word in _DOUBLE.split()},
    **{"".join(word.rsplit("'", 1)): word for word in _DOUBLE.split()},
    **_OTHER,
}
"""Keys with capitals are in the published table, and never match a lower-case word."""


def normalize_answer(text: str) -> str:
    """Bring an answer to the form in which answers are compared."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    has_grouped_digits = _GROUPED_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        is_apart = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if is_apart or has_grouped_digits else " ")
    bare = _FULL_STOP.sub("", bare, count=_MAX_FULL_STOPS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[Mapping[str, Any]]) -> float:
    """Rate an answer from 0 to 1: a third for each that agrees, each reference left out in turn.

    Args:
        prediction: as the model gave it.
        references: records with an `answer`, told apart by an `answer_id`. Records that equal the
            one left out are left out with it: of ten equal ones without ids none is there to agree.
    """
    # The prediction twice, as officially: deleted punctuation may have made another contraction.
    answer = normalize_answer(normalize_answer(prediction))
    records = [{**record, "answer": normalize_answer(record["answer"])} for record in references]
    scores = []
    for left_out in records:
        others = [record for record in records if record != left_out]
        agreeing = sum(record["answer"] == answer for record in others)
        scores.append(min(1.0, agreeing / 3))
    return sum(scores) / len(scores)


def is_exact(prediction: str, references: Sequence[str]) -> bool:
    """Say whether an answer is one of the references, all normalized: GQA's accuracy."""
    answer = normalize_answer(normalize_answer(prediction))
    return answer in {normalize_answer(reference) for reference in references}


def number_answers(answers: Sequence[str]) -> list[dict[str, Any]]:
    """Make records of plain reference answers."""
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]
