"""Power-cosine guidance (MDT, arXiv 2303.14389): hardly any near noise, all of it near the data."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerCosine:
    """Guidance scale as a function of the timestep of the schedule trained on."""

    scale: float
    """Reached at timestep 0; it is 1 (off) at the other end."""
    power: float
    """Larger starts later, for more diverse samples; near 0 the scale is almost constant."""
    num_timesteps: int

    def __call__(self, timestep: float) -> float:
        """Compute 1 + (scale - 1) (1 - cos(pi (1 - timestep / num_timesteps)^power)) / 2."""
        progress = (1 - timestep / self.num_timesteps) ** self.power
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * progress)) / 2
