"""Stage: what is known of a picture -> a conversation about it."""

import hashlib
import json
from itertools import pairwise
from typing import Any

from pipelines.rows import Reason, Refusal, Row
from pipelines.stages.read_shard import encodable

PICTURE_MARK = "<image>"
"""Where LLaVA's questions stand to the picture; what is left of its line stays."""
SHORT_ANSWER = " Answer the question using a single word or phrase."
"""Behind questions that come with short reference answers, as published."""


def take_conversation(row: Row) -> Row:
    """Take all turns of a conversation, or a question with one of its reference answers.

    Reads: metadata: LLaVA's `conversations`; or `question` and `answer` or `answers` (texts, or
    records with an `answer`), of which one is picked by the row's key and question; or a line of
    `jobs.questions`, whose `references` are such answers, and its question as it is to be asked.
    Writes: conversation, the JSON list of [question, answer].
    Refuses: rows without any, or with one that cannot be read.
    """
    turns = _turns(row.get("metadata") or {}, row["key"])
    if not turns:
        raise Refusal(Reason.MISSING_CAPTION, "no conversation")
    return {**row, "conversation": json.dumps(turns, ensure_ascii=False)}


def _turns(metadata: dict[str, Any], key: str) -> list[tuple[str, str]]:
    said = metadata.get("conversations")
    if isinstance(said, list):
        values = [(_field(turn, "from"), _field(turn, "value")) for turn in said]
        pairs = pairwise(values)
        return [
            (question.replace(PICTURE_MARK, ""), answer)
            for (asker, question), (teller, answer) in pairs
            if (asker, teller) == ("human", "gpt")
        ]
    if "question" not in metadata:
        return []
    question = _text(metadata["question"])
    if "references" in metadata:
        answers = metadata["references"]
    else:
        question += SHORT_ANSWER
        answers = metadata.get("answers") or [metadata.get("answer")]
    if not isinstance(answers, list):
        raise Refusal(Reason.BAD_TEXT, "the answers are no list")
    return [(question, _pick(answers, f"{key} {question}"))] if answers else []


def _pick(answers: list[Any], key: str) -> str:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % len(answers)
    picked = answers[number]
    return _text(picked.get("answer") if isinstance(picked, dict) else picked)


def _field(turn: Any, name: str) -> str:
    return _text(turn.get(name) if isinstance(turn, dict) else None)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Refusal(Reason.BAD_TEXT, f"a turn is a {type(value).__name__}")
    return encodable(value)
