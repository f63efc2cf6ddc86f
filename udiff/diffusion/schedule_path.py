"""A discrete noise schedule as a path, for losses that are stated in velocities."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.gaussian import NoiseSchedule
from udiff.diffusion.path import Coefficients


@dataclass(frozen=True)
class SchedulePath:
    """The path alpha data + sigma noise with alpha^2 + sigma^2 = 1; its times are timesteps.

    Its velocity is that on the unit circle, by the angle, towards data (arXiv 2202.00512, appendix
    D, negated): only the direction is the same as in any other measure of time.
    """

    schedule: NoiseSchedule

    def at(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Compute the coefficients at timesteps."""
        table, step = self.schedule.table, t.long()
        alpha = table.alpha.to(t.device)[step].float()
        sigma = table.sigma.to(t.device)[step].float()
        return Coefficients(alpha, sigma, sigma, -alpha, sigma / alpha)
