"""Layers that Versatile Diffusion's blocks are made of; attribute names are the official keys."""

from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

Grid = Float[Tensor, "batch channels height width"]
OtherGrid = Float[Tensor, "batch other_channels other_height other_width"]
TimeState = Float[Tensor, "batch time_dim"]
Tokens = Float[Tensor, "batch tokens dim"]

Module = TypeVar("Module", bound=nn.Module)

NUM_GROUPS = 32


class Residual(nn.Module):
    """Two convolutions, the time added between them, and a skip connection."""

    def __init__(
        self, channels_in: int, channels_out: int, time_dim: int, *, kernel: int, dropout: float
    ) -> None:
        """Make the last convolution zero: the block begins as its skip connection."""
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels_in),
            nn.SiLU(),
            nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, channels_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zeroed(nn.Conv2d(channels_out, channels_out, kernel, padding=kernel // 2)),
        )
        same = channels_in == channels_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Grid, time: TimeState) -> OtherGrid:
        """Refine a grid of features."""
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class FlatResidual(Residual):
    """The same on vectors: channels and the few positions of each are one axis for it."""

    def __init__(
        self, channels_in: int, channels_out: int, time_dim: int, *, positions: int, dropout: float
    ) -> None:
        """Take grids of `positions` x 1."""
        super().__init__(
            channels_in * positions, channels_out * positions, time_dim, kernel=1, dropout=dropout
        )
        self._positions = positions

    def forward(self, x: Grid, time: TimeState) -> OtherGrid:
        """Refine; index of a channel's position is channel * positions + position."""
        flat = super().forward(x.reshape(len(x), -1, 1, 1), time)
        return flat.reshape(len(x), -1, self._positions, 1)


class Downsample(nn.Module):
    """Halve the resolution."""

    def __init__(self, channels: int) -> None:
        """Take `channels` and keep them."""
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Grid) -> OtherGrid:
        """Convolve with stride 2."""
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution."""

    def __init__(self, channels: int) -> None:
        """Take `channels` and keep them."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Grid) -> OtherGrid:
        """Repeat every pixel, then convolve."""
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"))


class FlatLinear(nn.Linear):
    """A linear map from a vector or a grid of `positions` x 1 to such a grid."""

    def __init__(self, features_in: int, channels_out: int, positions: int) -> None:
        """Take all features of a sample together."""
        super().__init__(features_in, channels_out * positions)
        self._positions = positions

    def forward(self, x: Float[Tensor, "batch ..."]) -> OtherGrid:
        """Map; positions of a channel lie side by side."""
        return super().forward(x.flatten(1)).reshape(len(x), -1, self._positions, 1)


class FlatHead(nn.Linear):
    """A linear map from a grid to a vector, zero at the start."""

    def __init__(self, features_in: int, features_out: int) -> None:
        """Take all features of a sample together."""
        super().__init__(features_in, features_out)
        _zeroed(self)

    def forward(self, x: Grid) -> Float[Tensor, "batch features"]:
        """Map."""
        return super().forward(x.flatten(1))


def grid_head(channels_in: int, channels_out: int) -> nn.Sequential:
    """Make the last layers of an image diffuser."""
    return nn.Sequential(
        nn.GroupNorm(NUM_GROUPS, channels_in),
        nn.SiLU(),
        _zeroed(nn.Conv2d(channels_in, channels_out, 3, padding=1)),
    )


def flat_head(channels_in: int, positions: int, features_out: int) -> nn.Sequential:
    """Make the last layers of a text diffuser; its norm sees the grid, not the flat vector."""
    return nn.Sequential(
        nn.GroupNorm(NUM_GROUPS, channels_in),
        nn.SiLU(),
        FlatHead(channels_in * positions, features_out),
    )


class Heads(NamedTuple):
    """How a context block divides its channels: by a number of heads, or heads of one width."""

    num_heads: int | None = 8
    head_dim: int | None = None

    def count(self, channels: int) -> int:
        """Count the heads of a block.

        Raises:
            ValueError: the channels do not divide.
        """
        number = self.num_heads or channels // (self.head_dim or channels)
        if channels % number or (self.head_dim and self.head_dim * number != channels):
            raise ValueError(f"{channels} channels do not divide into heads as {self}")
        return number


class ContextBlock(nn.Module):
    """A transformer block on the positions of a grid, with cross-attention to a context."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, dropout: float) -> None:
        """Make the last projection zero: the block begins as the identity."""
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [_Transformer(channels, context_dim, num_heads, dropout)]
        )
        self.proj_out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Grid, context: Float[Tensor, "batch context_tokens context_dim"]) -> Grid:
        """Read the context into a grid; every token of it is read, padding too."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))


class _Transformer(nn.Module):
    def __init__(self, dim: int, context_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attn1 = _Attention(dim, dim, num_heads, dropout)
        self.attn2 = _Attention(dim, context_dim, num_heads, dropout)
        self.ff = _FeedForward(dim, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, context_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            linear(source).unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
            for linear, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            _GatedLinear(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _GatedLinear(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * gelu(gate)


def _zeroed(module: Module) -> Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
