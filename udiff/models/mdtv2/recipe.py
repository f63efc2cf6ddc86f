"""What an MDTv2 (or MDT) recipe can say, and the system that it makes."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from udiff.class_conditional import ClassToImage, LabelTask, LatentDenoiser
from udiff.diffusion.compose import Composed, compose
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.gaussian import NoiseSchedule, linear_betas, spaced_timesteps
from udiff.diffusion.gaussian_loss import GaussianObjective, SquaredError, VariationalBound
from udiff.diffusion.gaussian_reverse import (
    FixedLarge,
    LearnedRange,
    NoisePrediction,
    ReverseProcess,
)
from udiff.diffusion.masked_pass import FixedMaskRatio, MaskedPass, MaskRatio, UniformMaskRatio
from udiff.diffusion.objective import Objective
from udiff.diffusion.parameterization import NOISE
from udiff.diffusion.schedule_path import SchedulePath
from udiff.diffusion.timesteps import ImportanceSampled, LossSecondMoment, UniformTimesteps
from udiff.models.mdtv2.guidance import PowerCosine
from udiff.models.mdtv2.layers import BlockSizes
from udiff.models.mdtv2.network import MDT, MaskedTransformer, MDTv2
from udiff.models.mdtv2.settings import (
    NUM_TIMESTEPS,
    NetworkSettings,
    ObjectiveSettings,
    SamplingSettings,
)
from udiff.samplers.ddim import ddim
from udiff.samplers.ddpm import ddpm
from udiff.settings import (
    AutoencoderSettings,
    OptimizerSettings,
    SquareLatentSettings,
    check_patches,
)
from udiff.system import FamilyRecipe, Guidance, Steps, System


class SpacedClassToImage(ClassToImage):
    """A request for one picture of a class; steps are some of the process's."""

    num_steps: Annotated[int, Field(ge=2, le=NUM_TIMESTEPS)] | None = None


class Recipe(FamilyRecipe):
    """A run of MDTv2 or MDT."""

    family: Literal["mdtv2"]
    network: NetworkSettings
    latent: SquareLatentSettings
    num_classes: PositiveInt
    autoencoder: AutoencoderSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    sampling: SamplingSettings = SamplingSettings()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        latent, network = self.latent, self.network
        check_patches(latent.height, latent.width, patch_size=network.patch_size)
        self.objective.check_layers(network.depth)
        return self

    def build(self) -> System:
        """Make network, objective and task."""
        denoiser = self.build_network()
        objective, learned = self._objective()
        task = LabelTask(
            self._begin,
            self.sampling,
            self.latent,
            num_classes=self.num_classes,
            has_null_label=self.objective.label_dropout_prob > 0,
            request=SpacedClassToImage,
        )
        return LatentDenoiser(
            denoiser,
            shard_units=denoiser.all_blocks,
            composed=self._compose(objective),
            statistics=self.autoencoder.statistics(self.latent.channels),
            optimizer=self.optimizer,
            kept=learned,
        ).make(task)

    def build_network(self) -> MaskedTransformer:
        """Make the network alone."""
        settings, channels = self.network, self.latent.channels
        is_learned = self.objective.variance == "learned"
        version = MDT if settings.version == 1 else MDTv2
        network = version(
            BlockSizes(settings.dim, settings.num_heads, self._grid_size(), settings.mlp_ratio),
            depth=settings.depth,
            num_decoder_blocks=settings.num_decoder_blocks,
            patch_size=settings.patch_size,
            in_channels=channels,
            out_channels=2 * channels if is_learned else channels,
            num_labels=self.num_classes + (self.objective.label_dropout_prob > 0),
        )
        if self.objective.mask_ratio is None:
            network.mask_token.requires_grad_(False)
            network.sideblocks.requires_grad_(False)
        return network

    def _grid_size(self) -> int:
        return self.latent.height // self.network.patch_size

    def _process(self) -> ReverseProcess:
        variance = LearnedRange() if self.objective.variance == "learned" else FixedLarge()
        schedule = NoiseSchedule.of(linear_betas(NUM_TIMESTEPS))
        return ReverseProcess(schedule, NoisePrediction(), variance)

    def _objective(self) -> tuple[Objective, dict[str, nn.Module]]:
        """Compose the objective; what it learns of its own goes into the checkpoints."""
        settings = self.objective
        bound = {"vb": VariationalBound()} if settings.variance == "learned" else {}
        objective: Objective = GaussianObjective(
            self._process(),
            UniformTimesteps(NUM_TIMESTEPS),
            LabelDropout(self.num_classes, settings.label_dropout_prob),
            {"mse": SquaredError(settings.snr_cap), **bound},
        )
        if settings.mask_ratio is not None:
            num_tokens = self._grid_size() ** 2
            objective = MaskedPass(objective, self._mask_ratio(), num_tokens, ("timestep",))
        if settings.timesteps == "uniform":
            return objective, {}
        timesteps = LossSecondMoment(NUM_TIMESTEPS)
        return ImportanceSampled(objective, timesteps), {"timesteps": timesteps}

    def _compose(self, objective: Objective) -> Composed:
        """Put the losses of other papers around it."""
        return compose(
            objective,
            self.objective,
            dim=self.network.dim,
            num_tokens=self._grid_size() ** 2,
            path=SchedulePath(self._process().schedule),
            prediction=NOISE,
            time="timestep",
        )

    def _mask_ratio(self) -> MaskRatio:
        low, width = self.objective.mask_ratio, self.objective.mask_ratio_width
        assert low is not None
        return UniformMaskRatio(low, width) if width else FixedMaskRatio(low)

    def _begin(
        self, normals: Iterator[Tensor], *, num_steps: int, scale: float
    ) -> tuple[Steps, Guidance]:
        sampling = self.sampling
        schedule = PowerCosine(scale, sampling.guidance_power, NUM_TIMESTEPS)
        guidance = Guidance(schedule=schedule, channels=sampling.guidance_channels)
        process = self._process().spaced(spaced_timesteps(NUM_TIMESTEPS, str(num_steps)))
        noise, clip = next(normals), sampling.clip
        if sampling.sampler == "ddpm":
            return ddpm(noise, process, normals=normals, clip=clip), guidance
        return ddim(noise, process, normals=normals, eta=sampling.eta, clip=clip), guidance
