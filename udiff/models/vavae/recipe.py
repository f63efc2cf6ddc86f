"""What a recipe of an autoencoder can say, and the system that it makes."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import model_validator
from torch import nn

from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.ldm import LDMAutoencoder
from udiff.autoencoders.perceptual import load_lpips
from udiff.autoencoders.pixels import to_pixels
from udiff.encoders.frozen import Frozen
from udiff.models.vavae.adversarial import (
    Adversarial,
    DiscriminatorObjective,
    hinge_loss,
    vanilla_loss,
)
from udiff.models.vavae.alignment import FoundationAlignment, project_feature, project_latent
from udiff.models.vavae.discriminator import PatchDiscriminator
from udiff.models.vavae.foundation import CACHED_COLUMN, make_foundation
from udiff.models.vavae.objective import (
    Extra,
    GeneratorObjective,
    Perceptual,
    SummedBound,
    averaged_bound,
)
from udiff.models.vavae.settings import (
    AdversarialSettings,
    FoundationSettings,
    NetworkSettings,
    ObjectiveSettings,
)
from udiff.models.vavae.task import NAME as RECONSTRUCT
from udiff.models.vavae.task import reconstruct_task
from udiff.models.vavae.weight import AdaptiveWeight, FixedWeight
from udiff.settings import OptimizerSettings
from udiff.system import Batch, Draws, FamilyRecipe, Losses, Phase, System

DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}
PAIRINGS = {"latent": project_latent, "feature": project_feature}
ADVERSARIAL_LIMIT, ALIGNMENT_LIMIT = 1e4, 1e8
"""Largest ratios of gradients, as published."""


class Recipe(FamilyRecipe):
    """A run of an autoencoder in LDM layout."""

    family: Literal["vavae"]
    network: NetworkSettings = NetworkSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    discriminator_optimizer: OptimizerSettings | None = None
    """As the autoencoder's where left open."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.autoencoder is not None:
            raise ValueError("autoencoder must be null: this family trains one")
        return self

    def build(self) -> System:
        """Make autoencoder, discriminator and projection, and a phase for either side."""
        autoencoder = self.build_autoencoder()
        modules: dict[str, nn.Module] = {"autoencoder": autoencoder}
        objective = self.objective
        if objective.alignment:
            modules["projection"] = make_projection(
                objective.alignment, self.network.latent_channels
            )
        learners = tuple(modules)
        if objective.adversarial:
            modules["discriminator"] = make_discriminator(objective.adversarial)
        generator = make_generator_objective(self.network, objective, modules)
        phases = [
            Phase(
                "autoencoder",
                learners,
                generator.draw,
                on_pixels(partial(generator, autoencoder)),
                self.optimizer,
            )
        ]
        if objective.adversarial:
            phases.append(self._discriminator_phase(objective.adversarial, modules))
        cached = objective.alignment is not None and objective.alignment.model == "cache"
        return System(
            modules,
            tuple(phases),
            columns=("image", CACHED_COLUMN) if cached else ("image",),
            ema_modules=tuple(modules),
            tasks={RECONSTRUCT: reconstruct_task(autoencoder)},
        )

    def build_autoencoder(self) -> KLAutoencoder:
        """Make the autoencoder alone."""
        return KLAutoencoder(LDMAutoencoder(self.network.architecture()))

    def _discriminator_phase(
        self, settings: AdversarialSettings, modules: dict[str, nn.Module]
    ) -> Phase:
        objective = make_discriminator_objective(settings)
        return Phase(
            "discriminator",
            ("discriminator",),
            objective.draw,
            on_pixels(partial(objective, modules["discriminator"])),
            self.discriminator_optimizer or self.optimizer,
        )


def make_projection(settings: FoundationSettings, latent_channels: int) -> nn.Module:
    """Make the 1 x 1 convolution; it has a bias only where it is the feature that is projected."""
    widths = (latent_channels, settings.feature_dim)
    if settings.projects == "feature":
        widths = widths[::-1]
    projection = nn.Conv2d(*widths, 1, bias=settings.projects == "feature")
    return projection.requires_grad_(settings.train_projection)


def make_discriminator(settings: AdversarialSettings) -> PatchDiscriminator:
    """Make the discriminator."""
    return PatchDiscriminator(width=settings.width, num_layers=settings.num_layers)


def make_discriminator_objective(settings: AdversarialSettings) -> DiscriminatorObjective:
    """Put the discriminator's objective together."""
    loss = DISCRIMINATOR_LOSSES[settings.loss]
    return DiscriminatorObjective(loss, settings.discriminator_start, settings.factor)


def make_generator_objective(
    network: NetworkSettings,
    settings: ObjectiveSettings,
    modules: dict[str, nn.Module],
    *,
    perceptual: Perceptual | None = None,
) -> GeneratorObjective:
    """Put the autoencoder's objective together.

    Args:
        network: of the autoencoder.
        settings: its losses.
        modules: `projection` and `discriminator`, where the losses need them.
        perceptual: in place of what `settings.perceptual_path` names.
    """
    extras: list[Extra] = []
    if settings.adversarial:
        extras.append(make_adversarial(settings.adversarial, modules["discriminator"]))
    if settings.alignment:
        path = settings.perceptual_path
        extras.append(make_alignment(settings.alignment, modules["projection"], path))
    if perceptual is None and settings.perceptual_weight > 0:
        perceptual = Frozen(partial(load_lpips, settings.perceptual_path))
    return GeneratorObjective(
        perceptual,
        SummedBound(settings.logvar) if settings.reduction == "sum" else averaged_bound,
        network.latent_channels,
        network.downscale,
        settings.kl_weight,
        settings.perceptual_weight,
        tuple(extras),
    )


def make_adversarial(settings: AdversarialSettings, discriminator: nn.Module) -> Adversarial:
    """Put the autoencoder's side of the game together."""
    weight = AdaptiveWeight(settings.weight, ADVERSARIAL_LIMIT)
    return Adversarial(discriminator, weight, settings.generator_start, settings.factor)


def make_alignment(
    settings: FoundationSettings, projection: nn.Module, perceptual_path: str | None
) -> FoundationAlignment:
    """Put the alignment together."""
    adaptive = AdaptiveWeight(settings.weight, ALIGNMENT_LIMIT)
    return FoundationAlignment(
        make_foundation(settings, perceptual_path=perceptual_path),
        projection,
        PAIRINGS[settings.projects],
        adaptive if settings.adaptive else FixedWeight(settings.weight),
        distance_margin=settings.distance_margin,
        cosine_margin=settings.cosine_margin,
        distance_weight=settings.distance_weight,
        cosine_weight=settings.cosine_weight,
    )


def on_pixels(loss: Callable[[Batch, Draws], Losses]) -> Callable[[Batch, Draws], Losses]:
    """Give a loss that reads `pixels` the batch's `image`."""

    def with_pixels(batch: Batch, draws: Draws) -> Losses:
        return loss({**batch, "pixels": to_pixels(batch["image"])}, draws)

    return with_pixels
