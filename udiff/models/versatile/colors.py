"""Colors of a generated picture brought to those of the picture that it is made from."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "images 3 height width"]

_NUM_BINS = 600
_MARGIN = 1e-6


def match_statistics(images: Images, reference: Float[Tensor, "#images 3 h w"]) -> Images:
    """Give every channel the mean and the deviation of a reference; all in [0, 1]."""
    std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    wanted_std, wanted_mean = torch.std_mean(reference, dim=(2, 3), keepdim=True)
    std = std.clamp(min=_MARGIN)  # of a channel that is one level all over
    return ((images - mean) / std * wanted_std + wanted_mean).clamp(0, 1)


def match_colors_8bit(
    image: np.ndarray, reference: np.ndarray, *, keep: float = 0.5, by_histogram: bool = False
) -> np.ndarray:
    """Adjust as the first release did: on levels, blended with the picture as it was.

    Args:
        image: uint8 (height, width, 3).
        reference: uint8, of any size.
        keep: share of the picture as it was.
        by_histogram: match the channels' histograms too, not only mean and deviation.
    """
    source, wanted = image.astype(np.float64), reference.astype(np.float64)
    matched = _match_moments(source, wanted)
    if by_histogram:
        channels = [_match_histogram(matched[..., c], wanted[..., c]) for c in range(3)]
        matched = np.stack(channels, axis=-1)
    blended = keep * source + (1 - keep) * matched
    return blended.clip(0, 255).astype(np.uint8)


def _match_moments(source: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    axes = (0, 1)
    normalized = (source - source.mean(axes)) / source.std(axes)
    return normalized * wanted.std(axes) + wanted.mean(axes)


def _match_histogram(channel: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Move values so that both have one distribution, by their cumulative histograms."""
    span = (
        min(channel.min(), wanted.min()) - _MARGIN,
        max(channel.max(), wanted.max()) + _MARGIN,
    )
    own, edges = _distribution(channel, span)
    theirs, _ = _distribution(wanted, span)
    moved = np.interp(own, theirs, edges)
    moved[own <= theirs[0]] = wanted.min() - _MARGIN
    moved[own >= theirs[-1]] = wanted.max() + _MARGIN
    return np.interp(channel, edges, moved)


def _distribution(values: np.ndarray, span: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the cumulative histogram of values, and the left edges of its bins."""
    counts, edges = np.histogram(values, bins=_NUM_BINS, range=span)
    cumulative = counts.cumsum().astype(np.float64)
    return cumulative / cumulative[-1], edges[:-1]
