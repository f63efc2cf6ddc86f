"""What a DDT recipe can say, and the system that it makes."""

from typing import Literal

import torch
from pydantic import PositiveInt, model_validator

from udiff.class_conditional import LabelTask, LatentDenoiser
from udiff.diffusion.compose import Composed, compose
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.path import LinearPath
from udiff.models.ddt.network import DDT, ImprovedDiT
from udiff.models.ddt.objective import make_flow_matching
from udiff.models.ddt.sampler import make_guidance, make_sampler
from udiff.models.ddt.settings import (
    DDTSampling,
    LatentSettings,
    NetworkSettings,
    ObjectiveSettings,
)
from udiff.samplers.normals import normals_from
from udiff.samplers.times import time_grid
from udiff.settings import AutoencoderSettings, OptimizerSettings
from udiff.system import FamilyRecipe, Sampling, System


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
        sampling = self.sampling
        task = LabelTask(
            self._begin,
            num_classes=self.num_classes,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            has_null_label=True,
            identity=sampling,
            reuse=sampling.reuse,
        )
        return LatentDenoiser(
            denoiser,
            shard_units=tuple(denoiser.blocks),
            composed=self._compose(),
            statistics=self.autoencoder.statistics(self.latent.channels),
            optimizer=self.optimizer,
        ).make(task)

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
