"""Layouts of official checkpoints: both of the four-flow network, the two-flow VD-DC, SD v1."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from udiff.models.versatile.places import block_places, infer_plan
from udiff.models.versatile.plan import Plan
from udiff.weights import WeightsError, strip_prefix

UNET = "model.diffusion_model."
BRANCHES = ("text", "image")
"""Contexts of VD-DC's two branches, in their order."""
_BRANCH_PARTS = r"norm|proj_in|proj_out|transformer_blocks"
_BRANCHED = re.compile(rf"({_BRANCH_PARTS})_(\d)\.")


def to_current(
    weights: Mapping[str, Tensor], *, contexts: Sequence[str] = ("text",)
) -> dict[str, Tensor]:
    """Bring the diffusers of a checkpoint of any layout to the keys of the current one, float32.

    Everything else in it (autoencoders, CLIP, schedule tables) is left out. A single U-Net becomes
    the image's data blocks, with the contexts of its branches.

    Args:
        weights: of a checkpoint.
        contexts: kinds that the context blocks of a U-Net without branches become (Stable
            Diffusion's); the same weights for each of them.

    Raises:
        WeightsError: there is no diffuser in it.
    """
    if current := {k: t for k, t in weights.items() if k.startswith("diffuser.")}:
        found = current
    elif unet := strip_prefix(weights, UNET):
        is_first_release = any(key.startswith("unet_") for key in unet)
        found = _from_first_release(unet) if is_first_release else _from_unet(unet, contexts)
    else:
        raise WeightsError("this is no checkpoint of Versatile Diffusion: it has no diffuser")
    return {key: tensor.float() for key, tensor in found.items()}


def to_first_release(weights: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Bring weights of the current layout to the keys of November 2022."""
    table = {f"{place.flat}.": f"{place.nested}." for place in block_places(plan)}
    renamed = {}
    for key, tensor in weights.items():
        _, name, rest = key.split(".", 2)
        if rest.startswith("time_embed."):
            renamed[UNET + rest] = tensor
        else:
            renamed[f"{UNET}unet_{name}.{_replace_prefix(rest, table)}"] = tensor
    return renamed


def to_unet(weights: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Bring a network of image data to VD-DC's keys, or with one context to Stable Diffusion's.

    Raises:
        WeightsError: it generates something else, too.
    """
    kinds = {key.split(".")[1] for key in weights if ".context_blocks." in key}
    if any(key.startswith("diffuser.text.data_blocks.") for key in weights):
        raise WeightsError("a network that writes text has no layout of a single U-Net")
    table = {f"{place.flat}.": f"{place.nested}." for place in block_places(plan)}
    renamed = {}
    for key, tensor in weights.items():
        _, name, rest = key.split(".", 2)
        nested = rest if rest.startswith("time_embed.") else _replace_prefix(rest, table)
        if rest.startswith("context_blocks.") and len(kinds) > 1:
            numbered = rf".\1_{BRANCHES.index(name)}."
            nested = re.sub(rf"\.({_BRANCH_PARTS})\.", numbered, nested, count=1)
        renamed[UNET + nested] = tensor
    return renamed


def _from_first_release(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {key.split(".")[0].removeprefix("unet_") for key in unet if key.startswith("unet_")}
    found = _time_layers(unet)
    for name in sorted(names):
        nested = strip_prefix(unet, f"unet_{name}.")
        found |= {f"diffuser.{name}.{key}": t for key, t in _flatten(nested).items()}
    return found


def _from_unet(unet: Mapping[str, Tensor], contexts: Sequence[str]) -> dict[str, Tensor]:
    blocks = {key: t for key, t in unet.items() if not key.startswith("time_embed.")}
    branches = sorted({int(m.group(2)) for key in blocks if (m := _BRANCHED.search(key))})
    found = _time_layers(unet)
    for branch in (*branches,) or (None,):
        kinds = contexts if branch is None else BRANCHES[branch : branch + 1]
        for key, tensor in _flatten(_select_branch(blocks, branch)).items():
            owners = ("image",) if key.startswith("data_blocks.") else kinds
            found |= {f"diffuser.{owner}.{key}": tensor for owner in owners}
    return found


def _select_branch(blocks: Mapping[str, Tensor], branch: int | None) -> dict[str, Tensor]:
    """Take one branch's context blocks, without its number, beside all data blocks."""
    selected = {}
    for key, tensor in blocks.items():
        match = _BRANCHED.search(key)
        if match is None:
            selected[key] = tensor
        elif int(match.group(2)) == branch:
            selected[_BRANCHED.sub(r"\1.", key, count=1)] = tensor
    return selected


def _time_layers(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"diffuser.image.{k}": t for k, t in unet.items() if k.startswith("time_embed.")}


def _flatten(nested: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring one U-Net's keys to lists of data and context blocks."""
    table = {f"{p.nested}.": f"{p.flat}." for p in block_places(infer_plan(nested))}
    return {_replace_prefix(key, table): tensor for key, tensor in nested.items()}


def _replace_prefix(key: str, table: Mapping[str, str]) -> str:
    # Names of blocks have one, two or three parts.
    parts = key.split(".")
    for length in (3, 2, 1):
        prefix = ".".join(parts[:length]) + "."
        if prefix in table:
            return table[prefix] + key.removeprefix(prefix)
    raise WeightsError(f"key {key} belongs to no block of the network")
