"""Questions of benchmarks: small files of each layout, to be evaluated and to be trained on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.evaluate_answers import main as evaluate
from jobs.evaluate_answers import read_lines
from jobs.questions import main
from pipelines.rows import Refusal
from pipelines.source import open_source
from pipelines.stages.converse import SHORT_ANSWER, take_conversation
from tests.made import WORDS, save_autoencoder, save_random_bundle, save_t5
from udiff.data.storage import open_folder
from udiff.recipe import load_recipe

VOCABULARY = len(WORDS) + 4

ANSWERS = [{"answer": "red", "answer_id": number} for number in range(1, 11)]
COCO = {
    "questions": [
        {"question_id": 71, "image_id": 7, "question": "what color?"},
        {"question_id": 90, "image_id": 9, "question": "how many?"},
    ],
    "data_type": "mscoco",
}
# In another order than the questions.
COCO_ANSWERS = {
    "annotations": [
        {"question_id": 90, "answers": [{"answer": "2"}] * 10},
        {"question_id": 71, "answers": ANSWERS},
    ]
}
VIZWIZ = [
    {"image": "VizWiz_val_0.jpg", "question": "what is this", "answers": ANSWERS, "answerable": 1},
    {"image": "VizWiz_val_1.jpg", "question": "and this"},
]
TEXTVQA = {
    "data": [
        {"question_id": 5, "image_id": "00a", "question": "which brand?", "answers": ["x"] * 10}
    ]
}
GQA = {
    "20": {"question": "is it red?", "answer": "yes", "imageId": "n1", "isBalanced": True},
    "10": {"question": "who is it?", "answer": "man", "imageId": "n2"},
}


def _write(file: Path, content: Any) -> str:
    file.write_text(json.dumps(content))
    return str(file)


def _list(tmp_path: Path, benchmark: str, *arguments: str) -> list[dict]:
    out = tmp_path / "out.jsonl"
    assert main(["--benchmark", benchmark, *arguments, "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("benchmark", ["vqav2", "okvqa"])
def test_answers_of_coco_are_joined_by_the_id_of_the_question(tmp_path, benchmark):
    questions = _write(tmp_path / "OpenEnded_mscoco_val2014_questions.json", COCO)
    answers = _write(tmp_path / "mscoco_val2014_annotations.json", COCO_ANSWERS)
    assert _list(tmp_path, benchmark, "--input", questions, "--annotations", answers) == [
        {
            "question_id": 71, "image": "COCO_val2014_000000000007.jpg",
            "question": "what color?" + SHORT_ANSWER, "references": ["red"] * 10,
        },
        {
            "question_id": 90, "image": "COCO_val2014_000000000009.jpg",
            "question": "how many?" + SHORT_ANSWER, "references": ["2"] * 10,
        },
    ]  # fmt: skip
    held_back = _write(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", COCO)
    found = _list(tmp_path, benchmark, "--input", held_back)
    assert [each["references"] for each in found] == [[], []]
    assert found[0]["image"] == "COCO_test2015_000000000007.jpg"


def test_each_other_layout_is_read(tmp_path):
    first, second = _list(tmp_path, "vizwiz", "--input", _write(tmp_path / "val.json", VIZWIZ))
    assert first["references"] == ["red"] * 10
    assert first["question"].endswith("if information is not present in the image.")
    assert (second["image"], second["references"]) == ("VizWiz_val_1.jpg", [])
    [only] = _list(tmp_path, "textvqa", "--input", _write(tmp_path / "TextVQA_val.json", TEXTVQA))
    assert (only["image"], only["references"]) == ("train_images/00a.jpg", ["x"] * 10)
    found = _list(tmp_path, "gqa", "--input", _write(tmp_path / "val_all.json", GQA))
    assert [each["question_id"] for each in found] == ["10", "20"]
    assert [each["image"] for each in found] == ["images/n2.jpg", "images/n1.jpg"]
    assert [each["references"] for each in found] == [["man"], ["yes"]]


def _picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def test_pictures_of_a_table_are_written_once_each(tmp_path):
    rows = [
        {
            "image": {"bytes": _picture(number // 2), "path": None}, "image_id": number // 2,
            "question_id": number, "question": f"q{number}",
            "answers": ANSWERS if number else None,
        }
        for number in range(4)
    ]  # fmt: skip
    file = tmp_path / "validation.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    pictures = tmp_path / "pictures"
    found = _list(tmp_path, "vqav2", "--input", str(file), "--pictures", str(pictures))
    assert [each["image"] for each in found] == ["0.jpg", "0.jpg", "1.jpg", "1.jpg"]
    assert [len(each["references"]) for each in found] == [0, 10, 10, 10]
    assert (pictures / "1.jpg").read_bytes() == _picture(1)
    assert main(["--benchmark", "vqav2", "--input", str(file), "--out", str(tmp_path / "o")]) == 2


def test_a_table_cannot_write_outside_its_folder(tmp_path, capsys):
    row = {"image": {"bytes": _picture(1)}, "question_id": "../escaped", "question": "q"}
    file, pictures = tmp_path / "test.parquet", tmp_path / "pictures"
    pq.write_table(pa.Table.from_pylist([row]), file)
    options = ["--input", str(file), "--pictures", str(pictures), "--out", str(tmp_path / "out")]
    assert main(["--benchmark", "vqav2", *options]) == 2
    assert "image_id '../escaped'" in capsys.readouterr().err
    assert not (tmp_path / "escaped.jpg").exists()
    assert main(["--benchmark", "gqa", *options]) == 2
    assert "parquet files are those of vqav2" in capsys.readouterr().err


def test_fewer_chosen_questions_are_some_of_more(tmp_path):
    many = {f"{n:03d}": {**GQA["10"], "question": f"q{n}"} for n in range(50)}
    file = _write(tmp_path / "val_all.json", many)
    few, more = (_list(tmp_path, "gqa", "--input", file, "--num", n) for n in ("5", "20"))
    assert few == more[:5]
    order = np.random.RandomState(42).permutation(50)[:5]
    assert [each["question"] for each in few] == [f"q{n}" + SHORT_ANSWER for n in order]


@pytest.mark.parametrize(
    ("benchmark", "content", "message"),
    [
        ("okvqa", {"questions": [{"question": "?"}]}, "questions.0.question_id"),
        ("vizwiz", GQA, "the whole: Input should be a valid array"),
        ("textvqa", {"data": []}, "holds no questions"),
        ("gqa", {"1": {"question": "?"}}, "1.imageId: Field required"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, capsys, benchmark, content, message):
    file, out = _write(tmp_path / "val2014.json", content), tmp_path / "out.jsonl"
    assert main(["--benchmark", benchmark, "--input", file, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_answers_of_other_questions_are_refused(tmp_path, capsys):
    questions = _write(tmp_path / "val2014.json", COCO)
    answers = _write(tmp_path / "answers.json", {"annotations": COCO_ANSWERS["annotations"][:1]})
    end = ["--annotations", answers, "--out", str(tmp_path / "out")]
    assert main(["--benchmark", "okvqa", "--input", questions, *end]) == 2
    assert "has no answers to question 71" in capsys.readouterr().err
    unnamed = _write(tmp_path / "questions.json", COCO)
    assert main(["--benchmark", "okvqa", "--input", unnamed, *end]) == 2
    assert "names no split of COCO" in capsys.readouterr().err
    gqa = _write(tmp_path / "gqa.json", GQA)
    assert main(["--benchmark", "gqa", "--input", gqa, *end]) == 2
    assert "has its answers beside the questions" in capsys.readouterr().err


def test_the_lines_are_rows_to_train_on(tmp_path):
    file = _write(tmp_path / "val_all.json", GQA)
    assert len(_list(tmp_path, "gqa", "--input", file)) == 2
    (tmp_path / "images").mkdir()
    for name in ("n1", "n2"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(_picture(1))
    source = open_source(str(tmp_path / "out.jsonl"), pictures=str(tmp_path))
    [(name, digest)] = source.fingerprints().items()
    [unit] = source.cut(open_folder(tmp_path / "cache"), name, digest, 10)
    rows = [take_conversation(source.take(row)) for row in source.read(unit)]
    assert [json.loads(row["conversation"]) for row in rows] == [
        [["who is it?" + SHORT_ANSWER, "man"]], [["is it red?" + SHORT_ANSWER, "yes"]],
    ]  # fmt: skip
    with pytest.raises(Refusal):
        take_conversation({"key": "k", "metadata": {"question": "?", "references": []}})


def test_the_lines_are_rated_and_submitted(tmp_path, capsys):
    lines = _list(tmp_path, "gqa", "--input", _write(tmp_path / "val_all.json", GQA))
    answered = [
        {**line, "answer": text} for line, text in zip(lines, ["A man.", "no"], strict=True)
    ]
    file, out = tmp_path / "answered.jsonl", tmp_path / "rated"
    file.write_text("".join(json.dumps(line) + "\n" for line in answered))
    start = ["--questions", str(file), "--out", str(out)]
    assert evaluate([*start, "--metric", "exact"]) == 0
    assert json.loads((out / "scores.json").read_text())["exact_accuracy"] == 50.0
    assert json.loads((out / "submission.json").read_text()) == [
        {"question_id": "10", "answer": "A man."}, {"question_id": "20", "answer": "no"},
    ]  # fmt: skip
    assert evaluate(start) == 2
    assert "use --metric exact" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.long
def test_a_model_answers_the_questions_of_a_benchmark(tmp_path, capsys):
    """Over Ray; the actors read the pictures, and the model's autoencoder is a bundle."""
    file = _write(tmp_path / "val_all.json", GQA)
    _list(tmp_path, "gqa", "--input", file)
    save_t5(tmp_path / "t5")
    save_autoencoder(tmp_path / "vae")
    overrides = [
        f"network={{depth: 1, num_heads: 2, head_dim: 8, text_dim: 24, vocab_size: {VOCABULARY}}}",
        f"text={{max_tokens: 24, mask_id: {VOCABULARY - 1}}}",
        f"autoencoder.path={tmp_path / 'vae'}",
        f"text_encoder.path={tmp_path / 't5'}",
    ]
    recipe = load_recipe("dual_diffusion/debug", overrides)
    save_random_bundle(tmp_path / "bundle", recipe, seed=1)
    pictures, out = tmp_path / "pictures", tmp_path / "rated"
    start = [
        "--bundle", str(tmp_path / "bundle"), "--questions", str(tmp_path / "out.jsonl"),
        "--pictures", str(pictures), "--metric", "exact", "--out", str(out),
    ]  # fmt: skip
    assert evaluate(start) == 2
    assert "line 1: " in capsys.readouterr().err  # no such picture: nothing is begun
    (pictures / "images").mkdir(parents=True)
    for name in ("n1", "n2"):
        (pictures / "images" / f"{name}.jpg").write_bytes(_picture(1))
    assert evaluate(start) == 0
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["10", "20"]
    assert all(isinstance(line["answer"], str) for line in lines)
    assert json.loads((out / "scores.json").read_text())["num_questions"] == 2


def test_questions_whose_answers_are_kept_back_are_answered_alone(tmp_path, capsys):
    file = tmp_path / "test.jsonl"
    file.write_text('{"question_id": 1, "references": [], "answer": "a\\u2028b"}\n')
    assert evaluate(["--questions", str(file), "--metric", "none"]) == 0
    assert json.loads(capsys.readouterr().out) == {"num_questions": 1}
    assert evaluate(["--questions", str(file)]) == 2
    file.write_text('{"references": ["a"]}\n[1]\n')
    with pytest.raises(Exception, match="line 2 is no JSON object, but a list"):
        read_lines(file)
    file.write_text("{")
    with pytest.raises(Exception, match="line 1 is no JSON"):
        read_lines(file)
