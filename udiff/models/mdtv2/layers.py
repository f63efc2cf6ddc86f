"""Layers of MDTv2 and MDT; attribute names are the official checkpoints' keys."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from udiff.nn.norm import ModulatedLayerNorm
from udiff.nn.timestep import timestep_features


class PatchEmbedder(nn.Module):
    """Convolution that cuts into patches; tokens are in row-major order."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        weight, bias = self.proj.parameters()
        nn.init.xavier_uniform_(weight.flatten(1))
        nn.init.zeros_(bias)

    def forward(
        self, x_t: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embed in the dtype of the weights."""
        return self.proj(x_t.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep (0..999, not scaled) and an MLP."""

    num_features = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, last = _linear(self.num_features, dim), _linear(dim, dim)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(last.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, timestep: Num[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Embed whole or fractional timesteps."""
        features = timestep_features(timestep.float(), self.num_features, max_period=10_000.0)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Table of class embeddings; with a null label, that is its last row."""

    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, label: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Look the labels up."""
        return self.embedding_table(label)


class RelativePositionBias(nn.Module):
    """One learned number per head and per offset between query and key (Swin, arXiv 2103.14030)."""

    relative_position_index: Int[Tensor, "tokens tokens"]

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        # Three rows more than there are offsets, from BEiT's class token: never used, but stored.
        rows = (2 * grid_size - 1) ** 2 + 3
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(grid_size))

    def forward(
        self, index: Int[Tensor, "*batch tokens tokens"] | None = None
    ) -> Float[Tensor, "*batch heads tokens tokens"]:
        """Look up the bias of every pair of tokens, or of the pairs whose table rows are given."""
        if index is None:
            index = self.relative_position_index
        # A gather along the table's rows: its gradient is several times faster than an embedding's.
        table = self.relative_position_bias_table.t()
        batch, pairs = index.shape[:-2], index.flatten(-2)
        rows = pairs.unsqueeze(-2).expand(*batch, len(table), -1)
        picked = table.expand(*batch, -1, -1).gather(-1, rows)
        return picked.unflatten(-1, index.shape[-2:])


class Attention(nn.Module):
    """Self-attention with a relative position bias, added after scaling."""

    def __init__(self, dim: int, num_heads: int, grid_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _linear(dim, 3 * dim)
        self.proj = _linear(dim, dim)
        self.rel_pos_bias = RelativePositionBias(grid_size, num_heads)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        index: Int[Tensor, "batch tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend among all tokens; `index` holds the bias table's rows where x is a selection."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous().unbind(0)
        attended = attend(q, k, v, self.rel_pos_bias(index))
        return self.proj(attended.transpose(1, 2).flatten(2))


def attend(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    bias: Float[Tensor, "*#batch heads tokens tokens"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Compute softmax(q k / sqrt(head_dim) + bias) v, contiguous; may overwrite `bias`."""
    if q.is_cuda or not torch.is_grad_enabled():
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # On CPUs torch has no fused kernel for a bias that learns: what it does instead takes 15 %
    # longer than this, which adds to the bias while it multiplies.
    scores = bias.expand(*q.shape[:2], -1, -1).reshape(-1, *bias.shape[-2:])
    scale = 1 / math.sqrt(q.shape[-1])
    scores = scores.baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view_as(v)


class FeedForward(nn.Module):
    """Two linear maps with a GELU (tanh form) between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = _linear(dim, hidden_dim)
        self.fc2 = _linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Apply to each token by itself."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class BlockSizes(NamedTuple):
    """Sizes that all blocks of a network share."""

    dim: int
    num_heads: int
    grid_size: int
    """Tokens along a side of the picture."""
    mlp_ratio: float


class Block(nn.Module):
    """Transformer block modulated by time and label (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.norm1 = ModulatedLayerNorm(dim)
        self.attn = Attention(dim, sizes.num_heads, sizes.grid_size)
        self.norm2 = ModulatedLayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * sizes.mlp_ratio))
        self.adaLN_modulation = _modulation(dim, 6)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch dim"],
        index: Int[Tensor, "batch tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend, then transform each token."""
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = torch.addcmul(x, gate_a, self.attn(self.norm1(x, scale_a, shift_a), index))
        return torch.addcmul(x, gate_m, self.mlp(self.norm2(x, scale_m, shift_m)))


class SkipBlock(Block):
    """A block that first mixes in tokens from further up; neither normalized nor modulated."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__(sizes)
        self.skip_linear = _linear(2 * sizes.dim, sizes.dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens joined"],
        condition: Float[Tensor, "batch dim"],
        index: Int[Tensor, "batch tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mix, attend, then transform each token; x and the other tokens are joined by channels."""
        return super().forward(self.skip_linear(x), condition, index)


class FinalLayer(nn.Module):
    """Modulated norm and linear map back to patches; zero at the start."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_final = ModulatedLayerNorm(dim)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = _modulation(dim, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Predict each token's patch; features are ordered (row, column, channel)."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, scale, shift))


def unpatchify(
    tokens: Float[Tensor, "batch tokens features"], patch_size: int
) -> Float[Tensor, "batch channels height width"]:
    """Put patches of a square grid side by side; features are ordered (row, column, channel)."""
    pattern = "b (h w) (p q c) -> b c (h p) (w q)"
    grid_size = math.isqrt(tokens.shape[1])
    return rearrange(tokens, pattern, h=grid_size, p=patch_size, q=patch_size)


def sincos_table(dim: int, grid_size: int) -> Float[Tensor, "tokens dim"]:
    """Compute positions on a grid: half the channels tell the column, half the row; float64.

    Each half is [sin(u w), cos(u w)] of the coordinate u with w_k = 10000^(-4k / dim).
    """
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    coordinate = torch.arange(grid_size, dtype=torch.float64)
    angles = torch.outer(coordinate, frequencies)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([table.repeat(grid_size, 1), table.repeat_interleave(grid_size, 0)], dim=1)


def relative_position_index(grid_size: int) -> Int[Tensor, "tokens tokens"]:
    """Compute the bias table's row of every (query, key): the offset query - key on the grid."""
    coordinate = torch.arange(grid_size)
    row, column = coordinate.repeat_interleave(grid_size), coordinate.repeat(grid_size)
    offset = row[:, None] - row + grid_size - 1, column[:, None] - column + grid_size - 1
    return offset[0] * (2 * grid_size - 1) + offset[1]


def _linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _modulation(dim: int, parts: int) -> nn.Sequential:
    layer = nn.Linear(dim, parts * dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)
