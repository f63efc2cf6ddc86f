"""What one flow learns from: the noise in its data, given its context (arXiv 2006.11239)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.gaussian import NoiseSchedule
from udiff.diffusion.objective import Network
from udiff.models.versatile.flows import Flow
from udiff.models.versatile.network import Context
from udiff.models.versatile.schedule import bound_weights
from udiff.system import Batch, Draws, Losses, StepRng

Error = Callable[[Tensor, Tensor], Tensor]
ERRORS: dict[str, Error] = {
    "l2": lambda prediction, target: (prediction - target).square(),
    "l1": lambda prediction, target: (prediction - target).abs(),
}


@dataclass(frozen=True)
class FlowObjective:
    """The error of one flow's prediction, a mean over all elements and samples.

    It reads `<data>_latent`, `<context>_context` and `<context>_null_for_<data>`, the unconditional
    context (without a batch axis).
    """

    flow: Flow
    schedule: NoiseSchedule
    dropout_prob: float = 0.1
    """How often a sample's context is the unconditional one."""
    error: Literal["l2", "l1"] = "l2"
    predicts: Literal["noise", "data"] = "noise"

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw timestep, noise and dropped contexts of each sample."""
        latent = batch[f"{self.flow.data}_latent"]
        rows = len(latent)
        uniform = rng.local.uniform(rows)
        return {
            "timestep": (uniform * len(self.schedule)).long(),
            "noise": rng.local.normal(*latent.shape),
            "is_dropped": rng.local.uniform(rows) < self.dropout_prob,
        }

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss, and for the log its weighting as a variational bound."""
        data, noise, timestep = batch[f"{self.flow.data}_latent"], draws["noise"], draws["timestep"]
        context = Context(self.flow.context, self._context(batch, draws["is_dropped"]))
        x_t = self.schedule.add_noise(data, noise, timestep)
        output = network(x_t, timestep, data=self.flow.data, contexts=[context]).output.float()
        target = noise if self.predicts == "noise" else data
        per_sample = ERRORS[self.error](output, target).flatten(1).mean(1)
        bound = (self._bound_weights.to(data.device)[timestep] * per_sample).mean()
        loss = per_sample.mean()
        return Losses(loss, {"mse": loss, "bound": bound}, per_sample)

    def _context(self, batch: Batch, is_dropped: Tensor) -> Float[Tensor, "batch tokens dim"]:
        data, kind = self.flow
        tokens, null = batch[f"{kind}_context"], batch[f"{kind}_null_for_{data}"]
        return torch.where(is_dropped[:, None, None], null, tokens)

    @cached_property
    def _bound_weights(self) -> Float[Tensor, " steps"]:
        return bound_weights(self.schedule).float()
