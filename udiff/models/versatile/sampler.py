"""DDIM as Versatile Diffusion samples: from noise, or from data that is noised part of the way."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.gaussian import NoiseSchedule
from udiff.diffusion.gaussian_reverse import FixedLarge, NoisePrediction, ReverseProcess
from udiff.models.versatile.schedule import Spacing, sampling_timesteps
from udiff.samplers.ddim import ddim
from udiff.system import Steps

Latent = Float[Tensor, "..."]


@dataclass(frozen=True)
class Sampler:
    """Which steps are visited, and how much noise is added on the way."""

    schedule: NoiseSchedule
    """That the network was trained on."""
    num_steps: int
    spacing: Spacing = "uniform"
    eta: float = 0.0
    """0 adds no noise, 1 as much as DDPM."""
    temperature: float = 1.0
    """Factor of the noise that is added."""

    @cached_property
    def timesteps(self) -> list[int]:
        """Timesteps that are visited, in increasing order; their number may not be `num_steps`."""
        return sampling_timesteps(self.num_steps, self.spacing, num_timesteps=len(self.schedule))

    @cached_property
    def process(self) -> ReverseProcess:
        """The reverse process on all of these timesteps."""
        return self._process(self.timesteps)

    def from_noise(self, noise: Latent, normals: Iterator[Latent]) -> Steps:
        """Sample from standard normal noise; `normals` gives one for every step with `eta`."""
        return self._steps(noise, self.process, normals)

    def from_data(
        self, data: Latent, noise: Latent, num_steps: int, normals: Iterator[Latent]
    ) -> Steps:
        """Noise data up to a step, and sample from there.

        As officially, it is noised for the step of number `num_steps`, counted from 0, and first
        denoised at the one before.

        Raises:
            ValueError: that step is not visited.
        """
        if not 1 <= num_steps < len(self.timesteps):
            raise ValueError(
                f"sampling from data must take 1..{len(self.timesteps) - 1} of the "
                f"{len(self.timesteps)} steps, got {num_steps}"
            )
        bar = self.schedule.alpha_bar[self.timesteps[num_steps]]
        x = bar.sqrt() * data + (1 - bar).sqrt() * noise
        return self._steps(x, self._process(self.timesteps[:num_steps]), normals)

    def _process(self, timesteps: list[int]) -> ReverseProcess:
        return ReverseProcess(self.schedule, NoisePrediction(), FixedLarge()).spaced(timesteps)

    def _steps(self, x: Latent, process: ReverseProcess, normals: Iterator[Latent]) -> Steps:
        return ddim(
            x,
            process,
            normals=normals,
            eta=self.eta,
            temperature=self.temperature,
            # As officially: what is returned has the noise of timestep 0.
            final_alpha_bar=float(self.schedule.alpha_bar[0]),
        )
