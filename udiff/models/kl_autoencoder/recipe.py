"""What a recipe of a KL autoencoder can say, and the system that it makes."""

from functools import partial
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from udiff.autoencoders.kl import KLAutoencoder
from udiff.models.kl_autoencoder.objective import ReconstructionKL
from udiff.settings import OptimizerSettings, Settings
from udiff.system import FamilyRecipe, Phase, System


class NetworkSettings(Settings):
    """Sizes of the autoencoder; each level but the first halves the resolution."""

    channels: tuple[PositiveInt, ...] = Field(min_length=1)
    latent_channels: PositiveInt = 4
    layers_per_block: PositiveInt = 2
    norm_num_groups: PositiveInt = 32
    mid_block_attention: bool = True

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if any(width % self.norm_num_groups for width in self.channels):
            raise ValueError(
                f"channels {self.channels} must be multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )
        return self


class ObjectiveSettings(Settings):
    """Weights of the loss."""

    kl_weight: float = Field(default=1e-6, ge=0)


class Recipe(FamilyRecipe):
    """A run of a KL autoencoder."""

    family: Literal["kl_autoencoder"]
    network: NetworkSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings

    def build(self) -> System:
        """Make autoencoder and objective."""
        from diffusers import AutoencoderKL

        network = self.network
        levels = len(network.channels)
        autoencoder = KLAutoencoder(
            AutoencoderKL(
                block_out_channels=network.channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=network.layers_per_block,
                latent_channels=network.latent_channels,
                norm_num_groups=network.norm_num_groups,
                mid_block_add_attention=network.mid_block_attention,
                scaling_factor=1.0,
            )
        )
        objective = ReconstructionKL(
            self.objective.kl_weight, network.latent_channels, autoencoder.downscale
        )
        return System(
            modules={"autoencoder": autoencoder},
            phases=(
                Phase(
                    "autoencoder",
                    modules=("autoencoder",),
                    draw=objective.draw,
                    loss=partial(objective, autoencoder),
                    optimizer=self.optimizer,
                ),
            ),
            columns=("image",),
            ema_modules=("autoencoder",),
        )
