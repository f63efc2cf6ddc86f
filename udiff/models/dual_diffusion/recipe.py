"""What a Dual Diffusion recipe can say, and the system that it makes."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import model_validator
from torch import nn

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.masked_text import ImportanceTimes, MaskedText, MaskTimes
from udiff.diffusion.unit_gradient import UnitGradient
from udiff.diffusion.weighted_sum import Part, WeightedSum
from udiff.encoders.frozen import Frozen
from udiff.encoders.t5 import T5, load_t5
from udiff.models.dual_diffusion.network import DualDiffusion, MaskRow
from udiff.models.dual_diffusion.objective import ImageFlow
from udiff.models.dual_diffusion.requests import ImageToText, TextToImage, VisualQuestion
from udiff.models.dual_diffusion.settings import (
    DualSampling,
    LatentSettings,
    LoraSettings,
    NetworkSettings,
    ObjectiveSettings,
    TextSettings,
)
from udiff.models.dual_diffusion.tasks import Tasks, blank_picture
from udiff.models.dual_diffusion.text import TextNetwork, TextStates, bind_text_head
from udiff.settings import (
    AutoencoderSettings,
    DataSettings,
    OptimizerSettings,
    T5Settings,
    check_patches,
)
from udiff.system import PART_SEPARATOR, FamilyRecipe, Phase, System, Task

DENOISER, MASK_ROW = "denoiser", "mask_row"
IMAGE, TEXT = "image", "text"
LATENT = ("latent_mean", "latent_logvar")


class Recipe(FamilyRecipe):
    """A run of Dual Diffusion: joint training, instruction tuning, or alignment of the mask."""

    family: Literal["dual_diffusion"]
    network: NetworkSettings = NetworkSettings()
    latent: LatentSettings = LatentSettings()
    text: TextSettings = TextSettings()
    autoencoder: AutoencoderSettings
    """Decodes pictures, and encodes those of requests."""
    text_encoder: T5Settings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings
    lora: LoraSettings | None = None
    sampling: DualSampling = DualSampling()
    text_data: DataSettings | None = None
    """Cache of the text loss; that of the image loss (`data`) where left open."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if not self.objective.image.weight and not self.objective.text.weight:
            raise ValueError("objective.image.weight and objective.text.weight are both 0")
        for name in ("mask_id", "end_id"):
            if getattr(self.text, name) >= self.network.vocab_size:
                raise ValueError(
                    f"text.{name} {getattr(self.text, name)} must be below network.vocab_size "
                    f"{self.network.vocab_size}"
                )
        height, width = self.latent.size
        check_patches(height, width, patch_size=self.network.patch_size)
        return self

    def build(self) -> System:
        """Make the network, the row of the mask, losses and tasks."""
        denoiser = self.build_network()
        row = MaskRow(self.network.text_dim, is_learned=self._learns(MASK_ROW))
        modules: dict[str, nn.Module] = {DENOISER: denoiser, MASK_ROW: row}
        learning = self._freeze(modules)
        encoder = Frozen(self._load_text_encoder)
        states = TextStates(encoder, row, mask_id=self.text.mask_id)
        objective = WeightedSum(**self._parts(denoiser, states))
        start = Tasks(encoder, self.network, self.latent, self.text, self.sampling)
        return System(
            modules=modules,
            phases=(Phase(DENOISER, learning, objective.draw, objective, self.optimizer),),
            columns=self._columns(),
            shard_units=tuple(denoiser.transformer_blocks),
            ema_modules=(DENOISER, MASK_ROW),
            tasks=self._tasks(denoiser, states, start),
            use_autoencoder=start.use_autoencoder,
        )

    @property
    def sources(self) -> dict[str, DataSettings]:
        """The text loss may read a cache of its own."""
        return {} if self.text_data is None else {TEXT: self.text_data}

    def cache_identity(self) -> Mapping[str, Mapping[str, Any]]:
        """States of captions that were cached must be this text encoder's."""
        if not self.objective.image.weight or self.objective.image.states != "cached":
            return {}
        return {"caption": {"encoder": load_t5(self.text_encoder).fingerprint()}}

    def build_network(self) -> DualDiffusion:
        """Make the network alone."""
        network = DualDiffusion(in_channels=self.latent.channels, **self.network.model_dump())
        # Only a text loss without pictures would train what stands in for them.
        network.null_image_embd.requires_grad_(False)
        if self.lora:
            from peft import LoraConfig  # of the extra `lora`

            network.add_adapter(
                LoraConfig(
                    r=self.lora.rank,
                    lora_alpha=self.lora.alpha,
                    target_modules=list(self.lora.targets),
                )
            )
        return network

    def _load_text_encoder(self) -> T5:
        """Load the encoder of texts, which must be one that the network was made for."""
        encoder = load_t5(self.text_encoder)
        path = self.text_encoder.path
        for key, ours, theirs in (
            ("network.text_dim", self.network.text_dim, encoder.width),
            ("text.end_id", self.text.end_id, encoder.end_id),
        ):
            if ours != theirs:
                raise ValueError(f"{key} must be {theirs} for text_encoder.path {path}, got {ours}")
        if self.network.vocab_size < encoder.num_tokens:
            raise ValueError(
                f"network.vocab_size must be at least {encoder.num_tokens} for text_encoder.path "
                f"{path}, got {self.network.vocab_size}"
            )
        return encoder

    def _learns(self, name: str) -> bool:
        return any(name.startswith(start) for start in self.objective.learned)

    def _freeze(self, modules: dict[str, nn.Module]) -> tuple[str, ...]:
        """Leave only what is to learn with gradients; returns the modules that have some.

        Raises:
            ValueError: `objective.learned` names what is not there, or not learned from.
        """
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                if self.objective.learned and not self._learns(f"{name}.{key}"):
                    parameter.requires_grad_(False)
                if parameter.requires_grad and self._is_idle(key):
                    parameter.requires_grad_(False)
        learning = [
            f"{name}.{key}"
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        for start in self.objective.learned:
            if not any(key.startswith(start) for key in learning):
                raise ValueError(f"objective.learned {start!r} is no parameter that a loss reaches")
        return tuple(dict.fromkeys(key.partition(".")[0] for key in learning))

    def _is_idle(self, key: str) -> bool:
        """Tell the parameters that only a loss which is left out would train."""
        last = f"transformer_blocks.{self.network.depth - 1}."
        of_image = ("image_", f"{last}attn.to_out.", f"{last}ff.")
        of_text = ("text_proj_out.", f"{last}attn.to_add_out.", f"{last}ff_context.")
        return (not self.objective.image.weight and key.startswith(of_image)) or (
            not self.objective.text.weight and key.startswith(of_text)
        )

    def _parts(self, denoiser: nn.Module, states: TextStates) -> dict[str, Part]:
        settings, statistics = self.objective, self.autoencoder.statistics(self.latent.channels)
        flow = ImageFlow(
            states.of_cached_captions if settings.image.states == "cached" else states.of_captions,
            settings.image.text_dropout_prob,
            settings.image.recaption_prob,
        )
        shown = UnitGradient(flow) if settings.image.gradient == "unit" else flow
        image = PosteriorLatents(shown, *statistics)
        times = MaskTimes(is_antithetic=settings.text.is_antithetic)
        masked = MaskedText(
            partial(bind_text_head, states),
            mask_id=self.text.mask_id,
            column=settings.text.source,
            times=ImportanceTimes(times) if settings.text.times == "importance" else times,
            padding=settings.text.padding,
            end_id=self.text.end_id,
        )
        text = PosteriorLatents(masked, *statistics)
        parts = {
            IMAGE: Part(image.draw, partial(image, denoiser), settings.image.weight),
            TEXT: Part(text.draw, partial(text, denoiser), settings.text.weight),
        }
        return {name: part for name, part in parts.items() if part.weight}

    def _columns(self) -> tuple[str, ...]:
        image, text = self.objective.image, self.objective.text
        captions = ["caption" if image.states == "cached" else "caption_tokens"]
        if image.recaption_prob:
            captions.append("re" + captions[0])
        learned = ("conversation_learned",) if text.source == "conversation" else ()
        wanted = {
            IMAGE: (*LATENT, *captions) if image.weight else (),
            TEXT: (*LATENT, f"{text.source}_tokens", *learned) if text.weight else (),
        }
        return tuple(
            f"{part}{PART_SEPARATOR}{name}" for part, names in wanted.items() for name in names
        )

    def _tasks(self, denoiser: DualDiffusion, states: TextStates, start: Tasks) -> dict[str, Task]:
        writer = TextNetwork(denoiser, states, mask_id=self.text.mask_id)
        picture = {"image": blank_picture()}
        tasks = (
            Task(
                "text_to_image",
                TextToImage,
                start.text_to_image,
                denoiser,
                example={"prompt": "a"},
            ),
            Task("image_to_text", ImageToText, start.image_to_text, writer, "text", picture),
            Task(
                "visual_question_answering",
                VisualQuestion,
                start.visual_question_answering,
                writer,
                "text",
                {**picture, "question": "what is this?"},
            ),
        )
        return {task.name: task for task in tasks}
