"""Put the pieces that any family can have around its objective, as a recipe asks for them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from udiff.diffusion.alignment import (
    FEATURE_COLUMN,
    Aligned,
    Projector,
    Teacher,
    cached_features,
)
from udiff.diffusion.direction import VelocityDirection
from udiff.diffusion.dispersive import Dispersed
from udiff.diffusion.masked_pass import (
    FixedMaskRatio,
    MaskedPass,
    MaskRatio,
    UniformMaskRatio,
)
from udiff.diffusion.objective import Objective
from udiff.diffusion.parameterization import VELOCITY, Parameterization
from udiff.diffusion.path import Path
from udiff.settings import AlignmentSettings, ExtraLossSettings, MaskedSettings
from udiff.system import Batch


class Composed(NamedTuple):
    """An objective with all that a recipe puts around it."""

    objective: Objective
    modules: dict[str, nn.Module]
    """Parts of the objective that learn along with the network."""
    columns: tuple[str, ...]
    """Columns of the cache that it needs, beside the latents."""


def compose(
    objective: Objective,
    settings: ExtraLossSettings,
    *,
    dim: int,
    num_tokens: int,
    path: Path,
    masked: MaskedSettings | None = None,
    prediction: Parameterization = VELOCITY,
    time: str = "t",
) -> Composed:
    """Wrap an objective; each piece adds its term to the losses.

    Args:
        objective: calls the network once.
        settings: losses that are wanted.
        dim: width of the network's tokens.
        num_tokens: of a latent.
        path: on which the objective places its samples.
        masked: adds a masked pass, of networks that take `keep`.
        prediction: what the network predicts.
        time: name of the draw that says where on the path.
    """
    modules: dict[str, nn.Module] = {}
    columns: tuple[str, ...] = ()
    if masked:
        # Innermost: the pieces around it add their terms once, on the pass with all tokens.
        objective = _masked(objective, masked, num_tokens, time)
    if direction := settings.direction:
        objective = VelocityDirection(objective, path, prediction, direction.weight, time)
    if dispersive := settings.dispersive:
        objective = Dispersed(
            objective, dispersive.layer, dispersive.weight, dispersive.temperature
        )
    if alignment := settings.alignment:
        projector = Projector(
            dim, hidden_dim=alignment.hidden_dim or dim, feature_dim=alignment.feature_dim
        )
        teacher, column = _teacher(alignment)
        objective = Aligned(objective, projector, teacher, alignment.layer, alignment.weight)
        modules, columns = {"projector": projector}, (column,)
    return Composed(objective, modules, columns)


def _masked(
    objective: Objective, settings: MaskedSettings, num_tokens: int, time: str
) -> MaskedPass:
    ratio: MaskRatio = FixedMaskRatio(settings.ratio)
    if settings.ratio_width:
        ratio = UniformMaskRatio(settings.ratio, settings.ratio_width)
    return MaskedPass(objective, ratio, num_tokens, shared=(time,))


def _teacher(settings: AlignmentSettings) -> tuple[Teacher, str]:
    """Make the source of features, and name the column that it reads."""
    if settings.teacher is None:
        return cached_features, FEATURE_COLUMN
    return ImageTeacher(partial(_load_dinov2, settings.teacher)), "image"


def _load_dinov2(name: str) -> nn.Module:
    from udiff.encoders.dinov2 import load_dinov2

    return load_dinov2(name)


class ImageTeacher:
    """Finds the features of `batch["image"]`; the encoder is loaded when it is first asked."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._encoder: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        """Encode the pictures, uint8 (batch, height, width, 3)."""
        image = batch["image"]
        if self._encoder is None:
            self._encoder = self._load().to(image.device)
        return self._encoder(image.permute(0, 3, 1, 2).float() / 255)
