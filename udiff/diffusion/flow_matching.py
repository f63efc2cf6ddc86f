"""Flow matching: regress the velocity of a path between noise and data (arXiv 2210.02747).

Or the noise, the data or the score, from which the velocity follows (arXiv 2401.08740).
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.objective import Network
from udiff.diffusion.parameterization import VELOCITY, Ends, Parameterization
from udiff.diffusion.path import Coefficients, Path, per_sample
from udiff.diffusion.time import TimeDistribution
from udiff.system import Batch, Draws, Losses, StepRng

LossWeight = Callable[[Coefficients], Float[Tensor, "..."]]
"""Weight of a squared error as a function of where on the path it was made."""


def constant_weight(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh all times alike."""
    return point.alpha.new_ones(())


def velocity_weight(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh an error of the noise as the error of the velocity that it causes: (V / sigma)^2."""
    return (point.diffusivity / point.sigma) ** 2


def likelihood_weight(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh an error of the noise as a likelihood bound does (arXiv 2101.09258): V / sigma^2."""
    return point.diffusivity / point.sigma**2


@dataclass(frozen=True)
class FlowMatching:
    """Weighted mean squared error of what the network predicts."""

    path: Path
    time: TimeDistribution
    conditions: LabelDropout
    prediction: Parameterization = VELOCITY
    weight: LossWeight = constant_weight

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw dropped conditions, time and noise of each sample."""
        latent = batch["latent"]
        conditions = self.conditions.draw(batch, rng)
        t = self.time.draw(len(latent), rng.local)
        return {**conditions, "t": t, "noise": rng.local.normal(*latent.shape)}

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss; `batch["latent"]` is normalized."""
        data, noise, t = batch["latent"], draws["noise"], draws["t"]
        point = self.path.at(per_sample(t, data))
        x_t = point.place(data, noise)
        conditions = {name: draws[name] for name in self.conditions.names}
        output = network(x_t, t, **conditions).output.float()
        residual = self.prediction.residual(output, Ends(data, noise), point)
        mse = (self.weight(point) * residual.square()).mean()
        return Losses(total=mse, terms={f"{self.prediction.name}_mse": mse})
