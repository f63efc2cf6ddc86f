"""What a LightningDiT recipe can say, and the system that it makes."""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import PositiveInt, model_validator
from torch import Tensor

from udiff.class_conditional import LabelTask, LatentDenoiser
from udiff.diffusion.compose import Composed, compose
from udiff.diffusion.conditions import LabelDropout
from udiff.models.lightningdit.network import Layers, LightningDiT
from udiff.models.lightningdit.settings import (
    NetworkSettings,
    ObjectiveSettings,
    TransportSampling,
)
from udiff.models.lightningdit.transport import Transport, make_flow_matching, make_sampler
from udiff.settings import (
    AutoencoderSettings,
    OptimizerSettings,
    SquareLatentSettings,
    check_patches,
)
from udiff.system import FamilyRecipe, Guidance, Steps, System


class Recipe(FamilyRecipe):
    """A run of LightningDiT."""

    family: Literal["lightningdit"]
    network: NetworkSettings
    latent: SquareLatentSettings
    num_classes: PositiveInt
    autoencoder: AutoencoderSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    sampling: TransportSampling = TransportSampling()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        latent, network = self.latent, self.network
        check_patches(latent.height, latent.width, patch_size=network.patch_size)
        self.objective.check_layers(network.depth)
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
        task = LabelTask(
            self._begin,
            self.sampling,
            self.latent,
            num_classes=self.num_classes,
            has_null_label=self.objective.label_dropout_prob > 0,
        )
        return LatentDenoiser(
            denoiser,
            shard_units=tuple(denoiser.blocks),
            composed=self._compose(),
            statistics=self.autoencoder.statistics(self.latent.channels),
            optimizer=self.optimizer,
        ).make(task)

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

    def _begin(
        self, normals: Iterator[Tensor], *, num_steps: int, scale: float
    ) -> tuple[Steps, Guidance]:
        sampling = self.sampling
        interval = guidance_from(*sampling.guidance_interval)
        steps = make_sampler(
            sampling, self._transport(), next(normals), num_steps=num_steps, normals=normals
        )
        return steps, Guidance(scale, interval, sampling.guidance_channels)


def make_network(
    network: NetworkSettings, latent: SquareLatentSettings, *, num_classes: int, null_label: bool
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
