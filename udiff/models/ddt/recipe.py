"""What a DDT recipe can say, and the system that it makes."""

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.flow_matching import FlowMatching
from udiff.diffusion.path import LinearPath
from udiff.diffusion.time import LogitNormalTime, TimeDistribution, UniformTime
from udiff.models.ddt.network import DDT
from udiff.samplers.euler import euler
from udiff.samplers.times import time_grid
from udiff.settings import (
    AutoencoderSettings,
    Fraction,
    OptimizerSettings,
    SamplingSettings,
    Settings,
)
from udiff.system import FamilyRecipe, Guidance, Phase, Sampling, System, Task


class NetworkSettings(Settings):
    """Sizes of the network."""

    dim: PositiveInt
    num_heads: PositiveInt
    num_blocks: PositiveInt
    num_encoder_blocks: PositiveInt
    patch_size: PositiveInt = 2

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 x num_heads ({self.num_heads}), for rotary"
                " positions in two dimensions"
            )
        if self.num_encoder_blocks >= self.num_blocks:
            raise ValueError(
                f"num_encoder_blocks {self.num_encoder_blocks} must be below num_blocks "
                f"{self.num_blocks}: the rest is the velocity decoder"
            )
        return self


class LatentSettings(Settings):
    """Shape of the latents."""

    channels: PositiveInt = 4
    height: PositiveInt
    width: PositiveInt


class ObjectiveSettings(Settings):
    """Flow matching."""

    time: Literal["uniform", "logit_normal"] = "logit_normal"
    label_dropout_prob: Fraction = 0.1


class ClassToImage(BaseModel):
    """A request for one picture of a class; what is left open comes from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class Recipe(FamilyRecipe):
    """A run of DDT."""

    family: Literal["ddt"]
    network: NetworkSettings
    latent: LatentSettings
    num_classes: PositiveInt
    autoencoder: AutoencoderSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    sampling: SamplingSettings = SamplingSettings()

    def build(self) -> System:
        """Make network, objective and task."""
        denoiser = DDT(
            in_channels=self.latent.channels,
            num_classes=self.num_classes,
            **self.network.model_dump(),
        )
        objective = PosteriorLatents(
            FlowMatching(LinearPath(), self._time(), self._label_dropout()), *self._statistics()
        )
        return System(
            modules={"denoiser": denoiser},
            phases=(
                Phase(
                    "denoiser",
                    modules=("denoiser",),
                    draw=objective.draw,
                    loss=partial(objective, denoiser),
                    optimizer=self.optimizer,
                ),
            ),
            columns=("latent_mean", "latent_logvar", "label"),
            shard_units=tuple(denoiser.blocks),
            ema_modules=("denoiser",),
            tasks={
                "class_to_image": Task("class_to_image", ClassToImage, self._start, denoiser),
            },
        )

    def _start(self, request: ClassToImage, *, device: torch.device) -> Sampling:
        if request.label >= self.num_classes:
            raise ValueError(f"label must be in 0..{self.num_classes - 1}, got {request.label}")
        sampling = self.sampling
        times = time_grid(
            request.num_steps or sampling.num_steps,
            last_step=sampling.last_step,
            shift=sampling.shift,
        )
        scale = request.guidance_scale
        return Sampling(
            euler(self._noise(request.seed).to(device), times),
            conditions={"label": torch.tensor(request.label, device=device)},
            null_conditions={"label": torch.tensor(self.num_classes, device=device)},
            guidance=Guidance(
                sampling.guidance_scale if scale is None else scale, sampling.guidance_interval
            ),
        )

    def _noise(self, seed: int) -> Tensor:
        # Drawn on the CPU, so that a seed gives the same picture on every device.
        generator = torch.Generator().manual_seed(seed)
        latent = self.latent
        return torch.randn((latent.channels, latent.height, latent.width), generator=generator)

    def _time(self) -> TimeDistribution:
        return LogitNormalTime() if self.objective.time == "logit_normal" else UniformTime()

    def _label_dropout(self) -> LabelDropout:
        return LabelDropout(self.num_classes, self.objective.label_dropout_prob)

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        channels = self.latent.channels
        mean = self.autoencoder.mean or (0.0,) * channels
        std = self.autoencoder.std or (1.0,) * channels
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"autoencoder.mean and autoencoder.std need latent.channels = {channels} values, got "
                f"{len(mean)} and {len(std)}"
            )
        return mean, std
