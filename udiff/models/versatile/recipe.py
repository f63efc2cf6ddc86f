"""What a Versatile Diffusion recipe can say, and the system that it makes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import model_validator
from torch import nn

from udiff.autoencoders.optimus_checkpoint import load_text_autoencoder
from udiff.diffusion.flow_mixture import FlowMixture
from udiff.encoders.clip import CLIPContexts, load_clip
from udiff.encoders.frozen import Frozen
from udiff.models.versatile.cached import (
    CLIP_IMAGE,
    CLIP_TEXT,
    TEXT_LATENT,
    CachedFlows,
    columns_of,
)
from udiff.models.versatile.contexts import Contexts
from udiff.models.versatile.flows import FLOWS
from udiff.models.versatile.network import DataLayers, VersatileNetwork
from udiff.models.versatile.objective import FlowObjective
from udiff.models.versatile.schedule import make_schedule
from udiff.models.versatile.settings import (
    ALL_FLOWS,
    FlowName,
    LatentSettings,
    LayerScale,
    NetworkSettings,
    ObjectiveSettings,
    SamplingSettings,
    check_flows,
)
from udiff.models.versatile.tasks import Studio
from udiff.settings import AutoencoderSettings, EncoderSettings, OptimizerSettings
from udiff.system import Draws, FamilyRecipe, LayerGroup, Phase, System


class Recipe(FamilyRecipe):
    """A run of Versatile Diffusion: one of its stages."""

    family: Literal["versatile"]
    flows: tuple[FlowName, ...] = ALL_FLOWS
    """What is learned; the network has the layers that these need."""
    network: NetworkSettings = NetworkSettings()
    latent: LatentSettings
    text_dim: int = 768
    """Length of a text's latent."""
    autoencoder: AutoencoderSettings
    clip: EncoderSettings
    """Whose tokens are the contexts."""
    text_autoencoder: EncoderSettings | None = None
    """Bundle of family `optimus`; needed to write texts."""
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    sampling: SamplingSettings = SamplingSettings()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        check_flows(self.flows)
        drawn = self.objective.flows_per_step
        if drawn is not None and drawn > len(self.flows):
            raise ValueError(
                f"objective.flows_per_step must be at most {len(self.flows)}, the number of flows, "
                f"got {drawn}"
            )
        if drawn not in (None, len(self.flows)) and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.name must be adamw with objective.flows_per_step {drawn}, got "
                f"{self.optimizer.name}"
            )
        unit = 2 ** (len(self.network.multipliers) - 1)
        if self.latent.height % unit or self.latent.width % unit:
            raise ValueError(
                f"latent {self.latent.height} x {self.latent.width} must be a multiple of {unit}, "
                "by which the levels divide it"
            )
        return self

    def cache_identity(self) -> Mapping[str, Mapping[str, Any]]:
        """Say which encoders must have made the columns of contexts and of texts' latents."""
        columns = columns_of(self.flows)
        clip = {"encoder": load_clip(self.clip).fingerprint()}
        wanted = {name: clip for name in (CLIP_IMAGE, CLIP_TEXT) if name in columns}
        if TEXT_LATENT in columns and self.text_autoencoder is not None:
            texts = load_text_autoencoder(self.text_autoencoder)
            wanted[TEXT_LATENT] = {"encoder": texts.fingerprint()}
        return wanted

    def build(self) -> System:
        """Make network, objective and tasks."""
        denoiser = self.build_network()
        contexts = Contexts(self._load_clip(), self.sampling.null_contexts)
        mixture = self._mixture()
        flows = CachedFlows(
            mixture, *self.autoencoder.statistics(self.latent.channels), contexts.null
        )
        phase = Phase(
            "denoiser",
            modules=("denoiser",),
            draw=flows.draw,
            loss=partial(flows, denoiser),
            optimizer=self.optimizer,
            groups=self._groups(denoiser),
            find_idle=self._find_idle(mixture, denoiser),
        )
        studio = Studio(
            denoiser,
            contexts,
            schedule=make_schedule(self.objective.betas),
            settings=self.sampling,
            latent_shape=(self.latent.channels, self.latent.height, self.latent.width),
            text_dim=self.text_dim,
            text_autoencoder=self.text_autoencoder,
        )
        return System(
            modules={"denoiser": denoiser},
            phases=(phase,),
            columns=columns_of(self.flows),
            shard_units=denoiser.all_blocks,
            ema_modules=("denoiser",),
            tasks=studio.tasks(self.flows),
            use_autoencoder=studio.use_autoencoder,
        )

    def build_network(self) -> VersatileNetwork:
        """Make the network alone, with the layers that the flows need."""
        data = {FLOWS[name].data for name in self.flows}
        kinds = {FLOWS[name].context for name in self.flows}
        layers: dict[str, DataLayers] = {
            "image": self.network.image_layers(self.latent.channels),
            "text": self.network.text_layers(self.text_dim),
        }
        return VersatileNetwork(
            self.network.plan,
            data={name: layers[name] for name in layers if name in data},
            contexts={name: self.network.context_layers() for name in layers if name in kinds},
        )

    def _load_clip(self) -> Frozen[CLIPContexts]:
        return Frozen(partial(load_clip, self.clip))

    def _mixture(self) -> FlowMixture:
        settings = self.objective
        schedule = make_schedule(settings.betas)
        return FlowMixture(
            {
                name: FlowObjective(
                    FLOWS[name], schedule, settings.context_dropout_prob, settings.error
                )
                for name in self.flows
            },
            {name: settings.weights.get(name, 1.0) for name in self.flows},
            settings.flows_per_step or len(self.flows),
        )

    def _groups(self, network: VersatileNetwork) -> tuple[LayerGroup, ...]:
        scales = self.objective.scales
        parts = network.layer_groups
        found = [(parts[name], getattr(scales, name)) for name in parts]
        return tuple(
            LayerGroup(module, scale.lr, scale.gradient)
            for module, scale in found
            if scale != LayerScale()
        )

    def _find_idle(
        self, mixture: FlowMixture, network: VersatileNetwork
    ) -> Callable[[Draws], tuple[nn.Module, ...]] | None:
        if mixture.num_drawn == len(mixture.flows):
            return None

        def find(draws: Draws) -> tuple[nn.Module, ...]:
            used = {"time"}
            for name in mixture.taken(draws):
                used |= {f"{FLOWS[name].data}_data", f"{FLOWS[name].context}_context"}
            return tuple(part for name, part in network.layer_groups.items() if name not in used)

        return find
