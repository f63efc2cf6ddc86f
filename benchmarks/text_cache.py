"""What trimming texts, and storing each once, saves: a padded float16 cache beside ours.

    python -m benchmarks.text_cache

Captions of real pictures (Tux Paint's stamps), cut by T5's own tokenizer, encoded by a random T5 of
a given width. One cache holds the states of all `--max-tokens` of each row, as a column of float16;
the other is what `jobs.prepare latents --text` writes. Both are parquet with the same row groups
and compression, and are read by the training stream, an epoch each in turn. The states of real
tokens must be equal.
"""

import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import record, spread
from jobs.console import make_parser
from jobs.tiny_encoders import write_t5
from jobs.tuxpaint import fetch, read_samples
from pipelines.latents_settings import TextSettings, states_column
from pipelines.rows import Row, Rows
from pipelines.shards import Unit
from pipelines.stages.encode_text import EncodeText
from pipelines.stages.write import TextColumn, WriteUnit
from udiff.data.manifest import Manifest, Plan, finish, start_plan
from udiff.data.packing import PackedDtype
from udiff.data.schema import tensor_field, text_fields
from udiff.data.storage import Folder, open_folder
from udiff.data.stream import Stream
from udiff.encoders.t5 import load_t5
from udiff.settings import DataSettings, T5Settings

UNIT_ROWS, BATCH_SIZE = 200, 32
NUMBER = pa.field("number", pa.int64(), nullable=False)


def main() -> None:
    """Measure, and record the ratios."""
    parser = make_parser("benchmarks.text_cache", __doc__)
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    captions = [str(sample["txt"], "utf8") for sample in read_samples(fetch(Path(".cache")))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = encode(captions, folder / "t5", options.width, options.max_tokens)
        shape = (options.max_tokens, options.width)
        padded = write_padded(open_folder(folder / "padded"), rows, shape)
        trimmed = {
            dtype: write_trimmed(open_folder(folder / dtype), rows, shape, dtype)
            for dtype in ("float16", "int8")
        }
        compare(padded, trimmed["float16"])
        rounds = [
            {name: read_seconds(cache) for name, cache in {"padded": padded, **trimmed}.items()}
            for _ in range(options.rounds)
        ]
        bytes_of = {name: count_bytes(folder / name) for name in ("padded", *trimmed)}
    tokens = [len(row[states_column("t5")]) for row in rows]
    figures = {
        "captions": len(captions),
        "distinct": len(set(captions)),
        "tokens_per_caption": sum(tokens) / len(tokens),
        "max_tokens": options.max_tokens,
        "width": options.width,
        "padded_mb": bytes_of["padded"] / 1e6,
    }
    for name in trimmed:
        ratios = [seconds["padded"] / seconds[name] for seconds in rounds]
        figures[f"{name}_bytes_ratio"] = bytes_of[name] / bytes_of["padded"]
        figures[f"{name}_times_as_fast"] = spread(ratios)
    record("text_cache", figures)


def encode(captions: Sequence[str], t5: Path, width: int, max_tokens: int) -> list[Row]:
    """Encode captions both ways: all states, and those of real tokens."""
    write_t5(t5, width=width)
    encoder = load_t5(T5Settings(path=str(t5)))
    settings = TextSettings(name="t5", encoder="t5", path=str(t5), max_tokens=max_tokens)
    stage = EncodeText(settings, encoder, device="cpu", batch_size=32)
    whole = EncodeText(
        settings.model_copy(update={"trim": False}), encoder, device="cpu", batch_size=32
    )
    rows = [
        {"key": str(n), "source": "", "number": n, "caption": c} for n, c in enumerate(captions)
    ]
    states = states_column("t5")
    return [
        {**row, "t5": padded[states]}
        for row, padded in zip(stage(Rows(rows)).kept, whole(Rows(rows)).kept, strict=True)
    ]


Cache = tuple[Folder, Manifest]


def write_padded(folder: Folder, rows: list[Row], shape: tuple[int, int]) -> Cache:
    """Write the states of all tokens of each row."""
    return _write(folder, rows, [tensor_field("t5", shape)], [])


def write_trimmed(
    folder: Folder, rows: list[Row], shape: tuple[int, int], dtype: PackedDtype
) -> Cache:
    """Write what `jobs.prepare latents --text` writes."""
    row, states = text_fields("t5", shape, dtype)
    return _write(folder, rows, [row], [TextColumn(states, "caption")])


def _write(
    folder: Folder, rows: list[Row], fields: list[pa.Field], texts: list[TextColumn]
) -> Cache:
    plan = Plan(kind="latents", identity={}, options={}, inputs={}, shapes={})
    start_plan(folder, plan)
    write = WriteUnit(
        folder,
        schema=pa.schema([NUMBER, *fields]),
        texts=texts,
        plan=plan.fingerprint,
        row_group_size=64,
    )
    names = []
    for start in range(0, len(rows), UNIT_ROWS):
        unit = rows[start : start + UNIT_ROWS]
        names.append(f"{start:06d}")
        write(Unit(names[-1], "captions", len(unit)), Rows(unit))
    return folder, finish(folder, plan, names)


def compare(padded: Cache, trimmed: Cache) -> None:
    """Check that the states of all real tokens are equal.

    Raises:
        ValueError: they are not.
    """
    for one, other in zip(_epoch(padded), _epoch(trimmed), strict=True):
        is_real = torch.arange(one["t5"].shape[1]) < other["t5_length"][:, None]
        masked = one["t5"] * is_real[..., None]
        if not torch.equal(one["number"], other["number"]) or not torch.equal(masked, other["t5"]):
            raise ValueError("the two caches hold other states")


def read_seconds(cache: Cache) -> float:
    """Measure the CPU seconds that an epoch of the training stream takes, all threads together."""
    started = time.process_time()
    for _ in _epoch(cache):
        pass
    return time.process_time() - started


def _epoch(cache: Cache) -> list[dict[str, torch.Tensor]]:
    folder, manifest = cache
    stream = Stream(folder, manifest, ("number", "t5"), DataSettings())
    batches = stream.batches(0, batch_size=BATCH_SIZE, seed=0)
    taken = list(islice(batches, manifest.num_rows // BATCH_SIZE))
    batches.close()
    return taken


def count_bytes(folder: Path) -> int:
    """Count the bytes of a cache's data and texts."""
    parts = (folder / name for name in ("data", "texts"))
    return int(np.sum([file.stat().st_size for part in parts for file in part.glob("*.parquet")]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
