"""Rate a model's answers or captions: VQA accuracy, exact answers, or CIDEr and BLEU.

    python -m jobs.evaluate_answers --bundle BUNDLE --questions QUESTIONS.jsonl --out rated
    python -m jobs.evaluate_answers --metric captions --task image_to_text ... --bundle BUNDLE

A line of the questions is a request of the task and its references, as `{"image": "a.jpg",
"question": "what color is it?", "references": ["red", "red", "dark red"]}`. They are answered side
by side on the running Ray; --out gets `answers.jsonl` (each line with its `answer`), `scores.json`,
and of lines that have a `question_id` `submission.json`, as evaluation servers take it. Without
--bundle the lines must hold an `answer` already, as `answers.jsonl` has. `jobs.questions` makes
such lines of a benchmark's files.

VQA accuracy wants ten references of each question, `--metric exact` one; answers are normalized as
the VQA evaluation toolkit does, references always. `--metric none` rates nothing, of questions
whose answers are kept back.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.cluster import connect
from jobs.console import UserError, make_parser, run_job
from jobs.sample import open_pictures
from pipelines.generate import generate
from pipelines.json_lines import read_json_lines
from udiff.bundle import load_bundle
from udiff.data.storage import open_folder
from udiff.evaluation.answers import is_exact, number_answers, vqa_accuracy
from udiff.evaluation.captions import rate_captions

REFERENCES, ANSWER, QUESTION_ID = "references", "answer", "question_id"
METRICS = ("vqa", "exact", "captions", "none")
Line = dict[str, Any]


def rate(lines: Sequence[Line], *, metric: str) -> dict[str, float]:
    """Rate answered lines; accuracies in percent, with two decimals."""
    if metric == "captions":
        return rate_captions([line[ANSWER] for line in lines], [line[REFERENCES] for line in lines])
    if metric == "exact":
        hits = [is_exact(line[ANSWER], line[REFERENCES]) for line in lines]
        return {"exact_accuracy": round(100 * sum(hits) / len(hits), 2)}
    if metric == "none":
        return {}
    scores = [vqa_accuracy(line[ANSWER], number_answers(line[REFERENCES])) for line in lines]
    return {"vqa_accuracy": round(100 * sum(scores) / len(scores), 2)}


def answer(
    lines: Sequence[Line], *, bundle: str, task: str, folder: Path, workers: int, gpus: float
) -> list[Line]:
    """Have a model answer all lines, whose pictures lie in a folder that every node reaches.

    All are tried before the first is answered; the pictures are read again where they are needed.

    Raises:
        UserError: a line is no request of the task, or there is no such task.
    """
    tasks = load_bundle(bundle).system.tasks
    if task not in tasks or tasks[task].output != "text":
        texts = [name for name, each in tasks.items() if each.output == "text"]
        raise UserError(f"--task must be one of {', '.join(texts) or 'none'}; got {task}")
    kind = tasks[task].request
    requests = [{name: line[name] for name in kind.model_fields if name in line} for line in lines]
    read = partial(open_pictures, folder=folder.absolute())
    for number, request in enumerate(requests, 1):
        try:
            kind.model_validate(read(request, kind))
        except (ValueError, OSError) as error:
            raise UserError(f"line {number}: {error}") from None
    connect()
    path = str(Path(bundle).absolute())
    generated = generate(path, requests, task=task, workers=workers, gpus=gpus, open_request=read)
    return [{**line, ANSWER: text} for line, text in zip(lines, generated.outputs, strict=True)]


def read_lines(file: Path, *, metric: str = "vqa") -> list[Line]:
    """Read questions with their references, which all metrics need but `none`.

    Raises:
        ValueError: a line is no JSON object.
        UserError: a line has no references, or there is none.
    """
    lines = []
    for number, line in read_json_lines(file):
        references = line.get(REFERENCES)
        is_list = isinstance(references, list) and all(isinstance(r, str) for r in references)
        if metric != "none" and not (references and is_list):
            raise UserError(f"{file} line {number} has no list of {REFERENCES}")
        lines.append(line)
    if not lines:
        raise UserError(f"{file} holds no questions")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    return run_job(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    lines = read_lines(options.questions, metric=options.metric)
    if not options.bundle:
        _check_answers(lines)
    if options.metric == "vqa":
        _check_references(lines)
    if options.bundle:
        lines = answer(
            lines,
            bundle=options.bundle,
            task=options.task,
            folder=options.pictures or options.questions.parent,
            workers=options.workers,
            gpus=options.gpus,
        )
    if options.out:  # before they are rated, which must not cost what took hours
        _write_answers(lines, options.out)
    scores = {**rate(lines, metric=options.metric), "num_questions": len(lines)}
    text = json.dumps(scores, indent=1)
    if options.out:
        open_folder(options.out).write("scores.json", f"{text}\n".encode())
    print(text)


def _check_answers(lines: Sequence[Line]) -> None:
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get(ANSWER), str):
            raise UserError(f"line {number} has no {ANSWER}: give a --bundle that answers")


def _check_references(lines: Sequence[Line]) -> None:
    for number, line in enumerate(lines, 1):
        if len(line[REFERENCES]) == 1:
            raise UserError(
                f"line {number} has one of the {REFERENCES}, of which VQA accuracy wants ten: no "
                "answer could agree with another; use --metric exact"
            )


def _write_answers(lines: Sequence[Line], out: Path) -> None:
    folder = open_folder(out)
    answered = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    folder.write("answers.jsonl", answered.encode())
    if all(QUESTION_ID in line for line in lines):
        submitted = [{name: line[name] for name in (QUESTION_ID, ANSWER)} for line in lines]
        folder.write("submission.json", json.dumps(submitted, ensure_ascii=False).encode())


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.evaluate_answers", __doc__)
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="JSON lines, with references")
    add("--pictures", type=Path, help="folder of the pictures (default: that of the questions)")
    add("--bundle", help="folder of the bundle that is to answer them")
    add("--task", default="visual_question_answering", help="(default: %(default)s)")
    add("--metric", choices=METRICS, default="vqa", help="(default: %(default)s)")
    add("--out", type=Path, help="folder to write")
    add("--workers", type=int, default=1, help="(default: %(default)s)")
    add("--gpus", type=float, default=0, help="of each worker (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
