"""Questions about pictures, as benchmarks of visual question answering publish them.

Files are those of VQAv2 (arXiv 1612.00837), OK-VQA (1906.00067), VizWiz (1802.08218), TextVQA
(1904.08920) and GQA (1902.09506). Which split a file holds is its name's affair: train on none that
is evaluated on.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipelines.stages.converse import SHORT_ANSWER
from udiff.data.storage import open_folder

Benchmark = Literal["vqav2", "okvqa", "vizwiz", "textvqa", "gqa"]
T = TypeVar("T")

_UNANSWERABLE = " Reply unanswerable if information is not present in the image."
_COCO_SPLIT = re.compile(r"(train|val|test)(?:-dev)?(20\d\d)")


class Question(BaseModel):
    """A line of the list: a request for an answer, and what people answered."""

    question_id: int | str
    image: str
    """Path below the benchmark's folder of pictures."""
    question: str
    """As it is to be asked, with what is said of the answer's form."""
    references: list[str] = []
    """None in splits whose answers are kept back."""


class _Answer(BaseModel):
    answer: str


class _CocoQuestion(BaseModel):
    question_id: int
    image_id: int
    question: str


class _CocoQuestions(BaseModel):
    questions: list[_CocoQuestion]


class _CocoAnswers(BaseModel):
    question_id: int
    answers: list[_Answer]


class _CocoAnnotations(BaseModel):
    annotations: list[_CocoAnswers]


class _VizWizQuestion(BaseModel):
    image: str
    question: str
    answers: list[_Answer] = []


class _TextVQAQuestion(BaseModel):
    question_id: int
    image_id: str
    question: str
    answers: list[str] = []


class _TextVQAQuestions(BaseModel):
    data: list[_TextVQAQuestion]


class _GQAQuestion(BaseModel):
    imageId: str  # noqa: N815 (the file's own name)
    question: str
    answer: str | None = None


def read_questions(
    benchmark: Benchmark, file: Path, *, annotations: Path | None = None
) -> Iterator[Question]:
    """Read a benchmark's questions in the order of its file (GQA: of their ids).

    Args:
        benchmark: whose layout the file has.
        file: of the questions.
        annotations: the file of the answers, where they lie apart: of VQAv2 and OK-VQA.

    Raises:
        ValueError: the file has another layout, or the answers are of other questions.
    """
    if annotations is not None and benchmark not in ("vqav2", "okvqa"):
        raise ValueError(f"{benchmark} has its answers beside the questions: no annotations")
    match benchmark:
        case "vqav2" | "okvqa":
            return _read_coco(file, annotations)
        case "vizwiz":
            return _read_vizwiz(file)
        case "textvqa":
            return _read_textvqa(file)
        case "gqa":
            return _read_gqa(file)


def _read_coco(file: Path, annotations: Path | None) -> Iterator[Question]:
    split = _COCO_SPLIT.search(file.name)
    if split is None:
        raise ValueError(f"{file} names no split of COCO (train2014, ...), where the pictures lie")
    name = f"COCO_{split[1]}{split[2]}"
    answers: dict[int, list[str]] = {}
    if annotations is not None:
        found = _load(annotations, TypeAdapter(_CocoAnnotations)).annotations
        answers = {each.question_id: [a.answer for a in each.answers] for each in found}
    for asked in _load(file, TypeAdapter(_CocoQuestions)).questions:
        if annotations is not None and asked.question_id not in answers:
            raise ValueError(f"{annotations} has no answers to question {asked.question_id}")
        yield Question(
            question_id=asked.question_id,
            image=f"{name}_{asked.image_id:012d}.jpg",
            question=asked.question + SHORT_ANSWER,
            references=answers.get(asked.question_id, []),
        )


def _read_vizwiz(file: Path) -> Iterator[Question]:
    for asked in _load(file, TypeAdapter(list[_VizWizQuestion])):
        yield Question(
            question_id=asked.image,
            image=asked.image,
            question=asked.question + SHORT_ANSWER + _UNANSWERABLE,
            references=[each.answer for each in asked.answers],
        )


def _read_textvqa(file: Path) -> Iterator[Question]:
    # Pictures of training and validation lie in one folder.
    folder = "test_images" if "test" in file.stem else "train_images"
    for asked in _load(file, TypeAdapter(_TextVQAQuestions)).data:
        yield Question(
            question_id=asked.question_id,
            image=f"{folder}/{asked.image_id}.jpg",
            question=asked.question + SHORT_ANSWER,
            references=asked.answers,
        )


def _read_gqa(file: Path) -> Iterator[Question]:
    for key, asked in sorted(_load(file, TypeAdapter(dict[str, _GQAQuestion])).items()):
        yield Question(
            question_id=key,
            image=f"images/{asked.imageId}.jpg",
            question=asked.question + SHORT_ANSWER,
            references=[] if asked.answer is None else [asked.answer],
        )


def read_table(file: Path, *, pictures: Path) -> Iterator[Question]:
    """Read a table of questions with their pictures in it, as the hub has VQAv2.

    Columns: `image`, `question`, `question_id`, `image_id` where there is one, and `answers`
    (records with an `answer`), which may be null. The pictures are written to a folder, each once.

    Raises:
        ValueError: a column is missing, or a row has no picture or no name for it.
    """
    table = pq.ParquetFile(file)
    if missing := {"image", "question", "question_id"} - set(table.schema_arrow.names):
        raise ValueError(f"{file} has no column {', '.join(sorted(missing))}")
    folder = open_folder(pictures)
    for batch in table.iter_batches(64):
        for row in batch.to_pylist():
            content = (row["image"] or {}).get("bytes")
            if not content:
                raise ValueError(f"{file}: question {row['question_id']} has no picture")
            number = str(row.get("image_id", row["question_id"]))
            if not number.replace("_", "").replace("-", "").isalnum():  # it names a file
                raise ValueError(f"{file}: image_id {number!r} is no number and no word")
            name = f"{number}.jpg"
            if not folder.exists(name):
                folder.write(name, content)
            yield Question(
                question_id=row["question_id"],
                image=name,
                question=row["question"] + SHORT_ANSWER,
                references=[each["answer"] for each in row.get("answers") or []],
            )


def _load(file: Path, layout: TypeAdapter[T]) -> T:
    try:
        return layout.validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the whole"
        raise ValueError(
            f"{file} is not laid out as this benchmark's files are: {where}: {problem['msg']}"
        ) from None
