"""Training on cached columns: latents of pictures and texts, and CLIP's tokens of both."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.flow_mixture import FlowMixture
from udiff.models.versatile.flows import FLOWS
from udiff.system import Batch, Draws, Losses, StepRng

TEXT_LATENT, CLIP_IMAGE, CLIP_TEXT = "text_latent", "clip_image", "clip_text"
"""Columns: latents (1, latent), tokens of pictures and of texts (tokens, dim)."""
COLUMNS = {
    ("data", "image"): ("latent_mean", "latent_logvar"),
    ("data", "text"): (TEXT_LATENT,),
    ("context", "image"): (CLIP_IMAGE,),
    ("context", "text"): (CLIP_TEXT,),
}

FindNull = Callable[..., Tensor]


@dataclass(frozen=True)
class CachedFlows:
    """Hands the flows what they read: latents sampled and normalized, contexts, null contexts."""

    mixture: FlowMixture
    mean: tuple[float, ...]
    """Per channel, of raw latents of pictures."""
    std: tuple[float, ...]
    find_null: FindNull
    """Finds the unconditional context of a kind, for a kind of data."""

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw the posterior's noise, where pictures are generated, then what the flows draw."""
        if "latent_mean" not in batch:
            return self.mixture.draw(self._texts(batch), rng)
        noise = rng.local.normal(*batch["latent_mean"].shape)
        data = {**self._texts(batch), "image_latent": noise}
        return {"posterior_noise": noise, **self.mixture.draw(data, rng)}

    def __call__(self, network: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Compute the flows' losses."""
        data = self._texts(batch)
        if "latent_mean" in batch:
            posterior = PosteriorLatents(self.mixture, self.mean, self.std)
            data["image_latent"] = posterior.sample(batch, draws["posterior_noise"])
        for kind, column in (("image", CLIP_IMAGE), ("text", CLIP_TEXT)):
            if column in batch:
                data[f"{kind}_context"] = batch[column].float()
        return self.mixture(network, {**data, **self._nulls(batch, draws)}, draws)

    def _texts(self, batch: Batch) -> dict[str, Tensor]:
        if TEXT_LATENT not in batch:
            return {}
        return {"text_latent": batch[TEXT_LATENT].float().flatten(1)}

    def _nulls(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        device = next(iter(batch.values())).device
        found = {}
        for name in self.mixture.taken(draws):
            data, kind = FLOWS[name]
            found[f"{kind}_null_for_{data}"] = self.find_null(kind, data=data, device=device)
        return found


def columns_of(flows: tuple[str, ...]) -> tuple[str, ...]:
    """List the columns that flows read."""
    wanted: dict[str, None] = {}
    for name in flows:
        flow = FLOWS[name]
        for key in (("data", flow.data), ("context", flow.context)):
            wanted |= dict.fromkeys(COLUMNS[key])
    return tuple(wanted)
