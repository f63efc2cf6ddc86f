"""Image-text-image editing: a picture's caption is changed in the latents of text."""

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.models.versatile.low_rank import REDUCED_RANK, keep_leading

IMAGE_SHARE = 0.33
"""Published share of the picture's context when the edited caption is drawn."""

TextLatents = Float[Tensor, "texts latent"]


def edit_latent(
    latent: TextLatents,
    negative: Float[Tensor, "#texts latent"] | None,
    positive: Float[Tensor, "#texts latent"] | None,
) -> TextLatents:
    """Take what lies along the negative prompt's latent away, and add the positive prompt's."""
    if negative is not None:
        unit = negative / negative.norm(dim=-1, keepdim=True)
        latent = latent - (latent * unit).sum(-1, keepdim=True) * unit
    return latent if positive is None else latent + positive


def edit_contexts(
    image: Float[Tensor, "texts image_tokens dim"],
    null_image: Float[Tensor, "texts image_tokens dim"],
    *,
    new_text: Float[Tensor, "texts tokens dim"],
    positive: Float[Tensor, "#texts tokens dim"],
    null_text: Float[Tensor, "texts tokens dim"],
    rank: int = REDUCED_RANK,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put together what the edited picture is drawn from; contexts and unconditional ones.

    The picture keeps its leading components alone, and loses its class token; the edited caption is
    followed by the positive prompt. The unconditional picture is not reduced, as officially.
    """
    contexts = {
        "text": torch.cat([new_text, positive.expand(len(new_text), -1, -1)], dim=1),
        "image": keep_leading(image[:, 1:], rank),
    }
    nulls = {"text": torch.cat([null_text, null_text], dim=1), "image": null_image[:, 1:]}
    return contexts, nulls
