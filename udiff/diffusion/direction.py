"""The velocity-direction loss of LightningDiT (arXiv 2501.01423, section 4.2)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from udiff.diffusion.objective import Network, Objective, Recorded
from udiff.diffusion.parameterization import (
    VELOCITY,
    Ends,
    Parameterization,
    convert,
)
from udiff.diffusion.path import Path, per_sample
from udiff.system import Batch, Draws, Losses, StepRng


@dataclass(frozen=True)
class VelocityDirection:
    """Add 1 - cosine of predicted and true velocity to an objective's loss.

    The objective is any that calls the network once, with x_t at the drawn time of this path.
    """

    objective: Objective
    path: Path
    prediction: Parameterization = VELOCITY
    """What the network predicts; its velocity follows."""
    weight: float = 1.0
    time: str = "t"
    """Name of the draw that says where on the path."""

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw what the objective draws."""
        return self.objective.draw(batch, rng)

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the objective's losses and the direction's."""
        recorded = Recorded(network)
        losses = self.objective(recorded, batch, draws)
        data, noise, t = batch["latent"], draws["noise"], draws[self.time].float()
        point = self.path.at(per_sample(t, data))
        velocity_pred = convert(
            recorded.prediction.output[:, : data.shape[1]].float(),  # others are variances
            point.place(data, noise),
            point,
            source=self.prediction,
            target=VELOCITY,
        )
        velocity = VELOCITY.target(Ends(data, noise), point)
        direction = direction_loss(velocity_pred, velocity)
        return Losses(
            losses.total + self.weight * direction,
            {**losses.terms, "velocity_direction": direction},
        )


def direction_loss(
    velocity_pred: Float[Tensor, "batch channels ..."],
    velocity: Float[Tensor, "batch channels ..."],
) -> Float[Tensor, ""]:
    """Average 1 - cosine, taken along the channels at every place of the latent."""
    return (1 - cosine_similarity(velocity_pred, velocity, dim=1, eps=1e-8)).mean()
