"""What a LightningDiT recipe can say, and the system that it makes."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.compose import Composed, compose
from udiff.diffusion.conditions import LabelDropout
from udiff.models.lightningdit.network import Layers, LightningDiT
from udiff.models.lightningdit.settings import (
    LatentSettings,
    NetworkSettings,
    ObjectiveSettings,
    TransportSampling,
)
from udiff.models.lightningdit.transport import Transport, make_flow_matching, make_sampler
from udiff.samplers.reuse import RefreshPlan
from udiff.settings import AutoencoderSettings, OptimizerSettings
from udiff.system import FamilyRecipe, Guidance, Phase, Sampling, System, Task


class ClassToImage(BaseModel):
    """A request for one picture of a class; what is left open comes from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class Recipe(FamilyRecipe):
    """A run of LightningDiT."""

    family: Literal["lightningdit"]
    network: NetworkSettings
    latent: LatentSettings
    num_classes: PositiveInt
    autoencoder: AutoencoderSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    sampling: TransportSampling = TransportSampling()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        reuse = self.sampling.reuse
        if (self.objective.masked or reuse) and not self.network.num_encoder_blocks:
            name = "objective.masked" if self.objective.masked else "sampling.reuse"
            raise ValueError(f"{name} needs an encoder: set network.num_encoder_blocks")
        if reuse and reuse.choice == "dynamic" and self.sampling.method == "dopri5":
            raise ValueError("sampling.reuse.choice dynamic needs a method with fixed steps")
        return self

    def build(self) -> System:
        """Make network, objective and task."""
        denoiser = self.build_network()
        composed = self._compose()
        objective = PosteriorLatents(
            composed.objective, *self.autoencoder.statistics(self.latent.channels)
        )
        reuse = self.sampling.reuse
        plan = RefreshPlan(denoiser, reuse) if reuse else None
        start = partial(self._start, plan)
        return System(
            modules={"denoiser": denoiser, **composed.modules},
            phases=(
                Phase(
                    "denoiser",
                    modules=("denoiser", *composed.modules),
                    draw=objective.draw,
                    loss=partial(objective, denoiser),
                    optimizer=self.optimizer,
                ),
            ),
            columns=("latent_mean", "latent_logvar", "label", *composed.columns),
            shard_units=tuple(denoiser.blocks),
            ema_modules=("denoiser",),
            tasks={
                "class_to_image": Task(
                    "class_to_image", ClassToImage, start, denoiser, example={"label": 0}
                )
            },
        )

    def build_network(self) -> LightningDiT:
        """Make the network alone."""
        null_label = self.objective.label_dropout_prob > 0
        return make_network(
            self.network, self.latent, num_classes=self.num_classes, null_label=null_label
        )

    def _compose(self) -> Composed:
        transport = self._transport()
        dropout = LabelDropout(self.num_classes, self.objective.label_dropout_prob)
        return compose(
            make_flow_matching(self.objective, transport, dropout),
            self.objective,
            dim=self.network.dim,
            num_tokens=(self.latent.height // self.network.patch_size) ** 2,
            path=transport.path,
            masked=self.objective.masked,
            prediction=transport.prediction,
        )

    def _transport(self) -> Transport:
        return Transport.make(self.objective, sample_eps=self.sampling.eps)

    def _start(
        self, plan: RefreshPlan | None, request: ClassToImage, *, device: torch.device
    ) -> Sampling:
        guidance = self._guidance(request.guidance_scale)
        if request.label >= self.num_classes:
            raise ValueError(f"label must be in 0..{self.num_classes - 1}, got {request.label}")
        num_steps = request.num_steps or self.sampling.num_steps
        begin = partial(self._begin, num_steps=num_steps, guidance=guidance, device=device)
        sampling = begin(request.label, request.seed)
        if plan is None:
            return sampling
        return plan.apply(
            sampling,
            key=(num_steps, guidance, self.sampling, device),
            begin=lambda number, seed: begin(number % self.num_classes, seed),
        )

    def _begin(
        self, label: int, seed: int, *, num_steps: int, guidance: Guidance, device: torch.device
    ) -> Sampling:
        normals = self._normals(seed, device)
        steps = make_sampler(
            self.sampling, self._transport(), next(normals), num_steps=num_steps, normals=normals
        )
        return Sampling(
            steps,
            conditions={"label": torch.tensor(label, device=device)},
            null_conditions={"label": torch.tensor(self.num_classes, device=device)},
            guidance=guidance,
        )

    def _normals(self, seed: int, device: torch.device) -> Iterator[Tensor]:
        # Drawn on the CPU, so that a seed gives the same picture on every device.
        generator = torch.Generator().manual_seed(seed)
        shape = (self.latent.channels, self.latent.height, self.latent.width)
        while True:
            yield torch.randn(shape, generator=generator).to(device)

    def _guidance(self, scale: float | None) -> Guidance:
        scale = self.sampling.guidance_scale if scale is None else scale
        if scale != 1 and not self.objective.label_dropout_prob:
            raise ValueError(
                f"guidance_scale must be 1 for a network without null label "
                f"(objective.label_dropout_prob: 0), got {scale}"
            )
        interval = guidance_from(*self.sampling.guidance_interval)
        return Guidance(scale, interval, self.sampling.guidance_channels)


def make_network(
    network: NetworkSettings, latent: LatentSettings, *, num_classes: int, null_label: bool
) -> LightningDiT:
    """Make the network that settings describe."""
    sizes = {"dim", "depth", "num_heads", "patch_size"}
    return LightningDiT(
        in_channels=latent.channels,
        input_size=latent.height,
        num_classes=num_classes,
        null_label=null_label,
        layers=Layers(**network.model_dump(exclude=sizes)),
        **network.model_dump(include=sizes),
    )


def guidance_from(start: float, end: float) -> tuple[float, float]:
    """Translate an interval as published, start included and open to data, to `Guidance`'s.

    Times reach the network in float32, and are compared there.
    """
    low = math.nextafter(float(np.float32(start)), -math.inf)
    return low, math.inf if end == 1 else end
