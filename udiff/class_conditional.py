"""What systems share that make a picture of a class: one denoiser of latents, and one task."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.compose import Composed
from udiff.samplers.normals import normals_from
from udiff.samplers.reuse import RefreshPlan
from udiff.settings import OptimizerSettings, ReuseSettings
from udiff.system import Guidance, Phase, Sampling, Steps, System, Task

TASK = "class_to_image"


class ClassToImage(BaseModel):
    """A request for one picture of a class; what is left open comes from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class Begin(Protocol):
    """Begins a sampler, with everything said, and says how its queries are guided."""

    def __call__(  # noqa: D102
        self, normals: Iterator[Tensor], *, num_steps: int, scale: float
    ) -> tuple[Steps, Guidance]: ...


class LatentShape(Protocol):
    """What a family's settings of latents have."""

    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def height(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102


class LabelSampling(Protocol):
    """What a family's settings of sampling have, among others; they are hashable."""

    @property
    def num_steps(self) -> int: ...  # noqa: D102
    @property
    def guidance_scale(self) -> float: ...  # noqa: D102
    @property
    def reuse(self) -> ReuseSettings | None: ...  # noqa: D102


@dataclass(frozen=True)
class LabelTask:
    """How a family answers `ClassToImage`."""

    begin: Begin
    sampling: LabelSampling
    """What requests leave open. Refresh steps are searched anew when any of it changes."""
    latent: LatentShape
    num_classes: int
    has_null_label: bool
    """Without one, nothing can be guided."""
    request: type[ClassToImage] = ClassToImage

    def make(self, denoiser: nn.Module) -> Task:
        """Make the task."""
        reuse = self.sampling.reuse
        plan = RefreshPlan(denoiser, reuse) if reuse else None
        start = partial(self._start, plan)
        return Task(TASK, self.request, start, denoiser, example={"label": 0})

    def _start(
        self, plan: RefreshPlan | None, request: ClassToImage, *, device: torch.device
    ) -> Sampling:
        scale = request.guidance_scale
        scale = self.sampling.guidance_scale if scale is None else scale
        self._check(request.label, scale)
        num_steps = request.num_steps or self.sampling.num_steps
        begin = partial(self._begin, num_steps=num_steps, scale=scale, device=device)
        sampling = begin(request.label, request.seed)
        if plan is None:
            return sampling
        return plan.apply(
            sampling,
            key=(num_steps, scale, self.sampling, device),
            begin=lambda number, seed: begin(number % self.num_classes, seed),
        )

    def _begin(
        self, label: int, seed: int, *, num_steps: int, scale: float, device: torch.device
    ) -> Sampling:
        shape = self.latent.channels, self.latent.height, self.latent.width
        normals = normals_from(seed, shape, device)
        steps, guidance = self.begin(normals, num_steps=num_steps, scale=scale)
        return Sampling(
            steps,
            conditions={"label": torch.tensor(label, device=device)},
            null_conditions={"label": torch.tensor(self.num_classes, device=device)},
            guidance=guidance,
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
