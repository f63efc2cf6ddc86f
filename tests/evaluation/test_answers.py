"""Ratings of texts: what is not in the reference vectors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluate_answers import main, rate
from udiff.evaluation.answers import CONTRACTIONS, normalize_answer, number_answers, vqa_accuracy
from udiff.evaluation.captions import cut_words, rate_captions


@given(st.text(max_size=60))
def test_words_are_apart_by_single_spaces(text):
    found = normalize_answer(text)
    assert found == " ".join(found.split())
    assert not {"a", "an", "the"} & set(found.split())


def test_the_table_of_contractions_is_the_toolkits():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert normalize_answer("Id've") == "id've"  # keys with capitals never match


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_a_third_for_each_that_agrees(agreeing, accuracy):
    references = number_answers(["red"] * agreeing + ["blue"] * (10 - agreeing))
    assert vqa_accuracy("Red.", references) == pytest.approx(accuracy)


def test_words_are_cut_as_they_are_for_captions():
    assert cut_words("A dog's bone, isn't it?") == "a dog 's bone is n't it"
    assert cut_words("A well-known 3.5 m tree.") == "a well-known 3.5 m tree"


def test_the_captions_themselves_are_rated_best():
    references = [["a red cat on a bus", "the cat"], ["a dog runs"], ["two green trees by a river"]]
    best = rate_captions([each[0] for each in references], references)
    worse = rate_captions(["a bus", "a dog", "a river"], references)
    assert best["bleu_1"] == pytest.approx(1)
    assert best["cider"] > worse["cider"] > 0
    assert rate_captions(["nothing here", "at", "all"], references)["cider"] == 0
    with pytest.raises(ValueError, match="needs references"):
        rate_captions(["a"], [[]])


def test_answers_of_a_file_are_rated(tmp_path, capsys):
    lines = [
        {"question": "what?", "references": ["two"] * 10, "answer": "2"},
        {"question": "who?", "references": ["a dog"] * 2 + ["cat"] * 8, "answer": "dog"},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["--questions", str(file), "--out", str(tmp_path / "rated")]) == 0
    assert json.loads((tmp_path / "rated/scores.json").read_text()) == {
        "vqa_accuracy": 80.0, "num_questions": 2,
    }  # fmt: skip
    assert rate(lines, metric="captions")["bleu_1"] > 0
    file.write_text('{"question": "what?"}\n')
    assert main(["--questions", str(file)]) == 2
    assert "line 1 has no list of references" in capsys.readouterr().err
    file.write_text(json.dumps({"references": ["a"]}))
    assert main(["--questions", str(file)]) == 2
    assert "has no answer: give a --bundle" in capsys.readouterr().err
