"""The randomness of one sample."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor


def normals_from(
    seed: int, shape: tuple[int, ...], device: torch.device
) -> Iterator[Float[Tensor, "..."]]:
    """Draw normals without end, on the CPU: a seed gives the same picture on every device."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator).to(device)
