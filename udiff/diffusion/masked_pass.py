"""Training with a second pass in which tokens are missing (MDT, arXiv 2303.14389, section 3)."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from udiff.diffusion.objective import Network, Objective
from udiff.nn.token_mask import kept_tokens
from udiff.system import Batch, Draws, Losses, StepRng

MASKED = "masked_"


@runtime_checkable
class MaskRatio(Protocol):
    """Says which fraction of the tokens a step drops: one for the batch, as it decides shapes."""

    def draw(self, generator: torch.Generator) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class FixedMaskRatio:
    """Always the same fraction (MDT)."""

    ratio: float

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return it, as precise as a Python number."""
        return torch.tensor(self.ratio, dtype=torch.float64)


@dataclass(frozen=True)
class UniformMaskRatio:
    """Any fraction between `low` and `low + width` (MDTv2: 0.3 and 0.2)."""

    low: float
    width: float

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw one."""
        return self.at(torch.rand((), generator=generator))

    def at(self, uniform: Tensor) -> Tensor:
        """Map a number in [0, 1) to a fraction, in float32."""
        return self.low + self.width * uniform


@dataclass(frozen=True)
class MaskedPass:
    """An objective on all tokens, plus the same objective on some of them.

    The network must take `keep`, the tokens that its encoder is to see, and answer for all of them.
    Both passes share the data and the draws named in `shared`; whatever else is drawn (noise,
    dropped labels) is drawn anew. The fraction dropped is the same on all ranks and micro-batches:
    the published code draws one for each, so that none of them waits for the longest sequence.
    """

    objective: Objective
    ratio: MaskRatio
    num_tokens: int
    shared: tuple[str, ...]

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw for the objective twice, and which tokens go."""
        plain = self.objective.draw(batch, rng)
        again = self.objective.draw(batch, rng)
        masked = {MASKED + name: draw for name, draw in again.items() if name not in self.shared}
        num_rows = len(next(iter(plain.values())))
        return {
            **plain,
            **masked,
            "mask_ratio": self.ratio.draw(rng.shared),
            "mask_noise": rng.local.uniform(num_rows, self.num_tokens),
        }

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute both passes' losses; their sum is the total."""
        again = {
            name.removeprefix(MASKED): draw
            for name, draw in draws.items()
            if name.startswith(MASKED)
        }
        keep = kept_tokens(draws["mask_noise"], num_kept(self.num_tokens, draws["mask_ratio"]))
        masked = self.objective(partial(network, keep=keep), batch, {**draws, **again})
        # The plain pass comes last: wrappers outside that look at the prediction mean this one.
        plain = self.objective(network, batch, draws)
        terms = {MASKED + name: term for name, term in masked.terms.items()}
        return Losses(
            plain.total + masked.total,
            {**plain.terms, **terms},
            _sum(plain.per_sample, masked.per_sample),
        )


def num_kept(num_tokens: int, ratio: Tensor) -> int:
    """Compute how many tokens stay, truncated in the precision of `ratio` as officially."""
    return int(num_tokens * (1 - ratio))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a + b if a is not None and b is not None else None
