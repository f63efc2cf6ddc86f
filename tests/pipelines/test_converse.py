"""Conversations: from what is written about a picture to tokens of which some are learned."""

import json

import pytest

from pipelines.latents_settings import TextSettings
from pipelines.rows import Refusal, Rows
from pipelines.stages.converse import SHORT_ANSWER, take_conversation
from pipelines.stages.encode_text import EncodeText
from tests.made import WORDS, save_t5
from udiff.data.conversation import QUESTION, Turn, lay_out
from udiff.encoders.t5 import load_t5
from udiff.settings import T5Settings

END = 1
LLAVA = [
    {"from": "human", "value": "<image>\nwhat is red"},
    {"from": "gpt", "value": "a cat"},
    {"from": "human", "value": "what color is the bus"},
    {"from": "gpt", "value": "blue"},
]


def _take(metadata: dict, key: str = "k") -> list:
    row = {"key": key, "source": "s", "metadata": metadata}
    return json.loads(take_conversation(row)["conversation"])


def test_all_turns_of_llava_are_taken():
    assert _take({"conversations": LLAVA}) == [
        ["\nwhat is red", "a cat"], ["what color is the bus", "blue"],
    ]  # fmt: skip


def test_a_question_gets_one_of_its_answers_by_its_key():
    asked = {"question": "what?", "answers": [{"answer": "red"}, {"answer": "blue"}]}
    found = [_take(asked, key=f"key {number}")[0] for number in range(40)]
    assert {question for question, _ in found} == {"what?" + SHORT_ANSWER}
    assert {answer for _, answer in found} == {"red", "blue"}
    assert found == [_take(asked, key=f"key {number}")[0] for number in range(40)]
    assert _take({"question": "what?", "answer": "red"}) == [["what?" + SHORT_ANSWER, "red"]]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "read/missing_caption"),
        ({"conversations": []}, "read/missing_caption"),
        ({"conversations": [LLAVA[0]]}, "read/missing_caption"),
        ({"conversations": [{"from": "human", "value": None}]}, "read/bad_text"),
        ({"conversations": ["what"]}, "read/bad_text"),
        ({"question": "what?", "answers": "red"}, "read/bad_text"),
        ({"question": "what?", "answers": [3]}, "read/bad_text"),
    ],
)
def test_rows_without_a_conversation_are_refused(metadata, reason):
    with pytest.raises(Refusal) as refused:
        _take(metadata)
    assert refused.value.reason == reason


def test_every_answer_is_learned_and_ended_and_no_question():
    turns = [Turn([5, 6], [7]), Turn([8], [9, 10])]
    tokens = lay_out(turns, num_tokens=10, end_id=END)
    assert tokens.ids == [5, 6, 7, END, 8, 9, 10, END, END, END]
    assert tokens.is_learned == [0, 0, 1, 1, 0, 1, 1, 1, 1, 1]


def test_a_unit_gets_the_tokens_of_its_conversations(tmp_path):
    save_t5(tmp_path / "t5", words=WORDS)
    encoder = load_t5(T5Settings(path=str(tmp_path / "t5"), pad="end"))
    settings = TextSettings(
        name="conversation", encoder="t5", path="t5", source="conversation", store="tokens",
        layout="forward", max_tokens=16,
    )  # fmt: skip
    encode = EncodeText(settings, encoder, device="cpu", batch_size=2)
    row = {"key": "k", "source": "s", "conversation": '[["what is red", "a cat"]]'}
    [encoded] = encode(Rows(kept=[row])).kept
    question = encoder.tokenize_bare(QUESTION.format("what is red"))
    answer = [*encoder.tokenize_bare("a cat"), END]
    rest = 16 - len(question) - len(answer)
    assert encoded["conversation_tokens"].tolist() == question + answer + [END] * rest
    assert encoded["conversation_learned"].tolist() == [0] * len(question) + [1] * (
        len(answer) + rest
    )


def test_a_layout_needs_tokens():
    with pytest.raises(ValueError, match="layout=forward needs store=tokens, got states"):
        TextSettings(encoder="t5", path="t5", layout="forward", max_tokens=16)
