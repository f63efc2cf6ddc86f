"""Official DDT checkpoints: their argument names, and their keys, which ours follow."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from udiff.models.ddt.network import DDT

_ARGUMENTS = {
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "hidden_size": "dim",
    "num_groups": "num_heads",
    "num_blocks": "num_blocks",
    "num_encoder_blocks": "num_encoder_blocks",
    "num_classes": "num_classes",
}


def network_from_official(config: Mapping[str, Any]) -> nn.Module:
    """Build the network that official constructor arguments describe."""
    return DDT(**{ours: config[theirs] for theirs, ours in _ARGUMENTS.items()})
