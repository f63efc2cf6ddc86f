"""Bring a benchmark's questions about pictures into one list, to evaluate or to train on.

    python -m jobs.questions --benchmark okvqa --input OpenEnded_mscoco_val2014_questions.json \\
        --annotations mscoco_val2014_annotations.json --out okvqa.jsonl
    python -m jobs.questions --benchmark gqa --input testdev_balanced_questions.json --out gqa.jsonl
    python -m jobs.questions --benchmark vqav2 --input val.parquet --pictures DIR --out vqav2.jsonl

A line is `{"question_id": ..., "image": "a.jpg", "question": ..., "references": [...]}`, with
the picture's path below the benchmark's folder; a parquet file's are written to --pictures. Then

    python -m jobs.evaluate_answers --bundle BUNDLE --questions okvqa.jsonl --pictures val2014 \\
        --out rated
    python -m jobs.prepare pictures --input train.jsonl --pictures train2014 --conversations \\
        --captions optional --size 512 --output CACHE

GQA's answers are rated with `--metric exact`: there is one for each question.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np

from jobs.console import UserError, make_parser, run_job
from pipelines.questions import Benchmark, Question, read_questions, read_table
from udiff.data.storage import open_folder


def choose(questions: list[Question], *, num: int, seed: int) -> list[Question]:
    """Choose some questions: the first of a permutation, so that fewer are some of more."""
    order = np.random.RandomState(seed).permutation(len(questions))
    return [questions[place] for place in islice(order, num)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    return run_job(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    questions = list(_read(options))
    if options.num is not None:
        if options.num < 1:
            raise UserError(f"--num must be at least 1, got {options.num}")
        questions = choose(questions, num=options.num, seed=options.seed)
    if not questions:
        raise UserError(f"{options.input} holds no questions")
    lines = "".join(each.model_dump_json() + "\n" for each in questions)
    open_folder(options.out.absolute().parent).write(options.out.name, lines.encode())
    answered = sum(bool(each.references) for each in questions)
    print(f"wrote {options.out}: {len(questions)} questions, {answered} of them with answers")


def _read(options: argparse.Namespace) -> Iterator[Question]:
    if options.input.suffix != ".parquet":
        return read_questions(options.benchmark, options.input, annotations=options.annotations)
    if options.pictures is None:
        raise UserError("--pictures names the folder that a table's pictures are written to")
    if options.benchmark != "vqav2" or options.annotations is not None:
        raise UserError("parquet files are those of vqav2, which hold their answers themselves")
    return read_table(options.input, pictures=options.pictures)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.questions", __doc__)
    add = parser.add_argument
    add("--benchmark", choices=get_args(Benchmark), required=True, help="whose files these are")
    add("--input", type=Path, required=True, help="file of the questions: JSON or parquet")
    add("--annotations", type=Path, help="file of the answers, of vqav2 and okvqa")
    add("--pictures", type=Path, help="folder to write a parquet file's pictures to")
    add("--num", type=int, help="this many, chosen at random (default: all, in order)")
    add("--seed", type=int, default=42, help="of that choice (default: %(default)s)")
    add("--out", type=Path, required=True, help="file of JSON lines to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
