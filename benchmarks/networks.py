"""Networks of one size to compare: ours of each family, and diffusers' DiT."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from udiff.recipe import load_recipe
from udiff.system import FamilyRecipe


class Size(NamedTuple):
    """Of networks and their latents (4 channels, patches of 2 x 2)."""

    dim: int
    depth: int
    num_heads: int
    latent: int


SIZES = {"debug": Size(128, 6, 4, 8), "mid": Size(384, 12, 6, 32)}
NUM_CLASSES = 10


@dataclass(frozen=True)
class Contestant:
    """A network, and how to call it."""

    name: str
    network: nn.Module
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    blocks: tuple[nn.Module, ...]


def make_recipe(family: str, size: Size, *overrides: str) -> FamilyRecipe:
    """Give a family's debug recipe another size; four fifths are an encoder where there is one."""
    encoder = size.depth * 22 // 28
    depth = {
        "ddt": f"num_blocks: {size.depth}, num_encoder_blocks: {encoder}",
        "lightningdit": f"depth: {size.depth}",
        "mdtv2": f"depth: {size.depth}, num_decoder_blocks: 2",
    }[family]
    return load_recipe(
        f"{family}/debug",
        [
            f"network={{dim: {size.dim}, num_heads: {size.num_heads}, {depth}}}",
            f"latent={{height: {size.latent}, width: {size.latent}}}",
            *overrides,
        ],
    )


def contestants(size: Size, device: torch.device) -> list[Contestant]:
    """Make a network of each family, and diffusers' if that is installed."""
    made = [_ours(family, size) for family in ("ddt", "lightningdit", "mdtv2")]
    try:
        made.append(_diffusers(size))
    except ImportError:
        print("diffusers is not installed: its side is left out")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for contestant in made:
        contestant.network.to(device, dtype)
    return made


def randomize(network: nn.Module) -> None:
    """Draw every weight anew: a network that starts at zero has nothing to do."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)


def _ours(family: str, size: Size) -> Contestant:
    system = make_recipe(family, size).build()
    network = system.modules["denoiser"]
    randomize(network)
    return Contestant(
        family,
        network,
        lambda x, t, label: network(x, t, label=label).output,
        system.shard_units,
    )


def _diffusers(size: Size) -> Contestant:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=size.num_heads,
        attention_head_dim=size.dim // size.num_heads,
        in_channels=4,
        num_layers=size.depth,
        sample_size=size.latent,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    randomize(network)
    return Contestant(
        "diffusers DiT",
        network,
        lambda x, t, label: network(x, timestep=(t * 999).long(), class_labels=label).sample,
        tuple(network.transformer_blocks),
    )
