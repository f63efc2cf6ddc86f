"""What an autoencoder can be asked: to send a picture through its latent and back."""

import io
from functools import partial

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_pixels
from udiff.requests import Picture, open_picture
from udiff.system import Guidance, Sampling, Steps, Task

NAME = "reconstruct"
MAX_PIXELS = 2**20
"""Attention between all places of a larger picture would take too much memory."""


class Reconstruct(BaseModel):
    """A picture to encode and decode; it is cut in the middle to whole latents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Picture
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the posterior's noise."""


def reconstruct_task(autoencoder: KLAutoencoder) -> Task:
    """Make the task; it encodes at once and asks the network nothing."""
    picture = io.BytesIO()
    Image.new("RGB", (4 * autoencoder.downscale,) * 2).save(picture, "PNG")
    start = partial(_start, autoencoder)
    return Task(NAME, Reconstruct, start, autoencoder, example={"image": picture.getvalue()})


def _start(autoencoder: KLAutoencoder, request: Reconstruct, *, device: torch.device) -> Sampling:
    picture = _cut(open_picture(request.image), autoencoder.downscale)
    pixels = to_pixels(torch.from_numpy(np.array(picture))[None].to(device))
    moments = autoencoder.encode_moments(pixels)
    generator = torch.Generator().manual_seed(request.seed)
    noise = torch.randn(moments.mean.shape, generator=generator).to(device)
    latent = autoencoder.normalize(moments.sample(noise))[0]
    return Sampling(_finished(latent), {}, {}, Guidance())


def _cut(picture: Image.Image, multiple: int) -> Image.Image:
    if picture.width * picture.height > MAX_PIXELS or min(picture.size) < multiple:
        raise ValueError(
            f"image must have at most {MAX_PIXELS} pixels and sides of at least {multiple}, got "
            f"{picture.width} x {picture.height}"
        )
    width, height = (side // multiple * multiple for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _finished(latent: Tensor) -> Steps:
    yield from ()
    return latent
