"""What systems share that make a picture of a class: one denoiser of latents, and one task."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.compose import Composed
from udiff.samplers.reuse import RefreshPlan
from udiff.settings import OptimizerSettings, ReuseSettings
from udiff.system import Phase, Sampling, System, Task

TASK = "class_to_image"


class ClassToImage(BaseModel):
    """A request for one picture of a class; what is left open comes from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class Begin(Protocol):
    """Begins one sample, with everything said."""

    def __call__(  # noqa: D102
        self, label: int, seed: int, *, num_steps: int, scale: float, device: torch.device
    ) -> Sampling: ...


@dataclass(frozen=True)
class LabelTask:
    """How a family answers `ClassToImage`."""

    begin: Begin
    num_classes: int
    num_steps: int
    """Where a request leaves it open; so too `guidance_scale`."""
    guidance_scale: float
    has_null_label: bool
    """Without one, nothing can be guided."""
    identity: Hashable
    """All else that samples depend on: refresh steps are searched anew when it changes."""
    reuse: ReuseSettings | None = None
    request: type[ClassToImage] = ClassToImage

    def make(self, denoiser: nn.Module) -> Task:
        """Make the task."""
        plan = RefreshPlan(denoiser, self.reuse) if self.reuse else None
        start = partial(self._start, plan)
        return Task(TASK, self.request, start, denoiser, example={"label": 0})

    def _start(
        self, plan: RefreshPlan | None, request: ClassToImage, *, device: torch.device
    ) -> Sampling:
        scale = request.guidance_scale
        scale = self.guidance_scale if scale is None else scale
        self._check(request.label, scale)
        num_steps = request.num_steps or self.num_steps
        begin = partial(self.begin, num_steps=num_steps, scale=scale, device=device)
        sampling = begin(request.label, request.seed)
        if plan is None:
            return sampling
        return plan.apply(
            sampling,
            key=(num_steps, scale, self.identity, device),
            begin=lambda number, seed: begin(number % self.num_classes, seed),
        )

    def _check(self, label: int, scale: float) -> None:
        if label >= self.num_classes:
            raise ValueError(f"label must be in 0..{self.num_classes - 1}, got {label}")
        if scale != 1 and not self.has_null_label:
            raise ValueError(
                "guidance_scale must be 1 for a network without null label "
                f"(objective.label_dropout_prob: 0), got {scale}"
            )


@dataclass(frozen=True)
class LatentDenoiser:
    """A network that learns latents from their cached moments, and what it is trained with."""

    network: nn.Module
    shard_units: tuple[nn.Module, ...]
    composed: Composed
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of raw latents, per channel."""
    optimizer: OptimizerSettings
    kept: Mapping[str, nn.Module] = field(default_factory=dict)
    """What learns without an optimizer, and belongs into checkpoints."""

    def make(self, task: LabelTask) -> System:
        """Make the system."""
        objective = PosteriorLatents(self.composed.objective, *self.statistics)
        learning = {"denoiser": self.network, **self.composed.modules}
        phase = Phase(
            "denoiser",
            modules=tuple(learning),
            draw=objective.draw,
            loss=partial(objective, self.network),
            optimizer=self.optimizer,
        )
        return System(
            modules={**learning, **self.kept},
            phases=(phase,),
            columns=("latent_mean", "latent_logvar", "label", *self.composed.columns),
            shard_units=self.shard_units,
            ema_modules=("denoiser",),
            tasks={TASK: task.make(self.network)},
        )
