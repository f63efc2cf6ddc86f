"""Look at a download or a cache: counts, rejects, histograms, and a page of its pictures.

    python -m jobs.inspect --input PICTURES --page look.html
    python -m jobs.inspect --input LATENTS --autoencoder VAE --page look.html --tokenizer T5

Works on folders of shards (ours or img2dataset's), on pictures and on latents, finished or not.
The page shows pictures with captions and recaptions, and what an autoencoder makes of their
latents, or of the pictures themselves.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.console import UserError, make_parser, run_job
from jobs.inspect_page import Shown, make_page
from pipelines.summary import CountTokens, Summary, count_words, find_examples, summarize

_BAR = 30


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("jobs.inspect", __doc__)
    add = parser.add_argument
    add("--input", required=True, help="folder or bucket URI of shards or of a cache")
    add("--page", type=Path, help="HTML file to write")
    add("--examples", type=int, default=24, help="pictures on it (default: %(default)s)")
    add("--autoencoder", help="hub id, folder or bundle, to show reconstructions")
    add("--tokenizer", help="hub id or folder, to count tokens instead of words")
    options = parser.parse_args(arguments)
    return run_job(lambda: _inspect(**vars(options)))


def _inspect(
    input: str,  # noqa: A002 (the option's name)
    page: Path | None,
    examples: int,
    autoencoder: str | None,
    tokenizer: str | None,
) -> None:
    count, unit = (_tokens_of(tokenizer), "tokens") if tokenizer else (count_words, "words")
    summary = summarize(input, count=count)
    print_summary(summary, unit)
    if page is None:
        return
    if autoencoder and summary.kind == "shards":
        raise UserError(f"--autoencoder reconstructs cached pictures; {input} holds shards")
    found = find_examples(input, examples)
    shown = Shown(input, summary, histograms(summary, unit), autoencoder)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(make_page(shown, found), encoding="utf-8")
    print(page)


def print_summary(summary: Summary, unit: str) -> None:
    """Print counts and histograms."""
    console = Console(highlight=False)
    state = "finished" if summary.finished else "not finished"
    console.print(
        f"{summary.kind}, {state}: {summary.rows_in} in = {summary.rows} here + "
        f"{sum(summary.rejected.values())} rejected; {summary.files} files, "
        f"{summary.bytes / 1e6:.1f} MB"
    )
    for title, counts in histograms(summary, unit).items():
        table = Table(title, "rows", "", title_justify="left")
        most = max(counts.values())
        for name, rows in counts.items():
            table.add_row(name, str(rows), "#" * round(_BAR * rows / most))
        console.print(table)
    for name, (number, total, low, high) in sorted(summary.scores.items()):
        console.print(f"{name}: mean {total / number:.3f}, from {low:.3f} to {high:.3f}")


def histograms(summary: Summary, unit: str) -> dict[str, Counter[str]]:
    """Give what there is to show, by title; each in its own order."""
    found = {
        "rejected": Counter(dict(summary.rejected.most_common())),
        "shorter side (pixels)": _sorted(summary.sides),
        "width : height": _sorted(summary.aspects),
        f"caption ({unit})": _sorted(summary.lengths),
        "recaptions per row": _sorted(summary.recaptions),
        "label": Counter(dict(summary.labels.most_common(20))),
    }
    return {title: counts for title, counts in found.items() if counts}


def _sorted(counts: Counter[str]) -> Counter[str]:
    return Counter(dict(sorted(counts.items(), key=lambda item: _place(item[0]))))


def _place(name: str) -> float:
    """Put `<= 64` before `65-128`, `> 512` last, and `3:4` by its value."""
    width, _, height = name.partition(":")
    if height:
        return int(width) / int(height)
    number = int(name.lstrip("<>= ").partition("-")[0])
    return number + (0.5 if name.startswith(">") else 0)


def _tokens_of(tokenizer: str) -> CountTokens:
    from transformers import AutoTokenizer

    known: Any = AutoTokenizer.from_pretrained(tokenizer)
    return lambda captions: [len(ids) for ids in known(list(captions))["input_ids"]]


if __name__ == "__main__":
    sys.exit(main())
