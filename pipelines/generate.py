"""Chain: requests -> pictures or texts, spread over the cluster in batches."""

import base64
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel
from ray.data import ActorPoolStrategy, DataContext

from udiff.generate import Generator, Output


@dataclass(frozen=True)
class Generated:
    """What requests were answered with, in their order, and how fast it came."""

    outputs: list[Output]
    outputs_per_s: float
    """From the start of the first batch to the end of the last."""

    @property
    def pictures(self) -> UInt8[np.ndarray, "pictures height width 3"]:
        """Stack the outputs of an image task whose pictures have one size."""
        return np.stack([output for output in self.outputs if not isinstance(output, str)])


OpenRequest = Callable[[Mapping[str, Any], type[BaseModel]], Mapping[str, Any]]
"""Reads what a request of a kind names by files."""


class _Generate:
    """One generator per actor."""

    def __init__(self, bundle: str, task: str | None, open_request: OpenRequest | None) -> None:
        self._generator = Generator(bundle)
        self._task = task
        self._open = open_request

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        started = time.time()
        requests = json.loads(batch["requests"][0])
        if self._open is not None:
            kind = self._generator.find_task(self._task).request
            requests = [self._open(request, kind) for request in requests]
        outputs = [_pack(each) for each in self._generator.generate(requests, task=self._task)]
        times = {"started": [started], "ended": [time.time()]}
        return {"index": batch["index"], "outputs": [outputs], **times}


def generate(
    bundle: str,
    requests: Sequence[Mapping[str, Any]],
    *,
    workers: int,
    task: str | None = None,
    gpus: float = 0,
    batch_size: int = 64,
    open_request: OpenRequest | None = None,
) -> Generated:
    """Answer each request, with one generator in each of `workers` actors.

    Args:
        bundle: folder that every node reaches.
        requests: each holds the keys of the task's request record; JSON, or bytes for pictures.
        workers: actors.
        task: the family's first where left open.
        gpus: of each worker.
        batch_size: requests that are sampled side by side.
        open_request: what an actor makes of a request first; so that many pictures are never held
            at once, but read where and when they are needed.
    """
    # Arrow would give every request the keys of all others.
    batches = [
        {"index": start, "requests": _to_json(requests[start : start + batch_size])}
        for start in range(0, len(requests), batch_size)
    ]
    context = DataContext.get_current()
    context.enable_progress_bars = False
    rows = (
        ray.data.from_items(batches, override_num_blocks=len(batches))
        .map_batches(
            _Generate,
            fn_constructor_args=(bundle, task, open_request),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers, len(batches))),
            num_cpus=1,
            num_gpus=gpus,
        )
        .take_all()
    )
    ordered = sorted(rows, key=lambda row: row["index"])
    seconds = max(row["ended"] for row in rows) - min(row["started"] for row in rows)
    outputs = [output for row in ordered for output in map(_unpack, row["outputs"])]
    return Generated(outputs, len(outputs) / seconds)


def _to_json(requests: Sequence[Mapping[str, Any]]) -> str:
    def encode(value: Any) -> str:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode("ascii")
        raise TypeError(f"a request holds a {type(value).__name__}: {value!r}")

    return json.dumps([dict(request) for request in requests], default=encode)


def _pack(output: Output) -> bytes:
    """Write a picture as PNG, a text as UTF-8, behind a letter that says which."""
    if isinstance(output, str):
        return b"t" + output.encode()
    file = io.BytesIO()
    Image.fromarray(output).save(file, "PNG", compress_level=1)
    return b"p" + file.getvalue()


def _unpack(data: bytes) -> Output:
    if data[:1] == b"t":
        return data[1:].decode()
    return np.asarray(Image.open(io.BytesIO(data[1:])))
