"""Pictures from a bundle: requests in, uint8 pictures out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from udiff.autoencoders.pixels import to_uint8
from udiff.bundle import load_bundle, load_latent_decoder
from udiff.samplers.ticks import drive

TASK = "class_to_image"


class PictureGenerator:
    """A bundle and its autoencoder on one device."""

    def __init__(self, bundle: str | Path) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_bundle(bundle)
        if TASK not in loaded.system.tasks:
            raise ValueError(
                f"{bundle} is a bundle of family {loaded.recipe.family}, which has no task {TASK}; "
                f"it has {', '.join(loaded.system.tasks) or 'none'}"
            )
        self.recipe = loaded.recipe
        self._task = loaded.system.tasks[TASK]
        self._task.network.to(self._device)
        self._decoder = load_latent_decoder(loaded.recipe).to(self._device)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[dict[str, Any]]
    ) -> UInt8[Tensor, "pictures height width 3"]:
        """Sample all requests side by side; each is what the task's request record holds.

        Raises:
            ValueError: a request is not one that the task takes.
        """
        samplings = [
            self._task.start(self._task.request(**request), device=self._device)
            for request in requests
        ]
        latents = torch.stack(drive(self._task.network, samplings))
        return to_uint8(self._decoder.decode(latents)).cpu()

    @torch.inference_mode()
    def reconstruct(
        self, pixels: Tensor, *, batch_size: int = 64
    ) -> UInt8[Tensor, "pictures height width 3"]:
        """Send pictures through the autoencoder and back: the best that latents can give."""
        parts = []
        for batch in pixels.to(self._device).split(batch_size):
            mean = self._decoder.encode_moments(batch).mean
            parts.append(to_uint8(self._decoder.decode(self._decoder.normalize(mean))).cpu())
        return torch.cat(parts)
