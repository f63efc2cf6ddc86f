"""Flow matching: regress the velocity of a path between noise and data (arXiv 2210.02747)."""

from dataclasses import dataclass

from torch import nn

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.path import LinearPath
from udiff.diffusion.time import TimeDistribution
from udiff.system import Batch, Draws, Losses, StepRng


@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of the predicted velocity."""

    path: LinearPath
    time: TimeDistribution
    conditions: LabelDropout

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw dropped conditions, time and noise of each sample."""
        latent = batch["latent"]
        conditions = self.conditions.draw(batch, rng)
        t = self.time.draw(len(latent), rng.local)
        return {**conditions, "t": t, "noise": rng.local.normal(*latent.shape)}

    def __call__(self, network: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss; `batch["latent"]` is normalized."""
        x_t, velocity = self.path.interpolate(batch["latent"], draws["noise"], draws["t"])
        conditions = {name: draws[name] for name in self.conditions.names}
        prediction = network(x_t, draws["t"], **conditions).output.float()
        mse = (prediction - velocity).square().mean()
        return Losses(total=mse, terms={"velocity_mse": mse})
