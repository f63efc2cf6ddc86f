"""Official checkpoints of the LDM layout: which network has these weights, and loading one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.ldm import LDMArchitecture, LDMAutoencoder
from udiff.weights import WeightsError, load_strictly, read_checkpoint, unwrap_weights

AUTOENCODER_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
TRAINING_PREFIXES = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
"""What training checkpoints hold beside the autoencoder."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def load_ldm_autoencoder(path: str) -> KLAutoencoder:
    """Load an official checkpoint: a file, or `<hub id>/<file>` of the hub.

    Raises:
        FileNotFoundError: there is none.
        WeightsError: it holds something else.
    """
    weights = autoencoder_weights(read_checkpoint(_find(path)))
    model = LDMAutoencoder(infer_architecture(weights))
    load_strictly(model, weights, source=path)
    return KLAutoencoder(model).eval().requires_grad_(False)


def names_a_checkpoint(path: str) -> bool:
    """Say whether a path means a single file, here or on the hub."""
    return Path(path).suffix in SUFFIXES and not Path(path).is_dir()


def autoencoder_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Select the autoencoder's weights of a checkpoint in any wrapping.

    Raises:
        WeightsError: it holds keys that are neither these nor known from training.
    """
    weights = unwrap_weights(checkpoint)
    foreign = [k for k in weights if not k.startswith(AUTOENCODER_PREFIXES + TRAINING_PREFIXES)]
    if foreign:
        raise WeightsError(f"this is no autoencoder of the LDM layout: unknown keys {foreign}")
    return {k: t for k, t in weights.items() if k.startswith(AUTOENCODER_PREFIXES)}


def infer_architecture(weights: Mapping[str, Tensor], *, norm_groups: int = 32) -> LDMArchitecture:
    """Find the sizes of the network that has these weights; only the norms' groups do not show.

    Raises:
        WeightsError: the weights are of no such network.
    """
    levels = _indices(weights, r"encoder\.down\.(\d+)\.")
    try:
        width = weights["encoder.conv_in.weight"].shape[0]
        channels = [
            weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels
        ]
        hidden_channels = weights["decoder.conv_in.weight"].shape[1]
        latent_channels = weights["post_quant_conv.weight"].shape[1]
    except KeyError as error:
        raise WeightsError(f"this is no autoencoder of the LDM layout: it has no {error}") from None
    return LDMArchitecture(
        width=width,
        multipliers=tuple(each // width for each in channels),
        blocks_per_level=len(_indices(weights, r"encoder\.down\.0\.block\.(\d+)\.")),
        latent_channels=latent_channels,
        hidden_channels=hidden_channels,
        encoder_attention=_indices(weights, r"encoder\.down\.(\d+)\.attn\."),
        decoder_attention=_indices(weights, r"decoder\.up\.(\d+)\.attn\."),
        norm_groups=norm_groups,
    )


def _indices(weights: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    found = (re.match(pattern, key) for key in weights)
    return tuple(sorted({int(match.group(1)) for match in found if match}))


def _find(path: str) -> str:
    if Path(path).is_file():
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    try:
        return hf_hub_download(f"{owner}/{name}", file)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"autoencoder.path {path!r} is neither a file nor a file of the hub that can be reached"
        ) from error
