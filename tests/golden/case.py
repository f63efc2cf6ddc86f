"""A reference case: what a published code returned for given weights, inputs and draws."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One `*.safetensors` file; its folder is named after its system."""

    file: Path

    @property
    def system(self) -> str:
        return self.file.parent.name

    @property
    def name(self) -> str:
        return f"{self.system}/{self.file.stem}"

    @cached_property
    def header(self) -> dict[str, Any]:
        with safe_open(self.file, "pt") as file:
            return json.loads(file.metadata()["case"])

    @property
    def kind(self) -> str:
        return self.header["kind"]

    @property
    def config(self) -> dict[str, Any]:
        return self.header.get("config", {})

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return _tensors(self.file, "in/")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return _tensors(self.file, "out/")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Official names; those stored in float16 are exact there."""
        source = self.header.get("weights_from")
        file = self.file.parent / source if source else self.file
        weights = _tensors(file, "weights/")
        return {k: t.float() if t.dtype == torch.float16 else t for k, t in weights.items()}


Outputs = Mapping[str, Tensor]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value; 0 or infinity for integers."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours.to(theirs.dtype), theirs) else float("inf")
    if theirs.numel() == 0:
        return 0.0
    scale = theirs.double().abs().max().clamp_min(1e-30)
    error = ((ours.double() - theirs.double()).abs().max() / scale).item()
    return error if error == error else float("inf")  # noqa: PLR0124 (not a number)


def find_cases(folder: Path) -> list[Case]:
    """List the cases of a system's folder, or of the folders below a parent."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
    return [Case(file) for file in files]


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
