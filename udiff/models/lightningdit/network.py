"""The transformer of LightningDiT (arXiv 2501.01423), and the plain DiT that it grew from.

Attribute names are the official checkpoints' keys. Times run from 0 (noise) to 1 (data).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, addcmul, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

from udiff.nn.features import pick_feature
from udiff.nn.heads import rotary_heads, split_heads
from udiff.nn.norm import ModulatedLayerNorm, ModulatedRMSNorm, RMSNorm
from udiff.nn.patch import patchify
from udiff.nn.rotary import RotaryTable
from udiff.nn.timestep import timestep_features
from udiff.nn.token_mask import keep_tokens, restore_tokens
from udiff.system import Prediction

NormKind = Literal["rms", "layer"]
FeedForwardKind = Literal["swiglu", "gelu"]


class PatchEmbedder(nn.Module):
    """Linear embedding of patches; its weights have a convolution's shape."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embed in the dtype of the weights, row by row."""
        weight = self.proj.weight.flatten(1)
        # Not the convolution: its result would have to be transposed.
        return linear(patchify(x.to(weight.dtype), self.patch_size), weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features (t not scaled) and an MLP."""

    num_features = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Embed one time per sample."""
        features = timestep_features(t, self.num_features, max_period=10000.0)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Table of class embeddings; the last row is the null label's, where there is one."""

    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, dim)

    def forward(self, label: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Look the labels up."""
        return self.embedding_table(label)


class RotaryEmbedding(nn.Module):
    """Rotary positions of a square grid, kept in checkpoints with every value doubled.

    The first half of the pairs turns with the row, the second with the column, by integer positions
    at frequencies 10000^(-4k / head_dim).
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: int, head_dim: int) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"head_dim must be a multiple of 4 for rotary positions, got {head_dim}"
            )
        axis = torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2)
        angles = torch.outer(torch.arange(grid, dtype=torch.float32), 1.0 / 10000.0**axis)
        shape = (grid, grid, -1)
        row, column = angles[:, None].expand(shape), angles[None].expand(shape)
        doubled = torch.cat([row, column], -1).flatten(0, 1).repeat_interleave(2, dim=-1)
        self.register_buffer("freqs_cos", doubled.cos())
        self.register_buffer("freqs_sin", doubled.sin())

    def forward(self) -> RotaryTable:
        """Return each token's turn of each pair of channels."""
        return RotaryTable(self.freqs_cos[:, ::2].contiguous(), self.freqs_sin[:, ::2].contiguous())


class Attention(nn.Module):
    """Self-attention, with queries and keys normalized and turned by position if wanted."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: NormKind | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = _make_qk_norm(qk_norm, dim // num_heads)
        self.k_norm = _make_qk_norm(qk_norm, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], positions: RotaryTable | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend among all tokens."""
        qkv, norms = self.qkv(x), {"q_norm": self.q_norm, "k_norm": self.k_norm}
        if positions is None:
            q, k, v = split_heads(qkv, self.num_heads)
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, k, v = rotary_heads(qkv, self.num_heads, positions=positions, **norms)
        attended = scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where (a, b) = w12 x, with biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token by itself."""
        weights, biases = self.w12.weight.chunk(2), self.w12.bias.chunk(2)
        # Not a product with the whole: halves of its result would have to be joined again for the
        # gradient, which are longer than halves of the weight.
        gate, value = linear(x, weights[0], biases[0]), linear(x, weights[1], biases[1])
        return self.w3(silu(gate) * value)


class GeluFeedForward(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh approximation."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token by itself."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


@dataclass(frozen=True)
class Layers:
    """Which layers the transformer is made of; unless told otherwise, the released models'."""

    norm: NormKind = "rms"
    """Also of queries and keys, where `qk_norm` asks for that."""
    qk_norm: bool = False
    feed_forward: FeedForwardKind = "swiglu"
    mlp_ratio: float = 4.0
    rotary: bool = True
    shift: bool = True
    """Modulate with a shift in the blocks; the final layer always does."""
    learn_sigma: bool = False
    """Predict as many channels more, trained for nothing (kept for the weights' shape)."""
    num_encoder_blocks: int = 0
    """First blocks, whose change to the tokens is the state that later calls can be given."""


class Block(nn.Module):
    """Transformer block modulated by time and label (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, dim: int, num_heads: int, layers: Layers) -> None:
        super().__init__()
        norm, shift = layers.norm, layers.shift
        self.norm1 = _make_norm(norm, dim)
        self.attn = Attention(dim, num_heads, qk_norm=norm if layers.qk_norm else None)
        self.norm2 = _make_norm(norm, dim)
        self.mlp = _make_feed_forward(layers.feed_forward, dim, layers.mlp_ratio)
        self.shift = shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if shift else 4) * dim))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch dim"],
        positions: RotaryTable | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend, then transform each token."""
        modulation = self.adaLN_modulation(condition)[:, None]
        if self.shift:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        else:
            scale_a, gate_a, scale_m, gate_m = modulation.chunk(4, dim=-1)
            shift_a = shift_m = None
        x = addcmul(x, gate_a, self.attn(self.norm1(x, scale_a, shift_a), positions))
        return addcmul(x, gate_m, self.mlp(self.norm2(x, scale_m, shift_m)))


class FinalLayer(nn.Module):
    """Modulated norm and linear map back to patches; zero at the start."""

    def __init__(self, dim: int, features: int, *, norm: NormKind) -> None:
        super().__init__()
        self.norm_final = _make_norm(norm, dim)
        self.linear = nn.Linear(dim, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Predict each token's patch."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, scale, shift))


class LightningDiT(nn.Module):
    """Transformer over the patches of a square latent, conditioned on time and class."""

    def __init__(
        self,
        *,
        in_channels: int,
        input_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        layers: Layers,
        null_label: bool = True,
    ) -> None:
        """Make the network.

        Args:
            input_size: height and width of the latent, a multiple of `patch_size`.
            null_label: have a row for the null label, which is `num_classes`.
        """
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"latent is {input_size} x {input_size}; its side must be a multiple of patch_size "
                f"{patch_size}"
            )
        self.in_channels, self.patch_size = in_channels, patch_size
        self.grid = input_size // patch_size
        self.num_encoder_blocks = layers.num_encoder_blocks
        self.x_embedder = PatchEmbedder(in_channels, patch_size, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes + null_label, dim)
        self.pos_embed = nn.Parameter(position_table(dim, self.grid)[None], requires_grad=False)
        self.feat_rope = RotaryEmbedding(self.grid, dim // num_heads) if layers.rotary else None
        self.blocks = nn.ModuleList(Block(dim, num_heads, layers) for _ in range(depth))
        out_channels = 2 * in_channels if layers.learn_sigma else in_channels
        self.final_layer = FinalLayer(dim, out_channels * patch_size**2, norm=layers.norm)
        self._initialize()

    def forward(
        self,
        x_t: Float[Tensor, "batch channels size size"],
        t: Float[Tensor, " batch"],
        *,
        label: Int[Tensor, " batch"],
        state: Float[Tensor, "batch tokens dim"] | None = None,
        keep: Int[Tensor, "batch kept"] | None = None,
        feature_layer: int | None = None,
    ) -> Prediction:
        """Predict what the network was trained for: the velocity, in the released models.

        Args:
            x_t: noised latent of the size that the network was made for.
            t: in [0, 1], 0 = noise.
            label: class, or the number of classes for the null label.
            state: of an earlier call; added to the tokens in place of the encoder blocks
                (the front blocks' delta cache of arXiv 2406.01125).
            keep: tokens that the encoder blocks see; they pass the others by.
            feature_layer: number of blocks, counted from 1, after which tokens are returned.
        """
        embedded = self.x_embedder(x_t) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(label)
        positions = None if self.feat_rope is None else self.feat_rope()
        features: dict[int, Tensor] = {}
        first = self.num_encoder_blocks
        if state is None:
            x = self._encode(embedded, condition, positions, keep, features)
            state = x - embedded if first else None
        else:
            x = embedded + state
        for layer, block in enumerate(self.blocks[first:], first + 1):
            x = features[layer] = block(x, condition, positions)
        output = unpatchify(self.final_layer(x, condition), self.patch_size, self.grid)
        return Prediction(
            output[:, : self.in_channels].contiguous(), pick_feature(features, feature_layer), state
        )

    def _encode(
        self,
        embedded: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch dim"],
        positions: RotaryTable | None,
        keep: Int[Tensor, "batch kept"] | None,
        features: dict[int, Tensor],
    ) -> Float[Tensor, "batch tokens dim"]:
        x = embedded
        if keep is not None:
            x, positions = keep_tokens(x, keep), positions and positions.keep(keep)
        for layer, block in enumerate(self.blocks[: self.num_encoder_blocks], 1):
            x = features[layer] = block(x, condition, positions)
        return x if keep is None else restore_tokens(x, keep, embedded)

    def _initialize(self) -> None:
        for name, p in self.named_parameters():
            if "bias" in name or "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)
            elif "t_embedder" in name or "y_embedder" in name:
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1 and p.requires_grad:
                nn.init.xavier_uniform_(p.flatten(1))


def position_table(dim: int, grid: int) -> Float[Tensor, "tokens dim"]:
    """Compute sines and cosines of each token's place, in float64 and then rounded.

    The first half of the channels encodes the column, the second the row; a half is all sines, then
    all cosines (arXiv 2111.06377).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    shape = (grid, grid, -1)
    column, row = axis[None].expand(shape), axis[:, None].expand(shape)
    return torch.cat([column, row], -1).flatten(0, 1).float()


def unpatchify(
    tokens: Float[Tensor, "batch tokens features"], patch_size: int, grid: int
) -> Float[Tensor, "batch channels size size"]:
    """Put patches together; unlike in `patchify`, a token's features are (row, column, channel)."""
    pattern = "b (h w) (p q c) -> b c (h p) (w q)"
    return rearrange(tokens, pattern, h=grid, w=grid, p=patch_size, q=patch_size)


def _make_norm(kind: NormKind, dim: int) -> nn.Module:
    return ModulatedRMSNorm(dim) if kind == "rms" else ModulatedLayerNorm(dim)


def _make_qk_norm(kind: NormKind | None, head_dim: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    # Published as it is: with weight and bias and another eps than the blocks' norms.
    return RMSNorm(head_dim) if kind == "rms" else nn.LayerNorm(head_dim)


def _make_feed_forward(kind: FeedForwardKind, dim: int, mlp_ratio: float) -> nn.Module:
    hidden_dim = int(dim * mlp_ratio)
    if kind == "gelu":
        return GeluFeedForward(dim, hidden_dim)
    return SwiGLU(dim, int(2 / 3 * hidden_dim))
