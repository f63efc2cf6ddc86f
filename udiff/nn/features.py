"""Tokens inside a network, for losses that align or spread them."""

from collections.abc import Mapping

from torch import Tensor


def pick_feature(features: Mapping[int, Tensor], layer: int | None) -> Tensor | None:
    """Pick the tokens after a block, of those after all that were run; none where none is wanted.

    Raises:
        ValueError: the block was not run, or there is none of that number.
    """
    if layer is None:
        return None
    if layer not in features:
        raise ValueError(
            f"feature_layer must be one of the blocks run, {sorted(features)}; got {layer}"
        )
    return features[layer]
