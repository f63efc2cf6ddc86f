"""The plain records that families, trainer, evaluator and server share.

A family's recipe builds a `System`; nothing above this module knows anything else of a family.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from udiff.settings import (
    AutoencoderSettings,
    DataSettings,
    EmaSettings,
    OptimizerSettings,
    Settings,
    TrainSettings,
)

Batch = Mapping[str, Tensor]
PART_SEPARATOR = "."
"""In batches and draws of several parts, between the name of a part and of its column."""
Draws = dict[str, Tensor]
"""Random choices of one step. A draw's first axis is the batch; a draw without axes is shared."""


@dataclass(frozen=True)
class Losses:
    """What a step minimizes, and the terms that make it up (for the log)."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    per_sample: Tensor | None = None
    """Loss of each sample, of objectives that can say; `total` is its mean."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """Columns, detached, that later phases of the same step find in their batch."""


class Prediction(NamedTuple):
    """What a denoiser returns."""

    output: Tensor
    """Velocity, noise or data, shaped like its input."""
    feature: Tensor | None = None
    """Tokens after the block that was asked for, for alignment."""
    state: Tensor | None = None
    """What an encoder found, to be given back at a later call."""


# ---------------------------------------------------------------- randomness


@dataclass(frozen=True)
class LocalRng:
    """Per-sample draws: made for the whole global batch, of which a rank takes its rows.

    So the number of ranks does not change them. Rank r of n holds the rows r, r + n, r + 2n, ...
    """

    generator: torch.Generator
    rank: int
    world_size: int

    def normal(self, num_rows: int, *shape: int) -> Tensor:
        """Draw standard normals for the `num_rows` samples of this rank."""
        size = (num_rows * self.world_size, *shape)
        return self._own(torch.randn(size, generator=self.generator, device=self.generator.device))

    def uniform(self, num_rows: int, *shape: int) -> Tensor:
        """Draw from [0, 1) for the `num_rows` samples of this rank."""
        size = (num_rows * self.world_size, *shape)
        return self._own(torch.rand(size, generator=self.generator, device=self.generator.device))

    def _own(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.world_size]


@dataclass(frozen=True)
class StepRng:
    """Generators of one step: `shared` decides which code runs, `local` what each sample gets."""

    shared: torch.Generator
    local: LocalRng
    step: int
    """For losses that begin at a step."""


@dataclass(frozen=True)
class Rng:
    """Every random number of a run, a function of (seed, step, phase): resuming needs no state."""

    seed: int
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a device is immutable)

    def at(self, step: int, *, phase: int = 0) -> StepRng:
        """Make the generators of one step."""
        shared = self._generator(torch.device("cpu"), step, phase, 0)
        local = self._generator(self.device, step, phase, 1)
        return StepRng(shared, LocalRng(local, self.rank, self.world_size), step)

    def _generator(self, device: torch.device, *position: int) -> torch.Generator:
        words = np.random.SeedSequence([self.seed, *position]).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(words[0]) >> 1)


# ---------------------------------------------------------------- training


class LayerGroup(NamedTuple):
    """Layers that learn at a pace of their own."""

    module: nn.Module
    lr_scale: float = 1.0
    gradient_scale: float = 1.0
    """Factor of the gradient, before it is clipped."""


@dataclass(frozen=True)
class Phase:
    """One optimizer update of a step: which modules learn, from which draws and which loss."""

    name: str
    modules: tuple[str, ...]
    draw: Callable[[Batch, StepRng], Draws]
    loss: Callable[[Batch, Draws], Losses]
    optimizer: OptimizerSettings
    groups: tuple[LayerGroup, ...] = ()
    """Parts of the modules, apart from each other, that do not learn at the common pace."""
    find_idle: Callable[[Draws], tuple[nn.Module, ...]] | None = None
    """Finds the parts of the modules that a step's loss does not reach, of losses that do not
    reach all of them at every step; they stay as they are then."""


# ---------------------------------------------------------------- sampling


@dataclass
class Carried:
    """What a network's encoder found for one sampling, kept from a query for later ones."""

    states: dict[str, Tensor] = field(default_factory=dict)
    """By branch, `conditional` or `null`; without a batch axis."""


@dataclass(frozen=True)
class Query:
    """A sampler's question: the network's answer at `x`, one sample without a batch axis."""

    x: Tensor
    t: float
    """As the network takes it: a time (0 = noise, 1 = data), or a DDPM timestep."""
    carried: Carried | None = None
    """Where the encoder's states are kept, of samplers that reuse them."""
    refresh: bool = True
    """Run the encoder and keep what it finds; otherwise take what `carried` holds."""


Steps = Generator[Query, Tensor, Tensor]
"""A sampler under way: yields queries, is sent the guided answers, returns the sample."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, uncond + w (cond - uncond), as data."""

    scale: float = 1.0
    """w; 1 is no guidance."""
    interval: tuple[float, float] | None = None
    """Times strictly between which guidance is on; always where there is none."""
    channels: int | None = None
    """Guide only channels before this one; the others have `other_scale`."""
    schedule: Callable[[float], float] | None = None
    """w as a function of the query's time, in place of `scale`."""
    first_channel: int = 0
    """Guide only from this channel on."""
    other_scale: float = 1.0
    """w of the channels that are not guided, at all times; 1 leaves them conditional."""

    def scale_at(self, t: float) -> float:
        """Return w at a time; 1 outside the interval."""
        if self.interval and not self.interval[0] < t < self.interval[1]:
            return 1.0
        return self.schedule(t) if self.schedule else self.scale

    def is_on(self, t: float) -> bool:
        """Say whether the unconditional answer counts at a time."""
        return self.scale_at(t) != 1 or self.other_scale != 1

    @property
    def is_ever_on(self) -> bool:
        """Say whether the unconditional answer may count at any time."""
        return self.scale != 1 or self.other_scale != 1 or self.schedule is not None


@dataclass(frozen=True)
class Sampling:
    """One picture (or text) being sampled: the sampler and what its network calls are given."""

    steps: Steps
    conditions: Mapping[str, Tensor]
    """Without a batch axis."""
    null_conditions: Mapping[str, Tensor]
    guidance: Guidance
    finish: Callable[[Any], Any] | None = None
    """What is left to do with the result: of pictures, to make uint8 (height, width, 3) of the
    decoded pixels (3, height, width), nominally in [-1, 1]; of text, to write a `str` from the
    sample, which a text task must."""


class StartSampling(Protocol):
    """Begin one sample from a validated request."""

    def __call__(self, request: Any, *, device: torch.device) -> Sampling: ...  # noqa: D102


@dataclass(frozen=True)
class Task:
    """One thing that a user can ask of a system."""

    name: str
    request: type[BaseModel]
    """Says `seed` and, of tasks whose steps can be counted, `num_steps`."""
    start: StartSampling
    network: nn.Module
    output: Literal["image", "text"] = "image"
    """Samples are latents that the recipe's autoencoder decodes, or what `finish` reads."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """A small request, by which an engine tries the task out; keys with defaults may be left."""


# ---------------------------------------------------------------- the whole


@dataclass(frozen=True)
class System:
    """A model as the trainer, the evaluator and the server see it."""

    modules: Mapping[str, nn.Module]
    phases: tuple[Phase, ...]
    columns: tuple[str, ...]
    """Columns of the cache that training reads."""
    shard_units: tuple[nn.Module, ...] = ()
    """Blocks that FSDP shards, and that `torch.compile` compiles, one by one."""
    ema_modules: tuple[str, ...] = ()
    tasks: Mapping[str, Task] = field(default_factory=dict)
    use_autoencoder: Callable[[nn.Module], None] | None = None
    """Is handed the recipe's autoencoder before the first request, of systems whose tasks begin
    from pictures."""


class FamilyRecipe(Settings):
    """What every family's recipe holds; a family adds its network, objective and sampling."""

    family: str
    train: TrainSettings
    data: DataSettings = DataSettings()
    ema: EmaSettings | None = None
    autoencoder: AutoencoderSettings | None = None
    """For families that learn on latents."""
    initialize_from: str | None = None
    """Bundle of an earlier run; parameters that both have begin as they are there."""

    def cache_identity(self) -> Mapping[str, Mapping[str, Any]]:
        """Say what must have made columns of the cache: per column, keys of the cache's identity.

        A family whose cache holds encoded texts names their `encoder` (its fingerprint) here;
        `autoencoder` needs no mention. Loads the encoders: asked once, before training.
        """
        return {}

    @property
    def sources(self) -> dict[str, DataSettings]:
        """Where parts of the batch come from that are read from a cache of their own.

        The columns of part `text` are called `text.<column>`; other parts are read from `data`.
        """
        return {}

    def build(self) -> System:
        """Make the system with freshly initialized weights."""
        raise TypeError(f"family {self.family} does not say how to build its system")
