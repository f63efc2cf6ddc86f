"""What a DDT recipe can say, and the system that it makes."""

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.compose import Composed, compose
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.path import LinearPath
from udiff.models.ddt.network import DDT, ImprovedDiT
from udiff.models.ddt.objective import make_flow_matching
from udiff.models.ddt.sampler import make_guidance, make_sampler, normals_from
from udiff.models.ddt.settings import (
    DDTSampling,
    LatentSettings,
    NetworkSettings,
    ObjectiveSettings,
)
from udiff.samplers.reuse import RefreshPlan
from udiff.samplers.times import time_grid
from udiff.settings import AutoencoderSettings, OptimizerSettings
from udiff.system import FamilyRecipe, Phase, Sampling, System, Task


class ClassToImage(BaseModel):
    """A request for one picture of a class; what is left open comes from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class Recipe(FamilyRecipe):
    """A run of DDT, or of its improved-DiT baseline."""

    family: Literal["ddt"]
    network: NetworkSettings
    latent: LatentSettings
    num_classes: PositiveInt
    autoencoder: AutoencoderSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    sampling: DDTSampling = DDTSampling()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.network.num_encoder_blocks is not None:
            return self
        for name, needs in (
            ("objective.masked", self.objective.masked),
            ("sampling.reuse", self.sampling.reuse),
        ):
            if needs:
                raise ValueError(f"{name} needs an encoder: set network.num_encoder_blocks")
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

    def build_network(self) -> DDT | ImprovedDiT:
        """Make the network alone."""
        network = self.network
        sizes = {
            "in_channels": self.latent.channels,
            "num_classes": self.num_classes,
            **network.model_dump(exclude={"num_encoder_blocks"}),
        }
        if network.num_encoder_blocks is None:
            return ImprovedDiT(**sizes)
        return DDT(**sizes, num_encoder_blocks=network.num_encoder_blocks)

    def _compose(self) -> Composed:
        dropout = LabelDropout(self.num_classes, self.objective.label_dropout_prob)
        patch = self.network.patch_size
        return compose(
            make_flow_matching(self.objective, dropout),
            self.objective,
            dim=self.network.dim,
            num_tokens=(self.latent.height // patch) * (self.latent.width // patch),
            path=LinearPath(),
            masked=self.objective.masked,
        )

    def _start(
        self, plan: RefreshPlan | None, request: ClassToImage, *, device: torch.device
    ) -> Sampling:
        if request.label >= self.num_classes:
            raise ValueError(f"label must be in 0..{self.num_classes - 1}, got {request.label}")
        num_steps = request.num_steps or self.sampling.num_steps
        scale = request.guidance_scale
        scale = self.sampling.guidance_scale if scale is None else scale
        begin = partial(self._begin, num_steps=num_steps, scale=scale, device=device)
        sampling = begin(request.label, request.seed)
        if plan is None:
            return sampling
        key = (num_steps, scale, self.sampling, device)
        return plan.apply(
            sampling,
            key=key,
            begin=lambda number, seed: begin(number % self.num_classes, seed),
        )

    def _begin(
        self, label: int, seed: int, *, num_steps: int, scale: float, device: torch.device
    ) -> Sampling:
        sampling, latent = self.sampling, self.latent
        normals = normals_from(seed, (latent.channels, latent.height, latent.width), device)
        times = time_grid(num_steps, last_step=sampling.last_step, shift=sampling.shift)
        return Sampling(
            make_sampler(sampling, next(normals), times, normals),
            conditions={"label": torch.tensor(label, device=device)},
            null_conditions={"label": torch.tensor(self.num_classes, device=device)},
            guidance=make_guidance(sampling, scale),
        )
