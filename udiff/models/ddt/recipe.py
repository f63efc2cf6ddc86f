"""What a DDT recipe can say, and the system that it makes."""

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor

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
from udiff.samplers.times import time_grid
from udiff.settings import AutoencoderSettings, OptimizerSettings, check_patches
from udiff.system import FamilyRecipe, Guidance, Steps, System


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
        latent, network = self.latent, self.network
        check_patches(latent.height, latent.width, patch_size=network.patch_size)
        self.objective.check_layers(network.num_blocks)
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
        task = LabelTask(
            self._begin,
            self.sampling,
            self.latent,
            num_classes=self.num_classes,
            has_null_label=True,
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
        self, normals: Iterator[Tensor], *, num_steps: int, scale: float
    ) -> tuple[Steps, Guidance]:
        sampling = self.sampling
        times = time_grid(num_steps, last_step=sampling.last_step, shift=sampling.shift)
        steps = make_sampler(sampling, next(normals), times, normals)
        return steps, make_guidance(sampling, scale)
