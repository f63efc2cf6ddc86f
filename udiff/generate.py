"""What a bundle makes of requests: pictures or text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import ValidationError
from torch import Tensor

from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_uint8
from udiff.bundle import load_bundle, load_decoder
from udiff.samplers import ticks
from udiff.system import Task

Picture = UInt8[np.ndarray, "height width 3"]
Output = Picture | str


@dataclass(eq=False)
class Sample:
    """What one request asked for, under way."""

    task: Task
    running: ticks.Running


class Generator:
    """A bundle and its autoencoder on one device."""

    def __init__(self, bundle: str | Path, *, device: str | None = None) -> None:
        """Load a bundle.

        Args:
            bundle: its folder.
            device: of torch; the GPU where there is one, else the CPU.

        Raises:
            FileNotFoundError: there is no bundle, or no autoencoder for it.
            ValueError: there is nothing that it could be asked for.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_bundle(bundle)
        self.recipe, self.tasks = loaded.recipe, loaded.system.tasks
        if not self.tasks:
            raise ValueError(f"{bundle} is a bundle of family {self.recipe.family}, without a task")
        for task in self.tasks.values():
            task.network.to(self.device)
        self._decoder: KLAutoencoder | None = None
        if any(task.output == "image" for task in self.tasks.values()):
            self._decoder = load_decoder(loaded).to(self.device)
            if loaded.system.use_autoencoder is not None:
                loaded.system.use_autoencoder(self._decoder)

    def find_task(self, name: str | None = None) -> Task:
        """Find a task by its name; without one, the family's first.

        Raises:
            ValueError: the family has no such task.
        """
        if name is None:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            raise ValueError(
                f"family {self.recipe.family} has no task {name}; it has {', '.join(self.tasks)}"
            )
        return self.tasks[name]

    @torch.inference_mode()
    def start(self, task: Task, request: Mapping[str, Any]) -> Sample:
        """Begin what a request asks for; it holds the keys of the task's request record.

        Raises:
            ValueError: it is not a request that the task takes.
        """
        try:
            checked = task.request.model_validate(dict(request))
        except ValidationError as error:
            raise ValueError(f"{task.name}: {_explain(error)}") from None
        sampling = task.start(checked, device=self.device)
        return Sample(task, ticks.start(task.network, sampling))

    @torch.inference_mode()
    def finish(self, samples: Sequence[Sample]) -> list[Output]:
        """Decode or write samples that are at their ends; latents of one shape in one batch."""
        groups: dict[Any, list[Sample]] = {}
        for sample in samples:
            result = _result(sample)
            kind = ("text", id(sample)) if sample.task.output == "text" else result.shape
            groups.setdefault(kind, []).append(sample)
        outputs = {
            id(sample): output
            for group in groups.values()
            for sample, output in zip(group, self._finish(group), strict=True)
        }
        return [outputs[id(sample)] for sample in samples]

    def generate(
        self, requests: Sequence[Mapping[str, Any]], *, task: str | None = None
    ) -> list[Output]:
        """Sample all requests side by side; of one task, the family's first if none is named.

        Raises:
            ValueError: there is no such task, or a request is not one that it takes.
        """
        found = self.find_task(task)
        samples = [self.start(found, request) for request in requests]
        ticks.finish([sample.running for sample in samples])
        return self.finish(samples)

    @torch.inference_mode()
    def reconstruct(
        self, pixels: Float[Tensor, "pictures 3 height width"], *, batch_size: int = 64
    ) -> UInt8[Tensor, "pictures height width 3"]:
        """Send pictures through the autoencoder and back: the best that latents can give.

        Raises:
            ValueError: the bundle has no task that makes pictures.
        """
        if self._decoder is None:
            raise ValueError(f"family {self.recipe.family} makes no pictures")
        parts = []
        for batch in pixels.to(self.device).split(batch_size):
            mean = self._decoder.encode_moments(batch).mean
            parts.append(to_uint8(self._decoder.decode(self._decoder.normalize(mean))).cpu())
        return torch.cat(parts)

    def _finish(self, samples: Sequence[Sample]) -> list[Output]:
        """Finish one text, or pictures whose latents have one shape."""
        finishes = [sample.running.sampling.finish for sample in samples]
        results = [_result(sample) for sample in samples]
        if samples[0].task.output == "text":
            assert all(finishes), "a text task says how its sample is written"
            return [finish(each) for finish, each in zip(finishes, results, strict=True) if finish]
        assert self._decoder is not None
        decoded = self._decoder.decode(torch.stack(results))
        return [
            (finish(pixels) if finish else to_uint8(pixels[None])[0]).cpu().numpy()
            for finish, pixels in zip(finishes, decoded, strict=True)
        ]


def _result(sample: Sample) -> Tensor:
    assert sample.running.result is not None, "the sampling is not at its end"
    return sample.running.result


def _explain(error: ValidationError) -> str:
    """Say what is wrong with a request in one line."""
    problems = []
    for problem in error.errors(include_url=False):
        key = ".".join(map(str, problem["loc"])) or "request"
        got = "" if problem["type"] == "missing" else f", got {str(problem['input'])[:80]!r}"
        problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(problems)
