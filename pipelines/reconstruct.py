"""Chain: a pictures cache -> how well an autoencoder reconstructs it, spread over the cluster."""

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import PositiveInt
from torch import Tensor

from pipelines.schedule import run_tasks
from udiff.autoencoders.perceptual import load_lpips
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.bundle import load_autoencoder
from udiff.data.manifest import read_manifest
from udiff.data.schema import column_values
from udiff.data.storage import open_folder
from udiff.evaluation.features import load_features
from udiff.evaluation.reconstruction import psnr, ssim
from udiff.settings import Settings

Result = TypeVar("Result")


class ReconstructSettings(Settings):
    """What is measured, and on what."""

    autoencoder: str
    """Hub id, a diffusers folder, an official checkpoint, or a bundle of an autoencoder family."""
    pictures: str
    """Folder or bucket URI of a pictures cache."""
    num_pictures: PositiveInt = 1000
    num_examples: PositiveInt = 8
    """Pictures that are returned beside their reconstructions."""
    lpips: str | None = None
    """File of LPIPS weights; null takes torchvision's VGG16 and the heads of the package lpips."""
    features: str = "efficientnet_lite0"
    """As in `load_features`, for the Frechet distance."""
    feature_size: PositiveInt = 64
    batch_size: PositiveInt = 16
    seed: int = 0
    """Of the posterior's noise."""


@dataclass(frozen=True)
class Reconstructions:
    """What was measured: a row per picture in the cache's order, and a row per task."""

    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray
    features: np.ndarray
    reconstructed_features: np.ndarray
    latent_mean: np.ndarray
    """Of each channel of the picture's raw sampled latent, and of its square."""
    latent_square: np.ndarray
    original: np.ndarray
    """The first pictures alone, uint8, and what became of them."""
    reconstruction: np.ndarray
    timing: np.ndarray
    """Per task: seconds in the encoder and in the decoder, pictures timed, bytes at the peak."""


def reconstruct_pictures(
    settings: ReconstructSettings, *, workers: int, gpus: float = 0
) -> Reconstructions:
    """Encode, sample, decode and compare the first pictures of a cache, in `workers` tasks.

    Raises:
        ValueError: it is no pictures cache, or has fewer pictures.
    """
    manifest = read_manifest(open_folder(settings.pictures))
    if manifest.kind != "pictures":
        raise ValueError(f"{settings.pictures} is a cache of {manifest.kind}, pictures are wanted")
    if manifest.num_rows < settings.num_pictures:
        raise ValueError(
            f"{settings.pictures} holds {manifest.num_rows} pictures, {settings.num_pictures} are "
            "wanted"
        )
    bounds = np.linspace(0, settings.num_pictures, workers + 1).astype(int)
    slices = [(settings, int(a), int(b)) for a, b in pairwise(bounds) if a < b]
    parts = run_tasks(_measure_slice, slices, gpus=gpus)
    return Reconstructions(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Reconstructions)
        }
    )


@torch.inference_mode()
def _measure_slice(settings: ReconstructSettings, start: int, stop: int) -> Reconstructions:
    measure = _Measure(settings)
    batches = [
        measure(torch.from_numpy(pictures.copy()), first_row)
        for first_row, pictures in _read_batches(settings, start, stop)
    ]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return Reconstructions(**joined, timing=measure.timing())


class _Measure:
    """One autoencoder, and what judges it."""

    def __init__(self, settings: ReconstructSettings) -> None:
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._autoencoder = load_autoencoder(settings.autoencoder).to(self._device)
        self._lpips = load_lpips(settings.lpips).to(self._device)
        features = load_features(settings.features, size=settings.feature_size)
        self._features = features.to(self._device)
        self._seconds: list[tuple[float, float, int]] = []

    def __call__(self, images: Tensor, first_row: int) -> dict[str, np.ndarray]:
        """Measure a batch; each picture's noise is a function of its place in the cache."""
        images = images.to(self._device)
        pixels = to_pixels(images)
        moments, encode_s = self._time(lambda: self._autoencoder.encode_moments(pixels))
        raw = moments.sample(self._noise(moments.mean, first_row))
        latent = self._autoencoder.normalize(raw)
        made, decode_s = self._time(lambda: self._autoencoder.decode(latent))
        self._seconds.append((encode_s, decode_s, len(images)))
        made_images = to_uint8(made)
        shown = slice(max(0, self._settings.num_examples - first_row))
        found = {
            "psnr": psnr(images, made_images),
            "ssim": ssim(pixels, made),
            "lpips": self._lpips(pixels, made).flatten(),
            "features": self._features(images),
            "reconstructed_features": self._features(made_images),
            "latent_mean": raw.double().mean((2, 3)),
            "latent_square": raw.double().square().mean((2, 3)),
            "original": images[shown],
            "reconstruction": made_images[shown],
        }
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}

    def timing(self) -> np.ndarray:
        """Add up, without the first batch where there are others."""
        seconds = np.array(self._seconds[1:] or self._seconds).sum(0)
        return np.array([[*seconds, self._peak_bytes()]])

    def _noise(self, like: Tensor, first_row: int) -> Tensor:
        generator = torch.Generator()
        rows = []
        for row in range(first_row, first_row + len(like)):
            generator.manual_seed(self._settings.seed * 2**32 + row)
            rows.append(torch.randn(like.shape[1:], generator=generator))
        return torch.stack(rows).to(like.device)

    def _time(self, function: Callable[[], Result]) -> tuple[Result, float]:
        started = time.perf_counter()
        result = function()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - started

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_batches(
    settings: ReconstructSettings, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the pictures of each batch; a batch does not cross files."""
    folder = open_folder(settings.pictures)
    first_of_file = 0
    for entry in read_manifest(folder).files:
        low, high = max(start, first_of_file), min(stop, first_of_file + entry.rows)
        if low < high:
            with folder.open(entry.path) as file:
                table = pq.read_table(file, columns=["image"])
            for row in range(low, high, settings.batch_size):
                part = table.slice(row - first_of_file, min(settings.batch_size, high - row))
                yield row, np.asarray(column_values(part.column("image"), table.schema.field(0)))
        first_of_file += entry.rows
