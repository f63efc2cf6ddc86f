"""Chain: pictures -> how well an autoencoder reconstructs them, spread over the cluster."""

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from typing import TypeVar

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from pipelines.numbered import (
    Numbered,
    Pictures,
    number_pictures,
    open_pictures,
    read_numbered,
)
from pipelines.schedule import run_tasks
from udiff.autoencoders.perceptual import load_lpips
from udiff.autoencoders.pixels import to_uint8
from udiff.bundle import load_autoencoder
from udiff.evaluation.features import load_features
from udiff.evaluation.reconstruction import psnr, ssim
from udiff.settings import Settings

Result = TypeVar("Result")


class ReconstructSettings(Settings):
    """What is measured, and on what."""

    autoencoder: str
    """Hub id, a diffusers folder, an official checkpoint, or a bundle of an autoencoder family."""
    pictures: str
    """Folder or bucket URI of a pictures cache, or of anything that caches are made from."""
    size: PositiveInt | None = None
    """Side in pixels to which pictures of no cache are scaled (the shorter side) and cropped."""
    num_pictures: PositiveInt | None = None
    """The first of them; all where it is left open."""
    num_examples: PositiveInt = 8
    """Pictures that are returned beside their reconstructions."""
    lpips: str | None = None
    """File of LPIPS weights; null takes torchvision's VGG16 and the heads of the package lpips."""
    features: str = "efficientnet_lite0"
    """As in `load_features`, for the Frechet distance."""
    feature_size: PositiveInt = 64
    batch_size: PositiveInt = 16
    sliced: bool = False
    """Run one picture at a time."""
    tile: PositiveInt | None = None
    """Run larger pictures in overlapping squares of this side, in pixels."""
    seed: int = 0
    """Of the posterior's noise."""


@dataclass(frozen=True)
class Reconstructions:
    """What was measured: a row per picture in their order, and a row per task."""

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
    """Per task: seconds in the encoder and in the decoder, pictures timed, bytes at the peak, rows
    read (those that are no pictures among them)."""


def reconstruct_pictures(
    settings: ReconstructSettings, *, workers: int, gpus: float = 0
) -> Reconstructions:
    """Encode, sample, decode and compare pictures, in `workers` tasks.

    Raises:
        ValueError: it is a cache of something else, there are fewer pictures, or none can be read.
    """
    pictures = open_pictures(settings.pictures, size=settings.size)
    numbered, num_pictures = number_pictures(pictures, settings.num_pictures)
    bounds = np.linspace(0, num_pictures, workers + 1).astype(int)
    slices = [(settings, pictures, numbered, int(a), int(b)) for a, b in pairwise(bounds) if a < b]
    parts = [part for part in run_tasks(_measure_slice, slices, gpus=gpus) if part is not None]
    if not parts:
        raise ValueError(f"none of the {num_pictures} pictures of {settings.pictures} can be read")
    return Reconstructions(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Reconstructions)
        }
    )


@torch.inference_mode()
def _measure_slice(
    settings: ReconstructSettings,
    pictures: Pictures,
    numbered: list[Numbered],
    start: int,
    stop: int,
) -> Reconstructions | None:
    measure = _Measure(settings)
    rows = read_numbered(pictures, numbered, start, stop)
    batches = [
        measure(torch.stack([pixels for _, pixels in batch]), [number for number, _ in batch])
        for batch in _batched(rows, settings.batch_size)
    ]
    if not batches:
        return None
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return Reconstructions(**joined, timing=np.array([[*measure.timing(), stop - start]]))


class _Measure:
    """One autoencoder, and what judges it."""

    def __init__(self, settings: ReconstructSettings) -> None:
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._autoencoder = load_autoencoder(settings.autoencoder).to(self._device)
        self._autoencoder.save_memory(sliced=settings.sliced, tile=settings.tile)
        self._lpips = load_lpips(settings.lpips).to(self._device)
        features = load_features(settings.features, size=settings.feature_size)
        self._features = features.to(self._device)
        self._seconds: list[tuple[float, float, int]] = []

    def __call__(self, pixels: Tensor, numbers: list[int]) -> dict[str, np.ndarray]:
        """Measure a batch; each picture's noise is a function of its number."""
        pixels = pixels.to(self._device)
        images = to_uint8(pixels)
        moments, encode_s = self._time(lambda: self._autoencoder.encode_moments(pixels))
        raw = moments.sample(self._noise(moments.mean, numbers))
        latent = self._autoencoder.normalize(raw)
        made, decode_s = self._time(lambda: self._autoencoder.decode(latent))
        self._seconds.append((encode_s, decode_s, len(images)))
        made_images = to_uint8(made)
        shown = torch.tensor([number < self._settings.num_examples for number in numbers])
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

    def timing(self) -> tuple[float, ...]:
        """Add up, without the first batch where there are others."""
        seconds = np.array(self._seconds[1:] or self._seconds).sum(0)
        return *seconds.tolist(), self._peak_bytes()

    def _noise(self, like: Tensor, numbers: list[int]) -> Tensor:
        generator = torch.Generator()
        rows = []
        for number in numbers:
            generator.manual_seed(self._settings.seed * 2**32 + number)
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


def _batched(rows: Iterator[tuple[int, Tensor]], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    while batch := list(islice(rows, size)):
        yield batch
